"""What a request gets: a page, a redirect, or a route to be asked.

A ``site`` is a function: ``site(request)`` is a Page, a Connect, or a routes.Route.
"""

from typing import NamedTuple

from gotunnel_agent.common import http1

from . import pages
from .pages import Page


class Connect(NamedTuple):
    """The answer to a CONNECT that is granted: the connection becomes a visit in tcp mode."""

    route: object


def choose_site(lookup, gateway_host, public_port):
    """What a request to the public port gets: the ``site`` of a Handler.

    ``lookup(hostname)`` is the registry's; ``gateway_host`` is our own name; ``public_port()``
    is the port's number.
    """

    def site(handler):
        hostname = handler.hostname
        if handler.command == "CONNECT" and handler.sni in (None, gateway_host):
            return connect(handler)
        if handler.sni is not None and hostname != handler.sni:
            # The certificate that the visitor has seen says nothing about that name.
            text = f"This connection was opened for {handler.sni}, not for {hostname}."
            return pages.error(421, "misdirected", text)
        if handler.command == "CONNECT":
            return connect(handler)
        if hostname == gateway_host:
            return pages.landing(gateway_host)
        route = lookup(hostname)
        if route is None:
            return pages.no_tunnel(hostname)
        if route.mode != "http":
            text = f"{hostname} does not speak HTTP. Connect to it by TLS, with its name as SNI."
            return pages.error(421, "not-http", text)
        if route.policy is not None and (denial := judge(route.policy, handler)) is not None:
            return denial
        return route

    def connect(handler):
        hostname = handler.hostname
        if handler.body is not None:  # or is it the target's? Readers differ
            text = "A CONNECT with a body came, expected none."
            return pages.error(400, "malformed-request", text)
        route = lookup(hostname)
        if route is None:
            return pages.no_tunnel(hostname)
        if route.mode != "tcp":
            text = f"{hostname} speaks HTTP; there is nothing else to connect to."
            return pages.error(403, "not-tcp", text)
        port = handler.path.rpartition(":")[2]
        ports = (route.target_port, route.port, public_port())
        if port not in {str(number) for number in ports if number is not None}:
            text = f"Port {port[:5]} of {hostname} leads nowhere; its own is another."
            return pages.error(403, "wrong-port", text)
        if route.policy is not None:
            denial = route.policy.judge_connection(handler.visitor_address)
            if denial is not None:
                return pages.error(*denial)
        return Connect(route)

    return site


def judge(policy, handler):
    """The page for a visitor that does not comply with a route's policy, None for one that does."""
    authorization = ", ".join(handler.request_head.fields.all("authorization")) or None
    denial = policy.judge_request(handler.visitor_address, authorization)
    return None if denial is None else pages.error(*denial)


def choose_redirect(lookup, gateway_host, public_port=None, challenges=None):
    """What a request without TLS gets: the way to https (the ``site`` of a Handler).

    ``lookup(hostname)`` is the registry's; ``gateway_host`` is our own name. On the port for plain
    HTTP, ``public_port()`` is the number of the one for https, and ``challenges`` what a CA may
    find there; else the port is the one that the visitor has used.
    """

    def site(handler):
        hostname, request = handler.hostname, handler.request_head
        if handler.command == "CONNECT":
            return pages.error(403, "no-tls", "This gateway connects only through TLS.")
        path = http1.origin_target(request)
        if challenges is not None and challenges.is_asked_for(path):
            return proof(request.method, challenges.body(hostname, path))
        route = lookup(hostname)
        if route is None and hostname != gateway_host:
            return pages.no_tunnel(hostname)
        if route is not None and route.mode != "http":
            return pages.error(421, "not-http", f"{hostname} does not speak HTTP.")
        if public_port is None:
            host = request.fields.get("host", hostname)
        else:
            host = f"{hostname}:{public_port()}"
        host = host.removesuffix(":443")
        path = path.removeprefix("*")  # of OPTIONS: the site as a whole
        return pages.moved(f"https://{host}{path}", request.method)

    def proof(method, body):
        if method not in ("GET", "HEAD"):
            text = f"A proof was asked for by {method[:20]}, expected GET."
            page = pages.error(405, "not-get", text)
            return page._replace(fields=(*page.fields, ("Allow", "GET, HEAD")))
        if body is None:  # nor may a target answer: who can prove a hostname gets certificates
            return pages.error(404, "no-proof", "No proof for a CA is published here.")
        return Page(200, body, "application/octet-stream")

    return site
