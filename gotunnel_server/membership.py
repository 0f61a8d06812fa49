"""Decides whether the gateway is one of several, and loads what that takes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from typing import Any, Protocol

from .agents.claims import Claims
from .certification import Shared
from .config import Config
from .routes import Registry, Route
from .visitors.port import Draining


class Cluster(Protocol):
    """What the other parts see of a cluster.cluster.Cluster, which says what each method does."""

    id: str  # "" if the gateway is alone
    claims: Claims
    certificates: Shared | None  # None: those of this gateway are its own

    def members(self) -> Mapping[str, Any]: ...

    def on_members(self, callback: Callable[[Mapping[str, Any]], object]) -> None: ...

    def figures(self) -> Any: ...

    def unready(self) -> str | None: ...

    def describe(self) -> dict[str, Any] | None: ...

    def start(self, tunnel_port: int, newcomers: Any, listeners: Any, blocks: Any) -> None: ...

    def drain(self) -> None: ...

    def elsewhere(self) -> Mapping[str, Route]: ...

    @property
    def ports(self) -> Sequence[Draining]: ...

    def stop(self) -> None: ...


class Alone:
    """A gateway that shares nothing: its registry alone grants hostnames."""

    id = ""

    def __init__(self, registry: Registry):
        self.claims: Claims = registry
        self.certificates: Shared | None = None

    def members(self) -> Mapping[str, Any]:
        return {}

    def on_members(self, callback: Callable[[Mapping[str, Any]], object]) -> None:
        """Never called."""

    def figures(self) -> Any:
        return None

    def unready(self) -> str | None:
        return None

    def describe(self) -> dict[str, Any] | None:
        return None

    def start(self, tunnel_port: int, newcomers: Any, listeners: Any, blocks: Any) -> None:
        """There are no members to join."""

    def drain(self) -> None:
        """There are no members to tell."""

    def elsewhere(self) -> Mapping[str, Route]:
        """The routes to other gateways' agents: none."""
        return {}

    ports: Sequence[Draining] = ()  # no visits come by other gateways

    def stop(self) -> None:
        """There are no members to leave."""


def join(config: Config, registry: Registry, child: Any = None) -> Cluster:
    """``child``: one of the processes of PROCESSES; None: this is the only one."""
    if config.cluster is None and child is None:
        return Alone(registry)
    # Loaded here, so that a gateway that is alone has no memory for it.
    module = import_module(f"{__package__}.cluster.cluster")
    cluster: Cluster = module.Cluster(config, registry, child)
    return cluster
