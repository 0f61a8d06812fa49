"""Measures text in a terminal's cells, and makes a peer's text safe to draw.

A terminal gives most characters one cell, East Asian wide ones two, and combining marks none. A
picture that counts characters would be ragged, and its lines would wrap.
"""

import unicodedata
from functools import lru_cache

# Marks on one character that are drawn. Names need two or three; a hundred of them would be drawn
# over the lines above ("zalgo").
MOST_MARKS = 3
# Medial and final letters of old Hangul, which join the letter before them.
JAMO = range(0x1160, 0x1200)
# Variation selectors: they make some characters wider, and not in all terminals.
SELECTORS = (range(0xFE00, 0xFE10), range(0xE0100, 0xE01F0))


@lru_cache(maxsize=4096)
def _cells(character: str) -> int:
    if unicodedata.category(character) in ("Mn", "Me") or ord(character) in JAMO:
        return 0
    return 2 if unicodedata.east_asian_width(character) in "WF" else 1


def width(text: str) -> int:
    """The cells that a safe() text takes."""
    return len(text) if text.isascii() else sum(map(_cells, text))


def safe(text: str) -> str:
    """The text without anything that a terminal would act on: control characters, escape sequences,
    and marks that turn the direction of writing (Trojan Source) are written as escapes."""
    if text.isascii() and text.isprintable():
        return text
    parts = []
    marks = MOST_MARKS  # none at the start, where they would join what stands before the text
    for character in text:
        if any(ord(character) in selectors for selectors in SELECTORS):
            continue
        if not character.isprintable():
            parts.append(character.encode("unicode_escape").decode())
            marks = 0
        elif _cells(character):
            parts.append(character)
            marks = 0
        elif marks < MOST_MARKS:
            parts.append(character)
            marks += 1
    return "".join(parts)


def fit(text: str, most: int, more: str) -> str:
    """A safe() text in ``most`` cells, with ``more`` at its end if it was cut."""
    if width(text) <= most:
        return text
    room = most - width(more)
    if room < 0:
        return more[: max(0, most)]
    taken = 0
    for at, character in enumerate(text):
        taken += _cells(character)
        if taken > room:
            return text[:at] + more
    return text


def pad(text: str, cells: int) -> str:
    """The text with blanks behind it."""
    return text + " " * (cells - width(text))


def wrap(text: str, most: int) -> list[str]:
    """A safe() text in lines of at most ``most`` cells, broken at blanks where there are any."""
    lines: list[str] = []
    line = ""
    for word in text.split():
        longer = f"{line} {word}" if line else word
        if width(longer) <= most:
            line = longer
            continue
        if line:
            lines.append(line)
        while width(word) > most:
            begin = fit(word, most, "") or word[:1]
            lines.append(begin)
            word = word[len(begin) :]
        line = word
    return [*lines, line] if line or not lines else lines
