"""The fault bench: gateway, agents, visitors and targets, and between them lines that break.

    visitors -- line --> gateway <-- a line each -- agents -- a line each --> targets

All faults come from one seed: what happens to which connection (fault_lines.py), which visits are
made (fault_visits.py), which process is killed, stopped or restarted when (TROUBLES). Threads are
not in our hands, so a repeated run is a similar one, not the same.

tests/faults/test_fault_bench.py runs it for a while, tools/soak.py for as long as you like.
"""

import argparse
import collections
import contextlib
import itertools
import os
import random
import re
import signal
import sys
import tempfile
import threading
import time
from pathlib import Path
from time import monotonic
from typing import NamedTuple

from fault_ledger import ENDS, FAILED, HANG_BOUND, HUNG, MOST_SHOWN, WHOLE, WRONG, Ledger
from fault_lines import KINDS, Deck, Line
from fault_targets import Target
from fault_visits import Site, Visitor
from support import ROOT, agent_process, gateway_process, tls_context, wait_until

# A small share of a machine: so many visitors, and seconds between two visits of each, on average.
AGENTS, HOSTNAMES, VISITORS = 3, 3, 8
PAUSE = 0.05
PAUSE_AFTER_FAILURE = 0.4  # seconds: a gateway that is not there refuses visits quickly
NICE = 10  # a soak runs beside other work
# Of each line: the share of connections that break, and the most bytes before they do. A session of
# an agent is one connection for thousands of visits; a visitor's is one for a few.
VISITOR_LINE = {"share": 0.3, "most": 500_000}
AGENT_LINE = {"share": 0.85, "most": 30_000_000}
TARGET_LINE = {"share": 0.3, "most": 300_000}

# Seconds, in place of minutes: what waits for a peer that is silent must come to its end soon.
GATEWAY = {
    "HEADER_TIMEOUT": "4", "IDLE_TIMEOUT": "6", "RESPONSE_TIMEOUT": "6", "STALL_TIMEOUT": "6",
    "DRAIN_TIMEOUT": "1", "AGENT_TIMEOUT": "5",
}  # fmt: skip
AGENT = {"stall_timeout": 6}

# Process faults of agents and of the gateway, each kind with the seconds between two of them.
KILL_AGENT, STOP_AGENT, STOP_LONG, RELOAD_AGENT = AGENT_TROUBLES = (
    "agent killed", "agent stopped", "agent stopped for long", "agent told to read its file again",
)  # fmt: skip
RESTART_GATEWAY, KILL_GATEWAY, HAND_OVER = GATEWAY_TROUBLES = (
    "gateway restarted", "gateway killed", "gateway handed over",
)  # fmt: skip
TROUBLES = AGENT_TROUBLES + GATEWAY_TROUBLES
BETWEEN_AGENTS, BETWEEN_GATEWAYS = (3.0, 6.0), (10.0, 18.0)
SHORT_STOP = (0.5, 4.0)
LONG_STOP = (12.0, 25.0)  # a session ends after 20 s of silence at the latest
# Seconds at the end, without faults, until each hostname must be served again: an agent waits 30 at
# most before it dials, and an old session may have to be found dead before.
RECOVERY_BOUND = 60
END_TIMEOUT = 10  # seconds for a gateway that drains (DRAIN_TIMEOUT)
HANDED_OVER = re.compile(r"the successor, process (\d+), serves|hand-over failed")
LEAST_WHOLE = 0.1  # of all visits; with fewer, faults would hide what the others do to each other
SHOWN_EVERY, PRINTED_EVERY = 1, 15  # seconds between two figures, on a terminal and elsewhere

BUG = re.compile(r"Traceback|\(bug|Exception in thread|Fatal Python")


class Report(NamedTuple):
    """What a run has shown. ``failures`` lists what the product must mend; empty is a pass."""

    text: str
    failures: list
    visits: collections.Counter  # (kind, end)
    visible: collections.Counter  # how visits failed visibly
    faults: dict  # as Bench.faults()
    wrongs: list
    hangs: list


class Bench:
    """One run. Use it in a ``with``."""

    def __init__(self, folder, cache, seed, *, kinds=KINDS, troubles=TROUBLES, command=None,
                 bound=HANG_BOUND, settings={}, shares={}, visits=None):  # fmt: skip
        """``folder`` is for configurations, ``cache`` the gateway's ACME_CACHE. ``kinds`` and
        ``troubles``: the faults. ``command``: another gateway program. ``bound``: HANG_BOUND.
        ``settings`` of the gateway. ``shares`` has other settings of lines, by "visitor", "agent",
        "target". ``visits``: kinds of them."""
        self.seed = seed
        self.ledger = Ledger()
        self._folder, self._cache = folder, cache
        self._kinds, self._troubles, self._command, self._bound = kinds, troubles, command, bound
        self._settings = GATEWAY | settings
        self._shares, self._visits = shares, visits
        self._stack = contextlib.ExitStack()
        self._happened = collections.Counter()  # of TROUBLES
        self._bugs = []
        self._lines = {"visitor": [], "agent": [], "target": []}
        self._sites, self._tcp_sites = [], []
        self._agents = {}
        self._gateway_stack = contextlib.ExitStack()
        self._gateway = None
        self._began = monotonic()

    def __enter__(self):
        with contextlib.ExitStack() as stack:
            self._stack = stack
            stack.callback(self._end_gateway)
            self._visitor_line = self._line("visitors", "visitor", VISITOR_LINE)
            self._agent_lines = {}
            for number in range(AGENTS):
                self._set_up_agent(f"agent{number}")
            self._start_gateway()
            for agent in self._agents.values():
                stack.callback(agent.end)
                agent.start()
            self._context = tls_context(self._ca_file)
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *exc_info):
        self._stack.close()

    def _line(self, name, kind, settings):
        settings = settings | self._shares.get(kind, {})
        deck = Deck(self.seed, name, kinds=self._kinds, **settings)
        line = self._stack.enter_context(Line(name, deck))
        self._lines[kind].append(line)
        return line

    def _set_up_agent(self, name):
        http = [f"h{number}-{name}.localhost" for number in range(HOSTNAMES)]
        tcp = f"raw-{name}.localhost"
        sites = [self._site(name, hostname, "http") for hostname in http]
        raw = self._site(name, tcp, "tcp")
        self._sites += sites
        self._tcp_sites.append(raw)
        folder = self._folder / name
        folder.mkdir()
        line = self._line(name, "agent", AGENT_LINE)
        ports = {site.hostname: site.line.port for site in sites}, {tcp: raw.line.port}
        self._agents[name] = Process(lambda: self._agent(line, folder, *ports), self._note_lines)
        self._agent_lines[name] = line

    def _site(self, agent, hostname, mode) -> Site:
        target = Target(agent, hostname, mode, self.ledger)
        target.line = line = self._line(hostname, "target", TARGET_LINE)
        line.upstream = target.port
        self._stack.enter_context(target)
        return Site(hostname, line)

    def _agent(self, line, folder, http, tcp):
        where = _Where(line.port, self._ca_file)
        return agent_process(where, folder, http, tcp, ready=False, **AGENT)

    def _start_gateway(self):
        how = {} if self._command is None else {"command": self._command}
        gateway = self._gateway_stack.enter_context(
            gateway_process(self._cache, **how, **self._settings)
        )
        self._gateway, self._ca_file = gateway, gateway.ca_file
        self._gateway_pid = gateway.program.pid  # or its successor's
        self._visitor_line.upstream = gateway.public_port
        for line in self._agent_lines.values():
            line.upstream = gateway.tunnel_port

    def _end_gateway(self, how=signal.SIGTERM):
        self._visitor_line.upstream = None
        for line in self._agent_lines.values():
            line.upstream = None
        if self._gateway is not None:
            end_process(self._gateway_pid, how)
        self._gateway_stack.close()
        if self._gateway is not None:
            self._note_lines("gateway", self._gateway.program.lines)

    def _note_lines(self, name, lines):
        """Look for bugs in what a program has said, when it has ended."""
        for index, line in enumerate(lines):
            if BUG.search(line):
                self._bugs.append(
                    "\n    ".join([f"{name}:", *lines[max(0, index - 1) : index + 12]])
                )
                return

    # A run

    def run(self, seconds, show=None, *, until_failure=False) -> Report:
        """Make visits for so long. ``show(text)`` gets the figures once a second.
        ``until_failure``: end at the first wrong answer or hang. Ctrl-C ends it as well."""
        self._began = monotonic()
        if dead := self._dead_hostnames():
            return self._report(0, [], dead)
        self._set_active(True)
        deadline = monotonic() + seconds
        stop = threading.Event()
        threads = [
            threading.Thread(target=self._visit, args=(number, stop), name=f"visitor {number}")
            for number in range(VISITORS)
        ]
        threads += [
            threading.Thread(target=self._trouble, args=(name, *how, stop), name=name)
            for name, how in (
                ("trouble of agents", (AGENT_TROUBLES, BETWEEN_AGENTS)),
                ("trouble of gateways", (GATEWAY_TROUBLES, BETWEEN_GATEWAYS)),
            )
        ]
        for thread in threads:
            thread.daemon = True
            thread.start()
        try:
            while (left := deadline - monotonic()) > 0:
                if until_failure and (self.ledger.wrongs or self.ledger.hangs):
                    break
                stop.wait(min(left, SHOWN_EVERY))
                if show:
                    show(self.figures())
        except KeyboardInterrupt:  # the programs have had it too, and end
            until_failure = True
        finally:
            stop.set()
            self._set_active(False)
            for thread in threads:
                thread.join(self._bound + LONG_STOP[1] + 30)
        stuck = [thread.name for thread in threads if thread.is_alive()]
        dead = [] if until_failure else self._dead_hostnames()
        return self._report(monotonic() - self._began, stuck, dead, of_worth=not until_failure)

    def _set_active(self, active):
        for line in itertools.chain(*self._lines.values()):
            line.active = active

    def _visit(self, number, stop):
        chance = random.Random(f"{self.seed} visitor {number}")
        visitor = self._visitor(f"v{number}", chance)
        while not stop.is_set():
            pause = PAUSE if visitor.visit() else PAUSE_AFTER_FAILURE
            stop.wait(chance.uniform(0, 2 * pause))

    def _visitor(self, name, chance):
        return Visitor(
            name, chance, self.ledger, self._sites, self._tcp_sites, self._visitor_line,
            self._context, bound=self._bound, kinds=self._visits,
        )  # fmt: skip

    def _trouble(self, name, kinds, between, stop):
        """Thread: cause the troubles among ``kinds`` that are wanted."""
        chance = random.Random(f"{self.seed} {name}")
        wanted = [kind for kind in kinds if kind in self._troubles]
        left = []
        while wanted and not stop.wait(chance.uniform(*between)):
            if not left:
                left = chance.sample(wanted, len(wanted))
            kind, agent = left.pop(), chance.choice(list(self._agents))
            pause = chance.uniform(*(LONG_STOP if kind == STOP_LONG else SHORT_STOP))
            self._cause(kind, self._agents[agent], agent, pause, stop)

    def _cause(self, kind, agent, name, pause, stop):
        self._happened[kind] += 1
        if kind == KILL_AGENT:
            self.ledger.note_kill(name)
            agent.program.signal(signal.SIGKILL)
            stop.wait(pause)
            self.ledger.note_kill(name)  # a target may have read of it only now
            agent.end()
            agent.start()
        elif kind in (STOP_AGENT, STOP_LONG):
            agent.program.signal(signal.SIGSTOP)
            stop.wait(pause)
            agent.program.signal(signal.SIGCONT)
        elif kind == RELOAD_AGENT:
            agent.program.signal(signal.SIGHUP)
        elif kind == HAND_OVER:
            self._hand_over()
        else:
            self._end_gateway(signal.SIGKILL if kind == KILL_GATEWAY else signal.SIGTERM)
            self._start_gateway()

    def _hand_over(self):
        """Have the gateway start a successor, which keeps its ports."""
        program = self._gateway.program
        before = len(self._outcomes_of_handing_over())
        os.kill(self._gateway_pid, signal.SIGUSR2)
        [outcome] = wait_until(lambda: self._outcomes_of_handing_over()[before:])
        if outcome[1]:
            self._gateway_pid = int(outcome[1])
        else:
            self._bugs.append(f"gateway: {program.lines[-1]}")

    def _outcomes_of_handing_over(self) -> list:
        """Matches of HANDED_OVER in what the gateways have said since the first one started."""
        lines = list(self._gateway.program.lines)
        return [match for line in lines if (match := HANDED_OVER.search(line))]

    # The end

    def _dead_hostnames(self) -> list:
        """The hostnames that are still not served after RECOVERY_BOUND."""
        visitor = self._visitor("check", random.Random(0))
        visits, failures = self.ledger.snapshot()
        deadline = monotonic() + RECOVERY_BOUND
        dead = list(self._sites)
        while dead and monotonic() < deadline:
            dead = [site for site in dead if not visitor.check(site)]
            if dead:
                time.sleep(0.2)
        self.ledger.forget("check", failures)
        return [site.hostname for site in dead]

    def faults(self) -> dict:
        """What has happened so far: kinds by "visitor", "agent", "target", and "processes"."""
        faults = {
            name: sum((line.count_faults() for line in lines), collections.Counter())
            for name, lines in self._lines.items()
        }
        return faults | {"processes": self._happened.copy()}

    def figures(self) -> str:
        """One line of figures."""
        count = self.ledger.count
        faults = sum(sum(counter.values()) for counter in self.faults().values())
        return (
            f"{monotonic() - self._began:5.0f} s  {sum(map(count, ENDS))} visits: "
            f"{count(WHOLE)} whole, {count(FAILED)} failed visibly, {count(WRONG)} wrong, "
            f"{count(HUNG)} hung; {faults} faults; gateway {memory_of(self._gateway_pid)}"
        )

    def _report(self, seconds, stuck, dead, of_worth=False) -> Report:
        self._end_processes()
        ledger, faults = self.ledger, self.faults()
        visits, failures = ledger.snapshot()
        wrongs = [
            f"{text} (its visitor saw: {ledger.seen_by_visitor(text)})"
            if text.startswith("target") else text
            for text in ledger.wrongs
        ]  # fmt: skip
        hangs = [*ledger.hangs, *stuck]
        lines = [f"seed {self.seed}, {seconds:.0f} s, {sum(visits.values())} visits", ""]
        between = {
            "visitor and gateway": faults["visitor"],
            "agent and gateway": faults["agent"],
            "agent and target": faults["target"],
        }
        lines += table("faults between", KINDS, between)
        lines += ["", "processes: " + told(faults["processes"]), ""]
        by_kind = collections.defaultdict(collections.Counter)
        for (kind, end), count in visits.items():
            by_kind[kind][end] += count
        lines += table("visits", ENDS, dict(sorted(by_kind.items())))
        lines += ["", "visible failures:"]
        lines += [f"{count:8}  {text}" for text, count in failures.most_common()] or ["    none"]
        lines += [
            "",
            f"the longest visit took {ledger.longest:.1f} s, the bound is {self._bound} s",
        ]
        verdicts = {
            "wrong answers": wrongs, "hangs": hangs, "hostnames not served again": dead,
            "bugs in the programs' logs": self._bugs,
        }  # fmt: skip
        whole = sum(count for (_, end), count in visits.items() if end == WHOLE)
        if of_worth and whole < LEAST_WHOLE * sum(visits.values()):
            verdicts["too few whole visits"] = [f"{whole}, expected {LEAST_WHOLE:.0%} of all"]
        for name, texts in verdicts.items():
            lines.append(f"{name}: {len(texts)}")
            lines += [f"    {text}" for text in texts[:MOST_SHOWN]]
        failing = [name for name, texts in verdicts.items() if texts]
        lines += ["", f"verdict: failed: {', '.join(failing)}" if failing else "verdict: passed"]
        return Report("\n".join(lines), failing, visits, failures, faults, wrongs, hangs)

    def _end_processes(self):
        for agent in self._agents.values():
            agent.end()
        self._end_gateway()


class Process:
    """An agent that is started, ended, and started again."""

    def __init__(self, make, on_end):
        """``make()`` returns a context of a support.Program. ``on_end(name, lines)`` gets what it
        has said."""
        self._make, self._on_end = make, on_end
        self._stack = contextlib.ExitStack()
        self.program = None

    def start(self):
        self.program = self._stack.enter_context(self._make())

    def end(self):
        if self.program is not None:
            self.program.signal(signal.SIGCONT)
            self._stack.close()
            self._on_end("agent", self.program.lines)
            self.program = None


class _Where(NamedTuple):
    """Where an agent finds its gateway: behind a line."""

    tunnel_port: int
    ca_file: Path


def table(title, columns, rows) -> list:
    """Lines of a table of counts; rows of zeros are left out."""
    width = max([len(title), *map(len, rows)]) + 2
    lines = [title.ljust(width) + "".join(f"{column:>9}" for column in columns)]
    for name, counts in rows.items():
        if any(counts.values()):
            lines.append(name.ljust(width) + "".join(f"{counts[column]:9}" for column in columns))
    return lines


def told(counts) -> str:
    return ", ".join(f"{kind} {count}" for kind, count in counts.items()) or "none"


def end_process(pid, how):
    """Signal a process and wait for its end; SIGKILL if it takes more than END_TIMEOUT seconds. It
    may be another process's child, and a zombie that nobody waits for."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, how)
        deadline = monotonic() + END_TIMEOUT
        while not _is_zombie(pid):
            os.kill(pid, 0 if monotonic() < deadline else signal.SIGKILL)
            time.sleep(0.02)


def _is_zombie(pid) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except OSError:  # it has ended, or this is not Linux
        return False


def memory_of(pid) -> str:
    """Memory and threads of a process, where the system tells them (Linux)."""
    try:
        text = Path(f"/proc/{pid}/status").read_text()
        return "{} MiB, {} threads".format(
            int(re.search(r"VmRSS:\s+(\d+)", text)[1]) // 1024,
            re.search(r"Threads:\s+(\d+)", text)[1],
        )
    except (OSError, TypeError):
        return "of unknown size"


class Screen:
    """Shows figures: on a terminal in one line that is written again, elsewhere a line now and
    then."""

    def __init__(self, out):
        self._out = out
        self._terminal = out.isatty()
        self._width = 0
        self._due = 0.0

    def show(self, text):
        if self._terminal:
            self._out.write("\r" + text.ljust(self._width))
            self._width = len(text)
        elif monotonic() >= self._due:
            self._due = monotonic() + PRINTED_EVERY
            self._out.write(text + "\n")
        self._out.flush()

    def end(self):
        if self._terminal and self._width:
            self._out.write("\n")


def main(arguments):
    """The program of tools/soak.py; the exit status is 1 if the product failed."""
    parser = argparse.ArgumentParser(prog="tools/soak.py", description="Run the fault bench.")
    parser.add_argument("--minutes", type=float, default=10, help="how long (default: 10)")
    parser.add_argument("--seed", type=int, help="a run's, to repeat it (default: a new one)")
    parser.add_argument("--sabotage", metavar="NAME",
                        help="break the gateway on purpose (tests/faults/sabotage.py)")  # fmt: skip
    given = parser.parse_args(arguments)
    seed = random.SystemRandom().randrange(1 << 32) if given.seed is None else given.seed
    if hasattr(os, "nice"):
        os.nice(NICE)  # the programs that it starts as well
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    print(f"seed {seed}; {given.minutes:g} minutes; Ctrl-C ends it", flush=True)
    screen = Screen(sys.stdout)
    with tempfile.TemporaryDirectory(prefix="gotunnel-soak-") as folder:
        cache = Path(folder, "cache")
        cache.mkdir()
        with Bench(Path(folder), cache, seed, command=command_of(given.sabotage)) as bench:
            report = bench.run(60 * given.minutes, screen.show)
    screen.end()
    print(report.text)
    print(f"again: python3 tools/soak.py --minutes {given.minutes:g} --seed {seed}")
    return 1 if report.failures else 0


def command_of(sabotage):
    """The command of a gateway that is broken on purpose; None for one that is not."""
    if sabotage is None:
        return None
    return sys.executable, str(ROOT / "tests" / "faults" / "sabotage.py"), sabotage


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
