"""The rules by which an agent keeps a session with each of several gateways. Values alone."""

import itertools

import pytest

from gotunnel_agent.roster import (
    MOST_MEMBERS,
    QUICK_SEEKS,
    SEEK_DELAY,
    SHARED,
    Place,
    View,
    chosen,
    is_needed,
    place_of,
    seek_delay,
    to_open,
    usable,
    wanted,
)

A, B, C = "gw1.test:9443", "gw2.test:9443", "gw3.test:9443"
THREE = {"a": A, "b": B, "c": C}
PROCESSES = {"a": SHARED, "b": SHARED, "c": SHARED}


def served(member, address=SHARED):
    return View(address, member, serves=True)


HOME = served("a")


@pytest.mark.parametrize(
    ("text", "place"),
    [
        (A, Place("gw1.test", 9443, "n")),
        ("GW1.Test.:1", Place("gw1.test", 1, "n")),
        ("192.0.2.1:443", Place("192.0.2.1", 443, "n")),
        ("[2001:db8::1]:443", Place("2001:db8::1", 443, "n")),
        ("", None),
        ("gw1.test", None),
        ("gw1.test:", None),
        (":9443", None),
        ("gw1.test:0", None),
        ("gw1.test:99999", None),
        ("gw1.test:+1", None),
        ("2001:db8::1:443", None),
        ("https://gw1.test:443", None),
        ("gw1 .test:443", None),
        ("gw1.test:443\n", None),
        ("\x1b[2J:1", None),
        ("unix:/run/x", None),
        ("x" * 10_000 + ":1", None),
    ],
)
def test_the_place_of_an_address(text, place):
    assert place_of(text, "n") == place


@pytest.mark.parametrize("id", ["", "a b", "\x1b", "x" * 65, "a\n", "\u00e4"])
def test_what_is_no_id_is_left_out(id):
    assert usable({id: A, "b": B, "c": "?"}) == {"b": B}


def test_of_too_many_members_a_choice_is_made_that_stays():
    many = {f"{number:08x}": f"gw{number}.test:1" for number in range(3 * MOST_MEMBERS)}
    some = chosen(many, "seed")
    assert len(some) == MOST_MEMBERS and some == chosen(many, "seed") != chosen(many, "other")
    more = chosen({**many, "new": A}, "seed")
    assert len(some.keys() - more.keys()) <= 1
    left_out = sorted(many.keys() - some.keys())[:5]
    assert set(left_out) < chosen(many, "seed", reached=left_out).keys()
    assert chosen(THREE, "seed") == THREE


@pytest.mark.parametrize(
    ("members", "links", "opened"),
    [
        ({}, [HOME], []),
        ({}, [View(SHARED)], []),
        (THREE, [HOME], [B, C]),
        (THREE, [HOME, View(B)], [C]),  # one that dials already
        (THREE, [HOME, View(B), View(C, ends=True)], [C]),
        (THREE, [HOME, served("b", B), served("c", C)], []),
        # the agent's own has reached a member by the address of all
        (THREE, [served("c"), View(A), View(B)], []),
        # a member that is gone from the list, and one that has taken its place
        ({"a": A, "d": B}, [HOME, served("b", B)], [B]),
        # no session at all: the agent's own dials, the others too
        (THREE, [View(SHARED), View(B), View(C)], [A]),
        # one at a time looks for those without an address
        (PROCESSES, [HOME], [SHARED]),
        (PROCESSES, [HOME, View(SHARED)], []),
        (PROCESSES, [HOME, served("b")], [SHARED]),
        (PROCESSES, [HOME, served("b"), served("c")], []),
        (PROCESSES, [View(SHARED), served("b"), served("c")], []),  # its own looks
        ({"a": SHARED, "b": SHARED, "c": C}, [HOME], [SHARED, C]),
        # two behind one address
        ({"a": A, "b": B, "c": B}, [HOME, served("b", B)], [B]),
    ],
)
def test_what_is_opened(members, links, opened):
    assert to_open(members, links) == opened


@pytest.mark.parametrize(
    ("members", "links", "index", "needed"),
    [
        # the agent's own
        ({}, [View(SHARED)], 0, True),
        (THREE, [View(SHARED)], 0, True),
        (THREE, [View(SHARED), View(B)], 0, True),
        (THREE, [View(SHARED), served("b", B)], 0, False),  # each member has an address
        (PROCESSES, [View(SHARED), served("b")], 0, True),
        (PROCESSES, [View(SHARED), served("a"), served("b"), served("c")], 0, False),
        # another one
        (THREE, [HOME, View(B)], 1, True),
        (THREE, [HOME, View(B), served("b")], 1, False),
        ({"a": A}, [HOME, View(B)], 1, False),
        ({}, [View(SHARED), View(B)], 1, False),
        (THREE, [View(SHARED), View(B)], 1, True),
        (PROCESSES, [HOME, View(SHARED)], 1, True),
        (PROCESSES, [HOME, View(SHARED), View(SHARED)], 2, False),  # one at a time
        (PROCESSES, [HOME, View(SHARED, ends=True), View(SHARED)], 2, True),
        (PROCESSES, [View(SHARED), View(SHARED), served("a")], 1, False),
    ],
)
def test_who_dials(members, links, index, needed):
    assert is_needed(members, links, index) is needed


def test_every_missing_member_has_a_link_that_dials_or_is_to_be_opened():
    """Whatever the links are."""
    kinds = [View(SHARED), View(B), served("a"), served("b", B), View(SHARED, ends=True)]
    for members in ({}, THREE, PROCESSES, {"a": A, "b": SHARED}):
        for links in itertools.product(kinds, repeat=3):
            if links[0].address != SHARED or links[0].ends:
                continue
            dialled = {
                link.address
                for index, link in enumerate(links)
                if not link.serves and not link.ends and is_needed(members, links, index)
            }
            opened = to_open(members, links)
            assert dialled | set(opened) >= set(wanted(members, links))
            assert not dialled & set(opened) and len(opened) == len(set(opened))


def test_a_link_looks_often_at_first_and_the_longer_the_more_members_there_are():
    quick = [seek_delay(tries, PROCESSES) for tries in range(1, 3 * QUICK_SEEKS + 1)]
    assert set(quick) == {SEEK_DELAY}
    assert seek_delay(3 * QUICK_SEEKS + 2, PROCESSES) == 4 * SEEK_DELAY
    assert seek_delay(QUICK_SEEKS + 1, THREE) == 2 * SEEK_DELAY
    assert seek_delay(10**6, {}) > 3600


def test_an_address_of_a_member_alone_that_leads_to_another_one_is_dialled_less_often():
    assert [seek_delay(tries, THREE, B) for tries in (1, 2, 3)] == [0.5, 1, 2]
    assert seek_delay(10**6, THREE, B) > 3600
