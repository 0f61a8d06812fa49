"""The text of a systemd unit that runs one of our programs. Values in, text out.

Values are quoted as systemd reads them (systemd.syntax(7), systemd.unit(5) "Specifiers"): % begins
a specifier, $ a variable in a command line, and a blank ends a word, each wherever it does.

A system's unit is confined to what the program needs; each restriction is one that
`systemd-analyze security` rates. A user's unit has those of them that need no rights.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

# First line of a unit that `service` has written. It leaves a file without this line alone.
MARK = "# Written by {} service install"
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}")  # of a unit, also a folder's name
MOST_TASKS = (
    16384  # threads: 2048 workers and as many uploads, 2 for each of 2048 relays, spare ones
)
RESTART_DELAY = 1  # seconds
WATCHDOG = 30  # seconds without a sign of life after which systemd restarts the program

# Restrictions by system calls (seccomp) and by prctl: a user's manager can make them, too.
RESTRICTIONS = (
    "NoNewPrivileges=yes",
    "LockPersonality=yes",
    "MemoryDenyWriteExecute=yes",
    "RestrictAddressFamilies=AF_INET AF_INET6 AF_UNIX",
    "RestrictNamespaces=yes",
    "RestrictRealtime=yes",
    "RestrictSUIDSGID=yes",
    "SystemCallArchitectures=native",
    # Without @resources the program could not raise its limit of open files, nor choose its CPU.
    "SystemCallFilter=@system-service",
    "SystemCallFilter=~@privileged",
    "SystemCallErrorNumber=EPERM",
)
# Restrictions by mounts: only the system's manager can make them.
CONFINEMENT = (
    "ProtectSystem=strict",
    "PrivateDevices=yes",
    "ProtectClock=yes",
    "ProtectControlGroups=yes",
    "ProtectHostname=yes",
    "ProtectKernelLogs=yes",
    "ProtectKernelModules=yes",
    "ProtectKernelTunables=yes",
    "ProtectProc=invisible",
    "ProcSubset=pid",
    "RemoveIPC=yes",
)
LOW_PORTS = "CAP_NET_BIND_SERVICE"


class Credential(NamedTuple):
    """A file that systemd reads as root, and gives the program a copy of: LoadCredential=."""

    name: str
    path: str


@dataclass(frozen=True)
class Service:
    """What a unit has to say of a program. Paths are absolute."""

    name: str  # of the unit, without .service
    program: str  # gotunnel-server or gotunnel-agent
    description: str
    command: Sequence[str | Credential]  # program and arguments
    folder: str  # working folder
    per_user: bool = False  # a unit of a user's own manager
    run_as: str | None = None  # a user; None: a dynamic one
    stop_timeout: int = 30  # seconds to end after SIGTERM
    notifies: bool = False  # it tells systemd when it is ready, and feeds its watchdog
    # Variables that lead into the folders that systemd makes: to STATE, and to a file in RUNTIME.
    state_variable: str = ""
    status_variable: str = ""
    logs: bool = False  # it writes into /var/log/NAME
    writable: Sequence[str] = field(default=())  # folders that it may write into besides
    homes: bool = False  # it reads what lies in a home folder
    shared_tmp: bool = False  # it needs what others put into /tmp
    low_ports: bool = False  # it listens on ports below 1024
    sockets: Sequence[str] = field(default=())  # what a socket unit listens on: HOST:PORT, or PORT


def service_unit(service: Service) -> str:
    """The text of the file NAME.service."""
    return "\n".join((*_head(service), *_unit(service), "", *_service(service), "",
                      *_install(service), ""))  # fmt: skip


def socket_unit(service: Service) -> str:
    """The text of the file NAME.socket: systemd listens, and hands the sockets to the program."""
    lines = [*_head(service), "[Unit]", f"Description={service.description}: its ports", "",
             "[Socket]"]  # fmt: skip
    lines += [f"ListenStream={where}" for where in service.sockets]
    lines += ["Backlog=1024", "NoDelay=yes", "", "[Install]", "WantedBy=sockets.target", ""]
    return "\n".join(lines)


def is_ours(text: str, program: str) -> bool:
    """Whether a unit's text was written by this module for that program."""
    return text.startswith(MARK.format(program))


def why_not_quotable(text: str) -> str | None:
    """Why a unit cannot hold a path or an argument, in a few words; None if it can."""
    if not text.isprintable() or any("\ud800" <= character <= "\udfff" for character in text):
        return "holds a character that no unit file can hold"
    if text != text.strip() or text.endswith("\\"):
        return "ends in a character that a unit file loses"
    return None


def word(text: str, *, variables: bool = False) -> str:
    """A word of a list of words. ``variables``: of a command line, in which $ begins a variable."""
    text = text.replace("\\", "\\\\").replace('"', '\\"').replace("%", "%%")
    if variables:
        text = text.replace("$", "$$")
    return f'"{text}"' if re.search(r"[^A-Za-z0-9_./:=@%$+,-]", text) or not text else text


def whole(text: str) -> str:
    """The value of a setting that is one path, in which nothing is quoted."""
    return text.replace("%", "%%")


def _head(service: Service) -> Iterator[str]:
    how = f"{service.program} service install{' --user' if service.per_user else ''}"
    edit = f"systemctl {'--user ' if service.per_user else ''}edit {service.name}"
    yield MARK.format(service.program)
    yield f"# The next `{how}` overwrites this file. Put changes of your own into a drop-in:"
    yield f"# {edit}"


def _unit(service: Service) -> Iterator[str]:
    yield "[Unit]"
    yield f"Description={service.description}"
    if not service.per_user:  # a user's manager does not know this target
        yield "Wants=network-online.target"
        yield "After=network-online.target"
    if service.sockets:
        yield f"Requires={service.name}.socket"
        yield f"After={service.name}.socket"
    # It is started again for ever: after a night without a network it has to serve.
    yield "StartLimitIntervalSec=0"


def _service(service: Service) -> Iterator[str]:
    yield "[Service]"
    if service.notifies:
        yield "Type=notify"
        yield "NotifyAccess=all"  # a successor that was handed the sockets says that it is ready
        yield f"WatchdogSec={WATCHDOG}"
    else:
        yield "Type=exec"
    yield f"ExecStart={_command(service.command)}"
    yield "ExecReload=/bin/kill -HUP $MAINPID"
    yield f"WorkingDirectory={whole(service.folder)}"
    for part in service.command:
        if isinstance(part, Credential):
            yield f"LoadCredential={part.name}:{whole(part.path)}"
    if service.state_variable:
        yield f"Environment={service.state_variable}=%S/{service.name}"
    if service.status_variable:
        yield f"Environment={service.status_variable}=%t/{service.name}/status.sock"
    yield "Restart=on-failure"
    yield f"RestartSec={RESTART_DELAY}"
    yield "RestartPreventExitStatus=2"  # the configuration is wrong: another start does not help
    yield "KillMode=mixed"
    yield f"TimeoutStopSec={service.stop_timeout}"
    yield f"TasksMax={MOST_TASKS}"
    yield "UMask=0077"
    yield f"RuntimeDirectory={service.name}"
    if service.state_variable:
        yield f"StateDirectory={service.name}"
        yield "StateDirectoryMode=0700"
    if service.logs:
        yield f"LogsDirectory={service.name}"
    yield ""
    if service.per_user:
        yield from RESTRICTIONS
        return
    if service.run_as is None:
        yield "DynamicUser=yes"
    else:
        yield f"User={service.run_as}"
    yield from CONFINEMENT
    yield f"ProtectHome={'read-only' if service.homes else 'yes'}"
    yield f"PrivateTmp={'no' if service.shared_tmp else 'yes'}"
    if service.writable:
        yield f"ReadWritePaths={' '.join(map(word, service.writable))}"
    if service.low_ports:
        yield f"AmbientCapabilities={LOW_PORTS}"
    yield f"CapabilityBoundingSet={LOW_PORTS if service.low_ports else ''}"
    yield from RESTRICTIONS


def _install(service: Service) -> Iterator[str]:
    yield "[Install]"
    yield f"WantedBy={'default' if service.per_user else 'multi-user'}.target"
    if service.sockets:
        yield f"Also={service.name}.socket"


def _command(command: Sequence[str | Credential]) -> str:
    words = [
        f"${{CREDENTIALS_DIRECTORY}}/{part.name}"
        if isinstance(part, Credential)
        # systemd replaces no variables in the program's own path.
        else word(part, variables=place > 0)
        for place, part in enumerate(command)
    ]
    return " ".join(words)
