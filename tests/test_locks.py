"""Threads and locks as docs/architecture.md has them: no thread takes two locks in another order.

Locks that our classes make are recorded while a gateway and its agent serve visits, and while an
issuer orders a certificate. Each pair that a thread holds at once has to follow from the page's
table, and the table must have no cycle: so no two threads can wait for each other.
"""

import contextlib
import graphlib
import linecache
import os
import re
import sys
import threading
import time
from collections import defaultdict

import pytest
from fake_ca import FakeCa, Proofs
from http2_by_hand import DATA, END_STREAM, frame, http2_visitor
from support import (
    APP,
    RAW,
    ROOT,
    SECRET,
    TIMEOUT,
    Origin,
    agent_here,
    answer,
    gateway_here,
    request,
    reserved_port,
    wait_until,
)

import gotunnel
from gotunnel_server.certs.acme import Ca
from gotunnel_server.certs.folder import open_store
from gotunnel_server.certs.issuer import Issuer

TABLE = re.compile(r"^\| (\[`.+?`\]\(.+?\)) \| (.+?) \| .+ \|$", re.MULTILINE)
REAL_LOCK, REAL_CONDITION = threading.Lock, threading.Condition


def documented():
    """Outer lock to the inner ones, as the table has them."""
    text = (ROOT / "docs/architecture.md").read_text(encoding="utf-8")
    section = text.partition("## Locks")[2].partition("## A visit")[0]
    order = defaultdict(set)
    for outer, inner in TABLE.findall(section):
        [name] = re.findall("`(.+?)`", outer)
        order[name] |= set(re.findall("`(.+?)`", inner))
    return order


def within(order, outer):
    """All that may be taken while a lock is held."""
    found, unread = set(), {outer}
    while unread:
        more = order.get(unread.pop(), set()) - found
        found |= more
        unread |= more
    return found


class Watched:
    """A lock that notes what its thread already holds."""

    held = threading.local()
    pairs = set()  # (outer, inner), by name

    def __init__(self, name, lock):
        self._name, self._lock = name, lock

    def acquire(self, *how, **more):
        taken = self._lock.acquire(*how, **more)
        if taken:
            names = self.held.__dict__.setdefault("names", [])
            self.pairs.update((outer, self._name) for outer in names if outer != self._name)
            names.append(self._name)
        return taken

    def release(self):
        self.held.names.remove(self._name)
        self._lock.release()

    def __enter__(self):
        return self.acquire()

    def __exit__(self, *exc_info):
        self.release()


def name_of_lock():
    """``Class.attribute``, if an object of ours makes a lock for itself; else None."""
    frame = sys._getframe(2)
    made = re.search(
        r"self\.(\w+)\b.*=.*threading\.|(Memory)\(",
        linecache.getline(frame.f_code.co_filename, frame.f_lineno),
    )
    if made is None or "gotunnel" not in frame.f_globals["__name__"]:
        return None
    if made[2]:
        return "Memory.lock"
    if made[1] == "_rung":  # Bell's binary semaphore: any thread may release it
        return None
    code = frame.f_code
    for maker in type(frame.f_locals["self"]).__mro__:  # a subclass has it of its base
        if getattr(vars(maker).get(code.co_name), "__code__", None) is code:
            return f"{maker.__name__}.{made[1]}"
    return None


@pytest.fixture
def pairs(monkeypatch):
    """The pairs of locks that threads hold at once, of the locks that are made from now on."""

    def lock():
        name = name_of_lock()
        return Watched(name, REAL_LOCK()) if name else REAL_LOCK()

    def condition(lock=None):
        name = None if lock is not None else name_of_lock()
        return REAL_CONDITION(Watched(name, REAL_LOCK()) if name else lock)

    monkeypatch.setattr(threading, "Lock", lock)
    monkeypatch.setattr(threading, "Condition", condition)
    monkeypatch.setattr(gotunnel, "_process_memory", None)
    monkeypatch.setattr(Watched, "pairs", set())
    return Watched.pairs


def test_the_table_has_no_cycle():
    order = documented()
    assert len(order) > 6
    assert set(graphlib.TopologicalSorter(order).static_order()) > set(order)


def serve_one(wire):
    wire.read_message()
    wire.send(answer())


LIMITED = f"""
limited:
  secret: {SECRET}
  hosts: [{APP}, {RAW}]
  ports: 1-65535
  limits: {{streams: 20, visits: 10}}
"""


def use_a_gateway(tmp_path):
    """Visits in both modes, within limits, and a public port of an agent's own. Another agent waits
    for the hostnames meanwhile."""
    agents_file = tmp_path / "agents.yaml"
    agents_file.write_text(LIMITED)
    agents_file.chmod(0o600)
    settings = {"AGENTS_FILE": str(agents_file)}
    with reserved_port() as port, Origin() as origin:
        origin.serve(serve_one)
        tunnels = [
            {"hostname": APP, "target": f"127.0.0.1:{origin.port}", "health": "/"},
            {"hostname": RAW, "target": f"127.0.0.1:{origin.port}", "mode": "tcp", "port": port},
        ]
        with (
            gateway_here(
                tmp_path,
                TCP_PORTS=str(port),
                ACCESS_LOG=os.devnull,
                METRICS_PORT="auto",
                **settings,
            ) as gateway,
            agent_here(gateway, tmp_path, jwt_issuer="limited", tunnels=tunnels),
        ):
            gateway.wait_for_routes(APP, RAW)
            standby = tmp_path / "standby"
            standby.mkdir()
            with agent_here(gateway, standby, jwt_issuer="limited", tunnels=tunnels, ready=False):
                wait_until(gateway.inner.tunnels.standby.waiting)
            for _ in range(3):
                assert gateway.get(APP) == (200, b"ok")
            with gateway.dial(RAW) as visitor:
                visitor.send(request())
                assert visitor.read_message()[1] == b"ok"
            with http2_visitor(gateway) as visitor:
                visitor.ask(1, method="PUT", end=False)
                for piece in range(4):  # as much as makes a window grow
                    last = END_STREAM if piece == 3 else 0
                    visitor.send(frame(DATA, last, 1, b"x" * 16_000))
                assert visitor.answer(1)[2] == b"ok"
                visitor.wire.reset()


def use_a_pool(tmp_path):
    """Visits of a pool in both modes, of which one agent's target is away."""
    with (
        gateway_here(tmp_path) as gateway,
        reserved_port() as nobody,
        Origin() as origin,
        contextlib.ExitStack() as stack,
    ):
        origin.serve(serve_one)
        for port in (nobody, origin.port):
            place = {"target": f"127.0.0.1:{port}", "pool": "true"}
            tunnels = [{"hostname": APP, **place}, {"hostname": RAW, "mode": "tcp", **place}]
            folder = tmp_path / str(port)
            folder.mkdir()
            stack.enter_context(agent_here(gateway, folder, ready=False, tunnels=tunnels))
        wait_until(lambda: len(gateway.inner.tunnels.registered()) == 2)
        for _ in range(2):
            assert gateway.get(APP) == (200, b"ok")
            with gateway.dial(RAW) as visitor:
                visitor.send(request())
                assert visitor.read_message()[1] == b"ok"


def documented_threads():
    """Patterns of the threads' names in the page's tables: capitals stand for something else."""
    text = (ROOT / "docs/architecture.md").read_text(encoding="utf-8")
    section = text.partition("## Threads")[2].partition("## Locks")[0]
    columns = re.findall(r"^\| (.+?) \|", section, re.MULTILINE)
    names = re.findall("`(.+?)`", " ".join(columns))
    return [
        re.sub("[A-Z]{2,}", "[^ ]+", name.replace("_N", r"_\d+")).replace("...", ".+")
        for name in names
    ]


def test_each_thread_has_a_row_in_the_page(tmp_path, monkeypatch):
    started, start = [], threading.Thread.start

    def note(thread):
        if "gotunnel" in sys._getframe(1).f_globals["__name__"]:
            started.append(thread.name)
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", note)
    use_a_gateway(tmp_path)
    order_a_certificate(tmp_path / "ordered")
    patterns = documented_threads()
    unknown = [
        name for name in started if not any(re.fullmatch(pattern, name) for pattern in patterns)
    ]
    assert unknown == []
    assert {"keeper", "accept", "control", "issuer", f"order {APP}"} <= set(started)


def order_a_certificate(folder):
    """With a CA, and once again by a caller that then drops it."""
    with FakeCa(time.time) as fake:
        store = open_store(folder, fake.directory)
        ordered = threading.Event()
        issuer = Issuer(Ca(fake.directory, store), store, Proofs(), lambda hostname: ordered.set())
        issuer.queue.want(APP)
        issuer.start()
        try:
            assert ordered.wait(TIMEOUT)
        finally:
            issuer.queue.drop(APP)
            issuer.stop()


def test_threads_take_locks_in_the_order_of_the_page(pairs, tmp_path):
    use_a_gateway(tmp_path)
    order_a_certificate(tmp_path / "ordered")
    (tmp_path / "pool").mkdir()
    use_a_pool(tmp_path / "pool")
    order = documented()
    wrong = {(outer, inner) for outer, inner in pairs if inner not in within(order, outer)}
    assert wrong == set()
    # It has looked, also where two locks are rarely held at once.
    assert {
        ("Session._lock", "Tunnels.limiting"),
        ("Tunnels.limiting", "KeptStreams._lock"),
        ("ControlStream._newest", "Session._lock"),
        ("Ports._lock", "Listener._lock"),
        ("Standby._reviewing", "Standby._lock"),
        ("OrderQueue._saving", "OrderQueue.lock"),
        ("PooledLine._lock", "Pool._lock"),
    } <= pairs
