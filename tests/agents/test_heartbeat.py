"""When an agent counts as alive. Time and the session are the test's."""

import types

import pytest

from gotunnel import Ping, Pong, SessionClosed
from gotunnel_server.agents import heartbeat
from gotunnel_server.agents.heartbeat import (
    ANSWER_TIMEOUT,
    BEAT,
    PING_INTERVAL,
    PONG_TIMEOUT,
    SIGN_OF_LIFE,
    Heartbeat,
)


class House:
    """A Heartbeat, and the session and control stream that it stands on."""

    def __init__(self, monkeypatch):
        self.now, self.said, self.came, self.silent, self.closed = 1000.0, [], [], [], []
        self.timers = []
        self.heard_at = self.now
        monkeypatch.setattr(heartbeat, "monotonic", lambda: self.now)
        say = self.said.append
        control = types.SimpleNamespace(read=self.read, send=say, tell=say)
        self.heart = Heartbeat(self, control, self.silent.append)

    def read(self):
        messages, self.came = self.came, []
        if SessionClosed in messages:
            raise SessionClosed("the agent ended the control stream")
        return messages

    def call_later(self, delay, function):
        self.timers.append((self.now + delay, function))

    def close(self, reason):
        self.closed.append(reason)

    def pass_time(self, seconds, pongs=False):
        """Run the timers of so many seconds; every Ping is answered at once if ``pongs``."""
        until = self.now + seconds
        while due := sorted((at, n) for n, (at, _) in enumerate(self.timers) if at <= until):
            at, number = due[0]
            self.now, function = max(at, self.now), self.timers.pop(number)[1]
            before = len(self.said)
            function()
            if pongs and len(self.said) > before:
                self.came.append(Pong(1))
                self.heard_at = self.now
        self.now = until


@pytest.fixture
def house(monkeypatch):
    return House(monkeypatch)


def test_an_agent_is_pinged_now_and_then_and_lives_by_its_pongs(house):
    house.heart.start()
    house.pass_time(10 * PING_INTERVAL, pongs=True)
    assert len(house.said) == 10 and all(isinstance(message, Ping) for message in house.said)
    assert not house.closed


def test_an_agent_without_a_pong_is_ended_in_time(house):
    house.heart.start()
    house.pass_time(PING_INTERVAL + PONG_TIMEOUT)
    assert not house.closed
    house.pass_time(BEAT)
    assert house.closed == [f"no pong in {PONG_TIMEOUT} s"]
    assert not house.timers


def test_an_agent_that_is_asked_answers_by_a_pong(house):
    since = house.heart.ask()
    house.pass_time(ANSWER_TIMEOUT / 2, pongs=True)
    assert house.heart.has_answered(since) and len(house.said) == 1
    house.pass_time(10 * ANSWER_TIMEOUT)
    assert not house.silent and not house.timers


def test_a_pong_from_before_the_question_is_no_answer(house):
    house.came.append(Pong(1))
    house.heart._take_pongs(house.now)
    house.now += 1
    since = house.heart.ask()
    assert not house.heart.has_answered(since)


def test_an_agent_that_does_not_answer_is_reported_once(house):
    house.heart.ask()
    house.heart.ask()  # a second claim, meanwhile
    house.pass_time(10 * ANSWER_TIMEOUT)
    assert house.silent == [f"its agent did not answer in {ANSWER_TIMEOUT} s"]
    assert len(house.said) == 1 and not house.timers


def test_bytes_of_late_count_as_an_answer_and_older_ones_do_not(house):
    since = house.heart.ask()
    house.heard_at = house.now + ANSWER_TIMEOUT - SIGN_OF_LIFE / 2
    house.pass_time(2 * ANSWER_TIMEOUT)
    assert house.heart.has_answered(since) and not house.silent
    house.heart.ask()
    house.heard_at = house.now + ANSWER_TIMEOUT - 2 * SIGN_OF_LIFE
    house.pass_time(2 * ANSWER_TIMEOUT)
    assert house.silent


def test_the_time_to_answer_begins_when_the_question_is_sent(house):
    house.heart.ask()
    house.now += 2 * ANSWER_TIMEOUT  # the demultiplexer was busy
    house.pass_time(ANSWER_TIMEOUT / 2)
    assert len(house.said) == 1 and not house.silent


def test_a_control_stream_that_is_over_ends_the_session(house):
    house.heart.start()
    house.came.append(SessionClosed)
    house.pass_time(BEAT)
    assert house.closed == ["the agent ended the control stream"]


@pytest.mark.parametrize("took", [0.0007, 0.03, 0.9, 4.0])
def test_the_round_trip_is_that_of_the_last_ping(house, took):
    house.heart.start()
    assert house.heart.round_trip is None
    house.pass_time(BEAT)
    assert len(house.said) == 1
    house.came.append(Pong(1))  # it comes after ``took`` seconds; a look before finds nothing
    house.heard_at = house.now + took
    reading, house.read = house.read, lambda: reading() if house.now >= house.heard_at else []
    house.heart._control.read = house.read
    house.pass_time(BEAT)
    assert house.heart.round_trip == pytest.approx(took)


def test_payload_that_comes_meanwhile_changes_the_round_trip_little(house):
    """heard_at is then of the payload; the looks bound by how much."""
    house.heart.start()
    house.pass_time(BEAT)
    sent_at = house.now

    def read():
        house.heard_at = house.now
        late = house.now - sent_at >= 0.1 and not house.closed
        return [Pong(1)] if late else []

    house.heart._control.read = read
    house.pass_time(1)
    assert 0.1 <= house.heart.round_trip < 0.2


def test_a_control_stream_that_breaks_during_a_look_ends_the_session(house):
    house.heart.start()
    house.pass_time(BEAT)
    house.came.append(SessionClosed)
    house.pass_time(1)
    assert house.closed == ["the agent ended the control stream"]
