"""The ring of records: its budget, its readers, and what a record costs."""

import sys
import threading
import tracemalloc

import pytest
from inspector_samples import AT, a_record, a_ring, samples

from gotunnel_agent.inspector import record as record_module
from gotunnel_agent.inspector.record import (
    MESSAGE_COST,
    MOST_CHANGES,
    MOST_MESSAGES,
    RECORD_COST,
    Kept,
    Message,
    Record,
    Ring,
)


@pytest.fixture(autouse=True)
def no_crowds(monkeypatch):
    monkeypatch.setattr(record_module, "CROWD", 0)


def ids(records):
    return [record.id for record in records]


def test_records_get_growing_ids_and_are_found_by_them():
    ring = a_ring()
    assert ids(ring.all()) == list(range(1, len(samples()) + 1))
    assert ring.get(3) is ring.all()[2] and ring.get(99) is None
    assert len(ring) == len(samples())
    assert ring.used == sum(record.cost() for record in ring.all())


def test_of_more_than_the_budget_the_oldest_go_first():
    ring = Ring(3 * Record().cost())
    for _ in range(5):
        ring.add(Record())
    assert ids(ring.all()) == [3, 4, 5]
    ring.grow(ring.get(5), 1)
    assert ids(ring.all()) == [4, 5] and ring.used == 2 * Record().cost() + 1


def test_what_a_record_takes_later_counts():
    ring = Ring(2 * RECORD_COST + 100)
    first, second = ring.add(Record()), ring.add(Record())
    second.request_body = Kept(bytes(60), 60)
    assert ring.update(second) and ring.used == 2 * RECORD_COST + 60
    assert ring.grow(second, 40) and ring.get(first.id)
    assert ring.grow(second, 1) and ring.get(first.id) is None
    assert not ring.grow(first, 1) and not ring.update(first)
    assert ring.used == RECORD_COST + 101
    assert ring.update(second) and ring.used == RECORD_COST + 60


def test_a_record_that_is_larger_than_the_budget_is_not_kept():
    ring = Ring(RECORD_COST + 10)
    record = ring.add(Record())
    assert not ring.grow(record, 11)
    assert (ring.all(), ring.used) == ([], 0)


def test_after_clear_nothing_is_kept_and_open_records_are_gone():
    ring = a_ring()
    record = ring.all()[-1]
    ring.clear()
    assert (ring.all(), ring.used) == ([], 0)
    assert not ring.update(record) and not ring.grow(record, 5) and ring.used == 0
    assert ring.add(Record()).id == record.id + 1


def test_a_reader_gets_what_has_changed_once():
    ring = a_ring()
    last = len(ring)
    with ring.subscribe() as reader:
        assert reader.take(timeout=0) is None
        new = ring.add(Record())
        ring.update(ring.get(2))
        ring.update(new)
        ring.tell("replay", {"id": 1})
        changes = reader.take(timeout=0)
        assert ids(changes.records) == [2, last + 1]
        assert (changes.oldest, changes.events, changes.missed) == (1, [("replay", {"id": 1})], 0)
        assert reader.take(timeout=0) is None
        ring.clear()
        assert reader.take(timeout=0) == ([], last + 2, [], 0)


def test_a_reader_is_told_which_records_are_gone():
    ring = Ring(2 * RECORD_COST)
    with ring.subscribe() as reader:
        for _ in range(5):
            ring.add(Record())
        changes = reader.take(timeout=0)
        assert ids(changes.records) == [4, 5] and changes.oldest == 4


def test_a_slow_reader_misses_changes_and_nobody_waits_for_it():
    ring = Ring(10**9)
    with ring.subscribe() as slow, ring.subscribe() as quick:
        for number in range(MOST_CHANGES + 7):
            ring.add(Record())
            ring.tell("replay", number)
            quick.take(timeout=0)
        changes = slow.take(timeout=0)
        assert len(changes.records) == len(changes.events) == MOST_CHANGES
        assert changes.missed == 14 and changes.records[-1].id == len(ring)
        ring.add(Record())
        assert slow.take(timeout=0).missed == 0


def test_a_reader_waits_until_something_comes_or_it_is_closed():
    ring = Ring(10**6)
    reader = ring.subscribe()
    taken = []

    def read():
        while (changes := reader.take()) is not None:
            taken.extend(changes.records)

    thread = threading.Thread(target=read)
    thread.start()
    ring.add(Record())
    while not taken:
        thread.join(0.001)
    reader.close()
    thread.join(10)
    assert not thread.is_alive() and ids(taken) == [1]
    assert reader.take(timeout=0) is None and not ring._subscriptions


def test_the_oldest_messages_of_a_record_are_dropped():
    record = Record()
    for number in range(5 * MOST_MESSAGES):
        record.add_message(Message(AT, True, "text", b"%d" % number, 4), 10**9)
    assert MOST_MESSAGES / 2 < len(record.messages) <= MOST_MESSAGES
    assert record.messages[0].data == b"%d" % record.dropped
    assert record.messages[-1].data == b"4999"
    cost = record.cost()
    record.add_message(Message(AT, True, "binary", bytes(10_000), 10_000), 12_000)
    assert record.cost() < cost and record.cost() <= RECORD_COST + 12_000
    assert [len(message.data) for message in record.messages[-1:]] in ([10_000], [])
    assert record.dropped + len(record.messages) == 5001


def test_one_message_over_the_limit_is_dropped():
    record = Record()
    record.add_message(Message(AT, True, "binary", bytes(1000), 1000), 500)
    assert (record.messages, record.dropped, record.cost()) == ([], 1, RECORD_COST)


def allocated(make):
    """Bytes that Python allocates for what ``make()`` returns."""
    make()  # what is made once
    tracemalloc.start()
    try:
        before = tracemalloc.get_traced_memory()[0]
        held = make()
        return tracemalloc.get_traced_memory()[0] - before, held
    finally:
        tracemalloc.stop()


def test_a_ring_takes_no_more_memory_than_it_counts():
    """A flood of small visits, and one of visits with heads and bodies."""

    def flood(count, size):
        ring = Ring(10**9)
        for number in range(count):
            head = b"%d" % number + bytes(size)
            ring.add(
                Record(
                    0, "app.example.com", "http", "127.0.0.1:8000", f"192.0.2.{number}",
                    AT + number, number / 7, number / 9, "GET", f"/{number}", 200, head, head[1:],
                    request_body=Kept(head[2:], size + number),
                )
            )  # fmt: skip
        return ring

    for count, size in ((2000, 0), (200, 5000)):
        taken, ring = allocated(lambda count=count, size=size: flood(count, size))
        assert 0.6 * ring.used < taken <= ring.used, (count, taken / count, ring.used / count)


def test_messages_take_no_more_memory_than_they_count():
    def make():
        record = Record()
        for number in range(900):
            record.add_message(Message(AT + number, True, "text", b"%d" % number, number), 10**9)
        return record

    taken, record = allocated(make)
    assert 0.5 * record.cost() < taken <= record.cost()
    assert sys.getsizeof(record.messages[0]) < MESSAGE_COST


def test_what_is_kept_of_a_body_knows_whether_it_is_whole():
    assert Kept(b"ab", 2).whole and Kept().whole and not Kept(b"ab", 3).whole
    assert a_record(asked=b"abc").request_body == (b"abc", 3)
