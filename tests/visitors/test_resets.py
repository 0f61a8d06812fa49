"""Bytes sent before a reset reach the other end, and then the reset does.

Linux delivers such bytes before ECONNRESET, so without a tunnel they arrive, too. A program can
reset a connection unintentionally: by closing it with input unread.
"""

import fcntl
import ftplib
import select
import socket
import sys
import termios

import pytest
from support import (
    APP,
    CUT,
    MIB,
    RAW,
    TIMEOUT,
    Wire,
    agent_here,
    gateway_here,
    request,
    status_of,
    wait_until,
)

TIMES = 10  # each: chance decides whether a reset overtakes


@pytest.fixture
def gateway(cache):
    with gateway_here(cache, RAW_TCP_HOST=RAW) as gateway:
        yield gateway


@pytest.fixture
def served(gateway, tmp_path, origin):
    with agent_here(gateway, tmp_path, http={APP: origin.port}, tcp={RAW: origin.port}):
        yield gateway


def dial(gateway, door):
    if door == "TLS":
        return gateway.dial(RAW)
    return Wire(socket.create_connection(("127.0.0.1", gateway.public_port)))


def unsent(wire) -> int:
    """Bytes that the kernel of the other end has not taken."""
    return int.from_bytes(fcntl.ioctl(wire.sock, termios.TIOCOUTQ, bytes(4)), sys.byteorder)


def read_to_reset(wire):
    data = b""
    with pytest.raises(CUT):
        while more := wire.read():
            data += more
        raise AssertionError("it looks whole")
    return data


@pytest.mark.parametrize("door", ["plain", "TLS"])
@pytest.mark.parametrize("size", [1024, MIB // 2])
def test_answer_of_a_target_that_closes_with_input_unread_comes_whole(served, origin, door, size):
    answer = bytes(range(256)) * (size // 256)
    for _ in range(TIMES):
        with dial(served, door) as visitor:
            visitor.send(b"SSH-" + 1000 * b"of which the target reads little")
            with origin.accept() as target:
                target.sock.recv(4)
                target.send(answer)
                wait_until(lambda: unsent(target) == 0)  # else its close() would drop the answer
            assert read_to_reset(visitor) == answer


@pytest.mark.parametrize("door", ["plain", "TLS"])
def test_job_of_a_visitor_that_leaves_a_greeting_unread_comes_whole(served, origin, door):
    for _ in range(TIMES):
        with dial(served, door) as visitor:
            visitor.send(b"SSH-")
            with origin.accept() as target:
                target.read_exactly(4)
                target.send(b"welcome")
                assert select.select([visitor.sock], [], [], TIMEOUT)[0]
                visitor.send(b"the job")
                visitor.close()
                assert read_to_reset(target) == b"the job"


def test_early_refusal_of_a_target_that_closes_with_the_body_unread_comes_whole(served, origin):
    page = b"too large" * 1000
    for _ in range(TIMES):
        with served.dial(APP) as visitor:
            visitor.send(request("POST", "/", f"Content-Length: {MIB}") + bytes(1000))
            with origin.accept() as target:
                target.read_head()
                target.send(b"HTTP/1.1 413 Too Large\r\nConnection: close\r\n"
                            b"Content-Length: %d\r\n\r\n" % len(page) + page)  # fmt: skip
            head, body = visitor.read_message()
            assert status_of(head) == 413 and body == page


@pytest.mark.parametrize("door", ["plain", "TLS"])
def test_a_target_that_resets_when_it_has_read_all_is_not_said_to_be_down(
    served, origin, door, caplog
):
    caplog.set_level("INFO", "gotunnel")
    with dial(served, door) as visitor:
        visitor.send(b"SSH-")
        with origin.accept() as target:
            target.read_exactly(4)
            target.reset()
        assert read_to_reset(visitor) == b""
    assert "target is down" not in caplog.text


# Urgent data -------------------------------------------------------------------------------------


def test_urgent_bytes_stay_in_their_place_both_ways(served, origin):
    with dial(served, "plain") as visitor:
        visitor.send(b"SSH-")
        with origin.accept() as target:
            target.read_exactly(4)
            for sender, reader in ((visitor, target), (target, visitor)):
                sender.send(b"before")
                sender.sock.send(b"urgent!", socket.MSG_OOB)
                sender.send(b"behind")
                assert reader.read_exactly(19) == b"beforeurgent!behind"


def test_abor_of_ftp_comes_whole(served, origin):
    """Python's ftplib sends ABOR as urgent data (RFC 959); its last byte must not be lost."""

    def serve(wire):
        wire.send(b"220 ready\r\n")
        while line := wire.read_until(b"\n"):
            wire.send(b"226 aborted\r\n" if line == b"ABOR\r\n" else b"200 fine\r\n")

    origin.serve(serve)
    client = ftplib.FTP(timeout=TIMEOUT)
    client.connect("127.0.0.1", served.public_port)
    assert client.voidcmd("NOOP") == "200 fine"
    assert client.abort() == "226 aborted"
    client.close()
