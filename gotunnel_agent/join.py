"""The command `join`: takes a join string, tries it, and writes the agent's configuration.

The string (common/join_string.py) names the gateway, a credential and perhaps the gateway's CA.
`join` gets that CA by its fingerprint (pin.py), dials, and registers no hostname at all. A gateway
checks the credential first: "auth failed" says that it is wrong, and "no routes" that it is right.
So the trial claims nothing, and disturbs no agent that runs.

The file is home.config_file(), or the one that -c names, for its user alone (mode 0600). Nothing is
written before the trial has succeeded. If the file that is there is for the same gateway and name,
it gets the new credential and keeps its tunnels and other keys. Whatever was replaced stays, with
".before" behind its name.

Exit status: 0 if the agent has joined; 1 if the gateway cannot be reached or refuses the
credential, or the file is another gateway's; 2 if the string or the arguments are wrong; 130 after
Ctrl-C.
"""

import argparse
import contextlib
import getpass
import hashlib
import json
import os
import re
import ssl
import sys
import time
from collections.abc import Mapping
from pathlib import Path

from gotunnel import (
    Ack,
    Deadline,
    MessageReader,
    NoThread,
    ProtocolError,
    Register,
    Session,
    SessionClosed,
    encode_message,
)

from .arguments import Parser
from .called import program
from .common import atomic_file, join_string, small_file
from .common.duplex import Duplex
from .common.join_string import MOST, JoinString, JoinStringError
from .common.one_line import on_one_line, without_secrets
from .common.process import print_answer
from .common.tls import AEAD
from .config import ACCOUNT_KEYS, MAX_FILE, Config, ConfigError, of_document, read_document
from .connect import addresses_of, connect
from .home import JOIN, config_file, document_of, join_string_of_environment
from .link import ACK_TIMEOUT, DIAL_TIMEOUT, LAST_WORDS
from .pin import CannotPin, fetch_ca
from .registering import make_token
from .trouble import NO_PROGRAM, OWN_CA, of_dial, of_refusal
from .trust import begin_tls, client_context

COMMAND = "join"
TRUST_KEYS = ("ca_file", "skip_tls_verify")  # of ACCOUNT_KEYS: whom the agent trusts
BEFORE = ".before"  # behind the name of a file that was replaced
CA_NAME = "ca.crt"
TOKEN_LIFETIME = 300  # seconds; the trial is over long before, but clocks differ
NO_ROUTES = "no routes"  # a gateway's refusal of a registration without hostnames
AUTH_FAILED = "auth failed"  # how a refusal of a credential begins
# Seconds in which a running gateway has read a new credential: it looks every 5, and not at a file
# that has changed only now.
NEWS = 8

DESCRIPTION = """\
Make this machine an agent of a gateway. STRING is the line gotunnel://... that
`gotunnel-server agents add` prints; it holds a secret. With - it is read from
standard input, so that the shell's history does not keep it; without it, from
$GOTUNNEL_JOIN, or the terminal. The gateway is asked whether it accepts the
credential; then the configuration is written, for you alone to read."""
EPILOG = """\
examples:
  {0} join gotunnel://office:SECRET@tunnel.example.com:9443
  ssh GATEWAY gotunnel-server agents add office --hosts '*.dev.example.com' \\
      --join | {0} join -"""

HEAD = """\
# Written by gotunnel join. The lines of gotunnel-agent --print-example explain each key;
# tunnels may be added here.
"""
# Advice for the keys of a configuration, and the same for a join string.
_WORDS = (
    (
        OWN_CA,
        "if it has a CA of its own, the join string ends in ?ca=sha256:..., or --ca-file FILE "
        "names that",
    ),
    (
        NO_PROGRAM,
        f"{NO_PROGRAM}; does the gateway run, and is that its TUNNEL_PORT (9443)?",
    ),
    (
        "compare jwt_secret and jwt_issuer with the gateway's",
        "copy the whole join string again, or have the gateway print a new one (gotunnel-server "
        "agents rotate)",
    ),
    ("tunnel_addr", "the join string"),
    ("jwt_secret", "the secret"),
)
PLACEHOLDER = "SECRET"  # where the documentation shows a join string


class CannotJoin(Exception):
    """The agent cannot join; the text is one line for the user."""

    def __init__(self, text: str):
        super().__init__(without_secrets(text))


def main(arguments: list[str] | None = None) -> int:
    """Join a gateway; return the exit status."""
    options = _parse(sys.argv[2:] if arguments is None else arguments)
    return print_answer(_name(), lambda: _run(options))


def _name() -> str:
    return f"{program()} {COMMAND}"


def _parse(arguments: list[str]) -> argparse.Namespace:
    parser = Parser(
        _name(), description=DESCRIPTION, epilog=EPILOG.format(program()),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("string", metavar="STRING", nargs="?", help="the join string, or -")
    parser.add_argument(
        "-c", "--config", metavar="FILE", type=Path,
        help="where to write the configuration (default: $GOTUNNEL_CONFIG, or agent.yaml in "
        "the user's folder for configurations)",
    )  # fmt: skip
    parser.add_argument(
        "--ca-file", metavar="FILE",
        help="the certificate (PEM) of the gateway's CA, if that is a private one; it is copied",
    )  # fmt: skip
    parser.add_argument(
        "--offline", action="store_true", help="write the configuration without asking the gateway"
    )
    parser.add_argument(
        "--force", action="store_true",
        help=f"replace the configuration for another gateway; it stays, with {BEFORE} behind its "
        "name",
    )  # fmt: skip
    options, unknown = parser.parse_known_args(arguments)
    if unknown:  # not shown, as parse_args() would do it: it may be a part of the secret
        parser.error("more arguments came than STRING: put STRING alone in double quotes")
    return options


def _run(options: argparse.Namespace) -> int:
    try:
        joined = _read_string(options.string)
        file = config_file() if options.config is None else options.config.absolute()
        print(join(joined, file, ca_file=options.ca_file, offline=options.offline,
                   force=options.force))  # fmt: skip
    except (JoinStringError, ConfigError) as error:
        return _fail(str(error), 2)
    except CannotJoin as error:
        return _fail(str(error), 1)
    except (KeyboardInterrupt, EOFError):
        print(file=sys.stderr)
        return 130
    return 0


def _fail(text: str, status: int) -> int:
    print(f"{_name()}: {text}", file=sys.stderr)
    return status


def _read_string(argument: str | None) -> JoinString:
    """The join string that the argument, the environment, standard input or the terminal gives.
    Raises JoinStringError, ConfigError."""
    if argument is not None and argument != "-":
        return join_string.parse(argument)
    if argument is None and (found := join_string_of_environment()):
        return found
    if sys.stdin is None:
        raise JoinStringError("there is no standard input, expected the join string on it")
    if sys.stdin.isatty():
        return join_string.parse(getpass.getpass("Join string (not shown): "))
    if argument is None:
        raise JoinStringError(f"no join string came: give it, or - to read it here, or set {JOIN}")
    # Bytes, as those that are no text must not raise here.
    return join_string.parse(sys.stdin.buffer.readline(MOST + 2).decode("utf-8-sig", "replace"))


def join(
    joined: JoinString,
    file: Path,
    *,
    ca_file: str | None = None,
    offline: bool = False,
    force: bool = False,
) -> str:
    """Try the join string and write ``file``. Returns one line for the user. Raises CannotJoin."""
    if joined.fingerprint and (ca_file is not None or offline):
        option = "--offline" if offline else "--ca-file"
        raise CannotJoin(
            f"{option} came with a join string that names the fingerprint of the gateway's CA, "
            f"for which the gateway has to be asked: leave out {option}"
        )
    file = Path(os.path.realpath(file))
    before = None if force or not os.path.lexists(file) else _account_in(file, joined)
    ca = _ca(joined, ca_file)
    if not offline:
        _try(joined, ca)
    try:
        file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        place = None if ca is None else _keep_ca(file.parent, ca)
        keys = document_of(joined, ca_file=place)
        if offline and ca is None and before is not None:
            # Nobody has seen that the system trusts the gateway's certificate now.
            trusted = read_document(before)
            keys |= {key: trusted[key] for key in TRUST_KEYS if key in trusted}
        text = HEAD + _yaml(keys) if before is None else _changed(before, keys, file)
        _check(text)
        is_news = _replace(file, text)
    except OSError as error:
        named = error.filename or file
        raise CannotJoin(
            f"{named}: {error.strerror}, so nothing is written; -c FILE names another file"
        ) from None
    done = "not asked" if offline else "it accepts"
    who = f"the agent {joined.name}" if joined.name else "this agent"
    there = "is written to" if is_news else "was already in"
    return (
        f"{joined.address}: {done} {who}; the configuration {there} {file}. Next: "
        f"{program()} http 8000"
    )


# The trial


def _ca(joined: JoinString, ca_file: str | None) -> str | None:
    """The CA that signs the gateway's certificate (PEM); None for those that the system trusts.
    Raises CannotJoin."""
    try:
        if joined.fingerprint:
            return fetch_ca(joined.host, joined.port, joined.fingerprint).decode()
        if ca_file is None:
            return None
        text = small_file.read(ca_file, MAX_FILE).decode("ascii", "replace")
        client_context(ca=text or " ")
        return text
    except CannotPin as error:
        raise CannotJoin(str(error)) from None
    except OSError as error:
        if ca_file is None:
            why = _in_our_words(of_dial(error, None))
            raise CannotJoin(f"{joined.address}: {why}. Nothing is written") from None
        problem = "it holds no certificate" if isinstance(error, ssl.SSLError) else error.strerror
        raise CannotJoin(f"--ca-file {ca_file}: {problem}, expected certificates as PEM") from None


def _try(joined: JoinString, ca: str | None) -> None:
    """Ask the gateway whether it accepts the credential. Raises CannotJoin."""
    config = of_document(document_of(joined, ca_file=None), needs_tunnels=False)
    try:
        answer = _register(joined, ca)
        if answer.error.startswith(AUTH_FAILED) and not joined.token:
            print(f"{_name()}: {joined.address} does not know the credential; if that is new, it "
                  f"soon does: asking again in {NEWS} s", file=sys.stderr)  # fmt: skip
            time.sleep(NEWS)
            answer = _register(joined, ca)
    except OSError as error:
        why = of_dial(error, config if ca is None else None)
    except (ProtocolError, NoThread) as error:
        why = f"it does not speak gotunnel's protocol: {error}"
    else:
        if answer.ok or answer.error.startswith(NO_ROUTES):
            return
        if joined.secret == PLACEHOLDER:
            raise CannotJoin(
                f"{PLACEHOLDER} stands for the secret: type the line that gotunnel-server agents "
                "add has printed"
            )
        why = f"the gateway refused: {on_one_line(answer.error)}{of_refusal(answer.error, config)}"
    raise CannotJoin(f"{joined.address}: {_in_our_words(why)}. Nothing is written")


def _in_our_words(text: str) -> str:
    """Advice for a configuration's keys, as advice for a join string."""
    for words, ours in _WORDS:
        text = text.replace(words, ours)
    return text


def _register(joined: JoinString, ca: str | None) -> Ack:
    """The answer to a registration without hostnames. Raises OSError, ProtocolError, NoThread."""
    token = joined.token or make_token(joined.secret, joined.name, TOKEN_LIFETIME)
    context = client_context(ca=ca)
    context.set_ciphers(AEAD)
    duplex = Duplex(connect(addresses_of(joined.host, joined.port), Deadline(DIAL_TIMEOUT)))
    with contextlib.closing(duplex):
        begin_tls(duplex, context, joined.host, DIAL_TIMEOUT)
        session = Session(duplex, client=True, name=joined.address)
        session.start()
        try:
            message = encode_message(Register(token=token, routes={}, modes={}))
            control = session.open(message, timeout=ACK_TIMEOUT)
            reader, deadline = MessageReader(lambda kind: None), Deadline(ACK_TIMEOUT)
            while data := control.read(timeout=deadline.left()):
                for answer in reader.feed(data):
                    if isinstance(answer, Ack):
                        return answer
            raise SessionClosed("it ended the connection without an answer")
        finally:
            session.close("joined")
            session.join(LAST_WORDS)


# The file


def _account_in(file: Path, joined: JoinString) -> str:
    """The text of ``file``, which is for the same gateway and name as ``joined``. Raises
    CannotJoin."""
    other = "the configuration for another gateway or name"
    try:
        text = small_file.read(file, MAX_FILE).decode("utf-8-sig")
        document = read_document(text)
        is_ours = (
            str(document.get("tunnel_addr")).lower() == joined.address
            and bool(joined.token) == any(key.startswith("token") for key in document)
            and document.get("jwt_issuer", "") == joined.name
        )
        if is_ours:
            return text
        other = f"the configuration for {on_one_line(str(document.get('tunnel_addr')))}"
        if issuer := document.get("jwt_issuer"):
            other += f" as {on_one_line(str(issuer))}"
    except (OSError, UnicodeDecodeError, ConfigError):
        other = "no configuration that can be read"
    raise CannotJoin(
        f"{file} is {other}, so nothing is written: --force replaces it and keeps it as "
        f"{file.name}{BEFORE}; -c FILE writes another file"
    )


def _yaml(keys: Mapping[str, object]) -> str:
    """A double-quoted text is written in YAML as in JSON."""
    return "".join(f"{key}: {json.dumps(text, ensure_ascii=False)}\n" for key, text in keys.items())


def _changed(text: str, keys: Mapping[str, object], file: Path) -> str:
    """The text of ``file`` with another account, and all else as it was. Raises CannotJoin."""
    before = read_document(text)
    if {key: before[key] for key in ACCOUNT_KEYS if key in before} == keys:
        return text
    lines = text.splitlines(keepends=True)
    account = re.compile(rf"({'|'.join(ACCOUNT_KEYS)})\s*:")
    places = [number for number, line in enumerate(lines) if account.match(line)]
    lines = [line for number, line in enumerate(lines) if number not in places]
    lines.insert(places[0] if places else 0, _yaml(keys))
    new = "".join(lines)
    others = {key: value for key, value in before.items() if key not in ACCOUNT_KEYS}
    with contextlib.suppress(ConfigError):
        if read_document(new) == {**others, **keys}:
            return new
    raise CannotJoin(
        f"{file} is written in such a way that its credential cannot be replaced by itself: change "
        f"it by hand, or replace the whole file by --force, which keeps it as {file.name}{BEFORE}"
    )


def _check(text: str) -> Config:
    """That what is written can be read."""
    return of_document(read_document(text), needs_tunnels=False)


def _keep_ca(folder: Path, pem: str) -> str:
    """The path of the CA's certificate in ``folder``. Another CA that is there stays."""
    content = pem.encode()
    digest = hashlib.sha256(content).hexdigest()[:16]
    for name in (CA_NAME, f"ca-{digest}.crt"):
        file = folder / name
        if not file.exists():
            atomic_file.write(file, content, new=_new(file), mode=0o644)
            return str(file)
        if small_file.read(file, len(content)) == content:
            return str(file)
    raise CannotJoin(f"{file}: another certificate is there: remove it")


def _replace(file: Path, text: str) -> bool:
    """Write the file, and keep the one before. Returns whether there is anything new in it."""
    content = text.encode()
    if os.path.lexists(file):
        before = small_file.read_whole(file, MAX_FILE)
        if before == content:
            return False
        old = file.with_name(file.name + BEFORE)
        atomic_file.write(old, before, new=_new(old))
    atomic_file.write(file, content, new=_new(file))
    return True


def _new(file: Path) -> Path:
    return file.with_name(f".{file.name}.{os.getpid()}.new")
