"""Visits that take their time, through a real gateway and agent: long uploads, downloads that pause
or trickle, and visitors that go on sending after their answer."""

import contextlib
import threading
import time

import pytest
from support import (
    APP,
    CUT,
    MIB,
    RAW,
    agent_here,
    answer,
    fields_of,
    gateway_here,
    request,
    status_of,
    wait_until,
)

from gotunnel_server.net import listener
from gotunnel_server.visitors import connection, http1_server
from gotunnel_server.visitors import work as work_module
from gotunnel_server.visitors.work import Work

CHUNKED = "Transfer-Encoding: chunked"
CHUNKS = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
UNTIL_CLOSE = b"HTTP/1.0 200 OK\r\n\r\n"


@pytest.fixture
def serving(cache, tmp_path, origin):
    """A function that makes a gateway with a changed environment, and has an agent serve APP."""
    with contextlib.ExitStack() as stack:

        def make(stall_timeout=None, **changes):
            gateway = stack.enter_context(gateway_here(cache, **changes))
            stack.enter_context(
                agent_here(gateway, tmp_path, http={APP: origin.port}, stall_timeout=stall_timeout)
            )
            return gateway

        yield make


def begin(gateway, origin, *fields, method="POST", version="HTTP/1.1"):
    visitor = gateway.dial(APP)
    sent = request(method, "/", *fields)
    visitor.send(sent.replace(b"HTTP/1.1", version.encode(), 1))
    target = origin.accept()
    target.read_head()
    return visitor, target


def code_of(head):
    return [line.split(": ")[1] for line in fields_of(head) if line.startswith("x-gotunnel-e")]


# Uploads -----------------------------------------------------------------------------------------


def test_upload_may_take_longer_than_an_answer(serving, origin):
    gateway = serving(RESPONSE_TIMEOUT="0.6")
    visitor, target = begin(gateway, origin, "Content-Length: 20000")
    with visitor:
        for _ in range(20):
            visitor.send(bytes(1000))
            time.sleep(0.05)
        target.read_exactly(20000)
        time.sleep(0.2)
        target.send(answer(b"thank you"))
        assert visitor.read_message()[1] == b"thank you"


def test_target_has_its_time_once_the_upload_is_whole(serving, origin):
    gateway = serving(RESPONSE_TIMEOUT="0.3")
    visitor, target = begin(gateway, origin, "Content-Length: 1000")
    with visitor:
        time.sleep(0.6)
        visitor.send(bytes(1000))
        head, _ = visitor.read_message()
        assert (status_of(head), code_of(head)) == (504, ["timed-out"])


def test_visitor_waits_as_long_as_the_target_for_its_continue(serving, origin):
    gateway = serving(IDLE_TIMEOUT="0.3")
    visitor, target = begin(gateway, origin, "Content-Length: 5", "Expect: 100-continue")
    with visitor:
        time.sleep(0.7)
        target.send(b"HTTP/1.1 100 Continue\r\n\r\n")
        assert status_of(visitor.read_head()) == 100
        visitor.send(b"hello")
        assert target.read_exactly(5) == b"hello"
        target.send(answer(b"ok"))
        assert visitor.read_message()[1] == b"ok"


def test_visitor_that_stops_in_its_body_is_a_408(serving, origin):
    gateway = serving(IDLE_TIMEOUT="0.3")
    visitor, target = begin(gateway, origin, "Content-Length: 5")
    with visitor:
        visitor.send(b"hell")
        head, _ = visitor.read_message()
        assert (status_of(head), code_of(head)) == (408, ["body-timeout"])
        assert "connection: close" in fields_of(head)
        with contextlib.suppress(ConnectionResetError):
            while target.read():
                pass


@pytest.mark.parametrize("workers", ["2", "128"])
def test_body_that_trickles_makes_room_only_while_others_need_it(serving, origin, workers):
    gateway = serving(IDLE_TIMEOUT="0.5", WORKERS=workers)
    visitor, target = begin(gateway, origin, "Content-Length: 100000")
    answered = threading.Event()

    def trickle():
        with contextlib.suppress(OSError):
            while not answered.wait(0.05):
                visitor.send(b"x")

    with visitor:
        thread = threading.Thread(target=trickle)
        thread.start()
        try:
            if workers == "2":
                head, _ = visitor.read_message()
                assert (status_of(head), code_of(head)) == (408, ["body-timeout"])
            else:
                visitor.sock.settimeout(1.2)
                with pytest.raises(TimeoutError):
                    visitor.read()
        finally:
            answered.set()
            thread.join()


def test_visitor_that_is_silent_while_its_answer_streams_is_not_idle(serving, origin):
    gateway = serving(IDLE_TIMEOUT="0.6")
    visitor, target = begin(gateway, origin, CHUNKED)
    with visitor:
        target.send(CHUNKS)
        visitor.read_head()
        for _ in range(10):
            target.send(b"2\r\nok\r\n")
            assert visitor.read_exactly(7) == b"2\r\nok\r\n"
            time.sleep(0.1)
        visitor.send(b"0\r\n\r\n")
        assert target.read_until(b"0\r\n\r\n")
        target.send(b"0\r\n\r\n")
        assert visitor.read_exactly(5) == b"0\r\n\r\n"


# Downloads ---------------------------------------------------------------------------------------

SIZE = 24 * MIB  # more than lies between a target and a visitor that does not read


def send_all(target, framing):
    """A thread in which the target sends its answer of SIZE bytes, and closes."""

    def send():
        with contextlib.suppress(OSError):
            target.send(framing)
            for _ in range(SIZE // MIB):
                target.send(b"%x\r\n" % MIB + bytes(MIB) + b"\r\n" if framing is CHUNKS
                            else bytes(MIB))  # fmt: skip
            if framing is CHUNKS:
                target.send(b"0\r\n\r\n")
            target.finish()

    thread = threading.Thread(target=send)
    thread.start()
    return thread


def test_download_may_pause_for_longer_than_an_idle_visitor(serving, origin):
    gateway = serving(IDLE_TIMEOUT="0.3")
    visitor, target = begin(gateway, origin, method="GET", version="HTTP/1.0")
    with visitor:
        sending = send_all(target, UNTIL_CLOSE)
        visitor.read_head()
        time.sleep(0.7)
        assert len(visitor.read_to_end()) == SIZE
        sending.join()


@pytest.mark.parametrize("framing", [UNTIL_CLOSE, CHUNKS], ids=["until close", "chunks"])
@pytest.mark.parametrize("version", ["HTTP/1.0", "HTTP/1.1"])
def test_download_that_pauses_too_long_is_reset_and_logged(
    serving, origin, caplog, version, framing
):
    gateway = serving(STALL_TIMEOUT="1")
    visitor, target = begin(gateway, origin, method="GET", version=version)
    with visitor:
        sending = send_all(target, framing)
        visitor.read_head()
        wait_until(lambda: "is reset, its visitor read nothing for 1 s" in caplog.text)
        with pytest.raises(CUT):
            visitor.read_to_end()
        sending.join()
    assert caplog.text.count("is reset, its visitor read nothing") == 1


def test_download_of_a_slow_reader_goes_on(serving, origin):
    """The socket is writable again only after megabytes were read, which takes far longer."""
    gateway = serving(STALL_TIMEOUT="1")
    visitor, target = begin(gateway, origin, method="GET", version="HTTP/1.0")
    with visitor:
        sending = send_all(target, UNTIL_CLOSE)
        visitor.read_head()
        read = 0
        for _ in range(15):
            deadline = time.monotonic() + 0.1
            read += len(visitor.read_exactly(100_000))
            time.sleep(max(0, deadline - time.monotonic()))
        assert read + len(visitor.read_to_end()) == SIZE
        sending.join()


@pytest.mark.parametrize("workers", ["2", "128"])
def test_reader_that_trickles_makes_room_only_while_others_need_it(
    serving, origin, caplog, monkeypatch, workers
):
    monkeypatch.setattr(http1_server, "LEAST_BYTE_RATE", 10 * MIB)
    gateway = serving(STALL_TIMEOUT="1", WORKERS=workers)
    visitor, target = begin(gateway, origin, method="GET", version="HTTP/1.0")
    with visitor:
        sending = send_all(target, UNTIL_CLOSE)
        visitor.read_head()
        with contextlib.nullcontext() if workers == "128" else pytest.raises(CUT):
            for _ in range(15):
                visitor.read_exactly(100_000)
                time.sleep(0.1)
            visitor.read_to_end()
        sending.join()
    assert ("bytes a second for 1 s" in caplog.text) is (workers == "2")


def test_visitor_in_tcp_mode_that_reads_nothing_is_reset_and_logged(
    cache, tmp_path, origin, caplog
):
    with gateway_here(cache, STALL_TIMEOUT="1") as gateway:
        with agent_here(gateway, tmp_path, tcp={RAW: origin.port}), gateway.dial(RAW) as visitor:
            visitor.send(b"hello")
            target = origin.accept()
            target.read_exactly(5)
            sending = send_all(target, b"")
            wait_until(lambda: "reset: the peer has stopped reading, nothing for 1 s"
                       in caplog.text)  # fmt: skip
            with pytest.raises(CUT):
                visitor.read_to_end()
            sending.join()


def test_agent_has_a_stall_timeout_of_its_own(serving, origin, caplog):
    gateway = serving(stall_timeout="1")
    visitor, target = begin(gateway, origin, method="GET", version="HTTP/1.0")
    with visitor:
        sending = send_all(target, UNTIL_CLOSE)
        visitor.read_head()
        wait_until(lambda: "the peer read nothing of it for 1 s" in caplog.text)
        with pytest.raises(CUT):
            visitor.read_to_end()
        sending.join()


def test_page_that_does_not_fit_is_reset():
    """Part of a page must not look complete, also when no exchange is there to reset it."""

    class Full:
        events = []

        def write_last(self, data, timeout, spend):
            raise TimeoutError("the peer has stopped reading")

        def reset(self):
            self.events.append("reset")

    handler = http1_server.Handler(
        Full(), ("192.0.2.1", 1), site=None, scheme="https", sni=None, proxies=(), owner=None,
        claim_relay=None, is_draining=lambda: False, is_crowded=lambda: False, idle_timeout=1,
        response_timeout=1, stall_timeout=0,
    )  # fmt: skip
    with pytest.raises(TimeoutError):
        handler.send_page(http1_server.pages.error(503, "gateway-busy", "Full."), last=True)
    assert Full.events == ["reset"]


# After an early answer ---------------------------------------------------------------------------


def refuse(target):
    """Answer before the body has come, and hang up in order, as servers do."""
    target.send(answer(b"too large", "Connection: close", status="413 Content Too Large"))
    target.finish()


def test_early_refusal_reaches_a_visitor_that_sends_on_for_long(serving, origin, monkeypatch):
    """For longer than one that has fallen silent is waited for."""
    monkeypatch.setattr(connection, "PARTING_TIMEOUT", 0.5)
    gateway = serving()
    visitor, target = begin(gateway, origin, "Content-Length: 100000000")
    with visitor:
        refuse(target)
        for _ in range(20):
            visitor.send(bytes(10_000))
            time.sleep(0.05)
        head, page = visitor.read_message()
        assert (status_of(head), page) == (413, b"too large")
        assert visitor.read_to_end() == b""


def test_visitor_that_sends_on_holds_no_worker(serving, origin):
    gateway = serving(WORKERS="1")
    visitor, target = begin(gateway, origin, "Content-Length: 100000000")
    with visitor, gateway.dial(APP) as other:
        refuse(target)
        visitor.read_message()
        room = gateway.inner._visitors.exchanges.room
        began = time.monotonic()
        while room.crowded():
            visitor.send(bytes(10_000))
            time.sleep(0.01)
        assert time.monotonic() - began < connection.PARTING_TIME / 3
        other.send(request("GET", "/next"))
        target = origin.accept()
        target.read_head()
        target.send(answer(b"next"))
        assert other.read_message()[1] == b"next"
        visitor.send(bytes(10_000))  # it is still there


@pytest.mark.parametrize("constant", ["PARTING_TIME", "PARTING_TIMEOUT", "MAX_PARTING"])
def test_visitor_that_sends_on_has_its_time_and_no_more(serving, origin, monkeypatch, constant):
    """A total limit, a limit for silence, and shorter ones if many visitors do so."""
    monkeypatch.setattr(listener, "SWEEP", 0.05)
    monkeypatch.setattr(connection, "FULL_PARTING_TIME", 0.3)
    gateway = serving()
    if constant == "MAX_PARTING":
        gateway.inner._visitors.parting.most = 0
    else:
        monkeypatch.setattr(connection, constant, 0.3)
    visitor, target = begin(gateway, origin, "Content-Length: 100000000")
    with visitor:
        refuse(target)
        visitor.read_message()
        began = time.monotonic()
        if constant == "PARTING_TIMEOUT":
            wait_until(lambda: not gateway.inner._visitors._visitors)
        else:
            with pytest.raises((*CUT, OSError)):
                while True:
                    visitor.send(bytes(1000))
                    time.sleep(0.01)
        assert 0.2 < time.monotonic() - began < 4
    wait_until(lambda: not gateway.inner._visitors.parting._taken)


def test_visitor_that_leaves_after_its_answer_is_not_waited_for(serving, origin):
    gateway = serving()
    visitor, target = begin(gateway, origin, "Content-Length: 100000000")
    refuse(target)
    visitor.read_message()
    wait_until(lambda: gateway.inner._visitors.parting._taken)
    visitor.close()
    wait_until(lambda: not gateway.inner._visitors.parting._taken, 3)


# Visitors that cause much work with few bytes ----------------------------------------------------


@pytest.fixture
def little_work(monkeypatch):
    """The budget of a body is spent soon, and grows slowly."""
    monkeypatch.setattr(http1_server, "WORK_BURST", 1000)
    monkeypatch.setattr(http1_server, "WORK_RATE", 1000)


def test_body_of_tiny_chunks_is_slowed_and_arrives(serving, origin, little_work):
    gateway = serving()
    visitor, target = begin(gateway, origin, CHUNKED)
    with visitor:
        began = time.monotonic()
        visitor.send(b"1\r\nx\r\n" * 2000 + b"0\r\n\r\n")
        body = b""
        while size := int(target.read_until(b"\r\n"), 16):
            body += target.read_exactly(size)
            target.read_exactly(2)
        assert body == b"x" * 2000 and time.monotonic() - began > 0.7
        target.send(answer(b"ok"))
        assert visitor.read_message()[1] == b"ok"


def test_answer_of_tiny_chunks_is_slowed_and_arrives(serving, origin, monkeypatch):
    slept = []
    monkeypatch.setattr(work_module, "sleep", slept.append)
    visitor, target = begin(serving(), origin, "Content-Length: 0")
    with visitor:
        target.send(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
        target.send(b"1\r\nx\r\n" * 20_000 + b"0\r\n\r\n")
        assert visitor.read_message()[1] == b"x" * 20_000
    assert 0.5 < max(slept) < 2  # 15 000 more than there may be at once


def test_answer_of_larger_chunks_is_not_slowed(serving, origin, monkeypatch):
    monkeypatch.setattr(work_module, "sleep", lambda seconds: pytest.fail("slowed"))
    visitor, target = begin(serving(), origin, "Content-Length: 0")
    with visitor:
        target.send(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
        body = (b"800\r\n" + bytes(2048) + b"\r\n") * 10_000 + b"0\r\n\r\n"
        sending = threading.Thread(target=target.send, args=[body])
        sending.start()
        assert len(visitor.read_message()[1]) == 2048 * 10_000
        sending.join()


def test_body_of_tiny_segments_takes_few_reads(serving, origin, little_work, monkeypatch):
    reads = []
    spend = Work.spend
    monkeypatch.setattr(
        Work, "spend", lambda work, units: [reads.append(units), spend(work, units)]
    )
    gateway = serving()
    visitor, target = begin(gateway, origin, "Content-Length: 500")
    with visitor:
        for _ in range(500):
            visitor.send(b"x")
            time.sleep(0.001)
        assert target.read_exactly(500) == b"x" * 500
        assert len(reads) < 75
        target.send(answer(b"ok"))
        assert visitor.read_message()[1] == b"ok"


def test_bulk_and_what_a_person_types_are_not_slowed(serving, origin, monkeypatch):
    slept = []
    monkeypatch.setattr(work_module, "sleep", slept.append)
    gateway = serving()
    visitor, target = begin(gateway, origin, CHUNKED)
    with visitor:
        for _ in range(20):
            visitor.send(b"1\r\nx\r\n")
            assert target.read_exactly(6) == b"1\r\nx\r\n"
        line = b"64\r\n" + b"x" * 100 + b"\r\n"
        sending = threading.Thread(target=visitor.send, args=[line * 50_000 + b"0\r\n\r\n"])
        sending.start()
        size = 0
        while length := int(target.read_until(b"\r\n"), 16):
            size += len(target.read_exactly(length))
            target.read_exactly(2)
        sending.join()
        assert size == 5_000_000 and not slept
        target.send(answer(b"ok"))
        assert visitor.read_message()[1] == b"ok"
