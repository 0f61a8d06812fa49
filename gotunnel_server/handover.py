"""Hands a running gateway over to a successor (SIGUSR2), which gets its listening sockets. It is
started with the same command line, environment and working folder; the installed version and the
files of the configuration may be new.

    this gateway (HandOver)                     the successor (Predecessor)
    starts it, with copies of its sockets -->   reads its configuration, takes the sockets
                                         <--    {"said": "ready"}
    {"estate": ...} ----------------------->    its listeners start
                                         <--    {"said": "serving"}
    accepts no more; {"said": "yours"} ---->    orders certificates, tells systemd READY=1
    says GO_AWAY, drains, ends

Both accept for a moment, which does no harm: a connection is served by the process that accepted
it. Until "serving" the successor may fail, or say {"failed": TEXT}: then it is killed if it still
runs, and this gateway serves on.

The messages are JSON, one a line, over a socket pair. GOTUNNEL_HANDOVER has the descriptor of the
successor's end. A gateway that finds it set has a predecessor.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

from gotunnel import Deadline
from gotunnel_agent.common.one_line import on_one_line

from .net.inherited import LISTEN, Given

log = logging.getLogger("gotunnel.handover")

VARIABLE = "GOTUNNEL_HANDOVER"
# Seconds from the start of a successor until it serves. Python and its packages take some, and
# CERT_DIR with thousands of files, or a slow disk, may take many more.
READY_TIMEOUT = 60
# Seconds that a successor waits until its predecessor accepts no more: that takes milliseconds.
YOURS_TIMEOUT = 10
# Seconds to wait for the end of a successor that was killed, or has closed its end of the pair.
END_TIMEOUT = 5
# Bytes of a message: room for a few hundred thousand hostnames, more than one gateway serves.
MOST_MESSAGE = 16 * 1024 * 1024
MOST_REASON = 500  # characters of a successor's reason in the log
INIT = 1  # process id


class Estate(NamedTuple):
    """What a successor gets beside the sockets."""

    modes: dict[str, str]  # of hostnames that agents serve now, and will serve again in a moment
    ports: dict[int, str]  # public ports that agents have: the hostname of each
    proofs: tuple[tuple[str, str, str], ...]  # published for a CA: see Challenges.published()
    sessions: int = 0  # of agents, which will come again in a moment: each takes a thread


class Listeners(Protocol):
    """What a hand-over needs of listeners.Listeners."""

    def shared(self) -> Iterable[Given]: ...


class Gateway(Protocol):
    """What a hand-over needs of a gateway.Gateway."""

    @property
    def listeners(self) -> Listeners: ...

    def estate(self) -> Estate: ...


class Failed(Exception):
    """The hand-over has failed; the text says why."""


class _Channel:
    """One end of the socket pair."""

    def __init__(self, sock: socket.socket, timeout: float) -> None:
        self._sock = sock
        self._deadline = Deadline(timeout)
        self._buffer = b""

    def send(self, **message: Any) -> None:
        """Raises OSError."""
        self._sock.settimeout(self._deadline.left())
        self._sock.sendall(json.dumps(message).encode() + b"\n")

    def receive(self) -> dict[str, Any]:
        """The next message. Raises EOFError, OSError; ValueError for bytes that are no message."""
        while b"\n" not in self._buffer:
            self._sock.settimeout(self._deadline.left())
            data = self._sock.recv(64 * 1024)
            if not data:
                raise EOFError
            self._buffer += data
            if len(self._buffer) > MOST_MESSAGE:
                raise ValueError(f"a message of more than {MOST_MESSAGE} bytes")
        line, _, self._buffer = self._buffer.partition(b"\n")
        message = json.loads(line)
        if not isinstance(message, dict):
            raise ValueError("a message that is no object")
        return message

    def stirs(self, timeout: float) -> bool:
        """Wait ``timeout`` seconds at most until something comes, or the other end is closed."""
        # Not select.select(): it refuses descriptors from 1024 on, which a busy gateway's pair has.
        self._sock.settimeout(timeout)
        try:
            self._sock.recv(1, socket.MSG_PEEK)
        except TimeoutError:
            return False
        except OSError:  # the other process has ended
            pass
        return True

    def close(self) -> None:
        self._sock.close()


class HandOver:
    """One try to hand over. run() in a thread of its own, then release(); any thread may
    cancel()."""

    def __init__(
        self,
        gateway: Gateway,
        environment: Mapping[str, str],
        command: Sequence[str] = (),
        timeout: float = READY_TIMEOUT,
    ) -> None:
        """``command`` starts the successor; empty: the command of this process."""
        self._gateway = gateway
        self._environment = environment
        self._command = command or (sys.executable, *sys.orig_argv[1:])
        self._timeout = timeout
        self._channel: _Channel | None = None
        self._lock = threading.Lock()  # guards the three below
        self._process: subprocess.Popen[bytes] | None = None
        self._cancelled = False
        self.successor: int | None = None  # its process id, once it serves

    def run(self) -> None:
        """Start a successor, and wait until it serves; or log why it does not."""
        try:
            pid = self._attempt()
        except Failed as error:
            self._give_up()
            if not self._cancelled:
                log.error("hand-over failed: %s; this gateway serves on", error)
            return
        except BaseException:
            self._give_up()
            raise
        log.info("the successor, process %d, serves; this gateway drains and ends", pid)

    def cancel(self) -> bool:
        """End the successor. Returns False, and does nothing, if it serves already."""
        with self._lock:
            if self.successor is not None:
                return False
            self._cancelled = True
        self._kill()
        return True

    def release(self) -> None:
        """Tell the successor that this gateway accepts no more."""
        if self._channel is not None:
            with contextlib.suppress(OSError):  # the successor has ended
                self._channel.send(said="yours")
            self._channel.close()

    def _attempt(self) -> int:
        """The process id of a successor that serves. Raises Failed."""
        shared = list(self._gateway.listeners.shared())
        try:
            ours, theirs = socket.socketpair()
        except OSError as error:  # no descriptor is left
            for given in shared:
                given.sock.close()
            raise Failed(f"no successor can be talked to: {error.strerror}") from None
        self._channel = channel = _Channel(ours, self._timeout)
        try:
            process = self._start(theirs, shared)
            theirs.close()
            channel.send(
                pid=os.getpid(),
                sockets=[[given.sock.fileno(), given.name, given.by_systemd] for given in shared],
            )
            self._await(channel, "ready")
            channel.send(estate=self._gateway.estate()._asdict())
            self._await(channel, "serving")
        except EOFError:
            raise Failed(self._how_it_ended()) from None
        except TimeoutError:
            raise Failed(
                f"the successor did not serve within {self._timeout:g} s, and is killed"
            ) from None
        except BrokenPipeError:
            raise Failed(self._how_it_ended()) from None
        except ConnectionResetError:
            raise Failed(self._how_it_ended()) from None
        except (OSError, ValueError) as error:
            raise Failed(f"messages with the successor failed: {error}") from None
        finally:
            theirs.close()
            for given in shared:
                given.sock.close()
        with self._lock:
            if self._cancelled:
                raise Failed("it was cancelled")
            self.successor = process.pid
        return process.pid

    def _start(self, theirs: socket.socket, shared: Sequence[Given]) -> subprocess.Popen[bytes]:
        environment = {
            name: value for name, value in self._environment.items()
            # These hold for this process id alone. The successor's sockets come by message; without
            # WATCHDOG_PID it takes WATCHDOG_USEC as meant for itself.
            if name not in (*LISTEN, "WATCHDOG_PID")
        }  # fmt: skip
        environment[VARIABLE] = str(theirs.fileno())
        descriptors = [theirs.fileno(), *(given.sock.fileno() for given in shared)]
        with self._lock:
            if self._cancelled:
                raise Failed("it was cancelled")
            try:
                self._process = subprocess.Popen(
                    self._command, env=environment, pass_fds=descriptors
                )
            except (OSError, ValueError) as error:
                raise Failed(f"{self._command[0]} cannot be started: {error}") from None
            log.info("a successor starts: process %d", self._process.pid)
            return self._process

    def _await(self, channel: _Channel, said: str) -> None:
        message = channel.receive()
        if "failed" in message:
            raise Failed(f"the successor says: {on_one_line(str(message['failed']), MOST_REASON)}")
        if message.get("said") != said:
            raise Failed(f"the successor said {on_one_line(repr(message), 100)}, expected {said}")

    def _how_it_ended(self) -> str:
        status = None
        with contextlib.suppress(subprocess.TimeoutExpired):
            status = self._process.wait(END_TIMEOUT) if self._process else None
        if status is None:
            return "the successor hung up, and is killed"
        how = f"by signal {-status}" if status < 0 else f"with status {status}"
        return f"the successor ended {how} before it served; its own lines say why"

    def _give_up(self) -> None:
        self._kill()
        if self._channel is not None:
            self._channel.close()

    def _kill(self) -> None:
        with self._lock:
            process = self._process
        if process is not None:
            process.kill()  # does nothing to a process that has ended
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(END_TIMEOUT)


def why_not_here() -> str | None:
    """Why this process cannot hand over; None if it can."""
    if os.getpid() == INIT:
        return "it is process 1 of its container, which would end with it: restart the container"
    return None


class Predecessor:
    """The gateway that hands over to this one. Main thread."""

    def __init__(self, descriptor: int) -> None:
        """Raises Failed."""
        sock = socket.socket(fileno=descriptor)
        sock.set_inheritable(False)
        self._channel = _Channel(sock, READY_TIMEOUT)
        try:
            message = self._receive()
        except BaseException:
            self._channel.close()
            raise
        self._pid = message.get("pid")
        self.sockets = [
            _given(*entry) for entry in message.get("sockets", ()) if isinstance(entry, list)
        ]

    def await_go(self) -> Estate:
        """Say that this gateway is ready: all steps that can fail are done. Returns the
        predecessor's state. Raises Failed."""
        self._say("ready")
        return read_estate(self._receive().get("estate"))

    def await_end(self) -> None:
        """Say that this gateway serves, and wait until the predecessor accepts no more. Raises
        Failed."""
        self._say("serving")
        if self._channel.stirs(YOURS_TIMEOUT):
            log.info("this gateway takes over from process %s", self._pid)
        else:
            log.warning("the predecessor, process %s, still listens after %g s; both serve now",
                        self._pid, YOURS_TIMEOUT)  # fmt: skip
        self._channel.close()

    def tell_failure(self, text: str) -> None:
        """Tell the predecessor why this process cannot take over."""
        with contextlib.suppress(OSError):  # the predecessor has ended
            self._channel.send(failed=text)

    def _say(self, word: str) -> None:
        try:
            self._channel.send(said=word)
        except OSError as error:
            raise Failed(f"the predecessor has ended: {error.strerror or error}") from None

    def _receive(self) -> dict[str, Any]:
        try:
            return self._channel.receive()
        except EOFError:
            raise Failed("the predecessor ended before it had handed over") from None
        except (OSError, ValueError) as error:
            raise Failed(f"messages with the predecessor failed: {error}") from None


def find_predecessor(environment: Mapping[str, str]) -> Predecessor | None:
    """The gateway that has started this one to hand over; None if there is none. Raises Failed."""
    text = environment.get(VARIABLE, "")
    if not text:
        return None
    if not (text.isascii() and text.isdigit() and len(text) < 10 and _is_socket(int(text))):
        log.warning("%s is %s, which is no socket of a predecessor: it is ignored; unset it",
                    VARIABLE, on_one_line(repr(text), 40))  # fmt: skip
        return None
    return Predecessor(int(text))


def _is_socket(descriptor: int) -> bool:
    try:
        sock = socket.socket(fileno=descriptor)
    except OSError:
        return False
    kind = sock.family, sock.type
    sock.detach()
    return kind == (socket.AF_UNIX, socket.SOCK_STREAM)


def _given(descriptor: int, name: str, by_systemd: bool) -> Given:
    sock = socket.socket(fileno=descriptor)
    sock.set_inheritable(False)
    return Given(sock, name, by_systemd)


def read_estate(fields: object) -> Estate:
    """The Estate in a message. A gateway of another version may leave fields out, or write them in
    another form: such fields stay empty."""
    found = Estate({}, {}, ())
    if not isinstance(fields, dict):
        return found
    with contextlib.suppress(ValueError, TypeError, AttributeError):
        modes = {str(name): str(mode) for name, mode in fields.get("modes", {}).items()}
        found = found._replace(modes=modes)
    with contextlib.suppress(ValueError, TypeError, AttributeError):
        ports = {int(port): str(name) for port, name in fields.get("ports", {}).items()}
        found = found._replace(ports=ports)
    with contextlib.suppress(ValueError, TypeError, AttributeError):
        proofs = tuple((str(a), str(b), str(c)) for a, b, c in fields.get("proofs", ()))
        found = found._replace(proofs=proofs)
    with contextlib.suppress(ValueError, TypeError):
        found = found._replace(sessions=int(fields.get("sessions", 0)))
    return found
