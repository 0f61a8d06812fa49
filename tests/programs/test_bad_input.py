"""What an operator gets wrong: one line on standard error, and the status that says whose fault.

Each kind of mistake once, made with the real programs; the tests of the two config.py have the
rest.
"""

import os
import socket
import subprocess
import sys
import tempfile
from types import SimpleNamespace

import pytest
from support import APP, ROOT, SECRET, TIMEOUT, agent_yaml, gateway_environment, need, running

WRONG_CONFIGURATION = 2
NO_PORT = 1


def run(package, folder, *arguments, prefix=(), **environment):
    """Run a program that must end by itself; return its status and lines of standard error."""
    done = subprocess.run(
        [*prefix, sys.executable, str(ROOT / package), *arguments],
        cwd=folder, env={"PATH": os.environ["PATH"], **environment}, timeout=TIMEOUT,
        stdin=subprocess.DEVNULL, capture_output=True, text=True,
    )  # fmt: skip
    assert done.stdout == ""
    return done.returncode, done.stderr.splitlines()


def refusal_of_gateway(cache, folder, *arguments, status=WRONG_CONFIGURATION, **changes):
    """The one line with which a gateway refuses a good environment with changes."""
    environment = gateway_environment(cache, **changes)
    environment = {name: value for name, value in environment.items() if value is not None}
    came, lines = run("gotunnel_server", folder, *arguments, **environment)
    assert (came, len(lines)) == (status, 1), lines
    assert lines[0].startswith("gotunnel-server: ") and SECRET not in lines[0]
    return lines[0]


def refusal_of_agent(folder, **keys):
    """The one line with which an agent refuses a good configuration with changes."""
    path = folder / "agent.yaml"
    nowhere = SimpleNamespace(tunnel_port=9443, ca_file=None)
    path.write_text(agent_yaml(nowhere, {APP: 8000}, {}, {"ca_file": None} | keys))
    status, lines = run("gotunnel_agent", folder, "-c", str(path))
    assert (status, len(lines)) == (WRONG_CONFIGURATION, 1), lines
    assert lines[0].startswith("gotunnel-agent: ") and SECRET not in lines[0]
    return lines[0]


# Gateway -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"JWT_SECRET": None}, "JWT_SECRET is not set"),
        ({"GATEWAY_HOST": "https://gateway.localhost"}, "expected a hostname"),
        ({"TUNNEL_PORT": "70000"}, "TUNNEL_PORT is '70000', expected a port from 1 to 65535"),
        ({"CERT_DIR": "/nowhere", "ACME_ENV": None}, "expected a folder that exists"),
        ({"ACME_CACHE": "/proc/nowhere"}, "needs a folder that it can write"),
        ({"DRAIN_TIMEOUT": "15s"}, "expected seconds"),
    ],
)
def test_gateway_names_the_variable_that_is_wrong(cache, tmp_path, changes, words):
    assert words in refusal_of_gateway(cache, tmp_path, **changes)


def test_gateway_names_an_env_file_that_is_missing(cache, tmp_path):
    line = refusal_of_gateway(cache, tmp_path, "--env-file", "nowhere.env")
    assert f"'{tmp_path}/nowhere.env'" in line and "No such file" in line


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, ["there are no settings: no file {}/.env, and neither GATEWAY_HOST nor"]),
        (
            "GATEWAY_HOST=my_gw.example.com\nDEFAULT_ALOW=10.0.0.0/8\nTUNNEL_PORT=70000\n",
            [
                "DEFAULT_ALOW in {}/.env is no setting of the gateway, did you mean DEFAULT_ALLOW?",
                "JWT_SECRET is not set",
                "GATEWAY_HOST is 'my_gw.example.com', expected a hostname",
                "TUNNEL_HOST is not set",
                "TUNNEL_PORT is '70000'",
            ],
        ),
    ],
)
def test_gateway_names_all_that_is_missing_or_wrong_at_once(tmp_path, content, words):
    if content:
        (tmp_path / ".env").write_text(content)
    status, lines = run("gotunnel_server", tmp_path)
    assert (status, len(lines)) == (WRONG_CONFIGURATION, len(words)), lines
    for line, expected in zip(lines, words):
        assert line.startswith(f"gotunnel-server: {expected.format(tmp_path)}")


@pytest.mark.parametrize("mode", [0o600, 0o644])
def test_gateway_warns_of_secrets_that_everybody_can_read(cache, tmp_path, mode):
    path = tmp_path / ".env"
    environment = gateway_environment(cache)
    path.write_text("".join(f"{name}={value}\n" for name, value in environment.items()))
    path.chmod(mode)
    with running(sys.executable, str(ROOT / "gotunnel_server"), cwd=tmp_path) as gateway:
        gateway.wait_for(" is ready$")
        warnings = [line for line in gateway.lines if "everybody on this machine may read" in line]
    assert len(warnings) == (mode == 0o644)
    assert not warnings or ".env has mode 0644" in warnings[0]


def test_gateway_names_the_line_of_an_env_file(cache, tmp_path):
    (tmp_path / ".env").write_text("LOG_LEVEL=info\n\nJWT_SECRET='never closed\n")
    assert "line 3" in refusal_of_gateway(cache, tmp_path, JWT_SECRET=None)


@pytest.mark.parametrize("setting", ["GATEWAY_PORT", "TUNNEL_PORT", "DASHBOARD_PORT"])
def test_gateway_names_the_port_that_is_in_use(cache, tmp_path, setting):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        line = refusal_of_gateway(cache, tmp_path, status=NO_PORT, **{setting: str(port)})
    assert f"{setting} {port} on 127.0.0.1: in use" in line


def test_gateway_says_so_if_it_has_no_right_to_a_low_port():
    """As nobody, without capabilities."""
    if os.geteuid() != 0:
        pytest.skip("only root can give up its rights")
    prefix = (need("setpriv"), "--reuid=65534", "--regid=65534", "--clear-groups",
              "--bounding-set=-all", "--inh-caps=-all")  # fmt: skip
    with open("/proc/sys/net/ipv4/ip_unprivileged_port_start") as file:
        if int(file.read()) <= 443:
            pytest.skip("here everybody may listen on port 443 (ip_unprivileged_port_start)")
    probe = subprocess.run(
        [*prefix, sys.executable, "-c", f"open({str(ROOT / 'gotunnel.py')!r})"], cwd="/",
        capture_output=True,
    )  # fmt: skip
    if probe.returncode != 0:
        pytest.skip("nobody can run this Python, or read these files")
    with tempfile.TemporaryDirectory() as folder:  # pytest's own are for their owner alone
        os.chmod(folder, 0o777)
        environment = gateway_environment("cache", GATEWAY_PORT="443")
        status, lines = run("gotunnel_server", folder, prefix=prefix, **environment)
    assert (status, len(lines)) == (NO_PORT, 1), lines
    assert "GATEWAY_PORT 443 on 127.0.0.1: no right to listen on a port below 1024" in lines[0]


# Agent -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"tunel_addr": "x:1"}, "unknown key 'tunel_addr', did you mean 'tunnel_addr'?"),
        ({"tunnels": [{"hostname": APP, "target": "127.0.0.1:1", "mod": "tcp"}]}, "'mode'"),
        ({"tunnels": [{"hostname": APP, "target": "127.0.0.1:1", "mode": "udp"}]}, "http, tcp"),
        ({"tunnels": [{"hostname": APP, "target": "127.0.0.1"}]}, "has no port"),
        ({"tunnels": [{"hostname": "a b", "target": "127.0.0.1:1"}]}, "expected a hostname"),
        ({"jwt_secret": None}, "no credential"),
        ({"ca_file": "/nowhere"}, "expected a file that can be read"),
    ],
)
def test_agent_names_the_key_that_is_wrong(tmp_path, keys, words):
    assert words in refusal_of_agent(tmp_path, **keys)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (b"", "the file is empty"),
        (b"tunnels: [", "line 1, column"),
    ],
)
def test_agent_says_what_is_wrong_with_the_file(tmp_path, text, words):
    path = tmp_path / "agent.yaml"
    path.write_bytes(text)
    status, lines = run("gotunnel_agent", tmp_path, "-c", str(path))
    assert (status, len(lines)) == (WRONG_CONFIGURATION, 1), lines
    assert words in lines[0]


@pytest.mark.parametrize("arguments", [(), ("-c", "nowhere.yaml")])
def test_agent_names_a_file_that_is_missing(tmp_path, arguments):
    status, lines = run("gotunnel_agent", tmp_path, *arguments)
    assert (status, len(lines)) == (WRONG_CONFIGURATION, 1), lines
    assert "No such file" in lines[0] and (arguments or ("", "config.yaml"))[1] in lines[0]
    assert lines[0].endswith(": name it with -c, or see gotunnel join and --print-example")


@pytest.mark.parametrize("mode", [0o600, 0o644])
def test_agent_warns_of_secrets_that_everybody_can_read(tmp_path, mode):
    path = tmp_path / "agent.yaml"
    nowhere = SimpleNamespace(tunnel_port=9, ca_file=None)
    path.write_text(agent_yaml(nowhere, {APP: 8000}, {}, {"ca_file": None}))
    path.chmod(mode)
    command = (sys.executable, str(ROOT / "gotunnel_agent"), "-c", str(path))
    with running(*command, cwd=tmp_path) as agent:
        agent.wait_for("next try|again|refused")
        warnings = [line for line in agent.lines if "everybody on this machine may read" in line]
    assert len(warnings) == (mode == 0o644)
    assert not warnings or f"WARNING {path} has mode 0644" in warnings[0].replace("  ", " ")


def test_agent_names_a_ca_file_without_certificates(tmp_path):
    path = tmp_path / "ca.crt"
    path.write_text("nothing of the kind")
    line = refusal_of_agent(tmp_path, ca_file=str(path))
    assert f"ca_file {path}" in line and "expected certificates as PEM" in line


# Both --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("package", ["gotunnel_server", "gotunnel_agent"])
def test_unknown_argument_is_refused_in_one_line(tmp_path, package):
    status, (line,) = run(package, tmp_path, "--nonsense")
    assert status == 2 and "--nonsense" in line


def test_configuration_without_c_is_refused_with_a_hint(tmp_path):
    status, (line,) = run("gotunnel_agent", tmp_path, "agent.yaml")
    assert status == 2
    assert line.endswith("unknown argument 'agent.yaml'; -c FILE names the configuration")


@pytest.mark.parametrize("package", ["gotunnel_server", "gotunnel_agent"])
def test_program_runs_as_a_folder_and_as_a_module(tmp_path, package):
    as_folder = [sys.executable, str(ROOT / package), "--version"]
    as_module = [sys.executable, "-m", package, "--version"]
    for command, folder in ((as_folder, tmp_path), (as_module, ROOT)):
        said = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=TIMEOUT)
        assert said.stdout.startswith("gotunnel ") and said.stderr == ""
