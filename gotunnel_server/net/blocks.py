"""The addresses that the operator has blocked: their connections are closed when they come.

A block is of an IPv4 address, a network, or of the /64 of an IPv6 address, the smallest block that
a subscriber gets. It ends by itself. A small file in ACME_CACHE keeps the blocks over a restart.

The table is replaced whole and never changed (copy on write), so visitors take no lock. Without
blocks it is empty, and costs one comparison.
"""

from __future__ import annotations

import json
import logging
import math
import os
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable
from pathlib import Path
from time import monotonic, time
from typing import Any, NamedTuple

from gotunnel_agent.common import addresses, atomic_file, small_file
from gotunnel_agent.common.one_line import on_one_line

log = logging.getLogger("gotunnel.blocks")

FILE = "blocks.json"
MAX_FILE = 1024 * 1024  # bytes: MOST_BLOCKS of them take a third
MOST_BLOCKS = 1000
# Seconds: the shortest and the longest, and without a wish. An address soon belongs to another
# subscriber, so none is blocked for ever.
LEAST, MOST, USUAL = 1, 30 * 86400, 3600
# Shortest prefixes of networks. A wider one is more likely a slip than a wish.
WIDEST = {4: 8, 6: 19}  # 19: the largest block that a registry has given to one network
MOST_REASON = 200  # characters
# Seconds by which another gateway's clock may be ahead. The latest act counts: one of a far future
# could never be undone.
MOST_AHEAD = 86400
CLOCK_SET = 2  # seconds between two clocks that mean that one was set; less is the time of a look


class Refused(ValueError):
    """An address cannot be blocked; the text is one line for the operator."""


class Block(NamedTuple):
    """One blocked network. ``until`` is in seconds since 1970; ``by`` is the operator's address."""

    network: addresses.Network
    until: float
    reason: str = ""
    by: str = ""

    @property
    def address(self) -> str:
        return as_text(self.network)


class Act(NamedTuple):
    """What an operator did at one of several gateways, for the others: JSON. ``seconds``: for how
    long the address stays blocked, 0 if it is not any more. ``at`` is when that was done, in
    seconds since 1970; 0 if it was before this start."""

    address: str
    seconds: float
    reason: str = ""
    by: str = ""
    at: float = 0.0


def as_text(network: addresses.Network) -> str:
    """As the operator reads and writes it: without the length if it is one address."""
    alone = network.prefixlen == network.max_prefixlen
    return str(network.network_address if alone else network)


def read_network(text: str) -> addresses.Network:
    """The network that is blocked for ``text``: an address or a network. Raises Refused."""
    try:
        network = addresses.unmapped_network(addresses.network(text.strip()))
    except ValueError as error:
        raise Refused(str(error)) from None
    if network.version == 6 and network.prefixlen > addresses.IPV6_SUBSCRIBER:
        network = network.supernet(new_prefix=addresses.IPV6_SUBSCRIBER)
    if network.prefixlen < WIDEST[network.version]:
        raise Refused(
            f"{network} is too wide to be blocked, expected /{WIDEST[network.version]} or longer"
        )
    return network


class Blocks:
    """The blocks of a gateway. Any thread."""

    def __init__(
        self,
        folder: Path | None = None,
        now: Callable[[], float] = monotonic,
        clock: Callable[[], float] = time,
    ):
        """``folder`` has the file, which is read now; None: nothing is kept. ``now()`` gives
        monotonic seconds, ``clock()`` seconds since 1970."""
        self._path = None if folder is None else folder / FILE
        self._now = now
        self._clock = clock
        self._lock = threading.Lock()  # held to replace the tables
        self._saving = threading.Lock()  # held to write the file, so that the newest is last
        self._blocks: dict[addresses.Network, tuple[float, Block]] = {}  # with the monotonic end
        # By version and length of the prefix: the prefixes, and when (monotonic) each ends. Other
        # modules read only whether it is empty, as it nearly always is.
        self.table: dict[tuple[int, int], dict[int, float]] = {}
        self._next_end = math.inf  # monotonic, of the block that ends first
        # When each network was blocked or unblocked last, the latest last. In a cluster the latest
        # act counts, whichever gateway hears of it first.
        self._acted_at: OrderedDict[addresses.Network, float] = OrderedDict()
        # Called after an act of an operator here, and when a block comes from another gateway.
        self.on_act: Callable[[Act], object] = lambda act: None
        self.on_heard: Callable[[], object] = lambda: None
        self._read()

    def __contains__(self, host: object) -> bool:
        """Whether an IP address as text is blocked now."""
        if not self.table:
            return False
        address = addresses.parse(str(host))
        if address is None:
            return False
        now, number, bits = self._now(), int(address), address.max_prefixlen
        if now >= self._next_end:  # so that the table is empty again when the last one has ended
            with self._lock:
                self._forget_ended()
        return any(
            ends.get(number >> bits - length, 0.0) > now
            for (version, length), ends in self.table.items()
            if version == address.version
        )

    def add(self, network: addresses.Network, seconds: float, reason: str, by: str) -> Block:
        """Block a network from now on. Raises Refused if there are too many blocks."""
        block = Block(network, self._clock() + seconds, reason[:MOST_REASON], by)
        with self._lock:
            self._forget_ended()
            if network not in self._blocks and len(self._blocks) >= MOST_BLOCKS:
                raise Refused(
                    f"{MOST_BLOCKS} addresses are blocked already, and that is the limit; remove "
                    "one, or block a network in place of many addresses"
                )
            self._put({**self._blocks, network: (self._now() + seconds, block)})
            self._note_act(network)
        self._save()
        self.on_act(Act(block.address, seconds, block.reason, by, self._acted_at[network]))
        return block

    def remove(self, network: addresses.Network) -> Block | None:
        """The block that was removed; None if there was none."""
        with self._lock:
            self._forget_ended()
            found = self._blocks.get(network)
            if found is not None:
                self._put({key: value for key, value in self._blocks.items() if key != network})
                self._note_act(network)
        if found is None:
            return None
        self._save()
        self.on_act(Act(found[1].address, 0.0, at=self._acted_at[network]))
        return found[1]

    def _note_act(self, network: addresses.Network, at: float | None = None) -> None:
        """Note when a network was blocked or unblocked; None: now, and after all earlier acts that
        are known, as clocks differ. Caller holds the lock."""
        after_all = max(self._clock(), self._acted_at.get(network, 0.0) + 0.001)
        self._acted_at[network] = after_all if at is None else at
        self._acted_at.move_to_end(network)
        if len(self._acted_at) > 2 * MOST_BLOCKS:
            self._acted_at.popitem(last=False)

    # Several gateways whose blocks are one (cluster/counts.py)

    def acts(self) -> list[Act]:
        """All that a new gateway has to know: what is blocked, and what was unblocked."""
        blocks = self.all()
        with self._lock:
            acted_at, clock = dict(self._acted_at), self._clock()
        there = {block.network for block in blocks}
        return [
            *(Act(block.address, block.until - clock, block.reason, block.by,
                  acted_at.get(block.network, 0.0)) for block in blocks),
            *(Act(as_text(network), 0.0, at=at)
              for network, at in acted_at.items() if network not in there),
        ]  # fmt: skip

    def hear(self, acts: Iterable[Act]) -> None:
        """Take over what operators did at other gateways. Raises ValueError for a malformed one."""
        changed = added = False
        for act in acts:
            network = read_network(act.address)
            if not math.isfinite(act.seconds) or not act.at < self._clock() + MOST_AHEAD:
                raise ValueError(f"a block for {act.seconds} s, of {act.at}")
            ends = min(max(act.seconds, 0.0), MOST)
            block = Block(network, self._clock() + ends, on_one_line(act.reason, MOST_REASON),
                          on_one_line(act.by, MOST_REASON))  # fmt: skip
            with self._lock:
                known = self._acted_at.get(network, 0.0 if network in self._blocks else -1.0)
                if act.at <= known or len(self._blocks) >= MOST_BLOCKS and ends:
                    continue
                self._note_act(network, act.at)
                others = {key: value for key, value in self._blocks.items() if key != network}
                self._put({**others, network: (self._now() + ends, block)} if ends else others)
            changed, added = True, added or ends > 0
        if changed:
            self._save()
        if added:
            self.on_heard()

    def all(self) -> list[Block]:
        """The blocks, the latest last. If the clock was set meanwhile, they end when it says."""
        with self._lock:
            self._forget_ended()
            began = self._clock() - self._now()  # the clock's time when the other one was 0
            return [
                block if abs(began + ends - block.until) < CLOCK_SET
                else block._replace(until=began + ends)
                for ends, block in self._blocks.values()
            ]  # fmt: skip

    def _forget_ended(self) -> None:
        """Caller holds the lock."""
        now = self._now()
        if any(ends <= now for ends, _ in self._blocks.values()):
            self._put({key: value for key, value in self._blocks.items() if value[0] > now})

    def _put(self, blocks: dict[addresses.Network, tuple[float, Block]]) -> None:
        """Caller holds the lock."""
        table: dict[tuple[int, int], dict[int, float]] = {}
        for network, (ends, _) in blocks.items():
            prefixes = table.setdefault((network.version, network.prefixlen), {})
            prefix = int(network.network_address) >> network.max_prefixlen - network.prefixlen
            prefixes[prefix] = ends
        self._next_end = min((ends for ends, _ in blocks.values()), default=math.inf)
        self._blocks, self.table = blocks, table

    # The file

    def _read(self) -> None:
        if self._path is None:
            return
        try:
            found = json.loads(small_file.read_whole(self._path, MAX_FILE))
            blocks = [_block(entry) for entry in found["blocks"]]
        except FileNotFoundError:
            return
        except (OSError, ValueError, TypeError, KeyError, RecursionError) as error:
            log.warning("%s cannot be read (%s): addresses that were blocked before this start are "
                        "not blocked now", self._path, error)  # fmt: skip
            return
        now, clock = self._now(), self._clock()
        # A block that would last too long was written with another clock.
        left = [(block, min(block.until - clock, MOST)) for block in blocks]
        with self._lock:
            self._put({
                block.network: (now + seconds, block._replace(until=clock + seconds))
                for block, seconds in left[-MOST_BLOCKS:] if seconds > 0
            })  # fmt: skip

    def _save(self) -> None:
        if self._path is None:
            return
        with self._saving:
            kept = [
                {"network": str(block.network), "until": int(block.until), "reason": block.reason,
                 "by": block.by}
                for block in self.all()
            ]  # fmt: skip
            try:
                self._path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
                # By process: several may share the folder (PROCESSES).
                new = self._path.with_name(f".{FILE}.{os.getpid()}.new")
                atomic_file.write(self._path, json.dumps({"blocks": kept}).encode(), new=new)
            except OSError as error:
                log.warning("%s cannot be written (%s): a restart forgets what is blocked",
                            self._path, error.strerror or error)  # fmt: skip


def _block(entry: Any) -> Block:
    """Raises ValueError, TypeError, KeyError."""
    network = read_network(entry["network"])
    until, reason, by = entry["until"], entry["reason"], entry["by"]
    if isinstance(until, bool) or not isinstance(until, (int, float)):
        raise ValueError(f"until {until!r}")
    return Block(network, until, str(reason)[:MOST_REASON], str(by)[:MOST_REASON])


def overlaps(network: addresses.Network, others: Iterable[addresses.Network]) -> bool:
    """Whether a network has an address in common with one of the others."""
    return any(network.version == other.version and network.overlaps(other) for other in others)


def network_of(host: str) -> addresses.Network | None:
    """The network that would be blocked for an address; None if the text is none."""
    found = addresses.parse(host.partition("%")[0])
    return None if found is None else read_network(str(found))
