"""The agent's side of policies: from YAML values to the register message, passwords to hashes."""

import base64
import io
import itertools
import os
import pty
import re
import subprocess
import sys

import pytest
from support import ROOT

from gotunnel_agent import cli, policy
from gotunnel_agent.common.addresses import MOST_NETWORKS
from gotunnel_agent.common.passwords import MOST_USER, MOST_USERS, hash_password
from gotunnel_agent.policy import Policy, PolicyError, networks, rate_limit, users
from gotunnel_server.visitors.policy import read
from gotunnel_server.visitors.verdict import Allow

PASSWORD = "correct horse: bättery"
HASH = hash_password(PASSWORD)


def basic(user, password=PASSWORD):
    return "Basic " + base64.b64encode(f"{user}:{password}".encode()).decode()


def judged(*entries):
    return read({"basic_auth": list(entries)}, "http")


def code(verdict):
    """The error code of the page that the visitor gets; None if it is let in."""
    return None if isinstance(verdict, Allow) else dict(verdict.page.fields)["X-Gotunnel-Error"]


# --- What the gateway takes ----------------------------------------------------------------------


def test_policy_of_an_agent_is_taken_by_the_gateway():
    made = Policy(
        basic_auth=users({"me": PASSWORD}),
        allow=networks(["10.0.0.0/8", "::ffff:192.0.2.0/120"]),
        deny=networks("10.1.0.0/16"),
        rate_limit=rate_limit({"per_address": "1/h", "burst": "2", "total": "1000000"}),
    )
    judge = read(made.wire(), "http")
    assert code(judge.judge_request("10.0.0.1", basic("me"))) is None
    assert code(judge.judge_request("10.1.0.1", basic("me"))) == "not-allowed"
    assert code(judge.judge_request("192.0.2.9", None)) == "password-required"
    assert code(judge.judge_request("10.0.0.1", basic("me"))) is None
    assert code(judge.judge_request("10.0.0.1", basic("me"))) == "too-many-requests"


def test_largest_policy_is_taken_by_the_gateway():
    hosts = [f"10.0.{n // 256}.{n % 256}" for n in range(MOST_NETWORKS)]
    entries = {f"{n}".rjust(MOST_USER, "u"): HASH for n in range(MOST_USERS)}
    limit = {"per_address": "1000000", "burst": "1000000", "total": "1/h", "total_burst": "1"}
    made = Policy(users(entries), networks(hosts), networks(hosts), rate_limit(limit))
    assert read(made.wire(), "http") is not None


def test_policy_that_asks_nothing_is_empty_on_the_wire():
    assert Policy().wire() == {}


# --- Passwords -----------------------------------------------------------------------------------


def test_hash_is_salted_and_has_the_form_of_a_phc_string():
    assert re.fullmatch(r"\$scrypt\$ln=14,r=8,p=1\$[A-Za-z0-9+/]{22}\$[A-Za-z0-9+/]{43}", HASH)
    assert hash_password(PASSWORD) != HASH
    assert code(judged(f"me:{HASH}").judge_request("192.0.2.1", basic("me"))) is None


def test_password_and_user_are_hashed_as_browsers_send_them():
    """As NFC, whatever form the operator's keyboard wrote (RFC 7617 §2.1)."""
    judge = judged(*users("ju\u0308rgen:ba\u0308r"))
    assert code(judge.judge_request("192.0.2.1", basic("jürgen", "bär"))) is None


@pytest.mark.parametrize(
    "value",
    ["me:" + HASH, ["me:" + HASH], {"me": HASH}, {"you": PASSWORD, "me": HASH}],
    ids=["text", "list", "mapping", "two"],
)
def test_hash_is_taken_as_it_is(value):
    assert f"me:{HASH}" in users(value)


def test_password_may_hold_colons_and_blanks():
    (entry,) = users("me: a:b ")
    assert code(judged(entry).judge_request("192.0.2.1", basic("me", " a:b "))) is None


SALT, DIGEST = "c2FsdHNhbHRzYWx0c2FsdA", "A" * 43


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (None, "no value came, expected USER:PASSWORD"),
        ([], "an empty list came, expected USER:PASSWORD"),
        ({}, "0 users came, expected 1 to 100"),
        ([None], "[0]: no value came, expected USER:PASSWORD"),
        (PASSWORD.replace(":", ""), "[0]: a text without a colon came, expected USER:PASSWORD"),
        (f":{PASSWORD}", "[0]: expected a user name of 1 to 255 bytes"),
        (f"{'x' * 256}:{PASSWORD}", "[0]: expected a user name of 1 to 255 bytes"),
        (f"a\tb:{PASSWORD}", "[0]: expected a user name of 1 to 255 bytes"),
        ({"a:b": PASSWORD}, "[0]: expected a user name of 1 to 255 bytes, without a colon"),
        ({"\ud800": PASSWORD}, "[0]: expected a user name of 1 to 255 bytes"),
        ("me:", "[0]: expected a password of 1 to 1024 bytes"),
        ("me:" + "x" * 1025, "[0]: expected a password of 1 to 1024 bytes"),
        ("me:a\0b", "without control characters"),
        ("me:\ud800", "[0]: expected a password of 1 to 1024 bytes"),
        ({"me": None}, "[0]: no value came, expected a password"),
        ({"me": [PASSWORD]}, "[0]: a list came, expected a password"),
        ([f"me:{HASH}", f"me:{HASH}"], "[1]: this user comes twice, expected each user once"),
        ({f"u{n}": HASH for n in range(101)}, "101 users came, expected 1 to 100"),
        ("me:$scrypt$", "[0]: no hash of the form $scrypt$ln=14,r=8,p=1$SALT$HASH came"),
        (f"me:{HASH} ", "[0]: no hash of the form $scrypt$"),
        (f"me:$scrypt$ln=17,r=8,p=1${SALT}${DIGEST}", "ln=17,r=8,p=1 came, expected ln from 10"),
        (f"me:$scrypt$ln=9,r=99,p=1${SALT}${DIGEST}", "expected ln from 10 to"),
        (f"me:$scrypt$ln=16,r=1,p=1${SALT}${DIGEST}", "to below 16*r"),
        (f"me:$scrypt$ln=10,r=1,p=1${SALT}${DIGEST}", "1 to 64 MiB of memory"),
        (f"me:$scrypt$ln=14,r=8,p=0${SALT}${DIGEST}", "ln=14,r=8,p=0 came"),
        (f"me:$scrypt$ln=14,r=8,p=1${SALT}${DIGEST[:-2]}", "with incomplete base64 came"),
    ],
    ids=map(str, itertools.count()),
)  # fmt: skip
def test_what_is_no_password_is_refused_and_not_shown(value, expected):
    with pytest.raises(PolicyError) as caught:
        users(value)
    text = str(caught.value)
    assert expected in text
    assert text.isprintable() and len(text) < 300
    assert PASSWORD not in text and HASH not in text and DIGEST not in text


# --- Addresses and rates -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("192.0.2.1", ("192.0.2.1",)),
        ("10.0.0.0/8", ("10.0.0.0/8",)),
        (["2001:DB8::/32", "::1", "::1"], ("2001:db8::/32", "::1")),
    ],
)
def test_networks(value, expected):
    assert networks(value) == expected


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (None, "no value came, expected an address or a network such as 10.0.0.0/8"),
        ([], "an empty list came"),
        ({"a": "b"}, "a mapping came"),
        (["::1", None], "[1]: no value came"),
        ("10.0.0.1/8", "'10.0.0.1/8' has host bits, expected 10.0.0.0/8 for the network"),
        ("10.0.0.0/33", "'10.0.0.0/33' came, expected an IP address or a network"),
        ("10.0.0.0/255.0.0.0", "came, expected an IP address or a network"),
        ("fe80::1%eth0", "came, expected an IP address or a network"),
        ("app.example.com", "'app.example.com' came, expected an IP address or a network"),
        ("x" * 9999, "...' came, expected an IP address"),
        ("10.0.0.0/8, 11.0.0.0/8", "'10.0.0.0/8, 11.0.0.0/8' came"),
        (
            [f"10.0.{n // 256}.{n % 256}" for n in range(1001)],
            "1001 addresses and networks came, expected at",
        ),
    ],
)
def test_what_is_no_network_is_refused(value, expected):
    with pytest.raises(PolicyError) as caught:
        networks(value)
    assert expected in str(caught.value) and len(str(caught.value)) < 300


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("10", {"per_address": 10}),
        ("0.5", {"per_address": 0.5}),
        ("10/s", {"per_address": 10}),
        ("600/m", {"per_address": 10}),
        ("1/h", {"per_address": 1 / 3600}),
        ("36000/h", {"per_address": 10}),
        ({"total": "200/s"}, {"total": 200}),
        (
            {"per_address": "1", "burst": "20", "total": "2", "total_burst": "1000000"},
            {"per_address": 1, "burst": 20, "total": 2, "total_burst": 1_000_000},
        ),
    ],
)
def test_rate_limit(value, expected):
    assert dict(rate_limit(value)) == expected
    read({"rate_limit": dict(rate_limit(value))}, "http")


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (None, "no value came, expected requests a second such as 10, or 10/s"),
        ([], "a list came, expected requests a second"),
        ({}, "an empty mapping came, expected per_address, total or both"),
        ({"rate": "1"}, "unknown key 'rate', expected some of per_address, burst, total"),
        ({"per_address": None}, "per_address: no value came, expected a number"),
        ({"burst": "1"}, "burst came without per_address, expected both or neither"),
        ({"per_address": "1", "total_burst": "1"}, "total_burst came without total"),
        *(
            (text, "per_address: ")
            for text in (
                "", "0", "0.0", "-1", "+1", "nan", "inf", "1e309", "1e3", "true", "1_0", "\u0661",
                "10/d", "10/", "/s", "10 / s", "10/S", "1.", ".5", "0.9/h", "1000001", "9" * 5000,
            )
        ),
        *(
            ({"per_address": "1", "burst": text}, "burst: ")
            for text in ("", "0", "1.5", "-1", "1/s", "1000001", "9" * 5000)
        ),
    ],
)  # fmt: skip
def test_what_is_no_rate_is_refused(value, expected):
    with pytest.raises(PolicyError) as caught:
        rate_limit(value)
    assert expected in str(caught.value) and len(str(caught.value)) < 300


# --- gotunnel-agent hash-password ----------------------------------------------------------------

COMMAND = [sys.executable, str(ROOT / "gotunnel_agent"), "hash-password"]


@pytest.mark.parametrize("line", [PASSWORD, PASSWORD + "\n", PASSWORD + "\r\nnot this\n"])
def test_password_on_standard_input_becomes_a_hash(line):
    ended = subprocess.run(COMMAND, input=line.encode(), capture_output=True, timeout=30)
    assert (ended.returncode, ended.stderr) == (0, b"")
    judge = judged("me:" + ended.stdout.decode().removesuffix("\n"))
    assert code(judge.judge_request("192.0.2.1", basic("me"))) is None


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"", "expected a password of 1 to 1024 bytes"),
        (b"\n", "expected a password of 1 to 1024 bytes"),
        (b"x" * 100_000, "expected a password of 1 to 1024 bytes"),
        (b"s3cret\xff\n", "expected a password in UTF-8"),
        (b"s3cret\0\n", "without control characters"),
    ],
)
def test_what_cannot_be_a_password_is_one_line_and_status_2(monkeypatch, capsys, content, expected):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content)))
    assert cli.main(["hash-password"]) == 2
    out, error = capsys.readouterr()
    assert out == "" and error.count("\n") == 1
    assert expected in error and "s3cret" not in error


def talk(answers):
    """The command at a terminal: (exit status, what the terminal showed, standard output)."""
    ours, theirs = pty.openpty()
    try:
        # A session of its own, whose terminal this becomes: the password is asked for there.
        program = [sys.executable, "-c", (
            "import fcntl, os, sys, termios\n"
            "fcntl.ioctl(0, termios.TIOCSCTTY, 0)\n"
            "os.execv(sys.argv[1], sys.argv[1:])"
        ), *COMMAND]  # fmt: skip
        with subprocess.Popen(
            program, stdin=theirs, stdout=subprocess.PIPE, stderr=theirs, start_new_session=True
        ) as process:
            shown = b""
            for prompt, answer in zip((b"Password: ", b"Again: "), answers):
                while prompt not in shown:
                    shown += os.read(ours, 1024)
                os.write(ours, answer.encode() + b"\n")
            out = process.stdout.read()
        os.write(theirs, b"END")
        while not shown.endswith(b"END"):
            shown += os.read(ours, 1024)
        return process.returncode, shown.decode(), out.decode()
    finally:
        os.close(ours)
        os.close(theirs)


def test_password_at_a_terminal_is_asked_for_twice_and_not_echoed():
    status, shown, out = talk([PASSWORD, PASSWORD])
    assert status == 0 and PASSWORD not in shown
    assert code(judged("me:" + out.strip()).judge_request("192.0.2.1", basic("me"))) is None


def test_two_different_passwords_at_a_terminal_make_no_hash():
    status, shown, out = talk([PASSWORD, PASSWORD + "x"])
    assert (status, out) == (2, "")
    assert "two different passwords came" in shown and PASSWORD not in shown


@pytest.mark.parametrize("other", ["$apr1$x$y", "$2y$05$abc", "{SHA}abc", "$argon2id$v=19$x"])
def test_a_hash_of_another_kind_is_not_taken_for_a_password(other):
    with pytest.raises(PolicyError, match="a hash of another kind came") as caught:
        users(f"me:{other}")
    assert other not in str(caught.value)


@pytest.mark.parametrize("password", ["$", "$5 for a beer", "{", "a$b$c", "{} []", "$$"])
def test_a_password_may_look_a_little_like_one(password):
    assert users(f"me:{password}")[0].startswith("me:$scrypt$")


def test_agents_of_a_pool_make_the_same_hash_of_a_password(monkeypatch):
    made = users("me:" + PASSWORD, "app.example.com")
    monkeypatch.setattr(policy, "_hashes", {})  # as in another process
    assert users("me:" + PASSWORD, "app.example.com") == made
    assert code(judged(*made).judge_request("192.0.2.1", basic("me"))) is None
    salts = {
        users(f"{user}:{PASSWORD}", hostname)[0].split("$")[3]
        for user in ("me", "you")
        for hostname in ("app.example.com", "other.example.com", "")
    }
    assert len(salts) == 6
    assert users("me:another", "app.example.com")[0].split("$")[3] in made[0]
