"""Relays, with a stand-in for visitor and stream, for cases that are rare in real ones."""

import contextlib
import queue
import socket
import threading
import types

import pytest
from support import TIMEOUT

from gotunnel import NoThread, StreamReset
from gotunnel_agent.common import duplex as duplex_module
from gotunnel_agent.common import relay as relay_module
from gotunnel_server.routes import Route
from gotunnel_server.visitors import relays
from gotunnel_server.visitors.port import Port
from gotunnel_server.visitors.room import Room, Timeouts


class End:
    """An end of a relay: a test says what it reads, and sees what is done to it."""

    refused = False

    def __init__(self, *came):
        """``came``: what is read. After it, a read waits until come() or reset()."""
        self.written = []
        self.finished, self.was_reset = threading.Event(), threading.Event()
        self._came = queue.SimpleQueue()
        for data in came:
            self.come(data)

    def come(self, data):
        self._came.put(data)

    def read(self):
        data = self._came.get()
        if data is None:
            raise StreamReset
        return data

    def write(self, data):
        self.written.append(data)

    def finish(self):
        self.finished.set()

    def reset(self):
        self.was_reset.set()
        self.come(None)

    stop = stop_reading = cut = reset
    is_dead = False

    def close(self):
        """An agent that ignores FIN does not end the stream for it."""

    def on_death(self, function):
        pass


@contextlib.contextmanager
def relaying(function, visitor, stream):
    """``function(visitor, stream)`` in a thread, which has ended afterwards."""
    thread = threading.Thread(target=function, args=(visitor, stream), name="relay", daemon=True)
    thread.start()
    yield
    thread.join(TIMEOUT)
    assert not thread.is_alive()


@pytest.fixture(autouse=True)
def impatient(monkeypatch):
    monkeypatch.setattr(relays, "HELD_FIN_TIMEOUT", 0.05)
    monkeypatch.setattr(relays, "ENDING_TIMEOUT", 0.05)


def has_ended(name):
    return name not in {thread.name for thread in threading.enumerate()}


def test_agent_that_ignores_the_held_fin_keeps_no_thread():
    visitor, stream = End(b"question", b""), End(b"answer")
    with relaying(relays.relay_holding_fin, visitor, stream):
        assert stream.finished.wait(TIMEOUT)
        assert stream.was_reset.wait(TIMEOUT) and visitor.was_reset.wait(TIMEOUT)
    assert (stream.written, visitor.written) == ([b"question"], [b"answer"])
    assert not visitor.finished.is_set()  # the answer may be incomplete
    assert has_ended("relay back")


def test_agent_that_ignores_fin_after_a_101_keeps_no_thread():
    visitor, stream = End(b"bye", b""), End(b"hello")
    with relaying(relays.relay_switched, types.SimpleNamespace(duplex=visitor, visit=None), stream):
        assert stream.was_reset.wait(TIMEOUT) and visitor.was_reset.wait(TIMEOUT)
    assert (stream.written, visitor.written) == ([b"bye"], [b"hello"])
    assert has_ended("relay back")


def test_visitor_of_an_agent_without_upgrades_gets_its_answer_after_a_101_whole():
    visitor, stream = End(b"bye", b""), End(b"hello")
    with relaying(relays.relay_switched, types.SimpleNamespace(duplex=visitor, visit=None), stream):
        assert stream.finished.wait(TIMEOUT)
        stream.come(b"and bye")
        stream.come(b"")
    assert (stream.written, visitor.written) == ([b"bye"], [b"hello", b"and bye"])
    assert visitor.finished.is_set() and not visitor.was_reset.is_set()


def test_target_that_has_ended_after_a_101_gives_its_visitor_a_moment(monkeypatch):
    monkeypatch.setattr(relays, "LAST_BYTES_TIMEOUT", 0.05)
    visitor, stream = End(), End(b"bye", b"")
    visitor.stop = lambda: visitor.come(b"")
    with relaying(relays.relay_switched, types.SimpleNamespace(duplex=visitor, visit=None), stream):
        pass
    assert visitor.written == [b"bye"] and visitor.finished.is_set()


def test_agent_that_answers_the_held_fin_has_its_answer_passed_on_whole():
    visitor, stream = End(b""), End()
    with relaying(relays.relay_holding_fin, visitor, stream):
        assert stream.finished.wait(TIMEOUT)
        stream.come(b"the last of it")
        stream.come(b"")
    assert visitor.written == [b"the last of it"] and visitor.finished.is_set()
    assert not (stream.was_reset.is_set() or visitor.was_reset.is_set())


def test_fin_is_held_as_long_as_a_slow_visitor_takes_what_has_come():
    """At this agent a FIN ends the visit, and the visitor would lose the rest of the answer."""
    visitor, stream = End(b""), End(b"answer")
    began, may_end = threading.Event(), threading.Event()

    def write_slowly(data):
        began.set()
        assert may_end.wait(TIMEOUT)
        visitor.written.append(data)

    visitor.write = write_slowly
    with relaying(relays.relay_holding_fin, visitor, stream):
        assert began.wait(TIMEOUT)
        assert not stream.finished.wait(10 * relays.HELD_FIN_TIMEOUT)
        may_end.set()
        stream.come(b"")
    assert visitor.written == [b"answer"] and visitor.finished.is_set()


class Tunnel:
    half_close = True
    unwell = {}

    def __init__(self, stream):
        self._stream = stream

    def open(self, route, ends):
        return self._stream


@pytest.mark.parametrize("sni", [None, "app.localhost"], ids=["plain", "TLS"])
def test_visitor_that_is_gone_after_its_fin_keeps_no_relay(monkeypatch, sni):
    monkeypatch.setattr(relay_module, "LOOK_AT_ENDED", 0.02)
    port = Port(site=None, room=Room(1, ()), proxies=(), timeouts=Timeouts(1, 1, 1))
    forgotten = threading.Event()
    seat = types.SimpleNamespace(leave=forgotten.set, settle=lambda: None)
    stream = End()
    with socket.create_server(("127.0.0.1", 0)) as server:
        outer = socket.create_connection(server.getsockname())
        sock, address = server.accept()
    visitor = port.add(sock, address, None, seat)
    visitor.sni = sni
    visitor.has_asked = True
    assert visitor.claim_relay()
    relays.start_tcp(visitor, Route("app.localhost", "tcp", Tunnel(stream)))
    outer.sendall(b"question")
    outer.shutdown(socket.SHUT_WR)
    assert stream.finished.wait(TIMEOUT) and stream.written == [b"question"]
    outer.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, duplex_module.NO_LINGER)
    outer.close()
    assert stream.was_reset.wait(TIMEOUT) and forgotten.wait(TIMEOUT)
    assert port.relays.enter(address[0])  # its place is free
    port.stop(TIMEOUT)


@pytest.mark.parametrize("half_close", [True, False])
def test_visit_without_a_thread_is_reset_on_both_sides_and_said(monkeypatch, caplog, half_close):
    """A mere close would look like an empty, complete visit."""
    port = Port(site=None, room=Room(1, ()), proxies=(), timeouts=Timeouts(1, 1, 1))
    forgotten = threading.Event()
    seat = types.SimpleNamespace(leave=forgotten.set, settle=lambda: None)
    ours, outer = socket.socketpair()
    visitor = port.add(ours, ("192.0.2.1", 1), None, seat)
    visitor.sni = "app.localhost"
    visitor.has_asked = True
    assert visitor.claim_relay()
    stream, tunnel = End(), Tunnel(End())
    tunnel._stream, tunnel.half_close = stream, half_close
    closed_at = []
    stream.close = lambda: closed_at.append(stream.was_reset.is_set())

    def refuse(*_):
        raise NoThread("no thread to be had: raise the limit (ulimit -u)")

    monkeypatch.setattr(relays, "spawn", refuse)
    monkeypatch.setattr(relay_module, "spawn", refuse)
    relays._run(relays._relay_tcp, visitor, Route("app.localhost", "tcp", tunnel))
    assert stream.was_reset.is_set() and closed_at == [True] and forgotten.is_set()
    (record,) = [record for record in caplog.records if record.levelname == "WARNING"]
    assert record.getMessage().endswith("(ulimit -u); the visit is reset")
    outer.close()
    port.stop(TIMEOUT)
