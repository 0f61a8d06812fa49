"""The two ends of a session that `bench.py --row yamux` measures, each a process of its own.

    bench_yamux.py gateway FIGURE FOLDER SECONDS          prints its port, then JSON
    bench_yamux.py agent   FIGURE FOLDER SECONDS PORT     ends when the gateway end does

They are joined as a gateway and its agent are: TLS with a certificate of the local CA (in FOLDER),
the agent dials, is yamux's client and opens one stream, the gateway opens all others; each stays
on the CPU that such a process takes. The gateway end measures. What it wants of a stream stands in
the stream's first bytes, and the agent end does it: echo, send, count, or tell how large its
process is.

bench.py starts them with the repository on PYTHONPATH.
"""

import argparse
import contextlib
import json
import logging
import os
import socket
import statistics
import struct
import sys
import threading
from pathlib import Path
from time import monotonic, perf_counter

from gotunnel import (
    MAX_STREAMS,
    READ_SIZE,
    START_WINDOW,
    Session,
    SessionClosed,
    StreamReset,
    spawn,
)
from gotunnel_agent.common.duplex import Duplex
from gotunnel_agent.common.process import Workers, set_up_process, stay_on_one_cpu
from gotunnel_agent.trust import tls_context
from gotunnel_server.certs.contexts import Certificates
from gotunnel_server.certs.local_ca import Authority

HOST = "127.0.0.1"
TIMEOUT = 30  # seconds for any one wait: only an end that failed keeps the other one so long
BACKLOG = 128  # connections that may wait to be accepted

HEAD = struct.Struct("!cI")  # what a stream is for, and bytes of a write where that matters
ECHO, SEND, COUNT, TELL = b"e", b"s", b"c", b"t"
TOTAL = struct.Struct("!Q")  # what COUNT answers: bytes that came

PIECE = 64 * 1024  # bytes of a write, where there are many
SMALL_PIECES = (4096, 256)
MESSAGE = bytes(64)  # of an echo
BULK_STREAMS = 4  # beside the echo

FULL = 5  # seconds a figure, for which the two numbers are meant; fewer with less time
IDLE_SESSIONS = 500
SHORT_STREAMS = 10_000
EARLY = 10  # the first tenth of the short streams fills what may be filled: pools, caches


def count_for(full, seconds):
    """How many of ``full`` there are, if a figure takes ``seconds``."""
    return max(EARLY, round(full * min(1, seconds / FULL)))


def size_of_process():
    """What this process holds: threads, descriptors, resident kB."""
    with open("/proc/self/statm") as file:
        pages = int(file.read().split()[1])
    return dict(
        threads=threading.active_count(),
        descriptors=len(os.listdir("/proc/self/fd")),
        kb=pages * os.sysconf("SC_PAGE_SIZE") / 1000,
    )


# The gateway end ---------------------------------------------------------------------------------


class Gateway:
    """Listens; each figure_ method takes the connections that it needs, and measures."""

    def __init__(self, folder, seconds):
        self._seconds = seconds
        certificates = Certificates(None, Authority(folder))
        certificates.ensure(HOST)
        self._context = certificates.front(HOST)
        self._listening = socket.create_server((HOST, 0), backlog=BACKLOG)
        self._listening.settimeout(TIMEOUT)
        self.port = self._listening.getsockname()[1]

    def close(self):
        self._listening.close()

    def _accept(self):
        sock, _ = self._listening.accept()
        duplex = Duplex(sock)
        duplex.start_tls(self._context, server_side=True)
        duplex.handshake_within(TIMEOUT)
        session = start(duplex, client=False)
        session.accept(TIMEOUT)
        return session

    @contextlib.contextmanager
    def _session(self):
        session = self._accept()
        try:
            yield session
        finally:
            session.close()
            session.join()

    # How fast

    def figure_tls(self):
        """MB/s of one TLS socket, without anything of ours."""
        sock, _ = self._listening.accept()
        with self._context.wrap_socket(sock, server_side=True) as tls:
            buffer, count, began = bytearray(PIECE), 0, monotonic()
            while (took := monotonic() - began) < self._seconds:
                count += tls.recv_into(buffer)
        return dict(rate=count / took / 1e6)

    def figure_download(self):
        """MB/s of one stream from its opening on, and the window that it has in the end."""
        with self._session() as session:
            return self._download(session, PIECE)

    def figure_small(self):
        """The same for small writes: MB/s by their size."""
        with self._session() as session:
            return {size: self._download(session, size)["rate"] for size in SMALL_PIECES}

    def _download(self, session, size):
        count, began = 0, monotonic()
        stream = session.open(HEAD.pack(SEND, size))
        while (took := monotonic() - began) < self._seconds:
            count += len(stream.read(READ_SIZE, TIMEOUT))
        window = stream.window
        stream.reset()
        return dict(rate=count / took / 1e6, window=window)

    def figure_upload(self):
        """MB/s of one stream the other way, until all has been counted there."""
        piece = bytes(PIECE)
        with self._session() as session:
            began = monotonic()
            stream = session.open(HEAD.pack(COUNT, 0))
            while monotonic() - began < self._seconds:
                stream.write(piece, TIMEOUT)
            stream.finish()
            (count,) = TOTAL.unpack(stream.read_exactly(TOTAL.size, TIMEOUT))
            took = monotonic() - began
            stream.close()
        return dict(rate=count / took / 1e6)

    # How soon

    def figure_echo(self):
        """Median microseconds of an echo on an open stream, and on a stream of its own."""
        with self._session() as session:
            echo = self._echo(session)
            alone = self._time(lambda: self._short_stream(session))
        return dict(echo=statistics.median(echo), alone=statistics.median(alone))

    def figure_here(self):
        """The same with both ends in this process and without TLS, as the yardstick in Go."""
        sock = socket.create_connection((HOST, self.port), TIMEOUT)
        session = start(Duplex(self._listening.accept()[0]), client=False)
        agent = start(Duplex(sock), client=True)
        serving = spawn("agent", serve_session, agent, serve_echo)
        try:
            echo = self._echo(session, b"")
            alone = self._time(lambda: self._short_stream(session, b""))
        finally:
            session.close()
            serving.join()
        return dict(echo=statistics.median(echo), alone=statistics.median(alone))

    def figure_beside(self):
        """Microseconds of an echo beside streams of bulk, median and 99th percentile; their MB/s
        together."""
        with self._session() as session:
            bulk = [session.open(HEAD.pack(SEND, PIECE)) for _ in range(BULK_STREAMS)]
            counts = [0] * BULK_STREAMS
            began = monotonic()
            readers = [spawn("bulk", drain, stream, counts, place)
                       for place, stream in enumerate(bulk)]  # fmt: skip
            echo = self._echo(session)
            rate = sum(counts) / (monotonic() - began) / 1e6
            for stream in bulk:
                stream.reset()
            for reader in readers:
                reader.join()
        late = sorted(echo)[int(len(echo) * 0.99)]
        return dict(echo=statistics.median(echo), late=late, rate=rate)

    def _echo(self, session, head=HEAD.pack(ECHO, 0)):
        stream = session.open(head)

        def exchange():
            stream.write(MESSAGE, TIMEOUT)
            stream.read_exactly(len(MESSAGE), TIMEOUT)

        took = self._time(exchange)
        stream.close()
        return took

    def _short_stream(self, session, head=HEAD.pack(ECHO, 0)):
        stream = session.open(head + MESSAGE, TIMEOUT)
        stream.read_exactly(len(MESSAGE), TIMEOUT)
        stream.close()

    def _time(self, function):
        """Microseconds of each call, as long as a figure takes."""
        took, end = [], monotonic() + self._seconds
        while monotonic() < end or not took:
            began = perf_counter()
            function()
            took.append((perf_counter() - began) * 1e6)
        return took

    # How large

    def figure_idle(self):
        """kB and threads of an idle session. The first one is not counted: it brings more."""
        count = count_for(IDLE_SESSIONS, self._seconds)
        sessions = [self._accept()]
        before = size_of_process()
        sessions += [self._accept() for _ in range(count)]
        after = size_of_process()
        for session in sessions:
            session.close()
        for session in sessions:
            session.join()
        grown = {name: (after[name] - before[name]) / count for name in before}
        return dict(grown, sessions=count)

    def figure_leak(self):
        """Both processes after a part of many short streams, and after all of them."""
        count = count_for(SHORT_STREAMS, self._seconds)
        sizes = []
        with self._session() as session:
            for streams in (count // EARLY, count - count // EARLY):
                for _ in range(streams):
                    self._short_stream(session)
                sizes.append(dict(gateway=size_of_process(), agent=self._ask_size(session)))
        early, late = sizes
        return dict(streams=count, early=early, late=late)

    def _ask_size(self, session):
        stream = session.open(HEAD.pack(TELL, 0))
        parts = []
        while data := stream.read(READ_SIZE, TIMEOUT):
            parts.append(data)
        stream.close()
        return json.loads(b"".join(parts))


def drain(stream, counts, place):
    """Read a stream until it is reset, and keep ``counts[place]``."""
    with contextlib.suppress(StreamReset):
        while data := stream.read():
            counts[place] += len(data)


def run_gateway(options):
    stay_on_one_cpu(min)
    gateway = Gateway(options.folder, options.seconds)
    print(gateway.port, flush=True)
    try:
        measured = getattr(gateway, f"figure_{options.figure}")()
    finally:
        gateway.close()
    print(json.dumps(measured), flush=True)


# The agent end -----------------------------------------------------------------------------------


def run_agent(options):
    stay_on_one_cpu(max)
    context = tls_context(Authority(options.folder).ca_file, skip_verify=False)
    if options.figure == "tls":
        flood(context, options.port)
    elif options.figure == "idle":
        count = 1 + count_for(IDLE_SESSIONS, options.seconds)
        for session in [dial(context, options.port) for _ in range(count)]:
            session.join()
    elif options.figure != "here":
        serve_session(dial(context, options.port))


def dial(context, port):
    duplex = Duplex(socket.create_connection((HOST, port), TIMEOUT))
    duplex.start_tls(context, server_side=False, server_hostname=HOST)
    duplex.handshake_within(TIMEOUT)
    session = start(duplex, client=True)
    session.open()  # in place of the control stream
    return session


def start(duplex, *, client):
    session = Session(duplex, client=client, name="measured", window=START_WINDOW)
    session.start()
    return session


def flood(context, port):
    """Send over a TLS socket until the other end has had enough."""
    piece = bytes(PIECE)
    sock = socket.create_connection((HOST, port), TIMEOUT)
    with context.wrap_socket(sock, server_hostname=HOST) as tls, contextlib.suppress(OSError):
        while True:
            tls.sendall(piece)


def serve_session(session, serve=None):
    workers = Workers(MAX_STREAMS, "stream")
    with contextlib.suppress(SessionClosed):
        while True:
            workers.submit(serve or serve_stream, session.accept())
    workers.shutdown(TIMEOUT)
    session.join()


def serve_echo(stream):
    with contextlib.suppress(ConnectionError):
        echo(stream, 0)
        stream.close()


def serve_stream(stream):
    try:
        kind, size = HEAD.unpack(stream.read_exactly(HEAD.size))
        KINDS[kind](stream, size)
        stream.close()
    except ConnectionError:
        pass  # reset, or the session is over: the gateway end has had enough
    except Exception:
        logging.exception("stream %d ends by a defect", stream.id)
        stream.reset()


def echo(stream, _):
    while data := stream.read():
        stream.write(data)


def send(stream, size):
    piece = bytes(size)
    while True:
        stream.write(piece)


def count(stream, _):
    total = 0
    while data := stream.read():
        total += len(data)
    stream.write(TOTAL.pack(total))


def tell(stream, _):
    stream.write(json.dumps(size_of_process()).encode())


KINDS = {ECHO: echo, SEND: send, COUNT: count, TELL: tell}

ENDS = {"gateway": run_gateway, "agent": run_agent}


def main(arguments):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("end", choices=ENDS)
    figures = [name.partition("_")[2] for name in vars(Gateway) if name.startswith("figure_")]
    parser.add_argument("figure", choices=figures)
    parser.add_argument("folder", type=Path, help="where the local CA is, or will be")
    parser.add_argument("seconds", type=float, help="how long a figure takes")
    parser.add_argument("port", type=int, nargs="?", help="where the agent end connects")
    options = parser.parse_args(arguments)
    set_up_process("WARNING")
    ENDS[options.end](options)


if __name__ == "__main__":
    main(sys.argv[1:])
