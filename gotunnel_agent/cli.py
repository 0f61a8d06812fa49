"""The agent's command line: arguments, logging, signals, exit codes.

`gotunnel-agent forward` is another program, in forward.py; __main__.py tells the two apart.

Exit status: 0 after a signal, 2 if the configuration is wrong.
"""

import argparse
import logging
import sys
import threading

from gotunnel import Signals, __version__, set_up_process, stay_on_one_cpu

from .agent import DIAL_TIMEOUT, Agent, CannotTrust
from .config import ConfigError, load

DESCRIPTION = """\
The private half of gotunnel: connects to a gateway and serves the hostnames of its configuration
from targets that it can reach. conf/agent.yaml explains each key."""
EPILOG = "gotunnel-agent forward --help: the visitor's helper, for SSH and databases."


def main(arguments=None) -> int:
    """Run an agent until a signal comes; return the exit status."""
    options = parse(arguments)
    try:
        config = load(options.config)
        set_up_process(config.log_level)
        stay_on_one_cpu(max)  # a gateway on the same machine takes the other one
        agent = Agent(config)
    except (ConfigError, CannotTrust) as error:
        print(f"gotunnel-agent: {error}", file=sys.stderr)
        return 2
    signals = Signals()
    life = threading.Thread(target=signals.after, args=(agent.run,), name="agent", daemon=True)
    life.start()
    if signals.wait() == 0:
        return 1  # it ended by a defect, of which the log has the traceback
    logging.getLogger("gotunnel").info("stopping; a second signal stops at once")
    agent.stop()
    life.join(DIAL_TIMEOUT)  # it may be dialling, which nothing can interrupt and nobody misses
    logging.getLogger("gotunnel").info("stopped")
    return 0


def parse(arguments):
    parser = argparse.ArgumentParser(
        "gotunnel-agent", description=DESCRIPTION,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument(
        "-c", "--config", metavar="FILE", default="config.yaml",
        help="the configuration (default: config.yaml in the working folder)",
    )  # fmt: skip
    parser.add_argument("--version", action="version", version=f"gotunnel {__version__}")
    return parser.parse_args(arguments)
