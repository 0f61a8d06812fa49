"""The door to HTTP/2: the one module of it that is loaded without the extra http2.

The rest is loaded when a gateway is built that offers HTTP/2. So another one needs neither the
library hpack nor the memory for all of it.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

from gotunnel_agent.common.packages import HPACK, Fault, fault

from .sites import Site
from .visitor import Visitor

PROTOCOL = "h2"  # its name in ALPN (RFC 9113 §3.1)


def lacks() -> Fault | None:
    """What is wrong with the library hpack, which the extra http2 brings; None if it will do."""
    return fault(HPACK)


class Http2:
    """What all HTTP/2 connections of a gateway share: their reader, and the memory for uploads."""

    def __init__(self) -> None:
        package = __package__
        self._server: Any = import_module(f"{package}.http2_server")
        self.growth = import_module(f"{package}.http2_windows").Growth()
        self.reader = import_module(f"{package}.http2_reader").Reader()
        self.drain = self.reader.drain  # drain()
        self.stop = self.reader.stop  # stop(timeout)

    def serve(self, port: Any, visitor: Visitor, site: Site, scheme: str) -> None:
        """Serve a connection whose handshake has chosen PROTOCOL; from then on it is the reader's.
        ``port``: an http2_server.Port. Raises OSError, NoThread; then it is still the caller's."""
        connection = self._server.Http2Connection(port, self, visitor, site, scheme)
        visitor.fail_visits = connection.fail_visits
        visitor.cut_visits = connection.cut_visits
        connection.start()
