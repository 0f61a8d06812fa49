"""Threads and locks of gateways that pass visits on, as docs/architecture.md has them."""

import re
import threading

from peers_here import peers_here
from support import APP, RAW, Origin, agent_here, answer, request
from test_locks import documented, documented_threads, pairs, within  # noqa: F401 (a fixture)


def pass_visits_on(cache, folder):
    with peers_here(cache) as (here, there), Origin() as web, Origin() as raw:
        web.serve(lambda wire: (wire.read_message(), wire.send(answer(bytes(100_000)))))
        raw.serve(lambda wire: wire.send(wire.read_exactly(4)))
        with agent_here(there.gateway, folder, {APP: web.port}, {RAW: raw.port}):
            here.sees(APP, RAW)
            for body in b"", bytes(100_000):
                with here.gateway.dial(APP) as visitor:
                    visitor.send(request("PUT", body=body))
                    visitor.read_message()
            with here.gateway.dial(RAW) as visitor:
                visitor.send(b"ping")
                assert visitor.read_exactly(4) == b"ping"
            here.peers.ask(frozenset([there.card.id]))
        here.sees_no(APP, RAW)
        there.peers.drain()


def test_threads_and_locks_are_those_of_the_page(pairs, cache, tmp_path, monkeypatch):  # noqa: F811
    started, start = [], threading.Thread.start

    def note(thread):
        started.append(thread.name)
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", note)
    pass_visits_on(cache, tmp_path)
    order = documented()
    assert {pair for pair in pairs if pair[1] not in within(order, pair[0])} == set()
    assert {
        ("Session._lock", "Job._lock"),
        ("Session._lock", "Workers._lock"),
        ("Accepted._lock", "Elsewhere._lock"),
        ("PeerSession._lock", "_Link._lock"),
    } <= pairs
    patterns = documented_threads()
    ours = {name for name in started if re.search("peer|passage", name)}
    assert len(ours) > 6
    assert {name for name in ours if not any(re.fullmatch(p, name) for p in patterns)} == set()
