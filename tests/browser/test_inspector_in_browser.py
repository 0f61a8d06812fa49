"""The inspector's page in a browser, over records that the test makes: no agent, no gateway."""

import json

import pytest
from inspector_samples import AT, a_record, a_ring
from support import Origin, answer

from gotunnel_agent.config import Target, Tunnel
from gotunnel_agent.inspector.access import Door
from gotunnel_agent.inspector.api import Api
from gotunnel_agent.inspector.record import ENDED, OPEN, Message
from gotunnel_agent.inspector.replay import Replayer
from gotunnel_agent.inspector.server import InspectorServer, listen
from gotunnel_agent.target import Route

TOKEN = "t" * 43
EVIL = "<img src=x onerror=alert(1)>\u202eevil\x1b[31m"


def flaky(wire):
    """Serve one connection: every second request fails."""
    while True:
        head = wire.read_head()
        length = next((int(line[15:]) for line in head.lower().split(b"\r\n")
                       if line.startswith(b"content-length:")), 0)  # fmt: skip
        wire.read_exactly(length)
        flaky.count += 1
        status = "200 OK" if flaky.count % 2 == 0 else "503 Service Unavailable"
        body = json.dumps({"path": head.split(b" ")[1].decode(), "passed": status == "200 OK"})
        wire.send(answer(body.encode(), "Content-Type: application/json", status=status))


class Inspected:
    """An inspector that shows the samples, and replays to a target of its own."""

    def __init__(self, origin, port=0, token=TOKEN):
        self.ring = a_ring()
        tunnel = Tunnel("app.example.com", Target("127.0.0.1", origin.port), "http")
        self._replayer = Replayer(self.ring, lambda: {tunnel.hostname: Route(tunnel)})
        listening = listen("127.0.0.1", port)
        self.port = listening.getsockname()[1]
        door = Door(token, "127.0.0.1", self.port)
        told = {"tunnels": [{"hostname": "app.example.com", "target": "127.0.0.1:8000",
                             "url": "https://app.example.com/"}]}  # fmt: skip
        api = Api(self.ring, door, lambda: told, replays=self._replayer)
        self._server = InspectorServer(listening, door, api)
        self._server.start()
        self.url = f"http://127.0.0.1:{self.port}/?token={token}"

    def close(self):
        self._replayer.close()
        self._server.close()


@pytest.fixture
def target():
    flaky.count = 0
    with Origin() as origin:
        origin.serve(flaky)
        yield origin


@pytest.fixture
def inspected(target):
    inspected = Inspected(target)
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


def panel(page, name):
    return page.script("return document.getElementById(arguments[0]).innerText", f"panel-{name}")


def press(page, keys):
    page.driver.switch_to.active_element.send_keys(keys)


def test_a_visit_appears_and_ends_without_reload(shown, inspected):
    record = inspected.ring.add(a_record(path="/new", status=0, state=OPEN, duration=None))
    shown.until(lambda: paths(shown)[0] == "/new")
    record.status, record.duration, record.state = 201, 0.2, ENDED
    inspected.ring.update(record)
    shown.until(lambda: "201" in shown.one(f"#visit-{record.id}").text)
    assert shown.url == f"http://127.0.0.1:{inspected.port}/"  # the token is out of it


def test_new_visits_do_not_move_what_is_read(shown, inspected):
    for number in range(60):
        inspected.ring.add(a_record(path=f"/{number}"))
    shown.until(lambda: "/59" in paths(shown))
    shown.script("document.getElementById('list').scrollTop = 700")
    place = "return document.elementFromPoint(60, 400).closest('.row').id"
    before = shown.script(place)
    for _ in range(3):
        inspected.ring.add(a_record(path="/late"))
    shown.until_it_says("3 new")
    assert shown.script(place) == before
    shown.click("#fresh")
    shown.until(lambda: paths(shown)[0] == "/late")


def test_keys_choose_visits_and_the_choice_survives_news(shown, inspected):
    press(shown, "j")
    press(shown, "j")
    chosen = "return document.querySelector('.row[aria-selected=true]').dataset.id"
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


def test_secrets_are_masked_until_asked_for(shown):
    choose(shown, 3, "request")
    assert "abc.def.ghi" not in panel(shown, "request") and "••••" in panel(shown, "request")
    shown.click("#secrets")
    shown.until(lambda: "Bearer abc.def.ghi" in panel(shown, "request"))
    choose(shown, 2)
    choose(shown, 3, "request")
    shown.until(lambda: "••••" in panel(shown, "request"))
    assert "abc.def.ghi" not in panel(shown, "request")


def test_foreign_text_is_text(shown, inspected):
    record = inspected.ring.add(a_record(
        "GET", f"/{EVIL}".encode().decode("latin-1"), answered=EVIL.encode(),
        answer_fields=["Content-Type: text/plain; charset=utf-8", "X-Evil: <b>bold</b>"],
    ))  # fmt: skip
    choose(shown, record.id, "response")
    assert "<b>bold</b>" in panel(shown, "response")
    assert "<img src=x onerror=alert(1)>" in panel(shown, "response")
    shown.until_it_says("RLO", "ESC")
    assert not shown.all("img[src=x], td b")


def test_search_and_chips_filter_and_name_a_mistake(shown, inspected):
    shown.type("#search", "path:/api")
    shown.until(lambda: paths(shown) == ["/api/orders"])
    inspected.ring.add(a_record(path="/api/new"))
    inspected.ring.add(a_record(path="/other"))
    shown.until(lambda: paths(shown) == ["/api/new", "/api/orders"])
    shown.click("#chips button", "5xx")
    shown.until(lambda: paths(shown) == ["/api/orders"])
    shown.driver.get_log("browser")
    shown.type("#search", "status:x")
    shown.until_it_says("expected one such as 404")
    shown.driver.get_log("browser")  # Chromium tells of each answer of 400


def test_messages_of_an_open_socket_appear(shown, inspected):
    socket = inspected.ring.get(9)
    choose(shown, 9, "messages")
    shown.until(lambda: len(shown.all(".message")) == 4)
    socket.add_message(Message(AT + 9, True, "text", b'{"more": 1}', 11), 1_000_000)
    inspected.ring.update(socket)
    shown.until(lambda: len(shown.all(".message")) == 5)
    assert '{"more": 1}' in panel(shown, "messages")


def test_replay_as_it_was_shows_both_responses(shown, inspected):
    choose(shown, 3)
    shown.script("document.getElementById('replay').focus()")
    press(shown, "r")
    shown.until_it_says("Side by side", "status 500 and 503", "visit 12")
    assert inspected.ring.all()[-1].replay_of == 3


def test_replay_edited_until_it_passes(shown, inspected):
    choose(shown, 3)
    press(shown, "e")
    shown.type("#replay-path", "/api/mended")
    shown.type("#replay-times", "5")
    shown.type("#replay-every", "0")
    shown.type("#replay-until", "2xx")
    shown.type("#replay-body", "a body")
    shown.until_it_says("Send edited")
    shown.click("#replay-send")
    shown.until_it_says("passed at try 2")
    sent = inspected.ring.all()[-1]
    assert (sent.path, sent.status, sent.request_body.data) == ("/api/mended", 200, b"a body")
    assert b"Bearer abc.def.ghi" in sent.request_head  # what is masked is sent as it was


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


def test_lost_connection_is_told_and_recovers(shown, browser, inspected, target):
    browser.expect("ERR_|Failed to load resource")
    choose(shown, 3)
    inspected.close()
    shown.until_it_says("Connection lost, trying again")
    again = Inspected(target, inspected.port)
    try:
        again.ring.add(a_record(path="/since"))
        shown.until(lambda: paths(shown)[:1] == ["/since"])
        assert "Live" in shown.text and "/api/orders" in shown.text  # the same visit as before
    finally:
        again.close()
    shown.until_it_says("Connection lost")
    other = Inspected(target, inspected.port, "z" * 43)
    try:
        shown.until_it_says("Open the new address")
    finally:
        other.close()
