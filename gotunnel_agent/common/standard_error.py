"""Standard error that makes no thread wait.

A pipe that nobody reads is full after 64 KiB, a terminal can be stopped, a disk can hang: each
would stop the first thread that says something, and, by the lock of the log, all others. So a
thread of its own writes, and the others only queue: log lines, tracebacks, warnings, all that
Python itself says on sys.stderr. Lines that find the queue full are dropped and counted.
"""

import atexit
import collections
import contextlib
import io
import logging
import select
import sys
import threading

MOST_WAITING = 1 << 20  # characters that wait for their reader: some thousand lines, and tracebacks
PLAIN = logging.Formatter()
LAST_LINES = 1  # seconds that the last lines have when the process ends: nobody may read them


class StandardError(io.TextIOBase):
    """Takes the place of sys.stderr. write() never waits; the order of what is written is kept."""

    def __init__(self, stream, formatter):
        """``stream`` is the sys.stderr that there was, a text file on a descriptor. ``formatter``
        makes our own lines look like the log's."""
        self._stream = stream
        self._formatter = formatter
        # Without Python's buffer, whose lock the interpreter needs at its end, also if our thread
        # holds it and waits.
        self._raw = getattr(stream.buffer, "raw", stream.buffer)
        self._changed = threading.Condition()  # guards what follows; notified at any change of it
        self._waiting = collections.deque()  # texts, in their order
        self._size = 0  # characters in them
        self._writing = False  # the thread has some that it took
        self._full = False  # a text was dropped, and the queue has not been empty since
        self._dropped = 0  # lines that the log was not told of
        self._why = ""  # ... the last of them
        threading.Thread(target=self._write_all, name="standard error", daemon=True).start()

    @property
    def encoding(self):
        return self._stream.encoding

    @property
    def errors(self):
        return self._stream.errors

    def fileno(self):
        return self._stream.fileno()

    def isatty(self):
        return self._stream.isatty()

    def writable(self):
        return True

    def write(self, text):
        """Queue a text; drop it if too many wait. Once one was dropped, so are all that come before
        the queue is empty: what is missing is in one place."""
        with self._changed:
            if self._full or self._size + len(text) > MOST_WAITING:
                self._full = True
                self._dropped += text.count("\n")
                self._why = "it was not read"
            else:
                self._put(text)
        return len(text)

    def _put(self, text):
        """Caller holds the lock."""
        self._waiting.append(text)
        self._size += len(text)
        self._changed.notify_all()

    def drain(self, timeout):
        """Wait until all is written, ``timeout`` seconds at most."""
        with self._changed:
            self._changed.wait_for(lambda: not (self._waiting or self._writing), timeout)

    def _write_all(self):
        """Thread: write what comes, as long as the process lives."""
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

    def _note(self):
        """A line that says what is missing here. Caller holds the lock."""
        text = f"{self._dropped} lines for standard error were dropped: {self._why}"
        self._dropped = 0
        record = logging.LogRecord("gotunnel", logging.WARNING, __file__, 0, text, None, None)
        return self._formatter.format(record) + "\n"

    def _write(self, data) -> str:
        """Write bytes, wait for their reader; why some of them are lost, "" if none are."""
        left = memoryview(data)
        try:
            while left:
                written = self._raw.write(left)
                if written is None:  # another process has made it non-blocking
                    select.select([], [self._raw], [])
                else:
                    left = left[written:]
        except OSError as error:  # the disk is full, nobody is left to read
            return error.strerror or str(error)
        except ValueError:  # something in this process has closed it
            return "it is closed"
        return ""


def free_standard_error(formatter=PLAIN):
    """Have nobody wait for the reader of standard error any more, for as long as the process
    lives. The last lines have LAST_LINES seconds at its end. ``formatter``: see StandardError."""
    if sys.stderr is None or isinstance(sys.stderr, StandardError):
        return
    # It may be no file on a descriptor, and the system may have no thread for us.
    with contextlib.suppress(AttributeError, RuntimeError):
        sys.stderr = StandardError(sys.stderr, formatter)
        atexit.register(sys.stderr.drain, LAST_LINES)
