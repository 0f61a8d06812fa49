"""Which kind of proof works here: learned from one hostname's order, used for the next one's.

HTTP-01 on a machine whose port 80 nobody reaches fails for each hostname alike, and each failure
costs a minute and one of the few that a CA allows.
"""

from __future__ import annotations

from collections.abc import Iterable

from .kept import number
from .schedule import DAY

# Seconds that something learned is believed. Ports are opened and closed; to ask again costs a
# minute.
BELIEVED = 7 * DAY
# What the CA says of a proof that it could not see, or was shown another one in the place of. A
# name that does not resolve, or whose CAA record forbids, says nothing about the ways to us.
UNSEEN = {"connection", "incorrectResponse", "tls", "unauthorized"}


class ProofMemory:
    """One entry a challenge type. One thread at a time. Instants are seconds since 1970."""

    def __init__(self):
        self._seen: dict[str, tuple[bool, float]] = {}  # whether it worked, and when

    def ranked(self, types: Iterable[str], now) -> list[str]:
        """What worked comes first, the latest before others; what has only failed comes last."""

        def rank(challenge):
            worked, at = self._seen.get(challenge, (None, 0.0))
            if worked is None or not 0 <= now - at < BELIEVED:
                return 1, 0.0
            return (0, -at) if worked else (2, 0.0)

        return sorted(types, key=rank)

    def worked(self, challenge, now):
        self._seen[challenge] = (True, now)

    def failed(self, challenge, code, now):
        """That a type failed for one hostname says little if it has worked for others."""
        worked, at = self._seen.get(challenge, (False, now))
        if code in UNSEEN and not (worked and 0 <= now - at < BELIEVED):
            self._seen[challenge] = (False, now)

    def shift(self, seconds):
        """The clock was set forward by so many seconds, back if they are negative."""
        self._seen = {kind: (worked, at + seconds) for kind, (worked, at) in self._seen.items()}

    def as_dict(self) -> dict:
        """What has to outlive a restart, for JSON."""
        return dict(self._seen)

    def restore(self, kept, types: Iterable[str]):
        """Take what as_dict() made, of those types; what makes no sense counts as missing."""
        for challenge in types:
            entry = kept.get(challenge) if isinstance(kept, dict) else None
            if isinstance(entry, list) and len(entry) == 2 and isinstance(entry[0], bool):
                self._seen[challenge] = (entry[0], number(entry[1]))
