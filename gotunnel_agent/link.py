"""A link: the loop that keeps a session with one gateway. Dial, register, serve until the session
ends, wait, repeat.

A link has one session, unless the gateway asks for a new one (GO_AWAY, or End with MOVE), or the
agent has got another plan (plan.py): then it dials again. The old session keeps serving until the
new one is registered, and ends when its visits have ended.

If the gateway refuses some of the hostnames (feature PARTIAL), the session serves the others. From
time to time a second session asks for the refused ones alone, so the first one is not disturbed. If
it gets any, the link dials again, and that session takes over the hostnames of both.

If another agent serves all of the hostnames, the session waits (feature WAITS): it serves nothing
until the gateway tells that one is free. Then the link dials again at once.

An agent has one link, unless its gateway says that it is one of several: then it has one to each
(agent.py, and roster.py for the rules). shared.py has what the links share: the plan, the threads
that serve streams and the targets. Each has its own sessions, its own delays and a thread of its
own.
"""

from __future__ import annotations

import contextlib
import logging
import math
import random
from collections.abc import Callable, Iterator, Mapping
from time import monotonic, time

from gotunnel import (
    ALREADY,
    MEMBERS,
    MOVE,
    OVERLAP,
    REPLACED,
    START_WINDOW,
    Ack,
    Certificate,
    Deadline,
    End,
    Free,
    Members,
    Message,
    MessageReader,
    Ping,
    Pong,
    Port,
    ProtocolError,
    Session,
    SessionClosed,
    Stream,
    encode_message,
    spawn,
)

from . import roster, trouble
from .common.duplex import Duplex
from .common.hostnames import OPEN
from .common.one_line import on_one_line, some, words_and_link, words_on_one_line
from .common.process import Stopped
from .config import Config, ConfigError, Tunnel, with_secrets
from .connect import GivenUp, addresses_of, connect
from .plan import Plan
from .registering import (
    INVALID,
    NO_NAMES,
    TAKEN,
    in_wait,
    new_instance,
    read_answer,
    registration,
    url_of,
)
from .roster import (
    SHARED,
    Place,
    View,
    is_id,
    place_of,
    reached,
    seek_delay,
    usable,
)
from .shared import Service, Shared
from .target import Route, serve
from .trust import begin_tls

log = logging.getLogger("gotunnel.link")

DIAL_TIMEOUT = 10  # seconds to connect, and again for the TLS handshake
ACK_TIMEOUT = 30  # seconds; a gateway may make certificates before it answers
SILENCE_TIMEOUT = 40  # seconds without a ping; they come every 15, so the line is dead
# When the agent stops, visits have drain_timeout seconds to end. Then threads have these: to send a
# session's last frames (GO_AWAY, FIN), and to end.
LAST_WORDS = 3

FIRST_DELAY = 0.5  # seconds before the first retry; doubled with each failure
MAX_DELAY = 30  # longest delay in seconds: a gateway that is back must not wait long for its agents
RESTART_DELAY = 3  # longest delay after "connection refused": the gateway is restarting
REFUSED_DELAY = 15  # shortest delay after a refusal, before jitter: an operator must act first
# Longest delay until the agent asks again for hostnames that were refused while it serves others.
MOST_REFUSED_DELAY = 60
# A session that lasted this many seconds before the gateway asked for a new one is followed by a
# dial at once; a shorter one by a delay, or a gateway that always asks would keep both busy.
MOVED = 1
MOST_KIND = 50  # characters of an unknown message's type that the log shows
# Seconds that the agent waits after a GO_AWAY before it dials. If the session ends meanwhile, the
# GO_AWAY did not ask for a new session: Session.close() and a Go gateway send one at the end, too.
GO_AWAY_LOOK = 1
OLD_LOOK = 1  # seconds between checks whether an old session still has visits
# Seconds without a visit after which an old session ends. A gateway that drains may be reading the
# head of a request meanwhile (its HEADER_TIMEOUT is 10 s).
OLD_QUIET = 10
OLD_SESSION = 24 * 3600  # longest life of an old session in seconds, as a visit may last for ever
# Seconds that a session which was replaced waits to see whether another link of this agent has done
# it: its ack may be on the way.
REPLACED_LOOK = 2
# Old sessions at a time; of more, the oldest is ended with its visits. Each costs a connection and
# three threads. So many changes of the file may happen in the time of one download.
OLD_SESSIONS = 32
# A session that held (lasted) for this many seconds was a success: the next delay is the first one
# again. If any session counted, a gateway that ends each at once would never be backed off from.
HELD = 10
# Shortest interval, in seconds, between two tries for hostnames that the gateway says are free. It
# is for a gateway that says so without end.
FREE_PAUSE = 0.25


class Refused(Exception):
    """The gateway refused a registration; the text is the gateway's. ``denied``: its reason for
    each hostname, if it has told them."""

    def __init__(self, text: str, denied: Mapping[str, str]):
        super().__init__(text)
        self.denied = denied


class Ended(Exception):
    """The gateway has ended the session; the text is the gateway's, ``code`` is End's."""

    def __init__(self, end: End):
        super().__init__(end.reason)
        self.code = end.code


class Link:
    """The sessions with one gateway. run() is its thread."""

    def __init__(self, agent: Shared, address: str = SHARED, name: str = "", turn: int = 0):
        """``address``: where to dial, see roster.View; ``name``: see Place; ``turn``: which of the
        configuration's addresses is dialled first."""
        self._agent = agent
        # Guarded by the agent's lock, as it becomes that of the member which it has led to: so a
        # link that dials again comes to the same one.
        self.address, self._name = address, name
        self.turn = turn  # which of the configuration's addresses is dialled next
        self._once: Place | None = None  # dialled next, whatever the members are
        self._replacing: Service | None = None  # it serves, and is to be replaced all the same
        self._seeks = 0  # dials in a row that led to a gateway with a session
        # The agent's lock guards all below.
        self.service: Service | None = None  # the latest
        self.old: list[Service] = []  # earlier ones that are not over yet
        self.unaccepted: Duplex | None = None  # a connection whose registration has no ack yet
        self.probing = False  # ... and which asks for refused hostnames alone
        self.problem = ""  # why the last session or dial has ended; "" once one serves
        self.lasting = False  # see Snapshot
        self.refused: Mapping[str, str] = {}  # ... and the gateway's reasons by hostname
        self.retry_at: float | None = None  # monotonic time of the next dial, during _pause()
        self.hurried = False  # a member has come whose address is this link's: dial at once
        self.over = False  # it will not dial any more

    def view(self) -> View:
        """For roster.py. Caller holds the lock."""
        service = self.current()
        if service is None:
            return View(self.address, ends=self.over)
        return View(self.address, service.member, serves=True)

    def current(self) -> Service | None:
        """The session by which the gateway counts as reached. Caller holds the lock."""
        for service in (self.service, self._replacing):
            if service is not None and service.stays(self._agent.plan):
                return service
        return None

    def services(self) -> list[Service]:
        """All sessions, the latest one first. Caller holds the lock."""
        latest = [] if self.service is None else [self.service]
        return [*latest, *(old for old in reversed(self.old) if old is not self.service)]

    @property
    def place(self) -> Place:
        """Where it dials next, or has its session. Any thread."""
        places = self._agent.plan.places
        if self.address == SHARED:
            return places[self.turn % len(places)]
        return place_of(self.address, self._name) or places[0]

    def _is_first(self) -> bool:
        return self._agent.links[0] is self

    def is_needed(self) -> bool:
        """Caller holds the lock."""
        agent = self._agent
        return roster.is_needed(agent.addresses(), agent.views(), agent.links.index(self))

    def _others(self) -> int:
        """How many other gateways serve the agent now."""
        with self._agent.lock:
            own = any(service.serves() for service in self.services())
            return self._agent.served() - own

    # Sessions, one after the other

    def run(self) -> None:
        """Serve until the agent stops, or the gateway is no member any more."""
        agent, failures = self._agent, 0
        while self._await_need():
            least, most = 0, MAX_DELAY
            service = None
            replaced = False
            refused: dict[str, str] = {}
            lasting = False
            plan = agent.plan
            place, self._once = self._once or self.place, None
            try:
                service = self._begin(plan, place)
                if self._serve(service):
                    failures = 0
                    if agent.plan is plan:
                        self._replacing = service
                    continue
                problem = "the gateway asks for a new session; this one ends when its visits do"
                replaced = True
                self._once = self._own_place(service)
            except Refused as error:
                if str(error) == ALREADY and self._others():
                    self._seek_on(plan)
                    continue
                if str(error).startswith(TAKEN) and self._await_old(plan):
                    continue
                if self._is_first() and not self._others():
                    if (other := agent.on_refusal(str(error))) is not None:
                        agent.change(other)
                        continue
                refused = {
                    name: words_on_one_line(reason)
                    for name, reason in error.denied.items()
                    if name in plan.routes
                }
                problem = f"the gateway refused: {on_one_line(str(error))}{_advice(error, plan)}"
                problem += trouble.of_refusal(str(error), plan.config)
                least = REFUSED_DELAY
                if str(error).startswith(TAKEN):
                    problem += "; another agent serves the hostname, and this one keeps trying"
            except Ended as error:
                problem = f"the gateway says: {on_one_line(str(error))}"
                if error.code == REPLACED:
                    if service is not None and self._is_reached_anew(service.member):
                        failures += 1  # another link has got there at the same time
                        self._pause(plan, retry_delay(failures))
                        continue
                    # If the other agent has the same instance id (a cloned machine), the two would
                    # replace each other for ever. With a new id, this agent gets the hostnames
                    # when the other one is gone.
                    least = REFUSED_DELAY
                    self._renew_instance()
            except ConnectionRefusedError as error:
                problem, most = dial_problem(error), RESTART_DELAY
            except OSError as error:
                config = plan.config if self.address == SHARED else None
                if config is not None:
                    config = config._replace(tunnel_host=place.host, tunnel_port=place.port)
                problem = dial_problem(error, config, served=service is not None)
                lasting = trouble.lasts(error)
                if self.service is not None and self.service.asked:
                    # The gateway restarts. Its port may go on listening (systemd's sockets) while
                    # it drains, so the dial is late rather than refused.
                    most = RESTART_DELAY
            except ProtocolError as error:
                problem, lasting = f"it does not speak gotunnel's protocol: {error}", True
                if service is None:
                    problem += f"; {trouble.RIGHT_PORT}"
            except ConfigError as error:  # a file with a secret
                problem, lasting = str(error), True
            if agent.stopping.is_set():
                break
            lasted = 0 if service is None else monotonic() - service.since
            if replaced and lasted >= MOVED:
                log.info("%s: %s", place, problem)
                failures = 0
                continue
            failures = 1 if lasted >= HELD else failures + 1
            delay = retry_delay(failures, least, most)
            if service is None and self.address == SHARED:
                self.turn += 1
                if self.turn % len(plan.places):  # the next one may work; it is dialled at once
                    delay = 0
            repeated = self.problem == problem
            self.problem, self.refused, self.lasting = problem, refused, lasting
            with agent.lock:
                agent.failures += 1
                if self._is_first() and not any(view.serves for view in agent.views()):
                    self.address = SHARED
            self._log_failure(place, problem, delay, repeated)
            if delay:
                self._pause(plan, delay)
        self._finish()

    def _log_failure(self, place: Place, problem: str, delay: float, repeated: bool) -> None:
        """While others serve, a gateway's failures are news once, and none if it has left them."""
        others = self._others()
        if not others and delay:
            log.warning("%s: %s; next try in %.1f s", place, problem, delay)
        elif not others:
            log.warning("%s: %s; trying the next address", place, problem)
        else:
            with self._agent.lock:
                needed = self._agent.stopping.is_set() or self.is_needed()
            level = logging.WARNING if needed and not repeated else logging.DEBUG
            serve = "1 other gateway serves" if others == 1 else f"{others} other gateways serve"
            then = f"next try in {delay:.1f} s" if delay else "trying the next address"
            log.log(level, "%s: %s; %s; meanwhile %s", place, problem, then, serve)

    def _await_need(self) -> bool:
        """Wait until the link has to dial. False if it never has to again."""
        agent = self._agent
        if self._must_dial():
            return True
        # Its session may go on, until another link's takes its place.
        with agent.lock:
            self._keep_old(self.service)
        agent.retire_old(None)
        with agent.lock:
            while self._is_first() and not agent.stopping.is_set():
                if self.is_needed():
                    return True
                agent.lock.wait()
        return False

    def _must_dial(self) -> bool:
        agent = self._agent
        with agent.lock:
            if agent.stopping.is_set():
                return False
            addresses = roster.wanted(agent.addresses(), agent.views())
            if self._is_first() and not self._replaces() and self.address not in addresses:
                self.address = SHARED
            return self._wants()

    def _replaces(self) -> bool:
        """Whether its session goes on until it has another one. Caller holds the lock."""
        return self._replacing is not None and self._replacing.serves()

    def _wants(self) -> bool:
        """Whether it has to dial. Caller holds the lock."""
        return self._replaces() or self._once is not None or self.is_needed()

    def _keep_old(self, service: Service | None) -> None:
        """Count a session that may go on as an old one. Caller holds the lock."""
        if service is not None and service.outcome is None and service not in self.old:
            self.old.append(service)

    def _finish(self) -> None:
        """It dials no more. Sessions that it has may go on."""
        with self._agent.lock:
            self.over = True
            self._forget_if_over()
        self._agent.note_members()

    def _forget_if_over(self) -> None:
        """Caller holds the lock."""
        if self.over and not self.old and not self._is_first():
            self._agent.forget(self)

    def _pause(self, plan: Plan, seconds: float) -> None:
        """Wait, unless there is another plan than ``plan``, the agent stops, or the dial is needed
        at once or not at all."""
        agent = self._agent

        def over() -> bool:
            return (
                agent.plan is not plan
                or agent.stopping.is_set()
                or self.hurried
                or not self._wants()
            )

        self.retry_at = monotonic() + seconds
        agent.tell()
        with agent.lock:
            agent.lock.wait_for(over, seconds)
            if self.hurried:
                self.hurried, self._seeks = False, 0
        self.retry_at = None
        agent.tell()

    # Members

    def _seek_on(self, plan: Plan) -> None:
        """The dial has led to a gateway with a session: wait before the next one."""
        self._seeks += 1
        with self._agent.lock:
            pause = self._seek_pause()
        log.debug("%s: a gateway with a session answered, %d times", self.place, self._seeks)
        self._pause(plan, pause * (0.5 + random.random() / 2))

    def _seek_pause(self) -> float:
        """Seconds to wait after _seeks such dials. Caller holds the lock."""
        delay = seek_delay(self._seeks, self._agent.addresses(), self.address)
        return min(delay, MAX_DELAY)

    def _own_place(self, service: Service) -> Place | None:
        """The address of that gateway alone. Its successor may be there, before it is told as a
        member."""
        with self._agent.lock:
            address = (service.members or {}).get(service.member, SHARED)
        return place_of(address, service.place.name)

    def _is_reached_anew(self, member: str) -> bool:
        """Whether another link has a session with the member, or gets one just now: that one has
        replaced ours."""
        if not member:
            return False

        def found() -> bool:
            return any(
                service.member == member and service.outcome is None
                for link in self._agent.links
                if link is not self
                for service in link.services()
            )

        def registers() -> bool:
            others = (link for link in self._agent.links if link is not self)
            return any(link.unaccepted is not None for link in others)

        with self._agent.lock:
            self._agent.lock.wait_for(lambda: found() or not registers(), REPLACED_LOOK)
            return found()

    def _renew_instance(self) -> None:
        """Take another id, in all sessions: those with the old one would keep the hostnames."""
        agent = self._agent
        with agent.lock:
            agent.instance = new_instance()
            others = [
                service.session
                for link in agent.links
                if link is not self
                for service in link.services()
            ]
        for session in others:
            session.close("the agent takes another instance id")

    # One session

    def _begin(self, plan: Plan, place: Place) -> Service:
        """Dial and register. The new session replaces the one before. Raises ConfigError if a file
        with a secret cannot be read."""
        agent = self._agent
        config = with_secrets(plan.config)
        service = Service(self._dial(plan, place), plan, place)
        session = service.session
        session.on_leave = lambda: self._ask(service)
        with agent.lock:
            before, self.service = self.service, service
            self._keep_old(before)
            old = list(self.old)
            overlap = bool(old) or any(
                other.serves() and not other.stays(plan)
                for link in agent.links
                for other in link.services()
            )
        for earlier in old:
            if not earlier.asked and OVERLAP not in earlier.features:
                self._leave(earlier)  # or its gateway would cut its visits for the new session
        alone = not self._others()
        try:
            if agent.stopping.is_set():  # stop() may have run before it could see this session
                raise SessionClosed("the agent stops")
            # Visits without a thread would wait for ever: rather dial again.
            agent.workers.prepare()
            control, messages = self._register(service, config, overlap=overlap, waits=agent.waits)
            served = [name for name, route in service.routes.items() if not route.problem]
            if served or not service.waited_for():
                level = logging.INFO if alone else logging.DEBUG
                log.log(level, "%s: serving %s", place, some(served) or "nothing")
            for hostname in served:
                self._log_url(hostname, service.routes[hostname])
            self._attend(service, control, messages)
        except BaseException as error:
            self._end(service, error)
            raise
        self.problem, self._seeks, self._replacing = "", 0, None
        agent.retire_old(self)
        agent.note_members()
        self._share(service)
        agent.tell()
        return service

    def _share(self, service: Service) -> None:
        """Have the other links ask for what this one has got: their gateways tell one waiting agent
        after the other that it is free, and this agent may be a later one there."""
        with self._agent.lock:
            for link in self._agent.links:
                other = link.current()
                if other is not None and other is not service:
                    other.freed |= other.waited_for() & service.routes.keys()
            self._agent.lock.notify_all()

    def _register(
        self, service: Service, config: Config, *, overlap: bool, waits: bool
    ) -> tuple[Stream, Iterator[Message]]:
        """Register a new session. Returns its control stream and the messages that follow there.
        ``waits``: see registration(). Raises Refused, and what ends the session."""
        agent = self._agent
        service.session.start()
        with agent.lock:
            links = [link for link in agent.links if link is not self]
            besides = sorted(reached(link.view() for link in links))
            opened = [each.ports for link in links for each in link.services() if each.serves()]
        register = registration(config, agent.instance, waits, opened)
        register = register._replace(overlap=overlap, besides=tuple(besides))
        service.control = control = service.session.open(encode_message(register))
        messages = _messages(control)
        ack = _expect_ack(next(messages))
        self._take_answer(service, ack)
        with agent.lock:
            self.unaccepted = None
            agent.sessions += 1
            service.since = monotonic()
            if MEMBERS in ack.features and is_id(ack.member):
                service.member = ack.member
            agent.lock.notify_all()
        return control, messages

    def _attend(self, service: Service, control: Stream, messages: Iterator[Message]) -> None:
        """Have threads serve a session that is registered."""
        self._agent.watch_targets(service, control)
        spawn("accept", self._accept, service)
        spawn("control", self._read_control, service, control, messages)

    def _log_url(self, hostname: str, route: Route) -> None:
        """Say once where a tunnel leads from and to. Of several gateways the first one tells it."""
        told = (route.url, shown_target(route.tunnel))
        before = self._agent.logged.get(hostname, ())
        if len(before) == 2 and before[1] == told[1] and self._others():
            return
        if route.url and before != told:
            self._agent.logged[hostname] = told
            log.info("%s -> %s", *told)

    def _serve(self, service: Service) -> bool:
        """Wait until a session is over, and raise its outcome. Returns False if the gateway asks
        for a new session; True if the agent wants one, for another plan, or for hostnames that were
        refused before."""
        agent = self._agent

        def over() -> bool:
            return (
                service.asked
                or service.outcome is not None
                or agent.plan is not service.plan
                or agent.stopping.is_set()
            )

        tries, asked_at = 0, service.since
        while True:
            refused = service.refused_for_now()
            tries += 1
            # Of those that are waited for the gateway tells; a message may get lost.
            least = MOST_REFUSED_DELAY if refused <= service.waited_for() else REFUSED_DELAY
            delay = retry_delay(tries, least, MOST_REFUSED_DELAY) if refused else None
            with agent.lock:
                agent.lock.wait_for(lambda: over() or service.freed, delay)
                if service.freed:
                    pause = max(FREE_PAUSE, self._seek_pause() if self._seeks else 0)
                    agent.lock.wait_for(over, asked_at + pause - monotonic())
                if over():
                    break
                freed, service.freed = service.freed, frozenset()
            if freed and not service.routes:
                return True
            asked_at, names = monotonic(), freed & refused or refused
            if self._ask_again(service, names):
                return True
            if self._seeks:  # the dial has led to another gateway
                with agent.lock:
                    service.freed |= names
        with agent.lock:
            if service.asked and not service.at_once:
                agent.lock.wait_for(lambda: service.outcome is not None, GO_AWAY_LOOK)
        if agent.stopping.is_set():  # stop() ends the session when its visits are done
            with agent.lock:
                agent.lock.wait_for(lambda: service.outcome is not None)
        if service.outcome is not None:
            service.session.join(LAST_WORDS)
            if not service.at_once or not isinstance(service.outcome, SessionClosed):
                raise service.outcome
            return False  # it had no visits, so the gateway has ended it already
        return agent.plan is not service.plan

    def _ask_again(self, service: Service, names: frozenset[str]) -> bool:
        """Ask for refused hostnames by a session of their own. True if the gateway has granted one:
        that session serves it until a session with all hostnames takes over."""
        plan, place, probe = service.plan, service.place, None
        self.probing = True
        try:
            config = with_secrets(plan.config)
            tunnels = tuple(tunnel for tunnel in config.tunnels if tunnel.hostname in names)
            probe = Service(self._dial(plan, place), plan, place)
            probe.routes = {name: plan.routes[name] for name in names}
            asked = config._replace(tunnels=tunnels)
            control, messages = self._register(probe, asked, overlap=True, waits=False)
            if not probe.routes:
                raise Refused("no reason given", probe.refused)
            log.info("%s: grants %s now", place, some(probe.routes))
            with self._agent.lock:
                if self._agent.stopping.is_set():  # stop() may have run before it could see it
                    raise SessionClosed("the agent stops")
                self.old.append(probe)  # it serves until the next one takes over
            self._attend(probe, control, messages)
            self._seeks = 0
            return True
        except (Refused, OSError, ProtocolError, ConfigError) as error:
            if probe is not None:
                self._end(probe, error)
            is_elsewhere = isinstance(error, Refused) and str(error) == ALREADY
            self._seeks = self._seeks + 1 if is_elsewhere else 0
            if isinstance(error, Refused) and not is_elsewhere:
                told = {
                    name: words_on_one_line(error.denied.get(name, str(error))) for name in names
                }
                self._note_refused(service, {**service.refused, **told})
                self._agent.tell()
            else:
                log.debug("%s: cannot ask again for %s: %s", place, some(names), error)
            return False
        finally:
            self.probing = False

    def break_off(self) -> None:
        """Stop asking again, because the link's thread has to dial for all hostnames. Any
        thread."""
        with self._agent.lock:
            unaccepted = self.unaccepted if self.probing else None
        if unaccepted is not None:
            unaccepted.reset()

    def _note_refused(self, service: Service, refused: Mapping[str, str]) -> None:
        """Note which hostnames the gateway refuses, and log each reason once."""
        with self._agent.lock:
            service.refused = refused
        waited_for, news = service.waited_for(), []
        for name, reason in refused.items():
            if self._agent.logged.get(name) != (reason,):
                self._agent.logged[name] = (reason,)
                if name in waited_for and reason == f"{TAKEN}: {name}":  # no more to say of it
                    news.append(name)
                    continue
                more = "; the agent keeps asking for it" * (name in service.refused_for_now())
                log.error("%s: not served: the gateway refused: %s%s",
                          name, reason, more)  # fmt: skip
        if news:
            log.warning("%s: %s; this one will serve as soon as it can",
                        service.place, in_wait(some(news)))  # fmt: skip

    def _ask(self, service: Service, at_once: bool = False) -> None:
        """Note that the gateway asks for a new session. Any thread; does not block."""
        with self._agent.lock:
            service.asked = True
            service.at_once |= at_once
            self._agent.lock.notify_all()
        self.break_off()

    def _note_free(self, service: Service, message: Free) -> None:
        """Have the link's thread ask for hostnames that another agent served."""
        with self._agent.lock:
            service.freed |= service.refused.keys() & set(message.hostnames)
            self._agent.lock.notify_all()

    def _read_control(self, service: Service, control: Stream, messages: Iterator[Message]) -> None:
        """Thread "control": act on the gateway's messages until the session is over."""
        outcome: Exception = SessionClosed("the gateway ended the session")
        try:
            certificates = self._certificates_of(service)
            for message in messages:
                if isinstance(message, Certificate):
                    _log_certificate(service, message, certificates)
                    self._agent.tell()
                elif isinstance(message, Port):
                    self._take_port(service, message)
                elif isinstance(message, Free):
                    self._note_free(service, message)
                elif isinstance(message, Members):
                    self._take_members(service, message)
                elif isinstance(message, End) and message.code == MOVE:
                    self._ask(service, at_once=True)
                elif isinstance(message, End):
                    raise Ended(message)
                elif isinstance(message, Ping):
                    # The session may be over already. Then read on: End may have come, with why.
                    with contextlib.suppress(ConnectionError):
                        pong = encode_message(Pong(int(time() * 1000)))
                        control.write(pong, timeout=SILENCE_TIMEOUT)
                else:
                    raise ProtocolError(f"a {type(message).__name__.lower()} after the ack")
        except (OSError, ProtocolError, Ended) as error:
            outcome = error
        finally:
            self._end(service, outcome)

    def _certificates_of(self, service: Service) -> dict[str, str]:
        """Where the session notes the states of certificates. Gateways that are one share it, so
        that each state is news once."""
        agent = self._agent
        with agent.lock:
            if service is not self.service:
                return {}
            if not any(
                other.serves()
                for link in agent.links
                if link is not self
                for other in link.services()
            ):
                agent.certificates = {}
            return agent.certificates

    def _take_members(self, service: Service, message: Members) -> None:
        """The gateway tells which gateways are one."""
        if not service.member:  # it has not said in its ack that it is one of them
            return
        members = usable(message.members)
        with self._agent.lock:
            service.members = members
            address = members.get(service.member, SHARED)
            if service is self.service and address != SHARED:
                self.address, self._name = address, service.place.name
        self._agent.note_members()
        self._agent.tell()

    def _end(self, service: Service, outcome: BaseException) -> None:
        """End a session, and note why."""
        agent = self._agent
        with agent.lock:
            service.outcome = outcome
            if service.since == math.inf:  # there will be no ack
                self.unaccepted = None
            agent.lock.notify_all()
            agent.ended.notify_all()
        if service is self.service:
            self.break_off()
        if self._agent.health is not None:
            self._agent.health.forget(service)
        service.session.close("the agent ends the session")
        service.session.join(LAST_WORDS)
        with agent.lock:
            if service in self.old:
                self.old.remove(service)
                log.debug("%s: an old session is over: %s", service.place, outcome)
            self._forget_if_over()
            agent.lock.notify_all()
            agent.ended.notify_all()
        agent.note_members()
        agent.tell()

    # Old sessions, which a new one has replaced

    def retire_old(self, replaced: Callable[[Service], bool]) -> None:
        """Have the old sessions that are ``replaced`` end when their visits have ended."""
        now = monotonic()
        with self._agent.lock:
            old = [service for service in self.old if replaced(service)]
        for service in old[:-OLD_SESSIONS]:
            service.session.close("there are too many old sessions")
        for service in old:
            if not service.asked:  # it was of another plan
                service.session.leave(refuses=False)
            self._end_later(service, now)

    def _leave(self, service: Service) -> None:
        """Have the gateway give a session's hostnames to the next one; its visits go on."""
        service.session.leave(refuses=False)
        self._end_later(service, monotonic())

    def _end_later(self, service: Service, now: float) -> None:
        if service.ends_at == math.inf:
            service.ends_at, service.busy_at = now + OLD_SESSION, now
            self._look_later(service)

    def _look_later(self, service: Service) -> None:
        service.session.call_later(OLD_LOOK, lambda: self._look(service))

    def _look(self, service: Service) -> None:
        """Close an old session if it has no visits. Its demultiplexer thread: must not block."""
        now = monotonic()
        if service.has_visits():
            service.busy_at = now
        if now < min(service.busy_at + OLD_QUIET, service.ends_at):
            self._look_later(service)
        else:
            service.session.close("a new session has replaced it")

    def _await_old(self, plan: Plan) -> bool:
        """Wait for the end of our old sessions, if a gateway without OVERLAP has just refused their
        hostnames. False if there are none."""
        agent = self._agent
        with agent.lock:
            if all(OVERLAP in service.features for service in self.old):
                return False
            log.info("%s: the gateway accepts a new session when the old one has ended; waiting "
                     "for that", self.place)  # fmt: skip
            agent.lock.wait_for(
                lambda: not self.old or agent.plan is not plan or agent.stopping.is_set()
            )
        return True

    def _dial(self, plan: Plan, place: Place) -> Session:
        addresses = addresses_of(place.host, place.port)
        if self._seeks:  # the first one leads to a gateway with a session
            random.shuffle(addresses)
        if self._agent.stopping.is_set():  # the name may have taken long to resolve
            raise GivenUp("the agent stops")
        duplex = Duplex(connect(addresses, Deadline(DIAL_TIMEOUT), stop=self._agent.waker))
        duplex.stall_timeout = plan.config.stall_timeout
        try:
            with self._agent.lock:
                self.unaccepted = duplex
            if self._agent.stopping.is_set():  # stop() may have run before it could see it
                raise GivenUp("the agent stops")
            begin_tls(duplex, plan.context, place.name, DIAL_TIMEOUT)
        except BaseException:
            with self._agent.lock:
                self.unaccepted = None
            duplex.close()
            raise
        return Session(
            duplex, client=True, name=str(place), window=START_WINDOW,
            observer=self._agent.observer,
        )  # fmt: skip

    def _take_answer(self, service: Service, ack: Ack) -> None:
        """Note what the gateway grants. What another gateway has said before is no news."""
        agent, answer = self._agent, read_answer(service.routes, ack)
        others = self._others()
        for hostname, route in answer.routes.items():
            port = answer.ports.get(hostname, "")
            if route.problem:
                by = f" (by {service.place})" if others else ""
                problem = on_one_line(route.problem) + by
                self._log_news(logging.ERROR, "%s: not served: %s", hostname, problem)
            elif port:
                self._log_news(logging.INFO, "%s: on port %s of the gateway", hostname, port)
        with agent.lock:
            service.routes, service.features = answer.routes, ack.features
            service.ports = answer.ports
        self._note_refused(service, answer.refused)

    def _log_news(self, level: int, line: str, hostname: str, text: str) -> None:
        """Log a line about a hostname, but not again for another gateway."""
        repeated = self._agent.news.get(hostname) == text and self._others()
        self._agent.news[hostname] = text
        log.log(logging.DEBUG if repeated else level, line, hostname, text)

    def _take_port(self, service: Service, message: Port) -> None:
        """Serve a tunnel whose public port was not available at first."""
        port = on_one_line(message.port, 5)
        with self._agent.lock:
            route = service.routes.get(message.hostname)
            if route is None or not route.awaits_port:
                return
            served = route._replace(problem="", awaits_port=False, url=url_of(message.url))
            service.routes = {**service.routes, message.hostname: served}
            service.ports = {**service.ports, message.hostname: port}
        self._log_news(logging.INFO, "%s: on port %s of the gateway", message.hostname, port)
        self._log_url(message.hostname, served)
        self._agent.tell()

    def _accept(self, service: Service) -> None:
        while True:
            try:
                stream = service.session.accept()
            except SessionClosed:
                return
            with self._agent.lock:
                self._agent.running += 1
                self._agent.streams += 1
            self._agent.tell()
            try:
                self._agent.workers.submit(self._serve_stream, service, stream)
            except Stopped:  # the agent has stopped, and all streams have ended with the session
                with self._agent.lock:
                    self._agent.running -= 1
                return

    def _serve_stream(self, service: Service, stream: Stream) -> None:
        try:
            serve(stream, service.routes.get, self._agent.targets, self._agent.follower)
        except Exception:
            log.exception("stream %d: reset by an unexpected error (bug, traceback follows)",
                          stream.id)  # fmt: skip
            stream.reset()
        finally:
            with self._agent.lock:
                self._agent.running -= 1
                self._agent.ended.notify_all()
            self._agent.tell()


def _log_certificate(service: Service, message: Certificate, told: dict[str, str]) -> None:
    """Log the state of a hostname's certificate, if it has changed. ``told``: the last state of
    each hostname that was logged."""
    route = service.routes.get(message.hostname)
    if route is None or route.problem or told.get(message.hostname) == message.state:
        return
    told[message.hostname] = message.state
    level = logging.INFO if message.state in ("ready", "waiting") else logging.WARNING
    log.log(level, "%s: certificate: %s", message.hostname, words_and_link(message.state))


def _messages(control: Stream) -> Iterator[Message]:
    """The gateway's messages. Raises SessionClosed when the gateway ends the session, TimeoutError
    if it is silent."""
    reader, timeout = MessageReader(_pass_over), ACK_TIMEOUT
    while True:
        try:
            data = control.read(timeout=timeout)
        except TimeoutError:
            raise TimeoutError(f"the gateway was silent for {timeout} s") from None
        if not data:
            raise SessionClosed("the gateway ended the session")
        yield from reader.feed(data)
        timeout = SILENCE_TIMEOUT


def _pass_over(kind: str) -> None:
    kind = on_one_line(kind, MOST_KIND)
    log.debug("messages of type %s from the gateway are ignored: this agent does not know them",
              kind)  # fmt: skip


def _expect_ack(message: Message) -> Ack:
    if not isinstance(message, Ack):
        raise ProtocolError(f"a {type(message).__name__.lower()}, expected an ack")
    if not message.ok:
        raise Refused(message.error or "no reason given", message.denied)
    return message


def _advice(refused: Refused, plan: Plan) -> str:
    """What to add to a refusal by a gateway that takes an open name for a bad hostname."""
    asked = [name for name in plan.routes if name.endswith(OPEN)]
    is_old = not refused.denied and str(refused).startswith(INVALID)
    return f"; {NO_NAMES}" if is_old and any(name in str(refused) for name in asked) else ""


def shown_target(tunnel: Tunnel) -> str:
    """A tunnel's target for people: as a URL, if it is a website."""
    target = tunnel.target
    plain = tunnel.mode == "http" and not target.tls and not target.path
    return f"http://{target}" if plain else str(target)


def dial_problem(error: OSError, config: Config | None = None, *, served: bool = False) -> str:
    """Why a dial has failed, or a session has ended, in words, with advice; see trouble.py."""
    return trouble.of_dial(error, config, served=served)


def retry_delay(
    failures: int,
    least: float = 0,
    most: float = MAX_DELAY,
    random: Callable[[], float] = random.random,
) -> float:
    """Seconds to wait after ``failures`` in a row, at least one (exponential backoff with jitter).

    The delay doubles with each failure, within ``least`` and ``most``, and is then cut by a random
    part of up to a half: agents that a gateway lost all at once must not come back all at once.
    """
    delay = FIRST_DELAY * 2 ** min(failures - 1, 16)  # 16: far past any limit, without overflow
    return max(least, min(delay, most)) * (0.5 + random() / 2)
