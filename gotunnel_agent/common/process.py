"""What concerns a whole process: signals, a pool of threads, the log, standard output, CPUs.

gotunnel.py needs none of this: it can be used in any process, and changes nothing of it.
"""

import contextlib
import io
import logging
import os
import queue
import select
import signal
import socket
import sys
import threading
from collections.abc import Callable, Iterable
from time import monotonic, sleep
from typing import Any

from gotunnel import BUFFERS, LARGE_BUFFERS, NoThread, call_logged, spawn

from .free_memory import FreeMemory, use_one_arena
from .json_lines import JsonLines
from .standard_error import free_standard_error

try:
    import resource
except ImportError:  # not a Unix
    resource = None  # type: ignore[assignment]  # mypy knows no module that may be missing

log = logging.getLogger("gotunnel")

# sys.setswitchinterval(), seconds: how long a thread waits for the GIL before it wakes up and asks
# the holder to release it. With Python's 5 ms and 128 visitors nearly every such wake-up was
# useless, and 14 % fewer requests were served.
SWITCH_INTERVAL = 0.02
# A block of so many bytes is allocated and freed at the start. glibc then keeps up to twice as much
# freed memory in a heap (the dynamic M_TRIM_THRESHOLD of mallopt(3)). By the default of 128 KiB,
# freed payload goes back to the kernel at once, and the next one needs zeroed pages: 105 page
# faults for each MiB of a download in the gateway instead of 10.
HEAP_BLOCK = 1024 * 1024
SMALL_MACHINE = 2  # with so many CPUs or fewer, a process of ours is faster on one than on all
SHORTAGE_SILENCE = 60  # seconds between two warnings about a lack of threads
# A thread of a pool that was not needed for so many seconds ends. Its stack, and what the C library
# keeps for it, take some 100 kB: after a rush of 1000 requests that would be 100 MB for ever.
IDLE_TIME = 30
# So many threads of a pool stay: without any, a pool would do nothing while the system gives none.
KEPT_THREADS = 2
MEMORY_LOOK = 2  # seconds between two looks whether a rush is over
FORMATTER = logging.Formatter("%(asctime)s %(levelname)-7s %(message)s")
FORMATTERS = {"text": FORMATTER, "json": JsonLines()}
STDERR = 2  # file descriptor
HANG_UP = getattr(signal, "SIGHUP", None)  # Windows has none
# Windows sends no SIGTERM from outside, but SIGBREAK for Ctrl-Break.
STOPS = [signal.SIGTERM, signal.SIGINT, *filter(None, [getattr(signal, "SIGBREAK", None)])]


class Signals:
    """Lets the main thread wait for SIGTERM and SIGINT, with ``hang_up`` also for SIGHUP, and for
    the signals in ``also``. Main thread only.

    A signal handler can interrupt code that holds any lock, so it must take none. Instead the
    interpreter writes the signal's number to a socket (signal.set_wakeup_fd), and wait() reads it.
    The second SIGTERM or SIGINT ends the process at once, with status 1.
    """

    def __init__(self, hang_up: bool = False, also: Iterable[int] = ()):
        self._receive, self._send = socket.socketpair()
        self._send.setblocking(False)
        # What wait() returns; 0 is of after(). Other parts of the process may handle other signals,
        # whose numbers are written to the socket as well.
        others = {*also, HANG_UP} if hang_up and HANG_UP is not None else {*also}
        self._awaited = {0, *STOPS, *others}
        self._count = 0
        self._stop = 0  # the number of the SIGTERM or SIGINT that has come
        signal.set_wakeup_fd(self._send.fileno(), warn_on_full_buffer=False)
        for number in STOPS:
            signal.signal(number, self._on_signal)
        for other in others:
            signal.signal(other, lambda number, frame: None)  # wait() returns its number

    def fileno(self) -> int:
        """Of a socket that can be read when wait() would not wait: for a selector."""
        return self._receive.fileno()

    def _on_signal(self, number: int, frame: object) -> None:
        """The first signal stops the program in good order: wait() returns it. At the second one
        the process exits here at once, and running visits are cut."""
        self._count += 1
        self._stop = number
        if self._count == 2:
            _say_at_once("second signal: stopping at once, running visits are cut")
        if self._count > 1:
            os._exit(1)

    def wait(self) -> int:
        """Wait for a signal and return its number, or 0 if a function that after() runs has
        returned. SIGTERM and SIGINT overtake others."""
        while (number := self._receive.recv(1)[0]) not in self._awaited:
            pass
        # Behind hundreds of SIGHUPs the socket has no room for a SIGTERM's number.
        return self._stop or number

    def after(self, function: Callable[[], object]) -> None:
        """Call ``function``, log what it raises, and then wake wait(), which returns 0. Any
        thread."""
        try:
            call_logged(function)
        finally:
            self._send.send(b"\0")


class Stopped(OSError):
    """The pool of threads has been shut down and takes no more jobs."""


class Workers:
    """A bounded pool of threads, as many as are needed. It keeps working when the system refuses
    further threads, and logs what a job raises.

    Not a ThreadPoolExecutor: its threads never end, and the interpreter joins them at exit, so a
    job that hangs (getaddrinfo() cannot be interrupted) would keep a stopped process alive. These
    threads are daemons and end with the process.
    """

    def __init__(self, most: int, name: str):
        """At most ``most`` threads at a time, called ``name``_0, ``name``_1 and so on."""
        self._most, self._name = most, name
        # Pairs of function and arguments; None ends a thread.
        self._jobs: queue.SimpleQueue[tuple[Callable[..., object], tuple[Any, ...]] | None]
        self._jobs = queue.SimpleQueue()
        self._lock = threading.Lock()  # guards all below
        self._threads: set[threading.Thread] = set()
        self._started = 0  # threads so far
        self._spare = 0  # threads that wait for a job, minus jobs that wait for a thread
        # Which thread gets a job is up to the system, usually the one that has waited longest. So
        # no thread is idle for long while jobs come now and then, however many there are. What
        # shows that there are too many is the least number of spare ones in a period.
        self._least_spare = 0  # since the period began
        self._period_began = monotonic()
        self._surplus = 0  # threads that shall end, by the period before
        self._over = False  # shutdown() was called
        self._said_at: float = -SHORTAGE_SILENCE  # monotonic, of the last warning

    @property
    def crowded(self) -> bool:
        """Whether jobs wait for a thread. Read without the lock, so it may be a moment old."""
        return self._spare < 0

    @property
    def waiting(self) -> int:
        """How many jobs wait for a thread. Read without the lock, too."""
        return max(0, -self._spare)

    def prepare(self) -> None:
        """Start the first thread now, so that a pool that is needed does not begin without any.
        Raises NoThread."""
        with self._lock:
            if self._threads:
                return
            self._start_thread()

    def submit(self, function: Callable[..., object], *arguments: Any) -> None:
        """Have a thread of the pool call ``function(*arguments)``. Any thread.

        Raises Stopped after shutdown(): the caller must then close what the job was to take over.
        """
        with self._lock:
            if self._over:
                raise Stopped("the pool of threads has been shut down")
            self._jobs.put((function, arguments))
            self._spare -= 1
            if self._spare < self._least_spare:
                self._least_spare = self._spare
            if self._spare >= 0 or len(self._threads) == self._most:
                return
            try:
                return self._start_thread()
            except NoThread as error:  # the job waits for a thread that the pool has, or gets later
                if monotonic() - self._said_at < SHORTAGE_SILENCE:
                    return
                self._said_at, shortage, count = monotonic(), error, len(self._threads)
        log.warning("%s: new jobs wait for the %d threads of the pool: %s", self._name, count,
                    shortage)  # fmt: skip

    def shutdown(self, timeout: float) -> bool:
        """Take no more jobs, and wait at most ``timeout`` seconds for those that were submitted.
        Returns whether all of them are done."""
        with self._lock:
            self._over = True
            threads = list(self._threads)
        for _ in threads:
            self._jobs.put(None)
        deadline = monotonic() + timeout
        for thread in threads:
            thread.join(max(0, deadline - monotonic()))
        return not any(thread.is_alive() for thread in threads)

    def _start_thread(self) -> None:
        """Start one more thread. Raises NoThread. Caller holds the lock."""
        self._threads.add(spawn(f"{self._name}_{self._started}", self._work))
        self._started += 1
        self._spare += 1

    def _work(self) -> None:
        while True:
            try:
                job = self._jobs.get(timeout=IDLE_TIME)
            except queue.Empty:
                if self._ends(done=0):
                    return
                continue
            if job is None:
                return
            function, arguments = job
            call_logged(function, *arguments)
            # Otherwise these names would keep a visitor's connection alive until the next job,
            # which may take hours to come.
            del job, function, arguments
            if self._ends(done=1):
                return

    def _ends(self, done: int) -> bool:
        """A thread is spare again, after so many jobs. Returns whether it shall end."""
        with self._lock:
            self._spare += done
            now = monotonic()
            if now - self._period_began >= IDLE_TIME:
                self._surplus = min(self._least_spare, len(self._threads) - KEPT_THREADS)
                self._period_began, self._least_spare = now, self._spare
            if self._surplus <= 0 or self._spare <= 0:
                return False
            self._surplus -= 1
            self._spare -= 1
            self._least_spare -= 1
            self._threads.discard(threading.current_thread())
            return True


def _say_at_once(text: str) -> None:
    """Write a line to standard error from a signal handler: not through the log, whose locks the
    interrupted code may hold, and only if the write cannot block."""
    if sys.stderr is None:  # descriptor 2 may then be some other file
        return
    record = logging.LogRecord(log.name, logging.WARNING, __file__, 0, text, None, None)
    with contextlib.suppress(OSError, ValueError):  # its reader is gone
        if select.select([], [STDERR], [], 0)[1]:
            handler = next(iter(logging.getLogger().handlers), None)
            formatter = (handler and handler.formatter) or FORMATTER
            os.write(STDERR, formatter.format(record).encode() + b"\n")


# Rate limit of the log: each log statement in our source may write LOG_LINES lines in LOG_PERIOD
# seconds.
LOG_PERIOD = 10
LOG_LINES = 100


class LogLimit(logging.Filter):
    """Drops the lines of a log statement that runs too often: peers and visitors cause most lines,
    and must not be able to fill a disk. Its next line says how many were dropped."""

    def __init__(self) -> None:
        super().__init__()
        # (file, line) of a log statement: (monotonic start of its period, lines in it).
        self._kinds: dict[tuple[str, int], tuple[float, int]] = {}
        self._lock = threading.Lock()  # guards _kinds: handlers call filters without their own lock

    def filter(self, record: logging.LogRecord) -> bool:
        place, now = (record.pathname, record.lineno), monotonic()
        with self._lock:
            began, count = self._kinds.get(place, (now, 0))
            if now - began >= LOG_PERIOD:
                if count > LOG_LINES:
                    record.msg = f"{record.msg} ({count - LOG_LINES} more like it were dropped)"
                began, count = now, 0
            self._kinds[place] = (began, count + 1)
        return count < LOG_LINES


def set_up_process(log_level: str, log_format: str = "text") -> None:
    """Log lines of ``log_level`` (a name) and above to standard error, as ``log_format`` (a key of
    FORMATTERS) says, without making a thread wait for its reader; set the switch interval; have
    one heap, and keep freed memory for the next payload; raise the limit of open files to what is
    allowed."""
    use_one_arena()
    formatter = FORMATTERS[log_format]
    free_standard_error(formatter)
    handler = logging.StreamHandler(sys.stderr)
    handler.addFilter(LogLimit())
    handler.setFormatter(formatter)
    logging.basicConfig(handlers=[handler], level=log_level.upper())
    sys.setswitchinterval(SWITCH_INTERVAL)
    bytearray(HEAP_BLOCK)
    logging.raiseExceptions = False  # no traceback when the terminal has been closed
    if resource is not None:
        # Each connection takes a descriptor, and the usual 1024 are soon used up.
        _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
        with contextlib.suppress(ValueError, OSError):  # some systems refuse the limit they report
            resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


def free_buffers() -> None:
    """Free the unused receive buffers of this process. Any thread."""
    for pool in (BUFFERS, LARGE_BUFFERS):
        pool.clear()


def watch_memory() -> None:
    """Have a thread "memory" give memory back after a rush, as long as the process lives."""
    with contextlib.suppress(NoThread):  # then the memory of a rush stays with the process
        spawn("memory", _watch_memory, FreeMemory(free=free_buffers))


def _watch_memory(memory: FreeMemory) -> None:
    while True:
        sleep(MEMORY_LOOK)
        memory.look()


def print_answer(program: str, command: Callable[[], int]) -> int:
    """Call ``command()``, which prints an answer and returns the exit status. Returns that status,
    or 1 if the answer cannot be printed; an error line in the name of ``program`` says so."""
    if sys.stdout is None:
        print(f"{program}: there is no standard output to answer on", file=sys.stderr)
        return 1
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # file names may be no valid text
    try:
        status = command()
        sys.stdout.flush()
        return status
    except OSError as error:
        if error.filename is not None:
            raise  # an error of some file, not of standard output: the command must handle it
        # Python flushes standard output again at exit; then it must not fail a second time.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if isinstance(error, BrokenPipeError):
            return 0  # the reader, such as head, wants no more
        why = error.strerror or error
        print(f"{program}: the answer cannot be written: {why}", file=sys.stderr)
        return 1


def stay_on_one_cpu(choose: Callable[[set[int]], int]) -> None:
    """Keep all our threads on one CPU of a small machine; ``choose(cpus)`` says which.

    The GIL lets one thread run at a time anyway. On two CPUs each hand-over of the GIL also wakes
    the other CPU, which on a virtual machine can cost more than the work handed over: with 32
    visitors a request took 1.5 times the CPU time on two, and a third fewer were served
    (``tools/bench.py --row cpu``). On a larger machine TLS, which releases the GIL, can use the
    other CPUs. A Python without a GIL keeps all CPUs.

    On its one CPU, a thread that is woken would preempt the thread that woke it, find the GIL taken
    and sleep again: two switches for nothing. With SCHED_BATCH it runs once the other one waits.
    """
    has_gil = getattr(sys, "_is_gil_enabled", lambda: True)()  # since Python 3.13
    if has_gil and hasattr(os, "sched_setaffinity"):
        cpus = os.sched_getaffinity(0)
        if len(cpus) <= SMALL_MACHINE:
            os.sched_setaffinity(0, {choose(cpus)})
            with contextlib.suppress(OSError):  # a sandbox forbids it: slower, no more
                os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))
