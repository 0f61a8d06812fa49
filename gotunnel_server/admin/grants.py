"""What an operator grants to agents: the commands `token` and `agents`.

    token             prints a token that may claim some hostnames, for an agent without a secret
    agents add        adds an entry with a secret of its own to AGENTS_FILE, and prints the command
                      that joins the agent, and the lines for its configuration
    agents rotate     gives an entry a new secret beside its old one, which stays for a while, and
                      prints the same
    agents list       prints the entries, without their secrets
    agents remove     removes an entry

Tokens, join strings, configurations and tables go to standard output, remarks to standard error, so
no secret is among them. What `agents add` prints can be redirected into a configuration. A running
gateway takes up changes of AGENTS_FILE within seconds; the commands also work without one.
"""

from __future__ import annotations

import argparse
import difflib
import re
import secrets
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import TextIO, TypeVar

import jwt

from gotunnel_agent.common import addresses
from gotunnel_agent.common.join_string import TOKEN

from ..agents import agents_file, scope
from ..agents.agents_file import MAX_NAME, AgentsFileError, Entry
from ..agents.credentials import ALGORITHM, MAX_TOKEN, lapsed
from ..certs.local_ca import FOLDER as LOCAL_FOLDER
from ..certs.schedule import DAY
from ..config import Config
from . import invitation
from .invitation import NoInvitation

Value = TypeVar("Value")

SECRET_BYTES = 32  # as many as HS256's digest has; more add nothing (RFC 7518 §3.2)

# Seconds. A token cannot be revoked, unless its issuer stands in AGENTS_FILE: a longer time is
# taken for a typing error.
LEAST_TTL, MOST_TTL = 60, 5 * 365 * DAY
UNITS = {"s": 1, "m": 60, "h": 3600, "d": DAY, "y": 365 * DAY}
TTL_EXPECTED = "a time such as 90s, 45m, 12h, 30d or 1y, from 60s to 5y"

SIMPLER = "# Simpler: type this on the agent's machine, in place of these lines:"
CA_LINE = 'ca_file: "ca.crt"   # a copy of the gateway\'s {}/ca.crt'

# Names that need no quotes in YAML, in a shell or in a log line.
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*", re.ASCII)


class GrantError(Exception):
    """The token or entry that was asked for is refused; the text is one line."""


def argument(read: Callable[[str], Value]) -> Callable[[str], Value]:
    """An argument's type for argparse. It calls ``read``, whose ValueErrors are shown."""

    def read_argument(text: str) -> Value:
        try:
            return read(text)
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from None

    return read_argument


def read_ttl(text: str) -> int:
    """Seconds of a text such as "30d". Raises ValueError."""
    match = re.fullmatch(r"([0-9]{1,9})([smhdy])", text, re.ASCII)
    seconds = int(match[1]) * UNITS[match[2]] if match else 0
    if not LEAST_TTL <= seconds <= MOST_TTL:
        raise ValueError(f"{ascii(text[:MAX_NAME])} came, expected {TTL_EXPECTED}")
    return seconds


def read_name(text: str) -> str:
    """A name for a new agent. Raises ValueError."""
    if text == TOKEN:
        raise ValueError(f"{text} came, which in a join string stands for a token: name another")
    if not _NAME.fullmatch(text) or len(text) > MAX_NAME:
        raise ValueError(
            f"{ascii(text[:MAX_NAME])} came, expected letters, digits, dots, hyphens and "
            f"underscores, at most {MAX_NAME}"
        )
    return text


def read_expires(text: str) -> str:
    """A future date or time, unchanged. Raises ValueError."""
    if agents_file.read_expires(text) <= time.time():
        raise ValueError(f"{text} is in the past, expected {agents_file.DATE_EXPECTED}")
    return text


def run_token(
    config: Config,
    *,
    hosts: Sequence[str],
    ports: Sequence[range],
    ttl: int,
    issuer: str | None,
    join: bool = False,
    out: TextIO | None = None,
) -> None:
    """Print a token for ``hosts`` and ``ports`` that is valid for ``ttl`` seconds; with ``join`` a
    join string with it. With ``issuer`` None its issuer is JWT_ISSUER. Raises GrantError,
    AgentsFileError."""
    _refuse_own_names(config, hosts)
    named, issuer = issuer, config.jwt_issuer or "" if issuer is None else issuer
    entries = {} if config.agents_file is None else agents_file.read(config.agents_file).entries
    if issuer in entries:
        _refuse_more_than(entries[issuer], issuer, hosts, ports)
        secret, signed_by = entries[issuer].secret, f"the secret of {issuer} in AGENTS_FILE"
    else:
        secret, signed_by = _shared_secret(config, issuer, _nearest(issuer, entries)), "JWT_SECRET"
        if named and entries:  # right for the shared secret, but it may be a typing error
            _say(f"{ascii(named)} is not in AGENTS_FILE{_nearest(named, entries)}, so JWT_SECRET "
                 "signs this token")  # fmt: skip
    now = int(time.time())
    claims = {"iss": issuer, "iat": now, "exp": now + ttl, "hosts": hosts,
              "ports": scope.written(ports)}  # fmt: skip
    token = jwt.encode(claims, secret, ALGORITHM)
    # The registration that carries it has no more room, and also holds the hostnames.
    if len(token) > MAX_TOKEN // 2:
        raise GrantError(f"a token of {len(token)} characters is too long: name fewer hosts")
    print(_join_string(config, token=token) if join else token, file=out or sys.stdout)
    _warn_of_closed_ports(config, ports)
    use = f"On the agent's machine: {invitation.COMMAND} STRING" if join else (
        "In the agent's configuration, set token to it, or token_file to a file that holds it, in "
        "place of a secret; --join prints a join string with it"
    )  # fmt: skip
    _say(
        f"valid until {_date(now + ttl)}, signed with {signed_by}, for {scope.shown(hosts)}; "
        f"ports: {scope.shown(ports)}. {use}"
    )


def run_agents_add(
    config: Config,
    *,
    name: str,
    hosts: Sequence[str],
    ports: Sequence[range],
    expires: str | None,
    join: bool = False,
    out: TextIO | None = None,
) -> None:
    """Make a secret for a new agent, write its entry, and print the command that joins it and the
    lines for its configuration; with ``join`` only the join string. Raises GrantError,
    AgentsFileError."""
    path = _path(config)
    _refuse_own_names(config, hosts)
    if join:  # find out before the entry is written
        _join_string(config, name=name, secret="tried")
    secret = secrets.token_hex(SECRET_BYTES)
    keys = {"secret": secret, "hosts": ", ".join(hosts)}
    if ports:
        keys["ports"] = ", ".join(scope.written(ports))
    if expires:
        keys["expires"] = expires
    block = f"{name}:\n" + "".join(f'  {key}: "{text}"\n' for key, text in keys.items())
    if not agents_file.add(path, name, block):
        raise GrantError(f"{name} is in AGENTS_FILE {path} already: name another, or let "
                         f"gotunnel-server agents rotate {name} print it a new secret")  # fmt: skip
    _say(f"{name} was added to {path}; a running gateway knows it within 5 s")
    _warn_of_closed_ports(config, ports)
    lines = [
        "# For the agent's configuration; gotunnel-agent --print-example explains each key.",
        f'tunnel_addr: "{_tunnel_addr(config)}"',
        *([CA_LINE.format(config.acme_cache / LOCAL_FOLDER)] if config.local_ca else []),
        *_credential_lines(name, secret),
        "tunnels:",
        f'  - hostname: "{hosts[0].replace("*", "app")}"',
    ]
    if ports:
        lines += ['    target: "127.0.0.1:22"', '    mode: "tcp"', '    port: "auto"']
    else:
        lines += ['    target: "127.0.0.1:8000"']
    _print_credential(config, name, secret, lines, join, out or sys.stdout)
    if not config.tunnel_port:
        _say("TUNNEL_PORT is auto: replace 9443 in tunnel_addr by the port in the gateway's log")


def _print_credential(
    config: Config, name: str, secret: str, lines: Sequence[str], join: bool, out: TextIO
) -> None:
    """Print the command that joins an agent, and the lines for its configuration; or the join
    string alone. In a file, the command is a comment; on a terminal it is a line to be copied."""
    try:
        text = invitation.join_string(config, name=name, secret=secret)
    except NoInvitation as why:
        print("\n".join(lines), file=out)
        _say(f"there is no join string for {name}: {why}")
        return
    command = invitation.command(text)
    if join:
        print(text, file=out)
    elif out.isatty():
        print(*lines, "", SIMPLER, command, sep="\n", file=out)
    else:
        print(SIMPLER, f"# {command}", *lines, sep="\n", file=out)
    for remark in invitation.remarks(config):
        _say(remark)


def _join_string(config: Config, *, name: str = "", secret: str = "", token: str = "") -> str:
    """The join string. Raises GrantError if there can be none."""
    try:
        return invitation.join_string(config, name=name, secret=secret, token=token)
    except NoInvitation as why:
        raise GrantError(f"there is no join string: {why}") from None


def _credential_lines(name: str, secret: str) -> list[str]:
    return [f'jwt_issuer: "{name}"', f'jwt_secret: "{secret}"']


def run_agents_rotate(
    config: Config,
    name: str,
    *,
    until: str | None,
    join: bool = False,
    out: TextIO | None = None,
) -> None:
    """Make a new secret for an agent beside the one that it has, and print the command that joins
    it and the lines for its configuration; with ``join`` only the join string. Raises
    GrantError, AgentsFileError."""
    path = _path(config)
    secret = secrets.token_hex(SECRET_BYTES)
    if join:  # find out before the entry is changed
        _join_string(config, name=name, secret="tried")
    if not agents_file.rotate(path, name, secret, until):
        raise GrantError(f"{ascii(name)} is not in AGENTS_FILE {path}; see: agents list")
    lines = [
        "# In the agent's configuration, in place of what is there:",
        *_credential_lines(name, secret),
    ]
    _print_credential(config, name, secret, lines, join, out or sys.stdout)
    end = f"until {until}" if until else f"until: agents rotate --finish {name}"
    _say(f"{name} has a new secret; a gateway that runs knows it within 5 s. The old one is "
         f"accepted as well {end}")  # fmt: skip


def run_agents_finish(config: Config, name: str) -> None:
    """Remove the older one of an agent's two secrets. Raises GrantError, AgentsFileError."""
    path = _path(config)
    if not agents_file.finish_rotation(path, name):
        raise GrantError(f"{ascii(name)} is not in AGENTS_FILE {path}; see: agents list")
    _say(f"{name}: the old secret is no longer accepted; within 5 s a gateway that runs asks "
         "sessions of it to come again with the new one, and ends those that do not")  # fmt: skip


def run_agents_list(config: Config, out: TextIO | None = None) -> None:
    """Print the entries of AGENTS_FILE as a table. Raises GrantError, AgentsFileError."""
    entries = agents_file.read(_path(config)).entries
    rows = [("NAME", "STATE", "EXPIRES", "PORTS", "LIMITS", "HOSTS")]
    for name, entry in entries.items():
        limits = [f"{key} {most}" for key, most in entry.limits._asdict().items() if most]
        rows.append((
            name,
            _state(entry),
            "never" if entry.expires is None else _end(entry.expires),
            ", ".join(scope.written(entry.ports)) or "none",
            ", ".join(limits) or "none",
            ", ".join(entry.hosts),  # last, as it may be long and the other columns are aligned
        ))  # fmt: skip
    widths = [max(map(len, column)) for column in zip(*rows)]
    for row in rows:
        line = "  ".join(text.ljust(width) for text, width in zip(row, widths))
        print(line.rstrip(), file=out or sys.stdout)


def _state(entry: Entry) -> str:
    if lapsed(entry):
        return "disabled" if entry.disabled else "expired"
    return "two secrets" if len(entry.accepted(time.time())) > 1 else "active"


def run_agents_remove(config: Config, name: str) -> None:
    """Remove an entry from AGENTS_FILE. Raises GrantError if it is not there, AgentsFileError."""
    path = _path(config)
    if not agents_file.remove(path, name):
        raise GrantError(f"{ascii(name)} is not in AGENTS_FILE {path}; see: agents list")
    _say(f"{name} was removed from {path}; a running gateway ends its sessions within 5 s")


def _refuse_own_names(config: Config, hosts: Sequence[str]) -> None:
    """No agent can claim the gateway's own names; a wildcard that matches them is allowed."""
    own = [host for host in hosts if host in (config.gateway_host, config.tunnel_host)]
    if own:
        raise GrantError(
            f"{own[0]} is the gateway's own name, which no agent can claim: leave it out"
        )


def _refuse_more_than(
    entry: Entry, issuer: str, hosts: Sequence[str], ports: Sequence[range]
) -> None:
    """Refuse a token for more than an agent of AGENTS_FILE may claim, or of an agent that may not
    register."""
    if why := lapsed(entry):
        raise GrantError(f"issuer {issuer} {why}: the gateway would refuse its tokens")
    for host in hosts:
        if not scope.allows(entry.hosts, host):
            raise GrantError(
                f"{host} is not among the hosts of {issuer} in AGENTS_FILE "
                f"({scope.shown(entry.hosts)}): name others, or change them there"
            )
    for wanted in ports:
        if not _all_among(wanted, entry.ports):
            raise GrantError(
                f"{scope.shown([wanted])} is not among the ports of {issuer} in AGENTS_FILE "
                f"({scope.shown(entry.ports)}): name others, or change them there"
            )


def _warn_of_closed_ports(config: Config, ports: Sequence[range]) -> None:
    """Only a warning: TCP_PORTS may be about to change."""
    if closed := [wanted for wanted in ports if not _all_among(wanted, config.tcp_ports)]:
        _say(
            f"warning: {scope.shown(closed)}: not all of these ports are in TCP_PORTS "
            f"({scope.shown(config.tcp_ports)}), and the gateway opens no others: change TCP_PORTS"
        )


def _all_among(ports: range, allowed: Sequence[range]) -> bool:
    return all(any(port in some for some in allowed) for port in ports)


def _shared_secret(config: Config, issuer: str, nearest: str) -> str:
    """JWT_SECRET, for an issuer that is not in AGENTS_FILE. Raises GrantError if the gateway would
    not accept it; ``nearest`` as from _nearest()."""
    if config.jwt_secret is None:
        named = f"{ascii(issuer)} is not in AGENTS_FILE{nearest}" if issuer else "no --issuer came"
        raise GrantError(
            f"JWT_SECRET is not set and {named}, expected --issuer with a name that is there"
        )
    if config.jwt_issuer is not None and issuer != config.jwt_issuer:
        raise GrantError(
            f"the gateway would refuse the issuer {ascii(issuer)}, expected JWT_ISSUER "
            f"({config.jwt_issuer}) or a name in AGENTS_FILE{nearest}"
        )
    return config.jwt_secret


def _nearest(name: str, entries: Iterable[str]) -> str:
    """For a message: the entry whose name is like ``name``, in brackets; "" if there is none."""
    near = difflib.get_close_matches(name[:MAX_NAME], entries, n=1)
    return f" (did you mean {near[0]}?)" if near else ""


def _path(config: Config) -> Path:
    if config.agents_file is None:
        raise AgentsFileError(
            "AGENTS_FILE is not set, expected the file for agents with credentials of their own: "
            "set it, such as to agents.yaml; the command makes the file"
        )
    return config.agents_file


def _tunnel_addr(config: Config) -> str:
    return f"{addresses.as_host(config.tunnel_host)}:{config.tunnel_port or 9443}"


def _end(seconds: float) -> str:
    """The end of validity as the operator most likely typed it: a date includes that day."""
    if seconds % DAY:
        return _date(seconds)
    return datetime.fromtimestamp(seconds - DAY, timezone.utc).strftime("%Y-%m-%d")


def _date(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, timezone.utc).strftime("%Y-%m-%d %H:%M UTC")


def _say(text: str) -> None:
    print(f"gotunnel-server: {text}", file=sys.stderr)
