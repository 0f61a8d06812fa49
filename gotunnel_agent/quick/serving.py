"""Runs an agent for one quick tunnel: asks for its name, tells its public address, and ends when
the gateway will never serve it.

Threads, besides those of the agent (agent.py), the screen and the server of a folder:

    thread   how many   does                                         ends when
    main     1          waits for signals                            the process ends
    quick    1          waits until the tunnel is served, tells it   stop(), or it is not to be had
    target   1          looks once whether the target answers        it has answered, or not
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import sys
import threading
from collections.abc import Callable
from urllib.parse import urlsplit

from gotunnel import NoThread, spawn

from ..agent import Agent
from ..called import program
from ..common.hostnames import OPEN
from ..common.one_line import on_one_line
from ..common.process import HANG_UP, Signals, watch_memory
from ..common.refusals import UNTRUSTED
from ..config import Config, Tunnel
from ..inspector import start_inspector
from ..registering import INVALID, NO_NAMES, TAKEN
from ..target import Route, Unserved, dial
from .names import MOST_TRIES, Labels
from .screen import Screen

log = logging.getLogger("gotunnel.serving")

# How refusals begin: of a name that the credential may not claim; of a credential that is wrong or
# has ended.
NOT_ALLOWED, NOT_KNOWN = "not allowed", "auth failed"
KEYS_ADVICE = ", or remove the keys that need it"  # what a quick command has no use for
SSH_PORT, HTTPS_PORT = 22, 443
LOCAL_PORT = 10_000  # of the example for visitors: added to the target's port, it is seldom in use
SCREEN_TIMEOUT = 1  # seconds for the screen to end; the terminal may not read


class GivenUp(Exception):
    """The gateway refuses the tunnel for good; the text is one line for the user."""


class Serving:
    """The one tunnel of an agent: what is asked for, and what the user is told."""

    def __init__(self, config: Config, labels: Labels | None, tell: Callable[[str], object]):
        """``labels``: the random names of the tunnel; None if the user has named it. ``tell(url)``
        is called once, with the public address. Raises CannotTrust."""
        self._config, self._labels, self._tell = config, labels, tell
        self._asked = label_of(config.tunnels[0])
        self._served = False  # it was, at least once
        self._stop = False
        self._changed = threading.Event()
        self.notes: list[str] = []  # how visitors connect, once that is known
        self.failure = ""  # why the command ends by itself; "" if it does not
        self.agent = Agent(config)
        self.agent.on_change = self._changed.set
        self.agent.on_refusal = self.instead
        self.agent.waits = False

    @property
    def tunnel(self) -> Tunnel:
        return self._config.tunnels[0]

    def run_agent(self) -> None:
        """Thread "agent"."""
        with contextlib.suppress(GivenUp):  # main tells why
            self.agent.run()

    def run(self) -> None:
        """Thread "quick". Returns after stop(), or if the gateway cannot serve the tunnel."""
        while not self._stop and not self.failure:
            self._changed.wait()
            self._changed.clear()
            snapshot = self.agent.snapshot()
            if self._served or snapshot.since is None:
                continue
            for hostname, route in snapshot.routes.items():
                if route.problem:
                    self.failure = f"{hostname}: {self._in_words(route.problem)}"
                else:
                    self._served = True
                    self.agent.on_change = lambda: None  # each visit is a change, too
                    self._announce(hostname, route)

    def stop(self) -> None:
        """Any thread."""
        self._stop = True
        self._changed.set()

    def instead(self, refusal: str) -> Config | None:
        """The gateway has refused the tunnel, with these words: another configuration to register
        at once; None to try the same one later. Raises GivenUp. Thread "agent"."""
        if self._served:
            return None
        taken = refusal.startswith(TAKEN)
        if taken and self._labels is not None:
            label = self._labels.another()
            if label is None:
                self.failure = f"other agents have all of {MOST_TRIES} names; --host chooses one"
                raise GivenUp(self.failure)
            log.info("another agent has %s; asking for %s", self._asked, label)
            self._asked = label
            tunnel = self.tunnel._replace(hostname=f"{label}{OPEN}")
            self._config = self._config._replace(tunnels=(tunnel,))
            return self._config
        if taken:
            return None
        self.failure = f"the gateway refused: {self._in_words(refusal)}"
        raise GivenUp(self.failure)

    def _in_words(self, refusal: str) -> str:
        """A refusal for the user. An older gateway, or a Go one, takes a random name for a hostname
        that is wrong, or for one that it serves as it stands."""
        if self._labels is not None and (NO_NAMES in refusal or refusal.startswith(INVALID)):
            return "it gives no random names; update it, or name a hostname with --host"
        if refusal.startswith(NOT_KNOWN):
            return f"{on_one_line(refusal)}; `{program()} join` stores another credential"
        if refusal.startswith(NOT_ALLOWED) and self._labels is not None:
            return f"{on_one_line(refusal)}; --host NAME asks for a certain one"
        return on_one_line(refusal.replace(KEYS_ADVICE, ""))

    def _announce(self, hostname: str, route: Route) -> None:
        if self._labels is not None:
            self._labels.granted(self._asked)
        url = route.address(hostname)
        self._tell(url)
        for line in how_to_connect(url, route.tunnel, self._config.ca_file):
            log.info("%s", line)
            self.notes.append(line)


def label_of(tunnel: Tunnel) -> str:
    return tunnel.hostname.removesuffix(OPEN)


def how_to_connect(url: str, tunnel: Tunnel, ca_file: str | None) -> list[str]:
    """What a visitor of a tunnel in tcp mode types; empty in http mode."""
    parts = urlsplit(url)
    if parts.scheme in ("http", "https") or parts.hostname is None:
        return []
    host, port = parts.hostname, parts.port
    is_ssh = tunnel.target.port == SSH_PORT
    if parts.scheme == "tcp":
        example = f"ssh -p {port} USER@{host}" if is_ssh else f"{host} port {port}"
        return [f"visitors connect to it without TLS: {example}"]
    words = [program(), "forward"]
    if ca_file is not None:
        words += ["--ca-file", "CA_FILE"]
    behind = "" if port in (None, HTTPS_PORT) else f":{port}"
    if is_ssh:
        command = " ".join([*words, f"%h{behind}"])
        return [f"visitors connect by: ssh -o ProxyCommand='{command}' USER@{host}"]
    local = LOCAL_PORT + tunnel.target.port % LOCAL_PORT
    command = " ".join([*words, f"{host}{behind}", str(local)])
    return [f"visitors run: {command}, and connect to port {local} of their own machine"]


def look_at_target(route: Route) -> None:
    """Thread "target": say so if the target does not answer yet. It may be started later."""
    tunnel = route.tunnel
    try:
        dial(tunnel.target, route.context, b"", tunnel.protocol).close()
    except Unserved as error:
        visitors = "get an error page" if tunnel.mode == "http" else "cannot connect"
        if error.refusal == UNTRUSTED:
            text = (
                f"the certificate of {tunnel.target} is not to be trusted, and visitors {visitors}"
            )
            advice = "; --target-skip-tls-verify accepts any" if tunnel.mode == "http" else ""
            log.warning("%s%s", text, advice)
        else:
            log.warning("nothing answers at %s yet (%s); until then visitors %s", tunnel.target,
                        error, visitors)  # fmt: skip


def print_url(url: str) -> None:
    """The first line of standard output, for scripts."""
    if sys.stdout is None:
        return
    try:
        print(on_one_line(url), flush=True)
    except OSError as error:  # its reader is gone
        log.warning("the address cannot be written to standard output (%s)", error.strerror)
        # Python flushes standard output again at exit; then it must not fail a second time.
        with contextlib.suppress(OSError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def serve(config: Config, labels: Labels | None, *, drawn: bool, qr: bool, folder: str = "") -> int:
    """Serve the one tunnel of ``config`` until a signal comes; returns 0 then. ``drawn``: on a
    screen, else the address is printed. ``folder``: what our own server serves; "" for a target
    that may not answer. Raises GivenUp, CannotTrust, CannotInspect, NoThread."""
    serving = Serving(config, labels, (lambda url: None) if drawn else print_url)
    agent = serving.agent
    screen = Screen(agent, sys.stdout if drawn else None, qr=qr)
    screen.notes = serving.notes
    inspector = None
    if config.inspect is not None:
        inspector = start_inspector(agent, config.inspect, next_port=True)
        line = f"inspector: {inspector.url}"
        serving.notes.append(line)
        if not screen.draws:
            log.info("%s", line)
    if folder:
        screen.target_words = lambda tunnel: folder
    # The terminal was closed: stop in good order, unless nohup has it ignored.
    ends = [HANG_UP] if HANG_UP and signal.getsignal(HANG_UP) is not signal.SIG_IGN else []
    signals = Signals(also=ends)
    stop = threading.Event()
    route = next(iter(agent.snapshot().routes.values()))
    spawn("agent", signals.after, serving.run_agent)
    spawn("quick", signals.after, serving.run)
    shown = spawn("screen", screen.run, stop)
    if not folder:
        with contextlib.suppress(NoThread):
            spawn("target", look_at_target, route)
    watch_memory()
    number = signals.wait()
    if number:
        log.info("stopping; a second signal stops at once")
    serving.stop()
    agent.stop()
    if inspector is not None:
        inspector.close()
    stop.set()
    shown.join(SCREEN_TIMEOUT)
    if number:
        if not screen.draws:  # the last picture says so, too
            log.info("stopped")
        return 0
    raise GivenUp(serving.failure or "ended by a bug, which was logged")
