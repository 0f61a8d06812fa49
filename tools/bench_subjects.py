"""What the bench compares: nginx without a tunnel, ours, and other tunnels, each before one nginx.

A subject starts a gateway and an agent that serve the site. Where a program keeps the visitor's TLS
unread (chisel, rathole), the agent relays to nginx's TLS port; frp ends TLS in its agent, with its
plugin https2http; ours and Go end it in the gateway.
"""

import contextlib
import http
import http.client
import os
import secrets
import socket
import ssl
import subprocess
import sys
import time
from dataclasses import dataclass

import bootstrap
from bench_programs import Program, build_gopeer, find, need, reserve_ports
from bench_table import OURS
from demo import LOOPBACK, START_TIMEOUT, Failed

HOSTNAME = "localhost"
TCP_HOSTNAME, SSH_HOSTNAME = "tcp.localhost", "ssh.localhost"
GATEWAY_HOST = "gateway.localhost"
SMALL, LARGE = 1024, 1 << 30  # bytes of the two files
PIECE = 1 << 20  # bytes of a read
INSPECTED = {"heads": "false", "bodies": "true"}  # what an inspector keeps, and its key "bodies"
NOT_HTTP = http.client.HTTPException
LOOK_AGAIN = 0.05  # seconds until the next look whether a site answers

ISSUE_CERTIFICATE = """
import sys
from pathlib import Path
from gotunnel_server.certs.local_ca import Authority
print(*Authority(Path(sys.argv[1])).issue(sys.argv[2]), sep="\\n")
"""

# For the interpreters that are compared. One without a GIL has it back if a module that it imports
# was not made for that.
VERSION = """
import platform, sysconfig
print(platform.python_version() + "t" * bool(sysconfig.get_config_var("Py_GIL_DISABLED")))
"""
PREPARE = """
import bootstrap
bootstrap.tool(lambda words: print(bootstrap.prepare("http2")))
"""
ABOUT = """
import ssl, sys
import gotunnel_server.gateway
has_gil = getattr(sys, "_is_gil_enabled", lambda: True)()
print("with" if has_gil else "without", "a GIL,", ssl.OPENSSL_VERSION)
"""

NGINX = """
{user} worker_processes 1; daemon off; pid {folder}/nginx.pid; error_log {folder}/nginx.log;
events {{ worker_connections 4096; }}
http {{
    access_log off; sendfile on; keepalive_requests 1000000; client_max_body_size 0;
    client_body_temp_path {folder}/body; proxy_temp_path {folder}/unused;
    fastcgi_temp_path {folder}/unused; uwsgi_temp_path {folder}/unused;
    scgi_temp_path {folder}/unused;
    server {{
        listen 127.0.0.1:{plain} backlog=4096;
        listen 127.0.0.1:{tls} ssl http2 backlog=4096;
        ssl_certificate {certificate}; ssl_certificate_key {key};
        ssl_protocols TLSv1.3;  # as ours and the peers; a resumed session of 1.2 costs far less
        root {folder}/www;
        location /put/ {{ dav_methods PUT; }}
    }}
}}
"""

AGENT_CONFIG = """
tunnel_addr: "127.0.0.1:{dial}"
ca_file: "{ca_file}"
jwt_secret: "{secret}"
inspect: {inspect}
tunnels:
  - hostname: "{hostname}"
    target: "127.0.0.1:{plain}"
  - hostname: "{tcp_hostname}"
    target: "127.0.0.1:{plain}"
    mode: tcp
  - hostname: "{ssh_hostname}"
    target: "127.0.0.1:{ssh}"
    mode: tcp
"""

FRPS = """
bindAddr = "127.0.0.1"
bindPort = {tunnel}
proxyBindAddr = "127.0.0.1"
vhostHTTPSPort = {visitors}
auth.token = "{secret}"
"""

FRPC = """
serverAddr = "127.0.0.1"
serverPort = {dial}
auth.token = "{secret}"
[[proxies]]
name = "site"
type = "https"
customDomains = ["{hostname}"]
[proxies.plugin]
type = "https2http"
localAddr = "127.0.0.1:{plain}"
crtPath = "{certificate}"
keyPath = "{key}"
"""

RATHOLE_SERVER = """
[server]
bind_addr = "127.0.0.1:{tunnel}"
default_token = "{secret}"
[server.transport]
type = "noise"
[server.transport.noise]
local_private_key = "{private}"
[server.services.site]
bind_addr = "127.0.0.1:{visitors}"
"""

RATHOLE_CLIENT = """
[client]
remote_addr = "127.0.0.1:{dial}"
default_token = "{secret}"
[client.transport]
type = "noise"
[client.transport.noise]
remote_public_key = "{public}"
[client.services.site]
local_addr = "127.0.0.1:{tls}"
"""


class Site:
    """nginx with the two files, on a plain port and a TLS port; and the folder of all the rest."""

    def __init__(self, stack, python, folder):
        """``python``: the path of one that has installed what a gateway needs. Ports are reserved
        until the end of ``stack``."""
        self.python, self.folder = python, folder
        self.plain, self.tls, self.ssh = reserve_ports(stack, 3)
        cache = os.path.join(folder, "cache", "local")  # the CA that our gateways shall use too
        os.makedirs(cache, 0o700)
        command = [python, "-c", ISSUE_CERTIFICATE, cache, HOSTNAME]
        issued = subprocess.run(
            command, env=os.environ | {"PYTHONPATH": bootstrap.ROOT}, text=True, check=True,
            stdout=subprocess.PIPE,
        )  # fmt: skip
        self.certificate, self.key = issued.stdout.split()
        self.ca_file = os.path.join(cache, "ca.crt")
        for name in ("www", "www/put", "body"):
            os.mkdir(os.path.join(folder, name))
        for name, size in (("small", SMALL), ("large", LARGE)):
            with open(os.path.join(folder, "www", name), "wb+", buffering=0) as file:
                file.truncate(size)  # no blocks on the disk: zeros, as fast as can be
                # Into the page cache. Else the kernel fills it with zeros while nginx sends the
                # file, and meanwhile nothing else runs on that CPU, for 18 ms at a time.
                while file.read(PIECE):
                    pass

    @contextlib.contextmanager
    def serve(self):
        # Its worker would else be another user, who may not read the folder.
        user = "user root;" if os.geteuid() == 0 else ""
        config = self.write("nginx.conf", NGINX, user=user)
        with Program("nginx", need("nginx"), "-p", self.folder, "-c", config, folder=self.folder):
            yield

    def write(self, name, text, **values):
        """Write a configuration, for its owner alone, as it may hold a secret; return its path."""
        values = {**vars(self), "hostname": HOSTNAME, **values}
        path = os.path.join(self.folder, name)
        handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        with open(handle, "w", encoding="utf-8") as file:
            file.write(text.format(**values))
        return path


@dataclass
class Running:
    """A subject that runs. Without a tunnel there are no processes."""

    name: str
    port: int  # where visitors ask for HOSTNAME
    tcp_port: int | None = None  # ... and for TCP_HOSTNAME; None if there is no such mode
    gateway: Program | None = None
    agent: Program | None = None
    tunnel_port: int = 0  # of the gateway, for agents
    sni: str = ""  # the name that idle agents dial; empty if the bench cannot make such agents
    secret: str = ""  # of the agents' tokens

    @property
    def processes(self):
        return {"gateway": self.gateway, "agent": self.agent} if self.gateway else {}

    def cpu_seconds(self):
        """User and system time so far: gateway and agent, or nothing."""
        return [program.cpu_seconds() for program in self.processes.values()]

    def memory(self):
        """Resident bytes: gateway and agent, or nothing."""
        return [program.memory() for program in self.processes.values()]

    def check(self):
        """Raises Failed if one of its processes has ended."""
        for program in self.processes.values():
            if not program.alive:
                raise program.failure("ended by itself")

    def wait_for_port(self):
        """Return when its gateway takes agents. Raises Failed."""
        deadline = time.monotonic() + START_TIMEOUT
        while time.monotonic() < deadline:
            if not self.gateway.alive:
                raise self.gateway.failure("ended by itself")
            with contextlib.suppress(OSError):
                socket.create_connection((LOOPBACK, self.tunnel_port)).close()
                return
            time.sleep(LOOK_AGAIN)
        raise self.gateway.failure(f"did not listen in {START_TIMEOUT} seconds")

    def wait(self):
        """Return when it answers visitors. Raises Failed."""
        trust = ssl.create_default_context()
        trust.check_hostname, trust.verify_mode = False, ssl.CERT_NONE
        deadline = time.monotonic() + START_TIMEOUT
        while time.monotonic() < deadline:
            self.check()
            visitor = http.client.HTTPSConnection(HOSTNAME, self.port, timeout=5, context=trust)
            with contextlib.closing(visitor), contextlib.suppress(OSError, NOT_HTTP):
                visitor.request("GET", "/small")
                if visitor.getresponse().status == http.HTTPStatus.OK:
                    return
            time.sleep(LOOK_AGAIN)
        what = f"did not bring an answer in {START_TIMEOUT} seconds"
        raise self.agent.failure(what) if self.agent else Failed(f"{self.name} {what}")


class Direct:
    """The same nginx, asked over TLS without a tunnel."""

    name = "direct"
    program = "nginx"

    def __init__(self, site):
        self._site = site

    @contextlib.contextmanager
    def start(self):
        running = Running(self.name, self._site.tls, self._site.tls)
        running.wait()
        yield running


class Tunnel:
    """A gateway and an agent of one program, started anew for each start()."""

    name = ""
    program = ""  # what must be on the PATH

    def __init__(self, site):
        self._site = site

    @contextlib.contextmanager
    def start(self, round_trip=0):
        """Yields Running. The agent dials through a line of so many ms, if that is not 0."""
        with contextlib.ExitStack() as stack:
            running = self._gateway(stack)
            running.wait_for_port()  # some agents give up, or try again late
            dial = running.tunnel_port
            if round_trip:
                script = os.path.join(bootstrap.ROOT, "tools", "bench_line.py")
                words = (sys.executable, "-u", script, dial, round_trip / 2)
                line = stack.enter_context(Program("line", *words, folder=self._site.folder))
                dial = line.wait_for(r"^\d+$")[0]
            running.agent = self._agent(stack, running, dial)
            running.wait()
            yield running

    def _gateway(self, stack):
        """Start the gateway; return Running without an agent."""
        raise NotImplementedError

    def _agent(self, stack, running, dial):
        """Start the agent, which dials the port ``dial``; return its Program."""
        raise NotImplementedError

    def _start(self, stack, role, *command, **settings):
        program = Program(f"{role} of {self.name}", *command, folder=self._site.folder, **settings)
        return stack.enter_context(program)

    def _write(self, role, running, text, **values):
        """Write the configuration of a gateway or an agent; return its path. Several may run."""
        ports = {"tunnel": running.tunnel_port, "visitors": running.port}
        name = f"{self.name}-{role}-{running.tunnel_port}"
        return self._site.write(name, text, secret=running.secret, **ports, **values)


class Ours(Tunnel):
    def __init__(self, site, name=OURS, python=None, settings=None, inspect=None):
        """``python``: the path of the one that runs gateway and agent, the site's unless given.
        ``settings``: of the gateway, beside those that the bench needs. ``inspect``: one of
        INSPECTED, for an agent with an inspector."""
        super().__init__(site)
        self._inspect = inspect
        self.name = name
        self._python = python or site.python
        self._settings = settings or {}
        # As an installed copy has it: else each start takes the memory that the compiler needs.
        ask(self._python, "-m", "compileall", "-q", *(os.path.join(bootstrap.ROOT, name)
            for name in ("gotunnel.py", "gotunnel_agent", "gotunnel_server")))  # fmt: skip

    def _gateway(self, stack):
        port, tunnel_port = reserve_ports(stack, 2)
        secret = secrets.token_hex(32)
        gateway = self._start(
            stack, "gateway", self._python, os.path.join(bootstrap.ROOT, "gotunnel_server"),
            GATEWAY_HOST=GATEWAY_HOST, GATEWAY_PORT=str(port), TUNNEL_HOST=LOOPBACK,
            TUNNEL_PORT=str(tunnel_port), DASHBOARD_PORT="0", BIND=LOOPBACK, ACME_ENV="local",
            ACME_CACHE=os.path.join(self._site.folder, "cache"), JWT_SECRET=secret,
            **self._settings,
        )  # fmt: skip
        return Running(self.name, port, port, gateway, None, tunnel_port, GATEWAY_HOST, secret)

    def _agent(self, stack, running, dial):
        inspect = "off"
        if self._inspect:
            [port] = reserve_ports(stack, 1)
            inspect = f"{{listen: {port}, bodies: {INSPECTED[self._inspect]}}}"
        config = self._write("agent", running, AGENT_CONFIG, dial=dial, tcp_hostname=TCP_HOSTNAME,
                             ssh_hostname=SSH_HOSTNAME, inspect=inspect)  # fmt: skip
        script = os.path.join(bootstrap.ROOT, "gotunnel_agent")
        state = os.path.join(self._site.folder, "state")  # for the inspector's token
        return self._start(stack, "agent", self._python, script, "-c", config, XDG_STATE_HOME=state)


def environment_of(interpreter):
    """Make an environment of its own for the Python at the path ``interpreter``, unless it is there
    already. Return a name with the version, the path of the environment's Python, and a sentence
    about both. Raises Failed."""
    version = ask(interpreter, "-c", VERSION, PYTHONPATH="")
    folder = os.path.join(".venvs", version)
    tools = os.path.join(bootstrap.ROOT, "tools")
    python = ask(interpreter, "-c", PREPARE, PYTHONPATH=tools, GOTUNNEL_VENV=folder)
    name = f"Python {version}"
    return name, python, f"{name}: {ask(python, '-c', ABOUT, PYTHONPATH=bootstrap.ROOT)}"


def ask(*command, **settings):
    """What a command prints. Raises Failed."""
    done = subprocess.run(command, env=os.environ | settings, stdout=subprocess.PIPE, text=True)
    if done.returncode != 0:
        raise Failed(f"{command[0]} ended with status {done.returncode}, expected 0")
    return done.stdout.strip()


class Go(Tunnel):
    """The Go ends of tests/gopeer, which behave as the Go program that ours descends from."""

    name = program = "go"

    def __init__(self, site):
        super().__init__(site)
        self._gopeer = build_gopeer(site.folder)

    def _gateway(self, stack):
        secret = secrets.token_hex(32)
        gateway = self._start(
            stack, "gateway", self._gopeer, "gateway", "-gateway-host", HOSTNAME, "-secret", secret,
            "-cert", self._site.certificate, "-key", self._site.key,
        )  # fmt: skip
        ports = gateway.wait_for(r"tunnel=\S+:(\d+) public=\S+:(\d+)$")
        tunnel_port, port = int(ports[1]), int(ports[2])
        return Running(self.name, port, port, gateway, None, tunnel_port, HOSTNAME, secret)

    def _agent(self, stack, running, dial):
        target = f"{LOOPBACK}:{self._site.plain}"
        # The gateway passes on the visitor's Host as it stands, with its port.
        host = f"{HOSTNAME}:{running.port}"
        return self._start(
            stack, "agent", self._gopeer, "agent", "-addr", f"{LOOPBACK}:{dial}", "-sni", HOSTNAME,
            "-secret", running.secret, "-issuer", "bench", "-insecure", "-retry", "100ms",
            "-route", f"{HOSTNAME}={target}", "-route", f"{host}={target}",
            "-route", f"{TCP_HOSTNAME}={target}", "-mode", f"{TCP_HOSTNAME}=tcp",
        )  # fmt: skip


class _Other(Tunnel):
    """A tunnel that is neither ours nor speaks our protocol."""

    def _running(self, stack):
        port, tunnel_port = reserve_ports(stack, 2)
        return Running(self.name, port, tunnel_port=tunnel_port, secret=secrets.token_hex(32))


class Frp(_Other):
    name, program = "frp", "frps"

    def _gateway(self, stack):
        running = self._running(stack)
        config = self._write("server", running, FRPS)
        running.gateway = self._start(stack, "server", need("frps"), "-c", config)
        return running

    def _agent(self, stack, running, dial):
        config = self._write("client", running, FRPC, dial=dial)
        return self._start(stack, "client", need("frpc"), "-c", config)


class Chisel(_Other):
    name = program = "chisel"

    def _gateway(self, stack):
        running = self._running(stack)
        running.gateway = self._start(
            stack, "server", need("chisel"), "server", "--host", LOOPBACK, "--port",
            running.tunnel_port, "--reverse", "--auth", f"bench:{running.secret}",
        )  # fmt: skip
        return running

    def _agent(self, stack, running, dial):
        return self._start(
            stack, "client", need("chisel"), "client", "--auth", f"bench:{running.secret}",
            f"http://{LOOPBACK}:{dial}",
            f"R:{LOOPBACK}:{running.port}:{LOOPBACK}:{self._site.tls}",
        )  # fmt: skip


class Rathole(_Other):
    name = program = "rathole"

    def __init__(self, site):
        super().__init__(site)
        said = subprocess.run(
            [need("rathole"), "--genkey"], stdout=subprocess.PIPE, text=True, check=True
        ).stdout.split()
        self._private, self._public = said[2], said[5]  # each behind "Private Key:", "Public Key:"

    def _gateway(self, stack):
        running = self._running(stack)
        config = self._write("server", running, RATHOLE_SERVER, private=self._private)
        running.gateway = self._start(stack, "server", need("rathole"), "--server", config)
        return running

    def _agent(self, stack, running, dial):
        config = self._write("client", running, RATHOLE_CLIENT, dial=dial, public=self._public)
        return self._start(stack, "client", need("rathole"), "--client", config)


PEERS = {subject.name: subject for subject in (Go, Frp, Chisel, Rathole)}


def present(peers):
    """Those of ``peers`` (names) whose programs are on the PATH, each once; and a line for each of
    the others."""
    found, missing = [], []
    for name in dict.fromkeys(peers):
        program = PEERS[name].program
        if find(program):
            found.append(PEERS[name])
        else:
            missing.append(f"{name} is left out: no {program} on the PATH")
    return found, missing
