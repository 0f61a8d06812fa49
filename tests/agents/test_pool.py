"""Pools: who may join one, and which member gets a visit."""

import collections
import logging
import secrets
import types

import pytest
from hand_made import answering, registered, registration, reply_to
from support import APP, RAW, gateway_here, wait_until

from gotunnel import HALF_CLOSE, PARTIAL, POLICIES, POOLS, PORTS, REASONS, End
from gotunnel_server import metrics, status
from gotunnel_server.agents import heartbeat
from gotunnel_server.agents.identity import Identity
from gotunnel_server.agents.pool import (
    FIRST_PASS,
    MOST_MEMBERS,
    MOST_PASS,
    with_pool,
)
from gotunnel_server.agents.registration import Agent, Pooled
from gotunnel_server.dashboard import page
from gotunnel_server.routes import ADDRESS, COOKIE, HostnameTaken, Registry, Route

TAKEN = f"host already registered: {APP}"
ASKS = {"features": (POOLS,), "pools": {APP: {}}}


# The choice


class Tunnel:
    """An agent of a pool, as far as the choice looks at it."""

    def __init__(self, name, issuer="test"):
        identity = Identity(issuer=issuer, hosts=None, entry=None, secret=None)
        self.agent = Agent(("192.0.2.1", 1), identity, name)
        self.name = name
        self.heard_at = 0.0
        self.is_well = True

    def __str__(self):
        return f"<{self.name}>"

    def well(self, hostname):
        return self.is_well


class Clock:
    now = 100.0

    def __call__(self):
        return self.now


@pytest.fixture
def clock():
    return Clock()


def route_of(
    name, hostname=APP, mode="http", weight=1, sticky="", policy=None, issuer="test", read_by=None
):
    tunnel = Tunnel(name, issuer)
    pooled = Pooled(weight, sticky, policy, read_by)
    return with_pool(Route(hostname, mode, tunnel), pooled, tunnel.agent)


def pool_of(*weights, sticky="", clock=None):
    """A Pool with the members "0", "1" ..."""
    pool = None
    for name, weight in enumerate(weights):
        route = route_of(str(name), weight=weight, sticky=sticky)
        pool = route.pool if pool is None else pool.joined(route, route.pool).pool
    if clock is not None:
        pool._now = clock
    return pool


def names(members):
    return "".join(member.route.tunnel.name for member in members)


def test_visits_go_to_the_member_with_the_fewest():
    pool = pool_of(1, 1, 1)
    members = [pool.choose() for _ in range(3)]
    assert sorted(names(members)) == ["0", "1", "2"]
    for member in members:
        pool.leave(member)
        assert pool.choose() is member
    assert [member.visits for member in pool.members] == [1, 1, 1]


def test_equal_members_take_turns():
    pool = pool_of(1, 1, 1)
    chosen = []
    for _ in range(6):
        chosen.append(pool.choose())
        pool.leave(chosen[-1])
    assert names(chosen) == "012012"


@pytest.mark.parametrize("weights", [(3, 1), (1, 3), (5, 1, 2), (100, 1)])
def test_a_member_gets_visits_by_its_weight(weights):
    one_by_one, at_once = pool_of(*weights), pool_of(*weights)
    chosen = []
    for _ in range(sum(weights) * 2):
        chosen.append(one_by_one.choose())
        one_by_one.leave(chosen[-1])
        at_once.choose()
    counts = collections.Counter(names(chosen))
    assert [counts[str(name)] for name in range(len(weights))] == [2 * w for w in weights]
    assert [member.visits for member in at_once.members] == [2 * w for w in weights]


def test_a_heavy_member_does_not_get_its_visits_in_a_row():
    pool = pool_of(4, 1, 1)
    chosen = []
    for _ in range(6):
        chosen.append(pool.choose())
        pool.leave(chosen[-1])
    assert names(chosen) == "001020"


def test_a_member_that_was_tried_is_not_chosen_again():
    pool = pool_of(1, 1)
    first = pool.choose()
    second = pool.choose("", [first])
    assert names([first, second]) == "01"
    assert pool.choose("", [first, second]) is None
    assert [member.visits for member in pool.members] == [1, 1]


def chosen(pool, count=4):
    """Whom so many visits get that come one after the other."""
    found = []
    for _ in range(count):
        found.append(pool.choose())
        pool.leave(found[-1])
    return set(names(found))


def test_a_member_that_is_not_well_is_passed_over():
    pool = pool_of(1, 1)
    tunnel = pool.members[0].route.tunnel
    tunnel.is_well = False
    assert chosen(pool) == {"1"} and pool.well()
    pool.members[1].route.tunnel.is_well = False
    assert chosen(pool) == {"0", "1"} and not pool.well()
    tunnel.is_well = True
    assert chosen(pool) == {"0"}


def test_a_silent_member_is_passed_over_until_it_is_heard(clock):
    pool = pool_of(1, 1, clock=clock)
    silent = pool.members[0]
    pool.silent(silent)
    assert chosen(pool) == {"1"} and not silent.is_ready
    silent.route.tunnel.heard_at = clock.now + 1
    assert chosen(pool) == {"0", "1"}


def test_a_member_whose_target_was_refused_is_passed_over_for_a_while(clock):
    pool = pool_of(1, 1, clock=clock)
    refused = pool.members[0]
    seconds = []
    for _ in range(8):
        pool.refused(refused)
        assert chosen(pool) == {"1"}
        seconds.append(refused.passed_until - clock.now)
        clock.now = refused.passed_until
    assert seconds[:3] == [FIRST_PASS, 2 * FIRST_PASS, 4 * FIRST_PASS]
    assert seconds[-1] == MOST_PASS
    pool.reached(refused)
    assert chosen(pool) == {"0", "1"}


def test_one_visit_tries_a_member_that_was_passed_over(clock):
    pool = pool_of(1, 1, clock=clock)
    pool.refused(pool.members[0])
    clock.now += FIRST_PASS
    assert chosen(pool, 1) == {"0"}
    assert chosen(pool) == {"1"}  # as long as the first one has no answer


def test_if_all_are_passed_over_those_with_the_least_against_them_serve(clock):
    pool = pool_of(1, 1, 1, clock=clock)
    pool.members[0].route.tunnel.is_well = False
    pool.silent(pool.members[1])
    pool.refused(pool.members[2])
    assert chosen(pool) == {"2"}
    pool.silent(pool.members[2])
    assert chosen(pool) == {"1"}


def test_a_cookie_leads_to_its_member():
    pool = pool_of(1, 1, 1, sticky=COOKIE)
    token = pool.members[2].token
    assert names(pool.choose(pool.key("192.0.2.7", token)) for _ in range(3)) == "222"
    pool.members[2].route.tunnel.is_well = False
    assert names([pool.choose(token)]) == "0"


@pytest.mark.parametrize("token", ["", "x", "0", "é", "a" * 32])
def test_a_token_that_is_none_leads_nowhere_in_particular(token):
    pool = pool_of(1, 1, sticky=COOKIE)
    found = [pool.choose(pool.key("192.0.2.7", token)) for _ in range(4)]
    assert sorted(names(found)) == ["0", "0", "1", "1"]


def test_tokens_differ_by_agent_and_hostname_and_show_neither():
    made = [route_of(name, host) for name in ("a", "b") for host in (APP, "other.localhost")]
    tokens = {route.pool.members[0].token for route in made}
    assert len(tokens) == 4
    assert all(len(token) == 32 and int(token, 16) >= 0 for token in tokens)
    assert route_of("a").pool.members[0].token in tokens  # at each gateway the same


def addresses(count):
    return [f"192.0.{number // 250}.{number % 250}" for number in range(count)]


def by_address(pool, count=2000):
    return {address: names([pool.choose(pool.key(address))]) for address in addresses(count)}


def test_an_address_leads_to_the_same_member():
    pool = pool_of(1, 1, 2, sticky=ADDRESS)
    first = by_address(pool)
    assert by_address(pool) == first
    counts = collections.Counter(first.values())
    assert counts["2"] > 1.6 * max(counts["0"], counts["1"])
    assert min(counts["0"], counts["1"]) > 300
    assert pool.key("2001:db8::1") == pool.key("2001:db8::2") != pool.key("2001:db8:0:1::1")


def test_a_member_that_comes_or_goes_moves_no_other_members_visitors():
    three, two = pool_of(1, 1, 1, sticky=ADDRESS), pool_of(1, 1, sticky=ADDRESS)
    before, after = by_address(three), by_address(two)
    moved = {address for address in before if before[address] != after[address]}
    assert moved == {address for address, name in before.items() if name == "2"}


def test_a_pool_without_stickiness_has_no_keys():
    assert pool_of(1).key("192.0.2.7", "token") == ""
    assert pool_of(1, sticky=COOKIE).key("192.0.2.7") == ""
    assert pool_of(1, sticky=ADDRESS).key("") == ""


def test_a_visitor_whose_login_is_bound_to_an_agents_stream_stays_there():
    pool = pool_of(1, 1, sticky=COOKIE)
    tunnel = pool.members[1].route.tunnel
    token = pool.members[0].token
    assert names(pool.choose(token, (), tunnel) for _ in range(3)) == "111"
    assert names([pool.choose(token, [pool.members[1]], tunnel)]) == "0"
    assert names([pool.choose(token, (), object())]) == "0"


def test_an_incident_of_a_member_is_logged_once(clock, caplog):
    caplog.set_level(logging.INFO)
    pool = pool_of(1, 1, clock=clock)
    for _ in range(3):
        pool.refused(pool.members[0])
        pool.silent(pool.members[1])
    for _ in range(3):
        pool.reached(pool.members[0])
    assert [record.getMessage().partition("> ")[2] for record in caplog.records] == [
        "did not reach its target, and is passed over at times until it does",
        "is silent, and is passed over until something comes from it",
        "reaches its target again",
    ]


# The table of routes


@pytest.fixture
def registry():
    return Registry(reserved=["gw.localhost"])


def claim(registry, *routes):
    registry.claim({route.hostname: route for route in routes})


def members(registry, hostname=APP):
    route = registry.lookup(hostname)
    return "" if route is None else names(route.pool.members)


def test_agents_join_and_leave(registry):
    a, b, c = map(route_of, "abc")
    for route in (a, b, c):
        claim(registry, route)
    assert members(registry) == "abc"
    registry.release(a.tunnel)
    assert members(registry) == "bc" and registry.lookup(APP).tunnel is b.tunnel
    claim(registry, a)
    registry.release(b.tunnel)
    registry.release(c.tunnel)
    assert members(registry) == "a" and not registry.awaits(APP)
    registry.release(a.tunnel)
    assert registry.lookup(APP) is None and registry.awaits(APP)


def test_a_visit_is_counted_also_when_its_pool_was_replaced_meanwhile(registry):
    claim(registry, route_of("a"))
    pool = registry.lookup(APP).pool
    member = pool.choose()
    claim(registry, route_of("b"))
    now = registry.lookup(APP).pool
    assert names([now.choose()]) == "b"
    pool.leave(member)
    assert names([now.choose()]) == "a"


def test_the_first_policy_and_its_counts_stay(registry):
    a, b, c = (route_of(name, policy={"deny": ["192.0.2.9"]}) for name in "abc")
    policy = object()
    claim(registry, a._replace(policy=policy))
    claim(registry, b._replace(policy=object()))
    registry.release(a.tunnel)
    claim(registry, c._replace(policy=object()))
    assert registry.lookup(APP).policy is policy


def test_a_port_is_the_hostnames(registry):
    a, b = route_of("a", RAW, "tcp"), route_of("b", RAW, "tcp")
    claim(registry, a)
    claim(registry, b)
    registry.update({RAW: b._replace(port=2222)})
    assert registry.lookup(RAW).port == 2222
    assert [member.route.port for member in registry.lookup(RAW).pool.members] == [None, 2222]
    registry.release(b.tunnel)
    assert registry.lookup(RAW).port is None


def test_update_of_a_tunnel_that_has_left_changes_nothing(registry):
    a, b = route_of("a"), route_of("b")
    claim(registry, a)
    registry.update({APP: b._replace(target="new")})
    assert members(registry) == "a" and registry.lookup(APP).target == ""


def test_a_newcomer_brings_the_gateways_new_defaults(registry):
    old, new = object(), object()
    a, b = route_of("a", read_by=old), route_of("b", read_by=old)
    c, d = route_of("c", read_by=new), route_of("d", read_by=new)
    for route, policy in ((a, "first"), (b, "second"), (c, "third"), (d, "fourth")):
        claim(registry, with_policy(route, policy))
    assert registry.lookup(APP).policy == "third"
    registry.release(c.tunnel)
    assert registry.lookup(APP).policy == "third"


def with_policy(route, policy):
    (member,) = route.pool.members
    member.route = member.route._replace(policy=policy)
    return route._replace(policy=policy)


PLAIN = Route(APP, "http", Tunnel("plain"))
JOINS = {
    "the same": (route_of("a"), route_of("b"), None),
    "other weights": (route_of("a"), route_of("b", weight=9), None),
    "the same policy": (route_of("a", policy={"x": [1]}), route_of("b", policy={"x": [1]}), None),
    "the same policy, written otherwise": (
        route_of("a", policy={"rate_limit": {"total": 5, "per_address": 1}}),
        route_of("b", policy={"rate_limit": {"per_address": 1.0, "total": 5.0}}),
        None,
    ),
    "no pool there": (PLAIN, route_of("b"), ""),
    "none wanted": (route_of("a"), PLAIN, ""),
    "the same process": (route_of("a"), route_of("a"), ""),
    "another credential": (
        route_of("a"), route_of("b", issuer="other"), "by a pool of another credential",
    ),
    "another mode": (
        route_of("a"), route_of("b", mode="tcp"),
        "by a pool with mode http, and this agent has tcp",
    ),
    "another stickiness": (
        route_of("a"), route_of("b", sticky=COOKIE),
        "by a pool with sticky off, and this agent has cookie",
    ),
    "another policy": (
        route_of("a", policy={"deny": [], "allow": []}), route_of("b", policy={"allow": []}),
        "by a pool with another policy (deny): the agents of a pool need the same one",
    ),
    "no policy": (
        route_of("a", policy={"basic_auth": ["user:$scrypt$..."]}), route_of("b"),
        "by a pool with another policy (basic_auth): the agents of a pool need the same one",
    ),
}  # fmt: skip


@pytest.mark.parametrize("there, newcomer, why", JOINS.values(), ids=JOINS)
def test_those_that_may_join_are_one_owner_of_a_claim(there, newcomer, why):
    """Other gateways compare only that."""
    if there.pool is not None and newcomer.pool is not None:
        same = why is None or there.tunnel.name == newcomer.tunnel.name
        assert (there.pool.owner == newcomer.pool.owner) is same


@pytest.mark.parametrize("there, newcomer, why", JOINS.values(), ids=JOINS)
def test_who_may_join(registry, there, newcomer, why):
    claim(registry, there)
    if why is None:
        claim(registry, newcomer)
        assert members(registry) == "ab"
        return
    with pytest.raises(HostnameTaken) as taken:
        claim(registry, newcomer)
    assert str(taken.value) == TAKEN + (f", {why}" if why else "")
    assert taken.value.tunnels == {there.tunnel}
    assert taken.value.one_by_one() == {APP: str(taken.value)}
    assert str(taken.value.of(there.tunnel)) == str(taken.value)
    assert registry.lookup(APP) == there


def test_a_pool_has_a_limit(registry):
    for number in range(MOST_MEMBERS):
        claim(registry, route_of(str(number)))
    with pytest.raises(HostnameTaken, match=f"by a pool of {MOST_MEMBERS} agents"):
        claim(registry, route_of("one more"))


def test_an_agent_that_comes_back_takes_the_place_of_its_old_session(registry):
    a, b, again = route_of("a"), route_of("b"), route_of("a")
    claim(registry, a)
    claim(registry, b)
    with pytest.raises(HostnameTaken) as taken:
        claim(registry, again)
    assert taken.value.tunnels == {a.tunnel}
    registry.claim({APP: again}, instead_of=taken.value.tunnels)
    assert members(registry) == "ba"


def test_a_claim_that_is_not_permitted_joins_nothing(registry):
    claim(registry, route_of("a"))

    def permit(routes):
        assert len(routes) == 1  # a pool is one hostname
        raise ValueError

    with pytest.raises(ValueError):
        registry.claim({APP: route_of("b")}, permit)
    assert members(registry) == "a"


# With a gateway


@pytest.fixture
def gateway(cache):
    with gateway_here(cache, TCP_PORTS="20000-30000") as gateway:
        yield gateway


def pooled(gateway, *hostnames, pool={}, **more):
    """An agent that asks for a pool."""
    more.setdefault("instance", secrets.token_hex(16))
    features = (POOLS, *more.pop("features", ()))
    pools = dict.fromkeys(hostnames, pool)
    return registered(gateway, *hostnames, features=features, pools=pools, **more)


def test_agents_of_one_credential_share_a_hostname(gateway):
    with pooled(gateway, APP), pooled(gateway, APP):
        assert len(gateway.inner._registry.lookup(APP).tunnels()) == 2
    wait_until(lambda: gateway.inner._registry.lookup(APP) is None)


def test_an_agent_that_does_not_ask_for_a_pool_is_refused_as_ever(gateway):
    with pooled(gateway, APP) as agent, answering(agent):
        assert reply_to(gateway, registration(APP)).error == TAKEN


def test_an_agent_with_another_policy_is_refused_while_those_of_the_pool_live(gateway):
    with pooled(gateway, APP) as agent, answering(agent):
        message = registration(
            APP,
            features=(POOLS, POLICIES),
            pools={APP: {}},
            policies={APP: {"deny": ["192.0.2.1"]}},
            instance="other",
        )
        error = reply_to(gateway, message).error
        assert error.startswith(f"{TAKEN}, by a pool with another policy (deny)")


def test_the_other_hostnames_of_an_agent_that_differs_are_served(gateway):
    with pooled(gateway, APP) as agent, answering(agent):
        message = registration(
            APP,
            "other.localhost",
            features=(POOLS, PARTIAL),
            pools={APP: {"sticky": "address"}, "other.localhost": {}},
            instance="other",
        )
        ack = reply_to(gateway, message)
        assert ack.ok and ack.denied == {
            APP: f"{TAKEN}, by a pool with sticky off, and this agent has address"
        }


def test_a_session_that_is_dead_gives_way_to_an_agent_that_differs(gateway, monkeypatch):
    monkeypatch.setattr(heartbeat, "ANSWER_TIMEOUT", 0.5)
    monkeypatch.setattr(heartbeat, "SIGN_OF_LIFE", 0.2)
    with pooled(gateway, APP):
        with pooled(gateway, APP, pool={"sticky": "cookie"}):
            assert gateway.inner._registry.lookup(APP).pool.sticky == COOKIE


def test_an_agent_that_comes_back_is_in_the_pool_once(gateway):
    with pooled(gateway, APP, instance="one"), pooled(gateway, APP, instance="two"):
        with pooled(gateway, APP, instance="one"):
            assert len(gateway.inner._registry.lookup(APP).tunnels()) == 2


WRONG = {
    "text": ("x", "expected an object"),
    "unknown key": ({"size": 2}, "expected an object with weight, sticky, or none"),
    "weight 0": ({"weight": 0}, "weight: expected a whole number from 1 to 100"),
    "weight 101": ({"weight": 101}, "weight: expected a whole number from 1 to 100"),
    "weight 1.5": ({"weight": 1.5}, "weight: expected a whole number from 1 to 100"),
    "weight true": ({"weight": True}, "weight: expected a whole number from 1 to 100"),
    "sticky": ({"sticky": "ip"}, "sticky: expected cookie or address"),
    "sticky list": ({"sticky": []}, "sticky: expected cookie or address"),
}


@pytest.mark.parametrize("pool, why", WRONG.values(), ids=WRONG)
def test_a_wrong_pool_is_refused(gateway, pool, why):
    message = registration(APP, features=(POOLS,), pools={APP: pool}, instance="one")
    error = reply_to(gateway, message).error
    assert error.startswith(f"invalid pool of {APP}: ") and why in error


def test_a_pool_without_instance_is_refused(gateway):
    error = reply_to(gateway, registration(APP, **ASKS)).error
    assert error == f"invalid pool of {APP}: its agents need an instance"


def test_cookies_are_for_http(gateway):
    message = registration(
        RAW, modes={RAW: "tcp"}, features=(POOLS,), pools={RAW: {"sticky": "cookie"}}, instance="a"
    )
    assert reply_to(gateway, message).error == (
        f"invalid pool of {RAW}: sticky: mode tcp has no cookies"
    )


def test_a_pool_shares_its_port(gateway):
    tcp = {"modes": {RAW: "tcp"}, "features": (PORTS, HALF_CLOSE)}
    registry, ports = gateway.inner._registry, gateway.inner._ports
    with pooled(gateway, RAW, ports={RAW: "auto"}, **tcp):
        (port,) = ports.hostnames()
        for wanted in ("auto", str(port)):
            with pooled(gateway, RAW, ports={RAW: wanted}, **tcp):
                assert ports.hostnames() == {port: RAW}
                assert registry.lookup(RAW).port == port
            wait_until(lambda: len(registry.lookup(RAW).tunnels()) == 1)
        with pooled(gateway, RAW, ports={RAW: "auto"}, **tcp) as last:
            registry.lookup(RAW).tunnel.end("a test")  # the first one
            wait_until(lambda: len(registry.lookup(RAW).tunnels()) == 1)
            assert ports.hostnames() == {port: RAW} and registry.lookup(RAW).port == port
            assert not last.session.ended
    wait_until(lambda: not ports.hostnames())


def test_an_agent_of_a_pool_that_is_silent_is_told_that_and_not_that_it_was_replaced(
    gateway, monkeypatch
):
    monkeypatch.setattr(heartbeat, "ANSWER_TIMEOUT", 0.2)
    monkeypatch.setattr(heartbeat, "SIGN_OF_LIFE", 0.1)
    with pooled(gateway, APP, features=(REASONS,)) as agent:
        gateway.inner._registry.lookup(APP).tunnel.ask()
        while not isinstance(end := agent.hear(), End):
            pass
        assert (end.code, end.reason) == ("silent", "its agent did not answer in 0.2 s")


def test_the_members_are_shown(gateway):
    inner = gateway.inner
    with pooled(gateway, APP, pool={"weight": 3}), pooled(gateway, APP):
        pool = inner._registry.lookup(APP).pool
        pool.choose()
        pool.refused(pool.members[1])
        told = status.document_of(inner.tunnels.registered(), (), inner.keeper.state)
        assert [row["pool"] for row in told["hostnames"]] == [
            {"weight": 3, "visits": 1, "state": "ready"},
            {"weight": 1, "visits": 0, "state": "passed over"},
        ]
        shown = status.of_document(told)["hostnames"]
        assert [row["pool"] for row in shown] == ["ready, 1 now", "passed over, 0 now"]
        assert '<small class="quiet">passed over, 0 now</small>' in page._tables(told, "")
        parts = types.SimpleNamespace(tunnels=inner.tunnels)
        (metric,) = metrics._pools(parts)
        assert {dict(sample.labels)["state"]: sample.value for sample in metric.samples} == {
            "passed over": 1, "ready": 1,
        }  # fmt: skip


def test_a_gateway_without_pools_shows_none(gateway):
    inner = gateway.inner
    with registered(gateway, APP):
        told = status.document_of(inner.tunnels.registered(), (), inner.keeper.state)
        assert told["hostnames"][0]["pool"] is None
        assert "pool" not in status.of_document(told)["hostnames"][0]
        assert not list(metrics._pools(types.SimpleNamespace(tunnels=inner.tunnels)))
