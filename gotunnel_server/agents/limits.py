"""How much the agents of one credential may have at once. Values in, verdict out."""

from typing import NamedTuple

from ..routes import AgentBusy


class Usage(NamedTuple):
    """What one session has now: ``streams``, those included that are kept for the next visit, and
    ``visits``."""

    streams: int
    visits: int


def check(limits, usages, streams: int):
    """Whether there may be another visit, that takes so many ``streams`` more: 1, or 0 for one that
    was kept. ``limits``: an agents_file.Limits. Raises AgentBusy."""
    for name, count, more in (
        ("streams", sum(usage.streams for usage in usages), streams),
        ("visits", sum(usage.visits for usage in usages), 1),
    ):
        most = getattr(limits, name)
        if most is not None and count + more > most:
            raise AgentBusy(f"its agent may have {most} {name} at once, and has {count}")
