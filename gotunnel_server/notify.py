"""Tells systemd the gateway's state (sd_notify(3)), in datagrams to the socket in NOTIFY_SOCKET.

    READY=1                  it serves
    RELOADING=1              it reads again what may have changed, or hands over to a successor
    MAINPID=NUMBER           the successor is the service's main process from now on
    STOPPING=1               it drains and ends
    WATCHDOG=1               its listeners respond; sent twice in WATCHDOG_USEC

Without NOTIFY_SOCKET nothing is sent.
"""

from __future__ import annotations

import logging
import os
import socket
import threading
from collections.abc import Callable, Mapping
from time import monotonic, monotonic_ns
from typing import Protocol

from gotunnel import spawn
from gotunnel_agent.common.one_line import on_one_line

log = logging.getLogger("gotunnel.notify")

# Seconds to wait while systemd does not read its socket: it is busy, and reads soon.
SEND_TIMEOUT = 5
# Microseconds of WATCHDOG_USEC. With less than the first, systemd would restart a gateway that is
# merely busy. More than the second, a month, is a typing error.
LEAST_WATCHDOG, MOST_WATCHDOG = 100_000, 31 * 24 * 3600 * 1_000_000
MOST_ADDRESS = 107  # bytes of a unix socket's address (sun_path, unix(7)), without the last 0
MOST_SHOWN = 64  # characters of a bad value that the log shows


class Notifier:
    """Sends to systemd; does nothing, and is false, without NOTIFY_SOCKET. Any thread."""

    def __init__(self, environment: Mapping[str, str]) -> None:
        self._address = _address(environment.get("NOTIFY_SOCKET", ""))
        self._failed = False  # a failure was logged

    def __bool__(self) -> bool:
        return self._address is not None

    def tell(self, *lines: str) -> None:
        """Send assignments in one datagram, such as READY=1."""
        if self._address is None:
            return
        try:
            with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
                sock.settimeout(SEND_TIMEOUT)
                sock.sendto("\n".join(lines).encode(), self._address)
        except OSError as error:
            level = logging.DEBUG if self._failed else logging.WARNING
            self._failed = True
            log.log(level, "NOTIFY_SOCKET: sending %s failed: %s; the gateway goes on", lines[0],
                    error.strerror or error)  # fmt: skip

    def tell_reloading(self) -> None:
        """READY=1 has to follow."""
        self.tell("RELOADING=1", f"MONOTONIC_USEC={monotonic_ns() // 1000}")


def _address(text: str) -> str | bytes | None:
    if not text:
        return None
    if text[0] not in "/@" or len(os.fsencode(text)) > MOST_ADDRESS:
        log.warning("NOTIFY_SOCKET is %s, expected the path of a unix socket, or @NAME: systemd is "
                    "told nothing", on_one_line(repr(text), MOST_SHOWN))  # fmt: skip
        return None
    return b"\0" + os.fsencode(text[1:]) if text[0] == "@" else text  # @: an abstract name


def watchdog_interval(environment: Mapping[str, str]) -> float | None:
    """Seconds between two WATCHDOG=1 (sd_watchdog_enabled(3)); None if systemd does not watch this
    process."""
    text = environment.get("WATCHDOG_USEC", "").strip()
    pid = environment.get("WATCHDOG_PID", "").strip()
    if not text or pid not in ("", str(os.getpid())):
        return None
    usec = int(text) if text.isascii() and text.isdigit() and len(text) <= 18 else 0
    if not LEAST_WATCHDOG <= usec <= MOST_WATCHDOG:
        log.warning("WATCHDOG_USEC is %s, expected microseconds from %d to %d: there is no "
                    "watchdog", on_one_line(repr(text), MOST_SHOWN), LEAST_WATCHDOG,
                    MOST_WATCHDOG)  # fmt: skip
        return None
    return usec / 2 / 1_000_000


class Tells(Protocol):
    """What a Watchdog needs of a Notifier."""

    def tell(self, *lines: str) -> None: ...


class Watchdog:
    """Thread "watchdog": sends WATCHDOG=1 as long as all listeners respond."""

    def __init__(
        self, notifier: Tells, interval: float, stuck: Callable[[float], str | None]
    ) -> None:
        """Start the thread, which waits for start(). ``stuck(timeout)`` names a part that does not
        respond in ``timeout`` seconds, or returns None. Raises NoThread."""
        self._notifier = notifier
        self._interval = interval
        self._stuck = stuck
        self._begun, self._over = threading.Event(), threading.Event()
        spawn("watchdog", self._run)

    def start(self) -> None:
        self._begun.set()

    def stop(self) -> None:
        """Tell systemd nothing any more."""
        self._over.set()
        self._begun.set()

    def _run(self) -> None:
        self._begun.wait()
        said = False
        while not self._over.is_set():
            began = monotonic()
            # Half an interval, so that a merely slow listener has a second chance before systemd
            # misses a WATCHDOG=1.
            stuck = self._stuck(self._interval / 2)
            if stuck is None:
                self._notifier.tell("WATCHDOG=1")
                said = False
            elif not said:
                said = True
                log.error("%s has not responded for %.1f s: systemd gets no WATCHDOG=1, and will "
                          "restart the gateway if that goes on", stuck,
                          self._interval / 2)  # fmt: skip
            self._over.wait(max(0, began + self._interval - monotonic()) if stuck is None else 0.1)
