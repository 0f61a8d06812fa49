"""Finds out by pings and pongs whether a registered agent still responds.

An agent is pinged every PING_INTERVAL, as a Go gateway does it. When another agent claims one of
its hostnames (takeover.py), it is *asked*: the gateway pings it at once, and it has ANSWER_TIMEOUT
for its pong.
"""

import threading
from collections.abc import Callable
from time import monotonic, time

from gotunnel import Ping, Pong, ProtocolError, Session

from .control_stream import ControlStream

PING_INTERVAL = 15  # seconds between pings, as with the Go gateway
PONG_TIMEOUT = 20  # seconds without a pong until the session ends, as with the Go gateway
BEAT = 5  # interval of reading the control stream, in seconds
ANSWER_TIMEOUT = 3  # seconds that an agent has for a pong while another one waits
ANSWER_LOOK = 0.1  # interval of looking for that pong, in seconds
# Any byte in the last so many seconds counts as an answer: the pong may wait behind an upload
# (head-of-line blocking).
SIGN_OF_LIFE = 1
# After a ping, the pong is looked for after FIRST_LOOK seconds, and each time later by the factor
# LATER, to measure the round trip: at a BEAT it could have lain there for five seconds.
FIRST_LOOK, LATER = 0.004, 2


class Heartbeat:
    """The heartbeat of one session.

    Invariants: The last pong of a session is at most PING_INTERVAL + PONG_TIMEOUT old, else the
    session ends. An asked agent has answered if a pong came after the question was sent, or any
    byte in the last SIGN_OF_LIFE of its time. An agent that does not answer in time is reported
    once. ``round_trip``: the seconds that the last pong took, None before the first one.

    ask() and has_answered() are for any thread. All else happens in timers of the session's
    demultiplexer, and waits for nothing.
    """

    def __init__(
        self, session: Session, control: ControlStream, on_silence: Callable[[str], object]
    ):
        """``control`` is the session's. ``on_silence(reason)`` is called if the agent was asked and
        did not answer."""
        self._session = session
        self._control = control
        self._on_silence = on_silence
        self._ping_at = self._pong_at = monotonic()  # next ping due, last pong; demultiplexer only
        self.round_trip: float | None = None
        self._pinged_at: float | None = None  # monotonic, of a ping without pong; demultiplexer
        self._lock = threading.Lock()  # guards the next three
        self._is_asked = False  # a claim waits for an answer
        self._asked_at = 0.0  # monotonic, of the last question
        self._answered_at = 0.0  # monotonic, of the last answer

    def start(self) -> None:
        """Begin to count. To be called right before the session's demultiplexer starts."""
        self._pong_at = monotonic()
        # The first one soon, so that the round trip is known.
        self._ping_at = self._pong_at + min(BEAT, PING_INTERVAL)
        self._session.call_later(BEAT, self._beat)

    def ask(self) -> float:
        """Ask the agent for a sign of life. Returns since when (monotonic) it is asked."""
        with self._lock:
            first = not self._is_asked
            if first:
                self._is_asked, self._asked_at = True, monotonic()
            since = self._asked_at
        if first:
            self._session.call_later(0, self._ask)
        return since

    def has_answered(self, since: float) -> bool:
        """Whether the agent has answered the question of ``since``, as ask() returned it."""
        with self._lock:
            return self._answered_at > since

    def _beat(self) -> None:
        now = monotonic()
        try:
            self._take_pongs(now)
            if now - self._pong_at > PING_INTERVAL + PONG_TIMEOUT:
                self._session.close(f"no pong in {PONG_TIMEOUT} s")
                return
            if now >= self._ping_at:
                self._ping_at = now + PING_INTERVAL
                self._control.send(_ping())
                self._pinged_at = now
                self._session.call_later(FIRST_LOOK, lambda: self._look(FIRST_LOOK))
        except (OSError, ProtocolError) as error:
            self._session.close(str(error))
            return
        self._session.call_later(BEAT, self._beat)

    def _take_pongs(self, now: float) -> None:
        if any(isinstance(message, Pong) for message in self._control.read()):
            self._pong_at = now
            if self._pinged_at is not None:
                # The pong may have waited for this look. If nothing came after it, heard_at is when
                # it came.
                came = max(self._pinged_at, min(now, self._session.heard_at))
                self.round_trip, self._pinged_at = came - self._pinged_at, None
            with self._lock:
                self._answered_at = now

    def _look(self, waited: float) -> None:
        """Look for the pong ``waited`` seconds after its ping."""
        try:
            self._take_pongs(monotonic())
        except (OSError, ProtocolError) as error:
            self._session.close(str(error))
            return
        if self._pinged_at is not None and waited * LATER < BEAT:
            self._session.call_later(waited * (LATER - 1), lambda: self._look(waited * LATER))

    def _ask(self) -> None:
        """Ping at once. The agent's time begins only now, so that a late timer takes none of it."""
        with self._lock:
            self._asked_at = monotonic()
        self._control.tell(_ping())
        self._await_answer()

    def _await_answer(self) -> None:
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
                self._is_asked = False
        if answered:
            return
        if late:
            self._on_silence(f"its agent did not answer in {ANSWER_TIMEOUT} s")
            return
        self._session.call_later(ANSWER_LOOK, self._await_answer)


def _ping() -> Ping:
    return Ping(int(time() * 1000))
