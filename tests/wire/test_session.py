"""Session, Stream and relay: over all transports, against a peer by hand, and beside a Go yamux.

The names ``fr``, ``fc``, ``oc``, ``rs``, ``ka``, ``ga``, ``ho`` and ``ld`` (load) in the tests'
names are those of rules of yamux, as in test_mux.py.
"""

import contextlib
import socket
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
from raw_peer import (  # noqa: F401 (fixtures)
    MIB,
    NO_TABLES,
    PATIENCE,
    SOON,
    accepted,
    ask,
    beside_go,
    close_all,
    digest,
    duplex_pair,
    echoing,
    frame,
    leaves_nothing,
    narrow,
    noise,
    raw_pair,
    read_all,
    send_all,
    session_pair,
    sessions,
    spawn,
    start_tls,
    stream_pair,
    tables,
    wait_for_waiter,
)
from support import wait_until

import gotunnel
from gotunnel import (
    ACK,
    DATA,
    FIN,
    GO_AWAY,
    INITIAL_WINDOW,
    OPEN_BACKLOG,
    PING,
    RST,
    SYN,
    WINDOW_UPDATE,
    ProtocolError,
    Session,
    SessionClosed,
    StreamReset,
)
from gotunnel_agent.common import duplex as duplex_module
from gotunnel_agent.common import relay as relay_module
from gotunnel_agent.common.relay import relay

TRANSPORTS = ["tcp", "tls", "tls reversed"]
ROLES = pytest.mark.parametrize("client", [True, False], ids=["client", "server"])


# Framing -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [frame(PING, 0, 0, version=1), frame(4, 0, 0), frame(255, 0, 0)])
@ROLES
def test_fr_bad_version_and_fr_bad_type_are_told_to_the_peer(bad, client):
    with raw_pair(client=client) as (peer, session):
        peer.send(bad)
        assert peer.read_to_end() == [(GO_AWAY, 0, 0, 1, b"")]
        peer.close()
        session.join(PATIENCE)
        assert session.ended.startswith("protocol error: frame ")


def test_fr_bad_version_wakes_whoever_waits():
    with raw_pair() as (peer, session):
        stream = accepted(peer, session)
        stream.write(bytes(INITIAL_WINDOW))
        calls = [spawn(stream.read), spawn(stream.write, b"x"), spawn(session.accept)]
        for bell in (stream._readable, stream._writable, session._streams.arrival):
            wait_for_waiter(bell)
        peer.send(frame(PING, 0, 0, version=1))
        for call in calls:  # although the peer does not hang up
            with pytest.raises(SessionClosed, match="frame version 1, expected 0"):
                call.result(SOON)


@pytest.mark.parametrize("end", ["close", "reset"])
@pytest.mark.parametrize(
    ("last", "arrives"),
    [(frame(DATA, 0, 1, 300)[:5], b""), (frame(DATA, 0, 1, 300) + b"abc", b"abc"), (b"", b"")],
    ids=["fr_eof_mid_header", "fr_eof_mid_body", "ga_eof_no_fin"],
)
def test_an_end_of_the_connection_is_no_end_of_a_stream(last, arrives, end):
    with raw_pair(tcp=True) as (peer, session):
        stream = accepted(peer, session)
        peer.send(frame(DATA, 0, 1, payload=b"before "), last)
        assert stream.read_exactly(7 + len(arrives), PATIENCE) == b"before " + arrives
        if end == "reset":
            peer.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, duplex_module.NO_LINGER)
        peer.close()
        with pytest.raises(SessionClosed):
            stream.read(timeout=PATIENCE)


def test_ga_eof_no_fin_leaves_readable_what_had_come():
    with raw_pair() as (peer, session):
        stream, finished = accepted(peer, session), accepted(peer, session, 3)
        peer.send(frame(DATA, 0, 1, payload=b"some"), frame(DATA, FIN, 3, payload=b"all"))
        peer.close()
        session.join(PATIENCE)
        assert stream.read() == b"some"
        with pytest.raises(SessionClosed, match="the peer closed the connection"):
            stream.read()
        assert (finished.read(), finished.read()) == (b"all", b"")


# Flow control ------------------------------------------------------------------------------------


def test_fc_half_rule_is_about_what_was_read():
    with raw_pair() as (peer, session):
        stream = accepted(peer, session)
        peer.send(frame(DATA, 0, 1, payload=bytes(INITIAL_WINDOW)))
        assert peer.barrier() == []
        stream.read_exactly(131071, PATIENCE)
        assert peer.barrier() == []
        stream.read_exactly(1, PATIENCE)
        assert peer.barrier() == [(WINDOW_UPDATE, 0, 1, 131072, b"")]


@ROLES
def test_fc_announce(client):
    with raw_pair(client=client, window=MIB) as (peer, session):
        session.open()
        peer.send(frame(WINDOW_UPDATE, SYN, 2 if client else 1))
        session.accept(PATIENCE)
        assert {peer.read()[:4], peer.read()[:4]} == {
            (WINDOW_UPDATE, SYN, 1 if client else 2, 786432),
            (WINDOW_UPDATE, ACK, 2 if client else 1, 786432),
        }


def test_read_gives_no_more_than_asked():
    with raw_pair() as (peer, session):
        stream = accepted(peer, session)
        peer.send(*(frame(DATA, 0, 1, payload=data) for data in (b"abc", b"defg", b"hi")))
        peer.barrier()
        assert [stream.read(size) for size in (1, 4, 2, 100)] == [b"a", b"bcde", b"fg", b"hi"]


@contextlib.contextmanager
def with_a_shortcut(take):
    """A raw peer, and a stream with a shortcut whose reader waits."""
    with raw_pair() as (peer, session):
        stream = accepted(peer, session)
        stream.shortcut(take)
        reading = spawn(stream.read)
        wait_for_waiter(stream._readable)
        yield peer, session, stream, reading
        assert session._account.held == session._streams.unread == stream._unread == 0


def test_payload_on_the_shortcut_does_not_wake_the_reader():
    taken = []
    with with_a_shortcut(lambda data: taken.append(data) or len(data)) as (
        peer,
        _,
        stream,
        reading,
    ):
        peer.send(*(frame(DATA, 0, 1, payload=data) for data in (b"one", b"two")))
        peer.barrier()
        assert b"".join(taken) == b"onetwo" and stream._readable.waiting
        got = []
        while not got:  # it gives credit, or the peer could not go on
            peer.send(frame(DATA, 0, 1, payload=bytes(16_000)))
            got = peer.barrier()
        assert got[0][:3] == (WINDOW_UPDATE, 0, 1) and stream._readable.waiting
        peer.send(frame(DATA, FIN, 1))
        assert reading.result(PATIENCE) == b""
        assert sum(map(len, taken)) > INITIAL_WINDOW // 2


@pytest.mark.parametrize("taken", [0, 2, OSError])
def test_reader_gets_what_the_shortcut_does_not_take(taken):
    def take(data):
        if taken is OSError:
            raise taken
        return taken

    with with_a_shortcut(take) as (peer, _, stream, reading):
        peer.send(frame(DATA, 0, 1, payload=b"abcd"))
        assert reading.result(PATIENCE) == b"abcd"[taken if type(taken) is int else 0 :]
        peer.send(frame(DATA, FIN, 1))
        assert stream.read(timeout=PATIENCE) == b""


def test_what_streams_were_offered_leaves_together():
    with raw_pair() as (peer, session):
        streams = [accepted(peer, session), accepted(peer, session, 3)]
        for stream, data in zip(streams, (b"one", b"three"), strict=True):
            assert stream.offer(data)
        assert session._account.held == len(b"onethree")
        session.flush()
        assert peer.barrier() == [(DATA, 0, 1, 3, b"one"), (DATA, 0, 3, 5, b"three")]
        assert session._account.held == 0


def test_an_offer_is_taken_whole_or_not_at_all():
    with raw_pair() as (peer, session):
        stream = accepted(peer, session)
        stream.write(bytes(INITIAL_WINDOW - 3))
        assert not stream.offer(b"four")
        assert stream.offer(b"abc")
        session.flush()
        assert b"".join(frame[4] for frame in peer.barrier()).endswith(b"\0abc")


@pytest.mark.parametrize("end", ["finish", "reset", "close", None])
def test_a_stream_that_has_ended_takes_no_offer(end):
    with raw_pair() as (peer, session):
        stream = accepted(peer, session)
        if end is None:
            session.close()
        else:
            getattr(stream, end)()
        assert not stream.offer(b"late")


def test_large_payload_and_a_busy_reader_take_no_shortcut():
    taken = []
    with with_a_shortcut(taken.append) as (peer, _, stream, reading):
        peer.send(frame(DATA, 0, 1, payload=bytes(gotunnel.FRAME_SHARED + 1)))
        assert len(reading.result(PATIENCE)) == gotunnel.FRAME_SHARED + 1
        peer.send(frame(DATA, 0, 1, payload=b"behind it"))
        peer.barrier()
        assert stream.read(timeout=PATIENCE) == b"behind it"
        assert not taken


@pytest.mark.parametrize("end", [gotunnel.Stream.close, gotunnel.Stream.reset])
def test_stream_that_ends_meanwhile_gets_nothing_back_from_the_shortcut(end):
    def take(data):
        end(stream)
        return 1

    with with_a_shortcut(take) as (peer, session, stream, reading):
        peer.send(frame(DATA, 0, 1, payload=b"abcd"))
        if end is gotunnel.Stream.close:
            assert reading.result(PATIENCE) == b""
        else:
            with pytest.raises(StreamReset):
                reading.result(PATIENCE)
        peer.barrier()


# Open and close ----------------------------------------------------------------------------------


def test_a_stream_in_both_directions(sessions):
    for opener, acceptor in (sessions, reversed(sessions)):
        stream, other = stream_pair(opener, acceptor)
        stream.write(b"question")
        assert other.read(timeout=PATIENCE) == b"question"
        other.write(b"answer")
        assert stream.read(timeout=PATIENCE) == b"answer"
        stream.close()
        other.close()
    wait_until(lambda: [tables(session) for session in sessions] == [NO_TABLES] * 2)


def with_a_question(peer, session):
    """A stream whose peer has sent something together with its SYN, accepted."""
    peer.send(frame(DATA, SYN, 1, payload=b"question"))
    stream = session.accept(PATIENCE)
    assert stream._unread == 8
    return stream


def test_an_answer_takes_the_ack_along():
    with raw_pair() as (peer, session):
        stream = with_a_question(peer, session)
        sent, send = [], session._duplex.send
        session._duplex.send = lambda data: sent.append(data) or send(data)
        assert stream.read() == b"question" and not sent
        stream.write(b"answer")
        assert sent == [frame(WINDOW_UPDATE, ACK, 1, 0) + frame(DATA, 0, 1, payload=b"answer")]


def test_an_ack_without_an_answer_leaves_when_somebody_waits_to_read(monkeypatch):
    for other in ("SWEEP", "KEEP_ALIVE"):  # which send it, too
        monkeypatch.setattr(gotunnel, other, 3600)
    with raw_pair() as (peer, session):
        stream = with_a_question(peer, session)
        assert stream.read() == b"question"
        reading = spawn(stream.read)
        assert peer.read() == (WINDOW_UPDATE, ACK, 1, 0, b"")
        peer.send(frame(WINDOW_UPDATE, FIN, 1))
        assert reading.result(PATIENCE) == b""


def test_an_ack_leaves_soon_if_nobody_writes_or_reads(monkeypatch):
    monkeypatch.setattr(gotunnel, "SWEEP", 0.01)
    with raw_pair() as (peer, session):
        with_a_question(peer, session)
        assert peer.read() == (WINDOW_UPDATE, ACK, 1, 0, b"")


def test_what_is_said_first_leaves_together_with_the_open():
    with raw_pair(client=True) as (peer, session):
        session.open(b"first")
        whole = frame(WINDOW_UPDATE, SYN, 1) + frame(DATA, 0, 1, payload=b"first")
        assert peer.socket.recv(1000) == whole


@ROLES
def test_oc_ids_of_32_threads(client):
    with raw_pair(client=client) as (peer, session):
        with ThreadPoolExecutor(32) as pool:
            ids = list(pool.map(lambda _: session.open(timeout=PATIENCE).id, range(OPEN_BACKLOG)))
        expected = [number * 2 + (1 if client else 2) for number in range(OPEN_BACKLOG)]
        assert sorted(ids) == expected
        assert [peer.read()[:3] for _ in expected] == [(WINDOW_UPDATE, SYN, i) for i in expected]


def test_oc_backlog_256():
    with raw_pair(client=True) as (peer, session):
        for number in range(1, 513, 2):
            assert session.open(timeout=0).id == number
        with pytest.raises(TimeoutError):
            session.open(timeout=0.01)
        opening = spawn(session.open)
        wait_for_waiter(session._streams.slot)
        assert len(peer.barrier()) == 256
        peer.send(frame(WINDOW_UPDATE, ACK, 7))
        assert opening.result(PATIENCE).id == 513
        assert peer.read()[:3] == (WINDOW_UPDATE, SYN, 513)


@pytest.mark.parametrize(
    "answer",
    [
        (frame(WINDOW_UPDATE, RST, 1),),
        (frame(DATA, 0, 1, payload=b"no ACK"),),
        (frame(WINDOW_UPDATE, FIN, 1),),
    ],
    ids=["rst", "data", "fin"],
)
def test_oc_slot_on_fin_rst_data(answer):
    with raw_pair(client=True) as (peer, session):
        for _ in range(OPEN_BACKLOG):
            session.open(timeout=0)
        opening = spawn(session.open)
        wait_for_waiter(session._streams.slot)
        peer.send(*answer)
        assert opening.result(PATIENCE).id == 513


def test_oc_slot_on_our_own_reset():
    with raw_pair(client=True) as (peer, session):
        streams = [session.open(timeout=0) for _ in range(OPEN_BACKLOG)]
        opening = spawn(session.open)
        wait_for_waiter(session._streams.slot)
        streams[9].reset()
        assert opening.result(PATIENCE).id == 513


def test_oc_slot_is_passed_on_by_a_waiter_that_leaves_without_it():
    """Its permit was refused after it had been woken: another one sleeps, and could go."""

    @contextlib.contextmanager
    def refused():
        raise PermissionError
        yield

    with raw_pair(client=True) as (peer, session):
        for _ in range(OPEN_BACKLOG):
            session.open(timeout=0)
        leaving = spawn(session.open, permit=refused())
        wait_for_waiter(session._streams.slot)
        staying = spawn(session.open)
        wait_until(lambda: len(session._streams.slot._waiters) == 2)
        peer.send(frame(WINDOW_UPDATE, ACK, 7))
        with pytest.raises(PermissionError):
            leaving.result(PATIENCE)
        assert staying.result(PATIENCE).id == 513


def test_credit_for_one_writer_wakes_another_that_it_does_for():
    with raw_pair() as (peer, session):
        stream = accepted(peer, session)
        stream.write(bytes(INITIAL_WINDOW))
        writing = []
        for count in (1, 2):
            writing.append(spawn(stream.write, b"x"))
            wait_until(lambda count=count: stream._writable.waiting == count)
        peer.send(frame(WINDOW_UPDATE, 0, stream.id, 2))
        for call in writing:
            call.result(PATIENCE)


def test_the_end_of_a_stream_wakes_all_its_readers():
    with raw_pair() as (peer, session):
        stream = accepted(peer, session)
        reading = []
        for count in (1, 2):
            reading.append(spawn(stream.read))
            wait_until(lambda count=count: stream._readable.waiting == count)
        peer.send(frame(WINDOW_UPDATE, FIN, stream.id))
        for call in reading:
            assert call.result(PATIENCE) == b""


def test_oc_accept_overflow():
    with raw_pair() as (peer, session):
        peer.send(*(frame(DATA, SYN, number, payload=b"early") for number in range(1, 601, 2)))
        resets = [got[:3] for got in peer.barrier()]
        assert resets == [(WINDOW_UPDATE, RST, number) for number in range(513, 601, 2)]
        for number in range(1, 513, 2):
            stream = session.accept(0)
            assert (stream.id, stream.read(timeout=0)) == (number, b"early")
        assert not session.arrived


def test_oc_syn_fin():
    with raw_pair() as (peer, session):
        peer.send(frame(DATA, SYN | FIN, 1, payload=b"all of it"))
        stream = session.accept(PATIENCE)
        assert read_all(stream) == b"all of it"
        send_all(stream, b"answer")
        assert [got[:3] for got in peer.barrier()] == [
            (WINDOW_UPDATE, ACK, 1), (DATA, 0, 1), (WINDOW_UPDATE, FIN, 1),
        ]  # fmt: skip
        assert tables(session) == NO_TABLES


def test_oc_syn_rst_is_never_handed_out():
    with raw_pair() as (peer, session):
        peer.send(frame(WINDOW_UPDATE, SYN | RST, 1),
                  frame(WINDOW_UPDATE, SYN, 3), frame(WINDOW_UPDATE, RST, 3),
                  frame(WINDOW_UPDATE, SYN, 5))  # fmt: skip
        assert session.accept(PATIENCE).id == 5
        assert not session.arrived
        assert [got[:3] for got in peer.barrier()] == [(WINDOW_UPDATE, ACK, 5)]


@pytest.mark.parametrize("use", ["reset", "close", "read"])
def test_oc_out_of_order_keeps_old_and_new_apart(use):
    with raw_pair() as (peer, session):
        old = accepted(peer, session, 5)
        peer.send(frame(DATA, FIN, 5, payload=bytes(INITIAL_WINDOW)))
        peer.barrier()
        old.finish()
        assert peer.read() == (WINDOW_UPDATE, FIN, 5, 0, b"")
        new = accepted(peer, session, 5)
        if use == "read":
            old.read_exactly(INITIAL_WINDOW, PATIENCE)
        else:
            getattr(old, use)()
        assert peer.barrier() == [] and not session._streams.expiring
        new.write(b"alive")
        assert peer.read() == (DATA, 0, 5, 5, b"alive")


def test_oc_half_close(sessions):
    stream, other = stream_pair(*sessions)
    stream.finish()
    with pytest.raises(ValueError, match=r"write\(\) after finish\(\)"):
        stream.write(b"more")
    assert other.read(timeout=PATIENCE) == b""
    data = noise(MIB)
    sending = spawn(send_all, other, data)
    assert digest(read_all(stream)) == digest(data)
    sending.result(PATIENCE)
    wait_until(lambda: [tables(session) for session in sessions] == [NO_TABLES] * 2)


@pytest.mark.parametrize(
    ("carrier", "data"),
    [
        (frame(DATA, FIN, 1), b""),
        (frame(DATA, FIN, 1, payload=b"bye"), b"bye"),
        (frame(WINDOW_UPDATE, FIN, 1, 10), b""),
    ],
)
def test_oc_fin_carriers_wake_a_reader(carrier, data):
    with raw_pair() as (peer, session):
        stream = accepted(peer, session)
        reading = spawn(read_all, stream)
        wait_for_waiter(stream._readable)
        peer.send(carrier)
        assert reading.result(PATIENCE) == data


@pytest.mark.parametrize("peer_first", [True, False])
def test_oc_fin_once(peer_first):
    with raw_pair() as (peer, session):
        stream = accepted(peer, session)
        if peer_first:
            peer.send(frame(WINDOW_UPDATE, FIN, 1))
            assert stream.read(timeout=PATIENCE) == b""
        with ThreadPoolExecutor(8) as pool:
            for _ in range(8):
                pool.submit(stream.close)
                pool.submit(stream.finish)
        if not peer_first:
            peer.send(frame(WINDOW_UPDATE, FIN, 1))
        assert peer.barrier() == [(WINDOW_UPDATE, FIN, 1, 0, b"")]
        stream.close()
        assert peer.barrier() == []
        assert tables(session) == NO_TABLES


def test_oc_close_linger_ends_a_peer_that_does_not(monkeypatch):
    monkeypatch.setattr(gotunnel, "LINGER_TIMEOUT", 0.05)
    monkeypatch.setattr(gotunnel, "SWEEP", 0.01)
    with raw_pair() as (peer, session):
        stream = accepted(peer, session)
        stream.write(b"earlier data")
        stream.close()
        peer.send(frame(DATA, 0, 1, payload=b"still talking"))
        assert [peer.read()[:3] for _ in range(3)] == [
            (DATA, 0, 1), (WINDOW_UPDATE, FIN, 1), (WINDOW_UPDATE, RST, 1),
        ]  # fmt: skip
        assert tables(session) == NO_TABLES
        with pytest.raises(StreamReset):
            stream.write(b"x")


def test_oc_close_linger_begins_when_the_line_has_taken_everything(monkeypatch):
    monkeypatch.setattr(gotunnel, "LINGER_TIMEOUT", 0.05)
    monkeypatch.setattr(gotunnel, "SWEEP", 0.01)
    numbers = range(1, 21, 2)
    with raw_pair() as (peer, session):
        for stream in [accepted(peer, session, number) for number in numbers]:
            stream.write(noise(100_000, stream.id))
            stream.close()
        wait_until(lambda: session.jammed)
        expiring = session._streams.expiring
        first = dict(expiring).items()
        # Each that has not left is given its time anew, however often that has gone by.
        wait_until(lambda: expiring and first.isdisjoint(expiring.items()))
        received = dict.fromkeys(numbers, b"")
        finished = set()
        while finished != set(numbers):
            _, flags, number, _, payload = peer.read()
            received[number] += payload
            if flags & FIN:
                assert digest(received[number]) == digest(noise(100_000, number))
                finished.add(number)


def test_a_reset_behind_the_end_costs_nothing():
    with raw_pair() as (peer, session):
        stream = accepted(peer, session)
        peer.send(frame(DATA, FIN, 1, payload=b"all of it"), frame(WINDOW_UPDATE, RST, 1))
        peer.barrier()
        assert (stream.read(4), stream.read(), stream.read()) == (b"all ", b"of it", b"")
        with pytest.raises(StreamReset):
            stream.write(b"x")


def test_oc_close_linger_looks_after_each_stream(monkeypatch):
    monkeypatch.setattr(gotunnel, "LINGER_TIMEOUT", 0.05)
    monkeypatch.setattr(gotunnel, "SWEEP", 0.01)
    with raw_pair() as (peer, session):
        streams = [accepted(peer, session, number) for number in (1, 3, 5)]
        streams[0].close()
        streams[1].close()
        peer.send(frame(WINDOW_UPDATE, FIN, 1))
        headers = [peer.read()[:3] for _ in range(3)]
        assert [got[1:] for got in headers] == [(FIN, 1), (FIN, 3), (RST, 3)]
        streams[2].close()  # later than the first ones
        assert [peer.read()[1:3] for _ in range(2)] == [(FIN, 5), (RST, 5)]


def test_rs_not_after_fin():
    with raw_pair() as (peer, session):
        stream = accepted(peer, session)
        stream.write(noise(200_000))
        stream.close()
        peer.send(frame(DATA, 0, 1, payload=b"late"))
        frames = peer.barrier()
        assert b"".join(got[4] for got in frames) == noise(200_000)
        assert frames[-1][:3] == (WINDOW_UPDATE, FIN, 1)
        assert session.ended == ""


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_oc_flush_on_close(transport):
    with session_pair(transport) as (client, server):
        stream, other = stream_pair(client, server)
        stream.write(noise(200 * 1024))
        stream.close()
        client.close()
        assert digest(read_all(other)) == digest(noise(200 * 1024))


def test_oc_flush_on_close_although_the_peer_talks(monkeypatch):
    monkeypatch.setattr(gotunnel, "SEND_LEAST", MIB)  # so that the kernel takes all of it
    with raw_pair(tcp=True) as (peer, session):
        # Little room, so that most is still on our side of the line when the session closes.
        peer.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 32 * 1024)
        for stream in [accepted(peer, session, number) for number in (1, 3, 5)]:
            stream.write(noise(40_000, stream.id))
            stream.finish()
        wait_until(lambda: not session._sender.busy)  # the kernel has it all
        session.close()
        wait_until(lambda: session.ended)
        received = {}
        while (got := peer.read()) is not None:
            received[got[2]] = received.get(got[2], b"") + got[4]
            with contextlib.suppress(ConnectionError):
                peer.send(frame(PING, SYN, 0, 1))
        assert {number: digest(received[number]) for number in (1, 3, 5)} == {
            number: digest(noise(40_000, number)) for number in (1, 3, 5)
        }


# Limits ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("half_closed", [False, True])
def test_a_peer_that_never_reads_a_stream_has_it_reset(monkeypatch, half_closed):
    monkeypatch.setattr(duplex_module, "STALL_TIMEOUT", 0.05)
    with raw_pair() as (peer, session):
        stream = accepted(peer, session)
        if half_closed:
            peer.send(frame(WINDOW_UPDATE, FIN, 1))
            assert stream.read(timeout=PATIENCE) == b""
        with pytest.raises(StreamReset, match="the peer read nothing of it for 0.05 s"):
            stream.write(bytes(INITIAL_WINDOW + 1))
        assert peer.barrier()[-1] == (WINDOW_UPDATE, RST, 1, 0, b"")
        assert tables(session) == NO_TABLES


def test_a_peer_that_reads_slowly_is_not_one_that_never_reads(monkeypatch):
    monkeypatch.setattr(duplex_module, "STALL_TIMEOUT", 1)
    with raw_pair() as (peer, session):
        stream = accepted(peer, session)
        writing = spawn(stream.write, bytes(INITIAL_WINDOW + 30))
        for _ in range(30):
            wait_for_waiter(stream._writable)
            peer.socket.settimeout(0.05)
            with contextlib.suppress(TimeoutError):
                while peer.read():
                    pass
            peer.socket.settimeout(PATIENCE)
            peer.send(frame(WINDOW_UPDATE, 0, 1, 1))
        writing.result(PATIENCE)


def hoarded(peer, session, number, count=INITIAL_WINDOW):
    """A stream of which ``count`` bytes have come and nobody reads any."""
    stream = accepted(peer, session, number)
    peer.send(frame(DATA, 0, number, payload=bytes(count)))
    return stream


def test_streams_beyond_the_limit_are_refused_and_the_log_says_so(monkeypatch, caplog):
    monkeypatch.setattr(gotunnel, "SWEEP", 0.01)
    with session_pair(max_streams=1) as (left, right):
        first = left.open(b"x")
        accepted = right.accept(PATIENCE)
        with pytest.raises(StreamReset):
            left.open(b"x").read(timeout=PATIENCE)
        wait_until(lambda: "1 new streams were reset: too many are open" in caplog.text)
        first.write(b"y")
        assert accepted.read_exactly(2, PATIENCE) == b"xy"


def test_the_stream_that_reads_least_is_given_up_when_memory_is_short(caplog):
    memory = gotunnel.Memory(16 * MIB)  # of which the first session may have 2 MiB unread
    with raw_pair(memory=memory) as (peer, session):
        few = hoarded(peer, session, 1, 1000)
        hogs = [hoarded(peer, session, number) for number in (3, 5, 7, 9, 11, 13, 15)]
        peer.barrier()
        assert not any(stream._error for stream in hogs)
        hogs.append(hoarded(peer, session, 17))
        peer.barrier()
        (victim,) = [stream for stream in hogs if stream._error]
        with pytest.raises(StreamReset, match="memory is short and much of it was unread"):
            victim.read()
        assert len(few.read_exactly(1000, PATIENCE)) == 1000
        assert "262144 bytes of it are unread" in caplog.text
    assert memory.buffered == 0


def test_a_stream_that_both_sides_have_finished_is_given_up_like_any_other():
    memory = gotunnel.Memory(8 * MIB)  # of which the first session may have 1 MiB unread
    with raw_pair(memory=memory) as (peer, session):
        over, told = hoarded(peer, session, 1), []
        others = [hoarded(peer, session, number, INITIAL_WINDOW - 1) for number in (3, 5, 7)]
        over.on_death(lambda: told.append("cut"))
        over.finish()
        peer.send(frame(WINDOW_UPDATE, FIN, 1))
        peer.barrier()
        assert tables(session)[0] == 3 and told == []
        small = hoarded(peer, session, 9, 200_000)
        peer.barrier()
        assert told == ["cut"] and not any(stream._error for stream in (*others, small))
        with pytest.raises(StreamReset, match="memory is short and much of it was unread"):
            over.read()


@pytest.mark.parametrize("how", ["read", "close", "reset"])
def test_a_reset_behind_the_end_is_no_way_out_of_the_count(how):
    memory = gotunnel.Memory(8 * MIB)  # of which the first session may have 1 MiB unread
    with raw_pair(memory=memory) as (peer, session):
        stream, told = hoarded(peer, session, 1), []
        stream.on_death(lambda: told.append("cut"))
        peer.send(frame(WINDOW_UPDATE, FIN, 1), frame(WINDOW_UPDATE, RST, 1))
        peer.barrier()
        assert told == [] and session._account.held == INITIAL_WINDOW
        if how == "read":
            assert len(read_all(stream)) == INITIAL_WINDOW
        else:
            getattr(stream, how)()
        assert told == [] and session._account.held == 0 and not session._streams.over
        hogs = [hoarded(peer, session, number) for number in range(3, 11, 2)]
        for number in (3, 5, 7, 9):
            peer.send(frame(WINDOW_UPDATE, FIN, number), frame(WINDOW_UPDATE, RST, number))
        small = hoarded(peer, session, 11, 100_000)
        peer.barrier()
        assert small._error is None
        assert sum(stream._unread == 0 for stream in hogs) == 1


@pytest.mark.parametrize("how", ["read", "session"])
def test_what_both_sides_have_finished_is_whole_also_when_the_session_ends_before_it_is_read(how):
    with raw_pair() as (peer, session):
        stream, told = accepted(peer, session), []
        stream.on_death(lambda: told.append("cut"))
        stream.finish()
        peer.send(frame(DATA, FIN, 1, payload=b"all of it"))
        peer.barrier()
        if how == "session":
            peer.close()
            session.join(PATIENCE)
        assert (stream.read(), stream.read()) == (b"all of it", b"")
        stream.reset()  # as a relay does if its other end breaks
        assert told == [] and not session._streams.over


def test_open_sends_what_there_is_no_room_for_later():
    with raw_pair(client=True) as (peer, session):
        first = noise(2 * INITIAL_WINDOW)
        opening = spawn(session.open, first, PATIENCE)
        assert peer.read() == (WINDOW_UPDATE, SYN, 1, 0, b"")
        received = b""
        while len(received) < len(first):
            payload = peer.read()[4]
            received += payload
            peer.send(frame(WINDOW_UPDATE, 0, 1, len(payload)))
        assert digest(received) == digest(first)
        assert opening.result(PATIENCE).id == 1


def test_open_that_cannot_send_what_it_should_leaves_no_stream(monkeypatch):
    monkeypatch.setattr(duplex_module, "STALL_TIMEOUT", 0.05)
    with raw_pair(client=True) as (peer, session):
        for timeout, error in ((None, StreamReset), (0.05, TimeoutError)):
            with pytest.raises(error):
                session.open(bytes(INITIAL_WINDOW + 1), timeout)
        assert tables(session) == NO_TABLES


def test_a_session_that_holds_little_keeps_it_although_others_hold_too_much():
    memory = gotunnel.Memory(16 * MIB)
    memory.buffered = 3 * MIB  # of 4
    with raw_pair(memory=memory) as (peer, session):
        streams = [hoarded(peer, session, number) for number in (1, 3, 5, 7)]
        peer.barrier()
        assert [len(stream.read_exactly(INITIAL_WINDOW, PATIENCE)) for stream in streams] == (
            4 * [INITIAL_WINDOW]
        )


@pytest.mark.parametrize("end", ["read", "close", "reset", "peer", "session", "both ends finished"])
def test_what_was_not_read_is_counted_no_more_after_the_end(end):
    memory = gotunnel.Memory()
    with raw_pair(memory=memory) as (peer, session):
        stream = hoarded(peer, session, 1)
        peer.barrier()
        assert session._account.held == stream._unread == INITIAL_WINDOW
        if end == "read":
            stream.read_exactly(INITIAL_WINDOW, PATIENCE)
        elif end == "close":
            stream.close()
        elif end == "reset":
            stream.reset()
        elif end == "peer":
            peer.send(frame(WINDOW_UPDATE, RST, 1))
            peer.barrier()
            assert session._account.held == INITIAL_WINDOW
            assert len(stream.read_exactly(INITIAL_WINDOW, PATIENCE)) == INITIAL_WINDOW
        elif end == "session":
            peer.close()
            session.join(PATIENCE)
            assert len(stream.read_exactly(INITIAL_WINDOW, PATIENCE)) == INITIAL_WINDOW
        else:
            stream.finish()
            peer.send(frame(WINDOW_UPDATE, FIN, 1))
            peer.barrier()
            assert tables(session) == NO_TABLES and session._account.held == INITIAL_WINDOW
            stream.close()
        assert session._account.held == 0 or session.ended
    assert memory.buffered == 0


def test_a_stream_that_was_reset_before_it_was_accepted_counts_no_more():
    with raw_pair() as (peer, session):
        for _ in range(10):
            peer.send(frame(DATA, SYN | FIN, 1, payload=bytes(1000)))
            peer.barrier()
            peer.send(frame(WINDOW_UPDATE, RST, 1))
            peer.barrier()
        assert session._account.held == session._streams.unread == 0
        assert tables(session) == NO_TABLES


class Line:
    """Stands in for a Duplex whose kernel is never full."""

    limit = None

    def limit_unsent(self, count):
        self.limit = count


def test_what_is_ahead_of_a_frame_fits_the_line():
    with raw_pair() as (_, session):
        sender = session._sender
        sender._duplex, duplex = Line(), sender._duplex
        seen = []
        for took in (0, 0, 0, 0.05, 1, 1, 1, 0.05, 0):
            sender._pace(took)
            seen.append(sender._quantum // gotunnel.SEND_LEAST)
            assert sender._duplex.limit == sender._quantum
        sender._duplex = duplex
        assert seen == [2, 4, 4, 4, 2, 1, 1, 1, 2]


def test_many_tiny_pieces_that_nobody_reads_cost_hardly_more_than_they_hold():
    with raw_pair() as (peer, session):
        stream = accepted(peer, session)
        peer.send(*[frame(DATA, 0, 1, payload=b"%03d" % (n % 1000)) for n in range(20_000)])
        peer.barrier()
        assert len(stream._chunks) <= 3
        assert stream.read_exactly(60_000, PATIENCE) == b"".join(
            b"%03d" % (n % 1000) for n in range(20_000)
        )


@pytest.mark.skipif(duplex_module.NOTSENT_LOWAT is None, reason="only Linux has the option")
def test_the_kernel_takes_little_that_it_cannot_send_at_once():
    with session_pair("tcp") as (client, server):
        for session in (client, server):
            option = (socket.IPPROTO_TCP, duplex_module.NOTSENT_LOWAT)
            assert session._duplex._socket.getsockopt(*option) == gotunnel.SEND_LEAST


# Finish and close --------------------------------------------------------------------------------


def test_finish_wakes_a_writer():
    with raw_pair() as (peer, session):
        stream = accepted(peer, session)
        writing = spawn(stream.write, bytes(INITIAL_WINDOW + 1))
        wait_for_waiter(stream._writable)
        stream.finish()
        with pytest.raises(ValueError):
            writing.result(SOON)


def test_close_wakes_a_reader():
    with raw_pair() as (peer, session):
        stream = accepted(peer, session)
        reading = spawn(stream.read)
        wait_for_waiter(stream._readable)
        stream.close()
        assert reading.result(PATIENCE) == b""


@pytest.mark.parametrize("death", ["the stream's", "the session's"])
def test_close_of_a_dead_stream_does_not_look_like_a_fin_to_its_reader(death):
    """Or the reader would end properly what it has passed on, instead of cutting it."""
    with raw_pair() as (peer, session):
        stream = accepted(peer, session)
        if death == "the stream's":
            peer.send(frame(DATA, RST, 1))
        else:
            peer.socket.shutdown(socket.SHUT_RDWR)
        wait_until(lambda: stream.is_dead)
        stream.close()
        with pytest.raises(ConnectionError):
            stream.read()


def test_after_close_what_comes_is_dropped():
    with raw_pair() as (peer, session):
        stream = accepted(peer, session)
        peer.send(frame(DATA, 0, 1, payload=b"unread"))
        peer.barrier()
        stream.close()
        peer.send(frame(DATA, FIN, 1, payload=b"late"))
        peer.barrier()
        assert stream.read() == b""
        assert tables(session) == NO_TABLES


def test_after_close_the_peer_may_still_get_rid_of_what_it_has():
    with session_pair() as (client, server):
        stream, other = stream_pair(client, server)
        stream.write(bytes(INITIAL_WINDOW))
        wait_until(lambda: sum(map(len, other._chunks)) == INITIAL_WINDOW)  # and nobody reads it
        other.close()
        stream.write(bytes(4 * INITIAL_WINDOW), PATIENCE)
        stream.finish()
        assert stream.read(timeout=PATIENCE) == b""
        wait_until(lambda: tables(client) == tables(server) == NO_TABLES)


def test_quiet_tells_whether_a_stream_can_serve_again():
    with raw_pair() as (peer, session):
        stream = accepted(peer, session)
        assert stream.quiet
        peer.send(frame(DATA, 0, 1, payload=b"x"))
        peer.barrier()
        assert not stream.quiet
        stream.read()
        assert stream.quiet
        peer.send(frame(WINDOW_UPDATE, FIN, 1))
        peer.barrier()
        assert not stream.quiet
        finished, cut = accepted(peer, session, 3), accepted(peer, session, 5)
        finished.finish()
        cut.reset()
        assert not finished.quiet and not cut.quiet


@pytest.mark.parametrize(
    ("late", "left"),
    [
        (frame(DATA, 0, 1, payload=b"late"), (WINDOW_UPDATE, RST, 1, 0, b"")),
        (frame(DATA, FIN, 1, payload=b"late"), (WINDOW_UPDATE, RST, 1, 0, b"")),
        (frame(WINDOW_UPDATE, FIN, 1), (WINDOW_UPDATE, FIN, 1, 0, b"")),
        (frame(WINDOW_UPDATE, RST, 1), None),
    ],
)
def test_stream_at_rest_ends_with_whatever_comes(late, left):
    """Between the look at it and the first write of the next user is no gap."""
    with raw_pair() as (peer, session):
        stream, told = accepted(peer, session), []
        assert stream.rest(lambda: told.append(session._lock.locked()))
        peer.send(late)
        seen = peer.barrier()
        assert told == [False] and not stream.quiet
        with pytest.raises(StreamReset):
            stream.write(b"a question, which those bytes must not answer")
        assert left is None or left in seen
        stream.close()
        assert session._streams.unread == 0 and tables(session)[0] == 0


def test_stream_at_rest_is_taken_up_by_a_write():
    with raw_pair() as (peer, session):
        stream, told = accepted(peer, session), []
        assert stream.rest(lambda: told.append("over"))
        stream.write(b"question")
        peer.send(frame(DATA, 0, 1, payload=b"answer"))
        assert stream.read(timeout=PATIENCE) == b"answer"
        peer.send(frame(WINDOW_UPDATE, RST, 1))
        with pytest.raises(StreamReset):
            stream.read(timeout=PATIENCE)
        assert told == []


def test_answer_to_half_a_question_ends_a_stream_at_rest():
    with raw_pair() as (peer, session):
        stream = accepted(peer, session)
        assert stream.rest(lambda: None)
        writing = spawn(stream.write, bytes(INITIAL_WINDOW + 1))
        wait_for_waiter(stream._writable)
        peer.send(frame(DATA, 0, 1, payload=b"whose answer is it?"))
        with pytest.raises(StreamReset):
            writing.result(SOON)


@pytest.mark.parametrize("last", [frame(DATA, 0, 1, payload=b"x"), frame(WINDOW_UPDATE, FIN, 1)])
def test_stream_that_has_something_to_read_does_not_rest(last):
    with raw_pair() as (peer, session):
        stream, told = accepted(peer, session), []
        peer.send(last)
        peer.barrier()
        assert not stream.rest(lambda: told.append("over"))
        stream.reset()
        assert told == []


def test_read_exactly_says_what_is_missing():
    with raw_pair() as (peer, session):
        stream = accepted(peer, session)
        peer.send(frame(DATA, 0, 1, payload=b"abc"), frame(DATA, FIN, 1, payload=b"de"))
        assert stream.read_exactly(4, PATIENCE) == b"abcd"
        with pytest.raises(ProtocolError, match="the stream ended, 2 more bytes were expected"):
            stream.read_exactly(3, PATIENCE)


# Reset -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("who", ["peer", "we"])
def test_rs_wakes_all(who):
    with raw_pair() as (peer, session):
        stream = accepted(peer, session)
        calls = [spawn(stream.read), spawn(stream.write, bytes(INITIAL_WINDOW + 1))]
        for bell in (stream._readable, stream._writable):
            wait_for_waiter(bell)
        if who == "peer":
            peer.send(frame(WINDOW_UPDATE, RST, 1, 42))
        else:
            stream.reset()
        for call in calls:
            with pytest.raises(StreamReset) as caught:
                call.result(SOON)
            assert caught.value.code == (42 if who == "peer" else 0)
        assert tables(session) == NO_TABLES


def test_a_reset_of_the_peer_costs_nothing_that_came_before_it():
    with raw_pair() as (peer, session):
        stream = accepted(peer, session)
        peer.send(frame(DATA, 0, 1, payload=b"before"), frame(WINDOW_UPDATE, RST, 1))
        peer.barrier()
        assert tables(session) == NO_TABLES
        assert stream.read(3) + stream.read() == b"before"
        for _ in range(2):
            with pytest.raises(StreamReset, match="the peer reset the stream"):
                stream.read()


def test_a_reset_of_ours_costs_what_was_not_read():
    with raw_pair() as (peer, session):
        stream = accepted(peer, session)
        peer.send(frame(DATA, 0, 1, payload=b"cut"))
        peer.barrier()
        stream.reset()
        with pytest.raises(StreamReset, match="the stream was reset"):
            stream.read()


def test_a_stream_that_overran_its_window_is_cut():
    with raw_pair() as (peer, session):
        stream = accepted(peer, session)
        peer.send(frame(DATA, 0, 1, payload=bytes(INITIAL_WINDOW)), frame(DATA, 0, 1, payload=b"x"))
        assert peer.barrier() == [(WINDOW_UPDATE, RST, 1, 0, b"")]
        with pytest.raises(StreamReset, match="0 were permitted"):
            stream.read()


@pytest.mark.parametrize("finished", [False, True])
def test_a_cut_sends_rst_behind_what_was_written_and_its_fin(finished):
    with raw_pair(tcp=True) as (peer, session):
        stream, other = accepted(peer, session), accepted(peer, session, 3)
        peer.send(frame(WINDOW_UPDATE, 0, 3, 64 * MIB))
        with pytest.raises(TimeoutError):  # until the line takes no more
            while True:
                other.write(bytes(INITIAL_WINDOW), timeout=0.2)
        stream.write(b"the last words")
        if finished:
            stream.finish()
        stream.cut()
        with pytest.raises(StreamReset):
            stream.write(b"too late")
        other.reset()
        frames = [got for got in peer.read_until(WINDOW_UPDATE, RST, 1, 0) if got[2] == 1]
        ends = [(WINDOW_UPDATE, FIN, 1, 0, b"")] if finished else []
        assert frames == [(DATA, 0, 1, 14, b"the last words"), *ends]
        peer.send(frame(DATA, 0, 1, payload=b"late"))  # of a stream that nobody knows any more
        wait_until(lambda: tables(session) == NO_TABLES)


def test_a_cut_of_a_stream_with_nothing_to_send_is_a_reset_at_once():
    with raw_pair() as (peer, session):
        stream = accepted(peer, session)
        stream.cut()
        assert peer.barrier() == [(WINDOW_UPDATE, RST, 1, 0, b"")]
        stream.cut()
        assert peer.barrier() == [] and tables(session) == NO_TABLES


def test_a_cut_of_a_stream_that_the_peer_has_reset_costs_nothing_that_came_before():
    with raw_pair() as (peer, session):
        stream = accepted(peer, session)
        peer.send(frame(DATA, 0, 1, payload=b"before"), frame(WINDOW_UPDATE, RST, 1))
        peer.barrier()
        stream.cut()
        assert stream.read() == b"before"


def test_each_caller_gets_an_exception_of_its_own():
    with raw_pair() as (peer, session):
        stream = accepted(peer, session)
        stream.reset()
        errors = set()
        for _ in range(2):
            with pytest.raises(StreamReset) as caught:
                stream.read()
            errors.add(caught.value)
        assert len(errors) == 2


def test_rs_late_frames():
    with raw_pair() as (peer, session):
        stream, other = accepted(peer, session), accepted(peer, session, 3)
        stream.reset()
        assert peer.read() == (WINDOW_UPDATE, RST, 1, 0, b"")
        peer.send(*[frame(DATA, 0, 1, payload=bytes(65536))] * 4, frame(WINDOW_UPDATE, FIN, 1))
        assert peer.barrier() == []
        other.write(b"fine")
        assert peer.read()[4] == b"fine"


def test_rs_no_reply():
    with raw_pair() as (peer, session):
        stream = accepted(peer, session)
        peer.send(frame(WINDOW_UPDATE, RST, 1))
        peer.barrier()
        stream.finish()
        stream.close()
        stream.reset()
        assert peer.barrier() == []


@pytest.mark.parametrize(
    "how", ["reset by the peer", "reset by us", "end of the session", "before"]
)
def test_on_death_is_told_once(how):
    with raw_pair() as (peer, session):
        stream, told = accepted(peer, session), []
        if how == "before":
            stream.reset()
        stream.on_death(lambda: told.append(session._lock.locked()))
        if how == "reset by the peer":
            peer.send(frame(WINDOW_UPDATE, RST, 1))
        elif how == "reset by us":
            stream.reset()
        elif how == "end of the session":
            peer.close()
        wait_until(lambda: told)
        stream.reset()
        session.close()
        peer.close()
        session.join(PATIENCE)
        assert told == [False]  # not under the lock: it may use the session


def test_on_death_is_not_about_an_ordinary_end():
    with raw_pair() as (peer, session):
        stream, told = accepted(peer, session), []
        stream.on_death(lambda: told.append("dead"))
        stream.finish()
        peer.send(frame(WINDOW_UPDATE, FIN, 1))
        assert read_all(stream) == b""
        peer.close()
        session.join(PATIENCE)
        assert told == []


# Ping and deadlines ------------------------------------------------------------------------------


def test_ka_echo_and_ka_unsolicited():
    with raw_pair() as (peer, session):
        peer.send(frame(PING, ACK, 0, 9), frame(PING, SYN, 0, 0xFFFFFFFF), frame(PING, ACK, 0, 9))
        assert peer.read() == (PING, ACK, 0, 0xFFFFFFFF, b"")
        assert peer.barrier() == [] and session.ended == ""


def test_ka_under_bulk_a_pong_does_not_wait_for_payload():
    with raw_pair(tcp=True) as (peer, session):
        # What the kernel has taken is before a pong, so it must not take much.
        session._duplex._socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 64 * 1024)
        peer.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 64 * 1024)
        for stream in [accepted(peer, session, number) for number in range(1, 41, 2)]:
            stream.write(bytes(INITIAL_WINDOW))
        wait_until(lambda: session.jammed)
        peer.send(frame(PING, SYN, 0, 5))
        assert sum(got[3] for got in peer.read_until(PING, ACK, 0, 5)) < MIB  # of 5


def test_ka_read_deadline():
    with raw_pair() as (peer, session):
        stream = accepted(peer, session)
        for timeout in (0.01, 0):
            with pytest.raises(TimeoutError):
                stream.read(timeout=timeout)
        peer.send(frame(DATA, 0, 1, payload=b"later"))
        assert stream.read(timeout=PATIENCE) == b"later"


def test_ka_write_deadline():
    with raw_pair() as (peer, session):
        stream = accepted(peer, session)
        with pytest.raises(TimeoutError):
            stream.write(noise(INITIAL_WINDOW + 5), timeout=0.05)
        assert b"".join(got[4] for got in peer.barrier()) == noise(INITIAL_WINDOW + 5)[:-5]
        peer.send(frame(WINDOW_UPDATE, 0, 1, 100))
        stream.write(b"usable", timeout=PATIENCE)
        assert peer.read() == (DATA, 0, 1, 6, b"usable")


def test_ka_accept_and_open_deadlines():
    with raw_pair() as (peer, session):
        with pytest.raises(TimeoutError):
            session.accept(timeout=0.01)
        accepted(peer, session)


# Go away and the end -----------------------------------------------------------------------------


def test_ga_recv_normal():
    with raw_pair(client=True) as (peer, session):
        left = threading.Event()
        session.on_leave = left.set
        stream = session.open(timeout=0)
        for _ in range(OPEN_BACKLOG - 1):
            session.open(timeout=0)
        opening = spawn(session.open)
        wait_for_waiter(session._streams.slot)
        peer.send(frame(GO_AWAY, 0, 0, 0))
        with pytest.raises(SessionClosed, match="the session takes no new streams"):
            opening.result(PATIENCE)
        assert left.wait(PATIENCE)
        with pytest.raises(SessionClosed):
            session.open()
        peer.send(frame(DATA, FIN, 1, payload=b"finishes"), frame(WINDOW_UPDATE, SYN, 2))
        assert read_all(stream) == b"finishes"
        assert session.accept(PATIENCE).id == 2


@pytest.mark.parametrize("code", [1, 2, 4101])
def test_ga_recv_codes(code):
    with raw_pair() as (peer, session):
        stream = accepted(peer, session)
        calls = [spawn(stream.read), spawn(session.accept)]
        wait_for_waiter(stream._readable)
        wait_for_waiter(session._streams.arrival)
        peer.send(frame(GO_AWAY, 0, 0, code))
        for call in calls:
            with pytest.raises(SessionClosed, match=f"the peer ended the session with code {code}"):
                call.result(PATIENCE)
        assert peer.read_to_end() == []


def test_ga_sent():
    with raw_pair() as (peer, session):
        stream = accepted(peer, session)
        session.leave()
        assert peer.read() == (GO_AWAY, 0, 0, 0, b"")
        peer.send(frame(WINDOW_UPDATE, SYN, 3), frame(DATA, FIN, 1, payload=b"goes on"))
        assert peer.read() == (WINDOW_UPDATE, RST, 3, 0, b"")
        assert read_all(stream) == b"goes on"
        with pytest.raises(SessionClosed):
            session.open()
        send_all(stream, b"to its end")
        session.close()
        assert [got[:3] for got in peer.read_to_end()] == [(DATA, 0, 1), (WINDOW_UPDATE, FIN, 1)]


def test_ga_sent_wakes_an_open_that_waits():
    with raw_pair(client=True) as (peer, session):
        for _ in range(OPEN_BACKLOG):
            session.open(timeout=0)
        opening = spawn(session.open)
        wait_for_waiter(session._streams.slot)
        session.leave()
        with pytest.raises(SessionClosed):
            opening.result(SOON)


def test_close_says_go_away():
    with raw_pair() as (peer, session):
        session.close("enough")
        assert peer.read_to_end() == [(GO_AWAY, 0, 0, 0, b"")]
        peer.close()
        session.join(PATIENCE)
        assert session.ended == "enough"
        session.close("again")
        session.leave()
        assert session.ended == "enough"


def test_ga_error_visible():
    with raw_pair(tcp=True) as (peer, session):
        stream = accepted(peer, session)
        peer.send(frame(DATA, 0, 1, payload=bytes(1000)), frame(7, 0, 0), bytes(200 * 1024))
        assert peer.read_to_end() == [(GO_AWAY, 0, 0, 1, b"")]
        peer.close()
        session.join(PATIENCE)
        with pytest.raises(SessionClosed, match="protocol error: frame type 7"):
            stream.write(b"x")


def test_ga_error_visible_behind_other_answers():
    with raw_pair() as (peer, session):
        peer.send(frame(PING, SYN, 0, 1) * 3, frame(7, 0, 0))
        assert peer.read_to_end()[-1] == (GO_AWAY, 0, 0, 1, b"")


@pytest.mark.parametrize("transport", ["tls", "tls reversed"])
def test_ga_error_visible_through_tls(transport):
    with duplex_pair(transport) as (ours, theirs):
        session = Session(ours, client=False, name="tested")
        session.start()
        theirs.write(frame(PING, SYN, 0, 1) + frame(7, 0, 0) + bytes(200 * 1024), PATIENCE)
        assert read_all(theirs).endswith(frame(GO_AWAY, 0, 0, 1))
        theirs.close()
        session.join(PATIENCE)


def test_ga_close_race(sessions):
    client, server = sessions
    stream, other = stream_pair(client, server)
    full = stream_pair(client, server)[0]
    calls = [
        spawn(client.accept), spawn(stream.read), spawn(read_all, other),
        spawn(full.write, bytes(2 * INITIAL_WINDOW)), spawn(server.accept),
    ]  # fmt: skip
    arrivals = client._streams.arrival, server._streams.arrival
    for bell in (*arrivals, stream._readable, full._writable):
        wait_for_waiter(bell)
    with ThreadPoolExecutor(8) as pool:
        closing = [pool.submit(client.close) for _ in range(8)]
        for call in closing:
            call.result(SOON)
    for session in sessions:
        session.join(SOON)
        assert session.ended
    for call in calls:
        with pytest.raises(SessionClosed):
            call.result(SOON)
    for call in (lambda: client.open(), lambda: client.accept(), lambda: stream.read()):
        with pytest.raises(SessionClosed):
            call()
    assert [table for session in sessions for table in tables(session)[:3]] == [0] * 6


def test_ga_close_race_while_everybody_writes():
    def write_on(stream):
        while True:
            stream.write(bytes(64 * 1024))

    for _ in range(20):
        with session_pair() as (client, server):
            pairs = [stream_pair(client, server) for _ in range(4)]
            writing = [spawn(write_on, stream) for stream, _ in pairs]
            for _, other in pairs:
                other.read_exactly(2 * INITIAL_WINDOW, PATIENCE)
            reading = [spawn(read_all, other) for _, other in pairs]
            client.close()
            for call in (*writing, *reading):
                with pytest.raises(ConnectionError):
                    call.result(SOON)
            client.join(SOON)
            server.join(SOON)
            assert client.ended and server.ended


class Gate:
    """Holds whoever enters until it is opened."""

    def __init__(self):
        self.entered, self._open = threading.Event(), threading.Event()

    def hold(self):
        self.entered.set()
        assert self._open.wait(PATIENCE)

    def open(self):
        self._open.set()


def test_ga_close_race_with_a_sender(monkeypatch):
    with raw_pair() as (peer, session):
        stream = accepted(peer, session)
        gate, send, looked = Gate(), session._duplex.send, Gate()

        def slow_send(data):
            gate.hold()
            return send(data)

        all_sent = session._sender.idle

        def look():
            result = all_sent()
            looked.entered.set()
            return result

        monkeypatch.setattr(session._duplex, "send", slow_send)
        monkeypatch.setattr(session._sender, "idle", look)
        writing = spawn(stream.write, b"slow")
        assert gate.entered.wait(PATIENCE)
        session.close()
        assert looked.entered.wait(PATIENCE)  # the demultiplexer has seen that somebody sends
        gate.open()
        writing.result(PATIENCE)
        peer.socket.settimeout(SOON)
        assert [got[:3] for got in peer.read_to_end()] == [(DATA, 0, 1), (GO_AWAY, 0, 0)]
        peer.close()
        session.join(SOON)
        assert session.ended == "closed"


def test_close_sends_what_another_thread_has_only_queued(monkeypatch):
    with raw_pair() as (peer, session):
        gate, flush = Gate(), session._sender.flush

        def slow_flush():
            if threading.current_thread() is not session._thread:
                gate.hold()
            flush()

        monkeypatch.setattr(session._sender, "flush", slow_flush)
        closing = spawn(session.close)
        assert gate.entered.wait(PATIENCE)
        session._wake()  # the demultiplexer comes round before the other one has flushed
        assert [got[0] for got in peer.read_to_end()] == [GO_AWAY]
        gate.open()
        closing.result(PATIENCE)


def test_a_session_that_closes_takes_no_more_writes(monkeypatch):
    monkeypatch.setattr(gotunnel, "FLUSH_TIMEOUT", PATIENCE)
    with raw_pair() as (peer, session):
        narrow(peer, session)
        first, second = accepted(peer, session), accepted(peer, session, 3)
        first.write(bytes(INITIAL_WINDOW))
        wait_until(lambda: session.jammed)
        session.close("enough")
        with pytest.raises(SessionClosed, match="enough"):
            second.write(b"x")
        assert not session.ended  # the line still takes what was written before
        peer.close()


def test_close_without_patience_waits_for_no_line(monkeypatch):
    """Another session takes its place, and must not wait for a peer that does not read."""
    monkeypatch.setattr(gotunnel, "FLUSH_TIMEOUT", PATIENCE)
    with raw_pair() as (peer, session):
        ended = threading.Event()
        session.on_end = ended.set
        narrow(peer, session)
        accepted(peer, session).write(bytes(INITIAL_WINDOW))
        wait_until(lambda: session.jammed)
        session.close("replaced", patience=0)
        assert ended.wait(SOON)
        peer.close()


@pytest.mark.parametrize("refused", [False, True])
def test_a_stream_is_opened_within_its_permit(refused):
    """So that whoever counts streams next finds this one among them."""
    counts = []

    @contextlib.contextmanager
    def permit():
        counts.append(len(session.streams_in_use()))
        if refused:
            raise PermissionError
        yield
        counts.append(len(session.streams_in_use()))

    with raw_pair(client=True) as (peer, session):
        with pytest.raises(PermissionError) if refused else contextlib.nullcontext():
            session.open(permit=permit())
        assert counts == ([0] if refused else [0, 1])
        assert len(peer.barrier()) == (not refused)


def test_close_before_start():
    with duplex_pair("tcp") as (left, right):
        ended = threading.Event()
        session = Session(left, client=True, name="never started")
        session.on_end = ended.set
        session.close("not needed")
        assert ended.is_set() and session.ended == "not needed"
        session.join()
        assert read_all(right) == frame(GO_AWAY, 0, 0, 0)


def test_the_end_is_told_once_and_after_all_streams_are_dead():
    with raw_pair() as (peer, session):
        stream, seen = accepted(peer, session), []
        session.on_end = lambda: seen.append((session.ended, stream._error is not None))
        peer.close()
        session.join(PATIENCE)
        session.close()
        assert seen == [("the peer closed the connection", True)]


def test_the_end_is_told_before_the_peer_has_hung_up_and_the_close_after_it():
    with raw_pair() as (peer, session):
        ended, closed = threading.Event(), threading.Event()
        session.on_end, session.on_close = ended.set, closed.set
        session.close()
        assert ended.wait(PATIENCE) and not closed.is_set()
        peer.read_to_end()
        peer.close()
        assert closed.wait(PATIENCE)


def test_tls_farewell_in_the_breath_of_the_last_frames_is_seen():
    with duplex_pair("tls") as (left, right):
        session = Session(left, client=True, name="tested")
        session.start()
        with right._tls_lock:  # a frame and the farewell in one segment, and TCP stays open
            right._tls.write(frame(PING, SYN, 0, 1))
            right._write_close_notify(right._tls)
        right.flush()
        session.join(SOON)
        assert session.ended == "the peer closed the connection"


def test_close_from_the_demultiplexer_itself():
    with raw_pair() as (peer, session):
        session.on_leave = lambda: session.close("they left")
        peer.send(frame(GO_AWAY, 0, 0, 0))
        peer.read_to_end()
        peer.close()
        session.join(SOON)
        assert session.ended == "they left"


def test_a_defect_ends_the_session_and_is_logged(caplog):
    with raw_pair() as (peer, session):
        session.call_later(0, lambda: 1 / 0)
        assert peer.read_to_end() == []
        session.join(PATIENCE)
        assert session.ended == "internal error"
        assert "session tested ends: an unexpected error" in caplog.text
        assert "ZeroDivisionError" in caplog.text


@pytest.mark.parametrize("hook", ["on_end", "on_death"])
def test_a_session_whose_hook_fails_ends_all_the_same(hook, caplog):
    with raw_pair() as (peer, session):
        stream, closed = accepted(peer, session), threading.Event()
        session.on_close = closed.set
        if hook == "on_end":
            session.on_end = lambda: 1 / 0
        else:
            stream.on_death(lambda: 1 / 0)
        peer.close()
        assert closed.wait(PATIENCE)
        session.join(PATIENCE)
        assert session._duplex.fileno() == -1
        assert "thread demux tested: " in caplog.text and "ZeroDivisionError" in caplog.text


def test_call_later_keeps_the_order_of_time():
    with raw_pair() as (peer, session):
        seen, done = [], threading.Event()
        session.call_later(0.03, done.set)
        session.call_later(0.02, lambda: seen.append("second"))
        session.call_later(0.0, lambda: seen.append("first"))
        session.call_later(PATIENCE * 100, lambda: seen.append("never"))
        assert done.wait(PATIENCE)
        assert seen == ["first", "second"]


# Before the demultiplexer runs -------------------------------------------------------------------


def test_turn_does_the_work_until_start():
    with duplex_pair("tcp") as (left, right):
        session = Session(left, client=False, name="turned")
        session.turn()
        assert not session.arrived
        right.write(frame(WINDOW_UPDATE, SYN, 1) + frame(DATA, 0, 1, payload=b"register"))
        left.wait_readable(PATIENCE)
        session.turn()
        stream = session.accept(0)
        assert stream.read(timeout=0) == b"register"
        stream.write(b"ack")
        expected = frame(WINDOW_UPDATE, ACK, 1) + frame(DATA, 0, 1, payload=b"ack")
        assert right.read(timeout=PATIENCE) == expected
        right.write(frame(7, 0, 0))
        left.wait_readable(PATIENCE)
        with pytest.raises(ProtocolError):
            session.turn()
        session.close()


def test_turn_tells_that_the_peer_has_gone():
    with duplex_pair("tcp") as (left, right):
        session = Session(left, client=False, name="turned")
        right.close()
        left.wait_readable(PATIENCE)
        with pytest.raises(SessionClosed, match="the peer closed the connection"):
            session.turn()
        session.close()


def accepted_late(duplex):
    """The id of the stream that a session finds when it starts, without hearing more."""
    session = Session(duplex, client=False, name="started late")
    session.start()
    try:
        return session.accept(SOON).id
    finally:
        duplex.stop()
        close_all(session)


def test_start_takes_what_was_given_back():
    with duplex_pair("tcp") as (left, _):
        left.unread(frame(WINDOW_UPDATE, SYN, 1))
        assert accepted_late(left) == 1


def test_start_takes_what_came_with_the_handshake():
    with duplex_pair("tcp") as (client, server):
        start_tls(client, server)
        while not client.handshake():
            assert not server.handshake()
        client.write(frame(WINDOW_UPDATE, SYN, 1))
        server.handshake_within(PATIENCE)
        assert accepted_late(server) == 1


# Hostile peers -----------------------------------------------------------------------------------


def test_ho_never_reads(monkeypatch):
    monkeypatch.setattr(gotunnel, "FLUSH_TIMEOUT", 0.1)
    with raw_pair(tcp=True, max_streams=1024) as (peer, session):
        streams = [accepted(peer, session, number) for number in range(1, 101, 2)]
        with pytest.raises(TimeoutError):
            while True:
                for stream in streams:
                    peer.send(frame(WINDOW_UPDATE, 0, stream.id, INITIAL_WINDOW))
                    stream.write(bytes(INITIAL_WINDOW), timeout=0.05)
        peer.send(frame(DATA, 0, 1, payload=b"heard"))  # the reader is alive
        assert streams[0].read(timeout=PATIENCE) == b"heard"
        session.close()
        session.join(SOON)
        assert session.ended == "closed"


# Load --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("transport", "room"), [("socketpair", 1024), ("tcp", 128 * 1024), ("tls", 128 * 1024)]
)
def test_ld_no_deadlock(transport, room):
    """Less fits on the line than is written, both ways at once, before anybody reads."""
    with session_pair(transport, window=2 * MIB) as ends:
        for end in ends:
            for option in (socket.SO_SNDBUF, socket.SO_RCVBUF):
                end._duplex._socket.setsockopt(socket.SOL_SOCKET, option, room)
        streams = stream_pair(*ends)
        data = noise(MIB)
        calls = [spawn(send_all, stream, data) for stream in streams]
        for call in calls:
            call.result(PATIENCE)
        assert [digest(read_all(stream)) for stream in streams] == [digest(data)] * 2


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_ld_many_streams(transport):
    """All at once, each with its own bytes: nothing may get into another stream."""
    with session_pair(transport) as (client, server), echoing(server, 128):
        with ThreadPoolExecutor(64) as pool:
            jobs = [noise(32 * 1024, seed) for seed in range(128)]
            assert list(map(digest, pool.map(lambda data: ask(client, data), jobs))) == list(
                map(digest, jobs)
            )
        wait_until(lambda: tables(client) == tables(server) == NO_TABLES)


def test_ld_ping_pong_on_many_streams():
    with session_pair("tcp") as (client, server), echoing(server, 20):
        streams = [client.open() for _ in range(20)]
        for number in range(50):
            for stream in streams:
                stream.write(b"%4d" % number)
            for stream in streams:
                assert stream.read_exactly(4, PATIENCE) == b"%4d" % number


def test_ld_slow_reader_stops_nobody_else():
    with session_pair("tcp") as (client, server):
        slow, _ = stream_pair(server, client)
        waiting = spawn(slow.write, bytes(2 * INITIAL_WINDOW))
        wait_for_waiter(slow._writable)
        quick = stream_pair(server, client)
        sending = spawn(send_all, quick[0], noise(4 * MIB))
        assert digest(read_all(quick[1])) == digest(noise(4 * MIB))
        sending.result(PATIENCE)
        assert not waiting.done()
        slow.reset()
        with pytest.raises(StreamReset):
            waiting.result(PATIENCE)


# relay -------------------------------------------------------------------------------------------


@contextlib.contextmanager
def tunnelled(transport="tls", outside="tcp", **named):
    """A visit: visitor = relay = session = relay = target. Yields (visitor, target, both relays'
    futures); the visitor's and the target's ends are Duplexes."""
    with session_pair(transport, **named) as (agent, gateway), \
            duplex_pair(outside) as (visitor, public), \
            duplex_pair("tcp") as (dialled, target):  # fmt: skip
        near, far = stream_pair(gateway, agent)

        def carry(stream, duplex):
            relay(stream, duplex)
            duplex.close()

        relays = spawn(carry, near, public), spawn(carry, far, dialled)
        try:
            yield visitor, target, relays
        finally:
            for end in (near, far):
                end.reset()
            for end in (public, dialled):
                end.stop()
            for done in relays:
                done.result(PATIENCE)


@pytest.mark.parametrize("transport", TRANSPORTS)
@pytest.mark.parametrize("outside", ["tcp", "tls"])
def test_relay_carries_a_visit_with_half_close(transport, outside):
    with tunnelled(transport, outside) as (visitor, target, relays):
        question, answer = noise(2 * MIB, 1), noise(3 * MIB, 2)

        def send(end, data):
            end.write(data, PATIENCE)
            end.finish(PATIENCE)

        asking = spawn(send, visitor, question)
        assert digest(read_all(target)) == digest(question)
        asking.result(PATIENCE)
        answering = spawn(send, target, answer)
        assert digest(read_all(visitor)) == digest(answer)
        answering.result(PATIENCE)
        for done in relays:
            done.result(PATIENCE)


def test_relay_keeps_the_order_of_small_and_large_pieces():
    """Small ones may take Stream.shortcut(), until the target's buffer is full."""
    with tunnelled() as (visitor, target, _):
        data, sizes = noise(4 * MIB), [1, 300, 16_000, 70_000, 5] * 48
        sending = spawn(send_pieces, visitor, data, sizes)
        assert digest(target.read(1, PATIENCE)) == digest(data[:1])
        left = bytearray(data[1 : sum(sizes)])
        while left:
            piece = target.read(5000, PATIENCE)
            assert left.startswith(piece)
            del left[: len(piece)]
        sending.result(PATIENCE)


def send_pieces(duplex, data, sizes):
    at = 0
    for size in sizes:
        duplex.write(data[at : at + size], PATIENCE)
        at += size


def test_relay_goes_on_reading_while_the_other_way_is_full():
    with tunnelled() as (visitor, target, _):
        sending = [spawn(end.write, noise(3 * MIB), PATIENCE) for end in (visitor, target)]
        for end in (target, visitor):
            received = b""
            while len(received) < 3 * MIB:
                received += end.read(timeout=PATIENCE)
            assert digest(received) == digest(noise(3 * MIB))
        for call in sending:
            call.result(PATIENCE)


@pytest.mark.parametrize("who", [0, 1], ids=["visitor", "target"])
def test_relay_resets_through_the_tunnel(who):
    with tunnelled() as (visitor, target, relays):
        ends = (visitor, target)
        visitor.write(b"begun")
        assert target.read(timeout=PATIENCE) == b"begun"
        ends[who].reset()
        ends[who].close()
        for done in relays:
            done.result(PATIENCE)
        with pytest.raises(ConnectionResetError):  # anything but an end
            ends[1 - who].read(timeout=PATIENCE)


def test_relay_resets_a_stream_whose_other_side_broke():
    with raw_pair() as (peer, session), duplex_pair("tcp") as (inner, outer):
        stream = accepted(peer, session)
        done = spawn(relay, stream, inner)
        outer.reset()
        outer.close()
        assert [got[:3] for got in peer.barrier() or [peer.read()]] == [(WINDOW_UPDATE, RST, 1)]
        done.result(PATIENCE)


def test_relay_hears_of_a_dead_stream_while_both_ways_wait_for_the_other_end(monkeypatch):
    monkeypatch.setattr(relay_module, "LOOK_AT_ENDED", 0.02)
    monkeypatch.setattr(relay_module, "DELIVERY_TIMEOUT", 0.1)
    with raw_pair() as (peer, session), duplex_pair("socketpair") as (inner, _):
        inner._socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
        stream = accepted(peer, session)
        done = spawn(relay, inner, stream)
        peer.send(*[frame(DATA, 0, 1, payload=bytes(65536))] * 4)
        wait_until(lambda: inner._writer_waits)  # the visitor does not read, and says nothing
        peer.send(frame(WINDOW_UPDATE, RST, 1))
        done.result(PATIENCE)


def test_relay_that_ended_well_breaks_nothing_later():
    with raw_pair() as (peer, session), duplex_pair("tcp") as (inner, outer):
        outer._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 16 * 1024)
        inner.limit_unsent(2 * INITIAL_WINDOW)
        stream = accepted(peer, session)
        done = spawn(relay, stream, inner)
        answer = noise(INITIAL_WINDOW)
        peer.send(frame(DATA, FIN, 1, payload=answer))
        outer.finish()
        done.result(PATIENCE)  # the kernel has the answer, the visitor not yet
        stream.reset()  # as an owner may, to be sure
        inner.close()
        assert digest(read_all(outer)) == digest(answer)


# Beside a real Go yamux --------------------------------------------------------------------------

GO_ROLES = pytest.mark.parametrize("go_role", ["server", "client"])


@GO_ROLES
def test_ld_interop_go_echoes_300_streams_at_once(gopeer, tmp_path, go_role):
    with beside_go(gopeer, tmp_path, "echo", go_role=go_role) as (_, session):
        with ThreadPoolExecutor(300) as pool:
            jobs = [noise(1024, seed) for seed in range(300)]
            together = threading.Barrier(300)

            def ask_together(data):
                stream = session.open(data, timeout=PATIENCE)
                together.wait(PATIENCE)
                stream.finish()
                answer = read_all(stream)
                stream.close()
                return answer

            assert list(pool.map(ask_together, jobs)) == jobs
        wait_until(lambda: tables(session) == NO_TABLES)


@GO_ROLES
@pytest.mark.parametrize("window", [INITIAL_WINDOW, 4 * MIB])
def test_ld_interop_go_echoes_16_mib(gopeer, tmp_path, go_role, window):
    with beside_go(gopeer, tmp_path, "echo", go_role=go_role, window=window) as (_, session):
        data = noise(16 * MIB)
        assert digest(ask(session, data)) == digest(data)


@GO_ROLES
def test_ld_interop_go_echoes_2000_streams_one_after_another(gopeer, tmp_path, go_role):
    with beside_go(gopeer, tmp_path, "echo", go_role=go_role) as (_, session):
        for number in range(2000):
            stream = session.open(b"%d" % number, timeout=PATIENCE)
            stream.finish()
            assert read_all(stream) == b"%d" % number
            stream.close()
        wait_until(lambda: tables(session) == NO_TABLES)


@GO_ROLES
@pytest.mark.parametrize(("streams", "size"), [(300, 1024), (2, 16 * MIB)])
def test_ld_interop_go_compares_our_echo(gopeer, tmp_path, go_role, streams, size):
    arguments = ("-streams", str(streams), "-bytes", str(size))
    with beside_go(gopeer, tmp_path, "load", *arguments, go_role=go_role) as (go, session):
        with echoing(session, 300):
            go.wait_for(f"^ok {streams}$")
            wait_until(lambda: len(session._mux._flows) == 0 or session.ended)


@GO_ROLES
def test_ld_interop_go_takes_a_reset_of_either_side(gopeer, tmp_path, go_role):
    with beside_go(gopeer, tmp_path, "echo", go_role=go_role) as (_, session):
        stream = session.open(b"cut", timeout=PATIENCE)
        assert stream.read(timeout=PATIENCE) == b"cut"
        stream.reset()
        assert ask(session, b"the session lives") == b"the session lives"


@GO_ROLES
def test_ld_interop_go_hears_that_we_leave_and_finishes_what_runs(gopeer, tmp_path, go_role):
    with beside_go(gopeer, tmp_path, "echo", go_role=go_role) as (_, session):
        stream = session.open(b"one", timeout=PATIENCE)
        session.leave()
        stream.write(b", two")
        stream.finish()
        assert read_all(stream) == b"one, two"
