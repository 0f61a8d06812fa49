"""The state of a hostname's certificate, as a value; str() gives its text on the wire."""

from __future__ import annotations

import enum
import time
from typing import NamedTuple

from .summary import summary


class Standing(enum.Enum):
    """The state's word, in gotunnel.Certificate and on the dashboard."""

    READY = "ready"
    WAITING = "waiting"
    FAILED = "failed"


READY, WAITING, FAILED = Standing


class NotRenewed(Exception):
    """The operator asks for a new certificate now, and none is ordered. The text says why, and what
    to do. ``until``: when to ask again, in seconds since 1970; None if that does not help."""

    def __init__(self, text: str, until: float | None = None):
        super().__init__(text)
        self.until = until


class State(NamedTuple):
    """READY: visitors are served until ``ends_at``; ``reason`` is why the certificate could not be
    renewed, "" if nothing failed. FAILED: ``reason`` is why there is no certificate. ``next_at`` is
    when the next order is due. Instants are seconds since 1970, None if unknown.
    """

    name: Standing
    reason: str = ""
    next_at: float | None = None
    ends_at: float | None = None

    @property
    def summary(self) -> str:
        """The reason in a few words."""
        return summary(self.reason)

    @property
    def is_ready(self) -> bool:
        return self.name is READY

    def __str__(self) -> str:
        """As in gotunnel.Certificate."""
        if self.name is not FAILED:
            return self.name.value
        text = f"{self.name.value}: {self.reason}"
        if self.next_at is None:
            return text
        at = time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(self.next_at))
        return f"{text} (next attempt {at})"
