"""The programs that the bench starts: their lines, their ends, and what CPU and memory they take.

What they take is read from /proc, so this is for Linux.
"""

import contextlib
import os
import re
import shutil
import socket
import subprocess
import threading
from collections import deque

import bootstrap
from bench_table import BEGIN, END, put_between
from demo import KEPT_VARIABLES, LOOPBACK, Failed

START_TIMEOUT = 30  # seconds: a small machine that is busy may need ten times the usual one
STOP_TIMEOUT = 15  # an agent gives its visits ten seconds before it ends
LAST_LINES = 10  # of a program that failed: a traceback's end

# Where a program's package has another name on Debian.
PACKAGES = {"scp": "openssh-client", "ssh-keygen": "openssh-client", "sshd": "openssh-server"}

TICK = os.sysconf("SC_CLK_TCK")
PAGE = os.sysconf("SC_PAGE_SIZE")

GOPEER = os.path.join(bootstrap.ROOT, "tests", "gopeer")


class Program:
    """A program that runs until the end of its ``with``. Its lines are kept, not shown."""

    def __init__(self, name, *command, folder, **settings):
        """``settings`` are environment variables; the children get few others."""
        self.name = name
        self._lines = deque(maxlen=LAST_LINES)
        self._grown = threading.Condition()  # guards _lines, _ended and _wanted
        self._ended = False
        environ = {key: os.environ[key] for key in KEPT_VARIABLES if key in os.environ}
        self._process = subprocess.Popen(
            [str(word) for word in command], cwd=folder, env=environ | settings, text=True,
            errors="replace", stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip
        self.pid = self._process.pid
        self._reader = threading.Thread(target=self._read, name=name, daemon=True)
        self._reader.start()

    def __enter__(self):
        return self

    def __exit__(self, *exc_info):
        self._process.terminate()
        try:
            self._process.wait(STOP_TIMEOUT)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._reader.join()
        self._process.stdout.close()

    def _read(self):
        for line in self._process.stdout:
            with self._grown:
                self._lines.append(line.rstrip())
                self._grown.notify_all()
        with self._grown:
            self._ended = True
            self._grown.notify_all()

    def wait_for(self, pattern):
        """The match of ``pattern`` in one of the latest lines, once it is there. Raises Failed."""

        def found():
            return next(filter(None, (re.search(pattern, line) for line in self._lines)), None)

        with self._grown:
            self._grown.wait_for(lambda: found() or self._ended, START_TIMEOUT)
            if match := found():
                return match
        raise self.failure(f"did not say {pattern!r}")

    @property
    def alive(self):
        return self._process.poll() is None

    def failure(self, what):
        """A Failed that says ``what`` of this program, and its last lines."""
        with self._grown:
            last = "".join(f"\n    {line}" for line in self._lines)
        return Failed(f"the {self.name} {what}; its last lines:{last or ' none'}")

    # What it takes

    def cpu_seconds(self):
        """User and system time so far, of the processes that it has started, too."""
        return sum(int(field) for stat in self._stats() for field in stat[11:13]) / TICK

    def memory(self):
        """Resident bytes, of the processes that it has started, too."""
        return sum(int(stat[21]) for stat in self._stats()) * PAGE

    def _stats(self):
        if not self.alive:
            raise self.failure("ended by itself")
        for pid in (self.pid, *self._started()):
            with open(f"/proc/{pid}/stat") as file:
                yield file.read().rpartition(")")[2].split()

    def _started(self):
        """The process ids of a gateway with PROCESSES; none of most other programs."""
        with contextlib.suppress(FileNotFoundError):  # a kernel without this file
            with open(f"/proc/{self.pid}/task/{self.pid}/children") as file:
                return file.read().split()
        return []

    def cpus(self):
        """The CPUs that it may run on."""
        return sorted(os.sched_getaffinity(self.pid))

    def keep_on(self, cpus):
        """Let all its threads run on these CPUs."""
        for thread in os.listdir(f"/proc/{self.pid}/task"):
            os.sched_setaffinity(int(thread), cpus)


def cpu_by_process(watched):
    """Maps to name and CPU seconds so far the processes in ``watched`` (pid: name) and those that
    they have started. What ssh starts for scp is its helper at the tunnel, "forward"."""
    table = {}  # pid: (parent, program, CPU seconds)
    for pid in filter(str.isdigit, os.listdir("/proc")):
        with contextlib.suppress(OSError), open(f"/proc/{pid}/stat") as file:  # it may just end
            head, _, tail = file.read().rpartition(")")
            fields = tail.split()
            seconds = (int(fields[11]) + int(fields[12])) / TICK
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


def reserve_ports(stack, count):
    """Ports for programs that cannot look for one themselves. Until the end of ``stack`` nobody is
    given one by chance, but a program that sets SO_REUSEADDR may listen there: what keeps a port is
    a socket that is bound and does not listen."""
    ports = []
    for _ in range(count):
        keeper = stack.enter_context(socket.socket())
        keeper.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        keeper.bind((LOOPBACK, 0))
        ports.append(keeper.getsockname()[1])
    return ports


def find(program):
    """The path of a program, or None."""
    return shutil.which(program, path=os.environ.get("PATH", "") + ":/usr/sbin:/sbin")


def version(program):
    """What a program calls its version, such as "1.22.1"; a question mark if it does not say."""
    word = {"nginx": "-v", "go": "version"}.get(program, "--version")
    said = subprocess.run(
        [need(program), word], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT, text=True, errors="replace",
    ).stdout  # fmt: skip
    match = re.search(r"\d+\.\d+\.\d+", said)
    return match[0] if match else "?"


def need(program):
    """The path of a program. Raises Failed if it is not installed."""
    path = find(program)
    if path is None:
        package = PACKAGES.get(program, program)
        raise Failed(f"{program} is not installed: on Debian, apt install {package}")
    return path


def build_gopeer(folder):
    """Build the Go ends of tests/gopeer; return the program's path. Raises Failed."""
    program = os.path.join(folder, "gopeer")
    command = [need("go"), "build", "-buildvcs=false", "-o", program, "."]
    built = subprocess.run(command, cwd=GOPEER, stderr=subprocess.PIPE, text=True)
    if built.returncode != 0:
        raise Failed(f"Go could not build {GOPEER}:\n{built.stderr}")
    return program


def say(text):
    print(text, flush=True)


def put(path, table, first=BEGIN, last=END):
    """Put a table into a file, or print it if the path is "-". None only looks whether the file has
    a place for it, before half an hour is spent. Raises ValueError, OSError."""
    if path != "-":
        with open(path, encoding="utf-8") as file:
            page = put_between(file.read(), table or "", first, last)
        if table is not None:
            with open(path, "w", encoding="utf-8") as file:
                file.write(page)
    elif table is not None:
        say("\n" + table)
