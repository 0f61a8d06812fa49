"""Reads one variable of the gateway's configuration at a time: a text in, a checked value out.

Five rules hold for every variable:

- The process environment wins over the env file. That is the file that ``--env-file`` names, else
  ``.env`` in the working folder if there is one.
- A relative path in the env file is relative to that file's folder, one in the environment to the
  working folder.
- An empty or blank value counts as unset: an empty variable in the environment does not hide the
  one in the env file.
- A secret ``X`` may stand in a file that ``X_FILE`` names (UTF-8, newlines at its end are
  dropped). Both at once is an error.
- Nothing is expanded: ``$`` in an env file is a dollar sign, in a secret too.

A bad value is a ``ConfigError``, one line that never shows a secret.
"""

import difflib
import io
import ipaddress
import os
import re
import ssl
from collections.abc import Container, Iterable, Iterator, Mapping
from pathlib import Path
from typing import TypeVar

from dotenv.parser import parse_stream

from gotunnel import ANY_PORT
from gotunnel_agent.common import small_file
from gotunnel_agent.common.addresses import Network, unmapped_network
from gotunnel_agent.common.exposed import shown_path
from gotunnel_agent.common.hostnames import (
    MAX_PORT,
    WILDCARD,
    normal_hostname,
    valid_hostname,
    why_no_hostname,
)
from gotunnel_agent.common.one_line import on_one_line
from gotunnel_agent.common.quantities import whole_number

DEFAULT_ENV_FILE = ".env"

# Env files and secrets take a few hundred bytes. The limit keeps us from reading a path such as
# /dev/zero for ever.
MAX_FILE = 1024 * 1024

A_PORT = f"a port from 1 to {MAX_PORT} or {ANY_PORT} (any free one)"

# Linux lets a process open 1,048,576 files at most (fs.nr_open): a larger count is a typing error.
MAX_COUNT = 1_000_000

# A day, in seconds. More is a typing error, such as milliseconds. Selectors count milliseconds in
# 31 bits and would fail after 24 days.
MAX_TIMEOUT = 86_400
# How alike an unknown name must be to a known one to count as misspelt (difflib's ratio, 0 to 1).
# HSOT for HOST in a name of ours has 0.9. SMTP_PORT, a name of another program, has 0.78 to
# HTTP_PORT.
ALIKE = 0.8
# The same for an error, if the name has no prefix of ours. WORKRES for WORKERS has 0.857.
# READ_TIMEOUT and FTP_PORT, names of other programs, have 0.846 and 0.824.
SURELY_ALIKE = 0.85
# The same in the process environment, which has variables of many programs. DEFAULT_ALOW has 0.96.
VERY_ALIKE = 0.9
MAX_NAME = 60  # characters of a name that are compared, or shown

UNSET = "is not set"  # behind the name, in the error about a variable that is required
# Kubernetes puts such values into NAME_PORT in each container, if there is a Service called NAME.
SERVICE_LINK = re.compile(r"(tcp|udp|sctp)://", re.ASCII)
SECONDS = f"seconds such as 10 or 2.5, at most {MAX_TIMEOUT}"


Default = TypeVar("Default", bound="str | None")


class ConfigError(Exception):
    """The gateway cannot start like this; the text is one line for the operator. The variables at
    fault stand before its first comma or colon."""

    @property
    def variables(self) -> list[str]:
        """The names at fault, and perhaps other words in capitals; none if the env file is at
        fault."""
        return re.findall(r"[A-Z][A-Z0-9_]{3,}", re.split("[,:]", str(self), maxsplit=1)[0])


class Variables:
    """The variables by name. Each method reads one kind of value, or raises ConfigError."""

    def __init__(
        self, values: Mapping[str, str], folder: str | None = None, in_file: Container[str] = ()
    ):
        """``in_file``: the names whose values come from the env file; relative paths in them count
        from ``folder``. None: from the working folder, as all others do."""
        self._values = values
        self._folder, self._in_file = folder, in_file
        self.remarks: dict[str, str] = {}  # warnings for the log, by variable
        self.secrets: set[str] = set()  # the names that secret() was called for
        self.secret_files: list[str] = []  # the files that secret() has read
        self.contents: dict[str, str] = {}  # their contents, by the variable that names the file

    def is_set(self, *names: str) -> bool:
        """Whether any of the variables is set."""
        return any(name in self._values for name in names)

    def text(self, name: str) -> str | None:
        """The value without blanks around it; None if it is unset."""
        if name not in self._values:
            return None
        text = self._values[name].strip()
        # The value is not shown: because of a missing quote it may contain a secret.
        if not text.isprintable():
            raise ConfigError(
                f"{name} holds a line break or an unprintable character, "
                "expected one line of text: look for a missing quote"
            )
        if is_quoted(text):  # no value has quotes at both ends, and it may be a secret's path
            raise ConfigError(
                f"{name} begins and ends with a quote, expected the value alone: remove the quotes "
                "(docker run --env-file takes them for a part of the value)"
            )
        return text

    def path(self, name: str, default: str | None = None) -> str | None:
        """An absolute path; None if it is unset and has no default, which counts as if it stood in
        the env file."""
        text = self.text(name)
        is_ours = text is None or name in self._in_file
        text = default if text is None else text
        if text is None:
            return None
        if text.startswith(("~", "$")):  # a folder of that name would be made
            shown = shown_path(text) if name.endswith("_FILE") else repr(text)
            raise ConfigError(
                f"{name} is {shown}, expected a path: ~ and $ stand for themselves here, so write "
                "the whole path (or ./~ if that is its name)"
            )
        here = absolute(text)
        if self._folder is None or not is_ours or os.path.isabs(text):
            return here
        there = os.path.normpath(os.path.join(self._folder, text))
        if there == here or os.path.lexists(there) or not os.path.lexists(here):
            return there
        self.remarks[name] = (
            f"{name}: {here} is used, which is there, but relative paths in the env file count "
            f"from that file's folder, and there is no {there}: write the absolute path"
        )
        return here

    def secret(self, name: str) -> str | None:
        """The secret, or the content of its file; None if both are unset."""
        file_name = f"{name}_FILE"
        self.secrets.add(name)
        path = self.path(file_name)
        secret = self._values.get(name)
        if path is None:
            if secret is not None and not _is_utf8(secret):
                raise ConfigError(f"{name} is not UTF-8, expected UTF-8 text: set another secret")
            if secret is not None and is_quoted(secret) and name not in self._in_file:
                self.remarks[name] = (
                    f"{name} begins and ends with a quote, which counts as a part of it: remove "
                    "the quotes if they are not meant (docker run --env-file keeps them)"
                )
            return secret
        if secret is not None:
            raise ConfigError(f"{name} and {file_name} are both set, expected one: unset the other")
        self.secret_files.append(path)
        typed = self.text(file_name) or ""
        is_path = shown_path(typed) == repr(typed) or os.path.lexists(path)
        shown = repr(path) if is_path else shown_path(typed)
        secret = _read_text(file_name, path, shown).rstrip("\r\n")
        if not secret.strip():
            raise ConfigError(
                f"{file_name}: {path!r} is empty, expected a secret: write one into it"
            )
        self.contents[file_name] = secret
        return secret

    def hostname(self, name: str) -> str:
        """A hostname, in its normal form. It must be set."""
        text = self._required(name, "a hostname such as gateway.example.com")
        if not valid_hostname(text):
            raise ConfigError(
                f"{name} is {text!r}, expected a hostname such as gateway.example.com: "
                "letters, digits, hyphens and dots, without scheme or port"
                f"{_why_no_host(text)}"
            )
        return normal_hostname(text)

    def hostname_or_none(self, name: str) -> str | None:
        """As hostname(); None if it is unset."""
        return None if self.text(name) is None else self.hostname(name)

    def hostname_or_ip(self, name: str) -> str:
        """As hostname(), or an IP address."""
        text = self._required(name, "a hostname such as tunnel.example.com, or an IP address")
        if valid_hostname(text):
            return normal_hostname(text)
        try:
            return str(ipaddress.ip_address(text))
        except ValueError:
            raise ConfigError(
                f"{name} is {text!r}, expected a hostname such as tunnel.example.com, or an IP "
                "address without brackets: without scheme or port"
                f"{'' if text.startswith('[') else _why_no_host(text)}"
            ) from None

    def ip_addresses(self, name: str) -> tuple[str, ...]:
        """Addresses separated by commas; none if it is unset."""
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
        return tuple(dict.fromkeys(addresses))  # binding one twice would fail

    def networks(self, name: str) -> tuple[Network, ...]:
        """Addresses and networks separated by commas or blanks; none if it is unset."""
        text = self.text(name) or ""
        networks = []
        for part in text.replace(",", " ").split():
            try:
                networks.append(unmapped_network(ipaddress.ip_network(part)))
            except ValueError:  # also for 10.0.0.1/8, which may mean the address or the network
                raise ConfigError(
                    f"{name} is {text!r}, expected IP addresses, and networks without host bits, "
                    "separated by commas or blanks, such as 192.0.2.1, 10.0.0.0/8, 2001:db8::/32: "
                    f"correct {part!r}"
                ) from None
        return tuple(networks)

    def port(self, name: str, default: int) -> int:
        """A port, 0 for any free one."""
        text = self.text(name)
        return default if text is None else self._port(name, text, A_PORT)

    def port_or_off(self, name: str, default: int | None) -> int | None:
        """As port(), and None for off, which is written as 0."""
        text = self.text(name)
        if text is None:
            return default
        return None if text == "0" else self._port(name, text, f"{A_PORT}, or 0 for off")

    def _port(self, name: str, text: str, expected: str) -> int:
        if text.lower() == ANY_PORT:
            return 0
        port = whole_number(text)
        if port is None or not 1 <= port <= MAX_PORT:
            hint = ""
            if SERVICE_LINK.match(text):
                hint = (": Kubernetes has set it, for a Service of that name: rename the Service, "
                        "or set enableServiceLinks: false for the pod")  # fmt: skip
            raise ConfigError(f"{name} is {text!r}, expected {expected}{hint}")
        return port

    def port_ranges(self, name: str) -> tuple[range, ...]:
        """Ports and ranges of them, separated by commas or blanks; none if it is unset."""
        ranges = []
        for part in (self.text(name) or "").replace(",", " ").split():
            ends = part.split("-", maxsplit=1)
            first, last = whole_number(ends[0]), whole_number(ends[-1])
            if first is None or last is None or not 1 <= first <= last <= MAX_PORT:
                raise ConfigError(
                    f"{name} is {self.text(name)!r}, expected ports from 1 to {MAX_PORT} and "
                    f"ranges of them, separated by commas or blanks, such as 2200-2299,5432: "
                    f"correct {part!r}"
                )
            ranges.append(range(first, last + 1))
        return tuple(ranges)

    def count(self, name: str, default: int) -> int:
        """A whole number from 1 to MAX_COUNT."""
        text = self.text(name)
        if text is None:
            return default
        count = whole_number(text)
        if count is None or not 1 <= count <= MAX_COUNT:
            raise ConfigError(f"{name} is {text!r}, expected a whole number from 1 to {MAX_COUNT}")
        return count

    def seconds(self, name: str, default: float) -> float:
        """Seconds, more than 0."""
        seconds = self.seconds_or_zero(name, default, f"{SECONDS}, more than 0")
        if seconds == 0:
            raise ConfigError(f"{name} is {self.text(name)!r}, expected {SECONDS}, more than 0")
        return seconds

    def seconds_or_zero(self, name: str, default: float, expected: str = SECONDS) -> float:
        """Seconds from 0 to MAX_TIMEOUT."""
        text = self.text(name)
        if text is None:
            return default
        # float() alone would take "inf", "1e9" and "1_0" too.
        if not re.fullmatch(r"[0-9]{1,9}(\.[0-9]{1,9})?", text) or float(text) > MAX_TIMEOUT:
            raise ConfigError(f"{name} is {text!r}, expected {expected}")
        return float(text)

    def choice(self, name: str, choices: tuple[str, ...], default: Default) -> str | Default:
        """One of ``choices``, which are lower case; capitals do not count."""
        text = self.text(name)
        if text is None:
            return default
        if text.lower() not in choices:
            raise ConfigError(f"{name} is {text!r}, expected one of {', '.join(choices)}")
        return text.lower()

    def folder_to_be(self, name: str, default: str) -> Path:
        """A folder that exists or can be made."""
        path = self.path(name, default) or default
        if os.path.exists(path) and not os.path.isdir(path):
            raise ConfigError(
                f"{name} is {path!r}, which is not a folder: name another one, or remove it"
            )
        return Path(path)

    def file_to_be(self, name: str) -> Path | None:
        """A file that exists or can be made."""
        path = self.path(name)
        if path is not None and os.path.isdir(path):
            raise ConfigError(f"{name} is {path!r}, which is a folder: name a file in it")
        return None if path is None else Path(path)

    def url(self, name: str) -> str | None:
        """A URL of https."""
        text = self.text(name)
        if text is not None and "@" in text.partition("://")[2].partition("/")[0]:
            # Not shown, and not taken: the URL is logged and told to agents.
            raise ConfigError(f"{name} holds a user or a password: remove them from the URL")
        if text is not None and not re.fullmatch(r"https://[^/\s]+(/\S*)?", text):
            raise ConfigError(f"{name} is {text!r}, expected a URL such as https://ca.example/dir")
        return text

    def file(self, name: str) -> str | None:
        """A file that can be read."""
        path = self.path(name)
        if path is not None and not (os.path.isfile(path) and os.access(path, os.R_OK)):
            raise ConfigError(f"{name} is {path!r}, expected a file that can be read")
        return path

    def certificates_file(self, name: str) -> str | None:
        """A PEM file with CA certificates."""
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
            raise ConfigError(f"{name} {UNSET}, expected {expected}: set it")
        return text


def chosen_env_file(env_file: str | None) -> str | None:
    """The absolute path of the env file to read: ``env_file``, else .env if there is one; else
    None."""
    # A folder named .env is most likely a virtual environment.
    there = os.path.exists(DEFAULT_ENV_FILE) and not os.path.isdir(DEFAULT_ENV_FILE)
    chosen = env_file or (DEFAULT_ENV_FILE if there else None)
    return None if chosen is None else absolute(chosen)


def folder_of(env_file: str | None, environ: Mapping[str, str]) -> str | None:
    """The folder that relative paths in the env file count from; None: the working folder. So it is
    for what is no file of the operator's: a pipe, or systemd's copy (LoadCredential=), whose unit
    runs in the original's folder."""
    if env_file is None or not os.path.isfile(env_file):
        return None
    folder = os.path.dirname(env_file)
    return None if folder == environ.get("CREDENTIALS_DIRECTORY") else folder


def absolute(path: str) -> str:
    """The path, absolute. Links in it stay."""
    try:
        return os.path.abspath(path)
    except OSError:  # the working folder was removed
        return path


def read_env_file(env_file: str | None) -> dict[str, str]:
    """The variables in the env file that are not blank; none without a file."""
    if env_file is None:
        return {}
    values: dict[str, str | None] = {}
    # dotenv's parser, because its dotenv_values() only logs a line that it cannot parse, and
    # expands ${...}.
    for binding in parse_stream(io.StringIO(_read_text("env file", env_file))):
        if binding.error:
            statement = binding.original.string
            blank_lines = statement[: -len(statement.lstrip())].count("\n")
            with_colon = re.match(r"\s*[A-Za-z_]+\s*:", statement)
            hint = "write = in place of the colon" if with_colon else "look for a missing quote"
            raise ConfigError(
                f"env file {env_file!r}, line {binding.original.line + blank_lines}: this is not "
                f"NAME=value, expected one variable a line: {hint}"
            )
        if binding.key is not None:  # a comment or a blank line has none
            values[binding.key] = binding.value
    return not_blank(values)


def misspelt(
    names: Iterable[str],
    known: Iterable[str],
    prefixes: tuple[str, ...] = (),
    alike: float = ALIKE,
) -> Iterator[tuple[str, str | None]]:
    """Of ``names`` those that most likely should be one of ``known``: they are alike, or begin with
    one of ``prefixes``. Each comes with the known name that it is most like, or None."""
    known = set(known)
    for name in names:
        if name in known:
            continue
        upper = name[:MAX_NAME].upper()
        near = difflib.get_close_matches(upper, known, n=1, cutoff=alike)
        if near or prefixes and upper.startswith(prefixes):
            yield on_one_line(name, MAX_NAME), near[0] if near else None


def not_blank(values: Mapping[str, str | None]) -> dict[str, str]:
    """The variables that count as set."""
    return {name: value for name, value in values.items() if value and value.strip()}


def _why_no_host(text: str) -> str:
    """As why_no_hostname(), where one host is to be named."""
    if text.startswith(WILDCARD):
        return f"; this is one host's name, and no pattern: leave out the {WILDCARD}"
    return why_no_hostname(text)


def is_quoted(text: str) -> bool:
    """Whether a text begins and ends with the same quote."""
    return len(text) > 1 and text[0] == text[-1] and text[0] in "\"'"


def _read_text(what: str, path: str, shown: str | None = None) -> str:
    """The text of a small file, without the byte order mark that some editors put first.
    ``shown``: its path in a message, if it must not be quoted as it is."""
    try:
        content = small_file.read(path, MAX_FILE)
    except OSError as error:
        raise ConfigError(
            f"{what}: cannot read {shown or shown_path(path)} ({error.strerror}), "
            "expected a readable file: check the path and its permissions"
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
    """False if the text has surrogates, by which os.environ represents bytes that are not UTF-8."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
