"""Rates, the last visits, and the events of a reader. The clock is the test's."""

import json
import threading
from types import SimpleNamespace

import pytest
from support import TIMEOUT

from gotunnel_server.dashboard import live as live_module
from gotunnel_server.dashboard.build import Rendered
from gotunnel_server.dashboard.live import EVERY, FRESH, MOST_KEPT, MOST_SHOWN, Live, Overview
from gotunnel_server.dashboard.state import SPARK
from gotunnel_server.routes import Route
from gotunnel_server.visitors.visit import Visit


class Clock:
    def __init__(self, now=1000.5):
        self.now = now

    def __call__(self):
        return self.now


def agent(name="office"):
    return SimpleNamespace(agent=SimpleNamespace(identity=SimpleNamespace(issuer=name), host="::1"))


def ended(hostname="app.test", path="/", status=200, *, routed=True, **more):
    visit = Visit(None, "192.0.2.7", 0.0)
    visit.hostname, visit.method, visit.path, visit.status = hostname, "GET", path, status
    if routed:
        visit.route = Route(hostname, "http", agent())
    for name, value in more.items():
        setattr(visit, name, value)
    return visit


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def live(clock):
    return Live(clock)


# Rates


def test_each_point_is_a_full_second(live, clock):
    live([ended()] * 3)
    assert sum(live.rates().total) == 0  # the second is not full yet
    clock.now += 1
    live([ended("b.test")])
    clock.now += 1
    rates = live.rates()
    assert rates.total[-3:] == [0, 3, 1] and len(rates.total) == SPARK
    assert rates.by_hostname["app.test"][-2:] == [3, 0]
    assert rates.by_hostname["b.test"][-2:] == [0, 1]


@pytest.mark.parametrize("silence", [1, 2, 59, 60, 61, 3600, 1e6])
def test_what_is_older_than_the_line_is_gone(live, clock, silence):
    live([ended()])
    clock.now += silence
    total = live.rates().total
    assert len(total) == SPARK and sum(total) == (silence <= SPARK)
    if silence <= SPARK:
        assert total[-int(silence)] == 1


def test_a_clock_that_does_not_move_or_goes_back_does_no_harm(live, clock):
    live([ended()])
    clock.now -= 5
    live([ended()])
    clock.now += 6
    assert live.rates().total[-1] == 2


def test_visits_without_a_route_count_in_all_and_for_no_hostname(live, clock):
    """Any stranger can invent hostnames."""
    live([ended(f"h{number}.test", routed=False) for number in range(50)])
    clock.now += 1
    rates = live.rates()
    assert rates.total[-1] == 50 and rates.by_hostname == {}


def test_the_dashboards_own_visits_are_left_out(live, clock):
    live([ended(is_local=True, routed=False), ended(path="/a")])
    clock.now += 1
    assert live.rates().total[-1] == 1
    assert [visit["path"] for visit in live.last()] == ["/a"]


# The last visits


def test_the_last_visits_can_be_chosen(live):
    live([ended(path="/1"), ended("b.test", "/2", 502), ended(path="/3", error="cut-short")])
    live([ended(path=f"/{number}") for number in range(4, 7)])
    paths = lambda **more: [visit["path"] for visit in live.last(**more)]  # noqa: E731
    assert paths() == ["/1", "/2", "/3", "/4", "/5", "/6"]
    assert paths(most=2) == ["/5", "/6"] and paths(most=0) == []
    assert paths(failed=True) == ["/2", "/3"] and paths(failed=True, hostname="app.test") == ["/3"]
    assert paths(failed=False, most=1) == ["/6"] and paths(hostname="no") == []
    assert [visit["id"] for visit in live.last()] == [1, 2, 3, 4, 5, 6]


def test_a_visit_keeps_neither_its_session_nor_a_long_head(live):
    tunnel = agent()
    visit = ended("h" * 64_000, "/" + "p" * 64_000, method="M" * 64_000)
    visit.route = visit.route._replace(tunnel=tunnel)
    live([visit])
    (kept,) = live.since(0)[1]
    assert max(len(part) for part in kept if isinstance(part, str)) <= 2048
    assert not any(part is tunnel or part is visit.route for part in kept)


def test_no_more_than_the_last_are_kept(live):
    live([ended(path=f"/{number}") for number in range(3 * MOST_KEPT)])
    number, found = live.since(0)
    assert (number, len(found), found[-1].path) == (
        3 * MOST_KEPT, MOST_KEPT, f"/{3 * MOST_KEPT - 1}"
    )  # fmt: skip


# Events


class Said:
    """An Overview of a document that the test changes."""

    def __init__(self, live, clock):
        self.document = {"gateway": {"host": "g", "now": 1, "uptime_seconds": 1}, "totals": {}}
        self.builds = 0
        self.overview = Overview(self.describe, live, clock)

    def describe(self):
        self.builds += 1
        return json.loads(json.dumps(self.document))


@pytest.fixture
def said(live, clock):
    return Said(live, clock)


def polled(feed):
    return [(event.name, json.loads(event.data)) for event in feed.poll()]


def test_the_first_event_is_the_whole_state(said, live):
    live([ended(path="/1")])
    feed = said.overview.feed()
    ((name, state),) = polled(feed)
    assert name == "state" and [visit["path"] for visit in state["visits"]] == ["/1"]
    assert polled(feed) == []


def test_a_state_comes_again_when_more_than_the_time_has_changed(said, clock):
    feed = said.overview.feed()
    polled(feed)
    for _ in range(3):
        clock.now += EVERY
        said.document["gateway"]["now"] += 2
        said.document["gateway"]["uptime_seconds"] += 2
        assert polled(feed) == []
    said.document["totals"]["sessions"] = 1
    assert polled(feed) == []  # not yet
    clock.now += EVERY
    ((name, state),) = polled(feed)
    assert state["totals"] == {"sessions": 1} and "visits" not in state
    assert state["gateway"]["now"] == 7
    assert polled(feed) == []


def test_an_act_is_seen_at_once(said):
    feed = said.overview.feed()
    polled(feed)
    said.document["blocks"] = [1]
    said.overview.touch()
    assert polled(feed)[0][1]["blocks"] == [1]


def test_visits_come_once_in_their_order_and_not_too_often(said, live, clock):
    feed = said.overview.feed()
    polled(feed)
    live([ended(path="/1")])
    ((name, told),) = polled(feed)
    assert name == "visits" and [visit["path"] for visit in told["visits"]] == ["/1"]
    live([ended(path="/2")])
    assert polled(feed) == []
    live([ended(path="/3")])
    clock.now += live_module.VISITS_EVERY
    ((_, told),) = polled(feed)
    assert [visit["path"] for visit in told["visits"]] == ["/2", "/3"] and told["missed"] == 0
    assert polled(feed) == []


def test_no_visit_is_lost_between_the_state_and_the_events(said, live, clock):
    """The state may be older than the reader."""
    said.overview.text()
    live([ended(path="/1")])
    feed = said.overview.feed()
    assert polled(feed)[0][1]["visits"] == []
    assert polled(feed)[0][1]["visits"][0]["path"] == "/1"


def test_a_reader_that_is_too_slow_is_told_what_it_has_missed(said, live, clock):
    slow, quick = said.overview.feed(), said.overview.feed()
    polled(slow), polled(quick)
    for number in range(5):
        live([ended(path=f"/{number}")] * MOST_KEPT)
        clock.now += live_module.VISITS_EVERY
        assert polled(quick)[-1][1]["missed"] == 0
    name, told = polled(slow)[-1]
    assert name == "visits" and len(told["visits"]) == MOST_KEPT
    assert told["missed"] == 4 * MOST_KEPT


def test_one_build_serves_all_readers_and_programs(said, clock):
    feeds = [said.overview.feed() for _ in range(10)]
    for _ in range(8):
        for feed in feeds:
            feed.poll()
        clock.now += EVERY / 8
    assert said.builds == 1
    for _ in range(10):
        said.overview.text()
        said.overview.document()
    assert said.builds == 2
    clock.now += FRESH
    said.overview.text()
    assert said.builds == 3


def test_builds_that_take_long_come_less_often(live, clock):
    builds = []

    def describe():
        builds.append(clock.now)
        clock.now += 1
        return {"gateway": {}, "totals": {}}

    overview = Overview(describe, live, clock)
    until = clock.now + 100
    while clock.now < until:
        overview.text()
        clock.now += FRESH
    assert len(builds) <= 100 / live_module.SPARSE + 1


def test_threads_that_ask_at_once_wait_for_one_build(live, clock):
    begun, go = threading.Event(), threading.Event()
    builds = []

    def describe():
        builds.append(1)
        begun.set()
        go.wait(TIMEOUT)
        return {"gateway": {}, "totals": {}}

    overview = Overview(describe, live, clock)
    texts = []
    threads = [
        threading.Thread(target=lambda: texts.append(overview.text())) for _ in range(5)
    ]  # fmt: skip
    threads[0].start()
    assert begun.wait(TIMEOUT)
    for thread in threads[1:]:
        thread.start()
    go.set()
    for thread in threads:
        thread.join(TIMEOUT)
    assert len(builds) == 1 and len(set(texts)) == 1 and len(texts) == 5


def test_a_build_that_fails_is_tried_again(live, clock):
    fails = [True]

    def describe():
        if fails.pop():
            raise ValueError("a bug")
        return {"gateway": {}, "totals": {}}

    overview = Overview(describe, live, clock)
    with pytest.raises(ValueError, match="a bug"):
        overview.text()
    fails[:] = [False]
    assert json.loads(overview.text()) == {"gateway": {}, "totals": {}, "visits": []}


def test_a_page_is_rendered_once_for_all_that_ask_meanwhile():
    documents = [{"public": True, "gateway": {"host": host}} for host in ("a.test", "b.test")]
    rendered = Rendered(iter([documents[0], documents[0], documents[1]]).__next__)
    first, second, third = rendered(), rendered(), rendered()
    assert first is second and b"a.test" in first.body and b"b.test" in third.body


def test_the_public_form_never_has_visits(live, clock):
    live([ended()])
    overview = Overview(lambda: {"gateway": {}, "public": True}, None, clock)
    assert "visits" not in overview.document() and "visits" not in json.loads(overview.text())
    feed = overview.feed()
    assert polled(feed) == [("state", {"gateway": {}, "public": True})] and polled(feed) == []


def test_the_state_has_the_last_visits(said, live):
    live([ended(path=f"/{number}") for number in range(2 * MOST_SHOWN)])
    for document in (said.overview.document(), json.loads(said.overview.text())):
        assert len(document["visits"]) == MOST_SHOWN
        assert document["visits"][-1]["path"] == f"/{2 * MOST_SHOWN - 1}"
        assert document["visits"][-1]["id"] == 2 * MOST_SHOWN


@pytest.mark.parametrize(
    "foreign",
    ["<script>alert(1)</script>", "\x1b[2J\x07", "a\r\nevent: state\r\ndata: {}", "\u202egpj.exe",
     "\xff\xfe", "\xc3\xa4", "\ud800", "\0", '"}],"x":["', "\u2028\u2029"],
)  # fmt: skip
def test_foreign_text_is_one_line_of_json_without_control_characters(said, live, foreign):
    feed = said.overview.feed()
    feed.poll()
    live([ended(foreign, foreign, method=foreign, visitor=foreign, request_id=foreign)])
    (event,) = feed.poll()
    assert event.data.isascii() and event.data.isprintable()
    (visit,) = json.loads(event.data)["visits"]
    for key in ("hostname", "path", "method", "visitor", "request_id"):
        assert visit[key].isprintable(), key
