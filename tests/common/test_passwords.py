"""Passwords and their hashes: scrypt as its RFC has it, the text of a hash, what is refused."""

import pytest

from gotunnel_agent.common.passwords import (
    Hash,
    PasswordError,
    hash_if_plain,
    hash_password,
    valid_user,
)


@pytest.mark.parametrize(
    ("password", "salt", "ln", "r", "p", "digest"),
    [
        # RFC 7914 §12, without the one that takes 1 GiB
        (b"", b"", 4, 1, 1,
         "77d6576238657b203b19ca42c18a0497f16b4844e3074ae8dfdffa3fede21442"
         "fcd0069ded0948f8326a753a0fc81f17e8d3e0fb2e0d3628cf35e20c38d18906"),
        (b"password", b"NaCl", 10, 8, 16,
         "fdbabe1c9d3472007856e7190d01e9fe7c6ad7cbc8237830e77376634b373162"
         "2eaf30d92e22a3886ff109279d9830dac727afb94a83ee6d8360cbdfa2cc0640"),
        (b"pleaseletmein", b"SodiumChloride", 14, 8, 1,
         "7023bdcb3afd7348461c06cd81fd38ebfda8fbba904f8e3ea9b543f6545da1f2"
         "d5432955613f0fcf62d49705242a9af9e61e85dc0d651e40dfcf017b45575887"),
    ],
)  # fmt: skip
def test_scrypt_as_the_rfc_has_it(password, salt, ln, r, p, digest):
    digest = bytes.fromhex(digest)
    assert Hash(ln, r, p, salt, digest).compute(password) == digest


def test_hash_is_the_same_after_being_written_down():
    made = Hash.of(b"password")
    assert Hash.read(str(made)) == made
    assert made.compute(b"password") == made.digest
    assert Hash.of(b"password").salt != made.salt


def test_hash_in_a_configuration_is_taken_as_it_is():
    text = hash_password("password")
    assert hash_if_plain(text) == text


def test_password_in_a_configuration_is_hashed():
    read = Hash.read(hash_if_plain("pa\u0308ss"))
    assert read.compute("p\u00e4ss".encode()) == read.digest  # composed, as browsers send it


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "expected a password of 1 to 1024 bytes"),
        ("x" * 1025, "expected a password of 1 to 1024 bytes"),
        ("a\0b", "without control characters"),
        ("\ud800", "expected a password of 1 to 1024 bytes"),
        ("{SHA}secret", "a hash of another kind came"),
        ("$scrypt$secret", "no hash of the form $scrypt$"),
        (f"$scrypt$ln=17,r=8,p=1${'A' * 22}${'A' * 43}", "expected ln from 10"),
        (f"$scrypt$ln=14,r=8,p=1${'A' * 22}${'A' * 41}", "with incomplete base64 came"),
    ],
)
def test_what_is_neither_a_password_nor_a_hash_is_refused_and_not_shown(text, reason):
    with pytest.raises(PasswordError) as caught:
        hash_if_plain(text)
    assert reason in str(caught.value)
    assert "secret" not in str(caught.value) and "A" * 20 not in str(caught.value)


def test_repr_shows_no_secret():
    made = Hash.of(b"password")
    assert repr(made) == "Hash(ln=14, r=8, p=1)"


@pytest.mark.parametrize(
    ("name", "valid"),
    [
        ("me", True),
        ("j\u00fcrgen", True),
        ("x" * 255, True),
        ("\u00e9" * 128, False),  # 256 bytes
        ("", False),
        ("a:b", False),
        ("a\tb", False),
        ("a\x7f", False),
        ("\ud800", False),
    ],
)
def test_user_name_has_no_colon_and_no_control_character(name, valid):
    assert valid_user(name) is valid
