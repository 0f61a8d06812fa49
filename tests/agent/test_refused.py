"""What an agent makes of a gateway's answers that differ by hostname: addresses, completed names,
refusals of some; and who hears of it (the log, snapshot(), on_change, status)."""

import json
import logging
import threading
from time import monotonic

import pytest
from support import (
    APP,
    RAW,
    TIMEOUT,
    Origin,
    agent_here,
    answer,
    gateway_here,
    go_gateway,
    request,
    reserved_port,
    wait_until,
)
from test_agent import HandMadeGateway

from gotunnel import (
    LATER_PORTS,
    MOVE,
    NAMES,
    OVERLAP,
    PARTIAL,
    PORTS,
    URLS,
    Ack,
    Certificate,
    End,
    Port,
    encode_message,
)
from gotunnel_agent import link as link_module
from gotunnel_agent import registering
from gotunnel_agent.config import Target, Tunnel
from gotunnel_agent.link import (
    MOST_REFUSED_DELAY,
    REFUSED_DELAY,
    retry_delay,
    shown_target,
)
from gotunnel_agent.metrics import figures
from gotunnel_agent.status import describe
from gotunnel_server import gateway as gateway_module

OTHER = "other.localhost"
OPEN = "quick-otter.*"
GRANTED = "quick-otter.dev.localhost"
TAKEN = f"host already registered: {OTHER}"
FEATURES = (OVERLAP, URLS, PARTIAL, NAMES)
SOME = Ack(True, features=FEATURES, denied={OTHER: TAKEN}, urls={APP: f"https://{APP}"})
ALL = Ack(True, features=FEATURES, urls={APP: f"https://{APP}", OTHER: f"https://{OTHER}"})


@pytest.fixture
def gateway(cache):
    with HandMadeGateway(cache) as gateway:
        yield gateway


@pytest.fixture
def never(monkeypatch):
    """No retry comes."""
    monkeypatch.setattr(link_module, "retry_delay", lambda *arguments: 10 * TIMEOUT)


def over(*sessions):
    for session in sessions:
        session.close()
        session.join()


# Some are refused --------------------------------------------------------------------------------


def test_refused_hostname_is_told_and_the_others_are_served(gateway, tmp_path, never, caplog):
    caplog.set_level(logging.INFO)
    with agent_here(gateway.place, tmp_path, {APP: 1, OTHER: 2}) as agent:
        assert PARTIAL in gateway.meet(SOME).features
        wait_until(lambda: f"serving {APP}" in caplog.text)
        told = agent.snapshot()
        assert list(told.routes) == [APP] and told.refused == {OTHER: TAKEN}
        assert f"{OTHER}: not served: the gateway refused: {TAKEN}; the agent keeps" in caplog.text
        rows = {row["hostname"]: row for row in describe(told, "agent.yaml")["tunnels"]}
        assert rows[APP]["served"] and rows[APP]["url"] == f"https://{APP}"
        assert not rows[OTHER]["served"] and rows[OTHER]["target"] == "127.0.0.1:2"
        assert rows[OTHER]["reason"] == f"refused: {TAKEN}"
        samples = {metric.name: metric.samples for metric in figures(agent)}
        assert samples["gotunnel_agent_tunnels"][0].value == 2
        assert samples["gotunnel_agent_refused_tunnels"][0].value == 1
        gateway.hang_up()


def test_agent_asks_again_for_what_was_refused_alone(gateway, tmp_path, quick, caplog):
    caplog.set_level(logging.INFO)
    with agent_here(gateway.place, tmp_path, {APP: 1, OTHER: 2}) as agent:
        gateway.meet(SOME)
        good = gateway.session
        for _ in range(3):
            asked = gateway.meet(Ack(False, TAKEN, (PARTIAL,), denied={OTHER: TAKEN}))
            assert set(asked.routes) == {OTHER} and asked.overlap
            gateway.hang_up()
        assert not good.ended and agent.snapshot().refused == {OTHER: TAKEN}
        assert caplog.text.count("not served: the gateway refused") == 1

        # another reason is news
        gateway.meet(Ack(False, "not allowed: today", (PARTIAL,), denied={OTHER: "not allowed: x"}))
        gateway.hang_up()
        wait_until(
            lambda: f"{OTHER}: not served: the gateway refused: not allowed: x" in caplog.text
        )

        gateway.meet(Ack(True, features=FEATURES, urls={OTHER: f"https://{OTHER}"}))
        probe = gateway.session
        wait_until(lambda: f"grants {OTHER} now" in caplog.text)
        both = gateway.meet(ALL)
        assert set(both.routes) == {APP, OTHER} and both.overlap
        wait_until(lambda: not agent.snapshot().refused)
        assert set(agent.snapshot().routes) == {APP, OTHER}
        assert f"https://{OTHER} -> http://127.0.0.1:2" in caplog.messages
        wait_until(lambda: good.ended and probe.ended)  # they had no visits
        gateway.hang_up()


def test_a_session_that_got_a_refused_hostname_serves_it_meanwhile(
    gateway, tmp_path, quick, origin
):
    origin.serve(lambda target: (target.read_head(), target.send(answer(b"page"))))
    with agent_here(gateway.place, tmp_path, {APP: 1, OTHER: origin.port}):
        gateway.meet(SOME)
        good = gateway.session
        gateway.meet(Ack(True, features=FEATURES))
        stream = gateway.open(OTHER)
        stream.write(request())
        assert b"page" in stream.read(timeout=TIMEOUT)
        probe = gateway.session
        gateway.meet(ALL)
        gateway.hang_up()
        over(good, probe)


def test_a_dead_line_does_not_end_the_session_that_serves(gateway, tmp_path, quick, caplog):
    caplog.set_level(logging.DEBUG)
    with agent_here(gateway.place, tmp_path, {APP: 1, OTHER: 2}) as agent:
        gateway.meet(SOME)
        good = gateway.session
        for _ in range(2):
            gateway.meet(Certificate(OTHER, "ready"))  # no ack
            gateway.hang_up()
        wait_until(lambda: f"cannot ask again for {OTHER}: a certificate, exp" in caplog.text)
        assert agent.snapshot().refused == {OTHER: TAKEN} and not good.ended
        over(good)


def test_the_end_of_the_session_is_not_lost_while_the_agent_asks(gateway, tmp_path, quick):
    with agent_here(gateway.place, tmp_path, {APP: 1, OTHER: 2}):
        gateway.meet(SOME)
        over(gateway.session)
        while set(gateway.meet(ALL).routes) != {APP, OTHER}:
            gateway.hang_up()
        gateway.hang_up()


def test_agent_stops_at_once_while_it_asks_again(gateway, tmp_path, quick):
    with agent_here(gateway.place, tmp_path, {APP: 1, OTHER: 2}):
        gateway.meet(SOME)
        good = gateway.session
        sock, _ = gateway._listening.accept()  # and says nothing
        began = monotonic()
    assert monotonic() - began < link_module.DIAL_TIMEOUT / 2
    sock.close()
    over(good)


@pytest.mark.parametrize("reason", ["invalid hostname: other", "unknown mode of other"])
def test_what_no_gateway_will_grant_is_not_asked_for_again(
    gateway, tmp_path, quick, caplog, reason
):
    with agent_here(gateway.place, tmp_path, {APP: 1, OTHER: 2}):
        gateway.meet(SOME._replace(denied={OTHER: reason}))
        good = gateway.session
        wait_until(lambda: f"{OTHER}: not served: the gateway refused: {reason}" in caplog.text)
        assert "keeps asking" not in caplog.text
        gateway.control.write(encode_message(End(MOVE, "now")))
        assert set(gateway.meet(ALL).routes) == {APP, OTHER}  # no probe came before
        gateway.hang_up()
        over(good)


def test_delays_between_two_questions_grow():
    delays = [
        retry_delay(tries, REFUSED_DELAY, MOST_REFUSED_DELAY, lambda: 1.0) for tries in range(1, 20)
    ]
    assert delays[0] == REFUSED_DELAY and delays[-1] == MOST_REFUSED_DELAY
    assert delays == sorted(delays)


def test_all_refused_one_by_one(gateway, tmp_path, quick, caplog):
    denied = {APP: "not allowed: x", OTHER: "\x1b[31m" + TAKEN, "none of ours": "x"}
    with agent_here(gateway.place, tmp_path, {APP: 1, OTHER: 2}) as agent:
        gateway.meet(Ack(False, TAKEN, (PARTIAL,), denied=denied))
        gateway.hang_up()
        wait_until(lambda: agent.snapshot().refused)
        refused = agent.snapshot().refused
        assert set(refused) == {APP, OTHER} and "\x1b" not in refused[OTHER]
        assert agent.snapshot().all_routes()[APP].problem == "refused: not allowed: x"
        gateway.meet(ALL)
        wait_until(lambda: agent.snapshot().refused == {} and agent.snapshot().since)
        gateway.hang_up()


def test_refusals_without_the_feature_mean_nothing(gateway, tmp_path, caplog):
    caplog.set_level(logging.INFO)
    with agent_here(gateway.place, tmp_path, {APP: 1}) as agent:
        gateway.meet(Ack(True, denied={APP: "x"}, urls={APP: "https://x"}, names={APP: OTHER}))
        wait_until(lambda: f"serving {APP}" in caplog.text)
        assert agent.snapshot().routes[APP].url == "" and not agent.snapshot().refused
        gateway.hang_up()


# Names and addresses -----------------------------------------------------------------------------


def open_name(**more):
    return [{"hostname": OPEN, "target": "127.0.0.1:9", **more}]


def test_a_completed_name_is_served(gateway, tmp_path, origin, caplog):
    caplog.set_level(logging.INFO)
    origin.serve(lambda target: (target.read_head(), target.send(answer(b"page"))))
    tunnels = open_name(target=f"127.0.0.1:{origin.port}")
    with agent_here(gateway.place, tmp_path, ready=False, tunnels=tunnels) as agent:
        url = f"https://{GRANTED}:8443"
        ack = Ack(True, features=FEATURES, names={OPEN: GRANTED}, urls={OPEN: url})
        asked = gateway.meet(ack)
        assert list(asked.routes) == [OPEN] and NAMES in asked.features
        wait_until(lambda: f"serving {GRANTED}" in caplog.text)
        assert f"{url} -> http://127.0.0.1:{origin.port}" in caplog.messages
        assert agent.snapshot().routes[GRANTED].url == url
        gateway.control.write(encode_message(Certificate(GRANTED, "ready")))
        stream = gateway.open(GRANTED)
        stream.write(request())
        assert b"page" in stream.read(timeout=TIMEOUT)
        wait_until(lambda: f"{GRANTED}: certificate: ready" in caplog.text)
        gateway.hang_up()


@pytest.mark.parametrize(
    ("reply", "said"),
    [
        (Ack(True), f"{OPEN}: not served: this gateway cannot complete names"),
        (Ack(True, features=FEATURES), f"{OPEN}: not served: the gateway has not said which"),
        (Ack(True, features=FEATURES, names={OPEN: "a b\x1b[2J"}), "has not said which hostname"),
        (Ack(True, features=FEATURES, refused={OPEN: "port 5 is taken"}, names={OPEN: GRANTED}),
         f"{GRANTED}: not served: port 5 is taken"),
        (Ack(False, f"invalid hostname: {OPEN}; expected letters"),
         "expected letters; this gateway cannot complete names such as quick-otter.*: update it"),
        (Ack(False, f"not allowed: {OPEN}: no"), f"not allowed: {OPEN}: no; next"),
    ],
)  # fmt: skip
def test_a_name_that_the_gateway_does_not_complete(gateway, tmp_path, never, caplog, reply, said):
    with agent_here(gateway.place, tmp_path, ready=False, tunnels=open_name()):
        gateway.meet(reply)
        wait_until(lambda: said in caplog.text)
        gateway.hang_up()


@pytest.mark.parametrize(
    "url",
    [
        "", "https://a b", "https://a\x1b[2J", "https://\u00e4", "x" * 301, "javascript:alert(1)",
        "tls://x';id;':443", "tcp://$(id):5", "tls://[::1", f"tls://{APP}:99999",
        f"https://{APP}/`id`", f"https://me@{APP}",
    ],
)  # fmt: skip
def test_addresses_that_could_harm_a_terminal_or_a_shell_are_not_shown(
    gateway, tmp_path, caplog, url
):
    caplog.set_level(logging.INFO)
    with agent_here(gateway.place, tmp_path, {APP: 1}) as agent:
        gateway.meet(Ack(True, features=FEATURES, urls={APP: url}))
        wait_until(lambda: f"serving {APP}" in caplog.text)
        assert agent.snapshot().routes[APP].url == "" and " -> " not in caplog.text
        gateway.hang_up()


@pytest.mark.parametrize(
    "url",
    [
        f"https://{APP}", f"https://{APP}:8443/", "https://*.dev.example.com", "http://localhost",
        f"tls://{APP}:443", "tcp://127.0.0.1:5", "tcp://[::1]:65535",
    ],
)  # fmt: skip
def test_addresses_of_all_kinds_are_shown(url):
    assert registering.url_of(url) == url


def test_an_address_is_logged_once(gateway, tmp_path, quick, caplog):
    caplog.set_level(logging.INFO)
    with agent_here(gateway.place, tmp_path, {APP: 1}):
        for port in ("", "", ":8443"):
            gateway.meet(Ack(True, features=FEATURES, urls={APP: f"https://{APP}{port}"}))
            gateway.hang_up()
        wait_until(lambda: f"https://{APP}:8443 -> http://127.0.0.1:1" in caplog.messages)
    assert sum(" -> " in text for text in caplog.messages) == 2


def test_a_port_that_opens_later_brings_its_address(gateway, tmp_path, caplog):
    caplog.set_level(logging.INFO)
    tunnels = [{"hostname": RAW, "target": "127.0.0.1:22", "mode": "tcp", "port": "auto"}]
    ack = Ack(True, features=(*FEATURES, PORTS, LATER_PORTS), refused={RAW: "port 5 is taken"},
              urls={RAW: f"tls://{RAW}:443"})  # fmt: skip
    with agent_here(gateway.place, tmp_path, ready=False, tunnels=tunnels) as agent:
        gateway.meet(ack)
        wait_until(lambda: "port 5 is taken" in caplog.text)
        route = agent.snapshot().routes[RAW]
        assert route.url == "" and route.problem and not agent.snapshot().refused
        gateway.control.write(encode_message(Port(RAW, "5", f"tcp://{RAW}:5")))
        wait_until(lambda: f"tcp://{RAW}:5 -> 127.0.0.1:22" in caplog.messages)
        assert agent.snapshot().routes[RAW].url == f"tcp://{RAW}:5"
        gateway.hang_up()


@pytest.mark.parametrize(
    ("target", "mode", "shown"),
    [
        (Target("127.0.0.1", 8080), "http", "http://127.0.0.1:8080"),
        (Target("::1", 8080), "http", "http://[::1]:8080"),
        (Target("intranet", 443, tls=True), "http", "https://intranet:443"),
        (Target(path="/run/app"), "http", "unix:/run/app"),
        (Target("127.0.0.1", 22), "tcp", "127.0.0.1:22"),
    ],
)
def test_targets_for_people(target, mode, shown):
    assert shown_target(Tunnel(APP, target, mode)) == shown


# Who hears of it ---------------------------------------------------------------------------------


def test_each_change_of_the_snapshot_is_told(gateway, tmp_path, quick, origin):
    origin.serve(lambda target: (target.read_head(), target.send(answer(b"page"))))
    seen, came = [], threading.Condition()

    with agent_here(gateway.place, tmp_path, {APP: origin.port}) as agent:

        def note():
            with came:
                seen.append(agent.snapshot())
                came.notify_all()

        def saw(what):
            with came:
                assert came.wait_for(lambda: any(map(what, seen)), TIMEOUT)
                seen.clear()

        agent.on_change = note
        gateway.meet(Ack(False, "not today"))
        gateway.hang_up()
        saw(lambda told: "not today" in told.problem and told.retry_at)
        gateway.meet(ALL)
        saw(lambda told: told.since and told.routes[APP].url)
        gateway.control.write(encode_message(Certificate(APP, "ready")))
        saw(lambda told: told.certificates == {APP: "ready"})
        stream = gateway.open(APP)
        saw(lambda told: told.visits == 1)
        stream.close()
        saw(lambda told: told.visits == 0)
        gateway.hang_up()
        saw(lambda told: told.since is None)
        gateway.meet(ALL)
        agent.stop()
        saw(lambda told: told.stopping)
        gateway.hang_up()


def test_a_listener_that_fails_harms_no_session(gateway, tmp_path, caplog):
    with agent_here(gateway.place, tmp_path, {APP: 1}) as agent:
        agent.on_change = lambda: 1 / 0
        gateway.meet(ALL)
        wait_until(lambda: agent.snapshot().since and "ZeroDivisionError" in caplog.text)
        gateway.hang_up()


# With a whole gateway ----------------------------------------------------------------------------


def test_a_hostname_that_gets_free_is_served_without_cutting_visits(cache, tmp_path, monkeypatch):
    monkeypatch.setattr(link_module, "retry_delay", lambda *arguments: 0.2)
    (tmp_path / "a").mkdir()
    go_on = threading.Event()

    def slowly(target):
        target.read_head()
        target.send(b"HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\npa")
        assert go_on.wait(TIMEOUT)
        target.send(b"ge")

    with gateway_here(cache) as gateway, Origin() as slow:
        slow.serve(slowly)
        with agent_here(gateway, tmp_path / "a", {OTHER: 9}):
            both = agent_here(gateway, tmp_path, {APP: slow.port, OTHER: 9}, ready=False)
            agent = both.__enter__()
            wait_until(lambda: agent.snapshot().refused == {OTHER: TAKEN})
            visitor = gateway.dial(APP)
            visitor.send(request(host=APP))
            assert visitor.sock.recv(4096)
        wait_until(lambda: set(agent.snapshot().routes) == {APP, OTHER})
        assert agent.snapshot().refused == {}
        go_on.set()
        rest = b""
        while not rest.endswith(b"ge"):
            rest += visitor.sock.recv(4096)
        visitor.close()
        both.__exit__(None, None, None)


def test_open_names_with_all_that_a_tunnel_may_have(cache, tmp_path, origin):
    """What the configuration says of an open name holds for the hostname that it becomes."""
    origin.serve(lambda target: (target.read_head(), target.send(answer(b"page"))))
    agents_file = tmp_path / "agents.yaml"
    secret = "an-agent's-own-secret-of-32-bytes"
    with reserved_port() as port:
        pass
    hosts = [APP, "*.dev.localhost", "*.qa.localhost"]
    entry = {"secret": secret, "hosts": hosts, "ports": str(port)}
    agents_file.write_text(json.dumps({"office": entry}))
    agents_file.chmod(0o600)
    tunnels = [
        {"hostname": OPEN, "target": f"127.0.0.1:{origin.port}", "host_header": "intranet"},
        {"hostname": "closed.*", "target": f"127.0.0.1:{origin.port}", "deny": ["127.0.0.0/8"]},
        {"hostname": "Db.*", "target": f"127.0.0.1:{origin.port}", "mode": "tcp", "port": "auto"},
    ]
    settings = {"AGENTS_FILE": str(agents_file), "TCP_PORTS": str(port)}
    with gateway_here(cache, **settings) as gateway:
        keys = {"tunnels": tunnels, "jwt_secret": secret, "jwt_issuer": "office"}
        with agent_here(gateway, tmp_path, ready=False, **keys) as agent:
            gateway.wait_for_routes(GRANTED, "closed.dev.localhost", "db.dev.localhost")
            assert gateway.get(GRANTED) == (200, b"page")
            assert gateway.get("closed.dev.localhost")[0] == 403
            wait_until(lambda: agent.snapshot().since)
            assert {name: route.url for name, route in agent.snapshot().routes.items()} == {
                GRANTED: f"https://{GRANTED}:{gateway.public_port}",
                "closed.dev.localhost": f"https://closed.dev.localhost:{gateway.public_port}",
                "db.dev.localhost": f"tcp://db.dev.localhost:{port}",
            }
            assert not any(route.problem for route in agent.snapshot().routes.values())


def test_a_pattern_that_is_taken_away_costs_the_other_hostnames_no_more_than_a_dial(
    cache, tmp_path, quick, monkeypatch
):
    monkeypatch.setattr(gateway_module, "RELOAD", 0.05)
    agents_file = tmp_path / "agents.yaml"
    secret = "an-agent's-own-secret-of-32-bytes"

    def permit(*hosts):
        agents_file.write_text(json.dumps({"office": {"secret": secret, "hosts": hosts}}))
        agents_file.chmod(0o600)

    permit(APP, OTHER)
    with gateway_here(cache, AGENTS_FILE=str(agents_file)) as gateway:
        keys = {"jwt_secret": secret, "jwt_issuer": "office"}
        with agent_here(gateway, tmp_path, {APP: 1, OTHER: 2}, **keys) as agent:
            permit(APP)
            wait_until(lambda: list(agent.snapshot().refused) == [OTHER])
            assert list(agent.snapshot().routes) == [APP]
            permit(APP, OTHER)
            wait_until(lambda: set(agent.snapshot().routes) == {APP, OTHER})


def test_a_change_does_not_wait_for_a_gateway_that_says_nothing(gateway, tmp_path, quick):
    with agent_here(gateway.place, tmp_path, {APP: 1, OTHER: 2}) as agent:
        for reason in ("end", "move", "change"):
            gateway.meet(SOME)
            good = gateway.session
            control = gateway.control
            silent, _ = gateway._listening.accept()
            wait_until(lambda: agent.link.unaccepted is not None and agent.link.probing)
            if reason == "end":
                over(good)
            elif reason == "move":
                control.write(encode_message(End(MOVE, "now")))
            else:
                agent.change(agent.config._replace(stall_timeout=100.0))
            while set(gateway.meet(ALL).routes) != {APP, OTHER}:
                gateway.hang_up()
            silent.close()
            over(gateway.session, good)


def test_a_gateway_that_grants_nothing_is_not_dialled_again_and_again(gateway, tmp_path, quick):
    with agent_here(gateway.place, tmp_path, {APP: 1, OTHER: 2}) as agent:
        gateway.meet(SOME)
        good = gateway.session
        for _ in range(2):
            asked = gateway.meet(Ack(True, features=FEATURES, denied={OTHER: TAKEN}))
            assert set(asked.routes) == {OTHER}
            gateway.hang_up()
        assert agent.snapshot().refused == {OTHER: TAKEN}
        over(good)


def test_refusals_of_an_earlier_configuration_are_not_shown(gateway, tmp_path, never):
    with agent_here(gateway.place, tmp_path, {APP: 1, OTHER: 2}) as agent:
        gateway.meet(Ack(False, TAKEN, (PARTIAL,), denied={APP: "x", OTHER: TAKEN}))
        gateway.hang_up()
        wait_until(lambda: len(agent.snapshot().refused) == 2)
        tunnels = tuple(each for each in agent.config.tunnels if each.hostname == APP)
        agent.change(agent.config._replace(tunnels=tunnels))
        assert agent.snapshot().refused == {APP: "x"}
        assert list(agent.snapshot().all_routes()) == [APP]
        gateway.meet(ALL)
        gateway.hang_up()


def test_go_gateway_completes_no_name_and_the_other_hostnames_are_served(
    gopeer, cache, tmp_path, origin, caplog
):
    caplog.set_level(logging.INFO)
    origin.serve(lambda target: (target.read_head(), target.send(answer(b"page"))))
    tunnels = [*open_name(), {"hostname": APP, "target": f"127.0.0.1:{origin.port}"}]
    with go_gateway(gopeer, cache) as gateway:
        with agent_here(gateway, tmp_path, ready=False, tunnels=tunnels) as agent:
            wait_until(lambda: f"serving {APP}" in caplog.text)
            assert f"{OPEN}: not served: this gateway cannot complete names" in caplog.text
            assert gateway.get(APP) == (200, b"page")
            assert agent.snapshot().routes[APP].url == "" and not agent.snapshot().refused
