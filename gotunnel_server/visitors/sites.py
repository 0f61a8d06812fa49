"""What a request gets: a page, a redirect, or a route to be asked.

A *site* is a function of a port: ``site(request)``, of a request.Request, returns a Page, a Connect
or a Forward. Nothing is read or sent here.
"""

from collections.abc import Callable
from typing import NamedTuple

from gotunnel_agent.common import http1

from ..routes import Route
from . import forwarded, pages
from .forwarded import Proxies
from .pages import Page
from .request import Connect, Request
from .verdict import Answer


class Forward(NamedTuple):
    """The request goes to the target of ``route``; ``add`` and ``strip`` as in verdict.Allow."""

    route: Route
    add: tuple = ()
    strip: tuple = ()


Site = Callable[[Request], "Page | Connect | Forward"]


def choose_site(lookup, gateway_host: str, public_port, proxies: Proxies) -> Site:
    """The site of the public port.

    ``lookup(hostname)`` is the registry's; ``gateway_host`` is our own name; ``public_port()``
    is the port's number; ``proxies`` are believed which visitor they stand for.
    """

    def site(request):
        hostname, sni, is_connect = request.hostname, request.sni, request.method == "CONNECT"
        if is_connect and sni in (None, gateway_host):
            return connect(request)
        if sni is not None and hostname != sni:
            # The certificate that the visitor has seen says nothing about that name.
            text = f"This connection was opened for {sni}, not for {hostname}."
            return pages.error(421, "misdirected", text)
        if is_connect:
            return connect(request)
        if hostname == gateway_host:
            return pages.landing(gateway_host)
        route = lookup(hostname)
        if route is None:
            return pages.no_tunnel(hostname)
        if route.mode != "http":
            text = f"{hostname} does not speak HTTP. Connect to it by TLS, with its name as SNI."
            return pages.error(421, "not-http", text)
        return Forward(route) if route.policy is None else judge(request, route)

    def judge(request, route):
        authorization = ", ".join(request.fields.all("authorization")) or None
        verdict = route.policy.judge_request(visitor(request), authorization)
        return verdict.page if isinstance(verdict, Answer) else Forward(route, *verdict)

    def visitor(request):
        return forwarded.visitor(request.fields, request.peer, proxies)

    def connect(request):
        hostname = request.hostname
        if request.has_body:  # or is it the target's? Readers differ
            text = "A CONNECT with a body came, expected none."
            return pages.error(400, "malformed-request", text)
        route = lookup(hostname)
        if route is None:
            return pages.no_tunnel(hostname)
        if route.mode != "tcp":
            text = f"{hostname} speaks HTTP; there is nothing else to connect to."
            return pages.error(403, "not-tcp", text)
        port = request.authority.rpartition(":")[2]
        ports = (route.target_port, route.port, public_port())
        if port not in {str(number) for number in ports if number is not None}:
            text = f"Port {port[:5]} of {hostname} leads nowhere; its own is another."
            return pages.error(403, "wrong-port", text)
        if route.policy is not None:
            verdict = route.policy.judge_connection(visitor(request))
            if isinstance(verdict, Answer):
                return verdict.page
        return Connect(route)

    return site


def choose_redirect(
    lookup, gateway_host: str, public_port=None, challenges=None, *, proxies: Proxies, secured: Site
) -> Site:
    """The site of visitors without TLS: the way to https.

    One of ``proxies`` may have ended its visitor's TLS: then ``secured`` is the site, since a
    visitor that has come by https would be sent there for ever.

    ``lookup(hostname)`` is the registry's; ``gateway_host`` is our own name. On the port for plain
    HTTP, ``public_port()`` is the number of the one for https, and ``challenges`` what a CA may
    find there; else the port is the one that the visitor has used.
    """

    def site(request):
        hostname, path = request.hostname, request.path
        if request.method == "CONNECT":
            return pages.error(403, "no-tls", "This gateway connects only through TLS.")
        if challenges is not None and challenges.is_asked_for(path):
            return proof(request.method, challenges.body(hostname, path))
        if forwarded.came_by_https(request.fields, request.peer, proxies):
            return secured(request)
        route = lookup(hostname)
        if route is None and hostname != gateway_host:
            return pages.no_tunnel(hostname)
        if route is not None and route.mode != "http":
            return pages.error(421, "not-http", f"{hostname} does not speak HTTP.")
        if public_port is None:
            host = request.authority
        else:
            host = f"{hostname}:{public_port()}"
        host = host.removesuffix(":443")
        # "*" is of OPTIONS: the site as a whole.
        path = http1.percent_encoded(path.removeprefix("*"))
        return pages.moved(f"https://{host}{path}", request.method)

    def proof(method, body):
        if method not in ("GET", "HEAD"):
            text = f"A proof was asked for by {method[:20]}, expected GET."
            page = pages.error(405, "not-get", text)
            return page._replace(fields=(*page.fields, ("Allow", "GET, HEAD")))
        if body is None:  # a target must not answer either: it would get certificates for the name
            return pages.error(404, "no-proof", "No proof for a CA is published here.")
        return Page(200, body, "application/octet-stream")

    return site
