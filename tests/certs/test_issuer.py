"""When certificates are ordered: the queue and the issuer, with a fake clock and a fake CA."""

import contextlib
import errno
import queue
import subprocess
import sys
import threading
import time

import pytest
from fake_ca import DAY, NOW, SILENCE, Clock, FakeCa, Mint, Proofs, problem
from issuer_house import APP, OTHER, URL, House, ScriptedCa, finish_jobs, jobs, refused
from pebble import Answers, pebble
from support import ROOT, TIMEOUT, wait_until

from gotunnel_server.certs import issuer as issuer_module
from gotunnel_server.certs.acme import Ca
from gotunnel_server.certs.acme_errors import (
    ACCOUNT,
    CONFIG,
    HOST,
    LATER,
    TRANSPORT,
    Abandoned,
)
from gotunnel_server.certs.folder import open_store
from gotunnel_server.certs.issuer import JOBS, Issuer
from gotunnel_server.certs.rate_limits import Bounds, Quota
from gotunnel_server.certs.schedule import (
    BACKOFF,
    HOUR,
    MINUTE,
    Window,
    ask_delay,
    renew_at,
    retry_delay,
)
from gotunnel_server.certs.state import FAILED, READY, WAITING, State
from gotunnel_server.certs.store import StoreError


@pytest.fixture
def house(tmp_path):
    with House(tmp_path) as house:
        yield house


# The timetable


@pytest.mark.parametrize("days, due", [(90, 60), (64, 42.67), (45, 30), (160 / 24, 80 / 24)])
def test_a_certificate_is_due_by_its_lifetime(days, due):
    for number in range(100):
        at = renew_at(f"h{number}.example.com", NOW, NOW + days * DAY)
        assert abs(at - NOW - due * DAY) <= days * DAY / 50 + DAY / 100


def test_hostnames_of_one_day_are_spread_and_each_stays_where_it_is():
    due = [renew_at(f"h{number}", NOW, NOW + 90 * DAY) for number in range(100)]
    assert max(due) - min(due) > 2 * DAY
    assert due == [renew_at(f"h{number}", NOW, NOW + 90 * DAY) for number in range(100)]


def test_the_cas_window_is_kept_to_and_a_twentieth_is_the_latest():
    window = Window(NOW + 10 * DAY, NOW + 20 * DAY)
    chosen = renew_at(APP, NOW, NOW + 90 * DAY, window)
    assert window.start_at <= chosen <= window.end_at
    moved = renew_at(APP, NOW, NOW + 90 * DAY, Window(NOW + 11 * DAY, NOW + 20 * DAY))
    assert moved != chosen
    late = renew_at(APP, NOW, NOW + 90 * DAY, Window(NOW + 89 * DAY, NOW + 99 * DAY))
    assert late == NOW + 85.5 * DAY


def test_retries_grow_and_differ_by_a_tenth_at_most():
    for failures, delay in enumerate([*BACKOFF, DAY, DAY], start=1):
        delays = {retry_delay(f"h{number}", failures) for number in range(50)}
        assert len(delays) == 50
        assert all(0.9 * delay <= each <= 1.1 * delay for each in delays)


def test_asking_again_has_bounds():
    assert [ask_delay(seconds) for seconds in (None, 5, 600, 10 * DAY)] == [
        6 * HOUR,
        MINUTE,
        600,
        DAY,
    ]


# Getting one, and keeping it


def test_a_wanted_hostname_gets_a_certificate(house):
    assert house.issuer.queue.want(APP).name == WAITING
    assert house.look() == [(APP, "http-01", None)]
    assert house.changed.get(timeout=TIMEOUT) == APP
    assert house.state().name == READY and house.state().ends_at == NOW + 90 * DAY
    assert house.issuer.queue.certificate(APP) == house.store.certificate(APP)
    house.issuer.queue.want(APP)
    assert house.look() == []


def test_a_restart_with_a_full_store_orders_nothing(house):
    house.issuer.queue.want(APP)
    house.look()
    house.restart()
    assert house.issuer.queue.want(APP).name == READY
    assert house.look() == []


def test_what_the_go_program_left_needs_no_order(house):
    (house.folder / "cache" / APP).write_bytes(b"".join(house.ca.mint.pair(APP)))
    assert house.issuer.queue.want(APP).name == READY
    assert house.look() == []


def test_an_expired_certificate_is_ordered_anew_at_once_and_served_meanwhile(house):
    house.store.save(APP, *house.ca.mint.pair(APP, NOW - 100 * DAY))
    assert house.issuer.queue.want(APP).name == WAITING
    assert house.issuer.queue.certificate(APP) is not None
    assert len(house.look()) == 1 and house.ca.asks == [house.issuer.queue.certificate(APP).leaf]


def lose(house):
    """The gateway ends, its certificate's file is removed, and it starts again."""
    house.file().unlink()
    house.restart()
    house.issuer.queue.want(APP)


def test_a_certificate_that_was_just_ordered_and_lost_is_ordered_anew_at_once(house):
    house.issuer.queue.want(APP)
    house.look()
    house.clock.now += MINUTE
    lose(house)
    assert house.state().name == WAITING
    assert len(house.look()) == 1 and house.state().name == READY


def test_a_cache_that_loses_all_again_and_again_is_not_fed(house):
    house.issuer.queue.want(APP)
    house.look()
    lose(house)
    house.look()
    lose(house)
    assert house.look() == []
    assert house.state().name == FAILED and "lost from ACME_CACHE" in house.state().reason
    assert len(house.at(DAY)) == 1 and house.state().name == READY
    house.restart()  # this one survives
    house.issuer.queue.want(APP)
    assert house.at(DAY + 7 * HOUR) == []
    lose(house)
    assert len(house.look()) == 1


def test_one_that_is_lost_long_after_its_order_is_ordered_anew_each_time(house):
    """As an operator may tidy up; that does not endanger the CA's weekly limit."""
    house.issuer.queue.want(APP)
    house.look()
    for day in (3, 20):
        house.clock.now = NOW + day * DAY
        lose(house)
        assert len(house.look()) == 1 and house.state().name == READY


@pytest.mark.parametrize("hours_left", [-1, 3])
def test_an_old_backup_in_the_place_of_a_new_one_is_replaced_at_once(house, hours_left):
    house.issuer.queue.want(APP)
    house.look()
    old = house.ca.mint.pair(APP, NOW - 90 * DAY + hours_left * HOUR, 90 * DAY)
    house.file().write_bytes(b"".join(old))
    house.restart()
    house.issuer.queue.want(APP)
    assert len(house.look()) == 1 and house.state().ends_at == NOW + 90 * DAY


def test_what_cannot_be_read_is_said_and_the_hostname_is_wanted_all_the_same(
    house, monkeypatch, caplog
):
    def fail(hostname):
        raise StoreError("x.json: no descriptor")

    with monkeypatch.context() as patch:
        patch.setattr(house.store, "state", fail)
        patch.setattr(house.store, "certificate", fail)
        house.issuer.queue.want(APP)
        assert caplog.text.count("no descriptor") == 2
        assert house.look() == []  # or it would be ordered again, though it is good
    assert house.state().name == FAILED and "no descriptor" in house.state().reason
    assert len(house.at(2 * MINUTE)) == 1 and house.state().name == READY


def test_nothing_is_ordered_that_could_not_be_kept(house, monkeypatch):
    def full():
        raise StoreError("certs: No space left on device; make room")

    house.issuer.queue.want(APP)
    with monkeypatch.context() as patch:
        patch.setattr(house.store, "make_sure_of_room", full)
        for seconds in (0, 10, 3600):
            assert house.at(seconds) == []
    assert house.store.state(APP).get("failures", 0) == 0
    assert house.state().name == FAILED and "No space left" in house.state().reason
    assert len(house.at(3600 + 700)) == 1


@pytest.mark.parametrize("method", ["lock", "certificate"])
def test_a_cache_that_cannot_be_used_for_hours_is_no_hostnames_fault(house, monkeypatch, method):
    def fail(hostname):
        raise StoreError(f"{hostname}.pem: too many open files")

    for hostname in (APP, OTHER):
        house.issuer.queue.want(hostname)
    with monkeypatch.context() as patch:
        patch.setattr(house.store, method, fail)
        for hour in range(5):
            assert house.at(hour * HOUR) == []
        assert "too many open files" in house.state().reason
    assert len(house.at(4 * HOUR + 61)) == 2


def test_one_that_has_run_out_and_is_found_late_is_ordered_anew(house, monkeypatch):
    """The store could not be read at first, and then had an old one."""

    def fail(hostname):
        raise StoreError(f"{hostname}.pem: too many open files")

    old = house.ca.mint.pair(APP, NOW - 100 * DAY, 90 * DAY)
    house.store.save(APP, *old)
    with monkeypatch.context() as patch:
        patch.setattr(house.store, "certificate", fail)
        house.issuer.queue.want(APP)
    assert len(house.look()) == 1 and house.state().name == READY


def test_who_finds_another_process_at_it_takes_no_turn(tmp_path):
    with House(tmp_path, orders_per_hour=3) as house:
        house.issuer.queue.want(APP)
        with open_store(tmp_path / "cache", URL).lock(APP) as ours:
            assert ours
            for number in range(20):
                assert house.at(number * 6) == []
        for number in range(3):
            house.issuer.queue.want(f"h{number}.example.com")
        assert len(house.at(20 * 6)) == 3


def test_a_cache_that_cannot_be_written_is_no_hostnames_fault(house, monkeypatch):
    def refuse(path, content):
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    house.issuer.queue.want(APP)
    with monkeypatch.context() as patch:
        patch.setattr(house.store._storage, "write", refuse)
        assert house.look() == house.at(3600) == []
    assert "Permission denied; make room" in house.state().reason
    assert len(house.at(3600 + 700)) == 1  # at once, not after the delay of three failures


def test_a_broken_file_is_ordered_anew(house):
    house.store.save(APP, *house.ca.mint.pair(APP))
    house.file().write_bytes(b"garbage")
    assert house.issuer.queue.want(APP).name == WAITING
    assert len(house.look()) == 1 and house.state().name == READY


def test_renewal_replaces_the_old_one_and_keeps_the_challenge(house):
    house.ca.script = [refused()]
    house.issuer.queue.want(APP)
    house.look()
    assert house.at(70) == [(APP, "tls-alpn-01", None)]
    first = house.issuer.queue.certificate(APP)
    assert house.at(57 * DAY) == []
    assert house.at(63 * DAY) == [(APP, "tls-alpn-01", first.leaf)]
    assert house.issuer.queue.certificate(APP).ends_at == NOW + 153 * DAY
    house.restart()
    house.issuer.queue.want(APP)
    assert house.at(130 * DAY)[0][:2] == (APP, "tls-alpn-01")


def test_a_failed_renewal_keeps_the_certificate_past_its_end(house):
    house.issuer.queue.want(APP)
    house.look()
    kept = house.issuer.queue.certificate(APP)
    house.ca.script = [refused()] * 100
    house.at(63 * DAY)
    assert house.state().name == READY and "the CA's words" in house.state().reason
    house.at(91 * DAY)
    assert house.state().name == FAILED and house.issuer.queue.certificate(APP) == kept


def test_a_clock_that_jumps_ahead_makes_due(house):
    house.issuer.queue.want(APP)
    house.look()
    assert len(house.at(400 * DAY)) == 1
    assert house.state().name == READY


def test_a_clock_that_was_set_back_delays_nobody_for_ever(house):
    house.clock.now = NOW + 1000 * DAY
    house.ca.script = [refused(), refused(ACCOUNT, retry_after=HOUR)]
    house.issuer.queue.want(APP)
    house.look()
    house.issuer.queue.want(OTHER)
    house.look()
    house.at(0)
    assert {name for name, _, _ in house.at(1.2 * DAY)} == {APP, OTHER}


def test_a_clock_that_was_set_back_lengthens_no_wait_for_a_turn(tmp_path):
    with House(tmp_path, orders_per_hour=3) as house:  # of which two are one agent's
        for hostname in (APP, OTHER):
            house.issuer.queue.want(hostname, "agent")
        assert len(house.look()) == 2
        assert house.at(-DAY) == []  # the issuer notices the step
        house.issuer.queue.want("third.example.com", "agent")
        assert house.look() == []
        assert [name for name, _, _ in house.at(HOUR / 2 - DAY)] == ["third.example.com"]


# Windows


def test_the_cas_window_is_asked_for_and_kept(house):
    house.ca.window = Window(NOW + 10 * DAY, NOW + 20 * DAY)
    house.issuer.queue.want(APP)
    house.look()
    chosen = house.state().next_at
    assert NOW + 10 * DAY <= chosen <= NOW + 20 * DAY
    house.at(7 * HOUR)
    asks = len(house.ca.asks)
    house.restart()
    house.issuer.queue.want(APP)
    assert house.state().next_at == chosen
    house.look()
    assert len(house.ca.asks) == asks == 2


def test_an_error_of_ours_over_the_window_is_not_repeated_at_once(house, monkeypatch):
    asked = []

    def fail(leaf, stop):
        asked.append(leaf)
        raise OverflowError("a defect")

    monkeypatch.setattr(house.ca, "renewal_info", fail)
    house.issuer.queue.want(APP)
    for seconds in (0, 1, HOUR):
        house.at(seconds)
    assert len(asked) == 1


def test_a_window_in_the_past_renews_now_but_not_in_a_loop(house):
    house.ca.window = Window(NOW - 2, NOW - 1)
    house.issuer.queue.want(APP)
    assert len(house.look()) == 1
    assert house.at(HOUR) == []  # it is an hour old
    ((_, _, replaces),) = house.at(25 * HOUR)
    assert replaces is not None
    assert len(house.at(26 * HOUR)) == 0


def test_a_window_that_cannot_be_had_leaves_the_last_one(house):
    house.ca.window = Window(NOW + 10 * DAY, NOW + 20 * DAY)
    house.issuer.queue.want(APP)
    house.look()
    chosen = house.state().next_at
    house.ca.window = None
    house.at(7 * HOUR)
    assert house.state().next_at == chosen


# Failures


def test_failures_of_a_host_are_repeated_ever_later_and_over_a_restart(house):
    house.ca.script = [refused()] * 7
    house.issuer.queue.want(APP)
    now, challenges = 0.0, []
    for delay in [0, *BACKOFF, DAY, DAY]:
        assert house.at(now + 0.89 * delay) == [] or delay == 0
        if delay:
            now += 1.11 * delay
            house.restart()
            house.issuer.queue.want(APP)
            ((_, challenge, _),) = house.at(now)
        else:
            house.restart()
            house.issuer.queue.want(APP)
            challenge = "http-01"
            house.look()
        challenges.append(challenge)
    assert challenges == ["http-01", "tls-alpn-01"] * 3 + ["http-01"]
    assert house.state().name == FAILED
    assert str(house.state()).startswith("failed: https://ca.example/x: code: the CA's words (next")


def test_retry_now_makes_one_attempt(house):
    house.ca.script = [refused(), refused()]
    house.issuer.queue.want(APP)
    house.look()
    assert house.look() == []
    assert house.issuer.queue.retry_now(APP)
    assert len(house.look()) == 1 and house.look() == []
    assert not house.issuer.queue.retry_now(OTHER)


def test_retry_now_renews_a_certificate_that_is_new(house):
    house.issuer.queue.want(APP)
    house.look()
    house.issuer.queue.retry_now(APP)
    assert len(house.look()) == 1 and house.look() == []


def in_flight(house, hostname, ends):
    """Begin an order that waits for the event that is returned, and then ends with ``ends``."""
    go_on = threading.Event()

    def wait(stop):
        assert go_on.wait(TIMEOUT)
        if ends:
            raise ends

    house.ca.script.insert(0, wait)
    house.issuer.queue.want(hostname)
    house.issuer.look()
    house.ca.orders.get(timeout=TIMEOUT)
    return go_on


@pytest.mark.parametrize(
    "ends, orders",
    [(None, 0), (refused(), 1), (refused(CONFIG), 1), (refused(ACCOUNT, retry_after=60), 0)],
)
def test_retry_now_while_an_order_is_in_flight_is_another_one_if_that_fails(house, ends, orders):
    house.ca.script = [refused()] * 3
    go_on = in_flight(house, APP, ends)
    assert house.issuer.queue.retry_now(APP) and house.issuer.queue.retry_now(APP)
    go_on.set()
    assert len(house.look()) == orders
    assert house.look() == []


def test_retry_now_is_not_lost_while_the_cas_window_is_asked_for(house):
    house.issuer.queue.want(APP)
    house.look()
    asked, go_on = threading.Event(), threading.Event()

    def renewal_info(leaf, stop):
        asked.set()
        assert go_on.wait(TIMEOUT)
        return Window(NOW + 10 * DAY, NOW + 20 * DAY), 6 * HOUR

    house.ca.renewal_info = renewal_info
    house.clock.now += 7 * HOUR
    house.issuer.look()
    assert asked.wait(TIMEOUT)
    house.issuer.queue.retry_now(APP)
    go_on.set()
    assert len(house.look()) == 1


def test_retry_now_is_not_lost_while_another_process_has_the_hostname(house):
    house.issuer.queue.want(APP)
    house.look()
    with house.store.lock(APP):
        house.issuer.queue.retry_now(APP)
        assert house.look() == []
    assert len(house.at(6)) == 1


def test_retry_now_without_a_cache_is_one_attempt(house, monkeypatch):
    def fail(hostname):
        raise StoreError("no descriptor")

    house.issuer.queue.want(APP)
    with monkeypatch.context() as patch:
        patch.setattr(house.store, "lock", fail)
        house.issuer.queue.retry_now(APP)
        house.look()
    assert house.state().name == FAILED and "no descriptor" in house.state().reason
    assert house.state().next_at > NOW


def test_a_failure_of_one_host_holds_up_no_other(house):
    house.ca.script = [refused()]
    house.issuer.queue.want(APP)
    house.look()
    house.issuer.queue.want(OTHER)
    assert len(house.look()) == 1 and house.state(OTHER).name == READY


def test_a_rate_limit_of_the_account_holds_up_all_and_blames_nobody(house):
    house.issuer.queue.want("old.example.com")
    house.look()
    house.ca.script = [refused(ACCOUNT, retry_after=3600)]
    house.issuer.queue.want(APP)
    house.look()
    house.issuer.queue.want(OTHER)
    assert house.at(3599) == []
    assert house.state(OTHER).name == FAILED and "the CA's words" in house.state(OTHER).reason
    assert house.state("old.example.com").name == READY
    assert {order[:2] for order in house.at(3601)} == {(APP, "http-01"), (OTHER, "http-01")}
    assert house.state(OTHER).name == READY


def test_who_waits_for_the_account_is_told_why(house):
    go_on = threading.Event()

    def refuse(stop):
        assert go_on.wait(TIMEOUT)
        raise refused(ACCOUNT, status=429, retry_after=3600)

    house.ca.script = [refuse]
    house.issuer.queue.want(APP)
    house.issuer.look()
    house.store.save("old.example.com", *house.ca.mint.pair("old.example.com"))
    house.issuer.queue.want("old.example.com")
    house.issuer.queue.want(OTHER)
    go_on.set()
    finish_jobs()
    assert {house.changed.get(timeout=TIMEOUT) for _ in range(2)} == {APP, OTHER}
    assert house.changed.empty()
    assert "the CA's words (next attempt 2027-01-15 09:00 UTC)" in str(house.state(OTHER))


def test_a_pause_for_the_same_reason_as_an_earlier_one_is_told_again(house):
    for name in (APP, "third.example.com"):
        house.ca.script = [refused(ACCOUNT, status=429, retry_after=60)]
        house.issuer.queue.want(name)
        house.look()
        assert house.at((house.clock.now - NOW) + 61)
    while not house.changed.empty():
        house.changed.get()
    go_on = in_flight(house, "fourth.example.com", refused(ACCOUNT, status=429, retry_after=60))
    house.issuer.queue.want(OTHER)
    go_on.set()
    finish_jobs()
    told = {house.changed.get(timeout=TIMEOUT) for _ in range(2)}
    assert told == {"fourth.example.com", OTHER}


def told(house):
    """The calls of on_change() since the last call of this."""
    names = []
    while not house.changed.empty():
        names.append(house.changed.get())
    return names


def test_who_waits_for_its_own_retry_hears_of_a_longer_pause(house):
    house.ca.script = [refused(HOST), refused(ACCOUNT, status=429, retry_after=3600)]
    for hostname in (APP, OTHER):
        house.issuer.queue.want(hostname)
        house.look()
    assert house.state(APP).next_at >= NOW + 3600


def test_failures_at_one_moment_tell_those_who_wait_once(house):
    go_on = [
        in_flight(
            house, f"h{number}.example.com", refused(ACCOUNT, status=429, retry_after=3600)
        )  # fmt: skip
        for number in range(JOBS)
    ]
    for number in range(JOBS, 2 * JOBS):
        house.issuer.queue.want(f"h{number}.example.com")
    for event in go_on:
        event.set()
    finish_jobs()
    assert sorted(told(house)) == [f"h{number}.example.com" for number in range(2 * JOBS)]


def test_who_came_between_two_pauses_is_told_of_the_second_although_it_is_as_the_first(house):
    house.ca.script = [refused(TRANSPORT)] * 100
    house.issuer.queue.want(APP)
    house.look()
    house.clock.now += 60  # the pause is over, but the issuer has not looked yet
    names = {f"n{number}.example.com" for number in range(20)}
    assert {house.issuer.queue.want(name).name for name in names} == {WAITING}
    told(house)
    house.look()
    assert {house.state(name).name for name in names} == {FAILED} and set(told(house)) >= names


def test_an_outage_is_told_once_however_often_the_ca_is_tried(house):
    house.ca.script = [refused(TRANSPORT)] * 100
    names = {f"n{number}.example.com" for number in range(3 * JOBS)}
    for name in names:
        house.issuer.queue.want(name)
    house.issuer.start()
    wait_until(lambda: {house.state(name).name for name in names} == {FAILED} and not jobs())
    assert sorted(told(house)) == sorted(names)
    for _ in range(3):
        house.clock.now += 700
        house.issuer.look()
        wait_until(lambda: not jobs() and house.state(min(names)).name == FAILED)
    assert told(house) == []


def test_who_asked_while_it_waited_is_told_of_the_next_failure_although_it_is_as_the_last(house):
    """The hostname may have another agent now, which was told nothing yet."""
    house.ca.script = [refused(TRANSPORT)] * 3
    house.issuer.queue.want(APP)
    house.look()
    assert told(house) == [APP] and house.issuer.queue.want(OTHER).name == FAILED
    house.clock.now += 700
    assert house.issuer.queue.want(OTHER).name == WAITING
    house.look()
    assert told(house) == [OTHER]


def test_a_certificate_that_runs_out_while_its_renewal_fails_is_told(house):
    house.issuer.queue.want(APP)
    house.look()
    house.ca.script = [refused()] * 1000
    house.issuer.start()
    for day in range(55, 90):
        house.at(day * DAY)
    assert house.state().name == READY
    wait_until(lambda: not jobs())
    told(house)
    house.clock.now = NOW + 90 * DAY + 1
    house.issuer.look()
    assert house.changed.get(timeout=TIMEOUT) == APP and house.state().name == FAILED


def test_a_pause_by_a_clock_far_ahead_delays_nobody_after_a_restart(house):
    house.clock.now = NOW + 365 * DAY
    house.ca.script = [refused(ACCOUNT, status=429, retry_after=3600)]
    house.issuer.queue.want(APP)
    house.look()
    house.clock.now = NOW
    house.restart()
    house.issuer.start()
    house.issuer.queue.want(APP)
    wait_until(lambda: house.state().name == READY)


def test_a_pause_that_comes_after_the_clock_was_set_back_is_kept(house):
    house.clock.now = NOW + 365 * DAY
    go_on = in_flight(house, APP, refused(ACCOUNT, status=429, retry_after=3600))
    house.clock.now = NOW
    go_on.set()
    finish_jobs()
    house.look()
    house.issuer.queue.want(OTHER)
    assert house.at(60) == []


def test_a_pause_lasts_as_long_as_it_was_said_if_the_clock_is_set_right_meanwhile(house):
    house.clock.now = NOW + 365 * DAY
    house.ca.script = [refused(ACCOUNT, retry_after=3600)]
    house.issuer.queue.want(APP)
    house.look()
    house.clock.now += 600
    house.look()
    assert house.at(0) == [] == house.at(2900)
    assert len(house.at(3100)) == 1


def test_a_pause_of_the_account_outlasts_a_restart(house):
    house.ca.script = [refused(ACCOUNT, status=429, retry_after=3600)]
    house.issuer.queue.want(APP)
    assert len(house.look()) == 1
    house.restart()
    house.issuer.start()
    state = house.issuer.queue.want(OTHER)
    assert (state.name, state.next_at) == (FAILED, NOW + 3600) and "the CA's words" in state.reason
    house.issuer.queue.want(APP)
    assert house.at(3599) == []
    house.at(3601)
    wait_until(lambda: house.state().name == house.state(OTHER).name == READY)


@pytest.mark.parametrize(
    "error",
    [
        refused(CONFIG, status=403, account_wide=True),
        refused(ACCOUNT, retry_after=3600),
        refused(TRANSPORT, status=500),
    ],
    ids=["settings", "our clock", "outage"],
)
def test_a_pause_that_a_restart_may_mend_does_not_outlast_it(house, error):
    house.ca.script = [error]
    house.issuer.queue.want(APP)
    house.look()
    house.restart()
    house.issuer.start()
    house.issuer.queue.want(OTHER)
    wait_until(lambda: house.state(OTHER).name == READY)


@pytest.mark.parametrize(
    "pause",
    [{"until": "x", "reason": []}, {"until": 1e300}, {"until": NOW + 1000 * DAY, "reason": {}}],
)
def test_a_kept_pause_that_makes_no_sense_holds_up_nobody_for_long(house, pause):
    house.store.save_pause(pause)
    house.issuer.start()
    house.issuer.queue.want(APP)
    house.at(0)
    house.at(1.2 * DAY)
    wait_until(lambda: house.state().name == READY)


def test_retry_now_ends_the_pause_for_good(house):
    house.ca.script = [refused(ACCOUNT, status=429, retry_after=3600)]
    house.issuer.queue.want(APP)
    house.look()
    house.issuer.queue.retry_now(APP)
    assert len(house.look()) == 1 and house.state().name == READY
    assert house.store.pause() == {}


def test_what_the_operator_must_change_waits_for_a_day(house):
    house.ca.script = [refused(CONFIG)]
    house.issuer.queue.want(APP)
    house.look()
    house.issuer.queue.want(OTHER)
    assert len(house.look()) == 1  # the other may fare better
    assert house.at(0.99 * DAY) == [] and len(house.at(1.01 * DAY)) == 1


def test_an_account_that_cannot_be_had_stops_all_for_a_day(house):
    house.ca.script = [refused(CONFIG, account_wide=True)]
    house.issuer.queue.want(APP)
    house.look()
    house.issuer.queue.want(OTHER)
    assert house.at(0.99 * DAY) == [] and len(house.at(1.01 * DAY)) == 2


def test_a_ca_that_is_down_pauses_all_ever_longer_and_blames_nobody(house):
    house.ca.script = [refused(TRANSPORT)] * 4
    house.issuer.queue.want(APP)
    assert len(house.look()) == 1
    now = 0.0
    for pause in (5, 10, 20):
        assert house.at(now + 0.99 * pause) == []
        now += pause
        assert house.at(now) == [(APP, "http-01", None)]
    assert house.store.state(APP)["failures"] == 0
    assert len(house.at(now + 40)) == 1 and house.state().name == READY


def test_no_challenge_to_offer_is_the_operators(tmp_path):
    proofs = Proofs()
    proofs.types = ()
    with House(tmp_path, proofs) as house:
        house.issuer.queue.want(APP)
        assert house.look() == [] and "HTTP_PORT" in house.state().reason


def test_only_types_that_can_be_published_are_used(tmp_path):
    with House(tmp_path, Proofs("tls-alpn-01")) as house:
        house.ca.script = [refused()]
        house.issuer.queue.want(APP)
        assert [*house.look(), *house.at(70)] == [(APP, "tls-alpn-01", None)] * 2


def test_a_certificate_that_is_not_ours_is_refused(house):
    house.ca.mint.pair, pair = lambda hostname, *more: pair(OTHER, *more), house.ca.mint.pair
    house.issuer.queue.want(APP)
    house.look()
    assert house.state().name == FAILED and OTHER in house.state().reason
    # The CA has counted the certificate: not an outage, which would be retried every minute.
    assert house.store.state(APP)["failures"] == 1


def test_an_error_of_ours_ends_one_attempt_only(house, caplog):
    house.ca.script = [RuntimeError("a bug")]
    house.issuer.queue.want(APP)
    house.look()
    assert "a bug" in house.state().reason and "a bug" in caplog.text
    assert len(house.at(70)) == 1 and house.state().name == READY


@pytest.mark.parametrize(
    "state",
    [
        {"failures": "x", "next_attempt_at": None, "window": [1], "challenge": 5, "error": []},
        {"failures": -1, "next_attempt_at": 1e300, "window": [1, "x"], "window_of": "zz"},
        {"failures": True, "next_attempt_at": float("nan"), "window": 5, "window_of": 5},
    ],
)
def test_a_state_that_makes_no_sense_is_none(house, state):
    house.store.save_state(APP, state)
    house.issuer.queue.want(APP)
    assert len(house.look()) == 1 and house.state().name == READY


# Bounds


def test_few_orders_are_in_flight_and_a_silent_one_delays_no_other(house):
    go_on = threading.Event()
    house.ca.script = [lambda stop: go_on.wait(TIMEOUT)] * (JOBS - 1)
    for number in range(JOBS + 5):
        house.issuer.queue.want(f"h{number}.example.com")
    house.issuer.start()
    try:
        wait_until(
            lambda: (
                sum(
                    house.state(f"h{number}.example.com").name == READY
                    for number in range(JOBS + 5)
                )
                == 6
            )
        )  # all but those that hang
        wait_until(lambda: len(jobs()) == JOBS - 1)
    finally:
        go_on.set()


def test_never_more_jobs_than_allowed(house):
    go_on, running = threading.Event(), threading.Semaphore(0)

    def hang(stop):
        running.release()
        go_on.wait(TIMEOUT)

    house.ca.script = [hang] * 50
    for number in range(20):
        house.issuer.queue.want(f"h{number}.example.com")
    house.issuer.look()
    for _ in range(JOBS):
        assert running.acquire(timeout=TIMEOUT)
    house.issuer.look()
    assert len(jobs()) == JOBS
    go_on.set()


def test_orders_an_hour_are_bounded(tmp_path):
    with House(tmp_path, orders_per_hour=3) as house:
        for number in range(5):
            house.issuer.queue.want(f"h{number}.example.com")
        assert len(house.look()) == 3
        waiting = house.state("h4.example.com")
        assert waiting.name == FAILED and "waits for its turn" in waiting.reason
        assert waiting.next_at > NOW
        assert len(house.at(20 * MINUTE + 1)) == 1
        assert len(house.at(40 * MINUTE + 2)) == 1


def test_who_waits_for_its_turn_is_told_once_and_can_be_asked_for(tmp_path):
    with House(tmp_path, orders_per_hour=1) as house:
        for hostname in (OTHER, APP):
            house.issuer.queue.want(hostname)
        house.issuer.start()
        assert {house.changed.get(timeout=TIMEOUT) for _ in range(2)} == {APP, OTHER}
        assert house.state().name == FAILED
        assert house.store.state(APP)["turn_why"] in house.state().reason
        house.issuer.queue.retry_now(APP)
        assert house.changed.get(timeout=TIMEOUT) == APP
        assert house.state().name == READY and house.state().reason == ""
        assert house.changed.empty()


def test_a_resolver_that_is_down_costs_no_turn_and_no_failure(tmp_path):
    down = [True]

    def look_up(hostname):
        if down:
            raise refused(LATER, retry_after=300)

    with House(tmp_path, orders_per_hour=2, look_up=look_up) as house:
        house.issuer.queue.want(APP)
        for number in range(8):
            assert house.at(number * 301) == []
        assert house.state().name == FAILED and house.store.state(APP)["failures"] == 0
        down.clear()
        house.issuer.queue.want(OTHER)
        assert len(house.at(8 * 301)) == 2


def test_who_took_no_turn_gives_none_back(tmp_path):
    """An order that the operator asks for does not wait for the hour's tokens."""
    down = {APP}

    def look_up(hostname):
        if hostname in down:
            raise refused(LATER, retry_after=300)

    with House(tmp_path, orders_per_hour=2, look_up=look_up) as house:
        house.issuer.queue.want(OTHER)
        assert len(house.look()) == 1
        house.issuer.queue.want(APP)
        for _ in range(3):
            house.issuer.queue.retry_now(APP)
            assert house.look() == []
        for number in range(3):
            house.issuer.queue.want(f"h{number}.example.com")
        assert len(house.look()) == 1


def test_no_window_is_asked_for_while_a_first_order_waits(house):
    go_on = threading.Event()
    house.ca.renewal_info = lambda leaf, stop: (go_on.wait(TIMEOUT), (None, 6 * HOUR))[1]
    for number in range(2 * JOBS):
        house.store.save(f"h{number}.example.com", *house.ca.mint.pair(f"h{number}.example.com"))
        house.issuer.queue.want(f"h{number}.example.com")
    house.issuer.queue.want(OTHER)
    try:
        house.issuer.look()
        wait_until(lambda: house.state(OTHER).name == READY)
    finally:
        go_on.set()
    house.look()


def test_a_clock_far_ahead_is_no_reason_to_order_in_a_loop(house, monkeypatch):
    """By our clock the CA's certificates have run out; our rate limits do not delay renewals."""
    monkeypatch.setattr(house.ca, "clock", lambda: NOW - 100 * DAY)
    house.issuer.queue.want(APP)
    for _ in range(5):
        house.issuer.look()
        finish_jobs()
    assert len(house.ca.ordered()) == 1


def test_a_first_order_waits_for_no_window(house):
    """An order that hangs takes a minute."""
    go_on, asked = threading.Event(), threading.Semaphore(0)

    def hang(leaf, stop):
        asked.release()
        go_on.wait(TIMEOUT)
        return None, 6 * HOUR

    house.ca.renewal_info = hang
    for number in range(2 * JOBS):
        hostname = f"h{number}.example.com"
        house.store.save(hostname, *house.ca.mint.pair(hostname, NOW))
        house.issuer.queue.want(hostname)
    house.issuer.look()
    assert asked.acquire(timeout=TIMEOUT)
    house.issuer.queue.want(APP)
    try:
        house.issuer.look()
        assert house.changed.get(timeout=5) == APP
    finally:
        go_on.set()
    house.look()


def test_a_renewal_settles_an_earlier_loss(house):
    house.issuer.queue.want(APP)
    house.look()
    lose(house)
    house.look()
    assert len(house.at(80 * DAY)) == 1
    lose(house)
    assert house.state().reason == ""


def test_whose_turn_has_come_waits_like_anybody(tmp_path):
    """Visitors of a hostname that has failed are refused at once."""
    runs, go_on = threading.Event(), threading.Event()

    def hang(stop):
        runs.set()
        go_on.wait(TIMEOUT)

    with House(tmp_path, orders_per_hour=1) as house:
        for hostname in (OTHER, APP):
            house.issuer.queue.want(hostname)
        house.look()
        assert house.state().name == FAILED
        house.ca.script = [hang]
        house.clock.now += HOUR
        try:
            house.issuer.look()
            assert runs.wait(TIMEOUT) and house.state().name == WAITING
        finally:
            go_on.set()
            house.look()


def test_a_renewal_waits_for_no_new_names(house):
    go_on, running = threading.Event(), threading.Semaphore(0)

    def hang(stop):
        running.release()
        go_on.wait(TIMEOUT)

    house.issuer.queue.want(APP)
    house.look()
    house.ca.script = [hang] * JOBS
    for number in range(JOBS + 1):
        house.issuer.queue.want(f"h{number}.example.com")
    try:
        house.issuer.look()
        for _ in range(JOBS):
            assert running.acquire(timeout=TIMEOUT)
        serial = house.issuer.queue.certificate(APP).leaf.serial_number
        house.clock.now += 80 * DAY
        house.issuer.look()
        wait_until(lambda: house.issuer.queue.certificate(APP).leaf.serial_number != serial)
    finally:
        go_on.set()
    house.look()


def test_one_agent_cannot_take_the_others_orders(tmp_path):
    with House(tmp_path, orders_per_agent=2) as house:
        for number in range(5):
            house.issuer.queue.want(f"h{number}.example.com", "greedy")
        house.issuer.queue.want(APP, "modest")
        ordered = {name for name, _, _ in house.look()}
        assert len(ordered) == 3 and APP in ordered
        assert len(house.at(31 * MINUTE)) == 1


def test_renewals_are_held_up_by_no_bound(tmp_path):
    """However short their lifetimes are, and whatever else is ordered."""
    house = House(tmp_path, orders_per_agent=1, orders_per_hour=1)
    house.issuer.queue.want("new.example.com", "agent")
    house.look()
    for name in (APP, OTHER):
        house.store.save(name, *house.ca.mint.pair(name, NOW - 80 * DAY))
        house.issuer.queue.want(name, "agent")
    assert len(house.look()) == 2
    house.issuer.stop()


# Given up, and several processes


def test_a_dropped_hostname_is_not_renewed(house):
    house.issuer.queue.want(APP)
    house.look()
    house.issuer.queue.drop(APP)
    house.issuer.queue.drop(APP)
    assert house.state() is None and house.at(80 * DAY) == []
    house.at(1 * DAY)
    assert house.issuer.queue.want(APP).name == READY  # from the store


def test_a_dropped_hostname_ends_its_order(house):
    def hang(stop):
        assert stop.wait(TIMEOUT)
        raise Abandoned

    house.ca.script = [hang]
    house.issuer.queue.want(APP)
    house.issuer.look()
    house.ca.orders.get(timeout=TIMEOUT)
    house.issuer.queue.drop(APP)
    house.look()
    assert house.changed.empty() and house.store.state(APP) == {}


def test_a_hostname_that_another_process_orders_is_taken_from_it(house):
    with house.store.lock(APP):
        house.issuer.queue.want(APP)
        assert house.look() == []
        theirs = open_store(house.folder / "cache", URL).save(APP, *house.ca.mint.pair(APP))
    assert house.at(6) == [] and house.issuer.queue.certificate(APP) == theirs
    assert house.changed.get(timeout=TIMEOUT) == APP


def test_what_another_process_has_ordered_takes_no_turn(tmp_path):
    with House(tmp_path, orders_per_hour=2) as house:
        for name in (APP, OTHER):
            house.issuer.queue.want(name)
            open_store(tmp_path / "cache", URL).save(name, *house.ca.mint.pair(name))
            assert house.look() == []
        for number in range(2):
            house.issuer.queue.want(f"h{number}.example.com")
        assert len(house.look()) == 2


def test_issuers_of_one_store_order_once(tmp_path):
    clock = Clock()
    ca = ScriptedCa(clock)
    houses = [House(tmp_path, clock=clock, ca=ca) for _ in range(6)]
    for house in houses:
        house.issuer.queue.want(APP)
    for house in houses:
        house.issuer.look()
    finish_jobs()
    clock.now += 6
    assert len([order for house in houses for order in house.look()]) == 1
    assert all(house.state().name == READY for house in houses)
    for house in houses:
        house.issuer.stop()


@pytest.mark.parametrize("hostname", ["127.0.0.1", "::1", "*.example.com", "A.example", "", "a/b"])
def test_what_cannot_be_ordered_is_not_wanted(house, hostname):
    with pytest.raises(ValueError, match="expected a hostname"):
        house.issuer.queue.want(hostname)
    assert house.state(hostname) is None


# Its thread


def test_the_thread_orders_what_is_wanted_and_renews_in_time(tmp_path):
    with House(tmp_path, clock=time.time) as house:
        house.ca.lifetime = 2  # seconds: renewed every one
        house.issuer.start()
        house.issuer.queue.want(APP)
        assert [house.changed.get(timeout=TIMEOUT) for _ in range(2)] == [APP] * 2


def test_a_silent_ca_does_not_hold_up_the_end(tmp_path):
    clock = Clock()
    with FakeCa(clock) as fake:
        fake.script["new-order"] = [SILENCE] * 10
        store = open_store(tmp_path / "cache", fake.directory)
        ca = Ca(fake.directory, store, clock=clock)
        issuer = Issuer(ca, store, Proofs(), print, clock=clock)
        issuer.start()
        for number in range(3):
            issuer.queue.want(f"h{number}.example.com")
        fake.silent.get(timeout=TIMEOUT)
        began = time.monotonic()
        issuer.stop()
        assert time.monotonic() - began < 2


def test_an_issuer_that_was_not_started_can_be_stopped(house):
    house.issuer.stop()
    house.issuer.queue.want(APP)
    assert house.look() == []


def test_a_callback_that_fails_harms_nobody(tmp_path, caplog):
    clock = Clock()
    store = open_store(tmp_path / "cache", URL)
    told = threading.Event()

    def fail(hostname):
        told.set()
        raise RuntimeError("told")

    issuer = Issuer(ScriptedCa(clock), store, Proofs(), fail, clock=clock)
    issuer.start()
    issuer.queue.want(APP)
    assert told.wait(TIMEOUT)
    issuer.stop()
    assert issuer.queue.state(APP).name == READY and "telling its new state failed" in caplog.text


def test_a_look_that_fails_is_logged_and_the_thread_goes_on(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(issuer_module, "AFTER_BUG", 0.01)
    with House(tmp_path, clock=time.time) as house:
        look, failures = house.issuer._look, []

        def fail_twice():
            if len(failures) < 2:
                failures.append(1)
                raise RuntimeError("a bug")
            return look()

        monkeypatch.setattr(house.issuer, "_look", fail_twice)
        house.issuer.start()
        house.issuer.queue.want(APP)
        assert house.changed.get(timeout=TIMEOUT) == APP
    assert caplog.text.count("issuer: looking which certificates are due failed (bug") == 2
    assert "RuntimeError: a bug" in caplog.text


def test_a_job_that_ends_by_a_bug_names_itself_and_leaves_its_place(house, caplog, monkeypatch):
    def fail(*_):
        raise RuntimeError("a bug")

    names = [f"h{number}.example.com" for number in range(2 * JOBS)]
    for name in names:
        house.issuer.queue.want(name)
    with monkeypatch.context() as patch:
        patch.setattr(house.store, "save_state", fail)
        house.look()
    assert house.issuer._jobs == set()
    for name in names:
        assert f"order {name}: ended early (bug, traceback follows)" in caplog.text
        assert house.state(name).name == READY
    house.issuer.queue.want(APP)
    assert len(house.look()) == 1 and house.state().name == READY


def test_a_bug_while_a_failure_is_noted_is_no_reason_to_order_in_a_loop(house, caplog, monkeypatch):
    house.ca.script = [refused()]
    house.issuer.queue.want(APP)
    with monkeypatch.context() as patch:
        patch.setattr(house.issuer.queue, "failed", None)
        assert len(house.look()) == 1
    assert f"order {APP}: ended early (bug" in caplog.text
    assert house.look() == [] and len(house.at(MINUTE)) == 1


# What is told


def test_the_text_of_a_state_has_a_reason_only_if_there_is_no_certificate():
    assert str(State(READY, "the CA was away", NOW, NOW + DAY)) == "ready"
    assert str(State(WAITING)) == "waiting"
    assert str(State(FAILED, "no address")) == "failed: no address"
    assert str(State(FAILED, "no address", NOW)) == (
        "failed: no address (next attempt 2027-01-15 08:00 UTC)"
    )


# With a whole CA


def test_a_whole_ca_and_its_rate_limit(tmp_path):
    clock = Clock()
    with FakeCa(clock) as fake:
        store = open_store(tmp_path / "cache", fake.directory)
        house = House(tmp_path, clock=clock, ca=Ca(fake.directory, store, clock=clock))
        house.ca.ordered = list
        fake.script["new-order"] = [problem(429, "rateLimited", "too many", Retry_After="60")]
        house.issuer.queue.want(APP)
        house.look()
        assert "429 rateLimited: too many" in house.state().reason
        house.at(59)
        assert fake.count("new-order") == 1
        house.at(61)
        assert fake.count("new-order") == 2 and house.state().name == READY
        house.issuer.stop()


@pytest.fixture
def whole(tmp_path):
    """A house with a whole CA, which is ``fake``."""
    clock = Clock()
    with FakeCa(clock) as fake:
        store = open_store(tmp_path / "cache", fake.directory)
        house = House(tmp_path, clock=clock, ca=Ca(fake.directory, store, clock=clock))
        house.ca.ordered, house.fake = list, fake
        yield house
        house.issuer.stop()


def no_chain(mint, name, key, *more):
    chain = mint.chain(name, key, *more)
    return chain[: chain.index(b"-----END CERTIFICATE-----") + 26]


def chain_of_another(*sent):
    return no_chain(*sent) + Mint("another").chain("other", Mint().key.public_key())


WRONG = {  # what is sent instead, and what is said of it
    "another name": (lambda mint, name, *more: mint.chain(OTHER, *more), OTHER),
    "a name of many lines": (
        lambda mint, name, *more: mint.chain("a\n\x1b[31m" + "b" * 5000, *more), "a [31mbbb"),
    "another key": (lambda mint, name, key, *more: mint.pair(name, *more)[1], "the key is not"),
    "no chain": (no_chain, "the chain is missing"),
    "the chain of another": (chain_of_another, "has not signed the leaf"),
    "run out": (lambda mint, name, key, *_: mint.chain(name, key, NOW, 60), "expired"),
    "garbage": (lambda *_: b"garbage", "expected a certificate"),
    "nothing": (lambda *_: b"", "expected a certificate"),
    "too much": (lambda *_: b"x" * 2_000_000, "more than 1048576 bytes"),
}  # fmt: skip


@pytest.mark.parametrize("what", WRONG)
def test_a_wrong_certificate_is_one_line_and_the_old_one_stays(whole, what, caplog):
    send, words = WRONG[what]
    whole.issuer.queue.want(APP)
    whole.look()
    kept = whole.issuer.queue.certificate(APP)
    mint, chain = Mint(), whole.fake.mint.chain
    whole.fake.mint.chain = lambda *sent: send(mint, *sent)
    caplog.clear()
    whole.at(63 * DAY)
    (line,) = [record for record in caplog.records if record.name.startswith("gotunnel")]
    assert line.exc_info is None and line.getMessage().isprintable()
    assert words in line.getMessage() and len(line.getMessage()) < 1000
    assert whole.state().name == READY and words in whole.state().reason
    assert whole.issuer.queue.certificate(APP) == kept == whole.store.certificate(APP)
    whole.fake.mint.chain = chain
    whole.issuer.queue.want(OTHER)
    whole.at(63 * DAY + HOUR)
    assert whole.state(OTHER).name == READY


def test_a_clock_that_is_wrong_is_said_to_be(whole):
    whole.fake.clock = lambda: whole.clock() + 2 * DAY
    whole.issuer.queue.want(APP)
    whole.look()
    assert whole.state().name == FAILED and "this machine's clock is" in whole.state().reason
    assert whole.fake.count("new-order") == 0


def test_two_cas_of_one_cache_share_nothing(tmp_path):
    clock = Clock()
    with FakeCa(clock) as first, FakeCa(clock) as second:

        def orders(fake):
            """How many it takes until there is a certificate of that CA."""
            before = fake.count("new-order")
            store = open_store(tmp_path / "cache", fake.directory)
            ca = Ca(fake.directory, store, clock=clock)
            issuer = Issuer(ca, store, Proofs(), lambda hostname: None, clock=clock)
            issuer.queue.want(APP)
            issuer.look()
            finish_jobs()
            issuer.queue.certificate(APP).leaf.verify_directly_issued_by(fake.mint.certificate)
            issuer.stop()
            return fake.count("new-order") - before

        assert [orders(fake) for fake in (first, second, first, second)] == [1, 1, 0, 0]
        assert first.count("new-account") == second.count("new-account") == 1
        assert first.accounts != second.accounts


PROCESS = """
import queue, sys
sys.path[:0] = sys.argv[1:3]
from pathlib import Path
from fake_ca import Proofs
from gotunnel_server.certs import folder, issuer, order_queue
from gotunnel_server.certs.acme import Ca
order_queue.ELSEWHERE = 0.1
store, changed = folder.open_store(Path(sys.argv[3]), sys.argv[4]), queue.Queue()
gateway = issuer.Issuer(Ca(sys.argv[4], store), store, Proofs(), changed.put)
gateway.start()
print("ready", flush=True)
sys.stdin.readline()
for hostname in sys.argv[5:]:
    gateway.queue.want(hostname)
for hostname in sys.argv[5:]:
    changed.get(timeout=30)
print(*(gateway.queue.certificate(hostname).leaf.serial_number for hostname in sys.argv[5:]))
gateway.stop()
"""


@pytest.mark.slow
def test_processes_of_one_cache_make_one_account_and_one_order_for_a_hostname(tmp_path):
    with FakeCa(time.time) as fake, contextlib.ExitStack() as stack:
        processes = [
            stack.enter_context(subprocess.Popen(
                [sys.executable, "-c", PROCESS, ROOT, ROOT / "tests", tmp_path / "cache",
                 fake.directory, APP, f"own-{number}.example.com"],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True))
            for number in range(6)
        ]  # fmt: skip
        for process in processes:
            stack.callback(process.kill)
            assert process.stdout.readline() == "ready\n"
        for process in processes:
            process.stdin.write("\n")
            process.stdin.flush()
        serials = [process.communicate(timeout=60)[0].split() for process in processes]
        assert [process.returncode for process in processes] == [0] * 6
        assert len({shared for shared, _ in serials}) == 1
        assert len({own for _, own in serials}) == 6
        assert fake.count("new-account") == 1 and len(fake.accounts) == 1
        assert fake.count("new-order") == 1 + 6


def test_pebble_and_a_challenge_that_does_not_work(tmp_path):
    """The first attempt fails by http-01; tls-alpn-01 works, and is remembered."""

    with Answers() as answers, pebble(tmp_path, 1, answers.tls_port) as running:
        store = open_store(tmp_path / "cache", running.directory)
        ca = Ca(running.directory, store, ca_file=running.ca_file)
        changed = queue.Queue()
        issuer = Issuer(ca, store, answers, changed.put)
        issuer.start()
        try:
            issuer.queue.want(APP)
            changed.get(timeout=TIMEOUT)
            assert (
                issuer.queue.state(APP).name == FAILED
                and "http-01" in issuer.queue.state(APP).reason
            )
            issuer.queue.retry_now(APP)
            changed.get(timeout=TIMEOUT)
            assert issuer.queue.state(APP).name == READY
            assert store.state(APP)["challenge"] == "tls-alpn-01"
            serial = issuer.queue.certificate(APP).leaf.serial_number
            issuer.queue.retry_now(APP)  # which begins with what worked
            changed.get(timeout=TIMEOUT)
            assert issuer.queue.state(APP).reason == ""
            assert issuer.queue.certificate(APP).leaf.serial_number != serial
            assert {kind for kind, *_ in answers.asked} == {"tls-alpn-01"}
        finally:
            issuer.stop()


@pytest.mark.slow
def test_pebble_and_certificates_of_seconds(tmp_path):
    with (
        Answers() as answers,
        pebble(tmp_path, answers.http_port, answers.tls_port, lifetime=6) as running,
    ):
        store = open_store(tmp_path / "cache", running.directory)
        ca = Ca(running.directory, store, ca_file=running.ca_file)
        changed = queue.Queue()
        bounds = Bounds(hostname=Quota(10_000, HOUR))
        issuer = Issuer(ca, store, answers, changed.put, bounds=bounds)
        issuer.start()
        try:
            for number in range(3):
                issuer.queue.want(f"h{number}.example.com")
            for _ in range(9):
                hostname = changed.get(timeout=TIMEOUT)
                assert issuer.queue.state(hostname).name == READY, issuer.queue.state(hostname)
        finally:
            issuer.stop()
