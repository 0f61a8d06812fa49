"""The grammar of hostnames, row by row."""

import pytest

from gotunnel_agent.common.hostnames import (
    normal_hostname,
    valid_host,
    valid_hostname,
    valid_open_name,
    valid_wildcard,
    why_no_hostname,
)

LABEL = "a" * 63


@pytest.mark.parametrize(
    "name",
    [
        "a", "app.example.com", "APP.Example.COM", "app.example.com.", "xn--bcher-kva.example",
        "1.example", "1a", "a-b.c--d", "localhost", "192.0.2.1.example", LABEL + ".com",
        ".".join([LABEL] * 3 + ["a" * 61]), ".".join([LABEL] * 3 + ["a" * 61]) + ".",
    ],
)  # fmt: skip
def test_valid_hostnames(name):
    assert valid_hostname(name)


@pytest.mark.parametrize(
    "name",
    [
        "", ".", "..", "a..b", ".a", "a.b..", "-a", "a-", "a.-b", "a_b.c", "a b", "a.b:80", "*.a.b",
        "a/b", "a\n", "a.b\n", "\na", "b\u00fccher.example", "\u212a.example", "a\u0661",
        "192.0.2.1", "1", "a.1", "a.1.", "[::1]", "a@b", "a\0b", LABEL + "a.com",
        ".".join([LABEL] * 3 + ["a" * 62]), ".".join([LABEL] * 3 + ["a" * 62]) + ".",
    ],
)  # fmt: skip
def test_invalid_hostnames(name):
    assert not valid_hostname(name)


@pytest.mark.parametrize(
    ("name", "normal"),
    [
        ("a.b", "a.b"), ("A.B", "a.b"), ("a.b.", "a.b"), ("A.b..", "a.b.."), (".", ""), ("", ""),
        ("B\u00fccher.example", "xn--bcher-kva.example"),  # u with dots
        ("bu\u0308cher.example.", "xn--bcher-kva.example"),  # ... as two characters
        ("\uff45xample.com", "example.com"),  # a full width e
        ("a\u3002example\uff0ecom", "a.example.com"),  # other scripts' full stops
        ("*.b\u00fccher.example", "*.xn--bcher-kva.example"),
        ("\u0430pple.com", "xn--pple-43d.com"),  # a Cyrillic a
        ("fa\u00df.de", "fa\u00df.de"),  # ambiguous: IDNA 2003 says fass, IDNA 2008 xn--fa-hia
        ("\u00fc" * 64, "\u00fc" * 64),  # too long a label
        ("\u00fc." * 127 + "de", "\u00fc." * 127 + "de"),  # too long to be converted
    ],
)  # fmt: skip
def test_normal_hostnames(name, normal):
    assert normal_hostname(name) == normal


@pytest.mark.parametrize(
    "name", ["xn--bcher-kva.example", "XN--BCHER-KVA.example", "xn--fa-hia.de", "a.xn--p1ai"]
)
def test_hostnames_of_other_scripts(name):
    assert valid_hostname(name)


@pytest.mark.parametrize(
    "name",
    [
        "xn--example-.com",  # decodes to plain "example"
        "xn--Bcher-kvA-.example",
        "xn--a-ecp.ru",  # not what Punycode would write
        "a.xn---p1ai",  # xn--p1ai in another spelling
        "a.xn--.com",
        "xn--bcher-4va.example.xn--ls8h-",
        "xn--" + "\u00fc".upper().encode("punycode").decode() + ".de",  # a capital letter
        "xn--" + "\uff41".encode("punycode").decode() + ".de",  # a full width one
    ],
)
def test_look_alikes_in_punycode_are_invalid(name):
    assert not valid_hostname(name)


@pytest.mark.parametrize(
    ("name", "valid"),
    [
        ("*.dev.example.com", True), ("*.example.com", True), ("*.example.com.", True),
        ("*", False), ("*.", False), ("*.com", False), ("*.com.", False), ("a.*.com", False),
        ("*.*.example.com", False), ("*a.example.com", False), ("example.com", False),
        ("*.192.0.2.1", False), ("*..com", False), ("", False),
    ],
)  # fmt: skip
def test_wildcards(name, valid):
    assert valid_wildcard(name) is valid


@pytest.mark.parametrize(
    ("name", "valid"),
    [
        ("quick-otter.*", True), ("A.*", True), ("7.*", True), (LABEL + ".*", True),
        ("xn--bcher-kva.*", True), ("*", False), (".*", False), ("*.*", False), ("a.b.*", False),
        ("a*.*", False), ("-a.*", False), ("a_b.*", False), (LABEL + "a.*", False),
        ("a.*.", False), ("a.**", False), ("a\n.*", False), ("a.*\n", False), ("a .*", False),
        ("xn--a-ecp.*", False), ("b\u00fccher.*", False), ("a", False), ("", False),
    ],
)  # fmt: skip
def test_open_names(name, valid):
    assert valid_open_name(name) is valid


@pytest.mark.parametrize(
    "text",
    [
        "intranet", "app.example.com", "APP.example.com.", "app.example.com:8080", "a:1", "a:65535",
        "192.0.2.1", "192.0.2.1:80", "[::1]", "[2001:db8::1]:8080", "[::ffff:192.0.2.1]:80",
    ],
)  # fmt: skip
def test_valid_hosts(text):
    assert valid_host(text)


@pytest.mark.parametrize(
    "text",
    [
        "", ":", ":80", "a:", "a:0", "a:65536", "a:-1", "a:http", "a:80:80", "a:\u0661", "a b",
        "a\n", "a:80\n", "a\r\nX: y", "http://a", "a/b", "user@a", "-a", "a_b", "*.a",
        "999.0.0.1", "::1", "::1:80", "[::1", "::1]", "[a]", "[]", "[::1]80", "[::1]:", "[::g]",
        "[fe80::1%eth0]", "b\u00fccher.example", LABEL + "a", "[192.0.2.1]",
    ],
)  # fmt: skip
def test_invalid_hosts(text):
    assert not valid_host(text)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("my_app.example.com", "no hostname has an underscore (_)"),
        ("https://my_app.example.com/", "leave out the scheme"),
        ("app.example.com/x", "leave out the path"),
        ("app.example.com:443", "leave out the port"),
        ("192.0.2.1", "it is an IP address"),
        ("[2001:db8::1]", "it is an IP address"),
        ("*.com", "behind *. two labels are needed"),
        ("*.localhost", "behind *. two labels are needed"),
        ("a.*.example.com", "a * is for wildcards"),
        ("b\u00fccher.example", "write it in its xn-- form: xn--bcher-kva.example"),
        ("fa\u00df.de", "write it in its xn-- form"),
        ("a b.example", "it has a blank in it"),
        ("a..example", "there is a dot too many"),
        (".example", "there is a dot too many"),
        (LABEL + "a.example", "there are 63 characters at most"),
        (".".join([LABEL] * 4), "it has 255 characters, 253 is the most"),
        ("-a.example", "begins or ends with a hyphen"),
        ("a.example.1", "the last part is never a number"),
        ("a!.example", ""),
        ("", ""),
    ],
)
def test_a_name_that_is_none_comes_with_the_reason(text, reason):
    assert not valid_hostname(text)
    said = why_no_hostname(text)
    assert reason in said and said.startswith("; ") == bool(reason)
