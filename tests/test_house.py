"""The house: who may import whom. The rules are read off the source, nothing is run."""

import ast
import fnmatch
import graphlib
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
WIDTH = 100  # characters of a line

# One rule a wing: the other wings whose modules it may import, and packages of other projects.
# "routes" is the one module of the hall that the wings know: visitors and agents meet there.
COMMON, ROUTES = "gotunnel_agent.common", "gotunnel_server.routes"
QUICK = "gotunnel_agent.quick"
INSPECTOR = "gotunnel_agent.inspector"
NET, VISITORS, AGENTS, CERTS, CLUSTER, DASHBOARD, ADMIN, PROCESSES = (
    f"gotunnel_server.{wing}"
    for wing in (
        "net",
        "visitors",
        "agents",
        "certs",
        "cluster",
        "dashboard",
        "admin",
        "processes",
    )  # fmt: skip
)
RULES = {
    "gotunnel": set(),
    COMMON: {"gotunnel", "yaml"},
    "gotunnel_agent": {"gotunnel", COMMON, QUICK, INSPECTOR, "jwt", "yaml"},
    QUICK: {"gotunnel", COMMON, INSPECTOR, "gotunnel_agent"},
    INSPECTOR: {"gotunnel", COMMON, "gotunnel_agent"},
    NET: {"gotunnel", COMMON, "cryptography"},
    ROUTES: {"gotunnel", COMMON},
    VISITORS: {"gotunnel", COMMON, NET, ROUTES, "h2", "hpack", "hyperframe"},
    AGENTS: {"gotunnel", COMMON, NET, ROUTES, "jwt", "yaml"},
    CERTS: {
        "gotunnel", COMMON, NET, "acme", "cryptography", "josepy", "requests", "urllib3",
    },
    CLUSTER: {"gotunnel", COMMON, NET, ROUTES, AGENTS, CERTS, "cryptography", "redis"},
    DASHBOARD: {"gotunnel", COMMON, NET, ROUTES, VISITORS},
    ADMIN: {
        "gotunnel", COMMON, NET, ROUTES, VISITORS, AGENTS, CERTS, CLUSTER, "gotunnel_server",
        "cryptography", "jwt",
    },
    PROCESSES: {"gotunnel", COMMON, NET, VISITORS, CLUSTER, DASHBOARD, "gotunnel_server"},
    "gotunnel_server": {
        "gotunnel", COMMON, NET, ROUTES, VISITORS, AGENTS, CERTS, CLUSTER, DASHBOARD, ADMIN,
        "dotenv",
    },
}  # fmt: skip
# Arrows that break a rule, and are to go.
TO_GO = set()

# Bytes in, values out: nothing that waits, nor what they import of ours.
PURE = [
    "gotunnel_agent/common/addresses.py",
    "gotunnel_agent/common/cells.py",
    "gotunnel_agent/common/exposition.py",
    "gotunnel_agent/common/hostnames.py",
    "gotunnel_agent/common/http1.py",
    "gotunnel_agent/common/join_string.py",
    "gotunnel_agent/common/metrics_page.py",
    "gotunnel_agent/common/one_line.py",
    "gotunnel_agent/common/passwords.py",
    "gotunnel_agent/common/patience.py",
    "gotunnel_agent/common/proxy_protocol.py",
    "gotunnel_agent/common/quantities.py",
    "gotunnel_agent/common/refusals.py",
    "gotunnel_agent/common/strict_yaml.py",
    "gotunnel_agent/common/systemd_unit.py",
    "gotunnel_agent/common/token_bucket.py",
    "gotunnel_agent/dialogue.py",
    "gotunnel_agent/inspector/access.py",
    "gotunnel_agent/inspector/answer.py",
    "gotunnel_agent/inspector/content.py",
    "gotunnel_agent/inspector/copies.py",
    "gotunnel_agent/inspector/event_stream.py",
    "gotunnel_agent/inspector/kept.py",
    "gotunnel_agent/inspector/mask.py",
    "gotunnel_agent/inspector/order.py",
    "gotunnel_agent/inspector/websocket.py",
    "gotunnel_agent/roster.py",
    "gotunnel_server/agents/identity.py",
    "gotunnel_server/agents/limits.py",
    "gotunnel_server/agents/registration.py",
    "gotunnel_server/agents/scope.py",
    "gotunnel_server/agents/secret.py",
    "gotunnel_server/certs/acme_errors.py",
    "gotunnel_server/certs/kept.py",
    "gotunnel_server/certs/proof_memory.py",
    "gotunnel_server/certs/registered_domain.py",
    "gotunnel_server/certs/schedule.py",
    "gotunnel_server/certs/rate_limits.py",
    "gotunnel_server/certs/summary.py",
    "gotunnel_server/cluster/board.py",
    "gotunnel_server/cluster/leases.py",
    "gotunnel_server/cluster/settings.py",
    "gotunnel_server/cluster/tenure.py",
    "gotunnel_server/dashboard/state.py",
    "gotunnel_server/net/client_hello.py",
    "gotunnel_server/processes/roster.py",
    "gotunnel_server/visitors/forwarded.py",
    "gotunnel_server/visitors/http2_frames.py",
    "gotunnel_server/visitors/http2_head.py",
    "gotunnel_server/visitors/http2_hpack.py",
    "gotunnel_server/visitors/http2_screen.py",
    "gotunnel_server/visitors/login.py",
    "gotunnel_server/visitors/pages.py",
    "gotunnel_server/visitors/request.py",
    "gotunnel_server/visitors/sites.py",
    "gotunnel_server/visitors/sniff.py",
    "gotunnel_server/visitors/verdict.py",
    "gotunnel_server/visitors/visit.py",
]
# Pure modules may take values from these: the upper half of the wire is pure (it has a test of its
# own), and of the table of routes they know no more than Route and its exceptions.
VALUES_AND_MORE = {"gotunnel", ROUTES}
IMPURE = {"socket", "ssl", "select", "selectors", "threading", "time", "logging"}

BANNER = "# " + "=" * 97  # between the two halves of gotunnel.py


def _modules():
    found = [ROOT / "gotunnel.py"]
    for package in ("gotunnel_agent", "gotunnel_server"):
        found += sorted((ROOT / package).rglob("*.py"))
    return [path.relative_to(ROOT).as_posix() for path in found]


HOUSE = _modules()


def source(module):
    return (ROOT / module).read_text(encoding="utf-8")


def tree(module):
    return ast.parse(source(module))


def dotted(module):
    """A module's name as it is imported: ``gotunnel_server/net/dns.py`` is
    ``gotunnel_server.net.dns``."""
    return module.removesuffix(".py").removesuffix("/__init__").replace("/", ".")


def is_ours(name):
    return (ROOT / name.replace(".", "/")).is_dir() or (
        ROOT / (name.replace(".", "/") + ".py")
    ).exists()


def imports(nodes, package=""):
    """The full names of the modules that the import statements among ``nodes`` bring in.
    ``package`` is the one whose module it is, which relative imports start from."""
    names = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                above = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join(filter(None, [*above, node.module]))
            modules = [f"{base}.{alias.name}" for alias in node.names]
            found = {name for name in modules if is_ours(name)}
            names |= found if len(found) == len(modules) else found | {base}
    return names


def imports_of(module):
    package = (
        dotted(module) if module.endswith("__init__.py") else (dotted(module).rpartition(".")[0])
    )
    return imports(ast.walk(tree(module)), package)


MODULES = {dotted(module): module for module in HOUSE}


def rule_of(name):
    """The key of RULES that a module's full name falls under: the longest; for a package of
    another project its first part."""
    while name and name not in RULES and "." in name:
        name = name.rpartition(".")[0]
    return name


@pytest.mark.parametrize("module", HOUSE)
def test_a_wing_imports_only_what_it_may(module):
    wing = rule_of(dotted(module))
    used = {rule_of(name) for name in imports_of(module)} - sys.stdlib_module_names - {wing}
    assert used - RULES[wing] == {arrow for at, arrow in TO_GO if at == module}


def test_few_of_the_common_modules_know_the_wire():
    """The connection that sessions run over, and the relay between one and a stream; the codes of
    refusals, which are the wire's; the pool of threads, whose jobs are called as spawn() calls a
    thread's function; and the status, for its thread and the version."""
    modules = {module for module in HOUSE if module.startswith("gotunnel_agent/common/")}
    knowing = {module for module in modules if "gotunnel" in imports_of(module)}
    assert knowing == {
        "gotunnel_agent/common/duplex.py",
        "gotunnel_agent/common/process.py",
        "gotunnel_agent/common/refusals.py",
        "gotunnel_agent/common/relay.py",
        "gotunnel_agent/common/show_status.py",
        "gotunnel_agent/common/status_socket.py",
    }


def test_few_modules_know_the_wing_of_the_quick_commands():
    """The start of the agent's program; and gotunnel.forward(), for random names and targets."""
    users = {
        module
        for module in HOUSE
        if rule_of(dotted(module)) != QUICK
        and QUICK in {rule_of(name) for name in imports_of(module)}
    }
    assert users == {"gotunnel_agent/__main__.py", "gotunnel_agent/embedded.py"}


def test_the_dashboard_is_loaded_only_where_it_is_on():
    """The hall imports what its other parts need: showing.py loads the rest."""
    loaded = {"build", "site", "login", "sessions", "events", "api", "page"}
    users = {
        module
        for module in HOUSE
        if rule_of(dotted(module)) != DASHBOARD
        and {f"{DASHBOARD}.{name}" for name in loaded} & imports_of(module)
    }
    assert users == set()


def test_the_gateway_only_composes():
    """A part that grows here belongs in a room of its own."""
    assert len(source("gotunnel_server/gateway.py").splitlines()) <= 300


def test_the_wire_can_be_read_in_one_sitting():
    assert len(source("gotunnel.py").splitlines()) <= 2500


def test_each_wing_has_modules():
    """A rule whose wing was renamed would hold for nothing."""
    assert {rule_of(dotted(module)) for module in HOUSE} == set(RULES)


def test_arrows_point_one_way():
    """A cycle would raise CycleError. A package's own file counts for nothing: it imports
    when it is asked for a name."""
    graph = {dotted(module): imports_of(module) for module in HOUSE if "__init__" not in module}
    graph = {name: {used for used in names if used in graph} for name, names in graph.items()}
    assert set(graphlib.TopologicalSorter(graph).static_order()) == set(graph)


@pytest.mark.parametrize("wing", ["cluster", "processes"])
def test_the_map_of_a_wing_has_each_of_its_modules(wing):
    folder = ROOT / "gotunnel_server" / wing
    text = ast.get_docstring(ast.parse((folder / "__init__.py").read_text(encoding="utf-8")))
    listed = re.findall(r"^ *(\w+\.py)  ", text, re.MULTILINE)
    assert sorted(listed) == sorted({path.name for path in folder.glob("*.py")} - {"__init__.py"})


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


@pytest.mark.parametrize(
    "module", [module for module in HOUSE if module.count("/") == 1 or module.endswith("__.py")]
)
def test_no_module_takes_the_name_of_a_stdlib_one(module):
    """``python gotunnel_server`` puts the folder on the path: what lies in it, wings too, would be
    imported instead."""
    path = Path(module)
    name = path.parent.name if path.stem == "__init__" else path.stem
    assert name == "__main__" or name not in sys.stdlib_module_names


@pytest.mark.parametrize("module", PURE)
def test_pure_modules_wait_for_nothing(module):
    found, unread = set(), {dotted(module)}
    while unread:
        name = unread.pop()
        used = imports_of(MODULES[name]) - found
        found |= used
        unread |= used & set(MODULES) - VALUES_AND_MORE
    assert not found & IMPURE


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


def test_one_module_of_each_program_reads_the_environment():
    readers = {
        module
        for module in HOUSE
        for node in ast.walk(tree(module))
        if isinstance(node, ast.Attribute)
        and node.attr in ("environ", "environb", "getenv")
        or isinstance(node, ast.alias)
        and node.name in ("environ", "environb", "getenv")
    }
    assert readers == {"gotunnel_server/config.py", "gotunnel_agent/home.py"}


def test_no_two_test_files_have_one_name():
    """pytest imports them by their bare names."""
    names = [path.name for path in (ROOT / "tests").rglob("test_*.py")]
    assert sorted(names) == sorted(set(names))


def test_a_logger_has_the_name_of_its_module():
    """The program's own, "gotunnel", is that of the few modules that stand for it."""
    named = re.compile(r'^log = logging\.getLogger\("gotunnel\.([a-z_]+)"\)', re.MULTILINE)
    loggers = {(module, name) for module in HOUSE for name in named.findall(source(module))}
    assert len(loggers) > 20
    assert {(module, name) for module, name in loggers if Path(module).stem != name} == set()


@pytest.mark.parametrize("folder", [".", "gotunnel_server", "gotunnel_agent", "tests", "tools"])
def test_no_line_is_wider_than_it_may_be(folder):
    files = (ROOT / folder).glob("*.py") if folder == "." else (ROOT / folder).rglob("*.py")
    wide = [
        f"{path.name}:{number}"
        for path in sorted(files)
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1)
        if len(line) > WIDTH
    ]
    assert wide == []


# Modules whose public signatures have no types yet.
UNTYPED = set()


def untyped(module):
    """The public functions and methods of a module that leave a parameter or their result without
    a type, as ``Class.name``. A parameter named ``_`` or beginning so is nobody's business."""

    def look(body, prefix):
        for node in body:
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                yield from look(node.body, f"{node.name}.")
            elif isinstance(node, ast.FunctionDef) and (
                not node.name.startswith("_") or node.name == "__init__"
            ):
                given = node.args
                names = [*given.posonlyargs, *given.args, *given.kwonlyargs]
                static = any(
                    isinstance(mark, ast.Name) and mark.id == "staticmethod"
                    for mark in node.decorator_list
                )
                names = names[1:] if prefix and not static else names
                names += filter(None, [given.vararg, given.kwarg])
                bare = [name for name in names if not (name.annotation or name.arg[0] == "_")]
                if bare or (node.returns is None and node.name != "__init__"):
                    yield prefix + node.name

    return list(look(tree(module).body, ""))


@pytest.mark.parametrize("module", HOUSE)
def test_public_signatures_have_types(module):
    assert bool(untyped(module)) == (module in UNTYPED), untyped(module)


def test_pure_modules_are_type_checked_strictly():
    """pyproject.toml lists them, as mypy cannot be asked for "pure"."""
    settings = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    listed = re.search(r"^module = \[(.*?)^\]", settings, re.MULTILINE | re.DOTALL)[1]
    patterns = re.findall(r'"(.+)"', listed)
    assert [
        module
        for module in PURE
        if not any(fnmatch.fnmatchcase(dotted(module), pattern) for pattern in patterns)
    ] == []
