"""The command `service` of both programs: which files it writes and removes, and when it refuses.

systemctl is a script here that notes what it was asked.
"""

import os
import pwd
import shutil
import stat
import sys
import zipfile

import pytest

from gotunnel_agent import service as agent_service
from gotunnel_agent.common import service
from gotunnel_server import cli as server_cli

ROOT_ONLY = pytest.mark.skipif(os.geteuid() != 0, reason="files of other users are made as root")
SECRET = "only for tests, and long enough for HS256"


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """A machine with systemd, as far as the command sees it; the working folder has a
    configuration of both programs, which everybody can read. Yields its folder."""
    for folder in tmp_path.parents:
        if folder.name.startswith("pytest-"):
            break
    units, runs, programs = tmp_path / "units", tmp_path / "runs", tmp_path / "programs"
    for folder in (runs, programs, tmp_path / "work"):
        folder.mkdir()
    systemctl = programs / "systemctl"
    systemctl.write_text(
        f'#!/bin/sh\necho "$@" >> "{tmp_path}/asked"\n'
        f'[ ! -e "{tmp_path}/fails" ] || {{ echo "no bus" >&2; exit 1; }}\n'
        f'[ "$1" != show ] || cat "{tmp_path}/shown"\n'
    )
    systemctl.chmod(0o755)
    monkeypatch.setenv("PATH", f"{programs}:/bin:/usr/bin")
    monkeypatch.setattr(service, "SYSTEM_UNITS", units)
    monkeypatch.setattr(service, "RUNS", runs)
    # What the program lies in is not for everybody here, as it lies in a home folder.
    monkeypatch.setattr(service, "program_files", lambda command: [])
    monkeypatch.setattr("gotunnel_server.admin.service.program_files", lambda command: [])
    monkeypatch.setattr("gotunnel_agent.service.program_files", lambda command: [])
    monkeypatch.setattr(service._Person, "barrier", lambda *arguments: None)
    monkeypatch.setattr(sys, "argv", ["/opt/gotunnel/bin/gotunnel-server"])
    monkeypatch.chdir(tmp_path / "work")
    write_env()
    with open("config.yaml", "w") as file:
        file.write(f"tunnel_addr: 'localhost:9443'\njwt_secret: '{SECRET}'\ntunnels:\n"
                   "  - {hostname: app.localhost, target: '127.0.0.1:8000'}\n")  # fmt: skip
    return tmp_path


def write_env(**changes):
    settings = {
        "GATEWAY_HOST": "gateway.localhost", "TUNNEL_HOST": "localhost", "JWT_SECRET": SECRET,
        "ACME_ENV": "local", **changes,
    }  # fmt: skip
    with open(".env", "w") as file:
        file.write("".join(f"{name}={value}\n" for name, value in settings.items()))


def server(*arguments):
    return server_cli.main(["service", *arguments])


def agent(*arguments):
    return agent_service.main(list(arguments))


def units(machine):
    return sorted(path.name for path in (machine / "units").glob("*"))


def text(machine, name="gotunnel-server.service"):
    return (machine / "units" / name).read_text()


def asked(machine):
    path = machine / "asked"
    return path.read_text().splitlines() if path.exists() else []


@pytest.mark.parametrize("run, name", [(server, "gotunnel-server"), (agent, "gotunnel-agent")])
def test_install_writes_the_unit_and_says_what_to_run(machine, capsys, run, name):
    assert run("install") == 0
    assert units(machine) == [f"{name}.service"]
    assert stat.S_IMODE(os.stat(machine / "units" / f"{name}.service").st_mode) == 0o644
    out = capsys.readouterr().out
    assert f"wrote {machine}/units/{name}.service" in out
    assert f"systemctl enable --now {name}\n" in out
    assert "daemon-reload" in asked(machine) and not any(
        "enable" in line for line in asked(machine)
    )


@pytest.mark.parametrize("run, name", [(server, "gotunnel-server"), (agent, "gotunnel-agent")])
def test_dry_run_prints_the_unit_and_changes_nothing(machine, capsys, run, name):
    shutil.rmtree(machine / "runs")  # it needs no systemd
    assert run("install", "--dry-run") == 0
    out = capsys.readouterr().out
    assert f"# {machine}/units/{name}.service\n# Written by {name} service install" in out
    assert units(machine) == [] and asked(machine) == []


def test_an_agent_with_an_inspector_has_a_folder_for_its_token(machine, capsys):
    line = "Environment=XDG_STATE_HOME=%S/gotunnel-agent"
    assert agent("install", "--dry-run") == 0 and line not in capsys.readouterr().out
    with open("config.yaml", "a") as file:
        file.write("inspect: 127.0.0.1:4040\n")
    assert agent("install", "--dry-run") == 0
    lines = capsys.readouterr().out.splitlines()
    assert line in lines and "StateDirectory=gotunnel-agent" in lines
    assert agent("install", "--dry-run", "--user") == 0
    assert line not in capsys.readouterr().out


def test_the_gateways_unit_follows_its_settings(machine):
    write_env(HTTP_PORT="80", DRAIN_TIMEOUT="60", ACCESS_LOG="/var/log/gotunnel-server/access.log")
    assert server("install") == 0
    lines = text(machine).splitlines()
    for line in (
        "TimeoutStopSec=75",
        "AmbientCapabilities=CAP_NET_BIND_SERVICE",
        f"LoadCredential=env:{machine}/work/.env",
        "ExecStart=/opt/gotunnel/bin/gotunnel-server --env-file ${CREDENTIALS_DIRECTORY}/env",
        "Environment=ACME_CACHE=%S/gotunnel-server",
        "Environment=STATUS_SOCKET=%t/gotunnel-server/status.sock",
        "LogsDirectory=gotunnel-server",
        "DynamicUser=yes",
        "Type=notify",
    ):
        assert line in lines, line


@pytest.mark.parametrize(
    ("settings", "low"),
    [
        ({}, True),  # GATEWAY_PORT is 443
        ({"GATEWAY_PORT": "8443"}, False),
        ({"GATEWAY_PORT": "auto"}, False),
        ({"GATEWAY_PORT": "8443", "TCP_PORTS": "1000-2000"}, True),
        ({"GATEWAY_PORT": "8443", "TCP_PORTS": "2200"}, False),
        ({"GATEWAY_PORT": "8443", "HTTP_PORT": "80"}, True),
    ],
)
def test_the_right_to_low_ports_is_given_where_there_are_some(machine, settings, low):
    write_env(**settings)
    assert server("install") == 0
    assert ("AmbientCapabilities=" in text(machine)) == low


def test_with_a_socket_unit_systemd_listens(machine):
    write_env(BIND="192.0.2.1,2001:db8::1", DASHBOARD_BIND="127.0.0.1", METRICS_PORT="9464")
    assert server("install", "--socket") == 0
    lines = text(machine, "gotunnel-server.socket").splitlines()
    assert [line for line in lines if line.startswith("Listen")] == [
        "ListenStream=192.0.2.1:443", "ListenStream=[2001:db8::1]:443",
        "ListenStream=192.0.2.1:9443", "ListenStream=[2001:db8::1]:9443",
        "ListenStream=127.0.0.1:8080", "ListenStream=127.0.0.1:9464",
    ]  # fmt: skip
    assert "AmbientCapabilities=" not in text(machine)
    assert "Requires=gotunnel-server.socket" in text(machine)


def test_a_socket_unit_needs_port_numbers(machine, capsys):
    write_env(TUNNEL_PORT="auto")
    assert server("install", "--socket") == 1
    assert "--socket: TUNNEL_PORT is auto, expected a number" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "enters", "folder"),
    [([], True, "work"), ([], False, ""), (["--run-as", "root"], True, "")],
)
def test_the_gateways_copy_of_its_settings_counts_paths_from_where_they_were(
    machine, monkeypatch, arguments, enters, folder
):
    monkeypatch.setattr("gotunnel_server.admin.service._everybody_may_enter", lambda path: enters)
    monkeypatch.chdir(machine)
    assert server("install", "--env-file", "work/.env", *arguments) == 0
    lines = text(machine).splitlines()
    assert f"WorkingDirectory={machine / folder}" in lines


def test_another_user_reads_the_configuration_itself(machine):
    me = pwd.getpwuid(os.getuid()).pw_name
    os.mkdir("cert-cache")
    assert server("install", "--run-as", me) == 0
    lines = text(machine).splitlines()
    assert f"User={me}" in lines and f"ReadWritePaths={machine}/work/cert-cache" in lines
    assert f"ExecStart=/opt/gotunnel/bin/gotunnel-server --env-file {machine}/work/.env" in lines
    assert "StateDirectory" not in text(machine)


def test_an_unknown_user_is_one_clear_line(machine, capsys):
    assert server("install", "--run-as", "no such one") == 1
    assert "there is no user 'no such one'; make it: useradd" in capsys.readouterr().err


def test_a_users_unit_lies_in_the_users_folder(machine, capsys, monkeypatch):
    monkeypatch.setenv("HOME", str(machine))
    assert agent("install", "--user", "--name", "home") == 0
    unit = (machine / ".config/systemd/user/home.service").read_text()
    assert f"-c {machine}/work/config.yaml" in unit and "WantedBy=default.target" in unit
    assert "systemctl --user enable --now home" in capsys.readouterr().out
    assert "--user daemon-reload" in asked(machine)


@pytest.mark.parametrize("name", ["a/b", "", "a b", "-a", "x" * 65, "%n", "a\n"])
def test_a_units_name_is_checked(machine, name):
    with pytest.raises(SystemExit):
        server("install", "--name", name)
    assert units(machine) == []


def test_a_second_install_overwrites_the_first(machine):
    assert server("install") == 0
    write_env(DRAIN_TIMEOUT="100")
    assert server("install") == 0
    assert "TimeoutStopSec=115" in text(machine)


@pytest.mark.parametrize("kind", ["another's", "the other program's", "a link", "a folder"])
@pytest.mark.parametrize("action", ["install", "uninstall"])
def test_a_unit_that_it_did_not_write_is_left_alone(machine, capsys, kind, action):
    folder = machine / "units"
    folder.mkdir()
    path = folder / "gotunnel-server.service"
    if kind == "another's":
        path.write_text("[Service]\nExecStart=/bin/true\n")
    elif kind == "the other program's":
        path.write_text("# Written by gotunnel-agent service install\n")
    elif kind == "a link":
        path.symlink_to("/dev/null")  # as `systemctl mask` does
    else:
        path.mkdir()
    before = os.lstat(path)
    assert server(action) == 1
    assert "was not written by gotunnel-server service install" in capsys.readouterr().err
    assert os.lstat(path) == before and "daemon-reload" not in asked(machine)


def test_uninstall_stops_the_service_and_removes_its_files(machine, capsys):
    server("install", "--socket")
    assert server("uninstall") == 0
    assert units(machine) == []
    assert "disable --now gotunnel-server.socket gotunnel-server.service" in asked(machine)
    assert server("uninstall") == 1
    assert "nothing to uninstall" in capsys.readouterr().err


def test_install_without_the_socket_does_not_leave_the_old_one(machine, capsys):
    server("install", "--socket")
    assert server("install") == 1
    assert "gotunnel-server.socket is there, of an install with --socket" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("state", "status", "words"),
    [
        ("ActiveState=active\nSubState=running\nMainPID=77\nUnitFileState=enabled", 0,
         ["active (running), enabled", "77; ask it: gotunnel-server status"]),
        ("ActiveState=failed\nSubState=failed\nMainPID=0\nResult=exit-code", 1,
         ["failed (failed)", "exit-code; see journalctl"]),
        ("ActiveState=inactive\nSubState=dead\nMainPID=0\nResult=success", 1, ["inactive (dead)"]),
    ],
)  # fmt: skip
def test_status_says_whether_it_runs(machine, capsys, state, status, words):
    (machine / "shown").write_text(state + "\n")
    assert server("status") == status
    out = capsys.readouterr().out
    assert [word for word in words if word not in out] == [] and "(no unit)" in out


@pytest.mark.parametrize("action", ["install", "uninstall", "status"])
@pytest.mark.parametrize("missing", ["systemctl", "systemd"])
def test_without_systemd_there_is_one_clear_line(machine, capsys, monkeypatch, action, missing):
    if action == "uninstall":
        server("install")
        capsys.readouterr()
    if missing == "systemctl":
        monkeypatch.setattr(service.shutil, "which", lambda program: None)
    else:
        shutil.rmtree(machine / "runs")
    before = units(machine)
    assert server(action) == 1
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("gotunnel-server: systemd does not run on this machine")
    assert err.count("\n") == 1 and units(machine) == before


def test_a_systemctl_that_fails_is_one_clear_line(machine, capsys):
    (machine / "fails").touch()
    assert server("status") == 1
    err = capsys.readouterr().err
    assert "no bus" in err and err.count("\n") == 1


def test_a_wrong_configuration_gets_no_unit(machine, capsys):
    write_env(GATEWAY_HOST="https://x")
    assert server("install") == 2
    assert "GATEWAY_HOST is" in capsys.readouterr().err
    assert agent("install", "-c", "missing.yaml") == 2
    assert units(machine) == []


def test_a_gateway_without_a_file_of_settings_gets_no_unit(machine, capsys, monkeypatch):
    os.unlink(".env")
    monkeypatch.setenv("GATEWAY_HOST", "gateway.localhost")  # which no service would have
    assert server("install") == 1
    assert (
        "there is no .env here, and a service has nothing of a terminal's"
        in capsys.readouterr().err
    )


def test_a_folder_that_no_unit_can_hold_is_refused(machine, capsys, monkeypatch):
    os.mkdir("a\nb")
    shutil.copy(".env", "a\nb/.env")
    monkeypatch.chdir("a\nb")
    assert server("install") == 1
    err = capsys.readouterr().err
    assert "the working folder: " in err and "holds a character that no unit file can hold" in err


def test_a_folder_that_cannot_be_written_is_one_clear_line(machine, capsys, monkeypatch):
    (machine / "file").touch()
    monkeypatch.setattr(service, "SYSTEM_UNITS", machine / "file" / "units")
    assert server("install") == 1
    assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.parametrize(
    ("argv0", "expected"),
    [
        ("/opt/gt/bin/gotunnel-agent", ("/opt/gt/bin/gotunnel-agent",)),
        ("{}/folder", (sys.executable, "{}/folder")),
        ("{}/folder/__main__.py", (sys.executable, "{}/folder")),
        ("{}/gotunnel.pyz", (sys.executable, "{}/gotunnel.pyz")),
    ],
)
def test_the_unit_starts_the_program_that_was_started(tmp_path, argv0, expected):
    (tmp_path / "folder").mkdir()
    with open(tmp_path / "gotunnel.pyz", "wb") as file:
        file.write(b"#!/usr/bin/env python3\n")
        zipfile.ZipFile(file, "w").close()
    found = service.this_program(argv0.format(tmp_path))
    assert found == tuple(part.format(tmp_path) for part in expected)


# Who may read what -------------------------------------------------------------------------------


@pytest.fixture
def deep(tmp_path):
    """Two folders and a file that everybody can read, below a folder that everybody can enter."""
    for folder in (tmp_path, *tmp_path.parents[:-2]):
        folder.chmod(folder.stat().st_mode | 0o011)
    file = tmp_path / "one" / "two" / "file"
    file.parent.mkdir(parents=True)
    file.touch()
    for path in (file.parent.parent, file.parent, file):
        path.chmod(0o755)
    return file


@ROOT_ONLY
@pytest.mark.parametrize(
    ("place", "mode", "wanted", "barred"),
    [
        (0, 0o644, service.READ, False),
        (0, 0o640, service.READ, True),
        (0, 0o644, service.WRITE, True),
        (1, 0o750, service.READ, True),
        (1, 0o711, service.READ, False),
        (2, 0o700, service.READ, True),
    ],
)
def test_a_dynamic_user_has_the_rights_of_everybody(deep, place, mode, wanted, barred):
    path = [deep, *deep.parents][place]
    path.chmod(mode)
    barrier = service._Person(None).barrier(str(deep), wanted)
    assert bool(barrier) == barred
    if barrier:
        assert barrier.startswith(f"{path} (mode {mode:04o}, root:")


@ROOT_ONLY
def test_a_users_own_files_and_those_of_its_groups_count(deep):
    nobody = pwd.getpwnam("nobody")
    someone = service._Person("nobody")
    deep.chmod(0o600)
    assert someone.barrier(str(deep), service.READ)
    os.chown(deep, nobody.pw_uid, -1)
    assert someone.barrier(str(deep), service.READ) is None
    os.chown(deep, 0, nobody.pw_gid)
    deep.chmod(0o640)
    assert someone.barrier(str(deep), service.READ) is None
    assert someone.barrier(str(deep), service.WRITE)
    assert service._Person("root").barrier(str(deep), service.WRITE) is None


@ROOT_ONLY
def test_a_link_counts_for_what_it_leads_to(deep, tmp_path):
    link = tmp_path / "link"
    link.symlink_to(deep)
    deep.parent.chmod(0o700)
    assert "two (mode 0700" in service._Person(None).barrier(str(link), service.READ)


@ROOT_ONLY
def test_what_the_services_user_cannot_read_is_named(machine, capsys, monkeypatch, deep):
    monkeypatch.undo()
    monkeypatch.chdir(machine / "work")
    write_env(AGENTS_FILE=str(deep))
    deep.chmod(0o600)
    deep.write_text("office: {secret: xxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxx, hosts: [a.example]}")
    monkeypatch.setattr("gotunnel_server.admin.service.program_files", lambda command: [])
    assert server("install", "--dry-run") == 1
    err = capsys.readouterr().err
    assert f"AGENTS_FILE: a dynamic user cannot read {deep}, because of {deep} (mode 0600" in err
    assert "--run-as" in err
