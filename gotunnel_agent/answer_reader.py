"""Reads the small answers of many targets in one thread, and puts them in their streams.

A visit has a thread that copies its target's answer. As long as that thread waits, this one waits
for it, by one epoll for all visits. So a small answer wakes no thread of its own, and answers that
come together leave for the gateway in one write. It is the way back of Stream.shortcut().

This thread waits for nothing else: what a stream does not take at once goes to the thread of its
visit, and so does all that comes in bulk. That thread reads by itself as long as there is more.
"""

from __future__ import annotations

import contextlib
import logging
import select
import threading
from queue import SimpleQueue

from gotunnel import READ_SIZE, Stream, Waker, call_logged, spawn

from .common.duplex import Duplex

log = logging.getLogger("gotunnel.answer_reader")

CLOSE_JOIN = 3  # seconds for the reader's thread to end: it waits for nothing but its epoll


class Answer:
    """The answer of one target without TLS, for the thread that copies it to the stream."""

    def __init__(self, target: Duplex, stream: Stream, reader: AnswerReader):
        self.fileno = target.fileno
        self.session = stream.session
        self._target, self._stream, self._reader = target, stream, reader
        self._is_bulk = False  # the last read() brought as much as one read can: there is more
        self._left = b""  # what take() leaves to read()
        self._handed_over: SimpleQueue[bytes] = SimpleQueue()  # the same, for its thread

    def read(self) -> bytes:
        """As Duplex.read()."""
        watched = not self._is_bulk and self._reader.watch(self)
        data = (watched and self._handed_over.get()) or self._target.read()
        self._is_bulk = len(data) >= READ_SIZE
        return data

    def take(self) -> bool:
        """Reader's thread: put what has come in the stream. False if read() must go on."""
        try:
            data = self._target.receive(READ_SIZE)
            if data is None or 0 < len(data) < READ_SIZE and self._stream.offer(data):
                return True
            self._left = data  # b"" at the end, which read() finds itself
        except OSError:  # the system reports an error once: read() must find one, too
            self._target.reset()
        except Exception:
            log.exception("an answer is reset: an unexpected error (bug, traceback follows)")
            self._target.reset()
        return False

    def hand_over(self) -> None:
        """The target is not watched any more: let read() go on."""
        left, self._left = self._left, b""
        self._handed_over.put(left)


class AnswerReader:
    """Waits for the answers of many targets. For Linux: elsewhere each thread waits itself."""

    # Made together with the thread.
    _epoll: select.epoll
    _waker: Waker

    def __init__(self) -> None:
        self._lock = threading.Lock()  # guards all below; only the reader's thread unwatches
        self._thread: threading.Thread | None = None  # started with the first answer
        self._watched: dict[int, Answer] = {}  # by file descriptor
        self._over = False  # close() was called

    def watch(self, answer: Answer) -> bool:
        """Any thread: have answer.take() called whenever something has come, until it returns
        False; then, or on close(), hand_over(). False if the caller must wait itself."""
        if not hasattr(select, "epoll"):
            return False
        with self._lock:
            if self._over or self._thread is None and not self._start():
                return False
            fd = answer.fileno()
            self._watched[fd] = answer
            try:
                self._epoll.register(fd, select.EPOLLIN)
            except OSError:  # the system's limit of watched descriptors, or a closed one
                del self._watched[fd]
                return False
            return True

    def _start(self) -> bool:
        """Whether the thread could be started. Caller holds the lock."""
        try:
            with contextlib.ExitStack() as made:
                self._epoll = made.enter_context(contextlib.closing(select.epoll()))
                self._waker = made.enter_context(contextlib.closing(Waker()))
                self._epoll.register(self._waker.fileno(), select.EPOLLIN)
                self._thread = spawn("answers", self._run)
                made.pop_all()
        except OSError:  # also NoThread: the thread that asks is there, and can do it
            return False
        return True

    def _close(self) -> None:
        self._epoll.close()
        self._waker.close()

    def close(self) -> None:
        """Watch nothing any more. Any thread; waits for the end of the reader's."""
        with self._lock:
            self._over = True
            thread = self._thread
        if thread is not None:
            self._waker.wake()
            thread.join(CLOSE_JOIN)

    def _run(self) -> None:
        while not self._over:
            filled = set()
            for fd, _ in self._epoll.poll():
                answer = self._watched.get(fd)
                if answer is None:  # the waker: it is over
                    break
                if answer.take():
                    filled.add(answer.session)
                else:
                    self._hand_over(fd)
            for session in filled:
                call_logged(session.flush)
        for fd in list(self._watched):
            self._hand_over(fd)
        self._close()

    def _hand_over(self, fd: int) -> None:
        # In this order: the thread that goes on may soon call watch() for the same descriptor.
        self._epoll.unregister(fd)
        self._watched.pop(fd).hand_over()
