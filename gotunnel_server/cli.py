"""The gateway's command line: arguments, logging, signals, exit codes.

Exit status: 0 after a signal, 1 if a port cannot be had, 2 if the configuration is wrong.
"""

import argparse
import logging
import os
import signal
import socket
import sys

from gotunnel import __version__

from .authority import CertificateError
from .config import ConfigError, load
from .gateway import Gateway
from .listener import PortError

try:
    import resource
except ImportError:  # not a Unix: there the limit is none of our business
    resource = None

DESCRIPTION = """\
The public half of gotunnel: ends TLS for the hostnames that agents register, and passes what
visitors ask to those agents. It is configured by environment variables; conf/server.env explains
each of them."""


def main(arguments=None) -> int:
    """Run a gateway until a signal comes; return the exit status."""
    options = parse(arguments)
    try:
        config = load(options.env_file)
        set_up_logging(config.log_level)
        for warning in config.warnings:
            logging.getLogger("gotunnel").warning(warning)
        allow_many_connections()
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


def set_up_logging(level):
    logging.basicConfig(
        stream=sys.stderr, level=level.upper(), format="%(asctime)s %(levelname)-7s %(message)s"
    )
    logging.raiseExceptions = False  # a closed terminal is no reason for a traceback


def allow_many_connections():
    """Raise our own limit of descriptors to what the system lets us: 1024 are soon used up."""
    if resource is not None:
        _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


class Signals:
    """Turns SIGTERM and SIGINT into something to wait for. Main thread only.

    A handler could interrupt us while we hold any lock, so it must take none: the interpreter
    writes a byte to a socket, which works wherever Python does. The second signal ends the
    process at once.
    """

    def __init__(self):
        self._receive, self._send = socket.socketpair()
        self._send.setblocking(False)
        self._count = 0
        signal.set_wakeup_fd(self._send.fileno(), warn_on_full_buffer=False)
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._on_signal)

    def _on_signal(self, number, frame):
        self._count += 1
        if self._count > 1:
            os._exit(1)

    def wait(self):
        self._receive.recv(1)
