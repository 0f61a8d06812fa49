"""The gateway as a whole: what it keeps, which of its threads wait for each other, and whether it
starts if there are too few.
"""

import gc
import http.client
import os
import queue
import subprocess
import sys
import threading
import weakref

import pytest
from hand_made import registered
from support import APP, ROOT, TIMEOUT, gateway_environment, gateway_here

from gotunnel import NoThread
from gotunnel_server.config import load
from gotunnel_server.gateway import Gateway
from gotunnel_server.net.listener import PortError


def test_no_part_keeps_the_configuration(cache):
    """It holds secrets, and a part that has all of it may read any of it."""
    config = load(os.devnull, gateway_environment(cache, DRAIN_TIMEOUT="0", HTTP_PORT="auto"))
    gateway, kept = Gateway(config), weakref.ref(config)
    gateway.start()
    try:
        del config
        gc.collect()
        assert kept() is None
    finally:
        gateway.stop()


def test_credentials_are_looked_at_while_the_folder_of_certificates_hangs(cache, monkeypatch):
    hangs, go_on, looks = threading.Event(), threading.Event(), queue.Queue()

    def hang():
        hangs.set()
        go_on.wait(TIMEOUT)

    with gateway_here(cache) as gateway:
        monkeypatch.setattr(gateway.inner._certificates, "reload", hang)
        monkeypatch.setattr(gateway.inner._credentials, "reload", lambda force: looks.put(force))
        gateway.inner.reload()
        assert hangs.wait(TIMEOUT)
        while not looks.empty():
            looks.get()
        gateway.inner.reload()
        while not looks.get(timeout=TIMEOUT / 2):
            pass
        go_on.set()


@pytest.mark.parametrize(("number", "shown"), [(8443, ":8443"), (443, "")])
def test_the_port_that_visitors_type_stands_in_redirects_and_links(cache, number, shown):
    settings = {"PUBLIC_PORT": str(number), "HTTP_PORT": "auto"}
    with gateway_here(cache, **settings) as gateway, registered(gateway, APP):
        plain = http.client.HTTPConnection("127.0.0.1", gateway.inner.http_port, TIMEOUT)
        plain.request("GET", "/x", headers={"Host": APP})
        assert plain.getresponse().headers["Location"] == f"https://{APP}{shown}/x"
        plain.close()
        page = http.client.HTTPConnection("127.0.0.1", gateway.dashboard_port, TIMEOUT)
        page.request("GET", "/")
        assert f'href="https://{APP}{shown}/"' in page.getresponse().read().decode()
        page.close()


# Too few threads ---------------------------------------------------------------------------------


# All threads that a gateway without visitors has, by the beginnings of their names.
NEEDED = (
    "access log", "step", "registration", "exchange", "keeper", "credentials", "memory",
    "listener gateway", "listener tunnel", "listener http", "listener dashboard",
    "listener metrics", "visits",
)  # fmt: skip


def threads():
    return {thread.name for thread in threading.enumerate()}


@pytest.mark.parametrize("name", NEEDED)
def test_a_gateway_that_lacks_a_thread_does_not_say_that_it_serves(cache, monkeypatch, name):
    start, served = threading.Thread.start, []

    def refuse(thread):
        if thread.name.startswith(name):
            raise RuntimeError("can't start new thread")
        start(thread)

    ports = dict.fromkeys(("HTTP_PORT", "METRICS_PORT"), "auto")
    environment = gateway_environment(cache, DRAIN_TIMEOUT="0", ACCESS_LOG="/dev/null", **ports)
    gateway = Gateway(load(os.devnull, environment))
    monkeypatch.setattr(threading.Thread, "start", refuse)
    with pytest.raises((NoThread, PortError), match="ulimit -u"):
        gateway.start(lambda: served.append(True))
    monkeypatch.undo()
    gateway.stop()
    assert not served


def test_a_gateway_starts_no_thread_once_it_has_said_that_it_serves(cache):
    """So the system cannot refuse one when a predecessor has gone, or systemd was told READY."""
    before, there = threads(), []
    ports = dict.fromkeys(("HTTP_PORT", "METRICS_PORT"), "auto")
    environment = gateway_environment(cache, DRAIN_TIMEOUT="0", ACCESS_LOG="/dev/null", **ports)
    gateway = Gateway(load(os.devnull, environment))
    gateway.start(lambda: there.extend(threads()))
    try:
        own = threads() - before
        assert own <= set(there)
        assert {name for name in NEEDED if not any(each.startswith(name) for each in own)} == set()
        assert all(each.startswith(NEEDED) for each in own)
    finally:
        gateway.stop()


@pytest.mark.parametrize("program", ["gotunnel_server", "gotunnel_agent"])
def test_a_program_without_threads_ends_with_one_line(cache, tmp_path, program):
    code = (
        "import runpy, sys, threading\n"
        'def refuse(thread): raise RuntimeError("can\'t start new thread")\n'
        "threading.Thread.start = refuse\n"
        f"sys.argv[0] = {str(ROOT / program)!r}\n"
        "runpy.run_path(sys.argv[0], run_name='__main__')\n"
    )
    path = tmp_path / "agent.yaml"
    path.write_text(
        '{"tunnel_addr": "127.0.0.1:9", "jwt_secret": "a secret of this test", '
        '"tunnels": [{"hostname": "app.localhost", "target": "127.0.0.1:9"}]}'
    )
    command = [sys.executable, "-c", code, *(["-c", path] if program == "gotunnel_agent" else [])]
    environment = {"PATH": os.environ["PATH"], **gateway_environment(cache)}
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 1
    line = done.stderr.splitlines()[-1]
    assert "no further thread" in line and "ulimit -u" in line
    assert "Traceback" not in done.stderr
