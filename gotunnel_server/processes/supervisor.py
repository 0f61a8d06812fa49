"""The supervisor: starts the children, gives them their sockets, and restarts those that end.

It serves nothing itself. One thread waits for signals, for messages of the children, and for the
time; roster.py decides.

SIGTERM, SIGINT    drain all and end; the second one ends all at once
SIGHUP             all children read again what may have changed
SIGUSR2            the children are renewed, one after the other: new code, new configuration
SIGCHLD            a child has ended
"""

from __future__ import annotations

import contextlib
import logging
import os
import secrets
import selectors
import signal
import socket
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from time import monotonic, sleep
from typing import Any

from gotunnel import NoThread, __version__, spawn
from gotunnel_agent.common.one_line import on_one_line
from gotunnel_agent.common.process import HANG_UP, Signals
from gotunnel_agent.common.standard_error import share_standard_error

from ..config import Config, load
from ..net.inherited import LISTEN, Given, Inherited, of_systemd
from ..net.listener import PortError
from ..notify import Notifier, watchdog_interval
from ..several import VARIABLE
from ..variables import ConfigError
from . import roster
from .channel import PROTOCOL, Broken, Message, SupervisorEnd
from .roster import Roster
from .shared_state import SharedState
from .sockets import SPREAD, Sockets

log = logging.getLogger("gotunnel.supervisor")

RENEW = signal.SIGUSR2
# The settings whose ports systemd may give.
SETTINGS = (*SPREAD, "DASHBOARD_PORT", "METRICS_PORT", "TCP_PORTS")
# What concerns one process id alone, and is the supervisor's.
OWN = (*LISTEN, "NOTIFY_SOCKET", "WATCHDOG_USEC", "WATCHDOG_PID")
SECRET_BYTES = 32
PAUSE = 0.2  # seconds after an error of ours


class Child:
    """A process of ours and the channel to it."""

    def __init__(self, number: int, process: subprocess.Popen[bytes], end: SupervisorEnd) -> None:
        self.number, self.process, self.end = number, process, end


class Supervisor:
    """Main thread only. run() returns the exit status."""

    def __init__(
        self,
        config: Config,
        env_file: str | None,
        environment: Mapping[str, str],
        command: Sequence[str] = (),
    ) -> None:
        """``environment``: that of the process. ``command`` starts a child; empty: the command of
        this process. Raises PortError, Contradiction."""
        self._env_file, self._environment = env_file, environment
        self._command = command or (sys.executable, *sys.orig_argv[1:])
        self._count = config.processes
        self._drain_timeout = config.drain_timeout
        self._signals = Signals(hang_up=True, also=(RENEW, signal.SIGCHLD))
        self._notifier = Notifier(environment)
        interval = watchdog_interval(environment)
        self._watchdog = interval if self._notifier else None  # seconds
        self._watchdog_at = 0.0  # monotonic, of the next WATCHDOG=1
        self._sockets = Sockets(config, self._count, Inherited(of_systemd(environment, SETTINGS)))
        self._roster = Roster(self._count)
        self._shared = SharedState(monotonic)
        self._children: dict[int, Child] = {}  # by id of the roster
        self._estates: dict[int, int] = {}  # id of one that is to go: of the one that is asked
        self._began = monotonic()
        self._secret = secrets.token_hex(SECRET_BYTES)  # of the cluster that the children are
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._signals, selectors.EVENT_READ, None)
        self._watched: dict[int, int] = {}  # id: the events that the selector waits for
        self._loaded: Config | None = None  # for a renewal
        self._status: int | None = None  # exit status; None: it goes on
        self._told: Message = {}  # the processes, as the children know them

    def run(self) -> int:
        log.info("gotunnel %s: %d processes serve %s", __version__, self._count,
                 ", ".join(sorted({given.name for given in self._sockets.of(1)})))  # fmt: skip
        share_standard_error()
        try:
            self._act(self._roster.begin(monotonic()))
            while self._status is None:
                try:
                    self._turn()
                except Exception:
                    log.exception("an unexpected error (bug, traceback follows); the supervisor "
                                  "goes on")  # fmt: skip
                    sleep(PAUSE)  # the cause may still be there: no busy loop
        finally:
            for child in self._children.values():
                child.process.kill()
            self._sockets.close()
        return self._status

    def _turn(self) -> None:
        for key, events in self._selector.select(self._roster.wait(monotonic())):
            if key.data is None:
                self._on_signal(self._signals.wait())
            elif key.data in self._children:
                self._on_channel(key.data, events)
        self._reap()
        now = monotonic()
        self._act(self._roster.tick(now))
        if self._watchdog is not None and self._roster.has_served and now >= self._watchdog_at:
            self._watchdog_at = now + self._watchdog
            self._notifier.tell("WATCHDOG=1")
        self._tell_processes()

    # Signals

    def _on_signal(self, number: int) -> None:
        now = monotonic()
        if number == signal.SIGCHLD:
            return  # _reap() looks in each turn
        if number == HANG_UP:
            # Each child reads the configuration, and refuses a bad one, by itself, and logs it.
            self._notifier.tell_reloading()
            for child in list(self._children.values()):
                self._send(child, {"order": "reload"})
            self._notifier.tell("READY=1")
        elif number == RENEW:
            self._load()
        elif number == 0:  # _load() has read it
            loaded, self._loaded = self._loaded, None
            if loaded is not None and self._change_ports(loaded):
                self._notifier.tell_reloading()
                self._act(self._roster.renew(now))
        elif not self._roster.stopping:
            self._notifier.tell("STOPPING=1")
            log.info("stopping; a second signal stops at once")
            self._act(self._roster.stop(now, self._drain_timeout))

    def _load(self) -> None:
        """Read the configuration for a renewal. In a thread: a disk may hang, and the children need
        this one."""

        def read() -> None:
            try:
                self._loaded = load(self._env_file, self._environment)
            except ConfigError as error:
                log.error("SIGUSR2: %s; all processes serve on as they are", error)

        try:
            spawn("renewal", self._signals.after, read)
        except NoThread as error:
            log.error("SIGUSR2: %s; all processes serve on as they are", error)

    def _change_ports(self, config: Config) -> bool:
        """Open the ports of a changed configuration. False, and a line in the log, if one cannot be
        opened."""
        if config.processes != self._count:
            log.warning("PROCESSES is %d now: it takes effect when the gateway is restarted",
                        config.processes)  # fmt: skip
        try:
            self._sockets.change(config)
        except PortError as error:
            log.error("SIGUSR2: %s; all processes serve on as they are", error)
            return False
        self._drain_timeout = config.drain_timeout
        return True

    # The children

    def _act(self, actions: Iterable[roster.Action]) -> None:
        for action in actions:
            if isinstance(action, roster.Say):
                log.log(logging.getLevelName(action.level.upper()), "%s", action.text)
            elif isinstance(action, roster.Start):
                self._start(action)
            elif isinstance(action, roster.Go):
                self._go(action)
            elif isinstance(action, roster.Ready):
                self._notifier.tell("READY=1")
                if not self._roster.renewing:
                    log.info("all %d processes are ready", self._count)
            elif isinstance(action, roster.Exit):
                self._status = action.status
            elif isinstance(action, roster.Drain):
                until = monotonic() + self._drain_timeout + roster.LAST_JOBS
                self._roster.drains(action.id, until)
                self._order(action.id, "drain", stops=action.stops)
            elif isinstance(action, roster.Cover):
                self._order(action.id, "cover" if action.on else "uncover", number=action.number)
            else:
                child = self._children.get(action.id)
                if child is not None:
                    child.process.kill()

    def _order(self, id: int, order: str, **more: Any) -> None:
        child = self._children.get(id)
        if child is not None:
            self._send(child, {"order": order, **more})

    def _send(self, child: Child, message: Message) -> None:
        try:
            child.end.send(message)
        except Broken as error:
            self._report_broken(child, error)

    def _report_broken(self, child: Child, error: Broken) -> None:
        for id, other in list(self._children.items()):
            if other is child:
                self._act(self._roster.broken(id, str(error)))

    def _start(self, action: roster.Start) -> None:
        id, number = action
        try:
            ours, theirs = socket.socketpair()
        except OSError as error:
            log.error("process %d cannot be started: %s", number, error.strerror)
            self._act(self._roster.ended(id, 1, monotonic()))
            return
        own = self._sockets.of(number)
        others = {
            other: self._sockets.own(other)
            for other in range(1, self._count + 1)
            if other != number
        }  # fmt: skip
        status = self._sockets.status
        descriptors = [theirs.fileno(), *([] if status is None else [status.fileno()])]
        descriptors += [given.sock.fileno() for given in own]
        descriptors += [given.sock.fileno() for each in others.values() for given in each]
        environment = {
            name: value for name, value in self._environment.items() if name not in OWN
        }  # fmt: skip
        environment[VARIABLE] = str(theirs.fileno())
        try:
            # In a session of its own: Ctrl-C at a terminal is for the supervisor alone, which has
            # the children drain.
            process = subprocess.Popen(
                self._command, env=environment, pass_fds=descriptors, start_new_session=True
            )
        except (OSError, ValueError) as error:
            log.error("process %d cannot be started: %s: %s", number, self._command[0], error)
            ours.close()
            self._act(self._roster.ended(id, 1, monotonic()))
            return
        finally:
            theirs.close()
        child = self._children[id] = Child(number, process, SupervisorEnd(ours))
        self._selector.register(child.end, selectors.EVENT_READ, id)
        self._send(child, {"hello": {
            "protocol": PROTOCOL,
            "number": number,
            "count": self._count,
            "tells_facts": number == 1 and (not self._roster.has_served or self._roster.renewing),
            "supervisor": os.getpid(),
            "began": self._began,
            "secret": self._secret,
            "sockets": _described(own),
            "others": {str(other): _described(each) for other, each in others.items()},
            "status": None if status is None else status.fileno(),
        }})  # fmt: skip

    def _go(self, action: roster.Go) -> None:
        """Let a child accept. It learns which hostnames agents are about to bring, from the one
        before, or else from another one: visits of these wait for the agents."""
        others = [process.id for process in self._roster.serving()]
        teller = action.predecessor or next(iter(others), None)
        if teller is None or teller not in self._children:
            self._order(action.id, "go", estate=None)
        else:
            self._estates[action.id] = teller
            self._order(teller, "estate")

    def _pass_estate(self, predecessor: int, estate: object) -> None:
        for successor, before in list(self._estates.items()):
            if before == predecessor:
                del self._estates[successor]
                self._order(successor, "go", estate=estate)

    def _on_channel(self, id: int, events: int) -> None:
        child = self._children[id]
        if events & selectors.EVENT_WRITE:
            child.end.flush()
        if events & selectors.EVENT_READ:
            self._read(id, child)

    def _read(self, id: int, child: Child) -> bool:
        """Whether there may be more to read."""
        try:
            messages = child.end.receive()
        except Broken as error:
            self._unwatch(child)
            self._report_broken(child, error)
            return False
        if messages is None:  # it ends: _reap() has its status soon
            self._unwatch(child)
            return False
        for message in messages:
            self._on_message(id, child, message)
        return bool(messages)

    def _unwatch(self, child: Child) -> None:
        with contextlib.suppress(KeyError, ValueError):
            self._selector.unregister(child.end)

    def _on_message(self, id: int, child: Child, message: Message) -> None:
        if "said" in message:
            if "seconds" in message:
                until = monotonic() + float(message["seconds"]) + roster.LAST_JOBS
                self._roster.drains(id, until)
            self._act(self._roster.said(id, str(message["said"]), monotonic()))
        elif "estate" in message:
            self._pass_estate(id, message["estate"])
        elif "to" in message:
            self._pass_on(child.number, message)
        elif "call" in message:
            reply = self._shared.call(id, str(message.get("name")), message.get("with"))
            self._send(child, {"reply": message["call"], **reply})
            for to, told in self._shared.messages():
                if to in self._children:
                    self._send(self._children[to], {"board": told})
        else:
            log.debug("process %d said %s", child.number, on_one_line(repr(message), 100))

    def _pass_on(self, number: int, message: Message) -> None:
        """A message of one child to another's serving process, or to all others' (0)."""
        to = message.get("to")
        for process in self._roster.serving():
            if process.number == to or to == 0 and process.number != number:
                child = self._children.get(process.id)
                if child is not None:
                    self._send(child, {"from": number, "body": message.get("body")})

    def _reap(self) -> None:
        for id, child in list(self._children.items()):
            status = child.process.poll()
            if status is not None:
                while self._read(id, child):  # its last words
                    pass
                self._unwatch(child)
                child.end.close()
                del self._children[id]
                self._watched.pop(id, None)
                self._pass_estate(id, None)
                self._shared.gone(id)
                self._act(self._roster.ended(id, status, monotonic()))
            else:
                self._watch(id, child)

    def _watch(self, id: int, child: Child) -> None:
        events = selectors.EVENT_READ | selectors.EVENT_WRITE * child.end.wants_to_write
        if self._watched.get(id, selectors.EVENT_READ) != events:
            with contextlib.suppress(KeyError, ValueError):
                self._selector.modify(child.end, events, id)
                self._watched[id] = events

    def _tell_processes(self) -> None:
        """Tell the children about all of them, if anything has changed."""
        told = [
            {
                "process": process.number,
                "pid": self._children[process.id].process.pid,
                "state": process.stage.name.lower(),
                "restarts": self._roster.slots[process.number].restarts,
            }
            for process in self._roster.processes.values()
            if process.id in self._children
        ]
        ready = self._roster.has_served and not self._roster.stopping
        message: Message = {"processes": told, "ready": ready}
        if self._told != message:
            self._told = message
            for child in list(self._children.values()):
                self._send(child, message)


def _described(sockets: Iterable[Given]) -> list[list[Any]]:
    return [[given.sock.fileno(), given.name, given.by_systemd] for given in sockets]
