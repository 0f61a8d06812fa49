"""Reads state that the gateway has kept (saved) in JSON files, such as the times of past orders.

Any value in such a file may be damaged or missing. No I/O here.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

Kept = Mapping[str, Any]  # what as_dict() of some class made, read back from a file


def number(value: object, most: float = 1e11) -> float:
    """The number that was read from a file; 0 if it is none, is negative, or is not below
    ``most``. The default is beyond any instant in seconds since 1970."""
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        return 0.0
    return float(value) if 0 <= value < most else 0.0
