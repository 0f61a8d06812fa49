"""Load beside one hand-over after the other: no request fails, no download is cut.

GOTUNNEL_HANDOVERS says how many; more than a few take minutes.
"""

import contextlib
import hashlib
import os
import re
import signal
import subprocess
import threading
import time

import pytest
from held_sockets import SERVES, Held
from support import (
    APP,
    MIB,
    TIMEOUT,
    agent_process,
    gateway_process,
    need,
    nginx,
    request,
    status_of,
    wait_until,
)

HANDOVERS = int(os.environ.get("GOTUNNEL_HANDOVERS", "3"))
PAUSE = 1.5  # seconds between two hand-overs, in which wrk and the downloads run on
DOWNLOADS = 20
DOWNLOAD = MIB
RATE = MIB // 4  # bytes a second of each download: it outlasts a hand-over or two
CONNECTIONS = 64  # of wrk
ECHO = "echo.localhost"
# wrk must not ask a resolver, which may not know the name.
WRK = "function wrk.resolve(host, service) wrk.addrs = wrk.lookup('127.0.0.1', service) end"

pytestmark = [pytest.mark.slow, pytest.mark.timeout(120 + 60 * HANDOVERS)]


class Downloads:
    """Slow downloads, one after the other in each thread, each of which is checked whole."""

    def __init__(self, gateway, content):
        self._gateway = gateway
        self._digest = hashlib.sha256(content).digest()
        self.done, self.failed = 0, []
        self._over = threading.Event()
        self._lock = threading.Lock()
        self._threads = [threading.Thread(target=self._run) for _ in range(DOWNLOADS)]

    def __enter__(self):
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *exc_info):
        self._over.set()
        for thread in self._threads:
            thread.join(2 * DOWNLOAD / RATE + TIMEOUT)

    def _run(self):
        while not self._over.is_set():
            began = time.monotonic()
            try:
                self._download()
                with self._lock:
                    self.done += 1
            except Exception as error:
                with self._lock:
                    after = time.monotonic() - began
                    self.failed.append(f"after {after:.1f} s: {error!r}")

    def _download(self):
        with self._gateway.dial(APP) as visitor:
            visitor.send(request(path="/large"))
            assert status_of(visitor.read_head()) == 200
            found, count, began = hashlib.sha256(), 0, time.monotonic()
            while count < DOWNLOAD:
                time.sleep(max(0, began + count / RATE - time.monotonic()))
                data = visitor.read()
                assert data, f"cut after {count} bytes"
                found.update(data)
                count += len(data)
            assert found.digest() == self._digest


@contextlib.contextmanager
def load(gateway, folder, content):
    """wrk and downloads, which go on until the block is over. Yields what wrk has printed, and the
    Downloads; both are complete behind it."""
    script = folder / "wrk.lua"
    script.write_text(WRK)
    printed = []
    command = (
        need("wrk"), "-t2", f"-c{CONNECTIONS}", "-d3600", "--timeout", "60", "-s", str(script),
        f"https://{APP}:{gateway.public_port}/small",
    )  # fmt: skip
    with Downloads(gateway, content) as downloads:
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as wrk:
            try:
                yield printed, downloads
            finally:
                wrk.send_signal(signal.SIGINT)  # it prints what it has measured
                printed.append(wrk.communicate(timeout=90)[0])


def assert_nothing_failed(printed, downloads):
    (text,) = printed
    print(text)
    print(f"{downloads.done} downloads, {len(downloads.failed)} of them failed")
    assert int(re.search(r"(\d+) requests in", text)[1]) > 100
    assert "Socket errors" not in text and "Non-2xx" not in text, text
    assert downloads.failed == []
    assert downloads.done >= DOWNLOADS


@pytest.fixture
def site(tmp_path):
    folder = tmp_path / "site"
    folder.mkdir()
    content = os.urandom(DOWNLOAD)
    (folder / "large").write_bytes(content)
    (folder / "small").write_bytes(b"small")
    with nginx(folder) as port:
        yield port, content


def serve_echo(wire):
    """A target that switches protocols, as a WebSocket's does, and repeats what comes."""
    wire.read_head()
    wire.send(b"HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: raw\r\n\r\n")
    while data := wire.read():
        wire.send(data)


@contextlib.contextmanager
def switched(gateway):
    """A visit that has switched protocols."""
    with gateway.dial(ECHO) as visitor:
        visitor.send(request("GET", "/", "Connection: Upgrade", "Upgrade: raw", host=ECHO))
        assert status_of(visitor.read_head()) == 101
        yield visitor


def echoes(visitor):
    visitor.send(b"still there?")
    return visitor.read_exactly(12) == b"still there?"


def test_nothing_fails_beside_hand_overs(cache, tmp_path, site, origin):
    port, content = site
    origin.serve(serve_echo)
    with (
        gateway_process(cache, DRAIN_TIMEOUT="60", AGENT_TIMEOUT="5") as gateway,
        contextlib.ExitStack() as stack,
    ):
        stack.enter_context(agent_process(gateway, tmp_path, {APP: port, ECHO: origin.port}))
        pids = [gateway.program.pid]
        stack.callback(lambda: end(pids[-1]))
        with load(gateway, tmp_path, content) as results, switched(gateway) as visitor:
            for number in range(HANDOVERS):
                time.sleep(PAUSE)
                os.kill(pids[-1], signal.SIGUSR2)
                pids += wait_until(lambda number=number: [
                    int(pid) for line in list(gateway.program.lines)
                    for pid in re.findall(SERVES, line)
                ][number:], timeout=60)  # fmt: skip
                if number < 3:  # DRAIN_TIMEOUT later its gateway would cut it
                    assert echoes(visitor)
            time.sleep(PAUSE)
        if HANDOVERS > 3:
            print("\n".join(gateway.program.lines))
        assert_nothing_failed(*results)
        assert not [line for line in gateway.program.lines if " ERROR " in line]


def end(pid):
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGTERM)


@pytest.mark.long
def test_nothing_fails_beside_restarts_with_sockets_that_systemd_holds(cache, tmp_path, site):
    port, content = site
    with contextlib.ExitStack() as stack:
        held = Held(cache, stack)
        program = held.start(DRAIN_TIMEOUT="60", AGENT_TIMEOUT="5", NOTIFY_SOCKET="")
        stack.callback(lambda: program.end())
        gateway = held.gateway(program)
        agent = stack.enter_context(agent_process(gateway, tmp_path, {APP: port}))
        with load(gateway, tmp_path, content) as results:
            for _ in range(HANDOVERS):
                time.sleep(PAUSE)
                program.signal(signal.SIGTERM)
                assert program.wait(60) == 0
                program.end()
                print("\n".join(program.lines))
                program = held.start(DRAIN_TIMEOUT="60", AGENT_TIMEOUT="5", NOTIFY_SOCKET="")
                program.wait_for(" registered ")
            time.sleep(PAUSE)
        print("\n".join(agent.lines))
        assert_nothing_failed(*results)
