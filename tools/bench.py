"""Measures the tunnel beside nginx, in one run on this machine.

    python3 tools/bench.py                     all rows
    python3 tools/bench.py --row http --row download
    python3 tools/bench.py --json FILE         keep the figures

The target is nginx, on plain HTTP; `direct` is the same nginx asked over TLS without a tunnel. What
can be compared between machines, and between two runs on a busy one, is the ratio of the two, and
the CPU time that a request or a gigabyte costs gateway and agent. Needs nginx, wrk and curl.

    http        requests/s and 99th percentile, for 1, 32 and 128 visitors with kept connections
    visitors    new visitors/s, 16 at a time, one request each
    download    one download of 1 GiB, MB/s, and how much both processes grew meanwhile
    upload      one upload of 1 GiB
    cpu         32 visitors, with gateway and agent each on one CPU, and on all: which costs less
"""

import argparse
import contextlib
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time

import bootstrap
from demo import GATEWAY_HOST, LOOPBACK, Demo, Failed

HOSTNAME = "localhost"  # what every resolver knows, since wrk takes the SNI from its URL
TUNNEL_HOST = LOOPBACK
SECONDS = 5  # of load for each figure
WARM_UP = 1
SMALL, LARGE = 1024, 1 << 30  # bytes of the two files
ROWS = ("http", "visitors", "download", "upload", "cpu")

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
"""


class Bench(Demo):
    """Gateway, agent and nginx, and what they cost."""

    _nginx = None

    def __exit__(self, *exception):
        if self._nginx is not None:
            self._nginx.terminate()
            self._nginx.wait()
        super().__exit__(*exception)

    def set_up(self):
        """Start all; ``urls`` maps "direct" and "tunnel" to where each is asked."""
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
        plain, tls = free_ports(2)
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
            plain=plain,
        ))  # fmt: skip
        self.start("agent", "gotunnel_agent", "-c", config)
        self.expect("agent", "serving")
        self.urls = {
            "direct": f"https://{HOSTNAME}:{tls}",
            "tunnel": f"https://{HOSTNAME}:{port}",
        }

    # Measuring

    def wrk(self, way, connections, *arguments, seconds=SECONDS):
        """Load one way; return requests/s and the 99th percentile in ms."""
        command = [need("wrk"), "-t1", f"-c{connections}", f"-d{seconds}", "--latency", *arguments]
        url = self.urls[way] + "/small"
        text = subprocess.run([*command, url], capture_output=True, text=True, check=True).stdout
        if wrong := re.search(r"Socket errors.*|Non-2xx.*", text):
            say(f"    {way}: {wrong[0]}")
        value, unit = re.search(r"99%\s+([\d.]+)(us|ms|s)", text).groups()
        rate = float(re.search(r"Requests/sec:\s+([\d.]+)", text)[1])
        return rate, float(value) * {"us": 1e-3, "ms": 1, "s": 1e3}[unit]

    def curl(self, way, *arguments):
        """Move the large file; return MB/s."""
        trust = ["--cacert", self.ca_file] if way == "tunnel" else ["--insecure"]
        asked = [part.replace("{url}", self.urls[way]) for part in arguments]
        began = time.monotonic()
        subprocess.run([need("curl"), "-sSf", "-o", os.devnull, *trust, *asked], check=True)
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
                               rate * SECONDS / 1000, "1000 requests",
                               f"p99 {late:.1f} ms (direct {direct_late:.1f})")  # fmt: skip

    def row_visitors(self):
        close = ("-H", "Connection: close")
        direct, _ = self.wrk("direct", 16, *close)
        before = self.cpu_seconds()
        rate, late = self.wrk("tunnel", 16, *close)
        units, note = rate * SECONDS / 1000, f"p99 {late:.1f} ms"
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
        large = os.path.join(self._folder.name, "www", "large")
        command = ("-T", large, "-H", "Expect:", "{url}/put/up")
        self.curl("direct", *command)
        direct = self.curl("direct", *command)
        before = self.cpu_seconds()
        rate = self.curl("tunnel", *command)
        yield self.figures("upload, MB/s", rate, direct, before, LARGE / 1e9, "GB", "")

    def row_cpu(self):
        everything = os.sched_getaffinity(0)
        alone = ({min(everything)}, {max(everything)})
        direct, _ = self.wrk("direct", 32)
        for name, cpus in (("one CPU each", alone), ("all CPUs", (everything, everything))) * 2:
            self.spread(cpus)
            before = self.cpu_seconds()
            rate, late = self.wrk("tunnel", 32)
            units, note = rate * SECONDS / 1000, f"p99 {late:.1f} ms"
            what = f"requests/s, 32 visitors, {name}"
            yield self.figures(what, rate, direct, before, units, "1000 requests", note)
        self.spread(alone)

    def figures(self, what, tunnel, direct, before, units, unit, note):
        cpu = [(now - then) / units for now, then in zip(self.cpu_seconds(), before)]
        return dict(what=what, tunnel=tunnel, direct=direct, ratio=tunnel / direct,
                    gateway_cpu=cpu[0], agent_cpu=cpu[1], cpu_per=unit, note=note)  # fmt: skip


def free_ports(count):
    """Ports that are free now; nginx cannot look for one itself."""
    with contextlib.ExitStack() as taken:
        sockets = [taken.enter_context(socket.create_server((LOOPBACK, 0))) for _ in range(count)]
        return [sock.getsockname()[1] for sock in sockets]


def need(program):
    """The path of a program; raises Failed if it is not there."""
    path = shutil.which(program, path=os.environ.get("PATH", "") + ":/usr/sbin:/sbin")
    if path is None:
        raise Failed(f"{program} is not installed: on Debian, apt install {program}")
    return path


def main(arguments):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--row", action="append", choices=ROWS, help="only this one (repeatable)")
    parser.add_argument("--json", metavar="FILE", help="write the figures there as well")
    options = parser.parse_args(arguments)
    kept = []
    try:
        for program in ("nginx", "wrk", "curl"):
            need(program)
        with Bench(bootstrap.prepare("server")) as bench:
            bench.set_up()
            say(f"\n{'':38} tunnel    direct   ratio   CPU gateway + agent")
            for name in options.row or ROWS:
                for figures in getattr(bench, f"row_{name}")():
                    kept.append(figures)
                    say("{what:36}{tunnel:9.1f} {direct:9.1f}   {ratio:.3f}   {gateway_cpu:.3f} + "
                        "{agent_cpu:.3f} s per {cpu_per}  {note}".format(**figures))  # fmt: skip
    except Failed as error:
        print(f"bench.py: {error}", file=sys.stderr)
        return 1
    if options.json:
        with open(options.json, "w", encoding="utf-8") as file:
            json.dump(kept, file, indent=1)
    return 0


def say(text):
    print(text, flush=True)


if __name__ == "__main__":
    bootstrap.tool(main)
