"""What a gateway that is one of several tells its agents: the members, and that they are here."""

import logging

import pytest
from hand_made import HandMade, registered, registration, reply_to
from support import APP, gateway_here, wait_until

from gotunnel import (
    ALREADY,
    MEMBERS,
    MESSAGE_LIMIT,
    Ack,
    Members,
    SessionClosed,
    encode_message,
)
from gotunnel_server.agents import members
from gotunnel_server.agents.members import DEBOUNCE, MOST_TOLD, Membership, Teller

OWN, OTHER = "3f9a61c2", "b07d11e4"
TWO = {OWN: "gw1.test:9443", OTHER: ""}
THREE = {**TWO, "c1": "gw3.test:9443"}


@pytest.fixture
def told():
    """What Membership.members() gives; a test changes it."""
    return dict(TWO)


# Pure --------------------------------------------------------------------------------------------


class Agent:
    """The session and control stream of a Teller. Time is the test's."""

    def __init__(self):
        self.heard, self.timers, self.error = [], [], None

    def call_later(self, delay, function):
        assert delay == DEBOUNCE
        self.timers.append(function)

    def send(self, message):
        if self.error:
            raise self.error
        self.heard.append(message)

    def pass_time(self):
        timers, self.timers = self.timers, []
        for function in timers:
            function()


@pytest.fixture
def agent():
    return Agent()


@pytest.fixture
def teller(agent, told):
    return Teller(Membership(OWN, lambda: dict(told)), agent, agent, "an instance")


def test_nothing_is_told_before_the_ack(teller, agent):
    teller.changed()
    assert not agent.timers and not agent.heard


def test_changes_at_about_the_same_time_are_one_message(teller, agent, told):
    teller.begin()
    told["c1"] = ""
    teller.changed()
    told["c1"] = "gw3.test:9443"
    teller.changed()
    assert len(agent.timers) == 1
    agent.pass_time()
    assert agent.heard == [Members(TWO), Members(THREE)]


def test_what_is_as_before_is_not_told_again(teller, agent, told):
    teller.begin()
    told["c1"] = ""
    teller.changed()
    del told["c1"]
    agent.pass_time()
    assert agent.heard == [Members(TWO)] and not agent.timers


def test_an_agent_without_room_hears_of_the_members_later(teller, agent):
    agent.error = TimeoutError()
    teller.begin()
    agent.pass_time()
    agent.error = None
    agent.pass_time()
    assert agent.heard == [Members(TWO)] and not agent.timers


def test_an_agent_that_has_left_is_not_told_again(teller, agent):
    agent.error = SessionClosed("over")
    teller.begin()
    assert not agent.timers


def test_of_too_many_members_each_agent_hears_the_same_ones_again_and_another_agent_others():
    many = {f"{number:08x}": "x" * 253 + ":65535" for number in range(3 * MOST_TOLD)}
    membership = Membership("00000007", lambda: many)
    first, again, other = (membership.message(seed).members for seed in ("a", "a", "b"))
    assert first == again != other and len(first) == MOST_TOLD
    assert "00000007" in first and "00000007" in other
    assert len(encode_message(membership.message("a"))) < MESSAGE_LIMIT


def test_a_member_more_takes_the_place_of_no_more_than_one():
    many = {f"{number:08x}": "" for number in range(2 * MOST_TOLD)}
    before = Membership("00000000", lambda: many).message("a").members
    after = Membership("00000000", lambda: {**many, "ffffffff": ""}).message("a").members
    assert len(before.keys() - after.keys()) <= 1


# At a gateway ------------------------------------------------------------------------------------


@pytest.fixture
def gateway(cache, told, monkeypatch):
    monkeypatch.setattr(members, "DEBOUNCE", 0.01)
    with gateway_here(cache) as gateway:
        gateway.inner.tunnels.membership = Membership(OWN, lambda: dict(told))
        yield gateway


def test_the_ack_names_the_gateway_and_the_members_follow(gateway, told):
    with HandMade(gateway, registration(APP, features=(MEMBERS,))) as agent:
        assert agent.hear() == Ack(True, features=(MEMBERS,), member=OWN)
        assert agent.hear() == Members(TWO)
        told.update(THREE)
        gateway.inner.tunnels.members_changed()
        assert agent.hear() == Members(THREE)


def test_an_agent_that_does_not_know_members_hears_of_none(gateway):
    with HandMade(gateway, registration(APP)) as agent:
        assert agent.hear() == Ack(True)
        (tunnel,) = gateway.inner.tunnels.registered()
        assert tunnel._members is None
        gateway.inner.tunnels.members_changed()


def test_a_gateway_alone_names_no_member(gateway):
    gateway.inner.tunnels.membership = None
    with HandMade(gateway, registration(APP, features=(MEMBERS,), besides=(OWN,))) as agent:
        assert agent.hear() == Ack(True, features=(MEMBERS,))


def test_an_agent_that_is_here_already_is_told_so_and_nobody_is_alarmed(gateway, caplog):
    caplog.set_level(logging.INFO, "gotunnel")
    with registered(gateway, APP, features=(MEMBERS,), instance="i") as agent:
        more = {"features": (MEMBERS,), "instance": "i", "besides": (OTHER, OWN)}
        caplog.clear()
        for _ in range(3):
            assert reply_to(gateway, registration(APP, **more)) == Ack(False, ALREADY)
        wait_until(lambda: len(gateway.inner._newcomers._newcomers) == 0)
        assert ALREADY not in caplog.text and not gateway.inner._newcomers.refusals.total.value
        assert not agent.session.ended


def test_besides_another_member_an_agent_is_welcome(gateway):
    more = {"features": (MEMBERS,), "besides": (OTHER,)}
    assert reply_to(gateway, registration(APP, **more)).ok


def test_a_bad_token_is_refused_as_such_though_the_agent_is_here(gateway):
    more = {"features": (MEMBERS,), "besides": (OWN,)}
    refused = reply_to(gateway, registration(APP, token="bad", **more))
    assert refused.error.startswith("auth failed")
