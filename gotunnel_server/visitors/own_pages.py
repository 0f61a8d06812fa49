"""Reads the operator's own error pages: the folder PAGES_DIR, with a template a file.

    no-tunnel.html    errors with this code (docs/visits.md lists the codes)
    502.html          other errors with this status
    5xx.html          other errors with a status from 500 to 599; 4xx.html likewise
    error.html        all other errors

It is read at start and on SIGHUP, never for a visit.
"""

from __future__ import annotations

import os
from difflib import get_close_matches
from http import HTTPStatus

from gotunnel_agent.common import small_file
from gotunnel_agent.common.one_line import on_one_line

from .pages import ANY, TITLES, Template, TemplateError, Templates

SUFFIX = ".html"
# Bytes. A page has a few thousand; it is kept in memory, and filled in for each error.
MAX_TEMPLATE = 64 * 1024
# Bytes of a template for a visitor that is turned away by a thread which must not wait: the page
# has to fit into the kernel's buffer, which begins with some 40 kB for a connection.
MAX_AT_ONCE = 16 * 1024

CLASSES = ("4xx", "5xx")
NAMES = frozenset({
    ANY, *TITLES, *CLASSES, *(str(int(status)) for status in HTTPStatus if status >= 400),
})  # fmt: skip


def read(folder: str) -> dict[str, Template]:
    """The templates in a folder, by name. Other files than .html are ignored, and hidden ones.
    Raises TemplateError, OSError."""
    templates = {}
    for file in sorted(os.listdir(folder)):
        name, suffix = os.path.splitext(file)
        if suffix != SUFFIX or file.startswith("."):
            continue
        if name not in NAMES:
            near = get_close_matches(name, NAMES, n=1)
            expected = "expected a code such as no-tunnel, a status such as 502, 4xx, 5xx or error"
            hint = f"did you mean {near[0]}{SUFFIX}?" if near else expected
            raise TemplateError(f"{on_one_line(file, 60)} is the page of no error, {hint}")
        try:
            templates[name] = _read_one(os.path.join(folder, file))
        except TemplateError as error:
            raise TemplateError(f"{file}: {error}") from None
    return templates


def _read_one(path: str) -> Template:
    content = small_file.read(path, MAX_TEMPLATE)
    if len(content) > MAX_TEMPLATE:
        raise TemplateError(f"it is too long, expected at most {MAX_TEMPLATE} bytes")
    if not content.strip():
        raise TemplateError("it is empty, expected a page")
    try:
        return Template(content.decode("utf-8-sig"))
    except UnicodeDecodeError:
        raise TemplateError("it is not UTF-8, expected UTF-8 text") from None


def small(templates: Templates) -> Templates:
    """Those that a thread may send which must not wait."""
    return {name: one for name, one in templates.items() if one.size <= MAX_AT_ONCE}
