"""The agent's configuration: a YAML file in, one frozen ``Config`` out.

The file is a mapping with the keys in ``KEYS``; each item of ``tunnels`` is a mapping with the keys
in ``TUNNEL_KEYS``. ``conf/agent.yaml`` explains them to the operator. Relative paths are relative
to the working folder.

Every value is the text that was typed: ``jwt_secret: 012`` is those three characters, and no
hostname turns into a number or a date. This module decides for each key whether its text is a
number or a boolean.

Any fault is a ``ConfigError``, one line that never shows a secret: the file, the key (items of a
list count from 0), what came, what was expected, and what to do where that is not obvious.
"""

import ipaddress
import json
import os
import re
import socket
import stat
import sys
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from typing import Any, NamedTuple, TypeVar

from gotunnel import (
    ANY_PORT,
    HOST_HEADER,
    HTTP2,
    MESSAGE_LIMIT,
    NAMES,
    POLICIES,
    POOLS,
    PORTS,
    VISITOR_ADDRESS,
    WILDCARDS,
)

from . import mistakes
from .common import addresses, small_file, strict_yaml
from .common.duplex import LEAST_STALL, MOST_STALL, STALL_TIMEOUT
from .common.exposed import shown_path
from .common.hidden import shown
from .common.hostnames import (
    MAX_PORT,
    OPEN,
    WILDCARD,
    normal_hostname,
    valid_host,
    valid_hostname,
    valid_open_name,
    valid_wildcard,
    why_no_hostname,
)
from .common.one_line import without_secrets
from .common.proxy_protocol import VERSIONS
from .common.quantities import MOST_WEIGHT, bytes_of, seconds_of, whole_number
from .common.status_socket import OFF, why_not
from .common.strict_yaml import BOOLEANS, YamlError, kind
from .policy import Policy, PolicyError, networks, rate_limit, users, users_of_lines

T = TypeVar("T")

# The gateway and the credential.
ACCOUNT_KEYS = (
    "tunnel_addr",
    "skip_tls_verify",
    "ca_file",
    "jwt_secret",
    "jwt_secret_file",
    "token",
    "token_file",
    "jwt_issuer",
)
KEYS = (
    *ACCOUNT_KEYS,
    "jwt_expire_sec",
    "stall_timeout",
    "drain_timeout",
    "log_level",
    "log_format",
    "metrics_port",
    "metrics_bind",
    "status_socket",
    "inspect",
    "tunnels",
)
HEALTH_KEYS = ("path", "every", "timeout", "fails", "passes", "statuses")
INSPECT_KEYS = ("listen", "memory", "body", "bodies", "allow_remote")
POLICY_KEYS = ("basic_auth", "basic_auth_file", "allow", "deny", "rate_limit")
TUNNEL_KEYS = (
    "hostname",
    "target",
    "target_ca_file",
    "target_skip_tls_verify",
    "mode",
    "protocol",
    "host_header",
    "port",
    "proxy_protocol",
    "idle_timeout",
    "pool",
    "weight",
    "sticky",
    "health",
    *POLICY_KEYS,
)
CREDENTIAL_KEYS = ("jwt_secret", "jwt_secret_file", "token", "token_file")

SECRET_KEYS = ("jwt_secret", "token", "basic_auth")  # each may also name a file: with _file

MODES = ("http", "tcp")
NO_ADVICE: Mapping[str, str] = {}
# What a target in http mode may speak, named as in ALPN: the default; HTTP/2 without TLS, by prior
# knowledge (RFC 9113 §3.3); HTTP/2 with TLS.
PROTOCOLS = HTTP1, H2C, H2 = ("http/1.1", "h2c", "h2")
STICKY = COOKIE, ADDRESS = ("cookie", "address")  # by what a visitor keeps its agent in a pool
LOG_LEVELS = ("debug", "info", "warning", "error")
LOG_FORMATS = ("text", "json")
LOOPBACK = "127.0.0.1"  # where metrics are told, unless metrics_bind says otherwise
# The host of a target that is a port alone. By its name, since many development servers listen on
# ::1 and not on 127.0.0.1: both are tried.
LOCALHOST = "localhost"

# Bytes of a file. A thousand tunnels take a tenth of this. The limit is for a wrong path, such as
# that of a device, which would fill the memory.
MAX_FILE = 1024 * 1024

# Addresses of one gateway: each that does not answer takes as long as a dial may. Gateways that are
# one tell the agent of each other, so two or three are enough.
MOST_ADDRS = 16

# Bytes of all policies together: the register message also holds the hostnames and the token.
MOST_POLICIES = MESSAGE_LIMIT // 2

# Bytes of a unix socket's path: the size of the system's sun_path, less its terminating zero.
MAX_UNIX_PATH = 107 if sys.platform == "linux" else 103

# Seconds that a token is valid. It must allow for transit and for clocks that differ; more than a
# year is most likely a typing error.
LEAST_EXPIRE = 60
MOST_EXPIRE = 365 * 24 * 3600

# Seconds of silence in tcp mode. Shorter pauses are normal in a visit; more than a month is most
# likely a typing error.
LEAST_IDLE = 1
MOST_IDLE = 31 * 24 * 3600

# Seconds between two health checks of a target. More than one a second would be load; with less
# than one an hour, a failure would be found too late.
LEAST_EVERY, MOST_EVERY = 1, 3600
LEAST_CHECK, MOST_CHECK = 0.1, 60  # seconds that a health check may take
MOST_CHECKS = 100  # checks in a row that change the verdict
MOST_PATH = 1000  # characters
STATUSES = ((200, 399),)  # of a target that is well; a redirect shows that it works

# Seconds for running visits when the agent stops. With what follows them (agent.LAST_WORDS,
# standard_error.LAST_LINES) the default is below the 10 s after which Docker and others kill a
# process, which then could not log how its visits ended. More than a day is a typing error.
DRAIN_TIMEOUT = 5
MOST_DRAIN = 24 * 3600

# Characters of a bad value that a message shows: the length of the longest hostname.
MAX_SHOWN = 253


# The inspector. ngrok's has this port, so people know it.
INSPECT_PORT = 4040
INSPECT_MEMORY = 64 * 1024 * 1024  # bytes; some ten thousand visits without bodies
LEAST_MEMORY, MOST_MEMORY = 1024 * 1024, 64 * 1024**3
INSPECT_BODY = 64 * 1024  # bytes that are kept of each body: most documents and forms
MOST_BODY = 16 * 1024 * 1024  # more would be slow to show
# At least this many bodies fit into the memory, or a visit could take the place of all others.
LEAST_BODIES = 8


class ConfigError(Exception):
    """The configuration cannot be used. The message is one line for the operator, most often
    "KEY: X came, expected Y": X is what the file has, Y what may stand there."""

    def __init__(self, text: str):
        super().__init__(without_secrets(text))


class Target(NamedTuple):
    """Where visits go: a port of a host, with or without TLS, or a unix socket.

    str() gives it as the operator writes it.
    """

    host: str = ""  # a hostname or an IP address, without brackets; "" for a unix socket
    port: int = 0
    path: str = ""  # of a unix socket; "" for a port
    tls: bool = False
    ca_file: str | None = None  # the target's CA; None: the CAs that the system trusts
    skip_tls_verify: bool = False

    def __str__(self) -> str:
        if self.path:
            return f"unix:{self.path}"
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{'https://' if self.tls else ''}{host}:{self.port}"


class Pool(NamedTuple):
    """How visits are shared out among agents with the same hostname."""

    weight: int = 1  # how many visits this agent gets, relative to the others
    sticky: str = ""  # one of STICKY; "": any agent will do for each visit

    def wire(self) -> dict[str, Any]:
        """As a register message holds it."""
        return {"weight": self.weight, **({"sticky": self.sticky} if self.sticky else {})}


class Health(NamedTuple):
    """How to find out whether a target is well: see health.py. Times are in seconds."""

    path: str = ""  # of the GET request; "": a connection is enough
    every: float = 5
    timeout: float = 2
    fails: int = 3  # failed checks in a row until the target counts as not well
    passes: int = 1  # passed checks in a row until it counts as well again
    statuses: tuple[tuple[int, int], ...] = STATUSES  # ranges, with both ends

    def expects(self, status: int) -> bool:
        return any(least <= status <= most for least, most in self.statuses)


class Tunnel(NamedTuple):
    """One hostname and where its visits go. ``mode`` is one of MODES."""

    hostname: str  # or a wildcard such as *.dev.example.com, or an open name such as quick-otter.*
    target: Target
    mode: str
    host_header: str = ""  # the Host that the target gets; "": the visitor's
    port: str = ""  # the tunnel's own public port, ANY_PORT for any; "": none
    proxy_protocol: str = ""  # version of the PROXY header that the target gets; "": none
    idle_timeout: float | None = None  # tcp mode: seconds without a byte that end a visit
    protocol: str = ""  # what the target speaks in http mode: H2C or H2; "": HTTP/1.1
    policy: Policy = Policy()  # what the gateway asks of visitors
    basic_auth_file: str = ""  # where the policy's users came from; "": from the document
    pool: Pool | None = None  # None: this agent has the hostname for itself
    # None: its target is not checked. Not in ``needs``: a gateway that holds no visits back still
    # serves the tunnel as without the key, and to refuse all visits would be worse.
    health: Health | None = None

    @property
    def shared_by(self) -> str:
        """The hostname, if the tunnel is in a pool; else "". See policy.users()."""
        return "" if self.pool is None else self.hostname

    @property
    def needs(self) -> tuple[str, ...]:
        """The features that a gateway must know to serve the tunnel as configured."""
        wanted = (
            (HOST_HEADER, self.host_header),
            (HTTP2, self.protocol),
            (PORTS, self.port),
            (VISITOR_ADDRESS, self.proxy_protocol),
            (POLICIES, self.policy.wire()),
            (POOLS, self.pool),
            (WILDCARDS, self.hostname.startswith(WILDCARD)),
            (NAMES, self.hostname.endswith(OPEN)),
        )
        return tuple(feature for feature, value in wanted if value)


class Inspect(NamedTuple):
    """The inspector's settings: where it listens, and what it keeps."""

    host: str = LOOPBACK  # an IP address, or LOCALHOST
    port: int = INSPECT_PORT
    memory: int = INSPECT_MEMORY  # bytes
    body: int = INSPECT_BODY  # bytes of each body that are kept; 0: none
    allow_remote: bool = False  # ``host`` may be one that other machines reach


class Config(NamedTuple):
    """The operator's configuration, checked and with all defaults.

    Exactly one of ``jwt_secret`` and ``token`` is set, the other is "".
    """

    tunnel_host: str  # a hostname or an IP address, without brackets
    tunnel_port: int
    skip_tls_verify: bool
    ca_file: str | None  # None: the CAs that the system trusts
    jwt_secret: str
    token: str
    jwt_issuer: str
    jwt_expire_sec: int  # seconds that a token signed by the agent is valid
    stall_timeout: float  # seconds; a visit whose visitor or target reads nothing so long is reset
    drain_timeout: float  # seconds that running visits have when the agent stops
    log_level: str  # one of LOG_LEVELS
    log_format: str  # one of LOG_FORMATS
    metrics_port: int | None  # None: no metrics; 0: any free one
    metrics_bind: tuple[str, ...]  # IP addresses
    status_socket: (
        str  # where `gotunnel-agent status` asks, OFF for nowhere; "": see runtime_places()
    )
    tunnels: tuple[Tunnel, ...]
    inspect: Inspect | None = None  # None: no inspector
    secret_files: tuple[str, ...] = ()  # files that hold secrets
    # Further addresses of the gateway, as tunnel_host and tunnel_port: the next one is dialled when
    # one fails.
    more_addrs: tuple[tuple[str, int], ...] = ()
    # The key that names the credential's file, and the path there; "" for one in the document.
    credential_file: tuple[str, str] = ("", "")

    def __repr__(self) -> str:
        return shown(self, "jwt_secret", "token")

    def routes(self) -> dict[str, str]:
        """Hostname to target, for the register message."""
        return {tunnel.hostname: str(tunnel.target) for tunnel in self.tunnels}

    def modes(self) -> dict[str, str]:
        """Hostname to mode, for the register message."""
        return {tunnel.hostname: tunnel.mode for tunnel in self.tunnels}

    def host_headers(self) -> dict[str, str]:
        """Hostname to the Host that its target gets instead of the visitor's, for the register
        message."""
        return {t.hostname: t.host_header for t in self.tunnels if t.host_header}

    def protocols(self) -> dict[str, str]:
        """Hostname to what its target speaks, if that is HTTP/2, for the register message."""
        return {t.hostname: t.protocol for t in self.tunnels if t.protocol}

    def ports(self) -> dict[str, str]:
        """Hostname to the public port that it asks for, for the register message."""
        return {t.hostname: t.port for t in self.tunnels if t.port}

    def addressed(self) -> tuple[str, ...]:
        """The hostnames whose targets get the visitor's address, for the register message."""
        return tuple(t.hostname for t in self.tunnels if t.proxy_protocol)

    def policies(self) -> dict[str, dict[str, Any]]:
        """Hostname to policy, for the register message."""
        wires = {tunnel.hostname: tunnel.policy.wire() for tunnel in self.tunnels}
        return {hostname: wire for hostname, wire in wires.items() if wire}

    def pools(self) -> dict[str, dict[str, Any]]:
        """Hostname to how it is shared with other agents, for the register message."""
        return {t.hostname: t.pool.wire() for t in self.tunnels if t.pool is not None}


def load(path: str | os.PathLike[str], *, needs_tunnels: bool = True) -> Config:
    """Read and check the configuration in the file ``path``, and add the defaults. The file may
    have no tunnels if the caller has some of its own, and so does not need them.

    Raises ConfigError for the first fault.
    """
    try:
        document = read_document(_read_file(path))
        config = of_document(document, needs_tunnels=needs_tunnels)
        return config._replace(secret_files=tuple(_secret_files(os.fspath(path), document)))
    except ConfigError as error:
        missing = (
            ""
            if os.path.lexists(path)
            else (": name it with -c, or see gotunnel join and --print-example")
        )
        raise ConfigError(f"{os.fspath(path)}: {error}{missing}") from None


def read_document(text: str) -> dict[str, Any]:
    """The keys and values in the text of a configuration. Raises ConfigError unless it is a mapping
    with known keys."""
    return _mapping(_parse(text), text)


def of_document(document: Mapping[str, object], *, needs_tunnels: bool = True) -> Config:
    """As load(), of a document with known keys. Raises ConfigError."""
    return _config(document, needs_tunnels)


def tunnel_of(item: Mapping[str, object]) -> Tunnel:
    """A tunnel of a program that has no file: ``item`` is as one of ``tunnels``. Raises
    ConfigError."""
    return _tunnel(item, "")


def with_secrets(config: Config) -> Config:
    """The configuration with the secrets that its files hold now. What came from a pipe stays, as
    a pipe gives it once. Raises ConfigError."""
    key, path = config.credential_file
    if key and not small_file.is_pipe(path):
        credential = _credential_of(key, path)
        if key == "token_file":
            config = config._replace(token=credential)
        else:
            config = config._replace(jwt_secret=credential)
    if any(tunnel.basic_auth_file for tunnel in config.tunnels):
        config = config._replace(tunnels=tuple(map(_with_users, config.tunnels)))
        _check_policies(config)
    return config


def _with_users(tunnel: Tunnel) -> Tunnel:
    if not tunnel.basic_auth_file or small_file.is_pipe(tunnel.basic_auth_file):
        return tunnel
    try:
        found = _users_of_file(tunnel.basic_auth_file, tunnel.shared_by)
    except ConfigError as error:
        raise ConfigError(f"basic_auth_file of {tunnel.hostname}: {error}") from None
    return tunnel._replace(policy=tunnel.policy._replace(basic_auth=found))


# --- The file ------------------------------------------------------------------------------------


def _read_file(path: str | os.PathLike[str]) -> str:
    """The text of a small file, without the byte order mark that some editors write."""
    try:
        content = small_file.read(path, MAX_FILE)
    except IsADirectoryError:
        raise ConfigError("this is a folder, expected a file") from None
    except OSError as error:
        where = mistakes.base_of(path) if isinstance(error, FileNotFoundError) else ""
        raise ConfigError(
            f"cannot be read ({error.strerror}), expected a readable file{where}"
        ) from None
    if len(content) > MAX_FILE:
        raise ConfigError(f"the file is too long, expected at most {MAX_FILE} bytes of text")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise ConfigError(
            f"byte {error.start} is not UTF-8, expected UTF-8 text: line {line}; "
            f"{mistakes.of_bytes(content)}"
        ) from None


def _parse(text: str) -> object:
    """The document in ``text``: mappings, lists, text and None."""
    try:
        return strict_yaml.load(text, plain=False)
    except YamlError as error:
        advice = ""
        if "\0" in text[:4]:
            advice = mistakes.of_bytes(text.encode())
        elif error.line is not None:
            advice = mistakes.of_yaml(text, error.line, str(error))
        raise ConfigError(f"{error}; {advice}" if advice else str(error)) from None
    except RecursionError:
        raise ConfigError("lists or mappings nested too deeply, expected two levels") from None


def _mapping(document: object, text: str) -> dict[str, Any]:
    """The document in ``text``, which must be a mapping with known keys."""
    if document is None:
        raise ConfigError("the file is empty, expected tunnel_addr, a credential and tunnels")
    if not isinstance(document, dict):
        advice = mistakes.other_file(text)
        raise ConfigError(
            f"{kind(document)} came, expected a mapping of keys to values"
            + (f"; {advice}" if advice else "")
        )
    if advice := mistakes.other_document(document):
        raise ConfigError(f"no key of a configuration came; {advice}")
    _refuse_unknown_keys(document, KEYS, "", mistakes.OTHER_KEYS)
    return document


def _secret_files(path: str, document: Mapping[str, Any]) -> Iterator[str]:
    """The files that hold secrets, ``path`` included if the document itself holds any. The document
    has been checked."""
    mappings = (document, *(document.get("tunnels") or ()))
    if any(key in mapping for mapping in mappings for key in SECRET_KEYS):
        yield path
    for mapping in mappings:
        yield from (mapping[f"{key}_file"] for key in SECRET_KEYS if f"{key}_file" in mapping)


# --- The keys ------------------------------------------------------------------------------------


def _config(document: Mapping[str, object], needs_tunnels: bool) -> Config:
    (tunnel_host, tunnel_port), *more_addrs = _tunnel_addrs(document)
    jwt_secret, token, credential_file = _credential(document)
    ca_file, skip_tls_verify = _trust(document)
    config = Config(
        tunnel_host=tunnel_host,
        tunnel_port=tunnel_port,
        more_addrs=tuple(more_addrs),
        skip_tls_verify=skip_tls_verify,
        ca_file=ca_file,
        jwt_secret=jwt_secret,
        token=token,
        jwt_issuer=_text(document, "jwt_issuer", "text") if "jwt_issuer" in document else "",
        jwt_expire_sec=_expire_sec(document),
        stall_timeout=_stall_timeout(document),
        drain_timeout=_drain_timeout(document),
        log_level=_choice(document, "log_level", LOG_LEVELS, "info"),
        log_format=_choice(document, "log_format", LOG_FORMATS, "text"),
        metrics_port=_metrics_port(document),
        metrics_bind=_metrics_bind(document),
        status_socket=_status_socket(document),
        inspect=inspect_of(document["inspect"]) if "inspect" in document else None,
        tunnels=_tunnels(document) if needs_tunnels or document.get("tunnels") else (),
        credential_file=credential_file,
    )
    _check_policies(config)
    return config


def _check_policies(config: Config) -> None:
    size = len(json.dumps(config.policies(), separators=(",", ":")))
    if size > MOST_POLICIES:
        raise ConfigError(
            f"{', '.join(POLICY_KEYS)}: {size} bytes came in all tunnels together, expected at "
            f"most {MOST_POLICIES}: use fewer users or networks, or a second agent"
        )


def _refuse_unknown_keys(
    mapping: Mapping[str, object], known: tuple[str, ...], where: str, others: Mapping[str, str]
) -> None:
    """Raise ConfigError for the first key that is not ``known``. ``others`` has advice for keys of
    other programs."""
    for key in mapping:
        if key not in known and key in others:
            raise ConfigError(f"{where}unknown key {key!r}; {others[key]}")
    if problem := strict_yaml.unknown_key(mapping, known):
        raise ConfigError(f"{where}{problem}")


def _tunnel_addrs(document: Mapping[str, object]) -> list[tuple[str, int]]:
    """The gateway's addresses: a text, or a list of texts."""
    given = document.get("tunnel_addr")
    if not isinstance(given, list):
        return [_tunnel_addr(document, "tunnel_addr")]
    if not 1 <= len(given) <= MOST_ADDRS:
        raise ConfigError(
            f"tunnel_addr: {f'a list of {len(given)}' if given else 'an empty list'} came, "
            f'expected "HOST:PORT", or a list of 1 to {MOST_ADDRS} of them'
        )
    named = {f"tunnel_addr[{number}]": text for number, text in enumerate(given)}
    addresses = [_tunnel_addr(named, key) for key in named]
    for number, address in enumerate(addresses):
        if address in addresses[:number]:
            text = _shown(str(given[number]))
            raise ConfigError(f"tunnel_addr[{number}]: {text} comes twice, expected each once")
    return addresses


def _tunnel_addr(mapping: Mapping[str, object], key: str) -> tuple[str, int]:
    expected = '"HOST:PORT" such as "tunnel.example.com:9443"'
    text = _text(mapping, key, expected)

    def refused(why: str) -> ConfigError:
        advice = mistakes.of_tunnel_addr(text)
        return ConfigError(f"{key}: {_shown(text)} {why}, expected {expected}{advice}")

    host, port = _host_and_port(text, refused)
    return normal_hostname(host), port


def _credential(document: Mapping[str, object]) -> tuple[str, str, tuple[str, str]]:
    """The secret and the token, one of which is ""; and Config.credential_file."""
    given = [key for key in CREDENTIAL_KEYS if key in document]
    if len(given) != 1:
        came = " and ".join(given) or "no credential"
        raise ConfigError(f"{came} came, expected exactly one of {', '.join(CREDENTIAL_KEYS)}")
    (key,) = given
    file = ("", "")
    if key.endswith("_file"):
        file = (key, _text(document, key, "the path of a file"))
        credential = _credential_of(*file)
    else:
        text = _text(document, key, "text", secret=True)
        credential = _checked_credential(key, text.rstrip("\r\n"))  # a YAML block ends with one
    if key.startswith("token"):
        return "", credential, file
    if find_spec("jwt") is None:  # registering.py loads it when it signs a token
        packages = import_module(f"{__package__}.common.packages")
        raise ConfigError(packages.explain(packages.faults(packages.AGENT)))
    return credential, "", file


def _credential_of(key: str, path: str) -> str:
    """The secret or token in the file ``path``, which stands under ``key``."""
    try:
        credential = _read_file(path).rstrip("\r\n")
    except ConfigError as error:
        raise ConfigError(f"{key}: {shown_path(path)[:MAX_SHOWN]}: {error}") from None
    return _checked_credential(key, credential)


def _checked_credential(key: str, credential: str) -> str:
    """A secret or token. Raises ConfigError if it is empty or blank, or cannot be sent."""
    # A lone surrogate (YAML's "\ud800" makes one) cannot be encoded, so neither sent nor signed.
    if not credential.strip() or re.search("[\ud800-\udfff]", credential):
        raise ConfigError(
            f"{key}: no text came, expected the gateway's JWT_SECRET or a token that it accepts"
        )
    return credential


def _trust(
    mapping: Mapping[str, object], prefix: str = "", where: str = ""
) -> tuple[str | None, bool]:
    """The values of ca_file and skip_tls_verify: which certificates the agent accepts."""
    ca_file, skip_tls_verify = f"{prefix}ca_file", f"{prefix}skip_tls_verify"
    skip = _boolean(mapping, skip_tls_verify, False, where)
    if ca_file not in mapping:
        return None, skip
    path = _text(mapping, ca_file, "the path of a file", where)
    if skip:
        raise ConfigError(
            f"{where}{ca_file} and {skip_tls_verify}: true came, expected only one of them: remove "
            f"{skip_tls_verify} to have the certificate checked"
        )
    if problem := _why_unreadable(path):
        advice = ""
        if path.startswith("~"):
            advice = "; write the whole path, as ~ has no meaning here"
        elif problem == MISSING:
            if not prefix:
                advice = "; a gateway with ACME_ENV=local makes its ca.crt when it first starts"
            advice += mistakes.base_of(path)
        raise ConfigError(
            f"{where}{ca_file}: {_shown(path)} {problem}, expected a file that can be read{advice}"
        )
    return path, skip


MISSING = "does not exist"


def _why_unreadable(path: str) -> str:
    """Why a path is no file that this user may read; "" if it is one."""
    try:
        mode = os.stat(path).st_mode
    except (FileNotFoundError, NotADirectoryError):
        return MISSING
    except OSError as error:
        return f"cannot be read ({error.strerror})"
    if stat.S_ISDIR(mode):
        return "is a folder"
    if not stat.S_ISREG(mode):
        return "cannot be read, as it is no regular file"
    if not os.access(path, os.R_OK):
        return "cannot be read (this user has no right to)"
    return ""


def _expire_sec(document: Mapping[str, object]) -> int:
    if "jwt_expire_sec" not in document:
        return 3600
    expected = f"seconds, a whole number from {LEAST_EXPIRE} to {MOST_EXPIRE}"
    text = _text(document, "jwt_expire_sec", expected)
    seconds = whole_number(text)
    if seconds is None or not LEAST_EXPIRE <= seconds <= MOST_EXPIRE:
        raise ConfigError(f"jwt_expire_sec: {_shown(text)} came, expected {expected}")
    return seconds


def _tunnels(document: Mapping[str, object]) -> tuple[Tunnel, ...]:
    items = document.get("tunnels")
    if not isinstance(items, list) or not items:
        came = "an empty list" if items == [] else kind(items)
        advice = '; begin each tunnel with - hostname: "HOST"' if isinstance(items, dict) else ""
        if items is None:  # as `join` leaves it
            advice = "; or share a port without one in the file: gotunnel http 8080"
        raise ConfigError(f"tunnels: {came} came, expected a list with at least one tunnel{advice}")
    tunnels: dict[str, Tunnel] = {}
    for number, item in enumerate(items):
        tunnel = _tunnel(item, f"tunnels[{number}]")
        if tunnel.hostname in tunnels:
            raise ConfigError(
                f"tunnels[{number}].hostname: {tunnel.hostname!r} comes twice, expected each "
                "hostname once"
            )
        tunnels[tunnel.hostname] = tunnel
    return tuple(tunnels.values())


def _tunnel(item: object, where: str) -> Tunnel:
    if not isinstance(item, dict):
        raise ConfigError(
            f"{where}: {kind(item)} came, expected a mapping with hostname and target"
        )
    here = f"{where}: " if where else ""
    _refuse_unknown_keys(item, TUNNEL_KEYS, here, mistakes.OTHER_TUNNEL_KEYS)

    where += "." if where else ""
    hostname = _hostname(item, where)
    mode = _choice(item, "mode", MODES, "http", where, mistakes.OTHER_MODES)
    target = _target(item, mode, where)
    pool = _pool(item, mode, hostname, where)
    return Tunnel(
        hostname,
        target,
        mode,
        protocol=_protocol(item, mode, target, where),
        host_header=_host_header(item, mode, where),
        port=_port(item, mode, where),
        proxy_protocol=_choice(item, "proxy_protocol", VERSIONS, "", where),
        idle_timeout=_idle_timeout(item, mode, where),
        policy=_policy(item, mode, where, hostname if pool is not None else ""),
        basic_auth_file=str(item.get("basic_auth_file", "")),
        pool=pool,
        health=_health(item["health"], mode, f"{where}health") if "health" in item else None,
    )


def _hostname(item: Mapping[str, object], where: str) -> str:
    expected = "a hostname such as app.example.com or *.dev.example.com, without scheme or port"
    text = _text(item, "hostname", expected, where)
    name = text if text.isascii() else normal_hostname(text)
    if valid_hostname(name) or valid_wildcard(name) or valid_open_name(name):
        return normal_hostname(name)
    why = why_no_hostname(text)
    raise ConfigError(f"{where}hostname: {_shown(text)} came, expected {expected}{why}")


def _target(item: Mapping[str, object], mode: str, where: str) -> Target:
    expected = '"HOST:PORT", "https://HOST:PORT" or "unix:/PATH"'
    text = _text(item, "target", expected, where)

    def refused(why: str) -> ConfigError:
        advice = mistakes.of_target(text, mode)
        return ConfigError(f"{where}target: {_shown(text)} {why}, expected {expected}{advice}")

    scheme, slashes, address = text.partition("://")
    tls = bool(slashes) and scheme.lower() == "https"
    for key in ("target_ca_file", "target_skip_tls_verify"):
        if key in item and not tls:
            raise refused(f"has no TLS, but {key} came")
    if text.startswith("unix:"):
        return Target(path=_unix_path(text.removeprefix("unix:"), refused))
    if not slashes:
        address = text
        if text.removeprefix(":").isdigit():  # a port alone
            address = f"{LOCALHOST}:{text.removeprefix(':')}"
    elif scheme.lower() not in ("http", "https"):
        raise refused("has an unknown scheme")
    host, port = _host_and_port(address, refused)
    ca_file, skip_tls_verify = _trust(item, "target_", where)
    return Target(host, port, tls=tls, ca_file=ca_file, skip_tls_verify=skip_tls_verify)


def _unix_path(path: str, refused: Callable[[str], ConfigError]) -> str:
    if not hasattr(socket, "AF_UNIX"):
        raise refused("is a unix socket, which Python does not offer on this system")
    if not path.startswith("/"):
        raise refused("has no absolute path")
    if len(path.encode()) > MAX_UNIX_PATH:
        raise refused(f"has a path of more than {MAX_UNIX_PATH} bytes")
    return path


def _protocol(item: Mapping[str, object], mode: str, target: Target, where: str) -> str:
    if "protocol" not in item:
        return ""
    protocol = _choice(item, "protocol", PROTOCOLS, "", where)
    _expect_mode("protocol", "http", mode, where)
    if protocol == H2 and not target.tls:
        raise ConfigError(
            f"{where}protocol: {H2} came, which is with TLS, expected {H2C} for target {target}"
        )
    if protocol == H2C and target.tls:
        raise ConfigError(
            f"{where}protocol: {H2C} came, which is without TLS, expected {H2} for target {target}"
        )
    return "" if protocol == HTTP1 else protocol


def _host_header(item: Mapping[str, object], mode: str, where: str) -> str:
    if "host_header" not in item:
        return ""
    expected = "a hostname or an IP address, with or without a port"
    text = _text(item, "host_header", expected, where)
    _expect_mode("host_header", "http", mode, where)
    if not valid_host(text):
        raise ConfigError(f"{where}host_header: {_shown(text)} came, expected {expected}")
    return text


def _port(item: Mapping[str, object], mode: str, where: str) -> str:
    if "port" not in item:
        return ""
    expected = f"a port from 1 to {MAX_PORT}, or {ANY_PORT}"
    text = _text(item, "port", expected, where).lower()
    _expect_mode("port", "tcp", mode, where)
    number = whole_number(text)
    if text != ANY_PORT and (number is None or not 1 <= number <= MAX_PORT):
        raise ConfigError(f"{where}port: {_shown(text)} came, expected {expected}")
    return text if number is None else str(number)


def _pool(item: Mapping[str, object], mode: str, hostname: str, where: str) -> Pool | None:
    if not _boolean(item, "pool", False, where):
        for key in ("weight", "sticky"):
            if key in item:
                raise ConfigError(
                    f"{where}{key}: came without pool: true, expected both or neither: it says how "
                    "the agents of a pool share visits"
                )
        return None
    if hostname.endswith(OPEN):
        raise ConfigError(
            f"{where}pool: the hostname {hostname!r} came, which the gateway completes, expected a "
            "whole hostname: all agents of the pool must have the same"
        )
    expected = f"a whole number from 1 to {MOST_WEIGHT}"
    weight = 1
    if "weight" in item:
        text = _text(item, "weight", expected, where)
        number = whole_number(text)
        if number is None or not 1 <= number <= MOST_WEIGHT:
            raise ConfigError(f"{where}weight: {_shown(text)} came, expected {expected}")
        weight = number
    sticky = _choice(item, "sticky", STICKY, "", where)
    if sticky == COOKIE and mode != "http":
        raise ConfigError(
            f"{where}sticky: {COOKIE} came, and the tunnel has mode {mode}, which has no cookies: "
            f"expected {ADDRESS}, or mode http"
        )
    return Pool(weight, sticky)


def _idle_timeout(item: Mapping[str, object], mode: str, where: str) -> float | None:
    if "idle_timeout" not in item:
        return None
    expected = f"seconds, a number from {LEAST_IDLE} to {MOST_IDLE}"
    text = _text(item, "idle_timeout", expected, where)
    _expect_mode("idle_timeout", "tcp", mode, where)
    return _seconds(text, f"{where}idle_timeout", expected, LEAST_IDLE, MOST_IDLE)


def _health(value: object, mode: str, where: str) -> Health | None:
    expected = f"a path such as /healthz, a mapping, tcp, or {OFF}"
    if isinstance(value, str):
        word = value.lower()
        if not BOOLEANS.get(word, True):
            return None
        value = {} if word == "tcp" or word in BOOLEANS else {"path": value}
    if not isinstance(value, dict):
        raise ConfigError(f"{where}: {kind(value)} came, expected {expected}")
    _refuse_unknown_keys(value, HEALTH_KEYS, f"{where}: ", NO_ADVICE)
    path = _health_path(value, mode, where)
    where += "."
    if "statuses" in value and not path:
        raise ConfigError(f"{where}statuses came without a path, expected path beside it")
    usual = Health()
    every = _span(value, "every", usual.every, LEAST_EVERY, MOST_EVERY, where)
    timeout = _span(value, "timeout", min(usual.timeout, every), LEAST_CHECK, MOST_CHECK, where)
    if timeout > every:
        raise ConfigError(
            f"{where}timeout: {timeout:g} s came, expected at most every, which is {every:g} s"
        )
    return Health(
        path, every, timeout,
        fails=_checks(value, "fails", usual.fails, where),
        passes=_checks(value, "passes", usual.passes, where),
        statuses=_statuses(value["statuses"], f"{where}statuses")
        if "statuses" in value else STATUSES,
    )  # fmt: skip


def _health_path(value: Mapping[str, object], mode: str, where: str) -> str:
    if "path" not in value:
        return ""
    expected = "a path such as /healthz, of printable ASCII characters without blanks"
    path = _text(value, "path", expected, f"{where}.")
    _expect_mode(f"{where}.path", "http", mode, "")
    if not re.fullmatch(r"/[!-\"$-~]*", path) or len(path) > MOST_PATH:
        raise ConfigError(f"{where}.path: {_shown(path)} came, expected {expected}")
    return path


def _span(
    value: Mapping[str, object], key: str, default: float, least: float, most: float, where: str
) -> float:
    if key not in value:
        return default
    expected = f"a time from {least:g} s to {most:g} s, such as 5s or 500ms"
    text = _text(value, key, expected, where)
    seconds = seconds_of(text)
    if seconds is None or not least <= seconds <= most:
        raise ConfigError(f"{where}{key}: {_shown(text)} came, expected {expected}")
    return seconds


def _checks(value: Mapping[str, object], key: str, default: int, where: str) -> int:
    if key not in value:
        return default
    expected = f"a number of checks in a row, from 1 to {MOST_CHECKS}"
    text = _text(value, key, expected, where)
    number = whole_number(text)
    if number is None or not 1 <= number <= MOST_CHECKS:
        raise ConfigError(f"{where}{key}: {_shown(text)} came, expected {expected}")
    return number


def _statuses(value: object, where: str) -> tuple[tuple[int, int], ...]:
    """Ranges of statuses: a list, or a text with commas, of 200 and 200-299."""
    expected = "statuses from 200 to 599, such as 200, 204 or 200-299"
    parts = value.split(",") if isinstance(value, str) else value
    if not isinstance(parts, list) or not parts:
        raise ConfigError(f"{where}: {kind(value)} came, expected {expected}")
    found = []
    for part in parts:
        text = part.strip() if isinstance(part, str) else kind(part)
        match = re.fullmatch(r"([2-5][0-9]{2})(?: ?- ?([2-5][0-9]{2}))?", text)
        least, most = (match[1], match[2] or match[1]) if match else ("1", "0")
        if int(most) < int(least):
            raise ConfigError(f"{where}: {_shown(text)} came, expected {expected}")
        found.append((int(least), int(most)))
    return tuple(found)


def _stall_timeout(document: Mapping[str, object]) -> float:
    if "stall_timeout" not in document:
        return STALL_TIMEOUT
    expected = f"seconds, a number from {LEAST_STALL} to {MOST_STALL}"
    text = _text(document, "stall_timeout", expected)
    return _seconds(text, "stall_timeout", expected, LEAST_STALL, MOST_STALL)


def _status_socket(document: Mapping[str, object]) -> str:
    if "status_socket" not in document:
        return ""
    path = _text(document, "status_socket", f"the path of a unix socket, or {OFF}")
    if path.lower() == OFF:
        return OFF
    if problem := why_not(path):
        raise ConfigError(f"status_socket: {problem}: name a shorter one, or write {OFF}")
    return path


def _metrics_port(document: Mapping[str, object]) -> int | None:
    if "metrics_port" not in document:
        return None
    expected = f"a port from 1 to {MAX_PORT}, or {ANY_PORT}"
    text = _text(document, "metrics_port", expected).lower()
    number = whole_number(text)
    if text == ANY_PORT:
        return 0
    if number is None or not 1 <= number <= MAX_PORT:
        raise ConfigError(f"metrics_port: {_shown(text)} came, expected {expected}")
    return number


def _metrics_bind(document: Mapping[str, object]) -> tuple[str, ...]:
    if "metrics_bind" not in document:
        return (LOOPBACK,)
    expected = "IP addresses to listen on, separated by commas"
    texts = [text.strip() for text in _text(document, "metrics_bind", expected).split(",")]
    for text in texts:
        if addresses.parse(text) is None:
            raise ConfigError(f"metrics_bind: {_shown(text)} came, expected {expected}")
    return tuple(texts)


def inspect_of(value: object) -> Inspect | None:
    """The inspector's settings: an address, a port alone, a mapping, or on or off. Raises
    ConfigError."""
    expected = f'an address such as "{LOOPBACK}:{INSPECT_PORT}", a mapping, or {OFF}'
    if isinstance(value, str):
        if not BOOLEANS.get(value.lower(), True):
            return None
        value = {} if value.lower() in BOOLEANS else {"listen": value}
    if not isinstance(value, dict):
        raise ConfigError(f"inspect: {kind(value)} came, expected {expected}")
    _refuse_unknown_keys(value, INSPECT_KEYS, "inspect: ", NO_ADVICE)
    where = "inspect."
    host, port = _inspect_listen(value, where)
    allow_remote = _boolean(value, "allow_remote", False, where)
    if not (allow_remote or host == LOCALHOST or ipaddress.ip_address(host).is_loopback):
        raise ConfigError(
            f"inspect.listen: {_shown(host)} came, which other machines can reach, expected one of "
            f"this machine alone such as {LOOPBACK}; allow_remote: true beside listen permits it, "
            "but there is no TLS: everybody on the way sees what visitors send"
        )
    memory = _bytes(value, "memory", INSPECT_MEMORY, LEAST_MEMORY, MOST_MEMORY, where)
    body = _bytes(value, "body", min(INSPECT_BODY, memory // LEAST_BODIES), 0, MOST_BODY, where)
    if body > memory // LEAST_BODIES:
        raise ConfigError(
            f"inspect.body: {body} bytes came, expected at most {memory // LEAST_BODIES}, an "
            "eighth of memory: a visit must not take the place of all others"
        )
    if not _boolean(value, "bodies", True, where):
        body = 0
    return Inspect(host, port, memory, body, allow_remote)


def _inspect_listen(value: Mapping[str, object], where: str) -> tuple[str, int]:
    if "listen" not in value:
        return LOOPBACK, INSPECT_PORT
    expected = f'"ADDRESS:PORT" such as "{LOOPBACK}:{INSPECT_PORT}", or a port'
    text = _text(value, "listen", expected, where)

    def refused(why: str) -> ConfigError:
        return ConfigError(f"{where}listen: {_shown(text)} {why}, expected {expected}")

    host, port = _host_and_port(f"{LOOPBACK}:{text}" if text.isdigit() else text, refused)
    if host.lower() == LOCALHOST:
        return LOCALHOST, port
    if addresses.parse(host) is None:
        raise refused("has a host that is no IP address")
    return host, port


def _bytes(
    mapping: Mapping[str, object], key: str, default: int, least: int, most: int, where: str
) -> int:
    if key not in mapping:
        return default
    expected = f"bytes from {least} to {most}, such as 64KiB"
    text = _text(mapping, key, expected, where)
    size = bytes_of(text)
    if size is None or not least <= size <= most:
        raise ConfigError(f"{where}{key}: {_shown(text)} came, expected {expected}")
    return size


def _drain_timeout(document: Mapping[str, object]) -> float:
    if "drain_timeout" not in document:
        return DRAIN_TIMEOUT
    expected = f"seconds, a number from 0 to {MOST_DRAIN}"
    text = _text(document, "drain_timeout", expected)
    return _seconds(text, "drain_timeout", expected, 0, MOST_DRAIN)


def _seconds(text: str, key: str, expected: str, least: float, most: float) -> float:
    if re.fullmatch(r"[0-9]{1,9}(\.[0-9]{1,9})?", text):
        if least <= float(text) <= most:
            return float(text)
    raise ConfigError(f"{key}: {_shown(text)} came, expected {expected}")


def _policy(item: Mapping[str, object], mode: str, where: str, shared_by: str) -> Policy:
    if mode != "http":
        for key in ("basic_auth", "basic_auth_file"):
            if key in item:
                raise ConfigError(
                    f"{where}{key}: the tunnel has mode {mode}, expected mode http: tcp cannot ask "
                    "for passwords; use allow, deny or rate_limit instead"
                )
    if "basic_auth" in item and "basic_auth_file" in item:
        raise ConfigError(f"{where}basic_auth and basic_auth_file came, expected only one of them")
    return Policy(
        basic_auth=_policy_part(item, "basic_auth", partial(users, shared_by=shared_by), where)
        or _policy_part(
            item, "basic_auth_file", partial(_users_of_file, shared_by=shared_by), where
        ),
        allow=_policy_part(item, "allow", networks, where),
        deny=_policy_part(item, "deny", networks, where),
        rate_limit=_policy_part(item, "rate_limit", rate_limit, where),
    )


def _policy_part(
    item: Mapping[str, object], key: str, read: Callable[[object], tuple[T, ...]], where: str
) -> tuple[T, ...]:
    if key not in item:
        return ()
    try:
        return read(item[key])
    except (PolicyError, ConfigError) as error:
        raise ConfigError(f"{where}{key}: {error}") from None


def _users_of_file(path: object, shared_by: str) -> tuple[str, ...]:
    if not isinstance(path, str) or not path.isprintable():
        raise ConfigError(f"{kind(path)} came, expected the path of a file")
    try:
        return users_of_lines(_read_file(path), shared_by)
    except (PolicyError, ConfigError) as error:
        raise ConfigError(f"{shown_path(path)[:MAX_SHOWN]}: {error}") from None


def _expect_mode(key: str, expected: str, mode: str, where: str) -> None:
    if mode != expected:
        raise ConfigError(
            f"{where}{key}: the tunnel has mode {mode}, expected mode {expected}: change mode, or "
            f"remove {key}"
        )


# --- The kinds of value --------------------------------------------------------------------------


def _text(
    mapping: Mapping[str, object], key: str, expected: str, where: str = "", *, secret: bool = False
) -> str:
    """The text of a required key. A secret may hold any character."""
    if key not in mapping:
        raise ConfigError(f"{where}{key}: missing, expected {expected}")
    value = mapping[key]
    if not isinstance(value, str):
        raise ConfigError(f"{where}{key}: {kind(value)} came, expected {expected}")
    if not secret and not value.isprintable():
        # Not shown: a missing quotation mark may have made the next line's secret a part of it.
        raise ConfigError(
            f"{where}{key}: a line break or unprintable character came, expected {expected}"
            f"{mistakes.of_unprintable(value)}"
        )
    return value


def _boolean(mapping: Mapping[str, object], key: str, default: bool, where: str = "") -> bool:
    if key not in mapping:
        return default
    text = _text(mapping, key, "true or false", where)
    if text.lower() not in BOOLEANS:
        raise ConfigError(f"{where}{key}: {_shown(text)} came, expected true or false")
    return BOOLEANS[text.lower()]


def _choice(
    mapping: Mapping[str, object],
    key: str,
    choices: tuple[str, ...],
    default: str,
    where: str = "",
    others: Mapping[str, str] = NO_ADVICE,
) -> str:
    """One of ``choices``; ``others`` has advice for some other values."""
    if key not in mapping:
        return default
    expected = f"one of {', '.join(choices)}"
    text = _text(mapping, key, expected, where)
    if text.lower() not in choices:
        advice = f"; {others[text.lower()]}" if text.lower() in others else ""
        raise ConfigError(f"{where}{key}: {_shown(text)} came, expected {expected}{advice}")
    return text.lower()


def _host_and_port(text: str, refused: Callable[[str], ConfigError]) -> tuple[str, int]:
    """Host and port of "HOST:PORT"; an IPv6 address without its brackets.

    ``refused(why)`` makes the error, of a few words that complete "'TEXT' ...".
    """
    if "/" in text:
        raise refused("has a scheme or a path" if "://" in text else "has a path")
    host, colon, port = text.rpartition(":")
    if port.endswith("]") or not colon and not text.isdigit() or not port:
        raise refused("has no port")
    if not host:
        raise refused("has no host")
    number = whole_number(port)
    if number is None or not 1 <= number <= MAX_PORT:
        raise refused(f"has no port from 1 to {MAX_PORT}")
    if host.startswith("[") and host.endswith("]"):
        host = host[1:-1]
        if not _is_ip_address(host, ipaddress.IPv6Address):
            raise refused("has no IPv6 address in its brackets")
    elif _is_ip_address(host, ipaddress.IPv6Address):
        raise refused("has an IPv6 address without brackets")
    elif not _is_ip_address(host, ipaddress.IPv4Address):
        # Underscores are not valid in hostnames, but container networks use them in service names.
        if not valid_hostname(host.replace("_", "x")):
            raise refused("has a host that is neither a hostname nor an IP address")
    return host, number


def _is_ip_address(text: str, version: Callable[[str], object]) -> bool:
    try:
        version(text)
    except ValueError:
        return False
    return True


def _shown(text: str) -> str:
    """The text in quotes, on one line, cut if it is very long, without the user and password of a
    URL."""
    text = mistakes.hidden(text)
    return repr(text if len(text) <= MAX_SHOWN else f"{text[:MAX_SHOWN]}...")
