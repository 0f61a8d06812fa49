"""Finds out which protocol a new connection speaks and which route it is for, then hands it over.

    first bytes --> TLS: ClientHello, handshake --> tcp: relay
            |                                   \\-> http: HttpConnection, or HTTP/2 (http2.py)
            |-> PROXY header of a trusted proxy, then first bytes
            |-> PostgreSQL's SSLRequest: answer, then TLS; its CancelRequest: relay
            |-> HTTP without TLS: HttpConnection, which redirects to https
            \\-> SSH, silence: relay

It works in steps (steps.py): a visitor that is slow or silent occupies no worker.
"""

import enum
import logging
import ssl
from time import monotonic
from typing import Protocol

from gotunnel_agent.common import proxy_protocol

from ..net import client_hello
from ..net.drops import NO_PROOF, NO_TCP_HOSTNAME, NOT_TLS, PROTOCOL, PROXY_HEADER, Dropped
from ..net.total import Total
from ..routes import Route
from . import connection, http2, pages, relays, sniff
from .connection import HttpConnection
from .http2 import Http2
from .postgres import CancelKeys
from .request import VisitorGone
from .sites import Site
from .steps import StateEnum, Step, Stepwise
from .verdict import Allow, Answer
from .visit import TCP
from .visitor import Visitor

log = logging.getLogger("gotunnel.arrival")

# Seconds after which a silent visitor is taken for one that waits for the server's greeting, if
# RAW_TCP_HOST names that server. A visitor that speaks TLS or HTTP sends at once.
SILENCE = 0.3
# Seconds that a trusted proxy has for its PROXY header, with which it introduces a visitor. Without
# one, the proxy itself is taken for the visitor. "Introduction" below always means that header.
INTRODUCTION = 0.3
# Seconds that a visitor waits for a certificate that is being ordered, and the interval of the
# check whether it is there.
CERTIFICATE_TIMEOUT = 10
CERTIFICATE_LOOK = 0.25


class State(StateEnum):
    """What the connection waits for."""

    CONNECTED = enum.auto()  # a trusted proxy's PROXY header; its time begins with the first step
    INTRODUCTION = enum.auto()  # the first byte of that header
    INTRODUCTION_BEGUN = enum.auto()  # the rest of it
    SILENCE = enum.auto()  # a first byte, or silence, where a server may have to greet first
    GREETING = enum.auto()  # nothing any more: the visitor waits for the server's greeting
    FIRST_BYTES = enum.auto()  # enough first bytes to tell the protocol
    TLS_ASKED = enum.auto()  # the ClientHello that PostgreSQL's client has announced
    AGENT = enum.auto()  # the agent of a tcp hostname, which is expected back (waiting.py)
    CERTIFICATE = enum.auto()  # a certificate that is being ordered
    HANDSHAKE = enum.auto()  # the rest of the TLS handshake
    PROOF = enum.auto()  # the rest of the TLS handshake of a TLS-ALPN-01 validation


class Challenges(Protocol):
    """Where certs/challenges.py publishes the proofs that a CA looks for."""

    def context(self, hostname: str) -> ssl.SSLContext | None: ...


class PlainPort(connection.Port, Protocol):
    """What an arriving connection needs of any port."""

    site: Site


class Port(PlainPort, Protocol):
    """What an Arrival needs of its port.PublicPort, which explains the attributes."""

    redirect: Site
    raw_host: str | None
    cancel_keys: CancelKeys
    handshakes: Total
    completed_handshakes: Total
    challenges: Challenges
    http2: Http2 | None

    def context(self, sni: str | None, protocol: str | None, /) -> ssl.SSLContext: ...

    def lookup(self, hostname: str, /) -> Route | None: ...

    def has_left_in_tcp(self, hostname: str, /) -> bool: ...

    def awaits_certificate(self, hostname: str | None, /) -> bool: ...

    def raw_route(self, ssh: bool = False) -> Route | None: ...

    def say_once(self, text: str, *arguments: object) -> None: ...


class Introduction(Stepwise):
    """A connection until it is known which visitor it is from: a trusted proxy may name it."""

    _port: PlainPort

    def __init__(self, port: PlainPort, visitor: Visitor):
        self._buffer = b""  # first bytes that are not understood yet
        super().__init__(port, visitor, State.CONNECTED)

    def _receive(self) -> None:
        """Add what has arrived to the buffer."""
        data = self.duplex.receive()
        if data == b"":
            raise VisitorGone
        if data is not None:
            if not self._buffer:
                self._note_first_byte()
            self._buffer += data

    def _read_introduction(self) -> bool:
        """Read the header of HAProxy's PROXY protocol, if there is one."""
        if self._state is State.CONNECTED:
            self._go_to(State.INTRODUCTION)
        self._receive()
        if proxy_protocol.may_begin(self._buffer):
            try:
                found = proxy_protocol.parse(self._buffer)
            except proxy_protocol.NotProxy as error:
                log.warning("trusted proxy at %s: %s; its connection is closed",
                            self._visitor.address[0], error)  # fmt: skip
                raise Dropped(PROXY_HEADER, str(error)) from None
            if found is None:
                return self._wait(self._port.timeouts.header if self._buffer else INTRODUCTION)
            size, source = found
            self._buffer = self._buffer[size:]
            if source is not None:
                self._visitor.introduce(source)
        return self._await_first_bytes()

    def _await_first_bytes(self) -> bool:
        return self._go_to(State.FIRST_BYTES)

    def _give_back(self) -> None:
        self.duplex.unread(self._buffer)
        self._buffer = b""

    def _serve_http(self, site: Site, scheme: str) -> bool:
        HttpConnection(self._port, self._visitor, site, scheme).ready()
        return False

    STEPS = {
        State.CONNECTED: Step(
            _read_introduction, time_up=State.INTRODUCTION, first_byte=State.INTRODUCTION_BEGUN
        ),
        State.INTRODUCTION: Step(
            _read_introduction, time_up=State.FIRST_BYTES, first_byte=State.INTRODUCTION_BEGUN
        ),
        State.INTRODUCTION_BEGUN: Step(_read_introduction),
    }


class PlainArrival(Introduction):
    """A trusted proxy's connection to a port for plain HTTP."""

    def _begin_http(self) -> bool:
        self._give_back()
        return self._serve_http(self._port.site, scheme="http")

    STEPS = {**Introduction.STEPS, State.FIRST_BYTES: Step(_begin_http)}


class Arrival(Introduction):
    """A connection to the public port, or to a tunnel's own port, until its protocol and its route
    are known. Then it hands its Visitor over, to an HttpConnection or to a relay."""

    _port: Port

    def __init__(self, port: Port, visitor: Visitor, route: Route | None = None):
        """``route``: set for a tunnel's own port, where all visitors are for one route."""
        self._route = route
        super().__init__(port, visitor)
        if visitor.address[0] not in port.proxies:
            self._await_first_bytes()
        self._hello = client_hello.Reader()
        self._protocols: tuple[str, ...] = ()  # those offered by ALPN
        self._chosen: str | None = None  # the only one that we accept; None: the usual ones
        self._certificate_by = 0.0  # monotonic: wait no longer than that for a certificate
        self._has_waited = False  # for its agent
        self._refused_gss = False  # PostgreSQL's client has asked for GSSAPI encryption

    def _await_first_bytes(self) -> bool:
        greets = self._route is not None or self._port.raw_host is not None
        return self._go_to(State.SILENCE if greets and not self._buffer else State.FIRST_BYTES)

    # First bytes

    def _read_first(self) -> bool:
        """Tell by the first bytes which protocol the visitor speaks."""
        if self._route is not None:
            return self._relay(self._route)
        self._receive()
        found = sniff.recognise(self._buffer)
        if found is None or found.kind != sniff.TLS:  # no PROXY header begins as TLS does
            self._visitor.refuse_introduction(self._buffer)
            if proxy_protocol.may_begin(self._buffer):
                found = None
        if found is not None:
            entered = self._enter(*found)
            if entered is not None:
                return entered
        return self._wait(SILENCE if self._state is State.SILENCE else self._port.timeouts.header)

    def _listen_in_silence(self) -> bool:
        """The visitor was silent for SILENCE seconds. If a server may have to greet it first,
        connect the two; unless bytes have arrived in the meantime."""
        if self._route is None:
            self._receive()
        route = self._route or self._port.raw_route()
        raw_host = self._port.raw_host
        if route is None and not self._buffer and raw_host is not None:
            if self._await_agent(raw_host, State.GREETING):
                return False
            return self._refuse_tcp(raw_host)
        if self._buffer or route is None:
            return self._go_to(State.FIRST_BYTES)
        return self._relay(route)

    def _enter(self, kind: int, size: int) -> bool | None:
        """Go on as the protocol requires. Returns a step's result, None if it needs more bytes."""
        if self._state is State.TLS_ASKED and kind != sniff.TLS:
            raise client_hello.NotTLS("no ClientHello behind PostgreSQL's SSLRequest")
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
            raw_host = self._port.raw_host
            if raw_host is not None and self._await_agent(raw_host, State.FIRST_BYTES):
                return False
            self._port.say_once(
                "%s dropped: it speaks no TLS, and no tcp hostname is served for such visitors; "
                "RAW_TCP_HOST may name one",
                self._visitor,
            )  # fmt: skip
            self.duplex.reset()  # a mere close would look like an empty answer
            raise Dropped(NO_TCP_HOSTNAME, "no tcp hostname is served for it")
        return self._relay(route)

    def _answer_postgres(self, kind: int, size: int) -> bool:
        # Bytes behind the request may be injected by a man in the middle, to be taken for encrypted
        # ones (CVE-2021-23214).
        if len(self._buffer) > size:
            raise Dropped(NOT_TLS, "bytes between PostgreSQL's SSLRequest and TLS")
        self._buffer = b""
        if kind == sniff.SSL_REQUEST:
            self.duplex.write(sniff.YES, timeout=0)
            return self._go_to(State.TLS_ASKED)
        if self._refused_gss:  # each answer restarts the timeout, so it must not be repeated
            raise Dropped(NOT_TLS, "a second GSSENCRequest")
        self._refused_gss = True
        self.duplex.write(sniff.NO, timeout=0)
        return self._go_to(State.FIRST_BYTES)

    def _cancel(self) -> bool | None:
        """A PostgreSQL client wants to cancel the query of another connection. As _enter()."""
        if len(self._buffer) < int.from_bytes(self._buffer[:4], "big"):
            return None
        route = self._port.cancel_keys.route(self._buffer) or self._port.raw_route()
        if route is None:
            self._port.say_once(
                "%s dropped: its PostgreSQL CancelRequest is for no session here. That session has "
                "ended, or was made without TLS", self._visitor,
            )  # fmt: skip
            raise Dropped(NO_TCP_HOSTNAME, "no session has this key")
        return self._relay(route)

    # TLS

    def _enter_tls(self) -> bool | None:
        """Read the ClientHello, before the costly handshake. As _enter()."""
        hello = self._hello.parse(self._buffer)
        if hello is None:
            return None
        self._visitor.sni = hello.server_name
        self._give_back()
        if hello.alpn == (client_hello.ACME_TLS,):
            return self._prove()
        if self._state is State.TLS_ASKED or client_hello.POSTGRESQL in hello.alpn:
            self._visitor.cancel_keys = self._port.cancel_keys
        self._protocols = hello.alpn
        sni = hello.server_name
        # A tcp visit waits for its agent before the handshake: only with a route can the handshake
        # accept the service's own ALPN protocol. In http mode each request waits by itself, after
        # its head (connection.py).
        if sni and self._port.has_left_in_tcp(sni) and self._await_agent(sni, State.AGENT):
            return False
        return self._await_or_begin()

    def _await_or_begin(self) -> bool:
        """Begin the handshake, or wait for the certificate first."""
        if self._port.awaits_certificate(self._visitor.sni):
            self._certificate_by = monotonic() + CERTIFICATE_TIMEOUT
            return self._go_to(State.CERTIFICATE)
        return self._begin_handshake()

    def _await_agent(self, hostname: str, then: State) -> bool:
        """If the agent is expected back, let the visit wait for it in the state ``then``, once a
        connection. Returns whether it waits."""
        port = self._port
        if not port.absent or port.waiting is None or self._has_waited or port.is_draining():
            return False
        self._has_waited = True
        self._go_to(then)
        waiting, listener = port.waiting, self._visitor.listener
        return waiting.enter(hostname, self, listener, self.ready, waiting.timeout)

    def _begin_handshake(self) -> bool:
        sni, protocol = self._visitor.sni, None
        route = self._port.lookup(sni) if sni else None
        if route and route.mode == "tcp":
            protocol = client_hello.own_protocol(self._protocols)
        if protocol is None and http2.PROTOCOL in self._protocols and self._is_tcp(route):
            protocol = client_hello.older_protocol(self._protocols)
        self._chosen = protocol
        return self._start_tls(self._port.context(sni, protocol), State.HANDSHAKE)

    def _is_tcp(self, route: Route | None) -> bool:
        """Whether the visitor's hostname is in tcp mode, or was when it was last served."""
        sni = self._visitor.sni
        if route is None:
            return sni is not None and self._port.has_left_in_tcp(sni)
        return route.mode == "tcp"

    def _start_tls(self, context: ssl.SSLContext, state: State) -> bool:
        self._port.handshakes.add()
        self.duplex.start_tls(context, server_side=True)
        return self._go_to(state)

    def _await_certificate(self) -> bool:
        """Check again and again whether the certificate is there. When the time is up, begin the
        handshake without it, which fails by a TLS alert."""
        if self._port.is_draining():
            self.close()
            return False
        left = self._certificate_by - monotonic()
        if left <= 0 or not self._port.awaits_certificate(self._visitor.sni):
            return self._begin_handshake()
        # Not park(): the ClientHello, already here, would end that at once.
        self._visitor.listener.call_later(self, self.ready, min(left, CERTIFICATE_LOOK))
        return False

    def _prove(self) -> bool:
        """A TLS-ALPN-01 validation: all that the CA needs is in the handshake (RFC 8737)."""
        sni = self._visitor.sni
        context = None if sni is None else self._port.challenges.context(sni)
        if context is None:
            raise Dropped(NO_PROOF, "a TLS-ALPN-01 validation without a published proof")
        return self._start_tls(context, State.PROOF)

    def _handshake(self) -> bool:
        if not self.duplex.handshake(hold_ticket=True):
            return self._wait(self._port.timeouts.header)
        self._port.completed_handshakes.add()
        if self._state is State.PROOF:
            self._visitor.has_asked = True
            self.close()
            return False
        sni = self._visitor.sni
        route = self._port.lookup(sni) if sni else None
        if self._chosen is None and self.duplex.protocol == http2.PROTOCOL:
            return self._serve_http2(route)
        if route and route.mode == "tcp":
            self.duplex.flush()
            return self._relay(route)
        if sni and route is None and self._port.has_left_in_tcp(sni):
            return self._refuse_tcp(sni)
        return self._serve_http(self._port.site, scheme="https")

    # Handing over

    def _serve_http2(self, route: Route | None) -> bool:
        if self._port.http2 is None or self._is_tcp(route):
            raise Dropped(PROTOCOL, "its hostname came into tcp mode during the handshake")
        self._port.http2.serve(self._port, self._visitor, self._port.site, "https")
        return False

    def _refuse_tcp(self, hostname: str) -> bool:
        """No agent serves this hostname in tcp mode now. Its visitors cannot read a page."""
        log.info("%s: %s is refused: no agent is connected", hostname, self._visitor)
        self._begin_visit(hostname)
        self._visitor.fail_visit("no-tunnel", 502)
        self.duplex.reset()
        raise ConnectionAbortedError("no agent is connected")

    def _begin_visit(self, hostname: str, route: Route | None = None) -> None:
        visit = self._visitor.begin_visit()
        if visit is not None:
            visit.hostname, visit.protocol, visit.route = hostname, TCP, route

    def _relay(self, route: Route) -> bool:
        """A visit in tcp mode: all bytes go to the target, also those that have arrived."""
        self._begin_visit(self._visitor.sni or route.hostname, route)
        verdict: Allow | Answer | None = None
        if route.policy is not None:
            verdict = route.policy.judge_connection(self._visitor.address[0])
        if isinstance(verdict, Answer):
            self._visitor.fail_visit(verdict.page.code, verdict.page.status)
            self.duplex.reset()  # a mere close would look like an empty answer
            log.info("%s: %s: %s", route.hostname, self._visitor, verdict.reason)
            raise ConnectionAbortedError("refused by its tunnel's policy")
        if route.is_unwell():
            self._visitor.fail_visit(pages.UNHEALTHY, 503)
            self.duplex.reset()
            log.info("%s: %s is refused: the target is not well", route.hostname, self._visitor)
            raise ConnectionAbortedError("the target is not well")
        if not self._visitor.claim_relay():
            self._visitor.fail_visit("gateway-busy", 503)
            self.duplex.reset()
            raise ConnectionAbortedError("no room for another relay")
        self._give_back()
        relays.start_tcp(self._visitor, route)
        return False

    STEPS = {
        State.CONNECTED: Introduction.STEPS[State.CONNECTED],
        State.INTRODUCTION: Introduction.STEPS[State.INTRODUCTION]._replace(time_up=State.GREETING),
        State.INTRODUCTION_BEGUN: Introduction.STEPS[State.INTRODUCTION_BEGUN],
        State.SILENCE: Step(_read_first, time_up=State.GREETING, first_byte=State.FIRST_BYTES),
        State.GREETING: Step(_listen_in_silence),
        State.FIRST_BYTES: Step(_read_first),
        State.TLS_ASKED: Step(_read_first),
        State.AGENT: Step(_await_or_begin),
        State.CERTIFICATE: Step(_await_certificate),
        State.HANDSHAKE: Step(_handshake, begun=True),
        State.PROOF: Step(_handshake, begun=True),
    }
