"""The resources that visitors of a port share: threads for requests, places, and timeouts."""

from typing import NamedTuple

from gotunnel_agent.common.duplex import STALL_TIMEOUT
from gotunnel_agent.common.process import Workers

from ..net.shares import Shares
from . import relays
from .forwarded import Proxies
from .http2 import Http2

# How many connections may be in a lingering close of PARTING_TIME (connection.py) at a time. Each
# address has a share; beyond it a connection has FULL_PARTING_TIME.
MAX_PARTING = 1024


class Timeouts(NamedTuple):
    """Seconds. ``header``: for a request's head, a ClientHello, a TLS handshake. ``idle``: between
    two requests, and for a visitor that sends nothing of a request's body. ``response``: from the
    whole request to the first byte of the target's answer. ``stall``: for a visitor that reads
    nothing."""

    header: float
    idle: float
    response: float
    stall: float = STALL_TIMEOUT


class Exchanges:
    """The threads that serve requests, and a place for each request that they serve."""

    def __init__(self, most: int, proxies: Proxies):
        self.room = Shares(most, proxies)
        self._workers = Workers(most, "exchange")
        self.prepare = self._workers.prepare
        self.start = self._workers.submit  # start(function)
        self.stop = self._workers.shutdown  # stop(timeout)


class Room:
    """The limits of requests, relays and lingering closes of one port, or of several together."""

    def __init__(self, requests: int, proxies: Proxies, *, http2: bool = False):
        """``requests``: how many are served at a time. ``proxies`` have no limit of their own,
        since each stands for many visitors. ``http2``: whether visitors may speak it."""
        self.exchanges = Exchanges(requests, proxies)
        self.relays = Shares(relays.MAX_RELAYS, proxies)
        self.parting = Shares(MAX_PARTING, proxies)
        self.http2 = Http2() if http2 else None
