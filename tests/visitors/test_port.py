"""A public port: warnings that are logged once, and places that are given back."""

import logging
import socket
import threading
import types

from support import TIMEOUT

from gotunnel_server.visitors.port import Port
from gotunnel_server.visitors.room import Room, Timeouts


def test_what_is_said_once_is_said_once_by_all_threads(caplog):
    """Several threads may warn at the same time."""
    port = Port(site=None, room=Room(1, ()), proxies=(), timeouts=Timeouts(1, 1, 1))
    said = []

    def hear(record):
        said.append(record.levelname)
        if len(said) == 1:  # meanwhile, in another thread
            other = threading.Thread(target=port.say_once, args=("a scanner",), name="other")
            other.start()
            other.join(TIMEOUT)
        return True

    caplog.set_level(logging.DEBUG, "gotunnel.port")
    log = logging.getLogger("gotunnel.port")
    log.addFilter(hear)
    try:
        port.say_once("a scanner")
        port.say_once("something else")
    finally:
        log.removeFilter(hear)
        port.stop(TIMEOUT)
    assert said == ["WARNING", "DEBUG", "WARNING"]


def test_request_that_finds_no_thread_gives_its_place_back():
    """The pool of threads refuses it when the gateway is stopping."""
    port = Port(site=None, room=Room(1, ()), proxies=(), timeouts=Timeouts(1, 1, 1))
    port.listener = None  # not needed: the connection is never parked
    port.stop(TIMEOUT)
    forgotten = threading.Event()
    seat = types.SimpleNamespace(leave=forgotten.set, settle=lambda: None)
    ours, visitor = socket.socketpair()
    with visitor:
        visitor.sendall(b"GET / HTTP/1.1\r\nHost: app.localhost\r\n\r\n")
        port.welcome(ours, ("192.0.2.1", 1), seat).ready()
        assert visitor.recv(1) == b"" and forgotten.is_set()
    assert port.exchanges.room.enter("192.0.2.1")
