"""The targets of the bench, one for each hostname. They trust nothing that comes.

A request says what it should be (fault_visits.py): its visit's id, and a proof over method, path,
hostname and id; a body's length and digest are in fields as well. What does not fit was changed on
its way. That is wrong unless a script has altered this very connection.

    /bytes?n=N    N bytes with a Content-Length
    /chunks?n=N   chunked, with a trailer
    /slow?n=N     as /chunks, with pauses
    /close?n=N    ended by the connection's end
    /none         204
    /socket       a WebSocket that echoes
"""

import base64
import contextlib
import hashlib
import re
import socket
import struct
import threading
from time import monotonic

from fault_ledger import content, digest, proof

IDLE = 8  # seconds that a target waits for its peer; then it closes, as all servers do
SLOW_PARTS, SLOW_PAUSE = 5, 0.1  # of /slow; seconds
HEAD_LIMIT = 16 * 1024
SOCKET_GUID = b"258EAFA5-E914-47DA-95CA-C5AB0DC85B11"  # RFC 6455 §1.3
TEXT, BINARY, CLOSE = 1, 2, 8
TCP_HEAD = re.compile(rb"([!-~]+) ([!-~]+) ([0-9]+) ([0-9]+) ([01]) ([0-9a-f]+)\n")


class Ended(Exception):
    """The connection ended in the middle. ``clean``: with a FIN, so that it looks complete."""

    def __init__(self, clean):
        super().__init__()
        self.clean = clean


class Garbled(Exception):
    """What came is not what a visitor sent; the text says what."""


class Peer:
    """A connection that a target has accepted, with a buffer."""

    def __init__(self, sock):
        self.sock = sock
        sock.settimeout(IDLE)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._buffer = b""

    def fill(self):
        try:
            data = self.sock.recv(64 * 1024)
        except OSError:
            raise Ended(clean=False) from None
        if not data:
            raise Ended(clean=True)
        self._buffer += data

    def until(self, mark, limit=HEAD_LIMIT) -> bytes:
        """All up to ``mark``, which is included."""
        while (end := self._buffer.find(mark)) < 0:
            if len(self._buffer) > limit:
                raise Garbled(f"{len(self._buffer)} bytes without {mark!r}")
            self.fill()
        end += len(mark)
        data, self._buffer = self._buffer[:end], self._buffer[end:]
        return data

    def exactly(self, size) -> bytes:
        while len(self._buffer) < size:
            self.fill()
        data, self._buffer = self._buffer[:size], self._buffer[size:]
        return data

    def await_end(self):
        """Wait for a FIN, before which nothing may come."""
        try:
            self.fill()
        except Ended as error:
            if error.clean:
                return
            raise
        raise Garbled(f"more bytes than announced: {self._buffer[:60]!r}")

    def send(self, data):
        try:
            self.sock.sendall(data)
        except OSError:
            raise Ended(clean=False) from None


class Target:
    """The target of one hostname. Use it in a ``with``, and set its ``line`` before."""

    line = None  # the Line through which its agent reaches it

    def __init__(self, agent, hostname, mode, ledger):
        """``mode``: "http" or "tcp"."""
        self.agent, self.hostname = agent, hostname
        self._serve = self._serve_http if mode == "http" else self._serve_tcp
        self._ledger = ledger
        self._open = set()
        self._threads = set()
        self._lock = threading.Lock()  # guards both
        self._listening = socket.create_server(("127.0.0.1", 0), backlog=128)
        self.port = self._listening.getsockname()[1]

    def __enter__(self):
        self._start(self._accept)
        return self

    def __exit__(self, *exc_info):
        with contextlib.suppress(OSError):  # not every system lets a listening socket be shut down
            self._listening.shutdown(socket.SHUT_RDWR)
        self._listening.close()
        with self._lock:
            for sock in self._open:
                with contextlib.suppress(OSError):
                    sock.shutdown(socket.SHUT_RDWR)
            threads = list(self._threads)
        for thread in threads:
            thread.join(IDLE + 5)

    def _start(self, function, *arguments):
        def run():
            function(*arguments)
            with self._lock:
                self._threads.discard(thread)

        thread = threading.Thread(target=run, name=f"target {self.hostname}", daemon=True)
        with self._lock:
            self._threads.add(thread)
        thread.start()

    def _accept(self):
        with contextlib.suppress(OSError):  # closed: the bench is over
            while True:
                sock, address = self._listening.accept()
                with self._lock:
                    self._open.add(sock)
                self._start(self._run, sock, address[1])

    def _run(self, sock, port):
        connection = self.line.connection_to(port)
        try:
            self._serve(Peer(sock), connection)
        except Ended as ended:
            if not ended.clean:  # given up, perhaps by us: no end that looks like an answer's
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        except Garbled as error:
            if not connection.altered:
                self._ledger.accuse(f"target of {self.hostname}: {error}")
        finally:
            with self._lock:
                self._open.discard(sock)
            sock.close()

    # http

    def _serve_http(self, peer, connection):
        while self._serve_request(peer, connection):
            pass

    def _serve_request(self, peer, connection) -> bool:
        """Whether the connection can be used for another one."""
        head = peer.until(b"\r\n\r\n")
        match = re.fullmatch(
            rb"([A-Z]+) (/[a-z]+)(?:\?n=([0-9]+))? HTTP/1\.1", head.splitlines()[0]
        )
        if match is None:
            raise Garbled(f"a request line {head.splitlines()[0][:80]!r}")
        fields = fields_of(head)
        method, path = match[1].decode(), head.split(b" ", 2)[1].decode()
        hostname, visit = fields.get("host", ""), fields.get("x-visit", "")
        if fields.get("x-proof") != proof(method, path, hostname, visit):
            raise Garbled(f"a request that its visitor did not send: {head[:300]!r}")
        self._ledger.carry(visit, connection)
        if hostname != self.hostname:
            raise Garbled(f"visit {visit} to {hostname}: it came to the wrong target")
        body = self._read_body(peer, fields)
        if "x-body" in fields and fields["x-body"] != digest(body):
            raise Garbled(
                f"visit {visit}: a body of {len(body)} bytes, expected {fields['x-length']}"
            )
        if method == "POST" and not self._ledger.arrives_once(visit):
            raise Garbled(f"visit {visit}: its POST has come twice")
        size, kind = int(match[3] or 0), match[2].decode()
        own = (
            f"X-Visit: {visit}\r\nX-Target: {self.hostname}\r\n"
            f"X-Names: {proof(self.hostname, visit)}\r\nX-Received: {digest(body)}\r\n"
        )
        if kind == "/socket":
            self._serve_socket(peer, fields, own, f"{hostname} {visit} ".encode())
            return False
        self._answer(peer, method, kind, own, content(hostname, visit, size))
        return kind != "/close"

    def _read_body(self, peer, fields) -> bytes:
        if fields.get("transfer-encoding") == "chunked":
            parts = []
            while size := _hex(peer.until(b"\r\n", 100)):
                parts.append(peer.exactly(size))
                peer.exactly(2)
            peer.until(b"\r\n")
            return b"".join(parts)
        length = fields.get("content-length", "0")
        if not re.fullmatch("[0-9]{1,9}", length):
            raise Garbled(f"Content-Length {length!r}")
        return peer.exactly(int(length))

    def _answer(self, peer, method, kind, own, data):
        if kind == "/none":
            peer.send(f"HTTP/1.1 204 No Content\r\n{own}\r\n".encode())
            return
        head = f"HTTP/1.1 200 OK\r\n{own}"
        if kind == "/bytes":
            head += f"Content-Length: {len(data)}\r\n\r\n"
            peer.send(head.encode() + (b"" if method == "HEAD" else data))
            return
        if kind == "/close":
            peer.send(f"{head}Connection: close\r\n\r\n".encode() + data)
            return
        peer.send(f"{head}Transfer-Encoding: chunked\r\n\r\n".encode())
        parts = SLOW_PARTS if kind == "/slow" else 3
        step = len(data) // parts + 1
        for begin in range(0, len(data), step):
            piece = data[begin : begin + step]
            peer.send(b"%x\r\n%b\r\n" % (len(piece), piece))
            if kind == "/slow":
                threading.Event().wait(SLOW_PAUSE)
        peer.send(b"0\r\nX-Trailer: end\r\n\r\n")

    def _serve_socket(self, peer, fields, own, mark):
        key = fields.get("sec-websocket-key", "").encode()
        peer.send(
            f"HTTP/1.1 101 Switching Protocols\r\n{own}Connection: Upgrade\r\n"
            f"Upgrade: websocket\r\nSec-WebSocket-Accept: {accept_of(key)}\r\n\r\n".encode()
        )
        while True:
            opcode, payload = read_frame(peer, masked=True)
            if opcode == CLOSE:
                peer.send(frame(CLOSE, payload))
                return
            peer.send(frame(BINARY, mark + payload))

    # tcp

    def _serve_tcp(self, peer, connection):
        """The visitor's line, its bytes, and its FIN if the line has announced one; then the
        answer's line and bytes. The visitor's line: hostname, visit, sizes of both, FIN, proof."""
        since = monotonic()
        head = peer.until(b"\n", 300)
        match = TCP_HEAD.fullmatch(head)
        *words, shown = (part.decode() for part in match.groups()) if match else ("", "")
        if match is None or shown != proof(*words):
            raise Garbled(f"a first line that its visitor did not send: {head[:200]!r}")
        hostname, visit, up, down, ends = words
        self._ledger.carry(visit, connection)
        if hostname != self.hostname:
            raise Garbled(f"visit {visit} to {hostname}: it came to the wrong target")
        try:
            body = peer.exactly(int(up))
        except Ended as error:
            # A visitor that was reset, or a broken session, must become a RST here. A FIN without
            # TLS's farewell may not: in tcp mode it is a half-close like any other.
            killed = self._ledger.killed_since(self.agent, since)
            shortened = connection.shortened or self._ledger.came_shortened(visit)
            if error.clean and not (shortened or killed):
                text = f"visit {visit}: half of its bytes, and an end that looks whole"
                raise Garbled(text) from None
            raise
        if body != content(hostname, f"{visit} up", int(up)):
            raise Garbled(f"visit {visit}: its bytes were changed on the way")
        if ends == "1":
            peer.await_end()
        peer.send(f"{hostname} {visit} {down}\n".encode())
        peer.send(content(hostname, visit, int(down)))


def fields_of(head) -> dict:
    """The fields of a head, names in lower case."""
    pairs = (line.partition(b":") for line in head.split(b"\r\n")[1:] if line)
    return {
        name.decode("latin-1").lower(): value.strip().decode("latin-1") for name, _, value in pairs
    }


def _hex(line) -> int:
    if not re.fullmatch(rb"[0-9A-Fa-f]{1,8}\r\n", line):
        raise Garbled(f"a chunk's size {line!r}")
    return int(line, 16)


# WebSocket (RFC 6455), as far as the bench needs it


def accept_of(key) -> str:
    return base64.b64encode(hashlib.sha1(key + SOCKET_GUID).digest()).decode()


def frame(opcode, payload, mask=b"") -> bytes:
    """One whole frame; visitors must mask theirs."""
    size, bit = len(payload), 0x80 if mask else 0
    if size < 126:
        head = struct.pack("!BB", 0x80 | opcode, bit | size)
    elif size < 1 << 16:
        head = struct.pack("!BBH", 0x80 | opcode, bit | 126, size)
    else:
        head = struct.pack("!BBQ", 0x80 | opcode, bit | 127, size)
    return head + mask + (_masked(payload, mask) if mask else payload)


def _masked(payload, mask) -> bytes:
    size = len(payload)
    pattern = (mask * (size // 4 + 1))[:size]
    return (int.from_bytes(payload, "big") ^ int.from_bytes(pattern, "big")).to_bytes(size, "big")


def read_frame(peer, *, masked) -> tuple:
    """Opcode and payload of the next frame, which must be a whole message. Raises Garbled."""
    first, second = peer.exactly(2)
    if first not in (0x80 | TEXT, 0x80 | BINARY, 0x80 | CLOSE) or bool(second & 0x80) != masked:
        raise Garbled(f"a WebSocket frame that begins {first:02x} {second:02x}")
    size = second & 0x7F
    if size > 125:
        form = "!H" if size == 126 else "!Q"
        [size] = struct.unpack(form, peer.exactly(struct.calcsize(form)))
    if size > 1 << 20:
        raise Garbled(f"a WebSocket frame of {size} bytes")
    mask = peer.exactly(4) if masked else b""
    payload = peer.exactly(size)
    return first & 0x0F, _masked(payload, mask) if masked else payload
