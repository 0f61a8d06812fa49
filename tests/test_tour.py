"""The names in docs/ are in the files that they link to; the tour and the map of the house hold.

A link such as [`Mux.receive`](../gotunnel.py) promises that the file defines that name: a class, a
function, a constant; a method or an attribute of a class, or of its instances. A label that is a
file's name promises only the file.
"""

import ast
import functools
import re

import pytest
import test_house
from support import ROOT
from test_house import RULES

PAGES = ("protocol.md", "architecture.md", "tour.md")
LINK = re.compile(r"\[([^\]]*`[^\]]*)\]\(\.\./([\w/.-]+\.py)\)")
STOPS = range(15, 21)  # what an hour has room for


def page(name):
    return (ROOT / "docs" / name).read_text(encoding="utf-8")


def references(text):
    """(name, path) of each linked name; of a file's name too."""
    return [
        (name, path)
        for label, path in LINK.findall(text)
        for name in re.findall("`([^`]+)`", label)
    ]


@functools.cache
def names_in(path):
    """What a file defines: ``Name`` of the module, ``Class.name`` of its classes."""
    found = set()
    tree = ast.parse((ROOT / path).read_text(encoding="utf-8"))
    for prefix, body in [("", tree.body), *classes(tree)]:
        for node in body:
            if isinstance(node, (ast.ClassDef, ast.FunctionDef)):
                found.add(prefix + node.name)
            targets = getattr(node, "targets", [getattr(node, "target", None)])
            found |= {
                prefix + inner.id
                for target in filter(None, targets)
                for inner in ast.walk(target)
                if isinstance(inner, ast.Name)
            }
        found |= {
            prefix + node.attr
            for inner in body
            if prefix
            for node in ast.walk(inner)
            if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store)
        }
    return found


def classes(tree):
    return [(f"{node.name}.", node.body) for node in tree.body if isinstance(node, ast.ClassDef)]


def missing(text):
    """The references whose file or name is not there."""
    return [
        f"{name} in {path}"
        for name, path in references(text)
        if not (ROOT / path).exists()
        or not (path == name or path.endswith(f"/{name}") or name in names_in(path))
    ]


@pytest.mark.parametrize("name", PAGES)
def test_every_name_is_where_the_page_says(name):
    assert missing(page(name)) == []
    assert len(references(page(name))) > 30


def test_a_name_that_has_gone_is_found():
    links = (
        "[`Mux.receive`](../gotunnel.py) [`Mux.receives`](../gotunnel.py) [`Mux`](../gotunnels.py) "
        "[`Mux` or `Max`](../gotunnel.py) [`gotunnel.py`](../gotunnel.py)"
    )
    assert missing(links) == ["Mux.receives in gotunnel.py", "Mux in gotunnels.py",
                              "Max in gotunnel.py"]  # fmt: skip


def stops():
    """(number, text) of each stop of the tour."""
    parts = re.split(r"^### Stop ([0-9]+)\. .+$", page("tour.md"), flags=re.MULTILINE)
    return list(zip(map(int, parts[1::2]), parts[2::2]))


def test_each_stop_of_the_tour_says_where_what_and_why():
    assert [number for number, _ in stops()] == list(range(1, len(stops()) + 1))
    assert len(stops()) in STOPS
    for number, text in stops():
        first = text.strip().split("\n\n")[0]
        assert references(first), number
        assert "\n*See*: " in text and "\n*Why*: " in text, number


# The wings, as architecture.md calls them, and as test_house.py does.
WINGS = {
    "wire": "gotunnel",
    "common": test_house.COMMON,
    "agent": "gotunnel_agent",
    "quick": test_house.QUICK,
    "inspector": test_house.INSPECTOR,
    "net": test_house.NET,
    "routes": test_house.ROUTES,
    "visitors": test_house.VISITORS,
    "agents": test_house.AGENTS,
    "certs": test_house.CERTS,
    "cluster": test_house.CLUSTER,
    "processes": "gotunnel_server.processes",
    "dashboard": test_house.DASHBOARD,
    "admin": test_house.ADMIN,
    "hall": "gotunnel_server",
}


def test_the_table_of_wings_has_the_rules_of_the_house():
    rules = {}
    section = page("architecture.md").partition("## The wings")[2].partition("```mermaid")[0]
    for line in section.splitlines():
        cells = [cell.strip(" `") for cell in line.split("|")[1:-1]]
        if len(cells) != 5 or cells[0] not in WINGS:
            continue
        wing, where, _, ours, others = cells
        assert (ROOT / where).exists()
        assert where.removesuffix(".py").rstrip("/").replace("/", ".") == WINGS[wing]
        allowed = {WINGS[name] for name in filter(None, ours.split(", "))}
        rules[WINGS[wing]] = allowed | set(filter(None, others.replace("`", "").split(", ")))
    assert rules == RULES
