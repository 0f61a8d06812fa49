"""What the agent answers on its status socket, and where that socket is."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from time import monotonic
from typing import Any

from .agent import Snapshot
from .common.one_line import on_one_line
from .common.show_status import SERVING
from .common.status_socket import OFF, StatusSocket, runtime_places, usable
from .config import Config, ConfigError, load

PROGRAM = "gotunnel-agent"
MOST_LISTED = 1000  # tunnels in an answer, some 300 bytes each
MOST_REASON = 500  # characters


def describe(snapshot: Snapshot) -> dict[str, object]:
    """The agent's part of the answer."""
    since, routes = snapshot.since, snapshot.routes
    state = "stopping" if snapshot.stopping else SERVING if since is not None else "no session"
    tunnels = [
        {
            "hostname": hostname,
            "mode": route.tunnel.mode,
            "target": str(route.tunnel.target),
            "served": since is not None and not route.problem,
            "certificate": snapshot.certificates.get(hostname, "").partition(":")[0],
            "reason": on_one_line(
                route.problem or snapshot.certificates.get(hostname, "").partition(": ")[2],
                MOST_REASON,
            ),
        }
        for hostname, route in list(routes.items())[:MOST_LISTED]
    ]
    return {
        "state": state,
        "gateway": snapshot.gateway,
        "connected_seconds": None if since is None else int(monotonic() - since),
        "problem": on_one_line(snapshot.problem, MOST_REASON),
        "old_sessions": snapshot.old_sessions,
        "visits": {"running": snapshot.visits},
        "tunnels_total": len(routes),
        "tunnels": tunnels,
    }


def status_socket_of(config: Config, tell: Callable[[], Mapping[str, Any]]) -> StatusSocket | None:
    """The agent's status socket, not started; None if it is to have none."""
    if config.status_socket == OFF:
        return None
    path = config.status_socket or usable(runtime_places(PROGRAM))
    return StatusSocket(path, PROGRAM, tell) if path else None


def status_places(config_file: str | None) -> list[str]:
    """Where a running agent may have its status socket. Raises ConfigError."""
    if config_file is not None and (path := load(config_file).status_socket):
        if path == OFF:
            raise ConfigError(
                f"status_socket is {OFF}, expected a path: an agent without a status socket "
                "cannot be asked"
            )
        return [path]
    return runtime_places(PROGRAM)
