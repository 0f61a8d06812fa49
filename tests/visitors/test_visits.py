"""The record of each visit: what it says, that there is one of each, and none without a reader."""

import queue
import threading
import time

import pytest
from support import (
    APP,
    CUT,
    GATEWAY_HOST,
    RAW,
    TIMEOUT,
    agent_here,
    answer,
    dial_tls,
    gateway_here,
    request,
    reserved_port,
    status_of,
    wait_until,
)

from gotunnel_server.net import listener
from gotunnel_server.visitors import visits as visits_module
from gotunnel_server.visitors.visits import Visits


class Records:
    """A subscriber that a test reads from."""

    def __init__(self):
        self._came = queue.SimpleQueue()

    def __call__(self, visits):
        for visit in visits:
            self._came.put(visit)

    def next(self):
        return self._came.get(timeout=TIMEOUT)

    def nothing_more(self):
        with pytest.raises(queue.Empty):
            self._came.get(timeout=3 * visits_module.DELAY)
        return True


@pytest.fixture
def records():
    return Records()


@pytest.fixture
def gateway(cache, tmp_path, origin, records):
    ports = {"http": {APP: origin.port}, "tcp": {RAW: origin.port}}
    with gateway_here(cache, (records,)) as gateway, agent_here(gateway, tmp_path, **ports):
        yield gateway


def begin(gateway, origin, data, hostname=APP):
    """A visitor that has sent ``data``, and its target, which has read a head."""
    visitor = gateway.dial(hostname)
    visitor.send(data)
    target = origin.accept()
    target.read_head()
    return visitor, target


def test_an_http_visit_is_told_whole(gateway, origin, records):
    asked = request("PUT", "/a?b=c", "User-Agent: curl/8", "Referer: https://x/", body=b"12345")
    before = time.time()
    visitor, target = begin(gateway, origin, asked)
    with visitor, target:
        target.read_exactly(5)
        time.sleep(0.05)
        target.send(answer(b"fine", status="201 Created"))
        head, _ = visitor.read_message()
        visit = records.next()
    assert (visit.method, visit.hostname, visit.path) == ("PUT", APP, "/a?b=c")
    assert (visit.protocol, visit.scheme, visit.visitor) == ("HTTP/1.1", "https", "127.0.0.1")
    assert (visit.status, visit.error) == (201, "")
    assert (visit.referer, visit.user_agent) == ("https://x/", "curl/8")
    assert (visit.received, visit.sent) == (len(asked), len(head) + 4)
    assert visit.route.hostname == APP and visit.agent
    assert before <= visit.at <= time.time()
    assert 0.05 <= visit.first_byte <= visit.duration < TIMEOUT
    assert records.nothing_more()


def test_each_request_of_a_connection_is_a_visit(gateway, origin, records):
    visitor, target = begin(gateway, origin, request(path="/1"))
    with visitor, target:
        for number in (1, 2, 3):
            target.send(answer(b"ok"))
            visitor.read_message()
            visit = records.next()
            assert (visit.path, visit.status) == (f"/{number}", 200)
            if number < 3:
                visitor.send(request(path=f"/{number + 1}"))
                target.read_head()
    assert records.nothing_more()


@pytest.mark.parametrize(
    "sni, data, status, error",
    [
        (GATEWAY_HOST, request(host=GATEWAY_HOST), 200, ""),
        (GATEWAY_HOST, request(host="else.example"), 421, "misdirected"),
        (RAW + ".x", None, 502, "no-tunnel"),
        (GATEWAY_HOST, b"GET / HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n", 400, "malformed-request"),
        (GATEWAY_HOST, b"GET / HTTP/1.1\r\nX: " + b"x" * 70_000, 431, "malformed-request"),
        (GATEWAY_HOST, b"CONNECT a:1 HTTP/1.1\r\nHost: a:1\r\n\r\n", 502, "no-tunnel"),
    ],
)  # fmt: skip
def test_pages_of_the_gateway_are_visits(cache, records, sni, data, status, error):
    if data is None:  # without TLS, since that name has no certificate
        data = request(host=sni)
    with gateway_here(cache, (records,)) as gateway, gateway.dial(GATEWAY_HOST) as visitor:
        if sni.endswith(".x"):
            with dial_tls(gateway.public_port, None, unchecked(gateway)) as nameless:
                nameless.send(data)
                assert status_of(nameless.read_head()) == status
        else:
            visitor.send(data)
            assert status_of(visitor.read_head()) == status
        visit = records.next()
    assert (visit.status, visit.error, visit.route) == (status, error, None)
    assert visit.sent > 100 and visit.first_byte <= visit.duration
    assert visit.hostname and visit.received and visit.scheme
    if status in (400, 431):
        assert visit.hostname == GATEWAY_HOST
    if status == 400:
        assert (visit.method, visit.received) == ("GET", len(data))


def unchecked(gateway):
    context = gateway.context
    context.check_hostname = False
    return context


def test_a_head_that_never_ends_is_a_visit(cache, records, monkeypatch):
    monkeypatch.setattr(listener, "SWEEP", 0.05)
    with gateway_here(cache, (records,), HEADER_TIMEOUT="0.3") as gateway:
        with gateway.dial(GATEWAY_HOST) as visitor:
            visitor.send(b"GET / HT")
            assert status_of(visitor.read_head()) == 408
            visit = records.next()
    assert (visit.status, visit.error, visit.visitor) == (408, "head-timeout", "127.0.0.1")
    assert (visit.hostname, visit.received) == (GATEWAY_HOST, len(b"GET / HT"))


def test_connections_that_ask_for_nothing_are_no_visits(gateway, records):
    gateway.dial(APP).close()
    assert records.nothing_more()


def test_a_visitor_that_leaves_before_its_answer_is_told_as_499(gateway, origin, records):
    visitor, target = begin(gateway, origin, request())
    with target:
        visitor.close()
        visit = records.next()
    assert (visit.status, visit.error, visit.sent) == (499, "visitor-left", 0)
    assert visit.first_byte is None and visit.route.hostname == APP


def test_a_visitor_that_leaves_amid_its_answer_is_told(gateway, origin, records):
    visitor, target = begin(gateway, origin, request())
    with target:
        target.send(b"HTTP/1.1 200 OK\r\nContent-Length: 1000000\r\n\r\nx")
        visitor.read_head()
        visitor.close()
        visit = records.next()
    assert (visit.status, visit.error) == (200, "visitor-left")


@pytest.mark.parametrize("head", [b"Content-Length: 10\r\n", b"Transfer-Encoding: chunked\r\n"])
@pytest.mark.parametrize("how", ["close", "reset"])
def test_a_target_that_breaks_off_is_told(gateway, origin, records, head, how):
    visitor, target = begin(gateway, origin, request())
    with visitor:
        target.send(b"HTTP/1.1 200 OK\r\n" + head + b"\r\n")
        visitor.read_head()
        getattr(target, how)()
        with pytest.raises(CUT):
            visitor.read_to_end()
        visit = records.next()
    assert (visit.status, visit.error) == (200, "cut-short")


def test_a_target_without_an_answer_is_told_with_the_pages_code(gateway, origin, records):
    visitor, target = begin(gateway, origin, request())
    with visitor:
        target.close()
        assert status_of(visitor.read_head()) == 502
        visit = records.next()
    assert (visit.status, visit.error, visit.route.hostname) == (502, "no-answer", APP)


def test_an_upgraded_connection_is_one_visit_until_its_end(gateway, origin, records):
    upgrade = request("GET", "/chat", "Connection: Upgrade", "Upgrade: websocket")
    visitor, target = begin(gateway, origin, upgrade)
    with visitor, target:
        target.send(b"HTTP/1.1 101 X\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n")
        head = visitor.read_head()
        assert records.nothing_more()
        visitor.send(b"x" * 1000)
        target.read_exactly(1000)
        target.send(b"y" * 100)
        visitor.read_exactly(100)
        visitor.finish()
        target.read_to_end()
        target.close()
        visitor.read_to_end()
        visit = records.next()
    assert (visit.method, visit.path, visit.status, visit.error) == ("GET", "/chat", 101, "")
    assert (visit.received, visit.sent) == (len(upgrade) + 1000, len(head) + 100)


def test_a_tcp_visit_is_told_at_its_end(gateway, origin, records):
    with gateway.dial(RAW) as visitor, origin.accept() as target:
        visitor.send(b"question")
        target.read_exactly(8)
        target.send(b"the answer")
        visitor.read_exactly(10)
        assert records.nothing_more()
        visitor.finish()
        target.read_to_end()
        target.close()
        visitor.read_to_end()
        visit = records.next()
    assert (visit.protocol, visit.hostname, visit.method, visit.path) == ("tcp", RAW, "", "")
    assert (visit.status, visit.error) == (200, "")
    assert (visit.received, visit.sent) == (8, 10)
    assert 0 < visit.first_byte <= visit.duration and visit.agent


@pytest.mark.parametrize("who", ["visitor", "target"])
def test_a_tcp_visit_that_breaks_tells_which_side_did(gateway, origin, records, who):
    with gateway.dial(RAW) as visitor, origin.accept() as target:
        target.send(b"hello")
        visitor.read_exactly(5)
        {"visitor": visitor, "target": target}[who].reset()
        visit = records.next()
    word = {"visitor": "visitor-left", "target": "cut-short"}[who]
    assert (visit.status, visit.error, visit.sent) == (200, word, 5)


def test_a_connect_is_one_visit(gateway, origin, records):
    head = f"CONNECT {RAW}:{origin.port} HTTP/1.1\r\nHost: {RAW}:{origin.port}\r\n\r\n".encode()
    with gateway.dial(GATEWAY_HOST) as visitor:
        visitor.send(head)
        granted = visitor.read_head()
        with origin.accept() as target:
            target.send(b"hello")
            visitor.read_exactly(5)
            visitor.finish()
            target.read_to_end()
            target.close()
            visitor.read_to_end()
            visit = records.next()
    assert (visit.method, visit.path) == ("CONNECT", f"{RAW}:{origin.port}")
    assert (visit.status, visit.error, visit.route.hostname) == (200, "", RAW)
    assert (visit.received, visit.sent) == (len(head), len(granted) + 5)


def test_a_tcp_target_that_is_not_there_is_told(cache, tmp_path, records):
    with reserved_port() as port, gateway_here(cache, (records,)) as gateway:
        with agent_here(gateway, tmp_path, tcp={RAW: port}), gateway.dial(RAW) as visitor:
            with pytest.raises(CUT):
                visitor.read_to_end()
            visit = records.next()
    assert (visit.status, visit.error) == (502, "target-unreachable")


def test_a_refused_visit_is_told(cache, tmp_path, origin, records):
    deny = {"DEFAULT_DENY": "127.0.0.1"}
    with gateway_here(cache, (records,), **deny) as gateway:
        ports = {"http": {APP: origin.port}, "tcp": {RAW: origin.port}}
        with agent_here(gateway, tmp_path, **ports):
            assert gateway.get(APP)[0] == 403
            visit = records.next()
            assert (visit.status, visit.error, visit.path) == (403, "not-allowed", "/")
            with gateway.dial(RAW) as visitor, pytest.raises(CUT):
                visitor.read_to_end()
            visit = records.next()
            assert (visit.status, visit.error, visit.protocol) == (403, "not-allowed", "tcp")


def test_a_visit_that_outlasts_the_drain_is_told(cache, tmp_path, origin, records):
    with gateway_here(cache, (records,)) as gateway:
        with agent_here(gateway, tmp_path, http={APP: origin.port}):
            visitor, target = begin(gateway, origin, request())
            with visitor, target:
                gateway.inner.stop()
                visit = records.next()
    assert visit.error == "gateway-stopped"


def test_a_subscriber_with_a_bug_hurts_no_visit(cache, records, caplog):
    def fail(visit):
        raise ValueError("a bug")

    with gateway_here(cache, (fail, records)) as gateway:
        for _ in range(2):
            assert gateway.get(GATEWAY_HOST)[0] == 200
            assert records.next().status == 200
    assert "a bug" in caplog.text


def test_trusted_proxies_name_the_visitor(cache, records):
    fields = ("X-Forwarded-For: 192.0.2.7",)
    for trusted, address in (("127.0.0.1", "192.0.2.7"), ("192.0.2.1", "127.0.0.1")):
        with gateway_here(cache, (records,), TRUSTED_PROXIES=trusted) as gateway:
            with gateway.dial(GATEWAY_HOST) as visitor:
                visitor.send(request("GET", "/", *fields, host=GATEWAY_HOST))
                visitor.read_message()
                assert records.next().visitor == address


def test_without_subscribers_no_record_is_made(cache, tmp_path, origin, monkeypatch):
    made = []
    monkeypatch.setattr(visits_module, "Visit", made.append)
    with gateway_here(cache) as gateway, agent_here(gateway, tmp_path, http={APP: origin.port}):
        visitor, target = begin(gateway, origin, request())
        with visitor, target:
            target.send(answer())
            visitor.read_message()
        assert gateway.get(GATEWAY_HOST)[0] == 200
        wait_until(lambda: not gateway.inner._visitors._visitors)
    assert made == []


def ended_visits(subscribers, count):
    """The Visits, whose thread does not run, and ``count`` of its visits, which have ended."""
    visits = Visits(subscribers, (), ids=False, detailed=False)
    ended = [visits.begin("127.0.0.1") for _ in range(count)]
    for visit in ended:
        visit.end()
    return visits, ended


def test_records_are_handed_over_in_their_order_once_a_batch_has_ended():
    got = []
    visits, ended = ended_visits([got.extend], visits_module.BATCH - 1)
    assert got == []
    (last := visits.begin("127.0.0.1")).end()
    assert got == [*ended, last]


def test_what_waits_is_handed_over_when_it_is_asked_for_and_at_the_end():
    got = []
    visits, ended = ended_visits([got.extend], 3)
    visits.settle()
    assert got == ended
    (last := visits.begin("127.0.0.1")).end()
    visits.stop()
    assert got == [*ended, last]


def test_a_subscriber_that_raises_hurts_neither_visits_nor_other_subscribers(caplog):
    got = []

    def broken(_visit):
        raise ValueError("oh")

    visits, ended = ended_visits([broken, got.extend], 2)
    visits.settle()
    assert got == ended
    assert "2 visits may not be recorded (bug, traceback follows)" in caplog.text


def test_threads_wait_for_the_one_that_hands_over_when_too_many_records_wait(monkeypatch):
    monkeypatch.setattr(visits_module, "BATCH", 2)
    monkeypatch.setattr(visits_module, "MOST_WAITING", 4)
    hold, held, got = threading.Event(), threading.Event(), []

    def slow(visits):
        held.set()
        hold.wait(TIMEOUT)
        got.extend(visits)

    visits = Visits([slow], (), ids=False, detailed=False)
    first = threading.Thread(target=lambda: [visits.begin("").end() for _ in range(2)])
    first.start()
    assert held.wait(TIMEOUT)
    for _ in range(3):
        visits.begin("").end()  # they wait for nothing
    fourth = threading.Thread(target=lambda: visits.begin("").end())
    fourth.start()
    fourth.join(0.05)
    assert fourth.is_alive() and got == []
    hold.set()
    fourth.join(TIMEOUT)
    first.join(TIMEOUT)
    visits.settle()
    assert len(got) == 6
