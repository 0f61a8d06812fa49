"""In which order an agent hears what."""

import threading

import pytest

from gotunnel import (
    CERTIFICATES,
    REASONS,
    Ack,
    Certificate,
    End,
    MessageReader,
    Ping,
    Pong,
    SessionClosed,
    encode_message,
)
from gotunnel_server.agents.control_stream import ControlStream

APP = "app.test"
TIMEOUT = 20


class Stream:
    """A stream that keeps what is written, and gives what the test lets come."""

    def __init__(self):
        self.written, self.came, self.full = b"", [], False

    def write(self, data, timeout=None):
        if self.full:
            raise TimeoutError
        self.written += data

    def read(self, timeout):
        if not self.came:
            raise TimeoutError
        return self.came.pop(0)


@pytest.fixture
def stream():
    return Stream()


@pytest.fixture
def control(stream):
    return ControlStream(stream)


def heard(stream):
    return MessageReader().feed(stream.written)


def test_nothing_is_told_before_the_ack(control, stream):
    control.tell_certificate(APP, lambda hostname: "ready")
    control.tell_end(End("revoked", "it was"))
    assert heard(stream) == []
    ack = Ack(True, features=(CERTIFICATES, REASONS))
    control.acknowledge(ack)
    control.tell_certificate(APP, lambda hostname: "ready")
    control.tell_end(End("revoked", "it was"))
    assert heard(stream) == [ack, Certificate(APP, "ready"), End("revoked", "it was")]


def test_messages_of_extensions_that_the_ack_has_not_named_are_not_sent(control, stream):
    control.acknowledge(Ack(True))
    control.tell_certificate(APP, lambda hostname: pytest.fail("nobody wants to know"))
    control.tell_end(End("revoked", "it was"))
    assert heard(stream) == [Ack(True)]


def test_of_two_states_of_a_certificate_the_later_is_told_last(control, stream):
    control.acknowledge(Ack(True, features=(CERTIFICATES,)))
    asked, may_answer = threading.Event(), threading.Event()

    def first(hostname):
        asked.set()
        may_answer.wait(TIMEOUT)
        return "waiting"

    threads = [
        threading.Thread(target=control.tell_certificate, args=(APP, state_of))
        for state_of in (first, lambda hostname: "ready")
    ]
    threads[0].start()
    assert asked.wait(TIMEOUT)
    threads[1].start()
    may_answer.set()
    for thread in threads:
        thread.join(TIMEOUT)
    assert heard(stream)[1:] == [Certificate(APP, "waiting"), Certificate(APP, "ready")]


def test_an_agent_that_does_not_read_holds_up_only_what_must_be_sent(control, stream):
    stream.full = True
    control.tell(Ping(1))
    with pytest.raises(TimeoutError):
        control.send(Ping(1))


def test_all_that_has_come_is_read_and_then_the_end_is_told(control, stream):
    stream.came = [encode_message(Pong(1)) + encode_message(Pong(2))[:5]]
    assert control.read() == [Pong(1)]
    stream.came = [encode_message(Pong(2))[5:], b""]
    assert control.read() == [Pong(2)]
    assert control.read() == []
    stream.came = [b""]
    with pytest.raises(SessionClosed, match="ended the control stream"):
        control.read()
