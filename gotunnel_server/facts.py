"""The lines that the gateway logs when it starts: what is open, and where."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

from gotunnel_agent.common import addresses

from .config import Config
from .dashboard.urls import MOUNT, urls


class Ports(Protocol):
    """The ports of a gateway.Gateway; None: not open."""

    shown_port: int
    tunnel_port: int
    dashboard_port: int | None
    http_port: int | None
    metrics_port: int | None


def facts(config: Config, ports: Ports, ca_file: Path | None) -> Iterator[str]:
    """``ca_file``: the certificate of the gateway's own CA (ACME_ENV=local), None without one."""
    if config.acme:
        yield f"certificates from {config.acme.directory}"
    if ca_file:
        path = ca_file.resolve()
        yield f"certificates from a local CA, for trials; clients must trust {path}"
    yield f"visitors: https://{config.gateway_host}:{ports.shown_port}/"
    yield f"agents: tunnel_addr {config.tunnel_host}:{ports.tunnel_port}"
    if ports.dashboard_port is not None:
        where = config.dashboard_bind, config.bind, config.gateway_host, ports.dashboard_port
        yield f"dashboard: {urls(*where)}"
    if config.dashboard_password is not None or config.dashboard_token is not None:
        yield f"dashboard: https://{config.gateway_host}:{ports.shown_port}{MOUNT}"
    if ports.http_port is not None:
        yield f"plain HTTP: port {ports.http_port}"
    if ports.metrics_port is not None:
        for address in config.metrics_bind:
            host = addresses.as_host(address)
            yield f"metrics: http://{host}:{ports.metrics_port}/metrics"
