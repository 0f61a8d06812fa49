"""Public ports of their own, for hostnames in tcp mode whose agents ask for one.

Which ports agents may have is the operator's choice (TCP_PORTS). A port belongs to one tunnel, and
is free again as soon as that one's session ends or its agent leaves.
"""

import threading
import zlib

from gotunnel import ANY_PORT
from gotunnel_agent.common.hostnames import MAX_PORT

from ..net.listener import PortError


class PortRefused(Exception):
    """A port cannot be given; the text is for the agent's operator. ``for_now``: it may be
    given later, though nobody changes anything."""

    def __init__(self, text, for_now=False):
        super().__init__(text)
        self.for_now = for_now


class Ports:
    """The ports that are open. Any thread."""

    def __init__(self, allowed, listen, most=MAX_PORT, named=frozenset):
        """``allowed``: ranges of numbers, of which ``most`` are open at a time. ``listen(port,
        route)`` opens one, and gives a port.TcpPort or raises PortError. ``named()`` gives
        the numbers that the operator has meant for some agent."""
        self._allowed = allowed
        self._listen = listen
        self._most = most
        self._named = named
        self._asked = set()  # allowed numbers that an agent has asked for as such
        self._open = {}  # port: (tunnel, TcpPort)
        self._last = {}  # port: the hostname that it led to last, so that it can have it again
        # Guards these three, and is held while a port opens or closes.
        self._lock = threading.Lock()
        self._closed = False

    def open(self, wanted, route, why_not=lambda port: None) -> int:
        """Open the port ``wanted``, a text or ANY_PORT, for a Route; raises PortRefused.
        ``why_not(port)`` says why the agent may not have it, None if it may."""
        with self._lock:
            if self._closed:
                raise PortRefused("the gateway stops")
            if (port := self._passed_on(wanted, route)) is not None:
                return port
            if len(self._open) >= self._most:
                raise PortRefused(f"{self._most} ports are open, as many as the gateway's limit of "
                                  "descriptors permits (ulimit -n)", for_now=True)  # fmt: skip
            for port in self._candidates(wanted, route.hostname, why_not):
                try:
                    opened = self._listen(port, route)
                except PortError as error:
                    problem = PortRefused(f"the gateway cannot open it: {error}", for_now=True)
                    continue
                self._open[port] = (route.tunnel, opened)
                self._last[port] = route.hostname
                return port
        raise problem

    def _passed_on(self, wanted, route):
        """A port that pass_on() has given to the tunnel for that hostname, None if there is none.
        Caller holds the lock."""
        for port, (owner, opened) in self._open.items():
            mine = owner is route.tunnel and self._last[port] == route.hostname
            if mine and wanted in (ANY_PORT, str(port)):
                opened.route = route
                return port
        return None

    def pass_on(self, tunnel, successor):
        """The ports of a tunnel are its successor's, which asks for them again or releases them."""
        with self._lock:
            for port, (owner, opened) in self._open.items():
                if owner is tunnel:
                    self._open[port] = (successor, opened)

    def _candidates(self, wanted, hostname, why_not):
        """The ports that would do, the best first; at least one. Raises PortRefused."""
        if not self._allowed:
            raise PortRefused("this gateway gives agents no ports; its operator sets TCP_PORTS")
        if wanted == ANY_PORT:
            free = [port for ports in self._allowed for port in ports if port not in self._open]
            if not free:
                raise PortRefused(f"all ports are taken ({self._shown()})", for_now=True)
            reason = why_not(free[0])
            free = [port for port in free if why_not(port) is None]
            if not free:
                raise PortRefused(
                    f"none of the free ones is for this agent: {reason}", for_now=True
                )
            meant = self._asked | self._named()
            # The one of last time; else one that no other agent will ask for, nor anybody still
            # look for another hostname at; else one that depends on the hostname alone, so that it
            # has mostly the same after a restart.
            free.sort(key=lambda port: (
                self._last.get(port) != hostname, port in meant, port in self._last,
                zlib.crc32(f"{hostname}:{port}".encode()),
            ))  # fmt: skip
            return free
        number = int(wanted) if wanted.isascii() and wanted.isdigit() and len(wanted) <= 5 else 0
        if not 1 <= number <= MAX_PORT:
            raise PortRefused(f"port {wanted[:20]!r} came, expected 1 to {MAX_PORT} or {ANY_PORT}")
        if not any(number in ports for ports in self._allowed):
            raise PortRefused(f"port {number} is none that agents may have ({self._shown()})")
        if reason := why_not(number):
            raise PortRefused(reason)
        self._asked.add(number)
        if number in self._open:
            raise PortRefused(f"port {number} is taken", for_now=True)
        return [number]

    def _shown(self):
        return "TCP_PORTS: " + ", ".join(
            f"{ports[0]}-{ports[-1]}" if len(ports) > 1 else str(ports[0])
            for ports in self._allowed
        )

    def release(self, tunnel):
        """Close the ports of a tunnel; visits that run go on."""
        self.keep_only(tunnel, ())

    def keep_only(self, tunnel, numbers):
        """Close the ports of a tunnel, but for those ``numbers``."""
        with self._lock:
            for port, (owner, opened) in list(self._open.items()):
                if owner is tunnel and port not in numbers:
                    del self._open[port]
                    opened.stop()

    def close(self):
        """Close all of them, for good."""
        with self._lock:
            self._closed = True
            for _, opened in self._open.values():
                opened.stop()
            self._open.clear()
