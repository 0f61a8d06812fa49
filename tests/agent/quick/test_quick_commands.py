"""`gotunnel http`, `tcp` and `files` as programs, with a gateway in this process."""

import signal
import sys

import pytest
from support import APP, ROOT, agent_yaml, answer, gateway_here, running

PROGRAM = [sys.executable, str(ROOT / "gotunnel_agent")]


@pytest.fixture
def gateway(cache):
    with gateway_here(cache) as gateway:
        yield gateway


def quick(gateway, folder, *words):
    """A quick command with the account of a file."""
    path = folder / "account.yaml"
    path.write_text(agent_yaml(gateway, {"unused.localhost": 1}, {}, {}))
    return running(*PROGRAM, *words, "-c", str(path), "--plain", cwd=folder)


def test_a_port_is_public_by_one_command(gateway, tmp_path, origin):
    origin.serve(lambda wire: wire.read_head() and wire.send(answer(b"from the port")))
    with quick(gateway, tmp_path, "http", str(origin.port), "--host", APP) as program:
        program.wait_for(rf"^https://{APP}")
        assert gateway.get(APP) == (200, b"from the port")
        program.signal(signal.SIGTERM)
        assert program.wait() == 0
