"""Decides what a request gets: one of the gateway's pages, a redirect, or the target's answer.

Each port has a *site*, a function: ``site(request)`` takes a request.Request and returns a Page, a
Connect, a Forward or a Local. Nothing is read or sent here.
"""

from collections.abc import Callable
from typing import NamedTuple, Protocol

from gotunnel_agent.common import http1

from ..routes import Policy, Route
from . import forwarded, pages
from .forwarded import Proxies
from .pages import Page, Pairs
from .request import Connect, Request
from .verdict import Allow, Answer

Lookup = Callable[[str], Route | None]  # the registry's: hostname to Route


class Forward(NamedTuple):
    """The request goes to the target of ``route``. ``add`` and ``strip``: see verdict.Allow."""

    route: Route
    add: Pairs = ()
    strip: tuple[str, ...] = ()


class Local(NamedTuple):
    """A part of the gateway serves the request: ``serve(request)`` reads its body if it wants to,
    and sends the whole answer, by the methods of Request. It is called in an exchange's thread, and
    raises what those methods raise."""

    serve: Callable[[Request], None]


Decision = Page | Connect | Forward | Local
Site = Callable[[Request], Decision]


class Proofs(Protocol):
    """The proofs of HTTP-01 validations (certs/challenges.py)."""

    def is_asked_for(self, path: str, /) -> bool: ...

    def body(self, hostname: str, path: str, /) -> bytes | None: ...


def choose_site(
    lookup: Lookup,
    gateway_host: str,
    public_port: Callable[[], int],
    proxies: Proxies,
    own: Callable[[Request], Page | Local] | None = None,
) -> Site:
    """The site of the public port.

    ``gateway_host`` is the gateway's own name, ``public_port()`` the port's number. ``proxies`` may
    name the visitors that they stand for. ``own(request)`` decides what a request to the gateway's
    own name gets; None: the landing page.
    """

    def site(request: Request) -> Decision:
        hostname, sni, is_connect = request.hostname, request.sni, request.method == "CONNECT"
        if is_connect and sni in (None, gateway_host):
            return connect(request)
        if sni is not None and hostname != sni:
            # The visitor has checked the certificate of another name (RFC 9110 §15.5.20).
            text = f"This connection was opened for {sni}, not for {hostname}. Load the page again."
            return pages.error(421, "misdirected", text)
        if is_connect:
            return connect(request)
        if hostname == gateway_host:
            return pages.landing(gateway_host) if own is None else own(request)
        route = lookup(hostname)
        if route is None:
            return pages.no_tunnel(hostname)
        if route.mode != "http":
            text = f"{hostname} is for other programs than browsers. Connect to it by TLS, by name."
            return pages.error(421, "not-http", text)
        if route.policy is not None:
            return judge(request, route, route.policy)
        if route.is_unwell():
            return pages.unhealthy(hostname)
        return Forward(route)

    def judge(request: Request, route: Route, policy: Policy) -> Page | Forward:
        authorization = ", ".join(request.fields.all("authorization")) or None
        verdict: Allow | Answer = policy.judge_request(visitor(request), authorization)
        if isinstance(verdict, Answer):
            return verdict.page
        if route.is_unwell():
            return pages.unhealthy(request.hostname)
        return Forward(route, *verdict)

    def visitor(request: Request) -> str:
        return forwarded.visitor(request.fields, request.peer, proxies)

    def connect(request: Request) -> Page | Connect:
        hostname = request.hostname
        if request.has_body:  # ambiguous: some implementations send such bytes to the target
            text = "This CONNECT request has a body; expected none."
            return pages.error(400, "malformed-request", text)
        route = lookup(hostname)
        if route is None:
            return pages.no_tunnel(hostname)
        if route.mode != "tcp":
            text = (
                f"{hostname} is a website, and CONNECT is for other services. Open it in a browser."
            )
            return pages.error(403, "not-tcp", text)
        port = request.authority.rpartition(":")[2]
        ports = (route.target_port, route.port, public_port())
        if port not in {str(number) for number in ports if number is not None}:
            text = f"{hostname} cannot be reached at port {port[:5]}. Use the service's own port."
            return pages.error(403, "wrong-port", text)
        if route.policy is not None:
            verdict: Allow | Answer = route.policy.judge_connection(visitor(request))
            if isinstance(verdict, Answer):
                return verdict.page
        if route.is_unwell():
            return pages.unhealthy(hostname)
        return Connect(route)

    return site


def choose_redirect(
    lookup: Lookup,
    gateway_host: str,
    public_port: Callable[[], int] | None = None,
    challenges: Proofs | None = None,
    *,
    proxies: Proxies,
    secured: Site,
) -> Site:
    """The site of visitors without TLS: it redirects them to https.

    If one of ``proxies`` has ended its visitor's TLS, ``secured`` is the site: such a visitor came
    by https, and would be redirected for ever.

    ``gateway_host`` is the gateway's own name. On the port for plain HTTP, ``public_port()`` is the
    number of the port for https, and ``challenges`` has the proofs for a CA. On the public port
    both are None, and the redirect leads to the port that the visitor used.
    """

    def site(request: Request) -> Decision:
        hostname, path = request.hostname, request.path
        if request.method == "CONNECT":
            text = "This gateway accepts CONNECT only through TLS. Use it as an https:// proxy."
            return pages.error(403, "no-tls", text)
        if challenges is not None and challenges.is_asked_for(path):
            return proof(request.method, challenges.body(hostname, path))
        if forwarded.came_by_https(request.fields, request.peer, proxies):
            return secured(request)
        route = lookup(hostname)
        if route is None and hostname != gateway_host:
            return pages.no_tunnel(hostname)
        if route is not None and route.mode != "http":
            text = f"{hostname} is for other programs than browsers."
            return pages.error(421, "not-http", text)
        if public_port is None:
            host = request.authority
        else:
            host = f"{hostname}:{public_port()}"
        host = host.removesuffix(":443")
        # "*" in an OPTIONS request means the site as a whole.
        path = http1.percent_encoded(path.removeprefix("*"))
        return pages.moved(f"https://{host}{path}", request.method)

    def proof(method: str, body: bytes | None) -> Page:
        if method not in ("GET", "HEAD"):
            text = f"The proof for a certificate was requested by {method[:20]}; expected GET."
            page = pages.error(405, "not-get", text)
            return page._replace(fields=(*page.fields, ("Allow", "GET, HEAD")))
        if body is None:  # never ask the target: it could get certificates for the hostname
            return pages.error(404, "no-proof", "No proof for a certificate is published here.")
        return Page(200, body, "application/octet-stream")

    return site
