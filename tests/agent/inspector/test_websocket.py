"""The messages of a WebSocket, by bytes: each stream is also fed one byte at a time."""

import os
import random
import zlib

import pytest

from gotunnel_agent.inspector import websocket
from gotunnel_agent.inspector.websocket import (
    COMPRESSED,
    CUT_SHORT,
    LOST,
    MOST_DEFLATED,
    MOST_INFLATED,
    NOT_INFLATED,
    Agreed,
    Read,
    Reader,
    agreed,
)

DEFLATE = Agreed(deflate=True)
ALONE = Agreed(deflate=True, visitor_alone=True, target_alone=True)


def frame(opcode, payload=b"", *, final=True, mask=b"", reserved=0, length=None):
    """A frame, by RFC 6455 §5.2."""
    length = len(payload) if length is None else length
    first = opcode | (128 if final else 0) | reserved
    flag = 128 if mask else 0
    if length < 126:
        head = bytes([first, flag | length])
    elif length < 65536:
        head = bytes([first, flag | 126]) + length.to_bytes(2, "big")
    else:
        head = bytes([first, flag | 127]) + length.to_bytes(8, "big")
    if mask:
        payload = bytes(byte ^ mask[at % 4] for at, byte in enumerate(payload))
    return head + mask + payload


def read(data, step=None, keep=1000, extensions=Agreed(), **named):
    reader, found = Reader(keep, extensions, **named), []
    step = step or max(1, len(data))
    for at in range(0, len(data), step):
        found += reader.feed(data[at : at + step])
    return found + reader.end()


MASK = b"\x01\x02\x03\xfe"
LONG = b"0123456789" * 7000
STREAMS = {
    # RFC 6455 §5.7
    "a text": (bytes.fromhex("810548656c6c6f"), [("text", b"Hello", 5, "")]),
    "a masked text": (
        bytes.fromhex("818537fa213d7f9f4d5158"),
        [("text", b"Hello", 5, "")],
    ),
    "fragments": (bytes.fromhex("010348656c80026c6f"), [("text", b"Hello", 5, "in 2 frames")]),
    "a ping, and its pong": (
        bytes.fromhex("890548656c6c6f8a8537fa213d7f9f4d5158"),
        [("ping", b"Hello", 5, ""), ("pong", b"Hello", 5, "")],
    ),
    "a ping between fragments": (
        frame(2, b"ab", final=False, mask=MASK) + frame(9, b"?", mask=MASK)
        + frame(0, b"cd", final=False, mask=MASK) + frame(0, b"efg", mask=MASK),
        [("ping", b"?", 1, ""), ("binary", b"abcdefg", 7, "in 3 frames")],
    ),
    "16 bits of length": (frame(2, b"x" * 126), [("binary", b"x" * 126, 126, "")]),
    "64 bits of length": (
        frame(1, LONG, mask=MASK) + frame(1, b"next"),
        [("text", LONG[:1000], 70_000, ""), ("text", b"next", 4, "")],
    ),
    "empty ones": (
        frame(1) + frame(2, mask=MASK) + frame(9) + frame(1, final=False) + frame(0),
        [("text", b"", 0, ""), ("binary", b"", 0, ""), ("ping", b"", 0, ""),
         ("text", b"", 0, "in 2 frames")],
    ),
    "a close": (frame(8, b"\x03\xe8bye", mask=MASK), [("close", b"\x03\xe8bye", 5, "code 1000")]),
    "a close without a code": (frame(8) + frame(8, b"x"),
                               [("close", b"", 0, ""), ("close", b"x", 1, "no code")]),
    "no UTF-8": (frame(1, b"\xff\xfe"), [("text", b"\xff\xfe", 2, "not UTF-8")]),
    "a character that ends behind what is kept": (
        frame(1, b"x" * 999 + "ä".encode()), [("text", b"x" * 999 + b"\xc3", 1001, "")],
    ),
    "a continuation of nothing": (
        frame(0, b"ab") + frame(1, b"c"),
        [("binary", b"ab", 2, "a continuation of no message"), ("text", b"c", 1, "")],
    ),
    "a message inside another": (
        frame(1, b"ab", final=False) + frame(2, b"c"),
        [("text", b"ab", 2, "cut short by another message"), ("binary", b"c", 1, "")],
    ),
    "half a message": (frame(1, b"abc")[:4], [("text", b"ab", 2, CUT_SHORT)]),
    "half a fragmented message": (
        frame(1, b"abc", final=False), [("text", b"abc", 3, CUT_SHORT)],
    ),
    "half a ping": (frame(9, b"abc")[:3], [("ping", b"a", 1, CUT_SHORT)]),
    "half a header": (frame(1, b"a") + b"\x81",
                      [("text", b"a", 1, ""),
                       (LOST, b"", 0, "cut short in the header of a frame")]),
    "nothing": (b"", []),
}  # fmt: skip


@pytest.mark.parametrize("name", STREAMS)
def test_messages_are_read_whole_and_byte_by_byte(name):
    data, expected = STREAMS[name]
    for step in (None, 1, 2, 3, 5, 1000):
        assert read(data, step) == expected, step


@pytest.mark.parametrize(
    "data, why",
    [
        (frame(3, b"x"), "opcode 3"),
        (frame(11), "opcode 11"),
        (frame(1, b"x", reserved=0x40), "bits that no extension explains"),
        (frame(1, b"x", reserved=0x20), "bits that no extension explains"),
        (frame(9, b"x", final=False), "a ping is longer than 125 bytes, or in parts"),
        (frame(8, bytes(126)), "a close is longer than 125 bytes"),
        (frame(2, b"", length=2**63), "a length of over 63 bits"),
        (b"GET / HTTP/1.1\r\n\r\n", "opcode 7"),
    ],
)
def test_what_is_no_frame_ends_the_reading(data, why):
    for step in (None, 1):
        found = read(frame(1, b"first") + data + frame(1, b"never read"), step)
        assert found[0] == Read("text", b"first", 5) and len(found) == 2
        assert found[1].kind == LOST and why in found[1].note


def test_of_a_huge_frame_only_the_beginning_is_kept():
    """64 MiB, of which each piece is the same object: it must not be copied either."""
    size, piece = 64 * 1024 * 1024, bytes(range(256)) * 256
    reader = Reader(1000)
    assert reader.feed(frame(2, b"", mask=MASK, length=size)[:14]) == []
    for _ in range(size // len(piece) - 1):
        assert reader.feed(piece) == []
    [message] = reader.feed(piece)
    expected = bytes(byte ^ MASK[at % 4] for at, byte in enumerate(piece[:1000]))
    assert message == Read("binary", expected, size)


# Compressed ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text, expected",
    [
        ("", Agreed()),
        ("permessage-deflate", DEFLATE),
        ("Permessage-Deflate; client_no_context_takeover; server_no_context_takeover", ALONE),
        ("permessage-deflate;server_no_context_takeover", Agreed(True, False, True)),
        ("permessage-deflate; server_max_window_bits=10", DEFLATE),
        ("x-webkit-deflate-frame", Agreed(other="x-webkit-deflate-frame")),
        ("permessage-deflate, mux", Agreed(other="mux")),
        (" , ;x,", Agreed(other="?")),
    ],
)
def test_the_extensions_of_an_answer(text, expected):
    assert agreed(text) == expected


class Packer:
    """A sender with permessage-deflate."""

    def __init__(self, alone=False, bits=15):
        self._alone, self._bits = alone, bits
        self._zlib = zlib.compressobj(wbits=-bits)

    def pack(self, text):
        data = self._zlib.compress(text) + self._zlib.flush(zlib.Z_SYNC_FLUSH)
        if self._alone:
            self._zlib = zlib.compressobj(wbits=-self._bits)
        return data.removesuffix(b"\x00\x00\xff\xff")


@pytest.mark.parametrize("alone", [False, True])
def test_compressed_messages_are_inflated(alone):
    packer = Packer(alone)
    texts = [b"hello hello hello", b"", b"hello hello hello", os.urandom(3000), b"hello " * 9000]
    frames = [packer.pack(text) for text in texts]
    stream = b""
    for data in frames:
        stream += frame(2, data[:2], final=False, mask=MASK, reserved=0x40) + frame(0, data[2:])
    stream += frame(1, b"not compressed")
    for step in (None, 1, 7):
        found = read(stream, step, extensions=ALONE if alone else DEFLATE, from_visitor=True)
        assert [message.data for message in found[:-1]] == [text[:1000] for text in texts]
        assert [message.size for message in found[:-1]] == [len(data) for data in frames]
        assert {message.note for message in found[:-1]} == {f"{COMPRESSED}; in 2 frames"}
        assert found[-1] == Read("text", b"not compressed", 14)


def test_the_examples_of_the_rfc_are_inflated():
    """RFC 7692 §7.2.3.1, §7.2.3.4 (a final block) and §7.2.3.5 (two blocks)."""
    for payload in ("f248cdc9c90700", "f348cdc9c9070000", "f248050000 00ffffcac9c90700"):
        stream = frame(1, bytes.fromhex(payload), reserved=0x40)
        [message] = read(stream, extensions=ALONE)
        assert (message.data, message.note) == (b"Hello", COMPRESSED)


def test_a_text_is_checked_after_it_was_inflated():
    stream = frame(1, Packer().pack(b"\xff"), reserved=0x40)
    assert read(stream, extensions=DEFLATE)[0].note == f"{COMPRESSED}; not UTF-8"


def broken_by(payloads, extensions):
    packer = Packer(alone=extensions is ALONE)
    stream = b"".join(frame(2, payload, reserved=0x40) for payload in payloads)
    return read(stream + frame(2, packer.pack(b"after"), reserved=0x40), extensions=extensions)


@pytest.mark.parametrize(
    "payload",
    [
        b"\xff" * 50,
        Packer().pack(bytes(MOST_INFLATED + 2000)),
        Packer().pack(os.urandom(MOST_DEFLATED + 2000)),
    ],
    ids=["no deflate", "a bomb", "a large one"],
)
def test_a_message_that_cannot_be_inflated_is_shown_as_it_passed(payload):
    bad, after = broken_by([payload], DEFLATE)
    assert bad == Read("binary", payload[:1000], len(payload), NOT_INFLATED)
    assert after.note == NOT_INFLATED  # it may refer to the one before
    bad, after = broken_by([payload], ALONE)
    assert bad.note == NOT_INFLATED
    assert (after.data, after.note) == (b"after", COMPRESSED)


def test_a_bomb_is_inflated_up_to_a_limit(monkeypatch):
    given, make = [], zlib.decompressobj

    class Counting:
        def __init__(self):
            self.inner = make(-15)

        def __getattr__(self, name):
            return getattr(self.inner, name)

        def decompress(self, data, most):
            out = self.inner.decompress(data, most)
            given.append(len(out))
            return out

    monkeypatch.setattr(websocket.zlib, "decompressobj", lambda bits: Counting())
    reader = Reader(1000, DEFLATE)
    bomb = Packer().pack(bytes(3 * MOST_INFLATED))
    for _ in range(3):
        [message] = reader.feed(frame(2, bomb, reserved=0x40))
        assert message.note == NOT_INFLATED
    assert MOST_INFLATED < sum(given) <= MOST_INFLATED + websocket.INFLATED_AT_ONCE


def test_messages_of_an_unknown_extension_are_shown_as_they_passed():
    stream = frame(1, b"abc", reserved=0x60) + frame(1, b"plain")
    found = read(stream, extensions=agreed("mux"))
    assert found == [("text", b"abc", 3, "in the extension mux, which is not known here"),
                     ("text", b"plain", 5, "")]  # fmt: skip


def test_whatever_bytes_come_nothing_is_raised_and_pieces_do_not_matter():
    dice = random.Random(3)
    streams = [data for data, _ in STREAMS.values() if len(data) < 2000]
    packer = Packer()
    streams += [frame(1, packer.pack(b"abc" * 9), reserved=0x40) for _ in range(3)]
    for _ in range(300):
        data = bytearray(b"".join(dice.choices(streams, k=3)))
        for _ in range(dice.randrange(4)):
            if data:
                data[dice.randrange(len(data))] = dice.randrange(256)
        data, extensions = bytes(data), dice.choice([Agreed(), DEFLATE, ALONE, agreed("x")])
        whole = read(data, None, 9, extensions)
        assert whole == read(data, 1, 9, extensions) == read(data, 4, 9, extensions), data
        assert all(len(message.data) <= max(9, 125) for message in whole)
        read(dice.randbytes(60), 3, 9, extensions)
