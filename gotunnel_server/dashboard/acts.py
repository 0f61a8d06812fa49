"""What an operator can do on the dashboard: end a session, have a certificate ordered, block an
address. Each act is logged, with the operator's address.

Acts are bounded. A session that was ended may come back. An order respects the CA's rate limits
(certs/order_queue.py). A block ends by itself, and there are few (net/blocks.py).
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable, Mapping
from shlex import quote
from typing import Protocol

from gotunnel_agent.common import addresses
from gotunnel_agent.common.hostnames import normal_hostname
from gotunnel_agent.common.one_line import on_one_line, words_and_link, words_on_one_line

from ..net import blocks
from ..net.blocks import Blocks
from .calls import Call, Refused, Who
from .state import Document, Tunnel, agent_name, of_block

log = logging.getLogger("gotunnel.acts")

MOST_REASON = 200  # characters of the operator's
MOST_HINDRANCE = 1000


class Session(Tunnel, Protocol):
    """A session that can be ended (agents/tunnel.py)."""

    def end_by_operator(self, reason: str) -> None: ...


class Hindrance(Protocol):
    """Why no certificate is ordered now; its text says it (certs.state.NotRenewed)."""

    until: float | None  # when to ask again, in seconds since 1970; None if that does not help


class Hall(Protocol):
    """What the acts need of the gateway's other parts."""

    blocks: Blocks

    def session(self, id: str) -> Session | None: ...

    def renew(self, hostname: str) -> Hindrance | None:
        """Order a certificate now, if nothing hinders that."""

    def cut(self, is_cut: Callable[[str], bool]) -> int: ...

    def protected(self) -> Iterable[addresses.Network]:
        """The networks of TRUSTED_PROXIES: each of their addresses stands for many visitors."""

    def now(self) -> float: ...


def end_session(hall: Hall, call: Call) -> Document:
    """Raises Refused."""
    id = call.parts[0]
    reason = _text(call.content, "reason")
    session = hall.session(id)
    if session is None:
        raise Refused(
            404, "no-session",
            f"There is no session {_quoted(id)}. It may have ended, and its agent has another one "
            "now: load the page again.",
        )  # fmt: skip
    name = agent_name(session.agent)
    told = (
        f"the operator has ended this session{f': {reason}' if reason else ''}; it may dial again"
    )
    session.end_by_operator(told)
    _log(call.who, "ended the session of agent %s at %s%s", name or "without a name",
         session.agent.host, f": {reason}" if reason else "")  # fmt: skip
    # With the shared secret, an agent gives itself any name.
    keep_out = (
        "To keep it out, change JWT_SECRET, which all agents without an entry in AGENTS_FILE share"
        if session.agent.identity.entry is None
        else f"To keep it out, remove its credential: gotunnel-server agents remove {quote(name)}"
    )
    return {
        "ended": id,
        "agent": name,
        "message": f"The session ends, and its visits are cut. The agent dials again. {keep_out}.",
    }


def renew(hall: Hall, call: Call) -> Document:
    """Raises Refused."""
    hostname = normal_hostname(call.parts[0])
    hindrance = hall.renew(hostname)
    if hindrance is not None:
        text = words_and_link(hindrance, MOST_HINDRANCE)
        if hindrance.until is None:
            raise Refused(409, "not-renewed", f"{text}.")
        left = max(1, math.ceil(hindrance.until - hall.now()))
        raise Refused(
            429, "not-yet", f"{text}. Try again in {left} s.", (("Retry-After", str(left)),)
        )
    _log(call.who, "asked for a new certificate of %s", hostname)
    return {
        "hostname": hostname,
        "message": "A new certificate is being ordered. Its state follows within a minute.",
    }


def block(hall: Hall, call: Call) -> Document:
    """Raises Refused."""
    text = _text(call.content, "address", 100)
    seconds = _seconds(call.content)
    reason = _text(call.content, "reason")
    try:
        network = blocks.read_network(text)
    except blocks.Refused as error:
        raise Refused(400, "bad-address", f"{error}.") from None
    shown = blocks.as_text(network)
    own = blocks.network_of(call.who.address)
    if own is not None and blocks.overlaps(network, [own]):
        what, advice = "is your own address", ""
        if network != own:
            what = f"holds your own address, {call.who.address}"
            advice = "Block a smaller network, or "
        raise Refused(
            409, "own-address",
            f"{shown} {what}: you would lock yourself out. {advice}come from elsewhere.",
        )  # fmt: skip
    if blocks.overlaps(network, hall.protected()):
        raise Refused(
            409, "trusted-proxy", f"{shown} has an address of TRUSTED_PROXIES, which stands for "
            "many visitors. Block the visitor's own address.",
        )  # fmt: skip
    try:
        found = hall.blocks.add(network, seconds, reason, call.who.address)
    except blocks.Refused as error:
        raise Refused(409, "too-many-blocks", f"{error}.") from None
    cut = hall.cut(hall.blocks.__contains__)
    _log(call.who, "blocked %s for %d s%s; %d connections were cut", found.address, seconds,
         f": {reason}" if reason else "", cut)  # fmt: skip
    return {**of_block(found), "cut": cut, "message": f"{found.address} is blocked."}


def unblock(hall: Hall, call: Call) -> Document:
    """Raises Refused."""
    text = "/".join(call.parts)
    try:
        network = blocks.read_network(text)
    except blocks.Refused as error:
        raise Refused(400, "bad-address", f"{error}.") from None
    found = hall.blocks.remove(network)
    if found is None:
        raise Refused(404, "no-block", f"{_quoted(text)} is not blocked. GET api/v1/blocks lists "
                      "what is.")  # fmt: skip
    _log(call.who, "unblocked %s", found.address)
    return of_block(found)


def _seconds(content: Mapping[str, object]) -> int:
    """How long to block: a number, or the text of one in a form."""
    value = content.get("seconds", "")
    if value in ("", None):
        return blocks.USUAL
    expected = f"seconds: {_quoted(value)} came, expected a whole number from {blocks.LEAST} to "
    if isinstance(value, str) and value.isascii() and value.isdigit() and len(value) < 10:
        value = int(value)
    if isinstance(value, bool) or not isinstance(value, int):
        raise Refused(400, "bad-seconds", f"{expected}{blocks.MOST}.")
    if not blocks.LEAST <= value <= blocks.MOST:
        raise Refused(400, "bad-seconds", f"{expected}{blocks.MOST} (30 days).")
    return value


def _text(content: Mapping[str, object], key: str, most: int = MOST_REASON) -> str:
    """A text of the operator's, on one line. Raises Refused if it is none, or too long."""
    value = content.get(key)
    if value is None:
        return ""
    if not isinstance(value, str):
        raise Refused(400, f"bad-{key}", f"{key}: {_quoted(value)} came, expected a text.")
    if len(value) > most:
        raise Refused(
            400, f"bad-{key}", f"{key}: {len(value)} characters came, expected at most {most}."
        )
    return words_on_one_line(value, most)


def _quoted(value: object) -> str:
    return on_one_line(repr(value), 60)


def _log(who: Who, text: str, *arguments: object) -> None:
    by = "login" if who.name == "session" else who.name
    log.info(f"dashboard: %s ({by}) {text}", who.address or "an unknown address", *arguments)
