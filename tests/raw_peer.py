"""Tools of the wire's tests: pairs of connections, a raw peer, two joined Muxes, leak checks, work
for streams.

The fixtures are imported by name where they are used. Nothing here knows more of yamux than a
header, so that a wrong rule in gotunnel.py is not repeated on the other side of a test.
"""

import contextlib
import functools
import gc
import hashlib
import os
import random
import socket
import ssl
import struct
import tempfile
import threading
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest
from support import running, wait_until

import gotunnel
from gotunnel import Bell, Mux, Session, SessionClosed
from gotunnel_agent.common.duplex import Duplex
from gotunnel_server.certs.local_ca import Authority

MIB = 1024 * 1024
PATIENCE = 10  # seconds until a test gives up on what takes milliseconds: a busy machine is slow
# Seconds. A thread of a loaded machine may not run for one or two, so this is long for any machine,
# and short beside the timeouts of gotunnel: tests/wire/conftest.py lengthens one for that.
SOON = 5
HEADER = struct.Struct("!BBHII")  # version, type, flags, stream id, length (yamux spec, "Framing")
BARRIER = 0xBA441E44  # the value of a ping that no test sends otherwise
NO_TABLES = (0, 0, 0, 0)  # tables() of a session that has no stream


def wait_for_waiter(bell):
    """Wait until a thread waits for a Bell or a Condition, so that what follows must wake it."""
    wait_until(lambda: bell.waiting if isinstance(bell, Bell) else bell._waiters)


def spawn(function, *arguments, **named) -> Future:
    """Call in a thread of its own; result(PATIENCE) returns or raises what the call did."""
    future = Future()

    def call():
        try:
            future.set_result(function(*arguments, **named))
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=call, name=f"test {function.__name__}", daemon=True).start()
    return future


# Nothing is left ---------------------------------------------------------------------------------


def open_files():
    """Descriptors of this process, where the system tells (Linux); else none."""
    folder = Path("/proc/self/fd")
    return set(os.listdir(folder)) if folder.exists() else set()


@contextlib.contextmanager
def nothing_left():
    """Assert that a block ends with the threads and descriptors that it began with."""
    threads, files = set(threading.enumerate()), len(open_files())
    yield
    for thread in set(threading.enumerate()) - threads:
        thread.join(PATIENCE)
        assert not thread.is_alive(), f"{thread.name} is left"
    if len(open_files()) > files:
        gc.collect()  # a future's traceback may hold a socket: that is the test's, and no leak
        assert len(open_files()) <= files, "a descriptor is left"


@pytest.fixture(autouse=True)
def leaves_nothing():
    with nothing_left():
        yield


def resident():
    """Bytes of memory that this process occupies. Skips the test where the system does not tell."""
    statm = Path("/proc/self/statm")
    if not statm.exists():
        pytest.skip("only Linux tells how much memory is in use")
    return int(statm.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


# Connections -------------------------------------------------------------------------------------

# "reversed": who accepted the connection comes first, so both ends play both parts.
TRANSPORTS = ["socketpair", "tcp", "tcp reversed", "tls", "tls reversed"]


def tcp_pair():
    """Two connected sockets of the loopback interface: who dialled, who accepted."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        dialled = socket.create_connection(listener.getsockname(), PATIENCE)
        accepted, _ = listener.accept()
    return dialled, accepted


@functools.cache
def tls_contexts():
    """One pair of contexts for all tests: a client that trusts it, a server for localhost."""
    with tempfile.TemporaryDirectory() as folder:
        authority = Authority(Path(folder))
        certificate, key = authority.issue("localhost")
        server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        server.load_cert_chain(certificate, key)
        return ssl.create_default_context(cafile=authority.ca_file), server


def start_tls(client, server):
    """Begin TLS on both; neither handshake has made a step yet."""
    client_context, server_context = tls_contexts()
    client.start_tls(client_context, server_side=False, server_hostname="localhost")
    server.start_tls(server_context, server_side=True)


def handshake_both(client, server):
    start_tls(client, server)
    done = spawn(server.handshake_within, PATIENCE)
    client.handshake_within(PATIENCE)
    done.result(PATIENCE)


@contextlib.contextmanager
def duplex_pair(transport):
    """Two Duplexes that are joined; the caller may close them, or leave that to us."""
    sockets = socket.socketpair() if transport == "socketpair" else tcp_pair()
    first, second = map(Duplex, sockets)
    if transport.startswith("tls"):
        handshake_both(first, second)
    pair = (second, first) if transport.endswith("reversed") else (first, second)
    try:
        yield pair
    finally:
        for duplex in pair:
            if duplex.fileno() >= 0:
                duplex.close()


@pytest.fixture(params=TRANSPORTS)
def duplexes(request):
    with duplex_pair(request.param) as pair:
        yield pair


def close_all(*sessions):
    """End sessions, and see that they have forgotten their streams."""
    for session in sessions:
        session.close()
    for session in sessions:
        session.join(PATIENCE)
        assert tables(session) == NO_TABLES


@contextlib.contextmanager
def sessions_over(left, right, **named):
    """A yamux client and a yamux server, both started; ``named`` goes to both Sessions."""
    client = Session(left, client=True, name="client", **named)
    server = Session(right, client=False, name="server", **named)
    client.start()
    server.start()
    try:
        yield client, server
    finally:
        close_all(client, server)


@contextlib.contextmanager
def session_pair(transport="socketpair", **named):
    """sessions_over() a transport."""
    with duplex_pair(transport) as pair, sessions_over(*pair, **named) as sessions:
        yield sessions


@pytest.fixture(params=TRANSPORTS)
def sessions(request):
    with session_pair(request.param) as pair:
        yield pair


def tables(session):
    """What a session remembers of streams: (streams, lingering, arrived, the Mux's flows)."""
    table = session._streams
    return (len(table.known), len(table.expiring), len(table.arrived), len(session._mux._flows))


@contextlib.contextmanager
def long_line(gopeer, folder, *arguments):
    """A connection that goes through gopeer's ``line``: two sockets, who dialled, who accepted."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        to = f"127.0.0.1:{listener.getsockname()[1]}"
        command = (str(gopeer), "line", "-listen", "127.0.0.1:0", "-to", to, *arguments)
        with running(*command, cwd=folder) as program:
            port = int(program.wait_for(r"^listening 127\.0\.0\.1:(\d+)$")[1])
            dialled = socket.create_connection(("127.0.0.1", port), PATIENCE)
            accepted, _ = listener.accept()
            with dialled, accepted:
                yield dialled, accepted


# Work for streams --------------------------------------------------------------------------------


def noise(size, seed=5):
    return random.Random(seed).randbytes(size)


def digest(data):
    return hashlib.sha256(data).hexdigest()


def stream_pair(opener, acceptor):
    """A stream of ``opener`` and its other end."""
    return opener.open(timeout=PATIENCE), acceptor.accept(PATIENCE)


def read_all(source):
    """Read to the end of a Stream or Duplex."""
    parts = []
    while data := source.read(timeout=PATIENCE):
        parts.append(data)
    return b"".join(parts)


def send_all(stream, data, piece=50_000):
    """Write in pieces, then half-close."""
    for at in range(0, len(data), piece):
        stream.write(data[at : at + piece], PATIENCE)
    stream.finish()


def send_over_and_over(stream, block, times):
    """Write a block so many times, then half-close: much payload for little memory."""
    for _ in range(times):
        stream.write(block, PATIENCE)
    stream.finish()


def read_over_and_over(stream, block, on_read=lambda count: None):
    """Read to the end, and return how many bytes that were; ``on_read`` is told so after each read.

    All of them must be those of the block, over and over.
    """
    endless, count = block * 2, 0
    while data := stream.read(timeout=PATIENCE):
        at = count % len(block)
        assert data == endless[at : at + len(data)], f"other bytes than were sent, behind {count}"
        count += len(data)
        on_read(count)
    return count


def echo(stream):
    """Send back what comes, then close. Ends quietly when the stream is cut."""
    with contextlib.suppress(ConnectionError):
        while data := stream.read():
            stream.write(data)
        stream.close()


@contextlib.contextmanager
def echoing(session, workers):
    """Echo each stream that the peer opens, ``workers`` of them at a time, until it ends."""
    with ThreadPoolExecutor(workers) as pool:

        def accept_all():
            with contextlib.suppress(SessionClosed):
                while True:
                    pool.submit(echo, session.accept())

        accepting = spawn(accept_all)
        try:
            yield
        finally:
            session.close()
            accepting.result(PATIENCE)


def ask(session, data):
    """Open a stream, send, and return what comes back to the end."""
    stream = session.open(timeout=PATIENCE)
    sending = spawn(send_all, stream, data)
    answer = read_all(stream)
    sending.result(PATIENCE)
    stream.close()
    return answer


# Frames by hand ----------------------------------------------------------------------------------


def frame(kind, flags, stream_id, length=None, payload=b"", *, version=0):
    """A frame's bytes; ``length`` is the payload's unless something else is to be said."""
    length = len(payload) if length is None else length
    return HEADER.pack(version, kind, flags, stream_id, length) + payload


def split_frames(data):
    """Cut bytes into [(type, flags, stream id, length, payload)]; they must be whole frames."""
    frames, at = [], 0
    while at < len(data):
        _, kind, flags, stream_id, length = HEADER.unpack_from(data, at)
        at += HEADER.size
        payload = data[at : at + length] if kind == gotunnel.DATA else b""
        assert kind != gotunnel.DATA or len(payload) == length, "half a frame"
        at += len(payload)
        frames.append((kind, flags, stream_id, length, bytes(payload)))
    return frames


class RawPeer:
    """A peer that writes frames by hand and reads them as they come. Blocking, with PATIENCE."""

    def __init__(self, sock):
        sock.settimeout(PATIENCE)
        self.socket = sock

    def send(self, *frames):
        """Send everything with one call."""
        self.socket.sendall(b"".join(frames))

    def _receive(self, count):
        data = b""
        while len(data) < count:
            piece = self.socket.recv(count - len(data))
            if not piece:
                return None
            data += piece
        return data

    def read(self):
        """The next frame as (type, flags, stream id, length, payload); None at the end."""
        header = self._receive(HEADER.size)
        if header is None:
            return None
        version, kind, flags, stream_id, length = HEADER.unpack(header)
        assert version == 0
        payload = self._receive(length) if kind == gotunnel.DATA else b""
        assert payload is not None, "the connection ended within a frame"
        return kind, flags, stream_id, length, payload

    def read_to_end(self):
        """All frames that still come."""
        frames = []
        while (got := self.read()) is not None:
            frames.append(got)
        return frames

    def barrier(self):
        """Have everything that we sent handled; return the frames that this caused.

        Two pings: the first pong overtakes what is queued with it, the second only itself.
        """
        frames = []
        for value in (BARRIER, BARRIER + 1):
            self.send(frame(gotunnel.PING, gotunnel.SYN, 0, value))
            frames += self.read_until(gotunnel.PING, gotunnel.ACK, 0, value)
        return frames

    def read_until(self, *header):
        """Frames before the one that has this header; that one is taken, too."""
        frames = []
        while (got := self.read())[:4] != header:
            frames.append(got)
        return frames

    def read_payload(self, count):
        """So much payload out of DATA frames; nothing else may come."""
        data = b""
        while len(data) < count:
            kind, _, _, _, payload = self.read()
            assert kind == gotunnel.DATA
            data += payload
        return data

    def close(self):
        self.socket.close()


@contextlib.contextmanager
def raw_pair(*, client=False, tcp=True, sockets=None, **named):
    """A RawPeer and a started Session; ``client`` is the Session's role. ``sockets`` are the
    Session's end of a connection and the peer's, if there is one already."""
    ours, theirs = sockets or (tcp_pair() if tcp else socket.socketpair())
    session = Session(Duplex(ours), client=client, name="tested", **named)
    session.start()
    peer = RawPeer(theirs)
    try:
        yield peer, session
    finally:
        peer.close()
        close_all(session)


def accepted(peer, session, stream_id=1):
    """A stream that the raw peer has opened and the session has accepted."""
    peer.send(frame(gotunnel.WINDOW_UPDATE, gotunnel.SYN, stream_id))
    stream = session.accept(PATIENCE)
    assert peer.read() == (gotunnel.WINDOW_UPDATE, gotunnel.ACK, stream_id, 0, b"")
    return stream


def narrow(peer, session):
    """Leave the connection so little room that what is written waits on our side."""
    peer.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 64 * 1024)
    session._duplex._socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 64 * 1024)


# Two Muxes ---------------------------------------------------------------------------------------


class Wire:
    """A client Mux and a server Mux, and the bytes on their way between them."""

    def __init__(self, rng, **named):
        self._rng = rng
        self.ends = (Mux(client=True, **named), Mux(client=False, **named))
        self._on_way = (bytearray(), bytearray())  # to the client, to the server

    def carry(self, to, now=0.0):
        """Let one end send, and give a random piece of what is on its way to the other end.

        Returns the events.
        """
        data, _ = self.ends[1 - to].pull(self._rng.choice((12, 100, 20_000, 200_000)))
        way = self._on_way[to]
        way += data
        count = self._rng.randint(0, len(way))
        piece = bytes(way[:count])
        del way[:count]
        return self.ends[to].receive(piece, now)

    def settle(self, now=0.0):
        """Carry until nothing is on its way; returns the events of (client, server)."""
        events = ([], [])
        while True:
            for to in (0, 1):
                self._on_way[to].extend(self.ends[1 - to].pull(1 << 30)[0])
            if not any(self._on_way):
                return events
            for to in (0, 1):
                piece = bytes(self._on_way[to])
                self._on_way[to].clear()
                events[to].extend(self.ends[to].receive(piece, now))


def check_tables(mux):
    """What must be true of a Mux's tables at any time."""
    flows = mux._flows
    theirs = [number for number in flows if number % 2 == mux._parity]
    assert mux._inbound == len(theirs)
    assert mux._unaccepted <= set(theirs)
    assert set(mux._unanswered) <= set(flows) - set(theirs)
    assert set(mux._updates) <= set(flows)
    for flow in flows.values():
        assert flow.alive
        assert flow.queued == sum(map(len, flow.queue))
        assert 0 <= flow.may_send <= gotunnel.MAX_UINT32 and flow.may_receive >= 0
        assert flow.in_rotation == (flow in mux._rotation)


# A real Go yamux ---------------------------------------------------------------------------------


@contextlib.contextmanager
def beside_go(gopeer, folder, command, *arguments, go_role, **named):
    """Run a bare Go yamux end; yields it and a started Session of the other role."""
    command = [str(gopeer), command, "-listen", "127.0.0.1:0", "-role", go_role, *arguments]
    with running(*command, cwd=folder) as program:
        port = int(program.wait_for(r"^listening 127\.0\.0\.1:(\d+)$")[1])
        sock = socket.create_connection(("127.0.0.1", port), PATIENCE)
        session = Session(Duplex(sock), client=go_role == "server", name="beside Go", **named)
        session.start()
        try:
            yield program, session
        finally:
            close_all(session)
