"""Finds out who calls the dashboard, and lets browsers log in and out.

    cookie gotunnel_session_GATEWAY_HOST    a browser that has logged in by the form; acts with the
                                            CSRF token
    Authorization: Basic                    DASHBOARD_PASSWORD with any user name: reads
    Authorization: Bearer                   DASHBOARD_TOKEN: reads and acts

Wrong passwords and tokens are counted by address, as those of tunnels are (basic_auth.py), so no
address can lock out another one. They are compared as scrypt hashes; a right one is remembered.
"""

from __future__ import annotations

import base64
import re
import unicodedata
from collections.abc import Callable, Hashable
from time import monotonic

from gotunnel_agent.common import addresses
from gotunnel_agent.common.passwords import Hash

from ..visitors import forwarded
from ..visitors.basic_auth import ANY_USER, Passwords
from ..visitors.forwarded import Proxies
from ..visitors.request import Request
from ..visitors.verdict import Answer, Caller
from .calls import May, Refused, Who
from .sessions import LIFETIME, Session, Sessions

# Followed by the gateway's name: a browser keeps cookies by hostname and not by port, and several
# gateways may be reached at localhost (ssh -L).
COOKIE = "gotunnel_session_"
# A site under a name below the gateway's may set cookies for the gateway's name as well (cookie
# tossing). So there may be several of our name: ours is looked for among more than a browser keeps
# for a site (180), or such a site could log everybody out.
MOST_COOKIES = 200

_BEARER = re.compile(r"bearer +([A-Za-z0-9._~+/-]+=*) *", re.IGNORECASE | re.ASCII)
# What a 401 asks for. A browser shows a window of its own for Basic, even if a script of the page
# has sent the request, so Basic is offered to other programs only.
ASK_TOKEN = ("WWW-Authenticate", 'Bearer realm="gotunnel"')
ASK_PASSWORD = ("WWW-Authenticate", 'Basic realm="gotunnel", charset="UTF-8"')


class Login:
    """The dashboard's password, token and sessions. Any thread."""

    def __init__(
        self,
        password: Hash | None,
        token: Hash | None,
        proxies: Proxies,
        gateway_host: str,
        now: Callable[[], float] = monotonic,
    ):
        """``proxies`` may name the visitors that they stand for."""
        self.cookie = COOKIE + gateway_host  # its name
        self._cookies = re.compile(
            rf"(?:^|;)[ \t]*{re.escape(self.cookie)}=\"?([A-Za-z0-9_-]{{1,100}})\"?[ \t]*(?=;|$)"
        )
        self.sessions = Sessions(now)
        self._now = now
        self._proxies = proxies
        self.passwords, self._tokens = self._checks(password), self._checks(token)

    def _checks(self, secret: Hash | None) -> Passwords | None:
        return None if secret is None else Passwords({ANY_USER: secret}, self._now)

    @property
    def is_on(self) -> bool:
        """Whether anybody may see more than hostnames and modes."""
        return self.passwords is not None or self._tokens is not None

    def change_password(self, password: Hash | None) -> None:
        """Take over another password: all sessions end."""
        self.passwords = self._checks(password)
        self.sessions.end_all()

    def change_token(self, token: Hash | None) -> None:
        """Take over another token: readers of events that came with the old one leave."""
        self._tokens = self._checks(token)

    def address(self, request: Request) -> str:
        """The caller's IP address, "" if a proxy hides it."""
        return forwarded.visitor(request.fields, request.peer, self._proxies)

    def is_secure(self, request: Request) -> bool:
        """Whether the caller's connection has TLS, which a trusted proxy may have ended."""
        return request.scheme == "https" or forwarded.came_by_https(
            request.fields, request.peer, self._proxies
        )

    def who(self, request: Request, anybody: May) -> Who:
        """The caller. ``anybody``: what a caller without a login may do. Raises Refused for a wrong
        login, and if there were too many from its address."""
        address = self.address(request)
        passwords, tokens = self.passwords, self._tokens
        authorization = ", ".join(request.fields.all("authorization"))
        if authorization.partition(" ")[0].lower() == "bearer":
            if tokens is None:
                text = "This gateway takes no token: DASHBOARD_TOKEN is not set there."
                raise Refused(401, "wrong-token", text, (ASK_TOKEN,))
            bearer = _BEARER.fullmatch(authorization)
            if bearer is None:  # no token has such characters
                raise Refused(401, "wrong-token", "The token is wrong. Try again.", (ASK_TOKEN,))
            _check(tokens, address, bearer[1], "wrong-token", "The token is wrong.", ASK_TOKEN)
            return Who(May.ACT, address, "token", is_valid=lambda: self._tokens is tokens)
        if passwords is not None:
            session = self.sessions.find(self._ids(request), _place(address))
            if session is not None:
                return self._of(session, address)
            if authorization:
                _judge(
                    passwords, address, authorization,
                    "password-required", "The password is wrong.", ASK_PASSWORD,
                )  # fmt: skip
                return Who(
                    May.READ, address, "password", is_valid=lambda: self.passwords is passwords
                )
        return Who(anybody, address, is_valid=lambda: self.passwords is passwords)

    def _of(self, session: Session, address: str) -> Who:
        return Who(
            May.READ,
            address,
            "session",
            session.csrf,
            is_valid=lambda: self.sessions.is_valid(session),
            proves=session.proves,
        )

    def log_in(self, request: Request, password: str, mount: str) -> tuple[str, str]:
        """Check the password of the form; the cookie field of a new session. Raises Refused."""
        passwords = self.passwords
        if passwords is None:
            raise Refused(404, "no-page", "There is no login: DASHBOARD_PASSWORD is not set.")
        address = self.address(request)
        password = unicodedata.normalize("NFC", password)  # as it was hashed
        _check(passwords, address, password, "wrong-password", "The password is wrong.")
        self.sessions.end(self._ids(request))
        # Browsers send a cookie to all ports of a host, also to those of tunnels (TCP_PORTS).
        # Without Secure such a site can read it, so it is worth nothing at another address.
        name, _ = self.sessions.begin(None if self.is_secure(request) else _place(address))
        if passwords is not self.passwords:  # changed in the meantime
            self.sessions.end([name])
        return self._cookie(request, name, mount, LIFETIME)

    def log_out(self, request: Request, mount: str) -> tuple[str, str]:
        """End the caller's session; the field that removes its cookie."""
        self.sessions.end(self._ids(request))
        return self._cookie(request, "", mount, 0)

    def _cookie(self, request: Request, name: str, mount: str, age: int) -> tuple[str, str]:
        secure = "; Secure" if self.is_secure(request) else ""
        value = f"{name}; Path={mount}; Max-Age={age}; HttpOnly; SameSite=Strict{secure}"
        return "Set-Cookie", f"{self.cookie}={value}"

    def _ids(self, request: Request) -> list[str]:
        """The ids in the cookies of our name."""
        lines = request.fields.all("cookie")
        return [id for line in lines for id in self._cookies.findall(line)][:MOST_COOKIES]


def _place(address: str) -> Hashable:
    """What a login by plain HTTP is bound to: the address, the /64 of an IPv6 address. By ssh -L a
    browser may come from either loopback address."""
    parsed = addresses.parse(address)
    return (
        "loopback" if parsed is not None and parsed.is_loopback else addresses.counted_by(address)
    )


def _check(
    secrets: Passwords, address: str, secret: str, code: str, text: str, *fields: tuple[str, str]
) -> None:
    basic = base64.b64encode(b":" + secret.encode("utf-8", "replace")).decode()
    _judge(secrets, address, f"Basic {basic}", code, text, *fields)


def _judge(
    secrets: Passwords,
    address: str,
    authorization: str,
    code: str,
    text: str,
    *fields: tuple[str, str],
) -> None:
    """Raise Refused unless the password is right."""
    verdict = secrets.judge(Caller(address, addresses.parse(address), authorization))
    if not isinstance(verdict, Answer):
        return
    page = verdict.page
    if page.status == 401:
        raise Refused(401, code, f"{text} Try again.", fields)
    wait = tuple(field for field in page.fields if field[0] == "Retry-After")
    raise Refused(page.status, page.code, page.message, wait)
