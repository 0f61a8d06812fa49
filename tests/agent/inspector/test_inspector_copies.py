"""Requests as commands for curl and programs in Python: they are run, and the bytes that come are
compared with those that were recorded."""

import queue
import shutil
import subprocess
import sys

import pytest
from support import TIMEOUT, Origin, need

from gotunnel_agent.inspector import copies
from gotunnel_agent.inspector.copies import CannotCopy, as_curl, as_python, copied, quoted

ANSWER = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nConnection: close\r\n\r\nok"


@pytest.fixture(scope="module")
def came():
    """A queue of what has come to a target, and its port."""
    seen = queue.SimpleQueue()

    def script(wire):
        seen.put(wire.read_message())
        wire.send(ANSWER)

    with Origin() as origin:
        origin.serve(script)
        yield seen, origin.port


SHELL = "'\"`$!\\#&;|<>(){}[]*?~ \t%^=@-\n\r x"
BODIES = {
    "none": b"",
    "json": b'{"a": "it\'s", "b": [1, 2]}',
    "shell": SHELL.encode(),
    "lines": b"one\ntwo\r\nthree\n",
    "an at": b"@/etc/passwd",
    "a dash": b"-d x",
    "a bang": b"!!\n!x",
    "utf-8": "Grüße \u202e evil \u2028 \U0001f600".encode(),
    "escapes": b"\x1b[31m red \x07\x08",
    "a digit behind an escape": b"\x01234\x1b9",
    "binary": bytes(range(256)) * 3,
    "nul": b"\0",
    "invalid utf-8": b"\xff\xfe\x80 '",
    "large": b"0123456789abcdef" * 6000,
    "percent": b"%s %d %% \\n \\x41",
    "backslash at the end": b"\\",
}


def request(port, body=b"", method="POST", target="/a?b=c", fields=()):
    lines = [f"{method} {target} HTTP/1.1", f"Host: 127.0.0.1:{port}", "X-Forwarded-Proto: http"]
    lines += [f"{name}: {value}" for name, value in fields]
    if body:
        lines.append(f"Content-Length: {len(body)}")
    return copied(("\r\n".join(lines) + "\r\n\r\n").encode("latin-1"), body, len(body), "app")


def run(words, text=None):
    done = subprocess.run(words, input=text, capture_output=True, timeout=TIMEOUT, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def by_curl(*asked):
    need("curl")
    assert run([need("bash")], "".join(map(as_curl, asked)).encode()) == b"ok" * len(asked)


def by_python(*asked):
    program = "".join(map(as_python, asked))
    assert program.isascii()
    out = run([sys.executable, "-I", "-S", "-c", program])
    assert out.count(b"b'ok'") == len(asked)


def fields_of(head):
    line, *rest = head.decode("latin-1").split("\r\n")
    pairs = [each.partition(":") for each in rest if each]
    return line, [(name, value.strip(" ")) for name, _, value in pairs]


@pytest.mark.parametrize("send", [by_curl, by_python])
def test_bodies_come_as_they_were(came, send):
    """One program sends them all after each other."""
    seen, port = came
    send(*(request(port, body, fields=[("Content-Type", "x/y")]) for body in BODIES.values()))
    for name, body in BODIES.items():
        head, content = seen.get(timeout=TIMEOUT)
        assert (name, content) == (name, body)
        assert head.startswith(b"POST /a?b=c HTTP/1.1\r\n")
        assert b"\r\nContent-Type: x/y\r\n" in head
        assert b"Expect:" not in head


VALUES = [
    "plain",
    "it's",
    '"quoted"',
    "$HOME `id` $(id)",
    "a\\b",
    "!x !!",
    "-dash",
    "@/etc/passwd",
    "tab\there",
    "Gr\xc3\xbc\xc3\x9fe",
    "\xff\xfe",
    "a;b",
    "\xe2\x80\xae bidi",
    "#",
    "~",
    "%s",
    "",
]


@pytest.mark.parametrize("send", [by_curl, by_python])
def test_fields_come_as_they_were(came, send):
    """All in one request: values that a shell, curl or Python could take for something else."""
    seen, port = came
    fields = [(f"X-{number}", value) for number, value in enumerate(VALUES)]
    fields += [("X-Twice", "1"), ("X-Twice", "2"), ("x-lower", "1"), ("X-!#$%&'*+.^_`|~", "odd")]
    send(request(port, method="GET", fields=fields))
    line, found = fields_of(seen.get(timeout=TIMEOUT)[0])
    assert line == "GET /a?b=c HTTP/1.1"
    assert found[0] == ("Host", f"127.0.0.1:{port}")
    values = {name: value for name, value in found[1:] if name != "X-Twice"}
    assert [(name, values.get(name)) for name, _ in fields if name != "X-Twice"] == [
        (name, value) for name, value in fields if name != "X-Twice"
    ]
    assert [value for name, value in found if name == "X-Twice"] == ["1", "2"]
    assert {name.lower() for name in values} == {name.lower() for name, _ in fields} - {"x-twice"}


TARGETS = [
    ("GET", "/", "GET / HTTP/1.1"),
    ("DELETE", "/a/../b/./c//", "DELETE /a/../b/./c// HTTP/1.1"),
    ("GET", "/[1-3]{a,b}?x[]=1", "GET /[1-3]{a,b}?x[]=1 HTTP/1.1"),
    ("GET", "/?q='\"$`!&;|<>()*~", "GET /?q='\"$`!&;|<>()*~ HTTP/1.1"),
    ("GET", "/\xc3\xbc", "GET /%C3%BC HTTP/1.1"),
    ("GET", "/%00%ff", "GET /%00%ff HTTP/1.1"),
    ("PROPFIND", "/-x", "PROPFIND /-x HTTP/1.1"),
    ("OPTIONS", "*", "OPTIONS * HTTP/1.1"),
]


@pytest.mark.parametrize("send", [by_curl, by_python])
def test_methods_and_targets_come_as_they_were(came, send):
    seen, port = came
    send(*(request(port, method=method, target=target) for method, target, _ in TARGETS))
    for _, _, line in TARGETS:
        found, fields = fields_of(seen.get(timeout=TIMEOUT)[0])
        assert found == line
        assert {name for name, _ in fields} == {"Host"}  # nothing that curl or Python adds


def test_head_is_not_waited_for(came):
    seen, port = came
    need("curl")
    run([need("bash")], as_curl(request(port, method="HEAD")).encode())
    assert seen.get(timeout=TIMEOUT)[0].startswith(b"HEAD /a?b=c ")


def test_a_command_is_pasted_without_harm():
    """No control character reaches the terminal, not even within quotes."""
    asked = request(1, b"\x1b[31m\x07 \xe2\x80\xae\r\n" * 3, fields=[("X", "\xc2\x9b31m")])
    shown = as_curl(asked)
    assert all(character.isprintable() or character == "\n" for character in shown)
    assert as_python(asked).isascii()


def test_what_is_of_one_connection_or_of_the_gateway_is_left_out():
    fields = [
        "Connection",
        "Keep-Alive",
        "TE",
        "Upgrade",
        "X-Forwarded-For",
        "X-Real-IP",
        "Forwarded",
        "Proxy-Authorization",
        "Expect",
    ]
    asked = request(1, fields=[*((name, "x") for name in fields), ("X-Mine", "y")])
    assert list(asked.fields) == [("X-Mine", "y")]


def test_it_goes_to_the_hostname_that_the_visitor_used():
    head = b"GET /a HTTP/1.1\r\nHost: app.example.com:8443\r\n\r\n"
    assert "https://app.example.com:8443/a" in as_curl(copied(head, b"", 0, "app.example.com"))
    old = b"GET /a HTTP/1.0\r\nX-Forwarded-Proto: http\r\n\r\n"
    assert "http://app.example.com/a" in as_curl(copied(old, b"", 0, "app.example.com"))
    odd = b"GET /a HTTP/1.1\r\nHost: app\r\nX-Forwarded-Proto: file\r\n\r\n"
    assert copied(odd, b"", 0, "app").scheme == "https"


def test_a_body_that_was_kept_in_part_is_told_of():
    head = b"POST / HTTP/1.1\r\nHost: app\r\nContent-Length: 9\r\n\r\n"
    asked = copied(head, b"12345", 9, "app")
    line = "# Only the first 5 of the body's 9 bytes were kept, the rest is missing.\n"
    assert as_curl(asked).startswith(line)
    assert as_python(asked).startswith(line)


@pytest.mark.parametrize(
    ("head", "words"),
    [
        (b"", "this visit could not be followed"),
        (b"GET\r\n\r\n", "cannot be written down: request line"),
        (b"GET / HTTP/1.1\r\nHost: a b\r\n\r\n", "cannot be written down: host"),
        (b"GET / HTTP/1.1\r\nHost: $(id)\r\n\r\n", "cannot be written down: host"),
        (b"GET / HTTP/1.1\r\n\r\n", "no Host field"),
        (b"CONNECT a:1 HTTP/1.1\r\nHost: a:1\r\n\r\n", "method CONNECT"),
    ],
)
def test_what_cannot_be_copied(head, words):
    with pytest.raises(CannotCopy, match=words[:20]) as raised:
        copied(head, b"", 0, "app")
    assert words in str(raised.value)


@pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")
def test_each_word_is_one_word_for_bash():
    texts = [chr(byte) for byte in range(1, 256)]
    texts += [
        "".join(texts),
        "".join(texts).encode().decode("latin-1"),
        "",
        "-n",
        "~",
        "=x",
        "a=b",
        "\xc3\xbc'\n",
        "\x01" + "7",
        "a\\",
        "$'x'",
    ]
    script = "".join(f"printf '%s\\0' {quoted(text)}\n" for text in texts)
    out = run([shutil.which("bash"), "--posix"], script.encode())
    assert out.split(b"\0")[:-1] == [text.encode("latin-1") for text in texts]


def test_long_bodies_are_no_arguments():
    assert "base64 -d" in as_curl(request(1, b"a" * (copies.MOST_ARGUMENT + 1)))
    assert "--data-raw" in as_curl(request(1, b"a" * copies.MOST_ARGUMENT))
