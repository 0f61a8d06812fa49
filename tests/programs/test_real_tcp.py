"""Programs that others wrote, through every door to a tcp hostname: OpenSSH, PostgreSQL, Redis.

The doors are named as the tests print them. "tls" is TLS with the hostname as its SNI, "forward"
the same by our own helper, "connect" a CONNECT inside TLS to the gateway's name, "plain" what comes
to the public port without TLS, "own port" a public port that the agent has asked for. One gateway
serves all of this page, and one sshd, PostgreSQL and Redis each; the agents are ours and the Go
one, which knows of no port of its own.
"""

import contextlib
import functools
import hashlib
import os
import pwd
import random
import re
import shlex
import signal
import socket
import struct
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
from support import (
    CUT,
    GATEWAY_HOST,
    RAW,
    ROOT,
    TIMEOUT,
    Gateway,
    Wire,
    agent_here,
    agent_process,
    at_length,
    dial_tls,
    gateway_here,
    gateway_process,
    go_agent,
    need,
    reserved_port,
    running,
    sshd,
    tls_context,
    wait_until,
)

SSH, DB, STORE = "ssh.localhost", "db.localhost", "store.localhost"
HOSTNAMES = (SSH, DB, STORE, RAW)

OURS, GO = "our agent", "Go agent"
AGENTS = (OURS, GO)
DOORS = ("tls", "forward", "connect", "plain", "own port")
WAYS = [(OURS, door) for door in DOORS] + [(GO, door) for door in DOORS if door != "own port"]


def ways(*ways):
    """Run a test through these doors, each given as (agent, door)."""
    names = [f"{door}, {agent}" for agent, door in ways]
    return pytest.mark.parametrize(("ssh", "door"), ways, indirect=["ssh"], ids=names)


every_way = ways(*WAYS)
every_door = ways(*((OURS, door) for door in DOORS), (GO, "tls"))  # and a Go agent once
every_agent = functools.partial(pytest.mark.parametrize, argvalues=AGENTS, indirect=True)

LARGE, VERY_LARGE = 20_000_000, 100_000_000  # bytes that ssh carries each way
FEWER = 10_000_000  # bytes of a file for scp, and of an answer after a half-close
TRANSFER_TIMEOUT = 120  # seconds for VERY_LARGE, on a slow machine with one core
AT_ONCE = 3  # seconds, on a busy machine
SHORT = 2  # seconds of every timeout that the gateway has, in the test of idle sessions
LONG_IDLE = 2  # so many of them

PROTOCOL_3 = 3 << 16  # of PostgreSQL's StartupMessage


# Programs ----------------------------------------------------------------------------------------


def run(*command, stdin=subprocess.DEVNULL, cwd=None) -> bytes:
    """What a program prints; it must succeed. Of the environment it gets the PATH."""
    done = subprocess.run(
        [need(command[0]), *command[1:]], stdin=stdin, cwd=cwd, capture_output=True,
        timeout=TRANSFER_TIMEOUT, env={"PATH": os.environ["PATH"]},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


def database_program(name) -> str:
    """The path of one of PostgreSQL's programs, which Debian keeps beside the PATH."""
    found = sorted(Path("/usr/lib/postgresql").glob(f"*/bin/{name}"))
    return str(found[-1]) if found else need(name)


@contextlib.contextmanager
def postgresql():
    """An empty PostgreSQL, whose user "tester" needs no password, on a free port; yields it."""
    as_nobody = ()
    with tempfile.TemporaryDirectory() as folder, reserved_port() as port:
        data = os.path.join(folder, "data")
        os.mkdir(data, 0o700)
        if os.geteuid() == 0:  # as whom it refuses to run
            nobody = pwd.getpwnam("nobody")
            ids = f"--reuid={nobody.pw_uid}", f"--regid={nobody.pw_gid}"
            as_nobody = (need("setpriv"), *ids, "--clear-groups")
            os.chown(data, nobody.pw_uid, nobody.pw_gid)
            os.chmod(folder, 0o755)
        run(
            *as_nobody, database_program("initdb"), "-D", data, "-U", "tester", "-A", "trust",
            "--locale=C", "--encoding=UTF8", "--no-sync", cwd=folder,
        )  # fmt: skip
        command = (
            *as_nobody, database_program("postgres"), "-D", data, "-F", "-h", "127.0.0.1",
            "-p", str(port), "-k", "",
        )  # fmt: skip
        with running(*command, cwd=folder) as server:
            server.wait_for("ready to accept connections")
            yield port
            server.signal(signal.SIGINT)  # ends at once; SIGTERM would wait for its clients
            server.wait()


@contextlib.contextmanager
def redis(folder, *options):
    """An empty Redis on a free port, which it yields."""
    with reserved_port() as port:
        command = (
            need("redis-server"), "--bind", "127.0.0.1", "--port", str(port), "--save", "",
            "--dir", str(folder), *options,
        )  # fmt: skip
        with running(*command, cwd=folder) as server:
            server.wait_for("Ready to accept connections")
            yield port


# Doors -------------------------------------------------------------------------------------------


class Served(NamedTuple):
    """A tcp hostname that an agent serves, and the doors to it."""

    gateway: Gateway
    hostname: str
    own_port: int | None  # None for a Go agent

    def dial(self, door) -> Wire:
        """A visitor's connection, before either side has said a word."""
        if door == "tls":
            return self.gateway.dial(self.hostname)
        if door == "connect":
            visitor = self.gateway.dial(GATEWAY_HOST)
            visitor.send(self._connect().encode())
            head = visitor.read_head()
            assert head.startswith(b"HTTP/1.1 200 "), head
            return visitor
        port = self.own_port if door == "own port" else self.gateway.public_port
        return Wire(socket.create_connection(("127.0.0.1", port), TIMEOUT))

    def way(self, door) -> list:
        """The options with which ssh and scp go through a door."""
        if door == "plain":
            return ["-o", "HostName=127.0.0.1", "-o", f"Port={self.gateway.public_port}"]
        if door == "own port":
            return ["-o", "HostName=127.0.0.1", "-o", f"Port={self.own_port}"]
        proxy = {"tls": self._s_client, "forward": self._forward, "connect": self._connecting}
        return ["-o", f"ProxyCommand={proxy[door]()}"]

    def _s_client(self, sni=None):
        return shlex.join([
            need("openssl"), "s_client", "-quiet", "-verify_quiet", "-verify_return_error",
            "-CAfile", str(self.gateway.ca_file), "-servername", sni or self.hostname,
            "-connect", f"127.0.0.1:{self.gateway.public_port}",
        ])  # fmt: skip

    def _forward(self):
        return shlex.join([
            sys.executable, str(ROOT / "gotunnel_agent"), "forward", self.hostname,
            "--via", f"127.0.0.1:{self.gateway.public_port}",
            "--ca-file", str(self.gateway.ca_file),
        ])  # fmt: skip

    def _connect(self):
        authority = f"{self.hostname}:{self.gateway.public_port}"
        return f"CONNECT {authority} HTTP/1.1\r\nHost: {authority}\r\n\r\n"

    def _connecting(self):
        """Before what ssh says goes a head; before what it reads, the answer's is dropped, line by
        line, up to the empty one."""
        head = self._connect().replace("\r\n", r"\r\n")  # printf writes them
        question = f"{{ printf '{head}'; cat; }}"
        answer = "{ while read -r line && [ ${#line} -gt 1 ]; do :; done; cat; }"
        return shlex.join(["sh", "-c", f"{question} | {self._s_client(GATEWAY_HOST)} | {answer}"])


@pytest.fixture(scope="module")
def own_ports():
    """The public ports that agents may ask for, by the hostname that they are for."""
    with contextlib.ExitStack() as stack:
        yield {hostname: stack.enter_context(reserved_port()) for hostname in HOSTNAMES}


@pytest.fixture(scope="module")
def gateway(cache, own_ports):
    ports = ",".join(map(str, own_ports.values()))
    with gateway_process(cache, RAW_TCP_HOST=SSH, TCP_PORTS=ports) as gateway:
        yield gateway


@pytest.fixture(scope="module")
def serving(gateway, own_ports, tmp_path_factory, request) -> Callable:
    """``serving(agent, hostname, port)``, for a with: has one of AGENTS serve a port of this
    machine; gives a Served."""

    @contextlib.contextmanager
    def serve(agent, hostname, port):
        if agent == GO:
            with go_agent(request.getfixturevalue("gopeer"), gateway, tcp={hostname: port}):
                yield Served(gateway, hostname, None)
        else:
            own = own_ports[hostname]
            folder = tmp_path_factory.mktemp("agent")
            with agent_process(gateway, folder, tunnels=[tunnel(hostname, port, own)]):
                yield Served(gateway, hostname, own)

    return serve


def tunnel(hostname, port, own_port):
    """An item of the agent's tunnels."""
    target = f"127.0.0.1:{port}"
    return {"hostname": hostname, "target": target, "mode": "tcp", "port": str(own_port)}


@pytest.fixture(scope="module")
def sshd_here(tmp_path_factory):
    with sshd(tmp_path_factory.mktemp("sshd")) as server:
        yield server


@pytest.fixture(scope="module")
def ssh(serving, sshd_here, request):
    """The sshd as one of AGENTS serves it."""
    with serving(request.param, SSH, sshd_here[0]) as served:
        yield served


@pytest.fixture
def options(ssh, sshd_here, door):
    """What leads ssh and scp to that sshd through one of DOORS, logged in."""
    return [*sshd_here[1], *ssh.way(door)]


# OpenSSH -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def large(tmp_path_factory, request):
    """A file of so many bytes, and its hash."""
    path = tmp_path_factory.mktemp("large") / "file"
    data = random.Random(6).randbytes(request.param)
    path.write_bytes(data)
    return path, digest(data)


def digest(data):
    return hashlib.sha256(data).hexdigest()


@contextlib.contextmanager
def session(options, *arguments):
    """An ssh that stays, and says again what it is told. It has answered when this returns."""
    command = [need("ssh"), *options, *arguments, SSH, "echo ready; cat"]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe) as process:
        try:
            assert process.stdout.readline() == b"ready\n", process.stderr.read()
            yield process
            out, error = process.communicate(b"still here\n", TIMEOUT)
            assert (out, process.returncode) == (b"still here\n", 0), error
        finally:
            process.kill()  # if the test has failed


@pytest.mark.slow
@every_way
def test_ssh_runs_a_command_and_a_login_shell(options):
    assert run("ssh", *options, SSH, "echo through the tunnel") == b"through the tunnel\n"
    assert b"by hand 42" in run("ssh", *options, "-tt", SSH, "echo by hand $((6 * 7))")


@pytest.mark.slow
@every_door
@pytest.mark.parametrize("large", [LARGE, at_length(VERY_LARGE)], indirect=True)
def test_ssh_carries_a_large_file_each_way(options, large):
    path, expected = large
    with open(path, "rb") as file:
        assert run("ssh", *options, SSH, "sha256sum", stdin=file).split()[0] == expected.encode()
    assert digest(run("ssh", *options, SSH, f"cat {shlex.quote(str(path))}")) == expected


@pytest.mark.slow
@every_door
def test_scp_copies_a_file_there_and_back(options, tmp_path):
    data = random.Random(7).randbytes(FEWER)
    first, second, third = (tmp_path / name for name in ("first", "second", "third"))
    first.write_bytes(data)
    run("scp", *options, first, f"{SSH}:{second}")
    run("scp", *options, f"{SSH}:{second}", third)
    assert digest(third.read_bytes()) == digest(data)


@pytest.mark.slow
@every_door
def test_ssh_forwards_a_port(options, origin):
    with reserved_port() as port:
        with session(options, "-L", f"127.0.0.1:{port}:127.0.0.1:{origin.port}"):
            visitor = Wire(socket.create_connection(("127.0.0.1", port), TIMEOUT))
            with visitor, origin.accept() as target:
                visitor.send(b"there")
                assert target.read_exactly(5) == b"there"
                target.send(b"and back")
                assert visitor.read_exactly(8) == b"and back"


@pytest.mark.slow
@ways(*(way for way in WAYS if "forward" not in way))
def test_server_that_speaks_first_is_heard(ssh, door):
    with ssh.dial(door) as visitor:
        assert visitor.read_until(b"\n").startswith(b"SSH-2.0-")


@pytest.mark.slow
def test_session_that_is_idle_outlives_every_timeout_of_the_gateway(cache, tmp_path, sshd_here):
    """How long that is, is told by visitors who say nothing and are sent away for it."""
    port, login = sshd_here
    timeouts = ("HEADER_TIMEOUT", "IDLE_TIMEOUT", "RESPONSE_TIMEOUT")
    with contextlib.ExitStack() as stack:
        own = stack.enter_context(reserved_port())
        changes = dict.fromkeys(timeouts, str(SHORT)) | {"TCP_PORTS": str(own)}
        gateway = stack.enter_context(gateway_here(cache, **changes))
        stack.enter_context(agent_here(gateway, tmp_path, tunnels=[tunnel(SSH, port, own)]))
        gateway.wait_for_routes(SSH)
        served = Served(gateway, SSH, own)
        for door in DOORS:
            stack.enter_context(session([*login, *served.way(door)]))
        for _ in range(LONG_IDLE):
            with gateway.dial(GATEWAY_HOST) as silent:
                assert silent.read_to_end() == b""


# PostgreSQL --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def database_port():
    with postgresql() as port:
        yield port


@pytest.fixture(scope="module")
def database(serving, database_port, request):
    """PostgreSQL as one of AGENTS serves it."""
    with serving(request.param, DB, database_port) as served:
        yield served


def address(port, **parameters):
    """A connection string: the hostname is for SNI and the certificate, none has to be resolved."""
    place = dict(host=DB, hostaddr="127.0.0.1", port=port, user="tester", dbname="postgres")
    return " ".join(f"{key}={value}" for key, value in (place | parameters).items())


def ask(address):
    return run(database_program("psql"), address, "--no-psqlrc", "-Atc", "select 6 * 7")


@pytest.mark.slow
@every_agent("database")
def test_psql_comes_by_tls_on_the_public_port(database):
    gateway = database.gateway
    port, trust = gateway.public_port, gateway.ca_file
    assert ask(address(port, sslmode="require")) == b"42\n"
    assert ask(address(port, sslmode="verify-full", sslrootcert=trust)) == b"42\n"


@pytest.mark.slow
@every_agent("database")
def test_database_driver_may_begin_with_tls_at_once(database):
    """As libpq does with sslnegotiation=direct; it insists on the protocol's name."""
    context = tls_context(database.gateway.ca_file)
    context.set_alpn_protocols(["postgresql"])
    with dial_tls(database.gateway.public_port, DB, context) as visitor:
        assert visitor.sock.selected_alpn_protocol() == "postgresql"
        names = b"user\0tester\0database\0postgres\0\0"
        visitor.send(struct.pack("!II", 8 + len(names), PROTOCOL_3) + names)
        # Authentication, 8 bytes with their count, and 0: none is asked for.
        assert visitor.read_exactly(9) == b"R" + struct.pack("!II", 8, 0)


@pytest.mark.slow
@pytest.mark.parametrize("database", [OURS], indirect=True)
def test_psql_comes_without_tls_on_a_port_of_its_own(database):
    assert ask(address(database.own_port, sslmode="disable")) == b"42\n"
    assert ask(address(database.own_port, sslmode="prefer")) == b"42\n"


def cancel_at_psql(place, direct):
    """Ctrl-C at psql while it waits for an answer; what psql says then. ``direct`` is an address
    of the database without a tunnel."""
    mark = f"select pg_sleep(60), '{place.partition('port=')[2][:5]}'"
    asks = database_program("psql"), place, "--no-psqlrc", "-c", mark
    running = "select count(*) from pg_stat_activity where state = 'active' and query = $$"
    with subprocess.Popen(asks, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as psql:
        wait_until(lambda: run(
            database_program("psql"), direct, "--no-psqlrc", "-Atc", f"{running}{mark}$$"
        ) == b"1\n")  # fmt: skip
        psql.send_signal(signal.SIGINT)
        try:
            return psql.communicate(timeout=10)[0]
        finally:
            psql.kill()


@pytest.mark.slow
@every_agent("database")
def test_ctrl_c_at_psql_cancels_its_query_and_no_other(database, database_port):
    """psql before version 17 asks for that without TLS, and without a hostname."""
    place, direct = address(database.gateway.public_port, sslmode="require"), address(database_port)
    assert b"canceling statement due to user request" in cancel_at_psql(place, direct)
    if database.own_port is not None:
        said = cancel_at_psql(address(database.own_port, sslmode="disable"), direct)
        assert b"canceling statement due to user request" in said


@pytest.mark.slow
@pytest.mark.parametrize(("database", "seconds"), [(OURS, 2), (GO, 1)], indirect=["database"])
def test_pgbench_fills_a_database_and_works_in_it_with_8_clients(database, seconds):
    pgbench = database_program("pgbench")
    place = address(database.gateway.public_port, sslmode="require")
    run(pgbench, "--initialize", "--quiet", "--scale=1", place)
    report = run(pgbench, "--client=8", f"--time={seconds}", place).decode()
    assert int(re.search(r"actually processed: (\d+)", report)[1]) > 0
    assert "failed transactions: 0 " in report


# Redis -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def redis_port(tmp_path_factory):
    with redis(tmp_path_factory.mktemp("redis")) as port:
        yield port


@pytest.fixture(scope="module")
def store(serving, redis_port, request):
    """Redis as one of AGENTS serves it."""
    with serving(request.param, STORE, redis_port) as served:
        yield served


def redis_way(store, door):
    """The options that lead Redis's programs through a door."""
    if door == "own port":
        return ["-h", "127.0.0.1", "-p", str(store.own_port)]
    return [
        "-h", "127.0.0.1", "-p", str(store.gateway.public_port), "--tls", "--sni", STORE,
        "--cacert", str(store.gateway.ca_file),
    ]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize(
    ("store", "door"), [(OURS, "tls"), (OURS, "own port"), (GO, "tls")], indirect=["store"]
)
def test_redis_answers_its_own_programs(store, door):
    way = redis_way(store, door)
    text = "a word " * 10_000
    assert run("redis-cli", *way, "set", "key", text) == b"OK\n"
    assert run("redis-cli", *way, "get", "key").decode() == text + "\n"
    report = run("redis-benchmark", *way, "-n", "2000", "-c", "20", "-t", "set,get", "--csv")
    rates = re.findall(r'^"([SG]ET)","([\d.]+)"', report.decode(), re.MULTILINE)
    assert [name for name, rate in rates if float(rate) > 0] == ["SET", "GET"]


@pytest.mark.slow
@pytest.mark.parametrize("door", ["tls", "own port"])
def test_redis_that_is_full_says_so_to_each_client(serving, tmp_path, door):
    """It answers and closes at once, with what the client has sent still unread: its kernel sends a
    RST behind the answer, which must not overtake it."""
    with redis(tmp_path, "--maxclients", "1") as port, serving(OURS, STORE, port) as store:
        with socket.create_connection(("127.0.0.1", port)) as only:
            only.sendall(b"PING\r\n")
            assert only.recv(100) == b"+PONG\r\n"
            for _ in range(10):
                said = subprocess.run(
                    ["redis-cli", *redis_way(store, door), "get", "key"],
                    capture_output=True, text=True, timeout=TIMEOUT, check=False,
                )  # fmt: skip
                assert "max number of clients reached" in said.stdout + said.stderr


# What programs do to each other ------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("door", ["tls", "own port"])
def test_client_that_has_finished_reads_10_mb_more(serving, origin, door):
    question, data = b"all that there is", random.Random(8).randbytes(FEWER)
    asked = []

    def answer(target):
        asked.append(target.read_to_end())
        target.send(data)

    origin.serve(answer)
    with serving(OURS, RAW, origin.port) as served, served.dial(door) as visitor:
        visitor.send(question)
        visitor.finish()
        assert digest(visitor.read_to_end()) == digest(data)
    assert asked == [question]


@pytest.mark.slow
@pytest.mark.parametrize("door", ["tls", "connect", "own port"])
def test_visit_to_a_target_that_is_down_ends_at_once(gateway, own_ports, tmp_path, door):
    with reserved_port() as port:
        tunnels = [tunnel(RAW, port, own_ports[RAW])]
        with agent_process(gateway, tmp_path, tunnels=tunnels) as agent:
            with Served(gateway, RAW, own_ports[RAW]).dial(door) as visitor:
                visitor.sock.settimeout(AT_ONCE)
                with pytest.raises(CUT):
                    visitor.read_to_end()
            agent.wait_for(rf"{RAW}: target 127\.0\.0\.1:{port}: .*refused")
