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
from .routes import Route
from .visitors.counts import Counts

PROGRAM = "gotunnel-server"
SETTING = "STATUS_SOCKET"
# Entries of each list in an answer (sessions, hostnames, certificates), some 300 bytes each. The
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
        self._socket = (
            None if path is None else StatusSocket(str(path), PROGRAM, self._tell, SETTING)
        )
        if self._socket is not None:
            self._socket.start()

    def close(self) -> None:
        if self._socket is not None:
            self._socket.close()

    def _tell(self) -> dict[str, object]:
        gateway = self._gateway
        state = "draining" if self.draining else SERVING
        return {"state": state, **describe(
            gateway.tunnels.registered(), gateway.own_names, gateway.keeper.state,
            gateway.recording.counts,
        )}  # fmt: skip


def describe(
    tunnels: Sequence[Tunnel],
    own_names: Iterable[str],
    certificate_state: Callable[[str], State],
    counts: Counts | None = None,
    now: Callable[[], float] = time,
) -> dict[str, object]:
    """The gateway's part of the answer. ``certificate_state(hostname)``: as Keeper.state().
    ``counts``: of visits; None if nothing counts them."""
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
    routes = sorted(
        ((name, route) for tunnel in tunnels for name, route in tunnel.routes.items()),
        key=lambda pair: pair[0],  # while an agent's second session takes over, a name comes twice
    )
    hostnames = [
        {
            "hostname": name,
            "mode": route.mode,
            "protocol": route.protocol,
            "port": route.port,
            "agent": on_one_line(route.tunnel.agent.identity.name, MOST_REASON),
            **_of_hostname(route, counts),
        }
        for name, route in routes[:MOST_LISTED]
    ]
    names = list(dict.fromkeys((*own_names, *(name for name, _ in routes))))
    certificates = [
        _certificate(name, certificate_state(name), now) for name in names[:MOST_LISTED]
    ]
    return {
        "visits": {"running": sum(usage.visits for usage in usages), **_of_all(counts)},
        "sessions_total": len(tunnels),
        "hostnames_total": len(routes),
        "certificates_total": len(names),
        "sessions": sessions,
        "hostnames": hostnames,
        "certificates": certificates,
    }


def _of_hostname(route: Route, counts: Counts | None) -> dict[str, int]:
    if counts is None:  # then the visits in tcp mode that did not reach their target are known
        return {"failed_visits": route.tunnel.failed[route.hostname]}  # type: ignore[attr-defined]
    count = counts[route.hostname]
    return {"visits": count.visits, "failed_visits": count.failed}


def _of_all(counts: Counts | None) -> dict[str, int]:
    """The visits that have ended, and their bytes; nothing if nothing counts them."""
    if counts is None:
        return {}
    found = counts.all().values()
    return {
        "ended": sum(count.visits for count in found),
        "failed": sum(count.failed for count in found),
        "received_bytes": sum(count.received for count in found),
        "sent_bytes": sum(count.sent for count in found),
    }


def _certificate(name: str, state: State, now: Callable[[], float]) -> dict[str, object]:
    return {
        "hostname": name,
        "state": state.name.value,
        "days_left": None if state.ends_at is None else int((state.ends_at - now()) // DAY),
        "next_order_at": None if state.next_at is None else int(state.next_at),
        "reason": on_one_line(state.reason, MOST_REASON),
    }
