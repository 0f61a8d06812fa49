"""Serves one data stream at the agent: reads its hostname, dials the target, copies bytes.

A target is a port, plain or with TLS, or a unix socket.

In http mode the visit is over as soon as either side ends: the gateway ends a stream when it has
its answer (a Go gateway sends FIN then), and a target that has closed its connection answers no
more. In tcp mode a half-close is passed on, and the visit lasts until both sides have ended. The
same holds in http mode if the gateway asks for it, since the visitor wants to change the protocol
(Upgrade).

The relay never reads the bytes. A Follower (follow.py), if there is one, reads them beside it, and
first_answer.py looks at the first bytes of an answer, to tell a target of another kind. If
an http target cannot be reached, the gateway gets the reason and answers 502; to a gateway that
does not know such reasons (common/refusals.py) the agent sends a 502 page itself. Our log tells the
operator what to change.
"""

import contextlib
import logging
import math
import socket
import ssl
import struct
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from time import monotonic
from typing import NamedTuple

from gotunnel import (
    REFUSED,
    Deadline,
    Ends,
    NoThread,
    ProtocolError,
    Stream,
    read_data_header,
    spawn,
)

from .answer_reader import Answer, AnswerReader
from .common import proxy_protocol
from .common.duplex import Duplex
from .common.hostnames import normal_hostname
from .common.refusals import MISCONFIGURED, TIMED_OUT, UNREACHABLE, UNTRUSTED, Refusal
from .common.relay import RESET_JOIN, pump, relay
from .config import Target, Tunnel
from .connect import addresses_of, connect
from .first_answer import LOOK_AGAIN, FirstAnswer, tell
from .follow import Follower
from .trust import (
    EXPIRED,
    NOT_YET_VALID,
    OTHER_ADDRESS,
    OTHER_NAME,
    UNKNOWN_NAME,
    NoTLS,
    begin_tls,
    clock_advice,
)

log = logging.getLogger("gotunnel.target")

DATA_HEADER_TIMEOUT = 10  # seconds; the gateway sends the header together with the SYN
DIAL_TIMEOUT = 10  # seconds to connect to a target, its TLS handshake included

# Receive buffer (SO_RCVBUF) for a target on the agent's own machine, in bytes. By itself it grows
# to megabytes, and for a visitor that reads slowly it stays full, beside the target's own buffer in
# the same kernel. Hundreds of them exhaust the memory that the kernel has for TCP (tcp_mem), and
# then it drops packets of the session too.
NEAR_BUFFER = 128 * 1024

# Seconds for the rest of an answer to reach a gateway that has ended its side of the stream.
ANSWER_TIMEOUT = 30

# Longest interval, in seconds, between two checks whether a visit is idle. The timer of a visit
# that has ended lives until its next check, so a long idle_timeout must not set the interval.
LONGEST_LOOK = 60

# What Targets counts beside the words of refusals.py. A stream for none of our hostnames counts as
# UNNAMED, so that a gateway cannot invent labels.
UNNAMED = "other"
NO_HEADER, NO_TUNNEL, NO_THREAD = "no-header", "no-tunnel", "no-thread"

# For gateways that make no page of a refusal. Plain, and readable in both colour schemes.
PAGE = """<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>This site cannot be reached</title>
<style>
  :root {{ color-scheme: light dark }}
  body {{ max-width: 34rem; margin: 18vh auto; padding: 0 1.5rem;
         font: 1.0625rem/1.6 system-ui, sans-serif }}
</style>
<h1>This site cannot be reached</h1>
<p>{}</p>
</html>
"""

# What to do about a bad certificate.
OTHER_HOST = "write a host in target that the certificate names"
OTHER_CA = "name its CA in target_ca_file"


class Unserved(Exception):
    """There is no connection to a target; the text is for the log, ``refusal`` for the visitor."""

    def __init__(self, refusal: Refusal, text: str):
        super().__init__(text)
        self.refusal = refusal


class Route(NamedTuple):
    """Where the visits of a hostname go.

    ``tunnel`` is the configuration's. ``context`` checks the target's certificate; None for a
    target without TLS. ``problem`` says why the gateway cannot serve the tunnel as configured; then
    visits are refused. It is "" if the gateway can. ``awaits_port``: the problem ends when the
    tunnel's public port is open. ``refusals``: the gateway makes the page for an http visit that
    is refused. ``url`` is the public address that the gateway has told; "" if it has not.
    """

    tunnel: Tunnel
    context: ssl.SSLContext | None = None
    problem: str = ""
    awaits_port: bool = False
    refusals: bool = False
    url: str = ""

    def address(self, hostname: str) -> str:
        """The public address. A gateway that does not tell it has most likely the usual port."""
        if self.url:
            return self.url
        return f"https://{hostname}" if self.tunnel.mode == "http" else f"tls://{hostname}:443"


class Targets:
    """The open connections to targets, so that an agent that stops can end them."""

    def __init__(self) -> None:
        self._open: set[Duplex] = set()
        self._over = False  # reset() was called
        self.answers = AnswerReader()
        self._failed: Counter[tuple[str, str]] = Counter()  # those that were not reached
        # By hostname: monotonic time of the latest may_tell(), or of an ordinary answer.
        self._told: dict[str, float] = {}
        self._lock = threading.Lock()  # guards all

    def count_failed(self, hostname: str, word: str) -> None:
        """The target of a hostname, or UNNAMED, was not reached. ``word``: Refusal's, or one of
        those above."""
        with self._lock:
            self._failed[hostname, word] += 1

    def failed(self) -> dict[tuple[str, str], int]:
        """How often which target was not reached, by hostname and word."""
        with self._lock:
            return dict(self._failed)

    def may_tell(self, hostname: str) -> bool:
        """Whether it is time for a line about the target of a hostname; False for LOOK_AGAIN from
        then on."""
        now = monotonic()
        with self._lock:
            if now - self._told.get(hostname, -math.inf) < LOOK_AGAIN:
                return False
            self._told[hostname] = now
            return True

    def note_ordinary(self, hostname: str) -> None:
        """The target of a hostname has answered as its tunnel says."""
        with self._lock:
            self._told[hostname] = monotonic()

    @contextlib.contextmanager
    def hold(self, target: Duplex) -> Iterator[None]:
        """Count ``target`` among them during a ``with`` block, and close it at its end."""
        with self._lock:
            self._open.add(target)
            over = self._over
        try:
            if over:
                target.reset()
            yield
        finally:
            with self._lock:
                self._open.discard(target)
            target.close()

    def reset(self) -> None:
        """Reset all of them, and each that hold() gets from now on."""
        self.answers.close()
        with self._lock:
            self._over = True
            targets = list(self._open)
        for target in targets:  # one that is closed meanwhile takes no harm
            target.reset()


def serve(
    stream: Stream,
    find_route: Callable[[str], Route | None],
    targets: Targets,
    follower: Follower | None = None,
) -> None:
    """Serve one data stream to its end. Raises nothing: what goes wrong is logged.

    ``find_route(hostname)`` returns the Route of a hostname, or None; ``targets`` are the agent's.
    ``follower`` follows the visit, if there is one.
    """
    try:
        name, ends, relayed = read_data_header(
            lambda count: stream.read_exactly(count, DATA_HEADER_TIMEOUT)
        )
    except (OSError, ProtocolError) as error:
        # A visitor that leaves at once is normal.
        level = logging.DEBUG if isinstance(error, ConnectionError) else logging.WARNING
        log.log(level, "stream %d dropped: %s", stream.id, error)
        targets.count_failed(UNNAMED, NO_HEADER)
        stream.reset()
        return
    route = find_route(hostname_of(name))
    if route is None:
        log.warning("stream %d refused: this agent has no tunnel for %.253r", stream.id, name)
        targets.count_failed(UNNAMED, NO_TUNNEL)
        stream.reset(code=REFUSED)
        return
    tunnel = route.tunnel
    if route.problem:  # logged when the gateway's answer came
        targets.count_failed(tunnel.hostname, MISCONFIGURED.word)
        refuse(stream, route, MISCONFIGURED)
        return
    try:
        first = introduction(tunnel.proxy_protocol, ends)
        target = dial(tunnel.target, route.context, first, tunnel.protocol)
    except Unserved as error:
        log.warning("%s: target %s: %s", tunnel.hostname, tunnel.target, error)
        targets.count_failed(tunnel.hostname, error.refusal.word)
        if follower is not None:
            follower.missed(stream, tunnel, error.refusal.word.replace("-", " "))
        refuse(stream, route, error.refusal)
        return
    log.debug("%s: stream %d to %s", tunnel.hostname, stream.id, tunnel.target)
    target.stall_timeout = stream.session.stall_timeout
    target.cut_unless_finished()
    if follower is not None:
        follower.follow(target, tunnel)
    answer = None
    with targets.hold(target):
        try:
            if tunnel.mode == "http" and not relayed:
                read_on: Callable[[], bytes] = target.read
                if route.context is None:
                    stream.shortcut(target.offer)
                    if follower is None:  # it would miss what the reader takes
                        read_on = Answer(target, stream, targets.answers).read
                answer = FirstAnswer(
                    target, tunnel, lambda: targets.note_ordinary(tunnel.hostname), read_on
                )
                exchange(stream, target, answer)
            elif tunnel.idle_timeout is None:
                relay(stream, target)
            else:
                relay_watched(stream, target, tunnel.hostname, tunnel.idle_timeout)
        except NoThread as error:
            log.warning("%s: %s; the visit is reset", tunnel.hostname, error)
            targets.count_failed(tunnel.hostname, NO_THREAD)
            stream.reset()
        finally:
            stream.close()
    if answer is not None:
        tell(answer, tunnel, lambda: targets.may_tell(tunnel.hostname))


def hostname_of(name: str) -> str:
    """The hostname in a data header. A Go gateway writes the visitor's Host there, in any case and
    with a port behind it."""
    host, colon, port = name.rpartition(":")
    return normal_hostname(host if colon and port.isdigit() else name)


def introduction(version: str, ends: Ends | None) -> bytes:
    """The first bytes for a target: a PROXY header of that ``version`` with the visitor's address;
    b"" if version is "". It goes before TLS, as its specification says."""
    if not version:
        return b""
    if ends is None:
        return proxy_protocol.encode_unknown(version)
    return proxy_protocol.encode(version, ends.visitor, ends.door)


def dial(
    target: Target,
    context: ssl.SSLContext | None,
    first: bytes = b"",
    protocol: str = "",
    timeout: float | None = None,
) -> Duplex:
    """Connect to a target of the configuration and send it the ``first`` bytes, then start TLS if
    there is a ``context``. Its handshake must choose ``protocol``, unless that is "".
    ``timeout`` is in seconds, None for DIAL_TIMEOUT.

    Raises Unserved, at the latest ``timeout`` after the name was resolved.
    """
    timeout = DIAL_TIMEOUT if timeout is None else timeout
    try:
        if target.path:
            return _introduce(Duplex(_connect_unix(target.path, timeout)), first)
        addresses = addresses_of(target.host, target.port)
        deadline = Deadline(timeout)
        sock = connect(addresses, deadline)
        _limit_if_near(sock)
        duplex = _introduce(Duplex(sock), first)
        if context is not None:
            _start_tls(duplex, context, target.host, deadline)
            if protocol and duplex.protocol != protocol:
                duplex.close()
                raise Unserved(UNREACHABLE, f"its TLS does not take {protocol} by ALPN; remove "
                               "protocol, or turn HTTP/2 on there")  # fmt: skip
        return duplex
    except TimeoutError:
        raise Unserved(TIMED_OUT, f"no answer in {timeout:g} s") from None
    except ssl.SSLCertVerificationError as error:
        problem = error.verify_message.rstrip(".")
        text = f"its certificate is not to be trusted ({problem}); {_advice(error.verify_code)}"
        raise Unserved(UNTRUSTED, text) from None
    except NoTLS as error:
        plain = "; write the target without https://" if error.protocol == "HTTP" else ""
        text = f"it {error}{plain or '; is it a port with TLS?'}"
        raise Unserved(UNREACHABLE, text) from None
    except ssl.SSLError as error:
        text = f"the TLS handshake failed ({error.reason or error}); is it a port with TLS?"
        if error.reason == UNKNOWN_NAME:
            text = f"it has no certificate for the name {target.host}; {OTHER_HOST}"
        raise Unserved(UNREACHABLE, text) from None
    except ConnectionRefusedError as error:
        raise Unserved(UNREACHABLE, f"{error.strerror}; does a program listen there?") from None
    except OSError as error:
        raise Unserved(UNREACHABLE, error.strerror or str(error)) from None


def _advice(code: int) -> str:
    """What to do about a bad certificate, by OpenSSL's number of the error."""
    if code in (NOT_YET_VALID, EXPIRED):
        return clock_advice(code, "renew it")
    return OTHER_HOST if code in (OTHER_NAME, OTHER_ADDRESS) else OTHER_CA


def _limit_if_near(sock: socket.socket) -> None:
    """Give the connection a receive buffer of NEAR_BUFFER if both its ends are on this machine."""
    with contextlib.suppress(OSError):  # the target has left already, as the next call will find
        if sock.getsockname()[0] == sock.getpeername()[0]:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, NEAR_BUFFER)


def _introduce(duplex: Duplex, first: bytes) -> Duplex:
    try:
        duplex.send(first)  # a few bytes, for which a new connection always has room
        return duplex
    except OSError:
        duplex.close()
        raise


def _connect_unix(path: str, timeout: float) -> socket.socket:
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        # Not settimeout(): if the target's backlog is full, connect() waits on a blocking socket,
        # and fails on a non-blocking one.
        seconds = int(timeout)
        timeval = struct.pack("ll", seconds, int((timeout - seconds) * 1_000_000))
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, timeval)
        sock.connect(path)
        return sock
    except BlockingIOError:
        sock.close()
        raise TimeoutError("the backlog is full") from None
    except BaseException:
        sock.close()
        raise


def _start_tls(duplex: Duplex, context: ssl.SSLContext, host: str, deadline: Deadline) -> None:
    try:
        begin_tls(duplex, context, normal_hostname(host), deadline.left())
    except BaseException:
        duplex.close()
        raise


def exchange(stream: Stream, target: Duplex, source: FirstAnswer) -> None:
    """Copy both ways until either side has ended. The answer is read from ``source``, which is the
    target."""

    def stop_reading() -> None:
        source.over = True
        target.stop_reading()

    stream.on_death(stop_reading)  # _ask() still passes on what has come
    asked = threading.Event()
    name = f"{threading.current_thread().name} answer"
    answer = spawn(name, _answer, stream, target, source, asked)
    ended_well = _ask(stream, target)
    source.over = True
    if ended_well:
        target.stop()  # the gateway has its answer: free the target and the thread that reads it
    else:
        target.cut()
    asked.set()
    answer.join(ANSWER_TIMEOUT)
    if answer.is_alive():  # it is blocked in a write that the gateway does not take
        stream.reset()
        answer.join(RESET_JOIN)


def relay_watched(stream: Stream, target: Duplex, hostname: str, idle_timeout: float) -> None:
    """relay(), but reset the stream when no byte has passed for ``idle_timeout`` seconds."""
    watched = Watched(target, stream, hostname, idle_timeout)
    try:
        relay(stream, watched)
    finally:
        watched.end()


class Watched:
    """A target as an end of a relay. It resets the stream when no byte has passed for
    ``idle_timeout`` seconds."""

    def __init__(self, duplex: Duplex, stream: Stream, hostname: str, idle_timeout: float):
        self.finish, self.reset = duplex.finish, duplex.reset
        self.cut, self.stop_reading = duplex.cut, duplex.stop_reading
        self._over = threading.Event()
        self.end = self._over.set  # to be called when the relay has ended
        # Directions in which bytes are being written at the moment, perhaps slowly.
        self._passing_on: set[str] = set()
        self._duplex = duplex
        self._stream = stream
        self._hostname = hostname
        self._idle_timeout = idle_timeout
        self._moved_at = monotonic()
        self._lock = threading.Lock()  # guards _passing_on and _moved_at
        self._look_later()

    def read(self) -> bytes:
        self._note("answer", passing_on=False)
        data = self._duplex.read()
        self._note("answer", passing_on=bool(data))
        return data

    def write(self, data: bytes) -> None:
        self._note("question", passing_on=True)
        self._duplex.write(data)
        self._note("question", passing_on=False)

    def _note(self, direction: str, *, passing_on: bool) -> None:
        with self._lock:
            self._moved_at = monotonic()
            (self._passing_on.add if passing_on else self._passing_on.discard)(direction)

    def _look_later(self) -> None:
        with self._lock:
            if self._passing_on:
                self._moved_at = monotonic()
            left = self._moved_at + self._idle_timeout - monotonic()
        if left > 0:
            self._stream.session.call_later(min(left, LONGEST_LOOK), self._look)
        else:
            log.info("%s: a visit ends: no byte for %g s (idle_timeout)",
                     self._hostname, self._idle_timeout)  # fmt: skip
            self._stream.reset("the visit was idle")

    def _look(self) -> None:
        """Demultiplexer thread: must not block."""
        if not self._over.is_set():
            self._look_later()


def _ask(stream: Stream, target: Duplex) -> bool:
    """Pass requests on until the stream ends. Returns whether it ended with FIN. A target that
    reads no more of a request may have answered it already ("too large"): then the rest of the
    request is dropped, and the answer still passes."""
    try:
        while data := stream.read():
            try:
                target.write(data)
            except OSError:
                break
        while stream.read():
            pass
        return True
    except OSError:
        return False


def _answer(stream: Stream, target: Duplex, source: FirstAnswer, asked: threading.Event) -> None:
    pump(source, stream)
    stream.close()
    if not asked.wait(ANSWER_TIMEOUT):  # _ask() is blocked in a write that the target does not take
        target.reset()


def refuse(stream: Stream, route: Route, refusal: Refusal) -> None:
    """Turn the visit away, and tell the gateway or the visitor why."""
    if route.tunnel.mode != "http":
        stream.reset(code=REFUSED)
        return
    if route.refusals:
        stream.reset(code=refusal.code)
        return
    page = PAGE.format(refusal.text).encode()
    head = (
        "HTTP/1.1 502 Bad Gateway\r\n"
        "Content-Type: text/html; charset=utf-8\r\n"
        f"Content-Length: {len(page)}\r\n"
        f"X-Gotunnel-Error: {refusal.word}\r\n"
        "Connection: close\r\n\r\n"
    )
    try:
        stream.write(head.encode() + page, timeout=DIAL_TIMEOUT)
    except OSError:  # the gateway takes no more: a partial page must not look complete
        stream.reset()
    stream.close()
