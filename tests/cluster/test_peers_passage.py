"""A visit that one gateway passes on to its agent, stream by stream, without gateways.

Two sessions: over the one the other gateway opens streams, over the other one the agent serves.
The Passage is between them.
"""

import contextlib
import gc
import threading
import weakref
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
from raw_peer import noise, session_pair
from support import MIB, wait_until

from gotunnel import (
    REFUSED,
    START_WINDOW,
    Ends,
    ProtocolError,
    SessionClosed,
    StreamReset,
    encode_data_header,
    read_data_header,
)
from gotunnel_agent.common import refusals
from gotunnel_agent.common.process import Workers
from gotunnel_server.cluster import passage as passage_module
from gotunnel_server.cluster.passage import Passages
from gotunnel_server.routes import AgentBusy, Registry, Route

APP = "app.test"
PATIENCE = 20  # seconds for what takes milliseconds
ENDS = Ends(("192.0.2.1", 7), ("192.0.2.80", 443))


class Tunnel:
    """An agent of this gateway, whose streams are of ``session``."""

    half_close = upgrades = True
    unwell = {}

    def __init__(self, session):
        self.session = session
        self.problems = []  # raised by the next open()

    def open(self, route, ends, first=b"", relayed=False, timeout=10):
        if self.problems:
            raise self.problems.pop(0)
        header = encode_data_header(route.hostname, ends() if route.addressed else None, relayed)
        return self.session.open(header + first, timeout)


@contextlib.contextmanager
def bench(**route):
    """The gateway in the middle: ``open(...)`` opens a stream as the other gateway does, and
    ``accept()`` is the agent's, behind its data header."""
    workers, registry = Workers(2, "passage"), Registry()
    passages = Passages(registry, workers.submit)
    with session_pair() as (other, peer), session_pair() as (gateway, agent):
        tunnel = Tunnel(gateway)
        registry.claim({APP: Route("App.Test", "http", tunnel, **route)})

        def open_(first=b"", header=encode_data_header(APP)):
            stream = other.open(header + first)
            passages.begin(peer.accept(PATIENCE))
            return stream

        def accept():
            stream = agent.accept(PATIENCE)
            asked = read_data_header(lambda count: stream.read_exactly(count, PATIENCE))
            return stream, asked

        yield SimpleNamespace(
            open=open_, accept=accept, tunnel=tunnel, passages=passages, registry=registry,
            other=other, agent=agent, peer=peer,
        )  # fmt: skip
    wait_until(lambda: not passages.running)
    assert workers.shutdown(PATIENCE)


def read_all(stream):
    parts = []
    while data := stream.read(timeout=PATIENCE):
        parts.append(data)
    return b"".join(parts)


def test_bytes_go_both_ways_and_half_closes_too():
    with bench() as here:
        visit = here.open(b"question")
        stream, asked = here.accept()
        assert asked == ("App.Test", None, False)  # as the agent spells it
        assert stream.read_exactly(8, PATIENCE) == b"question"
        visit.finish()
        assert stream.read(timeout=PATIENCE) == b""
        stream.write(b"answer")
        stream.finish()
        assert read_all(visit) == b"answer"
        wait_until(lambda: not here.passages.running)
        assert not here.other.streams_in_use() and not here.agent.streams_in_use()


def test_the_header_may_come_byte_by_byte():
    with bench() as here:
        header = encode_data_header(APP)
        visit = here.open(header=header[:1])
        for at in range(1, len(header)):
            visit.write(header[at : at + 1])
        visit.write(b"?")
        stream, _ = here.accept()
        assert stream.read_exactly(1, PATIENCE) == b"?"


@pytest.mark.parametrize(
    ("ends", "relayed", "knows", "expected"),
    [
        (ENDS, False, True, ("App.Test", ENDS, False)),
        (ENDS, True, True, ("App.Test", ENDS, True)),
        (ENDS, True, False, ("App.Test", ENDS, False)),
    ],
)
def test_the_visitors_address_and_the_kind_of_relay_go_along(ends, relayed, knows, expected):
    with bench(addressed=True) as here:
        here.tunnel.upgrades = knows
        here.open(header=encode_data_header(APP, ends, relayed))
        assert here.accept()[1] == expected


@pytest.mark.parametrize("size", [1, passage_module.FIRST, passage_module.FIRST + 1, 200 * 1024])
def test_what_came_with_the_header_arrives_once_and_in_order(size):
    data = noise(size)
    with bench() as here:
        visit = here.open(data)
        visit.finish()
        stream, _ = here.accept()
        assert read_all(stream) == data


def test_a_reader_that_stops_stops_the_sender():
    """Between them are two windows and a piece; the rest of the answer waits at its sender."""
    with bench() as here:
        visit = here.open()
        stream, _ = here.accept()
        piece, count = noise(64 * 1024), 0
        with pytest.raises(TimeoutError):
            while count < 64 * MIB:
                stream.write(piece, timeout=0.2)
                count += len(piece)
        assert count <= 4 * START_WINDOW
        got = 0
        while got < count:  # what was sent arrives, and then there is room again
            got += len(visit.read(timeout=PATIENCE))
        stream.write(b"more", timeout=PATIENCE)


def test_a_long_upload_and_a_long_answer_pass_at_the_same_time():
    data = noise(4 * MIB)
    with bench() as here, ThreadPoolExecutor(3) as pool:
        visit = here.open()
        stream, _ = here.accept()
        up, down = pool.submit(read_all, stream), pool.submit(read_all, visit)
        answer = pool.submit(lambda: (stream.write(data[::-1]), stream.finish()))
        visit.write(data)
        visit.finish()
        answer.result()
        assert (up.result(), down.result()) == (data, data[::-1])


@pytest.mark.parametrize(
    ("code", "told"),
    [(REFUSED, REFUSED), (2, 2), (5, 5), (refusals.GONE.code, 0), (77, 0), (0, 0)],
)
def test_the_code_of_an_agents_refusal_is_passed_on(code, told):
    """But not one that only gateways use: an agent could pretend that it got nothing."""
    with bench() as here:
        visit = here.open(b"question")
        stream, _ = here.accept()
        stream.reset(code=code)
        with pytest.raises(StreamReset) as caught:
            visit.read(timeout=PATIENCE)
        assert caught.value.code == told
        assert visit.refused is (told == REFUSED)


def test_what_came_before_an_agents_reset_arrives_and_then_the_reset():
    with bench() as here:
        visit = here.open()
        stream, _ = here.accept()
        stream.write(b"the first part")
        stream.cut()
        assert visit.read_exactly(14, PATIENCE) == b"the first part"
        with pytest.raises(StreamReset) as caught:
            visit.read(timeout=PATIENCE)
        assert caught.value.code == 0


def test_a_visitor_that_leaves_resets_the_agents_stream():
    with bench() as here:
        visit = here.open(b"?")
        stream, _ = here.accept()
        stream.read_exactly(1, PATIENCE)
        visit.reset()
        with pytest.raises(StreamReset):
            stream.read(timeout=PATIENCE)


def test_a_visitor_that_leaves_ends_also_what_the_agent_does_not_read():
    with bench() as here:
        visit = here.open()
        stream, _ = here.accept()
        with contextlib.suppress(TimeoutError):
            while True:
                visit.write(bytes(64 * 1024), timeout=0.2)
        visit.reset()
        wait_until(lambda: not here.passages.running)
        with pytest.raises(StreamReset):
            while stream.read(timeout=PATIENCE):
                pass


@pytest.mark.parametrize("end", ["agent", "peer", "other"])
def test_the_end_of_a_session_ends_both_streams(end):
    with bench() as here:
        visit = here.open(b"?")
        stream, _ = here.accept()
        getattr(here, end).close("the test ends it")
        with pytest.raises((StreamReset, SessionClosed)) as caught:
            visit.read(timeout=PATIENCE)
        if end == "agent":
            assert caught.value.code == refusals.AGENT_GONE.code
        with pytest.raises((StreamReset, SessionClosed)):
            while stream.read(timeout=PATIENCE):
                pass


@pytest.mark.parametrize(
    ("problems", "code"),
    [
        ([AgentBusy("as many as it may")], refusals.AGENT_LIMIT.code),
        ([SessionClosed("gone")], refusals.GONE.code),
        ([StreamReset("in the header")], refusals.AGENT_GONE.code),
        ([TimeoutError()] * 9, refusals.AGENT_BUSY.code),
    ],
)
def test_why_an_agent_gets_no_stream_is_told(problems, code, monkeypatch):
    monkeypatch.setattr(passage_module, "OPEN_TIMEOUT", 0.03)
    monkeypatch.setattr(passage_module, "OPEN_LOOK", 0.01)
    with bench() as here:
        here.tunnel.problems += problems
        visit = here.open(b"?")
        with pytest.raises(StreamReset) as caught:
            visit.read(timeout=PATIENCE)
        assert caught.value.code == code


def test_an_agent_that_is_busy_for_a_moment_gets_the_visit():
    with bench() as here:
        here.tunnel.problems += [TimeoutError(), TimeoutError()]
        here.open(b"question")
        stream, _ = here.accept()
        assert stream.read_exactly(8, PATIENCE) == b"question"


@pytest.mark.parametrize(
    "header",
    [
        encode_data_header("unknown.test"),
        encode_data_header("x" * 300),
        encode_data_header("elsewhere.test"),  # never passed on twice
        encode_data_header("addressed.test"),  # without an address
    ],
)
def test_a_visit_that_no_agent_here_can_get_is_refused_at_once(header):
    with bench() as here:
        here.registry.put_elsewhere({"elsewhere.test": Route("elsewhere.test", "http", None)})
        here.registry.claim({
            "addressed.test": Route("addressed.test", "tcp", here.tunnel, addressed=True)
        })  # fmt: skip
        visit = here.open(b"?", header=header)
        with pytest.raises(StreamReset) as caught:
            visit.read(timeout=PATIENCE)
        assert caught.value.code == refusals.GONE.code


@pytest.mark.parametrize("header", [b"\x09\x00\x01a", b"\x02\x00\x01a", b"\x01\x00\x02\xff\xff"])
def test_a_header_that_breaks_the_rules_is_refused(header):
    with bench() as here, pytest.raises((StreamReset, ProtocolError)):
        here.open(header=header).read(timeout=PATIENCE)


def test_a_header_that_does_not_come_is_not_awaited_for_ever(monkeypatch):
    monkeypatch.setattr(passage_module, "HEADER_TIMEOUT", 0.02)
    with bench() as here, pytest.raises(StreamReset):
        here.open(header=b"\x01").read(timeout=PATIENCE)


def test_an_idle_passage_has_no_thread():
    with bench() as here:
        visits = [here.open(b"?") for _ in range(50)]
        streams = [here.accept()[0] for _ in visits]
        for stream in streams:
            assert stream.read_exactly(1, PATIENCE) == b"?"
        assert here.passages.running == 50
        assert sum(t.name.startswith("passage") for t in threading.enumerate()) <= 2


def test_a_passage_that_is_over_is_not_kept_in_memory():
    with bench() as here:
        visit = here.open(b"?")
        stream, _ = here.accept()
        passage = weakref.ref(next(iter(here.passages._running)))
        gc.disable()
        try:
            visit.reset()
            wait_until(lambda: passage() is None)
        finally:
            gc.enable()
        with pytest.raises(StreamReset):
            while stream.read(timeout=PATIENCE):
                pass
