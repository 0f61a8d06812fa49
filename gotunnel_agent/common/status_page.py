"""Formats an answer of the status socket as text for people. Values in, text out.

A plain value is a line "key  value". A list of objects is a table, whose columns are the keys of
its first object. An object is shown as a line for each of its keys. A key that ends in ``_seconds``
is a duration, one that ends in ``_at`` an instant.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence

from .one_line import on_one_line, words_and_link

HIDDEN = ("format",)
MOST_NAME = 253  # characters of a cell: the longest hostname
UNITS = ((86400, "d"), (3600, "h"), (60, "min"), (1, "s"))


def render(status: Mapping[str, object], version: str) -> str:
    """The text. ``version`` is that of this command; a line says so if the process has another."""
    plain = {key: value for key, value in status.items() if key not in HIDDEN}
    lines = [f"{key:<{MARGIN}}{text}" for key, text in _pairs(plain)]
    if status.get("version") != version:
        lines.append(f"(this command has version {on_one_line(version)})")
    for key, value in plain.items():
        if isinstance(value, list):
            lines += ["", f"{_words(key)}:", *(_table(value) if value else ["  none"])]
    return "\n".join(lines)


MARGIN = 22


def _pairs(values: Mapping[str, object], prefix: str = "") -> Iterator[tuple[str, str]]:
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from _pairs(value, f"{prefix}{_words(key)} ")
        elif not isinstance(value, list):
            yield prefix + _words(key), _cell(key, value)


def _table(rows: Sequence[Mapping[str, object]]) -> list[str]:
    keys = [key for key in rows[0] if key != "reason"]
    cells = [[_words(key).upper() for key in keys]]
    cells += [[_cell(key, row.get(key)) for key in keys] for row in rows]
    widths = [max(map(len, column)) for column in zip(*cells)]
    lines = ["  " + "  ".join(map(str.ljust, line, widths)).rstrip() for line in cells]
    shown = [lines[0]]
    for row, line in zip(rows, lines[1:]):
        shown.append(line)
        if row.get("reason"):
            shown.append(f"    {words_and_link(row['reason'])}")
    return shown


def _words(key: str) -> str:
    return on_one_line(key.removesuffix("_seconds").removesuffix("_at").replace("_", " "))


def _cell(key: str, value: object) -> str:
    if value is None or value == "":
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, (int, float)):
        if key.endswith("_seconds"):
            return duration(value)
        if key.endswith("_at"):
            return time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(value))
    return on_one_line(str(value), MOST_NAME)


def duration(seconds: float) -> str:
    """A length of time in its two largest units."""
    left = int(seconds)
    parts: list[str] = []
    for size, unit in UNITS:
        if left >= size or unit == "s" and not parts:
            parts.append(f"{left // size} {unit}")
        left %= size
    return " ".join(parts[:2])
