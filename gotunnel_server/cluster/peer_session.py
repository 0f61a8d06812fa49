"""The agent's side of a connection with a peer: this gateway dials it, tells it which hostnames its
own agents have, and takes the visits to them that the peer sends.

    dial --> greeting and ack --> tell what has changed, take streams --> the session ends --> wait
     ^                                                                                         |
     \\-----------------------------------------------------------------------------------------/

One thread a peer, which waits for streams, beside the session's demultiplexer. What is told and
what comes on the control stream is the pool's work (watched.py), as are the visits (passage.py).
"""

from __future__ import annotations

import logging
import random
import socket
import ssl
import threading
from collections.abc import Callable, Iterable, Mapping
from time import monotonic
from typing import Any, NamedTuple, Protocol

from gotunnel import (
    START_WINDOW,
    Ack,
    Deadline,
    End,
    Message,
    MessageReader,
    Ping,
    Pong,
    ProtocolError,
    Session,
    SessionClosed,
    encode_message,
    spawn,
)
from gotunnel_agent.common.duplex import STALL_TIMEOUT, Duplex
from gotunnel_agent.common.one_line import words_on_one_line

from ..routes import Route
from .origin import Greeting, part_name, registers, taking_back
from .passage import Passages
from .secret import NAME
from .watched import Job, Submit, Watched

log = logging.getLogger("gotunnel.peer_session")

DIAL_TIMEOUT = 3  # seconds to connect, and again for TLS: members are near each other
# Seconds of failures before the log warns of them: a member that starts or is restarted has its
# address before it accepts there, or its predecessor still does.
GRACE = 5
ACK_TIMEOUT = 10  # seconds for the answer to the greeting
# Seconds before a retry; doubled each time up to the second number, with jitter. A member that is
# back must not wait long, and a try costs little.
FIRST_DELAY, MOST_DELAY = 0.2, 5
HELD = 10  # seconds; a connection that lasted so long was a success: the delay begins anew
# Open streams of a peer. It has 2048 relays at most (visitors/relays.py), 768 kept streams, and
# some hundred exchanges.
MOST_STREAMS = 4096
LEFT_LOOK = 0.25  # interval of the check whether a session has visits left, in seconds
DEPARTED = "departed"  # End's code between gateways: see Cluster.departed()
# Questions without an answer; a peer that answers none has gone, and its connection ends by itself.
MOST_QUESTIONS = 64


class Member(Protocol):
    """What is used of a Card (board.py)."""

    @property
    def id(self) -> str: ...

    @property
    def peer(self) -> str: ...

    @property
    def host(self) -> str: ...


class Told(NamedTuple):
    """An agent here, as the peers are told: a Tunnel of agents/tunnel.py, and its routes."""

    tunnel: Any
    routes: Mapping[str, Route]


class OtherMember(ConnectionError):
    """The address leads to another gateway than the one that was to be reached."""


class PeerSession:
    """The connections to one member, one after the other, until stop()."""

    def __init__(
        self, member: Member, own: Greeting, context: ssl.SSLContext, passages: Passages,
        submit: Submit, promised: Callable[[str, float], object],
        stall_timeout: float = STALL_TIMEOUT,
    ):  # fmt: skip
        """``own`` is this member. ``promised(id, asked_at)``: see Cluster.promised()."""
        self.member = member
        self._own = own
        self._context = context
        self._passages = passages
        self._submit = submit
        self._promised = promised
        self._stall_timeout = stall_timeout
        self._problem = ""  # the last one that was logged; "" while it is connected
        self._was_connected = False  # since the last dial
        self._failed_at: float | None = None  # monotonic, of the first of the last failures
        self._stopping = threading.Event()
        self._told: Mapping[str, Told] = {}  # what is to be told, by Tunnel.id; replaced whole
        self._lock = threading.Lock()  # guards the next two
        self._duplex: Duplex | None = None  # while it dials
        self._link: _Link | None = None  # while it is connected
        self._thread = spawn(f"peer {member.id}", self._run)

    def __str__(self) -> str:
        return f"peer {self.member.host or self.member.id} ({self.member.peer})"

    @property
    def connected(self) -> bool:
        return self._link is not None

    def tell(self, told: Mapping[str, Told], changed: Iterable[str]) -> None:
        """Tell the peer, in this order, of those that are ``changed`` or have gone. ``told`` is by
        Tunnel.id, and complete."""
        with self._lock:
            self._told = told
            if self._link is not None:
                self._link.tell(told, changed)

    def ask(self) -> None:
        """Ask the peer whether it is without the board. Any thread; does not wait."""
        with self._lock:
            if self._link is not None:
                self._link.ask()

    def depart(self) -> threading.Event | None:
        """Tell the peer that this member ends, and so takes no name any more. Does not wait: the
        event is set when it is sent. None if there is no connection."""
        with self._lock:
            if self._link is None:
                return None
            self._link.depart()
            return self._link.departed

    def leave(self) -> None:
        """Take no more visits; those that run go on. Does not wait."""
        self._stopping.set()
        with self._lock:
            duplex, link = self._duplex, self._link
        if link is not None:
            link.session.leave(refuses=False)
        elif duplex is not None:
            duplex.reset()  # also while it waits for the ack

    def retire(self) -> None:
        """As leave(), and end the connection when the last visit has ended. Does not wait."""
        self.leave()
        with self._lock:
            link = self._link
        if link is not None:
            end_without_visits(link.session, "the gateway is no member any more")

    def stop(self, reason: str) -> None:
        """End the connection. Any thread; does not wait: see join()."""
        self.leave()
        with self._lock:
            duplex, link = self._duplex, self._link
        if link is not None:
            link.session.close(reason)
        elif duplex is not None:
            duplex.reset()

    @property
    def is_over(self) -> bool:
        """Whether its thread has ended."""
        return not self._thread.is_alive()

    def join(self, timeout: float) -> None:
        self._thread.join(timeout)

    # The thread

    def _run(self) -> None:
        delay: float = FIRST_DELAY
        while not self._stopping.is_set():
            began = monotonic()
            try:
                self._serve(self._dial())
            except (OSError, ProtocolError, ValueError, OverflowError) as error:
                self._say(error)
            except Exception:
                log.exception("%s: the connection ended by an unexpected error (bug, traceback "
                              "follows); it is dialled again", self)  # fmt: skip
            self._was_connected = False
            if monotonic() - began > HELD:
                delay = FIRST_DELAY
            self._stopping.wait(delay * random.uniform(0.5, 1))
            delay = min(2 * delay, MOST_DELAY)

    def _say(self, error: Exception) -> None:
        """Log why there is no connection, once for each reason."""
        problem, now = _problem_of(error), monotonic()
        self._failed_at = self._failed_at or now
        if self._was_connected:
            log.debug("%s: the connection ended: %s", self, problem)
        elif not isinstance(error, ssl.SSLError) and now - self._failed_at < GRACE:
            log.debug("%s: no connection yet: %s", self, problem)
        elif problem != self._problem and not self._stopping.is_set():
            self._problem = problem
            log.warning("%s: no connection: %s; visits that it gets for agents of this gateway "
                        "fail there, and it is tried again", self, problem)  # fmt: skip

    def _dial(self) -> Session:
        """A session with a gateway that has proved to be a member. Raises OSError, ValueError."""
        host, _, port = self.member.peer.rpartition(":")
        sock = socket.create_connection((host.strip("[]"), int(port)), DIAL_TIMEOUT)
        duplex = Duplex(sock)
        duplex.stall_timeout = self._stall_timeout
        try:
            with self._lock:
                self._duplex = duplex
            if self._stopping.is_set():
                raise SessionClosed("the gateway stops")
            duplex.start_tls(self._context, server_side=False, server_hostname=NAME)
            duplex.handshake_within(DIAL_TIMEOUT)
        except BaseException:
            self._forget_duplex()
            duplex.close()
            raise
        return Session(
            duplex, client=True, name=f"peer {self.member.id}", window=START_WINDOW,
            max_streams=MOST_STREAMS,
        )  # fmt: skip

    def _serve(self, session: Session) -> None:
        """Serve the visits of the peer until the session ends. Raises SessionClosed, and OSError
        or ProtocolError if it does not begin well."""
        link = _Link(session, self._submit)
        try:
            session.start()
            link.greet(self._own, Deadline(ACK_TIMEOUT))
            if link.member != self.member.id:
                raise OtherMember(
                    f"its address leads to the member {link.member or 'without a name'}; give each "
                    "gateway a CLUSTER_ADDRESS that leads to it alone"
                )
            with self._lock:
                self._link, self._duplex = link, None
                link.promised = self._note_promise
                link.tell(self._told, self._told)
            if self._stopping.is_set():
                raise SessionClosed("the gateway stops")
            level = logging.INFO if self._problem else logging.DEBUG
            log.log(level, "%s: connected: it can pass visits on to the agents here", self)
            self._problem, self._was_connected, self._failed_at = "", True, None
            while True:
                self._passages.begin(session.accept())
        finally:
            self._forget_duplex()
            with self._lock:
                self._link = None
            session.close("the connection is given up")
            session.join()

    def _forget_duplex(self) -> None:
        with self._lock:
            self._duplex = None

    def _note_promise(self, asked_at: float) -> None:
        self._promised(self.member.id, asked_at)


def end_without_visits(session: Session, reason: str) -> None:
    """End a session that takes no new visits as soon as only its control stream is left."""

    def look() -> None:
        if len(session.streams_in_use()) > 1:
            session.call_later(LEFT_LOOK, look)
        else:
            session.close(reason)

    session.call_later(LEFT_LOOK, look)


class _Link:
    """One connection with the peer: its session and its control stream."""

    def __init__(self, session: Session, submit: Submit):
        self.session = session
        self.member = ""  # the peer's id, by its ack
        self.promised: Callable[[float], None] = lambda asked_at: None  # set after the ack
        self._ack: Ack | None = None
        self._acked = threading.Event()  # ... or the session has ended
        session.on_end = self._acked.set
        self._job = Job(submit, self._work)
        self._control: Watched | None = None
        self._reader = MessageReader()
        self._lock = threading.Lock()  # guards the next four
        self._told: Mapping[str, Told] = {}
        self._changed: dict[str, None] = {}  # Tunnel.id of those that are to be told anew
        self._asked: dict[int, float] = {}  # number of a question: monotonic time
        self._questions: list[bytes] = []  # to be sent
        self._number = 0
        self._departs = False
        self.departed = threading.Event()  # the peer was told by depart()
        self._unsent: list[bytes] = []  # messages; the first one may be a rest
        self._parts: dict[str, int] = {}  # by Tunnel.id: how many messages told of it

    def greet(self, own: Greeting, deadline: Deadline) -> None:
        """Open the control stream and wait for the ack. Raises OSError, ProtocolError."""
        stream = self.session.open(encode_message(own.message()), deadline.left())
        self._control = Watched(stream, self._job.wake)
        self._job.wake()
        if not self._acked.wait(deadline.left()):
            raise TimeoutError(f"no answer to the greeting in {ACK_TIMEOUT} s")
        if self._ack is None:
            raise SessionClosed(self.session.ended or "the session has ended")
        if not self._ack.ok:
            raise OtherMember(words_on_one_line(self._ack.error, 200))
        self.member = self._ack.member

    def tell(self, told: Mapping[str, Told], changed: Iterable[str]) -> None:
        with self._lock:
            self._told = told
            self._changed.update(dict.fromkeys(changed))
        self._job.wake()

    def ask(self) -> None:
        with self._lock:
            if len(self._asked) >= MOST_QUESTIONS:
                return
            self._number += 1
            self._asked[self._number] = monotonic()
            self._questions.append(encode_message(Ping(self._number)))
        self._job.wake()

    def depart(self) -> None:
        with self._lock:
            self._questions.append(encode_message(End(DEPARTED, "the gateway stops")))
            self._departs = True
        self._job.wake()

    def _work(self) -> None:
        control = self._control
        if control is None:  # greet() wakes the job again
            return
        try:
            while (data := control.take()) is not None:
                if not data:
                    raise ProtocolError("the peer ended the control stream")
                for message in self._reader.feed(data):
                    self._take(message)
            while message_ := self._next():
                if rest := control.put(message_):
                    self._unsent.insert(0, bytes(rest))
                    if len(rest) == len(message_):
                        return
            if self._departs:
                self.departed.set()
        except ProtocolError as error:
            self.session.close(f"protocol error: {error}")
        except OSError:  # the session is over, which its thread sees
            pass

    def _take(self, message: Message) -> None:
        """Raises ProtocolError."""
        if self._ack is None:
            if not isinstance(message, Ack):
                raise ProtocolError(f"a {type(message).__name__.lower()}, expected ack")
            self._ack = message
            self._acked.set()
        elif isinstance(message, Pong):
            with self._lock:
                asked_at = self._asked.pop(int(abs(message.ts)), None)
            if asked_at is not None and message.ts > 0:
                self.promised(asked_at)

    def _next(self) -> bytes:
        """The next bytes to send; b"" if there are none. Questions go first, but never into the
        middle of a message."""
        if not self._unsent:
            with self._lock:
                self._unsent, self._questions = self._questions, []
                id = next(iter(self._changed), None) if not self._unsent else None
                if id is not None:
                    del self._changed[id]
                    told = self._told.get(id)
            if id is not None:
                self._encode(id, told)
                if not self._unsent:  # it had told nothing of it
                    return self._next()
        return self._unsent.pop(0) if self._unsent else b""

    def _encode(self, id: str, told: Told | None) -> None:
        """Encode what the peer is to know of an agent: only now, so that little is kept."""
        messages = [] if told is None else [*registers(told.tunnel, told.routes)]
        self._unsent += map(encode_message, messages)
        count = len(messages)
        for number in range(count, self._parts.pop(id, 0)):
            self._unsent.append(encode_message(taking_back(part_name(id, number))))
        if count:
            self._parts[id] = count


def _problem_of(error: Exception) -> str:
    if isinstance(error, ssl.SSLCertVerificationError):
        return (
            "it does not prove that it has the cluster's key (is it another program, a proxy that "
            "ends TLS, or has it another CLUSTER_KEY_FILE?)"
        )
    if isinstance(error, ssl.SSLError):
        return (
            f"the TLS handshake failed ({error.reason or error}): has it another CLUSTER_KEY_FILE, "
            "or no CLUSTER?"
        )
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return str(error) or type(error).__name__
