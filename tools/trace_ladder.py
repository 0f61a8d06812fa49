"""From recorded events to the rows of a ladder: what each frame means, and its stream's windows.

Pure: events in, rows out. trace_text.py and trace_page.py draw them.
"""

import json
import re
import struct
from dataclasses import dataclass, field, replace
from typing import NamedTuple

from gotunnel import (
    ACK,
    DATA,
    DATA_HEADER,
    DATA_HEADER_RELAYED,
    FIN,
    GO_AWAY,
    HEADER_SIZE,
    INITIAL_WINDOW,
    PING,
    RST,
    SYN,
    WINDOW_UPDATE,
    Header,
    unpack_header,
)

LANES = ("visitor", "gateway", "agent", "target")
TUNNEL = {"gateway", "agent"}
CONTROL_STREAM = 1

VISIT_OVER = "the visit is over"
KEPT = 4096  # bytes of each piece that are recorded: more than a registration or a head has
HEX_SHOWN = 16  # bytes of payload in hex
TEXT_SHOWN = 200  # characters of a body
FOLDED = 3  # equal frames in a row that become one row
LONG = 14  # rows of DATA and credit in a row that are too many: those in the middle are left out
KEPT_FIRST, KEPT_LAST = 8, 2

TYPES = {DATA: "DATA", WINDOW_UPDATE: "WINDOW_UPDATE", PING: "PING", GO_AWAY: "GO_AWAY"}
FLAGS = {SYN: "SYN", ACK: "ACK", FIN: "FIN", RST: "RST"}
GO_AWAY_CODES = ("normal", "protocol error", "internal error")
WEBSOCKET_OPCODES = {1: "a text", 2: "bytes", 8: "close", 9: "ping", 10: "pong"}

# Kinds of rows, for colours and the legend.
LINK, BYTES, OPEN, MESSAGE, PAYLOAD, CREDIT, END, PROBE = (
    "link", "bytes", "open", "message", "payload", "credit", "end", "probe",
)  # fmt: skip
KINDS = {
    LINK: "a connection is made or ended, or a note",
    BYTES: "bytes outside the tunnel, as they are inside TLS",
    OPEN: "a stream is opened (SYN) or accepted (ACK)",
    MESSAGE: "DATA: a control message",
    PAYLOAD: "DATA: a visit's bytes",
    CREDIT: "credit: a window grows (WINDOW_UPDATE)",
    PROBE: "PING, to measure the round trip",
    END: "a stream or the session ends (FIN, RST, GO_AWAY)",
}
MESSAGES = {  # control message: what it is for
    "register": "who I am (token), what I serve (routes), what I know (features)",
    "ack": "you are registered, and these features are used",
    "certificate": "how the certificate of a hostname stands",
    "port": "a public port was opened",
    "end": "why the session ends",
    "ping": "are you there?",
    "pong": "I am",
}


class Event(NamedTuple):
    """What happened at ``at`` seconds: a frame if there is a ``header``, bytes, or a ``note``.

    ``data`` is the first bytes of the payload, ``size`` how many it has.
    """

    at: float
    source: str
    sink: str
    header: Header | None
    data: bytes
    size: int
    note: str


@dataclass
class Row:
    """One arrow of the ladder. ``source`` and ``sink`` are the same if it is none."""

    at: float  # seconds
    source: str
    sink: str
    kind: str
    title: str
    header: Header | None = None  # of a frame
    hex: list = field(default_factory=list)  # (first bytes of the payload in hex, what they are)
    lines: list = field(default_factory=list)  # texts that were sent, such as an HTTP head
    windows: dict | None = None  # after it: "gateway" and "agent" to bytes that it may send
    full: dict | None = None  # ... to the most that this has been
    stream_id: int = 0
    size: int = 0  # bytes of a body, which may be folded
    until: float = 0.0  # seconds, of the last one in a fold


class FrameCutter:
    """Cuts one direction of a session's bytes into frames. Any pieces will do."""

    def __init__(self):
        self._buffer = b""

    def cut(self, data):
        """The frames that ``data`` completes: (header, payload) pairs."""
        self._buffer += data
        frames, at = [], 0
        while len(self._buffer) - at >= HEADER_SIZE:
            header = Header(*unpack_header(self._buffer, at))
            start = at + HEADER_SIZE
            end = start + (header.length if header.type == DATA else 0)
            if end > len(self._buffer):
                break
            frames.append((header, self._buffer[start:end]))
            at = end
        self._buffer = self._buffer[at:]
        return frames


class _Stream:
    """What the frames so far say of a stream."""

    def __init__(self):
        self.windows = dict.fromkeys(("gateway", "agent"), INITIAL_WINDOW)  # by who may send
        self.full = dict(self.windows)
        self.ended = set()  # the sides that have sent FIN
        self.named = False  # the data header has gone


class Ladder:
    """Explains the events of one visit, in their order."""

    def __init__(self, kind):
        """``kind`` is that of the visit: http, upload, tcp or websocket."""
        self._kind = kind
        self._streams = {}
        self._messages = {"gateway": "", "agent": ""}  # of a control message that is not whole
        self._heads = set()  # (source, sink) of directions whose HTTP head has gone
        self._seen = set()  # pieces that were shown

    def rows(self, events) -> list:
        """All rows, folded."""
        return shorten(fold([self._row(event) for event in sorted(events, key=lambda e: e.at)]))

    def _row(self, event):
        row = Row(event.at, event.source, event.sink, LINK, event.note, until=event.at)
        if event.note == VISIT_OVER:
            kept = [f"stream {number}" for number, stream in self._streams.items()
                    if number != CONTROL_STREAM and not stream.ended]  # fmt: skip
            row.title += "".join(f"; {name} stays open, for another visit" for name in kept)
        if event.header is not None:
            self._explain_frame(row, event)
        elif not event.note:
            row.kind = BYTES
            row.title = f"the {event.source} sends {count(event.size)}"
            self._explain_bytes(row, event.data, event.size)
        return row

    # Frames

    def _explain_frame(self, row, event):
        header = event.header
        row.header, row.stream_id = header, header.stream_id
        if header.type == PING:
            row.kind = PROBE
            if header.flags & ACK:
                row.title = f"pong: the {row.source} answers ping {header.length}"
            else:
                row.title = f"ping {header.length}: how long does an answer take?"
        elif header.type == GO_AWAY:
            row.kind = END
            code = dict(enumerate(GO_AWAY_CODES)).get(header.length, f"code {header.length}")
            row.title = f"go away ({code}): the {row.source} takes no more streams"
        elif header.type in (DATA, WINDOW_UPDATE):
            self._explain_stream(row, event)

    def _explain_stream(self, row, event):
        header, source, sink = event.header, event.source, event.sink
        stream = self._streams.setdefault(header.stream_id, _Stream())
        name = f"stream {header.stream_id}"
        if header.type == DATA:
            stream.windows[source] -= header.length
            self._explain_data(row, event, stream, name)
        elif header.length and not header.flags & RST:
            stream.windows[sink] += header.length
            row.kind = CREDIT
            row.title = f"credit: the {sink} may send {count(header.length)} more on {name}"
            if stream.windows[sink] > stream.full[sink]:
                stream.full[sink] = stream.windows[sink]
                row.title += "; the window has grown"
        if header.flags & SYN:
            row.kind = OPEN
            what = "the control stream" if header.stream_id == CONTROL_STREAM else "for the visit"
            row.title = f"the {source} opens {name}, {what}"
        elif header.flags & ACK:
            row.kind = OPEN
            row.title = f"the {source} accepts {name}"
        if header.length and header.flags & (SYN | ACK) and header.type == WINDOW_UPDATE:
            row.title += f", and gives the {sink} {count(header.length)} of credit"
        if header.flags & FIN:
            row.kind = END
            stream.ended.add(source)
            over = "; both have, so it is over" if len(stream.ended) == 2 else ""
            row.title = f"the {source} sends no more on {name} (half-close){over}"
        if header.flags & RST:
            row.kind = END
            code = f", code {header.length}" if header.length else ""
            row.title = f"the {source} resets {name}: it is over, both ways{code}"
        if header.length and not header.flags & RST or header.flags & SYN:
            row.windows, row.full = dict(stream.windows), dict(stream.full)

    def _explain_data(self, row, event, stream, name):
        row.kind = PAYLOAD
        row.title = f"{count(event.size)} on {name}"
        if event.header.stream_id == CONTROL_STREAM:
            self._explain_messages(row, event)
            return
        data, size = event.data, event.size
        if event.source == "gateway" and not stream.named:
            stream.named = True
            data = self._explain_data_header(row, data)
            size -= event.size - len(data) if event.size <= KEPT else 0
        if data:
            self._explain_bytes(row, data, size)

    def _explain_messages(self, row, event):
        row.kind = MESSAGE
        row.hex.append(first_bytes(event.data, event.size))
        text = self._messages[event.source] + event.data.decode()
        titles = []
        while text := text.lstrip():
            try:
                message, end = json.JSONDecoder().raw_decode(text)
            except ValueError:  # it is not whole yet
                break
            text = text[end:]
            kind = message.get("type")
            titles.append(f"{kind}: {MESSAGES.get(kind, 'an extension')}")
            row.lines += pretty(message)
        self._messages[event.source] = text
        row.title = "; ".join(titles) or f"{count(event.size)} of a control message"

    def _explain_data_header(self, row, data):
        """Explain the first bytes of a data stream, and return the bytes behind them."""
        version, length = DATA_HEADER.unpack_from(data)
        end = DATA_HEADER.size + length
        text = data[DATA_HEADER.size : end]
        row.title += ": the data header"
        code = f"{version:02x} {length:04x} {chunked(text)}"
        words = f"data header: version {version}, {count(length)} of hostname: {text.decode()}"
        row.hex.append((code, words))
        if version == DATA_HEADER_RELAYED:
            row.lines.append("(version 3: bytes are relayed both ways, and FIN ends one of them)")
        return data[end:]

    # Bytes

    def _explain_bytes(self, row, data, size):
        way = (row.source, row.sink)
        whole = len(data) == size
        shown = first_bytes(data, size)
        if row.header is not None:
            row.hex.append(shown)
        if self._kind != "tcp" and way not in self._heads and b"\r\n\r\n" in data:
            self._heads.add(way)
            head, _, body = data.partition(b"\r\n\r\n")
            what = "the head of an " + ("answer" if head[:5] == b"HTTP/" else "HTTP request")
            row.title += (", then " if row.hex[1:] else ": ") + what
            lines = head.decode("latin-1").split("\r\n")
            if head in self._seen:
                lines = ["(the same head as above)"]
            self._seen.add(head)
            body_size = size - len(head) - 4
            if body_size:
                row.title += f", and {count(body_size)} of body"
                if is_text(body) and whole:
                    lines += ["", readable(body)]
        elif self._kind == "websocket" and way in self._heads and len(data) >= 2:
            row.title += f": {websocket_words(data)}"
            lines = [] if row.hex else [" ".join(shown)]
        elif whole and size <= TEXT_SHOWN and is_text(data):
            lines = [readable(data)]
        else:
            row.size = size  # part of a large body: may be folded
            lines = [] if row.hex else [" ".join(shown)]
        if whole and lines:
            if data in self._seen:
                lines = ["(the same bytes as above)"]
            self._seen.add(data)
        row.lines += lines


# Shorter -----------------------------------------------------------------------------------------


def fold(rows):
    """Make one row of FOLDED or more that carry a body the same way, with nothing between them on
    their lane but each other."""
    runs = []  # lists of rows; those of a run with one row are as they came
    latest = {}  # lane: its latest run
    for row in rows:
        lane = frozenset((row.source, row.sink))
        run = latest.get(lane)
        if run and row.size and _continues(run[-1], row):
            run.append(row)
        else:
            latest[lane] = [row]
            runs.append(latest[lane])
    folded = []
    for run in runs:
        folded += [_join(run)] if len(run) >= FOLDED else run
    return sorted(folded, key=lambda row: row.at)


def _continues(before, row):
    return before.size > 0 and (before.source, before.kind, before.stream_id) == (
        row.source, row.kind, row.stream_id,
    )  # fmt: skip


def _join(run):
    first, last = run[0], run[-1]
    total = sum(row.size for row in run)
    sizes = sorted({row.size for row in run})
    each = f"{sizes[0]} to {sizes[-1]} bytes" if len(sizes) > 1 else count(sizes[0])
    if first.header is None:
        title = f"the {first.source} sends {count(total)}, in {len(run)} pieces"
        note = f"({each} each)"
    else:
        title = f"{len(run)} DATA frames: {count(total)} on stream {first.stream_id}"
        note = f"({each} of payload each; the header is the first one's)"
    return replace(first, title=title, hex=[], lines=[note], windows=last.windows, full=last.full,
                   size=total, until=last.at)  # fmt: skip


def shorten(rows):
    """Leave out the middle of a very long exchange of DATA and credit."""
    runs = [[]]  # of rows of the tunnel that belong to such an exchange
    for row in rows:
        if {row.source, row.sink} == TUNNEL:
            if row.kind in (CREDIT, PROBE) or row.size:
                runs[-1].append(row)
            else:
                runs.append([])
    notes, gone = {}, set()  # first row left out: the row in its place; all that are left out
    for run in runs:
        if len(run) > LONG:
            middle = run[KEPT_FIRST:-KEPT_LAST]
            moved = sum(row.size for row in middle)
            credits = sum(row.kind == CREDIT for row in middle)
            words = f"... and so on: {count(moved)} more in DATA frames, and {credits} times credit"
            notes[id(middle[0])] = Row(
                middle[0].at, "gateway", "gateway", LINK, words, until=middle[-1].until
            )
            gone.update(map(id, middle))
    return [notes.get(id(row), row) for row in rows if id(row) not in gone or id(row) in notes]


# Bytes in words ----------------------------------------------------------------------------------


def count(size):
    return "1 byte" if size == 1 else f"{size} bytes"


def header_fields(header):
    """The five fields of a header: (bytes in hex, what they are)."""
    digits = header.encode().hex()
    flags = " ".join(name for flag, name in FLAGS.items() if header.flags & flag)
    meaning = {DATA: "length", WINDOW_UPDATE: "credit", PING: "value", GO_AWAY: "code"}
    return (
        (digits[:2], "version 0"),
        (digits[2:4], TYPES[header.type]),
        (digits[4:8], flags or "no flags"),
        (digits[8:16], f"stream {header.stream_id}" if header.stream_id else "the session"),
        (digits[16:], f"{meaning[header.type]} {header.length}"),
    )


def chunked(data):
    """Bytes in hex, four to a group."""
    return data.hex(" ", -4)


def first_bytes(data, size):
    """The first bytes of a payload in hex, and the same as characters."""
    shown = data[:HEX_SHOWN]
    text = "".join(chr(byte) if 32 <= byte < 127 else "." for byte in shown)
    return chunked(shown), text + (" ..." if size > len(shown) else "")


def is_text(data):
    return all(32 <= byte < 127 or byte in b"\r\n\t" for byte in data)


def readable(data):
    """A text on one line."""
    return repr(data.decode("ascii"))[1:-1]


def websocket_words(data):
    """What a WebSocket frame says (RFC 6455 §5.2)."""
    opcode, length = data[0] & 0x0F, data[1] & 0x7F
    payload, how = data[2:], "not masked"
    if data[1] & 0x80:
        mask, payload = data[2:6], data[6:]
        payload = bytes(byte ^ mask[at % 4] for at, byte in enumerate(payload))
        how = "masked"
    what = WEBSOCKET_OPCODES.get(opcode, f"opcode {opcode}")
    if opcode == 8 and length >= 2:
        text = f"code {struct.unpack_from('!H', payload)[0]}"
    else:
        text = ascii(payload[:length].decode(errors="replace"))
    return f"a WebSocket frame, {how}: {what}, {text}"


def pretty(message):
    """The lines of a control message, with what is secret or random shortened."""
    lines = []
    for name, value in message.items():
        text = json.dumps(value)
        if name == "token":
            text = f'"{value[:8]}..." (a JWT of {len(value)} bytes, not shown)'
        elif name == "instance":
            text = f'"{value[:6]}..." (of this agent process)'
        lines.append(f' "{name}": {text},')
    lines[0] = "{" + lines[0][1:]
    lines[-1] = re.sub(",$", "}", lines[-1])
    return lines
