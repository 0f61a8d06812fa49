"""One visitor's connection: what is it, whose is it, http or tcp.

    first bytes --> TLS: handshake --> tcp: relay
            |                      \\-> http: head --> request (exchange.py) -> head ... --> parting
            |                                                     \\-> 101, CONNECT: relay
            |-> PostgreSQL: answer, then TLS
            |-> HTTP that is not encrypted: redirect
            \\-> SSH, silence: relay

Each step does what can be done with what has come; a step that has to wait parks the connection
with the port's listener, so a visitor who is slow, silent or idle holds no worker. What takes as
long as visitor and target please, a request with its answer or a relay, runs in other threads, so
it holds up nobody's steps: a request in one of WORKERS, a relay in two of its own.
"""

import contextlib
import logging
import ssl
import threading
from collections import Counter
from time import monotonic

from gotunnel import Duplex, Ends, NoThread, Workers, pump, relay, spawn
from gotunnel_agent.common import proxy_protocol
from gotunnel_agent.common.http1 import Malformed

from ..net import client_hello
from ..routes import AgentBusy
from . import pages, sniff
from .http1_server import Handler
from .request import VisitorGone
from .sites import Connect, choose_redirect

log = logging.getLogger("gotunnel.visitor")

# Relays (tcp visits, WebSockets) at a time: two threads and some 65 kB each. An address may have
# half of them.
MAX_RELAYS = 2048
# Seconds after which a visitor that says nothing waits for the server's greeting, if RAW_TCP_HOST
# says which server that is. Whoever speaks TLS or HTTP begins at once.
SILENCE = 0.3
# Seconds that a trusted proxy has for the header that names its visitor; with none it is taken for
# the visitor itself.
INTRODUCTION = 0.3
# Seconds that a visitor waits for a certificate that is being made, and between two looks.
CERTIFICATE_TIMEOUT = 10
CERTIFICATE_LOOK = 0.25
# Seconds that a worker waits for the next step by itself before it parks the connection: a visitor
# that goes on at once, as most do, is spared the detour through the listener.
LINGER = 0.005
PARTING_TIMEOUT = 2  # seconds to read and drop what a visitor sends after our last answer
# Seconds without a byte from the target after a tcp visitor has half-closed, when the agent cannot
# half-close its target: then the visitor has most likely left.
HELD_FIN_TIMEOUT = 30


class Visitors:
    """All visitors of a port, and what they need."""

    def __init__(
        self, *, context, site, registry, exchanges, proxies, config, challenges, awaits_certificate
    ):
        """``context``: the port's TLS context, None for a plain port. ``site``: see Handler.
        ``registry`` knows the Routes. ``exchanges``: the Exchanges that serve requests.
        ``proxies``: the addresses that stand for many visitors, a forwarding.Proxies. ``config``:
        the gateway's, for its timeouts and where plain bytes lead. ``challenges``: what a CA may
        find on the port. ``awaits_certificate(hostname)``: it has none yet, and will soon.
        """
        self.context = context
        self.challenges = challenges
        self.awaits_certificate = awaits_certificate
        self.site = site
        self.lookup = registry.lookup
        self.redirect = choose_redirect(registry.lookup, config.gateway_host)
        self._only_tcp = registry.only_tcp
        self.raw_host = config.raw_tcp_host
        self._said = set()  # texts of say_once()
        self.exchanges = exchanges
        self.proxies = proxies
        self.header_timeout = config.header_timeout
        self.idle_timeout = config.idle_timeout
        self.response_timeout = config.response_timeout
        self.listener = None  # set before it is started
        self.draining = False  # answer what is asked already, then close
        self.relays = Room(MAX_RELAYS, proxies)
        self._visitors = set()
        self._gone = threading.Condition()  # guards _visitors; notified when it shrinks

    def welcome(self, sock, address):
        """For the listener: a visitor has connected."""
        return self.add(Visitor(self, Duplex(sock), address, self.listener))

    def add(self, visitor):
        with self._gone:
            self._visitors.add(visitor)
        return visitor

    def forget(self, visitor):
        with self._gone:
            known = visitor in self._visitors
            self._visitors.discard(visitor)
            self._gone.notify_all()
        if known:
            visitor.listener.forget()

    def raw_route(self, ssh=False):
        """The Route of a visitor that does not say whom it wants, None if there is none for it.

        An SSH server that is the only tcp hostname is what an SSH client means. Anything else, such
        as a database, is shown without encryption only if the operator has said so.
        """
        if self.raw_host is not None:
            route = self.lookup(self.raw_host)
            return route if route is not None and route.mode == "tcp" else None
        return self._only_tcp() if ssh else None

    def say_once(self, text, *arguments):
        """Log something of which the operator has to hear once, and not whenever a scanner comes
        by."""
        log.log(logging.DEBUG if text in self._said else logging.WARNING, text, *arguments)
        self._said.add(text)

    def drain(self, timeout):
        """Wait until the visitors that are being served have gone; after ``timeout`` seconds,
        break the connections that are left."""
        self.draining = True
        with self._gone:
            self._gone.wait_for(lambda: not self._visitors, timeout)
            left = list(self._visitors)
        for visitor in left:
            visitor.duplex.reset()
        return len(left)


class Room:
    """Place for so many at a time, of which one address gets half: nobody takes it all. Only an
    address in ``unlimited`` may, as it stands for many visitors."""

    def __init__(self, most, unlimited=()):
        self._most = most
        self._unlimited = unlimited
        self._taken = 0
        self._taken_by = Counter()  # address
        self._lock = threading.Lock()  # guards both

    def enter(self, address) -> bool:
        """Take a place, if there is one."""
        with self._lock:
            if self._taken >= self._most:
                return False
            share = max(self._most // 2, 1)
            if self._taken_by[address] >= share and address not in self._unlimited:
                return False
            self._taken += 1
            self._taken_by[address] += 1
            return True

    def leave(self, address):
        with self._lock:
            self._taken -= 1
            self._taken_by[address] -= 1
            if not self._taken_by[address]:
                del self._taken_by[address]


class PortDoor:
    """A public port of its own, which leads to one Route."""

    def __init__(self, visitors, route):
        self.listener = None  # set before it is started
        self._visitors = visitors
        self._route = route

    def welcome(self, sock, address):
        """For the listener: a visitor has connected."""
        visitor = Visitor(self._visitors, Duplex(sock), address, self.listener, self._route)
        return self._visitors.add(visitor)


class Exchanges:
    """The threads that serve requests, and the room for so many at a time."""

    def __init__(self, most, proxies):
        self.room = Room(most, proxies)
        self._workers = Workers(most, "exchange")
        self.start = self._workers.submit  # start(function)
        self.stop = self._workers.shutdown


class Visitor:
    """One connection. It belongs to one worker, is parked, or waits for its turn (call_later());
    reset() is for any thread."""

    def __init__(self, visitors, duplex, address, listener, route=None):
        """``route`` is where the port leads, if that is known before a byte has come."""
        self.duplex = duplex
        self.address = address
        self.listener = listener
        self._visitors = visitors
        self._route = route
        self._handler = None
        self._deadline = None  # monotonic, of the step that waits
        if visitors.context is None:
            self._step = self._begin_http
        elif address[0] in visitors.proxies:
            self._step = self._read_introduction
        else:
            self._step = self._begin
        self._serving = False  # a thread of Exchanges has it
        self._may_relay = False  # it is one of MAX_RELAYS
        self._buffer = b""  # first bytes that are not understood yet
        self._hello = client_hello.Reader()
        self._asked_for_tls = False  # PostgreSQL's client has, and begins with it now
        self._refused_gss = False  # ... which had asked for another encryption
        self._sni = None
        self._proves = False  # it is a CA, to whom something is proved

    def ready(self):
        """Worker: take the steps that can be taken."""
        self._serving = False
        self._take_steps()

    def _serve(self):
        """Exchange thread: the request that has come, then what its visitor sends at once."""
        self._serving = True
        self._take_steps()

    def _take_steps(self):
        try:
            while self._step():
                pass
        except ssl.SSLError as error:
            log.debug("visitor at %s: TLS: %s", self.address[0], error.reason or error)
            self.close()
        except (OSError, VisitorGone, client_hello.NotTLS) as error:
            log.debug("visitor at %s: %s", self.address[0], error or "left")
            self.close()
        except Exception:
            log.exception("visitor at %s: a defect", self.address[0])
            self.close()

    def expired(self):
        """Worker: the visitor took too long, or as long as it takes to be sure that it waits."""
        waits = not self._buffer and self._visitors.raw_host is not None
        if self._step == self._read_introduction and self._deadline is None:
            self.ready()  # its time begins now
        elif self._step == self._read_introduction and not self._buffer:
            self._step = self._listen_in_silence
            self.ready()
        elif self._step == self._begin and (waits or self._route is not None):
            self._step = self._listen_in_silence
            self.ready()
        elif self._step == self._read_head and self._handler.in_head:
            self._step = self._time_out
            self.ready()
        else:
            self.close()

    def _time_out(self):
        text = "The request's head took too long to come."
        return self._last_page(pages.error(408, "head-timeout", text))

    def close(self):
        """Drop the connection; for who owns it."""
        self.duplex.close()
        if self._may_relay:
            self._may_relay = False
            self._visitors.relays.leave(self.address[0])
        self._visitors.forget(self)

    def _wait(self, seconds):
        """Go on when the visitor sends something; ``seconds`` count from the first wait of a
        step. Returns what a step returns."""
        if self._visitors.draining and not (self._handler and self._handler.in_head):
            self.close()
            return False
        if self._deadline is None:
            # The first wait of a step is most likely a short one, and parking takes two detours.
            # Later ones are for visitors that trickle, who must not hold a worker.
            self._deadline = monotonic() + seconds
            with contextlib.suppress(TimeoutError):
                self.duplex.wait_readable(LINGER)
                return True
        self.listener.park(self, max(0, self._deadline - monotonic()))
        return False

    def _go_on(self, step):
        self._step, self._deadline = step, None
        return True

    # The first bytes

    def _receive(self):
        """Add what has come to the buffer. From the first byte on, it is the head's time."""
        data = self.duplex.receive()
        if data == b"":
            raise VisitorGone
        if data is not None:
            if not self._buffer:
                self._deadline = None
            self._buffer += data

    def _read_introduction(self):
        """A trusted proxy may name its visitor first (HAProxy's PROXY protocol)."""
        self._receive()
        if proxy_protocol.may_begin(self._buffer):
            try:
                found = proxy_protocol.parse(self._buffer)
            except proxy_protocol.NotProxy as error:
                log.warning("trusted proxy at %s: %s", self.address[0], error)
                raise VisitorGone from None
            if found is None:
                return self._wait(self._head_timeout if self._buffer else INTRODUCTION)
            size, source = found
            self._buffer = self._buffer[size:]
            self.address = source or self.address
        return self._go_on(self._begin)

    def _begin(self):
        """Learn by which door the visitor comes, before anything that costs us much."""
        if self._route is not None:
            return self._begin_raw(self._route)
        return self._read_first(SILENCE if self._visitors.raw_host else self._head_timeout)

    def _read_first(self, timeout=None):
        self._receive()
        entered = self._enter()
        if entered is not None:
            return entered
        return self._wait(self._head_timeout if self._buffer or not timeout else timeout)

    @property
    def _head_timeout(self):
        return self._visitors.header_timeout

    def _listen_in_silence(self):
        """The visitor waits to be greeted, if there is a server that would do so; unless it has
        spoken since, and we were late."""
        if self._route is None:
            self._receive()
        route = self._route or self._visitors.raw_route()
        if self._buffer or route is None:
            return self._go_on(self._read_first)
        return self._begin_raw(route)

    def _enter(self):
        """Go in by the door that the buffer names; None if more must come to tell, else what a
        step returns."""
        self._refuse_introduction(self._buffer)
        knock = sniff.knock(self._buffer)
        if knock is None or proxy_protocol.may_begin(self._buffer):
            return None
        kind, size = knock
        if self._asked_for_tls and (size or kind != sniff.TLS):
            raise client_hello.NotTLS("TLS was asked for and has not come")
        if kind == sniff.TLS:
            return self._enter_tls()
        if kind == sniff.HTTP:
            self._give_back()
            return self._begin_http(self._visitors.redirect)
        if kind in (sniff.SSL_REQUEST, sniff.GSS_REQUEST):
            return self._answer_postgres(kind, size)
        route = self._visitors.raw_route(ssh=kind == sniff.SSH)
        if route is None:
            self._visitors.say_once(
                "visitor at %s dropped: it speaks no TLS, and no tcp hostname is there for it "
                "(RAW_TCP_HOST)", self.address[0],
            )  # fmt: skip
            raise VisitorGone
        return self._begin_raw(route)

    def _refuse_introduction(self, data):
        """Only a trusted proxy may say who its visitor is, and only once."""
        if proxy_protocol.begins(data):
            self._visitors.say_once(
                "visitor at %s dropped: it sent a PROXY header, and TRUSTED_PROXIES does not name "
                "it", self.address[0],
            )  # fmt: skip
            raise ConnectionAbortedError("a PROXY header")

    def _answer_postgres(self, kind, size):
        # What came behind it came from somebody who wants it taken for encrypted bytes.
        if len(self._buffer) > size:
            raise ConnectionAbortedError("bytes between PostgreSQL's SSLRequest and TLS")
        self._buffer = b""
        if kind == sniff.SSL_REQUEST:
            self._asked_for_tls = True
        elif self._refused_gss:  # each answer would give it more time
            raise ConnectionAbortedError("a second GSSENCRequest")
        else:
            self._refused_gss = True
        self.duplex.write(sniff.YES if self._asked_for_tls else sniff.NO, timeout=0)
        return self._go_on(self._read_first)

    def _give_back(self):
        self.duplex.unread(self._buffer)
        self._buffer = b""

    # TLS

    def _enter_tls(self):
        """Learn the hostname before the handshake: a broken hello costs us none."""
        said = self._hello.parse(self._buffer)
        if said is None:
            return None
        self._sni = said.server_name
        self._give_back()
        if said.alpn == (client_hello.ACME_TLS,):
            return self._enter_proof()
        if self._visitors.awaits_certificate(self._sni):
            self._go_on(self._await_certificate)
            self._deadline = monotonic() + CERTIFICATE_TIMEOUT
            return True
        return self._start_tls(self._visitors.context)

    def _start_tls(self, context):
        self.duplex.start_tls(context, server_side=True)
        return self._go_on(self._handshake)

    def _await_certificate(self):
        """Look again and again whether it is there; in the end the handshake fails by an alert."""
        if self._visitors.draining:
            self.close()
            return False
        left = self._deadline - monotonic()
        if left <= 0 or not self._visitors.awaits_certificate(self._sni):
            return self._start_tls(self._visitors.context)
        # Not park(): what the visitor has sent would bring it back at once.
        self.listener.call_later(self.ready, min(left, CERTIFICATE_LOOK))
        return False

    def _enter_proof(self):
        """A CA wants to see a proof (RFC 8737): all of it is in the handshake."""
        context = self._visitors.challenges.context(self._sni)
        if context is None:
            raise client_hello.NotTLS("a CA asks for a proof that was not published")
        self._proves = True
        return self._start_tls(context)

    def _handshake(self):
        if not self.duplex.handshake():
            return self._wait(self._head_timeout)
        if self._proves:
            self.close()
            return False
        route = self._sni and self._visitors.lookup(self._sni)
        if route and route.mode == "tcp":
            return self._begin_raw(route)
        return self._go_on(self._begin_http)

    # http

    def _begin_http(self, redirect=None):
        """``redirect``: what to say instead of the port's site, to a visitor without TLS."""
        visitors = self._visitors
        encrypted = visitors.context is not None and redirect is None
        self._handler = Handler(
            self.duplex,
            self.address,
            site=redirect or visitors.site,
            scheme="https" if encrypted else "http",
            sni=self._sni,
            proxies=visitors.proxies,
            claim_relay=self._claim_relay,
            is_draining=lambda: visitors.draining,
            idle_timeout=visitors.idle_timeout,
            response_timeout=visitors.response_timeout,
        )
        return self._go_on(self._read_head)

    def _read_head(self):
        handler, visitors = self._handler, self._visitors
        began = handler.in_head
        try:
            if not handler.head_came():
                if handler.in_head and not began:
                    self._deadline = None  # from the first byte on, it is the head's time
                quiet = visitors.idle_timeout if handler.current else visitors.header_timeout
                return self._wait(visitors.header_timeout if handler.in_head else quiet)
        except Malformed as error:
            return self._last_page(pages.error(error.status, "malformed-request", f"{error}."))
        if not visitors.exchanges.room.enter(self.address[0]):
            with contextlib.suppress(Malformed):  # busy is answer enough
                handler.parse_request()  # HEAD and Accept say which form the page is to have
            text = "This gateway serves as many requests as it can at the moment."
            return self._last_page(pages.error(503, "gateway-busy", text))
        self._go_on(self._serve_request)
        if self._serving:
            return True
        visitors.exchanges.start(self._serve)  # which has the connection from here on
        return False

    def _serve_request(self):
        handler = self._handler
        try:
            handler.handle_one_request()
        finally:
            self._visitors.exchanges.room.leave(self.address[0])
        if isinstance(handler.switched, Connect):
            return self._start_relay(self._visit_tcp, handler.switched.route)
        if handler.switched is not None:
            try:
                return self._start_relay(self._visit_switched, handler.switched)
            except NoThread:
                handler.switched.reset()
                raise
        if handler.close_connection:
            return self._part()
        return self._go_on(self._read_head)

    def _last_page(self, page):
        self._handler.idle_timeout = 0  # it fits, or the visitor reads nothing: a step cannot wait
        self._handler.send_page(page, last=True)
        return self._part()

    def _part(self):
        """Half-close, and drop what still comes for a moment: closing a connection that has
        unread bytes makes the kernel send a RST, which can cost the visitor our answer."""
        with contextlib.suppress(TimeoutError):  # it reads nothing, and gets no farewell
            self.duplex.finish(timeout=0)
        self._go_on(self._drop)
        self._deadline = monotonic() + PARTING_TIMEOUT
        return True

    def _drop(self):
        # One read a step: who sends without end must not have a thread for it.
        if self.duplex.receive() == b"":
            self.close()
        else:
            self.listener.park(self, self._deadline - monotonic())
        return False

    # tcp

    def _claim_relay(self) -> bool:
        """Whether the connection may become a relay; it counts as one from here on."""
        self._may_relay = self._visitors.relays.enter(self.address[0])
        if not self._may_relay:
            log.warning("visitor at %s refused, too many relays are running (%d at most, half of "
                        "them an address)", self.address[0], MAX_RELAYS)  # fmt: skip
        return self._may_relay

    def _begin_raw(self, route):
        """A visit in tcp mode: whatever has come and will come is the target's."""
        denial = route.policy and route.policy.judge_connection(self.address[0])
        if denial:
            self.duplex.reset()  # not an empty but complete visit
            log.info("%s: visitor at %s: %s", route.hostname, self.address[0], denial.text)
            raise ConnectionAbortedError("its tunnel's policy")
        if not self._claim_relay():
            self.duplex.reset()
            raise ConnectionAbortedError("no room for another relay")
        self._give_back()
        return self._start_relay(self._visit_tcp, route)

    def _start_relay(self, visit, subject):
        """Go on in threads of its own."""
        spawn(f"relay {self._sni or self.address[0]}", self._run_relay, visit, subject)
        return False

    def _run_relay(self, visit, subject):
        try:
            visit(subject)
        except OSError as error:
            log.debug("visitor at %s: %s", self.address[0], error)
        except Exception:
            log.exception("visitor at %s: a defect", self.address[0])
        finally:
            self.close()

    def _visit_tcp(self, route):
        try:
            stream = route.tunnel.open(route, self._ends)
        except OSError as error:
            self.duplex.reset()  # refused: not an empty but complete visit
            if isinstance(error, AgentBusy):
                log.info("%s: visitor at %s: %s", route.hostname, self.address[0], error)
            raise
        try:
            visitor = self.duplex if self._sni else _Guarded(self.duplex, self._refuse_introduction)
            if route.tunnel.half_close:
                relay(visitor, stream)
            else:
                _relay_holding_fin(visitor, stream)
        finally:
            stream.close()
            if stream.refused:
                route.tunnel.count_failed(route)
                log.info("%s: visitor at %s: the agent's target is down or refuses; its log says "
                         "why", route.hostname, self.address[0])  # fmt: skip

    def _ends(self):
        return Ends(self.address[:2], self.duplex.local_address)

    def _visit_switched(self, stream):
        """Copy both ways until either side has ended: no protocol that is upgraded to goes on
        with one direction, and nobody would ever close an idle half."""
        visitor_done = threading.Event()
        stream.on_death(self.duplex.reset)
        name = f"{threading.current_thread().name} back"
        back = spawn(name, self._copy_back, stream, visitor_done)
        pump(self.duplex, stream)
        visitor_done.set()
        stream.close()
        back.join()

    def _copy_back(self, stream, visitor_done):
        pump(stream, self.duplex)
        # The visitor has the last word, and a moment to say it.
        if not visitor_done.wait(PARTING_TIMEOUT):
            self.duplex.stop()


def _relay_holding_fin(duplex, stream):
    """relay() for an agent that takes FIN for the end of the visit, and would cut the answer.

    When the visitor has half-closed, its FIN waits until the target has been silent for a while.
    """
    stream.on_death(duplex.reset)
    counted = _Counted(stream)
    back = spawn(f"{threading.current_thread().name} back", pump, counted, duplex)
    try:
        while data := duplex.read():
            stream.write(data)
    except (OSError, ValueError):
        stream.reset()
        duplex.reset()
    count = None
    while back.is_alive() and count != counted.count:
        count = counted.count
        back.join(HELD_FIN_TIMEOUT)
    stream.finish()
    back.join()


class _Guarded:
    """A visitor without TLS as an end of a relay, whose first bytes are looked at. None is held
    back: a program may wait for the answer to any of them."""

    def __init__(self, duplex, look):
        """``look(data)`` raises OSError if ``data`` begins as nothing may."""
        self.write, self.finish, self.reset = duplex.write, duplex.finish, duplex.reset
        self._duplex = duplex
        self._look = look
        self._came = b""  # so far, as long as it may become what it must not

    def read(self):
        data = self._duplex.read()
        self._came += data[:proxy_protocol.LINE_LIMIT]
        self._look(self._came)
        if not proxy_protocol.may_begin(self._came):
            self.read = self._duplex.read
        return data


class _Counted:
    """A stream as a pump's source, which counts what is read."""

    def __init__(self, stream):
        self.count = 0
        self._stream = stream
        self.reset = stream.reset

    def read(self):
        data = self._stream.read()
        self.count += len(data)
        return data
