"""The few tools of the tests: programs, gateways and agents, visitors, targets.

A visit has four ends, and a test holds two of them: it dials the gateway as a visitor, accepts the
agent's connection as the target, and says in one straight line what each sends and reads. Both
are a `Wire`, of which nothing is hidden; whatever waits fails after TIMEOUT seconds.

Gateway and agent run in this process (``gateway_here``, ``agent_here``: quick, and their constants
can be changed) or as the programs that an operator starts (``gateway_process``,
``agent_process``). All ports are free ones of 127.0.0.1. Whatever is started here has ended when
its ``with`` has, also when the test failed.
"""

import contextlib
import errno
import http.client
import importlib.util
import json
import os
import re
import shutil
import socket
import ssl
import struct
import subprocess
import sys
import threading
import time
from pathlib import Path
from unittest import mock

import leaks
import pytest

from gotunnel_agent import agent as agent_module
from gotunnel_agent import config as agent_config
from gotunnel_server import config as server_config
from gotunnel_server import gateway as gateway_module
from gotunnel_server.agents import tunnel
from gotunnel_server.net.inherited import NOTHING

ROOT = Path(__file__).parent.parent
TIMEOUT = 20  # seconds for any one wait: far more than a busy machine needs
TICK = 0.01  # seconds between two looks of wait_until()
MIB = 1024 * 1024

SECRET = "only for tests, and long enough for HS256"
GATEWAY_HOST = "gateway.localhost"
TUNNEL_HOST = "localhost"  # agents resolve it by themselves
APP = "app.localhost"  # the hostname of most http visits ...
RAW = "raw.localhost"  # ... and of tcp visits

# Where a visit must look cut short: a RST, or an end of TCP without TLS's farewell.
CUT = (ConnectionResetError, ssl.SSLEOFError)


def need(program) -> str:
    """The path of a program. Without it the test is skipped, or fails if GOTUNNEL_CI is 1."""
    path = shutil.which(program) or shutil.which(program, path="/usr/sbin:/sbin")
    if path is None:
        give_up = pytest.fail if os.environ.get("GOTUNNEL_CI") == "1" else pytest.skip
        give_up(f"{program} is not installed")
    return path


def need_package(name, extra="apps"):
    """A module of a package that an extra in setup.py installs. As need()."""
    if importlib.util.find_spec(name) is None:
        give_up = pytest.fail if os.environ.get("GOTUNNEL_CI") == "1" else pytest.skip
        give_up(f"{name} is not installed; pip install '.[{extra}]'")
    return importlib.import_module(name)


def at_length(*values):
    """A parameter with which a test repeats at length what a smaller one shows: marked ``long``."""
    return pytest.param(*values, marks=[pytest.mark.slow, pytest.mark.long])


def wait_until(condition, timeout=TIMEOUT):
    """Return the first true value of ``condition()``; fail after ``timeout`` seconds."""
    deadline = time.monotonic() + timeout
    while not (value := condition()):
        assert time.monotonic() < deadline, f"still not so after {timeout} s"
        time.sleep(TICK)
    return value


@contextlib.contextmanager
def reserved_port():
    """A port that nobody is given by chance, but that may be listened on (with SO_REUSEADDR).

    A socket that is bound and does not listen keeps it.
    """
    with socket.socket() as keeper:
        keeper.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        keeper.bind(("127.0.0.1", 0))
        yield keeper.getsockname()[1]


@contextlib.contextmanager
def deaf_port(family=socket.AF_INET):
    """A port of this machine whose backlog is full: the system drops each SYN, as firewalls do."""
    host = "::1" if family == socket.AF_INET6 else "127.0.0.1"
    with socket.socket(family) as listening, socket.socket(family) as first:
        listening.bind((host, 0))
        listening.listen(0)
        first.connect(listening.getsockname())
        yield listening.getsockname()[1]


# Connections -------------------------------------------------------------------------------------


class Wire:
    """One end of a connection, plain or TLS, used by the test itself. Closes as a ``with``."""

    def __init__(self, sock):
        self.sock = sock
        sock.settimeout(TIMEOUT)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)  # as all http libraries do
        self._buffer = b""

    def __enter__(self):
        return self

    def __exit__(self, *exc_info):
        self.close()

    def send(self, data):
        self.sock.sendall(data)

    def read(self) -> bytes:
        """What is there, once something is; b"" at the end."""
        if self._buffer:
            data, self._buffer = self._buffer, b""
            return data
        try:
            return self.sock.recv(64 * 1024)
        except ssl.SSLZeroReturnError:  # TLS's farewell, if its absence is an error
            return b""

    def read_until(self, mark) -> bytes:
        """All up to ``mark``, which is included."""
        data = b""
        while mark not in data:
            more = self.read()
            assert more, f"the end came after {data!r}, expected {mark!r}"
            data += more
        end = data.index(mark) + len(mark)
        self._buffer = data[end:]
        return data[:end]

    def read_head(self) -> bytes:
        return self.read_until(b"\r\n\r\n")

    def read_exactly(self, count) -> bytes:
        parts = []
        while count:
            data = self.read()
            assert data, f"the end came, expected {count} more bytes"
            self._buffer = data[count:]
            parts.append(data[:count])
            count -= len(parts[-1])
        return b"".join(parts)

    def read_to_end(self) -> bytes:
        parts = []
        while data := self.read():
            parts.append(data)
        return b"".join(parts)

    def read_message(self) -> tuple:
        """An http head and its body, decoded."""
        head = self.read_head()
        if b"\r\ntransfer-encoding: chunked\r\n" in head.lower():
            body = []
            while size := int(self.read_until(b"\r\n"), 16):
                body.append(self.read_exactly(size))
                self.read_exactly(2)
            while self.read_until(b"\r\n") != b"\r\n":
                pass  # trailers
            return head, b"".join(body)
        length = re.search(rb"(?i)\r\ncontent-length: *([0-9]+)", head)
        return head, self.read_exactly(int(length[1]) if length else 0)

    def finish(self):
        """Half-close, with TLS's farewell. Not while the peer sends: OpenSSL would refuse.

        A peer that has broken the connection off before is no error: nothing is left to close.
        """
        if isinstance(self.sock, ssl.SSLSocket):
            self.sock.setblocking(False)
            with contextlib.suppress(ssl.SSLWantReadError):  # the peer's farewell is yet to come
                self.sock.unwrap()
            self.sock.settimeout(TIMEOUT)
        else:
            try:
                self.sock.shutdown(socket.SHUT_WR)
            except OSError as error:
                if error.errno != errno.ENOTCONN:
                    raise

    def reset(self):
        """Close with a RST."""
        self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.close()

    def close(self):
        self.sock.close()


def tls_context(ca_file) -> ssl.SSLContext:
    return ssl.create_default_context(cafile=ca_file)


def dial_tls(port, sni, context) -> Wire:
    """A TLS connection to a port of this machine; an end without farewell is an error on it."""
    sock = socket.create_connection(("127.0.0.1", port), TIMEOUT)
    try:
        return Wire(context.wrap_socket(sock, server_hostname=sni, suppress_ragged_eofs=False))
    except BaseException:
        sock.close()
        raise


class Origin:
    """A target. The test accepts the agent's connections, or has all of them serve()d."""

    def __init__(self):
        self._listening = socket.create_server(("127.0.0.1", 0), backlog=128)
        self.port = self._listening.getsockname()[1]
        self._wires = []
        self._threads = []

    def __enter__(self):
        return self

    def __exit__(self, *exc_info):
        with contextlib.suppress(OSError):  # not every system lets a listening socket be shut down
            self._listening.shutdown(socket.SHUT_RDWR)
        self._listening.close()
        for wire in self._wires:
            with contextlib.suppress(OSError):  # ended already
                wire.sock.shutdown(socket.SHUT_RDWR)
        for thread in self._threads:
            thread.join(TIMEOUT)
        for wire in self._wires:
            wire.close()

    def accept(self, timeout=TIMEOUT) -> Wire:
        """The next connection; raises TimeoutError, at once for a timeout of 0."""
        self._listening.settimeout(timeout)
        try:
            wire = Wire(self._listening.accept()[0])
        except BlockingIOError:
            raise TimeoutError("nobody has come") from None
        self._wires.append(wire)
        return wire

    def was_left_alone(self) -> bool:
        """Whether nobody has connected since the last accept()."""
        with contextlib.suppress(TimeoutError):
            self.accept(timeout=0)
            return False
        return True

    def serve(self, script):
        """From now on call ``script(wire)`` for each connection, in a thread; then close it."""
        self._start(self._accept_all, script)

    def _accept_all(self, script):
        with contextlib.suppress(OSError):  # closed: the test is over
            while True:
                self._start(self._run, script, self.accept(timeout=None))

    def _run(self, script, wire):
        # A script ends as it likes, when its peer breaks off too: the test looks at the answers.
        with contextlib.suppress(OSError, AssertionError):
            script(wire)
        with contextlib.suppress(OSError):
            wire.sock.shutdown(socket.SHUT_RDWR)
        wire.close()

    def _start(self, function, *arguments):
        thread = threading.Thread(target=function, args=arguments, name="origin", daemon=True)
        self._threads.append(thread)
        thread.start()


# Programs ----------------------------------------------------------------------------------------


class Program:
    """A running program, and the lines that it has printed."""

    def __init__(self, command, cwd, environment, sockets=()):
        self.lines = []
        self._grown = threading.Condition()  # guards lines; notified when they grow, or end
        self._process = subprocess.Popen(
            command, cwd=cwd, env={"PATH": os.environ["PATH"], **environment}, text=True,
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            pass_fds=[sock.fileno() for sock in sockets],
        )  # fmt: skip
        self._reader = threading.Thread(target=self._read, name="program's lines", daemon=True)
        self._reader.start()

    def _read(self):
        for line in self._process.stdout:
            leaks.look_at_output(line)
            with self._grown:
                self.lines.append(line.rstrip("\n"))
                self._grown.notify_all()

    def wait_for(self, pattern) -> re.Match:
        """The first line, from the first one on, in which ``pattern`` is found."""
        with self._grown:
            assert self._grown.wait_for(lambda: self._find(pattern), TIMEOUT), "\n".join(
                [f"{pattern!r} is not in:", *self.lines]
            )
            return self._find(pattern)

    def _find(self, pattern):
        return next(filter(None, (re.search(pattern, line) for line in self.lines)), None)

    def signal(self, number):
        self._process.send_signal(number)

    @property
    def pid(self) -> int:
        return self._process.pid

    def wait(self, timeout=TIMEOUT) -> int:
        """The exit status."""
        return self._process.wait(timeout)

    def end(self):
        """SIGTERM; SIGKILL for a program that does not listen."""
        self._process.terminate()
        try:
            self._process.wait(3)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._reader.join(TIMEOUT)
        self._process.stdout.close()


@contextlib.contextmanager
def running(*command, cwd, **environment):
    """Run a program with nothing in its environment but PATH and what is given."""
    program = Program(command, cwd, environment)
    try:
        yield program
    finally:
        program.end()


NPM_TIMEOUT = 240  # seconds for npm to fetch what a test needs


def npm_packages(pytestconfig, name, *packages) -> Path:
    """The node_modules in which npm has installed packages, under a name in pytest's cache, where
    they are kept for later runs."""
    folder = pytestconfig.cache.mkdir(name)
    stamp, wanted = folder / "installed", " ".join(packages)
    if not stamp.exists() or stamp.read_text() != wanted:
        done = subprocess.run(
            [need("npm"), "install", "--no-audit", "--no-fund", "--prefix", str(folder), *packages],
            cwd=folder, stdin=subprocess.DEVNULL, capture_output=True, text=True,
            timeout=NPM_TIMEOUT,
        )  # fmt: skip
        if re.search("network|E[A-Z]*(NOTFOUND|TIMEDOUT|REFUSED|AI_AGAIN)|CERT", done.stderr):
            pytest.skip(f"npm's registry cannot be reached: {done.stderr.splitlines()[0]}")
        assert done.returncode == 0, f"npm could not install {wanted}: {done.stderr}"
        stamp.write_text(wanted)
    return folder / "node_modules"


@contextlib.contextmanager
def nginx(folder):
    """nginx on a free port, which it yields: it serves the files in ``folder`` and takes PUT."""
    with reserved_port() as port:
        config = folder / "nginx.conf"
        config.write_text(
            "daemon off; master_process off; pid nginx.pid; error_log stderr warn;\n"
            "events { worker_connections 512; }\n"
            "http {\n"
            "  access_log off; client_max_body_size 0; client_body_temp_path bodies;\n"
            "  proxy_temp_path t; fastcgi_temp_path t; uwsgi_temp_path t; scgi_temp_path t;\n"
            f"  server {{ listen 127.0.0.1:{port}; root {folder}; dav_methods PUT; }}\n"
            "}\n"
        )
        with running(need("nginx"), "-p", str(folder), "-c", str(config), cwd=folder):
            wait_until(lambda: _is_open(port))
            yield port


@contextlib.contextmanager
def sshd(folder):
    """An sshd for the current user on a free port; yields (port, options for ssh)."""
    program, keygen = need("sshd"), need("ssh-keygen")
    for name in ("host_key", "user_key"):
        subprocess.run(
            [keygen, "-q", "-t", "ed25519", "-N", "", "-f", str(folder / name)], check=True
        )
    if os.geteuid() == 0:
        os.makedirs("/run/sshd", 0o755, exist_ok=True)  # as the system's own start script does
    with reserved_port() as port:
        config = folder / "sshd_config"
        config.write_text(
            f"ListenAddress 127.0.0.1:{port}\nHostKey {folder}/host_key\nPidFile none\n"
            f"AuthorizedKeysFile {folder}/user_key.pub\nStrictModes no\nUsePAM no\n"
            "Subsystem sftp internal-sftp\n"
        )
        with running(program, "-D", "-e", "-f", str(config), cwd=folder) as server:
            server.wait_for("Server listening")
            yield port, [
                "-F", "none", "-i", str(folder / "user_key"), "-o", "IdentitiesOnly=yes",
                "-o", "BatchMode=yes", "-o", "StrictHostKeyChecking=no",
                "-o", "UserKnownHostsFile=/dev/null", "-o", "LogLevel=ERROR",
            ]  # fmt: skip


def _is_open(port):
    with contextlib.suppress(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", port), TIMEOUT).close()
        return True


# Gateways ----------------------------------------------------------------------------------------


class Gateway:
    """A running gateway as its visitors and agents see it, ours or the Go one.

    ``wait_for_routes(*hostnames)`` waits until agents have registered them. ``program`` is the
    Program that it is, ``inner`` the gotunnel_server.gateway.Gateway, the other one None.
    """

    def __init__(self, public_port, tunnel_port, ca_file, wait_for_routes, *,
                 dashboard_port=None, program=None, inner=None):  # fmt: skip
        self.public_port = public_port
        self.tunnel_port = tunnel_port
        self.dashboard_port = dashboard_port
        self.ca_file = ca_file
        self.wait_for_routes = wait_for_routes
        self.program = program
        self.inner = inner
        self.context = tls_context(ca_file)

    def dial(self, hostname) -> Wire:
        """A visitor's connection, with the hostname as its SNI."""
        return dial_tls(self.public_port, hostname, self.context)

    @contextlib.contextmanager
    def visitor(self, hostname):
        """An http.client.HTTPConnection to a hostname. It does not connect again by itself."""
        connection = http.client.HTTPConnection(hostname)
        connection.auto_open = 0
        connection.sock = self.dial(hostname).sock
        with contextlib.closing(connection):
            yield connection

    def get(self, hostname, path="/") -> tuple:
        """Status and body of one request on a connection of its own."""
        with self.visitor(hostname) as visitor:
            visitor.request("GET", path)
            answer = visitor.getresponse()
            return answer.status, answer.read()


def gateway_environment(cache, **changes) -> dict:
    return {
        "GATEWAY_HOST": GATEWAY_HOST,
        "GATEWAY_PORT": "auto",
        "TUNNEL_HOST": TUNNEL_HOST,
        "TUNNEL_PORT": "auto",
        "DASHBOARD_PORT": "auto",
        "BIND": "127.0.0.1",
        "JWT_SECRET": SECRET,
        # Else each test of a hostname without an agent would wait, as the cache is that of all.
        "AGENT_TIMEOUT": "0",
        "ACME_ENV": "local",
        "ACME_CACHE": str(cache),
        **changes,
    }


@contextlib.contextmanager
def gateway_here(cache, subscribers=(), inherited=NOTHING, **changes):
    """A gateway in this process. ``changes`` are environment variables; ``subscribers`` get the
    record of each visit; ``inherited`` are listening sockets."""
    environment = gateway_environment(cache, **{"DRAIN_TIMEOUT": "0", "WORKERS": "192"} | changes)
    config = server_config.load(os.devnull, environment)
    inner = gateway_module.Gateway(config, subscribers, inherited)

    def wait_for_routes(*hostnames):
        wait_until(lambda: routes_of(inner) >= set(hostnames))

    inner.start()
    try:
        yield Gateway(
            inner.public_port, inner.tunnel_port, ca_of(cache), wait_for_routes,
            dashboard_port=inner.dashboard_port, inner=inner,
        )  # fmt: skip
    finally:
        inner.stop()


def routes_of(inner) -> set:
    """The hostnames that agents have registered with a gateway in this process."""
    return {hostname for tunnel in inner.tunnels.registered() for hostname in tunnel.routes}


def ca_of(cache) -> Path:
    return cache / "local" / "ca.crt"


@contextlib.contextmanager
def gateway_process(cache, *, command=(sys.executable, str(ROOT / "gotunnel_server")), **changes):
    """A gateway as an operator starts it. ``changes`` are environment variables."""
    environment = gateway_environment(cache, **changes)
    with running(*command, cwd=cache, **environment) as program:
        program.wait_for(" is ready$")
        dashboard = program.wait_for(rf"dashboard: http://{GATEWAY_HOST}:(\d+)/$")
        yield Gateway(
            int(program.wait_for(rf"visitors: https://{GATEWAY_HOST}:(\d+)/$")[1]),
            int(program.wait_for(rf"agents: tunnel_addr {TUNNEL_HOST}:(\d+)$")[1]),
            ca_of(cache),
            lambda *hostnames: [program.wait_for(rf" registered .*{name}") for name in hostnames],
            dashboard_port=int(dashboard[1]),
            program=program,
        )


@contextlib.contextmanager
def go_gateway(gopeer, cache, *arguments):
    """The Go gateway, which has one certificate for everybody: that of TUNNEL_HOST."""
    with gateway_here(cache):
        pass  # it has made the CA and that certificate
    folder = ca_of(cache).parent
    command = (
        str(gopeer), "gateway", "-gateway-host", TUNNEL_HOST, "-secret", SECRET,
        "-cert", str(folder / f"{TUNNEL_HOST}.crt"), "-key", str(folder / f"{TUNNEL_HOST}.key"),
    )  # fmt: skip
    with running(*command, *arguments, cwd=cache) as program:
        ports = program.wait_for(r"tunnel=\S+:(\d+) public=\S+:(\d+)$")
        gateway = Gateway(
            int(ports[2]), int(ports[1]), ca_of(cache),
            lambda *hostnames: [program.wait_for(f"^registered {name}$") for name in hostnames],
            program=program,
        )  # fmt: skip
        gateway.context.check_hostname = False
        yield gateway


# Agents ------------------------------------------------------------------------------------------


def agent_yaml(gateway, http, tcp, keys) -> str:
    """The configuration of an agent that serves hostnames, each from a port of this machine.

    ``keys`` change it; None leaves one out.
    """
    tunnels = [
        {"hostname": hostname, "target": f"127.0.0.1:{port}", "mode": mode}
        for mode, ports in (("http", http), ("tcp", tcp))
        for hostname, port in ports.items()
    ]
    document = {
        "tunnel_addr": f"{TUNNEL_HOST}:{gateway.tunnel_port}",
        "ca_file": str(gateway.ca_file),
        "jwt_secret": SECRET,
        "status_socket": "off",  # or all agents of the tests would want the same
        "tunnels": tunnels,
        **keys,
    }
    document = {key: value for key, value in document.items() if value is not None}
    return json.dumps(document)  # which is YAML too


@contextlib.contextmanager
def agent_here(gateway, folder, http={}, tcp={}, *, ready=True, **keys):
    """An agent in this process, registered unless ``ready`` is false. ``http`` and ``tcp`` map
    hostnames to ports; for ``keys`` see agent_yaml()."""
    path = folder / "agent-here.yaml"
    path.write_text(agent_yaml(gateway, http, tcp, keys))
    agent = agent_module.Agent(agent_config.load(path))
    life = threading.Thread(target=agent.run, name="agent")
    life.start()
    try:
        if ready:
            gateway.wait_for_routes(*http, *tcp)
        yield agent
    finally:
        # A gateway that is here too looks sooner than usual whether the agent's visits are over.
        with mock.patch.object(tunnel, "LEFT_LOOK", TICK):
            agent.stop()
            life.join(TIMEOUT)


@contextlib.contextmanager
def agent_process(gateway, folder, http={}, tcp={}, *, ready=True,
                  command=(sys.executable, str(ROOT / "gotunnel_agent")), **keys):  # fmt: skip
    """An agent as an operator starts it."""
    path = folder / "agent.yaml"
    path.write_text(agent_yaml(gateway, http, tcp, keys))
    with running(*command, "-c", str(path), cwd=folder) as program:
        if ready:
            program.wait_for(r": serving ")
            gateway.wait_for_routes(*http, *tcp)
        yield program


@contextlib.contextmanager
def go_agent(gopeer, gateway, *arguments, http={}, tcp={}, ready=True, secret=SECRET):
    """The Go agent."""
    command = [
        str(gopeer), "agent", "-addr", f"127.0.0.1:{gateway.tunnel_port}", "-sni", TUNNEL_HOST,
        "-secret", secret, "-issuer", "go", "-ca", str(gateway.ca_file), "-retry", "100ms",
    ]  # fmt: skip
    for hostname, port in {**http, **tcp}.items():
        command += ["-route", f"{hostname}=127.0.0.1:{port}"]
    for hostname in tcp:
        command += ["-mode", f"{hostname}=tcp"]
    with running(*command, *arguments, cwd=gateway.ca_file.parent) as program:
        if ready:
            program.wait_for("^registered$")
        yield program


# http --------------------------------------------------------------------------------------------


def request(method="GET", path="/", *fields, host=APP, body=b"") -> bytes:
    """A whole request; ``fields`` are lines such as "Accept: */*"."""
    if body:
        fields += (f"Content-Length: {len(body)}",)
    lines = [f"{method} {path} HTTP/1.1", f"Host: {host}", *fields, "", ""]
    return "\r\n".join(lines).encode() + body


def answer(body=b"ok", *fields, status="200 OK") -> bytes:
    """A whole answer."""
    lines = [f"HTTP/1.1 {status}", f"Content-Length: {len(body)}", *fields, "", ""]
    return "\r\n".join(lines).encode() + body


def status_of(head) -> int:
    return int(head.split(b" ", 2)[1])


def fields_of(head) -> list:
    """The field lines of a head, in lower case."""
    return head.decode("latin-1").lower().split("\r\n")[1:-2]
