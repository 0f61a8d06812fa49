"""Looks at targets: what the configuration says of them, how looks become a verdict, what a look
takes for well, and who hears of it."""

import contextlib
import importlib
import socket
import ssl
import subprocess
import sys
import threading

import pytest
from support import APP, ROOT, TIMEOUT, deaf_port, need_package, reserved_port, wait_until
from test_agent_config import MINIMAL, loaded, refusal

from gotunnel import HEALTH, SessionClosed, decode_message
from gotunnel import Health as Message
from gotunnel_agent import health as watching
from gotunnel_agent import http2_check
from gotunnel_agent.config import STATUSES, Health, Target, Tunnel
from gotunnel_agent.health import Judge, check
from gotunnel_agent.target import Route, Targets
from gotunnel_agent.trust import tls_context
from gotunnel_server.certs.local_ca import Authority

HTTP2 = MINIMAL + "    protocol: h2c\n"
TCP = MINIMAL + "    mode: tcp\n"


def of(text, start=MINIMAL):
    """What a tunnel's ``health`` stands for."""
    return loaded(f"{start}    health: {text}\n").tunnels[0].health


# The configuration -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("/healthz", Health("/healthz")),
        ("tcp", Health()),
        ("on", Health()),
        ("{}", Health()),
        ("off", None),
        ('{path: "/up?full=1"}', Health("/up?full=1")),
        ("{every: 10s, fails: 2, passes: 4}", Health(every=10, fails=2, passes=4)),
        ("{every: 1, timeout: 500ms}", Health(every=1, timeout=0.5)),
        ("{every: 1m, timeout: 0.25 s}", Health(every=60, timeout=0.25)),
        ("{every: 1s}", Health(every=1, timeout=1)),  # never longer than the interval
        ("{path: /, statuses: 200}", Health("/", statuses=((200, 200),))),
        ('{path: /, statuses: "200, 204-299"}', Health("/", statuses=((200, 200), (204, 299)))),
        ("{path: /, statuses: [200, 301 - 302]}", Health("/", statuses=((200, 200), (301, 302)))),
    ],
)
def test_health_of_a_tunnel(text, expected):
    assert of(text) == expected


def test_connection_is_enough_without_a_path():
    assert of("{every: 2s}", TCP) == of("{every: 2s}") == of("{every: 2s}", HTTP2)
    assert of("/healthz", HTTP2) == Health("/healthz")
    assert loaded(MINIMAL).tunnels[0].health is None


@pytest.mark.parametrize(
    ("start", "text", "expected"),
    [
        (MINIMAL, "healthz", "health.path: 'healthz' came, expected a path such as /healthz"),
        (MINIMAL, '"/a b"', "health.path: '/a b' came"),
        (MINIMAL, "/a#b", "health.path: '/a#b' came"),
        (MINIMAL, "[/a]", "health: a list came, expected a path such as /healthz, a mapping, tcp"),
        (MINIMAL, "{pth: /a}", "health: unknown key 'pth', did you mean 'path'?"),
        (MINIMAL, "{every: 0.5s}", "health.every: '0.5s' came, expected a time from 1 s to 3600 s"),
        (MINIMAL, "{every: soon}", "health.every: 'soon' came"),
        (MINIMAL, "{timeout: 10s}", "health.timeout: 10 s came, expected at most every"),
        (MINIMAL, "{fails: 0}", "health.fails: '0' came, expected a number of checks in a row"),
        (MINIMAL, "{passes: 1.5}", "health.passes: '1.5' came"),
        (MINIMAL, "{statuses: 200}", "health.statuses came without a path"),
        (MINIMAL, "{path: /, statuses: 100}", "health.statuses: '100' came, expected statuses"),
        (MINIMAL, "{path: /, statuses: 299-200}", "health.statuses: '299-200' came"),
        (MINIMAL, "{path: /, statuses: []}", "health.statuses: a list came"),
        (TCP, "/healthz", "health.path: the tunnel has mode tcp, expected mode http"),
    ],
)
def test_health_that_cannot_be(start, text, expected):
    assert f"tunnels[0].{expected}" in refusal(f"{start}    health: {text}\n")


# The verdict -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("looks", "verdicts"),
    [
        ("+", "+"),  # the first look decides alone
        ("-", "-"),
        ("+--", "+++"),
        ("+---", "+++-"),
        ("+--+--", "++++++"),  # in a row
        ("+---+", "+++--"),
        ("+---++", "+++--+"),
        ("-+-++", "----+"),
    ],
)
def test_verdict_needs_some_looks_in_a_row(looks, verdicts):
    judge = Judge(Health(fails=3, passes=2))
    found, before = "", None
    for sign in looks:
        changed = judge.note("" if sign == "+" else "refused")
        verdict = "-" if judge.problem else "+"
        assert changed is (verdict != before)
        found, before = found + verdict, verdict
    assert found == verdicts


def test_target_that_is_not_well_is_looked_at_twice_as_often():
    judge = Judge(Health(every=6))
    assert judge.interval == 6
    judge.note("refused")
    assert judge.interval == 3


# A look ------------------------------------------------------------------------------------------


def look_at(target, *, context=None, path="/healthz", timeout=TIMEOUT, statuses=STATUSES, **keys):
    """What a look finds: why a target is not well, or ""."""
    settings = Health(path, every=60, timeout=timeout, statuses=statuses)
    mode = "http" if path else "tcp"
    tunnel = Tunnel(APP, target, mode, health=settings, **keys)
    return check(APP, Route(tunnel, context), settings, Targets())


def at(port, **more):
    return Target("127.0.0.1", port, **more)


def answering(origin, *pieces, hangs_up=True):
    """The requests that a target gets which answers by these pieces."""
    asked = []

    def script(wire):
        asked.append(wire.read_head())
        for piece in pieces:
            wire.send(piece)
        if not hangs_up:
            wire.read_to_end()

    origin.serve(script)
    return asked


@pytest.mark.parametrize(
    ("pieces", "problem"),
    [
        ([b"HTTP/1.1 200 OK\r\n\r\n"], ""),
        ([b"HTTP/1.1 200 OK\r\nContent-Length: 9999999\r\n\r\nsome"], ""),  # the body is not read
        ([b"HTTP/1.0 204 No Content\r\n\r\n"], ""),
        ([b"HTTP/1.1 301 Moved\r\n", b"Location: /\r\n", b"\r\n"], ""),
        ([b"HTTP/1.1 100 Continue\r\n\r\n", b"HTTP/1.1 200 OK\r\n\r\n"], ""),
        ([b"HTTP/1.1 404 Not Found\r\n\r\n"], "404 for GET /healthz"),
        ([b"HTTP/1.1 503 Busy\r\n\r\n"], "503 for GET /healthz"),
        ([b"SSH-2.0-OpenSSH\r\n\r\n"], "an answer that is not HTTP"),
        ([b"HTTP/1.1 200 OK\r\n" + b"X: y\r\n" * 20000], "an answer that is not HTTP"),
        ([], "it was closed without an answer"),
        ([b"HTTP/1.1 200 OK\r\n"], "it was closed without an answer"),
    ],
)
def test_answer_tells_whether_a_target_is_well(origin, pieces, problem):
    answering(origin, *pieces)
    found = look_at(at(origin.port))
    assert problem in found if problem else found == ""


def test_request_of_a_look(origin):
    asked = answering(origin, b"HTTP/1.1 200 OK\r\n\r\n")
    assert look_at(at(origin.port), path="/up?full=1") == ""
    assert look_at(at(origin.port), host_header="inner.test") == ""
    first, second = (head.decode().split("\r\n") for head in asked)
    assert first[0] == "GET /up?full=1 HTTP/1.1" and f"Host: {APP}" in first
    assert "X-Forwarded-Proto: https" in first and "Connection: close" in first
    assert "Host: inner.test" in second


def test_look_at_a_wildcard_has_a_hostname_without_it(origin):
    asked = answering(origin, b"HTTP/1.1 200 OK\r\n\r\n")
    settings = Health("/")
    route = Route(Tunnel("*.dev.test", at(origin.port), "http", health=settings))
    assert check("*.dev.test", route, settings, Targets()) == ""
    assert b"\r\nHost: dev.test\r\n" in asked[0]


def test_expected_statuses(origin):
    answering(origin, b"HTTP/1.1 401 Who\r\n\r\n")
    assert look_at(at(origin.port), statuses=((200, 299), (401, 401))) == ""
    assert look_at(at(origin.port), statuses=((200, 299),)) == "401 for GET /healthz"


@pytest.mark.parametrize(
    ("version", "first"), [("v1", b"PROXY UNKNOWN\r\n"), ("v2", b"\r\n\r\n\0\r\nQUIT\n\x20\0\0\0")]
)
def test_target_gets_its_proxy_header(origin, version, first):
    came = []

    def script(wire):
        came.append(wire.read_exactly(len(first)))
        wire.read_head()
        wire.send(b"HTTP/1.1 200 OK\r\n\r\n")

    origin.serve(script)
    assert look_at(at(origin.port), proxy_protocol=version) == ""
    assert came == [first]


def test_target_with_tls_and_on_a_unix_socket(cache, tmp_path):
    authority = Authority(cache / "looks")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(*authority.issue("localhost"))
    trust = tls_context(str(authority.ca_file), False)
    with socket.create_server(("127.0.0.1", 0)) as listening:
        thread = threading.Thread(target=_answer_tls, args=(listening, context, 2))
        thread.start()
        target = Target("localhost", listening.getsockname()[1], tls=True)
        assert look_at(target, context=trust) == ""
        assert look_at(target, context=trust, path="") == ""
        thread.join(TIMEOUT)
    with socket.socket(socket.AF_UNIX) as listening:
        path = str(tmp_path / "socket")
        assert "No such file" in look_at(Target(path=path))
        listening.bind(path)
        listening.listen()
        assert look_at(Target(path=path), path="") == ""
        assert "no answer in 0.1 s" in look_at(Target(path=path), timeout=0.1)


def _answer_tls(listening, context, times):
    for _ in range(times):
        sock, _ = listening.accept()
        with contextlib.suppress(OSError), context.wrap_socket(sock, server_side=True) as wire:
            wire.recv(4096)
            wire.sendall(b"HTTP/1.1 200 OK\r\n\r\n")


def test_target_that_is_not_there():
    with reserved_port() as port:
        assert look_at(at(port), path="").endswith("refused; does a program listen there?")
    with deaf_port() as port:
        assert look_at(at(port), timeout=0.1) == "no answer in 0.1 s"


def test_target_that_trickles_has_no_more_time(origin):
    def script(wire):
        while True:
            wire.send(b"x")
            over.wait(0.02)

    over = threading.Event()
    origin.serve(script)
    assert look_at(at(origin.port), timeout=0.3) == "no answer in 0.3 s for GET /healthz"
    over.set()


# In HTTP/2 ---------------------------------------------------------------------------------------


def h2_frame(kind, payload=b"", flags=0, stream=0):
    return http2_check.frame(kind, flags, stream, payload)


def h2_answer(block, flags=http2_check.END_HEADERS):
    return h2_frame(http2_check.SETTINGS) + h2_frame(http2_check.HEADERS, block, flags, 1)


@pytest.mark.parametrize(
    ("block", "problem"),
    [
        ("88", ""),
        ("20 88", ""),  # behind a size update of the dynamic table, short and long
        ("3f e1 1f 89", ""),
        ("8e", "500 for"),
        ("08 03 33 30 32", ""),  # 302: without indexing, with it, never indexed
        ("48 03 35 30 33", "503 for"),
        ("18 03 34 30 31", "401 for"),
        ("48 82 64 02", ""),  # 302 as RFC 7541 C.6.1 has it
        ("48 83 64 0e ff", ""),  # 307, C.6.2
        ("48 82 6c 19", "503 for"),
        ("88 0f 12 96 d0", ""),  # what follows is not read
        ("82", "no :status"),
        ("", "no :status"),
        ("48 03 61 62 63", "no :status"),
        ("48 82 ff ff", "no :status"),
        ("be", "no :status"),  # of the dynamic table, which is off
    ],
)
def test_status_of_an_answer_in_http2(origin, block, problem):
    if block == "48 82 6c 19":
        bits = "".join(http2_check.DIGITS[int(digit)] for digit in "503").ljust(24, "1")
        data = int(bits, 2).to_bytes(3, "big")
        block = (b"\x48\x83" + data).hex()
    answering(origin, h2_answer(bytes.fromhex(block)), hangs_up=False)
    found = look_at(at(origin.port), protocol="h2c")
    assert problem in found if problem else found == ""


@pytest.mark.parametrize(
    ("pieces", "problem"),
    [
        ([h2_answer(b"\x88")[:5], h2_answer(b"\x88")[5:]], ""),
        ([h2_answer(b"\x02\x88xx", http2_check.END_HEADERS | http2_check.PADDED)], ""),
        ([h2_answer(bytes(5) + b"\x88", http2_check.END_HEADERS | http2_check.PRIORITY)], ""),
        ([h2_answer(b"\x08\x03103"), h2_answer(b"\x88")], ""),
        ([h2_frame(http2_check.PING, bytes(8)), h2_answer(b"\x88")], ""),
        ([h2_answer(b"\x09\x88", http2_check.PADDED)], "more padding than the frame has"),
        ([h2_frame(http2_check.GOAWAY, bytes(8))], "it refused the request"),
        ([h2_frame(http2_check.RST_STREAM, bytes(4), 0, 1)], "it refused the request"),
        ([b"HTTP/1.1 400 Bad Request\r\n\r\n"], "an answer that is not HTTP/2"),
        ([h2_frame(http2_check.PING, bytes(8), 1) * 20000], "no answer in its first"),
    ],
)
def test_answer_in_http2_tells_whether_a_target_is_well(origin, pieces, problem):
    # Its RST, because of what it has not read, could overtake the answer.
    answering(origin, *pieces, hangs_up="without an answer" in problem)
    found = look_at(at(origin.port), protocol="h2c")
    assert problem in found if problem else found == ""


def test_library_for_http2_understands_a_look(origin):
    """With a long path, and settings that it acknowledges."""
    config = need_package("h2", "http2")
    events = []
    path = "/" + "x" * 500

    def script(wire):
        server = config.connection.H2Connection(
            config.config.H2Configuration(client_side=False, header_encoding="utf-8")
        )
        server.initiate_connection()
        wire.send(server.data_to_send())
        while not any(isinstance(event, config.events.StreamEnded) for event in events):
            events.extend(server.receive_data(wire.read()))
        server.send_headers(1, [(":status", "299"), ("server", "h2")], end_stream=True)
        wire.send(server.data_to_send())

    origin.serve(script)
    importlib.import_module("h2.connection"), importlib.import_module("h2.events")
    importlib.import_module("h2.config")
    assert look_at(at(origin.port), protocol="h2c", path=path, host_header="in.test") == ""
    (asked,) = [event for event in events if isinstance(event, config.events.RequestReceived)]
    fields = dict(asked.headers)
    assert fields[":path"] == path and fields[":authority"] == "in.test"
    assert fields[":scheme"] == "http" and fields["x-forwarded-proto"] == "https"


# All looks of an agent ---------------------------------------------------------------------------


class Control:
    """A session's control stream, which notes what is said."""

    def __init__(self):
        self.said, self.broken, self._grown = [], False, threading.Condition()

    def write(self, data, timeout=None):
        assert timeout is not None
        if self.broken:
            raise SessionClosed("over")
        with self._grown:
            self.said.append(decode_message(data))
            self._grown.notify_all()

    def wait_for(self, *messages):
        with self._grown:
            assert self._grown.wait_for(lambda: self.said[-len(messages) :] == [*messages], TIMEOUT)


@contextlib.contextmanager
def looking(verdicts, on_change=lambda: None):
    """A Health whose looks find what stands in ``verdicts``, by hostname."""
    found = watching.Health(on_change, lambda hostname, *rest: verdicts[hostname])
    try:
        yield found
    finally:
        found.close()


def routes(*hostnames, every=0.01, **more):
    settings = Health("/", every=every, fails=2)
    return {name: Route(Tunnel(name, at(1), "http", health=settings), **more) for name in hostnames}


def ill(hostname, reason="503"):
    return Message(hostname, False, reason)


def well(hostname):
    return Message(hostname, True)


def test_gateway_is_told_first_and_at_each_change():
    verdicts, control, changes = {"a": ""}, Control(), []
    with looking(verdicts, lambda: changes.append(1)) as health:
        health.attend("session", (HEALTH,), routes("a"), control, "gateway")
        control.wait_for(well("a"))
        assert health.snapshot() == {"a": ""}
        verdicts["a"] = "503"
        control.wait_for(well("a"), ill("a"))
        verdicts["a"] = ""
        control.wait_for(well("a"), ill("a"), well("a"))
        wait_until(lambda: len(changes) == 3)
        assert len(control.said) == 3


def test_each_new_session_is_told_what_is_known():
    verdicts, first, second = {"a": "503", "b": ""}, Control(), Control()
    with looking(verdicts) as health:
        health.attend(1, (HEALTH,), routes("a", every=600), first, "gateway")
        first.wait_for(ill("a"))
        health.forget(1)
        assert health.snapshot() == {"a": "503"}  # it is looked at meanwhile
        health.attend(2, (HEALTH,), routes("a", "b", every=600), second, "gateway")
        wait_until(lambda: len(second.said) == 2)
        assert set(second.said) == {ill("a"), well("b")} and first.said == [ill("a")]
        health.forget(2)
        health.forget(2)


def test_each_gateway_hears_of_its_own_hostnames():
    verdicts, first, second = {"a": "503", "b": "504"}, Control(), Control()
    with looking(verdicts) as health:
        health.attend(1, (HEALTH,), routes("a", every=600), first, "one")
        health.attend(2, (HEALTH,), routes("b", every=600), second, "other")
        first.wait_for(ill("a"))
        second.wait_for(ill("b", "504"))
        health.forget(1)
        assert set(health.snapshot()) == {"b"}


def test_broken_session_disturbs_no_other_one():
    verdicts, broken, good = {"a": ""}, Control(), Control()
    broken.broken = True
    with looking(verdicts) as health:
        health.attend(1, (HEALTH,), routes("a"), broken, "one")
        health.attend(2, (HEALTH,), routes("a"), good, "other")
        good.wait_for(well("a"))
        verdicts["a"] = "503"
        good.wait_for(well("a"), ill("a"))


def test_gateway_that_does_not_know_it_is_named_once_and_told_nothing(caplog):
    verdicts, control = {"a": "503"}, Control()
    with looking(verdicts) as health:
        health.attend(1, (), routes("a"), control, "gateway:9443")
        wait_until(lambda: health.snapshot() == {"a": "503"})
        health.forget(1)
        health.attend(2, (), routes("a"), control, "gateway:9443")
        assert not control.said
    lines = [line for line in caplog.messages if "knows no health checks" in line]
    assert lines == [watching.NOT_HELD % ("gateway:9443", "a")]


def test_target_of_another_configuration_is_judged_anew():
    verdicts, control = {"a": "503"}, Control()
    with looking(verdicts) as health:
        health.attend(1, (HEALTH,), routes("a", every=600), control, "gateway")
        control.wait_for(ill("a"))
        verdicts["a"] = ""
        health.attend(2, (HEALTH,), routes("a", every=601), control, "gateway")
        wait_until(lambda: health.snapshot() == {"a": ""})
        health.forget(1)
        health.attend(3, (), {}, control, "gateway")
        health.forget(2)
        assert health.snapshot() == {}


def test_what_the_gateway_does_not_serve_is_not_looked_at():
    with looking({}) as health:
        health.attend(1, (HEALTH,), routes("a", problem="no port"), Control(), "gateway")
        assert health.snapshot() == {} and health._thread is None


def test_target_whose_port_comes_later_is_looked_at():
    control = Control()
    with looking({"a": "503"}) as health:
        later = routes("a", problem="its port is in use", awaits_port=True)
        health.attend(1, (HEALTH,), later, control, "gateway")
        control.wait_for(ill("a"))


def test_look_that_fails_by_a_bug_is_no_good_look(caplog):
    control = Control()
    with looking({}) as health:  # KeyError
        health.attend(1, (HEALTH,), routes("a"), control, "gateway")
        wait_until(lambda: control.said)
        assert "bug of the agent" in health.snapshot()["a"]


def test_hundreds_of_targets_have_few_threads():
    names = [f"{number}.test" for number in range(300)]
    control, seen = Control(), set()

    def slow(hostname, *rest):
        seen.add(threading.current_thread().name)
        return ""

    health = watching.Health(lambda: None, slow)
    try:
        watching_at_once = routes(*names, every=0.5)
        health.attend(1, (HEALTH,), watching_at_once, control, "gateway")
        wait_until(lambda: len(control.said) == 300)
    finally:
        health.close()
    assert len(seen) <= watching.CHECKERS


def test_close_ends_looks_that_hang(origin):
    """Their targets accept, and say nothing."""
    control = Control()
    health = watching.Health(lambda: None)
    settings = Health("/", every=60, timeout=60)
    tunnel = Tunnel("a.test", at(origin.port), "http", health=settings)
    health.attend(1, (HEALTH,), {"a.test": Route(tunnel)}, control, "gateway")
    origin.accept()
    health.close()
    assert not control.said


def test_agent_without_health_does_not_load_it():
    code = (
        "import sys, gotunnel_agent.agent, gotunnel_agent.cli; "
        "assert 'gotunnel_agent.health' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)
