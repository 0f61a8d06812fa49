"""Many visitors at once, and slow ones: what they cost, and that no other visitor waits for them.

All of them come from one address, of which a gateway serves a part of WORKERS at a time; where a
test needs them all, that address is a trusted proxy's.
"""

import contextlib
import ssl
import statistics
import threading
import time

import pytest
from support import APP, MIB, agent_here, answer, at_length, gateway_here, request

from gotunnel_server.net.listener import descriptor_limit
from gotunnel_server.visitors import relays

# Seconds that a visit may take here beside those of others: a hundred times what it takes, and far
# less than any timeout that would free a worker.
PROMPT = 2


def echo(target):
    while True:
        head, _ = target.read_message()
        target.send(answer(head.split(b" ")[1]))


def visit(gateway, path="/"):
    """A whole visit on a connection of its own; how many seconds it took."""
    began = time.monotonic()
    assert gateway.get(APP, path) == (200, path.encode())
    return time.monotonic() - began


@pytest.mark.parametrize("count", [200, at_length(2000)])
def test_idle_connections_cost_no_worker(cache, tmp_path, origin, count):
    # Both ends of each visit are here, and a gateway gives its visitors half of the descriptors.
    needed = 2 * count + 500
    if descriptor_limit() < needed:
        pytest.skip(f"{descriptor_limit()} descriptors, {needed} are needed: ulimit -n")
    origin.serve(echo)
    with contextlib.ExitStack() as up:
        # Four exchange threads, of which one address gets two: one for the present visit, one for
        # the visit before, whose thread may still be ending. If idle connections held threads, no
        # visit could be served.
        gateway = up.enter_context(gateway_here(cache, WORKERS="4"))
        up.enter_context(agent_here(gateway, tmp_path, http={APP: origin.port}))
        alone = statistics.median(visit(gateway) for _ in range(20))
        threads = threading.active_count()
        idle = []
        for number in range(count):
            visitor = up.enter_context(gateway.dial(APP))
            visitor.send(request("GET", f"/{number}"))
            assert visitor.read_message()[1] == f"/{number}".encode()
            idle.append(visitor)
        # Step threads, at most 32, are started when two steps happen at the same time.
        assert threading.active_count() <= threads + 32
        beside = statistics.median(visit(gateway) for _ in range(20))
        print(f"visit: {alone * 1000:.1f} ms alone, {beside * 1000:.1f} ms beside {count} idle, "
              f"{threads} threads, then {threading.active_count()}")  # fmt: skip
        assert beside < PROMPT
        for number in (0, count // 2, count - 1):  # the idle ones still work
            idle[number].send(request("GET", "/again"))
            assert idle[number].read_message()[1] == b"/again"


def test_slow_visitors_delay_nobody(cache, tmp_path, origin):
    """One sends its head byte by byte, one its body; one reads nothing."""
    answers_flow = threading.Event()

    def script(target):
        head = target.read_head()
        if head.startswith(b"POST"):
            target.read_until(b"\r\n0\r\n\r\n")
        elif b"/large" in head:
            target.send(answer(bytes(64 * MIB)))
            answers_flow.set()
            return
        target.send(answer(head.split(b" ")[1], "Connection: close"))

    origin.serve(script)
    changes = {"WORKERS": "4", "TRUSTED_PROXIES": "127.0.0.1"}
    with contextlib.ExitStack() as up:
        gateway = up.enter_context(gateway_here(cache, **changes))
        up.enter_context(agent_here(gateway, tmp_path, http={APP: origin.port}))
        reads_nothing, slow_head, slow_body = (
            up.enter_context(gateway.dial(APP)) for _ in range(3)
        )
        reads_nothing.send(request("GET", "/large"))
        slow_body.send(request("POST", "/upload", "Transfer-Encoding: chunked"))
        head = request("GET", "/trickled")
        for byte in head[:-1]:
            slow_head.send(bytes([byte]))
            slow_body.send(b"1\r\nx\r\n")
            assert visit(gateway) < PROMPT
        assert not answers_flow.is_set()  # still blocked by the visitor that reads nothing
        slow_head.send(head[-1:])
        assert slow_head.read_message()[1] == b"/trickled"
        slow_body.send(b"0\r\n\r\n")
        assert slow_body.read_message()[1] == b"/upload"


def test_one_address_gets_a_part_and_a_trusted_proxy_all(cache, tmp_path, origin):
    for trusted, served in (("192.0.2.1", 2), ("127.0.0.0/8", 4)):
        with contextlib.ExitStack() as up:
            gateway = up.enter_context(gateway_here(cache, WORKERS="4", TRUSTED_PROXIES=trusted))
            up.enter_context(agent_here(gateway, tmp_path, http={APP: origin.port}))
            waiting = []
            for _ in range(served):
                visitor = up.enter_context(gateway.dial(APP))
                visitor.send(request())
                target = origin.accept()
                target.read_head()
                waiting.append((visitor, target))
            assert gateway.get(APP)[0] == 503
            for visitor, target in waiting:
                target.send(answer(b"at last", "Connection: close"))
                assert visitor.read_message()[1] == b"at last"


def test_relays_of_a_trusted_proxy_are_not_limited_to_a_part(cache, tmp_path, origin, monkeypatch):
    monkeypatch.setattr(relays, "MAX_RELAYS", 2)
    for trusted, served in (("192.0.2.1", 1), ("127.0.0.0/8", 2)):
        with contextlib.ExitStack() as up:
            gateway = up.enter_context(gateway_here(cache, TRUSTED_PROXIES=trusted))
            up.enter_context(agent_here(gateway, tmp_path, tcp={APP: origin.port}))
            for _ in range(served):
                visitor = up.enter_context(gateway.dial(APP))
                visitor.send(b"x")
                assert origin.accept().read_exactly(1) == b"x"
            surplus = up.enter_context(gateway.dial(APP))
            with pytest.raises((ConnectionError, ssl.SSLError)):
                surplus.send(b"x")
                while surplus.read():
                    pass
