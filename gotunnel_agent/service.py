"""The command `service`: what the agent's systemd unit has to say."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator

from .arguments import Parser
from .called import program
from .common.process import print_answer
from .common.service import (
    HOMES,
    TMP,
    Needs,
    Options,
    Plan,
    ServiceError,
    add_arguments,
    any_in,
    program_files,
    run_service,
    this_program,
)
from .common.status_socket import OFF
from .common.systemd_unit import Credential, Service
from .config import Config, ConfigError, load
from .home import STATE, chosen_config

PROGRAM = "gotunnel-agent"
COMMAND = "service"
LAST_WORDS = 15  # seconds beyond drain_timeout that the agent may take to end


def main(arguments: list[str] | None = None) -> int:
    """Do what stands behind `gotunnel-agent service`; returns the exit status."""
    parser = Parser(
        f"{program()} {COMMAND}",
        description="Run the agent as a service of systemd. Exit status: 0 done, or it runs; 1 it "
        "cannot be done, or does not run; 2 the configuration is wrong.",
    )  # fmt: skip
    parser.add_argument(
        "-c", "--config", metavar="FILE",
        help="the configuration (default: the one that the agent would read)",
    )  # fmt: skip
    add_arguments(parser, PROGRAM, with_socket=False)
    options = parser.parse_args(sys.argv[2:] if arguments is None else arguments)
    options.config = chosen_config(options.config)
    try:
        return print_answer(
            parser.prog,
            lambda: run_service(
                options, PROGRAM, lambda chosen: plan(chosen, load(options.config), options.config)
            ),
        )
    except (ConfigError, ServiceError) as error:
        for line in str(error).splitlines():
            print(f"{program()}: {line}", file=sys.stderr)
        return 2 if isinstance(error, ConfigError) else 1


def plan(options: Options, config: Config, config_file: str) -> Plan:
    """What an agent with that configuration needs."""
    file, folder = os.path.abspath(config_file), os.getcwd()
    program = this_program(sys.argv[0])
    dynamic = not options.per_user and options.run_as is None
    readable = [("--config", file)] if not dynamic else []
    readable += [*program_files(program), *_files(config, file)]
    sockets = [tunnel.target.path for tunnel in config.tunnels if tunnel.target.path]
    writable = []
    status = config.status_socket
    if status and status != OFF and not status.startswith(f"/run/{options.name}/"):
        writable.append(("status_socket", os.path.dirname(os.path.abspath(status))))
    used = [folder, *(path for _, path in (*readable, *writable)), *sockets]
    service = Service(
        name=options.name,
        program=PROGRAM,
        description="gotunnel agent",
        command=(*program, "-c", Credential("agent.yaml", file) if dynamic else file),
        folder=folder,
        per_user=options.per_user,
        run_as=options.run_as,
        stop_timeout=int(config.drain_timeout) + LAST_WORDS,
        # A user of a system's service has no folder of its own for the inspector's token.
        state_variable=STATE if config.inspect is not None and not options.per_user else "",
        writable=tuple(path for _, path in writable),
        homes=any_in(HOMES, used),
        shared_tmp=any_in(TMP, used),
    )
    return Plan(service, Needs(readable, writable), tuple(_notes(service, config, file)))


def _files(config: Config, config_file: str) -> Iterator[tuple[str, str]]:
    """The files that the agent reads, besides its configuration."""
    files = [("ca_file", config.ca_file)]
    files += [("target_ca_file", tunnel.target.ca_file) for tunnel in config.tunnels]
    files += [("a file with a secret", file) for file in config.secret_files]
    for what, path in files:
        if path is not None and os.path.abspath(path) != config_file:
            yield what, os.path.abspath(path)


def _notes(service: Service, config: Config, config_file: str) -> Iterator[str]:
    if service.name != PROGRAM and not config.status_socket:
        yield (f"to ask it for its status, set status_socket: /run/{service.name}/status.sock in "
               f"{config_file}")  # fmt: skip
    if any(isinstance(part, Credential) for part in service.command):
        yield f"the service gets a copy of {config_file} at each start: restart it after a change"
    if service.state_variable and service.name != PROGRAM:
        yield (f"gotunnel inspect finds its inspector as root with {STATE}=/var/lib/{service.name}")
    if service.per_user:
        yield "it ends when you log out, unless: loginctl enable-linger"
