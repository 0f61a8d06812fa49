"""One visitor's connection: what is it, whose is it, http or tcp.

    hello --> handshake --> tcp: relay
                        \\-> http: head --> request (proxy.py) --> head ... --> parting
                                                          \\-> 101: relay

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

from gotunnel import Duplex, NoThread, Workers, pump, relay, spawn

from . import hello, pages
from .http1 import Malformed
from .proxy import Handler, VisitorGone

log = logging.getLogger("gotunnel.visitor")

# Relays (tcp visits, WebSockets) at a time: two threads and some 150 kB each.
MAX_RELAYS = 1000
# Seconds that a worker waits for the next step by itself before it parks the connection: a visitor
# that goes on at once, as most do, is spared the detour through the listener.
LINGER = 0.005
PARTING_TIMEOUT = 2  # seconds to read and drop what a visitor sends after our last answer
# Seconds without a byte from the target after a tcp visitor has half-closed, when the agent cannot
# half-close its target: then the visitor has most likely left.
HELD_FIN_TIMEOUT = 30


class Visitors:
    """All visitors of a port, and what they need."""

    def __init__(self, *, context, site, lookup, exchanges, proxies, config):
        """``context``: the port's TLS context, None for a plain port. ``site``: see Handler.
        ``lookup(hostname)``: its Route or None. ``exchanges``: the Exchanges that serve requests.
        ``proxies``: the addresses that stand for many visitors, a forwarding.Proxies. ``config``:
        the gateway's, for its timeouts.
        """
        self.context = context
        self.site = site
        self.lookup = lookup
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
        visitor = Visitor(self, Duplex(sock), address)
        with self._gone:
            self._visitors.add(visitor)
        return visitor

    def forget(self, visitor):
        with self._gone:
            known = visitor in self._visitors
            self._visitors.discard(visitor)
            self._gone.notify_all()
        if known:
            self.listener.forget()

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


class Exchanges:
    """The threads that serve requests, and the room for so many at a time."""

    def __init__(self, most, proxies):
        self.room = Room(most, proxies)
        self._workers = Workers(most, "exchange")
        self.start = self._workers.submit  # start(function)
        self.stop = self._workers.shutdown


class Visitor:
    """One connection. It belongs to one worker, or is parked; reset() is for any thread."""

    def __init__(self, visitors, duplex, address):
        self.duplex = duplex
        self.address = address
        self._visitors = visitors
        self._handler = None
        self._deadline = None  # monotonic, of the step that waits
        if visitors.context is None:
            self._step = self._begin_http
        else:
            self._step = self._read_hello
        self._serving = False  # a thread of Exchanges has it
        self._may_relay = False  # it is one of MAX_RELAYS
        self._buffer = b""  # of a hello that is not whole
        self._sni = None

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
        except (OSError, VisitorGone, hello.NotTLS) as error:
            log.debug("visitor at %s: %s", self.address[0], error or "left")
            self.close()
        except Exception:
            log.exception("visitor at %s: a defect", self.address[0])
            self.close()

    def expired(self):
        """Worker: the visitor took too long."""
        if self._step == self._read_head and self._handler.in_head:
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
        self._visitors.listener.park(self, max(0, self._deadline - monotonic()))
        return False

    def _go_on(self, step):
        self._step, self._deadline = step, None
        return True

    # TLS

    def _read_hello(self):
        """Learn the hostname before the handshake: what is not TLS costs us none."""
        data = self.duplex.receive()
        if data == b"":
            raise VisitorGone
        if data is not None:
            self._buffer += data
            said = hello.parse(self._buffer)
            if said is not None:
                self._sni = said.server_name
                self.duplex.unread(self._buffer)
                self._buffer = b""
                self.duplex.start_tls(self._visitors.context, server_side=True)
                return self._go_on(self._handshake)
        return self._wait(self._visitors.header_timeout)

    def _handshake(self):
        if not self.duplex.handshake():
            return self._wait(self._visitors.header_timeout)
        route = self._sni and self._visitors.lookup(self._sni)
        if route and route.mode == "tcp":
            if not self._claim_relay():
                self.duplex.reset()  # not an empty but complete visit
                raise ConnectionAbortedError("no room for another relay")
            return self._start_relay(self._visit_tcp, route)
        return self._go_on(self._begin_http)

    # http

    def _begin_http(self):
        visitors = self._visitors
        self._handler = Handler(
            self.duplex,
            self.address,
            site=visitors.site,
            scheme="http" if visitors.context is None else "https",
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
                quiet = visitors.idle_timeout if handler.request_head else visitors.header_timeout
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
            self._visitors.listener.park(self, self._deadline - monotonic())
        return False

    # tcp

    def _claim_relay(self) -> bool:
        """Whether the connection may become a relay; it counts as one from here on."""
        self._may_relay = self._visitors.relays.enter(self.address[0])
        if not self._may_relay:
            log.warning("%s: visitor at %s refused, too many relays are running (%d at most, half "
                        "of them an address)", self._sni, self.address[0], MAX_RELAYS)  # fmt: skip
        return self._may_relay

    def _start_relay(self, visit, subject):
        """Go on in threads of its own."""
        spawn(f"relay {self._sni}", self._run_relay, visit, subject)
        return False

    def _run_relay(self, visit, subject):
        try:
            visit(subject)
        except OSError as error:
            log.debug("%s: visitor at %s: %s", self._sni, self.address[0], error)
        except Exception:
            log.exception("visitor at %s: a defect", self.address[0])
        finally:
            self.close()

    def _visit_tcp(self, route):
        try:
            stream = route.tunnel.open(route)
        except OSError:
            self.duplex.reset()  # refused: not an empty but complete visit
            raise
        try:
            if route.tunnel.half_close:
                relay(self.duplex, stream)
            else:
                _relay_holding_fin(self.duplex, stream)
        finally:
            stream.close()

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


def choose_site(lookup, gateway_host):
    """What a request to the public port gets: the ``site`` of a Handler.

    ``lookup(hostname)`` is the registry's; ``gateway_host`` is our own name.
    """

    def site(handler):
        hostname = handler.hostname
        if handler.sni is not None and hostname != handler.sni:
            # The certificate that the visitor has seen says nothing about that name.
            text = f"This connection was opened for {handler.sni}, not for {hostname}."
            return pages.error(421, "misdirected", text)
        if handler.command == "CONNECT":
            return pages.error(501, "no-connect", "This gateway is not a proxy.")
        if hostname == gateway_host:
            return pages.landing(gateway_host)
        route = lookup(hostname)
        if route is None:
            return pages.no_tunnel(hostname)
        if route.mode != "http":
            text = f"{hostname} does not speak HTTP. Connect to it by TLS, with its name as SNI."
            return pages.error(421, "not-http", text)
        return route

    return site
