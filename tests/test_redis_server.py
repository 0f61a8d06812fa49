"""The Redis of the tests, and the line to it, do what tests of a cluster rely on."""

import socket
import time

import pytest
from redis_server import BACK, OUT, RedisError, redis_process
from support import Origin, Wire, wait_until


def test_a_server_loses_what_was_not_saved(redis_server):
    redis_server.call("SET", "a", 1)
    redis_server.restart()
    assert redis_server.call("GET", "a") == "1"
    redis_server.call("SET", "b", 1)
    redis_server.kill()
    redis_server.start(keep=True)
    assert redis_server.call("MGET", "a", "b") == ["1", None]
    redis_server.restart(keep=False)
    assert redis_server.call("DBSIZE") == 0


def test_a_paused_server_answers_when_it_is_resumed(redis_server):
    redis_server.pause()
    with socket.create_connection(("127.0.0.1", redis_server.port)) as sock:
        sock.sendall(b"PING\r\n")
        sock.settimeout(0.05)
        with pytest.raises(TimeoutError):
            sock.recv(100)
        redis_server.resume()
        sock.settimeout(10)
        assert sock.recv(100) == b"+PONG\r\n"


def test_a_server_has_a_password_and_a_unix_socket(redis_server):
    with redis_process(password="a-word") as server:
        assert server.call("PING") == "PONG"
        server.password = None
        with pytest.raises(RedisError, match="NOAUTH"):
            server.call("PING")
        with socket.socket(socket.AF_UNIX) as sock:
            sock.connect(server.unix_path)


def test_commands_are_counted(redis_server):
    redis_server.reset_counts()
    redis_server.call("SET", "a", 1)
    redis_server.call("EVAL", "redis.call('incr', 'a') return redis.call('incr', 'a')", 0)
    counts = redis_server.counts()
    assert (counts["set"], counts["eval"], counts["incr"]) == (1, 1, 2)


@pytest.mark.slow
def test_sentinels_promote_a_replica(redis_sentinels):
    servers = redis_sentinels
    servers.wait_for_replicas()
    first = servers.master()
    first.call("SET", "a", 1)
    servers.wait_for_replicas()
    first.kill()
    second = servers.wait_for_master_instead_of(first)
    assert second.call("GET", "a") == "1"
    first.start()
    wait_until(lambda: first.call("ROLE")[0] == "slave")


@pytest.fixture
def through(proxy_to):
    """A function that connects through a proxy; it returns the two ends and the proxy."""
    with Origin() as origin:
        proxy = proxy_to(origin.port)
        wires = []

        def connect():
            near = Wire(socket.create_connection(("127.0.0.1", proxy.port)))
            far = origin.accept()
            wires.extend((near, far))
            return near, far

        yield connect, proxy
        for wire in wires:
            wire.close()


def test_a_proxy_passes_bytes_and_half_closes(through):
    connect, proxy = through
    near, far = connect()
    data = bytes(range(256)) * 4000
    near.send(data)
    near.finish()
    assert far.read_to_end() == data
    far.send(data)
    far.close()
    assert near.read_to_end() == data
    assert proxy.passed == {OUT: len(data), BACK: len(data)} and proxy.accepted == 1


def test_a_proxy_holds_one_direction_and_lets_it_go(through):
    connect, proxy = through
    near, far = connect()
    proxy.hold(OUT)
    near.send(b"held")
    far.send(b"not held")
    assert near.read_exactly(8) == b"not held"
    far.sock.settimeout(0.05)
    with pytest.raises(TimeoutError):
        far.read()
    far.sock.settimeout(10)
    proxy.release()
    assert far.read_exactly(4) == b"held"


def test_a_proxy_delays(through):
    connect, proxy = through
    near, far = connect()
    proxy.delay(0.1, BACK)
    began = time.monotonic()
    far.send(b"x")
    near.read_exactly(1)
    assert time.monotonic() - began >= 0.1


@pytest.mark.parametrize("held", [False, True])
def test_a_proxy_cuts_what_there_is_and_refuses_what_comes(through, held):
    connect, proxy = through
    near, far = connect()
    if held:
        proxy.hold()
        near.send(b"held")
    proxy.cut()
    for wire in (near, far):
        assert ends(wire)
    proxy.release()
    near, far = connect()
    near.send(b"x")
    assert far.read_exactly(1) == b"x"
    proxy.refuse()
    assert ends(near) and ends(far)
    with Wire(socket.create_connection(("127.0.0.1", proxy.port))) as refused:
        assert ends(refused)
    proxy.admit()
    connect()


def ends(wire) -> bool:
    try:
        return not wire.read()
    except ConnectionResetError:
        return True
