"""The agent that was written from docs/protocol.md alone, with our gateway."""

import ast
import contextlib
import os
import sys
import threading
from pathlib import Path

import minimal_agent
import pytest
from support import (
    APP,
    MIB,
    RAW,
    SECRET,
    TIMEOUT,
    TUNNEL_HOST,
    Origin,
    answer,
    gateway_here,
    running,
    wait_until,
)

from gotunnel_server.agents import heartbeat

MOST_LINES = 220  # to be read in one go


@contextlib.contextmanager
def serving(gateway, routes):
    """The minimal agent in a thread, registered."""
    agent = minimal_agent.Agent(TUNNEL_HOST, gateway.tunnel_port, gateway.ca_file)

    def run():
        # So its session ends; the gateway waits until it has hung up.
        with contextlib.closing(agent), contextlib.suppress(ConnectionError):
            agent.run(minimal_agent.make_token(SECRET, "minimal"), routes)

    thread = threading.Thread(target=run, name="minimal agent")
    thread.start()
    gateway.wait_for_routes(*routes)
    try:
        yield
    finally:
        gateway.inner.tunnels.close()  # the agent serves until its session ends
        thread.join(TIMEOUT)


def route_to(origin, mode="http"):
    return ("127.0.0.1", origin.port), mode


def serve_echo(wire):
    """Answer each request with its body, or a greeting."""
    while True:
        _, body = wire.read_message()
        wire.send(answer(body or b"hello"))


def test_it_serves_visits_in_http_mode(tmp_path):
    with gateway_here(tmp_path) as gateway, Origin() as origin:
        origin.serve(serve_echo)
        with serving(gateway, {APP: route_to(origin)}):
            assert gateway.get(APP) == (200, b"hello")
            assert gateway.get(APP) == (200, b"hello")  # over the same stream
            big = os.urandom(3 * MIB)  # several windows, both ways
            with gateway.visitor(APP) as visitor:
                visitor.request("POST", "/", big)
                assert visitor.getresponse().read() == big


def test_it_passes_a_half_close_on_in_tcp_mode(tmp_path):
    with gateway_here(tmp_path) as gateway, Origin() as origin:
        origin.serve(lambda wire: wire.send(b"heard " + wire.read_to_end()))
        with serving(gateway, {RAW: route_to(origin, "tcp")}), gateway.dial(RAW) as visitor:
            visitor.send(b"all of it")
            visitor.finish()
            assert visitor.read_to_end() == b"heard all of it"


def test_it_says_that_a_target_is_down(tmp_path):
    with gateway_here(tmp_path) as gateway, Origin() as origin:
        gone = route_to(origin)
    with gateway_here(tmp_path) as gateway, serving(gateway, {APP: gone}):
        assert gateway.get(APP)[0] == 502


def test_it_answers_pings_of_both_kinds(tmp_path, monkeypatch):
    monkeypatch.setattr(heartbeat, "PING_INTERVAL", 0.01)
    monkeypatch.setattr(heartbeat, "BEAT", 0.02)
    with gateway_here(tmp_path) as gateway, Origin() as origin:
        with serving(gateway, {APP: route_to(origin)}):
            [tunnel] = gateway.inner.tunnels.registered()
            session, heart = tunnel._session, tunnel._heartbeat
            before = heart._pong_at
            wait_until(lambda: heart._pong_at > before)
            with session._lock:
                session._mux.keep_alive(session.heard_at)
            session._sender.flush()
            wait_until(lambda: session._mux.round_trip is not None)


def test_it_hears_why_it_is_refused(tmp_path):
    with gateway_here(tmp_path) as gateway:
        agent = minimal_agent.Agent(TUNNEL_HOST, gateway.tunnel_port, gateway.ca_file)
        with contextlib.closing(agent), pytest.raises(ConnectionError, match=": auth failed"):
            agent.run(
                minimal_agent.make_token("another secret", "minimal"), {APP: (("", 1), "http")}
            )


def test_it_runs_as_its_first_lines_say(tmp_path):
    with gateway_here(tmp_path) as gateway, Origin() as origin:
        origin.serve(serve_echo)
        words = (TUNNEL_HOST, gateway.tunnel_port, SECRET, APP, origin.port, gateway.ca_file)
        command = (sys.executable, minimal_agent.__file__, *map(str, words))
        with running(*command, cwd=tmp_path):
            gateway.wait_for_routes(APP)
            assert gateway.get(APP) == (200, b"hello")


def test_it_is_small_and_needs_nothing_of_ours():
    source = Path(minimal_agent.__file__).read_text(encoding="utf-8")
    imported = {
        alias.name
        for node in ast.walk(ast.parse(source))
        if isinstance(node, (ast.Import, ast.ImportFrom))
        for alias in node.names
    }
    assert imported <= sys.stdlib_module_names
    assert len(source.splitlines()) <= MOST_LINES
