"""How a hostname's certificate stands, as a value. Its text is made where it leaves us."""

from __future__ import annotations

import enum
import time
from typing import NamedTuple


class Standing(enum.Enum):
    """The word for it, in gotunnel.Certificate and on the dashboard."""

    READY = "ready"
    WAITING = "waiting"
    FAILED = "failed"


READY, WAITING, FAILED = Standing


class State(NamedTuple):
    """READY: visitors are served until ``ends_at``, and ``reason``, if any, is why the certificate
    could not be renewed. FAILED: ``reason`` is why there is none. ``next_at`` is when the next
    order is due. Instants are seconds since 1970; None if none is known.
    """

    name: Standing
    reason: str = ""
    next_at: float | None = None
    ends_at: float | None = None

    @property
    def is_ready(self) -> bool:
        return self.name is READY

    def __str__(self):
        """As in gotunnel.Certificate."""
        if self.name is not FAILED:
            return self.name.value
        text = f"{self.name.value}: {self.reason}"
        if self.next_at is None:
            return text
        at = time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(self.next_at))
        return f"{text} (next attempt {at})"
