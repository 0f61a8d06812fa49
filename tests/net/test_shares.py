"""Places by address: several addresses do not take them all, and a /64 is one address."""

import pytest

from gotunnel_server.net.shares import Places, Shares

HONEST = ("192.0.2.1", "2001:db8:ffff::1")


def fill(enter, address):
    """Take places as long as there are any for ``address``; how many."""
    count = 0
    while enter(address):
        count += 1
    return count


@pytest.mark.parametrize("most", [64, 512, 2048])
def test_one_address_takes_a_third_and_five_leave_an_eighth(most):
    shares = Shares(most)
    taken = [fill(shares.enter, f"198.51.100.{number}") for number in range(5)]
    assert most / 3 <= taken[0] <= most / 3 + 1
    assert sum(taken) <= most * 0.89
    for address in HONEST:
        assert shares.enter(address)


def test_last_places_are_for_those_that_hold_none():
    shares = Shares(512)
    for number in range(10):
        fill(shares.enter, f"198.51.100.{number}")
    assert shares.enter("192.0.2.1")


@pytest.mark.parametrize("most", [1, 2, 3])
def test_few_places_are_for_anybody(most):
    shares = Shares(most)
    assert fill(shares.enter, "192.0.2.1") == 1
    shares.leave("192.0.2.1")
    assert shares.enter("192.0.2.2")


def test_a_64_of_ipv6_is_one_address_and_so_is_a_mapped_one():
    shares = Shares(64)
    one = fill(shares.enter, "2001:db8::1")
    assert not shares.enter("2001:db8::ffff:2") and not shares.enter("2001:db8:0:0:8000::")
    assert fill(shares.enter, "2001:db8:0:1::1") > 0
    for _ in range(one):
        shares.leave("2001:db8::2")  # whichever of them it was
    assert shares.enter("2001:db8::3")
    assert fill(shares.enter, "192.0.2.1") > 0 and not shares.enter("::ffff:192.0.2.1")


def test_a_proxy_may_take_all():
    shares = Shares(4, exempt={"192.0.2.1"})
    assert fill(shares.enter, "192.0.2.1") == 4
    shares.leave("192.0.2.1")
    assert shares.enter("192.0.2.2")


def test_nothing_is_remembered_of_those_that_left():
    shares, places = Shares(10), Places(10)
    for number in range(100):
        shares.enter(f"198.51.100.{number}")
        shares.leave(f"198.51.100.{number}")
        seat = places.take(f"198.51.100.{number}")
        seat.move("192.0.2.1")
        seat.settle()
        seat.leave()
    assert not shares._held and not places._held and not places._silent and not places.taken


# Connections -------------------------------------------------------------------------------------


def fill_places(places, address):
    seats = []
    while (seat := places.take(address)) is not None:
        seats.append(seat)
    return seats


def test_silent_connections_of_one_address_are_an_eighth_and_of_five_half():
    places = Places(4096)
    seats = [fill_places(places, f"198.51.100.{number}") for number in range(5)]
    assert len(seats[0]) == 512 and sum(map(len, seats)) < 2048
    assert all(places.take(address) for address in HONEST)


def test_those_that_settle_make_room_for_others_of_their_address():
    places = Places(800)
    seats = fill_places(places, "192.0.2.1")
    assert len(seats) == 100
    for _ in range(2):  # a second time counts nothing
        seats[0].settle()
    seats += fill_places(places, "192.0.2.1")
    assert len(seats) == 101
    while seats:  # no more than a third, however many have settled
        for seat in seats:
            seat.settle()
        seats = fill_places(places, "192.0.2.1")
    assert 266 <= places.taken <= 268
    assert places.take("192.0.2.2")


def test_agents_that_are_registered_may_all_have_one_address():
    places = Places(80, parts=0)
    for _ in range(80):
        places.take("192.0.2.1").settle()
    assert places.take("192.0.2.1") is None and places.take("192.0.2.2") is None


def test_a_full_port_has_no_share_of_what_others_hold():
    """What one address may take is a part of what is free, not of all."""
    places = Places(1000, exempt={"192.0.2.9"})
    for _ in range(900):
        places.take("192.0.2.9").settle()
    assert len(fill_places(places, "192.0.2.1")) == 13


def test_a_seat_that_is_left_twice_frees_one_place():
    places = Places(3, exempt={"192.0.2.1"})
    seats = fill_places(places, "192.0.2.1")
    for _ in range(2):
        seats[0].leave()
    assert len(fill_places(places, "192.0.2.1")) == 1


def test_who_a_proxy_names_counts_and_not_the_proxy():
    places = Places(80, exempt={"192.0.2.1"})
    for _ in range(10):
        assert places.take("192.0.2.1").move("198.51.100.1")
    flood = places.take("192.0.2.1")
    assert not flood.move("198.51.100.1")
    flood.leave()
    assert places.take("192.0.2.1").move("198.51.100.2")
    assert places.taken == 11
