"""Logins that are valid for a connection (NTLM, Negotiate): it serves one visitor only."""

import contextlib

import pytest
from support import (
    APP,
    CUT,
    agent_here,
    answer,
    fields_of,
    gateway_here,
    request,
    wait_until,
)

from gotunnel_agent.common.http1 import Fields
from gotunnel_server.visitors.login import concerns_connection

CHALLENGE = answer(b"sign in", "WWW-Authenticate: NTLM TlRM", status="401 Unauthorized")


@pytest.fixture
def gateway(cache, tmp_path, origin):
    with gateway_here(cache) as gateway, agent_here(gateway, tmp_path, http={APP: origin.port}):
        yield gateway


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (["NTLM"], True),
        (["negotiate YIIC"], True),
        (['Basic realm="a, b"', "Negotiate"], True),
        (['Basic realm="x", NTLM'], True),
        (["Basic TlRMTQ=="], False),
        (['Digest realm="ntlmish"'], False),
        (["Bearer negotiated"], False),
        ([], False),
    ],
)
def test_only_logins_of_a_connection_are_taken_for_one(values, expected):
    fields = Fields([("WWW-Authenticate", value) for value in values])
    assert concerns_connection(fields, "www-authenticate") is expected
    assert not concerns_connection(fields, "authorization")


def ask(visitor, target, asked, answered=None, leaves=b""):
    """One request and its answer, over a target's connection."""
    answered = answered or answer(b"page")
    visitor.send(asked)
    assert target.read_message()[0].split(b" ")[0] == asked.split(b" ")[0]
    target.send(answered)
    return visitor.read_head() if asked.startswith(b"HEAD") else visitor.read_message()[1]


def signed_in(visitor, origin):
    """The target's connection on which a visitor has signed in."""
    visitor.send(request())
    target = origin.accept()
    target.read_head()
    target.send(CHALLENGE)
    visitor.read_message()
    assert ask(visitor, target, request("GET", "/", "Authorization: NTLM TlRM")) == b"page"
    return target


def test_connection_that_a_visitor_has_signed_in_on_is_no_other_visitors(gateway, origin):
    with gateway.dial(APP) as first, gateway.dial(APP) as second:
        target = signed_in(first, origin)
        second.send(request())
        other = origin.accept()
        assert "authorization" not in str(fields_of(other.read_head()))
        other.send(answer(b"who are you?"))
        assert second.read_message()[1] == b"who are you?"
        assert ask(first, target, request("GET")) == b"page"


@pytest.mark.parametrize("seen", ["Authorization: Negotiate YIIC", None], ids=["asked", "answered"])
@pytest.mark.parametrize("method", ["GET", "POST"])
def test_either_side_shows_a_login(gateway, origin, seen, method):
    with gateway.dial(APP) as first, gateway.dial(APP) as second:
        first.send(request(method, "/", *([seen] if seen else []), body=b"x"))
        target = origin.accept()
        target.read_message()
        target.send(answer(b"page") if seen else answer(b"page", "WWW-Authenticate: Negotiate"))
        first.read_message()
        second.send(request())
        origin.accept().read_head()
        assert ask(first, target, request("POST", body=b"more")) == b"page"


def test_visitor_that_has_signed_in_stays_so_with_any_request(gateway, origin):
    """Also with requests after which a shared connection would not be kept."""
    with gateway.dial(APP) as visitor:
        target = signed_in(visitor, origin)
        chunked = request("POST", "/", "Transfer-Encoding: chunked") + b"1\r\nx\r\n0\r\n\r\n"
        for asked, answered in [
            (request("POST", body=b"x"), None),
            (chunked, None),
            (request("HEAD"), None),
            (request("DELETE"), b"HTTP/1.1 204 No Content\r\n\r\n"),
            (request("PATCH", body=bytes(100_000)), None),
            (request(), b"HTTP/1.1 304 Not Modified\r\n\r\n"),
        ]:
            if asked.startswith(b"HEAD"):
                answered = b"HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\n"
            ask(visitor, target, asked, answered)
        assert ask(visitor, target, request()) == b"page"
    assert origin.was_left_alone()


def test_connection_ends_with_the_visitor_that_has_signed_in(gateway, origin):
    with gateway.dial(APP) as visitor:
        target = signed_in(visitor, origin)
    assert target.read_to_end() == b""
    [tunnel] = gateway.inner.tunnels.registered()
    assert not tunnel._own.streams() and not tunnel._kept._all


def test_post_does_not_fail_if_the_target_has_ended_that_connection(gateway, origin):
    with gateway.dial(APP) as visitor:
        target = signed_in(visitor, origin)
        target.close()
        [tunnel] = gateway.inner.tunnels.registered()
        wait_until(lambda: not any(stream.quiet for stream in tunnel._own.streams()))
        visitor.send(request("POST", body=b"once"))
        target = origin.accept()
        assert target.read_message()[1] == b"once"
        target.send(CHALLENGE)
        assert visitor.read_message()[1] == b"sign in"
        assert ask(visitor, target, request("POST", body=b"again")) == b"page"


def test_late_bytes_end_the_connection_of_a_visitor_that_has_signed_in(gateway, origin):
    with gateway.dial(APP) as visitor:
        target = signed_in(visitor, origin)
        target.send(answer(b"late"))
        with contextlib.suppress(*CUT):
            assert target.read_to_end() == b""
        visitor.send(request("POST", body=b"x"))
        target = origin.accept()
        target.read_message()
        target.send(answer(b"its own"))
        assert visitor.read_message()[1] == b"its own"


def test_nobody_signs_in_for_all_visitors_of_a_proxy(cache, tmp_path, origin):
    """A trusted proxy's connection brings requests of several visitors."""
    with gateway_here(cache, TRUSTED_PROXIES="127.0.0.1") as gateway:
        with agent_here(gateway, tmp_path, http={APP: origin.port}):
            with gateway.dial(APP) as proxy:
                proxy.send(request("GET", "/", "Authorization: NTLM TlRM"))
                target = origin.accept()
                target.read_head()
                target.send(answer(b"page"))
                proxy.read_message()
                assert target.read_to_end() == b""
                proxy.send(request())
                origin.accept().read_head()
