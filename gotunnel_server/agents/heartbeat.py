"""Finds out by pings and pongs whether a registered agent still responds.

An agent is pinged every PING_INTERVAL, as a Go gateway does it. When another agent claims one of
its hostnames (takeover.py), it is *asked*: the gateway pings it at once, and it has ANSWER_TIMEOUT
for its pong. While another agent waits for one (standby.py), it is *watched*: asked again
WATCH_PAUSE after each answer.
"""

import threading
from collections.abc import Callable
from time import monotonic, time

from gotunnel import Message, Ping, Pong, ProtocolError, Session

from .control_stream import ControlStream

PING_INTERVAL = 15  # seconds between pings, as with the Go gateway
PONG_TIMEOUT = 20  # seconds without a pong until the session ends, as with the Go gateway
BEAT = 5  # interval of reading the control stream, in seconds
ANSWER_TIMEOUT = 3  # seconds that an agent has for a pong while another one waits
ANSWER_LOOK = 0.1  # interval of looking for that pong, in seconds
# Of a watched agent: seconds from an answer to the next question, and for the answer. Together they
# leave most of a second of the 4 s within which the waiting agent shall serve after a death without
# a word. Two pings a second are little, and come only while another agent waits.
WATCH_PAUSE = 0.5
WATCHED_TIMEOUT = 2.5
# Interval of reading the control stream, in seconds, if the agent may send more than pongs. Each
# message adds LISTEN_COST: so a flood of them takes a two-hundredth of a processor.
LISTEN = 0.5
LISTEN_COST = 0.002
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

    Any thread may call ask(), watch() and has_answered(). The rest happens in timers of the
    session's demultiplexer, and waits for nothing.
    """

    def __init__(
        self,
        session: Session,
        control: ControlStream,
        on_silence: Callable[[str], object],
        on_messages: Callable[[list[Message]], object] = lambda messages: None,
    ):
        """``control`` is the session's. ``on_silence(reason)`` is called if the agent was asked and
        did not answer, ``on_messages(messages)`` with what came beside pongs; it must not wait."""
        self._session = session
        self._control = control
        self._on_silence = on_silence
        self._on_messages = on_messages
        self._listened_at = 0.0  # heard_at of the last look for other messages than pongs
        self._ping_at = self._pong_at = monotonic()  # next ping due, last pong; demultiplexer only
        self.round_trip: float | None = None
        self._pinged_at: float | None = None  # monotonic, of a ping without pong; demultiplexer
        self._lock = threading.Lock()  # guards the next five
        self._is_watched = False
        self._watch = 0  # how often it began to be watched; an earlier one's timers do nothing
        self._is_asked = False  # a claim waits for an answer
        self._asked_at = 0.0  # monotonic, of the last question
        self._answered_at = 0.0  # monotonic, of the last answer

    def start(self, listens: bool = False) -> None:
        """Begin to count. To be called right before the session's demultiplexer starts.
        ``listens``: the agent may send other messages than pongs, which should not wait."""
        self._pong_at = monotonic()
        # The first one soon, so that the round trip is known.
        self._ping_at = self._pong_at + min(BEAT, PING_INTERVAL)
        self._session.call_later(BEAT, self._beat)
        if listens:
            self._session.call_later(LISTEN, self._listen)

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

    def watch(self, watched: bool) -> None:
        """Ask the agent for signs of life often from now on, or no more."""
        with self._lock:
            begins, self._is_watched = watched and not self._is_watched, watched
            self._watch += begins
        if begins:
            self.ask()

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

    def _listen(self) -> None:
        """Look for other messages than pongs."""
        count, heard_at = 0, self._session.heard_at
        if heard_at != self._listened_at:
            self._listened_at = heard_at
            try:
                count = self._take_pongs(monotonic())
            except (OSError, ProtocolError) as error:
                self._session.close(str(error))
                return
        self._session.call_later(max(LISTEN, count * LISTEN_COST), self._listen)

    def _take_pongs(self, now: float) -> int:
        """Take all messages that have come. Returns how many."""
        messages = self._control.read()
        others = [message for message in messages if not isinstance(message, Pong)]
        if others:
            self._on_messages(others)
        if len(others) < len(messages):
            self._pong_at = now
            if self._pinged_at is not None:
                # The pong may have waited for this look. If nothing came after it, heard_at is when
                # it came.
                came = max(self._pinged_at, min(now, self._session.heard_at))
                self.round_trip, self._pinged_at = came - self._pinged_at, None
            with self._lock:
                self._answered_at = now
        return len(messages)

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
            timeout = WATCHED_TIMEOUT if self._is_watched else ANSWER_TIMEOUT
            late = now - self._asked_at > timeout
            if late and now - self._session.heard_at <= SIGN_OF_LIFE:
                self._answered_at = now
            answered = self._answered_at > self._asked_at
            if answered:
                self._is_asked = False
            is_watched, watch = self._is_watched, self._watch
        if answered:
            if is_watched:
                self._session.call_later(WATCH_PAUSE, lambda: self._ask_watched(watch))
            return
        if late:
            self._on_silence(f"its agent did not answer in {timeout:g} s")
            return
        self._session.call_later(ANSWER_LOOK, self._await_answer)

    def _ask_watched(self, watch: int) -> None:
        with self._lock:
            asks = self._is_watched and not self._is_asked and watch == self._watch
        if asks:
            self.ask()


def _ping() -> Ping:
    return Ping(int(time() * 1000))
