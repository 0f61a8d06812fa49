"""Whose turn it is: how many orders one credential, one registered domain, and all may cause."""

from __future__ import annotations

from typing import NamedTuple, Protocol


class Limits(Protocol):
    """What bounds a credential's orders; None: as any. agents_file.Limits is one."""

    hostnames: int | None  # that it may have at once
    orders_per_hour: int | None
    orders_per_week: int | None


class _Unlimited(NamedTuple):
    hostnames: int | None = None
    orders_per_hour: int | None = None
    orders_per_week: int | None = None


UNLIMITED: Limits = _Unlimited()
