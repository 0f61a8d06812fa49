"""Token buckets: what they give by time, how many are remembered, what is undone."""

import random

import pytest

from gotunnel_agent.common.token_bucket import Buckets

HOUR, DAY = 3600, 86_400
NOW = 1_800_000_000.0  # a wall clock's


@pytest.mark.parametrize(
    ("rate", "burst"), [(10, 20), (0.5, 1), (1 / 3600, 3), (1000, 1), (7, 7), (0.3, 100)]
)
@pytest.mark.parametrize("start", [0.0, 12345.678, 1e7])
def test_bucket_never_gives_more_than_burst_and_rate_by_time(rate, burst, start):
    chance = random.Random(f"{rate} {burst}")
    buckets, now, given = Buckets(rate, burst), start, []
    for _ in range(3000):
        now += chance.choice([0, 0, 0.1, 1, burst]) * chance.random() / rate
        if not buckets.wait("a", now):
            buckets.take("a", now)
            given.append(now)
    assert len(given) > burst
    for _ in range(300):  # in each window of time, not only from the start
        first, last = sorted(chance.sample(range(len(given)), 2))
        elapsed = given[last] - given[first]
        assert last - first + 1 <= burst + rate * elapsed + 0.01


@pytest.mark.parametrize("start", [0.0, 12345.678, 1e7])
@pytest.mark.parametrize(("rate", "burst"), [(10, 5), (3, 100), (1 / 60, 2), (0.7, 1)])
def test_bucket_gives_the_whole_burst_then_one_each_time_that_it_says(rate, burst, start):
    buckets, now = Buckets(rate, burst), start
    for _ in range(3):
        for _ in range(burst):
            assert buckets.wait("a", now) == 0
            buckets.take("a", now)
        wait = buckets.wait("a", now)
        assert wait == pytest.approx(1 / rate, rel=0.01)
        assert buckets.wait("a", now + 0.9 * wait) > 0
        assert buckets.wait("a", now + wait + 1e-6) == 0
        now += burst / rate + 1e-6  # full again


def test_table_stays_bounded_under_many_addresses_and_all_of_them_get_in():
    buckets = Buckets(1, 5, most=4096)
    for number in range(100_000):
        now = number * 1e-6
        assert buckets.wait(number, now) == 0
        buckets.take(number, now)
        assert len(buckets._full_at) <= 4096
    assert len(buckets._queue) == len(buckets._full_at)


def test_many_addresses_do_not_clear_an_empty_bucket():
    buckets = Buckets(0.01, 5, most=64)
    for _ in range(5):
        buckets.take("attacker", 0)
    for number in range(100_000):
        buckets.take(number, 0)
    assert buckets.wait("attacker", 0) > 0


def test_only_as_many_others_that_are_as_empty_clear_a_bucket():
    buckets = Buckets(0.01, 5, most=64)
    for _ in range(3):
        buckets.take("attacker", 0)
    for _ in range(4):
        for number in range(63):
            buckets.take(number, 0)
    for number in range(1000):
        buckets.take(f"new {number}", 0)
    # These 63 buckets are emptier, so all new keys used the one other place in turn.
    assert all(buckets.wait(number, 0) == 0 for number in range(63))
    for number in range(63):
        buckets.take(number, 0)
    assert all(buckets.wait(number, 0) > 0 for number in range(63))


def test_table_shrinks_after_a_crowd():
    buckets = Buckets(10, 5, most=4096)
    for number in range(4096):
        buckets.take(number, 0)
    for number in range(5000):
        buckets.take("one", 100 + number)
        buckets.take(f"other {number}", 100 + number)
    assert len(buckets._full_at) < 10


def test_table_holds_what_a_simple_one_would():
    """Against a model without bound or heap, while there is room for all."""
    chance, buckets, model, now = random.Random(3), Buckets(2, 4), {}, 50.0
    for _ in range(20_000):
        now += chance.random() * 0.05
        key = chance.randrange(30)
        tokens, at = model.get(key, (4, now))
        tokens = min(4, tokens + (now - at) * 2)
        if abs(tokens - 1) < 0.01:
            continue  # too close: see the thousandth of a token in Buckets
        assert (buckets.wait(key, now) == 0) == (tokens >= 1)
        if tokens >= 1:
            buckets.take(key, now)
            tokens -= 1
        model[key] = tokens, now


def test_bucket_holds_an_hours_worth_and_survives_a_clock_that_steps_back():
    buckets = Buckets(2 / HOUR, 2)
    buckets.take("a", NOW)
    assert buckets.wait("a", NOW) == 0
    buckets.take("a", NOW)
    assert buckets.wait("a", NOW) == pytest.approx(1800, rel=0.001)
    buckets.shift(-DAY)
    assert buckets.wait("a", NOW - DAY) == pytest.approx(1800, rel=0.001)
    assert buckets.wait("a", NOW - DAY + 1800) == 0
    assert buckets.wait("a", NOW + DAY) == 0
    buckets.give_back("a")
    buckets.give_back("a")  # it was full already
    buckets.take("a", NOW + DAY)
    buckets.take("a", NOW + DAY)
    assert buckets.wait("a", NOW + DAY)


def test_token_that_is_given_back_can_be_taken():
    buckets = Buckets(1, 3)
    for _ in range(3):
        buckets.take("a", 0)
    assert buckets.wait("a", 0)
    buckets.give_back("a")
    buckets.give_back("other")  # forgotten, or never seen
    assert buckets.wait("a", 0) == 0
    buckets.take("a", 0)
    assert buckets.wait("a", 0) == pytest.approx(1, rel=0.001)


def test_clock_that_is_set_leaves_the_order_in_which_buckets_are_forgotten():
    buckets = Buckets(1, 5, most=3)
    for key in "abc":
        for _ in range("abc".index(key) + 1):
            buckets.take(key, 0)
    buckets.shift(-1000)
    buckets.take("d", -1000)  # in the place of a, the fullest
    assert set(buckets._full_at) == set("bcd")
