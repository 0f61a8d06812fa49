"""An inspector, put together: the records of visits, and the server that shows them.

Threads, besides those of the server (server.py) and of replays (replay.py):

    inspect look   1   reads what has passed, LOOK seconds after the first byte   close()
"""

from __future__ import annotations

import errno
import logging
import os
import socket
import threading
from collections.abc import Mapping
from typing import Any

from gotunnel import NoThread, call_logged, spawn

from .. import home
from ..common.hostnames import MAX_PORT
from ..config import Inspect
from ..follow import Follower
from . import CannotInspect, Inspected, place
from .access import Door
from .api import Api
from .page import page
from .place import Place
from .record import Ring
from .recorder import Recorder
from .replay import Replayer
from .server import InspectorServer, listen
from .token_file import kept_token, new_token

log = logging.getLogger("gotunnel.start")

# Seconds from the first byte of a visit until it is read. To read pieces together costs the visits
# less than to read each at once.
LOOK = 0.1
REST = 0.001  # seconds, see Follower.look(): visits have the processor for most of the time
# The part of ``memory`` that records may take. The process takes about as much again for the gaps
# between them: after a flood of small visits, one of large bodies made it 1.8 times what it kept.
RECORDS_SHARE = 1 / 2
NEXT_PORTS = 20  # that are tried if one is in use
REACHED_BY = {"0.0.0.0": "127.0.0.1", "::": "::1"}  # all addresses: one that leads here


class Inspector:
    """It runs from the start on, until close()."""

    def __init__(
        self,
        agent: Inspected,
        settings: Inspect,
        *,
        next_port: bool = False,
        before: Inspector | None = None,
    ):
        """``before``: the inspector whose records this one takes over. Raises CannotInspect."""
        self.settings = settings
        self._agent = agent
        listening = _listen(settings, next_port)
        try:
            host, self.port = listening.getsockname()[:2]
            if before is None:
                self._recorder = Recorder(Ring(_budget(settings)), settings.body)
            else:
                self._recorder = before._recorder
            self._ring = self._recorder.ring
            self._replayer = Replayer(self._ring, self._routes, body=settings.body)
            token = _token(self.port)
            door = Door(token, host, self.port)
            site = Api(
                self._ring, door, self._tell, show=page, replays=self._replayer, body=settings.body
            )
            self._server = InspectorServer(listening, door, site)
        except BaseException:
            listening.close()
            raise
        self._place = Place(REACHED_BY.get(host, host), self.port, token, os.getpid())
        self.address, self.url = f"http://{self._place.address}/", self._place.url
        self._over = threading.Event()
        self._made_follower: bool = (
            agent.follower is None if before is None else before._made_follower
        )
        self._follower = agent.follower or Follower(for_listeners=True)
        self._attach(before)
        try:
            self._server.start()
            self._thread = spawn("inspect look", self._look)
        except NoThread as error:
            self._detach()
            self._server.close()
            raise CannotInspect(f"inspect: {error}") from None
        place.write(home.state_folder(), self._place)

    def _attach(self, before: Inspector | None) -> None:
        """Have the agent's visits recorded."""
        if before is not None:
            self._ring.set_budget(_budget(self.settings))
            self._recorder.body = self.settings.body
            return
        self._follower.add(self._recorder)
        self._agent.follower = self._follower

    def _detach(self) -> None:
        """Record no more. Visits that go on are heard no more, as their records are gone."""
        self._follower.remove(self._recorder)
        if self._made_follower and self._agent.follower is self._follower:
            self._agent.follower = None
        self._ring.clear()

    def replace(self, settings: Inspect) -> Inspector:
        """See Started."""
        if (settings.host, settings.port) != (self.settings.host, self.port):
            inspector = Inspector(self._agent, settings, before=self)
            self._stop()
            return inspector
        self._stop()
        try:
            return Inspector(self._agent, settings, before=self)
        except CannotInspect:
            self._detach()
            raise

    @property
    def closed(self) -> bool:
        return self._over.is_set()

    def close(self) -> None:
        """See Started."""
        self._detach()
        self._stop()

    def _stop(self) -> None:
        """Answer no more."""
        self._over.set()
        place.remove(home.state_folder(), self._place)
        self._follower.wake()
        self._replayer.close()
        self._server.close()
        self._thread.join()

    def _look(self) -> None:
        """Thread "inspect look": bring the records up to date while something passes."""
        while not self._over.is_set():
            self._follower.await_bytes(self._over)
            if not self._over.wait(LOOK):
                call_logged(self._follower.look, REST)
                call_logged(self._recorder.refresh)

    def _routes(self) -> Mapping[str, Any]:
        return self._agent.snapshot().routes

    def _tell(self) -> Mapping[str, object]:
        """What the page shows of the agent."""
        snapshot = self._agent.snapshot()
        tunnels = [
            {
                "hostname": hostname,
                "target": str(route.tunnel.target),
                "url": route.address(hostname),
                "health": snapshot.health.get(hostname),  # see Snapshot; None: it is not checked
            }
            for hostname, route in snapshot.routes.items()
        ]
        return {"tunnels": tunnels}


def _listen(settings: Inspect, next_port: bool) -> socket.socket:
    """Raises CannotInspect."""
    host, first = settings.host, settings.port
    last = min(first + NEXT_PORTS - 1, MAX_PORT) if next_port else first
    port = first
    while True:
        try:
            return listen(host, port)
        except OSError as error:
            in_use = error.errno == errno.EADDRINUSE
            if in_use and port < last:
                port += 1
                continue
            # create_server() adds the address, which stands here already.
            why = (error.strerror or str(error)).partition(" (while")[0]
            if in_use:
                why += "; another agent's inspector or another program has it: choose another port"
            where = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
            raise CannotInspect(f"inspect: {where}: {why}") from None


def _budget(settings: Inspect) -> int:
    return int(settings.memory * RECORDS_SHARE)


def _token(port: int) -> str:
    try:
        return kept_token(home.state_folder(), port)
    except OSError as error:
        log.warning("the inspector's token cannot be written to %s (%s); it has another one after "
                    "the next start", home.state_folder(), error.strerror or error)  # fmt: skip
        return new_token()
