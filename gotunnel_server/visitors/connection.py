"""Serves a visitor's connection that speaks HTTP, one request after the other.

    head --> request and answer (http1_server.py) --> head ... --> parting
                          \\-> 101, CONNECT: relay (relays.py)

Heads are read in steps (steps.py), so a slow or idle visitor occupies no worker. Serving a request
may take as long as visitor and target like. So it has a thread of its own, one of the port's
Exchanges, and does not delay the steps of other connections.
"""

import contextlib
import enum
import logging
from collections.abc import Collection
from time import monotonic
from typing import Protocol

from gotunnel_agent.common.http1 import Malformed

from ..net.shares import Shares
from ..routes import Tunnel
from . import own_pages, pages, relays
from .forwarded import Proxies
from .http1_server import Handler
from .login import Owner
from .pages import Page, Templates
from .request import AgentLost, Connect, Upgraded
from .room import Exchanges, Timeouts
from .sites import Site
from .steps import StateEnum, Step, Stepwise
from .visit import CLIENT_CLOSED, SLOW, Visit
from .visitor import Visitor
from .visits import Visits
from .waiting import WaitingRoom

log = logging.getLogger("gotunnel.connection")

# Lingering close: how many seconds to read and drop what a visitor still sends after our last
# answer, in all and without a byte. A visitor with a large body may read the answer only after it
# has sent everything. nginx has the same values (lingering_time, lingering_timeout).
PARTING_TIME = 30
PARTING_TIMEOUT = 5
# How often a request whose agent has left is tried on the next route without a wait between.
MOST_TRIES = 3
FULL_PARTING_TIME = 2  # in place of PARTING_TIME, while room.MAX_PARTING visitors linger


class State(StateEnum):
    """Where the connection is between its requests."""

    NEW = enum.auto()  # waiting for the first byte of the first head
    IDLE = enum.auto()  # keep-alive: waiting for the first byte of the next head
    HEAD = enum.auto()  # part of a head has arrived
    AGENT = enum.auto()  # a head is complete, and its agent is expected back (waiting.py)
    LATE = enum.auto()  # ... and the rest took too long
    ASKED = enum.auto()  # a head is complete, and its request has a place in Exchanges.room
    PARTING = enum.auto()  # lingering close: our side has ended


class Port(Protocol):
    """What an HttpConnection needs of its port.Port."""

    proxies: Proxies
    timeouts: Timeouts
    exchanges: Exchanges
    parting: Shares
    waiting: WaitingRoom | None
    visits: Visits | None
    absent: Collection[str]
    templates: Templates

    def is_draining(self) -> bool: ...


class HttpConnection(Stepwise):
    """A connection that speaks HTTP, from its first head until it is closed or becomes a relay."""

    _port: Port

    def __init__(self, port: Port, visitor: Visitor, site: Site, scheme: str):
        """``site``: see Handler. ``scheme``: "https" or "http"."""
        super().__init__(port, visitor, State.NEW)
        if visitor.address[0] not in port.proxies:  # a proxy's requests are of many visitors
            visitor.owner = Owner()
        # While PARTING, monotonic: when to close in any case, and when to close a silent visitor.
        self._part_by = self._silent_at = 0.0
        self._parts_slowly = False  # it has a place in port.parting
        # Of this request, monotonic: when it gets its page though its agent is not back; 0 before
        # it has waited. An agent may be restarted twice in that time.
        self._wait_until = 0.0
        self._tries = 0  # at once, without a wait
        self._handler = Handler(
            visitor.duplex,
            visitor.address,
            site=site,
            scheme=scheme,
            sni=visitor.sni,
            proxies=port.proxies,
            owner=visitor.owner,
            claim_relay=visitor.claim_relay,
            is_draining=port.is_draining,
            is_crowded=port.exchanges.room.crowded,
            idle_timeout=port.timeouts.idle,
            response_timeout=port.timeouts.response,
            stall_timeout=port.timeouts.stall,
        )

        self._handler.absent = port.absent
        self._handler.templates = port.templates

    def _read_head(self) -> bool:
        handler, timeouts = self._handler, self._port.timeouts
        try:
            if not handler.head_came():
                if self._state is State.NEW:
                    # TLS's session ticket: there is no answer yet to go with. A visitor's kernel
                    # may hold the request back until it gets a packet of ours (Nagle's algorithm).
                    self.duplex.flush()
                if handler.in_head and self._state is not State.HEAD:
                    self._note_first_byte()
                return self._wait(timeouts.idle if self._state is State.IDLE else timeouts.header)
        except Malformed as error:
            return self._last_page(
                pages.error(error.status, "malformed-request", pages.MALFORMED.format(error))
            )
        if not self._visitor.has_asked:
            self._visitor.seat.settle()
        self._begin_visit()
        if self._port.absent and self._await_agent():
            return False
        return self._take_place()

    def _await_agent(self, lost: Tunnel | None = None) -> bool:
        """Let the request wait for its agent, if that is expected; its connection is the waiting
        room's then. ``lost`` as for WaitingRoom.enter()."""
        handler, visitor, waiting = self._handler, self._visitor, self._port.waiting
        if waiting is None or not handler.may_wait or self._port.is_draining():
            return False
        now = monotonic()
        self._wait_until = self._wait_until or now + waiting.timeout
        if now >= self._wait_until:
            return False
        hostname = visitor.sni
        if hostname is None:
            try:
                hostname = handler.read_request().hostname
            except Malformed:
                return False
        self._go_to(State.AGENT)
        left = self._wait_until - now
        return waiting.enter(hostname, self, visitor.listener, self.ready, left, lost)

    def _take_place(self) -> bool:
        """A place for the request, or the page that there is none."""
        handler = self._handler
        if not self._port.exchanges.room.enter(self._visitor.address[0]):
            with contextlib.suppress(Malformed):  # "busy" will do as the answer
                handler.read_request()  # whether it is HEAD, and what it accepts, shapes the page
            return self._last_page(pages.error(503, "gateway-busy", pages.BUSY))
        return self._go_to(State.ASKED)

    def _hand_over(self) -> bool:
        """Step worker: have an exchange's thread serve the request. From then on the connection is
        that thread's."""
        try:
            self._port.exchanges.start(self._serve)
        except BaseException:
            self._leave_room()
            raise
        return False

    def _serve(self) -> None:
        """Exchange's thread: serve this request, and any that the visitor sends right after it."""
        self._take_steps(self.IN_EXCHANGE)

    def _answer(self) -> bool:
        handler = self._handler
        lost: AgentLost | None = None
        try:
            handler.handle_one_request()
        except TimeoutError:
            self._visitor.fail_visit(SLOW, CLIENT_CLOSED)
            raise
        except AgentLost as error:
            lost = error.with_traceback(None)  # its frames would hold the error, and the visitor
        finally:
            self._leave_room()
        if lost is not None:
            if self._await_agent(lost.tunnel):
                return False
            # Its agent is back, or it must not wait: then this is the last try.
            self._tries += 1
            handler.may_wait = self._tries < MOST_TRIES and monotonic() < self._wait_until
            return self._take_place()
        handler.may_wait, self._wait_until, self._tries = True, 0.0, 0
        if handler.switched is not None:  # the visit ends with the relay
            handler.forget()
            if isinstance(handler.switched, Upgraded):
                relays.start_switched(self._visitor, *handler.switched)
            elif isinstance(handler.switched, Connect):
                relays.start_tcp(self._visitor, handler.switched.route)
            else:
                relays.start_feed(self._visitor, handler.switched)
            return False
        visit = self._visitor.visit
        if visit is not None:
            self._visitor.visit = None
            visit.end()
        if handler.close_connection:
            return self._part()
        self._go_to(State.IDLE)
        # Hardly any visitor has sent its next request already: wait first, and read then.
        return self.duplex.pending or self._wait(self._port.timeouts.idle)

    def _leave_room(self) -> None:
        self._port.exchanges.room.leave(self._visitor.address[0])

    def _refuse_late(self) -> bool:
        text = "Your request took too long to arrive. Try again."
        return self._last_page(pages.error(408, "head-timeout", text))

    def _last_page(self, page: Page) -> bool:
        # A step must not wait. If the page does not fit, the visitor was not reading anyway.
        self._handler.stall_timeout = 0
        self._handler.templates = own_pages.small(self._handler.templates)
        if self._visitor.visit is None:
            self._begin_visit()
        self._handler.describe_visit()
        self._handler.send_page(page, last=True)
        self._visitor.end_visit()
        return self._part()

    def _begin_visit(self) -> None:
        visits, visitor = self._port.visits, self._visitor
        visitor.has_asked = True
        if visits is not None:
            visit = Visit(visits, visitor.address[0], monotonic())
            self._handler.visit = visitor.visit = visit

    def _part(self) -> bool:
        """Begin the lingering close: half-close, then drop what still arrives. A plain close with
        bytes unread makes the kernel send RST, and that can destroy our answer on its way."""
        visitor = self._visitor
        try:
            self.duplex.finish(timeout=0)
        except TimeoutError:
            pass  # the visitor is not reading; _drop() flushes later
        if visitor.owner is not None:
            visitor.owner.close()  # here, since it may wait, and brief steps must not
        self._go_to(State.PARTING)
        self._parts_slowly = self._port.parting.enter(visitor.address[0])
        now = monotonic()
        self._part_by = now + (PARTING_TIME if self._parts_slowly else FULL_PARTING_TIME)
        self._silent_at = now + PARTING_TIMEOUT
        self.brief = True  # most visitors close the connection, and that is all which happens
        visitor.listener.park(self, min(self._part_by, self._silent_at) - now)
        return False

    def _drop(self) -> bool:
        # One read a step, so that a visitor that never stops sending does not keep a thread; two at
        # first, for TLS's close_notify and the end right behind it.
        came = self.duplex.drop()
        if came == 0 or (came and self.brief and self.duplex.drop() == 0):
            self.close()
            return False
        self.duplex.flush()
        now = monotonic()
        if came:
            self.brief = False  # there may be much more
            self._silent_at = now + PARTING_TIMEOUT
        self._visitor.listener.park(self, min(self._part_by, self._silent_at) - now)
        return False

    def close(self) -> None:
        super().close()
        self._handler.forget()
        if self._parts_slowly:
            self._parts_slowly = False
            self._port.parting.leave(self._visitor.address[0])

    STEPS = {
        State.NEW: Step(_read_head, first_byte=State.HEAD),
        State.IDLE: Step(_read_head, first_byte=State.HEAD),
        State.HEAD: Step(_read_head, time_up=State.LATE, begun=True),
        State.LATE: Step(_refuse_late),
        State.AGENT: Step(_take_place),
        State.ASKED: Step(_hand_over),
        State.PARTING: Step(_drop),
    }
    IN_EXCHANGE = {**STEPS, State.ASKED: Step(_answer)}
