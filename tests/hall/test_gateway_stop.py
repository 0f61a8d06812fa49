"""What a gateway does when it stops: it ends though a thread of it hangs, and notes what it
served."""

import json
import threading

from support import APP, TIMEOUT, agent_here, gateway_here

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


def test_a_gateway_that_stops_notes_at_once_which_hostnames_it_served(cache, tmp_path, monkeypatch):
    """Else visits to an agent that has just come would not wait for it at the next gateway."""
    monkeypatch.setattr(gateway_module, "RELOAD", TIMEOUT)  # no regular look before the end
    folder = tmp_path / "cache"
    with gateway_here(folder) as gateway:
        with agent_here(gateway, tmp_path, {APP: 1}):
            gateway.inner.stop()
    assert json.loads((folder / "served.json").read_text()) == {APP: "http"}
