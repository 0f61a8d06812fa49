"""A pool of real agents under load, while they are restarted, killed and stopped one after the
other: no visitor notices."""

import collections
import contextlib
import signal
import threading
import time

import pytest
from support import APP, TIMEOUT, agent_process, answer, gateway_here, request, wait_until

from gotunnel_agent.common import http1

AGENTS, VISITORS = 2, 6


def target(wire):
    """Answers requests on one connection with what came: method, path, body."""
    head = b""
    while True:
        while b"\r\n\r\n" not in head:
            data = wire.read()
            if not data:
                return
            head += data
        first, _, rest = head.partition(b"\r\n\r\n")
        parsed = http1.parse_request(first + b"\r\n\r\n")
        length = int(parsed.fields.get("content-length", "0"))
        while len(rest) < length:
            rest += wire.read()
        body, head = rest[:length], rest[length:]
        wire.send(answer(f"{parsed.method} {parsed.path} ".encode() + body))


class Crowd:
    """Visitors that ask without a break, each on connections of five requests."""

    def __init__(self, gateway, methods):
        self.counts = collections.Counter()
        self.failures = []
        self.slowest = 0.0
        self._gateway, self._methods = gateway, methods
        self._over = threading.Event()
        self._threads = [
            threading.Thread(target=self._visit, args=(number,)) for number in range(VISITORS)
        ]

    def __enter__(self):
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *exc_info):
        self._over.set()
        for thread in self._threads:
            thread.join(TIMEOUT)

    def go_on(self, visits=60):
        """Wait for so many more visits."""
        until = sum(self.counts.values()) + visits
        wait_until(lambda: sum(self.counts.values()) >= until)

    def _visit(self, number):
        turn = 0
        while not self._over.is_set():
            try:
                with self._gateway.dial(APP) as visitor:
                    for _ in range(5):
                        turn += 1
                        self._ask(visitor, self._methods[turn % len(self._methods)], number, turn)
            except Exception as error:
                self.failures.append(error)

    def _ask(self, visitor, method, number, turn):
        began, path = time.monotonic(), f"/{number}/{turn}"
        body = b"x" * turn if method == "POST" else b""
        visitor.send(request(method, path, body=body))
        head, came = visitor.read_message()
        self.slowest = max(self.slowest, time.monotonic() - began)
        if head.startswith(b"HTTP/1.1 200") and came == f"{method} {path} ".encode() + body:
            self.counts[method] += 1
        else:
            self.failures.append((head, came))


class Pool:
    """Agents as programs."""

    def __init__(self, gateway, folder, stack, port):
        self._gateway, self._folder, self._stack, self._port = gateway, folder, stack, port
        self.agents = {}

    def start(self, number):
        folder = self._folder / str(number)
        folder.mkdir(exist_ok=True)
        tunnel = {"hostname": APP, "target": f"127.0.0.1:{self._port}", "pool": "true"}
        stack = self._stack.enter_context(contextlib.ExitStack())
        agent = agent_process(self._gateway, folder, ready=False, tunnels=[tunnel])
        self.agents[number] = (stack.enter_context(agent), stack)

    def stop(self, number, how):
        program, stack = self.agents.pop(number)
        program.signal(how)
        assert program.wait() == (0 if how == signal.SIGTERM else -how)
        stack.close()

    def size(self):
        route = self._gateway.inner._registry.lookup(APP)
        return 0 if route is None else len(route.tunnels())

    def await_size(self, size):
        wait_until(lambda: self.size() == size)


@pytest.fixture
def gateway(cache):
    with gateway_here(cache) as gateway:
        yield gateway


@pytest.fixture
def pool(gateway, tmp_path, origin):
    origin.serve(target)
    with contextlib.ExitStack() as stack:
        pool = Pool(gateway, tmp_path, stack, origin.port)
        for number in range(AGENTS):
            pool.start(number)
        pool.await_size(AGENTS)
        yield pool


@pytest.mark.slow
def test_agents_are_restarted_one_after_the_other_and_no_visit_is_lost(gateway, pool):
    with Crowd(gateway, ["GET", "POST"]) as crowd:
        crowd.go_on()
        for number in range(AGENTS):
            pool.stop(number, signal.SIGTERM)
            crowd.go_on()
            pool.start(number)
            pool.await_size(AGENTS)
            crowd.go_on()
    assert not crowd.failures, crowd.failures[:3]
    assert min(crowd.counts.values()) > 100


@pytest.mark.long
def test_agents_are_killed_one_after_the_other_and_no_get_is_lost(gateway, pool):
    with Crowd(gateway, ["GET"]) as crowd:
        for number in (0, 1) * 3:
            crowd.go_on()
            pool.stop(number, signal.SIGKILL)
            crowd.go_on()
            pool.start(number)
            pool.await_size(AGENTS)
    assert not crowd.failures, crowd.failures[:3]


@pytest.mark.long
def test_an_agent_that_is_stopped_holds_up_nobody(gateway, pool):
    """As with a pulled cable, nothing comes from it any more, and nothing says so."""
    with Crowd(gateway, ["GET"]) as crowd:
        for number in range(AGENTS):
            crowd.go_on()
            program, _ = pool.agents[number]
            program.signal(signal.SIGSTOP)
            pool.await_size(AGENTS - 1)
            crowd.go_on()
            program.signal(signal.SIGCONT)
            pool.await_size(AGENTS)
    assert not crowd.failures, crowd.failures[:3]
    assert crowd.slowest < 5  # one second for those that wait when it stops
