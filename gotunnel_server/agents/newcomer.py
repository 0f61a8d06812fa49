"""Registers agents: takes a connection to the tunnel port through TLS, token and claim, or refuses
it.

A newcomer costs no thread. Its connection is parked with the port's listener, and a worker takes
the next step when the peer has sent something. RULES says which stages may follow each other:

    INTRODUCTION (of a trusted proxy)
        |
    HELLO --> HANDSHAKE --> REGISTER --> CLAIM --> ADMIT --> the tunnel has the session
        \\--> VALIDATION        |  \\         \\
                                |   DELAYED   \\
                                |          \\   \\
                                \\--> HEAR_OUT, PARTING --> closed

From CLAIM on there is a Tunnel. It holds its hostnames as soon as the claim is decided.

A gateway of the same cluster dials this port, too. Its ClientHello says so (Peers.name), and the
handshake has to prove it. Then REGISTER waits only for its control stream, and Peers takes over.
"""

from __future__ import annotations

import contextlib
import copy
import enum
import logging
import math
import re
import socket
import ssl
import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable, Mapping
from functools import partial
from time import monotonic
from types import MappingProxyType
from typing import NamedTuple, Protocol, TypeVar

from gotunnel import (
    ALREADY,
    INTERNAL_ERROR,
    MEMBERS,
    NORMAL,
    OVERLAP,
    PARTIAL,
    PROTOCOL_ERROR,
    Ack,
    NoThread,
    ProtocolError,
    Register,
    Session,
    SessionClosed,
    Stream,
)
from gotunnel_agent.common import proxy_protocol
from gotunnel_agent.common.addresses import counted_by
from gotunnel_agent.common.duplex import STALL_TIMEOUT, Duplex
from gotunnel_agent.common.one_line import words_on_one_line

from ..net import client_hello
from ..net.drops import (
    ADDRESS_FULL,
    BAD_TOKENS,
    BUG,
    LEFT,
    NO_PROOF,
    NO_THREAD,
    NOT_TLS,
    PROTOCOL,
    PROXY_HEADER,
    SILENT,
    SLOW,
    STOPPED,
    TLS_FAILED,
    Dropped,
)
from ..net.listener import Address, Listener
from ..net.shares import Addresses, Seat
from ..net.total import Total
from ..routes import HostnameTaken, Route
from . import takeover
from .attempts import Attempts
from .control_stream import ControlStream
from .credentials import TokenInvalid
from .registration import MAX_INSTANCE, NO_ROUTES, Agent, NotGranted, Terms, of_all, read_routes
from .tunnel import Tunnel, Tunnels, fitting

log = logging.getLogger("gotunnel.newcomer")

REGISTER_TIMEOUT = 10  # seconds from the first byte to a complete registration
PARTING_TIMEOUT = 3  # seconds that a refused agent has to read the reason
# Bytes that a newcomer's session reads at a time, so that no step takes long.
STRANGERS_READ = 4 * 1024
# Bytes that a newcomer may send beside its messages: 341 frame headers. A registration has a few.
STRANGERS_WASTE = 4 * 1024
# A newcomer that waits too often counts as trickling (listener.FREE_WAITS). Each PIECE bytes that
# it has sent inside TLS allow one more wait: a long registration comes in segments of a kilobyte.
PIECE = 256
HEARD_OUT = 1024 * 1024  # bytes that a refused newcomer may go on sending
# Remembered refusals, so that a repeated one is logged once in REFUSAL_MEMORY seconds. A Go agent
# comes back every 2 s.
MOST_REFUSALS = 256
REFUSAL_MEMORY = 600
TURNED_AWAY_SILENCE = 60  # seconds between two lines about an address whose connections are closed

Key = TypeVar("Key", bound=Hashable)

_SPAN = re.compile("[0-9]+ (s|min|h|d)(?= ago| from now| behind| ahead|, or set)")


class NotAdmitted(Exception):
    """The gateway refuses an agent; the text is for the agent.

    ``brief``: close the connection right after the text, without PARTING. Such refusals come by the
    hundred, and their connections must not keep places. An agent that has sent no more than its
    registration can still read the text. ``denied``: see Ack."""

    def __init__(self, text: str, brief: bool = False, denied: Mapping[str, str] | None = None):
        super().__init__(text)
        self.brief = brief
        self.denied = dict(denied or {})


class Unfit(ProtocolError):
    """The peer's bytes are no registration; ``reason`` is a word of drops.REASONS."""

    def __init__(self, reason: str, text: str):
        super().__init__(text)
        self.reason = reason


class Flood(ProtocolError):
    """A newcomer sends more than any registration needs."""


class Rationed(Duplex):
    """A connection from which a session reads little at a time while ``rationed``."""

    def __init__(self, sock: socket.socket):
        super().__init__(sock)
        self.rationed = True
        self.received = 0  # bytes behind TLS while it was rationed

    def receive_into(self, view: memoryview) -> int | None:
        if not self.rationed:
            return super().receive_into(view)
        count = super().receive_into(view[:STRANGERS_READ])
        self.received += count or 0
        return count


class Challenges(Protocol):
    """What newcomers need of certs/challenges.py."""

    def context(self, hostname: str | None) -> ssl.SSLContext | None:
        """The TLS context that proves a hostname to a CA; None if no proof was published."""


class Peers(Protocol):
    """What newcomers need of cluster/peers.py."""

    name: str  # the SNI of the peers
    context: ssl.SSLContext  # whose handshake only a peer can complete

    def welcome(
        self, session: Session, control: Stream, address: str, leave: Callable[[], object], /
    ) -> None: ...


class Newcomers:
    """The newcomers of a port, and what they share. Any thread."""

    listener: Listener  # set before it is started
    peers: Peers | None = None  # set before it is started; None: there is no cluster
    peers_only = False  # no agent may come by this port

    def __init__(
        self,
        tunnels: Tunnels,
        *,
        context: Callable[[str | None], ssl.SSLContext],
        challenges: Challenges,
        attempts: Attempts,
        proxies: Addresses,
        terms: Terms,
        submit: Callable[[Callable[[], object]], object],
        stall_timeout: float = STALL_TIMEOUT,
    ):
        """``tunnels`` gets the registered agents. ``context(sni)`` is the TLS context of a
        handshake; ``challenges`` are for CAs that validate at this port. ``attempts`` counts bad
        tokens. ``proxies`` are the addresses whose PROXY header is believed.

        ``submit(function)`` has a worker of registrations call it, which may wait for the disk. A
        newcomer has at most one call there, so that queue is never longer than the listener's
        limit of connections. ``stall_timeout``: see Duplex."""
        self.tunnels = tunnels
        self.context = context
        self.challenges = challenges
        self.attempts = attempts
        self.proxies = proxies
        self.terms = terms
        self.submit = submit
        self.stall_timeout = stall_timeout
        self.refusals = Refusals()
        self._newcomers: set[Newcomer] = set()
        self._lock = threading.Lock()  # guards _newcomers

    def beside(self) -> Newcomers:
        """The newcomers of a port for peers alone, beside this one."""
        other = copy.copy(self)
        other._newcomers, other._lock = set(), threading.Lock()
        other.peers_only = True
        return other

    def welcome(self, sock: socket.socket, address: Address, seat: Seat) -> Newcomer | None:
        """For the listener: a connection was accepted. None if its address has sent too many bad
        tokens."""
        if address[0] not in self.proxies and not self.may_open(address[0]):
            return None
        duplex = Rationed(sock)
        duplex.stall_timeout = self.stall_timeout
        newcomer = Newcomer(self, duplex, address, seat)
        with self._lock:
            self._newcomers.add(newcomer)
        return newcomer

    def may_open(self, address: str) -> bool:
        """Whether a new connection from there gets to TLS. If not, it is counted for the log."""
        if self.attempts.may_open(address):
            return True
        self.refusals.count_turned_away(address)
        return False

    def hand_over(self, newcomer: Newcomer, tunnel: Tunnel) -> None:
        """From now on the connection is the tunnel's."""
        self.tunnels.add(tunnel)  # first, so that it is always in one of the two for close()
        with self._lock:
            self._newcomers.discard(newcomer)
        newcomer.seat.settle()  # it has registered: see Seat.settle()

    def forget(self, newcomer: Newcomer) -> None:
        """The connection is closed: give back its place. Does nothing after hand_over(), as the
        tunnel gives it back then."""
        with self._lock:
            known = newcomer in self._newcomers
            self._newcomers.discard(newcomer)
        if known:
            newcomer.seat.leave()
            newcomer.count_drop()

    def close(self) -> None:
        """Break off all connections; their workers, or the listener, notice it and forget them."""
        with self._lock:
            newcomers = list(self._newcomers)
        for newcomer in newcomers:
            newcomer.end("the gateway stops")


class Refusals:
    """The log of refusals, and of warnings that come as often. Any thread.

    Invariant: at most MOST_REFUSALS are remembered. Of equal refusals within REFUSAL_MEMORY only
    the first is a warning, because Go agents come back every two seconds. The next warning says how
    often it came meanwhile.
    """

    def __init__(self) -> None:
        # (agent, text): monotonic time of the last warning, refusals since; the latest one last.
        self._logged: OrderedDict[tuple[str, str], tuple[float, int]] = OrderedDict()
        # Key of the address: monotonic time of the last line, connections since; the latest last.
        self._turned_away: OrderedDict[Hashable, tuple[float, int]] = OrderedDict()
        self._lock = threading.Lock()  # guards both
        self.total = Total()  # of the refusals

    def log(
        self, agent: str, text: str, line: str = "%s refused: %s", level: int = logging.WARNING
    ) -> None:
        """Log that ``agent`` was refused, and why; or another ``line`` with the two texts."""
        key = (agent, _SPAN.sub("#", text))  # without times: the same reason, whenever it comes
        repeats = self._count(self._logged, key, REFUSAL_MEMORY)
        if repeats is None:
            log.debug(line, agent, text)
        elif not repeats:
            log.log(level, line, agent, text)
        else:
            log.log(level, line + " (%d times more since the last such line)", agent, text, repeats)

    def count_turned_away(self, address: str) -> None:
        """Count a connection that was closed at once because of bad tokens of its address."""
        count = self._count(self._turned_away, counted_by(address), TURNED_AWAY_SILENCE)
        if count is not None:
            log.warning("agents at %s: too many bad tokens came from there; %d more connections "
                        "were closed at once", address, count + 1)  # fmt: skip

    def _count(
        self, memory: OrderedDict[Key, tuple[float, int]], key: Key, silence: float
    ) -> int | None:
        """Count one more of ``key``. Returns how many were only counted since the last line if it
        is time for the next one, in ``silence`` seconds at the earliest; else None."""
        now = monotonic()
        with self._lock:
            said_at, counted = memory.pop(key, (-math.inf, 0))
            due = now - said_at > silence
            memory[key] = (now, 0) if due else (said_at, counted + 1)
            if len(memory) > MOST_REFUSALS:
                memory.popitem(last=False)
        return counted if due else None


class Stage(enum.Enum):
    """How far a newcomer is. Each value says what the newcomer waits for."""

    INTRODUCTION = "the header in which a trusted proxy names its agent, or the first byte of TLS"
    HELLO = "the first bytes of TLS: a ClientHello"
    HANDSHAKE = "the end of the handshake"
    VALIDATION = "the end of a CA's handshake, which is all that a TLS-ALPN-01 validation needs"
    REGISTER = "the register message"
    CLAIM = "the verdict on its hostnames: the next look at the tunnels that hold them"
    ADMIT = "a worker of registrations"
    DELAYED = "the end of its delay; then it is refused, as its address sends bad tokens"
    HEAR_OUT = "the rest of its registration, which was refused in the middle; or PARTING_TIMEOUT"
    PARTING = "the peer's end of the connection, after the refusal; or PARTING_TIMEOUT"
    OVER = "nothing: the connection is closed, or is its tunnel's"


class Next(NamedTuple):
    """The stage that comes next, and the step to take there, with the values that exist from there
    on."""

    stage: Stage
    step: Callable[[], Next | None]


class Newcomer:
    """One connection that is not registered. One thread at a time owns it, as listener.py says."""

    def __init__(self, newcomers: Newcomers, duplex: Rationed, address: Address, seat: Seat):
        self.duplex = duplex
        self.address = address  # as accept() gave it, or as a trusted proxy has told
        self.seat = seat
        self._newcomers = newcomers
        self._stage, self._step = Next(Stage.HELLO, self._read_hello)
        if address[0] in newcomers.proxies:
            self._stage, self._step = Next(Stage.INTRODUCTION, self._read_introduction)
        self._deadline = math.inf  # monotonic: registered, or gone, by then; set at the first byte
        self._waits = 0  # in the stage
        self._buffer = b""  # of a hello that is not whole
        self._hello = client_hello.Reader()
        # For close(), end(), refusals and the log. Steps get these values as arguments.
        self._session: Session | None = None
        self._control: ControlStream | None = None  # once the agent has opened its control stream
        self._agent: Agent | None = None  # once its token was found good
        self._tunnel: Tunnel | None = None
        # A word of drops.REASONS; "" as long as none but LEFT is known; None: counted elsewhere.
        self._why: str | None = ""

    def __str__(self) -> str:
        return f"agent at {self.address[0]}" if self._agent is None else str(self._agent)

    def __repr__(self) -> str:
        return f"<Newcomer {self.address[0]} {self._stage.name}>"

    # What the listener calls

    def ready(self) -> None:
        """Worker: take the steps that can be taken."""
        if self._deadline == math.inf:
            self._deadline = monotonic() + REGISTER_TIMEOUT
        try:
            while (following := self._step()) is not None:
                self._enter(*following)
                if following.stage is Stage.ADMIT:
                    self._newcomers.submit(self.ready)
                    return
        except NotAdmitted as refusal:
            self._refuse(refusal)
        except ProtocolError as error:
            log.debug("%s: protocol error: %s", self, error)
            self._why = error.reason if isinstance(error, Unfit) else PROTOCOL
            if isinstance(error, Flood):
                self._count_failed("")
            self.close(PROTOCOL_ERROR)
        except NoThread as error:
            log.warning("%s: %s; the agent's connection is closed", self, error)
            self._why = NO_THREAD
            self.close()
        except OSError as error:
            log.debug("%s: %s", self, error)
            if isinstance(error, Dropped):
                self._why = error.reason
            elif isinstance(error, ssl.SSLError):
                self._why = TLS_FAILED
            self.close()
        except Exception:
            self._why = BUG
            log.exception("%s: its registration failed (bug, traceback follows); the connection is "
                          "closed", self)  # fmt: skip
            self._report_bug()

    def expired(self) -> None:
        """Worker: its time is up."""
        log.debug("%s: closed, %s", self, RULES[self._stage].late)
        self._why = self._why or (SILENT if self._deadline == math.inf else SLOW)
        self.close()

    def close(self, code: int = NORMAL) -> None:
        """Drop the connection; for the thread that owns it. ``code`` is GO_AWAY's."""
        self._finish()
        if self._tunnel is not None:
            self._tunnel.close(code)
        elif self._session is not None:
            self._session.close(code=code)
        else:
            self.duplex.close()
        self._newcomers.forget(self)

    def count_drop(self) -> None:
        """It is closed, and has not registered: count it, unless it was refused."""
        if self._why is not None:
            listener = self._newcomers.listener
            listener.drops.add(self._why or (STOPPED if listener.stopping else LEFT))

    def _finish(self) -> None:
        self._stage, self._step = Stage.OVER, _rest  # a method here would be a reference cycle

    def end(self, reason: str) -> None:
        """Break the connection off. Any thread."""
        session = self._session
        if session is not None:
            session.close(reason)
        else:
            self.duplex.reset()

    silent = True  # cutting a registration loses nothing, the agent dials again: see Parkable
    brief = False  # see Parkable

    # From stage to stage

    def _enter(self, stage: Stage, step: Callable[[], Next | None]) -> None:
        if stage not in RULES[self._stage].then:
            raise ValueError(f"{stage} came after {self._stage}")
        self._stage, self._step, self._waits = stage, step, 0

    # These return None, for the step that calls them to return.

    def _park(self) -> Next | None:
        """Take the step again when the peer has sent something."""
        self._waits += 1
        left = max(0, self._deadline - monotonic())
        waits = self._waits - self.duplex.received // PIECE
        self._newcomers.listener.await_more(self, left, waits)
        return None

    def _look_again(
        self, stage: Stage, step: Callable[[], Next | None], seconds: float
    ) -> Next | None:
        """Take the step of ``stage`` in so many seconds, also if the peer sends something."""
        if self._newcomers.listener.stopping:
            raise NotAdmitted("the gateway stops")
        self._enter(stage, step)
        self._newcomers.listener.call_later(self, self.ready, seconds)
        return None

    # The steps. Each returns the stage that comes next; None if it is taken again later, or if the
    # newcomer is over.

    def _receive_first(self) -> None:
        """Append the bytes that have come to the buffer."""
        data = self.duplex.receive()
        if data == b"":
            raise SessionClosed("the peer left before TLS")
        self._buffer += data or b""

    def _read_introduction(self) -> Next | None:
        """INTRODUCTION: a trusted proxy may name its agent first (HAProxy's PROXY protocol)."""
        self._receive_first()
        if proxy_protocol.may_begin(self._buffer):
            try:
                found = proxy_protocol.parse(self._buffer)
            except proxy_protocol.NotProxy as error:
                self._newcomers.refusals.log(f"trusted proxy at {self.address[0]}", str(error))
                raise Unfit(PROXY_HEADER, str(error)) from None
            if found is None:
                return self._park()
            size, source = found
            self._buffer = self._buffer[size:]
            if source is not None:
                self.address = source
                if not self.seat.move(source[0]):
                    raise Dropped(ADDRESS_FULL, "its address has no place left for another one")
        if not self._newcomers.may_open(self.address[0]):
            raise Dropped(BAD_TOKENS, "too many bad tokens came from its address")
        return Next(Stage.HELLO, self._read_hello)

    def _read_hello(self) -> Next | None:
        """HELLO: choose the certificate, and find out whether a CA validates a hostname here
        (TLS-ALPN-01, RFC 8737)."""
        self._receive_first()
        try:
            said = self._hello.parse(self._buffer)
        except client_hello.NotTLS as error:
            if proxy_protocol.begins(self._buffer):
                self._newcomers.refusals.log(
                    str(self), "it sent a PROXY header, and TRUSTED_PROXIES does not name it"
                )
                raise Unfit(PROXY_HEADER, str(error)) from None
            raise Unfit(NOT_TLS, str(error)) from None
        if said is None:
            return self._park()
        peers = self._newcomers.peers
        if peers is not None and said.server_name == peers.name:
            self._start_tls(peers.context)
            return Next(Stage.HANDSHAKE, partial(self._shake_hands_with_peer, peers))
        if self._newcomers.peers_only:
            raise Unfit(NOT_TLS, "this port is for gateways of the cluster alone")
        if said.alpn != (client_hello.ACME_TLS,):
            self._start_tls(self._newcomers.context(said.server_name))
            return Next(Stage.HANDSHAKE, self._shake_hands)
        proof = self._newcomers.challenges.context(said.server_name)
        if proof is None:
            raise Unfit(NO_PROOF, "a CA asks for a proof that was not published")
        self._start_tls(proof)
        return Next(Stage.VALIDATION, self._prove)

    def _start_tls(self, context: ssl.SSLContext) -> None:
        self.duplex.unread(self._buffer)
        self._buffer = b""
        self.duplex.start_tls(context, server_side=True)

    def _shake_hands(self) -> Next | None:
        """HANDSHAKE"""
        if not self.duplex.handshake():
            return self._park()
        # One stream: an agent opens the control stream and no other.
        session = Session(
            self.duplex, client=False, name=self.address[0], max_streams=1,
            observer=self._newcomers.tunnels.observer,
        )  # fmt: skip
        self._session = session
        return Next(Stage.REGISTER, partial(self._await_control_stream, session))

    def _shake_hands_with_peer(self, peers: Peers) -> Next | None:
        """HANDSHAKE of a gateway, which has to prove that it is of this cluster."""
        try:
            if not self.duplex.handshake():
                return self._park()
        except ssl.SSLError as error:
            self._count_failed("")
            text = (
                f"it does not prove that it has the cluster's key ({error.reason or error}); "
                "if it is one of yours, give it the same CLUSTER_KEY_FILE"
            )
            self._newcomers.refusals.log(f"a gateway at {self.address[0]}", text)
            raise
        session = Session(self.duplex, client=False, name=f"peer {self.address[0]}", max_streams=1)
        self._session = session
        return Next(Stage.REGISTER, partial(self._await_peer, peers, session))

    def _await_peer(self, peers: Peers, session: Session) -> Next | None:
        """REGISTER of a gateway, until it has opened its control stream."""
        self._take_frames(session)
        if not session.arrived:
            self._refuse_flood(0)
            return self._park()
        self.duplex.rationed = False
        self._finish()
        self._why = None
        self.seat.settle()
        forget = partial(self._newcomers.forget, self)
        peers.welcome(session, session.accept(), self.address[0], forget)
        return None

    def _prove(self) -> Next | None:
        """VALIDATION: the handshake has shown the CA its proof."""
        if not self.duplex.handshake():
            return self._park()
        self._why = None
        self.close()
        return None

    def _await_control_stream(self, session: Session) -> Next | None:
        """REGISTER, until the agent has opened its control stream."""
        self._take_frames(session)
        if not session.arrived:
            self._refuse_flood(0)
            return self._park()
        control = ControlStream(session.accept(), str(self))
        self._control = control
        self._step = partial(self._read_register, session, control)
        return self._take_message(session, control)

    def _read_register(self, session: Session, control: ControlStream) -> Next | None:
        """REGISTER, from then on."""
        self._take_frames(session)
        return self._take_message(session, control)

    def _take_frames(self, session: Session) -> None:
        session.turn()
        if session.jammed:  # it was sent next to nothing, so it does not read at all
            raise ProtocolError("the agent does not read what it is sent")

    def _refuse_flood(self, heard: int) -> None:
        """``heard``: bytes of messages that came."""
        if self.duplex.received - heard > STRANGERS_WASTE:
            raise Flood("more frames than a registration needs")

    def _take_message(self, session: Session, control: ControlStream) -> Next | None:
        try:
            message = next(iter(control.read()), None)
        except ProtocolError as error:  # the agent's operator has to hear of it
            return self._refuse_early(session, control, f"invalid registration: {error}")
        self._refuse_flood(control.received)
        if message is None:
            return self._park()
        if not isinstance(message, Register):
            raise ProtocolError(f"a {type(message).__name__.lower()}, expected register")
        return self._identify(session, control, message)

    def _identify(self, session: Session, control: ControlStream, message: Register) -> Next | None:
        """Check the token, and that the agent may have what it asks for."""
        newcomers, tunnels = self._newcomers, self._newcomers.tunnels
        instance = message.instance[:MAX_INSTANCE]
        if not newcomers.attempts.may_check(self.address[0], instance):
            raise NotAdmitted(
                "too many bad tokens came from this address, so this one was not checked",
                brief=True,
            )
        try:
            identity = tunnels.credentials.identify(message.token)
        except TokenInvalid as error:
            return self._delay(NotAdmitted(f"auth failed: {error}"), instance)
        newcomers.attempts.proved(instance)
        membership = tunnels.membership
        if membership and MEMBERS in message.features and membership.own in message.besides:
            raise NotAdmitted(ALREADY, brief=True)
        overlaps = message.overlap and OVERLAP in message.features
        self._agent = agent = Agent(self.address, identity, message.instance, overlaps)
        try:
            asked = read_routes(message, identity, newcomers.terms)
        except NotGranted as error:
            raise NotAdmitted(str(error), denied=error.denied) from None
        _check_count(
            agent, len(asked.routes)
        )  # too many by themselves must not end another session
        self._tunnel = tunnel = Tunnel(
            tunnels, agent, session, control,
            features=message.features, asked=asked, ports=message.ports,
            make_room=self.seat.leave,
        )  # fmt: skip
        claim = takeover.Claim(
            tunnels.claims, agent, tunnel.wanted, permit=partial(_check_hostnames, agent),
            partial=PARTIAL in message.features,
        )  # fmt: skip
        newcomers.hand_over(self, tunnel)
        return Next(Stage.CLAIM, partial(self._try_claim, session, tunnel, claim))

    def _delay(self, refusal: NotAdmitted, instance: str) -> Next | None:
        """Refuse a bad token; the more of them its address has sent, the later."""
        self._count_failed(instance)
        seconds = self._newcomers.attempts.delay(self.address[0])
        return self._look_again(Stage.DELAYED, partial(self._raise, refusal), seconds)

    def _count_failed(self, instance: str) -> None:
        address = self.address[0]
        if news := self._newcomers.attempts.failed(address, instance):
            self._newcomers.refusals.log(f"agents at {address}", news, "%s: %s")

    def _raise(self, refusal: NotAdmitted) -> None:
        """DELAYED: the delay is over."""
        raise refusal

    def _try_claim(self, session: Session, tunnel: Tunnel, claim: takeover.Claim) -> Next | None:
        """CLAIM: take the hostnames, as soon as no other tunnel holds them. A holder may have to
        go."""
        if session.ended:
            raise SessionClosed(session.ended)
        credentials = self._newcomers.tunnels.credentials
        if why := credentials.why_revoked(tunnel.identity, tuple(tunnel.wanted)):
            raise NotAdmitted(f"auth failed: {why}")
        try:
            claimed = claim.attempt()
        except HostnameTaken as taken:
            tunnel.deny(claim.denied)
            if tunnel.await_(claim.holders):
                return Next(Stage.ADMIT, partial(self._admit, tunnel))
            text = of_all(tunnel.denied) if tunnel.denied else str(taken)
            raise NotAdmitted(text, denied=tunnel.denied) from None
        if not claimed:
            return self._look_again(Stage.CLAIM, self._step, claim.look)
        tunnel.deny(claim.denied)
        tunnel.await_(claim.holders)
        if refused := tunnel.refused():
            text = words_on_one_line("; ".join(refused))
            line = "%s registers, and some hostnames are refused: %s"
            self._newcomers.refusals.log(str(self), text, line)
        return Next(Stage.ADMIT, partial(self._admit, tunnel))

    def _admit(self, tunnel: Tunnel) -> None:
        """ADMIT, by a worker of registrations: the tunnel serves, and owns the connection."""
        self.duplex.rationed = False
        tunnel.serve()
        self._finish()

    # Refused

    def _refuse(self, refusal: NotAdmitted) -> None:
        """Send the refusal, and wait for the agent to hang up: closing at once could destroy the
        text on its way."""
        self._count_refusal(str(refusal))
        try:
            self._tell(str(refusal), refusal.denied)
            if refusal.brief:
                return self.close()
            self.duplex.finish(timeout=0)
        except OSError:
            return self.close()
        self._await_end(Stage.PARTING, self._part)

    def _refuse_early(self, session: Session, control: ControlStream, text: str) -> Next | None:
        """Refuse a registration that has not arrived whole. The agent reads the answer only after
        it has sent everything, so its rest is read and dropped (HEAR_OUT)."""
        self._count_refusal(text)
        self._tell(text)
        control.stream.close()
        return self._await_end(Stage.HEAR_OUT, partial(self._hear_out, session))

    def _count_refusal(self, text: str) -> None:
        self._why = None
        if text == NO_ROUTES:  # `gotunnel join` tries its credential so
            line = "%s has tried its credential: it is good (%s)"
            self._newcomers.refusals.log(str(self), text, line, logging.INFO)
            return
        if text == ALREADY:  # such an agent looks for the other members, with many dials
            log.debug("%s has a session here, and looks for the other members", self)
            return
        self._newcomers.refusals.total.add()
        if self._tunnel is None or not self._tunnel.waits_elsewhere():
            self._newcomers.refusals.log(str(self), text)

    def _await_end(self, stage: Stage, step: Callable[[], Next | None]) -> Next | None:
        self._enter(stage, step)
        self._deadline = monotonic() + PARTING_TIMEOUT
        return self._park()

    def _report_bug(self) -> None:
        """A bug of the gateway has ended the registration: tell the agent's operator so."""
        with contextlib.suppress(OSError):  # the agent has left
            self._tell("the registration failed by a bug of the gateway: see the gateway's log")
        self.close(INTERNAL_ERROR)

    def _tell(self, text: str, denied: Mapping[str, str] = MappingProxyType({})) -> None:
        """Send the agent a refusal, if it can have one yet. ``denied``: see Ack."""
        if self._control is not None:
            features = (PARTIAL,) if denied else ()
            self._control.send(fitting(Ack(False, text, features, denied=dict(denied))))

    def _hear_out(self, session: Session) -> Next | None:
        """HEAR_OUT"""
        session.turn()
        if self.duplex.received > HEARD_OUT:
            raise Flood("it was refused, and goes on")
        return self._park()

    def _part(self) -> Next | None:
        """PARTING: wait until the agent hangs up."""
        # One read a step: a peer that sends without end must not keep a thread.
        if self.duplex.received > HEARD_OUT:
            raise Flood("it was refused, and goes on")
        if self.duplex.receive() == b"":
            self.close()
            return None
        return self._park()


def _rest() -> None:
    """OVER"""


def _check_hostnames(agent: Agent, routes: Mapping[str, Route]) -> None:
    """Whether the agent's credential may have its hostnames among ``routes``, in all its sessions.
    Called under the registry's lock."""
    if agent.identity.limits.hostnames is not None:
        credential = agent.identity.credential
        _check_count(
            agent,
            sum(route.tunnel.agent.identity.credential == credential for route in routes.values()),
        )


def _check_count(agent: Agent, count: int) -> None:
    most = agent.identity.limits.hostnames
    if most is not None and count > most:
        raise NotAdmitted(f"too many hostnames: {count}, at most {most} for this credential")


class Rule(NamedTuple):
    """``then``: the stages that may follow. ``late``: why a newcomer is closed when its time is up
    in this stage; "" if it is never parked there."""

    then: tuple[Stage, ...]
    late: str = ""


_LATE = "not registered in time"
_LEFT = "it was refused and did not hang up in time"
RULES = {
    Stage.INTRODUCTION: Rule((Stage.HELLO,), _LATE),
    Stage.HELLO: Rule((Stage.HANDSHAKE, Stage.VALIDATION), _LATE),
    Stage.HANDSHAKE: Rule((Stage.REGISTER,), _LATE),
    Stage.VALIDATION: Rule((), _LATE),
    Stage.REGISTER: Rule((Stage.CLAIM, Stage.DELAYED, Stage.HEAR_OUT, Stage.PARTING), _LATE),
    Stage.CLAIM: Rule((Stage.CLAIM, Stage.ADMIT, Stage.PARTING)),
    Stage.ADMIT: Rule(()),
    Stage.DELAYED: Rule((Stage.PARTING,)),
    Stage.HEAR_OUT: Rule((), _LEFT),
    Stage.PARTING: Rule((), _LEFT),
}
