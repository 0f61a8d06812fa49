"""Shows an agent on a terminal: its tunnels, its state and the visits that pass.

picture.py draws, terminal.py writes. The thread here looks at the agent a few times a second, draws
what has changed, and may hang in a terminal that is stopped: no other thread waits for it. While it
draws, warnings of the log are part of the picture, as they would be written across it otherwise.
"""

from __future__ import annotations

import contextlib
import logging
import math
import re
import signal
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterator
from time import monotonic, time
from typing import TextIO

from gotunnel import __version__

from .. import home
from ..agent import Agent, Snapshot
from ..common.hostnames import OPEN
from ..common.one_line import on_one_line, words_on_one_line
from ..config import Tunnel
from ..follow import Follower, Seen
from .picture import (
    CONNECTING,
    MOST_MESSAGES,
    MOST_VISITS,
    ONLINE,
    STOPPED,
    STOPPING,
    WAITING,
    Look,
    Said,
    Shown,
    View,
    draw,
)
from .qr import NO_BLOCKS, NoQr, qr_lines
from .terminal import Terminal, can_write, is_terminal

log = logging.getLogger("gotunnel.screen")

TICK = 0.25  # seconds between two looks at what has changed
SIGNAL_TIME = 0.1  # seconds for the main thread to handle SIGCONT
# Seconds after which a visit that goes on is shown. Shorter ones would come and go in the list.
OPEN_AFTER = 2
MESSAGE_STAYS = 300  # seconds
DRAWN = "→●·…▀▄█"  # what an encoding must have for the better picture
# Log lines of the agent that say what the picture shows anyway, by words in them.
STATES = ("next try in", "not served:", "certificate:")
# In a CA's words about a hostname: the address of its answer in front, and that of the proof, whose
# last part is random. The reason comes behind them, and would be cut off.
ANSWER = re.compile(r"https?://\S+: ")
PROOF = re.compile(r"(/\.well-known/acme-challenge/)[\w-]+", re.ASCII)
CERTIFICATE_WAITS = "certificate: being ordered; visitors cannot connect until it is there"


class Screen:
    """Shows an agent while run() runs: drawn on a terminal, otherwise a log line a visit."""

    def __init__(self, agent: Agent, out: TextIO | None, *, qr: bool = False):
        """To be made by the main thread before the agent runs, as its visits are followed. ``qr``:
        draw the address of the first tunnel as a QR code."""
        if agent.follower is None:
            agent.follower = Follower()
        self._agent, self._follower = agent, agent.follower
        self._messages = Messages()
        self._visits: deque[Seen] = deque(maxlen=MOST_VISITS)
        # The tunnels of the last session: without one the agent knows no addresses.
        self._tunnels: list[Shown] = []
        self._served = False  # there was a session
        self._since = (0.0, 0.0)  # of the session: monotonic and wall-clock time
        # Texts that the command adds: lines below the tunnels that stay, such as how visitors
        # connect, and what to call a target. To be set before run(), or replaced whole.
        self.notes: list[str] = []
        self.target_words: Callable[[Tunnel], str] = target_of
        self._wants_qr = qr
        self._qr: list[str] = []
        self._look = Look()
        self._terminal: Terminal | None = None
        if out is not None and is_terminal(out):
            self._look = Look(colour=home.terminal().colours, unicode=can_write(out, DRAWN))
            self._terminal = Terminal(out)
            self._watch_continued(self._terminal)

    @property
    def draws(self) -> bool:
        """Whether there is a terminal to draw on. Then nothing else should be written to it."""
        return self._terminal is not None

    def run(self, stop: threading.Event) -> None:
        """Show the agent until ``stop`` is set. To be called in a thread of its own, which may hang
        in a terminal that takes nothing: join it with a timeout."""
        if self._terminal is None:
            self._log_visits(stop)
            return
        with self._messages.taken_from_log():
            # The terminal may be gone; the tunnel stays.
            with contextlib.suppress(OSError, ValueError):
                self._draw(self._terminal, stop)

    def _watch_continued(self, terminal: Terminal) -> None:
        """After Ctrl-Z and fg, there is text of the shell's below the picture."""
        number = getattr(signal, "SIGCONT", None)
        if number is not None and threading.current_thread() is threading.main_thread():
            signal.signal(number, lambda *_: setattr(terminal, "disturbed", True))

    def _log_visits(self, stop: threading.Event) -> None:
        if self._wants_qr:
            log.warning("no QR code: standard output is no terminal")
        over = False
        while not over:
            over = stop.wait(TICK)
            for seen in self._follower.take():
                log.info("%s", in_words(seen))

    def _draw(self, terminal: Terminal, stop: threading.Event) -> None:
        size, over = terminal.size(), False
        while True:
            before, size = size, terminal.size()
            self._visits.extend(self._follower.take())
            if not terminal.in_foreground():
                terminal.disturbed = True
            elif size == before or over:  # not while the user pulls at the window
                terminal.read_typed()
                terminal.draw(draw(self._view(over), *size, self._look), size)
            if over:
                return
            began = monotonic()
            over = stop.wait(TICK)
            if monotonic() - began > 2 * TICK:
                # The process was stopped, perhaps: the main thread has a signal to handle first.
                over = stop.wait(SIGNAL_TIME) or over

    def _view(self, over: bool) -> View:
        snapshot, now = self._agent.snapshot(), monotonic()
        running = [seen for seen in self._follower.running() if seen.duration > OPEN_AFTER]
        if snapshot.since is not None or not self._served:
            self._tunnels = list(_tunnels(snapshot, self.target_words))
            self._served = snapshot.since is not None
        tunnels = self._tunnels
        if self._wants_qr and snapshot.since is not None and tunnels:
            self._wants_qr = False
            self._make_qr(tunnels[0].url)
        return View(
            state=STOPPED if over else _state(snapshot),
            version=__version__,
            gateway=snapshot.gateway,
            since=time() if over else self._began(snapshot),
            retry_in=None
            if snapshot.retry_at is None
            else math.ceil(max(1, snapshot.retry_at - now)),
            problem=snapshot.problem,
            tunnels=tunnels,
            notes=self.notes,
            totals=self._follower.totals(),
            running=sorted(running, key=lambda seen: seen.started),
            visits=self._visits,
            messages=self._messages.latest(),
            qr=self._qr,
        )

    def _began(self, snapshot: Snapshot) -> float:
        """The wall-clock time of the session's begin, always the same for one session."""
        if snapshot.since is not None and snapshot.since != self._since[0]:
            self._since = (snapshot.since, time() - (monotonic() - snapshot.since))
        return self._since[1]

    def _make_qr(self, url: str) -> None:
        try:
            if not self._look.unicode:
                raise NoQr(NO_BLOCKS)
            self._qr = qr_lines(url, dark_ink=self._look.colour)
        except NoQr as error:
            self._messages.add(str(error))


def _state(snapshot: Snapshot) -> str:
    if snapshot.stopping:
        return STOPPING
    if snapshot.since is not None:
        return ONLINE
    return CONNECTING if snapshot.retry_at is None else WAITING


def _tunnels(snapshot: Snapshot, target_words: Callable[[Tunnel], str]) -> Iterator[Shown]:
    for hostname, route in snapshot.routes.items():
        is_asked_for = not route.url and snapshot.since is None  # and not granted yet
        problem = route.problem or snapshot.refused.get(hostname, "")
        state, _, why = snapshot.certificates.get(hostname, "").partition(": ")
        failed = f"no certificate: {shorter(why)}"
        words = {"waiting": CERTIFICATE_WAITS, "failed": failed}.get(state, "")
        ill = snapshot.health.get(hostname, "")
        yield Shown(
            hostname.removesuffix(OPEN) if is_asked_for else route.address(hostname),
            target_words(route.tunnel),
            words_on_one_line(problem),
            words_on_one_line(words),
            words_on_one_line(ill),
        )
    for name in snapshot.refused.keys() - snapshot.routes.keys():
        route = snapshot.configured[name]
        why = snapshot.why_refused(name).removeprefix("refused: ")
        yield Shown(
            route.address(name.removesuffix(OPEN)),
            target_words(route.tunnel),
            words_on_one_line(why),
        )


def shorter(reason: str) -> str:
    """Why there is no certificate, without the long addresses in it. The log has all."""
    answer = ANSWER.match(reason)
    return PROOF.sub(r"\1...", reason[answer.end() :] if answer else reason)


def target_of(tunnel: Tunnel) -> str:
    """The target as a URL in http mode, and as the configuration has it otherwise."""
    target = tunnel.target
    is_plain = tunnel.mode == "http" and not target.tls and not target.path
    return f"http://{target}" if is_plain else str(target)


def in_words(seen: Seen) -> str:
    """A visit as a line of the log."""
    what = f"{seen.method} {seen.path} {seen.status or '-'}" if seen.method else seen.mode
    line = f"{seen.hostname}: {what} {1000 * seen.duration:.0f} ms {seen.bytes_out} bytes"
    return on_one_line(f"{line} ({seen.problem})" if seen.problem else line)


class Messages(logging.Handler):
    """The latest warnings of the log. Handler's lock guards them."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self._said: deque[Said] = deque(maxlen=MOST_MESSAGES)
        # With tracebacks, for which a picture has no room: they are written when it is over.
        self._bugs: deque[logging.LogRecord] = deque(maxlen=MOST_MESSAGES)

    def emit(self, record: logging.LogRecord) -> None:
        text = record.getMessage()
        if record.exc_info:
            self._bugs.append(record)
        if record.name != "gotunnel.link" or not any(words in text for words in STATES):
            self.add(text)

    def add(self, text: str) -> None:
        """Say it from now on, once, however often it comes."""
        text = words_on_one_line(text)
        with self.lock or contextlib.nullcontext():
            before = next((said for said in self._said if said.text == text), None)
            if before is not None:
                self._said.remove(before)
            self._said.append(Said(time(), text, before.times + 1 if before else 1))

    def latest(self) -> list[Said]:
        """The oldest first, without those that are no news any more."""
        with self.lock or contextlib.nullcontext():
            return [said for said in self._said if time() - said.at < MESSAGE_STAYS]

    @contextlib.contextmanager
    def taken_from_log(self) -> Iterator[None]:
        """Take the log's warnings during a ``with`` block. Nothing is written to a terminal that
        standard error is; a file still gets all."""
        root = logging.getLogger()
        silenced = [handler for handler in root.handlers if _writes_to_terminal(handler)]
        for handler in silenced:
            root.removeHandler(handler)
        root.addHandler(self)
        try:
            yield
        finally:
            root.removeHandler(self)
            for handler in silenced:
                root.addHandler(handler)
                for record in self._bugs:
                    handler.handle(record)


def _writes_to_terminal(handler: logging.Handler) -> bool:
    if not isinstance(handler, logging.StreamHandler) or handler.stream is not sys.stderr:
        return False
    try:
        return bool(sys.stderr.isatty())
    except ValueError:  # closed
        return False
