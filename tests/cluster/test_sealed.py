"""What is sealed for Redis: opened by those with the key, bound to its place, and rotated."""

import base64

import pytest

from gotunnel_server.cluster.sealed import (
    Broken,
    Sealer,
    WrongKey,
    new_key,
)

OLD, NEW, OTHER = (bytes([number]) * 32 for number in range(3))
NAME, CONTENT = "ca/certs/app.example.com.pem", b"-----BEGIN PRIVATE KEY-----\n\x00\xff\n"


def test_what_is_sealed_is_opened_by_every_member_and_shows_nothing():
    sealed = Sealer([OLD]).seal(NAME, CONTENT)
    assert Sealer([OLD]).open(NAME, sealed) == (CONTENT, False)
    assert b"PRIVATE" not in sealed and NAME.encode() not in sealed
    assert base64.urlsafe_b64encode(OLD) not in sealed
    assert Sealer([OLD]).open(NAME, Sealer([OLD]).seal(NAME, b"")).content == b""


def test_while_keys_change_both_open_and_the_first_one_seals():
    before, during, after = Sealer([OLD]), Sealer([NEW, OLD]), Sealer([NEW])
    assert during.open(NAME, before.seal(NAME, CONTENT)) == (CONTENT, True)
    assert after.open(NAME, during.seal(NAME, CONTENT)) == (CONTENT, False)
    assert Sealer([OLD, NEW]).open(NAME, during.seal(NAME, CONTENT)).is_old


def test_a_key_that_is_missing_is_told_from_content_that_was_changed():
    sealed = Sealer([OLD]).seal(NAME, CONTENT)
    with pytest.raises(WrongKey, match="CLUSTER_KEY_FILE of the other members") as raised:
        Sealer([OTHER]).open(NAME, sealed)
    assert NAME in raised.value.strerror and "\n" not in raised.value.strerror
    for place in range(len(sealed)):
        changed = bytearray(sealed)
        changed[place] ^= 1
        with pytest.raises((Broken, WrongKey)):
            Sealer([OLD]).open(NAME, bytes(changed))
    for cut in (b"", sealed[:-1], sealed[:40], CONTENT):
        with pytest.raises(Broken):
            Sealer([OLD]).open(NAME, cut)


def test_content_of_one_place_is_not_taken_at_another():
    with pytest.raises(Broken, match="another name"):
        Sealer([OLD]).open("ca/certs/other.pem", Sealer([OLD]).seal(NAME, CONTENT))


def test_each_new_key_is_another_one_of_32_bytes():
    assert len(base64.urlsafe_b64decode(new_key())) == 32 and new_key() != new_key()
