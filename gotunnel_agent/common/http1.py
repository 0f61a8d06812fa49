"""Parses and writes HTTP/1.1: heads, hostnames, hop-by-hop fields, body framing (RFC 9110, 9112).

Bytes come in, values go out; no socket, no clock, no thread. One message is read like this:

    end = head_end(buffer)              -1: read more, then ask again
    request = parse_request(buffer[:end])
    name = hostname(request)            the hostname that the request is for
    body = request_body(request)        None, or a decoder to feed with the bytes after the head

The rule for requests: a message that two readers could read differently is refused, because the
gateway is one reader and the target behind it is another. If a request ends at one place for the
first and at another for the second, it carries a second request that only one of them sees
("request smuggling", RFC 9112 §11.2). So a message has one length or none, lines end in CRLF and
nothing else, and a field name is a token.

The rule for answers is softer, since many targets break the strict one without harm. An answer that
breaks it, but can be read in one way only, is accepted and marked ``loose``; the gateway writes it
to the visitor in correct form. But a target that is careless with line ends may be careless with
message ends, so its connection is not used again.

The promise: whatever bytes come, these functions raise Malformed or nothing.

Text is latin-1 throughout, so each byte is one character and goes out as it came in.
"""

import ipaddress
import re
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

from .hostnames import MAX_HOSTNAME, REQUESTED_NAME

# Bytes of a head with its blank line, and of a trailer section. More than common targets take
# (Tomcat 8 KiB, Node 16 KiB, nginx 32 KiB), so that the target decides; still little memory.
HEAD_LIMIT = 65536
# Fields in a head, or in a trailer section: browsers send 20, Apache takes 100.
FIELD_LIMIT = 200
# Bytes of a request target: RFC 9112 §3 asks for 8000 at least; nginx and Apache take this much.
TARGET_LIMIT = 8192
# Bytes of a chunk-size line. The size needs 16; the rest is room for chunk extensions.
CHUNK_LINE_LIMIT = 4096
# Bytes of overhead that a chunked body may have. Each chunk adds the length of its chunk line minus
# CHUNK_SPARE and minus twice its payload. We ignore extensions, so a body of extensions alone would
# be endless work (CVE-2023-39326; the numbers are Go's).
CHUNK_EXCESS = 16 * 1024
CHUNK_SPARE = 16
# Pieces of a body that feed() returns one by one. More are joined: each piece costs the caller a
# write.
MOST_PIECES = 16
# Characters of the peer's text that an error message repeats: enough to recognise it.
SHOWN_LIMIT = 40

_TCHAR = r"[!#$%&'*+\-.^_`|~0-9A-Za-z]"  # RFC 9110 §5.6.2
_TOKEN = re.compile(f"{_TCHAR}+")
_ODD = re.compile(r"[^0-9a-z]")  # in a name, see plain_name()
# Visible ASCII without "#", the fragment; and bytes that may be UTF-8, see _read_utf8.
_TARGET = re.compile(r"[!-\"$-~\x80-\xff]+")
_WHITE_SPACE = re.compile(r"\s")  # as Unicode has it
_NOT_ASCII = re.compile(r"[^\x00-\x7f]")
_MINOR = {"HTTP/1.1": 1, "HTTP/1.0": 0}
_VERSION = re.compile(r"HTTP/[0-9]\.[0-9]")
# RFC 9110 §15 defines statuses up to 599, and asks readers to accept higher ones.
_STATUS_LINE = re.compile(r"([^ ]+) ([1-9][0-9][0-9])(?: (.*))?")
_ABSOLUTE_FORM = re.compile(r"https?://([^/?]+)(/[^?]*)?(\?.*)?", re.IGNORECASE)
_AUTHORITY_FORM = re.compile(r"[^/?]+:[0-9]+")
_AUTHORITY = re.compile(rf"(\[[0-9A-Fa-f:.]+\]|{REQUESTED_NAME})(?::([0-9]{{0,5}}))?")
# One field line without the white space around its value. Only for text that _check_text has
# checked: there nothing can fail after the colon, and "^" keeps a search from starting inside a
# line, so the cost of a bad line is linear in its length, not quadratic.
_FIELD_LINE = re.compile(rf"^({_TCHAR}+):[ \t]*(.*[^ \t\r\n])?[ \t]*\r\n", re.MULTILINE)
# The name of a field whose value is folded into the next line.
_FOLDED_NAME = re.compile(rf"^({_TCHAR}+):.*\r\n(?=[ \t])", re.MULTILINE)
# 18 digits stay below 2**63, where other readers overflow.
_CONTENT_LENGTH = re.compile(r"[0-9]{1,18}")
# chunk-size and chunk-ext (RFC 9112 §7.1); 16 hex digits fill 64 bits, where other readers wrap.
_QUOTED = r'"(?:[\t !#-\[\]-~\x80-\xff]|\\[\t -~\x80-\xff])*"'
_EXTENSION = rf"[ \t]*;[ \t]*{_TCHAR}+(?:[ \t]*=[ \t]*(?:{_TCHAR}+|{_QUOTED}))?"
_CHUNK = rf"([0-9A-Fa-f]{{1,16}})(?:{_EXTENSION})*"
_CHUNK_LINE = re.compile(rf"{_CHUNK}\r\n".encode("latin-1"))
_PLAIN_CHUNK_LINE = re.compile(rb"([0-9A-Fa-f]{1,8})\r\n")
# In answers: old Apaches and IIS pad the size with blanks, other servers end lines in LF.
_LOOSE_CHUNK_LINE = re.compile(rf"{_CHUNK}[ \t]*\r?\n".encode("latin-1"))

# The bytes of a head besides its line ends: HTAB, visible ASCII, obs-text (RFC 9110 §5.5).
_TEXT = bytes(byte for byte in range(256) if byte == 9 or byte >= 32 and byte != 127)
_BLANK_LINE = re.compile(rb"\n\r?\n")  # of an answer, with the end of the line before it
# Where a value is folded into the next line (obs-fold, RFC 9112 §5.2). A next line of blanks alone
# is not a fold: some readers take it for the blank line.
_FOLD = re.compile(r"\r\n[ \t]+(?=[^ \t\r\n])")
_NOT_TEXT = re.compile(rb"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f]|\r(?!\n)|(?<!\r)\n")

# Hop-by-hop fields: they concern one connection and are not passed on (RFC 9110 §7.6.1).
HOP_BY_HOP = frozenset({
    "connection", "keep-alive", "proxy-connection", "te", "transfer-encoding", "upgrade",
    # A length is framing too, and a message that is passed on is framed anew.
    "content-length",
    # Credentials between a visitor and its own proxy, which a target must not see.
    "proxy-authenticate", "proxy-authorization",
    # Without it a target must not switch to h2c (RFC 7540 §3.2), which we do not speak.
    "http2-settings",
})  # fmt: skip

# Fields that say where a message ends.
FRAMING = frozenset({"content-length", "transfer-encoding"})

# Fields that a Connection field must not remove and a trailer must not add: they name the
# recipient, the sender and the content. Names are in the form of kind(), as in all sets here.
ESSENTIAL = frozenset({
    "host", "authorization", "cookie", "set-cookie", "origin", "referer", "forwarded", "x-real-ip",
    "x-forwarded-*", "cache-control", "content-type", "content-encoding", "content-range",
})  # fmt: skip

# Further fields that are useless after the content, so not allowed in trailers (RFC 9110 §6.5.1).
TOO_LATE = frozenset({
    "trailer", "expect", "max-forwards", "pragma", "range", "if-match", "if-none-match",
    "if-modified-since", "if-unmodified-since", "if-range", "age", "date", "expires", "location",
    "retry-after", "vary", "warning", "www-authenticate",
})  # fmt: skip
_NO_TRAILERS = HOP_BY_HOP | ESSENTIAL | TOO_LATE

# Names that most messages have: their kind() is computed once, that of others each time. The table
# is fixed, since a peer could fill a cache with names of its own.
_USUAL_NAMES = (
    "Accept", "Accept-Encoding", "Accept-Language", "Accept-Ranges", "Access-Control-Allow-Headers",
    "Access-Control-Allow-Methods", "Access-Control-Allow-Origin", "Age", "Alt-Svc",
    "Authorization", "Cache-Control", "Connection", "Content-Disposition", "Content-Encoding",
    "Content-Language", "Content-Length", "Content-Security-Policy", "Content-Type", "Cookie",
    "Date", "ETag", "Expect", "Expires", "Forwarded", "Host", "If-Modified-Since", "If-None-Match",
    "If-Range", "Keep-Alive", "Last-Modified", "Link", "Location", "Origin", "Pragma", "Priority",
    "Range", "Referer", "Referrer-Policy", "Retry-After", "Sec-Ch-Ua", "Sec-Ch-Ua-Mobile",
    "Sec-Ch-Ua-Platform", "Sec-Fetch-Dest", "Sec-Fetch-Mode", "Sec-Fetch-Site", "Sec-Fetch-User",
    "Server", "Set-Cookie", "Strict-Transport-Security", "TE", "Trailer", "Transfer-Encoding",
    "Upgrade", "Upgrade-Insecure-Requests", "User-Agent", "Vary", "Via", "WWW-Authenticate",
    "X-Content-Type-Options", "X-Forwarded-For", "X-Forwarded-Host", "X-Forwarded-Proto",
    "X-Frame-Options", "X-Powered-By", "X-Real-IP", "X-Requested-With",
)  # fmt: skip


class Malformed(Exception):
    """The peer broke HTTP's rules; its connection is of no further use.

    ``status`` is how to answer a malformed request; a malformed answer becomes a 502 whatever
    ``status`` says. The text is one sentence: what came and what was expected.
    """

    def __init__(self, status: int, sentence: str):
        super().__init__(sentence)
        self.status = status


class Fields:
    """The fields of one message: ordered, spelled as they came, looked up in lower case.

    ``named`` maps a name in lower case to the values of that name, in order. ``connection`` are the
    options of its Connection fields, in lower case.
    """

    def __init__(self, items: list[tuple[str, str]]):
        self.items = items
        self.named: dict[str, list[str]] = {}
        named = self.named
        for name, value in items:
            name = name.lower()
            if name in named:
                named[name].append(value)
            else:
                named[name] = [value]
        self.connection = self.tokens("connection") if "connection" in named else []

    def get(self, name: str, default: str | None = None) -> str | None:
        """The value of the first field of that name."""
        values = self.named.get(name)
        return values[0] if values else default

    def all(self, name: str) -> Sequence[str]:
        """The values of all fields of that name, in order."""
        return self.named.get(name, ())

    def tokens(self, name: str) -> list[str]:
        """The members of a comma-separated list, over all its lines, in lower case.

        Empty members are left out (RFC 9110 §5.6.1).
        """
        values = self.named.get(name)
        if not values:  # most fields that are asked for are not there
            return []
        members = ",".join(values).lower().split(",")
        return [token for member in members if (token := member.strip(" \t"))]

    def __contains__(self, name: str) -> bool:
        return name in self.named

    def __iter__(self) -> Iterator[tuple[str, str]]:
        return iter(self.items)

    def __len__(self) -> int:
        return len(self.items)

    def __repr__(self) -> str:
        return f"Fields({self.items!r})"


class Request(NamedTuple):
    """A request's head. ``target`` is the request target as it came, ``minor`` is 0 or 1.

    The target in two parts (RFC 9112 §3.2): ``authority`` is None unless the target names one, and
    ``path`` is its origin-form, or "*"; None for CONNECT, which has none.
    """

    method: str
    target: str
    minor: int
    fields: Fields
    authority: str | None = None
    path: str | None = None


class Response(NamedTuple):
    """An answer's head. ``reason`` may be empty, ``minor`` is 0 or 1. ``loose``: the answer broke
    rules of HTTP and was accepted; ``fields`` are already mended."""

    status: int
    reason: str
    minor: int
    fields: Fields
    loose: bool = False


# ---------------------------------------------------------------------------------------------
# Heads
# ---------------------------------------------------------------------------------------------


def head_end(buffer: bytes | bytearray, start: int = 0) -> int:
    """The offset just past the blank line that ends the head, or -1 if it has not come yet.

    ``start`` is how many bytes an earlier call has searched, so that a head that trickles in is
    searched once. Raises Malformed as soon as a line ends in a bare LF (its sender now waits for an
    answer, so no blank line would come), and when HEAD_LIMIT bytes hold no blank line.
    """
    end = buffer.find(b"\r\n\r\n", max(start - 3, 0) if start else 0, HEAD_LIMIT)
    seen = end + 4 if end >= 0 else min(len(buffer), HEAD_LIMIT)
    # Every LF from start on must be the second half of a CRLF, which may begin one byte earlier.
    before = start - 1 if start else 0
    if buffer.count(b"\n", start, seen) != buffer.count(b"\r\n", before, seen):
        raise Malformed(400, "a line ends in LF alone, expected CRLF")
    if end >= 0:
        return seen
    _check_size(buffer)
    return -1


def answer_end(buffer: bytes | bytearray, start: int = 0) -> int:
    """As head_end(), for an answer: its lines may end in LF alone."""
    match = _BLANK_LINE.search(buffer, max(start - 2, 0), HEAD_LIMIT)
    if match:
        return match.end()
    _check_size(buffer)
    return -1


def _check_size(unfinished: bytes | bytearray) -> None:
    if len(unfinished) > HEAD_LIMIT:
        if unfinished.find(b"\n", 0, HEAD_LIMIT) < 0:
            raise Malformed(414, f"first line of over {HEAD_LIMIT} bytes, expected a shorter one")
        raise Malformed(431, f"no blank line in {HEAD_LIMIT} bytes, expected fewer fields")


def parse_request(head: bytes) -> Request:
    """Read a request's head, from its first byte to its blank line.

    One empty line before it is skipped, as RFC 9112 §2.2 asks; a second one is refused. Raises
    Malformed with status 414 (target too long), 431 (fields too many or too large), 505 (neither
    HTTP/1.0 nor HTTP/1.1), or 400 (any other fault).
    """
    line, fields = _split_head(head.removeprefix(b"\r\n"))
    words = line.split(" ")
    if len(words) != 3:
        raise Malformed(
            400,
            f"request line {_shown(line)}, expected method, target and version "
            "with one space between",
        )
    method, target, version = words
    if not _TOKEN.fullmatch(method):
        raise Malformed(400, f"method {_shown(method)}, expected a token")
    minor = _MINOR.get(version)
    if minor is None:
        raise _bad_version(version)
    target = read_target(target)
    return Request(method, target, minor, fields, *_split_target(method, target))


def read_target(target: str) -> str:
    """A request target as it may be passed on. Raises Malformed."""
    if len(target) > TARGET_LIMIT:
        raise Malformed(414, f"target of {len(target)} bytes, expected at most {TARGET_LIMIT}")
    if not _TARGET.fullmatch(target):
        raise Malformed(
            400, f"target {_shown(target)}, expected visible ASCII or UTF-8, and no fragment"
        )
    return target if target.isascii() else _read_utf8(target)


def _read_utf8(target: str) -> str:
    """A target with raw UTF-8, which no standard permits, and curl and some browsers send.

    Some targets split the request line at Unicode's white space, in latin-1 (0x85 and 0xA0:
    http.server) or in UTF-8. A target with such characters is percent-encoded, which means the
    same; any other stays as it came. Raises Malformed for bytes that are not UTF-8.
    """
    try:
        text = target.encode("latin-1").decode()
    except UnicodeDecodeError:
        raise Malformed(400, f"target {_shown(target)}, expected its bytes to be UTF-8") from None
    if not (_WHITE_SPACE.search(target) or _WHITE_SPACE.search(text)):
        return target
    return percent_encoded(target)


def percent_encoded(target: str) -> str:
    """A request target in ASCII: other bytes are percent-encoded (RFC 3986 §2.1)."""
    return _NOT_ASCII.sub(lambda byte: f"%{ord(byte[0]):02X}", target)


def parse_response(head: bytes) -> Response:
    """Read an answer's head, from its first byte to its blank line.

    The reason may be missing, with the space before it or without. Lines may end in LF and values
    may be folded. Content-Length may come twice if both are the same, and is ignored beside
    chunked. Raises Malformed.
    """
    loose = False
    try:
        line, fields = _split_head(head)
    except Malformed:
        mended = _mend(head)
        if mended == head:
            raise
        loose = True
        line, fields = _split_head(mended)
    match = _STATUS_LINE.fullmatch(line)
    if not match:
        raise Malformed(
            400, f"status line {_shown(line)}, expected version, status 100 to 999 and reason"
        )
    version, status, reason = match.groups("")
    minor, lengths = _MINOR.get(version), fields.named.get("content-length")
    if minor is None:
        raise _bad_version(version)
    if lengths and (len(lengths) > 1 or "," in lengths[0] or "transfer-encoding" in fields.named):
        loose = True
        fields = _with_one_length(fields, minor)
    return Response(int(status), reason, minor, fields, loose or int(status) > 599)


def _mend(head: bytes) -> bytes:
    """An answer's head with CRLF for LF, and a blank for each fold (RFC 9112 §5.2)."""
    if head.count(b"\n") != head.count(b"\r\n"):
        head = head.replace(b"\r\n", b"\n").replace(b"\n", b"\r\n")
    line, end, block = head.decode("latin-1").partition("\r\n")
    names = {name.lower() for name in _FOLDED_NAME.findall(block)}
    if names & FRAMING:  # a reader without obs-fold would see another length: not mended
        return head
    return (line + end + _FOLD.sub(" ", block)).encode("latin-1")


def _with_one_length(fields: Fields, minor: int) -> Fields:
    """The fields with Content-Length once, if all its values are the same (RFC 9110 §8.6), and
    without it beside Transfer-Encoding, which overrides it (RFC 9112 §6.3)."""
    length, *differing = {
        length.strip(" \t") for value in fields.all("content-length") for length in value.split(",")
    }
    if differing or not _CONTENT_LENGTH.fullmatch(length):
        return fields
    others = [(name, value) for name, value in fields if name.lower() != "content-length"]
    if minor > 0 and "transfer-encoding" in fields:
        return Fields(others)
    return Fields([*others, ("Content-Length", length)])


def _split_head(head: bytes) -> tuple[str, Fields]:
    """A head's first line, and its fields."""
    if len(head) > HEAD_LIMIT:
        raise Malformed(431, f"head of {len(head)} bytes, expected at most {HEAD_LIMIT}")
    if not head.endswith(b"\r\n\r\n"):
        raise Malformed(400, "head without a blank line at its end, expected CRLF CRLF")
    line, _, block = _check_text(head[:-2]).partition("\r\n")
    return line, _parse_fields(block)


def _check_text(lines: bytes) -> str:
    """Refuse control bytes, and CR and LF except as a pair; return the text."""
    # All bytes that are not text must be CRLFs. Counting both runs at memory speed.
    if len(lines.translate(None, _TEXT)) != 2 * lines.count(b"\r\n"):
        at = next(_NOT_TEXT.finditer(lines)).start()
        raise Malformed(400, f"byte 0x{lines[at]:02x} at offset {at}, expected text and CRLF")
    return lines.decode("latin-1")


def _parse_fields(block: str) -> Fields:
    """The fields in a block of lines that _check_text has checked; each ends in CRLF."""
    count = block.count("\n")
    if count > FIELD_LIMIT:
        raise Malformed(431, f"{count} fields, expected at most {FIELD_LIMIT}")
    items = _FIELD_LINE.findall(block)
    if len(items) != count:
        raise _bad_field(
            next(line for line in block.split("\r\n") if not _FIELD_LINE.match(line + "\r\n"))
        )
    return Fields(items)


def _bad_field(line: str) -> Malformed:
    """The error for a bad field line. It never repeats the value, which may be a secret."""
    name, colon, _ = line.partition(":")
    if not line:
        return Malformed(400, "blank line among the fields, expected it at their end only")
    if line[0] in " \t":
        return Malformed(400, "field line starts with white space, expected a field name")
    if not colon:
        return Malformed(400, "field line without a colon, expected name, colon and value")
    if name.rstrip(" \t") != name:
        return Malformed(400, f"white space after field name {_shown(name)}, expected the colon")
    return Malformed(400, f"field name {_shown(name)}, expected a token")


def _bad_version(version: str) -> Malformed:
    return Malformed(
        505 if _VERSION.fullmatch(version) else 400,
        f"version {_shown(version)}, expected HTTP/1.1 or HTTP/1.0",
    )


def _shown(text: str) -> str:
    return repr(text if len(text) <= SHOWN_LIMIT else text[:SHOWN_LIMIT] + "...")


# ---------------------------------------------------------------------------------------------
# The hostname of a request, keep-alive, and the fields to pass on
# ---------------------------------------------------------------------------------------------


def hostname(request: Request) -> str:
    """The hostname the request is for: lower case, no port, no trailing dot.

    It comes from Host, and from the target if that is in absolute-form or, for CONNECT, in
    authority-form; if both name a host, it must be the same (RFC 9112 §3.2). An IPv6 address keeps
    its brackets. "" for an HTTP/1.0 request that names none. Raises Malformed.
    """
    hosts = request.fields.named.get("host", ())
    if len(hosts) > 1:
        raise Malformed(400, f"{len(hosts)} Host fields, expected one")
    if not hosts and request.minor > 0:
        raise Malformed(400, "no Host field, expected one")
    name = _name(hosts[0]) if hosts else ""
    if request.authority is None:
        return name
    aimed = _name(request.authority)
    if hosts and aimed != name:
        raise Malformed(
            400, f"target for {_shown(aimed)} with Host {_shown(name)}, expected the same"
        )
    return aimed


def origin_target(request: Request) -> str:
    """The request target as an origin server expects it: in origin-form, or "*".

    Raises Malformed with status 501 for CONNECT, which asks for a tunnel and has no origin-form.
    """
    if request.path is None:
        raise Malformed(501, "method CONNECT, expected one that an http target can answer")
    return request.path


def keeps_alive(message: Request | Response) -> bool:
    """Whether the sender keeps the connection open after this message (RFC 9112 §9.3).

    An answer that ends when its connection does (UntilCloseBody) is the last one regardless.
    """
    options = message.fields.connection
    return "close" not in options and (message.minor > 0 or "keep-alive" in options)


def end_to_end(
    fields: Fields, keep_upgrade: bool = False, dropping: frozenset[str] = HOP_BY_HOP
) -> list[tuple[str, str]]:
    """The end-to-end fields: all but those of the kinds in ``dropping``, HOP_BY_HOP or more, and
    those that Connection names.

    Trailer stays, since trailers are passed on. With ``keep_upgrade`` Upgrade stays too. The caller
    writes its own Connection, Content-Length and Transfer-Encoding. If Connection names one of the
    ESSENTIAL fields, which RFC 9110 §7.6.1 forbids, that field stays: a visitor could otherwise
    remove a field that the target relies on.
    """
    if not dropping.issuperset(fields.connection):  # "keep-alive" and "upgrade" name what is in it
        dropping = dropping.union({kind(option) for option in fields.connection} - ESSENTIAL)
    if keep_upgrade:
        dropping -= {"upgrade"}
    known = _KINDS.get
    return [item for item in fields.items if (known(item[0]) or kind(item[0])) not in dropping]


def plain_name(name: str) -> str:
    """A field name as the loosest target reads it: lower case, with "-" for every character that is
    no letter or digit. CGI, WSGI and PHP turn all of these into "_" and cannot tell X.Real~IP from
    X-Real-IP (RFC 3875 §4.1.18 asks for it for "-" only)."""
    name = name.lower()
    # The first case is almost every name, and cheaper than a substitution.
    return name if name.replace("-", "").isalnum() else _ODD.sub("-", name)


def kind(name: str) -> str:
    """The form of a field name that decides whether the field is passed on: its plain_name(), or
    "x-forwarded-*" for all names that begin so, since a target may trust any of them."""
    name = plain_name(name)
    return "x-forwarded-*" if name.startswith("x-forwarded-") else name


_KINDS = {spelled: kind(name) for name in _USUAL_NAMES for spelled in (name, name.lower())}


def _split_target(method: str, target: str) -> tuple[str | None, str | None]:
    """A target's authority and its origin-form; None for a missing one (RFC 9112 §3.2)."""
    if method == "CONNECT":
        if not _AUTHORITY_FORM.fullmatch(target):
            raise Malformed(400, f"CONNECT to {_shown(target)}, expected host and port")
        return target, None
    if target.startswith("/") or target == "*" and method == "OPTIONS":
        return None, target
    absolute = _ABSOLUTE_FORM.fullmatch(target)
    if not absolute:
        raise Malformed(400, f"target {_shown(target)}, expected a path or an http URL")
    authority, path, query = absolute.groups("")
    if method == "OPTIONS" and not path and not query:
        return authority, "*"  # RFC 9112 §3.2.4
    return authority, (path or "/") + query


def _name(authority: str) -> str:
    """The hostname in ``host[:port]``; the port may be empty (RFC 3986 §3.2.3), no userinfo."""
    match = _AUTHORITY.fullmatch(authority)
    if not match:
        raise Malformed(400, f"host {_shown(authority)}, expected a hostname and perhaps a port")
    name, port = match.groups("0")
    if int(port or 0) > 65535:
        raise Malformed(400, f"port {port}, expected at most 65535")
    if name.startswith("["):
        try:
            ipaddress.IPv6Address(name[1:-1])
        except ValueError:
            raise Malformed(400, f"host {_shown(name)}, expected an IPv6 address") from None
    name = name.lower().removesuffix(".")
    if len(name) > MAX_HOSTNAME:
        raise Malformed(400, f"host of {len(name)} characters, expected at most {MAX_HOSTNAME}")
    return name


# ---------------------------------------------------------------------------------------------
# Bodies
# ---------------------------------------------------------------------------------------------


class Body:
    """A decoder for one message's body: bytes as they come in, payload out.

    ``length``: payload bytes if known beforehand, else None.
    ``complete``: the body has ended; an empty one is complete from the start.
    ``trailers``: fields that came after the payload, without those that trailers must not hold.
    ``rest``: bytes that came after the end and belong to the next message; b"" before.
    ``loose``: the body broke rules of HTTP so far and was accepted; never a request's.
    ``chunks``: how many chunks have begun so far; 0 for a body that is not chunked.
    """

    length: int | None = None
    complete = False
    trailers: Sequence[tuple[str, str]] = ()
    rest = b""
    loose = False
    chunks = 0

    def feed(self, data: bytes) -> list[bytes]:
        """Take the next bytes, return the payload in them: pieces in order, none of them empty.

        Bytes after the end are added to ``rest``. Raises Malformed; then the decoder is of no
        further use.
        """
        raise NotImplementedError

    def eof(self) -> None:
        """The connection has ended. Raises Malformed if that cuts the body short."""
        if not self.complete:
            expected = "the last chunk" if self.length is None else f"{self.length} bytes"
            raise Malformed(400, f"body cut short by end of connection, expected {expected}")


class SizedBody(Body):
    """A body of ``length`` bytes, as Content-Length said (RFC 9112 §6.2)."""

    def __init__(self, length: int):
        self.length = length
        self.complete = length == 0
        self._left = length

    def feed(self, data: bytes) -> list[bytes]:
        piece = data[: self._left]  # no copy if that is all of data: bytes are immutable
        self._left -= len(piece)
        self.complete = self._left == 0
        self.rest += data[len(piece) :]
        return [piece] if piece else []


class UntilCloseBody(Body):
    """An answer's body that ends where its connection does (RFC 9112 §6.3, case 8)."""

    def feed(self, data: bytes) -> list[bytes]:
        if self.complete:
            self.rest += data
            return []
        return [data] if data else []

    def eof(self) -> None:
        self.complete = True


class ChunkedBody(Body):
    """A body in chunks, each with its size before it, and trailers (RFC 9112 §7.1).

    ``_read_on`` is the state: the method that reads the next bytes. They follow each other as
    _size_line, _payload, _payload_end, and again; after a size of 0, _trailers. Each takes data and
    an offset into it, and returns the offset for the next method. Only an unfinished line, or the
    unfinished trailer section, is kept between two calls of feed().
    """

    def __init__(self, *, lenient: bool = False):
        """``lenient``: an answer's body, whose lines may end in LF, with blanks behind sizes."""
        self._lenient = lenient
        self._read_on = self._size_line
        self._held = bytearray()  # an unfinished line or trailer section
        self._left = 0  # payload bytes to come in this chunk
        self._excess = 0  # bytes, see CHUNK_EXCESS

    def feed(self, data: bytes) -> list[bytes]:
        if self.complete:
            self.rest += data
            return []
        pieces: list[bytes] = []
        at = 0
        while at < len(data):
            at = self._read_on(data, at, pieces)
        return pieces if len(pieces) <= MOST_PIECES else [b"".join(pieces)]

    def _size_line(self, data: bytes, at: int, pieces: list[bytes]) -> int:
        if not self._held:
            at = self._whole_chunks(data, at, pieces)
        line, at = self._line(data, at, CHUNK_LINE_LIMIT)
        if line:
            match = _CHUNK_LINE.fullmatch(line)
            if not match and self._lenient:
                self.loose = True
                match = _LOOSE_CHUNK_LINE.fullmatch(line)
            if not match:
                raise Malformed(
                    400,
                    f"chunk line {_shown(line.decode('latin-1'))}, expected at "
                    "most 16 hex digits, extensions and CRLF",
                )
            self._left = int(match[1], 16)
            self.chunks += 1
            self._excess = max(0, self._excess + len(line) - CHUNK_SPARE - 2 * self._left)
            if self._excess > CHUNK_EXCESS:
                raise Malformed(400, "chunk lines are longer than the chunks, expected payload")
            self._read_on = self._payload
            if self._left == 0:
                self._read_on = self._trailers
                # With the CRLF just read in front, an empty trailer section ends in CRLF CRLF
                # like any other.
                self._held += b"\r\n"
        return at

    def _whole_chunks(self, data: bytes, at: int, pieces: list[bytes]) -> int:
        """The fast path for whole chunks without extensions: they may be tiny and many."""
        while match := _PLAIN_CHUNK_LINE.match(data, at):
            begin = match.end()
            end = begin + int(match[1], 16)
            if end == begin or data[end : end + 2] != b"\r\n":
                break
            pieces.append(data[begin:end])
            self.chunks += 1
            at = end + 2
        return at

    def _payload(self, data: bytes, at: int, pieces: list[bytes]) -> int:
        piece = data[at : at + self._left]
        pieces.append(piece)
        self._left -= len(piece)
        if self._left == 0:
            self._read_on = self._payload_end
        return at + len(piece)

    def _payload_end(self, data: bytes, at: int, pieces: list[bytes]) -> int:
        line, at = self._line(data, at, len(b"\r\n"))
        if line:
            if self._lenient and line == b"\n":
                self.loose = True
            elif line != b"\r\n":
                raise Malformed(400, f"{line!r} after a chunk, expected CRLF")
            self._read_on = self._size_line
        return at

    def _trailers(self, data: bytes, at: int, pieces: list[bytes]) -> int:
        searched = len(self._held)
        self._held += data[at:]
        end = (answer_end if self._lenient else head_end)(self._held, searched)
        if end >= 0:
            fields = self._read_trailers(bytes(self._held[:end]))
            self.trailers = [(name, value) for name, value in fields if not comes_too_late(name)]
            self.rest = bytes(self._held[end:])
            self.complete = True
        return len(data)

    def _read_trailers(self, section: bytes) -> Fields:
        if self._lenient and section != b"\r\n\r\n":
            mended = _mend(section)
            self.loose |= mended != section
            section = mended
        return _parse_fields(_check_text(section[2:-2]))

    def _line(self, data: bytes, at: int, limit: int) -> tuple[bytes, int]:
        """A line of at most ``limit`` bytes with its LF, or b"" if more must come."""
        room = at + limit - len(self._held)
        end = data.find(b"\n", at, room) + 1
        if end:
            line = bytes(self._held) + data[at:end]
            self._held.clear()
            return line, end
        self._held += data[at:room]
        if len(self._held) == limit:
            raise Malformed(400, f"no line end in {limit} bytes, expected CRLF")
        return b"", len(data)


def comes_too_late(name: str) -> bool:
    """Whether to drop a trailer of that name: a target might take it for a field of the head."""
    return kind(name) in _NO_TRAILERS


def request_body(request: Request) -> Body | None:
    """The decoder for the request's body, None if it has none (RFC 9112 §6.3).

    ``Content-Length: 0`` is a body that is complete from the start, unlike no body. Raises
    Malformed for any doubt about the length: with status 501 if chunked is applied on top of
    another coding, else 400.
    """
    return _framed(request, lenient=False)


def response_body(response: Response, method: str) -> Body | None:
    """The decoder for the body of an answer to a ``method`` request, None if it has none.

    Answers without a body: to HEAD, with status 1xx, 204 or 304, and CONNECT's success. Their
    lengths are still checked, as Content-Length may be passed on. If bytes follow nevertheless, the
    caller must not use the connection again. Raises Malformed as request_body does.
    """
    body = _framed(response, lenient=True)
    status = response.status
    if method == "HEAD" or status < 200 or status in (204, 304):
        return None
    if method == "CONNECT" and status < 300:
        return None
    return UntilCloseBody() if body is None else body


def _framed(message: Request | Response, *, lenient: bool) -> SizedBody | ChunkedBody | None:
    """The decoder by the message's own fields, None if they give no length. ``lenient``: see
    ChunkedBody."""
    named = message.fields.named
    codings, lengths = named.get("transfer-encoding"), named.get("content-length")
    if codings:
        # RFC 9112 §6.1 and §6.3 leave the choice to the reader, so two readers could differ.
        if lengths:
            raise Malformed(400, "Content-Length and Transfer-Encoding, expected one of them")
        if message.minor == 0:
            raise Malformed(400, "Transfer-Encoding in HTTP/1.0, expected Content-Length")
        if len(codings) > 1 or codings[0].lower() != "chunked":
            *under, last = message.fields.tokens("transfer-encoding") or [""]
            known_shape = under and last == "chunked" and "chunked" not in under
            raise Malformed(
                501 if known_shape else 400,
                f"Transfer-Encoding {_shown(', '.join(codings))}, expected chunked",
            )
        return ChunkedBody(lenient=lenient)
    if lengths:
        if len(lengths) > 1:
            raise Malformed(400, f"{len(lengths)} Content-Length fields, expected one")
        if not _CONTENT_LENGTH.fullmatch(lengths[0]):
            raise Malformed(400, f"Content-Length {_shown(lengths[0])}, expected 1 to 18 digits")
        return SizedBody(int(lengths[0]))
    return None


# ---------------------------------------------------------------------------------------------
# Writing
# ---------------------------------------------------------------------------------------------


def encode_head(start_line: str, fields: Iterable[tuple[str, str]]) -> bytes:
    """A head from its first line to its blank line.

    Raises ValueError for a control character, so that no value can add a line (header injection).
    """
    lines = [start_line, *[f"{name}: {value}" for name, value in fields], "", ""]
    head = "\r\n".join(lines).encode("latin-1")
    if len(head.translate(None, _TEXT)) != 2 * (len(lines) - 1):
        raise ValueError(f"control character in a head that starts {start_line!r}")
    return head


def encode_chunk(data: bytes) -> bytes:
    """One chunk; b"" for no data, as an empty chunk would end the body."""
    return b"%x\r\n%b\r\n" % (len(data), data) if data else b""


def encode_last_chunk(trailers: Iterable[tuple[str, str]] = ()) -> bytes:
    """The chunk that ends a body, with the trailers behind it. Raises ValueError as encode_head."""
    return encode_head("0", trailers)  # the same form, with the size 0 as its first line
