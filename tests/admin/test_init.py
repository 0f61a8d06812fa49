"""`gotunnel-server init`: what it asks, what it writes, and what it says comes next."""

import fcntl
import os
import pty
import pwd
import select
import subprocess
import sys
import termios
import time
from pathlib import Path

import pytest
from support import ROOT, TIMEOUT, wait_until

from gotunnel_agent.common import join_string, small_file
from gotunnel_server.admin import check, init
from gotunnel_server.admin.check import FAIL, OK, WARN, Finding
from gotunnel_server.agents.agents_file import read
from gotunnel_server.cli import main
from gotunnel_server.config import load
from gotunnel_server.variables import MAX_FILE

HOST = "gateway.example.com"
YES = ["init", "--host", HOST, "--yes"]


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """An empty working folder. Neither the network nor this machine is asked."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(check, "look_at_name", lambda setting, name: Finding(OK, setting, name))
    monkeypatch.setattr(check, "examine", lambda config: [Finding(OK, "clock", "agrees")])
    monkeypatch.setattr(init, "RUNS", tmp_path / "no systemd")
    return tmp_path


@pytest.fixture
def on_terminal(monkeypatch):
    """``on_terminal(*answers)`` gives these to the questions, and returns the list of questions
    that are then asked. An exception among the answers is raised."""

    def begin(*answers):
        asked, given = [], list(answers)

        def answer(question):
            asked.append(question.splitlines()[-1])
            text = given.pop(0)
            if isinstance(text, type):
                raise text
            return text

        monkeypatch.setattr("builtins.input", answer)
        monkeypatch.setattr(init, "_is_terminal", lambda: True)
        return asked

    return begin


def settings(path=".env"):
    lines = Path(path).read_text().splitlines()
    return dict(line.split("=", 1) for line in lines if not line.startswith("#"))


def mode(path):
    return Path(path).stat().st_mode & 0o777


# --- Without questions ---------------------------------------------------------------------------


def test_one_command_writes_what_a_gateway_needs(folder, capsys):
    assert main([*YES, "--email", "me@example.com"]) == 0
    assert settings() == {
        "GATEWAY_HOST": HOST,
        "TUNNEL_HOST": HOST,
        "AGENTS_FILE": "agents.yaml",
        "ACME_ENV": "production",
        "ACME_EMAIL": "me@example.com",
        "DASHBOARD_BIND": "127.0.0.1",
    }
    assert mode(".env") == mode("agents.yaml") == 0o600
    config = load(environ={})
    assert config.agents_file == folder / "agents.yaml"
    assert config.jwt_secret is None and read(config.agents_file).entries == {}
    out = capsys.readouterr().out
    assert f"DNS: {HOST}" in out and f"DNS: *.{HOST}" in out
    assert "443 (visitors), 9443 (agents), 80 (the CA" in out
    assert f"gotunnel-server agents add NAME --hosts '*.{HOST}'" in out


def test_a_first_agent_can_join_at_once(capsys):
    assert main(["init", "--local", "--yes", "--agent", "office"]) == 0
    out, err = capsys.readouterr()
    (line,) = (line for line in out.splitlines() if "gotunnel join" in line)
    joined = join_string.parse(line.partition("join ")[2])
    entry = read(Path("agents.yaml")).entries["office"]
    assert (joined.name, joined.secret) == ("office", entry.secret)
    assert (joined.host, joined.port) == ("localhost", 9443) and joined.fingerprint
    assert entry.hosts == ("*.gateway.localhost",) and entry.secret not in err
    config = load(environ={})
    assert config.local_ca and config.bind == ("127.0.0.1",) and config.gateway_port == 8443


def test_a_first_agent_that_is_there_already_is_named_beside_what_comes_next(capsys):
    words = ["init", "--local", "--yes", "--agent", "office"]
    assert main(words) == 0
    secret = read(Path("agents.yaml")).entries["office"].secret
    capsys.readouterr()
    assert main([*words, "--force"]) == 1
    out, err = capsys.readouterr()
    assert "office is in AGENTS_FILE" in err and "run the gateway" in out
    assert read(Path("agents.yaml")).entries["office"].secret == secret


def test_each_answer_has_an_option(folder):
    words = ["--tunnel-host", "tunnel.example.com", "--hosts", "a.example.com,*.b.example.com",
             "--acme", "staging", "--set", "HTTP_PORT=8081", "--set", "DASHBOARD_PASSWORD=a #$b",
             "--env-file", "other/of.env", "--agent", "one"]  # fmt: skip
    assert main([*YES, *words]) == 1  # there is no such folder
    (folder / "other").mkdir()
    assert main([*YES, *words]) == 0
    found = settings("other/of.env")
    assert found["TUNNEL_HOST"] == "tunnel.example.com" and found["ACME_ENV"] == "staging"
    config = load("other/of.env", {})
    assert config.http_port == 8081 and config.dashboard_password is not None
    entries = read(folder / "other" / "agents.yaml").entries
    assert entries["one"].hosts == ("a.example.com", "*.b.example.com")


def test_what_is_missing_is_told_and_the_next_lines_name_the_file(monkeypatch, capsys, folder):
    """Without the finding that there is no agent yet, which the next lines mend."""
    record = Finding(FAIL, "DNS", "does not resolve")
    monkeypatch.setattr(check, "look_at_name", lambda setting, name: record)
    found = [Finding(OK, "a", "b"), Finding(FAIL, "GATEWAY_PORT", "443: in use"),
             Finding(WARN, "AGENTS_FILE", "no agent can register: none")]  # fmt: skip
    monkeypatch.setattr(check, "examine", lambda config: found)
    assert main([*YES, "--env-file", "a.env", "--acme", "staging"]) == 0
    out = capsys.readouterr().out
    assert "fail  DNS: does not resolve" in out and "fail  GATEWAY_PORT: 443: in use" in out
    assert "no agent" not in out and "1 other things" in out
    assert f"gotunnel-server --env-file {folder / 'a.env'}\n" in out
    assert "set ACME_ENV=production in" in out


@pytest.mark.parametrize(
    ("words", "status", "said"),
    [
        (["init"], 1, "no terminal to ask on"),
        (["init", "--yes"], 1, "--host came not"),
        (["init", "--yes", "--host", "https://a.example.com"], 2, "without scheme or port"),
        (["init", "--yes", "--host", "localhost"], 2, "for trials on this machine: gotunnel-serv"),
        ([*YES, "--email", "me"], 2, "expected an address such as"),
        ([*YES, "--set", "NO_SUCH=1"], 2, "'NO_SUCH' is no setting"),
        ([*YES, "--set", "JWT_SECRET=a'hunter2"], 2, "cannot be written"),
        ([*YES, "--set", "HTTP_PORT=many"], 2, "HTTP_PORT is 'many'"),
        ([*YES, "--hosts", "*.com"], 2, "*.com"),
        ([*YES, "--agent", "token"], 2, "name another"),
    ],
)
def test_a_wrong_argument_leaves_nothing_behind(folder, capsys, words, status, said):
    try:
        assert main(words) == status
    except SystemExit as end:
        assert end.code == status
    err = capsys.readouterr().err
    assert said in err and "hunter2" not in err
    assert list(folder.iterdir()) == []


def test_a_folder_that_cannot_be_looked_at_is_named(folder, capsys):
    place = folder / ("a" * 300)
    assert main([*YES, "--env-file", str(place / ".env")]) == 1
    assert f"there is no folder {place}: make it" in capsys.readouterr().err


def test_an_env_file_that_is_there_is_replaced_by_force_only(folder, capsys):
    Path(".env").write_text("JWT_SECRET=hunter2\n")
    Path("agents.yaml").write_text("{}\n")
    assert main(YES) == 1
    assert "--force replaces the file" in capsys.readouterr().err
    assert Path(".env").read_text() == "JWT_SECRET=hunter2\n"
    assert main([*YES, "--force"]) == 0
    assert settings()["GATEWAY_HOST"] == HOST and Path("agents.yaml").read_text() == "{}\n"
    assert Path(".env.before").read_text() == "JWT_SECRET=hunter2\n"
    assert mode(".env.before") == 0o600
    assert sorted(path.name for path in folder.iterdir()) == [".env", ".env.before", "agents.yaml"]


@pytest.mark.parametrize("kind", ["pipe", "endless", "long", "folder"])
def test_what_is_no_env_file_is_named_and_stays(folder, capsys, monkeypatch, kind):
    monkeypatch.setattr(small_file, "PIPE_TIMEOUT", 0)
    env_file = folder / ".env"
    if kind == "pipe":
        os.mkfifo(env_file)
    elif kind == "endless":
        env_file.symlink_to("/dev/zero")
    elif kind == "folder":
        env_file.mkdir()
    else:
        env_file.write_bytes(b"#" * (MAX_FILE + 1))
    assert main([*YES, "--force"]) == 1
    err = capsys.readouterr().err
    assert str(env_file) in err and "the settings are as they were" in err
    assert [path.name for path in folder.iterdir()] == [".env"]


# --- Questions -----------------------------------------------------------------------------------


def test_it_asks_at_most_five_things(on_terminal, monkeypatch, folder):
    monkeypatch.setattr(init, "RUNS", folder)
    asked = on_terminal(HOST, "", "", "", "")
    assert main(["init"]) == 0
    assert [question.rpartition("[")[2] for question in asked] == [
        "Name of the gateway, such as gateway.example.com: ",
        f"*.{HOST}]: ",
        "E-mail address that the CA may write to (may be empty): ",
        "production]: ",
        "no]: ",
    ]
    assert settings()["ACME_ENV"] == "production" and "ACME_EMAIL" not in settings()


def test_a_wrong_answer_is_asked_again_and_what_options_say_is_not(on_terminal, capsys):
    asked = on_terminal("http://x", "Gateway.Example.com", "me", "me@example.com", "no", "s")
    assert main(["init", "--hosts", "*.dev.example.com"]) == 0
    assert len(asked) == 6
    assert settings()["GATEWAY_HOST"] == HOST and settings()["ACME_ENV"] == "staging"
    out = capsys.readouterr().out
    assert "'no' came, expected production or staging" in out
    assert "--hosts '*.dev.example.com'" in out and init.NO_WILDCARD not in out


def test_hosts_without_a_wildcard_are_told_what_that_means(on_terminal, capsys):
    on_terminal(HOST, "a.example.com, b.example.com", "", "", "")
    assert main(["init"]) == 0
    assert init.NO_WILDCARD in capsys.readouterr().out


@pytest.mark.parametrize("end", [KeyboardInterrupt, EOFError])
@pytest.mark.parametrize("count", range(4))
def test_leaving_at_any_question_leaves_nothing_behind(on_terminal, folder, capsys, end, count):
    on_terminal(*[HOST, "", "", ""][:count], end)
    assert main(["init"]) == 130
    assert capsys.readouterr().err == "\nnothing was written\n"
    assert list(folder.iterdir()) == []


@pytest.mark.parametrize(("answer", "status"), [("y", 0), ("", 130), (EOFError, 130)])
def test_an_env_file_that_is_there_is_asked_about(on_terminal, folder, answer, status):
    Path(".env").write_text("A=b\n")
    on_terminal(HOST, "", "", "", answer)
    assert main(["init"]) == status
    assert Path(".env.before").exists() == (Path(".env").read_text() != "A=b\n") == (status == 0)


def sleeps(process_id):
    state = Path(f"/proc/{process_id}/stat").read_text().rpartition(") ")[2]
    return state.startswith("S")


def on_pty(folder, *steps):
    """Run init at a terminal: each step is a text to wait for, and the answer. Returns the exit
    status and all that was shown."""
    ours, theirs = pty.openpty()
    command = [sys.executable, str(ROOT / "gotunnel_server"), "init", "--no-check"]
    process = subprocess.Popen(
        command, stdin=theirs, stdout=theirs, stderr=theirs, cwd=folder, start_new_session=True,
        # So that Ctrl-C is a signal to it.
        preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
    )  # fmt: skip
    os.close(theirs)
    shown, deadline = b"", time.monotonic() + TIMEOUT
    try:
        for wanted, answer in (*steps, (None, b"")):
            seen = len(shown)
            while wanted is None or wanted not in shown[seen:]:
                assert select.select([ours], [], [], max(0, deadline - time.monotonic()))[0], shown
                try:
                    data = os.read(ours, 4096)
                except OSError:  # the program has ended
                    data = b""
                if not data:
                    assert wanted is None, shown
                    break
                shown += data
            if answer:
                # A signal just before the program reads would not be seen before the next key.
                wait_until(lambda: sleeps(process.pid))
            os.write(ours, answer)
        return process.wait(TIMEOUT), shown.decode()
    finally:
        process.kill()
        process.wait()
        os.close(ours)


def test_the_questions_at_a_real_terminal(folder):
    status, shown = on_pty(
        folder, (b"such as gateway.example.com: ", HOST.encode() + b"\n"), (b"]: ", b"\n"),
        (b"empty): ", b"\n"), (b"[production]: ", b"\n"),
    )  # fmt: skip
    assert (status, settings()["GATEWAY_HOST"]) == (0, HOST), shown


@pytest.mark.parametrize("key", [b"\x04", b"\x03"], ids=["Ctrl-D", "Ctrl-C"])
def test_leaving_at_a_real_terminal(folder, key):
    status, shown = on_pty(
        folder, (b"such as gateway.example.com: ", HOST.encode() + b"\n"), (b"]: ", key)
    )
    assert status == 130 and "nothing was written" in shown, shown
    assert "Traceback" not in shown
    assert list(folder.iterdir()) == []


# --- The service ---------------------------------------------------------------------------------


@pytest.fixture
def units(monkeypatch, folder):
    """The plans that are installed, in the place of systemd; this user is the service's."""
    installed = []

    def install(options, program, make_plan):
        installed.append((options, make_plan(init.Options("gotunnel-server", options.per_user,
                                                          options.run_as, False))))  # fmt: skip

    monkeypatch.setattr(init, "RUNS", folder)
    monkeypatch.setattr(init, "run_service", install)
    monkeypatch.setattr(init, "SERVICE_USER", pwd.getpwuid(os.getuid()).pw_name)
    monkeypatch.setattr(init, "SERVICE_ENV", folder / "etc" / ".env")
    return installed


def test_the_systems_service_has_a_folder_of_its_own(units, monkeypatch, folder, capsys):
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    assert main([*YES, "--service", "system"]) == 0
    ((options, plan),) = units
    assert options.run_as == init.SERVICE_USER and not options.per_user
    assert plan.service.folder == str(folder / "etc")
    assert settings("etc/.env")["ACME_CACHE"] == "/var/lib/gotunnel-server"
    out = capsys.readouterr().out
    assert "systemctl enable --now gotunnel-server" in out
    assert f"agents --env-file {folder / 'etc' / '.env'} add NAME" in out


def test_a_users_service_needs_no_rights(units, capsys):
    assert main([*YES, "--service", "user"]) == 0
    assert units[0][0].per_user and settings().get("ACME_CACHE") is None
    assert "systemctl --user enable --now" in capsys.readouterr().out


def test_the_systems_service_is_for_root(units, monkeypatch, folder, capsys):
    monkeypatch.setattr(os, "geteuid", lambda: 4321)
    assert main([*YES, "--service", "system"]) == 1
    assert "is for root" in capsys.readouterr().err and list(folder.iterdir()) == []


def test_without_systemd_nothing_is_written_for_a_service(folder, capsys):
    assert main([*YES, "--service", "user"]) == 1
    assert "systemd does not run" in capsys.readouterr().err and list(folder.iterdir()) == []


def test_a_service_that_cannot_be_installed_leaves_the_file(units, monkeypatch, capsys):
    def refuse(*_):
        raise init.ServiceError("a unit is there")

    monkeypatch.setattr(init, "run_service", refuse)
    assert main([*YES, "--service", "user"]) == 1
    err = capsys.readouterr().err
    assert "a unit is there" in err and "gotunnel-server service install --user" in err
    assert settings()["GATEWAY_HOST"] == HOST


def test_a_user_that_cannot_be_made_is_named(units, monkeypatch, folder, capsys):
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    monkeypatch.setattr(init, "SERVICE_USER", "no such user")
    monkeypatch.setattr(init, "SERVICE_ENV", folder / "etc" / ".env")
    monkeypatch.setenv("PATH", str(folder))
    assert main([*YES, "--service", "system"]) == 1
    err = capsys.readouterr().err
    assert "useradd --system" in err and "nothing was written" in err
    assert list(folder.iterdir()) == []
