"""The inspector's page, and the Content Security Policy that it is sent with. No I/O but one read.

The page is one file with its style and its script inside; no text of a visit can become a script
of it (common/content_policy.py).
"""

from __future__ import annotations

import pkgutil
from functools import cache
from pathlib import Path
from typing import NamedTuple

from ..common import content_policy

FILE = Path(__file__).with_name("page.html")


class Page(NamedTuple):
    body: bytes
    policy: str  # the value of Content-Security-Policy


@cache
def page() -> Page:
    """The page, read at the first call."""
    # Not by its path: in gotunnel.pyz it is no file. A loader that finds nothing returns None.
    body = pkgutil.get_data(__package__, FILE.name) or b""
    return Page(body, policy(body))


def policy(body: bytes) -> str:
    """The Content Security Policy of a page; its script makes some images itself."""
    return content_policy.for_page(body, "blob: data:")
