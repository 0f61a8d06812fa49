"""The bench's rows: how each is measured on one subject, in one round.

A row takes a subject and its running processes, and returns what it measured: titles to values. It
returns nothing for a subject that has no such thing.
"""

import contextlib
import json
import os
import re
import shlex
import subprocess
import sys
import time
from collections import Counter

import bootstrap
from bench_programs import Program, cpu_by_process, find, need, say
from bench_subjects import HOSTNAME, LARGE, SSH_HOSTNAME, TCP_HOSTNAME
from bench_table import OURS, percentile
from demo import LOOPBACK, Failed

VISITORS = (1, 32, 128)
NEW_VISITORS = 16  # at once
# Connections, and requests at once on each.
HTTP2_LOADS = {"1 visitor with 32 at once": (1, 32), "32 visitors": (32, 1)}
CURL_TIMED_OUT = 28  # its status when --max-time is over, as it should be
DOWNLOADS = 4  # at once
ROUND_TRIPS = (50, 200)  # ms
WARM_UP = 1  # seconds of load for each subject before the first round
AHEAD = 0.5  # seconds of bulk before and after the small requests beside it
UPLOAD_SPEED = 200_000_000  # bytes for each second that an upload should take, LARGE at most

FULL = 5  # seconds a figure, for which the two counts are meant; fewer with less time
IDLE_VISITORS, IDLE_AGENTS, FEWEST = 500, 200, 20
FIRST_VISITORS = 100  # fill what may be filled, such as pools and caches, before others are counted
SETTLE = 1  # seconds until a process has given back what handshakes needed

# wrk takes the SNI from its URL. It must not ask a resolver, which may not know the name.
WRK_SCRIPT = f"""
function wrk.resolve(host, service) wrk.addrs = wrk.lookup("{LOOPBACK}", service) end
"""

SSHD = """
ListenAddress {address}
HostKey {folder}/host_key
PidFile none
AuthorizedKeysFile {folder}/user_key.pub
StrictModes no
UsePAM no
Subsystem sftp internal-sftp
"""
LOOK_AGAIN = 0.05  # seconds between two looks at what processes that end by themselves have taken


class Rows:
    """Measures. Every row is a method of its name, in the order of NAMES."""

    NAMES = ("http", "http2", "visitors", "download", "upload", "beside", "tcp", "far", "memory",
             "cpu", "scp")  # fmt: skip
    NEEDS = {
        "http": ["wrk"], "http2": ["h2load", "curl"], "visitors": ["wrk"], "upload": ["curl"],
        "tcp": ["wrk", "curl"], "cpu": ["wrk"], "scp": ["scp", "ssh-keygen", "sshd"],
    }  # fmt: skip

    def __init__(self, site, seconds):
        """``seconds``: how long each figure of load takes; wrk knows whole ones."""
        self._site = site
        self._seconds = seconds
        self._whole = max(1, round(seconds))
        path = os.path.join(site.folder, "www", "upload")
        with open(path, "wb") as file:
            file.truncate(min(LARGE, round(UPLOAD_SPEED * seconds)))
        self._upload = path
        self._wrk_script = site.write("wrk.lua", WRK_SCRIPT)

    def measure(self, name, subject, running):
        """What row ``name`` measures on this subject. Raises Failed."""
        measured = getattr(self, name)(subject, running)
        running.check()
        return measured

    def warm_up(self, running):
        """Load it for a moment, so that no first round finds empty pools and caches."""
        with self._visitor("download", running.port, HOSTNAME, WARM_UP) as visitor:
            result(visitor)
        if find("wrk"):
            self._wrk(running.port, HOSTNAME, 32, seconds=WARM_UP)

    # Rows

    def http(self, _subject, running):
        measured = {}
        for count in VISITORS:
            who = "1 visitor" if count == 1 else f"{count} visitors"
            before = running.cpu_seconds()
            rate, late = self._wrk(running.port, HOSTNAME, count)
            measured |= {f"requests/s, {who}": rate, f"p99, {who}, ms": late}
            units = rate * self._whole / 1e6
            measured |= cost(running, before, units, f"CPU a request, {who}", "µs")
        return measured

    def http2(self, _subject, running):
        measured = {}
        for what, (connections, streams) in HTTP2_LOADS.items():
            before = running.cpu_seconds()
            rate = self._h2load(running.port, connections, streams)
            if rate is None:
                return {}  # it does not speak HTTP/2
            measured[f"HTTP/2: requests/s, {what}"] = rate
            units = rate * self._whole / 1e6
            measured |= cost(running, before, units, f"HTTP/2: CPU a request, {what}", "µs")
        measured["HTTP/2: one download, MB/s"] = self._curl_download(running.port, "--http2")
        measured["HTTP/1.1: one download, MB/s"] = self._curl_download(running.port, "--http1.1")
        return measured

    def visitors(self, _subject, running):
        before = running.cpu_seconds()
        close = ("-H", "Connection: close")
        rate, late = self._wrk(running.port, HOSTNAME, NEW_VISITORS, *close)
        return {
            f"new TLS visitors/s, {NEW_VISITORS} at once": rate,
            "p99, new visitors, ms": late,
            **cost(running, before, rate * self._whole / 1e6, "CPU a new visitor", "µs"),
        }

    def download(self, _subject, running):
        measured = {}
        for count, what in ((1, "one download"), (DOWNLOADS, f"{DOWNLOADS} downloads")):
            memory, before = running.memory(), running.cpu_seconds()
            rate, moved = self._download(running.port, HOSTNAME, count)
            measured[f"{what}, MB/s"] = rate
            measured |= cost(running, before, moved / 1e9, f"CPU a GB, {what}", "s")
            if count == 1:
                grown = tuple((now - then) / 1e6 for now, then in zip(running.memory(), memory))
                measured |= {f"memory grown by {what}, MB": grown} if grown else {}
        return measured

    def upload(self, _subject, running):
        before = running.cpu_seconds()
        rate = self._curl_upload(running.port, HOSTNAME)
        gigabytes = os.path.getsize(self._upload) / 1e9
        return {
            "one upload, MB/s": rate,
            **cost(running, before, gigabytes, "CPU a GB, upload", "s"),
        }

    def beside(self, _subject, running):
        seconds = self._seconds
        with contextlib.ExitStack() as stack:
            bulk = [
                stack.enter_context(
                    self._visitor("download", running.port, HOSTNAME, seconds + 2 * AHEAD)
                )
                for _ in range(DOWNLOADS)
            ]
            time.sleep(AHEAD)
            took = result(
                stack.enter_context(self._visitor("small", running.port, HOSTNAME, seconds))
            )
            moved = [result(visitor) for visitor in bulk]
        what = f"small request beside {DOWNLOADS} downloads"
        return {
            f"{what}, p50, ms": percentile(took, 0.50),
            f"{what}, p99, ms": percentile(took, 0.99),
            "the downloads meanwhile, MB/s": speed(moved),
        }

    def tcp(self, _subject, running):
        if running.tcp_port is None:
            return {}
        before = running.cpu_seconds()
        rate, late = self._wrk(running.tcp_port, TCP_HOSTNAME, 32)
        measured = {"mode tcp: requests/s, 32 visitors": rate, "mode tcp: p99, ms": late}
        measured |= cost(running, before, rate * self._whole / 1e6, "mode tcp: CPU a request", "µs")
        before = running.cpu_seconds()
        rate, moved = self._download(running.tcp_port, TCP_HOSTNAME, 1)
        measured["mode tcp: one download, MB/s"] = rate
        measured |= cost(running, before, moved / 1e9, "mode tcp: CPU a GB, download", "s")
        measured["mode tcp: one upload, MB/s"] = self._curl_upload(running.tcp_port, TCP_HOSTNAME)
        return measured

    def far(self, subject, running):
        if not running.processes:
            return {}
        near, _ = self._download(running.port, HOSTNAME, 1)  # anew: the machine may have changed
        measured = {}
        for round_trip in ROUND_TRIPS:
            with subject.start(round_trip) as far:
                rate, _ = self._download(far.port, HOSTNAME, 1)
            measured[f"one download at {round_trip} ms, MB/s"] = rate
            measured[f"one download at {round_trip} ms, of the near one"] = rate / near
        return measured

    def memory(self, subject, running):
        if not running.processes:
            return {}
        scale = min(1, self._seconds / FULL)
        first, visitors, agents = (
            max(FEWEST, round(count * scale))
            for count in (FIRST_VISITORS, IDLE_VISITORS, IDLE_AGENTS)
        )
        measured = {}
        with subject.start() as fresh, contextlib.ExitStack() as stack:
            start = fresh.memory()
            stack.enter_context(self._idle_visitors(fresh, first))
            before = settled(fresh)
            stack.enter_context(self._idle_visitors(fresh, visitors))
            after = settled(fresh)
            measured["memory at start, MB"] = tuple(size / 1e6 for size in start)
            each = tuple((now - then) / visitors / 1e3 for now, then in zip(after, before))
            measured["memory of an idle visitor, kB"] = each
            if fresh.sni:
                stack.enter_context(self._idle_agents(fresh, agents))
                each = (settled(fresh)[0] - after[0]) / agents / 1e3
                measured["memory of an idle agent (gateway), kB"] = each
        return measured

    def cpu(self, _subject, running):
        if running.name != OURS:
            return {}
        everything = os.sched_getaffinity(0)
        alone = {"gateway": {min(everything)}, "agent": {max(everything)}}
        own = {role: set(program.cpus()) for role, program in running.processes.items()}
        measured = {}
        try:
            for name, cpus in (
                ("one CPU each", alone),
                ("all CPUs", dict.fromkeys(own, everything)),
            ):
                for role, program in running.processes.items():
                    program.keep_on(cpus[role])
                before = running.cpu_seconds()
                rate, _ = self._wrk(running.port, HOSTNAME, 32)
                measured[f"{name}: requests/s, 32 visitors"] = rate
                units = rate * self._whole / 1e6
                measured |= cost(running, before, units, f"{name}: CPU a request", "µs")
        finally:
            for role, program in running.processes.items():
                program.keep_on(own[role])
        return measured

    def scp(self, _subject, running):
        if running.tcp_port is None or not (running.name == OURS or not running.processes):
            return {}
        with self._sshd() as (server, options):
            if not running.processes:
                way = ("-o", f"HostName={LOOPBACK}", "-o", f"Port={self._site.ssh}")
            else:
                forward = shlex.join([
                    self._site.python, os.path.join(bootstrap.ROOT, "gotunnel_agent"), "forward",
                    SSH_HOSTNAME, "--via", f"{LOOPBACK}:{running.port}", "--ca-file",
                    self._site.ca_file,
                ])  # fmt: skip
                way = ("-o", f"ProxyCommand={forward}")
            rate, note = self._scp(server, running, *options, *way)
        say(f"    scp, {running.name}: {note}")
        return {"scp, MB/s": rate}

    # Load

    def _wrk(self, port, hostname, connections, *arguments, seconds=None):
        """Load for a while; return requests/s and the 99th percentile in ms."""
        command = [
            need("wrk"), "-t1", f"-c{connections}", f"-d{seconds or self._whole}", "--latency",
            "-s", self._wrk_script, *arguments, f"https://{hostname}:{port}/small",
        ]  # fmt: skip
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        if wrong := re.search(r"Socket errors.*|Non-2xx.*", text):
            say(f"    wrk at port {port}: {wrong[0]}")
        rate, late = read_wrk(text)
        if not rate:
            say(f"    wrk at port {port}: no answer in time, so this figure is 0; --seconds is too "
                "short for this machine")  # fmt: skip
        return rate, late

    def _h2load(self, port, connections, streams):
        """Load by HTTP/2 for a while; return requests/s, None if it is not spoken."""
        command = [
            need("h2load"), "-t1", f"-c{connections}", f"-m{streams}", f"-D{self._whole}",
            f"https://{HOSTNAME}:{port}/small",
        ]  # fmt: skip
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        if "Application protocol: h2\n" not in text:
            return None
        if wrong := re.search(r"\d+ failed", text):
            if wrong[0] != "0 failed":
                say(f"    h2load at port {port}: {wrong[0]}")
        return float(re.search(r"finished in .*, ([0-9.]+) req/s", text)[1])

    def _curl_download(self, port, version):
        """Load the large file for a while; return MB/s."""
        command = [
            need("curl"), "-sS", "-k", version, "-o", os.devnull, "--max-time", str(self._seconds),
            "--connect-to", f"::{LOOPBACK}:", "-w", "%{speed_download}",
            f"https://{HOSTNAME}:{port}/large",
        ]  # fmt: skip
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
        if done.returncode not in (0, CURL_TIMED_OUT):
            raise Failed(f"the download from port {port} failed: curl: {done.returncode}")
        return float(done.stdout) / 1e6

    def _visitor(self, kind, port, hostname, amount):
        """A process of bench_visitor.py."""
        script = os.path.join(bootstrap.ROOT, "tools", "bench_visitor.py")
        return load(sys.executable, script, kind, port, hostname, amount)

    def _download(self, port, hostname, count):
        """``count`` downloads at once; return MB/s of all, and bytes."""
        with contextlib.ExitStack() as stack:
            visitors = [
                stack.enter_context(self._visitor("download", port, hostname, self._seconds))
                for _ in range(count)
            ]
            moved = [result(visitor) for visitor in visitors]
        return speed(moved), sum(one["bytes"] for one in moved)

    def _curl_upload(self, port, hostname):
        """Send the file for uploads; return MB/s."""
        command = [
            need("curl"), "-sSf", "-k", "--http1.1", "-o", os.devnull, "-T", self._upload,
            "--connect-to", f"::{LOOPBACK}:", "-H", "Expect:",
            f"https://{hostname}:{port}/put/up",
        ]  # fmt: skip
        began = time.monotonic()
        if status := subprocess.run(command).returncode:
            raise Failed(f"the upload to port {port} failed: curl ended with status {status}")
        return os.path.getsize(self._upload) / (time.monotonic() - began) / 1e6

    @contextlib.contextmanager
    def _idle_visitors(self, running, count):
        with self._visitor("idle", running.port, HOSTNAME, count) as visitors:
            first_line(visitors)
            yield

    @contextlib.contextmanager
    def _idle_agents(self, running, count):
        script = os.path.join(bootstrap.ROOT, "tools", "bench_agents.py")
        words = (running.tunnel_port, running.sni, running.secret, count)
        with load(self._site.python, script, *words) as agents:
            first_line(agents)
            yield

    @contextlib.contextmanager
    def _sshd(self):
        """An sshd that serves this user; yields its Program, and what ssh must be told."""
        folder, keygen = self._site.folder, need("ssh-keygen")
        for name in ("host_key", "user_key"):
            key = os.path.join(folder, name)
            if not os.path.exists(key):
                subprocess.run([keygen, "-q", "-t", "ed25519", "-N", "", "-f", key], check=True)
        if os.geteuid() == 0:
            os.makedirs("/run/sshd", 0o755, exist_ok=True)  # as the system's own start script does
        config = self._site.write("sshd_config", SSHD, address=f"{LOOPBACK}:{self._site.ssh}")
        with Program("sshd", need("sshd"), "-D", "-e", "-f", config, folder=folder) as server:
            server.wait_for("listening")
            yield server, (
                "-F", "none", "-i", key, "-o", "IdentitiesOnly=yes", "-o", "BatchMode=yes",
                "-o", "StrictHostKeyChecking=no", "-o", "UserKnownHostsFile=/dev/null",
                "-o", "LogLevel=ERROR",
            )  # fmt: skip

    def _scp(self, server, running, *options):
        """Copy the file for uploads to the sshd; return MB/s, and a text: seconds, and the share of
        a core that each process took. One that had nearly all of it was the limit."""
        watched = {program.pid: role for role, program in running.processes.items()}
        watched[server.pid] = "sshd"
        earlier, latest = cpu_by_process(watched), {}
        place = f"{SSH_HOSTNAME}:{os.path.join(self._site.folder, 'copy')}"
        began = time.monotonic()
        copying = subprocess.Popen([need("scp"), "-q", *options, self._upload, place])
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
        return os.path.getsize(self._upload) / took / 1e6, f"{took:.1f} s, of a core: {text}"


@contextlib.contextmanager
def load(*command):
    """A process that is load: its standard input ends with the ``with``, and so does it."""
    child = subprocess.Popen(
        [str(word) for word in command], env=os.environ | {"PYTHONPATH": bootstrap.ROOT},
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, start_new_session=True,
    )  # fmt: skip
    with child:  # closes the pipes, and waits
        try:
            yield child
        except BaseException:
            child.kill()
            raise


def result(child):
    """What a process of load has measured. Raises Failed."""
    return json.loads(first_line(child))


def first_line(child):
    line = child.stdout.readline()
    if not line:
        raise Failed("a process of load ended without a result")
    return line


def settled(running):
    time.sleep(SETTLE)
    return running.memory()


def speed(moved):
    """MB/s of several downloads at once."""
    return sum(one["bytes"] / one["seconds"] for one in moved) / 1e6


def cost(running, before, units, what, unit):
    """CPU time of gateway and agent since ``before``, for one of the ``units`` done. Nothing if
    none was done, as on a machine that is too busy."""
    spent = [now - then for now, then in zip(running.cpu_seconds(), before)]
    if not (spent and units):
        return {}
    return {f"{what}, {unit}": tuple(seconds / units for seconds in spent)}


def read_wrk(text):
    """Requests/s and the 99th percentile in ms, from what wrk has printed."""
    value, unit = re.search(r"99%\s+([\d.]+)(us|ms|s|m)\b", text).groups()
    rate = float(re.search(r"Requests/sec:\s+([\d.]+)", text)[1])
    return rate, float(value) * {"us": 1e-3, "ms": 1, "s": 1e3, "m": 6e4}[unit]
