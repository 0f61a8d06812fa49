"""Reads and compares what a credential may claim: patterns of hostnames, ranges of ports.

    a.example.com        this hostname
    *.dev.example.com    every hostname below dev.example.com, however deep, and wildcard hostnames
                         there: itself, and *.b.dev.example.com; not dev.example.com

A wildcard needs two labels behind it: ``*.com`` would cover far too much. A ``*`` may stand nowhere
else. Of two patterns, either one contains the other or they have nothing in common. So the
intersection of two lists is a list again.

Values in, values out. Tokens may come from strangers: the readers accept any object, and raise
ScopeError or nothing.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from gotunnel_agent.common.hostnames import (
    MAX_HOSTNAME,
    MAX_PORT,
    WILDCARD,
    normal_hostname,
    valid_hostname,
    why_no_hostname,
)

# Patterns or ranges of one credential. Nobody writes so many by hand. At a registration each one in
# the token is compared with each one in the file, which takes 50 ms at worst.
MOST_ITEMS = 256
LEAST_LABELS = 2  # behind "*."
MOST_SHOWN = 300  # characters of a list in a message

HOSTS_EXPECTED = "hostnames such as app.example.com or *.dev.example.com, separated by commas"
PORTS_EXPECTED = f"ports from 1 to {MAX_PORT} and ranges of them, such as 2200-2299,5432"


class ScopeError(ValueError):
    """This is no list of hosts or ports; the text is one clause: what came, what was expected."""


def read_hosts(value: object) -> tuple[str, ...]:
    """The patterns in a list of texts, or in one text with commas, normalised. Raises ScopeError
    if one is bad, or if there is none."""
    patterns = dict.fromkeys(_pattern(item) for item in _items(value, HOSTS_EXPECTED))
    if not patterns:
        raise ScopeError(f"an empty list came, expected {HOSTS_EXPECTED}")
    return tuple(patterns)


def read_ports(value: object) -> tuple[range, ...]:
    """The ranges in a list of texts and numbers, or in one text with commas; an empty list gives
    none. Raises ScopeError if one is bad."""
    return tuple(dict.fromkeys(_range(item) for item in _items(value, PORTS_EXPECTED)))


def allows(patterns: Iterable[str], hostname: str) -> bool:
    """Whether one of the patterns covers a hostname (as normal_hostname() gives it), a wildcard
    hostname, or a pattern."""
    return any(
        hostname == pattern or pattern[0] == "*" and hostname.endswith(pattern[1:])
        for pattern in patterns
    )


def common_hosts(these: tuple[str, ...], those: tuple[str, ...]) -> tuple[str, ...]:
    """The patterns for what both lists allow."""
    inner = [pattern for pattern in these if allows(those, pattern)]
    inner += [pattern for pattern in those if allows(these, pattern)]
    return tuple(dict.fromkeys(inner))


def common_ports(these: tuple[range, ...], those: tuple[range, ...]) -> tuple[range, ...]:
    """The ranges of what both lists allow."""
    overlaps = (
        range(max(one.start, other.start), min(one.stop, other.stop))
        for one in these
        for other in those
    )
    return tuple(dict.fromkeys(overlap for overlap in overlaps if overlap))


def written(items: Iterable[str | range]) -> list[str]:
    """Patterns or ranges as they are written."""
    return [item if isinstance(item, str) else _written_range(item) for item in items]


def _written_range(ports: range) -> str:
    return f"{ports[0]}-{ports[-1]}" if len(ports) > 1 else str(ports[0])


def shown(items: Iterable[str | range]) -> str:
    """Patterns or ranges for a message; if there are many, the first ones."""
    texts = written(items)
    line = texts[0] if texts else "none"
    for count, text in enumerate(texts[1:], start=1):
        if len(line) + len(text) > MOST_SHOWN:
            return f"{line} and {len(texts) - count} more"
        line += f", {text}"
    return line


def _items(value: object, expected: str) -> Sequence[object]:
    """The items of a list, or of a text between its commas."""
    if isinstance(value, str):
        value = value.split(",")
    if not isinstance(value, (list, tuple)):
        raise ScopeError(f"neither text nor a list came, expected {expected}")
    if len(value) > MOST_ITEMS:
        raise ScopeError(f"{len(value)} items came, expected at most {MOST_ITEMS}")
    return value


def _pattern(item: object) -> str:
    if not isinstance(item, str):
        raise ScopeError(f"an item came that is not text, expected {HOSTS_EXPECTED}")
    text = item.strip()
    pattern = normal_hostname(text)
    wildcard = pattern.startswith(WILDCARD)
    name = pattern.removeprefix(WILDCARD)
    if pattern == "*" or wildcard and name.count(".") < LEAST_LABELS - 1:
        raise ScopeError(
            f"{_quoted(text)} covers too much, expected at least two labels behind the *, as in "
            "*.dev.example.com"
        )
    if "*" in name:
        raise ScopeError(
            f"{_quoted(text)} has a * in the wrong place, expected one alone in front, as in "
            "*.dev.example.com"
        )
    if not valid_hostname(name) or len(pattern) > MAX_HOSTNAME:
        why = why_no_hostname(text)
        raise ScopeError(f"{_quoted(text)} came, expected {HOSTS_EXPECTED}{why}")
    return pattern


def _range(item: object) -> range:
    if isinstance(item, int) and not isinstance(item, bool) and 1 <= item <= MAX_PORT:
        return range(item, item + 1)
    if isinstance(item, str):
        match = re.fullmatch(r"\s*([0-9]{1,5})\s*(?:-\s*([0-9]{1,5})\s*)?", item, re.ASCII)
        first, last = (int(match[1]), int(match[2] or match[1])) if match else (0, 0)
        if 1 <= first <= last <= MAX_PORT:
            return range(first, last + 1)
        raise ScopeError(f"{_quoted(item)} came, expected {PORTS_EXPECTED}")
    raise ScopeError(f"an item came that is not a port, expected {PORTS_EXPECTED}")


def _quoted(text: str) -> str:
    """The text in quotes, in ASCII and on one line; cut if it is very long."""
    quoted = ascii(text[:MOST_SHOWN])
    return quoted if len(quoted) <= MOST_SHOWN else f"{quoted[:MOST_SHOWN]}..."
