"""Which challenge type works on this machine: learned from one hostname's order, used for the next.

A "proof" is what we serve in answer to a challenge: it proves that we control the hostname.

On a machine whose port 80 cannot be reached, HTTP-01 fails for every hostname. Each failure costs a
minute and one of the few failed validations that a CA allows.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from .kept import number
from .schedule import DAY

# How long a result is believed, in seconds. Ports are opened and closed, and a wrong first choice
# costs only a minute.
BELIEVED = 7 * DAY
# A CA's error codes if it has not seen our proof: it could not reach it, or got something else.
# These count as failures of the challenge type. Others say nothing about our ports: the hostname
# does not resolve, or its CAA record forbids the CA.
UNSEEN = {"connection", "incorrectResponse", "tls", "unauthorized"}


class ProofMemory:
    """One entry a challenge type. Not thread-safe: the caller holds a lock. Instants are seconds
    since 1970."""

    def __init__(self) -> None:
        self._seen: dict[str, tuple[bool, float]] = {}  # whether it worked, and when

    def ranked(self, types: Iterable[str], now: float) -> list[str]:
        """The types that worked first, the latest before others; those that only failed last."""

        def rank(challenge: str) -> tuple[int, float]:
            worked, at = self._seen.get(challenge, (None, 0.0))
            if worked is None or not 0 <= now - at < BELIEVED:
                return 1, 0.0
            return (0, -at) if worked else (2, 0.0)

        return sorted(types, key=rank)

    def worked(self, challenge: str, now: float) -> None:
        self._seen[challenge] = (True, now)

    def failed(self, challenge: str, code: str, now: float) -> None:
        """Note a failure with the CA's error code. A type that has worked for other hostnames keeps
        its rank: the fault is then probably this hostname's."""
        worked, at = self._seen.get(challenge, (False, now))
        if code in UNSEEN and not (worked and 0 <= now - at < BELIEVED):
            self._seen[challenge] = (False, now)

    def shift(self, seconds: float) -> None:
        """The clock was set forward by so many seconds, back if they are negative."""
        self._seen = {kind: (worked, at + seconds) for kind, (worked, at) in self._seen.items()}

    def as_dict(self) -> dict[str, tuple[bool, float]]:
        """What has to outlive a restart, for JSON."""
        return dict(self._seen)

    def restore(self, kept: object, types: Iterable[str]) -> None:
        """Take what as_dict() made, of those types. Invalid values count as missing."""
        for challenge in types:
            entry = kept.get(challenge) if isinstance(kept, Mapping) else None
            if isinstance(entry, list) and len(entry) == 2 and isinstance(entry[0], bool):
                self._seen[challenge] = (entry[0], number(entry[1]))
