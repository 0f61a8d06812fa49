"""Both programs as processes of which the system asks much: a log that nobody reads, a kill."""

import contextlib
import os
import signal
import subprocess
import sys
import time

from support import (
    APP,
    GATEWAY_HOST,
    ROOT,
    TIMEOUT,
    Gateway,
    agent_yaml,
    answer,
    ca_of,
    gateway_environment,
    gateway_here,
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
                wait_until(lambda: answers(hostname, 200))

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
