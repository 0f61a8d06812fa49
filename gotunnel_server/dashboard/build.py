"""Builds the dashboard from what the gateway's other parts can tell."""

from __future__ import annotations

from collections.abc import Collection, Sequence
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
        html = page.render(
            parts.tunnels(), parts.gateway_host, parts.public_port(), parts.version,
            parts.certificate_state, parts.count,
        )  # fmt: skip
        return page.as_page(html)

    def public() -> Page:
        html = page.render_public(parts.tunnels(), parts.gateway_host, parts.public_port())
        return page.as_page(html)

    return Dashboard(
        ways=api.ways(),
        views=Views(full, public, page.login),
        login=Login(password, token, proxies),
        events=Events(source),
        gateway_host=parts.gateway_host,
        proxies=proxies,
    )
