"""No name has two owners at a time, and each one can be had again: leases.py and tenure.py in
thousands of random histories (simulation.py). And the check finds rules that are broken.

GOTUNNEL_CLUSTER_SEED begins with another history.
"""

import os

import pytest
from simulation import Broken, World
from support import at_length

from gotunnel_server.cluster.board import GRANTED, LOST, Ask, Card, Renewal
from gotunnel_server.cluster.leases import Table, Times
from gotunnel_server.cluster.tenure import Tenure

FIRST = int(os.environ.get("GOTUNNEL_CLUSTER_SEED", "0"))
FEW, MANY, VERY_MANY = 50, 600, 60_000  # histories of some 3 ms each


@pytest.mark.parametrize(
    "histories",
    [FEW, pytest.param(MANY, marks=pytest.mark.slow),
     pytest.param(VERY_MANY, marks=[*at_length().marks, pytest.mark.timeout(1800)])],
)  # fmt: skip
def test_no_name_ever_has_two_owners_and_each_becomes_free_again(histories):
    grants = 0
    for seed in range(FIRST, FIRST + histories):
        world = World(seed)
        world.run()
        grants += world.grants
        if seed % 8 == 0:  # it takes longer than the history
            world.heal()
    assert grants > 2 * histories  # the histories are about something


# Rules that are broken on purpose ----------------------------------------------------------------


class NoProof(Table):
    """A lease that has run out is taken for a proof that its member has stopped serving."""

    def _has_stopped(self, id):
        return True


class AnyWitness(Table):
    """... if any member has long been in contact, also one that the lost member does not know."""

    def _has_stopped(self, id):
        return any(
            not each.out and each.since is not None and each.before > self._members[id].expires
            and self.clock >= each.since + self.times.settle
            for each in self._members.values()
        ) if id in self._members else True  # fmt: skip


class NoWait(Table):
    """A member that has just promised may take names at once."""

    def _verdict(self, id, has_promised, ask):
        return super()._verdict(id, False, ask)


class OldContacts(Table):
    """A new server goes on with the contacts of the one before."""

    def _is_current(self, member, contact):
        return member.contact == contact


class OldLists(Table):
    """A member that begins anew is believed to know the members that it names."""

    def renew(self, now, id, renewal, server=""):
        renewed = super().renew(now, id, renewal, server)
        self._members[id].knows = renewal.knows
        return renewed


class Alone(Tenure):
    """A member without the board asks nobody for a promise."""

    known = property(lambda self: frozenset())


class Forgetful(Tenure):
    """A member forgets that it has promised."""

    def promise(self, now):
        broken = self._broken
        try:
            return super().promise(now)
        finally:
            self._broken = broken


# The rules, and a history near the first one that shows them: one in a hundred does.
BROKEN = {
    "no proof": (NoProof, Tenure, 178),
    "any witness": (AnyWitness, Tenure, 195),
    "without SETTLE": (lambda: Table(Times(settle=0)), Tenure, 0),
    "without a margin": (lambda: Table(Times(lease=2000)), Tenure, 12),
    "without promises": (Table, Alone, 24),
}
RARELY_SEEN = {
    "SETTLE less than PROMISE": (lambda: Table(Times(settle=2000)), Tenure),
    "no wait": (NoWait, Tenure),
    "the clock jumps at will": (lambda: Table(Times(gap=10**9)), Tenure),
    "old contacts": (OldContacts, Tenure),
    "old lists": (OldLists, Tenure),
    "forgetful": (Table, Forgetful),
}


@pytest.mark.parametrize("rules", BROKEN.values(), ids=BROKEN)
def test_a_broken_rule_is_found(rules):
    *rules, near = rules
    assert found(*rules, range(near, near + 3000))


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.parametrize("rules", RARELY_SEEN.values(), ids=RARELY_SEEN)
def test_a_broken_rule_that_seldom_shows_is_found(rules):
    assert found(*rules, range(FIRST, FIRST + 60_000))


def found(table, tenure, seeds):
    """Whether a name has two owners in one of these histories."""
    for seed in seeds:
        try:
            World(seed, table, tenure).run()
        except Broken:
            return True
    return False


# How soon ----------------------------------------------------------------------------------------


@pytest.fixture
def quiet():
    """A function that makes a World of so many members in which nothing fails."""

    def make(members):
        world = World(1)
        world.chance.random = lambda: 0.9
        while len(world.members) < members:
            world.join()
        while len(world.members) > members:
            world.bury(world.members[-1])
        wait(world, 20)
        return world

    return make


def wait(world, seconds, step=0.25):
    for _ in range(int(seconds / step)):
        world.now += 1000 * step
        for member in world.members:
            (world.settle if member.linked else world.turn)(member)
        world.check()


def has(world, member, name, owner):
    """Whether a member gets a name; it may take some calls."""
    if member.may_claim(member.clock(world.now)):
        asks = (Ask(name, owner),)
        world.settle(member, ("claim", (member.tenure.contact, asks, True)))
    return name in member.held


def seconds_until(world, condition):
    began = world.now
    while not condition():
        wait(world, 0.25)
        assert world.now - began < 100_000
    return (world.now - began) / 1000


def test_a_name_that_is_given_back_is_free_at_once(quiet):
    world = quiet(2)
    one, other = world.members
    assert has(world, one, "x", "a") and not has(world, other, "x", "b")
    one.held.clear()
    one.to_release.add("x")
    wait(world, 0.5)
    assert has(world, other, "x", "b")


def test_the_names_of_a_member_that_leaves_are_free_at_once(quiet):
    world = quiet(3)
    one, other, _ = world.members
    assert has(world, one, "x", "a")
    world.bury(one)
    world.server.table.leave(world.server.clock(world.now), one.id, server=world.server.name)
    assert has(world, other, "x", "b")


def test_an_agent_gets_its_name_at_another_member_at_once(quiet):
    world = quiet(2)
    one, other = world.members
    assert has(world, one, "x", "a") and has(world, other, "x", "a")


def test_the_names_of_a_member_that_has_crashed_are_free_within_seconds(quiet):
    world = quiet(3)
    one, other, _ = world.members
    assert has(world, one, "x", "a")
    world.bury(one)
    assert seconds_until(world, lambda: has(world, other, "x", "b")) < 7


def test_a_name_that_a_dead_member_holds_as_well_is_reported_free(quiet):
    """Else agents that wait for it would not be told."""
    world = quiet(3)
    one, other, dead = world.members
    assert all(has(world, member, "x", "a") for member in world.members)
    world.bury(dead)
    wait(world, 6)
    freed = [
        world.server.table.release(
            world.server.clock(world.now), each.id, each.tenure.contact, ["x"],
            server=world.server.name,
        )
        for each in (one, other)
    ]  # fmt: skip
    assert freed == [(), ("x",)]
    other.held.clear()
    assert has(world, other, "x", "b")


def test_what_is_served_goes_on_while_nobody_reaches_the_board(quiet):
    world = quiet(3)
    one, other, third = world.members
    assert has(world, one, "x", "a") and has(world, other, "y", "b")
    for member in world.members:
        member.linked, member.reaches = False, {each.id for each in world.members}
    for _ in range(1000):
        world.now += 300
        for member in world.members:
            world.turn(member)
        for _ in range(10):
            world.deliver()
    assert one.serves(one.clock(world.now)) and other.serves(other.clock(world.now))


def test_a_member_that_alone_is_cut_off_stops_within_its_lease(quiet):
    world = quiet(3)
    one, other, third = world.members
    assert has(world, one, "x", "a")
    one.linked, one.reaches = False, {each.id for each in world.members}
    began = world.now
    while one.serves(one.clock(world.now)):
        world.now += 100
        for member in world.members:
            world.turn(member)
        assert world.now - began < 4000
    taken = seconds_until(world, lambda: has(world, other, "x", "b"))
    assert taken < 5


def test_a_holder_of_this_server_is_not_replaced_by_one_from_before():
    """After lost data a name may be had by a member that was away, with a lower number."""
    table = Table()
    contacts = {}

    def renew(now, server):
        for id in ("a", "b"):
            renewal = Renewal(Card(id), contacts.get(id, 0))
            contacts[id] = table.renew(now, id, renewal, server).contact

    for second in range(8):
        renew(1000 * second, "one")
    asks = [Ask("x", "owner of a")]
    assert table.claim(8000, "a", contacts["a"], asks, True, "one")[0].verdict == GRANTED
    late = [Ask("x", "owner of b", 99)]  # b has got it at a server that is lost
    assert table.claim(8000, "b", contacts["b"], late, False, "one")[0].verdict == LOST
    renew(9000, "two")  # ... and the record may be older than what b has
    assert table.claim(9000, "b", contacts["b"], late, False, "two")[0].verdict == GRANTED
