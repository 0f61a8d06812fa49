"""The dashboard: a page that lists the agents' sessions and the hostnames that they serve.

It answers to the gateway's own name only: a page elsewhere that has a visitor's browser ask for
this port by another name (DNS rebinding) gets nothing. It shows no addresses.
"""

from html import escape
from pathlib import Path
from string import Template
from time import time

from . import pages
from .pages import Page

PAGE = Template(Path(__file__).with_suffix(".html").read_text(encoding="utf-8"))
METHODS = ("GET", "HEAD")

_TABLE = (
    "<table>\n<tr><th>Hostname<th>Mode<th>Agent<th>Connected<th>Failed\n{}\n</table>"
)
_EMPTY = '<p class="empty">No agent is connected. Hostnames appear here as soon as one is.</p>'


def choose_site(tunnels, gateway_host, public_port, version, certificate_state):
    """What a request to the dashboard's port gets: a sites.Site.

    ``tunnels()`` gives the registered tunnels: objects with ``routes``, ``identity``, ``since``,
    ``failed``. ``certificate_state(hostname)`` is a value with ``is_ready``, ``name`` (an enum
    of ready, waiting, failed) and a text.
    """

    def site(request):
        if request.hostname != gateway_host:
            return pages.error(403, "wrong-host", f"The dashboard answers to {gateway_host} only.")
        if request.method not in METHODS:
            page = pages.error(405, "wrong-method", "The dashboard is there to be read.")
            return page._replace(fields=(*page.fields, ("Allow", ", ".join(METHODS))))
        if request.path.partition("?")[0] != "/":
            return pages.error(404, "no-page", "There is no such page.")
        page = render(tunnels(), gateway_host, public_port, version, certificate_state)
        return Page(200, page.encode())

    return site


def render(tunnels, gateway_host, public_port, version, certificate_state) -> str:
    """The page as HTML. Tunnels stand in the order in which they registered."""
    port = "" if public_port == 443 else f":{public_port}"
    rows = [
        _row(hostname, route, tunnel, port, certificate_state(hostname))
        for tunnel in sorted(tunnels, key=lambda tunnel: tunnel.since)
        for hostname, route in sorted(tunnel.routes.items())
    ]
    summary = f"{_count(len(tunnels), 'session')}, {_count(len(rows), 'hostname')}"
    table = _TABLE.format("\n".join(rows)) if rows else _EMPTY
    return PAGE.substitute(
        gateway_host=escape(gateway_host), summary=summary, table=table, version=escape(version)
    )


def _row(hostname, route, tunnel, port, certificate):
    name = escape(hostname)
    if route.mode == "http" and not hostname.startswith("*"):
        name = f'<a href="https://{name}{port}/">{name}</a>'
    if route.port is not None:
        name += f" <small>port {route.port}</small>"
    if not certificate.is_ready:
        kind, text = certificate.name.value, escape(str(certificate))
        name += f'<br><small class="{kind}">certificate {text}</small>'
    agent = escape(tunnel.identity.name) or "–"
    since = _ago(time() - tunnel.since)
    failed = tunnel.failed[route.hostname] or "–"
    return f'<tr><td>{name}<td class="mode">{route.mode}<td>{agent}<td>{since}<td>{failed}'


def _count(number, noun):
    return f"{number} {noun}{'' if number == 1 else 's'}"


def _ago(seconds) -> str:
    """A length of time as people say it, in its largest unit."""
    for size, noun in ((86400, "day"), (3600, "hour"), (60, "minute")):
        if seconds >= size:
            return f"{_count(int(seconds // size), noun)} ago"
    return "just now" if seconds < 5 else f"{int(seconds)} seconds ago"
