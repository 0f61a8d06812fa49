"""Shows an agent on a terminal: its tunnels, its state and the visits that pass."""

from __future__ import annotations

import logging
import threading
from typing import TextIO

from ..agent import Agent
from ..common.one_line import on_one_line
from ..follow import Follower, Seen

log = logging.getLogger("gotunnel.screen")

TICK = 0.25  # seconds between two looks at what has changed


class Screen:
    """Shows an agent while run() runs: drawn on a terminal, otherwise a log line a visit."""

    def __init__(self, agent: Agent, out: TextIO | None, *, qr: bool = False):
        """To be made before the agent runs, as its visits are followed. ``qr``: draw the address
        of the first tunnel as a QR code."""
        if agent.follower is None:
            agent.follower = Follower()
        self._agent, self._follower = agent, agent.follower
        self._out, self._qr = out, qr

    def run(self, stop: threading.Event) -> None:
        """Show the agent until ``stop`` is set. To be called in a thread of its own, which may hang
        in a terminal that does not read: join it with a timeout."""
        over = False
        while not over:
            over = stop.wait(TICK)
            for seen in self._follower.take():
                log.info("%s", in_words(seen))


def in_words(seen: Seen) -> str:
    """A visit as a line of the log."""
    what = f"{seen.method} {seen.path} {seen.status or '-'}" if seen.method else seen.mode
    line = f"{seen.hostname}: {what} {1000 * seen.duration:.0f} ms {seen.bytes_out} bytes"
    return on_one_line(f"{line} ({seen.problem})" if seen.problem else line)
