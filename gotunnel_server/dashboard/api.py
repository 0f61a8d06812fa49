"""The dashboard's JSON API: what each path answers."""

from __future__ import annotations

from .calls import Way


def ways() -> tuple[Way, ...]:
    """The paths under api/v1/, but for api/v1/events (events.py)."""
    return ()
