"""Hostnames of every length that there may be, from the registration to a visit, wherever their
certificates come from. Files are named after them, and a file's name has 255 bytes at most."""

import contextlib

import pytest
from hand_made import HandMade, registration
from support import (
    APP,
    GATEWAY_HOST,
    TUNNEL_HOST,
    agent_here,
    answer,
    gateway_here,
    request,
    routes_of,
    wait_until,
)
from test_acme_gateway import fake_house

from gotunnel import Ack
from gotunnel_agent.config import ConfigError
from gotunnel_server.admin.certificates import find_rows
from gotunnel_server.certs.local_ca import Authority
from gotunnel_server.config import load

END = ".localhost"  # which resolves everywhere


def of_length(length):
    """A hostname of so many characters."""
    labels = "abcd" * 64
    body = "".join("." if at % 62 == 61 else labels[at // 62] for at in range(length - len(END)))
    return body + END


LENGTHS = [len(END) + 1, len(END) + 63 - 2, 200, 201, 247, 248, 251, 252, 253]
NAMES = [of_length(length) for length in LENGTHS] + ["e" * 63 + END]
SHORT = "a"  # which resolves nowhere, so no CA is asked for it
TOO_LONG = of_length(254)


@contextlib.contextmanager
def local(tmp_path):
    with gateway_here(tmp_path / "cache") as gateway:
        yield gateway


@contextlib.contextmanager
def cert_dir(tmp_path):
    authority, own = Authority(tmp_path / "cache" / "local"), tmp_path / "own"
    own.mkdir()
    for number, name in enumerate([GATEWAY_HOST, TUNNEL_HOST, SHORT, *NAMES]):
        for file in authority.issue(name):
            (own / f"{number}{file.suffix}").write_bytes(file.read_bytes())
    with gateway_here(tmp_path / "cache", CERT_DIR=str(own), ACME_ENV="") as gateway:
        yield gateway


KINDS = {"local": local, "CERT_DIR": cert_dir, "ACME": fake_house}


@pytest.mark.parametrize("kind", KINDS)
def test_each_length_is_registered_certified_and_visited(kind, tmp_path, origin, caplog):
    origin.serve(lambda target: (target.read_head(), target.send(answer(b"page"))))
    assert sorted({len(name) for name in NAMES})[-3:] == [251, 252, 253]
    (tmp_path / "agent").mkdir()
    names = NAMES if kind == "ACME" else [SHORT, *NAMES]
    with KINDS[kind](tmp_path) as gateway:
        targets = dict.fromkeys(names, origin.port)
        with agent_here(gateway, tmp_path / "agent", targets):
            for name in names:
                wait_until(lambda name=name: gateway.inner.keeper.state(name).is_ready)
                with gateway.dial(name) as visitor:  # which checks the certificate's name
                    for host in (name, f"{name}.:443"):
                        visitor.send(request(host=host))
                        head, body = visitor.read_message()
                        assert (head[:12], body) == (b"HTTP/1.1 200", b"page")
    assert "too long" not in caplog.text and "no certificate" not in caplog.text


@pytest.mark.parametrize("kind", KINDS)
def test_one_character_more_is_refused_in_words(kind, tmp_path):
    with KINDS[kind](tmp_path) as gateway:
        with HandMade(gateway, registration(TOO_LONG)) as agent:
            ack = agent.hear()
        assert isinstance(ack, Ack) and not ack.ok
        assert ack.error.startswith("invalid hostname: ") and "expected letters" in ack.error
        with pytest.raises(ConfigError, match="hostname: 'aaa.* came, expected a hostname"):
            with agent_here(gateway, tmp_path, {TOO_LONG: 1}):
                pass


def test_a_long_name_of_the_local_ca_outlives_a_restart_and_is_told_by_its_name(tmp_path):
    name = of_length(253)
    file, _ = Authority(tmp_path / "local").issue(name)
    before = file.read_bytes()
    again = Authority(tmp_path / "local")
    assert again.issue(name)[0].read_bytes() == before
    assert again.issue(name[: -1 - len(END)] + "z" + END)[0] != file
    assert again.hostnames() == []  # it is made, or found, when its agent is back
    environment = {
        "GATEWAY_HOST": GATEWAY_HOST, "TUNNEL_HOST": TUNNEL_HOST, "JWT_SECRET": "x" * 40,
        "ACME_ENV": "local", "ACME_CACHE": str(tmp_path),
    }  # fmt: skip
    assert name in {row.name for row in find_rows(load(None, environment))}


def test_what_a_disk_refuses_at_a_registration_is_that_hostnames_alone(cache, monkeypatch, caplog):
    with gateway_here(cache) as gateway:
        certificates = gateway.inner._certificates
        ensure = certificates.ensure

        def refuse(hostname):
            if hostname == APP:
                raise OSError(36, "File name too long")
            return ensure(hostname)

        monkeypatch.setattr(certificates, "ensure", refuse)
        with HandMade(gateway, registration(APP, GATEWAY_HOST.replace("gateway", "b"))) as agent:
            assert agent.hear().ok
        assert f"{APP}: [Errno 36] File name too long" in caplog.text


def test_a_bug_at_a_registration_is_told_as_one(cache, monkeypatch, caplog):
    with gateway_here(cache) as gateway:
        monkeypatch.setattr(gateway.inner.tunnels, "ensure_certificates", None)
        with HandMade(gateway, registration(APP)) as agent:
            ack = agent.hear()
        assert not ack.ok and "by a bug of the gateway" in ack.error
        wait_until(lambda: routes_of(gateway.inner) == set())
    assert "TypeError" in caplog.text
