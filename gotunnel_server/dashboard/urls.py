"""Says where the dashboard can be opened. The one module of the wing that is always loaded."""

from __future__ import annotations

import ipaddress

from gotunnel_agent.common import addresses

from ..net.dns import is_always_here

MOUNT = "/dashboard/"  # the dashboard's path at https://GATEWAY_HOST


def urls(
    bound: tuple[str, ...], others_bound: tuple[str, ...], gateway_host: str, port: int
) -> str:
    """The URLs of DASHBOARD_PORT, separated by blanks. ``bound``: the IP addresses that the port
    listens on, none for all. ``others_bound``: those of the other ports, where ``gateway_host``
    leads."""
    by_name = f"http://{gateway_host}:{port}/"
    found = map(ipaddress.ip_address, bound)
    if not bound or any(address.is_unspecified for address in found):
        return by_name
    urls = [f"http://{addresses.as_host(address)}:{port}/" for address in bound]
    if bound != others_bound:  # the name may lead to another address
        return " ".join(urls)
    # The name leads here, unless it is the name of a proxy in front of the gateway.
    return by_name if is_always_here(gateway_host) else " ".join((by_name, *urls))
