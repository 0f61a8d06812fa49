"""`gotunnel join`: what it asks the gateway, what it writes, and when it writes nothing."""

import hashlib
import io
import os
import re
import ssl
import sys
import time
from pathlib import Path
from unittest import mock

import pytest
from support import (
    APP,
    SECRET,
    TUNNEL_HOST,
    Origin,
    agent_here,
    gateway_here,
    go_gateway,
    reserved_port,
    routes_of,
    tls_context,
)

from gotunnel_agent import join
from gotunnel_agent.common import small_file
from gotunnel_agent.common.join_string import JoinString
from gotunnel_agent.config import load
from gotunnel_agent.home import account, state_folder
from gotunnel_agent.pin import fetch_ca, unverified_chain
from gotunnel_agent.registering import make_token
from gotunnel_server.certs.local_ca import Authority

NEW = "a-new-secret-that-no-gateway-is-asked-about"
WRONG = "a-wrong-secret-that-must-not-be-shown"


@pytest.fixture
def gateway(cache):
    with gateway_here(cache) as gateway:
        yield gateway


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    """The folders of a user that has never joined."""
    for name in ("GOTUNNEL_CONFIG", "GOTUNNEL_JOIN"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(join, "NEWS", 0)
    for name in ("CONFIG", "STATE"):
        monkeypatch.setenv(f"XDG_{name}_HOME", str(tmp_path / name.lower()))
    return tmp_path / "config" / "gotunnel"


def fingerprint_of(ca_file):
    return hashlib.sha256(ssl.PEM_cert_to_DER_cert(ca_file.read_text())).hexdigest()


def string_for(gateway, **changes):
    keys = {"host": TUNNEL_HOST, "port": gateway.tunnel_port, "name": "office", "secret": SECRET,
            "fingerprint": fingerprint_of(gateway.ca_file), **changes}  # fmt: skip
    return str(JoinString(**keys))


def joined(capsys, *arguments, status=0):
    """The one line that `join` says; no secret is in it."""
    assert join.main(list(arguments)) == status
    out, err = capsys.readouterr()
    said, other = (err, out) if status else (out, err)
    *more, line = said.splitlines()
    assert all("asking again" in text for text in (*more, *other.splitlines()))
    assert not any(secret in out + err for secret in (SECRET, NEW, WRONG))
    return line


def files(folder):
    return sorted(path.name for path in folder.iterdir()) if folder.exists() else []


# --- It joins ------------------------------------------------------------------------------------


def test_one_line_makes_an_account_that_serves(gateway, home, capsys, tmp_path):
    said = joined(capsys, string_for(gateway))
    assert said.endswith(f"{home / 'agent.yaml'}. Next: gotunnel-agent http 8000")
    assert files(home) == ["agent.yaml", "ca.crt"]
    assert (home / "agent.yaml").stat().st_mode & 0o777 == 0o600
    assert (home / "ca.crt").read_bytes() == gateway.ca_file.read_bytes()
    config = account()
    with Origin() as origin:
        keys = {"ca_file": config.ca_file, "jwt_secret": config.jwt_secret}
        with agent_here(gateway, tmp_path, {APP: origin.port}, **keys):
            assert routes_of(gateway.inner) == {APP}


def test_a_token_and_a_named_ca_do_as_well(gateway, home, capsys):
    token = make_token(SECRET, "", 3600)
    text = string_for(gateway, name="", secret="", token=token, fingerprint="")
    joined(capsys, text, "--ca-file", str(gateway.ca_file))
    assert (account().token, account().jwt_secret) == (token, "")
    assert files(home) == ["agent.yaml", "ca.crt"]


def test_the_string_may_come_from_standard_input_or_the_environment(
    gateway, home, capsys, monkeypatch
):
    text = string_for(gateway)
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(f"{text}\n".encode())))
    joined(capsys, "-")
    monkeypatch.setenv("GOTUNNEL_JOIN", text)
    assert "was already in" in joined(capsys)
    assert files(home) == ["agent.yaml", "ca.crt"]


def test_the_trial_claims_nothing_and_disturbs_no_agent(gateway, capsys, tmp_path, caplog):
    with Origin() as origin, agent_here(gateway, tmp_path, {APP: origin.port}) as agent:
        joined(capsys, string_for(gateway))
        assert routes_of(gateway.inner) == {APP} and agent.totals().sessions == 1
    (line,) = (record for record in caplog.records if "has tried its credential" in record.message)
    assert line.levelname == "INFO" and line.message.startswith("agent at 127.0.0.1 has ")


def test_a_credential_that_is_new_at_the_gateway_is_tried_twice(cache, tmp_path, capsys):
    """A running gateway reads AGENTS_FILE every few seconds."""
    agents = tmp_path / "agents.yaml"
    agents.write_text(f'other: {{secret: "{NEW}", hosts: a.example.com}}\n')
    agents.chmod(0o600)
    with gateway_here(cache, JWT_SECRET="", AGENTS_FILE=str(agents)) as gateway:
        text = string_for(gateway, secret=NEW)

        def read_now(seconds):
            agents.write_text(f'office: {{secret: "{NEW}", hosts: a.example.com}}\n')
            gateway.inner.tunnels.credentials.reload(force=True)

        with mock.patch("gotunnel_agent.join.time.sleep", read_now):
            assert "it accepts" in joined(capsys, text)


@pytest.mark.slow
def test_a_go_gateway_answers_the_trial_alike(gopeer, tmp_path, home, capsys):
    with go_gateway(gopeer, tmp_path) as gateway:
        assert "auth failed" in joined(capsys, string_for(gateway, secret=WRONG), status=1)
        joined(capsys, string_for(gateway))
    assert files(home) == ["agent.yaml", "ca.crt"]


def test_offline_asks_nobody(home, capsys):
    with reserved_port() as port:
        text = f"gotunnel://office:{NEW}@localhost:{port}"
        assert "not asked" in joined(capsys, text, "--offline")
        said = joined(capsys, f"{text}?ca=sha256:{'0' * 64}", "--offline", status=1)
    assert "leave out --offline" in said and account().jwt_secret == NEW


# --- It does not join, and writes nothing --------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"secret": WRONG}, "does not fit: copy the whole join string again, or have the gateway"),
        ({"secret": "SECRET"}, "SECRET stands for the secret: type the line that"),
        ({"name": "", "secret": "", "token": "a.b.c"}, "the gateway refused: auth failed"),
        ({"fingerprint": "0" * 64}, "no certificate with the fingerprint in the join string"),
        ({"fingerprint": ""}, "the join string ends in ?ca=sha256:..., or --ca-file FILE names"),
        ({"host": "other.localhost"}, "knows no such hostname"),
        ({"host": "no-such-host.invalid"}, "no address was found"),
    ],
    ids=["secret", "placeholder", "token", "fingerprint", "no CA", "other name", "no DNS"],
)
def test_a_wrong_string_is_refused_in_one_line(gateway, home, capsys, changes, words):
    assert words in joined(capsys, string_for(gateway, **changes), status=1)
    assert files(home) == []


def test_a_clock_that_is_behind_is_named(gateway, home, capsys, monkeypatch):
    now = time.time()
    monkeypatch.setattr("gotunnel_agent.registering.time", lambda: now + 3600)
    said = joined(capsys, string_for(gateway), status=1)
    assert "auth failed" in said and "clock" in said
    assert files(home) == []


@pytest.mark.parametrize("port", ["public_port", "dashboard_port", "none"])
def test_a_port_of_something_else_is_named(gateway, home, capsys, port):
    with reserved_port() as closed:
        number = closed if port == "none" else getattr(gateway, port)
        said = joined(capsys, string_for(gateway, port=number), status=1)
    assert re.search("HTTP|does not speak TLS|does the gateway run", said), said
    assert files(home) == []


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([f"gotunnel://office:{WRONG}"], "cut or incomplete"),
        ([f"gotunnel://office:{WRONG}@", "h.example:1"], "put STRING alone in double quotes"),
        ([f"gotunnel://office:{WRONG}@h.example:1", f"--secret={WRONG}"], "double quotes"),
    ],
)
def test_a_damaged_string_is_not_shown(home, capsys, arguments, words):
    try:
        status = join.main(arguments)
    except SystemExit as end:
        status = end.code
    _, err = capsys.readouterr()
    assert status == 2 and words in err and WRONG not in err


def test_without_any_string_the_error_names_the_ways(home, capsys, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"")))
    assert join.main([]) == 2
    assert "or - to read it here, or set GOTUNNEL_JOIN" in capsys.readouterr().err


# --- A file that is there ------------------------------------------------------------------------

OTHERS = 'log_level: "debug"\ntunnels:\n  - {hostname: "a.example.com", target: "127.0.0.1:1"}\n'


def test_a_new_secret_for_the_same_name_leaves_the_rest_as_it_is(home, capsys):
    old, new = (f"gotunnel://office:{secret}@localhost:9443" for secret in ("first", NEW))
    joined(capsys, old, "--offline")
    file = home / "agent.yaml"
    with file.open("a") as more:
        more.write(OTHERS)
    before = file.read_text()
    joined(capsys, new, "--offline")
    assert file.read_text() == before.replace('"first"', f'"{NEW}"')
    assert len(load(file).tunnels) == 1
    assert (home / "agent.yaml.before").read_text() == before
    assert (home / "agent.yaml.before").stat().st_mode & 0o777 == 0o600


def test_whom_the_agent_trusts_stays_if_the_gateway_is_not_asked(gateway, home, capsys):
    text, anew = (string_for(gateway, fingerprint="", secret=secret) for secret in (SECRET, NEW))
    joined(capsys, text, "--ca-file", str(gateway.ca_file))
    trusted = account().ca_file
    joined(capsys, anew, "--offline")
    assert (account().ca_file, account().jwt_secret) == (trusted, NEW)


@pytest.mark.parametrize(
    "text",
    [
        'tunnel_addr: "localhost:9443"\njwt_issuer: "home"\njwt_secret: "x"\n',
        'tunnel_addr: "localhost:9443"\ntoken: "x"\n',
        'tunnel_addr: "other.example.com:9443"\njwt_issuer: "office"\njwt_secret: "x"\n',
        "no configuration",
        'jwt_issuer: "office"\ntunnel_addr: "localhost:9443"\njwt_secret: >\n  x\n',
    ],
)
def test_another_account_is_replaced_by_force_only(home, capsys, text):
    home.mkdir(parents=True)
    (home / "agent.yaml").write_text(text)
    string = f"gotunnel://office:{NEW}@localhost:9443"
    said = joined(capsys, string, "--offline", status=1)
    assert "--force" in said and (home / "agent.yaml").read_text() == text
    joined(capsys, string, "--offline", "--force")
    assert account().jwt_secret == NEW
    assert (home / "agent.yaml.before").read_text() == text
    assert files(home) == ["agent.yaml", "agent.yaml.before"]


def test_a_string_in_the_place_of_a_file_is_not_shown(home, capsys):
    string = f"gotunnel://a:{NEW}@localhost:1"
    said = joined(capsys, string, "--ca-file", string, status=1)
    assert "--ca-file gotunnel://...: No such file" in said
    with pytest.raises(SystemExit):
        join.main([f"--force={string}"])
    assert NEW not in capsys.readouterr().err


def test_a_pipe_in_the_place_of_a_file_is_named(home, capsys, monkeypatch):
    monkeypatch.setattr(small_file, "PIPE_TIMEOUT", 0)
    home.mkdir(parents=True)
    os.mkfifo(home / "agent.yaml")
    string = f"gotunnel://a:{NEW}@localhost:1"
    said = joined(capsys, string, "--offline", "--force", status=1)
    assert str(home / "agent.yaml") in said and "nothing is written" in said
    assert files(home) == ["agent.yaml"]


def test_another_ca_of_the_same_name_stays(gateway, home, capsys):
    home.mkdir(parents=True)
    (home / "ca.crt").write_text("another")
    joined(capsys, string_for(gateway))
    assert (home / "ca.crt").read_text() == "another"
    with open(account().ca_file, "rb") as file:
        assert file.read() == gateway.ca_file.read_bytes()


@pytest.mark.skipif(os.geteuid() == 0, reason="this user may write everywhere")
def test_a_folder_that_cannot_be_written_is_named(home, capsys):
    home.parent.mkdir(mode=0o500)
    said = joined(capsys, f"gotunnel://a:{NEW}@localhost:1", "--offline", status=1)
    assert str(home) in said and "Permission denied" in said


# --- The account in the environment --------------------------------------------------------------


def test_an_account_in_the_environment_gets_the_ca_once(gateway, monkeypatch):
    monkeypatch.setenv("GOTUNNEL_JOIN", string_for(gateway))
    first = account()
    assert os.path.dirname(first.ca_file) == str(state_folder())
    monkeypatch.setattr("gotunnel_agent.home.fetch_ca", None)
    assert account() == first


def test_a_kept_ca_that_is_another_one_by_now_is_not_trusted(gateway, monkeypatch, tmp_path):
    monkeypatch.setenv("GOTUNNEL_JOIN", string_for(gateway))
    kept = Path(account().ca_file)
    right = kept.read_bytes()
    for wrong in (Authority(tmp_path / "another CA").ca_file.read_bytes(), b"", b"no PEM"):
        kept.write_bytes(wrong)
        assert account().ca_file == str(kept) and kept.read_bytes() == right


# --- The chain that the gateway sends ------------------------------------------------------------


def test_a_chain_ends_with_the_local_ca_and_is_verified_as_before(gateway):
    pem = fetch_ca(TUNNEL_HOST, gateway.tunnel_port, fingerprint_of(gateway.ca_file))
    assert pem == gateway.ca_file.read_bytes()
    with gateway.dial(TUNNEL_HOST) as wire:
        assert len(list(unverified_chain(wire.sock))) == 2
    assert tls_context(gateway.ca_file).verify_mode == ssl.CERT_REQUIRED
