"""The agent's command line: arguments, logging, signals, exit codes.

Exit status: 0 after a signal, 2 if the configuration is wrong.
"""

import argparse
import logging
import os
import signal
import socket
import sys
import threading

from gotunnel import __version__

from .agent import Agent
from .config import ConfigError, load

DESCRIPTION = """\
The private half of gotunnel: connects to a gateway and serves the hostnames of its configuration
from targets that it can reach. conf/agent.yaml explains each key."""


def main(arguments=None) -> int:
    """Run an agent until a signal comes; return the exit status."""
    options = parse(arguments)
    try:
        config = load(options.config)
        set_up_logging(config.log_level)
        agent = Agent(config)
    except ConfigError as error:
        print(f"gotunnel-agent: {error}", file=sys.stderr)
        return 2
    signals = Signals()
    life = threading.Thread(target=signals.after, args=(agent.run,), name="agent")
    life.start()
    signals.wait()
    if not life.is_alive():
        return 1  # by a defect, of which the log has the traceback
    logging.getLogger("gotunnel").info("stopping; a second signal stops at once")
    agent.stop()
    life.join()
    logging.getLogger("gotunnel").info("stopped")
    return 0


def parse(arguments):
    parser = argparse.ArgumentParser(
        "gotunnel-agent", description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument(
        "-c", "--config", metavar="FILE", default="config.yaml",
        help="the configuration (default: config.yaml in the working folder)",
    )  # fmt: skip
    parser.add_argument("--version", action="version", version=f"gotunnel {__version__}")
    return parser.parse_args(arguments)


def set_up_logging(level):
    logging.basicConfig(
        stream=sys.stderr, level=level.upper(), format="%(asctime)s %(levelname)-7s %(message)s"
    )
    logging.raiseExceptions = False  # a closed terminal is no reason for a traceback


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
        """Wait for a signal, or for the end of what after() runs."""
        self._receive.recv(1)

    def after(self, function):
        """Call ``function``; its end counts as a signal."""
        try:
            function()
        finally:
            self._send.send(b"\0")
