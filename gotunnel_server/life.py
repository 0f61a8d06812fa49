"""The life of the gateway's process: its sockets, its signals, and what systemd is told.

SIGTERM, SIGINT    drain and end; the second one ends at once
SIGHUP             read again what may have changed
SIGUSR2            hand over to a successor (handover.py), then drain and end
"""

from __future__ import annotations

import logging
import signal
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from gotunnel import NoThread, spawn
from gotunnel_agent.common.process import HANG_UP, Signals

from .gateway import Gateway
from .handover import HandOver, Predecessor, why_not_here
from .net.inherited import Given, Inherited, of_systemd
from .notify import Notifier, Watchdog, watchdog_interval
from .status import Status

log = logging.getLogger("gotunnel.life")

HAND_OVER = signal.SIGUSR2
# The settings whose ports may be inherited: names in LISTEN_FDNAMES.
PORTS = ("GATEWAY_PORT", "TUNNEL_PORT", "HTTP_PORT", "DASHBOARD_PORT", "METRICS_PORT", "TCP_PORTS")
# Seconds that a successor keeps an agent's public port listening before that agent has come back:
# our agents come at once, others within 30 s (agent.MAX_DELAY).
CLAIM_TIME = 30


class Life:
    """inherit(), then run(). Main thread only."""

    def __init__(self, environment: Mapping[str, str], predecessor: Predecessor | None) -> None:
        """``environment``: that of the process. ``predecessor``: the gateway that has started
        it to hand over; None if there is none."""
        self._environment = environment
        self._predecessor = predecessor
        self._signals = Signals(hang_up=True, also=(HAND_OVER,))
        self._notifier = Notifier(environment)
        self._inherited = Inherited()

    def inherit(self) -> Inherited:
        """The listening sockets that this process was given. Raises Contradiction."""
        given: Sequence[Given]
        if self._predecessor is not None:
            given = self._predecessor.sockets
        else:
            given = of_systemd(self._environment, PORTS)
        self._inherited = Inherited(given)
        return self._inherited

    def run(
        self,
        gateway: Gateway,
        tcp_ports: Sequence[range],
        status_socket: Path | None,
        reload: Callable[[], object],
    ) -> None:
        """Start a gateway, and stop it when a signal says so. Raises PortError, NoThread, Failed.
        ``tcp_ports``: those that agents may ask for. ``status_socket``: see Status. ``reload()`` is
        called on SIGHUP, and does not wait."""
        self._inherited.close_unfit(tcp_ports)
        interval = watchdog_interval(self._environment)
        watchdog = None
        if interval is not None and self._notifier:
            watchdog = Watchdog(self._notifier, interval, gateway.listeners.stuck)
        if self._predecessor is None:
            gateway.start()
        else:
            gateway.inherit(self._predecessor.await_go())
            gateway.start(self._predecessor.await_end)
            self._await_claims()
        self._notifier.tell("READY=1")
        if watchdog is not None:
            watchdog.start()
        status = Status(gateway, status_socket)
        successor = self._serve(gateway, reload)
        status.draining = True
        if successor is not None:
            if watchdog is not None:
                watchdog.stop()  # the successor tells systemd from now on
            status.close()  # its path is the successor's now
            self._notifier.tell(f"MAINPID={successor.successor}")
            gateway.stop_accepting()
            successor.release()
        else:
            self._notifier.tell("STOPPING=1")
            log.info("stopping; a second signal stops at once")
        gateway.stop()
        status.close()
        if watchdog is not None:
            watchdog.stop()

    def _await_claims(self) -> None:
        """An agent that comes back claims its public port again. Start the thread that closes the
        ports that are not claimed within CLAIM_TIME."""
        if not self._inherited.left():
            return
        try:
            spawn("unclaimed ports", self._inherited.close_unclaimed_after, CLAIM_TIME)
        except NoThread as error:
            log.warning("ports whose agents do not come back stay open: %s", error)

    def _serve(self, gateway: Gateway, reload: Callable[[], object]) -> HandOver | None:
        """Act on signals until one ends the gateway. Returns the HandOver if it has succeeded."""
        current: HandOver | None = None
        while True:
            number = self._signals.wait()
            if number == HANG_UP:
                self._notifier.tell_reloading()
                reload()
                self._notifier.tell("READY=1")
            elif number == HAND_OVER:
                if current is not None:
                    log.warning("SIGUSR2: a hand-over is under way; this signal is ignored")
                else:
                    current = self._begin(gateway)
            elif number == 0:  # HandOver.run() has returned
                if current is not None and current.successor is not None:
                    return current
                current = None
                self._notifier.tell("READY=1")
            # SIGTERM or SIGINT. A successor that serves already takes over all the same.
            elif current is None or current.cancel():
                return None
            else:
                return current

    def _begin(self, gateway: Gateway) -> HandOver | None:
        why_not = why_not_here()
        if why_not is None:
            handover = HandOver(gateway, self._environment)
            try:
                spawn("hand-over", self._signals.after, handover.run)
                self._notifier.tell_reloading()
                return handover
            except NoThread as error:
                why_not = str(error)
        log.error("hand-over refused: %s; this gateway serves on", why_not)
        return None
