"""Makes the state document, which the dashboard, its API and `status` show. Values in, values out.

    {"gateway": {...}, "totals": {...}, "sessions": [...], "hostnames": [...],
     "certificates": [...], "visits": [...], "blocks": [...], "cluster": {...}, "public": false}

docs/dashboard.md explains each key. Lists have at most MOST_LISTED entries, and the totals count
all. Texts that a visitor, an agent or a CA has chosen are shortened, and have no control characters
(shown()): they may be printed anywhere, and are still foreign text to a page.

The public form has only what visitors can find out anyway.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import lru_cache
from typing import Any, NamedTuple, Protocol

from gotunnel_agent.common.hostnames import HTTPS_PORT, WILDCARD
from gotunnel_agent.common.one_line import on_one_line, words_and_link

from ..routes import Route
from ..visitors.visit import MOST_HOSTNAMES, Visit, has_failed

Document = dict[str, Any]

MOST_LISTED = 1000  # entries of each list; some 500 bytes each
MOST_PATH = 2048  # characters of a path
MOST_AWAITED = 20  # hostnames that one session waits for; the first ones say enough
MOST_NAME = 253  # characters of any other text: the longest hostname
MOST_ERROR = 4000  # characters of a certificate's error, with the CA's link
SPARK = 60  # points of a sparkline: visits of each of the last full seconds
RECENT = 10  # seconds over which visits_per_second is the mean
DAY = 86400
FIGURES = ("visits", "failed", "received_bytes", "sent_bytes")


class Facts(NamedTuple):
    """What the document says of the gateway. Instants are seconds since 1970."""

    host: str  # GATEWAY_HOST
    port: int  # of the visitors' URLs
    version: str
    state: str  # "serving" or "draining"
    started_at: float
    uptime: float  # seconds
    now: float
    cluster: Document | None = None  # as cluster.Cluster.describe(); None: the gateway is alone
    # Of hostnames that only other gateways' agents have; their visits are passed on
    elsewhere: Mapping[str, Route] = {}


class Identity(Protocol):
    """What the document says of an agent's identity (agents/identity.py)."""

    @property
    def name(self) -> str: ...

    @property
    def entry(self) -> object: ...  # in AGENTS_FILE; None: there is none


class Agent(Protocol):
    """... of an agent (agents/registration.py)."""

    @property
    def host(self) -> str: ...

    @property
    def identity(self) -> Identity: ...


class Usage(Protocol):
    """... of what a session has now (agents/limits.py)."""

    @property
    def streams(self) -> int: ...

    @property
    def visits(self) -> int: ...


class Failed(Protocol):
    def __getitem__(self, hostname: str, /) -> int: ...


class Health(Protocol):
    """... of how the targets of a session are (agents/health.py)."""

    @property
    def told(self) -> Mapping[str, str]: ...


class Tunnel(Protocol):
    """... of a session, which serves hostnames (agents/tunnel.py)."""

    id: str
    since: float  # seconds since 1970

    @property
    def failed(self) -> Failed: ...  # visits in tcp mode that reached no target, by hostname

    @property
    def agent(self) -> Agent: ...

    @property
    def routes(self) -> Mapping[str, Route]: ...

    @property
    def waits_for(self) -> Sequence[str]: ...  # hostnames that others have

    @property
    def health(self) -> Health: ...

    @property
    def round_trip(self) -> float | None: ...

    def usage(self) -> Usage: ...


class Word(Protocol):
    """The word for a certificate's state: ready, waiting or failed."""

    @property
    def value(self) -> str: ...


class Certificate(Protocol):
    """... of a certificate (certs/state.py, which explains the attributes)."""

    @property
    def name(self) -> Word: ...

    @property
    def reason(self) -> str: ...

    @property
    def summary(self) -> str: ...

    @property
    def next_at(self) -> float | None: ...

    @property
    def ends_at(self) -> float | None: ...


class Count(Protocol):
    """... of a hostname's visits that have ended (visitors/counts.py)."""

    @property
    def visits(self) -> int: ...

    failed: int
    received: int
    sent: int


class Block(Protocol):
    """... of a blocked address (net/blocks.py)."""

    @property
    def address(self) -> str: ...

    @property
    def until(self) -> float: ...

    @property
    def reason(self) -> str: ...

    @property
    def by(self) -> str: ...


class Rates(NamedTuple):
    """Visits in each of the last SPARK full seconds: in all, and by hostname if there were any."""

    total: Sequence[int] = (0,) * SPARK
    by_hostname: Mapping[str, Sequence[int]] = {}


_NO_SPARK = [0] * SPARK


def full(
    facts: Facts,
    tunnels: Iterable[Tunnel],
    own_names: Iterable[str],
    certificate: Callable[[str], Certificate],
    counts: Mapping[str, Count] | None = None,
    rates: Rates = Rates(),
    blocks: Iterable[Block] = (),
) -> Document:
    """``own_names`` are the gateway's, whose certificates are listed apart. ``certificate(name)``:
    how a certificate stands. ``counts``: by hostname as the agents spell it, and all others under
    a name that is no hostname; None if nothing counts. The last visits are added by live.py, which
    has them."""
    own_names = tuple(dict.fromkeys(own_names))
    tunnels = sorted(tunnels, key=lambda tunnel: tunnel.since)
    usages = [tunnel.usage() for tunnel in tunnels]
    # In a pool a hostname comes once for each agent, and while an agent's second session takes over
    # for each session.
    served = ((name, tunnel, route) for tunnel in tunnels for name, route in tunnel.routes.items())
    passed_on: Iterable[Any] = (
        (name, route.tunnel, route) for name, route in facts.elsewhere.items()
    )
    routes = sorted((*served, *passed_on), key=lambda entry: entry[0])
    return {
        "gateway": {
            "host": facts.host,
            "version": facts.version,
            "state": facts.state,
            "started_at": int(facts.started_at),
            "uptime_seconds": int(facts.uptime),
            "now": int(facts.now),
        },
        "totals": {
            "sessions": len(tunnels),
            "hostnames": len({name for name, _, _ in routes}),
            "certificates": len({*own_names, *(name for name, _, _ in routes)}),
            **_of_all(counts),
            "running": sum(usage.visits for usage in usages),
            **_rate(rates.total),
        },
        "sessions": [
            _session(tunnel, usage) for tunnel, usage in zip(tunnels[:MOST_LISTED], usages)
        ],
        "hostnames": [
            {
                **_route(name, route, facts.port),
                **_more(name, tunnel, route, counts, rates),
                "certificate": of_certificate(certificate(name), facts.now),
            }
            for name, tunnel, route in routes[:MOST_LISTED]
        ],
        "certificates": [
            {"hostname": name, **of_certificate(certificate(name), facts.now)}
            for name in own_names
        ],
        "blocks": [of_block(block) for block in blocks],
        **({} if facts.cluster is None else {"cluster": facts.cluster}),
        "public": False,
    }  # fmt: skip


def public(facts: Facts, tunnels: Iterable[Tunnel]) -> Document:
    """The document for everybody."""
    routes = {name: route for tunnel in tunnels for name, route in tunnel.routes.items()}
    routes = {**facts.elsewhere, **routes}
    return {
        "gateway": {"host": facts.host},
        "totals": {"hostnames": len(routes)},
        "hostnames": [
            _route(name, route, facts.port) for name, route in sorted(routes.items())[:MOST_LISTED]
        ],
        "public": True,
    }


def _route(name: str, route: Route, port: int) -> Document:
    return {
        "hostname": shown(name, MOST_NAME),
        "url": _url(name, route, port),
        "mode": route.mode,
        "protocol": route.protocol,
    }


def _url(name: str, route: Route, port: int) -> str:
    """Where a hostname is reached; "" for a wildcard, which is none."""
    if name.startswith(WILDCARD):
        return ""
    if route.port is not None:
        return f"tcp://{name}:{route.port}"
    if route.mode != "http":
        return f"tls://{name}:{port}"
    return f"https://{name}/" if port == HTTPS_PORT else f"https://{name}:{port}/"


def _more(
    name: str, tunnel: Tunnel, route: Route, counts: Mapping[str, Count] | None, rates: Rates
) -> Document:
    """What only those see that may see all."""
    count = None if counts is None else counts.get(route.hostname)
    figures: tuple[int | None, ...]
    if counts is None:
        figures = (None, tunnel.failed[route.hostname], 0, 0)
    elif count is not None:
        figures = (count.visits, count.failed, count.received, count.sent)
    elif len(counts) <= MOST_HOSTNAMES:
        figures = (0, 0, 0, 0)
    else:  # its visits may be counted among those of others
        figures = (None, None, None, None)
    return {
        "port": route.port,
        "target": shown(route.target, MOST_NAME),
        **_health(tunnel.health.told.get(route.hostname)),
        "session": tunnel.id,
        "agent": agent_name(tunnel.agent),
        "pool": _pool(route),
        "since": int(tunnel.since),
        **dict(zip(FIGURES, figures)),
        **_rate(rates.by_hostname.get(route.hostname, _NO_SPARK)),
    }


def _health(problem: str | None) -> Document:
    """``problem``: as agents/health.py has it; None: the agent has not said how its target is."""
    word = "" if problem is None else "failed" if problem else "ok"
    return {"health": word, "health_reason": shown(problem or "", MOST_NAME)}


def _pool(route: Route) -> Document | None:
    """How the agent stands in the hostname's pool; None if it has the hostname alone. ``route`` is
    the agent's own, whose pool has this agent first."""
    if route.pool is None:
        return None
    member = route.pool.members[0]
    return {"weight": member.weight, "visits": member.visits, "state": member.state}


def _rate(spark: Sequence[int]) -> Document:
    return {"visits_per_second": round(sum(spark[-RECENT:]) / RECENT, 1), "spark": list(spark)}


def _session(tunnel: Tunnel, usage: Usage) -> Document:
    round_trip = tunnel.round_trip
    return {
        "id": tunnel.id,
        "agent": agent_name(tunnel.agent),
        "address": tunnel.agent.host,
        "connected_at": int(tunnel.since),
        "round_trip_ms": None if round_trip is None else round(1000 * round_trip, 1),
        "hostnames": len(tunnel.routes),
        "streams": usage.streams,
        "visits": usage.visits,
        "waits_for": [shown(name, MOST_NAME) for name in tunnel.waits_for[:MOST_AWAITED]],
    }


def agent_name(agent: Agent) -> str:
    """The agent's name, "" if it has none."""
    return shown(agent.identity.name, MOST_NAME)


def _of_all(counts: Mapping[str, Count] | None) -> Document:
    """The visits that have ended, and their bytes; None if nothing counts them."""
    if counts is None:
        return dict.fromkeys(FIGURES)
    found = counts.values()
    sums = (
        sum(count.visits for count in found),
        sum(count.failed for count in found),
        sum(count.received for count in found),
        sum(count.sent for count in found),
    )
    return dict(zip(FIGURES, sums))


def of_certificate(state: Certificate, now: float) -> Document:
    return {
        "state": state.name.value,
        "days_left": None if state.ends_at is None else int((state.ends_at - now) // DAY),
        "not_after": None if state.ends_at is None else int(state.ends_at),
        "error_summary": shown(state.summary, MOST_NAME),
        "error_text": _error(state.reason),
        "next_order_at": None if state.next_at is None else int(state.next_at),
    }


@lru_cache(MOST_LISTED)  # a long one takes 20 µs, and hundreds of hostnames may have one
def _error(reason: str) -> str:
    return words_and_link(reason, MOST_ERROR)


def of_block(block: Block) -> Document:
    return {
        "address": block.address,
        "until": int(block.until),
        "reason": shown(block.reason, MOST_NAME),
        "by": shown(block.by, MOST_NAME),
    }


class Seen(NamedTuple):
    """What is kept of a visit that has ended; shortened, as a head may have 64 KiB. The attributes
    are those of visit.Visit, which also holds its tunnel, and that its session."""

    at: float
    hostname: str
    method: str
    path: str
    status: int
    error: str
    duration: float
    received: int
    sent: int
    visitor: str
    agent: str
    protocol: str
    request_id: str

    @property
    def failed(self) -> bool:
        return has_failed(self.status, self.error)


def seen(visit: Visit) -> Seen:
    return Seen(
        visit.at, visit.hostname[:MOST_NAME], visit.method[:MOST_NAME], visit.path[:MOST_PATH],
        visit.status, visit.error, visit.duration, visit.received, visit.sent, visit.visitor,
        visit.agent, visit.protocol, visit.request_id,
    )  # fmt: skip


def of_visit(visit: Seen, number: int) -> Document:
    """``number`` is the visit's own, counted from the gateway's start."""
    return {
        "id": number,
        "at": round(visit.at, 3),
        "hostname": of_head(visit.hostname, MOST_NAME),
        "method": of_head(visit.method, MOST_NAME),
        "path": of_head(visit.path, MOST_PATH),
        "status": visit.status,
        "error": visit.error,
        "failed": visit.failed,
        "duration_ms": round(1000 * visit.duration, 1),
        "received": visit.received,
        "sent": visit.sent,
        "visitor": shown(visit.visitor, MOST_NAME),
        "agent": shown(visit.agent, MOST_NAME),
        "protocol": visit.protocol,
        "request_id": of_head(visit.request_id, MOST_NAME),
    }


def shown(text: str, limit: int) -> str:
    """At most ``limit`` characters of a foreign text, without control characters."""
    text = text[:limit]
    return text if text.isprintable() else on_one_line(text, limit)[:limit]


def of_head(text: str, limit: int) -> str:
    """As shown(), of a request's head. That is read as Latin-1, so that a character is a byte:
    UTF-8 in it is decoded, other bytes become \\xHH."""
    text = text[:limit]
    if not text.isascii():
        try:
            text = text.encode("latin-1").decode("utf-8", "backslashreplace")
        except UnicodeEncodeError:  # from no head: the hostname of a tcp visit may be any text
            pass
    return shown(text, limit)
