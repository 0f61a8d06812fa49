"""Decides whether there is a dashboard, and tells it what the gateway's other parts know."""

from __future__ import annotations

from collections.abc import Callable, Collection
from hashlib import sha256
from importlib import import_module
from typing import Any, Protocol

from gotunnel import __version__

from .config import Config
from .visitors.counts import Count
from .visitors.forwarded import Proxies
from .visitors.pages import Page
from .visitors.request import Request
from .visitors.sites import Local, Site
from .visitors.visits import Subscriber


class Gateway(Protocol):
    """What the dashboard shows of a gateway.Gateway. Its parts are built after this one."""

    tunnels: Any  # agents.tunnel.Tunnels
    keeper: Any  # certs.keeper.Keeper
    recording: Any  # recording.Recording
    shown_port: int


class Parts:
    """A gateway as dashboard.build.Parts."""

    def __init__(self, gateway: Gateway, gateway_host: str):
        self.gateway_host = gateway_host
        self.version = __version__
        self._gateway = gateway

    def public_port(self) -> int:
        return self._gateway.shown_port

    def tunnels(self) -> Collection[Any]:
        tunnels: Collection[Any] = self._gateway.tunnels.registered()
        return tunnels

    def certificate_state(self, hostname: str) -> Any:
        return self._gateway.keeper.state(hostname)

    def count(self, hostname: str) -> Count:
        count: Count = self._gateway.recording.count(hostname)
        return count


class Showing:
    """The dashboard, or none."""

    def __init__(self, config: Config, gateway: Gateway, proxies: Proxies):
        self.subscribers: tuple[Subscriber, ...] = ()  # that need a record of each visit
        self.at_port: Site | None = None  # the site of DASHBOARD_PORT
        # What the gateway's own name shows on the port for visitors; None: the landing page
        self.at_gateway: Callable[[Request], Page | Local] | None = None
        self._dashboard: Any = None
        self._typed = _typed(config)
        has_login = config.dashboard_password is not None or config.dashboard_token is not None
        if config.dashboard_port is None and not has_login:
            return
        # Loaded here, so that a gateway without a dashboard has no memory for it.
        build = import_module(f"{__package__}.dashboard.build").build
        self._dashboard = build(
            Parts(gateway, config.gateway_host), config.dashboard_password, config.dashboard_token,
            proxies,
        )  # fmt: skip
        self.at_port = self._dashboard.at_port
        if has_login:
            self.at_gateway = self._dashboard.at_gateway

    def change(self, config: Config) -> None:
        """Take over a password or a token that has changed. If there was none at the start, one is
        taken over by the next start: nothing counts visits before. Any thread."""
        if self.at_gateway is None:
            return
        before, self._typed = self._typed, _typed(config)
        login = self._dashboard.login
        if before[0] != self._typed[0]:
            login.change_password(config.dashboard_password)
        if before[1] != self._typed[1]:
            login.change_token(config.dashboard_token)

    def drain(self) -> None:
        """The gateway stops: end the live events."""
        if self._dashboard is not None:
            self._dashboard.events.drain()


def _typed(config: Config) -> tuple[bytes, bytes]:
    """Digests of the password and of the token as they were typed. A plain one gets another hash
    each time that it is read, so hashes cannot be compared."""
    password, token = (
        repr([config.typed.get(name) for name in (setting, f"{setting}_FILE")])
        for setting in ("DASHBOARD_PASSWORD", "DASHBOARD_TOKEN")
    )
    return sha256(password.encode()).digest(), sha256(token.encode()).digest()
