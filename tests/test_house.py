"""The house: who may import whom. The rules are read off the source, nothing is run."""

import ast
import graphlib
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
WIDTH = 100  # characters of a line

# What each module may import besides the standard library: modules of its own package by their
# names, others as they are. A module that is not listed here is not allowed to exist.
WIRE = {"gotunnel.py": set()}
SERVER = {
    "__init__.py": set(),
    "__main__.py": {"cli"},
    "cli.py": {
        "gotunnel", "agents_file", "authority", "cert_store", "config", "doctor", "gateway",
        "granting", "listener", "scope",
    },
    "doctor.py": {
        "gotunnel", "addresses", "agents_file", "authority", "cert_dir", "cert_store",
        "cryptography", "foreign_files", "gateway", "issuer", "listener", "timetable",
    },
    "granting.py": {"agents_file", "credentials", "scope", "jwt"},
    "config.py": {"gotunnel", "policy", "dotenv"},
    "gateway.py": {
        "gotunnel", "addresses", "attempts", "authority", "cert_store", "certificates",
        "challenges", "credentials", "dashboard", "forwarding", "issuer", "listener", "policy",
        "ports", "refusal", "registry", "tunnel", "visitor",
    },
    "listener.py": set(),
    "hello.py": set(),
    "tunnel.py": {
        "gotunnel", "challenges", "hello", "kept_streams", "limits", "ports", "registration",
        "registry", "takeover",
    },
    "registration.py": {"gotunnel", "registry"},
    "takeover.py": {"registry"},
    "limits.py": set(),
    "kept_streams.py": {"gotunnel"},
    "attempts.py": set(),
    "credentials.py": {"gotunnel", "agents_file", "scope", "jwt"},
    "agents_file.py": {"config", "scope", "yaml"},
    "scope.py": {"gotunnel"},
    "policy.py": set(),
    "registry.py": {"gotunnel"},
    "visitor.py": {
        "gotunnel", "challenges", "doors", "hello", "http1", "limits", "pages", "proxy",
        "proxy_header",
    },
    "challenges.py": {"cryptography", "refusal"},
    "addresses.py": set(),
    "doors.py": set(),
    "ports.py": {"gotunnel", "listener"},
    "proxy.py": {"gotunnel", "forwarding", "http1", "limits", "pages"},
    "forwarding.py": {"http1"},
    "proxy_header.py": set(),
    "http1.py": set(),
    "pages.py": set(),
    "certificates.py": {"gotunnel", "authority", "cert_dir"},
    "cert_dir.py": {"authority", "cryptography", "foreign_files"},
    "authority.py": {"cryptography", "foreign_files"},
    "foreign_files.py": {"cryptography"},
    "acme_order.py": {
        "acme", "bounded_http", "challenges", "cryptography", "foreign_files", "josepy",
        "refusal", "stop", "timetable",
    },
    "bounded_http.py": {"requests", "stop", "urllib3"},
    "cert_store.py": {"challenges", "cryptography", "foreign_files"},
    "issuer.py": {"cert_store", "refusal", "stop", "timetable"},
    "stop.py": set(),
    "refusal.py": set(),
    "timetable.py": set(),
    "dashboard.py": {"pages"},
}  # fmt: skip
AGENT = {
    "__init__.py": set(),
    "__main__.py": {"cli", "forward"},
    "cli.py": {"gotunnel", "agent", "config", "policy"},
    "forward.py": {"gotunnel"},
    "config.py": {"gotunnel", "policy", "proxy_header", "yaml"},
    "policy.py": set(),
    "agent.py": {"gotunnel", "target", "jwt"},
    "target.py": {"gotunnel", "proxy_header"},
    "proxy_header.py": set(),
}
HOUSE = {
    **WIRE,
    **{f"gotunnel_server/{name}": allowed for name, allowed in SERVER.items()},
    **{f"gotunnel_agent/{name}": allowed for name, allowed in AGENT.items()},
}

# Bytes in, values out: nothing that waits.
PURE = [
    "gotunnel_agent/proxy_header.py",
    *(
        f"gotunnel_server/{name}.py"
        for name in (
            "doors", "forwarding", "hello", "http1", "limits", "pages", "proxy_header",
            "registration", "scope",
        )
    ),
]
IMPURE = {"socket", "ssl", "select", "selectors", "threading", "time", "logging"}

BANNER = "# " + "=" * 97  # between the two halves of gotunnel.py


def source(module):
    return (ROOT / module).read_text(encoding="utf-8")


def tree(module):
    return ast.parse(source(module))


def imports(nodes, package=""):
    """The top-level names that the import statements among ``nodes`` bring in, those of the
    module's own ``package`` without it."""
    names = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            paths = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level:
            paths = [f"{package}.{node.module}"] if node.module else [
                f"{package}.{alias.name}" for alias in node.names
            ]  # fmt: skip
        elif isinstance(node, ast.ImportFrom):
            paths = [node.module]
        else:
            continue
        names.update(path.removeprefix(f"{package}.").partition(".")[0] for path in paths)
    return names


def imports_of(module):
    return imports(ast.walk(tree(module)), module.partition("/")[0] if "/" in module else "")


def test_every_module_has_its_place():
    found = {"gotunnel.py"}
    for package in ("gotunnel_server", "gotunnel_agent"):
        found.update(f"{package}/{path.name}" for path in (ROOT / package).glob("*.py"))
    assert found == set(HOUSE)


@pytest.mark.parametrize("module", HOUSE)
def test_module_imports_only_what_it_may(module):
    assert imports_of(module) - sys.stdlib_module_names <= HOUSE[module]


@pytest.mark.parametrize("package", ["gotunnel_server", "gotunnel_agent"])
def test_arrows_point_one_way(package):
    """A cycle would raise CycleError."""
    modules = [module for module in HOUSE if module.startswith(package)]
    own = {Path(module).stem for module in modules}
    graph = {Path(module).stem: imports_of(module) & own for module in modules}
    assert set(graphlib.TopologicalSorter(graph).static_order()) == own


@pytest.mark.parametrize("module", HOUSE)
def test_nothing_is_imported_inside_a_function(module):
    inner = [
        node.lineno
        for function in ast.walk(tree(module))
        if isinstance(function, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
        for node in ast.walk(function)
        if isinstance(node, (ast.Import, ast.ImportFrom))
    ]
    assert inner == []


@pytest.mark.parametrize("module", HOUSE)
def test_no_module_takes_the_name_of_a_stdlib_one(module):
    """``python gotunnel_server`` puts the folder on the path: it would be imported instead."""
    stem = Path(module).stem
    assert stem == "__main__" or stem not in sys.stdlib_module_names


@pytest.mark.parametrize("module", PURE)
def test_pure_modules_wait_for_nothing(module):
    assert not imports_of(module) & IMPURE


def test_upper_half_of_the_wire_names_nothing_impure():
    lines = source("gotunnel.py").split("\n")
    upper = [
        node
        for node in ast.walk(tree("gotunnel.py"))
        if getattr(node, "lineno", sys.maxsize) <= lines.index(BANNER)
    ]
    names = {node.id for node in upper if isinstance(node, ast.Name)}
    assert len(upper) > 1000 and "struct" in names  # it is the half that we mean
    assert not (imports(upper) | names) & IMPURE


def test_only_the_gateways_configuration_reads_the_environment():
    readers = {
        module
        for module in HOUSE
        for node in ast.walk(tree(module))
        if isinstance(node, ast.Attribute) and node.attr in ("environ", "environb", "getenv")
        or isinstance(node, ast.alias) and node.name in ("environ", "environb", "getenv")
    }
    assert readers == {"gotunnel_server/config.py"}


@pytest.mark.parametrize("folder", [".", "gotunnel_server", "gotunnel_agent", "tests", "tools"])
def test_no_line_is_wider_than_it_may_be(folder):
    wide = [
        f"{path.name}:{number}"
        for path in sorted((ROOT / folder).glob("*.py"))
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1)
        if len(line) > WIDTH
    ]
    assert wide == []
