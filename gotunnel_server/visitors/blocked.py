"""Refuses the visitors whose address the operator has blocked (net/blocks.py).

    connects by itself                      its connection is closed at once (Port.add())
    named by a proxy's PROXY header         its connection is closed then (Visitor.introduce())
    named by a proxy's X-Forwarded-For      each of its requests gets a page: others share that
                                            connection

Blocks are of the ports for visitors. Agents, and the dashboard's own port, are not concerned.
"""

from collections.abc import Iterable

from ..net.blocks import Blocks
from . import forwarded, pages
from .forwarded import Proxies
from .port import Port, PublicPort
from .request import Request
from .sites import Decision, Site

TEXT = "The operator of this gateway has blocked your address for a while."


def guard(ports: Iterable[Port], blocks: Blocks, proxies: Proxies) -> None:
    """Have ports for visitors refuse the blocked ones. Call it before the ports are opened."""
    for port in ports:
        port.blocks = blocks
        if proxies:
            port.site = refusing(port.site, blocks, proxies)
            if isinstance(port, PublicPort):
                port.redirect = refusing(port.redirect, blocks, proxies)


def refusing(site: Site, blocks: Blocks, proxies: Proxies) -> Site:
    """``site``, but for requests of blocked visitors that one of ``proxies`` brings."""

    def guarded(request: Request) -> Decision:
        if blocks.table and request.peer in proxies:
            if forwarded.visitor(request.fields, request.peer, proxies) in blocks:
                return pages.error(403, "blocked", TEXT)
        return site(request)

    return guarded
