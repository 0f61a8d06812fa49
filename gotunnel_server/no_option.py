"""Answers an option that the command line does not have with the setting that was meant, and a
command with the one that was meant.

Other programs take ``--port 443``; this one has variables, so that a service, a container and a
terminal configure it in the same way.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from difflib import get_close_matches

from .config import NAMES
from .variables import misspelt

# Names that other programs give to what is a setting here.
MEANT = {
    "acme": "ACME_ENV",
    "address": "BIND",
    "agents": "AGENTS_FILE",
    "cache": "ACME_CACHE",
    "cert": "CERT_DIR",
    "certs": "CERT_DIR",
    "dashboard": "DASHBOARD_PORT",
    "debug": "LOG_LEVEL",
    "domain": "GATEWAY_HOST",
    "email": "ACME_EMAIL",
    "host": "GATEWAY_HOST",
    "hostname": "GATEWAY_HOST",
    "https-port": "GATEWAY_PORT",
    "key": "CERT_DIR",
    "listen": "BIND",
    "log": "LOG_LEVEL",
    "metrics": "METRICS_PORT",
    "port": "GATEWAY_PORT",
    "proxies": "TRUSTED_PROXIES",
    "secret": "JWT_SECRET",
    "staging": "ACME_ENV",
    "tls-cert": "CERT_DIR",
    "tls-key": "CERT_DIR",
    "verbose": "LOG_LEVEL",
}
# Of these no example is made of what was typed: a secret, or a value of another kind.
NO_EXAMPLE = frozenset({"JWT_SECRET", "CERT_DIR", "ACME_ENV", "LOG_LEVEL"})
RUN = frozenset({"run", "serve", "server", "start", "up"})  # what other programs call it
# The options of `init` for settings; it takes all others by --set.
OF_INIT = {
    "GATEWAY_HOST": "--host",
    "TUNNEL_HOST": "--tunnel-host",
    "ACME_EMAIL": "--email",
    "ACME_ENV": "--acme",
}
# Commands that are below `agents`, or are those of the agent.
OF_AGENTS = frozenset({"add", "rotate", "remove", "list"})
OF_THE_AGENT = frozenset({"join", "http", "tcp", "files", "forward", "tunnel"})
PLAIN = re.compile(r"[A-Za-z0-9.,:_*@-]{1,60}")  # a value that needs no quotes in a shell


def advice(arguments: Sequence[str], *, of_init: bool = False) -> str | None:
    """What to do instead of the first option in ``arguments`` that looks like a setting; None if
    none does. ``of_init``: of the command that writes settings."""
    for place, argument in enumerate(arguments):
        name, _, value = argument.lstrip("-").partition("=")
        setting = _setting(name) if argument.startswith("-") else None
        if setting is None:
            continue
        following = arguments[place + 1 : place + 2]
        if not value and following and not following[0].startswith("-"):
            value = following[0]
        example = f"{setting}={value}" if PLAIN.fullmatch(value) else setting
        example = setting if setting in NO_EXAMPLE or "PASSWORD" in setting else example
        if of_init:
            meant = OF_INIT.get(setting, f"--set {example.partition('=')[0]}=VALUE")
            if meant == f"--{name}":
                return f"--{name} is an option of init: write it behind that"
            return f"there is no option --{name}, did you mean {meant}?"
        return (
            f"there is no option --{name}: settings are environment variables, or lines of the "
            f"file .env. Set {example} there; gotunnel-server --print-example explains all of them"
        )
    return None


def command_advice(message: str) -> str | None:
    """What to do instead of the command that argparse's ``message`` refuses; None if nothing comes
    to mind."""
    refused = re.search(r"COMMAND: invalid choice: '([^']*)' \(choose from (.*)\)", message)
    if refused is None:
        return None
    typed, choices = refused[1], re.findall(r"[\w-]+", refused[2])
    if typed.lower() in RUN and typed not in choices:
        alone = "gotunnel-server alone, without a command, runs the gateway"
        return f"there is no command {typed}: {alone}"
    if typed in OF_AGENTS and typed not in choices:
        return f"there is no command {typed}: did you mean agents {typed}?"
    if typed in OF_THE_AGENT:
        return f"there is no command {typed}: that is one of gotunnel, on the agent's machine"
    if typed == "help":
        return "there is no command help: --help shows all"
    near = get_close_matches(typed, choices, n=1)
    return f"there is no command {typed!r}, did you mean {near[0]}?" if near else None


def _setting(name: str) -> str | None:
    if name.lower() in MEANT:
        return MEANT[name.lower()]
    variable = name.upper().replace("-", "_")
    if variable in NAMES:
        return variable
    return next((meant for _, meant in misspelt([variable], NAMES)), None)
