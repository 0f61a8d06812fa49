"""Debian's Chromium without a window, driven by Selenium. tests/browser/ and tools/screenshots.py
share it.

Starting a browser costs a second of CPU, so one serves all tests of a run. Each test has tabs of
its own, and none of the cookies of another. At its end the console is read: a JavaScript error, and
what a content security policy has refused, fail the test.

Nothing is downloaded: the driver's path is given, so Selenium's manager is not asked.
"""

import contextlib
import logging
import os
import re
import signal
from pathlib import Path

from selenium import webdriver
from selenium.common.exceptions import (
    ElementClickInterceptedException,
    StaleElementReferenceException,
    TimeoutException,
)
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.wait import WebDriverWait
from support import TIMEOUT, need, reserved_port, wait_until

# Features of Chromium that cost time and show nothing that a person would see. Without the first
# three, one process draws all pages: to start another takes a third of a second of CPU.
UNUSED = (
    "IsolateOrigins", "site-per-process", "ProactivelySwapBrowsingInstance", "BackForwardCache",
    "Translate", "OptimizationHints", "MediaRouter",
)  # fmt: skip

# No name but the tests' own is looked up, so the browser cannot call home. Root, as which tests may
# run, needs --no-sandbox; a container with a small /dev/shm the flag behind it. A tab behind
# another is timed like the one in front, as if it was a second window. Nothing moves: what scrolls
# smoothly could not be clicked meanwhile.
ARGUMENTS = (
    "--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--disable-gpu",
    "--disable-breakpad", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-extensions", "--no-proxy-server",
    "--in-process-gpu", "--renderer-process-limit=1", "--process-per-site", "--no-zygote",
    "--disable-site-isolation-trials", "--disable-features=" + ",".join(UNUSED),
    "--hide-scrollbars", "--window-size=1400,1500", "--force-prefers-reduced-motion",
    "--disable-renderer-backgrounding",
    "--disable-background-timer-throttling", "--disable-backgrounding-occluded-windows",
    "--host-resolver-rules=MAP *.localhost 127.0.0.1, MAP *.example 127.0.0.1, "
    "MAP * ~NOTFOUND, EXCLUDE 127.0.0.1, EXCLUDE localhost",
)  # fmt: skip

MOST_SHOWN = 3000  # characters of a page whose test has failed
POLL = 0.1  # seconds between two looks of a wait
SLOWEST = 3 * TIMEOUT  # seconds for a page to load or a script to end: never but on a fault
BLANK = "about:blank"
# Commands that undo what a test may have done: cookies, and what Page emulates.
AS_IT_WAS = (
    ("Network.clearBrowserCookies", {}),
    ("Emulation.setScriptExecutionDisabled", {"value": False}),
    ("Emulation.clearDeviceMetricsOverride", {}),
    ("Emulation.setEmulatedMedia", {"features": []}),
)
TALLEST = 5000  # pixels of a screenshot: with more, nobody sees anything in it

# They log each command with its result, which is long.
for name in ("selenium", "urllib3"):
    logging.getLogger(name).setLevel(logging.INFO)


class Browser:
    """A running Chromium. Its profile, and the files that it downloads, lie in ``folder``."""

    def __init__(self, folder):
        self.folder = folder
        self.downloads = folder / "downloads"
        self.downloads.mkdir()
        options = webdriver.ChromeOptions()
        options.binary_location = need("chromium")
        options.accept_insecure_certs = True  # those of the local CA
        options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
        options.add_experimental_option(
            "prefs", {"download.default_directory": str(self.downloads)}
        )
        for argument in (*ARGUMENTS, f"--user-data-dir={folder}/profile"):
            options.add_argument(argument)
        with reserved_port() as port:  # a second run at the same time gets another
            self._service = webdriver.ChromeService(
                need("chromedriver"),
                port,
                log_output=str(folder / "chromedriver.log"),
                env={"PATH": os.environ["PATH"], "HOME": str(folder)},
                popen_kw={"start_new_session": True},  # so that processes_of() finds all of them
            )
            try:
                self.driver = webdriver.Chrome(options, self._service)
            except BaseException:
                self._end_processes()
                raise
        self.driver.set_page_load_timeout(SLOWEST)
        self.driver.set_script_timeout(SLOWEST)
        self._first = self.driver.current_window_handle  # a tab that all tests use, as it is cheap
        self._is_taken = False
        self._expected = []  # patterns of what the console may say

    def __enter__(self):
        return self

    def __exit__(self, *exc_info):
        try:
            self.driver.quit()
        finally:
            self._end_processes()

    def _end_processes(self):
        """Wait until all of its processes have ended; kill those that do not end by themselves."""
        if getattr(self._service, "process", None) is None:
            return  # it could not be started
        session = self._service.process.pid
        try:
            wait_until(lambda: not processes_of(session))
        except AssertionError:
            for pid in processes_of(session):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            wait_until(lambda: not processes_of(session))

    def page(self, url=BLANK) -> "Page":
        """A tab: the first one if it is free, or another."""
        if self._is_taken:
            self.driver.switch_to.new_window("tab")
        else:
            self._is_taken = True
            self.driver.switch_to.window(self._first)
        page = Page(self, self.driver.current_window_handle)
        return page.open(url) if url != BLANK else page

    def expect(self, pattern):
        """Let the console say what ``pattern`` matches: a refusal or a lost connection that the
        test is about."""
        self._expected.append(pattern)

    def complaints(self) -> list:
        """The errors and warnings in the console since the last call, but the expected ones."""
        return [
            f"{entry['level']} {entry['source']}: {entry['message']}"
            for entry in self.driver.get_log("browser")
            if entry["level"] in ("SEVERE", "WARNING")
            and not any(re.search(pattern, entry["message"]) for pattern in self._expected)
        ]

    def clear(self) -> list:
        """Close all tabs but one, forget cookies and downloads. Returns complaints()."""
        try:
            return self.complaints()
        finally:
            for handle in self.driver.window_handles:
                if handle != self._first:
                    self.driver.switch_to.window(handle)
                    self.driver.close()
            self.driver.switch_to.window(self._first)
            self.driver.get(BLANK)
            for command, parameters in AS_IT_WAS:
                self.driver.execute_cdp_cmd(command, parameters)
            self._is_taken = False
            self._expected.clear()
            for path in self.downloads.iterdir():
                path.unlink()


def processes_of(session) -> list:
    """The ids of the processes in a session (setsid(2)). A zombie is none: it has ended."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):  # it has ended meanwhile
            # The name, in brackets, may hold any character.
            state, _, _, its_session = path.read_text("latin-1").rpartition(")")[2].split()[:4]
            if int(its_session) == session and state not in "ZX":
                found.append(int(path.parent.name))
    return found


_SEEN = """
const [css, text] = arguments;
return [...document.querySelectorAll(css)].filter((element) =>
  element.checkVisibility({ visibilityProperty: true })
  && (!text || (element.innerText + element.textContent).includes(text)));
"""


class Page:
    """A tab, as its reader uses it. A wait that takes TIMEOUT fails, and shows the page's text."""

    def __init__(self, browser, handle):
        self._browser = browser
        self._handle = handle

    @property
    def driver(self):
        """Selenium's driver, with this tab as its current one."""
        driver = self._browser.driver
        if driver.current_window_handle != self._handle:
            driver.switch_to.window(self._handle)
        return driver

    def open(self, url) -> "Page":
        self.driver.get(url)
        return self

    def reload(self):
        self.driver.refresh()

    @property
    def url(self) -> str:
        return self.driver.current_url

    @property
    def text(self) -> str:
        """What can be seen of the page. Parts that lie outside of the window may be missing."""
        return self.script("return document.body ? document.body.innerText : ''")

    def all(self, css) -> list:
        return self.driver.find_elements(By.CSS_SELECTOR, css)

    def one(self, css):
        """The first element that fits, seen or not, once there is one."""
        return self.until(lambda: next(iter(self.all(css)), None), css)

    def seen(self, css, text="") -> list:
        """Those of all() that can be seen and have ``text`` in them. The page finds them: to ask
        each element by Selenium would be slow."""
        return self.script(_SEEN, css, text)

    def until(self, condition, what="the condition"):
        """The first true value of ``condition()``. The page may replace an element while the
        condition looks at it: then it is tried again."""

        def look(_):
            with contextlib.suppress(StaleElementReferenceException):
                return condition()

        wait = WebDriverWait(self.driver, TIMEOUT, POLL)
        try:
            return wait.until(look)
        except TimeoutException:
            message = f"{what}: still not so after {TIMEOUT} s:\n{self.text[:MOST_SHOWN]}"
            raise AssertionError(message) from None

    def until_it_says(self, *texts):
        for text in texts:
            self.until(lambda text=text: text in self.text, repr(text))

    def until_it_no_longer_says(self, text):
        self.until(lambda: text not in self.text, f"no {text!r}")

    def click(self, css, text="", inner=""):
        """Click the first visible element that fits and has ``text`` in it, or the first ``inner``
        one in that. A page that moves meanwhile is no fault: a person would aim again."""

        def press():
            for element in self.seen(css, text):
                if inner:
                    element = element.find_element(By.CSS_SELECTOR, inner)
                with contextlib.suppress(ElementClickInterceptedException):
                    element.click()
                    return True

        self.until(press, f"a click on {css} {text!r} {inner}")

    def type(self, css, text, *, enter=False):
        """Write ``text`` into a field, in place of what is there."""
        field = self.until(lambda: next(iter(self.seen(css)), None), css)
        field.clear()
        field.send_keys(text, *([Keys.ENTER] if enter else []))

    def script(self, source, *arguments):
        """What JavaScript in the page returns."""
        return self.driver.execute_script(source, *arguments)

    def fetch(self, url, **options):
        """What the page's own fetch() comes to: (status, text), or (0, the error)."""
        return tuple(
            self.driver.execute_async_script(
                "const [url, options, done] = arguments;"
                "fetch(url, options).then("
                "  async (answer) => done([answer.status, await answer.text()]),"
                "  (error) => done([0, String(error)]))",
                url,
                options,
            )
        )

    # What its reader's system is like ------------------------------------------------------------

    def without_javascript(self) -> "Page":
        return self._emulate("ScriptExecutionDisabled", value=True)

    def as_wide_as(self, width, height=900) -> "Page":
        return self._emulate(
            "DeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False
        )

    def in_colours(self, scheme) -> "Page":
        """``scheme``: light or dark."""
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        return self._emulate("EmulatedMedia", features=features)

    def _emulate(self, what, **parameters):
        self.driver.execute_cdp_cmd(f"Emulation.set{what}", parameters)
        return self

    def screenshot(self, path):
        """Save a picture (PNG) of the page, at most TALLEST pixels high. The window grows for it,
        as what is outside need not be drawn (content-visibility). Not for a dialog, which lies in
        the window's middle."""
        width, height = self.script("return [innerWidth, innerHeight]")
        self.driver.save_screenshot(str(path))
        tall = height
        while not self.seen("dialog[open]"):
            whole = min(self.script("return document.documentElement.scrollHeight"), TALLEST)
            if whole <= tall:
                break
            tall = whole  # parts that come into the window may turn out higher, so look again
            self.as_wide_as(width, tall)
            self.driver.save_screenshot(str(path))
        self.as_wide_as(width, height)
