"""A connection, plain or TLS, that one thread may read while another one writes.

Sessions, visitors and targets all use it. OpenSSL forbids two threads in one TLS object at once,
so an ssl.SSLSocket cannot be read and written at the same time. A Duplex can, and nothing else in
gotunnel shares a TLS connection between threads.
"""

from __future__ import annotations

import contextlib
import select
import socket
import ssl
import struct
import sys
import threading
from collections import deque
from collections.abc import Callable
from time import monotonic, sleep
from typing import Any, NoReturn

from gotunnel import BUFFERS, READ_SIZE, BytesLike, Deadline

if sys.platform.startswith("linux"):
    import fcntl
    import termios

# Bytes of a read, at most. A target on the same machine has more ready than READ_SIZE, which is
# what a read brings with TLS: there each piece is decrypted. It is a number of whole frames.
PLAIN_READ = 4 * READ_SIZE
STALL_TIMEOUT = 300  # seconds; writing fails if the peer takes nothing of our bytes for so long
LEAST_STALL, MOST_STALL = 1, 86_400  # an operator's bounds; any network may fail for 1 s
STALL_LOOK = 1.0  # seconds between two checks of how much the peer has taken
TLS_RECORD = 16 * 1024  # payload bytes in a TLS record, at most (RFC 8446 §5.1)
TLS_PIECE = 64 * 1024  # most encrypted bytes written into TLS's input buffer at once
# Encrypted bytes in a row that bring no payload; more are an attack. OpenSSL accepts 100 KB of
# certificates in a handshake. Later a peer sends key updates and tickets, some hundred bytes a day.
NO_PAYLOAD = 128 * 1024
ANSWERS = 64 * 1024  # unsent bytes of TLS itself (key updates); above it the peer does not read
LINGER_PARTS = "hh" if sys.platform == "win32" else "ii"  # of C's struct linger
NO_LINGER = struct.pack(LINGER_PARTS, 1, 0)  # SO_LINGER: close() sends RST, drops unsent bytes
LINGER = struct.pack(LINGER_PARTS, 0, 0)  # SO_LINGER's default: close() sends all, and FIN
CUT_TIMEOUT = 30  # seconds; cut() sends RST if the peer's TCP takes nothing for so long
CUT_LOOKS = 0.001, 0.05  # seconds between two checks in cut(): the first pause and the longest
TCP_CLOSE = 7  # tcpi_state in Linux's TCP_INFO: the connection is dead

# TCP keepalive: the kernel probes a peer that is silent for a minute, then every 15 seconds. After
# four probes without an answer the connection is dead. Without it, a relay whose peer was unplugged
# would stay for ever.
KEEPALIVE = [
    (getattr(socket, name), value)
    for name, value in (("TCP_KEEPIDLE", 60), ("TCP_KEEPINTVL", 15), ("TCP_KEEPCNT", 4))
    if hasattr(socket, name)
]

# Linux gives an accepted socket the options of the listening one: only that one needs tune().
OPTIONS_ARE_INHERITED = sys.platform == "linux"

# Linux's option for limit_unsent(). Python has its name only since 3.12.
MORE = getattr(socket, "MSG_MORE", 0)  # send(): more bytes follow at once. Linux only
NOTSENT_LOWAT = getattr(socket, "TCP_NOTSENT_LOWAT", 25 if sys.platform == "linux" else None)

# Unsent bytes that the kernel takes for a connection. By itself it takes megabytes (tcp_wmem). For
# hundreds of slow readers that exhausts the memory which it has for TCP (tcp_mem), and then it
# drops packets of all connections.
MOST_UNSENT = 128 * 1024

Spend = Callable[[float, int], None]  # see Duplex.write()
Observer = Callable[[bool, BytesLike], None]  # see Duplex.observed()


def tune(sock: socket.socket) -> None:
    """Set the options that each socket of ours has."""
    with contextlib.suppress(OSError):  # AF_UNIX has no such options, and needs none
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        # Keep TCP's urgent byte in the stream, or it would be lost (FTP's ABOR has one).
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_OOBINLINE, 1)
        for option, value in KEEPALIVE:
            sock.setsockopt(socket.IPPROTO_TCP, option, value)
        if NOTSENT_LOWAT is not None:  # see limit_unsent()
            sock.setsockopt(socket.IPPROTO_TCP, NOTSENT_LOWAT, MOST_UNSENT)


def _waiting(sock: socket.socket, *, writable: bool) -> Callable[[float | None], object]:
    """A function that waits until a socket is readable, or writable: at most so many milliseconds
    as it is told, None for ever; false afterwards. It needs no file descriptor, as epoll would."""
    if not hasattr(select, "poll"):  # Windows
        read, write = ([], [sock]) if writable else ([sock], [])
        return lambda wait: any(select.select(read, write, [], wait and wait / 1000))
    poll = select.poll()
    poll.register(sock, select.POLLOUT if writable else select.POLLIN)
    return poll.poll


class Duplex:
    """A connection, plain or TLS, that one thread may read while another one writes.

    TLS never touches the socket here. It encrypts and decrypts between two memory buffers
    (ssl.MemoryBIO), under a lock that no thread holds while it waits. The socket is read and
    written without that lock, since a socket permits two threads.

    The socket is non-blocking. receive(), send() and flush() do what is possible at once; read()
    and write() wait. One reader and one writer at a time; any thread may call stop() and reset().
    All methods raise OSError (ssl.SSLError is one) when the connection is broken.
    """

    def __init__(self, sock: socket.socket, tuned: bool = False):
        """``tuned``: tune() was called for the socket, or it has inherited that."""
        sock.setblocking(False)
        if not tuned:
            tune(sock)
        self._socket = sock
        self.fileno = sock.fileno  # fileno()
        self._unread = b""  # given back by unread(), or read before TLS began
        self._at_end = False  # the reader has seen the peer's half-close
        self._tls_at_end = False  # TLS has read it; the reader may have payload before it to read
        self._tls_holds = False  # TLS may have payload although the socket has none. Reader only
        self._emptied = False  # the last receive() took all there was: wait first. Reader only
        self._tls: ssl.SSLObject | None = None  # between the two buffers
        self._records: Any = None  # the same, for the calls that are made often
        self._tls_in, self._tls_out = ssl.MemoryBIO(), ssl.MemoryBIO()
        self.refused = b""  # the peer's bytes at which the handshake failed, the latest read alone
        self._no_payload = 0  # encrypted bytes since the last payload (NO_PAYLOAD). Reader only
        self._early: deque[bytes] = deque()  # payload that we took out of TLS before there was room
        self._tls_lock = threading.Lock()  # guards the TLS object, its buffers and _early
        # Held to send, so that bytes leave in order. Guards all below, except _finished.
        self._send_lock = threading.Lock()
        self._unsent: BytesLike = b""  # bytes that the kernel has not taken yet
        self._answers = 0  # bytes of TLS's own answers since _unsent was last empty (ANSWERS)
        self._finishing = False  # half-close the socket once _unsent is empty
        self._finished = False  # finish() was called
        self._broken = False  # reset() was called
        self._lost = False  # a send has failed, so an EOF that is read afterwards is not a real one
        self._lingers = True  # close() sends unsent bytes and FIN, not RST
        self._writer_waits = False
        self._wait_to_read: Callable[[float | None], object] | None = None  # made when first needed
        self._wait_to_write: Callable[[float | None], object] | None = None
        self.stall_timeout: float = STALL_TIMEOUT  # the default timeout of write() and finish()

    @property
    def plain(self) -> bool:
        """Whether TLS was not started."""
        return self._tls is None

    @property
    def pending(self) -> bool:
        """Whether receive() may have something although the socket is not readable."""
        return bool(self._unread or self._at_end or self._tls_at_end or self._tls_holds)

    def died(self) -> bool:
        """Whether the connection is broken: by reset(), by the peer, or because TCP keepalive got
        no answer. Works while no thread reads or writes. If it is, later reads raise OSError."""
        with contextlib.suppress(OSError):
            if not self._broken and self._socket.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR):
                self.reset()  # SO_ERROR is cleared by reading it, and recv() would return an EOF
        return self._broken

    @property
    def local_address(self) -> tuple[str, int]:
        """Our own (IP address, port). For TCP."""
        address, port = self._socket.getsockname()[:2]
        return address, port

    def limit_unsent(self, count: int) -> None:
        """Let the kernel buffer only about ``count`` unsent bytes, not MOST_UNSENT, so that urgent
        frames do not wait behind them. For TCP, where the system can (TCP_NOTSENT_LOWAT)."""
        if NOTSENT_LOWAT is not None:
            with contextlib.suppress(OSError):  # AF_UNIX
                self._socket.setsockopt(socket.IPPROTO_TCP, NOTSENT_LOWAT, count)

    # TLS

    def start_tls(
        self,
        context: ssl.SSLContext,
        *,
        server_side: bool,
        server_hostname: str | bytes | None = None,
    ) -> None:
        """Begin TLS, to be followed by handshake(). Bytes of unread() are its first input."""
        self._tls_in.write(self._unread)
        self._tls_holds, self._unread = True, b""  # TLS has that to read, or a ClientHello to send
        self._tls = context.wrap_bio(self._tls_in, self._tls_out, server_side, server_hostname)
        # SSLObject only passes these calls on to a private object: spare each of them a call.
        self._records = getattr(self._tls, "_sslobj", self._tls)

    @property
    def protocol(self) -> str | None:
        """The protocol that the handshake has chosen by ALPN, None without one."""
        return None if self._records is None else self._records.selected_alpn_protocol()

    def handshake(self, hold_ticket: bool = False) -> bool:
        """Go on with the handshake, with at most one read; False if it needs more from the peer,
        which has got what TLS had to say.

        With ``hold_ticket`` a session ticket may stay here until the next send() or flush(), so
        that it leaves together with the answer to the peer's first bytes.

        Raises ssl.SSLError if it fails; the TLS alert has been sent then.
        """
        if self._records is None:
            raise ValueError("handshake() before start_tls()")
        if self._tls_holds:
            return self._shake_hands(hold_ticket)
        data = self._receive_plain(READ_SIZE)
        if data is None:
            return False
        if self._broken:  # reset() in another thread also makes recv() return EOF
            self._check()
        self._count_silent(len(data))
        with self._tls_lock:
            if data:
                self._tls_in.write(data)
            else:
                self._tls_in.write_eof()
        try:
            return self._shake_hands(hold_ticket)
        except ssl.SSLError:
            self.refused = data
            raise

    def _shake_hands(self, hold_ticket: bool) -> bool:
        done, tls = False, self._records
        try:
            with self._tls_lock:
                tls.do_handshake()
                self._tls_holds = bool(self._tls_in.pending or tls.pending())
            done = True
        except ssl.SSLWantReadError:
            self._tls_holds = False  # or a connection that waits for the peer would seem pending
        finally:
            # Before TLS 1.3 the peer waits for what comes with the ticket.
            if done and hold_ticket and tls.version() == "TLSv1.3":
                with self._send_lock:
                    self._collect()
            else:
                self.flush()
        return done

    def handshake_within(self, timeout: float | None) -> None:
        """Wait for the whole handshake; raises TimeoutError after ``timeout`` seconds."""
        deadline = Deadline(timeout)
        while not self.handshake():
            self.wait_readable(deadline.left())

    def observed(self, observer: Observer) -> Duplex:
        """Call ``observer(sent, data)`` for all bytes from now on, as they are inside TLS: before
        they are sent, and after they were received. Returns the Duplex itself.

        The threads that send and receive call it; it must not raise. Methods of this one object are
        replaced, so that a connection without an observer does no extra work.
        """
        send, receive_into = self.send, self.receive_into

        def send_observed(data: BytesLike) -> bool:
            observer(True, data)
            return send(data)

        def receive_observed_into(view: memoryview) -> int | None:
            count = receive_into(view)
            if count:
                observer(False, bytes(view[:count]))
            return count

        self.send = send_observed  # type: ignore[method-assign]  # of this object alone, see above
        self.receive_into = receive_observed_into  # type: ignore[method-assign]
        return self

    # Reading

    def receive(self, size: int = PLAIN_READ) -> bytes | None:
        """At most ``size`` bytes that have come, b"" at the end, None if none have come."""
        if self._tls is None and not (self._unread or self._at_end):
            if self._broken:
                self._check()
            data = self._receive_plain(size)
            if data == b"":
                self._reach_end()
            self._emptied = data is not None and 0 < len(data) < size
            return data
        buffer = BUFFERS.take()
        try:
            count = self.receive_into(buffer[:size])
            return None if count is None else bytes(buffer[:count])
        finally:
            BUFFERS.give_back(buffer)

    def receive_into(self, view: memoryview) -> int | None:
        """As receive(), into a buffer: a number of bytes, 0 at the end, None if none have come."""
        if self._broken:
            self._check()
        if self._unread:
            count = min(len(self._unread), len(view))
            view[:count], self._unread = self._unread[:count], self._unread[count:]
            return count
        if self._at_end:
            return 0
        if self._tls is None:
            came = self._receive_plain_into(view)
        elif len(view) >= TLS_RECORD:
            came = self._receive_tls(view)
        else:
            came = self._receive_some(view)
        if came == 0:
            self._reach_end()
        return came

    def _reach_end(self) -> None:
        """Note that recv() returned EOF. It also does so if reset() has shut the socket down since
        the last check, and then the data must not look complete."""
        self._check()
        with self._send_lock:  # the kernel reports an error once: _push() may have got it instead
            if self._lost:
                raise ConnectionResetError("the connection broke")
        self._at_end = True

    def _receive_plain(self, size: int) -> bytes | None:
        try:
            return self._socket.recv(size)
        except (BlockingIOError, InterruptedError):
            return None

    def _receive_plain_into(self, view: memoryview) -> int | None:
        try:
            return self._socket.recv_into(view)
        except (BlockingIOError, InterruptedError):
            return None

    def _receive_some(self, view: memoryview) -> int | None:
        """As _receive_tls(), if the buffer is too small for a record: keep what does not fit."""
        buffer = BUFFERS.take()
        try:
            came = self._receive_tls(buffer)
            if not came:
                return came
            count = min(came, len(view))
            view[:count] = buffer[:count]
            if count < came:
                with self._tls_lock:
                    self._early.appendleft(bytes(buffer[count:came]))
                self._tls_holds, self._emptied = True, False
            return count
        finally:
            BUFFERS.give_back(buffer)

    def _receive_tls(self, view: memoryview) -> int | None:
        """As receive_into(). It reads the socket at most once: a peer that sends records without
        payload could hold the thread here for ever. So None may also mean that more can be read."""
        held = 0
        if self._tls_holds or self._early or self._tls_at_end:
            held = self._open_records(view, 0)
            # A few bytes that did not fit last time: read on behind them, as a piece has its price.
            # Not behind a first request that came with the end of the handshake: that is all.
            is_first = held and self._no_payload
            if self._tls_at_end or is_first or held > min(TLS_RECORD // 2, len(view) - TLS_RECORD):
                self._no_payload = 0
                return held
            view = view[held:]
        came = self._receive_plain_into(view)
        if came is None:
            return held or None
        if not came:
            with self._tls_lock:
                self._tls_in.write_eof()
        count = held + self._open_records(view, came)
        if count:
            self._no_payload = 0
        else:
            self._count_silent(came)
        self._emptied = came < len(view) and not (self._tls_holds or self._tls_at_end)
        return count if count or self._tls_at_end else None

    def _open_records(self, view: memoryview, came: int) -> int:
        """Call _decrypt() with the lock, and send what TLS answers to the peer."""
        with self._tls_lock:
            count = self._decrypt(view, came)
            answers = self._tls_out.pending  # the peer asked for a key update
        if answers:
            with contextlib.suppress(OSError):  # the next write will fail too
                self.flush()
            if self._answers > ANSWERS:
                # It asks for key updates and reads none of the replies: they would fill the memory.
                self._break("the peer does not read TLS's answers")
        return count

    def _count_silent(self, came: int) -> None:
        """Count encrypted bytes that brought no payload (empty records, key updates). A peer that
        sends only such bytes keeps us busy for nothing: above NO_PAYLOAD the connection is reset.
        """
        self._no_payload += came
        if self._no_payload > NO_PAYLOAD:
            self._break(f"the peer sent more than {NO_PAYLOAD} bytes of TLS without any payload")

    def _break(self, text: str) -> NoReturn:
        self.reset()
        raise ConnectionAbortedError(text)

    def _decrypt(self, view: memoryview, came: int) -> int:
        """Decrypt earlier bytes, and the ``came`` bytes that ``view`` begins with, into ``view``
        itself. Returns the number of bytes; 0 if there was no complete record, or at the end.
        Caller holds the TLS lock.

        All complete records are decrypted in one call, since each call has a fixed cost. TLS gets
        its input in pieces, since its buffer (ssl.MemoryBIO) grows and never shrinks.
        """
        records, tls_in, count, room = self._records, self._tls_in, 0, len(view)
        encrypted, given = view[:came], 0
        if came:
            given = came if self._early else TLS_PIECE
            tls_in.write(encrypted[:given])
        while self._early and count < room:
            data = self._early.popleft()
            if len(data) > room - count:
                self._early.appendleft(data[room - count :])
                data = data[: room - count]
            view[count : count + len(data)] = data
            count += len(data)
        holds = self._tls_holds
        while not self._tls_at_end:
            end = given if given < came else room  # TLS needs what is behind it
            try:
                while count < end and (holds or tls_in.pending or tls_in.eof):
                    got = records.read(TLS_RECORD, view[count:end])
                    if not got:
                        self._tls_at_end = True
                        break
                    count += got
                    holds = count == end  # of this record there may be more
            except ssl.SSLWantReadError:  # part of a record
                holds = False
            except (ssl.SSLZeroReturnError, ssl.SSLEOFError):  # with or without close_notify
                self._tls_at_end = True
            if given >= came:
                break
            tls_in.write(encrypted[given : given + TLS_PIECE])
            given += TLS_PIECE
        self._tls_holds = count == room and bool(self._early or tls_in.pending or records.pending())
        return count

    def read(self, size: int = PLAIN_READ, timeout: float | None = None) -> bytes:
        """Wait for bytes; b"" at the end. Raises TimeoutError after ``timeout`` seconds."""
        if self._emptied:
            timeout = self.wait_readable(timeout)
        while (data := self.receive(size)) is None:
            timeout = self.wait_readable(timeout)
        return data

    def drop(self) -> int | None:
        """Throw away what has come, without decrypting it: a number of bytes, 0 at the end or after
        a reset, None if nothing has come. From now on only the end of the connection can be read.
        """
        if self._at_end or self._tls_at_end:
            return 0
        self._unread, self._tls_holds = b"", False
        try:
            data = self._receive_plain(READ_SIZE)
        except ConnectionResetError:  # many visitors do so with our close_notify unread
            return 0
        return None if data is None else len(data)

    def unread(self, data: bytes) -> None:
        """Give bytes back: receive() returns them first. Reader only."""
        self._unread = data + self._unread
        self._emptied = False

    def wait_readable(self, timeout: float | None = None) -> float | None:
        """Wait until the socket has bytes, or its end; returns what is left of ``timeout``. Raises
        TimeoutError."""
        if self._wait_to_read is None:
            self._wait_to_read = _waiting(self._socket, writable=False)
        if timeout is None:
            self._wait_to_read(None)
            return None
        began = monotonic()
        if not self._wait_to_read(1000 * max(0, timeout)):
            raise TimeoutError("the peer sent nothing in time")
        return timeout - (monotonic() - began)

    # Writing

    def send(self, data: BytesLike) -> bool:
        """Give bytes to the kernel. False if some did not fit: call flush() until it is True."""
        with self._send_lock:
            if self._records is not None:
                with self._tls_lock:
                    self._records.write(data)
                    data = self._tls_out.read()
            self._unsent = b"".join((self._unsent, data)) if self._unsent else data
            return self._push()

    def offer(self, data: BytesLike) -> int:
        """Give bytes to the kernel, and return how many it took. The caller keeps the others; with
        send() the Duplex would. Only without TLS, which cannot take back what it has encrypted."""
        with self._send_lock:
            if self._unsent:
                return 0
            self._unsent = data
            try:
                self._push()
                return len(data) - len(self._unsent)
            finally:
                self._unsent = b""

    def flush(self) -> bool:
        """Go on sending; True once the kernel has everything."""
        with self._send_lock:
            if self._tls is not None:
                self._collect()
            return self._push()

    def _collect(self) -> None:
        """Take what TLS itself has to say. Caller holds the send lock."""
        with self._tls_lock:
            data = self._tls_out.read()
        if data:
            self._answers += len(data)
            self._unsent = b"".join((self._unsent, data)) if self._unsent else data

    def _push(self) -> bool:
        """Caller holds the send lock."""
        if self._broken:
            self._check()
        while self._unsent:
            try:
                # With MORE the last bytes leave together with the FIN of shutdown() below.
                sent = self._socket.send(self._unsent, MORE if self._finishing else 0)
            except (BlockingIOError, InterruptedError):
                return False
            except BrokenPipeError:  # after a real EOF, or an error that the reader has got already
                raise
            except OSError:
                self._lost = True
                raise
            if sent == len(self._unsent):
                self._unsent = b""
            else:
                self._unsent = memoryview(self._unsent)[sent:]
        self._answers = 0
        if self._finishing:
            self._finishing = False
            try:
                self._socket.shutdown(socket.SHUT_WR)
            except OSError:  # the peer has reset the connection: receive() raises the reason
                self._lost = True
        return True

    def write(
        self, data: BytesLike, timeout: float | None = None, spend: Spend | None = None
    ) -> None:
        """Send all of it, waiting for the kernel. Raises TimeoutError if the peer takes nothing for
        ``timeout`` seconds (None: ``stall_timeout``), since it has stopped reading.

        If ``spend`` is given, it decides instead of ``timeout``: it is called as spend(seconds,
        bytes taken) after each short wait, and may raise TimeoutError.
        """
        if not self.send(data):
            self._outwait(timeout, spend)

    def write_last(
        self, data: BytesLike, timeout: float | None = None, spend: Spend | None = None
    ) -> None:
        """write(), then finish(). The bytes, TLS's close_notify and FIN leave together."""
        if not self._lingers:  # until the kernel has all, a close must not look complete
            self.write(data, timeout, spend)
            self.finish(timeout)
            return
        self._finished = True
        with self._send_lock:
            if self._tls is not None:
                with self._tls_lock:
                    self._records.write(data)
                    self._write_close_notify(self._tls)
                    data = self._tls_out.read()
            self._unsent = b"".join((self._unsent, data)) if self._unsent else data
            self._finishing = True
            done = self._push()
        if not done:
            self._outwait(timeout, spend)

    def _outwait(self, timeout: float | None, spend: Spend | None = None) -> None:
        """Wait until the kernel has everything."""
        if timeout is None:
            timeout = self.stall_timeout
        if spend is None:
            spend = self._spender(timeout)
        done = False
        while not done:
            self._wait_writable(min(STALL_LOOK, timeout / 4), spend)
            done = self.flush()

    @staticmethod
    def _spender(timeout: float) -> Spend:
        """write()'s default for ``spend``: TimeoutError once the peer has taken no byte for
        ``timeout`` seconds."""
        silent = 0.0

        def spend(seconds: float, taken: int) -> None:
            nonlocal silent
            silent = 0 if taken else silent + seconds
            if silent >= timeout:
                raise TimeoutError(f"the peer has stopped reading, nothing for {timeout:g} s")

        return spend

    def _wait_writable(self, look: float, spend: Spend) -> None:
        """Wait until the kernel has room. It reports room only when a third of its buffer is free,
        and for a slow reader that takes minutes. So check every ``look`` seconds what was taken."""
        if self._wait_to_write is None:
            self._wait_to_write = _waiting(self._socket, writable=True)
        with self._send_lock:  # a reset() is either before _check(), or sees _writer_waits
            self._check()
            self._writer_waits = True
        try:
            untaken, began = self._untaken(), monotonic()
            while True:
                ready = self._wait_to_write(1000 * look)
                left, now = self._untaken(), monotonic()
                spend(now - began, max(untaken - left, 1 if ready else 0))
                if ready:
                    return
                untaken, began = left, now
        finally:
            self._writer_waits = False

    def _untaken(self) -> int:
        """Bytes in the kernel that the peer has not acknowledged; 0 if the system cannot tell."""
        if not sys.platform.startswith("linux"):
            return 0
        try:
            # SIOCOUTQ. Python has no such name, but Linux gave TIOCOUTQ the same number.
            count = fcntl.ioctl(self._socket, termios.TIOCOUTQ, bytes(4))
            return int.from_bytes(count, sys.byteorder)
        except OSError:
            return 0

    # Ending

    def finish(self, timeout: float | None = None) -> None:
        """Half-close: no more bytes from us; the peer's may still come. Writer only. ``timeout``
        as for write()."""
        if self._finished:
            return
        self._finished = True
        if self._tls is not None:
            with self._tls_lock:
                self._write_close_notify(self._tls)
        with self._send_lock:
            self._finishing = True
        self._linger()  # the kernel has all payload, and sends it even if the process ends
        if not self.flush():
            self._outwait(timeout)

    def cut_unless_finished(self) -> None:
        """From now on close() sends RST, until finish() or stop() is called. So the peer also gets
        a RST if the process dies, since the kernel closes the socket then."""
        with contextlib.suppress(OSError), self._send_lock:
            self._lingers = False
            self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, NO_LINGER)

    def _linger(self) -> None:
        """Have close() send unsent bytes and FIN again, unless the connection was reset."""
        if self._lingers:
            return
        with contextlib.suppress(OSError), self._send_lock:
            if not self._broken:
                self._lingers = True
                self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, LINGER)

    def _write_close_notify(self, tls: ssl.SSLObject) -> None:
        """Write TLS's close_notify into the output buffer. Caller holds the TLS lock.

        unwrap() also looks for the peer's close_notify, and would drop payload in the input buffer.
        So that payload is moved to _early first.
        """
        try:
            while (self._tls_in.pending or tls.pending()) and (data := tls.read(READ_SIZE)):
                self._early.append(data)
        except OSError:  # nothing is left, or TLS has failed
            pass
        try:
            tls.unwrap()
        except OSError:  # as always: the peer's has not come yet
            pass

    def stop(self) -> None:
        """End both directions: threads that read or write wake up. The kernel still sends what it
        has. Any thread; the owner must still call close()."""
        self._linger()
        with contextlib.suppress(OSError), self._send_lock:  # ended already, which was the goal
            self._socket.shutdown(socket.SHUT_RDWR)

    def reset(self) -> None:
        """Break the connection: as stop(), but close() sends RST, so that the peer does not take
        the data for complete. Any thread."""
        with contextlib.suppress(OSError), self._send_lock:  # closed already
            self._broken = True
            self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, NO_LINGER)
            # SHUT_WR would send FIN, which looks like a proper end. SHUT_RD sends none, but does
            # not wake a waiting writer. If one waits, there are unsent bytes in front of the FIN,
            # and the RST drops both.
            how = socket.SHUT_RDWR if self._writer_waits else socket.SHUT_RD
            self._socket.shutdown(how)

    def cut(self) -> None:
        """Break the connection after what was written: the peer gets all of that, then RST. Waits
        until the peer's TCP has it, or has taken nothing for CUT_TIMEOUT. Writer only."""
        pause, most = CUT_LOOKS
        left, moved_at = self._untaken(), monotonic()
        while left and self._can_deliver():
            sleep(pause)
            pause = min(2 * pause, most)
            before, left = left, self._untaken()
            if left < before:
                moved_at = monotonic()
            elif monotonic() - moved_at > CUT_TIMEOUT:
                break
        self.reset()

    def _can_deliver(self) -> bool:
        """Whether the kernel can still deliver what it has. Not if the connection is dead; with
        AF_UNIX there is no need to wait, since it has no RST."""
        try:
            state = self._socket.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 1)[0]
        except OSError:
            return False
        return not self._broken and state != TCP_CLOSE

    def stop_reading(self) -> None:
        """Make the reader see an end, since its bytes are no longer needed. Any thread."""
        with contextlib.suppress(OSError), self._send_lock:
            self._socket.shutdown(socket.SHUT_RD)

    def _check(self) -> None:
        if self._broken:
            raise ConnectionResetError("the connection was reset on this side")

    def close(self) -> None:
        """Close the socket. Only when no other thread uses the Duplex any more (see stop())."""
        if self._tls is not None and self._lingers and not self._finished and not self._broken:
            # Without waiting: the peer can do without a close_notify.
            with contextlib.suppress(OSError):
                with self._tls_lock:
                    self._write_close_notify(self._tls)
                self.flush()
        with self._send_lock:  # or a reset() in another thread could hit a reused descriptor
            self._socket.close()
