"""Writes the Content Security Policy of a page that has its style and its script inside.

The policy names both by their hashes (CSP level 3, "hash-source"), so a browser runs these and
nothing else: no script that a peer's text could bring into the page, and nothing from elsewhere.
"""

from __future__ import annotations

import base64
import hashlib
import re

_INLINE = re.compile(rb"<(style|script)>(.*?)</\1>", re.DOTALL)


def hashes(kind: str, html: bytes) -> str:
    """The sources of the elements ``style`` or ``script``. Data blocks, which have a type, are not
    run and need none."""
    digests = (
        hashlib.sha256(text).digest() for tag, text in _INLINE.findall(html) if tag == kind.encode()
    )
    return " ".join(f"'sha256-{base64.b64encode(digest).decode()}'" for digest in digests)


def for_page(html: bytes, images: str) -> str:
    """The policy of a page that talks to its own address alone, shows ``images``, and is framed by
    no other page (clickjacking). ``require-trusted-types-for`` has a browser refuse innerHTML and
    its kin, so that text can only ever become text."""
    return "; ".join((
        "default-src 'none'",
        f"script-src {hashes('script', html)}",
        f"style-src {hashes('style', html)}",
        f"img-src {images}",
        "connect-src 'self'",
        "form-action 'self'",
        "base-uri 'none'",
        "frame-ancestors 'none'",
        "require-trusted-types-for 'script'",
        "trusted-types 'none'",
    ))  # fmt: skip
