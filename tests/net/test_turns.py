"""Turns by key: a queue that is long holds up nobody else's."""

import threading

import pytest
from support import TIMEOUT

from gotunnel_agent.common.process import Stopped
from gotunnel_server.net.turns import FairWorkers, Turns


def test_keys_take_turns_and_items_of_one_keep_their_order():
    turns = Turns()
    for number in range(4):
        turns.put("flood", number)
    turns.put("a", "first")
    turns.put("b", "second")
    turns.put("a", "third")
    assert [turns.pop() for _ in range(7)] == [0, "first", "second", 1, "third", 2, 3]
    assert not turns
    with pytest.raises(KeyError):
        turns.pop()


def test_a_job_waits_for_one_of_each_other_key():
    workers, begun, goes_on = FairWorkers(1, "test"), threading.Event(), threading.Event()
    done, last = [], threading.Event()

    def first():
        begun.set()
        goes_on.wait(TIMEOUT)

    workers.submit(first, "flood")
    assert begun.wait(TIMEOUT) and not workers.crowded
    for number in range(100):
        workers.submit(lambda number=number: done.append(number), "flood")
    workers.submit(lambda: done.append("honest"), "honest")
    workers.submit(last.set, "flood")
    assert workers.crowded
    goes_on.set()
    assert last.wait(TIMEOUT)
    assert done == [0, "honest", *range(1, 100)]
    assert workers.shutdown(TIMEOUT)
    with pytest.raises(Stopped):
        workers.submit(first, "late")
    assert not workers._turns
