"""The connection to Redis: real servers, killed, paused, with passwords, behind Sentinels."""

import contextlib
import itertools
import socket
import threading
from dataclasses import replace
from time import monotonic

import pytest
from redis.exceptions import RedisError
from redis_server import redis_process
from support import wait_until

from gotunnel_server.cluster import bounded
from gotunnel_server.cluster import engine as module
from gotunnel_server.cluster.board import Away
from gotunnel_server.cluster.engine import Engine, Script, _words
from gotunnel_server.cluster.settings import Settings, read_url


@pytest.fixture
def connect():
    """connect(url, ...) makes an Engine, which is closed at the end."""
    engines = []

    def connected(url, **changes):
        engines.append(Engine(Settings(replace(read_url(url), **changes))))
        return engines[-1]

    yield connected
    for engine in engines:
        engine.close()


def test_commands_and_scripts(redis_server, connect):
    engine = connect(redis_server.url)
    assert engine.call("SET", "k", b"v") in (b"OK", True)
    assert engine.call("GET", "k") == b"v"
    script = Script("return {KEYS[1], ARGV[1], 5}")
    for _ in range(2):  # by its text, then by its digest
        assert engine.run(script, ["k"], ["a"]) == [b"k", b"a", 5]
    engine.call("SCRIPT", "FLUSH")
    assert engine.run(script, ["k"], ["a"]) == [b"k", b"a", 5]


def test_a_unix_socket(redis_server, connect):
    engine = connect(f"unix://{redis_server.unix_path}")
    assert engine.call("PING") in (b"PONG", True)
    assert engine.own_address() is None


def test_its_own_address_is_the_one_that_reaches_redis(redis_server, connect):
    assert connect(redis_server.url).own_address() == "127.0.0.1"


def test_an_error_of_redis_is_away_with_its_words(redis_server, connect):
    engine = connect(redis_server.url)
    with pytest.raises(Away, match=f"^Redis at {redis_server.address}: .*wrong number of"):
        engine.call("GET")
    with pytest.raises(OSError) as caught:
        engine.run(Script("return nonsense("), ["k"], [])
    assert "\n" not in caught.value.strerror


def test_an_answer_that_is_no_answer_of_redis_is_away(connect):
    """The thread that hears messages must not end by it: it would hear none any more."""
    with pytest.raises(Away, match="none of Redis's .'int' object is not subscriptable"):
        with connect("redis://127.0.0.1:1")._translated():
            raise TypeError("'int' object is not subscriptable")  # as redis-py of a push of `:1`


@contextlib.contextmanager
def answering(pieces):
    """A server that sends these to each connection, without end or until it is closed; its URL."""
    over = threading.Event()

    def answer(sock):
        with sock, contextlib.suppress(OSError):
            for piece in pieces():
                if over.is_set():
                    return
                sock.sendall(piece)

    def accept():
        threads = []
        with contextlib.suppress(OSError):
            while True:
                sock, _ = listening.accept()
                sock.settimeout(10)
                threads.append(threading.Thread(target=answer, args=(sock,)))
                threads[-1].start()
        for thread in threads:
            thread.join()

    with socket.create_server(("127.0.0.1", 0)) as listening:
        thread = threading.Thread(target=accept)
        thread.start()
        try:
            yield f"redis://127.0.0.1:{listening.getsockname()[1]}"
        finally:
            over.set()
            listening.shutdown(socket.SHUT_RDWR)
            thread.join()


@pytest.mark.parametrize(
    "first, then", [(b"+", b"x" * 1000), (b"$2000000000\r\n", b"x" * 1000),
                    (b"*2000000000\r\n", b":1\r\n" * 100)],
)  # fmt: skip
def test_a_too_long_answer_is_given_up(connect, monkeypatch, first, then):
    monkeypatch.setattr(bounded, "MOST_ANSWER", 1 << 20)
    with answering(lambda: itertools.chain([first], itertools.repeat(then))) as url:
        with pytest.raises(Away, match="an answer of more than 1 MiB$"):
            connect(url).call("PING")


def test_an_answer_that_never_ends_is_given_up_in_time(connect, monkeypatch):
    monkeypatch.setattr(bounded, "WHOLE_TIMEOUT", 0.2)
    pause = threading.Event()

    def dripping():
        while not pause.wait(0.01):
            yield b"x"

    with answering(dripping) as url:
        try:
            with pytest.raises(Away, match="no answer"):
                connect(url).call("PING")
        finally:
            pause.set()


@pytest.mark.parametrize("answer", [b"*1\r\n" * 100_000, b"$%d\r\n" % 10**30, b"$-9\r\n:1\r\n"])
def test_an_answer_that_no_server_sends_is_away(connect, answer):
    with answering(lambda: [answer]) as url:
        with pytest.raises(Away, match="^Redis at "):
            connect(url).call("PING")


def test_it_asks_for_signs_of_life_while_messages_come(redis_server, connect, monkeypatch):
    """Else they would count as one answer, which takes too long."""
    monkeypatch.setattr(module, "PING", 0.0)
    engine, over = connect(redis_server.url), threading.Event()
    life = threading.Thread(target=engine.hear, args=(["one"], lambda data: None, over))
    life.start()
    try:

        def has_pinged():
            engine.call("PUBLISH", "one", "x")
            return redis_server.counts().get("ping", 0) > 10

        wait_until(has_pinged)
    finally:
        over.set()
        life.join(10)


def test_a_server_that_is_not_there_and_comes(redis_server, connect):
    engine = connect(redis_server.url)
    engine.call("PING")
    redis_server.kill()
    for _ in range(2):
        with pytest.raises(Away, match="refused|closed|reset"):
            engine.call("PING")
    redis_server.start()
    assert engine.call("PING") in (b"PONG", True)


def test_a_server_that_does_not_answer_is_given_up_in_time(redis_server, connect, monkeypatch):
    monkeypatch.setattr(module, "ANSWER_TIMEOUT", 0.1)
    engine = connect(redis_server.url)
    engine.call("PING")
    redis_server.pause()
    began = monotonic()
    with pytest.raises(Away, match="no answer in 0.1 s"):
        engine.call("SET", "k", "v")
    assert monotonic() - began < 10
    redis_server.resume()


def test_a_closed_engine_calls_nothing(redis_server, connect):
    engine = connect(redis_server.url)
    engine.call("PING")
    engine.close()
    with pytest.raises(Away, match="the gateway stops"):
        engine.call("PING")


def test_passwords(connect):
    with redis_process(password="hunter2") as server:
        engine = connect(server.url, password="hunter2")
        assert engine.call("PING") in (b"PONG", True)
        for wrong in (None, "wrong-password"):
            with pytest.raises(Away) as caught:
                connect(server.url, password=wrong).call("PING")
            assert "hunter2" not in str(caught.value) and "wrong-password" not in str(caught.value)


def test_a_password_that_a_server_quotes_is_not_told(connect):
    with redis_process('rename-command AUTH ""') as server:
        with pytest.raises(Away, match="unknown command 'AUTH'$"):
            connect(server.url, password="hunter2").call("PING")
    with answering(lambda: [b"-ERR what is hunter2?\r\n"]) as url:
        with pytest.raises(Away, match="what is [.]{3}[?]$"):
            connect(url, password="hunter2").call("PING")


@pytest.mark.parametrize(
    "rules, lacking",
    [
        ("+@all", None),
        ("+@all -@scripting", "permissions to run the 'evalsha' command"),
        ("+@all -time", "can't run this command|permissions"),
        ("+@all resetchannels", "permissions to access one of the channels"),
        ("+@all -subscribe", "permissions to run the 'subscribe' command"),
        ("+@all resetkeys %R~*", "permissions to access one of the keys"),
    ],
)
def test_what_a_gateway_may_not_do_is_found_by_a_trial(redis_server, connect, rules, lacking):
    user = "ACL SETUSER me reset on >hunter2 ~{gotunnel}* &{gotunnel}*".split()
    redis_server.call(*user, *rules.split())
    engine = connect(redis_server.url, user="me", password="hunter2")
    if lacking is None:
        engine.try_out("gotunnel")
    else:
        with pytest.raises(Away, match=lacking):
            engine.try_out("gotunnel")


def test_that_messages_may_not_be_heard_is_said_once(redis_server, connect, caplog, monkeypatch):
    monkeypatch.setattr(module, "MOST_BACKOFF", 0.01)
    monkeypatch.setattr(module, "BACKOFF", 0.01)
    caplog.set_level("DEBUG", "gotunnel.engine")
    redis_server.call(*"ACL SETUSER me reset on >hunter2 ~* +@all".split())
    engine = connect(redis_server.url, user="me", password="hunter2")
    over = threading.Event()
    life = threading.Thread(target=engine.hear, args=(["one"], lambda data: None, over))
    life.start()
    try:
        wait_until(lambda: len(caplog.records) > 3)
    finally:
        over.set()
        life.join(10)
    levels = [record.levelname for record in caplog.records]
    assert levels[0] == "WARNING" and {*levels[1:]} == {"DEBUG"}
    assert caplog.messages[0].startswith("messages of other gateways are not heard: Redis at ")


def test_messages_are_heard_and_heard_again(redis_server, connect):
    engine, over, heard = connect(redis_server.url), threading.Event(), []
    ready = threading.Semaphore(0)
    life = threading.Thread(
        target=engine.hear, args=(["one", "two"], heard.append, over, ready.release)
    )
    life.start()
    try:
        assert ready.acquire(timeout=10)
        engine.call("PUBLISH", "one", "1")
        engine.call("PUBLISH", "two", "2")
        wait_until(lambda: heard == [b"1", b"2"])
        redis_server.restart(keep=False)
        assert ready.acquire(timeout=10)
        engine.call("PUBLISH", "one", "3")
        wait_until(lambda: heard[2:] == [b"3"])
    finally:
        over.set()
        life.join(10)


def test_what_check_says_of_a_server(redis_server, connect):
    engine = connect(redis_server.url)
    assert engine.version().startswith("Redis ") and engine.time() < 10
    assert list(engine.flaws()) == []
    redis_server.call("CONFIG", "SET", "maxmemory-policy", "allkeys-lru")
    [flaw] = engine.flaws()
    assert flaw.startswith("maxmemory-policy is allkeys-lru, expected noeviction")


@pytest.mark.parametrize(
    "said, told",
    [
        (
            "No master found for 'main' : <redis.client.Redis(<redis.connection.ConnectionPool(",
            "No master found for 'main'",
        ),
        (
            "command not allowed when used memory > 'maxmemory'. script: "
            f"{'5a' * 20}, on @user_script:38.",
            "command not allowed when used memory > 'maxmemory'",
        ),
        ("Authentication required.", "Authentication required"),
        ("unknown command 'AUTH', with args beginning with: 'me' 'x' ", "unknown command 'AUTH'"),
    ],
)
def test_what_redis_says_is_told_without_the_words_for_programmers(said, told):
    assert _words(RedisError(said)) == told


@pytest.mark.slow
def test_a_failover_of_sentinels(redis_sentinels, connect):
    engine = connect(redis_sentinels.url)
    engine.call("SET", "k", "v")
    redis_sentinels.wait_for_replicas()
    redis_sentinels.master().kill()

    def writes():
        try:
            return engine.call("SET", "k", "w") in (b"OK", True)
        except Away:
            return False

    wait_until(writes, timeout=30)
