"""Pings and pongs: whether a registered agent lives.

An agent is pinged every PING_INTERVAL, as a Go gateway does it. When another agent wants one of its
hostnames (takeover.py), it is asked: it is pinged at once, and has ANSWER_TIMEOUT for its pong.
"""

import threading
from time import monotonic, time

from gotunnel import Ping, Pong, ProtocolError

PING_INTERVAL = 15  # seconds between pings, as the Go gateway's
PONG_TIMEOUT = 20  # seconds without a pong that end the session, as the Go gateway's
BEAT = 5  # seconds between looks at the control stream
ANSWER_TIMEOUT = 3  # seconds for a pong, while another agent waits for the hostname
ANSWER_LOOK = 0.1  # seconds between looks for it
# Seconds. An agent that has sent any byte so lately lives: its pong may wait behind an upload.
SIGN_OF_LIFE = 1


class Heartbeat:
    """The heartbeat of one session.

    Invariant: a session lives on only while its last pong is at most PING_INTERVAL + PONG_TIMEOUT
    old. An agent that was asked has answered if a pong came after the question had been sent, or if
    any byte came in the last SIGN_OF_LIFE of its time. An agent that has not answered in time is
    reported once.

    ask() and has_answered() are for any thread. All else is done by the session's demultiplexer,
    as timers, and waits for nothing.
    """

    def __init__(self, session, control, on_silence):
        """``control`` is the session's ControlStream. ``on_silence(reason)`` is called if the agent
        was asked and did not answer."""
        self._session = session
        self._control = control
        self._on_silence = on_silence
        self._ping_at = self._pong_at = monotonic()  # next ping due, last pong; demultiplexer only
        self._lock = threading.Lock()  # guards the next two
        self._asked_at = None  # monotonic, while a claim waits for an answer
        self._answered_at = 0.0  # monotonic, of the last answer

    def start(self):
        """Begin to count, right before the session's demultiplexer starts."""
        self._pong_at = monotonic()
        self._ping_at = self._pong_at + PING_INTERVAL
        self._session.call_later(BEAT, self._beat)

    def ask(self) -> float:
        """Have the agent show that it lives. Returns since when (monotonic) it is asked."""
        with self._lock:
            first = self._asked_at is None
            if first:
                self._asked_at = monotonic()
            since = self._asked_at
        if first:
            self._session.call_later(0, self._ask)
        return since

    def has_answered(self, since) -> bool:
        """Whether the agent has answered a question of ``since``, as ask() returned it."""
        with self._lock:
            return self._answered_at > since

    def _beat(self):
        now = monotonic()
        try:
            self._take_pongs(now)
            if now - self._pong_at > PING_INTERVAL + PONG_TIMEOUT:
                self._session.close(f"no pong in {PONG_TIMEOUT} s")
                return
            if now >= self._ping_at:
                self._ping_at = now + PING_INTERVAL
                self._control.send(_ping())
        except (OSError, ProtocolError) as error:
            self._session.close(str(error))
            return
        self._session.call_later(BEAT, self._beat)

    def _take_pongs(self, now):
        if any(isinstance(message, Pong) for message in self._control.read()):
            self._pong_at = now
            with self._lock:
                self._answered_at = now

    def _ask(self):
        """Ping at once. The agent's time begins only now, however long this timer was late."""
        with self._lock:
            self._asked_at = monotonic()
        self._control.tell(_ping())
        self._await_answer()

    def _await_answer(self):
        now = monotonic()
        try:
            self._take_pongs(now)
        except (OSError, ProtocolError) as error:
            self._session.close(str(error))
            return
        with self._lock:
            late = now - self._asked_at > ANSWER_TIMEOUT
            if late and now - self._session.heard_at <= SIGN_OF_LIFE:
                self._answered_at = now
            answered = self._answered_at > self._asked_at
            if answered:
                self._asked_at = None
        if answered:
            return
        if late:
            self._on_silence(f"its agent did not answer in {ANSWER_TIMEOUT} s")
            return
        self._session.call_later(ANSWER_LOOK, self._await_answer)


def _ping():
    return Ping(int(time() * 1000))
