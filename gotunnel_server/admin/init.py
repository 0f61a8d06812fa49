"""The command `init`: from nothing to a gateway's configuration.

It asks at most five things on a terminal, or takes them from options; then it writes the env file,
and an empty AGENTS_FILE beside it, both for their owner alone. It says which DNS records and open
ports the gateway needs, and looks whether they are there (check.py). It may also install the
service, and add a first agent. At the end it prints the commands that come next.

The answers are complete and checked before anything is written, and each file is written whole or
not at all: Ctrl-C and Ctrl-D leave nothing half-done. An env file that is there is replaced only on
request, and stays with ".before" behind its name.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import pwd
import re
import secrets
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple, TypeVar

from gotunnel_agent.common import atomic_file, small_file
from gotunnel_agent.common.hostnames import WILDCARD, normal_hostname, valid_hostname
from gotunnel_agent.common.service import RUNS, Options, Plan, ServiceError, run_service

from ..agents import scope
from ..config import DIRECTORIES, LOCAL, NAMES, Config, load
from ..net.dns import is_always_here, own_addresses
from ..variables import DEFAULT_ENV_FILE, MAX_FILE, ConfigError
from . import check, grants, invitation, service
from .check import OK, Finding

PROGRAM = "gotunnel-server"
INIT = f"{PROGRAM} init"
BEFORE = ".before"  # behind the name of an env file that was replaced
AGENTS_FILE = "agents.yaml"
NO, USER, SYSTEM = "no", "user", "system"  # --service
PRODUCTION, STAGING = DIRECTORIES
SERVICE_USER = "gotunnel"  # as which the system's service runs
SERVICE_ENV = Path("/etc/gotunnel/.env")  # the system's service cannot enter a home folder
SERVICE_CACHE = "/var/lib/gotunnel-server"
EMAIL = re.compile(r"[^@\s,'\"#\\$]+@[^@\s,'\"#\\$]+")

EXAMPLES = """\
examples:
  gotunnel-server init
  gotunnel-server init --host gateway.example.com --yes --agent office
  gotunnel-server init --local --yes        to try it on this machine alone"""

# For trials without a domain: names that mean this machine everywhere, and ports that need no
# rights.
LOCAL_SETTINGS = {"GATEWAY_PORT": "8443", "TUNNEL_PORT": "9443", "BIND": "127.0.0.1"}
LOCAL_HOST, LOCAL_TUNNEL_HOST = "gateway.localhost", "localhost"

HEAD = """\
# Written by gotunnel-server init. gotunnel-server --print-example explains all settings, and
# gotunnel-server check looks whether they fit this machine.
"""
NO_AGENTS = """\
# Agents that may connect. gotunnel-server agents add NAME --hosts HOSTS writes their entries;
# gotunnel-server agents --print-example explains them.
{}
"""

ASK_HOST = """\
The gateway needs a hostname of its own, whose DNS record leads to this machine.
Name of the gateway, such as gateway.example.com"""
ASK_HOSTS = """\
The hostnames that agents serve lead to this machine, too. A wildcard stands for
all hostnames below a name, and needs one DNS record.
Hostnames for agents"""
ASK_EMAIL = "E-mail address that the CA may write to (may be empty)"
ASK_ACME = f"""\
Certificates come from Let's Encrypt, whose terms you agree to by using it:
  {PRODUCTION}  is trusted by all. Closed ports use up attempts, of which there
              are few in an hour
  {STAGING}     is a test without such limits. Neither visitors nor agents trust
              it: set ACME_ENV={PRODUCTION} later
{PRODUCTION} or {STAGING}"""
ASK_SERVICE = "Run it as a service of systemd ({}), yes or no"
FOR_TRIALS = f"; for trials on this machine: {INIT} --local"
NO_WILDCARD = """\
Without a wildcard agents have to name their hostnames (gotunnel http 8080 --host NAME)."""

Value = TypeVar("Value")


class InitError(Exception):
    """The command cannot be done; the text is one line."""


class Answers(NamedTuple):
    """What the operator has decided."""

    settings: Mapping[str, str]  # of the env file, in its order
    hosts: tuple[str, ...]  # patterns for agents
    service: str  # NO, USER or SYSTEM
    env_file: Path


# Arguments ---------------------------------------------------------------------------------------


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--host", type=grants.argument(read_host), metavar="NAME",
                        help="the gateway's hostname (GATEWAY_HOST)")  # fmt: skip
    parser.add_argument("--tunnel-host", type=grants.argument(read_host), metavar="NAME",
                        help="the hostname that agents dial (default: the gateway's)")  # fmt: skip
    parser.add_argument(
        "--hosts", type=grants.argument(scope.read_hosts), metavar="HOSTS",
        help="the hostnames that agents may serve, such as 'a.example.com,*.dev.example.com' "
        "(default: the wildcard below the gateway's name)",
    )  # fmt: skip
    parser.add_argument("--email", type=grants.argument(read_email), metavar="ADDRESS",
                        help="where the CA may write to (ACME_EMAIL)")  # fmt: skip
    parser.add_argument(
        "--acme", choices=(PRODUCTION, STAGING),
        help=f"Let's Encrypt's CA, or its test, which nobody trusts (default: {PRODUCTION})",
    )  # fmt: skip
    parser.add_argument(
        "--local", action="store_true",
        help="for trials on this machine alone: names under .localhost, a CA of the gateway's own, "
        "high ports",
    )  # fmt: skip
    parser.add_argument(
        "--set", action="append", default=[],
        type=grants.argument(read_setting), metavar="NAME=VALUE",
        dest="more", help="a further setting; may be given several times",
    )  # fmt: skip
    parser.add_argument(
        "--service", choices=(NO, USER, SYSTEM),
        help=f"install a service of systemd: your own, or the system's as user {SERVICE_USER}, "
        "which is made if it is missing (root alone)",
    )  # fmt: skip
    parser.add_argument("--agent", type=grants.argument(grants.read_name), metavar="NAME",
                        help="add a first agent, and print the line by which it joins")  # fmt: skip
    parser.add_argument("--no-check", action="store_true",
                        help="do not look at DNS, ports and the CA")  # fmt: skip
    parser.add_argument("--yes", action="store_true",
                        help="ask nothing: what no option says gets its default")  # fmt: skip
    parser.add_argument("--force", action="store_true", help="replace an env file that is there; "
                        f"it stays, with {BEFORE} behind its name")  # fmt: skip


def read_host(text: str) -> str:
    """A hostname in its normal form. Raises ValueError."""
    name = normal_hostname(text.strip())
    if not valid_hostname(name) or "." not in name:
        raise ValueError(
            f"{ascii(text.strip()[:253])} came, expected a hostname such as gateway.example.com, "
            f"without scheme or port{FOR_TRIALS if name == 'localhost' else ''}"
        )
    return name


def read_email(text: str) -> str:
    """An address, or "" for none. Raises ValueError."""
    if text.strip() and not EMAIL.fullmatch(text.strip()):
        raise ValueError(f"{ascii(text[:253])} came, expected an address such as me@example.com")
    return text.strip()


def read_setting(text: str) -> tuple[str, str]:
    """The name and the value of a setting. Raises ValueError."""
    name, _, value = text.partition("=")
    if name not in NAMES:
        raise ValueError(f"{ascii(name[:60])} is no setting of the gateway")
    if not value.isprintable() or "'" in value:  # not shown, as it may be a secret
        raise ValueError(f"{name}: its value has a quote, or a character that cannot be written")
    return name, value


# The command -------------------------------------------------------------------------------------


def run_init(options: argparse.Namespace, environ: Mapping[str, str]) -> int:
    """Ask, write, look and print what comes next; return the exit status. Raises InitError,
    ConfigError, ServiceError, GrantError, AgentsFileError."""
    asks = not options.yes and _is_terminal()
    if not options.yes and not asks:
        raise InitError("this is no terminal to ask on: give --yes, and --host or --local")
    try:
        answers = _answers(options, asks)
        _write(answers, may_replace=options.force or (asks and _may_replace(answers.env_file)))
    except (KeyboardInterrupt, EOFError):
        print("\nnothing was written", file=sys.stderr)
        return 130
    env_file = str(answers.env_file)
    config = load(env_file, environ)
    if not options.no_check:
        _look(config, answers.hosts)
    if answers.service != NO:
        _install(answers)
    joins = ""
    try:
        joins = _first_agent(config, options.agent, answers.hosts)
    finally:  # what comes next is the same without it
        _print_next(answers, config, joins)
    return 0


def _is_terminal() -> bool:
    return bool(sys.stdin and sys.stdin.isatty() and sys.stdout.isatty())


# Questions ---------------------------------------------------------------------------------------


def _answers(options: argparse.Namespace, asks: bool) -> Answers:
    host, settings = options.host, {}
    if host is None and options.local:
        host = LOCAL_HOST
    elif host is None:
        if not asks:
            raise InitError("--host came not, expected the gateway's hostname, or --local")
        host = _ask(ASK_HOST, "", read_host)
    hosts = options.hosts or scope.read_hosts(WILDCARD + host)
    if asks and options.hosts is None:
        hosts = _ask(ASK_HOSTS, ", ".join(hosts), scope.read_hosts)
        if not any(host.startswith(WILDCARD) for host in hosts):
            print(NO_WILDCARD)
    settings["GATEWAY_HOST"] = host
    settings["TUNNEL_HOST"] = options.tunnel_host or (
        LOCAL_TUNNEL_HOST if options.local else host
    )  # fmt: skip
    settings["AGENTS_FILE"] = AGENTS_FILE
    if options.local:
        settings |= {"ACME_ENV": LOCAL, **LOCAL_SETTINGS}
    else:
        settings |= _acme(options, asks)
        settings["DASHBOARD_BIND"] = "127.0.0.1"  # else all the world sees the hostnames
    kind = _service(options, asks)
    if kind == SYSTEM:
        settings["ACME_CACHE"] = SERVICE_CACHE
    settings |= dict(options.more)
    env_file = Path(options.env_file or DEFAULT_ENV_FILE).absolute()
    if kind == SYSTEM and options.env_file is None and not os.path.exists(env_file):
        env_file = SERVICE_ENV
    return Answers(settings, hosts, kind, env_file)


def _acme(options: argparse.Namespace, asks: bool) -> dict[str, str]:
    email, acme = options.email, options.acme
    if asks and email is None:
        email = _ask(ASK_EMAIL, "", read_email)
    if acme is None:
        # The gateway orders nothing for a name that does not lead to it, so production does no harm
        # before the DNS records are there.
        acme = _ask(ASK_ACME, PRODUCTION, _one_of(PRODUCTION, STAGING)) if asks else PRODUCTION
    return {"ACME_ENV": acme, **({"ACME_EMAIL": email} if email else {})}


def _service(options: argparse.Namespace, asks: bool) -> str:
    kind = USER if os.geteuid() else SYSTEM
    if options.service == SYSTEM and kind != SYSTEM:
        raise InitError(f"--service {SYSTEM} is for root; --service {USER} needs no rights")
    if options.service in (USER, SYSTEM) and not RUNS.is_dir():
        raise InitError("systemd does not run on this machine, so no service can be installed: "
                        "leave out --service")  # fmt: skip
    if options.service is not None or not asks or not RUNS.is_dir():
        return options.service or NO
    whose = f"the system's, as user {SERVICE_USER}" if kind == SYSTEM else "your own"
    return kind if _ask(ASK_SERVICE.format(whose), "no", _one_of("yes", "no")) == "yes" else NO


def _may_replace(env_file: Path) -> bool:
    if not os.path.lexists(env_file):
        return True
    question = f"{env_file} is there. Replace it, and keep it as {env_file.name}{BEFORE}? yes or no"
    if _ask(question, "no", _one_of("yes", "no")) == "no":
        raise KeyboardInterrupt
    return True


def _ask(question: str, default: str, read: Callable[[str], Value]) -> Value:
    """Ask until the answer can be read. An empty line stands for the default. Raises EOFError."""
    explanation, _, prompt = question.rpartition("\n")
    if explanation:
        print(f"\n{explanation}")
    while True:
        text = input(f"{prompt}{f' [{default}]' if default else ''}: ").strip() or default
        try:
            return read(text)
        except ValueError as error:
            print(error)


def _one_of(*words: str) -> Callable[[str], str]:
    def read(text: str) -> str:
        """The word that begins so, since "y" is enough."""
        found = [word for word in words if text and word.startswith(text.lower())]
        if len(found) != 1:
            raise ValueError(f"{ascii(text[:60])} came, expected {' or '.join(words)}")
        return found[0]

    return read


# Files -------------------------------------------------------------------------------------------


def _write(answers: Answers, may_replace: bool) -> None:
    """Write the env file, and AGENTS_FILE if it is missing. Raises InitError, ConfigError."""
    env_file = answers.env_file
    if os.path.lexists(env_file) and not may_replace:
        raise InitError(f"{env_file} is there already, and {PROGRAM} alone runs the gateway: "
                        "--force replaces the file, and keeps it as "
                        f"{env_file.name}{BEFORE}; --env-file FILE writes another")  # fmt: skip
    lines = (f"{name}={_quoted(value)}\n" for name, value in answers.settings.items())
    content = (HEAD + "".join(lines)).encode()
    agents = env_file.parent / answers.settings["AGENTS_FILE"]
    if answers.service != SYSTEM and not os.path.isdir(env_file.parent):
        raise InitError(f"there is no folder {env_file.parent}: make it, or name another place "
                        "with --env-file")  # fmt: skip
    try:
        _try(content, env_file)
        owned = _owned_by_us
        if answers.service == SYSTEM:
            owned = _owned_by_service
            _make_user()
            env_file.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
        before = None
        if os.path.lexists(env_file):
            before = small_file.read_whole(env_file, MAX_FILE)
        if not agents.exists():
            _put(agents, NO_AGENTS.encode(), owned)
        if before is not None:
            _put(env_file.with_name(env_file.name + BEFORE), before, owned)
        _put(env_file, content, owned)
    except OSError as error:
        raise InitError(f"{error.filename or env_file}: {error.strerror}; the settings are "
                        "as they were: --env-file FILE names another place") from None  # fmt: skip
    print(f"wrote {env_file}")


def _quoted(value: str) -> str:
    return value if re.fullmatch(r"[A-Za-z0-9._:/,*@%+-]*", value, re.ASCII) else f"'{value}'"


def _try(content: bytes, env_file: Path) -> None:
    """Raises ConfigError if the gateway would refuse the file."""
    folder = env_file.parent if os.path.isdir(env_file.parent) else None  # None: that of the system
    with tempfile.NamedTemporaryFile(dir=folder, prefix=".env-", suffix=".new") as trial:
        trial.write(content)
        trial.flush()
        try:
            load(trial.name, {})
        except ConfigError as error:
            raise ConfigError(str(error).replace(trial.name, str(env_file))) from None


def _put(path: Path, content: bytes, owned: Callable[[int], None]) -> None:
    new = path.with_name(f".{path.name}.{os.getpid()}.new")
    atomic_file.write(path, content, new=new, prepare=owned)


def _owned_by_us(descriptor: int) -> None:
    """A new file is."""


def _owned_by_service(descriptor: int) -> None:
    user = pwd.getpwnam(SERVICE_USER)
    os.fchown(descriptor, user.pw_uid, user.pw_gid)


# The service -------------------------------------------------------------------------------------


def _make_user() -> None:
    """Make the service's user, if it is missing. Raises InitError."""
    with contextlib.suppress(KeyError):
        pwd.getpwnam(SERVICE_USER)
        return
    command = ["useradd", "--system", "--user-group", "--no-create-home", SERVICE_USER]
    try:
        done = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL)
        why = " ".join(done.stderr.split())
    except OSError as error:
        why = str(error.strerror)
    else:
        if not done.returncode:
            print(f"made the user {SERVICE_USER}")
            return
    raise InitError(f"{shlex.join(command)}: {why}; nothing was written: make that user, or leave "
                    f"out --service {SYSTEM}")  # fmt: skip


def _install(answers: Answers) -> None:
    """Install the unit. Raises ServiceError; the files are written then."""
    per_user = answers.service == USER
    options = argparse.Namespace(
        action="install", name=PROGRAM, per_user=per_user, socket=False, dry_run=False,
        run_as=None if per_user else SERVICE_USER,
    )  # fmt: skip

    def plan(chosen: Options) -> Plan:
        return service.plan(chosen, str(answers.env_file))

    here = os.getcwd()
    os.chdir(answers.env_file.parent)  # the service's working folder
    try:
        run_service(options, PROGRAM, plan)
    except ServiceError as error:
        again = "--user" if per_user else f"--run-as {SERVICE_USER}"
        raise ServiceError(
            f"{error}\n{answers.env_file} is written, and no service is installed; when that is "
            f"mended: {PROGRAM} service install {again} --env-file {answers.env_file}"
        ) from None
    finally:
        os.chdir(here)


# What is there -----------------------------------------------------------------------------------


def _look(config: Config, hosts: Sequence[str]) -> None:
    """Print which DNS records and ports are needed, and what keeps the gateway from working now."""
    colour = sys.stdout.isatty()
    names = dict.fromkeys((config.gateway_host, config.tunnel_host, *hosts))
    public = [name for name in names if not is_always_here(name.removeprefix(WILDCARD))]
    if public:
        print(
            f"\nDNS records that are needed, A or AAAA, to this machine's public address{_ours()}:"
        )
        for name in public:
            print("  " + check.finding_line(_look_at_record(name), colour=colour))
        ports = [f"{config.gateway_port} (visitors)", f"{config.tunnel_port} (agents)"]
        if config.http_port is not None:
            ports.append(f"{config.http_port} (the CA, and redirects to https)")
        print(f"Ports that must be open to the world: {', '.join(ports)}")
    others = [finding for finding in check.examine(config) if not _is_expected(finding)]
    bad = [finding for finding in others if finding.level != OK]
    print("\nThis machine:")
    for finding in bad:
        print("  " + check.finding_line(finding, colour=colour))
    fine = len(others) - len(bad)
    print(f"  {fine} {'other ' if bad else ''}things are as they should be; {PROGRAM} check "
          "shows all")  # fmt: skip


def _ours() -> str:
    found = own_addresses()
    return f" (it sends from {', '.join(found)})" if found else ""


def _look_at_record(name: str) -> Finding:
    """Of a wildcard, any name below it is looked up."""
    if not name.startswith(WILDCARD):
        return check.look_at_name("DNS", name)
    tried = name.replace("*", f"gotunnel-{secrets.token_hex(3)}")
    found = check.look_at_name("DNS", tried)
    return found._replace(text=found.text.replace(tried, name))


def _is_expected(finding: Finding) -> bool:
    """Names are told before, and that there is no agent yet is no news."""
    return finding.subject in ("GATEWAY_HOST", "TUNNEL_HOST") or (
        finding.subject == "AGENTS_FILE" and "no agent can register" in finding.text
    )


# What comes next ---------------------------------------------------------------------------------


def _first_agent(config: Config, name: str | None, hosts: Sequence[str]) -> str:
    """Add a first agent; returns its join string, "" if there is none. Raises GrantError,
    AgentsFileError."""
    if name is None:
        return ""
    out = io.StringIO()
    grants.run_agents_add(config, name=name, hosts=hosts, ports=(), expires=None, join=True,
                          out=out)  # fmt: skip
    return out.getvalue().strip()


def _print_next(answers: Answers, config: Config, joins: str) -> None:
    print("\nNext:")
    rows = list(_next(answers, config, joins))
    for what, commands in rows:
        print(f"  {what}:")
        for command in commands:
            print(f"    {command}")


def _next(answers: Answers, config: Config, joins: str) -> Iterable[tuple[str, list[str]]]:
    place = answers.env_file
    is_here = place == Path(DEFAULT_ENV_FILE).absolute()
    option = "" if is_here else f" --env-file {shlex.quote(str(place))}"
    if answers.service == NO:
        yield "run the gateway", [f"{PROGRAM}{option}"]
    else:
        user = " --user" if answers.service == USER else ""
        yield "start the service", [f"systemctl{user} enable --now {PROGRAM}"]
    if joins:
        yield "on the agent's machine", [invitation.command(joins), "gotunnel http 8000"]
    else:
        hosts = shlex.quote(",".join(answers.hosts))
        yield (
            "let an agent in, for which this prints a line to be typed on its machine",
            [f"{PROGRAM} agents{option} add NAME --hosts {hosts}"],
        )
    if config.acme is not None and config.acme.directory == DIRECTORIES[STAGING]:
        yield (
            "when that works, have certificates that everybody trusts",
            [f"set ACME_ENV={PRODUCTION} in {place}, and start the gateway again"],
        )
