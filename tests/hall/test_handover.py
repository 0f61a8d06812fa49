"""A hand-over to a successor by SIGUSR2, what comes of one that fails, and systemd's part."""

import contextlib
import errno
import fcntl
import json
import os
import re
import resource
import signal
import socket
import sys
import threading
import time

import pytest
from held_sockets import SERVES, Held
from support import (
    APP,
    GATEWAY_HOST,
    RAW,
    ROOT,
    TIMEOUT,
    TUNNEL_HOST,
    Wire,
    agent_here,
    agent_process,
    answer,
    fields_of,
    gateway_environment,
    gateway_here,
    gateway_process,
    need,
    request,
    reserved_port,
    running,
    status_of,
    wait_until,
)

from gotunnel import NoThread
from gotunnel_agent.common.status_socket import NoAnswer, ask
from gotunnel_server import capacity
from gotunnel_server import handover as handover_module
from gotunnel_server.handover import Failed, HandOver, Predecessor, find_predecessor


@pytest.fixture(autouse=True)
def clean(cache):
    """The folder is that of all tests, and the programs' working folder."""
    yield
    for name in (".env", "password", "notify"):
        (cache / name).unlink(missing_ok=True)


# One attempt -------------------------------------------------------------------------------------


@pytest.fixture
def gateway(cache):
    with gateway_here(cache) as gateway:
        yield gateway


def hand_over_to(gateway, script, timeout=TIMEOUT):
    """A HandOver to a Python script. ``sock`` is its end of the socket pair, ``said`` what came."""
    start = (
        "import json, os, socket, sys, time\n"
        "sock = socket.socket(fileno=int(os.environ['GOTUNNEL_HANDOVER']))\n"
        "lines = sock.makefile('rw')\n"
        "said = json.loads(lines.readline())\n"
        "def say(text):\n"
        "    lines.write(text + '\\n')\n"
        "    lines.flush()\n"
    )
    command = (sys.executable, "-c", start + script)
    return HandOver(gateway.inner, {"PATH": os.environ["PATH"]}, command, timeout)


@pytest.mark.parametrize(
    ("script", "why"),
    [
        ("raise SystemExit(3)", "the successor ended with status 3 before it served"),
        ("os.kill(os.getpid(), 9)", "the successor ended by signal 9 before it served"),
        ("""say('{"failed": "JWT_SECRET is not set"}')""", "the successor says: JWT_SECRET is not"),
        ("""say('{"failed": "a\\\\nb"}')""", r"the successor says: a\nb;"),
        ("say('what?')", "messages with the successor failed: "),
        ("say('[]')", "messages with the successor failed: "),
        ("""say('{"said": "nonsense"}')""", "expected ready"),
        ("""say('{"said": "ready"}'); lines.readline(); sys.exit(1)""", "with status 1"),
        ("sock.close(); lines.close(); time.sleep(60)", "hung up, and is killed"),
    ],
)
def test_a_successor_that_fails_is_one_line_and_the_gateway_serves_on(
    gateway, caplog, monkeypatch, script, why
):
    monkeypatch.setattr(handover_module, "END_TIMEOUT", 0.5)
    handover = hand_over_to(gateway, script)
    handover.run()
    (line,) = [record.message for record in caplog.records if record.levelname == "ERROR"]
    assert line.startswith("hand-over failed: ") and line.endswith("; this gateway serves on")
    assert why in line and "\n" not in line
    assert handover.successor is None
    assert gateway.get(GATEWAY_HOST)[0] == 200


def test_a_successor_that_hangs_is_killed(gateway, caplog):
    handover = hand_over_to(gateway, "time.sleep(60)", timeout=0.5)
    handover.run()
    assert "did not serve within 0.5 s, and is killed" in caplog.text
    assert handover._process.returncode == -signal.SIGKILL
    assert gateway.get(GATEWAY_HOST)[0] == 200


def test_a_program_that_cannot_be_started_is_one_line(gateway, caplog):
    HandOver(gateway.inner, {}, ("/nowhere/python",)).run()
    assert "hand-over failed: /nowhere/python cannot be started" in caplog.text


def test_without_a_free_descriptor_the_gateway_serves_on(gateway, caplog, monkeypatch):
    def refuse():
        raise OSError(errno.EMFILE, "Too many open files")

    monkeypatch.setattr(handover_module.socket, "socketpair", refuse)
    HandOver(gateway.inner, {}, ("true",)).run()
    (line,) = [record.message for record in caplog.records if record.levelname == "ERROR"]
    assert line.startswith("hand-over failed: ") and "Too many open files" in line
    monkeypatch.undo()
    assert gateway.get(GATEWAY_HOST)[0] == 200


@pytest.mark.parametrize("end", ["it says so", "it has ended", "it hangs"])
def test_a_successor_serves_though_its_descriptor_is_too_high_for_select(monkeypatch, caplog, end):
    """As that of a gateway with more than 1000 connections is."""
    monkeypatch.setattr(handover_module, "YOURS_TIMEOUT", 0.1)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, min(hard, 2048)), hard))
    ours, theirs = socket.socketpair()
    with theirs:
        descriptor = fcntl.fcntl(theirs, fcntl.F_DUPFD, 1500)
    with ours:
        ours.sendall(b'{"pid": 7, "sockets": []}\n')
        predecessor = Predecessor(descriptor)
        if end == "it says so":
            ours.sendall(b'{"said": "yours"}\n')
        elif end == "it has ended":
            ours.shutdown(socket.SHUT_WR)
        predecessor.await_end()
        assert ours.recv(100) == b'{"said": "serving"}\n'
    assert (end == "it hangs") == ("process 7, still listens after 0.1 s" in caplog.text)


def test_a_cancelled_hand_over_ends_its_successor_without_a_complaint(gateway, caplog):
    handover = hand_over_to(gateway, "time.sleep(60)")
    thread = threading.Thread(target=handover.run)
    thread.start()
    wait_until(lambda: handover._process)
    assert handover.cancel()
    thread.join(TIMEOUT)
    assert handover._process.returncode == -signal.SIGKILL
    assert [record for record in caplog.records if record.levelname == "ERROR"] == []


def test_a_successor_that_serves_is_not_cancelled(gateway):
    handover = hand_over_to(
        gateway,
        """say('{"said": "ready"}'); lines.readline(); say('{"said": "serving"}'); lines.read()""",
    )
    handover.run()
    assert handover.successor is not None and not handover.cancel()
    handover.release()
    assert handover._process.wait(TIMEOUT) == 0


def test_a_successor_gets_sockets_names_and_estate(gateway, tmp_path):
    out = tmp_path / "out"
    handover = hand_over_to(
        gateway,
        f"""say('{{"said": "ready"}}'); estate = lines.readline()\n"""
        f"names = [[name, socket.socket(fileno=fd).getsockname()[1]] for fd, name, _ in "
        f"said['sockets']]\n"
        f"found = [names, json.loads(estate), dict(os.environ)]\n"
        f"open({str(out)!r}, 'w').write(json.dumps(found))\n"
        f"sys.exit(1)",
    )
    handover._environment = {
        **handover._environment, "LISTEN_FDS": "1", "LISTEN_PID": "1", "LISTEN_FDNAMES": "x",
        "WATCHDOG_PID": "1", "WATCHDOG_USEC": "1", "KEPT": "yes",
    }  # fmt: skip
    handover.run()
    names, estate, environment = json.loads(out.read_text())
    assert sorted(map(tuple, names)) == [
        ("DASHBOARD_PORT", gateway.dashboard_port),
        ("GATEWAY_PORT", gateway.public_port),
        ("TUNNEL_PORT", gateway.tunnel_port),
    ]
    estate["estate"].pop("modes")  # what other tests' gateways served, whose cache this is
    assert estate == {"estate": {"ports": {}, "proofs": [], "sessions": 0}}
    assert {"KEPT", "WATCHDOG_USEC"} < set(environment)
    assert not {"LISTEN_FDS", "LISTEN_PID", "LISTEN_FDNAMES", "WATCHDOG_PID"} & set(environment)


def test_process_1_of_a_container_does_not_hand_over(monkeypatch):
    assert handover_module.why_not_here() is None
    monkeypatch.setattr(os, "getpid", lambda: 1)
    assert "process 1 of its container" in handover_module.why_not_here()


@pytest.mark.parametrize("value", ["", "x", "99999", "2"])
def test_a_variable_without_a_predecessor_is_ignored(value, caplog):
    assert find_predecessor({"GOTUNNEL_HANDOVER": value}) is None
    assert len(caplog.messages) == bool(value)


def test_a_predecessor_that_has_ended_is_an_error():
    ours, theirs = socket.socketpair()
    ours.close()
    with pytest.raises(Failed, match="the predecessor ended before it had handed over"):
        find_predecessor({"GOTUNNEL_HANDOVER": str(theirs.detach())})


def test_a_successor_shows_what_its_predecessor_proves_to_a_ca(cache):
    token = "LoqXcYV8q5ONbJQxbmR7SCTNo3tiAXDfowyjxAjEuX0"
    with gateway_here(cache) as old, gateway_here(cache, HTTP_PORT="auto") as new:
        with old.inner._challenges.http(APP, token, b"proof"):
            estate = json.loads(json.dumps(old.inner.estate()._asdict()))
        new.inner.inherit(handover_module.read_estate(estate))
        with Wire(socket.create_connection(("127.0.0.1", new.inner.http_port))) as ca:
            ca.send(request("GET", f"/.well-known/acme-challenge/{token}", "Connection: close"))
            assert ca.read_to_end().endswith(b"\r\n\r\nproof")


@pytest.mark.parametrize(
    "fields",
    [None, [], {}, {"ports": None}, {"proofs": [["a"]]}, {"ports": {"x": "y"}}, {"sessions": "x"}],
)
def test_an_estate_of_another_version_gives_what_can_be_read(fields):
    assert handover_module.read_estate(fields) == handover_module.Estate({}, {}, ())


def test_a_successor_without_threads_for_its_agents_does_not_take_over(
    cache, tmp_path, origin, monkeypatch
):
    start, started = threading.Thread.start, []

    def refuse(thread):
        if thread.name == "trial":
            if len(started) == capacity.OTHER_THREADS:
                raise RuntimeError("can't start new thread")
            started.append(thread)
        start(thread)

    with gateway_here(cache) as old, gateway_here(cache) as new:
        empty = old.inner.estate()
        with agent_here(old, tmp_path, http={APP: origin.port}):
            estate = json.loads(json.dumps(old.inner.estate()._asdict()))
            assert estate["sessions"] == 1
            with monkeypatch.context() as shortage:
                shortage.setattr(threading.Thread, "start", refuse)
                with pytest.raises(NoThread, match="ulimit -u"):
                    new.inner.inherit(handover_module.read_estate(estate))
                assert not any(thread.is_alive() for thread in started)
                started.clear()
                new.inner.inherit(empty)  # there are enough without the agent
        assert not any(thread.is_alive() for thread in started)


# The programs ------------------------------------------------------------------------------------


@contextlib.contextmanager
def ending(gateway):
    """Yields SIGUSR2 to a gateway, which gives the successor's process id; ends the successors."""
    pids = []

    def hand_over():
        os.kill(pids[-1] if pids else gateway.program.pid, signal.SIGUSR2)
        count = len(pids)
        found = wait_until(lambda: [int(pid) for line in list(gateway.program.lines)
                                    for pid in re.findall(SERVES, line)][count:])  # fmt: skip
        pids.extend(found)
        return pids[-1]

    try:
        yield hand_over
    finally:
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGTERM)


def is_alive(pid):
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, 0)
        return True


def test_a_successor_serves_visitors_and_agents_and_the_old_gateway_ends(cache, tmp_path, origin):
    origin.serve(lambda wire: wire.read_head() and wire.send(answer()))
    with gateway_process(cache) as gateway, ending(gateway) as hand_over:
        with agent_process(gateway, tmp_path, http={APP: origin.port}) as agent:
            hand_over()
            assert gateway.program.wait() == 0
            wait_until(lambda: sum(": serving " in line for line in list(agent.lines)) == 2)
            assert gateway.get(APP) == (200, b"ok")


def test_the_status_socket_is_the_successors(cache):
    path = str(cache / "status.sock")

    def pid():
        with contextlib.suppress(NoAnswer):
            return ask([path], "gotunnel-server")["pid"]

    with gateway_process(cache) as gateway, ending(gateway) as hand_over:
        wait_until(lambda: pid() == gateway.program.pid)
        successor = hand_over()
        wait_until(lambda: pid() == successor)


def test_a_successor_hands_over_as_well(cache):
    with gateway_process(cache) as gateway, ending(gateway) as hand_over:
        first = hand_over()
        second = hand_over()
        assert first != second
        wait_until(lambda: not is_alive(first) or gateway.get(GATEWAY_HOST)[0] == 200)
        assert gateway.get(GATEWAY_HOST)[0] == 200


def test_connections_that_have_not_spoken_are_served_by_the_gateway_that_accepted_them(cache):
    with gateway_process(cache) as gateway, ending(gateway) as hand_over:
        with (
            gateway.dial(GATEWAY_HOST) as kept,
            socket.create_connection(("127.0.0.1", gateway.public_port)) as silent,
            gateway.dial(GATEWAY_HOST) as half,
        ):
            kept.send(request(host=GATEWAY_HOST))
            kept.read_until(b"</html>")
            half.send(request(host=GATEWAY_HOST)[:20])
            hand_over()
            with Wire(gateway.context.wrap_socket(silent, server_hostname=GATEWAY_HOST)) as new:
                new.send(request(host=GATEWAY_HOST))
                kept.send(request(host=GATEWAY_HOST))
                time.sleep(1.5)  # longer than LINGER
                half.send(request(host=GATEWAY_HOST)[20:])
                for wire in (new, kept, half):
                    head = wire.read_head()
                    assert status_of(head) == 200
                    assert "connection: close" in fields_of(head)


def test_idle_connections_do_not_delay_the_end(cache):
    with gateway_process(cache, DRAIN_TIMEOUT="60", HEADER_TIMEOUT="60") as gateway:
        with ending(gateway) as hand_over, gateway.dial(GATEWAY_HOST) as idle:
            with socket.create_connection(("127.0.0.1", gateway.public_port)):
                hand_over()
                assert gateway.program.wait(10) == 0
                assert idle.read() == b""


def test_a_changed_configuration_adds_and_drops_ports(cache):
    env_file = cache / ".env"
    with gateway_process(cache) as gateway, ending(gateway) as hand_over:
        env_file.write_text("HTTP_PORT=auto\n")
        hand_over()
        port = int(gateway.program.wait_for(r"plain HTTP: port (\d+)$")[1])
        with Wire(socket.create_connection(("127.0.0.1", port))) as visitor:
            visitor.send(request(host=GATEWAY_HOST))
            assert status_of(visitor.read_head()) in (301, 308)
        env_file.unlink()
        hand_over()
        gateway.program.wait_for(
            rf"HTTP_PORT \(127.0.0.1 port {port}\) is no longer wanted: closed"
        )
        wait_until(lambda: refused(port))
        assert gateway.get(GATEWAY_HOST)[0] == 200


def refused(port):
    with contextlib.suppress(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", port)).close()
        return False
    return True


def test_a_configuration_that_is_wrong_or_does_not_fit_leaves_the_old_gateway_in_place(cache):
    with gateway_process(cache) as gateway, socket.create_server(("127.0.0.1", 0)) as other:
        for number, (content, why) in enumerate([
            ("HTTP_PORT=nonsense\n", "HTTP_PORT is 'nonsense'"),
            (f"HTTP_PORT={other.getsockname()[1]}\n", "in use, another program"),
            (f"HTTP_PORT={gateway.public_port}\n", "in use, another program"),
        ]):  # fmt: skip
            (cache / ".env").write_text(content)
            gateway.program.signal(signal.SIGUSR2)
            lines = wait_until(lambda number=number: [
                line for line in gateway.program.lines if "hand-over failed" in line
            ][number:])  # fmt: skip
            assert why in lines[0] and "this gateway serves on" in lines[0]
            assert gateway.get(GATEWAY_HOST)[0] == 200
        (cache / ".env").unlink()
        with ending(gateway) as hand_over:
            hand_over()
            assert gateway.get(GATEWAY_HOST)[0] == 200


@pytest.fixture
def hanging(cache):
    """Makes successors hang while they read their configuration; yields what lets them go on."""
    fifo = cache / "password"
    os.mkfifo(fifo)

    def hang():
        (cache / ".env").write_text(f"DASHBOARD_PASSWORD_FILE={fifo}\n")

    def go_on():
        fifo.write_text("a long enough password for the dashboard\n")

    yield hang, go_on


def starts(gateway):
    return [int(pid) for line in list(gateway.program.lines)
            for pid in re.findall(r"a successor starts: process (\d+)", line)]  # fmt: skip


def test_a_second_sigusr2_starts_no_second_successor(cache, hanging):
    hang, go_on = hanging
    with gateway_process(cache) as gateway:
        hang()
        gateway.program.signal(signal.SIGUSR2)
        wait_until(lambda: starts(gateway))
        gateway.program.signal(signal.SIGUSR2)
        gateway.program.wait_for("a hand-over is under way; this signal is ignored")
        assert gateway.get(GATEWAY_HOST)[0] == 200
        threading.Thread(target=go_on).start()
        gateway.program.wait_for(SERVES)
        (pid,) = starts(gateway)
        assert gateway.program.wait() == 0
        assert gateway.get(GATEWAY_HOST)[0] == 200
        os.kill(pid, signal.SIGTERM)
        wait_until(lambda: refused(gateway.public_port))


def test_sigterm_during_a_hand_over_ends_both(cache, hanging):
    hang, _ = hanging
    with gateway_process(cache) as gateway:
        hang()
        gateway.program.signal(signal.SIGUSR2)
        (pid,) = wait_until(lambda: starts(gateway))
        gateway.program.signal(signal.SIGTERM)
        assert gateway.program.wait() == 0
        wait_until(lambda: not is_alive(pid))
        assert refused(gateway.public_port)
        assert not any("hand-over failed" in line for line in gateway.program.lines)


@pytest.mark.parametrize("wanted", ["auto", "number"])
def test_an_agents_port_is_handed_over(cache, tmp_path, origin, wanted):
    origin.serve(lambda wire: wire.send(wire.read_exactly(4)))
    with reserved_port() as one, reserved_port() as two:
        port = str(two) if wanted == "number" else "auto"
        tunnels = [
            {"hostname": RAW, "target": f"127.0.0.1:{origin.port}", "mode": "tcp", "port": port}
        ]
        with (
            gateway_process(cache, TCP_PORTS=f"{one},{two}") as gateway,
            ending(gateway) as hand_over,
            agent_process(gateway, tmp_path, ready=False, tunnels=tunnels) as agent,
        ):
            number = int(agent.wait_for(r": on port (\d+) of the gateway")[1])
            for _ in range(2):
                hand_over()
                # It listens all the time, also before the agent has come back.
                with Wire(socket.create_connection(("127.0.0.1", number))) as visitor:
                    visitor.send(b"ping")
                    assert visitor.read_exactly(4) == b"ping"
            assert {int(found) for line in list(agent.lines)
                    for found in re.findall(r": on port (\d+) of the gateway", line)
            } == {number}  # fmt: skip


# systemd -----------------------------------------------------------------------------------------


@pytest.fixture
def held(cache):
    with contextlib.ExitStack() as stack:
        yield Held(cache, stack)


def test_systemds_sockets_are_served_and_systemd_is_told(held):
    program = held.start()
    try:
        assert held.hear() == "READY=1"
        gateway = held.gateway(program)
        assert gateway.get(GATEWAY_HOST)[0] == 200
        program.wait_for(rf"agents: tunnel_addr {TUNNEL_HOST}:{gateway.tunnel_port}")
        program.signal(signal.SIGHUP)
        assert held.hear().startswith("RELOADING=1\nMONOTONIC_USEC=")
        assert held.hear() == "READY=1"
        program.signal(signal.SIGTERM)
        assert held.hear() == "STOPPING=1"
        assert program.wait() == 0
    finally:
        program.end()


def test_the_sockets_of_systemd_socket_activate_are_served(cache, tmp_path):
    with contextlib.ExitStack() as stack:
        public, tunnel = (stack.enter_context(reserved_port()) for _ in range(2))
        program = stack.enter_context(running(
            need("systemd-socket-activate"), "-l", f"127.0.0.1:{public}",
            "-l", f"127.0.0.1:{tunnel}", "--fdname=gateway_port:tunnel_port",
            *(f"-E{name}={value}" for name, value in gateway_environment(cache).items()),
            sys.executable, str(ROOT / "gotunnel_server"), cwd=tmp_path,
        ))  # fmt: skip
        wait_until(lambda: not refused(public))
        program.wait_for(" is ready$")
        program.wait_for(rf"visitors: https://{GATEWAY_HOST}:{public}/$")
        program.wait_for(rf"agents: tunnel_addr {TUNNEL_HOST}:{tunnel}$")


def test_visitors_wait_in_the_backlog_while_systemd_restarts_the_gateway(held):
    for _ in range(2):
        program = held.start()
        try:
            assert held.gateway(program).get(GATEWAY_HOST)[0] == 200
        finally:
            program.end()
        with socket.create_connection(held.public.getsockname()) as sock:
            program = held.start()
            try:
                context = held.gateway(program).context
                with Wire(context.wrap_socket(sock, server_hostname=GATEWAY_HOST)) as visitor:
                    visitor.send(request(host=GATEWAY_HOST))
                    assert status_of(visitor.read_head()) == 200
            finally:
                program.end()


def test_systemd_is_told_of_a_successor_which_has_its_sockets_and_its_watchdog(held):
    program = held.start(WATCHDOG_USEC="400000")
    successor = None
    try:
        gateway = held.gateway(program)
        assert held.hear() == "READY=1"
        assert held.hear() == "WATCHDOG=1"
        program.signal(signal.SIGUSR2)
        assert held.hear_all_but("WATCHDOG=1").startswith("RELOADING=1\n")
        name, _, pid = held.hear_all_but("WATCHDOG=1").partition("=")
        successor = int(pid)
        assert name == "MAINPID" and successor == int(program.wait_for(SERVES)[1])
        assert held.hear_all_but("WATCHDOG=1") == "READY=1"
        assert program.wait() == 0
        assert held.hear() == "WATCHDOG=1"
        assert gateway.get(GATEWAY_HOST)[0] == 200
        os.kill(successor, signal.SIGTERM)
        assert held.hear_all_but("WATCHDOG=1") == "STOPPING=1"
    finally:
        if successor:
            with contextlib.suppress(ProcessLookupError):
                os.kill(successor, signal.SIGTERM)
        program.end()


def test_systemd_hears_that_a_hand_over_has_failed(held, cache):
    program = held.start()
    try:
        assert held.hear() == "READY=1"
        (cache / ".env").write_text("HTTP_PORT=nonsense\n")
        program.signal(signal.SIGUSR2)
        assert held.hear().startswith("RELOADING=1\n")
        program.wait_for("hand-over failed")
        assert held.hear() == "READY=1"
    finally:
        program.end()
