"""`gotunnel-server status --url`, asked of gateways that run, and of what is none."""

import json
import socket
import threading
from contextlib import closing, contextmanager

import pytest
from support import APP, GATEWAY_HOST, TIMEOUT, agent_here, gateway_here

from gotunnel_agent.common import status_page
from gotunnel_server import cli
from gotunnel_server.admin import remote_status
from gotunnel_server.status import remote

TOKEN = "correct-horse-battery-staple"


@pytest.fixture
def token_file(tmp_path):
    file = tmp_path / "token"
    file.write_text(f"{TOKEN}\n")
    return file


@pytest.fixture
def ask(capsys, token_file, monkeypatch):
    """The exit status, and what was printed."""
    monkeypatch.delenv("DASHBOARD_TOKEN", raising=False)
    monkeypatch.setattr(remote_status, "TIMEOUT", 2)

    def ask(url, *options, file=token_file):
        options = [*options, *(["--token-file", str(file)] if file else [])]
        status = cli.main(["status", "--url", url, *options])
        return status, *capsys.readouterr()

    return ask


@contextmanager
def saying(data):
    """A server that answers each connection so, and its URL."""
    with closing(socket.create_server(("127.0.0.1", 0))) as listening:

        def serve():
            while True:
                try:
                    sock, _ = listening.accept()
                except OSError:
                    return
                with sock:
                    sock.recv(65536)
                    sock.sendall(data)

        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{listening.getsockname()[1]}"
        listening.shutdown(socket.SHUT_RDWR)
    thread.join(TIMEOUT)


def answer(body, status="200 OK", *fields):
    lines = [f"HTTP/1.1 {status}", f"Content-Length: {len(body)}", "Connection: close", *fields]
    return "\r\n".join([*lines, "", body]).encode()


def test_a_gateway_elsewhere_tells_what_the_one_here_does(cache, tmp_path, ask, monkeypatch):
    find = socket.getaddrinfo  # not every system knows names below localhost
    monkeypatch.setattr(socket, "getaddrinfo", lambda host, *rest, **more: find("127.0.0.1", *rest))
    with gateway_here(cache, DASHBOARD_TOKEN=TOKEN) as gateway:
        with agent_here(gateway, tmp_path, {APP: 9}, jwt_issuer="office"):
            by_name = f"https://{GATEWAY_HOST}:{gateway.public_port}/dashboard/"
            here = f"http://127.0.0.1:{gateway.dashboard_port}"
            status, out, err = ask(by_name, "--ca-file", str(gateway.ca_file), "--json")
            assert (status, err) == (0, "")
            told = json.loads(out)
            assert (told["state"], told["host"]) == ("serving", GATEWAY_HOST)
            assert told["hostnames"][0]["hostname"] == APP and told["certificates_total"] == 3
            assert told["sessions"][0]["agent"] == "office" and told["visits"]["ended"] == 0
            monkeypatch.setenv("DASHBOARD_TOKEN", TOKEN)
            status, out, err = ask(here, file=None)
            assert (status, err) == (0, "") and "sessions:" in out and APP in out
            for url, said in (
                (here + "/nowhere", "no state of a gateway is there"),
                (by_name.removesuffix("dashboard/"), "not trusted"),
                (here.replace("http:", "https:"), "is that port one for https?"),
            ):
                status, out, err = ask(url, file=None)
                assert (status, out) == (2, "") and said in err and err.count("\n") == 1
            url = by_name.removesuffix("/dashboard/")
            assert (
                "on GATEWAY_HOST it is /dashboard" in ask(url, "--ca-file", str(gateway.ca_file))[2]
            )
            monkeypatch.setenv("DASHBOARD_TOKEN", "wrong-token-of-some-length")
            assert "the token is wrong" in ask(here, file=None)[2]


def test_a_gateway_without_a_token_shows_no_state(cache, ask):
    with gateway_here(cache) as gateway:
        status, _, err = ask(f"http://127.0.0.1:{gateway.dashboard_port}")
    assert status == 2 and "if it has one" in err


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b"SSH-2.0-x\r\n", "speaks no HTTP without TLS"),
        (b"", "speaks no HTTP"),
        (answer("<html>"), "no state of a gateway is there"),
        (answer("[" * 100_000), "no state of a gateway is there"),
        (answer('{"gateway": 5, "public": true}'), "shows only hostnames"),
        (answer("", "302 Found", "Location: https://evil.example/\x1b[2J"), "it leads to"),
        (answer("no", "500 Oh"), "status 500 came, expected 200"),
        (answer('{"error": "x", "message": "wait\\n5 s"}', "429 Later"), "wait 5 s"),
        (answer('{"error": "x", "message": 5}', "429 Later"), ": 5"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 99\r\n\r\n{", "was cut short"),
    ],
)
def test_what_is_no_gateway_is_said_in_a_line(ask, data, said):
    with saying(data) as url:
        status, out, err = ask(url)
    assert (status, out) == (2, "") and said in err
    assert err.count("\n") == 1 and err.isascii() and "\x1b" not in err and TOKEN not in err


@pytest.mark.parametrize(
    "document",
    [
        {},
        {"sessions": 5, "hostnames": [5, {}], "certificates": {}, "totals": [], "gateway": {}},
        {"sessions": [{"connected_at": "x"}], "hostnames": [{"hostname": "\x1b[2J" * 999}]},
        {"gateway": {"state": "draining", "uptime_seconds": "x" * 9999}},
    ],
)
def test_a_document_of_another_version_is_shown_as_far_as_it_goes(ask, document):
    text = json.dumps({"gateway": {}, **document, "public": False})
    with saying(answer(text)) as url:
        status, out, err = ask(url)
    assert status == 1 and err == "" and "\x1b" not in out


DOCUMENT = {
    "gateway": {
        "host": "gateway.test", "version": "1.0", "state": "serving", "started_at": 1, "now": 9,
        "uptime_seconds": 8,
    },
    "totals": {
        "sessions": 1, "hostnames": 1, "certificates": 1, "visits": 1, "failed": 0, "running": 1,
        "received_bytes": 5, "sent_bytes": 5,
    },
    "sessions": [{
        "agent": "office", "address": "192.0.2.1", "connected_at": 5, "round_trip_ms": 1.5,
        "hostnames": 1, "streams": 1, "visits": 1,
    }],
    "hostnames": [{
        "hostname": "app.test", "mode": "http", "protocol": "", "port": 7, "target": "t",
        "agent": "office", "visits": 1, "failed": 0,
        "certificate": {
            "state": "failed", "days_left": 1, "error_text": "no", "next_order_at": 99,
        },
    }],
    "certificates": [{"hostname": "gateway.test", "state": "ready", "days_left": 1}],
}  # fmt: skip
ODD = (
    None, True, -1, 1.5, 1e308, float("inf"), float("nan"), 10**30, "", "\x1b[2J", "\ud800",
    [], [1, None], [[]], {}, {"a": 1},
)  # fmt: skip


def replaced(value, odd):
    """All copies of a JSON value of which one part is another one."""
    yield odd
    parts = value.items() if isinstance(value, dict) else ()
    if isinstance(value, list):
        parts = enumerate(value)
    for key, part in parts:
        for other in replaced(part, odd):
            copy = value.copy()
            copy[key] = other
            yield copy


@pytest.mark.parametrize("odd", ODD, ids=repr)
def test_no_value_of_a_broken_gateway_breaks_the_answer(odd):
    for document in replaced(DOCUMENT, odd):
        if isinstance(document, dict):
            answer = remote(document)
            json.dumps(answer, allow_nan=False)
            assert "\x1b" not in status_page.render(answer, "1.0")


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("gateway.example.com", "expected one such as https://gateway.example.com/dashboard"),
        ("ftp://x/", "expected one such as"),
        ("https://", "expected one such as"),
        ("https://x:99999/", "expected one such as"),
        ("https://user:pw@x/", "a user, a query or a fragment came"),
        ("https://x/?token=y", "a user, a query or a fragment came"),
        ("https://x/a b", "expected one such as"),
    ],
)
def test_a_wrong_url_is_refused_before_anything_is_sent(ask, url, said):
    status, out, err = ask(url)
    assert (status, out) == (2, "") and said in err and err.count("\n") == 1


def test_a_missing_token_is_asked_for(ask, tmp_path):
    assert "--token-file" in ask("https://x/", file=None)[2]
    (tmp_path / "empty").write_text("\n")
    (tmp_path / "odd").write_bytes(b"a\nb\xff")
    assert "it is empty" in ask("https://x/", file=tmp_path / "empty")[2]
    assert "characters that no token has" in ask("https://x/", file=tmp_path / "odd")[2]
    assert "No such file" in ask("https://x/", file=tmp_path / "none")[2]
    assert "--ca-file" in ask("https://x/", "--ca-file", str(tmp_path / "empty"))[2]


def test_options_for_a_gateway_elsewhere_need_its_url(capsys):
    assert cli.main(["status", "--token-file", "x"]) == 2
    assert "--url" in capsys.readouterr().err


def test_a_name_of_this_machine_that_the_system_does_not_know_is_said(ask, monkeypatch):
    def unknown(*_, **__):
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    monkeypatch.setattr(socket, "create_connection", unknown)
    assert "expected http://localhost:" in ask("http://gateway.localhost:8080")[2]
    assert "Name or service not known" in ask("http://gateway.example.com")[2]


def test_a_gateway_that_refuses_the_connection_or_is_silent_is_said(ask, monkeypatch):
    with closing(socket.create_server(("127.0.0.1", 0))) as listening:
        url = f"http://127.0.0.1:{listening.getsockname()[1]}"
        monkeypatch.setattr(remote_status, "TIMEOUT", 0.2)
        assert "no whole answer in" in ask(url)[2]
    assert "was refused" in ask(url)[2]
