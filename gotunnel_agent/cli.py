"""The agent's command line: arguments and exit codes. run.py runs the agent.

`gotunnel-agent hash-password` makes a hash for basic_auth. `gotunnel-agent status` shows the state
of the running agent: exit status 0 if it serves, 1 if it does not, 2 if nothing answers.
`gotunnel-agent service` (service.py), `gotunnel-agent forward` (forward.py) and the quick commands
(quick/) are programs of their own; __main__.py tells them apart. `gotunnel` is the same program as
`gotunnel-agent`; without a command and without -c it prints what it can do.

Exit status: that of run.py; of the others 0 if a hash was printed, 1 if it cannot be; 2 if the
password is wrong, or there is no such command.
"""

import argparse
import getpass
import sys
from functools import partial

from gotunnel import __version__

from . import mistakes, run
from .arguments import Parser
from .called import SHORT, program
from .common.examples import add_print_example
from .common.nearest import nearest
from .common.passwords import PasswordError, hash_password
from .common.process import print_answer
from .common.show_status import add_json_option, show_status
from .config import KEYS, TUNNEL_KEYS, ConfigError
from .home import chosen_config
from .status import PROGRAM, agent_of, first_of, status_places

DESCRIPTION = """\
The private half of gotunnel: connects to a gateway and serves the hostnames of
its configuration from targets that it can reach. --print-example explains each
key."""
EPILOG = """\
share a port or a folder, without a configuration of tunnels:
  {0} http 8080          an HTTP server of this machine
  {0} tcp 22             SSH, databases and everything else
  {0} files .            the files of a folder

other commands, each with a --help:
  {0} join               store the credential of a gateway
  {0} forward            connect to a hostname in tcp mode, as a visitor
  {0} status             show the state of the running agent
  {0} inspect            show the visits that its inspector has kept
  {0} service            run the agent as a service of systemd
  {0} hash-password      make a hash for basic_auth"""
SHORT_HELP = """\
gotunnel makes a port or a folder of this machine public, on a hostname of your
gateway:

  gotunnel join STRING      once: what `gotunnel-server agents add` has printed
  gotunnel http 8080        an HTTP server of this machine
  gotunnel tcp 22           SSH, databases and everything else
  gotunnel files .          the files of a folder
  gotunnel -c FILE          all tunnels of a configuration

gotunnel --help names all commands, and each command has a --help."""
COMMANDS = (
    "http", "tcp", "files", "join", "forward", "status", "inspect", "service", "hash-password",
)  # fmt: skip

HASH_PASSWORD = "hash-password"
STATUS = "status"
MAX_LINE = 8192  # bytes read from standard input, more than a password may have
HASH_DESCRIPTION = """\
Print the hash of a password, for basic_auth: "USER:HASH" in the agent's
configuration. On a terminal the password is asked for twice; otherwise it is
the first line of standard input:

    gotunnel-agent hash-password
    openssl rand -base64 18 | tee password | gotunnel-agent hash-password"""


def main(arguments: list[str] | None = None) -> int:
    """Run an agent until a signal comes, or print a hash; return the exit status."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if arguments[:1] == [HASH_PASSWORD]:
        return print_hash(arguments[1:])
    if arguments[:1] == [STATUS]:
        return ask_status(arguments[1:])
    if program() == SHORT and not arguments:
        print(SHORT_HELP, file=sys.stderr)
        return 2
    return run.run(parse(arguments).config)


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = Parser(
        program(), description=DESCRIPTION,
        epilog=EPILOG.format(program()),
        usage="%(prog)s [-h] [--version] [-c FILE]\n       %(prog)s COMMAND ...",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument(
        "-c", "--config", metavar="FILE", action=Once,
        help="the configuration (default: $GOTUNNEL_CONFIG, or config.yaml in the working folder, "
        "or the file that join has written)",
    )  # fmt: skip
    add_print_example(parser, "gotunnel_agent", "agent.yaml", "a configuration")
    parser.add_argument("--version", action="version", version=f"gotunnel {__version__}")
    options, unknown = parser.parse_known_args(arguments)
    if unknown:
        parser.error(unknown_argument(unknown[0]))
    options.config = chosen_config(options.config)
    return options


class Once(argparse.Action):
    """Stores the value of an option that may come once: of two files, one would not be read."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: object,
        option_string: str | None = None,
    ) -> None:
        if getattr(namespace, f"{self.dest}_came", False):
            parser.error(f"{option_string} came twice, expected one file")
        setattr(namespace, f"{self.dest}_came", True)
        setattr(namespace, self.dest, values)


def unknown_argument(text: str) -> str:
    """What to say about an argument that there is not: a command, or a file without its -c."""
    if text in mistakes.OTHER_COMMANDS:
        return f"unknown command {text!r}; {mistakes.OTHER_COMMANDS[text]}"
    if close := nearest(text, COMMANDS):
        return f"unknown command {text!r}; did you mean {close}?"
    if text.isalpha():
        return f"unknown command {text!r}, expected one of {', '.join(COMMANDS)}"
    advice = mistakes.of_argument(text, KEYS, TUNNEL_KEYS)
    advice = advice or "-c FILE names the configuration"
    return f"unknown argument {mistakes.shown_argument(text)!r}; {advice}"


def ask_status(arguments: list[str]) -> int:
    """Print the state of the running agent."""
    parser = Parser(
        f"{program()} {STATUS}",
        description="Ask the agent that runs here for its session, tunnels and visits.\n"
        "Exit status: 0 it serves, 1 it has no session, 2 nothing answers.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument(
        "-c", "--config", metavar="FILE",
        help="the agent's configuration; needed if it sets status_socket, or several agents run",
    )  # fmt: skip
    add_json_option(parser)
    options = parser.parse_args(arguments)
    try:
        places, is_named = status_places(options.config)
    except ConfigError as error:
        print(f"{program()}: {error}", file=sys.stderr)
        return 2
    file = options.config
    choose = first_of if file is None or is_named else partial(agent_of, file)
    return print_answer(
        parser.prog, lambda: show_status(places, PROGRAM, as_json=options.json, choose=choose)
    )


def print_hash(arguments: list[str]) -> int:
    """Read a password from the terminal or standard input, and print its hash."""
    parser = Parser(
        f"{program()} {HASH_PASSWORD}",
        description=HASH_DESCRIPTION.replace("gotunnel-agent", program()),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    if parser.parse_known_args(arguments)[1]:  # not shown: it may be the password
        parser.error("an argument came, expected the password on the terminal or standard input")
    return print_answer(parser.prog, lambda: _hash_password(parser.prog))


def _hash_password(program: str) -> int:
    try:
        password = _ask_password()
        print(hash_password(password))
    except (PasswordError, UnicodeDecodeError) as error:
        why = error if isinstance(error, PasswordError) else "expected a password in UTF-8"
        print(f"{program}: {why}", file=sys.stderr)
        return 2
    except (KeyboardInterrupt, EOFError):
        print(file=sys.stderr)
        return 2
    return 0


def _ask_password() -> str:
    if sys.stdin is None:
        raise PasswordError("there is no standard input, expected a password on it")
    if not sys.stdin.isatty():
        # Read as bytes: decoded by the locale, the same password could get another hash.
        return sys.stdin.buffer.readline(MAX_LINE).decode("utf-8-sig").rstrip("\r\n")
    password = getpass.getpass("Password: ")
    if getpass.getpass("Again: ") != password:
        raise PasswordError("two different passwords came, expected the same twice")
    return password
