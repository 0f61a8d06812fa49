"""Reads the target of a quick command, which may be as short as a port."""

import os
import socket

from ..common import addresses
from ..common.hostnames import MAX_PORT, valid_host, valid_hostname
from ..common.one_line import without_secrets
from ..common.quantities import whole_number
from ..config import MAX_SHOWN, MAX_UNIX_PATH, Target

# A bare port is one of this machine by its name, not its IPv4 address: many development servers
# listen on ::1 alone. Both addresses are tried.
HERE = "localhost"
EXAMPLES = "8080, 127.0.0.1:8080, http://HOST:PORT, https://HOST:PORT or unix:/PATH"
TCP_EXAMPLES = "22, 127.0.0.1:22 or unix:/PATH"
PORTS = {"http": 80, "https": 443}  # of a URL that names none


class BadTarget(ValueError):
    """A text is no target; one line for the user."""

    def __init__(self, text: str):
        super().__init__(without_secrets(text))


def read_target(text: str, *, schemes: tuple[str, ...] = ("http", "https")) -> Target:
    """The target that a user has typed. ``schemes`` may stand before it. Raises BadTarget."""
    if text.startswith("unix:"):
        return Target(path=_unix_path(text))
    scheme, slashes, rest = text.partition("://")
    scheme = scheme.lower()
    if slashes and scheme not in schemes:
        known = " or ".join(f"{known}://" for known in schemes)
        raise _bad(text, f"begins with {scheme}://, expected {known} or none")
    address = (rest if slashes else text).removesuffix("/") if slashes else text
    if not slashes and not _is_port(address) and os.path.exists(address):
        if os.path.isdir(address):
            raise _bad(text, f"is a folder; `gotunnel files {text}` shares a folder")
        raise _bad(text, "is a file; `gotunnel files FOLDER` shares a folder")
    examples = EXAMPLES if "http" in schemes else TCP_EXAMPLES
    if not slashes and (os.sep in address or "/" in address):
        raise _bad(text, f"has a path, expected {examples}")
    if "@" in address:  # not shown: it may hold a password
        raise BadTarget("TARGET holds a user or password, expected a host and port alone")
    if "/" in address or "?" in address or "#" in address:
        raise _bad(text, "has a path, expected none: each visitor's path is passed on as it is")
    default = PORTS.get(scheme) if slashes else None
    host, port = _host_and_port(text, address, default, examples)
    return Target(host, port, tls=scheme == "https" and bool(slashes))


def _host_and_port(text: str, address: str, default: int | None, examples: str) -> tuple[str, int]:
    if _is_port(address):
        return HERE, _port(text, address.removeprefix(":"))
    if addresses.parse(address) is not None and ":" in address:
        raise _bad(text, f"is an IPv6 address without brackets, expected [{address}]:PORT")
    host, colon, port = address.rpartition(":")
    if not colon or port.endswith("]"):
        host, port = address, "" if default is None else str(default)
    if not port:
        raise _bad(text, f"has no port, expected {examples}")
    if not host or not _is_host(host):
        raise _bad(text, f"has no valid host, expected {examples}")
    return host.strip("[]"), _port(text, port)


def _is_port(address: str) -> bool:
    digits = address.removeprefix(":")
    return digits.isascii() and digits.isdigit()


def _is_host(host: str) -> bool:
    # Underscores are not valid in hostnames, but container networks use them in service names.
    return valid_host(host) or valid_hostname(host.replace("_", "x"))


def _port(text: str, digits: str) -> int:
    number = whole_number(digits)
    if number is None or not 1 <= number <= MAX_PORT:
        raise _bad(text, f"has no port from 1 to {MAX_PORT}")
    return number


def _unix_path(text: str) -> str:
    path = text.removeprefix("unix:")
    if not hasattr(socket, "AF_UNIX"):
        raise _bad(text, "is a unix socket, which Python does not offer on this system")
    if path.startswith("//"):
        path = path[2:]
    if not path:
        raise _bad(text, "has no path, expected unix:/PATH")
    path = os.path.abspath(path)
    if len(os.fsencode(path)) > MAX_UNIX_PATH:
        raise _bad(text, f"has a path of more than {MAX_UNIX_PATH} bytes")
    return path


def _bad(text: str, why: str) -> BadTarget:
    shown = text if len(text) <= MAX_SHOWN else f"{text[:MAX_SHOWN]}..."
    return BadTarget(f"TARGET: {shown!r} {why}")
