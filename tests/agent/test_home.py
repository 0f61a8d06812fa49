"""Where the agent's files are, and the account that `join` has made."""

import errno
import functools
import os
from pathlib import Path

import pytest

from gotunnel_agent.cli import main as agent_main
from gotunnel_agent.config import ConfigError, load
from gotunnel_agent.home import account, chosen_config, config_file, state_folder
from gotunnel_agent.service import main as service_main

ACCOUNT = 'tunnel_addr: "tunnel.example.com:9443"\njwt_issuer: "office"\njwt_secret: "5ec7e7"\n'
TUNNELS = 'tunnels:\n  - {hostname: "a.example.com", target: "127.0.0.1:1"}\n'
JOIN = "gotunnel://office:5ec7e7@tunnel.example.com:9443"


def written(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(0o600)
    return path


@pytest.mark.parametrize(
    ("environ", "config", "state"),
    [
        ({"GOTUNNEL_CONFIG": "/a/b.yaml"}, "/a/b.yaml", "~/.local/state/gotunnel"),
        ({"XDG_CONFIG_HOME": "/c", "XDG_STATE_HOME": "/s"}, "/c/gotunnel/agent.yaml",
         "/s/gotunnel"),
        ({}, "~/.config/gotunnel/agent.yaml", "~/.local/state/gotunnel"),
        # The specification has a relative path ignored.
        ({"XDG_CONFIG_HOME": "c", "XDG_STATE_HOME": "s"}, "~/.config/gotunnel/agent.yaml",
         "~/.local/state/gotunnel"),
    ],
)  # fmt: skip
def test_files_are_where_xdg_says(environ, config, state):
    assert config_file(environ) == Path(config).expanduser()
    assert state_folder(environ) == Path(state).expanduser()


@pytest.mark.parametrize("home", ["~", "here", ""])
def test_user_without_a_home_gets_no_folder_where_it_stands(home, monkeypatch):
    monkeypatch.setenv("HOME", home)
    assert config_file({}) == Path("/.config/gotunnel/agent.yaml")
    assert state_folder({}) == Path("/.local/state/gotunnel")


def test_the_file_that_is_read_is_the_nearest_one(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    environ = {"XDG_CONFIG_HOME": str(tmp_path)}
    assert chosen_config(None, environ) == "config.yaml"
    joined = written(tmp_path / "gotunnel" / "agent.yaml", ACCOUNT)
    assert chosen_config(None, environ) == str(joined)
    written(tmp_path / "config.yaml", ACCOUNT)
    assert chosen_config(None, environ) == "config.yaml"
    named = {**environ, "GOTUNNEL_CONFIG": "b.yaml"}
    assert chosen_config(None, named) == str(tmp_path / "b.yaml")
    assert chosen_config("c.yaml", named) == "c.yaml"


def test_a_file_in_a_folder_that_may_not_be_searched_is_named(tmp_path, monkeypatch):
    """As under `su`, where HOME may still be root's."""
    monkeypatch.chdir(tmp_path)
    locked = tmp_path / "gotunnel" / "agent.yaml"

    def refuse(path, *arguments, really, **named):
        if isinstance(path, (str, Path)) and str(path) == str(locked):
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return really(path, *arguments, **named)

    for name in ("stat", "lstat", "open"):
        monkeypatch.setattr(os, name, functools.partial(refuse, really=getattr(os, name)))
    environ = {"XDG_CONFIG_HOME": str(tmp_path)}
    assert chosen_config(None, environ) == str(locked)
    with pytest.raises(ConfigError, match=r"cannot be read \(Permission denied\)"):
        account(environ=environ)


def test_a_name_that_is_too_long_is_no_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    environ = {"XDG_CONFIG_HOME": str(tmp_path / ("a" * 300))}
    assert chosen_config(None, environ) == "config.yaml"
    with pytest.raises(ConfigError, match="has joined no gateway"):
        account(environ=environ)


def test_an_account_has_no_tunnels(tmp_path):
    for text in (ACCOUNT, ACCOUNT + TUNNELS, ACCOUNT + "tunnels: []\n"):
        written(tmp_path / "gotunnel" / "agent.yaml", text)
        config = account(environ={"XDG_CONFIG_HOME": str(tmp_path)})
        assert (config.tunnel_host, config.tunnel_port) == ("tunnel.example.com", 9443)
        assert (config.jwt_issuer, config.jwt_secret) == ("office", "5ec7e7")
        assert config.tunnels == ()


def test_the_environment_may_hold_the_account(tmp_path):
    environ = {"GOTUNNEL_JOIN": JOIN, "GOTUNNEL_CONFIG": str(tmp_path / "none.yaml")}
    config = account(environ=environ)
    assert (config.jwt_issuer, config.jwt_secret, config.token) == ("office", "5ec7e7", "")
    config = account(environ={"GOTUNNEL_JOIN": "gotunnel://token:a.b.c@t.example.com:1"})
    assert (config.jwt_issuer, config.jwt_secret, config.token) == ("", "", "a.b.c")


def test_a_join_string_that_is_given_wins_over_the_environment():
    other = JOIN.replace("office", "home")
    assert account(environ={"GOTUNNEL_JOIN": JOIN}, join=other).jwt_issuer == "home"
    with pytest.raises(ConfigError, match="^join: the join string does not begin") as caught:
        account(environ={"GOTUNNEL_JOIN": JOIN}, join="hunter2")
    assert "hunter2" not in str(caught.value)


def test_a_file_that_is_named_wins_over_the_environment(tmp_path):
    path = written(tmp_path / "a.yaml", ACCOUNT.replace("office", "home"))
    assert account(str(path), {"GOTUNNEL_JOIN": JOIN}).jwt_issuer == "home"


@pytest.mark.parametrize(
    ("environ", "words"),
    [
        ({}, "agent.yaml): run gotunnel join STRING once; gotunnel-server"),
        ({"GOTUNNEL_JOIN": "hunter2"}, "GOTUNNEL_JOIN: the join string does not begin"),
    ],
)
def test_without_an_account_the_error_says_what_to_do(environ, words, tmp_path):
    with pytest.raises(ConfigError) as caught:
        account(environ={"XDG_CONFIG_HOME": str(tmp_path), **environ})
    assert words in str(caught.value)
    assert "hunter2" not in str(caught.value)


def test_a_file_without_tunnels_can_be_loaded_by_a_caller_that_has_some(tmp_path):
    path = written(tmp_path / "a.yaml", ACCOUNT)
    assert load(path, needs_tunnels=False).tunnels == ()
    assert load(path, needs_tunnels=False).secret_files == (str(path),)
    with pytest.raises(ConfigError, match="tunnels: no value came"):
        load(path)
    written(path, ACCOUNT + TUNNELS)
    assert len(load(path, needs_tunnels=False).tunnels) == 1
    written(path, ACCOUNT + "tunnels: 7\n")
    with pytest.raises(ConfigError, match="tunnels"):
        load(path, needs_tunnels=False)


def test_a_relative_name_of_the_configuration_is_made_absolute(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert os.path.isabs(config_file({"GOTUNNEL_CONFIG": "a.yaml"}))


def test_the_agent_reads_the_file_that_was_joined(tmp_path, monkeypatch, capsys):
    """It has no tunnels yet, and the error says what can be done without any."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("GOTUNNEL_CONFIG", raising=False)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    path = written(tmp_path / "gotunnel" / "agent.yaml", ACCOUNT)
    for main in (agent_main, service_main):
        assert main([] if main is agent_main else ["install", "--dry-run"]) == 2
        said = capsys.readouterr().err
        assert f"{path}: tunnels: no value came" in said and "gotunnel http 8080" in said
