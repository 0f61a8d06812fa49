"""When a certificate is renewed, and when a failed attempt is repeated. Pure: no clock, no dice.

All instants are wall-clock seconds since 1970. Chance is taken from a hash of the hostname and
what goes with it: spread over hostnames, yet the same after a restart, so that nothing needs to be
kept of it.
"""

from __future__ import annotations

import hashlib
from typing import NamedTuple

MINUTE, HOUR, DAY = 60, 3600, 86_400  # seconds

# Between our clock and the CA's: from the first on an order warns, from the second on none is made.
# Certificates are about time: with a clock this wrong we would take a good one for one that has run
# out, and order again and again.
CLOCK_OFF, CLOCK_WRONG = 5 * MINUTE, DAY

# After so many failures of a hostname; from then on daily. Let's Encrypt, which allows five failed
# validations an hour, recommends this order of growth.
BACKOFF = (1 * MINUTE, 10 * MINUTE, 100 * MINUTE, DAY)
BACKOFF_SPREAD = 0.1

# A third of the lifetime leaves weeks for repairs; a certificate of few days is renewed at half.
LEFT, LEFT_IF_SHORT, SHORT_LIFE = 1 / 3, 1 / 2, 10 * DAY
SPREAD = 1 / 50  # of the lifetime, to either side: hostnames of one day do not come all at once
LEFT_AT_LATEST = 1 / 20  # whatever the CA suggests

# The CA's Retry-After says when to ask for its window again (RFC 9773 §4.3.1).
LEAST_ASK, ASK, MOST_ASK = 1 * MINUTE, 6 * HOUR, DAY


class Window(NamedTuple):
    """When the CA wants a certificate renewed (RFC 9773 §4.2); in the past means now."""

    start_at: float
    end_at: float


def renew_at(hostname, begins_at, ends_at, window: Window | None = None) -> float:
    """When a certificate is due: a moment within the CA's window, else by its lifetime."""
    life = max(ends_at - begins_at, 0.0)
    if window is not None:
        chosen = window.start_at + (window.end_at - window.start_at) * _chance(hostname, *window)
        return min(chosen, ends_at - life * LEFT_AT_LATEST)
    left = LEFT if life >= SHORT_LIFE else LEFT_IF_SHORT
    return ends_at - life * (left + SPREAD * (2 * _chance(hostname, begins_at) - 1))


def retry_delay(hostname, failures) -> float:
    """Seconds from the latest of so many failures in a row to the next attempt."""
    delay = BACKOFF[min(failures, len(BACKOFF)) - 1]
    return delay * (1 + BACKOFF_SPREAD * (2 * _chance(hostname, failures) - 1))


def ask_delay(retry_after: float | None) -> float:
    """Seconds until the CA is asked for its window again."""
    return ASK if retry_after is None else min(max(retry_after, LEAST_ASK), MOST_ASK)


def _chance(*things) -> float:
    """A number from 0 to 1 that depends on nothing but ``things``."""
    digest = hashlib.sha256(" ".join(map(str, things)).encode()).digest()
    return int.from_bytes(digest[:8], "big") / 2**64
