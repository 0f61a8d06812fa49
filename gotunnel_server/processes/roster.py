"""Decides what becomes of the children: which one starts, serves, drains, is restarted. Pure:
events in with the time, actions out.

    STARTING --"ready"--> READY --go, "serving"--> SERVING --drain, or a signal--> DRAINING
        \\                    \\                         \\                             /
         \\--------------------\\----- its process ends --\\----------------------------/--> gone

The first child starts alone. Its faults, such as a certificate that cannot be read, are told once,
and what it makes at its first start (the CA of ACME_ENV=local) is there for the others.

A child that ends although nobody has asked for that is restarted, at once at first, then with a
backoff. Meanwhile the others cover its sockets: they accept its connections too, so no visitor
waits for the restart.
"""

from __future__ import annotations

import enum
import signal
from collections.abc import Iterator
from typing import NamedTuple

# Seconds from a child's start until it serves: as handover.READY_TIMEOUT.
START_TIMEOUT = 60
# Seconds without a sign of life after which a child hangs, and is killed. Children send one every
# BEAT seconds, as long as their listeners respond.
BEAT, HANG = 2.0, 15.0
# Seconds after which the others accept its connections, too. It may only be slow, which does no
# harm: then it accepts some of them itself.
SUSPECT = 5.0
# Seconds between two tries to start a child, doubled each time up to the second number. The first
# restart comes at once: it is most often a single accident.
BACKOFF, MOST_BACKOFF = 1.0, 30.0
# Seconds until a child that drains by itself gets its successor. systemd sends SIGTERM to all
# processes of a service at once, and the supervisor may be the last one to see it.
MOMENT = 0.2
STEADY = 60  # seconds that a child has to serve until its next end is a single accident again
# Seconds beyond DRAIN_TIMEOUT that a child may take to end: as admin/service.LAST_JOBS.
LAST_JOBS = 15


class Stage(enum.IntEnum):
    STARTING = 0
    READY = 1  # its ports are open, it does not accept yet
    SERVING = 2
    DRAINING = 3


class Start(NamedTuple):
    """Start a process for child ``number``; its messages come under ``id``."""

    id: int
    number: int


class Go(NamedTuple):
    """Let it accept. ``predecessor``: the id of the process before; None if there is none."""

    id: int
    predecessor: int | None


class Drain(NamedTuple):
    """``stops``: the whole gateway does; else others serve on."""

    id: int
    stops: bool


class Kill(NamedTuple):
    id: int


class Cover(NamedTuple):
    """Have the child ``id`` accept the connections of child ``number``, or no longer."""

    id: int
    number: int
    on: bool


class Ready(NamedTuple):
    """All serve, for the first time, or again after a renewal."""


class Say(NamedTuple):
    """Log a line. ``level`` is a name of logging's."""

    level: str
    text: str


class Exit(NamedTuple):
    """The supervisor ends with this status. No child is left."""

    status: int


Action = Start | Go | Drain | Kill | Cover | Ready | Say | Exit


class Process:
    """One process of a child."""

    def __init__(self, id: int, number: int, now: float) -> None:
        self.id, self.number = id, number
        self.stage = Stage.STARTING
        self.since = now  # of its start; when it serves, of that
        self.alive_at = now  # its last sign of life
        self.predecessor: int | None = None  # id; renewal
        self.suspected = False  # it may hang: the others accept its connections
        self.killed_for = ""  # why it was killed
        self.leave_by: float | None = None  # when it is killed, once it drains


class Slot:
    """Child ``number``: its processes come and go."""

    def __init__(self, number: int) -> None:
        self.number = number
        self.failures = 0  # in a row
        self.start_at: float | None = None  # when its next process starts; None: not planned
        self.covered = False  # the others accept its connections
        self.restarts = 0


class Roster:
    """All children. Each method returns, as an iterator that must be used up, what is to be
    done."""

    def __init__(self, count: int) -> None:
        self.slots = {number: Slot(number) for number in range(1, count + 1)}
        self.processes: dict[int, Process] = {}  # by id
        self.stopping = False
        self._stop_by = 0.0  # monotonic: what is left then is killed
        self._last_id = 0
        self._all_served = False  # once
        self._to_renew: list[int] = []  # numbers, in their order
        self._renewing = False
        self._status = 0
        self._checked_at: float | None = None

    # What is asked

    def current(self, number: int) -> Process | None:
        """The process that serves as child ``number``."""
        for process in self.processes.values():
            if process.number == number and process.stage is Stage.SERVING:
                return process
        return None

    def serving(self) -> list[Process]:
        return [each for each in self.processes.values() if each.stage is Stage.SERVING]

    @property
    def renewing(self) -> bool:
        return self._renewing

    @property
    def has_served(self) -> bool:
        """Whether all have served at a time."""
        return self._all_served

    def wait(self, now: float) -> float:
        """Seconds until tick() is due."""
        due = [now + BEAT]
        due += [slot.start_at for slot in self.slots.values() if slot.start_at is not None]
        return max(0.0, min(due) - now)

    # What has happened

    def begin(self, now: float) -> Iterator[Action]:
        yield from self._start(self.slots[1], now)

    def _start(self, slot: Slot, now: float, predecessor: int | None = None) -> Iterator[Action]:
        slot.start_at = None
        self._last_id += 1
        process = Process(self._last_id, slot.number, now)
        process.predecessor = predecessor
        self.processes[process.id] = process
        yield Start(process.id, slot.number)

    def said(self, id: int, word: str, now: float) -> Iterator[Action]:
        """A child has said a word."""
        process = self.processes.get(id)
        if process is None:
            return
        process.alive_at = now
        if process.suspected:
            process.suspected = False
            yield from self._uncover(self.slots[process.number])
        if word == "ready" and process.stage is Stage.STARTING:
            process.stage = Stage.READY
            before = process.predecessor
            yield Go(id, before if before in self.processes else None)
        elif word == "serving" and process.stage is Stage.READY:
            yield from self._serves(process, now)
        elif word == "draining" and process.stage is Stage.SERVING:  # a signal to it alone
            yield from self._leaves(process, now)

    def _serves(self, process: Process, now: float) -> Iterator[Action]:
        process.stage, process.since = Stage.SERVING, now
        yield from self._uncover(self.slots[process.number])
        for number, gone in self.slots.items():
            if gone.covered and number != process.number:
                yield Cover(process.id, number, True)
        for other in list(self.processes.values()):
            if other is not process and other.number == process.number:
                if other.stage is Stage.SERVING:
                    yield from self._drain(other, now)
        if self.stopping:
            yield from self._drain(process, now)
            return
        if not self._all_served and process.number == 1:
            for slot in self.slots.values():
                if slot.number != 1:
                    yield from self._start(slot, now)
        yield from self._go_on_renewing(now)
        if len(self.serving()) == len(self.slots) and not self._all_served:
            self._all_served = True
            yield Ready()

    def _cover(self, slot: Slot) -> Iterator[Action]:
        """Have the others accept the connections of this child."""
        if not slot.covered:
            slot.covered = True
            for other in self.serving():
                if other.number != slot.number:
                    yield Cover(other.id, slot.number, True)

    def _uncover(self, slot: Slot) -> Iterator[Action]:
        if slot.covered:
            slot.covered = False
            for other in self.serving():
                if other.number != slot.number:
                    yield Cover(other.id, slot.number, False)

    def _go_on_renewing(self, now: float) -> Iterator[Action]:
        if not self._renewing:
            return
        starting = [each for each in self.processes.values() if each.stage < Stage.SERVING]
        if starting:
            return
        if self._to_renew:
            number = self._to_renew.pop(0)
            before = self.current(number)
            yield from self._start(self.slots[number], now, before.id if before else None)
        else:
            self._renewing = False
            yield Say("info", f"all {len(self.slots)} processes are renewed")
            yield Ready()

    def renew(self, now: float) -> Iterator[Action]:
        """Replace all processes, one after the other."""
        if self.stopping or not self._all_served:
            yield Say("warning", "SIGUSR2: not all processes serve yet; this signal is ignored")
        elif self._renewing:
            yield Say("warning", "SIGUSR2: a renewal is under way; this signal is ignored")
        else:
            self._renewing, self._to_renew = True, list(self.slots)
            yield Say("info", f"the {len(self.slots)} processes are renewed, one after the other")
            yield from self._go_on_renewing(now)

    def _drain(self, process: Process, now: float) -> Iterator[Action]:
        process.stage = Stage.DRAINING
        process.since = now
        yield Drain(process.id, self.stopping)

    def _leaves(self, process: Process, now: float) -> Iterator[Action]:
        """A child drains that was not told to: another process takes its place at once."""
        process.stage, process.since = Stage.DRAINING, now
        if self.stopping or self._is_replaced(process.number):
            return
        yield Say("warning", f"process {process.number} drains, though the gateway does not stop "
                  "(a signal to it alone?); a new one starts")  # fmt: skip
        yield from self._replace(self.slots[process.number], now)

    def _is_replaced(self, number: int) -> bool:
        """Whether another process of the child serves, or starts."""
        return any(
            each.number == number and each.stage is not Stage.DRAINING
            for each in self.processes.values()
        )

    def _replace(self, slot: Slot, now: float) -> Iterator[Action]:
        slot.restarts += 1
        slot.start_at = now + MOMENT
        yield from self._cover(slot)

    def ended(self, id: int, status: int, now: float) -> Iterator[Action]:
        """The process of a child has ended; ``status`` is negative for a signal."""
        process = self.processes.pop(id, None)
        if process is None:
            return
        if self.stopping:
            if not self.processes:
                yield Exit(self._status)
            return
        how = _how(status)
        if process.stage is Stage.DRAINING:
            if status and not process.killed_for:
                yield Say("warning", f"process {process.number}, which was draining, ended {how}")
            return
        if not self._all_served:
            # Its own line says why, unless a signal has ended it.
            if status < 0 or status == 0:
                yield Say("error", f"process {process.number} ended {how} before it served; the "
                          "gateway does not start")  # fmt: skip
            self._status = status if status > 0 else 1
            yield from self._stop(now, 0)
            return
        slot = self.slots[process.number]
        replaced = self._is_replaced(process.number)
        if replaced and process.stage < Stage.SERVING:  # the one before serves on
            self._renewing, self._to_renew = False, []
            yield Say("error", f"renewal: the new process {process.number} ended {how} before it "
                      "served; those before serve on")  # fmt: skip
            yield Ready()
            return
        if process.stage is Stage.SERVING and now - process.since >= STEADY:
            slot.failures = 0
        slot.failures += 1
        delay = 0.0 if slot.failures == 1 else min(
            BACKOFF * 2 ** (slot.failures - 2), MOST_BACKOFF
        )  # fmt: skip
        others = "the others take its connections"
        if not self.serving():  # a longer pause would spare nobody
            delay, others = min(delay, BACKOFF), "no process serves now"
        when = f"in {delay:g} s" if delay else "now"
        cut = "its visits are cut, " if process.stage is Stage.SERVING else ""
        yield Say("error", f"process {process.number} ended {how}; {cut}{others}, and it is "
                  f"restarted {when}")  # fmt: skip
        slot.restarts += 1
        yield from self._cover(slot)
        if replaced:  # its successor starts already
            return
        if delay:
            slot.start_at = now + delay
        else:
            yield from self._start(slot, now)

    def tick(self, now: float) -> Iterator[Action]:
        """Time has passed."""
        late = self._checked_at is not None and now - self._checked_at > HANG / 2
        self._checked_at = now
        if late:
            # The supervisor itself was stopped, and with it perhaps the whole machine: what the
            # children have said meanwhile is not read yet.
            for process in self.processes.values():
                process.alive_at = now
        for slot in self.slots.values():
            if slot.start_at is not None and slot.start_at <= now and not self.stopping:
                yield from self._start(slot, now)
        for process in list(self.processes.values()):
            yield from self._look_at(process, now)
        if self.stopping and now >= self._stop_by:
            for process in list(self.processes.values()):
                yield from self._kill(process, "does not end")

    def _look_at(self, process: Process, now: float) -> Iterator[Action]:
        if process.killed_for:
            return
        if process.stage < Stage.SERVING and now - process.since > START_TIMEOUT:
            yield from self._kill(process, f"does not serve after {START_TIMEOUT} s")
        elif process.stage is Stage.SERVING and now - process.alive_at > HANG:
            yield from self._kill(process, f"has given no sign of life for {HANG:g} s")
        elif (
            process.stage is Stage.SERVING
            and now - process.alive_at > SUSPECT
            and not process.suspected
        ):
            process.suspected = True
            yield Say("warning", f"process {process.number} has given no sign of life for "
                      f"{SUSPECT:g} s: the others accept its connections as well")  # fmt: skip
            yield from self._cover(self.slots[process.number])
        elif process.leave_by is not None and now >= process.leave_by:
            yield from self._kill(process, "still drains, long after DRAIN_TIMEOUT")

    def broken(self, id: int, why: str) -> Iterator[Action]:
        """A child's messages make no sense, or it reads none."""
        if id in self.processes:
            yield from self._kill(self.processes[id], f"cannot be talked to ({why})")

    def _kill(self, process: Process, why: str) -> Iterator[Action]:
        if not process.killed_for:
            process.killed_for = why
            yield Say("error", f"process {process.number} {why}: it is killed")
            yield Kill(process.id)

    def drains(self, id: int, until: float) -> None:
        """The child drains, and is killed if it has not ended by ``until``."""
        if id in self.processes:
            self.processes[id].leave_by = until
            self._stop_by = max(self._stop_by, until)

    def stop(self, now: float, timeout: float) -> Iterator[Action]:
        """Drain all, and exit when they have ended. ``timeout``: DRAIN_TIMEOUT."""
        if not self.stopping:
            yield from self._stop(now, timeout)

    def _stop(self, now: float, timeout: float) -> Iterator[Action]:
        self.stopping = True
        self._stop_by = now + timeout + LAST_JOBS
        for slot in self.slots.values():
            slot.start_at = None
        if not self.processes:
            yield Exit(self._status)
        for process in list(self.processes.values()):
            if process.stage is Stage.SERVING:
                yield from self._drain(process, now)
            elif process.stage is not Stage.DRAINING:
                process.killed_for = "the gateway stops"
                yield Kill(process.id)


def _how(status: int) -> str:
    if status >= 0:
        return f"with status {status}"
    try:
        name = signal.Signals(-status).name
    except ValueError:  # a real-time signal
        return f"by signal {-status}"
    return f"by signal {-status} ({name})"
