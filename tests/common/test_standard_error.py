"""Standard error that nobody reads: no thread waits for its reader."""

import fcntl
import os
import re
import subprocess
import sys

import pytest
from support import ROOT, TIMEOUT

# Says more than a pipe and the queue hold, then waits for its standard input to end.
PROGRAM = """
import logging, sys
from gotunnel_agent.common import process, standard_error
standard_error.MOST_WAITING = 1000
process.LOG_LINES = 10000
process.set_up_process("info")
log = logging.getLogger("gotunnel")
for number in range(2000):
    log.info("line %d %s", number, "x" * 90)
print("said", flush=True)
sys.stdin.readline()
log.info("later")
"""


def started(program, stderr):
    return subprocess.Popen(
        [sys.executable, "-c", program], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        stderr=stderr, text=True,
    )  # fmt: skip


def test_lines_that_find_no_room_are_dropped_and_counted_in_their_place():
    with started(PROGRAM, subprocess.PIPE) as program:
        assert program.stdout.readline() == "said\n"
        lines = iter(program.stderr.readline, "")
        expected, drops = 0, 0
        while expected < 2000:
            line = next(lines)
            if dropped := re.search(r" WARNING (\d+) lines for standard error were dropped: it was "
                                    "not read\n$", line):  # fmt: skip
                expected, drops = expected + int(dropped[1]), drops + 1
            else:
                assert line.endswith(f" line {expected} {90 * 'x'}\n")
                expected += 1
        assert drops > 0
        program.stdin.write("\n")
        program.stdin.flush()
        assert next(lines).endswith(" later\n") and next(lines, None) is None
        assert program.wait(TIMEOUT) == 0


@pytest.mark.parametrize("end", ["raise SystemExit(7)", "raise KeyError('bug')"])
def test_a_process_ends_although_its_last_lines_find_no_reader(end):
    read, write = os.pipe()
    with started(PROGRAM + end, write) as program:
        os.close(write)
        assert program.stdout.readline() == "said\n"
        program.stdin.write("\n")
        program.stdin.flush()
        assert program.wait(TIMEOUT) == (7 if "7" in end else 1)
    os.close(read)


def test_a_traceback_that_ends_a_process_comes_out_whole_behind_the_log():
    program = (
        "import logging, threading, warnings\n"
        "from gotunnel_agent.common.process import set_up_process\n"
        "set_up_process('info')\n"
        "logging.getLogger('gotunnel').info('first')\n"
        "warnings.warn('second')\n"
        "raise KeyError('the last')\n"
    )
    ended = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, timeout=TIMEOUT, capture_output=True, text=True
    )
    assert ended.returncode == 1
    assert re.search(r" first\n.*second\n(.*\n)?Traceback (.*\n)+KeyError: 'the last'\n$",
                     ended.stderr)  # fmt: skip


def test_a_full_disk_costs_the_lines_and_nothing_else():
    with open("/dev/full", "w") as full, started(PROGRAM, full) as program:
        assert program.stdout.readline() == "said\n"
        assert program.communicate("\n", TIMEOUT) == ("", None)
        assert program.returncode == 0


def test_a_pipe_that_another_process_made_non_blocking_loses_no_line():
    read, write = os.pipe()
    fcntl.fcntl(write, fcntl.F_SETFL, os.O_NONBLOCK)
    program = PROGRAM.replace("= 1000\n", "= 10**7\n")
    with started(program, write) as program, os.fdopen(read) as lines:
        os.close(write)
        assert program.stdout.readline() == "said\n"
        program.stdin.write("\n")
        program.stdin.flush()
        assert sum(1 for _ in lines) == 2001
        assert program.wait(TIMEOUT) == 0
