"""Draws the status screen: what is to be seen goes in, lines of text come out.

No terminal, no agent. Each line has fewer cells than the terminal has columns, and there are fewer
lines than it has rows.
"""

from collections.abc import Sequence
from time import localtime, strftime
from typing import NamedTuple

from ..common.cells import MOST_MARKS, fit, pad, safe, width, wrap
from ..common.quantities import duration, size
from ..follow import Seen, Totals, has_failed

# States of an agent.
CONNECTING, ONLINE, WAITING = "connecting", "online", "waiting"
STOPPING, STOPPED = "stopping", "stopped"

MARGIN = 2  # cells on the left
MOST_VISITS = 20  # lines: more would be no list to look at, but a wall
LEAST_VISITS = 3
MOST_OPEN = 3  # visits that go on
MOST_TUNNELS = 8
MOST_MESSAGES = 3
MOST_WRAPPED = 4  # lines of one message
MOST_A_CELL = 1 + MOST_MARKS  # characters: what is longer than this is cut before it is measured
LEAST_COLUMNS = 20  # of a terminal, for a picture at all

# Looks: SGR parameters (ECMA-48 §8.3.117). Only colours that can be read on a dark and on a light
# background; everything that is well stays in the terminal's own colour.
BOLD, DIM = "1", "2"
GOOD, ODD, BAD = "32", "35", "31"  # green, magenta, red
INK = "30;47"  # black on white, for QR codes


class Look(NamedTuple):
    """What the terminal can show."""

    colour: bool = True
    unicode: bool = True

    def paint(self, text: str, sgr: str) -> str:
        return f"\x1b[{sgr}m{text}\x1b[0m" if self.colour and sgr and text else text

    @property
    def arrow(self) -> str:
        return "→" if self.unicode else "->"

    @property
    def dot(self) -> str:
        return "●" if self.unicode else "*"

    @property
    def between(self) -> str:
        return " · " if self.unicode else ", "

    @property
    def more(self) -> str:
        return "…" if self.unicode else "..."


class Shown(NamedTuple):
    """A tunnel. ``problem``: why it is not served; ``certificate``: its state while it has none;
    ``ill``: why its target is not well."""

    url: str
    target: str
    problem: str = ""
    certificate: str = ""
    ill: str = ""


class Said(NamedTuple):
    """A message of the log. ``at`` is wall-clock time, the last; ``times``: how often it came."""

    at: float
    text: str
    times: int = 1


class View(NamedTuple):
    """All that is to be seen. ``since`` is wall-clock time, of the session or of the end;
    ``retry_in`` is in seconds. ``running`` are visits that go on, and ``visits`` those that are
    over, the latest last. ``notes`` are sentences below the tunnels, ``qr`` the lines of a QR
    code."""

    state: str
    version: str
    gateway: str = ""
    since: float = 0
    retry_in: int | None = None
    problem: str = ""
    tunnels: Sequence[Shown] = ()
    notes: Sequence[str] = ()
    totals: Totals = Totals(0, 0, 0, 0)
    running: Sequence[Seen] = ()
    visits: Sequence[Seen] = ()
    messages: Sequence[Said] = ()
    qr: Sequence[str] = ()


def draw(view: View, columns: int, rows: int, look: Look) -> list[str]:
    """The picture, from its top to its bottom: its parts with an empty line between them. What
    needs more room than there is gives way: visits first, then the QR code, then messages."""
    paper = _Paper(look, max(columns, LEAST_COLUMNS) - 1)  # a full last column may wrap a line
    most = max(rows, 2) - 1  # the cursor rests on the line below
    title, counts = _title(view, paper), _counts(view, paper)
    tunnels = _tunnels(view, paper, most // 2)
    left = most - len(title) - len(tunnels) - len(counts) - 2

    def take(lines: list[str]) -> list[str]:
        """As many of the lines as there is room for, with the empty line before them."""
        nonlocal left
        lines = lines[: max(0, left - 1)]
        left -= len(lines) + 1 if lines else 0
        return lines

    hint = take(_hint(view, paper))
    messages = take(_messages(view, paper))
    qr = take(_qr(view, paper, left - LEAST_VISITS - 2))
    visits = take(_visits(view, paper, min(left - 1, MOST_VISITS)))
    parts = [title, tunnels, qr, counts, visits, messages, hint]
    lines = [line for part in parts if part for line in ("", *part)][1:]
    return lines[:most]


class _Paper:
    """Makes lines of spans: a span is (text, SGR parameters)."""

    def __init__(self, look: Look, columns: int):
        self.look, self.columns = look, columns

    def line(self, *spans: tuple[str, str]) -> str:
        """The spans side by side, cut where the paper ends."""
        left, painted = self.columns, ""
        for text, sgr in spans:
            text = fit(text, left, self.look.more)
            left -= width(text)
            painted += self.look.paint(text, sgr)
        return painted.rstrip(" ")

    def wrapped(
        self, text: str, sgr: str, indent: int = MARGIN, most: int = MOST_WRAPPED
    ) -> list[str]:
        """A sentence in at most so many lines."""
        lines = wrap(safe(text[: most * self.columns * MOST_A_CELL]), self.columns - indent)
        if len(lines) > most:
            rest = " ".join(lines[most - 1 :])
            lines[most - 1 :] = [fit(rest, self.columns - indent, self.look.more)]
        return [self.line((" " * indent, ""), (line, sgr)) for line in lines]


def _title(view: View, paper: _Paper) -> list[str]:
    look = paper.look
    name = f"gotunnel {view.version}"
    connecting = f"connecting to {view.gateway}"
    if view.problem:
        connecting = "reconnecting"
    elif width(f"{name}  {look.dot} {connecting}") > paper.columns:
        connecting = "connecting"
    words, sgr = {
        CONNECTING: (connecting, BAD if view.problem else ""),
        ONLINE: (f"online since {_clock(view.since)}", GOOD),
        WAITING: (f"reconnecting in {view.retry_in} s", BAD),
        STOPPING: ("stopping", ""),
        STOPPED: (f"stopped at {_clock(view.since)}", ""),
    }[view.state]
    lines = [paper.line((name, BOLD), ("  ", ""), (look.dot, sgr), (" " + safe(words), ""))]
    if view.problem and view.state in (CONNECTING, WAITING):
        lines += paper.wrapped(f"{view.gateway}: {view.problem}", BAD)
    return lines


def _tunnels(view: View, paper: _Paper, most: int) -> list[str]:
    look = paper.look
    shown = view.tunnels[:MOST_TUNNELS]
    urls = [safe(tunnel.url) for tunnel in shown]
    targets = [safe(tunnel.target) for tunnel in shown]
    widest = max(map(width, urls), default=0)
    arrow = f" {look.arrow} "
    beside = MARGIN + widest + width(arrow) + max(map(width, targets), default=0) <= paper.columns
    lines = []
    for tunnel, url, target in zip(shown, urls, targets):
        if beside:
            spans = (pad(url, widest), BOLD), (arrow, ""), (target, "")
            lines.append(paper.line((" " * MARGIN, ""), *spans))
        else:
            lines += paper.wrapped(url, BOLD)
            lines += paper.wrapped(f"{look.arrow} {target}", "", 2 * MARGIN)
        if tunnel.problem:
            lines += paper.wrapped(f"not served: {tunnel.problem}", BAD, 2 * MARGIN)
        elif tunnel.ill:
            lines += paper.wrapped(f"target not well: {tunnel.ill}", BAD, 2 * MARGIN)
        elif tunnel.certificate:
            lines += paper.wrapped(tunnel.certificate, ODD, 2 * MARGIN)
    if len(view.tunnels) > len(shown):
        lines.append(paper.line((f"  and {len(view.tunnels) - len(shown)} more", DIM)))
    for note in view.notes:
        lines += paper.wrapped(note, "")
    return lines[: max(1, most)]


def _counts(view: View, paper: _Paper) -> list[str]:
    totals, between = view.totals, paper.look.between
    if not totals.visits and not view.running:
        return [paper.line(("  no visits yet", DIM))]
    facts = [(_number(totals.visits, "visit"), "")]
    if view.running:
        facts.append((f"{len(view.running)} open", ""))
    if totals.failed:
        facts.append((f"{totals.failed} failed", BAD))
    facts.append((f"{size(totals.bytes_out)} sent", ""))
    if totals.bytes_in:
        facts.append((f"{size(totals.bytes_in)} received", ""))
    spans, left = [(" " * MARGIN, ""), facts[0]], paper.columns - MARGIN - width(facts[0][0])
    for text, sgr in facts[1:]:
        left -= width(between + text)
        if left >= 0:  # a fact is shown whole, or not at all
            spans += [(between, DIM), (text, sgr)]
    return [paper.line(*spans)]


def _number(count: int, noun: str) -> str:
    return f"{count} {noun}{'' if count == 1 else 's'}"


def _visits(view: View, paper: _Paper, most: int) -> list[str]:
    """Those that go on stand above the others, so that they stay where they are."""
    if most <= 0:
        return []
    running = list(view.running)[-min(MOST_OPEN, most) :]
    over = list(view.visits)[-(most - len(running)) :] if most > len(running) else []
    rows = [(seen, True) for seen in running] + [(seen, False) for seen in over]
    # POST is usual: then the columns seldom move.
    methods = max(len("POST"), *(width(_method(seen)) for seen, _ in rows)) if rows else 0
    return [_visit(seen, goes_on, methods, view, paper) for seen, goes_on in rows]


def _visit(seen: Seen, goes_on: bool, methods: int, view: View, paper: _Paper) -> str:
    """The path stands last, where it may be as long as it likes."""
    columns = paper.columns
    spans = [("  ", "")]
    if columns >= 56:
        spans.append((f"{_clock(seen.started)}  ", DIM))
    spans.append((f"{pad(_method(seen), methods)}  ", ""))
    status = str(seen.status) if seen.status else "-"
    spans.append((f"{status:>3}  ", _status_look(seen, goes_on)))
    if columns >= 36:
        spans.append((f"{'open' if goes_on else duration(seen.duration):>6}  ", ""))
    if columns >= 46:
        spans.append((f"{size(seen.bytes_out):>7}  ", DIM))
    room = columns - sum(width(text) for text, _ in spans)
    return paper.line(*spans, (_what(seen, view, paper, room), ""))


def _method(seen: Seen) -> str:
    return safe(seen.method)[:9] if seen.method else seen.mode


def _what(seen: Seen, view: View, paper: _Paper, room: int) -> str:
    """The path of a visit, with its hostname if there are several, and what went wrong."""
    named = len(view.tunnels) > 1 or not seen.path
    text = (seen.hostname if named else "") + readable(seen.path)
    text = safe(text[: paper.columns * MOST_A_CELL])
    if not seen.problem:
        return text
    more = paper.look.more
    problem = fit(f" ({safe(seen.problem)})", max(room // 2, room - width(text)), more)
    return fit(text, room - width(problem), more) + problem


def _status_look(seen: Seen, goes_on: bool) -> str:
    if goes_on:
        return ""
    if has_failed(seen):
        return f"{BOLD};{BAD}"
    return ODD if seen.status >= 400 else ""


def _messages(view: View, paper: _Paper) -> list[str]:
    lines = []
    for said in list(view.messages)[-MOST_MESSAGES:]:
        times = f" ({said.times} times)" if said.times > 1 else ""
        lines += paper.wrapped(f"{_clock(said.at)} {said.text}{times}", BAD)
    return lines


def _qr(view: View, paper: _Paper, room: int) -> list[str]:
    """The QR code, or why it is not drawn."""
    if not view.qr:
        return []
    columns = max(map(width, view.qr)) + MARGIN
    if len(view.qr) > room or columns > paper.columns:
        rows = len(view.qr) - room
        what = f"{rows} more rows" if rows > 0 else f"{columns + 1} columns"
        return paper.wrapped(f"the QR code needs a larger window: {what}", DIM)
    return [" " * MARGIN + paper.look.paint(line, INK) for line in view.qr]


def _hint(view: View, paper: _Paper) -> list[str]:
    words = {STOPPING: "Ctrl-C again stops at once", STOPPED: ""}.get(view.state, "Ctrl-C stops")
    return [paper.line((f"  {words}", DIM))] if words else []


def _clock(at: float) -> str:
    return strftime("%H:%M:%S", localtime(at))


def readable(path: str) -> str:
    """A path as it came, in latin-1, as text: in UTF-8 if it is that."""
    try:
        return path.encode("latin-1").decode()
    except UnicodeError:
        return path
