"""Both programs as processes of which the system asks much: a log that nobody reads, a kill."""

import contextlib
import errno
import os
import signal
import socket
import subprocess
import sys
import time

import pytest
from support import (
    APP,
    GATEWAY_HOST,
    RAW,
    ROOT,
    TIMEOUT,
    Gateway,
    Wire,
    agent_process,
    agent_yaml,
    answer,
    ca_of,
    gateway_environment,
    gateway_here,
    gateway_process,
    request,
    reserved_port,
    status_of,
    wait_until,
)

QUICK = 5  # seconds that a program may take to end when nothing runs


@contextlib.contextmanager
def full_pipe():
    """The end of a pipe into which nothing fits any more, and that nobody reads."""
    read, write = os.pipe()
    os.set_blocking(write, False)
    with contextlib.suppress(BlockingIOError):
        while True:
            os.write(write, bytes(4096))
    os.set_blocking(write, True)
    try:
        yield write
    finally:
        os.close(read)
        os.close(write)


@contextlib.contextmanager
def unread(program, *arguments, cwd, **environment):
    """A program of ours whose standard error nobody reads."""
    command = [sys.executable, str(ROOT / program), *arguments]
    environment = {"PATH": os.environ["PATH"], **environment}
    with full_pipe() as pipe:
        with subprocess.Popen(command, cwd=cwd, env=environment, stderr=pipe) as process:
            try:
                yield process
            finally:
                process.kill()


def ends_quickly(process):
    began = time.monotonic()
    process.send_signal(signal.SIGTERM)
    assert process.wait(TIMEOUT) == 0
    return time.monotonic() - began < QUICK


@contextlib.contextmanager
def unread_gateway(cache):
    with contextlib.ExitStack() as stack:
        public, tunnel = (stack.enter_context(reserved_port()) for _ in range(2))
        with gateway_here(cache):
            pass  # it has made the CA
        environment = gateway_environment(
            cache, GATEWAY_PORT=str(public), TUNNEL_PORT=str(tunnel), DASHBOARD_PORT="0"
        )
        process = stack.enter_context(unread("gotunnel_server", cwd=cache, **environment))

        def answers(hostname, status):
            with contextlib.suppress(OSError), gateway.dial(hostname) as visitor:
                visitor.send(request(host=hostname))
                return status_of(visitor.read_head()) == status

        def wait_for_routes(*hostnames):
            for hostname in hostnames:
                wait_until(lambda hostname=hostname: answers(hostname, 200))

        gateway = Gateway(public, tunnel, ca_of(cache), wait_for_routes)
        wait_until(lambda: answers(GATEWAY_HOST, 200))
        yield gateway, process


def test_programs_whose_standard_error_nobody_reads_serve_and_end(cache, tmp_path, origin):
    origin.serve(lambda wire: wire.read_head() and wire.send(answer()))
    with unread_gateway(cache) as (gateway, gateway_program):
        path = tmp_path / "agent.yaml"
        path.write_text(agent_yaml(gateway, {APP: origin.port}, {}, {}))
        with unread("gotunnel_agent", "-c", str(path), cwd=tmp_path) as agent_program:
            gateway.wait_for_routes(APP)
            assert ends_quickly(agent_program)
        assert ends_quickly(gateway_program)


def test_agent_whose_standard_error_nobody_reads_comes_back(cache, tmp_path, origin):
    origin.serve(lambda wire: wire.read_head() and wire.send(answer()))
    with reserved_port() as port:
        with gateway_here(cache, TUNNEL_PORT=str(port)) as gateway:
            path = tmp_path / "agent.yaml"
            path.write_text(agent_yaml(gateway, {APP: origin.port}, {}, {}))
        with unread("gotunnel_agent", "-c", str(path), cwd=tmp_path):
            for _ in range(2):
                with gateway_here(cache, TUNNEL_PORT=str(port)) as gateway:
                    gateway.wait_for_routes(APP)
                    assert gateway.get(APP)[0] == 200


# Killed ------------------------------------------------------------------------------------------


@contextlib.contextmanager
def killable(cache, tmp_path, origin, which):
    """A gateway and an agent as processes; yields the gateway, and a function that kills one."""
    with gateway_process(cache, RAW_TCP_HOST=RAW) as gateway:
        ports = {"http": {APP: origin.port}, "tcp": {RAW: origin.port}}
        with agent_process(gateway, tmp_path, **ports) as agent:
            program = {"gateway": gateway.program, "agent": agent}[which]
            yield gateway, lambda: program.signal(signal.SIGKILL) or program.wait()


def assert_reset(wire):
    """A reset of TCP: an end would do for a program that speaks no TLS, or forgives its lack."""
    wait_until(lambda: wire.sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
               == errno.ECONNRESET)  # fmt: skip


WHICH = pytest.mark.parametrize("which", ["gateway", "agent"])


@WHICH
@pytest.mark.parametrize("door", ["plain", "TLS"])
def test_no_part_of_a_tcp_visit_looks_whole_when_a_program_is_killed(
    cache, tmp_path, origin, which, door
):
    with killable(cache, tmp_path, origin, which) as (gateway, kill):
        with (
            gateway.dial(RAW)
            if door == "TLS"
            else Wire(socket.create_connection(("127.0.0.1", gateway.public_port)))
        ) as visitor:
            visitor.send(b"SSH-")
            with origin.accept() as target:
                target.read_exactly(4)
                target.send(b"half")
                visitor.read_exactly(4)
                kill()
                assert_reset(visitor)
                assert_reset(target)


@WHICH
def test_no_part_of_an_answer_without_length_looks_whole_when_a_program_is_killed(
    cache, tmp_path, origin, which
):
    with killable(cache, tmp_path, origin, which) as (gateway, kill):
        with gateway.dial(APP) as visitor:
            visitor.send(b"GET / HTTP/1.0\r\nHost: %s\r\n\r\n" % APP.encode())
            with origin.accept() as target:
                target.read_head()
                target.send(b"HTTP/1.1 200 OK\r\nConnection: close\r\n\r\nhalf")
                visitor.read_until(b"half")
                kill()
                assert_reset(visitor)
                assert_reset(target)


@WHICH
def test_no_part_of_an_upgraded_visit_looks_whole_when_a_program_is_killed(
    cache, tmp_path, origin, which
):
    with killable(cache, tmp_path, origin, which) as (gateway, kill):
        with gateway.dial(APP) as visitor:
            visitor.send(request("GET", "/", "Connection: Upgrade", "Upgrade: raw"))
            with origin.accept() as target:
                target.read_head()
                target.send(b"HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\n"
                            b"Upgrade: raw\r\n\r\n")  # fmt: skip
                visitor.read_head()
                visitor.send(b"half")
                target.read_exactly(4)
                kill()
                assert_reset(target)
                assert_reset(visitor)


@pytest.mark.parametrize("door", ["plain", "TLS"])
def test_a_slow_reader_gets_all_of_a_visit_that_has_ended_well(cache, tmp_path, origin, door):
    """What closing resets until the end must not be reset behind the end."""
    content = bytes(range(256)) * 8192
    with killable(cache, tmp_path, origin, "agent") as (gateway, _):
        with (
            gateway.dial(RAW)
            if door == "TLS"
            else Wire(socket.create_connection(("127.0.0.1", gateway.public_port)))
        ) as visitor:
            visitor.send(b"SSH-")
            visitor.finish()
            with origin.accept() as target:
                target.read_to_end()
                target.send(content)
            time.sleep(0.5)  # the gateway has written and closed all by then, if it does not wait
            assert visitor.read_to_end() == content
