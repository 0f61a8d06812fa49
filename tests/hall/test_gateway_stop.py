"""A gateway that stops, though a thread of it hangs."""

import threading

from support import TIMEOUT, gateway_here

from gotunnel_server import gateway as gateway_module


def test_gateway_stops_though_a_job_hangs(cache, monkeypatch):
    monkeypatch.setattr(gateway_module, "LAST_JOBS", 0.05)
    go_on, ended = threading.Event(), threading.Event()

    def hang():
        go_on.wait(TIMEOUT)
        ended.set()

    with gateway_here(cache) as gateway:
        gateway.inner._steps.submit(hang)
    assert not ended.is_set()
    go_on.set()
    assert ended.wait(TIMEOUT)
