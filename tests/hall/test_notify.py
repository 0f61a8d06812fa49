"""What systemd is told, read from the other end of its socket."""

import contextlib
import os
import socket
import threading
import time

import pytest
from support import TIMEOUT

from gotunnel_server.notify import Notifier, Watchdog, watchdog_interval


class Manager:
    """systemd's end of NOTIFY_SOCKET."""

    def __init__(self, address):
        self._sock = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._sock.bind(address)
        self._sock.settimeout(TIMEOUT)

    def hear(self):
        return self._sock.recv(4096).decode()

    def close(self):
        self._sock.close()


@pytest.fixture
def manager(tmp_path):
    with contextlib.closing(Manager(str(tmp_path / "notify"))) as manager:
        yield manager


@pytest.fixture
def notifier(tmp_path, manager):
    return Notifier({"NOTIFY_SOCKET": str(tmp_path / "notify")})


def test_without_notify_socket_nothing_is_told(caplog):
    notifier = Notifier({})
    notifier.tell("READY=1")
    assert not notifier and caplog.messages == []


def test_lines_come_in_one_datagram(notifier, manager):
    notifier.tell("MAINPID=12", "READY=1")
    assert manager.hear() == "MAINPID=12\nREADY=1"


def test_an_abstract_name_is_known():
    name = f"gotunnel-test-{os.getpid()}"
    with contextlib.closing(Manager(f"\0{name}")) as manager:
        Notifier({"NOTIFY_SOCKET": f"@{name}"}).tell("READY=1")
        assert manager.hear() == "READY=1"


def test_reloading_comes_with_the_monotonic_clock(notifier, manager):
    before = time.monotonic_ns() // 1000
    notifier.tell_reloading()
    first, second = manager.hear().split("\n")
    assert first == "RELOADING=1"
    name, _, usec = second.partition("=")
    assert name == "MONOTONIC_USEC" and before <= int(usec) <= time.monotonic_ns() // 1000


@pytest.mark.parametrize("address", ["vsock:2:1234", "relative", "/" + "x" * 200, "@" + "x" * 200])
def test_an_address_of_another_kind_is_one_line(address, caplog):
    assert not Notifier({"NOTIFY_SOCKET": address})
    (line,) = caplog.messages
    assert "expected the path of a unix socket" in line and len(line) < 300


def test_a_socket_that_is_gone_is_one_warning(tmp_path, caplog):
    notifier = Notifier({"NOTIFY_SOCKET": str(tmp_path / "gone")})
    notifier.tell("READY=1")
    notifier.tell("READY=1")
    line, again = caplog.records
    assert (line.levelname, again.levelname) == ("WARNING", "DEBUG")
    line = line.getMessage()
    assert "sending READY=1 failed: No such file" in line


# The watchdog ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("environment", "interval"),
    [
        ({}, None),
        ({"WATCHDOG_USEC": "3000000"}, 1.5),
        ({"WATCHDOG_USEC": "3000000", "WATCHDOG_PID": str(os.getpid())}, 1.5),
        ({"WATCHDOG_USEC": "3000000", "WATCHDOG_PID": "1"}, None),
    ],
)
def test_half_of_watchdog_usec_is_the_interval(environment, interval, caplog):
    assert watchdog_interval(environment) == interval and caplog.messages == []


@pytest.mark.parametrize("usec", ["soon", "-5", "1", "9" * 17])
def test_watchdog_usec_that_cannot_be_is_one_line(usec, caplog):
    assert watchdog_interval({"WATCHDOG_USEC": usec}) is None
    (line,) = caplog.messages
    assert "there is no watchdog" in line


def test_watchdog_tells_as_long_as_nothing_is_stuck(notifier, manager, caplog):
    stuck, asked = [], threading.Event()

    def look(timeout):
        asked.set()
        return stuck[0] if stuck else None

    watchdog = Watchdog(notifier, 0.02, look)
    watchdog.start()
    assert [manager.hear(), manager.hear()] == ["WATCHDOG=1"] * 2
    stuck.append("the listener of port 443")
    deadline = time.monotonic() + TIMEOUT
    while not caplog.messages:
        assert time.monotonic() < deadline
        asked.clear()
        assert asked.wait(TIMEOUT)
    assert "the listener of port 443 has not responded" in caplog.messages[0]
    stuck.clear()
    assert manager.hear() == "WATCHDOG=1"
    watchdog.stop()
