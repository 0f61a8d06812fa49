"""The gateway's view of a registered agent: its hostnames, its data streams, its end.

newcomer.py makes a Tunnel when a registration is in order; the Tunnel takes the session over. It
may have to wait for its hostnames until another tunnel has ended (takeover.py).

    CLAIMING --serve()--> SERVING --GO_AWAY of the agent--> LEAVING --> GONE
       \\                     \\--- session over, replaced, or credential taken away --/
        \\--- refused, or session over ------------------------------------------------/

The session's demultiplexer thread, which also sends the pings, runs from serve() on. A tunnel that
gets no hostname may wait for one (standby.py): it is SERVING, and has no routes.
"""

from __future__ import annotations

import contextlib
import enum
import logging
import secrets
import threading
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping
from functools import partial
from time import time

from gotunnel import (
    CERTIFICATES,
    HALF_CLOSE,
    HEALTH,
    HOST_HEADER,
    HTTP2,
    LATER_PORTS,
    MEMBERS,
    MESSAGE_LIMIT,
    MOVE,
    NAMES,
    NORMAL,
    OVERLAP,
    PARTIAL,
    POLICIES,
    POOLS,
    PORTS,
    REASONS,
    REFUSALS,
    REPLACED,
    START_WINDOW,
    UPGRADES,
    URLS,
    VISITOR_ADDRESS,
    WAITS,
    WILDCARDS,
    Ack,
    End,
    Ends,
    Free,
    Health,
    Message,
    Port,
    Session,
    Stream,
    encode_data_header,
    encode_message,
)
from gotunnel_agent.common.duplex import Observer
from gotunnel_agent.common.hostnames import HTTPS_PORT, OPEN
from gotunnel_agent.common.one_line import some, words_on_one_line
from gotunnel_agent.common.process import Stopped
from gotunnel_agent.common.refusals import BY_CODE, Refusal

from ..routes import AgentBusy, Registry, Route
from . import limits
from .agents_file import Limits
from .claims import Claims
from .control_stream import ControlStream
from .credentials import Credentials
from .health import TargetHealth
from .heartbeat import Heartbeat
from .identity import Identity
from .members import Membership, Teller
from .pool import with_pool
from .ports import PortRefused, Ports
from .registration import Agent, Asked, Wanted
from .standby import Holder, Standby, in_wait
from .stream_pool import KeptStreams, OwnStreams

log = logging.getLogger("gotunnel.tunnel")

FEATURES = frozenset({  # the extensions that this gateway knows
    CERTIFICATES, HALF_CLOSE, HEALTH, HOST_HEADER, HTTP2, LATER_PORTS, MEMBERS, NAMES, OVERLAP,
    PARTIAL, POLICIES, POOLS, PORTS, REASONS, UPGRADES, REFUSALS, URLS, VISITOR_ADDRESS, WAITS,
    WILDCARDS,
})  # fmt: skip
# Seconds that a session has to send its END message, if another tunnel waits for its hostnames. The
# message may be queued behind other output; over a dead connection it can never be sent.
LAST_WORD = 0.2
REVOKED = "revoked"  # END's code: the credential no longer permits the session
ENDED = "ended"  # END's code: the operator has ended the session
SILENT = "silent"  # END's code: the agent has not answered in time, and dials again at once
OPEN_TIMEOUT = 10  # seconds that a visit waits while 256 opened streams have no answer yet
# When a session has so few stream ids left, its agent is asked for a new session. At 20,000 visits
# a second that leaves a quarter of an hour.
ID_RESERVE = 1 << 24
# The session of an agent that cannot be asked is ended at so few ids, and its visits are cut: they
# would be cut anyway when no id is left for the next visit.
LAST_IDS = 1 << 17
USED_UP = "its stream ids are used up"
# Seconds until a refused port is tried again, doubled each time up to the second number. A freed
# port should serve soon, and a try costs little.
PORT_DELAY, MOST_PORT_DELAY = 1, 30
MOST_REASON = 200  # characters of a denied hostname's reason, in an ack that would be too long
KEPT_LOOK = 5  # interval of the check for kept streams that are too old, in seconds
MOVE_LATER = 1  # seconds that the agents that serve get ahead of those that wait
LEFT_LOOK = 0.25  # interval of the check whether a session that takes no visits has none left


class Tunnels:
    """The tunnels of a gateway, and what they share. Any thread."""

    def __init__(
        self,
        *,
        credentials: Credentials,
        registry: Registry,
        claims: Claims | None = None,
        ports: Ports,
        ensure_certificates: Callable[[tuple[str, ...], tuple[Hashable, ...], Limits], object],
        certificate_state: Callable[[str], object],
        submit: Callable[[Callable[[], object]], object],
    ):
        """``claims`` grant hostnames; None: ``registry`` does. ``ports`` are the public ports
        for agents. ``ensure_certificates(hostnames, blame,
        limits)`` orders the certificates that hostnames lack, and may wait for the disk; failed
        orders are counted by ``blame``, and ``limits`` are the credential's.
        ``certificate_state(hostname)`` says how a certificate stands; its text is for
        gotunnel.Certificate. ``submit(function)`` has a worker call it that may wait for the
        system."""
        self.credentials = credentials
        self.registry = registry
        self.claims: Claims = registry if claims is None else claims
        self.ports = ports
        self.ensure_certificates = ensure_certificates
        self.certificate_state = certificate_state
        self.submit = submit
        self.standby = Standby(registry)  # the agents that wait for hostnames of others
        registry.on_free = self.standby.freed
        self.visitors_port = HTTPS_PORT  # that visitors type; to be set before agents come
        self.observer: Observer | None = None  # of each session; tools set it before agents come
        # Of a gateway that is one of several; to be set before agents come.
        self.membership: Membership | None = None
        # Held to count what the sessions of a credential have, and to begin a visit then.
        self.limiting = threading.Lock()
        self._tunnels: set[Tunnel] = set()
        self._lock = threading.Lock()  # guards _tunnels

    def add(self, tunnel: Tunnel) -> None:
        with self._lock:
            self._tunnels.add(tunnel)

    def discard(self, tunnel: Tunnel) -> bool:
        """Forget a tunnel whose connection is closed; False if that was done before."""
        with self._lock:
            known = tunnel in self._tunnels
            self._tunnels.discard(tunnel)
        return known

    def _all(self) -> list[Tunnel]:
        with self._lock:
            return list(self._tunnels)

    def registered(self) -> list[Tunnel]:
        """The tunnels that serve hostnames now."""
        return [tunnel for tunnel in self._all() if tunnel.routes]

    def shown(self) -> list[Tunnel]:
        """Those, and the ones that wait for hostnames."""
        return [tunnel for tunnel in self._all() if tunnel.routes or tunnel.waits_for]

    def by_id(self, id: str) -> Tunnel | None:
        """The tunnel with that id whose session goes on, also one that leaves; or None."""
        found = (tunnel for tunnel in self._all() if tunnel.id == id)
        return next((tunnel for tunnel in found if tunnel.goes_on), None)

    def of_credential(self, credential: tuple[str, str]) -> list[Tunnel]:
        """All tunnels of one credential, also those that leave: they may have visits."""
        return [tunnel for tunnel in self._all() if tunnel.identity.credential == credential]

    def end_revoked(self) -> None:
        """End the sessions whose credential no longer permits them, also those that leave: they may
        have visits."""
        for tunnel in self._all():
            if tunnel.stage is not Stage.CLAIMING:  # newcomer.py checks it again for each claim
                tunnel.end_if_revoked()
                tunnel.move_if_retired()

    def members_changed(self) -> None:
        """Tell all agents of the members as they are now. Any thread; waits for nothing."""
        for tunnel in self._all():
            tunnel.members_changed()

    def move(self) -> None:
        """Ask all agents to dial again at once; running visits go on. The gateway stops, and no
        longer listens: they reach its successor. Those that wait for hostnames follow a moment
        later, so that the same agents serve them there."""
        reason = "the gateway stops"
        for tunnel in self._all():
            if tunnel.waits_for and not tunnel.routes:
                tunnel.call_later(MOVE_LATER, partial(tunnel.move, reason))
            elif tunnel.stage is Stage.SERVING:
                tunnel.move(reason)

    def close(self) -> None:
        """End all sessions, and wait until they have ended."""
        tunnels = self._all()
        for tunnel in tunnels:
            tunnel.end("the gateway stops")
        for tunnel in tunnels:
            tunnel.join()


class Stage(enum.IntEnum):
    """How far the life of a Tunnel is. It never goes back."""

    CLAIMING = 1  # it has no hostname yet, or its agent has no ack yet
    SERVING = 2  # the agent has its ack, and the session runs
    LEAVING = 3  # the agent takes no new streams: the hostnames are free, running visits go on
    GONE = 4  # the session is over


class Tunnel:
    """A session with an agent whose registration is in order."""

    refusals: Mapping[int, Refusal] = BY_CODE  # see routes.Tunnel

    def __init__(
        self,
        tunnels: Tunnels,
        agent: Agent,
        session: Session,
        control: ControlStream,
        *,
        features: Iterable[str],
        asked: Asked,
        ports: Mapping[str, str],
        make_room: Callable[[], object],
    ):
        """Takes ``session`` over, which is not started yet; ``control`` is its control stream.
        ``features`` are the extensions that the agent knows, in its order. ``asked`` has the wanted
        routes; ``ports`` the wanted public ports, by hostname as the agent spells it.
        ``make_room()`` is called once, when the connection is closed."""
        self.id = secrets.token_hex(6)  # random, so that no later session is mistaken for this one
        self.agent = agent
        self.features = tuple(name for name in features if name in FEATURES)
        self.half_close = HALF_CLOSE in self.features  # a visitor's FIN may be passed to the agent
        self.upgrades = UPGRADES in self.features  # ... also in http mode, after open(relayed=True)
        self.wanted = {name: self._route(wanted) for name, wanted in asked.routes.items()}
        self.policies = asked.policies  # by hostname, for other gateways (cluster/origin.py)
        self.denied = dict(asked.denied)  # hostnames that are not served, and why; see Ack
        self.routes: dict[str, Route] = {}  # by hostname; those served now; replaced whole
        self.health = TargetHealth(str(agent))
        self.unwell: Mapping[str, str] = {}  # see routes.Tunnel
        self.since = time()  # wall-clock seconds of the registration
        self.gone = threading.Event()  # it holds no hostname any more, and never will
        self.moving = False  # the agent was asked for another session; never False again
        self.failed = Tally()  # by hostname: visits in tcp mode whose target was not reached
        self._stage = Stage.CLAIMING
        self._parting: End | None = None  # what _part() tells the agent: why the session ends
        self._lock = threading.Lock()  # guards _stage and _parting, and is held to replace routes
        self._tunnels = tunnels
        self._session = session
        self._control = control
        # How the agent spells each hostname in its registration.
        self._spelt = {hostname: wanted.name for hostname, wanted in asked.routes.items()}
        self._ports = ports if PORTS in self.features else {}
        # Hostnames that get a port later: the port, or None while it is not open.
        self._missing: dict[str, int | None] = {}
        self._port_delay = PORT_DELAY
        self._make_room = make_room
        self._awaited: Mapping[str, Holder] = {}  # denied hostnames that it waits for: see await_()
        self._heartbeat = Heartbeat(session, control, self._fell_silent, self._take_messages)
        self._members: Teller | None = None
        if tunnels.membership is not None and MEMBERS in self.features:
            self._members = Teller(tunnels.membership, session, control, agent.instance)
        self._kept = KeptStreams()
        self._own = OwnStreams()
        most = agent.identity.limits
        unlimited = most.streams is None and most.visits is None
        self._allowance = None if unlimited else Allowance(agent.identity, tunnels)
        session.on_leave = self._leaving
        session.on_end = self._ended
        session.on_close = self._closed

    def __str__(self) -> str:
        return str(self.agent)

    def __repr__(self) -> str:
        return f"<Tunnel {self.agent.host} {some(self.routes) or self.stage.name}>"

    @property
    def identity(self) -> Identity:
        return self.agent.identity

    @property
    def waits_for(self) -> tuple[str, ...]:
        """The hostnames that it waits for, which others have."""
        return tuple(self._awaited) if self.stage is Stage.SERVING else ()

    @property
    def round_trip(self) -> float | None:
        """Seconds that the last ping took to the agent and back, None before the first one."""
        return self._heartbeat.round_trip

    @property
    def stage(self) -> Stage:
        with self._lock:
            return self._stage

    @property
    def goes_on(self) -> bool:
        """Whether the session has not ended, and is not about to."""
        with self._lock:
            return self._stage is not Stage.GONE and self._parting is None

    @property
    def heard_at(self) -> float:
        """Monotonic time when the agent last sent something."""
        return self._session.heard_at

    # Registration

    def _route(self, wanted: Wanted) -> Route:
        route = wanted.route(self)
        return route if wanted.pooled is None else with_pool(route, wanted.pooled, self.agent)

    def deny(self, hostnames: Mapping[str, str]) -> None:
        """Do without wanted hostnames, for the reasons given."""
        for hostname, reason in hostnames.items():
            self.wanted.pop(hostname, None)
            self.denied[self._spelt[hostname]] = reason

    def await_(self, holders: Mapping[str, Holder]) -> bool:
        """Others have these denied hostnames: the tunnel will wait for them, if its agent knows
        WAITS. Returns whether it will wait for any. To be called before serve()."""
        standby = self._tunnels.standby
        if holders and WAITS in self.features and standby.has_room():
            self._awaited = holders
            if not standby.knows(self.agent):
                log.info("%s %s", self, in_wait(holders))
        return bool(self._awaited)

    def refused(self) -> list[str]:
        """Why hostnames are not served for which it does not wait."""
        awaited = {self._spelt[hostname] for hostname in self._awaited}
        return [reason for name, reason in self.denied.items() if name not in awaited]

    def waits_elsewhere(self) -> bool:
        """Whether another session of the same agent waits: that was logged already."""
        return self._tunnels.standby.knows(self.agent)

    def serve(self) -> None:
        """The hostnames are claimed: send the ack, and begin to serve.

        Called by a worker of registrations, as it may wait for the disk. Raises OSError if the
        session has ended, or cannot start; then it holds nothing any more.
        """
        try:
            self._serve()
        except BaseException:
            # The session may have ended, and given back its hostnames and ports, before it had
            # them all.
            self._ended()
            raise

    def _serve(self) -> None:
        session = self._session
        self._tunnels.ensure_certificates(
            tuple(self.wanted), self.agent.blame, self.identity.limits
        )
        self.since = time()
        routes, ports, refused = self._open_ports()
        with self._lock:
            self.routes = routes
        session.widen(START_WINDOW)
        self._heartbeat.start(listens=HEALTH in self.features)
        session.call_later(KEPT_LOOK, self._close_old)
        # The ack is sent before the demultiplexer starts, so no visit's bytes follow at once: a Go
        # agent loses what comes in the same read as the ack.
        self._control.acknowledge(self._ack(routes, ports, refused))
        if self._members is not None:
            self._members.begin()
        for hostname in routes:
            self.tell_certificate(hostname)
        if routes:
            log.info("%s registered %s", self, some(routes))
            pooled = [name for name, route in routes.items() if route.pool is not None]
            self._tunnels.standby.held(dict.fromkeys(routes, self), pooled)
        if self._missing:
            session.call_later(self._port_delay, self._try_ports_later)
        session.start()
        with self._lock:
            self._enter(Stage.SERVING)
            end = self._parting
        if end:
            self._end_with(end)
        self.end_if_revoked()
        if self._awaited:
            self._wait()

    def _wait(self) -> None:
        """Wait for hostnames that others have."""
        standby = self._tunnels.standby
        if not standby.wait(self, self._awaited) and not self.routes:
            self.end("too many agents wait for hostnames of others")
        if self.stage > Stage.SERVING:  # it has ended or left meanwhile, and forgot before
            standby.forget(self)

    def _ack(
        self, routes: Mapping[str, Route], ports: dict[str, str], refused: dict[str, str]
    ) -> Ack:
        urls, names = {}, {}
        for hostname, route in routes.items():
            name = self._spelt[hostname]
            if URLS in self.features:
                urls[name] = self._url(hostname, route)
            if name.endswith(OPEN):
                names[name] = hostname
        membership = self._tunnels.membership
        member = "" if self._members is None or membership is None else membership.own
        return fitting(
            Ack(True, "", self.features, ports, refused, self.denied, urls, names, member)
        )

    def _url(self, hostname: str, route: Route) -> str:
        """The public address of a hostname."""
        if route.port is not None:
            return f"tcp://{hostname}:{route.port}"
        port = self._tunnels.visitors_port
        if route.mode != "http":
            return f"tls://{hostname}:{port}"
        return f"https://{hostname}" + (f":{port}" if port != HTTPS_PORT else "")

    def _open_ports(self) -> tuple[dict[str, Route], dict[str, str], dict[str, str]]:
        """Open the public ports that the agent asks for, at most one for each hostname. Returns the
        routes, the ports opened, and the reasons for those refused; the last two by hostnames as
        the agent spells them."""
        routes = dict(self.wanted)
        opened: dict[str, str] = {}
        refused: dict[str, str] = {}
        for hostname, route in self.wanted.items():
            name = self._spelt[hostname]
            wanted = self._ports.get(name)
            if wanted is None or self._session.ended:
                continue
            try:
                port = self._open_port(wanted, route)
            except PortRefused as error:
                problem = str(error)
                if error.for_now and LATER_PORTS in self.features:
                    problem += "; the gateway goes on trying"
                    self._missing[hostname] = None
                log.warning("%s: %s gets no port: %s", self, hostname, problem)
                refused[name] = problem
                continue
            routes[hostname] = route._replace(port=port)
            opened[name] = str(port)
        # A predecessor may have passed on ports that this session does not want.
        self._tunnels.ports.keep_only(self, set(map(int, opened.values())))
        if opened:
            self._tunnels.registry.update(routes)
        return routes, opened, refused

    def _open_port(self, wanted: str, route: Route) -> int:
        if route.mode != "tcp":
            raise PortRefused("a port is for a hostname in tcp mode")
        port = self._tunnels.ports.open(wanted, route, self.identity.why_not_port)
        log.info("%s: port %d leads to %s", self, port, route.hostname)
        return port

    def _try_ports_later(self) -> None:
        """Demultiplexer: have a worker do it, as opening a port may wait."""
        with contextlib.suppress(Stopped):
            self._tunnels.submit(self._try_ports)

    def _try_ports(self) -> None:
        """Worker: open the ports that were refused for the time being, and tell the agent."""
        for hostname, port in list(self._missing.items()):
            route = self.wanted[hostname]
            try:
                if port is None:
                    port = self._open_port(self._ports[self._spelt[hostname]], route)
                    self._missing[hostname] = port
                    self._add_port(hostname, port)
                url = self._url(hostname, route._replace(port=port))
                told = url if URLS in self.features else ""
                self._control.send(Port(route.hostname, str(port), told))
                del self._missing[hostname]
            except PortRefused as error:
                log.debug("%s: %s gets no port yet: %s", self, hostname, error)
            except OSError:  # no room for the message now: next time; or the session has ended
                pass
        # In CLAIMING the session has not ended: _serve() may still be at work.
        if self._session.ended or self.stage > Stage.SERVING:
            self._tunnels.ports.release(self)  # opened after the tunnel gave its ports back
        elif self._missing:
            self._port_delay = min(2 * self._port_delay, MOST_PORT_DELAY)
            self._session.call_later(self._port_delay, self._try_ports_later)

    def _add_port(self, hostname: str, port: int) -> None:
        with self._lock:
            if hostname in self.routes:
                route = self.routes[hostname]._replace(port=port)
                self.routes = {**self.routes, hostname: route}
                self._tunnels.registry.update({hostname: route})

    def _enter(self, stage: Stage) -> None:
        """Caller holds the lock."""
        self._stage = max(self._stage, stage)

    def tell_certificate(self, hostname: str) -> None:
        """Tell the agent how a certificate stands now. Any thread; waits for nothing."""
        self._control.tell_certificate(hostname, self._tunnels.certificate_state)

    def members_changed(self) -> None:
        """Tell the agent of the members, if it has its ack. Any thread; waits for nothing."""
        if self._members is not None:
            self._members.changed()

    def _close_old(self) -> None:
        """Demultiplexer: close old kept streams, each of which holds a connection to a target."""
        self._kept.close_old()
        self._own.close_old()
        self._look_at_ids()
        self._session.call_later(KEPT_LOOK, self._close_old)

    def _look_at_ids(self) -> None:
        """Have the agent open a new session before this one has no id left for a stream."""
        left = self._session.ids_left
        if left > ID_RESERVE or self.stage is not Stage.SERVING:
            return
        if REASONS in self.features and left and not self.moving:
            log.info("%s is asked to open a new session: %s", self, USED_UP)
            self.move(USED_UP)
        elif (
            not left
            or REASONS not in self.features
            and (left <= LAST_IDS or not self.usage().visits)
        ):
            self.end(USED_UP)  # the agent comes back by itself

    def move(self, reason: str) -> None:
        """Ask the agent for a new session. Until it has one this session serves, and visits go on.
        An agent that cannot be asked comes back by itself when its session ends: that is as soon as
        it has no visit. Any thread."""
        self.moving = True
        if REASONS in self.features:
            self._control.tell_end(End(MOVE, reason))
        else:
            self._end_without_visits(reason)

    def _end_without_visits(self, reason: str) -> None:
        """End the session as soon as it has no visit."""

        def look() -> None:
            if self.usage().visits:
                self._session.call_later(LEFT_LOOK, look)
            else:
                self.end(reason)

        self._session.call_later(LEFT_LOOK, look)

    # Another agent wants one of its hostnames, or has one that this agent wants

    def holds(self, hostname: str) -> bool:
        return self in self._tunnels.registry.holders(hostname)

    def watch(self, watched: bool) -> None:
        """Ask the agent for signs of life often, from now on or no more. Any thread."""
        self._heartbeat.watch(watched)

    def tell_free(self, hostname: str) -> bool:
        """Tell the agent that a hostname is free that it waits for. Any thread; does not wait.
        False if it cannot be told."""
        try:
            self._control.send(Free((self._spelt[hostname],)))
            return True
        except OSError:
            return False

    def call_later(self, seconds: float, function: Callable[[], None]) -> None:
        """Have the demultiplexer call ``function``, unless the session ends before."""
        self._session.call_later(seconds, function)

    def ask(self) -> float:
        """Ask the agent for a sign of life; without one in ANSWER_TIMEOUT the session ends. Returns
        since when (monotonic) it is asked. Any thread."""
        return self._heartbeat.ask()

    def has_answered(self, since: float) -> bool:
        """Whether the agent has answered the question of ``since``, as ask() returned it."""
        return self._heartbeat.has_answered(since)

    def replace(self, reason: str) -> None:
        """End the session at once, as another one takes its place. Any thread."""
        self._part(End(REPLACED, f"another session takes over: {reason}"))

    def _fell_silent(self, reason: str) -> None:
        """The agent was asked for a sign of life, and has not answered in time."""
        if any(route.pool is not None for route in self.routes.values()):
            self._part(End(SILENT, reason))  # it does not need to go: it may come back at once
        else:
            self.replace(reason)

    def end_by_operator(self, reason: str) -> None:
        """End the session at once, and tell the agent so. It may dial again. Any thread."""
        self._part(End(ENDED, reason))

    def end_if_revoked(self) -> None:
        """End the session if its credential no longer permits it. Any thread."""
        why = self._tunnels.credentials.why_revoked(self.identity, tuple(self.routes))
        if why:
            self._part(End(REVOKED, why))

    def move_if_retired(self) -> None:
        """Ask the agent to come again if its secret is no longer accepted. Any thread."""
        if not self.moving and self.stage is Stage.SERVING:
            if self._tunnels.credentials.is_retired(self.identity):
                self.move("its secret was replaced by a new one")

    def _part(self, end: End) -> None:
        """End the session at once, and tell the agent why; of several reasons, the first one."""
        with self._lock:
            first, self._parting = self._parting is None, self._parting or end
            may_be_told = self._stage is not Stage.CLAIMING  # else _serve() does it, after the ack
        if first and may_be_told:
            self._end_with(end)

    def _end_with(self, end: End) -> None:
        self._control.tell_end(end)
        self._session.close(end.reason, patience=LAST_WORD)

    # Its targets

    def _take_messages(self, messages: list[Message]) -> None:
        """Demultiplexer: what the agent has sent beside pongs."""
        told = [message for message in messages if isinstance(message, Health)]
        if told and HEALTH in self.features:
            self.health.note(told, self.routes)
            self.unwell = self.health.unwell()

    def well(self, hostname: str) -> bool:
        """Whether visits may go to the target of a hostname, as its Route spells it. Any thread."""
        return hostname not in self.unwell

    # The end

    def _leaving(self) -> None:
        """Demultiplexer: the agent takes no new streams (GO_AWAY). Its hostnames are free at once;
        running visits go on."""
        with self._lock:
            if self._parting or self._stage is Stage.LEAVING:
                return  # the gateway ends this session itself, and logs why
        self._stop_serving("leaves")

    def step_aside(self, successor: Tunnel) -> None:
        """A new session of the same agent has taken the hostnames; running visits go on. Any
        thread."""
        self._tunnels.ports.pass_on(self, successor)
        self._stop_serving("has a new session, and this one takes no more visits")

    def _stop_serving(self, how: str) -> None:
        with self._lock:
            self._enter(Stage.LEAVING)
        if self.routes:
            log.info("%s %s; it served %s", self, how, some(self.routes))
        self._give_back()
        with self._lock:
            self.routes = {}
        if OVERLAP in self.features:  # any other agent ends the session itself
            self._end_without_visits("its agent has left")

    def _ended(self) -> None:
        """Called by the thread that ends the session: give everything back."""
        self._give_back()
        with self._lock:
            self._enter(Stage.GONE)
            routes, self.routes = self.routes, {}
        self.gone.set()
        if routes:
            log.info("%s: its session ended: %s; no longer served: %s",
                     self, self._session.ended or "it could not begin", some(routes))  # fmt: skip

    def _give_back(self) -> None:
        self._tunnels.standby.forget(self)
        self._tunnels.ports.release(self)  # first: the hostname's next holder may want its port
        self._tunnels.claims.release(self)
        self._kept.close()
        self._own.close()

    def _closed(self) -> None:
        """The connection is closed."""
        if self._tunnels.discard(self):
            self._make_room()

    def end(self, reason: str) -> None:
        """End the session when its queued output has been sent. Any thread."""
        self._session.close(reason)

    def close(self, code: int = NORMAL) -> None:
        """Drop a connection that does not serve yet. ``code`` is GO_AWAY's."""
        self._session.close(code=code)
        # It may have ended, and given back its hostnames, while it claimed them.
        self._tunnels.claims.release(self)
        self._closed()  # the session may have closed before it had our on_close

    def join(self) -> None:
        """Wait for the end of the session's thread."""
        self._session.join()

    # Data streams, for visits

    def open(
        self, route: Route, ends: Callable[[], Ends], first: bytes = b"", relayed: bool = False,
        timeout: float = OPEN_TIMEOUT,
    ) -> Stream:  # fmt: skip
        """A new stream for a visit; the bytes ``first`` go along. ``ends()`` gives the addresses of
        the visitor's connection, for an agent that wants them. ``relayed``: see
        encode_data_header(). ``timeout``: seconds to wait for a place among the unanswered streams.

        Raises AgentBusy, ConnectionError, TimeoutError.
        """
        header = encode_data_header(route.hostname, ends() if route.addressed else None, relayed)
        allowance = self._allowance
        if allowance is None:
            return self._session.open(header + first, timeout)
        try:
            return self._session.open(header + first, timeout, allowance.permit(streams=1))
        except AgentBusy:
            if self.identity.limits.streams is None:
                raise
        for tunnel in self._tunnels.of_credential(self.identity.credential):
            tunnel._kept.close_all()  # kept streams, for visits to come, give way to this visit
        return self._session.open(header + first, timeout, allowance.permit(streams=1))

    def usage(self) -> limits.Usage:
        """What the session has now, its control stream aside."""
        control = self._control.stream
        streams = [stream for stream in self._session.streams_in_use() if stream is not control]
        own = self._own.streams()
        visits = sum(stream not in self._kept and stream not in own for stream in streams)
        return limits.Usage(len(streams), visits)

    def count_failed(self, route: Route) -> None:
        """A visit in tcp mode did not reach its target."""
        self.failed.add(route.hostname)

    def take_kept(self, route: Route) -> Stream | None:
        """A stream that an earlier visit left in good order, or None. Raises AgentBusy."""
        return self._counted(self._kept.pop, route.hostname)

    def _counted(self, pop: Callable[..., Stream | None], *arguments: object) -> Stream | None:
        """Take a kept stream, which counts as a visit from then on."""
        if self._allowance is None:
            return pop(*arguments)
        with self._allowance.permit(streams=0):
            return pop(*arguments)

    def keep(self, route: Route, stream: Stream) -> None:
        """Keep a stream whose last answer was complete for the next visit of its hostname."""
        if route.addressed:  # the target got the visitor's address with the stream
            stream.close()
        else:
            self._kept.put(route.hostname, stream)

    def make_way(self, route: Route) -> None:
        """A visit is about to open a new stream: see KeptStreams."""
        self._kept.make_way(route.hostname)

    def give_up_kept(self, route: Route, waiting: Stream) -> None:
        """A visit has waited a while for its answer on a new stream: see KeptStreams."""
        self._kept.give_up(route.hostname, waiting)

    def served(self, route: Route, stream: Stream) -> None:
        """A new stream has its answer, or its visit is over: see KeptStreams."""
        self._kept.served(route.hostname, stream)

    def take_own(self, route: Route, owner: object) -> Stream | None:
        """The stream that was kept for ``owner`` alone, or None. Raises AgentBusy."""
        stream = self._counted(self._own.pop, owner, route.hostname)
        if stream is None or stream.quiet:
            return stream
        stream.close()
        return None

    def keep_own(self, route: Route, owner: object, stream: Stream) -> None:
        """As keep(), for the next visit of ``owner`` alone, which has no stream here."""
        self._own.put(owner, route.hostname, stream)

    def drop_own(self, owner: object) -> None:
        """``owner`` has left: close its stream, if there is one."""
        self._own.drop(owner)


def fitting(ack: Ack) -> Ack:
    """The ack without what it can do without, if it would be too long for one message."""
    if len(encode_message(ack)) > MESSAGE_LIMIT:
        ack = ack._replace(urls={})
    if len(encode_message(ack)) > MESSAGE_LIMIT:
        short = {name: words_on_one_line(why, MOST_REASON) for name, why in ack.denied.items()}
        ack = ack._replace(denied=short)
    return ack


class Allowance:
    """What a credential may have at once, in all its sessions together.

    Invariant: a visit is counted and begins while Tunnels.limiting is held. So of two that come at
    once, only one gets the last place.
    """

    def __init__(self, identity: Identity, tunnels: Tunnels):
        self._identity = identity
        self._tunnels = tunnels

    @contextlib.contextmanager
    def permit(self, streams: int) -> Iterator[None]:
        """Within it no other visit of the credential begins. ``streams`` is as for limits.check(),
        which raises AgentBusy."""
        with self._tunnels.limiting:
            tunnels = self._tunnels.of_credential(self._identity.credential)
            usages = [tunnel.usage() for tunnel in tunnels]
            limits.check(self._identity.limits, usages, streams)
            yield


class Tally:
    """Counts by name. Any thread."""

    def __init__(self) -> None:
        self._counts: Counter[str] = Counter()
        self._lock = threading.Lock()  # guards _counts

    def add(self, name: str) -> None:
        with self._lock:
            self._counts[name] += 1

    def __getitem__(self, name: str) -> int:
        with self._lock:
            return self._counts[name]
