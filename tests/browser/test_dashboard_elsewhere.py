"""What a page of a site behind the gateway can do to the dashboard, in a browser that is logged in
there. The site's name is below the gateway's own, so the browser takes both for one site: it sends
it the dashboard's cookie, and SameSite does not help.
"""

import pytest
from support import GATEWAY_HOST, agent_here, answer, gateway_here, wait_until

EVIL = f"evil.{GATEWAY_HOST}"
PASSWORD = "correct horse"


@pytest.fixture
def gateway(cache):
    with gateway_here(cache, DASHBOARD_PASSWORD=PASSWORD) as gateway:
        yield gateway


@pytest.fixture
def dashboard(gateway):
    return f"https://{GATEWAY_HOST}:{gateway.public_port}/dashboard/"


def serve(wire):
    """A page of the other site."""
    while True:
        wire.read_message()
        wire.send(answer(b"<!doctype html><body>evil", "Content-Type: text/html"))


@pytest.fixture
def evil(gateway, dashboard, browser, tmp_path, origin):
    """A tab that shows the other site, of a browser that is logged in at the dashboard."""
    origin.serve(serve)
    browser.expect("Failed to load resource|WebSocket connection|CORS policy|Framing")
    with agent_here(gateway, tmp_path, http={EVIL: origin.port}):
        page = browser.page(dashboard)
        page.type("input[type=password]", PASSWORD, enter=True)
        page.until_it_says(EVIL)
        assert page.url == dashboard
        yield page.open(f"https://{EVIL}:{gateway.public_port}/")


def test_it_can_neither_act_nor_read_nor_frame(gateway, dashboard, evil):
    for path in ("logout", "login", "api/v1/sessions/1/end", "api/v1/blocks"):
        how = {"method": "POST", "credentials": "include", "body": "csrf=1&password=x"}
        status, error = evil.fetch(dashboard + path, mode="cors", **how)
        assert status == 0 and "TypeError" in error
        evil.fetch(dashboard + path, mode="no-cors", **how)
    assert evil.fetch(f"{dashboard}api/v1/state", credentials="include")[0] == 0
    run = evil.driver.execute_async_script
    run("const [url, done] = arguments;"
        "const events = new EventSource(url, {withCredentials: true});"
        "events.onerror = done", f"{dashboard}api/v1/events")  # fmt: skip
    events = gateway.inner._showing._dashboard.events
    wait_until(lambda: events.taken == 0)  # the dashboard's own is gone by now
    opened = run("const [url, done] = arguments; const socket = new WebSocket(url);"
                 "socket.onopen = () => done(true); socket.onclose = () => done(false)",
                 f"{dashboard}api/v1/state".replace("https", "wss"))  # fmt: skip
    assert opened is False
    run("const [url, done] = arguments;"
        "const frame = document.body.appendChild(document.createElement('iframe'));"
        "frame.onload = done; frame.src = url", dashboard)  # fmt: skip
    evil.driver.switch_to.frame(0)
    assert "Log out" not in evil.driver.page_source
    evil.driver.switch_to.default_content()
    evil.script(
        "const form = document.body.appendChild(document.createElement('form'));"
        "form.method = 'post'; form.action = arguments[0]; form.submit()",
        f"{dashboard}logout",
    )
    evil.until_it_says("another site")
    evil.open(dashboard)
    evil.until_it_says(EVIL, "Log out")  # still logged in


def test_a_link_elsewhere_leads_to_the_dashboard_and_does_not_ask_for_the_password_again(
    gateway, dashboard, evil
):
    pages = (f"https://{EVIL}:{gateway.public_port}/", "data:text/html,evil")
    for page, link in zip(pages, (dashboard.rstrip("/"), dashboard)):
        evil.open(page)
        evil.script("document.body.innerHTML = `<a href='${arguments[0]}'>go</a>`", link)
        evil.click("a")
        evil.until_it_says("Log out")
        assert evil.url == dashboard
