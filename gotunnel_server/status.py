"""What the gateway answers on its status socket, and what `status` shows of a gateway elsewhere.

Both are made of the state document (dashboard/state.py).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from time import time
from typing import Any

from gotunnel_agent.common.one_line import on_one_line, words_and_link
from gotunnel_agent.common.show_status import SERVING
from gotunnel_agent.common.status_socket import FORMAT, StatusSocket

from .agents.tunnel import Tunnel
from .certs.state import State
from .dashboard import state
from .dashboard.state import Facts
from .gateway import Gateway
from .visitors.counts import Counts

PROGRAM = "gotunnel-server"
SETTING = "STATUS_SOCKET"
# Entries of each list in an answer (sessions, hostnames, certificates), some 300 bytes each. The
# totals count all.
MOST_LISTED = 1000
MOST_REASON = 500  # characters


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
    facts = Facts(host="", port=0, version="", state="", started_at=0, uptime=0, now=now())
    found = None if counts is None else counts.all()
    return of_document(state.full(facts, tunnels, own_names, certificate_state, found))


def remote(document: Mapping[str, Any]) -> dict[str, object]:
    """The whole answer for a gateway elsewhere. Raises nothing: what a newer or a broken gateway
    leaves out is missing here, too."""
    gateway = _object(document.get("gateway"))
    return {
        "format": FORMAT,
        "program": PROGRAM,
        "host": gateway.get("host"),
        "version": gateway.get("version"),
        "state": gateway.get("state"),
        "started_at": gateway.get("started_at"),
        "uptime_seconds": gateway.get("uptime_seconds"),
        **of_document(document),
    }


def of_document(document: Mapping[str, Any]) -> dict[str, object]:
    """What `status` tells of a state document."""
    totals, now = _object(document.get("totals")), _object(document.get("gateway")).get("now")
    sessions, hostnames, own = (
        [_object(row) for row in rows] if isinstance(rows := document.get(key), list) else []
        for key in ("sessions", "hostnames", "certificates")
    )
    certificates = {row.get("hostname"): row for row in own}
    for row in hostnames:
        certificates.setdefault(row.get("hostname"), _object(row.get("certificate")))
    return {
        "visits": {"running": totals.get("running"), **_ended(totals)},
        "sessions_total": totals.get("sessions"),
        "hostnames_total": totals.get("hostnames"),
        "certificates_total": totals.get("certificates"),
        "sessions": [_session(row, now) for row in sessions[:MOST_LISTED]],
        "hostnames": [_hostname(row) for row in hostnames[:MOST_LISTED]],
        "certificates": [
            _certificate(name, row) for name, row in list(certificates.items())[:MOST_LISTED]
        ],
    }


def _object(value: object) -> Mapping[str, Any]:
    return value if isinstance(value, dict) else {}


def _text(value: object) -> str:
    return on_one_line(value, MOST_REASON) if isinstance(value, str) else ""


def _ended(totals: Mapping[str, Any]) -> dict[str, object]:
    """The visits that have ended, and their bytes; nothing if nothing counts them."""
    if totals.get("visits") is None:
        return {}
    keys = ("failed", "received_bytes", "sent_bytes")
    return {"ended": totals["visits"], **{key: totals.get(key) for key in keys}}


def _session(row: Mapping[str, Any], now: object) -> dict[str, object]:
    at = row.get("connected_at")
    known = isinstance(at, (int, float)) and isinstance(now, (int, float))
    return {
        "agent": _text(row.get("agent")),
        "address": _text(row.get("address")),
        "connected_seconds": int(now - at) if known else None,  # type: ignore[operator]
        "round_trip_ms": row.get("round_trip_ms"),
        "hostnames": row.get("hostnames"),
        "visits": row.get("visits"),
        "streams": row.get("streams"),
    }


def _hostname(row: Mapping[str, Any]) -> dict[str, object]:
    visits = {} if row.get("visits") is None else {"visits": row["visits"]}
    return {
        "hostname": _text(row.get("hostname")),
        "mode": _text(row.get("mode")),
        "protocol": _text(row.get("protocol")),
        "port": row.get("port"),
        "target": _text(row.get("target")),
        "agent": _text(row.get("agent")),
        **visits,
        "failed_visits": row.get("failed"),
    }


def _certificate(name: object, row: Mapping[str, Any]) -> dict[str, object]:
    return {
        "hostname": _text(name),
        "state": _text(row.get("state")),
        "days_left": row.get("days_left"),
        "next_order_at": row.get("next_order_at"),
        "reason": words_and_link(row.get("error_text") or "", MOST_REASON),
    }
