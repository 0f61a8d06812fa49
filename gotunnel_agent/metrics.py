"""The agent's metrics port: /metrics, /healthz and /readyz (common/metrics_page.py).

A small server of its own: the agent has no listeners, and a scrape comes every few seconds. Thread
"metrics" accepts peers and reads their heads (common/arrivals.py), ANSWERERS threads answer. So a
peer that says nothing holds up no health check, and each peer has PEER_TIMEOUT.
"""

from __future__ import annotations

import contextlib
import logging
import selectors
import socket
from collections.abc import Iterator, Sequence
from http import HTTPStatus
from time import monotonic

from gotunnel import Deadline, NoThread, Waker, __version__, process_memory, spawn

from .agent import Agent
from .common import http1, metrics_page
from .common.arrivals import Address, Arrivals
from .common.duplex import Duplex
from .common.exposition import Metric, Sample, counter, gauge
from .common.metrics_page import Answer
from .common.process import Stopped, Workers
from .common.process_figures import process_figures

log = logging.getLogger("gotunnel.metrics")

PREFIX = "gotunnel_agent_"
BACKLOG = 8  # peers that the kernel queues: a scraper and a health check or two
PEER_TIMEOUT = 2  # seconds for one peer to ask, and again to take the answer
ANSWERERS = 4  # threads, which a peer that does not take its answer holds up
LAST_ANSWERS = 1  # seconds that they have to end


class PortUnusable(Exception):
    """The port cannot be opened. One line for the operator."""


class MetricsPort:
    """start(), then close()."""

    def __init__(self, bound: Sequence[str], port: int, agent: Agent):
        """``bound``: the IP addresses to listen on. ``port`` 0: any free one. Raises
        PortUnusable."""
        self._agent = agent
        self._loopback = metrics_page.is_loopback(bound)
        self._sockets: list[socket.socket] = []
        self._waker: Waker | None = None  # while the thread runs
        self._ended = False
        self._workers = Workers(ANSWERERS, "metrics")
        for address in bound:
            family = socket.AF_INET6 if ":" in address else socket.AF_INET
            try:
                sock = socket.create_server((address, port), family=family, backlog=BACKLOG)
            except OSError as error:
                self.close()
                why = error.strerror or error
                raise PortUnusable(f"metrics_port {port} on {address}: {why}") from None
            sock.setblocking(False)
            self._sockets.append(sock)
            port = sock.getsockname()[1]  # the same for all, if it was any free one
        self.port = port

    def start(self) -> None:
        """Begin to answer. What prevents it is logged: the agent serves without it as well."""
        self._waker = waker = Waker()
        try:
            spawn("metrics", self._run, waker)
        except NoThread as error:
            waker.close()
            log.warning("metrics_port: %s; it does not answer", error)

    def close(self) -> None:
        """Answer no more. Any thread."""
        self._ended = True
        if self._waker is not None:
            self._waker.wake()
        else:
            for sock in self._sockets:
                sock.close()

    def _run(self, waker: Waker) -> None:
        with selectors.DefaultSelector() as selector:
            selector.register(waker, selectors.EVENT_READ)
            arrivals = Arrivals(
                selector, self._sockets, self._pass_on, PEER_TIMEOUT, http1.HEAD_LIMIT
            )
            with contextlib.closing(arrivals):
                while not self._ended:
                    for key, _ in selector.select(arrivals.left()):
                        arrivals.take(key.fileobj)
                    arrivals.end_late()
        for sock in self._sockets:
            sock.close()
        waker.close()
        self._workers.shutdown(LAST_ANSWERS)

    def _pass_on(self, sock: socket.socket, address: Address, head: bytes) -> None:
        try:
            self._workers.submit(self._answer_one, sock, head)
        except Stopped:
            sock.close()

    def _answer_one(self, sock: socket.socket, head: bytes) -> None:
        """Thread of the pool."""
        peer = Duplex(sock)
        try:
            self._serve(peer, head, Deadline(PEER_TIMEOUT))
        except OSError as error:
            log.debug("metrics: a peer got no answer: %s", error)
        finally:
            peer.close()

    def _serve(self, peer: Duplex, came: bytes, deadline: Deadline) -> None:
        try:
            end = http1.head_end(came)
            head = http1.parse_request(came[:end])
            answer = self._answer(head.method, http1.hostname(head), http1.origin_target(head))
            is_head = head.method == "HEAD"
        except http1.Malformed as error:
            answer, is_head = Answer(error.status, f"{error}\n"), False
        body = answer.body.encode()
        fields = [
            ("Content-Type", answer.content_type), ("Content-Length", str(len(body))),
            ("Cache-Control", "no-store"), ("Connection", "close"),
        ]  # fmt: skip
        line = f"HTTP/1.1 {answer.status} {HTTPStatus(answer.status).phrase}"
        out = http1.encode_head(line, fields) + (b"" if is_head else body)
        peer.write(out, timeout=deadline.left())
        peer.finish(timeout=deadline.left())
        with contextlib.suppress(OSError):  # a plain close with bytes unread could destroy it
            while peer.read(timeout=deadline.left()):
                pass

    def _answer(self, method: str, hostname: str | None, path: str) -> Answer:
        def unready() -> str | None:
            snapshot = self._agent.snapshot()
            if snapshot.stopping:
                return "stopping"
            return snapshot.problem or "no session" if snapshot.since is None else None

        return metrics_page.answer(
            method, hostname or "", path, loopback=self._loopback,
            metrics=lambda: figures(self._agent), unhealthy=lambda: None, unready=unready,
        )  # fmt: skip


def figures(agent: Agent) -> Iterator[Metric]:
    snapshot, totals = agent.snapshot(), agent.totals()
    since, routes = snapshot.since, snapshot.all_routes()
    yield gauge(f"{PREFIX}info", "The program.", Sample(1, (("version", __version__),)))
    yield gauge(f"{PREFIX}connected", "1 if a session serves.", Sample(since is not None))
    yield gauge(
        f"{PREFIX}gateways", "Gateways with which it has a session, if several are one.",
        Sample(sum(each.since is not None for each in snapshot.gateways) or since is not None),
    )  # fmt: skip
    yield gauge(
        f"{PREFIX}session_seconds", "For how long it has served; 0 without one.",
        Sample(0 if since is None else monotonic() - since),
    )  # fmt: skip
    yield gauge(
        f"{PREFIX}old_sessions", "Sessions that only end their visits.",
        Sample(snapshot.old_sessions),
    )  # fmt: skip
    yield counter(
        f"{PREFIX}sessions_total", "Sessions that have begun to serve.", Sample(totals.sessions)
    )
    yield counter(
        f"{PREFIX}failed_dials_total", "Dials that brought no session, and sessions that broke.",
        Sample(totals.failures),
    )  # fmt: skip
    yield gauge(f"{PREFIX}tunnels", "Tunnels of the configuration.", Sample(len(routes)))
    yield gauge(
        f"{PREFIX}refused_tunnels", "Those of them that the gateway does not serve.",
        Sample(sum(route.problem != "" for route in routes.values())),
    )  # fmt: skip
    yield gauge(
        f"{PREFIX}waiting_tunnels", "... because another agent serves them, and this one waits.",
        Sample(len(snapshot.waits)),
    )  # fmt: skip
    yield gauge(
        f"{PREFIX}target_well", "1 if the target is well, 0 if not, by its health checks.",
        *(
            Sample(not problem, (("hostname", hostname),))
            for hostname, problem in sorted(snapshot.health.items())
        ),
    )  # fmt: skip
    yield counter(f"{PREFIX}streams_total", "Streams that have come.", Sample(totals.streams))
    yield gauge(f"{PREFIX}streams", "Streams that are served now.", Sample(snapshot.visits))
    yield counter(
        f"{PREFIX}failed_targets_total", "Streams whose target was not reached, by reason.",
        *(
            Sample(count, (("hostname", hostname), ("reason", word)))
            for (hostname, word), count in sorted(totals.failed_targets.items())
        ),
    )  # fmt: skip
    memory = process_memory()
    yield gauge(
        f"{PREFIX}buffered_bytes", "Bytes of streams that wait in memory.", Sample(memory.buffered)
    )
    yield from process_figures()
