"""The tools, and what is installed: both must work on a machine that has nothing but Python."""

import ast
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import bootstrap
import check
import demo
import pytest
from support import need_package

ROOT = Path(__file__).parent.parent
SETUP = (ROOT / "setup.py").read_text("utf-8")


pytestmark = pytest.mark.usefixtures("temporary_folder")


@pytest.mark.parametrize(
    "name",
    [
        "bootstrap.py",
        "chaos.py",
        "check.py",
        "demo.py",
        "screenshots.py",
        "simulate.py",
        "soak.py",
        "test.py",
    ],
)
def test_an_old_python_can_parse_the_tool_and_so_say_that_it_is_too_old(name):
    ast.parse((ROOT / "tools" / name).read_text("utf-8"), feature_version=(3, 6))


@pytest.mark.parametrize("version", [(3, 6, 15), (3, 9, 18)])
def test_an_old_python_is_refused_in_a_sentence(version):
    with pytest.raises(bootstrap.CannotPrepare, match=r"Python 3\.\d, expected 3\.10 or newer"):
        bootstrap.check_version(version)


@pytest.mark.parametrize("version", [(3, 10, 0), (3, 14, 0)])
def test_a_new_python_will_do(version):
    bootstrap.check_version(version)


def test_a_python_without_ensurepip_is_told_the_package_of_debian(monkeypatch):
    monkeypatch.setattr(bootstrap.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(bootstrap.CannotPrepare, match="apt install python3-venv"):
        bootstrap.make_environment()


def test_what_pip_says_last_is_shown_if_it_fails(tmp_path):
    script = "import sys; print('retry\\n' * 9 + 'the reason'); sys.exit(1)"
    with pytest.raises(bootstrap.CannotPrepare, match="problem:(\n    .*)*the reason\nadvice"):
        bootstrap.run([sys.executable, "-c", script], "problem", "advice")


def test_each_need_takes_its_lists_out_of_setup_py():
    server, test = (bootstrap.requirements(SETUP, need) for need in ("server", "test"))
    names = [re.match(r"[\w-]+", requirement)[0] for requirement in server]
    assert names[:4] == ["PyJWT", "PyYAML", "cryptography", "python-dotenv"]
    assert test[: len(server)] == server
    assert any(requirement.startswith("pytest>=") for requirement in test)


def test_a_changed_setup_py_is_installed_and_an_unchanged_one_is_not(tmp_path, monkeypatch):
    done = []
    monkeypatch.setattr(bootstrap, "FOLDER", str(tmp_path))
    monkeypatch.setattr(bootstrap, "SETUP", str(tmp_path / "setup.py"))
    monkeypatch.setattr(bootstrap, "make_environment", lambda: done.append("made"))
    monkeypatch.setattr(bootstrap, "pip_install", lambda python, needed: done.append(needed))

    Path(bootstrap.SETUP).write_text('AGENT = ["one"]\nSERVER = ["two"]\n')
    bootstrap.install("server")
    bootstrap.install("server")
    assert done == ["made", ["one", "two"]]

    Path(bootstrap.SETUP).write_text('AGENT = ["one"]\nSERVER = ["three"]\n')
    bootstrap.install("server")
    assert done[2:] == [["one", "three"]]


@pytest.mark.parametrize(
    "arguments, failing, status, said",
    [
        ([], set(), 0, ""),
        ([], {"mypy"}, 1, "check.py: faults in types\n"),
        ([], {"format", "check"}, 1, "check.py: faults in format and lint\n"),
        (["--fix"], set(), 0, ""),
        (["--mend"], set(), 2, "check.py: arguments --mend, expected none or --fix\n"),
    ],
)
def test_the_check_says_where_the_faults_are(arguments, failing, status, said, capsys, monkeypatch):
    ran = []

    def run(command, cwd):
        words = [os.path.basename(command[0]), *command[1:]]
        ran.append(words)
        return subprocess.CompletedProcess(command, bool(failing & set(words)))

    monkeypatch.setattr(bootstrap, "prepare", lambda need: os.path.join("bin", "python"))
    monkeypatch.setattr(subprocess, "run", run)
    assert check.main(arguments) == status
    assert capsys.readouterr().err == said
    fixes = [
        words for words in ran if words in (["ruff", "format"], ["ruff", "check", "--fix-only"])
    ]
    assert len(fixes) == (2 if arguments == ["--fix"] else 0)


def test_the_demo_brings_the_page_back_and_leaves_nothing(capsys):
    status = demo.show(demo.Demo(sys.executable), once=True)
    shown = capsys.readouterr().out
    assert status == 0, shown
    assert "    200 OK\n" in shown
    assert "    X-Forwarded-For: 127.0.0.1\n" in shown


def test_the_demo_stays_up_until_it_is_stopped(capsys, monkeypatch):
    show = demo.Demo(sys.executable)
    monkeypatch.setattr(demo, "visit", lambda *arguments: show.stop())
    status = demo.show(show, once=False)
    shown = capsys.readouterr().out
    assert status == 0, shown
    assert "    curl --cacert " in shown


def test_a_file_that_the_demo_writes_is_for_its_owner_alone():
    with demo.Demo(sys.executable) as written:
        assert os.stat(written.write("agent.yaml", "jwt_secret: x")).st_mode & 0o777 == 0o600


def test_a_demo_that_brings_another_page_fails(capsys, monkeypatch):
    visit = demo.visit
    monkeypatch.setattr(demo, "visit", lambda port, ca, token: visit(port, ca, "another"))
    assert demo.show(demo.Demo(sys.executable), once=True) == 1
    assert "another page came back" in capsys.readouterr().out


def test_a_process_that_dies_ends_the_demo_with_its_last_lines(capsys, monkeypatch):
    monkeypatch.setattr(demo, "GATEWAY_HOST", "no hostname")
    assert demo.show(demo.Demo(sys.executable), once=True) == 1
    last = capsys.readouterr().out.splitlines()[-2:]
    assert "the gateway ended by itself, status 2" in last[0]
    assert "GATEWAY_HOST is 'no hostname'" in last[1]


def test_a_process_that_stays_silent_ends_the_demo(capsys, monkeypatch):
    monkeypatch.setattr(demo, "START_TIMEOUT", 0)
    assert demo.show(demo.Demo(sys.executable), once=True) == 1
    assert "the site did not say" in capsys.readouterr().out


def test_every_package_and_file_is_installed():
    """setup.py finds packages by itself, and other files by their names."""
    patterns = re.search(r'package_data=\{"": \[(.+)\]\}', SETUP)[1].replace('"', "").split(", ")
    for top in ("gotunnel_agent", "gotunnel_server"):
        for path in (ROOT / top).rglob("*"):
            if path.is_dir() or "__pycache__" in path.parts:
                continue
            assert (path.parent / "__init__.py").is_file(), path
            assert path.suffix == ".py" or any(map(path.match, patterns)), path


@pytest.fixture(scope="module")
def environment(tmp_path_factory):
    """The folder with the programs of a virtual environment."""
    folder = tmp_path_factory.mktemp("environment") / "venv"
    subprocess.run([sys.executable, "-m", "venv", folder], check=True)
    return folder / ("Scripts" if os.name == "nt" else "bin")


def checkout(folder, mode=0o644):
    """A copy of the sources: a build leaves folders beside what it builds."""
    folder.mkdir()
    for name in ("setup.py", "pyproject.toml", "gotunnel.py", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder)
    for name in ("gotunnel_agent", "gotunnel_server", "conf"):
        shutil.copytree(ROOT / name, folder / name, ignore=lambda *_: ["__pycache__"])
    for path in folder.rglob("*"):
        if path.is_file():
            path.chmod(mode)
            os.utime(path, (mode, mode))
    return folder


USER = """\
import gotunnel
from gotunnel_agent import Agent, load

with gotunnel.forward(8080, host="demo") as tunnel:
    reveal_type(tunnel.url)
reveal_type(Agent(load("agent.yaml")).snapshot().visits)
reveal_type(gotunnel.HEADER_SIZE)
gotunnel.forward(8080, hots="demo")
gotunnel.nonsense
"""


def check_types(folder, python):
    """Have mypy look at a program that uses what is installed for ``python``."""
    need_package("mypy", "check")
    (folder / "user.py").write_text(USER)
    mypy = (sys.executable, "-m", "mypy", "--strict", "--no-incremental", "--no-error-summary")
    done = subprocess.run(
        [*mypy, "--python-executable", str(python), "user.py"],
        cwd=folder, capture_output=True, text=True,
    )  # fmt: skip
    said = [re.sub(r"^user.py:|  \[.*", "", line) for line in done.stdout.splitlines()]
    assert [line for line in said if "defined in" not in line] == [
        '5: note: Revealed type is "str"',
        '6: note: Revealed type is "int"',
        '7: note: Revealed type is "int"',
        '8: error: Unexpected keyword argument "hots" for "forward"',
        '9: error: Module has no attribute "nonsense"',
    ]


@pytest.mark.slow
@pytest.mark.timeout(300)  # seconds: a build, and packages from the network
def test_the_agent_installs_without_what_only_a_gateway_needs(tmp_path, environment):
    source = checkout(tmp_path / "source")

    def pip(*arguments):
        command = [environment / "python", "-m", "pip", "--disable-pip-version-check", *arguments]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout

    def ask(program):
        done = subprocess.run(
            [environment / program, "--version"], capture_output=True, text=True, cwd=tmp_path
        )
        return done.returncode, done.stdout, done.stderr

    stale = source / "build" / "lib" / "gotunnel_agent" / "gone.py"
    stale.parent.mkdir(parents=True)
    stale.touch()  # as left by the build of a version that still had this module
    pip("wheel", "--no-deps", "--wheel-dir", str(tmp_path), str(source))
    (wheel,) = tmp_path.glob("*.whl")
    pip("install", str(wheel))
    assert "gotunnel_agent/gone.py" not in pip("show", "-f", "gotunnel")
    assert "gotunnel_agent/py.typed" in pip("show", "-f", "gotunnel")
    printed = subprocess.run([environment / "gotunnel-agent", "--print-example"],
                             capture_output=True, cwd=tmp_path)  # fmt: skip
    assert printed.stdout == (ROOT / "conf" / "agent.yaml").read_bytes()
    check_types(tmp_path, environment / "python")
    version = re.search(r'__version__ = "(.+)"', (ROOT / "gotunnel.py").read_text("utf-8"))[1]
    assert ask("gotunnel-agent") == (0, f"gotunnel {version}\n", "")
    assert "cryptography" not in pip("list")
    status, _, error = ask("gotunnel-server")
    assert status == 2
    assert re.fullmatch(
        r"gotunnel-server: cryptography is missing, expected >=38; python-dotenv is missing, .*; "
        r"to install it: .*python3? -m pip install 'cryptography>=38' 'python-dotenv>=0.19.1' "
        r"'acme>=2.1,<6' 'josepy>=1.13,<3' 'requests>=2.28' 'urllib3>=1.26'\n",
        error,
    )

    pip("install", f"{wheel}[server]")
    assert ask("gotunnel-server") == (0, f"gotunnel {version}\n", "")
    page = environment.parent.glob("[Ll]ib/**/gotunnel_server/dashboard/page.html")
    assert list(page)


@pytest.mark.slow
@pytest.mark.timeout(300)  # seconds: a build, and packages from the network
def test_a_wheel_has_the_same_bytes_whoever_builds_it_and_from_what(tmp_path, environment):
    """From two checkouts whose files differ in time and mode, and from the archive of the sources.
    The archive has the same bytes, too."""
    python = environment / "python"
    pip = [python, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    subprocess.run([*pip, "install", "--upgrade", "setuptools", "wheel"], check=True)

    def build(what, source):
        out = tmp_path / f"{what} of {source.name}"
        script = f"import setuptools.build_meta as b; b.build_{what}(r'{out}')"
        subprocess.run([python, "-c", script], cwd=source, check=True, capture_output=True)
        (file,) = out.iterdir()
        return file

    one = checkout(tmp_path / "one")
    other = checkout(tmp_path / "other", mode=0o600)
    archives = [build("sdist", source) for source in (one, other)]
    assert archives[0].read_bytes() == archives[1].read_bytes()
    shutil.unpack_archive(archives[0], tmp_path, filter="data")
    (unpacked,) = tmp_path.glob("gotunnel-*")
    wheels = {build("wheel", source).read_bytes() for source in (other, unpacked)}
    assert len(wheels) == 1
