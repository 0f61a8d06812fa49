"""When a certificate is renewed, and when a failed attempt is repeated. Pure: no clock, no random.

All instants are wall-clock seconds since 1970. Jitter comes from a hash of the hostname and the
dates: it differs between hostnames, but is the same after a restart, so it need not be stored.
"""

from __future__ import annotations

import hashlib
from typing import NamedTuple

MINUTE, HOUR, DAY = 60, 3600, 86_400  # seconds

# Difference between our clock and the CA's. Above the first, an order logs a warning; above the
# second nothing is ordered: we would take a valid certificate for an expired one, and order again
# and again.
CLOCK_OFF, CLOCK_WRONG = 5 * MINUTE, DAY

# Exponential backoff: the delay after a hostname's 1st, 2nd, 3rd failure; then daily. Let's
# Encrypt, which allows five failed validations an hour, recommends this growth.
BACKOFF = (1 * MINUTE, 10 * MINUTE, 100 * MINUTE, DAY)
BACKOFF_SPREAD = 0.1

# Parts of the lifetime that are left when a certificate is renewed. A third leaves weeks for
# repairs; a certificate that lives less than SHORT_LIFE is renewed at half.
LEFT, LEFT_IF_SHORT, SHORT_LIFE = 1 / 3, 1 / 2, 10 * DAY
SPREAD = 1 / 50  # jitter: up to this part of the lifetime earlier or later, against load peaks
LEFT_AT_LATEST = 1 / 20  # part that is left at the latest, whatever the CA suggests

# Seconds between two requests for the CA's renewal window: at least, by default, at most. In
# between the CA's Retry-After decides (RFC 9773 §4.3.1).
LEAST_ASK, ASK, MOST_ASK = 1 * MINUTE, 6 * HOUR, DAY


class Window(NamedTuple):
    """When the CA wants a certificate renewed (ARI, RFC 9773 §4.2); in the past means now."""

    start_at: float
    end_at: float


def renew_at(
    hostname: str, begins_at: float, ends_at: float, window: Window | None = None
) -> float:
    """When a certificate is due: a moment within the CA's window, else by its lifetime."""
    life = max(ends_at - begins_at, 0.0)
    if window is not None:
        chosen = window.start_at + (window.end_at - window.start_at) * _chance(hostname, *window)
        return min(chosen, ends_at - life * LEFT_AT_LATEST)
    left = LEFT if life >= SHORT_LIFE else LEFT_IF_SHORT
    return ends_at - life * (left + SPREAD * (2 * _chance(hostname, begins_at) - 1))


def retry_delay(hostname: str, failures: int) -> float:
    """Seconds from the latest of so many failures in a row to the next attempt."""
    delay = BACKOFF[min(failures, len(BACKOFF)) - 1]
    return delay * (1 + BACKOFF_SPREAD * (2 * _chance(hostname, failures) - 1))


def ask_delay(retry_after: float | None) -> float:
    """Seconds until the CA is asked for its window again."""
    return ASK if retry_after is None else min(max(retry_after, LEAST_ASK), MOST_ASK)


def _chance(*things: object) -> float:
    """A number from 0 to 1 that depends on nothing but ``things``."""
    digest = hashlib.sha256(" ".join(map(str, things)).encode()).digest()
    return int.from_bytes(digest[:8], "big") / 2**64
