"""The agent: keeps a link to the gateway, and tells how it stands.

Threads, besides the session's demultiplexer (see gotunnel.py):

    thread     how many              does                                   ends when
    agent      1                     the link's loop (link.py)              stop()
    control    1 a session           reads the control stream, sends pongs  the session ends
    accept     1 a session           hands each new data stream a worker    the session ends
    stream_N   at most MAX_STREAMS   one data stream: target.serve()        the stream ends
    ... answer 1 a visit, http mode  copies the target's answer             the stream ends
    ... back   1 a visit, tcp mode   copies what the target sends           both directions are done
    health     1, if wanted          decides which target is looked at      stop()
    health_N   LOOKERS at most       look at targets, tell the gateway      stop()

(The dots stand for the name of the thread that starts the second one, as in "stream_3 back".)

The process has two more: main, which waits for signals (cli.py), and standard error, which writes
the log until the process ends (common/standard_error.py). All but main are daemons: none keeps a
stopped process alive.
"""

import logging
from collections.abc import Mapping
from time import monotonic
from typing import NamedTuple

from gotunnel import Session

from .config import Config
from .link import LAST_WORDS, Link, Shared
from .plan import Plan, changes, needs_session
from .registering import in_wait
from .target import Route

log = logging.getLogger("gotunnel.agent")

# When the agent stops: seconds without a visit after which it ends a session that the gateway has
# not ended. Before, a visit may come that the gateway began before it read our GO_AWAY.
LEAVE_LOOK = 0.5


class Snapshot(NamedTuple):
    """An agent's state at one moment, for the status command."""

    gateway: str
    since: float | None  # monotonic time of the session's ack; None while none serves
    problem: str  # why the last session or dial ended; "" while one serves
    old_sessions: int
    visits: int  # that run now
    routes: Mapping[str, Route]
    certificates: Mapping[str, str]  # the gateway's words, by hostname
    stopping: bool
    retry_at: float | None  # monotonic time of the next dial; None while it does not wait for one
    refused: Mapping[str, str]  # why the gateway does not serve a hostname of the configuration
    configured: Mapping[str, Route] = {}  # all of the configuration, by hostname as it stands there
    lasting: bool = False  # the problem does not end by itself: somebody has to change something
    waits: frozenset[str] = frozenset()  # those of ``refused`` that are awaited
    # Whether the targets are well that health.py looks at, by hostname: "", or why it is not.
    health: Mapping[str, str] = {}

    def all_routes(self) -> dict[str, Route]:
        """Also those of refused hostnames, with the reason as their problem."""
        refused = {
            name: self.configured[name]._replace(problem=self.why_refused(name), url="")
            for name in self.refused
        }
        return {**self.routes, **refused}

    def why_refused(self, name: str) -> str:
        """Why a hostname of ``refused`` is not served."""
        return in_wait(name) if name in self.waits else f"refused: {self.refused[name]}"


class Totals(NamedTuple):
    """What has happened since the agent's start."""

    sessions: int  # that have begun to serve
    failures: int  # dials without a session, and sessions that ended by a fault
    streams: int
    failed_targets: Mapping[tuple[str, str], int]  # by hostname, and Refusal.word


class Agent(Shared):
    """Serves one gateway until stop() is called. run() is the agent's thread."""

    def __init__(self, config: Config):
        """Raises CannotTrust."""
        super().__init__(config)
        self.link = Link(self)

    def run(self) -> None:
        """Serve until stop() is called. Nothing that the gateway or the network does makes it
        raise."""
        try:
            self.link.run()
        finally:
            if self.health is not None:
                self.health.close()
            # A worker may hang in getaddrinfo(), which cannot be ended.
            self.workers.shutdown(LAST_WORDS)
            self.waker.close()

    def change(self, config: Config, plan: Plan | None = None) -> list[str]:
        """Serve another configuration from now on, and return what differs, as changes() tells it.
        Any thread; waits for nothing. Visits go on, those of a tunnel that has changed or is gone
        too: they have their session until they end. ``plan`` is of that configuration. Raises
        CannotTrust."""
        plan = plan or Plan(config)
        with self.lock:
            before, self.config = self.config, config
            found = changes(before, config)
            if plan.cas != self.plan.cas:
                found.append("other CA certificates")
            if needs_session(before, config) or plan.cas != self.plan.cas:
                self.plan = plan
                self.lock.notify_all()
        self.link.break_off()
        self.tell()
        return found

    def stop(self) -> None:
        """End the session when its visits are done. Any thread. Waits at most drain_timeout for the
        visits and LAST_WORDS for the session's last frames. A connection that the gateway has not
        accepted yet is reset at once."""
        self.stopping.set()
        self.tell()
        self.waker.wake()
        with self.lock:
            self.lock.notify_all()
            services, unaccepted = [*self.link.old, self.link.service], self.link.unaccepted
            drain_timeout = self.config.drain_timeout
        if unaccepted is not None:
            unaccepted.reset()
        sessions = [service.session for service in services if service is not None]
        for session in sessions:
            session.leave(refuses=False)
        if left := self._drain(sessions, drain_timeout):
            log.warning("%d visits did not end in %g s and were cut", left, drain_timeout)
        for session in sessions:
            session.close("the agent stops")
        self.targets.reset()
        deadline = monotonic() + LAST_WORDS
        for session in sessions:
            session.join(max(0, deadline - monotonic()))

    def snapshot(self) -> Snapshot:
        """The agent's state now. Any thread."""
        with self.lock:
            # While a new session is not registered yet, the one before serves.
            services = [self.link.service, *reversed(self.link.old)]
            live = [each for each in services if each is not None and each.serves()]
            visits, plan = self.running, self.plan
        service = live[0] if live else None
        configured = plan.routes if service is None else service.plan.routes
        refused = self.link.refused if service is None else service.refused
        return Snapshot(
            plan.address,
            None if service is None else service.since,
            self.link.problem if service is None else "",
            max(0, len(live) - 1),
            visits,
            plan.routes if service is None else service.routes,
            dict(self.certificates),
            self.stopping.is_set(),
            self.link.retry_at,
            {name: reason for name, reason in refused.items() if name in configured},
            configured,
            self.link.lasting and service is None,
            frozenset() if service is None else service.waited_for(),
            {} if self.health is None else self.health.snapshot(),
        )

    def totals(self) -> Totals:
        """Any thread."""
        failed = self.targets.failed()
        with self.lock:
            return Totals(self.sessions, self.failures, self.streams, failed)

    def _drain(self, sessions: list[Session], timeout: float) -> int:
        """Wait until all sessions have ended, which a gateway of ours does when their visits are
        over, or until there was no visit for LEAVE_LOOK; ``timeout`` seconds at most. Returns how
        many visits are left."""
        deadline = monotonic() + timeout
        with self.lock:
            while (left := deadline - monotonic()) > 0:
                if all(session.ended for session in sessions):
                    return 0
                if self.running:
                    self.lock.wait(left)
                elif not self.lock.wait(min(left, LEAVE_LOOK)) and not self.running:
                    break
            return self.running
