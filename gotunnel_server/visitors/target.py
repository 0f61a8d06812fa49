"""The interface of a target's side of an exchange, the same for every protocol that targets speak.

exchange.py forwards a request by it: it hands over the fields, and gets the answer's head, body and
trailers. `Http1Target` and `Http2Target`, each in a module of its own, implement it.
"""

from collections.abc import Callable, Iterable
from typing import Any, Protocol

from gotunnel import Stream
from gotunnel_agent.common.http1 import Response

from . import pages


class TargetFailed(Exception):
    """The target gave no answer that can be passed on; ``page`` tells the visitor.
    ``detail`` is for the log only: it may quote what the visitor must not learn."""

    def __init__(self, status: int, code: str, text: str, detail: str = ""):
        super().__init__(f"{text} {detail}".rstrip())
        self.page = pages.error(status, code, text)


class Unprocessed(ConnectionError):
    """The target has not begun with the request, and says so: it may be sent once more."""


class Target(Protocol):
    """One request to a target, and its answer.

    The order: opening(), and once more if another stream is needed; carried_by(), if the stream is
    new. Then read_head() until it returns a final head, and pass_body(). Meanwhile the upload
    calls framed() and send_body(), perhaps in a thread of its own. reset() may come at any time,
    in either thread.
    """

    # Waits for ``timeout`` seconds for something of the answer; b"" at the end of the stream.
    # Raises TimeoutError, ConnectionError. Set by opening() or carried_by().
    read: Callable[..., Any]
    arrived: Any  # what read() has returned, and is not used yet
    unsent: bool  # part of what framed() got must be sent by send_body()
    # Of the final answer; known when read_head() has returned it:
    length: int | None  # as Request.send_head() wants it
    # Known when pass_body() has returned:
    trailers: Iterable[tuple[str, str]]
    reusable: bool  # the stream may carry another request of the same visitor
    shareable: bool  # ... of any visitor

    def opening(self, stream: Stream | None) -> bytes:
        """The first bytes of the request, for a stream that carried others before; or for a new
        one (None)."""

    def carried_by(self, stream: Stream) -> None:
        """``stream`` is new, and has opening() already."""

    def framed(self, pieces: list[bytes]) -> bytes:
        """The next pieces of the request's body, as they go over the stream. They are the last
        ones if the body is complete."""

    def send_body(self, pieces: list[bytes], timeout: float) -> None:
        """Send the next pieces, and what is unsent. Raises TimeoutError if the target takes nothing
        for ``timeout`` seconds, OSError if it wants no more."""

    def read_head(self) -> Response:
        """The next head of the answer: an interim one (1xx), or the final one. Raises Malformed,
        TargetFailed and what ``next`` raises."""

    def pass_body(self, send: Callable[[list[bytes]], None]) -> list[bytes]:
        """Send the answer's body as it comes, except for its last pieces. They are returned, so
        that a small answer leaves in one write together with its head. Raises as read_head(), and
        what ``send`` raises."""

    def reset(self) -> None:
        """Make the target stop working on the request. Wakes a thread that reads or sends."""
