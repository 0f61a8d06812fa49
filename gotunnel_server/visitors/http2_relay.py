"""One stream of an HTTP/2 connection as a visitor with a connection of its own, for relays.py.

A WebSocket (RFC 8441) or a CONNECT request takes one stream. In a relay its DATA frames are the
bytes, END_STREAM is the half-close, and RST_STREAM is the reset (RFC 9113 §8.5).
"""

from __future__ import annotations

from typing import Protocol

from gotunnel import Ends

from ..net.listener import Address
from ..net.shares import Shares
from .http2_screen import Code
from .postgres import CancelKeys
from .request import VisitorGone
from .visit import CLIENT_CLOSED, LEFT, Visit


class Stream(Protocol):
    """What a StreamEnd needs of its http2_server.Http2Request, which explains the methods."""

    def read(self, timeout: float | None) -> bytes: ...

    def send_raw(self, data: bytes, end: bool = False) -> None: ...

    def end(self, code: Code, why: str) -> None: ...

    def stop_reading(self) -> None: ...

    def gone(self) -> bool: ...

    def leave(self) -> None: ...


class StreamEnd:
    """The visitor's end of a relay, as a Duplex is for other visitors: the same methods, which
    raise OSError if the stream is broken."""

    def __init__(self, stream: Stream):
        self._stream = stream
        self._finished = False

    def read(self) -> bytes:
        try:
            return self._stream.read(None)
        except VisitorGone as error:
            raise ConnectionResetError(str(error)) from None

    def write(self, data: bytes) -> None:
        try:
            self._stream.send_raw(data)
        except VisitorGone as error:
            raise BrokenPipeError(str(error)) from None

    def finish(self) -> None:
        if not self._finished:
            self._finished = True
            try:
                self._stream.send_raw(b"", end=True)
            except VisitorGone as error:
                raise BrokenPipeError(str(error)) from None

    def died(self) -> bool:
        return self._stream.gone()

    def stop_reading(self) -> None:
        self._stream.stop_reading()

    def cut(self) -> None:
        """Reset the stream. What was written has left before: frames of a stream keep their
        order."""
        self._stream.end(Code.CANCEL, "cut")

    reset = stop = cut

    def cut_unless_finished(self) -> None:
        """Nothing to do: without END_STREAM the visitor does not take the data for complete."""

    def close(self) -> None:
        self._stream.leave()


class Owner(Protocol):
    """What a StreamVisitor needs of the visitor.Visitor of the whole connection."""

    @property
    def address(self) -> Address: ...

    @property
    def sni(self) -> str | None: ...

    @property
    def relays(self) -> Shares: ...

    def ends(self) -> Ends: ...

    def refuse_relay(self) -> None: ...


class StreamVisitor:
    """A relays.Party."""

    cancel_keys: CancelKeys | None = None

    def __init__(self, owner: Owner, end: StreamEnd, visit: Visit | None):
        self.duplex = end
        self.visit = visit
        self.address = owner.address
        self.sni = owner.sni
        self.ends = owner.ends
        self._owner = owner
        self._holds_relay = False

    def __str__(self) -> str:
        return str(self._owner)

    def claim_relay(self) -> bool:
        """Count the stream as a relay; False if there is no room for another one."""
        self._holds_relay = self._owner.relays.enter(self.address[0])
        if not self._holds_relay:
            self._owner.refuse_relay()
        return self._holds_relay

    def refuse_introduction(self, data: bytes) -> None:
        """Nothing: only the first bytes of a TCP connection can be a PROXY header."""

    def fail_visit(self, error: str, status: int) -> None:
        if self.visit is not None:
            self.visit.fail(error, status)

    def end_visit(self) -> None:
        visit, self.visit = self.visit, None
        if visit is not None:
            visit.end()

    def close(self) -> None:
        """Give back all that the relay holds."""
        self.fail_visit(LEFT, CLIENT_CLOSED)  # unless it has ended as it should
        if self._holds_relay:
            self._holds_relay = False
            self._owner.relays.leave(self.address[0])
        self.duplex.close()
