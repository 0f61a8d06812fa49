"""How long a peer may keep us waiting, when each byte that it moves buys it time.

Two accounts, in seconds. One is of silence, and any byte empties it. The other is of time that was
waited in all, less the time that the bytes were worth at a minimum rate: so a peer that trickles,
one byte before each silence would be too long, is found out too. No clock here: the caller says how
long it has waited, and for how many bytes. Time of its own work does not count.
"""

from collections.abc import Callable


class Patience:
    """With one peer, in one direction. One thread at a time, but restore() is any thread's."""

    def __init__(
        self, most: float, rate: float | None = None, hurry: Callable[[], bool] = lambda: True
    ):
        """``most``: seconds, on either account. ``rate``: bytes a second, None if any byte is worth
        all time. ``hurry()``: whether the rate is asked for now; silence always is too long."""
        self._most = most
        self._rate = rate
        self._hurry = hurry
        self._silent = self._owed = 0.0

    def spend(self, seconds: float, moved: int):
        """``seconds`` were waited, in which ``moved`` bytes came or were taken. Raises TimeoutError
        if that was too long."""
        self._silent = 0.0 if moved else self._silent + seconds
        if self._rate is not None:
            self._owed = max(0.0, self._owed + seconds - moved / self._rate)
        if self._silent >= self._most:
            raise TimeoutError(f"nothing for {self._most:g} s")
        if self._owed >= self._most and self._hurry():
            raise TimeoutError(f"less than {self._rate:g} bytes a second for {self._most:g} s")

    def restore(self):
        """The peer had a reason to wait: both accounts are empty."""
        self._silent = self._owed = 0.0
