"""The command `service`: what the gateway's systemd unit has to say."""

from __future__ import annotations

import os
import shlex
import stat
import sys
from collections.abc import Iterator
from pathlib import Path

from gotunnel_agent.common.service import (
    HOMES,
    TMP,
    Needs,
    Options,
    Plan,
    ServiceError,
    any_in,
    program_files,
    this_program,
)
from gotunnel_agent.common.status_socket import NAME as STATUS_SOCKET_NAME
from gotunnel_agent.common.systemd_unit import Credential, Service

from ..config import OFF, Config, load

PROGRAM = "gotunnel-server"
NOTIFIES = True  # the gateway tells systemd when it is ready
LAST_JOBS = 15  # seconds beyond DRAIN_TIMEOUT that the gateway may take to end
FIRST_PORT = 1024  # that is no privileged one


def plan(options: Options, chosen: str | None) -> Plan:
    """What a gateway with the env file ``chosen`` needs; None: there is none. Raises ServiceError,
    ConfigError."""
    if chosen is None:
        raise ServiceError(
            "there is no .env here, and a service has nothing of a terminal's environment: write "
            "the settings into a file .env (gotunnel-server init does), or name one with --env-file"
        )
    config = load(chosen, environ={})
    env_file, folder = os.path.abspath(chosen), os.getcwd()
    program = this_program(sys.argv[0])
    dynamic = not options.per_user and options.run_as is None
    if dynamic and _everybody_may_enter(os.path.dirname(env_file)):
        # The program gets a copy of the env file in another folder (Credential). Relative paths in
        # the copy count from the working folder, which therefore is the original's.
        folder = os.path.dirname(env_file)
    cache = os.path.abspath(config.acme_cache)
    own_state = dynamic or not (options.per_user or os.path.isdir(cache))
    status = config.status_socket
    own_status = not options.per_user and status == config.acme_cache / STATUS_SOCKET_NAME
    readable = [("--env-file", env_file)] if not dynamic else []
    readable += [*program_files(program), *_files(config, env_file)]
    writable = [] if own_state or options.per_user else [("ACME_CACHE", cache)]
    if status is not None and not own_status and not options.per_user:
        writable.append(("STATUS_SOCKET", os.path.dirname(os.path.abspath(status))))
    logs = os.path.dirname(os.path.abspath(config.access_log))
    if config.access_log in (OFF, "-") or options.per_user:
        logs = ""
    elif logs != f"/var/log/{options.name}":
        writable.append(("ACCESS_LOG", logs))
    sockets = tuple(_sockets(config)) if options.socket else ()
    used = [folder, *(path for _, path in (*readable, *writable))]
    service = Service(
        name=options.name,
        program=PROGRAM,
        description="gotunnel gateway",
        command=(*program, "--env-file", Credential("env", env_file) if dynamic else env_file),
        folder=folder,
        per_user=options.per_user,
        run_as=options.run_as,
        stop_timeout=int(config.drain_timeout) + LAST_JOBS,
        notifies=NOTIFIES,
        state_variable="ACME_CACHE" if own_state else "",
        status_variable="STATUS_SOCKET" if own_status else "",
        writable=tuple(path for _, path in writable),
        logs=logs == f"/var/log/{options.name}",
        homes=any_in(HOMES, used),
        shared_tmp=any_in(TMP, used),
        low_ports=_low_ports(config, with_socket=options.socket),
        sockets=sockets,
    )
    return Plan(service, Needs(readable, writable), tuple(_notes(service, config, cache, env_file)))


def _everybody_may_enter(folder: str) -> bool:
    """Whether a service without rights can read what lies there."""
    path = Path(folder)
    return all(each.stat().st_mode & stat.S_IXOTH for each in (path, *path.parents))


def _files(config: Config, env_file: str) -> Iterator[tuple[str, str]]:
    """The files that the gateway reads, besides the env file."""
    if config.agents_file is not None:
        yield "AGENTS_FILE", os.path.abspath(config.agents_file)
    if config.cert_dir is not None:
        yield "CERT_DIR", os.path.abspath(config.cert_dir)
    if config.pages_dir is not None:
        yield "PAGES_DIR", config.pages_dir
    if config.acme is not None and config.acme.ca_file is not None:
        yield "ACME_CA_FILE", os.path.abspath(config.acme.ca_file)
    for file in map(os.path.abspath, config.secret_files):
        if file != env_file:
            yield "a file with a secret", file


def _ports(config: Config) -> dict[str, tuple[int, tuple[str, ...]]]:
    """The ports that are opened at start, and the addresses of each, () for all."""
    ports = {
        "GATEWAY_PORT": (config.gateway_port, config.bind),
        "TUNNEL_PORT": (config.tunnel_port, config.bind),
        "HTTP_PORT": (config.http_port, config.bind),
        "DASHBOARD_PORT": (config.dashboard_port, config.dashboard_bind),
        "METRICS_PORT": (config.metrics_port, config.metrics_bind),
    }
    return {name: (port, bind) for name, (port, bind) in ports.items() if port is not None}


def _sockets(config: Config) -> Iterator[str]:
    for name, (port, addresses) in _ports(config).items():
        if port == 0:
            raise ServiceError(f"--socket: {name} is auto, expected a number: set it")
        for address in addresses:
            yield f"[{address}]:{port}" if ":" in address else f"{address}:{port}"
        if not addresses:
            yield str(port)


def _low_ports(config: Config, *, with_socket: bool) -> bool:
    ports = [] if with_socket else [port for port, _ in _ports(config).values()]
    ports += [found[0] for found in config.tcp_ports]
    return any(0 < port < FIRST_PORT for port in ports)


def _notes(service: Service, config: Config, cache: str, env_file: str) -> Iterator[str]:
    if service.state_variable:
        yield f"certificates and the account with the CA are kept in /var/lib/{service.name}"
        if os.path.isdir(cache) and cache != f"/var/lib/{service.name}":
            yield (f"to keep those in {cache}, before the first start: "
                   f"mkdir /var/lib/{service.name} && "
                   f"cp -a {shlex.quote(cache)}/. /var/lib/{service.name}/")  # fmt: skip
    if any(isinstance(part, Credential) for part in service.command):
        yield f"the service gets a copy of {env_file} at each start: restart it after a change"
    if service.status_variable and service.name != PROGRAM:
        yield f"ask it with STATUS_SOCKET=/run/{service.name}/status.sock {PROGRAM} status"
    if service.per_user:
        yield "it ends when you log out, unless: loginctl enable-linger"
        if service.low_ports:
            yield ("ports below 1024 are not for a user's service: choose higher ones, or set "
                   "sysctl net.ipv4.ip_unprivileged_port_start")  # fmt: skip
