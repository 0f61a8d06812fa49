"""What a policy says of a visit: it may come in, or its visitor gets a page. Values, no I/O.

A policy is a chain of rules. A *rule* is an object whose ``judge(caller)`` returns an Allow or an
Answer; the first Answer is the policy's, and the Allows add up.
"""

import math
from collections.abc import Hashable
from typing import NamedTuple

from gotunnel_agent.common import addresses

from . import pages
from .pages import Page

MOST_SHOWN = 60  # characters of an address that a text repeats


class Allow(NamedTuple):
    """The visit may go to the agent; its request with the further fields ``add`` (name, value), and
    without those whose http1.kind() is in ``strip``: fields that were for the gateway, or
    that only the gateway may set."""

    add: tuple = ()
    strip: tuple = ()


class Answer(NamedTuple):
    """The visitor gets a page instead. ``reason`` is for the log, and all that a visitor in tcp
    mode could be told."""

    page: Page
    reason: str


WELCOME = Allow()


class Caller(NamedTuple):
    """What the rules know of a visit.

    ``address``: its visitor's, as text, "" if it has none. ``ip``: the same, None if the text is no
    IP address. ``authorization``: the value of that field of its request, None without one; if
    there were several, they are joined by commas.
    """

    address: str
    ip: addresses.Address | None
    authorization: str | None

    @property
    def share(self) -> Hashable:
        """The key that the visitor is counted by; those without an address have one together."""
        return None if self.ip is None else addresses.subscriber(self.ip)


def refusal(status: int, code: str, text: str, fields: tuple = ()) -> Answer:
    """An Answer with an error page, see pages.error()."""
    return Answer(pages.error(status, code, text, fields), text)


def too_many(what: str, wait: float) -> Answer:
    """``what`` came too often; ``wait`` is the seconds until it may come again."""
    seconds = max(1, math.ceil(wait))
    text = f"{what}. Try again in {seconds} s."
    return refusal(429, "too-many-requests", text, (("Retry-After", str(seconds)),))
