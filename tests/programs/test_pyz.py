"""gotunnel.pyz: the agent in one file, on a Python that has nothing else."""

import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import pyz
from support import APP, ROOT, agent_process, answer, gateway_process, request

from gotunnel_agent.common import packages

# As if no package was installed: -S leaves out site-packages, -I the folders of the environment.
BARE = (sys.executable, "-I", "-S")

pytestmark = pytest.mark.usefixtures("temporary_folder")


@pytest.fixture(scope="module")
def archive(tmp_path_factory):
    """The archive as it is handed out. Two packages come from the network, or from pip's cache."""
    file = tmp_path_factory.mktemp("pyz") / "gotunnel.pyz"
    pyz.make(sys.executable, str(file))
    return file


def say(*command):
    done = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    return done.returncode, done.stdout, done.stderr


def test_the_same_files_give_the_same_bytes(tmp_path):
    files = [tmp_path / "one", tmp_path / "other"]
    content = {"b": b"1", "a": b"2", "__main__.py": b"print('hello')"}
    pyz.write(files[0], content, 0)
    pyz.write(files[1], dict(reversed(content.items())), 0)
    assert files[0].read_bytes() == files[1].read_bytes()
    assert say(*BARE, files[0]) == (0, "hello\n", "")
    pyz.write(files[1], content, 1_700_000_000)
    assert zipfile.ZipFile(files[1]).infolist()[0].date_time[:3] == (2023, 11, 14)


def test_it_holds_all_of_the_agent_and_nothing_of_the_gateway():
    names = set(pyz.ours())
    agent = {
        path.relative_to(ROOT).as_posix()
        for path in (ROOT / "gotunnel_agent").rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    more = {"__main__.py", "gotunnel.py", "LICENSE", "gotunnel_agent/examples/agent.yaml"}
    assert names == agent | more


def test_what_is_pinned_is_what_setup_py_asks_for():
    setup = (ROOT / "setup.py").read_text("utf-8")
    lists = re.findall(r"^(?:AGENT|QR) = \[(.*?)^\]", setup, re.MULTILINE | re.DOTALL)
    asked = {
        re.match(r"\w+", line)[0]: line for line in re.findall(r'^    "(.+)"', "".join(lists), re.M)
    }
    pinned = {name: version for name, version, _ in pyz.PINNED if name != "typing_extensions"}
    assert pinned.keys() == asked.keys()
    for name, version in pinned.items():
        assert packages.fits(version, asked[name].removeprefix(name))


def test_an_old_python_is_refused_in_a_sentence():
    compile(pyz.MAIN, "__main__.py", "exec", dont_inherit=True)
    before = pyz.MAIN.decode().partition("from gotunnel_agent")[0]
    old = before.replace("sys.version_info <", "(3, 9, 18) <").replace("sys.version_info[1]", "9")
    status, _, error = say(sys.executable, "-c", old)
    assert status == 1
    assert "gotunnel.pyz: this is Python 3.9, expected 3.10 or newer" in error


@pytest.mark.slow
def test_a_visit_by_the_one_file(archive, cache, tmp_path, origin):
    version = re.search(r'__version__ = "(.+)"', (ROOT / "gotunnel.py").read_text("utf-8"))[1]
    assert say(*BARE, archive, "--version") == (0, f"gotunnel {version}\n", "")
    assert say(archive, "--version") == (0, f"gotunnel {version}\n", "")
    with gateway_process(cache) as gateway:
        command = (*BARE, str(archive))
        with agent_process(gateway, tmp_path, http={APP: origin.port}, command=command):
            with gateway.dial(APP) as visitor:
                visitor.send(request())
                with origin.accept() as target:
                    target.read_head()
                    target.send(answer(b"from one file"))
                    assert visitor.read_message()[1] == b"from one file"


@pytest.mark.slow
def test_each_command_is_in_the_one_file(archive):
    example = say(*BARE, archive, "--print-example")
    assert example == (0, (ROOT / "conf" / "agent.yaml").read_text("utf-8"), "")
    listed = say(*BARE, archive, "--help")[1]
    commands = set(re.findall(r"^  gotunnel (\w[\w-]*)", listed, re.MULTILINE))
    assert {"http", "tcp", "files", "join", "forward", "status", "service"} <= commands
    for command in ("http", "join", "forward"):  # of three modules
        status, out, error = say(*BARE, archive, command, "--help")
        assert (status, error) == (0, ""), command
        assert out.startswith("usage: "), command


@pytest.mark.slow
def test_a_program_can_open_a_tunnel_with_the_one_file_alone(archive):
    script = (
        f"import sys; sys.path[:] = [{str(archive)!r}, *sys.path[1:]]\n"
        "import gotunnel\n"
        "try: gotunnel.forward(8080, join='gotunnel://a:b@127.0.0.1:1', timeout=0.01)\n"
        "except gotunnel.Unreachable as error: print(error)"
    )
    status, said, _ = say(*BARE, "-c", script)
    assert status == 0 and said.startswith("127.0.0.1:1: ")


@pytest.mark.slow
def test_a_program_can_import_the_one_file(archive):
    """Open a tunnel by it, and draw a QR code."""
    script = (
        f"import sys; sys.path[:] = [{str(archive)!r}, *sys.path[1:]]\n"
        "import gotunnel\n"
        "from gotunnel_agent.quick.qr import qr_lines\n"
        "assert callable(gotunnel.forward)\n"
        "assert len(qr_lines('https://a.example.com', dark_ink=True)) > 10"
    )
    assert say(*BARE, "-c", script) == (0, "", "")


@pytest.mark.slow
def test_a_unit_for_the_one_file_starts_it_by_this_python(archive, tmp_path):
    config = tmp_path / "agent.yaml"
    config.write_text(
        f"{{tunnel_addr: 'localhost:9443', jwt_secret: '{'s' * 40}', "
        "tunnels: [{hostname: app.localhost, target: '127.0.0.1:8000'}]}"
    )
    install = ("service", "install", "--dry-run", "--user", "-c", config)
    status, unit, error = say(*BARE, archive, *install)
    assert (status, error) == (0, "")
    assert f"ExecStart={sys.executable} {archive} -c {config}\n" in unit


@pytest.mark.slow
def test_licences_are_in_the_one_file(archive):
    names = zipfile.ZipFile(archive).namelist()
    packages = {Path(name).parts[0] for name in names if name.endswith(".dist-info/METADATA")}
    assert len(packages) == len(pyz.PINNED)
    for package in packages:
        assert f"{package}/licenses/LICENSE" in names
