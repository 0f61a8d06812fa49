"""Health checks: the agent probes its targets at intervals, and tells the gateways, which send no
visits to a target that is not well (feature HEALTH).

A check is a GET request whose answer has an expected status, or a connection alone. It uses the
target as its visits do: with TLS, HTTP/2, over a unix socket, with its Host and its PROXY header.

Threads: "health" decides which check is due; "health_N", CHECKERS at most, check and tell. They
start with the first tunnel that wants it. An agent without one does not import this module.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Hashable, Mapping, Sequence
from time import monotonic
from typing import NamedTuple, Protocol

from gotunnel import HEALTH, Deadline, NoThread, __version__, encode_message, spawn
from gotunnel import Health as HealthMessage

from . import http2_check
from .common.duplex import Duplex
from .common.hostnames import WILDCARD
from .common.http1 import Malformed, answer_end, encode_head, parse_response
from .common.one_line import some, words_on_one_line
from .common.process import Stopped, Workers
from .config import Health as Settings
from .target import Route, Targets, Unserved, dial, introduction

log = logging.getLogger("gotunnel.health")

# Threads that check. Each may wait as long as its target's timeout: with 8, and 2 s for each check,
# 20 targets that never answer are checked every 5 s.
CHECKERS = 8
# A target that is not well is checked so many times as often, so that visits come again within one
# interval, whatever the message to the gateway takes.
SOONER = 2
SPREAD = 0.05  # seconds between the first checks of two targets, or all come at once for ever
TELL_TIMEOUT = 10  # seconds that a gateway has to take a message
MOST_REASON = 200  # characters of a reason on the wire
LAST_CHECKS = 1  # seconds that close() waits for the checks that run
NOT_HELD = (
    "%s: this gateway knows no health checks, so it sends visits also while a target is not well "
    "(health of %s)"
)


class Judge:
    """Whether one target counts as well, after the checks so far.

    The first check decides alone. Later ``fails`` failed checks in a row are needed, or ``passes``
    passed ones (hysteresis), so that one slow answer takes nothing offline.
    """

    def __init__(self, settings: Settings):
        self.problem: str | None = None  # why it is not well; "": it is; None: no check has ended
        self._settings = settings
        self._against = 0  # checks in a row that do not fit the verdict

    def note(self, problem: str) -> bool:
        """Take the result of a check: why it failed, "" if it did not. Returns whether the verdict
        is another one now."""
        before = self.problem
        if before is None:
            self.problem = problem
            return True
        if bool(problem) == bool(before):
            self._against = 0
            return False
        self._against += 1
        if self._against < (self._settings.fails if problem else self._settings.passes):
            return False
        self.problem, self._against = problem, 0
        return True

    @property
    def interval(self) -> float:
        """Seconds from one check to the next."""
        return self._settings.every / (SOONER if self.problem else 1)


class Control(Protocol):
    """A session's control stream."""

    def write(self, data: bytes, timeout: float | None = None) -> None: ...


class _Watch:
    """One target. Health's lock guards all but ``hostname`` and ``judge``'s settings."""

    def __init__(self, hostname: str, route: Route, settings: Settings, due: float):
        self.hostname, self.route = hostname, route
        self.judge = Judge(settings)
        self.due = due  # monotonic time of its next check
        self.busy = False  # a thread checks it


class _Listener:
    """A gateway that hears of the targets. Health's lock guards ``told`` and ``busy``."""

    def __init__(self, control: Control, hostnames: frozenset[str]):
        self.control = control
        self.hostnames = hostnames
        self.told: dict[str, bool] = {}  # the verdict that was sent last, by hostname
        self.busy = False  # a thread sends


class _Session(NamedTuple):
    routes: Mapping[str, Route]  # those to check
    listener: _Listener | None  # None: its gateway does not want to hear


class Health:
    """The health checks of one agent, for all of its sessions. Any thread; only close() waits."""

    def __init__(
        self,
        on_change: Callable[[], object],
        instead: Callable[[str, Route, Settings, Targets], str] | None = None,
    ):
        """``on_change()`` is called when snapshot() has changed. ``instead`` takes the place of
        check() in tests."""
        self._on_change = on_change
        self._check = instead or check
        self._workers = Workers(CHECKERS, "health")
        self._targets = Targets()  # connections of checks, which close() ends
        self._lock = threading.Condition()  # guards all below; notified when any of it changes
        self._watches: dict[str, _Watch] = {}
        self._sessions: dict[Hashable, _Session] = {}
        self._thread: threading.Thread | None = None
        self._warned: set[str] = set()  # hostnames of which NOT_HELD was said
        self._over = False

    def attend(
        self,
        session: Hashable,
        features: Sequence[str],
        routes: Mapping[str, Route],
        control: Control,
        gateway: str,
    ) -> None:
        """A session begins to serve ``routes``: check those that want it, and tell its gateway
        now and at each change. ``features`` are those that the gateway has acknowledged."""
        wanted = {
            name: route
            for name, route in routes.items()
            if route.tunnel.health and (route.awaits_port or not route.problem)
        }
        knows = HEALTH in features
        listener = _Listener(control, frozenset(wanted)) if wanted and knows else None
        with self._lock:
            news = set() if knows else wanted.keys() - self._warned
            self._warned |= news
            self._sessions[session] = _Session(wanted, listener)
            self._choose()
            try:
                if self._watches and self._thread is None:
                    self._thread = spawn("health", self._run)
            except NoThread as error:
                log.warning("%s; targets are not checked", error)
            self._lock.notify_all()
        if news:
            log.warning(NOT_HELD, gateway, some(sorted(news)))

    def forget(self, session: Hashable) -> None:
        """A session is over. Of the last one, the targets go on being checked: the next one
        begins with what is known."""
        with self._lock:
            if self._sessions.pop(session, None) is not None and self._sessions:
                self._choose()

    def _choose(self) -> None:
        """Check the targets of all sessions from now on. Caller holds the lock."""
        routes: dict[str, Route] = {}
        for session in self._sessions.values():  # the latest last
            routes |= session.routes
        watches, now = {}, monotonic()
        for hostname, route in routes.items():
            before = self._watches.get(hostname)
            settings = route.tunnel.health
            if before is not None and before.route.tunnel == route.tunnel:
                before.route = route  # with another TLS context, perhaps
                watches[hostname] = before
            elif settings is not None:
                # Spread over the interval, but all of the first checks soon.
                late = min(len(watches) * SPREAD, settings.every)
                watches[hostname] = _Watch(hostname, route, settings, now + late)
        self._watches = watches

    def snapshot(self) -> dict[str, str]:
        """Why targets are not well, by hostname; "" for those that are."""
        with self._lock:
            judged = {name: watch.judge.problem for name, watch in self._watches.items()}
        return {name: problem for name, problem in judged.items() if problem is not None}

    def close(self) -> None:
        """Check no more. Waits LAST_CHECKS at most."""
        with self._lock:
            self._over = True
            self._lock.notify_all()
        self._targets.reset()
        self._workers.shutdown(LAST_CHECKS)
        if self._thread is not None:
            self._thread.join(LAST_CHECKS)

    def _run(self) -> None:
        """Thread "health": give the threads of the pool what is due."""
        while True:
            with self._lock:
                if self._over:
                    return
                now = monotonic()
                idle = [watch for watch in self._watches.values() if not watch.busy]
                due = [watch for watch in idle if watch.due <= now]
                tell = [each for each in self._listeners() if not each.busy and self._news(each)]
                if not due and not tell:
                    self._lock.wait(min((watch.due - now for watch in idle), default=None))
                    continue
                for watch in due:
                    watch.busy = True
                for listener in tell:
                    listener.busy = True
            try:
                for watch in due:
                    self._workers.submit(self._check_one, watch)
                for listener in tell:
                    self._workers.submit(self._tell, listener)
            except Stopped:
                return

    def _listeners(self) -> list[_Listener]:
        return [s.listener for s in self._sessions.values() if s.listener is not None]

    def _news(self, listener: _Listener) -> list[tuple[str, str]]:
        """What a gateway does not know yet: hostnames, and why their targets are not well. Caller
        holds the lock."""
        found = []
        for hostname in listener.hostnames & self._watches.keys():
            problem = self._watches[hostname].judge.problem
            if problem is not None and listener.told.get(hostname) is not (problem == ""):
                found.append((hostname, problem))
        return found

    def _check_one(self, watch: _Watch) -> None:
        """Thread of the pool: check one target."""
        settings, judge, began = watch.route.tunnel.health, watch.judge, monotonic()
        if settings is None:
            return
        problem = "the check has failed by a bug of the agent, see its log"
        try:
            problem = self._check(watch.hostname, watch.route, settings, self._targets)
        finally:
            with self._lock:
                first, changed = judge.problem is None, judge.note(problem)
                watch.busy = False
                watch.due = max(began + judge.interval, monotonic())
                over = self._over
                self._lock.notify_all()
        if over or not changed:
            return
        target = watch.route.tunnel.target
        if problem:
            log.warning("%s: target %s is not well: %s; the gateway is told to send no visits",
                        watch.hostname, target, words_on_one_line(problem))  # fmt: skip
        elif not first:
            log.info("%s: target %s is well again", watch.hostname, target)
        self._on_change()

    def _tell(self, listener: _Listener) -> None:
        """Thread of the pool: send one gateway what it does not know yet."""
        with self._lock:
            news = self._news(listener)
        try:
            for hostname, problem in news:
                reason = words_on_one_line(problem, MOST_REASON)
                message = HealthMessage(hostname, not problem, reason)
                listener.control.write(encode_message(message), TELL_TIMEOUT)
                with self._lock:
                    listener.told[hostname] = not problem
        except OSError as error:  # the session is over, or as good as that: its gateway reads not
            log.debug("a gateway is told no more of targets: %s", error)
            with self._lock:
                listener.hostnames = frozenset()
        finally:
            with self._lock:
                listener.busy = False
                self._lock.notify_all()


def check(hostname: str, route: Route, settings: Settings, targets: Targets) -> str:
    """Check a target once. Returns why it is not well; "" if it is."""
    tunnel = route.tunnel
    deadline = Deadline(settings.timeout)
    try:
        first = introduction(tunnel.proxy_protocol, None)
        target = dial(tunnel.target, route.context, first, tunnel.protocol, settings.timeout)
    except Unserved as error:
        return str(error)
    with targets.hold(target):
        if not settings.path:
            return ""
        asked = f"GET {settings.path}"
        host = tunnel.host_header or hostname.removeprefix(WILDCARD)
        try:
            if tunnel.protocol:
                scheme = "https" if tunnel.target.tls else "http"
                fields = _fields(host)
                status = http2_check.status(target, scheme, host, settings.path, fields, deadline)
            else:
                status = _status(target, host, settings.path, deadline)
        except TimeoutError:
            return f"no answer in {settings.timeout:g} s for {asked}"
        except OSError as error:
            return f"the connection broke ({error.strerror or error}) for {asked}"
        except Malformed as error:
            return f"an answer that is not HTTP ({error}) for {asked}"
        except http2_check.NotHttp2 as error:
            return f"an answer that is not HTTP/2 ({error}) for {asked}"
    return "" if settings.expects(status) else f"{status} for {asked}"


def _fields(host: str) -> list[tuple[str, str]]:
    return [
        ("User-Agent", f"gotunnel-agent/{__version__} (health)"), ("Accept", "*/*"),
        # As with a visitor's request, or many a target would answer by a redirect to https.
        ("X-Forwarded-Proto", "https"), ("X-Forwarded-Host", host),
    ]  # fmt: skip


def _status(target: Duplex, host: str, path: str, deadline: Deadline) -> int:
    """The status of a GET request's answer. Raises OSError, Malformed."""
    fields = [("Host", host), *_fields(host), ("Connection", "close")]
    target.write(encode_head(f"GET {path} HTTP/1.1", fields), timeout=deadline.left())
    came = b""
    while True:
        while (end := answer_end(came, 0)) < 0:
            data = target.read(timeout=deadline.left())
            if not data:
                raise ConnectionAbortedError("it was closed without an answer")
            came += data
        response = parse_response(came[:end])
        if response.status >= 200:
            return response.status
        came = came[end:]  # an interim answer (RFC 9110 §15.2)
