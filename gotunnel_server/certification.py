"""Builds the parts that see to certificates, and joins them to the table of routes."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from pathlib import Path
from typing import NamedTuple, Protocol

from .certs import ordering
from .certs.challenges import Challenges
from .certs.contexts import Certificates
from .certs.keeper import Keeper
from .certs.local_ca import FOLDER, Authority, CertificateError
from .certs.rate_limits import UNLIMITED, Limits
from .config import Config
from .net.client_hello import ALWAYS_TAKEN
from .routes import Registry
from .visitors import http2


class Shared(ordering.Shared, Protocol):
    """What the gateways of a cluster share of certificates: cluster.certificates."""

    def share_local_ca(self) -> None:
        """Have ACME_CACHE hold the CA of all. Raises CertificateError."""

    def close(self) -> object:
        """Close all connections: the gateway does not start."""


class Certification(NamedTuple):
    certificates: Certificates
    keeper: Keeper
    ca_file: Path | None  # the certificate of the CA of our own, None without one


def build_certification(
    config: Config,
    own_names: Sequence[str],
    registry: Registry,
    challenges: Challenges,
    shared: Shared | None = None,
) -> Certification:
    """``shared`` is None for a gateway that is alone. Raises CertificateError."""
    try:
        return _build(config, own_names, registry, challenges, shared)
    except CertificateError:
        if shared is not None:
            shared.close()
        raise


def _build(
    config: Config,
    own_names: Sequence[str],
    registry: Registry,
    challenges: Challenges,
    shared: Shared | None,
) -> Certification:
    def owner(hostname: str) -> tuple[Hashable, Limits]:
        """Of the agent that serves ``hostname``: the key by which its certificate orders are
        counted, and the limits for them."""
        route = registry.lookup(hostname)
        if route is None:
            return None, UNLIMITED
        return route.tunnel.agent.blame, route.tunnel.agent.identity.limits

    def tell(hostname: str) -> None:
        """Tell the agents that serve a hostname how its certificate stands now. Any thread."""
        route = registry.lookup(hostname)
        for tunnel in () if route is None else route.tunnels():
            tunnel.tell_certificate(hostname)

    if config.local_ca and shared is not None:
        shared.share_local_ca()
    authority = Authority(config.acme_cache / FOLDER) if config.local_ca else None
    # The order is ours: a visitor that speaks both gets HTTP/2.
    alpn = (http2.PROTOCOL, *ALWAYS_TAKEN) if config.http2 else ALWAYS_TAKEN
    certificates = Certificates(config.cert_dir, authority, alpn=alpn)
    keeper = Keeper(
        certificates,
        own_names=own_names,
        served=registry.routes,
        owner=owner,
        on_change=tell,
        earlier=authority.hostnames() if authority else (),
        ordering=ordering.set_up(config.acme, config.acme_cache, challenges, shared)
        if config.acme
        else None,
    )
    return Certification(certificates, keeper, authority.ca_file if authority else None)
