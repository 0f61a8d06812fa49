"""One data stream at the agent: read whom it is for, dial that target, copy bytes.

A target is a port, plain or with TLS, or a unix socket.

In http mode the exchange is over as soon as either side is: the gateway ends a stream when it has
its answer (a Go gateway says so with FIN), and a target that has closed its connection answers no
more. In tcp mode a half-close is passed on, and the visit lasts until both sides have ended it; so
it does in http mode where the gateway asks for it, since the visitor wants to change the protocol.

We never look into the bytes. If the target cannot be reached, in http mode, the gateway hears why,
and answers 502; for a gateway that cannot hear it (common/refusals.py) we say that ourselves. What
the operator has to change stands in our log.
"""

import contextlib
import logging
import socket
import ssl
import struct
import threading
from time import monotonic
from typing import NamedTuple

from gotunnel import (
    REFUSED,
    RESET_JOIN,
    Deadline,
    NoThread,
    ProtocolError,
    pump,
    read_data_header,
    relay,
    spawn,
)

from .common import proxy_protocol
from .common.duplex import Duplex
from .common.hostnames import normal_hostname
from .common.refusals import MISCONFIGURED, TIMED_OUT, UNREACHABLE, UNTRUSTED
from .connect import addresses_of, connect

log = logging.getLogger("gotunnel.target")

DATA_HEADER_TIMEOUT = 10  # seconds; it leaves the gateway together with the SYN
DIAL_TIMEOUT = 10  # seconds until a target that does not answer counts as down; with its TLS

# Seconds for what was read of an answer to reach a gateway that has ended its side of the stream.
ANSWER_TIMEOUT = 30

# Seconds between two looks at whether a visit is idle: the look at one that has ended is forgotten
# by then, however long its timeout is.
LONGEST_LOOK = 60

PAGE = "<!doctype html><title>502</title><h1>502 Bad Gateway</h1><p>{}</p>\n"

# What to do about a certificate, by OpenSSL's number of what is wrong with it (x509_vfy.h).
ADVICE = {
    9: "set this machine's clock",  # not yet valid
    10: "renew it",  # has expired
    62: "write a host in target that the certificate names",
    64: "write a host in target that the certificate names",  # an IP address
}
OTHER_ADVICE = "name its CA in target_ca_file"


class Unserved(Exception):
    """There is no connection to a target; the text is for the log, ``refusal`` for the visitor."""

    def __init__(self, refusal, text):
        super().__init__(text)
        self.refusal = refusal


class Route(NamedTuple):
    """Where the visits of a hostname go.

    ``tunnel`` is the configuration's. ``context`` says how to check the target's certificate, None
    if it speaks no TLS. ``problem`` says why the gateway cannot serve it as the operator wants, ""
    if it can; visits are turned away. ``awaits_port``: it can as soon as its public port is open.
    ``refusals``: the gateway makes the page of an http visit that is turned away.
    """

    tunnel: object
    context: ssl.SSLContext | None = None
    problem: str = ""
    awaits_port: bool = False
    refusals: bool = False


class Targets:
    """The connections to targets that are open now, so that an agent that stops can end them."""

    def __init__(self):
        self._open = set()
        self._over = False  # reset() was called
        self._lock = threading.Lock()  # guards both

    @contextlib.contextmanager
    def hold(self, target):
        """Have a target, a Duplex, among them for the length of a block, and close it."""
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

    def reset(self):
        """Break all of them, and those that come."""
        with self._lock:
            self._over = True
            for target in self._open:
                target.reset()


def serve(stream, find_route, targets):
    """Serve one data stream to its end. Raises nothing: what goes wrong is logged.

    ``find_route(hostname)`` gives the Route of a hostname, or None; ``targets`` are the agent's.
    """
    try:
        name, ends, relayed = read_data_header(
            lambda count: stream.read_exactly(count, DATA_HEADER_TIMEOUT)
        )
    except (OSError, ProtocolError) as error:
        # A visitor that leaves at once is no news.
        level = logging.DEBUG if isinstance(error, ConnectionError) else logging.WARNING
        log.log(level, "stream %d dropped: %s", stream.id, error)
        stream.reset()
        return
    route = find_route(hostname_of(name))
    if route is None:
        log.warning("stream %d dropped: no tunnel for %.253r", stream.id, name)
        stream.reset(code=REFUSED)
        return
    tunnel = route.tunnel
    if route.problem:  # which the log has said when the gateway did
        refuse(stream, route, MISCONFIGURED)
        return
    try:
        target = dial(tunnel.target, route.context, introduction(tunnel.proxy_protocol, ends))
    except Unserved as error:
        log.warning("%s: target %s: %s", tunnel.hostname, tunnel.target, error)
        refuse(stream, route, error.refusal)
        return
    log.debug("%s: stream %d to %s", tunnel.hostname, stream.id, tunnel.target)
    target.stall_timeout = stream.stall_timeout
    target.cut_unless_finished()
    with targets.hold(target):
        try:
            if tunnel.mode == "http" and not relayed:
                exchange(stream, target)
            elif tunnel.idle_timeout is None:
                relay(stream, target)
            else:
                relay_watched(stream, target, tunnel)
        except NoThread as error:
            log.warning("%s: %s; the visit is reset", tunnel.hostname, error)
            stream.reset()
        finally:
            stream.close()


def hostname_of(name: str) -> str:
    """The hostname in a data header, where a Go gateway writes the visitor's Host: any case, and
    a port behind it."""
    host, colon, port = name.rpartition(":")
    return normal_hostname(host if colon and port.isdigit() else name)


def introduction(version, ends) -> bytes:
    """What a target hears first: its visitor's address, by the PROXY protocol if there is a
    ``version`` of it. Before TLS, as its specification says."""
    if not version:
        return b""
    if ends is None:
        return proxy_protocol.encode_unknown(version)
    return proxy_protocol.encode(version, ends.visitor, ends.door)


def dial(target, context, first=b""):
    """Connect to a target of the configuration, and send it the ``first`` bytes; with TLS after
    them if there is a ``context``.

    Returns a Duplex. Raises Unserved, DIAL_TIMEOUT after the name was resolved at the latest.
    """
    try:
        if target.path:
            return _introduce(Duplex(_connect_unix(target.path)), first)
        addresses = addresses_of(target.host, target.port)
        deadline = Deadline(DIAL_TIMEOUT)
        duplex = _introduce(Duplex(connect(addresses, deadline)), first)
        if context is not None:
            _start_tls(duplex, context, target.host, deadline)
        return duplex
    except TimeoutError:
        raise Unserved(TIMED_OUT, f"no answer in {DIAL_TIMEOUT} s") from None
    except ssl.SSLCertVerificationError as error:
        advice = ADVICE.get(error.verify_code, OTHER_ADVICE)
        problem = error.verify_message.rstrip(".")
        text = f"its certificate is not to be trusted ({problem}); {advice}"
        raise Unserved(UNTRUSTED, text) from None
    except ssl.SSLError as error:
        text = f"the TLS handshake failed ({error.reason or error}); is it a port with TLS?"
        raise Unserved(UNREACHABLE, text) from None
    except OSError as error:
        raise Unserved(UNREACHABLE, error.strerror or str(error)) from None


def _introduce(duplex, first):
    try:
        duplex.send(first)  # some bytes, for which a new connection always has room
        return duplex
    except OSError:
        duplex.close()
        raise


def _connect_unix(path):
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        # Not settimeout(): a socket that does not block is refused if the target's backlog is full.
        timeval = struct.pack("ll", DIAL_TIMEOUT, 0)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, timeval)
        sock.connect(path)
        return sock
    except BlockingIOError:
        sock.close()
        raise TimeoutError("the backlog is full") from None
    except BaseException:
        sock.close()
        raise


def _start_tls(duplex, context, host, deadline):
    try:
        duplex.start_tls(context, server_side=False, server_hostname=normal_hostname(host))
        duplex.handshake_within(deadline.left())
    except BaseException:
        duplex.close()
        raise


def exchange(stream, target):
    """Copy both ways until either side has ended."""
    stream.on_death(target.stop_reading)  # what has come still goes to the target, by _ask()
    asked = threading.Event()
    answer = spawn(f"{threading.current_thread().name} answer", _answer, stream, target, asked)
    if _ask(stream, target):
        target.stop()  # the gateway has what it wants: free the target, and the thread that reads
    else:
        target.cut()
    asked.set()
    answer.join(ANSWER_TIMEOUT)
    if answer.is_alive():  # it writes what the gateway does not take any more
        stream.reset()
        answer.join(RESET_JOIN)


def relay_watched(stream, target, tunnel):
    """relay(), which ends when nothing has passed for the tunnel's ``idle_timeout``."""
    watched = Watched(target, stream, tunnel)
    try:
        relay(stream, watched)
    finally:
        watched.end()


class Watched:
    """A target as an end of a relay that is broken when nothing has passed it for a while."""

    def __init__(self, duplex, stream, tunnel):
        self.finish, self.reset = duplex.finish, duplex.reset
        self.cut, self.stop_reading = duplex.cut, duplex.stop_reading
        self._over = threading.Event()
        self.end = self._over.set  # to be called when the relay has ended
        self._passing_on = set()  # the directions in which a byte is on its way, perhaps slowly
        self._duplex = duplex
        self._stream = stream
        self._tunnel = tunnel
        self._moved_at = monotonic()
        self._lock = threading.Lock()  # guards _passing_on and _moved_at
        self._look_later()

    def read(self):
        self._note("answer", passing_on=False)
        data = self._duplex.read()
        self._note("answer", passing_on=bool(data))
        return data

    def write(self, data):
        self._note("question", passing_on=True)
        self._duplex.write(data)
        self._note("question", passing_on=False)

    def _note(self, direction, *, passing_on):
        with self._lock:
            self._moved_at = monotonic()
            (self._passing_on.add if passing_on else self._passing_on.discard)(direction)

    def _look_later(self):
        with self._lock:
            if self._passing_on:
                self._moved_at = monotonic()
            left = self._moved_at + self._tunnel.idle_timeout - monotonic()
        if left > 0:
            self._stream.call_later(min(left, LONGEST_LOOK), self._look)
        else:
            log.info("%s: a visit ends, idle for %g s",
                     self._tunnel.hostname, self._tunnel.idle_timeout)  # fmt: skip
            self._stream.reset("the visit was idle")

    def _look(self):
        """Demultiplexer: waits for nothing."""
        if not self._over.is_set():
            self._look_later()


def _ask(stream, target):
    """Pass requests on until the stream ends; whether it has ended well. A target that takes no
    more of one may have answered it already ("too large"), so what is left is dropped, and the
    answer is not."""
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


def _answer(stream, target, asked):
    pump(target, stream)
    stream.close()
    if not asked.wait(ANSWER_TIMEOUT):  # the target does not take what nobody needs any more
        target.reset()


def refuse(stream, route, refusal):
    """Say that the visit cannot be served, and why: a Refusal."""
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
    except OSError:  # the gateway does not want it any more; a part must not look whole
        stream.reset()
    stream.close()
