"""Decides whether there is a dashboard, and joins it to the gateway's other parts."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from hashlib import sha256
from importlib import import_module
from time import monotonic, time
from typing import Any, Protocol

from gotunnel import __version__
from gotunnel_agent.common.addresses import Network

from .certs.state import NotRenewed
from .config import Config
from .net.blocks import Blocks
from .routes import Route
from .visitors import blocked
from .visitors.counts import Count
from .visitors.forwarded import Proxies
from .visitors.pages import Page
from .visitors.port import Port
from .visitors.request import Request
from .visitors.sites import Local, Site
from .visitors.visits import Subscriber

SERVING, DRAINING = "serving", "draining"


class Gateway(Protocol):
    """What the dashboard shows of a gateway.Gateway. Its parts are built after this one."""

    own_names: tuple[str, ...]
    tunnels: Any  # agents.tunnel.Tunnels
    keeper: Any  # certs.keeper.Keeper
    cluster: Any  # membership.Cluster
    recording: Any  # recording.Recording
    shown_port: int


class Parts:
    """A gateway as dashboard.build.Parts."""

    def __init__(self, gateway: Gateway, config: Config, blocks: Blocks, together: Any = None):
        """``together``: see Showing."""
        self.blocks = blocks
        self._together = together
        self.state = SERVING
        self.ports: tuple[Port, ...] = ()  # for visitors
        self.gateway_host, self.version = config.gateway_host, __version__
        self.started_at, self._began = time(), monotonic()
        self._gateway = gateway
        self._protected = tuple(config.trusted_proxies)

    @property
    def own_names(self) -> Sequence[str]:
        return self._gateway.own_names

    def public_port(self) -> int:
        return self._gateway.shown_port

    def uptime(self) -> float:
        return monotonic() - self._began

    def tunnels(self) -> Collection[Any]:
        tunnels: Collection[Any] = self._gateway.tunnels.shown()
        return tunnels

    def certificate_state(self, hostname: str) -> Any:
        return self._gateway.keeper.state(hostname)

    def counts(self) -> Mapping[str, Count] | None:
        """Of all visits that have ended."""
        recording = self._gateway.recording
        recording.settle()
        counts: Mapping[str, Count] | None = recording.counts and recording.counts.all()
        return counts

    def cluster(self) -> dict[str, Any] | None:
        described: dict[str, Any] | None = self._gateway.cluster.describe()
        return described

    def elsewhere(self) -> Mapping[str, Route]:
        found: Mapping[str, Route] = self._gateway.cluster.elsewhere()
        return found

    def session(self, id: str) -> Any:
        found = self._gateway.tunnels.by_id(id)
        if found is None and self._together is not None:
            return self._together.session(id)
        return found

    def renew(self, hostname: str) -> NotRenewed | None:
        hindrance = self._renew_here(hostname)
        if hindrance is not None and hindrance.until is None and self._together is not None:
            return None if self._together.renew(hostname) else hindrance
        return hindrance

    def _renew_here(self, hostname: str) -> NotRenewed | None:
        try:
            self._gateway.keeper.renew(hostname)
        except NotRenewed as error:
            return error
        return None

    def cut(self, is_cut: Callable[[str], bool]) -> int:
        return sum(port.cut(is_cut) for port in self.ports)

    def share(self, full: Callable[[], Any], public: Callable[[], Any]) -> None:
        if self._together is not None:
            self._together.share_document(full)
            self._together.share_public(public)
            self._together.share_acts(lambda id: self._gateway.tunnels.by_id(id), self._renew_here)

    def of_all(self, document: Any) -> Any:
        return document if self._together is None else self._together.document(document)

    def protected(self) -> Iterable[Network]:
        return self._protected

    def now(self) -> float:
        return time()


class Showing:
    """The dashboard, or none."""

    def __init__(self, config: Config, gateway: Gateway, proxies: Proxies, together: Any = None):
        """``together``: a processes.together.Together, if other processes of the same gateway are
        to be shown, too; None: there is none."""
        self.together = together
        self.subscribers: tuple[Subscriber, ...] = ()  # that need a record of each visit
        self.at_port: Site | None = None  # the site of DASHBOARD_PORT
        # What the gateway's own name shows on the port for visitors; None: the landing page
        self.at_gateway: Callable[[Request], Page | Local] | None = None
        self._dashboard: Any = None
        self._parts: Parts | None = None  # if the dashboard can act
        self._proxies = proxies
        self._typed = _typed(config)
        if config.dashboard_port is None and not config.has_login:
            return
        # Loaded here, so that a gateway without a dashboard has no memory for it.
        build = import_module(f"{__package__}.dashboard.build")
        blocks = Blocks(config.acme_cache if config.has_login else None)
        live = build.Live() if together is None else together.live()
        parts = Parts(gateway, config, blocks, together)
        self._dashboard = build.build(
            parts, live, config.dashboard_password, config.dashboard_token, proxies
        )
        if together is not None:
            together.share_logins(self._dashboard.login.sessions)
        self.at_port = self._dashboard.at_port
        if config.has_login:
            self.at_gateway = self._dashboard.at_gateway
            self.subscribers = (live,)
            self._parts = parts

    @property
    def blocks(self) -> Blocks | None:
        """None if no address can be blocked here."""
        return None if self._parts is None else self._parts.blocks

    def guard(self, ports: Sequence[Port]) -> None:
        """Have these ports for visitors refuse the blocked ones. Before they are opened."""
        if self._parts is not None:
            parts = self._parts
            parts.ports = tuple(ports)
            parts.blocks.on_heard = lambda: parts.cut(parts.blocks.__contains__)
            blocked.guard(ports, self._parts.blocks, self._proxies)

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
        if self._parts is not None:
            self._parts.state = DRAINING
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
