"""A log file: many threads queue lines, one thread writes them, and no other waits for the disk.

A disk can hang or be full, a pipe may have no reader. So the queue is bounded. A line that does not
fit is dropped and counted: it costs a line, never a visit.

The file is opened anew when reopen() is called (SIGHUP), and when the path leads to another file or
to none (logrotate has renamed it). With logrotate's `copytruncate` it stays open: it is written in
append mode.
"""

import contextlib
import errno
import logging
import os
import select
import sys
import threading
from collections.abc import Sequence
from time import monotonic

from gotunnel import spawn
from gotunnel_agent.common.sole_writer import sole_writer

log = logging.getLogger("gotunnel.log_file")

STANDARD_OUTPUT = "-"  # as a path
STDOUT = 1  # file descriptor
# Characters in the queue: some 20,000 lines, a few seconds of the busiest gateway.
MOST_WAITING = 4 << 20
# Seconds that the thread gathers lines before it writes them. A wake-up for each line would cost a
# request two thread switches.
GATHER = 0.2
SILENCE = 60  # seconds between two warnings about dropped lines
MODE = 0o640  # of a new file: addresses and paths of visitors are not for everybody


class LogFileError(Exception):
    """The file cannot be opened. One line for the operator."""


class LogFile:
    """The file, its queue and its thread: call start(), then stop(). Any thread."""

    def __init__(self, setting: str, path: str, shared: bool = False):
        """``path``: STANDARD_OUTPUT, or of a file that is made if it is missing. ``shared``: other
        processes of ours write to it, too. Raises LogFileError, which names ``setting``, the
        variable that names the path."""
        self._shared = shared
        self.dropped = 0  # lines, since the start
        self._path = path
        self._setting = setting
        self._lock = threading.Lock()  # guards all below
        self._changed = threading.Condition(self._lock)  # notified when there is work
        self._waiting: list[str] = []
        self._size = 0  # characters in them, and in those that are being written
        self._reopen = False  # reopen() was called
        self._stopping = threading.Event()  # set under the lock
        self._said_at: float = -SILENCE  # monotonic, of the last warning
        self._said = 0  # dropped lines that the log has reported
        # Used by the writing thread only, once it runs.
        self._file: int | None = None  # descriptor; None: opening it failed
        self._torn = False  # only a part of the last line was written
        # Started without one (>&-): descriptor 1 is some other file or socket by now, such as the
        # one that signals come by.
        if path == STANDARD_OUTPUT and sys.stdout is None:
            raise LogFileError(
                f"{setting} {path}: there is no standard output; open it, or name a file"
            )
        try:
            self._file = self._open(os.O_NONBLOCK)
        except OSError as error:
            raise LogFileError(
                f"{setting} {path}: cannot be opened ({error.strerror}); name a file in a folder "
                "that exists and can be written"
            ) from None
        self._thread: threading.Thread | None = None

    @property
    def waiting(self) -> int:
        """Characters in the queue."""
        return self._size

    def start(self) -> None:
        """Begin to write. Raises NoThread."""
        self._thread = spawn("access log", self._run)

    def write(self, line: str) -> None:
        """Queue a line, which has no end yet. Waits for nothing."""
        self.write_all([line])

    def write_all(self, lines: Sequence[str]) -> None:
        """As write(), for each of the lines: a batch costs one lock."""
        size = sum(map(len, lines)) + len(lines)
        with self._lock:  # not the Condition, whose methods are Python's
            fits = self._size + size <= MOST_WAITING
            if not fits:
                lines, size = self._fitting(lines)
            if lines and not self._waiting:
                self._changed.notify()
            self._waiting += lines
            self._size += size
        if not fits:
            self._report("its file cannot be written at the moment")

    def _fitting(self, lines: Sequence[str]) -> tuple[list[str], int]:
        """The lines that the queue has room for, and their size; the others are dropped. Caller
        holds the lock."""
        taken, size = [], 0
        for line in lines:
            if self._size + size + len(line) < MOST_WAITING:
                taken.append(line)
                size += len(line) + 1
            else:
                self.dropped += 1
        return taken, size

    def reopen(self) -> None:
        """Open the file anew, for the lines from now on. Waits for nothing."""
        with self._changed:
            self._reopen = True
            self._changed.notify()

    def stop(self, timeout: float) -> None:
        """Write what waits, in ``timeout`` seconds at most, and close the file."""
        with self._changed:
            self._stopping.set()
            self._changed.notify()
        if self._thread is None:
            return self._close()
        self._thread.join(timeout)
        if self._thread.is_alive():
            log.warning("%s: its last lines are lost: its file cannot be written", self._setting)

    def _report(self, why: str) -> None:
        """Log how many lines were dropped since the last warning, every SILENCE seconds at most."""
        now = monotonic()
        with self._changed:
            count = self.dropped - self._said
            if not count or now - self._said_at < SILENCE:
                return
            self._said, self._said_at = self.dropped, now
            total = self.dropped
        log.warning("%s: %d lines were dropped: %s (%d since the start); visits go on",
                    self._setting, count, why, total)  # fmt: skip

    # The thread

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(
                    lambda: self._waiting or self._reopen or self._stopping.is_set()
                )
            self._stopping.wait(GATHER)
            with self._changed:
                lines, self._waiting = self._waiting, []
                reopen, self._reopen = self._reopen, False
                last = self._stopping.is_set()
            if lines or reopen:
                self._write_out(lines, reopen)
            if last:
                return self._close()

    def _write_out(self, lines: list[str], reopen: bool) -> None:
        data = "".join([f"{line}\n" for line in lines]).encode("ascii", "backslashreplace")
        view = memoryview(data)
        why, written = "", 0
        try:
            if reopen or self._has_moved():
                self._close()
            file = self._file = self._open() if self._file is None else self._file
            if file is None:
                raise OSError("it cannot be opened")
            with sole_writer(file) if self._shared else contextlib.nullcontext():
                if self._torn:
                    self._torn = not _put(file, b"\n")
                while written < len(data):
                    written += _put(file, view[written:])
        except OSError as error:  # the disk is full, the pipe has no reader, the folder is gone
            why = error.strerror or str(error)
        with self._changed:
            self._size -= sum(map(len, lines)) + len(lines)
            if why:
                self.dropped += data.count(b"\n", written)
                self._torn = written > 0 and data[written - 1 : written] != b"\n"
        self._report(why or "the queue was full")

    def _has_moved(self) -> bool:
        """Whether the path leads to another file than the one that is open, or to none."""
        if self._path == STANDARD_OUTPUT or self._file is None:
            return False
        try:
            return not os.path.samestat(os.stat(self._path), os.fstat(self._file))
        except FileNotFoundError:
            return True

    def _open(self, flags: int = 0) -> int | None:
        """``flags`` O_NONBLOCK: do not wait for a pipe's reader; without one, None is returned."""
        if self._path == STANDARD_OUTPUT:
            return STDOUT
        flags |= os.O_WRONLY | os.O_APPEND | os.O_CREAT | getattr(os, "O_CLOEXEC", 0)
        try:
            file = os.open(self._path, flags, MODE)
        except OSError as error:
            if error.errno == errno.ENXIO:  # such a pipe: the thread will wait
                return None
            raise
        os.set_blocking(file, True)
        return file

    def _close(self) -> None:
        file, self._file = self._file, None
        if file is not None and file != STDOUT:
            with contextlib.suppress(OSError):  # a late write error, which nothing can mend now
                os.close(file)


def _put(file: int, data: bytes | memoryview) -> int:
    """Write what fits, at least a byte; returns how many bytes. Raises OSError."""
    while True:
        try:
            return os.write(file, data)
        except BlockingIOError:  # another process made the file non-blocking
            select.select([], [file], [])
