"""The gateway's command line: arguments, logging, signals, exit codes.

Exit status:

                     0                    1                         2
    (no command)     after a signal       a port cannot be had      the configuration is wrong
    check            nothing has failed   something has failed      the configuration is wrong
    certificates     printed, asked for   NAME cannot be renewed    the configuration is wrong
"""

import argparse
import logging
import sys

from gotunnel import Signals, __version__, set_up_process, stay_on_one_cpu

from . import doctor
from .authority import CertificateError
from .cert_store import StoreError
from .config import ConfigError, load
from .gateway import Gateway
from .listener import PortError

DESCRIPTION = """\
The public half of gotunnel: ends TLS for the hostnames that agents register, and passes what
visitors ask to those agents. It is configured by environment variables; conf/server.env explains
each of them. Without a command it runs, until a signal comes."""


def main(arguments=None) -> int:
    """Do what the arguments say; return the exit status."""
    options = parse(arguments)
    try:
        config = load(options.env_file)
        if options.command is None:
            return run(config)
        # Whoever asks reads our answer, not the log of the parts that help to find it.
        logging.getLogger("gotunnel").addHandler(logging.NullHandler())
        if options.command == "check":
            return doctor.run_check(config, sys.stdout)
        if options.renew is None:
            return doctor.run_certificates(config, sys.stdout)
        print(doctor.ask_renewal(config, options.renew))
        return 0
    except (ConfigError, CertificateError) as error:
        return fail(error, 2)
    except (PortError, StoreError) as error:
        return fail(error, 1)


def run(config) -> int:
    """Run a gateway until a signal comes. Raises CertificateError, PortError."""
    set_up_process(config.log_level)
    stay_on_one_cpu(min)  # an agent on the same machine takes the other one
    for warning in config.warnings:
        logging.getLogger("gotunnel").warning(warning)
    signals = Signals()
    gateway = Gateway(config)
    gateway.start()
    signals.wait()
    logging.getLogger("gotunnel").info("stopping; a second signal stops at once")
    gateway.stop()
    return 0


def parse(arguments):
    parser = argparse.ArgumentParser(
        "gotunnel-server", description=DESCRIPTION,
        usage="%(prog)s [-h] [--version] [--env-file FILE] [COMMAND]",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    _add_env_file(parser, default=None)
    parser.add_argument("--version", action="version", version=f"gotunnel {__version__}")
    commands = parser.add_subparsers(
        title="commands", prog="gotunnel-server", dest="command", metavar="COMMAND"
    )
    check = commands.add_parser(
        "check", help="look whether a gateway could start here, and say what to do",
        description="Look at all that a gateway needs. Nothing is changed, nothing is ordered.",
    )  # fmt: skip
    certificates = commands.add_parser(
        "certificates", help="show the certificates that there are",
        description="Show the certificates, and when they are renewed; also while a gateway runs.",
    )  # fmt: skip
    certificates.add_argument(
        "--renew", metavar="NAME", help="ask the gateway that runs to order a new one for NAME"
    )
    for command in (check, certificates):
        # It may stand before the command as well: then the command must not unset it.
        _add_env_file(command, default=argparse.SUPPRESS)
    return parser.parse_args(arguments)


def _add_env_file(parser, default):
    parser.add_argument(
        "--env-file", metavar="FILE", default=default,
        help="read variables from FILE (default: .env in the working folder, if there is one)",
    )  # fmt: skip


def fail(error, status):
    print(f"gotunnel-server: {error}", file=sys.stderr)
    return status
