"""A visitor's request, in whatever protocol it came: all that the rest of the gateway knows of it.

`sites` decides by its attributes what it gets; `exchange` reads its body and gives its answer by
its methods. `http1_server.Http1Request` is a Request in HTTP/1.1; a test's is a plain object.
"""

from collections.abc import Iterable
from typing import Protocol

from gotunnel import Ends
from gotunnel_agent.common.http1 import Fields

from .login import Owner

# Bytes a second that a visitor must send of a body, or read of an answer, while others need its
# place (Request.crowded), in the long run: over IDLE_TIMEOUT or STALL_TIMEOUT. Kestrel and IIS ask
# for as much, always. Relays and slow targets are not held to it.
LEAST_BYTE_RATE = 240


class VisitorGone(Exception):
    """The visitor has left, or broke off its request: there is no one to answer."""


class Request(Protocol):
    """One request, and the way back to its visitor.

    One thread at a time calls read_body(), one other thread the other methods. A method that sends
    or reads raises OSError if the visitor's connection is broken; sending waits for a visitor
    that reads slowly, and raises TimeoutError if it reads nothing for too long, or almost nothing
    (LEAST_BYTE_RATE); then what was sent is reset.

    The answer is: any number of send_interim(); send_head(); any number of send_data(); finish().
    Or switch() instead of send_head(). Or abort(), at any time.
    """

    method: str
    hostname: str  # whose it is: lower case, no port, no trailing dot; "" if it names none
    authority: str  # hostname and perhaps port, as the visitor wrote it
    path: str  # with its query, in origin-form, or "*"; "" of a CONNECT
    fields: Fields  # as they came, those of the visitor's connection included
    scheme: str  # "https" or "http"
    sni: str | None  # hostname of the ClientHello, None if there was none
    owner: Owner | None  # of a stream, for logins; None: the connection brings several visitors
    peer: str  # IP address of the connection that brought it
    wants_upgrade: bool  # to the protocols in its Upgrade field
    has_body: bool
    body_length: int | None  # bytes, None if it is not known beforehand
    body_complete: bool  # read_body() has returned all of the body, or there is none
    trailers: Iterable[tuple[str, str]]  # complete once the body is
    idle_timeout: float  # seconds that its visitor may send nothing of a body that is awaited

    def ends(self) -> Ends:
        """The two ends of the visitor's connection, for a target that wants to know."""

    def read_body(self, timeout: float) -> list[bytes]:
        """The next pieces of the body that have come, decoded, in order; none only at its end.
        Where one piece ends and the next begins has no meaning.

        Raises TimeoutError if there is none in ``timeout`` seconds (0: none is here); a part of
        one is kept for the next call. Raises VisitorGone, http1.Malformed.
        """

    def crowded(self) -> bool:
        """Whether others need a slow visitor's place: then it must reach LEAST_BYTE_RATE."""

    def send_interim(self, status: int, reason: str, fields: list[tuple[str, str]]) -> None:
        """An answer before the final one (1xx, but not 101), if the visitor's protocol has such."""

    def send_head(
        self, status: int, reason: str, fields: list[tuple[str, str]], length: int | None
    ) -> None:
        """Begin the final answer. It may wait for the first send_data() or finish().

        ``fields`` concern no connection and say no length; the list is the callee's from here on.
        ``length``: bytes of the body, None if that is not known, and the protocol says how it
        ends. An answer to HEAD, and one with status 204 or 304, has no body: then ``length`` is
        what its Content-Length said.
        """

    def send_data(self, pieces: list[bytes]) -> None:
        """Send pieces of the body, and all that has waited, also if there are no ``pieces``."""

    def finish(self, pieces: list[bytes], trailers: Iterable[tuple[str, str]] = ()) -> None:
        """The last pieces of the body, and the end of the answer."""

    def refuse_body(self) -> None:
        """The answer was given, the body is still on its way and not wanted: tell the visitor.
        What comes is still read. Waits for nothing, and never raises."""

    def abort(self) -> None:
        """What was sent must not look whole: reset it. Wakes a read_body(), which then raises.
        Never raises."""

    def gone(self) -> bool:
        """Whether the visitor has left, as far as can be told at once; also while another thread
        is in read_body()."""

    def switch(
        self, status: int, reason: str, fields: list[tuple[str, str]], data: bytes, onward: object
    ) -> bool:
        """The final answer: from here on raw bytes flow between the visitor and ``onward`` (after
        101 an exchange.Upgraded; after CONNECT a sites.Connect), first of all ``data`` to the
        visitor. False if there is no room for it, then nothing was sent. The body has come."""
