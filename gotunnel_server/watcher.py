"""A thread that checks for changes at an interval, and at once when it is asked to."""

import logging
import threading
from collections.abc import Callable

from gotunnel import spawn

log = logging.getLogger("gotunnel.watcher")


class Watcher:
    """Calls ``look(asked)``, which checks for changes, every ``seconds``, and at once after ask().
    A call that raises is logged, and the next one comes in time."""

    def __init__(self, name: str, look: Callable[[bool], object], seconds: float):
        """``asked`` is true if ask() has caused the call. The thread is called ``name``."""
        self._name = name
        self._look = look
        self._seconds = seconds
        self._wake = threading.Event()  # set by ask() and stop()
        self._ended = threading.Event()
        self._begun = threading.Event()  # set by start() and stop()
        self._thread: threading.Thread | None = None  # None until prepare()

    def prepare(self) -> None:
        """Start the thread, which waits for start(). Raises NoThread."""
        self._thread = spawn(self._name, self._run)

    def start(self) -> None:
        """Begin to check. Raises NoThread, but not after prepare()."""
        if self._thread is None:
            self.prepare()
        self._begun.set()

    def ask(self) -> None:
        """Check now. Any thread; waits for nothing."""
        self._wake.set()

    def stop(self) -> None:
        """Begin no further check. Does not wait for a running one (a disk may hang): see join()."""
        self._ended.set()
        self._wake.set()
        self._begun.set()

    def join(self, timeout: float) -> None:
        """After stop(): wait for a running check, ``timeout`` seconds at most."""
        if self._thread is not None:
            self._thread.join(timeout)

    def _run(self) -> None:
        self._begun.wait()
        while True:
            asked = self._wake.wait(self._seconds)
            self._wake.clear()
            if self._ended.is_set():
                return
            try:
                self._look(asked)
            except Exception:
                log.exception("%s: the check for changes failed (bug, traceback follows); "
                              "next try in %g s", self._name, self._seconds)  # fmt: skip


class Watchers:
    """Several watchers as one: each method is called for all."""

    def __init__(self, *watchers: Watcher):
        self._all = watchers

    def prepare(self) -> None:
        for watcher in self._all:
            watcher.prepare()

    def start(self) -> None:
        for watcher in self._all:
            watcher.start()

    def ask(self) -> None:
        for watcher in self._all:
            watcher.ask()

    def stop(self) -> None:
        for watcher in self._all:
            watcher.stop()

    def join(self, timeout: float) -> None:
        """``timeout`` for each."""
        for watcher in self._all:
            watcher.join(timeout)
