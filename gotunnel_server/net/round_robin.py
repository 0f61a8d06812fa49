"""Round robin: keys that wait take turns, so that a long queue holds up only its own key.

In one queue for all, work of an address that floods stands before that of all others. Here each
key, such as an address, has a queue of its own.
"""

import threading
from collections import Counter, OrderedDict, deque
from collections.abc import Callable, Hashable

from gotunnel_agent.common.process import Workers

from .shares import PARTS


class RoundRobin:
    """Items that wait, each under a path of keys, such as (tunnel, address): the tunnels take
    turns, and within one tunnel the addresses. All paths are equally long. Not for two threads at
    once."""

    def __init__(self):
        self._queues = OrderedDict()  # key: its deque or RoundRobin, never empty; next first

    def __len__(self) -> int:
        return len(self._queues)

    def put(self, path: tuple, item):
        """Behind the others of ``path``; a key that has none waits for one turn of all others."""
        key, *rest = path
        queue = self._queues.get(key)
        if queue is None:
            queue = self._queues[key] = RoundRobin() if rest else deque()
        queue.put(rest, item) if rest else queue.append(item)

    def pop(self):
        """The next item. Raises KeyError if there is none."""
        key, queue = self._queues.popitem(last=False)
        item = queue.pop() if isinstance(queue, RoundRobin) else queue.popleft()
        if queue:
            self._queues[key] = queue
        return item


class FairWorkers:
    """A bounded pool of threads, whose jobs take turns by key. Any thread."""

    def __init__(self, most: int, name: str):
        """As Workers."""
        self._workers = Workers(most, name)
        self.shutdown = self._workers.shutdown
        self._waiting = RoundRobin()
        self._lock = threading.Lock()  # guards _waiting, which has an item for each job in the pool

    @property
    def crowded(self) -> bool:
        """Whether a job waits for a thread."""
        return self._workers.crowded

    def submit(self, function: Callable, key: Hashable = None):
        """Have a thread call ``function`` when it is the turn of ``key``. Raises Stopped after
        shutdown()."""
        with self._lock:
            self._workers.submit(self._take_turn)
            self._waiting.put((key,), function)

    def _take_turn(self):
        with self._lock:
            function = self._waiting.pop()
        function()


class Gate:
    """Lets so many threads in at a time. Few others wait: they take turns by group, and within a
    group by key, and of the places to wait each has a falling share, as in shares.py. Any
    thread."""

    def __init__(self, at_once: int, waiting: int):
        self._free = at_once
        self._places = waiting  # that are left
        self._waiting = RoundRobin()
        self._held = Counter()  # group, and (group, key): places
        self._lock = threading.Lock()  # guards all of them

    def enter(self, group: Hashable, key: Hashable) -> bool:
        """Wait for a turn. False, at once, if there is no place to wait; True: leave() follows."""
        with self._lock:
            if self._free:
                self._free -= 1
                return True
            # What the group may still take, a third of all for one alone; a third of it for a key.
            room = (self._places - PARTS * self._held[group] + PARTS) // (PARTS + 1)
            if PARTS * self._held[group, key] >= room:
                return False
            self._count(group, key, 1)
            turn = threading.Event()
            self._waiting.put((group, key), (turn, group, key))
        turn.wait()
        return True

    def leave(self):
        with self._lock:
            if not self._waiting:
                self._free += 1
                return
            turn, group, key = self._waiting.pop()
            self._count(group, key, -1)
            turn.set()

    def _count(self, group, key, step):
        """Caller holds the lock."""
        self._places -= step
        for counted in group, (group, key):
            self._held[counted] += step
            if not self._held[counted]:
                del self._held[counted]
