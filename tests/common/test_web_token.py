"""Tokens, compared with those of PyJWT: what either library makes, the other one must read."""

import jwt
import pytest

from gotunnel_agent.common.web_token import Unreadable, read, sign

SECRET = "s" * 40
CLAIMS = {"iss": "müller", "exp": 4_000_000_000, "hosts": ["a.example.com"], "none": None}


@pytest.mark.filterwarnings("ignore:The HMAC key is")
@pytest.mark.parametrize("secret", [SECRET, "short", "ü" * 100])
def test_ours_and_pyjwt_make_and_read_the_same(secret):
    ours = sign(CLAIMS, secret)
    assert jwt.decode(ours, secret, ["HS256"]) == CLAIMS
    for made in (ours, jwt.encode(CLAIMS, secret, "HS256")):
        token = read(made)
        assert token.claims == CLAIMS
        assert token.is_signed_with(secret)
        assert not token.is_signed_with(secret + "x")


def test_each_character_of_a_token_counts():
    made = sign(CLAIMS, SECRET)
    for place, was in enumerate(made):
        changed = made[:place] + ("A" if was != "A" else "B") + made[place + 1 :]
        try:
            token = read(changed)
        except Unreadable:
            continue
        assert not token.is_signed_with(SECRET), place


def test_a_signature_has_one_spelling():
    """The last character of 32 bytes in base64 has two bits to spare."""
    made = sign(CLAIMS, SECRET)
    digits = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_"
    other = digits[digits.index(made[-1]) + 1]
    with pytest.raises(Unreadable, match="cannot be read"):
        read(made[:-1] + other)


@pytest.mark.parametrize("algorithm", ["HS384", "HS512", "none"])
def test_another_algorithm_is_refused_before_any_secret_is_tried(algorithm):
    made = jwt.encode(CLAIMS, None if algorithm == "none" else SECRET * 2, algorithm)
    with pytest.raises(Unreadable, match=f"algorithm is {algorithm}, expected HS256"):
        read(made)


def test_a_header_with_an_extension_that_must_be_understood_is_refused():
    made = jwt.encode(CLAIMS, SECRET, "HS256", headers={"b64": False})
    with pytest.raises(Unreadable):
        read(made)
    made = jwt.encode(CLAIMS, SECRET, "HS256", headers={"crit": ["more"], "more": 1})
    with pytest.raises(Unreadable, match="the token's header has crit, expected none"):
        read(made)
