"""What a page from elsewhere can do to the inspector, in a browser that is signed in there.

The page comes from another port of 127.0.0.1, such as that of the user's own development server. To
the browser both are one site: it sends the inspector's cookie along, and SameSite does not help.
"""

import pytest
from inspector_samples import a_ring
from support import Origin, answer, wait_until

from gotunnel_agent.inspector.access import Door
from gotunnel_agent.inspector.api import Api
from gotunnel_agent.inspector.server import InspectorServer, listen

TOKEN = "t" * 43


def evil_page(wire):
    while True:
        wire.read_message()
        wire.send(answer(b"<!doctype html><body>evil", "Content-Type: text/html"))


class Inspected:
    def __init__(self):
        self.ring = a_ring()
        listening = listen("127.0.0.1", 0)
        self.port = listening.getsockname()[1]
        door = Door(TOKEN, "127.0.0.1", self.port)
        self.server = InspectorServer(
            listening, door, Api(self.ring, door, lambda: {"tunnels": []})
        )
        self.server.start()
        self.address = f"http://127.0.0.1:{self.port}/"


@pytest.fixture
def inspected():
    inspected = Inspected()
    yield inspected
    inspected.server.close()


@pytest.fixture
def elsewhere():
    with Origin() as origin:
        origin.serve(evil_page)
        yield origin.port


def until_live(page):
    page.until(lambda: page.script("return document.getElementById('live')?.textContent") == "Live")


TAGS = """
const [url, done] = arguments, heard = [];
const said = (name) => (event) => { heard.push(`${name} ${event.type}`);
    if (heard.length === 5) done(heard.sort()); };
const add = (tag, source, name) => {
    const node = document.createElement(tag);
    node.onload = node.onerror = said(name);
    node.src = source;
    document.body.append(node);
};
add("img", `${url}api/v1/visits/1/response-body?unmask=1`, "image");
add("script", `${url}api/v1/visits`, "script");
const events = new EventSource(`${url}api/v1/events`, {withCredentials: true});
events.onopen = events.onerror = (event) => { events.close(); said("events")(event); };
const socket = new WebSocket(`${url.replace("http", "ws")}api/v1/events`);
socket.onopen = socket.onclose = said("socket");
fetch(`${url}api/v1/clear`, {method: "POST", mode: "no-cors", credentials: "include"})
    .catch(() => null).then(() => said("post")({type: "sent"}));
"""


def test_it_can_neither_read_nor_act_nor_frame(browser, inspected, elsewhere):
    browser.expect(
        "Failed to load resource|WebSocket connection|CORS policy|Framing|frame-ancestors"
    )
    page = browser.page(f"{inspected.address}?token={TOKEN}")
    until_live(page)
    kept = len(inspected.ring)
    evil = f"http://127.0.0.1:{elsewhere}/"
    page.open(evil)
    for path in ("info", "visits/1?unmask=1", "har"):
        assert page.fetch(f"{inspected.address}api/v1/{path}", credentials="include")[0] == 0
    run = page.driver.execute_async_script
    assert run(TAGS, inspected.address) == [
        "events error", "image error", "post sent", "script error", "socket close",
    ]  # fmt: skip
    run("const [url, done] = arguments;"
        "const frame = document.body.appendChild(document.createElement('iframe'));"
        "frame.onload = done; frame.src = url", inspected.address)  # fmt: skip
    page.driver.switch_to.frame(0)
    assert "gotunnel inspector" not in page.driver.page_source
    page.driver.switch_to.default_content()
    page.script(
        "const form = document.body.appendChild(document.createElement('form'));"
        "form.method = 'post'; form.action = arguments[0]; form.submit()",
        f"{inspected.address}api/v1/clear",
    )
    page.until_it_says("a page from elsewhere asks")
    assert len(inspected.ring) == kept > 0
    page.open(inspected.address)  # the cookie is still good for the inspector's own page
    until_live(page)
    page.open("about:blank")


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost"])
def test_a_link_elsewhere_opens_the_page_and_the_token_disappears(
    browser, inspected, elsewhere, host
):
    """On a redirect a browser would not send the cookie."""
    page = browser.page(f"http://{host}:{elsewhere}/")
    link = f"{inspected.address}?token={TOKEN}"
    page.script("document.body.innerHTML = `<a href='${arguments[0]}'>go</a>`", link)
    page.click("a")
    page.until(lambda: page.url == inspected.address)
    until_live(page)
    assert page.script("return document.cookie") == ""
    page.open("about:blank")
    wait_until(lambda: not inspected.server._readers)


def test_a_hostname_that_leads_here_is_refused(browser, inspected):
    """To the browser evil.localhost is another site, and leads to this machine (DNS rebinding)."""
    browser.expect("Failed to load resource")
    page = browser.page(f"http://evil.localhost:{inspected.port}/?token={TOKEN}")
    page.until_it_says("Host evil.localhost, expected localhost or an IP address")
