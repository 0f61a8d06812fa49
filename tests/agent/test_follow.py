"""The follower of visits, between a real stream and a real target."""

import contextlib
import socket
import sys
import threading

import pytest
from support import (
    APP,
    RAW,
    TIMEOUT,
    agent_here,
    answer,
    gateway_here,
    request,
    reserved_port,
    wait_until,
)

from gotunnel_agent import dialogue as dialogue_module
from gotunnel_agent import follow as follow_module
from gotunnel_agent.common.duplex import Duplex
from gotunnel_agent.config import Target, Tunnel
from gotunnel_agent.dialogue import CUT_SHORT, NO_ANSWER, Exchange
from gotunnel_agent.follow import HTTP2, TOO_FAST, Follower, Seen, has_failed

GET = b"GET /a HTTP/1.1\r\nHost: x\r\n\r\n"
OK = b"HTTP/1.1 200 OK\r\nContent-Length: 3\r\n\r\nyes"
POST = b"POST /p HTTP/1.1\r\nHost: x\r\nContent-Length: 5\r\n\r\nhello"
PAGE = Tunnel("x", Target("127.0.0.1", 80), "http")


class Visit:
    """A target that is followed, and its other end."""

    def __init__(self, follower, tunnel=PAGE):
        near, self.far = socket.socketpair()
        self.far.settimeout(TIMEOUT)
        self.target = Duplex(near)
        follower.follow(self.target, tunnel)

    def ask(self, data=GET):
        self.target.write(data)
        assert self.far.recv(len(data), socket.MSG_WAITALL) == data

    def answer(self, data=OK):
        self.far.sendall(data)
        assert self.target.read(len(data)) == data

    def close(self):
        self.target.close()
        self.far.close()


class Heard:
    """A listener."""

    def __init__(self, deaf=False):
        self.events, self.pieces, self._deaf = [], [], deaf

    def began(self, tunnel, exchange):
        self.events.append(("began", exchange.method))
        return None if self._deaf else lambda answer, data, now: self.pieces.append((answer, data))

    def over(self, tunnel, exchange):
        self.events.append(("over", exchange.method))


@pytest.fixture
def follower():
    return Follower()


@contextlib.contextmanager
def visit_of(follower, tunnel=PAGE):
    visit = Visit(follower, tunnel)
    with contextlib.closing(visit):
        yield visit


def facts(seen):
    return seen.method, seen.path, seen.status, seen.bytes_in, seen.bytes_out, seen.problem


def test_each_request_of_a_kept_stream_is_seen(follower):
    with visit_of(follower) as visit:
        visit.ask()
        visit.answer()
        visit.ask()
        visit.answer()
    assert [facts(seen) for seen in follower.take()] == [("GET", "/a", 200, 0, 3, "")] * 2
    assert follower.take() == [] and follower.running() == []
    assert follower.totals() == (2, 0, 0, 6)


def test_what_has_passed_is_read_when_it_is_much(follower):
    """Otherwise at the end, or when somebody asks: reading each piece at once would cost more."""
    with visit_of(follower) as visit:
        for _ in range(follow_module.MANY):
            visit.ask()
            visit.answer()
        assert 0 < follower.totals().visits < follow_module.MANY
        follower.look()
        assert follower.totals().visits == follow_module.MANY


def test_the_hostname_of_a_visit_that_goes_on_is_parsed_once(follower, monkeypatch):
    heads = []
    parse = dialogue_module.parse_request
    monkeypatch.setattr(
        dialogue_module, "parse_request", lambda head: (heads.append(head), parse(head))[1]
    )
    with visit_of(follower, PAGE._replace(hostname="*.example.com")) as visit:
        visit.ask()
        assert {follower.running()[0].hostname for _ in range(3)} == {"x"}
    assert len(heads) == 1


def test_the_hostname_of_a_wildcard_is_the_visitors(follower):
    with visit_of(follower, PAGE._replace(hostname="*.example.com")) as visit:
        visit.ask(GET.replace(b"Host: x", b"Host: a.example.com"))
        visit.answer()
        visit.ask(b"no HTTP\r\n\r\n")
    assert [seen.hostname for seen in follower.take()] == ["a.example.com", "*.example.com"]


def test_what_goes_on_is_told_so_far(follower):
    with visit_of(follower) as visit:
        assert follower.running() == []  # a stream that waits for a request is no visit
        visit.ask()
        [seen] = follower.running()
        assert facts(seen) == ("GET", "/a", 0, 0, 0, "") and seen.hostname == "x"
        assert follower.take() == []
    assert [facts(seen) for seen in follower.take()] == [("GET", "/a", 0, 0, 0, NO_ANSWER)]


def test_bytes_that_are_offered_again_are_read_once(follower, monkeypatch):
    """The demultiplexer offers bytes to the target, and what it does not take comes again."""
    with visit_of(follower) as visit:
        for taken in (0, 5, len(GET)):
            monkeypatch.setattr(Duplex, "offer", lambda self, data, taken=taken: taken)
            with visit_of(follower) as visit:
                assert visit.target.offer(GET) == taken
                if GET[taken:]:
                    visit.ask(GET[taken:])
                visit.answer()
    assert [facts(seen) for seen in follower.take()] == [("GET", "/a", 200, 0, 3, "")] * 3


def test_bytes_that_could_not_be_offered_are_read_once(follower, monkeypatch):
    def broken(self, data):
        raise OSError

    monkeypatch.setattr(Duplex, "offer", broken)
    with visit_of(follower) as visit:
        with pytest.raises(OSError):
            visit.target.offer(GET)
        visit.ask()
        visit.answer()
    assert [facts(seen) for seen in follower.take()] == [("GET", "/a", 200, 0, 3, "")]


@pytest.mark.parametrize(
    "tunnel, problem, mode",
    [(PAGE._replace(protocol="h2c"), HTTP2, "http"), (PAGE._replace(mode="tcp"), "", "tcp")],
)
def test_streams_that_are_not_read_are_counted(follower, tunnel, problem, mode):
    with visit_of(follower, tunnel) as visit:
        visit.ask(b"1234")
        visit.answer(b"12")
        [seen] = follower.running()
        assert (seen.bytes_in, seen.bytes_out) == (4, 2)
    [seen] = follower.take()
    assert facts(seen) == ("", "", 0, 4, 2, problem) and seen.mode == mode
    assert not has_failed(seen)


def test_more_than_can_be_read_is_not_kept(follower, monkeypatch):
    monkeypatch.setattr(follow_module, "MOST_PIECES", 3)
    with visit_of(follower) as visit:
        [followed] = follower._live
        with followed._reading:  # as if another thread were reading, and slow
            for _ in range(9):
                visit.ask()
    [seen] = follower.take()
    assert seen.problem == TOO_FAST


def test_unfinished_heads_of_all_streams_have_one_budget(follower, monkeypatch):
    monkeypatch.setattr(follow_module, "MOST_HELD", 20)
    with visit_of(follower) as first, visit_of(follower) as second:
        first.ask(GET[:15])
        follower.look()
        second.ask(GET[:15])
        follower.look()
        first.ask(GET[15:])
        first.answer()
    problems = {seen.problem for seen in follower.take()}
    assert "" in problems and any("no memory" in problem for problem in problems)
    assert follower._held == 0


def test_old_visits_are_dropped(monkeypatch):
    monkeypatch.setattr(follow_module, "KEPT", 2)
    follower = Follower()
    with visit_of(follower) as visit:
        for _ in range(3):
            visit.ask()
            visit.answer()
    assert len(follower.take()) == 2 and follower.totals().visits == 3


def test_a_bug_of_a_listener_harms_no_visit(follower, caplog):
    class Broken:
        def began(self, tunnel, exchange):
            raise ZeroDivisionError

        over = began

    follower.add(Broken())
    with visit_of(follower) as visit:
        visit.ask()
        visit.answer()
    assert "not followed any more (bug, traceback follows)" in caplog.text
    assert "not kept (bug, traceback follows)" in caplog.text
    caplog.clear()
    [seen] = follower.take()
    assert seen.problem.startswith("not followed")


@pytest.mark.parametrize("deaf", [(), (False,), (True,), (False, False), (False, True, False)])
def test_each_listener_hears_all_visits_that_begin_after_it_was_added(follower, deaf):
    listeners = [Heard(each) for each in deaf]
    with visit_of(follower) as visit:  # heard by nobody
        visit.ask()
        visit.answer()
    for listener in listeners:
        follower.add(listener)
    with visit_of(follower) as visit:
        visit.ask(POST)
        visit.answer()
    for listener in listeners:
        follower.remove(listener)
    with visit_of(follower) as visit:
        visit.ask()
        visit.answer()
    for listener in listeners:
        assert listener.events == [("began", "POST"), ("over", "POST")]
        heard = [] if listener._deaf else [(False, b"hello"), (True, b"yes")]
        assert listener.pieces == heard
    assert follower.totals().visits == 3


@pytest.mark.parametrize("tunnel", [PAGE._replace(protocol="h2c"), PAGE._replace(mode="tcp")])
def test_a_listener_is_told_of_streams_that_are_not_read(follower, tunnel):
    follower.add(listener := Heard())
    with visit_of(follower, tunnel) as visit:
        assert listener.events == [("began", "")]
        visit.ask(b"1234")
    assert listener.events == [("began", ""), ("over", "")] and listener.pieces == []


def test_a_look_at_many_visits_rests_in_between(follower, monkeypatch):
    rests = []
    monkeypatch.setattr(follow_module, "sleep", rests.append)
    monkeypatch.setattr(follow_module, "SLICE", -1)
    with visit_of(follower) as first, visit_of(follower) as second:
        for visit in (first, second):
            visit.ask()
            visit.answer()
        follower.look()
        assert rests == []
        follower.look(0.25)
        assert rests == [0.25, 0.25] and follower.totals().visits == 2


def test_threads_sleep_until_something_passes(follower):
    looks, over = [], threading.Event()

    def watch():
        while not over.is_set():
            follower.await_bytes(over)
            follower.look()
            looks.append(follower.totals().visits)

    with visit_of(follower) as visit:
        visit.ask()  # before the threads begin
        threads = [threading.Thread(target=watch, daemon=True) for _ in range(2)]
        for thread in threads:
            thread.start()
        wait_until(lambda: looks and follower.asleep)
        visit.answer()
        wait_until(lambda: looks[-1] == 1 and follower.asleep)
        over.set()
        follower.wake()
        for thread in threads:
            thread.join(TIMEOUT)
    assert set(looks) == {0, 1} and len(looks) < 8


def test_a_listener_that_was_removed_hears_nothing_of_streams_that_go_on(follower):
    follower.add(listener := Heard())
    with visit_of(follower) as visit:
        follower.remove(listener)
        follower.add(other := Heard())
        visit.ask()
        visit.answer()
        follower.look()
        follower.remove(other)
        visit.ask()
        visit.answer()
        follower.look()
    assert listener.events == [] and other.events == [("began", "GET"), ("over", "GET")]


def test_a_target_has_its_own_methods_again_afterwards(follower):
    with visit_of(follower) as visit:
        assert {"read", "write", "offer", "close"} <= set(vars(visit.target))
    assert not {"read", "write", "offer", "close"} & set(vars(visit.target))


class Pieces:
    """A stream on which these pieces have come."""

    def __init__(self, *pieces):
        self.pieces, self.waits = [piece for piece in pieces if piece], []

    def read(self, size, timeout):
        self.waits.append(timeout)
        if not self.pieces:
            raise TimeoutError
        return self.pieces.pop(0)


@pytest.mark.parametrize(
    "tunnel, data, expected",
    [
        (PAGE, GET, ("GET", "/a", 502, 0, 0, "target unreachable")),
        (PAGE, GET[:9], ("", "", 502, 0, 0, "target unreachable")),
        (PAGE, b"", ("", "", 502, 0, 0, "target unreachable")),
        (PAGE._replace(mode="tcp"), GET, ("", "", 0, 0, 0, "target unreachable")),
        (PAGE._replace(protocol="h2c"), GET, ("", "", 502, 0, 0, "target unreachable")),
    ],
)
def test_a_visit_without_a_target_is_told(follower, tunnel, data, expected):
    follower.missed(Pieces(data), tunnel, "target unreachable")
    [seen] = follower.take()
    assert facts(seen) == expected and has_failed(seen)


def test_the_body_of_a_visit_without_a_target_has_a_moment_if_there_is_a_listener(follower):
    stream = Pieces(POST[:-4], POST[-4:])
    follower.missed(stream, PAGE, "target unreachable")
    assert set(stream.waits) == {0}
    follower.add(listener := Heard())
    stream = Pieces(POST[:-4], POST[-4:])
    follower.missed(stream, PAGE, "target unreachable")
    assert [wait > 0 for wait in stream.waits] == [True, True, False]
    assert listener.pieces == [(False, b"h"), (False, b"ello")]
    assert listener.events == [("began", "POST"), ("over", "POST")]
    assert [seen.bytes_in for seen in follower.take()] == [5, 5]


def test_failures_are_the_targets():
    seen = Seen("x", "GET", "/", 200, 0, 0, 0, 0)
    assert not has_failed(seen) and not has_failed(seen._replace(status=404))
    assert has_failed(seen._replace(status=500)) and has_failed(seen._replace(problem=CUT_SHORT))
    assert has_failed(seen._replace(status=0, problem=NO_ANSWER))


# Through a gateway -------------------------------------------------------------------------------


def test_visits_through_a_gateway_are_seen(cache, tmp_path, origin):
    def site(wire):
        while True:
            head = wire.read_head()
            wire.send(answer(b"hello") if b"/hello" in head else answer(status="500 Oops"))

    origin.serve(site)
    seen, listener = [], Heard()
    with gateway_here(cache) as gateway, agent_here(gateway, tmp_path, {APP: origin.port}) as agent:
        agent.follower = Follower(seen.append)
        agent.follower.add(listener)
        with gateway.visitor(APP) as visitor:
            for path in ("/hello?x=1", "/broken"):
                visitor.request("GET", path)
                visitor.getresponse().read()
        wait_until(lambda: agent.follower.look() or len(seen) == 2)
    assert [facts(each) for each in seen] == [
        ("GET", "/hello?x=1", 200, 0, 5, ""),
        ("GET", "/broken", 500, 0, 2, ""),
    ]
    assert listener.pieces == [(True, b"hello"), (True, b"ok")]
    assert sorted(listener.events) == [("began", "GET")] * 2 + [("over", "GET")] * 2


def test_a_visit_through_a_gateway_without_a_target_is_seen(cache, tmp_path):
    with reserved_port() as port, gateway_here(cache) as gateway:
        with agent_here(gateway, tmp_path, {APP: port}) as agent:
            agent.follower = Follower()
            assert gateway.get(APP, "/page")[0] == 502
            assert [facts(seen)[:3] for seen in agent.follower.take()] == [("GET", "/page", 502)]


def test_a_websocket_through_a_gateway_is_one_visit(cache, tmp_path, origin):
    switch = b"HTTP/1.1 101 X\r\nConnection: Upgrade\r\nUpgrade: chat\r\n\r\n"
    with gateway_here(cache) as gateway, agent_here(gateway, tmp_path, {APP: origin.port}) as agent:
        agent.follower = follower = Follower()
        with gateway.dial(APP) as visitor:
            visitor.send(request("GET", "/chat", "Connection: Upgrade", "Upgrade: chat"))
            target = origin.accept()
            target.read_head()
            target.send(switch + b"hi")
            assert visitor.read_head().startswith(b"HTTP/1.1 101 ")
            assert visitor.read_exactly(2) == b"hi"
            visitor.send(b"hello")
            assert target.read_exactly(5) == b"hello"
            [seen] = follower.running()
            assert facts(seen) == ("GET", "/chat", 101, 5, 2, "")
            target.finish()
            visitor.finish()
        wait_until(lambda: follower.look() or follower.totals().visits)
    assert [facts(seen) for seen in follower.take()] == [("GET", "/chat", 101, 5, 2, "")]


def test_a_visit_in_tcp_mode_is_seen_when_it_ends(cache, tmp_path, origin):
    with gateway_here(cache) as gateway, agent_here(gateway, tmp_path, tcp={RAW: origin.port}) as a:
        a.follower = follower = Follower()
        with gateway.dial(RAW) as visitor:
            visitor.send(b"ping")
            wire = origin.accept()
            assert wire.read_exactly(4) == b"ping"
            wire.send(b"pong!")
            assert visitor.read_exactly(5) == b"pong!"
            assert [(each.mode, each.bytes_in) for each in follower.running()] == [("tcp", 4)]
            visitor.finish()
            wire.finish()
        wait_until(lambda: follower.totals().visits)
    [seen] = follower.take()
    assert (seen.hostname, seen.bytes_in, seen.bytes_out) == (RAW, 4, 5)


@pytest.mark.parametrize("followed", [False, True])
def test_without_a_follower_its_code_is_never_called(cache, tmp_path, origin, followed):
    origin.serve(lambda wire: [wire.read_head(), wire.send(answer(b"x" * 300_000))])
    ours = {follow_module.__file__, dialogue_module.__file__}
    calls = []

    def profile(frame, event, _):
        if event == "call" and frame.f_code.co_filename in ours:
            calls.append(frame.f_code.co_name)

    with gateway_here(cache) as gateway, agent_here(gateway, tmp_path, {APP: origin.port}) as agent:
        if followed:
            agent.follower = Follower()
        threading.setprofile(profile)
        try:
            with gateway.dial(APP) as visitor:
                visitor.send(request())
                visitor.read_message()
        finally:
            threading.setprofile(None)
            sys.setprofile(None)
    assert bool(calls) == followed, calls


def test_an_exchange_has_no_dict():
    """There is one for each request: slots keep it small."""
    assert not hasattr(Exchange(0), "__dict__")
