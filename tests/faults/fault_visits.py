"""A model of visitors: it makes visits of many kinds, and checks everything that it gets.

Each request carries an id. The answer must carry it back, name the hostname and the agent that were
asked, and have the bytes that no other visit gets (fault_ledger.content). A visit that fails must
show it: by a page of the gateway (X-Gotunnel-Error), a status, a reset, or an end before the end.
An answer that is complete by its protocol's rules and is not the right one is wrong; so is the
beginning of another's.
"""

import functools
import os
import re
import socket
import ssl
import struct
from time import monotonic
from typing import NamedTuple

from fault_ledger import (
    ALTERED,
    FAILED,
    HANG_BOUND,
    HUNG,
    LEFT,
    WHOLE,
    WRONG,
    Anothers,
    Failed,
    Hung,
    Left,
    Wrong,
    content,
    digest,
    proof,
)
from fault_targets import BINARY, CLOSE, Garbled, accept_of, fields_of, frame, read_frame

HEAD_LIMIT = 64 * 1024
KIB = 1024
SMALL, LARGE = (1, 3 * KIB), (100 * KIB, 700 * KIB)  # bytes, from and to
PIPELINED = 4  # requests sent at once, at most
MESSAGES = 5  # of a WebSocket, at most

# Pages that blame the visitor for its request. The model's requests are well-formed, and TLS
# protects them: such a page means that the gateway has read something else. 408 is not among them,
# since a line that swallows makes a visitor slow.
BLAMING = {400, 403, 404, 411, 413, 414, 417, 421, 426, 429, 431, 501, 505}


class Site(NamedTuple):
    """A hostname, and the Line between its agent and its target."""

    hostname: str
    line: object


class Tube:
    """A visitor's TLS connection. What waits raises Hung at the deadline, Failed if it broke."""

    def __init__(self, port, hostname, context, bound=HANG_BOUND):
        self._deadline = monotonic() + bound
        self._buffer = b""
        self.ended = False  # with TLS's farewell: all that came was meant to
        sock = None
        try:
            sock = socket.create_connection(("127.0.0.1", port), self._left())
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            self._sock = context.wrap_socket(
                sock, server_hostname=hostname, suppress_ragged_eofs=False
            )
        except ssl.SSLCertVerificationError as error:
            _close(sock)
            raise Wrong(f"a certificate that is not for it: {error.verify_message}") from None
        except TimeoutError:
            _close(sock)
            raise Hung("a handshake") from None
        except OSError as error:
            _close(sock)
            raise Failed(f"no TLS connection: {_kind(error)}") from None

    def __enter__(self):
        return self

    def __exit__(self, *exc_info):
        self._sock.close()

    @property
    def port(self) -> int:
        return self._sock.getsockname()[1]

    def _left(self) -> float:
        left = self._deadline - monotonic()
        if left <= 0:
            raise TimeoutError
        return left

    def send(self, data):
        try:
            self._sock.settimeout(self._left())
            self._sock.sendall(data)
        except TimeoutError:
            raise Hung("the gateway to take bytes") from None
        except OSError as error:
            raise Failed(f"while sending: {_kind(error)}") from None

    def fill(self) -> bool:
        """Read what comes; False at the end."""
        try:
            self._sock.settimeout(self._left())
            data = self._sock.recv(64 * KIB)
        except ssl.SSLZeroReturnError:
            data = b""
        except TimeoutError:
            raise Hung("bytes of an answer") from None
        except OSError as error:
            raise Failed(f"while reading: {_kind(error)}") from None
        self.ended = not data
        self._buffer += data
        return bool(data)

    def until(self, mark, limit=HEAD_LIMIT) -> bytes:
        while (end := self._buffer.find(mark)) < 0:
            if len(self._buffer) > limit:
                raise Wrong(f"{len(self._buffer)} bytes without {mark!r}: {self._buffer[:60]!r}")
            if not self.fill():
                raise Failed("an end in the middle" if self._buffer else "an end without an answer")
        end += len(mark)
        data, self._buffer = self._buffer[:end], self._buffer[end:]
        return data

    def exactly(self, size) -> bytes:
        while len(self._buffer) < size:
            if not self.fill():
                raise Failed("an end in the middle")
        data, self._buffer = self._buffer[:size], self._buffer[size:]
        return data

    def collect(self, body, size):
        """Add ``size`` bytes to the bytearray ``body``, also as far as they come if they do not."""
        while size:
            if not self._buffer and not self.fill():
                raise Failed("an end in the middle")
            data, self._buffer = self._buffer[:size], self._buffer[size:]
            body += data
            size -= len(data)

    def collect_all(self, body):
        """Add all up to the end."""
        while True:
            body += self._buffer
            self._buffer = b""
            if not self.fill():
                return

    def half_close(self):
        """TLS's farewell, after which the peer may still send. Nothing may have come yet that is
        not read: OpenSSL would refuse to read it."""
        self._sock.setblocking(False)
        try:
            self._sock.unwrap()
        except ssl.SSLWantReadError:
            pass  # the peer's farewell is yet to come
        except (OSError, ValueError) as error:
            raise Failed(f"while ending: {_kind(error)}") from None

    def leave(self):
        """Go away with a RST."""
        self._sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        raise Left


class Asked(NamedTuple):
    """A request, and what its answer must be."""

    site: Site
    visit: str
    method: str
    path: str
    size: int  # of the answer's body
    body: bytes = b""
    minor: int = 1  # of HTTP/1.x
    chunked: bool = False

    @property
    def bytes(self) -> bytes:
        lines = [
            f"{self.method} {self.path} HTTP/1.{self.minor}",
            f"Host: {self.site.hostname}",
            f"X-Visit: {self.visit}",
            f"X-Proof: {proof(self.method, self.path, self.site.hostname, self.visit)}",
        ]
        if self.method == "POST":
            lines += [f"X-Body: {digest(self.body)}", f"X-Length: {len(self.body)}"]
            lines.append(
                "Transfer-Encoding: chunked"
                if self.chunked
                else f"Content-Length: {len(self.body)}"
            )
        return "\r\n".join([*lines, "", ""]).encode()


class Visitor:
    """One visitor, who makes one visit after the other. One thread."""

    def __init__(self, name, chance, ledger, sites, tcp_sites, line, context, *,
                 bound=HANG_BOUND, kinds=None):  # fmt: skip
        """``chance``: a seeded random.Random. ``line``: the one to the gateway. ``kinds`` of
        visits, KINDS if None."""
        self._name, self._chance, self._ledger = name, chance, ledger
        self._sites, self._tcp_sites = sites, tcp_sites
        self._line, self._context, self._bound = line, context, bound
        self._kinds = kinds or KINDS
        self._count = 0
        self._whole = False  # the last visit was

    def visit(self) -> bool:
        """Make one visit, or a few on one connection; whether the last one was whole. Raises
        nothing of the product's."""
        kind = self._chance.choice(self._kinds)
        getattr(self, f"_{kind}")()
        return self._whole

    def check(self, site) -> bool:
        """Whether a plain visit to a site is whole."""
        asked = self._asked(site, "GET", "/bytes", 1 * KIB)
        return self._judge("check", asked, lambda: self._alone(asked))

    # The kinds

    def _get(self):
        path = self._chance.choice(("/bytes", "/chunks", "/close", "/none"))
        self._one("get", path=path)

    def _download(self):
        self._one("download", path=self._chance.choice(("/bytes", "/chunks", "/close")), size=LARGE)

    def _slow(self):
        self._one("slow", path="/slow")

    def _head(self):
        self._one("head", method="HEAD")

    def _old(self):
        self._one("http/1.0", path=self._chance.choice(("/chunks", "/close", "/bytes")), minor=0,
                  size=self._chance.choice((SMALL, LARGE)))  # fmt: skip

    def _post(self):
        self._one("post", method="POST", up=SMALL, chunked=self._chance.random() < 0.5)

    def _upload(self):
        self._one("upload", method="POST", up=LARGE, chunked=self._chance.random() < 0.5)

    def _leaver(self):
        """Leaves in the middle of a download, or of an upload."""
        site = self._site()
        up = self._bytes_of(LARGE) if self._chance.random() < 0.5 else 0
        asked = self._asked(site, "POST" if up else "GET", "/bytes", self._bytes_of(LARGE), up)

        def leave():
            with self._tube(site) as tube:
                tube.send(asked.bytes + asked.body[: len(asked.body) // 2])
                if not up:
                    tube.collect(bytearray(), self._chance.randrange(1, asked.size))
                tube.leave()

        self._judge("leaver", asked, leave)

    def _kept(self):
        """Several requests on one connection, each sent when the answer before has come."""
        site = self._site()
        asked = [self._some(site) for _ in range(self._chance.randrange(2, 6))]
        self._several("keep-alive", site, asked, at_once=False)

    def _pipelined(self):
        site = self._site()
        asked = [self._some(site) for _ in range(self._chance.randrange(2, PIPELINED + 1))]
        self._several("pipelined", site, asked, at_once=True)

    def _several(self, kind, site, requests, at_once):
        """Make ``requests`` on one connection, and on a new one behind each answer that says
        ``Connection: close``: those that were sent behind it are not acted on (RFC 9112 §9.6)."""
        tubes = []

        def ask(index, asked):
            if not tubes:
                tubes.append(self._tube(site))
                if at_once:
                    tubes[0].send(b"".join(each.bytes + _body(each) for each in requests[index:]))
            if not at_once:
                tubes[0].send(asked.bytes + _body(asked))
            if self._read_answer(tubes[0], asked).get("connection") == "close":
                tubes.pop().__exit__()

        try:
            for index, asked in enumerate(requests):
                if not self._judge(kind, asked, functools.partial(ask, index, asked)):
                    for _ in requests[index + 1 :] if at_once and tubes else ():
                        self._ledger.enter(kind, FAILED, 0, "the connection ended before")
                    return
        finally:
            for tube in tubes:
                tube.__exit__()

    def _socket(self):
        """A WebSocket with a few messages, each of which comes back with the target's mark."""
        site = self._site()
        asked = self._asked(site, "GET", "/socket", 0)
        messages = [
            self._bytes_of((1, 20 * KIB)) for _ in range(self._chance.randrange(1, MESSAGES))
        ]
        key = os.urandom(16).hex().encode()

        def talk():
            with self._tube(site) as tube:
                tube.send(
                    asked.bytes[:-2] + b"Connection: Upgrade\r\nUpgrade: websocket\r\n"
                    b"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: " + key + b"\r\n\r\n"
                )
                head = tube.until(b"\r\n\r\n")
                if not head.startswith(b"HTTP/1.1 101 "):
                    read_answer(tube, asked, head)
                    raise Wrong("an answer to a WebSocket's handshake that is not 101")
                fields = check_head(head, asked)
                if fields.get("sec-websocket-accept") != accept_of(key):
                    raise Wrong("the key of another WebSocket's handshake")
                mark = f"{site.hostname} {asked.visit} ".encode()
                for number, size in enumerate(messages):
                    message = content(site.hostname, f"{asked.visit} {number}", size)
                    tube.send(frame(BINARY, message, os.urandom(4)))
                    if read_frame(tube, masked=False) != (BINARY, mark + message):
                        raise Wrong(f"message {number}: not its echo")
                tube.send(frame(CLOSE, struct.pack("!H", 1000), os.urandom(4)))
                if read_frame(tube, masked=False)[0] != CLOSE:
                    raise Wrong("a message instead of the close")

        self._judge("websocket", asked, talk)

    def _tcp(self):
        """A tcp visit: so many bytes there, perhaps a FIN, so many back, and the end."""
        site = self._chance.choice(self._tcp_sites)
        sizes = [self._bytes_of(self._chance.choice((SMALL, LARGE))) for _ in range(2)]
        asked = self._asked(site, "TCP", "", sizes[1])
        ends = self._chance.random() < 0.3
        head = (site.hostname, asked.visit, *map(str, sizes), str(int(ends)))

        def talk():
            with self._tube(site) as tube:
                self._ledger.come_on(asked.visit, self._line.connection_from(tube.port))
                tube.send(" ".join((*head, proof(*head))).encode() + b"\n")
                tube.send(content(site.hostname, f"{asked.visit} up", sizes[0]))
                if ends:
                    tube.half_close()
                received = bytearray()
                failure = None
                try:
                    tube.collect_all(received)
                except Failed as error:
                    failure = error
                line = f"{site.hostname} {asked.visit} {sizes[1]}\n".encode()
                if received.startswith(b"HTTP/1.1 ") and b"\r\n\r\n" in received:
                    # Without its agent the hostname has no mode, and is taken for one of http.
                    check_head(bytes(received), asked)
                expected = line + content(site.hostname, asked.visit, sizes[1])
                if not expected.startswith(received):
                    raise Wrong(f"{len(received)} bytes that are not its own: {received[:80]!r}")
                if failure is not None and len(received) < len(expected):
                    raise failure
                if len(received) < len(expected):
                    self._end_too_early(asked, len(received), len(expected))

        self._judge("tcp", asked, talk)

    # What they have in common

    def _site(self) -> Site:
        return self._chance.choice(self._sites)

    def _bytes_of(self, sizes) -> int:
        return self._chance.randrange(*sizes)

    def _tube(self, site) -> Tube:
        return Tube(self._line.port, site.hostname, self._context, self._bound)

    def _asked(self, site, method, path, size, up=0, **more) -> Asked:
        self._count += 1
        visit = f"{self._name}.{self._count}"
        body = content(site.hostname, f"{visit} up", up)
        if path == "/none":
            size = 0
        return Asked(site, visit, method, f"{path}?n={size}", size, body, **more)

    def _some(self, site) -> Asked:
        method, path = self._chance.choice((
            ("GET", "/bytes"), ("GET", "/chunks"), ("GET", "/none"), ("GET", "/close"),
            ("HEAD", "/bytes"), ("POST", "/bytes"),
        ))  # fmt: skip
        up = self._bytes_of(SMALL) if method == "POST" else 0
        return self._asked(site, method, path, self._bytes_of(SMALL), up)

    def _one(self, kind, method="GET", path="/bytes", size=SMALL, up=None, **more):
        """A visit with a connection of its own."""
        up = self._bytes_of(up) if up else 0
        asked = self._asked(self._site(), method, path, self._bytes_of(size), up, **more)
        self._judge(kind, asked, lambda: self._alone(asked))

    def _alone(self, asked):
        with self._tube(asked.site) as tube:
            tube.send(asked.bytes + _body(asked))
            self._read_answer(tube, asked)

    def _read_answer(self, tube, asked) -> dict:
        return read_answer(tube, asked, shortened=lambda: self._ledger.is_shortened(asked.visit))

    def _end_too_early(self, asked, size, expected):
        if self._ledger.is_shortened(asked.visit):
            raise Failed("half an answer; its target's end came too early, as scripted")
        raise Wrong(f"{size} of {expected} bytes, and an end that looks whole")

    def _judge(self, kind, asked, function) -> bool:
        """Run a visit and enter how it ended; whether it was whole."""
        began = monotonic()
        end, text = WHOLE, ""
        try:
            function()
        except Left:
            end = LEFT
        except Failed as error:
            end, text = FAILED, str(error)
        except Hung as error:
            end, text = HUNG, f"{self._told(kind, asked)}: waits for {error}"
        except (Wrong, Garbled) as error:
            end, text = WRONG, f"{self._told(kind, asked)}: {error}"
            excused = not isinstance(error, Anothers)
            if excused and self._ledger.is_altered(asked.visit, asked.site.line, began):
                end = ALTERED
        self._ledger.enter(kind, end, monotonic() - began, text, asked.visit)
        self._whole = end == WHOLE
        return self._whole

    def _told(self, kind, asked) -> str:
        return f"{kind} {asked.visit}, {asked.method} {asked.path} of {asked.site.hostname}"


KINDS = (
    "get", "get", "get", "download", "slow", "head", "old", "post", "upload", "leaver", "kept",
    "kept", "pipelined", "socket", "tcp", "tcp",
)  # fmt: skip


def _body(asked) -> bytes:
    if not asked.chunked:
        return asked.body
    middle = len(asked.body) // 2
    pieces = [piece for piece in (asked.body[:middle], asked.body[middle:]) if piece]
    return b"".join(b"%x\r\n%b\r\n" % (len(piece), piece) for piece in pieces) + b"0\r\n\r\n"


def check_head(head, asked) -> dict:
    """The fields of an answer's head. Raises Failed if it is a page that shows the failure, Wrong
    if it is not this visit's."""
    match = re.match(rb"HTTP/1\.1 ([1-5][0-9][0-9]) [ -~]*\r\n", head)
    if match is None:
        raise Wrong(f"a head {head[:80]!r}")
    status, fields = int(match[1]), fields_of(head)
    if "x-gotunnel-error" in fields:
        word = f"page {status} {fields['x-gotunnel-error']}"
        # "bad-answer" is true if bytes of the target were altered, which the caller finds out.
        blames = status in BLAMING and asked.method != "TCP"
        if blames or status < 400 or fields["x-gotunnel-error"] == "bad-answer":
            raise Wrong(word)
        raise Failed(word)
    names = fields.get("x-target", ""), fields.get("x-visit", "")
    if names != (asked.site.hostname, asked.visit) and fields.get("x-names") == proof(*names):
        raise Anothers(f"the answer of {names[0]} to {names[1]}")
    if fields.get("x-visit") != asked.visit:
        raise Wrong(f"the answer to {fields.get('x-visit')!r}: {head[:200]!r}")
    if fields.get("x-target") != asked.site.hostname:
        raise Wrong(f"an answer of {fields.get('x-target')}")
    return fields


def read_answer(tube, asked, head=None, shortened=lambda: False) -> dict:
    """Read one answer, check it, and return its fields. ``head``: if it was read already.
    ``shortened()``: whether a script has ended this visit's connection to its target too early.
    Raises Failed, Wrong, Hung."""
    head = head or tube.until(b"\r\n\r\n")
    fields = check_head(head, asked)
    status = int(head[9:12])
    if status != (204 if asked.path.startswith("/none") else 200):
        raise Wrong(f"status {status}")
    if asked.method == "POST" and fields.get("x-received") != digest(asked.body):
        raise Wrong("the answer to another body")
    expected = content(asked.site.hostname, asked.visit, asked.size)
    if asked.method == "HEAD" or status == 204:
        if asked.method == "HEAD" and fields.get("content-length") != str(asked.size):
            raise Wrong(f"Content-Length {fields.get('content-length')}, expected {asked.size}")
        return fields
    body = bytearray()
    try:
        read_body(tube, fields, body)
    except Failed:
        if not expected.startswith(body):
            raise Wrong(f"a part of a body that is not its own: {bytes(body[:60])!r}") from None
        raise
    if not expected.startswith(body):
        raise Wrong(f"a body of {len(body)} bytes that is not its own: {bytes(body[:60])!r}")
    if len(body) < len(expected):
        if asked.path.startswith("/close") and shortened():
            raise Failed("half an answer; its target's end came too early, as scripted")
        raise Wrong(f"{len(body)} of {len(expected)} bytes, and an end that looks whole")
    return fields


def read_body(tube, fields, body):
    """Add an answer's body to the bytearray ``body``, as far as it comes."""
    if fields.get("transfer-encoding") == "chunked":
        while True:
            line = tube.until(b"\r\n", 100)
            if not re.fullmatch(rb"[0-9A-Fa-f]{1,8}\r\n", line):
                raise Wrong(f"a chunk's size {line!r}")
            if not (size := int(line, 16)):
                break
            tube.collect(body, size)
            if tube.exactly(2) != b"\r\n":
                raise Wrong("a chunk without its end")
        while tube.until(b"\r\n") != b"\r\n":
            pass  # trailers
    elif "content-length" in fields:
        tube.collect(body, int(fields["content-length"]))
    else:
        tube.collect_all(body)


def _close(sock):
    if sock is not None:
        sock.close()


def _kind(error) -> str:
    if isinstance(error, ConnectionResetError):
        return "reset"
    if isinstance(error, ssl.SSLEOFError):
        return "an end without TLS's farewell"
    if isinstance(error, ssl.SSLError):
        return f"TLS: {error.reason}"
    return type(error).__name__
