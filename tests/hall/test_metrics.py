"""What METRICS_PORT tells: figures that are true, in a form that Prometheus reads, and health."""

import contextlib
import http.client
import json
import re
import socket
import subprocess
import threading
import time

import pytest
from prometheus_client import parser
from support import (
    APP,
    GATEWAY_HOST,
    RAW,
    ROOT,
    agent_here,
    answer,
    gateway_here,
    need,
    request,
    status_of,
    wait_until,
)

from gotunnel import Health
from gotunnel_agent.common import exposition
from gotunnel_agent.common.exposition import Sample, counter, gauge, histogram
from gotunnel_server.routes import Route
from gotunnel_server.visitors import connection as connection_module
from gotunnel_server.visitors import counts as counts_module
from gotunnel_server.visitors import port as port_module
from gotunnel_server.visitors.counts import OTHER, Counts
from gotunnel_server.visitors.room import Timeouts
from gotunnel_server.visitors.visit import Visit

DASHBOARD = ROOT / "conf" / "grafana-gotunnel.json"
PAGE = ROOT / "docs" / "operations.md"
NAMES = re.compile(r"\b(?:gotunnel|process)_\w+")


def ask(port, path="/metrics", host="127.0.0.1", method="GET"):
    """Status, content type and body."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
    try:
        connection.request(method, path, headers={"Host": host})
        got = connection.getresponse()
        return got.status, got.getheader("Content-Type"), got.read().decode()
    finally:
        connection.close()


def read(text):
    """Sample name and labels to value, by Prometheus' own parser."""
    return {
        (sample.name, *sorted(sample.labels.items())): sample.value
        for family in parser.text_string_to_metric_families(text)
        for sample in family.samples
    }


def figures(gateway):
    status, kind, text = ask(gateway.inner.metrics_port)
    assert (status, kind) == (200, exposition.CONTENT_TYPE)
    return read(text)


@pytest.fixture
def gateway(cache, tmp_path, origin):
    ports = {"http": {APP: origin.port}, "tcp": {RAW: origin.port}}
    with gateway_here(cache, METRICS_PORT="auto", ACCESS_LOG="/dev/null") as gateway:
        with agent_here(gateway, tmp_path, **ports):
            yield gateway


def visit(gateway, origin, status="200 OK", body=b"hello"):
    with gateway.dial(APP) as visitor:
        visitor.send(request("POST", "/", body=b"123"))
        with origin.accept() as target:
            target.read_head()
            target.read_exactly(3)
            target.send(answer(body, "Connection: close", status=status))
            visitor.read_message()


def test_visits_are_counted(gateway, origin):
    for status in ("200 OK", "204 No Content", "404 Not Found", "500 Oops"):
        visit(gateway, origin, status, b"" if status[:3] == "204" else b"hello")
    with gateway.dial(RAW) as visitor, origin.accept() as target:
        target.send(b"x" * 1000)
        target.close()
        visitor.read_to_end()
    assert gateway.get(GATEWAY_HOST)[0] == 200
    counts = gateway.inner.recording.counts
    wait_until(lambda: sum(count.visits for count in counts.all().values()) == 6)
    found = figures(gateway)

    def count(name, **labels):
        return found[(f"gotunnel_gateway_{name}", *sorted(labels.items()))]

    of = {"hostname": APP, "mode": "http"}
    assert count("visits_total", status="2xx", **of) == 2
    assert count("visits_total", status="4xx", **of) == 1
    assert count("visits_total", status="5xx", **of) == 1
    assert count("visits_total", status="2xx", hostname=RAW, mode="tcp") == 1
    assert count("visits_total", status="2xx", hostname=OTHER, mode="http") == 1
    assert count("failed_visits_total", hostname=APP) == 1
    assert count("visit_bytes_total", hostname=RAW, direction="out") == 1000
    assert count("visit_bytes_total", hostname=APP, direction="in") > 4 * 3
    assert count("request_duration_seconds_count", hostname=APP) == 4
    assert count("request_duration_seconds_bucket", hostname=APP, le="+Inf") == 4
    assert count("request_duration_seconds_count", hostname=RAW) == 0
    assert 0 < count("request_duration_seconds_sum", hostname=APP) < 20
    assert count("sessions") == 1 and count("hostnames") == 2
    assert count("tls_handshakes_completed_total") == count("tls_handshakes_total") == 6
    assert count("connections", port="tunnel") == 1 and count("connections", port="metrics") == 1
    assert count("ready") == 1
    assert count("access_log_dropped_lines_total") == 0
    ends = count("certificate_expiry_timestamp_seconds", hostname=APP)
    assert ends > time.time() + 86400
    assert found[("process_resident_memory_bytes",)] > 10 << 20
    assert 0 < found[("process_cpu_seconds_total",)]
    assert found[("process_open_fds",)] > 10
    assert abs(found[("process_start_time_seconds",)] - time.time()) < 24 * 3600


def test_refusals_are_counted_by_reason(cache):
    with gateway_here(cache, METRICS_PORT="auto") as gateway:
        with gateway.dial(GATEWAY_HOST) as visitor:
            visitor.send(request(host="else.example"))
            assert status_of(visitor.read_head()) == 421
        reason = ("gotunnel_gateway_visit_errors_total", ("reason", "misdirected"))
        wait_until(lambda: figures(gateway).get(reason) == 1)


def test_running_relays_and_streams_are_told(gateway, origin):
    with gateway.dial(RAW) as visitor, origin.accept() as target:
        target.send(b"x")
        visitor.read_exactly(1)
        found = figures(gateway)
        assert found[("gotunnel_gateway_relays",)] == 1
        assert found[("gotunnel_gateway_running_visits",)] == 1
        assert found[("gotunnel_gateway_streams",)] == 1


def test_promtool_finds_nothing_wrong(gateway, origin):
    visit(gateway, origin)
    text = ask(gateway.inner.metrics_port)[2]
    command = [need("promtool"), "check", "metrics"]
    done = subprocess.run(command, input=text, text=True, capture_output=True)
    assert (done.returncode, done.stdout + done.stderr) == (0, "")


def test_health_and_readiness(gateway):
    port = gateway.inner.metrics_port
    for path in ("/healthz", "/readyz"):
        assert ask(port, path)[::2] == (200, "ok\n")
        assert ask(port, path, method="HEAD")[::2] == (200, "")
    gateway.inner._ready.clear()
    assert ask(port, "/readyz")[::2] == (503, "starting or draining\n")
    assert ask(port, "/healthz")[0] == 200
    gateway.inner._ready.set()
    gateway.inner.listeners.stuck = lambda timeout: "the listener of port 1"
    assert ask(port, "/healthz")[::2] == (503, "the listener of port 1 is stuck\n")


def test_a_gateway_that_drains_says_until_its_end_that_it_is_not_ready(cache, tmp_path, origin):
    with gateway_here(cache, METRICS_PORT="auto", DRAIN_TIMEOUT="30") as gateway:
        port, stop = gateway.inner.metrics_port, threading.Thread(target=gateway.inner.stop)
        with agent_here(gateway, tmp_path, tcp={RAW: origin.port}), contextlib.ExitStack() as open_:
            visitor = open_.enter_context(gateway.dial(RAW))
            target = open_.enter_context(origin.accept())
            kept = open_.enter_context(socket.create_connection(("127.0.0.1", port)))
            assert ask(port, "/readyz")[::2] == (200, "ok\n")
            stop.start()
            wait_until(lambda: not gateway.inner._ready.is_set())
            for _ in range(3):
                assert ask(port, "/readyz")[::2] == (503, "starting or draining\n")
                assert ask(port, "/healthz")[0] == 200
            visitor.send(b"x")
            assert target.read_exactly(1) == b"x"  # it drains indeed
            visitor.close()
            target.close()
            stop.join(10)  # it does not wait for the peer that asks nothing
            assert not stop.is_alive() and kept.fileno() >= 0
            with pytest.raises(ConnectionRefusedError):
                ask(port, "/readyz")


def test_in_a_hand_over_the_old_gateway_leaves_the_port_to_its_successor(cache):
    with gateway_here(cache, METRICS_PORT="auto") as gateway:
        gateway.inner.stop_accepting()
        with pytest.raises(ConnectionRefusedError):
            ask(gateway.inner.metrics_port, "/readyz")


@pytest.mark.parametrize(
    "path, host, method, status",
    [
        ("/", "127.0.0.1", "GET", 404),
        ("/metrics?x=1", "localhost:1", "GET", 200),
        ("/metrics", "[::1]:1", "GET", 200),
        ("/metrics", "evil.example", "GET", 403),
        ("/metrics", GATEWAY_HOST, "GET", 403),
        ("/metrics", "127.0.0.1", "POST", 405),
    ],
)
def test_what_else_is_asked(gateway, path, host, method, status):
    assert ask(gateway.inner.metrics_port, path, host, method)[0] == status


def test_on_other_addresses_any_name_may_be_the_machines(cache):
    with gateway_here(cache, METRICS_PORT="auto", METRICS_BIND="0.0.0.0") as gateway:
        assert ask(gateway.inner.metrics_port, host="prometheus-sees-it.example")[0] == 200


def test_it_is_off_and_on_loopback_by_default(cache):
    with gateway_here(cache) as gateway:
        assert gateway.inner.metrics_port is None
        assert gateway.inner.recording.visits is None
    with gateway_here(cache, METRICS_PORT="auto", BIND="0.0.0.0") as gateway:
        (listening,) = gateway.inner.listeners._all[-1].sockets
        assert listening.getsockname()[0] == "127.0.0.1"


def test_reading_it_is_no_visit(cache):
    with gateway_here(cache, METRICS_PORT="auto") as gateway:
        for _ in range(3):
            found = figures(gateway)
        assert not [key for key in found if key[0] == "gotunnel_gateway_visits_total"]


@pytest.mark.parametrize(
    "first", [b"", b"GET /healthz", b"GET /healthz HTTP/1.1\r\nHost: [::1]\r\n\r\n"]
)
def test_peers_that_ask_nothing_hold_up_no_other_for_long(cache, monkeypatch, first):
    """All are of one address: of a container's host, say."""
    monkeypatch.setattr(port_module, "HEALTH_TIMEOUTS", Timeouts(0.2, 0.2, 0.2, 0.2))
    monkeypatch.setattr(connection_module, "FULL_PARTING_TIME", 0.2)
    with gateway_here(cache, METRICS_PORT="auto") as gateway, contextlib.ExitStack() as open_:
        port = gateway.inner.metrics_port
        for _ in range(200):
            sock = open_.enter_context(socket.create_connection(("127.0.0.1", port)))
            with contextlib.suppress(ConnectionError):
                sock.sendall(first)

        def is_healthy():
            with contextlib.suppress(OSError, http.client.HTTPException):
                return ask(port, "/healthz")[0] == 200

        wait_until(is_healthy)


# Labels -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "odd",
    ['a"b', "a\\b", "a\nb", "a\r\tb", "a}b", "é", "\x1b[31m", "\0", "\u2028", "\ud800", "\\n"],
)
def test_a_label_with_odd_characters_stays_one_label(odd):
    text = exposition.text([gauge("some", "Help.", Sample(1, (("hostname", odd),)), Sample(2))])
    text.encode()
    assert len(text.split("\n")) == 5
    (family,) = parser.text_string_to_metric_families(text)
    first, second = family.samples
    assert (first.value, second.value) == (1, 2)
    visible = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in odd)
    assert first.labels == {"hostname": visible}


def test_a_long_label_is_cut():
    text = exposition.text([counter("some_total", "Help.", Sample(1, (("a", '"' * 100_000),)))])
    assert len(text) < 3 * exposition.MOST_LABEL


def test_histogram():
    samples = list(histogram((0.1, 1), [1, 0, 2], 7.5, (("a", "b"),)))
    text = exposition.text([exposition.Metric("x_seconds", "histogram", "Help.", samples)])
    assert read(text) == {
        ("x_seconds_bucket", ("a", "b"), ("le", "0.1")): 1,
        ("x_seconds_bucket", ("a", "b"), ("le", "1")): 1,
        ("x_seconds_bucket", ("a", "b"), ("le", "+Inf")): 3,
        ("x_seconds_sum", ("a", "b")): 7.5,
        ("x_seconds_count", ("a", "b")): 3,
    }


@pytest.mark.parametrize("value", [0, 1, 1.5, 1e-7, 1 << 60, 1e300, float("inf")])
def test_numbers(value):
    assert read(exposition.text([gauge("x", "Help.", Sample(value))])) == {("x",): value}


def ended(hostname, routes, error="", status=200):
    visit = Visit(None, "192.0.2.1", 0.0)
    visit.hostname, visit.route = hostname, routes.get(hostname)
    visit.status, visit.error = status, error
    return visit


def visits_by_hostname(counts):
    return {name: count.visits for name, count in counts.all().items()}


def test_hostnames_are_bounded(monkeypatch):
    monkeypatch.setattr(counts_module, "MOST_HOSTNAMES", 2)
    routes = {name: Route(name, "http", None) for name in ("a", "b", "c", OTHER)}
    counts = Counts(routes.get)
    for name in ("a", "b", "c", "stranger", OTHER):
        counts([ended(name, routes)])
    assert visits_by_hostname(counts) == {"a": 1, "b": 1, OTHER: 3}
    del routes["a"]  # it is forgotten if another one needs its place, not at once
    assert counts["a"].visits == 1
    counts._full_until = 0
    counts([ended("c", routes)])
    assert visits_by_hostname(counts) == {"b": 1, "c": 1, OTHER: 3}


@pytest.mark.parametrize(
    "status, error, failed",
    [
        (200, "", 0), (404, "", 0), (499, "visitor-left", 0), (200, "visitor-left", 0),
        (500, "", 1), (502, "no-answer", 1), (200, "cut-short", 1), (200, "gateway-stopped", 1),
        (429, "too-many-requests", 0),
    ],
)  # fmt: skip
def test_what_counts_as_failed(status, error, failed):
    counts = Counts({}.get)
    counts([ended("a", {}, error, status)])
    assert counts.all()[OTHER].failed == failed


# What names them ----------------------------------------------------------------------------------


def check_rules(file, text):
    file.write_text(text)
    command = [need("promtool"), "check", "rules", str(file)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.fixture
def known(gateway, origin):
    """The names of all samples, after a visit that went well, one that did not, a peer that asked
    nothing, and an agent's word on a target."""
    (tunnel,) = gateway.inner.tunnels.registered()
    tunnel.health.note([Health(APP, True)], tunnel.routes)
    visit(gateway, origin)
    socket.create_connection(("127.0.0.1", gateway.public_port)).close()
    wait_until(lambda: any(port.dropped for port in gateway.inner.listeners.figures()))
    with gateway.dial(GATEWAY_HOST) as visitor:
        visitor.send(request(host="else.example"))
        visitor.read_head()
    errors = gateway.inner.recording.counts.errors
    wait_until(lambda: errors["misdirected"])
    return {key[0] for key in figures(gateway)}


def queries(node):
    if isinstance(node, dict):
        if "expr" in node:
            yield node["expr"]
        node = list(node.values())
    if isinstance(node, list):
        for value in node:
            yield from queries(value)


def test_the_dashboard_for_grafana_names_only_metrics_that_there_are(known, tmp_path):
    dashboard = json.loads(DASHBOARD.read_text(encoding="utf-8"))
    found = list(queries(dashboard))
    assert len(found) > 20
    used = {name for query in found for name in NAMES.findall(query)}
    assert len(used) > 20 and used <= known
    rules = [
        {"record": f"query_{number}", "expr": query.replace("$__rate_interval", "5m")}
        for number, query in enumerate(found)
    ]
    check_rules(tmp_path / "rules", json.dumps({"groups": [{"name": "all", "rules": rules}]}))


def test_the_alarms_of_the_page_are_rules_on_metrics_that_there_are(known, tmp_path):
    rules = re.search(r"```yaml\n(groups:.*?)```", PAGE.read_text("utf-8"), re.DOTALL)[1]
    check_rules(tmp_path / "rules", rules)
    assert set(NAMES.findall(rules)) <= known


def test_the_page_names_every_metric(gateway, known):
    text, page = ask(gateway.inner.metrics_port)[2], PAGE.read_text("utf-8")
    for name in re.findall(r"^# TYPE gotunnel_gateway_(\w+)", text, re.MULTILINE):
        assert f"`{name.removesuffix('_limit')}`" in page, name
