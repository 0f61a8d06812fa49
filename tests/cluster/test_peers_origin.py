"""What a gateway tells another one of its agents, as messages."""

from types import SimpleNamespace

import pytest

from gotunnel import MESSAGE_LIMIT, ProtocolError, decode_message, encode_message
from gotunnel_server.agents.agents_file import Entry, Limits
from gotunnel_server.agents.identity import Identity
from gotunnel_server.agents.registration import Agent, Terms, read_routes
from gotunnel_server.cluster.origin import Origin, OtherAgent, origin_of, registers
from gotunnel_server.routes import Route
from gotunnel_server.visitors import policy

LIMITS = Limits(streams=5, orders_per_hour=2)
TERMS = Terms(MESSAGE_LIMIT, policy.read, speaks_http2=True)
OF_FILE = Identity("web", ("*.test",), entry=Entry("secret", ("*.test",), limits=LIMITS))
SHARED = Identity("mytunnel")


def tunnel_of(identity=SHARED, policies={}, **more):
    agent = Agent(("2001:db8:0:1::7", 5), identity, "")
    return SimpleNamespace(**{
        "id": "a1b2", "agent": agent, "half_close": True, "upgrades": False, "since": 1.5,
        "policies": policies,
    } | more)  # fmt: skip


def told(message):
    """What the other gateway reads of a message."""
    message = decode_message(encode_message(message).rstrip())
    agent = OtherAgent(Origin.decode(message.token), "gw1")
    return message, agent, read_routes(message, agent.identity, TERMS)


@pytest.mark.parametrize("identity", [OF_FILE, SHARED])
def test_the_agent_is_the_same_there_for_all_that_is_counted(identity):
    tunnel = tunnel_of(identity)
    _, agent, _ = told(*registers(tunnel, {"a.test": Route("a.test", "http", tunnel)}))
    assert agent.identity.credential == identity.credential
    assert agent.blame == tunnel.agent.blame
    assert agent.identity.limits == Limits(
        orders_per_hour=identity.limits.orders_per_hour
    )  # its streams are counted where it is
    assert agent.identity.name == f"{identity.issuer} via gw1"
    assert origin_of(tunnel).limited is (identity is OF_FILE)


def test_a_route_is_the_same_there():
    tunnel = tunnel_of()
    routes = {
        "a.test": Route("A.Test", "http", tunnel, "target.local", protocol="h2c", target="x:80"),
        "*.dev.test": Route("*.dev.test", "tcp", tunnel, addressed=True, target="db:5432"),
    }
    message, _, asked = told(*registers(tunnel, routes))
    assert message.instance == "a1b2.0" and "half_close" in message.features
    assert "upgrades" not in message.features and asked.denied == {}
    there = {name: wanted.route(tunnel) for name, wanted in asked.routes.items()}
    assert there == {
        "a.test": routes["a.test"]._replace(hostname="a.test", target_port=80),
        "*.dev.test": routes["*.dev.test"]._replace(target_port=5432),
    }


@pytest.mark.parametrize(("sticky", "addressed"), [("", False), ("cookie", True)])
def test_the_choice_of_a_pools_agent_needs_the_visitors_address(sticky, addressed):
    tunnel = tunnel_of()
    pool = SimpleNamespace(sticky=sticky)
    route = Route("a.test", "http", tunnel, pool=pool)
    _, _, asked = told(*registers(tunnel, {"a.test": route}))
    assert asked.routes["a.test"].addressed is addressed


def test_a_policy_goes_along_as_the_agent_sent_it():
    wire = {"deny": ["192.0.2.0/24"]}
    tunnel = tunnel_of(policies={"a.test": wire, "other.test": wire})
    message, _, asked = told(*registers(tunnel, {"a.test": Route("a.test", "http", tunnel)}))
    assert message.policies == {"a.test": wire}
    assert asked.routes["a.test"].policy is not None


def test_many_hostnames_are_told_in_messages_that_are_short_enough():
    tunnel = tunnel_of()
    names = [f"{'x' * 60}.{number}.test" for number in range(3000)]
    routes = {name: Route(name, "http", tunnel, target="127.0.0.1:80") for name in names}
    messages = list(registers(tunnel, routes))
    assert [message.instance for message in messages] == [f"a1b2.{n}" for n in range(len(messages))]
    assert all(len(encode_message(message)) <= MESSAGE_LIMIT for message in messages)
    assert sorted(name for message in messages for name in message.routes) == sorted(names)
    assert len(messages) <= 16  # 3000 of 100 bytes take five; halves take eight


def test_an_agent_with_a_huge_policy_does_not_break_the_connection_of_peers():
    """It would be told again after each new connection, and that would end again: no visit to any
    agent would be passed on."""
    users = [
        f"{'é' * 100}{number}:{'x' * 80}" for number in range(100)
    ]  # escaped, each é takes six
    tunnel = tunnel_of(policies={"a.test": {"basic_auth": users}})
    routes = {name: Route(name, "http", tunnel) for name in ("a.test", "b.test", "c.test")}
    messages = list(registers(tunnel, routes))
    assert all(len(encode_message(message)) <= MESSAGE_LIMIT for message in messages)
    assert sorted(name for message in messages for name in message.routes) == ["b.test", "c.test"]
    assert [message.instance for message in messages] == [f"a1b2.{n}" for n in range(len(messages))]
    huge = tunnel_of(Identity('"' * 30_000))
    assert not [*registers(huge, {"a.test": Route("a.test", "http", huge)})]


@pytest.mark.parametrize(
    "token", ["", "x", "{}", "[]", "[1,2,3]", '["a","b",true,[null,"x"],false,0]', "[" * 9999,
              '["a","b",true,[1],false,0]', '["a","b",true,[1,2],false,"x"]',
              f'["a","b",true,[1,2],false,1{"0" * 400}]']
)  # fmt: skip
def test_a_token_that_names_no_agent_is_refused(token):
    with pytest.raises(ProtocolError, match="names no agent"):
        Origin.decode(token)
