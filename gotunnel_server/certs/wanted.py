"""What is known of a hostname whose certificate is wanted, and its form in a file. No clock and no
disk here. All instants are seconds since 1970."""

from __future__ import annotations

import re
from dataclasses import dataclass, field

from gotunnel_agent.common.one_line import words_and_link

from .cancel import Stop
from .kept import Kept, number
from .rate_limits import UNLIMITED, Limits, Token
from .schedule import Window, renew_at
from .store import Stored

LOST = (
    "its certificate was lost from ACME_CACHE twice, each time soon after it was ordered: find out "
    "what removes it"
)


@dataclass(eq=False)
class Wanted:
    """A hostname whose certificate is wanted, and what was learned of its orders. The lock of
    OrderQueue guards all of it."""

    name: str
    agent: object  # the latest that wanted it; None: the gateway
    limits: Limits = UNLIMITED  # the agent's
    stored: Stored | None = None
    failures: int = 0  # in a row, by this hostname's fault
    lost: bool = False  # the latest certificate replaces one that had just been ordered
    not_before: float = 0.0  # no attempt earlier, whatever is due
    challenge: str | None = None  # the type that worked last
    tried: str | None = None  # the type that failed last
    trying: str | None = None  # the type of the order that runs
    window: Window | None = None  # the CA's renewal window (ARI) for one certificate
    window_of: int | None = None  # the serial number of that certificate
    ask_at: float = 0.0  # when to ask for the next window
    error: str = ""  # of the latest attempt
    turn_at: float = 0.0  # if it waits for tokens: about when they will be there
    turn_why: str = ""  # if it waits for tokens: which limit is reached
    busy: bool = False  # a job for it runs: an order, or a question for its renewal window
    ordering: bool = False  # ... an order
    tokens: list[Token] = field(default_factory=list)  # that its order took from the RateLimits
    kept: tuple[object, ...] = ()  # what the store has of its attempts: order_queue._attempt_in()
    told: tuple[object, ...] = ()  # its state as last reported: OrderQueue._to_tell()
    asked_for: bool = False  # the operator wants a new one: the next order must not wait
    stop: Stop = field(default_factory=Stop)  # set when it is no longer wanted

    def due_at(self) -> float:
        """When the next order is due."""
        if self.stored is None or self.asked_for:
            return self.not_before
        window = self.window if self.window_of == self.stored.leaf.serial_number else None
        due = renew_at(self.name, self.stored.begins_at, self.stored.ends_at, window)
        return max(due, self.not_before)

    def restore(self, state: Kept, latest: float) -> None:
        """Take what as_dict() made. An invalid value counts as missing, also a delay beyond
        ``latest``: it was written with another clock."""
        self.failures = max(0, int(number(state.get("failures"))))
        self.not_before = number(state.get("next_attempt_at"), latest)
        self.ask_at = number(state.get("ask_at"), latest)
        self.lost = state.get("lost") is True
        self.challenge, self.tried = (
            kind if isinstance(kind, str) else None
            for kind in map(state.get, ("challenge", "tried"))
        )
        self.error, self.turn_why = (
            words_and_link(text) if isinstance(text, str) else ""
            for text in map(state.get, ("error", "turn_why"))
        )
        self.turn_at = number(state.get("turn_at"))
        window, serial = state.get("window"), state.get("window_of")
        if isinstance(window, list) and len(window) == 2 and isinstance(serial, str):
            self.window = Window(*map(number, window))
            self.window_of = int(serial, 16) if re.fullmatch("[0-9a-f]{1,64}", serial) else None

    def heed(self, state: Kept, latest: float) -> None:
        """Take over the attempts of another process from ``state``, as restore() does. If that one
        has not failed, its certificate is missing: ours goes on."""
        other = Wanted(self.name, self.agent)
        other.restore(state, latest)
        self.failures, self.tried = other.failures, other.tried
        self.challenge = other.challenge or self.challenge
        if other.error:
            self.not_before, self.error = other.not_before, other.error

    def judge_loss(self, now: float) -> None:
        """Find out whether a certificate is lost: it was ordered within the day, and the store has
        none, or an old one that ends before the next order is due. Then order another at once, but
        only once: a CA issues few for one hostname in a week."""
        if self.stored is not None and self.stored.ends_at > max(now, self.not_before):
            self.lost = False
        elif self.not_before > now and not self.error:
            if self.lost:
                self.error = LOST
            else:
                self.lost, self.not_before = True, 0.0

    def wait_for_turn(self, at: float, why: str) -> bool:
        """It waits for tokens until about ``at``. False if it did so already."""
        is_new = not self.turn_why
        self.turn_at, self.turn_why = at, why
        return is_new

    def begin_turn(self, tokens: list[Token]) -> None:
        """Its order begins, and has taken ``tokens``."""
        self.tokens, self.turn_at, self.turn_why = tokens, 0.0, ""

    @property
    def has_only_waited(self) -> bool:
        """Whether no order for it was ever tried."""
        return self.stored is None and not (self.failures or self.error or self.not_before)

    def as_dict(self) -> dict[str, object]:
        """What has to outlive a restart, for JSON."""
        return {
            "failures": self.failures,
            "lost": self.lost,
            "next_attempt_at": self.not_before,
            "challenge": self.challenge,
            "tried": self.tried,
            "error": self.error,
            "turn_at": self.turn_at,
            "turn_why": self.turn_why,
            "window": self.window,
            "window_of": None if self.window_of is None else f"{self.window_of:x}",
            "ask_at": self.ask_at,
        }
