"""Who is next: a turn for each key that waits, so that a long queue holds up only its own.

In one queue for all, work of an address that floods stands before that of everybody else. Here each
key, such as an address, has a queue of its own, and those that wait take turns (round robin).
"""

import threading
from collections import OrderedDict, deque
from collections.abc import Callable, Hashable

from gotunnel_agent.common.process import Workers


class Turns:
    """Items that wait, by key. Not for two threads at once."""

    def __init__(self):
        self._queues = OrderedDict()  # key: deque of its items, never an empty one; the next first

    def __len__(self) -> int:
        return len(self._queues)

    def put(self, key: Hashable, item):
        """Behind the others of ``key``; a key that has none waits for one turn of all others."""
        queue = self._queues.get(key)
        if queue is None:
            self._queues[key] = queue = deque()
        queue.append(item)

    def pop(self):
        """The next item. Raises KeyError if there is none."""
        key, queue = self._queues.popitem(last=False)
        item = queue.popleft()
        if queue:
            self._queues[key] = queue
        return item


class FairWorkers:
    """A bounded pool of threads, whose jobs take turns by key. Any thread."""

    def __init__(self, most: int, name: str):
        """As Workers."""
        self._workers = Workers(most, name)
        self.shutdown = self._workers.shutdown
        self._turns = Turns()
        self._lock = threading.Lock()  # guards _turns, which has an item for each job in the pool

    @property
    def crowded(self) -> bool:
        """Whether a job waits for a thread."""
        return self._workers.crowded

    def submit(self, function: Callable, key: Hashable = None):
        """Have a thread call ``function`` when it is the turn of ``key``. Raises Stopped after
        shutdown()."""
        with self._lock:
            self._workers.submit(self._take_turn)
            self._turns.put(key, function)

    def _take_turn(self):
        with self._lock:
            function = self._turns.pop()
        function()
