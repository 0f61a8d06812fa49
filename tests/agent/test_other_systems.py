"""The agent on Windows and macOS, as far as Linux can pretend to be them (other_systems.py)."""

import hashlib
import signal
import ssl
import subprocess
import sys
import textwrap

import pytest
from other_systems import BREAK
from support import (
    APP,
    ROOT,
    SECRET,
    TIMEOUT,
    TUNNEL_HOST,
    agent_process,
    answer,
    gateway_process,
    request,
    running,
)

from gotunnel_agent.common.join_string import JoinString

SSH = "ssh.localhost"
SYSTEMS = ["windows", "macos"]


def command(system, *words):
    return (sys.executable, str(ROOT / "tests" / "other_systems.py"), system, *map(str, words))


@pytest.fixture(params=SYSTEMS)
def system(request):
    return request.param


def say(system, *words, folder, **keywords):
    done = subprocess.run(
        command(system, "gotunnel_agent", *words), capture_output=True, text=True, cwd=folder,
        timeout=TIMEOUT, **keywords,
    )  # fmt: skip
    return done.returncode, done.stdout, done.stderr


def test_each_module_of_the_agent_can_be_loaded(system, tmp_path):
    names = [
        path.relative_to(ROOT).with_suffix("").as_posix().replace("/", ".")
        for path in (ROOT / "gotunnel_agent").rglob("*.py")
        if path.name not in ("__main__.py", "__init__.py")
    ]
    script = f"""
        import sys
        sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / "tests")!r}]
        import importlib, other_systems
        other_systems.pretend({system!r})
        for name in {names!r}:
            importlib.import_module(name)
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True
    )
    assert (done.returncode, done.stderr) == (0, "")


def test_commands_that_need_another_system_say_so_in_one_line(tmp_path):
    (tmp_path / "config.yaml").write_text(
        "{tunnel_addr: 'localhost:1', jwt_secret: 'only for tests, and long enough', "
        "tunnels: [{hostname: app.localhost, target: '127.0.0.1:1'}]}"
    )
    status, _, error = say("windows", "service", "install", folder=tmp_path)
    assert status == 1 and "systemd is of Linux, and this is another system" in error
    assert error.count("\n") == 1
    status, _, error = say("windows", "status", folder=tmp_path)
    assert status == 2 and error.count("\n") == 1


@pytest.mark.slow
def test_visits_in_both_modes_and_a_visitors_helper(system, cache, tmp_path, origin):
    with gateway_process(cache) as gateway:
        program = command(system, "gotunnel_agent")
        ports = {"http": {APP: origin.port}, "tcp": {SSH: origin.port}}
        with agent_process(gateway, tmp_path, **ports, command=program) as agent:
            with gateway.dial(APP) as visitor:
                visitor.send(request())
                with origin.accept() as target:
                    target.read_head()
                    target.send(answer(b"from far"))
                    assert visitor.read_message()[1] == b"from far"

            origin.serve(lambda target: target.send(target.read_to_end().upper()))
            where = f"{SSH}:{gateway.public_port}"
            said = say(system, "forward", where, "--ca-file", gateway.ca_file, "--via", "127.0.0.1",
                       folder=tmp_path, input="hello")  # fmt: skip
            assert said[:2] == (0, "HELLO"), said

            agent.signal(BREAK if system == "windows" else signal.SIGTERM)
            assert agent.wait() == 0
            agent.wait_for(" stopped$")
            assert "Traceback" not in "\n".join(agent.lines)


FORWARD = """
import sys
sys.path[:0] = [{root!r}, {tests!r}]
import other_systems
other_systems.pretend({system!r})
import gotunnel
with gotunnel.forward({port}, host={host!r}, join=sys.stdin.readline()) as tunnel:
    print(tunnel.url, flush=True)
    sys.stdin.readline()
"""


@pytest.mark.slow
def test_a_tunnel_of_a_python_program(system, cache, tmp_path, origin):
    origin.serve(lambda target: target.read_head() and target.send(answer(b"embedded")))
    script = FORWARD.format(
        root=str(ROOT), tests=str(ROOT / "tests"), system=system, port=origin.port, host=APP
    )
    with gateway_process(cache) as gateway:
        program = subprocess.Popen(
            [sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            text=True, cwd=tmp_path,
            env={"XDG_STATE_HOME": str(tmp_path), "LOCALAPPDATA": str(tmp_path)},
        )  # fmt: skip
        with program:
            program.stdin.write(f"{join_string(gateway)}\n")
            program.stdin.flush()
            assert program.stdout.readline() == f"https://{APP}:{gateway.public_port}\n"
            assert gateway.get(APP) == (200, b"embedded")
            program.stdin.close()
            assert program.wait(TIMEOUT) == 0


def join_string(gateway):
    ca = ssl.PEM_cert_to_DER_cert(gateway.ca_file.read_text())
    return JoinString(TUNNEL_HOST, gateway.tunnel_port, "office", SECRET,
                      fingerprint=hashlib.sha256(ca).hexdigest())  # fmt: skip


@pytest.mark.slow
def test_joining_and_sharing_a_folder(system, cache, tmp_path):
    (tmp_path / "hello.txt").write_text("hello from far\n")
    place = {"windows": "APPDATA", "macos": "XDG_CONFIG_HOME"}[system]
    home = {"HOME": str(tmp_path), place: str(tmp_path / "user"), "LOCALAPPDATA": str(tmp_path)}
    with gateway_process(cache) as gateway:
        text = join_string(gateway)
        status, _, error = say(system, "join", "-", folder=tmp_path, input=f"{text}\n", env=home)
        assert (status, error) == (0, "")
        assert (tmp_path / "user" / "gotunnel" / "agent.yaml").is_file()

        words = ("gotunnel_agent", "files", ".", "--host", APP)
        with running(*command(system, *words), cwd=tmp_path, **home) as agent:
            agent.wait_for(rf"https://{APP}")
            assert gateway.get(APP, "/hello.txt") == (200, b"hello from far\n")
            agent.signal(signal.SIGINT)
            assert agent.wait() == 0
            assert "Traceback" not in "\n".join(agent.lines)
