"""The pages that the gateway answers with by itself: values, no I/O.

Every error carries a code word in ``X-Gotunnel-Error``, so that a person at the other end of a
log can tell our answer from the target's, and programs need not read the text.
"""

from html import escape
from http import HTTPStatus
from typing import NamedTuple

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


class Page(NamedTuple):
    """A whole answer: ``body`` is sent as ``content_type``; ``fields`` go beside those two."""

    status: int
    body: bytes
    content_type: str = "text/html; charset=utf-8"
    fields: tuple = ()


def error(status: int, code: str, text: str) -> Page:
    """An error for a person, and its code word for a program. ``text`` is plain text."""
    title = f"{int(status)} {HTTPStatus(status).phrase}"
    body = _FRAME.format(title=title, text=escape(text), footer=f"gotunnel: {code}")
    return Page(status, body.encode(), fields=(("X-Gotunnel-Error", code),))


def landing(hostname: str) -> Page:
    """What the gateway shows under its own name."""
    text = f"This is the gateway {escape(hostname)}. It serves other hostnames, each by its agent."
    return Page(200, _FRAME.format(title="gotunnel", text=text, footer="It works.").encode())


def no_tunnel(hostname: str) -> Page:
    return error(502, "no-tunnel", f"No agent serves {hostname} at the moment.")
