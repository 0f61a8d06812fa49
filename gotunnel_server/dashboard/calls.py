"""What the dashboard's router (site.py) hands to the functions that answer, and gets from them.

A function is a `Way` in a table: method, path, who may use it. The router checks these, reads the
body, and calls ``answer(call)``, which returns a Page (visitors/pages.py) or raises Refused. Values
only: it neither reads nor sends.
"""

from __future__ import annotations

import enum
import json
from collections.abc import Callable, Mapping
from http import HTTPStatus
from typing import NamedTuple

from ..visitors.pages import CODE_FIELD, JSON, Page, Pairs


class May(enum.IntEnum):
    """What a caller may do; each includes the one before it."""

    NOTHING = 0
    LOOK = 1  # see what visitors can find out anyway: hostnames and modes
    READ = 2  # see all
    ACT = 3  # and change something


class Who(NamedTuple):
    """Who calls. ``address``: the IP address, "" if a proxy hides it. ``name`` is for the log.
    ``csrf``: what a page must send to act (field X-CSRF-Token, or "csrf" of a form); "" for a
    caller without a session. ``proves(csrf)``: whether that is it. ``is_valid()``: whether the
    session, the password or the token is still good."""

    may: May
    address: str
    name: str = "nobody"
    csrf: str = ""
    is_valid: Callable[[], bool] = lambda: True
    proves: Callable[[str], bool] = lambda csrf: False


class Call(NamedTuple):
    """One request. ``parts``: what stands for each {} of the path, percent-decoded; any characters.
    ``query``: the last value of each name. ``content``: the JSON object, or the fields of the form,
    in the body; empty without one. ``is_form``: a browser has sent a form of the page without
    JavaScript; it gets the page again in place of the answer."""

    who: Who
    parts: tuple[str, ...] = ()
    query: Mapping[str, str] = {}
    content: Mapping[str, object] = {}
    is_form: bool = False


class Way(NamedTuple):
    """``path`` is relative to the mount, such as "api/v1/sessions/{}/end". GET serves HEAD, too."""

    method: str
    path: str
    needs: May
    answer: Callable[[Call], Page]


class Refused(Exception):
    """The call is not granted: an error with ``code`` for programs and ``text`` for people (what
    came, what was expected, what to do)."""

    def __init__(self, status: int, code: str, text: str, fields: Pairs = ()):
        super().__init__(text)
        self.status, self.code, self.fields = status, code, fields


def json_page(document: object, status: int = 200, fields: Pairs = ()) -> Page:
    """``document`` as JSON. Only ASCII, so that no character of a visitor's can be taken for
    another one's, whatever shows it."""
    body = json.dumps(document, separators=(",", ":")).encode() + b"\n"
    return Page(status, body, JSON, fields)


def error_page(refused: Refused) -> Page:
    """A refusal as the API tells it."""
    told = {"error": refused.code, "message": str(refused)}
    return json_page(told, refused.status, ((CODE_FIELD, refused.code), *refused.fields))


def see_other(where: str, fields: Pairs = ()) -> Page:
    """A redirect to a page that is to be loaded by GET. ``where`` is relative."""
    return Page(int(HTTPStatus.SEE_OTHER), b"", fields=(("Location", where), *fields))
