"""Which streams are kept for the next visit, for how long, and which one is taken up."""

import pytest

from gotunnel import START_WINDOW
from gotunnel_server.agents import stream_pool
from gotunnel_server.agents.stream_pool import (
    MOST_AGE,
    OF_A_HOSTNAME,
    OF_A_SESSION,
    OWN_OF_A_SESSION,
    KeptStreams,
    OwnStreams,
)

APP = "app.test"


class Quiet:
    """A stream that an earlier visit left in good order."""

    id = 2
    quiet = True
    window = START_WINDOW
    closed = False
    hurry = False  # it ends before it is in the pool

    def rest(self, on_end):
        self.end = on_end
        if self.quiet and self.hurry:
            self.quiet = False
            on_end()
            return True
        return self.quiet

    def close(self):
        self.closed = True


@pytest.fixture
def kept():
    return KeptStreams()


def test_the_freshest_stream_of_a_hostname_is_taken_up_once(kept):
    old, fresh = Quiet(), Quiet()
    kept.put(APP, old)
    kept.put(APP, fresh)
    assert kept.pop("other.test") is None
    assert fresh in kept
    assert kept.pop(APP) is fresh
    assert fresh not in kept and old in kept
    assert kept.pop(APP) is old
    assert kept.pop(APP) is None
    assert not (old.closed or fresh.closed)


@pytest.mark.parametrize(("name", "value"), [("quiet", False), ("window", START_WINDOW + 1)])
def test_a_stream_that_is_not_fit_is_closed(kept, name, value):
    """One that may still bring bytes, or one whose window has grown."""
    stream = Quiet()
    setattr(stream, name, value)
    kept.put(APP, stream)
    assert stream.closed and stream not in kept
    assert kept.pop(APP) is None


def test_a_stream_that_ends_while_it_is_kept_leaves_at_once(kept):
    first, second = Quiet(), Quiet()
    kept.put(APP, first)
    kept.put(APP, second)
    first.end()
    assert first.closed and first not in kept and second in kept
    assert kept.pop(APP) is second
    second.end()  # while its new user has it, whose affair that is
    assert not second.closed and kept.pop(APP) is None


def test_a_stream_that_ends_before_it_is_kept_is_not_given_away(kept):
    stream = Quiet()
    stream.hurry = True
    kept.put(APP, stream)
    assert stream.closed and stream not in kept and kept.pop(APP) is None


def test_a_stream_that_is_kept_alone_makes_way_for_a_new_one(kept):
    first, second, other = Quiet(), Quiet(), Quiet()
    kept.put("other.test", other)
    kept.make_way(APP)
    kept.put(APP, first)
    kept.make_way(APP)
    assert first.closed and first not in kept and kept.pop(APP) is None
    first = Quiet()
    for stream in (first, second):
        kept.put(APP, stream)
    kept.make_way(APP)  # such a target serves several at once
    assert not (first.closed or second.closed or other.closed)


def test_streams_are_given_up_and_not_kept_until_the_one_that_waits_is_served(kept):
    def new(number):
        stream = Quiet()
        stream.id = number
        return stream

    streams = [new(2), new(4)]
    other = new(6)
    for stream in streams:
        kept.put(APP, stream)
    kept.put("other.test", other)
    kept.give_up(APP, new(10))
    kept.give_up(APP, new(8))
    assert all(stream.closed and stream not in kept for stream in streams)
    late, older = new(4), new(8)
    kept.put(APP, late)
    kept.served(APP, older)  # an older one may have been accepted before
    kept.served("other.test", new(12))
    kept.put(APP, older)
    assert late.closed and older.closed and not other.closed
    kept.served(APP, newer := new(12))
    kept.put(APP, newer)
    assert kept.pop(APP) is newer and not newer.closed


def test_no_more_are_kept_than_there_is_room_for(kept):
    def keep(hostname, count):
        streams = [Quiet() for _ in range(count)]
        for stream in streams:
            kept.put(hostname, stream)
        return sum(not stream.closed for stream in streams)

    hostnames = [f"{n}.test" for n in range(OF_A_SESSION // OF_A_HOSTNAME)]
    assert [keep(hostname, OF_A_HOSTNAME + 1) for hostname in hostnames] == (
        [OF_A_HOSTNAME] * len(hostnames)
    )
    assert keep(APP, 1) == 0  # the session has as many as it may
    kept.pop(hostnames[0])
    assert keep(APP, 2) == 1
    kept.close_all()
    assert keep(APP, 1) == 1


def test_only_old_ones_are_closed_for_their_age(kept, monkeypatch):
    now = [1000.0]
    monkeypatch.setattr(stream_pool, "monotonic", lambda: now[0])
    old, fresh = Quiet(), Quiet()
    kept.put(APP, old)
    now[0] += MOST_AGE / 2
    kept.put(APP, fresh)
    now[0] += MOST_AGE / 2 + 1
    kept.close_old()
    assert old.closed and old not in kept
    assert not fresh.closed and kept.pop(APP) is fresh
    assert kept.pop(APP) is None


def test_whatever_comes_after_the_end_is_closed(kept):
    before, after = Quiet(), Quiet()
    kept.put(APP, before)
    kept.close()
    assert before.closed and kept.pop(APP) is None
    kept.put(APP, after)
    assert after.closed and after not in kept


# Streams of one owner ----------------------------------------------------------------------------


@pytest.fixture
def own():
    return OwnStreams()


def test_a_stream_is_its_owners_alone(own):
    mine, yours = Quiet(), Quiet()
    own.put("me", APP, mine)
    own.put("you", APP, yours)
    assert own.pop("me", "other.test") is None and own.pop("somebody", APP) is None
    assert own.pop("me", APP) is mine and own.pop("me", APP) is None
    own.drop("you")
    own.drop("you")
    assert yours.closed and not mine.closed and own.pop("you", APP) is None


def test_the_oldest_owner_makes_room_for_the_newest(own):
    streams = [Quiet() for _ in range(OWN_OF_A_SESSION + 1)]
    for number, stream in enumerate(streams):
        own.put(number, APP, stream)
    assert [stream.closed for stream in streams] == [True] + [False] * OWN_OF_A_SESSION
    assert own.pop(0, APP) is None and len(own.streams()) == OWN_OF_A_SESSION


def test_an_owned_stream_ends_when_it_is_old_or_speaks_or_all_is_over(own, monkeypatch):
    now = [1000.0]
    monkeypatch.setattr(stream_pool, "monotonic", lambda: now[0])
    old, fresh, spoiled, late = Quiet(), Quiet(), Quiet(), Quiet()
    own.put("old", APP, old)
    now[0] += MOST_AGE + 1
    own.put("fresh", APP, fresh)
    own.close_old()
    assert old.closed and own.streams() == {fresh}
    spoiled.quiet = False
    own.put("spoiled", APP, spoiled)
    assert spoiled.closed and own.pop("spoiled", APP) is None
    fresh.end()
    assert fresh.closed
    own.close()
    own.put("late", APP, late)
    assert late.closed and not own.streams()


def test_no_owned_stream_is_lost_if_one_comes_while_a_full_pool_closes(own):
    streams = [Quiet() for _ in range(OWN_OF_A_SESSION + 1)]
    for number, stream in enumerate(streams[:-1]):
        own.put(number, APP, stream)
    own._closed = True  # as close() begins
    own.put("late", APP, streams[-1])
    own.close()
    assert all(stream.closed for stream in streams)


@pytest.mark.parametrize("kind", [KeptStreams, OwnStreams])
def test_the_streams_of_a_hostname_that_is_gone_are_closed_and_no_others(kind):
    pool, gone, stays = kind(), Quiet(), Quiet()
    if kind is OwnStreams:
        pool.put("one", APP, gone)
        pool.put("other", "other.test", stays)
    else:
        pool.put(APP, gone)
        pool.put("other.test", stays)
    pool.forget(APP)
    assert gone.closed and not stays.closed
    if kind is OwnStreams:
        assert pool.pop("other", "other.test") is stays and pool.pop("one", APP) is None
    else:
        assert pool.pop("other.test") is stays and pool.pop(APP) is None
