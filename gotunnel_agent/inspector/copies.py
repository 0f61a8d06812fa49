"""Writes a request as a command for curl, or as a program in Python, to be run elsewhere. Pure.

What a shell gets is quoted so that it stays text, whatever bytes a visitor has sent: ``'...'``, and
``$'...'`` (bash, zsh, ksh, POSIX.1-2024) where a control character could do something to the
terminal that it is pasted into. A body that no argument of a program can hold comes by a pipe from
base64.

The copy sends the method, path, fields and body that came, to the hostname that the visitor used.
Left out is what is of one connection, or was added by the gateway.
"""

from __future__ import annotations

import base64
import re
from collections.abc import Sequence
from typing import NamedTuple

from ..common import http1

# Fields that are not copied: of one connection, of the gateway, or those that curl writes itself.
LEFT_OUT = http1.HOP_BY_HOP | {"host", "x-forwarded-*", "x-real-ip", "forwarded", "expect"}
# Bytes of a body that are an argument; Linux takes 128 KiB in one.
MOST_ARGUMENT = 60_000
_SAFE = re.compile(r"[A-Za-z0-9_./:=@%+,-]+", re.ASCII)
_ESCAPES = {"\n": "\\n", "\r": "\\r", "\t": "\\t", "'": "\\'", "\\": "\\\\"}


class CannotCopy(Exception):
    """One line for the user."""


class Copied(NamedTuple):
    """A request to be written down. ``target`` and ``fields`` are latin-1, as they came. ``scheme``
    and ``authority`` say where to send it. ``note`` says what is not as it was; "" if all is."""

    method: str
    scheme: str
    authority: str
    target: str
    fields: Sequence[tuple[str, str]]
    body: bytes
    note: str = ""


def copied(head: bytes, body: bytes, size: int, hostname: str) -> Copied:
    """``body`` is the beginning of one of ``size`` bytes. Raises CannotCopy."""
    try:
        request = http1.parse_request(head)
        target = http1.origin_target(request)
        http1.hostname(request)  # a Host that is none would make the command lead elsewhere
    except http1.Malformed as error:
        raise CannotCopy(
            f"this request cannot be written down: {error}" if head else
            "this visit could not be followed, so its request is not known"
        ) from None  # fmt: skip
    fields = request.fields
    scheme = (fields.get("x-forwarded-proto") or "https").lower()
    note = ""
    if len(body) < size:
        note = (
            f"only the first {len(body)} of the body's {size} bytes were kept, the rest is missing"
        )
    return Copied(
        request.method,
        scheme if scheme in ("http", "https") else "https",
        request.authority or fields.get("host") or hostname,
        http1.percent_encoded(target),
        [item for item in fields if http1.kind(item[0]) not in LEFT_OUT],
        body,
        note,
    )


def as_curl(request: Copied) -> str:
    """A command for bash or zsh."""
    has_body = bool(request.body)
    names = {name.lower() for name, _ in request.fields}
    words = ["curl"]
    lines = []
    if request.method == "HEAD" and not has_body:
        words.append("--head")
    elif request.method != ("POST" if has_body else "GET"):
        words.append(f"-X {quoted(request.method)}")
    path = request.target
    if path == "*":
        lines.append("--request-target '*'")
        path = "/"
    # Without these curl would take ../ out of the path, and a range out of [1-9] and {a,b}.
    words += ["--path-as-is", "--globoff", quoted(f"{request.scheme}://{request.authority}{path}")]
    for name, value in request.fields:
        # An empty value: "Name:" would leave the field out.
        lines.append(f"-H {quoted(f'{name}: {value}' if value else f'{name};')}")
    # What curl would add.
    unwanted = ["User-Agent", "Accept"] + ["Content-Type", "Expect"] * has_body
    lines += [f"-H '{name}:'" for name in unwanted if name.lower() not in names]
    if "accept-encoding" in names:
        lines.append("--compressed")
    before = ""
    if has_body and _is_argument(request.body):
        # Not --data-binary, which takes a leading @ for the name of a file.
        lines.append(f"--data-raw {quoted(request.body.decode('latin-1'))}")
    elif has_body:
        text = base64.b64encode(request.body).decode()
        before = f"printf %s '{text}' | base64 -d | \\\n"
        lines.append("--data-binary @-")
    command = " \\\n  ".join([" ".join(words), *lines]) + "\n"
    return _comment(request.note) + before + command


def _is_argument(body: bytes) -> bool:
    if len(body) > MOST_ARGUMENT or b"\0" in body:
        return False
    try:
        body.decode()
    except UnicodeDecodeError:
        return False
    return True


def quoted(text: str) -> str:
    """A word for the shell. ``text`` is latin-1, each character a byte but 0."""
    if _SAFE.fullmatch(text) and not text.startswith(("-", "=", "~")):
        return text
    data = text.encode("latin-1")
    try:
        shown = data.decode()
    except UnicodeDecodeError:
        return "$'" + "".join(map(_escaped_byte, data)) + "'"
    if all(character.isprintable() or character == "\n" for character in shown):
        return "'" + shown.replace("'", "'\\''") + "'"
    return "$'" + "".join(map(_escaped, shown)) + "'"


def _escaped_byte(byte: int) -> str:
    # Three octal digits end by themselves; hexadecimal ones go on in some shells.
    return _escaped(chr(byte)) if 32 <= byte < 127 or byte in b"\n\r\t" else f"\\{byte:03o}"


def _escaped(character: str) -> str:
    if character in _ESCAPES:
        return _ESCAPES[character]
    if character.isprintable():
        return character
    return "".join(f"\\{byte:03o}" for byte in character.encode())


def as_python(request: Copied) -> str:
    """A program for Python's standard library. It sends the fields in their order."""
    kind = "HTTPSConnection" if request.scheme == "https" else "HTTPConnection"
    fields = [("Host", request.authority), *request.fields]
    if request.body or request.method in ("POST", "PUT", "PATCH"):
        fields.append(("Content-Length", str(len(request.body))))
    lines = [
        "import http.client", "",
        f"connection = http.client.{kind}({ascii(request.authority)}, timeout=60)",
        f"connection.putrequest({ascii(request.method)}, {ascii(request.target)},"
        " skip_host=True, skip_accept_encoding=True)",
        *(f"connection.putheader({ascii(name)}, {ascii(value)})" for name, value in fields),
        f"connection.endheaders({request.body!r})" if request.body else "connection.endheaders()",
        "response = connection.getresponse()",
        "print(response.status, response.reason)",
        "print(response.headers)",
        "print(response.read())",
    ]  # fmt: skip
    return _comment(request.note) + "\n".join(lines) + "\n"


def _comment(note: str) -> str:
    return f"# {note[0].upper()}{note[1:]}.\n" if note else ""
