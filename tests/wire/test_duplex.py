"""Duplex over a socket pair, TCP and TLS, in both directions: two threads, ends, resets."""

import contextlib
import hashlib
import random
import socket
import ssl
import sys
import threading
import time

import pytest
from raw_peer import (  # noqa: F401 (fixtures)
    PATIENCE,
    duplex_pair,
    duplexes,
    leaves_nothing,
    read_all,
    spawn,
    start_tls,
    tcp_pair,
    tls_contexts,
)
from support import wait_until
from tls_by_hand import ALERT, CHANGE_CIPHER_SPEC, PAYLOAD, USER_CANCELED, WARNING, HandTls

import gotunnel
from gotunnel import Deadline
from gotunnel_agent.common import duplex as duplex_module
from gotunnel_agent.common import relay as relay_module
from gotunnel_agent.common.duplex import Duplex
from gotunnel_agent.common.relay import pump, relay

MIB = 1024 * 1024
SOME = random.Random(3).randbytes(3 * MIB)  # more than the kernel takes at once


def write_on(duplex):
    """Write until it fails; a single write might still fit when the kernel has moved things."""
    while True:
        duplex.write(b"x")


def fill(duplex):
    """Send until the kernel takes no more; returns how many bytes were handed over."""
    total = 0
    while duplex.send(bytes(64 * 1024)):
        total += 64 * 1024
    return total + 64 * 1024


# Bytes -------------------------------------------------------------------------------------------


def test_bytes_arrive(duplexes):
    left, right = duplexes
    left.write(b"there")
    assert right.read(timeout=PATIENCE) == b"there"
    right.write(b"and back")
    assert left.read(timeout=PATIENCE) == b"and back"


def test_offer_takes_no_more_than_the_kernel_does():
    with duplex_pair("tcp") as (left, right):
        assert left.offer(b"there") == 5
        assert right.read(timeout=PATIENCE) == b"there"
        while (taken := left.offer(SOME)) == len(SOME):
            pass
        assert taken < len(SOME) and left.offer(b"more") == 0
        assert left.flush()  # it has kept nothing
        left.reset()
        with pytest.raises(ConnectionResetError):
            left.offer(b"x")


@pytest.mark.skipif(duplex_module.NOTSENT_LOWAT is None, reason="this system has no such limit")
@pytest.mark.parametrize("transport", ["tcp", "tls"])
def test_the_kernel_takes_little_for_a_peer_that_reads_nothing(transport):
    """Hundreds of slow readers would take all the memory that it has for TCP."""
    with duplex_pair(transport) as (left, right):
        right._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 64 * 1024)
        assert fill(left) < MIB


def test_nothing_there_is_none_and_not_the_end(duplexes):
    left, _ = duplexes
    assert left.receive() is None
    assert not left.pending
    with pytest.raises(TimeoutError, match="the peer sent nothing in time"):
        left.read(timeout=0.01)


def test_a_read_gives_no_more_than_asked_and_keeps_the_rest(duplexes):
    left, right = duplexes
    left.write(b"0123456789")
    assert right.read(4, PATIENCE) == b"0123"
    assert right.read(4, PATIENCE) == b"4567"
    assert right.read(4, PATIENCE) == b"89"


def test_a_buffer_is_filled_as_far_as_it_goes_and_the_rest_is_kept(duplexes):
    left, right = duplexes
    buffer = memoryview(bytearray(b"......"))
    assert right.receive_into(buffer) is None
    left.write(b"0123456789")
    right.wait_readable(PATIENCE)
    assert right.receive_into(buffer[:4]) == 4
    right.unread(b"one ")
    assert right.receive_into(buffer[:2]) == 2
    assert right.receive_into(buffer[2:]) == 2
    assert bytes(buffer) == b"one .."
    assert right.receive_into(buffer) == 6
    assert bytes(buffer) == b"456789"
    left.finish(PATIENCE)
    right.wait_readable(PATIENCE)
    assert right.receive_into(buffer) == 0
    assert right.receive_into(buffer) == 0


def test_what_is_received_does_not_change_when_more_is(duplexes):
    left, right = duplexes
    left.write(b"first")
    first = right.read(timeout=PATIENCE)
    left.write(b"other")
    assert right.read(timeout=PATIENCE) == b"other"
    assert first == b"first"


def test_pending_tells_what_the_socket_does_not():
    with duplex_pair("tls") as (left, right):
        left.write(b"0123456789")
        assert right.read(4, PATIENCE) == b"0123"
        assert right.pending
        assert right.receive() == b"456789"
        assert not right.pending


def test_bytes_given_back_come_first(duplexes):
    left, right = duplexes
    left.write(b"later")
    right.unread(b"two")
    right.unread(b"one ")
    assert right.pending
    assert right.receive(5) == b"one t"
    assert right.receive() == b"wo"
    assert right.read(timeout=PATIENCE) == b"later"
    assert not right.pending


def test_two_threads_send_while_two_receive(duplexes):
    left, right = duplexes

    def send(duplex):
        rng = random.Random(4)
        at = 0
        while at < len(SOME):
            size = rng.choice((1, 100, 16 * 1024, 100_000))
            duplex.write(SOME[at : at + size], PATIENCE)
            at += size
        duplex.finish(PATIENCE)

    calls = [spawn(send, left), spawn(send, right), spawn(read_all, left), spawn(read_all, right)]
    results = [call.result(PATIENCE) for call in calls]
    assert [hashlib.sha256(data).digest() for data in results[2:]] == [
        hashlib.sha256(SOME).digest()
    ] * 2


def test_what_the_kernel_does_not_take_waits_in_order(duplexes):
    left, right = duplexes
    total = fill(left)
    assert not left.send(b"tail")
    assert not left.flush()
    received = b""
    while len(received) < total + 4:
        received += right.read(timeout=PATIENCE)
        left.flush()
    assert received == bytes(total) + b"tail"
    assert left.flush()


def test_write_times_out_when_the_peer_does_not_read(duplexes):
    left, right = duplexes
    fill(left)
    with pytest.raises(TimeoutError, match="the peer has stopped reading"):
        left.write(b"x", timeout=0.01)


def test_wait_to_writes_as_long_as_the_peer_reads(duplexes):
    left, right = duplexes
    writing = spawn(left.write, SOME, PATIENCE)
    count = 0
    while count < len(SOME):
        count += len(right.read(4096, PATIENCE))
    writing.result(PATIENCE)


def test_wait_to_writes_for_a_slow_reader_before_the_kernel_has_room(duplexes, monkeypatch):
    """Which takes megabytes: a third of what the kernel holds."""
    left, _ = duplexes
    fill(left)
    untaken = iter(range(1000, 900, -1))  # so many looks, each of which finds something taken
    monkeypatch.setattr(left, "_untaken", lambda: next(untaken, 900))
    monkeypatch.setattr(duplex_module, "STALL_LOOK", 0.005)
    began = time.monotonic()
    with pytest.raises(TimeoutError, match="the peer has stopped reading, nothing for 0.1 s"):
        left.write(b"x", timeout=0.1)
    assert time.monotonic() - began > 0.4


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="only Linux tells it")
def test_what_a_peer_has_taken_is_seen(duplexes):
    left, right = duplexes
    fill(left)
    before = left._untaken()
    assert before > 0
    read = 0
    while left._untaken() >= before:
        read += len(right.read(timeout=PATIENCE))


def test_write_may_be_given_a_judge_of_the_time_it_takes(duplexes):
    left, right = duplexes
    fill(left)
    spent = []

    def spend(seconds, taken):
        spent.append((seconds, taken))
        if len(spent) == 3:
            raise TimeoutError("enough")

    with pytest.raises(TimeoutError, match="enough"):
        left.write(b"x", timeout=0.2, spend=spend)
    assert spent[-1][1] == 0 and 0.1 < sum(seconds for seconds, _ in spent) < 2


def test_pump_says_that_a_reader_has_stalled(caplog):
    caplog.set_level("INFO")
    with duplex_pair("tcp") as (source, feeder), duplex_pair("tcp") as (sink, _):
        sink.stall_timeout = 0.05
        fill(sink)
        feeder.write(b"x")
        assert not pump(source, sink)
    assert "reset: the peer has stopped reading, nothing for 0.05 s" in caplog.text


def test_writing_nothing_does_nothing(duplexes):
    left, right = duplexes
    left.write(b"")
    left.write(b"something")
    assert right.read(timeout=PATIENCE) == b"something"


# Ends --------------------------------------------------------------------------------------------


def test_half_close_lets_the_other_half_go_on(duplexes):
    left, right = duplexes
    left.write(b"question")
    left.finish(PATIENCE)
    assert read_all(right) == b"question"
    assert right.receive() == b"" and right.pending
    answering = spawn(right.write, SOME, PATIENCE)
    received = b""
    while len(received) < len(SOME):
        received += left.read(timeout=PATIENCE)
    answering.result(PATIENCE)
    right.finish(PATIENCE)
    assert received == SOME
    assert left.read(timeout=PATIENCE) == b""


@pytest.mark.parametrize("cuts", [False, True])
def test_the_last_bytes_and_the_end_leave_together(duplexes, cuts):
    left, right = duplexes
    if cuts:
        left.cut_unless_finished()
    left.write_last(b"bye", PATIENCE)
    assert read_all(right) == b"bye"
    right.write(b"still heard")
    assert left.read(timeout=PATIENCE) == b"still heard"
    left.finish(PATIENCE)  # nothing is left of it
    left.close()


def test_finish_waits_behind_what_was_written(duplexes):
    left, right = duplexes
    total = fill(left)
    finishing = spawn(left.finish, PATIENCE)
    assert len(read_all(right)) == total
    finishing.result(PATIENCE)


def test_finish_times_out_when_the_peer_does_not_read(duplexes):
    left, right = duplexes
    fill(left)
    with pytest.raises(TimeoutError):
        left.finish(timeout=0.01)


def test_half_close_keeps_what_has_come_and_is_not_read():
    with duplex_pair("tls") as (left, right):
        left.write(b"0123456789")
        assert right.read(4, PATIENCE) == b"0123"
        right.finish(PATIENCE)
        left.write(b"more")
        left.finish(PATIENCE)
        assert read_all(right) == b"456789more"


def test_read_never_gives_more_than_asked():
    with duplex_pair("tls") as (left, right):
        left.write(b"0123456789")
        assert right.read(4, PATIENCE) == b"0123"
        right.finish(PATIENCE)
        assert right.read(4, PATIENCE) == b"4567"
        assert right.read(4, PATIENCE) == b"89"


def test_what_is_dropped_is_not_read_but_its_end_is(duplexes):
    left, right = duplexes
    right.write(b"0123456789")
    assert left.read(4, PATIENCE) == b"0123"
    right.write(b"more")
    left.wait_readable(PATIENCE)
    assert left.drop() and not left.pending
    right.finish(PATIENCE)
    while (came := left.drop()) != 0:
        if came is None:
            left.wait_readable(PATIENCE)


def test_an_end_that_was_read_before_is_an_end_when_the_rest_is_dropped(duplexes):
    left, right = duplexes
    right.finish(PATIENCE)
    assert left.read(timeout=PATIENCE) == b""
    assert left.drop() == 0


def test_a_reset_is_an_end_for_what_is_dropped():
    with duplex_pair("tcp") as (left, right):
        right.write(b"more")
        left.wait_readable(PATIENCE)
        right.reset()
        right.close()
        while (came := left.drop()) != 0:
            if came is None:
                left.wait_readable(PATIENCE)


def test_close_is_an_end_for_the_peer(duplexes):
    left, right = duplexes
    left.write(b"last words")
    left.close()
    assert read_all(right) == b"last words"
    assert left.fileno() == -1


def test_close_says_farewell_in_tls():
    with duplex_pair("tls") as (left, right):
        left.close()
        assert right.read(timeout=PATIENCE) == b""
        assert right._tls.read(1) == b""  # without a farewell this is an SSLEOFError


def test_a_tls_peer_that_just_hangs_up_is_at_its_end():
    with duplex_pair("tls") as (left, right):
        left.write(b"last words")
        left._socket.shutdown(socket.SHUT_WR)
        assert read_all(right) == b"last words"
        with pytest.raises(ssl.SSLEOFError):
            right._tls.read(1)


@pytest.mark.parametrize("transport", ["tls", "tls reversed"])
def test_half_closed_tls_reads_on_to_an_end_without_farewell(transport):
    with duplex_pair(transport) as (left, right):
        right.finish(PATIENCE)
        left.write(b"last words")
        left._socket.shutdown(socket.SHUT_WR)
        assert read_all(right) == b"last words"


def test_stop_wakes_a_reader(duplexes):
    left, right = duplexes
    reading = spawn(left.read)
    wait_until(lambda: left._wait_to_read)
    left.stop()
    left.stop()
    assert reading.result(PATIENCE) == b""
    assert read_all(right) == b""


def test_stop_wakes_a_writer(duplexes):
    left, right = duplexes
    fill(left)
    writing = spawn(write_on, left)
    wait_until(lambda: left._writer_waits)
    left.stop()
    with pytest.raises(OSError):
        writing.result(PATIENCE)


def test_reset_wakes_a_reader_and_a_writer(duplexes):
    left, right = duplexes
    fill(left)
    reading, writing = spawn(left.read), spawn(write_on, left)
    wait_until(lambda: left._wait_to_read and left._writer_waits)
    left.reset()
    with pytest.raises(OSError):
        writing.result(PATIENCE)
    with contextlib.suppress(OSError):
        assert reading.result(PATIENCE) == b""


def test_reset_is_not_taken_for_an_end():
    left, raw = tcp_pair()
    with raw, contextlib.closing(Duplex(left)) as duplex:
        duplex.write(b"half of it")
        assert raw.recv(100) == b"half of it"
        duplex.reset()
        raw.setblocking(False)
        with pytest.raises((BlockingIOError, ConnectionResetError)):  # anything but an end
            raw.recv(100)
        duplex.close()
        with pytest.raises(ConnectionResetError):
            raw.recv(100)


class ResetInBetween:
    """A Duplex's socket that is reset by another thread just before it is read."""

    def __init__(self, duplex):
        self._duplex, self._socket = duplex, duplex._socket

    def __getattr__(self, name):
        return getattr(self._socket, name)

    def recv(self, size):
        self._duplex.reset()
        return self._socket.recv(size)

    def recv_into(self, view):
        self._duplex.reset()
        return self._socket.recv_into(view)


@pytest.mark.parametrize("into", [False, True])
def test_a_reset_between_the_check_and_the_read_is_not_taken_for_an_end(duplexes, into):
    left, _ = duplexes
    assert left.receive() is None  # TLS's tickets are no payload
    left._socket = ResetInBetween(left)
    with pytest.raises(ConnectionResetError, match="on this side"):
        left.receive_into(memoryview(bytearray(10))) if into else left.receive()
    assert not left._at_end


def test_a_reset_during_the_handshake_is_not_taken_for_an_end():
    with duplex_pair("tcp") as (left, right):
        start_tls(left, right)
        assert not left.handshake()  # sends the ClientHello
        left._socket = ResetInBetween(left)
        with pytest.raises(ConnectionResetError, match="on this side"):
            left.handshake()


def test_pump_does_not_pass_a_reset_on_as_an_end():
    with duplex_pair("tcp") as (_, source), duplex_pair("tcp") as (sink, right):
        source._socket = ResetInBetween(source)
        assert not pump(source, sink)
        sink.close()
        with pytest.raises(ConnectionResetError):
            right.read(timeout=PATIENCE)


@pytest.mark.parametrize("transport", ["tcp", "tls"])
def test_a_reader_that_has_emptied_the_socket_waits_before_it_reads_again(transport):
    class Counting:
        """A socket that counts the reads that found nothing."""

        vain = 0

        def __getattr__(self, name):
            return getattr(raw, name)

        def counted(self, function, argument):
            try:
                return function(argument)
            except BlockingIOError:
                self.vain += 1
                raise

        def recv(self, size):
            return self.counted(raw.recv, size)

        def recv_into(self, view):
            return self.counted(raw.recv_into, view)

    with duplex_pair(transport) as (left, right):
        raw = right._socket
        right._socket = counting = Counting()
        for _ in range(10):
            left.write(b"ping")
            assert right.read(timeout=PATIENCE) == b"ping"
            reading = spawn(right.read, timeout=PATIENCE)
            left.write(b"pong")
            assert reading.result(PATIENCE) == b"pong"
        right.unread(b"back")
        assert right.read(timeout=0) == b"back" and counting.vain <= 1


def test_openssl_is_asked_only_under_its_lock():
    class Guarded:
        """Part of a Duplex's TLS that may only be touched under the lock."""

        def __init__(self, part, lock):
            self.__dict__.update(part=part, lock=lock)

        def __getattr__(self, name):
            assert self.lock.locked(), f"{name} without the lock"
            return getattr(self.part, name)

    with duplex_pair("tls") as (left, right):
        for name in ("_tls", "_records", "_tls_in", "_tls_out"):
            setattr(left, name, Guarded(getattr(left, name), left._tls_lock))
        assert not left.pending
        right.write(b"x")
        assert left.read(timeout=PATIENCE) == b"x"
        left.write(b"y")
        assert left.flush() and not left.pending
        left.finish(PATIENCE)
        right.finish(PATIENCE)
        assert read_all(left) == b"" and left.pending


def test_a_connection_that_was_reset_is_known_to_have_died_although_nobody_reads_it():
    dialled, raw = tcp_pair()
    with contextlib.closing(Duplex(dialled)) as duplex:
        raw.shutdown(socket.SHUT_WR)
        assert duplex.read(timeout=PATIENCE) == b""
        assert not duplex.died()
        raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, duplex_module.NO_LINGER)
        raw.close()
        wait_until(duplex.died)
        with pytest.raises(ConnectionResetError):
            duplex.read()


def test_a_reset_of_the_peer_is_an_error():
    left, raw = tcp_pair()
    with contextlib.closing(Duplex(left)) as duplex:
        raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, duplex_module.NO_LINGER)
        raw.close()
        with pytest.raises(ConnectionResetError):
            duplex.read(timeout=PATIENCE)


def test_after_close_everything_is_an_oserror(duplexes):
    left, _ = duplexes
    left.close()
    left.close()
    left.stop()
    left.reset()
    with pytest.raises(OSError):
        left.write(b"x")


def test_finish_twice_is_once(duplexes):
    left, right = duplexes
    left.finish(PATIENCE)
    left.finish(PATIENCE)
    assert read_all(right) == b""
    right.write(b"still open")
    assert left.read(timeout=PATIENCE) == b"still open"


def test_after_reset_nothing_is_read_or_written(duplexes):
    left, right = duplexes
    right.write(b"unread")
    left.reset()
    for call in (left.receive, left.flush, lambda: left.write(b"x")):
        with pytest.raises(ConnectionResetError, match="the connection was reset on this side"):
            call()


# TLS ---------------------------------------------------------------------------------------------


def test_handshake_says_false_while_the_peer_has_to_speak():
    with duplex_pair("tcp") as (client, server):
        start_tls(client, server)
        assert not server.handshake()
        assert not client.handshake()
        done = spawn(server.handshake_within, PATIENCE)
        client.handshake_within(PATIENCE)
        done.result(PATIENCE)


def test_handshake_takes_bytes_that_were_given_back():
    with duplex_pair("tcp") as (client, server):
        client_context, server_context = tls_contexts()
        client.start_tls(client_context, server_side=False, server_hostname="localhost")
        client.handshake()
        hello = server.read(timeout=PATIENCE)
        server.unread(hello)
        server.start_tls(server_context, server_side=True)
        assert not server.handshake()
        assert not server.pending  # or the connection would be asked again and again meanwhile
        client.handshake_within(PATIENCE)
        server.handshake_within(PATIENCE)
        client.write(b"secret")
        assert server.read(timeout=PATIENCE) == b"secret"


@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])
def test_a_session_ticket_leaves_with_the_first_answer_if_no_peer_waits_for_it(version):
    with duplex_pair("tcp") as (client, server):
        client_context, server_context = tls_contexts()
        client_context.maximum_version = version
        client.start_tls(client_context, server_side=False, server_hostname="localhost")
        server.start_tls(server_context, server_side=True)
        done = spawn(client.handshake_within, PATIENCE)
        while not server.handshake(hold_ticket=True):
            server.wait_readable(PATIENCE)
        done.result(PATIENCE)
        assert not client.pending
        with pytest.raises(TimeoutError):
            client.wait_readable(0.01)
        server.write(b"answer")
        assert client.read(timeout=PATIENCE) == b"answer"


def test_what_came_with_the_end_of_the_handshake_is_read_without_asking_the_socket(monkeypatch):
    with duplex_pair("tcp") as (client, server):
        client_context, server_context = tls_contexts()
        client.start_tls(client_context, server_side=False, server_hostname="localhost")
        server.start_tls(server_context, server_side=True)
        assert not client.handshake()  # the ClientHello is sent
        assert not server.handshake()  # it has no bytes from before TLS
        server.wait_readable(PATIENCE)
        assert not server.handshake()
        client.wait_readable(PATIENCE)
        with monkeypatch.context() as patch:
            patch.setattr(client, "_push", lambda: True)  # what is sent waits for more
            while not client.handshake():
                client.wait_readable(PATIENCE)
            client.send(b"request")
        client.flush()
        server.wait_readable(PATIENCE)
        assert server.handshake(hold_ticket=True)
        monkeypatch.setattr(server, "_receive_plain_into", None)
        assert server.receive() == b"request"
        monkeypatch.undo()
        client.send(b"another")
        assert server.read(timeout=PATIENCE) == b"another"


def test_handshake_times_out():
    with duplex_pair("tcp") as (client, server):
        start_tls(client, server)
        with pytest.raises(TimeoutError):
            server.handshake_within(0.01)


def test_handshake_that_fails_tells_the_peer_why():
    with duplex_pair("tcp") as (client, server):
        client_context, server_context = tls_contexts()
        client.start_tls(client_context, server_side=False, server_hostname="another.example")
        server.start_tls(server_context, server_side=True)
        failing = spawn(server.handshake_within, PATIENCE)
        with pytest.raises(ssl.SSLCertVerificationError):
            client.handshake_within(PATIENCE)
        with pytest.raises(ssl.SSLError, match="(?i)alert"):
            failing.result(PATIENCE)


@pytest.mark.parametrize(
    "garbage", [b"GET / HTTP/1.1\r\n\r\n", b"\x16\x03\x01\xff\xff" + b"x" * 50_000]
)
def test_handshake_with_something_else_is_an_ssl_error(garbage):
    with duplex_pair("tcp") as (raw, server):
        _, server_context = tls_contexts()
        server.start_tls(server_context, server_side=True)
        raw.write(garbage)
        raw.finish()
        with pytest.raises(ssl.SSLError):
            server.handshake_within(PATIENCE)


def test_handshake_that_the_peer_breaks_off_is_an_oserror():
    with duplex_pair("tcp") as (raw, server):
        _, server_context = tls_contexts()
        server.start_tls(server_context, server_side=True)
        raw.close()
        with pytest.raises(OSError):
            server.handshake_within(PATIENCE)


def test_broken_tls_is_an_error_and_not_an_end():
    with duplex_pair("tls") as (left, right):
        left._socket.send(b"\x17\x03\x03\x00\x20" + bytes(32))
        with pytest.raises(ssl.SSLError):
            right.read(timeout=PATIENCE)


# Records without payload

WITHOUT_PAYLOAD = {  # how a flood of them is made, and in which versions of TLS
    "key updates": (HandTls.key_update, ("1.3",)),
    "key updates to be answered": (lambda peer: peer.key_update(answer=True), ("1.3",)),
    "empty": (lambda peer: peer.record(PAYLOAD), ("1.2", "1.3")),
    "warnings": (
        lambda peer: peer.record(ALERT, bytes([WARNING, USER_CANCELED])), ("1.2", "1.3"),
    ),
    "renegotiations": (HandTls.hello, ("1.2", "1.3")),
    "ChangeCipherSpec": (lambda peer: peer.record(CHANGE_CIPHER_SPEC, b"\1"), ("1.2", "1.3")),
}  # fmt: skip
FLOODS = [
    pytest.param(version, make, id=f"{kind}, TLS {version}")
    for kind, (make, versions) in WITHOUT_PAYLOAD.items()
    for version in versions
]


@contextlib.contextmanager
def by_hand(version="1.3"):
    """A client that makes its records by hand, and the server, a Duplex."""
    dialled, accepted = tcp_pair()
    with dialled, contextlib.closing(Duplex(accepted)) as server:
        server.start_tls(tls_contexts()[1], server_side=True)
        done = spawn(server.handshake_within, PATIENCE)
        client = HandTls(dialled, version)
        done.result(PATIENCE)
        yield client, server


def send_until_it_is_over(client, make):
    """Send records until the peer takes none any more."""
    client.socket.settimeout(PATIENCE)
    with contextlib.suppress(ConnectionError):
        while True:
            client.socket.sendall(b"".join(make(client) for _ in range(20)))


@pytest.mark.parametrize(("version", "make"), FLOODS)
def test_a_flood_of_records_without_payload_ends(version, make):
    with by_hand(version) as (client, server):
        client.socket.sendall(client.record(PAYLOAD, b"honest so far"))
        assert server.read(timeout=PATIENCE) == b"honest so far"
        flood = spawn(send_until_it_is_over, client, make)
        with pytest.raises(OSError):
            server.read(timeout=PATIENCE)
        server.close()
        flood.result(PATIENCE)


def test_a_read_returns_although_records_without_payload_come_as_fast_as_they_are_read():
    """Else it would hold its thread for as long as its peer likes."""
    with by_hand() as (client, server):

        class Quick:
            """The server's socket, in which something new always lies."""

            def __getattr__(self, name):
                return getattr(raw, name)

            def recv_into(self, view):
                client.socket.sendall(client.key_update())
                return raw.recv_into(view)

        raw, server._socket = server._socket, Quick()
        assert server.receive() is None


def test_a_handshake_takes_a_step_at_a_time_and_not_without_end(monkeypatch):
    monkeypatch.setattr(duplex_module, "READ_SIZE", 100)
    monkeypatch.setattr(duplex_module, "NO_PAYLOAD", 150)
    with duplex_pair("tcp") as (client, server):
        client_context, server_context = tls_contexts()
        client.start_tls(client_context, server_side=False, server_hostname="localhost")
        client.handshake()
        server.start_tls(server_context, server_side=True)
        assert not server.handshake()
        with pytest.raises(ConnectionAbortedError, match="more than 150 bytes of TLS without"):
            server.handshake_within(PATIENCE)


def test_payload_makes_up_for_what_came_without(monkeypatch):
    monkeypatch.setattr(duplex_module, "NO_PAYLOAD", 1000)
    with by_hand() as (client, server):
        for _ in range(10):
            client.socket.sendall(b"".join(client.key_update() for _ in range(20)))
            assert server.receive() is None
            client.socket.sendall(client.record(PAYLOAD, b"x"))
            assert server.read(timeout=PATIENCE) == b"x"


def test_answers_that_a_peer_does_not_read_do_not_pile_up(monkeypatch):
    """It mixes payload in, which counts for it."""
    monkeypatch.setattr(duplex_module, "ANSWERS", 2000)
    with by_hand() as (client, server):
        fill(server)
        server.send(bytes(16 * 1024 * 1024))  # more than the kernel may find room for later
        with pytest.raises(ConnectionAbortedError, match="does not read TLS's answers"):
            for _ in range(1000):
                record = client.key_update(answer=True) + client.record(PAYLOAD, b"x")
                client.socket.sendall(record)
                server.read(timeout=PATIENCE)
        assert server._answers < 2100


# Deadline ----------------------------------------------------------------------------------------


def test_a_deadline_without_timeout_never_comes():
    assert Deadline(None).left() is None


def test_a_deadline_counts_down(monkeypatch):
    now = 100.0
    monkeypatch.setattr(gotunnel, "monotonic", lambda: now)
    deadline = Deadline(5)
    assert deadline.left() == 5
    now = 104.0
    assert deadline.left() == 1
    now = 105.0
    with pytest.raises(TimeoutError, match="timed out"):
        deadline.left()


# relay -------------------------------------------------------------------------------------------


@contextlib.contextmanager
def relayed(transport="tcp", other="tcp"):
    """Two far ends and a relay between them: (left end, right end, the relay's future)."""
    with duplex_pair(transport) as (left, inner_left), duplex_pair(other) as (inner_right, right):
        done = spawn(relay, inner_left, inner_right)
        try:
            yield left, right, done
        finally:
            for end in (left, right):
                end.stop()
            done.result(PATIENCE)


@pytest.mark.parametrize(
    ("first", "second"), [("tcp", "tcp"), ("tls", "tcp"), ("tls", "tls reversed")]
)
def test_relay_carries_both_ways_and_ends_when_both_have_ended(first, second):
    with relayed(first, second) as (left, right, done):
        calls = [spawn(read_all, left), spawn(read_all, right)]
        for end in (left, right):
            spawn(end.write, SOME, PATIENCE).result(PATIENCE)
        left.finish(PATIENCE)
        assert calls[1].result(PATIENCE) == SOME
        assert not done.done()
        right.finish(PATIENCE)
        assert calls[0].result(PATIENCE) == SOME
        assert done.result(PATIENCE) is None


def test_relay_passes_half_close_on_and_waits_for_the_answer():
    with relayed() as (left, right, done):
        left.write(b"question")
        left.finish()
        assert read_all(right) == b"question"
        right.write(b"answer")
        right.finish()
        assert read_all(left) == b"answer"
        done.result(PATIENCE)


def test_relay_resets_the_other_side_of_a_broken_one():
    outer, raw = tcp_pair()
    inner, target = tcp_pair()
    with outer, target, contextlib.closing(Duplex(raw)) as left, \
            contextlib.closing(Duplex(inner)) as right:  # fmt: skip
        done = spawn(relay, left, right)
        target.sendall(b"half")
        outer.settimeout(PATIENCE)
        assert outer.recv(100) == b"half"
        target.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, duplex_module.NO_LINGER)
        target.close()
        done.result(PATIENCE)
        left.close()
        with pytest.raises(ConnectionResetError):  # a cut answer must not look complete
            while outer.recv(100):
                pass
            raise AssertionError("it looked complete")


def test_relay_is_one_more_thread_and_names_it():
    with relayed() as (left, right, done):
        wait_until(lambda: "test relay back" in [thread.name for thread in threading.enumerate()])


def test_pump_stops_when_its_sink_is_gone():
    with duplex_pair("tcp") as (left, source), duplex_pair("tcp") as (sink, right):
        sink.stop()
        left.write(b"for nobody")
        assert spawn(pump, source, sink).result(PATIENCE) is False
        left.write(b"more")  # whoever reads the sink resets the source
        assert source.read(timeout=PATIENCE) == b"more"


def test_relay_stops_when_an_end_is_gone():
    with duplex_pair("tcp") as (left, source), duplex_pair("tcp") as (sink, right):
        sink.stop()
        left.write(b"for nobody")
        spawn(relay, source, sink).result(PATIENCE)
        with pytest.raises(ConnectionResetError, match="on this side"):
            source.receive()


@pytest.mark.parametrize("reversed_", [False, True])
def test_relay_ends_when_an_end_is_gone_whose_bytes_are_all_copied(monkeypatch, reversed_):
    """Its other direction would wait for ever: for a peer that ignores FIN and sends nothing."""
    monkeypatch.setattr(relay_module, "LOOK_AT_ENDED", 0.02)
    outer, raw = tcp_pair()
    with duplex_pair("tcp") as (inner, silent), contextlib.closing(Duplex(raw)) as left:
        done = spawn(relay, *((inner, left) if reversed_ else (left, inner)))
        outer.shutdown(socket.SHUT_WR)
        assert silent.read(timeout=PATIENCE) == b""
        outer.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, duplex_module.NO_LINGER)
        outer.close()
        done.result(PATIENCE)
        inner.close()
        with pytest.raises(ConnectionError):  # a RST is here, where an end would let it write
            silent.write(b"answer")


def test_relay_stays_while_an_end_that_has_said_fin_still_reads(monkeypatch):
    monkeypatch.setattr(relay_module, "LOOK_AT_ENDED", 0.01)
    with relayed() as (left, right, done):
        left.finish()
        assert read_all(right) == b""
        for _ in range(10):
            right.write(b"more")
            assert left.read(timeout=PATIENCE) == b"more"
        assert not done.done()
        right.finish()
        done.result(PATIENCE)


class Faulty:
    """An end of a relay that has a bug."""

    def __init__(self, error):
        self.error = error
        self.resets = 0

    def read(self):
        raise self.error

    def reset(self):
        self.resets += 1

    cut = stop_reading = reset


@pytest.mark.parametrize("error", [MemoryError("no memory"), RuntimeError("a bug")])
def test_pump_resets_both_ends_whatever_goes_wrong_and_logs_a_bug(error, caplog):
    with duplex_pair("tcp") as (sink, right):
        source = Faulty(error)
        assert not pump(source, sink)
        assert source.resets == 1 and str(error) in caplog.text and "Traceback" in caplog.text
        sink.close()
        with pytest.raises(ConnectionResetError):
            right.read(timeout=PATIENCE)


def test_relay_does_not_wait_for_ever_for_a_direction_that_a_reset_does_not_end(
    monkeypatch, caplog
):
    monkeypatch.setattr(relay_module, "RESET_JOIN", 0.01)
    monkeypatch.setattr(relay_module, "LOOK_AT_ENDED", 0.01)
    monkeypatch.setattr(relay_module, "DELIVERY_TIMEOUT", 0.02)
    stuck, let_go = threading.Event(), threading.Event()

    class Stuck(Faulty):
        def read(self):
            stuck.set()
            let_go.wait(PATIENCE)
            return b""

        def write(self, data):
            raise self.error

        def finish(self):
            pass

    with duplex_pair("tcp") as (visitor, inner):
        done = spawn(relay, inner, Stuck(ConnectionResetError()))
        assert stuck.wait(PATIENCE)
        visitor.write(b"x")
        done.result(PATIENCE)
        assert "still runs although its relay was reset" in caplog.text
        let_go.set()


def test_what_did_not_fit_of_a_record_comes_with_what_follows():
    """Alone it is a piece of a few bytes, and the gateway slows a visitor down that sends those."""
    size = 512 * 1024  # the kernel takes it at once, so that more has always come
    with duplex_pair("tls") as (left, right):
        left.limit_unsent(2 * size)
        left.write(bytes(size), PATIENCE)
        pieces = []
        while sum(pieces) < size:
            pieces.append(len(right.read(timeout=PATIENCE)))
    assert len([piece for piece in pieces if piece < 1000]) <= 2  # the beginning and the end
