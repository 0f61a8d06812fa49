"""The events of a text/event-stream, by bytes: each stream is also fed one byte at a time."""

import random
import zlib

import pytest

from gotunnel_agent.inspector.event_stream import (
    COMMENT,
    CUT_SHORT,
    MOST_INFLATED,
    Event,
    EventStream,
)


def read(data, step=None, keep=100, coding=""):
    stream, found = EventStream(keep, coding), []
    step = step or max(1, len(data))
    for at in range(0, len(data), step):
        found += stream.feed(data[at : at + step])
    return found + stream.end()


STREAMS = {
    b"data: a\n\n": [(b"data: a", 7, "")],
    b"data: a\r\n\r\ndata: b\r\n\r\n": [(b"data: a", 7, ""), (b"data: b", 7, "")],
    b"data: a\r\rdata: b\r\r": [(b"data: a", 7, ""), (b"data: b", 7, "")],
    b"event: x\ndata: 1\ndata: 2\nid: 7\n\n": [(b"event: x\ndata: 1\ndata: 2\nid: 7", 30, "")],
    b"\n\n\ndata: a\n\n\n\n": [(b"data: a", 7, "")],
    b": ping\n\n:\n\n": [(b": ping", 6, COMMENT), (b":", 1, COMMENT)],
    b"data: a\n\ndata: b": [(b"data: a", 7, ""), (b"data: b", 7, CUT_SHORT)],
    b"data: a\n": [(b"data: a", 7, CUT_SHORT)],
    b"data: " + b"x" * 200 + b"\n\n": [(b"data: " + b"x" * 94, 206, "")],
    b"data: \xff\x00\n\n": [(b"data: \xff\x00", 8, "")],
    b"": [],
    b"\r": [],
}


@pytest.mark.parametrize("data", STREAMS)
def test_events_are_read_whole_and_byte_by_byte(data):
    for step in (None, 1, 2, 3):
        assert read(data, step) == STREAMS[data], step


def test_events_come_when_they_end():
    stream = EventStream(100)
    assert stream.feed(b"data: a\n") == []
    assert stream.feed(b"\ndata") == [Event(b"data: a", 7)]


@pytest.mark.parametrize("coding", ["gzip", "deflate"])
def test_compressed_events_are_read_as_they_come(coding):
    packer = zlib.compressobj(wbits=31 if coding == "gzip" else 15)
    first = packer.compress(b"data: a\n\n") + packer.flush(zlib.Z_SYNC_FLUSH)
    second = packer.compress(b"data: b\n\n") + packer.flush()
    stream = EventStream(100, coding)
    assert stream.feed(first) == [Event(b"data: a", 7)]
    assert stream.feed(second) == [Event(b"data: b", 7)]


def test_what_cannot_be_decompressed_is_not_read():
    assert read(b"data: a\n\n", coding="br") == []
    [event] = read(b"data: a\n\n" * 9, step=9, coding="gzip")
    assert "its compression is broken" in event.note
    bomb = zlib.compress(bytes(2 * MOST_INFLATED))
    assert "too long" in read(bomb + b"more", step=len(bomb), coding="deflate")[0].note


def test_whatever_comes_nothing_is_raised():
    dice = random.Random(5)
    for _ in range(500):
        data = bytes(dice.choices(b"\r\n\n\n:da \xff\x00", k=dice.randrange(60)))
        whole = read(data, keep=7)
        assert whole == read(data, 1, keep=7) == read(data, 3, keep=7), data
        assert all(len(event.data) <= 7 and event.size for event in whole)
        for coding in ("gzip", "deflate"):
            read(data, 3, coding=coding)
