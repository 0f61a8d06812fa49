"""Writes visits as an HTTP Archive (HAR 1.2), and reads one.

HAR is what browsers save in their network tab, and what other tools read. What it has no place for
is in fields of our own, which begin with an underscore as the format asks: ``_target``,
``_visitor``, ``_problem``, ``_size`` (of a body of which only the beginning was kept), and, as
Chrome writes them, ``_webSocketMessages``.

An archive that is read comes from elsewhere. It is bounded before it is parsed (a few megabytes of
``[[],[],`` would become a gigabyte of objects), and each part of it is checked: a field cannot add
a line to its head. Any fault is a NotHar, one line that says where.
"""

from __future__ import annotations

import base64
import binascii
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from datetime import datetime, timezone
from typing import Any, NamedTuple
from urllib.parse import parse_qsl, urlsplit

from gotunnel import __version__

from ..common import http1
from . import content, mask
from .record import ENDED, Kept, Message, Record

MOST_FILE = 32 * 1024 * 1024  # bytes of an archive that is read
MOST_VALUES = 500_000  # brackets, commas and colons in it: each becomes an object or two
MOST_ENTRIES = 10_000
MOST_MESSAGES = 1000  # of one WebSocket; the latest are kept
MOST_MESSAGE = 64 * 1024  # bytes that are kept of one
MOST_TIME = 10 * 365 * 24 * 3600 * 1000.0  # milliseconds of a visit; more is no time
PIECE = 64 * 1024  # bytes of an export that are sent at a time
VERSION = "1.2"
OPCODES = {"text": 1, "binary": 2, "close": 8, "ping": 9, "pong": 10}
KINDS = {code: kind for kind, code in OPCODES.items()}
DEFAULT_TYPE = "x-unknown"  # what HAR asks for if a mimeType is not known

_TOKEN = re.compile(r"[!#$%&'*+\-.^_`|~0-9A-Za-z]{1,200}", re.ASCII)
_STRING = re.compile(rb'"[^"]*"')  # once backslashes and quotes that are escaped are gone
_CONTROL = re.compile(r"[\x00-\x08\x0a-\x1f\x7f]")
_DATE = re.compile(
    r"(\d{4})-(\d\d)-(\d\d)[Tt ](\d\d):(\d\d):(\d\d)(?:\.(\d{1,9}))?\d*(Z|z|([+-])(\d\d):?(\d\d))?",
    re.ASCII,
)
_HTTP_VERSION = re.compile(r"HTTP/[0-9](?:\.[0-9])?", re.IGNORECASE | re.ASCII)


class NotHar(Exception):
    """One line for the user: what came, where, and what was expected."""


class Found(NamedTuple):
    """What an archive has. ``skipped`` entries were left out; ``notes``: why, a line each."""

    records: list[Record]
    skipped: int
    notes: tuple[str, ...]


# Export -----------------------------------------------------------------------------------------


def export(records: Iterable[Record], *, unmask: bool = False) -> Iterator[bytes]:
    """The archive in pieces, so that it is never whole in memory."""
    creator = {"name": "gotunnel", "version": __version__}
    piece = f'{{"log":{{"version":"{VERSION}","creator":{json.dumps(creator)},"entries":['
    size, comma = 0, "\n"
    parts = [piece]
    for record in records:
        text = comma + json.dumps(entry(record, unmask=unmask))
        parts.append(text)
        size, comma = size + len(text), ",\n"
        if size > PIECE:
            yield "".join(parts).encode()
            size, parts = 0, []
    yield ("".join(parts) + "\n]}}\n").encode()


def entry(record: Record, *, unmask: bool = False) -> dict[str, Any]:
    """One visit as HAR has it."""
    duration = max(0.0, record.duration or 0.0) * 1000
    wait = min(
        duration, max(0.0, duration if record.first_byte is None else record.first_byte * 1000)
    )
    # ``time`` is to be the sum of the timings to the last digit, whatever floats make of it.
    wait, receive = round(wait, 3), round(duration - wait, 3)
    found: dict[str, Any] = {
        "startedDateTime": _date(record.began),
        "time": round(wait + receive, 3),
        "request": _request(record, unmask),
        "response": _response(record, unmask),
        "cache": {},
        "timings": {"send": 0, "wait": wait, "receive": receive},
        "_hostname": record.hostname,
        "_target": record.target,
        "_visitor": record.visitor,
    }
    if record.problem:
        found["_problem"] = found["comment"] = record.problem
    if messages := record.messages:
        sockets = [_websocket_message(each, unmask) for each in messages if each.kind in OPCODES]
        if sockets:
            found["_resourceType"], found["_webSocketMessages"] = "websocket", sockets
    return found


def _request(record: Record, unmask: bool) -> dict[str, Any]:
    line, fields = _lines(record.request_head)
    words = line.split(" ")
    version = words[2] if len(words) == 3 else "HTTP/1.1"
    named = dict((name.lower(), value) for name, value in reversed(fields))
    url = url_of(record)
    shown, url = (fields, url) if unmask else (mask.fields(fields), mask.target(url))
    url = _text(url)
    query = url.partition("?")[2]
    found: dict[str, Any] = {
        "method": record.method or "GET",
        "url": url,
        "httpVersion": version,
        "cookies": _cookies(shown),
        "headers": _pairs(shown),
        "queryString": [
            {"name": name, "value": value}
            for name, value in parse_qsl(query, keep_blank_values=True, errors="replace")
        ],
        "headersSize": len(record.request_head) or -1,
        "bodySize": record.request_body.size,
    }
    if record.request_body.size:
        kind = named.get("content-type", "")
        found["postData"] = {"mimeType": _text(kind) or DEFAULT_TYPE, "params": []}
        found["postData"] |= _body(record.request_body, fields, unmask, "_encoding")
    return found


def url_of(record: Record) -> str:
    """The URL that the visitor used, latin-1."""
    target = record.path or "/"
    if _is_url(target):
        return target
    fields = {name.lower(): value for name, value in reversed(_lines(record.request_head)[1])}
    scheme = "http" if fields.get("x-forwarded-proto", "").lower() == "http" else "https"
    host = fields.get("host") or record.hostname
    return f"{scheme}://{host}{target if target.startswith('/') else '/'}"


def _response(record: Record, unmask: bool) -> dict[str, Any]:
    line, fields = _lines(record.response_head)
    version, _, rest = line.partition(" ")
    named = dict((name.lower(), value) for name, value in reversed(fields))
    kind = named.get("content-type", "")
    shown = fields if unmask else mask.fields(fields)
    location = next((value for name, value in shown if name.lower() == "location"), "")
    answer = {"size": record.response_body.size, "mimeType": _text(kind) or DEFAULT_TYPE}
    answer |= _body(record.response_body, fields, unmask, "encoding")
    return {
        "status": record.status,
        "statusText": _text(rest.partition(" ")[2]),
        "httpVersion": version or "HTTP/1.1",
        "cookies": _cookies(shown, is_answer=True),
        "headers": _pairs(shown),
        "content": answer,
        "redirectURL": _text(location),
        "headersSize": len(record.response_head) or -1,
        "bodySize": record.response_body.size,
    }


def _body(kept: Kept, fields: list[tuple[str, str]], unmask: bool, encoding: str) -> dict[str, Any]:
    """The content as HAR has it: an answer's without its Content-Encoding. ``encoding``: the name
    of the field that says base64."""
    found: dict[str, Any] = {}
    data, coding = kept.data, content.field(fields, "content-encoding")
    if coding and data:
        if encoding == "encoding":
            plain, whole, note = content.decoded(fields, kept)
            if whole and not note.startswith(content.NOT_DECODED):
                found["size"] = len(plain)
                found["compression"] = len(plain) - kept.size
                data, coding = plain, ""
        if coding:
            hidden = None if unmask else masked_plain(fields, kept)
            if hidden is None:
                found["_contentEncoding"] = _text(coding)  # the text is as it was transferred
            else:
                data = hidden
    kind = content.field(fields, "content-type")
    try:
        text = data.decode()
        found["text"] = text if unmask else mask.body(text, kind)
    except UnicodeDecodeError:
        data = data if unmask or content.image_type(data) else mask.body_bytes(data, kind)
        found["text"], found[encoding] = base64.b64encode(data).decode(), "base64"
    if not kept.whole:
        found["_size"] = kept.size
        found["comment"] = f"only the first {len(kept.data)} of {kept.size} bytes were kept"
    return found


def masked_plain(fields: list[tuple[str, str]], kept: Kept) -> bytes | None:
    """A compressed body decoded and with its secrets masked; None if no secret was found in it."""
    plain, _, note = content.decoded(fields, kept)
    if note.startswith(content.NOT_DECODED):
        return None
    masked = mask.body_bytes(plain, content.field(fields, "content-type"))
    return None if masked == plain else masked


def _websocket_message(message: Message, unmask: bool) -> dict[str, Any]:
    is_text = message.kind == "text"
    data = message.data if unmask or is_text else mask.body_bytes(message.data)
    text = data.decode("utf-8", "replace") if is_text else base64.b64encode(data).decode()
    return {
        "type": "send" if message.from_visitor else "receive",
        "time": message.at,
        "opcode": OPCODES[message.kind],
        "data": text if unmask or not is_text else mask.body(text),
    }


def _cookies(fields: list[tuple[str, str]], is_answer: bool = False) -> list[dict[str, str]]:
    found = []
    for name, value in fields:
        if name.lower() == ("set-cookie" if is_answer else "cookie"):
            pairs = [value.partition(";")[0]] if is_answer else value.split(";")
            for pair in pairs:
                key, _, text = pair.strip().partition("=")
                found.append({"name": _text(key), "value": _text(text)})
    return found


def _pairs(fields: list[tuple[str, str]]) -> list[dict[str, str]]:
    """A line that is no field has no place in HAR."""
    return [
        {"name": _text(name), "value": _text(value)}
        for name, value in fields
        if _TOKEN.fullmatch(name)
    ]


def _lines(head: bytes) -> tuple[str, list[tuple[str, str]]]:
    """The first line and the fields of a head, latin-1, as far as it can be read."""
    line, *rest = head.decode("latin-1").split("\n")
    fields: list[tuple[str, str]] = []
    for each in rest:
        each = each.removesuffix("\r")
        if each[:1] in (" ", "\t") and fields:
            fields[-1] = (fields[-1][0], f"{fields[-1][1]} {each.strip()}")
        elif each:
            name, _, value = each.partition(":")
            fields.append((name, value.strip(" \t")))
    return line.removesuffix("\r"), fields


def _text(latin: str) -> str:
    """The text of bytes in latin-1: in UTF-8 if they are that. What is masked has no bytes."""
    try:
        return latin.encode("latin-1").decode()
    except UnicodeError:
        return latin


def _is_url(target: str) -> bool:
    return target.lower().startswith(("http://", "https://"))


def _date(at: float) -> str:
    try:
        moment = datetime.fromtimestamp(at, timezone.utc)
    except (OverflowError, ValueError, OSError):  # a clock that is far off
        moment = datetime.fromtimestamp(0, timezone.utc)
    return moment.isoformat(timespec="milliseconds").replace("+00:00", "Z")


# Import -----------------------------------------------------------------------------------------


def read(data: bytes, *, body: int) -> Found:
    """The visits of an archive, the oldest first. ``body``: bytes that are kept of each body.
    Raises NotHar."""
    document = _parsed(data)
    log = _member(document, "log", dict, "the file")
    version = log.get("version", VERSION)
    if not isinstance(version, str) or not version.startswith("1."):
        raise NotHar(f"log.version: {_shown(version)} came, expected {VERSION}")
    entries = _member(log, "entries", list, "log")
    if len(entries) > MOST_ENTRIES:
        raise NotHar(f"log.entries: {len(entries)} came, expected at most {MOST_ENTRIES}")
    records, left_out = [], 0
    for number, each in enumerate(entries):
        where = f"entries[{number}]"
        if not isinstance(each, dict):
            raise NotHar(f"{where}: {_kind(each)} came, expected an object")
        url = _member(_member(each, "request", dict, where), "url", str, f"{where}.request")
        if not _is_url(url) and not url.lower().startswith(("ws://", "wss://")):
            left_out += 1  # data:, blob:, chrome-extension: are in each browser's archive
            continue
        records.append(_record(each, where, body))
    notes = (f"{left_out} entries without an http URL were left out",) if left_out else ()
    return Found(sorted(records, key=lambda record: record.began), left_out, notes)


def _parsed(data: bytes) -> dict[str, Any]:
    if len(data) > MOST_FILE:
        raise NotHar(f"a file of {len(data)} bytes, expected at most {MOST_FILE}")
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise NotHar(f"byte {error.start} is not UTF-8, expected a HAR file") from None
    if values_in(data) > MOST_VALUES:
        raise NotHar(f"a file of over {MOST_VALUES} values, expected fewer")
    try:
        document = json.loads(text, parse_constant=_no_constant)
    except RecursionError:
        raise NotHar("the file nests too deeply, expected a HAR file") from None
    except json.JSONDecodeError as error:
        raise NotHar(
            f"line {error.lineno}, column {error.colno}: {error.msg}, expected a HAR file"
        ) from None
    except ValueError:
        raise NotHar("a number of thousands of digits came, expected a HAR file") from None
    if not isinstance(document, dict):
        raise NotHar(f"the file: {_kind(document)} came, expected an object")
    return document


def values_in(data: bytes) -> int:
    """How many objects a text in JSON becomes at most, about. To be asked before it is parsed."""
    outside = _STRING.sub(b"", data.replace(b"\\\\", b"").replace(b'\\"', b""))
    return sum(map(outside.count, (b"[", b"{", b",", b":")))


def _no_constant(name: str) -> float:
    raise NotHar(f"{name} came, which is no JSON, expected a HAR file")


def _record(each: dict[str, Any], where: str, body: int) -> Record:
    request = each["request"]
    at = f"{where}.request"
    method = _member(request, "method", str, at)
    if not _TOKEN.fullmatch(method):
        raise NotHar(f"{at}.method: {_shown(method)} came, expected one such as GET")
    scheme, authority, target = _url(request["url"], at)
    fields = _fields(request, at)
    fields = [item for item in fields if item[0].lower() != "host" or _is_host(item[1])]
    if not any(name.lower() == "host" for name, _ in fields):
        fields.insert(0, ("Host", authority))
    if not any(name.lower() == "x-forwarded-proto" for name, _ in fields):
        fields.append(("X-Forwarded-Proto", scheme))
    began = _instant(each, where)
    duration = _milliseconds(each.get("time", 0), f"{where}.time")
    timings = each.get("timings")
    first_byte = None
    if isinstance(timings, dict):
        parts = [
            max(0.0, _milliseconds(timings.get(name, 0), f"{where}.timings.{name}"))
            for name in ("blocked", "dns", "connect", "send", "wait")
        ]
        first_byte = sum(parts) / 1000
    response = each.get("response")
    record = Record(
        hostname=_bounded(each.get("_hostname")) or _name(authority),
        target=_bounded(each.get("_target")),
        visitor=_bounded(each.get("_visitor")),
        problem=_bounded(each.get("_problem")),
        began=began,
        duration=max(0.0, duration) / 1000,
        first_byte=first_byte,
        method=method,
        path=target,
        request_head=_head(f"{method} {target} HTTP/1.1", fields, at),
        imported=True,
        state=ENDED,
    )
    post = request.get("postData")
    if isinstance(post, dict):
        record.request_body = _kept(post, f"{at}.postData", body, "_encoding")
    if isinstance(response, dict):
        _read_answer(record, response, f"{where}.response", body)
    for message in _messages(each, where):
        record.add_message(message, 1 << 20)
    return record


def _read_answer(record: Record, response: dict[str, Any], where: str, body: int) -> None:
    status = response.get("status", 0)
    if type(status) is not int or not (status == 0 or 100 <= status <= 999):
        raise NotHar(f"{where}.status: {_shown(status)} came, expected a number such as 200")
    if status == 0:  # there was no answer
        return
    fields = _fields(response, where)
    found = response.get("content")
    if isinstance(found, dict):
        record.response_body = _kept(found, f"{where}.content", body, "encoding")
        if "_contentEncoding" not in found:  # HAR has the text decoded
            fields = [item for item in fields if item[0].lower() != "content-encoding"]
        fields = [item for item in fields if item[0].lower() != "transfer-encoding"]
    reason = response.get("statusText", "")
    reason = _CONTROL.sub(" ", _latin(reason)[:200]) if isinstance(reason, str) else ""
    record.status = status
    record.response_head = _head(f"HTTP/1.1 {status} {reason}", fields, where)


def _url(url: str, where: str) -> tuple[str, str, str]:
    """Scheme, authority and request target."""
    try:
        parts = urlsplit(url)
        authority = parts.netloc.rpartition("@")[2]
    except ValueError as error:
        raise NotHar(f"{where}.url: {_shown(url)} came: {error}") from None
    target = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
    target = http1.percent_encoded(_latin(target)).replace(" ", "%20")
    line = f"GET {target} HTTP/1.1\r\nHost: {_latin(authority)}\r\n\r\n"
    try:
        request = http1.parse_request(line.encode("latin-1"))
        http1.hostname(request)
    except http1.Malformed as error:
        raise NotHar(f"{where}.url: {error}") from None
    return {"ws": "http", "wss": "https"}.get(parts.scheme, parts.scheme), authority, target


def _is_host(value: str) -> bool:
    """An export writes it into a URL, which an import would refuse."""
    try:
        _url(f"http://{value}/", "")
    except NotHar:
        return False
    return not set("/?#@") & set(value)


def _name(authority: str) -> str:
    name = authority if authority.endswith("]") else authority.rpartition(":")[0] or authority
    return name.lower().removesuffix(".")


def _fields(message: Mapping[str, Any], where: str) -> list[tuple[str, str]]:
    found: list[tuple[str, str]] = []
    headers = message.get("headers", [])
    if not isinstance(headers, list):
        raise NotHar(f"{where}.headers: {_kind(headers)} came, expected a list")
    for number, each in enumerate(headers):
        at = f"{where}.headers[{number}]"
        if not isinstance(each, dict):
            raise NotHar(f"{at}: {_kind(each)} came, expected an object")
        name, value = _member(each, "name", str, at), _member(each, "value", str, at)
        if name.startswith(":"):  # HTTP/2's, which say what the first line says
            continue
        if not _TOKEN.fullmatch(name):
            raise NotHar(f"{at}.name: {_shown(name)} came, expected the name of a field")
        for line in value.split("\n"):  # as Chrome has joined several Set-Cookies
            line = _latin(line.removesuffix("\r")).strip(" \t")
            if _CONTROL.search(line):
                raise NotHar(f"{at}.value has a control character, expected text")
            found.append((name, line))
    return found


def _head(line: str, fields: list[tuple[str, str]], where: str) -> bytes:
    head = http1.encode_head(line, fields)
    if len(head) > http1.HEAD_LIMIT:
        raise NotHar(f"{where}: a head of {len(head)} bytes, expected at most {http1.HEAD_LIMIT}")
    return head


def _kept(message: Mapping[str, Any], where: str, body: int, encoding: str) -> Kept:
    text = message.get("text", "")
    if not isinstance(text, str):
        raise NotHar(f"{where}.text: {_kind(text)} came, expected a text")
    data = _decoded(text, where) if message.get(encoding) == "base64" else _bytes(text)
    size = message.get("_size", len(data))
    if type(size) is not int or not len(data) <= size < 1 << 60:
        raise NotHar(f"{where}._size: {_shown(size)} came, expected the size of the whole body")
    return Kept(data[:body], size)


def _decoded(text: str, where: str) -> bytes:
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        raise NotHar(f"{where}.text is no base64, which its encoding says") from None


def _messages(each: Mapping[str, Any], where: str) -> Iterator[Message]:
    messages = each.get("_webSocketMessages", [])
    if not isinstance(messages, list):
        raise NotHar(f"{where}._webSocketMessages: {_kind(messages)} came, expected a list")
    for number, message in enumerate(
        messages[-MOST_MESSAGES:], max(0, len(messages) - MOST_MESSAGES)
    ):
        at = f"{where}._webSocketMessages[{number}]"
        if not isinstance(message, dict):
            raise NotHar(f"{at}: {_kind(message)} came, expected an object")
        text, kind = _member(message, "data", str, at), message.get("opcode")
        if type(kind) is not int or kind not in KINDS:
            raise NotHar(f"{at}.opcode: {_shown(kind)} came, expected one such as 1")
        data = _bytes(text) if kind == OPCODES["text"] else _decoded(text, at)
        when = message.get("time", 0.0)
        if type(when) not in (int, float) or not abs(when) < 1e12:
            raise NotHar(f"{at}.time: {_shown(when)} came, expected seconds since 1970")
        yield Message(
            float(when), message.get("type") == "send", KINDS[kind], data[:MOST_MESSAGE], len(data)
        )


def _instant(each: Mapping[str, Any], where: str) -> float:
    text = _member(each, "startedDateTime", str, where)
    match = _DATE.fullmatch(text)
    try:
        if match is None:
            raise ValueError
        year, month, day, hour, minute, second = map(int, match.groups()[:6])
        started = datetime(year, month, day, hour, minute, second, tzinfo=timezone.utc)
        moment = started.timestamp()
        if match[9]:
            offset = int(match[10]) * 3600 + int(match[11]) * 60
            moment -= offset if match[9] == "+" else -offset
        return moment + float(f"0.{match[7] or 0}")
    except (ValueError, OverflowError):
        raise NotHar(
            f"{where}.startedDateTime: {_shown(text)} came, expected one such as "
            "2026-01-31T12:00:00.000Z"
        ) from None


def _milliseconds(value: object, where: str) -> float:
    """-1 stands for a time that there is not."""
    if value is None:
        return 0.0
    if (
        not isinstance(value, (int, float))
        or isinstance(value, bool)
        or not -1 <= value < MOST_TIME
    ):
        raise NotHar(f"{where}: {_shown(value)} came, expected milliseconds")
    return float(value)


def _member(
    value: Mapping[str, Any],
    name: str,
    expected: type[dict[str, Any]] | type[list[Any]] | type[str],
    where: str,
) -> Any:
    if name not in value:
        raise NotHar(f"{where} has no {name}, expected a HAR file")
    if not isinstance(value[name], expected):
        words = _kind(expected())
        raise NotHar(f"{where}.{name}: {_kind(value[name])} came, expected {words}")
    return value[name]


def _bounded(value: object) -> str:
    return _CONTROL.sub(" ", value[:500]) if isinstance(value, str) else ""


def _bytes(text: str) -> bytes:
    return text.encode("utf-8", "replace")  # JSON can have half of a surrogate pair


def _latin(text: str) -> str:
    return _bytes(text).decode("latin-1")


def _shown(value: object) -> str:
    return ascii(value[:40] if isinstance(value, str) else value)[:80]


def _kind(value: object) -> str:
    names = {dict: "an object", list: "a list", str: "a text", bool: "true or false"}
    return "null" if value is None else names.get(type(value), "a number")
