"""The interface of a visitor's request, the same for every protocol that visitors speak.

sites.py reads the attributes, and decides what the request gets. exchange.py calls the methods: it
reads the body and sends the answer. `http1_server.Http1Request` implements it for HTTP/1.1,
`http2_request.Http2Request` for HTTP/2; tests use plain objects.
"""

from collections.abc import Callable, Iterable
from typing import NamedTuple, Protocol

from gotunnel import Ends, Stream
from gotunnel_agent.common.http1 import Fields

from ..routes import Route, Tunnel
from .login import Owner
from .pages import Templates
from .visit import Visit

# Bytes a second, on average over IDLE_TIMEOUT or STALL_TIMEOUT, that a visitor must send of a body
# or read of an answer while others need its place (Request.crowded()). Kestrel and IIS demand the
# same rate, but always. It does not apply to relays, nor to slow targets.
LEAST_BYTE_RATE = 240


class VisitorGone(Exception):
    """The visitor has left or cut its request short, so nobody reads an answer."""


class AgentLost(Exception):
    """The tunnel of a request's route takes no visit any more. Nothing of the request is lost: it
    may be served by the next tunnel of its hostname."""

    def __init__(self, tunnel: Tunnel | None):
        """``tunnel``: None if the route is gone already."""
        super().__init__("the agent has left")
        self.tunnel = tunnel


class Upgraded(NamedTuple):
    """The target has answered 101 on ``stream``. ``half_close``: the agent passes a FIN on to the
    target. ``done()`` is called when the visit is over; None: there is nothing to call."""

    stream: Stream
    half_close: bool
    done: Callable[[], object] | None = None


class Connect(NamedTuple):
    """A CONNECT request is granted: its connection becomes a visit in tcp mode to ``route``."""

    route: Route


class FeedEnd(Protocol):
    """The visitor's end of a Feed. write() waits for a visitor that reads slowly; it raises OSError
    if the connection is broken, TimeoutError if nothing is read. finish() ends the answer."""

    def write(self, data: bytes, /) -> None: ...

    def finish(self) -> None: ...


class Feed(NamedTuple):
    """The rest of the answer is written by ``run(end, gone)``, in a thread of its own, for as long
    as it likes: it holds no worker. ``gone()``: whether the visitor has left; any thread may ask,
    as long as run() goes on.
    ``give_up()`` is called instead if there is no thread to be had."""

    run: Callable[[FeedEnd, Callable[[], bool]], None]
    give_up: Callable[[], None]


Onward = Upgraded | Connect | Feed  # to what a connection switches: see Request.switch()


class Request(Protocol):
    """One request, and the way back to its visitor.

    One thread at a time calls read_body(); one other thread calls the other methods. A method that
    sends or reads raises OSError if the visitor's connection is broken. Sending waits for a visitor
    that reads slowly; if it reads nothing for too long, or less than LEAST_BYTE_RATE, the
    connection is reset and TimeoutError is raised.

    The order of an answer: any number of send_interim(); send_head(); any number of send_data();
    finish(). Or switch() in place of send_head(). abort() may come at any time.
    """

    method: str
    hostname: str  # lower case, no port, no trailing dot; "" if the request names none
    authority: str  # hostname and perhaps port, as the visitor wrote it
    path: str  # with the query, in origin-form; "*" of an OPTIONS, "" of a CONNECT
    fields: Fields  # as received, with the hop-by-hop ones
    scheme: str  # "https" or "http"
    sni: str | None  # the hostname in the ClientHello, None without one
    owner: Owner | None  # see login.py; None if the connection serves several visitors (a proxy)
    visit: Visit | None  # its record; None if visits are not recorded
    templates: Templates  # of the operator's own error pages
    peer: str  # IP address of the other end of the connection
    wants_upgrade: bool  # to a protocol in its Upgrade field
    has_body: bool
    body_length: int | None  # bytes, None if not known beforehand
    trailers: Iterable[tuple[str, str]]  # complete when the body is
    idle_timeout: float  # seconds that the visitor may send nothing while its body is awaited
    may_wait: bool  # whether the visit may wait for another tunnel: see AgentLost

    @property
    def body_complete(self) -> bool:
        """Whether read_body() has returned the whole body, or there is none."""

    def ends(self) -> Ends:
        """The two ends of the visitor's connection, for a target that wants to know them."""

    def read_body(self, timeout: float) -> list[bytes]:
        """The next decoded pieces of the body, in order; an empty list only at the body's end.
        Where one piece ends and the next begins has no meaning.

        Raises TimeoutError if no piece arrives in ``timeout`` seconds (0: none is here yet); a part
        of a piece is kept for the next call. Raises VisitorGone, http1.Malformed.
        """

    def unread_body(self, pieces: list[bytes]) -> None:
        """Give back all that read_body() has returned: AgentLost follows, and the next try reads
        the body from its beginning."""

    def crowded(self) -> bool:
        """Whether other visitors need the places of slow ones, which then must reach
        LEAST_BYTE_RATE."""

    def send_interim(self, status: int, reason: str, fields: list[tuple[str, str]]) -> None:
        """Send an answer before the final one (1xx, but not 101), if the protocol has such."""

    def send_head(
        self, status: int, reason: str, fields: list[tuple[str, str]], length: int | None
    ) -> None:
        """Begin the final answer. The head may stay here until send_data() or finish().

        ``fields`` has no hop-by-hop field and no length; the method may change the list.
        ``length``: bytes of the body, None if not known: then the protocol's framing marks the end.
        An answer to HEAD, and one with status 204 or 304, has no body; there ``length`` is the
        value of its Content-Length.
        """

    def send_data(self, pieces: list[bytes]) -> None:
        """Send the head, if it is still here, and pieces of the body; an empty list is allowed."""

    def finish(self, pieces: list[bytes], trailers: Iterable[tuple[str, str]] = ()) -> None:
        """Send the last pieces of the body, and end the answer."""

    def refuse_body(self) -> None:
        """Tell the visitor to stop sending its body: the answer is complete. Bytes that still come
        are read and dropped later. Does not wait, and never raises."""

    def abort(self) -> None:
        """Reset the answer, so that the part that was sent does not look complete. Wakes a thread
        in read_body(), which then raises. Never raises itself."""

    def gone(self) -> bool:
        """Whether the visitor has left, as far as is known now. Allowed while another thread is in
        read_body()."""

    def switch(
        self,
        status: int,
        reason: str,
        fields: list[tuple[str, str]],
        data: bytes,
        onward: Onward,
    ) -> bool:
        """Send the final answer, and ``data`` behind it. From then on raw bytes flow between the
        visitor and ``onward``. False if there is no room for another relay; then nothing was sent.
        Call it only when the body is complete."""
