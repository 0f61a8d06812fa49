"""Runs a gateway: logging, signals, exit codes.

Exit status: 0 after a signal; 1 if a port cannot be opened, or another thing is missing; 2 if the
configuration is wrong.

Without a command __main__.py imports this module and not the command line (cli.py), whose commands
would take 1.5 MB for as long as the gateway runs.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from gotunnel import NoThread
from gotunnel_agent.common import packages
from gotunnel_agent.common.one_line import without_secrets
from gotunnel_agent.common.process import set_up_process, stay_on_one_cpu

from .agents.agents_file import AgentsFileError
from .certs.local_ca import CertificateError
from .certs.store import StoreError
from .config import Config, environment, faults, load
from .gateway import Gateway
from .handover import Failed, Predecessor, find_predecessor
from .life import Life
from .net.inherited import Contradiction
from .net.listener import PortError
from .reloading import Reloading
from .secret_files import exposed
from .several import find_child, life_of, supervise
from .variables import ConfigError
from .visitors.log_file import LogFileError

PROGRAM = "gotunnel-server"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a gateway, without arguments or for `--env-file FILE`; return the exit status."""
    arguments = sys.argv[1:] if arguments is None else arguments
    return run(arguments[1] if arguments else None)


def run(env_file: str | None) -> int:
    """Run a gateway until a signal comes; return the exit status."""
    try:
        return _run(env_file)
    except ConfigError as error:
        return max(fail(fault, 2) for fault in faults(env_file) or [str(error)])
    except (CertificateError, AgentsFileError, Contradiction) as error:
        return fail(error, 2)
    except (PortError, LogFileError, StoreError, NoThread, Failed) as error:
        return fail(error, 1)


def _run(env_file: str | None) -> int:
    """Run a gateway until a signal comes. Raises ConfigError, CertificateError, AgentsFileError,
    PortError, Contradiction, LogFileError, NoThread; Failed if a running gateway has started this
    process as its successor (handover.py) and does not hand over."""
    child = find_child(environment())
    predecessor = None if child is not None else find_predecessor(environment())
    try:
        config = load(env_file)
        if lacking := packages.faults(packages.of_gateway(orders=config.acme is not None)):
            raise ConfigError(packages.explain(lacking))
        if child is not None:
            return serve_as(child, config, env_file)
        if config.processes > 1:
            return supervise_all(config, env_file, predecessor)
        return serve(config, env_file, Life(environment(), predecessor))
    except Exception as error:
        if predecessor is not None:
            predecessor.tell_failure(str(error))
        raise


def serve(config: Config, env_file: str | None, life: Life) -> int:
    """Run a gateway with this configuration until a signal comes. Raises as _run()."""
    set_up_process(config.log_level, config.log_format)
    stay_on_one_cpu(min)  # the first CPU: an agent on the same machine chooses the last one
    for warning in config.warnings:
        logging.getLogger("gotunnel").warning(warning)
    gateway = Gateway(config, inherited=life.inherit())
    for line in exposed(config):
        logging.getLogger("gotunnel").warning(line)
    reloading = Reloading(gateway, config, env_file, environment())
    life.run(gateway, config.tcp_ports, config.status_socket, reloading.start)
    return 0


def serve_as(child: Any, config: Config, env_file: str | None) -> int:
    """Run one of several gateways on the same ports, as its supervisor says. Raises as _run()."""
    set_up_process(config.log_level, config.log_format)
    child.set_up()
    config = replace(config, processes=child.count)
    life = life_of(child)
    gateway = Gateway(config.share(), inherited=life.inherit(), child=child)
    reloading = Reloading(gateway, config, env_file, environment())
    life.run(gateway, config.tcp_ports, config.status_socket, reloading.start)
    return 0


def supervise_all(config: Config, env_file: str | None, predecessor: Predecessor | None) -> int:
    """Supervise several gateways on the same ports until a signal comes. Raises as _run()."""
    if predecessor is not None:
        raise Failed("PROCESSES is set, which takes effect when the gateway is restarted")
    set_up_process(config.log_level, config.log_format)
    for warning in (*config.warnings, *exposed(config)):
        logging.getLogger("gotunnel").warning(warning)
    return supervise(config, env_file, environment())


def fail(error: Exception | str, status: int) -> int:
    """Say on standard error what is wrong; returns the exit status."""
    print(f"{PROGRAM}: {without_secrets(str(error))}", file=sys.stderr)
    return status
