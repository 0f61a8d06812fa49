"""Programs are restarted, and read their files again, under load: no request fails, no download is
cut. With real processes, and wrk (https://github.com/wg/wrk) as the visitors."""

import contextlib
import hashlib
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from support import (
    APP,
    RAW,
    ROOT,
    TIMEOUT,
    Origin,
    agent_process,
    agent_yaml,
    gateway_process,
    need,
    request,
    running,
    wait_until,
)

TIMES = int(os.environ.get("GOTUNNEL_RESTARTS", "3"))  # of each kind, and slow downloads
OTHER = "other.localhost"
DOWNLOAD = bytes(range(256)) * 400
PIECES = 40
# wrk takes the SNI from its URL; the name need not resolve.
WRK_SCRIPT = """
function wrk.resolve(host, service) wrk.addrs = wrk.lookup("127.0.0.1", service) end
function setup(thread) thread.addr = wrk.addrs[1] end
function response(status, headers, body)
  if status ~= 200 then print('FAILED', status, headers['X-Gotunnel-Error']) end
end
function done(summary, latency, requests)
  local e = summary.errors
  print(string.format('ERRORS connect %d read %d write %d timeout %d status %d of %d',
    e.connect, e.read, e.write, e.timeout, e.status, summary.requests))
end
"""

pytestmark = [pytest.mark.slow, pytest.mark.timeout(280)]


class Site(BaseHTTPRequestHandler):
    """Answers at once; /slow takes some seconds."""

    protocol_version = "HTTP/1.1"
    seconds = 4

    def do_GET(self):
        slow = self.path.startswith("/slow")
        body = DOWNLOAD if slow else b"page"
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if not slow:
            self.wfile.write(body)
            return
        self.server.slow += 1
        size = len(body) // PIECES
        for at in range(0, len(body), size):
            self.wfile.write(body[at : at + size])
            time.sleep(self.seconds / PIECES)
            if at == 0:
                self.server.goes_on.wait()

    def log_message(self, *arguments):
        pass


class Server(ThreadingHTTPServer):
    """``slow``: how many slow downloads have begun. They go on while ``goes_on`` is set."""

    daemon_threads = True
    request_queue_size = 256

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Site)
        self.slow = 0
        self.goes_on = threading.Event()
        self.goes_on.set()


@pytest.fixture
def server():
    with Server() as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield server
        server.goes_on.set()
        server.shutdown()
        thread.join()


@pytest.fixture
def site(server):
    return server.server_address[1]


class Downloads:
    """Slow downloads, each in a thread."""

    def __init__(self, gateway):
        self._gateway = gateway
        self._threads = []
        self.whole = 0
        self.cut = []

    def start(self):
        thread = threading.Thread(target=self._run)
        thread.start()
        self._threads.append(thread)

    def _run(self):
        try:
            status, body = self._gateway.get(APP, "/slow")
            same = hashlib.sha256(body).digest() == hashlib.sha256(DOWNLOAD).digest()
            if status != 200 or not same:
                raise ValueError(f"{status}, {len(body)} bytes")
            self.whole += 1
        except Exception as error:
            self.cut.append(error)

    def join(self):
        for thread in self._threads:
            thread.join()


@contextlib.contextmanager
def wrk(gateway, folder, seconds):
    """64 visitors, until the block ends; then no request of theirs has failed."""
    script = folder / "wrk.lua"
    script.write_text(WRK_SCRIPT)
    command = [
        need("wrk"), "-t2", "-c64", f"-d{seconds}", "--timeout", "30s", "-s", str(script),
        f"https://{APP}:{gateway.public_port}/",
    ]  # fmt: skip
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            yield
        finally:
            process.send_signal(signal.SIGINT)
            said = process.communicate(timeout=60)[0]
    errors = re.search("ERRORS (.*) of ([0-9]+)", said)
    assert errors, said
    print(errors[0])
    assert set(re.findall("[0-9]+", errors[1])) == {"0"}, said
    assert int(errors[2]) > 100


def agent_command(gateway, folder, port, **keys):
    path = folder / "agent.yaml"
    path.write_text(agent_yaml(gateway, {APP: port}, {}, {"drain_timeout": 60, **keys}))
    return (sys.executable, str(ROOT / "gotunnel_agent"), "-c", str(path))


def test_restarts_of_the_agent_fail_no_visit(cache, tmp_path, server, site):
    """Each drains while the next one serves. Its download goes on."""
    with gateway_process(cache, AGENT_TIMEOUT="5") as gateway, contextlib.ExitStack() as stack:
        command = agent_command(gateway, tmp_path, site)
        agent = stack.enter_context(running(*command, cwd=tmp_path))
        agent.wait_for(": serving ")
        downloads = Downloads(gateway)
        with wrk(gateway, tmp_path, 200):
            for number in range(TIMES):
                server.goes_on.clear()
                downloads.start()
                wait_until(lambda number=number: server.slow > number)
                agent.signal(signal.SIGTERM)
                last, agent = agent, stack.enter_context(running(*command, cwd=tmp_path))
                agent.wait_for(": serving ")
                assert last.pid != agent.pid and not any("stopped" in line for line in last.lines)
                server.goes_on.set()
        downloads.join()
        assert (downloads.whole, downloads.cut) == (TIMES, [])


@pytest.mark.long
def test_restarts_of_the_agent_one_after_the_other_fail_no_visit(cache, tmp_path, site):
    """As systemd does it: the next one starts when the last one has ended."""
    with gateway_process(cache, AGENT_TIMEOUT="5") as gateway:
        command = agent_command(gateway, tmp_path, site)
        with contextlib.ExitStack() as stack:
            for number in range(TIMES + 1):
                with running(*command, cwd=tmp_path) as agent:
                    agent.wait_for(": serving ")
                    if number == 0:  # a hostname that was never served is not waited for
                        stack.enter_context(wrk(gateway, tmp_path, 200))
                    if number < TIMES:
                        time.sleep(0.5)
                        agent.signal(signal.SIGTERM)
                        assert agent.wait() == 0
                    else:
                        stack.close()


@pytest.mark.long
def test_changes_of_the_agents_file_fail_no_visit(cache, tmp_path, site):
    with gateway_process(cache, AGENT_TIMEOUT="5") as gateway:
        ports = {"http": {APP: site}}
        with agent_process(gateway, tmp_path, **ports, drain_timeout=60) as agent:
            path = tmp_path / "agent.yaml"
            plain = json.loads(path.read_text())
            more = {"hostname": OTHER, "target": f"127.0.0.1:{site}"}
            both = {**plain, "tunnels": [*plain["tunnels"], more]}
            downloads = Downloads(gateway)
            with wrk(gateway, tmp_path, 200):
                for number in range(TIMES):
                    downloads.start()
                    time.sleep(0.3)
                    path.write_text(json.dumps(plain if number % 2 else both))
                    agent.signal(signal.SIGHUP)
                    word = "gone" if number % 2 else "new"
                    wait_until(
                        lambda word=word, number=number: (
                            len(re.findall(f"SIGHUP: .*{word} {OTHER}", "\n".join(agent.lines)))
                            == number // 2 + 1
                        )
                    )
                    time.sleep(0.3)
            downloads.join()
            assert (downloads.whole, downloads.cut) == (TIMES, [])
            assert gateway.get(APP) == (200, b"page")


def test_sighup_at_the_gateway_fails_no_visit(cache, tmp_path, site):
    with gateway_process(cache, AGENT_TIMEOUT="5") as gateway:
        with agent_process(gateway, tmp_path, {APP: site}):
            downloads = Downloads(gateway)
            with wrk(gateway, tmp_path, 60):
                for _ in range(TIMES):
                    downloads.start()
                    gateway.program.signal(signal.SIGHUP)
                    time.sleep(0.2)
            downloads.join()
            assert (downloads.whole, downloads.cut) == (TIMES, [])


def test_a_websocket_lives_through_the_drain_time_of_its_agent_and_no_longer(cache, tmp_path):
    upgrade = request("GET", "/", "Connection: Upgrade", "Upgrade: websocket")
    with gateway_process(cache) as gateway, Origin() as target:
        ports = {"http": {APP: target.port}}
        with agent_process(gateway, tmp_path, **ports, drain_timeout=1.5) as agent:
            with gateway.dial(APP) as visitor:
                visitor.send(upgrade)
                with target.accept() as served:
                    served.read_head()
                    served.send(b"HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\n"
                                b"Upgrade: websocket\r\n\r\n")  # fmt: skip
                    assert visitor.read_head().startswith(b"HTTP/1.1 101 ")
                    agent.signal(signal.SIGTERM)
                    began = time.monotonic()
                    agent.wait_for("stopping; a second signal")
                    for _ in range(4):
                        time.sleep(0.2)
                        visitor.send(b"ping")
                        assert served.read_exactly(4) == b"ping"
                        served.send(b"pong")
                        assert visitor.read_exactly(4) == b"pong"
                    with contextlib.suppress(OSError):
                        assert visitor.read() == b""
                    assert 1.5 <= time.monotonic() - began < 1.5 + TIMEOUT
            assert agent.wait() == 0
            agent.wait_for("1 visits did not end in 1.5 s and were cut")


@pytest.mark.parametrize("raw", [RAW])
def test_a_visit_in_tcp_mode_outlives_a_change_of_its_tunnel(cache, tmp_path, raw):
    with gateway_process(cache) as gateway, Origin() as target:
        with agent_process(gateway, tmp_path, {APP: 1}, {raw: target.port}) as agent:
            with gateway.dial(raw) as visitor, target.accept() as served:
                path = tmp_path / "agent.yaml"
                document = json.loads(path.read_text())
                document["tunnels"] = document["tunnels"][:1]
                path.write_text(json.dumps(document))
                agent.signal(signal.SIGHUP)
                agent.wait_for(f"SIGHUP: .*: gone {raw}$")
                gateway.program.wait_for(f"leaves|has a new session.*{raw}")
                visitor.send(b"ping")
                assert served.read_exactly(4) == b"ping"
