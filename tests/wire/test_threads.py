"""The threads of the wire, what wakes them, and the memory that all sessions share."""

import contextlib
import os
import selectors
import socket
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from support import wait_until

import gotunnel
from gotunnel import Bell, NoThread, Waker, spawn


def no_more_threads(monkeypatch):
    def refuse(thread):
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", refuse)


def test_spawn_says_by_an_oserror_that_there_is_no_thread(monkeypatch):
    no_more_threads(monkeypatch)
    with pytest.raises(NoThread, match=r"no further thread .*can't start.*ulimit -u"):
        spawn("never", print)


def test_a_thread_logs_what_ends_it_under_its_name(caplog):
    spawn("test thread", lambda: 1 / 0).join(10)
    assert "thread test thread: " in caplog.text and "ZeroDivisionError" in caplog.text


def test_a_waker_wakes_a_selector_until_it_is_cleared():
    with contextlib.closing(Waker()) as waker, selectors.DefaultSelector() as selector:
        selector.register(waker, selectors.EVENT_READ)
        assert not selector.select(0)
        for _ in range(100_000):  # more than the socket pair holds: nobody waits for it
            waker.wake()
        assert selector.select(0)
        while selector.select(0):
            waker.clear()
        waker.wake()
        assert selector.select(0)


def test_a_waker_that_was_closed_writes_to_no_other_descriptor():
    waker = Waker()
    waker.close()
    with socket.create_server(("127.0.0.1", 0)):  # takes the free number
        waker.wake()
    waker.close()


def test_a_bell_wakes_one_thread_after_the_other_and_keeps_what_is_left_of_the_time():
    lock, left, changed = threading.Lock(), [], []
    bell = Bell(lock)

    def wait(timeout):
        with lock:
            while not changed:
                timeout = bell.wait(timeout)
            left.append(timeout)
            bell.ring()

    with ThreadPoolExecutor(3) as pool:
        waits = [pool.submit(wait, timeout) for timeout in (None, 60, 60)]
        wait_until(lambda: bell.waiting == 3)
        bell.ring()
        bell.ring()  # in vain, and it does no harm
        with lock:
            changed.append(True)
        bell.ring()
        for done in waits:
            done.result(10)
    assert bell.waiting == 0 and left.count(None) == 1
    assert all(0 < seconds < 60 for seconds in left if seconds is not None)


@pytest.mark.parametrize("timeout", [0, -1, 0.01])
def test_a_bell_that_nobody_rings_ends_the_wait_with_the_lock_held(timeout):
    lock = threading.Lock()
    bell = Bell(lock)
    bell.ring()  # nobody waits: it is not kept
    with lock:
        with pytest.raises(TimeoutError):
            bell.wait(timeout)
        assert lock.locked()
    assert bell.waiting == 0


@pytest.mark.parametrize(("limit", "memory"), [("max", 8), (str(5 << 20), 5), (str(1 << 62), 8)])
def test_memory_is_the_machines_or_less_if_a_container_has_less(
    monkeypatch, tmp_path, limit, memory
):
    monkeypatch.setattr(os, "sysconf", {"SC_PHYS_PAGES": 2048, "SC_PAGE_SIZE": 4096}.get)
    path = tmp_path / "memory.max"
    path.write_text(limit + "\n")
    monkeypatch.setattr(gotunnel, "CGROUP_LIMITS", (str(tmp_path / "missing"), str(path)))
    assert gotunnel.machine_memory() == memory << 20


def test_sessions_share_one_memory_which_many_threads_may_ask_for_first(monkeypatch):
    monkeypatch.setattr(gotunnel, "_process_memory", None)
    with ThreadPoolExecutor(8) as pool:
        found = set(pool.map(lambda _: gotunnel.process_memory(), range(8)))
    assert len(found) == 1 and found.pop().limit == gotunnel.machine_memory() // 4


def test_an_import_of_the_wire_reads_no_file():
    """But Python's own, and the code itself."""
    program = """
import sys
opened = []
sys.addaudithook(lambda event, args: opened.append(args[0]) if event == "open" else None)
import gotunnel
print(*(name for name in opened if not str(name).endswith((".py", ".pyc"))), sep=",")
"""
    root = Path(gotunnel.__file__).parent
    ran = subprocess.run(
        [sys.executable, "-c", program], cwd=root, capture_output=True, text=True, timeout=60
    )
    assert (ran.stdout, ran.stderr) == ("\n", "")
