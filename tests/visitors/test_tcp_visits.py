"""tcp mode, end to end: bytes both ways, half-closes, and a real ssh."""

import contextlib
import hashlib
import random
import shlex
import socket
import ssl
import subprocess
import threading

import pytest
from support import (
    CUT,
    MIB,
    RAW,
    TIMEOUT,
    Wire,
    agent_here,
    dial_tls,
    gateway_here,
    need,
    reserved_port,
    sshd,
    tls_context,
    wait_until,
)

from gotunnel_server.visitors import relays

SSH = "ssh.localhost"
AT_ONCE = 3  # seconds, on a busy machine


@pytest.fixture
def gateway(cache, tmp_path, origin):
    """A gateway whose agent serves RAW from the origin."""
    with gateway_here(cache) as gateway, agent_here(gateway, tmp_path, tcp={RAW: origin.port}):
        yield gateway


def meet(gateway, origin):
    """A visitor and the target that it was brought to, before either has said a word."""
    return gateway.dial(RAW), origin.accept()


def digest(data):
    return hashlib.sha256(data).hexdigest()


def test_bytes_go_both_ways_from_the_first_one_on(gateway, origin):
    visitor, target = meet(gateway, origin)
    with visitor, target:
        for word in (b"\0", b"GET / HTTP/1.1\r\n\r\n", random.Random(1).randbytes(300_000)):
            visitor.send(word)
            assert target.read_exactly(len(word)) == word
            target.send(word)
            assert visitor.read_exactly(len(word)) == word


def test_target_may_speak_first(gateway, origin):
    visitor, target = meet(gateway, origin)
    with visitor, target:
        target.send(b"SSH-2.0-target\r\n")
        assert visitor.read_until(b"\n") == b"SSH-2.0-target\r\n"


def test_bytes_that_come_with_the_handshake_arrive(gateway, origin):
    visitor = gateway.dial(RAW)
    visitor.send(b"at once")
    with visitor, origin.accept() as target:
        assert target.read_exactly(7) == b"at once"


@pytest.mark.parametrize("farewell", [True, False], ids=["close_notify", "tcp only"])
def test_half_close_of_the_visitor_lets_the_target_go_on(gateway, origin, farewell):
    visitor, target = meet(gateway, origin)
    with visitor, target:
        visitor.send(b"question")
        if farewell:
            visitor.finish()
        else:
            socket.socket.shutdown(visitor.sock, socket.SHUT_WR)  # FIN without TLS's close_notify
        assert target.read_to_end() == b"question"
        target.send(b"a long ")
        assert visitor.read_exactly(7) == b"a long "
        target.send(b"answer")
        target.close()
        assert visitor.read_to_end() == b"answer"


def test_half_close_of_the_target_lets_the_visitor_go_on(gateway, origin):
    visitor, target = meet(gateway, origin)
    with visitor, target:
        target.send(b"all that I say")
        target.finish()
        assert visitor.read_to_end() == b"all that I say"
        visitor.send(b"and I go on")
        assert target.read_exactly(11) == b"and I go on"
        visitor.close()
        assert target.read_to_end() == b""


def test_reset_of_the_target_never_looks_like_its_end(gateway, origin):
    visitor, target = meet(gateway, origin)
    with visitor, target:
        target.send(b"not all")
        assert visitor.read_exactly(7) == b"not all"
        target.reset()
        with pytest.raises(CUT):
            visitor.read_to_end()


def test_reset_of_the_visitor_never_looks_like_its_end(gateway, origin):
    visitor, target = meet(gateway, origin)
    visitor.send(b"not all")
    assert target.read_exactly(7) == b"not all"
    visitor.reset()
    with target, pytest.raises(ConnectionResetError):
        target.read_to_end()


def test_visitor_that_leaves_frees_the_target(gateway, origin):
    visitor, target = meet(gateway, origin)
    visitor.close()
    with target, contextlib.suppress(ConnectionResetError):
        assert target.read_to_end() == b""


def test_relay_ends_with_its_session_also_when_one_side_has_finished(cache, tmp_path, origin):
    with gateway_here(cache) as gateway:
        with agent_here(gateway, tmp_path, tcp={RAW: origin.port}):
            visitor, target = meet(gateway, origin)
            with visitor:
                visitor.finish()
                assert target.read_to_end() == b""
                gateway.inner.tunnels.close()
                # Nothing is sent to the target meanwhile: that alone would end its connection.
                wait_until(lambda: target.sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR))


def test_visits_of_one_hostname_are_kept_apart(gateway, origin):
    with contextlib.ExitStack() as stack:
        pairs = [meet(gateway, origin) for _ in range(10)]
        for visitor, target in pairs:
            stack.enter_context(visitor)
            stack.enter_context(target)
        for number, (visitor, _) in enumerate(pairs):
            visitor.send(b"number %d" % number)
        for number, (_, target) in enumerate(pairs):
            assert target.read_exactly(8) == b"number %d" % number


def test_target_that_is_down_ends_the_visit_at_once(cache, tmp_path):
    with reserved_port() as port, gateway_here(cache) as gateway:
        with agent_here(gateway, tmp_path, tcp={RAW: port}), gateway.dial(RAW) as visitor:
            visitor.sock.settimeout(AT_ONCE)
            with pytest.raises(CUT):
                visitor.read_to_end()


def test_relays_beyond_the_limit_are_refused_until_one_ends(cache, tmp_path, origin, monkeypatch):
    monkeypatch.setattr(relays, "MAX_RELAYS", 1)
    with gateway_here(cache) as gateway, agent_here(gateway, tmp_path, tcp={RAW: origin.port}):
        visitor, target = meet(gateway, origin)
        with visitor, target:
            with gateway.dial(RAW) as second, pytest.raises(CUT):
                second.read_to_end()
            visitor.send(b"undisturbed")
            assert target.read_exactly(11) == b"undisturbed"
        assert origin.was_left_alone()


def echo(target):
    while data := target.read():
        target.send(data)
    target.finish()


def transfer(visitor, data) -> str:
    """Send ``data`` in one thread while another reads; the hash of what came back."""
    came = hashlib.sha256()
    sender = threading.Thread(target=visitor.send, args=(data,), name="sender")
    sender.start()
    left = len(data)
    while left and (piece := visitor.read()):
        came.update(piece)
        left -= len(piece)
    sender.join(TIMEOUT)
    return came.hexdigest()


@pytest.mark.parametrize("size", [MIB, pytest.param(64 * MIB, marks=pytest.mark.slow)])
def test_a_lot_of_bytes_come_back_as_they_were_sent(gateway, origin, size):
    origin.serve(echo)
    data = random.Random(size).randbytes(size)
    with PlainEnd(gateway) as visitor:
        assert transfer(visitor, data) == digest(data)


class PlainEnd(Wire):
    """A visitor that may be read in one thread while it is written in another: the TLS is done
    by openssl's s_client, in a process of its own."""

    def __init__(self, gateway):
        self._client = subprocess.Popen(
            s_client(gateway, RAW), stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )

    def send(self, data):
        self._client.stdin.write(data)
        self._client.stdin.flush()

    def read(self):
        return self._client.stdout.read1()

    def close(self):
        self._client.kill()
        self._client.communicate()


def s_client(gateway, hostname):
    return [
        need("openssl"), "s_client", "-quiet", "-verify_quiet", "-verify_return_error",
        "-CAfile", str(gateway.ca_file), "-servername", hostname,
        "-connect", f"127.0.0.1:{gateway.public_port}",
    ]  # fmt: skip


def test_ssh_runs_a_command_and_fetches_a_file(cache, tmp_path):
    content = random.Random(2).randbytes(20_000_000)
    (tmp_path / "file").write_bytes(content)
    ssh = need("ssh")
    with sshd(tmp_path) as (port, options), gateway_here(cache) as gateway:
        with agent_here(gateway, tmp_path, tcp={SSH: port}):
            proxy = shlex.join(s_client(gateway, SSH))

            def run(command):
                done = subprocess.run(
                    [ssh, *options, "-o", f"ProxyCommand={proxy}", SSH, command],
                    stdin=subprocess.DEVNULL, capture_output=True, timeout=TIMEOUT,
                )  # fmt: skip
                assert done.returncode == 0, done.stderr
                return done.stdout

            assert run("echo through the tunnel") == b"through the tunnel\n"
            assert digest(run(f"cat {shlex.quote(str(tmp_path / 'file'))}")) == digest(content)


@pytest.mark.parametrize(
    ("offered", "selected"),
    [
        ("imap", "imap"), ("postgresql", "postgresql"), ("h2", "h2"), ("grpc-exp h2", "grpc-exp"),
        ("h2 http/1.1", "http/1.1"), ("x-of-my-own", "x-of-my-own"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])
def test_a_visitor_gets_the_protocol_that_it_offers(gateway, origin, offered, selected, version):
    """Clients of PostgreSQL and gRPC require ALPN."""
    context = tls_context(gateway.ca_file)
    context.maximum_version = version
    context.set_alpn_protocols(offered.split())
    visitor = dial_tls(gateway.public_port, RAW, context)
    assert visitor.sock.selected_alpn_protocol() == selected
    with visitor, origin.accept() as target:
        visitor.send(b"x")
        assert target.read_exactly(1) == b"x"
