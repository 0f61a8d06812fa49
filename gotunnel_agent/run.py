"""Runs the agent of a configuration: logging, signals, exit codes.

Exit status: 0 after a signal; 1 after a second signal or a bug, or if metrics_port cannot be
opened; 2 if the configuration is wrong.

Services and containers start the agent as `gotunnel-agent -c FILE`. __main__.py imports this module
alone for that, as the whole command line (cli.py) takes 1.5 MB and is not needed again.
"""

import logging
import os
import sys
from importlib import import_module
from typing import Any

from gotunnel import NoThread, spawn

from .agent import Agent
from .called import program
from .common.exposed import exposures
from .common.process import HANG_UP, Signals, set_up_process, stay_on_one_cpu, watch_memory
from .config import Config, ConfigError, load
from .inspector import CannotInspect, Inspection
from .plan import Plan
from .status import describe, status_socket_of
from .trust import CannotTrust

log = logging.getLogger("gotunnel")


class CannotOpen(Exception):
    """metrics_port cannot be opened; the text is one line for the operator."""


def main(arguments: list[str] | None = None) -> int:
    """Run the agent for the arguments `-c FILE`; return the exit status."""
    _, path = sys.argv[1:] if arguments is None else arguments
    return run(path)


def run(path: str) -> int:
    """Run the agent of the configuration at ``path`` until a signal comes; return the exit
    status."""
    try:
        config = load(path)
        set_up_process(config.log_level, config.log_format)
        stay_on_one_cpu(max)  # a gateway on the same machine takes the first CPU
        agent = Agent(config)
        inspection = Inspection(agent)
        metrics = open_metrics(config, agent)
        inspect(inspection, config)
    except (ConfigError, CannotTrust) as error:
        print(f"{program()}: {error}", file=sys.stderr)
        return 2
    except (CannotOpen, CannotInspect) as error:
        print(f"{program()}: {error}", file=sys.stderr)
        return 1
    for line in exposures(config.secret_files):
        log.warning("%s", line)
    signals = Signals(hang_up=True)
    try:
        spawn("agent", signals.after, agent.run)
    except NoThread as error:
        print(f"{program()}: {error}", file=sys.stderr)
        return 1
    watch_memory()
    config_file = os.path.abspath(path)  # now: the working folder may be removed later
    status = status_socket_of(config, lambda: describe(agent.snapshot(), config_file))
    if status is not None:
        status.start()
    if metrics is not None:
        metrics.start()
    while (number := signals.wait()) == HANG_UP:
        reload(agent, path, inspection)
    if number == 0:
        return 1  # the agent ended by a bug, which was logged
    log.info("stopping; a second signal stops at once")
    agent.stop()
    inspection.close()
    if status is not None:
        status.close()
    if metrics is not None:
        metrics.close()
    log.info("stopped")
    return 0


def open_metrics(config: Config, agent: Agent) -> Any:
    """A metrics.MetricsPort, None without metrics_port. Raises CannotOpen."""
    if config.metrics_port is None:
        return None
    metrics = import_module(f"{__package__}.metrics")  # an agent without them has no memory for it
    try:
        port = metrics.MetricsPort(config.metrics_bind, config.metrics_port, agent)
    except metrics.PortUnusable as error:
        raise CannotOpen(str(error)) from None
    log.info("metrics: port %d", port.port)
    return port


def inspect(inspection: Inspection, config: Config) -> None:
    """Start, change or end the inspector. Raises CannotInspect."""
    if address := inspection.change(config.inspect):
        log.info("inspector: %s (`%s inspect` has its token)", address, program())


def reload(agent: Agent, path: str, inspection: Inspection) -> None:
    """SIGHUP: read the configuration again, and log in one line what differs. A faulty one changes
    nothing."""
    try:
        config = load(path)
        plan = Plan(config)
        inspect(inspection, config)  # before a new session, all of whose visits are to be seen
        changes = agent.change(config, plan)
    except (ConfigError, CannotTrust, CannotInspect) as error:
        log.error("SIGHUP: %s; what was read before stays in use", error)
        return
    logging.getLogger().setLevel(config.log_level.upper())
    log.info("SIGHUP: %s: %s", path, "; ".join(changes) or "nothing has changed")
