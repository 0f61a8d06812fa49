"""Visits of a pool: which agent gets them, and when another one does."""

import contextlib
import secrets
import threading

import pytest
from hand_made import registered
from http2_by_hand import DATA, END_STREAM, frame, http2_visitor
from support import (
    APP,
    CUT,
    GATEWAY_HOST,
    RAW,
    TIMEOUT,
    agent_here,
    answer,
    fields_of,
    gateway_here,
    request,
    reserved_port,
    status_of,
    wait_until,
)

from gotunnel import (
    HALF_CLOSE,
    HEALTH,
    POLICIES,
    POOLS,
    REFUSALS,
    REFUSED,
    TARGET_UNREACHABLE,
    UPGRADES,
    VISITOR_ADDRESS,
    Health,
    Pong,
    read_data_header,
)
from gotunnel_server.visitors import exchange, pooled, pooled_relay, silence, upload

FEATURES = (POOLS, HEALTH, HALF_CLOSE, REFUSALS, UPGRADES, POLICIES, VISITOR_ADDRESS)


@pytest.fixture
def gateway(cache):
    with gateway_here(cache, WORKERS="16") as gateway:
        yield gateway


@pytest.fixture
def hasty(monkeypatch):
    """A silent link is found in a tenth of a second."""
    for module in (exchange, upload, pooled):
        monkeypatch.setattr(module, "WATCH", 0.05)
    monkeypatch.setattr(pooled_relay, "LOOK", 0.05)
    monkeypatch.setattr(silence, "QUIET", 0.04)
    monkeypatch.setattr(silence, "PATIENCE", 0.2)
    monkeypatch.setattr(silence, "ROUND_TRIPS", 0)


def page(name):
    """Answers each request with its name."""

    def script(stream):
        head = b""
        while True:
            while b"\r\n\r\n" not in head:
                data = stream.read(timeout=TIMEOUT)
                if not data:
                    return
                head += data
            first, _, rest = head.partition(b"\r\n\r\n")
            length = 0
            for line in fields_of(first + b"\r\n\r\n"):
                if line.startswith("content-length: "):
                    length = int(line[16:])
            while len(rest) < length:
                rest += stream.read(timeout=TIMEOUT)
            body, head = rest[:length], rest[length:]
            stream.write(answer(b" ".join(filter(None, [name.encode(), body]))))

    return script


def refuses(stream):
    stream.reset(code=TARGET_UNREACHABLE)


def says_nothing(stream):
    with contextlib.suppress(OSError):
        while stream.read():
            pass


class Agent:
    """One of a pool, by hand. ``heads`` are the first bytes of its visits."""

    def __init__(self, hand_made, script, answers_pings):
        self.session = hand_made.session
        self.script = script
        self.visits = 0
        self._hand_made = hand_made
        threading.Thread(target=self._serve, daemon=True).start()
        if answers_pings:
            threading.Thread(target=self._answer, daemon=True).start()

    def _serve(self):
        with contextlib.suppress(OSError):
            while True:
                stream = self.session.accept()
                threading.Thread(target=self._run, args=(stream,), daemon=True).start()

    def _run(self, stream):
        with contextlib.suppress(OSError):
            read_data_header(stream.read_exactly)
            self.visits += 1
            self.script(stream)
            stream.close()

    def _answer(self):
        with contextlib.suppress(OSError, AssertionError):
            while self._hand_made.hear() is not None:
                self._hand_made.say(Pong(1))


@contextlib.contextmanager
def crew(gateway, *scripts, hostname=APP, mode="http", pool={}, silent=(), **more):
    """Agents with these scripts share a hostname. Those whose numbers are in ``silent`` answer no
    ping."""
    with contextlib.ExitStack() as stack:
        agents = []
        for number, script in enumerate(scripts):
            agent = stack.enter_context(
                registered(
                    gateway,
                    hostname,
                    modes={hostname: mode},
                    features=FEATURES,
                    instance=secrets.token_hex(16),
                    pools={hostname: pool},
                    **more,
                )
            )
            agents.append(Agent(agent, script, number not in silent))
        yield agents


def pool_of(gateway, hostname=APP):
    return gateway.inner._registry.lookup(hostname).pool


def idle(gateway, hostname=APP):
    """Wait until no visit is counted."""
    wait_until(lambda: not any(member.visits for member in pool_of(gateway, hostname).members))


def ask(gateway, *arguments, **how):
    with gateway.dial(APP) as visitor:
        visitor.send(request(*arguments, **how))
        return visitor.read_message()


def test_visits_take_turns_and_are_counted_until_their_end(gateway):
    with crew(gateway, page("a"), page("b")):
        assert sorted(gateway.get(APP)[1] for _ in range(4)) == [b"a", b"a", b"b", b"b"]
        idle(gateway)


def test_a_visit_goes_where_the_fewest_are(gateway):
    with crew(gateway, says_nothing, says_nothing, page("c")) as agents:
        with gateway.dial(APP) as one, gateway.dial(APP) as other:
            for visitor in (one, other):
                visitor.send(request())
            wait_until(lambda: sum(agent.visits for agent in agents[:2]) == 2)
            assert [gateway.get(APP)[1] for _ in range(3)] == [b"c"] * 3
        idle(gateway)


METHODS = [("GET", b""), ("POST", b""), ("POST", b"form"), ("PATCH", b"x" * 20_000)]


@pytest.mark.parametrize("method, body", METHODS)
def test_an_agent_without_its_target_does_not_cost_a_visit(gateway, method, body):
    with crew(gateway, refuses, page("b")) as agents:
        for _ in range(4):
            head, came = ask(gateway, method, body=body)
            assert status_of(head) == 200 and came == b" ".join(filter(None, [b"b", body]))
        assert agents[0].visits == 1  # it is passed over from then on
        idle(gateway)


def test_a_body_that_comes_slowly_is_sent_again(gateway):
    refuse = threading.Event()

    def script(stream):
        stream.read_exactly(2000)
        refuse.set()
        refuses(stream)

    with crew(gateway, script, page("b")) as (first, _), gateway.dial(APP) as visitor:
        visitor.send(request("POST", "/", "Content-Length: 4000") + b"x" * 2000)
        assert refuse.wait(TIMEOUT)
        visitor.send(b"y" * 2000)
        head, body = visitor.read_message()
        assert status_of(head) == 200 and body == b"b " + b"x" * 2000 + b"y" * 2000
        assert first.visits == 1
        idle(gateway)


def test_a_chunked_body_is_sent_again_as_it_was(gateway):
    def shows(stream):
        came = b""
        while b"\r\n0\r\n" not in came:
            came += stream.read(timeout=TIMEOUT)
        while not came.endswith(b"\r\n\r\n"):
            came += stream.read(timeout=TIMEOUT)
        stream.write(answer(came.partition(b"\r\n\r\n")[2]))

    body = b"3\r\none\r\n5\r\n, two\r\n0\r\nSum: 7\r\n\r\n"
    with crew(gateway, refuses, shows), gateway.dial(APP) as visitor:
        for _ in range(2):
            visitor.send(request("POST", "/", "Transfer-Encoding: chunked") + body)
            assert visitor.read_message()[1].endswith(b"0\r\nSum: 7\r\n\r\n")


def test_a_body_that_the_target_has_to_ask_for_is_asked_for_by_the_next_one(gateway, hasty):
    def asks(stream):
        came = b""
        while b"\r\n\r\n" not in came:
            came += stream.read(timeout=TIMEOUT)
        stream.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        stream.write(answer(stream.read_exactly(4)))

    with crew(gateway, refuses, asks), gateway.dial(APP) as visitor:
        visitor.send(request("PUT", "/", "Expect: 100-continue", "Content-Length: 4"))
        assert status_of(visitor.read_head()) == 100
        visitor.send(b"body")
        assert visitor.read_message()[1] == b"body"


def test_the_request_behind_one_that_was_sent_again_is_read(gateway):
    with crew(gateway, refuses, page("b")), gateway.dial(APP) as visitor:
        visitor.send(request("POST", body=b"one") + request("POST", body=b"two"))
        assert visitor.read_message()[1] == b"b one"
        assert visitor.read_message()[1] == b"b two"


def test_a_body_that_is_too_long_to_be_kept_is_not(gateway, monkeypatch):
    monkeypatch.setattr(pooled, "RESEND", 1000)

    def script(stream):
        stream.read_exactly(5000)
        refuses(stream)

    with crew(gateway, script, script):
        head, _ = ask(gateway, "POST", body=b"x" * 9000)
        assert status_of(head) == 502
        assert "x-gotunnel-error: target-unreachable" in fields_of(head)
        idle(gateway)


def test_http2_requests_go_elsewhere_with_their_bodies(gateway):
    with crew(gateway, refuses, page("b")), http2_visitor(gateway) as visitor:
        visitor.ask(1)
        assert visitor.answer(1)[2] == b"b"
    with crew(gateway, refuses, page("b")), http2_visitor(gateway) as visitor:
        visitor.ask(1, ("content-length", "4"), end=False, method="POST")
        visitor.send(frame(DATA, END_STREAM, 1, b"form"))
        assert visitor.answer(1)[2] == b"b form"


def test_if_all_targets_are_away_the_page_says_so(gateway):
    with crew(gateway, refuses, refuses) as agents:
        head, _ = ask(gateway)
        assert "x-gotunnel-error: target-unreachable" in fields_of(head)
        assert [agent.visits for agent in agents] == [1, 1]
        idle(gateway)


def test_a_request_is_sent_to_a_few_agents_at_most(gateway):
    with crew(gateway, *[refuses] * 6) as agents:
        assert status_of(ask(gateway)[0]) == 502
        assert sum(agent.visits for agent in agents) == pooled.MOST_TRIES


def breaks(stream):
    stream.read_exactly(10)
    stream.session.close()
    stream.session.join(TIMEOUT)


def closes(stream):
    stream.read_exactly(10)


@pytest.mark.parametrize("script, code", [(breaks, "agent-gone"), (closes, "no-answer")])
def test_what_may_arrive_twice_goes_elsewhere_when_the_answer_does_not_come(gateway, script, code):
    with crew(gateway, script, page("b")):
        assert gateway.get(APP) == (200, b"b")
        idle(gateway)
    with crew(gateway, script, page("b")):
        head, _ = ask(gateway, "POST")
        assert status_of(head) == 502 and f"x-gotunnel-error: {code}" in fields_of(head)
        idle(gateway)


def test_an_answer_that_has_begun_is_not_begun_again(gateway):
    def script(stream):
        stream.read_exactly(10)
        stream.write(b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\nhalf")
        stream.session.close()

    with crew(gateway, script, page("b")) as (_, other), gateway.dial(APP) as visitor:
        visitor.send(request())
        with pytest.raises(CUT):
            visitor.read_message()
        assert other.visits == 0
        idle(gateway)


def test_an_agent_that_leaves_gets_no_more_visits(gateway):
    with crew(gateway, page("a"), page("b")) as (first, _):
        with gateway.dial(APP) as visitor:
            for _ in range(4):  # on a kept connection, and kept streams
                visitor.send(request())
                visitor.read_message()
            first.session.leave()
            wait_until(lambda: len(pool_of(gateway).members) == 1)
            for _ in range(3):
                visitor.send(request())
                assert visitor.read_message()[1] == b"b"


def test_a_visit_that_finds_its_agent_leaving_goes_to_another(gateway):
    """The agent has said that it leaves, and the table does not show it yet."""
    with crew(gateway, page("a"), page("b")) as agents:
        registry = gateway.inner._registry
        stale = registry.lookup(APP)
        agents[0].session.leave()
        wait_until(lambda: len(registry.lookup(APP).pool.members) == 1)
        with registry._lock:
            registry._put({APP: stale})
        for method in ("GET", "POST") * 2:
            assert ask(gateway, method, body=b"1" if method == "POST" else b"")[1][:1] == b"b"


def test_a_silent_agent_does_not_hold_up_visits(gateway, hasty):
    with crew(gateway, says_nothing, page("b"), silent=[0]) as (first, _):
        assert gateway.get(APP) == (200, b"b")
        assert first.visits == 1
        assert [gateway.get(APP)[1] for _ in range(3)] == [b"b"] * 3
        assert first.visits == 1
        idle(gateway)


class Link:
    """A tunnel that is asked for signs of life, which take ``delay`` seconds; None: for ever."""

    round_trip = None

    def __init__(self, monkeypatch, delay=None):
        self.now, self._heard_at, self._delay = 100.0, 100.0, delay
        self._asked_at = None
        monkeypatch.setattr(silence, "monotonic", lambda: self.now)

    @property
    def heard_at(self):
        if None not in (self._asked_at, self._delay) and self.now >= self._asked_at + self._delay:
            self._heard_at, self._asked_at = self._asked_at + self._delay, None
        return self._heard_at

    def ask(self):
        self._asked_at = self._asked_at or self.now
        return self._asked_at

    def looks(self, count):
        """What a visit finds that looks so often."""
        found, visit = [], silence.Silence(self)
        for _ in range(count):
            self.now += silence.LOOK
            found.append(visit.is_long())
        return found


def test_a_link_without_a_sign_of_life_is_silent_at_the_second_look(monkeypatch):
    assert Link(monkeypatch).looks(3) == [False, True, True]


@pytest.mark.parametrize("delay", [0.001, 0.2, 0.4])
def test_an_agent_whose_target_is_slow_is_not_silent(monkeypatch, delay):
    assert not any(Link(monkeypatch, delay).looks(20))


def test_a_link_that_falls_silent_while_a_visit_waits_is_found(monkeypatch):
    link = Link(monkeypatch, 0.001)
    visit = silence.Silence(link)
    found = []
    for number in range(8):
        link.now += silence.LOOK
        link._delay = None if number > 3 else link._delay
        found.append(visit.is_long())
    assert found.index(True) in (4, 5)


def test_a_slow_link_has_more_time(monkeypatch):
    link = Link(monkeypatch)
    link.round_trip = 0.6
    assert link.looks(6).index(True) == 5


def test_what_must_not_arrive_twice_is_not_sent_over_a_silent_link(gateway, hasty, monkeypatch):
    monkeypatch.setattr(silence, "FRESH", -1)
    with crew(gateway, page("a"), page("b"), silent=[0]) as (first, _):
        for _ in range(3):
            assert ask(gateway, "POST", body=b"1")[1] == b"b 1"
        assert first.visits == 0


def says(agent, ok, reason=""):
    agent._hand_made.say(Health(APP, ok, reason))


def test_an_agent_whose_target_is_not_well_is_passed_over(gateway):
    with crew(gateway, page("a"), page("b")) as agents:
        says(agents[0], False, "503 for GET /healthz")
        wait_until(lambda: [m.state for m in pool_of(gateway).members] == ["unwell", "ready"])
        assert [gateway.get(APP)[1] for _ in range(3)] == [b"b"] * 3
        says(agents[1], False, "no answer")
        wait_until(lambda: not pool_of(gateway).well())
        head, _ = ask(gateway)
        assert status_of(head) == 503 and "x-gotunnel-error: unhealthy" in fields_of(head)
        says(agents[0], True)
        wait_until(lambda: pool_of(gateway).well())
        assert gateway.get(APP) == (200, b"a")


def test_a_visit_does_not_leave_a_silent_agent_for_one_that_is_not_well(gateway, hasty):
    def slow(stream):
        stream.read_exactly(10)
        wait_until(lambda: pool_of(gateway).members[0].is_silent)
        stream.write(answer(b"at last"))

    with crew(gateway, slow, page("b"), silent=[0]) as agents:
        says(agents[1], False, "no answer")
        wait_until(lambda: pool_of(gateway).members[1].state == "unwell")
        assert gateway.get(APP) == (200, b"at last")


# Sticky


def cookies(head):
    return [line for line in fields_of(head) if line.startswith("set-cookie: ")]


def shows_cookies(name):
    def script(stream):
        head = b""
        while b"\r\n\r\n" not in head:
            head += stream.read(timeout=TIMEOUT)
        found = [line for line in fields_of(head) if line.startswith("cookie:")]
        stream.write(answer("\n".join([name, *found]).encode()))

    return script


def test_a_cookie_of_the_gateways_own_keeps_a_visitor_at_its_agent(gateway):
    with crew(gateway, page("a"), page("b"), page("c"), pool={"sticky": "cookie"}):
        head, name = ask(gateway)
        (line,) = cookies(head)
        cookie, *attributes = line.removeprefix("set-cookie: ").split("; ")
        assert set(attributes) == {"path=/", "secure", "httponly", "samesite=lax"}
        assert cookie.startswith("__host-gotunnel=")
        cookie = cookie.replace("__host", "__Host")
        for _ in range(4):
            head, again = ask(gateway, "GET", "/", f"Cookie: a=1; {cookie}; b=2")
            assert again == name and not cookies(head)


def test_the_target_gets_no_cookie_of_the_gateways(gateway):
    with crew(gateway, shows_cookies("a"), pool={"sticky": "cookie"}):
        token = pool_of(gateway).members[0].token
        own = f"__Host-gotunnel={token}"
        for sent, seen in (
            (f"Cookie: {own}", b"a"),
            (f"Cookie: x=1; {own}; y=2", b"a\ncookie: x=1; y=2"),
            (f"cookie:{own}; y=2", b"a\ncookie: y=2"),
            (f"Cookie: x=1;{own}", b"a\ncookie: x=1"),
            ("Cookie: x__Host-gotunnel=1", b"a\ncookie: x__host-gotunnel=1"),
            (f"Cookie: {own}; {own}", b"a"),
        ):
            assert ask(gateway, "GET", "/", sent)[1] == seen
        with http2_visitor(gateway) as visitor:
            visitor.ask(1, ("cookie", "x=1"), ("cookie", own), ("cookie", "y=2"))
            assert visitor.answer(1)[2] == b"a\ncookie: x=1; y=2"


@pytest.mark.parametrize("token", ["", "x", "a" * 32, "0" * 5000])
def test_a_cookie_that_names_no_agent_gets_a_new_one(gateway, token):
    with crew(gateway, page("a"), pool={"sticky": "cookie"}):
        (line,) = cookies(ask(gateway, "GET", "/", f"Cookie: __Host-gotunnel={token}")[0])
        assert f"__host-gotunnel={pool_of(gateway).members[0].token};" in line


def test_a_visitor_whose_agent_cannot_serve_gets_another_cookie(gateway):
    with crew(gateway, refuses, page("b"), pool={"sticky": "cookie"}):
        first, second = (member.token for member in pool_of(gateway).members)
        head, name = ask(gateway, "GET", "/", f"Cookie: __Host-gotunnel={first}")
        assert name == b"b" and f"__host-gotunnel={second};" in cookies(head)[0]


def test_without_sticky_no_cookie_is_set(gateway):
    with crew(gateway, page("a"), page("b")):
        assert not cookies(ask(gateway)[0])


def test_an_address_keeps_its_agent(gateway):
    with crew(gateway, page("a"), page("b"), page("c"), pool={"sticky": "address"}):
        assert len({gateway.get(APP)[1] for _ in range(6)}) == 1


def signs_in(name):
    """Asks each connection for a login of its own, as NTLM does."""

    def script(stream):
        head = b""
        for body in (b"sign in", name.encode(), name.encode()):
            while b"\r\n\r\n" not in head:
                head += stream.read(timeout=TIMEOUT)
            field = ("WWW-Authenticate: NTLM TlRM",) if body == b"sign in" else ()
            status = "401 Unauthorized" if field else "200 OK"
            stream.write(answer(body, *field, status=status))
            head = b""
        stream.read()

    return script


def test_a_login_of_a_connection_stays_with_its_agent(gateway):
    with crew(gateway, signs_in("a"), signs_in("b")), gateway.dial(APP) as visitor:
        visitor.send(request())
        assert visitor.read_message()[1] == b"sign in"
        for _ in range(2):
            visitor.send(request("GET", "/", "Authorization: NTLM TlRM"))
            assert visitor.read_message()[1] == b"a"


# Policies


def test_rates_count_by_hostname(gateway):
    policy = {"rate_limit": {"total": 0.01, "total_burst": 4}}
    with crew(gateway, page("a"), page("b"), policies={APP: policy}) as agents:
        assert [gateway.get(APP)[0] for _ in range(6)] == [200] * 4 + [429] * 2
        agents[0].session.close()
        wait_until(lambda: len(pool_of(gateway).members) == 1)
        assert gateway.get(APP)[0] == 429


# Upgrades


def echo(stream):
    head = b""
    while b"\r\n\r\n" not in head:
        head += stream.read(timeout=TIMEOUT)
    stream.write(b"HTTP/1.1 101 X\r\nConnection: Upgrade\r\nUpgrade: chat\r\n\r\n")
    while data := stream.read():
        stream.write(data)


def test_an_upgraded_visit_counts_until_it_ends(gateway):
    with crew(gateway, echo, page("b")):
        with gateway.dial(APP) as visitor:
            visitor.send(request("GET", "/", "Connection: Upgrade", "Upgrade: chat"))
            assert status_of(visitor.read_head()) == 101
            visitor.send(b"hello")
            assert visitor.read_exactly(5) == b"hello"
            assert sum(member.visits for member in pool_of(gateway).members) == 1
            assert [gateway.get(APP)[1] for _ in range(2)] == [b"b", b"b"]
        idle(gateway)


def test_an_upgrade_goes_elsewhere_as_other_requests_do(gateway):
    with crew(gateway, refuses, echo), gateway.dial(APP) as visitor:
        visitor.send(request("GET", "/", "Connection: Upgrade", "Upgrade: chat"))
        assert status_of(visitor.read_head()) == 101


# tcp mode


def repeats(name):
    def script(stream):
        stream.write(name.encode())
        while data := stream.read():
            stream.write(data)

    return script


def waits(stream):
    """A target that speaks when it was spoken to."""
    while data := stream.read():
        stream.write(data)


def refuses_tcp(stream):
    stream.reset(code=REFUSED)


def tcp(gateway, *scripts, **how):
    return crew(gateway, *scripts, hostname=RAW, mode="tcp", **how)


def test_tcp_visits_take_turns(gateway):
    with tcp(gateway, repeats("a"), repeats("b")):
        came = []
        for _ in range(4):
            with gateway.dial(RAW) as visitor:
                came.append(visitor.read_exactly(1))
                visitor.send(b"hello")
                assert visitor.read_exactly(5) == b"hello"
                visitor.finish()
                assert visitor.read_to_end() == b""
            idle(gateway, RAW)
        assert sorted(came) == [b"a", b"a", b"b", b"b"]


def test_a_tcp_visit_goes_elsewhere_if_the_target_is_away(gateway):
    with tcp(gateway, refuses_tcp, repeats("b")) as agents:
        for _ in range(3):
            with gateway.dial(RAW) as visitor:
                assert visitor.read_exactly(1) == b"b"
        assert agents[0].visits == 1
        idle(gateway, RAW)


def test_what_a_tcp_visitor_has_sent_goes_along(gateway):
    def script(stream):
        stream.read_exactly(5)
        refuses_tcp(stream)

    with tcp(gateway, script, waits), gateway.dial(RAW) as visitor:
        visitor.send(b"hello")
        assert visitor.read_exactly(5) == b"hello"
        visitor.send(b" there")
        assert visitor.read_exactly(6) == b" there"
        visitor.finish()
        assert visitor.read_to_end() == b""


def test_a_half_close_goes_along(gateway):
    def script(stream):
        assert stream.read_exactly(5) == b"hello" and not stream.read()
        refuses_tcp(stream)

    with tcp(gateway, script, waits), gateway.dial(RAW) as visitor:
        visitor.send(b"hello")
        visitor.finish()
        assert visitor.read_to_end() == b"hello"


def test_a_tcp_visit_that_has_sent_much_stays(gateway, monkeypatch):
    monkeypatch.setattr(pooled_relay, "RESEND", 1000)

    def script(stream):
        stream.read_exactly(5000)
        refuses_tcp(stream)

    with tcp(gateway, script, script) as agents, gateway.dial(RAW) as visitor:
        visitor.send(b"x" * 9000)
        with pytest.raises(CUT):
            visitor.read_to_end()
        assert sum(agent.visits for agent in agents) == 1


def test_a_tcp_visit_that_has_begun_stays(gateway):
    def script(stream):
        stream.write(b"a")
        stream.read_exactly(1)
        stream.reset()

    with tcp(gateway, script, repeats("b")) as (_, other), gateway.dial(RAW) as visitor:
        assert visitor.read_exactly(1) == b"a"
        visitor.send(b"x")
        with pytest.raises(CUT):
            visitor.read_exactly(1)
        assert other.visits == 0


def test_if_no_target_is_there_a_tcp_visitor_is_reset(gateway):
    with tcp(gateway, refuses_tcp, refuses_tcp) as agents, gateway.dial(RAW) as visitor:
        with pytest.raises(CUT):
            visitor.read_exactly(1)
        assert [agent.visits for agent in agents] == [1, 1]
        idle(gateway, RAW)


def test_a_silent_agent_does_not_hold_up_tcp_visits(gateway, hasty):
    with tcp(gateway, says_nothing, repeats("b"), silent=[0]) as (first, _):
        for _ in range(3):
            with gateway.dial(RAW) as visitor:
                assert visitor.read_exactly(1) == b"b"
        assert first.visits == 1


def test_an_agent_that_leaves_gets_no_tcp_visits(gateway):
    with tcp(gateway, repeats("a"), repeats("b")) as agents:
        registry = gateway.inner._registry
        stale = registry.lookup(RAW)
        agents[0].session.leave()
        wait_until(lambda: len(registry.lookup(RAW).pool.members) == 1)
        with registry._lock:
            registry._put({RAW: stale})
        for _ in range(2):
            with gateway.dial(RAW) as visitor:
                assert visitor.read_exactly(1) == b"b"


def test_connect_leads_to_a_pool(gateway):
    with tcp(gateway, refuses_tcp, repeats("b")), gateway.dial(GATEWAY_HOST) as visitor:
        visitor.send(f"CONNECT {RAW}:1 HTTP/1.1\r\nHost: {RAW}:1\r\n\r\n".encode())
        assert status_of(visitor.read_head()) == 200
        assert visitor.read_exactly(1) == b"b"


# Agents of ours


def test_our_agents_share_a_hostname_and_its_passwords(gateway, tmp_path, origin):
    origin.serve(lambda target: (target.read_head(), target.send(answer(b"page"))))
    with contextlib.ExitStack() as stack, reserved_port() as nobody:
        for name, port in (("one", origin.port), ("two", origin.port), ("off", nobody)):
            folder = tmp_path / name
            folder.mkdir()
            tunnel = {
                "hostname": APP,
                "target": f"127.0.0.1:{port}",
                "pool": "true",
                "basic_auth": "me:secret",
            }
            agent = agent_here(gateway, folder, tunnels=[tunnel], ready=False)
            stack.enter_context(agent)
        wait_until(lambda: (r := gateway.inner._registry.lookup(APP)) and len(r.tunnels()) == 3)
        assert ask(gateway)[0].startswith(b"HTTP/1.1 401 ")
        for _ in range(4):
            assert ask(gateway, "GET", "/", "Authorization: Basic bWU6c2VjcmV0")[1] == b"page"
