"""The units: what they say of a program, quoted as systemd reads it, and what systemd thinks of
them."""

import re
import subprocess

import pytest
from support import TIMEOUT, need

from gotunnel_agent.common.systemd_unit import (
    Credential,
    Service,
    is_ours,
    service_unit,
    socket_unit,
    why_not_quotable,
    word,
)

PLAIN = Service(
    name="gotunnel-server", program="gotunnel-server", description="gotunnel gateway",
    command=("/bin/true", "--env-file", "/etc/gotunnel/.env"), folder="/etc",
)  # fmt: skip


def unit(**changes):
    return service_unit(Service(**{**PLAIN.__dict__, **changes}))


def setting(text, name):
    """The values of a setting, in their order."""
    return re.findall(rf"(?m)^{name}=(.*)$", text)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, ["Type=exec", "DynamicUser=yes", "WantedBy=multi-user.target", "ProtectHome=yes"]),
        ({}, ["CapabilityBoundingSet=", "PrivateTmp=yes", "ProtectSystem=strict"]),
        ({}, ["NoNewPrivileges=yes", "SystemCallFilter=@system-service", "UMask=0077"]),
        ({}, ["ExecReload=/bin/kill -HUP $MAINPID", "RestartPreventExitStatus=2"]),
        ({}, ["RestrictAddressFamilies=AF_INET AF_INET6 AF_UNIX", "KillMode=mixed"]),
        ({"notifies": True}, ["Type=notify", "NotifyAccess=all", "WatchdogSec=30"]),
        ({"run_as": "gotunnel"}, ["User=gotunnel"]),
        ({"stop_timeout": 75}, ["TimeoutStopSec=75"]),
        ({"homes": True}, ["ProtectHome=read-only"]),
        ({"shared_tmp": True}, ["PrivateTmp=no"]),
        ({"logs": True}, ["LogsDirectory=gotunnel-server"]),
        (
            {"low_ports": True},
            ["AmbientCapabilities=CAP_NET_BIND_SERVICE",
             "CapabilityBoundingSet=CAP_NET_BIND_SERVICE"],
        ),
        (
            {"state_variable": "ACME_CACHE"},
            ["Environment=ACME_CACHE=%S/gotunnel-server", "StateDirectory=gotunnel-server"],
        ),
        (
            {"status_variable": "STATUS_SOCKET"},
            ["Environment=STATUS_SOCKET=%t/gotunnel-server/status.sock",
             "RuntimeDirectory=gotunnel-server"],
        ),
        (
            {"command": ("/bin/true", "-c", Credential("agent.yaml", "/a b/100%:x.yaml"))},
            ["ExecStart=/bin/true -c ${CREDENTIALS_DIRECTORY}/agent.yaml",
             "LoadCredential=agent.yaml:/a b/100%%:x.yaml"],
        ),
        (
            {"command": ("/opt/a $b/run", "-c", '/e t/c%d/$HOME/"q"\\x;')},
            [r'ExecStart="/opt/a $b/run" -c "/e t/c%%d/$$HOME/\"q\"\\x;"'],
        ),
        ({"folder": "/srv/a b/50%"}, ["WorkingDirectory=/srv/a b/50%%"]),
        ({"writable": ("/srv/a b", "/x%y")}, ['ReadWritePaths="/srv/a b" /x%%y']),
        ({"sockets": ("443",)}, ["Requires=gotunnel-server.socket", "Also=gotunnel-server.socket"]),
        ({"per_user": True}, ["WantedBy=default.target", "NoNewPrivileges=yes"]),
    ],
)  # fmt: skip
def test_a_unit_says_what_the_program_needs(changes, expected):
    lines = unit(**changes).splitlines()
    assert [line for line in expected if line not in lines] == []


def test_a_users_unit_asks_for_nothing_that_needs_rights():
    text = unit(per_user=True, low_ports=True)
    for name in ("User", "DynamicUser", "ProtectSystem", "PrivateTmp", "AmbientCapabilities"):
        assert setting(text, name) == []
    assert "network-online" not in text


def test_a_socket_unit_has_the_ports():
    text = socket_unit(Service(**{**PLAIN.__dict__, "sockets": ("443", "[::1]:9443")}))
    assert setting(text, "ListenStream") == ["443", "[::1]:9443"]
    assert is_ours(text, "gotunnel-server")


def test_only_a_unit_of_this_program_is_ours():
    assert is_ours(unit(), "gotunnel-server")
    assert not is_ours(unit(), "gotunnel-agent")
    assert not is_ours("[Unit]\n" + unit(), "gotunnel-server")
    assert not is_ours("", "gotunnel-server")


@pytest.mark.parametrize("path", ["/a\nExecStart=/bin/sh", "/a\0", "/a\udc80", "/a ", "/a\\", "\t"])
def test_what_no_unit_can_hold_is_found(path):
    assert why_not_quotable(path)


@pytest.mark.parametrize("path", ["/a b", "/ü", "/a%n", '/"', "/a\\b", "/$x"])
def test_what_can_be_quoted_is_not_refused(path):
    assert why_not_quotable(path) is None


def test_an_empty_word_is_still_a_word():
    assert word("") == '""'


# What systemd says -------------------------------------------------------------------------------

KINDS = {
    "dynamic": {"state_variable": "ACME_CACHE", "low_ports": True, "notifies": True},
    "with sockets": {"sockets": ("443", "127.0.0.1:9443", "[::1]:9443"), "notifies": True},
    "as a user": {"run_as": "root", "homes": True, "writable": ("/srv/a b", "/x%y")},
    "of a user": {"per_user": True},
    "with a credential": {"command": ("/bin/true", Credential("env", "/a b/c%"))},
    "with an odd path": {"command": ("/bin/true", '/e t/c%d/$HOME/"q"\\x;'), "folder": "/a b%"},
}


@pytest.fixture
def written(tmp_path):
    """A function that writes the units of a Service; returns their paths."""

    def write(**changes):
        service = Service(**{**PLAIN.__dict__, **changes})
        paths = [tmp_path / "gotunnel-server.service"]
        paths[0].write_text(service_unit(service))
        if service.sockets:
            paths.append(tmp_path / "gotunnel-server.socket")
            paths[1].write_text(socket_unit(service))
        return paths

    return write


def analyze(*arguments):
    done = subprocess.run(
        [need("systemd-analyze"), "--no-pager", *map(str, arguments)],
        stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=TIMEOUT,
    )  # fmt: skip
    return done.returncode, done.stdout + done.stderr


@pytest.mark.parametrize("kind", KINDS)
def test_systemd_finds_no_fault_in_a_unit(written, kind, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))  # a user's manager has one
    whose = ["--user"] if kind == "of a user" else []
    # It also looks at units that ours name, which are the machine's affair.
    status, said = analyze("verify", *whose, "--man=no", "--recursive-errors=no",
                           *written(**KINDS[kind]))  # fmt: skip
    assert (status, [line for line in said.splitlines() if "gotunnel" in line]) == (0, [])


def test_systemd_finds_a_fault_where_there_is_one(written):
    """Or the test above would show nothing."""
    (path,) = written(command=("/no/such program", "x"))
    status, said = analyze("verify", "--man=no", "--recursive-errors=no", path)
    assert status != 0 and "/no/such program is not executable" in said


@pytest.mark.parametrize(
    "kind, most", [("dynamic", 2.0), ("with sockets", 2.0), ("as a user", 3.0)]
)
def test_systemd_rates_a_systems_unit_as_safe(written, kind, most):
    """Its exposure, from 0 to 10; up to 2 it says "OK" or better, and a unit without any
    restriction has 9.6."""
    status, said = analyze("security", "--offline=true", written(**KINDS[kind])[0])
    (exposure,) = re.findall(r"Overall exposure level for \S+: ([0-9.]+)", said)
    assert status == 0 and float(exposure) <= most, said
