"""The gateway's metrics on METRICS_PORT (Prometheus), and its health. The figures are collected for
each request; between two requests only visitors/counts.py counts.

Labels are bounded: hostnames by counts.MOST_HOSTNAMES and MOST_CERTIFICATES, all others by the
number of words that the gateway has for them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

from gotunnel import __version__, process_memory
from gotunnel_agent.common import metrics_page
from gotunnel_agent.common.exposition import (
    HISTOGRAM,
    Labels,
    Metric,
    Sample,
    counter,
    gauge,
    histogram,
)
from gotunnel_agent.common.process_figures import process_figures

from .agents.newcomer import Newcomers
from .agents.tunnel import Tunnels
from .certs.state import Standing, State
from .listeners import Listeners
from .membership import Cluster
from .net.round_robin import FairWorkers
from .recording import Recording
from .visitors.counts import BOUNDS, CLASSES, Count
from .visitors.pages import Page
from .visitors.port import PublicPort
from .visitors.request import Request
from .visitors.sites import Site

MOST_CERTIFICATES = 500  # hostnames with an expiry time; the gateway's own names come first
MOST_TARGETS = 1000  # lines on the health of targets; a hostname has one, in a pool two
MOST_POOLS = 500  # hostnames with a line for each state of their pool's agents
STUCK = 5  # seconds without a turn after which a listener's thread counts as stuck
PREFIX = "gotunnel_gateway_"
CLUSTER = "gotunnel_cluster_"
SETTING = "METRICS_PORT"


class Parts(NamedTuple):
    """The parts with the figures. ``is_ready()``: the ports are open, and no drain has begun."""

    recording: Recording
    tunnels: Tunnels
    own_names: Sequence[str]
    certificate_state: Callable[[str], State]
    listeners: Listeners
    steps: FairWorkers
    visitors: PublicPort
    newcomers: Newcomers
    is_ready: Callable[[], bool]
    cluster: Cluster


def build_site(parts: Parts, bound: Sequence[str], together: Any = None) -> Site:
    """The site of METRICS_PORT, which listens on the IP addresses ``bound``. ``together``: a
    processes.together.Together, if it answers for other processes as well; None: there is none."""
    loopback = metrics_page.is_loopback(bound)

    def unhealthy() -> str | None:
        stuck = parts.listeners.stuck(STUCK)
        return None if stuck is None else f"{stuck} is stuck"

    def of_all() -> Iterable[Metric]:
        return figures(parts) if together is None else together.metrics(figures(parts))

    def any_unhealthy() -> str | None:
        return unhealthy() if together is None else together.unhealthy(unhealthy())

    def unready() -> str | None:
        is_ready = parts.is_ready() and (together is None or together.is_ready())
        return parts.cluster.unready() if is_ready else "starting or draining"

    if together is not None:
        together.share_metrics(lambda: figures(parts), unhealthy)

    def site(request: Request) -> Page:
        answer = metrics_page.answer(
            request.method, request.hostname, request.path, loopback=loopback,
            metrics=of_all, unhealthy=any_unhealthy, unready=unready,
        )  # fmt: skip
        return Page(answer.status, answer.body.encode(), answer.content_type)

    return site


def figures(parts: Parts) -> Iterator[Metric]:
    yield gauge(f"{PREFIX}info", "The program.", Sample(1, (("version", __version__),)))
    yield gauge(
        f"{PREFIX}ready", "1 if the ports are open and no drain has begun.",
        Sample(parts.is_ready()),
    )  # fmt: skip
    yield from _visits(parts)
    yield from _connections(parts)
    yield from _sessions(parts)
    yield from _pools(parts)
    yield from _certificates(parts)
    yield from _queues(parts)
    yield from _cluster(parts)
    yield from process_figures()


def _visits(parts: Parts) -> Iterator[Metric]:
    counts = parts.recording.counts
    if counts is None:
        return
    parts.recording.settle()
    all_ = counts.all().items()

    def each(read: Callable[[Count, Labels], Iterator[Sample]]) -> tuple[Sample, ...]:
        return tuple(
            sample
            for hostname, count in all_
            for sample in read(count, (("hostname", hostname),))
        )  # fmt: skip

    def visits(count: Count, name: Labels) -> Iterator[Sample]:
        for mode, by_class in (("http", count.http), ("tcp", count.tcp)):
            for word, number in zip(CLASSES, by_class):
                if number:
                    yield Sample(number, (*name, ("mode", mode), ("status", word)))

    def sizes(count: Count, name: Labels) -> Iterator[Sample]:
        yield Sample(count.received, (*name, ("direction", "in")))
        yield Sample(count.sent, (*name, ("direction", "out")))

    def failed(count: Count, name: Labels) -> Iterator[Sample]:
        yield Sample(count.failed, name)

    def durations(count: Count, name: Labels) -> Iterator[Sample]:
        return histogram(BOUNDS, count.buckets, count.seconds, name)

    yield counter(
        f"{PREFIX}visits_total",
        "Visits that have ended, by hostname, mode and class of their status.", *each(visits),
    )  # fmt: skip
    yield counter(
        f"{PREFIX}visit_bytes_total", "Bytes of visits that have ended, from and to visitors.",
        *each(sizes),
    )  # fmt: skip
    yield counter(
        f"{PREFIX}failed_visits_total",
        "Visits that failed on the side of the gateway or the target.", *each(failed),
    )  # fmt: skip
    yield Metric(
        f"{PREFIX}request_duration_seconds", HISTOGRAM,
        "Seconds from a request's head to the end of its answer, without upgraded connections.",
        each(durations),
    )  # fmt: skip
    yield counter(
        f"{PREFIX}visit_errors_total",
        "Visits that got an error page, were refused or were cut short, by reason.",
        *(Sample(count, (("reason", word),)) for word, count in sorted(counts.errors.items())),
    )  # fmt: skip


def _connections(parts: Parts) -> Iterator[Metric]:
    ports = parts.listeners.figures()
    yield gauge(
        f"{PREFIX}connections", "Open connections, by the port whose places they take.",
        *(Sample(port.taken, (("port", port.name),)) for port in ports if port.most),
    )  # fmt: skip
    yield gauge(
        f"{PREFIX}connections_limit", "Most open connections at a time.",
        *(Sample(port.most, (("port", port.name),)) for port in ports if port.most),
    )  # fmt: skip
    yield counter(
        f"{PREFIX}refused_connections_total",
        "Connections that were closed at once: no place was free, or their address had its share.",
        *(Sample(port.refused, (("port", port.name),)) for port in ports),
    )  # fmt: skip
    yield counter(
        f"{PREFIX}failed_accepts_total",
        "Tries to accept a connection that failed for lack of descriptors; it waits.",
        *(Sample(port.starved, (("port", port.name),)) for port in ports),
    )  # fmt: skip
    yield counter(
        f"{PREFIX}dropped_connections_total",
        "Connections that ended before their peer had asked for anything, by reason.",
        *(
            Sample(count, (("port", port.name), ("reason", word)))
            for port in ports
            for word, count in sorted(port.dropped.items())
        ),
    )  # fmt: skip
    begun, completed = parts.visitors.handshakes, parts.visitors.completed_handshakes
    yield counter(
        f"{PREFIX}tls_handshakes_total", "Visitors' TLS handshakes that were begun.",
        Sample(begun.value),
    )  # fmt: skip
    yield counter(
        f"{PREFIX}tls_handshakes_completed_total", "Visitors' TLS handshakes that were completed.",
        Sample(completed.value),
    )  # fmt: skip


def _sessions(parts: Parts) -> Iterator[Metric]:
    tunnels = parts.tunnels.registered()
    usages = [tunnel.usage() for tunnel in tunnels]
    hostnames = len({name for tunnel in tunnels for name in tunnel.routes})
    yield gauge(f"{PREFIX}sessions", "Agents that are registered.", Sample(len(tunnels)))
    yield gauge(f"{PREFIX}hostnames", "Hostnames that agents serve.", Sample(hostnames))
    targets = Counter(
        (route.hostname, "failed" if problem else "ok")
        for tunnel in tunnels
        for route in tunnel.routes.values()
        if (problem := tunnel.health.told.get(route.hostname)) is not None
    )
    yield gauge(
        f"{PREFIX}targets",
        "Targets that agents check (health), by hostname and whether they are well.",
        *(
            Sample(count, (("hostname", hostname), ("state", state)))
            for (hostname, state), count in sorted(targets.items())[:MOST_TARGETS]
        ),
    )  # fmt: skip
    yield gauge(
        f"{PREFIX}waiting_sessions", "Agents that wait for hostnames which others serve.",
        Sample(len(parts.tunnels.standby.waiting())),
    )  # fmt: skip
    streams, visits = sum(each.streams for each in usages), sum(each.visits for each in usages)
    yield gauge(f"{PREFIX}streams", "Open data streams, kept ones included.", Sample(streams))
    yield gauge(f"{PREFIX}running_visits", "Streams that serve a visit now.", Sample(visits))
    yield counter(
        f"{PREFIX}refused_registrations_total", "Registrations of agents that were refused.",
        Sample(parts.newcomers.refusals.total.value),
    )  # fmt: skip


def _pools(parts: Parts) -> Iterator[Metric]:
    states: Counter[tuple[str, str]] = Counter()
    for tunnel in parts.tunnels.registered():
        for hostname, route in tunnel.routes.items():
            if route.pool is not None:
                states[hostname, route.pool.members[0].state] += 1
    if states:
        listed = set(sorted({hostname for hostname, _ in states})[:MOST_POOLS])
        yield gauge(
            f"{PREFIX}pool_members", "Agents of a pool by their state.",
            *(
                Sample(count, (("hostname", hostname), ("state", state)))
                for (hostname, state), count in sorted(states.items())
                if hostname in listed
            ),
        )  # fmt: skip


def _certificates(parts: Parts) -> Iterator[Metric]:
    served = (name for tunnel in parts.tunnels.registered() for name in tunnel.routes)
    names = list(dict.fromkeys((*parts.own_names, *served)))
    states = {name: parts.certificate_state(name) for name in names}
    yield gauge(
        f"{PREFIX}certificates", "Hostnames by the state of their certificate.",
        *(
            Sample(sum(state.name is word for state in states.values()), (("state", word.value),))
            for word in Standing
        ),
    )  # fmt: skip
    yield gauge(
        f"{PREFIX}certificate_expiry_timestamp_seconds",
        "When the certificate of a hostname ends, in seconds since 1970.",
        *(
            Sample(state.ends_at, (("hostname", name),))
            for name, state in list(states.items())[:MOST_CERTIFICATES]
            if state.ends_at is not None
        ),
    )  # fmt: skip


def _cluster(parts: Parts) -> Iterator[Metric]:
    """Nothing for a gateway that is alone."""
    figures = parts.cluster.figures()
    if figures is None:
        return
    member, claims, peers = figures
    yield gauge(
        f"{CLUSTER}members", "Gateways that are one, with this one.", Sample(member.members)
    )
    yield gauge(
        f"{CLUSTER}board_reachable", "1 if the last call to Redis, or the supervisor, succeeded.",
        Sample(member.reachable),
    )  # fmt: skip
    yield gauge(
        f"{CLUSTER}board_seconds", "How long the last renewal of the lease took.",
        Sample(member.round_trip),
    )  # fmt: skip
    yield gauge(
        f"{CLUSTER}serving", "1 if this gateway may serve the hostnames that it holds.",
        Sample(member.serving),
    )  # fmt: skip
    yield gauge(
        f"{CLUSTER}leases", "Hostnames that this gateway holds among the members.",
        Sample(claims.held),
    )  # fmt: skip
    yield gauge(
        f"{CLUSTER}waiting_claims", "Registrations that wait for the other gateways.",
        Sample(claims.waiting),
    )  # fmt: skip
    yield counter(
        f"{CLUSTER}outages_total", "How often Redis, or the supervisor, was no longer reached.",
        Sample(member.outages),
    )  # fmt: skip
    yield counter(
        f"{CLUSTER}stops_total", "How often this gateway stopped serving: others may have served.",
        Sample(member.stops),
    )  # fmt: skip
    yield counter(
        f"{CLUSTER}lost_total", "Hostnames that went to an agent of another gateway meanwhile.",
        Sample(claims.lost),
    )  # fmt: skip
    if peers is None:
        return
    yield gauge(
        f"{CLUSTER}peers", "Other gateways by the direction in which visits can be passed on.",
        Sample(peers.accepted, (("direction", "out"),)),
        Sample(peers.connected, (("direction", "in"),)),
    )  # fmt: skip
    yield gauge(
        f"{CLUSTER}hostnames_elsewhere", "Hostnames that only other gateways' agents have.",
        Sample(peers.hostnames),
    )  # fmt: skip
    yield counter(
        f"{CLUSTER}passed_on_total", "Streams for visits that gateways passed on to each other.",
        Sample(peers.sent, (("direction", "out"),)),
        Sample(peers.received, (("direction", "in"),)),
    )  # fmt: skip
    yield gauge(
        f"{CLUSTER}passing_on", "Such streams that came from others and are open, kept ones too.",
        Sample(peers.running),
    )  # fmt: skip


def _queues(parts: Parts) -> Iterator[Metric]:
    room = parts.visitors.room
    yield gauge(
        f"{PREFIX}queued_steps", "Connections that wait for a thread (handshakes, heads).",
        Sample(parts.steps.waiting),
    )  # fmt: skip
    yield gauge(
        f"{PREFIX}requests", "Requests that are being served.", Sample(room.exchanges.room.taken)
    )
    yield gauge(
        f"{PREFIX}requests_limit", "Most requests at a time: WORKERS.",
        Sample(room.exchanges.room.most),
    )  # fmt: skip
    yield gauge(f"{PREFIX}relays", "Relays: tcp visits, WebSockets.", Sample(room.relays.taken))
    yield gauge(f"{PREFIX}relays_limit", "Most relays at a time.", Sample(room.relays.most))
    memory = process_memory()
    yield gauge(
        f"{PREFIX}buffered_bytes", "Bytes of streams that wait in memory.", Sample(memory.buffered)
    )
    yield gauge(
        f"{PREFIX}buffered_bytes_limit", "Most bytes of streams in memory.", Sample(memory.limit)
    )
    log_file = parts.recording.log_file
    if log_file is not None:
        yield gauge(
            f"{PREFIX}access_log_queued_bytes", "Lines that wait for the access log's file.",
            Sample(log_file.waiting),
        )  # fmt: skip
        yield counter(
            f"{PREFIX}access_log_dropped_lines_total", "Lines that the access log has lost.",
            Sample(log_file.dropped),
        )  # fmt: skip
