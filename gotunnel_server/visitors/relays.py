"""A visitor's connection and a stream, joined: visits in tcp mode, WebSockets after a 101 answer.

A relay takes as long as visitor and target please, so it has two threads of its own, one for each
direction. Both ends are closed when both directions are done; if one end breaks, the other is
reset, so that bytes that were cut off never look complete.
"""

import logging
import threading
from time import monotonic

from gotunnel import RESET_JOIN, NoThread, pump, relay, spawn
from gotunnel_agent.common import proxy_protocol

from ..routes import AgentBusy
from .postgres import Watched

log = logging.getLogger("gotunnel.relays")

# Relays (tcp visits, WebSockets) at a time: two threads and some 65 kB each.
MAX_RELAYS = 2048
# Seconds that a visitor has for its last bytes after the target of a WebSocket has ended.
LAST_BYTES_TIMEOUT = 2
# Seconds without a byte from the target after a tcp visitor has half-closed, when the agent cannot
# half-close its target: then the visitor has most likely left.
HELD_FIN_TIMEOUT = 30
# Seconds that the direction towards the visitor may be silent after the other one has ended for
# good. An agent that cannot half-close ends its stream as soon as it sees our FIN; one that does
# not would keep the thread for ever.
ENDING_TIMEOUT = 30


def start_tcp(visitor, route):
    """Join a Visitor and its Route in threads of their own, which close it. Raises NoThread: then
    it is still the caller's."""
    _start(_relay_tcp, visitor, route)


def start_switched(visitor, stream, half_close):
    """Join a Visitor and the stream that has answered it with 101, in threads of their own, which
    close both. ``half_close``: the agent passes FIN on. Raises NoThread: then the Visitor is still
    the caller's, and the stream is reset."""
    try:
        _start(relay_upgraded if half_close else relay_switched, visitor, stream)
    except NoThread:
        stream.reset()
        raise


def _start(function, visitor, other):
    spawn(f"relay {visitor.sni or visitor.address[0]}", _run, function, visitor, other)


def _run(function, visitor, other):
    """Thread: one relay, from its beginning to its end."""
    visitor.duplex.cut_unless_finished()
    try:
        function(visitor, other)
    except NoThread as error:  # both ends are reset
        log.warning("%s: %s; the visit is reset", visitor, error)
    except OSError as error:
        log.debug("%s: %s", visitor, error)
    except Exception:
        log.exception("%s: its relay is ended (bug, traceback follows)", visitor)
    finally:
        visitor.close()


def _relay_tcp(visitor, route):
    tunnel = route.tunnel
    try:
        stream = tunnel.open(route, visitor.ends)
    except OSError as error:
        visitor.duplex.reset()  # refused: not an empty but complete visit
        if isinstance(error, AgentBusy):
            log.info("%s: %s: %s", route.hostname, visitor, error)
        raise
    end, watched = visitor.duplex, None
    if not visitor.sni:
        end = _Guarded(visitor)
    elif visitor.cancel_keys is not None:
        end = watched = Watched(visitor.duplex, visitor.cancel_keys, route)
    try:
        if tunnel.half_close:
            relay(end, stream)
        else:
            relay_holding_fin(end, stream)
    except NoThread:
        stream.reset()  # its target must not see an empty but complete visit
        raise
    finally:
        if watched is not None:
            watched.forget()
        stream.close()
        if stream.refused:
            tunnel.count_failed(route)
            log.info("%s: %s: the agent's target is down or refuses; its log says why",
                     route.hostname, visitor)  # fmt: skip


def relay_holding_fin(end, stream, last_bytes=None):
    """relay() for an agent that takes FIN for the end of the visit, and would cut the answer.

    When the visitor has half-closed, its FIN waits until the target has been silent for a while.
    ``end`` is the visitor's, a Duplex. ``last_bytes``: seconds for it to end after the target has;
    None: as long as it likes.
    """
    stream.on_death(end.stop_reading)
    source = _Timed(stream)
    visitor_done = threading.Event()
    back = _copy_back(_copy_to_visitor, source, end, visitor_done, last_bytes)
    try:
        while data := end.read():
            stream.write(data)
    except (OSError, ValueError):
        stream.cut()  # behind what was copied; if it is dead, what it has left goes to the visitor
    visitor_done.set()
    _outlast(back, source, HELD_FIN_TIMEOUT)
    stream.finish()
    _outlast(back, source, ENDING_TIMEOUT)
    _end(back, end, stream)
    if stream.is_dead:
        end.cut()  # it may have ended before, and now it has not taken all


def relay_upgraded(visitor, stream):
    """What follows a 101. A half-close is passed on: `docker exec -i` ends the standard input of
    its program by one, and the program may answer afterwards."""
    try:
        relay(visitor.duplex, stream)
    except NoThread:
        stream.reset()
        raise
    finally:
        stream.close()


def relay_switched(visitor, stream):
    """The same for an agent that ends its target at FIN, and the stream with its target."""
    try:
        relay_holding_fin(visitor.duplex, stream, LAST_BYTES_TIMEOUT)
    except NoThread:
        stream.reset()
        raise
    finally:
        stream.close()


def _copy_to_visitor(source, end, visitor_done, last_bytes):
    pump(source, end)
    # The visitor has the last word, and a moment to say it.
    if last_bytes is not None and not visitor_done.wait(last_bytes):
        end.stop()


def _copy_back(function, *arguments):
    """Start the thread that copies from the stream to the visitor. Raises NoThread."""
    return spawn(f"{threading.current_thread().name} back", function, *arguments)


def _outlast(back, source, timeout):
    """Wait for a thread until its source has been silent for ``timeout`` seconds from now on."""
    began = monotonic()
    while back.is_alive():
        silence = min(source.silence(), monotonic() - began)
        if silence >= timeout:
            return
        back.join(timeout - silence)


def _end(back, end, stream):
    """Reset both ends if the thread that copies between them has not ended by now."""
    if not back.is_alive():
        return
    log.debug("thread %s: reset, it has not ended in time", back.name)
    stream.reset()
    end.reset()
    back.join(RESET_JOIN)
    if back.is_alive():
        log.error("thread %s does not end although its relay was reset (bug)", back.name)


class _Guarded:
    """A visitor without TLS as an end of a relay, whose first bytes must not be a PROXY header.
    None is held back: a program may wait for the answer to any of them."""

    def __init__(self, visitor):
        duplex = visitor.duplex
        self.write, self.finish = duplex.write, duplex.finish
        self.reset, self.died = duplex.reset, duplex.died
        self.cut, self.stop_reading = duplex.cut, duplex.stop_reading
        self._duplex = duplex
        self._refuse = visitor.refuse_introduction
        self._came = b""  # so far, as long as it may become a header

    def read(self):
        data = self._duplex.read()
        self._came += data[: proxy_protocol.LINE_LIMIT]
        self._refuse(self._came)
        if not proxy_protocol.may_begin(self._came):
            self.read = self._duplex.read
        return data


class _Timed:
    """A stream as a pump's source, which tells another thread how long it has been silent."""

    def __init__(self, stream):
        self.reset, self.cut = stream.reset, stream.cut
        self._read = stream.read
        self._since = None  # monotonic, of the read that waits; set by the pump's thread only

    def read(self):
        self._since = monotonic()
        data = self._read()
        self._since = None
        return data

    def silence(self) -> float:
        """Seconds that a read has waited; 0 while the other end takes what was read."""
        since = self._since
        return 0 if since is None else monotonic() - since
