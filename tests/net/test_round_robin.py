"""RoundRobin by key: a queue that is long holds up nobody else's."""

import threading

import pytest
from support import TIMEOUT, wait_until

from gotunnel_agent.common.process import Stopped
from gotunnel_server.net.round_robin import FairWorkers, Gate, RoundRobin


def test_keys_take_turns_and_items_of_one_keep_their_order():
    turns = RoundRobin()
    for number in range(4):
        turns.put(("flood",), number)
    turns.put(("a",), "first")
    turns.put(("b",), "second")
    turns.put(("a",), "third")
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
    assert not workers._waiting


def test_a_job_that_comes_while_all_threads_work_is_done_by_the_next_that_is_free(caplog):
    workers, begun, goes_on = FairWorkers(1, "test"), threading.Event(), threading.Event()
    threads, last = [], threading.Event()

    def first():
        threads.append(threading.current_thread())
        begun.set()
        goes_on.wait(TIMEOUT)
        raise ValueError("a bug")

    def second():
        threads.append(threading.current_thread())
        last.set()

    workers.submit(first)
    assert begun.wait(TIMEOUT)
    assert not workers.waiting
    workers.submit(second)
    assert (workers.waiting, workers.crowded) == (1, True)
    goes_on.set()
    assert last.wait(TIMEOUT)
    assert len(set(threads)) == 1
    assert "a bug" in caplog.text
    wait_until(lambda: not workers._working)
    assert (workers.waiting, workers.crowded) == (0, False)
    last.clear()
    workers.submit(second)
    assert last.wait(TIMEOUT)
    assert workers.shutdown(TIMEOUT)


def test_keys_of_one_group_share_its_turn():
    turns = RoundRobin()
    for number in range(3):
        turns.put(("attacked", f"stranger {number}"), ("attacked", number))
        turns.put(("attacked", "stranger 0"), ("attacked", "again"))
    turns.put(("other", "a visitor"), "other")
    assert [turns.pop() for _ in range(3)] == [("attacked", 0), "other", ("attacked", 1)]
    assert [turns.pop()[1] for _ in range(4)] == [2, "again", "again", "again"]


class Waiting:
    """Threads that wait at a Gate, and in which order they get in."""

    def __init__(self, gate):
        self.gate, self.inside, self._threads = gate, [], []

    def come(self, group, key):
        """Whether there was a place to wait."""
        before, entered = self.gate._places, []

        def wait():
            entered.append(self.gate.enter(group, key))
            if entered[0]:
                self.inside.append((group, key))

        thread = threading.Thread(target=wait)
        thread.start()
        self._threads.append(thread)
        wait_until(lambda: entered or self.gate._places < before)
        return not entered

    def let_all_in(self):
        for _ in range(len([thread for thread in self._threads if thread.is_alive()])):
            count = len(self.inside)
            self.gate.leave()
            wait_until(lambda count=count: len(self.inside) > count)
        for thread in self._threads:
            thread.join(TIMEOUT)


def test_who_waits_at_a_gate_takes_turns_by_group_and_key():
    gate = Gate(1, 30)
    assert gate.enter("attacked", "stranger")
    waiting = Waiting(gate)
    for group, key in ("attacked", 1), ("attacked", 1), ("attacked", 2), ("other", 1):
        assert waiting.come(group, key)
    waiting.let_all_in()
    assert waiting.inside == [("attacked", 1), ("other", 1), ("attacked", 2), ("attacked", 1)]
    gate.leave()
    assert gate._free == 1 and gate._places == 30 and not gate._held


def test_of_the_places_at_a_gate_a_group_and_a_key_have_a_part():
    gate = Gate(1, 30)
    assert gate.enter("attacked", 0)
    waiting = Waiting(gate)
    one = sum(waiting.come("attacked", 0) for _ in range(30))
    others = sum(waiting.come("attacked", key) for key in range(1, 30))
    assert (one, one + others) == (4, 10)
    assert not gate.enter("attacked", 99)
    assert sum(waiting.come("other", key) for key in range(5)) == 5
    assert waiting.come("third", 0)
    waiting.let_all_in()
    gate.leave()
