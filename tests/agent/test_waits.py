"""What an agent does while another one serves its hostnames, by a gateway that is made by hand."""

import logging
import types

import pytest
from support import APP, TIMEOUT, agent_here, wait_until
from test_agent import HandMadeGateway

from gotunnel import MOVE, OVERLAP, PARTIAL, WAITS, Ack, End, Free, encode_message
from gotunnel_agent import link as link_module
from gotunnel_agent.metrics import figures
from gotunnel_agent.quick.screen import _tunnels, target_of
from gotunnel_agent.status import describe

OTHER = "other.localhost"
FEATURES = (OVERLAP, PARTIAL, WAITS)
TAKEN = "host already registered"
IN_WAIT = f"waits for {APP}, which another agent serves"
DENIED = Ack(True, features=FEATURES, denied={APP: f"{TAKEN}: {APP}"})
GRANTED = Ack(True, features=FEATURES)


@pytest.fixture
def gateway(cache, monkeypatch):
    # No try by itself is due.
    monkeypatch.setattr(link_module, "retry_delay", lambda *arguments: 10 * TIMEOUT)
    monkeypatch.setattr(link_module, "FREE_PAUSE", 0.01)
    monkeypatch.setattr(link_module, "OLD_QUIET", 0.1)
    monkeypatch.setattr(link_module, "OLD_LOOK", 0.05)
    with HandMadeGateway(cache) as gateway:
        yield gateway


def free(gateway, *hostnames):
    gateway.control.write(encode_message(Free(hostnames)))


def test_agent_that_waits_for_all_dials_anew_when_it_hears_of_one(gateway, tmp_path, caplog):
    caplog.set_level(logging.INFO)
    with agent_here(gateway.place, tmp_path, {APP: 1}) as agent:
        assert WAITS in gateway.meet(DENIED).features
        waiting = gateway.session
        wait_until(lambda: agent.snapshot().waits == {APP})
        free(gateway, OTHER)  # not one of its hostnames
        free(gateway, APP)
        again = gateway.meet(GRANTED)
        assert again.overlap and WAITS in again.features and set(again.routes) == {APP}
        wait_until(lambda: f"serving {APP}" in caplog.text)
        wait_until(lambda: waiting.ended)
        assert set(agent.snapshot().routes) == {APP} and not agent.snapshot().waits
        gateway.hang_up()


def test_agent_that_is_too_late_says_nothing_and_waits_on(gateway, tmp_path, caplog):
    caplog.set_level(logging.INFO)
    with agent_here(gateway.place, tmp_path, {APP: 1}) as agent:
        for _ in range(3):
            gateway.meet(DENIED)
            wait_until(lambda: agent.snapshot().waits)
            free(gateway, APP)
        gateway.meet(DENIED)
        assert caplog.text.count(IN_WAIT) == 1 and "serving" not in caplog.text
        gateway.hang_up()


def test_agent_that_serves_others_asks_for_the_free_one_alone(gateway, tmp_path):
    with agent_here(gateway.place, tmp_path, {APP: 1, OTHER: 2}) as agent:
        gateway.meet(DENIED)
        wait_until(lambda: agent.snapshot().waits == {APP})
        assert set(agent.snapshot().routes) == {OTHER}
        free(gateway, APP)
        probe = gateway.meet(GRANTED)
        # A probe must not wait: the session that serves does.
        assert set(probe.routes) == {APP} and WAITS not in probe.features and probe.overlap
        assert set(gateway.meet(GRANTED).routes) == {APP, OTHER}
        wait_until(lambda: not agent.snapshot().waits)
        gateway.hang_up()


def test_gateway_that_says_without_end_that_a_hostname_is_free_is_asked_now_and_then(
    gateway, tmp_path, monkeypatch
):
    monkeypatch.setattr(link_module, "FREE_PAUSE", 10 * TIMEOUT)
    with agent_here(gateway.place, tmp_path, {APP: 1}) as agent:
        gateway.meet(DENIED)
        wait_until(lambda: agent.snapshot().waits)
        free(gateway, *[APP] * 3000)
        free(gateway, APP)
        wait_until(lambda: agent.link.service.freed)
        # Its dial would have come by now: the pause has begun, and lasts.
        assert agent.totals().sessions == 1
        gateway.hang_up()


def test_other_reason_than_another_agent_is_told_as_ever(gateway, tmp_path, caplog):
    reason = f"{TAKEN}: {APP}: by a pool with mode tcp"
    with agent_here(gateway.place, tmp_path, {APP: 1}):
        gateway.meet(Ack(True, features=FEATURES, denied={APP: reason}))
        line = f"{APP}: not served: the gateway refused: {reason}; the agent keeps asking for it"
        wait_until(lambda: line in caplog.text)
        gateway.hang_up()


def test_what_waits_is_shown(gateway, tmp_path):
    with agent_here(gateway.place, tmp_path, {APP: 1, OTHER: 2}) as agent:
        gateway.meet(DENIED)
        wait_until(lambda: agent.snapshot().waits)
        told = agent.snapshot()
        rows = {row["hostname"]: row for row in describe(told, "agent.yaml")["tunnels"]}
        assert not rows[APP]["served"] and rows[APP]["reason"] == IN_WAIT
        shown = {tunnel.url: tunnel.problem for tunnel in _tunnels(told, target_of)}
        assert shown == {f"https://{APP}": IN_WAIT, f"https://{OTHER}": ""}
        samples = {metric.name: list(metric.samples) for metric in figures(agent)}
        assert samples["gotunnel_agent_waiting_tunnels"][0].value == 1
        gateway.hang_up()


def test_agent_with_nothing_but_hope_has_a_state_of_its_own(gateway, tmp_path):
    with agent_here(gateway.place, tmp_path, {APP: 1}) as agent:
        gateway.meet(DENIED)
        wait_until(lambda: agent.snapshot().waits)
        assert describe(agent.snapshot(), "agent.yaml")["state"] == "waiting"
        gateway.hang_up()


def test_program_that_wants_to_hear_of_a_refusal_does_not_wait(gateway, tmp_path, monkeypatch):
    monkeypatch.setattr(link_module, "MOVED", 0)
    with agent_here(gateway.place, tmp_path, {APP: 1}) as agent:
        gateway.meet(Ack(True, features=(OVERLAP,)))
        agent.waits = False  # as commands without a file do
        gateway.control.write(encode_message(End(MOVE, "for a test")))
        assert WAITS not in gateway.meet(GRANTED).features
        gateway.hang_up()


def test_what_one_gateway_has_granted_is_asked_of_the_others(gateway, tmp_path):
    """Each tells one waiting agent after the other, and this one may be a later one there."""
    with agent_here(gateway.place, tmp_path, {APP: 1, OTHER: 2}) as agent:
        gateway.meet(DENIED)
        wait_until(lambda: agent.snapshot().waits == {APP})
        granted = types.SimpleNamespace(routes={APP: None, "third.localhost": None})
        agent.link._share(granted)
        assert set(gateway.meet(GRANTED).routes) == {APP}
        gateway.meet(GRANTED)
        agent.link._share(granted)  # nothing is waited for any more
        wait_until(lambda: not agent.snapshot().waits)
        gateway.hang_up()
