"""A thread that looks now and then: it goes on whatever a look raises, and ends when it should."""

import queue
import threading

import pytest
from support import TIMEOUT

from gotunnel_server.watcher import Watcher


@pytest.fixture
def watch():
    """watch(look, seconds): a Watcher that runs."""
    watchers = []

    def start(look, seconds=TIMEOUT):
        watchers.append(Watcher("watched", look, seconds))
        watchers[-1].start()
        return watchers[-1]

    yield start
    for watcher in watchers:
        watcher.stop()
        watcher.join(TIMEOUT)
    assert "watched" not in {thread.name for thread in threading.enumerate()}


def test_a_look_comes_in_time_and_at_once_when_asked(watch):
    looks = queue.Queue()
    watch(looks.put, 0.01)
    assert [looks.get(timeout=TIMEOUT) for _ in range(2)] == [False, False]
    patient = watch(looks.put)
    while not looks.get(timeout=TIMEOUT):
        patient.ask()


def test_a_look_that_raises_is_logged_and_the_next_one_comes(watch, caplog):
    looks = queue.Queue()

    def fail(asked):
        looks.put(asked)
        raise RuntimeError("a bug")

    watch(fail, 0.01)
    for _ in range(3):
        looks.get(timeout=TIMEOUT)
    line = "watched: the check for changes failed (bug, traceback follows); next try in 0.01 s"
    assert line in caplog.text and "RuntimeError: a bug" in caplog.text


def test_nothing_is_looked_at_after_the_end(watch):
    looks = queue.Queue()
    watcher = watch(looks.put)
    watcher.stop()
    watcher.join(TIMEOUT)
    watcher.ask()
    assert looks.empty()


def test_a_look_that_hangs_is_not_waited_for_longer_than_told(watch):
    hangs, go_on = threading.Event(), threading.Event()

    def hang(asked):
        hangs.set()
        go_on.wait(TIMEOUT)

    watcher = watch(hang, 0.01)
    assert hangs.wait(TIMEOUT)
    watcher.stop()
    watcher.join(0.01)
    assert "watched" in {thread.name for thread in threading.enumerate()}
    go_on.set()
