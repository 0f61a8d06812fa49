"""Builds the dashboard from what the gateway's other parts can tell."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from time import time
from typing import Any, Protocol

from gotunnel_agent.common.passwords import Hash

from ..visitors.counts import Count
from ..visitors.forwarded import Proxies
from ..visitors.pages import Page
from . import api, page
from .calls import May
from .events import Events, Source
from .login import Login
from .site import Dashboard, Views


class Parts(Protocol):
    """What the dashboard asks of the gateway's other parts. They are built later than the
    dashboard, so none is asked before the gateway serves."""

    gateway_host: str
    version: str

    def public_port(self) -> int: ...

    def tunnels(self) -> Collection[Any]: ...

    def certificate_state(self, hostname: str) -> Any: ...

    def count(self, hostname: str) -> Count: ...


def build(parts: Parts, password: Hash | None, token: Hash | None, proxies: Proxies) -> Dashboard:
    """``password``, ``token``: None for none. ``proxies`` may name the visitors that they stand
    for."""

    class Nothing:
        def poll(self) -> Sequence[Any]:
            return ()

    def source(may: May) -> Source:
        return Nothing()

    def full(csrf: str) -> Page:
        return page.render(_document(parts, is_public=False), csrf)

    def public() -> Page:
        return page.render(_document(parts, is_public=True))

    def login_form(problem: str) -> Page:
        return page.login(parts.gateway_host, problem)

    return Dashboard(
        ways=api.ways(),
        views=Views(full, public, login_form),
        login=Login(password, token, proxies),
        events=Events(source),
        gateway_host=parts.gateway_host,
        proxies=proxies,
    )


def _document(parts: Parts, *, is_public: bool) -> dict[str, Any]:
    """The state as the page shows it."""
    tunnels = sorted(parts.tunnels(), key=lambda tunnel: tunnel.since)
    port = parts.public_port()
    hostnames = []
    for tunnel in tunnels:
        for name, route in tunnel.routes.items():
            opens = route.mode == "http" and not name.startswith("*")
            url = f"https://{name}{'' if port == 443 else f':{port}'}/" if opens else ""
            entry = {"hostname": name, "url": url, "mode": route.mode, "protocol": route.protocol}
            if not is_public:
                state, count = parts.certificate_state(name), parts.count(route.hostname)
                entry |= {
                    "port": route.port,
                    "agent": tunnel.identity.name,
                    "since": int(tunnel.since),
                    "visits": count.visits,
                    "failed": count.failed,
                    "received_bytes": count.received,
                    "sent_bytes": count.sent,
                    "certificate": {"state": state.name.value, "error_text": state.reason},
                }
            hostnames.append(entry)
    gateway: dict[str, Any] = {"host": parts.gateway_host}
    if not is_public:
        gateway |= {"version": parts.version, "now": time()}
    return {"gateway": gateway, "hostnames": hostnames, "public": is_public}
