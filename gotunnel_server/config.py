"""The gateway's configuration: environment variables in, one frozen ``Config`` out.

Four rules hold for every variable:

- The process environment wins over the env file: the one that ``--env-file`` names, else ``.env``
  in the working folder if there is one.
- An empty or blank value counts as unset, so an empty variable in the environment does not hide
  the env file's.
- A secret ``X`` may stand in a file that ``X_FILE`` names (UTF-8, newlines at its end are
  dropped). Both at once is an error.
- Nothing is expanded: ``$`` in an env file is a dollar sign, in a secret too.

Variables with other names are left alone. Relative paths are relative to the working folder. A bad
value is a ``ConfigError``, one line that never shows a secret. ``conf/server.env`` explains each
variable to the operator.

No other module reads ``os.environ``, and no part of the gateway keeps the ``Config``: each is
handed the values it needs, by name.
"""

import io
import ipaddress
import os
import re
import ssl
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from dotenv.parser import parse_stream

from gotunnel_agent.common.addresses import Network, unmapped_network
from gotunnel_agent.common.hostnames import normal_hostname, valid_hostname
from gotunnel_agent.common.quantities import RATE_KEYS, rate, whole_number

from .agents.secret import secret_weakness
from .visitors.policy import Defaults, PolicyError, hashed_entry

DEFAULT_ENV_FILE = ".env"

# Env files and secrets take a few hundred bytes: this keeps a path like /dev/zero from being read
# for ever.
MAX_FILE = 1024 * 1024

MAX_PORT = 65535
ANY_PORT = "auto"
A_PORT = f"a port from 1 to {MAX_PORT} or {ANY_PORT} (any free one)"

# Linux lets a process open 1,048,576 files at most (fs.nr_open): a larger count is a typing error.
MAX_COUNT = 1_000_000

# Seconds. Nobody waits longer than a day: more is a typing error, such as milliseconds. Selectors
# count milliseconds in 31 bits and would fail after 24 days.
MAX_TIMEOUT = 86_400
SECONDS = f"seconds such as 10 or 2.5, at most {MAX_TIMEOUT}"

# A transfer holds a worker until the slower end is done, so many workers wait while few compute.
# A thread that waits for a slow visitor or target costs some 50 kB and no time, so there may be
# many: with few, a handful of slow downloads would stop everyone. They are made when needed.
WORKERS_PER_CORE = 256
LEAST_WORKERS = 512
MOST_WORKERS = 2048

LOG_LEVELS = ("debug", "info", "warning", "error")
LOCAL = "local"
# Let's Encrypt's directories (RFC 8555 §7.1.1), for which no other has to be named.
DIRECTORIES = {
    "production": "https://acme-v02.api.letsencrypt.org/directory",
    "staging": "https://acme-staging-v02.api.letsencrypt.org/directory",
}
ACME_ENVS = (*DIRECTORIES, LOCAL)


class ConfigError(Exception):
    """The gateway cannot start like this; the message is one line for the operator."""


@dataclass(frozen=True)
class Acme:
    """Where certificates are ordered, and as whom (RFC 8555)."""

    directory: str  # URL
    ca_file: str | None  # whom to trust at that URL, PEM; None: the public CAs
    email: str | None  # for the CA, to warn us
    eab_kid: str | None  # external account binding (§7.3.4): key identifier ...
    eab_hmac: str | None = field(repr=False)  # ... and key, base64url; both or neither


@dataclass(frozen=True)
class Config:
    """What the operator decided, checked and complete. Timeouts are in seconds.

    Port 0 means any free port. Hostnames are lower case without a trailing dot.
    """

    gateway_host: str
    gateway_port: int
    tunnel_host: str  # a hostname or an IP address
    tunnel_port: int
    dashboard_port: int | None  # None: no dashboard
    bind: tuple[str, ...]  # IP addresses; empty: all, IPv4 and IPv6
    jwt_secret: str | None = field(repr=False)  # None: only agents_file has any
    jwt_issuer: str | None  # None: any issuer
    agents_file: Path | None  # it may still have to be made
    acme_cache: Path
    local_ca: bool  # certificates from a CA of our own, where cert_dir has none
    acme: Acme | None  # ... or from one of these
    http_port: int | None  # plain HTTP, for challenges and redirects; None: none
    cert_dir: Path | None
    raw_tcp_host: str | None  # where plain bytes on the public port lead; None: nowhere
    tcp_ports: tuple[range, ...]  # public ports that agents may ask for
    trusted_proxies: tuple[Network, ...]
    policy_defaults: Defaults | None  # for tunnels that do not say it themselves
    max_connections: int
    workers: int
    max_hosts_per_agent: int
    header_timeout: float
    idle_timeout: float
    response_timeout: float  # to the first byte of the answer
    drain_timeout: float  # may be 0
    log_level: str  # one of LOG_LEVELS
    warnings: tuple[str, ...]  # lines for the log at start


def load(env_file: str | None = None, environ: Mapping[str, str] = os.environ) -> Config:
    """Read, check and complete the configuration.

    ``env_file`` must exist when it is given; with None, ``.env`` is read if there is one.
    Raises ConfigError at the first thing that is wrong.
    """
    read = _Variables({**_read_env_file(env_file), **_not_blank(environ)})
    jwt_secret, agents_file = read.secret("JWT_SECRET"), read.file_to_be("AGENTS_FILE")
    if jwt_secret is None and agents_file is None:
        raise ConfigError(
            "JWT_SECRET is not set, expected the secret that signs the agents' tokens: "
            "set it, or JWT_SECRET_FILE, to the output of: openssl rand -hex 32; or set AGENTS_FILE"
        )
    local_ca, cert_dir, acme = read.certificates()
    config = Config(
        gateway_host=read.hostname("GATEWAY_HOST"),
        gateway_port=read.port("GATEWAY_PORT", 443),
        tunnel_host=read.hostname_or_ip("TUNNEL_HOST"),
        tunnel_port=read.port("TUNNEL_PORT", 9443),
        dashboard_port=read.port_or_off("DASHBOARD_PORT", 8080),
        bind=read.ip_addresses("BIND"),
        jwt_secret=jwt_secret,
        jwt_issuer=read.text("JWT_ISSUER"),
        agents_file=agents_file,
        acme_cache=read.folder_to_be("ACME_CACHE", "./cert-cache"),
        local_ca=local_ca,
        cert_dir=cert_dir,
        acme=acme,
        http_port=read.port_or_off("HTTP_PORT", 80 if acme else None),
        raw_tcp_host=read.hostname_or_none("RAW_TCP_HOST"),
        tcp_ports=read.port_ranges("TCP_PORTS"),
        trusted_proxies=read.networks("TRUSTED_PROXIES"),
        policy_defaults=read.policy_defaults(),
        max_connections=read.count("MAX_CONNECTIONS", 10_000),
        workers=read.count("WORKERS", default_workers(os.cpu_count() or 1)),
        max_hosts_per_agent=read.count("MAX_HOSTS_PER_AGENT", 50),
        header_timeout=read.seconds("HEADER_TIMEOUT", 10),
        idle_timeout=read.seconds("IDLE_TIMEOUT", 120),
        response_timeout=read.seconds("RESPONSE_TIMEOUT", 300),
        drain_timeout=read.seconds_or_zero("DRAIN_TIMEOUT", 15),
        log_level=read.choice("LOG_LEVEL", LOG_LEVELS, "info"),
        warnings=_secret_warnings(jwt_secret),
    )
    _refuse_equal_ports(
        GATEWAY_PORT=config.gateway_port,
        TUNNEL_PORT=config.tunnel_port,
        DASHBOARD_PORT=config.dashboard_port,
        HTTP_PORT=config.http_port,
    )
    return config


def default_workers(cores: int) -> int:
    """How many workers a machine with so many cores gets when WORKERS is unset."""
    return min(max(WORKERS_PER_CORE * cores, LEAST_WORKERS), MOST_WORKERS)


class _Variables:
    """The variables by name; each method reads one kind of value or raises ConfigError."""

    def __init__(self, values: Mapping[str, str]):
        self._values = values

    def text(self, name: str) -> str | None:
        """The value without blanks around it, None if it is unset."""
        if name not in self._values:
            return None
        text = self._values[name].strip()
        if not text.isprintable():  # not shown: a missing quote may have drawn a secret in
            raise ConfigError(
                f"{name} holds a line break or an unprintable character, "
                "expected one line of text: look for a missing quote"
            )
        return text

    def secret(self, name: str) -> str | None:
        """The secret itself or what its file holds, None if both are unset."""
        file_name = f"{name}_FILE"
        path = self.text(file_name)
        secret = self._values.get(name)
        if path is None:
            if secret is not None and not _is_utf8(secret):
                raise ConfigError(f"{name} is not UTF-8, expected UTF-8 text: set another secret")
            return secret
        if secret is not None:
            raise ConfigError(f"{name} and {file_name} are both set, expected one: unset the other")
        secret = _read_text(file_name, path).rstrip("\r\n")
        if not secret.strip():
            raise ConfigError(
                f"{file_name}: {path!r} is empty, expected a secret: write one into it"
            )
        return secret

    def hostname(self, name: str) -> str:
        text = self._required(name, "a hostname such as gateway.example.com")
        if not valid_hostname(text):
            raise ConfigError(
                f"{name} is {text!r}, expected a hostname such as gateway.example.com: "
                "letters, digits, hyphens and dots, without scheme or port"
            )
        return normal_hostname(text)

    def hostname_or_none(self, name: str) -> str | None:
        return None if self.text(name) is None else self.hostname(name)

    def hostname_or_ip(self, name: str) -> str:
        text = self._required(name, "a hostname such as tunnel.example.com, or an IP address")
        if valid_hostname(text):
            return normal_hostname(text)
        try:
            return str(ipaddress.ip_address(text))
        except ValueError:
            raise ConfigError(
                f"{name} is {text!r}, expected a hostname such as tunnel.example.com, or an IP "
                "address without brackets: without scheme or port"
            ) from None

    def ip_addresses(self, name: str) -> tuple[str, ...]:
        """Addresses separated by commas, none if it is unset."""
        text = self.text(name)
        if text is None:
            return ()
        try:
            addresses = [str(ipaddress.ip_address(part.strip())) for part in text.split(",")]
        except ValueError:
            raise ConfigError(
                f"{name} is {text!r}, expected IP addresses separated by commas such as "
                "192.0.2.1,2001:db8::1: correct it, or unset it for all addresses"
            ) from None
        return tuple(dict.fromkeys(addresses))  # the same twice would be a port in use

    def networks(self, name: str) -> tuple[Network, ...]:
        """Addresses and networks separated by commas or blanks, none if it is unset."""
        text = self.text(name) or ""
        networks = []
        for part in text.replace(",", " ").split():
            try:
                networks.append(unmapped_network(ipaddress.ip_network(part)))
            except ValueError:  # also for 10.0.0.1/8: is the address meant, or the network?
                raise ConfigError(
                    f"{name} is {text!r}, expected IP addresses, and networks without host bits, "
                    "separated by commas or blanks, such as 192.0.2.1, 10.0.0.0/8, 2001:db8::/32: "
                    f"correct {part!r}"
                ) from None
        return tuple(networks)

    def policy_defaults(self) -> Defaults | None:
        """What DEFAULT_ALLOW, DEFAULT_DENY, DEFAULT_RATE_LIMIT and DEFAULT_BASIC_AUTH ask of
        visitors, None if all are unset. Passwords are hashed here."""
        readers = {
            "allow": lambda name: [str(network) for network in self.networks(name)],
            "deny": lambda name: [str(network) for network in self.networks(name)],
            "rate_limit": self._rate_limit,
            "basic_auth": self._users,
        }
        rules = {}
        for key, read in readers.items():
            name = f"DEFAULT_{key.upper()}"
            names = (name, f"{name}_FILE") if key == "basic_auth" else (name,)
            if not self._values.keys() & set(names):
                continue
            try:  # what is set and names nothing, such as a comma, is an error too
                rules.update(Defaults.read({key: read(name)}).rules)
            except PolicyError as error:
                reason = str(error).removeprefix(f"{key}: ")
                raise ConfigError(f"{name}: {reason}: correct it") from None
        return Defaults(rules) if rules else None

    def _rate_limit(self, name: str) -> dict[str, float | int]:
        """One rate, or KEY=VALUE separated by commas or blanks."""
        text = self.text(name)
        parts = text.replace(",", " ").split()
        pairs = [part.split("=") if "=" in part else ["per_address", part] for part in parts]
        if len({pair[0] for pair in pairs}) == len(pairs) and all(len(pair) == 2 for pair in pairs):
            numbers = {
                key: whole_number(value) if "burst" in key else rate(value)
                for key, value in pairs
                if key in RATE_KEYS
            }
            if len(numbers) == len(pairs) and None not in numbers.values():
                return numbers
        raise ConfigError(
            f"{name} is {text!r}, expected requests a second and address such as 10 or 600/m, or "
            f"some of {', '.join(RATE_KEYS)}, such as per_address=10/s burst=100 total=200/s"
        )

    def _users(self, name: str) -> list[str]:
        """Entries USER:HASH, of one USER:PASSWORD a line. Raises PolicyError, too."""
        entries = []
        for number, line in enumerate(self.secret(name).split("\n"), start=1):
            if line.strip() and not line.startswith("#"):
                try:
                    entries.append(hashed_entry(line.rstrip("\r")))
                except PolicyError as error:
                    raise PolicyError(f"line {number}: {error}") from None
        return entries

    def port(self, name: str, default: int, expected: str = A_PORT) -> int:
        text = self.text(name)
        if text is None:
            return default
        if text.lower() == ANY_PORT:
            return 0
        port = whole_number(text)
        if port is None or not 1 <= port <= MAX_PORT:
            raise ConfigError(f"{name} is {text!r}, expected {expected}")
        return port

    def port_ranges(self, name: str) -> tuple[range, ...]:
        """Ports and ranges of them, separated by commas or blanks, none if it is unset."""
        ranges = []
        for part in (self.text(name) or "").replace(",", " ").split():
            first, dash, last = part.partition("-")
            first, last = whole_number(first), whole_number(last if dash else first)
            if first is None or last is None or not 1 <= first <= last <= MAX_PORT:
                raise ConfigError(
                    f"{name} is {self.text(name)!r}, expected ports from 1 to {MAX_PORT} and "
                    f"ranges of them, separated by commas or blanks, such as 2200-2299,5432: "
                    f"correct {part!r}"
                )
            ranges.append(range(first, last + 1))
        return tuple(ranges)

    def port_or_off(self, name: str, default: int | None) -> int | None:
        """As ``port``, and None for 0."""
        if self.text(name) == "0" or self.text(name) is None and default is None:
            return None
        return self.port(name, default, f"{A_PORT}, or 0 for off")

    def count(self, name: str, default: int) -> int:
        text = self.text(name)
        if text is None:
            return default
        count = whole_number(text)
        if count is None or not 1 <= count <= MAX_COUNT:
            raise ConfigError(f"{name} is {text!r}, expected a whole number from 1 to {MAX_COUNT}")
        return count

    def seconds(self, name: str, default: float) -> float:
        seconds = self.seconds_or_zero(name, default, f"{SECONDS}, more than 0")
        if seconds == 0:
            raise ConfigError(f"{name} is {self.text(name)!r}, expected {SECONDS}, more than 0")
        return seconds

    def seconds_or_zero(self, name: str, default: float, expected: str = SECONDS) -> float:
        text = self.text(name)
        if text is None:
            return default
        # float() alone would take "inf", "1e9" and "1_0" too.
        if not re.fullmatch(r"[0-9]{1,9}(\.[0-9]{1,9})?", text) or float(text) > MAX_TIMEOUT:
            raise ConfigError(f"{name} is {text!r}, expected {expected}")
        return float(text)

    def choice(self, name: str, choices: tuple[str, ...], default: str | None) -> str | None:
        text = self.text(name)
        if text is None:
            return default
        if text.lower() not in choices:
            raise ConfigError(f"{name} is {text!r}, expected one of {', '.join(choices)}")
        return text.lower()

    def folder_to_be(self, name: str, default: str) -> Path:
        """A folder that is there or can still be made."""
        path = self.text(name) or default
        if os.path.exists(path) and not os.path.isdir(path):
            raise ConfigError(f"{name} is {path!r}, which is no folder: name another, or remove it")
        return Path(path)

    def file_to_be(self, name: str) -> Path | None:
        """A file that is there or can still be made."""
        path = self.text(name)
        if path is not None and os.path.isdir(path):
            raise ConfigError(f"{name} is {path!r}, which is a folder: name a file in it")
        return None if path is None else Path(path)

    def certificates(self) -> tuple[bool, Path | None, Acme | None]:
        """Whether a CA of our own signs; the folder of the operator's certificates; where others
        are ordered."""
        cert_dir = self.text("CERT_DIR")
        if cert_dir is not None and not os.path.isdir(cert_dir):
            raise ConfigError(
                f"CERT_DIR is {cert_dir!r}, expected a folder that exists: create it, and put your "
                "certificates there as NAME.crt with NAME.key"
            )
        directory = self.url("ACME_DIRECTORY")
        needed = cert_dir is None or directory is not None
        acme_env = self.choice("ACME_ENV", ACME_ENVS, "production" if needed else None)
        folder = None if cert_dir is None else Path(cert_dir)
        if acme_env == LOCAL and directory is not None:
            raise ConfigError(
                "ACME_DIRECTORY and ACME_ENV=local are both set, expected one: unset the other"
            )
        if acme_env in (None, LOCAL):
            return acme_env == LOCAL, folder, None
        return False, folder, self._acme(directory or DIRECTORIES[acme_env])

    def _acme(self, directory: str) -> Acme:
        kid, hmac = self.text("ACME_EAB_KID"), self.secret("ACME_EAB_HMAC_KEY")
        if (kid is None) != (hmac is None):
            raise ConfigError(
                "of ACME_EAB_KID and ACME_EAB_HMAC_KEY one alone is set, expected both, as the CA "
                "gave them, or neither"
            )
        if hmac is not None and not re.fullmatch(r"[A-Za-z0-9_-]+=*", hmac.strip()):
            raise ConfigError("ACME_EAB_HMAC_KEY is no base64url, expected what the CA gave you")
        email = self.text("ACME_EMAIL")
        if email is not None and not re.fullmatch(r"[^@\s,]+@[^@\s,]+", email):
            raise ConfigError(f"ACME_EMAIL is {email!r}, expected an address as me@example.com")
        ca_file = self.certificates_file("ACME_CA_FILE")
        return Acme(directory, ca_file, email, kid, hmac and hmac.strip())

    def url(self, name: str) -> str | None:
        text = self.text(name)
        if text is not None and not re.fullmatch(r"https://[^/\s]+(/\S*)?", text):
            raise ConfigError(f"{name} is {text!r}, expected a URL such as https://ca.example/dir")
        return text

    def file(self, name: str) -> str | None:
        """A file that can be read."""
        path = self.text(name)
        if path is not None and not (os.path.isfile(path) and os.access(path, os.R_OK)):
            raise ConfigError(f"{name} is {path!r}, expected a file that can be read")
        return path

    def certificates_file(self, name: str) -> str | None:
        path = self.file(name)
        try:
            if path is not None:
                ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT).load_verify_locations(path)
        except ssl.SSLError:
            raise ConfigError(f"{name}: {path!r} holds no certificate, expected PEM") from None
        return path

    def _required(self, name: str, expected: str) -> str:
        text = self.text(name)
        if text is None:
            raise ConfigError(f"{name} is not set, expected {expected}: set it")
        return text


def _read_env_file(env_file: str | None) -> dict[str, str]:
    """The variables in the env file that are not blank."""
    if env_file is None:
        # A folder of this name is most likely somebody's virtual environment.
        if not os.path.exists(DEFAULT_ENV_FILE) or os.path.isdir(DEFAULT_ENV_FILE):
            return {}
        env_file = DEFAULT_ENV_FILE
    values = {}
    # dotenv_values() only logs a line that it cannot parse, and expands ${...}.
    for binding in parse_stream(io.StringIO(_read_text("env file", env_file))):
        if binding.error:
            statement = binding.original.string
            blank_lines = statement[: -len(statement.lstrip())].count("\n")
            raise ConfigError(
                f"env file {env_file!r}, line {binding.original.line + blank_lines}: this is not "
                "NAME=value, expected one variable a line: look for a missing quote"
            )
        values[binding.key] = binding.value
    return _not_blank(values)


def _not_blank(values: Mapping[str, str | None]) -> dict[str, str]:
    return {name: value for name, value in values.items() if value and value.strip()}


def _read_text(what: str, path: str) -> str:
    """The text of a small file, without the byte order mark that some editors put first."""
    try:
        with open(path, "rb") as file:
            content = file.read(MAX_FILE + 1)
    except OSError as error:
        raise ConfigError(
            f"{what}: cannot read {path!r} ({error.strerror}), expected a readable file: check "
            "the path and its permissions"
        ) from None
    if len(content) > MAX_FILE:
        raise ConfigError(f"{what}: {path!r} is too long, expected at most {MAX_FILE} bytes")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError:
        raise ConfigError(
            f"{what}: {path!r} is not UTF-8, expected UTF-8 text: save it as such"
        ) from None


def _is_utf8(text: str) -> bool:
    """False for the surrogates that stand for other bytes in the environment."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _secret_warnings(jwt_secret: str | None) -> tuple[str, ...]:
    weakness = None if jwt_secret is None else secret_weakness(jwt_secret)
    if weakness is None:
        return ()
    return (
        f"JWT_SECRET {weakness}: whoever guesses it can take over any hostname; "
        "use the output of: openssl rand -hex 32",
    )


def _refuse_equal_ports(**ports: int | None) -> None:
    taken: dict[int, str] = {}
    for name, port in ports.items():
        if not port:  # off, or any free one
            continue
        if port in taken:
            raise ConfigError(f"{taken[port]} and {name} are both {port}, expected different ports")
        taken[port] = name
