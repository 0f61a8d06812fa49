"""Waits until some of many sockets can be read, and tells each of them once.

A selector tells of a socket until it is unregistered. That takes two system calls a wait, and two
dozen calls in Python, where epoll does with one of each (EPOLLONESHOT).
"""

from __future__ import annotations

import select
import selectors
import sys

MOST_EVENTS = 1024  # told in one wait(); the others are told in the next one


class Epoll:
    """For Linux. Any thread may watch sockets while another one waits."""

    def __init__(self) -> None:
        self._epoll = select.epoll()
        self.close = self._epoll.close
        self.forget = self._epoll.unregister  # forget(fd): tell of it no more

    def watch_always(self, fd: int) -> None:
        """Tell of a socket in each wait() in which it can be read, until forget()."""
        self._epoll.register(fd, select.EPOLLIN)

    def watch_new(self, fd: int) -> None:
        """As watch(), for a socket that was not watched before."""
        self._epoll.register(fd, select.EPOLLIN | select.EPOLLONESHOT)

    def watch(self, fd: int) -> None:
        """Tell of a socket once. A socket that is closed is forgotten. Raises OSError or ValueError
        if it is closed already."""
        try:
            self._epoll.modify(fd, select.EPOLLIN | select.EPOLLONESHOT)
        except FileNotFoundError:
            self.watch_new(fd)

    def wait(self, timeout: float | None) -> list[int]:
        """The descriptors of sockets that can be read; [] after ``timeout`` seconds."""
        return [fd for fd, _ in self._epoll.poll(timeout, MOST_EVENTS)]


class Selector:
    """The same for other systems. A closed socket must be forgotten, or told of, first."""

    def __init__(self) -> None:
        self._selector = selectors.DefaultSelector()
        self._always: set[int] = set()
        self.close = self._selector.close

    def watch_always(self, fd: int) -> None:
        self._always.add(fd)
        self.watch(fd)

    def watch(self, fd: int) -> None:
        self._selector.register(fd, selectors.EVENT_READ)

    watch_new = watch

    def forget(self, fd: int) -> None:
        self._always.discard(fd)
        self._selector.unregister(fd)

    def wait(self, timeout: float | None) -> list[int]:
        told = [key.fd for key, _ in self._selector.select(timeout)]
        for fd in told:
            if fd not in self._always:
                self._selector.unregister(fd)
        return told


Readable = Epoll if sys.platform == "linux" else Selector
