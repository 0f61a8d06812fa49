"""Serves the files of a folder by HTTP on a port of this machine, for `gotunnel files`.

Only the tunnel is answered. Its requests carry a Host that this process has drawn at random (the
tunnel's host_header). Without it another user of the machine, or a web page in a browser here (DNS
rebinding), could read the folder past the password that the gateway asks for.

What is served lies in the folder. The path of a request is taken apart, each part is checked, and
what it leads to by symlinks must lie in the folder, too. The file is then opened part by part,
without symlinks, so that nothing can be exchanged between check and open. Hidden files, whose names
begin with a dot, are served with ``hidden`` only, and devices, pipes and sockets never.

The head of a request is parsed by Python's http.server, one request a connection: a connection that
waits for the next one would hold a thread. Methods are GET and HEAD, with conditions (RFC 9110 §13)
and one byte range (§14); a request for several ranges gets the whole file, as §14.2 allows.

Every program of this machine can connect to the port. So a connection gets a thread only with a
whole head (common/arrivals.py), and no program can hold those that the tunnel's requests need.

Threads:

    thread   how many           does                                ends when
    files    1                  accepts connections, reads heads    close()
    file_N   at most MOST_SENT  one request, and the file's bytes   the answer is sent
"""

from __future__ import annotations

import codecs
import contextlib
import email.utils
import errno
import html
import io
import itertools
import logging
import mimetypes
import os
import re
import secrets
import selectors
import socket
import stat
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler
from time import gmtime, monotonic, strftime, time
from typing import Any, NamedTuple
from urllib.parse import quote, unquote_to_bytes

from gotunnel import Waker, spawn

from ..common.arrivals import Address, Arrivals, has_head
from ..common.one_line import on_one_line
from ..common.process import Stopped, Workers

log = logging.getLogger("gotunnel.folder")

LOOPBACK = "127.0.0.1"
BACKLOG = 128  # connections that wait to be accepted
MOST_SENT = 256  # answers at a time, each with a thread; further requests wait for a thread
# Seconds that a request may have waited for a thread. Then it gets 503 at once: its visitor has
# most likely gone.
MOST_WAITED = 20
HEAD_TIMEOUT = 10  # seconds for the head of a request, which the gateway sends whole
MOST_HEAD = 128 * 1024  # bytes of a head; the gateway passes on 64 KiB, and adds a few fields
# Seconds without progress in an answer. Longer than the agent's stall_timeout may be, so that the
# agent decides, and says why.
SEND_TIMEOUT = 24 * 3600
# A request's body is not wanted. So much of it is read, and so long, before the connection is
# closed: with unread bytes the kernel would send a reset, and the answer could be lost.
MOST_DRAINED, DRAIN_TIME = 1024 * 1024, 2
LAST_WORDS = 1  # seconds that the threads have to end
MOST_LISTED = 10_000  # entries of a folder on its page
# The page of a large folder takes 0.1 s of CPU time and a megabyte: a few visitors that reload it
# could stop all other visits. So it is kept KEPT_FACTOR times as long as making it has taken, up to
# MOST_KEPT seconds, if that was COSTLY seconds or more. The pages of KEPT_PAGES folders are kept.
COSTLY, KEPT_FACTOR, MOST_KEPT, KEPT_PAGES = 0.02, 10, 5, 4
INDEX = "index.html"
SNIFFED = 1024  # bytes of a file without a known ending that are looked at: are they text?

# Python's table is short, and the system's may be wrong (a registry of Windows often says
# text/plain for .js, which browsers then do not run).
TYPES = {
    ".avif": "image/avif",
    ".flac": "audio/flac",
    ".gz": "application/gzip",
    ".ico": "image/vnd.microsoft.icon",
    ".ipynb": "application/json",
    ".js": "text/javascript",
    ".log": "text/plain",
    ".m4a": "audio/mp4",
    ".map": "application/json",
    ".md": "text/markdown",
    ".mjs": "text/javascript",
    ".mkv": "video/x-matroska",
    ".ogg": "audio/ogg",
    ".opus": "audio/ogg",
    ".otf": "font/otf",
    ".toml": "text/plain",
    ".ttf": "font/ttf",
    ".wasm": "application/wasm",
    ".webm": "video/webm",
    ".webmanifest": "application/manifest+json",
    ".webp": "image/webp",
    ".woff": "font/woff",
    ".woff2": "font/woff2",
    ".xz": "application/x-xz",
    ".yaml": "text/plain",
    ".yml": "text/plain",
    ".7z": "application/x-7z-compressed",
}
ENCODED = {"gzip": "application/gzip", "bzip2": "application/x-bzip2", "xz": "application/x-xz"}
UNKNOWN = "application/octet-stream"

_RANGE = re.compile(r"bytes\s*=\s*([0-9]{0,18})\s*-\s*([0-9]{0,18})", re.ASCII | re.IGNORECASE)
_TAG = re.compile(r'(?:W/)?"[^"]*"')
# Opening a file part by part needs both; Windows has neither.
_BY_PARTS = os.open in os.supports_dir_fd and hasattr(os, "O_NOFOLLOW")
# No wait for the writer of a FIFO; Windows opens a file as text without O_BINARY.
_FLAGS = os.O_RDONLY | sum(getattr(os, n, 0) for n in ("O_NONBLOCK", "O_CLOEXEC", "O_BINARY"))
_ON_WINDOWS = os.name == "nt"

PAGE = """\
<!doctype html>
<html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>{title}</title>
<style>
:root {{ color-scheme: light dark; font: 16px/1.5 system-ui, sans-serif }}
body {{ max-width: 60rem; margin: 2rem auto; padding: 0 1rem }}
h1 {{ font-size: 1.25rem; overflow-wrap: anywhere }}
table {{ width: 100%; border-collapse: collapse }}
td {{ padding: .25rem .5rem; border-top: 1px solid #8884; white-space: nowrap }}
td:first-child {{ width: 100%; white-space: normal; overflow-wrap: anywhere }}
td:nth-child(2) {{ text-align: right }}
@media (max-width: 30rem) {{ td:nth-child(3) {{ display: none }} }}
</style>
<h1>{title}</h1>
{body}
</html>
"""
ERROR = PAGE.format(title="%(code)d %(message)s", body="<p>%(explain)s</p>").replace(
    "width: 100%", "width: 100%%"
)
# For visitors; Python's words speak of URIs. The others are for programs.
WORDS = {
    HTTPStatus.NOT_FOUND: "There is no such file or folder here.",
    HTTPStatus.FORBIDDEN: "This file or folder cannot be read.",
    HTTPStatus.METHOD_NOT_ALLOWED: "Files are here for reading.",
    HTTPStatus.SERVICE_UNAVAILABLE: "Too much is asked for at the moment. Please try again.",
}


class NotServed(Exception):
    """A path leads to nothing that is served; ``status`` is the answer's."""

    def __init__(self, status: HTTPStatus = HTTPStatus.NOT_FOUND):
        super().__init__(status.phrase)
        self.status = status


class Entry(NamedTuple):
    """A line of a folder's page. ``size`` is in bytes, ``changed`` in seconds since 1970."""

    name: str
    is_folder: bool
    size: int
    changed: float


class Found(NamedTuple):
    """What a path leads to: a folder, or an open file."""

    status: os.stat_result
    file: io.FileIO | None  # None: it is a folder


class Root:
    """The folder that is shared. Any thread."""

    def __init__(self, folder: str, *, hidden: bool):
        self._folder = os.path.abspath(folder)
        self._hidden = hidden

    @property
    def path(self) -> str:
        """The real one, at the moment: the folder may be a link that leads to another one later."""
        return os.path.realpath(self._folder)

    def find(self, parts: list[str]) -> Found:
        """What lies at a path below the folder; a file is to be closed. Raises NotServed."""
        try:
            top = self.path
            descriptor, real = self._open(top, self._real_parts(top, parts))
            try:
                status = os.stat(real) if descriptor is None else os.fstat(descriptor)
                if stat.S_ISREG(status.st_mode) and descriptor is not None:
                    file = io.FileIO(descriptor, "rb")
                    descriptor = None
                    return Found(status, file)
                if stat.S_ISDIR(status.st_mode):
                    return Found(status, None)
            finally:
                if descriptor is not None:
                    os.close(descriptor)
        except PermissionError:
            raise NotServed(HTTPStatus.FORBIDDEN) from None
        except OSError as error:
            if error.errno in (errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EIO):
                log.warning("%s: %s", on_one_line("/".join(parts)), error.strerror)
                raise NotServed(HTTPStatus.SERVICE_UNAVAILABLE) from None
            raise NotServed from None  # there is none, its name is too long, symlinks in a circle
        raise NotServed  # a device, a pipe, a socket

    def entries(self, parts: list[str]) -> Iterator[Entry]:
        """What find() would serve in a folder, in no order. Raises OSError, NotServed."""
        top = self.path
        # By its descriptor: a symlink that has come to its path meanwhile may lead out of here.
        descriptor, real = self._open(top, self._real_parts(top, parts))
        with contextlib.ExitStack() as stack:
            if descriptor is not None:
                stack.callback(os.close, descriptor)
            scan = stack.enter_context(os.scandir(real if descriptor is None else descriptor))
            for entry in scan:
                if not self._may_be_asked_for(entry.name):
                    continue
                with contextlib.suppress(OSError, NotServed):  # it is not served, or just gone
                    status = entry.stat(follow_symlinks=False)
                    if stat.S_ISLNK(status.st_mode):
                        inner = self._real_parts(top, [*parts, entry.name])
                        status = os.lstat(os.path.join(top, *inner))
                    is_folder = stat.S_ISDIR(status.st_mode)
                    if is_folder or stat.S_ISREG(status.st_mode):
                        yield Entry(entry.name, is_folder, status.st_size, status.st_mtime)

    def _real_parts(self, top: str, parts: list[str]) -> list[str]:
        """The path below the folder ``top`` that ``parts`` lead to, without symlinks. Raises
        NotServed, OSError."""
        if not all(map(self._may_be_asked_for, parts)):
            raise NotServed
        real = os.path.realpath(os.path.join(top, *parts))
        if os.path.normcase(real) == os.path.normcase(top):
            return []
        inside = top.rstrip(os.sep) + os.sep  # how each path in it begins
        if not os.path.normcase(real).startswith(os.path.normcase(inside)):
            raise NotServed  # a symlink out of the folder
        found = real[len(inside) :].split(os.sep)
        if not all(map(self._may_be_asked_for, found)):
            raise NotServed  # a symlink to a hidden file, or a short name (GIT~1) of Windows
        return found

    def _may_be_asked_for(self, part: str) -> bool:
        if part in ("", ".", "..") or "/" in part or os.sep in part or "\0" in part:
            return False
        # A colon is a drive or another stream of a file; Windows drops a dot or space at the end.
        if _ON_WINDOWS and (":" in part or part[-1] in ". "):
            return False
        return self._hidden or not part.startswith(".")

    def _open(self, top: str, parts: list[str]) -> tuple[int | None, str]:
        """A descriptor of what lies there, and its path; None for a folder that this system does
        not open. Raises OSError, also if a symlink has come there meanwhile, and NotServed.

        What is neither file nor folder is not even opened: that would wake the writer of a FIFO,
        and break its pipe, rewind a tape or start a watchdog."""
        real = os.path.join(top, *parts)
        if not _BY_PARTS:
            return (None, real) if os.path.isdir(real) else (os.open(real, _FLAGS), real)
        descriptor = os.open(top, _FLAGS)
        for part in parts:
            try:
                kind = os.stat(part, dir_fd=descriptor, follow_symlinks=False).st_mode
                if not (stat.S_ISREG(kind) or stat.S_ISDIR(kind)):
                    raise NotServed
                inner = os.open(part, _FLAGS | os.O_NOFOLLOW, dir_fd=descriptor)
            finally:
                os.close(descriptor)
            descriptor = inner
        return descriptor, real


class Listings:
    """The pages of folders that took long to make, for a moment. Any thread."""

    def __init__(self) -> None:
        self._kept: OrderedDict[tuple[str, ...], _Listing] = OrderedDict()  # the latest one last
        self._lock = threading.Lock()  # guards _kept

    def get(self, parts: list[str], make: Callable[[], bytes]) -> bytes:
        """The page of a folder; ``make()`` makes it, and may raise. Of many threads that want the
        same page at once, one makes it."""
        key = tuple(parts)
        with self._lock:
            listing = self._kept.setdefault(key, _Listing())
            self._kept.move_to_end(key)
            if len(self._kept) > KEPT_PAGES:
                self._kept.popitem(last=False)
        with listing.lock:
            began = monotonic()
            if began >= listing.ends:
                listing.page = page = make()
                took = monotonic() - began
                if took < COSTLY:
                    listing.page = b""
                    return page
                listing.ends = began + took + min(KEPT_FACTOR * took, MOST_KEPT)
            return listing.page


class _Listing:
    """A page, and until when it is kept. The lock guards both."""

    def __init__(self) -> None:
        self.lock = threading.Lock()  # held while the page is made
        self.page, self.ends = b"", 0.0


class FolderServer:
    """An HTTP server of one folder, on a free port of this machine."""

    def __init__(self, folder: str, *, hidden: bool = False):
        """Listens from now on, and answers when start() was called. Raises OSError."""
        self.root = Root(folder, hidden=hidden)
        self.listings = Listings()
        self.host = f"{secrets.token_hex(16)}.invalid"  # the Host of requests that are answered
        self._listening = socket.create_server((LOOPBACK, 0), backlog=BACKLOG)
        self._listening.setblocking(False)
        self.port: int = self._listening.getsockname()[1]
        self._waker = Waker()
        self._stopping = False
        self._thread: threading.Thread | None = None
        self._workers = Workers(MOST_SENT, "file")

    def start(self) -> None:
        """Raises NoThread."""
        self._workers.prepare()
        self._thread = spawn("files", self._accept_all)

    def close(self) -> None:
        """Accept no more. Answers that are being sent end with their visits."""
        self._stopping = True
        self._waker.wake()
        if self._thread is not None:
            self._thread.join()
        self._listening.close()
        self._waker.close()
        self._workers.shutdown(LAST_WORDS)

    def _accept_all(self) -> None:
        with selectors.DefaultSelector() as selector:
            selector.register(self._waker, selectors.EVENT_READ)
            arrivals = Arrivals(selector, [self._listening], self._pass_on, HEAD_TIMEOUT, MOST_HEAD)
            with contextlib.closing(arrivals):
                while not self._stopping:
                    for key, _ in selector.select(arrivals.left()):
                        arrivals.take(key.fileobj)
                    arrivals.end_late()

    def _pass_on(self, sock: socket.socket, address: Address, head: bytes) -> None:
        if not has_head(head):  # http.server would take it for a whole one
            return sock.close()
        try:
            self._workers.submit(self._serve, sock, address, head, monotonic())
        except Stopped:
            sock.close()

    def _serve(self, sock: socket.socket, address: Address, head: bytes, since: float) -> None:
        with contextlib.closing(sock), contextlib.suppress(OSError):  # the visitor has left
            sock.setblocking(True)
            late = monotonic() - since > MOST_WAITED
            (_LateRequest if late else _Request)(sock, address, self, head)


class _Request(BaseHTTPRequestHandler):
    """One connection with one request. http.server makes it a call of ``do_METHOD``."""

    protocol_version = "HTTP/1.1"
    timeout = SEND_TIMEOUT
    server_version, sys_version = "gotunnel", ""
    error_message_format, error_content_type = ERROR, "text/html; charset=utf-8"
    server: Any  # the FolderServer

    def __init__(self, sock: socket.socket, address: Address, server: FolderServer, head: bytes):
        self._head = head
        super().__init__(sock, address, server)  # type: ignore[arg-type]  # is no BaseServer

    def setup(self) -> None:
        super().setup()
        self.rfile.close()
        self.rfile = io.BytesIO(self._head)

    def parse_request(self) -> bool:
        if not super().parse_request():
            return False
        if self._is_the_tunnels():
            return True
        self._refuse(HTTPStatus.MISDIRECTED_REQUEST)
        return False

    def _is_the_tunnels(self) -> bool:
        return self.headers.get_all("Host") == [self.server.host]

    def do_GET(self) -> None:
        try:
            self._answer()
        except NotServed as error:
            self._refuse(error.status)

    do_HEAD = do_GET

    def do_POST(self) -> None:
        self._refuse(HTTPStatus.METHOD_NOT_ALLOWED)

    do_PUT = do_DELETE = do_PATCH = do_OPTIONS = do_POST

    def _answer(self) -> None:
        path, question, query = self.path.partition("?")
        if not path.startswith("/"):
            raise NotServed(HTTPStatus.BAD_REQUEST)
        root: Root = self.server.root
        parts, is_named_as_folder = parts_of(path)
        found = root.find(parts)
        if found.file is not None:
            with found.file:
                if is_named_as_folder:
                    raise NotServed
                self._send_file(found.file, found.status, parts[-1])
            return
        if not is_named_as_folder:
            location = "/" + "".join(f"{quote(os.fsencode(part))}/" for part in parts)
            # Not a permanent one: a file may come to stand there.
            location += question + query
            self._begin(HTTPStatus.TEMPORARY_REDIRECT, 0, {"Location": location})
            return
        with contextlib.suppress(NotServed):
            index = root.find([*parts, INDEX])
            if index.file is not None:
                with index.file:
                    self._send_file(index.file, index.status, INDEX)
                return
        self._send_listing(root, parts)

    def _send_file(self, file: io.FileIO, status: os.stat_result, name: str) -> None:
        size, changed = status.st_size, int(status.st_mtime)
        # Strong validators, for ranges: what has these numbers in common has the same bytes.
        tag = f'"{size:x}-{status.st_mtime_ns:x}-{status.st_ctime_ns:x}"'
        fields = {
            "ETag": tag,
            "Last-Modified": email.utils.formatdate(max(0, changed), usegmt=True),
            "Accept-Ranges": "bytes",
        }
        outcome = _condition(self.headers, tag, changed)
        if outcome == HTTPStatus.NOT_MODIFIED:
            self._begin(outcome, None, fields)
            return
        if outcome is not None:
            raise NotServed(outcome)
        start, end, code = 0, size, HTTPStatus.OK
        if self.command == "GET" and _range_counts(self.headers, tag, fields["Last-Modified"]):
            chosen = byte_range(self.headers.get("Range", ""), size)
            if chosen is not None:
                start, end = chosen
                if start >= end:
                    fields["Content-Range"] = f"bytes */{size}"
                    self._begin(HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE, 0, fields)
                    return
                fields["Content-Range"] = f"bytes {start}-{end - 1}/{size}"
                code = HTTPStatus.PARTIAL_CONTENT
        fields["Content-Type"] = type_of(name) or (
            "text/plain; charset=utf-8" if _looks_like_text(file) else UNKNOWN
        )
        self._begin(code, end - start, fields)
        if self.command == "GET" and end > start:
            sent = self.connection.sendfile(file, start, end - start)
            if sent < end - start:
                # The connection closes too soon, by which the gateway sees that bytes are missing.
                log.warning("%s has become shorter while it was sent", on_one_line(self.path))

    def _send_listing(self, root: Root, parts: list[str]) -> None:
        try:
            content = self.server.listings.get(parts, lambda: _page(root, parts))
        except PermissionError:
            raise NotServed(HTTPStatus.FORBIDDEN) from None
        except OSError:
            raise NotServed from None
        self._begin(HTTPStatus.OK, len(content), {"Content-Type": self.error_content_type})
        if self.command == "GET":
            self.wfile.write(content)

    def _begin(self, code: HTTPStatus, length: int | None, fields: dict[str, str]) -> None:
        self.send_response(code)
        for name, value in fields.items():
            self.send_header(name, value)
        if length is not None:
            self.send_header("Content-Length", str(length))
        self._end_head()

    def _refuse(self, code: HTTPStatus) -> None:
        words = WORDS.get(code, code.description)
        page = (ERROR % {"code": code, "message": code.phrase, "explain": words}).encode()
        self.send_response(code)
        if code == HTTPStatus.METHOD_NOT_ALLOWED:
            self.send_header("Allow", "GET, HEAD")
        self.send_header("Content-Type", self.error_content_type)
        self.send_header("Content-Length", str(len(page)))
        self._end_head()
        if self.command != "HEAD":
            self.wfile.write(page)

    def _end_head(self) -> None:
        # The visitor's browser asks each time whether a file has changed, which costs no body.
        self.send_header("Cache-Control", "no-cache")
        self.send_header("X-Content-Type-Options", "nosniff")
        self.send_header("Connection", "close")
        self.end_headers()

    def handle_expect_100(self) -> bool:
        return True  # no body is wanted, so the answer comes at once

    def finish(self) -> None:
        super().finish()
        if getattr(self, "headers", None) and self._is_the_tunnels() and self._has_body():
            self.connection.shutdown(socket.SHUT_WR)
            self.connection.settimeout(DRAIN_TIME)
            deadline, left = monotonic() + DRAIN_TIME, MOST_DRAINED
            while left > 0 and monotonic() < deadline:
                if not (data := self.connection.recv(64 * 1024)):
                    return
                left -= len(data)

    def _has_body(self) -> bool:
        return "Transfer-Encoding" in self.headers or self.headers.get("Content-Length", "0") != "0"

    def log_message(self, format: str, *arguments: object) -> None:
        log.debug("files: %s", on_one_line(format % arguments))


class _LateRequest(_Request):
    """One that has waited for too long."""

    def _answer(self) -> None:
        raise NotServed(HTTPStatus.SERVICE_UNAVAILABLE)


def parts_of(path: str) -> tuple[list[str], bool]:
    """The names in a request's path, decoded, and whether it ends with a slash. Raises
    NotServed."""
    *texts, last = path.split("/")[1:]
    if last:
        texts.append(last)
    try:
        return [os.fsdecode(unquote_to_bytes(text)) for text in texts], not last
    except UnicodeDecodeError:  # on Windows, where each name is valid UTF-16
        raise NotServed from None


def byte_range(text: str, size: int) -> tuple[int, int] | None:
    """Begin and end of the bytes that a Range field asks for, of a file of ``size`` bytes. None: it
    asks for several ranges, or is not valid, and is ignored. Without a byte in it: there are none
    (416)."""
    match = _RANGE.fullmatch(text.strip())
    if match is None or not (match[1] or match[2]):
        return None
    if not match[1]:  # the last bytes
        return max(0, size - int(match[2])), size
    start = int(match[1])
    if not match[2]:
        return start, size
    last = int(match[2])
    return None if last < start else (start, min(last + 1, size))


def _range_counts(fields: Any, tag: str, changed: str) -> bool:
    """Whether the Range field applies (If-Range, RFC 9110 §13.1.5)."""
    condition = fields.get("If-Range", "").strip()
    if not condition:
        return True
    if condition.startswith('"'):
        return bool(condition == tag)
    # A date is a strong validator only if the file was older than a second (§8.8.2.2).
    instant = _instant(condition)
    return bool(condition == changed) and instant is not None and time() - instant > 1


def _condition(fields: Any, tag: str, changed: int) -> HTTPStatus | None:
    """The answer to a request whose conditions do not hold (RFC 9110 §13.2.2); None if they do."""
    if (match := fields.get("If-Match")) is not None:
        if not _names(match, tag, weak=False):
            return HTTPStatus.PRECONDITION_FAILED
    elif (instant := _instant(fields.get("If-Unmodified-Since"))) is not None:
        if changed > instant:
            return HTTPStatus.PRECONDITION_FAILED
    if (match := fields.get("If-None-Match")) is not None:
        return HTTPStatus.NOT_MODIFIED if _names(match, tag, weak=True) else None
    instant = _instant(fields.get("If-Modified-Since"))
    return HTTPStatus.NOT_MODIFIED if instant is not None and changed <= instant else None


def _names(field: str, tag: str, *, weak: bool) -> bool:
    """Whether a list of entity tags has ``tag``."""
    if field.strip() == "*":
        return True
    tags = _TAG.findall(field)
    return tag in tags or weak and f"W/{tag}" in tags


def _instant(text: str | None) -> float | None:
    """The seconds since 1970 of an HTTP date; None if it is none."""
    try:
        return email.utils.parsedate_to_datetime(text or "").timestamp()
    except (TypeError, ValueError, OverflowError):
        return None


_python_types = mimetypes.MimeTypes()  # Python's own, without the files and registry of the system


def type_of(name: str) -> str:
    """The Content-Type by a file's name; "" if its ending says nothing."""
    ending = os.path.splitext(name)[1].lower()
    kind = TYPES.get(ending)
    if kind is None:
        guessed, encoding = _python_types.guess_type(f"name{ending}")
        kind = ENCODED.get(encoding or "", guessed or "")
    return f"{kind}; charset=utf-8" if kind.startswith("text/") else kind


def _looks_like_text(file: io.FileIO) -> bool:
    """Whether a file begins with text in UTF-8, as README and Makefile do."""
    start = file.read(SNIFFED) or b""
    file.seek(0)
    try:
        codecs.getincrementaldecoder("utf-8")().decode(start)  # its last character may be cut
    except UnicodeDecodeError:
        return False
    return bool(start) and b"\0" not in start


def _page(root: Root, parts: list[str]) -> bytes:
    """Raises OSError, NotServed."""
    entries = list(itertools.islice(root.entries(parts), MOST_LISTED))
    return listing(parts, entries).encode("utf-8", "replace")


def listing(parts: list[str], entries: list[Entry]) -> str:
    """The page of a folder: its entries, folders first."""
    rows = [_row("../", "..", "", "")] if parts else []
    for entry in sorted(entries, key=lambda e: (not e.is_folder, e.name.casefold(), e.name)):
        slash = "/" if entry.is_folder else ""
        rows.append(_row(
            quote(os.fsencode(entry.name)) + slash,
            entry.name + slash,
            "" if entry.is_folder else _size(entry.size),
            strftime("%Y-%m-%d %H:%M", gmtime(max(0, entry.changed))),
        ))  # fmt: skip
    body = f"<table>{''.join(rows)}</table>" if rows else "<p>This folder is empty.</p>"
    if len(entries) == MOST_LISTED:
        body += f"\n<p>Only {MOST_LISTED} entries are shown.</p>"
    return PAGE.format(title=html.escape("/" + "".join(f"{part}/" for part in parts)), body=body)


def _row(link: str, name: str, size: str, changed: str) -> str:
    # "./": a name with a colon would else be taken for a scheme.
    return (
        f'<tr><td><a href="./{html.escape(link)}">{html.escape(name)}</a></td>'
        f"<td>{size}</td><td>{changed}</td></tr>\n"
    )


def _size(count: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"
