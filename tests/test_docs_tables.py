"""The tables of settings in docs/ have each setting of the code, with its default, and no other.

A table is marked by a comment before it, `<!-- settings: TITLE -->`. Its first column names
settings, its second one their default: `a value`, "none", "required", or words about several.

The table of what the agent says (`<!-- words: the agent -->`) quotes texts of the code.
"""

import ast
import dataclasses
import os
import re
from pathlib import Path

import pytest
import yaml
from support import ROOT

from gotunnel_agent import config as agent_config
from gotunnel_server import config as server_config
from gotunnel_server.agents import agents_file
from gotunnel_server.certs.rate_limits import Bounds

TABLE = re.compile(r"<!-- settings: (.+) -->\n(?:\|.*\n){2}((?:\|.*\n)+)")


def table(page, title) -> dict:
    """Setting to the text of its default; of settings in one row each."""
    text = (ROOT / "docs" / page).read_text(encoding="utf-8")
    (rows,) = (rows for found, rows in TABLE.findall(text) if found == title)
    defaults = {}
    for row in rows.splitlines():
        names, default, meaning = (cell.strip() for cell in re.split(r" \| ", row.strip("| ")))
        assert meaning
        for name in re.findall(r"`([A-Za-z0-9_]+)`", names):
            assert name not in defaults
            defaults[name] = default
    return defaults


def literals(defaults) -> dict:
    """The settings whose default is a value."""
    found = {name: re.fullmatch(r"`([^`]*)`", default) for name, default in defaults.items()}
    return {name: match[1] for name, match in found.items() if match}


# What the agent says ------------------------------------------------------------------------------

WORDS = re.compile(r"<!-- words: the agent -->\n(?:\|.*\n){2}((?:\|.*\n)+)")


def test_the_agent_says_what_its_page_explains():
    """Each piece of the first column, between its dots, stands in a text of the code."""
    (rows,) = WORDS.findall((ROOT / "docs" / "agent.md").read_text(encoding="utf-8"))
    sources = [*(ROOT / "gotunnel_agent").rglob("*.py"), *(ROOT / "gotunnel_server").rglob("*.py")]
    texts = [
        node.value
        for path in sources
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
    ]
    for row in rows.splitlines():
        said, meaning = (cell.strip() for cell in row.strip("| ").split(" | "))
        assert meaning and re.fullmatch("`[^`]+`", said)
        for piece in said.strip("`").split("..."):
            assert any(piece.strip() in text for text in texts), piece


# The gateway --------------------------------------------------------------------------------------

GATEWAY = "the gateway"
LEAST = {"GATEWAY_HOST": "gateway.test", "TUNNEL_HOST": "tunnel.test", "JWT_SECRET": "x" * 32}
# Their defaults depend on something else: what the table says of each, and where it is tested.
IN_WORDS = {
    "DASHBOARD_BIND": "as `BIND`",
    "PUBLIC_PORT": "as `GATEWAY_PORT`",
    "ACME_ENV": "`production`, or none with `CERT_DIR`",
    "ACME_DIRECTORY": "that of `ACME_ENV`",
    "HTTP_PORT": "`80` with ACME, else off",
    "HTTP2": "`on`, if the extra `http2` is installed",
    "STATUS_SOCKET": "`status.sock` in `ACME_CACHE`",
    "WORKERS": "256 for each CPU core, but at least 512 and at most 2048",
}


def load_gateway(**changes):
    return server_config.load(os.devnull, LEAST | changes)


@pytest.fixture
def asked_for(monkeypatch):
    """The names of all variables that a Config was made of."""
    names = set()

    class Recorder(server_config.Variables):
        def text(self, name):
            names.add(name)
            return super().text(name)

        def secret(self, name):
            names.add(name)
            return super().secret(name)

        def is_set(self, *some):
            names.update(some)
            return super().is_set(*some)

    monkeypatch.setattr(server_config, "Variables", Recorder)
    return names


def test_the_table_of_the_gateway_names_every_variable_and_no_other(asked_for):
    load_gateway()
    assert set(table("gateway.md", GATEWAY)) == asked_for


def test_the_gateways_defaults_are_those_of_the_table():
    defaults = literals(table("gateway.md", GATEWAY))
    assert len(defaults) > 12
    plain = load_gateway()
    assert load_gateway(**defaults) == plain
    # And each is a value: a text that the code takes as unset would pass the comparison above.
    values = {name: getattr(plain, name.lower(), None) for name in defaults}
    values["ACME_ORDERS_PER_DOMAIN"] = plain.acme.orders_per_domain
    values["ACME_CACHE"] = f"./{os.path.relpath(plain.acme_cache)}"
    values["METRICS_BIND"] = ",".join(plain.metrics_bind)
    shown = {name: f"{v:g}" if isinstance(v, float) else str(v) for name, v in values.items()}
    assert shown == defaults


def test_the_gateways_other_defaults_are_those_of_the_table():
    defaults = table("gateway.md", GATEWAY)
    values = literals(defaults)
    required = {name for name, default in defaults.items() if default == "required"}
    assert required == {"GATEWAY_HOST", "TUNNEL_HOST"}
    assert {name: defaults[name] for name in IN_WORDS} == IN_WORDS
    plain = dataclasses.asdict(load_gateway())
    plain |= {f"acme_{name}": value for name, value in plain["acme"].items()}
    plain["acme_eab_hmac_key"] = plain["acme_eab_hmac"]
    for name in defaults.keys() - values.keys() - required - IN_WORDS.keys():
        assert defaults[name] == "none"
        if name.startswith("DEFAULT_"):
            assert plain["policy_defaults"] is None
        elif name.startswith("CLUSTER_"):
            assert plain["cluster"] is None
        elif not name.endswith("_FILE") and name != "JWT_SECRET":
            assert not plain[name.lower()], name


def test_the_gateways_defaults_in_words_are_true(tmp_path):
    assert load_gateway(BIND="192.0.2.1").dashboard_bind == ("192.0.2.1",)
    plain, own = load_gateway(), load_gateway(CERT_DIR=str(tmp_path))
    assert plain.acme.directory == server_config.DIRECTORIES["production"]
    assert not plain.local_ca and plain.http_port == 80
    assert own.acme is None and not own.local_ca and own.http_port is None
    assert load_gateway(ACME_CACHE="/kept").status_socket == Path("/kept/status.sock")
    workers = server_config.default_workers
    assert [workers(cores) for cores in (1, 2, 4, 64)] == [512, 512, 1024, 2048]


# AGENTS_FILE --------------------------------------------------------------------------------------


def test_the_tables_of_the_file_of_agents_name_every_key_and_no_other():
    entry = table("gateway.md", "an entry of AGENTS_FILE")
    assert set(entry) == set(agents_file.KEYS)
    limits = table("gateway.md", "limits in AGENTS_FILE")
    assert set(limits) == set(agents_file.LIMIT_KEYS)
    bounds = Bounds()
    expected = {"orders_per_hour": str(bounds.hour.most), "orders_per_week": str(bounds.week.most)}
    assert literals(limits) == expected


# The agent ----------------------------------------------------------------------------------------

MINIMAL = """\
tunnel_addr: "tunnel.test:9443"
jwt_secret: "a secret"
tunnels:
  - hostname: "app.test"
    target: "https://127.0.0.1:8000"
"""


def load_agent(folder, text):
    (folder / "agent.yaml").write_text(text)
    return agent_config.load(folder / "agent.yaml")


def test_the_tables_of_the_agent_name_every_key_and_no_other():
    assert set(table("agent.md", "the agent")) == set(agent_config.KEYS)
    assert set(table("agent.md", "a tunnel")) == set(agent_config.TUNNEL_KEYS)
    assert set(table("agent.md", "the inspector")) == set(agent_config.INSPECT_KEYS)
    assert set(table("agent.md", "health")) == set(agent_config.HEALTH_KEYS)


def test_the_inspectors_defaults_are_those_of_the_table():
    values = literals(table("agent.md", "the inspector"))
    assert set(values) == set(agent_config.INSPECT_KEYS)
    assert agent_config.inspect_of(values) == agent_config.Inspect()


def test_the_defaults_of_health_are_those_of_the_table(tmp_path):
    values = literals(table("agent.md", "health"))
    assert set(values) == set(agent_config.HEALTH_KEYS) - {"path"}
    shown = ", ".join(f"{key}: {value}" for key, value in values.items())
    plain, same = (
        load_agent(tmp_path, MINIMAL + f"    health: {{{text}}}\n").tunnels[0].health
        for text in ("path: /", f"path: /, {shown}")
    )
    assert plain == same == agent_config.Health("/")


def test_the_agents_defaults_are_those_of_the_tables(tmp_path):
    plain = load_agent(tmp_path, MINIMAL)
    top, tunnel = table("agent.md", "the agent"), table("agent.md", "a tunnel")
    values, of_tunnel = literals(top), literals(tunnel)
    assert set(values) == {
        "skip_tls_verify", "jwt_issuer", "jwt_expire_sec", "stall_timeout", "drain_timeout",
        "log_level", "log_format",
    }  # fmt: skip
    assert set(of_tunnel) == {"target_skip_tls_verify", "mode"}
    text = "".join(f"{key}: {value}\n" for key, value in values.items()) + MINIMAL
    text += "".join(f"    {key}: {value}\n" for key, value in of_tunnel.items())
    assert load_agent(tmp_path, text) == plain

    # Each of these values is what the code has, so none is a text that the code takes as unset.
    for key, value in values.items():
        assert yaml.safe_load(value) == getattr(plain, key), key
    (only,) = plain.tunnels
    assert of_tunnel["mode"] == only.mode and not only.target.skip_tls_verify

    required = {key for key, default in (top | tunnel).items() if default == "required"}
    assert required == {"tunnel_addr", "tunnels", "hostname", "target"}
    others = (top | tunnel).keys() - required - values.keys() - of_tunnel.keys()
    assert {(top | tunnel)[key] for key in others} == {"none"}
    assert not (plain.ca_file or plain.token or only.target.ca_file)
    assert only.idle_timeout is None and not only.needs
