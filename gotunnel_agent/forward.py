"""The visitor's helper: `gotunnel-agent forward HOST[:PORT] [LOCAL]`.

A hostname in tcp mode is reached by TLS with its name as SNI, which ssh, psql and most other
programs do not speak. The helper speaks it for them: it dials, checks the certificate, and copies
bytes both ways, half-closes included.

Without LOCAL it copies between standard input and output and the hostname, for ssh's ProxyCommand.
It ends when the other side has ended, even if standard input is still open. SIGINT and SIGTERM end
it without a traceback: the shell sees 130 and 143. With LOCAL it listens there, and makes a
connection for each client, until SIGINT or SIGTERM.

However this process ends, a cut connection never looks complete: until our half of a connection is
finished, the kernel turns its close into a reset (cut_unless_finished()).

Threads: with LOCAL main waits for signals; without it, main reads the answer.

    thread      how many           does                            ends when
    input       1, without LOCAL   standard input to the hostname  its end, or the process
    listener    1, with LOCAL      accepts clients                 the process ends
    client      <= MAX_CLIENTS     dials, and relays one client    both directions are done
    ... back    1 a client         copies bytes to the client      both directions are done

and standard error, which writes log lines until the process ends (standard_error.py).

Exit status: 0 when the other side has ended or the reader of our output is gone, and after a signal
with LOCAL; 1 if there is no connection, or it broke; 2 if the arguments are wrong. An error is one
line on standard error. ssh starts this program for each of its connections, so it imports none of
the slow modules that only an agent needs.
"""

import argparse
import contextlib
import errno
import logging
import os
import re
import select
import shlex
import signal
import socket
import ssl
import sys
import threading
from collections.abc import Callable
from time import sleep
from typing import Any, NamedTuple, NoReturn

from gotunnel import BytesLike, Deadline, NoThread, spawn

from .arguments import Parser
from .called import program
from .common.duplex import Duplex
from .common.hostnames import (
    MAX_PORT,
    normal_hostname,
    valid_host,
    valid_hostname,
    why_no_hostname,
)
from .common.process import Signals, print_answer, set_up_process
from .common.relay import relay
from .common.standard_error import free_standard_error
from .common.tls import AEAD
from .connect import addresses_of, connect
from .mistakes import hidden
from .second_look import is_of_staging, shown, trusted_names
from .trust import (
    EXPIRED,
    NO_SYSTEM_CAS,
    NOT_YET_VALID,
    OTHER_ADDRESS,
    OTHER_NAME,
    UNKNOWN_CA,
    UNKNOWN_NAME,
    ClosedInHandshake,
    NoTLS,
    begin_tls,
    client_context,
    clock_advice,
    system_has_no_cas,
    why_no_cas,
)

log = logging.getLogger("gotunnel.forward")

PROGRAM = f"{program()} forward"
DEFAULT_PORT = 443  # https, a gateway's usual port for visitors
LOOPBACK = "127.0.0.1"  # the default address to listen on: other machines must not use the tunnel
AUTO = "auto"  # as a port: any free one

DIAL_TIMEOUT = 10  # seconds to connect, and again for the TLS handshake
CLOSING_TIME = 3  # seconds that the helper runs on after SIGHUP
INPUT_SIZE = 256 * 1024  # bytes read at once; a pipe holds 64 KiB, a file has more
MAX_CLIENTS = 128  # at a time; each takes two threads and about six descriptors of the usual 1024
BACKLOG = 128  # clients that wait to be accepted
ACCEPT_PAUSE = 0.1  # seconds to wait when the system has no descriptor for a client

DESCRIPTION = """\
Connect to a hostname that a gotunnel gateway serves in tcp mode: by TLS, with
its certificate checked. Without LOCAL, standard input and output are the
connection (ssh's ProxyCommand); with LOCAL, each connection made to that port
of this machine is one to HOST, until Ctrl-C."""

# Why listen() fails, and what to do, by errno (which may be None).
LISTEN_PROBLEMS: dict[int | None, str] = {
    errno.EADDRINUSE: "in use, another program listens there; stop it or choose another port",
    errno.EACCES: "no right to listen on a port below 1024; choose a higher one",
    errno.EADDRNOTAVAIL: "no address of this machine; choose another",
}
# Options of programs that do something like this.
OTHER_OPTIONS = {
    **dict.fromkeys(("-p", "--port"), "write the port behind HOST: HOST:PORT"),
    **dict.fromkeys(("-L", "-l", "--local", "--listen"), "the local port comes behind HOST"),
    **dict.fromkeys(("-c", "--config"), "forward needs no configuration"),
    **dict.fromkeys(("-k", "--insecure"), "--skip-tls-verify does that, for trials"),
    **dict.fromkeys(("--ca", "--cacert"), "--ca-file names a file of CA certificates"),
}
OTHER_ADVICE = "--ca-file names a CA to trust"

# A gateway's answer for a hostname that has a certificate and no tunnel in tcp mode.
PAGE = re.compile(rb"HTTP/1\.1 [45].*?\r\nX-Gotunnel-Error: ([a-z-]+)\r\n", re.DOTALL)


class NoVisit(Exception):
    """There is no connection to a hostname, or it broke; the text is one line for the user."""


# A connection to a hostname ----------------------------------------------------------------------


class End(Duplex):
    """A connection that counts its bytes and notes what broke it."""

    def __init__(self, sock: socket.socket):
        super().__init__(sock)
        self.sent = self.received = 0  # bytes
        self._end_lock = threading.Lock()  # guards both below, as a visit has two threads
        self.broken_by: OSError | NoVisit | None = None  # the first error
        self.dropped = False  # reset() came before any error, so later errors are its effect

    def read(self, *arguments: Any) -> bytes:
        try:
            data = super().read(*arguments)
        except OSError as error:
            self._note(error)
            raise
        if not self.received and (page := PAGE.match(data)):
            self.break_off(NoVisit(
                f"the gateway answers in HTTP ({page[1].decode()}): the hostname is not in tcp "
                "mode, or its agent is away"
            ))  # fmt: skip
            raise ConnectionResetError("no visit")
        self.received += len(data)
        return data

    def write(self, data: BytesLike, *timeout: Any) -> None:
        try:
            super().write(data, *timeout)
        except OSError as error:
            self._note(error)
            raise
        self.sent += len(data)

    def _note(self, error: OSError) -> None:
        with self._end_lock:
            if self.broken_by is None and not self.dropped:
                self.broken_by = error

    def break_off(self, reason: NoVisit) -> None:
        """Reset the connection, and note the reason for the user."""
        with self._end_lock:
            self.broken_by = reason
        self.reset()

    def reset(self) -> None:
        with self._end_lock:
            self.dropped = self.broken_by is None
        super().reset()


class Destination(NamedTuple):
    """A hostname, the address of its gateway, and a context that checks the certificate."""

    hostname: str
    host: str
    port: int
    context: ssl.SSLContext
    ca_file: str | None = None  # that the context has been made with; None: the system's CAs

    def dial(self) -> End:
        """Connect, with TLS. Raises NoVisit, which says what to do where that is known."""
        where = f"{self.host} port {self.port}"
        try:
            sock = connect(addresses_of(self.host, self.port), Deadline(DIAL_TIMEOUT))
        except socket.gaierror as error:
            raise NoVisit(f"{self.host} does not resolve ({error.strerror}); "
                          "--via names the gateway to dial") from None  # fmt: skip
        except ConnectionRefusedError:
            raise NoVisit(f"no program listens at {where}; is it the gateway's?") from None
        except TimeoutError:
            raise NoVisit(f"{where} does not answer within {DIAL_TIMEOUT} s") from None
        except OSError as error:
            raise NoVisit(f"{where} cannot be reached: {error.strerror or error}") from None
        end = End(sock)
        try:
            begin_tls(end, self.context, self.hostname, DIAL_TIMEOUT)
            end.cut_unless_finished()
            return end
        except BaseException as error:
            end.close()
            if isinstance(error, OSError):
                raise NoVisit(self._why_no_tls(error, where)) from None
            raise

    def _why_no_tls(self, error: OSError, where: str) -> str:
        if isinstance(error, ssl.SSLCertVerificationError):
            advice = self._advice(error.verify_code)
            problem = error.verify_message.rstrip(".")
            return f"the certificate of {self.hostname} is not to be trusted ({problem}); {advice}"
        if isinstance(error, TimeoutError):
            return f"{where} does not answer in TLS within {DIAL_TIMEOUT} s"
        if isinstance(error, ClosedInHandshake):
            return (
                f"{where} closed the connection before TLS: it is no gateway, or the gateway has "
                "too many connections"
            )
        if isinstance(error, ssl.SSLError) and error.reason == UNKNOWN_NAME:
            return f"no tunnel for {self.hostname} at this gateway, or its agent is away"
        if isinstance(error, NoTLS):
            return f"{where} {error}; is it a gateway's port for visitors?"
        reason = getattr(error, "reason", None) or error
        return f"the TLS handshake with {where} failed ({reason}); is it a gateway's port?"

    def _advice(self, code: int) -> str:
        """What to do about a bad certificate, by OpenSSL's number of the error. Dials again, to say
        more."""
        if code in (NOT_YET_VALID, EXPIRED):
            return clock_advice(code, "the gateway has to renew it")
        place = self.host, self.port, self.hostname
        if code in (OTHER_NAME, OTHER_ADDRESS):
            names = trusted_names(*place, ca_file=self.ca_file)
            whose = f" ({shown(names)})" if names else ""
            return f"it is another hostname's{whose}; is it the right gateway?"
        if code in UNKNOWN_CA:
            if self.ca_file is None and system_has_no_cas(code):
                return NO_SYSTEM_CAS
            if self.ca_file is not None and trusted_names(*place) is not None:
                return "its CA is one that this system trusts; leave out --ca-file"
            if is_of_staging(*place):
                return "it is from Let's Encrypt's staging environment, which is for trials"
            if self.ca_file is not None:
                return f"{OTHER_ADVICE}, and {self.ca_file} names another one"
        return OTHER_ADVICE

    def check(self, visit: End) -> None:
        """Raise NoVisit if a visit that is over was broken by an error of its own."""
        error = visit.broken_by
        if error is None:
            return
        if isinstance(error, NoVisit):
            raise error
        if isinstance(error, ConnectionError) and not visit.received:
            raise NoVisit(f"the connection to {self.hostname} was reset before a byte came: "
                          "its target is down or its agent is away") from None  # fmt: skip
        raise NoVisit(f"the connection to {self.hostname} broke after {visit.received} bytes: "
                      f"{error.strerror or error}") from None  # fmt: skip


# Standard input and output -----------------------------------------------------------------------


def speak_on_stdio(destination: Destination, say: Callable[[str], object]) -> None:
    """Make one visit on descriptors 0 and 1, until the other side has ended. Raises NoVisit.

    ``say(text)`` reports progress.
    """
    if sys.stdin is None or sys.stdout is None:  # our socket would get the closed descriptor
        raise NoVisit("standard input or output is closed; both are needed without LOCAL")
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # unless it is ignored
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # ends the process without a traceback
    visit = destination.dial()
    outlive_ssh()
    say(f"connected to {destination.hostname}")
    spawn("input", _send_input, visit)
    # The visit has noted an error of its own, which check() raises.
    with contextlib.suppress(OSError):
        while data := visit.read():
            if not _write_output(data):
                return  # the reader of our output wants no more
    destination.check(visit)
    say(f"{visit.sent} bytes sent, {visit.received} received")


def _send_input(visit: End) -> None:
    try:
        while data := _read_input():
            visit.write(data)
        visit.finish()
    except NoVisit as error:
        visit.break_off(error)
    except TimeoutError:  # reset also its other direction, or ssh would wait for ever
        visit.break_off(NoVisit(
            f"the other side has read nothing for {visit.stall_timeout:g} s, and the visit is "
            "reset"
        ))  # fmt: skip
    except OSError:
        # The other side reads no more, but may have answered: main, which reads the answer,
        # finds its end, or the error.
        pass


def _read_input() -> bytes:
    """Wait for input and return it; b"" at its end. Raises NoVisit."""
    while True:
        try:
            return os.read(0, INPUT_SIZE)
        except BlockingIOError:  # another program that has it open has made it non-blocking
            select.select([0], [], [])
        except OSError as error:
            raise NoVisit(f"standard input cannot be read ({error.strerror})") from None


def _write_output(data: bytes) -> bool:
    """Write all of ``data``; False if the reader is gone. Raises NoVisit for any other error."""
    left = memoryview(data)
    while left:
        try:
            left = left[os.write(1, left) :]
        except BlockingIOError:  # as in _read_input()
            select.select([], [1], [])
        except ConnectionError:  # BrokenPipeError is one; standard output may also be a socket
            return False
        except OSError as error:
            raise NoVisit(f"standard output cannot be written ({error.strerror})") from None
    return True


def outlive_ssh() -> None:
    """Run on for CLOSING_TIME after SIGHUP: ssh sends it right after its last bytes, which still
    have to be passed on."""
    if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) is signal.SIG_DFL:
        # SIGALRM ends the process.
        signal.signal(signal.SIGHUP, lambda *_: signal.alarm(CLOSING_TIME))


# A local port ------------------------------------------------------------------------------------


class Local(NamedTuple):
    """Where to listen. ``port`` 0 is any free one."""

    address: str
    port: int


def listen(destination: Destination, local: Local) -> int:
    """Serve clients of a local port until a signal comes; returns the exit status.

    Raises NoVisit if it cannot listen. If any free port was asked for, it is printed.
    """
    family = socket.AF_INET6 if ":" in local.address else socket.AF_INET
    try:
        listening = socket.create_server(local, family=family, backlog=BACKLOG)
    except OSError as error:
        if isinstance(error.__context__, socket.gaierror):  # which create_server() has replaced
            raise NoVisit(f"cannot listen on {local.address}: it does not resolve; write an "
                          f"address of this machine such as {LOOPBACK}") from None  # fmt: skip
        # Not error.strerror: create_server() adds the address to it.
        reason = LISTEN_PROBLEMS.get(error.errno) or (
            os.strerror(error.errno) if error.errno else error
        )
        raise NoVisit(f"cannot listen on {local.address} port {local.port}: {reason}") from None
    signals = Signals()
    port = listening.getsockname()[1]
    log.info("%s port %d leads to %s; Ctrl-C ends it", local.address, port, destination.hostname)
    if not local.port:
        print(port, flush=True)
    spawn("listener", signals.after, lambda: accept_all(listening, destination))
    return 0 if signals.wait() else 1  # 0: a bug ended the listener, and was logged


def accept_all(listening: socket.socket, destination: Destination) -> NoReturn:
    """Give each client of a listening socket a thread. Never returns."""
    room = threading.BoundedSemaphore(MAX_CLIENTS)
    while True:
        try:
            sock, (host, port, *_) = listening.accept()
        except OSError as error:  # the client has left already, or we are out of descriptors
            more = "; raise the limit (ulimit -n)" if error.errno == errno.EMFILE else ""
            log.warning("a client could not be accepted: %s; accepting pauses for %g s%s",
                        error.strerror, ACCEPT_PAUSE, more)  # fmt: skip
            sleep(ACCEPT_PAUSE)
            continue
        name = f"client {host} port {port}"
        client = End(sock)
        client.cut_unless_finished()
        if not room.acquire(blocking=False):
            log.warning("%s refused: %d clients are connected, which is the limit", name,
                        MAX_CLIENTS)  # fmt: skip
            client.close()
            continue
        try:
            spawn(name, serve, client, name, destination, room)
        except NoThread as error:
            log.warning("%s refused: %s", name, error)
            client.close()
            room.release()


def serve(
    client: End, name: str, destination: Destination, room: threading.BoundedSemaphore
) -> None:
    """Serve one client, from dialling to the end of both directions; errors are logged."""
    try:
        with contextlib.closing(client), contextlib.closing(destination.dial()) as visit:
            log.info("%s: connected to %s", name, destination.hostname)
            relay(client, visit)
            destination.check(visit)
            log.info("%s: %d bytes sent, %d received", name, visit.sent, visit.received)
    except (NoVisit, NoThread) as error:
        log.warning("%s: %s", name, error)
    finally:
        room.release()


# ~/.ssh/config -----------------------------------------------------------------------------------


def ssh_config(options: argparse.Namespace) -> str:
    """The lines for ~/.ssh/config that make ssh use the helper for a hostname, with ``options``.

    ssh expands % in the rest of the ProxyCommand line, and gives that to a shell.
    """
    program = os.path.abspath(sys.argv[0])
    words = [program, "forward"]
    if os.path.isdir(program) or program.endswith(".py"):  # it was `python gotunnel_agent`
        words.insert(0, sys.executable)
    if options.via:
        words += ["--via", options.via]
    if options.ca_file:
        words += ["--ca-file", os.path.abspath(options.ca_file)]
    if options.skip_tls_verify:
        words.append("--skip-tls-verify")
    hostname, port = split_address(options.destination)
    to = "%h" if port == DEFAULT_PORT else f"%h:{port}"
    command = shlex.join(words).replace("%", "%%")
    return f"Host {normal_hostname(hostname)}\n    ProxyCommand {command} {to}\n"


# Arguments ---------------------------------------------------------------------------------------


def main(arguments: list[str] | None = None) -> int:
    """Run `gotunnel-agent forward` with ``arguments``; return the exit status."""
    parser = make_parser()
    arguments = sys.argv[2:] if arguments is None else arguments
    for argument in arguments:  # first, or its value would be taken for HOST, and refused
        if advice := OTHER_OPTIONS.get(argument.partition("=")[0]):
            parser.error(f"unknown option {argument.partition('=')[0]!r}; {advice}")
    options, unknown = parser.parse_known_args(arguments)
    if unknown:
        parser.error(f"unknown argument {unknown[0]!r}, expected HOST[:PORT] and LOCAL")
    if options.ca_file and options.skip_tls_verify:
        parser.error("--ca-file and --skip-tls-verify came, expected only one of them")
    if options.print_ssh_config:
        if options.local:
            parser.error("--print-ssh-config takes no LOCAL: ssh speaks on standard input")
        return print_answer(PROGRAM, lambda: print(ssh_config(options), end="") or 0)
    try:
        context = client_context(options.ca_file, options.skip_tls_verify)
        context.set_ciphers(AEAD)
    except OSError as error:  # ssl.SSLError is one
        reason = why_no_cas(options.ca_file or "", error)
        parser.error(f"--ca-file {options.ca_file}: {reason}, expected PEM")
    hostname, port = split_address(options.destination)
    host, port = split_address(options.via, port) if options.via else (hostname, port)
    destination = Destination(normal_hostname(hostname), host, port, context, options.ca_file)
    on_terminal = sys.stderr is not None and sys.stderr.isatty()
    free_standard_error()
    try:
        if options.local:
            set_up_process("info" if on_terminal else "warning")
            return listen(destination, options.local)
        # Under ssh, standard error is the user's terminal, and the other two are ssh's pipes.
        on_terminal = on_terminal and (os.isatty(0) or os.isatty(1))
        speak_on_stdio(destination, complain if on_terminal else lambda text: None)
        return 0
    except (NoVisit, NoThread) as error:
        complain(error)
        return 1


def complain(text: object) -> None:
    if sys.stderr is not None:  # with file=None print() would use standard output
        with contextlib.suppress(OSError):  # its reader is gone
            print(f"{PROGRAM}: {text}", file=sys.stderr)


def make_parser() -> argparse.ArgumentParser:
    parser = Parser(
        PROGRAM, description=DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "destination", metavar="HOST[:PORT]", type=a_destination,
        help=f"the hostname, and the gateway's port for visitors (default: {DEFAULT_PORT})",
    )  # fmt: skip
    parser.add_argument(
        "local", metavar="LOCAL", nargs="?", type=a_local,
        help=f"PORT or ADDRESS:PORT to listen on (default address: {LOOPBACK}); with {AUTO} as "
        "PORT any free one, which is printed",
    )  # fmt: skip
    parser.add_argument(
        "--via", metavar="GATEWAY[:PORT]", type=an_address,
        help="connect to this address instead; the certificate must still be HOST's",
    )  # fmt: skip
    parser.add_argument(
        "--ca-file", metavar="FILE",
        help="trust the CA certificates in this file (PEM), not the system's",
    )  # fmt: skip
    parser.add_argument(
        "--skip-tls-verify", action="store_true",
        help="accept any certificate, for trials only: an attacker on the network path could read "
        "and change everything",
    )  # fmt: skip
    parser.add_argument(
        "--print-ssh-config", action="store_true",
        help="print the lines for ~/.ssh/config that make `ssh HOST` come this way",
    )  # fmt: skip
    return parser


def a_destination(text: str) -> str:
    if not valid_host(text) or not valid_hostname(split_address(text)[0]):
        raise argparse.ArgumentTypeError(
            f"{hidden(text)!r} is no hostname such as ssh.example.com, with or without a port"
            + ("; HOST comes first, LOCAL behind it" if text.isdigit() else _why(text))
        )
    return text


def an_address(text: str) -> str:
    if not valid_host(text):
        raise argparse.ArgumentTypeError(
            f"{hidden(text)!r} is no hostname or IP address, with or without a port{_why(text)}"
        )
    return text


def _why(text: str) -> str:
    """What is wrong with a hostname and port, to be put behind a message."""
    host, colon, port = text.rpartition(":")
    if "@" in text:
        return "; leave out the user"
    if "/" in text or not colon:
        why = why_no_hostname(text)
        return f"{why}, which only --via takes" if why.endswith("IP address") else why
    if not port.isdigit():
        return "; its port is no number"
    if valid_host(host) and not valid_hostname(host):
        return "; it is an IP address, which only --via takes"
    return why_no_hostname(host)


def a_local(text: str) -> Local:
    address, _, port = text.rpartition(":")
    if port != AUTO and not (port.isascii() and port.isdigit() and int(port) <= MAX_PORT):
        raise argparse.ArgumentTypeError(
            f"{text!r} is no port (0 to {MAX_PORT}, or {AUTO}), with or without an address"
        )
    return Local(address.strip("[]") or LOOPBACK, 0 if port == AUTO else int(port))


def split_address(text: str, default: int = DEFAULT_PORT) -> tuple[str, int]:
    """Host and port of a text that valid_host() accepts; IPv6 without its brackets."""
    host, colon, port = text.rpartition(":")
    if not colon or port.endswith("]"):
        return text.strip("[]"), default
    return host.strip("[]"), int(port)
