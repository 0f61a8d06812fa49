"""Relays bytes between a visitor's connection and a stream: tcp mode, or WebSocket after a 101.

A relay may last as long as visitor and target like, so it has two threads of its own, one for each
direction. Both ends are closed when both directions are done. If one end breaks, the other one is
reset, so that bytes that were cut off never look complete.
"""

import logging
import threading
from collections.abc import Callable
from importlib import import_module
from time import monotonic
from typing import Protocol, TypeVar

from gotunnel import Ends, NoThread, Stream, spawn
from gotunnel_agent.common import proxy_protocol, refusals
from gotunnel_agent.common.duplex import Duplex
from gotunnel_agent.common.relay import RESET_JOIN, RelayEnd, Source, pump, relay

from ..net.hung_up import hung_up
from ..net.listener import Address
from ..routes import AgentBusy, Route
from .postgres import CancelKeys, Watched
from .request import Feed
from .visit import BUG, Visit
from .visits import Counted, End

log = logging.getLogger("gotunnel.relays")

# Relays (tcp visits, WebSockets) at a time. Each has two threads and about 65 kB.
MAX_RELAYS = 2048
# Seconds that a WebSocket's visitor has for its last bytes after its target has ended.
LAST_BYTES_TIMEOUT = 2
# Seconds that the reader of a Feed may read nothing: a browser whose machine sleeps. It connects
# again when it wakes up, and others need its place.
FEED_STALL = 30
# After a tcp visitor has half-closed, and its agent cannot half-close the target: how many seconds
# the target may be silent until FIN ends the visit. Most likely the visitor has left.
HELD_FIN_TIMEOUT = 30
# How many seconds the direction towards the visitor may be silent after our FIN has ended the other
# one. An agent that cannot half-close should end its stream at our FIN. Without this limit, an
# agent that leaves it open would hold the thread for ever.
ENDING_TIMEOUT = 30


class Line(End, Protocol):
    """A visitor's end of a relay: its Duplex, or a stream of its HTTP/2 connection."""

    def cut_unless_finished(self) -> None: ...

    def stop(self) -> None: ...


class Party(Protocol):
    """What a relay needs of its visitor: a Visitor, or a StreamVisitor (http2_relay.py), whose
    methods are explained there."""

    visit: Visit | None
    cancel_keys: CancelKeys | None

    @property
    def duplex(self) -> Line: ...

    @property
    def address(self) -> Address: ...

    @property
    def sni(self) -> str | None: ...

    def ends(self) -> Ends: ...

    def refuse_introduction(self, data: bytes) -> None: ...

    def fail_visit(self, error: str, status: int) -> None: ...

    def end_visit(self) -> None: ...

    def close(self) -> None: ...


# The other end of a relay, where it is to be opened, or what takes its place
Other = TypeVar("Other", Route, Stream, Feed)


def start_tcp(visitor: Party, route: Route) -> None:
    """Relay between ``visitor`` and a new stream of ``route``, in threads that close both. Raises
    NoThread; then the Visitor still belongs to the caller."""
    if route.pool is None:
        _start(_relay_tcp, visitor, route)
    else:  # loaded when the first pool is asked: other gateways have no need of it
        _start(import_module(f"{__package__}.pooled_relay").relay_tcp, visitor, route)


def start_switched(
    visitor: Party, stream: Stream, half_close: bool, done: Callable[[], object] | None = None
) -> None:
    """Relay between ``visitor`` and the stream that has answered 101, in threads that close both.
    ``half_close``: the agent passes a FIN on to its target. ``done()`` is called at the end. Raises
    NoThread; then the Visitor still belongs to the caller, and the stream is reset."""
    function = relay_upgraded if half_close else relay_switched
    try:
        _start(function if done is None else _then(function, done), visitor, stream)
    except NoThread:
        stream.reset()
        if done is not None:
            done()
        raise


def _then(
    function: Callable[[Party, Stream], None], done: Callable[[], object]
) -> Callable[[Party, Stream], None]:
    def both(visitor: Party, stream: Stream) -> None:
        try:
            function(visitor, stream)
        finally:
            done()

    return both


def start_feed(visitor: Party, feed: Feed) -> None:
    """Have ``feed`` write the rest of the answer, in a thread that closes the visitor's connection.
    Raises NoThread; then the Visitor still belongs to the caller."""
    try:
        _start(_feed, visitor, feed, f"events {visitor.address[0]}")
    except NoThread:
        feed.give_up()
        raise


def _feed(visitor: Party, feed: Feed) -> None:
    end, line = _end_of(visitor), visitor.duplex
    if isinstance(line, Duplex):
        line.stall_timeout = min(line.stall_timeout, FEED_STALL)

    def gone() -> bool:  # takes no lock
        return hung_up(line) if isinstance(line, Duplex) else line.died()

    feed.run(end, gone)


def _start(
    function: Callable[[Party, Other], None], visitor: Party, other: Other, name: str = ""
) -> None:
    spawn(name or f"relay {visitor.sni or visitor.address[0]}", _run, function, visitor, other)


def _run(function: Callable[[Party, Other], None], visitor: Party, other: Other) -> None:
    """Thread: one relay, from beginning to end."""
    visitor.duplex.cut_unless_finished()
    try:
        function(visitor, other)
        visitor.end_visit()
    except NoThread as error:  # both ends are reset
        visitor.fail_visit("gateway-busy", 503)
        log.warning("%s: %s; the visit is reset", visitor, error)
    except OSError as error:
        log.debug("%s: %s", visitor, error)
    except Exception:
        log.exception("%s: its relay is closed (bug, traceback follows)", visitor)
        visitor.fail_visit(BUG, 500)
    finally:
        visitor.close()


def _relay_tcp(visitor: Party, route: Route) -> None:
    try:
        stream = route.tunnel.open(route, visitor.ends)
    except OSError as error:
        refuse(visitor, route, error)
        raise
    carry(visitor, route, stream)


def refuse(visitor: Party, route: Route, error: OSError) -> None:
    """The agent has opened no stream for a visit in tcp mode."""
    visitor.duplex.reset()  # a mere close would look like an empty answer
    visitor.fail_visit(*_refusal(error))
    if isinstance(error, AgentBusy):
        log.info("%s: %s: %s", route.hostname, visitor, error)


class StreamLike(RelayEnd, Protocol):
    """What takes the place of a visit's Stream: a pooled_relay.PooledLine."""

    @property
    def id(self) -> int: ...

    @property
    def refused(self) -> bool: ...

    route: Route  # of its agent

    def close(self) -> None: ...


def carry(visitor: Party, route: Route, stream: Stream | StreamLike) -> None:
    """Relay a visit in tcp mode between ``visitor`` and its new stream, to the end. Raises
    NoThread."""
    tunnel, visit = route.tunnel, visitor.visit
    if visit is not None:
        visit.status = visit.status or 200  # a CONNECT has set it already
        visit.stream = stream.id
    end: End = visitor.duplex
    watched = None
    if not visitor.sni:
        end = _Guarded(visitor)
    elif visitor.cancel_keys is not None:
        find_route = (lambda: route) if isinstance(stream, Stream) else (lambda: stream.route)
        end = watched = Watched(visitor.duplex, visitor.cancel_keys, find_route)
    if visit is not None:
        end = Counted(end, visit)
    try:
        if tunnel.half_close or not isinstance(stream, Stream):
            relay(end, stream)
        else:
            relay_holding_fin(end, stream)
    except NoThread:
        stream.reset()  # a mere close would look to the target like an empty, complete visit
        raise
    finally:
        if watched is not None:
            watched.forget()
        stream.close()
        if stream.refused:
            if not isinstance(stream, Stream):
                route = stream.route  # it may have changed
            route.tunnel.count_failed(route)
            if visit is not None:
                visit.error = refusals.UNREACHABLE.word
                visit.status = 200 if visit.method else 502
            log.info("%s: %s: the agent could not connect to its target; see the agent's log",
                     route.hostname, visitor)  # fmt: skip


def relay_holding_fin(
    end: RelayEnd, stream: Stream, stop: Callable[[], None] | None = None
) -> None:
    """relay() for an agent that closes its target at FIN, which would cut the answer.

    When the visitor half-closes, its FIN is held back until the target has been silent for
    HELD_FIN_TIMEOUT. ``end`` is the visitor's. ``stop()`` ends it; it is called if the visitor has
    not ended within LAST_BYTES_TIMEOUT after the target. None: the visitor may take any time.
    """
    stream.on_death(end.stop_reading)
    source = _Timed(stream)
    visitor_done = threading.Event()
    back = _copy_back(_copy_to_visitor, source, end, visitor_done, stop)
    try:
        while data := end.read():
            stream.write(data)
    except (OSError, ValueError):
        # End the stream by a reset after the copied bytes. If it is dead already, the bytes that it
        # still holds go to the visitor.
        stream.cut()
    visitor_done.set()
    _await_silence(back, source, HELD_FIN_TIMEOUT)
    stream.finish()
    _await_silence(back, source, ENDING_TIMEOUT)
    _end(back, end, stream)
    if stream.is_dead:
        end.cut()  # the visitor has not got all bytes, so it must not see a plain end


def relay_upgraded(visitor: Party, stream: Stream) -> None:
    """Relay after a 101, for an agent that can half-close. The half-close is passed on: `docker
    exec -i` ends its program's standard input by one, and the program may answer afterwards."""
    try:
        relay(_end_of(visitor), stream)
    except NoThread:
        stream.reset()
        raise
    finally:
        stream.close()


def relay_switched(visitor: Party, stream: Stream) -> None:
    """Relay after a 101, for an agent that closes its target at FIN."""
    try:
        relay_holding_fin(_end_of(visitor), stream, visitor.duplex.stop)
    except NoThread:
        stream.reset()
        raise
    finally:
        stream.close()


def _end_of(visitor: Party) -> End:
    return visitor.duplex if visitor.visit is None else Counted(visitor.duplex, visitor.visit)


def _refusal(error: OSError) -> tuple[str, int]:
    """The code and status of a visit for which its agent opens no stream."""
    if isinstance(error, AgentBusy):
        return "agent-limit", 503
    return ("agent-busy", 503) if isinstance(error, TimeoutError) else ("agent-gone", 502)


def _copy_to_visitor(
    source: Source,
    end: RelayEnd,
    visitor_done: threading.Event,
    stop: Callable[[], None] | None,
) -> None:
    pump(source, end)
    # The target has ended. Give the visitor a moment for its last bytes.
    if stop is not None and not visitor_done.wait(LAST_BYTES_TIMEOUT):
        stop()


def _copy_back(function: Callable[..., None], *arguments: object) -> threading.Thread:
    """Start the thread that copies from the stream to the visitor. Raises NoThread."""
    return spawn(f"{threading.current_thread().name} back", function, *arguments)


def _await_silence(back: threading.Thread, source: "_Timed", timeout: float) -> None:
    """Wait until the thread ``back`` ends, or its source was silent for ``timeout`` seconds."""
    began = monotonic()
    while back.is_alive():
        silence = min(source.silence(), monotonic() - began)
        if silence >= timeout:
            return
        back.join(timeout - silence)


def _end(back: threading.Thread, end: RelayEnd, stream: Stream) -> None:
    """Reset both ends if the thread ``back``, which copies between them, has not ended by now."""
    if not back.is_alive():
        return
    log.debug("thread %s: its relay is reset, it has not ended in time", back.name)
    stream.reset()
    end.reset()
    back.join(RESET_JOIN)
    if back.is_alive():
        log.error("thread %s does not end although its relay was reset (bug)", back.name)


class _Guarded:
    """The relay end of a visitor without TLS. The visitor's first bytes must not be a PROXY header.
    No byte is held back meanwhile: a program may wait for the answer to it."""

    def __init__(self, visitor: Party):
        duplex = visitor.duplex
        self.read: Callable[[], bytes] = self._read_guarded
        self.write, self.finish = duplex.write, duplex.finish
        self.reset, self.died = duplex.reset, duplex.died
        self.cut, self.stop_reading = duplex.cut, duplex.stop_reading
        self._duplex = duplex
        self._refuse = visitor.refuse_introduction
        self._came = b""  # the first bytes, as long as they may become a header

    def _read_guarded(self) -> bytes:
        data = self._duplex.read()
        self._came += data[: proxy_protocol.LINE_LIMIT]
        self._refuse(self._came)
        if not proxy_protocol.may_begin(self._came):
            self.read = self._duplex.read
        return data


class _Timed:
    """A pump's source that reads from a stream and tells another thread how long it was silent."""

    def __init__(self, stream: Stream):
        self.reset, self.cut = stream.reset, stream.cut
        self._read = stream.read
        # Monotonic time when the waiting read began, None between reads. Set by the pump's thread.
        self._since: float | None = None

    def read(self) -> bytes:
        self._since = monotonic()
        data = self._read()
        self._since = None
        return data

    def silence(self) -> float:
        """Seconds that the present read has waited; 0 while its bytes are being passed on."""
        since = self._since
        return 0 if since is None else monotonic() - since
