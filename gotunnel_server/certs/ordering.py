"""With what certificates are ordered. A gateway that orders none never loads acme.py: what that
imports takes 15 MB."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import NamedTuple

from gotunnel import __version__

from .challenges import Challenges
from .folder import open_store
from .local_ca import CertificateError
from .store import CertStore, StoreError
from .turns import Bounds


class Ordering(NamedTuple):
    """``ca`` is an acme.Ca, ``store`` keeps what comes of orders, ``challenges`` publish proofs,
    ``bounds`` say how much is ordered."""

    ca: object
    store: CertStore
    challenges: Challenges
    bounds: Bounds = Bounds()


def set_up(account, cache: Path, challenges: Challenges) -> Ordering:
    """Order as ``account`` says, a config.Acme: at which CA, and as whom. ``cache`` is ACME_CACHE.
    Raises CertificateError if it cannot be written."""
    try:
        store = open_store(cache, account.directory)
    except StoreError as error:
        raise CertificateError(str(error)) from None
    acme = importlib.import_module(f"{__package__}.acme")
    ca = acme.Ca(
        account.directory, store, ca_file=account.ca_file, email=account.email,
        eab=(account.eab_kid, account.eab_hmac) if account.eab_kid else None,
        user_agent=f"gotunnel/{__version__}",
    )  # fmt: skip
    return Ordering(ca, store, challenges, Bounds.with_domain(account.orders_per_domain))
