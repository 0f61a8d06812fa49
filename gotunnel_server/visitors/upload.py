"""Copies a request's body from the visitor to the target, while the answer may already flow."""

import threading
from collections.abc import Callable
from time import monotonic
from typing import Any

from gotunnel import Stream, spawn
from gotunnel_agent.common.http1 import Malformed
from gotunnel_agent.common.patience import Patience

from .request import LEAST_BYTE_RATE, Request, VisitorGone
from .target import Target

# Interval in seconds of the checks whether the request's body is still wanted.
WATCH = 0.5
# Seconds that an upload's thread gets to end. Nothing can block it by then: its stream is over, and
# it checks every WATCH whether its request is.
END_TIMEOUT = 5


class Upload:
    """Copies a request's body from the visitor to a target.

    The exchange's thread calls the methods. The copying runs in a second thread, if start() finds
    that the body is not complete yet.
    """

    _target: Target  # set by start()

    def __init__(self, request: Request, timeout: float):
        """``timeout``: how many seconds the target may read nothing."""
        self._request = request
        self._timeout = timeout
        self._thread: threading.Thread | None = None
        self._unwanted = threading.Event()  # the target, or the exchange, wants no more of the body
        self._over = threading.Event()  # the request was answered, or never will be
        self._patience = Patience(request.idle_timeout, LEAST_BYTE_RATE, request.crowded)
        # The visitor waits for 100 (Continue) before it sends the body (RFC 9110 §10.1.1).
        self._held_back = "100-continue" in request.fields.tokens("expect")
        self.stuck = False  # the target has read nothing for ``timeout`` seconds
        self._lock = threading.Lock()  # guards _problem
        self._problem: Exception | None = None

    @property
    def problem(self) -> Exception | None:
        """The Malformed, VisitorGone or OSError that ended the upload early, and reset the target.
        It is a TimeoutError if the visitor was too slow."""
        with self._lock:
            return self._problem

    def at_hand(self) -> list[bytes]:
        """The pieces of the body that have arrived already. Raises Malformed, VisitorGone,
        OSError."""
        request = self._request
        pieces: list[bytes] = []
        try:
            if not request.body_complete:
                pieces = request.read_body(0)
        except TimeoutError:
            return pieces
        self._held_back = False
        return pieces

    def start(self, target: Target, stream: Stream, first: bytes = b"") -> None:
        """Send the rest of the body, behind what at_hand() returned: in a thread, if it has not
        arrived yet. ``first`` is what at_hand() returned, as it goes over the target's ``stream``,
        unless it was sent with the head. Raises NoThread."""
        self._target = target
        if first:
            self._pass_on(stream.write, first)
        if target.unsent or not self._request.body_complete:
            self._thread = spawn(f"upload {self._request.hostname}", self._run)

    @property
    def has_thread(self) -> bool:
        """Whether a part of the body has gone, or goes, to the target alone."""
        return self._thread is not None

    @property
    def under_way(self) -> bool:
        """Whether the target still waits for a part of the body, and so cannot be expected to
        answer yet."""
        thread = self._thread
        wanted = not (self._unwanted.is_set() or self._held_back)
        return wanted and thread is not None and thread.is_alive()

    def ask_for_body(self) -> None:
        """The target has sent 100 (Continue): it wants the body."""
        self._held_back = False

    def note_answer(self) -> None:
        """A piece of the answer has come. The visitor may read it and send nothing meanwhile."""
        self._patience.restore()

    def _run(self) -> None:
        request = self._request
        try:
            if self._target.unsent:
                self._pass_on(self._target.send_body, [])
            while not (request.body_complete or self._over.is_set()):
                pieces = self._read()
                if (pieces or request.body_complete) and not self._unwanted.is_set():
                    self._pass_on(self._target.send_body, pieces)
        except (Malformed, VisitorGone, OSError) as error:
            self._fail(error)
        except Exception as error:  # a bug; the thread's outermost function logs it
            self._fail(error)
            raise

    def _read(self) -> list[bytes]:
        """The next pieces; none if none came within WATCH. Raises TimeoutError if the visitor is
        too slow."""
        request, began = self._request, monotonic()
        pieces: list[bytes] = []
        try:
            pieces = request.read_body(min(WATCH, request.idle_timeout / 4))
            self._held_back = False
        except TimeoutError:
            if self._held_back:
                return pieces
        if not request.body_complete:
            self._patience.spend(monotonic() - began, sum(map(len, pieces)))
        return pieces

    def _fail(self, error: Exception) -> None:
        with self._lock:
            self._problem = error
        self._target.reset()  # wakes the exchange's thread, which waits for an answer

    def _pass_on(self, send: Callable[[Any, float], None], data: bytes | list[bytes]) -> None:
        try:
            send(data, self._timeout)
        except TimeoutError:
            self.stuck = True
            self._unwanted.set()
        except OSError:
            # The target has answered, or was reset; the exchange sees that by itself. Go
            # on reading: the visitor may read the answer only after it has sent the whole body.
            self._unwanted.set()

    def ended(self, timeout: float) -> bool:
        """Wait ``timeout`` seconds at most for the copying to end; whether it has."""
        if self._thread is not None:
            self._thread.join(timeout)
            return not self._thread.is_alive()
        return True

    def sent(self) -> bool:
        """Whether the whole body was sent to the target. Waits up to WATCH: the answer can
        arrive before the upload's thread has returned from its last write."""
        thread, whole = self._thread, self._request.body_complete
        if whole and thread is not None:
            thread.join(WATCH)
            whole = not thread.is_alive()
        return whole and not self._unwanted.is_set()

    def end(self) -> None:
        """Stop the upload: the request is answered. The caller has closed or reset the target's
        stream, or the whole body is sent.

        The owner of the visitor's connection deals with what the visitor still sends. Raises
        TimeoutError if the thread does not end, and so still uses the connection.
        """
        self._unwanted.set()
        self._over.set()
        thread = self._thread
        if thread is None:
            return
        if thread.is_alive() and not self._request.body_complete and self.problem is None:
            self._request.refuse_body()
        thread.join(WATCH + END_TIMEOUT)
        if thread.is_alive():
            self._request.abort()
            raise TimeoutError("the upload of an answered request does not end")
