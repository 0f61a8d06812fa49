"""What stands in Dockerfile and compose.yaml fits the programs; containers are not started here."""

import json
import os
import re
import subprocess

import pytest
import yaml
from support import ROOT

from gotunnel_agent import config as agent_config
from gotunnel_server import config as server_config

EXAMPLES = "/usr/share/gotunnel/conf/"  # where the image has the folder conf


@pytest.fixture(scope="module")
def compose():
    return yaml.safe_load((ROOT / "compose.yaml").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def gateway(compose):
    """The gateway's configuration in compose.yaml."""
    environ = {"ACME_CACHE": "/var/lib/gotunnel", **compose["services"]["gateway"]["environment"]}
    return server_config.load("/dev/null", environ)


@pytest.fixture(scope="module")
def agent(compose):
    """The agent's configuration: an example that the image has."""
    entrypoint = compose["services"]["agent"]["entrypoint"]
    path = entrypoint[entrypoint.index("-c") + 1]
    assert path.startswith(EXAMPLES)
    text = (ROOT / "conf" / path.removeprefix(EXAMPLES)).read_text(encoding="utf-8")
    return yaml.safe_load(text), text


def test_the_agent_of_the_example_finds_and_trusts_its_gateway(gateway, agent, tmp_path):
    document, text = agent
    ca_file = tmp_path / "ca.crt"
    ca_file.touch()
    path = tmp_path / "agent.yaml"
    path.write_text(text.replace(document["ca_file"], str(ca_file)))
    config = agent_config.load(path)
    assert (config.tunnel_host, config.tunnel_port) == (gateway.tunnel_host, gateway.tunnel_port)
    assert config.jwt_secret == gateway.jwt_secret
    assert document["ca_file"] == f"{gateway.acme_cache}/local/ca.crt" and gateway.local_ca


def test_its_target_is_the_sample_site(compose, agent):
    document, _ = agent
    (tunnel,) = document["tunnels"]
    host, port = tunnel["target"].split(":")
    assert port in compose["services"][host]["entrypoint"]


def test_the_ports_of_visitors_and_the_dashboard_are_published_on_this_machine_alone(
    compose, gateway
):
    published = compose["services"]["gateway"]["ports"]
    ports = {gateway.gateway_port, gateway.dashboard_port}
    assert set(published) == {f"127.0.0.1:{port}:{port}" for port in ports}


def test_each_container_is_confined(compose):
    for service in compose["services"].values():
        assert service["read_only"] and service["cap_drop"] == ["ALL"]
        assert service["security_opt"] == ["no-new-privileges:true"]


def test_the_agent_starts_when_the_gateway_is_healthy(compose):
    assert compose["services"]["agent"]["depends_on"] == {
        "gateway": {"condition": "service_healthy"}
    }


def test_the_gateway_has_time_to_drain(compose, gateway):
    grace = compose["services"]["gateway"]["stop_grace_period"]
    assert float(grace.removesuffix("s")) > gateway.drain_timeout


@pytest.fixture(scope="module")
def image():
    """The Dockerfile's instructions, each on one line."""
    text = (ROOT / "Dockerfile").read_text(encoding="utf-8")
    lines = re.sub(r"\\\n\s*", "", text).splitlines()
    return [line for line in lines if line and not line.startswith("#")]


def test_the_image_runs_as_a_user_without_rights_and_checks_its_health(image):
    assert image.index("USER gotunnel") > max(
        place for place, line in enumerate(image) if line.startswith("RUN")
    )


@pytest.mark.parametrize(
    ("runs", "asked", "status"),
    [
        (["python", "/usr/local/bin/gotunnel-server"], "gotunnel-server status", 0),
        (["docker-init", "--", "gotunnel-server"], "gotunnel-server status", 2),
        (
            ["/usr/local/bin/gotunnel-agent", "-c", "gotunnel-server.yaml"],
            "gotunnel-agent status",
            2,
        ),
        (["/usr/local/bin/gotunnel", "http", "site:8000"], "", 0),
    ],
)
def test_the_image_asks_for_the_health_of_the_program_that_runs(
    image, tmp_path, runs, asked, status
):
    (check,) = (line for line in image if line.startswith("HEALTHCHECK"))
    *_, script = json.loads(check.partition(" CMD ")[2])
    (tmp_path / "cmdline").write_text("\0".join(runs) + "\0")
    for name in ("gotunnel-server", "gotunnel-agent"):
        program = tmp_path / name
        program.write_text(f'#!/bin/sh\necho {name} "$@" >> {tmp_path}/asked\nexit {status}\n')
        program.chmod(0o755)
    (tmp_path / "asked").touch()
    done = subprocess.run(
        ["sh", "-c", script.replace("/proc/1/cmdline", str(tmp_path / "cmdline"))],
        env={"PATH": f"{tmp_path}:{os.environ['PATH']}"}, capture_output=True, text=True,
    )  # fmt: skip
    assert (tmp_path / "asked").read_text().strip() == asked
    assert (done.returncode, done.stderr) == (min(status, 1), "")


def test_the_image_has_all_that_setup_installs_and_the_examples(image):
    copied = " ".join(line for line in image if line.startswith("COPY")).split()
    for name in (
        "setup.py", "pyproject.toml", "gotunnel.py", "README.md", "LICENSE", "gotunnel_server",
        "gotunnel_agent", "conf",
    ):  # fmt: skip
        assert name in copied
    assert EXAMPLES.rstrip("/") in copied


def test_the_volume_is_where_certificates_are_kept(image):
    assert "ENV ACME_CACHE=/var/lib/gotunnel" in image and "VOLUME /var/lib/gotunnel" in image
