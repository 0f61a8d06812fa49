"""Opens an agent's public port (TCP_PORTS) in one of several processes.

An agent has a session with each process, and asks each for its port. With SO_REUSEPORT the kernel
would let two processes open one port for two hostnames. So the supervisor is asked first which
hostname has the port (shared_state.py).
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any, Protocol

from ..net.listener import PortError
from .shared_state import GIVE_PORT, TAKE_PORT


class OpenPort(Protocol):
    """A visitors.port.TcpPort."""

    route: Any

    def stop(self) -> None: ...


class Caller(Protocol):
    """What is needed of a child.Child."""

    def call(self, name: str, *arguments: Any) -> Any: ...


class SharedPort:
    """A port that is open here, and may be at other processes, for the same hostname."""

    def __init__(self, number: int, port: OpenPort, caller: Caller) -> None:
        self._number, self._port, self._caller = number, port, caller

    @property
    def route(self) -> Any:
        return self._port.route

    @route.setter
    def route(self, route: Any) -> None:
        self._port.route = route

    def stop(self) -> None:
        self._port.stop()
        with contextlib.suppress(OSError):  # the supervisor has ended, and its table with it
            self._caller.call(GIVE_PORT, self._number)


def opener(
    listen: Callable[[int, Any], OpenPort], caller: Caller
) -> Callable[[int, Any], SharedPort]:
    """``listen`` opens a port for a Route, or raises PortError; so does the function returned."""

    def open_port(number: int, route: Any) -> SharedPort:
        try:
            problem = caller.call(TAKE_PORT, number, route.hostname)
        except OSError as error:
            problem = str(error)
        if problem:
            raise PortError(f"TCP_PORTS {number}: {problem}")
        try:
            return SharedPort(number, listen(number, route), caller)
        except BaseException:
            with contextlib.suppress(OSError):
                caller.call(GIVE_PORT, number)
            raise

    return open_port
