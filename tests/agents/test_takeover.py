"""A hostname that another session holds: who gets it, how soon, and what becomes of the other."""

import contextlib
import gc
import logging
import os
import random
import secrets
import signal
import socket
import sys
import threading
import time
import types

import pytest
from hand_made import HOUR, HandMade, answering, registered, registration, reply_to
from raw_peer import open_files, resident
from support import (
    APP,
    RAW,
    ROOT,
    SECRET,
    TIMEOUT,
    Origin,
    Wire,
    agent_here,
    agent_process,
    answer,
    at_length,
    gateway_here,
    go_agent,
    request,
    reserved_port,
    routes_of,
    running,
    wait_until,
)

import gotunnel
from gotunnel import (
    MOVE,
    REASONS,
    REPLACED,
    Ack,
    End,
    Ping,
    Pong,
    Session,
    SessionClosed,
    read_data_header,
)
from gotunnel_agent import link as link_module
from gotunnel_agent import shared
from gotunnel_agent.registering import make_token
from gotunnel_server.agents import heartbeat, takeover, tunnel
from gotunnel_server.agents.ports import Ports
from gotunnel_server.agents.registration import Agent
from gotunnel_server.routes import HostnameTaken, Registry, Route

OTHER = "other.localhost"
TAKEN_OVER = "another session takes over"
SAME = secrets.token_hex(16)
BOUND = heartbeat.ANSWER_TIMEOUT + 3  # seconds, on a busy machine; the heartbeat takes 35
AT_ONCE = 2  # seconds, on a busy machine


@pytest.fixture
def gateway(cache):
    with gateway_here(cache) as gateway:
        yield gateway


@pytest.fixture
def site(origin):
    """The port of a target that answers."""
    origin.serve(lambda target: (target.read_head(), target.send(answer(b"page"))))
    return origin.port


@pytest.fixture
def impatient(monkeypatch):
    """Whoever is asked has half a second."""
    monkeypatch.setattr(heartbeat, "ANSWER_TIMEOUT", 0.5)
    monkeypatch.setattr(heartbeat, "SIGN_OF_LIFE", 0.2)


def test_an_agent_that_comes_back_has_its_hostname_at_once(gateway):
    with registered(gateway, APP, instance=SAME, features=(REASONS,)) as old:
        with registered(gateway, APP, instance=SAME) as new:
            end = old.hear()
            assert isinstance(end, End) and end.code == REPLACED
            assert end.reason == f"{TAKEN_OVER}: its agent has come back, from 127.0.0.1"
            old.session.join(TIMEOUT)
            assert old.session.ended
            with gateway.dial(APP) as visitor:
                visitor.send(request())
                stream = new.session.accept(TIMEOUT)
                assert read_data_header(stream.read_exactly) == (APP, None, False)


def test_an_agent_that_does_not_ask_for_reasons_hears_only_that_it_is_over(gateway):
    with registered(gateway, APP, instance=SAME) as old:
        with registered(gateway, APP, instance=SAME):
            with pytest.raises(SessionClosed):
                old.hear()


def test_a_visit_of_the_replaced_session_ends(gateway):
    with registered(gateway, APP, instance=SAME) as old, gateway.dial(APP) as visitor:
        visitor.send(request())
        old.session.accept(TIMEOUT)
        with registered(gateway, APP, instance=SAME):
            assert visitor.read_message()[0].startswith(b"HTTP/1.1 502 ")


def test_what_the_newcomer_does_not_serve_is_free(gateway):
    with registered(gateway, APP, OTHER, instance=SAME):
        with registered(gateway, APP, instance=SAME):
            wait_until(lambda: routes_of(gateway.inner) == {APP})


def test_the_same_instance_of_another_credential_is_anybody(gateway):
    other = make_token(SECRET, "another", HOUR)
    with registered(gateway, APP, instance=SAME) as old, answering(old):
        ack = reply_to(gateway, registration(APP, token=other, instance=SAME))
        assert ack == Ack(False, f"host already registered: {APP}")
        assert routes_of(gateway.inner) == {APP}


@pytest.mark.parametrize("instance", ["", "another"])
def test_an_agent_that_answers_keeps_its_hostname(gateway, instance):
    with registered(gateway, APP, instance=SAME) as old, answering(old):
        ack = reply_to(gateway, registration(APP, instance=instance))
        assert ack == Ack(False, f"host already registered: {APP}")


def test_an_agent_that_does_not_answer_is_replaced(gateway, impatient):
    with registered(gateway, APP, features=(REASONS,)) as old:
        with registered(gateway, APP) as new:
            assert isinstance(old.hear(), Ping)
            assert old.hear().code == REPLACED
            assert new.session.ended == ""


def test_an_agent_that_has_answered_once_is_asked_again(gateway, monkeypatch):
    with registered(gateway, APP) as old:
        with HandMade(gateway, registration(APP)) as first:
            assert isinstance(old.hear(), Ping)
            old.say(Pong(1))
            assert not first.hear().ok
        monkeypatch.setattr(heartbeat, "ANSWER_TIMEOUT", 0.5)
        monkeypatch.setattr(heartbeat, "SIGN_OF_LIFE", 0.2)
        with registered(gateway, APP):  # it answers no more
            pass


def test_an_agent_whose_answers_queue_is_not_taken_for_dead(gateway, monkeypatch):
    """Its line is full of an upload; a pong waits behind that."""
    monkeypatch.setattr(heartbeat, "ANSWER_TIMEOUT", 0.5)
    monkeypatch.setattr(heartbeat, "SIGN_OF_LIFE", 0.5)
    monkeypatch.setattr(takeover, "ENDING_TIMEOUT", 10 * TIMEOUT)  # no verdict comes of that
    done = threading.Event()
    with registered(gateway, APP) as old, gateway.dial(APP) as visitor:
        visitor.send(request())
        stream = old.session.accept(TIMEOUT)

        def trickle():
            while not done.wait(0.1):
                stream.write(b"H")

        thread = threading.Thread(target=trickle)
        thread.start()
        try:
            ack = reply_to(gateway, registration(APP))
        finally:
            done.set()
            thread.join()
        assert ack == Ack(False, f"host already registered: {APP}")


def test_where_one_of_several_stays_none_is_taken(gateway):
    """Also the newcomer's own old session stays, which may still serve."""
    with registered(gateway, APP, instance=SAME):
        with registered(gateway, OTHER, instance="another") as other, answering(other):
            ack = reply_to(gateway, registration(APP, OTHER, instance=SAME))
            assert ack == Ack(False, f"host already registered: {APP}, {OTHER}")
            assert routes_of(gateway.inner) == {APP, OTHER}


def test_several_newcomers_at_once_one_gets_it(gateway, impatient):
    """The others hear that they did not."""
    with registered(gateway, APP):
        with contextlib.ExitStack() as stack:
            newcomers = [
                stack.enter_context(HandMade(gateway, registration(APP))) for _ in range(5)
            ]
            results = [None] * len(newcomers)

            def hear(at):
                results[at] = newcomers[at].hear()
                with contextlib.suppress(SessionClosed):
                    while results[at].ok and isinstance(newcomers[at].hear(), Ping):
                        newcomers[at].say(Pong(1))

            threads = [threading.Thread(target=hear, args=(at,)) for at in range(len(newcomers))]
            for thread in threads:
                thread.start()
            wait_until(lambda: all(results))
            assert sum(ack.ok for ack in results) == 1
            for newcomer in newcomers:
                newcomer.session.close()
            for thread in threads:
                thread.join()


def test_a_newcomer_that_leaves_while_it_waits_holds_nothing(gateway, impatient):
    with registered(gateway, APP):
        with HandMade(gateway, registration(APP)):
            pass
        wait_until(lambda: routes_of(gateway.inner) in ({APP}, set()))
    wait_until(lambda: routes_of(gateway.inner) == set())
    with registered(gateway, APP):
        pass


@pytest.mark.parametrize("bug", [False, True])
def test_a_session_that_ends_as_it_gets_its_hostname_holds_nothing(gateway, monkeypatch, bug):
    """Also if its registration breaks off by a bug."""
    if bug:
        monkeypatch.setattr(gateway.inner.tunnels, "ensure_certificates", None)
    registry = gateway.inner.tunnels.registry
    claim, claimed = registry.claim, threading.Event()

    def claim_too_late(routes, permit):
        routes[APP].tunnel.end("its line is cut")
        claim(routes, permit)
        claimed.set()

    monkeypatch.setattr(registry, "claim", claim_too_late)
    with HandMade(gateway, registration(APP)) as agent:
        with pytest.raises(SessionClosed):
            agent.hear()
        assert claimed.wait(TIMEOUT)
        wait_until(lambda: not registry.routes())


def test_a_gateway_that_stops_lets_no_newcomer_wait(cache):
    with gateway_here(cache) as gateway, registered(gateway, APP):
        with HandMade(gateway, registration(APP)):
            (incumbent,) = gateway.inner.tunnels.registered()
            wait_until(lambda: incumbent._heartbeat._is_asked)
            began = time.monotonic()
            gateway.inner.stop()
            assert time.monotonic() - began < BOUND


@contextlib.contextmanager
def sender_that_falls_asleep(incumbent, monkeypatch):
    """A thread that has sent a Ping to a tunnel's agent, and would look now for what there is to
    send next: that waits for it, until the ``with`` ends."""
    duplex, sent, may_go_on = incumbent._session._duplex, threading.Event(), threading.Event()
    send = duplex.send
    sender = threading.Thread(target=incumbent._control.tell, args=(Ping(1),))

    def send_and_fall_asleep(data):
        done = send(data)
        if threading.current_thread() is sender:
            sent.set()
            may_go_on.wait(TIMEOUT)
        return done

    wait_until(lambda: incumbent.stage is tunnel.Stage.SERVING)
    let_it_go_round(incumbent._session)  # nobody else has anything to send
    monkeypatch.setattr(tunnel, "LAST_WORD", TIMEOUT)
    monkeypatch.setattr(duplex, "send", send_and_fall_asleep)
    sender.start()
    try:
        assert sent.wait(TIMEOUT)
        yield
    finally:
        may_go_on.set()
        sender.join()


def let_it_go_round(session):
    """Wait until the session's demultiplexer has looked at everything once."""
    for _ in range(2):
        turned = threading.Event()
        session.call_later(0, turned.set)
        assert turned.wait(TIMEOUT)


def test_an_agent_is_told_why_although_another_thread_is_sending(gateway, monkeypatch):
    """What it sends goes first, and the session must not be torn down before."""
    with registered(gateway, APP, features=(REASONS,)) as agent:
        (incumbent,) = gateway.inner.tunnels.registered()
        with sender_that_falls_asleep(incumbent, monkeypatch):
            incumbent.replace("the test wants it")
            let_it_go_round(incumbent._session)
        assert agent.hear() == Ping(1)
        assert "the test wants it" in agent.hear().reason


def test_an_agent_is_told_why_although_it_has_only_just_registered(gateway, monkeypatch):
    start, may_start = Session.start, threading.Event()

    def start_late(session):
        if session.name != "hand-made":
            may_start.wait(TIMEOUT)
        start(session)

    monkeypatch.setattr(Session, "start", start_late)
    with registered(gateway, APP, features=(REASONS,)) as agent:
        (incumbent,) = gateway.inner.tunnels.registered()
        incumbent.replace("the test wants it")
        may_start.set()
        assert "the test wants it" in agent.hear().reason
        assert incumbent.gone.wait(TIMEOUT)


def test_an_agent_is_told_why_although_it_is_still_registering(gateway, monkeypatch):
    """It holds the hostname already, and has not read its ack."""
    claimed, may_go_on = threading.Event(), threading.Event()

    def hold(hostnames, agent, limits):
        claimed.set()
        may_go_on.wait(TIMEOUT)

    monkeypatch.setattr(gateway.inner.tunnels, "ensure_certificates", hold)
    with HandMade(gateway, registration(APP, features=(REASONS,))) as agent:
        try:
            assert claimed.wait(TIMEOUT)
            incumbent = gateway.inner.tunnels.registry.routes()[APP].tunnel
            incumbent.replace("the test wants it")
        finally:
            may_go_on.set()
        assert agent.hear().ok
        assert "the test wants it" in agent.hear().reason
        assert incumbent.gone.wait(TIMEOUT)


@pytest.mark.parametrize("leaves", [Session.leave, Session.close])
def test_the_log_says_why_although_the_agent_was_quicker_to_hang_up(
    gateway, monkeypatch, caplog, leaves
):
    caplog.set_level(logging.INFO)
    with registered(gateway, APP, features=(REASONS,)) as agent:
        (incumbent,) = gateway.inner.tunnels.registered()
        with sender_that_falls_asleep(incumbent, monkeypatch):
            incumbent.replace("the test wants it")
            leaves(agent.session)
            wait_until(lambda: incumbent._session._mux.peer_left)
    assert incumbent.gone.wait(TIMEOUT)
    wait_until(lambda: f"no longer served: {APP}" in caplog.text)
    assert "its session ended: another session takes over: the test wants it; " in caplog.text
    assert "leaves" not in caplog.text


def test_the_log_says_that_a_session_could_not_begin(caplog):
    caplog.set_level(logging.INFO)
    without_thread = types.SimpleNamespace(
        routes={APP: None}, gone=threading.Event(), _lock=threading.Lock(),
        _session=types.SimpleNamespace(ended=""),  # as nothing has ended it yet
        _give_back=lambda: None, _enter=lambda stage: None,
    )  # fmt: skip
    tunnel.Tunnel._ended(without_thread)
    assert f"its session ended: it could not begin; no longer served: {APP}" in caplog.text


def test_two_agents_of_one_configuration_do_not_fight(gateway, tmp_path, site, caplog, monkeypatch):
    """The later one waits, and says so; it serves when the earlier one has gone."""
    monkeypatch.setattr(link_module, "REFUSED_DELAY", 0.2)
    ports = {APP: site}
    with agent_here(gateway, tmp_path, http=ports):
        first = gateway.inner.tunnels.registered()
        with agent_here(gateway, tmp_path, http=ports, ready=False):
            # The agent says so, and the gateway.
            wait_until(lambda: caplog.text.count(f"waits for {APP}, which another agent") == 2)
            assert gateway.inner.tunnels.registered() == first
    with agent_here(gateway, tmp_path, http=ports) as first:
        with agent_here(gateway, tmp_path, http=ports, ready=False):
            first.stop()
            wait_until(lambda: gateway.get(APP)[0] == 200)


def test_an_agent_that_was_replaced_does_not_fight_back(
    gateway, tmp_path, site, caplog, monkeypatch
):
    """One that was thought dead wakes up: it is somebody else from then on."""
    monkeypatch.setattr(link_module, "REFUSED_DELAY", 0.1)
    monkeypatch.setattr(shared, "new_instance", lambda: SAME)  # at its start
    monkeypatch.setattr(link_module, "new_instance", lambda: "new")
    with agent_here(gateway, tmp_path, http={APP: site}):
        same = {"instance": SAME, "token": make_token(SECRET, "", HOUR)}
        with registered(gateway, APP, **same) as new, answering(new):
            wait_until(lambda: f"waits for {APP}, which another agent" in caplog.text)
            assert f"the gateway says: {TAKEN_OVER}: its agent has come back" in caplog.text
            assert len(gateway.inner.tunnels.registered()) == 1
        wait_until(lambda: gateway.get(APP)[0] == 200)


def tables():
    """What the gateway holds: descriptors, and threads but those of the pools."""
    names = sorted(thread.name for thread in threading.enumerate())
    pools = ("step", "registration")
    return [name for name in names if not name.startswith(pools)], len(open_files())


@pytest.mark.slow
@pytest.mark.parametrize("count", [60, at_length(200)])
def test_many_takeovers_leave_nothing(gateway, caplog, count):
    caplog.set_level(logging.ERROR, "gotunnel")  # what is logged is kept for the test's report

    def take_over():
        agent = HandMade(gateway, registration(APP, instance=SAME))
        assert agent.hear().ok
        return agent

    agents = [take_over()]
    with gateway.dial(APP) as visitor:  # with a visit that it tears down
        visitor.send(request())
        agents[-1].session.accept(TIMEOUT)
        for _ in range(count):
            agents.append(take_over())
            agents.pop(0).session.join()
    wait_until(lambda: len(gateway.inner.tunnels._tunnels) == 1)
    gc.collect()
    before, memory = tables(), resident()
    for _ in range(count):
        agents.append(take_over())
        agents.pop(0).session.join()
    wait_until(lambda: len(gateway.inner.tunnels._tunnels) == 1)
    wait_until(lambda: set(tables()[0]) <= set(before[0]) and tables()[1] <= before[1])
    gc.collect()
    assert resident() - memory < 8 << 20
    agents.pop().__exit__()


# Real programs, stopped as by a pulled cable -----------------------------------------------------


@contextlib.contextmanager
def stopped(program):
    program.signal(signal.SIGSTOP)
    try:
        yield
    finally:
        program.signal(signal.SIGCONT)


STOPPED = """
from hand_made import HandMade, registration
import sys, types
gateway = types.SimpleNamespace(tunnel_port=int(sys.argv[1]), ca_file=sys.argv[2])
with HandMade(gateway, registration(sys.argv[3], instance=sys.argv[4])) as agent:
    print("registered", agent.hear().ok, flush=True)
    agent.hear()
"""


@pytest.mark.slow
def test_hostname_of_a_stopped_agent_is_its_own_at_once_when_it_comes_back(gateway, tmp_path):
    path = os.pathsep.join((str(ROOT), str(ROOT / "tests")))
    command = [sys.executable, "-c", STOPPED, gateway.tunnel_port, gateway.ca_file, APP, SAME]
    with running(*map(str, command), cwd=tmp_path, PYTHONPATH=path) as old:
        old.wait_for("registered True")
        with stopped(old):
            began = time.monotonic()
            with registered(gateway, APP, instance=SAME):
                assert time.monotonic() - began < AT_ONCE


@pytest.mark.slow
@pytest.mark.parametrize("first", ["ours", "go"])
@pytest.mark.parametrize("second", ["ours", "go"])
def test_hostname_of_a_stopped_agent_is_anothers_soon(
    gateway, tmp_path, site, gopeer, monkeypatch, first, second
):
    """And the one that was stopped does not take it back."""
    monkeypatch.setattr(heartbeat, "ANSWER_TIMEOUT", 1.5)
    ports = {APP: site}

    def agent(kind, ready):
        if kind == "go":
            return go_agent(gopeer, gateway, http=ports, ready=ready)
        (tmp_path / kind).mkdir(exist_ok=True)
        return agent_process(gateway, tmp_path, http=ports, ready=ready)

    with agent(first, ready=True) as incumbent:
        with stopped(incumbent):
            began = time.monotonic()
            with agent(second, ready=False):
                wait_until(lambda: gateway.get(APP)[0] == 200)
                assert time.monotonic() - began < 1.5 + 3
                winner = gateway.inner.tunnels.registered()
                incumbent.signal(signal.SIGCONT)
                incumbent.wait_for("host already registered|another session takes over")
                assert gateway.get(APP)[0] == 200
                assert gateway.inner.tunnels.registered() == winner


# The verdict alone -------------------------------------------------------------------------------


class Holder:
    """A session that holds a hostname; it ends, and answers, only if the test says so."""

    def __init__(self, instance=""):
        identity = types.SimpleNamespace(credential="one")
        self.agent = Agent(("192.0.2.1", 1), identity, instance)
        self.gone = threading.Event()
        self.moving = False
        self.replaced = []

    def ask(self):
        return 0.0

    def has_answered(self, since):
        return False

    def replace(self, reason):
        self.replaced.append(reason)


def claim_to_app(registry, tunnel):
    return takeover.Claim(registry, tunnel.agent, {APP: Route(APP, "http", tunnel)}, permit=len)


def test_the_gateways_own_name_is_refused_without_a_wait():
    with pytest.raises(HostnameTaken, match="reserved for the gateway itself"):
        claim_to_app(Registry({APP}), Holder()).attempt()


@pytest.mark.parametrize("instance", ["", SAME], ids=["another", "same"])
def test_a_session_that_does_not_end_keeps_nobody_waiting_for_ever(monkeypatch, instance):
    now = [1000.0]
    monkeypatch.setattr(takeover, "monotonic", lambda: now[0])
    registry, holder = Registry(), Holder(instance)
    registry.claim({APP: Route(APP, "http", holder)})
    claim = claim_to_app(registry, Holder(instance))
    assert claim.attempt() is False
    assert bool(holder.replaced) is bool(instance)
    now[0] += takeover.ENDING_TIMEOUT
    assert claim.attempt() is False
    now[0] += 1
    with pytest.raises(HostnameTaken):
        claim.attempt()
    assert len(holder.replaced) == bool(instance)  # once is enough


def test_who_comes_back_has_its_hostname_at_the_first_attempt():
    registry, holder = Registry(), Holder(SAME)
    holder.replace = lambda reason: (registry.release(holder), holder.gone.set())
    registry.claim({APP: Route(APP, "http", holder)})
    assert claim_to_app(registry, Holder(SAME)).attempt() is True


class Answering(Holder):
    """A session whose agent answers."""

    def has_answered(self, since):
        return True


class Ending(Holder):
    """An earlier session of the newcomer's process, which ends at once."""

    def __init__(self, registry):
        super().__init__(SAME)
        self._registry = registry

    def step_aside(self, successor):
        self._registry.release(self)

    def replace(self, reason):
        self._registry.release(self)
        self.gone.set()


@pytest.mark.parametrize("partial", [False, True], ids=["whole", "partial"])
@pytest.mark.parametrize("overlaps", [False, True])
def test_a_claim_among_all_kinds_of_holders(partial, overlaps):
    """Random tables: the newcomer gets what is free, its own or a dead agent's, and disturbs no
    agent that answers. Unless the claim is partial, it gets all or nothing."""
    rng = random.Random(f"{partial} {overlaps}")
    names = [f"{letter}.test" for letter in "abcdefgh"]
    for _ in range(200):
        registry, new = Registry({names[0]}), Holder(SAME)
        new.agent = new.agent._replace(overlaps=overlaps)
        own = Ending(registry)
        kinds = {"alive": Answering("other"), "dead": Holder("another"), "own": own}
        held = {name: rng.choice([*kinds, "free", "free"]) for name in names[1:]}
        for kind, holder in kinds.items():
            mine = [name for name in held if held[name] == kind]
            registry.claim({name: Route(name, "http", holder) for name in mine})
        wanted = rng.sample(names, rng.randint(1, len(names)))
        keeps = {n for n in wanted if n == names[0] or held[n] == "alive"}
        routes = {name: Route(name, "http", new) for name in wanted}
        claim = takeover.Claim(registry, new.agent, routes, permit=len, partial=partial)
        is_refused = keeps == set(wanted) if partial else bool(keeps)
        try:
            for _ in range(len(names)):
                if claim.attempt():
                    break
                registry.release(kinds["dead"])  # by its heartbeat
            assert not is_refused and set(claim.routes) == set(wanted) - keeps
            assert all(registry.lookup(name).tunnel is new for name in claim.routes)
        except HostnameTaken:
            assert is_refused and not own.gone.is_set()
            assert not any(route.tunnel is new for route in registry.routes().values())
        assert set(claim.denied) == (keeps if partial else set())
        alive = [name for name in held if held[name] == "alive"]
        assert all(registry.lookup(name).tunnel is kinds["alive"] for name in alive)


# A session that the gateway wants another one for -----------------------------------------------


@pytest.fixture
def few_ids(monkeypatch):
    """A session has ids for 400 streams, and its agent is asked when 200 are left."""
    monkeypatch.setattr(gotunnel, "LAST_ID", 800)
    monkeypatch.setattr(tunnel, "ID_RESERVE", 200)
    monkeypatch.setattr(tunnel, "LAST_IDS", 50)
    monkeypatch.setattr(tunnel, "KEPT_LOOK", 0.02)
    monkeypatch.setattr(link_module, "GO_AWAY_LOOK", 0.01)
    monkeypatch.setattr(link_module, "OLD_LOOK", 0.05)
    monkeypatch.setattr(link_module, "HELD", 0)
    monkeypatch.setattr(link_module, "MOVED", 0)  # here a session lasts no second


def sessions_of(gateway):
    return {tunnel._session for tunnel in gateway.inner.tunnels._all()}


def use_up_streams(gateway, count, session=None):
    """Each visit takes one. If that is what ``session`` ends by, there are no more."""
    for _ in range(count):
        with gateway.dial(APP) as visitor:
            visitor.send(request())
            body = visitor.read_message()[1]
            if session is not None and session.ended:
                return
            assert body == b"page"


def test_visitors_do_not_notice_that_the_ids_of_a_session_are_used_up(
    gateway, tmp_path, origin, site, few_ids
):
    """Nor does a visit that runs meanwhile."""
    with Origin() as echo, agent_here(gateway, tmp_path, {APP: site}, {RAW: echo.port}):
        (first,) = sessions_of(gateway)
        with gateway.dial(RAW) as visitor, echo.accept() as target:
            for number in range(500):
                use_up_streams(gateway, 1)
                if number % 100 == 0:
                    visitor.send(b"?")
                    assert target.read_exactly(1) == b"?"
                    target.send(b"!")
                    assert visitor.read_exactly(1) == b"!"
            assert not first.ended and len(sessions_of(gateway)) > 1
        wait_until(lambda: first.ended)
        wait_until(lambda: len(sessions_of(gateway)) == 1)


def test_a_port_of_its_own_stays_open_while_its_agent_moves(
    cache, tmp_path, origin, site, few_ids, caplog
):
    caplog.set_level(logging.INFO)
    with reserved_port() as port:
        tunnels = [
            {"hostname": APP, "target": f"127.0.0.1:{site}"},
            {"hostname": RAW, "target": f"127.0.0.1:{site}", "mode": "tcp", "port": str(port)},
        ]
        with gateway_here(cache, TCP_PORTS=str(port)) as gateway:
            with agent_here(gateway, tmp_path, ready=False, tunnels=tunnels):
                gateway.wait_for_routes(APP, RAW)
                listener = gateway.inner._ports._open[port][1].listener
                (first,) = sessions_of(gateway)
                while not first.ended:
                    with Wire(socket.create_connection(("127.0.0.1", port), TIMEOUT)) as visitor:
                        visitor.send(request())
                        assert visitor.read_message()[1] == b"page"
                (served,) = gateway.inner.tunnels.registered()
                assert gateway.inner._ports._open[port][0] == {served}
                assert gateway.inner._ports._open[port][1].listener is listener
                assert served.routes[RAW].port == port
            wait_until(lambda: not gateway.inner._ports._open)


def test_a_port_that_is_passed_on_and_not_asked_for_again_is_closed():
    opened = types.SimpleNamespace(stop=lambda: stopped.append(True), route=None)
    stopped, ports = [], Ports((range(1, 10),), lambda port, route: opened)
    old, new = Holder(SAME), Holder(SAME)
    assert ports.open("5", Route(RAW, "tcp", old)) == 5
    ports.pass_on(old, new)
    ports.release(old)
    assert not stopped
    route = Route(RAW, "tcp", new)
    assert ports.open("5", route) == 5 and opened.route is route
    ports.keep_only(new, {5})
    assert not stopped
    ports.release(new)
    assert stopped


def test_an_agent_that_does_not_come_when_it_is_asked_ends_in_the_end(
    gateway, origin, site, few_ids
):
    with registered(gateway, APP, features=(REASONS,)) as agent:
        for _ in range(210):
            gateway.inner._registry.lookup(APP).tunnel._session.open(b"x").reset()
        said = agent.hear()
        assert isinstance(said, End) and said.code == MOVE
        with contextlib.suppress(SessionClosed):
            while True:
                gateway.inner._registry.lookup(APP).tunnel._session.open(b"x").reset()
        wait_until(lambda: agent.session.ended)


@pytest.mark.parametrize("busy", [False, True], ids=["without a visit", "with a visit"])
def test_an_agent_that_cannot_be_asked_ends_before_the_ids_do(gateway, few_ids, busy):
    with registered(gateway, APP) as agent:
        session = gateway.inner._registry.lookup(APP).tunnel._session
        visit = session.open(b"x")
        for _ in range(210):
            session.open(b"x").reset()
        assert not agent.session.ended
        if not busy:
            visit.reset()
        else:
            time.sleep(3 * tunnel.KEPT_LOOK)  # a visit is not cut while there are ids
            assert not session.ended
            with contextlib.suppress(SessionClosed):
                for _ in range(150):
                    session.open(b"x").reset()
        wait_until(lambda: agent.session.ended)


def test_hostnames_pass_to_a_session_that_was_asked_for_without_a_gap():
    registry, holder = Registry(), Holder(SAME)
    holder.moving, holder.step_aside = True, lambda successor: registry.release(holder)
    registry.claim({APP: Route(APP, "http", holder), OTHER: Route(OTHER, "http", holder)})
    new = Holder(SAME)
    assert claim_to_app(registry, new).attempt()
    assert registry.lookup(APP).tunnel is new and registry.lookup(OTHER) is None
    assert not holder.replaced


def test_a_session_that_moves_is_no_prey_of_others():
    registry, holder = Registry(), Holder(SAME)
    holder.moving = True
    registry.claim({APP: Route(APP, "http", holder)})
    assert not claim_to_app(registry, Holder("another")).attempt()
    assert registry.lookup(APP).tunnel is holder


@pytest.mark.slow
def test_a_go_agent_comes_back_when_the_ids_of_its_session_are_used_up(
    gopeer, gateway, origin, site, few_ids
):
    with go_agent(gopeer, gateway, http={APP: site}):
        (first,) = sessions_of(gateway)
        use_up_streams(gateway, 210, first)
        wait_until(lambda: first.ended)
        gateway.wait_for_routes(APP)
        use_up_streams(gateway, 10)
