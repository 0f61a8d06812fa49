"""Replays against real targets of this machine: what they get, and what is recorded of them."""

import http.server
import socket
import ssl
import threading
import time

import pytest
from inspector_samples import a_record
from support import TIMEOUT, answer, deaf_port, reserved_port, wait_until

from gotunnel_agent import target as target_module
from gotunnel_agent.config import Target, Tunnel
from gotunnel_agent.inspector import replay as replay_module
from gotunnel_agent.inspector.mask import MASK
from gotunnel_agent.inspector.order import CannotReplay
from gotunnel_agent.inspector.record import ENDED, Kept, Ring
from gotunnel_agent.inspector.replay import Replayer, find_route, in_words, route_for
from gotunnel_agent.target import Route
from gotunnel_agent.trust import client_context
from gotunnel_server.certs.local_ca import Authority

HOSTNAME = "app.example.com"


class Bench:
    """A ring with a recorded request, and a replayer that sends it to a target."""

    def __init__(self, target, context=None, *, body=64 * 1024, record=None, **keys):
        self.ring = Ring(1 << 24)
        self.record = self.ring.add(record or a_record("POST", "/hook", 500, asked=b'{"a": 1}'))
        tunnel = Tunnel(HOSTNAME, target, keys.pop("mode", "http"), **keys)
        self.routes = {HOSTNAME: Route(tunnel, context)}
        self.replayer = Replayer(self.ring, lambda: self.routes, body=body)

    def start(self, **order):
        return self.replayer.start(self.record.id, order)

    def once(self, **order):
        """The record of one replay, which has ended."""
        replay = self.start(**order)
        assert replay.over.wait(TIMEOUT)
        (number,) = replay.document()["records"]
        return self.ring.get(number)


@pytest.fixture
def bench(origin):
    bench = Bench(Target("127.0.0.1", origin.port))
    yield bench
    bench.replayer.close()


def answers(origin, *pieces, got=None):
    """The origin reads each request, keeps it in ``got``, and answers with ``pieces``."""

    def script(wire):
        message = wire.read_message()
        if got is not None:
            got.append(message)
        for piece in pieces:
            wire.send(piece)

    origin.serve(script)


# What is sent and recorded -----------------------------------------------------------------------


def test_a_target_gets_what_it_got_before(bench, origin):
    got = []
    answers(origin, answer(b"again"), got=got)
    record = bench.once()
    assert got == [(bench.record.request_head, b'{"a": 1}')]
    assert (record.status, record.response_body) == (200, Kept(b"again", 5))
    assert (record.replay_of, record.state, record.problem) == (bench.record.id, ENDED, "")
    assert (record.method, record.path, record.visitor) == ("POST", "/hook", "192.0.2.7")
    assert record.target == f"127.0.0.1:{origin.port}" and record.hostname == HOSTNAME
    assert record.request_body == Kept(b'{"a": 1}', 8)
    assert 0 < record.first_byte <= record.duration


def test_a_target_gets_what_was_edited(bench, origin):
    got = []
    answers(origin, answer(), got=got)
    fields = [["Host", "b"], ["X-Try", "2"]]
    record = bench.once(method="PUT", path="/b c", fields=fields, body="new")
    assert got == [
        (b"PUT /b%20c HTTP/1.1\r\nHost: b\r\nX-Try: 2\r\nContent-Length: 3\r\n\r\n", b"new")
    ]
    assert (record.method, record.path) == ("PUT", "/b%20c")


def test_a_target_gets_the_secrets_that_were_masked(origin):
    fields = ["Authorization: Bearer abc.def", "Cookie: session=s3cret; theme=dark"]
    record = a_record("POST", "/?token=T", asked=b'{"password": "p"}', fields=fields)
    bench = Bench(Target("127.0.0.1", origin.port), record=record)
    got = []
    answers(origin, answer(), got=got)
    masked = [
        ["Host", HOSTNAME],
        ["Authorization", f"Bearer {MASK}"],
        ["Cookie", f"session={MASK}"],
    ]
    bench.once(path=f"/b?token={MASK}", fields=masked, body=f'{{"password": "{MASK}", "a": 1}}')
    head, body = got[0]
    assert (
        head.startswith(b"POST /b?token=T HTTP/1.1\r\n") and b"\r\nCookie: session=s3cret" in head
    )
    assert b"\r\nAuthorization: Bearer abc.def\r\n" in head
    assert body == b'{"password": "p", "a": 1}'


def test_pythons_own_server_is_a_target():
    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self):
            body = self.rfile.read(int(self.headers["Content-Length"]))
            self.send_response(201)
            self.end_headers()
            self.wfile.write(body.upper())

        def log_message(self, *arguments):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        try:
            record = Bench(Target("127.0.0.1", server.server_port)).once()
        finally:
            server.shutdown()
            thread.join()
    assert (record.status, record.response_body.data, record.problem) == (201, b'{"A": 1}', "")


def test_a_target_with_tls_is_dialled_with_its_own_trust(origin, tmp_path):
    authority = Authority(tmp_path)
    server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    server.load_cert_chain(*authority.issue("localhost"))

    def script(wire):
        wire.sock = server.wrap_socket(wire.sock, server_side=True)
        wire.read_message()
        wire.send(answer(b"x" * 100_000))

    origin.serve(script)
    target = Target("localhost", origin.port, tls=True)
    trusting = Bench(target, client_context(str(authority.ca_file))).once()
    assert (trusting.status, trusting.response_body.size) == (200, 100_000)
    record = Bench(target, client_context()).once()
    assert record.status == 0 and "its certificate is not to be trusted" in record.problem


def test_a_unix_socket_is_a_target(tmp_path):
    path = str(tmp_path / "socket")
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(path)
        listening.listen()
        bench = Bench(Target(path=path))
        replay = bench.start()
        with listening.accept()[0] as sock:
            assert sock.recv(65536).startswith(b"POST /hook ")
            sock.sendall(answer())
            assert replay.over.wait(TIMEOUT)
    assert bench.ring.get(replay.document()["records"][0]).status == 200


@pytest.mark.parametrize(
    "visitor, header",
    [
        ("192.0.2.7", b"PROXY TCP4 192.0.2.7 0.0.0.0 0 443\r\n"),
        ("2001:db8::1", b"PROXY TCP6 2001:db8::1 :: 0 443\r\n"),
        ("", b"PROXY UNKNOWN\r\n"),
        ("evil\r\nX: y", b"PROXY UNKNOWN\r\n"),
    ],
)
def test_a_target_with_the_proxy_protocol_gets_the_recorded_visitor(origin, visitor, header):
    record = a_record(visitor=visitor)
    bench = Bench(Target("127.0.0.1", origin.port), proxy_protocol="v1", record=record)
    replay = bench.start()
    with origin.accept() as wire:
        assert wire.read_until(b"\r\n") == header
        assert wire.read_head() == record.request_head
        wire.send(answer())
        assert replay.over.wait(TIMEOUT)


def test_a_target_gets_the_host_of_its_tunnel(origin):
    bench = Bench(Target("127.0.0.1", origin.port), host_header="localhost:3000")
    got = []
    answers(origin, answer(), got=got)
    bench.once()
    assert b"\r\nHost: localhost:3000\r\n" in got[0][0]


@pytest.mark.parametrize(
    "pieces, status, body",
    [
        ([b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\n", b"hello\r\n0\r\n\r\n"],
         200, b"hello"),
        ([b"HTTP/1.1 100 Continue\r\n\r\n", b"HTTP/1.1 102 \r\n\r\n", answer(b"late")],
         200, b"late"),
        ([b"HTTP/1.1 204 No Content\r\n\r\n"], 204, b""),
        ([b"HTTP/1.0 503\n\nuntil the end"], 503, b"until the end"),
    ],
)  # fmt: skip
def test_answers_of_all_framings_are_read(bench, origin, pieces, status, body):
    answers(origin, *pieces)
    record = bench.once()
    assert (record.status, record.response_body.data, record.problem) == (status, body, "")


def test_the_answer_to_head_has_no_body(bench, origin):
    answers(origin, b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\n")
    assert bench.once(method="HEAD").problem == ""


def test_a_target_may_keep_the_connection_open(bench, origin):
    replay = bench.start()
    with origin.accept() as wire:
        wire.read_message()
        wire.send(answer())
        assert replay.over.wait(TIMEOUT)
        assert wire.read() == b""  # the connection is given up, in good order


def test_only_the_beginning_of_an_answer_is_kept(origin):
    bench = Bench(Target("127.0.0.1", origin.port), body=10)
    answers(origin, answer(b"x" * 300_000))
    record = bench.once()
    assert record.response_body == Kept(b"x" * 10, 300_000) and record.problem == ""


def test_an_answer_is_read_while_the_request_is_still_written(bench, origin):
    """A target that refuses a large body answers at once, and reads no more of it."""
    replay = bench.start(body="x" * 8_000_000)
    with origin.accept() as wire:
        wire.read_head()
        wire.send(answer(b"too large", status="413 Too Large"))
        assert replay.over.wait(TIMEOUT)
    assert replay.document()["statuses"] == {"413": 1}


def test_a_large_body_is_sent_whole(bench, origin):
    got = []
    answers(origin, answer(), got=got)
    assert bench.once(body="x" * 8_000_000).status == 200
    assert len(got[0][1]) == 8_000_000


def test_the_events_of_a_stream_are_kept_as_messages(bench, origin):
    head = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n\r\n"
    replay = bench.start()
    with origin.accept() as wire:
        wire.read_message()
        wire.send(head + b"data: 1\n\nda")
        wait_until(lambda: bench.ring.all()[-1].messages)
        wire.send(b"ta: 2\r\n\r\ndata: 3")
        wire.finish()
        assert replay.over.wait(TIMEOUT)
    record = bench.ring.all()[-1]
    assert [message.data for message in record.messages] == [b"data: 1", b"data: 2", b"data: 3"]
    assert {(message.kind, message.from_visitor) for message in record.messages} == {
        ("event", False)
    }  # fmt: skip


# Targets that fail -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "pieces, status, words",
    [
        ([], 0, "no answer"),
        ([b"HTTP/1.1 2"], 0, "no answer"),
        ([b"SSH-2.0-OpenSSH\r\n\r\n"], 0, "the answer cannot be read: status line"),
        ([b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\nx"], 200, "cut short"),
        ([b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n"], 200,
         "the answer cannot be read: chunk line"),
        ([b"HTTP/1.1 200 OK\r\nX: " + b"x" * 100_000], 0, "no blank line in 65536 bytes"),
        ([b"HTTP/1.1 101 Switching Protocols\r\n\r\n"], 0, "status 101"),
    ],
)  # fmt: skip
def test_an_answer_that_is_not_whole_says_why(bench, origin, pieces, status, words):
    answers(origin, *pieces)
    record = bench.once()
    assert record.status == status and words in record.problem
    assert record.state == ENDED


def test_a_target_that_resets_is_told_of(bench, origin):
    origin.serve(lambda wire: [wire.read_message(), wire.reset()])
    assert bench.once().problem.startswith("no answer: ")


def test_a_target_where_nothing_listens_is_told_of():
    with reserved_port() as port:
        record = Bench(Target("127.0.0.1", port)).once()
    assert record.problem.startswith("the target was not reached: Connection refused")


def test_a_target_that_accepts_nothing_is_given_up(monkeypatch):
    monkeypatch.setattr(target_module, "DIAL_TIMEOUT", 0.1)
    with deaf_port() as port:
        assert "no answer in 0.1 s" in Bench(Target("127.0.0.1", port)).once().problem


@pytest.mark.parametrize(
    "statuses, problems, text",
    [
        ({"200": 1}, {}, "200"),
        ({"200": 1}, {"cut short": 1}, "200, cut short"),
        ({"0": 1}, {"no answer in 5 s": 1}, "no answer in 5 s"),
    ],
)
def test_one_try_is_told_in_few_words(statuses, problems, text):
    document = {"done": 1, "times": 1, "until": None, "state": "ended"}
    assert in_words({**document, "statuses": statuses, "problems": problems}) == text


def test_a_target_that_never_answers_is_given_up(bench, origin):
    replay = bench.start(timeout=0.1)
    with origin.accept() as wire:
        wire.read_message()
        assert replay.over.wait(TIMEOUT)
        assert replay.document()["problems"] == {"no answer in 0.1 s": 1}


def test_a_target_that_answers_for_ever_is_cut(bench, origin, monkeypatch):
    def script(wire):
        wire.read_message()
        wire.send(b"HTTP/1.1 200 OK\r\n\r\n")
        while True:
            wire.send(b"x" * 65536)

    class AfterSomeLooks:
        """A deadline that does not depend on how fast this machine is."""

        def __init__(self, timeout):
            self.looks = 50

        def left(self):
            self.looks -= 1
            if not self.looks:
                raise TimeoutError
            return TIMEOUT

    origin.serve(script)
    monkeypatch.setattr(replay_module, "Deadline", AfterSomeLooks)
    record = bench.once(timeout=7)
    assert record.problem == "cut short: not whole in 7 s" and record.status == 200
    assert record.response_body.size > 0 and len(record.response_body.data) <= 65536


def test_an_endless_answer_is_cut_at_a_limit(bench, origin, monkeypatch):
    monkeypatch.setattr(replay_module, "MOST_ANSWER", 100_000)
    answers(origin, answer(b"x" * 200_000))
    assert bench.once().problem == "cut short: over 100000 bytes"


def test_the_beginning_of_a_slow_answer_is_shown_before_its_end(bench, origin):
    replay = bench.start()
    with origin.accept() as wire:
        wire.read_message()
        wire.send(b"HTTP/1.1 200 OK\r\nContent-Length: 3\r\n\r\na")
        wait_until(lambda: bench.ring.all()[-1].response_body.size == 1)
        record = bench.ring.all()[-1]
        assert (record.status, record.state) == (200, "open") and record.first_byte
        wire.send(b"bc")
        assert replay.over.wait(TIMEOUT)
    assert record.response_body == Kept(b"abc", 3)


# Many times --------------------------------------------------------------------------------------


def test_a_webhook_is_sent_until_it_passes(bench, origin):
    answering = iter([b"500 Oops", b"503 Later", b"200 OK"])
    origin.serve(
        lambda wire: [
            wire.read_message(),
            wire.send(b"HTTP/1.1 " + next(answering) + b"\r\nContent-Length: 0\r\n\r\n"),
        ]
    )
    replay = bench.start(until="2xx", every=0)
    assert replay.over.wait(TIMEOUT)
    document = replay.document()
    assert (document["state"], document["done"], document["times"]) == ("passed", 3, 20)
    assert document["statuses"] == {"200": 1, "500": 1, "503": 1}
    assert document["text"] == "passed at try 3: 1 x 200, 1 x 500, 1 x 503"
    assert [bench.ring.get(number).status for number in document["records"]] == [500, 503, 200]


def test_a_webhook_that_never_passes_has_an_end(bench, origin):
    answers(origin, answer(status="500 Oops"))
    replay = bench.start(until=200, every=0, times=3)
    assert replay.over.wait(TIMEOUT)
    assert replay.document()["text"] == "ended, 3 of 3 tries: 3 x 500; no answer was 200"


def test_a_cut_answer_does_not_pass(bench, origin):
    answers(origin, b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\nx")
    replay = bench.start(until=200, every=0, times=2)
    assert replay.over.wait(TIMEOUT)
    assert replay.document()["state"] == "ended"


def test_equal_answers_are_counted_together(bench, origin, monkeypatch):
    monkeypatch.setattr(replay_module, "MOST_GROUPS", 2)
    bodies = iter([b"a", b"b", b"a", b"c", b"d", b"a"])
    origin.serve(lambda wire: [wire.read_message(), wire.send(answer(next(bodies)))])
    replay = bench.start(times=6)
    assert replay.over.wait(TIMEOUT)
    groups = replay.document()["groups"]
    assert [(group["record"], group["count"], group["mixed"]) for group in groups] == [
        (2, 3, False), (3, 1, False), (5, 2, True),
    ]  # fmt: skip


def test_several_are_sent_at_once(bench, origin):
    meeting = threading.Barrier(4)
    origin.serve(lambda wire: [wire.read_message(), meeting.wait(TIMEOUT), wire.send(answer())])
    replay = bench.start(times=8, concurrency=4)
    assert replay.over.wait(TIMEOUT)
    assert replay.document()["statuses"] == {"200": 8}


def test_a_replay_can_be_stopped_while_it_waits(bench, origin):
    answers(origin, answer(status="500 Oops"))
    replay = bench.start(until="2xx", every=3600)
    wait_until(lambda: replay.document()["next_at"])
    assert bench.replayer.stop(replay.id) is replay
    assert replay.over.wait(TIMEOUT)
    assert replay.document()["text"].startswith("stopped, 1 of 20 tries: 1 x 500")


def test_a_replay_can_be_stopped_while_it_is_answered(bench, origin):
    replay = bench.start(times=100)
    with origin.accept() as wire:
        wire.read_message()
        replay.stop()
        assert replay.over.wait(TIMEOUT)
        assert replay.document()["problems"] == {"stopped": 1}
    assert len(bench.ring.all()) == 2


def test_only_so_many_replays_run(bench, origin):
    replays = [bench.start() for _ in range(replay_module.MOST_RUNNING)]
    with pytest.raises(CannotReplay, match="4 replays run, expected at most 4") as caught:
        bench.start()
    assert caught.value.code == "busy"
    bench.replayer.close()
    assert all(replay.over.wait(TIMEOUT) for replay in replays)
    with pytest.raises(CannotReplay, match="the agent stops"):
        bench.start()


def test_old_replays_are_forgotten(bench, origin, monkeypatch):
    monkeypatch.setattr(replay_module, "MOST_KEPT", 2)
    answers(origin, answer())
    for _ in range(5):
        bench.once()
    assert [replay.id for replay in bench.replayer.all()] == [3, 4, 5]
    assert bench.replayer.get(1) is None and bench.replayer.stop(1) is None


def test_a_replay_that_is_over_holds_no_body(bench, origin):
    answers(origin, answer())
    replay = bench.start(body="x" * 1_000_000)
    assert replay.over.wait(TIMEOUT)
    held = [value for value in vars(replay).values() if value is not None]
    assert "x" * 100 not in repr(held)
    assert replay.document()["method"] == "POST"


def test_readers_are_told_how_a_replay_goes(bench, origin):
    answers(origin, answer())
    with bench.ring.subscribe() as reader:
        replay = bench.start(times=3)
        told = []

        def ended():
            told.extend(reader.take_now().events)
            return told and told[-1][1]["state"] == "ended"

        wait_until(ended)
    assert {name for name, _ in told} == {"replay"}
    assert told[-1][1] == replay.document() and told[-1][1]["done"] == 3


# What is refused ---------------------------------------------------------------------------------


def refusal(bench, **order):
    with pytest.raises(CannotReplay) as caught:
        bench.start(**order)
    return caught.value.code, str(caught.value)


def test_a_visit_that_is_gone_cannot_be_replayed(bench):
    bench.ring.clear()
    assert refusal(bench) == ("not-found", "there is no visit 1 any more")


@pytest.mark.parametrize(
    "named, keys, code, words",
    [
        ({"mode": "tcp"}, {}, "tcp", "a visit in tcp mode cannot be replayed"),
        ({}, {"mode": "tcp"}, "tcp", "is in tcp mode"),
        ({}, {"protocol": "h2c"}, "http2", "speaks HTTP/2"),
        ({"hostname": "other.example.com"}, {}, "no-tunnel", "name one by hostname: app.example"),
        ({"hostname": "\x1b[31m"}, {}, "no-tunnel", r"serves \x1b[31m;"),
        ({"status": 101}, {}, "websocket", "a WebSocket handshake"),
        ({"request_head": b""}, {}, "no-request", "was not read"),
        ({"asked": Kept(b"x", 2)}, {}, "incomplete-body", "only 1 of its body's 2 bytes"),
    ],
)
def test_what_cannot_be_replayed_says_why(origin, named, keys, code, words):
    bench = Bench(Target("127.0.0.1", origin.port), record=a_record("POST", **named), **keys)
    found, text = refusal(bench)
    assert found == code and words in text and text.isprintable()
    assert origin.was_left_alone()


def test_an_imported_record_goes_to_the_only_tunnel_or_to_the_named_one(origin):
    answers(origin, answer())
    record = a_record(hostname="elsewhere.example", imported=True)
    bench = Bench(Target("127.0.0.1", origin.port), record=record)
    assert bench.once().status == 200
    bench.routes["b.example.com"] = bench.routes[HOSTNAME]
    assert refusal(bench)[0] == "no-tunnel"
    assert bench.once(hostname="B.example.com").status == 200


@pytest.mark.parametrize(
    "hostname, found",
    [("a.example", "exact"), ("x.dev.example", "wild"), ("y.x.dev.example", "wild"),
     ("dev.example", None), ("example", None), ("otter.dev.test", "open"), ("a.otter.test", None)],
)  # fmt: skip
def test_a_hostname_may_belong_to_a_wildcard_or_an_open_name(hostname, found):
    routes = {"a.example": "exact", "*.dev.example": "wild", "otter.*": "open"}
    assert find_route(hostname, routes) == found


def test_a_hostname_that_is_too_long_is_not_looked_for():
    began = time.process_time()
    with pytest.raises(CannotReplay, match="no tunnel of this agent serves a.a.a") as refused:
        route_for(a_record(), "a." * 100_000, {})
    assert time.process_time() - began < 0.5 and len(str(refused.value)) < 500
