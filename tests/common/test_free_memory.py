"""Memory goes back to the system when a rush is over, and at no other time."""

import resource

import pytest
from support import wait_until

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


@pytest.mark.skipif(
    free_memory._trim_function() is None, reason="this C library has no malloc_trim"
)
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
