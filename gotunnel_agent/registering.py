"""What an agent asks of a gateway, and what it makes of the answer."""

from __future__ import annotations

import re
import secrets
from collections.abc import Iterable, Mapping
from importlib import import_module
from time import time
from typing import NamedTuple

from gotunnel import (
    ANY_PORT,
    CERTIFICATES,
    HALF_CLOSE,
    HEALTH,
    LATER_PORTS,
    MEMBERS,
    NAMES,
    OVERLAP,
    PARTIAL,
    PORTS,
    REASONS,
    REFUSALS,
    UPGRADES,
    URLS,
    WAITS,
    Ack,
    Register,
)

from .common.hostnames import OPEN, normal_hostname, valid_host, valid_hostname
from .common.one_line import on_one_line, words_on_one_line
from .config import Config, Tunnel
from .target import Route

NO_NAMES = (
    "this gateway cannot complete names such as quick-otter.*: update it, or ask for a whole "
    "hostname"
)
TAKEN = "host already registered"  # how such a refusal begins, also a Go gateway's
INVALID = "invalid hostname"  # likewise; a gateway that knows no open names takes them for such
# Beginnings of refusals that may end by themselves, or by what the gateway's operator does.
FOR_NOW = (TAKEN, "not allowed", "too many hostnames")
# A public address: scheme, perhaps a wildcard, host and port.
_ADDRESS = re.compile(r"(?:https?|tls|tcp)://(?:\*\.)?(?P<host>[^/?#@\s]+)/?")
MOST_URL = 300  # characters of a public address: the longest hostname, a scheme and a port
LEAST_KEY = 32  # bytes of a secret for HS256 (RFC 7518 §3.2)


class Answer(NamedTuple):
    """What an ack grants. ``routes`` are by hostname, those with a problem included. ``ports`` are
    the public ports that were opened for them. ``refused``: the gateway's reasons, by hostname of
    the configuration."""

    routes: dict[str, Route]
    ports: dict[str, str]
    refused: dict[str, str]


def registration(
    config: Config, instance: str, waits: bool = False, opened: Iterable[Mapping[str, str]] = ()
) -> Register:
    """The registration of all tunnels of ``config``. ``instance``: see Register. ``waits``: if it
    gets no hostname for now, its session may wait. ``opened``: the public ports that other gateways
    have opened for it, by hostname. Of gateways that are one, each is asked for the same ones, so
    that a tunnel has one public address."""
    needs = {feature for tunnel in config.tunnels for feature in tunnel.needs}
    later = (LATER_PORTS,) if PORTS in needs else ()
    health = (HEALTH,) if any(tunnel.health for tunnel in config.tunnels) else ()
    return Register(
        token=config.token
        or make_token(config.jwt_secret, config.jwt_issuer, config.jwt_expire_sec),
        routes=config.routes(),
        modes=config.modes(),
        features=(
            CERTIFICATES,
            HALF_CLOSE,
            REASONS,
            UPGRADES,
            REFUSALS,
            OVERLAP,
            URLS,
            PARTIAL,
            MEMBERS,
            *later,
            *health,
            *((WAITS,) if waits else ()),
            *sorted(needs),
        ),  # fmt: skip
        host_headers=config.host_headers(),
        protocols=config.protocols(),
        ports={name: _same_port(name, port, opened) for name, port in config.ports().items()},
        addressed=config.addressed(),
        policies=config.policies(),
        pools=config.pools(),
        instance=instance,
    )


def _same_port(name: str, port: str, opened: Iterable[Mapping[str, str]]) -> str:
    if port != ANY_PORT:
        return port
    hostname = normal_hostname(name)
    label = hostname.removesuffix("*") if hostname.endswith(OPEN) else ""
    for ports in opened:
        for given, number in ports.items():
            if number and (given == hostname or label and given.startswith(label)):
                return number
    return port


def read_answer(asked: Mapping[str, Route], ack: Ack) -> Answer:
    """Mark the tunnels that the gateway cannot serve as configured. Their visits are turned
    away: a password that the gateway does not check must not look like one that it checks."""
    routes = {}
    ports: dict[str, str] = {}
    refused: dict[str, str] = {}
    denied = ack.denied if PARTIAL in ack.features else {}
    urls = ack.urls if URLS in ack.features else {}
    for name, route in asked.items():
        if name in denied:
            refused[name] = words_on_one_line(denied[name])
            continue
        tunnel = route.tunnel
        missing = [feature for feature in tunnel.needs if feature not in ack.features]
        hostname = _granted(tunnel, ack)
        problem = _unknown(missing) or ack.refused.get(name, "")
        if not problem and hostname is None:
            problem = "the gateway has not said which hostname it gives"
        elif not problem and tunnel.port and name not in ack.ports:
            problem = "the gateway has opened no public port for it, and gave no reason"
        hostname = hostname or name
        if not problem and tunnel.port:
            ports[hostname] = on_one_line(ack.ports[name], 5)
        routes[hostname] = route._replace(
            tunnel=tunnel._replace(hostname=hostname),
            problem=problem,
            awaits_port=bool(problem) and not missing and LATER_PORTS in ack.features,
            refusals=REFUSALS in ack.features,
            url="" if problem else url_of(urls.get(name, "")),
        )
    return Answer(routes, ports, refused)


def _unknown(missing: list[str]) -> str:
    """Why a tunnel is not served whose gateway does not know features that it needs; "" if it knows
    them."""
    if NAMES in missing:
        return NO_NAMES
    if not missing:
        return ""
    names = ", ".join(missing)
    return (
        f"this gateway does not know {names}; update the gateway, or remove the keys that need it"
    )


def _granted(tunnel: Tunnel, ack: Ack) -> str | None:
    """The hostname that a tunnel has; None if the gateway has not said what it made of an open
    name."""
    if not tunnel.hostname.endswith(OPEN) or NAMES not in ack.features:
        return normal_hostname(tunnel.hostname)
    hostname = normal_hostname(ack.names.get(tunnel.hostname, ""))
    return hostname if valid_hostname(hostname) else None


def in_wait(hostnames: str) -> str:
    """What to say of hostnames that are refused for now, if the gateway tells when they are free
    (feature WAITS)."""
    return f"waits for {hostnames}, which another agent serves"


def url_of(text: str) -> str:
    """A public address from the gateway; "" if it is none. People copy it, and commands that are
    made of it, into a shell."""
    if len(text) > MOST_URL or (match := _ADDRESS.fullmatch(text)) is None:
        return ""
    return text if valid_host(match["host"]) else ""


def make_token(secret: str, issuer: str, lifetime: int) -> str:
    """A JWT as Go agents send it: HS256, with iss, iat and exp. ``lifetime`` is in seconds."""
    # Loaded here, as an agent that was given a token has no use for it: PyJWT takes 3 MB, and 13 MB
    # where cryptography is installed.
    jwt = import_module("jwt")
    now = int(time())
    # PyJWT warns of a shorter secret, which only the gateway's operator can change. HMAC pads it
    # with zeros anyway (RFC 2104 §2), so the signature is the same.
    key = secret.encode().ljust(LEAST_KEY, b"\0")
    made: str = jwt.encode({"iss": issuer, "iat": now, "exp": now + lifetime}, key, "HS256")
    return made


def new_instance() -> str:
    """A random id that no other agent process has."""
    return secrets.token_hex(16)
