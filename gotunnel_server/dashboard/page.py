"""Renders the dashboard as HTML: the page, and the form for its password.

Without DASHBOARD_PASSWORD the page shows only what visitors can find out anyway: hostnames and
modes.
"""

from collections.abc import Callable, Collection, Iterable, Mapping
from html import escape
from pathlib import Path
from string import Template
from time import time
from typing import Protocol

from ..routes import Route
from ..visitors.counts import Count
from ..visitors.pages import Page

PAGE = Template(Path(__file__).with_suffix(".html").read_text(encoding="utf-8"))
# No scripts, no resources from elsewhere, and no other page may frame it (clickjacking).
CONTENT_POLICY = (
    "default-src 'none'; style-src 'unsafe-inline'; form-action 'self'; base-uri 'none'; "
    "frame-ancestors 'none'"
)

_TABLE = "<table>\n<tr><th>Hostname<th>Mode{}\n{}\n</table>"
_MORE_COLUMNS = "<th>Agent<th>Connected<th>Visits<th>Failed<th>Bytes"
_COLUMNS = 7  # with Hostname and Mode
_EMPTY = '<p class="empty">No agent is connected. When one is, its hostnames appear here.</p>'
_HINT = "gotunnel · set DASHBOARD_PASSWORD to see more"


class Identity(Protocol):
    """What the page shows of an agent's identity (agents/identity.py)."""

    @property
    def name(self) -> str: ...


class Tunnel(Protocol):
    """What the page shows of a registered tunnel (agents/tunnel.py)."""

    since: float  # wall-clock time at which it registered

    @property
    def routes(self) -> Mapping[str, Route]: ...

    @property
    def identity(self) -> Identity: ...


class Word(Protocol):
    """The word for a certificate's state: ready, waiting or failed."""

    @property
    def value(self) -> str: ...


class Certificate(Protocol):
    """The state of a hostname's certificate; its str() explains it."""

    @property
    def is_ready(self) -> bool: ...

    @property
    def name(self) -> Word: ...


def render(
    tunnels: Collection[Tunnel],
    gateway_host: str,
    public_port: int,
    version: str,
    certificate_state: Callable[[str], Certificate],
    count: Callable[[str], Count],
) -> str:
    """The full page as HTML. Tunnels are in the order in which they registered."""
    rows = [
        _row(
            hostname, route, tunnel, public_port, certificate_state(hostname), count(route.hostname)
        )
        for tunnel in sorted(tunnels, key=lambda tunnel: tunnel.since)
        for hostname, route in sorted(tunnel.routes.items())
    ]
    summary = f"{_count(len(tunnels), 'session')}, {_count(len(rows), 'hostname')}"
    return _page(gateway_host, summary, _MORE_COLUMNS, rows, f"gotunnel {escape(version)}")


def render_public(tunnels: Iterable[Tunnel], gateway_host: str, public_port: int) -> str:
    """The page without a password, as HTML: sorted hostnames, and modes."""
    routes = {hostname: route for tunnel in tunnels for hostname, route in tunnel.routes.items()}
    rows = [
        f'<tr><td>{_link(hostname, route, public_port)}<td class="mode">{_mode(route)}'
        for hostname, route in sorted(routes.items())
    ]
    return _page(gateway_host, _count(len(rows), "hostname"), "", rows, _HINT)


def _page(gateway_host: str, summary: str, more_columns: str, rows: list[str], footer: str) -> str:
    table = _TABLE.format(more_columns, "\n".join(rows)) if rows else _EMPTY
    return PAGE.substitute(
        gateway_host=escape(gateway_host), summary=summary, table=table, footer=footer
    )


def _mode(route: Route) -> str:
    return f"{route.mode}, {route.protocol}" if route.protocol else route.mode


def _link(hostname: str, route: Route, public_port: int) -> str:
    name = escape(hostname)
    if route.mode != "http" or hostname.startswith("*"):  # a browser cannot open it
        return name
    port = "" if public_port == 443 else f":{public_port}"
    return f'<a href="https://{name}{port}/">{name}</a>'


def _row(
    hostname: str,
    route: Route,
    tunnel: Tunnel,
    public_port: int,
    certificate: Certificate,
    count: Count,
) -> str:
    name = _link(hostname, route, public_port)
    if route.port is not None:
        name += f" <small>port {route.port}</small>"
    agent = escape(tunnel.identity.name) or "–"
    since = _ago(time() - tunnel.since)
    row = f'<tr><td>{name}<td class="mode">{_mode(route)}<td>{agent}<td>{since}'
    row += f"<td>{count.visits or '–'}<td>{count.failed or '–'}"
    row += f"<td>{_size(count.received + count.sent)}"
    if not certificate.is_ready:  # a row of its own: a CA's error can be long
        kind, text = certificate.name.value, escape(str(certificate))
        note = f'<small class="{kind}">certificate {text}</small>'
        row += f'\n<tr class="note"><td colspan="{_COLUMNS}">{note}'
    return row


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"


def _size(count: int) -> str:
    """Bytes as people say them."""
    if not count:
        return "–"
    size, unit = float(count), "B"
    for larger in ("kB", "MB", "GB", "TB"):
        if size < 1000:
            break
        size, unit = size / 1000, larger
    return f"{size:.3g} {unit}" if size < 1000 else f"{size:.0f} {unit}"


def _ago(seconds: float) -> str:
    """A past time as people say it, in the largest unit."""
    for size, noun in ((86400, "day"), (3600, "hour"), (60, "minute")):
        if seconds >= size:
            return f"{_count(int(seconds // size), noun)} ago"
    return "just now" if seconds < 5 else f"{int(seconds)} seconds ago"


def as_page(html: str) -> Page:
    return Page(200, html.encode(), fields=(("Content-Security-Policy", CONTENT_POLICY),))


def login(problem: str) -> Page:
    """The form for the password; ``problem``: what was wrong about the last try, "" at first."""
    form = (
        f'<p>{escape(problem)}</p><form method="post" action="login"><label>Password '
        '<input type="password" name="password" autocomplete="current-password" required autofocus>'
        "</label> <button>Log in</button></form>"
    )
    return as_page(PAGE.substitute(gateway_host="", summary="", table=form, footer="gotunnel"))
