"""Targets in http mode of another kind than the tunnel says: what the agent's log says to do."""

import contextlib
import ssl

import pytest
from support import (
    APP,
    RAW,
    agent_here,
    answer,
    gateway_here,
    need,
    reserved_port,
    running,
    wait_until,
)

from gotunnel_agent import first_answer
from gotunnel_agent.config import Target, Tunnel
from gotunnel_agent.first_answer import problem_of
from gotunnel_agent.target import Targets
from gotunnel_server.certs.local_ca import Authority

LOGGER = "gotunnel.first_answer"
BAD = "400 Bad Request"
NGINX = b"<center>The plain HTTP request was sent to HTTPS port</center>"
GO = b"Client sent an HTTP request to an HTTPS server.\n"
APACHE = b"Reason: You're speaking plain HTTP to an SSL-enabled server port.<br />\n"
TOMCAT = b"Bad Request\r\nThis combination of host and port requires TLS.\r\n"
ALERT = b"\x15\x03\x01\x00\x02\x02\x46"
SETTINGS = b"\0\0\x06\x04\0\0\0\0\0\0\x03\0\0\0\x64"


def tunnel(target=Target("a", 1), **keys):
    return Tunnel("a.example", target, "http", **keys)


TLS = Target("a", 1, tls=True)


@pytest.mark.parametrize(
    ("first", "of", "problem"),
    [
        (ALERT, tunnel(), "speaks TLS; write https://a:1 as target"),
        (
            ALERT,
            tunnel(protocol="h2c"),
            "speaks TLS; write https://a:1 as target, and protocol: h2",
        ),
        (
            ALERT,
            tunnel(Target(path="/s")),
            "speaks TLS, which a target that is a unix socket cannot",
        ),
        (ALERT, tunnel(TLS), ""),
        (answer(NGINX, status=BAD), tunnel(), "speaks TLS; write https://a:1 as target"),
        (answer(GO, status=BAD), tunnel(), "speaks TLS; write https://a:1 as target"),
        (answer(APACHE, status=BAD), tunnel(), "speaks TLS; write https://a:1 as target"),
        (answer(TOMCAT, status=BAD), tunnel(), "speaks TLS; write https://a:1 as target"),
        (answer(b"no such page", status=BAD), tunnel(), ""),
        (answer(NGINX, status=BAD), tunnel(TLS), ""),
        (SETTINGS, tunnel(), "speaks HTTP/2; add protocol: h2c to the tunnel"),
        (SETTINGS, tunnel(TLS), "speaks HTTP/2; add protocol: h2 to the tunnel"),
        (answer(), tunnel(protocol="h2c"), "answers in HTTP/1.1; remove protocol from the tunnel"),
        (b"SSH-2.0-OpenSSH_9.2\r\n", tunnel(), "speaks SSH; write mode: tcp"),
        (b"220 mail ESMTP\r\n", tunnel(), "speaks SMTP (mail); write mode: tcp"),
        (b"what is this?", tunnel(), ""),
    ],
)
def test_first_bytes_show_what_is_wrong(first, of, problem):
    assert problem_of(first, of).startswith(problem) and bool(problem_of(first, of)) == bool(
        problem
    )


def lines(caplog):
    return [each.getMessage() for each in caplog.records if each.name == LOGGER]


@pytest.fixture
def gateway(cache):
    with gateway_here(cache) as gateway:
        yield gateway


@contextlib.contextmanager
def serving(gateway, folder, target, **keys):
    tunnels = [{"hostname": APP, "target": target, **keys}]
    with agent_here(gateway, folder, {APP: 0}, tunnels=tunnels):
        yield


def visit(gateway):
    with contextlib.suppress(OSError):
        return gateway.get(APP)[0]


def ended_in_tls(wire, authority):
    """A target with TLS that closes when it does not understand (OpenSSL sends no alert then)."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(*authority.issue("localhost"))
    with contextlib.suppress(OSError):
        wire.sock = context.wrap_socket(wire.sock, server_side=True)


@pytest.mark.parametrize(
    ("first", "keys", "problem"),
    [
        (ALERT, {}, "speaks TLS; write https://localhost:{port} as target"),
        (answer(GO, status=BAD), {}, "speaks TLS; write https://localhost:{port} as target"),
        (SETTINGS, {}, "speaks HTTP/2; add protocol: h2c to the tunnel"),
        (b"SSH-2.0-OpenSSH_9.2\r\n", {}, "speaks SSH; write mode: tcp"),
        (answer(), {"protocol": "h2c"}, "answers in HTTP/1.1; remove protocol from the tunnel"),
    ],
)
def test_visit_to_a_target_of_another_kind_is_told(
    gateway, tmp_path, origin, caplog, first, keys, problem
):
    pytest.importorskip("h2")
    origin.serve(lambda wire: (wire.read(), wire.send(first), wire.finish()))
    with serving(gateway, tmp_path, f"localhost:{origin.port}", **keys):
        visit(gateway)
        wait_until(lambda: lines(caplog))
    said = f"{APP}: target localhost:{origin.port} {problem.format(port=origin.port)}"
    assert lines(caplog) == [said]


def test_target_with_tls_that_closes_without_a_word_is_told_once(
    gateway, tmp_path, origin, cache, caplog
):
    authority = Authority(cache / "local")
    origin.serve(lambda wire: ended_in_tls(wire, authority))
    with serving(gateway, tmp_path, f"localhost:{origin.port}"):
        assert visit(gateway) == 502
        wait_until(lambda: lines(caplog))
        assert visit(gateway) == 502
    port = origin.port
    said = f"{APP}: target localhost:{port} speaks TLS; write https://localhost:{port} as target"
    assert lines(caplog) == [said]


@pytest.mark.parametrize(
    "script",
    [
        lambda wire: (wire.read_head(), wire.send(answer()), wire.finish()),
        lambda wire: (wire.read_head(), wire.send(answer(b"what?", status=BAD)), wire.finish()),
        lambda wire: (wire.read(), wire.finish()),  # a target that is broken
        lambda wire: (wire.read(), wire.reset()),
    ],
)
def test_other_targets_are_left_alone(gateway, tmp_path, origin, caplog, script):
    origin.serve(script)
    with serving(gateway, tmp_path, f"127.0.0.1:{origin.port}"):
        visit(gateway)
    assert lines(caplog) == []


def test_visitor_that_leaves_makes_nobody_look_at_the_target(
    gateway, tmp_path, origin, monkeypatch
):
    looked = []
    monkeypatch.setattr(first_answer, "speaks_tls", lambda target: looked.append(target))
    with serving(gateway, tmp_path, f"127.0.0.1:{origin.port}"):
        with gateway.dial(APP) as visitor:
            visitor.send(b"GET / HTTP/1.1\r\nHost: app.localhost\r\n\r\n")
            with origin.accept() as target:
                target.read_head()
                visitor.reset()
                with contextlib.suppress(OSError):
                    target.read_to_end()
    assert looked == []


def test_nginx_with_tls_behind_a_target_without(gateway, tmp_path, cache, caplog):
    certificate, key = Authority(cache / "local").issue("localhost")
    with reserved_port() as port:
        config = tmp_path / "nginx.conf"
        config.write_text(
            "daemon off; master_process off; pid nginx.pid; error_log stderr warn; events {}\n"
            "http { access_log off; client_body_temp_path b; proxy_temp_path p; "
            "fastcgi_temp_path f; uwsgi_temp_path u; scgi_temp_path s;\n"
            f"server {{ listen 127.0.0.1:{port} ssl; ssl_certificate {certificate}; "
            f"ssl_certificate_key {key}; }} }}\n"
        )
        nginx = (need("nginx"), "-p", str(tmp_path), "-c", str(config))
        target = f"localhost:{port}"
        with running(*nginx, cwd=tmp_path), serving(gateway, tmp_path, target):
            wait_until(lambda: visit(gateway) == 400)
            wait_until(lambda: lines(caplog))
    assert lines(caplog) == [f"{APP}: target {target} speaks TLS; write https://{target} as target"]


def test_a_hostname_gets_one_line_a_minute(monkeypatch):
    now = 1000.0
    monkeypatch.setattr("gotunnel_agent.target.monotonic", lambda: now)
    targets = Targets()
    assert [targets.may_tell(name) for name in (APP, APP, RAW)] == [True, False, True]
    now += first_answer.LOOK_AGAIN
    assert [targets.may_tell(name) for name in (APP, APP)] == [True, False]


def test_target_that_has_just_answered_is_left_alone(gateway, tmp_path, origin, monkeypatch):
    looked = []
    monkeypatch.setattr(first_answer, "speaks_tls", lambda target: looked.append(target))
    wires = iter([answer(), b"", b""])
    origin.serve(lambda wire: (wire.read_head(), wire.send(next(wires)), wire.finish()))
    with serving(gateway, tmp_path, f"127.0.0.1:{origin.port}"):
        assert [visit(gateway), visit(gateway)] == [200, 502]
        assert looked == []
        monkeypatch.setattr("gotunnel_agent.target.LOOK_AGAIN", 0)
        assert visit(gateway) == 502
        wait_until(lambda: looked)
