"""The record of one visit, for the access log, the metrics and the dashboard. A value, no I/O.

A visit is one HTTP request with its answer, or one connection in tcp mode. An upgraded connection
(WebSocket) and a CONNECT are one visit each, from the request's head to the relay's end. Visits
(visits.py) begins the record, the parts that serve the visit fill it, and end() hands it to the
subscribers. Without subscribers there is no record: `visit` is None everywhere.
"""

from __future__ import annotations

from typing import Protocol

from gotunnel_agent.common.http1 import Fields

from ..routes import Route
from . import forwarded
from .forwarded import Proxies
from .request_id import request_id

TCP = "tcp"  # the protocol of visits in tcp mode
# Words in ``error`` for visits that were cut short, beside the codes of pages.py. If both ends of a
# relay break, the word of the first one stays.
LEFT = "visitor-left"  # the visitor's connection broke, or it left before it was answered
SLOW = "visitor-slow"  # the visitor read too slowly, or nothing; its connection was reset
CUT = "cut-short"  # the target or its agent broke off
STOPPED = "gateway-stopped"  # the visit outlasted DRAIN_TIMEOUT
BLOCKED = "blocked"  # the operator has blocked the visitor's address meanwhile
BUG = "gateway-bug"  # a bug of the gateway; the log has the traceback
# Status of a visit whose visitor left before an answer began. nginx has introduced it, and programs
# that read access logs know it.
CLIENT_CLOSED = 499
# Hostnames whose visits are counted by name, the rest together (counts.py). An agent may register
# as many as MAX_HOSTS_PER_AGENT says, and each has some 25 lines in a scrape.
MOST_HOSTNAMES = 500
MOST_NAME = 100  # characters of an agent's name, which may be any characters


def has_failed(status: int, error: str) -> bool:
    """Whether the gateway's side or the target's failed: status 5xx, or cut by one of them. Not if
    the visitor left."""
    return status >= 500 or error in (CUT, STOPPED, BUG)


class Visits(Protocol):
    """What a Visit needs of the visits.Visits that began it."""

    proxies: Proxies
    proxied: bool  # there are any proxies
    ids: bool  # requests get an X-Request-Id
    detailed: bool  # a subscriber reads referer and user_agent

    def emit(self, visit: Visit, /) -> None: ...


class Visit:
    """One visit. Filled by the threads that serve it, one at a time; of a relay's two threads each
    fills fields of its own. Not changed any more once end() was called."""

    # Values before more is known. A malformed head leaves some of them.
    hostname = ""  # that the visitor asked for, in lower case, unchecked: any characters
    method = ""  # "" in tcp mode
    path = ""  # with the query; of a CONNECT host and port
    protocol = ""  # such as HTTP/1.1; TCP in tcp mode
    scheme = ""  # https or http; "" in tcp mode
    referer = user_agent = ""  # fields of the request, as they came
    request_id = ""  # see request_id.py; "" if none was made
    status = 0  # of the final answer; in tcp mode the one that a page would have had, or 200
    error = ""  # X-Gotunnel-Error's code, or one of the words above; "" if all went well
    received = sent = 0  # payload bytes of the visitor's connection: heads, bodies, relayed bytes
    first_byte_at: float | None = None  # monotonic, when the answer's head, or first byte, was sent
    stream = 0  # the data stream's id in the agent's session, which its log names; 0: none was used
    route: Route | None = None  # None if the visit was not for a route, or refused before
    at = 0.0  # wall-clock seconds when it began; set for the subscribers
    duration = 0.0  # seconds; set at the end
    is_local = False  # the gateway itself has served it: the dashboard
    ended = False

    def __init__(self, visits: Visits, visitor: str, began: float):
        """``visitor``: the IP address of the connection. ``began``: monotonic seconds."""
        self.visitor = visitor  # "" if a trusted proxy hides it
        self.began = began
        self._peer = visitor
        self._visits = visits

    @property
    def agent(self) -> str:
        """The name of the agent that served the visit, its address if it has none; "" if no agent
        was asked."""
        if self.route is None:
            return ""
        agent = self.route.tunnel.agent
        name: str = agent.identity.issuer[:MOST_NAME] or agent.host
        return name

    @property
    def failed(self) -> bool:
        """As has_failed()."""
        return has_failed(self.status, self.error)

    @property
    def first_byte(self) -> float | None:
        """Seconds until the answer began, None if it did not."""
        return None if self.first_byte_at is None else self.first_byte_at - self.began

    def describe(
        self, method: str, hostname: str, path: str, protocol: str, scheme: str, fields: Fields
    ) -> None:
        """Note the head of the request. Of a malformed head some arguments may be empty."""
        self.method, self.hostname, self.path = method, hostname, path
        self.protocol, self.scheme = protocol, scheme
        visits, peer = self._visits, self._peer
        trusted = visits.proxied and peer in visits.proxies
        if trusted:
            self.visitor = forwarded.visitor(fields, peer, visits.proxies)
        if visits.ids and not self.request_id:  # a request that waits is read twice
            self.request_id = request_id(fields, trusted)
        if visits.detailed:
            named = fields.named
            if "referer" in named:
                self.referer = named["referer"][0]
            if "user-agent" in named:
                self.user_agent = named["user-agent"][0]

    def fail(self, error: str, status: int = CLIENT_CLOSED) -> None:
        """Note why the visit is cut short; the first reason counts. ``status`` is for a visit
        without an answer."""
        self.error = self.error or error
        self.status = self.status or status

    def end(self) -> None:
        """The visit is over, and is for the subscribers now. Further calls do nothing."""
        if not self.ended:
            self.ended = True
            self._visits.emit(self)
