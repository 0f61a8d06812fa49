"""CLUSTER and its companions: what is understood, what is refused; no password is shown."""

import os

import pytest
from support import SECRET

from gotunnel_server.cluster.settings import NODES, ONE, SENTINEL, SOCKET, Address, read_url
from gotunnel_server.config import ConfigError, faults, load

KEY = "cw_0x689RpI-jtRR7oE8h_eQsKImvJapLeSbXpwF4e4="
LEAST = {"GATEWAY_HOST": "gateway.test", "TUNNEL_HOST": "tunnel.test", "JWT_SECRET": SECRET}


@pytest.mark.parametrize(
    "text, found",
    [
        ("redis://localhost", Address(ONE, hosts=(("localhost", 6379),))),
        ("redis://redis_1:7000/3", Address(ONE, hosts=(("redis_1", 7000),), db=3)),
        ("valkeys://v.example/", Address(ONE, tls=True, hosts=(("v.example", 6379),))),
        (
            "rediss://me:p%40s:s%2F@[2001:db8::1]:7000/1",
            Address(ONE, True, (("2001:db8::1", 7000),), db=1, user="me", password="p@s:s/"),
        ),
        ("redis://:pw@h", Address(ONE, hosts=(("h", 6379),), password="pw")),
        ("unix:///run/redis.sock?db=2", Address(SOCKET, path="/run/redis.sock", db=2)),
        (
            "redis+sentinel://a,b:1/main/4",
            Address(SENTINEL, hosts=(("a", 26379), ("b", 1)), master="main", db=4),
        ),
        ("rediss+cluster://a:1,b:2", Address(NODES, True, (("a", 1), ("b", 2)))),
    ],
)
def test_urls_that_are_understood(text, found):
    assert read_url(text) == found


@pytest.mark.parametrize(
    "settings, text",
    [
        ({"CLUSTER": "http://redis"}, "CLUSTER is a URL that begins with http://, expected the UR"),
        ({"CLUSTER": "redis.example.com"}, "CLUSTER is no URL, expected the URL of a Redis server"),
        ({"CLUSTER": "redis://"}, "CLUSTER holds no HOST:PORT"),
        ({"CLUSTER": "redis://h:0"}, "CLUSTER holds no HOST:PORT"),
        ({"CLUSTER": "redis://2001:db8::1"}, "write IPv6 addresses in brackets"),
        ({"CLUSTER": "redis://a,b"}, "CLUSTER names several servers, expected one"),
        ({"CLUSTER": "redis://a/x"}, "a path that is no number of a database"),
        ({"CLUSTER": "redis+cluster://a/1"}, "redis+cluster:// has none"),
        ({"CLUSTER": "redis+sentinel://a"}, "CLUSTER names no master"),
        ({"CLUSTER": "unix://redis.sock"}, "CLUSTER is no unix URL"),
        ({"CLUSTER": "redis://h", "CLUSTER_KEY": ""}, "CLUSTER_KEY_FILE is not set"),
        ({"CLUSTER": "redis://h", "CLUSTER_KEY": "abc"}, "key 1 is none, expected 44 characters"),
        ({"CLUSTER": "redis://h", "CLUSTER_KEY": f"{KEY} {KEY},{KEY}"}, "holds 3 keys"),
        ({"CLUSTER": "redis://h", "CLUSTER_NAME": "a b"}, "CLUSTER_NAME is 'a b', expected"),
        ({"CLUSTER": "redis://h", "CLUSTER_ADDRESS": "a:b"}, "CLUSTER_ADDRESS is 'a:b', expected"),
        ({"CLUSTER": "redis://:x@h", "CLUSTER_PASSWORD": "y"}, "CLUSTER has a password, and"),
        ({"CLUSTER": "redis://a..b"}, "CLUSTER holds no HOST:PORT"),
        ({"CLUSTER": "redis://h", "CLUSTER_ADDRESS": "a..b"}, "CLUSTER_ADDRESS is 'a..b', expec"),
        ({"CLUSTER_NAME": "a"}, "CLUSTER_NAME is set without CLUSTER"),
        ({"CLUSTER_KEY_FILE": os.devnull}, "CLUSTER_KEY_FILE is set without CLUSTER"),
    ],
)
def test_settings_that_are_refused(settings, text):
    with pytest.raises(ConfigError, match=".") as caught:
        load(os.devnull, LEAST | ({"CLUSTER_KEY": KEY} if "CLUSTER" in settings else {}) | settings)
    assert text in str(caught.value)


@pytest.mark.parametrize(
    "alone, text",
    [
        ({"CLUSTER_NAME": "a"}, "CLUSTER_NAME is set without CLUSTER"),
        ({"CLUSTER_KEY": KEY}, "CLUSTER_KEY is set without CLUSTER"),
        ({"CLUSTER_KEY_FILE": os.devnull}, "CLUSTER_KEY_FILE is set without CLUSTER"),
        (
            {"CLUSTER_NAME": "a", "CLUSTER_PASSWORD": "b", "CLUSTER_ADDRESS": "c"},
            "CLUSTER_ADDRESS and CLUSTER_NAME and CLUSTER_PASSWORD are set without CLUSTER",
        ),
    ],
)
def test_what_is_left_of_a_cluster_is_refused_in_one_line(alone, text):
    [line] = faults(os.devnull, LEAST | alone)
    assert line.startswith(text)


@pytest.mark.parametrize(
    "url",
    [
        "redis://me:hunter2@h:x",
        "redis://me:hunter/2@h/x",
        "http://me:hunter2@h",
        "redis+sentinel://:hunter2@h",
        "unix://:hunter2@h",
        "redis://a:hunter2@b,c",
        "redis:/me:hunter2@h",
        "hunter2",
        "http://hunter2",
    ],
)
def test_no_error_shows_a_password(url):
    found = " ".join(faults(os.devnull, LEAST | {"CLUSTER": url, "CLUSTER_KEY": KEY}))
    assert "CLUSTER" in found and "hunter" not in found


def test_nothing_shows_a_password_or_a_key():
    url = "redis://me:hunter2@h"
    config = load(os.devnull, LEAST | {"CLUSTER": url, "CLUSTER_KEY": f"{KEY},{KEY}"})
    assert config.cluster.redis.password == "hunter2" and len(config.cluster.keys) == 2
    assert "hunter2" not in f"{config!r} {config.cluster.redis}" and KEY not in repr(config)


def test_secrets_may_stand_in_files(tmp_path):
    (tmp_path / "key").write_text(f"{KEY}\n")
    (tmp_path / "password").write_text("hunter2\n")
    config = load(
        os.devnull,
        LEAST | {"CLUSTER": "redis://h", "CLUSTER_KEY_FILE": str(tmp_path / "key"),
                 "CLUSTER_PASSWORD_FILE": str(tmp_path / "password")},
    )  # fmt: skip
    assert config.cluster.keys == (KEY,) and config.cluster.redis.password == "hunter2"
    assert set(config.secret_files) == {str(tmp_path / "key"), str(tmp_path / "password")}


@pytest.mark.parametrize(
    "text, address",
    [(None, ("", 0)), ("shared", None), ("Gw1.example", ("Gw1.example", 0)),
     ("[::1]:9443", ("::1", 9443))],
)  # fmt: skip
def test_the_address_of_this_gateway_alone(text, address):
    settings = {"CLUSTER": "redis://h", "CLUSTER_KEY": KEY}
    if text is not None:
        settings["CLUSTER_ADDRESS"] = text
    assert load(os.devnull, LEAST | settings).cluster.address == address
