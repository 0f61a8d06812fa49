"""Builds the dashboard from what the gateway's other parts can tell, and do."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Protocol

from gotunnel_agent.common.passwords import Hash

from ..routes import Route
from ..visitors.forwarded import Proxies
from ..visitors.pages import Page
from . import acts, api, page, state
from .calls import May
from .events import Events, Source
from .live import Live, Overview
from .login import Login
from .site import Dashboard, Views
from .state import Certificate, Count, Document, Facts, Tunnel


class Parts(acts.Hall, Protocol):
    """What the dashboard asks of the gateway's other parts. They are built later than the
    dashboard, so none is asked before the gateway serves."""

    gateway_host: str
    version: str
    state: str  # see Facts
    started_at: float  # seconds since 1970

    @property
    def own_names(self) -> Sequence[str]: ...

    def public_port(self) -> int: ...

    def uptime(self) -> float: ...

    def tunnels(self) -> Collection[Tunnel]: ...

    def certificate_state(self, hostname: str) -> Certificate: ...

    def counts(self) -> Mapping[str, Count] | None: ...

    def cluster(self) -> Document | None: ...

    def elsewhere(self) -> Mapping[str, Route]: ...

    def share(self, full: Callable[[], Document], public: Callable[[], Document]) -> None:
        """Other processes of the same gateway may ask for these documents."""

    def of_all(self, document: Document) -> Document:
        """The document of all processes, made of this one's."""


def describe(parts: Parts, live: Live) -> Callable[[], Document]:
    def described() -> Document:
        return state.full(
            _facts(parts), parts.tunnels(), parts.own_names, parts.certificate_state,
            parts.counts(), live.rates(), parts.blocks.all(),
        )  # fmt: skip

    return described


def _facts(parts: Parts) -> Facts:
    return Facts(
        parts.gateway_host, parts.public_port(), parts.version, parts.state, parts.started_at,
        parts.uptime(), parts.now(), parts.cluster(), parts.elsewhere(),
    )  # fmt: skip


class Rendered:
    """The page of a document, rendered once for all that ask while the document is the same one:
    anybody may ask, and a page with 1000 hostnames takes 6 ms of CPU. Any thread."""

    def __init__(self, document: Callable[[], Document]):
        self._document = document
        self._last: tuple[Document, Page] | None = None

    def __call__(self) -> Page:
        document, last = self._document(), self._last
        if last is None or last[0] is not document:
            last = self._last = document, page.render(document)
        return last[1]


def build(
    parts: Parts, live: Live, password: Hash | None, token: Hash | None, proxies: Proxies
) -> Dashboard:
    """``password``, ``token``: None for none. ``proxies`` may name the visitors that they stand
    for."""
    own = describe(parts, live)

    def own_public() -> Document:
        return state.public(_facts(parts), parts.tunnels())

    parts.share(own, own_public)
    full = Overview(lambda: parts.of_all(own()), live)
    public = Overview(lambda: parts.of_all(own_public()))

    def overview(may: May) -> Overview:
        return full if may >= May.READ else public

    def source(may: May) -> Source:
        return overview(may).feed()

    def full_page(csrf: str) -> Page:
        return page.render(full.document(), csrf)

    public_page = Rendered(public.document)

    def login_form(problem: str) -> Page:
        return page.login(parts.gateway_host, problem)

    return Dashboard(
        ways=api.ways(parts, live, full, public),
        views=Views(full_page, public_page, login_form),
        login=Login(password, token, proxies, parts.gateway_host),
        events=Events(source),
        gateway_host=parts.gateway_host,
        proxies=proxies,
    )
