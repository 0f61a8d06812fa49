"""A visitor's arrival: which protocol does it speak, and which route is it for?

    first bytes --> TLS: ClientHello, handshake --> tcp: relay
            |                                   \\-> http: HttpConnection
            |-> PROXY header of a trusted proxy, then first bytes
            |-> PostgreSQL's SSLRequest: answer, then TLS; its CancelRequest: relay
            |-> HTTP that is not encrypted: HttpConnection, which redirects
            \\-> SSH, silence: relay

Each step does what can be done with what has come, and parks the connection if more must come: a
visitor that is slow or silent holds no worker.
"""

import enum
import logging
from time import monotonic

from gotunnel_agent.common import proxy_protocol

from ..net import client_hello
from . import relays, sniff
from .connection import HttpConnection
from .request import VisitorGone
from .steps import Named, Step, Stepwise
from .verdict import Answer

log = logging.getLogger("gotunnel.arrival")

# Seconds after which a visitor that says nothing waits for the server's greeting, if RAW_TCP_HOST
# says which server that is. A visitor that speaks TLS or HTTP begins at once.
SILENCE = 0.3
# Seconds that a trusted proxy has for the header that names its visitor; with none it is taken for
# the visitor itself.
INTRODUCTION = 0.3
# Seconds that a visitor waits for a certificate that is being made, and between two looks.
CERTIFICATE_TIMEOUT = 10
CERTIFICATE_LOOK = 0.25


class State(Named):
    """What is awaited."""

    CONNECTED = enum.auto()  # a trusted proxy's header; its time has not begun
    INTRODUCTION = enum.auto()  # a trusted proxy's header
    INTRODUCTION_BEGUN = enum.auto()  # the rest of it
    SILENCE = enum.auto()  # first bytes, or that none come: there is a server that would greet
    GREETING = enum.auto()  # nothing: the visitor waits for the server's greeting
    FIRST_BYTES = enum.auto()  # enough first bytes to tell the protocol
    TLS_ASKED = enum.auto()  # the ClientHello that PostgreSQL's client has asked for
    CERTIFICATE = enum.auto()  # a certificate that is being made
    HANDSHAKE = enum.auto()  # the rest of the TLS handshake
    PROOF = enum.auto()  # the rest of a CA's TLS handshake


class Arrival(Stepwise):
    """A connection from its first byte until its protocol and its route are known. Then it hands
    its Visitor over, to an HttpConnection or to a relay."""

    def __init__(self, port, visitor, route=None):
        """``route`` is where the port leads, if that is known before a byte has come."""
        self._route = route
        self._buffer = b""  # first bytes that are not understood yet
        super().__init__(port, visitor, State.CONNECTED)
        if visitor.address[0] not in port.proxies:
            self._await_first_bytes()
        self._hello = client_hello.Reader()
        self._protocols = ()  # what it offers by ALPN
        self._refused_gss = False  # PostgreSQL's client has asked for GSSAPI encryption

    def _receive(self):
        """Add what has come to the buffer."""
        data = self.duplex.receive()
        if data == b"":
            raise VisitorGone
        if data is not None:
            if not self._buffer:
                self._hear()
            self._buffer += data

    def _read_introduction(self):
        """A trusted proxy may name its visitor first (HAProxy's PROXY protocol)."""
        if self._state is State.CONNECTED:
            self._go_to(State.INTRODUCTION)
        self._receive()
        if proxy_protocol.may_begin(self._buffer):
            try:
                found = proxy_protocol.parse(self._buffer)
            except proxy_protocol.NotProxy as error:
                log.warning("trusted proxy at %s: %s", self._visitor.address[0], error)
                raise VisitorGone from None
            if found is None:
                return self._wait(self._port.timeouts.header if self._buffer else INTRODUCTION)
            size, source = found
            self._buffer = self._buffer[size:]
            if source is not None:
                self._visitor.introduce(source)
        return self._await_first_bytes()

    def _await_first_bytes(self):
        greets = self._route is not None or self._port.raw_host is not None
        return self._go_to(State.SILENCE if greets and not self._buffer else State.FIRST_BYTES)

    # First bytes

    def _read_first(self):
        """Learn which protocol the visitor speaks, before anything that costs us much."""
        if self._route is not None:
            return self._relay(self._route)
        self._receive()
        self._visitor.refuse_introduction(self._buffer)
        knock = sniff.knock(self._buffer)
        if knock is not None and not proxy_protocol.may_begin(self._buffer):
            entered = self._enter(*knock)
            if entered is not None:
                return entered
        return self._wait(SILENCE if self._state is State.SILENCE else self._port.timeouts.header)

    def _listen_in_silence(self):
        """The visitor waits to be greeted, if there is a server that would do so; unless the
        visitor has spoken since, and we were late."""
        if self._route is None:
            self._receive()
        route = self._route or self._port.raw_route()
        if route is None and not self._buffer and self._port.raw_host is not None:
            return self._refuse_tcp(self._port.raw_host)
        if self._buffer or route is None:
            return self._go_to(State.FIRST_BYTES)
        return self._relay(route)

    def _enter(self, kind, size):
        """Go on as the protocol says; None if more must come, else what a step returns."""
        if self._state is State.TLS_ASKED and kind != sniff.TLS:
            raise client_hello.NotTLS("TLS was asked for and has not come")
        if kind == sniff.TLS:
            return self._enter_tls()
        if kind == sniff.HTTP:
            self._give_back()
            return self._serve_http(self._port.redirect, scheme="http")
        if kind in (sniff.SSL_REQUEST, sniff.GSS_REQUEST):
            return self._answer_postgres(kind, size)
        if kind == sniff.CANCEL_REQUEST:
            return self._cancel()
        route = self._port.raw_route(ssh=kind == sniff.SSH)
        if route is None:
            self._port.say_once(
                "%s dropped: it speaks no TLS, and no tcp hostname is there for it "
                "(RAW_TCP_HOST)", self._visitor,
            )  # fmt: skip
            self.duplex.reset()  # not an empty but complete visit
            raise VisitorGone
        return self._relay(route)

    def _answer_postgres(self, kind, size):
        # A man in the middle may have put bytes behind the request, to have them taken for
        # encrypted ones (CVE-2021-23214).
        if len(self._buffer) > size:
            raise ConnectionAbortedError("bytes between PostgreSQL's SSLRequest and TLS")
        self._buffer = b""
        if kind == sniff.SSL_REQUEST:
            self.duplex.write(sniff.YES, timeout=0)
            return self._go_to(State.TLS_ASKED)
        if self._refused_gss:  # each answer would give it more time
            raise ConnectionAbortedError("a second GSSENCRequest")
        self._refused_gss = True
        self.duplex.write(sniff.NO, timeout=0)
        return self._go_to(State.FIRST_BYTES)

    def _cancel(self):
        """PostgreSQL's client wants to cancel what another connection of it does."""
        if len(self._buffer) < int.from_bytes(self._buffer[:4], "big"):
            return None
        route = self._port.cancel_keys.route(self._buffer) or self._port.raw_route()
        if route is None:
            self._port.say_once(
                "%s: PostgreSQL's CancelRequest is for no session that is known here, and reaches "
                "nothing: the session is over, or its client does not come by TLS", self._visitor,
            )  # fmt: skip
            raise VisitorGone
        return self._relay(route)

    def _give_back(self):
        self.duplex.unread(self._buffer)
        self._buffer = b""

    # TLS

    def _enter_tls(self):
        """Learn the hostname before the handshake: a broken hello costs us none."""
        said = self._hello.parse(self._buffer)
        if said is None:
            return None
        self._visitor.sni = said.server_name
        self._give_back()
        if said.alpn == (client_hello.ACME_TLS,):
            return self._prove()
        if self._state is State.TLS_ASKED or client_hello.POSTGRESQL in said.alpn:
            self._visitor.cancel_keys = self._port.cancel_keys
        self._protocols = said.alpn
        if self._port.awaits_certificate(said.server_name):
            self._go_to(State.CERTIFICATE)
            self._deadline = monotonic() + CERTIFICATE_TIMEOUT
            return True
        return self._begin_handshake()

    def _begin_handshake(self):
        sni, protocol = self._visitor.sni, None
        route = sni and self._port.lookup(sni)
        if route and route.mode == "tcp":
            protocol = client_hello.own_protocol(self._protocols)
        return self._start_tls(self._port.context(sni, protocol), State.HANDSHAKE)

    def _start_tls(self, context, state):
        self.duplex.start_tls(context, server_side=True)
        return self._go_to(state)

    def _await_certificate(self):
        """Look again and again whether it is there; in the end the handshake fails by an alert."""
        if self._port.is_draining():
            self.close()
            return False
        left = self._deadline - monotonic()
        if left <= 0 or not self._port.awaits_certificate(self._visitor.sni):
            return self._begin_handshake()
        # Not park(): what the visitor has sent would bring it back at once.
        self._visitor.listener.call_later(self, self.ready, min(left, CERTIFICATE_LOOK))
        return False

    def _prove(self):
        """A TLS-ALPN-01 validation: all that the CA wants to see is in the handshake (RFC 8737)."""
        context = self._port.challenges.context(self._visitor.sni)
        if context is None:
            raise client_hello.NotTLS("a CA asks for a proof that was not published")
        return self._start_tls(context, State.PROOF)

    def _handshake(self):
        if not self.duplex.handshake():
            return self._wait(self._port.timeouts.header)
        if self._state is State.PROOF:
            self.close()
            return False
        sni = self._visitor.sni
        route = sni and self._port.lookup(sni)
        if route and route.mode == "tcp":
            return self._relay(route)
        if sni and route is None and self._port.has_left_in_tcp(sni):
            return self._refuse_tcp(sni)
        return self._serve_http(self._port.site, scheme="https")

    # Handing over

    def _serve_http(self, site, scheme):
        HttpConnection(self._port, self._visitor, site, scheme).ready()
        return False

    def _refuse_tcp(self, hostname):
        """The agent of a hostname in tcp mode is away, and a page would mean nothing there."""
        log.info("%s: %s: its agent is away", hostname, self._visitor)
        self.duplex.reset()
        raise ConnectionAbortedError("its agent is away")

    def _relay(self, route):
        """A visit in tcp mode: whatever has come and will come is the target's."""
        verdict = route.policy and route.policy.judge_connection(self._visitor.address[0])
        if isinstance(verdict, Answer):
            self.duplex.reset()  # not an empty but complete visit
            log.info("%s: %s: %s", route.hostname, self._visitor, verdict.reason)
            raise ConnectionAbortedError("its tunnel's policy")
        if not self._visitor.claim_relay():
            self.duplex.reset()
            raise ConnectionAbortedError("no room for another relay")
        self._give_back()
        relays.start_tcp(self._visitor, route)
        return False

    STEPS = {
        State.CONNECTED: Step(
            _read_introduction, time_up=State.INTRODUCTION, first_byte=State.INTRODUCTION_BEGUN
        ),
        State.INTRODUCTION: Step(
            _read_introduction, time_up=State.GREETING, first_byte=State.INTRODUCTION_BEGUN
        ),
        State.INTRODUCTION_BEGUN: Step(_read_introduction),
        State.SILENCE: Step(_read_first, time_up=State.GREETING, first_byte=State.FIRST_BYTES),
        State.GREETING: Step(_listen_in_silence),
        State.FIRST_BYTES: Step(_read_first),
        State.TLS_ASKED: Step(_read_first),
        State.CERTIFICATE: Step(_await_certificate),
        State.HANDSHAKE: Step(_handshake),
        State.PROOF: Step(_handshake),
    }


class PlainArrival(Arrival):
    """A trusted proxy's connection to a port for plain HTTP, until it has named its visitor."""

    def _await_first_bytes(self):
        return self._go_to(State.FIRST_BYTES)

    def _begin_http(self):
        self._give_back()
        return self._serve_http(self._port.site, scheme="http")

    STEPS = {
        State.CONNECTED: Arrival.STEPS[State.CONNECTED],
        # With none it is taken for the visitor itself.
        State.INTRODUCTION: Arrival.STEPS[State.INTRODUCTION]._replace(time_up=State.FIRST_BYTES),
        State.INTRODUCTION_BEGUN: Arrival.STEPS[State.INTRODUCTION_BEGUN],
        State.FIRST_BYTES: Step(_begin_http),
    }
