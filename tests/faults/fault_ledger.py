"""What the bench knows of each visit, and what it counts: the one place that all its threads share.

A visit ends in one of these ways:

    whole     everything came, unchanged, and it was this visit's own
    failed    the visitor could see it: an error page, a status, a reset, an end too early
    altered   wrong, but bytes of its own connection to the target were altered by a script
    left      the visitor went away on purpose
    wrong     it looked like an answer, and was not the right one: a fault of the product
    hung      it took longer than HANG_BOUND: a fault of the product

Wrong is also what a target sees: a request that is not what its visitor sent, or half of one that
looks whole, or one that must arrive once and arrived twice.
"""

import hashlib
import re
import threading
from collections import Counter
from time import monotonic

# Seconds that a visit may take. The longest waits, one after the other: a session whose line
# swallows bytes is given up after two keep-alives (20 s), the visit waits for the agent to come
# back (AGENT_TIMEOUT, 5 s), the time for an answer begins anew (RESPONSE_TIMEOUT, 6 s here), a
# target that waits gives up (IDLE, 8 s); and 11 s more for a machine that is busy.
HANG_BOUND = 50
MOST_SHOWN = 20  # wrong answers that are told in full
MOST_REMEMBERED = 4096  # visits whose connections to targets are known; far more than are under way

WHOLE, FAILED, ALTERED, LEFT, WRONG, HUNG = ENDS = (
    "whole", "failed", "altered", "left", "wrong", "hung",
)  # fmt: skip


class Failed(Exception):
    """A visit failed, and its visitor can see it. The text says how, in a few words."""


class Wrong(Exception):
    """A visit got what it must not get."""


class Anothers(Wrong):
    """A visit got the answer to another one. No altered byte excuses that."""


class Hung(Exception):
    """A visit did not end within HANG_BOUND; the text says what it waited for."""


class Left(Exception):
    """The visitor has gone away, as it wanted to."""


def content(hostname, visit, size) -> bytes:
    """What the target of a hostname answers to a visit: bytes that no other visit gets. Of two
    sizes, the shorter content is the beginning of the longer one."""
    return hashlib.shake_128(f"{hostname} {visit}".encode()).digest(size)


def proof(*words) -> str:
    """Shows whether words have arrived as they were sent."""
    return hashlib.sha256(" ".join(words).encode()).hexdigest()[:16]


def digest(data) -> str:
    return hashlib.sha256(data).hexdigest()[:16]


class Ledger:
    """All counts. Any thread."""

    def __init__(self):
        self.visits = Counter()  # (kind of visit, end)
        self.failures = Counter()  # how visits failed visibly
        self.wrongs = []  # texts
        self.hangs = []
        self.longest = 0.0  # seconds of the longest visit that ended
        self._ended = {}  # visit: what its visitor saw of its end
        self._carriers = {}  # visit: the Connections that have brought its request to a target
        self._came_on = {}  # visit: its visitor's Connection to the gateway
        self._arrived = {}  # visits that must arrive once
        self._kills = {}  # agent: when it was killed last (monotonic)
        self._lock = threading.Lock()  # guards all of them

    def enter(self, kind, end, seconds, text="", visit=""):
        with self._lock:
            self._ended[visit] = f"{kind}, {end}, {text}"
            _forget_oldest(self._ended)
            self.visits[kind, end] += 1
            if end == FAILED:
                self.failures[text] += 1
            elif end == WRONG:
                self.wrongs.append(text)
            elif end == HUNG:
                self.hangs.append(text)
            if end != HUNG:
                self.longest = max(self.longest, seconds)

    def accuse(self, text):
        """A target got what it must not get."""
        with self._lock:
            self.wrongs.append(text)

    def seen_by_visitor(self, text) -> str:
        """What the visitor saw of the visit that a target's accusation is about."""
        named = re.search(r": visit (\S+?)[:,]? ", text)
        return self._ended.get(named[1], "not ended") if named else "unknown"

    def count(self, end) -> int:
        with self._lock:
            return sum(count for (_, how), count in self.visits.items() if how == end)

    def snapshot(self) -> tuple:
        """Copies of ``visits`` and ``failures``."""
        with self._lock:
            return self.visits.copy(), self.failures.copy()

    def forget(self, kind, failures):
        """Drop the visits of a kind that must not count, and put ``failures`` back as they were."""
        with self._lock:
            for key in [key for key in self.visits if key[0] == kind and key[1] != WRONG]:
                del self.visits[key]
            self.failures = failures

    # Which connection has carried what

    def carry(self, visit, connection):
        """The request of a visit has reached a target on this connection."""
        with self._lock:
            self._carriers.setdefault(visit, []).append(connection)
            _forget_oldest(self._carriers)

    def is_altered(self, visit, line, since) -> bool:
        """Whether a script has altered bytes of this visit. If its request has reached no target,
        it may have got the rest of what was altered before: then any connection of the target's
        ``line`` counts that lived after ``since``."""
        with self._lock:
            carriers = self._carriers.get(visit)
        if carriers is None:
            return line.altered_since(since)
        return any(each.altered for each in carriers)

    def is_shortened(self, visit) -> bool:
        """Whether a script has ended or swallowed bytes between this visit's agent and target."""
        with self._lock:
            return any(each.shortened for each in self._carriers.get(visit, ()))

    def come_on(self, visit, connection):
        """A visitor makes this visit on this connection to the gateway."""
        with self._lock:
            self._came_on[visit] = connection
            _forget_oldest(self._came_on)

    def came_shortened(self, visit) -> bool:
        """Whether a script has ended or swallowed bytes between this visit's visitor and the
        gateway."""
        with self._lock:
            return visit in self._came_on and self._came_on[visit].shortened

    def arrives_once(self, visit) -> bool:
        """Note that a request has arrived; False if it had before."""
        with self._lock:
            known = visit in self._arrived
            self._arrived[visit] = True
            _forget_oldest(self._arrived)
            return not known

    # Agents that were killed: their system ends their connections with a FIN

    def note_kill(self, agent):
        with self._lock:
            self._kills[agent] = monotonic()

    def killed_since(self, agent, since) -> bool:
        with self._lock:
            return self._kills.get(agent, -1.0) >= since


def _forget_oldest(table):
    if len(table) > MOST_REMEMBERED:
        del table[next(iter(table))]
