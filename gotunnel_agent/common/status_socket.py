"""The status socket: a unix socket on which a running program reports its state.

The client (the status command) connects and sends ASK. The program sends one JSON object and a
newline, and closes. The object has "format", "program", "version", "pid", "started_at" and
"uptime_seconds"; all other keys are the program's own.

The socket's file has mode 0600, so only the program's own user and root can ask. One thread answers
one client at a time, and gives each PEER_TIMEOUT.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import selectors
import socket
import stat
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from time import monotonic, sleep, time
from typing import Any

from gotunnel import NoThread, Waker, __version__, call_logged, spawn

from .one_line import on_one_line

log = logging.getLogger("gotunnel.status_socket")

FORMAT = 1  # of the answer; raised when an older client could misread it
ASK = b"status 1\n"
SERVING = "serving"  # the value of "state", a key of both programs, if all is well
OFF = "off"  # the value of STATUS_SOCKET and status_socket for no socket
NAME = "status.sock"
MAX_PATH = 107 if sys.platform == "linux" else 103  # bytes: sun_path without its terminating zero
BACKLOG = 8  # clients that the kernel queues: a health check and an operator or two
# Seconds for one client to send its line and to read the answer. Short, as both fit into the
# kernel's buffers, and a client that hangs keeps the others waiting.
PEER_TIMEOUT = 2
ASK_TIMEOUT = 5  # seconds that a client waits; other clients may be ahead of it
QUEUE_LOOK = 0.05  # seconds between two tries of a client, while the socket's queue is full
MOST_ANSWER = 4 << 20  # bytes that a client reads; an answer is far smaller
# Seconds between two tries to get the socket's place, while another process has it: a gateway that
# hands over to its successor drains for a while.
RETRY = 1
NO_DESCRIPTOR = 0.2  # seconds until the next try, if the process has no descriptor left


class NoAnswer(Exception):
    """There is no answer from a program; the text is one line for the operator."""


class PlaceTaken(OSError):
    """Another process's socket, or another file, is at the path; the text says which."""


def runtime_places(program: str) -> list[str]:
    """Where a program's socket may be if no setting names one, the preferred path first: in
    /run/PROGRAM (systemd's RuntimeDirectory), and in the user's own runtime folder."""
    if not hasattr(socket, "AF_UNIX") or not hasattr(os, "getuid"):
        return []
    places = [f"/run/{program}/{NAME}"]
    if os.getuid() != 0:
        places.append(f"/run/user/{os.getuid()}/{program}/{NAME}")
    return places


def usable(places: Iterable[str]) -> str | None:
    """The first place that a socket can be put into; None if there is none. A missing folder of
    the program is made, for its user alone."""
    for place in places:
        folder = os.path.dirname(place)
        with contextlib.suppress(OSError):
            if os.access(os.path.dirname(folder), os.W_OK):
                os.mkdir(folder, 0o700)
        if os.access(folder, os.W_OK | os.X_OK):
            return place
    return None


def why_not(path: str) -> str | None:
    """Why a path cannot be a socket's, in a few words; None if it can."""
    if not hasattr(socket, "AF_UNIX"):
        return "Python offers no unix sockets on this system"
    size = len(os.fsencode(address(path)))
    if size > MAX_PATH:
        return f"the path has {size} bytes, a unix socket's may have {MAX_PATH}"
    return None


def address(path: str) -> str:
    """``path``, or if a unix socket's address has no room for it, the path from the working folder,
    if that is shorter."""
    if len(os.fsencode(path)) <= MAX_PATH:
        return path
    try:
        return min(path, os.path.relpath(path), key=lambda text: len(os.fsencode(text)))
    except (OSError, ValueError):  # no working folder, or it is on another drive
        return path


class StatusSocket:
    """Answers at ``path`` from start() to close(). Its thread is called "status"."""

    def __init__(
        self,
        path: str,
        program: str,
        tell: Callable[[], Mapping[str, Any]],
        setting: str,
        given: socket.socket | None = None,
    ):
        """``tell()`` gives the program's own part of the answer. Its thread calls it, so it must
        not block for long, and its size must have a bound. ``setting`` names the path. ``given``:
        a socket that listens at ``path`` already, and whose file is another process's to
        remove."""
        self._given = given
        self.path, self._program, self._tell, self._setting = path, program, tell, setting
        self._began = monotonic()
        self._waker: Waker | None = None  # while the thread runs
        self._ended = False
        self._inode: tuple[int, int] | None = None  # of our socket's file
        self._told = ""  # the last problem that was logged

    def start(self) -> None:
        """Begin to answer. What prevents it is logged: a program serves without it as well."""
        problem = why_not(self.path)
        if problem:
            return self._warn(problem)
        self._waker = waker = Waker()
        try:
            spawn("status", self._run, waker)
        except NoThread as error:
            waker.close()
            self._warn(str(error))

    def _warn(self, problem: str, end: str = "") -> None:
        log.warning("%s %s: %s; the status command gets no answer from this process%s",
                    self._setting, self.path, problem, end)  # fmt: skip

    def close(self) -> None:
        """Answer no more, and remove the file if it is still ours. Any thread, several times."""
        self._ended = True
        if self._waker is not None:
            self._waker.wake()
        if self._inode is not None:
            with contextlib.suppress(OSError):
                if _inode(self.path) == self._inode:
                    os.unlink(self.path)
            self._inode = None

    def _run(self, waker: Waker) -> None:
        listening = None
        with selectors.DefaultSelector() as selector:
            selector.register(waker, selectors.EVENT_READ)
            while not self._ended:
                if listening is None:
                    listening = self._open()
                    if listening is None:
                        selector.select(RETRY)
                        continue
                    selector.register(listening, selectors.EVENT_READ)
                ready = [key.fileobj for key, _ in selector.select()]
                if listening in ready and not self._ended:
                    call_logged(self._answer, listening)
        if listening is not None:
            listening.close()
        waker.close()

    def _open(self) -> socket.socket | None:
        if self._given is not None:
            return self._given
        try:
            listening = listen(address(self.path))
            self._inode = _inode(self.path)
            log.debug("status socket %s: ready", self.path)
            if self._ended:  # close() may have run before the file was there
                self.close()
        except OSError as error:
            text = str(error) if isinstance(error, PlaceTaken) else error.strerror or str(error)
            if text != self._told:
                self._warn(text, f" until that changes, or {self._setting} names another path")
                self._told = text
            return None
        return listening

    def _answer(self, listening: socket.socket) -> None:
        try:
            peer, _ = listening.accept()
        except BlockingIOError:  # the peer is gone
            return
        except OSError:  # no descriptor is left: without a pause the loop would spin
            sleep(NO_DESCRIPTOR)
            return
        with peer:
            try:
                peer.settimeout(PEER_TIMEOUT)
                if peer.recv(len(ASK)) != ASK:
                    return  # a peer of another kind
                peer.settimeout(PEER_TIMEOUT)
                peer.sendall(self._text())  # its timeout counts for all bytes together
            except OSError as error:
                log.debug("status socket: a client got no answer: %s", error)

    def _text(self) -> bytes:
        uptime = monotonic() - self._began
        answer = {
            "format": FORMAT,
            "program": self._program,
            "version": __version__,
            "pid": os.getpid(),
            "started_at": int(time() - uptime),
            "uptime_seconds": int(uptime),
            **self._tell(),
        }
        return json.dumps(answer).encode() + b"\n"


def listen(path: str) -> socket.socket:
    """A listening socket at ``path``, with mode 0600. It replaces the socket of a process that is
    gone. Raises PlaceTaken if a living process has it, or it is no socket; OSError."""
    with contextlib.suppress(FileNotFoundError):
        if not stat.S_ISSOCK(os.lstat(path).st_mode):
            raise PlaceTaken("a file that is no socket has this path, and is not replaced")
        if _is_alive(path):
            raise PlaceTaken("another process answers there")
    # Bound under another name, then renamed: so the path always exists, and it never has a mode
    # that lets other users connect.
    new = f"{path}.{os.getpid()}"
    if len(os.fsencode(new)) > MAX_PATH:
        new = path
        with contextlib.suppress(FileNotFoundError):
            os.unlink(path)
    listening = socket.socket(socket.AF_UNIX)
    try:
        with contextlib.suppress(OSError):  # Linux: the file's mode from its first moment on
            os.fchmod(listening.fileno(), 0o600)
        with contextlib.suppress(FileNotFoundError):
            if new != path:
                os.unlink(new)
        listening.bind(new)
        os.chmod(new, 0o600)
        listening.listen(BACKLOG)
        listening.setblocking(False)
        if new != path:
            os.rename(new, path)
    except BaseException:
        listening.close()
        with contextlib.suppress(OSError):
            os.unlink(new)
        raise
    return listening


def _is_alive(path: str) -> bool:
    with socket.socket(socket.AF_UNIX) as probe:
        probe.settimeout(PEER_TIMEOUT)
        try:
            probe.connect(path)
        except ConnectionRefusedError:  # its process is gone
            return False
        except FileNotFoundError:
            return False
        except BlockingIOError:  # its queue is full
            pass
    return True


def _inode(path: str) -> tuple[int, int]:
    found = os.lstat(path)
    return found.st_dev, found.st_ino


def ask(places: Iterable[str], program: str) -> dict[str, Any]:
    """The answer of the running ``program``, at the first of ``places`` where one is. Raises
    NoAnswer."""
    return next(answers(places, program))


def answers(places: Iterable[str], program: str) -> Iterator[dict[str, Any]]:
    """The answers of each running ``program`` at ``places``. Raises NoAnswer if there is none."""
    places = list(places)
    problem = gone = ""
    found = False
    for path in places:
        try:
            answer = _ask(path, program)
        except FileNotFoundError:
            continue
        except ConnectionRefusedError:
            gone = gone or f"{path} was left by a process that has ended"
        except NoAnswer as error:
            problem = problem or str(error)
        except OSError as error:
            problem = problem or f"{path}: {_why_silent(error, program)}"
        else:
            found = True
            yield answer
    if not found:
        looked = gone or f"there is no socket {' or '.join(places) or 'of it here'}"
        raise NoAnswer(problem or f"not running here, or its status socket is elsewhere: {looked}")


def _why_silent(error: OSError, program: str) -> str:
    if isinstance(error, PermissionError):
        return f"permission denied; ask as the user that runs {program}, or as root"
    if isinstance(error, TimeoutError):
        return f"no answer in {ASK_TIMEOUT} s; {program} hangs, or is stopped"
    if isinstance(error, BlockingIOError):
        return f"others wait for answers, too, and in {ASK_TIMEOUT} s no place was free; ask again"
    return error.strerror or str(error)


def _ask(path: str, program: str) -> dict[str, Any]:
    problem = why_not(path)
    if problem:
        raise NoAnswer(f"{path}: {problem}")
    deadline = monotonic() + ASK_TIMEOUT
    data = bytearray()
    with socket.socket(socket.AF_UNIX) as peer:
        peer.settimeout(ASK_TIMEOUT)
        _connect(peer, path, deadline)
        try:
            peer.sendall(ASK)
            while len(data) <= MOST_ANSWER:
                peer.settimeout(max(deadline - monotonic(), 0.001))
                more = peer.recv(65536)
                if not more:
                    break
                data += more
        except (BrokenPipeError, ConnectionResetError):
            pass  # _read() reports what is missing
    return _read(bytes(data), path, program)


def _connect(peer: socket.socket, path: str, deadline: float) -> None:
    """Raises OSError: BlockingIOError if the queue of the socket was full all the time."""
    while True:
        try:
            return peer.connect(address(path))
        except BlockingIOError:  # connect() with a timeout does not wait for a place
            if monotonic() >= deadline:
                raise
            sleep(QUEUE_LOOK)


def _read(data: bytes, path: str, program: str) -> dict[str, Any]:
    """The object in an answer. Raises NoAnswer."""
    try:
        answer = json.loads(data)
    except (ValueError, RecursionError):
        answer = None
    if not isinstance(answer, dict) or "format" not in answer:
        raise NoAnswer(f"{path}: the answer is no status; does another program listen there, or "
                       f"has {program} just ended?")  # fmt: skip
    who, version = on_one_line(str(answer.get("program")), 40), answer.get("version")
    if answer["format"] != FORMAT:
        raise NoAnswer(f"{path}: the process there has version {on_one_line(str(version), 40)}, "
                       f"whose status version {__version__} cannot read; ask with the program "
                       "that is running, or restart it")  # fmt: skip
    if who != program:
        raise NoAnswer(f"{path}: {who} answers there, expected {program}")
    return answer
