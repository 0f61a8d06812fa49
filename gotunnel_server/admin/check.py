"""The command `check`: whether a gateway could start here; a Finding for each thing it needs.

It changes nothing: no order, no account, no folder. It writes a probe into each folder that has to
be writable, and removes it. It may run beside a gateway.
"""

from __future__ import annotations

import base64
import contextlib
import errno
import http.client
import ipaddress
import json
import os
import resource
import socket
import ssl
import stat
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from datetime import datetime, timezone
from email.utils import parsedate_to_datetime
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, TextIO

from gotunnel import ACK, ANY_PORT, MAX_UINT32, PING, SYN, Header
from gotunnel_agent.common import packages, status_socket
from gotunnel_agent.common.hostnames import valid_hostname
from gotunnel_agent.common.metrics_page import NO_SUCH_PAGE
from gotunnel_agent.common.one_line import MOST_NAMED, on_one_line, some

from ..agents import agents_file
from ..agents.credentials import lapsed
from ..capacity import VISITORS_SHARE
from ..certs.local_ca import FOLDER as LOCAL_FOLDER
from ..certs.local_ca import CertificateError, read_pair
from ..certs.schedule import CLOCK_OFF, CLOCK_WRONG
from ..certs.store import PROBE_BYTES, StoreError, ca_id
from ..config import DIRECTORIES, OFF, Config
from ..net.dns import is_always_here, is_own, own_addresses, resolve
from ..net.listener import PortError, bind
from ..secret_files import exposed
from ..visitors.log_file import STANDARD_OUTPUT
from .certificates import one_line, opened, ordered_rows, pauses, read_pairs, utc

if TYPE_CHECKING:
    from ..cluster.settings import Settings

OK, WARN, FAIL = "ok", "warn", "fail"
COLOURS = {OK: "32", WARN: "33", FAIL: "31"}  # green, yellow, red, as terminals number them

NETWORK_TIMEOUT = 10.0  # seconds of silence in a request to the CA, which usually answers in one
PATIENCE = 15.0  # seconds for the CA's whole answer, since the operator waits for it
MOST_BYTES = 64 * 1024  # of an answer; a CA's directory has about one KiB, a gateway's ping less
# Seconds for a gateway on this machine to show that it is one.
PROBE_TIMEOUT = 2.0
HTTP, HTTPS = 80, 443  # the only ports that a CA validates at (RFC 8555 §8.3, RFC 8737 §3)
SLOW_REDIS = 0.1  # seconds for an answer of Redis
# Ports of TCP_PORTS that are tried, which may be all 65535: one takes some 50 us.
MOST_TRIED = 10_000
# What a CA's directory must name for an order (RFC 8555 §7.1.1).
RESOURCES = ("newNonce", "newAccount", "newOrder")
# A reserved name that no agent has (RFC 6761 §6.4): a gateway answers with an error of its own.
UNKNOWN_HOST = "check.invalid"


class Finding(NamedTuple):
    """The result of a check: OK, WARN or FAIL. ``text`` says what was found and, unless it is OK,
    what to do."""

    level: str
    subject: str
    text: str


def run_check(config: Config, out: TextIO) -> int:
    """Print each finding at once; return the exit status: 1 if anything failed."""
    failed = 0
    for finding in examine(config):
        failed += finding.level == FAIL
        print(finding_line(finding, colour=out.isatty()), file=out, flush=True)
    return 1 if failed else 0


def finding_line(finding: Finding, *, colour: bool) -> str:
    level = f"{finding.level:4}"
    if colour:
        level = f"\x1b[{COLOURS[finding.level]}m{level}\x1b[0m"
    return f"{level}  {finding.subject}: {finding.text}"


def examine(config: Config) -> Iterable[Finding]:
    """All checks."""
    came_from = config.env_file or "the environment alone, there is no .env"
    yield Finding(OK, "configuration", f"read and understood, from {came_from}")
    if config.env_file is not None:
        yield from look_at_env_file(config.env_file)
    yield from look_at_reach(config)
    if config.agents_file is not None:
        yield from look_at_agents(config.agents_file, config.jwt_secret is not None)
    for warning in config.warnings:
        yield Finding(WARN, "configuration", warning)
    for line in exposed(config):
        yield Finding(WARN, "secrets", line)
    yield look_at_packages(packages.of_gateway(orders=config.acme is not None))
    yield look_at_descriptors(config.max_connections)
    for setting, port, tls_name in (
        ("GATEWAY_PORT", config.gateway_port, config.gateway_host),
        ("TUNNEL_PORT", config.tunnel_port, config.tunnel_host),
        ("DASHBOARD_PORT", config.dashboard_port, None),
        ("HTTP_PORT", config.http_port, None),
        ("METRICS_PORT", config.metrics_port, None),
    ):
        own = {"DASHBOARD_PORT": config.dashboard_bind, "METRICS_PORT": config.metrics_bind}
        yield look_at_port(setting, own.get(setting, config.bind), port, tls_name)
    yield from look_at_tcp_ports(config)
    if config.dashboard_port is not None:
        yield judge_dashboard(config.dashboard_bind, config.dashboard_password is not None)
    yield look_at_name("GATEWAY_HOST", config.gateway_host)
    if config.tunnel_host != config.gateway_host:
        yield look_at_name("TUNNEL_HOST", config.tunnel_host)
    yield from look_at_cache(config)
    yield look_at_access_log(config.access_log)
    if config.pages_dir is not None:
        yield look_at_pages(config.pages_dir, config.templates)
    yield look_at_status_socket(config.status_socket, config.acme_cache)
    yield from look_at_pairs(config.cert_dir)
    yield from look_at_own_names(config)
    yield from look_at_waiting(config)
    if config.cluster is not None:
        yield from look_at_cluster(config.cluster)
    if config.acme is None:
        yield Finding(OK, "directory", "not used: no certificate is ordered")
    else:
        yield from look_at_directory(config.acme.directory, config.acme.ca_file)


def look_at_packages(needed: Iterable[packages.Package]) -> Finding:
    """Whether the Python packages are there, and new enough."""
    if lacking := packages.faults(needed):
        return Finding(FAIL, "packages", packages.explain(lacking))
    return Finding(OK, "packages", "all that is needed is there, in fitting versions")


def look_at_agents(path: Path, has_jwt_secret: bool = False) -> Iterable[Finding]:
    """Whether AGENTS_FILE can be used, and whether any agent can register."""
    try:
        agents = agents_file.read(path)
    except agents_file.AgentsFileError as error:
        yield Finding(FAIL, "AGENTS_FILE", str(error).removeprefix("AGENTS_FILE "))
        return
    yield Finding(OK, "AGENTS_FILE", f"{path}, agents in it: {len(agents.entries)}")
    for warning in agents.warnings:
        yield Finding(WARN, "AGENTS_FILE", warning.removeprefix("AGENTS_FILE").lstrip(": "))
    gone = [name for name, entry in agents.entries.items() if lapsed(entry)]
    expired = [name for name in gone if not agents.entries[name].disabled]
    if expired:
        yield Finding(WARN, "AGENTS_FILE", f"expired: {some(expired)}; remove them, or give them "
                      "another end (expires)")  # fmt: skip
    if len(gone) == len(agents.entries) and not has_jwt_secret:
        yield Finding(WARN, "AGENTS_FILE", "no agent can register: no entry in it is active, "
                      "and JWT_SECRET is not set; see: gotunnel-server agents "
                      "add")  # fmt: skip


def look_at_env_file(path: str) -> Iterable[Finding]:
    """Whether others can change the settings. Secrets in the file: see exposed()."""
    with contextlib.suppress(OSError):
        found = os.stat(path)
        if stat.S_ISREG(found.st_mode) and found.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
            mode = f"{stat.S_IMODE(found.st_mode):04o}"
            yield Finding(WARN, "configuration", f"{path} has mode {mode}: others can "
                          f"change the gateway's settings; chmod go-w {path}")  # fmt: skip


def look_at_reach(config: Config) -> Iterable[Finding]:
    """Whether visitors, agents and the CA can reach a gateway whose names are for the world."""
    public = [name for name in (config.gateway_host, config.tunnel_host) if not is_here(name)]
    if not public:
        return
    for setting, name in (
        ("GATEWAY_HOST", config.gateway_host),
        ("TUNNEL_HOST", config.tunnel_host),
        ("RAW_TCP_HOST", config.raw_tcp_host),
        *(("H2C_HOSTS", name) for name in config.h2c_hosts),
        *_hosts_of_agents(config.agents_file),
    ):
        if name is not None and is_here(name):
            yield Finding(WARN, setting, f"{name} is this machine for everybody, beside "
                          f"{public[0]} for the world: an example's that was left over? Set a name "
                          "that leads here from elsewhere")  # fmt: skip
    if config.bind and all(map(is_here, config.bind)) and not config.trusted_proxies:
        yield Finding(WARN, "BIND", f"{', '.join(config.bind)} is for this machine alone, so from "
                      f"elsewhere {public[0]} reaches nothing, nor does a CA: unset BIND, or name "
                      "a proxy on this machine in TRUSTED_PROXIES")  # fmt: skip
    http, https = config.http_port, config.gateway_port
    is_led_there = config.public_port == HTTPS  # the operator says so
    if config.acme is not None and http != HTTP and https != HTTPS and not is_led_there:
        yield Finding(WARN, "orders", f"a CA comes to port {HTTP} or port {HTTPS} alone, and "
                      f"HTTP_PORT is {_shown_port(http)}, GATEWAY_PORT {_shown_port(https)}: unset "
                      f"one of them, or have port {HTTP} of the public address lead to HTTP_PORT, "
                      f"or {HTTPS} to GATEWAY_PORT (and say so by "
                      f"PUBLIC_PORT={HTTPS})")  # fmt: skip


def _hosts_of_agents(path: Path | None) -> Iterable[tuple[str, str]]:
    """What agents may claim, each with the setting; none if the file cannot be read, which
    look_at_agents() reports."""
    if path is not None:
        with contextlib.suppress(agents_file.AgentsFileError):
            for name, entry in agents_file.read(path).entries.items():
                yield from ((f"AGENTS_FILE, {on_one_line(name, 60)}", host) for host in entry.hosts)


def is_here(name: str) -> bool:
    """Whether a hostname, a pattern of them or an IP address means this machine for everybody."""
    with contextlib.suppress(ValueError):
        return ipaddress.ip_address(name).is_loopback
    return is_always_here(name)


def _shown_port(port: int | None) -> str:
    return "off" if port is None else str(port or ANY_PORT)


def look_at_descriptors(max_connections: int) -> Finding:
    """Whether the limit of open files suffices for MAX_CONNECTIONS."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)  # the gateway raises its own to this
    most = MAX_UINT32 if most == resource.RLIM_INFINITY else most
    visitors = int(most * VISITORS_SHARE)
    if visitors >= max_connections:
        return Finding(OK, "MAX_CONNECTIONS", f"{max_connections}; the limit of open files is fine")
    return Finding(
        WARN, "MAX_CONNECTIONS",
        f"{max_connections}, but of {most} descriptors only {visitors} are for visitors: raise "
        "the limit (ulimit -n)")  # fmt: skip


# Redis


def look_at_cluster(settings: Settings) -> Iterable[Finding]:
    """Whether Redis can be used. A key is written there, for a second."""
    # Loaded here: it needs the package redis.
    engine = import_module("gotunnel_server.cluster.engine").Engine(settings)
    try:
        took = engine.time()
        yield Finding(OK, "CLUSTER", f"{engine.version()} at {settings.redis} answers, in "
                      f"{1000 * took:.1f} ms")  # fmt: skip
        if took > SLOW_REDIS:
            yield Finding(WARN, "CLUSTER", "that is slow: a lease is renewed every second, and "
                          "lasts 4 seconds; take a server that is nearer")  # fmt: skip
        yield from (Finding(WARN, "CLUSTER", text) for text in engine.flaws())
        engine.try_out(settings.name)
        yield look_at_cluster_key(settings, engine.call)
    except OSError as error:
        text = error.strerror or str(error)
        remedy = "correct CLUSTER or CLUSTER_PASSWORD, or start the server"
        if "certificate" in text:
            remedy = "CLUSTER must name the server as its certificate does, CLUSTER_CA_FILE its CA"
        elif "permissions" in text or "ommand" in text:
            mine = f"{{{settings.name}}}*"
            remedy = (f"a gateway needs the keys ~{mine}, the channels &{mine}, scripts (EVAL) and "
                      "TIME")  # fmt: skip
        yield Finding(FAIL, "CLUSTER", f"{text}: {remedy}")
        return
    finally:
        engine.close()
    yield look_at_own_address(settings, engine.own_address())


def look_at_cluster_key(settings: Settings, call: Callable[..., object]) -> Finding:
    """Whether it is that of the other gateways. Raises OSError."""
    certificates = import_module("gotunnel_server.cluster.certificates")
    keys = [base64.urlsafe_b64decode(key) for key in settings.keys]
    storage, _ = certificates.open_redis(call, settings.name, keys)
    try:
        storage.check_key()
    except certificates.WrongKey as error:
        return Finding(FAIL, "CLUSTER_KEY_FILE", f"{error.strerror}")
    return Finding(OK, "CLUSTER_KEY_FILE", "no gateway has written with another key")


def look_at_own_address(settings: Settings, found: str | None) -> Finding:
    """How agents and gateways reach this gateway alone. ``found``: see Engine.own_address()."""
    if settings.address is None:
        text = "shared: agents dial the common address until they have reached each gateway"
        return Finding(OK, "CLUSTER_ADDRESS", text)
    host = settings.address[0] or found
    if not settings.address[0] and (host is None or is_here(host)):
        return Finding(WARN, "CLUSTER_ADDRESS", "Redis is on this machine, so it cannot be found "
                       "out how others reach the gateway: set CLUSTER_ADDRESS")  # fmt: skip
    return Finding(OK, "CLUSTER_ADDRESS", f"agents and gateways dial {host}")


# Ports


def look_at_port(
    setting: str, addresses: Sequence[str], port: int | None, tls_name: str | None
) -> Finding:
    """Whether a port (0: any, None: off) can be listened on; if a gateway has it, that is a
    warning. ``tls_name`` is the hostname to ask for by TLS, None on a port without TLS."""
    if port is None:
        return Finding(OK, setting, "off")
    if port == 0:
        return Finding(OK, setting, "any free port")
    try:
        for sock in bind(setting, addresses, port):
            sock.close()
    except PortError as error:
        address = addresses[0] if addresses else "127.0.0.1"
        if is_own(address) and _is_gotunnel(setting, address, port, tls_name):
            return Finding(
                WARN, setting,
                f"{port} is in use by a running gotunnel gateway: stop it before you start "
                "another")  # fmt: skip
        return Finding(FAIL, setting, str(error).removeprefix(f"{setting} "))
    return Finding(OK, setting, f"{port} is free")


def look_at_tcp_ports(config: Config) -> Iterable[Finding]:
    """Which of TCP_PORTS are taken. The gateway's own ports are in config.warnings."""
    own = {config.gateway_port, config.tunnel_port, config.dashboard_port, config.http_port,
           config.metrics_port}  # fmt: skip
    ports = sorted({port for ports in config.tcp_ports for port in ports} - own)
    if not ports:
        return
    problems: dict[str, list[int]] = {}  # the ports by reason
    for port in ports[:MOST_TRIED]:
        try:
            for sock in bind("TCP_PORTS", config.bind, port):
                sock.close()
        except PortError as error:
            problems.setdefault(str(error).partition(": ")[2], []).append(port)
    for why, taken in problems.items():
        why = why.replace(", another program listens", ", another program, or an agent's tunnel,")
        yield Finding(WARN, "TCP_PORTS", f"{some(map(str, taken))}: {why}")
    if not problems:
        tried = "" if len(ports) <= MOST_TRIED else f", of which the first {MOST_TRIED} were tried"
        yield Finding(OK, "TCP_PORTS", f"{len(ports)} ports are free{tried}")


def _is_gotunnel(setting: str, address: str, port: int, tls_name: str | None) -> bool:
    """Whether the program that listens there answers as a gateway: to a ping of the multiplexer, or
    to a request for a hostname, or a page, that it does not know."""
    host = "localhost" if setting == "METRICS_PORT" else UNKNOWN_HOST
    question = f"GET / HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n".encode()
    expected = b"\r\nx-gotunnel-error:"
    if setting == "METRICS_PORT":
        expected = NO_SUCH_PAGE.lower().encode()
    elif setting == "TUNNEL_PORT":
        question, expected = Header(PING, SYN, 0, 1).encode(), Header(PING, ACK, 0, 1).encode()
    answer, deadline = b"", time.monotonic() + PROBE_TIMEOUT
    try:
        with contextlib.ExitStack() as open_ones:
            sock = socket.create_connection((address, port), PROBE_TIMEOUT)
            open_ones.callback(sock.close)
            if tls_name is not None:
                sni = tls_name if valid_hostname(tls_name) else None
                sock = _unverified_context().wrap_socket(sock, server_hostname=sni)
                open_ones.callback(sock.close)
            sock.sendall(question)
            while len(answer) < MOST_BYTES and time.monotonic() < deadline:
                data = sock.recv(4096)
                answer += data.lower()
                if expected in answer:
                    return True
                if not data:
                    break
    except ssl.SSLError as error:  # most likely a gateway without a certificate for the name
        return error.reason == "TLSV1_UNRECOGNIZED_NAME"
    except OSError:  # it speaks something else, or nothing
        pass
    return False


def _unverified_context() -> ssl.SSLContext:
    """A context that verifies nothing: we send no secret, and only ask which program it is."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    return context


def judge_dashboard(bind_to: Sequence[str], has_password: bool) -> Finding:
    """From where the dashboard can be seen, on these addresses (none: all of them)."""
    found = [ipaddress.ip_address(address) for address in bind_to]
    if found and all(address.is_loopback for address in found):
        who = "everybody on this machine"
    else:
        everywhere = not found or any(address.is_unspecified for address in found)
        on = "any address of this machine" if everywhere else ", ".join(bind_to)
        who = f"everybody that reaches {on}"
    if has_password:
        return Finding(OK, "dashboard", f"{who} is asked for its password, which plain HTTP sends "
                       "unencrypted; /dashboard/ of GATEWAY_HOST has TLS")  # fmt: skip
    if who.endswith("on this machine"):
        return Finding(OK, "dashboard", f"{who} sees the hostnames and modes")
    return Finding(
        WARN, "dashboard", f"{who} sees all hostnames and modes: set DASHBOARD_PASSWORD, "
        "DASHBOARD_BIND=127.0.0.1, or DASHBOARD_PORT=0")  # fmt: skip


# Names


def look_at_name(setting: str, name: str) -> Finding:
    """Whether a hostname, or an IP address, leads to this machine."""
    if is_always_here(name):
        return Finding(OK, setting, f"{name} is always this machine (RFC 6761)")
    try:
        addresses = resolve(name)
    except OSError as error:
        return Finding(
            FAIL,
            setting,
            f"{name} does not resolve ({error}): point its A or AAAA record at this machine",
        )
    return judge_addresses(
        setting, name, addresses, [a for a in addresses if is_own(a)], own_addresses()
    )


def judge_addresses(
    setting: str, name: str, addresses: list[str], ours: list[str], machine: list[str]
) -> Finding:
    """``addresses`` are the name's, ``ours`` those of them that this machine has, ``machine`` all
    that it has."""
    if ours == addresses:
        return Finding(OK, setting, f"{name} is this machine ({some(addresses)})")
    seen = "" if addresses == [name] else f"{name} is {some(addresses)}; "
    others = some(address for address in addresses if address not in ours)
    return Finding(
        WARN, setting,
        f"{seen}{others} is no address of this machine, which has "
        f"{some(machine) or 'none'}. That is right if a router or provider forwards that "
        "address to this machine (NAT); otherwise correct the DNS record")  # fmt: skip


# The cache


def look_at_cache(config: Config) -> Iterable[Finding]:
    """Whether ACME_CACHE, if it is used, can be written or made."""
    if config.acme is None and not config.local_ca:
        yield Finding(OK, "ACME_CACHE", "not used, CERT_DIR holds all certificates")
        return
    inner = config.acme_cache / (ca_id(config.acme.directory) if config.acme else LOCAL_FOLDER)
    folders = [config.acme_cache, inner, inner / "certs", inner / "locks"]
    try:
        there = [folder for folder in folders if folder.exists()]
    except PermissionError as error:
        yield Finding(FAIL, "ACME_CACHE", f"{error.filename}: {error.strerror}, run this as the "
                      "gateway's user")  # fmt: skip
        return
    if not there:
        parent = next(path for path in config.acme_cache.absolute().parents if path.exists())
        if os.access(parent, os.W_OK | os.X_OK):
            yield Finding(OK, "ACME_CACHE", f"{config.acme_cache} is missing, it will be made")
        else:
            yield Finding(FAIL, "ACME_CACHE", f"{config.acme_cache} is missing and cannot be "
                          f"made in {parent}: make it, owned by the gateway's user")  # fmt: skip
        return
    findings = [finding for folder in there for finding in look_at_folder("ACME_CACHE", folder)]
    ca = [inner / "ca.crt", inner / "ca.key"]
    if config.local_ca and any(file.exists() for file in ca):
        try:
            read_pair(*ca)
        except CertificateError as error:
            findings.append(Finding(FAIL, "ACME_CACHE", f"{error}; restore ca.crt and ca.key from "
                                    "a copy, or remove both to get a new CA"))  # fmt: skip
    yield from findings or [Finding(OK, "ACME_CACHE", f"{config.acme_cache} can be written")]


def look_at_access_log(path: str) -> Finding:
    """Whether the file of ACCESS_LOG can be opened, or made. It is not made."""
    setting = "ACCESS_LOG"
    if path in (OFF, STANDARD_OUTPUT):
        return Finding(OK, setting, "off" if path == OFF else "standard output")
    try:
        with open(path, "ab", opener=_open_what_is_there):
            return Finding(OK, setting, f"{path} can be written")
    except FileNotFoundError:
        folder = os.path.dirname(os.path.abspath(path))
        if os.access(folder, os.W_OK | os.X_OK):
            return Finding(OK, setting, f"{path} is missing, it will be made")
        why = (f"its folder {folder} cannot be written" if os.path.isdir(folder) else
               f"there is no folder {folder}")  # fmt: skip
    except OSError as error:
        if error.errno == errno.ENXIO:
            return Finding(WARN, setting, f"{path} is a pipe that no program reads: lines wait, "
                           "and are lost if no reader comes")  # fmt: skip
        why = error.strerror or str(error)
    return Finding(FAIL, setting, f"{path} cannot be opened ({why}): name a file in a folder that "
                   "exists and can be written by the gateway's user")  # fmt: skip


def _open_what_is_there(path: str, flags: int) -> int:
    return os.open(path, flags & ~os.O_CREAT | os.O_NONBLOCK)  # a pipe's reader is not waited for


def look_at_pages(folder: str, templates: Iterable[str]) -> Finding:
    """Whose error pages those in PAGES_DIR are. They were read with the configuration."""
    mode = os.stat(folder).st_mode
    if mode & stat.S_IWOTH:
        return Finding(WARN, "PAGES_DIR", f"{folder} has mode {stat.S_IMODE(mode):04o}: everybody "
                       f"on this machine can put pages there; chmod o-w {folder}")  # fmt: skip
    return Finding(OK, "PAGES_DIR", f"{folder}, pages in it: {some(sorted(templates)) or 'none'}")


def look_at_status_socket(path: Path | None, cache: Path) -> Finding:
    """Whether `gotunnel-server status` could be answered. The gateway starts in any case."""
    setting = "STATUS_SOCKET"
    if path is None:
        return Finding(OK, setting, "off")
    why = status_socket.why_not(str(path))
    with contextlib.suppress(FileNotFoundError, PermissionError):
        if not why and not stat.S_ISSOCK(path.lstat().st_mode):
            why = "this is a file, and no socket"
    folder = path.absolute().parent
    will_be_made = folder == cache.absolute() and not folder.exists()
    if not why and not will_be_made and not os.access(folder, os.W_OK | os.X_OK):
        why = f"{folder} is no folder that can be written"
    if why:
        return Finding(WARN, setting, f"{path}: {why}; the gateway starts, and gotunnel-server "
                       "status gets no answer: name another path")  # fmt: skip
    return Finding(OK, setting, str(path))


def look_at_folder(setting: str, folder: Path) -> Iterable[Finding]:
    """The faults of a folder that the gateway has to write; none if there is no fault."""
    try:
        with tempfile.NamedTemporaryFile(dir=folder, prefix=".check-", suffix=".tmp") as probe:
            probe.write(os.urandom(PROBE_BYTES))
            probe.flush()
        found = folder.stat()
    except OSError as error:
        yield Finding(FAIL, setting, f"{folder}: {error.strerror}, expected a folder that the "
                      "gateway can write: change its owner, make room, or name "
                      "another")  # fmt: skip
        return
    if found.st_uid != os.geteuid():
        yield Finding(WARN, setting, f"{folder} belongs to user {found.st_uid}, and this check "
                      f"runs as {os.geteuid()}: run it, and the gateway, as the owner")  # fmt: skip
    if found.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        yield Finding(WARN, setting, f"{folder} has mode {stat.S_IMODE(found.st_mode):04o}: others "
                      f"can put keys of theirs there; chmod go-w {folder}")  # fmt: skip


# CERT_DIR


def look_at_pairs(folder: Path | None) -> Iterable[Finding]:
    """Each pair in CERT_DIR. An unusable one fails, unless another pair serves its names."""
    if folder is None:
        yield Finding(OK, "CERT_DIR", "not used")
        return
    try:
        cert_dir = read_pairs(folder)
    except CertificateError as error:
        yield Finding(FAIL, "CERT_DIR", str(error))
        return
    now = datetime.now(timezone.utc)
    for pair in sorted(cert_dir.report.pairs):
        file = os.path.relpath(pair.certificate_file, folder)
        names = some(sorted(pair.names))
        if pair.begins <= now < pair.ends:
            days = (pair.ends - now).days
            yield Finding(OK, "CERT_DIR", f"{file}: {names}, {days} days left")
            continue
        dates = (f"expired on {pair.ends:%Y-%m-%d}: put a renewed one in its place"
                 if pair.ends <= now else
                 f"is valid from {pair.begins:%Y-%m-%d} on: if that date has passed, set this "
                 "machine's clock")  # fmt: skip
        others = all(covers(cert_dir.served.valid, name) for name in pair.names)
        yield Finding(WARN if others else FAIL, "CERT_DIR", f"{file}: {names} {dates}"
                      + "; another pair serves these names now" * others)  # fmt: skip
    yield from (Finding(FAIL, "CERT_DIR", remark) for remark in cert_dir.report.broken)
    yield from (Finding(WARN, "CERT_DIR", remark) for remark in cert_dir.report.remarks)


def covers(names: Container[str], hostname: str) -> bool:
    """Whether ``names`` contain a hostname, or its wildcard (RFC 9525 §6.3)."""
    return hostname in names or "*." + hostname.partition(".")[2] in names


def look_at_own_names(config: Config) -> Iterable[Finding]:
    """Whether the gateway's own names have a certificate, or can get one."""
    given: Mapping[str, object] = {}
    if config.cert_dir is not None:
        with contextlib.suppress(CertificateError):  # look_at_pairs() has reported it
            given = read_pairs(config.cert_dir).served.valid
    failed = {}
    if config.acme is not None:
        # look_at_cache() and look_at_cluster() have reported it
        with contextlib.suppress(StoreError), opened(config) as place:
            failed = {row.name: row.error
                      for row in ordered_rows(place, config.acme.directory)
                      if row.ends_at is None and row.error}  # fmt: skip
    for name in dict.fromkeys((config.gateway_host, config.tunnel_host)):
        if covers(given, name):
            yield Finding(OK, "certificates", f"{name}: in CERT_DIR")
        elif config.local_ca:
            yield Finding(OK, "certificates", f"{name}: by a local CA, for trials")
        elif name in failed:
            yield Finding(WARN, "certificates", f"{name}: no certificate yet: {failed[name]}")
        elif config.acme and is_here(name) and config.acme.directory in DIRECTORIES.values():
            yield Finding(FAIL, "certificates", f"{name}: no public CA certifies it, since it is "
                          "this machine for everybody: set a name of your own domain, or "
                          "ACME_ENV=local for a trial")  # fmt: skip
        elif config.acme and valid_hostname(name):
            yield Finding(OK, "certificates", f"{name}: ordered from {config.acme.directory}")
        elif config.acme:
            yield Finding(FAIL, "certificates", f"{name}: no CA certifies an IP address here: set "
                          "a hostname, or put its certificate into CERT_DIR")  # fmt: skip
        else:
            yield Finding(FAIL, "certificates", f"{name}: CERT_DIR holds no valid one: add it, or "
                          "set ACME_ENV=production to order one")  # fmt: skip


def look_at_waiting(config: Config, clock: Callable[[], float] = time.time) -> Iterable[Finding]:
    """Orders that are delayed, and why: by a refusal of the CA's, and by hostname."""
    if config.acme is None:
        return
    try:
        with opened(config) as place:
            lines = pauses(place, config.acme.directory)
            rows = ordered_rows(place, config.acme.directory)
    except (OSError, StoreError):  # look_at_cache() has reported it
        return
    for line in lines:
        yield Finding(WARN, "orders", line)
    own = (config.gateway_host, config.tunnel_host)
    waiting = [row for row in rows if row.ends_at is None and row.error and row.name not in own]
    for row in waiting[:MOST_NAMED]:
        when = "" if row.renew_at is None or row.renew_at <= clock() else (
            f" (next attempt {utc(row.renew_at)})")  # fmt: skip
        yield Finding(WARN, "orders", f"{row.name}: {one_line(row.error)}{when}")
    if waiting[MOST_NAMED:]:
        yield Finding(WARN, "orders", f"{len(waiting) - MOST_NAMED} more have no certificate yet: "
                      "see gotunnel-server certificates")  # fmt: skip


# The CA


def look_at_directory(
    url: str, ca_file: str | os.PathLike[str] | None, clock: Callable[[], float] = time.time
) -> Iterable[Finding]:
    """Whether a CA answers and speaks ACME, and whether our clock agrees with its clock."""
    try:
        status, date, body = _get(url, ca_file)
    except (OSError, http.client.HTTPException, ValueError) as error:
        reason = getattr(error, "reason", None) or error
        hint = (
            "is its root in ACME_CA_FILE?" if isinstance(reason, ssl.SSLCertVerificationError)
            else "check ACME_DIRECTORY, and this machine's way out (DNS, firewall)"
        )  # fmt: skip
        words = one_line(getattr(reason, "strerror", None) or reason)
        yield Finding(FAIL, "directory", f"{url}: {words}; {hint}")
        return
    if status == 200 and _is_directory(body):
        yield Finding(OK, "directory", f"{url} speaks ACME")
    else:
        words = one_line(body[:80].decode("latin-1")) or "nothing"
        yield Finding(FAIL, "directory", f"{url}: status {status} and {words!r}, expected 200 and "
                      "an ACME directory: correct ACME_DIRECTORY, or wait if the CA is "
                      "down")  # fmt: skip
    yield judge_clock(date, clock())


def _get(url: str, ca_file: str | os.PathLike[str] | None) -> tuple[int, str | None, bytes]:
    """Status, Date and the beginning of the body."""
    context = ssl.create_default_context(cafile=ca_file)
    deadline = time.monotonic() + PATIENCE
    request = urllib.request.Request(url, headers={"User-Agent": "gotunnel"})
    try:
        answer = urllib.request.urlopen(request, timeout=NETWORK_TIMEOUT, context=context)
    except urllib.error.HTTPError as refusal:
        answer = refusal
    with answer:
        body = b""
        while len(body) < MOST_BYTES and (data := answer.read1(MOST_BYTES)):
            body += data
            if time.monotonic() > deadline:
                raise TimeoutError(f"no whole answer within {PATIENCE:.0f} s")
        return answer.status, answer.headers["Date"], body


def _is_directory(body: bytes) -> bool:
    try:
        directory = json.loads(body)
    except (ValueError, RecursionError):
        return False
    return isinstance(directory, dict) and all(
        isinstance(directory.get(name), str) for name in RESOURCES
    )


def judge_clock(date: str | None, now: float) -> Finding:
    """Compare our clock with the Date of an answer that has just come."""
    try:
        off = now - parsedate_to_datetime(date or "").timestamp()
    except (ValueError, TypeError, AttributeError, OverflowError):
        return Finding(OK, "clock", "not compared: the CA's answer has no Date")
    if abs(off) <= CLOCK_OFF:
        return Finding(OK, "clock", "agrees with the CA's")
    side = "ahead of" if off > 0 else "behind"
    level, so = (FAIL, ", nothing is ordered until then") if abs(off) > CLOCK_WRONG else (WARN, "")
    return Finding(
        level, "clock", f"{abs(off):.0f} s {side} the CA's: set this machine's clock{so}"
    )
