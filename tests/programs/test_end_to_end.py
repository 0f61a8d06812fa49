"""A tunnel from end to end: the programs that an operator starts, and those that visitors use."""

import hashlib
import random
import re
import signal
import socket
import subprocess
import sys

import pytest
from support import (
    APP,
    CUT,
    GATEWAY_HOST,
    MIB,
    RAW,
    TIMEOUT,
    agent_process,
    answer,
    gateway_process,
    need,
    nginx,
    request,
    reserved_port,
    running,
    wait_until,
)

NGINX = "nginx.localhost"


@pytest.fixture
def gateway(cache):
    with gateway_process(cache) as gateway:
        yield gateway


def curl(gateway, url, *arguments):
    """What curl prints; it takes names under .localhost for this machine by itself."""
    done = subprocess.run(
        [need("curl"), "--silent", "--show-error", "--cacert", str(gateway.ca_file),
         "--max-time", str(TIMEOUT), *arguments, url.format(port=gateway.public_port)],
        stdin=subprocess.DEVNULL, capture_output=True, env={},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


def digest(data):
    return hashlib.sha256(data).hexdigest()


def test_a_folder_is_served_from_a_private_machine(gateway, tmp_path):
    (tmp_path / "hello.txt").write_text("hello from a private machine\n")
    with reserved_port() as port:
        serve = ("-m", "http.server", str(port), "--bind", "127.0.0.1")
        with running(sys.executable, "-u", *serve, cwd=tmp_path) as target:
            target.wait_for("Serving HTTP")
            with agent_process(gateway, tmp_path, http={APP: port}) as agent:
                page = curl(gateway, f"https://{APP}:{{port}}/hello.txt")
                assert page == b"hello from a private machine\n"

                dashboard = f"http://{GATEWAY_HOST}:{gateway.dashboard_port}/"
                assert APP.encode() in curl(gateway, dashboard)
                assert GATEWAY_HOST.encode() in curl(gateway, f"https://{GATEWAY_HOST}:{{port}}/")

                for program in (agent, gateway.program):
                    program.signal(signal.SIGTERM)
                    assert program.wait() == 0
                    program.wait_for(" stopped$")
                    assert "Traceback (most recent call last):" not in program.lines


@pytest.mark.parametrize("size", [1024, pytest.param(64 * MIB, marks=pytest.mark.slow)])
def test_files_go_up_and_down_unchanged(gateway, tmp_path, size):
    content = random.Random(size).randbytes(size)
    (tmp_path / "up").write_bytes(content)
    with nginx(tmp_path) as port, agent_process(gateway, tmp_path, http={NGINX: port}):
        url = f"https://{NGINX}:{{port}}/"
        curl(gateway, url + "put", "--upload-file", str(tmp_path / "up"))
        assert digest((tmp_path / "put").read_bytes()) == digest(content)
        chunked = ("--upload-file", str(tmp_path / "up"), "-H", "Transfer-Encoding: chunked")
        curl(gateway, url + "chunked", *chunked)
        assert digest((tmp_path / "chunked").read_bytes()) == digest(content)
        assert digest(curl(gateway, url + "up")) == digest(content)
        assert curl(gateway, url + "up", "--range", "1000-1009") == content[1000:1010]


def test_one_curl_fetches_many_files_over_one_connection(gateway, tmp_path):
    for number in range(30):
        (tmp_path / f"file{number}").write_text(f"{number},")
    with nginx(tmp_path) as port, agent_process(gateway, tmp_path, http={NGINX: port}):
        url = f"https://{NGINX}:{{port}}/file[0-29]"
        said = curl(gateway, url, "--write-out", "(%{num_connects})").decode()
        assert re.findall(r"(\d+),", said) == [str(number) for number in range(30)]
        assert [int(count) for count in re.findall(r"\((\d+)\)", said)] == [1] + 29 * [0]


def test_running_request_is_finished_after_sigterm(gateway, tmp_path, origin):
    with agent_process(gateway, tmp_path, http={APP: origin.port}):
        with gateway.dial(APP) as visitor, gateway.dial(APP) as idle:
            visitor.send(request())
            with origin.accept() as target:
                target.read_head()
                gateway.program.signal(signal.SIGTERM)
                gateway.program.wait_for("stopping; a second signal stops at once")
                assert idle.read_to_end() == b""  # and nobody new is let in
                wait_until(lambda: is_refused(gateway.public_port))
                target.send(answer(b"finished"))
                assert visitor.read_message()[1] == b"finished"
                assert visitor.read_to_end() == b""
        assert gateway.program.wait() == 0


def is_refused(port):
    try:
        socket.create_connection(("127.0.0.1", port), TIMEOUT).close()
    except ConnectionError:
        return True
    return False


def test_drain_timeout_cuts_what_goes_on_for_ever(cache, tmp_path, origin):
    with gateway_process(cache, DRAIN_TIMEOUT="0.3") as gateway:
        with agent_process(gateway, tmp_path, tcp={RAW: origin.port}):
            with gateway.dial(RAW) as visitor, origin.accept():
                gateway.program.signal(signal.SIGTERM)
                with pytest.raises(CUT):
                    visitor.read_to_end()
                assert gateway.program.wait() == 0
                gateway.program.wait_for("1 visits did not end in 0.3 s and were cut")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_second_signal_ends_the_gateway_at_once(gateway, tmp_path, origin, number):
    with agent_process(gateway, tmp_path, tcp={RAW: origin.port}):
        with gateway.dial(RAW), origin.accept():
            gateway.program.signal(number)
            gateway.program.wait_for("stopping; a second signal stops at once")
            gateway.program.signal(number)
            assert gateway.program.wait() == 1
            gateway.program.wait_for("WARNING second signal: stopping at once")
