"""One data stream at the agent: read whom it is for, dial that target, copy bytes.

In http mode the exchange is over as soon as either side is: the gateway ends a stream when it has
its answer (a Go gateway says so with FIN), and a target that has closed its connection answers no
more. In tcp mode a half-close is passed on, and the visit lasts until both sides have ended it.

We never look into the bytes. The one thing that we say ourselves is a 502, in http mode, when the
target cannot be reached: the visitor then learns more than that the connection was closed.
"""

import contextlib
import logging
import socket
import threading

from gotunnel import (
    Duplex,
    NoThread,
    ProtocolError,
    normal_hostname,
    pump,
    read_data_header,
    relay,
    spawn,
)

log = logging.getLogger("gotunnel.target")

DATA_HEADER_TIMEOUT = 10  # seconds; it leaves the gateway together with the SYN
DIAL_TIMEOUT = 10  # seconds until a target that does not answer counts as down

UNREACHABLE = "<!doctype html><title>502</title><h1>502 Bad Gateway</h1><p>{}</p>\n"


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


def serve(stream, find_tunnel, targets):
    """Serve one data stream to its end. Raises nothing: what goes wrong is logged.

    ``find_tunnel(hostname)`` gives the tunnel that the configuration has for a hostname, or None;
    ``targets`` are the agent's.
    """
    try:
        name = read_data_header(lambda count: stream.read_exactly(count, DATA_HEADER_TIMEOUT))
    except (OSError, ProtocolError) as error:
        log.warning("stream %d dropped: %s", stream.id, error)
        stream.reset()
        return
    tunnel = find_tunnel(hostname_of(name))
    if tunnel is None:
        log.warning("stream %d dropped: no tunnel for %.253r", stream.id, name)
        stream.reset()
        return
    try:
        address = (tunnel.target_host, tunnel.target_port)
        target = Duplex(socket.create_connection(address, DIAL_TIMEOUT))
    except OSError as error:
        log.warning("%s: target %s: %s", tunnel.hostname, tunnel.target, error.strerror or error)
        refuse(stream, tunnel)
        return
    log.debug("%s: stream %d to %s", tunnel.hostname, stream.id, tunnel.target)
    with targets.hold(target):
        try:
            (exchange if tunnel.mode == "http" else relay)(stream, target)
        except NoThread as error:
            log.error("%s: %s", tunnel.hostname, error)
            stream.reset()
        finally:
            stream.close()


def hostname_of(name: str) -> str:
    """The hostname in a data header, where a Go gateway writes the visitor's Host: any case, and
    a port behind it."""
    host, colon, port = name.rpartition(":")
    return normal_hostname(host if colon and port.isdigit() else name)


def exchange(stream, target):
    """Copy both ways until either side has ended."""
    stream.on_death(target.reset)  # both threads may wait for the target when that happens
    answer = spawn(f"{threading.current_thread().name} answer", _answer, stream, target)
    _ask(stream, target)
    target.stop()  # the gateway has what it wants: free the target, and the thread that reads it
    answer.join()


def _ask(stream, target):
    """Pass requests on until the stream ends. A target that takes no more of one may have
    answered it already ("too large"), so what is left is dropped, and the answer is not."""
    with contextlib.suppress(OSError):
        while data := stream.read():
            try:
                target.write(data)
            except OSError:
                break
        while stream.read():
            pass


def _answer(stream, target):
    pump(target, stream)
    stream.close()


def refuse(stream, tunnel):
    """Say that the target cannot be reached."""
    if tunnel.mode != "http":
        stream.reset()
        return
    page = UNREACHABLE.format("The service behind this address does not answer.").encode()
    head = (
        "HTTP/1.1 502 Bad Gateway\r\n"
        "Content-Type: text/html; charset=utf-8\r\n"
        f"Content-Length: {len(page)}\r\n"
        "X-Gotunnel-Error: target-unreachable\r\n"
        "Connection: close\r\n\r\n"
    )
    with contextlib.suppress(OSError):  # the gateway does not want it any more
        stream.write(head.encode() + page, timeout=DIAL_TIMEOUT)
    stream.close()
