"""Opens the ports of a gateway, each with a Listener."""

from __future__ import annotations

import socket
from collections.abc import Sequence
from typing import Protocol

from .net.listener import Address, Listener, Parkable, PortError, bind
from .net.round_robin import FairWorkers
from .net.shares import Places, Seat


class Connections(Protocol):
    """What takes the connections of a port: newcomer.Newcomers, or one of visitors/port.py."""

    listener: Listener

    def welcome(self, sock: socket.socket, address: Address, seat: Seat, /) -> Parkable | None:
        """See Listener."""


class Listeners:
    """The listeners that start and stop with the gateway. open() makes others, too."""

    def __init__(self, addresses: Sequence[str], workers: FairWorkers):
        """``addresses``: IP addresses to bind, none for all. ``workers`` run the connections'
        steps."""
        self._addresses = addresses
        self._workers = workers
        self._all: list[Listener] = []

    def add(
        self,
        setting: str,
        port: int,
        connections: Connections,
        places: Places,
        first_timeout: float,
        addresses: Sequence[str] | None = None,
    ) -> int:
        """Open a port, and return its number. Arguments as for open(). Raises PortError."""
        listener = self.open(setting, port, connections, places, first_timeout, addresses)
        self._all.append(listener)
        return listener.port

    def open(
        self,
        setting: str,
        port: int,
        connections: Connections,
        places: Places,
        first_timeout: float,
        addresses: Sequence[str] | None = None,
    ) -> Listener:
        """Open ``port``, 0 for any free one. ``connections`` gets the ``listener`` and welcomes its
        connections; ``places`` and ``first_timeout`` (seconds): see Listener. ``addresses`` replace
        those of all ports. Raises PortError, which names ``setting``."""
        sockets = bind(setting, self._addresses if addresses is None else addresses, port)
        name = setting.removesuffix("_PORT").lower() if setting.endswith("_PORT") else str(port)
        try:
            listener = Listener(
                name, sockets, connections.welcome, self._workers, places, first_timeout
            )
        except OSError as error:  # no descriptor is left
            for sock in sockets:
                sock.close()
            raise PortError(f"{setting} {port}: {error.strerror}") from None
        connections.listener = listener
        return listener

    def start(self) -> None:
        for listener in self._all:
            listener.start()

    def stop(self) -> None:
        """Accept no further connections, and close the parked ones."""
        for listener in self._all:
            listener.stop()
