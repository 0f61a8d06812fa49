"""The rules of yamux, by bytes: what Mux takes, what it refuses, what it says and in which order.

A name such as ``fc_half_rule`` in a test's name is that of a rule that every yamux should keep:
``fr`` framing, ``fc`` flow control, ``oc`` open and close, ``rs`` reset, ``ka`` ping, ``ga`` go
away, ``ho`` hostile peer. The peer in these tests is the server and the Mux the client, unless
the rule needs it the other way round.
"""

import collections
import random

import pytest
from raw_peer import Wire, check_tables, frame, split_frames

import gotunnel
from gotunnel import (
    ACCEPT_BACKLOG,
    ACK,
    DATA,
    FIN,
    FRAME_ALONE,
    FRAME_SHARED,
    GO_AWAY,
    HEADER_SIZE,
    INITIAL_WINDOW,
    LAST_ID,
    MAX_REPLIES,
    MAX_UINT32,
    MAX_WINDOW,
    OPEN_BACKLOG,
    PING,
    PROTOCOL_ERROR,
    RST,
    SEND_BUFFER,
    SYN,
    WINDOW_UPDATE,
    Account,
    Answered,
    Finished,
    GoneAway,
    Header,
    Memory,
    Mux,
    Opened,
    ProtocolError,
    Received,
    SessionClosed,
    WasReset,
    Writable,
    unpack_header,
)

MIB = 1024 * 1024
EVERYTHING = 1 << 40  # a limit for pull() that limits nothing


class Events(list):
    """Events that are equal only if their kinds are, too: to Python they are tuples of numbers."""

    def __eq__(self, other):
        return [(type(event), *event) for event in self] == [
            (type(event), *event) for event in other
        ]


def receive(mux, data, now=0.0):
    return Events(mux.receive(data, now))


def sent(mux):
    """The frames that a Mux wants to send, as [(type, flags, stream id, length, payload)]."""
    return split_frames(mux.pull(EVERYTHING)[0])


def acceptor(**named):
    """A Mux with stream 1, opened by its peer and accepted."""
    mux = Mux(client=False, **named)
    receive(mux, frame(WINDOW_UPDATE, SYN, 1))
    mux.accept(1)
    sent(mux)
    return mux


def opener(**named):
    """A Mux with stream 1, opened by itself and accepted by its peer."""
    mux = Mux(client=True, **named)
    mux.open(0.0)
    receive(mux, frame(WINDOW_UPDATE, ACK, 1))
    sent(mux)
    return mux


def hold(account, count):
    """Count bytes as a session does."""
    account.held += count
    if not account.low < account.held < account.high:
        account.tell()


def merged(events):
    """Events with the payload of neighbours put together: pieces say nothing."""
    result = Events()
    for event in events:
        last = result[-1] if result else None
        if isinstance(event, Received) and isinstance(last, Received) \
                and event.stream_id == last.stream_id:  # fmt: skip
            result[-1] = Received(event.stream_id, last.payload + event.payload)
        else:
            result.append(event)
    return result


def payload_of(events):
    return b"".join(event.payload for event in events if isinstance(event, Received))


# Framing -----------------------------------------------------------------------------------------

EXAMPLES = [
    ("open 1", (WINDOW_UPDATE, SYN, 1, 0), "00 01 0001 00000001 00000000"),
    ("open 1, window 1 MiB", (WINDOW_UPDATE, SYN, 1, 786432), "00 01 0001 00000001 000c0000"),
    ("open 3 with 5 bytes", (DATA, SYN, 3, 5), "00 00 0001 00000003 00000005"),
    ("accept 1", (WINDOW_UPDATE, ACK, 1, 0), "00 01 0002 00000001 00000000"),
    ("accept 1, window 16 MiB", (WINDOW_UPDATE, ACK, 1, 16515072), "00 01 0002 00000001 00fc0000"),
    ("5 bytes on 1", (DATA, 0, 1, 5), "00 00 0000 00000001 00000005"),
    ("credit for 1", (WINDOW_UPDATE, 0, 1, 131072), "00 01 0000 00000001 00020000"),
    ("half-close 1", (WINDOW_UPDATE, FIN, 1, 0), "00 01 0004 00000001 00000000"),
    ("3 bytes and half-close", (DATA, FIN, 1, 3), "00 00 0004 00000001 00000003"),
    ("open 5, 2 bytes, half-close", (DATA, SYN | FIN, 5, 2), "00 00 0005 00000005 00000002"),
    ("accept and half-close", (WINDOW_UPDATE, ACK | FIN, 5, 0), "00 01 0006 00000005 00000000"),
    ("reset 1", (WINDOW_UPDATE, RST, 1, 0), "00 01 0008 00000001 00000000"),
    ("reset 2", (WINDOW_UPDATE, RST, 2, 0), "00 01 0008 00000002 00000000"),
    ("ping 7", (PING, SYN, 0, 7), "00 02 0001 00000000 00000007"),
    ("pong 7", (PING, ACK, 0, 7), "00 02 0002 00000000 00000007"),
    ("go away", (GO_AWAY, 0, 0, 0), "00 03 0000 00000000 00000000"),
    ("go away, protocol error", (GO_AWAY, 0, 0, 1), "00 03 0000 00000000 00000001"),
    ("go away, internal error", (GO_AWAY, 0, 0, 2), "00 03 0000 00000000 00000002"),
]


@pytest.mark.parametrize(("fields", "text"), [row[1:] for row in EXAMPLES],
                         ids=[row[0] for row in EXAMPLES])  # fmt: skip
def test_fr_constants(fields, text):
    assert Header(*fields).encode() == bytes.fromhex(text)
    assert Header(*unpack_header(bytes.fromhex(text))) == Header(*fields)


def test_the_numbers_that_peers_count_on():
    assert (INITIAL_WINDOW, OPEN_BACKLOG, ACCEPT_BACKLOG) == (262144, 256, 256)
    assert (HEADER_SIZE, MAX_UINT32, LAST_ID) == (12, 0xFFFFFFFF, 0xFFFFFFFD)
    assert (gotunnel.NORMAL, PROTOCOL_ERROR, gotunnel.INTERNAL_ERROR) == (0, 1, 2)


def test_fr_roundtrip_random():
    rng = random.Random(1)
    for _ in range(10_000):
        header = Header(rng.randrange(4), rng.getrandbits(16), rng.getrandbits(32),
                        rng.getrandbits(32))  # fmt: skip
        assert Header(*unpack_header(header.encode())) == header


def mixed_frames():
    """Fifty frames of all kinds for a server Mux, legal ones all."""
    frames = []
    for number in range(1, 21, 2):
        frames += [
            frame(DATA, SYN, number, payload=bytes([number]) * number * 100),
            frame(PING, SYN, 0, number),
            frame(WINDOW_UPDATE, 0, number, number),
            frame(DATA, 0, number, payload=b"x"),
            frame(DATA, FIN, number, payload=b"end")
            if number % 4 == 1 else frame(WINDOW_UPDATE, RST, number, 42),
        ]  # fmt: skip
    frames.append(frame(GO_AWAY, 0, 0, 0))
    return frames


def expected_of_mixed_frames():
    events = []
    for number in range(1, 21, 2):
        events += [Opened(number), Received(number, bytes([number]) * number * 100),
                   Writable(number), Received(number, b"x")]  # fmt: skip
        if number % 4 == 1:
            events[-1] = Received(number, b"xend")
            events.append(Finished(number))
        else:
            events.append(WasReset(number, 42, "the peer reset the stream"))
    return [*events, GoneAway(0)]


@pytest.mark.parametrize("size", [*range(1, 41), 100_000])
def test_fr_every_split(size):
    mux, events = Mux(client=False), []
    capture = b"".join(mixed_frames())
    for at in range(0, len(capture), size):
        events += receive(mux, capture[at : at + size])
    assert merged(events) == expected_of_mixed_frames()
    assert [header[3] for header in sent(mux)] == list(range(1, 21, 2))  # the pongs


@pytest.mark.parametrize("seed", range(20))
def test_fr_every_split_at_random(seed):
    rng, mux, events = random.Random(seed), Mux(client=False), []
    capture = b"".join(mixed_frames())
    while capture:
        size = rng.choice((1, 11, 12, 13, rng.randrange(1, 5000)))
        events += receive(mux, capture[:size])
        capture = capture[size:]
    assert merged(events) == expected_of_mixed_frames()


def test_fr_many_in_one():
    mux = acceptor()
    numbers = [bytes([number % 256]) for number in range(1000)]
    events = receive(mux, b"".join(frame(DATA, 0, 1, payload=number) for number in numbers))
    assert [event.payload for event in events] == numbers


def test_a_payload_is_handed_on_before_it_is_whole():
    mux = acceptor()
    whole = frame(DATA, FIN, 1, payload=b"abcdef")
    assert receive(mux, whole[:14]) == [Received(1, b"ab")]
    assert receive(mux, whole[14:17]) == [Received(1, b"cde")]
    assert receive(mux, whole[17:]) == [Received(1, b"f"), Finished(1)]


@pytest.mark.parametrize(
    ("data", "sentence"),
    [
        (frame(PING, SYN, 0, 7, version=1), "frame version 1, expected 0"),
        (b"HTTP/1.1 400 Bad Request\r\n", "an answer in HTTP, expected frames"),
        (frame(PING, SYN, 0, 7, version=255), "frame version 255, expected 0"),
        (frame(4, 0, 1), "frame type 4, expected 0 to 3"),
        (frame(255, 0, 1), "frame type 255, expected 0 to 3"),
    ],
)
def test_fr_bad_version_and_fr_bad_type(data, sentence):
    for cut in (12, 5):  # in one piece and over a boundary: two ways in the code
        with pytest.raises(ProtocolError, match=f"^{sentence}$"):
            mux = Mux(client=True)
            receive(mux, data[:cut])
            receive(mux, data[cut:])


@pytest.mark.parametrize("stream_id", [1, 3])
@pytest.mark.parametrize("length", [0xFFFFFFFF, INITIAL_WINDOW + 1])
def test_fr_huge_length_is_refused_by_its_header(stream_id, length):
    mux = acceptor()  # it knows stream 1, not 3
    sentence = f"{length} bytes in a frame, our largest window is 262144"
    with pytest.raises(ProtocolError, match=sentence):
        receive(mux, frame(DATA, 0, stream_id, length))


def test_fr_huge_length_is_that_of_our_own_window():
    mux = acceptor(window=MIB)
    assert receive(mux, frame(DATA, 0, 3, MIB)) == []  # nobody's, and drained
    mux = acceptor(window=MIB)
    with pytest.raises(ProtocolError):
        receive(mux, frame(DATA, 0, 3, MIB + 1))


def test_fr_unknown_flags():
    mux = acceptor()
    assert receive(mux, frame(DATA, 0xFFF0, 1, payload=b"plain")) == [Received(1, b"plain")]
    assert receive(mux, frame(WINDOW_UPDATE, 0xFFF0, 1, 5)) == [Writable(1)]
    assert receive(mux, frame(PING, 0xFFF0, 0, 5)) == []


def test_payload_outlives_the_buffer_that_it_came_in():
    mux = acceptor()
    buffer = memoryview(bytearray(frame(DATA, 0, 1, payload=b"payload") + frame(PING, SYN, 0, 7)))
    events = receive(mux, buffer[:-5])  # half a header is kept, too
    tail = bytes(buffer[-5:])
    buffer[:] = bytes(len(buffer))
    assert payload_of(events) == b"payload"
    assert receive(mux, tail) == []
    assert sent(mux)[-1][:4] == (PING, ACK, 0, 7)


# Flow control ------------------------------------------------------------------------------------


def test_fc_exact_window():
    mux = acceptor()
    full = bytes(INITIAL_WINDOW)
    assert payload_of(receive(mux, frame(DATA, 0, 1, payload=full))) == full
    events = receive(mux, frame(DATA, 0, 1, payload=b"x"))
    assert events == [WasReset(1, 0, "stream 1: 1 bytes came, 0 were permitted", cut=True)]
    assert sent(mux) == [(WINDOW_UPDATE, RST, 1, 0, b"")]
    assert len(mux._flows) == 0


def test_an_overrun_is_drained_and_the_second_one_ends_the_session():
    mux = acceptor()
    receive(mux, frame(WINDOW_UPDATE, SYN, 3))
    receive(mux, frame(DATA, 0, 1, payload=bytes(INITIAL_WINDOW)))
    over = receive(mux, frame(DATA, FIN, 1, payload=b"over"))
    assert [type(event) for event in over] == [WasReset]
    mux.accept(3)
    full = frame(DATA, 0, 3, payload=bytes(INITIAL_WINDOW))
    assert payload_of(receive(mux, full)) == bytes(INITIAL_WINDOW)
    with pytest.raises(ProtocolError, match="stream 3: 2 bytes came, 0 were permitted"):
        receive(mux, frame(DATA, 0, 3, payload=b"xx"))


@pytest.mark.parametrize("answered", [True, False], ids=["fc_sender_stops", "fc_before_ack"])
def test_a_sender_stops_at_the_window(answered):
    mux = Mux(client=True)
    mux.open(0.0)
    sent(mux)
    if answered:
        receive(mux, frame(WINDOW_UPDATE, ACK, 1))
    total = 0
    while room := mux.room(1):
        mux.send(1, bytes(min(room, 10_000)))
        total += sum(got[3] for got in sent(mux))
    assert total == INITIAL_WINDOW
    assert isinstance(receive(mux, frame(WINDOW_UPDATE, 0, 1, 1000))[-1], Writable)
    assert mux.room(1) == 1000
    mux.send(1, bytes(1000))
    assert [got[3] for got in sent(mux)] == [1000]
    assert mux.room(1) == 0


def test_fc_half_rule():
    mux = acceptor()
    receive(mux, frame(DATA, 0, 1, payload=bytes(INITIAL_WINDOW)))
    assert not mux.consumed(1, 131071, 0.0)
    assert sent(mux) == []
    assert mux.consumed(1, 1, 0.0)
    assert sent(mux) == [(WINDOW_UPDATE, 0, 1, 131072, b"")]
    assert payload_of(receive(mux, frame(DATA, 0, 1, payload=bytes(131072)))) == bytes(131072)


def test_fc_merge_updates():
    mux, updates = acceptor(), []
    receive(mux, frame(DATA, 0, 1, payload=bytes(INITIAL_WINDOW)))
    for _ in range(INITIAL_WINDOW // 64):
        mux.consumed(1, 64, 0.0)
        updates += sent(mux)
    assert [got[3] for got in updates if got[0] == WINDOW_UPDATE] == [131072, 131072]


def test_fc_merge_updates_that_wait_for_the_line():
    mux = acceptor()
    receive(mux, frame(DATA, 0, 1, payload=bytes(INITIAL_WINDOW)))
    mux.consumed(1, 131072, 0.0)
    mux.consumed(1, 131072, 0.0)
    assert sent(mux)[0] == (WINDOW_UPDATE, 0, 1, 262144, b"")


@pytest.mark.parametrize("kind", [WINDOW_UPDATE, DATA])
def test_fc_syn_delta(kind):
    mux = Mux(client=False)
    receive(mux, frame(kind, SYN, 1, 786432 if kind == WINDOW_UPDATE else 0))
    assert mux._flows[1].may_send == (MIB if kind == WINDOW_UPDATE else INITIAL_WINDOW)


def test_fc_ack_delta():
    mux = Mux(client=True)
    mux.open(0.0)
    assert receive(mux, frame(WINDOW_UPDATE, ACK, 1, 786432)) == [Answered(1), Writable(1)]
    total = 0
    while room := mux.room(1):
        mux.send(1, bytes(room))
        total += room
        sent(mux)
    assert total == MIB


def test_fc_announce_in_syn_and_in_ack_once():
    mux = Mux(client=True, window=MIB)
    mux.open(0.0)
    receive(mux, frame(WINDOW_UPDATE, SYN, 2))
    mux.accept(2)
    mux.accept(2)
    assert sent(mux) == [(WINDOW_UPDATE, SYN, 1, 786432, b""), (WINDOW_UPDATE, ACK, 2, 786432, b"")]
    for stream_id in (1, 2):
        data = frame(DATA, 0, stream_id, payload=bytes(MIB))
        assert payload_of(receive(mux, data)) == bytes(MIB)
        assert not mux.consumed(stream_id, MIB // 2 - 1, 0.0)
        assert mux.consumed(stream_id, 1, 0.0)


def test_a_bigger_window_counts_only_from_the_ack_on():
    mux = Mux(client=False, window=MIB)
    receive(mux, frame(WINDOW_UPDATE, SYN, 1))
    receive(mux, frame(DATA, 0, 1, payload=bytes(INITIAL_WINDOW)))
    assert isinstance(receive(mux, frame(DATA, 0, 1, payload=b"x"))[0], WasReset)


@pytest.mark.parametrize("window", [INITIAL_WINDOW - 1, MAX_WINDOW + 1, 0])
def test_reject_windows_that_yamux_cannot_have(window):
    with pytest.raises(ValueError, match=f"window {window}, expected 262144 to 67108864"):
        Mux(client=True, window=window)


def test_fc_syn_body_counts():
    mux = Mux(client=False)
    body = bytes(INITIAL_WINDOW)
    assert receive(mux, frame(DATA, SYN, 1, payload=body)) == [Opened(1), Received(1, body)]
    mux.accept(1)
    assert isinstance(receive(mux, frame(DATA, 0, 1, payload=b"x"))[0], WasReset)


def test_fc_syn_body_counts_when_our_windows_are_bigger():
    mux = Mux(client=False, window=MIB)
    assert receive(mux, frame(DATA, SYN, 1, payload=bytes(INITIAL_WINDOW + 1))) == []
    assert sent(mux) == [(WINDOW_UPDATE, RST, 1, 0, b"")]
    assert len(mux._flows) == 0
    assert receive(mux, frame(WINDOW_UPDATE, SYN, 3)) == [Opened(3)]  # the body was drained


def test_fc_delta_overflow():
    mux = acceptor()
    receive(mux, frame(WINDOW_UPDATE, 0, 1, MAX_UINT32 - INITIAL_WINDOW))
    assert mux._flows[1].may_send == MAX_UINT32
    with pytest.raises(ProtocolError, match="stream 1: a window above 4294967295"):
        receive(mux, frame(WINDOW_UPDATE, 0, 1, 1))


@pytest.mark.parametrize("flags", [SYN, ACK])
def test_fc_delta_overflow_in_the_first_frame(flags):
    mux = Mux(client=flags == ACK)
    if flags == ACK:
        mux.open(0.0)
    with pytest.raises(ProtocolError, match="a window above"):
        receive(mux, frame(WINDOW_UPDATE, flags, 1, MAX_UINT32 - INITIAL_WINDOW + 1))


def test_fc_zero_delta_zero_data():
    mux = acceptor()
    assert receive(mux, frame(WINDOW_UPDATE, 0, 1, 0) + frame(DATA, 0, 1)) == []
    assert sent(mux) == []


def test_fc_rst_length_not_credit():
    mux = acceptor()
    events = receive(mux, frame(WINDOW_UPDATE, RST, 1, 42))
    assert events == [WasReset(1, 42, "the peer reset the stream")]
    assert mux.room(1) == 0


def test_fc_update_after_close():
    mux = acceptor()
    receive(mux, frame(WINDOW_UPDATE, FIN, 1))
    mux.finish(1)
    assert sent(mux) == [(WINDOW_UPDATE, FIN, 1, 0, b"")]
    assert receive(mux, frame(WINDOW_UPDATE, 0, 1, MAX_UINT32) * 2) == []
    assert sent(mux) == []
    assert mux.strays == 2


def test_credit_is_owed_to_nobody_whose_side_has_ended():
    mux = acceptor()
    receive(mux, frame(DATA, 0, 1, payload=bytes(INITIAL_WINDOW)))
    mux.consumed(1, 131072, 0.0)  # queued, and then not worth a frame any more
    receive(mux, frame(WINDOW_UPDATE, FIN, 1))
    assert not mux.consumed(1, 131072, 0.0)
    assert sent(mux) == []


def test_send_refuses_more_than_room():
    mux = acceptor()
    with pytest.raises(ValueError, match="262145 bytes for a room of 262144"):
        mux.send(1, bytes(INITIAL_WINDOW + 1))
    assert sent(mux) == []


def test_room_is_bounded_by_what_waits_for_the_line():
    mux = acceptor()
    receive(mux, frame(WINDOW_UPDATE, 0, 1, 100 * MIB))
    assert mux.room(1) == SEND_BUFFER
    mux.send(1, bytes(SEND_BUFFER))
    assert mux.room(1) == 0
    data, served = mux.pull(1)
    assert served == [1]
    assert mux.room(1) == len(data) - HEADER_SIZE


# Windows that grow -------------------------------------------------------------------------------

ROUND_TRIP = 0.05  # seconds


def reading(window=INITIAL_WINDOW, account=None):
    """A Mux that knows its round trip, with stream 1 open to be read."""
    mux = acceptor(window=window, account=account)
    mux.round_trip = ROUND_TRIP
    return mux


def deliver(mux, count, now, stream_id=1):
    """Have ``count`` bytes come, in frames that every window permits."""
    while count:
        size = min(count, INITIAL_WINDOW)
        receive(mux, frame(DATA, 0, stream_id, payload=bytes(size)), now)
        count -= size


def credit(mux):
    """What a Mux gives a stream: the sum of its updates."""
    frames = sent(mux)
    assert all(got[:3] == (WINDOW_UPDATE, 0, 1) for got in frames)
    return sum(got[3] for got in frames)


def grow(mux, window, stream_id=1):
    """Read so much in so little time that a window grows to ``window``, or as far as it may."""
    while mux.window(stream_id) < window:
        before = mux.window(stream_id)
        deliver(mux, before // 2, 0.0, stream_id)
        mux.consumed(stream_id, before // 2, 0.0)
        if mux.window(stream_id) == before:
            break
    return mux.window(stream_id)


@pytest.mark.parametrize("window", [INITIAL_WINDOW, MIB])
@pytest.mark.parametrize(("ratio", "grows"), [(0.99, True), (1.01, False)])
def test_fc_autotune_doubles_a_window_of_which_half_is_used_in_time(window, ratio, grows):
    mux = reading(window)
    in_time = 2 * ROUND_TRIP
    deliver(mux, window // 2, now=100.0)
    assert mux.consumed(1, window // 2, 100.0 + in_time * ratio)
    assert mux.window(1) == (2 * window if grows else window)
    assert credit(mux) == window // 2 + (window if grows else 0)


def test_fc_autotune_waits_until_a_round_trip_is_known():
    mux = acceptor()
    deliver(mux, INITIAL_WINDOW // 2, 0.0)
    mux.consumed(1, INITIAL_WINDOW // 2, 0.0)
    assert mux.window(1) == credit(mux) * 2 == INITIAL_WINDOW


def test_fc_autotune_asks_for_the_round_trip_when_credit_is_given_again():
    mux = acceptor()
    for now, expected in ((0.0, [WINDOW_UPDATE]), (1.0, [WINDOW_UPDATE, PING])):
        deliver(mux, INITIAL_WINDOW // 2, now)
        mux.consumed(1, INITIAL_WINDOW // 2, now)
        frames = sent(mux)
        assert [got[0] for got in frames] == expected
    receive(mux, frame(PING, ACK, 0, frames[1][3]), now=1.5)
    assert mux.round_trip == 0.5
    deliver(mux, INITIAL_WINDOW // 2, 1.5)
    mux.consumed(1, INITIAL_WINDOW // 2, 1.5)
    assert [got[:4] for got in sent(mux)] == [(WINDOW_UPDATE, 0, 1, 3 * INITIAL_WINDOW // 2)]


def test_fc_autotune_wants_a_reader_that_keeps_up():
    mux = reading()
    deliver(mux, INITIAL_WINDOW, 0.0)
    mux.consumed(1, INITIAL_WINDOW // 2, 0.0)  # the other half is still unread
    assert mux.window(1) == credit(mux) * 2 == INITIAL_WINDOW


def test_fc_autotune_grows_though_each_round_trip_delivers_a_whole_window_at_once():
    """Then more than a quarter is unread whenever half of the window has been used."""
    mux = reading()
    for now in (0.0, ROUND_TRIP):
        unread = mux._flows[1].may_receive
        deliver(mux, unread, now)
        while unread and mux.window(1) == INITIAL_WINDOW:
            piece = min(unread, INITIAL_WINDOW // 4 - 12)  # of a large read, which holds headers
            mux.consumed(1, piece, now)
            unread -= piece
    assert mux.window(1) > INITIAL_WINDOW


def test_fc_autotune_ends_at_the_largest_window_and_gives_no_more_than_so_much_credit_at_once():
    mux = reading(MIB)
    assert grow(mux, 2 * MAX_WINDOW) == MAX_WINDOW
    assert credit(mux) > MAX_WINDOW - MIB
    mux = reading(MIB)
    grow(mux, 8 * MIB)
    sent(mux)
    deliver(mux, MIB, 9.0)
    assert not mux.consumed(1, gotunnel.CREDIT - 1, 9.9)
    assert mux.consumed(1, 1, 9.9) and credit(mux) == gotunnel.CREDIT


def test_a_grown_window_is_kept_to_the_byte():
    mux = reading()
    window = grow(mux, 4 * INITIAL_WINDOW)
    whole = frame(DATA, 0, 1, payload=bytes(window))  # as Go sends them: as large as its credit
    assert len(receive(mux, whole)) == 1
    assert kinds(receive(mux, frame(DATA, 0, 1, payload=b"x"))) == [WasReset]


def kinds(events):
    return [type(event) for event in events]


def test_a_slow_reader_gives_back_what_its_window_has_grown_by():
    account = Account(Memory())
    mux = reading(account=account)
    window = grow(mux, 16 * INITIAL_WINDOW)
    sent(mux)
    assert account.promised == window - INITIAL_WINDOW
    while mux.window(1) > 2 * gotunnel.CREDIT:
        deliver(mux, mux._flows[1].may_receive, 0.0)  # more than it reads
        before = mux.window(1)
        assert not mux.consumed(1, gotunnel.CREDIT, 0.0)
        assert mux.window(1) == before - gotunnel.CREDIT == INITIAL_WINDOW + account.promised
    assert sent(mux) == []
    check_tables(mux)


@pytest.mark.parametrize(
    ("ratio", "beside", "expected"),
    [
        (4.1, True, gotunnel.SHARED_WINDOW),
        (4.1, False, MIB),  # no other stream would wait
        (3.9, True, MIB),  # the line needs it
    ],
)
def test_a_window_that_is_large_for_the_line_shrinks_beside_another_busy_stream(
    ratio, beside, expected
):
    mux = reading(MIB)
    receive(mux, frame(WINDOW_UPDATE, SYN, 3))
    mux.accept(3)
    now = 0.0
    for _ in range(8):
        for number in (1, 3) if beside else (1,):
            half = mux.window(number) // 2
            deliver(mux, half, now, number)
            mux.consumed(number, half, now + ratio * ROUND_TRIP)
        now += ratio * ROUND_TRIP
    assert mux.window(1) == expected
    sent(mux)
    check_tables(mux)


def test_a_stream_that_hardly_moves_gives_back_as_much_as_it_reads():
    mux = reading()
    window = grow(mux, 4 * INITIAL_WINDOW)
    sent(mux)
    deliver(mux, 1000, 0.0)
    mux.consumed(1, 500, gotunnel.IDLE_WINDOW)  # in time
    assert mux.window(1) == window
    mux.consumed(1, 500, gotunnel.IDLE_WINDOW + 0.1)
    assert (mux.window(1), credit(mux)) == (window - 1000, 0)


def opened_streams(mux, count):
    for number in range(1, 2 * count, 2):
        receive(mux, frame(WINDOW_UPDATE, SYN, number))
        mux.accept(number)
    sent(mux)


def test_streams_of_a_session_share_what_their_windows_may_grow_by():
    account = Account(Memory())
    mux = Mux(client=False, account=account)
    mux.round_trip = ROUND_TRIP
    opened_streams(mux, 50)
    windows = [grow(mux, MAX_WINDOW, number) for number in range(1, 100, 2)]
    assert account.promised == sum(windows) - 50 * INITIAL_WINDOW <= gotunnel.SESSION_GROWTH
    assert windows == sorted(windows, reverse=True) and windows[0] == MAX_WINDOW
    assert windows[9] > INITIAL_WINDOW  # the first ones did not take everything
    for number in range(1, 100, 2):
        receive(mux, frame(WINDOW_UPDATE, RST, number))
    assert account.promised == account.memory.promised == 0


def test_sessions_of_a_small_machine_share_what_their_windows_may_grow_by():
    memory = Memory(1024 * MIB)
    windows = [grow(reading(account=Account(memory)), MAX_WINDOW) for _ in range(20)]
    assert memory.promised == sum(windows) - 20 * INITIAL_WINDOW <= 128 * MIB
    assert windows[0] == MAX_WINDOW and windows[4] > INITIAL_WINDOW


@pytest.mark.parametrize("end", ["reset", "finish", "was reset", "end"])
def test_what_a_window_has_grown_by_comes_back_with_the_end(end):
    account = Account(Memory())
    mux = reading(account=account)
    grow(mux, MIB)
    assert account.promised
    if end == "reset":
        mux.reset(1)
    elif end == "finish":
        mux.finish(1)
        sent(mux)
        receive(mux, frame(WINDOW_UPDATE, FIN, 1))
    elif end == "was reset":
        receive(mux, frame(WINDOW_UPDATE, RST, 1))
    else:
        mux.end()
    assert account.promised == account.memory.promised == 0


def test_windows_begin_small_and_stay_so_while_memory_is_scarce():
    memory = Memory(512 * MIB)
    other = Account(memory)
    hold(other, 65 * MIB)
    mux = Mux(client=False, window=MIB, account=Account(memory))
    mux.round_trip = ROUND_TRIP
    receive(mux, frame(WINDOW_UPDATE, SYN, 1))
    mux.accept(1)
    assert sent(mux) == [(WINDOW_UPDATE, ACK, 1, 0, b"")]
    assert grow(mux, MIB) == INITIAL_WINDOW
    other.close()
    assert grow(mux, MIB) == MIB


def test_windows_begin_small_while_the_session_holds_much():
    account = Account(Memory())
    mux = Mux(client=False, window=MIB, account=account)
    hold(account, gotunnel.MUCH_HELD)
    assert mux.window(mux.open(0)) == MIB
    hold(account, 1)
    assert mux.window(mux.open(0)) == INITIAL_WINDOW
    assert sent(mux)[-1] == (WINDOW_UPDATE, SYN, 4, 0, b"")
    account.close()
    assert mux.window(mux.open(0)) == MIB


# What payload takes ------------------------------------------------------------------------------


def test_an_account_tells_the_memory_in_steps_and_the_rest_at_the_end():
    memory = Memory()
    account = Account(memory)
    hold(account, Account.STEP - 1)
    assert memory.buffered == 0
    hold(account, 1)
    assert memory.buffered == Account.STEP
    hold(account, -10)
    account.close()
    hold(account, -Account.STEP)  # a late reader
    assert memory.buffered == 0


def test_a_memory_is_scarce_from_half_of_its_limit_on():
    memory = Memory(512 * MIB)
    seen = []
    for held in (64 * MIB, 64 * MIB + 1):
        memory.buffered = held
        seen.append(memory.scarce)
    assert seen == [False, True]


def test_a_session_may_buffer_what_is_left_for_the_others_and_always_a_little():
    memory = Memory(512 * MIB)
    accounts = [Account(memory) for _ in range(10)]
    for account in accounts:
        while account.held + MIB <= memory.share:
            hold(account, MIB)
    assert [account.held // MIB for account in accounts] == [64, 32, 16, 8, 4, 2, 1, 1, 1, 1]


def test_much_that_waits_for_the_line_leaves_each_stream_room_for_its_next_frame():
    mux = Mux(client=True)
    numbers = [mux.open(0.0) for _ in range(40)]
    for number in numbers:
        mux.send(number, bytes(mux.room(number)))
    assert mux._queued == gotunnel.SEND_QUEUE + 8 * FRAME_SHARED
    assert mux._account.held == mux._queued
    served = set()
    while served != set(numbers):  # each gets its turn, and then room again
        served.update(mux.pull(SEND_BUFFER)[1])
    for number in numbers[-8:]:
        assert 0 < mux.room(number) <= SEND_BUFFER
    mux.end()
    assert mux._queued == mux._account.held == 0


def test_scarce_memory_leaves_each_stream_room_for_its_next_frame():
    memory = Memory(512 * MIB)
    memory.buffered = 129 * MIB
    mux = Mux(client=True, account=Account(memory))
    numbers = [mux.open(0.0) for _ in range(5)]
    for number in numbers:
        mux.send(number, bytes(mux.room(number)))
    assert mux._queued == Memory.FLOOR + FRAME_SHARED


def test_small_pieces_are_joined_where_they_wait():
    queue = collections.deque()
    pieces = [b"%d" % number for number in range(50_000)]
    for piece in pieces:
        gotunnel.put(queue, piece)
    assert b"".join(queue) == b"".join(pieces)
    assert len(queue) <= 2 + sum(map(len, pieces)) // FRAME_ALONE
    gotunnel.put(queue, bytes(gotunnel.SMALL))  # worth an object of its own
    assert len(queue[-1]) == gotunnel.SMALL


def test_small_writes_that_wait_stay_whole_when_frames_are_cut_from_them():
    mux = Mux(client=True)
    number, other = mux.open(0.0), mux.open(0.0)
    expected, came = b"", b""
    for turn in range(100):
        for piece in (b"a" * (turn + 1), b"b" * (3 * turn + 1), bytes(1500)):
            mux.send(number, piece)
            expected += piece
        mux.send(other, b"a rival, so that frames are short")
        if turn % 9 == 8:
            came += b"".join(got[4] for got in split_frames(mux.pull(1)[0]) if got[2] == number)
    came += b"".join(got[4] for got in sent(mux) if got[2] == number)
    assert came == expected


# Open and close ----------------------------------------------------------------------------------


@pytest.mark.parametrize(("client", "ids"), [(True, [1, 3, 5]), (False, [2, 4, 6])])
def test_oc_ids(client, ids):
    mux = Mux(client=client)
    assert [mux.open(0.0) for _ in ids] == ids
    assert [got[:3] for got in sent(mux)] == [(WINDOW_UPDATE, SYN, number) for number in ids]


def test_oc_ack_once_first():
    mux = Mux(client=False)
    receive(mux, frame(WINDOW_UPDATE, SYN, 1))
    assert sent(mux) == []  # the ACK says that we have accepted, not that we have heard
    mux.accept(1)
    mux.send(1, b"hello")
    mux.accept(1)
    mux.send(1, b" you")
    mux.finish(1)
    assert sent(mux) == [
        (WINDOW_UPDATE, ACK, 1, 0, b""),
        (DATA, 0, 1, 9, b"hello you"),
        (WINDOW_UPDATE, FIN, 1, 0, b""),
    ]


def full_opener():
    """A Mux with as many unanswered opens as it may have."""
    mux = Mux(client=True)
    while mux.may_open:
        mux.open(0.0)
    return mux


def test_oc_backlog_256():
    mux = full_opener()
    assert len(sent(mux)) == 256
    assert receive(mux, frame(WINDOW_UPDATE, ACK, 1)) == [Answered(1)]
    assert mux.may_open
    mux.open(0.0)
    assert not mux.may_open


@pytest.mark.parametrize(
    "answer",
    [
        frame(WINDOW_UPDATE, RST, 1),
        frame(DATA, 0, 1, payload=b"no ACK"),
        frame(WINDOW_UPDATE, FIN, 1),
        frame(WINDOW_UPDATE, 0, 1, 9),
    ],
    ids=["rst", "data", "fin", "credit"],
)
def test_oc_slot_on_fin_rst_data(answer):
    mux = full_opener()
    assert isinstance(receive(mux, answer)[0], Answered)
    assert mux.may_open
    assert not any(isinstance(event, Answered) for event in receive(mux, answer))


def test_oc_slot_on_our_own_reset():
    mux = full_opener()
    mux.reset(1)
    assert mux.may_open


def test_oc_many_sequential():
    wire = Wire(random.Random(0))
    client, server = wire.ends
    for number in range(1, 20_001, 2):
        assert client.may_open and client.open(0.0) == number
        client.send(number, b"echo")
        client.finish(number)
        expected = [Opened(number), Received(number, b"echo"), Finished(number)]
        assert Events(wire.settle()[1]) == expected
        server.accept(number)
        server.send(number, b"echo")
        server.finish(number)
        assert payload_of(wire.settle()[0]) == b"echo"
    for mux in wire.ends:
        check_tables(mux)
        assert len(mux._flows) == 0 and mux.strays == 0


def test_oc_accept_overflow():
    mux = Mux(client=False)
    opens = [frame(DATA, SYN, number, payload=b"early") for number in range(1, 601, 2)]
    events = receive(mux, b"".join(opens) + frame(PING, SYN, 0, 5))
    assert [event.stream_id for event in events if isinstance(event, Opened)] == [*range(1, 513, 2)]
    assert len(payload_of(events)) == 256 * len(b"early")
    pong, *resets = sent(mux)
    assert pong == (PING, ACK, 0, 5, b"")
    assert resets == [(WINDOW_UPDATE, RST, number, 0, b"") for number in range(513, 601, 2)]
    mux.accept(1)
    assert receive(mux, frame(WINDOW_UPDATE, SYN, 601)) == [Opened(601)]


def test_the_peer_may_have_max_streams_and_not_one_more():
    mux = Mux(client=False, max_streams=2)
    for number in (1, 3):
        assert receive(mux, frame(WINDOW_UPDATE, SYN, number)) == [Opened(number)]
        mux.accept(number)
    mux.open(0.0)  # ours do not count
    assert receive(mux, frame(WINDOW_UPDATE, SYN, 5)) == []
    assert (WINDOW_UPDATE, RST, 5, 0, b"") in sent(mux)
    assert mux.refused == 1
    receive(mux, frame(WINDOW_UPDATE, RST, 1))
    assert receive(mux, frame(WINDOW_UPDATE, SYN, 7)) == [Opened(7)]
    assert mux.refused == 1


def test_oc_syn_fin():
    mux = Mux(client=False)
    events = receive(mux, frame(DATA, SYN | FIN, 1, payload=b"hi"))
    assert events == [Opened(1), Received(1, b"hi"), Finished(1)]
    mux.accept(1)
    mux.send(1, b"answer")
    mux.finish(1)
    assert [got[:2] for got in sent(mux)] == [(WINDOW_UPDATE, ACK), (DATA, 0), (WINDOW_UPDATE, FIN)]
    assert len(mux._flows) == 0


@pytest.mark.parametrize("kind", [WINDOW_UPDATE, DATA])
def test_oc_syn_rst(kind):
    mux = Mux(client=False)
    body = b"lost" if kind == DATA else b""
    assert receive(mux, frame(kind, SYN | RST, 1, payload=body)) == []
    mux.accept(1)  # nobody could know it, but it must not matter
    assert sent(mux) == [] and len(mux._flows) == 0
    assert receive(mux, frame(WINDOW_UPDATE, SYN, 3)) == [Opened(3)]


def test_oc_out_of_order():
    mux = Mux(client=False)
    assert receive(mux, frame(WINDOW_UPDATE, SYN, 5, 99)) == [Opened(5), Writable(5)]
    assert receive(mux, frame(WINDOW_UPDATE, SYN, 3)) == [Opened(3)]
    mux.accept(5)
    receive(mux, frame(DATA, FIN, 5, payload=bytes(200_000)))
    mux.finish(5)
    sent(mux)
    assert receive(mux, frame(WINDOW_UPDATE, SYN, 5)) == [Opened(5)]
    mux.accept(5)
    assert mux.room(5) == INITIAL_WINDOW
    assert len(payload_of(receive(mux, frame(DATA, 0, 5, payload=bytes(INITIAL_WINDOW))))) == 262144


@pytest.mark.parametrize(
    ("carrier", "before"),
    [
        (frame(DATA, FIN, 1), []),
        (frame(DATA, FIN, 1, payload=b"bye"), [Received(1, b"bye")]),
        (frame(WINDOW_UPDATE, FIN, 1), []),
        (frame(WINDOW_UPDATE, FIN, 1, 77), [Writable(1)]),
    ],
    ids=["empty data", "data", "update", "update with credit"],
)
def test_oc_fin_carriers(carrier, before):
    mux = acceptor()
    assert receive(mux, carrier) == [*before, Finished(1)]
    assert mux.room(1) == INITIAL_WINDOW  # bounded by what may wait, so the credit does not show
    mux.send(1, b"still open to us")
    mux.finish(1)
    assert sent(mux)[-1] == (WINDOW_UPDATE, FIN, 1, 0, b"")
    assert len(mux._flows) == 0


@pytest.mark.parametrize("peer_first", [True, False])
def test_oc_fin_once(peer_first):
    mux = acceptor()
    if peer_first:
        receive(mux, frame(WINDOW_UPDATE, FIN, 1))
    mux.send(1, b"last")
    mux.finish(1)
    mux.finish(1)
    assert sent(mux) == [(DATA, 0, 1, 4, b"last"), (WINDOW_UPDATE, FIN, 1, 0, b"")]
    mux.finish(1)
    assert sent(mux) == []
    if not peer_first:
        receive(mux, frame(WINDOW_UPDATE, FIN, 1))
    mux.finish(1)
    assert sent(mux) == []
    assert len(mux._flows) == 0


def test_after_finish_there_is_no_room():
    mux = acceptor()
    mux.finish(1)
    assert mux.room(1) == 0
    with pytest.raises(ValueError, match="a room of 0"):
        mux.send(1, b"x")


def test_credit_for_a_sender_that_has_finished_still_lets_its_queue_out():
    mux = acceptor()
    mux.send(1, b"queued")
    mux.finish(1)
    assert sent(mux)[0] == (DATA, 0, 1, 6, b"queued")
    receive(mux, frame(DATA, 0, 1, payload=bytes(INITIAL_WINDOW)))
    assert mux.consumed(1, INITIAL_WINDOW, 0.0)  # half-closed: updates still go out
    assert sent(mux) == [(WINDOW_UPDATE, 0, 1, INITIAL_WINDOW, b"")]


@pytest.mark.parametrize(
    "second", [frame(WINDOW_UPDATE, FIN, 1), frame(DATA, FIN, 1, payload=b"x")]
)
def test_oc_double_fin_in(second):
    mux = acceptor()
    assert receive(mux, frame(WINDOW_UPDATE, FIN, 1)) == [Finished(1)]
    assert receive(mux, second) == []
    assert receive(mux, frame(PING, SYN, 0, 1)) == []
    assert sent(mux) == [(PING, ACK, 0, 1, b"")]


def test_oc_data_after_fin():
    mux = acceptor()
    receive(mux, frame(WINDOW_UPDATE, FIN, 1))
    assert receive(mux, frame(DATA, 0, 1, payload=b"late") * 3) == []
    assert receive(mux, frame(WINDOW_UPDATE, 0, 1, 8)) == [Writable(1)]
    mux.send(1, b"ours goes on")
    assert sent(mux) == [(DATA, 0, 1, 12, b"ours goes on")]


def test_oc_close_linger_has_a_limit_of_bytes(monkeypatch):
    monkeypatch.setattr(gotunnel, "DISCARD_LIMIT", 2 * INITIAL_WINDOW)
    mux = acceptor()
    mux.round_trip = 1.0
    receive(mux, frame(DATA, 0, 1, payload=bytes(100)))
    mux.finish(1)
    mux.discard(1, 0.0)
    for size in (INITIAL_WINDOW - 100, INITIAL_WINDOW // 2, INITIAL_WINDOW // 2):
        assert receive(mux, frame(DATA, 0, 1, payload=bytes(size))) == []
    assert sum(got[3] for got in sent(mux) if got[0] == WINDOW_UPDATE) == 2 * INITIAL_WINDOW
    assert mux.window(1) == INITIAL_WINDOW  # for what nobody wants it does not grow
    assert kinds(receive(mux, frame(DATA, 0, 1, payload=bytes(200)))) == [WasReset]
    assert sent(mux) == [(WINDOW_UPDATE, RST, 1, 0, b"")]


@pytest.mark.parametrize(("client", "last"), [(True, 0xFFFFFFFD), (False, 0xFFFFFFFC)])
def test_oc_ids_exhausted(client, last):
    mux = Mux(client=client)
    mux._next_id = last
    assert mux.open(0.0) == last
    for _ in range(2):
        with pytest.raises(SessionClosed, match="the session has used up its stream ids"):
            mux.open(0.0)
    assert len(mux._flows) == 1 and len(mux._unanswered) == 1
    assert len(sent(mux)) == 1


# Reset -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "carrier",
    [frame(DATA, RST, 1, payload=b"drained"), frame(DATA, RST, 1), frame(WINDOW_UPDATE, RST, 1)],
    ids=["data", "empty data", "update"],
)
def test_rs_carriers(carrier):
    mux = acceptor()
    assert receive(mux, carrier) == [WasReset(1, 0, "the peer reset the stream")]
    assert receive(mux, frame(WINDOW_UPDATE, SYN, 3)) == [Opened(3)]


def test_rs_no_reply():
    mux = acceptor()
    mux.send(1, b"queued")
    receive(mux, frame(DATA, 0, 1, payload=bytes(INITIAL_WINDOW)))
    mux.consumed(1, INITIAL_WINDOW, 0.0)
    receive(mux, frame(WINDOW_UPDATE, RST, 1))
    mux.finish(1)
    mux.reset(1)
    assert not mux.consumed(1, 1, 0.0)
    assert mux.room(1) == 0
    assert sent(mux) == []


def test_rs_late_frames():
    mux = acceptor()
    mux.send(1, b"never leaves")
    mux.reset(1)
    assert sent(mux) == [(WINDOW_UPDATE, RST, 1, 0, b"")]
    late = frame(DATA, 0, 1, payload=bytes(65536)) * 4 + frame(WINDOW_UPDATE, FIN, 1)
    assert receive(mux, late) == []
    assert sent(mux) == []
    assert mux.strays == 5


def test_rs_in_the_middle_of_a_payload():
    mux = acceptor()
    data = frame(DATA, FIN, 1, payload=b"abcdef") + frame(WINDOW_UPDATE, SYN, 3)
    assert receive(mux, data[:14]) == [Received(1, b"ab")]
    mux.reset(1)
    assert receive(mux, data[14:]) == [Opened(3)]


def test_rs_after_syn():
    mux = Mux(client=True)
    mux.open(0.0)
    mux.send(1, b"first")
    mux.reset(1)
    assert sent(mux) == [(WINDOW_UPDATE, SYN, 1, 0, b""), (WINDOW_UPDATE, RST, 1, 0, b"")]


# Ping --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [0, 7, 0xFFFFFFFF])
@pytest.mark.parametrize(("flags", "stream_id"), [(SYN, 0), (SYN | ACK, 0), (SYN, 9)])
def test_ka_echo(value, flags, stream_id):
    mux = Mux(client=True)
    assert receive(mux, frame(PING, flags, stream_id, value)) == []
    assert sent(mux) == [(PING, ACK, 0, value, b"")]


def ping(mux, now):
    """Have a Mux ping; return the value that it wants back."""
    mux.keep_alive(now)
    ((kind, flags, stream_id, value, _),) = sent(mux)
    assert (kind, flags, stream_id) == (PING, SYN, 0)
    return value


def test_ka_unsolicited():
    mux = Mux(client=True)
    assert receive(mux, frame(PING, ACK, 0, 7) * 2 + frame(PING, 0, 0, 7), now=1.0) == []
    assert mux.round_trip is None
    value = ping(mux, now=2.0)
    wrong, right = frame(PING, ACK, 0, value ^ 1), frame(PING, ACK, 0, value)
    assert receive(mux, wrong, now=2.5) == [] and mux.round_trip is None
    assert receive(mux, right, now=3.0) == [] and mux.round_trip == 1.0
    assert receive(mux, right, now=3.0) == [] and mux.round_trip == 1.0
    assert sent(mux) == []


def test_pings_have_values_of_their_own():
    mux = Mux(client=True)
    values = set()
    for now in range(5):
        values.add(ping(mux, now))
        receive(mux, frame(PING, SYN, 0, 1), now)
        sent(mux)
    assert len(values) == 5


def test_the_shortest_round_trip_counts_of_pings_and_of_opens():
    mux = Mux(client=True)
    receive(mux, frame(PING, ACK, 0, ping(mux, now=0.0)), now=0.5)
    assert mux.round_trip == 0.5
    receive(mux, frame(WINDOW_UPDATE, ACK, mux.open(1.0)), now=1.25)
    assert mux.round_trip == 0.25
    receive(mux, frame(WINDOW_UPDATE, ACK, mux.open(2.0)), now=9.0)
    assert mux.round_trip == 0.25


@pytest.mark.parametrize("answered", [False, True])
def test_ka_dead_peer_is_one_that_sends_nothing_after_a_ping(answered):
    mux = Mux(client=True)
    value = ping(mux, now=10.0)
    if answered:
        receive(mux, frame(PING, ACK, 0, value), now=10.1)
        ping(mux, now=20.0)
    with pytest.raises(SessionClosed, match="the peer sent nothing for 10 s"):
        mux.keep_alive(30.0)


def test_ka_a_ping_for_another_reason_takes_no_time_from_the_peer():
    mux = acceptor()
    receive(mux, frame(PING, ACK, 0, 0), now=0.0)
    mux.keep_alive(0.0)
    receive(mux, frame(WINDOW_UPDATE, 0, 1, 0), now=5.0)
    mux._ask(9.99)
    mux.keep_alive(10.0)
    with pytest.raises(SessionClosed, match="the peer sent nothing"):
        mux.keep_alive(20.0)


def test_ka_data_is_life_even_without_a_pong():
    mux = acceptor()
    for now in range(0, 100, 10):
        ping(mux, now)
        receive(mux, frame(DATA, 0, 1, payload=b"x"), now + 0.1)


# Go away -----------------------------------------------------------------------------------------


def test_ga_recv_normal():
    mux = opener()
    assert receive(mux, frame(GO_AWAY, 0, 0, 0)) == [GoneAway(0)]
    with pytest.raises(SessionClosed, match="the session takes no new streams"):
        mux.open(0.0)
    assert receive(mux, frame(WINDOW_UPDATE, SYN, 2)) == [Opened(2)]
    assert receive(mux, frame(DATA, 0, 1, payload=b"goes on")) == [Received(1, b"goes on")]
    assert mux.room(1) == INITIAL_WINDOW


@pytest.mark.parametrize("code", [1, 2, 4101])
def test_ga_recv_codes(code):
    assert receive(Mux(client=True), frame(GO_AWAY, 0, 0, code)) == [GoneAway(code)]


def test_ga_sent():
    mux = acceptor()
    mux.go_away()
    assert sent(mux) == [(GO_AWAY, 0, 0, 0, b"")]
    assert receive(mux, frame(DATA, SYN, 3, payload=b"no") + frame(DATA, 0, 1, payload=b"yes")) == [
        Received(1, b"yes")
    ]
    assert sent(mux) == [(WINDOW_UPDATE, RST, 3, 0, b"")]
    with pytest.raises(SessionClosed):
        mux.open(0.0)
    mux.send(1, b"goes on")
    assert sent(mux) == [(DATA, 0, 1, 7, b"goes on")]


def test_go_away_still_leaves_after_a_protocol_error():
    mux = acceptor()
    with pytest.raises(ProtocolError):
        receive(mux, frame(9, 0, 0))
    mux.go_away(PROTOCOL_ERROR)
    assert sent(mux) == [(GO_AWAY, 0, 0, 1, b"")]


# What goes out, in which order -------------------------------------------------------------------


def test_pull_sends_answers_then_control_then_credit_then_payload():
    mux = acceptor()
    mux.send(1, b"payload")
    receive(mux, frame(DATA, 0, 1, payload=bytes(INITIAL_WINDOW)))
    mux.consumed(1, INITIAL_WINDOW, 0.0)
    mux.open(0.0)
    receive(mux, frame(PING, SYN, 0, 3))
    assert [got[:3] for got in sent(mux)] == [
        (PING, ACK, 0), (WINDOW_UPDATE, SYN, 2), (WINDOW_UPDATE, 0, 1), (DATA, 0, 1),
    ]  # fmt: skip


def test_pull_takes_about_its_limit_and_loses_nothing():
    mux = Mux(client=True)
    for number in range(1, 41, 2):
        mux.open(0.0)
        mux.send(number, bytes([number]) * 20_000)
    data = b""
    while piece := mux.pull(1000)[0]:
        assert len(piece) <= 1000 + HEADER_SIZE + FRAME_ALONE
        data += piece
    opened, received = set(), {}
    for kind, flags, stream_id, _, payload in split_frames(data):
        if flags & SYN:
            opened.add(stream_id)
        else:
            assert kind == DATA and stream_id in opened  # nothing overtakes a SYN
            received[stream_id] = received.get(stream_id, b"") + payload
    assert received == {number: bytes([number]) * 20_000 for number in range(1, 41, 2)}
    assert mux.pull(1000) == (b"", [])


def test_streams_take_turns_in_small_frames():
    mux = Mux(client=True)
    for number in (1, 3):
        mux.open(0.0)
        mux.send(number, bytes(100_000))
    lengths = [(got[2], got[3]) for got in sent(mux)[2:]]
    assert lengths[:6] == [(1, FRAME_SHARED), (3, FRAME_SHARED)] * 3
    assert sum(length for _, length in lengths) == 200_000


def test_a_stream_alone_sends_large_frames():
    mux = opener()
    mux.send(1, bytes(100_000))
    assert [got[3] for got in sent(mux)] == [FRAME_ALONE, 100_000 - FRAME_ALONE]


def test_small_writes_that_waited_leave_in_one_frame():
    mux = opener()
    for number in range(100):
        mux.send(1, bytes([number]))
    assert sent(mux) == [(DATA, 0, 1, 100, bytes(range(100)))]


def test_payload_is_cut_where_frames_end():
    mux = opener()
    data = random.Random(2).randbytes(200_000)
    for at in range(0, len(data), 30_001):
        mux.send(1, data[at : at + 30_001])
    frames = sent(mux)
    assert b"".join(got[4] for got in frames) == data
    assert max(got[3] for got in frames) == FRAME_ALONE


def test_pull_says_whose_payload_it_took():
    mux = Mux(client=True)
    for _ in range(3):
        mux.open(0.0)
    mux.send(1, b"a")
    mux.send(5, b"b")
    mux.finish(3)  # a FIN is no payload, and makes no room
    assert mux.pull(EVERYTHING)[1] == [1, 5]


# Hostile peers -----------------------------------------------------------------------------------


def test_ho_ping_flood():
    mux = Mux(client=True)
    pings = frame(PING, SYN, 0, 1)
    receive(mux, pings * MAX_REPLIES)
    with pytest.raises(ProtocolError, match="the peer has not read 32768 pongs and resets"):
        receive(mux, pings)


def test_ho_ping_flood_of_a_peer_that_reads_is_answered():
    mux = Mux(client=True)
    for _ in range(10):
        receive(mux, frame(PING, SYN, 0, 1) * 5461)
        assert len(sent(mux)) == 5461


WASTE = {  # frames that a peer may send for stream 1, or for none, and that nobody needs
    "no credit": frame(WINDOW_UPDATE, 0, 1, 0),
    "credit in small coin": frame(WINDOW_UPDATE, 0, 1, 1),
    "a second answer": frame(WINDOW_UPDATE, ACK, 1, 0),
    "data without payload": frame(DATA, 0, 1),
    "pings": frame(PING, SYN, 0, 1),
    "pongs": frame(PING, ACK, 0, 77),
    "credit for unknown streams": frame(WINDOW_UPDATE, 0, 77, 9),
    "data for unknown streams": frame(DATA, 0, 77, payload=b"x"),
    "RST for unknown streams": frame(WINDOW_UPDATE, RST, 77),
    "FIN for unknown streams": frame(DATA, FIN, 77),
    "opened and reset at once": frame(WINDOW_UPDATE, SYN | RST, 3),
    "opened, then reset": frame(WINDOW_UPDATE, SYN, 3) + frame(WINDOW_UPDATE, RST, 3),
    "go away again": frame(GO_AWAY, 0, 0, 0),
}


def has_frames(mux, flood, times, now=0.0):
    """Have a Mux receive a flood in pieces, and send its answers."""
    for _ in range(0, times, 100):
        receive(mux, flood * 100, now)
        sent(mux)


@pytest.mark.parametrize("flood", WASTE.values(), ids=WASTE)
def test_ho_frames_that_nobody_needs(flood):
    """As many as an honest peer may ever send do no harm, and each second permits more of them."""
    mux = acceptor(max_streams=2)
    most = gotunnel.WASTE + 2 * gotunnel.WASTE_A_STREAM
    has_frames(mux, flood, most // 100 * 100 - 100)
    for now in range(1, 20):
        has_frames(mux, flood, 100, now * 100.0 / gotunnel.WASTE_A_SECOND)
    with pytest.raises(ProtocolError, match="too many useless frames, the last of them"):
        has_frames(mux, flood, 1000, now * 100.0 / gotunnel.WASTE_A_SECOND)


def test_ho_data_behind_fin():
    mux = acceptor(max_streams=1)
    receive(mux, frame(DATA, FIN, 1))
    with pytest.raises(ProtocolError, match="the last of them: data behind FIN"):
        has_frames(mux, frame(DATA, 0, 1, payload=b"x"), 2 * gotunnel.WASTE)


@pytest.fixture
def little_waste(monkeypatch):
    """Time allows for no frame that nobody needs; ten may come beside what makes up for them."""
    for name in ("WASTE_A_STREAM", "WASTE_A_SECOND", "WASTE_A_STREAM_SECOND"):
        monkeypatch.setattr(gotunnel, name, 0)
    monkeypatch.setattr(gotunnel, "WASTE", 10)


def test_credit_for_what_we_send_is_no_waste(little_waste):
    mux = opener()
    for _ in range(1000):
        mux.send(1, b"x")
        sent(mux)
        receive(mux, frame(WINDOW_UPDATE, 0, 1, 1))


def test_late_frames_of_streams_that_are_over_are_no_waste(little_waste):
    """Of many that end at once, too: they come all together then."""
    mux = Mux(client=False)
    numbers = [mux.open(0.0) for _ in range(OPEN_BACKLOG)]
    for number in numbers:
        mux.reset(number)
    late = (frame(WINDOW_UPDATE, ACK, number, 0) + frame(DATA, 0, number, payload=b"late")
            + frame(WINDOW_UPDATE, 0, number, 9) + frame(DATA, FIN, number)
            for number in numbers)  # fmt: skip
    receive(mux, b"".join(late))
    assert mux.strays == 4 * OPEN_BACKLOG


def test_late_payload_is_no_waste_in_frames_however_small_as_far_as_its_window_went(little_waste):
    """A visitor may have cut it so."""
    mux = opener()
    mux.reset(1)
    late = frame(DATA, 0, 1, payload=b"x")
    for _ in range(INITIAL_WINDOW // 1024):
        receive(mux, late * 1024)
    with pytest.raises(ProtocolError, match="the last of them: frames of streams that are over"):
        receive(mux, late * 1024)


def test_what_honest_frames_make_up_for_has_an_end(little_waste, monkeypatch):
    monkeypatch.setattr(gotunnel, "EARNED", 20)
    mux = opener()
    for _ in range(100):
        mux.send(1, b"x")
        sent(mux)
    receive(mux, frame(PING, SYN, 0, 1) * 30)
    with pytest.raises(ProtocolError, match="the last of them: pings"):
        receive(mux, frame(PING, SYN, 0, 1))


def test_ho_syn_flood():
    mux = Mux(client=False)
    with pytest.raises(ProtocolError, match="has not read 32768 pongs and resets"):
        for number in range(1, 200_001, 2):
            receive(mux, frame(WINDOW_UPDATE, SYN, number))
    assert len(mux._flows) == ACCEPT_BACKLOG
    assert len(mux._control) == MAX_REPLIES


def test_ho_syn_rst_churn():
    mux = Mux(client=False)
    for number in range(1, 200_001, 2):
        receive(mux, frame(WINDOW_UPDATE, SYN, number) + frame(WINDOW_UPDATE, RST, number))
    check_tables(mux)
    assert len(mux._flows) == 0 and sent(mux) == []
    assert receive(mux, frame(WINDOW_UPDATE, SYN, 200_001)) == [Opened(200_001)]


@pytest.mark.parametrize(
    ("client", "stream_id", "sentence"),
    [
        (False, 2, "the peer opened stream 2, its ids are odd"),
        (True, 1, "the peer opened stream 1, its ids are even"),
        (True, 0, "the peer opened stream 0, its ids are even"),
        (False, 0, "the peer opened stream 0, its ids are odd"),
        (False, 1, "the peer opened stream 1, which is open"),
    ],
    ids=["ho_parity of a client", "ho_parity of a server", "ho_id_zero", "ho_id_zero to a server",
         "ho_dup_syn"],
)  # fmt: skip
@pytest.mark.parametrize("kind", [DATA, WINDOW_UPDATE])
def test_reject_opens(client, stream_id, sentence, kind):
    mux = Mux(client=client)
    if not client:
        receive(mux, frame(WINDOW_UPDATE, SYN, 1))
    with pytest.raises(ProtocolError, match=f"^{sentence}$"):
        receive(mux, frame(kind, SYN, stream_id))


def test_ho_stray_frames():
    mux = acceptor()
    strays = frame(DATA, 0, 77, payload=b"x") + frame(WINDOW_UPDATE, ACK, 2) + frame(DATA, FIN, 0)
    assert receive(mux, strays * 1000) == []
    assert mux.strays == 3000
    assert sent(mux) == [] and len(mux._flows) == 1


def test_ho_dup_ack():
    mux = full_opener()
    acks = receive(mux, frame(WINDOW_UPDATE, ACK, 1) * 1000 + frame(WINDOW_UPDATE, ACK, 999))
    assert acks == [Answered(1)]
    mux.open(0.0)
    assert not mux.may_open
