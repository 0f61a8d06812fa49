"""The agent's metrics port: its figures, its health, and peers that ask badly."""

import http.client
import re
import socket
import subprocess
import sys

import pytest
from prometheus_client import parser
from support import (
    APP,
    ROOT,
    TIMEOUT,
    Origin,
    agent_process,
    agent_yaml,
    gateway_here,
    need,
    reserved_port,
    running,
)

from gotunnel_agent import config as agent_config
from gotunnel_agent import metrics as metrics_module
from gotunnel_agent.agent import Agent
from gotunnel_agent.common import exposition
from gotunnel_agent.metrics import MetricsPort, PortUnusable


def ask(port, path="/metrics", host="127.0.0.1", method="GET"):
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=TIMEOUT)
    try:
        connection.request(method, path, headers={"Host": host})
        got = connection.getresponse()
        return got.status, got.getheader("Content-Type"), got.read().decode()
    finally:
        connection.close()


def figures(port):
    status, kind, text = ask(port)
    assert (status, kind) == (200, exposition.CONTENT_TYPE)
    return {
        (sample.name, *sorted(sample.labels.items())): sample.value
        for family in parser.text_string_to_metric_families(text)
        for sample in family.samples
    }


@pytest.fixture
def serving():
    """Answers for an agent."""
    ports = []

    def serve(agent):
        ports.append(MetricsPort(("127.0.0.1",), 0, agent))
        ports[-1].start()
        return ports[-1].port

    yield serve
    for port in ports:
        port.close()


@pytest.fixture
def lonely(tmp_path):
    """An agent that was not started."""
    (tmp_path / "agent.yaml").write_text(
        'tunnel_addr: "127.0.0.1:1"\njwt_secret: "a secret"\nskip_tls_verify: true\n'
        f'tunnels:\n  - hostname: "{APP}"\n    target: "127.0.0.1:1"\n'
    )
    agent = Agent(agent_config.load(tmp_path / "agent.yaml"))
    yield agent
    agent.stop()
    agent.run()  # closes what it holds


def test_figures_of_an_agent_that_serves(cache, tmp_path):
    with reserved_port() as port, gateway_here(cache) as gateway:
        with agent_process(gateway, tmp_path, http={APP: port}, metrics_port="auto") as agent:
            metrics = int(agent.wait_for(r"metrics: port (\d+)")[1])
            assert gateway.get(APP)[0] == 502
            found = figures(metrics)
            assert ask(metrics, "/readyz")[::2] == ask(metrics, "/healthz")[::2] == (200, "ok\n")
    name = "gotunnel_agent_"
    assert found[f"{name}connected",] == found[f"{name}sessions_total",] == 1
    assert found[f"{name}tunnels",] == found[f"{name}streams_total",] == 1
    reason = ("reason", "target-unreachable")
    assert found[f"{name}failed_targets_total", ("hostname", APP), reason] == 1
    assert found["process_resident_memory_bytes",] > 1 << 20


def test_an_agent_without_a_session_is_healthy_and_not_ready(serving, lonely):
    port = serving(lonely)
    assert ask(port, "/healthz")[0] == 200
    assert ask(port, "/readyz")[::2] == (503, "no session\n")
    assert figures(port)["gotunnel_agent_connected",] == 0
    lonely.link.problem = "connection refused"
    assert ask(port, "/readyz")[2] == "connection refused\n"


@pytest.mark.parametrize(
    "said, status",
    [
        (b"GET /metrics HTTP/1.1\r\nHost: evil.example\r\n\r\n", 403),
        (b"POST /metrics HTTP/1.1\r\nHost: localhost\r\nContent-Length: 0\r\n\r\n", 405),
        (b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n", 404),
        (b"GET / HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n", 400),
        (b"\x01\x02\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\nX: " + b"x" * 70_000, 431),
    ],
)
def test_what_else_is_asked(serving, lonely, said, status):
    with socket.create_connection(("127.0.0.1", serving(lonely)), TIMEOUT) as peer:
        peer.sendall(said)
        assert peer.recv(100).startswith(f"HTTP/1.1 {status} ".encode())


def test_peers_that_say_nothing_or_trickle_hold_up_nobody(serving, lonely, monkeypatch):
    monkeypatch.setattr(metrics_module, "PEER_TIMEOUT", 10 * TIMEOUT)
    port = serving(lonely)
    with socket.create_connection(("127.0.0.1", port)):
        with socket.create_connection(("127.0.0.1", port)) as trickling:
            for byte in (b"G", b"E"):
                trickling.sendall(byte)
                assert ask(port)[0] == 200


def test_peers_that_say_nothing_or_trickle_end(serving, lonely, monkeypatch):
    monkeypatch.setattr(metrics_module, "PEER_TIMEOUT", 0.2)
    port = serving(lonely)
    with socket.create_connection(("127.0.0.1", port), TIMEOUT) as silent:
        with socket.create_connection(("127.0.0.1", port), TIMEOUT) as trickling:
            trickling.sendall(b"G")
            assert silent.recv(1) == trickling.recv(1) == b""


def test_a_port_in_use_is_one_line_and_status_1(cache, tmp_path):
    with Origin() as other, gateway_here(cache) as gateway:
        text = agent_yaml(gateway, {APP: 1}, {}, {"metrics_port": other.port})
        (tmp_path / "agent.yaml").write_text(text)
        command = (sys.executable, str(ROOT / "gotunnel_agent"), "-c", "agent.yaml")
        with running(*command, cwd=tmp_path) as program:
            assert program.wait() == 1
            (line,) = program.lines
            assert line.startswith(f"gotunnel-agent: metrics_port {other.port} on 127.0.0.1: ")


def test_an_address_that_is_not_here_is_said(lonely):
    with pytest.raises(PortUnusable, match=r"metrics_port \d+ on 192\.0\.2\.1: "):
        MetricsPort(("127.0.0.1", "192.0.2.1"), 0, lonely)


def test_promtool_finds_nothing_wrong_and_the_page_names_every_metric(serving, lonely):
    text = ask(serving(lonely))[2]
    command = [need("promtool"), "check", "metrics"]
    done = subprocess.run(command, input=text, text=True, capture_output=True)
    assert (done.returncode, done.stdout + done.stderr) == (0, "")
    page = (ROOT / "docs" / "operations.md").read_text(encoding="utf-8")
    for name in re.findall(r"^# TYPE gotunnel_agent_(\w+)", text, re.MULTILINE):
        assert f"`{name}`" in page, name
