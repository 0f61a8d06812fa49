"""The recorder, between a Dialogue and a Ring: no socket, no thread."""

import gzip
import random
import threading
import time
import zlib

import pytest
from test_websocket import MASK, frame

from gotunnel_agent.config import Target, Tunnel
from gotunnel_agent.dialogue import CUT_SHORT, Dialogue, Exchange
from gotunnel_agent.inspector import recorder as recorder_module
from gotunnel_agent.inspector.kept import TOO_MANY
from gotunnel_agent.inspector.record import ENDED, OPEN, RECORD_COST, Kept, Message, Ring
from gotunnel_agent.inspector.recorder import (
    MOST_PIECES,
    MOST_STEPS,
    STEP_RATE,
    Recorder,
    visitor_of,
)

MIB = 1024 * 1024
TUNNEL = Tunnel("app.test", Target("127.0.0.1", 80), "http")
GET = b"GET /a?b=1 HTTP/1.1\r\nHost: x.test\r\nX-Forwarded-For: 192.0.2.7, 10.0.0.1\r\n\r\n"
POST = b"POST /p HTTP/1.1\r\nHost: x\r\nContent-Length: 5\r\n\r\nhello"
OK = b"HTTP/1.1 200 OK\r\nContent-Length: 3\r\n\r\nyes"
EVENTS = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream; charset=utf-8\r\n"
UPGRADE = b"GET /ws HTTP/1.1\r\nHost: x\r\nConnection: upgrade\r\nUpgrade: websocket\r\n\r\n"
SWITCH = b"HTTP/1.1 101 Switching Protocols\r\nConnection: upgrade\r\nUpgrade: WebSocket\r\n"


@pytest.fixture(autouse=True)
def a_clock(monkeypatch):
    """Wall-clock time is 1000 seconds ahead of the monotonic one, which is 100."""
    monkeypatch.setattr(recorder_module, "monotonic", lambda: 100)
    monkeypatch.setattr(recorder_module, "time", lambda: 1100)


class Visit:
    """A stream of which a recorder hears."""

    def __init__(self, recorder=None, tunnel=TUNNEL, *, body=10, budget=10**6):
        self.recorder = recorder or Recorder(Ring(budget), body)
        self.ring = self.recorder.ring
        self.dialogue = Dialogue(
            lambda exchange: self.recorder.over(tunnel, exchange),
            listen=lambda exchange: self.recorder.began(tunnel, exchange),
        )
        self.now = 50.0

    def ask(self, data):
        self.dialogue.asked(data, self.now)
        self.now += 1

    def answer(self, data):
        self.dialogue.answered(data, self.now)
        self.now += 1

    def end(self):
        self.dialogue.ended(self.now)

    def look(self):
        self.recorder.refresh()
        return self.ring.all()[-1]


def test_a_request_and_its_answer_are_a_record():
    visit = Visit()
    visit.ask(POST)
    visit.answer(b"HTTP/1.1 103 Early Hints\r\nLink: x\r\n\r\n")
    visit.answer(OK)
    [record] = visit.ring.all()
    assert (record.id, record.hostname, record.mode, record.target) == (
        1, "app.test", "http", "127.0.0.1:80",
    )  # fmt: skip
    assert (record.method, record.path, record.status) == ("POST", "/p", 200)
    assert (record.began, record.first_byte, record.duration) == (1050, 2, 2)
    assert record.request_head + b"hello" == POST and record.response_head + b"yes" == OK
    assert record.request_body == Kept(b"hello", 5) and record.response_body == Kept(b"yes", 3)
    assert record.interim == (b"HTTP/1.1 103 Early Hints\r\nLink: x\r\n\r\n",)
    assert (record.problem, record.state, record.replay_of, record.imported) == (
        "", ENDED, None, False,
    )  # fmt: skip
    assert visit.recorder._open == {} and visit.ring.used == record.cost()


def test_of_a_body_the_beginning_is_kept_and_the_whole_is_counted():
    visit = Visit(body=10)
    visit.ask(b"PUT / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n")
    for _ in range(50):
        visit.ask(b"3\r\nabc\r\n")
    visit.ask(b"0\r\nDigest: t\r\n\r\n")
    visit.answer(b"HTTP/1.1 200 OK\r\n\r\n" + b"x" * 4)
    visit.answer(b"y" * 100_000)
    visit.answer(b"")
    [record] = visit.ring.all()
    assert record.request_body == Kept(b"abcabcabca", 150)
    assert record.response_body == Kept(b"xxxxyyyyyy", 100_004)
    assert record.request_trailers == (("Digest", "t"),)
    assert visit.ring.used == record.cost() < RECORD_COST + 400


def test_without_bodies_only_heads_are_kept():
    visit = Visit(body=0)
    visit.ask(POST)
    visit.answer(OK)
    [record] = visit.ring.all()
    assert (record.request_body, record.response_body) == (Kept(b"", 5), Kept(b"", 3))


def test_a_visit_that_goes_on_is_told_as_it_changes():
    visit = Visit()
    with visit.ring.subscribe() as reader:
        visit.ask(GET)
        assert not reader.take_now().records and not visit.ring.all()
        visit.look()
        [record] = reader.take_now().records
        assert (record.state, record.duration, record.status) == (OPEN, None, 0)
        assert visit.look() is record and not reader.take_now().records
        visit.answer(b"HTTP/1.1 200 OK\r\n\r\nab")
        assert not reader.take_now().records  # a thread of the visit does nothing more
        visit.look()
        assert reader.take_now().records == [record]
        assert (record.status, record.first_byte, record.state) == (200, 1, OPEN)
        assert record.response_body == Kept(b"ab", 2)
        visit.look()
        assert not reader.take_now().records
        visit.answer(b"cd")
        visit.look()
        assert reader.take_now().records and record.response_body == Kept(b"abcd", 4)
        assert visit.ring.used == record.cost()
        visit.answer(b"")
        assert reader.take_now().records == [record] and record.state == ENDED


def test_visits_that_are_not_whole_say_why():
    visit = Visit()
    visit.ask(GET)
    visit.answer(OK[:-1])
    visit.end()
    assert visit.look().problem == CUT_SHORT
    visit = Visit()
    visit.ask(b"SSH-2.0-x\r\n\r\n")
    visit.ask(b"more")
    visit.end()
    record = visit.look()
    assert "not followed" in record.problem and record.state == ENDED
    assert (record.method, record.status, record.request_body.data) == ("", 0, b"")


def test_a_visit_that_cannot_be_followed_any_more_says_so_while_it_goes_on():
    visit = Visit()
    visit.ask(GET)
    visit.answer(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n1\r\na\r\n")
    visit.answer(b"xyz\r\n")
    record = visit.look()
    assert "not followed" in record.problem and record.state == OPEN
    visit.answer(b"more")
    visit.end()
    assert record.state == ENDED and record.response_body.data == b"a"


def test_the_record_of_a_stream_that_is_only_counted():
    recorder = Recorder(Ring(10**6), 10)
    exchange = Exchange(50)
    recorder.began(TUNNEL._replace(mode="tcp"), exchange)
    exchange.bytes_in, exchange.bytes_out = 7, 8
    recorder.refresh()
    [record] = recorder.ring.all()
    assert (record.mode, record.state, record.request_body.size) == ("tcp", OPEN, 7)
    exchange.over = 52
    recorder.over(TUNNEL, exchange)
    assert (record.duration, record.response_body) == (2, Kept(b"", 8))


def test_the_hostname_of_a_wildcard_is_the_visitors():
    visit = Visit(tunnel=TUNNEL._replace(hostname="*.test"))
    visit.ask(GET)
    assert visit.look().hostname == "x.test"


@pytest.mark.parametrize(
    "fields, visitor",
    [
        (b"X-Forwarded-For: 192.0.2.7", "192.0.2.7"),
        (b"x-forwarded-for:2001:db8::1 , 10.0.0.1", "2001:db8::1"),
        (b"X-Real-IP: 192.0.2.8", "192.0.2.8"),
        (b"X-Real-IP: 192.0.2.8\r\nX-Forwarded-For: 192.0.2.7", "192.0.2.7"),
        (b"Y-X-Forwarded-For: 1", ""),
        (b"X-Forwarded-For:", ""),
        (b"X-Forwarded-For: " + b"\xff" * 500, "\xff" * 100),
    ],
)
def test_the_visitor_is_who_the_gateway_says(fields, visitor):
    assert visitor_of(b"GET / HTTP/1.1\r\n" + fields + b"\r\n\r\n") == visitor


# Messages -----------------------------------------------------------------------------------------


def test_messages_of_a_websocket_are_kept_with_their_times():
    visit = Visit(body=8)
    visit.ask(UPGRADE)
    visit.answer(SWITCH + b"\r\n" + frame(1, b"welcome to it"))
    visit.ask(frame(1, b"hello", mask=MASK) + frame(9, mask=MASK))
    record = visit.look()
    assert record.messages == [
        Message(1051, False, "text", b"welcome ", 13),
        Message(1052, True, "text", b"hello", 5),
        Message(1052, True, "ping", b"", 0),
    ]
    assert (record.status, record.state) == (101, OPEN)
    assert record.request_body == Kept(b"", 17) and record.response_body == Kept(b"", 15)
    visit.answer(frame(2, b"half")[:3])
    visit.ask(b"\xff\xff\xff")
    visit.end()
    half = Message(1055, False, "binary", b"h", 1, CUT_SHORT)
    lost = record.messages[3]
    assert lost.kind == "lost" and lost.from_visitor and record.messages[4:] == [half]
    assert visit.ring.used == record.cost()


def test_compressed_messages_are_inflated_if_both_ends_have_agreed_on_it():
    visit = Visit()
    visit.ask(UPGRADE)
    visit.answer(SWITCH + b"Sec-WebSocket-Extensions: permessage-deflate\r\n\r\n")
    hello = bytes.fromhex("f248cdc9c90700")
    visit.ask(frame(1, hello, mask=MASK, reserved=0x40))
    visit.answer(frame(1, hello, reserved=0x40))
    record = visit.look()
    assert [(m.data, m.size, m.note) for m in record.messages] == [(b"Hello", 7, "compressed")] * 2
    assert record.cost() > 2 * recorder_module.websocket.INFLATER_COST  # memory that it works with
    visit.end()
    assert visit.ring.used == record.cost() < 2 * RECORD_COST


def test_messages_that_have_not_ended_count():
    recorder = Recorder(Ring(100_000), 5_000)
    visits = [Visit(recorder) for _ in range(20)]
    for visit in visits:
        visit.ask(UPGRADE)
        visit.answer(SWITCH + b"\r\n" + frame(2, bytes(50_000))[:30_000])
        visit.ask(frame(1, bytes(9_000), mask=MASK)[:8_000])
        assert recorder.ring.used <= 100_000
    kept = len(recorder.ring.all())
    assert 5 < kept < 9
    for visit in visits:
        visit.end()
    assert kept - 2 <= len(recorder.ring.all()) <= kept and recorder.ring.used <= 100_000
    [first, *_] = recorder.ring.all()
    assert [len(message.data) for message in first.messages] == [5_000, 5_000]
    many = Recorder(Ring(100_000), 20_000)
    for _ in range(40):  # quiet ones take little
        visit = Visit(many)
        visit.ask(UPGRADE)
        visit.answer(SWITCH + b"\r\n" + frame(1, b"x"))
    assert len(many.ring.all()) == 40


def test_the_bytes_of_another_protocol_are_kept_as_bodies():
    visit = Visit()
    visit.ask(UPGRADE.replace(b"websocket", b"chat"))
    visit.answer(SWITCH.replace(b"WebSocket", b"chat") + b"\r\nhi")
    visit.ask(b"hello")
    visit.end()
    record = visit.look()
    assert (record.request_body, record.response_body) == (Kept(b"hello", 5), Kept(b"hi", 2))
    assert record.problem == "" and record.messages == []


@pytest.mark.parametrize(
    "coding, pack", [(b"", bytes), (b"Content-Encoding: gzip\r\n", gzip.compress)]
)
def test_events_are_messages_and_the_body_is_kept_as_well(coding, pack):
    visit = Visit(body=1000)
    visit.ask(GET)
    visit.answer(EVENTS + coding + b"\r\n")
    sent = pack(b"data: 1\n\n: ping\n\n")
    visit.answer(sent)
    record = visit.look()
    assert record.messages == [
        Message(1052, False, "event", b"data: 1", 7),
        Message(1052, False, "event", b": ping", 6, "a comment"),
    ]
    if not coding:
        visit.answer(b"data: 2")
        visit.answer(b"")
        assert record.messages[2:] == [Message(1054, False, "event", b"data: 2", 7, CUT_SHORT)]
    visit.end()
    assert record.response_body.data.startswith(sent) and visit.ring.used == record.cost()


def test_a_websocket_takes_a_part_of_the_memory():
    visit = Visit(body=1000, budget=100_000)
    visit.ask(GET)
    visit.answer(OK)
    visit.ask(UPGRADE)
    visit.answer(SWITCH + b"\r\n")
    for _ in range(1000):
        visit.answer(frame(2, bytes(900)))
    assert len(visit.ring.all()) == 2
    record = visit.look()
    assert record.dropped + len(record.messages) == 1000
    assert visit.ring.used < 100_000 / 4


# Memory and threads ------------------------------------------------------------------------------


def test_nothing_more_is_done_for_a_record_that_is_gone():
    visit = Visit(body=50_000)
    visit.ask(GET)
    visit.answer(b"HTTP/1.1 200 OK\r\n\r\nab")
    visit.look()
    exchange = visit.dialogue.current()
    assert exchange.hear is not None
    visit.ring.clear()
    visit.answer(b"cd")
    assert exchange.hear is None
    visit.answer(b"ef")
    visit.end()
    assert (visit.ring.all(), visit.ring.used, visit.recorder._open) == ([], 0, {})


def test_open_bodies_count():
    recorder = Recorder(Ring(20_000), 5000)
    visits = [Visit(recorder) for _ in range(100)]
    for visit in visits:
        visit.ask(GET)
        visit.answer(b"HTTP/1.1 200 OK\r\n\r\n" + bytes(9000))
        assert recorder.ring.used <= 20_000
    assert [len(record.response_body.data) for record in recorder.ring.all()] == [5000] * 3
    for visit in visits:
        visit.end()
    assert len(recorder.ring.all()) == 3 and recorder._open == {}


def test_a_body_of_tiny_pieces_is_joined():
    visit = Visit(body=10_000)
    visit.ask(GET)
    visit.answer(b"HTTP/1.1 200 OK\r\n\r\n")
    for number in range(2000):
        visit.answer(b"%04d" % number)
    [tape] = visit.recorder._open.values()
    assert len(tape._answered._pieces) <= MOST_PIECES
    expected = b"".join(b"%04d" % number for number in range(2000))
    assert visit.look().response_body == Kept(expected, 8000)


def test_a_visit_and_the_thread_that_looks_write_one_record():
    visit = Visit(body=10**6, budget=10**8)
    visit.ask(GET)
    visit.answer(b"HTTP/1.1 200 OK\r\n\r\n")
    stop = threading.Event()

    def look():
        while not stop.is_set():
            visit.recorder.refresh()

    thread = threading.Thread(target=look)
    thread.start()
    for number in range(3000):
        visit.answer(b"%04d" % number)
    visit.answer(b"")
    stop.set()
    thread.join()
    [record] = visit.ring.all()
    assert record.response_body == Kept(b"".join(b"%04d" % n for n in range(3000)), 12_000)
    assert record.state == ENDED and visit.ring.used == record.cost()


def test_a_clock_that_jumps_changes_no_order(monkeypatch):
    visit = Visit()
    visit.ask(UPGRADE)
    visit.look()
    monkeypatch.setattr(recorder_module, "time", lambda: -(10**9))
    visit.answer(SWITCH + b"\r\n")
    visit.answer(frame(1, b"x"))
    visit.end()
    [record] = visit.ring.all()
    assert record.messages[0].at == 1052 and record.duration == 3


# Hostile ------------------------------------------------------------------------------------------


def test_whatever_passes_nothing_is_raised_and_all_is_counted():
    """Requests and answers with random faults, cut at random places, and looks between them."""
    dice = random.Random(17)
    deflate = SWITCH + b"Sec-WebSocket-Extensions: permessage-deflate\r\n\r\n"
    asked = [GET, POST, UPGRADE, frame(1, b"hello", mask=MASK), POST[:-2], b"\xff\x00" * 9]
    answers = [
        OK, EVENTS + b"\r\ndata: 1\n\n", SWITCH + b"\r\n", deflate, frame(2, bytes(300)),
        EVENTS + b"Content-Encoding: gzip\r\n\r\n" + gzip.compress(b"data: 1\n\n"),
        frame(1, b"\xf2H\xcd\xc9\xc9\x07\x00", reserved=0x40), OK[:-2], b"",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n0\r\nX: y\r\n\r\n",
    ]  # fmt: skip
    ring = Ring(60_000)
    for _ in range(400):
        visit = Visit(Recorder(ring, dice.choice([0, 7, 5000])))
        for _ in range(dice.randrange(8)):
            is_answer = dice.random() < 0.5
            data = bytearray(dice.choice(answers if is_answer else asked))
            if data and dice.random() < 0.3:
                data[dice.randrange(len(data))] = dice.randrange(256)
            step = dice.choice([1, 3, 1000])
            for at in range(0, max(1, len(data)), step):
                (visit.answer if is_answer else visit.ask)(bytes(data[at : at + step]))
            if dice.random() < 0.3:
                visit.recorder.refresh()
            if dice.random() < 0.02:
                ring.clear()
            assert ring.used <= 60_000
        visit.end()
        assert visit.recorder._open == {}
    records = ring.all()
    assert records and {record.state for record in records} == {ENDED}
    assert ring.used == sum(record.charged for record in records)
    assert ring.used == sum(record.cost() for record in records)


def test_a_head_with_thousands_of_fields_is_kept_as_it_is():
    fields = b"".join(b"X-%d: y\r\n" % number for number in range(5000))
    visit = Visit()
    visit.ask(GET[:-2] + fields + b"\r\n")
    visit.answer(OK.replace(b"\r\n\r\n", b"\r\n" + fields + b"\r\n"))
    [record] = visit.ring.all()
    assert record.status == 200 and record.problem == "" and record.visitor == "192.0.2.7"
    assert record.request_head.count(b"\r\n") == 5000 + 4


def packed(count):
    """A message of permessage-deflate that becomes ``count`` bytes."""
    packer = zlib.compressobj(wbits=-15)
    return packer.compress(bytes(count)) + packer.flush(zlib.Z_SYNC_FLUSH)[:-4]


DEFLATED = b"Sec-WebSocket-Extensions: permessage-deflate; server_no_context_takeover\r\n"


@pytest.mark.parametrize(
    ("head", "piece", "many"),
    [
        (SWITCH, frame(9), MOST_STEPS),
        (SWITCH, frame(1, final=False) + frame(0, final=False) * 10, MOST_STEPS),
        (SWITCH + DEFLATED, frame(2, packed(MIB), reserved=0x40), MOST_STEPS // 64),
        (EVENTS, b"a\n\n", MOST_STEPS),
    ],
    ids=["pings", "fragments", "bombs", "events"],
)
def test_more_messages_than_can_be_read_are_only_counted(head, piece, many):
    """A frame of two bytes takes as long to read as one of 64 KiB: a visit of these would crawl."""
    visit = Visit()
    visit.ask(UPGRADE if head.startswith(SWITCH) else GET)
    visit.answer(head + b"\r\n")
    began = time.process_time()
    visit.answer(piece * many * 2)
    size = len(piece) * many * 2
    [record] = visit.ring.all()
    assert TOO_MANY in record.messages[-1].note
    read = record.message_count + record.dropped
    assert read <= MOST_STEPS + 1
    for _ in range(50):  # nothing more is read, and everything is counted
        visit.answer(piece * 1000)
        size += len(piece) * 1000
    assert time.process_time() - began < 3
    visit.end()
    assert record.message_count + record.dropped == read
    assert record.response_body.size == size and record.state == ENDED


def test_as_many_messages_a_second_as_can_be_read_are_read():
    visit = Visit()
    visit.ask(UPGRADE)
    visit.answer(SWITCH + b"\r\n")
    for _ in range(10):
        visit.answer(frame(9) * STEP_RATE)
    [record] = visit.ring.all()
    assert record.message_count + record.dropped == 10 * STEP_RATE > MOST_STEPS
