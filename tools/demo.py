"""Shows a tunnel at work on this machine: a web site, an agent, a gateway, and one visit.

    python3 tools/demo.py            stays up, to be tried, until Ctrl-C
    python3 tools/demo.py --once     ends after the visit; status 0 if the right page came back

The demo starts three processes in a temporary folder, which it removes at the end:

    visitor (this program)  -- https -->  gateway  -- tunnel -->  agent  -- http -->  web site

It needs Python, and the network to install a few packages into .venv. Several demos may run at
once: each takes free ports.
"""

import argparse
import http.client
import os
import queue
import re
import secrets
import signal
import socket
import ssl
import subprocess
import tempfile
import threading
import time
from collections import deque

import bootstrap

HOSTNAME = "app.localhost"
GATEWAY_HOST = "gateway.localhost"
LOOPBACK = "127.0.0.1"

# Seconds. One is usual; a small machine that is busy may need ten times as long.
START_TIMEOUT = 30
VISIT_TIMEOUT = 10
# An agent gives its visits ten seconds before it ends.
STOP_TIMEOUT = 15

# An event of a Demo: a signal asks it to end.
STOP = ("demo", None)

# Lines of its log that are shown when a process dies: enough for the end of a traceback.
LAST_LINES = 10

# The processes get only these variables, which Python may need to start: another, such as a stray
# JWT_SECRET, would change what they do.
KEPT_VARIABLES = ("PATH", "HOME", "LANG", "LD_LIBRARY_PATH", "SYSTEMROOT")

AGENT_CONFIG = """\
tunnel_addr: "{tunnel_addr}"
ca_file: "{ca_file}"
jwt_secret: "{jwt_secret}"
tunnels:
  - hostname: "{hostname}"
    target: "{target}"
"""

SHOWN_HEADERS = ("Content-Type", "Content-Length", "Server")

INVITATION = """\

The tunnel is up. Try it (curl finds *.localhost by itself, and so do most browsers):

    curl --cacert {ca_file} https://{hostname}:{port}/

The dashboard: {dashboard}
Ctrl-C ends it."""


class Failed(Exception):
    """The demo cannot go on; the text says why."""


class Stopped(Exception):
    """Ctrl-C, or a signal like it."""


class Demo:
    """The processes and their logs. Use it in a with statement, which ends and removes all of it.

    All events go into one queue, so there is one place to wait: each line of a process, its end,
    and a signal (SimpleQueue.put() may be called in a signal's handler).
    """

    def __init__(self, python):
        """``python``: the path of a Python that has the packages of a gateway."""
        self._python = python
        self._events = queue.SimpleQueue()  # (name, line), (name, None) at its end, or STOP
        self._children = {}  # name: process, in the order of start
        self._logs = {}
        self._readers = []

    def __enter__(self):
        self._folder = tempfile.TemporaryDirectory(prefix="gotunnel-demo-")
        return self

    def __exit__(self, *exception):
        for name, child in reversed(self._children.items()):
            child.terminate()
            try:
                child.wait(STOP_TIMEOUT)
            except subprocess.TimeoutExpired:
                say(f"the {name} did not end in {STOP_TIMEOUT} seconds, and is killed")
                child.kill()
                child.wait()
        for reader in self._readers:
            reader.join()
        while not self._events.empty():  # lines that came while no thread waited
            self._show(self._events.get())
        self._folder.cleanup()

    def stop(self, *signal_and_frame):
        """Make wait() raise Stopped. Any thread, also a signal's handler."""
        self._events.put(STOP)

    def start(self, name, script, *arguments, **settings):
        """Start a tool or package of the repository; ``settings`` are environment variables."""
        environ = {key: os.environ[key] for key in KEPT_VARIABLES if key in os.environ}
        child = subprocess.Popen(
            [self._python, os.path.join(bootstrap.ROOT, script), *arguments],
            cwd=self._folder.name,  # a folder without the .env of another gateway
            env=environ | settings,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
            start_new_session=True,  # Ctrl-C reaches the demo alone, which stops them in order
        )
        self._children[name] = child
        self._logs[name] = deque(maxlen=LAST_LINES)
        reader = threading.Thread(target=self._read, args=(name, child.stderr), name=name)
        self._readers.append(reader)
        reader.start()

    def _read(self, name, lines):
        with lines:
            for line in lines:
                self._events.put((name, line.rstrip()))
        self._events.put((name, None))

    def expect(self, name, pattern):
        """Wait until ``name`` says a line that holds ``pattern``; return the pattern's group."""
        deadline = time.monotonic() + START_TIMEOUT
        while True:
            try:
                source, line = self.wait(max(0, deadline - time.monotonic()))
            except queue.Empty:
                raise self._failure(
                    name, f"did not say {pattern!r} in {START_TIMEOUT} seconds"
                ) from None
            match = re.search(pattern, line)
            if source == name and match:
                return match[match.lastindex or 0]

    def wait(self, timeout=None):
        """Show the next line and return it as (name, line).

        Raises Stopped, Failed if a process has ended, queue.Empty after ``timeout`` seconds.
        """
        event = self._events.get(timeout=timeout)
        if event == STOP:
            raise Stopped
        name, line = event
        if line is None:
            raise self._failure(name, f"ended by itself, status {self._children[name].wait()}")
        self._show(event)
        return event

    def wait_for_stop(self):
        """Show the lines of all processes until stop(). Raises Failed if a process ends."""
        try:
            while True:
                self.wait()
        except Stopped:
            pass  # as expected

    def _show(self, event):
        name, line = event
        if line is not None:
            say(f"{name:>8} | {line}")
            self._logs[name].append(line)

    def _failure(self, name, what):
        last = "".join(f"\n    {line}" for line in self._logs[name])
        return Failed(f"the {name} {what}; its last lines:{last or ' none'}")

    def write(self, name, text):
        """Write a file in the temporary folder, for its owner alone: it may hold a secret. Return
        its path."""
        path = os.path.join(self._folder.name, name)
        handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        with open(handle, "w", encoding="utf-8") as file:
            file.write(text)
        return path


def main(arguments):
    parser = argparse.ArgumentParser(
        description=__doc__.partition("\n\n")[0],
        epilog="Needs the network once, to install a few packages into .venv.",
    )
    parser.add_argument(
        "--once", action="store_true",
        help="end after the first visit, with status 0 only if the right page came back",
    )  # fmt: skip
    once = parser.parse_args(arguments).once
    python = bootstrap.prepare("server")
    demo = Demo(python)
    for name in ("SIGINT", "SIGTERM", "SIGHUP"):
        if hasattr(signal, name):  # Windows has no SIGHUP
            signal.signal(getattr(signal, name), demo.stop)
    return show(demo, once)


def show(demo, once):
    """Start all, make one visit, and stay until stop() unless ``once``; return the status."""
    token = secrets.token_hex(8)
    try:
        with demo:
            port, ca_file, dashboard = start_all(demo, token)
            visit(port, ca_file, token)
            if not once:
                say(INVITATION.format(
                    ca_file=ca_file, hostname=HOSTNAME, port=port, dashboard=dashboard
                ))  # fmt: skip
                demo.wait_for_stop()
    except Failed as error:
        say(f"\ndemo.py: {error}")
        return 1
    except Stopped:
        return bootstrap.INTERRUPTED
    say("\nAll has ended, and the temporary folder is removed.")
    return 0


def start_all(demo, token):
    """Return the port for visitors, the file of the CA to trust, the dashboard's address."""
    jwt_secret = secrets.token_hex(32)
    demo.start("site", os.path.join("tools", "demo_site.py"), token)
    target = demo.expect("site", r"http://(\S+)/")

    demo.start(
        "gateway", "gotunnel_server",
        GATEWAY_HOST=GATEWAY_HOST, GATEWAY_PORT="auto",
        TUNNEL_HOST="localhost", TUNNEL_PORT="auto",
        DASHBOARD_PORT="auto", BIND=LOOPBACK, ACME_ENV="local", JWT_SECRET=jwt_secret,
    )  # fmt: skip
    ca_file = demo.expect("gateway", r"must trust (.+)")
    port = int(demo.expect("gateway", r"visitors: https://\S+:(\d+)/"))
    tunnel_addr = demo.expect("gateway", r"agents: tunnel_addr (\S+)")
    dashboard = demo.expect("gateway", r"dashboard: (http://\S+)")
    demo.expect("gateway", r"is ready")

    config = demo.write("agent.yaml", AGENT_CONFIG.format(
        tunnel_addr=tunnel_addr, ca_file=ca_file, jwt_secret=jwt_secret, hostname=HOSTNAME,
        target=target,
    ))  # fmt: skip
    demo.start("agent", "gotunnel_agent", "-c", config)
    demo.expect("agent", rf"serving {HOSTNAME}")
    return port, ca_file, dashboard


def visit(port, ca_file, token):
    """Open the page as a browser that trusts the CA. Raises Failed if another page comes."""
    say(f"\na visit: https://{HOSTNAME}:{port}/\n")
    try:
        trust = ssl.create_default_context(cafile=ca_file)
        # Not every system's resolver knows *.localhost, so the address is given.
        connection = socket.create_connection((LOOPBACK, port), VISIT_TIMEOUT)
        visitor = http.client.HTTPConnection(HOSTNAME, port)
        with trust.wrap_socket(connection, server_hostname=HOSTNAME) as visitor.sock:
            visitor.request("GET", "/", headers={"Connection": "close"})
            answer = visitor.getresponse()
            page = answer.read().decode(errors="replace")
    except (OSError, http.client.HTTPException) as error:
        raise Failed(f"the visit failed: {error!r}") from None
    say(f"    {answer.status} {answer.reason}")
    for name in SHOWN_HEADERS:
        say(f"    {name}: {answer.headers[name]}")
    say("\n" + "".join(f"    {line}\n" for line in page.splitlines()))
    if answer.status != 200 or f"Token: {token}\n" not in page:
        raise Failed(f"another page came back, expected status 200 and the token {token}")
    say("The right page came back.")


def say(text):
    print(text, flush=True)


if __name__ == "__main__":
    bootstrap.tool(main)
