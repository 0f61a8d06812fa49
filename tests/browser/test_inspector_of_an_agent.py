"""The agent's inspector, used in a browser.

A gateway and an agent serve all tests that disturb neither. Each test visits a path of its own, and
so knows its visits from those of others.
"""

import contextlib
import json
import os
import re
import threading
from unittest import mock

import looks
import pytest
from support import APP, Origin, agent_here, answer, gateway_here, reserved_port, wait_until
from websockets.exceptions import ConnectionClosed
from websockets.sync.server import serve as serve_websockets

from gotunnel_agent.config import Inspect
from gotunnel_agent.inspector import start_inspector

SOCKET, OTHER = "socket.localhost", "other.localhost"
JSON, FORM = "application/json", "application/x-www-form-urlencoded"
HOSTILE = "<img src=x onerror=alert(1)>"
SECRET = "hunter2-secret"
ROWS = "#list .row"
GONE, REFUSED = "net::ERR_", r"the server responded with a status of (\d+)"


class Target:
    """Answers as the path says, and remembers the requests: (method, path, fields, body) each."""

    def __init__(self):
        self.asked = []
        self.broken = {}  # path: how many requests get a 500
        self.go_on = threading.Event()

    def __call__(self, wire):
        while True:
            head = wire.read_head()
            lines = head.decode("latin-1").split("\r\n")
            fields = dict(line.split(": ", 1) for line in lines[1:-2])
            fields = {name.lower(): value for name, value in fields.items()}
            body = wire.read_exactly(int(fields.get("content-length", 0)))
            method, path, _ = lines[0].split(" ")
            self.asked.append((method, path, fields, body))
            wire.send(self._answer(wire, method, path, fields, body))

    def _answer(self, wire, method, path, fields, body):
        if self.broken.get(path, 0) > 0:
            self.broken[path] -= 1
            return answer(b"not yet", status="500 Broken")
        if path.startswith("/events"):
            wire.send(b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n\r\n")
            wire.send(b"event: tick\ndata: first\n\n")
            self.go_on.wait(20)
            wire.send(b"data: second\n\n")
            raise OSError  # ends the connection, and so the answer
        if path.startswith("/echo"):
            told = {"method": method, "path": path, "body": body.decode("latin-1")}
            return answer(json.dumps(told).encode(), f"Content-Type: {JSON}")
        if path.startswith("/secret"):
            return answer(b"ok", f"Set-Cookie: session={SECRET}; HttpOnly")
        return answer(f"<p>{HOSTILE}</p>".encode(), "Content-Type: text/html")

    def asked_for(self, path):
        return [each for each in self.asked if each[1] == path]


@pytest.fixture(scope="module")
def target():
    return Target()


@pytest.fixture(scope="module")
def gateway(cache):
    with gateway_here(cache) as gateway:
        yield gateway


@pytest.fixture(scope="module")
def inspector(gateway, target, tmp_path_factory):
    """The URL of the inspector of an agent that serves APP and SOCKET."""
    with contextlib.ExitStack() as stack:
        origin = stack.enter_context(Origin())
        origin.serve(target)
        socket_port = stack.enter_context(websocket_target())
        folder = tmp_path_factory.mktemp("agent")
        http = {APP: origin.port, SOCKET: socket_port}
        agent = stack.enter_context(agent_here(gateway, folder, http=http))
        with inspecting(agent, folder) as url:
            yield url
            target.go_on.set()


@contextlib.contextmanager
def inspecting(agent, folder, port=0):
    """Start the inspector of an agent; yields its URL, with the token."""
    with mock.patch.dict(os.environ, {"XDG_STATE_HOME": str(folder)}):
        inspector = start_inspector(agent, Inspect(port=port))
        try:
            yield inspector.url
        finally:
            inspector.close()


@contextlib.contextmanager
def websocket_target():
    """Echoes each message; yields its port."""

    def echo(peer):
        with contextlib.suppress(ConnectionClosed):
            for message in peer:
                peer.send(message)

    with serve_websockets(echo, "127.0.0.1", 0) as server:
        life = threading.Thread(target=server.serve_forever, name="websocket target")
        life.start()
        yield server.socket.getsockname()[1]
    life.join()


def visit(gateway, path, method="GET", body=None, hostname=APP, **fields):
    """The status and body of a visit."""
    with gateway.visitor(hostname) as visitor:
        fields = {name.replace("_", "-"): value for name, value in fields.items()}
        visitor.request(method, path, body, fields)
        answered = visitor.getresponse()
        return answered.status, answered.read()


@pytest.fixture
def watched(inspector, page):
    """The page, live."""
    page.open(inspector)
    page.until_it_says("Live")
    return page


def row(page, text):
    """The first row with a text, once it is there."""
    return page.until(lambda: next(iter(page.seen(ROWS, text)), None), f"a row with {text!r}")


def choose(page, text, tab=""):
    """Show a visit, and a part of it."""
    page.click(ROWS, text)
    page.until(lambda: text in page.one("#title").text, f"the visit {text}")
    if tab:
        page.click("#tabs button", tab)


def panel(page, name):
    return page.one(f"#panel-{name}").get_attribute("textContent")


def until_panel_says(page, name, *texts):
    for text in texts:
        page.until(lambda text=text: text in panel(page, name), f"{text!r} in {name}")


# Live -------------------------------------------------------------------------------------------


def test_a_visit_appears_without_a_reload(gateway, watched):
    watched.script("window.mark = 'not loaded again'")
    visit(gateway, "/as-it-comes")
    shown = row(watched, "/as-it-comes").get_attribute("textContent")
    assert "GET" in shown and "200" in shown
    assert watched.script("return window.mark") == "not loaded again"


def test_two_tabs_show_the_same(gateway, watched, browser, inspector):
    second = browser.page(inspector)
    second.until_it_says("Live")
    visit(gateway, "/in-both")
    row(watched, "/in-both")
    row(second, "/in-both")


def test_the_token_leaves_the_address_and_stays_in_a_cookie(watched, inspector, browser):
    token = re.search("token=([^&]+)", inspector)[1]
    assert token not in watched.url
    (cookie,) = watched.driver.get_cookies()
    assert cookie["httpOnly"] and cookie["sameSite"] == "Strict" and cookie["value"] != token
    watched.reload()
    watched.until_it_says("Live")


def test_without_the_token_nothing_is_shown(gateway, inspector, browser, page):
    visit(gateway, "/only-with-the-token")
    browser.expect("status of 401")
    page.open(inspector.partition("?")[0])
    assert "only-with-the-token" not in page.text and "gotunnel inspect" in page.text


def test_visits_are_searched(gateway, watched):
    visit(gateway, "/search/one", "POST", b"needle in the body")
    visit(gateway, "/search/two")
    row(watched, "/search/two")
    for query, found, other in (
        ("needle", "/search/one", "/search/two"),
        ("path:/search/two", "/search/two", "/search/one"),
        ("method:POST path:/search", "/search/one", "/search/two"),
    ):
        watched.type("#search", query)
        row(watched, found)
        watched.until(lambda other=other: not watched.seen(ROWS, other), f"{query} without {other}")


# One visit --------------------------------------------------------------------------------------


def test_heads_and_bodies_are_shown_as_text(gateway, watched):
    visit(gateway, "/echo/shown", "POST", json.dumps({"a": HOSTILE}), Content_Type=JSON)
    choose(watched, "/echo/shown", "Request")
    until_panel_says(watched, "request", HOSTILE)
    choose(watched, "/echo/shown", "Response")
    until_panel_says(watched, "response", '"method"', "POST")
    visit(gateway, f"/page?{HOSTILE.replace(' ', '+')}")
    choose(watched, "/page?", "Response")
    until_panel_says(watched, "response", HOSTILE)
    assert not watched.all("img")


def test_control_characters_and_bidi_overrides_are_made_visible(gateway, watched):
    with gateway.dial(APP) as visitor:
        visitor.send(
            b"GET /odd?\xe2\x80\xaetxt HTTP/1.1\r\nHost: app.localhost\r\nX-Odd: a\x09b\xff\r\n\r\n"
        )
        visitor.read_message()
    choose(watched, "/odd", "Request")
    assert "\N{RIGHT-TO-LEFT OVERRIDE}" not in watched.script("return document.body.textContent")


def test_secrets_are_masked_until_they_are_asked_for(gateway, watched):
    fields = {"Authorization": f"Bearer {SECRET}", "Cookie": f"session={SECRET}"}
    body = f"user=ann&password={SECRET}"
    visit(gateway, f"/secret?token={SECRET}", "POST", body, Content_Type=FORM, **fields)
    everything = "return document.documentElement.outerHTML"
    choose(watched, "/secret", "Request")
    until_panel_says(watched, "request", "Authorization", "ann")
    assert SECRET not in watched.script(everything)
    watched.click("#secrets")
    until_panel_says(watched, "request", SECRET)
    watched.click("#tabs button", "Response")
    until_panel_says(watched, "response", SECRET)
    watched.click("#secrets")
    watched.until(lambda: SECRET not in watched.script(everything), "hidden again")


def test_messages_of_a_websocket_appear_as_they_pass(gateway, watched, browser):
    visitor = browser.page()
    visitor.driver.execute_async_script(
        "const done = arguments[1]; window.talk = new WebSocket(arguments[0]);"
        "talk.onopen = () => { talk.send('first words'); done() }",
        f"wss://{SOCKET}:{gateway.public_port}/talk",
    )
    choose(watched, "/talk", "Messages")
    watched.until(lambda: panel(watched, "messages").count("first words") == 2, "both ways")
    visitor.script("talk.send(arguments[0])", HOSTILE)
    watched.until(lambda: panel(watched, "messages").count(HOSTILE) == 2, "both ways")
    assert not watched.all("img")


def test_server_sent_events_appear_as_they_pass(gateway, watched, target):
    target.go_on.clear()
    with gateway.dial(APP) as visitor:
        visitor.send(b"GET /events HTTP/1.1\r\nHost: app.localhost\r\n\r\n")
        visitor.read_until(b"first")
        choose(watched, "/events", "Messages")
        until_panel_says(watched, "messages", "tick", "first")
        assert "second" not in panel(watched, "messages")
        target.go_on.set()
        visitor.read_until(b"second")
        until_panel_says(watched, "messages", "second")


# Replay -----------------------------------------------------------------------------------------


def test_a_request_is_sent_again_as_it_was(gateway, watched, target):
    visit(gateway, "/echo/again", "POST", "the body", X_Own="kept")
    choose(watched, "/echo/again")
    watched.click("#replay")
    wait_until(lambda: len(target.asked_for("/echo/again")) == 2)
    first, second = target.asked_for("/echo/again")
    assert second[3] == b"the body" and second[2]["x-own"] == "kept"
    until_panel_says(watched, "replay", "The responses are equal")


def test_an_edited_request_is_sent_and_the_answers_are_compared(gateway, watched, target):
    visit(gateway, "/echo/edit", "POST", '{"n": 1}', Content_Type=JSON)
    choose(watched, "/echo/edit")
    watched.click("#edit")
    watched.type("#replay-path", "/echo/edited")
    watched.type("#replay-body", '{"n": 2}')
    watched.type("#replay-method", "PUT")
    watched.click("#replay-send", "edited")
    wait_until(lambda: target.asked_for("/echo/edited"))
    ((method, _, fields, body),) = target.asked_for("/echo/edited")
    assert (method, body, fields["content-length"]) == ("PUT", b'{"n": 2}', "8")
    until_panel_says(watched, "replay", "The responses differ in:", "/echo/edited")
    row(watched, "/echo/edited")


def test_a_request_is_sent_many_times(gateway, watched, target):
    visit(gateway, "/echo/many")
    choose(watched, "/echo/many", "Replay")
    watched.type("#replay-times", "20")
    watched.type("#replay-concurrency", "4")
    watched.click("#replay-send", "20 times")
    wait_until(lambda: len(target.asked_for("/echo/many")) == 21)
    until_panel_says(watched, "replay", "20 ×")


def test_a_webhook_that_failed_is_sent_until_it_passes(gateway, watched, target):
    target.broken["/webhook"] = 3
    assert visit(gateway, "/webhook", "POST", "{}", Content_Type=JSON)[0] == 500
    choose(watched, "/webhook", "Replay")
    watched.type("#replay-times", "50")
    watched.type("#replay-every", "0")
    watched.type("#replay-until", "2xx")
    watched.click("#replay-send")
    wait_until(lambda: len(target.asked_for("/webhook")) == 4)
    until_panel_says(watched, "replay", "Replay", "200")
    row(watched, "/webhook")
    assert len(target.asked_for("/webhook")) == 4  # and then no more


# Files ------------------------------------------------------------------------------------------


def test_visits_go_out_as_har_and_come_back(gateway, watched, browser):
    visit(gateway, "/har/out", "POST", f"password={SECRET}", Content_Type=FORM)
    row(watched, "/har/out")
    watched.click("#har")
    watched.click("#har-all")
    wait_until(lambda: [*browser.downloads.glob("*.har")])
    (path,) = browser.downloads.glob("*.har")
    text = path.read_text("utf-8")
    assert SECRET not in text
    urls = [entry["request"]["url"] for entry in json.loads(text)["log"]["entries"]]
    assert any(url.endswith("/har/out") for url in urls)
    changed = browser.downloads / "changed.har"
    changed.write_text(text.replace("/har/out", "/har/back"), "utf-8")
    watched.one("#har-file").send_keys(str(changed))
    watched.until_it_says("imported")
    watched.click("#har-dialog button", "Close")
    row(watched, "/har/back")


def test_all_visits_are_forgotten_when_that_is_confirmed(gateway, watched):
    visit(gateway, "/forget")
    row(watched, "/forget")
    watched.click("#clear")
    watched.click("#clear-dialog button", "Keep")
    row(watched, "/forget")
    watched.click("#clear")
    watched.click("#clear-dialog button", "Forget")
    watched.until(lambda: not watched.seen(ROWS), "an empty list")


# Pages from elsewhere ---------------------------------------------------------------------------


def test_a_page_on_another_port_reads_and_does_nothing(
    gateway, watched, browser, inspector, target
):
    visit(gateway, "/echo/mine", "POST", "x")
    row(watched, "/echo/mine")
    place = inspector.partition("?")[0]
    with Origin() as elsewhere:
        elsewhere.serve(lambda wire: (wire.read_head(), wire.send(answer(b"elsewhere"))))
        # The cookie is sent: to a browser, all ports of an address are one site.
        other = browser.page(f"http://127.0.0.1:{elsewhere.port}/")
        browser.expect(f"CORS|{GONE}|{REFUSED}")
        assert other.fetch(f"{place}api/v1/visits", credentials="include")[0] == 0
        for path in ("visits/1/replay", "clear", "har"):
            other.fetch(
                f"{place}api/v1/{path}",
                method="POST", mode="no-cors", credentials="include", body="{}",
            )  # fmt: skip
        other.open("about:blank")
    row(watched, "/echo/mine")
    assert len(target.asked_for("/echo/mine")) == 1


def test_a_page_whose_name_leads_here_is_refused(inspector, browser, page):
    browser.expect(f"Cross-Origin-Opener-Policy|{REFUSED}")
    token = inspector.partition("?")[2]
    port = re.search(r":(\d+)/", inspector)[1]
    page.open(f"http://rebound.example:{port}/?{token}")
    assert "localhost" in page.text and not page.all(ROWS)


# An agent that goes and comes back ----------------------------------------------------------------


def test_an_agent_that_is_gone_is_told_and_found_again(gateway, browser, page, target, tmp_path):
    browser.expect(GONE)
    with reserved_port() as port, Origin() as origin:
        origin.serve(target)

        @contextlib.contextmanager
        def agent():
            with agent_here(gateway, tmp_path, http={OTHER: origin.port}) as agent:
                with inspecting(agent, tmp_path, port) as url:
                    yield url

        with agent() as url:
            page.open(url)
            page.until_it_says("Live")
        page.until_it_says("trying again")
        with agent():
            page.until_it_says("Live")
            visit(gateway, "/after-the-restart", hostname=OTHER)
            row(page, "/after-the-restart")
            page.open("about:blank")


# Looks ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tab", ["Overview", "Request", "Response", "Replay"])
def test_the_page_can_be_read_at_each_width_and_in_both_colour_schemes(gateway, watched, tab):
    visit(gateway, "/echo/looks", "POST", json.dumps({"a": [1, 2, {"b": None}]}), Content_Type=JSON)
    choose(watched, "/echo/looks", tab)
    found = {look: looks.faults(watched) for look in looks.in_each_look(watched)}
    assert not any(found.values()), found


def test_a_visit_is_chosen_and_replayed_by_keyboard(gateway, watched, target):
    visit(gateway, "/echo/by-key")
    row(watched, "/echo/by-key")
    body = watched.one("body")
    body.send_keys("j")
    watched.until(lambda: "/echo/by-key" in watched.one("#title").text, "the newest visit")
    body.send_keys("r")
    wait_until(lambda: len(target.asked_for("/echo/by-key")) == 2)


def test_without_javascript_the_page_names_the_command(inspector, page):
    page.without_javascript().open(inspector)
    page.until_it_says("gotunnel inspect")
