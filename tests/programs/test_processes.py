"""PROCESSES=2 as an operator runs it: a supervisor and two gateways on the same ports."""

import contextlib
import os
import re
import signal
import socket
import ssl
import sys
import threading
import time

import pytest
from support import (
    APP,
    ROOT,
    TIMEOUT,
    agent_process,
    answer,
    gateway_environment,
    gateway_process,
    request,
    running,
    wait_until,
)

from gotunnel_agent.common.status_socket import NoAnswer, ask

pytestmark = pytest.mark.slow

COMMAND = (sys.executable, str(ROOT / "gotunnel_server"))
READY = "all 2 processes are ready$"


@contextlib.contextmanager
def two_processes(cache, **changes):
    with gateway_process(cache, PROCESSES="2", **changes) as gateway:
        gateway.program.wait_for(READY)
        yield gateway


def told(cache):
    return ask([str(cache / "status.sock")], "gotunnel-server")


def processes(cache):
    """Number to process id, of those that serve."""
    with contextlib.suppress(NoAnswer):
        return {
            row["process"]: row["pid"]
            for row in told(cache)["processes"] if row["state"] == "serving"
        }  # fmt: skip
    return {}


def is_alive(pid):
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, 0)
        return True


def lines_of(gateway, pattern):
    return [line for line in list(gateway.program.lines) if re.search(pattern, line)]


class Visitors:
    """Visits one after the other in several threads, each on a connection of its own."""

    def __init__(self, gateway, count=4):
        self._gateway = gateway
        self.ended = []  # when (monotonic), how long it took, status and body, or the error
        self._over = threading.Event()
        self._threads = [threading.Thread(target=self._run) for _ in range(count)]

    def __enter__(self):
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *exc_info):
        self._over.set()
        for thread in self._threads:
            thread.join(TIMEOUT)

    def _run(self):
        while not self._over.is_set():
            began = time.monotonic()
            try:
                found = self._gateway.get(APP)
            except Exception as error:
                found = error
            self.ended.append((began, time.monotonic() - began, found))

    def wait_for_more(self, count=20):
        """Until so many visits that begin from now on have ended."""
        now = time.monotonic()
        wait_until(lambda: sum(began > now for began, _, _ in list(self.ended)) >= count)

    def failed(self):
        return [entry for entry in list(self.ended) if entry[2] != (200, b"ok")]


def test_processes_are_killed_and_renewed_under_load_and_end_with_their_supervisor(
    cache, tmp_path, origin
):
    """One story, as each start of three programs takes seconds."""
    origin.serve(lambda wire: wire.read_head() and wire.send(answer()))
    with two_processes(cache, AGENT_TIMEOUT="5") as gateway:
        with agent_process(gateway, tmp_path, http={APP: origin.port}) as agent:
            agent.wait_for("at 2 gateways$")
            before = processes(cache)
            assert sorted(before) == [1, 2]
            with Visitors(gateway) as visitors:
                visitors.wait_for_more()
                os.kill(before[2], signal.SIGKILL)
                killed_at = time.monotonic()
                visitors.wait_for_more(100)
                wait_until(lambda: len(processes(cache)) == 2 and processes(cache) != before)
                visitors.wait_for_more()
            after = processes(cache)
            assert after[1] == before[1]
            # What the killed process was at is cut; no visit that began later is lost.
            assert [each for each in visitors.failed() if each[0] > killed_at + 1] == []
            assert len(visitors.failed()) <= 8
            (line,) = lines_of(gateway, "process 2 ended by signal 9")
            assert "restarted now" in line

            with Visitors(gateway) as visitors:
                visitors.wait_for_more()
                gateway.program.signal(signal.SIGUSR2)
                gateway.program.wait_for("all 2 processes are renewed$")
                visitors.wait_for_more()
            assert visitors.failed() == []
            wait_until(lambda: len(processes(cache)) == 2)
            assert not set(after.values()) & set(processes(cache).values())
            wait_until(lambda: not any(map(is_alive, after.values())))

        pids = processes(cache).values()
        assert len(pids) == 2
        os.kill(gateway.program.pid, signal.SIGKILL)
        wait_until(lambda: not any(map(is_alive, pids)))
        for port in (gateway.public_port, gateway.tunnel_port, gateway.dashboard_port):
            socket.create_server(("127.0.0.1", port)).close()


@pytest.mark.long
def test_running_visits_end_when_the_gateway_stops_and_a_second_signal_cuts_them(
    cache, tmp_path, origin
):
    with two_processes(cache, DRAIN_TIMEOUT="60") as gateway:
        with agent_process(gateway, tmp_path, http={APP: origin.port}) as agent:
            agent.wait_for("at 2 gateways$")
            with gateway.dial(APP) as one, gateway.dial(APP) as two:
                wires = []
                for visitor in (one, two):
                    visitor.send(request())
                    target = origin.accept()
                    target.read_head()
                    wires.append(target)
                pids = processes(cache).values()
                gateway.program.signal(signal.SIGTERM)
                gateway.program.wait_for("stopping; a second signal stops at once")
                wires[0].send(answer())
                assert one.read_head().startswith(b"HTTP/1.1 200")
                gateway.program.signal(signal.SIGTERM)
                assert gateway.program.wait() == 1
                wait_until(lambda: not any(map(is_alive, pids)))
                with pytest.raises((ssl.SSLError, ConnectionError, AssertionError)):
                    two.read_head()
                for wire in wires:
                    wire.close()


def test_a_port_in_use_is_one_line_and_status_1(tmp_path):
    """Also if the program there has opened it with SO_REUSEPORT."""
    with socket.create_server(("127.0.0.1", 0), reuse_port=True) as other:
        port = other.getsockname()[1]
        environment = gateway_environment(tmp_path, PROCESSES="2", GATEWAY_PORT=str(port))
        with running(*COMMAND, cwd=tmp_path, **environment) as program:
            assert program.wait() == 1
    # A machine with one core is told so before.
    (line,) = [line for line in program.lines if "more processes than cores" not in line]
    assert line.startswith(f"gotunnel-server: GATEWAY_PORT {port} on 127.0.0.1: in use")
