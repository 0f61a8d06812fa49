"""Writes what the inspector's API tells as lines for a terminal: tables, visits, comparisons.

Visitors and targets have written most of it. So every text passes safe(), which writes control
characters, escape sequences and marks that turn the direction of writing as escapes, and every line
of a table is cut to the terminal's width in cells.

Pure: documents come in, lines go out.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from time import localtime, strftime
from typing import Any, NamedTuple

from ..common.cells import fit, pad, safe, width
from ..common.quantities import duration, size
from .mask import MASK

Document = Mapping[str, Any]
Spans = list[tuple[str, str]]  # texts with their SGR parameters

BOLD, DIM, GOOD, ODD, BAD = "1", "2", "32", "35", "31"  # SGR parameters (ECMA-48 §8.3.117)
LEAST_COLUMNS = 40  # a narrower table would have no room for a path
MOST_METHOD = 9  # cells
MORE = "..."
# Tabs of a body: as wide as most editors show them.
TAB = "    "


class Paper(NamedTuple):
    """Where the lines go. ``columns`` is None for a file or a pipe: nothing is cut there."""

    columns: int | None = None
    colours: bool = False

    def paint(self, text: str, sgr: str) -> str:
        return f"\x1b[{sgr}m{text}\x1b[0m" if self.colours and sgr and text else text

    def line(self, *spans: tuple[str, str]) -> str:
        """Texts side by side, each with its SGR parameters, cut where the paper ends."""
        left = self.columns and max(self.columns, LEAST_COLUMNS)
        painted = ""
        for text, sgr in spans:
            if left is not None:
                text = fit(text, left, MORE)
                left -= width(text)
            painted += self.paint(text, sgr)
        return painted.rstrip(" ")


# Tables -----------------------------------------------------------------------------------------


class Columns(NamedTuple):
    """The columns of a table in front of hostname and path, as wide as the visits need them. Those
    that say least are left out on a narrow terminal."""

    ids: int = 4
    methods: int = 7
    clock: bool = True
    took: bool = True
    size: bool = True

    def texts(self, number: str, at: str, method: str, status: str, took: str, size: str) -> Spans:
        """A line's cells, with the looks of their columns."""
        cells = [(f"{number:>{self.ids}}  ", "")]
        if self.clock:
            cells.append((f"{at:<8}  ", DIM))
        cells.append((pad(fit(method, self.methods, ""), self.methods), ""))
        cells.append((f"  {status:>6}  ", ""))
        if self.took:
            cells.append((f"{took:>7}  ", ""))
        if self.size:
            cells.append((f"{size:>7}  ", DIM))
        return cells


def columns_for(visits: Sequence[Document], paper: Paper) -> Columns:
    ids = max(2, *(len(str(_number(visit, "id"))) for visit in visits), 2)
    methods = max(len("METHOD"), *(min(width(_method(visit)), MOST_METHOD) for visit in visits), 0)
    room = math.inf if paper.columns is None else paper.columns
    return Columns(ids, methods, clock=room >= 72, took=room >= 52, size=room >= 62)


def table(visits: Sequence[Document], paper: Paper) -> Iterator[str]:
    """The visits, in their order, below headings."""
    if not visits:
        return
    columns = columns_for(visits, paper)
    cells = columns.texts("ID", "TIME", "METHOD", "STATUS", "TOOK", "SIZE")
    yield paper.line(*((text, DIM) for text, _ in cells), ("HOST AND PATH", DIM))
    for visit in visits:
        yield row(visit, paper, columns)


def row(visit: Document, paper: Paper, columns: Columns | None = None) -> str:
    """A visit on one line."""
    columns = columns or columns_for([], paper)._replace(ids=4, methods=7)
    status, took = _number(visit, "status"), _number(visit, "duration_ms")
    is_open = visit.get("state") == "open" or visit.get("duration_ms") is None
    before = columns.texts(
        str(_number(visit, "id")),
        clock(visit.get("began", 0)),
        _method(visit),
        str(status or "-"),
        "open" if is_open else duration(took / 1000),
        size(_number(visit, "response_bytes")),
    )
    look = _status_look(visit)
    before = [(text, look if number == 2 + columns.clock else sgr)
              for number, (text, sgr) in enumerate(before)]  # fmt: skip
    remarks = []
    if visit.get("replay_of"):
        remarks.append(f"replay of {_number(visit, 'replay_of')}")
    if visit.get("imported"):
        remarks.append("imported")
    if problem := _text(visit, "problem"):
        remarks.append(problem)
    what = _text(visit, "hostname") + _text(visit, "path")
    remark = f"  ({'; '.join(remarks)})" if remarks else ""
    if paper.columns is not None:  # half of the rest for the remark: it says what went wrong
        room = max(paper.columns, LEAST_COLUMNS) - sum(width(text) for text, _ in before)
        remark = fit(remark, max(room // 2, room - width(what)), MORE)
        what = fit(what, max(0, room - width(remark)), MORE)
    return paper.line(*before, (what, ""), (remark, BAD if visit.get("failed") else DIM))


def _method(visit: Document) -> str:
    return _text(visit, "method") or _text(visit, "mode")


def _status_look(visit: Document) -> str:
    status = _number(visit, "status")
    if visit.get("failed"):
        return f"{BOLD};{BAD}"
    return ODD if status >= 400 else GOOD if 200 <= status < 300 else ""


# A visit ----------------------------------------------------------------------------------------


def visit_lines(visit: Document, paper: Paper) -> Iterator[str]:
    """A visit with its heads, bodies and messages. Only messages are cut where the paper ends."""
    page, paper = paper, paper._replace(columns=None)
    yield paper.line((f"visit {_number(visit, 'id')}", BOLD), (f"  {_summary(visit)}", ""))
    if problem := _text(visit, "problem"):
        yield paper.line((problem, BAD))
    if visit.get("masked") and MASK in json.dumps(visit, ensure_ascii=False):
        yield paper.line(("secrets are masked; --unmask shows them", DIM))
    for name in ("request", "response"):
        message = visit.get(name) or {}
        yield ""
        if not message.get("line"):
            yield paper.line((f"{name}: none", DIM))
            continue
        yield from _message(message, paper)
    messages = visit.get("messages") or []
    if messages:
        yield ""
        dropped = visit.get("messages_dropped") or 0
        yield paper.line(
            (f"{len(messages)} messages", BOLD),
            (f", and {dropped} before them that are not kept" if dropped else "", DIM),
        )
        for each in messages:
            yield _passed(each, page)


def _summary(visit: Document) -> str:
    parts = [clock(visit.get("began", 0)), _text(visit, "hostname")]
    if _text(visit, "target"):
        parts.append(f"to {_text(visit, 'target')}")
    if _text(visit, "visitor"):
        parts.append(f"from {_text(visit, 'visitor')}")
    took = visit.get("duration_ms")
    parts.append("still open" if visit.get("state") == "open" or took is None
                 else f"took {duration(took / 1000)}")  # fmt: skip
    if visit.get("replay_of"):
        parts.append(f"replay of {visit['replay_of']}")
    if visit.get("imported"):
        parts.append("imported")
    return ", ".join(filter(None, parts))


def _message(message: Document, paper: Paper) -> Iterator[str]:
    yield paper.paint(safe(str(message.get("line", ""))), BOLD)
    for name, value in message.get("fields") or ():
        yield paper.paint(f"{safe(str(name))}:", DIM) + f" {safe(str(value))}"
    body = message.get("body") or {}
    for name, value in message.get("trailers") or ():
        yield paper.paint(f"{safe(str(name))}: {safe(str(value))} (trailer)", DIM)
    if not body.get("size"):
        return
    yield ""
    yield from body_lines(body)
    if note := _body_note(body):
        yield paper.paint(f"[{note}]", DIM)


def _body_note(body: Document) -> str:
    notes = []
    if not body.get("whole", True):
        notes.append(f"the first {body.get('kept')} of {body.get('size')} bytes were kept")
    if body.get("kind") in ("image", "hex"):
        notes.append(
            f"{safe(str(body.get('type') or 'no Content-Type'))}, {body.get('size')} bytes"
        )
    if note := _text(body, "note"):
        notes.append(note)
    return "; ".join(notes)


def body_lines(body: Document) -> Iterator[str]:
    """The text of a body; JSON indented."""
    text = str(body.get("text") or "")
    if body.get("kind") == "json":
        try:
            text = json.dumps(json.loads(text), indent=2, ensure_ascii=False)
        except (ValueError, RecursionError):  # cut, or masked: as it came
            pass
    yield from text_lines(text)


def text_lines(text: str) -> Iterator[str]:
    """The lines of a text, each made safe."""
    for line in text.split("\n"):
        yield safe(line.removesuffix("\r").replace("\t", TAB))


def _passed(message: Document, paper: Paper) -> str:
    arrow = ">" if message.get("from_visitor") else "<"
    kind = _text(message, "kind")
    if "base64" in message:
        text = f"{message.get('size')} bytes"
    else:
        text = safe(str(message.get("text") or ""))
    note = f"  ({_text(message, 'note')})" if message.get("note") else ""
    at = clock(message.get("at", 0))
    return paper.line((f"{at}  ", DIM), (f"{arrow} {kind:<6}  ", ""), (text, ""), (note, DIM))


# Replays and comparisons ------------------------------------------------------------------------


def replay_lines(replay: Document, paper: Paper) -> Iterator[str]:
    """How a replay stands, and its answers side by side if there are several kinds of them."""
    for note in replay.get("notes") or ():
        yield paper.line((f"note: {safe(str(note))}", ODD))
    state = replay.get("state")
    look = {"passed": GOOD, "stopped": ODD}.get(str(state), "")
    yield paper.line(
        (f"replay {_number(replay, 'id')} of visit {_number(replay, 'record')}: ", BOLD),
        (_text(replay, "text"), look),
    )
    groups = replay.get("groups") or []
    if replay.get("done", 0) < 2 or not groups:
        return
    yield paper.line(
        (f"{'COUNT':>6}  {'STATUS':>6}  {'SIZE':>7}  {'TOOK':>17}  FIRST  PROBLEM", DIM)
    )
    for group in sorted(groups, key=lambda group: -_number(group, "count")):
        took = f"{duration(group['least_ms'] / 1000)} - {duration(group['most_ms'] / 1000)}"
        mixed = "(other answers)" if group.get("mixed") else safe(str(group.get("problem") or ""))
        yield paper.line(
            (f"{group['count']:>6}  {group['status'] or '-':>6}  {size(group['size']):>7}  ", ""),
            (f"{took:>17}  {group['record']:>5}  ", ""), (mixed, BAD),
        )  # fmt: skip


def comparison_lines(document: Document, paper: Paper) -> Iterator[str]:
    """How two visits differ: "-" is the left one, "+" the right one."""
    left, right = _number(document, "left"), _number(document, "right")
    words = "the answers are equal" if document.get("same") else "the answers differ"
    yield paper.line((f"visit {left} and visit {right}: {words}", BOLD))
    for name in ("request", "response"):
        message = document.get(name) or {}
        lines = list(_differences(name, message, paper))
        if lines:
            yield ""
            yield paper.line((name, BOLD))
            yield from lines


def _differences(name: str, message: Document, paper: Paper) -> Iterator[str]:
    line = message.get("line") or {}
    if not line.get("same", True):
        yield from _two(str(line.get("left")), str(line.get("right")), paper)
    problem = message.get("problem") or {}
    if not problem.get("same", True):
        one, other = (f"({problem.get(side) or 'whole'})" for side in ("left", "right"))
        yield from _two(one, other, paper)
    for field in message.get("fields") or ():
        usual = DIM if field.get("usual") else ""
        for sign, side, look in (("-", "left", BAD), ("+", "right", GOOD)):
            for value in field.get(side) or ():
                text = f"{sign} {safe(str(field.get('name')))}: {safe(str(value))}"
                yield paper.line((text, usual or look))
    yield from _body_differences(message.get("body") or {}, paper)


def _two(left: str, right: str, paper: Paper) -> Iterator[str]:
    yield paper.line((f"- {safe(left)}", BAD))
    yield paper.line((f"+ {safe(right)}", GOOD))


def _body_differences(body: Document, paper: Paper) -> Iterator[str]:
    if body.get("same", True):
        return
    yield paper.line(
        (f"body: {body.get('left')} and {body.get('right')} bytes", DIM),
        (f"; {_text(body, 'note')}" if body.get("note") else "", DIM),
    )
    for change in body.get("changes") or ():
        yield paper.line((f"  {safe(str(change.get('path')))}", ""))
        for sign, side, look in (("-", "left", BAD), ("+", "right", GOOD)):
            if side in change:
                yield paper.line((f"  {sign} {safe(str(change[side]))}", look))
    if more := body.get("more"):
        yield paper.line((f"  and {more} more", DIM))
    for sign, text in body.get("lines") or ():
        look = {"-": BAD, "+": GOOD, "@": DIM}.get(sign, "")
        yield paper.line((f"  {sign} {safe(str(text))}", look))
    if body.get("cut"):
        yield paper.line(("  and more", DIM))
    if "first_difference" in body:
        yield paper.line((f"  the first difference is at byte {body['first_difference']}", ""))


# Words ------------------------------------------------------------------------------------------


def clock(at: float) -> str:
    """The local time of day of a wall-clock time."""
    try:
        return strftime("%H:%M:%S", localtime(float(at)))
    except (OverflowError, ValueError, OSError, TypeError):  # a HAR may say anything
        return "--:--:--"


def _number(document: Document, key: str) -> int:
    """In whole."""
    value = document.get(key)
    return int(value) if isinstance(value, (int, float)) and math.isfinite(value) else 0


def _text(document: Document, key: str) -> str:
    return safe(str(document.get(key) or ""))
