"""A registered agent: its hostnames, its data streams, the end.

A Tunnel is made by newcomer.py, when a registration is in order, and takes the session over. It
may have to wait for its hostnames until another tunnel has gone (takeover.py).

    CLAIMING --serve()--> SERVING --GO_AWAY of the agent--> LEAVING --> GONE
       \\                     \\--- session over, replaced, or credential taken away --/
        \\--- refused, or session over ------------------------------------------------/

The session's demultiplexer thread, which also beats the heart, runs from serve() on.
"""

import contextlib
import enum
import logging
import threading
from collections import Counter
from time import time

from gotunnel import (
    CERTIFICATES,
    HALF_CLOSE,
    HOST_HEADER,
    LATER_PORTS,
    MOVE,
    NORMAL,
    POLICIES,
    PORTS,
    REASONS,
    REFUSALS,
    REPLACED,
    START_WINDOW,
    UPGRADES,
    VISITOR_ADDRESS,
    WILDCARDS,
    Ack,
    End,
    Port,
    encode_data_header,
)
from gotunnel_agent.common.duplex import Observer
from gotunnel_agent.common.process import Stopped

from ..routes import AgentBusy
from . import limits
from .heartbeat import Heartbeat
from .ports import PortRefused
from .stream_pool import KeptStreams, OwnStreams

log = logging.getLogger("gotunnel.tunnel")

FEATURES = frozenset({  # extensions that we know
    CERTIFICATES, HALF_CLOSE, HOST_HEADER, LATER_PORTS, POLICIES, PORTS, REASONS, UPGRADES,
    REFUSALS, VISITOR_ADDRESS, WILDCARDS,
})  # fmt: skip
# Seconds that a session's last message may take to leave, if another tunnel waits for its
# hostnames. The message may stand behind what another thread is about to send. On a line that is
# cut it never leaves.
LAST_WORD = 0.2
REVOKED = "revoked"  # why a session ends: what its credential permits has changed
OPEN_TIMEOUT = 10  # seconds that a visit waits for an agent that has 256 opens to answer
# Stream ids that a session has left when its agent is asked for another one: at 20,000 visits a
# second it has a quarter of an hour to come. Then those that are left when one that cannot be asked
# ends, though it has visits: else it would end without an id for the next one.
ID_RESERVE, LAST_IDS = 1 << 24, 1 << 17
USED_UP = "its stream ids are used up"
# Seconds until a port that was refused is tried again; doubled each time, up to the second number.
# A port that was freed should serve soon, and a try costs little.
PORT_DELAY, MOST_PORT_DELAY = 1, 30
KEPT_LOOK = 5  # seconds between looks for kept streams that have become too old

_NOTHING = contextlib.nullcontext()


class Tunnels:
    """The tunnels of a gateway, and what they share. Any thread."""

    def __init__(
        self, *, credentials, registry, ports, ensure_certificates, certificate_state, submit
    ):
        """``ports`` are the public ones for agents, a ports.Ports. ``ensure_certificates(hostnames,
        agent, limits)`` sees to it that hostnames can be served, now or soon, and may wait for the
        disk; ``agent`` is whom to blame, ``limits`` are the credential's.
        ``certificate_state(hostname)`` is how that stands; its text is for gotunnel.Certificate.
        ``submit(function)`` has a worker call it that may wait for the system."""
        self.credentials = credentials
        self.registry = registry
        self.ports = ports
        self.ensure_certificates = ensure_certificates
        self.certificate_state = certificate_state
        self.submit = submit
        self.observer: Observer | None = None  # of each session; tools set it before agents come
        # Held to count what the sessions of a credential have, and to take more.
        self.limiting = threading.Lock()
        self._tunnels = set()
        self._lock = threading.Lock()  # guards _tunnels

    def add(self, tunnel):
        with self._lock:
            self._tunnels.add(tunnel)

    def discard(self, tunnel) -> bool:
        """Forget a tunnel whose connection is closed; False if that was done before."""
        with self._lock:
            known = tunnel in self._tunnels
            self._tunnels.discard(tunnel)
        return known

    def _all(self):
        with self._lock:
            return list(self._tunnels)

    def registered(self) -> list:
        """The tunnels that serve hostnames now."""
        return [tunnel for tunnel in self._all() if tunnel.routes]

    def of_credential(self, credential) -> list:
        """All tunnels of one credential. A tunnel that leaves is among them: it has visits."""
        return [tunnel for tunnel in self._all() if tunnel.identity.credential == credential]

    def end_revoked(self):
        """End the sessions whose credential no longer permits what they do. A session that leaves
        may still have visits."""
        for tunnel in self._all():
            if tunnel.stage is not Stage.CLAIMING:  # a claim looks at its credential by itself
                tunnel.end_if_revoked()

    def close(self):
        """End all sessions, and wait until they have ended."""
        tunnels = self._all()
        for tunnel in tunnels:
            tunnel.end("the gateway stops")
        for tunnel in tunnels:
            tunnel.join()


class Stage(enum.IntEnum):
    """How far the life of a Tunnel is. It only goes on, never back."""

    CLAIMING = 1  # it has no hostname yet, or has not told its agent
    SERVING = 2  # the agent is acknowledged, and its session runs
    LEAVING = 3  # the agent takes no new streams: no hostname any more, what runs goes on
    GONE = 4  # the session is over


class Tunnel:
    """A session with an agent whose registration is in order."""

    def __init__(self, tunnels, agent, session, control, *, features, routes, ports, make_room):
        """``agent`` is a registration.Agent. ``session`` is taken over, and is not started yet;
        ``control`` is its ControlStream. ``features`` are those that the agent knows, in its order.
        ``routes`` is what it asks for: normal hostname to Route, without a tunnel. ``ports``:
        hostname, as the agent spells it, to the public port that it asks for. ``make_room()`` is
        called once, when the connection is closed."""
        self.agent = agent
        self.features = tuple(name for name in features if name in FEATURES)
        self.half_close = HALF_CLOSE in self.features  # the agent may hear of a visitor's FIN
        self.upgrades = UPGRADES in self.features  # ... also in http mode, of open(relayed=True)
        self.wanted = {name: route._replace(tunnel=self) for name, route in routes.items()}
        self.routes = {}  # hostname: Route, that are served now; replaced whole
        self.since = time()  # wall-clock seconds of the registration
        self.gone = threading.Event()  # it holds no hostname any more, and never will
        self.moving = False  # the agent was asked for another session; never False again
        self.failed = Tally()  # route's hostname: visits in tcp mode whose target was not reached
        self._stage = Stage.CLAIMING
        self._parting = None  # the End, once the session has to go
        self._lock = threading.Lock()  # guards _stage and _parting, and is held to replace routes
        self._tunnels = tunnels
        self._session = session
        self._control = control
        self._ports = ports if PORTS in self.features else {}
        self._missing = {}  # hostname: the port that it gets later, None if that is not open yet
        self._port_delay = PORT_DELAY
        self._make_room = make_room
        self._heartbeat = Heartbeat(session, control, on_silence=self.replace)
        self._kept = KeptStreams()
        self._own = OwnStreams()
        most = agent.identity.limits
        unlimited = most.streams is None and most.visits is None
        self._allowance = None if unlimited else Allowance(agent.identity, tunnels)
        session.on_leave = self._leaving
        session.on_end = self._ended
        session.on_close = self._closed

    def __str__(self):
        return str(self.agent)

    def __repr__(self):
        return f"<Tunnel {self.agent.host} {', '.join(self.routes) or self.stage.name}>"

    @property
    def identity(self):
        """The credentials.Identity of the agent."""
        return self.agent.identity

    @property
    def stage(self) -> Stage:
        with self._lock:
            return self._stage

    # Registration

    def serve(self):
        """The hostnames are claimed: tell the agent, and begin to serve.

        A worker of registrations, which may have to wait for the disk. Raises OSError if the
        session has ended, or cannot start. If it raises, nothing is held any more.
        """
        try:
            self._serve()
        except BaseException:
            self._ended()  # once more: the session may have ended before it had all of it
            raise

    def _serve(self):
        session = self._session
        self._tunnels.ensure_certificates(
            tuple(self.wanted), self.agent.blame, self.identity.limits
        )
        self.since = time()
        routes, ports, refused = self._open_ports()
        with self._lock:
            self.routes = routes
        session.widen(START_WINDOW)
        self._heartbeat.start()
        session.call_later(KEPT_LOOK, self._close_old)
        # The ack is on its way before the demultiplexer reads on: a Go agent loses what comes in
        # the same read.
        self._control.acknowledge(Ack(True, features=self.features, ports=ports, refused=refused))
        for hostname in routes:
            self.tell_certificate(hostname)
        log.info("%s registered %s", self, ", ".join(routes))
        if self._missing:
            session.call_later(self._port_delay, self._try_ports_later)
        session.start()
        with self._lock:
            self._enter(Stage.SERVING)
            end = self._parting
        if end:
            self._end_with(end)
        self.end_if_revoked()

    def _open_ports(self):
        """Open the public ports that the agent asks for, one a hostname. Returns the routes with
        them, hostname to port, and hostname to why there is none; the last two as the agent spells
        hostnames."""
        routes, opened, refused = dict(self.wanted), {}, {}
        for hostname, route in self.wanted.items():
            wanted = self._ports.get(route.hostname)
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
                refused[route.hostname] = problem
                continue
            routes[hostname] = route._replace(port=port)
            opened[route.hostname] = str(port)
        self._tunnels.ports.keep_only(self, set(map(int, opened.values())))  # of those passed on
        if opened:
            self._tunnels.registry.update(routes)
        return routes, opened, refused

    def _open_port(self, wanted, route):
        if route.mode != "tcp":
            raise PortRefused("a port is for a hostname in tcp mode")
        port = self._tunnels.ports.open(wanted, route, self.identity.why_not_port)
        log.info("%s: port %d leads to %s", self, port, route.hostname)
        return port

    def _try_ports_later(self):
        """Demultiplexer: a worker does it, as opening a port may wait."""
        with contextlib.suppress(Stopped):
            self._tunnels.submit(self._try_ports)

    def _try_ports(self):
        """Worker: open the ports that were refused for the time being, and tell the agent."""
        for hostname, port in list(self._missing.items()):
            route = self.wanted[hostname]
            try:
                if port is None:
                    port = self._open_port(self._ports[route.hostname], route)
                    self._missing[hostname] = port
                    self._add_port(hostname, port)
                self._control.send(Port(route.hostname, str(port)))
                del self._missing[hostname]
            except PortRefused as error:
                log.debug("%s: %s gets no port yet: %s", self, hostname, error)
            except OSError:  # no room for the message now, or the end
                pass
        # CLAIMING is not over: _serve() may have to go on, and the ports are those of the ack.
        if self._session.ended or self.stage > Stage.SERVING:
            self._tunnels.ports.release(self)  # what was opened since it gave everything back
        elif self._missing:
            self._port_delay = min(2 * self._port_delay, MOST_PORT_DELAY)
            self._session.call_later(self._port_delay, self._try_ports_later)

    def _add_port(self, hostname, port):
        with self._lock:
            if hostname in self.routes:
                route = self.routes[hostname]._replace(port=port)
                self.routes = {**self.routes, hostname: route}
                self._tunnels.registry.update({hostname: route})

    def _enter(self, stage):
        """Caller holds the lock."""
        self._stage = max(self._stage, stage)

    def tell_certificate(self, hostname):
        """Let the agent know how a certificate stands now. Any thread; waits for nothing."""
        self._control.tell_certificate(hostname, self._tunnels.certificate_state)

    def _close_old(self):
        """Demultiplexer: a kept stream holds a connection to its target."""
        self._kept.close_old()
        self._own.close_old()
        self._look_at_ids()
        self._session.call_later(KEPT_LOOK, self._close_old)

    def _look_at_ids(self):
        """Have the agent come anew before the session has no id for another stream."""
        left = self._session.ids_left
        if left > ID_RESERVE or self.stage is not Stage.SERVING:
            return
        if REASONS in self.features and left and not self.moving:
            log.info("%s is asked for a new session, as %s", self, USED_UP)
            self.moving = True
            self._control.tell_end(End(MOVE, USED_UP))
        elif (
            not left
            or REASONS not in self.features
            and (left <= LAST_IDS or not self.usage().visits)
        ):
            self.end(USED_UP)  # the agent comes back by itself

    # Another agent wants one of its hostnames

    def ask(self) -> float:
        """Have the agent show that it lives; if it does not in ANSWER_TIMEOUT, the session ends.
        Returns since when (monotonic) it is asked. Any thread."""
        return self._heartbeat.ask()

    def has_answered(self, since) -> bool:
        return self._heartbeat.has_answered(since)

    def replace(self, reason):
        """End the session at once: another takes its place. Any thread."""
        self._part(End(REPLACED, f"another session takes over: {reason}"))

    def end_if_revoked(self):
        """End the session if its credential does not permit it any more. Any thread."""
        why = self._tunnels.credentials.taken_away(self.identity, tuple(self.routes))
        if why:
            self._part(End(REVOKED, why))

    def _part(self, end):
        """End the session at once. The first reason counts."""
        with self._lock:
            first, self._parting = self._parting is None, self._parting or end
            may_be_told = self._stage is not Stage.CLAIMING  # else _serve() does it, in a moment
        if first and may_be_told:
            self._end_with(end)

    def _end_with(self, end):
        self._control.tell_end(end)
        self._session.close(end.reason, patience=LAST_WORD)

    # The end

    def _leaving(self):
        """Demultiplexer: the agent takes no new streams. Its hostnames are free at once; what
        runs goes on."""
        with self._lock:
            if self._parting or self._stage is Stage.LEAVING:
                return  # it goes because it was told to: _ended() says why
        self._stop_serving("leaves")

    def step_aside(self, successor):
        """A new session of the agent's, a Tunnel, has taken the hostnames; what runs goes on. Any
        thread."""
        self._tunnels.ports.pass_on(self, successor)
        self._stop_serving("serves by a new session, and ends this one")

    def _stop_serving(self, how):
        with self._lock:
            self._enter(Stage.LEAVING)
        log.info("%s %s, with %s", self, how, ", ".join(self.routes))
        self._give_back()
        with self._lock:
            self.routes = {}

    def _ended(self):
        """The thread that ends the session: give everything back."""
        self._give_back()
        with self._lock:
            self._enter(Stage.GONE)
            routes, self.routes = self.routes, {}
        self.gone.set()
        if routes:
            log.info("%s gone, with %s: %s", self, ", ".join(routes), self._session.ended)

    def _give_back(self):
        self._tunnels.ports.release(self)  # first: the next holder may want the port too
        self._tunnels.registry.release(self)
        self._kept.close()
        self._own.close()

    def _closed(self):
        """The connection is closed."""
        if self._tunnels.discard(self):
            self._make_room()

    def end(self, reason):
        """End the session, when the line has taken what is queued. Any thread."""
        self._session.close(reason)

    def close(self, code=NORMAL):
        """Drop a connection that is not served yet. ``code`` is GO_AWAY's."""
        self._session.close(code=code)
        self._closed()  # if the session was over before the tunnel could hear of it

    def join(self):
        self._session.join()

    # Data streams, for visits

    def open(self, route, ends, first=b"", relayed=False):
        """A new stream for a visit; ``first`` bytes go along. ``ends()`` gives the visitor's, for
        an agent that wants to know. ``relayed``: see encode_data_header().

        Raises AgentBusy, ConnectionError, TimeoutError.
        """
        header = encode_data_header(route.hostname, ends() if route.addressed else None, relayed)
        if self._allowance is None:
            return self._session.open(header + first, timeout=OPEN_TIMEOUT)
        try:
            return self._open_counted(header + first)
        except AgentBusy:
            if self.identity.limits.streams is None:
                raise
        for tunnel in self._tunnels.of_credential(self.identity.credential):
            tunnel._kept.close_all()  # a visit that is there comes before those that may come
        return self._open_counted(header + first)

    def _open_counted(self, first):
        return self._session.open(first, OPEN_TIMEOUT, self._allowance.permit(streams=1))

    def usage(self) -> limits.Usage:
        """What the session has now, without its control stream."""
        control = self._control.stream
        streams = [stream for stream in self._session.streams_in_use() if stream is not control]
        own = self._own.streams()
        visits = sum(stream not in self._kept and stream not in own for stream in streams)
        return limits.Usage(len(streams), visits)

    def count_failed(self, route):
        """A visit has come to nothing."""
        self.failed.add(route.hostname)

    def take_kept(self, route):
        """A stream that an earlier visit left in good order, or None. Raises AgentBusy."""
        while (stream := self._counted(self._kept.pop, route.hostname)) is not None:
            if stream.quiet:
                return stream
            stream.close()
        return None

    def _counted(self, pop, *arguments):
        """Take up a stream, which is a visit from then on."""
        with _NOTHING if self._allowance is None else self._allowance.permit(streams=0):
            return pop(*arguments)

    def keep(self, route, stream):
        """Keep a stream whose last answer was complete for the next visit of that hostname."""
        if route.addressed:  # its agent tells a target the visitor's address once
            stream.close()
        else:
            self._kept.put(route.hostname, stream)

    def make_way(self, route):
        """A visit is about to open a new stream: see KeptStreams."""
        self._kept.make_way(route.hostname)

    def give_up_kept(self, route, waiting):
        """A visit has waited a while for its answer on a new stream: see KeptStreams."""
        self._kept.give_up(route.hostname, waiting)

    def served(self, route, stream):
        """A new stream has its answer, or its visit is over: see KeptStreams."""
        self._kept.served(route.hostname, stream)

    def take_own(self, route, owner):
        """The stream that was kept for ``owner`` alone, or None. Raises AgentBusy."""
        stream = self._counted(self._own.pop, owner, route.hostname)
        if stream is None or stream.quiet:
            return stream
        stream.close()
        return None

    def keep_own(self, route, owner, stream):
        """As keep(), for the next visit of ``owner`` alone, which has none here."""
        self._own.put(owner, route.hostname, stream)

    def drop_own(self, owner):
        """``owner`` has gone."""
        self._own.drop(owner)


class Allowance:
    """What a credential may have at once, over all its sessions.

    Invariant: a visit is counted and begins within one hold of Tunnels.limiting, so that of two
    that come at once only one gets the last place.
    """

    def __init__(self, identity, tunnels):
        self._identity = identity
        self._tunnels = tunnels

    @contextlib.contextmanager
    def permit(self, streams):
        """Within it no other visit of the credential begins. ``streams`` as for limits.check(),
        which raises AgentBusy."""
        with self._tunnels.limiting:
            tunnels = self._tunnels.of_credential(self._identity.credential)
            usages = [tunnel.usage() for tunnel in tunnels]
            limits.check(self._identity.limits, usages, streams)
            yield


class Tally:
    """Counts by name. Any thread."""

    def __init__(self):
        self._counts = Counter()
        self._lock = threading.Lock()  # guards _counts

    def add(self, name):
        with self._lock:
            self._counts[name] += 1

    def __getitem__(self, name) -> int:
        with self._lock:
            return self._counts[name]
