"""Reads a small file of the operator's, such as a secret, and never waits for ever.

Opening a FIFO waits for its writer, and reading a pipe waits until all writers have closed it. A
program that hangs there starts, reloads and stops no more. So the writer has PIPE_TIMEOUT.
"""

import errno
import os
import selectors
import stat
from time import monotonic

PIPE_TIMEOUT = 10  # seconds in which the writer of a pipe has to come and to end


# Windows opens a file as text without O_BINARY.
FLAGS = os.O_RDONLY | sum(getattr(os, name, 0) for name in ("O_NONBLOCK", "O_CLOEXEC", "O_BINARY"))


def read(path: str | os.PathLike[str], most: int) -> bytes:
    """The content, or its first ``most`` bytes and one if it is longer. Raises OSError;
    ``strerror`` says why."""
    descriptor = os.open(path, FLAGS)
    try:
        mode = os.fstat(descriptor).st_mode
        if stat.S_ISDIR(mode):
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), os.fspath(path))
        if not stat.S_ISREG(mode):
            return _read_pipe(descriptor, most + 1)
        with open(descriptor, "rb", closefd=False) as file:
            return file.read(most + 1)
    finally:
        os.close(descriptor)


def read_whole(path: str | os.PathLike[str], most: int) -> bytes:
    """As read(), and raises OSError if the content is longer than ``most`` bytes."""
    content = read(path, most)
    if len(content) > most:
        raise OSError(errno.EFBIG, f"it has more than {most} bytes", os.fspath(path))
    return content


def is_pipe(path: str | os.PathLike[str]) -> bool:
    """Whether it is a FIFO, or a shell's pipe such as /dev/stdin: it gives its content once."""
    try:
        return stat.S_ISFIFO(os.stat(path).st_mode)
    except OSError:  # the reader says why
        return False


def _read_pipe(descriptor: int, most: int) -> bytes:
    deadline = monotonic() + PIPE_TIMEOUT
    content = b""
    with selectors.SelectSelector() as selector:  # epoll refuses devices such as /dev/null
        selector.register(descriptor, selectors.EVENT_READ)
        while len(content) < most:
            if not selector.select(max(0, deadline - monotonic())):
                raise OSError(errno.ETIMEDOUT, f"its writer did not end within {PIPE_TIMEOUT} s")
            data = os.read(descriptor, most - len(content))
            if not data:
                break
            content += data
    return content
