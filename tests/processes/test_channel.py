"""Messages between the supervisor and its children."""

import socket
import threading

import pytest
from support import TIMEOUT

from gotunnel_server.processes import channel
from gotunnel_server.processes.channel import Broken, ChildEnd, Lines, SupervisorEnd, encoded


@pytest.fixture
def pair():
    ours, theirs = socket.socketpair()
    with ours, theirs:
        yield SupervisorEnd(ours), ChildEnd(theirs)


def test_messages_arrive_byte_by_byte_and_many_at_once():
    one, two = {"said": "ready"}, {"to": 0, "body": {"text": "a\nb é"}}
    lines = Lines()
    found = [
        message for byte in encoded(one) + encoded(two) for message in lines.take(bytes([byte]))
    ]
    assert found == [one, two]
    assert Lines().take(encoded(one) + encoded(two)) == [one, two]


@pytest.mark.parametrize("data", [b"x\n", b"[]\n", b"\xff\n", b"[" * 10_000 + b"\n"])
def test_what_is_no_message_breaks_the_channel(data):
    with pytest.raises(Broken):
        Lines().take(data)


def test_a_message_without_an_end_is_bounded(monkeypatch):
    monkeypatch.setattr(channel, "MOST_MESSAGE", 100)
    lines = Lines()
    lines.take(b"x" * 100)
    with pytest.raises(Broken, match="more than 100 bytes"):
        lines.take(b"x")


def test_both_ends_talk_until_one_closes(pair):
    supervisor, child = pair
    supervisor.send({"order": "go"})
    assert child.receive() == {"order": "go"}
    child.send({"said": "ready"})
    child.send({"said": "serving"})
    assert supervisor.receive() == [{"said": "ready"}, {"said": "serving"}]
    assert supervisor.receive() == []
    child.close()
    assert supervisor.receive() is None
    supervisor.send({"order": "drain"})  # nobody is there, which its exit status tells


def test_a_supervisor_that_ends_is_an_end_for_its_child(pair):
    supervisor, child = pair
    supervisor.close()
    with pytest.raises(EOFError):
        child.receive()
    with pytest.raises(OSError):
        child.send({"said": "alive"})


def test_the_supervisor_waits_for_no_child_and_a_child_that_reads_nothing_is_broken(
    pair, monkeypatch
):
    monkeypatch.setattr(channel, "MOST_QUEUED", 4 << 20)
    supervisor, _ = pair
    message = {"body": "x" * (1 << 20)}
    with pytest.raises(Broken, match="to read"):
        for _ in range(10):
            supervisor.send(message)
    assert supervisor.wants_to_write


def test_what_the_socket_did_not_take_comes_later(pair):
    supervisor, child = pair
    message = {"body": "x" * (4 << 20)}
    supervisor.send(message)
    assert supervisor.wants_to_write
    found = []
    reader = threading.Thread(target=lambda: found.append(child.receive()))
    reader.start()
    while supervisor.wants_to_write:
        supervisor.flush()
    reader.join(TIMEOUT)
    assert found == [message]


def test_a_child_gives_up_on_a_supervisor_that_reads_nothing(monkeypatch):
    monkeypatch.setattr(channel, "SEND_TIMEOUT", 0)
    monkeypatch.setattr(channel, "SEND_MICROSECONDS", 1000)
    ours, theirs = socket.socketpair()
    with ours, theirs:
        child = ChildEnd(theirs)
        with pytest.raises(OSError):
            child.send({"body": "x" * (4 << 20)})
        with pytest.raises(Broken, match="did not read an earlier message"):
            child.send({"said": "alive"})
