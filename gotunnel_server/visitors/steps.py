"""A connection that goes on step by step, so that one that waits holds no thread.

A step does what can be done with the bytes that have come. If more must come, it parks the
connection with the port's listener (net/listener.py) and returns; the listener has a worker call
ready() or expired(). Which step runs in which state, and which state follows when the time is up,
stands in a table: STEPS of each class.
"""

import contextlib
import enum
import logging
import ssl
from collections.abc import Callable
from time import monotonic
from typing import NamedTuple

from gotunnel import NoThread

from ..net import client_hello
from .request import VisitorGone

log = logging.getLogger("gotunnel.steps")

# Seconds that a worker waits for the next step by itself before it parks the connection: a visitor
# that goes on at once, as most do, is spared the detour through the listener. Not while others wait
# for a worker.
NEXT_STEP_WAIT = 0.005


class Step(NamedTuple):
    """What happens in one state."""

    take: Callable  # take(connection): True: take the next step now; False: it waits, or is over
    time_up: enum.Enum | None = None  # the state when the peer took too long; None: close
    first_byte: enum.Enum | None = None  # the state from the first byte on; None: the same
    outlasts_drain: bool = False  # whether it may still wait while the gateway stops


class Stepwise:
    """A connection in its steps; what the listener can park. It is parked, waits for its turn, or
    is in the hands of one worker."""

    STEPS = {}  # state: Step

    def __init__(self, port, visitor, state):
        self.duplex = visitor.duplex
        self._port = port
        self._visitor = visitor
        self._state = state
        self._deadline = None  # monotonic, of the state; None: nothing was waited for in it
        self._waits = 0  # in the state
        self._steps = self.STEPS  # those that the thread takes that has the connection

    @property
    def address(self):
        """The visitor's, as far as it is known."""
        return self._visitor.address

    def ready(self):
        """Worker: take the steps that can be taken."""
        self._take_steps(self.STEPS)

    def expired(self):
        """Worker: the visitor took as long as it may, or as long as shows that it waits."""
        state = self.STEPS[self._state].time_up
        if state is None:
            self.close()
        else:
            self._state = state
            self.ready()

    def close(self):
        """Drop the connection. Only for the part that has it."""
        self._visitor.close()

    def _take_steps(self, steps):
        self._steps = steps
        try:
            while steps[self._state].take(self):
                pass
        except ssl.SSLError as error:
            log.debug("%s: TLS: %s", self._visitor, error.reason or error)
            self.close()
        except NoThread as error:
            log.warning("%s: %s; the visit is reset", self._visitor, error)
            self.duplex.reset()  # not an empty but complete visit
            self.close()
        except (OSError, VisitorGone, client_hello.NotTLS) as error:
            log.debug("%s: %s", self._visitor, error or "left")
            self.close()
        except Exception:
            log.exception("%s: its connection is closed (bug, traceback follows)", self._visitor)
            self.close()

    def _go_to(self, state):
        """Enter a state, whose time begins anew. Returns what a step returns."""
        self._state, self._deadline, self._waits = state, None, 0
        return True

    def _hear(self):
        """The first byte in this state has come."""
        self._go_to(self.STEPS[self._state].first_byte or self._state)

    def _wait(self, seconds):
        """Take the step again when the visitor sends something; ``seconds`` count from the first
        wait in a state. Returns what a step returns."""
        if self._port.is_draining() and not self.STEPS[self._state].outlasts_drain:
            self.close()
            return False
        if self._deadline is None:
            # The first wait in a state is most likely a short one, and parking takes two detours.
            # Later ones are for visitors that trickle, which must not hold a worker.
            self._deadline = monotonic() + seconds
            # Others wait for step threads, so an exchange thread may linger all the same.
            if self._steps is self.STEPS and self._visitor.listener.crowded:
                self._visitor.listener.park(self, seconds)
                return False
            with contextlib.suppress(TimeoutError):
                self.duplex.wait_readable(NEXT_STEP_WAIT)
                return True
        self._waits += 1
        left = max(0, self._deadline - monotonic())
        self._visitor.listener.await_more(self, left, self._waits)
        return False
