"""The inspector's page and its JSON API: what is answered to which request.

docs/inspector.md has each address with an example. Answers are JSON objects; an error is
``{"error": code, "message": one line}``. Secrets are masked (mask.py) unless the request has
``unmask=1``.

What a visitor has sent leaves here as text in JSON, or as a file to be saved: never as something
that a browser would open as a page, whatever its Content-Type says.
"""

from __future__ import annotations

import base64
import json
import re
import secrets
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from time import monotonic, sleep, time
from typing import Any

from gotunnel import __version__

from . import content, copies, har, mask, search
from .access import Door
from .compare import compare
from .order import CannotReplay
from .page import page, policy
from .record import Changes, Kept, Message, Record, Ring, Subscription
from .replay import Replay, Replayer
from .server import JSON, POLICY, Answer, Asked, Live, Unanswered, as_json

MOST_JSON = 16 * 1024 * 1024  # bytes of an order to replay: a body of 8 MiB in base64, and fields
MOST_VALUES = 10_000  # in it; 16 MiB of [[],[], would become 300 MB of objects
MOST_LISTED, LISTED = 1000, 200  # visits in an answer: at most, and without ``limit``
MOST_SHOWN = 2048  # characters of a path in a list
MOST_TEXT = 512  # of other texts there
# Characters of a text made of a body, and of all messages of a visit: a page that shows more would
# be slow. The file of a body has all.
MOST_BODY_TEXT = 512 * 1024
MOST_MESSAGE, MOST_MESSAGES = 64 * 1024, 2 * 1024 * 1024
# Seconds between what a reader of events is told. More often would be of no use to an eye, and a
# description of each visit, for each reader, takes time that a flood of visits needs itself.
PAUSE = 0.25
# Seconds after which a long look at records lets other threads go first, see in_turns(). Shorter
# ones make it slow: on a busy machine, each turn costs it some milliseconds.
TURN = 0.005
PLAIN = "text/plain; charset=utf-8"
SAVED = "application/octet-stream"
TRUE = ("1", "true", "yes", "on")

NO_TOKEN = """\
<!doctype html>
<html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>gotunnel inspector</title>
<link rel="icon" href="data:,">
<style>
  :root { color-scheme: light dark; --back: #fafafc; --text: #22262e }
  @media (prefers-color-scheme: dark) { :root { --back: #15171c; --text: #e4e7ee } }
  body { margin: 0; padding: 18vh 1.5rem 3rem; background: var(--back); color: var(--text);
         font: 1.0625rem/1.6 system-ui, sans-serif }
  main { max-width: 34rem; margin: 0 auto }
  h1 { margin: 0 0 .75rem; font-size: 1.75rem; line-height: 1.25; font-weight: 600 }
</style>
<main>
<h1>The inspector needs its token</h1>
<p>Open the address that gotunnel has printed at its start. <code>gotunnel inspect --url</code>
prints it again.</p>
</main>
</html>
"""
# For a link from another site: a browser sends no SameSite=Strict cookie on a redirect that follows
# such a link, but does if a page of ours leads on.
ONWARD = """\
<!doctype html>
<html lang="en"><meta charset="utf-8"><meta http-equiv="refresh" content="0;url=./">
<title>gotunnel inspector</title>
<p><a href="./">The inspector</a></p>
</html>
"""
HTML = "text/html; charset=utf-8"
# For that page: in a sandbox a browser would not lead on.
BARE_POLICY = "default-src 'none'; frame-ancestors 'none'; base-uri 'none'; form-action 'none'"


class Api:
    """The Site of an InspectorServer."""

    def __init__(
        self,
        ring: Ring,
        door: Door,
        tell: Callable[[], Mapping[str, object]],
        *,
        show: Callable[[], tuple[bytes, str]] = page,
        replays: Replayer | None = None,
        body: int = 64 * 1024,
    ):
        """``tell()``: what /info says of the agent. ``show()``: the page, and its Content Security
        Policy. ``replays`` is None without an agent. ``body``: bytes that are kept of each body of
        an archive."""
        self._ring, self._door, self._tell, self._show = ring, door, tell, show
        # A page that has lost the connection learns by these whether it is another agent's now.
        self._instance, self._started_at = secrets.token_hex(8), time()
        self._replays = replays
        self._body = body
        # Held to look through all records: one search at a time, as it takes the processor from the
        # visits.
        self._looking = threading.Lock()

    def body_limit(self, method: str, path: str) -> int:
        return har.MOST_FILE if path == "/api/v1/har" else MOST_JSON

    def answer(self, asked: Asked) -> Answer | Live:
        """Raises Unanswered, and what is a bug."""
        if asked.path == "/":
            return self._page(asked)
        if asked.refusal is not None:
            raise Unanswered(*asked.refusal)
        found: dict[str, Callable[[], Answer | Live]] = {}
        for pattern, method, function in ROUTES:
            if match := pattern.fullmatch(asked.path):
                found[method] = partial(function, self, asked, *map(int, match.groups()))
        if not found:
            raise Unanswered(404, "not-found", "there is no such address here")
        method = "GET" if asked.method == "HEAD" else asked.method
        if method not in found:
            allowed = [*found, *["HEAD"] * ("GET" in found)]
            raise Unanswered(405, "method", f"{asked.method} came, expected {' or '.join(found)}",
                             ", ".join(allowed))  # fmt: skip
        return found[method]()

    def _page(self, asked: Asked) -> Answer:
        if asked.method == "POST":
            raise Unanswered(405, "method", "POST came, expected GET", "GET, HEAD")
        token = asked.query.get("token")
        if token is not None and self._door.is_token(token):
            return self._let_in(asked)
        if asked.refusal is not None:
            html = NO_TOKEN.encode()
            return Answer(asked.refusal.status, HTML, html, ((POLICY, policy(html)),))
        body, rules = self._show()
        return Answer(200, HTML, body, ((POLICY, rules),))

    def _let_in(self, asked: Asked) -> Answer:
        """Exchange the token in the address for a cookie, and take it out of the address."""
        door = self._door
        cookie = f"{door.cookie_name}={door.cookie_value}; HttpOnly; SameSite=Strict; Path=/"
        if asked.is_from_elsewhere:
            fields = ("Set-Cookie", cookie), (POLICY, BARE_POLICY)
            return Answer(200, HTML, ONWARD.encode(), fields)
        return Answer(303, PLAIN, b"", (("Location", "./"), ("Set-Cookie", cookie)))

    # The visits

    def _info(self, asked: Asked) -> Answer:
        ring = self._ring
        records = ring.all()
        return as_json({
            "version": __version__,
            "instance": self._instance,
            "started_at": self._started_at,
            "now": time(),
            "visits": len(records),
            "oldest": records[0].id if records else None,
            "latest": records[-1].id if records else None,
            "memory": ring.budget,
            "used": ring.used,
            "body": self._body,
            "filters": list(search.FILTERS),
            "replay": self._replays is not None,
            **self._tell(),
        })  # fmt: skip

    def _visits(self, asked: Asked) -> Answer:
        records = self._ring.all()
        matching = self._matching(asked, records)
        limit = _whole(asked.query, "limit", MOST_LISTED, LISTED)
        shown = matching[-limit:][::-1] if limit else []  # the latest first
        unmask = _wants(asked, "unmask")
        return as_json({
            "visits": [summary(record, unmask) for record in in_turns(shown)],
            "matched": len(matching),
            "total": len(records),
            "oldest": records[0].id if records else None,
        })  # fmt: skip

    def _matching(self, asked: Asked, records: list[Record]) -> list[Record]:
        """Those that the query asks for, the oldest first. Raises Unanswered."""
        query = asked.query
        terms = [query.get("q", "")]
        for name in ("method", "status", "hostname"):
            if value := query.get(name, ""):
                terms.append(f"{name}:{value}" if " " not in value else f'{name}:"{value}"')
        if _wants(asked, "failed"):
            terms.append("is:failed")
        try:
            fits = search.parse(" ".join(filter(None, terms)), now=time())
        except search.QueryError as error:
            raise Unanswered(400, "query", str(error)) from None
        after = _whole(query, "after", 1 << 53, 0)
        before = _whole(query, "before", 1 << 53, 1 << 53)
        ids = _numbers(query, "ids")
        with self._looking:
            return [
                record for record in in_turns(records)
                if after < record.id < before and (ids is None or record.id in ids) and fits(record)
            ]  # fmt: skip

    def _visit(self, asked: Asked, number: int) -> Answer:
        return as_json(detail(self._record(number), _wants(asked, "unmask")))

    def _record(self, number: int) -> Record:
        record = self._ring.get(number)
        if record is None:
            raise Unanswered(404, "not-found", f"there is no visit {number}, or not any more")
        return record

    def _request_body(self, asked: Asked, number: int) -> Answer:
        record = self._record(number)
        return _as_file(asked, record.request_head, record.request_body, f"{number}-request")

    def _response_body(self, asked: Asked, number: int) -> Answer:
        record = self._record(number)
        return _as_file(asked, record.response_head, record.response_body, f"{number}-response")

    def _curl(self, asked: Asked, number: int) -> Answer:
        return self._copy(asked, number, copies.as_curl)

    def _python(self, asked: Asked, number: int) -> Answer:
        return self._copy(asked, number, copies.as_python)

    def _copy(self, asked: Asked, number: int, write: Callable[[copies.Copied], str]) -> Answer:
        record = self._record(number)
        try:
            request = copies.copied(
                record.request_head, record.request_body.data, record.request_body.size,
                record.hostname,
            )  # fmt: skip
        except copies.CannotCopy as error:
            raise Unanswered(409, "unknown", str(error)) from None
        if not _wants(asked, "unmask"):
            request = _masked_copy(request)
        return Answer(200, PLAIN, write(request).encode("utf-8", "backslashreplace"))

    def _clear(self, asked: Asked) -> Answer:
        count = len(self._ring)
        self._ring.clear()
        return as_json({"cleared": count})

    # HAR

    def _export(self, asked: Asked) -> Answer:
        records = self._matching(asked, self._ring.all())
        pieces = har.export(in_turns(records), unmask=_wants(asked, "unmask"))
        saved = (("Content-Disposition", 'attachment; filename="gotunnel.har"'),)
        return Answer(200, JSON, pieces, saved)

    def _import(self, asked: Asked) -> Answer:
        try:
            found = har.read(asked.body, body=self._body)
        except har.NotHar as error:
            raise Unanswered(400, "har", str(error)) from None
        ids = [self._ring.add(record).id for record in found.records]
        kept = [number for number in ids if self._ring.get(number) is not None]
        notes = list(found.notes)
        if len(kept) < len(ids):
            notes.append(f"{len(ids) - len(kept)} of them are not kept: the memory is full")
        return as_json({
            "imported": len(kept),
            "skipped": found.skipped + len(ids) - len(kept),
            "ids": kept[:MOST_LISTED],
            "notes": notes,
        })  # fmt: skip

    # Replays

    def _replay(self, asked: Asked, number: int) -> Answer:
        replays = self._replaying()
        self._record(number)
        try:
            return as_json(replays.start(number, json_of(asked.body)).document(), 202)
        except CannotReplay as error:
            raise Unanswered(STATUS_OF.get(error.code, 400), error.code, str(error)) from None

    def _all_replays(self, asked: Asked) -> Answer:
        return as_json({"replays": [replay.document() for replay in self._replaying().all()]})

    def _one_replay(self, asked: Asked, number: int) -> Answer:
        return as_json(_found(self._replaying().get(number), number).document())

    def _stop(self, asked: Asked, number: int) -> Answer:
        return as_json(_found(self._replaying().stop(number), number).document())

    def _replaying(self) -> Replayer:
        if self._replays is None:
            raise Unanswered(501, "replay", "this inspector replays nothing")
        return self._replays

    def _compared(self, asked: Asked) -> Answer:
        both = [_whole(asked.query, name, 1 << 53, None) for name in ("left", "right")]
        left, right = map(self._record, both)
        return as_json(compare(left, right, _wants(asked, "unmask")))

    # Events

    def _events(self, asked: Asked) -> Live:
        return Live(Events(self._ring.subscribe(), _wants(asked, "unmask")))


def in_turns(records: Iterable[Record]) -> Iterator[Record]:
    """The records; every TURN, threads of visits that wait for the GIL get it. By itself Python
    would let them wait for its switch interval (process.SWITCH_INTERVAL), each time."""
    began = monotonic()
    for record in records:
        if monotonic() - began > TURN:
            sleep(0)
            began = monotonic()
        yield record


def _found(replay: Replay | None, number: int) -> Replay:
    if replay is None:
        raise Unanswered(404, "not-found", f"there is no replay {number}, or not any more")
    return replay


# The status for a replay that is refused, by its code.
STATUS_OF = {"not-found": 404, "busy": 503}

ROUTES: list[tuple[re.Pattern[str], str, Callable[..., Answer | Live]]] = [
    (re.compile(f"/api/v1/{pattern}".replace("ID", "([1-9][0-9]{0,15})")), method, function)
    for pattern, method, function in (
        ("info", "GET", Api._info),
        ("visits", "GET", Api._visits),
        ("visits/ID", "GET", Api._visit),
        ("visits/ID/request-body", "GET", Api._request_body),
        ("visits/ID/response-body", "GET", Api._response_body),
        ("visits/ID/curl", "GET", Api._curl),
        ("visits/ID/python", "GET", Api._python),
        ("visits/ID/replay", "POST", Api._replay),
        ("har", "GET", Api._export),
        ("har", "POST", Api._import),
        ("replays", "GET", Api._all_replays),
        ("replays/ID", "GET", Api._one_replay),
        ("replays/ID/stop", "POST", Api._stop),
        ("compare", "GET", Api._compared),
        ("clear", "POST", Api._clear),
        ("events", "GET", Api._events),
    )
]


class Events:
    """Server-sent events for one reader, from the changes of a ring."""

    def __init__(self, changes: Subscription, unmask: bool):
        self._changes, self._unmask = changes, unmask
        self._oldest: int | None = None  # as the reader knows it
        self._over = threading.Event()
        self._told_at = float("-inf")  # monotonic

    def next(self, timeout: float) -> bytes | None:
        deadline = monotonic() + timeout
        if self._oldest is None:
            self._oldest = self._changes.take_now().oldest
            return event("hello", {"now": time(), "oldest": self._oldest})
        if self._over.wait(max(0.0, self._told_at + PAUSE - monotonic())):
            return None
        while (left := deadline - monotonic()) > 0:
            changes = self._changes.take(left)
            if self._over.is_set():
                return None
            if changes is not None and (told := self._told(changes)):
                self._told_at = monotonic()
                return told
        return b""

    def _told(self, changes: Changes) -> bytes:
        parts = []
        if changes.records or changes.missed:
            visits = [summary(record, self._unmask) for record in in_turns(changes.records)]
            parts.append(event("visit", {"visits": visits, "missed": changes.missed}))
        if changes.oldest != self._oldest:
            self._oldest = changes.oldest
            parts.append(event("gone", {"oldest": changes.oldest}))
        parts += [event(name, value) for name, value in changes.events]
        return b"".join(parts)

    def close(self) -> None:
        self._over.set()
        self._changes.close()


def event(name: str, value: object) -> bytes:
    """One server-sent event. JSON has no line break in it."""
    return f"event: {name}\ndata: {json.dumps(value)}\n\n".encode()


# Documents


def summary(record: Record, unmask: bool = False) -> dict[str, Any]:
    """A visit in a list."""
    path = record.path if unmask else mask.target(record.path[: 2 * MOST_SHOWN])
    return {
        "id": record.id,
        "hostname": record.hostname[:MOST_TEXT],
        "mode": record.mode,
        "target": record.target[:MOST_TEXT],
        "visitor": record.visitor[:MOST_TEXT],
        "began": record.began,
        "duration_ms": _milliseconds(record.duration),
        "first_byte_ms": _milliseconds(record.first_byte),
        "method": record.method[:MOST_TEXT],
        "path": readable(path)[:MOST_SHOWN],
        "status": record.status,
        "type": readable(search.content_type(record.response_head)),
        "request_bytes": record.request_body.size,
        "response_bytes": record.response_body.size,
        "problem": record.problem[:MOST_TEXT],
        "failed": search.has_failed(record),
        "followed": search.was_followed(record),
        "messages": record.dropped + len(record.messages),
        "state": record.state,
        "replay_of": record.replay_of,
        "imported": record.imported,
    }


def detail(record: Record, unmask: bool = False) -> dict[str, Any]:
    """A visit with all that is kept of it."""
    messages, dropped = _messages(record.messages, unmask)
    path = record.path if unmask else mask.target(record.path)
    url = har.url_of(record)
    return {
        **summary(record, unmask),
        "path": readable(path),
        "url": readable(url if unmask else mask.target(url)),
        "masked": not unmask,
        "request": _message(
            record.request_head, record.request_body, record.request_trailers, unmask
        ),
        "response": _message(
            record.response_head, record.response_body, record.response_trailers, unmask
        ),
        "interim": [_head_text(head, unmask) for head in record.interim],
        "messages": messages,
        "messages_dropped": record.dropped + dropped,
    }


def _message(
    head: bytes, kept: Kept, trailers: tuple[tuple[str, str], ...], unmask: bool
) -> dict[str, Any]:
    text = _head_text(head, unmask)
    line, fields = _lines(text)
    shown_trailers = list(trailers) if unmask else mask.fields(trailers)
    return {
        "line": line,
        "fields": fields,
        "head": text,
        "body": body_document(fields_of(head), kept, unmask),
        "trailers": [[name, readable(value)] for name, value in shown_trailers],
    }


def _head_text(head: bytes, unmask: bool) -> str:
    text = head.decode("utf-8", "backslashreplace")
    return text if unmask else mask.head(text)


def _lines(head: str) -> tuple[str, list[list[str]]]:
    """The first line of a head, and its fields; also of one that breaks rules. A folded line
    belongs to the field before."""
    line, *rest = head.split("\n")
    fields: list[list[str]] = []
    for each in rest:
        each = each.removesuffix("\r")
        if each[:1] in (" ", "\t") and fields:
            fields[-1][1] = f"{fields[-1][1]} {each.strip()}".strip(" ")
        elif each:
            name, _, value = each.partition(":")
            fields.append([name, value.strip(" \t")])
    return line.removesuffix("\r"), fields


def fields_of(head: bytes) -> list[tuple[str, str]]:
    """The fields of a head in latin-1, as far as it can be read."""
    return [(name, value) for name, value in _lines(head.decode("latin-1"))[1]]


def body_document(fields: list[tuple[str, str]], kept: Kept, unmask: bool) -> dict[str, Any]:
    """A body as it is to be shown. ``text`` is cut at MOST_BODY_TEXT; ``note`` says so."""
    kind_of = content.field(fields, "content-type")
    shown = (
        content.describe(fields, kept)
        if unmask
        else content.describe(fields, kept, lambda data: mask.body_bytes(data, kind_of))
    )
    text = shown.text[:MOST_BODY_TEXT]
    notes = [shown.note] if shown.note else []
    if len(text) < len(shown.text):
        notes.append(f"the first {len(text)} of {len(shown.text)} characters")
    if not unmask:
        text = mask.body(text, kind_of)
    document = {
        "kind": shown.kind,
        "type": readable(kind_of),
        "image": shown.type,
        "encoding": readable(content.field(fields, "content-encoding")),
        "size": kept.size,
        "kept": len(kept.data),
        "whole": kept.whole,
        "text": text,
        "note": "; ".join(notes),
    }
    if shown.parts:
        document["parts"] = [_part(part, unmask) for part in shown.parts]
    return document


def _part(part: content.Part, unmask: bool) -> dict[str, Any]:
    if unmask:
        text = part.text
    else:
        is_secret = mask.is_secret(part.name) and part.text
        text = mask.MASK if is_secret else mask.body(part.text, part.type)
    return {
        "name": part.name,
        "filename": part.filename,
        "type": part.type,
        "kind": part.kind,
        "size": part.size,
        "text": text[:MOST_BODY_TEXT],
        "note": part.note,
    }


def _messages(messages: list[Message], unmask: bool) -> tuple[list[dict[str, Any]], int]:
    """Messages as they are shown, and how many of the oldest are left out."""
    found: list[dict[str, Any]] = []
    size = 0
    for number, message in enumerate(reversed(messages)):
        shown = _one_message(message, unmask)
        size += len(shown.get("text") or shown.get("base64") or "") + 200
        if size > MOST_MESSAGES:
            return found[::-1], len(messages) - number
        found.append(shown)
    return found[::-1], 0


def _one_message(message: Message, unmask: bool) -> dict[str, Any]:
    found: dict[str, Any] = {
        "at": message.at,
        "from_visitor": message.from_visitor,
        "kind": message.kind,
        "size": message.size,
        "kept": len(message.data),
        "note": message.note,
    }
    data = message.data[:MOST_MESSAGE]
    try:
        text = data.decode()
    except UnicodeDecodeError:
        data = data if unmask else mask.body_bytes(data)
        return found | {"base64": base64.b64encode(data).decode()}
    return found | {"text": text if unmask else mask.body(text)}


def _as_file(asked: Asked, head: bytes, kept: Kept, name: str) -> Answer:
    """A body as a file to be saved. Secrets can be masked only in what is decoded."""
    unmask = _wants(asked, "unmask")
    fields, data = fields_of(head), kept.data
    if _wants(asked, "decoded") or not unmask:
        data = content.decoded(fields, kept)[0]
    # In an image, bytes that look like a secret are none, and the image would be broken.
    if not unmask and not content.image_type(data):
        data = mask.body_bytes(data, content.field(fields, "content-type"))
    saved = (("Content-Disposition", f'attachment; filename="{name}.bin"'),)
    return Answer(200, SAVED, data, saved)


def _masked_copy(request: copies.Copied) -> copies.Copied:
    fields = [
        (name, value.replace(mask.MASK, mask.COPY_MASK))
        for name, value in mask.fields(request.fields)
    ]
    body = mask.body_bytes(request.body, content.field(fields, "content-type"))
    if content.field(fields, "content-encoding"):
        kept = Kept(request.body, len(request.body))
        if (plain := har.masked_plain(list(request.fields), kept)) is not None:
            body = plain
            fields = [item for item in fields if item[0].lower() != "content-encoding"]
    return request._replace(
        target=mask.target(request.target).replace(mask.MASK, mask.COPY_MASK),
        fields=fields,
        body=body.replace(mask.MASK.encode(), mask.COPY_MASK.encode()),
    )


def readable(latin: str) -> str:
    """A text in latin-1, each character a byte, as it is meant: in UTF-8 if it is that."""
    try:
        return latin.encode("latin-1").decode("utf-8", "backslashreplace")
    except UnicodeEncodeError:  # it has a mask
        return latin


def _milliseconds(seconds: float | None) -> float | None:
    return None if seconds is None else round(max(0.0, seconds) * 1000, 3)


def _wants(asked: Asked, name: str) -> bool:
    value = asked.query.get(name, "").lower()
    if value not in (*TRUE, "", "0", "false", "no", "off"):
        raise Unanswered(400, "query", f"{name}: {value[:40]!a} came, expected 1 or 0")
    return value in TRUE


def _whole(query: Mapping[str, str], name: str, most: int, default: int | None) -> int:
    text = query.get(name, "")
    if not text and default is not None:
        return default
    if not (text.isascii() and text.isdigit() and len(text) < 18):
        came = f"{text[:40]!a} came" if text else "nothing came"
        raise Unanswered(400, "query", f"{name}: {came}, expected a number")
    return min(int(text), most)


def _numbers(query: Mapping[str, str], name: str) -> frozenset[int] | None:
    if not (text := query.get(name, "")):
        return None
    numbers = text.split(",")
    if not all(each.isascii() and each.isdigit() and len(each) < 18 for each in numbers):
        raise Unanswered(400, "query", f"{name}: {text[:40]!a} came, expected numbers such as 3,4")
    return frozenset(map(int, numbers))


def json_of(body: bytes) -> object:
    """The document in a request's body; an empty body stands for {}. Raises Unanswered."""
    if har.values_in(body) > MOST_VALUES:
        raise Unanswered(400, "json", f"JSON of over {MOST_VALUES} values came, expected an order")
    try:
        return json.loads(body.decode()) if body.strip() else {}
    except (ValueError, RecursionError):
        raise Unanswered(400, "json", "the body is no JSON in UTF-8, expected an object") from None
