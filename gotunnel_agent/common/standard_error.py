"""A sys.stderr that never blocks the thread that writes to it.

A pipe that nobody reads is full after 64 KiB, a terminal can be stopped, a disk can hang. Each of
these would block the first thread that logs a line, and then, through the log's lock, all others.
So a thread of its own writes, and the others only queue: log lines, tracebacks, warnings, whatever
Python prints to sys.stderr. Lines that do not fit into the queue are dropped and counted.
"""

import atexit
import collections
import contextlib
import io
import logging
import select
import sys
import threading
from typing import BinaryIO, TextIO

from .sole_writer import sole_writer

MOST_WAITING = 1 << 20  # characters in the queue: several thousand lines, tracebacks among them
PLAIN = logging.Formatter()
LAST_LINES = 1  # seconds to write the last lines when the process ends; there may be no reader


class StandardError(io.TextIOBase):
    """Takes the place of sys.stderr. write() never blocks, and the order of texts is kept."""

    # Declared here as __init__() sets both: in TextIOBase they are read-only.
    encoding = "utf-8"
    errors: str | None = None

    def __init__(self, stream: TextIO, formatter: logging.Formatter):
        """``stream`` is the sys.stderr to replace, a text file on a descriptor. ``formatter``
        formats our own line about dropped lines like those of the log."""
        self.encoding, self.errors = stream.encoding, stream.errors
        self._stream = stream
        self._formatter = formatter
        # Without Python's buffer: at exit the interpreter takes the buffer's lock, which our thread
        # may hold while it is blocked in a write.
        self._raw: io.RawIOBase | BinaryIO = getattr(stream.buffer, "raw", stream.buffer)
        self._changed = threading.Condition()  # guards all below; notified when any of it changes
        self._waiting: collections.deque[str] = collections.deque()  # texts, in their order
        self._size = 0  # characters in them, and in the text that is being written
        self._writing = False  # the thread is writing texts that it took
        self._full = False  # a text was dropped, and the queue has not been empty since
        self._dropped = 0  # lines that were dropped and not reported yet
        self._why = ""  # why the last of them was dropped
        self.is_shared = False  # other processes of ours write to the same pipe
        threading.Thread(target=self._write_all, name="standard error", daemon=True).start()

    def fileno(self) -> int:
        return self._stream.fileno()

    def isatty(self) -> bool:
        return self._stream.isatty()

    def writable(self) -> bool:
        return True

    def write(self, text: str) -> int:
        """Queue a text, or drop it if the queue is full. After a drop, all texts are dropped until
        the queue is empty, so that the log has one gap and not many."""
        with self._changed:
            if self._full or self._size + len(text) > MOST_WAITING:
                self._full = True
                self._dropped += text.count("\n")
                self._why = "it was not read"
            else:
                self._put(text)
        return len(text)

    def _put(self, text: str) -> None:
        """Caller holds the lock."""
        self._waiting.append(text)
        self._size += len(text)
        self._changed.notify_all()

    def drain(self, timeout: float) -> None:
        """Wait until all is written, at most ``timeout`` seconds."""
        with self._changed:
            self._changed.wait_for(lambda: not (self._waiting or self._writing), timeout)

    def _write_all(self) -> None:
        """Thread "standard error": write what is queued, as long as the process lives."""
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._waiting)
                text = "".join(self._waiting)
                self._waiting.clear()
                self._writing = True
            problem = self._write(text.encode(self.encoding, "backslashreplace"))
            with self._changed:
                self._size -= len(text)
                self._writing = False
                if problem:
                    self._dropped += text.count("\n")
                    self._why = problem
                if not self._waiting:
                    self._full = False
                    if self._dropped and not problem:
                        self._put(self._note())
                self._changed.notify_all()

    def _note(self) -> str:
        """The log line that stands in the place of the dropped lines: how many, and why. The usual
        reason is that no program read the pipe or terminal. Caller holds the lock."""
        text = f"{self._dropped} lines for standard error were dropped: {self._why}"
        self._dropped = 0
        record = logging.LogRecord("gotunnel", logging.WARNING, __file__, 0, text, None, None)
        return self._formatter.format(record) + "\n"

    def _write(self, data: bytes) -> str:
        """Write bytes, however long that takes. Returns why some of them are lost; "" if none."""
        try:
            if not self.is_shared:
                self._write_bytes(data)
            else:
                with sole_writer(self._raw.fileno()):
                    self._write_bytes(data)
        except OSError as error:  # the disk is full, or the pipe has no reader any more
            return error.strerror or str(error)
        except ValueError:  # code in this process has closed the file
            return "it is closed"
        return ""

    def _write_bytes(self, data: bytes) -> None:
        left = memoryview(data)
        while left:
            written = self._raw.write(left)
            if written is None:  # would block: another process made the file non-blocking
                select.select([], [self._raw], [])
            else:
                left = left[written:]


def share_standard_error() -> None:
    """Several processes write to it from now on: none writes into another one's line."""
    if isinstance(sys.stderr, StandardError):
        sys.stderr.is_shared = True


def free_standard_error(formatter: logging.Formatter = PLAIN) -> None:
    """Replace sys.stderr by a StandardError for as long as the process lives. At its end, the last
    lines have LAST_LINES seconds to be written. ``formatter``: see StandardError."""
    if sys.stderr is None or isinstance(sys.stderr, StandardError):
        return
    # It stays as it is if it is no file on a descriptor, or the system has no thread for us.
    with contextlib.suppress(AttributeError, RuntimeError):
        sys.stderr = StandardError(sys.stderr, formatter)
        atexit.register(sys.stderr.drain, LAST_LINES)
