"""The agent: keeps a link to the gateway, or to each of several that are one, and tells how it
stands.

Threads, besides the session's demultiplexer (see gotunnel.py):

    thread     how many              does                                   ends when
    agent      1                     the first link's loop (link.py)        stop()
    link PLACE 1 a further gateway   the loop of a link to that one         it is no member any more
    control    1 a session           reads the control stream, sends pongs  the session ends
    accept     1 a session           hands each new data stream a worker    the session ends
    stream_N   at most MAX_STREAMS   one data stream: target.serve()        the stream ends
    ... answer 1 a visit, http mode  copies the target's answer             the stream ends
    answers    1, from the first on  reads small answers for all of these   stop()
    ... back   1 a visit, tcp mode   copies what the target sends           both directions are done
    health     1, if wanted          decides which target is checked        stop()
    health_N   CHECKERS at most      check targets, tell the gateway        stop()

(The dots stand for the name of the thread that starts the second one, as in "stream_3 back".)

The process has two more: main, which waits for signals (run.py), and standard error, which writes
the log until the process ends (common/standard_error.py). All but main are daemons: none keeps a
stopped process alive.
"""

import logging
import threading
from collections import deque
from collections.abc import Mapping
from time import monotonic
from typing import NamedTuple

from gotunnel import NoThread, Session, spawn

from .common.one_line import some
from .config import Config
from .link import LAST_WORDS, Link
from .plan import Plan, changes, needs_session
from .registering import in_wait
from .roster import MOST_MEMBERS, chosen, reached, to_open, wanted
from .shared import OtherLink, Service, Shared
from .target import Route

log = logging.getLogger("gotunnel.agent")

# When the agent stops: seconds without a visit after which it ends a session that the gateway has
# not ended. Before, a visit may come that the gateway began before it read our GO_AWAY.
LEAVE_LOOK = 0.5
# Links at a time. A gateway could tell other members again and again, and each link that is not
# needed any more takes a while to end.
MOST_LINKS = 2 * MOST_MEMBERS
# Links that are opened in a minute, for the same reason: each dials, and may log why it failed.
MOST_OPENED = 2 * MOST_MEMBERS
MINUTE = 60
OPEN_LATER = 5  # seconds until further ones are


class Linked(NamedTuple):
    """One of several gateways, and how the agent's session with it stands."""

    gateway: str  # its address
    member: str  # its id; "" as long as it is not known
    since: float | None  # monotonic time of the session's ack; None while none serves
    problem: str  # why there is no session; "" while one serves


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
    # Whether the targets are well that health.py checks, by hostname: "", or why it is not.
    health: Mapping[str, str] = {}
    gateways: tuple[Linked, ...] = ()  # if several are one

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
    """Serves one gateway, or several that are one, until stop() is called. run() is the agent's
    thread."""

    def __init__(self, config: Config):
        """Raises CannotTrust."""
        super().__init__(config)
        self.links: list[Link] = [Link(self)]
        self._threads: list[threading.Thread] = []  # of the further links
        self._opened: deque[float] = deque(maxlen=MOST_OPENED)  # when they began (monotonic)
        self._look_at = 0.0  # monotonic: a call of note_members() is to come until then
        # How many gateways serve what, as the log has told last; None if one has failed since.
        self._told: tuple[int, tuple[str, ...]] | None = None

    @property
    def link(self) -> Link:
        """The first one."""
        return self.links[0]

    def run(self) -> None:
        """Serve until stop() is called. Nothing that the gateway or the network does makes it
        raise."""
        try:
            self.link.run()
        finally:
            if self.health is not None:
                self.health.close()
            with self.lock:
                threads = list(self._threads)
            if threads and not self.stopping.is_set():  # on_refusal() has ended the loop
                self.stop()
            deadline = monotonic() + self.config.drain_timeout + LAST_WORDS
            for thread in threads:
                thread.join(max(0, deadline - monotonic()))
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
                if plan.places != self.plan.places:
                    self.members = {}  # the new gateway tells others
                self.plan = plan
                self.lock.notify_all()
            links = list(self.links)
        for link in links:
            link.break_off()
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
            sessions = [service.session for link in self.links for service in link.services()]
            unaccepted = [link.unaccepted for link in self.links]
            drain_timeout = self.config.drain_timeout
        for duplex in unaccepted:
            if duplex is not None:
                duplex.reset()
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
            live = [[each for each in link.services() if each.serves()] for link in self.links]
            visits, plan, links = self.running, self.plan, list(self.links)
            gateways = tuple(self._linked(link) for link in links) if self.members else ()
        service = next((serving[0] for serving in live if serving), None)
        first = links[0]
        waits = [link.retry_at for link in links if link.retry_at is not None]
        configured = plan.routes if service is None else service.plan.routes
        refused = first.refused if service is None else service.refused
        return Snapshot(
            _address(plan, service),
            None if service is None else service.since,
            first.problem if service is None else "",
            sum(max(0, len(serving) - 1) for serving in live),
            visits,
            plan.routes if service is None else service.routes,
            dict(self.certificates),
            self.stopping.is_set(),
            min(waits, default=None) if service is None else first.retry_at,
            {name: reason for name, reason in refused.items() if name in configured},
            configured,
            first.lasting and service is None,
            frozenset() if service is None else service.waited_for(),
            {} if self.health is None else self.health.snapshot(),
            tuple(gateway for gateway in gateways if gateway is not None),
        )

    def _linked(self, link: Link) -> Linked | None:
        """None for a link that is not needed. Caller holds the lock."""
        service = next((each for each in link.services() if each.serves()), None)
        if service is not None:
            return Linked(str(service.place), service.member, service.since, "")
        if not link.is_needed():
            return None
        return Linked(str(link.place), "", None, link.problem)

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
                    self.ended.wait(left)
                elif not self.ended.wait(min(left, LEAVE_LOOK)) and not self.running:
                    break
            return self.running

    # Several gateways that are one

    def note_members(self) -> None:
        with self.lock:
            if self.stopping.is_set():
                return
            opened, all_opened = self._open_links()
            self.lock.notify_all()
            line = self._gateways_line()
            later = None if all_opened else self._look_later()
        if later is not None:
            later.call_later(OPEN_LATER, self.note_members)
        for link in opened:
            try:
                thread = spawn(f"link {link.place}", link.run)
            except NoThread as error:
                with self.lock:
                    self.links.remove(link)
                log.warning("%s: %s; no session with it for now", link.place, error)
                continue
            with self.lock:
                self._threads = [each for each in self._threads if each.is_alive()] + [thread]
        if line:
            log.info("%s", line)

    def _open_links(self) -> tuple[list[Link], bool]:
        """Take over what the sessions tell. Returns new links, and whether these are all that are
        needed. Caller holds the lock."""
        before, self.members = self.members, self._members()
        addresses = self.addresses()
        new = {address for id, address in addresses.items() if id not in before}
        for link in self.links:
            if link.address in new and not link.view().serves:  # it may wait, and has no need to
                link.hurried = True
        opened: list[Link] = []
        missing = to_open(addresses, self.views())
        for address in missing:
            if not self._may_open():
                break
            name = next(name for found, name in self.members.values() if found == address)
            opened.append(Link(self, address, name, self.links[0].turn))
            self.links.append(opened[-1])
        return opened, len(opened) == len(missing)

    def _may_open(self) -> bool:
        """Whether one more link may be opened now. Caller holds the lock."""
        now = monotonic()
        often = len(self._opened) == MOST_OPENED and now - self._opened[0] < MINUTE
        if often or len(self.links) >= MOST_LINKS:
            return False
        self._opened.append(now)
        return True

    def _look_later(self) -> Session | None:
        """A session whose thread can call note_members() later; None if one does it anyway. Caller
        holds the lock."""
        sessions = [each.session for link in self.links for each in link.services()]
        if not sessions or monotonic() < self._look_at:
            return None
        self._look_at = monotonic() + OPEN_LATER
        return sessions[0]

    def _members(self) -> dict[str, tuple[str, str]]:
        """All members that any of the sessions tells. If there is no session, those that were told
        last. Caller holds the lock."""
        tellers = [
            service
            for link in self.links
            for service in link.services()
            if service.serves() and not service.asked and service.plan.places == self.plan.places
        ]
        lists = [service for service in tellers if service.members is not None]
        if not lists and (not tellers or any(service.member for service in tellers)):
            return self.members
        names = {id: each.place.name for each in lists for id in each.members or ()}
        told = {id: address for each in lists for id, address in (each.members or {}).items()}
        told = chosen(told, self.instance, reached(self.views()))
        return {id: (address, names[id]) for id, address in told.items()}

    def _gateways_line(self) -> str:
        """What there is to log of how many gateways serve; "" nothing. Caller holds the lock."""
        if wanted(self.addresses(), self.views()):
            self._told = None
            return ""
        found = [link.current() for link in self.links]
        serving = [service for service in found if service is not None and service.member]
        if not serving or len(serving) == 1 and self._told is None:
            return ""
        names = tuple(name for name, route in serving[0].routes.items() if not route.problem)
        told = (len(serving), names)
        if told == self._told or not names:
            return ""
        self._told = told
        return f"serving {some(names)} at {count_of(len(serving), 'gateway')}"

    def forget(self, link: OtherLink) -> None:
        self.links = [each for each in self.links if each is not link]

    def retire_old(self, link: OtherLink | None) -> None:
        with self.lock:
            plan, links, views = self.plan, list(self.links), self.views()
            members = set(self.members)
        if not any(view.serves for view in views):
            return
        found = reached(views)
        for each in links:
            is_own = each is link

            def replaced(service: Service, is_own: bool = is_own) -> bool:
                if not is_own and service.stays(plan):  # it asks for refused hostnames, or is new
                    return False
                return service.member in found or service.member not in members

            each.retire_old(replaced)


def count_of(count: int, noun: str) -> str:
    return f"{count} {noun}" + ("" if count == 1 else "s")


def _address(plan: Plan, service: Service | None) -> str:
    """The gateway's, as the operator knows it."""
    if len(plan.places) == 1 or service is None or service.place not in plan.places:
        return plan.address
    return str(service.place)
