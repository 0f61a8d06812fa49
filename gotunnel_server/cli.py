"""The gateway's command line: arguments, logging, signals, exit codes.

Exit status: 0 after a signal, 1 if a port cannot be had, 2 if the configuration is wrong.
"""

import argparse
import logging
import sys

from gotunnel import Signals, __version__, set_up_process, stay_on_one_cpu

from .authority import CertificateError
from .config import ConfigError, load
from .gateway import Gateway
from .listener import PortError

DESCRIPTION = """\
The public half of gotunnel: ends TLS for the hostnames that agents register, and passes what
visitors ask to those agents. It is configured by environment variables; conf/server.env explains
each of them."""


def main(arguments=None) -> int:
    """Run a gateway until a signal comes; return the exit status."""
    options = parse(arguments)
    try:
        config = load(options.env_file)
        set_up_process(config.log_level)
        stay_on_one_cpu(min)  # an agent on the same machine takes the other one
        for warning in config.warnings:
            logging.getLogger("gotunnel").warning(warning)
        signals = Signals()
        gateway = Gateway(config)
    except (ConfigError, CertificateError) as error:
        return fail(error, 2)
    except PortError as error:
        return fail(error, 1)
    gateway.start()
    signals.wait()
    logging.getLogger("gotunnel").info("stopping; a second signal stops at once")
    gateway.stop()
    return 0


def parse(arguments):
    parser = argparse.ArgumentParser(
        "gotunnel-server", description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument(
        "--env-file", metavar="FILE",
        help="read variables from FILE (default: .env in the working folder, if there is one)",
    )  # fmt: skip
    parser.add_argument("--version", action="version", version=f"gotunnel {__version__}")
    return parser.parse_args(arguments)


def fail(error, status):
    print(f"gotunnel-server: {error}", file=sys.stderr)
    return status
