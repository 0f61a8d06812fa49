"""Floods a gateway on this machine, and shows whether others are served and what it leaves behind.

    python3 tools/flood.py                               all kinds, from one address and from six
    python3 tools/flood.py --kind silent --kind agents   some kinds
    python3 tools/flood.py --from one                    from one address only
    python3 tools/flood.py --seconds 30                  longer floods
    python3 tools/flood.py --json FILE                   keep all figures
    python3 tools/flood.py --markdown FILE               put the table into FILE

Starts a target, a gateway and an agent with their default limits, and an honest visitor with an
address of its own. Every 50 ms it makes a new TLS connection, and asks again on one that it keeps.
Threads, memory and descriptors of both programs are read before, during and after each flood.

    silent          connections that say nothing
    close           connections that are closed at once
    half-hello      connections that send half a ClientHello
    handshake       TLS handshakes without a request
    slow-request    requests whose heads come a line a second
    slow-body       requests whose bodies come a byte a second
    slow-reader     answers of 8 MiB that are read a KiB a second
    silent-target   requests to a target that accepts connections and says nothing
    agents          1000 agents that all come back at once, because the gateway hands over (SIGUSR2)

All is on the loopback interface, which takes 127.0.0.1, 127.0.0.2 and so on, and ::1, for different
peers. The floods' own program gives way to the others (nice), and makes 1000 connections a second
at most, 200 with handshakes: on one machine it would else take the CPU that it measures.

The exit status is 1 if the honest visitor failed or waited for a second, if threads and memory
were not back to within 20 % of before in --patience seconds, or if /metrics has not counted each
connection of the flood as refused, dropped or failed. Needs Linux.
"""

import argparse
import contextlib
import json
import os
import platform
import re
import secrets
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time

import bootstrap
from bench_programs import PAGE, TICK, Program, put, reserve_ports, say
from bench_table import percentile
from demo import KEPT_VARIABLES, LOOPBACK, Failed

GATEWAY_HOST, HOSTNAME, SILENT = "gateway.localhost", "app.localhost", "silent.localhost"
HONEST = "127.0.0.9"
ONE = ("127.0.0.1",)
SEVERAL = tuple(f"127.0.0.{number}" for number in range(1, 6))
AGENTS = 1000
# Connections at a time, by kind. More than one address may have of the 10,000 (silent: 1250), of
# the requests (WORKERS) and of the agent's streams.
COUNTS = {
    "silent": 3000, "close": 64, "half-hello": 3000, "handshake": 64, "slow-request": 1500,
    "slow-body": 600, "slow-reader": 600, "silent-target": 600,
}  # fmt: skip
KINDS = (*COUNTS, "agents")
SECONDS = 15.0
PATIENCE = 300.0
BEFORE = 3.0  # seconds in which the figures before a flood are taken
LOOK_EVERY = 0.25  # seconds
WORST = 1.0  # seconds that the honest visitor may wait
WITHIN = 1.2  # times the figures of before
FEW = 2  # threads more than before do not count
COUNTED = 10  # seconds until all connections of a flood are counted
LAST = 60  # seconds that a helper may take to end
AGENTS_TIMEOUT = 240  # seconds until all agents are registered
BEGIN, END = "<!-- flood: begin -->", "<!-- flood: end -->"

AGENT_CONFIG = """\
tunnel_addr: "127.0.0.1:{tunnel}"
ca_file: "{ca_file}"
jwt_secret: "{secret}"
tunnels:
  - hostname: "app.localhost"
    target: "127.0.0.1:{site}"
  - hostname: "silent.localhost"
    target: "127.0.0.1:{silent}"
"""


def main(arguments):
    options = read(arguments)
    rows = []
    try:
        if options.markdown:
            put(options.markdown, None, BEGIN, END)
        python = bootstrap.prepare("server")
        with contextlib.ExitStack() as stack:
            folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="gotunnel-flood-"))
            house = House(stack, python, folder)
            notes = list(describe(options))
            for note in notes:
                say(note)
            for kind in options.kind or KINDS:
                for addresses in sources(kind, options.sources):
                    row = measure(house, kind, addresses, options)
                    rows.append(row)
                    say("\n" + "\n".join(told(row)))
    except (Failed, OSError, ValueError, subprocess.CalledProcessError) as error:
        print(f"flood.py: {error}", file=sys.stderr)
        return 1
    finally:
        if options.json and rows:
            with open(options.json, "w", encoding="utf-8") as file:
                json.dump(rows, file, indent=1)
    if options.markdown:
        put(options.markdown, markdown(rows, notes), BEGIN, END)
    wrong = [f"{row['kind']} from {row['from']}: {fault}" for row in rows for fault in row["wrong"]]
    for line in wrong:
        say(line)
    say(f"verdict: {'FAILED' if wrong else 'passed'} ({len(rows)} floods)")
    return 1 if wrong else 0


def read(arguments):
    """The options; ends the program with status 2 if they are wrong."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kind", action="append", choices=KINDS, help="only this one (repeatable)")
    parser.add_argument(
        "--from", dest="sources", choices=("one", "several", "both"), default="both",
        help="from one address, from six, or first the one and then the other (default: both)",
    )  # fmt: skip
    parser.add_argument(
        "--seconds", type=float, default=SECONDS, help="how long each lasts (default: %(default)s)"
    )
    parser.add_argument(
        "--patience", type=float, default=PATIENCE,
        help="seconds until all must be as before (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--scale", type=float, default=1.0,
        help="so many times the usual connections and agents (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument("--json", metavar="FILE", help="write all figures there")
    parser.add_argument(
        "--markdown", metavar="FILE",
        help="put the table into this file, between two comments as in docs/operations.md; - "
        "prints it",
    )  # fmt: skip
    return parser.parse_args(arguments)


def sources(kind, wanted):
    if kind == "agents":
        return [ONE]
    several = (*SEVERAL, "::1") if has_ipv6() else SEVERAL
    return {"one": [ONE], "several": [several], "both": [ONE, several]}[wanted]


def has_ipv6():
    try:
        with socket.create_server(("::1", 0), family=socket.AF_INET6):
            return True
    except OSError:
        return False


def describe(options):
    load = os.getloadavg()[0]
    yield (
        f"{os.cpu_count()} CPUs, Python {platform.python_version()}; load average before the run "
        f"{load:.1f}; {options.seconds:g} s for each flood"
    )


class Helper:
    """A script of this folder that runs until its standard input ends. Its lines are kept."""

    def __init__(self, python, script, *arguments):
        environ = {key: os.environ[key] for key in KEPT_VARIABLES if key in os.environ}
        self.name = script
        self.lines = []
        self._grown = threading.Condition()  # guards lines
        self._process = subprocess.Popen(
            [python, os.path.join(bootstrap.ROOT, "tools", script), *map(str, arguments)],
            env={**environ, "PYTHONPATH": bootstrap.ROOT}, stdin=subprocess.PIPE,
            stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self):
        for line in self._process.stdout:
            with self._grown:
                self.lines.append(line.rstrip())
                self._grown.notify_all()

    def says(self, is_it, timeout=0.0):
        """Whether it has said such a line, or does so in time."""
        with self._grown:
            return self._grown.wait_for(lambda: any(map(is_it, self.lines)), timeout)

    def wait_for(self, is_it, timeout):
        """Wait until it has said such a line. Raises Failed."""
        if not self.says(is_it, timeout):
            raise Failed(f"{self.name} said {self.lines[-3:]}, and no more for {timeout} s")

    def take(self):
        """The lines that have come since the last call."""
        with self._grown:
            lines, self.lines = self.lines, []
        return lines

    def __enter__(self):
        return self

    def __exit__(self, *exc_info):
        self._process.stdin.close()
        try:
            self._process.wait(LAST)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._reader.join()
        self._process.stdout.close()


class Watched:
    """What a process takes: threads, resident memory, descriptors."""

    def __init__(self, role, pid):
        self.role, self.pid = role, pid

    def figures(self):
        try:
            with open(f"/proc/{self.pid}/stat") as file:
                fields = file.read().rpartition(")")[2].split()
            descriptors = len(os.listdir(f"/proc/{self.pid}/fd"))
        except OSError:
            raise Failed(f"the {self.role} ended by itself") from None
        cpu = (int(fields[11]) + int(fields[12])) / TICK
        return {"threads": int(fields[17]), "memory": int(fields[21]) * PAGE,
                "descriptors": descriptors, "cpu": cpu}  # fmt: skip


class House:
    """The target, the gateway, its agent, and the honest visitor."""

    def __init__(self, stack, python, folder):
        self.python = python
        site = stack.enter_context(Helper(python, "flood_site.py"))
        site.wait_for(bool, 30)
        self.port, self.tunnel_port, self.metrics_port = reserve_ports(stack, 3)
        self.secret = secrets.token_hex(32)
        cache = os.path.join(folder, "cache")
        bound = f"{LOOPBACK},::1" if has_ipv6() else LOOPBACK
        self.gateway = stack.enter_context(Program(
            "gateway", python, os.path.join(bootstrap.ROOT, "gotunnel_server"), folder=folder,
            GATEWAY_HOST=GATEWAY_HOST, GATEWAY_PORT=str(self.port), TUNNEL_HOST=LOOPBACK,
            TUNNEL_PORT=str(self.tunnel_port), DASHBOARD_PORT="0", BIND=bound, ACME_ENV="local",
            ACME_CACHE=cache, JWT_SECRET=self.secret, METRICS_PORT=str(self.metrics_port),
        ))  # fmt: skip
        stack.callback(self._end_successor)
        self.gateway.wait_for("is ready")
        first, second = site.take()[0].split()
        path = os.path.join(folder, "agent.yaml")
        with open(os.open(path, os.O_WRONLY | os.O_CREAT, 0o600), "w", encoding="utf-8") as file:
            file.write(AGENT_CONFIG.format(
                tunnel=self.tunnel_port, ca_file=os.path.join(cache, "local", "ca.crt"),
                secret=self.secret, site=first, silent=second,
            ))  # fmt: skip
        agent = stack.enter_context(Program(
            "agent", python, os.path.join(bootstrap.ROOT, "gotunnel_agent"), "-c", path,
            folder=folder,
        ))  # fmt: skip
        agent.wait_for("serving")
        self.watched = [Watched("gateway", self.gateway.pid), Watched("agent", agent.pid)]
        self.visitor = stack.enter_context(
            Helper(python, "flood_visitor.py", self.port, HOSTNAME, HONEST)
        )

    def hand_over(self):
        """Have the gateway hand over to a successor, which is watched from now on."""
        os.kill(self.watched[0].pid, signal.SIGUSR2)
        found = self.gateway.wait_for(r"the successor, process (\d+), serves")
        self.watched[0] = Watched("gateway", int(found[1]))

    def _end_successor(self):
        if self.watched[0].pid != self.gateway.pid:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.watched[0].pid, signal.SIGTERM)

    def figures(self):
        return {each.role: each.figures() for each in self.watched}

    def counted(self):
        """The gateway's counters of refusals: name and labels to value."""
        with contextlib.closing(socket.create_connection((LOOPBACK, self.metrics_port))) as sock:
            sock.sendall(b"GET /metrics HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
            text = b"".join(iter(lambda: sock.recv(1 << 16), b"")).decode()
        return {
            name: float(value) for name, value in re.findall(
                r"^gotunnel_gateway_((?:refused|dropped|visit_errors)\w*\S*) (\S+)$", text, re.M
            )
        }  # fmt: skip


def measure(house, kind, addresses, options):
    """One flood: the figures before, during and after it."""
    count = max(1, int((AGENTS if kind == "agents" else COUNTS[kind]) * options.scale))
    say(f"\n{kind}, {count} at a time from {named(addresses)}")
    with contextlib.ExitStack() as stack:
        if kind == "agents":
            agents = stack.enter_context(Helper(
                house.python, "flood_agents.py", house.tunnel_port, GATEWAY_HOST, house.secret,
                count,
            ))  # fmt: skip
            agents.wait_for(f"{count} {count}".__eq__, AGENTS_TIMEOUT)
            time.sleep(1)
        house.visitor.take()
        time.sleep(BEFORE)
        before, earlier = house.figures(), house.counted()
        visits_before = visits(house.visitor.take())
        if kind == "agents":
            began, most = time.monotonic(), before
            agents.take()
            house.hand_over()
            back = f"{count} {2 * count}".__eq__
            while not agents.says(back, LOOK_EVERY) and time.monotonic() < began + AGENTS_TIMEOUT:
                most = larger(most, house.figures())
            agents.wait_for(back, 0)
            load = {"connections": count, "seconds": round(time.monotonic() - began, 1)}
            earlier = {}
        else:
            hostname = SILENT if kind == "silent-target" else HOSTNAME
            flooding = stack.enter_context(Helper(
                house.python, "flood_load.py", kind, house.port, hostname, count, *addresses
            ))  # fmt: skip
            most = watch(house, options.seconds, before)
            flooding.__exit__()
            load = json.loads(flooding.take()[-1])
        visits_during = visits(house.visitor.take())
        after, seconds = await_return(house, before, options.patience)
        counted = await_counted(house, earlier, load["connections"] if kind != "agents" else 0)
        visits_after = visits(house.visitor.take())
    row = {
        "kind": kind, "from": named(addresses), "load": load, "before": before, "most": most,
        "after": after, "back": seconds,
        "counted": counted,
        "visits": {"before": visits_before, "during": visits_during, "after": visits_after},
    }  # fmt: skip
    row["wrong"] = list(faults(row))
    return row


def named(addresses):
    return "1 address" if len(addresses) == 1 else f"{len(addresses)} addresses"


def watch(house, seconds, most):
    """The largest figures in these seconds."""
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        time.sleep(LOOK_EVERY)
        most = larger(most, house.figures())
    return most


def larger(one, other):
    return {role: {name: max(value, other[role][name]) for name, value in figures.items()}
            for role, figures in one.items()}  # fmt: skip


def await_return(house, before, patience):
    """Wait until threads and memory are as before. Returns the figures, and after how many seconds;
    None if they are not."""
    began = time.monotonic()
    while True:
        now = house.figures()
        seconds = time.monotonic() - began
        if not too_much(before, now):
            return now, round(seconds, 1)
        if seconds >= patience:
            return now, None
        time.sleep(LOOK_EVERY)


def await_counted(house, earlier, connections):
    """How often each counter of refusals has counted since ``earlier``, as soon as it is so many
    in all, or after COUNTED."""
    until = time.monotonic() + COUNTED
    while True:
        found = {
            name: value - earlier.get(name, 0) for name, value in house.counted().items()
            if value > earlier.get(name, 0)
        }  # fmt: skip
        if sum(found.values()) >= connections or time.monotonic() >= until:
            return found
        time.sleep(LOOK_EVERY)


def too_much(before, now):
    """What is more than WITHIN times the figures of before."""
    return [
        f"{role}: {name} {shown(name, figures[name])}, before {shown(name, before[role][name])}"
        for role, figures in now.items()
        for name, few in (("threads", FEW), ("memory", 0))
        if figures[name] > before[role][name] * WITHIN + few
    ]


def visits(lines):
    """Latencies of the honest visitor's requests, in seconds, and how many failed."""
    found = {"new": [], "kept": []}
    failed = []
    for line in lines:
        how, _, took, result = line.split(" ", 3)
        found[how].append(float(took))
        if result != "ok":
            failed.append(f"{how}: {result}")
    return {
        **{how: {"requests": len(values), "p50": percentile(values, 0.5),
                 "p99": percentile(values, 0.99), "worst": max(values)}
           for how, values in found.items() if values},
        "failed": failed,
    }  # fmt: skip


def faults(row):
    """What is wrong with a row."""
    for when, found in row["visits"].items():
        if found["failed"]:
            yield f"{when}: {len(found['failed'])} honest requests failed: {found['failed'][0]}"
        for how in ("new", "kept"):
            if when != "before" and found.get(how, {}).get("worst", 0) >= WORST:
                yield f"{when}: an honest request ({how}) took {found[how]['worst']:.2f} s"
    if row["back"] is None:
        yield from too_much(row["before"], row["after"])
    counted = sum(row["counted"].values())
    if row["kind"] != "agents" and counted < row["load"].get("connections", 0):
        yield f"{row['load']['connections']:.0f} connections came, and {counted:.0f} are counted"


# What is shown


def shown(name, value):
    return f"{value / 1e6:.0f} MB" if name == "memory" else str(value)


def told(row):
    """A row as lines of text."""
    yield f"  load: {', '.join(f'{name} {value}' for name, value in sorted(row['load'].items()))}"
    for role in row["before"]:
        figures = (
            f"{name} {' / '.join(shown(name, row[when][role][name]) for when in WHENS)}"
            for name in ("threads", "memory", "descriptors")
        )
        cpu = row["most"][role]["cpu"] - row["before"][role]["cpu"]
        yield f"  {role}: {', '.join(figures)} (before / most / after), CPU {cpu:.1f} s"
    yield f"  back after {row['back']} s"
    for when, found in row["visits"].items():
        for how in ("new", "kept"):
            if how in found:
                yield f"  honest, {when}, {how}: {latency(found[how])} ms, {found[how]['requests']}"
        for problem in found["failed"][:3]:
            yield f"  honest, {when}: FAILED {problem}"
    for name, value in sorted(row["counted"].items()):
        yield f"  counted: {name} {value:.0f}"
    for fault in row["wrong"]:
        yield f"  WRONG: {fault}"


def connections(row):
    """How many connections a flood has made: by the gateway's counters, which the flood's own
    program, on a busy machine, lags behind."""
    made = row["load"].get("connections", 0)
    return made if row["kind"] == "agents" else int(max(made, sum(row["counted"].values())))


WHENS = ("before", "most", "after")


def latency(found):
    return " / ".join(f"{found[name] * 1000:.0f}" for name in ("p50", "p99", "worst"))


HEAD = (
    "flood", "from", "connections", "visitor, new connection: median / p99 / worst, ms",
    "visitor, kept connection", "failed", "threads of gateway + agent: before, most, after",
    "memory, MB: before, most, after", "back after",
)  # fmt: skip


def markdown(rows, notes):
    lines = [" | ".join(HEAD).join(("| ", " |")), "|---" * len(HEAD) + "|"]
    for row in rows:
        during = row["visits"]["during"]
        both = {
            name: ", ".join(
                " + ".join(f"{row[when][role][name] / scale:.0f}" for role in row["before"])
                for when in WHENS
            )
            for name, scale in (("threads", 1), ("memory", 1e6))
        }
        failed = sum(len(found["failed"]) for found in row["visits"].values())
        cells = (
            row["kind"], row["from"], connections(row), latency(during["new"]),
            latency(during["kept"]), failed, both["threads"], both["memory"],
            "not" if row["back"] is None else f"{row['back']:.0f} s",
        )  # fmt: skip
        lines.append(" | ".join(map(str, cells)).join(("| ", " |")))
    return "\n".join([*lines, "", *(f"- {note}" for note in notes)]) + "\n"


if __name__ == "__main__":
    bootstrap.tool(main)
