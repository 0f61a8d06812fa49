"""What the gateway answers on its status socket, and what `status` shows of a gateway elsewhere.

Both are made of the state document (dashboard/state.py).
"""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from time import time
from types import MappingProxyType
from typing import Any

from gotunnel_agent.common.one_line import on_one_line, some, words_and_link
from gotunnel_agent.common.status_socket import FORMAT, SERVING, StatusSocket

from .agents.tunnel import Tunnel
from .certs.state import State
from .dashboard import state
from .dashboard.state import Facts
from .gateway import Gateway
from .routes import Route
from .visitors.counts import Counts

PROGRAM = "gotunnel-server"
SETTING = "STATUS_SOCKET"
# Entries of each list in an answer (sessions, hostnames, certificates), some 300 bytes each. The
# totals count all.
MOST_LISTED = 1000
MOST_REASON = 500  # characters
MOST_NUMBER = 2**63  # bytes of a long life
MOST_INSTANT = 250_000_000_000  # seconds since 1970: calendars end with the year 9999


class Status:
    """The status socket of a running gateway."""

    def __init__(
        self,
        gateway: Gateway,
        path: Path | None,
        given: socket.socket | None = None,
        together: Any = None,
    ):
        """Answers at ``path`` from now on; None: nowhere. ``given``: see StatusSocket.
        ``together``: a processes.together.Together, if it answers for other processes as well."""
        self.draining = False
        self._gateway = gateway
        self._together = together
        self._socket = (
            None if path is None else StatusSocket(str(path), PROGRAM, self._tell, SETTING, given)
        )
        if together is not None:
            together.share_status(self._document)
        if self._socket is not None:
            self._socket.start()

    def close(self) -> None:
        if self._socket is not None:
            self._socket.close()

    def _tell(self) -> dict[str, object]:
        told: dict[str, object] = {"state": "draining" if self.draining else SERVING}
        document = self._document()
        if self._together is not None:
            document = self._together.status(document)
            uptime = self._together.uptime()
            told |= {
                "pid": self._together.supervisor,
                "started_at": int(time() - uptime),
                "uptime_seconds": int(uptime),
            }
        return {**told, **of_document(document)}

    def _document(self) -> state.Document:
        gateway = self._gateway
        return document_of(
            gateway.tunnels.shown(), gateway.own_names, gateway.keeper.state,
            gateway.recording.counts, cluster=gateway.cluster.describe(),
            elsewhere=gateway.cluster.elsewhere(),
        )  # fmt: skip


def describe(
    tunnels: Sequence[Tunnel],
    own_names: Iterable[str],
    certificate_state: Callable[[str], State],
    counts: Counts | None = None,
    now: Callable[[], float] = time,
    cluster: Mapping[str, Any] | None = None,
) -> dict[str, object]:
    """The gateway's part of the answer. ``certificate_state(hostname)``: as Keeper.state().
    ``counts``: of visits; None if nothing counts them. ``cluster``: see Facts."""
    document = document_of(tunnels, own_names, certificate_state, counts, now, cluster)
    return of_document(document)


def document_of(
    tunnels: Sequence[Tunnel],
    own_names: Iterable[str],
    certificate_state: Callable[[str], State],
    counts: Counts | None = None,
    now: Callable[[], float] = time,
    cluster: Mapping[str, Any] | None = None,
    elsewhere: Mapping[str, Route] = MappingProxyType({}),
) -> state.Document:
    """The state document that the answer is made of. Arguments as for describe()."""
    facts = Facts(host="", port=0, version="", state="", started_at=0, uptime=0, now=now(),
                  cluster=None if cluster is None else dict(cluster),
                  elsewhere=elsewhere)  # fmt: skip
    found = None if counts is None else counts.all()
    return state.full(facts, tunnels, own_names, certificate_state, found)


def remote(document: Mapping[str, Any]) -> dict[str, object]:
    """The whole answer for a gateway elsewhere. Raises nothing: what a newer or a broken gateway
    leaves out is missing here, too, and so is what has another type than expected."""
    gateway = _object(document.get("gateway"))
    return {
        "format": FORMAT,
        "program": PROGRAM,
        "host": _text(gateway.get("host")) or None,
        "version": _text(gateway.get("version")) or None,
        "state": _text(gateway.get("state")) or None,
        "started_at": _instant(gateway.get("started_at")),
        "uptime_seconds": _number(gateway.get("uptime_seconds")),
        **of_document(document),
    }


def of_document(document: Mapping[str, Any]) -> dict[str, object]:
    """What `status` tells of a state document."""
    totals, gateway = _object(document.get("totals")), _object(document.get("gateway"))
    sessions, hostnames, own = (
        [_object(row) for row in rows] if isinstance(rows := document.get(key), list) else []
        for key in ("sessions", "hostnames", "certificates")
    )
    now = _number(gateway.get("now"))
    pooled = any(isinstance(row.get("pool"), dict) for row in hostnames)
    certificates = {_text(row.get("hostname")): row for row in own}
    for row in hostnames:
        certificates.setdefault(_text(row.get("hostname")), _object(row.get("certificate")))
    return {
        "visits": {"running": _number(totals.get("running")), **_ended(totals)},
        "sessions_total": _number(totals.get("sessions")),
        "hostnames_total": _number(totals.get("hostnames")),
        "certificates_total": _number(totals.get("certificates")),
        **_processes(gateway.get("processes")),
        "sessions": [_session(row, now) for row in sessions[:MOST_LISTED]],
        "hostnames": [_hostname(row, pooled) for row in hostnames[:MOST_LISTED]],
        "certificates": [
            _certificate(name, row) for name, row in list(certificates.items())[:MOST_LISTED]
        ],
        **_cluster(_object(document.get("cluster"))),
    }


def _object(value: object) -> Mapping[str, Any]:
    return value if isinstance(value, dict) else {}


def _text(value: object) -> str:
    return on_one_line(value, MOST_REASON) if isinstance(value, str) else ""


def _number(value: object) -> float | None:
    """A number that can be shown; not NaN, and no infinity."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    return value if abs(value) <= MOST_NUMBER else None


def _instant(value: object) -> float | None:
    at = _number(value)
    return None if at is None or not 0 <= at <= MOST_INSTANT else at


def _ended(totals: Mapping[str, Any]) -> dict[str, object]:
    """The visits that have ended, and their bytes; nothing if nothing counts them."""
    ended = _number(totals.get("visits"))
    if ended is None:
        return {}
    keys = ("failed", "received_bytes", "sent_bytes")
    return {"ended": ended, **{key: _number(totals.get(key)) for key in keys}}


def _processes(rows: object) -> dict[str, object]:
    """The processes of PROCESSES; nothing if the gateway has only one."""
    if not isinstance(rows, list):
        return {}
    keys = ("process", "pid", "restarts", "sessions", "visits", "running")
    return {"processes": [
        {"process": _number(row.get("process")), "state": _text(row.get("state")),
         **{key: _number(row.get(key)) for key in keys[1:]}}
        for row in map(_object, rows[:MOST_LISTED])
    ]}  # fmt: skip


def _cluster(cluster: Mapping[str, Any]) -> dict[str, object]:
    """Nothing for a gateway that is alone."""
    if not cluster:
        return {}
    rows = cluster.get("members")
    members = [_object(row) for row in rows] if isinstance(rows, list) else []
    return {
        "cluster": {
            "member": _text(cluster.get("member")),
            "board": _text(cluster.get("board")),
            "reachable": cluster.get("reachable") is True,
            "serving": cluster.get("serving") is True,
            "leases": _number(cluster.get("held")),
            "waiting": _number(cluster.get("waiting")),
        },
        "members": [
            {
                **{key: _text(row.get(key)) for key in ("id", "host", "version", "address")},
                "started_at": _instant(row.get("started_at")),
                "leaving": row.get("leaving") is True,
            }
            for row in members[:MOST_LISTED]
        ],
    }


def _session(row: Mapping[str, Any], now: float | None) -> dict[str, object]:
    at = _number(row.get("connected_at"))
    process = {"process": _number(row["process"])} if "process" in row else {}
    return {
        **process,
        "agent": _text(row.get("agent")),
        "address": _text(row.get("address")),
        "connected_seconds": None if at is None or now is None else int(now - at),
        "round_trip_ms": _number(row.get("round_trip_ms")),
        "hostnames": _number(row.get("hostnames")),
        "visits": _number(row.get("visits")),
        "streams": _number(row.get("streams")),
        "reason": _in_wait(row.get("waits_for")),
    }


def _in_wait(hostnames: object) -> str:
    """What to say of a session that waits for hostnames of another one."""
    names = [_text(name) for name in hostnames] if isinstance(hostnames, list) else []
    return f"waits for {some(names)}, which another agent serves" if names else ""


def _hostname(row: Mapping[str, Any], pooled: bool) -> dict[str, object]:
    """``pooled``: any of the rows is of an agent in a pool."""
    count = _number(row.get("visits"))
    visits = {} if count is None else {"visits": count}
    pool, member = _object(row.get("pool")), {}
    if pooled:
        standing = f"{_text(pool.get('state'))}, {_number(pool.get('visits'))} now"
        member = {"pool": standing if pool else ""}
    return {
        "hostname": _text(row.get("hostname")),
        "mode": _text(row.get("mode")),
        "protocol": _text(row.get("protocol")),
        "port": _number(row.get("port")),
        "target": _text(row.get("target")),
        "health": _text(row.get("health")),
        "agent": _text(row.get("agent")),
        **member,
        **visits,
        "failed_visits": _number(row.get("failed")),
        "reason": _text(row.get("health_reason")),
    }


def _certificate(name: str, row: Mapping[str, Any]) -> dict[str, object]:
    return {
        "hostname": name,
        "state": _text(row.get("state")),
        "days_left": _number(row.get("days_left")),
        "next_order_at": _instant(row.get("next_order_at")),
        "reason": words_and_link(row.get("error_text") or "", MOST_REASON),
    }
