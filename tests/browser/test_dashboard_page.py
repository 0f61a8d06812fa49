"""The gateway's dashboard, used in a browser.

A gateway and an agent serve all tests that disturb neither; a test's own hostnames and paths tell
its visits from those of others.
"""

import contextlib
import http.client
import socket
import urllib.parse

import looks
import pytest
from hand_made import HandMade, answering, registered, registration
from support import (
    APP,
    GATEWAY_HOST,
    TIMEOUT,
    Origin,
    agent_here,
    answer,
    gateway_here,
    reserved_port,
    wait_until,
)

from gotunnel import HEALTH, OVERLAP, PARTIAL, POOLS, WAITS, Health
from gotunnel_server.certs.keeper import Keeper

PASSWORD = "only for the dashboard of tests"
NAMES = ["page1.localhost", "page2.localhost", "page10.localhost"]  # in natural order

HOSTNAMES, SESSIONS, VISITS, BLOCKS = (
    "#hostnames tbody tr",
    "#sessions tbody tr",
    "#visits",
    "#blocks",
)
LOST = "trying again"
HOSTILE = "<img src=x onerror=alert(1)>"
# The console's words for a gateway that is gone, and for a request that is refused.
GONE, REFUSED = "net::ERR_", r"the server responded with a status of (\d+)"


@pytest.fixture(scope="module")
def gateway(tmp_path_factory):
    cache = tmp_path_factory.mktemp("cache")  # its own: a test fills it with hundreds of keys
    with gateway_here(cache, DASHBOARD_PASSWORD=PASSWORD, MAX_HOSTS_PER_AGENT="600") as gateway:
        yield gateway


@pytest.fixture(scope="module")
def origin():
    """A target that answers 500 below /fail, 200 elsewhere."""
    with Origin() as origin:
        origin.serve(serve)
        yield origin


def serve(wire):
    while True:
        failed = wire.read_head().split(b" ")[1].startswith(b"/fail")
        wire.send(answer(status="500 Broken" if failed else "200 OK"))


@pytest.fixture(scope="module")
def agent(gateway, origin, tmp_path_factory):
    """An agent that serves NAMES."""
    folder = tmp_path_factory.mktemp("agent")
    with agent_here(gateway, folder, http=dict.fromkeys(NAMES, origin.port)) as agent:
        yield agent


def url_of(gateway, host="localhost"):
    return f"http://{host}:{gateway.dashboard_port}/"


def log_in(page, url, password=PASSWORD):
    page.open(url)
    page.type("input[type=password]", password, enter=True)
    return page


@pytest.fixture(scope="module")
def cookie(gateway, agent):
    """That of a login, which no test ends."""
    connection = http.client.HTTPConnection("localhost", gateway.dashboard_port)
    with contextlib.closing(connection):
        form = {"Content-Type": "application/x-www-form-urlencoded"}
        connection.request("POST", "/login", urllib.parse.urlencode({"password": PASSWORD}), form)
        field = connection.getresponse().getheader("Set-Cookie")
    name, _, value = field.partition(";")[0].partition("=")
    return {"name": name, "value": value, "path": "/", "domain": "localhost"}


@pytest.fixture
def dashboard(gateway, cookie, page):
    """The page, logged in and live."""
    page.driver.execute_cdp_cmd("Network.setCookie", cookie)
    return live(page.open(url_of(gateway)))


def live(page):
    page.until_it_says("Live")
    return page


def rows(page, css):
    """The texts of the rows that can be seen."""
    return page.script(
        "return [...document.querySelectorAll(arguments[0])]"
        ".filter(row => row.checkVisibility()).map(row => row.innerText || row.textContent)",
        css,
    )


def names(page):
    """The hostnames in the table, from top to bottom."""
    return [row.split()[0] for row in rows(page, HOSTNAMES)]


def row_with(page, css, text):
    """The first row with a text."""
    return page.until(lambda: next(iter(page.seen(css, text)), None), f"row {text!r}")


def visit(gateway, hostname, path="/", source="127.0.0.1"):
    """Status of a visit whose visitor has the address ``source``."""
    address = ("127.0.0.1", gateway.public_port)
    raw = socket.create_connection(address, TIMEOUT, (source, 0))
    connection = http.client.HTTPConnection(hostname)
    with contextlib.closing(raw), contextlib.closing(connection):
        connection.sock = gateway.context.wrap_socket(raw, server_hostname=hostname)
        connection.request("GET", path)
        answered = connection.getresponse()
        answered.read()
        return answered.status


def mark(page):
    """Something that a reload would remove."""
    page.script("window.mark = 'not loaded again'")


def was_not_loaded_again(page):
    return page.script("return window.mark") == "not loaded again"


# Live -------------------------------------------------------------------------------------------


def test_an_agent_and_its_visits_appear_without_a_reload(gateway, dashboard, origin, tmp_path):
    mark(dashboard)
    with agent_here(gateway, tmp_path, http={"new.localhost": origin.port}):
        dashboard.until(lambda: "new.localhost" in names(dashboard), "the hostname")
        visit(gateway, "new.localhost", "/as-it-comes")
        dashboard.until(lambda: "/as-it-comes" in dashboard.one(VISITS).text, "the visit")
    dashboard.until(lambda: "new.localhost" not in names(dashboard), "the hostname is gone")
    assert was_not_loaded_again(dashboard)


def test_a_row_tells_what_the_agent_and_the_visits_have_told(gateway, dashboard, origin):
    assert visit(gateway, "page2.localhost", "/fail") == 500
    told = [f"127.0.0.1:{origin.port}", "http", "1"]
    dashboard.until(
        lambda: all(
            text in row_with(dashboard, HOSTNAMES, "page2.localhost").text for text in told
        ),
        f"{told}",
    )


def test_a_target_that_is_not_well_and_an_agent_that_waits_are_marked(gateway, dashboard):
    ill = "ill.localhost"
    features = (HEALTH, OVERLAP, PARTIAL, WAITS)
    with registered(gateway, ill, features=features) as agent, answering(agent):
        with HandMade(gateway, registration(ill, features=features, instance="1")) as other:
            assert other.hear().denied
            dashboard.until(lambda: row_with(dashboard, SESSIONS, f"waits for {ill}"))
        agent.say(Health(ill, False, f"503 {HOSTILE}"))
        row = row_with(dashboard, HOSTNAMES, f"not well: 503 {HOSTILE}")
        assert ill in row.text and not dashboard.all("img")
        agent.say(Health(ill, True))
        dashboard.until(lambda: "not well" not in row_with(dashboard, HOSTNAMES, ill).text)


@pytest.mark.slow
def test_an_agent_of_a_pool_has_a_row_that_says_how_it_stands(gateway, dashboard):
    shared = "shared.localhost"
    with contextlib.ExitStack() as stack:
        for instance in ("one", "two"):
            stack.enter_context(
                registered(
                    gateway, shared, features=(POOLS,), pools={shared: {}}, instance=instance
                )
            )
        pool = gateway.inner._registry.lookup(shared).pool
        pool.refused(pool.members[1])
        assert shared in row_with(dashboard, HOSTNAMES, "passed over, 0 now").text
        assert shared in row_with(dashboard, HOSTNAMES, "ready, 0 now").text


def test_visits_can_be_filtered(gateway, dashboard):
    for hostname, path in (("page1.localhost", "/good"), ("page10.localhost", "/fail-now")):
        visit(gateway, hostname, path)
    body = f"{VISITS} tbody tr"
    dashboard.until(lambda: all(w in str(rows(dashboard, body)) for w in ("/good", "/fail-now")))
    dashboard.click("#only-failed")
    dashboard.until(lambda: all("500" in row for row in rows(dashboard, body)), "failed ones alone")
    assert "/fail-now" in str(rows(dashboard, body))
    dashboard.click("#only-failed")
    dashboard.type("#of", "page1.")
    dashboard.until(lambda: all("page1.localhost" in row for row in rows(dashboard, body)))
    assert "/good" in str(rows(dashboard, body))


def test_a_page_that_is_paused_holds_visits_back(gateway, dashboard):
    dashboard.click("#pause")
    visit(gateway, "page1.localhost", "/held-back")
    dashboard.until_it_says("(1 new)")
    assert "/held-back" not in dashboard.text
    dashboard.click("#pause")
    dashboard.until_it_says("/held-back")


def test_tabs_beyond_the_places_for_readers_ask_again_and_again(gateway, dashboard, browser):
    tabs = [dashboard, *(browser.page(url_of(gateway)) for _ in range(4))]
    browser.expect(REFUSED)
    visit(gateway, "page1.localhost", "/in-all-tabs")
    for tab in tabs:
        tab.until_it_says("/in-all-tabs")
    assert sum("Live" in tab.text for tab in tabs) == 4
    tabs[-1].until_it_says("Updated every")


# Order ------------------------------------------------------------------------------------------


def test_hostnames_are_sorted_as_people_count(dashboard):
    dashboard.until(lambda: names(dashboard) == NAMES, "natural order")
    dashboard.click("#hostnames th button", "Hostname")
    dashboard.until(lambda: names(dashboard) == NAMES[::-1], "the order turned around")
    header = dashboard.one("#hostnames th[aria-sort]")
    assert header.get_attribute("aria-sort") == "descending"


def test_any_column_can_be_sorted_by_keyboard(gateway, dashboard):
    for _ in range(50):
        visit(gateway, "page10.localhost")
    dashboard.until(lambda: any("5" in row for row in rows(dashboard, HOSTNAMES)))
    *_, column = dashboard.seen("#hostnames th button", "Visits")  # the first one is Visits/s
    dashboard.script("arguments[0].focus()", column)
    column.send_keys("\n")
    dashboard.until(lambda: names(dashboard)[0] == "page10.localhost", "most visits first")


def test_hostnames_can_be_filtered(dashboard):
    dashboard.type("#filter", "PAGE1")
    dashboard.until(lambda: names(dashboard) == ["page1.localhost", "page10.localhost"], "two")
    dashboard.until_it_says("2 of 3")
    dashboard.type("#filter", "nothing like it")
    dashboard.until(lambda: names(dashboard) == [], "none")


def test_five_hundred_hostnames_stay_usable(gateway, agent, dashboard, origin, tmp_path):
    with contextlib.ExitStack() as agents:
        for hundred in range(0, 500, 100):  # a registration has ten seconds, also on a slow machine
            many = {f"host{hundred + number}.many.localhost": origin.port for number in range(100)}
            agents.enter_context(agent_here(gateway, tmp_path, http=many))
        dashboard.until(lambda: len(dashboard.all(HOSTNAMES)) == 503, "all rows")
        # A frame in which the page does all its work is short: the page answers meanwhile.
        dashboard.type("#filter", "host499")
        dashboard.until(lambda: names(dashboard) == ["host499.many.localhost"], "the one")
        visit(gateway, "host499.many.localhost", "/still-live")
        dashboard.until_it_says("/still-live")


# Login ------------------------------------------------------------------------------------------


def test_the_page_asks_for_the_password_and_takes_the_right_one(gateway, agent, browser, page):
    page.open(url_of(gateway))
    assert NAMES[0] not in page.text
    browser.expect(REFUSED)
    page.type("input[type=password]", "a guess", enter=True)
    page.until_it_says("wrong")
    assert NAMES[0] not in page.text
    page.type("input[type=password]", PASSWORD, enter=True)
    page.until_it_says(NAMES[0])
    (cookie,) = page.driver.get_cookies()
    assert cookie["httpOnly"] and cookie["sameSite"] == "Strict"
    assert PASSWORD not in page.url + str(cookie)

    page.click("button", "Log out")
    page.until(lambda: page.seen("input[type=password]"), "the form")
    page.open(url_of(gateway))
    page.until(lambda: page.seen("input[type=password]"), "the form")


def test_the_dashboard_under_the_gateways_name_has_a_cookie_for_tls_alone(gateway, agent, page):
    url = f"https://{GATEWAY_HOST}:{gateway.public_port}/dashboard"
    live(log_in(page, url)).until_it_says(NAMES[0])
    (cookie,) = page.driver.get_cookies()
    assert cookie["secure"] and cookie["httpOnly"] and cookie["sameSite"] == "Strict"
    assert cookie["path"] == "/dashboard/"


def test_another_tabs_logout_is_noticed(gateway, agent, page, browser):
    live(log_in(page, url_of(gateway)))
    second = live(browser.page(url_of(gateway)))
    browser.expect(REFUSED)
    page.click("button", "Log out")
    second.until_it_says("log in again")


# Acts -------------------------------------------------------------------------------------------


def confirm(page):
    page.click("#ask-yes")


def test_a_session_is_ended_when_that_is_confirmed(gateway, dashboard, origin, tmp_path):
    with agent_here(gateway, tmp_path, http={"end.localhost": origin.port}):
        row_with(dashboard, SESSIONS, "end.localhost")
        (tunnel,) = [t for t in gateway.inner.tunnels.registered() if "end.localhost" in t.routes]
        dashboard.click(SESSIONS, "end.localhost", "button")
        dashboard.until_it_says("connects again by itself")
        confirm(dashboard)
        dashboard.until(lambda: dashboard.seen("#told"), "what was done")
        wait_until(lambda: tunnel not in gateway.inner.tunnels.registered())
        # The agent has been told nothing against it, so it comes back.
        gateway.wait_for_routes("end.localhost")
        row_with(dashboard, SESSIONS, "end.localhost")


def test_what_is_not_confirmed_is_not_done(gateway, dashboard):
    before = set(gateway.inner.tunnels.registered())
    dashboard.click(SESSIONS, NAMES[0], "button")
    dashboard.click("#ask button", "Cancel")
    assert set(gateway.inner.tunnels.registered()) == before


def test_a_certificate_is_renewed_when_that_is_confirmed(gateway, dashboard, monkeypatch):
    asked = []
    monkeypatch.setattr(Keeper, "renew", lambda keeper, hostname: asked.append(hostname))
    dashboard.click(HOSTNAMES, NAMES[0], "button")
    confirm(dashboard)
    dashboard.until(lambda: dashboard.seen("#told"), "what was done")
    assert asked == [NAMES[0]]


def test_why_a_certificate_is_not_renewed_is_told(gateway, dashboard, browser):
    browser.expect("status of 409")
    dashboard.click(HOSTNAMES, NAMES[0], "button")
    confirm(dashboard)
    dashboard.until_it_says("our own CA")


def test_an_address_is_blocked_and_unblocked(gateway, dashboard):
    assert visit(gateway, NAMES[0], "/before", "127.0.0.9") == 200
    with gateway.dial(NAMES[0]):  # of another address: it may stay
        dashboard.click("#block")
        dashboard.type("#block-address", "127.0.0.9")
        dashboard.type("#block-reason", HOSTILE)
        confirm(dashboard)
        row = row_with(dashboard, f"{BLOCKS} tbody tr", "127.0.0.9")
        assert HOSTILE in row.text
        with pytest.raises((OSError, http.client.HTTPException)):
            visit(gateway, NAMES[0], "/refused", "127.0.0.9")
        assert visit(gateway, NAMES[0], "/another") == 200
        dashboard.click(f"{BLOCKS} tbody tr", "127.0.0.9", "button")
        dashboard.until_it_no_longer_says("127.0.0.9 is blocked")
        wait_until(lambda: is_served(gateway, "127.0.0.9"))


def is_served(gateway, address):
    with contextlib.suppress(OSError, http.client.HTTPException):
        return visit(gateway, NAMES[0], "/after", address) == 200


def test_the_readers_own_address_cannot_be_blocked(gateway, dashboard, browser):
    browser.expect(REFUSED)
    dashboard.click("#block")
    dashboard.type("#block-address", "127.0.0.1")
    confirm(dashboard)
    dashboard.until_it_says("your own")
    assert visit(gateway, NAMES[0]) == 200


# A gateway that goes and comes back ---------------------------------------------------------------


def test_a_gateway_that_is_gone_is_told_and_found_again(cache, browser, page, origin, tmp_path):
    browser.expect(GONE)
    with reserved_port() as port, reserved_port() as tunnel_port:
        same = {"DASHBOARD_PORT": str(port), "TUNNEL_PORT": str(tunnel_port)}
        with gateway_here(cache, **same) as first:
            page.open(url_of(first))
            live(page)
            mark(page)
        page.until_it_says(LOST)
        with gateway_here(cache, **same) as second:
            live(page)
            with agent_here(second, tmp_path, http={APP: origin.port}):
                page.until_it_says(APP)
            assert was_not_loaded_again(page)
            page.open("about:blank")


def test_after_a_restart_the_page_asks_to_log_in_again(cache, browser, page):
    browser.expect(f"{GONE}|{REFUSED}")
    with reserved_port() as port:
        settings = {"DASHBOARD_PORT": str(port), "DASHBOARD_PASSWORD": PASSWORD}
        with gateway_here(cache, **settings) as first:
            live(log_in(page, url_of(first)))
        page.until_it_says(LOST)
        with gateway_here(cache, **settings):
            page.until_it_says("log in again")
            page.click("a", "log in again")
            page.type("input[type=password]", PASSWORD, enter=True)
            live(page)
            page.open("about:blank")


# Who sees what ----------------------------------------------------------------------------------


def test_without_a_password_hostnames_and_modes_are_shown_and_nothing_else(
    cache, page, origin, tmp_path
):
    with gateway_here(cache) as gateway:
        with agent_here(gateway, tmp_path, http={APP: origin.port}):
            page.open(url_of(gateway))
            live(page).until_it_says(APP, "http")
            gateway.get(APP, "/unseen")
            text = page.script("return document.documentElement.textContent")
            assert f"127.0.0.1:{origin.port}" not in text and "/unseen" not in text
            assert (
                not page.seen("#sessions") and not page.seen("#blocks") and not page.seen("#visits")
            )
        page.until_it_no_longer_says(APP)
        page.open("about:blank")


def test_without_javascript_it_is_a_table(gateway, agent, page):
    visit(gateway, NAMES[1], "/seen-in-the-table")
    page.without_javascript()
    log_in(page, url_of(gateway))
    page.until_it_says(*NAMES)
    wait_until(lambda: "/seen-in-the-table" in page.open(page.url).text)
    assert page.seen("table th")


def test_what_others_say_is_text(gateway, dashboard, origin, tmp_path):
    bidi = "\N{RIGHT-TO-LEFT OVERRIDE}txt.exe"
    with agent_here(gateway, tmp_path, http={"bad.localhost": origin.port}):
        for path in (f"/?a={HOSTILE.replace(' ', '+')}", "/%1b[31m"):
            visit(gateway, "bad.localhost", path)
        with gateway.dial("bad.localhost") as visitor:
            visitor.send(b"GET /\xe2\x80\xaetxt.exe HTTP/1.1\r\nHost: bad.localhost\r\n\r\n")
            visitor.read_message()
        dashboard.until_it_says(HOSTILE.replace(" ", "+"))
        assert not dashboard.all("img")
        assert bidi not in dashboard.text


def test_a_page_of_another_site_reads_and_does_nothing(gateway, dashboard, browser, origin):
    # The cookie is there. "localhost" with another port is another origin, but the same site.
    other = browser.page(f"http://localhost:{origin.port}/")
    browser.expect(f"CORS|{REFUSED}|{GONE}")
    for path in ("api/v1/state", "api/v1/visits"):
        assert other.fetch(url_of(gateway) + path, credentials="include")[0] == 0
    before = set(gateway.inner.tunnels.registered())
    for session in range(1, 9):
        other.fetch(
            f"{url_of(gateway)}api/v1/sessions/{session}/end",
            method="POST", mode="no-cors", credentials="include",
        )  # fmt: skip
    assert set(gateway.inner.tunnels.registered()) == before
    browser.expect("status of 403")
    rebound = browser.page(url_of(gateway, "rebound.example"))
    assert NAMES[0] not in rebound.text and "localhost" in rebound.text


# Looks ------------------------------------------------------------------------------------------


def test_the_page_can_be_read_at_each_width_and_in_both_colour_schemes(gateway, dashboard):
    visit(gateway, NAMES[0], "/fail/" + "long" * 100)
    dashboard.until_it_says("/fail/long")
    found = {look: looks.faults(dashboard) for look in looks.in_each_look(dashboard)}
    assert not any(found.values()), found


def test_the_form_can_be_read_at_each_width_and_in_both_colour_schemes(gateway, page):
    page.open(url_of(gateway))
    found = {look: looks.faults(page) for look in looks.in_each_look(page)}
    assert not any(found.values()), found


def test_the_first_tab_key_skips_to_the_tables(dashboard):
    dashboard.one("body").send_keys("\t")
    assert "Skip" in dashboard.driver.switch_to.active_element.text
