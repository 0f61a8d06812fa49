"""What a user may type as the target of a quick command."""

import os

import pytest

from gotunnel_agent.config import Target
from gotunnel_agent.quick.targets import BadTarget, read_target

HERE = "localhost"


@pytest.mark.parametrize(
    ("text", "target"),
    [
        ("8080", Target(HERE, 8080)),
        (":8080", Target(HERE, 8080)),
        ("127.0.0.1:3000", Target("127.0.0.1", 3000)),
        ("localhost:3000", Target(HERE, 3000)),
        ("my_service:80", Target("my_service", 80)),
        ("[::1]:80", Target("::1", 80)),
        ("http://web", Target("web", 80)),
        ("http://web:8000/", Target("web", 8000)),
        ("HTTPS://web.lan", Target("web.lan", 443, tls=True)),
        ("https://[fe00::1]", Target("fe00::1", 443, tls=True)),
        ("https://[fe00::1]:8443", Target("fe00::1", 8443, tls=True)),
        ("http://8080", Target(HERE, 8080)),
        ("unix:/run/web.sock", Target(path="/run/web.sock")),
        ("unix:///run/web.sock", Target(path="/run/web.sock")),
        ("unix:web.sock", Target(path=os.path.abspath("web.sock"))),
    ],
)
def test_short_and_long_targets(text, target):
    assert read_target(text) == target


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("0", "no port from 1 to 65535"),
        ("80800", "no port from 1 to 65535"),
        ("web:80800", "no port from 1 to 65535"),
        ("web:http", "no port from 1 to 65535"),
        ("web", "has no port, expected 8080"),
        ("", "has no port"),
        ("web:", "has no port"),
        ("127.0.0.1", "has no port"),
        ("::1", r"IPv6 address without brackets, expected \[::1\]:PORT"),
        ("fe00::1:8080", "IPv6 address without brackets"),
        ("http://", "has no"),
        ("ftp://web:21", "begins with ftp://, expected http:// or https:// or none"),
        ("http://web:80/app", "each visitor's path is passed on as it is"),
        ("http://web?x", "has a path"),
        ("we b:80", "no valid host"),
        ("http://me:correct-horse@web", "^TARGET holds a user or password"),
        ("dist/x", "has a path"),
        ("unix:", "has no path"),
        ("unix:/" + "x" * 200, "more than [0-9]+ bytes"),
        ("1" * 1000, r"^TARGET: '1{253}\.\.\.' has no port"),
    ],
)
def test_refusals_say_what_is_expected(text, said):
    with pytest.raises(BadTarget, match=said) as refused:
        read_target(text)
    assert "correct-horse" not in str(refused.value)


def test_folder_leads_to_its_command(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "dist").mkdir()
    (tmp_path / "8080").mkdir()
    (tmp_path / "index.html").write_text("")
    with pytest.raises(BadTarget, match=r"is a file; `gotunnel files FOLDER` shares"):
        read_target("index.html")
    assert read_target("8080").port == 8080
    for text in (".", "dist", "./dist", str(tmp_path)):
        with pytest.raises(BadTarget, match=f"is a folder; `gotunnel files {text}` shares"):
            read_target(text)
