"""The verdicts of a policy on a visit: it is allowed, or its visitor gets a page. Values, no I/O.

A policy is a chain of rules. A *rule* is an object whose ``judge(caller)`` returns an Allow or an
Answer. The first Answer ends the chain; otherwise the Allows are added up.
"""

import math
from collections.abc import Hashable
from typing import NamedTuple

from gotunnel_agent.common import addresses

from . import pages
from .pages import Page, Pairs


class Allow(NamedTuple):
    """The visit may go to the agent. Its request gets the additional fields ``add``, and loses
    those whose http1.kind() is in ``strip``: they were for the gateway, or only the gateway may set
    them."""

    add: Pairs = ()
    strip: tuple[str, ...] = ()


class Answer(NamedTuple):
    """The visitor gets ``page``; in tcp mode it is disconnected. ``reason`` is for the log."""

    page: Page
    reason: str


WELCOME = Allow()  # the request goes on unchanged


class Caller(NamedTuple):
    """What the rules know about a visit.

    ``address``: the visitor's, as text, "" if a proxy hides it. ``ip``: the same parsed, None if it
    is no IP address. ``authorization``: the value of that field of the request, None without one;
    several are joined by commas.
    """

    address: str
    ip: addresses.Address | None
    authorization: str | None

    @property
    def share(self) -> Hashable:
        """The key that the visitor is counted by. All visitors without an address share one."""
        return None if self.ip is None else addresses.subscriber(self.ip)


def refusal(status: int, code: str, text: str, fields: Pairs = ()) -> Answer:
    """An Answer with an error page; arguments as for pages.error()."""
    return Answer(pages.error(status, code, text, fields), text)


def too_many(what: str, wait: float) -> Answer:
    """An Answer with status 429. ``what`` is a sentence without its full stop; ``wait``: seconds
    until another visit may be allowed."""
    seconds = max(1, math.ceil(wait))
    text = f"{what}. Try again in {pages.in_words(seconds)}."
    return refusal(429, "too-many-requests", text, (("Retry-After", str(seconds)),))
