"""When an agent counts as alive. Time and the session are the test's."""

import types

import pytest

from gotunnel import Health, Ping, Pong, SessionClosed
from gotunnel_server.agents import heartbeat
from gotunnel_server.agents.heartbeat import (
    ANSWER_LOOK,
    ANSWER_TIMEOUT,
    BEAT,
    LISTEN,
    LISTEN_COST,
    PING_INTERVAL,
    PONG_TIMEOUT,
    SIGN_OF_LIFE,
    WATCH_PAUSE,
    WATCHED_TIMEOUT,
    Heartbeat,
)


class House:
    """A Heartbeat, and the session and control stream that it stands on."""

    def __init__(self, monkeypatch):
        self.now, self.said, self.came, self.silent, self.closed = 1000.0, [], [], [], []
        self.others = []  # messages beside pongs
        self.timers = []
        self.heard_at = self.now
        monkeypatch.setattr(heartbeat, "monotonic", lambda: self.now)
        say = self.said.append
        control = types.SimpleNamespace(read=self.read, send=say, tell=say)
        self.heart = Heartbeat(self, control, self.silent.append, self.others.extend)

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


# While another agent waits -----------------------------------------------------------------------


def test_watched_agent_is_asked_again_and_again(house):
    house.heart.watch(True)
    house.heart.watch(True)  # it is already
    house.pass_time(10 * WATCH_PAUSE, pongs=True)
    assert 7 <= len(house.said) <= 10 and not house.silent
    house.heart.watch(False)
    house.pass_time(WATCH_PAUSE, pongs=True)
    said = len(house.said)
    house.pass_time(10 * ANSWER_TIMEOUT, pongs=True)
    assert len(house.said) == said and not house.timers


def test_watched_agent_that_dies_is_reported_soon(house):
    house.heart.watch(True)
    house.pass_time(10, pongs=True)
    died = house.now
    house.pass_time(WATCH_PAUSE + WATCHED_TIMEOUT + 3 * ANSWER_LOOK)
    assert house.silent == [f"its agent did not answer in {WATCHED_TIMEOUT:g} s"]
    assert house.now - died < 3.5
    house.pass_time(60)
    assert len(house.silent) == 1


def test_agent_that_is_watched_again_is_asked_no_more_often(house):
    for _ in range(5):
        house.heart.watch(True)
        house.pass_time(WATCH_PAUSE / 3, pongs=True)
        house.heart.watch(False)
    house.heart.watch(True)
    house.pass_time(2 * WATCH_PAUSE, pongs=True)
    before = len(house.said)
    house.pass_time(10 * WATCH_PAUSE, pongs=True)
    assert len(house.said) - before <= 10


def test_claim_while_an_agent_is_watched_has_its_answer(house):
    house.heart.watch(True)
    house.pass_time(ANSWER_LOOK / 2)
    since = house.heart.ask()
    house.came.append(Pong(1))
    house.pass_time(2 * ANSWER_LOOK)
    assert house.heart.has_answered(since)


# Other messages ----------------------------------------------------------------------------------

ILL = Health("app.localhost", False, "503")


def test_other_messages_are_passed_on_soon_if_they_are_expected(house):
    house.heart.start(listens=True)
    house.came.append(ILL)
    house.heard_at = house.now + 0.01
    house.pass_time(LISTEN)
    assert house.others == [ILL]
    house.came += [Pong(1), ILL]
    house.pass_time(LISTEN)  # nothing was heard, so nothing is read
    assert house.others == [ILL]
    house.heard_at = house.now
    house.pass_time(LISTEN)
    assert house.others == [ILL, ILL]


def test_other_messages_come_with_the_pongs_otherwise(house):
    house.heart.start()
    house.came.append(ILL)
    house.heard_at = house.now + 0.01
    house.pass_time(BEAT - 0.1)
    assert not house.others
    house.pass_time(0.2)
    assert house.others == [ILL]


def test_flood_of_messages_is_read_slowly(house):
    house.heart.start(listens=True)
    house.heard_at = house.now + 0.01
    house.came += [ILL] * 3000
    house.pass_time(LISTEN)
    assert len(house.others) == 3000
    house.heard_at = house.now
    house.came.append(ILL)
    house.pass_time(min(BEAT, 3000 * LISTEN_COST) - 2 * LISTEN)
    assert len(house.others) == 3000
