"""How long a member may serve without the board, by its own clock."""

import pytest

from gotunnel_server.cluster.tenure import LEASE, LOOK, MARGIN, PROMISE, QUIET, SETTLE, Tenure

HELD = LEASE - MARGIN - LOOK  # seconds after a renewal was sent in which the names are served


def member(*others, now=0.0):
    """A member in contact for a while, which knows ``others``."""
    tenure = Tenure("me")
    ids = ("me", *others)
    for at, anew in ((now - 20, True), (now - 10, False), (now, False)):
        tenure.sending(at)
        tenure.renewed(at, at, 1, anew, 1, ids)
        if anew:
            tenure.resume(at)
    assert tenure.holds(now)
    return tenure


def test_a_lease_counts_from_before_it_was_sent():
    tenure = member("b")
    tenure.sending(1.0)
    tenure.renewed(2.5, 1.0, 1, False, 1, None)
    assert tenure.holds(1.0 + HELD - 0.01)
    assert not tenure.holds(1.0 + HELD)


def test_a_renewal_that_took_longer_than_its_lease_is_none():
    tenure = member("b")
    tenure.sending(1.0)
    assert not tenure.holds(1.0 + HELD)
    tenure.renewed(1.0 + LEASE, 1.0, 1, False, 1, None)
    assert not tenure.holds(1.0 + LEASE)


def test_promises_of_all_others_carry_on():
    tenure = member("b", "c")
    for at in range(2, 60):
        tenure.failed()
        assert tenure.to_ask(at) == {"b", "c"}
        tenure.promised(at, "b", at - 0.1)
        tenure.promised(at, "c", at - 0.2)
        assert tenure.holds(at)
    assert tenure.holds(59 - 0.2 + PROMISE - LOOK - 0.01)
    assert not tenure.holds(59 - 0.2 + PROMISE - LOOK)


def test_one_member_that_does_not_promise_ends_it():
    tenure = member("b", "c")
    tenure.failed()
    tenure.promised(2.0, "b", 1.9)
    assert not tenure.holds(HELD)
    tenure.promised(3.0, "c", 2.9)  # too late: it may have taken names meanwhile
    assert not tenure.holds(3.0)


def test_a_member_that_said_farewell_needs_not_promise():
    tenure = member("b", "c")
    tenure.failed()
    tenure.departed(1.0, "b")
    tenure.promised(2.0, "c", 2.0)
    assert tenure.known == {"c"} and tenure.holds(4.0)


def test_a_member_that_is_alone_serves_on():
    tenure = member()
    tenure.failed()
    assert tenure.holds(1000.0)


def test_members_count_until_the_board_knows_that_they_do_not():
    """The board may take for a witness whom it has as known."""
    tenure = member("b", "c")
    tenure.sending(1.0)
    tenure.renewed(1.0, 1.0, 1, False, 2, ("me", "b"))  # c is out: not yet said to the board
    assert tenure.known == {"b", "c"}
    tenure.sending(2.0)  # says it, but the answer is lost
    tenure.failed()
    assert tenure.known == {"b", "c"}
    tenure.sending(3.0)
    tenure.renewed(3.0, 3.0, 1, False, 2, None)
    assert tenure.known == {"b"}


def test_an_emptied_board_makes_nobody_forgotten():
    tenure = member("b")
    tenure.failed()
    tenure.sending(1.0)
    tenure.renewed(1.0, 1.0, 9, True, 1, ("me",))
    for at in (2.0, 3.0, 4.0):
        tenure.sending(at)
        tenure.renewed(at, at, 9, False, 1, None)
        assert tenure.known == {"b"}
    tenure.sending(1.0 + SETTLE)
    tenure.renewed(1.0 + SETTLE, 1.0 + SETTLE, 9, False, 1, None)
    assert tenure.known == set()


@pytest.mark.parametrize(
    "now, failed, promises", [(QUIET, False, False), (QUIET + 0.1, False, True), (0.1, True, True)]
)
def test_a_member_promises_if_it_is_without_the_board_or_cannot_tell(now, failed, promises):
    tenure = member("b")
    if failed:
        tenure.failed()
    assert tenure.promise(now) == promises
    assert tenure.begins_anew == promises
    assert tenure.sending(now)[0] == (0 if promises else 1)


def test_a_promise_during_a_renewal_has_the_next_one_begin_anew():
    tenure = member("b")
    assert tenure.sending(1.0)[0] == 1
    assert tenure.promise(1.0 + QUIET)
    tenure.renewed(3.0, 1.0, 1, False, 1, None)
    assert tenure.begins_anew and tenure.sending(3.0)[0] == 0


def test_what_has_stopped_begins_again_only_by_the_board():
    tenure = member("b")
    assert not tenure.holds(10.0)
    tenure.sending(11.0)
    tenure.renewed(11.0, 11.0, 2, True, 1, None)
    assert not tenure.holds(11.0)  # its names were not asked for again yet
    tenure.resume(11.1)
    assert tenure.holds(11.1)
    assert not tenure.holds(20.0)
    tenure.sending(20.0)
    tenure.renewed(20.0, 20.0, 2, False, 1, None)  # the board has kept the names for it
    assert tenure.holds(20.0)
