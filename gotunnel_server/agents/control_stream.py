"""An agent's control stream: whole messages in, whole messages out."""

import contextlib
import logging
import threading
from collections.abc import Callable

from gotunnel import (
    CERTIFICATES,
    REASONS,
    Ack,
    Certificate,
    End,
    Free,
    Members,
    MessageReader,
    Ping,
    Port,
    SessionClosed,
    Stream,
    encode_message,
)
from gotunnel_agent.common.one_line import on_one_line

log = logging.getLogger("gotunnel.control_stream")

MOST_SHOWN = 50  # characters of an unknown message's type


class ControlStream:
    """The first stream of an agent's session.

    Invariants: The ack is the first message, because a Go agent takes the first one for it. A
    message of an extension goes only to an agent whose ack named that extension. Of two states of a
    certificate the later one is told last.
    """

    def __init__(self, stream: Stream, agent: str):
        """``agent`` names the agent in the log."""
        self.stream = stream
        self._agent = agent
        self.received = 0  # bytes
        self._reader = MessageReader(self._ignore)
        self._features: frozenset[str] = frozenset()  # extensions that the ack named; set once
        # Held while the state of a certificate is looked up and told: else an older state could be
        # told last.
        self._newest = threading.Lock()

    def read(self) -> list:
        """The messages that have come. One thread at a time; does not wait. Raises ProtocolError,
        and SessionClosed if the agent has ended the stream."""
        messages: list = []
        try:
            while data := self.stream.read(timeout=0):
                self.received += len(data)
                messages += self._reader.feed(data)
        except TimeoutError:
            return messages
        if not messages:
            raise SessionClosed("the agent ended the control stream")
        return messages

    def _ignore(self, kind: str) -> None:
        kind = on_one_line(kind, MOST_SHOWN)
        log.debug("%s: messages of the unknown type %s are ignored", self._agent, kind)

    def acknowledge(self, ack: Ack) -> None:
        """Send the ack of a granted registration. Waits for room; raises OSError."""
        self.stream.write(encode_message(ack))
        self._features = frozenset(ack.features)

    def send(self, message: Ack | Certificate | End | Free | Members | Ping | Port) -> None:
        """Send a message. Any thread; raises OSError, also if there is no room for it now."""
        self.stream.write(encode_message(message), timeout=0)

    def tell(self, message: Certificate | End | Ping) -> None:
        """Send a message that may get lost. Any thread; does not wait."""
        with contextlib.suppress(OSError):  # the agent has left, or does not read
            self.send(message)

    def tell_certificate(self, hostname: str, state_of: Callable[[str], object]) -> None:
        """Tell how a certificate stands now: the text of ``state_of(hostname)``. Any thread; does
        not wait."""
        if CERTIFICATES in self._features:
            with self._newest:
                self.tell(Certificate(hostname, str(state_of(hostname))))

    def tell_end(self, end: End) -> None:
        """Tell why the session ends. Any thread; does not wait."""
        if REASONS in self._features:
            self.tell(end)
