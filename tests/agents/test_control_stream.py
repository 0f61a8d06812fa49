"""In which order an agent hears what."""

import logging
import threading

import pytest
from hand_made import HandMade, registration
from support import gateway_here, wait_until

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
    return ControlStream(stream, "agent")


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


def test_an_agent_may_say_what_nobody_knows(cache, caplog):
    """Before it registers and afterwards; the log has a line for each kind."""
    caplog.set_level(logging.DEBUG, "gotunnel")
    hello, bye = b'{"type":"hello"}\n', b'{"type":"bye\\n"}\n'
    with gateway_here(cache) as gateway, HandMade(gateway, hello * 2) as agent:
        agent.control.write(registration("app.localhost"))
        assert agent.hear().ok
        agent.control.write(hello + bye)
        (tunnel,) = gateway.inner.tunnels.registered()
        since = tunnel.ask()
        while not isinstance(agent.hear(), Ping):
            pass
        agent.say(Pong(1))
        wait_until(lambda: tunnel.has_answered(since))
        assert not tunnel._session.ended
    for kind in ("hello", "bye\\n"):
        lines = [r.getMessage() for r in caplog.records if f"type {kind} are" in r.getMessage()]
        assert len(lines) == 1


def test_a_flood_of_what_nobody_knows_ends_the_session(cache):
    with gateway_here(cache) as gateway, HandMade(gateway, registration("app.localhost")) as agent:
        assert agent.hear().ok
        (tunnel,) = gateway.inner.tunnels.registered()
        agent.control.write(b'{"type":"hello"}\n' * 2000)
        tunnel.ask()
        wait_until(lambda: tunnel._session.ended)
        assert "unknown control messages" in tunnel._session.ended
