"""An agent's control stream: whole messages in, whole messages out."""

import contextlib
import logging
import threading

from gotunnel import (
    CERTIFICATES,
    REASONS,
    Ack,
    Certificate,
    End,
    MessageReader,
    SessionClosed,
    encode_message,
)
from gotunnel_agent.common.one_line import on_one_line

log = logging.getLogger("gotunnel.control_stream")

MOST_SHOWN = 50  # characters of an unknown message's type


class ControlStream:
    """The first stream of an agent's session.

    Invariant: the ack comes before every other message, because a Go agent takes the first one for
    it. A message of an extension goes only to an agent whose ack has named that extension. Of two
    states of a certificate the later one is told last.
    """

    def __init__(self, stream, agent):
        """``agent`` is a text for the log."""
        self.stream = stream
        self._agent = agent
        self.received = 0  # bytes
        self._reader = MessageReader(self._pass_over)
        self._features = frozenset()  # the extensions that the ack has named; replaced once
        self._newest = threading.Lock()  # held to look a certificate's state up and to tell it

    def read(self) -> list:
        """The messages that have come. One thread at a time; does not wait. Raises ProtocolError,
        and SessionClosed if the agent has ended the stream."""
        messages = []
        try:
            while data := self.stream.read(timeout=0):
                self.received += len(data)
                messages += self._reader.feed(data)
        except TimeoutError:
            return messages
        if not messages:
            raise SessionClosed("the agent ended the control stream")
        return messages

    def _pass_over(self, kind):
        kind = on_one_line(kind, MOST_SHOWN)
        log.debug("%s: messages of type %s are passed over, nobody knows them", self._agent, kind)

    def acknowledge(self, ack: Ack):
        """Send the ack of a registration that is granted. Waits for room; raises OSError."""
        self.stream.write(encode_message(ack))
        self._features = frozenset(ack.features)

    def send(self, message):
        """Send a message if there is room for it now. Any thread; raises OSError."""
        self.stream.write(encode_message(message), timeout=0)

    def tell(self, message):
        """Send a message that may be lost. Any thread; does not wait."""
        with contextlib.suppress(OSError):  # the agent has gone, or does not read
            self.send(message)

    def tell_certificate(self, hostname, state_of):
        """Tell how a certificate stands now: the text of ``state_of(hostname)``. Any thread; does
        not wait."""
        if CERTIFICATES in self._features:
            with self._newest:
                self.tell(Certificate(hostname, str(state_of(hostname))))

    def tell_end(self, end: End):
        """Tell why the session ends. Any thread; does not wait."""
        if REASONS in self._features:
            self.tell(end)
