"""An agent's connection: TLS, registration, heartbeat, data streams, the end.

Until it has registered, an agent is a stranger and costs no thread: its connection is parked with
the port's listener, and a worker takes each step when there is something to read. Registered, it
gets its demultiplexer thread, which also beats the heart.

    stranger  --handshake, register-->  registered  --connection, pong or agent gone-->  closed
        \\---------- refused: the text is sent, then the connection is half-closed -------/
"""

import contextlib
import logging
import threading
from collections import Counter, OrderedDict, deque
from time import monotonic, time

from gotunnel import (
    CERTIFICATES,
    HALF_CLOSE,
    HOST_HEADER,
    INTERNAL_ERROR,
    NORMAL,
    PORTS,
    PROTOCOL_ERROR,
    START_WINDOW,
    Ack,
    Certificate,
    Duplex,
    MessageReader,
    Ping,
    Pong,
    ProtocolError,
    Register,
    Session,
    SessionClosed,
    TokenInvalid,
    VISITOR_ADDRESS,
    encode_data_header,
    encode_message,
    normal_hostname,
    on_one_line,
    valid_host,
    valid_hostname,
)

from . import challenges, hello
from .ports import PortRefused
from .registry import HostnameTaken, Route

log = logging.getLogger("gotunnel.tunnel")

FEATURES = frozenset({CERTIFICATES, HALF_CLOSE, HOST_HEADER, PORTS, VISITOR_ADDRESS})  # extensions that we know
REGISTER_TIMEOUT = 10  # seconds from the first byte to a complete registration
PARTING_TIMEOUT = 3  # seconds that a refused agent has to read why
PING_INTERVAL = 15  # seconds between pings, as the Go gateway's
PONG_TIMEOUT = 20  # seconds without a pong that end the session, as the Go gateway's
BEAT = 5  # seconds between looks at the control stream
OPEN_TIMEOUT = 10  # seconds that a visit waits for an agent that has 256 opens to answer
IDLE_STREAMS = 64  # streams kept for the next visits of a hostname; each holds a target connection
ALL_IDLE_STREAMS = 256  # ... of all hostnames of an agent, which takes 1024 streams in all
IDLE_STREAM_AGE = 30  # seconds that one is kept; a target that closes it earlier does no harm
REFUSALS = 256  # remembered ones, so that each is logged once ...
REFUSAL_MEMORY = 600  # ... in so many seconds: a Go agent comes back every 2


class _Refusal(Exception):
    """We say no; the text is for the agent, ``detail`` for our log."""

    def __init__(self, text, detail=""):
        super().__init__(text)
        self.detail = detail


def _port_of(target):
    """The port of a target as agents write it, "HOST:PORT"; None if there is none."""
    port = target.rpartition(":")[2]
    return int(port) if port.isascii() and port.isdigit() and len(port) <= 5 else None


class Tunnels:
    """All agents' connections of a gateway, and what they need."""

    def __init__(
        self, *, context, challenges, credentials, registry, ports, ensure_certificate,
        certificate_state, max_hosts,
    ):  # fmt: skip
        """``context`` is the TLS context of the port, ``challenges`` what a CA may find there.
        ``ports`` are the public ones for agents, a ports.Ports. ``ensure_certificate(hostname,
        agent)`` sees to it that a hostname can be served, now or soon; ``agent`` is whom to blame.
        ``certificate_state(hostname)`` says how that stands, as in gotunnel.Certificate."""
        self.context = context
        self.challenges = challenges
        self.credentials = credentials
        self.registry = registry
        self.ports = ports
        self.ensure_certificate = ensure_certificate
        self.certificate_state = certificate_state
        self.max_hosts = max_hosts
        self.listener = None  # set before it is started
        self._tunnels = set()
        self._lock = threading.Lock()  # guards _tunnels and _refusals
        self._refusals = OrderedDict()  # (address, text): monotonic time

    def welcome(self, sock, address):
        """For the listener: an agent, or a stranger, has connected."""
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

    def close(self):
        """End all sessions, and wait until they have ended."""
        with self._lock:
            tunnels = list(self._tunnels)
        for tunnel in tunnels:
            tunnel.end("the gateway stops")
        for tunnel in tunnels:
            tunnel.join()

    def log_refusal(self, address, text, detail):
        """Say why somebody was turned away, once: Go agents come back every two seconds."""
        key, now = (address[0], text), monotonic()
        with self._lock:
            last = self._refusals.pop(key, None)
            fresh = last is None or now - last > REFUSAL_MEMORY
            self._refusals[key] = now if fresh else last
            if len(self._refusals) > REFUSALS:
                self._refusals.popitem(last=False)
        log.log(logging.WARNING if fresh else logging.DEBUG, "agent at %s refused: %s%s",
                address[0], text, f" ({detail})" if detail else "")  # fmt: skip


class Tunnel:
    """One agent's connection, from its first byte to its end. Parked with the listener at first."""

    def __init__(self, tunnels, duplex, address):
        self.duplex = duplex
        self.address = address  # as accept() gave it
        self.identity = None
        self.since = None  # wall-clock seconds of the registration
        self.routes = {}  # hostname: Route; empty unless registered
        self.half_close = False  # the agent may be told that a visitor has half-closed
        self._hears_of_certificates = False  # it knows the message
        self._telling = threading.Lock()  # held to look and to tell: the last word is the latest
        self.failed = Counter()  # route's hostname: visits in tcp mode whose target was not reached
        self._tunnels = tunnels
        self._step = self._begin
        self._deadline = None  # monotonic: registered by then
        self._buffer = b""  # of a hello that is not whole
        self._proves = False  # a CA has come, who sees in the handshake all that it wants
        self._session = None
        self._control = None
        self._reader = MessageReader()
        self._ping_at = self._pong_at = 0.0  # monotonic: next ping due, last pong
        self._idle = {}  # hostname: deque of (monotonic time, Stream), the freshest last
        self._idle_count = 0  # streams in it
        self._keeps_idle = True  # False once the agent leaves
        self._idle_lock = threading.Lock()  # guards these three, and failed

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
            self._refuse(str(refusal), refusal.detail)
        except ProtocolError as error:
            log.debug("agent at %s: protocol error: %s", self.address[0], error)
            self.close(PROTOCOL_ERROR)
        except OSError as error:
            log.debug("agent at %s: %s", self.address[0], error)
            self.close()
        except Exception:
            log.exception("agent at %s: a defect", self.address[0])
            self.close(INTERNAL_ERROR)

    def expired(self):
        """Worker: it took too long."""
        log.debug("agent at %s: not registered in %d s", self.address[0], REGISTER_TIMEOUT)
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
            said = hello.parse(self._buffer)
        except hello.NotTLS as error:
            raise ProtocolError(str(error)) from None
        if said is None:
            return self._park()
        context = self._tunnels.context
        if said.alpn == (challenges.ALPN,):
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
        message = self._control and next(iter(self._messages()), None)
        if message is None:
            return self._park()
        if not isinstance(message, Register):
            raise ProtocolError(f"a {type(message).__name__.lower()}, expected register")
        self._step = None
        self._register(message)
        return False

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
        try:
            self.identity = self._tunnels.credentials.identify(message.token)
        except TokenInvalid as error:
            raise _Refusal("auth failed", str(error)) from None
        routes = self._wanted_routes(message)
        session = self._session
        session.on_end = self._ended  # from here on there is something to give back
        session.on_close = lambda: self._tunnels.forget(self)
        try:
            self._tunnels.registry.claim(routes)
        except HostnameTaken as taken:
            raise _Refusal(str(taken)) from None
        for hostname in routes:
            self._tunnels.ensure_certificate(hostname, self.identity.issuer)
        features = tuple(name for name in message.features if name in FEATURES)
        self.half_close = HALF_CLOSE in features
        self.since = time()
        ports, refused = self._open_ports(message, routes) if PORTS in features else ({}, {})
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
        self._hears_of_certificates = CERTIFICATES in features  # from now on: the ack comes first
        for hostname in routes:
            self.tell_certificate(hostname)
        log.info("agent at %s registered %s", self.address[0], ", ".join(routes))
        session.start()

    def tell_certificate(self, hostname):
        """Let the agent know how a certificate stands now. Any thread; waits for nothing."""
        if self._hears_of_certificates:
            with self._telling, contextlib.suppress(OSError):  # it has gone, or does not read
                message = Certificate(hostname, self._tunnels.certificate_state(hostname))
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
                port = self._tunnels.ports.open(wanted, route)
            except PortRefused as error:
                log.warning("agent at %s: %s gets no port: %s", self.address[0], hostname, error)
                refused[route.hostname] = str(error)
                continue
            log.info("agent at %s: port %d leads to %s", self.address[0], port, hostname)
            routes[hostname] = route._replace(port=port)
            opened[route.hostname] = str(port)
        if opened:
            self._tunnels.registry.update(routes)
        return opened, refused

    def _wanted_routes(self, message):
        """What the agent asks for, hostname to Route; raises _Refusal."""
        if not message.routes:
            raise _Refusal("no routes")
        if len(message.routes) > self._tunnels.max_hosts:
            raise _Refusal(
                f"too many hostnames: {len(message.routes)}, at most {self._tunnels.max_hosts}"
            )
        host_headers = message.host_headers if HOST_HEADER in message.features else {}
        routes = {}
        # Agents of a Go gateway register "name:port" too, which is all one to us. The shortest
        # spelling, which is the plain one, comes first and stays.
        for name in sorted(message.routes, key=len):
            hostname, colon, port = name.partition(":")
            if not valid_hostname(hostname) or (colon and not port.isdigit()):
                raise _Refusal(f"invalid hostname: {on_one_line(name, 253)}")
            mode = message.modes.get(name) or "http"
            if mode not in ("http", "tcp"):
                raise _Refusal(f"unknown mode of {name}: {on_one_line(mode, 20)}")
            host = host_headers.get(name)
            if host is not None and not valid_host(host):
                raise _Refusal(f"invalid host_header of {name}: {host[:253]!r}")
            route = Route(
                name, mode, self, host,
                addressed=name in message.addressed and VISITOR_ADDRESS in message.features,
                target_port=_port_of(message.routes[name]),
            )  # fmt: skip
            routes.setdefault(normal_hostname(hostname), route)
        return routes

    def _refuse(self, text, detail=""):
        """Say no, and give the agent a moment to read it: closing at once could cost it that."""
        self._tunnels.log_refusal(self.address, text, detail)
        try:
            self._control.write(encode_message(Ack(False, text)), timeout=0)
            self.duplex.finish(timeout=0)
        except OSError:
            self.close()
            return
        self._step = self._part
        self._deadline = monotonic() + PARTING_TIMEOUT
        self._park()

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
            if any(isinstance(message, Pong) for message in self._messages()):
                self._pong_at = now
            if now - self._pong_at > PING_INTERVAL + PONG_TIMEOUT:
                self._session.close(f"no pong in {PONG_TIMEOUT} s")
                return
            if now >= self._ping_at:
                self._ping_at = now + PING_INTERVAL
                self._control.write(encode_message(Ping(int(time() * 1000))), timeout=0)
        except (OSError, ProtocolError) as error:
            self._session.close(str(error))
            return
        self._drop_idle(older_than=now - IDLE_STREAM_AGE)
        self._session.call_later(BEAT, self._beat)

    def _leaving(self):
        """Demultiplexer: the agent takes no new streams. Its hostnames are free at once; what
        runs goes on."""
        log.info("agent at %s leaves, with %s", self.address[0], ", ".join(self.routes))
        self._tunnels.ports.release(self)  # first: who gets the hostname may want its port, too
        self._tunnels.registry.release(self)
        self.routes = {}
        with self._idle_lock:
            self._keeps_idle = False
        self._drop_idle()

    def _ended(self):
        """Whoever ends the session: give everything back."""
        self._tunnels.ports.release(self)  # first: who gets the hostname may want its port, too
        self._tunnels.registry.release(self)
        self._drop_idle()
        if self.routes:
            log.info("agent at %s gone, with %s: %s",
                     self.address[0], ", ".join(self.routes), self._session.ended)  # fmt: skip

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

        Raises ConnectionError, TimeoutError.
        """
        header = encode_data_header(route.hostname, ends() if route.addressed else None)
        return self._session.open(header + first, timeout=OPEN_TIMEOUT)

    def count_failed(self, route):
        """A visit has come to nothing."""
        with self._idle_lock:
            self.failed[route.hostname] += 1

    def take_idle(self, route):
        """A stream that an earlier visit left in good order, or None."""
        while True:
            with self._idle_lock:
                kept = self._idle.get(route.hostname)
                if not kept:
                    return None
                at, stream = kept.pop()
                self._idle_count -= 1
            if monotonic() - at < IDLE_STREAM_AGE and stream.quiet:
                return stream
            stream.close()

    def keep_idle(self, route, stream):
        """Keep a stream whose last answer was complete for the next visit of that hostname."""
        with self._idle_lock:
            kept = self._idle.setdefault(route.hostname, deque())
            room = len(kept) < IDLE_STREAMS and self._idle_count < ALL_IDLE_STREAMS
            # A window that has grown is given back only by the end of its stream.
            small = stream.window <= START_WINDOW
            # An agent tells its target the visitor's address once, when it connects.
            keeps = self._keeps_idle and not route.addressed
            if keeps and room and small and stream.quiet:
                kept.append((monotonic(), stream))
                self._idle_count += 1
                return
        stream.close()

    def _drop_idle(self, older_than=float("inf")):
        late = []
        with self._idle_lock:
            for kept in self._idle.values():
                while kept and kept[0][0] < older_than:
                    late.append(kept.popleft()[1])
            self._idle_count -= len(late)
        for stream in late:
            stream.close()
