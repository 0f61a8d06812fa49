"""A connection, plain or TLS, that one thread may read while another one writes.

Sessions run over it, and so do visitors' connections and those to targets. It is the one answer to
OpenSSL's rule that no two threads may be in one TLS object at once; nothing else shares a socket
with TLS between threads.
"""

from __future__ import annotations

import contextlib
import selectors
import socket
import ssl
import struct
import sys
import threading
from collections import deque
from collections.abc import Callable
from time import monotonic, sleep
from typing import NoReturn

from gotunnel import BUFFERS, LARGE_BUFFERS, READ_SIZE, BytesLike, Deadline

if sys.platform.startswith("linux"):
    import fcntl
    import termios

STALL_TIMEOUT = 300  # seconds that a peer may take none of what we write; then it is given up
# What an operator may set in its place: a line may be away for a second, and nobody waits for days.
LEAST_STALL, MOST_STALL = 1, 86_400
STALL_LOOK = 1.0  # seconds between looks whether a peer has taken any of it
TLS_RECORD = 16 * 1024  # bytes of payload in a record, at most (RFC 8446 §5.1)
TLS_PIECE = 64 * 1024  # bytes that TLS is given at once
# Bytes of TLS in a row without payload. A record and a handshake message have some, OpenSSL takes
# 100 KB of certificates; key updates and tickets are a few hundred bytes in a day.
NO_PAYLOAD = 128 * 1024
ANSWERS = 64 * 1024  # bytes of TLS's own answers (to key updates) that wait for a peer to read
NO_LINGER = struct.pack("ii", 1, 0)  # SO_LINGER: closing sends RST and drops what is unsent
LINGER = struct.pack("ii", 0, 0)  # ... as sockets are born: closing sends what is unsent, and FIN
CUT_TIMEOUT = 30  # seconds that the peer's TCP may take none of what stands before a RST
CUT_LOOKS = 0.001, 0.05  # seconds between looks whether it has, the first and the longest
TCP_CLOSE = 7  # tcpi_state in Linux's TCP_INFO: the connection is dead

# When TCP asks whether a silent peer is still there: after a minute, then each 15 seconds, and four
# unanswered times are a no. Else a relay whose peer was unplugged would stay for ever.
KEEPALIVE = [
    (getattr(socket, name), value)
    for name, value in (("TCP_KEEPIDLE", 60), ("TCP_KEEPINTVL", 15), ("TCP_KEEPCNT", 4))
    if hasattr(socket, name)
]

# The option of Linux that limit_unsent() needs; Python knows its name from 3.12 on.
NOTSENT_LOWAT = getattr(socket, "TCP_NOTSENT_LOWAT", 25 if sys.platform == "linux" else None)

Spend = Callable[[float, int], None]  # see Duplex.write()
Observer = Callable[[bool, BytesLike], None]  # see Duplex.observed()

# A selector that needs no descriptor of its own, where the system has one (socketserver's choice).
_WaitSelector = getattr(selectors, "PollSelector", selectors.SelectSelector)


class Duplex:
    """A connection, plain or TLS, that one thread may read while another one writes.

    OpenSSL forbids two threads in one TLS object at once, so TLS never touches the socket here:
    it turns bytes into bytes between two memory buffers, under a lock that is never held while
    something waits, and the socket, which does not mind two threads, is used outside of it.

    The socket is non-blocking. receive(), send() and flush() do what can be done at once;
    read() and write() wait. One reader and one writer at a time; stop() and reset(): any thread.
    All of it raises OSError (ssl.SSLError is one) when the connection is broken.
    """

    def __init__(self, sock: socket.socket):
        sock.setblocking(False)
        # A family that has no such options (AF_UNIX) does not need them either.
        with contextlib.suppress(OSError):
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
            # A byte that is urgent stays in its place (FTP's ABOR), or it would be lost.
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_OOBINLINE, 1)
            for option, value in KEEPALIVE:
                sock.setsockopt(socket.IPPROTO_TCP, option, value)
        self._socket = sock
        self._unread = b""  # bytes that were given back, or came before TLS began
        self._at_end = False  # the peer half-closed
        self._tls_at_end = False  # ... which TLS has read, if perhaps nobody else
        self._tls_holds = False  # bytes that are no longer in the socket; only the reader says so
        self._tls: ssl.SSLObject | None = None  # between the two buffers
        self._tls_in, self._tls_out = ssl.MemoryBIO(), ssl.MemoryBIO()
        self._no_payload = 0  # bytes of TLS that came since the last payload; the reader's
        self._early: deque[bytes] = deque()  # payload that TLS held when we said farewell
        self._tls_lock = threading.Lock()  # guards the TLS object, its buffers and _early
        self._send_lock = threading.Lock()  # guards all below but _finished, and the order of bytes
        self._unsent: BytesLike = b""  # bytes that the kernel did not take yet
        self._answers = 0  # of them and those before, since there were none: TLS's own
        self._finishing = False  # half-close the socket once they are gone
        self._finished = False  # finish() was called
        self._broken = False  # reset() was called
        self._lost = False  # sending has found it broken: the end that is read then is none
        self._lingers = True  # closing it sends what is unsent, and FIN
        self._writer_waits = False
        self._read_wait: selectors.BaseSelector | None = None  # made when first needed
        self._write_wait: selectors.BaseSelector | None = None
        self.stall_timeout: float = STALL_TIMEOUT  # of write() and finish() that are given no other

    def fileno(self) -> int:
        return self._socket.fileno()

    @property
    def pending(self) -> bool:
        """Whether receive() has something although the socket may be silent."""
        return bool(self._unread or self._at_end or self._tls_at_end or self._tls_holds)

    def died(self) -> bool:
        """Whether the connection is broken: reset, or TCP got no answer (KEEPALIVE). Finds it out
        although nobody reads or writes; if it is, later reads do not see an end but raise."""
        with contextlib.suppress(OSError):
            if not self._broken and self._socket.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR):
                self.reset()  # the look has taken the error away, and an end would be read now
        return self._broken

    @property
    def local_address(self) -> tuple[str, int]:
        """Our own (IP address, port), as the peer knows it. For TCP."""
        address, port = self._socket.getsockname()[:2]
        return address, port

    def limit_unsent(self, count: int) -> None:
        """Let the kernel take no more than about ``count`` bytes that it cannot send at once, so
        that what is urgent does not wait behind megabytes. For TCP, where the system can."""
        if NOTSENT_LOWAT is not None:
            with contextlib.suppress(OSError):  # AF_UNIX
                self._socket.setsockopt(socket.IPPROTO_TCP, NOTSENT_LOWAT, count)

    # TLS

    def start_tls(
        self,
        context: ssl.SSLContext,
        *,
        server_side: bool,
        server_hostname: str | None = None,
    ) -> None:
        """Begin TLS with what was received and given back; handshake() does the rest."""
        self._tls_in.write(self._unread)
        self._tls_holds, self._unread = bool(self._unread), b""
        self._tls = context.wrap_bio(self._tls_in, self._tls_out, server_side, server_hostname)

    def handshake(self) -> bool:
        """Go on with the handshake, by one read at most; False if the peer has to say more.

        Raises ssl.SSLError if it fails; the alert is on its way then.
        """
        tls = self._tls
        if tls is None:
            raise ValueError("handshake() before start_tls()")
        if self._shake_hands(tls):
            return True
        data = self._receive_plain(READ_SIZE)
        if data is None:
            return False
        self._check()  # else a reset would be an end without TLS's farewell
        self._count_came(len(data), 0)
        with self._tls_lock:
            if data:
                self._tls_in.write(data)
            else:
                self._tls_in.write_eof()
        return self._shake_hands(tls)

    def _shake_hands(self, tls: ssl.SSLObject) -> bool:
        try:
            with self._tls_lock:
                tls.do_handshake()
                self._tls_holds = bool(self._tls_in.pending or tls.pending())
            return True
        except ssl.SSLWantReadError:
            return False
        finally:
            self.flush()

    def handshake_within(self, timeout: float | None) -> None:
        """Wait for the whole handshake; raises TimeoutError after ``timeout`` seconds."""
        deadline = Deadline(timeout)
        while not self.handshake():
            self.wait_readable(deadline.left())

    def observed(self, observer: Observer) -> Duplex:
        """Call ``observer(sent, data)`` for all bytes from now on, as they are inside TLS: before
        they are sent, and when they were received. Returns the Duplex itself.

        The threads that send and receive call it; it must not raise. Methods of this one object are
        replaced, so a connection without an observer pays nothing.
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

    def receive(self, size: int = READ_SIZE) -> bytes | None:
        """At most ``size`` bytes that are here, b"" at the end, None if none have come."""
        if self._tls is None and not (self._unread or self._at_end):
            self._check()
            data = self._receive_plain(size)
            if data == b"":
                self._reach_end()
            return data
        buffer = BUFFERS.take()
        try:
            count = self.receive_into(buffer[:size])
            return None if count is None else bytes(buffer[:count])
        finally:
            BUFFERS.give_back(buffer)

    def receive_into(self, view: memoryview) -> int | None:
        """As receive(), into a buffer: how many bytes, 0 at the end, None if none have come."""
        self._check()
        if self._unread:
            count = min(len(self._unread), len(view))
            view[:count], self._unread = self._unread[:count], self._unread[count:]
            return count
        if self._at_end:
            return 0
        if self._tls is not None:
            came = self._receive_tls(self._tls, view)
        else:
            came = self._receive_plain_into(view)
        if came == 0:
            self._reach_end()
        return came

    def _reach_end(self) -> None:
        """The socket gave its end. It also does so if reset() has shut it down since the last
        check, and then what came must not look whole."""
        self._check()
        with self._send_lock:  # the system gives an error once, perhaps to a sender just now
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

    def _receive_tls(self, tls: ssl.SSLObject, view: memoryview) -> int | None:
        """As receive_into(). It reads the socket once at most, since a peer that sends records
        without payload could keep it for ever: None may also mean that more is there."""
        buffers = BUFFERS if len(view) <= READ_SIZE else LARGE_BUFFERS
        buffer = buffers.take()
        try:
            if self._tls_holds or self._early or self._tls_at_end:
                count = self._open_records(tls, buffer[:0], view)
                if count or self._tls_at_end:
                    return count
            came = self._receive_plain_into(buffer)
            if came is None:
                return None
            if not came:
                with self._tls_lock:
                    self._tls_in.write_eof()
            count = self._open_records(tls, buffer[:came], view)
            self._count_came(came, count)
            return count if count or self._tls_at_end else None
        finally:
            buffers.give_back(buffer)

    def _open_records(self, tls: ssl.SSLObject, came: memoryview, view: memoryview) -> int:
        """As _decrypt(), without the lock, and TLS's answers are on their way."""
        with self._tls_lock:
            count = self._decrypt(tls, came, view)
            answers = self._tls_out.pending  # a key update wants one, also while we read
        if answers:
            with contextlib.suppress(OSError):  # the writer finds out by itself
                self.flush()
            if self._answers > ANSWERS:
                self._break("the peer does not read TLS's answers")
        return count

    def _count_came(self, came: int, payload: int) -> None:
        self._no_payload = 0 if payload else self._no_payload + came
        if self._no_payload > NO_PAYLOAD:
            self._break(f"more than {NO_PAYLOAD} bytes of TLS without payload")

    def _break(self, text: str) -> NoReturn:
        self.reset()
        raise ConnectionAbortedError(text)

    def _decrypt(self, tls: ssl.SSLObject, came: memoryview, view: memoryview) -> int:
        """Decrypt what is here and what just ``came`` into ``view``; returns how many bytes, 0 if
        there was no whole record, or the end. Caller holds the TLS lock.

        TLS gives a record at a time. Those that are here go together: whatever is done with them
        costs as much for one as for many. TLS is fed in pieces, since its buffer stays as large
        as it once was.
        """
        tls_in, count, room = self._tls_in, 0, len(view)
        while self._early and count < room:
            data = self._early.popleft()
            if len(data) > room - count:
                self._early.appendleft(data[room - count :])
                data = data[: room - count]
            view[count : count + len(data)] = data
            count += len(data)
        while count < room and not self._tls_at_end:
            try:
                while count < room and (tls_in.pending or tls_in.eof or tls.pending()):
                    # A count, if there is a buffer to read into: the library's stub is wrong.
                    got: int = tls.read(TLS_RECORD, view[count:])  # type: ignore[assignment]
                    if not got:
                        self._tls_at_end = True
                        break
                    count += got
            except ssl.SSLWantReadError:  # part of a record
                pass
            except (ssl.SSLZeroReturnError, ssl.SSLEOFError):  # with or without a farewell
                self._tls_at_end = True
            if not came:
                break
            tls_in.write(came[:TLS_PIECE])
            came = came[TLS_PIECE:]
        if came:
            tls_in.write(came)
        self._tls_holds = count > 0 and bool(self._early or tls_in.pending or tls.pending())
        return count

    def read(self, size: int = READ_SIZE, timeout: float | None = None) -> bytes:
        """Wait for bytes; b"" at the end. Raises TimeoutError after ``timeout`` seconds."""
        deadline = Deadline(timeout)
        while (data := self.receive(size)) is None:
            self.wait_readable(deadline.left())
        return data

    def unread(self, data: bytes) -> None:
        """Give bytes back: they are the first that are received next. Reader only."""
        self._unread = data + self._unread

    def wait_readable(self, timeout: float | None = None) -> None:
        """Wait until the socket has bytes, or its end; raises TimeoutError."""
        if self._read_wait is None:
            self._read_wait = _WaitSelector()
            self._read_wait.register(self._socket, selectors.EVENT_READ)
        if not self._read_wait.select(timeout):
            raise TimeoutError("the peer sent nothing in time")

    # Writing

    def send(self, data: BytesLike) -> bool:
        """Hand bytes to the kernel; False if some did not fit: flush() until it says True."""
        with self._send_lock:
            if self._tls is not None:
                with self._tls_lock:
                    self._tls.write(data)
                    data = self._tls_out.read()
            self._unsent = b"".join((self._unsent, data)) if self._unsent else data
            return self._push()

    def flush(self) -> bool:
        """Go on sending; True once all is with the kernel."""
        with self._send_lock:
            if self._tls is not None:
                with self._tls_lock:
                    data = self._tls_out.read()
                if data:
                    self._answers += len(data)
                    self._unsent = b"".join((self._unsent, data)) if self._unsent else data
            return self._push()

    def _push(self) -> bool:
        """Caller holds the send lock."""
        self._check()
        while self._unsent:
            try:
                sent = self._socket.send(self._unsent)
            except (BlockingIOError, InterruptedError):
                return False
            except BrokenPipeError:  # it broke behind the peer's end, or the reader has the error
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
            self._socket.shutdown(socket.SHUT_WR)
        return True

    def write(
        self, data: BytesLike, timeout: float | None = None, spend: Spend | None = None
    ) -> None:
        """Send all of it, waiting for the kernel. Raises TimeoutError if the peer takes none of it
        for ``timeout`` seconds (None: ``stall_timeout``): it has stopped reading.

        With ``spend`` that decides instead, spend(seconds, taken), which raises TimeoutError.
        """
        if not self.send(data):
            self._outwait(timeout, spend)

    def _outwait(self, timeout: float | None, spend: Spend | None = None) -> None:
        """Wait until all is with the kernel, for a peer that reads slowly."""
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
        silent = 0.0

        def spend(seconds: float, taken: int) -> None:
            nonlocal silent
            silent = 0 if taken else silent + seconds
            if silent >= timeout:
                raise TimeoutError(f"the peer has stopped reading, nothing for {timeout:g} s")

        return spend

    def _wait_writable(self, look: float, spend: Spend) -> None:
        """Wait until the kernel has room. It tells so when a third of megabytes is free, which a
        slow reader takes minutes for: so look what it has taken."""
        if self._write_wait is None:
            self._write_wait = _WaitSelector()
            self._write_wait.register(self._socket, selectors.EVENT_WRITE)
        with self._send_lock:  # either reset() sees the waiting writer, or the writer the reset
            self._check()
            self._writer_waits = True
        try:
            untaken, began = self._untaken(), monotonic()
            while True:
                ready = self._write_wait.select(look)
                left, now = self._untaken(), monotonic()
                spend(now - began, max(untaken - left, 1 if ready else 0))
                if ready:
                    return
                untaken, began = left, now
        finally:
            self._writer_waits = False

    def _untaken(self) -> int:
        """Bytes that the kernel holds because the peer has not taken them; 0 if it cannot tell."""
        if not sys.platform.startswith("linux"):
            return 0
        try:
            # SIOCOUTQ, which Python knows only by the name that its number has for terminals.
            count = fcntl.ioctl(self._socket, termios.TIOCOUTQ, bytes(4))
            return int.from_bytes(count, sys.byteorder)
        except OSError:
            return 0

    # Ending

    def finish(self, timeout: float | None = None) -> None:
        """Half-close: no more bytes from us, the peer's may still come. Writer only. ``timeout``:
        as for write()."""
        if self._finished:
            return
        self._finished = True
        if self._tls is not None:
            with self._tls_lock:
                self._say_farewell(self._tls)
        with self._send_lock:
            self._finishing = True
        self._linger()  # all payload is with the kernel, which sends it also if the process ends
        if not self.flush():
            self._outwait(timeout)

    def cut_unless_finished(self) -> None:
        """From now on closing it is a reset, until finish() or stop(): also if the system ends the
        process, since then the kernel closes it."""
        with contextlib.suppress(OSError), self._send_lock:
            self._lingers = False
            self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, NO_LINGER)

    def _linger(self) -> None:
        """Have close() send what is unsent, unless it was reset."""
        if self._lingers:
            return
        with contextlib.suppress(OSError), self._send_lock:
            if not self._broken:
                self._lingers = True
                self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, LINGER)

    def _say_farewell(self, tls: ssl.SSLObject) -> None:
        """Put TLS's close_notify among the bytes to send. Caller holds the TLS lock.

        unwrap() also reads on for the peer's, and would eat payload that is in the buffer: so
        that is taken out before.
        """
        with contextlib.suppress(OSError):  # nothing left, or nothing that can be read any more
            while (self._tls_in.pending or tls.pending()) and (data := tls.read(READ_SIZE)):
                self._early.append(data)
        with contextlib.suppress(OSError):  # always: the peer's farewell is not there yet
            tls.unwrap()

    def stop(self) -> None:
        """End both directions: threads that read or write wake up. What the kernel has taken still
        goes out. Any thread; the owner still calls close()."""
        self._linger()
        with contextlib.suppress(OSError), self._send_lock:  # ended already, which was the goal
            self._socket.shutdown(socket.SHUT_RDWR)

    def reset(self) -> None:
        """Break the connection: as stop(), and the peer sees a RST when it is closed, so nobody
        takes what it has got for all there was."""
        with contextlib.suppress(OSError), self._send_lock:  # closed already
            self._broken = True
            self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, NO_LINGER)
            # A FIN would look like an end, and shutting down the reading side sends none. It does
            # not wake a writer; but one that waits does so behind bytes that a FIN does not pass.
            how = socket.SHUT_RDWR if self._writer_waits else socket.SHUT_RD
            self._socket.shutdown(how)

    def cut(self) -> None:
        """Break the connection behind what was written: the peer gets all of that, and then the
        RST. Waits for the peer's TCP, as long as it takes some in CUT_TIMEOUT. Writer only."""
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
        """Whether a RST would cost what the kernel still holds. Not if the connection is dead, nor
        with AF_UNIX, which has none."""
        try:
            state = self._socket.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 1)[0]
        except OSError:
            return False
        return not self._broken and state != TCP_CLOSE

    def stop_reading(self) -> None:
        """Have the reader see an end, since nobody wants what it reads. Any thread."""
        with contextlib.suppress(OSError), self._send_lock:
            self._socket.shutdown(socket.SHUT_RD)

    def _check(self) -> None:
        if self._broken:
            raise ConnectionResetError("the connection was reset on this side")

    def close(self) -> None:
        """Close the socket. Only when no other thread is in here any more (see stop())."""
        if self._tls is not None and self._lingers and not self._finished and not self._broken:
            # Without waiting: a farewell that does not fit now would only be a courtesy.
            with contextlib.suppress(OSError):
                with self._tls_lock:
                    self._say_farewell(self._tls)
                self.flush()
        for selector in (self._read_wait, self._write_wait):
            if selector is not None:
                selector.close()
        with self._send_lock:  # a late sender must not find a descriptor that was given out anew
            self._socket.close()
