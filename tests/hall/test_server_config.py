"""The gateway's configuration: where values come from, and the one line for each that is bad."""

import base64
import dataclasses
import ipaddress
import os
import re
import shutil
from pathlib import Path

import pytest

from gotunnel_agent.common import small_file
from gotunnel_agent.common.passwords import Hash
from gotunnel_server import config as config_module
from gotunnel_server import secret_files
from gotunnel_server.agents import agents_file
from gotunnel_server.agents.agents_file import AgentsFileError
from gotunnel_server.certs.local_ca import Authority
from gotunnel_server.config import (
    NAMES,
    Acme,
    Config,
    default_workers,
    faults,
    load,
    status_places,
)
from gotunnel_server.variables import ConfigError, Variables
from gotunnel_server.visitors import policy
from gotunnel_server.visitors.policy import Defaults
from gotunnel_server.visitors.verdict import Allow

EXAMPLE = Path(__file__).parent.parent.parent / "conf" / "server.env"

SECRET = "correct-horse-battery-staple"
KEY = f"{'A' * 43}="  # for Fernet
MINIMAL = {
    "GATEWAY_HOST": "gateway.example.com",
    "TUNNEL_HOST": "tunnel.example.com",
    "JWT_SECRET": SECRET,
    "ACME_ENV": "local",
}


@pytest.fixture(autouse=True)
def empty_working_folder(tmp_path, monkeypatch):
    """No test sees an env file that it did not write."""
    folder = tmp_path / "work"
    folder.mkdir()
    monkeypatch.chdir(folder)


def config(**changes):
    """The minimal configuration with changes; None unsets a variable."""
    environ = {**MINIMAL, **changes}
    return load(environ={name: text for name, text in environ.items() if text is not None})


def refusal(env_file=None, **changes):
    """The one line that refuses the minimal configuration with changes."""
    environ = {name: text for name, text in {**MINIMAL, **changes}.items() if text is not None}
    with pytest.raises(ConfigError) as caught:
        load(env_file, environ)
    message = str(caught.value)
    assert "\n" not in message
    assert SECRET not in message
    assert faults(env_file, environ) == [message]
    if caught.value.variables and "WORKERS" not in changes:  # it hides no other fault
        workers = "WORKERS is 'none', expected a whole number from 1 to 1000000"
        assert set(faults(env_file, {**environ, "WORKERS": "none"})) == {message, workers}
    return message


def networks(*texts):
    return tuple(map(ipaddress.ip_network, texts))


# --- Defaults and sources -----------------------------------------------------------------------


def test_defaults():
    assert config() == Config(
        gateway_host="gateway.example.com",
        gateway_port=443,
        public_port=0,
        tunnel_host="tunnel.example.com",
        tunnel_port=9443,
        dashboard_port=8080,
        dashboard_bind=(),
        dashboard_password=None,
        dashboard_token=None,
        metrics_port=None,
        metrics_bind=("127.0.0.1",),
        bind=(),
        jwt_secret=SECRET,
        jwt_secret_old=None,
        jwt_issuer=None,
        agents_file=None,
        acme_cache=Path.cwd() / "cert-cache",
        local_ca=True,
        cert_dir=None,
        acme=None,
        http_port=None,
        http2=True,
        raw_tcp_host=None,
        h2c_hosts=(),
        tcp_ports=(),
        trusted_proxies=(),
        policy_defaults=None,
        max_connections=10_000,
        workers=default_workers(os.cpu_count() or 1),
        max_hosts_per_agent=50,
        header_timeout=10,
        idle_timeout=120,
        response_timeout=300,
        stall_timeout=300,
        drain_timeout=15,
        agent_timeout=5,
        log_level="info",
        status_socket=Path.cwd() / "cert-cache/status.sock",
        log_format="text",
        access_log="off",
        warnings=(),
        secret_files=(),
    )


def test_config_is_frozen_and_its_repr_holds_no_secret():
    with pytest.raises(dataclasses.FrozenInstanceError):
        config().gateway_port = 1
    assert SECRET not in repr(config())


def test_environment_wins_over_env_file(tmp_path):
    env_file = tmp_path / "gateway.env"
    env_file.write_text("GATEWAY_PORT=1001\nTUNNEL_PORT=1002\n")
    loaded = load(str(env_file), {**MINIMAL, "TUNNEL_PORT": "2002"})
    assert (loaded.gateway_port, loaded.tunnel_port) == (1001, 2002)


def test_empty_variable_counts_as_unset_and_does_not_hide_the_env_file(tmp_path):
    env_file = tmp_path / "gateway.env"
    env_file.write_text("GATEWAY_PORT=1001\nLOG_LEVEL=\n")
    loaded = load(str(env_file), {**MINIMAL, "GATEWAY_PORT": "", "TUNNEL_PORT": "  "})
    assert (loaded.gateway_port, loaded.tunnel_port, loaded.log_level) == (1001, 9443, "info")


def test_dot_env_in_the_working_folder_is_read():
    Path(".env").write_text("GATEWAY_PORT=1001\n")
    assert config().gateway_port == 1001


def test_named_env_file_replaces_dot_env(tmp_path):
    Path(".env").write_text("GATEWAY_PORT=1001\n")
    env_file = tmp_path / "gateway.env"
    env_file.write_text("TUNNEL_PORT=1002\n")
    loaded = load(str(env_file), MINIMAL)
    assert (loaded.gateway_port, loaded.tunnel_port) == (443, 1002)


def test_folder_named_dot_env_is_left_alone():
    Path(".env").mkdir()
    assert config().gateway_port == 443


def test_env_file_syntax():
    Path(".env").write_bytes(
        b"\xef\xbb\xbf# a comment\r\n"
        b"export GATEWAY_PORT=1001 # why\r\n"
        b"JWT_ISSUER='a # b'\r\n"
        b"LOG_LEVEL\r\n"
        b"UNKNOWN=left alone\r\n"
    )
    loaded = config()
    assert (loaded.gateway_port, loaded.jwt_issuer, loaded.log_level) == (1001, "a # b", "info")


def test_dollar_in_the_env_file_is_not_expanded():
    Path(".env").write_text("JWT_SECRET=${GATEWAY_HOST}-and-$more\n")
    assert config(JWT_SECRET=None).jwt_secret == "${GATEWAY_HOST}-and-$more"


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"GATEWAY_PORT=1\n\n\nGATEWAY_HOST gateway.example.com\n", "line 4: this is not NAME=val"),
        (
            b"GATEWAY_PORT=1\nGATEWAY_HOST: gateway.example.com\n",
            "line 2: this is not NAME=value, "
            "expected one variable a line: write = in place of the colon",
        ),
        (b'JWT_ISSUER="open\nGATEWAY_PORT=1\n', "line 1: this is not NAME=value"),
        (b"JWT_SECRET=\xff\n", "is not UTF-8"),
        (b"#" * (1024 * 1024 + 1), "is too long, expected at most 1048576 bytes"),
    ],
)
def test_bad_env_file_is_refused(content, expected):
    Path(".env").write_bytes(content)
    message = refusal()
    assert message.startswith("env file") and f"'{Path.cwd()}/.env'" in message
    assert expected in message


def test_missing_named_env_file_is_refused(tmp_path):
    assert "No such file" in refusal(env_file=str(tmp_path / "none.env"))


def test_folder_as_named_env_file_is_refused(tmp_path):
    assert "env file: cannot read" in refusal(env_file=str(tmp_path))


@pytest.mark.parametrize("name", sorted(name for name in NAMES if name.endswith("_FILE")))
def test_a_file_that_is_a_pipe_without_a_writer_holds_up_no_start(tmp_path, name, monkeypatch):
    monkeypatch.setattr(small_file, "PIPE_TIMEOUT", 0.01)
    path = tmp_path / "fifo"
    os.mkfifo(path)
    if name == "AGENTS_FILE":  # looked at by its reader, which waits for nothing
        with pytest.raises(AgentsFileError):
            agents_file.read(path)
        return
    settings = {name: str(path), name.removesuffix("_FILE"): None}
    if name.startswith("ACME_"):
        settings["ACME_ENV"] = "staging"
    if name == "ACME_EAB_HMAC_KEY_FILE":
        settings["ACME_EAB_KID"] = "kid"
    if name.startswith("CLUSTER_"):
        settings = {"CLUSTER": "redis://redis.invalid", "CLUSTER_KEY": KEY} | settings
    message = refusal(**settings)
    is_ca = name in ("ACME_CA_FILE", "CLUSTER_CA_FILE")
    expected = "a file that can be read" if is_ca else "did not end within 0.01 s"
    assert name in message and expected in message


def test_an_env_file_that_is_a_pipe_is_read_to_its_end_and_not_waited_for(tmp_path, monkeypatch):
    monkeypatch.setattr(small_file, "PIPE_TIMEOUT", 0.01)
    path = tmp_path / "fifo"
    os.mkfifo(path)
    assert "did not end within 0.01 s" in refusal(env_file=str(path))
    read, write = os.pipe()
    with open(read, "rb"):
        with open(write, "wb") as pipe:
            pipe.write(b"GATEWAY_PORT=1001\n")
        assert load(f"/dev/fd/{read}", MINIMAL).gateway_port == 1001


def test_unclosed_quote_does_not_show_the_secret_it_drew_in():
    Path(".env").write_text(f"LOG_LEVEL='info\nJWT_SECRET={SECRET}\nJWT_ISSUER='\n")
    assert refusal().startswith("LOG_LEVEL holds a line break")


# --- Secrets ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["JWT_SECRET", "DASHBOARD_PASSWORD"])
def test_secret_where_its_file_was_to_be_named_is_not_shown(name):
    message = refusal(**{name: None, f"{name}_FILE": SECRET})  # which looks for SECRET
    assert message.startswith(f"{name}_FILE: cannot read (not shown: is this the secret itself?)")


@pytest.mark.parametrize("ending", ["", "\n", "\r\n"])
def test_secret_from_a_file_loses_only_its_line_ending(tmp_path, ending):
    path = tmp_path / "secret"
    path.write_bytes(f" {SECRET} {ending}".encode())
    assert config(JWT_SECRET=None, JWT_SECRET_FILE=str(path)).jwt_secret == f" {SECRET} "


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (None, "JWT_SECRET_FILE: cannot read"),
        (b"", "is empty"),
        (b" \n\n", "is empty"),
        (b"\xff\xfes\0", "is not UTF-8"),
        (b"s" * (1024 * 1024 + 1), "is too long"),
    ],
)
def test_bad_secret_file_is_refused(tmp_path, content, expected):
    path = tmp_path / "secret"
    if content is not None:
        path.write_bytes(content)
    message = refusal(JWT_SECRET=None, JWT_SECRET_FILE=str(path))
    assert expected in message and str(path) in message


def test_secret_both_ways_is_refused():
    assert "JWT_SECRET and JWT_SECRET_FILE are both set" in refusal(JWT_SECRET_FILE="anything")


@pytest.mark.parametrize("secret", [None, "", "  "])
def test_without_a_secret_the_gateway_does_not_start(secret):
    assert refusal(JWT_SECRET=secret).startswith("JWT_SECRET is not set")


def test_without_a_secret_the_gateway_starts_if_agents_have_their_own():
    loaded = config(JWT_SECRET=None, AGENTS_FILE="agents.yaml")
    assert (loaded.jwt_secret, loaded.agents_file) == (None, Path.cwd() / "agents.yaml")
    assert loaded.warnings == ()


def test_folder_in_place_of_a_file_of_agents_is_refused(tmp_path):
    assert "which is a folder" in refusal(AGENTS_FILE=str(tmp_path))


def test_secret_that_is_not_utf8_is_refused():
    assert refusal(JWT_SECRET="long enough, but \udcff") == (
        "JWT_SECRET is not UTF-8, expected UTF-8 text: set another secret"
    )


@pytest.mark.parametrize(
    ("secret", "weakness"),
    [
        ("supersecretjwtkey", "JWT_SECRET is well known"),
        ("ChangeMe", "JWT_SECRET is well known"),
        ("changeme", "JWT_SECRET is well known"),
        ("fifteen-bytes-x", "JWT_SECRET is shorter than 16 bytes"),
    ],
)
def test_weak_secret_is_a_warning_without_the_secret(secret, weakness):
    (warning,) = config(JWT_SECRET=secret).warnings
    assert warning.startswith(weakness) and secret not in warning and "\n" not in warning


@pytest.mark.parametrize("secret", ["sixteen-bytes-xx", "äöüäöüäö"])
def test_secret_of_16_bytes_is_no_warning(secret):
    assert config(JWT_SECRET=secret).warnings == ()


def test_ports_of_its_own_among_those_of_agents_are_a_warning():
    found = config(TCP_PORTS="8000-8100,5432", GATEWAY_PORT="5432", TUNNEL_PORT="auto").warnings
    assert found == (
        "TCP_PORTS holds 5432, which is GATEWAY_PORT: no agent gets it; leave it out",
        "TCP_PORTS holds 8080, which is DASHBOARD_PORT: no agent gets it; leave it out",
    )
    assert config(TCP_PORTS="2200-2299").warnings == ()


NO_SETTING = "is no setting of the gateway, did you mean"


@pytest.mark.parametrize(
    ("line", "name", "meant"),
    [
        ("GATEWAY_HSOT=x", "GATEWAY_HSOT", "GATEWAY_HOST"),
        ("gateway_host=x", "gateway_host", "GATEWAY_HOST"),
        ("AGENTS_FIEL=agents.yaml", "AGENTS_FIEL", "AGENTS_FILE"),
        ("WORKRES=4", "WORKRES", "WORKERS"),
        ("export CERTDIR=x", "CERTDIR", "CERT_DIR"),
        ("DEFAULT_ALOW=10.0.0.0/8", "DEFAULT_ALOW", "DEFAULT_ALLOW"),
        ("DASHBOARD_PASWORD=x", "DASHBOARD_PASWORD", "DASHBOARD_PASSWORD"),
        ("HTTPS_PORT=443", "HTTPS_PORT", "HTTP_PORT"),
    ],
)
def test_misspelt_variable_of_the_env_file_is_refused(line, name, meant):
    Path(".env").write_text(f"{line}\n")
    message = refusal(**{meant: None})
    assert message.startswith(f"{name} in {os.getcwd()}/.env {NO_SETTING} {meant}? Correct it")
    # Beside the one that was meant, it is most likely another program's.
    value = MINIMAL.get(meant, line.partition("=")[2]).replace("x", os.curdir)
    (warning,) = config(**{meant: "80" if "PORT" in meant else value}).warnings
    assert f"{name} in {os.getcwd()}/.env is ignored" in warning and warning.endswith(f"{meant}?")


ALL = "gotunnel-server --print-example explains all settings"


@pytest.mark.parametrize(
    ("line", "name", "hint"),
    [
        ("ACME_X=1", "ACME_X", ALL),
        ("DEFAULT_LOCALE=C", "DEFAULT_LOCALE", ALL),
        ("'JWT_\x1bx'=1", r"JWT_\x1bx", ALL),
        (f"JWT_{'Y' * 9999}=1", f"JWT_{'Y' * 56}", ALL),
        ("READ_TIMEOUT=1", "READ_TIMEOUT", "did you mean HEADER_TIMEOUT?"),
        ("FTP_PORT=21", "FTP_PORT", "did you mean TCP_PORTS?"),
        ("DB_MAX_CONNECTIONS=9", "DB_MAX_CONNECTIONS", "did you mean MAX_CONNECTIONS?"),
    ],
)
def test_variable_that_may_well_be_another_program_s_is_a_warning(line, name, hint):
    Path(".env").write_text(f"{line}\n")
    (found,) = config().warnings
    assert found == (
        f"{name} in {os.getcwd()}/.env is ignored, the gateway has no such setting; {hint}"
    )


def test_name_like_that_of_a_secret_is_no_fault_where_none_is_needed():
    Path(".env").write_text("JWT_SECRET_KEY=x\nAGENTS_FILE=agents.yaml\n")
    assert "did you mean JWT_SECRET?" in config(JWT_SECRET=None).warnings[0]
    Path(".env").write_text("JWT_SECRET_KEY=x\n")
    assert "did you mean JWT_SECRET?" in refusal(JWT_SECRET=None)


@pytest.mark.parametrize(
    "line",
    ["SMTP_PORT=1", "HTTP_PROXY=x", "POSTGRES_PASSWORD=x", "TZ=UTC", "GATEWAY_HSOT=", "#X=1"],
)
def test_variable_of_another_program_in_the_env_file_is_no_warning(line):
    Path(".env").write_text(f"{line}\n")
    assert config().warnings == ()


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("DEFAULT_ALOW", "DEFAULT_ALLOW"),
        ("DEFAULT_BASICAUTH", "DEFAULT_BASIC_AUTH"),
        ("dashboard_bind", "DASHBOARD_BIND"),
        ("DASHBOARD_PASSWORT", "DASHBOARD_PASSWORD"),
    ],
)
def test_misspelt_guard_in_the_environment_is_refused(name, meant):
    message = refusal(**{name: "x"})
    assert message.startswith(f"{name} in the environment {NO_SETTING} {meant}? Correct it")


def test_other_misspelt_variable_of_the_environment_is_a_warning():
    (warning,) = config(LOGLEVEL="debug", LOGNAME="me", HTTP_PROXY="x", SMTP_PORT="1").warnings
    assert warning == (
        "LOGLEVEL in the environment is ignored, the gateway has no such setting; did you mean "
        "LOG_LEVEL?"
    )
    assert config(LOGLEVEL="debug", LOG_LEVEL="info").warnings == ()


def test_names_are_those_that_are_read_and_those_that_the_example_explains(monkeypatch):
    """Else a variable of the gateway's would be called none, or a misspelt one not be found."""
    explained = re.findall(r"^#?([A-Z0-9_]+)=", EXAMPLE.read_text(encoding="utf-8"), re.MULTILINE)
    assert set(explained) == NAMES
    asked, text = set(), Variables.text

    def note_and_read(self, name):
        asked.add(name)
        return text(self, name)

    monkeypatch.setattr(Variables, "text", note_and_read)
    for changes in (
        {"ACME_ENV": "staging"},
        {"DEFAULT_ALLOW": "::/0", "DEFAULT_DENY": "::1", "DEFAULT_RATE_LIMIT": "1"},
        {"DEFAULT_BASIC_AUTH": "me:password"},
        {"CLUSTER": "redis://redis.invalid", "CLUSTER_KEY": KEY},
    ):
        config(**changes)
    secrets = {name.removesuffix("_FILE") for name in asked if name.endswith("_FILE")}
    assert asked | secrets - {"ACME_CA", "AGENTS", "CLUSTER_CA"} == NAMES


# --- Values -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("variable", "text", "field", "value"),
    [
        ("GATEWAY_HOST", "Gateway.Example.COM.", "gateway_host", "gateway.example.com"),
        ("GATEWAY_HOST", "localhost", "gateway_host", "localhost"),
        ("TUNNEL_HOST", "Tunnel.Example.com", "tunnel_host", "tunnel.example.com"),
        ("TUNNEL_HOST", "192.0.2.1", "tunnel_host", "192.0.2.1"),
        ("TUNNEL_HOST", "2001:DB8:0::1", "tunnel_host", "2001:db8::1"),
        ("GATEWAY_PORT", " 8443 ", "gateway_port", 8443),
        ("GATEWAY_PORT", "65535", "gateway_port", 65535),
        ("GATEWAY_PORT", "auto", "gateway_port", 0),
        ("TUNNEL_PORT", "AUTO", "tunnel_port", 0),
        ("DASHBOARD_PORT", "auto", "dashboard_port", 0),
        ("DASHBOARD_PORT", "0", "dashboard_port", None),
        ("BIND", "127.0.0.1", "bind", ("127.0.0.1",)),
        ("BIND", "127.0.0.1, ::1,127.0.0.1", "bind", ("127.0.0.1", "::1")),
        ("BIND", "::1", "dashboard_bind", ("::1",)),
        ("DASHBOARD_BIND", "127.0.0.1,::1", "dashboard_bind", ("127.0.0.1", "::1")),
        ("DASHBOARD_BIND", "127.0.0.1", "bind", ()),
        ("JWT_ISSUER", "mytunnel", "jwt_issuer", "mytunnel"),
        ("AGENTS_FILE", "/none/agents.yaml", "agents_file", Path("/none/agents.yaml")),
        ("ACME_CACHE", "/var/lib/none", "acme_cache", Path("/var/lib/none")),
        ("ACME_ENV", "LOCAL", "local_ca", True),
        ("HTTP_PORT", "8081", "http_port", 8081),
        ("HTTP_PORT", "auto", "http_port", 0),
        ("HTTP_PORT", "0", "http_port", None),
        ("PUBLIC_PORT", "8443", "public_port", 8443),
        ("RAW_TCP_HOST", "SSH.Example.com.", "raw_tcp_host", "ssh.example.com"),
        ("TCP_PORTS", "5432", "tcp_ports", (range(5432, 5433),)),
        ("TCP_PORTS", "2200-2299, 5432 1-65535", "tcp_ports",
         (range(2200, 2300), range(5432, 5433), range(1, 65536))),
        ("H2C_HOSTS", "Grpc.example.com, *.g.example.com", "h2c_hosts",
         ("grpc.example.com", "*.g.example.com")),
        ("TRUSTED_PROXIES", ",", "trusted_proxies", ()),
        ("TRUSTED_PROXIES", "192.0.2.1", "trusted_proxies", networks("192.0.2.1/32")),
        (
            "TRUSTED_PROXIES", "10.0.0.0/8,2001:DB8::/32, ::1  192.0.2.1", "trusted_proxies",
            networks("10.0.0.0/8", "2001:db8::/32", "::1/128", "192.0.2.1/32"),
        ),
        (
            "TRUSTED_PROXIES", "::ffff:10.0.0.0/104 ::ffff:192.0.2.1", "trusted_proxies",
            networks("10.0.0.0/8", "192.0.2.1/32"),
        ),
        ("MAX_CONNECTIONS", "1", "max_connections", 1),
        ("WORKERS", "1000000", "workers", 1_000_000),
        ("PROCESSES", "3", "processes", 3),
        ("MAX_HOSTS_PER_AGENT", "7", "max_hosts_per_agent", 7),
        ("HEADER_TIMEOUT", "0.25", "header_timeout", 0.25),
        ("IDLE_TIMEOUT", "86400", "idle_timeout", 86_400),
        ("RESPONSE_TIMEOUT", "60", "response_timeout", 60),
        ("STALL_TIMEOUT", "3600", "stall_timeout", 3600),
        ("DRAIN_TIMEOUT", "0", "drain_timeout", 0),
        ("AGENT_TIMEOUT", "0", "agent_timeout", 0),
        ("AGENT_TIMEOUT", "2.5", "agent_timeout", 2.5),
        ("LOG_LEVEL", "Debug", "log_level", "debug"),
        ("ACME_CACHE", "/kept", "status_socket", Path("/kept/status.sock")),
        ("STATUS_SOCKET", "/run/gotunnel/s", "status_socket", Path("/run/gotunnel/s")),
        ("STATUS_SOCKET", "Off", "status_socket", None),
    ],
)  # fmt: skip
def test_value_is_taken(variable, text, field, value):
    assert getattr(config(**{variable: text}), field) == value


@pytest.mark.parametrize(
    ("variable", "text", "expected"),
    [
        ("GATEWAY_HOST", "https://gateway.example.com", "expected a hostname"),
        ("GATEWAY_HOST", "gateway.example.com:443", "expected a hostname"),
        ("GATEWAY_HOST", "192.0.2.1", "expected a hostname"),
        ("GATEWAY_HOST", "-gateway.example.com", "expected a hostname"),
        ("GATEWAY_HOST", "bücher.example", "expected a hostname"),
        ("TUNNEL_HOST", "[2001:db8::1]", "an IP address without brackets"),
        ("TUNNEL_HOST", "256.0.0.1", "expected a hostname"),
        ("GATEWAY_HOST", "my_gateway.example.com", "; no hostname has an underscore (_)"),
        ("RAW_TCP_HOST", "*.com", "; this is one host's name, and no pattern: leave out the *."),
        ("TUNNEL_HOST", "*.example.com", "; this is one host's name"),
        ("GATEWAY_HOST", "gateway.*.com", "; a * is for wildcards"),
        ("H2C_HOSTS", "a_b.example.com", "; no hostname has an underscore (_)"),
        ("TUNNEL_HOST", "tunnel.example.com:9443", "without scheme or port"),
        ("GATEWAY_PORT", "0", "expected a port from 1 to 65535 or auto"),
        ("GATEWAY_PORT", "65536", "expected a port from 1 to 65535 or auto"),
        ("TUNNEL_PORT", "-1", "expected a port from 1 to 65535 or auto"),
        ("TUNNEL_PORT", "https", "expected a port from 1 to 65535 or auto"),
        ("TUNNEL_PORT", "9" * 5000, "expected a port from 1 to 65535 or auto"),
        ("TUNNEL_PORT", "٩٤٤٣", "expected a port from 1 to 65535 or auto"),
        ("DASHBOARD_PORT", "off", "or 0 for off"),
        ("DASHBOARD_BIND", "localhost", "expected IP addresses separated by commas"),
        ("BIND", "localhost", "expected IP addresses separated by commas"),
        ("BIND", "127.0.0.1,", "expected IP addresses separated by commas"),
        ("BIND", "127.0.0.1:80", "expected IP addresses separated by commas"),
        ("RAW_TCP_HOST", "ssh.example.com:22", "expected a hostname"),
        ("H2C_HOSTS", "*.com", "expected at least two labels behind the *"),
        ("TCP_PORTS", "0", "correct '0'"),
        ("TCP_PORTS", "65536", "expected ports from 1 to 65535"),
        ("TCP_PORTS", "2299-2200", "correct '2299-2200'"),
        ("TCP_PORTS", "22,ssh", "correct 'ssh'"),
        ("TCP_PORTS", "-22", "correct '-22'"),
        ("TCP_PORTS", "22-", "correct '22-'"),
        ("TRUSTED_PROXIES", "10.0.0.0/8, localhost", "correct 'localhost'"),
        ("TRUSTED_PROXIES", "10.0.0.1/8", "networks without host bits"),
        ("TRUSTED_PROXIES", "10.0.0.0/33", "expected IP addresses, and networks"),
        ("TRUSTED_PROXIES", "10.0.0.0/8;192.0.2.1", "separated by commas or blanks"),
        ("TRUSTED_PROXIES", "[::1]", "correct '[::1]'"),
        ("MAX_CONNECTIONS", "0", "expected a whole number from 1 to 1000000"),
        ("MAX_CONNECTIONS", "1000001", "expected a whole number from 1 to 1000000"),
        ("WORKERS", "1_0", "expected a whole number from 1 to 1000000"),
        ("PROCESSES", "65", "expected a whole number from 1 to 64, or auto for one on each core"),
        ("PROCESSES", "0", "PROCESSES is '0', expected a whole number from 1 to 64, or auto"),
        ("PROCESSES", "many", "expected a whole number from 1 to 64, or auto"),
        ("MAX_HOSTS_PER_AGENT", "1.5", "expected a whole number from 1 to 1000000"),
        ("HEADER_TIMEOUT", "0", "at most 86400, more than 0"),
        ("HEADER_TIMEOUT", "0.000", "more than 0"),
        ("HEADER_TIMEOUT", "10s", "expected seconds such as 10 or 2.5"),
        ("IDLE_TIMEOUT", "inf", "expected seconds such as 10 or 2.5"),
        ("RESPONSE_TIMEOUT", "nan", "expected seconds such as 10 or 2.5"),
        ("RESPONSE_TIMEOUT", "86401", "at most 86400"),
        ("STALL_TIMEOUT", "0", "STALL_TIMEOUT is '0', expected seconds, a number from 1 to 86400"),
        ("STALL_TIMEOUT", "0.9", "expected seconds, a number from 1 to 86400"),
        ("STALL_TIMEOUT", "86401", "expected seconds, a number from 1 to 86400"),
        ("DRAIN_TIMEOUT", "-1", "expected seconds such as 10"),
        ("LOG_LEVEL", "verbose", "expected one of debug, info, warning, error"),
        ("ACME_ENV", "prod", "expected one of production, staging, local"),
    ],
)
def test_bad_value_is_named_shown_and_explained(variable, text, expected):
    message = refusal(**{variable: text})
    assert message.startswith(f"{variable} is {text!r}") and expected in message


@pytest.mark.parametrize("path", ["x" * 108, "ü" * 54])
def test_too_long_a_status_socket_is_refused(path):
    message = refusal(STATUS_SOCKET=path)
    assert message.startswith("STATUS_SOCKET: the path has 108 bytes, a unix socket's may have 107")
    assert faults(os.devnull, {**MINIMAL, "STATUS_SOCKET": path}) == [message]


def test_a_status_socket_that_is_a_folder_is_refused(tmp_path):
    assert "which is a folder" in refusal(STATUS_SOCKET=os.path.relpath(tmp_path))


def test_places_of_the_status_socket_need_no_other_setting(tmp_path):
    def places(**environ):
        return status_places(os.devnull, environ)

    kept = f"{os.getcwd()}/kept/status.sock"
    assert places(ACME_CACHE="kept")[:2] == [kept, "/run/gotunnel-server/status.sock"]
    assert places(STATUS_SOCKET="s", JWT_SECRET="short") == [f"{os.getcwd()}/s"]
    with pytest.raises(ConfigError, match="STATUS_SOCKET is off, expected a path"):
        places(STATUS_SOCKET="off")


@pytest.mark.parametrize("variable", ["GATEWAY_HOST", "TUNNEL_HOST"])
def test_required_variable_must_be_set(variable):
    assert refusal(**{variable: None}).startswith(f"{variable} is not set, expected a hostname")


@pytest.mark.parametrize(("lines", "reason"), [(None, " (there is no {}/.env)"), ("BIND=::1", "")])
def test_required_variable_that_is_unset_comes_with_the_likely_reason(lines, reason):
    if lines:
        Path(".env").write_text(lines)
    environ = {"JWT_SECRET": "s" * 32, "TUNNEL_HOST": "t.example.com"}
    text = "GATEWAY_HOST is not set, expected a hostname such as gateway.example.com: set it"
    text += reason.format(os.getcwd())
    with pytest.raises(ConfigError) as caught:
        load(None, environ)
    assert str(caught.value) == text
    assert faults(None, environ) == [text]


def test_without_any_setting_it_says_how_to_begin(tmp_path, monkeypatch):
    monkeypatch.setattr(config_module, "SERVICE_ENV_FILE", str(tmp_path / "of-the-service"))
    with pytest.raises(ConfigError) as caught:
        load(None, {"PATH": "/bin", "LOG_LEVEL": "info"})
    (line,) = faults(None, {"WORKERS": "none"})
    assert str(caught.value) == line and "\n" not in line
    assert line.startswith(f"there are no settings: no file {os.getcwd()}/.env, and neither")
    assert "gotunnel-server init" in line and "gotunnel-server --print-example" in line
    (tmp_path / "of-the-service").touch()
    (line,) = faults(None, {})
    assert line.endswith(f" are in {tmp_path}/of-the-service: --env-file {tmp_path}/of-the-service")


def test_all_settings_that_are_missing_are_named_at_once():
    Path(".env").write_text("BIND=127.0.0.1\nTUNEL_HOST=t.example.com\n")
    assert [fault.split()[0] for fault in faults(None, {})] == [
        "TUNEL_HOST", "JWT_SECRET", "GATEWAY_HOST",
    ]  # fmt: skip


# --- Relative paths -----------------------------------------------------------------------------

PATHS = {
    "ACCESS_LOG": "access_log", "ACME_CACHE": "acme_cache", "AGENTS_FILE": "agents_file",
    "CERT_DIR": "cert_dir", "STATUS_SOCKET": "status_socket",
}  # fmt: skip


@pytest.mark.parametrize("name", PATHS)
def test_relative_path_counts_from_its_env_file_or_from_the_working_folder(tmp_path, name):
    for folder in (tmp_path / "etc", Path.cwd()):
        (folder / "x").mkdir(parents=True)
    env_file = tmp_path / "etc" / "server.env"
    env_file.write_text(
        f"{name}=./x/y/..\n" if name in ("CERT_DIR", "ACME_CACHE") else f"{name}=./x/y\n"
    )
    leaf = "x" if name in ("CERT_DIR", "ACME_CACHE") else "x/y"
    for given in (str(env_file), os.path.relpath(env_file)):
        loaded = load(given, MINIMAL)
        assert str(getattr(loaded, PATHS[name])) == f"{tmp_path}/etc/{leaf}"
        assert loaded.warnings == ()
    loaded = load(str(env_file), {**MINIMAL, name: leaf})
    assert str(getattr(loaded, PATHS[name])) == f"{os.getcwd()}/{leaf}"


@pytest.mark.parametrize("text", ["~/cache", "$HOME/cache", "~"])
def test_path_that_only_a_shell_understands_is_refused(text):
    message = refusal(ACME_CACHE=text)
    assert message.startswith(f"ACME_CACHE is {text!r}, expected a path: ~ and $ stand for them")
    assert config(ACME_CACHE="./~").acme_cache == Path.cwd() / "~"
    secret = f"$scrypt${SECRET}"  # where its file was to be named
    assert "not shown" in refusal(JWT_SECRET=None, JWT_SECRET_FILE=secret)


def test_path_with_dots_is_shown_without_them(tmp_path):
    (tmp_path / "etc").mkdir()
    (tmp_path / "etc" / "env").write_text("ACME_CACHE=../var/./cache\n")
    assert str(load(str(tmp_path / "etc" / "env"), MINIMAL).acme_cache) == f"{tmp_path}/var/cache"


def test_file_of_a_secret_that_is_there_is_named_though_its_path_is_long(tmp_path):
    (tmp_path / "secrets-of-the-gateway").mkdir()
    (tmp_path / "env").write_text("JWT_SECRET_FILE=secrets-of-the-gateway\n")
    message = refusal(str(tmp_path / "env"), JWT_SECRET=None)
    assert message.startswith(f"JWT_SECRET_FILE: cannot read '{tmp_path}/secrets-of-the-gateway'")


def test_files_of_secrets_and_the_default_cache_lie_beside_the_env_file(tmp_path):
    (tmp_path / "secret").write_text(SECRET)
    env_file = tmp_path / "server.env"
    env_file.write_text("JWT_SECRET_FILE=secret\n")
    loaded = load(str(env_file), {**MINIMAL, "JWT_SECRET": ""})
    assert loaded.jwt_secret == SECRET and loaded.secret_files == (f"{tmp_path}/secret",)
    assert loaded.acme_cache == tmp_path / "cert-cache"
    assert status_places(str(env_file), {})[0] == f"{tmp_path}/cert-cache/status.sock"
    env_file.write_text("JWT_SECRET_FILE=none\n")
    assert f"cannot read '{tmp_path}/none'" in refusal(str(env_file), JWT_SECRET=None)
    env_file.write_text(f"JWT_SECRET_FILE={SECRET}\n")  # never shown, though it has a folder now
    assert "not shown" in refusal(str(env_file), JWT_SECRET=None)


def test_path_that_is_only_in_the_working_folder_is_used_with_a_warning(tmp_path):
    """As it was before paths counted from the env file: an upgrade loses no certificates."""
    Path("cert-cache").mkdir()
    env_file = tmp_path / "server.env"
    env_file.write_text("LOG_LEVEL=info\n")
    loaded = load(str(env_file), MINIMAL)
    assert loaded.acme_cache == Path.cwd() / "cert-cache"
    (warning,) = loaded.warnings
    assert warning == (
        f"ACME_CACHE: {os.getcwd()}/cert-cache is used, which is there, but relative paths in the "
        f"env file count from that file's folder, and there is no {tmp_path}/cert-cache: write the "
        "absolute path"
    )
    (tmp_path / "cert-cache").mkdir()
    assert load(str(env_file), MINIMAL).acme_cache == tmp_path / "cert-cache"


def test_copy_of_the_env_file_that_systemd_made_has_no_folder_of_its_own(tmp_path):
    (tmp_path / "env").write_text("AGENTS_FILE=agents.yaml\n")
    loaded = load(str(tmp_path / "env"), {**MINIMAL, "CREDENTIALS_DIRECTORY": str(tmp_path)})
    assert loaded.agents_file == Path.cwd() / "agents.yaml"


def test_env_file_that_is_a_pipe_has_no_folder():
    read, write = os.pipe()
    with open(read, "rb"):
        with open(write, "wb") as pipe:
            pipe.write(b"AGENTS_FILE=agents.yaml\n")
        loaded = load(f"/dev/fd/{read}", MINIMAL)
    assert loaded.agents_file == Path.cwd() / "agents.yaml"


# --- Quotes that somebody left in ---------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("GATEWAY_HOST", '"gateway.example.com"'),
        ("ACME_CACHE", "'/var/lib/gotunnel'"),
        ("GATEWAY_PORT", '"443"'),
        ("JWT_ISSUER", '"office"'),
        ("JWT_SECRET_FILE", f'"{SECRET}"'),
    ],
)
def test_quotes_that_docker_keeps_are_named(name, text):
    changes = {"JWT_SECRET": None} if name == "JWT_SECRET_FILE" else {}
    message = refusal(**changes | {name: text})
    assert message == (
        f"{name} begins and ends with a quote, expected the value alone: remove the quotes "
        "(docker run --env-file takes them for a part of the value)"
    )


def test_quotes_around_a_secret_are_a_warning_where_they_may_be_docker_s(tmp_path):
    loaded = config(JWT_SECRET=f'"{SECRET}"')
    assert loaded.jwt_secret == f'"{SECRET}"'
    (warning,) = loaded.warnings
    assert warning.startswith("JWT_SECRET begins and ends with a quote, which counts as a part")
    assert SECRET not in warning
    Path(".env").write_text(f"""JWT_SECRET='"{SECRET}"'\n""")
    assert config(JWT_SECRET=None).warnings == ()  # our own reader takes the outer ones off


def test_port_that_kubernetes_has_set_is_explained():
    message = refusal(GATEWAY_PORT="tcp://10.0.0.1:443")
    assert "Kubernetes has set it, for a Service of that name" in message


@pytest.mark.parametrize(
    ("ports", "expected"),
    [
        ({"TUNNEL_PORT": "443"}, "GATEWAY_PORT and TUNNEL_PORT are both 443"),
        ({"DASHBOARD_PORT": "9443"}, "TUNNEL_PORT and DASHBOARD_PORT are both 9443"),
        ({"GATEWAY_PORT": "8080"}, "GATEWAY_PORT and DASHBOARD_PORT are both 8080"),
    ],
)
def test_equal_ports_are_refused(ports, expected):
    assert expected in refusal(**ports)


def test_ports_that_are_any_free_one_do_not_clash():
    loaded = config(GATEWAY_PORT="auto", TUNNEL_PORT="auto", DASHBOARD_PORT="auto")
    assert (loaded.gateway_port, loaded.tunnel_port, loaded.dashboard_port) == (0, 0, 0)


@pytest.mark.parametrize(
    ("cores", "workers"), [(1, 512), (2, 512), (4, 1024), (8, 2048), (64, 2048)]
)
def test_workers_grow_with_the_cores_within_bounds(cores, workers):
    assert default_workers(cores) == workers


# --- Certificates -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "directory"),
    [
        ({"ACME_ENV": None}, "https://acme-v02.api.letsencrypt.org/directory"),
        ({"ACME_ENV": "staging"}, "https://acme-staging-v02.api.letsencrypt.org/directory"),
        ({"ACME_ENV": None, "ACME_DIRECTORY": "https://ca.test:1/dir"}, "https://ca.test:1/dir"),
        ({"ACME_ENV": "staging", "ACME_DIRECTORY": "https://ca.test/"}, "https://ca.test/"),
    ],
)
def test_certificates_are_ordered_at_a_directory(changes, directory):
    loaded = config(**changes)
    assert (loaded.acme, loaded.local_ca) == (Acme(directory, None, None, None, None), False)
    assert loaded.http_port == 80


def test_directory_of_certificates_may_stand_beside_a_ca(tmp_path):
    assert config(ACME_ENV=None, CERT_DIR=str(tmp_path)).acme is None
    changes = {"CERT_DIR": str(tmp_path), "ACME_DIRECTORY": "https://ca.test/dir"}
    assert config(ACME_ENV=None, **changes).acme.directory == "https://ca.test/dir"
    assert config(ACME_ENV="production", CERT_DIR=str(tmp_path)).acme is not None


def test_account_with_the_ca(tmp_path):
    shutil.copy(Authority(tmp_path / "ca").ca_file, tmp_path / "ca.pem")
    (tmp_path / "hmac").write_text("c2VjcmV0\n")
    acme = config(
        ACME_ENV="production", ACME_EMAIL="me@example.com", ACME_CA_FILE=str(tmp_path / "ca.pem"),
        ACME_EAB_KID="kid-1", ACME_EAB_HMAC_KEY_FILE=str(tmp_path / "hmac"), HTTP_PORT="0",
    ).acme  # fmt: skip
    expected = (str(tmp_path / "ca.pem"), "me@example.com", "kid-1", "c2VjcmV0")
    assert (acme.ca_file, acme.email, acme.eab_kid, acme.eab_hmac) == expected
    assert "c2VjcmV0" not in repr(acme)


def test_password_in_a_url_is_neither_taken_nor_shown():
    message = refusal(ACME_ENV=None, ACME_DIRECTORY=f"https://me:{PASSWORD}@ca.test/dir")
    assert message.startswith("ACME_DIRECTORY holds a user or a password")
    assert PASSWORD not in message
    url = "https://ca.test/dir?for=me@example.com"
    assert config(ACME_ENV=None, ACME_DIRECTORY=url).acme.directory == url


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"ACME_DIRECTORY": "ca.test/dir"}, "ACME_DIRECTORY is 'ca.test/dir', expected a URL"),
        ({"ACME_DIRECTORY": "http://ca.test/dir"}, "ACME_DIRECTORY is 'http://ca.test/dir'"),
        ({"ACME_DIRECTORY": "https://a/", "ACME_ENV": "local"}, "ACME_DIRECTORY and ACME_ENV"),
        ({"ACME_CA_FILE": "/none"}, "ACME_CA_FILE is '/none', expected a file that can be read"),
        ({"ACME_CA_FILE": os.devnull}, "ACME_CA_FILE is '/dev/null', expected a file"),
        ({"ACME_CA_FILE": __file__}, f"ACME_CA_FILE: {__file__!r} holds no certificate"),
        ({"ACME_EMAIL": "me"}, "ACME_EMAIL is 'me', expected an address"),
        ({"ACME_EMAIL": "a@b.test, c@d.test"}, "expected an address"),
        ({"ACME_EAB_KID": "kid"}, "ACME_EAB_KID and ACME_EAB_HMAC_KEY: only one"),
        ({"ACME_EAB_HMAC_KEY": "c2VjcmV0"}, "ACME_EAB_KID and ACME_EAB_HMAC_KEY: only one"),
        ({"ACME_EAB_KID": "kid", "ACME_EAB_HMAC_KEY": "a b!"}, "ACME_EAB_HMAC_KEY is not base64"),
    ],
)
def test_order_that_cannot_be_placed_is_refused(changes, sentence):
    assert sentence in refusal(**{"ACME_ENV": "production", **changes})


@pytest.mark.parametrize(("acme_env", "local_ca"), [(None, False), ("local", True)])
def test_folder_of_certificates_stands_alone_or_beside_the_local_ca(tmp_path, acme_env, local_ca):
    loaded = config(ACME_ENV=acme_env, CERT_DIR=str(tmp_path))
    assert (loaded.cert_dir, loaded.local_ca) == (tmp_path, local_ca)


@pytest.mark.parametrize("variable", ["CERT_DIR", "ACME_CACHE"])
def test_file_in_place_of_a_folder_is_refused(tmp_path, variable):
    path = tmp_path / "file"
    path.write_text("")
    assert refusal(**{variable: str(path)}).startswith(f"{variable} is {str(path)!r}")


def test_missing_folder_of_certificates_is_refused(tmp_path):
    assert "expected a folder that exists" in refusal(CERT_DIR=str(tmp_path / "none"))


# --- What counts for tunnels that do not say it themselves ---------------------------------------


PASSWORD = "a password: of many, words"
BASIC = "Basic " + base64.b64encode(f"me:{PASSWORD}".encode()).decode()


@pytest.mark.parametrize(
    ("changes", "wire"),
    [
        ({"DEFAULT_ALLOW": "10.0.0.0/8 ::ffff:192.0.2.1"}, {"allow": ["10.0.0.0/8", "192.0.2.1"]}),
        ({"DEFAULT_DENY": "2001:db8::/32"}, {"deny": ["2001:db8::/32"]}),
        ({"DEFAULT_RATE_LIMIT": "10"}, {"rate_limit": {"per_address": 10, "burst": 100}}),
        ({"DEFAULT_RATE_LIMIT": "600/m"}, {"rate_limit": {"per_address": 10}}),
        ({"DEFAULT_RATE_LIMIT": " 1/h "}, {"rate_limit": {"per_address": 1 / 3600}}),
        (
            {"DEFAULT_RATE_LIMIT": "2.5/s, burst=7 total=200/s,total_burst=400"},
            {"rate_limit": {"per_address": 2.5, "burst": 7, "total": 200, "total_burst": 400}},
        ),
        (
            {"DEFAULT_ALLOW": "10.0.0.0/8", "DEFAULT_DENY": "10.1.0.0/16"},
            {"allow": ["10.0.0.0/8"], "deny": ["10.1.0.0/16"]},
        ),
    ],
)
def test_default_policy_is_what_an_agent_could_have_sent(changes, wire):
    assert config(**changes).policy_defaults == Defaults.read(wire)


@pytest.mark.parametrize("hashed", [False, True])
@pytest.mark.parametrize("in_file", [False, True])
def test_default_password_is_kept_as_a_hash_only(tmp_path, hashed, in_file):
    entry = f"me:{Hash.of(PASSWORD.encode()) if hashed else PASSWORD}"
    if in_file:
        path = tmp_path / "passwords"
        path.write_text(f"you:something else\r\n\n{entry}\n")
        loaded = config(DEFAULT_BASIC_AUTH_FILE=str(path))
    else:
        loaded = config(DEFAULT_BASIC_AUTH=entry)
    judged = policy.read(None, "http", loaded.policy_defaults)
    assert isinstance(judged.judge_request("192.0.2.1", BASIC), Allow)
    assert judged.judge_request("192.0.2.1", None).page.status == 401
    assert PASSWORD not in repr(loaded) + repr(loaded.policy_defaults.rules)
    assert "scrypt" not in repr(loaded) + repr(loaded.policy_defaults.rules)


@pytest.mark.parametrize(
    ("name", "text", "sentence"),
    [
        ("DEFAULT_ALLOW", ",", "DEFAULT_ALLOW: an empty list came, expected a list of addresses"),
        ("DEFAULT_ALLOW", "10.0.0.1/8", "networks without host bits"),
        ("DEFAULT_DENY", "localhost", "DEFAULT_DENY is 'localhost', expected IP addresses"),
        ("DEFAULT_RATE_LIMIT", "0", "DEFAULT_RATE_LIMIT: per_address: 0.0 came, expected requests"),
        ("DEFAULT_RATE_LIMIT", "-1", "DEFAULT_RATE_LIMIT is '-1', expected requests per second"),
        ("DEFAULT_RATE_LIMIT", "nan", "DEFAULT_RATE_LIMIT is 'nan'"),
        ("DEFAULT_RATE_LIMIT", "1e309", "DEFAULT_RATE_LIMIT is '1e309'"),
        ("DEFAULT_RATE_LIMIT", "10/d", "DEFAULT_RATE_LIMIT is '10/d'"),
        ("DEFAULT_RATE_LIMIT", ",", "DEFAULT_RATE_LIMIT: an empty object came, expected"),
        ("DEFAULT_RATE_LIMIT", "10 20", "DEFAULT_RATE_LIMIT is '10 20'"),
        ("DEFAULT_RATE_LIMIT", "10 per_address=20", "DEFAULT_RATE_LIMIT is '10 per_address=20'"),
        ("DEFAULT_RATE_LIMIT", "rate=20", "DEFAULT_RATE_LIMIT is 'rate=20'"),
        ("DEFAULT_RATE_LIMIT", "total==20", "DEFAULT_RATE_LIMIT is 'total==20'"),
        ("DEFAULT_RATE_LIMIT", "burst=20", "burst came without per_address, expected both"),
        ("DEFAULT_RATE_LIMIT", "10 burst=0", "burst: 0 came, expected a whole number from 1"),
        ("DEFAULT_RATE_LIMIT", "10 burst=1.5", "DEFAULT_RATE_LIMIT is '10 burst=1.5'"),
        ("DEFAULT_BASIC_AUTH", SECRET, "DEFAULT_BASIC_AUTH: line 1: a text without a colon came"),
        ("DEFAULT_BASIC_AUTH", "me:", "expected a password of 1 to 1024 bytes"),
        ("DEFAULT_BASIC_AUTH", f"me:{SECRET}\t", "without control characters"),
        ("DEFAULT_BASIC_AUTH", f":{SECRET}", "expected USER:HASH, with a user name"),
        ("DEFAULT_BASIC_AUTH", f"me:$scrypt${SECRET}", "[0]: no hash of the form $scrypt$"),
        ("DEFAULT_BASIC_AUTH", f"me:{SECRET}\nme:{SECRET}", "[1]: this user came before"),
    ],
)
def test_default_policy_that_cannot_be_followed_is_refused(name, text, sentence):
    message = refusal(**{name: text})
    assert message.startswith(name)
    assert sentence in message


# --- Files with secrets -------------------------------------------------------------------------


def test_it_knows_the_files_that_it_read_secrets_from(tmp_path):
    env_file, secret, users = tmp_path / "env", tmp_path / "secret", tmp_path / "users"
    env_file.write_text(f"TUNNEL_PORT=1\nDEFAULT_BASIC_AUTH_FILE={users}\n")
    users.write_text(f"me:{PASSWORD}\n")
    secret.write_text(SECRET)
    environ = {**MINIMAL, "JWT_SECRET": "", "JWT_SECRET_FILE": str(secret)}
    assert sorted(load(str(env_file), environ).secret_files) == [str(secret), str(users)]
    # In the env file itself, also one that the environment has otherwise.
    env_file.write_text(f"JWT_SECRET={SECRET}\n")
    assert load(str(env_file), MINIMAL).secret_files == (str(env_file),)
    Path(".env").write_text(f"DASHBOARD_PASSWORD={PASSWORD}\n")
    assert config().secret_files == (f"{os.getcwd()}/.env",)


def test_files_of_a_cache_that_hold_keys_are_known(tmp_path):
    keys = ["gw.test", "gw.test+rsa", "acme_account+key", "local/ca.key", "local/gw.test.key",
            "ca/account.json", "ca/certs/gw.test.pem"]  # fmt: skip
    others = ["ca/certs/gw.test.json", "local/ca.crt", "ca/locks/gw.test", "ca/pause.json"]
    for name in (*keys, *others):
        file = tmp_path / "cache" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(SECRET)
        file.chmod(0o644)
    loaded = config(ACME_CACHE=str(tmp_path / "cache"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(secret_files, "MOST_LINES", len(keys))
        lines = secret_files.exposed(loaded)
        assert {line.split(" has ")[0] for line in lines} == {
            str(tmp_path / "cache" / name) for name in keys
        }
        patch.setattr(secret_files, "MOST_LINES", 2)
        *two, last = secret_files.exposed(loaded)
        assert len(two) == 2 and last == f"ACME_CACHE {tmp_path}/cache: 5 more such files"
    assert secret_files.exposed(config(ACME_CACHE=str(tmp_path / "none"))) == []


# --- The dashboard's password -------------------------------------------------------------------


@pytest.mark.parametrize("form", [str, lambda password: str(Hash.of(password.encode()))])
@pytest.mark.parametrize("in_file", [False, True])
def test_dashboard_password_is_hashed_at_once(tmp_path, form, in_file):
    path = tmp_path / "password"
    path.write_text(form(PASSWORD) + "\n")
    setting = {"DASHBOARD_PASSWORD": form(PASSWORD)}
    loaded = config(**({"DASHBOARD_PASSWORD_FILE": str(path)} if in_file else setting))
    hashed = loaded.dashboard_password
    assert hashed.compute(PASSWORD.encode()) == hashed.digest
    assert PASSWORD not in repr(loaded) and "scrypt" not in repr(loaded)


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        (f"{SECRET}\t", "without control characters"),
        (SECRET * 50, "expected a password of 1 to 1024 bytes"),
        (f"$scrypt${SECRET}", "no hash of the form $scrypt$"),
        (f"$2y$05${SECRET}", "a hash of another kind came"),
    ],
)
def test_dashboard_password_that_cannot_be_one_is_refused(text, sentence):
    message = refusal(DASHBOARD_PASSWORD=text)
    assert message.startswith("DASHBOARD_PASSWORD: ") and sentence in message


TOKEN = "a-token.of~programs_+/=="


@pytest.mark.parametrize("form", [str, lambda token: str(Hash.of(token.encode()))])
def test_dashboard_token_is_hashed_at_once(tmp_path, form):
    path = tmp_path / "token"
    path.write_text(form(TOKEN) + "\n")
    for setting in ({"DASHBOARD_TOKEN": form(TOKEN)}, {"DASHBOARD_TOKEN_FILE": str(path)}):
        loaded = config(**setting)
        hashed = loaded.dashboard_token
        assert hashed.compute(TOKEN.encode()) == hashed.digest
        assert TOKEN not in repr(loaded) and "scrypt" not in repr(loaded)
    assert str(path) in loaded.secret_files


@pytest.mark.parametrize("text", ["x" * 15, "sixteen characters", "x" * 16 + "=y", "ü" * 20])
def test_dashboard_token_that_no_program_could_send_or_that_is_short_is_refused(text):
    message = refusal(DASHBOARD_TOKEN=text)
    assert message.startswith(f"DASHBOARD_TOKEN: {len(text)} characters came, expected at least 16")
    assert text not in message


# --- The example --------------------------------------------------------------------------------


def test_example_starts_as_it_stands_and_warns_of_its_secret():
    loaded = load(str(EXAMPLE), {})
    assert loaded.local_ca and loaded.bind == ("127.0.0.1",)
    assert any("JWT_SECRET" in warning for warning in loaded.warnings)


def test_example_shows_the_defaults_in_its_comments(tmp_path):
    """With every commented variable read, the configuration is the same."""
    uncommented = tmp_path / "server.env"
    uncommented.write_text(re.sub(r"(?m)^#(?=[A-Z0-9_]+=)", "", EXAMPLE.read_text()))
    folder = {"ACME_CACHE": str(tmp_path)}  # which is beside the env file otherwise
    assert load(str(uncommented), folder) == load(str(EXAMPLE), folder)


def test_example_explains_every_variable():
    shown = set(re.findall(r"(?m)^#?([A-Z0-9_]+)=", EXAMPLE.read_text()))
    fields = {field.name.upper() for field in dataclasses.fields(config())}
    acme = {"DIRECTORY", "CA_FILE", "EMAIL", "EAB_KID", "EAB_HMAC_KEY", "EAB_HMAC_KEY_FILE", "ENV",
            "ORDERS_PER_DOMAIN"}  # fmt: skip
    policy = {"ALLOW", "DENY", "RATE_LIMIT", "BASIC_AUTH", "BASIC_AUTH_FILE"}
    fields -= {
        "ACME",
        "LOCAL_CA",
        "POLICY_DEFAULTS",
        "WARNINGS",
        "SECRET_FILES",
        "ENV_FILE",
        "TEMPLATES",
        "TYPED",
    }
    cluster = {"ADDRESS", "CA_FILE", "KEY", "KEY_FILE", "NAME", "PASSWORD", "PASSWORD_FILE"}
    fields |= {f"CLUSTER_{name}" for name in cluster}
    fields |= {f"ACME_{name}" for name in acme} | {f"DEFAULT_{name}" for name in policy}
    files = {"JWT_SECRET_FILE", "JWT_SECRET_OLD_FILE", "DASHBOARD_PASSWORD_FILE",
             "DASHBOARD_TOKEN_FILE"}  # fmt: skip
    assert shown == fields | files


# Several processes -------------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["auto", "Auto"])
@pytest.mark.parametrize(("cores", "count"), [(1, 1), (6, 6), (200, 64)])
def test_as_many_processes_as_cores_that_may_be_used(monkeypatch, text, cores, count):
    monkeypatch.setattr(config_module, "cores", lambda: cores)
    found = config(PROCESSES=text, WORKERS="4096")
    assert found.processes == count and found.warnings == ()


def test_each_process_has_its_part_of_what_limits_all():
    found = config(PROCESSES="4", MAX_CONNECTIONS="1000", WORKERS="10")
    assert (found.max_connections, found.workers) == (1000, 10)
    assert (found.share().max_connections, found.share().workers) == (250, 2)
    alone = config(MAX_CONNECTIONS="1000", WORKERS="10")
    assert alone.share() == alone


def test_each_process_has_enough_workers_by_default():
    assert default_workers(2) == 512
    assert default_workers(2, 4) == 4 * 512
    assert default_workers(8, 2) == 2048


def test_a_limit_that_leaves_a_process_nothing_is_refused():
    assert refusal(PROCESSES="4", WORKERS="3") == (
        "WORKERS is 3, expected at least 4: it is divided among the processes (PROCESSES)"
    )


def test_more_processes_than_cores_is_a_warning(monkeypatch):
    monkeypatch.setattr(config_module, "cores", lambda: 2)
    (warning,) = config(PROCESSES="3").warnings
    assert warning.startswith("PROCESSES is 3, and the gateway may use 2 cores: ")
