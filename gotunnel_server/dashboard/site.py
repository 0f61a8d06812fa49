"""Decides what a request to the dashboard gets, and sends it.

The dashboard is mounted at two places: at / of DASHBOARD_PORT, and at /dashboard/ of
https://GATEWAY_HOST if it has a password or a token. Paths here are relative to the mount.

    (nothing)          the page, for browsers             api/v1/...       JSON, for programs
    login, logout      the form for the password          api/v1/events    live (events.py)

What a web page elsewhere may make a visitor's browser send is refused:

    the Host       must be the gateway's name, localhost or an IP address. No page elsewhere can
                   have one of these as its own name, whatever its DNS says (DNS rebinding)
    the Origin     of a request that changes something must be this very site; the sites behind the
                   gateway may be under a name below its own, where SameSite cookies are no help
    the CSRF token of the session must come with it: in the field X-CSRF-Token, or in the form
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping, Sequence
from email.utils import formatdate
from http import HTTPStatus
from typing import NamedTuple
from urllib.parse import parse_qsl, unquote

from gotunnel import Deadline
from gotunnel_agent.common import addresses, content_policy
from gotunnel_agent.common.http1 import Malformed

from ..visitors import pages
from ..visitors.forwarded import Proxies
from ..visitors.pages import HTML, JSON, Page
from ..visitors.request import Request
from ..visitors.sites import Local, Site
from .calls import Call, May, Refused, Way, Who, error_page, see_other
from .events import Events
from .login import ASK_PASSWORD, ASK_TOKEN, Login
from .urls import MOUNT

log = logging.getLogger("gotunnel.site")

API = "api/"
MOST_BODY = 64 * 1024  # bytes: acts and the login are small
# Seconds for a whole body. It holds one of the few workers of DASHBOARD_PORT meanwhile.
BODY_TIMEOUT = 10
HURRIED = 1  # ... while half of them are taken
MOST_FIELDS = 100  # in a query or a form
MOST_PATH = 2048  # characters; the longest path names a network in a block
# Makes a browser ask once more, as this page now, so that it sends the cookie.
AGAIN = (
    b'<!doctype html><html lang="en"><meta charset="utf-8"><title>gotunnel</title>'
    b'<meta http-equiv="refresh" content="0; url=./"><p><a href="./">Open the dashboard</a></p>\n'
)
READING = ("GET", "HEAD")
FORM = "application/x-www-form-urlencoded"

POLICY = "default-src 'none'; form-action 'none'; base-uri 'none'; frame-ancestors 'none'"
# Of an error as a page, in which the built-in template's own style is the only one that is used
_STYLE_HASH = content_policy.hashes("style", pages.BUILT_IN.text.encode())
ERROR_POLICY = f"{POLICY}; style-src {_STYLE_HASH}; img-src data:"

# Of all answers, unless they bring their own. No other page may frame them (clickjacking). With
# no-referrer, browsers would send "Origin: null" with a form.
FIELDS = {
    "Cache-Control": "no-store",
    "Content-Security-Policy": POLICY,
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "same-origin",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Server": "gotunnel",
}


class Asked(NamedTuple):
    """A request whose path is one of ours. ``parts``: see Call."""

    request: Request
    mount: str
    path: str  # relative to the mount
    query: str
    parts: tuple[str, ...]


class Views(NamedTuple):
    """The pages for browsers. ``full(csrf)``: for a caller that may read; "" if it has no session,
    and thus cannot act. ``public()``: without a login. ``login(problem)``: the form, with what was
    wrong about the last try."""

    full: Callable[[str], Page]
    public: Callable[[], Page]
    login: Callable[[str], Page]


_Answer = Callable[[Asked, Who], Page | None]  # None: the answer is sent already


class _Entry(NamedTuple):
    needs: May
    answer: _Answer


class Dashboard:
    """The dashboard. Any thread."""

    def __init__(
        self,
        *,
        ways: Sequence[Way],
        views: Views,
        login: Login,
        events: Events,
        gateway_host: str,
        proxies: Proxies,
    ):
        """``ways``: the API's. ``proxies`` may name the visitors that they stand for."""
        self.login = login
        self.events = events
        self._views = views
        self._gateway_host = gateway_host
        self._proxies = proxies
        self._table: dict[tuple[str, ...], dict[str, _Entry]] = {}
        self._add("GET", "", May.NOTHING, self._page)
        self._add("GET", "login", May.NOTHING, self._login_page)
        self._add("POST", "login", May.NOTHING, self._log_in)
        self._add("POST", "logout", May.NOTHING, self._log_out)
        self._add("GET", "api/v1/events", May.LOOK, self._read_events)
        for way in ways:
            self._add(way.method, way.path, way.needs, _answered_by(way))
        # At the two mounts
        self.at_port: Site = self._site("/", anybody=May.LOOK)
        self._at_gateway = self._site(MOUNT, anybody=May.NOTHING)

    def _add(self, method: str, path: str, needs: May, answer: _Answer) -> None:
        self._table.setdefault(tuple(path.split("/")), {})[method] = _Entry(needs, answer)

    def _site(self, mount: str, anybody: May) -> Callable[[Request], Local]:
        """``anybody``: what callers may do as long as there is no password."""
        local = Local(lambda request: self._serve(request, mount, anybody))
        return lambda request: local

    def at_gateway(self, request: Request) -> Page | Local:
        """What a request to the gateway's own name gets on the port for visitors."""
        path = request.path.partition("?")[0]
        if self.login.is_on:
            if path.startswith(MOUNT):
                return self._at_gateway(request)
            if path == MOUNT.rstrip("/"):
                _not_to_be_shown(request)
                return pages.moved(MOUNT, request.method)
        return pages.landing(self._gateway_host)

    # One request

    def _serve(self, request: Request, mount: str, anybody: May) -> None:
        _not_to_be_shown(request)
        is_api = request.path.startswith(mount + API) and not _is_of_a_page(request)
        try:
            page = self._answer(request, mount, anybody)
        except Refused as refused:
            if is_api:
                page = error_page(refused)
            else:
                page = pages.error(refused.status, refused.code, str(refused), refused.fields)
        if page is not None:
            _send(request, page, suit=not is_api)

    def _answer(self, request: Request, mount: str, anybody: May) -> Page | None:
        self._check_host(request)
        if request.wants_upgrade:  # by HTTP/2, the WebSocket would get a page for its frames
            raise Refused(501, "no-upgrade", "The dashboard has no WebSocket. Ask by plain HTTP.")
        asked, entry = self._find(request, mount)
        self._check_origin(asked)
        if self.login.passwords is not None:
            anybody = May.NOTHING
        try:
            who = self.login.who(request, anybody)
        except Refused as refused:
            # A browser gets the form instead. What it sends may be for a proxy on the way.
            if refused.status != 401 or entry.needs or not wants_html(request):
                raise
            who = Who(anybody, self.login.address(request))
        if who.may < entry.needs and (entry.needs < May.ACT or who.may < May.READ):
            raise self._nobody(request)
        return entry.answer(asked, who)

    def _check_host(self, request: Request) -> None:
        name = request.hostname
        is_address = addresses.parse(name.removeprefix("[").removesuffix("]")) is not None
        if not (is_address or name in (self._gateway_host, "localhost")):
            text = f"Open the dashboard as {self._gateway_host}, localhost or by its IP address."
            raise Refused(403, "wrong-host", text)

    def _find(self, request: Request, mount: str) -> tuple[Asked, _Entry]:
        """The entry of the path and the method in the table. Raises Refused if there is none."""
        path, _, query = request.path.partition("?")
        relative = path.removeprefix(mount)
        parts = relative.split("/") if path.startswith(mount) and len(path) <= MOST_PATH else ()
        method = "GET" if request.method in READING else request.method
        allowed: list[str] = []
        for pattern, entries in self._table.items():
            if (named := _named(pattern, parts)) is None:
                continue
            if method in entries:
                return Asked(request, mount, relative, query, named), entries[method]
            allowed += entries
        if not allowed:
            raise Refused(404, "no-page", f"Nothing is at this path. The dashboard is at {mount}.")
        shown = ", ".join("GET, HEAD" if name == "GET" else name for name in dict.fromkeys(allowed))
        text = f"{request.method[:20]} does not work here; expected {shown}."
        raise Refused(405, "wrong-method", text, (("Allow", shown),))

    def _check_origin(self, asked: Asked) -> None:
        """Refuse what a page of another site has made a browser send."""
        reads = asked.request.method in READING
        # A page elsewhere cannot read an answer, but it could take the places of the readers.
        if not reads or asked.path.startswith(API):
            if (fetch_site := _elsewhere(asked.request)) is not None:
                raise _from_elsewhere(f"Sec-Fetch-Site is {fetch_site}")
        origins = [] if reads else asked.request.fields.all("origin")
        if origins and not (len(origins) == 1 and self._is_own(origins[0], asked.request)):
            told = f"its Origin is {origins[0][:100]}, this is {asked.request.authority}"
            raise _from_elsewhere(f"{told}; a proxy in front must pass on the Host")

    def _is_own(self, origin: str, request: Request) -> bool:
        scheme, _, host = origin.lower().partition("://")
        is_secure = self.login.is_secure(request)
        if scheme not in ("http", "https") or is_secure and scheme != "https":
            return False
        hosts = [request.authority]
        if request.peer in self._proxies:  # some proxies change the Host
            hosts += ",".join(request.fields.all("x-forwarded-host")).split(",")[-1:]
        port = ":443" if scheme == "https" else ":80"
        host = host.removesuffix(port)
        return bool(host) and host in {own.strip(" \t").lower().removesuffix(port) for own in hosts}

    def _nobody(self, request: Request) -> Refused:
        """The refusal of a caller without a login."""
        text = "This needs the dashboard's password or token."
        if not self.login.is_on:
            text += " Neither DASHBOARD_PASSWORD nor DASHBOARD_TOKEN is set at the gateway."
        if "sec-fetch-mode" in request.fields or self.login.passwords is None:
            return Refused(401, "password-required", text, (ASK_TOKEN,))
        return Refused(401, "password-required", text, (ASK_PASSWORD, ASK_TOKEN))

    # The page, the login

    def _page(self, asked: Asked, who: Who) -> Page | None:
        if who.may >= May.READ:
            return self._views.full(who.csrf)
        if who.may >= May.LOOK:
            return self._views.public()
        if self.login.passwords is not None and wants_html(asked.request):
            # Of a link elsewhere, the browser has kept the session's cookie back (SameSite=Strict).
            return see_other("login") if _elsewhere(asked.request) is None else Page(200, AGAIN)
        raise self._nobody(asked.request)

    def _login_page(self, asked: Asked, who: Who) -> Page | None:
        if who.may != May.NOTHING or self.login.passwords is None:
            return see_other("./")
        return self._views.login("")

    def _log_in(self, asked: Asked, who: Who) -> Page | None:
        content = read_content(asked.request)
        password = content.get("password")
        try:
            if not isinstance(password, str) or not password:
                raise Refused(400, "wrong-password", "Type the password.")
            cookie = self.login.log_in(asked.request, password, asked.mount)
        except Refused as refused:
            page = self._views.login(str(refused))
            fields = (*page.fields, *refused.fields)
            return page._replace(status=refused.status, fields=fields)
        log.info("dashboard: login from %s", who.address or "an unknown address")
        return see_other("./", (cookie,))

    def _log_out(self, asked: Asked, who: Who) -> Page | None:
        if who.csrf:
            _check_csrf(asked.request, who, read_content(asked.request))
        return see_other("login", (self.login.log_out(asked.request, asked.mount),))

    def _read_events(self, asked: Asked, who: Who) -> Page | None:
        if asked.request.method == "HEAD":
            return Page(200, b"", "text/event-stream")
        if not asked.request.body_complete:
            raise Refused(400, "malformed-request", "The request has a body; expected none.")
        self.events.serve(asked.request, who)
        return None


def _answered_by(way: Way) -> _Answer:
    def answer(asked: Asked, who: Who) -> Page:
        request = asked.request
        acts = way.needs >= May.ACT
        content: Mapping[str, object] = {}
        if request.method not in READING:
            if acts and who.may < May.ACT and not who.csrf:
                text = (
                    "The password alone reads. Log in by the page, or send DASHBOARD_TOKEN as "
                    "Authorization: Bearer."
                )
                raise Refused(403, "read-only", text)
            content = read_content(request)
            if acts and who.may < May.ACT:
                _check_csrf(request, who, content)
        is_form = _is_of_a_page(request)
        page = way.answer(Call(who, asked.parts, _pairs(asked.query), content, is_form))
        return see_other("../" * asked.path.count("/") or "./") if is_form else page

    return answer


def _named(pattern: Sequence[str], parts: Sequence[str]) -> tuple[str, ...] | None:
    """What stands in ``parts`` of a path for each {} of ``pattern``; None if it does not fit."""
    if len(pattern) != len(parts):
        return None
    named = []
    for wanted, came in zip(pattern, parts):
        if wanted == "{}" and came:
            named.append(unquote(came))
        elif wanted != came:
            return None
    return tuple(named)


def _not_to_be_shown(request: Request) -> None:
    """A dashboard that is open would show itself among the visits."""
    if request.visit is not None:
        request.visit.is_local = True


def _is_of_a_page(request: Request) -> bool:
    """Whether a browser sends a form of a page, without JavaScript: it wants a page again."""
    return _media_type(request) == FORM and wants_html(request)


def _check_csrf(request: Request, who: Who, content: Mapping[str, object]) -> None:
    given = request.fields.get("x-csrf-token") or content.get("csrf")
    if not (isinstance(given, str) and who.proves(given)):
        text = "The request has no CSRF token of this session. Load the page again."
        raise Refused(403, "csrf", text)


def _elsewhere(request: Request) -> str | None:
    """Where the page was that has made the browser ask, in the browser's words; None if it was
    ours, or there was none."""
    site = request.fields.get("sec-fetch-site")
    return site if site in ("cross-site", "same-site") else None


def _from_elsewhere(why: str) -> Refused:
    text = f"This request comes from a page of another site ({why}). Use the dashboard's own page."
    return Refused(403, "wrong-origin", text)


def wants_html(request: Request) -> bool:
    """Whether the caller is a browser that loads a page."""
    return any(HTML in value.lower() for value in request.fields.all("accept"))


def read_content(request: Request) -> Mapping[str, object]:
    """The body, read whole: the object of a JSON body, the fields of a form, or nothing. Raises
    Refused; VisitorGone, OSError."""
    if not request.has_body:
        return {}
    body = _read_body(request)
    kind = _media_type(request)
    if kind == FORM:
        return _pairs(body.decode("utf-8", "replace"))
    if not body:
        return {}
    if kind != JSON:
        text = f"The body is {kind[:60] or 'of no type'}, expected {JSON} or {FORM}."
        raise Refused(415, "wrong-type", text)
    try:
        content = json.loads(body)
    except (ValueError, RecursionError):
        raise Refused(400, "malformed-body", "The body is not JSON, expected an object.") from None
    if not isinstance(content, dict):
        raise Refused(400, "malformed-body", "The body is another JSON value, expected an object.")
    return content


def _read_body(request: Request) -> bytes:
    if (request.body_length or 0) > MOST_BODY:
        raise _too_large()
    if (request.fields.get("expect") or "").lower() == "100-continue":
        request.send_interim(100, "Continue", [])
    pieces: list[bytes] = []
    size = 0
    timeout = HURRIED if request.crowded() else BODY_TIMEOUT
    deadline = Deadline(timeout)
    try:
        while came := request.read_body(deadline.left() or 0):
            pieces += came
            size += sum(map(len, came))
            if size > MOST_BODY:
                raise _too_large()
    except TimeoutError:
        text = f"The body did not come whole within {timeout} s. Try again."
        raise Refused(408, "body-timeout", text) from None
    except Malformed as error:
        text = pages.MALFORMED.format(error)
        raise Refused(error.status, "malformed-request", text) from None
    return b"".join(pieces)


def _too_large() -> Refused:
    return Refused(413, "too-large", f"The body is too large, expected at most {MOST_BODY} bytes.")


def _media_type(request: Request) -> str:
    return (request.fields.get("content-type") or "").partition(";")[0].strip().lower()


def _pairs(text: str) -> dict[str, str]:
    """The fields of a query or a form; of two with one name, the last."""
    try:
        return dict(parse_qsl(text, keep_blank_values=True, max_num_fields=MOST_FIELDS))
    except ValueError:
        raise Refused(
            400, "malformed-request", f"There are too many fields, expected at most {MOST_FIELDS}."
        ) from None


def _send(request: Request, page: Page, suit: bool) -> None:
    """``suit``: an error gets its body in the form that the caller prefers, not JSON. Raises
    OSError."""
    visit = request.visit
    if visit is not None:
        visit.error = visit.error or page.code
    if suit and page.code:  # the operator's own templates are for visitors
        dress = pages.Dress(request_id="" if visit is None else visit.request_id)
        page = pages.suited(page, request.fields.all("accept"), dress)
        page = page._replace(fields=(*page.fields, ("Content-Security-Policy", ERROR_POLICY)))
    own = {name.lower() for name, _ in page.fields}
    fields = [
        ("Content-Type", page.content_type),
        ("Date", formatdate(usegmt=True)),
        *((name, value) for name, value in FIELDS.items() if name.lower() not in own),
        *page.fields,
    ]
    request.send_head(page.status, HTTPStatus(page.status).phrase, fields, len(page.body))
    request.finish([] if request.method == "HEAD" else [page.body])
