"""Messages between the supervisor and its children: JSON objects, one a line, over a socket pair.

    child -> supervisor                         supervisor -> child
                                           <--  {"hello": {...}}         sockets, number, secret
    {"said": "ready"} -->                  <--  {"order": "go", "estate": ...}
    {"said": "serving"} -->                <--  {"order": "cover", "number": 2}, "uncover"
    {"said": "alive"} --> every few seconds     {"order": "reload"}, "drain", "estate"
    {"said": "draining"} -->                    {"processes": [...]}     what the others do
    {"estate": {...}} -->                       {"board": {...}}         another member's message
    {"call": ID, "name": ..., "with": [...]} -->  <--  {"reply": ID, "result": ...}
    {"to": NUMBER, "body": ...} -->        <--  {"from": NUMBER, "body": ...}

The supervisor's end never blocks: a child that does not read its messages hangs, and is restarted.
A child's end may block for a moment; the supervisor always reads.
"""

from __future__ import annotations

import contextlib
import json
import socket
import struct
import threading
from typing import Any

Message = dict[str, Any]

# Version of these messages. A renewal starts children with the code of now, and the supervisor may
# be older.
PROTOCOL = 1

# Bytes of one message. The largest are a gateway's metrics, and what a child hands to its successor
# (some 100 bytes a hostname).
MOST_MESSAGE = 16 << 20
# Bytes that wait for a child that does not read. It gets what others ask it, and their answers.
MOST_QUEUED = 64 << 20
READ = 256 * 1024  # bytes in one read
# Until a child gives up on a supervisor that does not read: seconds, and microseconds.
SEND_TIMEOUT, SEND_MICROSECONDS = 10, 0

_encode = json.JSONEncoder(separators=(",", ":")).encode


class Broken(OSError):
    """The other end has sent something else than messages, or does not read."""


class Lines:
    """Bytes in, messages out."""

    def __init__(self) -> None:
        self._buffer = bytearray()
        self._searched = 0  # bytes in which there is no end of a line

    def take(self, data: bytes) -> list[Message]:
        """Raises Broken."""
        self._buffer += data
        found = []
        while (end := self._buffer.find(b"\n", self._searched)) >= 0:
            line = bytes(self._buffer[:end])
            del self._buffer[: end + 1]
            self._searched = 0
            try:
                message = json.loads(line)
            except (ValueError, RecursionError):
                raise Broken("a line that is no JSON came") from None
            if not isinstance(message, dict):
                raise Broken("a JSON value came, expected an object")
            found.append(message)
        self._searched = len(self._buffer)
        if self._searched > MOST_MESSAGE:
            raise Broken(f"a message of more than {MOST_MESSAGE} bytes came")
        return found


def encoded(message: Message) -> bytes:
    return _encode(message).encode() + b"\n"


class SupervisorEnd:
    """The supervisor's end of a channel. One thread."""

    def __init__(self, sock: socket.socket) -> None:
        sock.setblocking(False)
        self._sock = sock
        self._lines = Lines()
        self._queued = bytearray()
        self.fileno = sock.fileno
        self.close = sock.close

    @property
    def wants_to_write(self) -> bool:
        return bool(self._queued)

    def send(self, message: Message) -> None:
        """Raises Broken if the child does not read; nothing if it has ended, which its exit
        status tells."""
        self._queued += encoded(message)
        if len(self._queued) > MOST_QUEUED:
            raise Broken(f"it has {len(self._queued)} bytes of messages to read")
        self.flush()

    def flush(self) -> None:
        """Send what the socket takes now."""
        while self._queued:
            try:
                sent = self._sock.send(memoryview(self._queued)[:READ])
            except BlockingIOError:
                return
            except OSError:  # the child has ended
                self._queued.clear()
                return
            del self._queued[:sent]

    def receive(self) -> list[Message] | None:
        """The messages that have come; None if the child has closed its end. Raises Broken."""
        try:
            data = self._sock.recv(READ)
        except BlockingIOError:
            return []
        except OSError:
            return None
        return self._lines.take(data) if data else None


class ChildEnd:
    """A child's end. Any thread may send; one receives."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self._lines = Lines()
        self._came: list[Message] = []
        self._lock = threading.Lock()  # held while a message is sent; guards the next one
        self._torn = False  # a part of a message was sent, and the rest cannot follow
        sock.setblocking(True)
        # Of sending alone: the thread that receives waits as long as nothing comes.
        timeout = struct.pack("ll", SEND_TIMEOUT, SEND_MICROSECONDS)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, timeout)

    def send(self, message: Message) -> None:
        """Raises OSError if the supervisor has ended, or does not read."""
        data = encoded(message)
        with self._lock:
            if self._torn:
                raise Broken("the supervisor did not read an earlier message")
            self._torn = True
            self._sock.sendall(data)
            self._torn = False

    def receive(self) -> Message:
        """The next message. Raises EOFError if the supervisor has ended; Broken."""
        while not self._came:
            try:
                data = self._sock.recv(READ)
            except ConnectionError:
                data = b""
            if not data:
                raise EOFError
            self._came = self._lines.take(data)
        return self._came.pop(0)

    def close(self) -> None:
        """Wakes the thread that receives."""
        with contextlib.suppress(OSError):
            self._sock.shutdown(socket.SHUT_RDWR)
        self._sock.close()
