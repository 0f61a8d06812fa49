"""The dashboard: a page that lists the hostnames that agents serve.

Without a password it shows what visitors can learn anyway, hostnames and modes. With one, only
visitors that know it get the page, and it also shows agents, ports, failures and what a CA said.
The user name does not matter. It never shows addresses.

It answers to the gateway's own name, to localhost and to IP addresses. A page elsewhere that has a
browser ask for this port by a name of its own (DNS rebinding) gets nothing, because the browser
then sends that name as its Host.
"""

import ipaddress
from html import escape
from pathlib import Path
from string import Template
from time import monotonic, time

from gotunnel_agent.common import addresses
from gotunnel_agent.common.passwords import Hash

from ..net.dns import is_always_here
from . import forwarded, pages
from .basic_auth import ANY_USER, Passwords
from .forwarded import Proxies
from .pages import Page
from .verdict import Answer, Caller

PAGE = Template(Path(__file__).with_suffix(".html").read_text(encoding="utf-8"))
METHODS = ("GET", "HEAD")
# It runs no scripts, and no other page frames it.
CONTENT_POLICY = "default-src 'none'; style-src 'unsafe-inline'; frame-ancestors 'none'"

_TABLE = "<table>\n<tr><th>Hostname<th>Mode{}\n{}\n</table>"
_MORE_COLUMNS = "<th>Agent<th>Connected<th>Failed"
_EMPTY = '<p class="empty">No agent is connected. Hostnames appear here as soon as one is.</p>'
_HINT = "gotunnel · set DASHBOARD_PASSWORD to see more"


def urls(bound: tuple, others_bound: tuple, gateway_host: str, port: int) -> str:
    """Where the page can be opened. ``bound``: the IP addresses that its port listens on, none for
    all; ``others_bound``: those of the other ports, where ``gateway_host`` leads."""
    by_name = f"http://{gateway_host}:{port}/"
    found = map(ipaddress.ip_address, bound)
    if not bound or any(address.is_unspecified for address in found):
        return by_name
    urls = [f"http://{addresses.as_host(address)}:{port}/" for address in bound]
    if bound != others_bound:  # the name may lead elsewhere
        return " ".join(urls)
    # The name leads there, unless a proxy in front is what it names.
    return by_name if is_always_here(gateway_host) else " ".join((by_name, *urls))


def build_site(
    tunnels, gateway_host, public_port, version, certificate_state, proxies: Proxies,
    password: Hash | None,
):  # fmt: skip
    """What a request to the dashboard's port gets: a sites.Site.

    ``tunnels()`` gives the registered tunnels: objects with ``routes``, ``identity``, ``since``,
    ``failed``. ``certificate_state(hostname)`` is a value with ``is_ready``, ``name`` (an enum
    of ready, waiting, failed) and a text. ``proxies`` are believed which visitor they stand for:
    wrong passwords are counted by the visitor's address. ``password``: None if there is none.
    """
    passwords = password and Passwords({ANY_USER: password}, monotonic)

    def site(request):
        if not _may_be_host(request.hostname):
            text = f"The dashboard answers to {gateway_host}, localhost and IP addresses only."
            return pages.error(403, "wrong-host", text)
        if passwords is not None:
            verdict = passwords.judge(_caller(request, proxies))
            if isinstance(verdict, Answer):
                return verdict.page
        if request.method not in METHODS:
            page = pages.error(405, "wrong-method", "The dashboard is there to be read.")
            return page._replace(fields=(*page.fields, ("Allow", ", ".join(METHODS))))
        if request.path.partition("?")[0] != "/":
            return pages.error(404, "no-page", "There is no such page.")
        if passwords is None:
            page = render_public(tunnels(), gateway_host, public_port)
        else:
            page = render(tunnels(), gateway_host, public_port, version, certificate_state)
        return Page(200, page.encode(), fields=(("Content-Security-Policy", CONTENT_POLICY),))

    def _may_be_host(name):
        # No page elsewhere can have these as its own name.
        is_address = addresses.parse(name.removeprefix("[").removesuffix("]")) is not None
        return name in (gateway_host, "localhost") or is_address

    return site


def _caller(request, proxies):
    address = forwarded.visitor(request.fields, request.peer, proxies)
    authorization = ", ".join(request.fields.all("authorization")) or None
    return Caller(address, addresses.parse(address), authorization)


def render(tunnels, gateway_host, public_port, version, certificate_state) -> str:
    """The page as HTML, with all of it. Tunnels stand in the order in which they registered."""
    rows = [
        _row(hostname, route, tunnel, public_port, certificate_state(hostname))
        for tunnel in sorted(tunnels, key=lambda tunnel: tunnel.since)
        for hostname, route in sorted(tunnel.routes.items())
    ]
    summary = f"{_count(len(tunnels), 'session')}, {_count(len(rows), 'hostname')}"
    return _page(gateway_host, summary, _MORE_COLUMNS, rows, f"gotunnel {escape(version)}")


def render_public(tunnels, gateway_host, public_port) -> str:
    """The page for everybody, as HTML: hostnames, sorted, and modes."""
    routes = {hostname: route for tunnel in tunnels for hostname, route in tunnel.routes.items()}
    rows = [
        f'<tr><td>{_link(hostname, route, public_port)}<td class="mode">{route.mode}'
        for hostname, route in sorted(routes.items())
    ]
    return _page(gateway_host, _count(len(rows), "hostname"), "", rows, _HINT)


def _page(gateway_host, summary, more_columns, rows, footer):
    table = _TABLE.format(more_columns, "\n".join(rows)) if rows else _EMPTY
    return PAGE.substitute(
        gateway_host=escape(gateway_host), summary=summary, table=table, footer=footer
    )


def _link(hostname, route, public_port):
    name = escape(hostname)
    if route.mode != "http" or hostname.startswith("*"):  # a browser cannot open it
        return name
    port = "" if public_port == 443 else f":{public_port}"
    return f'<a href="https://{name}{port}/">{name}</a>'


def _row(hostname, route, tunnel, public_port, certificate):
    name = _link(hostname, route, public_port)
    if route.port is not None:
        name += f" <small>port {route.port}</small>"
    agent = escape(tunnel.identity.name) or "–"
    since = _ago(time() - tunnel.since)
    failed = tunnel.failed[route.hostname] or "–"
    row = f'<tr><td>{name}<td class="mode">{route.mode}<td>{agent}<td>{since}<td>{failed}'
    if not certificate.is_ready:  # a CA may have much to say: it gets the whole width
        kind, text = certificate.name.value, escape(str(certificate))
        note = f'<small class="{kind}">certificate {text}</small>'
        row += f'\n<tr class="note"><td colspan="5">{note}'
    return row


def _count(number, noun):
    return f"{number} {noun}{'' if number == 1 else 's'}"


def _ago(seconds) -> str:
    """A length of time as people say it, in its largest unit."""
    for size, noun in ((86400, "day"), (3600, "hour"), (60, "minute")):
        if seconds >= size:
            return f"{_count(int(seconds // size), noun)} ago"
    return "just now" if seconds < 5 else f"{int(seconds)} seconds ago"
