"""Policies, through a whole gateway: which visitors are let in; no other reaches the agent."""

import base64
import contextlib
import json
import logging
import socket

import pytest
from hand_made import registered, registration, reply_to
from support import (
    APP,
    GATEWAY_HOST,
    RAW,
    TIMEOUT,
    Wire,
    agent_here,
    agent_yaml,
    answer,
    fields_of,
    gateway_here,
    go_gateway,
    request,
    reserved_port,
    status_of,
    wait_until,
)

from gotunnel import POLICIES, Ack

PASSWORD = "a visitor's password"
PROXY = {"TRUSTED_PROXIES": "127.0.0.1"}
HERE, ELSEWHERE = ["127.0.0.0/8"], ["192.0.2.0/24", "2001:db8::/32"]


def basic(text, scheme="Basic"):
    return f"Authorization: {scheme} {base64.b64encode(text.encode()).decode()}"


GOOD, BAD = basic(f"me:{PASSWORD}"), basic("me:guess")


@contextlib.contextmanager
def serving(gateway, folder, origin, mode="http", hostname=APP, ready=True, **policy):
    """An agent that serves a hostname under a policy."""
    path = json.loads(agent_yaml(gateway, {hostname: origin.port}, {}, {}))
    path["tunnels"][0] |= {"mode": mode, **policy}
    keys = {"tunnels": path["tunnels"]}
    with agent_here(gateway, folder, http={hostname: origin.port}, ready=ready, **keys) as agent:
        yield agent


def pages(origin):
    """Have the origin answer each request; returns the heads that it got."""
    heads = []

    def script(target):
        while head := target.read_head():
            heads.append(head)
            target.send(answer(b"page"))

    origin.serve(script)
    return heads


@pytest.fixture
def gateway(cache):
    with gateway_here(cache) as gateway:
        yield gateway


def fields(head):
    return dict(line.split(": ", 1) for line in fields_of(head))


def ask(gateway, *more, times=1):
    """The answers to requests on one connection, as (status, fields)."""
    answers = []
    with gateway.dial(APP) as visitor:
        for _ in range(times):
            visitor.send(request("GET", "/", *more))
            head, _ = visitor.read_message()
            answers.append((status_of(head), fields(head)))
    return answers


# http --------------------------------------------------------------------------------------------


def test_a_password_is_asked_for_and_is_not_the_targets_business(gateway, tmp_path, origin):
    heads = pages(origin)
    with serving(gateway, tmp_path, origin, basic_auth=f"me:{PASSWORD}"):
        status, came = ask(gateway)[0]
        assert status == 401 and came["www-authenticate"].startswith("basic realm=")
        assert [status for status, _ in ask(gateway, BAD, times=2)] == [401, 401]
        assert heads == []
        assert [status for status, _ in ask(gateway, GOOD, times=3)] == [200, 200, 200]
        assert len(heads) == 3 and b"Authorization" not in b"".join(heads)


@pytest.mark.parametrize("name", ["Authorization", "authorization"])
@pytest.mark.parametrize(
    ("policy", "passes"), [({"basic_auth": f"me:{PASSWORD}"}, False), ({"allow": HERE}, True)]
)
def test_a_password_that_is_not_for_us_is_the_targets(
    gateway, tmp_path, origin, name, policy, passes
):
    heads = pages(origin)
    with serving(gateway, tmp_path, origin, **policy):
        assert ask(gateway, GOOD.replace("Authorization", name))[0][0] == 200
        assert (b"uthorization: " in heads[0]) is passes


def test_each_request_of_a_connection_is_judged(gateway, tmp_path, origin):
    heads = pages(origin)
    with serving(gateway, tmp_path, origin, basic_auth=f"me:{PASSWORD}"):
        with gateway.dial(APP) as visitor:
            for more, status in ((GOOD,), 200), ((), 401), ((GOOD,), 200), ((BAD,), 401):
                visitor.send(request("GET", "/", *more))
                assert status_of(visitor.read_message()[0]) == status
        assert len(heads) == 2


@pytest.mark.parametrize(
    "more",
    [
        (GOOD, BAD), (BAD, GOOD), (GOOD, GOOD), (basic(f"me:{PASSWORD}", "Bearer"),),
        ("Authorization:",), ("Authorization: Basic",), ("Authorization: Basic %%%",),
        ("Authorization: Basic " + "A" * 8000,), ("Proxy-" + GOOD,),
    ],
)  # fmt: skip
def test_whatever_else_comes_as_a_password_is_a_401(gateway, tmp_path, origin, more):
    heads = pages(origin)
    with serving(gateway, tmp_path, origin, basic_auth=f"me:{PASSWORD}"):
        assert ask(gateway, *more)[0][0] == 401
        assert heads == []


def test_a_body_that_nobody_lets_in_does_not_reach_the_agent(gateway, tmp_path, origin):
    heads = pages(origin)
    with serving(gateway, tmp_path, origin, basic_auth=f"me:{PASSWORD}"):
        with gateway.dial(APP) as visitor:
            visitor.send(request("POST", "/", "Content-Length: 100000000") + b"x" * 1000)
            assert status_of(visitor.read_message()[0]) == 401
        assert heads == []


def test_an_upgrade_needs_the_password_too(gateway, tmp_path, origin):
    heads = pages(origin)
    with serving(gateway, tmp_path, origin, basic_auth=f"me:{PASSWORD}"):
        assert ask(gateway, "Connection: Upgrade", "Upgrade: websocket")[0][0] == 401
        assert heads == []


@pytest.mark.parametrize(
    ("policy", "status"),
    [
        ({"allow": HERE}, 200),
        ({"allow": ELSEWHERE}, 403),
        ({"deny": HERE}, 403),
        ({"deny": ELSEWHERE}, 200),
        ({"allow": HERE, "deny": ["127.0.0.1"]}, 403),
        ({"allow": "0.0.0.0/0"}, 200),
        ({"allow": "::/0"}, 403),
    ],
)
def test_visitors_are_let_in_by_address(gateway, tmp_path, origin, policy, status):
    heads = pages(origin)
    with serving(gateway, tmp_path, origin, **policy):
        assert ask(gateway)[0][0] == status
        assert len(heads) == (status == 200)


@pytest.mark.parametrize(
    ("changes", "field", "status"),
    [
        (PROXY, "X-Forwarded-For: 192.0.2.7", 200),
        (PROXY, "X-Forwarded-For: 203.0.113.7, 192.0.2.7", 200),
        (PROXY, "X-Forwarded-For: 192.0.2.7, 203.0.113.7", 403),
        (PROXY, "X-Real-IP: 192.0.2.7", 200),
        (PROXY, "Accept: a", 403),
        ({}, "X-Forwarded-For: 192.0.2.7", 403),
    ],
)
def test_only_a_trusted_proxy_says_where_a_visitor_is(
    cache, tmp_path, origin, changes, field, status
):
    pages(origin)
    with gateway_here(cache, **changes) as gateway:
        with serving(gateway, tmp_path, origin, allow="192.0.2.0/24"):
            assert ask(gateway, field)[0][0] == status


def test_more_than_the_rate_is_a_429_that_says_when_to_come_again(gateway, tmp_path, origin):
    heads = pages(origin)
    rate = {"per_address": 0.01, "burst": 3}
    with serving(gateway, tmp_path, origin, rate_limit=rate):
        answers = ask(gateway, times=5)
        assert [status for status, _ in answers] == [200, 200, 200, 429, 429]
        assert 90 <= int(answers[3][1]["retry-after"]) <= 101
        assert len(heads) == 3


def test_what_the_gateway_sets_counts_where_the_tunnel_says_nothing(cache, tmp_path, origin):
    pages(origin)
    defaults = {"DEFAULT_DENY": "127.0.0.1", "DEFAULT_BASIC_AUTH": f"me:{PASSWORD}"}
    with gateway_here(cache, **defaults) as gateway:
        with serving(gateway, tmp_path, origin):
            assert ask(gateway, GOOD)[0][0] == 403
        wait_until(lambda: not gateway.inner.tunnels.registered())
        with serving(gateway, tmp_path, origin, deny=ELSEWHERE):
            assert ask(gateway)[0][0] == 401
            assert ask(gateway, GOOD)[0][0] == 200


# tcp ---------------------------------------------------------------------------------------------


def is_cut(wire):
    with contextlib.suppress(OSError):
        return wire.read() == b""
    return True


@pytest.mark.parametrize("door", ["tls", "connect", "port", "plain"])
@pytest.mark.parametrize("policy", [{"deny": HERE}, {"allow": ELSEWHERE}])
def test_no_door_of_a_tcp_hostname_is_left_open(cache, tmp_path, origin, door, policy):
    with reserved_port() as number:
        port = str(number)
    with gateway_here(cache, TCP_PORTS=port, RAW_TCP_HOST=RAW) as gateway:
        with serving(gateway, tmp_path, origin, "tcp", RAW, port=port, **policy):
            if door == "connect":
                target = f"{RAW}:{origin.port}"
                with gateway.dial(GATEWAY_HOST) as wire:
                    wire.send(f"CONNECT {target} HTTP/1.1\r\nHost: {target}\r\n\r\n".encode())
                    assert status_of(wire.read_message()[0]) == 403
            elif door == "tls":
                with gateway.dial(RAW) as wire:
                    assert is_cut(wire)
            else:
                to = int(port) if door == "port" else gateway.public_port
                with contextlib.suppress(ConnectionResetError):  # perhaps already in connect()
                    with Wire(socket.create_connection(("127.0.0.1", to), TIMEOUT)) as wire:
                        wire.send(b"SSH-2.0-x\r\n")
                        assert is_cut(wire)
            assert origin.was_left_alone()


def test_who_is_not_let_in_sees_no_complete_visit(cache, tmp_path, origin):
    with gateway_here(cache, RAW_TCP_HOST=RAW) as gateway:
        with serving(gateway, tmp_path, origin, "tcp", RAW, deny=HERE):
            with Wire(socket.create_connection(("127.0.0.1", gateway.public_port))) as wire:
                with pytest.raises(ConnectionResetError):
                    wire.send(b"SSH-2.0-x\r\n")
                    wire.read()


@pytest.mark.parametrize(("address", "status"), [("192.0.2.7", 403), ("203.0.113.7", 200)])
def test_whom_a_trusted_proxy_connects_is_judged(cache, tmp_path, origin, address, status):
    target = f"{RAW}:{origin.port}"
    head = f"CONNECT {target} HTTP/1.1\r\nHost: {target}\r\nX-Forwarded-For: {address}\r\n\r\n"
    with gateway_here(cache, **PROXY) as gateway:
        with serving(gateway, tmp_path, origin, "tcp", RAW, deny="192.0.2.0/24"):
            with gateway.dial(GATEWAY_HOST) as visitor:
                visitor.send(head.encode())
                assert status_of(visitor.read_head()) == status


def test_connections_have_a_rate_too(gateway, tmp_path, origin):
    rate = {"per_address": 0.01, "burst": 2}
    with serving(gateway, tmp_path, origin, "tcp", RAW, rate_limit=rate):
        for _ in range(2):
            with gateway.dial(RAW) as visitor, origin.accept() as target:
                target.send(b"hello")
                assert visitor.read_exactly(5) == b"hello"
        with gateway.dial(RAW) as visitor:
            assert is_cut(visitor)
        assert origin.was_left_alone()


# Policies that an agent sends --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("policies", "text"),
    [
        ({APP: {"deny": ["10.0.0.0/33"]}}, f"invalid policy of {APP}: deny: "),
        ({APP: {"deny": []}}, f"invalid policy of {APP}: deny: "),
        ({APP: {"denied": ["10.0.0.0/8"]}}, f"invalid policy of {APP}: "),
        ({APP: {"basic_auth": ["me:secret"]}}, f"invalid policy of {APP}: basic_auth: "),
        ({APP: []}, f"invalid policy of {APP}: "),
        ({"x.localhost": {"deny": HERE}}, "a policy for x.localhost, which is not among"),
        ({APP: None}, f"invalid policy of {APP}: null came"),
        ({APP: {"deny": HERE}, "APP.localhost.": {"deny": ELSEWHERE}}, f"two policies for {APP}"),
        ({"a b": {"deny": HERE}}, "invalid hostname: a b"),
    ],
)
def test_a_policy_that_cannot_be_kept_is_refused(gateway, caplog, policies, text):
    message = registration(APP, policies=policies, features=(POLICIES,))
    refused = reply_to(gateway, message)
    assert not refused.ok and refused.error.startswith(text)
    assert "secret" not in refused.error + caplog.text


@pytest.mark.parametrize("features", [(POLICIES,), ()])
@pytest.mark.parametrize("spelling", [APP, "APP.localhost.", f"{APP}:443"])
def test_a_policy_counts_in_any_spelling_and_even_if_unannounced(gateway, features, spelling):
    policies = {spelling: {"deny": HERE}}
    with registered(gateway, APP, policies=policies, features=features):
        assert ask(gateway)[0][0] == 403


def test_policies_are_acknowledged(gateway):
    message = registration(APP, policies={APP: {"deny": HERE}}, features=(POLICIES,))
    assert reply_to(gateway, message) == Ack(True, features=(POLICIES,))


def test_a_tunnel_whose_policy_nobody_keeps_is_not_served(gopeer, cache, tmp_path, origin, caplog):
    """A password that nobody checks must never look like one that is checked."""
    with go_gateway(gopeer, cache) as gateway:
        with serving(gateway, tmp_path, origin, basic_auth=f"me:{PASSWORD}"):
            said = f"{APP}: not served: this gateway does not know policies"
            wait_until(lambda: said in caplog.text)
            assert ask(gateway, GOOD)[0][0] == 502
            assert origin.was_left_alone()


def test_no_password_and_no_hash_is_in_any_log_line(gateway, tmp_path, origin, caplog):
    caplog.set_level(logging.DEBUG, "gotunnel")
    pages(origin)
    with serving(gateway, tmp_path, origin, basic_auth=f"me:{PASSWORD}"):
        ask(gateway, GOOD)
        ask(gateway, BAD)
    assert caplog.records
    for text in (PASSWORD, "scrypt", GOOD.split()[-1], BAD.split()[-1], "guess"):
        assert text not in caplog.text
