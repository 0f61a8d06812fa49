"""Who may claim what, through a whole gateway: AGENTS_FILE, tokens, wildcards, limits."""

import contextlib
import json
import logging
import signal
import threading
import time

import jwt
import pytest
from hand_made import HOUR, HandMade, answering, registered, registration, reply_to
from support import (
    APP,
    GATEWAY_HOST,
    SECRET,
    TIMEOUT,
    TUNNEL_HOST,
    agent_here,
    answer,
    ca_of,
    gateway_here,
    gateway_process,
    go_agent,
    request,
    reserved_port,
    routes_of,
    status_of,
    wait_until,
)

from gotunnel import ANY_PORT, CERTIFICATES, PORTS, REASONS, Ack, Certificate, End
from gotunnel_agent.common.proxy_protocol import VERSIONS, encode, encode_unknown
from gotunnel_agent.common.token_bucket import Buckets
from gotunnel_agent.registering import make_token
from gotunnel_server import gateway as gateway_module
from gotunnel_server.agents import attempts as attempts_module
from gotunnel_server.agents import credentials
from gotunnel_server.agents.registration import Agent
from gotunnel_server.certs.local_ca import Authority

OTHER = "other.localhost"
OWN_SECRET = "an-agent's-own-secret-of-32-bytes"


class AgentsFile:
    """AGENTS_FILE of one entry, "office", that a test changes."""

    def __init__(self, path, **keys):
        self.path = path
        self.write(**keys)

    def write(self, **keys):
        entry = {"secret": OWN_SECRET, "hosts": [APP, "*.dev.localhost"], **keys}
        self.path.write_text(json.dumps({"office": entry}))
        self.path.chmod(0o600)

    def take_away(self):
        self.path.write_text("{}")


@pytest.fixture
def agents_file(tmp_path):
    return AgentsFile(tmp_path / "agents.yaml")


@pytest.fixture
def gateway(cache, agents_file, monkeypatch):
    monkeypatch.setattr(gateway_module, "RELOAD", 0.05)
    with gateway_here(cache, AGENTS_FILE=str(agents_file.path)) as gateway:
        yield gateway


def office(**claims):
    now = int(time.time())
    claims = {"iss": "office", "iat": now, "exp": now + HOUR, **claims}
    return jwt.encode(claims, OWN_SECRET, "HS256")


# Hostnames ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("hostnames", "claims", "error"),
    [
        ([APP], {}, ""),
        (["x.dev.localhost", "y.x.dev.localhost", "*.dev.localhost"], {}, ""),
        ([OTHER], {}, f"not allowed: {OTHER}: this credential may claim {APP}, *.dev.localhost"),
        (
            [APP, OTHER, "dev.localhost"], {},
            f"not allowed: dev.localhost, {OTHER}: this credential may claim {APP}, *.dev",
        ),
        ([APP], {"hosts": ["x.dev.localhost"]},
         f"not allowed: {APP}: this credential may claim x.dev.localhost"),
        (["x.dev.localhost"], {"hosts": ["x.dev.localhost", OTHER]}, ""),
        ([OTHER], {"hosts": [OTHER]}, f"not allowed: {OTHER}: this credential may claim none"),
        ([APP], {"hosts": 7}, "auth failed: the token's hosts cannot be read: neither text"),
        ([APP], {"hosts": ["*"]}, "auth failed: the token's hosts cannot be read: '*' covers too"),
        (["*.localhost"], {}, "invalid hostname: *.localhost"),
    ],
)  # fmt: skip
def test_file_and_token_must_both_allow_a_hostname(gateway, hostnames, claims, error):
    ack = reply_to(gateway, registration(*hostnames, token=office(**claims)))
    assert ack.ok is not bool(error) and ack.error.startswith(error)


def test_an_agent_with_an_entry_is_one_wherever_it_comes_from(gateway, agents_file, monkeypatch):
    """Its orders are counted together; those of the common secret, by address."""
    agents = []
    monkeypatch.setattr(gateway.inner.tunnels, "ensure_certificates",
                        lambda hostnames, agent, limits: agents.append(agent))  # fmt: skip
    with registered(gateway, APP, token=office()), registered(gateway, OTHER):
        pass
    assert [len(agent) for agent in agents] == [2, 3]


def test_the_limits_of_a_credentials_orders_are_handed_down(gateway, agents_file, monkeypatch):
    given = []
    monkeypatch.setattr(gateway.inner.tunnels, "ensure_certificates",
                        lambda hostnames, agent, limits: given.append((agent, limits)))  # fmt: skip
    agents_file.write(limits={"orders_per_hour": 3, "orders_per_week": 5})
    gateway.inner.reload()
    wait_until(lambda: gateway.inner._credentials._entries["office"].limits.orders_per_hour == 3)
    for hostname in ("one.dev.localhost", "two.dev.localhost"):  # hostnames that come and go
        assert reply_to(gateway, registration(hostname, token=office())).ok
    assert [agent for agent, _ in given] == [("agent", "office")] * 2
    assert {(limits.orders_per_hour, limits.orders_per_week) for _, limits in given} == {(3, 5)}


def test_agents_with_the_common_secret_are_one_for_orders_within_an_ipv6_64():
    identity = credentials.Identity("anyone")
    hosts = ("2001:db8::1", "2001:db8::ffff", "2001:db8:0:1::1", "192.0.2.1", "192.0.2.2")
    blamed = [Agent((host, 1), identity, "").blame for host in hosts]
    assert blamed[0] == blamed[1] and len(set(blamed)) == 4


def test_the_log_names_the_credential(gateway, agents_file, caplog):
    """Many agents may come from one address, and whose entry must be mended is the question."""
    caplog.set_level(logging.INFO)
    with registered(gateway, APP, token=office()):
        pass
    assert not reply_to(gateway, registration(OTHER, token=office())).ok
    with registered(gateway, OTHER):
        wait_until(lambda: f"agent at 127.0.0.1 registered {OTHER}" in caplog.text)
    for words in (f"registered {APP}", f"refused: not allowed: {OTHER}"):
        line = f"agent office at 127.0.0.1 {words}"
        wait_until(lambda line=line: line in caplog.text)


def test_a_token_may_be_narrower_than_the_shared_secret(gateway):
    now = int(time.time())
    claims = {"iss": "x", "exp": now + HOUR, "hosts": [APP, "*.wild.localhost"]}
    token = jwt.encode(claims, SECRET, "HS256")
    assert reply_to(gateway, registration(APP, "*.wild.localhost", token=token)).ok
    assert not reply_to(gateway, registration(OTHER, token=token)).ok


def test_the_shared_secret_claims_any_hostname_but_no_wildcard(gateway):
    assert reply_to(gateway, registration(OTHER)) == Ack(True)
    refused = reply_to(gateway, registration("*.dev.localhost"))
    assert refused.error == (
        "not allowed: *.dev.localhost: a wildcard needs a credential that names the hostnames it "
        "is for"
    )


def test_the_shared_secret_does_not_speak_for_who_has_one_of_its_own(gateway):
    refused = reply_to(gateway, registration(APP, token=make_token(SECRET, "office", HOUR)))
    assert refused == Ack(
        False,
        "auth failed: the token's signature does not fit: "
        "compare jwt_secret and jwt_issuer with the gateway's",
    )


def test_a_gateway_may_do_without_a_shared_secret(cache, agents_file):
    with gateway_here(cache, AGENTS_FILE=str(agents_file.path), JWT_SECRET="") as gateway:
        assert reply_to(gateway, registration(APP, token=office())).ok
        assert not reply_to(gateway, registration(APP)).ok


def test_look_alikes_are_one_hostname(gateway):
    """Full width letters are no way round a pattern, nor to a name that another has."""
    assert reply_to(gateway, registration("\uff41pp.localhost", token=office())).ok
    with registered(gateway, APP) as agent, answering(agent):
        refused = reply_to(gateway, registration("\uff41pp.localhost", token=office()))
        assert refused.error == f"host already registered: {APP}"


def test_ten_thousand_hostnames_are_refused_in_words(gateway):
    with registered(gateway, OTHER):
        refused = reply_to(gateway, registration(*(f"h{n}.test" for n in range(10_000))))
        assert refused.error == (
            "invalid registration: a control message of more than 65536 bytes, "
            "expected fewer hostnames, or shorter policies"
        )
        assert routes_of(gateway.inner) == {OTHER}


def test_who_waits_while_its_credential_is_taken_away_gets_no_hostname(gateway, agents_file):
    with registered(gateway, APP), HandMade(gateway, registration(APP, token=office())) as waiting:
        wait_until(lambda: gateway.inner.tunnels.registered()[0]._heartbeat._is_asked)
        agents_file.take_away()
        gateway.inner.reload()
        assert waiting.hear() == Ack(
            False, "auth failed: issuer office was removed from AGENTS_FILE"
        )


def test_too_many_hostnames_cost_nobody_a_session(gateway, agents_file):
    """Also not the one that the same agent had."""
    agents_file.write(limits={"hostnames": 1})
    gateway.inner.reload()
    wait_until(lambda: gateway.inner._credentials._entries["office"].limits.hostnames == 1)
    with registered(gateway, APP, token=office(), instance="same"):
        more = registration(APP, "x.dev.localhost", token=office(), instance="same")
        assert not reply_to(gateway, more).ok
        assert routes_of(gateway.inner) == {APP}


def test_a_go_agent_is_limited_by_its_issuer(gateway, gopeer, origin, agents_file):
    agents_file.write(hosts=[OTHER])
    gateway.inner.reload()
    with go_agent(gopeer, gateway, "-issuer", "office", http={APP: origin.port}, ready=False,
                  secret=OWN_SECRET) as agent:  # fmt: skip
        agent.wait_for(f"^refused: not allowed: {APP}: this credential may claim {OTHER}$")
    with go_agent(gopeer, gateway, "-issuer", "office", http={OTHER: origin.port},
                  secret=OWN_SECRET):  # fmt: skip
        wait_until(lambda: routes_of(gateway.inner) == {OTHER})


# Ports -------------------------------------------------------------------------------------------


def test_a_port_beyond_the_credentials_is_refused_and_any_is_one_of_its_own(cache, agents_file):
    with contextlib.ExitStack() as free:
        ports = [free.enter_context(reserved_port()) for _ in range(3)]
        agents_file.write(ports=[ports[1]])
        changes = {"TCP_PORTS": ",".join(map(str, ports)), "AGENTS_FILE": str(agents_file.path)}
        message = {"token": office(), "modes": {APP: "tcp"}, "features": (PORTS,)}
        with gateway_here(cache, **changes) as gateway:
            for wanted, given in (ANY_PORT, ports[1]), (ports[1], ports[1]), (ports[2], None):
                ack = reply_to(gateway, registration(APP, ports={APP: str(wanted)}, **message))
                assert ack.ports == ({APP: str(given)} if given else {})
            assert ack.refused == {APP: f"this credential may have the ports {ports[1]}"}
            with registered(gateway, APP, ports={APP: ANY_PORT}, **message):
                more = {**message, "modes": {"x.dev.localhost": "tcp"}}
                message = registration(
                    "x.dev.localhost", ports={"x.dev.localhost": ANY_PORT}, **more
                )
                assert reply_to(gateway, message).refused == {
                    "x.dev.localhost": "none of the free ports is for this agent: this "
                    f"credential may have the ports {ports[1]}"
                }


# What is taken away ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda file: file.take_away(), "issuer office was removed from AGENTS_FILE"),
        (lambda file: file.write(disabled=True), "issuer office is disabled in AGENTS_FILE"),
        (lambda file: file.write(secret="x" * 40), "the secret of issuer office was changed"),
        (lambda file: file.write(hosts=[OTHER]), f"issuer office may no longer claim {APP}"),
        (lambda file: file.write(limits={"visits": 1}), "the limits of issuer office were changed"),
        (lambda file: file.write(expires="2020-01-01"), "issuer office expired in AGENTS_FILE"),
    ],
)
def test_a_session_ends_when_its_credential_is_taken_away(gateway, agents_file, change, reason):
    with registered(gateway, APP, token=office(), features=(REASONS,)) as agent:
        with registered(gateway, OTHER) as neighbour:
            change(agents_file)
            end = agent.hear()
            assert isinstance(end, End) and end.reason.startswith(reason)
            wait_until(lambda: routes_of(gateway.inner) == {OTHER})
            assert not neighbour.session.ended


def test_a_session_ends_with_the_token_that_was_given_for_it(gateway, monkeypatch):
    """Not with one that an agent has signed itself: it signs another whenever it comes."""
    given, signed = office(hosts=[APP]), office()
    with registered(gateway, APP, token=given, features=(REASONS,)) as agent:
        with registered(gateway, "x.dev.localhost", token=signed):
            later = time.time() + HOUR + 61
            monkeypatch.setattr(credentials.time, "time", lambda: later)
            assert agent.hear().reason.startswith("its token expired")
            wait_until(lambda: routes_of(gateway.inner) == {"x.dev.localhost"})


def test_a_session_that_leaves_is_ended_too(gateway, agents_file):
    """Its visits go on, and would do so for ever."""
    with registered(gateway, APP, token=office()) as agent, gateway.dial(APP) as visitor:
        visitor.send(request())
        agent.session.accept(TIMEOUT)
        agent.session.leave()
        wait_until(lambda: not routes_of(gateway.inner))
        agents_file.take_away()
        assert status_of(visitor.read_message()[0]) == 502


def test_a_file_that_breaks_takes_nothing_away(gateway, agents_file, caplog):
    with registered(gateway, APP, token=office()):
        agents_file.path.write_text("office: {secret: [")
        wait_until(lambda: "the entries read before stay" in caplog.text)
        assert OWN_SECRET not in caplog.text
        assert routes_of(gateway.inner) == {APP}
        assert reply_to(gateway, registration("x.dev.localhost", token=office())).ok


@pytest.mark.slow
def test_hang_up_reads_the_file_again(cache, agents_file):
    """As a service's reload does; nothing else ends."""
    with gateway_process(cache, AGENTS_FILE=str(agents_file.path)) as gateway:
        with registered(gateway, APP, token=office(), features=(REASONS,)) as agent:
            agents_file.write(disabled=True)
            gateway.program.signal(signal.SIGHUP)
            assert isinstance(agent.hear(), End)
        assert reply_to(gateway, registration(OTHER)).ok


# Failed attempts ---------------------------------------------------------------------------------


def test_who_guesses_is_slowed_down_and_then_shut_out(gateway, monkeypatch):
    attempts = gateway.inner._newcomers.attempts
    waits = []
    monkeypatch.setattr(attempts, "delay", lambda address: waits.append(address) or 0.01)
    refused = reply_to(gateway, registration(APP, token="x.y.z"))
    assert refused.error.startswith("auth failed")
    assert waits == ["127.0.0.1"]
    monkeypatch.setattr(attempts, "may_open", lambda address: False)
    with pytest.raises(OSError):
        HandMade(gateway)
    monkeypatch.undo()
    assert reply_to(gateway, registration(APP)).ok


NOT_ALL = "too many bad tokens came from this address"


@pytest.fixture
def closed(gateway, monkeypatch):
    """Where two bad tokens close an address, three more are looked at, and no answer is slow."""
    monkeypatch.setattr(attempts_module, "MOST_FAILURES", 1)
    attempts = gateway.inner._newcomers.attempts
    attempts._checks = Buckets(1e-6, 3)
    for _ in range(2):
        assert "auth failed" in reply_to(gateway, registration(APP, token="x.y.z")).error
    return attempts


def test_only_who_does_not_prove_who_it_is_has_failed(gateway, monkeypatch):
    monkeypatch.setattr(attempts_module, "MOST_FAILURES", 1)
    attempts = gateway.inner._newcomers.attempts
    for _ in range(2):
        assert reply_to(gateway, registration(APP)).ok
        assert not reply_to(gateway, registration(OTHER, token=office())).ok
    assert not attempts.closed("127.0.0.1")
    for _ in range(2):
        assert not reply_to(gateway, registration(APP, token="x.y.z")).ok
    assert attempts.closed("127.0.0.1")


def test_a_good_token_gets_in_at_an_address_that_is_closed(gateway, closed):
    assert closed.closed("127.0.0.1")
    assert reply_to(gateway, registration(APP)).ok
    assert reply_to(gateway, registration(APP)).ok


def test_few_tokens_are_looked_at_of_an_address_that_is_closed(gateway, closed):
    said = [reply_to(gateway, registration(APP, token="x.y.z")).error for _ in range(5)]
    assert ["auth failed" in text for text in said] == [True, True, True, False, False]
    assert NOT_ALL in said[3] and NOT_ALL in reply_to(gateway, registration(APP)).error


def test_an_agent_that_was_registered_gets_in_whatever_others_at_its_address_do(gateway, closed):
    assert reply_to(gateway, registration(APP, instance="mine")).ok
    while NOT_ALL not in reply_to(gateway, registration(APP, token="x.y.z")).error:
        pass
    assert reply_to(gateway, registration(APP, instance="mine")).ok
    assert not reply_to(gateway, registration(APP, instance="another")).ok


def test_our_agent_comes_back_to_an_address_that_a_stranger_has_closed(gateway, tmp_path, origin):
    """With the real numbers: 130 bad registrations, and the stranger goes on."""
    attempts = gateway.inner._newcomers.attempts
    over = threading.Event()

    def guess():
        while not over.is_set():
            with contextlib.suppress(OSError):
                HandMade(gateway, registration(APP, token="x.y.z")).__exit__()

    for _ in range(130):
        attempts.failed("127.0.0.1")
    stranger = threading.Thread(target=guess)
    stranger.start()
    try:
        assert attempts.closed("127.0.0.1")
        with agent_here(gateway, tmp_path, http={APP: origin.port}):
            next(iter(gateway.inner.tunnels.registered())).end("for a test")
            gateway.wait_for_routes(APP)
    finally:
        over.set()
        stranger.join()


def test_the_log_says_when_an_address_is_slowed_and_closed(gateway, caplog, monkeypatch):
    monkeypatch.setattr(attempts_module, "FREE_FAILURES", 0)
    monkeypatch.setattr(attempts_module, "MOST_FAILURES", 1)
    for _ in range(3):
        reply_to(gateway, registration(APP, token="x.y.z"))
    said = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert (
        sum("agents at 127.0.0.1: 1 bad tokens" in line and "delayed" in line for line in said) == 1
    )
    closed = [line for line in said if "agents at 127.0.0.1: 2 bad tokens" in line]
    assert len(closed) == 1 and "TRUSTED_PROXIES" in closed[0]


# Proxies in front --------------------------------------------------------------------------------

AGENT = ("203.0.113.9", 56324)


@contextlib.contextmanager
def trusting(cache, proxies="127.0.0.1"):
    with gateway_here(cache, TRUSTED_PROXIES=proxies) as gateway:
        yield gateway


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("cut", [False, True], ids=["at once", "byte by byte"])
def test_an_agent_is_whom_a_trusted_proxy_names(cache, version, cut):
    header = encode(version, AGENT, ("198.51.100.7", 9443))
    pieces = [header[at : at + 1] for at in range(len(header))] if cut else [header]
    with trusting(cache) as gateway:
        with HandMade(gateway, registration(APP), introduction=pieces) as agent:
            assert agent.hear().ok
            (tunnel,) = gateway.inner.tunnels.registered()
            assert tunnel.agent.host == AGENT[0]


def test_a_stranger_behind_a_trusted_proxy_closes_its_own_address_alone(cache):
    with trusting(cache) as gateway:
        attempts = gateway.inner._newcomers.attempts
        header = encode("v2", AGENT, ("198.51.100.7", 9443))
        bad = registration(APP, token="x.y.z")
        assert not reply_to(gateway, bad, introduction=[header]).ok
        assert attempts._failures(AGENT[0]) == 1 and attempts._failures("127.0.0.1") == 0
        attempts.may_open = lambda address: address != AGENT[0]
        with pytest.raises(OSError):
            HandMade(gateway, introduction=[header])
        other = encode("v2", ("203.0.113.10", 1), ("198.51.100.7", 9443))
        assert reply_to(gateway, registration(APP), introduction=[other]).ok


def test_a_trusted_proxy_may_name_nobody(cache):
    with trusting(cache) as gateway:
        for introduction in ([], [encode_unknown("v1")], [encode_unknown("v2")]):
            assert reply_to(gateway, registration(APP), introduction=introduction).ok


def test_a_stranger_may_not_say_where_it_comes_from(cache, caplog):
    with trusting(cache, proxies="192.0.2.1") as gateway:
        header = encode("v1", AGENT, ("198.51.100.7", 9443))
        with pytest.raises(OSError):
            HandMade(gateway, introduction=[header])
        wait_until(lambda: "TRUSTED_PROXIES does not name it" in caplog.text)


def test_a_trusted_proxy_that_breaks_the_rules_is_dropped(cache, caplog):
    with trusting(cache) as gateway:
        with pytest.raises(OSError):
            HandMade(gateway, introduction=[b"PROXY TCP4 nonsense\r\n"])
        wait_until(lambda: "trusted proxy at 127.0.0.1" in caplog.text)


# Wildcards ---------------------------------------------------------------------------------------


def test_a_wildcard_serves_what_nobody_else_does(gateway, tmp_path, origin):
    """The agent gets the data header as it registered it, the target the visitor's Host."""
    keys = {"jwt_secret": OWN_SECRET, "jwt_issuer": "office"}
    with agent_here(gateway, tmp_path, http={"*.dev.localhost": origin.port}, **keys):
        with gateway.dial("x.dev.localhost") as visitor:
            visitor.send(request(host="x.dev.localhost"))
            with origin.accept() as target:
                assert b"\r\nHost: x.dev.localhost\r\n" in target.read_head()
                target.send(answer(b"by the wildcard"))
            assert visitor.read_message()[1] == b"by the wildcard"
        with registered(gateway, "exact.dev.localhost") as exact:
            with gateway.dial("exact.dev.localhost") as visitor:
                visitor.send(request(host="exact.dev.localhost"))
                exact.session.accept(TIMEOUT)


def test_an_agent_hears_that_its_wildcard_has_no_certificate(tmp_path, agents_file):
    own = tmp_path / "own"
    own.mkdir()
    authority = Authority(tmp_path / "authority")
    for name in (GATEWAY_HOST, TUNNEL_HOST):
        for file in authority.issue(name):
            (own / file.name).write_bytes(file.read_bytes())
    cache = tmp_path / "cache"
    ca_of(cache).parent.mkdir(parents=True)
    ca_of(cache).write_bytes(authority.ca_file.read_bytes())
    changes = {"ACME_ENV": "", "CERT_DIR": str(own), "AGENTS_FILE": str(agents_file.path)}
    with gateway_here(cache, **changes) as gateway:
        more = {"token": office(), "features": (CERTIFICATES,)}
        with registered(gateway, "*.dev.localhost", **more) as agent:
            assert agent.hear() == Certificate(
                "*.dev.localhost",
                "failed: CERT_DIR has no certificate for *.dev.localhost, and wildcards are not "
                "ordered",
            )


# Limits ------------------------------------------------------------------------------------------


def test_hostnames_are_counted_over_all_sessions_of_a_credential(gateway, agents_file):
    agents_file.write(limits={"hostnames": 2})
    gateway.inner.reload()
    three = [f"{n}.dev.localhost" for n in range(3)]
    wait_until(lambda: gateway.inner._credentials._entries["office"].limits.hostnames == 2)
    refused = reply_to(gateway, registration(*three, token=office()))
    assert refused.error == "too many hostnames: 3, at most 2 for this credential"
    with registered(gateway, three[0], token=office()):
        with registered(gateway, three[1], token=office()):
            refused = reply_to(gateway, registration(three[2], token=office()))
            assert refused.error == "too many hostnames: 3, at most 2 for this credential"
            assert routes_of(gateway.inner) == set(three[:2])
            assert reply_to(gateway, registration(OTHER)).ok


def test_as_many_hostnames_as_permitted_are_granted_to_many_who_come_at_once(gateway, agents_file):
    agents_file.write(limits={"hostnames": 3})
    gateway.inner.reload()
    wait_until(lambda: gateway.inner._credentials._entries["office"].limits.hostnames == 3)
    with contextlib.ExitStack() as stack:
        agents = [stack.enter_context(HandMade(gateway)) for _ in range(8)]
        for number, agent in enumerate(agents):
            agent.control.write(registration(f"{number}.dev.localhost", token=office()))
        said = [agent.hear() for agent in agents]
    assert sum(reply.ok for reply in said) == 3
    assert {reply.error for reply in said if not reply.ok} == {
        "too many hostnames: 4, at most 3 for this credential"
    }


def test_hostnames_of_other_credentials_do_not_count(gateway, agents_file):
    agents_file.write(limits={"hostnames": 1})
    gateway.inner.reload()
    wait_until(lambda: gateway.inner._credentials._entries["office"].limits.hostnames == 1)
    with registered(gateway, OTHER, "x.localhost"), registered(gateway, APP, token=office()):
        with HandMade(gateway, registration("x.dev.localhost", token=office())) as refused:
            assert not refused.hear().ok
            # It has got nothing, also before it has left.
            assert set(gateway.inner.tunnels.registry.routes()) == {OTHER, "x.localhost", APP}


@pytest.mark.parametrize("limit", ["visits", "streams"])
def test_a_visit_more_than_permitted_hears_of_a_limit_and_the_log_says_which(
    gateway, agents_file, limit, caplog
):
    caplog.set_level(logging.INFO)
    agents_file.write(limits={limit: 2})
    gateway.inner.reload()
    wait_until(lambda: getattr(gateway.inner._credentials._entries["office"].limits, limit) == 2)
    with contextlib.ExitStack() as stack:
        agents = [stack.enter_context(registered(gateway, name, token=office()))
                  for name in (APP, "x.dev.localhost")]  # fmt: skip
        streams = []
        for agent, name in zip(agents, (APP, "x.dev.localhost")):
            visitor = stack.enter_context(gateway.dial(name))
            visitor.send(request(host=name))
            streams.append(agent.session.accept(TIMEOUT))
        with gateway.dial(APP) as visitor:
            visitor.send(request())
            head, body = visitor.read_message()
            assert status_of(head) == 503 and b"X-Gotunnel-Error: agent-limit\r\n" in head
            assert f"{APP} serves as many visitors as it may. Try again".encode() in body
            assert f"its agent may have 2 {limit} at once, and has 2." in caplog.text
        streams[0].write(answer(b"done", "Connection: close"))
        streams[0].close()

        def is_served():
            with gateway.dial(APP) as visitor:
                visitor.send(request())
                with contextlib.suppress(TimeoutError):
                    agents[0].session.accept(0.2).close()
                    return True

        wait_until(is_served)


def test_a_stream_that_is_kept_makes_room_for_a_visit(gateway, agents_file, tmp_path, origin):
    """One that waits for the next visit of another hostname must not refuse one that is there."""
    agents_file.write(limits={"streams": 1})
    gateway.inner.reload()
    wait_until(lambda: gateway.inner._credentials._entries["office"].limits.streams == 1)

    def script(target):
        while target.read_head():
            target.send(answer(b"page"))

    origin.serve(script)
    ports = {APP: origin.port, "x.dev.localhost": origin.port}
    with agent_here(gateway, tmp_path, http=ports, jwt_secret=OWN_SECRET, jwt_issuer="office"):
        [agent] = gateway.inner.tunnels.registered()
        for hostname in [*ports, *ports]:
            assert gateway.get(hostname)[0] == 200
            wait_until(lambda: len(agent._kept._all) == 1)


def test_a_visit_over_a_stream_that_was_kept_counts_too(gateway, agents_file, tmp_path, origin):
    agents_file.write(limits={"visits": 1})
    gateway.inner.reload()
    wait_until(lambda: gateway.inner._credentials._entries["office"].limits.visits == 1)
    other, done = "x.dev.localhost", threading.Event()

    def script(target):
        while head := target.read_head():
            if other.encode() in head:
                done.wait(TIMEOUT)
            target.send(answer(b"page"))

    origin.serve(script)
    ports = {APP: origin.port, other: origin.port}
    with agent_here(gateway, tmp_path, http=ports, jwt_secret=OWN_SECRET, jwt_issuer="office"):
        [agent] = gateway.inner.tunnels.registered()
        assert gateway.get(APP)[0] == 200
        wait_until(lambda: len(agent._kept._all) == 1)
        with gateway.dial(other) as visitor:
            visitor.send(request(host=other))
            wait_until(lambda: agent.usage().visits == 1)
            status = gateway.get(APP)[0]
            done.set()
            assert status_of(visitor.read_message()[0]) == 200
        assert status == 503


@pytest.mark.parametrize("method", ["GET", "POST"])
def test_who_has_its_whole_answer_makes_room_for_the_next(
    gateway, agents_file, tmp_path, origin, method
):
    """The next request comes as soon as the last byte is there, by another connection."""
    agents_file.write(limits={"visits": 1})
    gateway.inner.reload()
    wait_until(lambda: gateway.inner._credentials._entries["office"].limits.visits == 1)

    def script(target):
        while True:
            target.read_message()
            target.send(answer(b"page"))

    origin.serve(script)
    with agent_here(
        gateway, tmp_path, http={APP: origin.port}, jwt_secret=OWN_SECRET, jwt_issuer="office"
    ):
        with gateway.dial(APP) as one, gateway.dial(APP) as other:
            for visitor in (one, other) * 100:
                visitor.send(request(method, body=b"x" if method == "POST" else b""))
                assert status_of(visitor.read_message()[0]) == 200


def test_no_more_visits_than_permitted_at_once_however_many_come(
    gateway, agents_file, tmp_path, origin
):
    agents_file.write(limits={"visits": 3})
    gateway.inner.reload()
    wait_until(lambda: gateway.inner._credentials._entries["office"].limits.visits == 3)
    at_once, most, lock = [0], [0], threading.Lock()
    refused, full = threading.Event(), threading.Event()  # before both, no visit ends

    def script(target):
        while target.read_head():
            with lock:
                at_once[0] += 1
                most[0] = max(most[0], at_once[0])
                if at_once[0] == 3:
                    full.set()
            assert refused.wait(TIMEOUT) and full.wait(TIMEOUT)
            with lock:
                at_once[0] -= 1
            target.send(answer(b"page"))

    origin.serve(script)
    statuses = []

    def visit():
        for _ in range(20):
            with gateway.dial(APP) as visitor:
                visitor.send(request())
                statuses.append(status_of(visitor.read_message()[0]))
            if statuses[-1] == 503:
                refused.set()

    keys = {"jwt_secret": OWN_SECRET, "jwt_issuer": "office"}
    with agent_here(gateway, tmp_path, http={APP: origin.port}, **keys):
        threads = [threading.Thread(target=visit) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert most[0] == 3
    assert set(statuses) == {200, 503}
