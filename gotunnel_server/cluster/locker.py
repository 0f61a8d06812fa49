"""A certificate store's Locker on Redis: a lock is a key with a lease.

A lock's key has a random token and expires after LEASE. A thread renews it while the lock is held;
if the process dies, the lock is free within LEASE. Only the holder's token renews or releases it
(compare and set, by script).

A lock can be lost: Redis was out of reach for LEASE, or lost its data. Then:

- The holder of a lock *to change something* (``wait``: the account, the turns) reads, and then
  writes what it has read and changed. Its write names the token, and Redis refuses it once the lock
  is lost (fencing): so two members never overwrite each other's changes.
- The holder of a lock *to do something alone* (an order) goes on, and says so in the log. If Redis
  has lost its data the lock is taken again, unless another member has it by then.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import secrets
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from random import uniform

from gotunnel import NoThread, spawn

from .storage import Call

log = logging.getLogger("gotunnel.locker")

# Seconds that a lock outlives its holder's last renewal. Longer than a failover takes (Sentinel: 5
# to 10 s), so that an order survives one; and no longer, as a hostname whose orderer died waits.
LEASE = 20.0
RENEW = LEASE / 4
# Seconds between two tries to get a lock that is held: doubled from the first to the second.
FIRST_WAIT, LONGEST_WAIT = 0.02, 0.5
# Seconds to wait for a lock. Its holder may speak with a CA meanwhile, three requests at most.
PATIENCE = 180.0

# KEYS: lock. ARGV: token, milliseconds, "again" to take it if nobody has it.
KEEP = """
local holder = redis.call('GET', KEYS[1])
if holder == ARGV[1] then return redis.call('PEXPIRE', KEYS[1], ARGV[2]) end
if holder or ARGV[3] ~= 'again' then return 0 end
redis.call('SET', KEYS[1], ARGV[1], 'PX', ARGV[2])
return 1
"""
# KEYS: lock. ARGV: token.
RELEASE = """
if redis.call('GET', KEYS[1]) ~= ARGV[1] then return 0 end
return redis.call('DEL', KEYS[1])
"""


@dataclass(eq=False)
class _Held:
    """A lock that we hold."""

    name: str
    key: str
    is_fence: bool  # a write of its thread is refused when it is lost
    token: str = field(default_factory=lambda: secrets.token_hex(16))
    lost: bool = False


class RedisLocker:
    """A Locker on Redis. Any thread. A thread of ours renews, as long as there are locks."""

    def __init__(self, call: Call, name: str, lease: float = LEASE) -> None:
        """``name`` is CLUSTER_NAME, ``lease`` in seconds."""
        self._call = call
        self._prefix = f"{{{name}}}:lock:"
        self._lease = lease
        self._mine = threading.local()  # .fences: the _Held of this thread
        self._held: set[_Held] = set()
        self._renewer: threading.Thread | None = None
        self._changed = threading.Condition()  # guards both; notified when the last one is gone

    def fences(self) -> list[tuple[str, str]]:
        """As Fences.fences()."""
        return [(held.key, held.token) for held in getattr(self._mine, "fences", ())]

    @contextlib.contextmanager
    def lock(self, name: str, *, wait: bool) -> Iterator[bool]:
        """As Locker.lock()."""
        held = _Held(name, self._prefix + name, is_fence=wait)
        if not self._take(held, wait):
            yield False
            return
        try:
            self._keep(held)
            if wait:
                self._mine.fences = [*getattr(self._mine, "fences", ()), held]
            yield True
        finally:
            if wait:
                self._mine.fences = [
                    other for other in getattr(self._mine, "fences", ()) if other is not held
                ]
            self._let_go(held)

    def _take(self, held: _Held, wait: bool) -> bool:
        """Raises OSError."""
        pause, deadline = FIRST_WAIT, time.monotonic() + PATIENCE
        while not self._call("SET", held.key, held.token, "NX", "PX", self._milliseconds()):
            if not wait:
                return False
            if time.monotonic() > deadline:
                raise OSError(errno.ETIMEDOUT, f"the lock {held.name} was held for "
                              f"{PATIENCE:.0f} s by another member", held.key)  # fmt: skip
            time.sleep(uniform(pause / 2, pause))  # not all at once
            pause = min(2 * pause, LONGEST_WAIT)
        return True

    def _milliseconds(self) -> int:
        return int(self._lease * 1000)

    def _keep(self, held: _Held) -> None:
        """Renew it from now on. Raises OSError."""
        with self._changed:
            if self._renewer is None:
                try:
                    self._renewer = spawn("locks", self._renew)
                except NoThread as error:
                    raise OSError(errno.EAGAIN, str(error), held.key) from error
            self._held.add(held)

    def _let_go(self, held: _Held) -> None:
        with self._changed:
            self._held.discard(held)
            if not self._held:
                self._changed.notify_all()
        # If Redis cannot be reached the lease ends by itself.
        with contextlib.suppress(OSError):
            self._call("EVAL", RELEASE, 1, held.key, held.token)

    def _renew(self) -> None:
        """Thread: renew what is held, until nothing is."""
        while True:
            with self._changed:
                if self._changed.wait_for(lambda: not self._held, self._lease * RENEW / LEASE):
                    self._renewer = None
                    return
                held = tuple(self._held)
            for lock in held:
                self._renew_one(lock)

    def _renew_one(self, held: _Held) -> None:
        again = "no" if held.is_fence else "again"
        try:
            kept = self._call("EVAL", KEEP, 1, held.key, held.token, self._milliseconds(), again)
        except OSError as error:
            log.debug("lock %s is not renewed: %s", held.name, error.strerror)
            return
        with self._changed:
            news = not kept and not held.lost and held in self._held
            held.lost = not kept
        if news:
            log.warning("the lock %s was lost (Redis was away for longer than %g s, or lost its "
                        "data): another gateway may do the same at the same time", held.name,
                        self._lease)  # fmt: skip
