"""Runs a connection as a state machine, so that a connection that waits occupies no thread.

A step does what it can with the bytes that have arrived. If it needs more, it parks the connection
with the port's listener (net/listener.py) and returns. The listener has a worker call ready() when
bytes arrive, or expired() when the time is up. Each class has a table, STEPS: the step to take in
each state, and the state that follows a timeout.
"""

import enum
import logging
import ssl
from collections.abc import Callable
from time import monotonic
from typing import Any, NamedTuple

from gotunnel import NoThread

from ..net import client_hello, drops
from ..net.drops import NO_THREAD, NOT_TLS, SILENT, SLOW, TLS_FAILED, Dropped
from ..net.listener import Address
from .request import VisitorGone
from .visit import BUG
from .visitor import Visitor

log = logging.getLogger("gotunnel.steps")

# Seconds that a thread waits for more bytes by itself, before it parks the connection. Most
# visitors go on at once, and are spared the detour through the listener. Step workers are few, and
# do not wait while other connections need one. An exchange's thread waits for the next request,
# which comes a round trip after the answer.
NEXT_STEP_WAIT, NEXT_REQUEST_WAIT = 0.005, 0.02


class StateEnum(enum.Enum):
    """The base of state enums. Each step looks its state up in a table, so the hash is object's:
    Enum's own is computed in Python, which is slower."""

    __hash__ = object.__hash__


class Step(NamedTuple):
    """What happens in one state. ``take(connection)`` returns True if the next step can be taken
    now, False if the connection is parked, handed over or closed."""

    take: Callable[[Any], bool]
    time_up: enum.Enum | None = None  # the state after a timeout; None: close the connection
    first_byte: enum.Enum | None = None  # the state from the first byte on; None: the same one
    # Whether part of a message has arrived. Then the connection may wait for the rest of it while
    # the gateway stops; otherwise it waits for listener.LINGER only.
    begun: bool = False


class Stepwise:
    """A connection that the listener can park. At any time it is parked, or queued for a worker, or
    in the hands of one worker."""

    STEPS: dict[Any, Step] = {}  # by state
    brief = False  # see Parkable

    def __init__(self, port: object, visitor: Visitor, state: enum.Enum):
        self.duplex = visitor.duplex
        self._port = port
        self._visitor = visitor
        self._state = state
        # Monotonic end of the waiting in this state; None before the first wait.
        self._deadline: float | None = None
        self._waits = 0  # how often the connection was parked in this state
        self._steps = self.STEPS  # the table in use: an exchange's thread may use another

    @property
    def address(self) -> Address:
        """The visitor's address, or its proxy's as long as the proxy has not named the visitor."""
        return self._visitor.address

    @property
    def silent(self) -> bool:
        """Whether no part of a message has arrived: see Parkable."""
        return not self.STEPS[self._state].begun

    def ready(self) -> None:
        """Worker: take all steps that can be taken now."""
        self._take_steps(self.STEPS)

    def expired(self) -> None:
        """Worker: the time for this state is up."""
        state = self.STEPS[self._state].time_up
        if state is None:
            self._visitor.why_dropped = SLOW if self._visitor.has_spoken else SILENT
            self.close()
        else:
            self._state = state
            self.ready()

    def close(self) -> None:
        """Close the connection. Only the thread that has it may do so."""
        self._visitor.close()

    def _take_steps(self, steps: dict[Any, Step]) -> None:
        self._steps = steps
        try:
            while steps[self._state].take(self):
                pass
        except ssl.SSLError as error:
            log.debug("%s: TLS: %s", self._visitor, error.reason or error)
            self._close_for(TLS_FAILED)
        except NoThread as error:
            log.warning("%s: %s; the visit is reset", self._visitor, error)
            self._visitor.fail_visit("gateway-busy", 503)
            self.duplex.reset()  # a mere close would look like an empty answer
            self._close_for(NO_THREAD)
        except client_hello.NotTLS as error:
            log.debug("%s: %s", self._visitor, error)
            self._close_for(NOT_TLS)
        except (OSError, VisitorGone) as error:
            log.debug("%s: %s", self._visitor, error or "left")
            self._close_for(error.reason if isinstance(error, Dropped) else "")
        except Exception:
            log.exception("%s: its connection is closed (bug, traceback follows)", self._visitor)
            self._visitor.fail_visit(BUG, 500)
            self._close_for(drops.BUG)

    def _close_for(self, reason: str) -> None:
        """Close the connection. ``reason`` counts if the visitor has not asked for anything; ""
        for one that has left."""
        self._visitor.why_dropped = reason
        self.close()

    def _go_to(self, state: enum.Enum) -> bool:
        """Enter a state; its time begins now. Returns a step's result."""
        self._state, self._deadline, self._waits = state, None, 0
        return True

    def _note_first_byte(self) -> None:
        """The first byte in this state has arrived."""
        self._visitor.has_spoken = True
        self._go_to(self.STEPS[self._state].first_byte or self._state)

    def _wait(self, seconds: float) -> bool:
        """Take this step again when the visitor sends something. ``seconds`` count from the first
        wait in this state. Returns a step's result."""
        if self._deadline is None:
            # The first wait in a state is likely to be short, so wait here; parking costs two
            # thread switches. A visitor that trickles its bytes is parked, and holds no worker.
            self._deadline = monotonic() + seconds
            patience = NEXT_REQUEST_WAIT
            if self._steps is self.STEPS:  # a step worker
                patience = NEXT_STEP_WAIT
                if self._visitor.listener.crowded:
                    self._visitor.listener.park(self, seconds)
                    return False
            try:
                self.duplex.wait_readable(patience)
                return True
            except TimeoutError:
                pass  # it is parked
        self._waits += 1
        left = max(0, self._deadline - monotonic())
        self._visitor.listener.await_more(self, left, self._waits)
        return False
