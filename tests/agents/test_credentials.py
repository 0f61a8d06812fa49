"""Tokens: what proves who somebody is, what does not, and what may be claimed with them."""

import base64
import hashlib
import hmac
import json
import logging
import os
import time

import jwt
import pytest

from gotunnel_agent.registering import make_token
from gotunnel_server.agents import agents_file
from gotunnel_server.agents.agents_file import AgentsFileError, Limits
from gotunnel_server.agents.credentials import (
    CLOCK_LEEWAY,
    MAX_TOKEN,
    Credentials,
    Identity,
    TokenInvalid,
    shown_seconds,
)

SECRET = "only for tests, " * 4  # 64 bytes: long enough for HS512 too
OTHER_SECRET = SECRET[::-1]
HOUR = 3600
NO_FIT = "the token's signature does not fit: compare jwt_secret and jwt_issuer with the gateway's"

# Of agents with secrets of their own, each "secret of NAME ...".
FILE = """\
mine:
  secret: "secret of mine, for these tests alone"
  hosts: a.example.com, *.dev.example.com
  ports: 2200-2299, 5432
  limits: {hostnames: 3, visits: 7}
wide:
  secret: "secret of wide, for these tests alone"
  hosts: ["*.example.com"]
off:
  secret: "secret of off, for these tests alone"
  hosts: off.example.com
  disabled: yes
old:
  secret: "secret of old, for these tests alone"
  hosts: old.example.com
  expires: 2020-12-31
"""


def secret_of(name):
    return f"secret of {name}, for these tests alone"


def token(secret=SECRET, algorithm="HS256", **changes):
    """A token as agents make it, with changed claims; None leaves one out."""
    now = int(time.time())
    claims = {"iss": "agent", "iat": now, "exp": now + HOUR, **changes}
    claims = {name: value for name, value in claims.items() if value is not None}
    return hand_made({"alg": algorithm, "typ": "JWT"}, claims, secret, algorithm)


def hand_made(head, claims, secret=SECRET, algorithm="HS256"):
    """A token whose parts are what they are, by nobody's library (RFC 7515 §3.1)."""
    signed = b".".join(
        base64.urlsafe_b64encode(json.dumps(part).encode()).rstrip(b"=") for part in (head, claims)
    )
    method = {"HS384": hashlib.sha384, "HS512": hashlib.sha512}.get(algorithm, hashlib.sha256)
    digest = hmac.new(secret.encode(), signed, method).digest()
    return (signed + b"." + base64.urlsafe_b64encode(digest).rstrip(b"=")).decode()


def own_token(name, **changes):
    """A token of an agent in the file."""
    return token(secret_of(name), iss=name, **changes)


def reason(credentials, bad):
    """Why a token is refused: one clause, fit to be sent."""
    with pytest.raises(TokenInvalid) as caught:
        credentials.identify(bad)
    text = str(caught.value)
    assert text.isprintable() and len(text) < 700 and "secret of" not in text
    return text


def write(path, text):
    path.write_text(text)
    path.chmod(0o600)


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "agents.yaml"
    write(path, FILE)
    return path


@pytest.fixture
def credentials(path):
    """A shared secret, and a file."""
    return Credentials(SECRET, agents_file=path)


# --- The shared secret --------------------------------------------------------------------------


def test_token_of_our_own_agent_is_accepted():
    assert Credentials(SECRET).identify(make_token(SECRET, "mine", HOUR)) == Identity("mine")


def test_token_made_by_hand_is_accepted():
    """As a Go agent would: no library of ours at either end."""
    now = int(time.time())
    claims = {"iss": "go", "iat": now, "exp": now + HOUR}
    made = hand_made({"alg": "HS256", "typ": "JWT"}, claims)
    assert Credentials(SECRET).identify(made) == Identity("go")


def test_token_of_pyjwt_is_accepted():
    made = jwt.encode({"iss": "lib", "exp": int(time.time()) + HOUR}, SECRET, "HS256")
    assert Credentials(SECRET).identify(made) == Identity("lib")


@pytest.mark.parametrize(
    "changes",
    [{"iss": None}, {"aud": "someone"}, {"iat": None}, {"more": 1}, {"sub": 5}, {"jti": []}],
)
def test_claims_that_do_not_matter_may_be_there_or_not(changes):
    assert isinstance(Credentials(SECRET).identify(token(**changes)), Identity)


def test_token_without_an_issuer_speaks_for_nobody_in_particular():
    assert Credentials(SECRET).identify(token(iss=None)) == Identity("")


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"exp": None}, "the token has no exp"),
        ({"exp": lambda now: now - 3 * HOUR - 5}, "the token expired 3 h ago: get a new one"),
        (
            {"exp": lambda now: now - 3 * HOUR, "iat": lambda now: now - 4 * HOUR},
            "the token expired 3 h ago: the agent's clock is 14400 s behind the gateway's; 60 s "
            "are allowed. Set the clock that is wrong",
        ),
        (
            {"exp": lambda now: now - 3 * HOUR, "iat": lambda now: now - 4 * HOUR, "hosts": "a.b"},
            "the token expired 3 h ago: get a new one, or compare the clocks",
        ),
        ({"exp": lambda now: now - CLOCK_LEEWAY - 1}, "the token expired 1 min ago"),
        ({"exp": 0}, "the token expired "),
        ({"exp": -5}, "the token's exp is not a time"),
        ({"exp": "soon"}, "the token's exp is not a time"),
        ({"exp": lambda now: str(now + HOUR)}, "the token's exp is not a time"),
        ({"exp": True}, "the token's exp is not a time"),
        ({"exp": [1]}, "the token's exp is not a time"),
        ({"exp": float("nan")}, "the token's exp is not a time"),
        ({"exp": float("inf")}, "the token's exp is not a time"),
        ({"exp": 10**400}, "the token's exp is not a time"),
        ({"exp": -(10**400)}, "the token's exp is not a time"),
        ({"exp": lambda now: now * 1000}, "the token's exp is not a time"),
        (
            {"iat": lambda now: now + HOUR + 30},
            "the token was issued 1 h from now: the agent's clock is 3630 s ahead of the gateway's",
        ),
        (
            {"iat": lambda now: now + HOUR + 30, "hosts": "a.b"},
            "the token was issued 1 h from now: its issuer's clock is 3630 s ahead",
        ),
        ({"iat": lambda now: now + CLOCK_LEEWAY + 5.5}, "the token was issued 1 min from now"),
        ({"iat": "now"}, "the token's iat is not a time"),
        ({"iat": float("nan")}, "the token's iat is not a time"),
        ({"iat": 10**400}, "the token's iat is not a time"),
        (
            {"nbf": lambda now: now + HOUR + 30},
            "the token begins 1 h from now: wait 3630 s, or set the agent's clock back",
        ),
        ({"nbf": {}}, "the token's nbf is not a time"),
        ({"iss": 5}, "the token's iss is not text"),
        ({"iss": ["mine"]}, "the token's iss is not text"),
        ({"iss": "i" * 254}, "the token's iss is not text of at most 253"),
        ({"iss": "a\ud800"}, "the token's iss has half of a surrogate pair, expected text"),
        ({"hosts": []}, "the token's hosts cannot be read: an empty list"),
        ({"hosts": ""}, "the token's hosts cannot be read: '' came"),
        ({"hosts": 5}, "the token's hosts cannot be read: neither text nor a list"),
        ({"hosts": {"a.example.com": 1}}, "the token's hosts cannot be read: neither text nor"),
        ({"hosts": [5]}, "the token's hosts cannot be read: an item came that is not text"),
        ({"hosts": "*"}, "the token's hosts cannot be read: '*' covers too much"),
        ({"hosts": ["*.com"]}, "the token's hosts cannot be read: '*.com' covers too much"),
        ({"hosts": "＊.com"}, "the token's hosts cannot be read: '\\uff0a.com' covers too much"),
        ({"hosts": "*。com"}, "the token's hosts cannot be read: '*\\u3002com' "),
        ({"hosts": "fa\u00df.example.com"}, "the token's hosts cannot be read: 'fa\\xdf."),
        ({"hosts": "a\u200db.example.com"}, "the token's hosts cannot be read: 'a\\u200db"),
        ({"hosts": "xn--a.b..com"}, "the token's hosts cannot be read"),
        ({"hosts": "a.*.com"}, "the token's hosts cannot be read: 'a.*.com' has a * in the"),
        ({"hosts": "a*.example.com"}, "the token's hosts cannot be read: 'a*.example.com' has a *"),
        ({"hosts": "a.example.com,"}, "the token's hosts cannot be read: '' came"),
        ({"hosts": "a.example.com:80"}, "the token's hosts cannot be read"),
        ({"hosts": "*." + "a." * 125 + "com"}, "the token's hosts cannot be read: '*.a.a."),
        ({"hosts": "\x00\n\ud83d" + "ü" * 5000}, "the token's hosts cannot be read"),
        ({"hosts": ["a.example.com"] * 257}, "the token's hosts cannot be read: 257 items"),
        ({"ports": ""}, "the token's ports cannot be read"),
        ({"ports": "0"}, "the token's ports cannot be read: '0' came"),
        ({"ports": "2299-2200"}, "the token's ports cannot be read"),
        ({"ports": "65536"}, "the token's ports cannot be read"),
        ({"ports": [True]}, "the token's ports cannot be read: an item came that is not a port"),
        ({"ports": [22.0]}, "the token's ports cannot be read: an item came that is not a port"),
        ({"ports": 22}, "the token's ports cannot be read: neither text nor a list"),
        ({"ports": "٢٢"}, "the token's ports cannot be read"),
    ],
)
def test_reject_claim(changes, why, monkeypatch):
    now = int(time.time())
    monkeypatch.setattr(time, "time", lambda: float(now))
    changes = {name: v(now) if callable(v) else v for name, v in changes.items()}
    assert reason(Credentials(SECRET), token(**changes)).startswith(why)


@pytest.mark.parametrize("ahead", [-2 * HOUR, 2 * HOUR])
def test_stranger_learns_nothing_about_the_gateways_clock(ahead):
    now = int(time.time()) + ahead
    bad = token("another secret, another secret, another secret", iat=now, exp=now + 60)
    assert "clock" not in reason(Credentials(SECRET), bad)


@pytest.mark.parametrize(
    ("bad", "why"),
    [
        ("", "the token is malformed"),
        ("no token", "the token is malformed"),
        ("a.b.c", "the token cannot be read"),
        ("a.b", "the token is malformed"),
        ("\ud800", "the token is malformed"),
        (token() + "=", "the token is malformed"),
        (token() + "\n", "the token is malformed"),
        (token() + ".x", "the token is malformed"),
        ("x" * (MAX_TOKEN + 1), "the token has 65537 characters, expected at most 65536"),
        (token(secret=OTHER_SECRET), NO_FIT),
        (token(algorithm="HS384"), "the token's algorithm is HS384, expected HS256"),
        (token(algorithm="HS512"), "the token's algorithm is HS512, expected HS256"),
        (hand_made({"alg": "HS256"}, {}, SECRET, "HS512"), NO_FIT),
        (hand_made({"alg": "none"}, {"exp": 1}), "the token's algorithm is none, expected HS256"),
        (
            hand_made({"alg": "none"}, {"exp": 1}).rpartition(".")[0] + ".",
            "the token's algorithm is none",
        ),
        (hand_made({"alg": "NONE"}, {"exp": 1}), "the token's algorithm is NONE"),
        (hand_made({"alg": "RS256"}, {"exp": 1}), "the token's algorithm is RS256"),
        (hand_made({"alg": ["HS256"]}, {"exp": 1}), "the token's algorithm is missing"),
        (hand_made({"alg": "\n\x1b" * 500}, {"exp": 1}), "the token's algorithm is \\n\\x1b"),
        (hand_made({}, {"exp": 1}), "the token's algorithm is missing"),
        (hand_made({"alg": "HS256", "crit": ["b64"]}, {"exp": 1}), "the token"),
        (hand_made({"alg": "HS256", "kid": 5}, {"exp": 1}), "the token cannot be read"),
        (hand_made(["alg"], {"exp": 1}), "the token cannot be read"),
        (hand_made({"alg": "HS256"}, ["exp"]), "the token's claims cannot be read"),
        (hand_made({"alg": "HS256"}, "exp"), "the token's claims cannot be read"),
        (token()[:-3], NO_FIT),
        (token() + "x", NO_FIT),
        (token().rpartition(".")[0] + ".", NO_FIT),
    ],
)
def test_reject_token(bad, why):
    assert reason(Credentials(SECRET), bad).startswith(why)


def test_deep_claims_are_refused():
    part = base64.urlsafe_b64encode(b'{"a":' + b"[" * 20_000).rstrip(b"=").decode()
    head = token().partition(".")[0]
    credentials = Credentials(SECRET)
    why = reason(credentials, f"{head}.{part}.xxxx")
    assert why.startswith("the token's claims cannot be read")
    assert reason(credentials, f"{part}.{part}.xxxx").startswith("the token cannot be read")


def test_changed_claims_do_not_fit_the_signature():
    head, _, signature = token().split(".")
    _, claims, _ = token(iss="somebody else").split(".")
    assert reason(Credentials(SECRET), f"{head}.{claims}.{signature}") == NO_FIT


def test_clocks_may_differ_by_the_leeway():
    now = int(time.time())
    slow = token(iat=now + CLOCK_LEEWAY - 5, nbf=now + CLOCK_LEEWAY - 5, exp=now + CLOCK_LEEWAY)
    fast = token(iat=now - HOUR, exp=now - CLOCK_LEEWAY + 5.5)
    assert [Credentials(SECRET).identify(made).issuer for made in (slow, fast)] == ["agent"] * 2


def test_issuer_must_be_the_one_that_is_asked_for():
    credentials = Credentials(SECRET, issuer="mine")
    assert credentials.identify(token(iss="mine")) == Identity("mine")
    for other in ("yours", "", None, "min"):
        assert "expected another one" in reason(credentials, token(iss=other))


def test_no_message_shows_the_token_or_the_secret():
    bad = token(secret=OTHER_SECRET)
    with pytest.raises(TokenInvalid) as caught:
        Credentials(SECRET).identify(bad)
    assert SECRET not in str(caught.value) and bad not in str(caught.value)


# --- Token, file, claim: the verdict ------------------------------------------------------------

MAY_MINE = "this credential may claim a.example.com, *.dev.example.com"


@pytest.mark.parametrize(
    ("bearer", "claims", "hostname", "verdict"),
    [
        # The shared secret may claim all but wildcards; what its token names narrows that.
        ("shared", {}, "a.example.com", None),
        ("shared", {}, "*.dev.example.com", "a wildcard needs a credential that names"),
        ("shared", {"hosts": "a.example.com"}, "a.example.com", None),
        ("shared", {"hosts": "A.Example.COM."}, "a.example.com", None),
        ("shared", {"hosts": " a.example.com , b.example.com "}, "b.example.com", None),
        ("shared", {"hosts": ["a.example.com"]}, "b.example.com",
         "this credential may claim a.example.com"),
        ("shared", {"hosts": ["a.example.com"]}, "xa.example.com", "this credential"),
        ("shared", {"hosts": ["a.example.com"]}, "x.a.example.com", "this credential"),
        ("shared", {"hosts": ["*.dev.example.com"]}, "x.dev.example.com", None),
        ("shared", {"hosts": ["*.dev.example.com"]}, "x.y.dev.example.com", None),
        ("shared", {"hosts": ["*.dev.example.com"]}, "*.dev.example.com", None),
        ("shared", {"hosts": ["*.dev.example.com"]}, "*.b.dev.example.com", None),
        ("shared", {"hosts": ["*.dev.example.com"]}, "dev.example.com", "this credential"),
        ("shared", {"hosts": ["*.dev.example.com"]}, "xdev.example.com", "this credential"),
        ("shared", {"hosts": ["*.dev.example.com"]}, "*.example.com", "this credential"),
        ("shared", {"hosts": ["x.dev.example.com"]}, "*.dev.example.com", "this credential"),
        ("shared", {"hosts": ["bücher.example.com"]}, "xn--bcher-kva.example.com", None),
        ("shared", {"hosts": ["*.Bücher.example.com"]}, "a.xn--bcher-kva.example.com", None),
        ("shared", {"hosts": ["ａ.example.com"]}, "a.example.com", None),  # full width
        # An agent of the file may claim what stands there.
        ("mine", {}, "a.example.com", None),
        ("mine", {}, "x.dev.example.com", None),
        ("mine", {}, "*.dev.example.com", None),
        ("mine", {}, "dev.example.com", MAY_MINE),
        ("mine", {}, "b.example.com", MAY_MINE),
        ("mine", {}, "*.example.com", MAY_MINE),
        ("wide", {}, "a.example.com", None),
        ("wide", {}, "*.dev.example.com", None),
        ("wide", {}, "example.com", "this credential may claim *.example.com"),
        # Both must allow.
        ("mine", {"hosts": "a.example.com"}, "a.example.com", None),
        ("mine", {"hosts": "a.example.com"}, "x.dev.example.com",
         "this credential may claim a.example.com"),
        ("mine", {"hosts": "*.example.com"}, "a.example.com", None),
        ("mine", {"hosts": "*.example.com"}, "x.dev.example.com", None),
        ("mine", {"hosts": "*.example.com"}, "b.example.com", MAY_MINE),
        ("mine", {"hosts": "*.example.com"}, "*.example.com", MAY_MINE),
        ("mine", {"hosts": "b.example.com"}, "b.example.com", "this credential may claim none"),
        ("mine", {"hosts": "*.x.dev.example.com"}, "y.x.dev.example.com", None),
        ("mine", {"hosts": "*.x.dev.example.com"}, "y.dev.example.com",
         "this credential may claim *.x.dev.example.com"),
    ],
)  # fmt: skip
def test_verdict_on_a_hostname(credentials, bearer, claims, hostname, verdict):
    made = token(**claims) if bearer == "shared" else own_token(bearer, **claims)
    why = credentials.identify(made).why_not(hostname)
    assert why == verdict if verdict is None else why.startswith(verdict)


@pytest.mark.parametrize(
    ("bearer", "claims", "port", "verdict"),
    [
        ("shared", {}, 22, None),
        ("shared", {"ports": []}, 22, "this credential may have no public port"),
        ("shared", {"ports": "22"}, 22, None),
        ("shared", {"ports": ["22", 80]}, 80, None),
        ("shared", {"ports": "22"}, 23, "this credential may have the ports 22"),
        ("wide", {}, 22, "this credential may have no public port"),
        ("wide", {"ports": "22"}, 22, "this credential may have no public port"),
        ("mine", {}, 2200, None),
        ("mine", {}, 2299, None),
        ("mine", {}, 2300, "this credential may have the ports 2200-2299, 5432"),
        ("mine", {"ports": "2250-9999"}, 5432, None),
        ("mine", {"ports": "22-2250"}, 2251, "this credential may have the ports 2200-2250"),
        ("mine", {"ports": "1-21"}, 21, "this credential may have no public port"),
    ],
)
def test_verdict_on_a_port(credentials, bearer, claims, port, verdict):
    made = token(**claims) if bearer == "shared" else own_token(bearer, **claims)
    assert credentials.identify(made).why_not_port(port) == verdict


@pytest.mark.parametrize(
    ("made", "why"),
    [
        # An issuer of the file is checked by its own secret alone.
        (lambda: token(iss="mine"), NO_FIT),
        (lambda: token(secret_of("wide"), iss="mine"), NO_FIT),
        (lambda: token(secret_of("mine"), iss="agent"), NO_FIT),
        (lambda: token(secret_of("mine"), iss=None), NO_FIT),
        (lambda: token(secret_of("mine"), iss="Mine"), NO_FIT),
        # What the file says of it is for who has its secret.
        (lambda: own_token("off"), "issuer off is disabled in AGENTS_FILE"),
        (lambda: token(iss="off"), NO_FIT),
        (lambda: own_token("old"), "issuer old expired in AGENTS_FILE "),
        (lambda: token(iss="old"), NO_FIT),
        (lambda: own_token("mine", exp=1), "the token expired"),
        (lambda: own_token("mine", exp=None), "the token has no exp"),
    ],
)
def test_token_of_the_wrong_hands_is_refused(credentials, made, why):
    assert reason(credentials, made()).startswith(why)


def test_issuer_of_the_shared_secret_does_not_bind_agents_of_the_file(path):
    credentials = Credentials(SECRET, "agent", path)
    assert credentials.identify(own_token("mine")).issuer == "mine"
    assert credentials.identify(token()).issuer == "agent"


def test_without_a_shared_secret_only_agents_of_the_file_come_in(path):
    credentials = Credentials(None, agents_file=path)
    assert credentials.identify(own_token("mine")).issuer == "mine"
    for secret in (SECRET, "", "None", secret_of("mine")):
        assert reason(credentials, token(secret or "x", iss="nobody")) == NO_FIT
    assert reason(credentials, hand_made({"alg": "HS256"}, {"exp": 1}, "")) == NO_FIT


def test_identity_says_what_it_is_known_by(credentials):
    mine, other = credentials.identify(own_token("mine")), credentials.identify(own_token("mine"))
    assert (mine.name, mine.credential, mine.entry.expires) == ("mine", ("agent", "mine"), None)
    assert mine.limits == Limits(hostnames=3, streams=None, visits=7)
    assert mine.credential == other.credential and hash(mine) == hash(other)
    shared = credentials.identify(token(iss="a\nb"))
    assert (shared.name, shared.credential) == ("a\\nb", ("shared", "a\nb"))
    assert shared.limits == Limits() and shared.hosts is None and shared.ports is None
    assert "secret of" not in repr(mine) + repr(credentials) + repr(mine.entry)


def test_long_lists_are_cut_in_the_verdict():
    hosts = [f"host-{number}.example.com" for number in range(256)]
    why = Credentials(SECRET).identify(token(hosts=hosts)).why_not("x.example.com")
    assert len(why) < 400 and why.endswith(" more") and "host-0.example.com, " in why


# --- The file changes ---------------------------------------------------------------------------


def rewrite(path, *pairs):
    text = path.read_text()
    for old, new in pairs:
        assert old in text
        text = text.replace(old, new)
    write(path, text)


def settle(path, monkeypatch, seconds=60):
    """Let the file be old enough that its time tells each change."""
    past = time.time() + seconds
    monkeypatch.setattr(time, "time", lambda: past)


def look_twice(credentials):
    """What changed a moment ago is left for the second look."""
    return credentials.reload() or credentials.reload()


@pytest.mark.parametrize(
    ("old", "new", "why"),
    [
        ("mine:\n", "yours:\n", "issuer mine was removed from AGENTS_FILE"),
        ("hosts: a.", "disabled: true\n  hosts: a.", "issuer mine is disabled in AGENTS_FILE"),
        ("hosts: a.", "expires: 2020-01-01\n  hosts: a.", "issuer mine expired in AGENTS_FILE "),
        ("of mine", "anew", "the secret of issuer mine was changed in AGENTS_FILE"),
        ("5432", "5433", "the ports of issuer mine were changed in AGENTS_FILE"),
        ("visits: 7", "visits: 8", "the limits of issuer mine were changed in AGENTS_FILE"),
        ("*.dev", "*.dev2", "issuer mine may no longer claim x.dev.example.com"),
        ("a.example.com,", "b.example.com,", "issuer mine may no longer claim a.example.com"),
        (", *.dev", ", b.example.com, *.dev", None),
        ("secret of wide", "secret of all", None),
        ("hosts: a.", "expires: 2999-01-01\n  hosts: a.", None),
    ],
)
def test_session_of_what_was_taken_away_must_end(credentials, path, old, new, why):
    mine = credentials.identify(own_token("mine"))
    hostnames = ["a.example.com", "x.dev.example.com"]
    assert credentials.why_revoked(mine, hostnames) is None
    rewrite(path, (old, new))
    assert credentials.why_revoked(mine, hostnames) is None  # not yet read
    assert look_twice(credentials) is True
    verdict = credentials.why_revoked(mine, hostnames)
    assert verdict == why if why is None else verdict.startswith(why)
    assert look_twice(credentials) is False


def test_session_ends_when_its_entry_runs_out(credentials, path, monkeypatch):
    rewrite(path, ("hosts: a.", "expires: 2999-01-01T00:00Z\n  hosts: a."))
    assert look_twice(credentials)
    mine = credentials.identify(own_token("mine"))
    assert mine.entry.expires is not None and credentials.why_revoked(mine) is None
    monkeypatch.setattr(time, "time", lambda: mine.entry.expires + 7)
    assert credentials.why_revoked(mine) == "issuer mine expired in AGENTS_FILE 7 s ago"


def test_session_of_the_shared_secret_ends_when_its_issuer_gets_one_of_its_own(credentials, path):
    agent, other = credentials.identify(token()), credentials.identify(token(iss="other"))
    rewrite(path, ("wide:\n", "agent:\n"))
    assert look_twice(credentials)
    why = credentials.why_revoked(agent)
    assert why == "issuer agent has got a secret of its own in AGENTS_FILE"
    assert credentials.why_revoked(other, ["any.example.com"]) is None


def test_without_a_file_nothing_changes():
    credentials = Credentials(SECRET)
    assert credentials.reload() is False and credentials.reload(force=True) is False
    assert credentials.why_revoked(Identity("agent"), ["a.example.com"]) is None


@pytest.mark.parametrize(
    "breaks",
    [
        lambda path: path.unlink(),
        lambda path: path.write_text(""),
        lambda path: path.write_text(FILE[: len(FILE) // 2]),
        lambda path: path.write_text(FILE + "more: [\n"),
        lambda path: path.write_bytes(b"\xff"),
        lambda path: (path.unlink(), path.mkdir()),
    ],
)
def test_broken_file_changes_nothing_and_is_named_once(credentials, path, caplog, breaks):
    mine = credentials.identify(own_token("mine"))
    caplog.set_level(logging.INFO)
    breaks(path)
    assert not any(credentials.reload(force=force) for force in (False, False, True, False, False))
    (record,) = (record for record in caplog.records if record.levelno == logging.ERROR)
    message = record.getMessage()
    assert message.startswith(f"AGENTS_FILE {path}: ") and "the entries read before stay" in message
    assert "\n" not in message and "secret of" not in message
    assert credentials.why_revoked(mine, ["a.example.com"]) is None
    assert credentials.identify(own_token("mine")) == mine

    if path.is_dir():
        path.rmdir()
    write(path, FILE)
    assert look_twice(credentials) is False  # it is as it was
    assert "can be read again" in caplog.text
    path.write_text("")
    look_twice(credentials)
    assert sum(record.levelno == logging.ERROR for record in caplog.records) == 2


def test_secret_in_a_file_of_its_own_is_read_again(tmp_path):
    path, own = tmp_path / "agents.yaml", tmp_path / "mine.secret"
    write(own, secret_of("mine") + "\n")
    write(path, "mine: {secret_file: mine.secret, hosts: a.example.com}\n")
    credentials = Credentials(None, agents_file=path)
    mine = credentials.identify(own_token("mine"))
    own.unlink()
    assert look_twice(credentials) is False and credentials.why_revoked(mine) is None
    write(own, secret_of("somebody else"))
    assert look_twice(credentials) is True
    assert "secret of issuer mine was changed" in credentials.why_revoked(mine)


def test_file_that_did_not_change_is_not_read_again(credentials, path, monkeypatch):
    settle(path, monkeypatch)
    assert credentials.reload() is False  # now it knows its time
    opened, real_open = [], os.open

    def open_and_tell(*given):
        opened.append(given)
        return real_open(*given)

    monkeypatch.setattr(os, "open", open_and_tell)
    assert credentials.reload() is False and opened == []
    assert credentials.reload(force=True) is False and opened
    os.utime(path, (1, 1))
    del opened[:]
    assert credentials.reload() is False and opened


def test_file_that_was_just_written_is_read_again_even_if_its_time_stays(path, monkeypatch):
    """Two writes within one tick of the file system's clock look alike."""
    stamp = agents_file.Stamp(changed=time.time_ns(), size=1, inode=1)
    monkeypatch.setattr(agents_file, "_stamp", lambda _: stamp)
    credentials = Credentials(SECRET, agents_file=path)
    rewrite(path, ("mine:", "ours:"))
    assert look_twice(credentials) is True
    settle(path, monkeypatch)
    credentials.reload()
    rewrite(path, ("ours:", "mine:"))
    assert credentials.reload() is False  # no clock is that coarse


def test_file_that_is_being_written_is_left_until_it_rests(credentials, path, monkeypatch):
    """The half of a file that is saved in place can be whole YAML, and an end to the other half."""
    monkeypatch.setattr(agents_file, "FRESH", HOUR)  # until then, all that is done here is recent
    wide = credentials.identify(own_token("wide"))
    whole = path.read_text()
    path.write_text(whole[: whole.index("wide:")])
    assert credentials.reload() is False and credentials.why_revoked(wide) is None
    path.write_text(whole)
    assert credentials.reload() is False and credentials.reload() is False
    assert credentials.why_revoked(wide) is None
    rewrite(path, ("wide:\n", "ours:\n"))
    settle(path, monkeypatch, 2 * HOUR)
    assert credentials.reload() is True  # old enough at the first look
    path.write_text(whole)
    assert credentials.reload(force=True) is True  # who asks for it has written it


def test_file_that_names_a_secret_that_is_not_there_yet_is_read_when_it_is(
    credentials, path, monkeypatch
):
    rewrite(path, ('secret: "secret of wide, for these tests alone"', "secret_file: wide.secret"))
    settle(path, monkeypatch)
    assert credentials.reload() is False and credentials.reload() is False
    write(path.parent / "wide.secret", "another secret of wide, to be sure")
    assert credentials.reload() is True


def test_missing_file_is_refused_with_advice(tmp_path):
    with pytest.raises(AgentsFileError) as caught:
        Credentials(SECRET, agents_file=tmp_path / "none.yaml")
    assert "there is no such file" in str(caught.value)
    assert "gotunnel-server agents add NAME --hosts" in str(caught.value)


def test_warnings_of_the_file_are_logged_once(path, caplog):
    rewrite(path, ("secret of wide, for these tests alone", "short"))
    path.chmod(0o644)
    credentials = Credentials(SECRET, agents_file=path)
    credentials.reload(force=True)
    weak, open_to_all = (record.getMessage() for record in caplog.records)
    assert "the secret of wide is shorter than 16 bytes" in weak and "short:" not in weak
    assert "everybody on this machine may read" in open_to_all


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(-1, "0 s"), (59, "59 s"), (60, "1 min"), (3599, "59 min"), (7200, "2 h"), (200_000, "2 d")],
)
def test_length_of_time_is_shown_in_its_largest_unit(seconds, text):
    assert shown_seconds(seconds) == text


def test_the_ports_that_entries_name_by_their_numbers_are_known(tmp_path):
    path = tmp_path / "agents.yaml"
    one, other = secret_of("one"), secret_of("other")
    write(
        path,
        f'one: {{secret: "{one}", hosts: a.example.com, ports: "2222,5400-5499"}}\n'
        f'other: {{secret: "{other}", hosts: b.example.com, ports: "2223"}}\n',
    )
    assert Credentials(None, agents_file=path).named_ports() == {2222, 2223}
