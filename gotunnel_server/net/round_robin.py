"""Round robin: each key, such as an address, has a queue of its own, and the keys take turns.

In one queue for all, the jobs of a flooding address would stand before those of all others
(head-of-line blocking). Here a long queue delays only its own key.
"""

import threading
from collections import Counter, OrderedDict, deque
from collections.abc import Callable, Hashable, Sequence
from typing import Any

from gotunnel import call_logged
from gotunnel_agent.common.process import Stopped, Workers

from .shares import PARTS


class RoundRobin:
    """Waiting items, each under a path of keys, such as (tunnel, address): the tunnels take turns,
    and within one tunnel the addresses. All paths have the same length. One thread at a time."""

    def __init__(self) -> None:
        # By key: a RoundRobin of the rest of its paths, or a deque of items if there is no rest;
        # never an empty one. The key whose turn is next stands first.
        self._queues: OrderedDict[Hashable, Any] = OrderedDict()

    def __len__(self) -> int:
        return len(self._queues)

    def put(self, path: Sequence[Hashable], item: object) -> None:
        """Append an item to the queue of ``path``. A key without items gets its first turn after
        one turn of each other key."""
        key, *rest = path
        queue: Any = self._queues.get(key)
        if queue is None:
            queue = self._queues[key] = RoundRobin() if rest else deque()
        queue.put(rest, item) if rest else queue.append(item)

    def pop(self) -> Any:
        """The next item. Raises KeyError if there is none."""
        key, queue = self._queues.popitem(last=False)
        item = queue.pop() if isinstance(queue, RoundRobin) else queue.popleft()
        if queue:
            self._queues[key] = queue
        return item


class FairWorkers:
    """A bounded pool of threads whose jobs take turns by key. Any thread.

    A thread that has done a job takes the next one by itself. So while all threads work, a job that
    comes wakes none of them.
    """

    def __init__(self, most: int, name: str):
        """Parameters as for Workers."""
        self._most = most
        self._workers = Workers(most, name)
        self.prepare = self._workers.prepare
        self._lock = threading.Lock()  # guards all below
        self._waiting = RoundRobin()
        self._count = 0  # jobs in it
        self._working = 0  # threads that take jobs out of it, with those that were woken to do so
        self._woken = 0  # threads that have not taken their first job yet
        self._over = False  # shutdown() was called

    @property
    def crowded(self) -> bool:
        """Whether a job waits for a thread. Read without the lock, so it may be a moment old."""
        return self._count > self._woken

    @property
    def waiting(self) -> int:
        """How many jobs wait for a thread. Read without the lock, too."""
        return max(0, self._count - self._woken)

    def submit(self, function: Callable[[], object], key: Hashable = None) -> None:
        """Have a thread call ``function`` when ``key`` has its turn. Raises Stopped after
        shutdown()."""
        with self._lock:
            if self._over:
                raise Stopped("the pool of threads has been shut down")
            self._waiting.put((key,), function)
            self._count += 1
            if self._working < self._most:
                self._working += 1
                self._woken += 1
                self._workers.submit(self._work)

    def shutdown(self, timeout: float) -> bool:
        """As Workers.shutdown()."""
        with self._lock:
            self._over = True
        return self._workers.shutdown(timeout)

    def _work(self) -> None:
        """Do jobs until none waits."""
        is_first = True
        while True:
            with self._lock:
                self._woken -= is_first
                if not self._count:
                    self._working -= 1
                    return
                self._count -= 1
                function = self._waiting.pop()
            is_first = False
            call_logged(function)


class Gate:
    """A semaphore with fair, bounded waiting. Threads that wait take turns by group, and within a
    group by key. Each group, and each key in it, has a falling share of the places to wait, as in
    shares.py. Any thread."""

    def __init__(self, at_once: int, waiting: int):
        """``at_once`` threads are let in at a time, ``waiting`` others may wait."""
        self._free = at_once
        self._places = waiting  # free places to wait
        self._waiting = RoundRobin()
        self._held: Counter[Hashable] = Counter()  # by group, and by (group, key): places taken
        self._lock = threading.Lock()  # guards the four above

    def enter(self, group: Hashable, key: Hashable) -> bool:
        """Wait for a turn; then the caller owes a leave(). False, at once, if there is no place to
        wait."""
        with self._lock:
            if self._free:
                self._free -= 1
                return True
            # The places that the group may have, given the free ones and its own: a group alone may
            # have a third of all. Each key in it may have a third of these.
            room = (self._places - PARTS * self._held[group] + PARTS) // (PARTS + 1)
            if PARTS * self._held[group, key] >= room:
                return False
            self._count(group, key, 1)
            turn = threading.Event()
            self._waiting.put((group, key), (turn, group, key))
        turn.wait()
        return True

    def leave(self) -> None:
        """Let the next waiting thread in."""
        with self._lock:
            if not self._waiting:
                self._free += 1
                return
            turn, group, key = self._waiting.pop()
            self._count(group, key, -1)
            turn.set()

    def _count(self, group: Hashable, key: Hashable, step: int) -> None:
        """Caller holds the lock."""
        self._places -= step
        for counted in group, (group, key):
            self._held[counted] += step
            if not self._held[counted]:
                del self._held[counted]
