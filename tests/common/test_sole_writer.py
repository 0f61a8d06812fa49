"""Processes that write to one pipe: no line is torn."""

import os
import subprocess
import sys

from support import ROOT, TIMEOUT

WRITER = """
import os, sys
sys.path.insert(0, sys.argv[1])
from gotunnel_agent.common.sole_writer import sole_writer
line = (sys.argv[2] * 20_000 + "\\n").encode()
for _ in range(20):
    left = memoryview(line)
    with sole_writer(1):
        while left:
            left = left[os.write(1, left):]
"""


def test_long_lines_of_two_processes_stay_whole_in_a_pipe():
    reading, writing = os.pipe()
    writers = [
        subprocess.Popen([sys.executable, "-c", WRITER, str(ROOT), letter], stdout=writing)
        for letter in "ab"
    ]
    os.close(writing)
    with open(reading, "rb") as pipe:
        lines = pipe.read().split(b"\n")
    for writer in writers:
        assert writer.wait(TIMEOUT) == 0
    assert len(lines) == 41 and lines.pop() == b""
    assert {(len(line), len(set(line))) for line in lines} == {(20_000, 1)}
    assert {line[:1] for line in lines} == {b"a", b"b"}
