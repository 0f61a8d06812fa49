"""Tokens: what proves who somebody is, and what does not."""

import base64
import hashlib
import hmac
import json
import time

import jwt
import pytest

from gotunnel import TokenInvalid
from gotunnel_agent.agent import make_token
from gotunnel_server.credentials import CLOCK_LEEWAY, Credentials, Identity

SECRET = "only for tests, " * 4  # 64 bytes: long enough for HS512 too
OTHER_SECRET = SECRET[::-1]
HOUR = 3600


def token(secret=SECRET, algorithm="HS256", **changes):
    """A token as agents make it, with changed claims; None leaves one out."""
    now = int(time.time())
    claims = {"iss": "agent", "iat": now, "exp": now + HOUR, **changes}
    claims = {name: value for name, value in claims.items() if value is not None}
    return jwt.encode(claims, secret, algorithm)


def hand_made(head, claims, secret=SECRET):
    """A token whose parts are what they are, by nobody's library (RFC 7515 §3.1)."""
    signed = b".".join(
        base64.urlsafe_b64encode(json.dumps(part).encode()).rstrip(b"=") for part in (head, claims)
    )
    digest = hmac.new(secret.encode(), signed, hashlib.sha256).digest()
    return (signed + b"." + base64.urlsafe_b64encode(digest).rstrip(b"=")).decode()


def test_token_of_our_own_agent_is_accepted():
    assert Credentials(SECRET).identify(make_token(SECRET, "mine", HOUR)) == Identity("mine")


def test_token_made_by_hand_is_accepted():
    """As a Go agent would: no library of ours at either end."""
    now = int(time.time())
    claims = {"iss": "go", "iat": now, "exp": now + HOUR}
    made = hand_made({"alg": "HS256", "typ": "JWT"}, claims)
    assert Credentials(SECRET).identify(made) == Identity("go")


@pytest.mark.parametrize("changes", [{"iss": None}, {"aud": "someone"}, {"iat": None}, {"more": 1}])
def test_claims_that_do_not_matter_may_be_there_or_not(changes):
    assert isinstance(Credentials(SECRET).identify(token(**changes)), Identity)


def test_token_without_an_issuer_speaks_for_nobody_in_particular():
    assert Credentials(SECRET).identify(token(iss=None)) == Identity("")


@pytest.mark.parametrize(
    "bad",
    [
        "",
        "no token",
        "a.b.c",
        "\ud800",
        token(secret=OTHER_SECRET),
        token(exp=None),
        token(exp=int(time.time()) - HOUR),
        token(exp="soon"),
        token(nbf=int(time.time()) + HOUR),
        token(iat=int(time.time()) + HOUR),
        token(algorithm="HS384"),
        token(algorithm="HS512"),
        jwt.encode({"exp": int(time.time()) + HOUR}, None, "none"),
        hand_made({"alg": "none"}, {"exp": int(time.time()) + HOUR}),
        hand_made({"alg": "RS256"}, {"exp": int(time.time()) + HOUR}),
        hand_made({}, {"exp": int(time.time()) + HOUR}),
        hand_made({"alg": "HS256"}, ["exp"]),
        token()[:-2],
        token() + "x",
    ],
)
def test_reject_token(bad):
    with pytest.raises(TokenInvalid):
        Credentials(SECRET).identify(bad)


def test_changed_claims_do_not_fit_the_signature():
    head, _, signature = token().split(".")
    _, claims, _ = token(iss="somebody else").split(".")
    with pytest.raises(TokenInvalid):
        Credentials(SECRET).identify(f"{head}.{claims}.{signature}")


def test_clocks_may_differ_by_the_leeway():
    now = int(time.time())
    slow = token(iat=now + CLOCK_LEEWAY - 5, exp=now + CLOCK_LEEWAY)
    fast = token(iat=now - HOUR, exp=now - CLOCK_LEEWAY + 5)
    assert [Credentials(SECRET).identify(made).issuer for made in (slow, fast)] == ["agent"] * 2


def test_issuer_must_be_the_one_that_is_asked_for():
    credentials = Credentials(SECRET, issuer="mine")
    assert credentials.identify(token(iss="mine")) == Identity("mine")
    for other in ("yours", "", None):
        with pytest.raises(TokenInvalid):
            credentials.identify(token(iss=other))


def test_no_message_shows_the_token_or_the_secret():
    bad = token(secret=OTHER_SECRET)
    with pytest.raises(TokenInvalid) as caught:
        Credentials(SECRET).identify(bad)
    assert SECRET not in str(caught.value) and bad not in str(caught.value)
