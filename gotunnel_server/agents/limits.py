"""Compares the streams and visits of one credential's agents with its limits. Values in, verdict
out."""

from collections.abc import Sequence
from typing import NamedTuple

from ..routes import AgentBusy
from .agents_file import Limits


class Usage(NamedTuple):
    """What one session has now. ``streams`` are more than ``visits``: some are kept for the next
    visit."""

    streams: int
    visits: int


def check(limits: Limits, usages: Sequence[Usage], streams: int) -> None:
    """Raises AgentBusy if there may not be another visit that takes so many ``streams`` more: 1, or
    0 for a stream that was kept. ``usages``: what each session of the credential has."""
    for name, count, more in (
        ("streams", sum(usage.streams for usage in usages), streams),
        ("visits", sum(usage.visits for usage in usages), 1),
    ):
        most = getattr(limits, name)
        if most is not None and count + more > most:
            raise AgentBusy(f"its agent may have {most} {name} at once, and has {count}")
