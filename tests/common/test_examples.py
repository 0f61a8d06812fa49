"""--print-example: the example configurations, also in a copy that was installed."""

import ast
import os
import re
import subprocess
import sys
import zipfile

import pytest
from support import ROOT, TIMEOUT

from gotunnel_agent.cli import main as agent
from gotunnel_agent.common.examples import example
from gotunnel_server.cli import main as gateway

PROGRAMS = [
    (gateway, "gotunnel_server", "server.env", ["--print-example"]),
    (gateway, "gotunnel_server", "agents.yaml", ["agents", "--print-example"]),
    (agent, "gotunnel_agent", "agent.yaml", ["--print-example"]),
]


@pytest.mark.parametrize(("program", "package", "name", "words"), PROGRAMS)
def test_an_example_is_printed_as_it_stands(program, package, name, words, capsys):
    with pytest.raises(SystemExit) as end:
        program(words)
    assert end.value.code == 0
    text = (ROOT / "conf" / name).read_text()
    assert capsys.readouterr().out == text == example(package, name)


def test_an_example_is_found_in_a_zip_archive(tmp_path):
    archive = tmp_path / "built.zip"
    with zipfile.ZipFile(archive, "w") as file:
        file.writestr("built/__init__.py", "")
        file.writestr("built/examples/an.example", "as built\n")
    code = "from gotunnel_agent.common.examples import example\n"
    code += "print(example('built', 'an.example'), end='')"
    path = os.pathsep.join((str(archive), str(ROOT)))
    ran = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": path}, cwd=tmp_path,
        capture_output=True, text=True, timeout=TIMEOUT,
    )  # fmt: skip
    assert (ran.stdout, ran.stderr) == ("as built\n", "")


def test_a_copy_without_examples_says_so(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr("gotunnel_agent.common.examples.CHECKOUT", tmp_path)
    with pytest.raises(SystemExit) as end:
        agent(["--print-example"])
    assert end.value.code == 1
    assert "this copy of the program has no examples" in capsys.readouterr().err


def docstrings(tree):
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef)
    owners = [node for node in ast.walk(tree) if isinstance(node, kinds)]
    return {id(node.body[0].value) for node in owners if ast.get_docstring(node)}


def test_no_message_leads_to_a_file_that_an_installed_copy_does_not_have():
    found = []
    for package in ("gotunnel_agent", "gotunnel_server"):
        for path in (ROOT / package).rglob("*.py"):
            tree = ast.parse(path.read_text(encoding="utf-8"))
            known = docstrings(tree)
            found += [
                (path.name, node.value)
                for node in ast.walk(tree)
                if isinstance(node, ast.Constant) and isinstance(node.value, str)
                and id(node) not in known and re.search(r"\b(conf|docs)/", node.value)
            ]  # fmt: skip
    assert found == []
