"""The browser that the tests of the pages share: what it must find, and what it must not leave."""

import re

import pytest
from chromium import Browser, processes_of
from support import answer

HEAD = "<!doctype html><title>a page</title>"
STRICT = "<meta http-equiv=Content-Security-Policy content=\"default-src 'none'\">"


@pytest.fixture
def show(page, tmp_path):
    def show(html):
        (tmp_path / "page.html").write_text(HEAD + html)
        return page.open((tmp_path / "page.html").as_uri())

    return show


@pytest.mark.parametrize(
    "html, complaint",
    [
        ("<script>throw new Error('thrown')</script>", "javascript: .*thrown"),
        ("<script>Promise.reject(new Error('rejected'))</script>", "javascript: .*rejected"),
        ("<script>console.error('said')</script>", "console-api: .*said"),
        (STRICT + "<p style='color: red'>", "security: .*inline style"),
        (STRICT + "<script>1</script>", "security: .*inline script"),
        (STRICT + "<img src='https://elsewhere.example/'>", "security: .*elsewhere"),
        ("<img src='missing.png'>", "network: .*missing"),
    ],
)
def test_what_a_page_may_not_do_is_found(browser, show, html, complaint):
    page = show(html)
    found = page.until(browser.complaints, "a complaint")
    assert any(re.search(complaint, each) for each in found), found


def test_what_the_test_expects_is_no_complaint(browser, show):
    browser.expect("thrown")
    show("<script>console.log('no matter'); throw new Error('thrown')</script>")
    assert browser.complaints() == []


def test_without_javascript_a_page_shows_what_it_has_for_that(page, show):
    page.without_javascript()
    assert show("<noscript>plain</noscript><script>document.write('more')</script>").text == "plain"


def test_width_and_colours_are_those_that_are_asked_for(page, show):
    for width, scheme in ((360, "dark"), (1600, "light")):
        page.as_wide_as(width).in_colours(scheme)
        show("<p>text</p>")
        assert page.script("return innerWidth") == width
        assert page.script(f"return matchMedia('(prefers-color-scheme: {scheme})').matches")


def test_each_tab_is_used_by_itself(browser, show):
    first, second = show("<p>one</p>"), browser.page("data:text/html,<p>two</p>")
    assert (first.text, second.text, first.text) == ("one", "two", "one")


def test_a_name_of_elsewhere_is_this_machine(page, origin):
    origin.serve(lambda wire: (wire.read_head(), wire.send(answer(b"here"))))
    assert page.open(f"http://elsewhere.example:{origin.port}/").text == "here"


def test_cookies_of_another_test_are_gone(browser, origin):
    def echo(wire):
        head = wire.read_head().decode().lower()
        cookie = re.search("cookie: (.*)\r", head)
        wire.send(answer((cookie[1] if cookie else "none").encode(), "Set-Cookie: a=1"))

    origin.serve(echo)
    url = f"http://127.0.0.1:{origin.port}/"
    assert [browser.page(url).text, browser.page(url).text] == ["none", "a=1"]
    assert browser.clear() == []
    assert browser.page(url).text == "none"


def test_no_process_is_left_behind(tmp_path):
    with Browser(tmp_path) as browser:
        session = browser.driver.service.process.pid
        assert len(processes_of(session)) > 3
    assert processes_of(session) == []
