"""Says what a replay sends: reads an order, and rebuilds a recorded request, as it was or edited.

An order is the JSON object of ``POST /api/v1/visits/ID/replay``:

    hostname      the tunnel, if the record's own hostname has none here (an imported record)
    method, path  instead of the recorded ones
    fields        all fields of the head, as [[name, value], ...]
    body          text, which is sent in UTF-8; body_base64: bytes
    times         how often, 1 to MOST_TIMES; concurrency: how many at once, 1 to MOST_AT_ONCE
    every         seconds between two tries
    until         a status such as 200, or "2xx": try again until the answer has it
    timeout       seconds that one try has, its whole answer included

The head is written anew: one Host, one length, no hop-by-hop fields. So an edited field can neither
add a line to the head nor give the request a second length (request smuggling, RFC 9112 §11.2).

Pure: no socket, no clock, no thread. Every refusal is a CannotReplay, one line for the user.
"""

from __future__ import annotations

import base64
import binascii
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from ..common.http1 import (
    FIELD_LIMIT,
    FRAMING,
    HEAD_LIMIT,
    HOP_BY_HOP,
    TARGET_LIMIT,
    Fields,
    Malformed,
    Request,
    encode_chunk,
    encode_head,
    encode_last_chunk,
    end_to_end,
    hostname,
    kind,
    origin_target,
    parse_request,
)
from ..common.one_line import on_one_line
from . import content, mask
from .kept import Kept
from .mask import MASK

MOST_TIMES = 1000  # answers that are still read side by side
MOST_AT_ONCE = 8  # threads of one replay; a development server has few
MOST_PAUSE = 3600.0  # seconds between two tries
# Of a replay that goes on until an answer passes: the first pause, and the longest one. It doubles
# with each try (exponential backoff), as senders of webhooks do it.
FIRST_PAUSE, LONGEST_PAUSE = 1.0, 60.0
UNTIL_TIMES = 20  # tries of such a replay unless the order names a number: a quarter of an hour
TIMEOUT, MOST_TIMEOUT = 60.0, 600.0  # seconds of one try
MOST_METHOD = 40  # characters; the longest registered one has 17 (UPDATEREDIRECTREF)
MOST_BODY = 8 * 1024 * 1024  # bytes of a body that is given; it is held in memory

# Fields that are not sent again, beside those of one connection: the body follows at once, and
# trailers belong to a recorded body.
DROPPED = HOP_BY_HOP | {"expect", "trailer"}
# Methods whose requests say that they have no body (RFC 9110 §8.6).
WITH_LENGTH = ("POST", "PUT", "PATCH")
# Fields that depend on the body: signatures of webhooks, and checksums.
_SIGNED = re.compile(r"signature|content-md5|digest|x-hub-|hmac", re.IGNORECASE)
_TOKEN = re.compile(r"[!#$%&'*+\-.^_`|~0-9A-Za-z]+")  # RFC 9110 §5.6.2
_CONTROL = re.compile(r"[\x00-\x08\x0a-\x1f\x7f]")
_STATUS_CLASS = re.compile(r"([1-5])xx", re.IGNORECASE)
_SHOWN = 40  # characters of a wrong value that a line repeats

KEYS = (
    "hostname", "method", "path", "fields", "body", "body_base64",
    "times", "concurrency", "every", "until", "timeout",
)  # fmt: skip


class CannotReplay(Exception):
    """A request is not sent again; the text is one line for the user. ``code`` is for programs."""

    def __init__(self, text: str, code: str = "invalid"):
        super().__init__(on_one_line(text))
        self.code = code


class Until(NamedTuple):
    """Which statuses pass: those from ``first`` to ``last``."""

    first: int
    last: int

    def passes(self, status: int) -> bool:
        return self.first <= status <= self.last

    def __str__(self) -> str:
        return str(self.first) if self.first == self.last else f"{self.first // 100}xx"


class Edit(NamedTuple):
    """What differs from the recorded request; None: nothing."""

    method: str | None = None
    path: str | None = None
    fields: Sequence[tuple[str, str]] | None = None
    body: bytes | None = None
    body_is_text: bool = False  # it was typed, so it is not compressed


class Order(NamedTuple):
    """How a request is sent again. ``every``: seconds between two tries; None: at once, and with
    ``until`` the pauses grow."""

    edit: Edit = Edit()
    hostname: str = ""  # "": the record's
    times: int = 1
    concurrency: int = 1
    every: float | None = None
    until: Until | None = None
    timeout: float = TIMEOUT

    def pause(self, done: int) -> float:
        """Seconds to wait after ``done`` tries, at least one."""
        if self.every is not None:
            return self.every
        if self.until is None:
            return 0.0
        return min(FIRST_PAUSE * 2.0 ** min(done - 1, 16), LONGEST_PAUSE)


class Outgoing(NamedTuple):
    """A request as it is sent. ``content`` is the body, and ``data`` the same with its framing."""

    method: str
    target: str
    head: bytes
    content: bytes
    data: bytes
    notes: tuple[str, ...] = ()  # what the user should know, a line each


# The order --------------------------------------------------------------------------------------


def read_order(document: object) -> Order:
    """An order as it came in JSON. Raises CannotReplay."""
    if not isinstance(document, Mapping):
        raise CannotReplay(f"{_kind(document)} came, expected a JSON object such as {{}}")
    unknown = [str(key) for key in document if key not in KEYS]
    if unknown:
        raise CannotReplay(f"unknown key {_shown(unknown[0])}, expected {', '.join(KEYS)}")
    given = {key: value for key, value in document.items() if value is not None}
    until = _until(given["until"]) if "until" in given else None
    times = _whole(given, "times", MOST_TIMES, 1 if until is None else UNTIL_TIMES)
    at_once = _whole(given, "concurrency", MOST_AT_ONCE, 1)
    every = _seconds(given, "every", MOST_PAUSE) if "every" in given else None
    if at_once > 1 and (until is not None or every is not None):
        other = "every" if until is None else "until"
        raise CannotReplay(f"concurrency {at_once} with {other}, expected 1: it tries one by one")
    timeout = TIMEOUT
    if "timeout" in given:
        timeout = _seconds(given, "timeout", MOST_TIMEOUT, can_be_0=False)
    host = _text(given, "hostname") or ""
    return Order(_edit(given), host.lower(), times, at_once, every, until, timeout)


def _edit(given: Mapping[str, Any]) -> Edit:
    body, encoded = _text(given, "body"), _text(given, "body_base64")
    if body is not None and encoded is not None:
        raise CannotReplay("body and body_base64 came, expected only one of them")
    content = None
    if body is not None:
        content = _utf8(body, "body")
    elif encoded is not None:
        try:
            content = base64.b64decode(encoded, validate=True)
        except (binascii.Error, ValueError):
            raise CannotReplay("body_base64: expected Base64 with its padding") from None
    if content is not None and len(content) > MOST_BODY:
        raise CannotReplay(f"a body of {len(content)} bytes, expected at most {MOST_BODY}")
    fields = None
    if "fields" in given:
        fields = _pairs(given["fields"])
    return Edit(_text(given, "method"), _text(given, "path"), fields, content, body is not None)


def _pairs(value: object) -> list[tuple[str, str]]:
    if not isinstance(value, list):
        raise CannotReplay(f"fields: {_kind(value)} came, expected a list of [name, value]")
    if len(value) > FIELD_LIMIT:
        raise CannotReplay(f"{len(value)} fields, expected at most {FIELD_LIMIT}")
    pairs = []
    for number, item in enumerate(value):
        if not (
            isinstance(item, list)
            and len(item) == 2
            and all(isinstance(part, str) for part in item)
        ):
            raise CannotReplay(f"fields: item {number} is no [name, value] of two texts")
        pairs.append((item[0], item[1]))
    return pairs


def _text(given: Mapping[str, Any], key: str) -> str | None:
    value = given.get(key)
    if value is not None and not isinstance(value, str):
        raise CannotReplay(f"{key}: {_kind(value)} came, expected a text")
    return value


def _whole(given: Mapping[str, Any], key: str, most: int, default: int) -> int:
    value = given.get(key, default)
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= most:
        raise CannotReplay(f"{key}: {_shown(value)} came, expected a whole number, 1 to {most}")
    return value


def _seconds(given: Mapping[str, Any], key: str, most: float, *, can_be_0: bool = True) -> float:
    value = given[key]
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not is_number or not 0 <= value <= most or not (value or can_be_0):
        expected = f"0 to {most:g}" if can_be_0 else f"more than 0, at most {most:g}"
        raise CannotReplay(f"{key}: {_shown(value)} came, expected seconds, {expected}")
    return float(value)


def _until(value: object) -> Until:
    if isinstance(value, str):
        if match := _STATUS_CLASS.fullmatch(value):
            first = 100 * int(match[1])
            return Until(first, first + 99)
        if len(value) == 3 and value.isascii() and value.isdigit():
            value = int(value)
    if isinstance(value, int) and not isinstance(value, bool) and 100 <= value <= 599:
        return Until(value, value)
    raise CannotReplay(f'until: {_shown(value)} came, expected a status such as 200, or "2xx"')


# The request ------------------------------------------------------------------------------------


def rebuild(
    head: bytes,
    kept: Kept,
    edit: Edit = Edit(),
    *,
    trailers: Sequence[tuple[str, str]] = (),
    host_header: str = "",
    switched: bool = False,
    complete: bool = True,
) -> Outgoing:
    """The request to send. ``head``, ``kept`` and ``trailers`` are the recorded one's;
    ``host_header`` is the tunnel's. ``switched``: the recorded answer was a 101; ``complete``:
    no more of the request comes. The edit has no masked values any more (see with_secrets()).
    Raises CannotReplay."""
    if not head:
        raise CannotReplay("its request was not read, so there is nothing to send", "no-request")
    try:
        recorded = parse_request(head)
        path = origin_target(recorded)
    except Malformed as error:
        raise CannotReplay(f"its request cannot be sent: {error}", "no-request") from None
    method = _method(recorded.method if edit.method is None else edit.method)
    target = path if edit.path is None else _target(edit.path, path, method)
    items = (
        recorded.fields.items
        if edit.fields is None
        else [_field(*item, recorded.fields) for item in edit.fields]
    )
    _refuse_websocket(Fields(items), switched and edit.fields is None)
    body = edit.body
    if body is None:
        _refuse_incomplete(recorded, kept, complete)
        body = kept.data
    notes = []
    if "expect" in (kind(name) for name, _ in items):
        notes.append("Expect is left out: the body is sent at once")
    if edit.body is not None and body != kept.data:
        signed = [name for name, _ in items if _SIGNED.search(name)]
        if signed:
            notes.append(f"{', '.join(signed)}: made for the recorded body, perhaps not for yours")
        if edit.body_is_text and any(kind(name) == "content-encoding" for name, _ in items):
            items = [item for item in items if kind(item[0]) != "content-encoding"]
            notes.append("Content-Encoding is left out: the body was given as text")
        if edit.body_is_text and not body.isascii() and _charset(items) not in ("", "utf-8"):
            notes.append(f"the body is sent in UTF-8, and Content-Type says {_charset(items)}")
    if edit.fields is not None and any(kind(name) in FRAMING for name, _ in edit.fields):
        lengths = [value for name, value in edit.fields if kind(name) in FRAMING]
        if lengths != [value for name, value in recorded.fields if kind(name) in FRAMING]:
            notes.append("the length of the body is always computed: yours is left out")
    items = _with_host(items, recorded, edit, host_header)
    chunked = "transfer-encoding" in recorded.fields and body != b""
    if not chunked or edit.body is not None:
        trailers = ()
    dropped = DROPPED - {"trailer"} if trailers else DROPPED
    fields = end_to_end(Fields(items), dropping=dropped)
    length = None
    if chunked:
        length = ("Transfer-Encoding", "chunked")
    elif body or method in WITH_LENGTH or edit.body is None and "content-length" in recorded.fields:
        length = ("Content-Length", str(len(body)))
    if length is not None:
        fields.insert(_place_of_length(items, fields), length)
    data = encode_chunk(body) + encode_last_chunk(trailers) if chunked else body
    return Outgoing(method, target, _encode(method, target, fields), body, data, tuple(notes))


def _refuse_incomplete(recorded: Request, kept: Kept, complete: bool) -> None:
    length = recorded.fields.get("content-length") or "0"
    expected = max(kept.size, int(length) if length.isdigit() else 0)
    if len(kept.data) < expected:
        why = "were kept" if kept.size == expected else "have come"
        raise CannotReplay(
            f"only {len(kept.data)} of its body's {expected} bytes {why}: give a body, or raise "
            "`body` in the agent's setting `inspect`", "incomplete-body",
        )  # fmt: skip
    if not complete and "transfer-encoding" in recorded.fields:
        raise CannotReplay(
            "its body may still be coming: wait for the end of the visit, or give a body",
            "incomplete-body",
        )


def _charset(items: Sequence[tuple[str, str]]) -> str:
    """The encoding that Content-Type names, "" for none."""
    value = next((value for name, value in items if name.lower() == "content-type"), "")
    return content.parameters(value).get("charset", "").lower()[:_SHOWN]


def _encode(method: str, target: str, fields: list[tuple[str, str]]) -> bytes:
    """The head, which is read back to show that a target reads what was meant."""
    line = f"{method} {target} HTTP/1.1"
    try:
        head = encode_head(line, fields)
        read = parse_request(head)
        hostname(read)
    except Malformed as error:
        raise CannotReplay(str(error)) from None
    except ValueError:
        raise CannotReplay("a control character in the head, expected text") from None
    if (read.method, read.target, read.fields.items) != (method, target, fields):
        raise CannotReplay("the head would be read in another way, expected plain values")
    if len(head) > HEAD_LIMIT:
        raise CannotReplay(f"a head of {len(head)} bytes, expected at most {HEAD_LIMIT}")
    return head


def _method(text: str) -> str:
    if not _TOKEN.fullmatch(text) or len(text) > MOST_METHOD:
        raise CannotReplay(f"method {_shown(text)}, expected a word such as GET or POST")
    if text.upper() == "CONNECT":
        raise CannotReplay("method CONNECT, expected one that an http target can answer")
    return text


def _target(text: str, recorded: str, method: str) -> str:
    """An edited path, which may have blanks and any letters: they are percent-encoded in UTF-8
    (RFC 3986 §2.1). ``recorded`` stays as it came."""
    if text in (recorded, _readable(recorded)):
        return recorded
    if _CONTROL.search(text) or "\t" in text:
        raise CannotReplay(
            f"path {_shown(text)} with a line break or control character, expected it encoded, "
            "such as %0A"
        )
    if text.lower().startswith(("http://", "https://")):
        raise CannotReplay("path: a URL came, expected the path alone; it goes to the same target")
    if not text.startswith("/") and not (text == "*" and method == "OPTIONS"):
        raise CannotReplay(f"path {_shown(text)}, expected it to begin with /")
    if "#" in text:
        raise CannotReplay(f"path {_shown(text)} with a fragment (#), expected %23 for the sign")
    encoded = _utf8(text, "path")
    target = "".join(chr(byte) if 0x20 < byte < 0x7F else f"%{byte:02X}" for byte in encoded)
    if len(target) > TARGET_LIMIT:
        raise CannotReplay(f"path of {len(target)} bytes, expected at most {TARGET_LIMIT}")
    return target


def _field(name: str, value: str, recorded: Fields) -> tuple[str, str]:
    """A field of an edit, in latin-1 as all heads are here: each character is a byte. A recorded
    value stays as it came; other letters than ASCII go out in UTF-8. The lines never repeat a
    value, which may be a secret."""
    if not _TOKEN.fullmatch(name):
        raise CannotReplay(f"field name {_shown(name)}, expected letters, digits and hyphens")
    if _CONTROL.search(value):
        raise CannotReplay(
            f"the value of {_cut(name)} has a line break or control character, expected one line"
        )
    value = value.strip(" \t")
    if value.isascii() or value in recorded.all(name.lower()):
        return name, value
    return name, _utf8(value, f"the value of {_cut(name)}").decode("latin-1")


def _refuse_websocket(fields: Fields, switched: bool) -> None:
    if (
        switched
        or "websocket" in fields.tokens("upgrade")
        or any(kind(name) == "sec-websocket-key" for name, _ in fields)
    ):
        raise CannotReplay(
            "a WebSocket handshake or another change of protocol cannot be replayed: connect again "
            "with the program that did it", "websocket",
        )  # fmt: skip


def _with_host(
    items: Sequence[tuple[str, str]], recorded: Request, edit: Edit, host_header: str
) -> list[tuple[str, str]]:
    """The fields with one Host, where it was: the edited one, else the tunnel's host_header, which
    the target gets from the gateway, too; else the recorded one."""
    before = recorded.fields.get("host")
    hosts = [value for name, value in items if name.lower() == "host"]
    if len(hosts) > 1:
        raise CannotReplay(f"{len(hosts)} Host fields, expected one")
    if edit.fields is not None and hosts and hosts[0] != before:
        host = hosts[0]
    else:
        host = host_header or before or ""
    if not hosts:
        return [("Host", host), *items]
    return [(name, host if name.lower() == "host" else value) for name, value in items]


def _place_of_length(items: Sequence[tuple[str, str]], fields: Sequence[tuple[str, str]]) -> int:
    """Where the length stands among ``fields``, which are the ``items`` that are sent: where it
    was, else at the end. Some signatures cover the order of fields."""
    for number, item in enumerate(items):
        if kind(item[0]) in FRAMING:
            return sum(before in fields for before in items[:number])
    return len(fields)


# Masked values ----------------------------------------------------------------------------------

# What stands before a secret and says which it is: a name with = or :, or a word and a blank.
_NAMED = re.compile(r"""["']?([\w.%\[\]-]+)["']?[ \t]*[:=]\s*$|(\w+)[ \t]+$""")
_LOOKED_AT = 200  # characters in front of a secret
# In JSON a mask is a text, whatever the value was: the quotation marks belong to it.
_MASKS = re.compile(f'"{MASK}"|{MASK}')


def with_secrets(edit: Edit, head: bytes, kept: Kept) -> Edit:
    """The edit with what was recorded in the place of masked values: secrets are masked when they
    are shown, and what is shown is what users edit. ``head`` and ``kept`` are the recorded
    request's. A body that was not changed becomes None. Raises CannotReplay."""
    if edit == Edit():
        return edit
    try:
        recorded = parse_request(head)
    except Malformed:
        return edit  # rebuild() says it
    path, fields, body = edit.path, edit.fields, edit.body
    if path is not None:
        path = unmasked(path, recorded.target, mask.target(recorded.target), "path")
    if fields is not None:
        fields = unmasked_fields(fields, recorded.fields.items)
    if body is not None and edit.body_is_text:
        text, shown = body.decode(), content.describe(recorded.fields.items, kept).text
        kind_of = recorded.fields.get("content-type") or ""
        masked = mask.body(shown, kind_of)
        plain = kept.data.decode("utf-8", "replace")  # JSON that is shown is laid out
        if text in (shown, masked, plain, mask.body(plain, kind_of)):
            body = None  # as it was, and perhaps compressed
        else:
            body = unmasked(text, shown, masked, "body").encode()
    return edit._replace(path=path, fields=fields, body=body)


def unmasked(edited: str, plain: str, masked: str, what: str) -> str:
    """An edited text with the secrets of ``plain`` in the place of their MASKs. ``masked`` is how
    ``plain`` was shown. A secret belongs to the name that stands before it, the second of one name
    to the second. Raises CannotReplay for a mask that stands for nothing; ``what`` says where."""
    if MASK not in edited or MASK in plain:
        return edited
    if edited == masked:
        return plain
    secrets: dict[str, list[str]] = {}
    for name, secret in _secrets(plain, masked):
        secrets.setdefault(name, []).append(secret)
    restored, at = "", 0
    for found in _MASKS.finditer(edited):
        before = edited[at : found.start()]
        left = secrets.get(_name_before(before))
        if not left:
            raise CannotReplay(
                f"{what}: nothing was recorded for a masked value ({MASK}): write the value itself",
                "masked",
            )
        restored += before + left.pop(0)
        at = found.end()
    return restored + edited[at:]


def _secrets(plain: str, masked: str) -> list[tuple[str, str]]:
    """The secrets of a text with the names before them. ``masked`` differs from ``plain`` only by
    its MASKs; if not, there are none."""
    secrets = []
    at = read = 0  # in plain, and in masked
    masks = list(_MASKS.finditer(masked))
    for number, found in enumerate(masks):
        before = masked[read : found.start()]
        if not plain.startswith(before, at):
            return []
        at += len(before)
        read = found.end()
        if number + 1 < len(masks):
            behind = masked[read : masks[number + 1].start()]
            end = plain.find(behind, at) if behind else at
        else:
            behind = masked[read:]
            end = len(plain) - len(behind) if plain.endswith(behind) else -1
        if end < at:
            return []
        secrets.append((_name_before(before), plain[at:end]))
        at = end
    return secrets


def _name_before(text: str) -> str:
    match = _NAMED.search(text[-_LOOKED_AT:])
    return (match[1] or match[2]).lower() if match else ""


def unmasked_fields(
    edited: Sequence[tuple[str, str]], recorded: Sequence[tuple[str, str]]
) -> list[tuple[str, str]]:
    """Edited fields with the recorded values in the place of those that were not changed, masked or
    not: their bytes stay as they came. The second field of a name belongs to the second one
    recorded, unless it looks like another one. Raises CannotReplay."""
    left: dict[str, list[str]] = {}
    for name, value in recorded:
        left.setdefault(name.lower(), []).append(value)
    fields = []
    for name, value in edited:
        plains = left.get(name.lower(), [])
        same = next((plain for plain in plains if value in _looks(name, plain)), None)
        if same is not None:
            plains.remove(same)
            fields.append((name, same))
            continue
        plain = plains.pop(0) if plains else ""
        if MASK in value:
            shown = _as_utf8(plain)
            value = unmasked(value, shown, mask.field(name, shown), f"field {_cut(name)}")
        fields.append((name, value))
    return fields


def _looks(name: str, plain: str) -> tuple[str, ...]:
    """How a recorded value is shown: as it came, in UTF-8, and masked."""
    shown = _as_utf8(plain)
    return plain, shown, mask.field(name, shown), mask.field(name, plain)


def _as_utf8(latin: str) -> str:
    return latin.encode("latin-1").decode("utf-8", "backslashreplace")


# Words ------------------------------------------------------------------------------------------


def _readable(target: str) -> str:
    """A target as it came, in latin-1, as text: in UTF-8 if it is that."""
    try:
        return target.encode("latin-1").decode()
    except UnicodeError:
        return target


def _utf8(text: str, what: str) -> bytes:
    try:
        return text.encode()
    except UnicodeEncodeError:  # JSON can have half of a pair: "\ud800"
        raise CannotReplay(f"{what} has half of a surrogate pair, expected text") from None


def _cut(text: str) -> str:
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."


def _shown(value: object) -> str:
    return ascii(value if not isinstance(value, str) else _cut(value))[: 4 * _SHOWN]


def _kind(value: object) -> str:
    names = {dict: "an object", list: "a list", str: "a text", bool: "true or false"}
    return "null" if value is None else names.get(type(value), "a number")
