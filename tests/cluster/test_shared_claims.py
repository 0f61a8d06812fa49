"""Claims of several gateways on one board, without threads, sockets or clocks: the board is a
leases.Table, and a test says when each gateway makes its calls."""

import math
from types import SimpleNamespace

import pytest

from gotunnel_server.agents import takeover
from gotunnel_server.agents.identity import Identity
from gotunnel_server.agents.registration import Agent
from gotunnel_server.cluster import claims as module
from gotunnel_server.cluster.board import Card, Renewal
from gotunnel_server.cluster.claims import SharedClaims
from gotunnel_server.cluster.leases import Table, Times
from gotunnel_server.cluster.members import Stale
from gotunnel_server.routes import HostnameTaken, NotDecided, Registry, Route, Undecided

APP, WEB = "app.example.com", "web.example.com"
TIMES = Times(settle=0)  # nobody here has promised anything


class TableBoard:
    """A board in this process. ``now`` is in milliseconds."""

    def __init__(self):
        self.table, self.now = Table(TIMES), 0

    def __getattr__(self, name):
        return lambda id, *arguments: getattr(self.table, name)(self.now, id, *arguments)


class Gateway:
    """One gateway, as a Member for its SharedClaims."""

    def __init__(self, world, id):
        self.world, self.id = world, id
        self.away = False
        self.serving = True
        self.contact = 0
        self.registry = Registry()
        self.claims = SharedClaims(self, world.board, self.registry)
        self.free = []
        self.claims.on_free = self.free.extend
        self.renew()
        self.renew()

    def renew(self):
        renewed = self.world.board.renew(self.id, Renewal(Card(self.id), self.contact))
        self.contact = renewed.contact
        if renewed.anew:
            self.claims.ask_again(self.contact, self.serving)

    def work(self):
        self.claims.work(self.contact, math.inf)

    # members.Member

    def publish(self, to, message):
        self.world.messages.append((to, message))

    def wake(self):
        pass

    def keep(self):
        pass

    def is_away(self):
        return self.away

    def serves(self):
        return self.serving

    # Agents

    def tunnel(self, instance="", issuer="", id="t"):
        return Tunnel(Agent(("192.0.2.1", 1), Identity(issuer), instance), id)

    def claim(self, tunnel, *names, partial=False):
        """A takeover.Claim that has asked once."""
        routes = {name: Route(name, "http", tunnel) for name in names}
        claim = takeover.Claim(self.claims, tunnel.agent, routes, lambda routes: None, partial)
        try:
            assert not claim.attempt()
        except HostnameTaken as error:
            claim.refusal = str(error)
        self.work()
        return claim

    def serve(self, tunnel, *names):
        claim = self.claim(tunnel, *names)
        assert claim.attempt()
        assert all(self.registry.lookup(name).tunnel is tunnel for name in names)


class Tunnel:
    """As takeover.py and SharedClaims see an agent's session."""

    moving = False
    features = ()

    def __init__(self, agent, id):
        self.agent, self.id = agent, id
        self.asked = 0
        self.answers = False
        self.replaced = []
        self.gone = SimpleNamespace(is_set=lambda: bool(self.replaced), wait=lambda timeout: True)

    def ask(self):
        self.asked += 1
        return 0.0

    def has_answered(self, since):
        return self.answers

    def replace(self, reason):
        self.replaced.append(reason)

    def step_aside(self, successor):
        self.replaced.append("aside")


class World:
    def __init__(self):
        self.board = TableBoard()
        self.messages = []
        self.gateways = [Gateway(self, id) for id in ("a", "b", "c")]

    def deliver(self):
        """Hand over all messages."""
        messages, self.messages = self.messages, []
        for to, message in messages:
            for gateway in self.gateways:
                if gateway.id == to or not to and gateway.id != message["from"]:
                    getattr(gateway.claims, f"hear_{message['do']}")(message)

    def holders(self, name):
        found = self.board.table._names.get(name)
        return set() if found is None else found.holders


@pytest.fixture
def world():
    return World()


@pytest.fixture
def gateways(world):
    return world.gateways


def test_a_claim_waits_for_the_board_and_is_granted(world, gateways):
    a, _, _ = gateways
    tunnel = a.tunnel("one")
    claim = a.claim(tunnel, APP, WEB)
    assert a.registry.lookup(APP) is None
    assert claim.attempt()
    assert world.holders(APP) == world.holders(WEB) == {"a"}


def test_an_agent_has_its_hostname_at_each_gateway(world, gateways):
    for gateway in gateways:
        gateway.serve(gateway.tunnel("one"), APP)
    assert world.holders(APP) == {"a", "b", "c"}
    assert len({hold.number for g in gateways for hold in g.claims._holds.values()}) == 1


def test_visits_to_a_new_name_wait_at_the_gateways_that_do_not_have_it_yet(world, gateways):
    a, b, c = gateways
    a.serve(a.tunnel("one"), APP, "*.dev.test")
    assert not b.registry.awaits(APP)
    world.deliver()
    assert [gateway.registry.awaits(APP) for gateway in gateways] == [False, True, True]
    assert c.registry.awaits("x.dev.test") and not c.registry.awaits("x.test")
    b.serve(b.tunnel("one"), APP)  # the agent has dialled it
    assert not b.registry.awaits(APP)
    assert not [message for _, message in world.messages if message["do"] == "come"]


def test_a_name_that_was_granted_too_late_is_not_awaited(world, gateways):
    a, b, _ = gateways
    tunnel = a.tunnel("one")
    grant = world.board.claim
    world.board.claim = lambda *call: (a.claims.release(tunnel), grant(*call))[1]
    a.claim(tunnel, APP)
    world.deliver()
    assert world.holders(APP) == set() and not b.registry.awaits(APP)


def test_a_name_is_free_when_its_last_session_has_ended(world, gateways):
    a, b, _ = gateways
    tunnels = [gateway.tunnel("one") for gateway in (a, b)]
    a.serve(tunnels[0], APP)
    b.serve(tunnels[1], APP)
    a.claims.release(tunnels[0])
    a.work()
    assert world.holders(APP) == {"b"} and a.free == []
    b.claims.release(tunnels[1])
    b.work()
    world.deliver()
    assert world.holders(APP) == set()
    assert [gateway.free for gateway in gateways] == [[APP]] * 3


def test_an_agent_that_answers_keeps_its_hostname_at_another_gateway(world, gateways):
    a, b, _ = gateways
    holder = a.tunnel("one")
    a.serve(holder, APP)
    claim = b.claim(b.tunnel("two"), APP)
    assert not claim.attempt()  # it asks
    world.deliver()
    assert holder.asked == 1
    holder.answers = True
    a.claims.tick()
    world.deliver()
    with pytest.raises(HostnameTaken, match=f"host already registered: {APP}"):
        claim.attempt()
    assert world.holders(APP) == {"a"}


def test_a_silent_agent_at_another_gateway_is_replaced(world, gateways, monkeypatch):
    monkeypatch.setattr(module, "RE_ASK", -1)
    a, b, _ = gateways
    holder, tunnel = a.tunnel("one"), b.tunnel("two")
    a.serve(holder, APP)
    claim = b.claim(tunnel, APP)
    assert not claim.attempt()
    world.deliver()
    a.claims.release(holder)  # as its heartbeat ends it
    a.work()
    assert not claim.attempt()
    b.work()
    assert claim.attempt()
    assert world.holders(APP) == {"b"}


def test_a_partial_claim_goes_on_without_what_others_keep(world, gateways):
    a, b, _ = gateways
    holder = a.tunnel("one")
    a.serve(holder, APP)
    claim = b.claim(b.tunnel("two"), APP, WEB, partial=True)
    assert not claim.attempt()
    world.deliver()
    holder.answers = True
    a.claims.tick()
    world.deliver()
    assert not claim.attempt()  # asks for WEB alone
    b.work()
    assert claim.attempt()
    assert list(claim.denied) == [APP] and world.holders(WEB) == {"b"}


def test_sessions_without_an_instance_are_different_owners(world, gateways):
    a, b, _ = gateways
    a.serve(a.tunnel(id="1"), APP)
    assert not b.claim(b.tunnel(id="1"), APP).attempt()
    assert world.holders(APP) == {"a"}


def test_another_credential_with_the_same_instance_is_another_owner(world, gateways):
    a, b, _ = gateways
    a.serve(a.tunnel("one", issuer="x"), APP)
    assert not b.claim(b.tunnel("one", issuer="y"), APP).attempt()


def test_a_name_that_was_denied_is_not_granted_later(world, gateways, monkeypatch):
    """The agent waits, and claims it again when it is told that the name is free."""
    monkeypatch.setattr(module, "RE_ASK", -1)
    a, b, _ = gateways
    holder, tunnel = a.tunnel("one"), b.tunnel("two")
    a.serve(holder, APP)
    claim = b.claim(tunnel, APP)
    claim.attempt()
    world.deliver()
    holder.answers = True
    a.claims.tick()
    world.deliver()
    with pytest.raises(HostnameTaken):
        claim.attempt()
    a.claims.release(holder)
    a.work()
    b.work()
    assert world.holders(APP) == set() and b.claims._pending == {}


def test_a_claim_that_was_given_up_leaves_nothing(world, gateways):
    a, _, _ = gateways
    tunnel = a.tunnel("one")
    a.claim(tunnel, APP)
    a.claims.release(tunnel)
    a.work()
    assert world.holders(APP) == set()
    assert a.claims._holds == a.claims._used == a.claims._pending == {}


def test_an_agent_that_comes_back_needs_no_board(world, gateways):
    a, _, _ = gateways
    old, new = a.tunnel("one"), a.tunnel("one")
    a.serve(old, APP)
    a.away = True
    a.claims.release(old)
    claim = takeover.Claim(a.claims, new.agent, {APP: Route(APP, "http", new)}, lambda routes: None)
    assert claim.attempt()
    a.away = False
    a.work()
    assert world.holders(APP) == {"a"}


def test_so_does_one_without_an_instance(world, gateways):
    a, b, _ = gateways
    old, new = a.tunnel(id="1"), a.tunnel(id="2")
    a.serve(old, APP)
    a.away = True
    a.claims.release(old)
    claim = takeover.Claim(a.claims, new.agent, {APP: Route(APP, "http", new)}, lambda routes: None)
    assert claim.attempt()
    a.away, a.contact = False, 0
    a.renew()  # tells the board who has it now
    assert world.board.table._names[APP].owner == a.claims.owner(Route(APP, "http", new))
    assert not b.claim(b.tunnel(id="2"), APP).attempt()


def test_other_claims_wait_while_the_board_is_away(gateways):
    a, _, _ = gateways
    a.serve(a.tunnel("one"), APP)
    a.away = True
    routes = {WEB: Route(WEB, "http", a.tunnel("one"))}
    with pytest.raises(Undecided) as caught:
        a.claims.claim(routes)
    assert str(caught.value) == module.AWAY


def test_a_claim_that_waits_too_long_is_refused_in_words(gateways, monkeypatch):
    a, _, _ = gateways
    a.away = True
    monkeypatch.setattr(takeover, "UNDECIDED_TIMEOUT", -1)
    tunnel = a.tunnel("one")
    routes = {APP: Route(APP, "http", tunnel)}
    claim = takeover.Claim(a.claims, tunnel.agent, routes, lambda routes: None)
    with pytest.raises(NotDecided, match=f"cannot be decided now: {APP}: .*; try again"):
        claim.attempt()


def test_what_may_not_be_served_is_withheld_and_comes_back(world, gateways):
    a, _, _ = gateways
    a.serve(a.tunnel("one"), APP)
    a.serving = False
    a.claims.stop_serving()
    assert a.registry.lookup(APP) is None and a.registry.awaits(APP)
    assert a.registry.held() == {}
    a.contact = 0
    a.renew()
    a.serving = True
    a.claims.serve_again()
    assert a.registry.lookup(APP) is not None and not a.registry.awaits(APP)


def test_an_agent_whose_name_went_to_another_one_meanwhile_is_told(world, gateways):
    a, b, _ = gateways
    tunnel = a.tunnel("one")
    a.serve(tunnel, APP, WEB)
    a.serving = False
    a.claims.stop_serving()
    world.board.leave("a")  # as if it had been out of contact
    b.serve(b.tunnel("two"), APP)
    a.contact = 0
    a.renew()
    assert tunnel.replaced == [f"another agent has got {APP} meanwhile, at another gateway"]
    assert world.holders(WEB) == {"a"} and world.holders(APP) == {"b"}
    assert a.claims.figures().lost == 1


def test_names_that_the_board_has_for_this_gateway_and_nobody_uses_are_given_back(world, gateways):
    a, _, _ = gateways
    tunnel = a.tunnel("one")
    a.serve(tunnel, APP)
    a.away = True
    a.claims.release(tunnel)
    a.away, a.contact = False, 0
    a.renew()
    assert world.holders(APP) == set() and a.free == [APP]


def test_a_contact_that_the_board_does_not_know_begins_anew(world, gateways):
    a, _, _ = gateways
    world.board.leave("a")
    tunnel = a.tunnel("one")
    with pytest.raises(Undecided):
        a.claims.claim({APP: Route(APP, "http", tunnel)})
    with pytest.raises(Stale):
        a.work()
    a.contact = 0
    a.renew()
    a.work()
    a.claims.claim({APP: Route(APP, "http", tunnel)})
    assert world.holders(APP) == {"a"}


def test_a_silent_agent_is_asked_at_all_gateways_at_the_same_time(world, gateways):
    a, b, _ = gateways
    holders = [gateway.tunnel("one") for gateway in gateways]
    for gateway, holder in zip(gateways, holders, strict=True):
        gateway.serve(holder, APP)
    world.deliver()
    before = [holder.asked for holder in holders]
    assert not b.claim(b.tunnel("two"), APP).attempt()
    world.deliver()
    assert [holder.asked for holder in holders] == [count + 1 for count in before]
    a.claims._wanted.clear()
    a.claims.waited = lambda: [APP]  # an agent waits at the first one
    a.claims.tick()
    world.deliver()
    assert [holder.asked for holder in holders[1:]] == [count + 2 for count in before[1:]]


def test_an_agent_that_has_moved_has_its_old_gateway_look_after_it(world, gateways):
    a, b, _ = gateways
    old = a.tunnel("one")
    a.serve(old, APP)
    b.serve(b.tunnel("one"), APP)
    world.deliver()
    assert old.asked == 1


@pytest.mark.parametrize("names", [None, "app", [1, None, {}], {"a": 1}])
def test_messages_that_make_no_sense_are_passed_over(gateways, names):
    a, _, _ = gateways
    for hear in (a.claims.hear_ask, a.claims.hear_alive, a.claims.hear_free):
        hear({"names": names, "from": 5})
    a.claims.tick()
