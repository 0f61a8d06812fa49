"""`gotunnel-server check`: its findings, their words, and its exit status."""

import base64
import contextlib
import errno
import http.server
import io
import json
import os
import re
import resource
import secrets
import socket
import ssl
import subprocess
import sys
import threading
import time
from email.utils import formatdate
from pathlib import Path

import pytest
from fake_ca import DAY, NOW, FakeCa
from operators import APP, URL, config_of, ordering, put_pair, run, tree
from support import (
    GATEWAY_HOST,
    ROOT,
    SECRET,
    TIMEOUT,
    TUNNEL_HOST,
    gateway_environment,
    gateway_here,
    reserved_port,
)

from gotunnel_server import cli
from gotunnel_server.admin import certificates, check
from gotunnel_server.admin.check import FAIL, OK, WARN, Finding
from gotunnel_server.certs.folder import open_store
from gotunnel_server.certs.local_ca import Authority, CertificateError
from gotunnel_server.cluster.settings import Settings, read_url

LINK = f"https://portal.letsencrypt.org/sfe/v1/unpause?jwt={'x' * 900}"


def levels(findings):
    return [finding.level for finding in findings]


# Ports


def test_a_free_port_is_free_afterwards_too():
    with reserved_port() as port:
        for _ in range(2):
            finding = check.look_at_port("HTTP_PORT", ("127.0.0.1",), port, None)
            assert finding == Finding(OK, "HTTP_PORT", f"{port} is free")


@pytest.mark.parametrize("port", [None, 0])
def test_a_port_that_is_off_or_any_is_not_bound(port):
    assert check.look_at_port("HTTP_PORT", ("203.0.113.1",), port, None).level == OK


def test_a_port_of_another_program_fails():
    with socket.create_server(("127.0.0.1", 0)) as listening:
        port = listening.getsockname()[1]
        answering = threading.Thread(target=lambda: listening.accept()[0].close())
        answering.start()
        finding = check.look_at_port("HTTP_PORT", ("127.0.0.1",), port, None)
        answering.join(TIMEOUT)
    assert finding.level == FAIL and f"{port} on 127.0.0.1: in use" in finding.text


def test_an_address_of_another_machine_fails_and_is_not_called(monkeypatch):
    monkeypatch.setattr(socket, "create_connection", None)
    finding = check.look_at_port("GATEWAY_PORT", ("203.0.113.1",), 443, GATEWAY_HOST)
    assert finding.level == FAIL and "correct BIND" in finding.text


@pytest.mark.parametrize(
    ("setting", "attribute", "tls_name"),
    [
        ("GATEWAY_PORT", "public_port", GATEWAY_HOST),
        ("TUNNEL_PORT", "tunnel_port", TUNNEL_HOST),
        ("DASHBOARD_PORT", "dashboard_port", None),
        ("HTTP_PORT", "http_port", None),
        ("METRICS_PORT", "metrics_port", None),
    ],
)
def test_a_port_of_a_gateway_that_runs_is_a_warning(cache, setting, attribute, tls_name):
    with gateway_here(cache, HTTP_PORT="auto", METRICS_PORT="auto") as gateway:
        port = getattr(gateway.inner, attribute)
        finding = check.look_at_port(setting, ("127.0.0.1",), port, tls_name)
    assert finding.level == WARN and "by a running gotunnel gateway" in finding.text


def test_a_gateway_without_a_certificate_of_its_name_is_one_all_the_same(cache):
    with gateway_here(cache) as gateway:
        finding = check.look_at_port(
            "GATEWAY_PORT", ("127.0.0.1",), gateway.public_port, "unknown.localhost"
        )
    assert finding.level == WARN and "by a running gotunnel gateway" in finding.text


@pytest.mark.parametrize(
    ("bind_to", "has_password", "level", "words"),
    [
        ((), False, WARN, "everybody that reaches any address of this machine sees all hostnames"),
        (("0.0.0.0",), False, WARN, "any address of this machine"),
        (("127.0.0.1", "::"), False, WARN, "any address of this machine"),
        (("127.0.0.1", "10.0.0.5"), False, WARN, "everybody that reaches 127.0.0.1, 10.0.0.5 sees"),
        (("127.0.0.1", "::1"), False, OK, "everybody on this machine sees the hostnames"),
        ((), True, OK, "everybody that reaches any address of this machine is asked for its pass"),
        (("127.0.0.1",), True, OK, "everybody on this machine is asked for its password"),
    ],
)
def test_it_says_who_can_see_the_dashboard(bind_to, has_password, level, words):
    finding = check.judge_dashboard(bind_to, has_password)
    assert finding.level == level and words in finding.text
    assert (level == WARN) == ("set DASHBOARD_PASSWORD" in finding.text)


def test_check_looks_at_the_dashboard_where_it_will_be(tmp_path):
    config = config_of(tmp_path, DASHBOARD_BIND="203.0.113.1", DASHBOARD_PORT="1")
    found = {finding.subject: finding for finding in check.examine(config)}
    assert found["DASHBOARD_PORT"].level == FAIL and "203.0.113.1" in found["DASHBOARD_PORT"].text
    assert found["dashboard"].level == WARN and "203.0.113.1" in found["dashboard"].text
    config = config_of(tmp_path, DASHBOARD_PORT="0")
    assert "dashboard" not in {finding.subject for finding in check.examine(config)}


def test_check_names_secrets_that_everybody_can_read(tmp_path):
    secret = tmp_path / "secret"
    secret.write_text(SECRET)
    secret.chmod(0o644)
    config = config_of(tmp_path, JWT_SECRET="", JWT_SECRET_FILE=str(secret))
    key = tmp_path / "local" / "ca.key"
    key.parent.mkdir(mode=0o700)
    key.write_text("no key")
    key.chmod(0o644)
    lines = [finding for finding in check.examine(config) if finding.subject == "secrets"]
    assert levels(lines) == [WARN, WARN]
    assert [finding.text.split(" has mode 0644: everybody")[0] for finding in lines] == [
        str(secret), str(key)
    ]  # fmt: skip
    assert SECRET not in str(lines)
    secret.chmod(0o600)
    key.chmod(0o600)
    assert "secrets" not in {finding.subject for finding in check.examine(config)}


def test_check_names_an_env_file_that_others_can_change(tmp_path):
    path = tmp_path / "server.env"
    path.write_text("LOG_LEVEL=info\n")
    for mode, expected in ((0o644, []), (0o664, [WARN]), (0o646, [WARN])):
        path.chmod(mode)
        findings = list(check.look_at_env_file(str(path)))
        assert levels(findings) == expected
        assert all(f"chmod go-w {path}" in finding.text for finding in findings)


# Reach

PUBLIC = {"GATEWAY_HOST": "gw.example.com", "TUNNEL_HOST": "gw.example.com", "BIND": ""}
ORDERS = {"ACME_ENV": "production", "GATEWAY_PORT": "443", "HTTP_PORT": "80"}


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"GATEWAY_HOST": "gw.localhost", "TUNNEL_HOST": "127.0.0.1", "BIND": "127.0.0.1"}, {}),
        ({}, {}),
        ({"BIND": "127.0.0.1,::1"}, {"BIND": "127.0.0.1, ::1 is for this machine alone"}),
        ({"BIND": "127.0.0.1", "TRUSTED_PROXIES": "127.0.0.1"}, {}),
        ({"BIND": "127.0.0.1,192.0.2.1"}, {}),
        ({"TUNNEL_HOST": "localhost"}, {"TUNNEL_HOST": "beside gw.example.com for the world"}),
        ({"TUNNEL_HOST": "127.0.0.1"}, {"TUNNEL_HOST": "an example's that was left over?"}),
        ({"GATEWAY_HOST": "gw.localhost"}, {"GATEWAY_HOST": "this machine for everybody"}),
        ({"RAW_TCP_HOST": "ssh.localhost"}, {"RAW_TCP_HOST": "ssh.localhost is this machine"}),
        ({"H2C_HOSTS": "*.g.localhost"}, {"H2C_HOSTS": "*.g.localhost is this machine"}),
        (ORDERS, {}),
        (ORDERS | {"GATEWAY_PORT": "8443"}, {}),
        (ORDERS | {"HTTP_PORT": "0"}, {}),
        (ORDERS | {"GATEWAY_PORT": "8443", "HTTP_PORT": "8081"},
         {"orders": "HTTP_PORT is 8081, GATEWAY_PORT 8443: unset one of them"}),
        (ORDERS | {"GATEWAY_PORT": "8443", "HTTP_PORT": "8081", "PUBLIC_PORT": "443"}, {}),
        (ORDERS | {"GATEWAY_PORT": "auto", "HTTP_PORT": "0"},
         {"orders": "HTTP_PORT is off, GATEWAY_PORT auto: unset one of them"}),
    ],
)  # fmt: skip
def test_what_cannot_be_reached_from_elsewhere_is_a_warning(tmp_path, settings, expected):
    found = list(check.look_at_reach(config_of(tmp_path, **PUBLIC | settings)))
    assert levels(found) == [WARN] * len(expected)
    for finding in found:
        assert expected[finding.subject] in finding.text


def test_hostname_of_this_machine_that_an_agent_may_claim_is_a_warning(tmp_path):
    path = tmp_path / "agents.yaml"
    path.write_text(f"office: {{secret: '{SECRET}', hosts: 'a.example.com, a.localhost'}}\n")
    path.chmod(0o600)
    config = config_of(tmp_path, **PUBLIC, AGENTS_FILE=str(path))
    (finding,) = check.look_at_reach(config)
    assert finding.subject == "AGENTS_FILE, office" and "a.localhost is this" in finding.text
    path.write_text("office: {}\n")
    assert list(check.look_at_reach(config)) == []


# Names


@pytest.mark.parametrize(
    ("name", "level"),
    [("localhost", OK), (GATEWAY_HOST, OK), ("127.0.0.1", OK), ("192.0.2.7", WARN)],
)
def test_a_name_leads_to_this_machine_or_that_is_said(name, level):
    assert check.look_at_name("TUNNEL_HOST", name).level == level


def test_a_name_that_does_not_resolve_fails(monkeypatch):
    def refuse(*_, **__):
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    finding = check.look_at_name("GATEWAY_HOST", "gw.example.com")
    assert finding.level == FAIL
    assert "gw.example.com does not resolve (Name or service not known): point" in finding.text


def test_an_address_behind_nat_is_a_warning_with_both_addresses():
    finding = check.judge_addresses(
        "GATEWAY_HOST", "gw.test", ["10.0.0.5", "203.0.113.9"], ["10.0.0.5"], ["10.0.0.5"]
    )
    assert finding.level == WARN
    assert "203.0.113.9 is no address of this machine, which has 10.0.0.5. " in finding.text


# The CA


@contextlib.contextmanager
def https_server(folder, body, status=200):
    """Answers everything with ``body``, for the certificate of 127.0.0.1; gives the URL."""

    class Answers(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(status)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_):
            pass

    server = http.server.HTTPServer(("127.0.0.1", 0), Answers)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(*Authority(folder).issue("127.0.0.1"))
    server.socket = context.wrap_socket(server.socket, server_side=True)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), name="https server")
    thread.start()
    try:
        yield f"https://127.0.0.1:{server.server_port}/dir"
    finally:
        server.shutdown()
        server.server_close()
        thread.join(TIMEOUT)


DIRECTORY = json.dumps(dict.fromkeys(check.RESOURCES, URL)).encode()


def test_a_directory_that_answers_is_fine_and_so_is_our_clock():
    with FakeCa(time.time) as ca:
        findings = list(check.look_at_directory(ca.directory, None))
        assert levels(findings) == [OK, OK] and "speaks ACME" in findings[0].text
        assert ca.asked == [("dir", None)]  # nothing is ordered


@pytest.mark.parametrize(
    ("status", "body", "words"),
    [
        (200, b"<h1>It works</h1>", "<h1>It works</h1>"),
        (200, b"[]", "[]"),
        (200, b'{"newNonce": 1}', "newNonce"),
        (200, b"[" * 50_000, "[[["),
        (503, b"\xff\x1b[31mdown", "status 503"),
        (404, b"", "nothing"),
    ],
)
def test_an_answer_that_is_no_directory_fails(status, body, words):
    with FakeCa(time.time) as ca:
        ca.script["dir"] = [(status, {}, body)]
        finding, clock = check.look_at_directory(ca.directory, None)
    assert finding.level == FAIL and words in finding.text and finding.text.isprintable()
    assert clock.level == OK


def test_a_ca_that_nobody_trusts_fails_and_with_its_root_it_does_not(tmp_path):
    with https_server(tmp_path / "ca", DIRECTORY) as url:
        assert levels(check.look_at_directory(url, str(tmp_path / "ca" / "ca.crt"))) == [OK, OK]
        (finding,) = check.look_at_directory(url, None)
    assert finding.level == FAIL and "ACME_CA_FILE" in finding.text


def test_a_ca_that_is_away_fails_in_one_line():
    with reserved_port() as port:
        (finding,) = check.look_at_directory(f"https://127.0.0.1:{port}/dir", None)
    assert finding.level == FAIL and "refused; check ACME_DIRECTORY" in finding.text


def test_a_ca_that_says_nothing_is_not_waited_for(monkeypatch):
    monkeypatch.setattr(check, "NETWORK_TIMEOUT", 0.05)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"https://127.0.0.1:{silent.getsockname()[1]}/dir"
        (finding,) = check.look_at_directory(url, None)
    assert finding.level == FAIL and "timed out" in finding.text


@pytest.mark.parametrize(
    ("off", "level", "side"),
    [(0, OK, ""), (299, OK, ""), (-301, WARN, "behind"), (301, WARN, "ahead of"),
     (-2 * DAY, FAIL, "behind"), (2 * DAY, FAIL, "ahead of")],
)  # fmt: skip
def test_our_clock_is_judged_by_the_cas(off, level, side):
    finding = check.judge_clock(formatdate(NOW, usegmt=True), NOW + off)
    assert finding.level == level and side in finding.text


@pytest.mark.parametrize("date", [None, "", "yesterday"])
def test_a_ca_that_does_not_say_the_time_is_not_blamed(date):
    assert check.judge_clock(date, NOW).level == OK


# Folders


def test_a_cache_to_be_is_not_made(tmp_path):
    (finding,) = check.look_at_cache(config_of(tmp_path / "a" / "b"))
    assert finding.level == OK and list(tmp_path.iterdir()) == []


def test_a_cache_that_others_may_write_is_a_warning_and_nothing_is_left_in_it(tmp_path, store):
    before = tree(tmp_path)
    assert levels(check.look_at_cache(ordering(tmp_path))) == [OK]
    tmp_path.chmod(0o770)
    (finding,) = check.look_at_cache(ordering(tmp_path))
    assert finding.level == WARN and f"chmod go-w {tmp_path}" in finding.text
    assert tree(tmp_path) == before


def test_a_cache_that_cannot_be_written_fails(tmp_path, monkeypatch):
    def refuse(**_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(check.tempfile, "NamedTemporaryFile", refuse)  # root may write anywhere
    (finding,) = check.look_at_cache(config_of(tmp_path))
    assert finding.level == FAIL and "Permission denied" in finding.text


def test_a_cache_without_room_fails(tmp_path, store, monkeypatch):
    class Full:
        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

        def write(self, content):
            assert len(content) > 10_000  # what a certificate takes
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(check.tempfile, "NamedTemporaryFile", lambda **_: Full())
    found = list(check.look_at_cache(ordering(tmp_path)))
    assert {finding.level for finding in found} == {FAIL}
    assert all("No space left on device" in finding.text for finding in found)


def test_a_local_ca_that_cannot_be_used_fails(tmp_path):
    authority = Authority(tmp_path / "local")
    assert levels(check.look_at_cache(config_of(tmp_path))) == [OK]
    authority.ca_file.with_suffix(".key").unlink()
    (finding,) = check.look_at_cache(config_of(tmp_path))
    assert finding.level == FAIL and "ca.key: No such file" in finding.text


def test_a_cache_that_one_may_not_look_into_is_named(tmp_path, store, monkeypatch):
    def forbid(path):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(certificates.os, "listdir", forbid)  # root may look anywhere
    with pytest.raises(CertificateError, match="certs: Permission denied, run this as the gate"):
        certificates.find_rows(ordering(tmp_path))
    monkeypatch.setattr(type(tmp_path), "exists", forbid)
    (finding,) = check.look_at_cache(ordering(tmp_path))
    assert finding.level == FAIL and "run this as the gateway's user" in finding.text


def test_a_cache_of_another_user_is_a_warning(tmp_path, monkeypatch):
    owner = os.geteuid()
    monkeypatch.setattr(os, "geteuid", lambda: owner + 1)
    (finding,) = check.look_at_cache(config_of(tmp_path))
    assert finding.level == WARN and f"belongs to user {owner}" in finding.text


def test_pairs_in_cert_dir_are_named_with_what_is_wrong(tmp_path, mint):
    now = time.time()
    put_pair(tmp_path, "good", mint.pair(APP, now - DAY))
    put_pair(tmp_path, "old", mint.pair(APP, now - 100 * DAY))
    put_pair(tmp_path, "late", mint.pair("late.example.com", now - 100 * DAY))
    put_pair(tmp_path, "early", mint.pair("early.example.com", now + DAY))
    put_pair(tmp_path, "broken", (b"no key", mint.pair(APP)[1]))
    found = {f.text.partition(".crt")[0]: f for f in check.look_at_pairs(tmp_path)}
    assert {stem: finding.level for stem, finding in found.items()} == {
        "good": OK, "old": WARN, "late": FAIL, "early": FAIL, "broken": FAIL}  # fmt: skip
    assert "88 days left" in found["good"].text and "expired on" in found["late"].text
    assert "not a private key" in found["broken"].text
    assert "set this machine's clock" in found["early"].text


def test_an_empty_cert_dir_is_a_warning(tmp_path):
    assert levels(check.look_at_pairs(tmp_path)) == [WARN]


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, [OK, OK]),
        ({"ACME_ENV": "", "ACME_DIRECTORY": URL}, [OK, OK]),
        ({"ACME_ENV": "", "ACME_DIRECTORY": URL, "TUNNEL_HOST": "192.0.2.1"}, [OK, FAIL]),
        ({"ACME_ENV": "", "CERT_DIR": "pairs"}, [OK, FAIL]),
        ({"ACME_ENV": "production", "TUNNEL_HOST": "t.example.com"}, [FAIL, OK]),
    ],
)
def test_own_names_need_a_certificate(tmp_path, mint, monkeypatch, settings, expected):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "pairs").mkdir()
    put_pair(tmp_path / "pairs", "own", mint.pair("*.localhost", time.time()))
    assert levels(check.look_at_own_names(config_of(tmp_path, **settings))) == expected


def test_an_own_name_whose_order_failed_is_a_warning_with_the_reason(tmp_path):
    config = config_of(tmp_path, ACME_ENV="", ACME_DIRECTORY=URL)
    store = open_store(config.acme_cache, URL)
    store.save_state(GATEWAY_HOST, {"error": "dns: no address", "next_attempt_at": NOW})
    finding = next(iter(check.look_at_own_names(config)))
    assert finding.level == WARN
    assert finding.text == f"{GATEWAY_HOST}: no certificate yet: dns: no address"


def test_it_says_what_waits_and_why(tmp_path, mint):
    config = config_of(tmp_path, ACME_ENV="", ACME_DIRECTORY=URL)
    store, now = open_store(config.acme_cache, URL), time.time()
    store.save_pause({"until": now + 3600, "reason": "too many new orders (300)"})
    store.save_turns({"held": {"example.com": [now + 7200, "too many certificates (50)"]}})
    store.save("fine.example.com", *mint.pair("fine.example.com", now))
    store.save_state("waits.example.com", {"turn_at": now + 9000, "turn_why": "more than 45"})
    store.save_state("bad.example.org", {"error": f"visit {LINK}", "next_attempt_at": now + 9000})
    findings = list(check.look_at_waiting(config))
    assert {(finding.level, finding.subject) for finding in findings} == {(WARN, "orders")}
    every, domain, bad, waits = (finding.text for finding in findings)
    assert every.startswith("All orders wait until 20") and "UTC: too many new orders" in every
    assert domain.startswith("New hostnames of example.com wait until 20")
    assert LINK in bad and bad.startswith("bad.example.org: visit")
    assert waits.startswith("waits.example.com: it waits for its turn: more than 45 (next attempt ")
    for number in range(30):
        store.save_state(f"h{number}.example.com", {"error": "dns: no address"})
    last = list(check.look_at_waiting(config))[-1].text
    assert last.startswith("12 more have no certificate yet")


@pytest.mark.parametrize(("most", "level"), [(1000, WARN), (100_000, OK), (-1, OK)])
def test_descriptors_are_to_suffice_for_the_connections(monkeypatch, most, level):
    monkeypatch.setattr(resource, "getrlimit", lambda _: (10, most))
    assert check.look_at_descriptors(10_000).level == level


@pytest.mark.parametrize(
    ("terminal", "start"), [(True, "\x1b[32mok  \x1b[0m  "), (False, "ok    ")]
)
def test_levels_are_coloured_on_a_terminal_only(tmp_path, terminal, start):
    out = io.StringIO()
    out.isatty = lambda: terminal
    assert check.run_check(config_of(tmp_path), out) == 0
    assert out.getvalue().startswith(f"{start}configuration: ")
    assert ("\x1b" in out.getvalue()) == terminal


# The programs


def test_check_that_finds_nothing_has_status_0(tmp_path):
    status, out, errors = run("check", **gateway_environment(tmp_path))
    assert (status, errors) == (0, "") and "fail" not in out
    assert "ok    directory: not used" in out


@pytest.mark.parametrize(
    ("name", "level", "words"),
    [
        (None, OK, "off"),
        ("-", OK, "standard output"),
        ("there", OK, "there can be written"),
        ("new", OK, "new is missing, it will be made"),
        ("none/new", FAIL, "/none): name a file"),
        ("there/new", FAIL, "Not a directory"),
        ("closed/new", FAIL, "/closed cannot be written"),
        ("read-only", FAIL, "Permission denied"),
        ("pipe", WARN, "is a pipe that no program reads"),
    ],
)
def test_an_access_log_that_cannot_be_written_fails(tmp_path, name, level, words, monkeypatch):
    (tmp_path / "there").touch()
    (tmp_path / "read-only").touch()
    (tmp_path / "closed").mkdir()
    os.mkfifo(tmp_path / "pipe")
    if os.geteuid() == 0:  # root may write everywhere
        access, real = os.access, os.open
        monkeypatch.setattr(os, "access", lambda p, m: "closed" not in str(p) and access(p, m))
        monkeypatch.setattr(os, "open", lambda p, *rest: (
            refuse(p) if str(p).endswith("read-only") else real(p, *rest)
        ))  # fmt: skip
    (tmp_path / "read-only").chmod(0o400)
    before = tree(tmp_path)
    path = "off" if name is None else name if name == "-" else str(tmp_path / name)
    finding = check.look_at_access_log(path)
    assert (finding.level, finding.subject) == (level, "ACCESS_LOG") and words in finding.text
    assert tree(tmp_path) == before


def refuse(path):
    raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), path)


@pytest.mark.parametrize(
    ("name", "level", "words"),
    [
        (None, OK, "off"),
        ("new.sock", OK, "new.sock"),
        ("cache/status.sock", OK, "cache/status.sock"),
        ("none/new.sock", WARN, "/none is no folder that can be written"),
        ("file", WARN, "this is a file, and no socket"),
        ("x" * 120, WARN, "a unix socket's may have"),
    ],
)
def test_a_status_socket_that_cannot_be_is_a_warning(tmp_path, name, level, words, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("file").touch()
    finding = check.look_at_status_socket(name and Path(name), Path("cache"))
    assert (finding.level, finding.subject) == (level, "STATUS_SOCKET") and words in finding.text


def test_check_looks_at_all_that_the_gateway_opens(tmp_path):
    """Each of these ends or hinders a start, and stands in a line of its own."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        settings = gateway_environment(
            tmp_path, METRICS_PORT=str(taken.getsockname()[1]), ACCESS_LOG=str(tmp_path / "no/log"),
            STATUS_SOCKET=str(tmp_path / "no/s"),
        )  # fmt: skip
        status, out, errors = run("check", **settings)
    assert (status, errors) == (1, "")
    assert "fail  METRICS_PORT: " in out and "fail  ACCESS_LOG: " in out
    assert "warn  STATUS_SOCKET: " in out


def test_check_that_finds_something_has_status_1(tmp_path):
    elsewhere = gateway_environment(tmp_path, BIND="203.0.113.1", HTTP_PORT="8081")
    status, out, errors = run("check", **elsewhere)
    assert (status, errors) == (1, "")
    assert "fail  HTTP_PORT: 8081 on 203.0.113.1: not an address of this machine" in out


@pytest.mark.parametrize("command", ["check", "certificates"])
def test_a_reader_that_leaves_early_is_no_error(tmp_path, command):
    theirs, ours = os.pipe()
    os.close(theirs)  # as head does, when it has its lines
    environment = gateway_environment(tmp_path, HTTP_PORT="0")
    with open(ours, "wb") as out:
        ended = subprocess.run(
            [sys.executable, str(ROOT / "gotunnel_server"), command], cwd=tmp_path,
            env=environment, stdout=out, stderr=subprocess.PIPE, timeout=TIMEOUT,
        )  # fmt: skip
    assert ended.stderr == b""


def test_check_of_a_wrong_configuration_has_status_2(tmp_path):
    status, out, errors = run("check", **gateway_environment(tmp_path, GATEWAY_PORT="many"))
    assert status == 2 and out == "" and errors.count("\n") == 1 and "GATEWAY_PORT" in errors


def test_check_names_all_faults_of_a_configuration(tmp_path):
    (tmp_path / "empty").touch()
    wrong = {
        "GATEWAY_HOST": "https://gateway.example.com",
        "TUNNEL_HOST": "",
        "GATEWAY_PORT": "8443",
        "TUNNEL_PORT": "8443",
        "DASHBOARD_PORT": "many",
        "JWT_SECRET": "",
        "JWT_SECRET_FILE": str(tmp_path / "empty"),
        "CERT_DIR": str(tmp_path / "missing"),
        "ACME_ENV": "staging",
        "ACME_EAB_KID": "kid",
        "WORKERS": "0",
        "DEFAULT_ALLOW": "10.0.0.1/8",
    }
    status, out, errors = run("check", **gateway_environment(tmp_path, **wrong))
    lines = errors.splitlines()
    assert (status, out) == (2, "") and len(lines) == 9
    named = {line.partition(": ")[2].split()[0].rstrip(":") for line in lines}
    assert named == {
        "JWT_SECRET_FILE", "CERT_DIR", "ACME_EAB_KID", "GATEWAY_HOST", "TUNNEL_HOST",
        "DASHBOARD_PORT", "WORKERS", "DEFAULT_ALLOW", "GATEWAY_PORT",
    }  # fmt: skip
    assert "ACME_EAB_KID and ACME_EAB_HMAC_KEY: only one of them is set" in errors
    assert "GATEWAY_PORT and TUNNEL_PORT are both 8443" in errors


@pytest.mark.parametrize("command", ["check", "certificates"])
def test_env_file_may_stand_on_either_side_of_a_command(command):
    for arguments in (["--env-file", "x", command], [command, "--env-file", "x"]):
        options = cli.parse(arguments)
        assert (options.command, options.env_file) == (command, "x")
    assert cli.parse([command]).env_file is None


def test_without_a_command_it_is_the_gateway():
    assert cli.parse([]).command is None and cli.parse(["--env-file", "x"]).env_file == "x"


# AGENTS_FILE


def test_agents_and_what_is_weak_about_them_are_named(tmp_path):
    path = tmp_path / "agents.yaml"
    path.write_text("one: {hosts: a.example.com, secret: changeme}")
    path.chmod(0o644)
    found = list(check.look_at_agents(path))
    assert found[0] == Finding(OK, "AGENTS_FILE", f"{path}, agents in it: 1")
    assert [finding.level for finding in found[1:]] == [WARN, WARN]
    assert not any("changeme" in finding.text for finding in found)
    assert not any("AGENTS_FILE" in finding.text for finding in found)


STRONG = secrets.token_hex(32)
ACTIVE = f"on: {{hosts: a.example.com, secret: {STRONG}}}\n"
DISABLED = f"off: {{hosts: b.example.com, secret: {STRONG}, disabled: true}}\n"
EXPIRED = f"old: {{hosts: c.example.com, secret: {STRONG}, expires: 2020-01-01}}\n"


@pytest.mark.parametrize(
    ("content", "has_jwt_secret", "expected"),
    [
        (ACTIVE + DISABLED, False, []),
        (ACTIVE + EXPIRED, False, ["expired: old; remove"]),
        (DISABLED + EXPIRED, False, ["expired: old; remove", "no agent can register: no entry"]),
        (DISABLED + EXPIRED, True, ["expired: old; remove"]),
        ("{}", False, ["no agent can register: no entry"]),
        ("{}", True, []),
    ],
)
def test_agents_that_may_not_come_are_a_warning(tmp_path, content, has_jwt_secret, expected):
    path = tmp_path / "agents.yaml"
    path.write_text(content)
    path.chmod(0o600)
    first, *found = check.look_at_agents(path, has_jwt_secret)
    assert first.level == OK and levels(found) == [WARN] * len(expected)
    for finding, words in zip(found, expected):
        assert finding.text.startswith(words)


def test_ports_for_agents_that_are_taken_are_a_warning(tmp_path):
    with reserved_port() as free, socket.create_server(("127.0.0.1", 0)) as listening:
        taken = listening.getsockname()[1]
        config = config_of(tmp_path, TCP_PORTS=f"{free},{taken}")
        [finding] = check.look_at_tcp_ports(config)
        assert finding.level == WARN and finding.text.startswith(f"{taken}: in use, another")
        assert finding in list(check.examine(config))
        [finding] = check.look_at_tcp_ports(config_of(tmp_path, TCP_PORTS=f"{free}"))
        assert finding == Finding(OK, "TCP_PORTS", "1 ports are free")
    assert not list(check.look_at_tcp_ports(config_of(tmp_path)))


def test_check_names_ports_of_the_gateways_own_among_those_for_agents(tmp_path):
    config = config_of(tmp_path, TCP_PORTS="2200-2299", DASHBOARD_PORT="2201")
    lines = [finding.text for finding in check.examine(config) if finding.level == WARN]
    assert any(line.startswith("TCP_PORTS holds 2201, which is DASHBOARD_PORT") for line in lines)


@pytest.mark.parametrize("content", [None, "one: [", "one: {}"])
def test_an_agents_file_that_cannot_be_used_fails(tmp_path, content):
    path = tmp_path / "agents.yaml"
    if content is not None:
        path.write_text(content)
    [finding] = check.look_at_agents(path)
    assert (finding.level, finding.subject) == (FAIL, "AGENTS_FILE")


def test_who_answers_tls_in_plain_text_is_no_gateway():
    def refuse(server):
        with contextlib.suppress(OSError):
            while True:
                with server.accept()[0] as visitor:
                    visitor.recv(1000)
                    visitor.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")

    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        thread = threading.Thread(target=refuse, args=(server,))
        thread.start()
        finding = check.look_at_port("GATEWAY_PORT", ("127.0.0.1",), port, "app.localhost")
        server.shutdown(socket.SHUT_RDWR)
        thread.join()
    assert finding.level == FAIL


# Redis


def cluster(url, address=("", 0)):
    return Settings(read_url(url), address=address)


def test_a_redis_that_will_do_and_one_that_will_not(redis_server, monkeypatch):
    monkeypatch.setattr(check, "SLOW_REDIS", TIMEOUT)
    [found, key, address] = check.look_at_cluster(cluster(redis_server.url))
    assert key.level == OK and key.subject == "CLUSTER_KEY_FILE"
    assert found.level == OK and re.fullmatch(r"Redis \S+ at \S+ answers, in \S+ ms", found.text)
    assert address.level == WARN and address.subject == "CLUSTER_ADDRESS"
    redis_server.call("CONFIG", "SET", "maxmemory-policy", "allkeys-lru")
    _, evicts, *_ = check.look_at_cluster(cluster(redis_server.url))
    assert evicts.level == WARN and "expected noeviction" in evicts.text
    redis_server.kill()
    [gone] = check.look_at_cluster(cluster(redis_server.url))
    assert gone.level == FAIL
    assert gone.text == (
        f"Redis at {redis_server.address}: connection refused: correct CLUSTER or "
        "CLUSTER_PASSWORD, or start the server"
    )


def test_a_redis_whose_certificate_is_not_trusted(monkeypatch):
    def fail(engine):
        raise OSError("Redis at r.test:6379: its certificate is not to be trusted: self-signed")

    monkeypatch.setattr("gotunnel_server.cluster.engine.Engine.time", fail)
    [found] = check.look_at_cluster(cluster("rediss://r.test"))
    assert found.level == FAIL and found.text.endswith(
        "self-signed: CLUSTER must name the server as its certificate does, CLUSTER_CA_FILE its CA"
    )


@pytest.mark.parametrize(
    "address, found, level, words",
    [
        (None, "192.0.2.1", OK, "shared: agents dial the common address"),
        (("gw1.example.com", 0), "192.0.2.1", OK, "agents and gateways dial gw1.example.com"),
        (("", 0), "192.0.2.1", OK, "agents and gateways dial 192.0.2.1"),
        (("", 0), None, WARN, "set CLUSTER_ADDRESS"),
        (("", 0), "127.0.0.1", WARN, "set CLUSTER_ADDRESS"),
    ],
)
def test_how_others_reach_this_gateway(address, found, level, words):
    finding = check.look_at_own_address(cluster("redis://h", address), found)
    assert finding.level == level and words in finding.text


def test_a_key_for_a_cluster_is_printed(tmp_path):
    status, out, errors = run("cluster-key", ACME_CACHE=str(tmp_path))
    assert (status, errors) == (0, "")
    assert len(base64.urlsafe_b64decode(out)) == 32
