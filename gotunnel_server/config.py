"""The gateway's configuration: environment variables in, one frozen ``Config`` out.

`variables.py` says how one variable is read, which source wins, and where a relative path begins:
all paths in a ``Config`` are absolute. ``conf/server.env`` explains each variable to the operator.

Variables with other names are ignored, unless they look like misspelt ones of ours:

    much alike, ours is not set      an error in the env file; in the environment a warning, and an
                                     error if ours lets fewer people in (GUARDS)
    alike otherwise                  a warning, in the env file only
    our prefix alone (PREFIXES)      the same

No other module reads ``os.environ``, and no part of the gateway keeps the ``Config``: each part
gets the values that it needs, by name.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from gotunnel_agent.common import packages, status_socket
from gotunnel_agent.common.addresses import Network
from gotunnel_agent.common.duplex import LEAST_STALL, MOST_STALL, STALL_TIMEOUT
from gotunnel_agent.common.passwords import Hash, PasswordError, hash_if_plain
from gotunnel_agent.common.quantities import RATE_KEYS, rate, whole_number

from .agents import scope
from .agents.registration import Terms
from .agents.secret import secret_weakness
from .variables import (
    SURELY_ALIKE,
    UNSET,
    VERY_ALIKE,
    ConfigError,
    Variables,
    absolute,
    chosen_env_file,
    folder_of,
    misspelt,
    not_blank,
    read_env_file,
)
from .visitors import http2, own_pages
from .visitors.pages import NO_TEMPLATES, TemplateError, Templates
from .visitors.policy import Defaults, PolicyError, hashed_entry, reader

if TYPE_CHECKING:
    from .cluster.settings import Settings as ClusterSettings

# A transfer holds a worker until its slower end is done, so most workers wait and few compute. A
# waiting thread costs some 50 kB and no CPU time, so there may be many: with few, a handful of slow
# downloads would stop all visitors. Threads are made when they are needed.
WORKERS_PER_CORE = 256
LEAST_WORKERS = 512
MOST_WORKERS = 2048

# PROCESSES: each one holds a session of each agent, so agents bear N times the connections.
MOST_PROCESSES = 64
AUTO = "auto"  # PROCESSES: one for each core

LOG_LEVELS = ("debug", "info", "warning", "error")
LOG_FORMATS = ("text", "json")
LOOPBACK = "127.0.0.1"
LEAST_TOKEN = 16  # characters of DASHBOARD_TOKEN, which nobody has to remember
_TOKEN = re.compile(rf"[A-Za-z0-9._~+/-]{{{LEAST_TOKEN},}}=*")  # as Bearer sends it (RFC 6750 §2.1)
CACHE = "cert-cache"  # ACME_CACHE, if it is unset
OFF = "off"  # ACCESS_LOG: no access log; HTTP2: not offered
ON = "on"  # HTTP2
LOCAL = "local"  # ACME_ENV: certificates come from the gateway's own CA
# Let's Encrypt's directories (RFC 8555 §7.1.1), by ACME_ENV.
DIRECTORIES = {
    "production": "https://acme-v02.api.letsencrypt.org/directory",
    "staging": "https://acme-staging-v02.api.letsencrypt.org/directory",
}
ACME_ENVS = (*DIRECTORIES, LOCAL)

NAMES = frozenset({  # all variables that load() may read
    "CLUSTER", "CLUSTER_ADDRESS", "CLUSTER_CA_FILE", "CLUSTER_KEY", "CLUSTER_KEY_FILE",
    "CLUSTER_NAME", "CLUSTER_PASSWORD", "CLUSTER_PASSWORD_FILE",
    "ACCESS_LOG", "ACME_CACHE", "ACME_CA_FILE", "ACME_DIRECTORY", "ACME_EAB_HMAC_KEY",
    "ACME_EAB_HMAC_KEY_FILE", "ACME_EAB_KID", "ACME_EMAIL", "ACME_ENV", "ACME_ORDERS_PER_DOMAIN",
    "AGENTS_FILE", "AGENT_TIMEOUT", "BIND", "CERT_DIR", "DASHBOARD_BIND", "DASHBOARD_PASSWORD",
    "DASHBOARD_PASSWORD_FILE", "DASHBOARD_PORT", "DASHBOARD_TOKEN", "DASHBOARD_TOKEN_FILE",
    "DEFAULT_ALLOW", "DEFAULT_BASIC_AUTH",
    "DEFAULT_BASIC_AUTH_FILE", "DEFAULT_DENY", "DEFAULT_RATE_LIMIT", "DRAIN_TIMEOUT",
    "GATEWAY_HOST", "GATEWAY_PORT", "H2C_HOSTS", "HTTP2",
    "HEADER_TIMEOUT", "HTTP_PORT", "IDLE_TIMEOUT", "JWT_ISSUER", "JWT_SECRET", "JWT_SECRET_FILE",
    "JWT_SECRET_OLD", "JWT_SECRET_OLD_FILE",
    "LOG_FORMAT", "LOG_LEVEL", "MAX_CONNECTIONS", "MAX_HOSTS_PER_AGENT", "METRICS_BIND",
    "METRICS_PORT", "PAGES_DIR", "PROCESSES", "PUBLIC_PORT", "RAW_TCP_HOST",
    "RESPONSE_TIMEOUT", "STALL_TIMEOUT", "STATUS_SOCKET", "TCP_PORTS", "TRUSTED_PROXIES",
    "TUNNEL_HOST", "TUNNEL_PORT", "WORKERS",
})  # fmt: skip
# An unknown name in the env file that begins like this was meant for the gateway.
PREFIXES = ("ACME_", "AGENTS_", "CLUSTER_", "DASHBOARD_", "DEFAULT_", "GATEWAY_", "JWT_", "TUNNEL_")
# Settings that keep people out: one of these that is misspelt would leave a door open.
GUARDS = frozenset({
    "DASHBOARD_BIND", "DASHBOARD_PASSWORD", "DASHBOARD_PASSWORD_FILE", "DEFAULT_ALLOW",
    "DEFAULT_BASIC_AUTH", "DEFAULT_BASIC_AUTH_FILE", "DEFAULT_DENY", "DEFAULT_RATE_LIMIT",
})  # fmt: skip
# Without all of these, most likely the gateway was started in the wrong folder, or for the first
# time.
FIRST = ("GATEWAY_HOST", "TUNNEL_HOST", "JWT_SECRET", "JWT_SECRET_FILE", "AGENTS_FILE")
SERVICE_ENV_FILE = "/etc/gotunnel/.env"  # where init writes the settings of the system's service
EXPLAINED = "gotunnel-server --print-example explains all settings"

# For faults(): a valid value of each variable that must be set, or whose default may be at fault.
NEUTRAL = {
    "GATEWAY_HOST": "gateway.invalid",
    "TUNNEL_HOST": "tunnel.invalid",
    "GATEWAY_PORT": "auto",
    "TUNNEL_PORT": "auto",
    "DASHBOARD_PORT": "auto",
    "HTTP_PORT": "auto",
    "JWT_SECRET": "neutral",
    "AGENTS_FILE": os.devnull,
    "ACME_CACHE": os.curdir,
    "CERT_DIR": os.curdir,
    "ACME_EAB_KID": "neutral",
    "ACME_EAB_HMAC_KEY": "neutral",
    "CLUSTER": "redis://redis.invalid",
    "CLUSTER_KEY": f"{'A' * 43}=",
}


@dataclass(frozen=True)
class Acme:
    """The CA that certificates are ordered from, and the account there (RFC 8555)."""

    directory: str  # URL
    ca_file: str | None  # CA certificates to trust at that URL, PEM; None: the public CAs
    email: str | None  # where the CA may write to
    eab_kid: str | None  # external account binding (§7.3.4): key identifier ...
    eab_hmac: str | None = field(repr=False)  # ... and key, base64url; both or neither
    orders_per_domain: int = 45  # certificates of one registered domain in a week


@dataclass(frozen=True)
class Config:
    """The operator's decisions, checked and complete. Timeouts are in seconds.

    Port 0 means any free port. Hostnames are lower case without a trailing dot.
    """

    gateway_host: str
    gateway_port: int
    public_port: int  # that visitors type, if it is not gateway_port; 0: it is
    tunnel_host: str  # a hostname or an IP address
    tunnel_port: int
    dashboard_port: int | None  # None: no dashboard
    dashboard_bind: tuple[str, ...]  # IP addresses; empty: all
    # None: the dashboard asks for no password, and shows only hostnames and modes.
    dashboard_password: Hash | None = field(repr=False)
    dashboard_token: Hash | None = field(repr=False)  # of programs that use its API; None: none
    metrics_port: int | None  # None: no metrics
    metrics_bind: tuple[str, ...]  # IP addresses
    bind: tuple[str, ...]  # IP addresses; empty: all, IPv4 and IPv6
    jwt_secret: str | None = field(repr=False)  # None: only agents in agents_file may register
    jwt_secret_old: str | None = field(repr=False)  # accepted as well; None: there is none
    jwt_issuer: str | None  # None: any issuer
    agents_file: Path | None  # it need not exist yet
    acme_cache: Path
    local_ca: bool  # the gateway's own CA signs the certificates that cert_dir lacks
    acme: Acme | None  # the CA that those are ordered from; None: from none
    http_port: int | None  # plain HTTP, for challenges and redirects; None: none
    cert_dir: Path | None
    http2: bool  # visitors may speak HTTP/2
    raw_tcp_host: str | None  # hostname in tcp mode for plain bytes on the public port
    tcp_ports: tuple[range, ...]  # public ports that agents may ask for
    h2c_hosts: tuple[str, ...]  # patterns: their targets speak HTTP/2, whatever their agents say
    trusted_proxies: tuple[Network, ...]
    policy_defaults: Defaults | None  # for tunnels whose agents set no policy of their own
    max_connections: int
    workers: int
    max_hosts_per_agent: int
    header_timeout: float
    idle_timeout: float
    response_timeout: float  # until the first byte of the answer
    stall_timeout: float  # how long a peer may read nothing of what it is sent
    drain_timeout: float  # may be 0
    agent_timeout: float  # how long a visit waits for an agent that has just left; 0: it does not
    log_level: str  # one of LOG_LEVELS
    status_socket: Path | None  # where `gotunnel-server status` asks; None: nowhere
    log_format: str  # one of LOG_FORMATS
    access_log: str  # OFF, or a path; "-": standard output
    warnings: tuple[str, ...]  # lines for the log at start
    secret_files: tuple[str, ...] = field(compare=False)  # the files that secrets were read from
    cluster: ClusterSettings | None = None  # None: this gateway is the only one
    pages_dir: str | None = None  # folder of the operator's own error pages
    templates: Templates = field(default_factory=dict, compare=False, repr=False)  # in pages_dir
    env_file: str | None = field(default=None, compare=False)  # absolute; None: there is none
    processes: int = 1  # gateways on the same ports (processes/); 1: this process alone
    # The variables as they were typed, a secret's file as its content. For comparing only.
    typed: Mapping[str, str] = field(default_factory=dict, compare=False, repr=False)

    def share(self) -> Config:
        """The decisions for one of the ``processes``. What limits all of them is divided. The
        kernel spreads connections evenly, so none of them is full long before the others."""
        return replace(
            self, max_connections=max(1, self.max_connections // self.processes),
            workers=max(1, self.workers // self.processes),
        )  # fmt: skip

    @property
    def terms(self) -> Terms:
        """What registrations may ask for."""
        return Terms(
            self.max_hosts_per_agent, reader(self.policy_defaults), self.h2c_hosts, _has_h2()
        )

    @property
    def timeouts(self) -> tuple[float, float, float, float]:
        """The values of room.Timeouts."""
        return self.header_timeout, self.idle_timeout, self.response_timeout, self.stall_timeout

    @property
    def has_login(self) -> bool:
        """Whether the dashboard shows all to those that log in, and lets them act."""
        return self.dashboard_password is not None or self.dashboard_token is not None

    @property
    def credentials(self) -> tuple[str | None, str | None, Path | None, str | None]:
        """The arguments of Credentials."""
        return self.jwt_secret, self.jwt_issuer, self.agents_file, self.jwt_secret_old


def environment() -> dict[str, str]:
    """The environment of the process, for systemd's variables and for a successor. Settings are
    read by load()."""
    return dict(os.environ)


class Source(NamedTuple):
    """Where the settings come from."""

    env_file: str | None  # absolute
    in_file: Mapping[str, str]  # the variables in it
    environ: Mapping[str, str]  # those of the process; both without blank ones

    def values(self) -> dict[str, str]:
        return {**self.in_file, **self.environ}

    def read(self, values: Mapping[str, str]) -> Variables:
        """``values`` as Variables."""
        folder = folder_of(self.env_file, self.environ)
        return Variables(values, folder, self.in_file.keys() - self.environ.keys())


def _source(env_file: str | None, environ: Mapping[str, str]) -> Source:
    """Raises ConfigError if the env file cannot be read."""
    chosen = chosen_env_file(env_file)
    return Source(chosen, read_env_file(chosen), not_blank(environ))


def load(env_file: str | None = None, environ: Mapping[str, str] = os.environ) -> Config:
    """Read, check and complete the configuration.

    ``env_file`` must exist if it is given; with None, ``.env`` is read if there is one. Raises
    ConfigError at the first fault; faults() has the others.
    """
    source = _source(env_file, environ)
    for _, text in _first_faults(source):
        raise ConfigError(text)
    values = source.values()
    read = source.read(values)
    try:
        config = _complete(read)
    except ConfigError as error:
        raise ConfigError(f"{error}{_why_unset(error, source)}") from None
    holds_secrets = read.secrets & source.in_file.keys()
    files = (*([source.env_file] if source.env_file and holds_secrets else []), *read.secret_files)
    warnings = (*config.warnings, *read.remarks.values(), *_spelling_warnings(source))
    typed = {name: text for name, text in values.items() if name in NAMES} | read.contents
    return replace(
        config, warnings=warnings, secret_files=files, env_file=source.env_file, typed=typed
    )


def faults(env_file: str | None = None, environ: Mapping[str, str] = os.environ) -> list[str]:
    """The texts of the ConfigErrors that load() would raise one after the other while the operator
    mends them; none if it raises none."""
    found: list[str] = []
    try:
        source = _source(env_file, environ)
        values = source.values()
        for name, text in _first_faults(source):
            if not name:
                return [text]
            found.append(text)
            _neutralise(values, name)
        while True:
            try:
                _complete(source.read(values))
                return found
            except ConfigError as error:
                text = f"{error}{_why_unset(error, source)}"
                is_mendable = text not in found and error.variables
                found.append(text)
                if not is_mendable:  # no other value helps, so further faults stay hidden
                    return list(dict.fromkeys(found))
                for name in error.variables:
                    _neutralise(values, name)
    except ConfigError as error:  # the env file's
        return [str(error)]


def _first_faults(source: Source) -> Iterator[tuple[str, str]]:
    """Faults that are no single variable's, each as the variable that was meant, "" if there is
    none, and the text."""
    values = source.values()
    if source.env_file is None and not any(name in values for name in FIRST):
        text = (
            f"there are no settings: no file {absolute('.env')}, and neither GATEWAY_HOST nor "
            "TUNNEL_HOST nor JWT_SECRET in the environment. "
        )
        if os.path.exists(SERVICE_ENV_FILE):
            text += f"Those of the service are in {SERVICE_ENV_FILE}: --env-file {SERVICE_ENV_FILE}"
        else:
            text += (
                "gotunnel-server init asks for what is needed and writes .env; gotunnel-server "
                "--print-example prints one to be edited; --env-file FILE names one elsewhere"
            )
        yield "", text
        return
    no_setting = "is no setting of the gateway, did you mean"
    for name, meant in misspelt(source.in_file, NAMES):
        if meant is not None and _is_ours(name, meant) and not _is_set(meant, values):
            text = (
                f"{name} in {source.env_file} {no_setting} {meant}? Correct it; if it is another "
                "program's, keep the gateway's settings in a file of their own (--env-file). "
                f"{EXPLAINED}"
            )
            yield meant, text
    for name, meant in misspelt(source.environ, NAMES, alike=VERY_ALIKE):
        if meant in GUARDS and not _is_set(meant, values):
            text = f"{name} in the environment {no_setting} {meant}? Correct it, or unset it. "
            yield meant, text + EXPLAINED


def _is_ours(name: str, meant: str) -> bool:
    """Whether a name that is like that of a setting is hardly another program's, as READ_TIMEOUT
    and DB_MAX_CONNECTIONS are."""
    if name.upper().endswith(f"_{meant}"):
        return False
    return name.upper().startswith(PREFIXES) or any(misspelt([name], [meant], alike=SURELY_ALIKE))


def _is_set(name: str | None, values: Mapping[str, str]) -> bool:
    """Whether a setting has a value, in a file of its own or otherwise, or needs none."""
    stem = (name or "").removesuffix("_FILE")
    instead = {"AGENTS_FILE"} if stem == "JWT_SECRET" else set()
    return bool(values.keys() & {name, stem, f"{stem}_FILE", *instead})


def _neutralise(values: dict[str, str], name: str) -> None:
    """Give a variable at fault a value that hides no other fault, and causes none."""
    if name == "CLUSTER" and not {name, "CLUSTER_KEY", "CLUSTER_KEY_FILE"} & values.keys():
        values["CLUSTER_KEY"] = NEUTRAL["CLUSTER_KEY"]  # needed only by the value that it gets here
    for known in {name, name.removesuffix("_FILE")}:
        values.pop(known, None)
        values.pop(f"{known}_FILE", None)
        if known in NEUTRAL:
            values[known] = NEUTRAL[known]


def _complete(read: Variables) -> Config:
    """Read, check and complete all variables. Raises ConfigError."""
    jwt_secret, agents_file = read.secret("JWT_SECRET"), read.file_to_be("AGENTS_FILE")
    if jwt_secret is None and agents_file is None:
        raise ConfigError(
            f"JWT_SECRET {UNSET}, expected the secret that signs the agents' tokens: "
            "set it, or JWT_SECRET_FILE, to the output of: openssl rand -hex 32; or set AGENTS_FILE"
        )
    local_ca, cert_dir, acme = _certificates(read)
    pages_dir, templates = _pages(read)
    processes = _processes(read)
    config = Config(
        gateway_host=read.hostname("GATEWAY_HOST"),
        gateway_port=read.port("GATEWAY_PORT", 443),
        public_port=read.port("PUBLIC_PORT", 0),
        tunnel_host=read.hostname_or_ip("TUNNEL_HOST"),
        tunnel_port=read.port("TUNNEL_PORT", 9443),
        dashboard_port=read.port_or_off("DASHBOARD_PORT", 8080),
        dashboard_bind=read.ip_addresses("DASHBOARD_BIND") or read.ip_addresses("BIND"),
        dashboard_password=_dashboard_password(read),
        dashboard_token=_dashboard_token(read),
        metrics_port=read.port_or_off("METRICS_PORT", None),
        metrics_bind=read.ip_addresses("METRICS_BIND") or (LOOPBACK,),
        bind=read.ip_addresses("BIND"),
        jwt_secret=jwt_secret,
        jwt_secret_old=_old_jwt_secret(read, jwt_secret),
        jwt_issuer=read.text("JWT_ISSUER"),
        agents_file=agents_file,
        acme_cache=read.folder_to_be("ACME_CACHE", CACHE),
        local_ca=local_ca,
        cert_dir=cert_dir,
        acme=acme,
        http_port=read.port_or_off("HTTP_PORT", 80 if acme else None),
        http2=_http2(read),
        raw_tcp_host=read.hostname_or_none("RAW_TCP_HOST"),
        tcp_ports=read.port_ranges("TCP_PORTS"),
        h2c_hosts=_h2c_hosts(read),
        trusted_proxies=read.networks("TRUSTED_PROXIES"),
        policy_defaults=_policy_defaults(read),
        max_connections=read.count("MAX_CONNECTIONS", 10_000),
        workers=read.count("WORKERS", default_workers(os.cpu_count() or 1, processes)),
        max_hosts_per_agent=read.count("MAX_HOSTS_PER_AGENT", 50),
        header_timeout=read.seconds("HEADER_TIMEOUT", 10),
        idle_timeout=read.seconds("IDLE_TIMEOUT", 120),
        response_timeout=read.seconds("RESPONSE_TIMEOUT", 300),
        stall_timeout=_stall_timeout(read),
        drain_timeout=read.seconds_or_zero("DRAIN_TIMEOUT", 15),
        agent_timeout=read.seconds_or_zero("AGENT_TIMEOUT", 5),
        log_level=read.choice("LOG_LEVEL", LOG_LEVELS, "info"),
        status_socket=_status_socket(read),
        log_format=read.choice("LOG_FORMAT", LOG_FORMATS, "text"),
        access_log=_access_log(read),
        warnings=_secret_warnings(jwt_secret),
        secret_files=(),
        pages_dir=pages_dir,
        templates=templates,
        cluster=_cluster(read),
        processes=processes,
    )
    _refuse_too_little(MAX_CONNECTIONS=config.max_connections, WORKERS=config.workers, of=processes)
    _refuse_equal_ports(
        GATEWAY_PORT=config.gateway_port,
        TUNNEL_PORT=config.tunnel_port,
        DASHBOARD_PORT=config.dashboard_port,
        HTTP_PORT=config.http_port,
        METRICS_PORT=config.metrics_port,
    )
    warnings = (*config.warnings, *_port_warnings(config), *_process_warnings(config))
    return replace(config, warnings=warnings)


def _has_h2() -> bool:
    """Whether there is the library for targets that speak HTTP/2."""
    return packages.fault(packages.H2) is None


def _h2c_hosts(read: Variables) -> tuple[str, ...]:
    text = read.text("H2C_HOSTS")
    if text is None:
        return ()
    try:
        patterns = scope.read_hosts(text)
    except scope.ScopeError as error:
        raise ConfigError(f"H2C_HOSTS is {text!r}: {error}") from None
    if lacking := packages.faults([packages.H2]):
        raise ConfigError(
            f"H2C_HOSTS is {text!r}, but the Python package {packages.explain(lacking)}; or unset "
            "H2C_HOSTS"
        )
    return patterns


def _access_log(read: Variables) -> str:
    text = read.text("ACCESS_LOG") or OFF
    if text in (OFF, "-"):
        return text
    text = read.path("ACCESS_LOG") or OFF
    if os.path.isdir(text):
        raise ConfigError(
            f"ACCESS_LOG is {text!r}, a folder; expected off, -, or the path of a file"
        )
    return text


def _cluster(read: Variables) -> ClusterSettings | None:
    if not read.is_set("CLUSTER"):
        if alone := [
            name for name in sorted(NAMES) if name[:8] == "CLUSTER_" and read.is_set(name)
        ]:
            are = "is" if len(alone) == 1 else "are"
            raise ConfigError(
                f"{' and '.join(alone)} {are} set without CLUSTER, expected the URL of a Redis "
                "server there, such as redis://redis.example.com:6379/0: set it, or unset "
                f"{alone[0] if len(alone) == 1 else 'all of them'}"
            )
        return None
    # Loaded here, so that a gateway that is alone has no memory for it.
    settings = import_module(f"{__package__}.cluster.settings")
    try:
        found: ClusterSettings = settings.read(read)
    except settings.SettingsError as error:
        raise ConfigError(str(error)) from None
    if lacking := packages.faults([packages.REDIS]):
        raise ConfigError(
            f"CLUSTER is set, but the Python package {packages.explain(lacking)}; or unset CLUSTER"
        )
    return found


def _pages(read: Variables) -> tuple[str | None, Templates]:
    """PAGES_DIR, and the templates in it."""
    folder = read.path("PAGES_DIR")
    if folder is None:
        return None, NO_TEMPLATES
    if not os.path.isdir(folder):
        raise ConfigError(
            f"PAGES_DIR is {folder!r}, expected a folder that exists, with pages such as "
            "no-tunnel.html or 5xx.html"
        )
    try:
        templates = own_pages.read(folder)
    except OSError as error:
        raise ConfigError(
            f"PAGES_DIR: cannot read {error.filename or folder} ({error.strerror}), expected pages "
            "that can be read: check the permissions"
        ) from None
    except TemplateError as error:
        raise ConfigError(f"PAGES_DIR, {folder}: {error}") from None
    read.contents["PAGES_DIR"] = f"{folder} {[(n, t.text) for n, t in sorted(templates.items())]}"
    return folder, templates


def _http2(read: Variables) -> bool:
    choice = read.choice("HTTP2", (ON, OFF), None)
    if choice == OFF:
        return False
    lacking = http2.lacks()
    if lacking is not None and choice == ON:
        raise ConfigError(
            f"HTTP2 is 'on', but the Python package {packages.explain([lacking])}; or unset HTTP2"
        )
    if lacking is not None and lacking.found is not None:
        read.remarks["HTTP2"] = (
            f"visitors get no HTTP/2: the Python package {packages.explain([lacking])}; or set "
            "HTTP2=off"
        )
    return lacking is None


def _certificates(read: Variables) -> tuple[bool, Path | None, Acme | None]:
    """The values of Config.local_ca, cert_dir and acme."""
    cert_dir = read.path("CERT_DIR")
    if cert_dir is not None and not os.path.isdir(cert_dir):
        raise ConfigError(
            f"CERT_DIR is {cert_dir!r}, expected a folder that exists: create it, and put your "
            "certificates there as NAME.crt with NAME.key"
        )
    directory = read.url("ACME_DIRECTORY")
    needed = cert_dir is None or directory is not None
    acme_env = read.choice("ACME_ENV", ACME_ENVS, "production" if needed else None)
    folder = None if cert_dir is None else Path(cert_dir)
    if acme_env == LOCAL and directory is not None:
        raise ConfigError(
            "ACME_DIRECTORY and ACME_ENV=local are both set, expected one: unset the other"
        )
    if acme_env in (None, LOCAL):
        return acme_env == LOCAL, folder, None
    return False, folder, _acme(read, directory or DIRECTORIES[acme_env])


def _acme(read: Variables, directory: str) -> Acme:
    kid, hmac = read.text("ACME_EAB_KID"), read.secret("ACME_EAB_HMAC_KEY")
    if (kid is None) != (hmac is None):
        raise ConfigError(
            "ACME_EAB_KID and ACME_EAB_HMAC_KEY: only one of them is set, expected both, as the CA "
            "gave them, or neither"
        )
    if hmac is not None and not re.fullmatch(r"[A-Za-z0-9_-]+=*", hmac.strip()):
        raise ConfigError("ACME_EAB_HMAC_KEY is not base64url, expected the key as the CA gave it")
    email = read.text("ACME_EMAIL")
    if email is not None and not re.fullmatch(r"[^@\s,]+@[^@\s,]+", email):
        raise ConfigError(f"ACME_EMAIL is {email!r}, expected an address such as me@example.com")
    ca_file = read.certificates_file("ACME_CA_FILE")
    orders_per_domain = read.count("ACME_ORDERS_PER_DOMAIN", Acme.orders_per_domain)
    return Acme(directory, ca_file, email, kid, hmac and hmac.strip(), orders_per_domain)


def _dashboard_password(read: Variables) -> Hash | None:
    """DASHBOARD_PASSWORD as a hash; a plain one is hashed here."""
    password = read.secret("DASHBOARD_PASSWORD")
    try:
        return None if password is None else Hash.read(hash_if_plain(password))
    except PasswordError as error:
        raise ConfigError(f"DASHBOARD_PASSWORD: {error}: correct it") from None


def _dashboard_token(read: Variables) -> Hash | None:
    """DASHBOARD_TOKEN as a hash; a plain one is checked and hashed here."""
    token = read.secret("DASHBOARD_TOKEN")
    if token is None:
        return None
    try:
        text = hash_if_plain(token)
        if text != token and not _TOKEN.fullmatch(token):
            raise PasswordError(
                f"{len(token)} characters came, expected at least {LEAST_TOKEN} from A-Z, a-z, "
                "0-9 and -._~+/, such as the output of openssl rand -hex 32"
            )
        return Hash.read(text)
    except PasswordError as error:
        raise ConfigError(f"DASHBOARD_TOKEN: {error}: correct it") from None


def _policy_defaults(read: Variables) -> Defaults | None:
    """The policy of DEFAULT_ALLOW, DEFAULT_DENY, DEFAULT_RATE_LIMIT and DEFAULT_BASIC_AUTH; None
    if all are unset. Passwords are hashed here."""
    readers: dict[str, Callable[[Variables, str], object]] = {
        "allow": _network_texts,
        "deny": _network_texts,
        "rate_limit": _rate_limit,
        "basic_auth": _users,
    }
    rules: dict[str, Any] = {}
    for key, read_rule in readers.items():
        name = f"DEFAULT_{key.upper()}"
        names = (name, f"{name}_FILE") if key == "basic_auth" else (name,)
        if not read.is_set(*names):
            continue
        try:  # a value without entries, such as a comma, is an error as well
            rules.update(Defaults.read({key: read_rule(read, name)}).rules)
        except PolicyError as error:
            reason = str(error).removeprefix(f"{key}: ")
            raise ConfigError(f"{name}: {reason}: correct it") from None
    return Defaults(rules) if rules else None


def _network_texts(read: Variables, name: str) -> list[str]:
    return [str(network) for network in read.networks(name)]


def _rate_limit(read: Variables, name: str) -> dict[str, float | int]:
    """One rate, or pairs KEY=VALUE separated by commas or blanks."""
    text = read.text(name) or ""
    parts = text.replace(",", " ").split()
    pairs = [part.split("=") if "=" in part else ["per_address", part] for part in parts]
    if len({pair[0] for pair in pairs}) == len(pairs) and all(len(pair) == 2 for pair in pairs):
        numbers: dict[str, float | int] = {}
        for key, value in pairs:
            number = whole_number(value) if "burst" in key else rate(value)
            if key in RATE_KEYS and number is not None:
                numbers[key] = number
        if len(numbers) == len(pairs):
            return numbers
    raise ConfigError(
        f"{name} is {text!r}, expected requests per second from an address such as 10 or 600/m, or "
        f"some of {', '.join(RATE_KEYS)}, such as per_address=10/s burst=100 total=200/s"
    )


def _users(read: Variables, name: str) -> list[str]:
    """Entries USER:HASH of lines USER:PASSWORD or USER:HASH. Raises PolicyError as well."""
    entries = []
    for number, line in enumerate((read.secret(name) or "").split("\n"), start=1):
        if line.strip() and not line.startswith("#"):
            try:
                entries.append(hashed_entry(line.rstrip("\r")))
            except PolicyError as error:
                raise PolicyError(f"line {number}: {error}") from None
    return entries


def _stall_timeout(read: Variables) -> float:
    """Seconds in the range of the agent's stall_timeout."""
    expected = f"seconds, a number from {LEAST_STALL} to {MOST_STALL}"
    seconds = read.seconds_or_zero("STALL_TIMEOUT", STALL_TIMEOUT, expected)
    if not LEAST_STALL <= seconds <= MOST_STALL:
        raise ConfigError(f"STALL_TIMEOUT is {read.text('STALL_TIMEOUT')!r}, expected {expected}")
    return seconds


def status_places(
    env_file: str | None = None, environ: Mapping[str, str] = os.environ
) -> list[str]:
    """The paths where a running gateway may have its status socket. The rest of the configuration
    is not checked: it may be wrong. Raises ConfigError."""
    source = _source(env_file, environ)
    read = source.read(source.values())
    path = _status_socket(read)
    if path is None:
        raise ConfigError(
            f"STATUS_SOCKET is {status_socket.OFF}, expected a path: a gateway without a status "
            "socket cannot be asked"
        )
    if read.is_set("STATUS_SOCKET"):
        return [str(path)]
    return [str(path), *status_socket.runtime_places("gotunnel-server")]


def _status_socket(read: Variables) -> Path | None:
    text = read.text("STATUS_SOCKET")
    if text is None:
        return read.folder_to_be("ACME_CACHE", CACHE) / status_socket.NAME
    if text.lower() == status_socket.OFF:
        return None
    text = read.path("STATUS_SOCKET") or text
    if problem := status_socket.why_not(text):
        raise ConfigError(
            f"STATUS_SOCKET: {problem}: name a shorter one, or set it to {status_socket.OFF}"
        )
    if os.path.isdir(text):
        raise ConfigError(f"STATUS_SOCKET is {text!r}, which is a folder: name a file in it")
    return Path(text)


def default_workers(cores: int, processes: int = 1) -> int:
    """How many workers a machine with so many cores gets if WORKERS is unset: each of the
    processes has LEAST_WORKERS at least."""
    return max(min(max(WORKERS_PER_CORE * cores, LEAST_WORKERS), MOST_WORKERS),
               LEAST_WORKERS * processes)  # fmt: skip


def _processes(read: Variables) -> int:
    text = read.text("PROCESSES")
    if text is None:
        return 1
    if text.lower() == AUTO:
        return min(cores(), MOST_PROCESSES)
    count = whole_number(text)
    if count is None or not 1 <= count <= MOST_PROCESSES:
        raise ConfigError(
            f"PROCESSES is {text!r}, expected a whole number from 1 to {MOST_PROCESSES}, or {AUTO} "
            "for one on each core"
        )
    return count


def cores() -> int:
    """The cores that this process may use: a container or taskset may leave it fewer than the
    machine has."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _refuse_too_little(*, of: int, **limits: int) -> None:
    for name, most in limits.items():
        if most < of:
            raise ConfigError(
                f"{name} is {most}, expected at least {of}: it is divided among the processes "
                "(PROCESSES)"
            )


def _old_jwt_secret(read: Variables, jwt_secret: str | None) -> str | None:
    old = read.secret("JWT_SECRET_OLD")
    if old is not None and (jwt_secret is None or old == jwt_secret):
        came = "is set without JWT_SECRET" if jwt_secret is None else "is the same as JWT_SECRET"
        raise ConfigError(
            f"JWT_SECRET_OLD {came}, expected the secret before that one: correct it, or unset it"
        )
    return old


def _why_unset(error: ConfigError, source: Source) -> str:
    """The likely reason why the variable of ``error`` is not set, to be put behind its text."""
    if UNSET not in str(error) or source.env_file is not None:
        return ""
    return f" (there is no {absolute('.env')})"


def _secret_warnings(jwt_secret: str | None) -> tuple[str, ...]:
    weakness = None if jwt_secret is None else secret_weakness(jwt_secret)
    if weakness is None:
        return ()
    return (
        f"JWT_SECRET {weakness}: an attacker who guesses it can take over any hostname; "
        "use the output of: openssl rand -hex 32",
    )


def _spelling_warnings(source: Source) -> Iterator[str]:
    """Warnings of unknown names that _first_faults() does not refuse."""
    for name, near in misspelt(source.in_file, NAMES, PREFIXES):
        hint = f"did you mean {near}?" if near else EXPLAINED
        yield f"{name} in {source.env_file} is ignored, the gateway has no such setting; {hint}"
    for name, near in misspelt(source.environ, NAMES, alike=VERY_ALIKE):
        if not _is_set(near, source.values()):
            yield (f"{name} in the environment is ignored, the gateway has no such setting; "
                   f"did you mean {near}?")  # fmt: skip


def _process_warnings(config: Config) -> Iterator[str]:
    if 1 < config.processes > cores():
        yield (f"PROCESSES is {config.processes}, and the gateway may use {cores()} cores: more "
               "processes than cores serve no more visits; set auto")  # fmt: skip


def _port_warnings(config: Config) -> Iterator[str]:
    """A warning, not an error: TCP_PORTS may be a wide range."""
    for name in ("GATEWAY_PORT", "TUNNEL_PORT", "DASHBOARD_PORT", "HTTP_PORT", "METRICS_PORT"):
        port = getattr(config, name.lower())
        if port and any(port in ports for ports in config.tcp_ports):
            yield f"TCP_PORTS holds {port}, which is {name}: no agent gets it; leave it out"


def _refuse_equal_ports(**ports: int | None) -> None:
    taken: dict[int, str] = {}
    for name, port in ports.items():
        if not port:  # off, or any free one
            continue
        if port in taken:
            raise ConfigError(f"{taken[port]} and {name} are both {port}, expected different ports")
        taken[port] = name
