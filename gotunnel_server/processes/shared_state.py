"""What the children share, kept by the supervisor: the claims of hostnames (board.py), and which
hostname has which public port of TCP_PORTS.

With SO_REUSEPORT the kernel lets two children open one port for two hostnames, and visitors would
reach either at random. So a child asks here before it opens a port.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from .board import TableOfChildren
from .channel import Message

TAKE_PORT, GIVE_PORT = "take port", "give port"


class SharedState:
    """Answers the children's calls; holds no child up. One thread."""

    def __init__(self, now: Callable[[], float]) -> None:
        """``now()``: monotonic seconds."""
        self._board = TableOfChildren(now)
        self._ports: dict[int, tuple[str, set[int]]] = {}  # hostname, ids of the children
        self._calls: dict[str, Callable[..., Any]] = {
            TAKE_PORT: self._take_port,
            GIVE_PORT: self._give_port,
            **self._board.calls,
        }

    def call(self, id: int, name: str, arguments: Any) -> Message:
        """The answer to a call of the child's process ``id``: {"result": ...} or {"error":
        TEXT}."""
        function = self._calls.get(name)
        if function is None or not isinstance(arguments, list):
            return {"error": f"there is no {name[:40]!r} here"}
        try:
            return {"result": function(id, *arguments)}
        except (TypeError, ValueError) as error:
            return {"error": str(error)[:200]}

    def messages(self) -> Iterator[tuple[int, Any]]:
        """What the calls have for other children: (id, message)."""
        messages, self._board.messages = self._board.messages, []
        return iter(messages)

    def gone(self, id: int) -> None:
        """A child's process has ended."""
        self._board.gone(id)
        for port, (_, holders) in list(self._ports.items()):
            holders.discard(id)
            if not holders:
                del self._ports[port]

    def _take_port(self, id: int, port: int, hostname: str) -> str:
        """Take a port for a hostname. Returns why it cannot be had now, "" if it can."""
        holder, holders = self._ports.get(port, (hostname, set()))
        if holder != hostname:
            return f"{holder} has it at another process"
        for other, (name, having) in self._ports.items():
            # All processes are to open the same port for a hostname: its agent may have asked for
            # any, and each process might choose another one.
            if name == hostname and other != port and having - {id}:
                return f"{hostname} has port {other} at another process"
        holders.add(id)
        self._ports[port] = (hostname, holders)
        return ""

    def _give_port(self, id: int, port: int) -> None:
        if port in self._ports:
            holders = self._ports[port][1]
            holders.discard(id)
            if not holders:
                del self._ports[port]
