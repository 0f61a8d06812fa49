"""What the two programs need of the process that they are: signals, workers, logging, an answer
on standard output, CPUs.

The wire does not need it, and sets nothing of the process by itself (see gotunnel.py).
"""

import contextlib
import logging
import os
import queue
import select
import signal
import socket
import sys
import threading
from collections.abc import Callable
from time import monotonic

from gotunnel import call_logged

from .standard_error import free_standard_error

try:
    import resource
except ImportError:  # not a Unix
    resource = None

log = logging.getLogger("gotunnel")

# Seconds that a thread waits for its turn before it asks for it. It wakes up to ask; with
# 128 visitors and Python's 5 ms, for nothing, and a seventh fewer requests were served.
SWITCH_INTERVAL = 0.02
SMALL_MACHINE = 2  # CPUs, up to which a process of ours is faster on one than on all of them
SHORTAGE_SILENCE = 60  # seconds between two complaints about a lack of threads
FORMATTER = logging.Formatter("%(asctime)s %(levelname)-7s %(message)s")  # of the log's lines
STDERR = 2  # the descriptor
HANG_UP = getattr(signal, "SIGHUP", None)  # there is none on Windows


class Signals:
    """Turns SIGTERM and SIGINT into something to wait for, with ``hang_up`` also SIGHUP, which
    ends nothing. Main thread only.

    A handler could interrupt us while we hold any lock, so it must take none: the interpreter
    writes a byte to a socket, which works wherever Python does. The second signal ends the
    process at once, with status 1.
    """

    def __init__(self, hang_up=False):
        self._receive, self._send = socket.socketpair()
        self._send.setblocking(False)
        self._count = 0
        signal.set_wakeup_fd(self._send.fileno(), warn_on_full_buffer=False)
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._on_signal)
        if hang_up and HANG_UP is not None:
            signal.signal(HANG_UP, lambda number, frame: None)  # wait() hears of it

    def _on_signal(self, number, frame):
        self._count += 1
        if self._count == 2:
            _say_at_once("second signal: stopping at once, running visits are cut")
        if self._count > 1:
            os._exit(1)

    def wait(self) -> int:
        """Wait for a signal and return its number, or 0 if what after() runs has ended."""
        return self._receive.recv(1)[0]

    def after(self, function):
        """Call ``function``, whose exceptions nobody expects: they are logged. Its end counts as a
        signal. Any thread."""
        try:
            call_logged(function)
        finally:
            self._send.send(b"\0")


class Stopped(OSError):
    """A pool of threads has been shut down, and takes no more jobs."""


class Workers:
    """A bounded pool of threads that outlives a shortage of them, and logs what a job raises.

    It is no ThreadPoolExecutor, whose threads the interpreter joins at its exit: a job that hangs
    (getaddrinfo() cannot be interrupted) would keep a process alive that has stopped. These are
    daemons, and end with the process.
    """

    def __init__(self, most: int, name: str):
        """The threads are ``name``_0 to ``name``_(``most`` - 1), each started when it is needed."""
        self._most, self._name = most, name
        self._jobs = queue.SimpleQueue()  # of (function, arguments); None ends a thread
        self._lock = threading.Lock()  # guards all below
        self._threads = []
        self._spare = 0  # threads that wait for a job, less the jobs that wait for a thread
        self._over = False
        self._said_at = -SHORTAGE_SILENCE

    @property
    def crowded(self) -> bool:
        """Whether there are more jobs than threads may take. A look, without the lock."""
        return self._spare < 0

    def submit(self, function: Callable, *arguments) -> None:
        """Have a thread call ``function``. Any thread. Raises Stopped after shutdown(): the caller
        still has what the job was to take over, and closes it."""
        with self._lock:
            if self._over:
                raise Stopped("the pool of threads has been shut down")
            self._jobs.put((function, arguments))
            self._spare -= 1
            if self._spare >= 0 or len(self._threads) == self._most:
                return
            shortage = self._start_thread()
        if shortage:
            log.warning("no further thread to be had (limit of the system): %s; new work waits for "
                        "the threads there are", shortage)  # fmt: skip

    def shutdown(self, timeout: float) -> bool:
        """Take no more jobs. Wait, ``timeout`` seconds at most, until those that were taken are
        done; whether they are."""
        with self._lock:
            self._over = True
            threads = list(self._threads)
        for _ in threads:
            self._jobs.put(None)
        deadline = monotonic() + timeout
        for thread in threads:
            thread.join(max(0, deadline - monotonic()))
        return not any(thread.is_alive() for thread in threads)

    def _start_thread(self):
        """None if a thread was started; what the log should say, if the system has none for us.
        The job is queued all the same, and done by a thread that the pool has, or gets later.
        Caller holds the lock."""
        name = f"{self._name}_{len(self._threads)}"
        thread = threading.Thread(target=self._work, name=name, daemon=True)
        try:
            thread.start()
        except RuntimeError as error:
            if monotonic() - self._said_at < SHORTAGE_SILENCE:
                return None
            self._said_at = monotonic()
            return error
        self._threads.append(thread)
        self._spare += 1
        return None

    def _work(self):
        while (job := self._jobs.get()) is not None:
            function, arguments = job
            call_logged(function, *arguments)
            # They may hold a visitor's connection, and the next job may take hours to come.
            del job, function, arguments
            with self._lock:
                self._spare += 1


def _say_at_once(text):
    """Put a line on standard error in a signal's handler: past the log and its locks, and only if
    there is room for it, as the process is to end now."""
    if sys.stderr is None:  # else descriptor 2 may be another file
        return
    record = logging.LogRecord(log.name, logging.WARNING, __file__, 0, text, None, None)
    with contextlib.suppress(OSError, ValueError):  # nobody is left to read it
        if select.select([], [STDERR], [], 0)[1]:
            os.write(STDERR, FORMATTER.format(record).encode() + b"\n")


LOG_PERIOD = 10  # seconds ...
LOG_LINES = 100  # ... in which one place in our source may log so often


class LogLimit(logging.Filter):
    """Drops lines that come too often: peers and visitors cause most of them, and must not be
    able to fill a disk. The next one of its kind says how many were dropped."""

    def __init__(self):
        super().__init__()
        self._kinds = {}  # place in the source: (monotonic beginning of its period, lines in it)
        self._lock = threading.Lock()  # guards _kinds: a handler asks its filters without its lock

    def filter(self, record):
        place, now = (record.pathname, record.lineno), monotonic()
        with self._lock:
            began, count = self._kinds.get(place, (now, 0))
            if now - began >= LOG_PERIOD:
                if count > LOG_LINES:
                    record.msg = f"{record.msg} ({count - LOG_LINES} more like it were dropped)"
                began, count = now, 0
            self._kinds[place] = (began, count + 1)
        return count < LOG_LINES


def set_up_process(log_level):
    """Log to standard error, from ``log_level`` (a name) on, so that no thread waits for its
    reader, and take what the system offers."""
    free_standard_error(FORMATTER)
    handler = logging.StreamHandler(sys.stderr)
    handler.addFilter(LogLimit())
    handler.setFormatter(FORMATTER)
    logging.basicConfig(handlers=[handler], level=log_level.upper())
    sys.setswitchinterval(SWITCH_INTERVAL)
    logging.raiseExceptions = False  # a terminal that was closed is no reason for a traceback
    if resource is not None:
        # Each connection is a descriptor, and the usual 1024 are soon used up.
        _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
        with contextlib.suppress(ValueError, OSError):  # some systems promise more than they give
            resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


def print_answer(program: str, command) -> int:
    """Call ``command()``, which prints an answer and returns the exit status; return that, or 1 if
    nobody can get the answer, which is said in the name of ``program``."""
    if sys.stdout is None:
        print(f"{program}: there is no standard output to answer on", file=sys.stderr)
        return 1
    sys.stdout.reconfigure(errors="backslashreplace")  # a file's name may be no text at all
    try:
        status = command()
        sys.stdout.flush()
        return status
    except OSError as error:
        if error.filename is not None:
            raise  # of a file, whose errors are the command's to tell
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python tries again at exit
        if isinstance(error, BrokenPipeError):
            return 0  # the reader, such as head, has seen enough
        why = error.strerror or error
        print(f"{program}: the answer cannot be written: {why}", file=sys.stderr)
        return 1


def stay_on_one_cpu(choose):
    """Keep all our threads on one CPU of a small machine; ``choose(cpus)`` says which.

    Python's threads take turns anyway. On two CPUs each hand-over also wakes the other CPU, which
    on a virtual machine can cost more than the work that is handed over: with 32 visitors a
    request took half as much CPU time again on two, and a third fewer were served
    (``tools/bench.py --row cpu``). On a larger machine TLS, which needs no turn, can use the rest.
    A Python without a GIL has no turns: its threads keep all CPUs.
    """
    has_gil = getattr(sys, "_is_gil_enabled", lambda: True)()  # since Python 3.13
    if has_gil and hasattr(os, "sched_setaffinity"):
        cpus = os.sched_getaffinity(0)
        if len(cpus) <= SMALL_MACHINE:
            os.sched_setaffinity(0, {choose(cpus)})
