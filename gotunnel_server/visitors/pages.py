"""The gateway's own pages: errors, redirects, and the page under its own name. Values, no I/O.

Every error page has a code word in ``X-Gotunnel-Error``, so that people and programs can tell it
from an answer of the target. A visitor whose ``Accept`` prefers JSON gets the error as JSON. The
texts are for visitors: what happened, and what the visitor can do.
"""

import json
import re
from collections.abc import Sequence
from html import escape
from http import HTTPStatus
from typing import NamedTuple

CODE_FIELD = "X-Gotunnel-Error"
# Fields of an answer that only the gateway may write, as http1.plain_name() spells them. They are
# removed from a target's answers, so that a visitor can rely on them.
OURS = frozenset({CODE_FIELD.lower()})

RETRY = "Try again in a few seconds."
BUSY = f"This gateway has no room for another request at the moment. {RETRY}"
MALFORMED = "This request cannot be served: {}."  # of an http1.Malformed

_FRAME = """<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width">
<title>{title}</title>
<style>
  body {{ font: 16px/1.6 system-ui, sans-serif; max-width: 36em; margin: 15vh auto;
         padding: 0 1.5em; color: #223; background: #fafafc }}
  h1 {{ font-size: 1.5em; font-weight: 600 }}
  p.small {{ color: #778; font-size: .85em }}
  @media (prefers-color-scheme: dark) {{ body {{ color: #dde; background: #16181d }} }}
</style>
<h1>{title}</h1>
<p>{text}</p>
<p class="small">{footer}</p>
</html>
"""


NO_TUNNEL = "no-tunnel"  # the code of no_tunnel()

HTML, JSON = "text/html", "application/json"

# A weight in Accept (RFC 9110 §12.4.2).
_WEIGHT = re.compile(r"0(?:\.[0-9]{0,3})?|1(?:\.0{0,3})?")

Pairs = tuple[tuple[str, str], ...]  # fields of a message, as (name, value)


class Page(NamedTuple):
    """A complete answer. ``fields`` are those beside Content-Type. ``as_json`` is the body for
    visitors that prefer JSON, None if there is no JSON form."""

    status: int
    body: bytes
    content_type: str = f"{HTML}; charset=utf-8"
    fields: Pairs = ()
    as_json: bytes | None = None

    @property
    def code(self) -> str:
        """The word for programs; "" if it is no error page."""
        return next((value for name, value in self.fields if name == CODE_FIELD), "")


def error(status: int, code: str, text: str, fields: Pairs = ()) -> Page:
    """An error page: ``text``, plain text, for people, and the word ``code`` for programs.
    ``fields`` are added to the answer.

    The JSON form is an object with "error" (the code word), "message" (the text) and "status".
    """
    title = f"{int(status)} {HTTPStatus(status).phrase}"
    body = _FRAME.format(title=title, text=escape(text), footer=f"gotunnel: {code}")
    as_json = json.dumps({"error": code, "message": text, "status": int(status)}) + "\n"
    fields = ((CODE_FIELD, code), *fields)
    return Page(status, body.encode(), fields=fields, as_json=as_json.encode())


def suited(page: Page, accept: Sequence[str]) -> Page:
    """The page in the form that the visitor prefers. ``accept``: values of its Accept fields."""
    if page.as_json is None or _preference(accept, JSON) <= _preference(accept, HTML):
        return page
    return page._replace(body=page.as_json, content_type=JSON)


def _preference(accept: Sequence[str], media_type: str) -> tuple[float, int]:
    """How much a media type is wanted: its weight, then how exactly it was named (RFC 9110
    §12.5.1). The most exact range counts; malformed ones are ignored. A type with weight 0 ranks
    like one that is not named.
    """
    ranges = ("*/*", media_type.partition("/")[0] + "/*", media_type)  # from coarse to exact
    best = (-1, 0.0)  # exactness, weight
    for member in ",".join(accept).lower().split(","):
        name, *parameters = (part.strip(" \t") for part in member.split(";"))
        weights = [p.removeprefix("q=") for p in parameters if p.startswith("q=")] or ["1"]
        if name in ranges and _WEIGHT.fullmatch(weights[0]):
            best = max(best, (ranges.index(name), float(weights[0])))
    exactness, weight = best
    return (weight, exactness) if weight else (0.0, 0)


def landing(hostname: str) -> Page:
    """The page under the gateway's own name."""
    text = f"This is the gateway {escape(hostname)}. The services behind it have other hostnames."
    return Page(200, _FRAME.format(title="gotunnel", text=text, footer="It works.").encode())


def moved(url: str, method: str) -> Page:
    """A permanent redirect. Status 308 for all but GET and HEAD, so that the visitor repeats its
    method and body (RFC 9110 §15.4.9)."""
    status = HTTPStatus(301 if method in ("GET", "HEAD") else 308)
    link = f'<a href="{escape(url)}">{escape(url)}</a>'
    title = f"{int(status)} {status.phrase}"
    body = _FRAME.format(title=title, text=f"This page has moved to {link}.", footer="gotunnel")
    return Page(int(status), body.encode(), fields=(("Location", url),))


def no_tunnel(hostname: str) -> Page:
    text = f"No service is connected for {hostname} at the moment. Check the name, or try later."
    return error(502, "no-tunnel", text)
