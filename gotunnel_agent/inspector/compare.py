"""Compares two records: their requests and answers, field by field and body by body.

JSON is compared by its structure, other text by lines, and everything else by size and hash. The
texts are those that are shown: decoded, and with secrets masked unless the user asked for them. If
two masked values differ, the comparison says that they do, and not how.

Anybody can send a body, and a diff can take time that grows with the cube of its input. So the part
of two texts that differs is cut at MOST_LINES lines before difflib sees it, and lists in JSON are
aligned up to MOST_ITEMS items.

Pure: no socket, no clock, no thread.
"""

from __future__ import annotations

import difflib
import hashlib
import json
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from . import content, mask
from .record import Kept, Record

MOST_CHANGES = 300  # places in JSON that differ, and are shown
MOST_DEPTH = 60  # of lists and objects in each other; JSON that is deeper is compared as text
# Items of two lists that are aligned, so that one that was inserted does not make all others look
# changed. Of longer lists the first is compared with the first, and so on.
MOST_ITEMS = 300
MOST_LINES = 600  # lines of each text behind the first that differs, for difflib
MOST_SHOWN = 400  # lines of a diff that are shown
MOST_LINE = 300  # characters of a line, or of a value in JSON, that are shown
CONTEXT = 3  # equal lines around those that differ
MOST_PATH = 300  # characters

# Fields that differ from answer to answer and mean nothing: they do not make two answers unequal.
USUAL = frozenset({
    "date", "age", "expires", "last-modified", "etag", "server-timing", "x-request-id",
    "x-runtime", "x-response-time", "x-correlation-id", "x-trace-id", "traceparent", "cf-ray",
    "x-amzn-trace-id", "x-amzn-requestid", "x-process-time", "keep-alive", "nel", "report-to",
})  # fmt: skip
# Kinds of content.describe() whose text is compared as text.
TEXTS = ("text", "json", "form", "multipart", "sse")
MORE = "..."

Document = dict[str, Any]


class _Side(NamedTuple):
    """One message of a record."""

    line: str
    fields: list[tuple[str, str]]
    kept: Kept


def compare(left: Record, right: Record, unmask: bool = False) -> Document:
    """How two records differ, for JSON. ``same``: the two answers are equal, except for what is
    USUAL."""
    request = _message(_request(left), _request(right), unmask)
    response = _message(_answer(left), _answer(right), unmask)
    status, problem = _pair(left.status, right.status), _pair(left.problem, right.problem)
    response = {"status": status, "problem": problem, **response}
    response["same"] = response["same"] and status["same"] and problem["same"]
    return {
        "left": left.id,
        "right": right.id,
        "same": response["same"],
        "masked": not unmask,
        "duration_ms": _pair(*(_milliseconds(record) for record in (left, right))),
        "request": request,
        "response": response,
    }


def key_of(record: Record) -> tuple[object, ...]:
    """Equal for records whose answers are equal, except for what is USUAL."""
    fields = _answer(record).fields
    told = sorted((name.lower(), value) for name, value in fields if name.lower() not in USUAL)
    body = record.response_body
    digest = hashlib.sha256(repr(told).encode() + b"\0" + body.data).digest()
    return record.status, record.problem, body.size, digest


def _request(record: Record) -> _Side:
    return _side(record.request_head, record.request_body)


def _answer(record: Record) -> _Side:
    return _side(record.response_head, record.response_body)


def _side(head: bytes, kept: Kept) -> _Side:
    """A head as far as it can be read; a target's may break rules."""
    line, _, block = head.decode("latin-1").partition("\n")
    fields: list[tuple[str, str]] = []
    for each in block.split("\n"):
        if each[:1] in (" ", "\t") and fields:  # it belongs to the field before (RFC 9112 §5.2)
            name, value = fields[-1]
            fields[-1] = (name, f"{value} {each.strip()}".strip(" "))
            continue
        name, colon, value = each.strip("\r").partition(":")
        if colon:
            fields.append((name.strip(), value.strip(" \t")))
    return _Side(line.strip("\r"), fields, kept)


def _message(left: _Side, right: _Side, unmask: bool) -> Document:
    fields = list(_fields(left, right, unmask))
    body = _bodies(left, right, unmask)
    lines = [left.line, right.line]
    if not unmask:
        lines = [" ".join(map(mask.target, line.split(" "))) for line in lines]
    return {
        "same": body["same"] and all(field["usual"] for field in fields),
        "line": {
            "same": left.line == right.line,
            "left": _cut(_readable(lines[0])),
            "right": _cut(_readable(lines[1])),
        },
        "fields": fields,
        "body": body,
    }


def _fields(left: _Side, right: _Side, unmask: bool) -> Iterator[Document]:
    """The names whose values differ, in the order in which they first come."""
    sides = [_by_name(left.fields), _by_name(right.fields)]
    for name in dict.fromkeys([*sides[0], *sides[1]]):
        values = [side.get(name, []) for side in sides]
        if [value for _, value in values[0]] == [value for _, value in values[1]]:
            continue
        change = "changed" if all(values) else "removed" if values[0] else "added"
        shown = [
            [
                _cut(_readable(value if unmask else mask.field(spelled, value)))
                for spelled, value in side
            ]
            for side in values
        ]
        yield {
            "name": (values[0] or values[1])[0][0][:MOST_PATH],
            "change": change,
            "left": shown[0],
            "right": shown[1],
            "usual": name in USUAL,
        }


def _by_name(fields: Sequence[tuple[str, str]]) -> dict[str, list[tuple[str, str]]]:
    found: dict[str, list[tuple[str, str]]] = {}
    for name, value in fields:
        found.setdefault(name.lower(), []).append((name, value))
    return found


# Bodies -----------------------------------------------------------------------------------------


def _bodies(left: _Side, right: _Side, unmask: bool) -> Document:
    one, other = left.kept, right.kept
    document: Document = {
        "same": one == other,
        "kind": "empty" if not (one.size or other.size) else "binary",
        "left": one.size,
        "right": other.size,
        "note": _note(one, other),
    }
    if one == other:
        return document
    shown = [content.describe(side.fields, side.kept) for side in (left, right)]
    if not all(each.kind in (*TEXTS, "empty") for each in shown):
        return document | _binary(one.data, other.data)
    texts = [each.text for each in shown]
    if not unmask:
        texts = [
            mask.body(each.text, _content_type(side)) for each, side in zip(shown, (left, right))
        ]
    if texts[0] == texts[1]:
        hidden = shown[0].text != shown[1].text
        why = (
            "they differ in masked values only" if hidden else "they differ in their encoding only"
        )
        if one.size != other.size and not (one.whole and other.whole):
            why = "what was kept is equal, the sizes are not"
        document["note"] = "; ".join(filter(None, [document["note"], why]))
        return document | {"kind": "text", "same": False}
    return document | (json_diff(*texts) or text_diff(*texts))


def _note(one: Kept, other: Kept) -> str:
    if one.whole and other.whole:
        return ""
    sides = [side for side, kept in (("left", one), ("right", other)) if not kept.whole]
    return f"only the beginning of the {' and '.join(sides)} body was kept"


def _content_type(side: _Side) -> str:
    return next((value for name, value in side.fields if name.lower() == "content-type"), "")


def _binary(one: bytes, other: bytes) -> Document:
    return {
        "first_difference": first_difference(one, other),
        "sha256": {
            "left": hashlib.sha256(one).hexdigest(),
            "right": hashlib.sha256(other).hexdigest(),
        },
    }


def first_difference(one: bytes | str, other: bytes | str) -> int:
    """The offset at which two differ; the shorter one's length if that is the other's beginning."""
    low, high = 0, min(len(one), len(other))
    while low < high:  # the longest common prefix, by halves: slices compare at memory speed
        middle = (low + high + 1) // 2
        if one[low:middle] == other[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low


# JSON -------------------------------------------------------------------------------------------


def json_diff(left: str, right: str) -> Document | None:
    """``changes`` are the places that differ, and ``more`` counts those that are not shown. None if
    one of the texts is no JSON object or list, or if they differ in white space only."""
    if any(text.lstrip()[:1] not in ("{", "[") for text in (left, right)):
        return None
    changes = _Changes()
    try:
        changes.compare("$", json.loads(left), json.loads(right))
    except (ValueError, RecursionError):  # no JSON, a number of 5000 digits, 1000 lists in lists
        return None
    if not changes.found:
        return None
    return {"kind": "json", "changes": changes.found, "more": changes.more}


class _Changes:
    """What differs between two JSON values, as (path, change, left, right)."""

    def __init__(self) -> None:
        self.found: list[Document] = []
        self.more = 0  # changes beyond MOST_CHANGES

    def compare(self, path: str, left: object, right: object, depth: int = 0) -> None:
        if depth < MOST_DEPTH and isinstance(left, dict) and isinstance(right, dict):
            for key in dict.fromkeys([*left, *right]):
                here = path + _step(key)
                if key not in right:
                    self._note(here, "removed", left=left[key])
                elif key not in left:
                    self._note(here, "added", right=right[key])
                else:
                    self.compare(here, left[key], right[key], depth + 1)
        elif depth < MOST_DEPTH and isinstance(left, list) and isinstance(right, list):
            self._lists(path, left, right, depth)
        elif not _equal(left, right):
            self._note(path, "changed", left=left, right=right)

    def _lists(self, path: str, left: list[object], right: list[object], depth: int) -> None:
        for change, at, to, other_at, other_to in _alignment(left, right):
            if change == "equal":
                continue
            common = min(to - at, other_to - other_at)
            for step in range(common):
                here = f"{path}[{other_at + step}]"
                self.compare(here, left[at + step], right[other_at + step], depth + 1)
            for number in range(at + common, to):
                self._note(f"{path}[{number}]", "removed", left=left[number])
            for number in range(other_at + common, other_to):
                self._note(f"{path}[{number}]", "added", right=right[number])

    def _note(self, path: str, change: str, **sides: object) -> None:
        if len(self.found) == MOST_CHANGES:
            self.more += 1
            return
        shown = {side: _shown(value) for side, value in sides.items()}
        self.found.append({"path": path[:MOST_PATH], "change": change, **shown})


def _alignment(left: list[object], right: list[object]) -> list[tuple[str, int, int, int, int]]:
    """As difflib's opcodes. A removed item's number is the left one's, others have the right
    one's."""
    if len(left) == len(right) or max(len(left), len(right)) > MOST_ITEMS:
        return [("replace", 0, len(left), 0, len(right))]
    one, other = ([_canonical(item) for item in side] for side in (left, right))
    return list(difflib.SequenceMatcher(None, one, other).get_opcodes())


def _step(key: str) -> str:
    return f".{key}" if key.isidentifier() and key.isascii() else f"[{json.dumps(key)}]"


def _canonical(value: object) -> str:
    return json.dumps(value, sort_keys=True)


def _equal(left: object, right: object) -> bool:
    """Python's == takes True for 1, and NaN for unequal to itself."""
    return type(left) is type(right) and (left == right or _canonical(left) == _canonical(right))


def _shown(value: object) -> str:
    """A value as JSON, cut. A large one is cut before it is written."""
    if isinstance(value, str):
        return json.dumps(value[:MOST_LINE] + (MORE if len(value) > MOST_LINE else ""),
                          ensure_ascii=False)  # fmt: skip
    return _cut(json.dumps(value, ensure_ascii=False))


# Text -------------------------------------------------------------------------------------------


def text_diff(left: str, right: str) -> Document:
    """``lines`` is a list of [sign, text]: "-" left only, "+" right only, " " both, and "@" for
    equal lines that are left out. ``cut``: there are more."""
    one, other = left.splitlines(), right.splitlines()
    if one == other:  # they end in other line breaks
        note = "they differ in line breaks only"
        return {"kind": "text", "lines": [], "cut": False, "note": note}
    begin = _common(one, other)
    end = _common(one[begin:][::-1], other[begin:][::-1])
    middles = [side[begin : len(side) - end] for side in (one, other)]
    cut = max(map(len, middles)) > MOST_LINES
    middles = [side[:MOST_LINES] for side in middles]
    before = one[max(0, begin - CONTEXT) : begin]
    after = [] if cut else one[len(one) - end :][:CONTEXT]
    lines = [["@", f"{begin - len(before)} equal lines"]] if begin > len(before) else []
    lines += [[" ", _cut(line)] for line in before]
    lines += _differing(*middles)
    lines += [[" ", _cut(line)] for line in after]
    if not cut and end > len(after):
        lines.append(["@", f"{end - len(after)} equal lines"])
    if len(lines) > MOST_SHOWN:
        cut, lines = True, lines[:MOST_SHOWN]
    return {"kind": "text", "lines": lines, "cut": cut}


def _common(one: Sequence[str], other: Sequence[str]) -> int:
    """How many lines at the beginning are equal."""
    count = 0
    for left, right in zip(one, other):
        if left != right:
            break
        count += 1
    return count


def _differing(one: list[str], other: list[str]) -> list[list[str]]:
    lines: list[list[str]] = []
    for change, at, to, other_at, other_to in difflib.SequenceMatcher(
        None, one, other
    ).get_opcodes():
        if change == "equal":
            lines += _context(one[at:to])
            continue
        removed, added = one[at:to], other[other_at:other_to]
        for number in range(max(len(removed), len(added))):
            pair = [side[number] if number < len(side) else None for side in (removed, added)]
            lines += _changed(*pair)
    return lines


def _context(equal: list[str]) -> list[list[str]]:
    if len(equal) <= 2 * CONTEXT + 1:
        return [[" ", _cut(line)] for line in equal]
    left_out = len(equal) - 2 * CONTEXT
    return [
        *([" ", _cut(line)] for line in equal[:CONTEXT]),
        ["@", f"{left_out} equal lines"],
        *([" ", _cut(line)] for line in equal[-CONTEXT:]),
    ]


def _changed(left: str | None, right: str | None) -> list[list[str]]:
    """Two lines below each other. Of long ones, the part around the first difference."""
    if left is None or right is None:
        return [
            [sign, _cut(line)] for sign, line in (("-", left), ("+", right)) if line is not None
        ]
    begin = 0
    if max(len(left), len(right)) > MOST_LINE:
        begin = max(0, first_difference(left, right) - MOST_LINE // 4)
    lead = MORE if begin else ""
    return [["-", lead + _cut(left[begin:])], ["+", lead + _cut(right[begin:])]]


# Words ------------------------------------------------------------------------------------------


def _pair(left: object, right: object) -> Document:
    return {"same": left == right, "left": left, "right": right}


def _milliseconds(record: Record) -> float | None:
    return None if record.duration is None else round(1000 * record.duration, 3)


def _cut(text: str) -> str:
    return text if len(text) <= MOST_LINE else text[:MOST_LINE] + MORE


def _readable(text: str) -> str:
    """Latin-1 as text: in UTF-8 if it is that."""
    try:
        return text.encode("latin-1").decode()
    except UnicodeError:
        return text
