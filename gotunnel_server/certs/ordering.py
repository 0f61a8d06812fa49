"""Builds what the orders of certificates need: a CA, a store, a publisher of proofs.

Only set_up() imports acme.py, whose libraries take 15 MB: a gateway without orders saves that.
"""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import NamedTuple, Protocol

from gotunnel import __version__

from .challenges import Challenges, Publisher
from .folder import open_store
from .issuer import Orderer
from .local_ca import CertificateError
from .rate_limits import Bounds
from .store import CertStore, StoreError


class Account(Protocol):
    """The CA to order from, and the account there; config.Acme is one and explains its
    attributes."""

    @property
    def directory(self) -> str: ...

    @property
    def ca_file(self) -> str | None: ...

    @property
    def email(self) -> str | None: ...

    @property
    def eab_kid(self) -> str | None: ...

    @property
    def eab_hmac(self) -> str | None: ...

    @property
    def orders_per_domain(self) -> int: ...


class Shared(Protocol):
    """What several gateways share that are one. cluster.certificates has it."""

    def store(self, directory_url: str) -> CertStore:
        """In place of folder.open_store(). Raises StoreError."""

    def publisher(self, challenges: Challenges) -> Publisher:
        """Publishes proofs at all of them."""


class Ordering(NamedTuple):
    """``store`` keeps the certificates, ``challenges`` publishes proofs, ``bounds`` are our rate
    limits."""

    ca: Orderer
    store: CertStore
    challenges: Publisher
    bounds: Bounds = Bounds()


def set_up(
    account: Account, cache: Path, challenges: Challenges, shared: Shared | None = None
) -> Ordering:
    """Order as ``account`` says; ``cache`` is ACME_CACHE. ``shared``: with other gateways. Raises
    CertificateError if the cache cannot be written."""
    publisher: Publisher = challenges
    try:
        if shared is None:
            store = open_store(cache, account.directory)
        else:
            store, publisher = shared.store(account.directory), shared.publisher(challenges)
    except StoreError as error:
        raise CertificateError(str(error)) from None
    acme = importlib.import_module(f"{__package__}.acme")
    ca = acme.Ca(
        account.directory, store, ca_file=account.ca_file, email=account.email,
        eab=(account.eab_kid, account.eab_hmac) if account.eab_kid else None,
        user_agent=f"gotunnel/{__version__}",
    )  # fmt: skip
    return Ordering(ca, store, publisher, Bounds.with_domain(account.orders_per_domain))
