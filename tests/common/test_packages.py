"""Packages that are missing or too old: each is named in one line, with what to do."""

import ast
import re
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest
import yaml
from support import ROOT, SECRET

from gotunnel_agent.common import packages
from gotunnel_agent.common.packages import AGENT, GATEWAY, H2, HPACK, ORDERS, Fault, Package

KNOWN = (*GATEWAY, *ORDERS, H2, HPACK)


@pytest.mark.parametrize(
    ("found", "wanted", "fits"),
    [
        ("38.0.4", ">=38", True),
        ("38", ">=38.0.0", True),
        ("37.9", ">=38", False),
        ("3.4.8", ">=38", False),
        ("100.1", ">=38", True),
        ("2.10.0", ">=2.4,!=2.10.0", False),
        ("2.10", ">=2.4,!=2.10.0", False),
        ("2.10.1", ">=2.4,!=2.10.0", True),
        ("5.9.1", ">=2.1,<6", True),
        ("6.0.0", ">=2.1,<6", False),
        ("6.0rc1", ">=2.1,<6", False),
        ("1.26.12+deb12", ">=1.26", True),
        ("1!0.5", ">=0.4", True),
        ("unknown", ">=4", True),
    ],
)
def test_versions_are_compared_by_their_numbers(found, wanted, fits):
    assert packages.fits(found, wanted) == fits


def test_setup_py_tells_pip_the_same():
    lists = {
        statement.targets[0].id: ast.literal_eval(statement.value)
        for statement in ast.parse((ROOT / "setup.py").read_text("utf-8")).body
        if isinstance(statement, ast.Assign) and isinstance(statement.value, ast.List)
    }
    told = lists["AGENT"] + lists["SERVER"] + lists["HTTP2"]
    assert {f"{each.name}{each.wanted}" for each in KNOWN} == set(told)
    assert {f"{each.name}{each.wanted}" for each in AGENT} == set(lists["AGENT"])


def test_the_packages_of_this_python_will_do():
    assert packages.faults(KNOWN) == []


@pytest.mark.parametrize("package", KNOWN, ids=lambda package: package.name)
def test_each_is_named_with_its_version_and_the_one_that_is_wanted(package, monkeypatch):
    monkeypatch.setattr(metadata, "version", lambda name: "0.0.1")
    (fault,) = packages.faults([package])
    assert str(fault) == f"{package.name} is 0.0.1, expected {package.wanted}"


def test_a_missing_one_is_named_and_one_without_metadata_will_do():
    there, missing = (
        Package("none-such", "json", ">=1", ""),
        Package("none-such", "none_such", "", ""),
    )
    assert packages.faults([there]) == []
    assert packages.faults([missing]) == [Fault(missing, None)]


@pytest.mark.parametrize(
    ("systems", "said"),
    [
        (False, f"to install it: {sys.executable} -m pip install 'h2>=4.3,<5' 'hpack>=4.1,<5'"),
        (
            True,
            "install it from the system (in Debian: apt install python3-h2 python3-hpack), or, if "
            "the system has no such version, run gotunnel in a virtual environment, with pip "
            "install 'h2>=4.3,<5' 'hpack>=4.1,<5'",
        ),
    ],
)
def test_the_advice_fits_this_python(systems, said, monkeypatch):
    """pip refuses to change a Python that belongs to a Linux distribution (PEP 668)."""
    monkeypatch.setattr(packages, "_belongs_to_the_system", lambda: systems)
    found = [Fault(H2, "4.1.0"), Fault(HPACK, None)]
    named = "h2 is 4.1.0, expected >=4.3,<5; hpack is missing, expected >=4.1,<5"
    assert packages.explain(found) == f"{named}; {said}"


def test_no_advice_names_a_package_that_a_stranger_could_register():
    """Nobody owns the name gotunnel in the package index for us."""
    texts = [*ROOT.glob("*.md"), *ROOT.glob("conf/*"), *ROOT.glob("docs/*.md"), ROOT / "setup.py"]
    texts += [ROOT / "Dockerfile", *ROOT.glob("gotunnel*/**/*.py"), *ROOT.glob("tools/*.py")]
    named = re.compile(r"pip3? install (?:-\S+ )*['\"]?gotunnel(?![\w.-]*\.(?:whl|tar\.gz))")
    assert [path.name for path in texts if named.search(path.read_text("utf-8"))] == []


# The programs ------------------------------------------------------------------------------------


def install(folder, name, version, module=None):
    """A package of that version, found before the real one; its module is empty."""
    info = folder / f"{name}-{version}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    if module is not None:
        (folder / module).mkdir()
        (folder / module / "__init__.py").touch()


def run(program, *arguments, folder, options=(), **environment):
    environment = {
        "GATEWAY_HOST": "gateway.localhost", "TUNNEL_HOST": "tunnel.localhost",
        "JWT_SECRET": SECRET, "GATEWAY_PORT": "auto", "TUNNEL_PORT": "auto", "DASHBOARD_PORT": "0",
        "HTTP_PORT": "0", "PYTHONPATH": str(folder), **environment,
    }  # fmt: skip
    done = subprocess.run(
        [sys.executable, *options, ROOT / program, *arguments],
        capture_output=True, text=True, cwd=folder, env=environment, stdin=subprocess.DEVNULL,
    )  # fmt: skip
    return done.returncode, done.stdout, done.stderr


def test_a_gateway_that_cannot_even_load_says_why_in_one_line(tmp_path):
    install(tmp_path, "cryptography", "3.4.8", "cryptography")
    said = "gotunnel-server: cryptography is 3.4.8, expected >=38; to install it: "
    for arguments in ([], ["check"]):
        status, _, error = run("gotunnel_server", *arguments, folder=tmp_path)
        assert status == 2 and error.startswith(said) and error.count("\n") == 1


def test_a_gateway_that_could_load_an_old_package_does_not_start_on_it(tmp_path):
    install(tmp_path, "acme", "1.9")
    status, _, error = run("gotunnel_server", folder=tmp_path)
    assert status == 2
    assert error.startswith("gotunnel-server: acme is 1.9, expected >=2.1,<6; to install it: ")
    assert error.count("\n") == 1
    status, out, _ = run("gotunnel_server", "check", folder=tmp_path, ACME_ENV="local")
    assert "packages: all that is needed is there" in out  # it orders nothing
    status, out, _ = run(
        "gotunnel_server", "check", folder=tmp_path, ACME_DIRECTORY="https://127.0.0.1:1/"
    )
    assert status == 1 and "fail  packages: acme is 1.9, expected >=2.1,<6; to install" in out


def test_an_agent_without_its_packages_says_so_in_one_line(tmp_path):
    """-S leaves out the folder that pip installs into."""
    status, _, error = run("gotunnel_agent", folder=tmp_path, options=["-S"])
    assert (status, error.count("\n")) == (2, 1)
    assert error.startswith("gotunnel-agent: PyJWT is missing, expected >=2.4,!=2.10.0; PyYAML is ")


def test_only_an_agent_that_signs_its_tokens_needs_pyjwt(tmp_path):
    (tmp_path / "yaml").symlink_to(Path(yaml.__file__).parent)
    for name, key in (("a.yaml", "jwt_secret"), ("b.yaml", "token")):
        (tmp_path / name).write_text(f"{{tunnel_addr: 'a:1', {key}: x.y.z, tunnels: 1}}")
    status, _, error = run("gotunnel_agent", "-c", "a.yaml", folder=tmp_path, options=["-S"])
    assert (status, error.count("\n")) == (2, 1)
    assert error.startswith("gotunnel-agent: a.yaml: PyJWT is missing, expected >=2.4,!=2.10.0; ")
    status, _, error = run("gotunnel_agent", "-c", "b.yaml", folder=tmp_path, options=["-S"])
    assert status == 2 and "tunnels" in error


def test_an_error_of_our_own_is_not_taken_for_a_missing_package(tmp_path):
    (tmp_path / "argparse.py").write_text("import none_such")
    status, _, error = run("gotunnel_agent", folder=tmp_path)
    assert status == 1 and "No module named 'none_such'" in error
