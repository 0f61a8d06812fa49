"""The dashboard of a real gateway: at DASHBOARD_PORT and at the gateway's own name, by HTTP/1.1 and
HTTP/2."""

import json
import re
import socket
from contextlib import contextmanager
from types import SimpleNamespace
from urllib.parse import urlencode

import pytest
from http2_by_hand import DATA, END_STREAM, RST_STREAM, frame, http2_visitor, number
from support import (
    GATEWAY_HOST,
    TIMEOUT,
    Wire,
    gateway_here,
    request,
    wait_until,
)

from gotunnel_agent.common import http1
from gotunnel_server.dashboard import events, login
from gotunnel_server.visitors import relays

PASSWORD, TOKEN = "correct horse", "a-token-of-programs"
COOKIE = f"{login.COOKIE}{GATEWAY_HOST}"
SETTINGS = {"DASHBOARD_PASSWORD": PASSWORD, "DASHBOARD_TOKEN": TOKEN}
BEARER = ("authorization", f"Bearer {TOKEN}")
FORM = ("content-type", "application/x-www-form-urlencoded")
LOGIN = urlencode({"password": PASSWORD}).encode()
EVENTS = "/dashboard/api/v1/events"


@pytest.fixture
def gateway(cache):
    with gateway_here(cache, **SETTINGS) as gateway:
        yield gateway


@pytest.fixture
def quick(monkeypatch):
    """A reader's thread looks often whether the reader has left."""
    monkeypatch.setattr(events, "LOOK", 0.05)
    monkeypatch.setattr(events, "POLL", 0.05)


def ask(wire, *arguments, **keywords):
    """Status and fields of the answer, and its body."""
    send(wire, *arguments, **keywords)
    return parsed(*wire.read_message())


def send(wire, method, path, *fields, host=GATEWAY_HOST, body=b""):
    lines = (f"{name}: {value}" for name, value in fields)
    wire.send(request(method, path, *lines, host=host, body=body))


def parsed(head, body=b""):
    fields = http1.parse_response(head)
    return fields.status, {name.lower(): value for name, value in fields.fields}, body


@contextmanager
def at_port(gateway):
    with Wire(socket.create_connection(("127.0.0.1", gateway.dashboard_port), TIMEOUT)) as wire:
        yield wire


def test_a_login_by_http1_at_both_mounts(gateway):
    with at_port(gateway) as plain, gateway.dial(GATEWAY_HOST) as secure:
        for wire, mount in ((plain, "/"), (secure, "/dashboard/")):
            assert ask(wire, "GET", mount)[0] == 401
            status, fields, _ = ask(wire, "POST", f"{mount}login", FORM, body=LOGIN)
            assert (status, fields["location"]) == (303, "./")
            cookie = fields["set-cookie"]
            assert f"Path={mount};" in cookie and ("Secure" in cookie) == (wire is secure)
            name = re.match(rf"{COOKIE}=([^;]+);", cookie)[1]
            assert ask(wire, "GET", mount, ("Cookie", f"{COOKIE}={name}"))[0] == 200


def test_a_login_by_http2(gateway):
    with http2_visitor(gateway, GATEWAY_HOST) as visitor:
        visitor.ask(1, FORM, method="POST", path="/dashboard/login", host=GATEWAY_HOST, end=False)
        visitor.send(frame(DATA, END_STREAM, 1, LOGIN))
        status, fields, _ = visitor.answer(1)
        assert status == 303
        cookie = fields["set-cookie"].partition(";")[0]
        visitor.ask(3, ("cookie", cookie), path="/dashboard/", host=GATEWAY_HOST)
        visitor.grant(2**30, 0, 3)  # a page with many visits is larger than a first window
        assert visitor.answer(3)[0] == 200


def test_without_password_and_token_the_gateways_name_has_its_landing_page(cache):
    with gateway_here(cache) as gateway, gateway.dial(GATEWAY_HOST) as wire:
        status, _, body = ask(wire, "GET", "/dashboard/")
        assert status == 200 and b"<h1>It works" in body


def test_a_reader_of_events_holds_no_worker_and_is_counted_as_a_relay(gateway, quick):
    visitors = gateway.inner._visitors
    with gateway.dial(GATEWAY_HOST) as wire:
        send(wire, "GET", EVENTS, BEARER)
        status, fields, _ = parsed(wire.read_head())
        assert (status, fields["content-type"]) == (200, "text/event-stream")
        assert wire.read_until(b"\n\n") == b"retry: 2000\n\n"
        wait_until(lambda: visitors.exchanges.room.taken == 0)
        assert visitors.relays.taken == 1
    wait_until(lambda: visitors.relays.taken == 0)  # the tab was closed


def test_a_reader_by_http2_leaves_the_connection_to_others(gateway, quick):
    visitors = gateway.inner._visitors
    with http2_visitor(gateway, GATEWAY_HOST) as visitor:
        visitor.ask(1, BEARER, path=EVENTS, host=GATEWAY_HOST)
        assert visitor.wait_for(DATA, stream=1)[3].startswith(b"retry: 2000\n\n")
        visitor.ask(3, BEARER, path="/dashboard/", host=GATEWAY_HOST)
        visitor.grant(2**30, 0, 3)
        assert visitor.answer(3)[0] == 200
        visitor.send(frame(RST_STREAM, 0, 1, number(8)))  # the browser's EventSource.close()
        wait_until(lambda: visitors.relays.taken == 0)


def test_a_drain_ends_the_readers(cache):
    with gateway_here(cache, DRAIN_TIMEOUT="60", **SETTINGS) as gateway:
        with gateway.dial(GATEWAY_HOST) as wire, http2_visitor(gateway, GATEWAY_HOST) as visitor:
            send(wire, "GET", EVENTS, BEARER)
            visitor.ask(1, BEARER, path=EVENTS, host=GATEWAY_HOST)
            visitor.wait_for(DATA, stream=1)
            wire.read_until(b"\n\n")
            gateway.inner.stop_accepting()
            wire.read_to_end()
            while not visitor.wait_for(DATA, stream=1)[1] & END_STREAM:
                pass


def test_the_dashboards_own_requests_are_marked_in_the_records(cache):
    visits = []
    with gateway_here(cache, subscribers=[visits.extend], **SETTINGS) as gateway:
        with gateway.dial(GATEWAY_HOST) as wire:
            assert ask(wire, "GET", "/dashboard/api/v1/nothing", BEARER)[0] == 404
            assert ask(wire, "GET", "/dashboard")[0] == 301
            assert ask(wire, "GET", "/")[0] == 200
        wait_until(lambda: len(visits) == 3)
    told = [(visit.is_local, visit.status) for visit in visits]
    assert told == [(True, 404), (True, 301), (False, 200)]


def test_a_request_body_that_is_not_read_ends_the_connection_behind_the_answer(gateway):
    with at_port(gateway) as wire:
        wire.send(b"POST /api/v1/nothing HTTP/1.1\r\nHost: localhost\r\nContent-Length: 9\r\n\r\n")
        status, fields, body = parsed(*wire.read_message())
        assert (status, fields["connection"]) == (404, "close")
        assert json.loads(body)["error"] == "no-page"


def test_a_reader_that_reads_nothing_is_cut(gateway, quick, monkeypatch):
    monkeypatch.setattr(relays, "FEED_STALL", 0.1)
    much = [SimpleNamespace(name="state", data="x" * 2**20)]
    events = gateway.inner._showing._dashboard.events
    monkeypatch.setattr(events, "_source", lambda may: SimpleNamespace(poll=lambda: much))
    with at_port(gateway) as wire:
        send(wire, "GET", "/api/v1/events", BEARER)
        wire.read_head()
        wait_until(lambda: events.taken == 0)
