"""What an Exchange works with, as plain objects: a visitor, a stream to a target, a tunnel.

Visitor and stream record in one list what happens to them, so a test sees the order.
"""

import queue
import threading

from gotunnel import Ends, StreamReset
from gotunnel_agent.common.http1 import Fields
from gotunnel_agent.common.refusals import BY_CODE

APP = "app.example.com"
SOON = 10  # seconds until a test gives up
SILENCE = object()  # in the script of a stream: nothing comes for a while
OK = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"


class Visitor:
    """A request.Request, with a body that a test hands in and an answer that it reads."""

    scheme, sni, peer, authority, hostname = "https", APP, "192.0.2.1", f"{APP}:8443", APP
    idle_timeout = SOON
    owner = visit = None
    templates = {}
    may_wait = False

    def __init__(self, method="GET", path="/", *fields, body=None, wants_upgrade=False, room=True):
        """``body``: bytes that it announces, None if it has none, ... if it does not say."""
        self.method, self.path = method, path
        self.fields = Fields([("Host", self.authority), *fields])
        self.wants_upgrade = wants_upgrade
        self.has_body = body is not None
        self.body_length = None if body is ... else body
        self.body_complete = not body
        self.trailers = ()
        self.body = queue.Queue()  # lists of pieces, None for the end, exceptions
        self.events = []
        self.left = False
        self.room = room  # for a relay
        self.stuck = False  # it reads nothing more
        self.aborted = threading.Event()

    def ends(self):
        return Ends((self.peer, 1), ("192.0.2.80", 443))

    def read_body(self, timeout):
        try:
            came = self.body.get(timeout=timeout) if timeout else self.body.get_nowait()
        except queue.Empty:
            raise TimeoutError from None
        if isinstance(came, Exception):
            raise came
        if came is None or self.body_length == sum(map(len, came)):
            self.body_complete = True
        return came or []

    def unread_body(self, pieces):
        self.events.append(("unread", pieces))

    def send_interim(self, status, reason, fields):
        self.events.append(("interim", status, fields))

    def send_head(self, status, reason, fields, length):
        self.events.append(("head", status, fields, length))

    def send_data(self, pieces):
        self._check()
        self.events.append(("data", *pieces))

    def finish(self, pieces, trailers=()):
        self._check()
        self.events.append(("finish", *pieces))
        self.trailers_of_the_answer = trailers

    def _check(self):
        if self.stuck:
            raise TimeoutError("the visitor has stopped reading")

    def crowded(self):
        return True

    def refuse_body(self):
        self.events.append("refuse body")

    def abort(self):
        self.events.append("abort")
        self.aborted.set()
        self.body.put(ConnectionAbortedError())

    def gone(self):
        return self.left

    def switch(self, status, reason, fields, data, onward):
        if self.room:
            self.events.append(("switch", status, fields, data, onward))
        return self.room

    @property
    def status(self):
        """Of the final answer."""
        return next(event[1] for event in self.events if event[0] == "head")

    @property
    def code(self):
        fields = next(event[2] for event in self.events if event[0] == "head")
        return dict(fields).get("X-Gotunnel-Error")


class Stream:
    """A stream whose target answers by a script: bytes, SILENCE, exceptions, b"" for its end."""

    def __init__(self, *script, visitor=None, deaf=None):
        self.sent = b""
        self.events = visitor.events if visitor else []
        self.came = queue.Queue()
        self.deaf = deaf  # what is raised as the target has stopped reading
        for item in script:
            self.came.put(item)

    def read(self, timeout):
        item = self.came.get(timeout=SOON)
        if item is SILENCE:
            raise TimeoutError
        if isinstance(item, Exception):
            raise item
        return item

    def write(self, data, timeout):
        if self.deaf:
            raise self.deaf
        self.sent += data

    def reset(self):
        self.events.append("reset")
        self.came.put(StreamReset())

    def close(self):
        self.events.append("close")


class Tunnel:
    """An agent that gives these streams; an exception instead of one is raised."""

    def __init__(self, *streams, kept=()):
        self.streams, self.kept = list(streams), list(kept)
        self.opened = []  # first bytes

    def take_kept(self, route):
        return self.kept.pop() if self.kept else None

    upgrades = True  # what its agent knows
    refusals = BY_CODE
    unwell = {}  # all of its targets are well

    def open(self, route, ends, first, relayed=False):
        self.opened.append(first)
        self.relayed = relayed
        stream = self.streams.pop(0)
        if isinstance(stream, Exception):
            raise stream
        stream.write(first, None)
        return stream

    def keep(self, route, stream):
        stream.events.append("keep")

    def make_way(self, route):
        pass

    def give_up_kept(self, route, waiting):
        self.given_up = getattr(self, "given_up", 0) + 1

    def served(self, route, stream):
        self.served_streams = [*getattr(self, "served_streams", []), stream]
