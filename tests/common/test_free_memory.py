"""Memory goes back to the system when a rush is over, and at no other time."""

import resource
import subprocess
import sys

import pytest
from support import ROOT, wait_until

from gotunnel import BUFFERS
from gotunnel_agent.common import free_memory
from gotunnel_agent.common.free_memory import FALL, FreeMemory
from gotunnel_agent.common.process import free_buffers


@pytest.mark.parametrize(
    "loads, given_back",
    [
        ([1000, 1000, 400, 400], [False, False, True, False]),
        ([10, 50, 10], [False, False, False]),  # little to give
        ([10000, 9000, 6000, 9000], [False] * 4),  # it goes on
        ([5000, 900, 600, 300, 600, 0], [False, True, False, True, False, True]),
        ([0], [False]),
    ],
)
def test_a_rush_is_over_when_the_load_has_fallen_far(loads, given_back):
    left = iter(loads)
    memory = FreeMemory(lambda: next(left))
    memory._trim = lambda pad: None
    assert [memory.look() for _ in loads] == given_back


def test_what_the_end_of_a_rush_has_left_is_given_back_later(monkeypatch):
    monkeypatch.setattr(free_memory, "ONCE_MORE", 3)
    loads, freed = iter([1000, 40, 10, 10, 10, 10, 10, 10]), []
    memory = FreeMemory(lambda: next(loads), lambda: freed.append(1))
    memory._trim = lambda pad: None
    assert [memory.look() for _ in range(8)] == [False, True, False, False, True, *[False] * 3]
    assert len(freed) == 2


def test_the_unused_receive_buffers_of_a_process_can_be_freed():
    buffer = BUFFERS.take()
    BUFFERS.give_back(buffer)
    assert BUFFERS._spare
    free_buffers()
    assert not BUFFERS._spare
    assert len(BUFFERS.take()) == len(buffer)


def test_without_glibc_nothing_is_called(monkeypatch):
    monkeypatch.setattr(free_memory.sys, "platform", "win32")
    loads = iter([FALL, 0])
    memory = FreeMemory(lambda: next(loads))
    assert [memory.look(), memory.look()] == [False, True]


def resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * resource.getpagesize()


glibc_alone = pytest.mark.skipif(
    free_memory._of_glibc("malloc_trim") is None, reason="this C library has no malloc_trim"
)


@glibc_alone
def test_memory_goes_back_though_the_heap_cannot_shrink():
    loads = iter([FALL, 0])
    memory = FreeMemory(lambda: next(loads))
    blocks = [bytes(1500) for _ in range(40_000)]
    block_at_the_end = bytes(1500)
    memory.look()
    full = resident()
    del blocks
    memory.look()
    assert block_at_the_end
    wait_until(lambda: resident() < full - 30e6)


COUNT_ARENAS = """
import ctypes, sys, threading
from gotunnel_agent.common.free_memory import use_one_arena
use_one_arena()
all_at_once = threading.Barrier(6)
def allocate():
    blocks = [bytes(1500) for _ in range(1000)]
    all_at_once.wait()
threads = [threading.Thread(target=allocate) for _ in range(6)]
for thread in threads: thread.start()
for thread in threads: thread.join()
libc = ctypes.CDLL(None)
libc.fopen.restype = ctypes.c_void_p
file = ctypes.c_void_p(libc.fopen(sys.argv[1].encode(), b"w"))
libc.malloc_info(0, file)
libc.fclose(file)
"""


@glibc_alone
def test_all_threads_share_one_heap(tmp_path):
    told = tmp_path / "malloc.xml"
    subprocess.run((sys.executable, "-c", COUNT_ARENAS, told), cwd=ROOT, check=True)
    assert told.read_text().count("<heap nr=") == 1
