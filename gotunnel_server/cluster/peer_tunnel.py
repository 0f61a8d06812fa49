"""The gateway's side of a connection with a peer: hostnames whose agents are at another gateway.

The peer has dialled, and acts as an agent does: it registers hostnames, and a visit to one of them
is a stream that is opened to it, with a data header. But it stands for many agents, so a connection
has many PeerTunnels, one for each Register (origin.py).

No hostname is claimed by it. All routes to other gateways are in a table of their own (Elsewhere)
that counts only where no agent here has the hostname: so own agents win at once, and if they leave,
the peer's route serves at once. If several peers have a hostname, the latest that has told so gets
its visits; the others are asked when it takes its hostname back.
"""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable, Mapping
from typing import NamedTuple

from gotunnel import (
    HALF_CLOSE,
    MESSAGE_LIMIT,
    START_WINDOW,
    UPGRADES,
    Ack,
    End,
    Ends,
    Message,
    MessageReader,
    Ping,
    Pong,
    ProtocolError,
    Register,
    Session,
    Stream,
    encode_data_header,
    encode_message,
)
from gotunnel_agent.common.one_line import on_one_line, some
from gotunnel_agent.common.refusals import BY_CODE, OF_GATEWAYS, Refusal

from ..agents.registration import MAX_INSTANCE, Asked, NotGranted, Terms, read_routes
from ..agents.stream_pool import KeptStreams, OwnStreams
from ..agents.tunnel import (
    ID_RESERVE,
    KEPT_LOOK,
    LAST_IDS,
    OPEN_TIMEOUT,
    USED_UP,
    Tally,
    Tunnels,
)
from ..net.total import Total
from ..routes import Registry, Route
from .origin import Greeting, Origin, OtherAgent
from .peer_session import end_without_visits
from .watched import Job, Submit, Watched

log = logging.getLogger("gotunnel.peer_tunnel")

# Hostnames that a peer may tell of: some 1.5 kB each. That is ten times what the agents of one
# gateway have, if each of the 4096 has 25.
MOST_HOSTNAMES = 1_000_000
# Changes of hostnames that wait for a worker; further ones wait in the control stream's window.
MOST_CHANGES = 256
GREETING_TIMEOUT = 10  # seconds for the first message
MOST_HOST = 64  # characters of the machine's name that a peer tells


class Elsewhere:
    """The routes to other gateways' agents. Any thread."""

    def __init__(self, registry: Registry, submit: Submit):
        self._registry = registry
        self._routes: dict[str, dict[PeerTunnel, Route]] = {}  # by hostname; the latest last
        self._lock = threading.Lock()  # guards _routes
        self._job = Job(submit, self._publish)

    def put(self, tunnel: PeerTunnel) -> None:
        with self._lock:
            for hostname, route in tunnel.routes.items():
                self._routes.setdefault(hostname, {})[tunnel] = route
        self._job.wake()

    def drop(self, tunnel: PeerTunnel) -> None:
        with self._lock:
            for hostname in tunnel.routes:
                tunnels = self._routes.get(hostname, {})
                tunnels.pop(tunnel, None)
                if not tunnels:
                    self._routes.pop(hostname, None)
        self._job.wake()

    def _publish(self) -> None:
        with self._lock:
            routes = {
                hostname: next(reversed(tunnels.values()))
                for hostname, tunnels in self._routes.items()
            }
        self._registry.put_elsewhere(routes)


class Shared:
    """What the connections from all peers share."""

    def __init__(
        self, *, own: Greeting, elsewhere: Elsewhere, tunnels: Tunnels,
        terms: Callable[[], Terms], promise: Callable[[], bool], submit: Submit,
        departed: Callable[[str], object],
        on_greeting: Callable[[Accepted], object], on_end: Callable[[Accepted], object],
    ):  # fmt: skip
        """``own`` is this member. ``promise()`` and ``departed(id)``: see Peers.
        ``on_greeting(connection)``: its member is known now. ``on_end(connection)``: it is
        closed."""
        self.own = own
        self.sent = Total()  # streams that were opened to peers
        self.elsewhere = elsewhere
        self.tunnels = tunnels
        self.terms = terms
        self.promise = promise
        self.submit = submit
        self.departed = departed
        self.on_greeting = on_greeting
        self.on_end = on_end


class Change(NamedTuple):
    """What a Register has told: ``tunnel`` takes the place of ``before``; None: there is none."""

    instance: str
    tunnel: PeerTunnel | None
    before: PeerTunnel | None


class Accepted:
    """A connection that a peer has opened."""

    def __init__(
        self, shared: Shared, session: Session, control: Stream, address: str,
        leave: Callable[[], object],
    ):  # fmt: skip
        """Takes ``session`` over, which is not started. ``control`` is its control stream.
        ``leave()`` is called once it is closed."""
        self.peer = Greeting("", "")  # once the greeting has come
        self.session = session
        self.kept, self.own_streams = KeptStreams(), OwnStreams()
        self.tunnels: dict[str, PeerTunnel] = {}  # by Register.instance
        self.sent = shared.sent
        self._shared = shared
        self._address = address
        self._leave = leave
        self._control = control
        self._watched: Watched
        self._job = Job(shared.submit, self._work)
        self._reader = MessageReader()
        self._unsent = b""  # answers
        self._changes: deque[Change] = deque()  # of hostnames, that were told and not made yet
        self._changing = Job(shared.tunnels.submit, self._change)
        # Guards these three and ``tunnels``: the peer may leave while a message of it is taken.
        self._lock = threading.Lock()
        self._count = 0  # hostnames
        self._leaving = False  # the peer takes no visits any more
        self._admitted = True  # see admit()
        session.on_leave = self._leaving_now
        session.on_end = self._ended
        session.on_close = self._closed

    def __str__(self) -> str:
        return f"peer {self.peer.host or self._address}"

    def start(self) -> None:
        """Raises NoThread, SessionClosed."""
        self.session.widen(START_WINDOW)
        self.session.call_later(GREETING_TIMEOUT, self._await_greeting)
        self.session.call_later(KEPT_LOOK, self._close_old)
        self._watched = Watched(self._control, self._job.wake)
        self._job.wake()
        self.session.start()

    def close(self, reason: str) -> None:
        """Any thread; does not wait."""
        self.session.close(reason)

    def admit(self, admitted: bool) -> None:
        """Whether visits are passed on. Not while the peer is no member: its hostnames may be
        another agent's. It may be back soon, and tells nothing twice. Any thread."""
        with self._lock:
            if self._leaving or admitted is self._admitted:
                return
            self._admitted = admitted
            change = self._shared.elsewhere.put if admitted else self._shared.elsewhere.drop
            for tunnel in self.tunnels.values():
                change(tunnel)

    def retire(self) -> None:
        """Pass no more visits on; those that run go on, and the last one ends the connection. Any
        thread; does not wait."""
        self._drop_all()
        end_without_visits(self.session, "it is no longer used")

    def _await_greeting(self) -> None:
        if not self.peer.id:
            self.close(f"no greeting came in {GREETING_TIMEOUT} s")

    def _close_old(self) -> None:
        self.kept.close_old()
        self.own_streams.close_old()
        left = self.session.ids_left
        if left <= LAST_IDS or left <= ID_RESERVE and not self.session.streams_in_use()[1:]:
            self.close(USED_UP)  # the peer dials again at once
        self.session.call_later(KEPT_LOOK, self._close_old)

    # The control stream

    def _work(self) -> None:
        try:
            # What the peer does not read, or the disk holds up, must not pile up here.
            while (
                len(self._unsent) < MESSAGE_LIMIT
                and len(self._changes) < MOST_CHANGES
                and (data := self._watched.take()) is not None
            ):
                if not data:
                    self.close("the peer ended the control stream")
                    return
                for message in self._reader.feed(data):
                    self._take(message)
            if self._unsent:
                self._unsent = bytes(self._watched.put(self._unsent))
        except ProtocolError as error:
            log.warning("%s: %s; the connection is closed", self, error)
            self.close(f"protocol error: {error}")
        except OSError as error:  # the session is over
            log.debug("%s: %s", self, error)
        except Exception:
            self.close("internal error")
            raise

    def _take(self, message: Message) -> None:
        """Raises ProtocolError."""
        if not self.peer.id and isinstance(message, Register):
            self._greet(message)
        elif self.peer.id and isinstance(message, Register):
            self._register(message)
        elif self.peer.id and isinstance(message, Ping):
            number = abs(message.ts)
            self._answer(Pong(number if self._shared.promise() else -number))
        elif self.peer.id and isinstance(message, End):
            self._shared.departed(self.peer.id)
        else:
            raise ProtocolError(f"a {type(message).__name__.lower()}, expected register")

    def _answer(self, message: Ack | Pong) -> None:
        self._unsent += encode_message(message)

    def _greet(self, message: Register) -> None:
        host = on_one_line(message.token, MOST_HOST)
        if not message.instance or len(message.instance) > MAX_INSTANCE or message.routes:
            raise ProtocolError("a register that is no greeting")
        self.peer = Greeting(message.instance, host)
        own = self._shared.own.id
        if message.instance == own:
            text = (
                "its address leads to this gateway itself; give each gateway a CLUSTER_ADDRESS "
                "that leads to it alone"
            )
            self._answer(Ack(False, text, member=own))
        else:
            self._shared.on_greeting(self)
            self._answer(Ack(True, member=own))
            log.debug("%s (%s) at %s is connected: visits can be passed on to its agents",
                      self, self.peer.id, self._address)  # fmt: skip

    def _register(self, message: Register) -> None:
        tunnel = self._tunnel_of(message) if message.routes else None
        with self._lock:
            if self._leaving:
                return
            before = self.tunnels.pop(message.instance, None)
            if tunnel is not None:
                self.tunnels[message.instance] = tunnel
            self._count += len(tunnel.routes) if tunnel else 0
            self._count -= len(before.routes) if before else 0
            self._changes.append(Change(message.instance, tunnel, before))
        if self._count > MOST_HOSTNAMES:
            raise ProtocolError(f"more than {MOST_HOSTNAMES} hostnames")
        self._changing.wake()

    def _change(self) -> None:
        """Worker of registrations, as it may wait for the disk: see to the certificates, and then
        have visits pass. In the order of the messages: an agent that has a new session is told of
        before the old one is taken back, and no visit must come in between."""
        while self._changes:
            instance, tunnel, before = self._changes.popleft()
            if tunnel is not None:
                agent = tunnel.agent
                self._shared.tunnels.ensure_certificates(
                    tuple(tunnel.routes), agent.blame, agent.identity.limits
                )
            with self._lock:
                # Else it was replaced meanwhile, or has gone.
                if tunnel is not None and self.tunnels.get(instance) is tunnel and self._admitted:
                    self._shared.elsewhere.put(tunnel)
                if before is not None:
                    self._shared.elsewhere.drop(before)
            if tunnel is None and before is not None:
                before.end()
        self._job.wake()  # it may have waited for this

    def _tunnel_of(self, message: Register) -> PeerTunnel | None:
        """Raises ProtocolError."""
        if len(message.instance) > MAX_INSTANCE:
            raise ProtocolError(f"an instance of more than {MAX_INSTANCE} characters")
        origin = Origin.decode(message.token)
        agent = OtherAgent(origin, self.peer.host)
        terms = self._shared.terms()._replace(most=MESSAGE_LIMIT)
        try:
            asked = read_routes(message, agent.identity, terms)
        except NotGranted as error:
            log.warning("%s: the hostnames of %s are not passed on: %s", self, agent, error)
            return None
        if asked.denied:
            log.warning("%s: hostnames of %s are not passed on: %s",
                        self, agent, "; ".join(asked.denied.values()))  # fmt: skip
        log.debug("%s: %s has %s", self, agent, some(asked.routes))
        return PeerTunnel(self, agent, origin, message.features, asked)

    # The end

    def _leaving_now(self) -> None:
        """Demultiplexer: the peer takes no more visits (GO_AWAY). Those that run go on."""
        log.debug("%s takes no more visits; it had %d hostnames", self, self._count)
        self._drop_all()

    def _ended(self) -> None:
        """Called by the thread that ends the session."""
        if self.peer.id:
            lost = bool(self.tunnels)  # else the peer has left in good order, or had no hostnames
            log.log(logging.INFO if lost else logging.DEBUG,
                    "%s: its connection ended: %s; visits are no longer passed on to its agents",
                    self, self.session.ended)  # fmt: skip
        self._drop_all()

    def _closed(self) -> None:
        self._leave()
        self._shared.on_end(self)

    def _drop_all(self) -> None:
        with self._lock:
            self._leaving = True
            tunnels, self.tunnels = self.tunnels, {}
            for tunnel in tunnels.values():
                self._shared.elsewhere.drop(tunnel)
        self.kept.close()
        self.own_streams.close()


class NotTold:
    """What the targets of an agent elsewhere say of their health: nothing, here."""

    told: Mapping[str, str] = {}


class PeerTunnel:
    """An agent's session at another gateway, as routes.Tunnel has it; agents/tunnel.py says what
    the methods do."""

    id = ""  # of no session here
    unwell: Mapping[str, str] = {}  # its own gateway looks at that
    health = NotTold()
    refusals: Mapping[int, Refusal] = BY_CODE | OF_GATEWAYS

    def __init__(
        self, connection: Accepted, agent: OtherAgent, origin: Origin,
        features: tuple[str, ...], asked: Asked,
    ):  # fmt: skip
        self.agent = agent
        self.half_close = HALF_CLOSE in features
        self.upgrades = UPGRADES in features
        self.since = origin.since
        self.failed = Tally()
        self._connection = connection
        self._limited = origin.limited
        self._over = False  # end() was called
        self.routes: Mapping[str, Route] = {
            name: wanted.route(self) for name, wanted in asked.routes.items()
        }

    def __str__(self) -> str:
        return str(self.agent)

    def __repr__(self) -> str:
        return f"<PeerTunnel {self.agent.identity.issuer} {some(self.routes)}>"

    def end(self) -> None:
        """The agent has left: close what was kept for visits to come. Running visits go on."""
        self._over = True
        for route in self.routes.values():
            self._connection.kept.forget(route.hostname)
            self._connection.own_streams.forget(route.hostname)

    def _has_ended(self) -> bool:
        return self._over

    @property
    def via(self) -> Greeting:
        """The member that has the agent."""
        return self._connection.peer

    def open(
        self, route: Route, ends: Callable[[], Ends], first: bytes = b"", relayed: bool = False,
        timeout: float = OPEN_TIMEOUT,
    ) -> Stream:  # fmt: skip
        header = encode_data_header(route.hostname, ends() if route.addressed else None, relayed)
        stream = self._connection.session.open(header + first, timeout)
        self._connection.sent.add()
        return stream

    def count_failed(self, route: Route) -> None:
        self.failed.add(route.hostname)

    def take_kept(self, route: Route) -> Stream | None:
        return self._connection.kept.pop(route.hostname)

    def keep(self, route: Route, stream: Stream) -> None:
        if route.addressed or self._limited or self._has_ended():
            stream.close()
            return
        self._connection.kept.put(route.hostname, stream)
        if self._has_ended():  # meanwhile
            self._connection.kept.forget(route.hostname)

    def make_way(self, route: Route) -> None:
        self._connection.kept.make_way(route.hostname)

    def give_up_kept(self, route: Route, waiting: Stream) -> None:
        self._connection.kept.give_up(route.hostname, waiting)

    def served(self, route: Route, stream: Stream) -> None:
        self._connection.kept.served(route.hostname, stream)

    def take_own(self, route: Route, owner: object) -> Stream | None:
        stream = self._connection.own_streams.pop(owner, route.hostname)
        if stream is None or stream.quiet:
            return stream
        stream.close()
        return None

    def keep_own(self, route: Route, owner: object, stream: Stream) -> None:
        self._connection.own_streams.put(owner, route.hostname, stream)
        if self._has_ended():
            self._connection.own_streams.forget(route.hostname)

    def drop_own(self, owner: object) -> None:
        self._connection.own_streams.drop(owner)

    def tell_certificate(self, hostname: str) -> None:
        """The agent's own gateway tells it."""

    @property
    def heard_at(self) -> float:
        return self._connection.session.heard_at

    @property
    def round_trip(self) -> float | None:
        return None

    def ask(self) -> float:
        return self.heard_at

    def well(self, hostname: str) -> bool:
        return True
