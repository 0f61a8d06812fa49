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
os.write(2, b".")
sys.stdin.read()  # both begin at once
for _ in range(200):
    left = memoryview(line)
    with sole_writer(1):
        while left:
            left = left[os.write(1, left):]
"""


def test_long_lines_of_two_processes_stay_whole_in_a_pipe():
    reading, writing = os.pipe()
    writers = [
        subprocess.Popen(
            [sys.executable, "-c", WRITER, str(ROOT), letter],
            stdin=subprocess.PIPE, stdout=writing, stderr=subprocess.PIPE,
        )
        for letter in "ab"
    ]  # fmt: skip
    os.close(writing)
    for writer in writers:
        assert writer.stderr.read(1) == b"."
    for writer in writers:
        writer.stdin.close()
    with open(reading, "rb", buffering=0) as pipe:  # a slow reader: the pipe is full most times
        lines = b"".join(iter(lambda: pipe.read(4096), b"")).split(b"\n")
    for writer in writers:
        assert writer.wait(TIMEOUT) == 0
        writer.stderr.close()
    assert len(lines) == 401 and lines.pop() == b""
    assert {(len(line), len(set(line))) for line in lines} == {(20_000, 1)}
    assert {line[:1] for line in lines} == {b"a", b"b"}
