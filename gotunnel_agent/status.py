"""What the agent answers on its status socket, and where that socket is."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator, Mapping
from time import monotonic
from typing import Any

from .agent import Snapshot
from .common.one_line import on_one_line
from .common.status_socket import (
    OFF,
    SERVING,
    NoAnswer,
    StatusSocket,
    runtime_places,
    usable,
)
from .config import Config, ConfigError, load

PROGRAM = "gotunnel-agent"
MOST_LISTED = 1000  # tunnels in an answer, some 300 bytes each
MOST_REASON = 500  # characters
COPIES = "/run/credentials/"  # a service reads a copy of its file there


def describe(snapshot: Snapshot, config_file: str) -> dict[str, object]:
    """The agent's part of the answer. ``config_file``: the path of its configuration."""
    since, routes = snapshot.since, snapshot.all_routes()
    state = "stopping" if snapshot.stopping else SERVING if since is not None else "no session"
    if state == SERVING and snapshot.waits and not snapshot.routes:
        state = "waiting"  # for another agent to leave
    tunnels = [
        {
            "hostname": hostname,
            "mode": route.tunnel.mode,
            "protocol": route.tunnel.protocol,
            "target": str(route.tunnel.target),
            "url": route.url,
            "served": since is not None and not route.problem,
            "health": _health(snapshot.health.get(hostname)),
            "certificate": snapshot.certificates.get(hostname, "").partition(":")[0],
            "reason": on_one_line(
                route.problem
                or snapshot.health.get(hostname)
                or snapshot.certificates.get(hostname, "").partition(": ")[2],
                MOST_REASON,
            ),
        }
        for hostname, route in list(routes.items())[:MOST_LISTED]
    ]
    told: dict[str, object] = {
        "state": state,
        "configuration": os.path.abspath(config_file),
        "gateway": snapshot.gateway,
        "connected_seconds": None if since is None else int(monotonic() - since),
        "problem": on_one_line(snapshot.problem, MOST_REASON),
        "old_sessions": snapshot.old_sessions,
        "visits": {"running": snapshot.visits},
        "tunnels_total": len(routes),
        "tunnels": tunnels,
    }
    if snapshot.gateways:
        told["gateways"] = [
            {
                "gateway": each.gateway,
                "member": each.member,
                "state": "no session" if each.since is None else SERVING,
                "connected_seconds": None if each.since is None else int(monotonic() - each.since),
                "reason": on_one_line(each.problem, MOST_REASON),
            }
            for each in snapshot.gateways
        ]
    return told


def _health(problem: str | None) -> str:
    """``problem``: as Snapshot.health has it; None: the target is not checked."""
    return "" if problem is None else "failed" if problem else "ok"


def status_socket_of(config: Config, tell: Callable[[], Mapping[str, Any]]) -> StatusSocket | None:
    """The agent's status socket, not started; None if it is to have none."""
    if config.status_socket == OFF:
        return None
    path = config.status_socket or usable(runtime_places(PROGRAM))
    return StatusSocket(path, PROGRAM, tell, "status_socket") if path else None


def status_places(config_file: str | None) -> tuple[list[str], bool]:
    """Where a running agent may have its status socket, and whether its configuration says so.
    Raises ConfigError."""
    if config_file is not None and (path := load(config_file).status_socket):
        if path == OFF:
            raise ConfigError(
                f"status_socket is {OFF}, expected a path: an agent without a status socket "
                "cannot be asked"
            )
        return [path], True
    return runtime_places(PROGRAM), False


def first_of(answers: Iterator[dict[str, Any]]) -> dict[str, Any]:
    """The first of several agents; a line says that there are others. Raises NoAnswer."""
    first, *others = answers
    if others:
        named = [on_one_line(str(answer.get("configuration"))) for answer in (first, *others)]
        print(f"{PROGRAM}: this is the agent of {named[0]}; that of {named[1]} answers, too: "
              "choose by -c FILE", file=sys.stderr)  # fmt: skip
    return first


def agent_of(config_file: str, answers: Iterator[dict[str, Any]]) -> dict[str, Any]:
    """The answer of the agent that has this configuration. Raises NoAnswer."""
    other = ""
    for answer in answers:
        # An agent of an earlier version does not say which one it has.
        told = str(answer.get("configuration", COPIES))
        if told.startswith(COPIES) or os.path.realpath(told) == os.path.realpath(config_file):
            return answer
        other = other or on_one_line(told)
    raise NoAnswer(f"the agent of {other} answers, not that of {config_file}: give each a "
                   "status_socket of its own")  # fmt: skip
