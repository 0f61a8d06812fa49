"""The browser of the tests in this folder. See chromium.py."""

import threading

import pytest
from chromium import SLOWEST, Browser
from support import wait_until


def pytest_collection_modifyitems(items):
    """A browser takes long on a slow machine, and nothing but time is lost by waiting for it."""
    for item in items:
        if "browser" in item.fixturenames and not item.get_closest_marker("timeout"):
            item.add_marker(pytest.mark.timeout(3 * SLOWEST))


@pytest.fixture(autouse=True, scope="module")
def no_thread_left():
    """As for all tests, but the tests of a module here share a gateway and an agent, which start
    threads as they need them."""
    before = threads()
    yield
    wait_until(lambda: threads() <= before)


def threads():
    """All but the one with which pytest-timeout watches the running test."""
    return {each for each in threading.enumerate() if not each.name.startswith("pytest_timeout")}


@pytest.fixture(scope="session")
def chromium(tmp_path_factory):
    with Browser(tmp_path_factory.mktemp("chromium")) as browser:
        yield browser


@pytest.fixture
def browser(chromium):
    """The browser, without cookies and tabs of another test. A JavaScript error or a violated
    content security policy fails the test."""
    yield chromium
    assert not chromium.clear()


@pytest.fixture
def page(browser):
    """A tab."""
    return browser.page()
