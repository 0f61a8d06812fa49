"""The gateway's own pages: errors, redirects, and the page under its own name. Values, no I/O.

Every error page has a code word in ``X-Gotunnel-Error``, so that people and programs can tell it
from an answer of the target. The texts are for visitors: what happened, and what the visitor can
do. Only the code is for programs, and for people that run the site or the gateway.

An error gets its body when it is sent (suited()): as JSON, if the visitor's ``Accept`` prefers
that, else as HTML by a template, which the operator may replace (own_pages.py).
"""

import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from difflib import get_close_matches
from html import escape
from http import HTTPStatus
from typing import NamedTuple

CODE_FIELD = "X-Gotunnel-Error"
# Fields of an answer that only the gateway may write, as http1.plain_name() spells them. They are
# removed from a target's answers, so that a visitor can rely on them.
OURS = frozenset({CODE_FIELD.lower()})

RETRY = "Try again in a few seconds."
LATER = "Try again in a few minutes."
BUSY = f"Too many visitors are here at the moment. {RETRY}"
MALFORMED = "This request cannot be served: {}."  # of an http1.Malformed

NO_TUNNEL = "no-tunnel"  # the code of no_tunnel()
UNHEALTHY = "unhealthy"  # the code of unhealthy(), also of a visit in tcp mode
# Seconds after which a visitor of a target that is not well shall come again: the usual interval at
# which agents check their targets.
RETRY_UNHEALTHY = 5

# The headings of the errors, by code.
TITLES = {
    "agent-busy": "This site is busy",
    "agent-gone": "This site has just gone offline",
    "agent-limit": "This site is busy",
    "bad-answer": "This site has a problem",
    "body-timeout": "That took too long",
    "cut-short": "This site broke off",
    "gateway-busy": "Too many visitors",
    "head-timeout": "That took too long",
    "malformed-request": "Something is wrong with this request",
    "misdirected": "Wrong connection",
    "no-answer": "This site does not answer",
    "no-page": "There is no such page",
    "no-proof": "There is no such page",
    "no-tls": "Only with encryption",
    NO_TUNNEL: "This site is offline",
    "no-upgrade": "This does not work here",
    "blocked": "No access from here",
    "not-allowed": "No access from here",
    "not-get": "This does not work here",
    "not-http": "This is not a website",
    "not-tcp": "This is a website",
    "password-required": "A password is needed",
    "target-misconfigured": "This site is not set up yet",
    "target-timed-out": "This site does not answer",
    "target-unreachable": "This site is offline",
    "target-untrusted": "This site cannot be reached safely",
    "timed-out": "This site takes too long",
    "too-many-requests": "One moment, please",
    UNHEALTHY: "This site is not ready",
    "wrong-host": "Wrong address",
    "wrong-method": "This does not work here",
    "wrong-port": "Wrong port",
}

# The colours of each pair have a contrast of 4.5 or more in both schemes (WCAG 2.2, 1.4.3 "AA").
_FRAME = """<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<link rel="icon" href="data:,">
<style>
  :root {{ color-scheme: light dark; --back: #fafafc; --text: #22262e; --quiet: #5b6270;
          --line: #d9dce3; --link: #0b57c2 }}
  @media (prefers-color-scheme: dark) {{
    :root {{ --back: #15171c; --text: #e4e7ee; --quiet: #9ba3b2; --line: #333843;
            --link: #8fb8ff }} }}
  body {{ margin: 0; padding: 18vh 1.5rem 3rem; background: var(--back); color: var(--text);
         font: 1.0625rem/1.6 system-ui, sans-serif }}
  main {{ max-width: 34rem; margin: 0 auto; overflow-wrap: anywhere }}
  h1 {{ margin: 0 0 .75rem; font-size: 1.75rem; line-height: 1.25; font-weight: 600;
       text-wrap: balance }}
  p {{ margin: 0; text-wrap: pretty }}
  a {{ color: var(--link) }}
  footer {{ margin-top: 2.5rem; padding-top: 1rem; border-top: 1px solid var(--line);
           color: var(--quiet); font-size: .875rem }}
  footer span {{ display: inline-block; margin-right: 1.25rem }}
</style>
<main>
<h1>{title}</h1>
<p>{text}</p>
<footer>{footer}</footer>
</main>
</html>
"""

HTML, JSON = "text/html", "application/json"

# A weight in Accept (RFC 9110 §12.4.2).
_WEIGHT = re.compile(r"0(?:\.[0-9]{0,3})?|1(?:\.0{0,3})?")

Pairs = tuple[tuple[str, str], ...]  # fields of a message, as (name, value)

# What may stand in {{...}} of a template.
PLACEHOLDERS = ("title", "message", "status", "reason", "code", "hostname", "request_id", "details")
# Bounded, as blanks without an end would else take minutes to read (quadratic backtracking).
_PLACEHOLDER = re.compile(r"\{\{([^{}]{0,100})\}\}")
ANY = "error"  # the name of the template for all errors that have none of their own


class TemplateError(ValueError):
    """A template cannot be used; the text is one clause: what came, what was expected."""


class Template:
    """A page with {{placeholders}}."""

    def __init__(self, text: str):
        """Raises TemplateError if it names a placeholder that there is not."""
        self.text = text
        parts = _PLACEHOLDER.split(text)
        self._names = [name.strip() for name in parts[1::2]]
        self._literals = [part.encode() for part in parts[::2]]
        self.size = sum(map(len, self._literals))  # bytes, without what is filled in
        for name in self._names:
            if name not in PLACEHOLDERS:
                near = get_close_matches(name, PLACEHOLDERS, n=1)
                hint = f"did you mean {{{{{near[0]}}}}}?" if near else (
                    f"expected one of {', '.join(PLACEHOLDERS)}")  # fmt: skip
                raise TemplateError(f"there is no placeholder {{{{{ascii(name)[1:-1]}}}}}, {hint}")

    def fill(self, values: Mapping[str, str]) -> bytes:
        """The page; ``values`` are plain text, by placeholder."""
        pieces = self._literals[:1]
        for name, literal in zip(self._names, self._literals[1:]):
            pieces += escape(values[name]).encode(), literal
        return b"".join(pieces)


Templates = Mapping[str, Template]  # by name: see names_for()

_DETAILS = ("{{status}} {{code}}", "{{hostname}}", "{{request_id}}")  # an empty one takes no room
BUILT_IN = Template(
    _FRAME.format(
        title="{{title}}",
        text="{{message}}",
        footer="\n".join(f"<span>{detail}</span>" for detail in _DETAILS),
    )
)
NO_TEMPLATES: Templates = {}


def names_for(code: str, status: int) -> Iterable[str]:
    """The names of the templates that fit an error, the best one first: no-tunnel, 502, 5xx."""
    return code, str(status), f"{status // 100}xx", ANY


class Dress(NamedTuple):
    """What the page for a request is made with, beside the error."""

    templates: Templates = NO_TEMPLATES
    hostname: str = ""  # "" if the request names none
    request_id: str = ""  # "" if it has none


class Page(NamedTuple):
    """An answer. ``fields`` are those beside Content-Type. That of an error has no body until
    suited() makes it, of the text ``message``."""

    status: int
    body: bytes
    content_type: str = f"{HTML}; charset=utf-8"
    fields: Pairs = ()
    message: str = ""

    @property
    def code(self) -> str:
        """The word for programs; "" if it is no error page."""
        return next((value for name, value in self.fields if name == CODE_FIELD), "")


def error(status: int, code: str, text: str, fields: Pairs = ()) -> Page:
    """An error page: ``text``, plain text, for people, and the word ``code`` for programs.
    ``fields`` are added to the answer."""
    return Page(int(status), b"", fields=((CODE_FIELD, code), *fields), message=text)


def suited(page: Page, accept: Sequence[str], dress: Dress = Dress()) -> Page:
    """The page in the form that the visitor prefers. ``accept``: values of its Accept fields.

    The JSON form of an error is an object with "error" (the code word), "message" (the text) and
    "status".
    """
    code = page.code
    if not code:
        return page
    if _preference(accept, JSON) > _preference(accept, HTML):
        told = {"error": code, "message": page.message, "status": page.status}
        return page._replace(body=f"{json.dumps(told)}\n".encode(), content_type=JSON)
    template = BUILT_IN
    if dress.templates:
        names = names_for(code, page.status)
        template = next((dress.templates[n] for n in names if n in dress.templates), BUILT_IN)
    reason = HTTPStatus(page.status).phrase
    values = {
        "title": TITLES.get(code, reason),
        "message": page.message,
        "status": str(page.status),
        "reason": reason,
        "code": code,
        "hostname": dress.hostname,
        "request_id": dress.request_id,
        "details": " \u00b7 ".join(
            part for part in (f"{page.status} {code}", dress.hostname, dress.request_id) if part
        ),
    }
    return page._replace(body=template.fill(values))


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
    text = (
        f"This is the gateway {escape(hostname)}. The sites behind it have addresses of their own."
    )
    return Page(200, _FRAME.format(title="It works", text=text, footer="gotunnel").encode())


def moved(url: str, method: str) -> Page:
    """A permanent redirect. Status 308 for all but GET and HEAD, so that the visitor repeats its
    method and body (RFC 9110 §15.4.9)."""
    status = HTTPStatus(301 if method in ("GET", "HEAD") else 308)
    link = f'<a href="{escape(url)}">{escape(url)}</a>'
    body = _FRAME.format(
        title="This page has moved", text=f"It is now at {link}.", footer="gotunnel"
    )
    return Page(int(status), body.encode(), fields=(("Location", url),))


def no_tunnel(hostname: str) -> Page:
    text = f"{hostname} is not connected at the moment. Check the address, or try again later."
    return error(502, "no-tunnel", text)


def unhealthy(hostname: str) -> Page:
    """The target of a hostname is not well, so its agent's gateway does not ask it."""
    text = f"{hostname} is not ready for visitors at the moment. {RETRY}"
    return error(503, "unhealthy", text, (("Retry-After", str(RETRY_UNHEALTHY)),))


def in_words(seconds: float) -> str:
    """A time for a visitor to wait, rounded up: "1 second", "3 minutes", "2 hours"."""
    for unit, length in (("hour", 3600), ("minute", 60)):
        if seconds > 1.5 * length:
            return _counted(math.ceil(seconds / length), unit)
    return _counted(max(1, math.ceil(seconds)), "second")


def _counted(number: int, unit: str) -> str:
    return f"{number} {unit}{'' if number == 1 else 's'}"
