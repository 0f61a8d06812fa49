"""One thread reads the small answers of many targets, and each visit's own thread the rest."""

import contextlib
import errno
import queue
import socket
import threading
from types import SimpleNamespace

import pytest
from support import TIMEOUT, wait_until

from gotunnel import READ_SIZE, NoThread
from gotunnel_agent import answer_reader
from gotunnel_agent.answer_reader import Answer, AnswerReader
from gotunnel_agent.common.duplex import Duplex

pytestmark = pytest.mark.skipif(not hasattr(answer_reader.select, "epoll"), reason="no epoll")


class FakeStream:
    """A stream, and its session, that notes what it is offered."""

    def __init__(self, takes=True):
        self.session = self
        self.takes = takes
        self.offered = queue.SimpleQueue()
        self.flushed = queue.SimpleQueue()

    def offer(self, data):
        if self.takes:
            self.offered.put(bytes(data))
        return self.takes

    def flush(self):
        self.flushed.put(True)


class Visit:
    """A target, and a thread that reads its answer."""

    def __init__(self, reader, stream=None):
        raw, self.target = socket.socketpair()
        self.duplex = Duplex(raw)
        self.stream = stream or FakeStream()
        self.answer = Answer(self.duplex, self.stream, reader)
        self.read = queue.SimpleQueue()  # what read() has returned, or raised
        self.thread = threading.Thread(target=self._copy, daemon=True)
        self.thread.start()

    def _copy(self):
        try:
            while True:
                data = self.answer.read()
                self.read.put(data)
                if not data:
                    return
        except Exception as error:
            self.read.put(error)

    def close(self):
        self.duplex.reset()
        self.thread.join(TIMEOUT)
        self.target.close()
        self.duplex.close()


@pytest.fixture
def reader():
    reader = AnswerReader()
    yield reader
    reader.close()
    assert reader._thread is None or not reader._thread.is_alive()


@contextlib.contextmanager
def visit_of(reader, stream=None):
    visit = Visit(reader, stream)
    try:
        wait_until(lambda: reader._watched or not visit.read.empty())
        yield visit
    finally:
        visit.close()


def test_small_answers_go_to_the_stream_and_wake_no_thread_of_the_visit(reader):
    with visit_of(reader) as visit:
        for answer in (b"one", b"two"):
            visit.target.sendall(answer)
            assert visit.stream.offered.get(timeout=TIMEOUT) == answer
            assert visit.stream.flushed.get(timeout=TIMEOUT)
        assert visit.read.empty()


def test_what_the_stream_does_not_take_goes_to_the_thread_of_the_visit_and_in_order(reader):
    with visit_of(reader, FakeStream(takes=False)) as visit:
        visit.target.sendall(b"one")
        assert visit.read.get(timeout=TIMEOUT) == b"one"
        wait_until(lambda: reader._watched)
        visit.stream.takes = True
        visit.target.sendall(b"two")
        assert visit.stream.offered.get(timeout=TIMEOUT) == b"two"
        assert visit.read.empty()


def test_bulk_passes_in_order_whichever_thread_reads_it(reader):
    data = b"".join(number.to_bytes(4, "big") for number in range(4 * READ_SIZE))
    stream = FakeStream()
    with visit_of(reader, stream) as visit:
        stream.offered = visit.read  # what passes, by either thread
        threading.Thread(target=visit.target.sendall, args=(data,), daemon=True).start()
        passed = b""
        while len(passed) < len(data):
            passed += visit.read.get(timeout=TIMEOUT)
        assert passed == data


def test_a_read_that_is_full_is_not_offered_and_the_thread_reads_on():
    class Watching:
        """Watches an answer that is there already."""

        watched = 0

        def watch(self, answer):
            self.watched += 1
            assert not answer.take()
            answer.hand_over()
            return True

    reader, stream = Watching(), FakeStream()
    with contextlib.ExitStack() as stack:
        raw, target = map(stack.enter_context, map(contextlib.closing, socket.socketpair()))
        answer = Answer(Duplex(raw), stream, reader)
        target.sendall(b"x" * READ_SIZE + b"rest")
        assert answer.read() == b"x" * READ_SIZE
        assert answer.read() == b"rest"
        assert (reader.watched, stream.offered.empty()) == (1, True)


def test_the_end_of_the_answer_ends_the_reading(reader):
    with visit_of(reader) as visit:
        visit.target.close()
        assert visit.read.get(timeout=TIMEOUT) == b""


def test_a_reset_is_raised_in_the_thread_of_the_visit(reader):
    with visit_of(reader) as visit:
        visit.duplex.reset()
        assert isinstance(visit.read.get(timeout=TIMEOUT), ConnectionResetError)


def test_an_error_of_the_connection_is_raised_in_the_thread_of_the_visit(reader):
    def receive(size):
        raise TimeoutError("no answer to keepalive")

    with visit_of(reader) as visit:
        visit.duplex.receive, receives = receive, visit.duplex.receive
        visit.target.sendall(b"one")
        assert isinstance(visit.read.get(timeout=TIMEOUT), OSError)
        visit.duplex.receive = receives


def test_a_bug_ends_its_visit_and_no_other_one(reader):
    class Broken(FakeStream):
        def offer(self, data):
            raise ValueError("a bug")

    with visit_of(reader) as other, visit_of(reader, Broken()) as visit:
        wait_until(lambda: len(reader._watched) == 2)
        visit.target.sendall(b"one")
        assert isinstance(visit.read.get(timeout=TIMEOUT), ConnectionResetError)
        other.target.sendall(b"two")
        assert other.stream.offered.get(timeout=TIMEOUT) == b"two"


def test_after_close_each_thread_reads_its_answer_itself(reader):
    with visit_of(reader) as visit:
        reader.close()
        assert not reader.watch(visit.answer)
        visit.target.sendall(b"one")
        assert visit.read.get(timeout=TIMEOUT) == b"one"
        assert visit.stream.offered.empty()


def test_without_a_thread_of_the_reader_each_visit_has_its_own(reader, monkeypatch):
    def spawn(*arguments):
        raise NoThread("no further thread")

    monkeypatch.setattr(answer_reader, "spawn", spawn)
    with contextlib.closing(Visit(reader)) as visit:
        visit.target.sendall(b"one")
        assert visit.read.get(timeout=TIMEOUT) == b"one"


def test_without_epoll_each_visit_reads_itself(reader, monkeypatch):
    monkeypatch.delattr(answer_reader.select, "epoll")
    with contextlib.closing(Visit(reader)) as visit:
        visit.target.sendall(b"one")
        assert visit.read.get(timeout=TIMEOUT) == b"one"


@pytest.mark.parametrize("left", [0, 1])
def test_without_descriptors_for_the_reader_each_visit_reads_itself(reader, monkeypatch, left):
    """``left``: how many descriptors can be watched, the waker's among them."""
    real = answer_reader.select.epoll()

    def register(fd, events):
        nonlocal left
        if not left:
            raise OSError(errno.ENOSPC, "No space left on device")
        left -= 1
        real.register(fd, events)

    epoll = SimpleNamespace(register=register, poll=real.poll, close=real.close)
    monkeypatch.setattr(answer_reader.select, "epoll", lambda: epoll)
    with contextlib.closing(Visit(reader)) as visit:
        visit.target.sendall(b"one")
        assert visit.read.get(timeout=TIMEOUT) == b"one"
        assert not reader._watched
