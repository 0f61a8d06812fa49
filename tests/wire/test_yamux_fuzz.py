"""Mux at random: whatever comes it keeps its rules, and what two of them carry arrives.

Each test is a run of its own seed; a run that fails says its seed and the step at which it did.
Runs of any length, to look for what the short ones do not find, are made by hand:

    cd tests
    GOTUNNEL_FUZZ_FRAMES=3000000 GOTUNNEL_FUZZ_SEED=7 python -m pytest -s --timeout 0 \\
        test_yamux_fuzz.py

``GOTUNNEL_FUZZ_FRAMES`` is how many frames the peer sends in all runs together (100000 if it is
not given); two joined Muxes make a move for every third one of them. ``GOTUNNEL_FUZZ_SEED`` is
the first run's seed (0); the others follow it. With ``-s`` or ``-rP`` each run prints its seed and
what it has done.
"""

import collections
import contextlib
import os
import random

import pytest
from raw_peer import MIB, Wire, check_tables, frame, split_frames

import gotunnel
from gotunnel import (
    ACK,
    DATA,
    FIN,
    GO_AWAY,
    INITIAL_WINDOW,
    MAX_UINT32,
    PING,
    RST,
    SYN,
    WINDOW_UPDATE,
    Account,
    Answered,
    Finished,
    GoneAway,
    Memory,
    Mux,
    Opened,
    ProtocolError,
    Received,
    SessionClosed,
    WasReset,
    Writable,
)

FRAMES = int(os.environ.get("GOTUNNEL_FUZZ_FRAMES", 100_000))
FIRST_SEED = int(os.environ.get("GOTUNNEL_FUZZ_SEED", 0))
RUNS = 8  # tests that share the frames: each failure then has a short way to it
SEEDS = pytest.mark.parametrize("seed", range(FIRST_SEED, FIRST_SEED + RUNS))
EVERYTHING = 1 << 40  # a limit for pull() that limits nothing
NOBODY = gotunnel.LAST_ID  # no stream gets as far as that

# Limits that a few hundred frames can reach.
SMALL_LIMITS = {
    "ACCEPT_BACKLOG": 12,
    "OPEN_BACKLOG": 12,
    "MAX_REPLIES": 40,
    "WASTE": 60,
    "WASTE_A_STREAM": 0,
    "SEND_QUEUE": MIB,
    "MAX_WINDOW": 2 * MIB,
    "SESSION_GROWTH": 4 * MIB,
}


@pytest.fixture
def small_limits(monkeypatch):
    for name, value in SMALL_LIMITS.items():
        monkeypatch.setattr(gotunnel, name, value)


class Run:
    """The counters of a run, by name: ``step`` says where it is. Prints them when it ends."""

    def __init__(self, seed):
        self.seed = seed
        self.rng = random.Random(seed)
        self.counts = collections.Counter(step=0)

    def __enter__(self):
        return self

    def __exit__(self, kind, error, traceback):
        counts = ", ".join(f"{name} {count}" for name, count in sorted(self.counts.items()))
        print(f"seed {self.seed}: {'FAILED at' if error else 'done,'} {counts}")


# Whatever comes ----------------------------------------------------------------------------------


class Fuzzed:
    """A Mux, a peer that sends it anything, and a user that does anything with it.

    The peer looks at the Mux's tables, as an honest peer would know them: most of its frames must
    be legal, or the session would end before it has become interesting. ``wild`` is the share of
    those that need not be.
    """

    def __init__(self, run):
        rng = self.rng = run.rng
        self.run = run
        self.now = rng.random()
        self.wild = rng.choice((0.0, 0.02, 0.3))
        self.busy = rng.choice((0.2, 0.6))  # how often our side pulls: rarely, and it is jammed
        self.memory = Memory(rng.choice((4 * MIB, 256 * MIB)))
        self.client = rng.random() < 0.5
        self.opens = rng.random() < 0.7  # who opens no stream learns the round trip by pings
        self.max_streams = rng.choice((4, 30))
        self.window = rng.choice((INITIAL_WINDOW, 300_000, MIB))  # where ours begin
        self.account = Account(self.memory)
        self.mux = Mux(
            client=self.client, window=self.window, max_streams=self.max_streams,
            account=self.account,
        )  # fmt: skip
        self.next_id = 2 if self.client else 1  # of the peer
        self.unread = {}  # stream id: bytes that were handed out and not consumed
        self.ours = set()  # ids of streams that we may use: accepted ones, and those we opened
        self.discarded = set()  # ids of which we want nothing more
        self.finished = set()  # ids whose Finished has come
        self.own_control = 0  # frames that our user caused, at most, in the queues for control
        self.on_way = b""  # what the peer has sent and the Mux not got yet
        self.spent = collections.Counter()  # id: bytes of its window that are among that
        self.heard = True  # something came since the last ping
        self.syns = collections.Counter()  # id: how many SYNs the peer sent for it
        self.said = {}  # id: what went out for it: "opened", "finished", "reset"

    def theirs(self, stream_id):
        return stream_id % 2 == (0 if self.client else 1)

    # The peer

    def peer_sends(self):
        """A piece of what is on its way; if nothing is, a few more frames are sent."""
        if not self.on_way:
            self.spent.clear()
            batch = [self.some_frame() for _ in range(self.rng.randint(1, 8))]
            self.run.counts["frames"] += len(batch)
            self.on_way = b"".join(batch)
        size = self.rng.choice((1, 12, 500, len(self.on_way), len(self.on_way)))
        piece, self.on_way = self.on_way[:size], self.on_way[size:]
        self.heard = self.heard or bool(piece)
        self.hand_out(self.mux.receive(piece, self.now))

    def some_frame(self):
        if self.rng.random() >= self.wild:
            kind, flags, stream_id, length = self.legal_header()
        elif self.rng.random() < 0.01:
            self.run.counts["noise"] += 1
            return self.rng.randbytes(self.rng.randrange(40))
        else:
            kind, flags, stream_id, length = self.any_header()
        if flags & SYN:
            self.syns[stream_id] += 1
        payload = bytes(min(length, INITIAL_WINDOW)) if kind == DATA else b""
        return frame(kind, flags, stream_id, length, payload)

    def legal_header(self):
        """A header that the peer may send."""
        rng = self.rng
        kind = rng.choice((DATA, WINDOW_UPDATE))
        known = list(self.mux._flows)
        move = rng.random()
        if move < 0.15 or not known:
            number, self.next_id = self.next_id, self.next_id + 2
            return kind, SYN | rng.choice((0, 0, 0, FIN, RST)), number, rng.choice((0, 5, 20_000))
        if move < 0.19:
            return PING, SYN, 0, rng.getrandbits(32)
        if move < 0.25:
            return PING, ACK, 0, self.mux._asked or 0
        if move < 0.252:
            return GO_AWAY, 0, 0, 0
        number = rng.choice(known)
        flow = self.mux._flows[number]
        flags = 0 if self.theirs(number) or rng.random() < 0.5 else ACK
        end = rng.random()
        if end < 0.02:
            flags |= RST
        elif end < 0.08:
            flags |= FIN
        if kind == DATA:
            most = min(flow.may_receive - self.spent[number], INITIAL_WINDOW)
            length = min(most, rng.choice((0, 1, rng.randint(0, 500), rng.randint(0, most), most)))
            self.spent[number] += length
            return kind, flags, number, length
        length = rng.choice((0, 1, rng.randrange(INITIAL_WINDOW)))
        return kind, flags, number, min(length, MAX_UINT32 - flow.may_send)

    def any_header(self):
        rng = self.rng
        kind = rng.choice((DATA, WINDOW_UPDATE, PING, GO_AWAY, rng.randrange(256)))
        if rng.random() < 0.9:
            kind = rng.choice((DATA, WINDOW_UPDATE))
        flags = rng.choice((0, SYN, ACK, FIN, RST, rng.getrandbits(4), rng.getrandbits(16)))
        stream_id = rng.choice((0, rng.randrange(40), rng.randrange(40), rng.getrandbits(32)))
        if flags & SYN and stream_id and not self.theirs(stream_id) and rng.random() < 0.9:
            stream_id ^= 1
        length = rng.choice((0, 1, rng.randrange(100), rng.randrange(INITIAL_WINDOW)))
        if rng.random() < 0.02:
            length = rng.choice((INITIAL_WINDOW + 1, MAX_UINT32, rng.getrandbits(32)))
        return kind, flags, stream_id, length

    # What the Mux says of it

    def hand_out(self, events):
        for event in events:
            self.run.counts[type(event).__name__] += 1
            if isinstance(event, GoneAway):
                continue
            number = event.stream_id
            if isinstance(event, Opened):
                assert self.theirs(number)
                self.forget(number)
                self.unread[number] = 0
            elif isinstance(event, Received):
                assert event.payload and number not in self.finished | self.discarded
                self.unread[number] += len(event.payload)
            elif isinstance(event, Finished):
                assert number in self.unread and number not in self.finished
                self.finished.add(number)
            elif isinstance(event, WasReset):
                del self.unread[number]  # only what was known can be reset
                self.forget(number)
            else:
                assert isinstance(event, (Writable, Answered)) and number in self.unread

    def forget(self, number):
        self.unread.pop(number, None)
        for numbers in (self.ours, self.discarded, self.finished):
            numbers.discard(number)

    # Our user

    def user_moves(self):
        rng, mux = self.rng, self.mux
        usable = sorted(filter(mux.knows, self.ours)) if rng.random() < 0.95 else sorted(self.ours)
        number = rng.choice(usable or [NOBODY])
        move = rng.random()
        if move < 0.1 and self.opens and mux.may_open:
            with contextlib.suppress(SessionClosed):
                number = mux.open(self.now)
                self.own_control += 1
                self.unread[number] = 0
                self.ours.add(number)
        elif move < 0.3 and mux._unaccepted:
            number = rng.choice(sorted(mux._unaccepted))
            mux.accept(number)
            self.own_control += 1
            self.ours.add(number)
        elif move < 0.6:
            if room := mux.room(number):
                assert number in self.ours
                mux.send(number, bytes(rng.choice((1, min(room, 700), room))))
        elif move < 0.64:
            mux.finish(number)
        elif move < 0.66:
            number = rng.choice((number, *mux._unaccepted))
            mux.reset(number)
            self.own_control += 1
            self.forget(number)
        elif move < 0.67:
            mux.discard(number, self.now)
            if number in self.unread:
                self.unread[number] = 0
                self.discarded.add(number)
        elif move < 0.672:
            self.window = max(self.window, rng.choice((400_000, MIB)))
            mux.widen(self.window)
        elif move < 0.97:
            count = self.unread.get(number, 0)
            count = rng.choice((0, count, count, rng.randint(0, count)))
            mux.consumed(number, count, self.now)
            if count:
                self.unread[number] -= count
        elif move < 0.999:
            self.ping()
        else:
            mux.go_away()
            self.own_control += 1

    def ping(self):
        try:
            self.mux.keep_alive(self.now)
        except SessionClosed:
            assert not self.heard
            raise
        self.heard = False
        self.own_control += 1

    # What goes out

    def pull(self, limit):
        data, served = self.mux.pull(limit)
        frames = split_frames(data)
        assert set(served) <= {got[2] for got in frames if got[0] == DATA}
        # The last payload may go beyond the limit, with its header and a FIN.
        assert len(data) < limit + 2 * gotunnel.HEADER_SIZE + gotunnel.FRAME_ALONE
        for kind, flags, number, length, _ in frames:
            if kind in (DATA, WINDOW_UPDATE) and self.syns[number] <= 1:
                self.check_order(kind, flags, number, length)
        if not (self.mux._replies or self.mux._control):
            self.own_control = 0

    def check_order(self, kind, flags, number, length):
        """SYN or ACK first, FIN once behind the payload, nothing behind RST."""
        before = self.said.get(number)
        assert before != "reset"
        if flags & RST:
            self.said[number] = "reset"
        elif before is None:
            assert (kind, flags) == (WINDOW_UPDATE, ACK if self.theirs(number) else SYN)
            self.said[number] = "opened"
        elif flags & FIN:
            assert before == "opened"
            self.said[number] = "finished"
        else:
            assert flags == 0 and length
            assert kind == WINDOW_UPDATE or before == "opened"

    # What must be true at any time

    def check(self):
        mux, memory, account = self.mux, self.memory, self.account
        check_tables(mux)
        flows = mux._flows.values()
        assert mux._inbound <= self.max_streams
        assert len(mux._unaccepted) <= gotunnel.ACCEPT_BACKLOG
        assert len(mux._unanswered) <= gotunnel.OPEN_BACKLOG
        # One more: the first overrun is answered in any case.
        most = gotunnel.MAX_REPLIES + self.own_control + 1
        assert len(mux._replies) + len(mux._control) <= most
        assert mux._wasted <= gotunnel.WASTE + 1 and mux._late <= gotunnel.MAX_WINDOW
        assert mux._queued == sum(flow.queued for flow in flows) == account.held
        assert abs(mux._queued - memory.buffered) < Account.STEP
        assert mux._queued <= gotunnel.SEND_QUEUE + len(flows) * gotunnel.SEND_BUFFER
        assert all(flow.queued <= gotunnel.SEND_BUFFER for flow in flows)
        assert sum(flow.grown for flow in flows) == account.promised == memory.promised
        assert memory.promised <= min(gotunnel.SESSION_GROWTH, memory.limit // 2)
        assert set(self.finished) <= set(self.unread)
        for flow in flows:
            assert INITIAL_WINDOW <= flow.window - flow.grown <= self.window
            assert flow.window == mux.window(flow.id) <= gotunnel.MAX_WINDOW
            coming = mux._body_left if mux._body_flow is flow else 0
            held = flow.window - flow.may_receive - flow.owed - coming
            # What the peer has used of a window lies here, or on its way: no byte is lost.
            assert held == self.unread[flow.id] or flow.got_fin

    def end(self):
        """The session is over, by whatever: its last words still leave, and nothing is kept."""
        self.mux.go_away(gotunnel.PROTOCOL_ERROR)
        self.own_control += 1
        self.pull(EVERYTHING)
        self.mux.end()
        check_tables(self.mux)
        assert len(self.mux._flows) == self.mux._inbound == self.mux._queued == 0
        assert self.account.held == self.account.promised == 0
        self.account.close()
        assert self.memory.buffered == self.memory.promised == 0


@SEEDS
def test_whatever_comes_is_a_protocol_error_or_nothing(seed, small_limits):
    with Run(seed) as run:
        while run.counts["frames"] < FRAMES // RUNS:
            run.counts["sessions"] += 1
            fuzzed = Fuzzed(run)
            try:
                for _ in range(run.rng.choice((50, 400))):
                    run.counts["step"] += 1
                    fuzzed.now += run.rng.choice((0.0, 0.0001, 0.001, 0.02, 0.5))
                    fuzzed.now += gotunnel.IDLE_WINDOW if run.rng.random() < 0.002 else 0.0
                    if run.rng.random() < 0.7:
                        fuzzed.peer_sends()
                    fuzzed.user_moves()
                    if run.rng.random() < fuzzed.busy:
                        fuzzed.pull(run.rng.choice((1, 1000, 100_000, EVERYTHING)))
                    fuzzed.check()
                    run.counts["grown"] += fuzzed.memory.promised > 0
            except (ProtocolError, SessionClosed) as error:
                run.counts[f"ended by {type(error).__name__}"] += 1
            fuzzed.end()
        # Else the frames were so tame, or so wild, that they proved nothing.
        if FRAMES // RUNS > 10_000:
            assert all(run.counts[name] > 20 for name in ("Finished", "WasReset", "grown"))
            assert run.counts["ended by ProtocolError"] > 2


@SEEDS
def test_noise_is_a_protocol_error_or_nothing(seed):
    rng = random.Random(seed)
    for _ in range(500):
        mux = Mux(client=True)
        with contextlib.suppress(ProtocolError):
            mux.receive(rng.randbytes(rng.randrange(200)), 0.0)
        check_tables(mux)


# Two Muxes, at random ----------------------------------------------------------------------------

MOVES_A_SCHEDULE = 1500  # after so many, the two wind up, and another two begin


class Model:
    """Two joined Muxes, and what each stream's two directions have carried.

    Directions are kept by (stream id, sender): ``written`` what was sent, ``read`` what arrived,
    ``unread`` how much of that has not been consumed yet.
    """

    def __init__(self, run):
        self.run, self.rng = run, run.rng
        self.now = 0.0
        self.pace = self.rng.choice((0.0001, 0.01, 1.0))  # seconds that a delivery takes, at most
        self.memories = (Memory(64 * MIB), Memory(self.rng.choice((2 * MIB, 64 * MIB))))
        self.wire = Wire(self.rng, window=self.rng.choice((INITIAL_WINDOW, 300_000)))
        for mux, memory in zip(self.wire.ends, self.memories):
            mux._account = Account(memory)
        self.most_streams = self.rng.choice((1, 3, 12))
        self.open = (set(), set())  # ids that an end may still use
        self.waiting = (set(), set())  # ids that an end has not accepted
        self.written, self.read, self.unread = {}, {}, {}
        self.saw_finish, self.cut = set(), set()
        self.left = set()  # ends that have said go away

    def deliver(self, to):
        self.now += self.pace * self.rng.random()
        self.take(to, self.wire.carry(to, self.now))

    def take(self, to, events):
        for event in events:
            self.run.counts[type(event).__name__] += 1
            if isinstance(event, GoneAway):
                assert 1 - to in self.left
            elif isinstance(event, Opened):
                assert to not in self.left
                self.waiting[to].add(event.stream_id)
                self.start(event.stream_id, to)
            elif isinstance(event, Received):
                key = event.stream_id, 1 - to
                assert key not in self.saw_finish
                self.read[key] += event.payload
                self.unread[key] += len(event.payload)
            elif isinstance(event, Finished):
                self.saw_finish.add((event.stream_id, 1 - to))
            elif isinstance(event, WasReset):
                if event.stream_id not in self.cut:  # then the other end has refused it
                    assert 1 - to in self.left and event.stream_id not in self.open[1 - to]
                    self.cut.add(event.stream_id)
                self.open[to].discard(event.stream_id)
                self.waiting[to].discard(event.stream_id)
            else:
                assert isinstance(event, (Writable, Answered))

    def start(self, stream_id, end):
        self.open[end].add(stream_id)
        self.written[stream_id, end] = bytearray()
        self.read[stream_id, 1 - end] = bytearray()
        self.unread[stream_id, 1 - end] = 0

    def move(self):
        if self.rng.random() < 0.01:
            self.now += gotunnel.IDLE_WINDOW
        end = self.rng.randrange(2)
        mux = self.wire.ends[end]
        usable = sorted(filter(mux.knows, self.open[end] - self.waiting[end]))
        stream_id = self.rng.choice(usable) if usable else None
        kind = self.rng.choices(
            ("deliver", "open", "accept", "write", "consume", "rush", "finish", "reset", "ping",
             "leave"),
            (40, 5, 10, 25, 25, 0.4, 1, 0.3, 1, 0.02),
        )[0]  # fmt: skip
        if kind == "deliver":
            self.deliver(end)
        elif kind == "ping":
            with contextlib.suppress(SessionClosed):  # nothing came since the last: so be it
                mux.keep_alive(self.now)
        elif kind == "leave":
            mux.go_away()
            self.left.add(end)
        elif kind == "open" and mux.may_open and len(mux._flows) < self.most_streams:
            try:
                self.start(mux.open(self.now), end)
            except SessionClosed:
                assert self.left
        elif kind == "accept" and self.waiting[end]:
            mux.accept(self.waiting[end].pop())
        elif stream_id is None:
            return
        elif kind == "write":
            self.write(end, stream_id, self.rng.choice((1, 999, 70_000)))
        elif kind == "consume":
            self.consume(end, stream_id, self.rng.choice((1.0, 1.0, 0.3)))
        elif kind == "rush":
            self.rush(end, stream_id)
        elif kind == "finish":
            mux.finish(stream_id)
        elif kind == "reset":
            mux.reset(stream_id)
            self.cut.add(stream_id)
            self.open[end].discard(stream_id)

    def write(self, end, stream_id, count):
        mux = self.wire.ends[end]
        if room := mux.room(stream_id):
            data = self.rng.randbytes(min(room, count))
            mux.send(stream_id, data)
            self.written[stream_id, end] += data

    def rush(self, end, stream_id):
        """Much passes in a moment, as fast as the windows permit: so they grow."""
        for _ in range(6):
            self.write(end, stream_id, gotunnel.SEND_BUFFER)
            self.now += self.pace
            self.settle()
            if stream_id in self.open[1 - end] - self.waiting[1 - end]:
                self.consume(1 - end, stream_id, 1.0)

    def consume(self, end, stream_id, share):
        mux, key = self.wire.ends[end], (stream_id, 1 - end)
        count = int(self.unread[key] * share)
        self.unread[key] -= count
        before = mux.window(stream_id)
        mux.consumed(stream_id, count, self.now)
        self.run.counts["windows that grew"] += mux.window(stream_id) > before
        self.run.counts["windows that shrank"] += mux.window(stream_id) < before

    def wind_up(self):
        """Let everybody accept, read and finish, until nothing is on its way."""
        self.settle()
        for end in (0, 1):
            for stream_id in self.open[end]:
                self.wire.ends[end].accept(stream_id)
                self.consume(end, stream_id, 1.0)
                self.wire.ends[end].finish(stream_id)
        self.settle()

    def settle(self):
        for end, events in enumerate(self.wire.settle(self.now)):
            self.take(end, events)

    def check(self):
        for mux, memory in zip(self.wire.ends, self.memories):
            check_tables(mux)
            grown = sum(flow.grown for flow in mux._flows.values())
            assert grown == mux._account.promised == memory.promised <= memory.limit // 2

    def check_outcome(self):
        """What was written and not cut has arrived, in order and once, and all is forgotten."""
        for key, written in self.written.items():
            stream_id, _ = key
            read = self.read.get(key, b"")
            if stream_id in self.cut:
                assert written.startswith(read)
            else:
                assert read == written
                assert key in self.saw_finish
                self.run.counts["whole"] += 1
        for mux, memory in zip(self.wire.ends, self.memories):
            check_tables(mux)
            assert len(mux._flows) == mux._inbound == mux._queued == mux._account.held == 0
            assert mux.pull(EVERYTHING) == (b"", [])
            mux._account.close()
            assert memory.buffered == memory.promised == 0


# Frames that nobody needs are few in a schedule of two honest ends: pings, and resets of what was
# just opened. Time allows for none.
HONEST_WASTE = {"WASTE": 60, "WASTE_A_STREAM": 0, "WASTE_A_SECOND": 0, "WASTE_A_STREAM_SECOND": 0}


@SEEDS
def test_what_was_written_arrives_in_order_and_once(seed, monkeypatch):
    for name, value in HONEST_WASTE.items():
        monkeypatch.setattr(gotunnel, name, value)
    with Run(seed) as run:
        while run.counts["step"] < FRAMES // RUNS // 3:
            run.counts["schedules"] += 1
            model = Model(run)
            for _ in range(MOVES_A_SCHEDULE):
                run.counts["step"] += 1
                model.move()
                model.check()
            model.wind_up()
            model.check_outcome()
        # Else the schedules were too tame.
        if run.counts["schedules"] > 1:
            seen = ("whole", "WasReset", "windows that grew", "windows that shrank")
            assert all(run.counts[name] for name in seen)
