"""Failed attempts: what is free, what is slow, when an address is closed, what is remembered."""

import threading

import pytest

from gotunnel_server.agents.attempts import (
    CHECKS,
    CHECKS_A_SECOND,
    DELAY_STEP,
    FREE_FAILURES,
    MINUTE,
    MOST_ADDRESSES,
    MOST_DELAY,
    MOST_FAILURES,
    MOST_KNOWN,
    OPENINGS,
    OPENINGS_A_SECOND,
    Attempts,
)

GO_AGENT_COMES_BACK = 2  # seconds


class Clock:
    """A clock that stands until it is moved."""

    def __init__(self):
        self.now = 1000.0

    def __call__(self):
        return self.now


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def attempts(clock):
    return Attempts(clock)


def fail(attempts, address, times):
    for _ in range(times):
        attempts.failed(address)


def test_numbers_are_those_that_are_told():
    told = (FREE_FAILURES, DELAY_STEP, MOST_DELAY, MOST_FAILURES, MINUTE)
    assert told == (10, 0.25, 5.0, 120, 60)


@pytest.mark.parametrize(
    ("failures", "delay", "closed"),
    [
        (0, 0, False), (1, 0, False), (10, 0, False), (11, 0.25, False), (14, 1, False),
        (30, 5, False), (31, 5, False), (120, 5, False), (121, 5, True), (1000, 5, True),
    ],
)  # fmt: skip
def test_failures_are_free_then_slow_then_closed(attempts, failures, delay, closed):
    fail(attempts, "192.0.2.1", failures)
    assert (attempts.delay("192.0.2.1"), attempts.closed("192.0.2.1")) == (delay, closed)
    assert (attempts.delay("192.0.2.2"), attempts.closed("192.0.2.2")) == (0, False)


def test_all_is_forgotten_after_a_minute(attempts, clock):
    fail(attempts, "192.0.2.1", MOST_FAILURES + 1)
    clock.now += MINUTE - 0.1
    assert attempts.closed("192.0.2.1")
    clock.now += 0.1
    assert not attempts.closed("192.0.2.1") and attempts.delay("192.0.2.1") == 0
    attempts.failed("192.0.2.1")
    assert attempts.delay("192.0.2.1") == 0


@pytest.mark.parametrize("waits", [False, True], ids=["comes back at once", "waits for refusals"])
def test_go_agent_with_a_wrong_secret_does_not_close_its_address(attempts, clock, waits):
    slow = False
    for _ in range(1000):
        attempts.failed("192.0.2.1")
        assert not attempts.closed("192.0.2.1")
        slow |= attempts.delay("192.0.2.1") > 0
        clock.now += GO_AGENT_COMES_BACK + waits * attempts.delay("192.0.2.1")
    assert slow


def test_ten_go_agents_with_wrong_secrets_do_not_close_their_address(attempts, clock):
    due = [clock.now + number / 10 for number in range(10)]
    for _ in range(5000):
        clock.now = min(due)
        attempts.failed("192.0.2.1")
        assert not attempts.closed("192.0.2.1")
        back = clock.now + GO_AGENT_COMES_BACK + attempts.delay("192.0.2.1")
        due[due.index(clock.now)] = back


@pytest.mark.parametrize(
    ("failing", "same", "another"),
    [
        ("192.0.2.1", "::ffff:192.0.2.1", "192.0.2.2"),
        ("::ffff:192.0.2.1", "192.0.2.1", "::ffff:192.0.2.2"),
        ("2001:db8:1:2::1", "2001:db8:1:2:ffff::9", "2001:db8:1:3::1"),
        ("fe80::1%eth0", "fe80::2%eth0", "fe80:0:0:1::1"),
        ("::c000:201", "::1", "192.0.2.1"),
        ("no address", "no address", "another"),
    ],
)
def test_addresses_count_as_one_or_apart(attempts, failing, same, another):
    fail(attempts, failing, MOST_FAILURES + 1)
    assert attempts.closed(same) and not attempts.closed(another)


def test_table_is_bounded_and_who_failed_most_is_not_pushed_out(attempts):
    fail(attempts, "192.0.2.1", MOST_FAILURES + 1)
    fail(attempts, "192.0.2.2", FREE_FAILURES + 1)
    for number in range(3 * MOST_ADDRESSES):
        attempts.failed(f"2001:db8:{number:x}::1")
    assert attempts.closed("192.0.2.1") and attempts.delay("192.0.2.2") == DELAY_STEP
    assert len(attempts._counts) == MOST_ADDRESSES


def test_of_those_that_failed_more_than_once_the_coldest_goes(attempts):
    for number in range(MOST_ADDRESSES):
        fail(attempts, f"2001:db8:{number:x}::1", 3 if number == 7 else 12)
    attempts.failed("192.0.2.1")
    assert attempts.delay("2001:db8:6::1") > 0 == attempts.delay("2001:db8:7::1")
    assert len(attempts._counts) == MOST_ADDRESSES


def test_old_addresses_make_room_first(attempts, clock):
    for number in range(MOST_ADDRESSES):
        fail(attempts, f"2001:db8:{number:x}::1", 2)
    clock.now += MINUTE
    attempts.failed("192.0.2.1")
    assert len(attempts._counts) == 1


def count_true(function, *arguments):
    """How often in a row it says yes."""
    count = 0
    while function(*arguments):
        count += 1
        assert count < 10_000, "it says yes for ever"
    return count


@pytest.mark.parametrize(
    ("may", "at_once", "a_second"),
    [
        (lambda attempts: attempts.may_open("192.0.2.1"), OPENINGS, OPENINGS_A_SECOND),
        (lambda attempts: attempts.may_check("192.0.2.1", "x"), CHECKS, CHECKS_A_SECOND),
    ],
    ids=["handshakes", "tokens"],
)
def test_a_share_gets_in_at_a_closed_address_and_it_is_bounded(
    attempts, clock, may, at_once, a_second
):
    fail(attempts, "192.0.2.1", MOST_FAILURES)
    assert all(may(attempts) for _ in range(10 * at_once)), "it is not closed yet"
    attempts.failed("192.0.2.1")
    assert count_true(may, attempts) == at_once
    clock.now += 1
    assert count_true(may, attempts) == a_second


def test_an_agent_that_was_good_is_looked_at_until_it_is_not(attempts):
    attempts.proved("known")
    fail(attempts, "192.0.2.1", MOST_FAILURES + 1)
    assert count_true(attempts.may_check, "192.0.2.1", "other") == CHECKS
    assert all(attempts.may_check("192.0.2.1", "known") for _ in range(100))
    attempts.failed("192.0.2.1", "known")
    assert not attempts.may_check("192.0.2.1", "known")


def test_having_no_instance_is_no_pass(attempts):
    attempts.proved("")
    fail(attempts, "192.0.2.1", MOST_FAILURES + 1)
    assert count_true(attempts.may_check, "192.0.2.1", "") == CHECKS


def test_the_agents_that_were_good_are_bounded(attempts):
    for number in range(2 * MOST_KNOWN):
        attempts.proved(str(number))
    assert len(attempts._known) == MOST_KNOWN
    assert str(2 * MOST_KNOWN - 1) in attempts._known


def test_what_changes_for_an_address_is_told_once(attempts):
    told = [attempts.failed("192.0.2.1") for _ in range(200)]
    assert [number for number, news in enumerate(told, 1) if news] == [11, 121]
    assert "delayed" in told[10] and "TRUSTED_PROXIES" in told[120]


def test_threads_lose_no_failure(attempts):
    threads = [
        threading.Thread(target=fail, args=(attempts, "192.0.2.1", 1000), name=f"failing {number}")
        for number in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [failures for _, failures in attempts._counts.values()] == [4000]
