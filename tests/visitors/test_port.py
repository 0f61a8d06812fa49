"""What a public port is made of: the room for so many, and what is said once."""

import logging
import socket
import threading
import types

from support import TIMEOUT

from gotunnel_server.visitors.port import Port, Room, Timeouts


def test_room_is_for_so_many_of_whom_one_address_is_half():
    room = Room(4)
    assert [room.enter("a") for _ in range(3)] == [True, True, False]
    assert [room.enter("b") for _ in range(3)] == [True, True, False]
    assert not room.enter("c")
    room.leave("a")
    assert room.enter("c") and not room.enter("a")


def test_room_has_no_share_for_who_stands_for_many():
    room = Room(4, unlimited={"proxy"})
    assert [room.enter("proxy") for _ in range(5)] == [True, True, True, True, False]
    room.leave("proxy")
    assert room.enter("a")


def test_room_for_one_is_for_anybody():
    room = Room(1)
    assert room.enter("a") and not room.enter("b")
    room.leave("a")
    assert room.enter("b")


def test_what_is_said_once_is_said_once_by_all_threads(caplog):
    """Scanners come in crowds."""
    port = Port(site=None, requests=1, proxies=(), timeouts=Timeouts(1, 1, 1))
    said = []

    def hear(record):
        said.append(record.levelname)
        if len(said) == 1:  # meanwhile, in another thread
            other = threading.Thread(target=port.say_once, args=("a scanner",), name="other")
            other.start()
            other.join(TIMEOUT)
        return True

    caplog.set_level(logging.DEBUG, "gotunnel.visitor")
    log = logging.getLogger("gotunnel.visitor")
    log.addFilter(hear)
    try:
        port.say_once("a scanner")
        port.say_once("something else")
    finally:
        log.removeFilter(hear)
        port.stop(TIMEOUT)
    assert said == ["WARNING", "DEBUG", "WARNING"]


def test_request_that_finds_no_thread_gives_its_place_back():
    """As when the gateway stops in that moment."""
    port = Port(site=None, requests=1, proxies=(), timeouts=Timeouts(1, 1, 1))
    port.stop(TIMEOUT)
    forgotten = threading.Event()
    port.listener = types.SimpleNamespace(forget=forgotten.set)
    ours, visitor = socket.socketpair()
    with visitor:
        visitor.sendall(b"GET / HTTP/1.1\r\nHost: app.localhost\r\n\r\n")
        port.welcome(ours, ("192.0.2.1", 1)).ready()
        assert visitor.recv(1) == b"" and forgotten.is_set()
    assert port.exchanges.room.enter("192.0.2.1")
