"""Asks a gateway elsewhere for its state, by the API of its dashboard (`status --url`).

The token goes to the host in the URL and nowhere else: a redirect is not followed.
"""

from __future__ import annotations

import argparse
import ipaddress
import json
import re
import socket
import ssl
import sys
import urllib.request
from collections.abc import Mapping
from http.client import HTTPException, HTTPResponse, IncompleteRead
from time import monotonic
from typing import IO, Any
from urllib.error import HTTPError, URLError
from urllib.parse import SplitResult, urlsplit

from gotunnel_agent.common import small_file
from gotunnel_agent.common.one_line import words_on_one_line
from gotunnel_agent.common.status_socket import NoAnswer

from ..net.dns import is_always_here
from ..status import remote
from ..variables import ConfigError

SETTING = "DASHBOARD_TOKEN"
PATH = "/api/v1/state"
TIMEOUT = 10  # seconds for the connection, for each part of the answer, and for all of it twice
MOST_ANSWER = 32 << 20  # bytes: 1000 hostnames, each with a long error of a CA, take 6 MiB
MOST_TOKEN = 4096  # bytes
_TOKEN = re.compile(r"[!-~]+")  # as a header field can have it


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--url", metavar="URL",
        help="ask the gateway whose dashboard is there, such as "
        "https://gateway.example.com/dashboard",
    )  # fmt: skip
    parser.add_argument(
        "--token-file", metavar="FILE",
        help=f"the file with that gateway's {SETTING} (default: the environment's {SETTING})",
    )  # fmt: skip
    parser.add_argument(
        "--ca-file", metavar="FILE", help="the certificate of a private CA that signs its TLS"
    )


def read_token(file: str | None, environ: Mapping[str, str]) -> str:
    """The token in a file, or in the environment. Raises ConfigError."""
    if file is not None:
        where = f"--token-file {file}"
        try:
            token = small_file.read_whole(file, MOST_TOKEN).decode("ascii", "replace").strip()
        except OSError as error:
            raise ConfigError(f"{where}: {error.strerror or error}") from None
    else:
        where, token = SETTING, environ.get(SETTING, "").strip()
        if not token:
            raise ConfigError(
                f"--url needs the gateway's {SETTING}: name a file that has it by --token-file, or "
                f"set {SETTING}"
            )
    if not _TOKEN.fullmatch(token):
        what = "it has characters that no token has" if token else "it is empty"
        raise ConfigError(f"{where}: {what}, expected the gateway's {SETTING}")
    return token


def ask(url: str, token: str, ca_file: str | None) -> dict[str, Any]:
    """The gateway's answer, as the status socket would give it. Raises ConfigError for a wrong
    argument, NoAnswer."""
    parts = _split(url)
    if parts.scheme == "http" and not _is_here(parts.hostname or ""):
        line = "gotunnel-server: the token goes there without encryption; use https, or ssh -L"
        print(line, file=sys.stderr)
    where = f"{parts.scheme}://{parts.netloc}{parts.path.rstrip('/')}"
    request = urllib.request.Request(
        where + PATH, headers={"Authorization": f"Bearer {token}", "Accept": "application/json"}
    )
    handlers = urllib.request.HTTPSHandler(context=_context(ca_file)), _NoRedirect()
    opener = urllib.request.build_opener(*handlers)
    try:
        with opener.open(request, timeout=TIMEOUT) as answer:
            return remote(_document(where, _read(answer)))
    except HTTPError as error:
        with error:
            raise NoAnswer(f"{where}: {_why_refused(error)}") from None
    except URLError as error:
        raise NoAnswer(f"{where}: {_why_silent(error.reason, parts)}") from None
    except (OSError, HTTPException) as error:
        raise NoAnswer(f"{where}: {_why_silent(error, parts)}") from None


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *_: object) -> None:
        return None


def _split(url: str) -> SplitResult:
    expected = "expected one such as https://gateway.example.com/dashboard"
    try:
        parts = urlsplit(url)
        is_fit = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        is_fit = False
    if not is_fit or not url.isascii() or not url.isprintable() or " " in url:
        raise ConfigError(f"--url {words_on_one_line(url, 200)!r}: {expected}")
    if parts.query or parts.fragment or "@" in parts.netloc:
        raise ConfigError(f"--url: a user, a query or a fragment came, {expected}")
    return parts


def _is_here(host: str) -> bool:
    try:
        return is_always_here(host) or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _context(ca_file: str | None) -> ssl.SSLContext:
    try:
        return ssl.create_default_context(cafile=ca_file)
    except (OSError, ssl.SSLError) as error:
        why = "no certificate in it" if isinstance(error, ssl.SSLError) else error.strerror
        raise ConfigError(f"--ca-file {ca_file}: {why}, expected a PEM file of a CA") from None


def _read(answer: HTTPResponse | IO[bytes]) -> bytes:
    data = bytearray()
    deadline = monotonic() + 2 * TIMEOUT
    while len(data) <= MOST_ANSWER and monotonic() < deadline:
        more = answer.read(1 << 16)
        if not more:
            if getattr(
                answer, "length", None
            ):  # what is missing; newer Pythons raise by themselves
                raise IncompleteRead(bytes(data))
            return bytes(data)
        data += more
    raise TimeoutError("it is too long, or comes too slowly")


def _document(where: str, data: bytes) -> dict[str, Any]:
    try:
        document = json.loads(data)
    except (ValueError, RecursionError):
        document = None
    if not isinstance(document, dict) or "gateway" not in document:
        raise NoAnswer(f"{where}: {_NO_API}")
    if document.get("public") is not False:
        raise NoAnswer(f"{where}: it shows only hostnames: that gateway has no {SETTING}, expected "
                       "one of 16 characters or more in its configuration")  # fmt: skip
    return document


_NO_API = (
    "no state of a gateway is there: the path may be wrong (on GATEWAY_HOST it is /dashboard), "
    "that gateway may have neither DASHBOARD_PASSWORD nor DASHBOARD_TOKEN, or an older version"
)


def _why_refused(error: HTTPError) -> str:
    """In words, for an answer with an error status."""
    said, code = "", ""
    try:
        told = json.loads(error.read(1 << 16))
        said, code = words_on_one_line(told["message"]), str(told["error"])
    except (OSError, HTTPException, ValueError, TypeError, KeyError, RecursionError):
        pass
    if error.code == 401:
        return f"the token is wrong: expected that of the gateway's {SETTING}, if it has one"
    if error.code in (404, 405) or code in ("no-tunnel", "no-page"):
        return _NO_API
    if 300 <= error.code < 400:
        to = words_on_one_line(error.headers.get("Location") or "elsewhere", 200)
        return f"it leads to {to}; give that address, if you trust it with the token"
    return said or f"status {error.code} came, expected 200"


def _why_silent(error: object, parts: SplitResult) -> str:
    """In words, for an error that is no answer."""
    if isinstance(error, ssl.SSLCertVerificationError):
        return (
            f"its certificate is not trusted: {error.verify_message}; for a private CA name its "
            "certificate by --ca-file (of the gateway's own CA: ACME_CACHE/local/ca.crt)"
        )
    if isinstance(error, ssl.SSLError):
        return f"TLS failed ({error.reason}): is that port one for https?"
    if isinstance(error, socket.gaierror) and is_always_here(parts.hostname or ""):
        # curl and browsers know these names by themselves; a system's resolver need not.
        return (
            f"this system finds no address of {parts.hostname}, which means this machine: expected "
            "http://localhost:DASHBOARD_PORT, or status without --url"
        )
    if isinstance(error, TimeoutError):
        return f"no whole answer in {TIMEOUT} s; is it the right port, and open?"
    if isinstance(error, ConnectionRefusedError):
        return "the connection was refused: no gateway listens there"
    if isinstance(error, IncompleteRead):
        return "the answer was cut short"
    if isinstance(error, HTTPException):
        return f"what answers there speaks no HTTP{' without TLS' * (parts.scheme == 'http')}"
    return words_on_one_line(getattr(error, "strerror", None) or error)
