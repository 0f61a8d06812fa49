"""Runs an agent for one quick tunnel: announces its public address, and ends when it cannot be had.

Threads, besides those of the agent (agent.py):

    thread   how many   does                                             ends when
    main     1          waits for signals                                the process ends
    quick    1          reacts to each change of the agent's state       the agent stops
"""

from __future__ import annotations

import logging
import signal
import sys
import threading
from collections.abc import Callable
from typing import TextIO

from gotunnel import spawn

from ..agent import Agent, Snapshot
from ..common.one_line import on_one_line
from ..common.process import HANG_UP, Signals, watch_memory
from ..config import Config, Tunnel

log = logging.getLogger("gotunnel.serving")

REFUSED = "the gateway refused: "  # how Snapshot.problem begins after a refusal
TAKEN = "host already registered"
LOOK = 0.2  # seconds


class Announcer:
    """Thread "quick": tells the user the public address, or why there is none."""

    def __init__(self, agent: Agent, tunnel: Tunnel, out: TextIO | None):
        self._agent, self._tunnel, self._out = agent, tunnel, out
        self._stop = threading.Event()
        self.failure = ""  # why the command ends; "" if it does not

    def run(self) -> None:
        """Returns when stop() is called, or when the gateway refuses the tunnel."""
        while not self._stop.wait(LOOK):
            snapshot = self._agent.snapshot()
            if snapshot.since is not None:
                self._announce(snapshot)
                self._stop.wait()
            elif self.refused(snapshot.problem):
                self.failure = snapshot.problem
                return

    def stop(self) -> None:
        self._stop.set()

    def refused(self, problem: str) -> bool:
        return problem.startswith(REFUSED) and TAKEN not in problem

    def _announce(self, snapshot: Snapshot) -> None:
        scheme = "https" if self._tunnel.mode == "http" else "tls"
        url = f"{scheme}://{self._tunnel.hostname}"
        if self._out is not None:
            print(on_one_line(url), file=self._out, flush=True)


def run(config: Config, say: Callable[[str], object]) -> int:
    """Serve the one tunnel of ``config`` until a signal comes; returns the exit status.
    ``say(text)`` reports an error. Raises CannotTrust."""
    agent = Agent(config)
    announcer = Announcer(agent, config.tunnels[0], sys.stdout)
    # The terminal is closed: end in good order, unless nohup has it ignored.
    ends = [HANG_UP] if HANG_UP and signal.getsignal(HANG_UP) is not signal.SIG_IGN else []
    signals = Signals(also=ends)
    spawn("agent", signals.after, agent.run)
    spawn("quick", signals.after, announcer.run)
    watch_memory()
    number = signals.wait()
    if number:
        log.info("stopping; a second signal stops at once")
    announcer.stop()
    agent.stop()
    if number:
        log.info("stopped")
        return 0
    say(announcer.failure or "ended by a bug, which was logged")
    return 1
