"""The quick commands: `gotunnel http 8080`, `gotunnel tcp 22`, `gotunnel files .`

On a terminal they draw a screen (screen.py). Without one, or with --plain, standard output gets the
public address, on one line, as soon as it is served, and nothing else; all else goes to standard
error.

Exit status: 0 after a signal; 1 after a second signal or a bug, or if the gateway refuses the
tunnel; 2 if an argument or the configuration is wrong.
"""

from __future__ import annotations

import argparse
import difflib
import getpass
import logging
import os
import re
import sys
from collections.abc import Callable, Iterator
from http import HTTPStatus
from typing import TypeVar

from gotunnel import ANY_PORT, NoThread

from .. import home, mistakes
from ..arguments import Parser
from ..called import program
from ..common import small_file
from ..common.exposed import exposures
from ..common.hostnames import (
    MAX_PORT,
    OPEN,
    normal_hostname,
    valid_host,
    valid_hostname,
    valid_open_name,
    valid_wildcard,
)
from ..common.one_line import without_secrets
from ..common.process import set_up_process, stay_on_one_cpu
from ..common.quantities import whole_number
from ..common.status_socket import OFF
from ..config import (
    H2,
    H2C,
    HTTP1,
    INSPECT_PORT,
    MAX_FILE,
    PROTOCOLS,
    Config,
    ConfigError,
    Inspect,
    Target,
    Tunnel,
    inspect_of,
)
from ..inspector import CannotInspect
from ..policy import Policy, PolicyError, networks, users, users_of_lines
from ..trust import CannotTrust
from .folder import LOOPBACK, FolderServer, NotServed, Root
from .names import Labels, Memory, key_of
from .serving import GivenUp, serve
from .targets import BadTarget, read_target
from .terminal import is_terminal

log = logging.getLogger("gotunnel")

T = TypeVar("T")
COMMANDS = HTTP, TCP, FILES = "http", "tcp", "files"
EXAMPLE_PORTS = {HTTP: 8080, TCP: 22}
INSPECT_ADDRESS = f"{LOOPBACK}:{INSPECT_PORT}"
_ADDRESS = re.compile(r"(.*:)?[0-9]{1,5}")  # a port, or one behind an address
MOST_SHOWN = 60  # characters of an unknown option that are shown
MOST_LINE = 8192  # bytes of standard input that are read for a password

DESCRIPTIONS = {
    HTTP: """\
Make an HTTP server of this machine, or one that it can reach, public:

    {0} http 8080
    {0} http 3000 --host shop --basic-auth guest
    {0} http https://192.168.1.20

TARGET is a port, HOST:PORT, http://HOST:PORT, https://HOST:PORT or unix:/PATH.""",
    TCP: """\
Make a port public that does not speak HTTP, such as SSH or a database:

    {0} tcp 22 --host ssh.example.com
    {0} tcp 5432 --port auto

TARGET is a port, HOST:PORT or unix:/PATH. Visitors come by TLS, as
`{0} forward` does; with --port also without it.""",
    FILES: """\
Make the files of a folder public, for reading:

    {0} files
    {0} files ~/photos --basic-auth guest

Hidden files, and links that lead out of the folder, are not served.""",
}
EPILOG = """\
The public address is printed on standard output; everything else goes to
standard error. Exit status: 0 after a signal, 1 if the gateway refuses the
tunnel, 2 if an argument or the configuration is wrong.

The gateway is that of `{0} join`, or of the file that -c names."""


class BadOption(Exception):
    """An option cannot be used; one line for the user."""

    def __init__(self, text: str):
        super().__init__(without_secrets(text))


def main(arguments: list[str] | None = None) -> int:
    """Run a quick command until a signal comes; return the exit status."""
    command, *words = sys.argv[1:] if arguments is None else arguments
    parser = make_parser(command)
    options = parse(parser, words)
    server = None
    try:
        account = home.account(options.config)
        target, server = what_to_share(command, options)
        labels = None if options.host else labels_of(account, command, target, options)
        hostname = options.host if labels is None else f"{labels.another()}{OPEN}"
        tunnel = make_tunnel(command, options, hostname, target, server)
        inspect = inspect_settings(options)
        config = quick_config(account, tunnel, verbose=options.verbose, inspect=inspect)
        set_up_process(config.log_level, config.log_format)
        stay_on_one_cpu(max)  # as the agent does
        for line in warnings(config, options, server):
            log.warning("%s", line)
        if server is not None:
            server.start()
        drawn = not (options.plain or options.verbose) and is_terminal(sys.stdout)
        folder = "" if server is None else os.path.realpath(options.target)
        return serve(config, labels, drawn=drawn, qr=options.qr, folder=folder)
    except (BadOption, BadTarget, ConfigError, CannotTrust) as error:
        complain(parser.prog, error)
        return 2
    except (GivenUp, NoThread, CannotInspect) as error:
        complain(parser.prog, error)
        return 1
    except KeyboardInterrupt:  # before serve(), which waits for signals
        return 1
    finally:
        if server is not None:
            server.close()


def what_to_share(command: str, options: argparse.Namespace) -> tuple[Target, FolderServer | None]:
    """The target, and the server behind it if it is a folder. Raises BadTarget, BadOption."""
    if command != FILES:
        schemes = ("http", "https") if command == HTTP else ("tcp",)
        target = read_target(options.target, schemes=schemes)
        if command == HTTP:
            check_protocol(options.protocol, target)
            if options.target_skip_tls_verify:
                if not target.tls:
                    raise BadOption("--target-skip-tls-verify came, expected an https:// TARGET")
                target = target._replace(skip_tls_verify=True)
        return target, None
    folder = options.target
    if not os.path.isdir(folder):
        why = "is a file, expected a folder" if os.path.exists(folder) else "does not exist"
        raise BadTarget(f"FOLDER: {folder!r} {why}")
    try:
        Root(folder, hidden=options.all).find([])  # can it be read?
        server = FolderServer(folder, hidden=options.all)
    except OSError as error:
        raise BadTarget(f"FOLDER: {folder!r} cannot be served ({error.strerror})") from None
    except NotServed as error:
        why = "Permission denied" if error.status == HTTPStatus.FORBIDDEN else error.status.phrase
        raise BadTarget(f"FOLDER: {folder!r} cannot be served ({why})") from None
    return Target(LOOPBACK, server.port), server


def make_tunnel(
    command: str,
    options: argparse.Namespace,
    hostname: str,
    target: Target,
    server: FolderServer | None,
) -> Tunnel:
    """Raises BadOption."""
    tunnel = Tunnel(hostname, target, TCP if command == TCP else HTTP, policy=policy_of(options))
    if command == TCP:
        return tunnel._replace(port=options.port or "")
    if server is not None:
        return tunnel._replace(host_header=server.host)
    protocol = "" if options.protocol == HTTP1 else options.protocol
    return tunnel._replace(host_header=options.host_header or "", protocol=protocol)


def check_protocol(protocol: str, target: Target) -> None:
    """Raises BadOption if the target cannot speak it."""
    if protocol == H2 and not target.tls:
        raise BadOption(
            f"--protocol {H2} came, which is with TLS, expected {H2C} or an https:// TARGET"
        )
    if protocol == H2C and target.tls:
        raise BadOption(f"--protocol {H2C} came, which is without TLS, expected {H2}")


def policy_of(options: argparse.Namespace) -> Policy:
    """What the gateway asks of visitors. Passwords are hashed here. Raises BadOption."""
    pairs = getattr(options, "basic_auth", [])
    file = getattr(options, "basic_auth_file", None)
    if pairs and file:
        raise BadOption("--basic-auth and --basic-auth-file came, expected only one of them")
    entries: tuple[str, ...] = ()
    if pairs:
        texts = [text if ":" in text else f"{text}:{ask_password(text)}" for text in pairs]
        entries = read_part("--basic-auth", users, texts)
    elif file:
        entries = read_part("--basic-auth-file", users_of_lines, read_file(file))
    allowed = [text for part in options.allow for text in part.replace(",", " ").split()]
    allow = read_part("--allow", networks, allowed) if options.allow else ()
    return Policy(basic_auth=entries, allow=allow)


def read_part(option: str, read: Callable[[T], tuple[str, ...]], value: T) -> tuple[str, ...]:
    try:
        return read(value)
    except PolicyError as error:
        raise BadOption(f"{option}: {error}") from None


def read_file(path: str) -> str:
    try:
        content = small_file.read(path, MAX_FILE)
        if len(content) > MAX_FILE:
            raise BadOption(f"--basic-auth-file {path}: more than {MAX_FILE} bytes came")
        return content.decode("utf-8-sig")
    except OSError as error:
        raise BadOption(f"--basic-auth-file {path}: cannot be read ({error.strerror})") from None
    except UnicodeDecodeError:
        raise BadOption(f"--basic-auth-file {path}: no text in UTF-8 came") from None


def ask_password(user: str) -> str:
    """The password of a user, asked for on the terminal, else the next line of standard input.
    Raises BadOption."""
    try:
        if sys.stdin is None:
            raise EOFError
        if sys.stdin.isatty():
            password = getpass.getpass(f"Password for {user}: ")
            if getpass.getpass("Again: ") != password:
                raise BadOption(f"--basic-auth {user}: two different passwords came")
            return password
        # Read as bytes: decoded by the locale, the same password could get another hash.
        line = sys.stdin.buffer.readline(MOST_LINE)
        if not line:
            raise EOFError
        return line.decode("utf-8-sig").rstrip("\r\n")
    except (EOFError, KeyboardInterrupt):
        raise BadOption(
            f"--basic-auth {user}: no password came, expected one line on standard input"
        ) from None
    except UnicodeDecodeError:
        raise BadOption(f"--basic-auth {user}: expected a password in UTF-8") from None


def labels_of(account: Config, command: str, target: Target, options: argparse.Namespace) -> Labels:
    """The random names of a tunnel. A folder counts by its path, a port by the working folder,
    too: two projects that use the same port have names of their own."""
    shared = os.path.realpath(options.target) if command == FILES else str(target)
    gateway = f"{account.tunnel_host}:{account.tunnel_port}"
    key = key_of(gateway, command, shared, "" if command == FILES else working_folder())
    return Labels(Memory(home.state_folder()), key, anew=options.new)


def working_folder() -> str:
    """Its path; "" if it has been removed."""
    try:
        return os.getcwd()
    except OSError:
        return ""


def quick_config(
    account: Config, tunnel: Tunnel, *, verbose: bool, inspect: Inspect | None = None
) -> Config:
    """The account's configuration with this one tunnel. Ports and sockets are left to an agent
    that may run with the same account."""
    return account._replace(
        tunnels=(tunnel,),
        status_socket=OFF,
        metrics_port=None,
        inspect=inspect,
        log_level="debug" if verbose else "info",
    )


def inspect_settings(options: argparse.Namespace) -> Inspect | None:
    """What --inspect asks for; None without it. Raises BadOption."""
    text = getattr(options, "inspect", None)
    if text is None:
        return None
    try:
        return inspect_of(text)
    except ConfigError as error:
        # The key of a configuration that would permit such an address has no option.
        what = str(error).removeprefix("inspect.listen: ").partition("; allow_remote")[0]
        raise BadOption(f"--inspect: {what}") from None


def warnings(
    config: Config, options: argparse.Namespace, server: FolderServer | None
) -> Iterator[str]:
    """What the user should know before the tunnel is public, a line each."""
    file = getattr(options, "basic_auth_file", None)
    yield from exposures([*config.secret_files, *([file] if file else [])])
    if config.inspect is not None and config.tunnels[0].protocol:
        yield "--inspect shows no single visits with --protocol h2 or h2c: HTTP/2 is not followed"
    if server is not None:
        folder = server.root.path
        if folder in (os.path.abspath(os.sep), os.path.realpath(home.user_folder())):
            hidden = "" if options.all else ", but for hidden files"
            yield f"the whole of {folder} is shared{hidden}"


def complain(name: str, text: object) -> None:
    if sys.stderr is not None:  # with file=None print() would use standard output
        print(f"{name}: {text}", file=sys.stderr)


# Arguments ---------------------------------------------------------------------------------------


def make_parser(command: str) -> argparse.ArgumentParser:
    name = program()
    parser = Parser(
        f"{name} {command}",
        description=DESCRIPTIONS[command].format(name),
        epilog=EPILOG.format(name),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    if command == FILES:
        parser.add_argument(
            "target", metavar="FOLDER", nargs="?", default=".",
            help="the folder (default: the working folder)",
        )  # fmt: skip
    else:
        parser.add_argument(
            "target", metavar="TARGET", nargs="?", help="what is shared, most often a port"
        )
    names = parser.add_mutually_exclusive_group()
    names.add_argument(
        "--host", metavar="NAME", type=a_host,
        help="the hostname; a name without a dot is one below the credential's wildcard (default: "
        "a random name, the same one each time)",
    )  # fmt: skip
    names.add_argument("--new", action="store_true", help="another random name than the last time")
    add_options_of[command](parser)
    parser.add_argument(
        "--allow", metavar="ADDRESS", action="append", default=[],
        help="only visitors from this address or network; may come several times",
    )  # fmt: skip
    parser.add_argument(
        "-c", "--config", metavar="FILE",
        help="gateway and credential are those of this configuration; its tunnels are not served",
    )  # fmt: skip
    if command != TCP:
        parser.add_argument(
            "--inspect", metavar="ADDRESS", nargs="?", const=INSPECT_ADDRESS,
            help="show what passes, on a page of this machine, and send it again (default: "
            "%(const)s, or the next free port; see gotunnel inspect --help)",
        )  # fmt: skip
    parser.add_argument("--qr", action="store_true", help="draw the address as a QR code")
    parser.add_argument("--plain", action="store_true", help="lines instead of a screen")
    parser.add_argument("--verbose", action="store_true", help="tell more of what happens")
    return parser


def parse(parser: argparse.ArgumentParser, words: list[str]) -> argparse.Namespace:
    """The options of a command line. Ends the process with a line that never shows what may be a
    password: argparse itself shows all that it does not know."""
    options, unknown = parser.parse_known_args(words)
    if is_target_of_inspect(options, parser):
        options.target, options.inspect = options.inspect, INSPECT_ADDRESS
    if unknown and unknown[0].startswith("-"):
        parser.error(about_unknown(unknown[0].partition("=")[0][:MOST_SHOWN], parser))
    if unknown:
        all_of_them = f"`{program()} -c FILE` serves all tunnels of a configuration"
        parser.error(f"{1 + len(unknown)} targets came, expected one; {all_of_them}")
    if options.target is None:
        port = EXAMPLE_PORTS[parser.prog.split()[-1]]
        parser.error(f"TARGET is missing, expected one such as in `{parser.prog} {port}`")
    return options


def is_target_of_inspect(options: argparse.Namespace, parser: argparse.ArgumentParser) -> bool:
    """Whether the value of --inspect is what is shared: `gotunnel http --inspect 8080`."""
    text = getattr(options, "inspect", None)
    if text in (None, INSPECT_ADDRESS) or options.target != parser.get_default("target"):
        return False
    return options.target is None or not _ADDRESS.fullmatch(text)


def about_unknown(option: str, parser: argparse.ArgumentParser) -> str:
    """What to say about an option that a command does not have."""
    if TCP in parser.prog.split() and option.startswith("--basic-auth"):
        return f"{option}: a tunnel in tcp mode cannot ask for passwords; use --allow"
    if TCP in parser.prog.split() and option == "--inspect":
        return f"{option}: the bytes of a tunnel in tcp mode are not read, so nothing can be shown"
    for command in COMMANDS:
        if option in options_of(make_parser(command)):
            return f"{option} is an option of `{program()} {command}`, not of `{parser.prog}`"
    if advice := mistakes.OTHER_OPTIONS.get(option.lstrip("-")):
        return f"unknown option {option!r}; {advice}"
    close = difflib.get_close_matches(option, options_of(parser), n=1)
    meant = f"did you mean {close[0]}?" if close else "--help shows all"
    return f"unknown option {option!r}; {meant}"


def options_of(parser: argparse.ArgumentParser) -> list[str]:
    return [name for action in parser._actions for name in action.option_strings]


def _add_password_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--basic-auth", metavar="USER[:PASSWORD]", action="append", default=[],
        help="visitors need this password; without it here, where other users of this machine can "
        "see it, it is asked for, or read from standard input",
    )  # fmt: skip
    parser.add_argument(
        "--basic-auth-file",
        metavar="FILE",
        help="the same, by a file with one USER:PASSWORD a line",
    )


def _add_http_options(parser: argparse.ArgumentParser) -> None:
    _add_password_options(parser)
    parser.add_argument(
        "--host-header", metavar="HOST", type=a_host_header,
        help="the Host that TARGET gets, for servers that know no other name than localhost",
    )  # fmt: skip
    parser.add_argument(
        "--protocol",
        choices=PROTOCOLS,
        default=HTTP1,
        help="what TARGET speaks (default: %(default)s)",
    )
    parser.add_argument(
        "--target-skip-tls-verify", action="store_true",
        help="accept any certificate of an https:// TARGET",
    )  # fmt: skip


def _add_tcp_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--port", metavar="PORT", type=a_port,
        help=f"also a public port of the gateway, without TLS: a number, or {ANY_PORT} for any",
    )  # fmt: skip


def _add_files_options(parser: argparse.ArgumentParser) -> None:
    _add_password_options(parser)
    parser.add_argument("--all", action="store_true", help="hidden files, too")


add_options_of = {HTTP: _add_http_options, TCP: _add_tcp_options, FILES: _add_files_options}


def a_host(text: str) -> str:
    name = normal_hostname(text)
    if "." not in name:
        name += OPEN
    if not (valid_hostname(name) or valid_wildcard(name) or valid_open_name(name)):
        raise argparse.ArgumentTypeError(
            f"{text!r} is no hostname such as app.example.com, and no name such as app"
            f"{mistakes.of_host(text)}"
        )
    return name


def a_host_header(text: str) -> str:
    if not valid_host(text):
        raise argparse.ArgumentTypeError(
            f"{text!r} is no hostname or IP address, with or without a port"
        )
    return text


def a_port(text: str) -> str:
    number = whole_number(text)
    if text.lower() != ANY_PORT and (number is None or not 1 <= number <= MAX_PORT):
        raise argparse.ArgumentTypeError(f"{text!r} is no port from 1 to {MAX_PORT}, or {ANY_PORT}")
    return text.lower() if number is None else str(number)
