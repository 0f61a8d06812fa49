"""A gateway that the system gives too little: descriptors, threads, room on a disk."""

import contextlib
import errno
import os
import resource
import socket
import threading
import time

import pytest
from support import (
    APP,
    RAW,
    agent_here,
    answer,
    gateway_here,
    wait_until,
)
from test_metrics import figures

from gotunnel_agent.common import atomic_file
from gotunnel_server.net import listener as listener_module

SOON = 5.0  # seconds in which an honest visitor is served here, where other tests may run


@pytest.fixture
def page(origin):
    """A target that answers, and keeps its connections."""
    origin.serve(lambda target: [target.send(answer(b"")) for _ in iter(target.read_head, b"")])
    return origin


def served(gateway, hostname=APP):
    began = time.monotonic()
    assert gateway.get(hostname)[0] == 200
    assert time.monotonic() - began < SOON


# Descriptors --------------------------------------------------------------------------------------


@contextlib.contextmanager
def no_descriptors():
    """The process gets none until the end of the block."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with open(os.devnull) as free:
        lowest = free.fileno()  # all below it are in use
    resource.setrlimit(resource.RLIMIT_NOFILE, (lowest, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_a_port_without_descriptors_waits_calmly_and_serves_when_there_are_some(
    cache, tmp_path, page, caplog
):
    with gateway_here(cache, METRICS_PORT="auto") as gateway:
        with agent_here(gateway, tmp_path, http={APP: page.port}), contextlib.ExitStack() as open_:
            served(gateway)
            (listener,) = (each for each in gateway.inner.listeners._open if each.name == "gateway")
            visitors = [open_.enter_context(socket.socket()) for _ in range(5)]
            caplog.clear()
            with no_descriptors():
                began = time.monotonic()
                for visitor in visitors:
                    visitor.connect(("127.0.0.1", gateway.public_port))
                wait_until(lambda: listener.starved >= 3)
                most = (time.monotonic() - began) / listener_module.PAUSE + 1
                assert listener.starved <= most  # it does not spin
            lines = [line for line in caplog.messages if "cannot accept" in line]
            assert len(lines) == 1 and "ulimit -n" in lines[0]
            for visitor in visitors:  # those that have waited are served, too
                with gateway.context.wrap_socket(visitor, server_hostname=APP) as tls:
                    tls.sendall(f"GET / HTTP/1.1\r\nHost: {APP}\r\n\r\n".encode())
                    assert tls.recv(12) == b"HTTP/1.1 200"
            served(gateway)
            key = ("gotunnel_gateway_failed_accepts_total", ("port", "gateway"))
            assert figures(gateway)[key] == listener.starved


# Threads ------------------------------------------------------------------------------------------


def test_without_further_threads_requests_are_served_and_relays_are_counted(
    cache, tmp_path, page, monkeypatch
):
    start, refused = threading.Thread.start, ("relay", "exchange", "step", "upload")

    def refuse(thread):
        if thread.name.startswith(refused):  # the gateway's; the agent here has some
            raise RuntimeError("can't start new thread")
        start(thread)

    ports = {"http": {APP: page.port}, "tcp": {RAW: page.port}}
    with gateway_here(cache, METRICS_PORT="auto") as gateway:
        with agent_here(gateway, tmp_path, **ports):
            served(gateway)
            with monkeypatch.context() as shortage:
                shortage.setattr(threading.Thread, "start", refuse)
                for _ in range(5):
                    served(gateway)
                with pytest.raises(OSError), gateway.dial(RAW) as visitor:
                    visitor.send(b"GET / HTTP/1.1\r\n\r\n")
                    visitor.read_head()
            reason = ("gotunnel_gateway_visit_errors_total", ("reason", "gateway-busy"))
            wait_until(lambda: figures(gateway).get(reason) == 1)
            with gateway.dial(RAW) as visitor:
                visitor.send(b"GET / HTTP/1.1\r\n\r\n")
                visitor.read_head()


# Disk ---------------------------------------------------------------------------------------------


def test_with_a_full_disk_visits_are_served_and_what_is_lost_is_counted(
    cache, tmp_path, page, monkeypatch, caplog
):
    """Of a new hostname the certificate is missing until there is room: that is said once."""

    def full(path, *rest, **more):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

    new = "new-on-a-full-disk.localhost"
    with gateway_here(cache, METRICS_PORT="auto", ACCESS_LOG="/dev/full") as gateway:
        inner = gateway.inner
        with agent_here(gateway, tmp_path, http={APP: page.port}):
            served(gateway)
            with monkeypatch.context() as disk:
                disk.setattr(atomic_file, "write", full)
                (tmp_path / "new").mkdir()
                with agent_here(gateway, tmp_path / "new", http={new: page.port}):
                    inner.reload()  # served.json
                    for _ in range(3):
                        served(gateway)
                    assert not inner.keeper.state(new).is_ready
                    with pytest.raises(OSError):
                        gateway.get(new)
                    disk.undo()
                    inner.keeper._retry_at = 0  # the minute is over
                    inner.reload()
                    wait_until(lambda: inner.keeper.state(new).is_ready)
                    served(gateway, new)
            lost = ("gotunnel_gateway_access_log_dropped_lines_total",)
            wait_until(lambda: figures(gateway)[lost] >= 5)
    lines = [record.message for record in caplog.records if record.levelname == "ERROR"]
    assert len([line for line in lines if new in line]) == 1
    assert "No space left on device" in caplog.text and "Traceback" not in caplog.text
