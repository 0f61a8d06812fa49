"""The visitors of the chaos bench: clients that try the next address, and check all that they get.

Each visit is noted with when it began and ended, and how. A visitor that cannot connect tries the
next gateway, as clients do that get several addresses from DNS. A request is sent again only if it
was sent on a kept connection that ended without a byte of an answer (RFC 9112 §9.3.1).
"""

import itertools
import random
import socket
import ssl
import threading
from collections import deque
from time import monotonic
from typing import NamedTuple

from chaos_targets import content


class Patience(NamedTuple):
    """Seconds for TCP and TLS, until the next address is tried; and for an answer."""

    connect: float
    answer: float


USUAL, PATIENT = Patience(1.0, 15.0), Patience(10.0, 45.0)
PAUSE = 0.03  # seconds between two visits of a visitor, on average
SMALL, LARGE = (1, 3000), (400_000, 1_200_000)  # bytes
SLOW_PIECE, SLOW_PAUSE = 64 * 1024, 0.05  # a slow reader's
WHOLE, FAILED, WRONG, HUNG = "whole", "failed", "wrong", "hung"


class Visit(NamedTuple):
    """``how`` names the failure. ``addresses``: gateways that could not be reached before."""

    hostname: str
    kind: str
    began: float
    ended: float
    end: str
    how: str
    gateway: str
    agent: str
    addresses: int


class Broken(Exception):
    """The visit failed, and the visitor can see how."""


class Stale(Exception):
    """A kept connection has ended without an answer."""


class Wrong(Exception):
    pass


class Site(NamedTuple):
    hostname: str
    agents: frozenset  # that may answer


class Connection:
    def __init__(self, port, hostname, context, patience=USUAL):
        sock = socket.create_connection(("127.0.0.1", port), patience.connect)
        try:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            self._sock = context.wrap_socket(sock, server_hostname=hostname)
        except (OSError, ValueError):
            sock.close()
            raise
        self._sock.settimeout(patience.answer)
        self._buffer = b""
        self.used = False
        self.closes = False

    def close(self):
        self._sock.close()

    def get(self, site, visit, size, pause="", slow=False):
        """One request; returns the name of the agent."""
        path = f"/{visit}/{size}" + (f"/{pause}" if pause else "")
        request = f"GET {path} HTTP/1.1\r\nHost: {site.hostname}\r\n\r\n".encode()
        used, self.used = self.used, True
        try:
            self._sock.sendall(request)
            head = self._head()
        except (ConnectionError, ssl.SSLError) as error:
            if used and not self._buffer:
                raise Stale from None
            raise Broken(f"no answer: {type(error).__name__}") from None
        except TimeoutError:
            raise TimeoutError("no answer") from None
        if head is None:
            raise Stale if used else Broken("an end without an answer")
        return self._check(site, visit, size, slow, *head)

    def _head(self):
        """Status and fields; None at the end."""
        while b"\r\n\r\n" not in self._buffer:
            data = self._sock.recv(64 * 1024)
            if not data:
                if self._buffer:
                    raise Broken("an end within a head")
                return None
            self._buffer += data
        head, _, self._buffer = self._buffer.partition(b"\r\n\r\n")
        line, *lines = head.decode("latin-1").split("\r\n")
        pairs = (each.partition(":") for each in lines)
        return int(line.split()[1]), {name.lower(): value.strip() for name, _, value in pairs}

    def _check(self, site, visit, size, slow, status, fields):
        self.closes = fields.get("connection", "").lower() == "close"
        if status != 200:
            self.closes = True
            raise Broken(f"{status} {fields.get('x-gotunnel-error', '')}".strip())
        agent = fields.get("x-agent", "?")
        if agent not in site.agents:
            raise Wrong(f"{site.hostname} was answered by the agent {agent}")
        if fields.get("content-length") != str(size):
            raise Wrong(f"{fields.get('content-length')} bytes are told, expected {size}")
        body = self._body(size, slow)
        if body != content(site.hostname, visit, size):
            raise Wrong(f"{size} bytes came that are not those of this visit")
        return agent

    def _body(self, size, slow):
        body = bytearray(self._buffer)
        self._buffer = b""
        pause = threading.Event()
        while len(body) < size:
            try:
                data = self._sock.recv(SLOW_PIECE)
            except TimeoutError:
                raise TimeoutError("the rest of a body") from None
            except OSError as error:
                raise Broken(f"cut: {type(error).__name__}") from None
            if not data:
                raise Broken("cut: an end within a body")
            body += data
            if slow:
                pause.wait(SLOW_PAUSE)
        return bytes(body)


class Visitors:
    """``start()``, then ``stop()``. ``visits`` grows meanwhile."""

    def __init__(self, sites, gateways, context, count=8, seed=1, patience=USUAL):
        """``gateways``: name to port, in the order of the addresses."""
        self.patience = patience
        self.sites, self.gateways, self.context = sites, gateways, context
        self.visits = deque()
        self.under_way = {}  # number of a visitor: (since when, hostname, kind)
        self._stop = threading.Event()
        self._numbers = itertools.count()
        self._threads = [
            threading.Thread(target=self._run, args=(number, f"{seed} {number}"),
                             name=f"visitor {number}", daemon=True)
            for number in range(count)
        ]  # fmt: skip

    def start(self):
        for thread in self._threads:
            thread.start()

    def stop(self):
        self._stop.set()
        for thread in self._threads:
            thread.join(self.patience.connect * 4 + self.patience.answer + 10)
        return [thread.name for thread in self._threads if thread.is_alive()]

    def _run(self, number, seed):
        chance = random.Random(seed)
        kind = ("small", "small", "kept", "slow")[number % 4]
        first = number % len(self.gateways)
        names = [*self.gateways][first:] + [*self.gateways][:first]
        kept = {}
        while not self._stop.is_set():
            site = chance.choice(self.sites)
            self.visits.append(self.visit(number, chance, kind, site, names, kept))
            self._stop.wait(chance.uniform(0, 2 * PAUSE))
        for connection in kept.values():
            connection.close()

    def visit(self, number, chance, kind, site, names, kept):
        visit = f"v{number}x{next(self._numbers)}"
        size = chance.randrange(*(LARGE if kind == "slow" else SMALL))
        began = monotonic()
        self.under_way[number] = (began, site.hostname, kind)
        connection = kept.pop(site.hostname, None)
        failed = 0
        gateway = names[0]
        end, how, agent = WHOLE, "", ""
        try:
            while True:
                if connection is None:
                    gateway, connection, failed = self._connect(site.hostname, names)
                try:
                    agent = connection.get(site, visit, size, slow=kind == "slow")
                    break
                except Stale:
                    connection.close()
                    connection = None
        except Broken as error:
            end, how = FAILED, str(error)
        except Wrong as error:
            end, how = WRONG, str(error)
        except TimeoutError as error:
            end, how = HUNG, str(error)
        if connection is not None and (kind != "kept" or end != WHOLE or connection.closes):
            connection.close()
        elif connection is not None:
            kept[site.hostname] = connection
        del self.under_way[number]
        return Visit(site.hostname, kind, began, monotonic(), end, how, gateway, agent, failed)

    def _connect(self, hostname, names):
        reasons = []
        for count, name in enumerate(names):
            try:
                port = self.gateways[name]
                return name, Connection(port, hostname, self.context, self.patience), count
            except (OSError, ValueError) as error:
                reasons.append(type(error).__name__)
        raise Broken(f"no address answers: {', '.join(sorted(set(reasons)))}")
