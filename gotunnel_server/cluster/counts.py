"""Has all members of a cluster count together, approximately: what visitors spend of their rates
(token buckets), wrong passwords, bad tokens, and which addresses are blocked.

Each member decides by what it knows, so no visit waits for another machine. Once a second it tells
the others what was spent here (gossip), and they take it from their own buckets. So for about a
second the members do not know of each other: a visitor that comes to all of M members at once gets
the burst M times. What was given too much is a debt of the buckets: in the long run the rate is
that of the policy, as with one gateway. A visitor of one member alone never notices.

A message holds MOST_ENTRIES; what does not fit is told a second later, the largest first. A message
that gets lost is not repeated: what it told counts only where it was spent.

    message         says
    spent           attempts: [[address, failures]]; policies: [[hostname, bucket, visitor, tokens]]
    blocks          acts: [blocks.Act]
    blocks-wanted   a new member: send me yours
"""

from __future__ import annotations

import logging
import threading
from collections import Counter, deque
from collections.abc import Callable, Hashable, Iterable, Mapping
from time import monotonic
from typing import Any, Protocol

from gotunnel import spawn
from gotunnel_agent.common.token_bucket import Buckets

from ..net.blocks import Act, Blocks
from .proofs import ALL, Mail

log = logging.getLogger("gotunnel.counts")

INTERVAL = 1.0  # seconds between two messages
# In one message, some 100 bytes each: 40 KiB a second and member, however many visitors there are.
MOST_ENTRIES = 400
# Bound of what waits to be told, some 300 bytes each. Beyond it the smallest are dropped.
MOST_WAITING = 4000
# Most that one entry may say. A member tells each second.
MOST_TOKENS = 100_000
MOST_ACTS = 200  # in one message
MOST_KEY = 100  # characters of an address, and of a whole number the bits of an IPv6 address
# Log lines of malformed messages at once, and per second in the long run: a program that can write
# to Redis must not fill the log.
NEWS, NEWS_RATE = 20, 0.1
MOST_HEARD = 64  # messages about blocks that wait for our thread; all blocks take ten

Entry = tuple[Hashable, ...]  # ("", "", address) or (hostname, bucket, visitor)


class Counted(Protocol):
    """What is needed of agents.attempts.Attempts."""

    def spent(self) -> dict[Hashable, int]: ...

    def hear(self, key: Hashable, failures: int) -> None: ...


class Policy(Protocol):
    """What is needed of routes.Policy."""

    def spent(self) -> dict[str, dict[Hashable, int]]: ...

    def hear(self, bucket: str, share: Hashable, tokens: int) -> None: ...


class Route(Protocol):
    @property
    def policy(self) -> Policy | None: ...


class SharedCounts:
    """start(), then stop(). hear() is for any thread; tick() is for one."""

    KINDS = ("spent", "blocks", "blocks-wanted")  # the messages for hear()

    def __init__(
        self,
        mail: Mail,
        routes: Callable[[], Mapping[str, Route]],
        attempts: Counted,
        blocks: Blocks | None,
        every_second: Callable[[], object] = lambda: None,
    ) -> None:
        """``routes()`` is routes.Registry.table; ``blocks`` None: this member blocks no address.
        ``every_second()`` is called with each tick()."""
        self._mail = mail
        self._routes = routes
        self._attempts = attempts
        self._blocks = blocks
        self._every_second = every_second
        self._known: Mapping[str, Route] | None = None  # the routes at the last look
        self._policies: list[tuple[str, Policy]] = []  # those among them
        self._waiting: Counter[Entry] = Counter()
        # How often the others are still asked for their blocks: at the start, messages to us may
        # get lost.
        self._questions = 3
        self._members: set[str] = set()  # in contact at the last change
        # Messages about blocks, for our thread: it writes a file, and the thread that hears must
        # not wait for a disk. Beyond the bound the oldest are lost.
        self._heard: deque[Mapping[str, Any]] = deque(maxlen=MOST_HEARD)
        self._wake = threading.Event()  # set when there are some, and by stop()
        self._over = threading.Event()
        self._thread: threading.Thread | None = None
        self._news = Buckets(NEWS_RATE, NEWS)
        if blocks is not None:
            blocks.on_act = lambda act: self._tell_blocks(ALL, [act])

    def start(self) -> None:
        """Raises NoThread."""
        self._thread = spawn("shared counts", self._run)

    def stop(self) -> None:
        self._over.set()
        self._wake.set()
        if self._thread is not None:
            self._thread.join(INTERVAL)

    def _run(self) -> None:
        """Thread, until stop()."""
        while True:
            self._wake.wait(INTERVAL)
            self._wake.clear()
            if self._over.is_set():
                return
            try:
                self.tick()
            except Exception:
                log.exception("telling the other gateways what was spent failed (bug, traceback "
                              "follows); next try in %g s", INTERVAL)  # fmt: skip

    # What is told

    def tick(self) -> None:
        """Take over blocks that were heard of, and tell what was spent since the last time."""
        self._every_second()
        if self._questions and self._blocks is not None:
            self._questions -= 1
            self._mail.publish(ALL, {"do": "blocks-wanted"})
        self.take_heard()
        self._gather()
        if not self._waiting:
            return
        told = self._waiting.most_common(MOST_ENTRIES)
        left = self._waiting.most_common(MOST_WAITING)[len(told) :]
        self._waiting = Counter(dict(left))
        self._mail.publish(ALL, {
            "do": "spent",
            "attempts": [[key[2], count] for key, count in told if not key[0]],
            "policies": [[*key, count] for key, count in told if key[0]],
        })  # fmt: skip

    def _gather(self) -> None:
        routes = self._routes()
        if routes is not self._known:
            self._known = routes
            self._policies = [
                (hostname, route.policy)
                for hostname, route in routes.items() if route.policy is not None
            ]  # fmt: skip
        for address, failures in self._attempts.spent().items():
            self._waiting["", "", address] += failures
        for hostname, policy in self._policies:
            for bucket, spent in policy.spent().items():
                for visitor, tokens in spent.items():
                    self._waiting[hostname, bucket, visitor] += tokens

    def _tell_blocks(self, to: str, acts: list[Act]) -> None:
        for first in range(0, len(acts), MOST_ACTS):
            self._mail.publish(to, {"do": "blocks", "acts": acts[first : first + MOST_ACTS]})

    def changed(self, members: Iterable[str]) -> None:
        """These are the other members in contact now."""
        new, self._members = set(members) - self._members, set(members)
        for member in new:
            self.joined(member)

    def joined(self, member: str) -> None:
        """Another member is in contact, perhaps after a while without: tell it what is blocked."""
        if self._blocks is not None:
            self._tell_blocks(member, self._blocks.acts())

    # What is heard

    def hear(self, message: Mapping[str, Any]) -> None:
        """A message of another member: "spent", "blocks" or "blocks-wanted"."""
        if message["do"] == "blocks":
            self._heard.append(message)
            self._wake.set()
        elif message["do"] == "blocks-wanted":
            self.joined(str(message["from"]))
        else:
            self._understand(self._hear_spent, message)

    def take_heard(self) -> None:
        """Take over the blocks of messages that came."""
        while self._heard:
            self._understand(self._hear_blocks, self._heard.popleft())

    def _understand(
        self, take: Callable[[Mapping[str, Any]], object], message: Mapping[str, Any]
    ) -> None:
        try:
            take(message)
        except (LookupError, TypeError, ValueError, AttributeError, OverflowError) as error:
            now = monotonic()
            if self._news.wait("", now):
                return
            self._news.take("", now)
            log.warning("gateway %s sent a malformed message %r (%s): it is ignored",
                        message.get("from"), message.get("do"), error)  # fmt: skip

    def _hear_spent(self, message: Mapping[str, Any]) -> None:
        for address, failures in message["attempts"][:MOST_ENTRIES]:
            self._attempts.hear(_key(address), _tokens(failures))
        routes = self._routes()
        for hostname, bucket, visitor, tokens in message["policies"][:MOST_ENTRIES]:
            route = routes.get(hostname)
            if route is not None and route.policy is not None:
                route.policy.hear(bucket, _key(visitor), _tokens(tokens))

    def _hear_blocks(self, message: Mapping[str, Any]) -> None:
        if self._blocks is None:
            return
        self._blocks.hear([
            Act(str(address), float(seconds), str(reason), str(by), float(at))
            for address, seconds, reason, by, at in message["acts"][:MOST_ACTS]
        ])  # fmt: skip


def _key(value: object) -> Hashable:
    """A key of addresses.subscriber(): JSON has no tuples."""
    if isinstance(value, list):
        version, prefix = value
        if not _is_number(version) or not _is_number(prefix):
            raise ValueError("an address of two whole numbers was expected")
        return version, prefix
    if value is None or _is_number(value) or isinstance(value, str) and len(value) <= MOST_KEY:
        return value
    raise ValueError("an address was expected")


def _is_number(value: object) -> bool:
    return isinstance(value, int) and 0 <= value < 1 << 128


def _tokens(value: object) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError("a number of tokens was expected")
    return min(value, MOST_TOKENS)
