"""Measures the tunnel beside nginx, and its multiplexer beside Go's, in one run on this machine.

    python3 tools/bench.py                     all rows
    python3 tools/bench.py --row http --row download
    python3 tools/bench.py --json FILE         keep the figures

The target is nginx, on plain HTTP; `direct` is the same nginx asked over TLS without a tunnel. What
can be compared between machines, and between two runs on a busy one, is the ratio of the two, and
the CPU time that a request or a gigabyte costs gateway and agent. Needs nginx, wrk and curl, the
row tcp OpenSSH too; the row yamux needs none of them, but Go for a part of it.

    http        requests/s and 99th percentile, for 1, 32 and 128 visitors with kept connections
    visitors    new visitors/s, 16 at a time, one request each
    download    one download of 1 GiB, MB/s, and how much both processes grew meanwhile
    upload      one upload of 1 GiB
    cpu         32 visitors, with gateway and agent each on one CPU, and on all: which costs less
    tcp         the same nginx through a tcp hostname, beside http mode (which is its `direct`, and
                whose CPU time is told behind): requests/s of 32 visitors, 1 GiB each way; and scp
                of 1 GiB through "gotunnel-agent forward", beside scp without a tunnel, with what
                share of a core each process took: one that had nearly all of it was the limit
    yamux       the multiplexer alone, over TLS: what a stream moves, also on long lines, how soon
                an echo comes back, what an idle session costs, what short streams leave behind;
                beside one TLS socket of Python's, and yamux in Go (which goes without TLS)
"""

import argparse
import contextlib
import json
import os
import re
import shlex
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter

import bootstrap
from demo import GATEWAY_HOST, LOOPBACK, Demo, Failed

HOSTNAME = "localhost"
TCP_HOSTNAME, SSH_HOSTNAME = "tcp.localhost", "ssh.localhost"
TUNNEL_HOST = LOOPBACK
SECONDS = 5  # of load for each figure
WARM_UP = 1
SMALL, LARGE = 1024, 1 << 30  # bytes of the two files
ROWS = ("http", "visitors", "download", "upload", "cpu", "tcp", "yamux")

# wrk takes the SNI from its URL; where that is, it shall not ask a resolver, which may not know.
WRK_SCRIPT = f"""
function wrk.resolve(host, service) wrk.addrs = wrk.lookup("{LOOPBACK}", service) end
"""

# Of the row tcp: its programs, and Debian's packages of them.
OPENSSH = {"scp": "openssh-client", "ssh-keygen": "openssh-client", "sshd": "openssh-server"}
LOOK_AGAIN = 0.05  # seconds between two looks at what processes that end by themselves have taken
SSHD = """
ListenAddress {address}
HostKey {folder}/host_key
PidFile none
AuthorizedKeysFile {folder}/user_key.pub
StrictModes no
UsePAM no
Subsystem sftp internal-sftp
"""

# Of the row yamux.
ENDS = os.path.join(bootstrap.ROOT, "tools", "bench_yamux.py")
GOPEER = os.path.join(bootstrap.ROOT, "tests", "gopeer")
ROUND_TRIPS = (50, 200)  # ms
LONG = 4  # times as long on a long line, where a stream needs seconds to get up to speed
GO_SECONDS = 1  # at most, for each figure of Go's: they come to rest sooner
PATIENCE = 120  # seconds more than a figure takes, before it is given up

NGINX = """
worker_processes 1; daemon off; pid {folder}/nginx.pid; error_log {folder}/nginx.log;
events {{ worker_connections 4096; }}
http {{
    access_log off; sendfile on; keepalive_requests 1000000; client_max_body_size 0;
    client_body_temp_path {folder}/body; proxy_temp_path {folder}/unused;
    fastcgi_temp_path {folder}/unused; uwsgi_temp_path {folder}/unused;
    scgi_temp_path {folder}/unused;
    server {{
        listen 127.0.0.1:{plain} backlog=4096; listen 127.0.0.1:{tls} ssl backlog=4096;
        ssl_certificate {cert}; ssl_certificate_key {key};
        root {folder}/www;
        location /put/ {{ dav_methods PUT; }}
    }}
}}
"""

AGENT_CONFIG = """
tunnel_addr: "{tunnel_addr}"
ca_file: "{ca_file}"
jwt_secret: "{secret}"
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


class Bench(Demo):
    """Gateway, agent and nginx, and what they cost."""

    _nginx = None

    def __init__(self, python, seconds):
        """``seconds``: how long each figure of load takes; wrk knows whole ones."""
        super().__init__(python)
        self._seconds = max(1, round(seconds))

    def __exit__(self, *exception):
        if self._nginx is not None:
            self._nginx.terminate()
            self._nginx.wait()
        super().__exit__(*exception)

    def set_up(self):
        """Start all; ``urls`` maps "direct", "tunnel" and "tcp" to where each is asked."""
        secret, folder = os.urandom(32).hex(), self._folder.name
        self.start(
            "gateway", "gotunnel_server",
            GATEWAY_HOST=GATEWAY_HOST, GATEWAY_PORT="auto", TUNNEL_HOST=TUNNEL_HOST,
            TUNNEL_PORT="auto", DASHBOARD_PORT="0", BIND=LOOPBACK, ACME_ENV="local",
            JWT_SECRET=secret,
        )  # fmt: skip
        self.ca_file = self.expect("gateway", r"must trust (.+)")
        port = self.expect("gateway", r"visitors: https://\S+:(\d+)/")
        tunnel_addr = self.expect("gateway", r"agents: tunnel_addr (\S+)")
        self.expect("gateway", "is ready")
        certificate = os.path.join(os.path.dirname(self.ca_file), GATEWAY_HOST)
        plain, tls, self._ssh_port = free_ports(3)
        for name in ("www", "www/put", "body"):
            path = os.path.join(folder, name)
            os.mkdir(path)
            os.chmod(path, 0o777)  # nginx's worker is another user, if this one is root
        os.chmod(folder, 0o755)
        for name, size in (("small", SMALL), ("large", LARGE)):
            with open(os.path.join(folder, "www", name), "wb") as file:
                file.truncate(size)  # no blocks on the disk: zeros, as fast as can be
        nginx = need("nginx")
        config = self.write("nginx.conf", NGINX.format(
            folder=folder, plain=plain, tls=tls, cert=f"{certificate}.crt", key=f"{certificate}.key"
        ))  # fmt: skip
        self._nginx = subprocess.Popen(
            [nginx, "-p", folder, "-c", config], stderr=subprocess.DEVNULL, start_new_session=True
        )
        config = self.write("agent.yaml", AGENT_CONFIG.format(
            tunnel_addr=tunnel_addr, ca_file=self.ca_file, secret=secret, hostname=HOSTNAME,
            tcp_hostname=TCP_HOSTNAME, ssh_hostname=SSH_HOSTNAME, plain=plain, ssh=self._ssh_port,
        ))  # fmt: skip
        self.start("agent", "gotunnel_agent", "-c", config)
        self.expect("agent", "serving")
        self.urls = {
            "direct": f"https://{HOSTNAME}:{tls}",
            "tunnel": f"https://{HOSTNAME}:{port}",
            "tcp": f"https://{TCP_HOSTNAME}:{port}",
        }
        self._large = os.path.join(folder, "www", "large")
        self._via = f"{LOOPBACK}:{port}"
        self._wrk_script = self.write("wrk.lua", WRK_SCRIPT)

    # Measuring

    def wrk(self, way, connections, *arguments, seconds=None):
        """Load one way; return requests/s and the 99th percentile in ms."""
        command = [
            need("wrk"), "-t1", f"-c{connections}", f"-d{seconds or self._seconds}", "--latency",
            "-s", self._wrk_script, *arguments,
        ]  # fmt: skip
        url = self.urls[way] + "/small"
        text = subprocess.run([*command, url], capture_output=True, text=True, check=True).stdout
        if wrong := re.search(r"Socket errors.*|Non-2xx.*", text):
            say(f"    {way}: {wrong[0]}")
        value, unit = re.search(r"99%\s+([\d.]+)(us|ms|s)", text).groups()
        rate = float(re.search(r"Requests/sec:\s+([\d.]+)", text)[1])
        return rate, float(value) * {"us": 1e-3, "ms": 1, "s": 1e3}[unit]

    def curl(self, way, *arguments):
        """Move the large file; return MB/s."""
        trust = ["--insecure"] if way == "direct" else ["--cacert", self.ca_file]
        asked = [part.replace("{url}", self.urls[way]) for part in arguments]
        began = time.monotonic()
        curl = subprocess.run(
            [need("curl"), "-sSf", "-o", os.devnull, *trust, "--connect-to", f"::{LOOPBACK}:",
             *asked]
        )  # fmt: skip
        if curl.returncode != 0:
            raise Failed(f"{way}: curl ended with status {curl.returncode}")
        return LARGE / (time.monotonic() - began) / 1e6

    def cpu_seconds(self):
        """User and system time of gateway and agent so far."""
        tick = os.sysconf("SC_CLK_TCK")
        return [
            sum(int(field) for field in self._stat(name)[11:13]) / tick
            for name in ("gateway", "agent")
        ]

    def memory(self):
        """Resident bytes of gateway and agent."""
        return [int(self._stat(name)[21]) * os.sysconf("SC_PAGE_SIZE")
                for name in ("gateway", "agent")]  # fmt: skip

    def _stat(self, name):
        with open(f"/proc/{self._children[name].pid}/stat") as file:
            return file.read().rpartition(")")[2].split()

    def spread(self, cpus):
        """Let gateway and agent run on these CPUs: one set for both, or one for each."""
        for name, own in zip(("gateway", "agent"), cpus):
            pid = self._children[name].pid
            for thread in os.listdir(f"/proc/{pid}/task"):
                os.sched_setaffinity(int(thread), own)

    # Rows; each yields dicts

    def row_http(self):
        for connections in (1, 32, 128):
            direct, direct_late = self.wrk("direct", connections)
            self.wrk("tunnel", connections, seconds=WARM_UP)
            before = self.cpu_seconds()
            rate, late = self.wrk("tunnel", connections)
            yield self.figures(f"requests/s, {connections} visitors", rate, direct, before,
                               rate * self._seconds / 1000, "1000 requests",
                               f"p99 {late:.1f} ms (direct {direct_late:.1f})")  # fmt: skip

    def row_visitors(self):
        close = ("-H", "Connection: close")
        direct, _ = self.wrk("direct", 16, *close)
        before = self.cpu_seconds()
        rate, late = self.wrk("tunnel", 16, *close)
        units, note = rate * self._seconds / 1000, f"p99 {late:.1f} ms"
        what = "new visitors/s, 16 at once"
        yield self.figures(what, rate, direct, before, units, "1000 visitors", note)

    def row_download(self):
        self.curl("direct", "{url}/large")  # what is not on the disk has to be made the first time
        direct = self.curl("direct", "{url}/large")
        memory, before = self.memory(), self.cpu_seconds()
        rate = self.curl("tunnel", "{url}/large")
        grown = [(now - then) / 1e6 for now, then in zip(self.memory(), memory)]
        note = "grown by {:.1f} and {:.1f} MB".format(*grown)
        yield self.figures("download, MB/s", rate, direct, before, LARGE / 1e9, "GB", note)

    def row_upload(self):
        command = self.upload()
        self.curl("direct", *command)
        direct = self.curl("direct", *command)
        before = self.cpu_seconds()
        rate = self.curl("tunnel", *command)
        yield self.figures("upload, MB/s", rate, direct, before, LARGE / 1e9, "GB", "")

    def upload(self):
        """The arguments with which curl sends the large file."""
        return "-T", self._large, "-H", "Expect:", "{url}/put/up"

    def row_cpu(self):
        everything = os.sched_getaffinity(0)
        alone = ({min(everything)}, {max(everything)})
        direct, _ = self.wrk("direct", 32)
        for name, cpus in (("one CPU each", alone), ("all CPUs", (everything, everything))) * 2:
            self.spread(cpus)
            before = self.cpu_seconds()
            rate, late = self.wrk("tunnel", 32)
            units, note = rate * self._seconds / 1000, f"p99 {late:.1f} ms"
            what = f"requests/s, 32 visitors, {name}"
            yield self.figures(what, rate, direct, before, units, "1000 requests", note)
        self.spread(alone)

    def row_tcp(self):
        download, upload = ("{url}/large",), self.upload()
        for arguments in (download, upload):
            self.curl("direct", *arguments)  # the first time is the disk's
        for way in ("tunnel", "tcp"):
            self.wrk(way, 32, seconds=WARM_UP)
        for what, measure, units, unit in (
            ("requests/s, 32 visitors", lambda way: self.wrk(way, 32)[0],
             lambda rate: rate * self._seconds / 1000, "1000 requests"),
            ("download, MB/s", lambda way: self.curl(way, *download),
             lambda rate: LARGE / 1e9, "GB"),
            ("upload, MB/s", lambda way: self.curl(way, *upload),
             lambda rate: LARGE / 1e9, "GB"),
        ):  # fmt: skip
            before = self.cpu_seconds()
            http = measure("tunnel")
            note = "http mode {:.3f} + {:.3f} s".format(*self.cpu_since(before, units(http)))
            before = self.cpu_seconds()
            rate = measure("tcp")
            yield self.figures(f"tcp: {what}", rate, http, before, units(rate), unit, note)
        with self.sshd() as (server, options):
            forward = shlex.join([
                self._python, os.path.join(bootstrap.ROOT, "gotunnel_agent"), "forward",
                SSH_HOSTNAME, "--via", self._via, "--ca-file", self.ca_file,
            ])  # fmt: skip
            loopback = ("-o", f"HostName={LOOPBACK}", "-o", f"Port={self._ssh_port}")
            direct, note = self.scp(server, *options, *loopback)
            say(f"    scp without a tunnel: {note}")
            before = self.cpu_seconds()
            rate, note = self.scp(server, *options, "-o", f"ProxyCommand={forward}")
            yield self.figures("tcp: scp, MB/s", rate, direct, before, LARGE / 1e9, "GB", note)

    @contextlib.contextmanager
    def sshd(self):
        """An sshd that serves this user; yields its process, and what ssh must be told."""
        folder, keygen = self._folder.name, need("ssh-keygen")
        for name in ("host_key", "user_key"):
            key = os.path.join(folder, name)
            subprocess.run([keygen, "-q", "-t", "ed25519", "-N", "", "-f", key], check=True)
        if os.geteuid() == 0:
            os.makedirs("/run/sshd", 0o755, exist_ok=True)  # as the system's own start script does
        address = f"{LOOPBACK}:{self._ssh_port}"
        config = self.write("sshd_config", SSHD.format(address=address, folder=folder))
        server = subprocess.Popen(
            [need("sshd"), "-D", "-e", "-f", config], start_new_session=True,
            stdin=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        with server:
            try:
                if "listening" not in server.stderr.readline():
                    raise Failed(f"sshd did not listen at {address}")
                yield server, (
                    "-F", "none", "-i", key, "-o", "IdentitiesOnly=yes", "-o", "BatchMode=yes",
                    "-o", "StrictHostKeyChecking=no", "-o", "UserKnownHostsFile=/dev/null",
                    "-o", "LogLevel=ERROR",
                )  # fmt: skip
            finally:
                server.terminate()

    def scp(self, server, *options):
        """Copy the large file to the sshd ``server``; return MB/s, and a text: seconds, and the
        share of a core that each process took."""
        watched = {child.pid: name for name, child in self._children.items()}
        watched[server.pid] = "sshd"
        earlier, latest = cpu_by_process(watched), {}
        place = f"{SSH_HOSTNAME}:{os.path.join(self._folder.name, 'copy')}"
        began = time.monotonic()
        copying = subprocess.Popen([need("scp"), "-q", *options, self._large, place])
        watched[copying.pid] = "scp"
        while True:
            latest.update(cpu_by_process(watched))
            with contextlib.suppress(subprocess.TimeoutExpired):
                copying.wait(LOOK_AGAIN)
                break
        took = time.monotonic() - began
        if copying.returncode != 0:
            raise Failed(f"scp ended with status {copying.returncode}")
        shares = Counter()
        for pid, (name, seconds) in latest.items():
            shares[name] += (seconds - earlier.get(pid, (name, 0))[1]) / took
        text = ", ".join(f"{name} {share:.2f}" for name, share in shares.items())
        return LARGE / took / 1e6, f"{took:.1f} s, of a core: {text}"

    def cpu_since(self, before, units):
        """CPU seconds of gateway and agent for each of the units that they did meanwhile."""
        return [(now - then) / units for now, then in zip(self.cpu_seconds(), before)]

    def figures(self, what, tunnel, direct, before, units, unit, note):
        cpu = self.cpu_since(before, units)
        return dict(what=what, tunnel=tunnel, direct=direct, ratio=tunnel / direct,
                    gateway_cpu=cpu[0], agent_cpu=cpu[1], cpu_per=unit, note=note)  # fmt: skip


class Yamux:
    """The multiplexer alone: a gateway end and an agent end (bench_yamux.py), new ones a figure."""

    def __init__(self, python, seconds):
        self._python = python
        self._seconds = seconds
        self._gopeer = None  # the program with the long line and the yardstick, if there is Go

    def __enter__(self):
        self._folder = tempfile.TemporaryDirectory(prefix="gotunnel-bench-")
        return self

    def __exit__(self, *exception):
        self._folder.cleanup()

    def build_gopeer(self):
        go = shutil.which("go")
        if go is None:
            say("Go is not installed: left out are the long lines, and what Go's yamux does")
            return
        program = os.path.join(self._folder.name, "gopeer")
        command = [go, "build", "-buildvcs=false", "-o", program, "."]
        built = subprocess.run(command, cwd=GOPEER, stderr=subprocess.PIPE, text=True)
        if built.returncode != 0:
            raise Failed(f"Go could not build {GOPEER}:\n{built.stderr}")
        self._gopeer = program

    # Measuring

    def ends(self, figure, *, round_trip=0, times=1):
        """Join two ends and return what the gateway end measures, ``times`` as long as usual.
        ``round_trip`` is in ms."""
        seconds = self._seconds * times
        common = (figure, self._folder.name, str(seconds))
        with contextlib.ExitStack() as running:
            gateway = self._start(running, self._python, ENDS, "gateway", *common)
            port = self._said(gateway, figure)
            if round_trip:
                line = self._start(
                    running, self._gopeer, "line", "-listen", f"{LOOPBACK}:0",
                    "-to", f"{LOOPBACK}:{port}", "-oneway", f"{round_trip / 2}ms",
                )  # fmt: skip
                port = self._said(line, figure).rpartition(":")[2]
            self._start(running, self._python, ENDS, "agent", *common, port)
            try:
                measured, _ = gateway.communicate(timeout=seconds + PATIENCE)
            except subprocess.TimeoutExpired:
                raise Failed(f"{figure}: measured nothing in {seconds + PATIENCE} s") from None
            if gateway.returncode != 0:
                raise Failed(f"{figure}: the gateway end has failed")
            return json.loads(measured)

    def _start(self, running, *command):
        child = subprocess.Popen(
            command, env=os.environ | {"PYTHONPATH": bootstrap.ROOT}, stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE, text=True, start_new_session=True,
        )  # fmt: skip
        running.enter_context(child)  # closes the pipe, and waits
        running.callback(child.terminate)
        return child

    def _said(self, child, figure):
        line = child.stdout.readline().strip()
        if not line:
            raise Failed(f"{figure}: an end, or the line, did not start")
        return line

    def go(self):
        """What yamux in Go does; empty without Go."""
        if self._gopeer is None:
            return {}
        command = [self._gopeer, "yardstick", "-seconds", str(min(GO_SECONDS, self._seconds))]
        return json.loads(subprocess.run(command, stdout=subprocess.PIPE, check=True).stdout)

    # The row; yields dicts

    def row(self):
        tls = self.ends("tls")["rate"]
        yield self.figures("one TLS socket, MB/s", tls)
        near = self.ends("download")["rate"]
        yield self.figures("one stream, MB/s", near, tls, "the TLS socket")
        upload = self.ends("upload")["rate"]
        yield self.figures("one stream to the agent, MB/s", upload, tls, "the TLS socket")
        for size, rate in self.ends("small").items():
            yield self.figures(f"{size} bytes a write, MB/s", rate, near, "one stream")
        for round_trip in ROUND_TRIPS if self._gopeer else ():
            near = self.ends("download")["rate"]  # anew: the machine may not be what it was
            far = self.ends("download", round_trip=round_trip, times=LONG)
            note = f"window {far['window'] / 1024:.0f} KiB"
            what = f"one stream, {round_trip} ms round trip, MB/s"
            yield self.figures(what, far["rate"], near, "one stream", note)
        yield from self._echoes()
        yield from self._sizes()

    def _echoes(self):
        go = self.go()
        here, ours, beside = self.ends("here"), self.ends("echo"), self.ends("beside")
        as_go = "both ends in one process, without TLS, as Go's"
        for what, value, name, note in (
            ("echo, us", here["echo"], "echo_us", as_go),
            ("open, echo, close, us", here["alone"], "open_echo_close_us", as_go),
            ("echo, us, two processes, TLS", ours["echo"], "echo_us", ""),
            ("open, echo, close, us, the same", ours["alone"], "open_echo_close_us", ""),
            ("echo beside 4 of bulk, us", beside["echo"], "echo_beside_bulk_us",
             "p99 {:.1f} ms, bulk {:.0f} MB/s".format(beside["late"] / 1000, beside["rate"])),
        ):  # fmt: skip
            yield self.figures(what, value, go.get(name), "Go", note)

    def _sizes(self):
        idle = self.ends("idle")
        note = "{threads:.1f} threads, {descriptors:.1f} descriptors, {sessions} held".format(
            **idle
        )
        yield self.figures("an idle session, kB", idle["kb"], note=note)
        left = self.ends("leak")
        for end in ("gateway", "agent"):
            early, late = left["early"][end], left["late"][end]
            note = "threads {} then {}, descriptors {} then {}".format(
                *(size[name] for name in ("threads", "descriptors") for size in (early, late))
            )
            what = f"{end} after {left['streams']} streams, kB"
            yield self.figures(what, late["kb"], early["kb"], "a tenth of them", note)

    def figures(self, what, ours, beside=None, than="", note=""):
        ratio = None if beside is None else ours / beside
        return dict(what=what, ours=ours, beside=beside, ratio=ratio, than=than, note=note)


def cpu_by_process(watched):
    """Maps to name and CPU seconds so far the processes in ``watched`` (pid: name) and those that
    they have started. What ssh starts for scp is its helper at the tunnel, "forward"."""
    tick = os.sysconf("SC_CLK_TCK")
    table = {}  # pid: (parent, program, CPU seconds)
    for pid in filter(str.isdigit, os.listdir("/proc")):
        with contextlib.suppress(OSError), open(f"/proc/{pid}/stat") as file:  # it may just end
            head, _, tail = file.read().rpartition(")")
            fields = tail.split()
            seconds = (int(fields[11]) + int(fields[12])) / tick
            table[int(pid)] = int(fields[1]), head.partition("(")[2], seconds
    taken = {}
    for pid, (_, program, seconds) in table.items():
        root = pid
        while root in table and root not in watched:
            root = table[root][0]
        name = watched.get(root)
        if name == "scp" and root != pid:
            name = program if program in ("scp", "ssh") else "forward"
        if name is not None:
            taken[pid] = name, seconds
    return taken


def free_ports(count):
    """Ports that are free now; nginx cannot look for one itself."""
    with contextlib.ExitStack() as taken:
        sockets = [taken.enter_context(socket.create_server((LOOPBACK, 0))) for _ in range(count)]
        return [sock.getsockname()[1] for sock in sockets]


def need(program):
    """The path of a program; raises Failed if it is not there."""
    path = shutil.which(program, path=os.environ.get("PATH", "") + ":/usr/sbin:/sbin")
    if path is None:
        package = OPENSSH.get(program, program)
        raise Failed(f"{program} is not installed: on Debian, apt install {package}")
    return path


def main(arguments):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--row", action="append", choices=ROWS, help="only this one (repeatable)")
    parser.add_argument("--json", metavar="FILE", help="write the figures there as well")
    parser.add_argument(
        "--seconds", type=float, default=SECONDS,
        help="how long a figure of load, or of the row yamux, takes (default: %(default)s); the "
        "sessions and streams that the latter counts are fewer if that is shorter",
    )  # fmt: skip
    options = parser.parse_args(arguments)
    rows = options.row or ROWS
    kept = []
    try:
        if set(rows) != {"yamux"}:
            for program in ("nginx", "wrk", "curl", *(OPENSSH if "tcp" in rows else ())):
                need(program)
        python = bootstrap.prepare("server")
        if set(rows) != {"yamux"}:
            kept += show_tunnel(python, [row for row in rows if row != "yamux"], options.seconds)
        if "yamux" in rows:
            kept += show_yamux(python, options.seconds)
    except Failed as error:
        print(f"bench.py: {error}", file=sys.stderr)
        return 1
    if options.json:
        with open(options.json, "w", encoding="utf-8") as file:
            json.dump(kept, file, indent=1)
    return 0


def show_tunnel(python, rows, seconds):
    """Print the figures of these rows as they come, and return them."""
    kept = []
    with Bench(python, seconds) as bench:
        bench.set_up()
        say(f"\n{'':38} tunnel    direct   ratio   CPU gateway + agent")
        for name in rows:
            for figures in getattr(bench, f"row_{name}")():
                kept.append(figures)
                say("{what:36}{tunnel:9.1f} {direct:9.1f}   {ratio:.3f}   {gateway_cpu:.3f} + "
                    "{agent_cpu:.3f} s per {cpu_per}  {note}".format(**figures))  # fmt: skip
    return kept


def show_yamux(python, seconds):
    """The same for the row yamux."""
    kept = []
    with Yamux(python, seconds) as yamux:
        yamux.build_gopeer()
        say(f"\n{'':40} ours    beside   ratio")
        for figures in yamux.row():
            kept.append(figures)
            beside = f"{'-':>9}   {'-':5}"
            if figures["beside"] is not None:
                beside = "{beside:9.1f}   {ratio:.3f} of {than}".format(**figures)
            say("{what:36}{ours:9.1f} {:30} {note}".format(beside, **figures).rstrip())
    return kept


def say(text):
    print(text, flush=True)


if __name__ == "__main__":
    bootstrap.tool(main)
