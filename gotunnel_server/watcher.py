"""A thread that looks, now and then and when asked, at what may have changed."""

import logging
import threading

from gotunnel import spawn

log = logging.getLogger("gotunnel.watcher")


class Watcher:
    """Calls ``look(asked)`` every ``seconds``, and at once after ask(). A look that raises is
    logged, and the next one comes in time."""

    def __init__(self, name, look, seconds):
        """``asked`` tells a look that ask() has caused it. The thread is called ``name``."""
        self._name = name
        self._look = look
        self._seconds = seconds
        self._wake = threading.Event()  # a look is asked for, or the end has come
        self._ended = threading.Event()
        self._thread = None

    def start(self):
        """Raises NoThread."""
        self._thread = spawn(self._name, self._run)

    def ask(self):
        """Look now. Any thread; waits for nothing."""
        self._wake.set()

    def stop(self):
        """No further look. Waits for nothing, as a disk may hang: see join()."""
        self._ended.set()
        self._wake.set()

    def join(self, timeout):
        """Wait for the look that is under way, ``timeout`` seconds at most."""
        self._thread.join(timeout)

    def _run(self):
        while True:
            asked = self._wake.wait(self._seconds)
            self._wake.clear()
            if self._ended.is_set():
                return
            try:
                self._look(asked)
            except Exception:
                log.exception("%s: a look at what has changed failed (bug, traceback follows); "
                              "next try in %g s", self._name, self._seconds)  # fmt: skip
