"""Sockets that can be read are told once, by epoll and by any other selector alike."""

import contextlib
import socket
import sys

import pytest
from support import TIMEOUT

from gotunnel_server.net import readable

EPOLL = pytest.mark.skipif(sys.platform != "linux", reason="this system has no epoll")


@pytest.fixture(params=[pytest.param("Epoll", marks=EPOLL), "Selector"])
def found(request):
    with contextlib.closing(getattr(readable, request.param)()) as found:
        yield found


@pytest.fixture
def pair():
    ours, theirs = socket.socketpair()
    with ours, theirs:
        yield ours, theirs


def test_a_socket_is_told_once_until_it_is_watched_again(found, pair):
    ours, theirs = pair
    found.watch_new(ours.fileno())
    assert found.wait(0) == []
    theirs.send(b"x")
    for _ in range(3):
        assert found.wait(TIMEOUT) == [ours.fileno()]
        assert found.wait(0) == []
        found.watch(ours.fileno())
    found.forget(ours.fileno())
    assert found.wait(0) == []
    found.watch(ours.fileno())
    assert found.wait(TIMEOUT) == [ours.fileno()]


def test_a_socket_may_be_told_again_and_again(found, pair):
    ours, theirs = pair
    found.watch_always(ours.fileno())
    theirs.send(b"x")
    for _ in range(3):
        assert found.wait(TIMEOUT) == [ours.fileno()]
    found.forget(ours.fileno())
    assert found.wait(0) == []


def test_a_closed_socket_cannot_be_watched(found, pair):
    ours, _ = pair
    ours.close()
    with pytest.raises((OSError, ValueError)):
        found.watch(ours.fileno())
