"""A visitor's connection that speaks HTTP: one request after the other.

    head --> request and answer (http1_server.py) --> head ... --> parting
                          \\-> 101, CONNECT: relay (relays.py)

Heads are read in steps, which park the connection if more must come: a visitor that is slow or idle
holds no worker. A request with its answer takes as long as visitor and target please. So it runs in
a thread of the port's Exchanges, and holds up no other visitor's steps.
"""

import contextlib
import enum
import logging
from time import monotonic

from gotunnel_agent.common.http1 import Malformed

from . import pages, relays
from .http1_server import Handler
from .login import Owner
from .request import Connect
from .steps import Named, Step, Stepwise

log = logging.getLogger("gotunnel.connection")

# Seconds to read and drop what a visitor sends after our last answer: in all, and without a byte.
# A visitor that sends a large body reads the answer when it has sent all, or stops; nginx gives it
# as long (lingering_time, lingering_timeout).
PARTING_TIME = 30
PARTING_TIMEOUT = 5
# Visitors that have so long at a time, each address its share; others have FULL_PARTING_TIME.
MAX_PARTING = 1024
FULL_PARTING_TIME = 2


class State(Named):
    """Where the connection stands between its requests."""

    NEW = enum.auto()  # no byte of the first head has come
    IDLE = enum.auto()  # a request was answered, no byte of the next head has come
    HEAD = enum.auto()  # a part of a head has come
    LATE = enum.auto()  # ... and the rest took too long
    ASKED = enum.auto()  # a request has come and has its place among those that are answered
    PARTING = enum.auto()  # our side has ended


class HttpConnection(Stepwise):
    """A connection that speaks HTTP, from its first head until it is closed or becomes a relay."""

    def __init__(self, port, visitor, site, scheme):
        """``site``: see Handler. ``scheme``: "https" or "http"."""
        super().__init__(port, visitor, State.NEW)
        if visitor.address[0] not in port.proxies:  # that one brings requests of many visitors
            visitor.owner = Owner()
        self._silent_at = None  # monotonic, when a visitor that parts has sent nothing for too long
        self._parts_slowly = False  # it is one of MAX_PARTING
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

    def _read_head(self):
        handler, timeouts = self._handler, self._port.timeouts
        try:
            if not handler.head_came():
                if handler.in_head and self._state is not State.HEAD:
                    self._hear()
                return self._wait(timeouts.idle if self._state is State.IDLE else timeouts.header)
        except Malformed as error:
            return self._last_page(pages.error(error.status, "malformed-request", f"{error}."))
        self._visitor.seat.settle()
        if not self._port.exchanges.room.enter(self._visitor.address[0]):
            with contextlib.suppress(Malformed):  # busy is answer enough
                handler.read_request()  # HEAD and Accept say which form the page is to have
            text = "This gateway serves as many requests as it can at the moment."
            return self._last_page(pages.error(503, "gateway-busy", text))
        return self._go_to(State.ASKED)

    def _hand_over(self):
        """Step worker: have an exchange thread answer the request."""
        try:
            self._port.exchanges.start(self._serve)  # which has the connection from here on
        except BaseException:
            self._leave_room()
            raise
        return False

    def _serve(self):
        """Exchange thread: the request that has come, then those that its visitor sends at once."""
        self._take_steps(self.IN_EXCHANGE)

    def _answer(self):
        handler = self._handler
        try:
            handler.handle_one_request()
        finally:
            self._leave_room()
        if handler.switched is not None:
            if isinstance(handler.switched, Connect):
                relays.start_tcp(self._visitor, handler.switched.route)
            else:
                relays.start_switched(self._visitor, *handler.switched)
            return False
        if handler.close_connection:
            return self._part()
        return self._go_to(State.IDLE)

    def _leave_room(self):
        self._port.exchanges.room.leave(self._visitor.address[0])

    def _refuse_late(self):
        text = "The request's head took too long to come."
        return self._last_page(pages.error(408, "head-timeout", text))

    def _last_page(self, page):
        self._handler.stall_timeout = 0  # it fits, or the visitor reads nothing: a step cannot wait
        self._handler.send_page(page, last=True)
        return self._part()

    def _part(self):
        """Half-close, and drop what still comes for a moment: closing a connection that has
        unread bytes makes the kernel send a RST, which can cost the visitor our answer."""
        with contextlib.suppress(TimeoutError):  # it reads nothing now, and gets its farewell later
            self.duplex.finish(timeout=0)
        self._go_to(State.PARTING)
        self._parts_slowly = self._port.parting.enter(self._visitor.address[0])
        now = monotonic()
        self._deadline = now + (PARTING_TIME if self._parts_slowly else FULL_PARTING_TIME)
        self._silent_at = now + PARTING_TIMEOUT
        return True

    def _drop(self):
        # One read a step: a visitor that sends without end must not have a thread for it.
        data = self.duplex.receive()
        if data == b"":
            self.close()
            return False
        self.duplex.flush()
        now = monotonic()
        if data:
            self._silent_at = now + PARTING_TIMEOUT
        self._visitor.listener.park(self, min(self._deadline, self._silent_at) - now)
        return False

    def close(self):
        super().close()
        if self._parts_slowly:
            self._parts_slowly = False
            self._port.parting.leave(self._visitor.address[0])

    STEPS = {
        State.NEW: Step(_read_head, first_byte=State.HEAD),
        State.IDLE: Step(_read_head, first_byte=State.HEAD),
        State.HEAD: Step(_read_head, time_up=State.LATE, outlasts_drain=True),
        State.LATE: Step(_refuse_late),
        State.ASKED: Step(_hand_over),
        State.PARTING: Step(_drop),
    }
    IN_EXCHANGE = {**STEPS, State.ASKED: Step(_answer)}
