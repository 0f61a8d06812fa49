"""The inspector: shows what passes through the tunnels of an agent, and sends it again.

The rest of this package is imported when an inspector is started: an agent without one pays
nothing for it.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import Protocol

from ..config import Inspect
from ..follow import Follower
from ..target import Route


class CannotInspect(Exception):
    """There is no inspector; the text is one line for the user."""


class State(Protocol):
    """What an inspector wants to know of an agent; agent.Snapshot has it."""

    @property
    def routes(self) -> Mapping[str, Route]: ...

    @property
    def health(self) -> Mapping[str, str]: ...


class Inspected(Protocol):
    """What an inspector looks at: an Agent."""

    follower: Follower | None

    def snapshot(self) -> State: ...


class Started(Protocol):
    """An inspector, see start.Inspector."""

    @property
    def settings(self) -> Inspect: ...
    @property
    def url(self) -> str:
        """For a browser, with the token, which lets its reader see all visits."""

    @property
    def address(self) -> str:
        """The same without the token, for a log."""

    def replace(self, settings: Inspect) -> Started:
        """Another inspector in the place of this one, with its records. Raises CannotInspect; then
        this one goes on, or is closed if its port is lost."""

    @property
    def closed(self) -> bool: ...

    def close(self) -> None:
        """Answer no more, and follow no visit. Any thread."""


def start_inspector(agent: Inspected, settings: Inspect, *, next_port: bool = False) -> Started:
    """Start an inspector; the visits of new streams are kept from now on. ``next_port``: if the
    port is in use, take one of the next. Raises CannotInspect."""
    module = importlib.import_module(".start", __name__)
    inspector: Started = module.Inspector(agent, settings, next_port=next_port)
    return inspector


class Inspection:
    """The inspector of an agent whose configuration may change, or none."""

    def __init__(self, agent: Inspected):
        self._agent = agent
        self._started: Started | None = None

    def change(self, settings: Inspect | None) -> str:
        """Start, replace or end the inspector. Returns its address if it has another one now, else
        "". Raises CannotInspect."""
        started = self._started
        if started is not None and settings == started.settings:
            return ""
        if started is None:
            self._started = None if settings is None else start_inspector(self._agent, settings)
        elif settings is None:
            self.close()
        else:
            try:
                self._started = started.replace(settings)
            except CannotInspect:
                if started.closed:
                    self._started = None
                raise
        return "" if self._started is None else self._started.address

    def close(self) -> None:
        started, self._started = self._started, None
        if started is not None:
            started.close()
