"""The visitor's helper: `gotunnel-agent forward HOST[:PORT] [LOCAL]`.

A hostname in tcp mode is reached by TLS that names it (SNI), which ssh, psql and most others do
not speak. This does it for them: it dials, checks the certificate, and copies bytes both ways,
half-closes included.

Without LOCAL it speaks on standard input and output, for ssh's ProxyCommand. It ends when the
other side has ended, also if standard input is still open. SIGINT and SIGTERM have their usual,
quiet effect: the shell sees 130 and 143. With LOCAL it listens there, a connection for each
client, until SIGINT or SIGTERM.

However this process ends, bytes that were cut off never look complete: until our half of a
connection is finished, closing it is a reset, and the kernel sees to that.

Threads: with LOCAL main waits for signals; without it, main reads the answer.

    thread      how many           does                            ends when
    input       1, without LOCAL   standard input to the hostname  its end, or the process
    listener    1, with LOCAL      accepts clients                 the process ends
    client      <= MAX_CLIENTS     dials, and relays one client    both directions are done
    ... back    1 a client         the hostname's bytes to it      both directions are done

and standard error, which writes what is logged, until the process ends (standard_error.py).

Exit status: 0 when the other side has ended, or the reader of our output has gone, and after a
signal with LOCAL; 1 if there is no connection, or it broke; 2 if the arguments are wrong. Errors
are one line on standard error. ssh starts us for each of its connections, so we import nothing
that an agent needs and we do not.
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
from time import sleep
from typing import NamedTuple

from gotunnel import Deadline, NoThread, relay, spawn

from .common.duplex import Duplex
from .common.hostnames import MAX_PORT, normal_hostname, valid_host, valid_hostname
from .common.process import Signals, print_answer, set_up_process
from .common.standard_error import free_standard_error
from .common.tls import AEAD
from .connect import addresses_of, connect
from .trust import NO_TLS, client_context

log = logging.getLogger("gotunnel.forward")

PROGRAM = "gotunnel-agent forward"
DEFAULT_PORT = 443  # https: what a gateway listens on for visitors
LOOPBACK = "127.0.0.1"  # what we listen on unless told: nobody else's way into the tunnel
AUTO = "auto"  # as a port: any free one

DIAL_TIMEOUT = 10  # seconds until a gateway that does not answer counts as down; then for its TLS
CLOSING_TIME = 3  # seconds that we may go on after SIGHUP
INPUT_SIZE = 256 * 1024  # bytes read at once; a pipe holds 64 KiB, a file has more
MAX_CLIENTS = 128  # at a time; each is two threads and about six descriptors of the usual 1024
BACKLOG = 128  # clients that wait to be accepted
ACCEPT_PAUSE = 0.1  # seconds, when the system has no descriptor for a client

DESCRIPTION = """\
Connect to a hostname that a gotunnel gateway serves in tcp mode: by TLS, with
its certificate checked. Without LOCAL, standard input and output are the
connection (ssh's ProxyCommand); with LOCAL, each connection made to that port
of this machine is one to HOST, until Ctrl-C."""

# What to do about a certificate, by OpenSSL's number of what is wrong with it (x509_vfy.h).
ADVICE = {
    9: "set this machine's clock",  # not yet valid
    10: "the gateway has to renew it",  # has expired
    62: "it is another hostname's; is it the right gateway?",
}
# Why a port of this machine cannot be had, and what to do.
LISTEN_PROBLEMS = {
    errno.EADDRINUSE: "in use, another program listens there; stop it or choose another port",
    errno.EACCES: "no right to listen on a port below 1024; choose a higher one",
    errno.EADDRNOTAVAIL: "no address of this machine; choose another",
}
OTHER_ADVICE = "--ca-file names a CA to trust"

# How a gateway answers for a hostname that it has a certificate for and no tunnel in tcp mode.
PAGE = re.compile(rb"HTTP/1\.1 [45].*?\r\nX-Gotunnel-Error: ([a-z-]+)\r\n", re.DOTALL)


class NoVisit(Exception):
    """There is no connection to a hostname, or it broke. The text is a line for the user."""


# A connection to a hostname ----------------------------------------------------------------------


class End(Duplex):
    """A connection that knows what it has carried and what broke it."""

    def __init__(self, sock):
        super().__init__(sock)
        self.sent = self.received = 0  # bytes
        self._end_lock = threading.Lock()  # guards both below: two threads carry a visit
        self.broken_by = None  # the first OSError of it, or a NoVisit
        self.dropped = False  # given up for another reason than its own

    def read(self, *arguments):
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

    def write(self, data, *timeout):
        try:
            super().write(data, *timeout)
        except OSError as error:
            self._note(error)
            raise
        self.sent += len(data)

    def _note(self, error):
        with self._end_lock:
            if self.broken_by is None and not self.dropped:
                self.broken_by = error

    def break_off(self, reason: "NoVisit"):
        """Reset it, for a reason that the user is told."""
        with self._end_lock:
            self.broken_by = reason
        self.reset()

    def reset(self):
        with self._end_lock:
            self.dropped = self.broken_by is None
        super().reset()


class Destination(NamedTuple):
    """A hostname, the address at which its gateway is dialled, and how to check its certificate."""

    hostname: str
    host: str
    port: int
    context: ssl.SSLContext

    def dial(self) -> End:
        """Connect; raises NoVisit, which says what to do where that is known."""
        where = f"{self.host} port {self.port}"
        try:
            sock = connect(addresses_of(self.host, self.port), Deadline(DIAL_TIMEOUT))
        except socket.gaierror as error:
            raise NoVisit(f"{self.host} does not resolve ({error.strerror}); "
                          "--via names the gateway to dial") from None  # fmt: skip
        except ConnectionRefusedError:
            raise NoVisit(f"nobody listens at {where}") from None
        except TimeoutError:
            raise NoVisit(f"{where} does not answer within {DIAL_TIMEOUT} s") from None
        except OSError as error:
            raise NoVisit(f"{where} cannot be reached: {error.strerror or error}") from None
        end = End(sock)
        try:
            end.start_tls(self.context, server_side=False, server_hostname=self.hostname)
            end.handshake_within(DIAL_TIMEOUT)
            end.cut_unless_finished()
            return end
        except BaseException as error:
            end.close()
            if isinstance(error, OSError):
                raise NoVisit(self._why_no_tls(error, where)) from None
            raise

    def _why_no_tls(self, error, where):
        if isinstance(error, ssl.SSLCertVerificationError):
            advice = ADVICE.get(error.verify_code, OTHER_ADVICE)
            problem = error.verify_message.rstrip(".")
            return f"the certificate of {self.hostname} is not to be trusted ({problem}); {advice}"
        if isinstance(error, TimeoutError):
            return f"{where} does not answer in TLS within {DIAL_TIMEOUT} s"
        if isinstance(error, (ConnectionError, ssl.SSLEOFError, ssl.SSLZeroReturnError)):
            return f"{where} closed the connection before TLS: no gateway, or one that is full"
        if isinstance(error, ssl.SSLError) and error.reason == "TLSV1_UNRECOGNIZED_NAME":
            return f"no tunnel for {self.hostname} at this gateway, or its agent is away"
        reason = getattr(error, "reason", None) or error
        if reason in NO_TLS:
            return f"{where} does not speak TLS; is it a gateway's port for visitors?"
        return f"the TLS handshake with {where} failed ({reason}); is it a gateway's port?"

    def check(self, visit):
        """Raise NoVisit if a visit, which is over, broke by itself."""
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


def speak_on_stdio(destination, say):
    """One visit, on descriptors 0 and 1, until the other side has ended. Raises NoVisit.

    ``say(text)`` tells of progress.
    """
    if sys.stdin is None or sys.stdout is None:  # a socket of ours would take its number
        raise NoVisit("standard input or output is closed; both are needed without LOCAL")
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # else it is ignored
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # which prints no traceback
    visit = destination.dial()
    outlive_ssh()
    say(f"connected to {destination.hostname}")
    spawn("input", _send_input, visit)
    # A broken visit has been noted; check() says how.
    with contextlib.suppress(OSError):
        while data := visit.read():
            if not _write_output(data):
                return  # the reader of our output has had enough
    destination.check(visit)
    say(f"{visit.sent} bytes sent, {visit.received} received")


def _send_input(visit):
    try:
        while data := _read_input():
            visit.write(data)
        visit.finish()
    except NoVisit as error:
        visit.break_off(error)
    except TimeoutError:  # it may send on, but our input goes nowhere: ssh would wait for ever
        visit.break_off(NoVisit(
            f"the other side has taken nothing for {visit.stall_timeout:g} s, and the visit is "
            "broken off"
        ))  # fmt: skip
    except OSError:
        # The other side takes no more. It may have answered all the same: the thread that
        # reads the answer hears its end, or what has happened.
        pass


def _read_input() -> bytes:
    """What is there, once something is; b"" at the end. Raises NoVisit."""
    while True:
        try:
            return os.read(0, INPUT_SIZE)
        except BlockingIOError:  # a program that shares it with us does not want to wait
            select.select([0], [], [])
        except OSError as error:
            raise NoVisit(f"standard input cannot be read ({error.strerror})") from None


def _write_output(data) -> bool:
    """Write all; False if nobody reads. Raises NoVisit if it fails otherwise."""
    left = memoryview(data)
    while left:
        try:
            left = left[os.write(1, left) :]
        except BlockingIOError:  # as in _read_input()
            select.select([], [1], [])
        except ConnectionError:  # BrokenPipeError is one; the other end may be a socket, too
            return False
        except OSError as error:
            raise NoVisit(f"standard output cannot be written ({error.strerror})") from None
    return True


def outlive_ssh():
    """Go on for CLOSING_TIME after SIGHUP: ssh sends it right behind its last words, which we
    still have to pass on."""
    if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) is signal.SIG_DFL:
        signal.signal(signal.SIGHUP, lambda *_: signal.alarm(CLOSING_TIME))  # which ends us


# A local port ------------------------------------------------------------------------------------


class Local(NamedTuple):
    """Where to listen. ``port`` 0 is any free one."""

    address: str
    port: int


def listen(destination, local) -> int:
    """Serve clients of a local port until a signal comes; returns the exit status.

    Raises NoVisit if the port cannot be had. A port that was not given is printed.
    """
    family = socket.AF_INET6 if ":" in local.address else socket.AF_INET
    try:
        listening = socket.create_server(local, family=family, backlog=BACKLOG)
    except OSError as error:
        # Python adds internals to the system's words.
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
    return 0 if signals.wait() else 1  # it ended by a bug, of which the traceback was printed


def accept_all(listening, destination):
    """Give each client of a listening socket a thread. Returns never."""
    room = threading.BoundedSemaphore(MAX_CLIENTS)
    while True:
        try:
            sock, (host, port, *_) = listening.accept()
        except OSError as error:  # it has hung up already, or we are out of descriptors
            more = "; raise the limit (ulimit -n)" if error.errno == errno.EMFILE else ""
            log.warning("a client could not be accepted: %s; accepting pauses for %g s%s",
                        error.strerror, ACCEPT_PAUSE, more)  # fmt: skip
            sleep(ACCEPT_PAUSE)
            continue
        name = f"client {host} port {port}"
        client = End(sock)
        client.cut_unless_finished()
        if not room.acquire(blocking=False):
            log.warning("%s refused: %d others are here, as many as may be", name, MAX_CLIENTS)
            client.close()
            continue
        try:
            spawn(name, serve, client, name, destination, room)
        except NoThread as error:
            log.warning("%s refused: %s", name, error)
            client.close()
            room.release()


def serve(client, name, destination, room):
    """One client, from dialling to the end of both directions; what goes wrong is logged."""
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


def ssh_config(options) -> str:
    """The lines that make ssh use us for a hostname, with the options that we were given.

    ssh takes the rest of the line, fills in what stands behind %, and gives it to a shell.
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


def main(arguments=None) -> int:
    """Do what the words behind `gotunnel-agent forward` say; return the exit status."""
    parser = make_parser()
    options = parser.parse_args(sys.argv[2:] if arguments is None else arguments)
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
        parser.error(f"--ca-file {options.ca_file}: {error.strerror or error}, expected PEM")
    hostname, port = split_address(options.destination)
    host, port = split_address(options.via, port) if options.via else (hostname, port)
    destination = Destination(normal_hostname(hostname), host, port, context)
    on_terminal = sys.stderr is not None and sys.stderr.isatty()
    free_standard_error()
    try:
        if options.local:
            set_up_process("info" if on_terminal else "warning")
            return listen(destination, options.local)
        # Beneath ssh, standard error is the user's terminal, but the other two are ssh's.
        on_terminal = on_terminal and (os.isatty(0) or os.isatty(1))
        speak_on_stdio(destination, complain if on_terminal else lambda text: None)
        return 0
    except (NoVisit, NoThread) as error:
        complain(error)
        return 1


def complain(text):
    if sys.stderr is not None:  # else print() would take standard output
        with contextlib.suppress(OSError):  # nobody reads it
            print(f"{PROGRAM}: {text}", file=sys.stderr)


def make_parser():
    parser = argparse.ArgumentParser(
        PROGRAM, description=DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "destination", metavar="HOST[:PORT]", type=a_destination,
        help=f"the hostname, and its gateway's port (default: {DEFAULT_PORT})",
    )  # fmt: skip
    parser.add_argument(
        "local", metavar="LOCAL", nargs="?", type=a_local,
        help=f"PORT or ADDRESS:PORT to listen on (default: of {LOOPBACK}); with {AUTO} as PORT "
        "a free one, which is printed",
    )  # fmt: skip
    parser.add_argument(
        "--via", metavar="GATEWAY[:PORT]", type=an_address,
        help="dial this address; the certificate must still be HOST's",
    )  # fmt: skip
    parser.add_argument(
        "--ca-file", metavar="FILE",
        help="trust the CA certificates in this file (PEM), not the system's",
    )  # fmt: skip
    parser.add_argument(
        "--skip-tls-verify", action="store_true",
        help="trust any certificate, to try things out: anybody could listen in",
    )  # fmt: skip
    parser.add_argument(
        "--print-ssh-config", action="store_true",
        help="print the lines for ~/.ssh/config that make `ssh HOST` come this way",
    )  # fmt: skip
    return parser


def a_destination(text):
    if not valid_host(text) or not valid_hostname(split_address(text)[0]):
        raise argparse.ArgumentTypeError(
            f"{text!r} is no hostname such as ssh.example.com, with or without a port"
        )
    return text


def an_address(text):
    if not valid_host(text):
        raise argparse.ArgumentTypeError(
            f"{text!r} is no hostname or IP address, with or without a port"
        )
    return text


def a_local(text) -> Local:
    address, _, port = text.rpartition(":")
    if port != AUTO and not (port.isascii() and port.isdigit() and int(port) <= MAX_PORT):
        raise argparse.ArgumentTypeError(
            f"{text!r} is no port (0 to {MAX_PORT}, or {AUTO}), with or without an address"
        )
    return Local(address.strip("[]") or LOOPBACK, 0 if port == AUTO else int(port))


def split_address(text, default=DEFAULT_PORT) -> tuple:
    """Host and port of what valid_host() has accepted, IPv6 without its brackets."""
    host, colon, port = text.rpartition(":")
    if not colon or port.endswith("]"):
        host, port = text, default
    return host.strip("[]"), int(port)
