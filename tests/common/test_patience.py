"""Patience with a peer, second by second."""

import pytest

from gotunnel_agent.common.patience import Patience


def test_silence_is_too_long_after_so_many_seconds():
    patience = Patience(10)
    for _ in range(9):
        patience.spend(1, 0)
    with pytest.raises(TimeoutError, match="nothing for 10 s"):
        patience.spend(1, 0)


def test_without_a_rate_any_byte_buys_all_time():
    patience = Patience(10)
    for _ in range(1000):
        patience.spend(9.9, 0)
        patience.spend(9.9, 1)


def test_a_trickle_is_too_slow_after_so_many_seconds_and_what_its_bytes_are_worth():
    patience = Patience(10, rate=100)
    for _ in range(12):
        patience.spend(1, 20)  # worth 0.2 s each
    with pytest.raises(TimeoutError, match="less than 100 bytes a second for 10 s"):
        patience.spend(1, 20)


def test_a_peer_at_the_rate_may_go_on_for_ever():
    patience = Patience(10, rate=100)
    for _ in range(10_000):
        patience.spend(1, 100)


def test_what_was_fast_is_no_credit_and_what_was_slow_is_made_up_for():
    patience = Patience(10, rate=100)
    patience.spend(0, 1_000_000)
    patience.spend(9, 1)
    patience.spend(0.5, 1000)
    patience.spend(9, 1)
    with pytest.raises(TimeoutError):
        patience.spend(9, 1)


def test_the_rate_is_asked_for_only_in_a_hurry():
    hurried = []
    patience = Patience(10, rate=100, hurry=lambda: bool(hurried))
    for _ in range(100):
        patience.spend(1, 1)
    hurried.append(True)
    with pytest.raises(TimeoutError):
        patience.spend(1, 1)


def test_a_peer_with_a_reason_has_all_its_time_again():
    patience = Patience(10, rate=100)
    for _ in range(3):
        patience.spend(9, 0)
        patience.restore()


def test_no_patience_is_none():
    with pytest.raises(TimeoutError):
        Patience(0).spend(0, 0)
