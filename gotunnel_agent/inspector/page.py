"""The inspector's page, and the Content Security Policy that it is sent with. No I/O but one read.

The page is one file with its style and its script inside. The policy names both by their hashes
(CSP3 §2.3.1), so a browser runs these two and nothing else: no script that a visit could bring into
the page, and nothing from another address. ``require-trusted-types-for`` makes a browser refuse
innerHTML and its kin, so that text of a visit can only ever become text.
"""

from __future__ import annotations

import base64
import hashlib
import pkgutil
import re
from functools import cache
from pathlib import Path
from typing import NamedTuple

FILE = Path(__file__).with_name("page.html")

_INLINE = re.compile(rb"<(style|script)>(.*?)</\1>", re.DOTALL)


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
    """The Content Security Policy that lets a page use its own inline styles and scripts, its own
    address, and images that it made itself (``blob:``, ``data:``)."""
    hashes: dict[str, list[str]] = {"style": [], "script": []}
    for kind, text in _INLINE.findall(body):
        digest = base64.b64encode(hashlib.sha256(text).digest()).decode()
        hashes[kind.decode()].append(f"'sha256-{digest}'")
    return "; ".join((
        "default-src 'none'",
        f"script-src {' '.join(hashes['script'])}",
        f"style-src {' '.join(hashes['style'])}",
        "img-src blob: data:",
        "connect-src 'self'",
        "form-action 'self'",
        "base-uri 'none'",
        "frame-ancestors 'none'",
        "require-trusted-types-for 'script'",
        "trusted-types 'none'",
    ))  # fmt: skip
