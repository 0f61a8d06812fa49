"""What tests share: the local CA, targets, the Go ends, and a look at what a test leaves behind."""

import contextlib
import logging
import os
import subprocess
import tempfile
import threading

import leaks
import pytest
from redis_server import Proxy, redis_process, sentinel_set
from support import ROOT, Origin, need, wait_until

SLOW_TIMEOUT = 300  # seconds for a test that is marked slow


def pytest_configure(config):
    """Leave slow tests out unless -m says what to run."""
    config.option.markexpr = config.option.markexpr or "not slow"
    logging.getLogger("gotunnel").addHandler(leaks.Watch())


def pytest_collection_modifyitems(items):
    """A slow test may take longer, on a machine that is slow itself."""
    for item in items:
        if item.get_closest_marker("slow") and not item.get_closest_marker("timeout"):
            item.add_marker(pytest.mark.timeout(SLOW_TIMEOUT))


@pytest.fixture(autouse=True)
def no_thread_left():
    """Each test ends with the threads that it began with."""
    before = set(threading.enumerate())
    yield
    wait_until(lambda: set(threading.enumerate()) <= before, timeout=10)


@pytest.fixture(autouse=True)
def no_core_left():
    """Each test ends with the cores that it began with: a program that a test runs in this process
    may choose one of them, and the programs of later tests would inherit that."""
    cores = os.sched_getaffinity(0)
    yield
    os.sched_setaffinity(0, cores)


@pytest.fixture(autouse=True)
def no_secret_in_a_log():
    """Whatever a test makes the programs say, at any level."""
    yield
    found, leaks.found = leaks.found, []
    assert not found


@pytest.fixture(scope="session")
def cache(tmp_path_factory):
    """An ACME_CACHE for all gateways of the run, so that keys are made once."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def origin():
    with Origin() as origin:
        yield origin


@pytest.fixture
def redis_server():
    """A redis-server of the test's own, empty. See redis_server.py."""
    with redis_process() as server:
        yield server


@pytest.fixture
def redis_sentinels():
    """A master, a replica and three Sentinels."""
    with sentinel_set() as servers:
        yield servers


@pytest.fixture
def proxy_to():
    """A function that makes a Proxy to a port, or to the path of a Unix socket."""
    with contextlib.ExitStack() as stack:
        yield lambda upstream: stack.enter_context(Proxy(upstream))


@pytest.fixture(scope="session")
def gopeer(tmp_path_factory):
    """The Go ends, built anew for each run: only Go's own cache, which can be shared, is kept."""
    program = tmp_path_factory.mktemp("gopeer") / "gopeer"
    command = [need("go"), "build", "-buildvcs=false", "-o", str(program), "."]
    built = subprocess.run(command, cwd=ROOT / "tests" / "gopeer", capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    return program


@pytest.fixture
def temporary_folder(tmp_path, monkeypatch):
    """Where a tool makes its temporary folder, which must be gone again at the end."""
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    yield
    assert not list(folder.iterdir())
