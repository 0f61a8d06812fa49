"""Opens public ports for hostnames in tcp mode whose agents ask for one.

The operator decides which ports agents may have (TCP_PORTS). A port belongs to one tunnel, and is
free again as soon as the tunnel's session ends or its agent leaves. The agents of a pool have the
port together: the last one that leaves frees it.
"""

from __future__ import annotations

import threading
import zlib
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Protocol

from gotunnel import ANY_PORT
from gotunnel_agent.common.hostnames import MAX_PORT, normal_hostname
from gotunnel_agent.common.one_line import some

from ..net.listener import PortError
from ..routes import Route, Tunnel


class PortRefused(Exception):
    """A tunnel does not get a port; the text is for the agent's operator. ``for_now``: a later try
    may succeed by itself."""

    def __init__(self, text: str, for_now: bool = False):
        super().__init__(text)
        self.for_now = for_now


class OpenPort(Protocol):
    """What Ports needs of visitors/port.py's TcpPort."""

    route: Route  # of its visitors; may be replaced

    def stop(self) -> None:
        """Close the port; visits that run go on."""


class Ports:
    """The ports that are open. Any thread."""

    def __init__(
        self,
        allowed: Sequence[range],
        listen: Callable[[int, Route], OpenPort],
        most: int = MAX_PORT,
        named: Callable[[], frozenset[int]] = frozenset,
    ):
        """At most ``most`` ports of the ranges ``allowed`` are open at a time. ``listen(port,
        route)`` opens one, or raises PortError. ``named()`` gives the ports that AGENTS_FILE names
        one by one: another agent that asks for any port gets them last."""
        self._allowed = allowed
        self._listen = listen
        self._most = most
        self._named = named
        self._asked: set[int] = set()  # allowed ports that an agent has asked for by number
        # By port: the tunnels that have it, several if they are in a pool.
        self._open: dict[int, tuple[set[Tunnel], OpenPort]] = {}
        self._last: dict[int, str] = {}  # the hostname that had a port last, to get it again
        # Guards these three, and is held while a port opens or closes.
        self._lock = threading.Lock()
        self._closed = False

    def open(
        self, wanted: str, route: Route, why_not: Callable[[int], str | None] = lambda port: None
    ) -> int:
        """Open a port for a Route; ``wanted`` is its number as text, or ANY_PORT. ``why_not(port)``
        says why the agent may not have a port; None if it may. Raises PortRefused."""
        with self._lock:
            if self._closed:
                raise PortRefused("the gateway stops")
            if (port := self._passed_on(wanted, route)) is not None:
                return port
            if (port := self._shared(wanted, route, why_not)) is not None:
                return port
            if len(self._open) >= self._most:
                raise PortRefused(f"{self._most} ports are open, as many as the gateway's limit of "
                                  "descriptors permits (ulimit -n)", for_now=True)  # fmt: skip
            problem = ""
            for port in self._candidates(wanted, route.hostname, why_not):
                try:
                    opened = self._listen(port, route)
                except PortError as error:
                    problem = str(error)
                    continue
                self._open[port] = ({route.tunnel}, opened)
                self._last[port] = route.hostname
                return port
        raise PortRefused(f"the gateway cannot open it: {problem}", for_now=True)

    def _passed_on(self, wanted: str, route: Route) -> int | None:
        """A port that pass_on() has given to the tunnel for that hostname; None if there is none.
        Caller holds the lock."""
        for port, (owners, opened) in self._open.items():
            mine = route.tunnel in owners and self._last[port] == route.hostname
            if mine and wanted in (ANY_PORT, str(port)):
                opened.route = route
                return port
        return None

    def _shared(
        self, wanted: str, route: Route, why_not: Callable[[int], str | None]
    ) -> int | None:
        """The port that other agents of the hostname's pool have; None if there is none. Caller
        holds the lock."""
        if route.pool is None:
            return None
        for port, (owners, opened) in self._open.items():
            pool = opened.route.pool
            same = pool is not None and pool.owner == route.pool.owner
            if same and normal_hostname(opened.route.hostname) == normal_hostname(route.hostname):
                if wanted in (ANY_PORT, str(port)) and why_not(port) is None:
                    owners.add(route.tunnel)
                    return port
        return None

    def pass_on(self, tunnel: Tunnel, successor: Tunnel) -> None:
        """Make a tunnel's ports its successor's, which asks for them again or releases them."""
        with self._lock:
            for owners, _ in self._open.values():
                if tunnel in owners:
                    owners.remove(tunnel)
                    owners.add(successor)

    def _candidates(
        self, wanted: str, hostname: str, why_not: Callable[[int], str | None]
    ) -> list[int]:
        """The ports that fit, the best first; at least one. Raises PortRefused."""
        if not self._allowed:
            raise PortRefused(
                "this gateway gives agents no public ports; its operator has to set TCP_PORTS"
            )
        if wanted == ANY_PORT:
            free = [port for ports in self._allowed for port in ports if port not in self._open]
            if not free:
                raise PortRefused(f"all ports are taken ({self._shown()})", for_now=True)
            reason = why_not(free[0])
            free = [port for port in free if why_not(port) is None]
            if not free:
                raise PortRefused(
                    f"none of the free ports is for this agent: {reason}", for_now=True
                )
            meant = self._asked | self._named()
            # Best is the hostname's port of last time; then one that is meant for no other agent;
            # then one that had no other hostname, whose visitors may still come; then the first by
            # a hash of the hostname, so that it mostly gets the same port after a restart.
            free.sort(key=lambda port: (
                self._last.get(port) != hostname, port in meant, port in self._last,
                zlib.crc32(f"{hostname}:{port}".encode()),
            ))  # fmt: skip
            return free
        number = int(wanted) if wanted.isascii() and wanted.isdigit() and len(wanted) <= 5 else 0
        if not 1 <= number <= MAX_PORT:
            raise PortRefused(f"port {wanted[:20]!r} came, expected 1 to {MAX_PORT} or {ANY_PORT}")
        if not any(number in ports for ports in self._allowed):
            raise PortRefused(f"agents may not have port {number} ({self._shown()})")
        if reason := why_not(number):
            raise PortRefused(reason)
        self._asked.add(number)
        if number in self._open:
            raise PortRefused(f"port {number} is taken", for_now=True)
        return [number]

    def _shown(self) -> str:
        return "TCP_PORTS: " + some(
            f"{ports[0]}-{ports[-1]}" if len(ports) > 1 else str(ports[0])
            for ports in self._allowed
        )

    def release(self, tunnel: Tunnel) -> None:
        """Close the ports of a tunnel; visits that run go on."""
        self.keep_only(tunnel, ())

    def keep_only(self, tunnel: Tunnel, numbers: Collection[int]) -> None:
        """Close the ports of a tunnel except ``numbers``."""
        with self._lock:
            for port, (owners, opened) in list(self._open.items()):
                if tunnel in owners and port not in numbers:
                    owners.remove(tunnel)
                    if not owners:
                        del self._open[port]
                        opened.stop()

    def close(self) -> None:
        """Open no further ports. Those that are open stop as all listeners do."""
        with self._lock:
            self._closed = True

    def hostnames(self) -> dict[int, str]:
        """The ports that are open, and the hostname of each."""
        with self._lock:
            return {port: self._last[port] for port in self._open}

    def remember(self, hostnames: Mapping[int, str]) -> None:
        """Take over a predecessor's hostnames(), so that each hostname gets its port again."""
        with self._lock:
            self._last.update(hostnames)
