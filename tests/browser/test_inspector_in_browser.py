"""How the inspector's page keeps still, and what it does without an agent behind it. Its records
are made by the test: no agent, no gateway. test_inspector_of_an_agent.py has the rest."""

import pytest
from inspector_samples import a_record, a_ring

from gotunnel_agent.inspector.access import Door
from gotunnel_agent.inspector.api import Api
from gotunnel_agent.inspector.server import InspectorServer, listen

TOKEN = "t" * 43


class Inspected:
    """An inspector that shows the samples."""

    def __init__(self, port=0, token=TOKEN):
        self.ring = a_ring()
        listening = listen("127.0.0.1", port)
        self.port = listening.getsockname()[1]
        door = Door(token, "127.0.0.1", self.port)
        told = {"tunnels": [{"hostname": "app.example.com", "target": "127.0.0.1:8000",
                             "url": "https://app.example.com/"}]}  # fmt: skip
        self._server = InspectorServer(listening, door, Api(self.ring, door, lambda: told))
        self._server.start()
        self.url = f"http://127.0.0.1:{self.port}/?token={token}"

    def close(self):
        self._server.close()


@pytest.fixture
def inspected():
    inspected = Inspected()
    yield inspected
    inspected.close()


@pytest.fixture
def shown(page, inspected):
    """The page, once it shows the samples."""
    page.open(inspected.url)
    page.until(lambda: page.script("return document.getElementById('live').textContent") == "Live")
    page.until_it_says("/page?q=1")
    yield page
    page.open("about:blank")  # before the inspector ends: a lost connection is an error


def paths(page):
    """Those of the rows, the first one at the top."""
    return page.script(
        "return [...document.querySelectorAll('.row')].sort((a, b) => "
        "  a.getAttribute('aria-posinset') - b.getAttribute('aria-posinset'))"
        ".map((row) => row.querySelector('.path').textContent)"
    )


def choose(page, number, tab="overview"):
    page.script("location.hash = arguments[0]", f"#visit={number}&tab={tab}")
    page.until(lambda: page.script(
        "return document.getElementById('line').textContent.includes(arguments[0]) &&"
        " !document.getElementById('panels').hidden", f"visit {number}"
    ))  # fmt: skip


def press(page, keys):
    page.driver.switch_to.active_element.send_keys(keys)


def test_new_visits_do_not_move_what_is_read(shown, inspected):
    for number in range(60):
        inspected.ring.add(a_record(path=f"/{number}"))
    shown.until(lambda: "/59" in paths(shown))
    shown.script("document.getElementById('list').scrollTop = 700")
    place = "return document.elementFromPoint(60, 400)?.closest('.row')?.id"
    before = shown.until(lambda: shown.script(place))
    for _ in range(3):
        inspected.ring.add(a_record(path="/late"))
    shown.until_it_says("3 new")
    assert shown.script(place) == before
    shown.click("#fresh")
    shown.until(lambda: paths(shown)[0] == "/late")


def test_keys_choose_visits_and_the_choice_survives_news(shown, inspected):
    press(shown, "j")
    press(shown, "j")
    chosen = "return document.querySelector('.row[aria-selected=true]')?.dataset.id"
    shown.until(lambda: shown.script(chosen) == "10")
    inspected.ring.add(a_record(path="/new"))
    shown.until(lambda: paths(shown)[0] == "/new")
    assert shown.script(chosen) == "10"
    press(shown, "p")
    inspected.ring.add(a_record(path="/held"))
    shown.until_it_says("Paused", "1 new")
    press(shown, "p")
    shown.until(lambda: paths(shown)[0] == "/held")
    press(shown, "?")
    shown.until_it_says("Keys and search")


def test_a_websocket_is_not_offered_to_be_replayed(shown, inspected):
    choose(shown, 9)
    replay = "const it = document.getElementById('replay'); return [it.disabled, it.title]"
    disabled, why = shown.script(replay)
    assert disabled and "WebSocket" in why
    press(shown, "r")  # does nothing
    choose(shown, 10)
    assert shown.script(replay) == [False, ""]


def test_narrow_window_has_a_page_for_a_visit(shown):
    shown.as_wide_as(360)
    shown.until(lambda: not shown.seen("#visit"))
    shown.click(".row .path", "/gone")
    shown.until(lambda: shown.seen("#title") and not shown.seen("#list"))
    shown.until_it_says("no response came")
    shown.driver.back()
    shown.until(lambda: shown.seen("#list") and not shown.seen("#title"))
    assert shown.script("return document.documentElement.scrollWidth") <= 360


def test_empty_list_says_what_to_do(shown):
    shown.click("#clear")
    shown.click("#clear-dialog button", "Forget")
    shown.until_it_says("Waiting for the first visit", "https://app.example.com/")


def test_lost_connection_is_told_and_recovers(shown, browser, inspected):
    browser.expect("ERR_|Failed to load resource")
    choose(shown, 3)
    inspected.close()
    shown.until_it_says("Connection lost, trying again")
    again = Inspected(inspected.port)
    try:
        again.ring.add(a_record(path="/since"))
        shown.until(lambda: paths(shown)[:1] == ["/since"])
        assert "Live" in shown.text and "/api/orders" in shown.text  # the same visit as before
    finally:
        again.close()
    shown.until_it_says("Connection lost")
    other = Inspected(inspected.port, "z" * 43)
    try:
        shown.until_it_says("Open the new address")
    finally:
        other.close()
