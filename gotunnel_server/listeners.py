"""Opens the ports of a gateway, each with a Listener."""

from __future__ import annotations

import contextlib
import socket
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import NamedTuple, Protocol

from .net.inherited import Given, Inherited
from .net.listener import Address, Listener, Parkable, PortError, bind
from .net.round_robin import FairWorkers
from .net.shares import Places, Seat


class Connections(Protocol):
    """Takes a port's connections: newcomer.Newcomers, or a port of visitors/port.py."""

    listener: Listener

    def welcome(self, sock: socket.socket, address: Address, seat: Seat, /) -> Parkable | None:
        """See Listener."""


class PortFigures(NamedTuple):
    """``taken`` of ``most`` places for connections; 0 of 0 if they are another port's. Since the
    start: ``refused`` connections, ``dropped`` ones by reason (net/drops.py), and tries to accept
    one that failed (``starved``)."""

    name: str
    taken: int
    most: int
    refused: int
    dropped: Counter[str]
    starved: int


class Listeners:
    """The listeners of a gateway. Those of add() start and stop with it; the caller of open()
    starts and stops its own."""

    def __init__(self, addresses: Sequence[str], workers: FairWorkers, inherited: Inherited):
        """``addresses``: IP addresses to bind, none for all. ``workers`` run the connections'
        steps. ``inherited``: sockets that the process was given."""
        self._addresses = addresses
        self._workers = workers
        self._inherited = inherited
        self._all: list[Listener] = []
        # All open listeners, with the setting of their ports. Replaced whole (copy on write).
        self._open: dict[Listener, str] = {}
        # By setting: those of listeners that are closed.
        self._refused: dict[str, int] = {}
        self._dropped: dict[str, Counter[str]] = {}
        self._starved: dict[str, int] = {}

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
        addresses = self._addresses if addresses is None else addresses
        sockets = bind(setting, addresses, port, self._inherited)
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
        kept = {other: name for other, name in self._open.items() if not other.stopping}
        for other in self._open.keys() - kept.keys():
            closed = self._open[other]
            self._refused[closed] = self._refused.get(closed, 0) + other.refused
            self._dropped[closed] = self._dropped.get(closed, Counter()) + other.drops.counts()
            self._starved[closed] = self._starved.get(closed, 0) + other.starved
        self._open = {**kept, listener: setting}
        return listener

    def start(self) -> None:
        for listener in self._all:
            listener.start()

    def shared(self) -> Iterator[Given]:
        """Copies of all listening sockets, for a successor; the caller closes them."""
        for listener, setting in self._open.items():
            for sock in listener.sockets:
                with contextlib.suppress(OSError):  # an agent's port, closed in this moment
                    yield Given(sock.dup(), setting, self._inherited.is_by_systemd(sock))
        for given in self._inherited.left():
            with contextlib.suppress(OSError):
                yield given._replace(sock=given.sock.dup())

    def cover(self, given: Sequence[Given]) -> None:
        """Accept the connections of other sockets as well, each at the port of its setting: the
        process that they are for is away."""
        for listener, setting in self._open.items():
            listener.accept_also([each.sock for each in given if each.name == setting])

    def uncover(self, given: Sequence[Given]) -> None:
        """The opposite of cover()."""
        for listener, setting in self._open.items():
            listener.leave_out([each.sock for each in given if each.name == setting])

    def stuck(self, timeout: float) -> str | None:
        """The listener whose thread does not respond in ``timeout`` seconds; None if all do."""
        for listener in self._open:
            if not listener.moves(timeout):
                return f"the listener of port {listener.port}"
        return None

    def taken(self) -> int:
        """How many connections are open."""
        return sum(port.taken for port in self.figures())

    def figures(self) -> list[PortFigures]:
        """For the metrics. The ports of agents are one."""
        found: dict[str, PortFigures] = {}
        seen: list[Places] = []
        for listener, setting in self._open.items():
            taken, most, refused = 0, 0, listener.refused
            if not any(listener.places is places for places in seen):
                seen.append(listener.places)
                taken, most = listener.places.taken, listener.places.most
            name = setting.removesuffix("_PORT").lower()
            gone = PortFigures(
                name, 0, 0, self._refused.get(setting, 0), self._dropped.get(setting, Counter()),
                self._starved.get(setting, 0),
            )  # fmt: skip
            earlier = found.get(name, gone)
            found[name] = PortFigures(
                name, earlier.taken + taken, earlier.most + most, earlier.refused + refused,
                earlier.dropped + listener.drops.counts(), earlier.starved + listener.starved,
            )  # fmt: skip
        return list(found.values())

    def stop_accepting(self, but: str = "") -> None:
        """Accept no further connections, except at the port of the setting ``but``; parked ones are
        still watched."""
        for listener, setting in self._open.items():
            if setting != but:
                listener.stop_accepting()

    def stop(self) -> None:
        """Accept no further connections, and close the parked ones."""
        for listener in self._all:
            listener.stop()
