"""What the gateway makes of an agent's word on its targets: which visits are held back, and what
their visitors get."""

import logging
import types

import pytest
from hand_made import registered
from support import APP, CUT, RAW, agent_here, answer, gateway_here, request, wait_until

from gotunnel import HEALTH, Health
from gotunnel_agent.config import Health as Settings
from gotunnel_server.agents import heartbeat
from gotunnel_server.agents.health import MOST_REASON, NEWS, TargetHealth
from gotunnel_server.dashboard import state
from gotunnel_server.status import of_document

WHY = "503 for GET /healthz"
ROUTES = {
    "a.test": types.SimpleNamespace(hostname="A.test"),  # as its agent spells it
    "*.b.test": types.SimpleNamespace(hostname="*.b.test"),
}


# What is remembered ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("messages", "told"),
    [
        ([("a.test", False, WHY)], {"A.test": WHY}),
        ([("A.TEST", False, WHY)], {"A.test": WHY}),
        ([("a.test", True, WHY)], {"A.test": ""}),
        ([("a.test", False, "")], {"A.test": "no reason given"}),
        ([("a.test", False, WHY), ("a.test", True, "")], {"A.test": ""}),
        ([("*.b.test", False, WHY)], {"*.b.test": WHY}),
        ([("x.b.test", False, WHY), ("c.test", False, WHY), ("", False, WHY)], {}),
        ([("a.test", False, "a\nb\x1b[31m")], {"A.test": "a b [31m"}),
        ([("a.test", False, "x" * 9999)], {"A.test": "x" * (MOST_REASON - 3) + "..."}),
    ],
)
def test_last_word_on_each_hostname_of_the_session_counts(messages, told):
    health = TargetHealth("agent")
    health.note([Health(*message) for message in messages], ROUTES)
    assert health.told == told
    assert health.unwell() == {name: why for name, why in told.items() if why}


def test_target_that_changes_all_the_time_does_not_fill_the_log(caplog):
    health = TargetHealth("agent at 192.0.2.1")
    for number in range(10 * NEWS):
        health.note([Health("a.test", number % 2 == 1, WHY)], ROUTES)
    assert len(caplog.records) <= NEWS
    first = f"agent at 192.0.2.1: a.test: its target is not well: {WHY}; its visits are held back"
    assert caplog.messages[0] == first


# Through a gateway -------------------------------------------------------------------------------


@pytest.fixture
def gateway(cache, monkeypatch):
    monkeypatch.setattr(heartbeat, "LISTEN", 0.02)
    with gateway_here(cache) as gateway:
        yield gateway


def told(gateway, agent, hostname, ok, reason=WHY):
    """The agent tells how a target is, and the gateway has heard it."""
    (tunnel,) = gateway.inner.tunnels.registered()
    agent.say(Health(hostname, ok, reason))
    wait_until(lambda: tunnel.well(hostname) is ok)


def test_visitor_of_a_target_that_is_not_well_gets_a_page(gateway):
    with registered(gateway, APP, RAW, modes={RAW: "tcp"}, features=(HEALTH,)) as agent:
        told(gateway, agent, APP, False)
        with gateway.visitor(APP) as visitor:
            for accept in ("text/html", "application/json"):
                visitor.request("GET", "/", headers={"Accept": accept})
                found = visitor.getresponse()
                assert found.status == 503 and found.headers["X-Gotunnel-Error"] == "unhealthy"
                assert int(found.headers["Retry-After"]) > 0
                body = found.read().decode()
                assert "is not ready for visitors" in body and WHY not in body
        with gateway.dial(RAW) as visitor:  # another hostname of the same agent is served
            agent.session.accept()
            told(gateway, agent, RAW, False)
            with gateway.dial(RAW) as late, pytest.raises(CUT):
                late.read()
            visitor.send(b"still here")  # a visit that runs goes on
        with gateway.dial("gateway.localhost") as proxied:
            proxied.send(f"CONNECT {RAW}:1 HTTP/1.1\r\nHost: {RAW}:1\r\n\r\n".encode())
            assert proxied.read_message()[0].startswith(b"HTTP/1.1 503 ")
        told(gateway, agent, APP, True)
        with gateway.dial(APP) as visitor:
            visitor.send(request())
            agent.session.accept()


def test_visitor_who_may_not_come_in_does_not_learn_of_it(gateway):
    policies = {APP: {"deny": ["127.0.0.1"]}}
    features = (HEALTH, "policies")
    with registered(gateway, APP, features=features, policies=policies) as agent:
        told(gateway, agent, APP, False)
        assert gateway.get(APP)[0] == 403


def test_agent_that_did_not_name_the_feature_is_not_believed(gateway):
    with registered(gateway, APP) as agent:
        (tunnel,) = gateway.inner.tunnels.registered()
        tunnel._take_messages([Health(APP, False)])
        assert tunnel.well(APP) and not tunnel.unwell
        assert agent.session.ended == ""


def test_dashboard_and_metrics_show_it(gateway):
    with registered(gateway, APP, features=(HEALTH,)) as agent:
        facts = state.Facts("gateway.test", 443, "", "serving", 0, 0, 0)

        def row():
            document = state.full(
                facts, gateway.inner.tunnels.shown(), [], gateway.inner.keeper.state
            )
            (status,) = of_document(document)["hostnames"]
            assert status["health"] == document["hostnames"][0]["health"]
            return document["hostnames"][0]

        assert row()["health"] == ""
        told(gateway, agent, APP, False)
        assert (row()["health"], row()["health_reason"]) == ("failed", WHY)
        told(gateway, agent, APP, True)
        assert (row()["health"], row()["health_reason"]) == ("ok", "")


# With an agent of ours ---------------------------------------------------------------------------


def test_target_that_fails_and_comes_back(gateway, tmp_path, origin, caplog):
    """From the agent's look to the visitor, and back within an interval."""
    caplog.set_level(logging.INFO)
    status = [200]

    def script(target):
        head = target.read_head()
        is_look = head.startswith(b"GET /healthz ")
        assert not is_look or b"\r\nHost: app.localhost\r\n" in head
        found = answer(b"page")
        target.send(found.replace(b"200 OK", b"%d Told" % status[0]) if is_look else found)

    origin.serve(script)
    with agent_here(gateway, tmp_path, http={APP: origin.port}) as agent:
        assert gateway.get(APP)[0] == 200
        # The shortest interval of a configuration is a second.
        quick = Settings("/healthz", every=0.05, timeout=5, fails=2)
        tunnels = tuple(tunnel._replace(health=quick) for tunnel in agent.config.tunnels)
        agent.change(agent.config._replace(tunnels=tunnels))
        wait_until(lambda: agent.snapshot().health == {APP: ""})
        status[0] = 503
        wait_until(lambda: gateway.get(APP)[0] == 503)
        assert agent.snapshot().health == {APP: WHY}
        status[0] = 200
        wait_until(lambda: gateway.get(APP)[0] == 200)
    target = f"127.0.0.1:{origin.port}"
    line = f"{APP}: target {target} is not well: {WHY}; the gateway is told to send no visits"
    assert caplog.messages.count(line) == 1
    assert f"{APP}: target {target} is well again" in caplog.messages
    line = f"agent at 127.0.0.1: {APP}: its target is not well: {WHY}; its visits are held back"
    assert line in caplog.messages
    assert f"agent at 127.0.0.1: {APP}: its target is well again" in caplog.messages
