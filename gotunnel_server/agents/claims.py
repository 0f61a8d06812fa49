"""Claims of hostnames: the interface by which takeover.py claims them, in the table of the one
gateway or in a cluster."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Protocol

from ..routes import Route, Tunnel


class Claims(Protocol):
    """routes.Registry implements it for one gateway, cluster.claims.SharedClaims for several."""

    def claim(
        self,
        routes: Mapping[str, Route],
        permit: Callable[[Mapping[str, Route]], object],
        instead_of: Collection[Tunnel] = (),
    ) -> None:
        """See Registry.claim(). Several gateways also raise Undecided: call again later; and the
        tunnels of a HostnameTaken may be those of other gateways (RemoteHolder)."""

    def give_up(self, tunnel: Tunnel, hostnames: Collection[str]) -> None:
        """``tunnel`` no longer claims these hostnames, which were Undecided or taken."""

    def release(self, tunnel: Tunnel) -> None:
        """Give back all hostnames that ``tunnel`` has claimed, or is about to."""
