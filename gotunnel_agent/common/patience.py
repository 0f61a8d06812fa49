"""How long a peer may keep us waiting: a limit of silence, and a minimum rate (against Slowloris).

There are two counters, in seconds. One is the current silence; any byte sets it to 0. The other is
the whole time that we waited, minus the time that the moved bytes would take at the minimum rate.
It finds a peer that sends one byte just before each silence gets too long. There is no clock here:
the caller says how long it has waited and how many bytes moved. Time of the caller's own work does
not count.
"""

from collections.abc import Callable


class Patience:
    """The counters for one peer in one direction. One thread at a time; restore(): any thread."""

    def __init__(
        self, most: float, rate: float | None = None, hurry: Callable[[], bool] = lambda: True
    ):
        """``most``: seconds that either counter may reach. ``rate``: minimum bytes a second; None
        for no minimum. ``hurry()``: whether the minimum rate is enforced now; the limit of silence
        always is."""
        self._most = most
        self._rate = rate
        self._hurry = hurry
        self._silent = self._owed = 0.0

    def spend(self, seconds: float, moved: int) -> None:
        """Note that we waited ``seconds``, in which ``moved`` bytes came or were taken. Raises
        TimeoutError if either counter reaches its limit: the peer moved no byte at all ("nothing
        for"), or too few. The caller's log line says which peer and in which direction."""
        self._silent = 0.0 if moved else self._silent + seconds
        if self._rate is not None:
            self._owed = max(0.0, self._owed + seconds - moved / self._rate)
        if self._silent >= self._most:
            raise TimeoutError(f"nothing for {self._most:g} s")
        if self._owed >= self._most and self._hurry():
            raise TimeoutError(f"less than {self._rate:g} bytes a second for {self._most:g} s")

    def restore(self) -> None:
        """Set both counters to 0: the peer had a reason to wait."""
        self._silent = self._owed = 0.0
