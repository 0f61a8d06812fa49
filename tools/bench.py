"""Measures the tunnel beside nginx and beside other tunnels, in one run on this machine.

    python3 tools/bench.py                          all rows, ours and nginx without a tunnel
    python3 tools/bench.py --row http --row beside  some rows
    python3 tools/bench.py --peer go --peer frp     beside others as well: go, frp, chisel, rathole
    python3 tools/bench.py --python /usr/bin/python3.13    run ours by another Python as well
    python3 tools/bench.py --with ACCESS_LOG=-      run ours with settings as well
    python3 tools/bench.py --inspect heads --inspect bodies    run ours with an inspector as well
    python3 tools/bench.py --rounds 3               medians, and from what to what the rounds went
    python3 tools/bench.py --json FILE              keep all values
    python3 tools/bench.py --markdown FILE          put the table into FILE, between two comments

The target is nginx, on plain HTTP; `direct` is the same nginx asked over TLS without a tunnel. What
can be compared between machines, and between two runs on a busy one, is a ratio within a run, and
the CPU time that a request or a gigabyte costs each process. So subjects take turns: in each round
of a row, each is measured once. docs/performance.md says how each row is measured.

    http        requests/s and 99th percentile, for 1, 32 and 128 visitors with kept connections
    visitors    new TLS visitors/s, 16 at a time, one request each
    download    one download and four at once, MB/s, and how much the processes grew meanwhile
    upload      one upload
    beside      the latency of small requests beside four downloads
    tcp         nginx through a tcp hostname: requests/s of 32 visitors, a download, an upload
    far         one download where the agent is 50 and 200 ms away, also beside the near one
    memory      gateway and agent at start, and each idle visitor and idle agent
    cpu         32 visitors, with gateway and agent each on one CPU, and on all: which costs less
    scp         scp through "gotunnel-agent forward", beside scp without a tunnel, with what share
                of a core each process took: one that had nearly all of it was the limit
    yamux       the multiplexer alone, over TLS: what a stream moves, also on long lines, how soon
                an echo comes back, what an idle session costs, what short streams leave behind;
                beside one TLS socket of Python's, and yamux in Go (which goes without TLS)

Needs Linux, nginx, wrk and curl, the row scp OpenSSH too; the row yamux needs none of them, but Go
for a part of it. A peer needs its programs on the PATH: go; frps and frpc; chisel; rathole.
"""

import argparse
import contextlib
import json
import os
import platform
import subprocess
import sys
import tempfile

import bench_multiplexer
import bootstrap
from bench_programs import need, put, say, version
from bench_rows import Rows
from bench_subjects import INSPECTED, PEERS, Direct, Ours, Site, environment_of, present
from bench_table import Table
from demo import Failed

SECONDS = 5  # of load for each figure
YAMUX = "yamux"  # not beside other tunnels, and not in rounds
ROWS = (*Rows.NAMES, YAMUX)


def main(arguments):
    options = read(arguments)
    rows = [row for row in options.row or ROWS if row != YAMUX]
    kept = {}
    try:
        if rows:
            for program in {"nginx", *(name for row in rows for name in Rows.NEEDS.get(row, ()))}:
                need(program)
        if options.markdown:
            put(options.markdown, None)
        python = bootstrap.prepare("http2")
        if rows:
            show(python, rows, options, kept)
        if not options.row or YAMUX in options.row:
            kept[YAMUX] = bench_multiplexer.show(python, options.seconds)
    except (Failed, OSError, ValueError, subprocess.CalledProcessError) as error:
        print(f"bench.py: {error}", file=sys.stderr)
        return 1
    finally:
        if options.json and kept:
            with open(options.json, "w", encoding="utf-8") as file:
                json.dump(kept, file, indent=1)
    return 0


def read(arguments):
    """The options; ends the program with status 2 if they are wrong."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--row", action="append", choices=ROWS, help="only this one (repeatable)")
    parser.add_argument(
        "--peer", action="append", choices=sorted(PEERS), default=[],
        help="measure this tunnel as well (repeatable)",
    )  # fmt: skip
    parser.add_argument(
        "--python", action="append", metavar="PATH", default=[],
        help="run gateway and agent by this interpreter as well, in an environment of its own "
        "(repeatable)",
    )  # fmt: skip
    parser.add_argument(
        "--with", dest="with_", action="append", metavar="SETTINGS", default=[], type=settings,
        help="run ours with these settings of the gateway as well, such as 'ACCESS_LOG=- "
        "METRICS_PORT=auto' (repeatable)",
    )  # fmt: skip
    parser.add_argument(
        "--inspect", action="append", choices=sorted(INSPECTED), default=[],
        help="run ours with an inspector at the agent as well, which keeps heads, or bodies too "
        "(repeatable)",
    )  # fmt: skip
    parser.add_argument(
        "--rounds", type=int, default=1, help="measure everything so often (default: %(default)s)"
    )
    parser.add_argument(
        "--seconds", type=float, default=SECONDS,
        help="how long a figure of load takes (default: %(default)s); with less, fewer idle "
        "visitors, agents, sessions and streams are counted, and an upload is shorter",
    )  # fmt: skip
    parser.add_argument("--json", metavar="FILE", help="write all values there")
    parser.add_argument(
        "--markdown", metavar="FILE",
        help="put the table into this file, between two comments as in docs/performance.md; - "
        "prints it (not of the row yamux)",
    )  # fmt: skip
    options = parser.parse_args(arguments)
    if options.rounds < 1:
        parser.error(f"--rounds is {options.rounds}, expected 1 or more")
    return options


def settings(text):
    """The settings in a text such as "NAME=VALUE NAME=VALUE", by name."""
    pairs = [word.partition("=") for word in text.split()]
    if not pairs or not all(name and equals for name, equals, _ in pairs):
        raise argparse.ArgumentTypeError(f"{text!r} came, expected NAME=VALUE, with blanks between")
    return {name: value for name, _, value in pairs}


def show(python, rows, options, kept):
    """Measure these rows and print their figures as they come. All goes into ``kept``, also what
    was measured before a row that failed."""
    peers, missing = present(options.peer)
    for line in missing:
        say(line)
    interpreters = [environment_of(path) for path in dict.fromkeys(options.python)]
    with contextlib.ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="gotunnel-bench-"))
        site = Site(stack, python, folder)
        stack.enter_context(site.serve())
        measuring = Rows(site, options.seconds)
        subjects = [subject(site) for subject in (Direct, Ours, *peers)]
        subjects += [Ours(site, name, python) for name, python, _ in interpreters]
        subjects += [Ours(site, f"with {' '.join(each)}", settings=each) for each in options.with_]
        subjects += [Ours(site, f"inspected: {each}", inspect=each) for each in options.inspect]
        contenders = [(subject, stack.enter_context(subject.start())) for subject in subjects]
        places = {running.name: placed(running) for _, running in contenders}
        about = [sentence for _, _, sentence in interpreters]
        notes = [*describe(options, (Direct, *peers)), *about, *told(places)]
        for note in notes:
            say(note)
        for _, running in contenders:
            measuring.warm_up(running)
        table = Table([subject.name for subject in subjects])
        try:
            for row in rows:
                measure(measuring, row, contenders, table, options.rounds)
        finally:
            kept.update(machine=notes, cpus=places, figures=table.as_json())
    if options.markdown:
        put(options.markdown, table.markdown(notes))


def measure(measuring, row, contenders, table, rounds):
    """All rounds of one row. Every second round goes the other way, so that a machine that slows
    down meanwhile does so for each subject."""
    known = set(table.figures)
    for number in range(rounds):
        for subject, running in contenders[:: -1 if number % 2 else 1]:
            table.add(running.name, measuring.measure(row, subject, running))
    say(f"\n{row}\n")
    for line in table.lines(
        figure for title, figure in table.figures.items() if title not in known
    ):
        say(line)


def describe(options, others):
    """Lines that say where, how long and beside which versions was measured."""
    load = os.getloadavg()[0]
    yield (
        f"{os.cpu_count()} CPUs, Python {platform.python_version()}; load average before the run "
        f"{load:.1f}"
    )
    yield ", ".join(f"{other.program} {version(other.program)}" for other in others)
    rounds = "1 round" if options.rounds == 1 else f"{options.rounds} rounds"
    yield f"{rounds}, {options.seconds:g} s of load for each figure"


def placed(running):
    """Maps each process of a subject to the CPUs that it may run on."""
    return {role: program.cpus() for role, program in running.processes.items()}


def told(places):
    """A line for each subject: which process may run on which CPU."""
    everything = sorted(os.sched_getaffinity(0))
    for name, roles in places.items():
        words = [
            f"{role} on any CPU"
            if cpus == everything
            else f"{role} on CPU {', '.join(map(str, cpus))}"
            for role, cpus in roles.items()
        ]
        if words:
            yield f"{name}: {', '.join(words)}"
    yield "nginx, wrk, the visitors and the long line: on any CPU"
    yield "a + b: gateway and agent; from what to what the rounds went, and ratios, are of the sum"


if __name__ == "__main__":
    bootstrap.tool(main)
