"""The join string: what it holds, and that no error shows any of it."""

import re

import pytest
from support import ROOT

from gotunnel_agent.common.join_string import JoinString, JoinStringError, parse

HEX = "0123456789abcdef" * 4

ROUND_TRIPS = [
    ("gotunnel://office:5ec7e7@tunnel.example.com:9443",
     JoinString("tunnel.example.com", 9443, "office", "5ec7e7")),
    ("gotunnel://token:aaa.bbb.c_c@tunnel.example.com:9443",
     JoinString("tunnel.example.com", 9443, token="aaa.bbb.c_c")),
    (f"gotunnel://office:5ec7e7@localhost:9443?ca=sha256:{HEX}",
     JoinString("localhost", 9443, "office", "5ec7e7", fingerprint=HEX)),
    ("gotunnel://office:5ec7e7@[2001:db8::1]:9443",
     JoinString("2001:db8::1", 9443, "office", "5ec7e7")),
    ("gotunnel://:5ec7e7@192.0.2.1:1", JoinString("192.0.2.1", 1, "", "5ec7e7")),
    ("gotunnel://an%20office:%C3%A4%40%3A%2F%3F%23%25%21%27@tunnel_1:9443",
     JoinString("tunnel_1", 9443, "an office", "ä@:/?#%!'")),
]  # fmt: skip


@pytest.mark.parametrize(("text", "joined"), ROUND_TRIPS)
def test_is_read_as_it_was_written(text, joined):
    assert parse(text) == joined
    assert str(joined) == text


@pytest.mark.parametrize(
    ("text", "joined"),
    [
        ("  gotunnel://a:b@host.example:1\n", JoinString("host.example", 1, "a", "b")),
        ("'gotunnel://a:b@host.example:1'", JoinString("host.example", 1, "a", "b")),
        ('"gotunnel://a:b@host.example:1/"', JoinString("host.example", 1, "a", "b")),
        ("gotunnel join gotunnel://a:b@h.example:1", JoinString("h.example", 1, "a", "b")),
        ("$ gotunnel-agent join 'gotunnel://a:b@h.io:1'", JoinString("h.io", 1, "a", "b")),
        ("GoTunnel://a:b@HOST.example.:1", JoinString("host.example", 1, "a", "b")),
        (f"gotunnel://a:b@h.example:1?ca=sha256:{HEX.upper()}",
         JoinString("h.example", 1, "a", "b", fingerprint=HEX)),
    ],
)  # fmt: skip
def test_is_read_in_other_spellings(text, joined):
    assert parse(text) == joined


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "no join string came"),
        ("''", "no join string came"),
        ("hunter2", "does not begin with gotunnel://"),
        ("https://office:hunter2@tunnel.example.com", "does not begin with gotunnel://"),
        ("gotunnel://office:hunter2", "cut or incomplete"),
        ("gotunnel://hunter2@tunnel.example.com:9443", "cut or incomplete"),
        ("gotunnel://office:hunter2@", "cut or incomplete"),
        ("gotunnel://office:@tunnel.example.com:9443", "no secret"),
        ("gotunnel://office:%20@tunnel.example.com:9443", "no secret"),
        ("gotunnel://office:hunter2%@tunnel.example.com:9443", "the secret in the join string"),
        ("gotunnel://office:hunter2%ff@tunnel.example.com:9443", "the secret in the join string"),
        ("gotunnel://office:hunter2%0A@tunnel.example.com:9443", "the secret in the join string"),
        ("gotunnel://office:hunter2@hunter2@tunnel.example.com:9443", "neither a hostname"),
        ("gotunnel://off/ice:hunter2@tunnel.example.com:9443", "the name in the join string"),
        ("gotunnel://office:hunter2@tunnel.example.com", "no HOST and port"),
        ("gotunnel://office:hunter2@tunnel.example.com:0", "no HOST and port"),
        ("gotunnel://office:hunter2@tunnel.example.com:99999", "no HOST and port"),
        ("gotunnel://office:hunter2@tunnel.example.com:9443/hunter2", "no HOST and port"),
        ("gotunnel://office:hunter2@2001:db8::1:9443", "no HOST and port"),
        ("gotunnel://office:hunter2@[::12345]:9443", "an IP address that is none"),
        ("gotunnel://office:hunter2@1.2.3:9443", "an IP address that is none"),
        ("gotunnel://office:hunter2@-hunter2-:9443", "neither a hostname nor an IP address"),
        ("gotunnel://office:hunt er2@tunnel.example.com:9443", "a blank or a line break"),
        ("gotunnel://office:hunt\n er2@tunnel.example.com:9443", "a blank or a line break"),
        (f"gotunnel://a:hunter2@h.example:1?ca=sha256:{HEX[1:]}", "has 63 characters"),
        ("gotunnel://a:hunter2@h.example:1?ca", "is cut: copy the whole line"),
        ("gotunnel://a:hunter2@h.example:1?ca=sha256:", "is cut: copy the whole line"),
        ("gotunnel://a:hunter2@h.example:1?ca=md5:hunter2", "update the agent"),
        ("gotunnel://a:hunter2@h.example:1?relay=hunter2", "update the agent"),
        ("gotunnel://office:" + "hunter2" * 10_000 + "@h.example:1", "characters came"),
    ],
)
def test_a_bad_one_is_refused_without_showing_it(text, words):
    with pytest.raises(JoinStringError) as caught:
        parse(text)
    assert words in str(caught.value)
    assert "hunt" not in str(caught.value) and "\n" not in str(caught.value)


def test_no_secret_is_in_its_repr():
    assert "hunter2" not in repr(JoinString("h.example", 1, "office", "hunter2"))
    assert "hunter2" not in repr(JoinString("h.example", 1, token="hunter2"))


@pytest.mark.parametrize(
    "joined",
    [
        JoinString("h.example", 1, "token", "a secret"),  # would be read as a token
        JoinString("H.example", 1, "office", "a secret"),
        JoinString("h.example", 0, "office", "a secret"),
        JoinString("h.example", 1, "office", "two\nlines"),
        JoinString("h.example", 1, "office"),
    ],
)
def test_none_is_written_that_could_not_be_read(joined):
    with pytest.raises(JoinStringError):
        str(joined)


def test_the_examples_of_the_protocol_are_read():
    page = (ROOT / "docs" / "protocol.md").read_text(encoding="utf-8")
    lines = re.search(r"^```text join\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)[1].splitlines()
    assert [str(parse(line)) for line in lines] == lines and len(lines) == 3
    secret, token, pinned = map(parse, lines)
    assert secret.secret == "a secret of thirty-two bytes" and secret.name == "mytunnel"
    assert token.token.count(".") == 2 and token.host == "2001:db8::1"
    assert len(pinned.fingerprint) == 64
