"""Runs a program of ours as if this was Windows or macOS, as far as Linux can pretend to be.

    python tests/other_systems.py windows gotunnel_agent -c agent.yaml

Modules and names that Python lacks there are taken away before the program is loaded: so a call
that only Linux has fails, as it would there. What the other system does in its own way (how it ends
connections, schedules threads or buffers) cannot be seen here.
"""

import builtins
import ctypes
import os
import pathlib
import runpy
import select
import selectors
import signal
import socket
import ssl
import stat
import subprocess
import sys
import tempfile
import time
import types
import urllib.request
from pathlib import Path

# Modules of the standard library that look at the system while they are loaded: as on Linux.
LOADED = (subprocess, tempfile, urllib.request)

ROOT = Path(__file__).parent.parent

NO_MODULE = {
    "windows": ["fcntl", "grp", "pty", "pwd", "resource", "syslog", "termios", "tty", "curses"],
    "macos": [],
}

LINUX_SOCKET = [
    "MSG_MORE", "SOCK_CLOEXEC", "SOCK_NONBLOCK", "SO_BINDTODEVICE", "SO_MARK", "SO_PEERCRED",
    "TCP_CORK", "TCP_DEFER_ACCEPT", "TCP_INFO", "TCP_KEEPIDLE", "TCP_QUICKACK", "TCP_USER_TIMEOUT",
]  # fmt: skip
LINUX_OS = [
    "O_PATH", "O_TMPFILE", "SCHED_BATCH", "eventfd", "getrandom", "getxattr", "listxattr",
    "memfd_create", "pidfd_open", "pipe2", "posix_fadvise", "sched_getaffinity", "sched_param",
    "sched_setaffinity", "sched_setscheduler", "splice",
]  # fmt: skip
LINUX_SELECT = ["epoll"]
NO_NAME = {
    "macos": [
        *((socket, name) for name in LINUX_SOCKET),
        *((os, name) for name in LINUX_OS),
        *((select, name) for name in LINUX_SELECT),
        (selectors, "EpollSelector"),
        (ssl, "OP_ENABLE_KTLS"),
    ],
    "windows": [
        *((socket, name) for name in LINUX_SOCKET),
        *((socket, name) for name in (
            "AF_UNIX", "AF_NETLINK", "AF_PACKET", "CMSG_LEN", "MSG_DONTWAIT", "MSG_NOSIGNAL",
            "SCM_RIGHTS", "SO_REUSEPORT", "TCP_NOTSENT_LOWAT", "recv_fds", "send_fds",
        )),
        *((os, name) for name in LINUX_OS),
        *((os, name) for name in (
            "O_CLOEXEC", "O_DIRECTORY", "O_NOCTTY", "O_NOFOLLOW", "O_NONBLOCK", "O_SYNC", "chown",
            "fchmod", "fchown", "fork", "forkpty", "geteuid", "getegid", "getgid", "getgrouplist",
            "getloadavg", "getpgid", "getpriority", "getuid", "initgroups", "killpg", "lchown",
            "mkfifo", "nice", "openpty", "posix_spawn", "pread", "pwrite", "readv", "sendfile",
            "setgid", "setpgid", "setsid", "setuid", "sysconf", "ttyname", "uname", "writev",
        )),
        *((signal, name) for name in (
            "SIGALRM", "SIGCHLD", "SIGCONT", "SIGHUP", "SIGIO", "SIGKILL", "SIGPIPE", "SIGQUIT",
            "SIGSTOP", "SIGTSTP", "SIGTTIN", "SIGTTOU", "SIGUSR1", "SIGUSR2", "SIGWINCH", "alarm",
            "getitimer", "pause", "pthread_kill", "pthread_sigmask", "setitimer", "siginterrupt",
            "sigpending", "sigwait", "sigtimedwait",
        )),
        *((select, name) for name in ("epoll", "poll")),
        *((selectors, name) for name in ("EpollSelector", "PollSelector")),
        *((time, name) for name in ("clock_gettime", "tzset")),
        (ssl, "OP_ENABLE_KTLS"),
    ],
}  # fmt: skip
NO_FOLDER = {"windows": ("/proc", "/run", "/dev", "/etc", "/sys"), "macos": ("/proc", "/run")}
PLATFORM = {"windows": "win32", "macos": "darwin"}
BREAK = signal.SIGUSR2  # plays Windows' SIGBREAK


def pretend(system):
    """Take away what ``system`` does not have."""
    for name in NO_MODULE[system]:
        sys.modules[name] = None  # an import of it raises ModuleNotFoundError
    for module, name in NO_NAME[system]:
        if hasattr(module, name):
            delattr(module, name)
    hide(NO_FOLDER[system])
    sys.platform = PLATFORM[system]
    if system == "macos":
        selectors.DefaultSelector = selectors.PollSelector  # as like a KqueueSelector as there is
        return
    signal.SIGBREAK = BREAK
    sys.modules["msvcrt"] = types.ModuleType("msvcrt")  # a key is never pressed
    sys.modules["msvcrt"].kbhit = lambda: False
    selectors.DefaultSelector = selectors.SelectSelector
    os.supports_dir_fd = set()
    pathlib.WindowsPath = pathlib.PosixPath  # paths are those of this machine, all the same
    if "pathlib._local" in sys.modules:  # Python 3.13
        sys.modules["pathlib._local"].WindowsPath = pathlib.PosixPath
    os.name = "nt"
    socket.socketpair = socketpair
    socket.socket._sendfile_use_sendfile = give_up_sendfile
    socket.socket.sendmsg = socket.socket.recvmsg = property(no_attribute)
    select.select = sockets_only(select.select)
    selectors.SelectSelector._select = staticmethod(select.select)
    ctypes.CDLL = no_library
    ssl.SSLContext._windows_cert_stores = ()


def hide(folders):
    """Have nothing below ``folders``."""

    def hidden(function):
        def call(path, *arguments, **keywords):
            if isinstance(path, (str, os.PathLike)):
                text = os.fspath(path)
                if text != os.devnull and Path(text).is_relative_to("/"):
                    if any(text == each or text.startswith(f"{each}/") for each in folders):
                        raise FileNotFoundError(2, "No such file or directory", text)
            return function(path, *arguments, **keywords)

        return call

    builtins.open = hidden(builtins.open)
    for name in ("open", "listdir", "stat", "lstat", "scandir"):
        setattr(os, name, hidden(getattr(os, name)))


def socketpair(family=socket.AF_INET, type=socket.SOCK_STREAM, proto=0):
    """Two sockets of TCP: Windows has no others."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        one = socket.create_connection(listening.getsockname())
        return one, listening.accept()[0]


def no_attribute(self):
    raise AttributeError("not on Windows")


def give_up_sendfile(self, *arguments):
    raise socket._GiveupOnSendfile("not on Windows")


def sockets_only(wait):
    def call(read, write, other, timeout=None):
        for each in (*read, *write, *other):
            number = each if isinstance(each, int) else each.fileno()
            if not stat.S_ISSOCK(os.fstat(number).st_mode):
                raise OSError(10038, "an operation was attempted on something that is no socket")
        return wait(read, write, other, timeout)

    return call


def no_library(name, *arguments, **keywords):
    raise TypeError(f"LoadLibrary() argument 1 must be str, not {type(name).__name__}")


if __name__ == "__main__":
    system, program = sys.argv[1:3]
    sys.argv[:3] = [str(ROOT / program)]
    sys.path.remove(str(ROOT / "tests"))
    pretend(system)
    runpy.run_path(sys.argv[0], run_name="__main__")
