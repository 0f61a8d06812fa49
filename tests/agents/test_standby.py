"""Agents that wait for a hostname of another one: who is told when it is free, and who is watched
meanwhile; as a table, and through a whole gateway with agents of ours."""

import contextlib
import logging
import signal
import time

import pytest
from hand_made import HandMade, answering, registered, registration, reply_to
from support import (
    APP,
    TIMEOUT,
    agent_here,
    agent_process,
    answer,
    at_length,
    gateway_here,
    gateway_process,
    routes_of,
    wait_until,
)

from gotunnel import MOVE, OVERLAP, PARTIAL, REASONS, WAITS, Ack, End, Free, Ping, Pong
from gotunnel_agent import link as link_module
from gotunnel_server.agents import heartbeat, standby
from gotunnel_server.agents import tunnel as tunnel_module
from gotunnel_server.agents.standby import MOST_WAITING, Standby

OTHER = "other.localhost"
PATIENT = (PARTIAL, OVERLAP, WAITS)
IN_WAIT = f"waits for {APP}, which another agent serves"


# The table ---------------------------------------------------------------------------------------


class Holder:
    """Has hostnames. Also an agent's process, which is_same_process() compares."""

    def __init__(self, *hostnames):
        self.hostnames, self.watched = set(hostnames), []

    def holds(self, hostname):
        return hostname in self.hostnames

    def watch(self, watched):
        self.watched.append(watched)


class Process:
    def __init__(self, name):
        self.name = name

    def is_same_process(self, other):
        return self.name == other.name


class House:
    """A Standby, its registry, and the sessions that wait. They write down what they are told."""

    def __init__(self):
        self.table = Standby(self)
        self.held = {}  # hostname to the holder in the registry
        self.told = []  # (name of the session, hostname)
        self.timers = []

    def holders(self, hostname):
        return [self.held[hostname]] if hostname in self.held else []

    def session(self, name, process=None, deaf=False):
        house = self

        class Session:
            agent = Process(process or name)

            def tell_free(self, hostname):
                if not deaf:
                    house.told.append((name, hostname))
                return not deaf

            def call_later(self, seconds, function):
                assert seconds == standby.TURN
                house.timers.append(function)

        return Session()

    def waiting(self, *names, hostname="a", holder=None, **how):
        """Sessions that wait for a hostname, in this order."""
        holder = holder or Holder(hostname)
        sessions = [self.session(name, **how) for name in names]
        for session in sessions:
            assert self.table.wait(session, {hostname: holder})
        return (*sessions, holder)

    def pass_turn(self):
        timers, self.timers = self.timers, []
        for function in timers:
            function()

    def who(self):
        return "".join(name for name, _ in self.told)


@pytest.fixture
def house():
    return House()


def test_first_that_came_is_told_alone(house):
    house.waiting("1", "2", "3")
    house.table.freed(["a", "b"])
    assert house.told == [("1", "a")]


def test_next_one_is_told_if_the_hostname_is_still_free_after_a_turn(house):
    house.waiting("1", "2", "3")
    house.table.freed(["a"])
    for expected in ("12", "123", "123", "123"):  # each once
        house.pass_turn()
        assert house.who() == expected
    house.table.freed(["a"])  # another agent had it for a while
    assert house.who() == "1231"


def test_nobody_else_is_told_once_it_is_served_again(house):
    house.waiting("1", "2")
    house.table.freed(["a"])
    house.table.held({"a": Holder("a")})
    house.pass_turn()
    assert house.who() == "1"


def test_session_that_cannot_be_told_is_passed_over(house):
    house.waiting("1", deaf=True)
    house.waiting("2")
    house.table.freed(["a"])
    assert house.who() == "2"


def test_session_that_ends_gives_its_turn_to_the_next_one(house):
    first, second, _ = house.waiting("1", "2")
    house.table.freed(["a"])
    house.table.forget(first)
    assert house.who() == "12"
    house.table.forget(second)
    house.table.forget(second)  # a second time is no error
    assert not house.table.waited() and not house.table.waiting()


def test_session_that_ends_while_it_is_not_its_turn_changes_nothing(house):
    _, second, _ = house.waiting("1", "2")
    house.table.freed(["a"])
    house.table.forget(second)
    house.pass_turn()
    assert house.who() == "1"


def test_second_session_of_a_process_takes_its_place(house):
    first, _, holder = house.waiting("1", "2")
    again = house.session("1 again", process="1")
    assert house.table.wait(again, {"a": holder})
    house.table.forget(first)  # now the old one ends
    house.table.freed(["a"])
    assert house.told == [("1 again", "a")]
    assert house.table.knows(Process("1")) and not house.table.knows(Process("3"))


def test_hostname_that_was_freed_before_the_session_waits_is_told_at_once(house):
    house.waiting("1", holder=Holder())
    assert house.who() == "1"


def test_hostname_that_somebody_has_again_when_it_is_said_to_be_free(house):
    """Between the release and the call, another agent was quicker."""
    house.waiting("1")
    house.held["a"] = new = Holder("a")
    house.table.freed(["a"])
    assert not house.told and new.watched == [True]


def test_pool_that_has_the_hostname_may_be_joined_by_all(house):
    """Each that waits is told once, though one agent after the other joins."""
    house.waiting("1", "2", "3")
    house.table.held({"a": Holder("a")}, ["a"])
    assert house.who() == "123"
    again = house.session("3 again", process="3")  # it differs from the pool, so it waits on
    house.table.wait(again, {"a": Holder("a")})
    house.table.held({"a": Holder("a")}, ["a"])
    assert house.who() == "123"
    house.table.freed(["a"])
    assert house.who() == "1231"


def test_each_hostname_has_its_own_queue(house):
    both = house.session("1")
    house.table.wait(both, {"a": Holder("a"), "b": Holder("b")})
    house.waiting("2", hostname="b")
    house.table.freed(["b"])
    house.table.freed(["a"])
    assert house.told == [("1", "b"), ("1", "a")]
    assert house.table.waited() == {"a", "b"}
    house.table.forget(both)
    assert house.told[2:] == [("2", "b")]
    assert house.table.waited() == {"b"}


def test_holder_is_watched_while_somebody_waits_for_it(house):
    first, second, holder = house.waiting("1", "2")
    assert holder.watched == [True]
    house.table.forget(first)
    assert holder.watched == [True]
    house.table.held({"a": (new := Holder("a"))})
    assert holder.watched == [True, False] and new.watched == [True]
    house.table.forget(second)
    assert new.watched == [True, False]
    house.table.held({"a": (last := Holder("a"))})
    assert not last.watched  # nobody waits


def test_holder_of_two_hostnames_is_watched_once(house):
    holder = Holder("a", "b")
    first, _ = house.waiting("1", holder=holder)
    second, _ = house.waiting("2", hostname="b", holder=holder)
    house.table.forget(first)
    assert holder.watched == [True]
    house.table.forget(second)
    assert holder.watched == [True, False]


def test_only_so_many_wait(house):
    *_, last, holder = house.waiting(*map(str, range(MOST_WAITING)))
    one_more = house.session("more")
    assert not house.table.has_room() and not house.table.wait(one_more, {"a": holder})
    house.table.forget(last)
    assert house.table.wait(one_more, {"a": holder})


# Through a gateway, with agents made by hand -----------------------------------------------------


@pytest.fixture
def gateway(cache):
    with gateway_here(cache) as gateway:
        yield gateway


def patient(name, *hostnames):
    return registration(*(hostnames or (APP,)), features=PATIENT, instance=name)


def await_waiting(gateway, count):
    table = gateway.inner.tunnels.standby
    wait_until(lambda: len(table.waiting()) == count)


@contextlib.contextmanager
def in_wait(gateway, *names):
    """Agents that wait for APP, in this order."""
    with contextlib.ExitStack() as stack:
        agents = []
        for name in names:
            agents.append(stack.enter_context(HandMade(gateway, patient(name))))
            ack = agents[-1].hear()
            assert ack.ok and ack.denied == {APP: f"host already registered: {APP}"}
            assert WAITS in ack.features and not ack.urls
            await_waiting(gateway, len(agents))
        yield agents


def next_free(agent):
    """The Free that an agent hears next; it answers pings meanwhile."""
    while isinstance(message := agent.hear(), Ping):
        agent.say(Pong(1))
    return message


def test_agents_are_told_in_the_order_in_which_they_came(gateway, monkeypatch, caplog):
    caplog.set_level(logging.INFO)
    monkeypatch.setattr(standby, "TURN", 0.1)
    with registered(gateway, APP) as incumbent, answering(incumbent):
        with in_wait(gateway, "1", "2", "3") as agents:
            assert caplog.text.count(f"agent at 127.0.0.1 {IN_WAIT}") == 3
            assert routes_of(gateway.inner) == {APP}
            incumbent.session.close()
            assert next_free(agents[0]) == Free((APP,))
            # The first one does nothing, so the next one is told.
            assert next_free(agents[1]) == Free((APP,))
            with HandMade(gateway, patient("2")) as second:
                assert not second.hear().denied
                wait_until(lambda: routes_of(gateway.inner) == {APP})
    assert not gateway.inner.tunnels.standby.waiting()


@pytest.mark.parametrize("features", [(WAITS,), (PARTIAL,)])
def test_agent_that_does_not_know_all_of_it_is_refused(gateway, features):
    with registered(gateway, APP) as incumbent, answering(incumbent):
        ack = reply_to(gateway, registration(APP, features=features))
        assert not ack.ok and ack.error == f"host already registered: {APP}"


def test_agent_that_serves_others_waits_as_well(gateway):
    with registered(gateway, APP) as incumbent, answering(incumbent):
        with HandMade(gateway, patient("1", APP, OTHER)) as agent:
            ack = agent.hear()
            assert ack.ok and set(ack.denied) == {APP}
            wait_until(gateway.inner.tunnels.standby.waited)
            incumbent.session.leave(refuses=False)  # GO_AWAY frees it as well as the end
            assert next_free(agent) == Free((APP,))


def test_what_is_not_allowed_is_not_waited_for(gateway):
    with registered(gateway, APP) as incumbent, answering(incumbent):
        names = (APP, "not a name")
        with HandMade(gateway, patient("1", *names)) as agent:
            assert set(agent.hear().denied) == set(names)
            wait_until(lambda: gateway.inner.tunnels.standby.waited() == {APP})
        message = registration("gateway.localhost", features=PATIENT)
        assert not reply_to(gateway, message).ok


def test_hostname_is_spelled_as_the_agent_does(gateway):
    with registered(gateway, APP) as incumbent, answering(incumbent):
        with HandMade(gateway, patient("1", "App.LOCALHOST")) as agent:
            assert set(agent.hear().denied) == {"App.LOCALHOST"}
            wait_until(gateway.inner.tunnels.standby.waited)
            incumbent.session.close()
            assert next_free(agent) == Free(("App.LOCALHOST",))


def test_too_many_are_refused_as_without_waiting(gateway, monkeypatch):
    monkeypatch.setattr(standby, "MOST_WAITING", 1)
    with registered(gateway, APP) as incumbent, answering(incumbent):
        with in_wait(gateway, "1"):
            ack = reply_to(gateway, patient("2"))
            assert not ack.ok and ack.error == f"host already registered: {APP}"


def test_hostname_that_its_agent_no_longer_wants_is_told(gateway):
    """A second session of the same process takes over, and leaves it out."""
    with registered(gateway, APP, OTHER, instance="0", features=(OVERLAP,)) as incumbent:
        with answering(incumbent), in_wait(gateway, "1") as (agent,):
            message = registration(OTHER, instance="0", overlap=True, features=(OVERLAP,))
            with HandMade(gateway, message) as successor:
                assert successor.hear().ok
                assert next_free(agent) == Free((APP,))


def test_silent_incumbent_is_replaced_while_somebody_waits(gateway, monkeypatch):
    monkeypatch.setattr(heartbeat, "WATCHED_TIMEOUT", 0.1)
    monkeypatch.setattr(heartbeat, "WATCH_PAUSE", 0.05)
    monkeypatch.setattr(heartbeat, "SIGN_OF_LIFE", 0.01)
    with registered(gateway, APP) as incumbent, contextlib.ExitStack() as stack:
        stack.enter_context(answering(incumbent))
        (agent,) = stack.enter_context(in_wait(gateway, "1"))
        (tunnel,) = gateway.inner.tunnels.registered()
        # From now on it reads nothing, so it does not answer.
        monkeypatch.setattr(tunnel._control, "read", lambda: [])
        assert next_free(agent) == Free((APP,))
        assert tunnel.gone.wait(TIMEOUT)


# With agents of ours -----------------------------------------------------------------------------


@pytest.fixture
def site(origin):
    origin.serve(lambda target: (target.read_head(), target.send(answer(b"page"))))
    return origin.port


def test_agent_serves_as_soon_as_the_other_one_has_gone(
    gateway, tmp_path, site, caplog, monkeypatch
):
    """No try by itself is due for a long time; and it says once that it waits."""
    caplog.set_level(logging.INFO)
    monkeypatch.setattr(link_module, "retry_delay", lambda *arguments: 10 * TIMEOUT)
    ports = {APP: site}
    with agent_here(gateway, tmp_path, http=ports) as first:
        with agent_here(gateway, tmp_path, http=ports, ready=False) as second:
            wait_until(gateway.inner.tunnels.standby.waited)
            wait_until(lambda: second.snapshot().waits == {APP})
            told = second.snapshot()
            assert not told.routes and told.all_routes()[APP].problem == IN_WAIT
            for _ in range(3):  # the place is handed on, and nothing is said of it
                first.stop()
                wait_until(lambda: gateway.get(APP)[0] == 200)
            wait_until(lambda: not second.snapshot().waits)
            assert caplog.text.count(f"{IN_WAIT}; this one will serve as soon") == 1
            assert caplog.text.count(f"agent at 127.0.0.1 {IN_WAIT}") == 1
            assert "serving nothing" not in caplog.text and "leaves; it served" in caplog.text
            assert "next try" not in caplog.text and "served nothing" not in caplog.text


@pytest.mark.slow
def test_three_agents_wait_and_serve_one_after_the_other(gateway, tmp_path, site, monkeypatch):
    monkeypatch.setattr(link_module, "retry_delay", lambda *arguments: 10 * TIMEOUT)
    with contextlib.ExitStack() as stack:
        agents = []
        for number in range(4):
            folder = tmp_path / str(number)
            folder.mkdir()
            one = agent_here(gateway, folder, http={APP: site}, ready=not number)
            agents.append(stack.enter_context(one))
            await_waiting(gateway, number)
        for number, agent in enumerate(agents[:-1]):
            agent.stop()
            serves, *others = agents[number + 1 :]
            wait_until(lambda serves=serves: serves.snapshot().routes)
            assert gateway.get(APP) == (200, b"page")
            await_waiting(gateway, len(others))
            assert [other.snapshot().waits for other in others] == [{APP}] * len(others)


@pytest.mark.slow
@pytest.mark.parametrize("end", [at_length(signal.SIGKILL), signal.SIGSTOP])
def test_another_agent_serves_soon_after_one_has_died(cache, tmp_path, site, end):
    """SIGKILL: its system ends the connection. SIGSTOP: nothing comes any more, as with a cable
    that was pulled."""
    folders = [tmp_path / name for name in "ab"]
    for folder in folders:
        folder.mkdir()
    ports = {APP: site}
    with gateway_process(cache) as gateway, agent_process(gateway, folders[0], ports) as first:
        with agent_process(gateway, folders[1], ports, ready=False) as second:
            second.wait_for(IN_WAIT)
            gateway.program.wait_for(IN_WAIT)
            first.signal(end)
            began = time.monotonic()
            try:
                second.wait_for(rf": serving {APP}")
                took = time.monotonic() - began
                assert gateway.get(APP) == (200, b"page")
                print(f"{end.name}: the other agent has served after {took:.2f} s")
            finally:
                if end is signal.SIGSTOP:
                    first.signal(signal.SIGCONT)


def test_ack_says_what_the_agent_waits_for(gateway):
    """As docs/protocol.md shows it."""
    with registered(gateway, APP) as incumbent, answering(incumbent):
        with HandMade(gateway, patient("1")) as agent:
            ack = agent.hear()
    text = f"host already registered: {APP}"
    assert ack == Ack(True, features=PATIENT, denied={APP: text})


def test_agents_that_wait_follow_those_that_serve_to_the_next_gateway(gateway, monkeypatch):
    monkeypatch.setattr(tunnel_module, "MOVE_LATER", 0.2)
    features = (*PATIENT, REASONS)
    with registered(gateway, APP, features=features) as incumbent:
        with HandMade(gateway, registration(APP, features=features, instance="1")) as agent:
            while isinstance(message := incumbent.hear(), Ping):
                incumbent.say(Pong(1))
                if gateway.inner.tunnels.standby.waiting():
                    gateway.inner.tunnels.move()
            assert message == End(MOVE, "the gateway stops")
            assert agent.hear().denied
            assert next_free(agent) == End(MOVE, "the gateway stops")


def test_log_says_once_what_is_waited_for_and_what_is_refused(gateway, caplog):
    with registered(gateway, APP) as incumbent, answering(incumbent):
        with HandMade(gateway, patient("1", APP, OTHER, "not a name")) as agent:
            assert set(agent.hear().denied) == {APP, "not a name"}
    lines = [line for line in caplog.messages if "some hostnames are refused" in line]
    assert len(lines) == 1 and "not a name" in lines[0] and APP not in lines[0]
