"""Finds out that the link to an agent is silent: a pulled cable, a machine that is stopped.

Such a link reports no error for minutes. So when nothing has come from the agent for QUIET seconds
while a visit waits, the agent is asked for a sign of life. If it gives none within PATIENCE, its
link is silent. The session ends soon then, by itself (agents/heartbeat.py, ANSWER_TIMEOUT).
"""

import time
from time import monotonic

from ..routes import Tunnel

# Seconds. A visit looks every LOOK seconds: it asks at the first look, and gives up at the second.
LOOK = 0.5
QUIET = PATIENCE = 0.45
ROUND_TRIPS = 4  # PATIENCE is at least so many of the agent's round trips, for slow links
FRESH = 2  # seconds: a link that has carried something since then counts as alive
SIGN_LOOK = 0.005  # interval of looking for a sign of life, in seconds


class Silence:
    """The silence that one visit meets. One thread."""

    def __init__(self, tunnel: Tunnel):
        self._tunnel = tunnel
        self._since = monotonic()
        self._doubtful: float | None = None  # see is_long()

    def is_long(self) -> bool:
        """To be called every LOOK seconds: whether the link is silent."""
        tunnel, now = self._tunnel, monotonic()
        heard_at = max(tunnel.heard_at, self._since)
        if now - heard_at < QUIET:
            return False
        asked_at = tunnel.ask()  # now, or earlier if that question has no answer
        if asked_at <= heard_at and asked_at != self._doubtful:
            # What came since may be the answer, which is noticed a moment later. If the question is
            # still open at the next look, it was not.
            self._doubtful = asked_at
            return False
        return now - max(asked_at, heard_at) > _patience(tunnel)


def gives_sign(tunnel: Tunnel) -> bool:
    """Whether the link is alive: something came in the last FRESH seconds, or comes soon."""
    began = monotonic()
    if began - tunnel.heard_at < FRESH:
        return True
    tunnel.ask()
    while tunnel.heard_at < began:
        if monotonic() - began > _patience(tunnel):
            return False
        time.sleep(SIGN_LOOK)
    return True


def _patience(tunnel: Tunnel) -> float:
    return max(PATIENCE, ROUND_TRIPS * (tunnel.round_trip or 0))
