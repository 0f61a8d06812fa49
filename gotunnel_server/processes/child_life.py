"""The life of a child: what life.py is for a gateway that runs alone.

The supervisor's orders come by the channel, not as signals: systemd and terminals send signals to
all processes, and the second SIGTERM would end a child at once.

    go              accept connections, with what the process before has served
    cover, uncover  accept another child's connections as well, or no longer
    estate          tell what a successor needs
    reload          as SIGHUP
    drain           end in good order: the gateway stops, or a successor serves
    orphaned        the supervisor has ended: drain, or if that is under way, end at once

Signals to a child alone: SIGTERM and SIGINT drain it, and the supervisor starts another one.
"""

from __future__ import annotations

import logging
import os
import queue
import signal
from collections.abc import Callable, Sequence
from pathlib import Path

from gotunnel_agent.common.process import HANG_UP, Signals

from ..gateway import Gateway
from ..handover import read_estate
from ..net.inherited import Inherited
from ..notify import Watchdog
from ..status import Status
from .channel import Message
from .child import Child
from .roster import BEAT

log = logging.getLogger("gotunnel.child_life")

RENEW = signal.SIGUSR2


class Beats:
    """What a Watchdog tells systemd, told to the supervisor."""

    def __init__(self, child: Child) -> None:
        self._child = child

    def tell(self, *lines: str) -> None:
        self._child.say(said="alive")


class ChildLife:
    """inherit(), then run(). Main thread only."""

    def __init__(self, child: Child) -> None:
        self._child = child
        self._signals = Signals(hang_up=True, also=(RENEW,))
        self._orders: queue.SimpleQueue[Message] = queue.SimpleQueue()
        self._ends = False  # it drains, or is to
        self._inherited = child.inherited()

    def inherit(self) -> Inherited:
        """The listening sockets that this process was given."""
        return self._inherited

    def run(
        self,
        gateway: Gateway,
        tcp_ports: Sequence[range],
        status_socket: Path | None,
        reload: Callable[[], object],
    ) -> None:
        """Start a gateway, and stop it when the supervisor or a signal says so. Raises PortError,
        NoThread. The arguments are those of Life.run()."""
        self._inherited.close_unfit(tcp_ports)
        child = self._child
        watchdog = Watchdog(Beats(child), BEAT, gateway.listeners.stuck)
        child.start(self._on_order)
        child.say(said="ready")
        go = self._await_go()
        if go is None:
            return
        if go["estate"] is not None:
            gateway.inherit(read_estate(go["estate"]))
        gateway.start()
        watchdog.start()
        status = Status(gateway, status_socket, child.status, child.together)
        child.say(said="serving")
        stops = self._serve(gateway, reload)
        self._ends = True
        status.draining = True
        if not stops:  # others serve on at all ports, the metrics' too
            status.close()
            gateway.stop_accepting()
        # DRAIN_TIMEOUT: a SIGHUP may have changed it since the supervisor has read it.
        child.say(said="draining", seconds=gateway.drain_timeout)
        gateway.stop()
        status.close()
        watchdog.stop()

    def _on_order(self, order: Message) -> None:
        """The channel's thread."""
        if order["order"] == "orphaned" and self._ends:
            os._exit(1)  # a second signal has ended the supervisor: running visits are cut
        if order["order"] == "drain":
            self._ends = True
        self._signals.after(lambda: self._orders.put(order))

    def _next(self) -> Message | int:
        """The next order, or the number of a signal."""
        number = self._signals.wait()
        return number if number != 0 else self._orders.get()

    def _await_go(self) -> Message | None:
        """The order to go; None if the process is to end instead."""
        while True:
            came = self._next()
            if isinstance(came, int):
                if came in (signal.SIGTERM, signal.SIGINT):
                    return None
            elif came["order"] == "go":
                return came
            elif came["order"] in ("drain", "orphaned"):
                return None

    def _serve(self, gateway: Gateway, reload: Callable[[], object]) -> bool:
        """Act on orders and signals until one ends this process. Returns whether the whole gateway
        stops."""
        child = self._child
        while True:
            came = self._next()
            if came == HANG_UP:
                reload()
            elif came == RENEW:
                log.warning("SIGUSR2 is for the supervisor, process %d, which renews all of its "
                            "processes: nothing is done", child.supervisor)  # fmt: skip
            elif isinstance(came, int):  # SIGTERM, SIGINT
                return False
            elif came["order"] == "reload":
                reload()
            elif came["order"] == "cover":
                gateway.listeners.cover(child.sockets_of(came["number"]))
            elif came["order"] == "uncover":
                gateway.listeners.uncover(child.sockets_of(came["number"]))
            elif came["order"] == "estate":
                child.say(estate=gateway.estate()._asdict())
            elif came["order"] == "drain":
                return bool(came["stops"])
            elif came["order"] == "orphaned":
                log.warning("the supervisor, process %d, has ended: this process drains and ends",
                            child.supervisor)  # fmt: skip
                return False
