"""The commands `token` and `agents`: what they print, what they write, and what they refuse."""

import hashlib
import os
import re
import shlex
import ssl
import subprocess
import sys
import time
from pathlib import Path

import jwt
import pytest
from support import ROOT

from gotunnel_agent.common import join_string
from gotunnel_agent.common.join_string import JoinString
from gotunnel_agent.config import load as load_agent
from gotunnel_server import run
from gotunnel_server.admin import grants
from gotunnel_server.agents.agents_file import read
from gotunnel_server.agents.credentials import Credentials, TokenInvalid
from gotunnel_server.certs.local_ca import Authority
from gotunnel_server.cli import main
from gotunnel_server.config import load

SECRET = "correct-horse-battery-staple-and-more"
OWN_SECRET = "a-secret-of-one-alone-for-these-tests"
DAY = 86_400
MOST = 5 * 365 * DAY  # seconds that a token may be valid

ENVIRONMENT = {
    "GATEWAY_HOST": "gateway.example.com",
    "TUNNEL_HOST": "tunnel.example.com",
    "ACME_ENV": "local",
    "JWT_SECRET": SECRET,
    "AGENTS_FILE": "agents.yaml",
}
ENTRIES = f"""\
one:
  secret: "{OWN_SECRET}"
  hosts: "a.example.com, *.dev.example.com"
  ports: "2200-2299, 5432"
  limits: {{visits: 7, hostnames: 3}}
  expires: 2999-12-30
off: {{secret: "{OWN_SECRET}", hosts: off.example.com, disabled: true}}
old: {{secret: "{OWN_SECRET}", hosts: old.example.com, expires: 2020-01-01T08:00:00Z}}
"""


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """A working folder with an env file, and a file of agents."""
    monkeypatch.chdir(tmp_path)
    for name in ENVIRONMENT:
        monkeypatch.delenv(name, raising=False)
    configure()
    write(ENTRIES)
    return tmp_path


def configure(**changes):
    values = {**ENVIRONMENT, **changes}
    lines = (f"{name}={value}\n" for name, value in values.items() if value is not None)
    Path(".env").write_text("".join(lines))


def write(text):
    Path("agents.yaml").write_text(text)
    Path("agents.yaml").chmod(0o600)


def credentials():
    config = load(environ={})
    return Credentials(*config.credentials)


def status_of(*arguments):
    """The exit status, also where argparse ends the process."""
    try:
        return main(arguments)
    except SystemExit as end:
        return end.code


def refusal(capsys, status, *arguments):
    """The message of a refusal: one line on standard error, no secret, no standard output."""
    assert status_of(*arguments) == status
    out, err = capsys.readouterr()
    assert out == "" and SECRET not in err and OWN_SECRET not in err
    (line,) = err.splitlines()
    assert line.startswith("gotunnel-server")
    return line


# --- token --------------------------------------------------------------------------------------


def test_token_is_all_that_is_printed_and_may_claim_what_was_named(capsys):
    hosts = "b.example.com,*.Dev.example.com"
    assert main(["token", "--hosts", hosts, "--ports", "22,80-90", "--ttl", "30d"]) == 0
    out, err = capsys.readouterr()
    (token,) = out.splitlines()
    identity = credentials().identify(token)
    assert identity.hosts == ("b.example.com", "*.dev.example.com")
    assert identity.ports == (range(22, 23), range(80, 91))
    assert identity.credential == ("shared", "")
    claims = jwt.decode(token, SECRET, ["HS256"])
    assert claims["exp"] - claims["iat"] == 30 * DAY and abs(claims["iat"] - time.time()) < 60
    assert "signed with JWT_SECRET" in err and token not in err and SECRET not in out + err


def test_token_without_ports_may_have_none(capsys):
    assert main(["token", "--hosts", "b.example.com", "--ttl", "1y"]) == 0
    identity = credentials().identify(capsys.readouterr().out.strip())
    assert identity.ports == () and identity.why_not_port(2200) is not None


def test_token_of_an_agent_in_the_file_is_signed_with_its_secret(capsys):
    ports = "2250-2260,5432"
    arguments = ["--hosts", "*.x.dev.example.com", "--ports", ports, "--ttl", "12h"]
    assert main(["token", *arguments, "--issuer", "one"]) == 0
    identity = credentials().identify(capsys.readouterr().out.strip())
    assert identity.credential == ("agent", "one")
    assert identity.hosts == ("*.x.dev.example.com",)
    assert identity.ports == (range(2250, 2261), range(5432, 5433))


def test_token_has_the_issuer_that_the_gateway_asks_for(capsys):
    configure(JWT_ISSUER="house")
    assert main(["token", "--hosts", "b.example.com", "--ttl", "90s"]) == 0
    assert credentials().identify(capsys.readouterr().out.strip()).issuer == "house"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--hosts", "b.example.com", "--issuer", "one"],
         "b.example.com is not among the hosts of one in AGENTS_FILE (a.example.com, *.dev.exam"),
        (["--hosts", "a.example.com,*.example.com", "--issuer", "one"],
         "*.example.com is not among the hosts of one"),
        (["--hosts", "a.example.com", "--ports", "2200-2300", "--issuer", "one"],
         "2200-2300 is not among the ports of one in AGENTS_FILE (2200-2299, 5432)"),
        (["--hosts", "off.example.com", "--issuer", "off"], "issuer off is disabled"),
        (["--hosts", "old.example.com", "--issuer", "old"], "issuer old expired in AGENTS_FILE"),
        (["--hosts", "a.example.com", "--issuer", "yours"],
         "the gateway would refuse the issuer 'yours', expected JWT_ISSUER (house)"),
        (["--hosts", ",".join(f"{'x' * 60}.{'y' * 60}.{'z' * 60}.{n}.test" for n in range(200))],
         "is too long: name fewer hosts"),
    ],
)  # fmt: skip
def test_token_that_the_gateway_would_refuse_is_not_made(capsys, arguments, said):
    configure(JWT_ISSUER="house")
    assert said in refusal(capsys, 1, "token", "--ttl", "1d", *arguments)


def test_without_a_shared_secret_a_token_needs_an_agent_of_the_file(capsys):
    configure(JWT_SECRET=None)
    arguments = ["token", "--hosts", "a.example.com", "--ttl", "1d"]
    assert "JWT_SECRET is not set and no --issuer came" in refusal(capsys, 1, *arguments)
    assert "'two' is not in AGENTS_FILE" in refusal(capsys, 1, *arguments, "--issuer", "two")
    assert main([*arguments, "--issuer", "one"]) == 0


def test_token_of_an_issuer_that_is_mistyped_says_so_with_the_nearest_name(capsys):
    arguments = ["token", "--hosts", "a.example.com", "--ttl", "1d", "--issuer"]
    assert main([*arguments, "onne"]) == 0  # an issuer of the shared secret may have any name
    out, err = capsys.readouterr()
    assert credentials().identify(out.strip()).credential[0] == "shared"
    assert (
        "'onne' is not in AGENTS_FILE (did you mean one?), so JWT_SECRET signs this token\n" in err
    )
    assert main([*arguments, "quite-another"]) == 0
    assert "'quite-another' is not in AGENTS_FILE, so JWT_SECRET" in capsys.readouterr().err
    assert main(["token", "--hosts", "b.example.com", "--ttl", "1d"]) == 0
    assert "AGENTS_FILE" not in capsys.readouterr().err
    configure(JWT_SECRET=None)
    assert "'onne' is not in AGENTS_FILE (did you mean one?), expected" in refusal(
        capsys, 1, *arguments, "onne"
    )
    configure(JWT_ISSUER="house")
    assert "or a name in AGENTS_FILE (did you mean one?)" in refusal(capsys, 1, *arguments, "onne")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--hosts", "*", "--ttl", "1d"], "argument --hosts: '*' covers too much"),
        (["--hosts", "", "--ttl", "1d"], "argument --hosts: '' came, expected hostnames"),
        (["--hosts", "a.b", "--ports", "0", "--ttl", "1d"], "argument --ports: '0' came"),
        (["--hosts", "a.b", "--ttl", "30"], "argument --ttl: '30' came, expected a time such as"),
        (["--hosts", "a.b", "--ttl", "59s"], "argument --ttl: '59s' came, expected"),
        (["--hosts", "a.b", "--ttl", "6y"], "argument --ttl: '6y' came, expected"),
        (["--hosts", "a.b", "--ttl", "9" * 5000 + "y"], "came, expected a time such as"),
        (["--hosts", "a.b", "--ttl", "1.5h"], "argument --ttl: '1.5h' came"),
        (["--hosts", "a.b", "--ttl", "-1d"], "argument --ttl"),
        (["--hosts", "a.b", "--ttl", "٣d"], "argument --ttl"),
    ],
)
def test_bad_arguments_are_refused(capsys, arguments, said):
    assert said in refusal(capsys, 2, "token", *arguments)


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("90s", 90), ("60s", 60), ("45m", 2700), ("12h", 43_200), ("30d", 30 * DAY), ("5y", MOST)],
)
def test_ttl(text, seconds):
    assert grants.read_ttl(text) == seconds


# --- agents -------------------------------------------------------------------------------------


def test_added_agent_can_register_with_the_lines_that_were_printed(capsys, folder):
    hosts = "*.b.example.com,c.example.com"
    assert main(["agents", "add", "two", "--hosts", hosts, "--ports", "22,80-90"]) == 0
    out, err = capsys.readouterr()
    (folder / "agent.yaml").write_text(out)
    (folder / "ca.crt").write_text("")  # the copy that the lines speak of
    agent = load_agent("agent.yaml")
    assert (agent.tunnel_host, agent.tunnel_port) == ("tunnel.example.com", 9443)
    assert agent.ca_file == "ca.crt" and "/local/ca.crt\n" in out
    assert [tunnel.hostname for tunnel in agent.tunnels] == ["app.b.example.com"]
    assert len(agent.jwt_secret) == 64 and agent.jwt_secret not in err
    assert "within 5 s" in err

    token = jwt.encode({"iss": agent.jwt_issuer, "exp": time.time() + 60}, agent.jwt_secret)
    identity = credentials().identify(token)
    assert identity.credential == ("agent", "two")
    assert identity.hosts == ("*.b.example.com", "c.example.com")
    assert identity.ports == (range(22, 23), range(80, 91)) and identity.entry.expires is None
    assert Path("agents.yaml").read_text().startswith(ENTRIES)


def test_first_agent_makes_the_file_and_each_gets_a_secret_of_its_own(capsys):
    Path("agents.yaml").unlink()
    configure(JWT_SECRET=None)
    said = refusal(capsys, 2, "agents", "list")
    assert "there is no such file" in said and "agents add NAME --hosts" in said
    for name in ("one", "two"):
        add = ["agents", "add", name, "--hosts", "a.example.com", "--expires", "2999-01-01"]
        assert main(add) == 0
    entries = read(Path("agents.yaml")).entries
    assert entries["one"].secret != entries["two"].secret and entries["one"].expires
    assert Path("agents.yaml").stat().st_mode & 0o777 == 0o600


# Join strings ------------------------------------------------------------------------------------


def invitation(out):
    """The join string in an output, which is a comment there."""
    (line,) = (line for line in out.splitlines() if "gotunnel join " in line)
    assert line.startswith("# ")
    return join_string.parse(line.partition("join ")[2])


def test_an_agent_joins_by_one_line(capsys):
    assert main(["agents", "add", "two", "--hosts", "a.example.com"]) == 0
    out, err = capsys.readouterr()
    joined = invitation(out)
    secret = read(Path("agents.yaml")).entries["two"].secret
    ca = ssl.PEM_cert_to_DER_cert(Path("cert-cache/local/ca.crt").read_text())
    fingerprint = hashlib.sha256(ca).hexdigest()
    assert joined == JoinString("tunnel.example.com", 9443, "two", secret, "", fingerprint)
    assert str(joined) in out and secret not in err
    assert main(["agents", "rotate", "two"]) == 0
    assert invitation(capsys.readouterr().out).secret != secret


def test_a_cache_that_cannot_be_looked_at_is_told_in_one_line(capsys):
    configure(ACME_CACHE="a" * 300)
    assert main(["agents", "add", "two", "--hosts", "a.example.com"]) == 0
    out, err = capsys.readouterr()
    assert "no join string" in out + err and "jwt_secret" in out


def test_on_a_terminal_the_line_can_be_copied(capsys, monkeypatch):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    assert main(["agents", "add", "two", "--hosts", "a.example.com"]) == 0
    out, err = capsys.readouterr()
    assert out.splitlines()[-1].startswith('gotunnel join "gotunnel://two:')
    assert "gotunnel://" not in err


def test_a_public_ca_needs_no_fingerprint_and_no_quotes(capsys, monkeypatch):
    configure(ACME_ENV="production")
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    assert main(["agents", "add", "two", "--hosts", "a.example.com"]) == 0
    last = capsys.readouterr().out.splitlines()[-1]
    assert last.startswith("gotunnel join gotunnel://two:") and "?" not in last


@pytest.mark.parametrize(
    ("words", "credential"),
    [
        (["agents", "add", "two", "--hosts", "a.example.com"], "secret"),
        (["agents", "rotate", "one"], "secret"),
        (["token", "--hosts", "a.example.com", "--ttl", "1h"], "token"),
    ],
)
def test_the_join_string_alone_can_be_had(capsys, words, credential):
    assert main([*words, "--join"]) == 0
    out, err = capsys.readouterr()
    (line,) = out.splitlines()
    credential = getattr(join_string.parse(line), credential)
    assert credential and credential not in err


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"TUNNEL_PORT": "auto"}, "TUNNEL_PORT is auto"),
        ({"ACME_CACHE": "/proc/1"}, "when it first starts, as its own user"),
    ],
)
def test_without_a_join_string_the_lines_do(capsys, monkeypatch, changes, words):
    """The reason is told; --join is refused before anything is written."""
    monkeypatch.setattr(os, "geteuid", lambda: 4321)
    configure(**changes)
    add = ["agents", "add", "two", "--hosts", "a.example.com"]
    assert words in refusal(capsys, 1, *add, "--join")
    assert Path("agents.yaml").read_text() == ENTRIES
    assert main(add) == 0
    out, err = capsys.readouterr()
    assert "gotunnel://" not in out and 'jwt_issuer: "two"' in out and words in err


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"ACME_ENV": "staging"}, "no agent trusts those certificates"),
        ({"ACME_ENV": "", "ACME_DIRECTORY": "https://ca.example/dir",
          "ACME_CA_FILE": "cert-cache/local/ca.crt"}, "--ca-file ROOT"),
    ],
)  # fmt: skip
def test_what_keeps_an_agent_from_joining_is_told(capsys, changes, words):
    Authority(Path("cert-cache/local"))
    configure(**changes)
    assert main(["agents", "add", "two", "--hosts", "a.example.com"]) == 0
    assert words in capsys.readouterr().err


def test_a_private_ca_in_cert_dir_is_pinned_if_it_is_in_the_file(capsys):
    authority = Authority(Path("pki"))
    certificate, key = authority.issue("tunnel.example.com")
    Path("certs").mkdir()
    Path("certs/t.crt").write_bytes(certificate.read_bytes())
    Path("certs/t.key").write_bytes(key.read_bytes())
    Path("certs/t.key").chmod(0o600)
    configure(ACME_ENV=None, CERT_DIR="certs")
    words = ["token", "--hosts", "a.example.com", "--ttl", "1h", "--join"]
    assert main(words) == 0
    der = ssl.PEM_cert_to_DER_cert(authority.ca_file.read_text())
    joined = join_string.parse(capsys.readouterr().out)
    assert joined.fingerprint == hashlib.sha256(der).hexdigest()
    leaf = certificate.read_text().partition("-----END")[0] + "-----END CERTIFICATE-----\n"
    Path("certs/t.crt").write_text(leaf)
    assert main(words) == 0
    assert join_string.parse(capsys.readouterr().out).fingerprint == ""


def test_token_is_no_name_of_an_agent(capsys):
    said = refusal(capsys, 2, "agents", "add", "token", "--hosts", "a.example.com")
    assert "name another" in said


# Rotate ------------------------------------------------------------------------------------------


def token_of(issuer, secret):
    return jwt.encode({"iss": issuer, "exp": time.time() + 60}, secret)


def rotated(capsys, *arguments):
    """The new secret that is printed."""
    assert main(["agents", "rotate", *arguments]) == 0
    out, err = capsys.readouterr()
    *comments, name, secret = out.splitlines()
    assert all(line.startswith("# ") for line in comments)
    assert name == f'jwt_issuer: "{arguments[-1]}"'
    assert secret.startswith('jwt_secret: "') and secret[13:-1] not in err
    return secret[13:-1]


def test_an_agent_has_two_secrets_until_its_rotation_is_finished(capsys):
    old = read(Path("agents.yaml")).entries["one"].secret
    new = rotated(capsys, "one")
    assert read(Path("agents.yaml")).entries["one"].secret == new  # it signs
    for secret in (new, old):
        assert credentials().identify(token_of("one", secret)).secret == secret
    assert main(["agents", "list"]) == 0
    assert "two secrets" in capsys.readouterr().out
    assert "--finish one" in refusal(capsys, 2, "agents", "rotate", "one")
    assert main(["agents", "rotate", "--finish", "one"]) == 0
    assert "no longer accepted" in capsys.readouterr().err
    assert credentials().identify(token_of("one", new))
    with pytest.raises(TokenInvalid, match="does not fit"):
        credentials().identify(token_of("one", old))
    assert "has one secret" in refusal(capsys, 2, "agents", "rotate", "--finish", "one")
    assert Path("agents.yaml").read_text() == ENTRIES.replace(old, new, 1)


def test_an_old_secret_ends_by_itself_at_its_date(capsys, monkeypatch):
    old = read(Path("agents.yaml")).entries["one"].secret
    new = rotated(capsys, "--until", "2999-01-01", "one")
    assert credentials().identify(token_of("one", old))
    entry = read(Path("agents.yaml")).entries["one"]
    assert entry.accepted(entry.old_until - 1) == (new, old)
    assert entry.accepted(entry.old_until) == (new,)
    assert main(["agents", "rotate", "--finish", "one"]) == 0
    assert Path("agents.yaml").read_text() == ENTRIES.replace(old, new, 1)


@pytest.mark.parametrize(
    "text",
    [
        'one: {secret: "an old secret of one", hosts: a.b, disabled: no}\n',
        "one: {hosts: a.b, secret: 'an old secret of one'}\n",
        "# about one\none:\n    hosts: [a.b]\n    secret: an old secret of one   # short\n\n"
        "two: {secret: another one for two, hosts: c.d}\n",
        '"one":\n  secret: "an old secret of one"\n  hosts:\n  - a.b\n',
    ],
)
@pytest.mark.parametrize("until", [[], ["--until", "2999-01-01T10:00:00Z"]], ids=["", "until"])
def test_a_file_that_a_person_wrote_is_changed_in_that_place_alone(capsys, text, until):
    write(text)
    new = rotated(capsys, *until, "one")
    assert read(Path("agents.yaml")).entries["one"].old_secret == "an old secret of one"
    assert main(["agents", "rotate", "--finish", "one"]) == 0
    quotes = "[\"']?"
    expected = re.sub(f"{quotes}an old secret of one{quotes}", f'"{new}"', text)
    assert Path("agents.yaml").read_text() == expected


@pytest.mark.parametrize(
    ("text", "status", "said"),
    [
        ("two: {secret: a secret for two, hosts: a.b}\n", 1, "'one' is not in AGENTS_FILE"),
        ("one: {secret_file: s, hosts: a.b}\n", 2, "make it a list of two files"),
        ("one: {secret: |\n  a secret\n, hosts: a.b}\n", 2, ""),
    ],
)
def test_what_cannot_be_rotated_stays_as_it_is(capsys, text, status, said):
    Path("s").write_text("a secret of a file")
    Path("s").chmod(0o600)
    write(text)
    assert said in refusal(capsys, status, "agents", "rotate", "one")
    assert Path("agents.yaml").read_text() == text


def test_a_date_in_the_past_is_no_end_of_an_old_secret(capsys):
    said = refusal(capsys, 2, "agents", "rotate", "--until", "2020-01-01", "one")
    assert "is in the past" in said and Path("agents.yaml").read_text() == ENTRIES


# Add again ---------------------------------------------------------------------------------------


def test_agent_that_is_there_is_not_added_again(capsys):
    said = refusal(capsys, 1, "agents", "add", "one", "--hosts", "a.example.com")
    assert "/agents.yaml already: name another, or let gotunnel-server agents rotate " in said
    assert Path("agents.yaml").read_text() == ENTRIES


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["a b"], "argument NAME: 'a b' came, expected letters, digits"),
        ([""], "argument NAME: '' came"),
        (["a:\n"], "argument NAME: 'a:\\n' came"),
        (["n" * 254], "argument NAME: 'nnn"),
        (["two", "--expires", "2020-01-01"], "argument --expires: 2020-01-01 is in the past"),
        (["two", "--expires", "soon"], "argument --expires: 'soon' came, expected a date"),
    ],
)
def test_bad_agent_is_not_added(capsys, arguments, said):
    assert said in refusal(capsys, 2, "agents", "add", "--hosts", "a.example.com", *arguments)
    assert Path("agents.yaml").read_text() == ENTRIES


def test_list_is_a_table_without_secrets(capsys):
    assert main(["agents", "list"]) == 0
    out, err = capsys.readouterr()
    assert out == (
        "NAME  STATE     EXPIRES               PORTS            LIMITS                 HOSTS\n"
        "one   active    2999-12-30            2200-2299, 5432  hostnames 3, visits 7  "
        "a.example.com, *.dev.example.com\n"
        "off   disabled  never                 none             none                   "
        "off.example.com\n"
        "old   expired   2020-01-01 08:00 UTC  none             none                   "
        "old.example.com\n"
    )
    assert err == ""


@pytest.mark.parametrize("own", ["gateway.example.com", "tunnel.example.com"])
@pytest.mark.parametrize("command", [["token", "--ttl", "1d"], ["agents", "add", "two"]])
def test_the_gateways_own_names_are_granted_to_nobody(capsys, command, own):
    said = refusal(capsys, 1, *command, "--hosts", f"a.example.com,{own}")
    assert f"{own} is the gateway's own name, which no agent can claim: leave it out" in said
    assert Path("agents.yaml").read_text() == ENTRIES


def test_lines_for_an_agent_that_may_have_ports_are_of_a_tunnel_with_one(capsys):
    add = ["agents", "add", "two", "--hosts", "ssh.example.com", "--ports", "2200-2299"]
    assert main(add) == 0
    Path("agent.yaml").write_text(capsys.readouterr().out)
    Path("ca.crt").touch()
    (tunnel,) = load_agent("agent.yaml").tunnels
    assert (tunnel.hostname, tunnel.mode, tunnel.port) == ("ssh.example.com", "tcp", "auto")


@pytest.mark.parametrize("command", [["token", "--ttl", "1d"], ["agents", "add", "two"]])
@pytest.mark.parametrize(
    ("ports", "open_ones", "warning"),
    [
        ("2200-2299,80", "2200-2299", "warning: 80: not all of these ports are in TCP_PORTS"),
        ("2200-2299", "2200-2250,2260-2299", "warning: 2200-2299: not all .* [(]2200-2250, 2260"),
        ("22", None, "warning: 22: not all of these ports are in TCP_PORTS [(]none[)], and the"),
        ("2200-2299", "2200-2250,2251-2299", None),
        (None, None, None),
    ],
)
def test_ports_that_the_gateway_does_not_open_are_a_warning(
    capsys, command, ports, open_ones, warning
):
    configure(TCP_PORTS=open_ones)
    wanted = ["--ports", ports] if ports else []
    assert main([*command, "--hosts", "ssh.example.com", *wanted]) == 0
    said = re.findall("gotunnel-server: (warning: .*)", capsys.readouterr().err)
    assert len(said) == (warning is not None) and (not said or re.match(warning, said[0]))


def test_list_of_nobody_has_only_its_head(capsys):
    write("{}\n")
    assert main(["agents", "list"]) == 0
    assert capsys.readouterr().out == "NAME  STATE  EXPIRES  PORTS  LIMITS  HOSTS\n"


def test_removed_agent_is_gone(capsys):
    assert main(["agents", "remove", "one"]) == 0
    assert list(read(Path("agents.yaml")).entries) == ["off", "old"]
    assert "one was removed" in capsys.readouterr().err
    assert "'one' is not in AGENTS_FILE" in refusal(capsys, 1, "agents", "remove", "one")


@pytest.mark.parametrize(
    "command", [["list"], ["remove", "one"], ["add", "two", "--hosts", "a.example.com"]]
)
def test_without_agents_file_there_is_nothing_to_change(capsys, command):
    configure(AGENTS_FILE=None)
    assert "AGENTS_FILE is not set, expected" in refusal(capsys, 2, "agents", *command)


@pytest.mark.parametrize("command", [[], ["agents", "list"]])
def test_bad_file_is_one_line_and_status_2(capsys, monkeypatch, command):
    monkeypatch.setattr(run, "set_up_process", lambda *_: None)  # it is this process's
    write(ENTRIES + "one: {}\n")
    said = refusal(capsys, 2, *command)
    assert said == (
        f"gotunnel-server: AGENTS_FILE {os.getcwd()}/agents.yaml: line 9, column 1: "
        "key 'one' comes twice, expected once"
    )


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"TUNNEL_HOST": "2001:db8::1"}, 'tunnel_addr: "[2001:db8::1]:9443"'),
        ({"TUNNEL_PORT": "7"}, 'tunnel_addr: "tunnel.example.com:7"'),
        ({"TUNNEL_PORT": "auto"}, "TUNNEL_PORT is auto: replace 9443 in tunnel_addr by"),
    ],
)
def test_address_of_the_gateway_is_told(capsys, changes, said):
    configure(**changes)
    assert main(["agents", "add", "two", "--hosts", "a.example.com"]) == 0
    assert said in "".join(capsys.readouterr())


@pytest.mark.slow
def test_reader_that_has_seen_enough_is_no_defect():
    """As with `agents list | head -1`."""
    command = [sys.executable, str(ROOT / "gotunnel_server"), "agents", "list"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        process.stdout.close()
        assert process.stderr.read() == b""
        assert process.wait(30) == 0


@pytest.mark.slow
@pytest.mark.parametrize(
    ("program", "words"),
    [
        ("gotunnel_server", ["agents", "add", "new", "--hosts", "new.example.com"]),
        ("gotunnel_server", ["check"]),
        ("gotunnel_agent", ["hash-password"]),
        ("gotunnel_agent", ["forward", "--print-ssh-config", "ssh.example.com"]),
    ],
)
@pytest.mark.parametrize(
    ("output", "said"),
    [
        (">/dev/full", "the answer cannot be written: No space left on device"),
        (">&-", "there is no standard output to answer on"),
    ],
)
def test_answer_that_nobody_can_get_is_told_in_one_line(program, words, output, said):
    command = f"{shlex.join([sys.executable, str(ROOT / program), *words])} {output}"
    process = subprocess.run(
        command, shell=True, input="password", stderr=subprocess.PIPE, text=True, timeout=30,
        env={**os.environ, "PYTHONUNBUFFERED": ""},
    )  # fmt: skip
    *more, last = process.stderr.splitlines()
    assert last.startswith("gotunnel-") and last.endswith(said) and process.returncode == 1
    added = any("new was added to " in line for line in more)
    assert added == ("new" in read(Path("agents.yaml")).entries)
    assert added == (output == ">/dev/full" and words[0] == "agents")


@pytest.mark.parametrize("command", [["token"], ["agents"], ["agents", "add"], ["agents", "list"]])
def test_commands_explain_themselves(capsys, command):
    assert status_of(*command, "--help") == 0
    assert "usage: gotunnel-server " + " ".join(command) in capsys.readouterr().out
