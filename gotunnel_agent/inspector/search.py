"""Finds visits by a query, such as ``status:5xx method:POST path:/api "two words" -health``.

A query is a list of terms; a visit must fit all of them. A term is text, which is looked for in
method, path, hostname, heads, bodies and messages, whatever the case of its letters; or a filter
``name:value``, see FILTERS. Several values with commas between them: one of them must fit. A minus
in front: the visit must not fit. Quotes hold what has blanks or is not to be taken for a filter.

All it does is look at records: the caller gives those, and the time. A query that cannot be
understood is a QueryError, one line for the user.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Iterable
from typing import TypeAlias

from ..common import http1
from ..common.one_line import on_one_line
from ..dialogue import NOT_FOLLOWED
from . import content
from .kept import Kept
from .record import OPEN, Record

MOST_QUERY = 1000  # characters
MOST_TERMS = 30
MOST_SHOWN = 40  # characters of a wrong term that an error shows
_TERM = re.compile(r'(-?)(?:([A-Za-z_]+):)?("(?:[^"\\]|\\.)*"|[^\s"]\S*|(?=\s|$))')
_CUT = re.compile(r'-?[A-Za-z_]+:"[^"]*')
_STATUS = re.compile(r"(?:([1-5])xx|(>=|<=|>|<)?([0-9]{1,3})|([0-9]{3})-([0-9]{3}))", re.IGNORECASE)
_NUMBER = re.compile(r"(>=|<=|>|<)?([0-9]{1,15}(?:\.[0-9]{1,9})?)\s*([a-zA-Z]*)")
SIZES = {"": 1, "b": 1, "k": 1024, "kb": 1024, "kib": 1024, "m": 1024**2, "mb": 1024**2,
         "mib": 1024**2, "g": 1024**3}  # fmt: skip
TIMES = {"": 0.001, "ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}
EXPECTED_TIME = "expected a time such as >500ms or >2s"

# A bare text, or the value of a filter, becomes one of these.
Fits: TypeAlias = Callable[[Record], bool]


class QueryError(Exception):
    """One line for the user: what came and what was expected."""


class Query:
    """A query that was understood; a call says whether a record fits."""

    def __init__(self, terms: Iterable[Fits]):
        self._terms = tuple(terms)

    def __call__(self, record: Record) -> bool:
        return all(term(record) for term in self._terms)

    def __bool__(self) -> bool:
        """Whether it asks for anything."""
        return bool(self._terms)


def parse(text: str, *, now: float) -> Query:
    """``now`` is wall-clock time, for ``age``. Raises QueryError."""
    if len(text) > MOST_QUERY:
        raise QueryError(f"a query of {len(text)} characters, expected at most {MOST_QUERY}")
    terms: list[Fits] = []
    at = 0
    while rest := text[at:].lstrip():
        at = len(text) - len(rest)
        match = _TERM.match(text, at)
        if match is None or _CUT.fullmatch(match[0]):
            raise QueryError('a quote (") has no end, expected a second one')
        at = match.end()
        if len(terms) == MOST_TERMS:
            raise QueryError(f"a query of over {MOST_TERMS} terms, expected fewer")
        terms.append(_term(match[0], bool(match[1]), match[2] or "", match[3], now))
    return Query(terms)


def _term(whole: str, negated: bool, name: str, value: str, now: float) -> Fits:
    key = name.lower()
    quoted = value.startswith('"')
    if name and key not in FILTERS:
        close = difflib.get_close_matches(key, FILTERS, n=1, cutoff=0.75)
        if close:
            raise QueryError(
                f"unknown filter {name}:, did you mean {close[0]}:? Text with a colon is put into "
                f'quotes: "{on_one_line(whole, MOST_SHOWN)}"'
            )
        key, value = "", whole.removeprefix("-")  # text with a colon, such as localhost:3000
    if quoted:
        value = (
            re.sub(r"\\(.)", r"\1", value[value.index('"') + 1 : -1]) if key or not name else value
        )
    if not key:
        fits = _text_anywhere(value)
    elif not value:
        raise QueryError(f"nothing came behind {name}:, expected a value")
    else:
        # Only plain values are lists: in quotes a comma is a comma.
        values = [value] if quoted else [each for each in value.split(",") if each]
        choices = [FILTERS[key](each, now) for each in values or [value]]
        fits = choices[0] if len(choices) == 1 else lambda record: any(f(record) for f in choices)
    return (lambda record: not fits(record)) if negated else fits


# Text


def _needle(text: str) -> bytes:
    return text.lower().encode("utf-8", "surrogatepass")


def _text_anywhere(text: str) -> Fits:
    needle = _needle(text)

    def fits(record: Record) -> bool:
        return (
            needle in _needle(record.hostname)
            or needle in record.request_head.lower()
            or needle in _needle(record.path)
            or needle in _needle(record.method)
            or needle in str(record.status).encode()
            or needle in record.response_head.lower()
            or needle in _needle(record.problem)
            or _in_bodies(record, needle)
        )

    return fits


def _in_bodies(record: Record, needle: bytes) -> bool:
    return (
        needle in _plain(record.request_head, record.request_body)
        or needle in _plain(record.response_head, record.response_body)
        or any(needle in message.data.lower() for message in record.messages)
    )


def _plain(head: bytes, kept: Kept) -> bytes:
    """A body without its Content-Encoding, in lower case."""
    match = _CODING.search(head)
    if match is None or not kept.data:
        return kept.data.lower()
    coding = match[1].decode("latin-1")
    return content.decoded([("Content-Encoding", coding)], kept)[0].lower()


# Filters


def _by_text(part: Callable[[Record], str]) -> Callable[[str, float], Fits]:
    def make(value: str, now: float) -> Fits:
        value = value.lower()
        return lambda record: value in part(record).lower()

    return make


def _by_bytes(*parts: Callable[[Record], bytes]) -> Callable[[str, float], Fits]:
    def make(value: str, now: float) -> Fits:
        needle = _needle(value)
        return lambda record: any(needle in part(record).lower() for part in parts)

    return make


def _body(value: str, now: float) -> Fits:
    needle = _needle(value)
    return lambda record: _in_bodies(record, needle)


def _method(value: str, now: float) -> Fits:
    value = value.upper()
    return lambda record: record.method.upper() == value


def _status(value: str, now: float) -> Fits:
    if value.lower() in ("none", "0"):
        return lambda record: record.status == 0
    match = _STATUS.fullmatch(value)
    if match is None:
        raise QueryError(
            f"status {_shown(value)}, expected one such as 404, 5xx, >=400, 200-299 or none"
        )
    many, sign, number, first, last = match.groups()
    if many:
        return lambda record: record.status // 100 == int(many)
    if first:
        return lambda record: int(first) <= record.status <= int(last)
    compare = _compare(sign, float(number))
    return lambda record: record.status != 0 and compare(record.status)


def _compare(sign: str | None, limit: float) -> Callable[[float], bool]:
    return {
        ">": lambda value: value > limit,
        "<": lambda value: value < limit,
        ">=": lambda value: value >= limit,
        "<=": lambda value: value <= limit,
        None: lambda value: value == limit,
    }[sign]


def _quantity(name: str, value: str, units: dict[str, float], expected: str) -> tuple[str, float]:
    match = _NUMBER.fullmatch(value)
    if match is None or match[3].lower() not in units:
        raise QueryError(f"{name} {_shown(value)}, {expected}")
    return match[1] or ">=", float(match[2]) * units[match[3].lower()]


def _time(value: str, now: float) -> Fits:
    sign, limit = _quantity("time", value, TIMES, EXPECTED_TIME)
    compare = _compare(sign, limit)
    return lambda record: record.duration is not None and compare(record.duration)


def _age(value: str, now: float) -> Fits:
    expected = "expected one such as <5m or >1h"
    sign, limit = _quantity("age", value, {**TIMES, "": 1.0}, expected)
    compare = _compare("<=" if value[:1].isdigit() else sign, limit)
    return lambda record: compare(now - record.began)


def _size(value: str, now: float) -> Fits:
    sign, limit = _quantity("size", value, dict(SIZES), "expected one such as >10k or <1m")
    compare = _compare(sign, limit)
    return lambda record: compare(max(record.request_body.size, record.response_body.size))


def _id(value: str, now: float) -> Fits:
    first, dash, last = value.partition("-")
    digits = first + (last if dash else "0")
    if not (first and digits.isascii() and digits.isdigit() and len(value) < 40):
        raise QueryError(f"id {_shown(value)}, expected one such as 12 or 12-20")
    return lambda record: int(first) <= record.id <= int(last or first)


def has_failed(record: Record) -> bool:
    """Whether the target failed: a status of 500 or more, or no whole answer."""
    return record.status >= 500 or (bool(record.problem) and was_followed(record))


def was_followed(record: Record) -> bool:
    """Whether its bytes could be read; a visit that could not be is no failure of the target."""
    return not record.problem.startswith(NOT_FOLLOWED)


STATES: dict[str, Fits] = {
    "failed": has_failed,
    "followed": was_followed,
    "open": lambda record: record.state == OPEN,
    "replay": lambda record: record.replay_of is not None,
    "imported": lambda record: record.imported,
    "websocket": lambda record: record.status == 101,
    "cut": lambda record: not (record.request_body.whole and record.response_body.whole),
}


def _is(value: str, now: float) -> Fits:
    if value.lower() not in STATES:
        raise QueryError(f"is:{_shown(value)}, expected one of {', '.join(STATES)}")
    return STATES[value.lower()]


def content_type(head: bytes) -> str:
    """The Content-Type of a head; "" if it has none. Any bytes."""
    match = _CONTENT_TYPE.search(head, 0, http1.HEAD_LIMIT)
    return match[1].decode("latin-1") if match else ""


_CODING = re.compile(rb"\ncontent-encoding:[ \t]*([^\r\n]{1,100})", re.IGNORECASE)
_CONTENT_TYPE = re.compile(rb"\ncontent-type:[ \t]*([^\r\n]{1,200})", re.IGNORECASE)


FILTERS: dict[str, Callable[[str, float], Fits]] = {
    "age": _age,
    "body": _body,
    "head": _by_bytes(lambda record: record.request_head, lambda record: record.response_head),
    "host": _by_text(lambda record: record.hostname),
    "hostname": _by_text(lambda record: record.hostname),
    "id": _id,
    "is": _is,
    "method": _method,
    "path": _by_text(lambda record: record.path),
    "problem": _by_text(lambda record: record.problem),
    "request": _by_bytes(
        lambda record: record.request_head,
        lambda record: _plain(record.request_head, record.request_body),
    ),
    "response": _by_bytes(
        lambda record: record.response_head,
        lambda record: _plain(record.response_head, record.response_body),
    ),
    "size": _size,
    "status": _status,
    "target": _by_text(lambda record: record.target),
    "time": _time,
    "type": _by_text(lambda record: content_type(record.response_head)),
    "visitor": _by_text(lambda record: record.visitor),
}


def _shown(value: str) -> str:
    return on_one_line(value, MOST_SHOWN) or "(nothing)"
