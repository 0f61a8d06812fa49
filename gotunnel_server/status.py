"""What the gateway answers on its status socket."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from time import time

from gotunnel_agent.common.one_line import on_one_line
from gotunnel_agent.common.show_status import SERVING
from gotunnel_agent.common.status_socket import StatusSocket

from .agents.tunnel import Tunnel
from .certs.state import State
from .gateway import Gateway

PROGRAM = "gotunnel-server"
# Of sessions, hostnames and certificates, as many are listed in an answer, some 300 bytes each. The
# totals count all.
MOST_LISTED = 1000
MOST_REASON = 500  # characters
DAY = 86400


class Status:
    """The status socket of a running gateway."""

    def __init__(self, gateway: Gateway, path: Path | None):
        """Answers at ``path`` from now on; None: nowhere."""
        self.draining = False
        self._gateway = gateway
        self._socket = None if path is None else StatusSocket(str(path), PROGRAM, self._tell)
        if self._socket is not None:
            self._socket.start()

    def close(self) -> None:
        if self._socket is not None:
            self._socket.close()

    def _tell(self) -> dict[str, object]:
        gateway = self._gateway
        state = "draining" if self.draining else SERVING
        return {"state": state, **describe(
            gateway.tunnels.registered(), gateway.own_names, gateway.keeper.state
        )}  # fmt: skip


def describe(
    tunnels: Sequence[Tunnel],
    own_names: Iterable[str],
    certificate_state: Callable[[str], State],
    now: Callable[[], float] = time,
) -> dict[str, object]:
    """The gateway's part of the answer. ``certificate_state(hostname)``: as Keeper.state()."""
    usages = [tunnel.usage() for tunnel in tunnels[:MOST_LISTED]]
    sessions = [
        {
            "agent": on_one_line(tunnel.identity.name, MOST_REASON),
            "address": tunnel.agent.host,
            "connected_seconds": int(now() - tunnel.since),
            "hostnames": len(tunnel.routes),
            "visits": usage.visits,
            "streams": usage.streams,
        }
        for tunnel, usage in zip(tunnels, usages)
    ]
    routes = sorted((name, route) for tunnel in tunnels for name, route in tunnel.routes.items())
    hostnames = [
        {
            "hostname": name,
            "mode": route.mode,
            "port": route.port,
            "agent": on_one_line(route.tunnel.agent.identity.name, MOST_REASON),
            "failed_visits": route.tunnel.failed[route.hostname],  # type: ignore[attr-defined]
        }
        for name, route in routes[:MOST_LISTED]
    ]
    names = list(dict.fromkeys((*own_names, *(name for name, _ in routes))))
    certificates = [
        _certificate(name, certificate_state(name), now) for name in names[:MOST_LISTED]
    ]
    return {
        "visits": {"running": sum(usage.visits for usage in usages)},
        "sessions_total": len(tunnels),
        "hostnames_total": len(routes),
        "certificates_total": len(names),
        "sessions": sessions,
        "hostnames": hostnames,
        "certificates": certificates,
    }


def _certificate(name: str, state: State, now: Callable[[], float]) -> dict[str, object]:
    return {
        "hostname": name,
        "state": state.name.value,
        "days_left": None if state.ends_at is None else int((state.ends_at - now()) // DAY),
        "next_order_at": None if state.next_at is None else int(state.next_at),
        "reason": on_one_line(state.reason, MOST_REASON),
    }
