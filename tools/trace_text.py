"""Draws a ladder as text: plain ASCII, in colours on a terminal that has them."""

import textwrap

from trace_ladder import (
    BYTES,
    CREDIT,
    END,
    LANES,
    LINK,
    MESSAGE,
    OPEN,
    PAYLOAD,
    PROBE,
    header_fields,
)

STEP = 8  # columns from one lane to the next
FIRST = 3  # ... and before the first
LADDER = FIRST + STEP * (len(LANES) - 1) + FIRST + 1
TIME = 8
COLUMN = TIME + 1 + LADDER + 1  # where the words begin
HEX = 28  # columns of a header in hex
INDENT = "  "

HOW_TO_READ = """\
Time is in ms since the agent dialled. Between gateway and agent each arrow is one frame of yamux,
inside TLS. In hex: its header, 12 bytes (version, type, flags, stream id, length), then the first
bytes of its payload. "may send" is what is left of the stream's two windows after the frame: DATA
takes from its sender's window, credit adds to its receiver's."""

RESET, BOLD, DIM = "\33[0m", "\33[1m", "\33[2m"
COLOURS = {  # kind of row: how its arrow and title are shown
    LINK: "\33[37m", BYTES: "\33[36m", OPEN: "\33[32m", MESSAGE: "\33[35m",
    PAYLOAD: "\33[34m", CREDIT: "\33[33m", PROBE: "\33[33m", END: "\33[31m",
}  # fmt: skip


def text(rows, width, colours) -> str:
    """The ladder, ``width`` columns wide."""
    names = "".join(name.center(STEP - 1) + " " for name in LANES).rstrip()
    lines = [*textwrap.wrap(HOW_TO_READ, width), "", f"{'ms':>{TIME}} {names}"]
    for row in rows:
        lines.append(" " * (TIME + 1) + lane_line())
        lines += _draw(row, width, colours)
    return "\n".join(line.rstrip() for line in lines)


def lane_line(source=None, sink=None):
    """The four lanes, with an arrow from one to another; a mark if both are one."""
    line = [" "] * LADDER
    for at in range(len(LANES)):
        line[FIRST + at * STEP] = "|"
    if source is not None:
        start, end = (FIRST + LANES.index(name) * STEP for name in (source, sink))
        if start == end:
            line[start] = "*"
        elif start < end:
            line[start + 1 : end] = "-" * (end - start - 2) + ">"
        else:
            line[end + 1 : start] = "<" + "-" * (start - end - 2)
    return "".join(line)


def _draw(row, width, colours):
    room = width - COLUMN
    on, off, dim = (COLOURS[row.kind], RESET, DIM) if colours else ("", "", "")
    words = row.title
    if row.until > row.at:
        words += f", until {row.until * 1000:.2f}"
    for number, line in enumerate(textwrap.wrap(words, room)):
        if number == 0:
            when = f"{row.at * 1000:{TIME}.2f}"
            yield f"{when} {on}{lane_line(row.source, row.sink)}{off} {on}{line}{off}"
        else:
            yield f"{'':{TIME}} {lane_line()} {on}{line}{off}"
    blank = f"{'':{TIME}} {lane_line()} {INDENT}"
    parts = list(row.hex)
    if row.header is not None:
        fields = header_fields(row.header)
        kind, flags = fields[1][1], fields[2][1] if row.header.flags else ""
        parts.insert(0, (" ".join(code for code, _ in fields), f"{kind} {flags}".rstrip()))
    for code, meaning in parts:
        for line in columns(code, meaning, room - len(INDENT)):
            yield blank + f"{dim}{line}{off}"
    for sent in row.lines:
        for line in wrapped(sent, room - len(INDENT)):
            yield blank + line
    if row.windows is not None:
        parts = (f"{side} {row.windows[side]}" for side in ("gateway", "agent"))
        words = f"stream {row.stream_id}, may send: {', '.join(parts)}"
        for line in textwrap.wrap(words, room - len(INDENT)):
            yield blank + line


def wrapped(line, room):
    """A line that was sent, with its spaces; what is too long goes on further right."""
    return textwrap.wrap(
        line, room, subsequent_indent="   ", drop_whitespace=False, break_on_hyphens=False
    ) or [""]


def columns(code, meaning, room):
    """Bytes in hex and what they are, side by side, or below each other where that is too wide."""
    side_by_side = f"{code:{HEX}}  {meaning}"
    if len(side_by_side) <= room:
        return [side_by_side]
    return [*textwrap.wrap(code, room), *textwrap.wrap(meaning, room)]
