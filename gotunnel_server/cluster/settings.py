"""The settings of a cluster: CLUSTER and its companions, read and checked.

    CLUSTER=redis://[USER[:PASSWORD]@]HOST[:PORT][/DB]        rediss:// with TLS
            unix://[USER[:PASSWORD]@]/PATH[?db=DB]
            redis+sentinel://[...@]HOST:PORT,HOST:PORT/MASTER[/DB]
            redis+cluster://[...@]HOST:PORT,HOST:PORT

``valkey`` may stand for ``redis``. No text that this module makes shows a password.
"""

from __future__ import annotations

import base64
import binascii
import re
from dataclasses import dataclass, field, replace
from typing import Protocol
from urllib.parse import unquote

from gotunnel_agent.common.hostnames import MAX_PORT, valid_host
from gotunnel_agent.common.quantities import whole_number

ONE, SENTINEL, NODES, SOCKET = "one", "sentinel", "cluster", "socket"  # kinds of an Address
REDIS_PORT, SENTINEL_PORT = 6379, 26379
SHARED = "shared"  # CLUSTER_ADDRESS: agents reach this gateway by the common address only
NAME = "gotunnel"  # CLUSTER_NAME, if it is unset
MOST_KEYS = 2  # in CLUSTER_KEY: the one in use, and the one before or after it
KEY_SIZE = 32  # bytes of a Fernet key
EXAMPLE = "redis://redis.example.com:6379/0"
_SCHEME = re.compile(r"(redis|valkey)(s?)(\+sentinel|\+cluster)?://(.*)", re.DOTALL)
_KINDS = {None: ONE, "+sentinel": SENTINEL, "+cluster": NODES}


class SettingsError(ValueError):
    """A setting is wrong; the text, behind its name, says what came and what was expected."""


@dataclass(frozen=True)
class Address:
    """Where Redis is. ``hosts``: of the server, of the Sentinels or of some nodes; none for a Unix
    socket, which is at ``path``. ``master``: the name that Sentinels know the server by."""

    kind: str
    tls: bool = False
    hosts: tuple[tuple[str, int], ...] = ()
    path: str = ""
    master: str = ""
    db: int = 0
    user: str | None = None
    password: str | None = field(default=None, repr=False)

    def __str__(self) -> str:
        """For logs: without user and password."""
        if self.kind == SOCKET:
            return f"unix:{self.path}"
        hosts = ",".join(_shown(host, port) for host, port in self.hosts)
        if self.kind == SENTINEL:
            return f"{self.master} of the Sentinels {hosts}"
        return hosts


@dataclass(frozen=True)
class Settings:
    """``keys``: Fernet keys, the first one encrypts. ``address``: HOST and PORT by which agents and
    gateways reach this gateway alone; an empty host if that is found out, port 0 for TUNNEL_PORT;
    None if they cannot."""

    redis: Address
    ca_file: str | None = None
    keys: tuple[str, ...] = field(default=(), repr=False)
    name: str = NAME
    address: tuple[str, int] | None = ("", 0)


class Variables(Protocol):
    """What is needed of variables.Variables. Its errors name the variable."""

    secrets: set[str]

    def is_set(self, *names: str) -> bool: ...

    def text(self, name: str) -> str | None: ...

    def secret(self, name: str) -> str | None: ...

    def certificates_file(self, name: str) -> str | None: ...


def read(variables: Variables) -> Settings:
    """The settings; CLUSTER is set. Raises SettingsError, whose text begins with the variable."""
    typed = variables.text("CLUSTER") or ""
    if "@" in typed:
        variables.secrets.add("CLUSTER")
    address = read_url(typed)
    password = variables.secret("CLUSTER_PASSWORD")
    if password is not None:
        if address.password is not None:
            raise SettingsError(
                "CLUSTER has a password, and CLUSTER_PASSWORD is set, too, expected one: remove "
                "the one in the URL"
            )
        address = replace(address, password=password)
    ca_file = variables.certificates_file("CLUSTER_CA_FILE")
    if ca_file is not None and not address.tls:
        raise SettingsError(
            "CLUSTER_CA_FILE is set, but CLUSTER has no TLS, expected a URL that begins with "
            "rediss: correct it, or unset CLUSTER_CA_FILE"
        )
    return Settings(
        address, ca_file, _keys(variables.secret("CLUSTER_KEY")), _name(variables),
        _own_address(variables.text("CLUSTER_ADDRESS")),
    )  # fmt: skip


def read_url(text: str) -> Address:
    """Raises SettingsError, which shows nothing of a URL that may hold a password."""
    found = _SCHEME.fullmatch(text)
    if found is not None:
        tls, kind, rest = bool(found[2]), _KINDS[found[3]], found[4]
    elif text.startswith("unix://"):
        tls, kind, rest = False, SOCKET, text.removeprefix("unix://")
    else:
        raise SettingsError(
            f"CLUSTER is {_shown_url(text)}, expected the URL of a Redis server such as {EXAMPLE}, "
            "rediss://, unix://, redis+sentinel:// or redis+cluster://"
        )
    login, at, place = rest.rpartition("@")
    user, colon, password = login.partition(":")
    who = unquote(user) or None if at else None
    secret = unquote(password) if colon else None
    if kind == SOCKET:
        path, _, query = place.partition("?")
        if not path.startswith("/") or query and not re.fullmatch("db=[0-9]{1,4}", query):
            raise SettingsError(
                "CLUSTER is no unix URL, expected one such as unix:///run/redis/redis.sock?db=0"
            )
        return Address(kind, path=unquote(path), db=int(query[3:] or 0), user=who, password=secret)
    hosts, _, path = place.partition("/")
    default = SENTINEL_PORT if kind == SENTINEL else REDIS_PORT
    found_hosts = tuple(_host(each, default, kind) for each in hosts.split(","))
    parts = path.split("/") if path else []
    master = unquote(parts.pop(0)) if kind == SENTINEL and parts else ""
    if kind == SENTINEL and not master:
        raise SettingsError(
            "CLUSTER names no master, expected "
            "redis+sentinel://host1:26379,host2:26379/MASTER, with the name that the Sentinels "
            "know it by"
        )
    if kind == ONE and len(found_hosts) > 1:
        raise SettingsError(
            "CLUSTER names several servers, expected one; several are for redis+sentinel:// or "
            "redis+cluster://"
        )
    db = parts.pop(0) if parts and kind != NODES else "0"
    if parts or not re.fullmatch("[0-9]{1,4}", db):
        raise SettingsError(
            "CLUSTER ends with a path that is no number of a database, expected one such as "
            f"{EXAMPLE}; redis+cluster:// has none"
        )
    return Address(kind, tls, found_hosts, master=master, db=int(db), user=who, password=secret)


def _host(text: str, default: int, kind: str) -> tuple[str, int]:
    host, port = _split(text, default)
    if host is None or port is None:
        # Not shown: a password with an @ or a / of its own may be cut here.
        raise SettingsError(
            f"CLUSTER holds no HOST:PORT where one is expected, as in {EXAMPLE}; write IPv6 "
            "addresses in brackets, and in a password %40 for @, %2F for /, %3A for :"
        )
    return host, port


def _split(text: str, default: int) -> tuple[str | None, int | None]:
    """HOST, HOST:PORT or [IPv6]:PORT; None for what is wrong."""
    # Names of containers may have underscores.
    found = re.fullmatch(r"(\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9._-]{1,253})(?::([0-9]{1,5}))?", text)
    if found is None or not valid_host(found[1].replace("_", "x")):
        return None, None
    port = default if found[2] is None else whole_number(found[2])
    if port is None or not 0 < port <= MAX_PORT and found[2] is not None:
        return None, None
    return found[1].strip("[]"), port


def _keys(text: str | None) -> tuple[str, ...]:
    """CLUSTER_KEY: a Fernet key a line."""
    make = "make one by: gotunnel-server cluster-key > FILE, the same for all gateways"
    if text is None:
        raise SettingsError(
            "CLUSTER_KEY_FILE is not set, expected a file with the key that encrypts what the "
            f"gateways share: {make}"
        )
    keys = tuple(text.replace(",", " ").split())
    if len(keys) > MOST_KEYS:
        raise SettingsError(
            f"CLUSTER_KEY_FILE holds {len(keys)} keys, expected one, or two while they are changed"
        )
    for number, key in enumerate(keys, start=1):
        try:
            size = len(base64.b64decode(key.translate(_URL_SAFE), validate=True))
        except (binascii.Error, ValueError):
            size = 0
        if size != KEY_SIZE:
            raise SettingsError(
                f"CLUSTER_KEY_FILE: key {number} is none, expected 44 characters of base64url: "
                f"{make}"
            )
    return keys


_URL_SAFE = str.maketrans("-_", "+/")


def _name(variables: Variables) -> str:
    name = variables.text("CLUSTER_NAME") or NAME
    if not re.fullmatch(r"[A-Za-z0-9_.-]{1,64}", name):
        raise SettingsError(
            f"CLUSTER_NAME is {name[:100]!r}, expected up to 64 letters, digits, and _ . -"
        )
    return name


def _own_address(text: str | None) -> tuple[str, int] | None:
    if text is None:
        return "", 0
    if text.lower() == SHARED:
        return None
    host, port = _split(text, 0)
    if host is None or port is None:
        raise SettingsError(
            f"CLUSTER_ADDRESS is {text[:300]!r}, expected HOST or HOST:PORT by which agents and "
            f"gateways reach this gateway alone, or {SHARED}; IPv6 addresses in brackets"
        )
    return host, port


def _shown(host: str, port: int) -> str:
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def _shown_url(text: str) -> str:
    """What can be shown of a text that may hold a password, or be one: how it begins, at most."""
    scheme = re.match(r"[A-Za-z][A-Za-z0-9+.-]{0,30}://", text)
    return "no URL" if scheme is None else f"a URL that begins with {scheme[0]}"
