"""An inspector beside an agent: it shows the visits that pass through a gateway, and can be turned
on and off while the agent runs."""

import contextlib
import hashlib
import json
import os
import signal
import socket
import sys
import threading
import urllib.error
import urllib.request

import pytest
from support import (
    APP,
    RAW,
    ROOT,
    TIMEOUT,
    agent_here,
    agent_yaml,
    answer,
    gateway_here,
    go_gateway,
    request,
    reserved_port,
    running,
    wait_until,
)
from test_websocket import MASK, frame

import gotunnel
from gotunnel_agent.config import Inspect, load
from gotunnel_agent.follow import Follower
from gotunnel_agent.inspector import CannotInspect, Inspection, start_inspector
from gotunnel_agent.inspector.record import ENDED, OPEN, Kept
from gotunnel_agent.plan import needs_session

POST = {"Content-Type": "application/json"}


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    return tmp_path


@pytest.fixture
def gateway(cache):
    with gateway_here(cache) as gateway:
        yield gateway


@contextlib.contextmanager
def inspecting(agent, **settings):
    with reserved_port() as port:
        pass
    inspector = start_inspector(agent, Inspect(port=port, **settings), next_port=True)
    with contextlib.closing(inspector):
        yield inspector


def records(inspector, count=1, state=ENDED):
    """That many records, when they are there."""
    ring = inspector._ring
    wait_until(lambda: len(ring) >= count and all(each.state == state for each in ring.all()))
    return ring.all()


def ask(url, path):
    address, _, token = url.partition("?token=")
    asked = urllib.request.Request(address + path, headers={"Authorization": f"Bearer {token}"})
    with urllib.request.urlopen(asked, timeout=TIMEOUT) as found:
        return json.load(found)


def test_visits_appear_and_can_be_asked_for(gateway, tmp_path, origin):
    origin.serve(lambda wire: [wire.read_head(), wire.read_exactly(5), wire.send(answer(b"hi"))])
    with agent_here(gateway, tmp_path, {APP: origin.port}) as agent:
        agent.follower = mine = Follower()  # as a screen has one
        with inspecting(agent) as inspector:
            with gateway.visitor(APP) as visitor:
                visitor.request("POST", "/hook", b"12345", POST)
                assert visitor.getresponse().read() == b"hi"
            [record] = records(inspector)
            assert (record.method, record.path, record.status) == ("POST", "/hook", 200)
            assert (record.hostname, record.visitor) == (APP, "127.0.0.1")
            assert record.request_body == Kept(b"12345", 5)
            assert record.response_body == Kept(b"hi", 2)
            assert 0 < record.first_byte <= record.duration < TIMEOUT
            found = ask(inspector.url, "api/v1/visits")
            assert [visit["path"] for visit in found["visits"]] == ["/hook"]
            [tunnel] = ask(inspector.url, "api/v1/info")["tunnels"]
            assert (tunnel["hostname"], tunnel["target"]) == (APP, f"127.0.0.1:{origin.port}")
            assert inspector.address in inspector.url and "token" not in inspector.address
        assert agent.follower is mine and not mine._listeners
        assert [seen.path for seen in mine.take()] == ["/hook"]


def test_visits_through_a_go_gateway_are_kept_as_well(gopeer, cache, tmp_path, origin):
    origin.serve(lambda wire: [wire.read_head(), wire.read_exactly(5), wire.send(answer(b"hi"))])
    with go_gateway(gopeer, cache) as gateway:
        with agent_here(gateway, tmp_path, {APP: origin.port}) as agent, inspecting(agent) as found:
            for path in ("/first", "/second"):
                with gateway.visitor(APP) as visitor:
                    visitor.request("POST", path, b"12345", POST)
                    assert visitor.getresponse().read() == b"hi"
            kept = records(found, 2)
            assert [(each.path, each.status, each.problem) for each in kept] == [
                ("/first", 200, ""),
                ("/second", 200, ""),
            ]
            assert {(each.request_body, each.response_body) for each in kept} == {
                (Kept(b"12345", 5), Kept(b"hi", 2))
            }


def test_nothing_of_it_stays_behind(gateway, tmp_path, origin):
    with agent_here(gateway, tmp_path, {APP: origin.port}) as agent:
        with inspecting(agent) as inspector:
            assert agent.follower is not None
        assert agent.follower is None
        with pytest.raises(urllib.error.URLError):
            ask(inspector.url, "api/v1/info")
    wait_until(
        lambda: not any(thread.name.startswith("inspect") for thread in threading.enumerate())
    )


def test_a_webhook_whose_target_is_down_is_kept_whole(gateway, tmp_path):
    with reserved_port() as port, agent_here(gateway, tmp_path, {APP: port}) as agent:
        with inspecting(agent) as inspector:
            with gateway.visitor(APP) as visitor:
                visitor.request("POST", "/hook", b"x" * 10_000, POST)
                assert visitor.getresponse().status == 502
            [record] = records(inspector)
            assert (record.status, record.problem) == (502, "target unreachable")
            assert record.request_body == Kept(b"x" * 10_000, 10_000)


def test_a_websocket_is_shown_while_it_goes_on(gateway, tmp_path, origin):
    switch = b"HTTP/1.1 101 X\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n"
    with agent_here(gateway, tmp_path, {APP: origin.port}) as agent:
        with inspecting(agent) as inspector, gateway.dial(APP) as visitor:
            visitor.send(request("GET", "/ws", "Connection: Upgrade", "Upgrade: websocket"))
            target = origin.accept()
            target.read_head()
            target.send(switch + frame(1, b"welcome"))
            visitor.read_head()
            assert visitor.read_exactly(9) == frame(1, b"welcome")
            visitor.send(frame(1, b"hello", mask=MASK))
            assert target.read_exactly(11) == frame(1, b"hello", mask=MASK)
            ring = inspector._ring
            wait_until(lambda: len(ring) and ring.all()[0].message_count == 2)
            [record] = ring.all()
            assert record.state == OPEN and record.status == 101
            assert [(m.from_visitor, m.data) for m in record.messages] == [
                (False, b"welcome"), (True, b"hello"),
            ]  # fmt: skip
            target.finish()
            visitor.finish()
            records(inspector)


def test_events_and_a_chunked_upload_are_passed_on_and_shown(gateway, tmp_path, origin):
    upload = b"".join(b"%x\r\n%b\r\n" % (n, b"u" * n) for n in range(1, 200)) + b"0\r\n\r\n"
    size = sum(range(1, 200))

    def site(wire):
        head = wire.read_head()
        got = b""
        while not got.endswith(b"0\r\n\r\n"):
            got += wire.read()
        assert b"chunked" in head
        wire.send(
            b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nConnection: close\r\n\r\n"
            b"data: 1\n\ndata: 2\n\n"
        )

    origin.serve(site)
    with agent_here(gateway, tmp_path, {APP: origin.port}) as agent, inspecting(agent) as inspector:
        with gateway.dial(APP) as visitor:
            visitor.send(request("POST", "/up", "Transfer-Encoding: chunked"))
            visitor.send(upload)
            assert b"data: 2" in visitor.read_until(b"data: 2\n\n")
        [record] = records(inspector)
        assert record.request_body == Kept(b"u" * size, size), record.problem
        assert [message.data for message in record.messages] == [b"data: 1", b"data: 2"]


def test_a_large_download_is_not_changed_and_not_kept(gateway, tmp_path, origin):
    data = os.urandom(1 << 20) * 24
    origin.serve(lambda wire: [wire.read_head(), wire.send(answer(data))])
    with agent_here(gateway, tmp_path, {APP: origin.port}) as agent, inspecting(agent) as inspector:
        with gateway.visitor(APP) as visitor:
            visitor.request("GET", "/")
            got = visitor.getresponse().read()
        assert hashlib.sha256(got).digest() == hashlib.sha256(data).digest()
        [record] = records(inspector)
        assert record.response_body == Kept(data[:65536], len(data)) and record.problem == ""
        assert inspector._ring.used < 100_000


def test_a_connection_in_tcp_mode_is_counted(gateway, tmp_path, origin):
    with agent_here(gateway, tmp_path, tcp={RAW: origin.port}) as agent:
        with inspecting(agent) as inspector:
            with gateway.dial(RAW) as visitor:
                visitor.send(b"ping")
                wire = origin.accept()
                wire.read_exactly(4)
                visitor.finish()
                wire.finish()
                [record] = records(inspector)
            assert (record.mode, record.request_body.size) == ("tcp", 4)


def test_a_port_in_use_is_said_or_the_next_one_is_taken(gateway, tmp_path):
    class Nobody:
        follower = None

    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(CannotInspect, match=f"inspect: 127.0.0.1:{port}: Address already"):
            start_inspector(Nobody(), Inspect(port=port))
        inspector = start_inspector(Nobody(), Inspect(port=port), next_port=True)
        with contextlib.closing(inspector):
            assert port < inspector.port <= port + 20
    assert Nobody.follower is None


def test_its_settings_may_change_while_the_agent_runs(gateway, tmp_path, origin):
    origin.serve(lambda wire: [wire.read_head(), wire.send(answer(b"hi"))])
    with reserved_port() as port:
        pass
    with agent_here(gateway, tmp_path, {APP: origin.port}) as agent:
        inspection = Inspection(agent)
        assert inspection.change(None) == "" and agent.follower is None
        with contextlib.closing(inspection):
            address = inspection.change(Inspect(port=port))
            assert address == f"http://127.0.0.1:{port}/"
            assert inspection.change(Inspect(port=port)) == ""
            assert gateway.get(APP) == (200, b"hi")
            records(inspection._started)
            # The same port, and what is kept stays.
            inspection.change(Inspect(port=port, body=0, memory=2**20))
            assert [len(each.response_body.data) for each in records(inspection._started)] == [2]
            assert inspection._started._ring.budget == 2**20 / 2
            with socket.create_server(("127.0.0.1", 0)) as taken:
                with pytest.raises(CannotInspect):
                    inspection.change(Inspect(port=taken.getsockname()[1]))
            inspection.change(None)
            assert agent.follower is None


def test_a_visit_that_goes_on_stays_with_its_record_when_the_settings_change(
    gateway, tmp_path, origin
):
    ports = []
    for _ in range(2):
        with reserved_port() as port:
            ports.append(port)
    with agent_here(gateway, tmp_path, {APP: origin.port}) as agent:
        inspection = Inspection(agent)
        inspection.change(Inspect(port=ports[0]))
        with gateway.dial(APP) as visitor:
            visitor.send(request("GET", "/slow"))
            target = origin.accept()
            target.read_head()
            [record] = records(inspection._started, state=OPEN)
            inspection.change(Inspect(port=ports[1]))
            inspection.change(Inspect(port=ports[1], memory=2**20))
            target.send(answer(b"hi"))
            visitor.read_head()
            assert records(inspection._started) == [record]
            assert record.response_body == Kept(b"hi", 2)
            # Off: the stream goes on, and nothing of it is recorded.
            ring = inspection._started._ring
            inspection.change(None)
            visitor.read_exactly(2)
            visitor.send(request("GET", "/unseen"))
            target.read_head()
            target.send(answer(b"ho"))
            visitor.read_head()
            assert ring.all() == [] and ring.used == 0


def test_an_inspector_that_is_new_needs_a_session_of_its_own(gateway, tmp_path):
    path = tmp_path / "agent.yaml"
    path.write_text(agent_yaml(gateway, {APP: 1}, {}, {}))
    off = load(path)
    path.write_text(agent_yaml(gateway, {APP: 1}, {}, {"inspect": "4040"}))
    on = load(path)
    path.write_text(agent_yaml(gateway, {APP: 1}, {}, {"inspect": "4041"}))
    assert needs_session(off, on)
    assert not needs_session(on, load(path)) and not needs_session(on, off)


# Programs ----------------------------------------------------------------------------------------


def test_an_agent_that_was_started_without_it_gets_one_by_sighup(gateway, tmp_path, origin):
    origin.serve(lambda wire: [wire.read_head(), wire.send(answer(b"hi"))])
    with reserved_port() as port:
        pass
    path = tmp_path / "agent.yaml"
    off = agent_yaml(gateway, {APP: origin.port}, {}, {})
    path.write_text(off)
    command = (sys.executable, str(ROOT / "gotunnel_agent"), "-c", str(path))
    with running(*command, cwd=tmp_path, XDG_STATE_HOME=str(tmp_path / "state")) as agent:
        gateway.wait_for_routes(APP)
        assert gateway.get(APP) == (200, b"hi")  # this stream stays idle at the gateway
        path.write_text(json.dumps({**json.loads(off), "inspect": str(port)}))
        agent.signal(signal.SIGHUP)
        agent.wait_for(rf"inspector: http://127.0.0.1:{port}/ \(`gotunnel-agent inspect` has its")
        agent.wait_for(r"SIGHUP: .*: another inspect$")
        token = (tmp_path / "state" / "gotunnel" / f"inspect-{port}.token").read_text().strip()
        url = f"http://127.0.0.1:{port}/?token={token}"

        def seen():
            assert gateway.get(APP) == (200, b"hi")
            return ask(url, "api/v1/visits")["visits"]

        wait_until(seen)
        assert token not in "\n".join(agent.lines)
        path.write_text(off)
        agent.signal(signal.SIGHUP)
        wait_until(lambda: sum("another inspect" in line for line in agent.lines) == 2)
        with pytest.raises(urllib.error.URLError):
            ask(url, "api/v1/info")


def test_a_port_in_use_ends_the_service_with_a_line(gateway, tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        path = tmp_path / "agent.yaml"
        path.write_text(agent_yaml(gateway, {APP: 1}, {}, {"inspect": str(port)}))
        with running(
            sys.executable, str(ROOT / "gotunnel_agent"), "-c", str(path), cwd=tmp_path
        ) as program:
            assert program.wait(TIMEOUT) == 1
            program.wait_for(rf"inspect: 127\.0\.0\.1:{port}: Address already in use")


def test_without_it_no_module_of_it_is_imported(tmp_path):
    code = (
        "import sys, gotunnel_agent.cli, gotunnel_agent.embedded, gotunnel_agent.quick.serving\n"
        "print([name for name in sys.modules if name.startswith('gotunnel_agent.inspector.')])"
    )
    with running(sys.executable, "-c", code, cwd=ROOT) as program:
        program.wait_for(r"^\[\]$")


def test_forward_has_an_inspector_if_it_is_asked_for(gateway, tmp_path, origin):
    origin.serve(lambda wire: [wire.read_head(), wire.send(answer(b"hi"))])
    path = tmp_path / "account.yaml"
    path.write_text(agent_yaml(gateway, {APP: 1}, {}, {"inspect": "off"}))
    with gotunnel.forward(origin.port, host=APP, config=path, inspect=True) as tunnel:
        assert gateway.get(APP) == (200, b"hi")
        wait_until(lambda: ask(tunnel.inspector, "api/v1/visits")["visits"])
        url = tunnel.inspector
    with pytest.raises(urllib.error.URLError):
        ask(url, "api/v1/info")
    with pytest.raises(ValueError, match="inspect: unknown key 'memry', did you mean 'memory'?"):
        gotunnel.forward(1, config=path, inspect={"memry": 1})
    with gotunnel.forward(origin.port, host=APP, config=path) as tunnel:
        assert tunnel.inspector == ""
