"""A stranger at the agents' port: its stages, the refusals, and what its registration waits for."""

import contextlib
import gc
import logging
import threading
import weakref
from time import monotonic, sleep
from types import SimpleNamespace

import pytest
from hand_made import HandMade, registered, registration, reply_to
from support import APP, TIMEOUT, answer, gateway_here, request, routes_of, wait_until

from gotunnel import Ack, NoThread
from gotunnel_server import capacity
from gotunnel_server.agents import newcomer
from gotunnel_server.agents.newcomer import (
    MOST_REFUSALS,
    RULES,
    Newcomer,
    Newcomers,
    Refusals,
    Stage,
)
from gotunnel_server.net.listener import FREE_WAITS


@pytest.fixture
def gateway(cache):
    with gateway_here(cache) as gateway:
        yield gateway


@contextlib.contextmanager
def hanging_disk(gateway, monkeypatch):
    """Registrations wait for the disk until the ``with`` ends. Yields the threads that wait."""
    waiting, may_go_on = [], threading.Event()

    def ensure_certificates(hostnames, agent, limits):
        waiting.append(threading.current_thread())
        may_go_on.wait()

    monkeypatch.setattr(gateway.inner.tunnels, "ensure_certificates", ensure_certificates)
    try:
        yield waiting
    finally:
        may_go_on.set()


def many_that_register(gateway, count, stack):
    """Agents whose hostnames are claimed, and that wait for their acks. ``stack`` closes them."""
    before = len(gateway.inner.tunnels.registry.routes())
    agents = [
        stack.enter_context(HandMade(gateway, registration(f"{number}.localhost")))
        for number in range(count)
    ]
    wait_until(lambda: len(gateway.inner.tunnels.registry.routes()) == before + count)
    return agents


def test_registrations_that_wait_for_the_disk_hold_up_no_visitor(gateway, monkeypatch):
    """As many as there are threads for handshakes."""
    with registered(gateway, APP) as served, contextlib.ExitStack() as stack:
        with hanging_disk(gateway, monkeypatch):
            many_that_register(gateway, capacity.STEP_THREADS, stack)
            with gateway.dial(APP) as visitor:
                visitor.send(request())
                served.session.accept(TIMEOUT).write(answer(b"served"))
                assert visitor.read_message()[1] == b"served"


def test_registrations_that_wait_for_the_disk_hold_up_no_refusal(gateway, monkeypatch):
    with contextlib.ExitStack() as stack, hanging_disk(gateway, monkeypatch):
        many_that_register(gateway, capacity.STEP_THREADS, stack)
        assert reply_to(gateway, registration()) == Ack(False, "no routes")


def test_registrations_that_had_to_wait_are_all_acknowledged(gateway, monkeypatch):
    count = capacity.REGISTRATION_THREADS + 5
    with contextlib.ExitStack() as stack:
        with hanging_disk(gateway, monkeypatch) as waiting:
            agents = many_that_register(gateway, count, stack)
            wait_until(lambda: len(waiting) == capacity.REGISTRATION_THREADS)
        assert [agent.hear() for agent in agents] == [Ack(True)] * count
        assert len(waiting) == count
        assert {thread.name.partition("_")[0] for thread in waiting} == {"registration"}


def test_an_agent_that_leaves_while_the_disk_hangs_holds_nothing(gateway, monkeypatch):
    with hanging_disk(gateway, monkeypatch) as waiting:
        with HandMade(gateway, registration(APP)):
            wait_until(lambda: waiting)
    wait_until(lambda: not gateway.inner.tunnels.registry.routes())
    assert routes_of(gateway.inner) == set()
    with registered(gateway, APP):
        pass


def test_connections_that_are_over_make_room_for_others(gateway):
    """Whether they were strangers, were refused, or served."""
    listener = gateway.inner._newcomers.listener
    with registered(gateway, APP):
        assert not reply_to(gateway, registration()).ok
        with HandMade(gateway):
            wait_until(lambda: listener.places.taken == 2)
        wait_until(lambda: listener.places.taken == 1)
        assert not gateway.inner._newcomers._newcomers
    wait_until(lambda: listener.places.taken == 0)
    assert not gateway.inner.tunnels.registered()


def test_an_agent_that_is_refused_its_hostname_makes_room_once(gateway, monkeypatch):
    """Its connection is its tunnel's by then."""
    monkeypatch.setattr(newcomer.takeover, "ENDING_TIMEOUT", -1)  # refused at the first look
    listener = gateway.inner._newcomers.listener
    with registered(gateway, APP):
        assert not reply_to(gateway, registration(APP)).ok
        wait_until(lambda: listener.places.taken <= 1)
        assert len(gateway.inner.tunnels._tunnels) == 1
    wait_until(lambda: listener.places.taken == 0)


def test_a_gateway_that_stops_while_agents_register_keeps_none_of_them(cache):
    """Wherever they are on their way from newcomer to tunnel."""
    stopped, progress = threading.Event(), [0] * 8

    def register_again_and_again(gateway, number):
        while not stopped.is_set():
            with contextlib.suppress(OSError):
                with HandMade(gateway, registration(f"{number}.localhost")) as agent:
                    agent.hear()
                    progress[number] += 1

    with gateway_here(cache) as gateway:
        threads = [
            threading.Thread(target=register_again_and_again, args=(gateway, number))
            for number in range(len(progress))
        ]
        for thread in threads:
            thread.start()
        try:
            wait_until(lambda: min(progress) > 1)
            gateway.inner.stop()
        finally:
            stopped.set()
            for thread in threads:
                thread.join()
        newcomers, tunnels = gateway.inner._newcomers, gateway.inner.tunnels
        assert not newcomers._newcomers and not tunnels._tunnels
        assert not tunnels.registry.routes()
        assert newcomers.listener.places.taken == 0


# Stages ------------------------------------------------------------------------------------------


def test_every_stage_but_the_last_has_a_step_and_can_be_reached():
    assert set(RULES) == set(Stage) - {Stage.OVER}
    first = {Stage.INTRODUCTION, Stage.HELLO}
    reached = {*first, *(stage for rule in RULES.values() for stage in rule.then)}
    assert reached == set(RULES)


def test_a_stage_that_may_not_follow_is_a_bug_and_is_not_entered():
    stranger = Newcomer(SimpleNamespace(proxies=()), None, ("192.0.2.1", 1), None)
    with pytest.raises(ValueError, match="ADMIT came after .*HELLO"):
        stranger._enter(Stage.ADMIT, stranger._admit)
    assert repr(stranger) == "<Newcomer 192.0.2.1 HELLO>"


def test_a_stranger_that_trickles_takes_few_steps(gateway, monkeypatch):
    """Byte by byte, each would take one; and it is registered all the same."""
    steps = []
    ready = Newcomer.ready
    monkeypatch.setattr(Newcomer, "ready", lambda self: (steps.append(1), ready(self)))
    message = registration(*(f"{number:060}.localhost" for number in range(4)))
    with HandMade(gateway, message[:1]) as agent:
        sent = 0
        for sent in range(1, 3 * FREE_WAITS):
            before = len(steps)
            agent.control.write(message[sent : sent + 1])
            # Until its step is taken, so that no two bytes share one; a slowed one takes none.
            until = monotonic() + 0.02
            while len(steps) == before and monotonic() < until:
                sleep(0.001)
        assert len(steps) < 2 * FREE_WAITS
        agent.control.write(message[sent + 1 :])
        assert agent.hear() == Ack(True)


def test_an_agent_for_which_there_is_no_thread_is_turned_away_and_said(caplog, monkeypatch):
    def admit(self):
        raise NoThread("no thread to be had: raise the limit (ulimit -u)")

    monkeypatch.setattr(Newcomer, "_read_hello", admit)
    closed = []
    duplex = SimpleNamespace(close=lambda: closed.append("connection"))
    newcomers = SimpleNamespace(proxies=(), forget=closed.append)
    stranger = Newcomer(newcomers, duplex, ("192.0.2.1", 1), None)
    stranger.ready()
    assert closed == ["connection", stranger]
    (line,) = warnings_in(caplog)
    assert line.endswith("(ulimit -u); the agent's connection is closed")


# Refusals ----------------------------------------------------------------------------------------


def warnings_in(caplog):
    return [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]


def test_no_more_refusals_are_remembered_than_there_is_room_for(caplog):
    caplog.set_level(logging.DEBUG)
    refusals = Refusals()
    for number in range(3 * MOST_REFUSALS):
        refusals.log(f"agent at {number}", "no routes")
    assert len(refusals._logged) == MOST_REFUSALS
    refusals.log("agent at 0", "no routes")  # forgotten, so it is news
    assert len(warnings_in(caplog)) == 3 * MOST_REFUSALS + 1


def test_a_trial_of_a_credential_is_no_warning_and_counts_as_no_refusal(gateway, caplog):
    caplog.set_level(logging.INFO)
    assert reply_to(gateway, registration()) == Ack(False, "no routes")
    assert "has tried its credential: it is good" in caplog.text
    assert warnings_in(caplog) == []
    assert gateway.inner._newcomers.refusals.total.value == 0


def test_a_refusal_is_a_warning_again_after_a_while(caplog, monkeypatch):
    now = [1000.0]
    monkeypatch.setattr(newcomer, "monotonic", lambda: now[0])
    refusals = Refusals()
    for text in ("the token expired 3 min ago", "the token expired 4 min ago"):
        refusals.log("agent", text)
    assert len(warnings_in(caplog)) == 1
    for seconds in (3600, 3602):
        refusals.log("another", f"expired 1 h ago: the agent's clock is {seconds} s behind the")
    assert len(warnings_in(caplog)) == 2
    now[0] += newcomer.REFUSAL_MEMORY + 1
    refusals.log("agent", "the token expired 15 min ago")
    assert warnings_in(caplog)[2:] == [
        "agent refused: the token expired 15 min ago (1 times more since the last such line)"
    ]


def test_connections_closed_unheard_are_counted_once_a_minute_for_each_address(caplog, monkeypatch):
    now = [1000.0]
    monkeypatch.setattr(newcomer, "monotonic", lambda: now[0])
    attempts = SimpleNamespace(may_open=lambda address: address == "192.0.2.9")
    newcomers = Newcomers(
        None, context=None, challenges=None, attempts=attempts, proxies=(), terms=None,
        submit=None,
    )  # fmt: skip
    for address in ["2001:db8::1", "192.0.2.1", *5 * ["2001:db8::2"]]:  # of one /64
        assert newcomers.welcome(None, (address, 1), None) is None
    now[0] += newcomer.TURNED_AWAY_SILENCE + 1
    assert newcomers.welcome(None, ("2001:db8::3", 1), None) is None
    assert newcomers.may_open("192.0.2.9")
    line = (
        "agents at %s: too many bad tokens came from there; %d more connections were closed at once"
    )
    assert warnings_in(caplog) == [
        line % ("2001:db8::1", 1),
        line % ("192.0.2.1", 1),
        line % ("2001:db8::3", 6),
    ]


def test_no_more_addresses_of_unheard_connections_are_remembered_than_there_is_room_for():
    refusals = Refusals()
    for number in range(2 * MOST_REFUSALS):
        refusals.count_turned_away(f"192.0.{number // 256}.{number % 256}")
    assert len(refusals._turned_away) == MOST_REFUSALS


def test_a_newcomer_that_is_over_is_freed_at_once(gateway, caplog):
    """Also its session, which holds memory: it must not wait for the cycle collector."""
    caplog.set_level(logging.INFO, "gotunnel.newcomer")  # records of others would hold it
    gc.disable()
    try:
        with HandMade(gateway):
            wait_until(lambda: gateway.inner._newcomers._newcomers)
            (left,) = map(weakref.ref, gateway.inner._newcomers._newcomers)
        wait_until(lambda: left() is None)
    finally:
        gc.enable()
