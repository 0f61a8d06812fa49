"""A tunnel inside another program: gotunnel.forward() starts an agent in threads of the caller.

For tests, notebooks and webhooks:

    with gotunnel.forward(8080) as tunnel:
        print(tunnel.url)

The process is the caller's. So nothing of it is changed: no signal handler, no log configuration,
no CPU affinity. Only atexit gets a function, which closes an open tunnel when the interpreter ends.
Tunnels share nothing, so there may be several. The threads are those of an agent (agent.py), with
the one called "agent"; all end in close().

Every error is a ForwardError, except for a wrong argument, which is a ValueError. Its text is one
line that shows no secret.
"""

from __future__ import annotations

import atexit
import contextlib
import logging
import os
import threading
from collections.abc import Callable, Mapping, Sequence
from time import monotonic
from types import TracebackType

from gotunnel import NoThread, spawn

from . import home, trouble
from .agent import Agent, Snapshot
from .common.hostnames import OPEN
from .common.one_line import on_one_line
from .common.status_socket import OFF
from .config import Config, ConfigError, Inspect, Tunnel, inspect_of, tunnel_of
from .follow import Follower, Seen
from .inspector import CannotInspect, Started, start_inspector
from .link import LAST_WORDS
from .quick.names import random_label
from .quick.targets import BadTarget, read_target
from .registering import INVALID, NO_NAMES, TAKEN
from .trust import CannotTrust

log = logging.getLogger("gotunnel.embedded")

# By these names gotunnel has them, too.
__all__ = ["ForwardError", "NoAccount", "NotGranted", "OpenTunnel", "Unreachable", "forward"]

# Seconds that the gateway has to grant the hostname. A dial to an address that does not answer
# takes agent.DIAL_TIMEOUT, so this is enough for a second one.
TIMEOUT = 20
# How often another random name is tried if one is taken. There are many, so even a second time is
# rare; more is a fault of another kind, which the last refusal tells.
NAMES = 5
# Seconds between two looks of wait() whether a signal has come: Windows wakes no thread for one.
SIGNAL_LOOK = 1


class ForwardError(Exception):
    """There is no tunnel. The text says why, in one line."""


class NoAccount(ForwardError):
    """No gateway and credential are known here, or they cannot be used."""


class NotGranted(ForwardError):
    """The gateway answered, and refused: the credential, the hostname or the public port."""


class Unreachable(ForwardError):
    """There was no session with the gateway in time: no network, no such name, no trust in the
    gateway's certificate, or another program at its port."""


class OpenTunnel:
    """A tunnel that the gateway has granted. It stays open, over lost connections too, until
    close(), the end of its ``with`` block or that of the interpreter.

    In a process that was forked (os.fork, multiprocessing) it stays its parent's: close() does
    nothing there. Any thread may call any method.
    """

    def __init__(
        self, agent: Agent, config: Config, *, random: bool, inspector: Started | None = None
    ):
        """forward() makes it. ``config`` is the agent's. ``random``: the tunnel has a random name.
        ``inspector``: the agent's, which close() ends. Raises NoThread."""
        self._inspector = inspector
        self._agent, self._config = agent, config
        self._names = NAMES if random else 1  # that may still be asked for
        self._refusal = ""  # why the agent has ended
        self._hostname = self._url = ""
        self._changed = threading.Event()  # the agent's state has
        self._over = threading.Event()  # the agent's thread has ended
        self._owner = os.getpid()
        agent.on_change, agent.on_refusal = self._changed.set, self._instead
        agent.waits = False
        self._thread = spawn("agent", self._run)
        atexit.register(self.close)

    def _run(self) -> None:
        try:
            with contextlib.suppress(NotGranted):  # _await() tells it
                self._agent.run()
        finally:
            self._over.set()
            self._changed.set()

    def __enter__(self) -> OpenTunnel:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        state = "closed" if self._over.is_set() else self.problem or "open"
        return f"<OpenTunnel {self._url} {state}>"

    @property
    def url(self) -> str:
        """The public address: https://HOST, with a port unless it is 443. In tcp mode
        tls://HOST:PORT (TLS with the hostname as SNI), or tcp://HOST:PORT with a public port of its
        own. It stays the same as long as the tunnel is open."""
        return self._url

    @property
    def hostname(self) -> str:
        """The public hostname, in lower case."""
        return self._hostname

    @property
    def inspector(self) -> str:
        """The address of the inspector for a browser, with its token, with which its reader sees
        all visits; "" if there is none."""
        return "" if self._inspector is None else self._inspector.url

    @property
    def problem(self) -> str:
        """Why visitors cannot be served at the moment, such as a lost connection; "" if they can.
        The agent tries again by itself."""
        state = self._agent.snapshot()
        return state.problem or _refusal(state)

    @property
    def certificate(self) -> str:
        """How the hostname's certificate stands, in the gateway's words: "ready", "waiting" or
        "failed: REASON"; "" if the gateway has not told."""
        return self._agent.snapshot().certificates.get(self._hostname, "")

    @property
    def visits(self) -> int:
        """How many visits run now."""
        return self._agent.snapshot().visits

    def wait(self, timeout: float | None = None) -> bool:
        """Wait until the tunnel is closed, or for ``timeout`` seconds (None: for ever). Returns
        whether it is closed. Ctrl-C ends it as usual, with KeyboardInterrupt."""
        end = None if timeout is None else monotonic() + timeout
        while True:
            left = SIGNAL_LOOK if end is None else min(SIGNAL_LOOK, end - monotonic())
            if self._over.wait(max(0, left)):
                return True
            if left <= 0:
                return False

    def close(self) -> None:
        """Give the hostname back and end the agent's threads. Running visits have the account's
        drain_timeout (5 seconds) to end, then they are reset. May be called again."""
        if os.getpid() != self._owner:  # a fork has no threads, and the connection is its parent's
            return
        self._agent.stop()
        self._thread.join(2 * LAST_WORDS)  # it may hang in getaddrinfo(), which cannot be ended
        if self._inspector is not None:
            self._inspector.close()
        atexit.unregister(self.close)

    def _await(self, timeout: float) -> None:
        """Wait until the gateway has granted the tunnel. Raises ForwardError."""
        end = monotonic() + timeout
        problem = f"no answer in {timeout:g} s"
        while not self._over.is_set():
            self._changed.clear()
            state = self._agent.snapshot()
            if state.since is not None:
                if refusal := _refusal(state):
                    raise NotGranted(self._in_words(refusal))
                ((self._hostname, route),) = state.routes.items()
                self._url = route.address(self._hostname)
                return
            problem = state.problem or problem
            if state.lasting or not self._changed.wait(max(0, end - monotonic())):
                raise Unreachable(f"{state.gateway}: {problem}")
        if self._refusal:
            raise NotGranted(self._refusal)
        raise ForwardError("the agent has ended by a bug, which it has logged")

    def _instead(self, refusal: str) -> Config | None:
        """Agent.on_refusal: asks for another random name if one is taken, else ends the agent. Once
        the tunnel was granted, the agent asks for it again and again. Thread "agent"."""
        if self._agent.totals().sessions:
            return None
        self._names -= 1
        if self._names and refusal.startswith(TAKEN):
            (tunnel,) = self._config.tunnels
            tunnel = tunnel._replace(hostname=random_label() + OPEN)
            self._config = self._config._replace(tunnels=(tunnel,))
            return self._config
        self._refusal = self._in_words(refusal)
        raise NotGranted(self._refusal)

    def _in_words(self, refusal: str) -> str:
        hostname = self._config.tunnels[0].hostname
        text = f"the gateway refused {hostname}: {on_one_line(refusal)}"
        if refusal.startswith(TAKEN):
            text += "; another agent serves it, or a tunnel of this program that was not closed"
        if refusal.startswith(INVALID) and hostname.endswith(OPEN):
            text += f"; {NO_NAMES}"
        return text + trouble.of_refusal(refusal, self._config)


def forward(
    target: int | str,
    *,
    host: str | None = None,
    tcp: bool = False,
    port: int | str | None = None,
    basic_auth: str | Sequence[str] | Mapping[str, str] | None = None,
    host_header: str | None = None,
    join: str | None = None,
    config: str | os.PathLike[str] | None = None,
    on_visit: Callable[[Seen], object] | None = None,
    inspect: bool | int | str | Mapping[str, object] = False,
    timeout: float = TIMEOUT,
) -> OpenTunnel:
    """Open a tunnel from a public hostname to ``target``, in threads of this process, and return it
    as soon as the gateway has granted the hostname.

    ``target``: a port of this machine, "HOST:PORT", "https://HOST:PORT" or "unix:/PATH". Nothing
    needs to listen there yet.
    ``host``: the public hostname, or a label alone ("demo"), which the gateway puts below the
    credential's first wildcard. None: a random label there.
    ``tcp``: pass bytes on as they are (SSH, databases), and do not speak HTTP.
    ``port``: with ``tcp``, a public port of its own; "auto" is any free one.
    ``basic_auth``: what visitors must know: "USER:PASSWORD", several of them, or a mapping.
    ``host_header``: the Host that the target gets instead of the public one, for development
    servers that accept no other than "localhost".
    ``join``: the join string of an account, as `gotunnel-server agents add` prints it.
    ``config``: an agent's configuration, of which only the gateway and the credential are used.
    With neither: $GOTUNNEL_JOIN, or the account that `gotunnel join` has made.
    ``on_visit``: called with a Seen (follow.py) after each request, in tcp mode after each
    connection, by a thread of the agent. It must not wait.
    ``inspect``: have an inspector, a page that shows the visits: True, a port of 127.0.0.1, or what
    an agent's configuration has under ``inspect``. If the port is in use, it takes one of the next;
    the tunnel's ``inspector`` is its address.
    ``timeout``: seconds that the gateway has to grant the hostname.

    Blocks; in a coroutine, ``await asyncio.to_thread(gotunnel.forward, 8080)``.

    Raises ValueError for a wrong argument, NoAccount, NotGranted, Unreachable.
    """
    if timeout <= 0:
        raise ValueError(f"timeout: {timeout} came, expected seconds, more than 0")
    keys = {"port": port, "host_header": host_header, "basic_auth": basic_auth}
    tunnel = _tunnel(target, host, tcp, keys)
    inspected = _inspect(inspect)
    account = _account(join, config)
    whole = account._replace(tunnels=(tunnel,), status_socket=OFF, metrics_port=None, inspect=None)
    inspector = None
    try:
        agent = Agent(whole)
        if on_visit is not None:
            agent.follower = Follower(_guarded(on_visit))
        if inspected is not None:
            inspector = start_inspector(agent, inspected, next_port=True)
        opened = OpenTunnel(agent, whole, random=host is None, inspector=inspector)
    except (CannotTrust, ConfigError) as error:
        raise NoAccount(str(error)) from None
    except (CannotInspect, NoThread) as error:
        if inspector is not None:
            inspector.close()
        raise ForwardError(str(error)) from None
    try:
        opened._await(timeout)
    except BaseException:  # KeyboardInterrupt, too
        opened.close()
        raise
    return opened


def _tunnel(target: int | str, host: str | None, tcp: bool, keys: Mapping[str, object]) -> Tunnel:
    """The tunnel that the arguments describe. ``keys``: those that may be None. Raises
    ValueError."""
    item: dict[str, object] = {"mode": "tcp" if tcp else "http"}
    try:
        item["target"] = str(read_target(str(target)))
        item["hostname"] = _hostname(host)
        item |= {key: _value(given) for key, given in keys.items() if given is not None}
        return tunnel_of(item)
    except BadTarget as error:  # its words are those of a command
        raise ValueError(str(error).replace("TARGET", "target", 1)) from None
    except ConfigError as error:
        raise ValueError(str(error)) from None


def _inspect(given: bool | int | str | Mapping[str, object]) -> Inspect | None:
    """Raises ValueError."""
    if isinstance(given, Mapping):
        texts: object = {
            key: str(value).lower() if isinstance(value, bool) else str(value)
            for key, value in given.items()
        }
    else:
        texts = str(given)
    try:
        return inspect_of(texts)
    except ConfigError as error:
        raise ValueError(str(error)) from None


def _value(given: object) -> object:
    """An argument as a configuration has it: texts, lists and mappings."""
    if isinstance(given, Mapping):
        return dict(given)
    if isinstance(given, Sequence) and not isinstance(given, str):
        return list(given)
    return str(given)


def _hostname(host: str | None) -> str:
    if host is None:
        return random_label() + OPEN
    return host if "." in host else host + OPEN


def _account(join: str | None, config: str | os.PathLike[str] | None) -> Config:
    """Raises NoAccount, and ValueError if both are given."""
    if join is not None and config is not None:
        raise ValueError("join and config came, expected only one of them")
    try:
        return home.account(None if config is None else os.fspath(config), join=join)
    except home.CannotAsk as error:
        raise Unreachable(str(error)) from None
    except ConfigError as error:
        raise NoAccount(str(error)) from None


def _refusal(state: Snapshot) -> str:
    """Why the gateway, which has accepted the agent, does not serve its one tunnel; "" if it
    does."""
    problems = [*(route.problem for route in state.routes.values()), *state.refused.values()]
    return next(filter(None, problems), "")


def _guarded(on_visit: Callable[[Seen], object]) -> Callable[[Seen], None]:
    """``on_visit``, whose errors are logged: they would look like ours, and cut the visit."""

    def tell(seen: Seen) -> None:
        try:
            on_visit(seen)
        except Exception:
            log.exception("on_visit has failed (traceback follows); the visit goes on")

    return tell
