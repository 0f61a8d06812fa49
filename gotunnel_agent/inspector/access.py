"""Decides which requests to the inspector are answered. Pure.

The inspector shows what passes through the tunnels, and sends requests to their targets. It listens
on a loopback address, but each web page that the user opens runs on this machine, too. Four checks,
of which each must pass:

1. *Host*: a loopback name or address, or the address that the inspector listens on. A page whose
   hostname is made to lead here (DNS rebinding) sends its own hostname.
2. *Origin*, which browsers send with each POST and with each fetch() from elsewhere: the
   inspector's own.
3. *Sec-Fetch-Site*, which browsers also send with ``<img>``, ``<script>`` and links: the
   inspector's own page, or an address that the user has typed. A link from elsewhere may open the
   page itself, which is of no use without the token.
4. The *token*: 256 random bits, as ``Authorization: Bearer``, as ``?token=`` of the page's address,
   or as the cookie that this address is exchanged for.

The second and third check are needed although the cookie is SameSite=Strict: to a browser, all
ports of 127.0.0.1 are one site, so a page of the user's own development server is "same-site". All
ports share their cookies as well. So the cookie's name has the port, and its value is derived from
the token, so that it is good for nothing else.
"""

from __future__ import annotations

import hashlib
import hmac
import re
from typing import NamedTuple

from ..common import addresses, http1

TOKEN_BYTES = 32  # 256 bits
TOKEN = re.compile(r"[A-Za-z0-9_-]{43}")  # 32 bytes in base64url
COOKIE = "gotunnel_inspect_"  # the port follows
SAFE_METHODS = ("GET", "HEAD")
MISDIRECTED, FORBIDDEN, UNAUTHORIZED = 421, 403, 401
HOW_TO_SIGN_IN = "`gotunnel inspect --url` prints the address with its token"


class Refusal(NamedTuple):
    """``code`` is for programs, ``text`` is one line for the user."""

    status: int
    code: str
    text: str


class Door(NamedTuple):
    """What the checks compare with."""

    token: str
    listen: str  # the IP address that the inspector listens on
    port: int

    @property
    def cookie_name(self) -> str:
        return f"{COOKIE}{self.port}"

    @property
    def cookie_value(self) -> str:
        key, text = self.token.encode(), f"cookie of port {self.port}".encode()
        return hmac.new(key, text, hashlib.sha256).hexdigest()

    def is_token(self, text: str) -> bool:
        return hmac.compare_digest(text.encode(), self.token.encode())

    def refuse_place(self, request: http1.Request) -> Refusal | None:
        """Checks 1 to 3: why a request is refused, None if it is not. Raises http1.Malformed."""
        name = http1.hostname(request) or ""
        if not self._is_ours(name):
            return Refusal(
                MISDIRECTED, "host",
                f"Host {name or '(none)'}, expected localhost or an IP address of this machine",
            )  # fmt: skip
        fields = request.fields
        host = fields.get("host") or ""
        origins = fields.all("origin")
        ours = [[f"{scheme}://{host.lower()}"] for scheme in ("http", "https")]  # behind a proxy
        if origins and [origin.lower() for origin in origins] not in ours:
            return Refusal(FORBIDDEN, "origin", "a page from elsewhere asks, expected our own")
        site = (fields.get("sec-fetch-site") or "none").lower()
        if site not in ("none", "same-origin") and not _opens_page(request):
            return Refusal(FORBIDDEN, "origin", "a page from elsewhere asks, expected our own")
        return None

    def refuse_stranger(self, request: http1.Request) -> Refusal | None:
        """Check 4, but for the token in the address."""
        fields = request.fields
        if fields.all("authorization"):
            scheme, _, text = (fields.get("authorization") or "").partition(" ")
            if scheme.lower() == "bearer" and self.is_token(text.strip()):
                return None
            return Refusal(UNAUTHORIZED, "token", f"the token is wrong; {HOW_TO_SIGN_IN}")
        if not self._has_cookie(fields):
            return Refusal(UNAUTHORIZED, "token", f"no token came; {HOW_TO_SIGN_IN}")
        # The cookie comes by itself with whatever the browser sends. Each browser names the origin
        # of a POST.
        if request.method not in SAFE_METHODS and not fields.all("origin"):
            return Refusal(FORBIDDEN, "origin", "no Origin came with a POST, expected our own page")
        return None

    def is_browser(self, request: http1.Request) -> bool:
        """Whether it came with the cookie: browsers open few connections to one address."""
        return not request.fields.all("authorization")

    def _has_cookie(self, fields: http1.Fields) -> bool:
        expected, found = self.cookie_value, False
        for line in fields.all("cookie"):
            for pair in line.split(";"):
                name, _, value = pair.strip().partition("=")
                if name == self.cookie_name:
                    found |= hmac.compare_digest(value.encode(), expected.encode())
        return found

    def _is_ours(self, name: str) -> bool:
        if name == "localhost":
            return True
        address = addresses.parse(name.removeprefix("[").removesuffix("]"))
        if address is None:
            return False
        listen = addresses.parse(self.listen)
        # No web page can have an IP address as its hostname and lead here. But there may be a proxy
        # that we know nothing of, so only our own address is accepted, if there is only one.
        return address.is_loopback or listen is None or listen.is_unspecified or address == listen


def _opens_page(request: http1.Request) -> bool:
    """Whether a link from elsewhere opens the page in a tab of its own."""
    fields = request.fields
    return (
        request.method in SAFE_METHODS
        and (request.path or "").partition("?")[0] == "/"
        and fields.get("sec-fetch-mode") == "navigate"
        and fields.get("sec-fetch-dest") == "document"
    )
