"""The quick commands: `gotunnel http 8080`, `gotunnel tcp 22`, `gotunnel files .`

Standard output gets the public URL, on one line, as soon as visitors can use it, and nothing else.
Everything else goes to standard error.

Exit status: 0 after a signal; 1 after a second signal or a bug, or if the gateway refuses the
tunnel; 2 if an argument or the configuration is wrong.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace

from ..called import program
from ..common.hostnames import normal_hostname, valid_hostname, valid_wildcard
from ..common.process import set_up_process, stay_on_one_cpu
from ..common.status_socket import OFF
from ..config import Config, ConfigError, Tunnel, load
from ..trust import CannotTrust
from .serving import run
from .targets import EXAMPLES, BadTarget, read_target

HTTP, TCP, FILES = "http", "tcp", "files"
COMMANDS = (HTTP, TCP, FILES)


def main(arguments: list[str] | None = None) -> int:
    """Run a quick command until a signal comes; return the exit status."""
    command, *words = sys.argv[1:] if arguments is None else arguments
    parser = make_parser(command)
    options = parser.parse_args(words)
    try:
        tunnel = Tunnel(options.host, read_target(options.target), HTTP)
        config = quick_config(load(options.config), tunnel, verbose=options.verbose)
        set_up_process(config.log_level, config.log_format)
        stay_on_one_cpu(max)  # as the agent does
        return run(config, lambda text: complain(parser.prog, text))
    except (BadTarget, ConfigError, CannotTrust) as error:
        complain(parser.prog, error)
        return 2


def quick_config(account: Config, tunnel: Tunnel, *, verbose: bool) -> Config:
    """The account's configuration with this one tunnel. Ports and sockets of an agent that may
    run with the same account are not opened."""
    return replace(
        account,
        tunnels=(tunnel,),
        status_socket=OFF,
        metrics_port=None,
        log_level="debug" if verbose else "info",
    )


def complain(name: str, text: object) -> None:
    if sys.stderr is not None:  # with file=None print() would use standard output
        print(f"{name}: {text}", file=sys.stderr)


def make_parser(command: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(f"{program()} {command}")
    parser.add_argument("target", metavar="TARGET", help=f"what is shared: {EXAMPLES}")
    parser.add_argument("--host", metavar="NAME", required=True, type=a_host, help="the hostname")
    parser.add_argument("-c", "--config", metavar="FILE", required=True, help="the account")
    parser.add_argument("--plain", action="store_true", help="no status screen")
    parser.add_argument("--verbose", action="store_true", help="log each visit")
    return parser


def a_host(text: str) -> str:
    name = normal_hostname(text)
    if not valid_hostname(name) and not valid_wildcard(name):
        raise argparse.ArgumentTypeError(f"{text!r} is no hostname such as app.example.com")
    return name
