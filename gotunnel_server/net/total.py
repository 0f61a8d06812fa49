"""A count that only grows, for the metrics."""

import threading


class Total:
    """Any thread."""

    def __init__(self) -> None:
        self.value = 0
        self._lock = threading.Lock()  # held to add

    def add(self) -> None:
        with self._lock:
            self.value += 1
