"""Live events: how many readers there are, what ends them, and what they are sent."""

import queue
import threading
from types import SimpleNamespace

import fake_exchange
import pytest
from support import TIMEOUT

from gotunnel_server.dashboard import events
from gotunnel_server.dashboard.calls import May, Refused, Who
from gotunnel_server.dashboard.events import MOST_OF_ADDRESS, MOST_READERS, Events

STATE = SimpleNamespace(name="state", data='{"a":1}')


class Source:
    """Its test says what is due."""

    def __init__(self):
        self.due = queue.Queue()
        self.due.put([STATE])

    def poll(self):
        return [] if self.due.empty() else self.due.get_nowait()


class End:
    """The visitor's end of a Feed."""

    def __init__(self):
        self.sent, self.finished, self.left = queue.Queue(), threading.Event(), False

    def write(self, data):
        self.sent.put(data)

    def finish(self):
        self.finished.set()

    def next(self):
        return self.sent.get(timeout=TIMEOUT)


class Tab:
    """A reader whose thread its test runs."""

    def __init__(self, all_events, address="192.0.2.1", may=May.READ, is_valid=lambda: True):
        self.visitor, self.end = fake_exchange.Visitor(), End()
        all_events.serve(self.visitor, Who(may, address, is_valid=is_valid))
        self.feed = self.visitor.events[0][-1]

    def run(self):
        self.thread = threading.Thread(target=self.feed.run, args=(self.end, lambda: self.end.left))
        self.thread.start()
        return self


@pytest.fixture
def sources():
    """Those of the readers, in the order of their coming."""
    return []


@pytest.fixture
def all_events(sources, monkeypatch):
    def source(may):
        sources.append(Source())
        return sources[-1]

    monkeypatch.setattr(events, "POLL", 0.005)
    made = Events(source)
    yield made
    made.drain()


def test_a_reader_is_told_at_once_how_soon_to_come_back_and_then_the_state(all_events):
    tab = Tab(all_events)
    _, status, fields, data, _ = tab.visitor.events[0]
    assert (status, data) == (200, b"retry: 2000\n\n")
    assert dict(fields)["Content-Type"] == "text/event-stream"
    tab.run()
    assert tab.end.next() == b'event: state\ndata: {"a":1}\n\n'


def test_events_that_are_due_together_are_sent_together(all_events, sources):
    tab = Tab(all_events).run()
    tab.end.next()
    sources[0].due.put([STATE, SimpleNamespace(name="visits", data='{"visits":[]}')])
    assert tab.end.next() == (
        b'event: state\ndata: {"a":1}\n\nevent: visits\ndata: {"visits":[]}\n\n'
    )


def test_silence_is_broken_before_a_proxy_ends_it(all_events, monkeypatch):
    monkeypatch.setattr(events, "PING_EVERY", 0)
    tab = Tab(all_events).run()
    tab.end.next()
    assert tab.end.next() == b": ping\n\n"


@pytest.mark.parametrize("why", ["left", "logged out"])
def test_a_reader_that_has_left_or_may_not_read_any_more_is_ended(all_events, monkeypatch, why):
    monkeypatch.setattr(events, "LOOK", 0)
    valid = [True]
    tab = Tab(all_events, is_valid=lambda: valid[0]).run()
    tab.end.next()
    if why == "left":
        tab.end.left = True
    else:
        valid[0] = False
    assert tab.end.finished.wait(TIMEOUT)
    tab.thread.join(TIMEOUT)
    assert all_events.taken == 0
    assert tab.end.sent.empty() == (why == "left")


def test_a_drain_ends_all_and_takes_no_more(all_events):
    tabs = [Tab(all_events).run() for _ in range(3)]
    all_events.drain()
    for tab in tabs:
        assert tab.end.finished.wait(TIMEOUT)
        tab.thread.join(TIMEOUT)
    with pytest.raises(Refused, match="about to stop"):
        Tab(all_events)


def test_a_reader_that_breaks_gives_its_place_back(all_events):
    tab = Tab(all_events)
    tab.end.write = lambda data: (_ for _ in ()).throw(TimeoutError("reads nothing"))
    with pytest.raises(TimeoutError):
        tab.feed.run(tab.end, lambda: False)
    assert all_events.taken == 0
    Tab(all_events).feed.give_up()  # there was no thread
    assert all_events.taken == 0


def test_an_address_has_few_readers_and_all_together_not_many(all_events):
    for number in range(MOST_OF_ADDRESS):
        Tab(all_events, f"2001:db8::{number}")  # one /64
    with pytest.raises(Refused, match=f"{MOST_OF_ADDRESS} from your address") as refused:
        Tab(all_events, "2001:db8::ffff")
    assert refused.value.status == 503 and dict(refused.value.fields)["Retry-After"] == "5"
    for number in range(MOST_READERS - MOST_OF_ADDRESS):
        Tab(all_events, f"192.0.2.{number}")
    with pytest.raises(Refused, match=f"{MOST_READERS} readers"):
        Tab(all_events, "198.51.100.1")


def test_a_tab_that_was_loaded_again_takes_the_place_of_its_own_old_connection(
    all_events, monkeypatch
):
    monkeypatch.setattr(events, "LOOK", 1e9)  # its thread would not look
    tabs = [Tab(all_events).run() for _ in range(MOST_OF_ADDRESS)]
    for tab in tabs:
        tab.end.next()
    tabs[1].end.left = True
    Tab(all_events)
    assert tabs[1].end.finished.wait(TIMEOUT)
    with pytest.raises(Refused):
        Tab(all_events)


def test_without_room_for_another_relay_it_is_refused(all_events):
    visitor = fake_exchange.Visitor(room=False)
    with pytest.raises(Refused, match="too many open connections"):
        all_events.serve(visitor, Who(May.READ, "192.0.2.1"))
    assert all_events.taken == 0
