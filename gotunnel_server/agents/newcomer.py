"""A stranger at the agents' port, until it is registered or refused.

A newcomer costs no thread: its connection is parked with the port's listener, and a worker takes
the next step when there is something to read. RULES says which step a stage takes:

    INTRODUCTION (of a trusted proxy)
        |
    HELLO --> HANDSHAKE --> REGISTER --> CLAIM --> ADMIT --> the tunnel has the session
        \\--> VALIDATION        |  \\         \\
                                |   DELAYED   \\
                                |          \\   \\
                                \\--> HEAR_OUT, PARTING --> closed

From CLAIM on there is a Tunnel, which holds hostnames as soon as the claim is decided.
"""

import enum
import logging
import re
import threading
from collections import OrderedDict
from collections.abc import Callable
from time import monotonic
from typing import NamedTuple

from gotunnel import (
    INTERNAL_ERROR,
    NORMAL,
    PROTOCOL_ERROR,
    Ack,
    NoThread,
    ProtocolError,
    Register,
    Session,
    SessionClosed,
)
from gotunnel_agent.common import proxy_protocol
from gotunnel_agent.common.duplex import STALL_TIMEOUT, Duplex

from ..net import client_hello
from ..routes import HostnameTaken
from . import takeover
from .control_stream import ControlStream
from .credentials import TokenInvalid
from .registration import MAX_INSTANCE, Agent, NotGranted, read_routes
from .tunnel import Tunnel

log = logging.getLogger("gotunnel.newcomer")

REGISTER_TIMEOUT = 10  # seconds from the first byte to a complete registration
PARTING_TIMEOUT = 3  # seconds that a refused agent has to read why
# Bytes that a session takes of a stranger in one go, so that no step takes long; and those that may
# come beside the bytes of its messages: 341 headers of frames, of which a registration has a few.
STRANGERS_READ = 4 * 1024
STRANGERS_WASTE = 4 * 1024
# Bytes behind TLS that are worth a wait more before a stranger counts as one that trickles: its
# message may be long, and comes in segments of a kilobyte and more.
PIECE = 256
HEARD_OUT = 1024 * 1024  # bytes that a stranger may go on sending when it has been refused
MOST_REFUSALS = 256  # remembered ones, so that each is logged once ...
REFUSAL_MEMORY = 600  # ... in so many seconds: a Go agent comes back every 2

_SPAN = re.compile("[0-9]+ (s|min|h|d)(?= ago| from now)")


class NotAdmitted(Exception):
    """The gateway says no; the text is for the agent. ``in_the_middle``: the agent has not said
    all yet. ``brief``: close the connection behind the text, without time for the agent to read
    it. For refusals that come by the hundred, which must not keep their places; an agent that has
    sent no more than its registration reads the text all the same."""

    def __init__(self, text, in_the_middle=False, brief=False):
        super().__init__(text)
        self.in_the_middle = in_the_middle
        self.brief = brief


class Flood(ProtocolError):
    """A stranger sends what no registration needs."""


class Rationed(Duplex):
    """A connection of which a session reads little in one go, as long as ``rationed``."""

    def __init__(self, sock):
        super().__init__(sock)
        self.rationed = True
        self.received = 0  # bytes, behind TLS, while it was

    def receive_into(self, view):
        if not self.rationed:
            return super().receive_into(view)
        count = super().receive_into(view[:STRANGERS_READ])
        self.received += count or 0
        return count


class Newcomers:
    """The newcomers of a port, and what they need. Any thread."""

    def __init__(
        self, tunnels, *, context, challenges, attempts, proxies, read_policy, max_hosts, submit,
        stall_timeout=STALL_TIMEOUT,
    ):  # fmt: skip
        """``tunnels`` gets those that are registered. ``context(sni)`` is the TLS context of a
        handshake, ``challenges`` what a CA may find there. ``attempts`` counts bad tokens.
        ``proxies`` are the addresses whose PROXY header is believed. ``read_policy`` is as for
        read_routes(). ``submit(function)`` has a worker of registrations call it, which may wait
        for the disk. No newcomer has more than one call there, so its queue is never longer than
        the listener's limit of connections. ``stall_timeout``: see Duplex."""
        self.tunnels = tunnels
        self.context = context
        self.challenges = challenges
        self.attempts = attempts
        self.proxies = proxies
        self.read_policy = read_policy
        self.max_hosts = max_hosts
        self.submit = submit
        self.stall_timeout = stall_timeout
        self.refusals = Refusals()
        self.listener = None  # set before it is started
        self._newcomers = set()
        self._lock = threading.Lock()  # guards _newcomers

    def welcome(self, sock, address, seat):
        """For the listener: a connection was accepted. None if its address has sent too many bad
        tokens."""
        if address[0] not in self.proxies and not self.attempts.may_open(address[0]):
            return None
        duplex = Rationed(sock)
        duplex.stall_timeout = self.stall_timeout
        newcomer = Newcomer(self, duplex, address, seat)
        with self._lock:
            self._newcomers.add(newcomer)
        return newcomer

    def hand_over(self, newcomer, tunnel):
        """From now on the connection is the tunnel's."""
        self.tunnels.add(tunnel)  # first: close() must find it in one of the two
        with self._lock:
            self._newcomers.discard(newcomer)
        newcomer.seat.settle()  # its credential bounds it from here on

    def forget(self, newcomer):
        """The connection is closed. Of one that was handed over, the tunnel says so."""
        with self._lock:
            known = newcomer in self._newcomers
            self._newcomers.discard(newcomer)
        if known:
            newcomer.seat.leave()

    def close(self):
        """Break off all connections; their workers, or the listener, notice."""
        with self._lock:
            newcomers = list(self._newcomers)
        for newcomer in newcomers:
            newcomer.end("the gateway stops")


class Refusals:
    """The refusals that were logged, and the warnings that come as often. Any thread.

    Invariant: at most MOST_REFUSALS are remembered. Of equal ones within REFUSAL_MEMORY only the
    first is a warning, because Go agents come back every two seconds.
    """

    def __init__(self):
        self._logged = OrderedDict()  # (agent, text): monotonic time; the latest last
        self._lock = threading.Lock()  # guards _logged

    def log(self, agent, text, line="%s refused: %s"):
        """Say why an agent, a text, was refused; or another ``line`` with the two."""
        key, now = (agent, _SPAN.sub("#", text)), monotonic()  # one reason, whenever
        with self._lock:
            last = self._logged.pop(key, None)
            fresh = last is None or now - last > REFUSAL_MEMORY
            self._logged[key] = now if fresh else last
            if len(self._logged) > MOST_REFUSALS:
                self._logged.popitem(last=False)
        log.log(logging.WARNING if fresh else logging.DEBUG, line, agent, text)


class Stage(enum.Enum):
    """How far a newcomer is. What each waits for:"""

    INTRODUCTION = "the header in which a trusted proxy names its agent, or the first byte of TLS"
    HELLO = "the first bytes of TLS: a ClientHello"
    HANDSHAKE = "the end of the handshake"
    VALIDATION = "the end of a CA's handshake, which is all that a tls-alpn-01 validation needs"
    REGISTER = "the register message"
    CLAIM = "the verdict on its hostnames: the next look at the tunnels that hold them"
    ADMIT = "a worker of registrations"
    DELAYED = "the time of its refusal: its address sends bad tokens"
    HEAR_OUT = "its time, or its end; it is refused, and has not said all yet"
    PARTING = "its time, or its end; it is refused, and has been told so"
    OVER = "nothing: it is closed, or its tunnel serves"


class Newcomer:
    """One connection that is not registered. One thread at a time owns it, as listener.py says."""

    def __init__(self, newcomers, duplex, address, seat):
        self.duplex = duplex
        self.address = address  # as accept() gave it, or as a trusted proxy has told
        self.seat = seat
        self._newcomers = newcomers
        introduced = newcomers is not None and address[0] in newcomers.proxies
        self._stage = Stage.INTRODUCTION if introduced else Stage.HELLO
        self._deadline = None  # monotonic: registered, or gone, by then; None before the first byte
        self._waits = 0  # in the stage
        self._buffer = b""  # of a hello that is not whole
        self._hello = client_hello.Reader()
        self._session = None  # from REGISTER on
        self._control = None  # once the agent has opened its control stream
        self._agent = None  # from CLAIM on, as are the next two
        self._tunnel = None
        self._claim = None
        self._refusal = None  # the NotAdmitted that it gets after DELAYED

    def __str__(self):
        return f"agent at {self.address[0]}" if self._agent is None else str(self._agent)

    def __repr__(self):
        return f"<Newcomer {self.address[0]} {self._stage.name}>"

    # What the listener calls

    def ready(self):
        """Worker: take the steps that can be taken."""
        if self._deadline is None:
            self._deadline = monotonic() + REGISTER_TIMEOUT
        try:
            while (stage := RULES[self._stage].step(self)) is not None:
                self._enter(stage)
                if stage is Stage.ADMIT:
                    self._newcomers.submit(self.ready)
                    return
        except NotAdmitted as refusal:
            self._refuse(refusal)
        except ProtocolError as error:
            log.debug("%s: protocol error: %s", self, error)
            if isinstance(error, Flood):
                self._count_failed("")
            self.close(PROTOCOL_ERROR)
        except NoThread as error:
            log.warning("%s: %s; the agent is turned away", self, error)
            self.close()
        except OSError as error:
            log.debug("%s: %s", self, error)
            self.close()
        except Exception:
            log.exception("%s: its registration failed (bug, traceback follows); the connection is "
                          "closed", self)  # fmt: skip
            self._apologize()

    def expired(self):
        """Worker: its time is up."""
        log.debug("%s: closed, %s", self, RULES[self._stage].late)
        self.close()

    def close(self, code=NORMAL):
        """Drop the connection; for the thread that owns it. ``code`` is GO_AWAY's."""
        self._stage = Stage.OVER
        if self._tunnel is not None:
            self._tunnel.close(code)
        elif self._session is not None:
            self._session.close(code=code)
        else:
            self.duplex.close()
        self._newcomers.forget(self)

    def end(self, reason):
        """Break the connection off. Any thread."""
        session = self._session
        if session is not None:
            session.close(reason)
        else:
            self.duplex.reset()

    # From stage to stage

    def _enter(self, stage):
        if stage not in RULES[self._stage].then:
            raise ValueError(f"{stage} came after {self._stage}")
        self._stage, self._waits = stage, 0

    def _park(self):
        """Take the next step when the peer has sent something."""
        self._waits += 1
        left = max(0, self._deadline - monotonic())
        waits = self._waits - self.duplex.received // PIECE
        self._newcomers.listener.await_more(self, left, waits)

    def _look_again(self, stage, seconds):
        """Take the step of ``stage`` in so many seconds, also if the peer sends something."""
        if self._newcomers.listener.stopping:
            raise NotAdmitted("the gateway stops")
        self._enter(stage)
        self._newcomers.listener.call_later(self, self.ready, seconds)

    # The steps. Each returns the next stage, or None if its work goes on later, or is over.

    def _receive_first(self):
        """Add what has come to the buffer."""
        data = self.duplex.receive()
        if data == b"":
            raise SessionClosed("it left before TLS")
        self._buffer += data or b""

    def _read_introduction(self):
        """A trusted proxy may name its agent first (HAProxy's PROXY protocol)."""
        self._receive_first()
        if proxy_protocol.may_begin(self._buffer):
            try:
                found = proxy_protocol.parse(self._buffer)
            except proxy_protocol.NotProxy as error:
                self._newcomers.refusals.log(f"trusted proxy at {self.address[0]}", str(error))
                raise ProtocolError(str(error)) from None
            if found is None:
                return self._park()
            size, source = found
            self._buffer = self._buffer[size:]
            if source is not None:
                self.address = source
                if not self.seat.move(source[0]):
                    raise SessionClosed("no place for another connection of its address")
        if not self._newcomers.attempts.may_open(self.address[0]):
            raise SessionClosed("too many bad tokens came from its address")
        return Stage.HELLO

    def _read_hello(self):
        """Learn what TLS is wanted for: a CA may ask here for a proof (RFC 8737)."""
        self._receive_first()
        try:
            said = self._hello.parse(self._buffer)
        except client_hello.NotTLS as error:
            if proxy_protocol.begins(self._buffer):
                self._newcomers.refusals.log(
                    str(self), "it sent a PROXY header, and TRUSTED_PROXIES does not name it"
                )
            raise ProtocolError(str(error)) from None
        if said is None:
            return self._park()
        validation = said.alpn == (client_hello.ACME_TLS,)
        if not validation:
            context = self._newcomers.context(said.server_name)
        else:
            context = self._newcomers.challenges.context(said.server_name)
            if context is None:
                raise ProtocolError("a CA asks for a proof that was not published")
        self.duplex.unread(self._buffer)
        self._buffer = b""
        self.duplex.start_tls(context, server_side=True)
        return Stage.VALIDATION if validation else Stage.HANDSHAKE

    def _shake_hands(self):
        if not self.duplex.handshake():
            return self._park()
        # One stream: an agent opens the control stream and no other.
        self._session = Session(
            self.duplex, client=False, name=self.address[0], max_streams=1,
            observer=self._newcomers.tunnels.observer,
        )  # fmt: skip
        return Stage.REGISTER

    def _prove(self):
        if not self.duplex.handshake():
            return self._park()
        self.close()

    def _read_register(self):
        self._session.turn()
        if self._session.jammed:  # there is next to nothing that it has to read so far
            raise ProtocolError("the agent does not read its answers")
        if self._control is None and self._session.arrived:
            self._control = ControlStream(self._session.accept(), str(self))
        try:
            message = self._control and next(iter(self._control.read()), None)
        except ProtocolError as error:  # its operator has to hear of it
            raise NotAdmitted(f"invalid registration: {error}", in_the_middle=True) from None
        heard = self._control.received if self._control is not None else 0
        if self.duplex.received - heard > STRANGERS_WASTE:
            raise Flood("more frames than a registration needs")
        if message is None:
            return self._park()
        if not isinstance(message, Register):
            raise ProtocolError(f"a {type(message).__name__.lower()}, expected register")
        return self._identify(message)

    def _identify(self, message):
        """Check the token, and that the agent may have what it asks for."""
        newcomers, tunnels = self._newcomers, self._newcomers.tunnels
        instance = message.instance[:MAX_INSTANCE]
        if not newcomers.attempts.may_show(self.address[0], instance):
            raise NotAdmitted(
                "too many bad tokens came from this address, so not all are looked at", brief=True
            )
        try:
            identity = tunnels.credentials.identify(message.token)
        except TokenInvalid as error:
            return self._delay(NotAdmitted(f"auth failed: {error}"), instance)
        newcomers.attempts.proved(instance)
        self._agent = Agent(self.address, identity, message.instance)
        try:
            routes = read_routes(message, identity, newcomers.max_hosts, newcomers.read_policy)
        except NotGranted as error:
            raise NotAdmitted(str(error)) from None
        self._check_count(len(routes))  # too many by themselves cost no session its end
        tunnel = Tunnel(
            tunnels, self._agent, self._session, self._control,
            features=message.features, routes=routes, ports=message.ports,
            make_room=self.seat.leave,
        )  # fmt: skip
        self._tunnel = tunnel
        self._claim = takeover.Claim(
            tunnels.registry, self._agent, tunnel.wanted, permit=self._check_hostnames
        )
        newcomers.hand_over(self, tunnel)
        return Stage.CLAIM

    def _delay(self, refusal, instance):
        """Refuse a bad token; the more of them its address has sent, the later."""
        self._count_failed(instance)
        self._refusal = refusal
        self._look_again(Stage.DELAYED, self._newcomers.attempts.delay(self.address[0]))

    def _count_failed(self, instance):
        address = self.address[0]
        if news := self._newcomers.attempts.failed(address, instance):
            self._newcomers.refusals.log(f"agents at {address}", news, "%s: %s")

    def _say_no(self):
        raise self._refusal

    def _check_hostnames(self, routes):
        """Whether the credential may have the hostnames that it has in ``routes``, in all its
        sessions. Called under the registry's lock."""
        if self._agent.identity.limits.hostnames is not None:
            credential = self._agent.identity.credential
            self._check_count(
                sum(route.tunnel.identity.credential == credential for route in routes.values())
            )

    def _check_count(self, count):
        most = self._agent.identity.limits.hostnames
        if most is not None and count > most:
            raise NotAdmitted(f"too many hostnames: {count}, at most {most} for this credential")

    def _try_claim(self):
        """Take the hostnames, as soon as no other tunnel holds them. A holder may have to go."""
        if self._session.ended:
            raise SessionClosed(self._session.ended)
        credentials, hostnames = self._newcomers.tunnels.credentials, tuple(self._tunnel.wanted)
        if why := credentials.taken_away(self._agent.identity, hostnames):
            raise NotAdmitted(f"auth failed: {why}")
        try:
            if not self._claim.attempt():
                return self._look_again(Stage.CLAIM, takeover.LOOK)
        except HostnameTaken as taken:
            raise NotAdmitted(str(taken)) from None
        return Stage.ADMIT

    def _admit(self):
        """Worker of registrations: from here on the tunnel is on its own."""
        self.duplex.rationed = False
        self._tunnel.serve()
        self._stage = Stage.OVER

    # Refused

    def _refuse(self, refusal):
        """Say no, and give the agent a moment to read it: closing at once could cost it that."""
        self._newcomers.refusals.log(str(self), str(refusal))
        try:
            self._control.send(Ack(False, str(refusal)))
            if refusal.brief:
                return self.close()
            if refusal.in_the_middle:  # it listens when it has said all
                self._control.stream.close()
            else:
                self.duplex.finish(timeout=0)
        except OSError:
            self.close()
            return
        self._enter(Stage.HEAR_OUT if refusal.in_the_middle else Stage.PARTING)
        self._deadline = monotonic() + PARTING_TIMEOUT
        self._park()

    def _apologize(self):
        """A bug has ended the registration: let the agent's operator know whose it is."""
        try:
            if self._control is not None:
                self._control.send(Ack(False, "the gateway failed by a bug: its log says more"))
        except OSError:
            pass  # it has left
        self.close(INTERNAL_ERROR)

    def _hear_out(self):
        self._session.turn()
        if self.duplex.received > HEARD_OUT:
            raise Flood("it was refused, and goes on")
        self._park()

    def _part(self):
        # One read a step: a peer that sends without end must not have a thread for it.
        if self.duplex.received > HEARD_OUT:
            raise Flood("it was refused, and goes on")
        if self.duplex.receive() == b"":
            return self.close()
        return self._park()


class Rule(NamedTuple):
    """What a newcomer does in a stage. ``then`` are the stages that may follow. ``late`` is why it
    is closed when its time is up; "" if it is never parked in this stage."""

    step: Callable
    then: tuple
    late: str = ""


_LATE = "not registered in time"
_LEFT = "it was refused and did not hang up in time"
RULES = {
    Stage.INTRODUCTION: Rule(Newcomer._read_introduction, (Stage.HELLO,), _LATE),
    Stage.HELLO: Rule(Newcomer._read_hello, (Stage.HANDSHAKE, Stage.VALIDATION), _LATE),
    Stage.HANDSHAKE: Rule(Newcomer._shake_hands, (Stage.REGISTER,), _LATE),
    Stage.VALIDATION: Rule(Newcomer._prove, (), _LATE),
    Stage.REGISTER: Rule(
        Newcomer._read_register,
        (Stage.CLAIM, Stage.DELAYED, Stage.HEAR_OUT, Stage.PARTING), _LATE,
    ),
    Stage.CLAIM: Rule(Newcomer._try_claim, (Stage.CLAIM, Stage.ADMIT, Stage.PARTING)),
    Stage.ADMIT: Rule(Newcomer._admit, ()),
    Stage.DELAYED: Rule(Newcomer._say_no, (Stage.PARTING,)),
    Stage.HEAR_OUT: Rule(Newcomer._hear_out, (), _LEFT),
    Stage.PARTING: Rule(Newcomer._part, (), _LEFT),
}  # fmt: skip
