"""An agent's connection: TLS, registration, heartbeat, data streams, the end.

Until it has registered, an agent is a stranger and costs no thread: its connection is parked with
the port's listener, and a worker takes each step when there is something to read. Registered, it
gets its demultiplexer thread, which also beats the heart.

    stranger  --handshake, register-->  registered  --connection, pong or agent gone-->  closed
        \\                                    \\-- replaced, or its credential taken away ---/
         \\--- refused: the text is sent, then the connection is half-closed -------------/
"""

import contextlib
import logging
import re
import threading
from collections import Counter, OrderedDict
from time import monotonic, time

from gotunnel import (
    CERTIFICATES,
    HALF_CLOSE,
    HOST_HEADER,
    INTERNAL_ERROR,
    NORMAL,
    POLICIES,
    PORTS,
    PROTOCOL_ERROR,
    REASONS,
    REPLACED,
    START_WINDOW,
    VISITOR_ADDRESS,
    WILDCARDS,
    Ack,
    Certificate,
    Duplex,
    End,
    MessageReader,
    Ping,
    Pong,
    ProtocolError,
    Register,
    Session,
    SessionClosed,
    encode_data_header,
    encode_message,
)

from ..net import client_hello
from ..routes import AgentBusy, HostnameTaken
from . import limits, takeover
from .credentials import TokenInvalid
from .ports import PortRefused
from .registration import NotGranted, read_routes
from .stream_pool import KeptStreams

log = logging.getLogger("gotunnel.tunnel")

FEATURES = frozenset({  # extensions that we know
    CERTIFICATES, HALF_CLOSE, HOST_HEADER, POLICIES, PORTS, REASONS, VISITOR_ADDRESS, WILDCARDS,
})  # fmt: skip
REGISTER_TIMEOUT = 10  # seconds from the first byte to a complete registration
PARTING_TIMEOUT = 3  # seconds that a refused agent has to read why
PING_INTERVAL = 15  # seconds between pings, as the Go gateway's
PONG_TIMEOUT = 20  # seconds without a pong that end the session, as the Go gateway's
BEAT = 5  # seconds between looks at the control stream
# Seconds that a session's last frames have, where another waits for its hostnames: they may stand
# behind what another thread is about to send; on a line that is cut they never go.
LAST_WORD = 0.2
ANSWER_TIMEOUT = 3  # seconds for a pong, while another agent waits for the hostname
ANSWER_LOOK = 0.1  # seconds between looks for it
SIGN_OF_LIFE = 1  # seconds: who has sent anything so lately lives, on a line where pongs queue
REVOKED = "revoked"  # why a session ends: what its credential permits has changed
OPEN_TIMEOUT = 10  # seconds that a visit waits for an agent that has 256 opens to answer
REFUSALS = 256  # remembered ones, so that each is logged once ...
REFUSAL_MEMORY = 600  # ... in so many seconds: a Go agent comes back every 2


_NOTHING = contextlib.nullcontext()
_SPAN = re.compile("[0-9]+ (s|min|h|d)(?= ago| from now)")


class _Refusal(Exception):
    """We say no; the text is for the agent. ``in_the_middle``: it has not said all yet."""

    def __init__(self, text, in_the_middle=False):
        super().__init__(text)
        self.in_the_middle = in_the_middle


class Tunnels:
    """All agents' connections of a gateway, and what they need."""

    def __init__(
        self, *, context, challenges, credentials, attempts, registry, ports, read_policy,
        ensure_certificates, certificate_state, max_hosts,
    ):  # fmt: skip
        """``context`` is the TLS context of the port, ``challenges`` what a CA may find there.
        ``attempts`` counts those whose token was no good. ``ports`` are the public ones for agents,
        a ports.Ports. ``read_policy`` is as for read_routes(). ``ensure_certificates(
        hostnames, agent)`` sees to it that they can be served, now or soon; ``agent`` is whom to
        blame. ``certificate_state(hostname)`` says how that stands, as in gotunnel.Certificate."""
        self.context = context
        self.challenges = challenges
        self.credentials = credentials
        self.attempts = attempts
        self.registry = registry
        self.ports = ports
        self.read_policy = read_policy
        self.ensure_certificates = ensure_certificates
        self.certificate_state = certificate_state
        self.max_hosts = max_hosts
        self.listener = None  # set before it is started
        self._tunnels = set()
        self._lock = threading.Lock()  # guards _tunnels and _refusals
        self.limiting = threading.Lock()  # held to count what an agent has, and to take more
        self._refusals = OrderedDict()  # (address, text): monotonic time

    def welcome(self, sock, address):
        """For the listener: an agent, or a stranger, has connected. None for one who has guessed
        too often."""
        if self.attempts.closed(address[0]):
            return None
        tunnel = Tunnel(self, Duplex(sock), address)
        with self._lock:
            self._tunnels.add(tunnel)
        return tunnel

    def forget(self, tunnel):
        with self._lock:
            known = tunnel in self._tunnels
            self._tunnels.discard(tunnel)
        if known:
            self.listener.forget()

    def registered(self) -> list:
        """The tunnels that serve hostnames now."""
        with self._lock:
            return [tunnel for tunnel in self._tunnels if tunnel.routes]

    def of_credential(self, credential) -> list:
        """All tunnels of one credential, those included that leave, and still have visits."""
        with self._lock:
            return [
                tunnel for tunnel in self._tunnels
                if tunnel.identity is not None and tunnel.identity.credential == credential
            ]  # fmt: skip

    def end_revoked(self):
        """End the sessions of those who may no longer do what they do. One that leaves may still
        have visits."""
        with self._lock:
            tunnels = [tunnel for tunnel in self._tunnels if tunnel.since is not None]
        for tunnel in tunnels:
            tunnel.end_if_revoked()

    def close(self):
        """End all sessions, and wait until they have ended."""
        with self._lock:
            tunnels = list(self._tunnels)
        for tunnel in tunnels:
            tunnel.end("the gateway stops")
        for tunnel in tunnels:
            tunnel.join()

    def log_refusal(self, agent, text):
        """Say why somebody was turned away, once: Go agents come back every two seconds."""
        key, now = (agent, _SPAN.sub("#", text)), monotonic()  # one reason, whenever
        with self._lock:
            last = self._refusals.pop(key, None)
            fresh = last is None or now - last > REFUSAL_MEMORY
            self._refusals[key] = now if fresh else last
            if len(self._refusals) > REFUSALS:
                self._refusals.popitem(last=False)
        log.log(logging.WARNING if fresh else logging.DEBUG, "%s refused: %s", agent, text)


class Tunnel:
    """One agent's connection, from its first byte to its end. Parked with the listener at first."""

    def __init__(self, tunnels, duplex, address):
        self.duplex = duplex
        self.address = address  # as accept() gave it
        self.identity = None
        self.instance = ""  # the agent's, "" if it has none
        self.gone = threading.Event()  # it holds no hostname any more, and never will
        self.since = None  # wall-clock seconds of the registration
        self.routes = {}  # hostname: Route; empty unless registered
        self.half_close = False  # the agent may be told that a visitor has half-closed
        self._unlimited = True  # its credential sets no limit to streams and visits
        self._features = frozenset()  # those that both know, from the ack on
        self._parting = None  # (code, reason) of its End, once it has to go
        self._serving = False  # the session has started; before, nobody could tell the agent why
        self._telling = threading.Lock()  # held to look and to tell: the last word is the latest
        self.failed = Counter()  # route's hostname: visits in tcp mode whose target was not reached
        self._counting = threading.Lock()  # guards it
        self._tunnels = tunnels
        self._step = self._begin
        self._deadline = None  # monotonic: registered by then
        self._buffer = b""  # of a hello that is not whole
        self._hello = client_hello.Reader()
        self._proves = False  # a CA has come, who sees in the handshake all that it wants
        self._session = None
        self._control = None
        self._reader = MessageReader()
        self._ping_at = self._pong_at = 0.0  # monotonic: next ping due, last pong
        self._asking = threading.Lock()  # guards the next one
        self._asked_at = None  # monotonic, while somebody waits for an answer
        self._answered_at = 0.0  # monotonic, of the last answer to that
        self._kept = KeptStreams()

    def __str__(self):
        """Who it is, for the log: with its name, if AGENTS_FILE has it."""
        named = self.identity is not None and self.identity.entry is not None
        name = f" {self.identity.name}" if named else ""
        return f"agent{name} at {self.address[0]}"

    def __repr__(self):
        return f"<Tunnel {self.address[0]} {', '.join(self.routes) or 'not registered'}>"

    # Stranger: steps, each of which parks when it has to wait

    def ready(self):
        """Worker: take the steps that can be taken."""
        if self._deadline is None:
            self._deadline = monotonic() + REGISTER_TIMEOUT
        try:
            while (step := self._step) is not None and step():
                pass
        except _Refusal as refusal:
            self._refuse(str(refusal), refusal.in_the_middle)
        except ProtocolError as error:
            log.debug("%s: protocol error: %s", self, error)
            self.close(PROTOCOL_ERROR)
        except OSError as error:
            log.debug("%s: %s", self, error)
            self.close()
        except Exception:
            log.exception("%s: a defect", self)
            self.close(INTERNAL_ERROR)

    def expired(self):
        """Worker: it took too long."""
        log.debug("%s: not registered in %d s", self, REGISTER_TIMEOUT)
        self.close()

    def close(self, code=NORMAL):
        """Drop the connection; whoever owns it now calls this. ``code`` is GO_AWAY's."""
        if self._session is not None:
            self._session.close(code=code)
        else:
            self.duplex.close()
        self._tunnels.forget(self)

    def _park(self):
        left = self._deadline - monotonic()
        self._tunnels.listener.park(self, max(left, 0))
        return False

    def _begin(self):
        """Learn what TLS is wanted for: a CA may ask here for a proof (RFC 8737)."""
        data = self.duplex.receive()
        if data == b"":
            raise SessionClosed("it left before TLS")
        self._buffer += data or b""
        try:
            said = self._hello.parse(self._buffer)
        except client_hello.NotTLS as error:
            raise ProtocolError(str(error)) from None
        if said is None:
            return self._park()
        context = self._tunnels.context
        if said.alpn == (client_hello.ACME_TLS,):
            context = self._tunnels.challenges.context(said.server_name)
            if context is None:
                raise ProtocolError("a CA asks for a proof that was not published")
            self._proves = True
        self.duplex.unread(self._buffer)
        self._buffer = b""
        self.duplex.start_tls(context, server_side=True)
        self._step = self._handshake
        return True

    def _handshake(self):
        if not self.duplex.handshake():
            return self._park()
        if self._proves:
            self.close()
            return False
        # One stream: an agent opens the control stream and no other.
        self._session = Session(self.duplex, client=False, name=self.address[0], max_streams=1)
        self._step = self._read_registration
        return True

    def _read_registration(self):
        self._session.turn()
        if self._session.jammed:  # there is next to nothing that it has to read so far
            raise ProtocolError("the agent does not read its answers")
        if self._control is None and self._session.arrived:
            self._control = self._session.accept()
        try:
            message = self._control and next(iter(self._messages()), None)
        except ProtocolError as error:  # its operator has to hear of it
            raise _Refusal(f"invalid registration: {error}", in_the_middle=True) from None
        if message is None:
            return self._park()
        if not isinstance(message, Register):
            raise ProtocolError(f"a {type(message).__name__.lower()}, expected register")
        return self._register(message)

    def _messages(self):
        """The control messages that are here."""
        messages = []
        try:
            while data := self._control.read(timeout=0):
                messages += self._reader.feed(data)
        except TimeoutError:
            return messages
        if not messages:
            raise SessionClosed("the agent ended the control stream")
        return messages

    # Registration

    def _register(self, message):
        """Find out who the agent is, and what it may have."""
        try:
            self.identity = self._tunnels.credentials.identify(message.token)
        except TokenInvalid as error:
            self._turn_away(f"auth failed: {error}")
            return False
        self.instance = message.instance
        try:
            routes = read_routes(
                message, self, self.identity, self._tunnels.max_hosts, self._tunnels.read_policy
            )
        except NotGranted as error:
            raise _Refusal(str(error)) from None
        self._check_hostnames(routes)  # too many by themselves cost nobody a session
        session = self._session
        session.on_end = self._ended  # from here on there is something to give back
        session.on_close = lambda: self._tunnels.forget(self)
        registry = self._tunnels.registry
        claim = takeover.Claim(registry, self, routes, permit=self._check_hostnames)
        self._step = lambda: self._claim(claim, message, routes)
        return True

    def _turn_away(self, text):
        """Refuse who cannot show who it is; the more often it has tried, the later."""
        attempts, address = self._tunnels.attempts, self.address[0]
        attempts.failed(address)

        def refuse():
            raise _Refusal(text)

        self._step = refuse
        self._look_again(attempts.delay(address))

    def _look_again(self, seconds):
        """Take the next step later, whatever the agent sends."""
        if self._tunnels.listener.stopping:
            raise _Refusal("the gateway stops")
        self._tunnels.listener.call_later(self.ready, seconds)
        return False

    def _claim(self, claim, message, routes):
        """Take the hostnames, as soon as nobody else holds them. Who does may have to go."""
        if self._session.ended:
            raise SessionClosed(self._session.ended)
        if why := self._tunnels.credentials.taken_away(self.identity, tuple(routes)):
            raise _Refusal(f"auth failed: {why}")
        try:
            if not claim.attempt():
                return self._look_again(takeover.LOOK)
        except HostnameTaken as taken:
            raise _Refusal(str(taken)) from None
        self._step = None
        try:
            self._take_up(message, routes)
        except OSError:
            self._ended()  # once more: the session may have ended before it had all of it
            raise
        return False

    def _check_hostnames(self, routes):
        """Whether the credential permits as many as it has in ``routes``, in all its sessions."""
        most, credential = self.identity.limits.hostnames, self.identity.credential
        if most is None:
            return
        count = sum(route.tunnel.identity.credential == credential for route in routes.values())
        if count > most:
            raise _Refusal(f"too many hostnames: {count}, at most {most} for this credential")

    def _take_up(self, message, routes):
        """Everything is granted: tell the agent, and begin to serve."""
        session = self._session
        agent = self.identity.credential
        if self.identity.entry is None:  # the common one: tell agents apart by where they are
            agent = (*agent, self.address[0])
        self._tunnels.ensure_certificates(tuple(routes), agent)
        features = tuple(name for name in message.features if name in FEATURES)
        self.half_close = HALF_CLOSE in features
        most = self.identity.limits
        self._unlimited = most.streams is None and most.visits is None
        self.since = time()
        opens_ports = PORTS in features and not session.ended
        ports, refused = self._open_ports(message, routes) if opens_ports else ({}, {})
        self.routes = routes
        self._ping_at = monotonic() + PING_INTERVAL
        self._pong_at = monotonic()
        session.on_leave = self._leaving
        session.widen(START_WINDOW)
        session.call_later(BEAT, self._beat)
        # The ack is on its way before the demultiplexer reads on: a Go agent loses what comes in
        # the same read.
        ack = Ack(True, features=features, ports=ports, refused=refused)
        self._control.write(encode_message(ack))
        self._features = frozenset(features)  # from now on: the ack comes first
        for hostname in routes:
            self.tell_certificate(hostname)
        log.info("%s registered %s", self, ", ".join(routes))
        session.start()
        with self._telling:
            self._serving = True
        if self._parting:
            self.part(*self._parting)
        self.end_if_revoked()

    def tell_certificate(self, hostname):
        """Let the agent know how a certificate stands now. Any thread; waits for nothing."""
        if CERTIFICATES in self._features:
            with self._telling:
                self._tell(Certificate(hostname, self._tunnels.certificate_state(hostname)))

    def _tell(self, message):
        with contextlib.suppress(OSError):  # it has gone, or does not read
            self._control.write(encode_message(message), timeout=0)

    def _open_ports(self, message, routes):
        """Open the public ports that the agent asks for, one a hostname. Returns hostname to port,
        and hostname to why there is none; both spelled as it registered them."""
        opened, refused = {}, {}
        for hostname, route in routes.items():
            wanted = message.ports.get(route.hostname)
            if wanted is None:
                continue
            try:
                if route.mode != "tcp":
                    raise PortRefused("a port is for a hostname in tcp mode")
                port = self._tunnels.ports.open(wanted, route, self.identity.why_not_port)
            except PortRefused as error:
                log.warning("%s: %s gets no port: %s", self, hostname, error)
                refused[route.hostname] = str(error)
                continue
            log.info("%s: port %d leads to %s", self, port, hostname)
            routes[hostname] = route._replace(port=port)
            opened[route.hostname] = str(port)
        if opened:
            self._tunnels.registry.update(routes)
        return opened, refused

    def _refuse(self, text, in_the_middle):
        """Say no, and give the agent a moment to read it: closing at once could cost it that."""
        self._tunnels.log_refusal(str(self), text)
        try:
            self._control.write(encode_message(Ack(False, text)), timeout=0)
            if in_the_middle:  # it listens when it has said all
                self._control.close()
            else:
                self.duplex.finish(timeout=0)
        except OSError:
            self.close()
            return
        self._step = self._hear_out if in_the_middle else self._part
        self._deadline = monotonic() + PARTING_TIMEOUT
        self._park()

    def _hear_out(self):
        self._session.turn()
        return self._park()

    def _part(self):
        # One read a step: who sends without end must not have a thread for it.
        if self.duplex.receive() == b"":
            self.close()
            return False
        return self._park()

    # Registered

    def _beat(self):
        """Demultiplexer: ping, and see that pongs come. Waits for nothing."""
        now = monotonic()
        try:
            self._take_pongs(now)
            if now - self._pong_at > PING_INTERVAL + PONG_TIMEOUT:
                self._session.close(f"no pong in {PONG_TIMEOUT} s")
                return
            if now >= self._ping_at:
                self._ping_at = now + PING_INTERVAL
                self._control.write(encode_message(Ping(int(time() * 1000))), timeout=0)
        except (OSError, ProtocolError) as error:
            self._session.close(str(error))
            return
        self._kept.close_old()
        self._session.call_later(BEAT, self._beat)

    def _take_pongs(self, now):
        if any(isinstance(message, Pong) for message in self._messages()):
            self._pong_at = self._answered_at = now

    # Another agent wants one of its hostnames

    def ask(self) -> float:
        """Have the agent show that it lives; if it does not in ANSWER_TIMEOUT, the session ends.
        Returns since when (monotonic) it is asked. Any thread."""
        with self._asking:
            if self._asked_at is None:
                self._asked_at = monotonic()
                self._session.call_later(0, self._ask)
            return self._asked_at

    def has_answered(self, since) -> bool:
        return self._answered_at > since

    def _ask(self):
        """Demultiplexer: ping at once. Only now does the agent's time begin."""
        with self._asking:
            self._asked_at = monotonic()
        self._tell(Ping(int(time() * 1000)))
        self._await_answer()

    def _await_answer(self):
        """Demultiplexer: look for the pong, again and again."""
        now = monotonic()
        try:
            self._take_pongs(now)
        except (OSError, ProtocolError) as error:
            self._session.close(str(error))
            return
        if now - self._asked_at > ANSWER_TIMEOUT:
            if now - self._session.heard_at > SIGN_OF_LIFE:
                self.replace(f"its agent did not answer in {ANSWER_TIMEOUT} s")
                return
            self._answered_at = now
        if self._answered_at > self._asked_at:
            with self._asking:
                self._asked_at = None
            return
        self._session.call_later(ANSWER_LOOK, self._await_answer)

    def replace(self, reason):
        """End the session at once: another takes its place. Any thread."""
        self.part(REPLACED, f"another session takes over: {reason}")

    def end_if_revoked(self):
        """End the session if its credential does not permit it any more. Any thread."""
        why = self._tunnels.credentials.taken_away(self.identity, tuple(self.routes))
        if why:
            self.part(REVOKED, why)

    def part(self, code, reason):
        """End the session at once, and tell the agent why if it wants to know. Any thread."""
        with self._telling:
            self._parting = code, reason
            if not self._serving:
                return  # _take_up() comes back to it, in a moment
        if REASONS in self._features:
            self._tell(End(code, reason))
        self._session.close(reason, patience=LAST_WORD)

    # The end

    def _leaving(self):
        """Demultiplexer: the agent takes no new streams. Its hostnames are free at once; what
        runs goes on."""
        if self._parting:
            return  # it goes because it was told to: _ended() says why
        log.info("%s leaves, with %s", self, ", ".join(self.routes))
        self._give_back()
        self.routes = {}

    def _ended(self):
        """Whoever ends the session: give everything back."""
        self._give_back()
        self.gone.set()
        if self.routes:
            log.info("%s gone, with %s: %s",
                     self, ", ".join(self.routes), self._session.ended)  # fmt: skip
        self.routes = {}

    def _give_back(self):
        self._tunnels.ports.release(self)  # first: who gets the hostname may want its port, too
        self._tunnels.registry.release(self)
        self._kept.close()

    def end(self, reason):
        """End the session; a stranger's connection is broken, which its worker or the listener
        notices. Any thread."""
        if self._session is not None:
            self._session.close(reason)
        else:
            self.duplex.reset()

    def join(self):
        if self._session is not None:
            self._session.join()

    # Data streams, for visits

    def open(self, route, ends, first=b""):
        """A new stream for a visit; ``first`` bytes go along. ``ends()`` gives the visitor's, for
        an agent that wants to know.

        Raises AgentBusy, ConnectionError, TimeoutError.
        """
        header = encode_data_header(route.hostname, ends() if route.addressed else None)
        if self._unlimited:
            return self._session.open(header + first, timeout=OPEN_TIMEOUT)
        try:
            return self._session.open(header + first, OPEN_TIMEOUT, self._permit(streams=1))
        except AgentBusy:
            if self.identity.limits.streams is None:
                raise
        for tunnel in self._tunnels.of_credential(self.identity.credential):
            tunnel._kept.close_all()  # a visit that is there comes before those that may come
        return self._session.open(header + first, OPEN_TIMEOUT, self._permit(streams=1))

    @contextlib.contextmanager
    def _permit(self, streams):
        """Within it, nobody else begins a visit of the credential; raises AgentBusy."""
        with self._tunnels.limiting:
            tunnels = self._tunnels.of_credential(self.identity.credential)
            usages = [tunnel.usage() for tunnel in tunnels]
            limits.check(self.identity.limits, usages, streams)
            yield

    def usage(self) -> limits.Usage:
        """What the session has now, without its control stream."""
        streams = [s for s in self._session.streams_in_use() if s is not self._control]
        return limits.Usage(len(streams), sum(stream not in self._kept for stream in streams))

    def count_failed(self, route):
        """A visit has come to nothing."""
        with self._counting:
            self.failed[route.hostname] += 1

    def take_kept(self, route):
        """A stream that an earlier visit left in good order, or None. Raises AgentBusy."""
        while (stream := self._pop_kept(route)) is not None:
            if stream.quiet:
                return stream
            stream.close()
        return None

    def _pop_kept(self, route):
        with _NOTHING if self._unlimited else self._permit(streams=0):
            return self._kept.pop(route.hostname)

    def keep(self, route, stream):
        """Keep a stream whose last answer was complete for the next visit of that hostname."""
        if route.addressed:  # its agent tells a target the visitor's address once
            stream.close()
        else:
            self._kept.put(route.hostname, stream)
