"""Gives the other tools a Python that has what they need, on a machine that has nothing but Python.

It is the one of a virtual environment in `.venv`, at the top of the repository, which all tools
share. GOTUNNEL_VENV names another folder there, for another Python. What goes into it is read from
setup.py; it is installed again only when setup.py changes.

This file must parse on Python 3.6 and needs the standard library alone, so that an old Python
prints a sentence and no traceback.
"""

import ast
import hashlib
import importlib.util
import os
import signal
import subprocess
import sys
from contextlib import contextmanager

try:
    import fcntl
except ImportError:  # Windows: two tools that start at the same moment may disturb each other
    fcntl = None

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
SETUP = os.path.join(ROOT, "setup.py")
FOLDER = os.path.join(ROOT, os.environ.get("GOTUNNEL_VENV") or ".venv")

OLDEST_PYTHON = (3, 10)

# The lists in setup.py that each tool needs.
NEEDS = {
    "agent": ("AGENT",),
    "server": ("AGENT", "SERVER"),
    "http2": ("AGENT", "SERVER", "HTTP2"),
    "redis": ("AGENT", "SERVER", "HTTP2", "REDIS"),
    "test": ("AGENT", "SERVER", "HTTP2", "REDIS", "QR", "INSPECT", "TEST"),
    "apps": ("AGENT", "SERVER", "HTTP2", "REDIS", "QR", "INSPECT", "TEST", "APPS"),
    "check": ("AGENT", "SERVER", "HTTP2", "REDIS", "CHECK"),
}

# As shells count: a program that a signal ended has 128 and the signal's number.
INTERRUPTED = 128 + signal.SIGINT

# Of what pip says, the reason is at the end; all before it is retries.
REASON_LINES = 3
IN_REACH = "is the package index in reach? HTTPS_PROXY names a proxy, PIP_INDEX_URL another index"


class CannotPrepare(Exception):
    """There is no such Python to be had; the text says why and what to do."""


def prepare(need):
    """Return the path of a Python with everything installed that ``need`` names in NEEDS.

    Raises CannotPrepare.
    """
    check_version(sys.version_info)
    with locked():
        return install(need)


def check_version(version):
    if tuple(version[:2]) < OLDEST_PYTHON:
        raise CannotPrepare(
            "this is Python {}.{}, expected {}.{} or newer: run it with a newer one, such as "
            "python3.12 {}".format(*version[:2], *OLDEST_PYTHON, " ".join(sys.argv))
        )


@contextmanager
def locked():
    """Keep other tools out. What is locked is setup.py, because it is always there."""
    with open(SETUP, "rb") as file:
        if fcntl is not None:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                say("waiting for another run to install")
                fcntl.flock(file, fcntl.LOCK_EX)
            except OSError:
                pass  # some network file systems cannot lock: then as on Windows
        yield


def install(need):
    """Make the environment if it is not there, and fill it. Caller holds the lock."""
    windows = os.name == "nt"
    python = os.path.join(FOLDER, *(("Scripts", "python.exe") if windows else ("bin", "python")))
    interpreter = "{} {}".format(sys.base_prefix, sys.version)
    if not is_stamped("python", interpreter):  # none yet, half of one, or another Python's
        make_environment()
        stamp("python", interpreter)
    with open(SETUP, encoding="utf-8") as file:
        source = file.read()
    version = hashlib.sha256(source.encode()).hexdigest()
    if not is_stamped(need, version):
        pip_install(python, requirements(source, need))
        stamp(need, version)
    return python


def requirements(source, need):
    """The requirements in the lists that ``need`` names, from the text of setup.py."""
    lists = {
        statement.targets[0].id: ast.literal_eval(statement.value)
        for statement in ast.parse(source).body
        if isinstance(statement, ast.Assign) and isinstance(statement.value, ast.List)
    }
    return [requirement for name in NEEDS[need] for requirement in lists[name]]


def make_environment():
    for module in ("venv", "ensurepip"):  # Debian's Python comes without them
        if importlib.util.find_spec(module) is None:
            raise CannotPrepare(
                "this Python has no module {}, expected one that can make virtual environments: "
                "on Debian and Ubuntu, apt install python3-venv".format(module)
            )
    say("making a virtual environment in " + os.path.relpath(FOLDER, ROOT))
    run([sys.executable, "-m", "venv", "--clear", FOLDER], "cannot make it", "look at the reason")


def pip_install(python, needed):
    say("installing " + ", ".join(needed))
    run(
        [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"] + needed,
        "pip could not install that",
        IN_REACH,
    )


def run(command, problem, advice):
    """Run ``command``; say nothing of it unless it fails. Raises CannotPrepare."""
    done = subprocess.run(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        universal_newlines=True,
        errors="replace",
    )
    if done.returncode != 0:
        reason = done.stdout.strip().splitlines()[-REASON_LINES:]
        raise CannotPrepare("\n    ".join([problem + ":"] + reason) + "\n" + advice)


def is_stamped(name, text):
    """Whether stamp() was called for this environment with this text."""
    try:
        with open(os.path.join(FOLDER, "stamp-" + name), encoding="utf-8") as file:
            return file.read() == text
    except OSError:
        return False


def stamp(name, text):
    with open(os.path.join(FOLDER, "stamp-" + name), "w", encoding="utf-8") as file:
        file.write(text)


def say(text):
    print(text, file=sys.stderr, flush=True)


def run_tests_program(name, arguments):
    """Run a program in tests/, such as "faults/fault_bench.py", with what tests need; return its
    exit status. It finds the modules of tests/ and of its own folder."""
    python = prepare("test")
    program = os.path.join(ROOT, "tests", name)
    paths = [ROOT, os.path.join(ROOT, "tests"), os.path.dirname(program)]
    running = subprocess.Popen(
        [python, program] + arguments, env=dict(os.environ, PYTHONPATH=os.pathsep.join(paths))
    )
    try:
        return running.wait()
    except SystemExit:  # a SIGTERM, which came to us alone
        running.terminate()
        raise
    finally:  # after Ctrl-C, which it has had too, it ends what it has started
        running.wait()


def tool(main):
    """Run the ``main`` of a tool and exit with its status; what must be said is one line."""
    name = os.path.basename(sys.argv[0])
    # SIGTERM ends the tool as Ctrl-C does, by an exception, so that its with statements clean up.
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    try:
        status = main(sys.argv[1:])
    except CannotPrepare as error:
        say("{}: {}".format(name, error))
        status = 1
    except KeyboardInterrupt:
        status = INTERRUPTED
    sys.exit(status)
