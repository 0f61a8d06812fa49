"""The access log: its forms, what a visitor cannot do to them, and programs that read it."""

import json
import re
import signal
import subprocess
import sys
import time
import types

import pytest
from support import (
    APP,
    GATEWAY_HOST,
    RAW,
    ROOT,
    agent_here,
    answer,
    ca_of,
    dial_tls,
    fields_of,
    gateway_environment,
    gateway_here,
    gateway_process,
    need,
    request,
    running,
    tls_context,
    wait_until,
)

from gotunnel_agent.common.http1 import Fields
from gotunnel_server.recording import _writer
from gotunnel_server.visitors import request_id
from gotunnel_server.visitors.access_log import MOST, as_json, combined, escaped
from gotunnel_server.visitors.visit import Visit

AT = 1796000000.5  # wall-clock seconds
LINE = re.compile(
    r'(?P<visitor>\S+) - - \[[^\]]+\] "(?P<request>[^"]*)" (?P<status>\d{3}) (?P<sent>\d+) '
    r'"(?P<referer>[^"]*)" "(?P<agent>[^"]*)" host="(?P<host>[^"]*)" agent="[^"]*" '
    r'error="(?P<error>[^"]*)" in=(?P<received>\d+) first=(\S+) time=(\S+) stream=(\d+) '
    r'id="(?P<id>[^"]*)"'
)  # fmt: skip
# Each would end a line or a value, or write to the reader's terminal.
ODD = [
    '"',
    "\\",
    "\n",
    "\r",
    "\t",
    "\0",
    "\x1b[31m",
    "\x7f",
    "\x80",
    "\xff",
    "\u2028",
    "é",
    "\ud800",
]


def visit(**values):
    made = Visit(None, "192.0.2.7", 10.0)
    known = dict(
        method="GET", path="/a?b", hostname=APP, protocol="HTTP/1.1", scheme="https", status=200,
        sent=612, received=80, at=AT, duration=0.013, first_byte_at=10.012, request_id="ab",
        stream=2, user_agent="curl/8",
    )  # fmt: skip
    for name, value in (known | values).items():
        setattr(made, name, value)
    return made


@pytest.fixture
def utc(monkeypatch):
    monkeypatch.setenv("TZ", "UTC")
    time.tzset()
    yield
    monkeypatch.undo()
    time.tzset()


def test_combined_line(utc):
    assert combined(visit()) == (
        '192.0.2.7 - - [30/Nov/2026:00:53:20 +0000] "GET /a?b HTTP/1.1" 200 612 "-" "curl/8" '
        'host="app.localhost" agent="" error="" in=80 first=0.012 time=0.013 stream=2 id="ab"'
    )


def test_lines_of_tcp_visits_and_of_heads_that_say_nothing():
    tcp = combined(visit(method="", path="", protocol="tcp", hostname=RAW, user_agent=""))
    assert f'"TCP {RAW} TCP" 200 612 "-" "-"' in tcp
    nothing = combined(visit(method="", path="", protocol="", status=408, first_byte_at=None))
    assert '"-" 408 612' in nothing and "first=- " in nothing


def test_json_line():
    assert json.loads(as_json(visit(error="no-tunnel"))) == {
        "time": "2026-11-30T00:53:20.500+00:00", "visitor": "192.0.2.7", "hostname": APP,
        "agent": "", "method": "GET", "path": "/a?b", "protocol": "HTTP/1.1", "scheme": "https",
        "status": 200, "error": "no-tunnel", "received": 80, "sent": 612, "first_byte": 0.012,
        "duration": 0.013, "stream": 2, "request_id": "ab", "referer": "", "user_agent": "curl/8",
    }  # fmt: skip


@pytest.mark.parametrize("odd", ODD)
@pytest.mark.parametrize("name", ["path", "hostname", "method", "referer", "user_agent", "visitor"])
def test_no_character_of_a_visitor_ends_a_line_or_a_value(name, odd):
    value = f'x{odd}y" 200 1 "forged'
    if name == "visitor":
        value = value.replace(" ", "")
    line = combined(visit(**{name: value}))
    assert line.isprintable() and line.isascii()
    found = LINE.fullmatch(line)
    assert found and (found["status"], found["sent"]) == ("200", "612")
    line = as_json(visit(**{name: value}))
    assert line.isprintable() and line.isascii()
    assert json.loads(line)[name] == value


def test_escapes_are_nginxs():
    assert escaped('a"b\\c\nd\xe9\x7f') == r"a\x22b\x5Cc\x0Ad\xE9\x7F"
    assert escaped("\u20ac") == r"\xE2\x82\xAC"


@pytest.mark.parametrize("line", [combined, as_json])
def test_long_values_are_cut(line):
    long = dict.fromkeys(("path", "hostname", "referer", "user_agent", "method"), "\n" * 60_000)
    assert len(line(visit(**long))) < 5 * 4 * MOST + 1000


# Request ids --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "told",
    ["", "a b", 'a"b', "a\nb", "é", "x" * 201, "x" * 1_000_000, "<script>", "a,b", None],
)
def test_a_bad_request_id_is_replaced(told):
    fields = Fields([("X-Request-ID", told)] if told is not None else [])
    assert re.fullmatch("[0-9a-f]{32}", request_id.request_id(fields, trusted=True))


def test_of_two_request_ids_none_is_taken_over():
    """A proxy may add its own to that of its visitor."""
    fields = Fields([("X-Request-Id", "the-visitors"), ("X-Request-Id", "the-proxys")])
    assert re.fullmatch("[0-9a-f]{32}", request_id.request_id(fields, trusted=True))


@pytest.mark.parametrize("told", ["x", "x" * 200, "7f1c2a90-5d1e-4bb5-b0b4-0f1e", "a.b_c~d=+:@-"])
def test_a_trusted_proxys_request_id_is_taken_over_a_visitors_is_not(told):
    fields = Fields([("x-request-id", told)])
    assert request_id.request_id(fields, trusted=True) == told
    assert request_id.request_id(fields, trusted=False) != told


def ids(head):
    return [
        field.partition(": ")[2] for field in fields_of(head) if field.startswith("x-request-id")
    ]


@pytest.mark.parametrize("trusted", [True, False])
@pytest.mark.parametrize("name", ["X-Request-ID", "X_Request_Id"])
def test_an_id_goes_to_the_target_and_back_and_into_both_logs(
    cache, tmp_path, origin, trusted, name, caplog
):
    log = tmp_path / "access.log"
    changes = {"ACCESS_LOG": str(log), "TRUSTED_PROXIES": "127.0.0.1" if trusted else "192.0.2.1"}
    with gateway_here(cache, **changes) as gateway:
        with agent_here(gateway, tmp_path, http={APP: origin.port}), gateway.dial(APP) as visitor:
            visitor.send(request("GET", "/", f"{name}: theirs"))
            with origin.accept() as target:
                (sent,) = ids(target.read_head())
                target.send(answer(b"ok", "X-Request-Id: the-targets", "x_request_id: too"))
                assert ids(visitor.read_message()[0]) == [sent]
                visitor.send(request("GET", "/cut"))
                (second,) = ids(target.read_head())
            with origin.accept() as target:  # sent again, as that connection was kept and has ended
                assert ids(target.read_head()) == [second]
            assert ids(visitor.read_message()[0]) == [second]
    assert second != sent and second in caplog.text
    assert (sent == "theirs") == (trusted and name == "X-Request-ID")
    found = [LINE.fullmatch(line) for line in log.read_text().splitlines()]
    assert [(line["id"], line["status"]) for line in found] == [(sent, "200"), (second, "502")]


def test_without_an_access_log_ids_pass_as_they_did(cache, tmp_path, origin):
    with gateway_here(cache) as gateway:
        with agent_here(gateway, tmp_path, http={APP: origin.port}), gateway.dial(APP) as visitor:
            visitor.send(request("GET", "/", "X-Request-ID: theirs"))
            with origin.accept() as target:
                assert ids(target.read_head()) == ["theirs"]
                target.send(answer(b"", "X-Request-Id: the-targets"))
                assert ids(visitor.read_message()[0]) == ["the-targets"]


# The program --------------------------------------------------------------------------------------


def visit_once(port, context, path):
    with dial_tls(port, GATEWAY_HOST, context) as visitor:
        visitor.send(request(host=GATEWAY_HOST, path=path))
        visitor.read_message()


def test_json_for_both_logs(cache, tmp_path):
    log = tmp_path / "access.log"
    environment = gateway_environment(cache, LOG_FORMAT="json", ACCESS_LOG=str(log))
    command = (sys.executable, str(ROOT / "gotunnel_server"))
    with running(*command, cwd=cache, **environment) as program:
        program.wait_for(" is ready")
        port = program.wait_for(r'"message":"visitors: https://[^:]+:([0-9]+)/"')[1]
        visit_once(int(port), tls_context(ca_of(cache)), "/x")
        (line,) = wait_until(lambda: log.read_text().splitlines())
        assert (json.loads(line)["path"], json.loads(line)["status"]) == ("/x", 200)
        program.end()
        for entry in map(json.loads, program.lines):
            assert entry.keys() == {"time", "level", "logger", "message"}
            assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}\+00:00", entry["time"])


def test_access_log_on_standard_output_and_its_last_lines_at_the_end(cache):
    with gateway_process(cache, ACCESS_LOG="-") as gateway:
        visit_once(gateway.public_port, gateway.context, "/last")
        gateway.program.signal(signal.SIGTERM)
        assert gateway.program.wait() == 0
        assert LINE.fullmatch(gateway.program.wait_for('.*"GET /last HTTP/1.1" 200.*')[0])


def test_hang_up_reopens_the_file(cache, tmp_path):
    log, old = tmp_path / "access.log", tmp_path / "access.log.1"
    with gateway_process(cache, ACCESS_LOG=str(log)) as gateway:
        visit_once(gateway.public_port, gateway.context, "/1")
        wait_until(log.read_text)
        log.rename(old)
        gateway.program.signal(signal.SIGHUP)
        wait_until(log.exists)
        visit_once(gateway.public_port, gateway.context, "/2")
        assert "/2" in wait_until(log.read_text) and "GET /2" not in old.read_text()


@pytest.mark.parametrize(
    "path, said",
    [("/nowhere/access.log", "No such file"), ("/proc/access.log", ""), ("/", "a folder")],
)
def test_a_path_that_cannot_be_is_refused_in_one_line(cache, path, said):
    environment = gateway_environment(cache, ACCESS_LOG=path)
    command = (sys.executable, str(ROOT / "gotunnel_server"))
    with running(*command, cwd=cache, **environment) as program:
        assert program.wait() in (1, 2)
        program.wait_for(f"ACCESS_LOG.*{said}")
        assert len(program.lines) == 1


# Programs that read it ----------------------------------------------------------------------------


@pytest.fixture
def written(cache, tmp_path, origin):
    """An access log of some visits, odd ones among them."""
    log = tmp_path / "access.log"
    with gateway_here(cache, ACCESS_LOG=str(log)) as gateway:
        with agent_here(gateway, tmp_path, tcp={RAW: origin.port}):
            for data in (
                request(host=GATEWAY_HOST, path="/a?b=%22"),
                request(
                    "GET", "/q", 'User-Agent: x" 200 1 "y\\', "Referer: \xe9\t", host=GATEWAY_HOST
                ),
                request(host="elsewhere.example", path="/wp-login.php"),
                b"BAD\x01 / HTTP/1.1\r\n\r\n",
                b"GET / HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n",
            ):
                with gateway.dial(GATEWAY_HOST) as visitor:
                    visitor.send(data)
                    visitor.read_head()
            with gateway.dial(RAW) as visitor, origin.accept() as target:
                target.send(b"bye")
                target.close()
                visitor.read_to_end()
            wait_until(lambda: log.read_text().count("\n") == 6)
    return log


def test_goaccess_reads_every_line(written, tmp_path):
    report = tmp_path / "report.json"
    subprocess.run(
        [need("goaccess"), str(written), "--log-format=COMBINED", "--no-global-config",
         "--no-ip-validation", "-o", str(report)],
        check=True, capture_output=True, stdin=subprocess.DEVNULL,
    )  # fmt: skip
    general = json.loads(report.read_text())["general"]
    assert (general["valid_requests"], general["failed_requests"]) == (6, 0)
    assert general["bandwidth"] == sum(int(LINE.fullmatch(line)["sent"])
                                       for line in written.read_text().splitlines())  # fmt: skip


def test_filter_of_fail2ban_names_only_codes_that_the_gateway_has():
    (words,) = re.findall(
        r'error="\(\?:(.*)\)"', (ROOT / "conf/fail2ban-gotunnel.conf").read_text()
    )
    documented = (ROOT / "docs/visits.md").read_text()
    assert [word for word in words.split("|") if f"`{word}`" not in documented] == []


@pytest.mark.parametrize("name, matched", [("nginx-bad-request", 2), ("gotunnel", 3)])
def test_fail2ban_finds_bad_visits(written, name, matched):
    program = need("fail2ban-regex")
    rule = {
        "nginx-bad-request": "/etc/fail2ban/filter.d/nginx-bad-request.conf",
        "gotunnel": str(ROOT / "conf" / "fail2ban-gotunnel.conf"),
    }[name]
    done = subprocess.run(
        [program, "--print-all-matched", str(written), rule], capture_output=True, text=True
    )
    assert f"Lines: 6 lines, 0 ignored, {matched} matched" in done.stdout, done.stdout
    assert "127.0.0.1" in done.stdout


def test_a_visit_that_has_no_line_costs_the_others_of_its_batch_none(caplog):
    lines = []

    def line(visit):
        if visit == "bad":
            raise ValueError("a bug")
        return visit

    _writer(types.SimpleNamespace(write_all=lines.extend), line)(["a", "bad", "b"])
    assert lines == ["a", "b"] and caplog.text.count("a visit has no line in the access log") == 1
