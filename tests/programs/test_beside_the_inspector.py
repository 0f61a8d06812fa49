"""What passes while the inspector looks on: the same bytes, none of them later.

Each test compares hashes of what was sent and what came, and looks what the inspector has kept.
"""

import contextlib
import hashlib
import itertools
import random
import threading

import pytest
from support import APP, MIB, TIMEOUT, agent_here, answer, at_length, gateway_here, wait_until
from test_real_programs import websocket
from websockets.sync.server import serve

from gotunnel_agent.config import Inspect
from gotunnel_agent.inspector import start_inspector

BODY = 64 * 1024  # bytes of each body that are kept


@pytest.fixture
def gateway(cache):
    with gateway_here(cache) as gateway:
        yield gateway


@pytest.fixture
def inspected(gateway, tmp_path, monkeypatch):
    """A function: an agent with an inspector serves APP from a port until the test is over. It
    returns the ring of the inspector."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    with contextlib.ExitStack() as stack:

        def inspected(port):
            agent = stack.enter_context(agent_here(gateway, tmp_path, http={APP: port}))
            inspector = start_inspector(agent, Inspect(port=0))
            stack.callback(inspector.close)
            return inspector._ring

        yield inspected


def only(ring):
    """The one record, once it has ended."""
    wait_until(lambda: [one for one in ring.all() if one.state == "ended"])
    (record,) = ring.all()
    return record


def pieces(mebibytes):
    """The same noise again and again, with the number of each piece, so that none is like another;
    and the hash of all."""
    noise = random.Random(1).randbytes(MIB - 8)
    whole = hashlib.sha256()
    for number in range(mebibytes):
        piece = number.to_bytes(8, "big") + noise
        whole.update(piece)
        yield piece
    yield whole.hexdigest()


@pytest.mark.slow
@pytest.mark.parametrize("mebibytes", [64, at_length(1024)])
def test_a_download_is_unchanged(gateway, inspected, origin, mebibytes):
    sent = []

    def script(target):
        target.read_head()
        target.send(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % (mebibytes * MIB))
        for piece in pieces(mebibytes):
            target.send(piece) if isinstance(piece, bytes) else sent.append(piece)

    origin.serve(script)
    ring = inspected(origin.port)
    came = hashlib.sha256()
    with gateway.visitor(APP) as visitor:
        visitor.request("GET", "/download")
        response = visitor.getresponse()
        first = response.read(BODY)
        came.update(first)
        while data := response.read(MIB):
            came.update(data)
    assert [came.hexdigest()] == sent
    record = only(ring)
    assert record.response_body.size == mebibytes * MIB
    assert record.response_body.data == first
    assert not record.problem and ring.used < ring.budget


@pytest.mark.slow
@pytest.mark.parametrize("mebibytes", [32, at_length(512)])
def test_a_chunked_upload_is_unchanged(gateway, inspected, origin, mebibytes):
    def script(target):
        target.read_head()
        came = hashlib.sha256()
        while size := int(target.read_until(b"\r\n"), 16):
            came.update(target.read_exactly(size))
            target.read_exactly(2)
        target.read_until(b"\r\n")
        target.send(answer(came.hexdigest().encode()))

    origin.serve(script)
    ring = inspected(origin.port)
    sent = []

    def body():
        for piece in pieces(mebibytes):
            if isinstance(piece, bytes):
                yield piece
            else:
                sent.append(piece)

    with gateway.visitor(APP) as visitor:
        visitor.request("POST", "/upload", body(), encode_chunked=True,
                        headers={"Transfer-Encoding": "chunked"})  # fmt: skip
        assert [visitor.getresponse().read().decode()] == sent
    record = only(ring)
    assert record.request_body.size == mebibytes * MIB
    assert record.request_body.data == next(pieces(1))[:BODY]
    assert not record.problem


@contextlib.contextmanager
def echoing():
    """A WebSocket server that echoes frames of any size; yields its port."""

    def echo(peer):
        for message in peer:
            peer.send(message)

    with serve(echo, "127.0.0.1", 0, max_size=None, compression=None) as server:
        life = threading.Thread(target=server.serve_forever, name="websocket target")
        life.start()
        yield server.socket.getsockname()[1]
    life.join(TIMEOUT)


@pytest.mark.slow
def test_websocket_frames_of_64_mebibytes_are_unchanged(gateway, inspected):
    message = random.Random(2).randbytes(64 * MIB)
    with echoing() as port:
        ring = inspected(port)
        with websocket(gateway, compression=None, max_size=None) as visitor:
            for _ in range(2):
                visitor.send(message)
                assert visitor.recv(TIMEOUT) == message
            visitor.send("small")
            assert visitor.recv(TIMEOUT) == "small"
        record = only(ring)
    told = [(m.from_visitor, m.kind, m.size) for m in record.messages if m.kind != "close"]
    large = [(True, "binary", 64 * MIB), (False, "binary", 64 * MIB)]
    assert told == 2 * large + [(True, "text", 5), (False, "text", 5)]
    for kept in record.messages[:4]:
        assert kept.data and message.startswith(kept.data) and len(kept.data) <= BODY
    assert not record.problem and ring.used < ring.budget


def messages(ring):
    return [message.data for record in ring.all() for message in record.messages]


@pytest.mark.slow
def test_events_pass_one_by_one_as_they_are_sent(gateway, inspected, origin):
    """Each is sent only when the one before has come: holding back a byte would be a deadlock."""
    came = threading.Semaphore(0)

    def script(target):
        target.read_head()
        target.send(b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n\r\n")
        for number in range(6):
            target.send(b"data: %d\n\n" % number)
            assert came.acquire(timeout=TIMEOUT)

    origin.serve(script)
    ring = inspected(origin.port)
    with gateway.dial(APP) as visitor:
        visitor.send(b"GET /events HTTP/1.1\r\nHost: app.localhost\r\n\r\n")
        visitor.read_head()
        for number in range(6):
            visitor.read_until(b"data: %d\n\n" % number)
            wait_until(lambda number=number: len(messages(ring)) > number)
            came.release()
        visitor.read_until(b"0\r\n\r\n")  # the last chunk
    assert messages(ring) == [b"data: %d" % number for number in range(6)]


def test_a_target_that_speaks_no_http_is_passed_on_and_marked(gateway, inspected, origin):
    """The gateway refuses it, as it does without an inspector."""
    origin.serve(lambda target: (target.read_head(), target.send(b"SSH-2.0-nonsense\r\n")))
    ring = inspected(origin.port)
    assert gateway.get(APP)[0] == 502
    wait_until(lambda: [one for one in ring.all() if one.problem])


def test_one_visitor_after_another_over_one_connection(gateway, inspected, origin):
    def script(target):
        for number in itertools.count():
            target.read_head()
            target.send(answer(b"%d" % number))

    origin.serve(script)
    ring = inspected(origin.port)
    with gateway.visitor(APP) as visitor:
        for number in range(50):
            visitor.request("GET", f"/{number}")
            assert visitor.getresponse().read() == b"%d" % number
    wait_until(lambda: sum(one.state == "ended" for one in ring.all()) == 50)
    assert [(one.path, one.response_body.data) for one in ring.all()] == [
        (f"/{number}", b"%d" % number) for number in range(50)
    ]
