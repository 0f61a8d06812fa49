"""The chaos bench: three gateways on one Redis, six agents, visitors; and each of them fails.

    visitors --> gateways one, two, three --> agents --> targets
                      |  a line each
                    Redis

    pool-a, pool-b   share pool.localhost
    plain, waiting   want single.localhost; one has it, the other waits
    near             serves near.localhost, and can reach gateway one alone
    go               the Go agent, at gateway two: serves go.localhost

Each step of PLAN does one thing to one of them and waits until every hostname is served well at
every gateway that runs. All visits in that time belong to the step. tests/cluster/test_chaos.py and
tools/chaos.py run it.
"""

import argparse
import base64
import contextlib
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from time import monotonic
from typing import NamedTuple

from chaos_visits import FAILED, HUNG, PATIENT, USUAL, WHOLE, WRONG, Site, Visitors
from redis_server import Proxy, redis_process
from support import (
    ROOT,
    TUNNEL_HOST,
    agent_process,
    ca_of,
    gateway_process,
    go_agent,
    reserved_port,
    tls_context,
    wait_until,
)

from gotunnel_agent.common.status_socket import NoAnswer, ask

GATEWAYS = ("one", "two", "three")
POOL, SINGLE, NEAR, GO = "pool.localhost", "single.localhost", "near.localhost", "go.localhost"
VISITORS = 8
CALM = 0.5  # seconds between two steps
NOTED = 2.5  # seconds until gateways have noted what they serve, for their successors (served.py)
HEALTHY_BOUND = 45.0  # seconds until all is well again
GONE_BOUND = 40  # seconds for a program that drains
# Settings of gateways, as by default and where a busy machine must not decide: a visit waits then.
GATEWAY = {"DRAIN_TIMEOUT": "8", "AGENT_TIMEOUT": "5"}
PATIENT_GATEWAY = {"DRAIN_TIMEOUT": "30", "AGENT_TIMEOUT": "30"}
SLACK = 10.0  # seconds that a busy machine may take longer
# Seconds that a fault lasts. LONG is more than a lease, so that what the others decide then shows.
BRIEF, LONG = 1.0, 5.0
SLOW = 1.0  # seconds; a small visit that took longer counts as not well
HERE = Path(__file__).parent
BUG = re.compile(r"Traceback|\(bug|Exception in thread|Fatal Python")


class Step(NamedTuple):
    """``goal``: seconds to recovery, None if there is none. ``announced``: no visit may be lost.
    ``sites``: those that the goal is about; empty: all."""

    title: str
    what: str
    arguments: tuple = ()
    goal: float | None = None
    announced: bool = False
    sites: tuple = ()


class Row(NamedTuple):
    """What a step has shown. ``recovery``: seconds from the fault to the end of the last visit of
    ``sites`` that began after it and failed, or took longer than SLOW. ``failing``: ... that
    failed."""

    step: Step
    recovery: float
    failing: float
    counts: dict
    hows: dict
    healthy: float  # seconds until all was well everywhere


HOLDER = "holder"  # the agent that has SINGLE at the time
KILL, TERM, STOP = signal.SIGKILL, signal.SIGTERM, signal.SIGSTOP
PLAN = [
    Step("an agent of a pool is killed", "agent", ("pool-a", KILL), 0.0, sites=(POOL,)),
    Step("an agent of a pool is restarted", "agent", ("pool-b", TERM), 0.0, True),
    # Visits at a gateway that has just started wait until its agents are back, about a second.
    Step("a gateway is restarted", "gateway", ("three", TERM), announced=True),
    Step("a gateway hands over to a new process", "hand_over", ("one",), 0.0, True),
    # Agents that dial one gateway alone are away until it is back: near here, the Go agent below.
    Step("a gateway is killed", "gateway", ("one", KILL), 1.0, sites=(POOL, SINGLE, GO)),
    Step("an agent is stopped, another one waits", "agent", (HOLDER, STOP), 4.0, sites=(SINGLE,)),
    Step("Redis is killed, its data are lost", "redis", (KILL,), 0.0, True),
    Step("Redis is stopped", "redis", (STOP,), 0.0, True),
    Step("a gateway is cut off from Redis", "cut_off", ("two",)),
    Step("a gateway is stopped", "gateway", ("one", STOP)),
    Step("the gateway of a Go agent is killed", "gateway", ("two", KILL), 1.0,
         sites=(POOL, SINGLE, NEAR)),
]  # fmt: skip
SHORT = [PLAN[number] for number in (0, 2, 4)]  # test_two_gateways.py has Redis away


class Bench:
    """One run. Use it in a ``with``."""

    def __init__(self, folder, gopeer=None, seed=None, say=lambda text: None, patient=False):
        """``gopeer``: the program of the Go agent; without it there is none. ``patient``: nothing
        is judged by how fast this machine is."""
        self.patient = patient
        self.seed = random.SystemRandom().randrange(1 << 32) if seed is None else seed
        self.folder, self.gopeer, self.say = folder, gopeer, say
        self.rows = []
        self.bugs = []
        self.gateways, self.agents = {}, {}
        self._stack = contextlib.ExitStack()
        self._pids = {}  # of gateways; after a hand-over another one's than the Program's
        self._fault_at = 0.0  # monotonic, of the last step
        self._down = set()  # gateways that do not run, or stand still

    def __enter__(self):
        with contextlib.ExitStack() as stack:
            self._stack = stack
            self._set_up()
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *exc_info):
        for program, _ in self.agents.values():  # so that all end at the same time
            program.signal(signal.SIGCONT)
            program.signal(signal.SIGTERM)
        for pid in self._pids.values():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGCONT)
                os.kill(pid, signal.SIGTERM)
        self._stack.close()

    def _set_up(self):
        enter = self._stack.enter_context
        self.redis = enter(redis_process())
        self.lines = {name: enter(Proxy(self.redis.port)) for name in GATEWAYS}
        self.ports = {
            name: (enter(reserved_port()), enter(reserved_port())) for name in GATEWAYS
        }  # fmt: skip
        key = self.folder / "cluster.key"
        key.write_bytes(base64.urlsafe_b64encode(os.urandom(32)) + b"\n")
        key.chmod(0o600)
        self._key = key
        names = ["pool-a", "pool-b", "plain", "waiting", "near", "go"]
        self._targets = subprocess.Popen(
            [sys.executable, str(HERE / "chaos_targets.py"), *names],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        )  # fmt: skip
        self._stack.callback(self._end_targets)
        self._target_ports = {name: int(self._targets.stdout.readline()) for name in names}
        with ThreadPoolExecutor() as starting:
            list(starting.map(self._start_gateway, GATEWAYS))
        self.ca_file = ca_of(self.folder / "one")
        self.context = tls_context(self.ca_file)
        for name in ("pool-a", "pool-b", "plain", "near"):
            self._start_agent(name)
        self.sites = [
            Site(POOL, frozenset({"pool-a", "pool-b"})),
            Site(SINGLE, frozenset({"plain", "waiting"})),
            Site(NEAR, frozenset({"near"})),
        ]
        if self.gopeer is not None:
            self.sites.append(Site(GO, frozenset({"go"})))
            self._start_agent("go")
        self.wait_until_healthy()
        self._start_agent("waiting")  # after "plain" has the hostname

    def _end_targets(self):
        self._targets.stdin.close()
        self._targets.stdout.close()
        self._targets.wait(10)

    # Programs

    def _start_gateway(self, name):
        cache = self.folder / name
        cache.mkdir(exist_ok=True)
        public, tunnel = self.ports[name]
        stack = contextlib.ExitStack()
        gateway = stack.enter_context(gateway_process(
            cache, CLUSTER=self.lines[name].url, CLUSTER_KEY_FILE=str(self._key),
            CLUSTER_ADDRESS="127.0.0.1", GATEWAY_PORT=str(public), TUNNEL_PORT=str(tunnel),
            WORKERS="64",
            **(PATIENT_GATEWAY if self.patient else GATEWAY),
        ))  # fmt: skip
        self.gateways[name] = (gateway, stack)
        self._pids[name] = gateway.program.pid
        self._stack.callback(self._close_gateway, name, stack)
        self._down.discard(name)

    def _close_gateway(self, name, stack):
        gateway, current = self.gateways.get(name, (None, None))
        if current is stack:
            del self.gateways[name]
            pid = self._pids[name]
            for number in (signal.SIGCONT, signal.SIGTERM):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, number)
            gone = time.monotonic() + GONE_BOUND
            while _lives(pid) and time.monotonic() < gone:
                time.sleep(0.02)
            if _lives(pid):
                os.kill(pid, signal.SIGKILL)
            stack.close()
            self._look_for_bugs(f"gateway {name}", gateway.program.lines)

    def _start_agent(self, name):
        folder = self.folder / f"agent-{name}"
        folder.mkdir(exist_ok=True)
        stack = contextlib.ExitStack()
        if name == "go":
            gateway = self.gateways["two"][0]
            program = stack.enter_context(
                go_agent(self.gopeer, gateway, http={GO: self._target_ports["go"]}, ready=False)
            )
        else:
            hostname = {"pool-a": POOL, "pool-b": POOL, "near": NEAR}.get(name, SINGLE)
            tunnel = {"hostname": hostname, "target": f"127.0.0.1:{self._target_ports[name]}"}
            if hostname == POOL:
                tunnel["pool"] = True
            command, addresses = (sys.executable, str(ROOT / "gotunnel_agent")), GATEWAYS
            if name == "near":
                ports = ",".join(str(tunnel_port) for _, tunnel_port in self.ports.values())
                # env(1), as programs of tests begin with an empty environment
                command = ("env", f"PORTS={ports}", sys.executable, str(HERE / "one_gateway.py"),
                           str(self.ports["one"][1]))  # fmt: skip
                addresses = ("one",)
            program = stack.enter_context(agent_process(
                self.gateways[addresses[0]][0] if addresses[0] in self.gateways else _Nowhere(
                    self.ca_file),
                folder, ready=False, command=command, tunnels=[tunnel], jwt_issuer=hostname,
                tunnel_addr=[f"{TUNNEL_HOST}:{self.ports[each][1]}" for each in addresses],
            ))  # fmt: skip
        self.agents[name] = (program, stack)
        self._stack.callback(self._close_agent, name, stack)

    def _close_agent(self, name, stack):
        program, current = self.agents.get(name, (None, None))
        if current is stack:
            del self.agents[name]
            with contextlib.suppress(ProcessLookupError):
                program.signal(signal.SIGCONT)
            stack.close()
            if name != "go":
                self._look_for_bugs(f"agent {name}", program.lines)

    def _look_for_bugs(self, name, lines):
        for index, line in enumerate(lines):
            if BUG.search(line):
                self.bugs.append(
                    "\n    ".join([f"{name}:", *lines[max(0, index - 1) : index + 14]])
                )
                return

    # What happens

    def agent(self, name, how):
        if name == HOLDER:
            [site] = (site for site in self.sites if site.hostname == SINGLE)
            name = self._probe(site, "two").agent
            # With a gateway where it does not wait yet, it would take as long there once more.
            caches = [self.folder / each for each in self.gateways]
            wait_until(lambda: all(map(_has_waiting, caches)), HEALTHY_BOUND)
            self._fault_at = monotonic()
        program, stack = self.agents[name]
        program.signal(how)
        if how == STOP:
            yield
            program.signal(signal.SIGCONT)
        else:
            if how == TERM:
                program.wait(GONE_BOUND)
            yield
            self._close_agent(name, stack)
            self._start_agent(name)

    def gateway(self, name, how):
        gateway, stack = self.gateways[name]
        pid = self._pids[name]
        if how != TERM:
            self._down.add(name)
        os.kill(pid, how)
        if how == STOP:
            yield
            os.kill(pid, signal.SIGCONT)
            self._down.discard(name)
            return
        if how == TERM:
            self._down.add(name)
            wait_until(lambda: not _lives(pid), GONE_BOUND)
        yield
        self._close_gateway(name, stack)
        self._start_gateway(name)

    def hand_over(self, name):
        gateway, _ = self.gateways[name]
        before = self._pids[name]
        os.kill(before, signal.SIGUSR2)
        done = gateway.program.wait_for(r"the successor, process (\d+), serves|hand-over failed")
        if done[1] is None:
            self.bugs.append(f"gateway {name}: {gateway.program.lines[-1]}")
        else:
            self._pids[name] = int(done[1])
            wait_until(lambda: not _lives(before), GONE_BOUND)
        yield

    def redis_fault(self, how):
        if how == STOP:
            self.redis.pause()
            yield
            self.redis.resume()
        else:
            self.redis.kill()
            yield
            self.redis.start()

    def cut_off(self, name):
        self.lines[name].refuse()
        yield
        self.lines[name].admit()

    # A run

    def run(self, plan):
        """The rows of the table."""
        gateways = {name: public for name, (public, _) in self.ports.items()}
        patience = PATIENT if self.patient else USUAL
        visitors = Visitors(self.sites, gateways, self.context, VISITORS, self.seed, patience)
        visitors.start()
        try:
            time.sleep(NOTED)
            for step in plan:
                self.rows.append(self._do(step, visitors))
                self.say(line_of(self.rows[-1]))
        finally:
            self.stuck = visitors.stop()
        self.visits = list(visitors.visits)
        return self.rows

    def _do(self, step, visitors):
        first = len(visitors.visits)
        self._fault_at = monotonic()
        acting = getattr(self, {"redis": "redis_fault"}.get(step.what, step.what))(*step.arguments)
        next(acting)
        began = self._fault_at
        lasts_long = step.what in ("redis", "cut_off") or STOP in step.arguments
        time.sleep(LONG if lasts_long else BRIEF)
        next(acting, None)
        healthy = self.wait_until_healthy(began)
        time.sleep(CALM)
        # Visits that have begun meanwhile and are not over may still fail.
        deadline = monotonic()
        wait_until(
            lambda: all(since > deadline for since, *_ in [*visitors.under_way.values()]), 60
        )
        visits = [each for each in [*visitors.visits][first:] if each.ended >= began]
        sites = step.sites or tuple(site.hostname for site in self.sites)
        counts, hows, recovery, failing = {}, {}, 0.0, 0.0
        for visit in visits:
            counts[visit.end] = counts.get(visit.end, 0) + 1
            if visit.end != WHOLE:
                how = f"{visit.hostname} {visit.kind}: {visit.how} (gateway {visit.gateway}, " \
                      f"{visit.began - began:+.1f} s)"  # fmt: skip
                hows[how] = hows.get(how, 0) + 1
            is_slow = visit.kind != "slow" and visit.ended - visit.began > SLOW
            if visit.began >= began and visit.hostname in sites and (visit.end != WHOLE or is_slow):
                recovery = max(recovery, visit.ended - began)
                failing = max(failing, visit.ended - began if visit.end != WHOLE else 0.0)
        return Row(step, recovery, failing, counts, hows, healthy)

    def wait_until_healthy(self, began=None):
        """Wait until each hostname is served by each gateway that runs; seconds since ``began``."""
        began = monotonic() if began is None else began
        ports = {name: port for name, (port, _) in self.ports.items() if name not in self._down}
        missing = {(site, name): "not tried" for site in self.sites for name in ports}
        deadline = monotonic() + HEALTHY_BOUND
        while missing:
            for site, name in [*missing]:
                visit = self._probe(site, name)
                if visit.end == WHOLE:
                    del missing[site, name]
                else:
                    missing[site, name] = visit.how
            if missing:
                assert monotonic() < deadline, self._told(missing)
                time.sleep(0.05)
        return monotonic() - began

    def _probe(self, site, gateway):
        """A visit at one gateway."""
        visitors = Visitors([site], {gateway: self.ports[gateway][0]}, self.context, 0)
        return visitors.visit(0, random.Random(), "small", site, [gateway], {})

    def _told(self, missing):
        lines = [f"still not served after {HEALTHY_BOUND} s:"]
        lines += [f"    {site.hostname} at {name}: {how}" for (site, name), how in missing.items()]
        for kind, programs in (("gateway", self.gateways), ("agent", self.agents)):
            for name, (thing, _) in programs.items():
                said = getattr(thing, "program", thing).lines[-12:]
                lines += [f"{kind} {name}:", *(f"    {line}" for line in said)]
        return "\n".join(lines)

    def failures(self):
        """What the product must mend."""
        found = [f"bug: {bug}" for bug in self.bugs]
        found += [f"{name} is stuck" for name in self.stuck]
        for row in self.rows:
            step, counts = row.step, row.counts
            for end in (WRONG, HUNG):
                if counts.get(end):
                    found.append(f"{step.title}: {counts[end]} {end}: {_most(row.hows)}")
            if step.announced and counts.get(FAILED):
                found.append(f"{step.title}: {counts[FAILED]} visits were lost: {_most(row.hows)}")
            recovery = row.failing if self.patient else row.recovery
            slack = SLACK if self.patient else SLOW
            if step.goal is not None and recovery > (step.goal and step.goal + slack):
                found.append(
                    f"{step.title}: well after {recovery:.1f} s, the goal is {step.goal:g}: "
                    f"{_most(row.hows)}"
                )
        return found


def _has_waiting(cache):
    """Whether an agent waits for SINGLE at the gateway that has this ACME_CACHE. Its log does not
    say: the holder may have come there before or after."""
    try:
        sessions = ask([str(cache / "status.sock")], "gotunnel-server")["sessions"]
    except NoAnswer:
        return False
    return any(f"waits for {SINGLE}" in session["reason"] for session in sessions)


def _most(hows):
    return "; ".join(f"{count} x {how}" for how, count in sorted(
        hows.items(), key=lambda pair: -pair[1])[:6])  # fmt: skip


def line_of(row):
    goal = "–" if row.step.goal is None else f"{row.step.goal:g}"
    counts = row.counts
    return (
        f"{row.step.title:42}{goal:>6}{row.recovery:10.1f}{row.healthy:10.1f}"
        f"{counts.get(WHOLE, 0):8}{counts.get(FAILED, 0):8}{counts.get(WRONG, 0):7}"
        f"{counts.get(HUNG, 0):6}"
    )


HEAD = (
    f"{'':42}{'goal':>6}{'visits':>10}{'all':>10}\n"
    f"{'what happens':42}{'s':>6}{'well, s':>10}{'well, s':>10}{'whole':>8}{'failed':>8}"
    f"{'wrong':>7}{'hung':>6}"
)


def table(rows):
    return "\n".join([HEAD, *map(line_of, rows)])


class _Nowhere(NamedTuple):
    ca_file: Path
    tunnel_port: int = 1


def _lives(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def main(arguments):
    """The program of tools/chaos.py."""
    parser = argparse.ArgumentParser(prog="tools/chaos.py", description="Run the chaos bench.")
    parser.add_argument("--rounds", type=int, default=1, help="how often (default: 1)")
    parser.add_argument("--short", action="store_true", help="only what CI does")
    parser.add_argument("--seed", type=int)
    parser.add_argument("--go", metavar="PROGRAM", help="tests/gopeer, built: adds a Go agent")
    parser.add_argument("--step", action="append", help="only steps with this text in their title")
    given = parser.parse_args(arguments)
    plan = SHORT if given.short else PLAN
    if given.step:
        plan = [step for step in PLAN if any(text in step.title for text in given.step)]
    failures = []
    with tempfile.TemporaryDirectory(prefix="gotunnel-chaos-") as folder:
        with Bench(
            Path(folder), given.go, given.seed, lambda text: print(text, flush=True)
        ) as bench:
            print(f"seed {bench.seed}\n{HEAD}", flush=True)
            bench.run(plan * given.rounds)
        failures = bench.failures()
    print("\n".join(["", *failures]) if failures else "\nverdict: passed")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
