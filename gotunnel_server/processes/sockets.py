"""Opens the ports of all children, and keeps them: a child that is restarted, or renewed, finds the
connections that wait.

    SO_REUSEPORT    GATEWAY_PORT, TUNNEL_PORT, HTTP_PORT: each child has a socket of its own, and
                    the kernel spreads connections evenly among them, by a hash of both addresses
    one socket      DASHBOARD_PORT, METRICS_PORT and the status socket: little load, and any child
                    can answer for all. All children accept from it
    systemd's       are what they are: all children accept from them

The ports that agents ask for (TCP_PORTS) are opened by the children.
"""

from __future__ import annotations

import contextlib
import logging
import os
import socket
from collections.abc import Iterator, Sequence
from time import sleep
from typing import NamedTuple

from gotunnel_agent.common import status_socket

from ..config import Config
from ..net.inherited import Given, Inherited
from ..net.listener import PortError, bind

log = logging.getLogger("gotunnel.sockets")

SPREAD = ("TUNNEL_PORT", "GATEWAY_PORT", "HTTP_PORT")
STATUS_SOCKET = "STATUS_SOCKET"
# Processes whose supervisor was killed have the status socket for a moment longer, in which the
# next supervisor may start: tries, and seconds between them.
STATUS_TRIES, STATUS_WAIT = 20, 0.1


class Port(NamedTuple):
    """A setting's port, as the configuration has it. ``number``: 0 for any free one."""

    setting: str
    number: int
    addresses: tuple[str, ...]


class Opened(NamedTuple):
    port: Port
    # By child; one entry for all of them, if they share it.
    sockets: tuple[tuple[socket.socket, ...], ...]
    by_systemd: bool

    def of(self, number: int) -> Sequence[socket.socket]:
        return self.sockets[(number - 1) % len(self.sockets)]

    def close(self) -> None:
        for sockets in self.sockets:
            for sock in sockets:
                sock.close()


class Sockets:
    """The ports. One thread."""

    def __init__(self, config: Config, count: int, inherited: Inherited) -> None:
        """``inherited``: systemd's sockets. Raises PortError, Contradiction; then nothing stays
        open."""
        self._count = count
        self._opened: dict[Port, Opened] = {}
        self._left: list[Given] = []
        self.status: socket.socket | None = None  # the status socket
        self._status_path, self._status_file = "", (0, 0)
        try:
            for port in ports(config):
                self._opened[port] = self._open(port, inherited)
        except BaseException:
            self.close()
            raise
        inherited.close_unfit(config.tcp_ports)
        # What is left, agents may ask for: systemd's sockets for TCP_PORTS.
        self._left = inherited.left()
        self._open_status(config)

    def _open(self, port: Port, inherited: Inherited) -> Opened:
        found = tuple(bind(port.setting, port.addresses, port.number, inherited))
        if inherited.is_by_systemd(found[0]):
            return Opened(port, (found,), True)
        if port.setting not in SPREAD or not hasattr(socket, "SO_REUSEPORT"):
            return Opened(port, (found,), False)
        # Opened without SO_REUSEPORT first: with it, a port that another program of this user has
        # opened in the same way would not count as in use.
        number = found[0].getsockname()[1]
        for sock in found:
            sock.close()
        spread = Inherited(shares_ports=True)
        sockets: list[tuple[socket.socket, ...]] = []
        try:
            for _ in range(self._count):
                sockets.append(tuple(bind(port.setting, port.addresses, number, spread)))
        except PortError:
            Opened(port, tuple(sockets), False).close()
            raise
        return Opened(port, tuple(sockets), False)

    def _open_status(self, config: Config) -> None:
        if config.status_socket is None:
            return
        path = str(config.status_socket)
        for _ in range(STATUS_TRIES):
            if not os.path.exists(path) or not _is_taken(path):
                break
            sleep(STATUS_WAIT)
        try:
            if config.status_socket.parent == config.acme_cache:  # the first start makes it
                config.acme_cache.mkdir(mode=0o700, parents=True, exist_ok=True)
            self.status = status_socket.listen(status_socket.address(path))
            self._status_path, self._status_file = path, _identity(path)
        except OSError as error:  # a gateway serves without it as well
            log.warning("%s %s: %s; the status command gets no answer from this gateway",
                        STATUS_SOCKET, path, error.strerror or error)  # fmt: skip

    def change(self, config: Config) -> None:
        """Open what a changed configuration asks for, and close what it no longer has. Raises
        PortError; then all is as before."""
        wanted = list(ports(config))
        new: dict[Port, Opened] = {}
        try:
            for port in wanted:
                if port not in self._opened:
                    new[port] = self._open(port, Inherited())
        except PortError:
            for opened in new.values():
                opened.close()
            raise
        for port in self._opened.keys() - set(wanted):
            self._opened.pop(port).close()
        self._opened |= new

    def of(self, number: int) -> list[Given]:
        """The sockets of child ``number``."""
        found = [
            Given(sock, port.setting, opened.by_systemd)
            for port, opened in self._opened.items()
            for sock in opened.of(number)
        ]
        return found + self._left

    def own(self, number: int) -> list[Given]:
        """Those of them that no other child accepts from."""
        return [
            Given(sock, port.setting, False)
            for port, opened in self._opened.items()
            for sock in opened.of(number)
            if len(opened.sockets) > 1
        ]

    def close(self) -> None:
        for opened in self._opened.values():
            opened.close()
        for given in self._left:
            given.sock.close()
        if self.status is not None:
            self.status.close()
            with contextlib.suppress(OSError):
                if _identity(self._status_path) == self._status_file:  # still ours
                    os.unlink(self._status_path)


def _is_taken(path: str) -> bool:
    """Whether a living process listens at the status socket's path."""
    with socket.socket(socket.AF_UNIX) as probe:
        probe.settimeout(STATUS_WAIT)
        try:
            probe.connect(status_socket.address(path))
        except OSError:
            return False
    return True


def _identity(path: str) -> tuple[int, int]:
    found = os.lstat(path)
    return found.st_dev, found.st_ino


def ports(config: Config) -> Iterator[Port]:
    """The ports that are opened at the start, in the order of the gateway's."""
    for setting, number, addresses in (
        ("TUNNEL_PORT", config.tunnel_port, config.bind),
        ("GATEWAY_PORT", config.gateway_port, config.bind),
        ("HTTP_PORT", config.http_port, config.bind),
        ("DASHBOARD_PORT", config.dashboard_port, config.dashboard_bind),
        ("METRICS_PORT", config.metrics_port, config.metrics_bind),
    ):
        if number is not None:
            yield Port(setting, number, addresses)
