"""Hostnames of one registration that get different answers, through a whole gateway: addresses
(feature urls), open names (names), and refusals of some (partial)."""

import json
import logging
import time

import jwt
import pytest
from hand_made import HOUR, HandMade, answering, registered, registration, reply_to
from support import (
    APP,
    GATEWAY_HOST,
    RAW,
    SECRET,
    TIMEOUT,
    TUNNEL_HOST,
    gateway_here,
    reserved_port,
    routes_of,
    wait_until,
)

from gotunnel import (
    ANY_PORT,
    LATER_PORTS,
    MESSAGE_LIMIT,
    NAMES,
    OVERLAP,
    PARTIAL,
    PORTS,
    URLS,
    Ack,
    Port,
    decode_message,
    encode_message,
    read_data_header,
)
from gotunnel_server.agents import heartbeat
from gotunnel_server.agents.tunnel import MOST_REASON, fitting

OTHER = "other.localhost"
OWN_SECRET = "an-agent's-own-secret-of-32-bytes"
GRANTED = "quick-otter.dev.localhost"
OPEN = "quick-otter.*"
ALL = (URLS, NAMES, PARTIAL)
TAKEN = "host already registered"


def office(**claims):
    now = int(time.time())
    return jwt.encode({"iss": "office", "iat": now, "exp": now + HOUR, **claims}, OWN_SECRET)


@pytest.fixture
def agents_file(tmp_path):
    path = tmp_path / "agents.yaml"
    hosts = [APP, RAW, "*.dev.localhost", "*.qa.localhost"]
    path.write_text(json.dumps({"office": {"secret": OWN_SECRET, "hosts": hosts}}))
    path.chmod(0o600)
    return str(path)


@pytest.fixture
def gateway(cache, agents_file):
    with gateway_here(cache, AGENTS_FILE=agents_file) as gateway:
        yield gateway


def ask(gateway, *hostnames, **more):
    """The ack for a registration of the credential with wildcards."""
    more = {"features": ALL, "token": office()} | more
    return reply_to(gateway, registration(*hostnames, **more))


# Addresses ---------------------------------------------------------------------------------------


def test_each_hostname_has_an_address(gateway):
    port = gateway.public_port
    with reserved_port() as free:
        pass
    ack = ask(gateway, "App.localhost", RAW, "*.qa.localhost", OPEN, modes={RAW: "tcp"})
    assert ack.urls == {
        "App.localhost": f"https://{APP}:{port}",
        RAW: f"tls://{RAW}:{port}",
        "*.qa.localhost": f"https://*.qa.localhost:{port}",
        OPEN: f"https://{GRANTED}:{port}",
    }
    assert free  # it is not asked for here


def test_an_agent_that_does_not_ask_for_addresses_gets_none(gateway):
    assert ask(gateway, APP, features=(PARTIAL,)).urls == {}


@pytest.mark.parametrize(("number", "shown"), [(443, ""), (8443, ":8443")])
def test_the_operator_says_which_port_visitors_type(cache, number, shown):
    with gateway_here(cache, PUBLIC_PORT=str(number)) as gateway:
        message = registration(APP, RAW, modes={RAW: "tcp"}, features=(URLS,))
        assert reply_to(gateway, message).urls == {
            APP: f"https://{APP}{shown}",
            RAW: f"tls://{RAW}:{number}",
        }
        with registered(gateway, APP), gateway.dial(APP):
            pass
        assert gateway.inner.public_port != number  # where it listens


def test_a_port_of_its_own_is_the_address_also_if_it_opens_later(cache):
    with reserved_port() as port, gateway_here(cache, TCP_PORTS=str(port)) as gateway:
        features = (URLS, PORTS, LATER_PORTS)
        message = registration(RAW, modes={RAW: "tcp"}, features=features, ports={RAW: ANY_PORT})
        with registered(gateway, RAW, modes={RAW: "tcp"}, features=(PORTS,),
                        ports={RAW: ANY_PORT}) as holder:  # fmt: skip
            first = next(iter(gateway.inner.tunnels.registered()[0].routes.values()))
            assert first.port == port
            holder.session.close()
        wait_until(lambda: not routes_of(gateway.inner))
        assert reply_to(gateway, message).urls == {RAW: f"tcp://{RAW}:{port}"}
        wait_until(lambda: not routes_of(gateway.inner))
        with registered(gateway, OTHER, modes={OTHER: "tcp"}, features=(PORTS,),
                        ports={OTHER: ANY_PORT}) as holder:  # fmt: skip
            with HandMade(gateway, message) as late:
                ack = late.hear()
                assert list(ack.refused) == [RAW]
                assert ack.urls == {RAW: f"tls://{RAW}:{gateway.public_port}"}
                holder.session.close()
                while not isinstance(told := late.hear(), Port):
                    pass
                assert told == Port(RAW, str(port), f"tcp://{RAW}:{port}")


# Open names --------------------------------------------------------------------------------------


def test_an_open_name_is_served_below_the_first_wildcard(gateway):
    message = registration(OPEN, token=office(), features=ALL)
    with HandMade(gateway, message) as agent:
        ack = agent.hear()
        assert ack.ok and ack.names == {OPEN: GRANTED} and ack.denied == {}
        assert routes_of(gateway.inner) == {GRANTED}
        with gateway.dial(GRANTED) as visitor:
            visitor.send(b"GET / HTTP/1.1\r\nHost: " + GRANTED.encode() + b"\r\n\r\n")
            stream = agent.session.accept(TIMEOUT)
            assert read_data_header(stream.read_exactly)[0] == GRANTED


def test_a_token_narrows_which_wildcard_is_the_first(gateway):
    ack = ask(gateway, OPEN, token=office(hosts=["*.x.qa.localhost"]))
    assert ack.names == {OPEN: "quick-otter.x.qa.localhost"}


def test_a_label_that_is_taken_is_refused_by_its_whole_hostname(gateway):
    with registered(gateway, GRANTED, token=office()) as holder, answering(holder):
        ack = ask(gateway, OPEN)
        assert ack == Ack(
            False, f"{TAKEN}: {GRANTED}", (PARTIAL,), denied={OPEN: f"{TAKEN}: {GRANTED}"}
        )
        assert ask(gateway, OPEN, features=(NAMES,)) == Ack(False, f"{TAKEN}: {GRANTED}")


def test_an_agent_that_comes_back_gets_the_same_hostname(gateway):
    how = {"token": office(), "features": (*ALL, OVERLAP), "instance": "one"}
    with registered(gateway, OPEN, **how) as old, answering(old):
        ack = ask(gateway, OPEN, **how, overlap=True)
        assert ack.names == {OPEN: GRANTED}
    with registered(gateway, OPEN, **how) as old, answering(old):
        assert ask(gateway, OPEN, **how).names == {OPEN: GRANTED}  # it replaces the old session


def test_the_common_secret_completes_no_name(gateway):
    ack = ask(gateway, OPEN, APP, token=None)
    assert ack.ok and list(ack.urls) == [APP] and ack.names == {}
    assert ack.denied[OPEN].startswith(f"not allowed: {OPEN}: the credential has no wildcard")


def test_no_label_becomes_the_gateways_own_name(cache, agents_file):
    with gateway_here(
        cache, AGENTS_FILE=agents_file, TUNNEL_HOST="tunnel.dev.localhost"
    ) as gateway:
        message = registration("tunnel.*", APP, token=office(), features=ALL)
        ack = reply_to(gateway, message, sni=GATEWAY_HOST)
        reserved = "not allowed: tunnel.dev.localhost: reserved for the gateway itself"
        assert ack.denied == {"tunnel.*": reserved} and routes_of(gateway.inner) <= {APP}


# Some are refused --------------------------------------------------------------------------------


def test_the_other_hostnames_are_served(gateway, caplog):
    with registered(gateway, APP) as holder, answering(holder):
        for _ in range(2):
            ack = ask(gateway, APP, OTHER, "bad_name.localhost", TUNNEL_HOST, GRANTED)
            assert ack.ok and list(ack.urls) == [GRANTED]
            assert {name: why.partition(":")[0] for name, why in ack.denied.items()} == {
                APP: TAKEN,
                OTHER: "not allowed",
                "bad_name.localhost": "invalid hostname",
                TUNNEL_HOST: "not allowed",
            }
            wait_until(lambda: routes_of(gateway.inner) == {APP})
    warnings = [line for line in caplog.records if line.levelno == logging.WARNING]
    lines = [line.getMessage() for line in warnings if "hostnames are refused" in line.msg]
    assert len(lines) == 1 and f"{TAKEN}: {APP}" in lines[0]


def test_an_agent_that_does_not_know_it_gets_all_or_nothing(gateway):
    with registered(gateway, APP) as holder, answering(holder):
        ack = ask(gateway, APP, GRANTED, features=(URLS, NAMES))
        assert ack == Ack(False, f"{TAKEN}: {APP}")
        assert routes_of(gateway.inner) == {APP}


def test_holders_that_are_dead_are_replaced_and_the_others_keep_their_hostnames(
    gateway, monkeypatch
):
    monkeypatch.setattr(heartbeat, "ANSWER_TIMEOUT", 0.5)
    monkeypatch.setattr(heartbeat, "SIGN_OF_LIFE", 0.2)
    with registered(gateway, APP) as alive, answering(alive), registered(gateway, RAW):
        with HandMade(gateway, registration(APP, RAW, features=ALL, token=office())) as agent:
            ack = agent.hear()
            assert ack.ok and list(ack.urls) == [RAW] and ack.denied == {APP: f"{TAKEN}: {APP}"}
            assert routes_of(gateway.inner) == {APP, RAW}


def test_an_agents_own_earlier_session_is_no_reason_for_a_refusal(gateway):
    how = {"token": office(), "features": (*ALL, OVERLAP), "instance": "one"}
    with registered(gateway, APP) as other, answering(other):
        with registered(gateway, GRANTED, RAW, **how) as old, answering(old):
            ack = ask(gateway, GRANTED, RAW, APP, overlap=True, **how)
            assert set(ack.urls) == {GRANTED, RAW} and list(ack.denied) == [APP]


def test_asking_for_a_refused_hostname_alone_leaves_the_others_alone(gateway):
    how = {"token": office(), "features": (*ALL, OVERLAP), "instance": "one"}
    with registered(gateway, APP) as other, answering(other):
        with registered(gateway, GRANTED, **how) as good, answering(good):
            tunnel = gateway.inner.tunnels.registered()
            assert ask(gateway, APP, overlap=True, **how).denied == {APP: f"{TAKEN}: {APP}"}
            assert gateway.inner.tunnels.registered() == tunnel


def test_limits_and_bad_tokens_refuse_the_whole(cache, tmp_path):
    path = tmp_path / "agents.yaml"
    entry = {"secret": OWN_SECRET, "hosts": ["*.dev.localhost"], "limits": {"hostnames": 1}}
    path.write_text(json.dumps({"office": entry}))
    path.chmod(0o600)
    with gateway_here(cache, AGENTS_FILE=str(path), MAX_HOSTS_PER_AGENT="2") as gateway:
        two = ask(gateway, "a.*", "b.*")
        assert two.error.startswith("too many hostnames: 2, at most 1") and not two.denied
        three = ask(gateway, "a.*", "b.*", "c.*")
        assert three.error.startswith("too many hostnames: 3, at most 2") and not three.denied
        assert ask(gateway, "a.*", APP).ok  # the other one does not count
        bad = ask(gateway, "a.*", token=office() + "x")
        assert bad.error.startswith("auth failed") and not bad.denied


def test_an_ack_always_fits_into_one_message():
    names = [f"{'a' * 60}.{'b' * 60}.{'c' * 60}.{number}.localhost" for number in range(200)]
    urls = {name: f"https://{name}:8443" for name in names}
    ack = Ack(True, features=ALL, urls=urls)
    assert fitting(ack._replace(urls=dict(list(urls.items())[:100]))).urls
    assert fitting(ack) == ack._replace(urls={})
    denied = {name: "not allowed: " + "x " * 1000 for name in names[:100]}
    short = fitting(ack._replace(denied=denied))
    assert len(encode_message(short)) <= MESSAGE_LIMIT and short.urls == {}
    assert set(short.denied) == set(denied)
    assert {len(why) for why in short.denied.values()} == {MOST_REASON}
    assert decode_message(encode_message(short)) == short


def test_secret_is_in_no_answer(gateway):
    ack = ask(gateway, OPEN, "bad_name.localhost")
    assert OWN_SECRET not in repr(ack) and SECRET not in repr(ack)
