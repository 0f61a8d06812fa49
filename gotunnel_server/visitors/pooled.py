"""Forwards a request to one agent of a pool, and to another one if the first cannot serve it.

Another agent gets the request in these cases, as long as no final answer has begun:

    nothing of it was sent             the agent has left, or opens no stream
    no target has got any of it        the agent refused, since it did not reach its target
    it may arrive twice                the agent, or its target, broke off; or the agent's link is
                                       silent. The request must be idempotent (RFC 9110 §9.2.2) and
                                       have no body

A request that must not arrive twice is not even sent over a link that is silent (silence.py).

With ``sticky: cookie`` a visitor gets a cookie of the gateway's own, which the target never sees.
Its name's prefix __Host- has browsers refuse it from other hosts, and without Secure (RFC 6265bis).
"""

from __future__ import annotations

import logging
from functools import partial

from gotunnel_agent.common.http1 import Fields, Malformed, Response
from gotunnel_agent.common.refusals import BY_CODE

from ..routes import COOKIE, Member, Pool
from . import forwarded
from .exchange import IDEMPOTENT, Exchange
from .forwarded import Proxies
from .request import AgentLost, Request, Upgraded, VisitorGone
from .silence import Silence, gives_sign
from .sites import Forward
from .target import TargetFailed, Unprocessed
from .upload import END_TIMEOUT, WATCH, Upload

log = logging.getLogger("gotunnel.pooled")

# Members that one request is sent to, at most: a request that breaks its target must not break all.
MOST_TRIES = 4
RESEND = 64 * 1024  # bytes of a body that are kept for another member: forms, not files

MOST_TOKEN = 64  # characters of a token that are looked at; ours are 32
NAME = "__Host-gotunnel"
# Lax: a link from another site leads to the same agent, a request that the other site makes not.
COOKIE_FIELD = f"{NAME}={{}}; Path=/; Secure; HttpOnly; SameSite=Lax"

REFUSED = frozenset(refusal.word for refusal in BY_CODE.values())  # no target got any of it
BROKEN = frozenset({"agent-gone", "cut-short", "no-answer"})  # some of it may have arrived
NOT_OPENED = "agent-busy"


class Silent(Exception):
    """The link to the agent is silent, and the request may go to another one."""


class PooledExchange(Exchange):
    """One request to a member of a pool, and its answer."""

    def __init__(
        self,
        request: Request,
        forward: Forward,
        pool: Pool,
        proxies: Proxies,
        response_timeout: float,
    ):
        super().__init__(request, forward, proxies, response_timeout)
        self._pool = pool
        self._token = token_of(request.fields)
        address = forwarded.visitor(request.fields, request.peer, proxies)
        self._key = pool.key(address, self._token or "")
        self._repeatable = self._upload is None and request.method in IDEMPOTENT
        self._tried: list[Member] = []  # the last one is the present one
        self._holds_member = False  # the visit counts as one of that member's

    def run(self) -> None:
        try:
            self._take_member()
            super().run()
        finally:
            self._leave_member()

    # Members

    def _take_member(self) -> bool:
        """Choose the next member; False if there is none that was not tried."""
        owner = self._request.owner
        bound = None if owner is None else owner.tunnel
        member = self._pool.choose(self._key, self._tried, bound)
        if member is None:
            return False
        self._holds_member = True
        self._tried.append(member)
        self._route = member.route
        self._silence = Silence(member.route.tunnel)
        if self._visit is not None:
            self._visit.route = member.route
        return True

    def _leave_member(self) -> None:
        if self._holds_member:
            self._holds_member = False
            self._pool.leave(self._tried[-1])

    def _run(self) -> None:
        while True:
            try:
                return super()._run()
            except (AgentLost, TargetFailed, Unprocessed, Silent) as error:
                # No other name for it: a frame that keeps an exception which has passed through it
                # is a reference cycle, and holds the visitor.
                if isinstance(error, TargetFailed) and error.page.code in REFUSED:
                    self._pool.refused(self._tried[-1])
                if not (self._may_go_elsewhere(error) and self._go_elsewhere()):
                    raise self._final(error) from None
                log.debug("%s: another agent gets the request: %s", self._route.hostname, error)

    def _may_go_elsewhere(self, failure: Exception) -> bool:
        """Whether another member may get the request. A body is given back then."""
        if self._head_sent or len(self._tried) >= MOST_TRIES or len(self._pool.members) < 2:
            return False
        if isinstance(failure, (AgentLost, Silent)):
            return True
        code = failure.page.code if isinstance(failure, TargetFailed) else NOT_OPENED
        if code in REFUSED or code == NOT_OPENED:
            return not isinstance(self._upload, KeptUpload) or self._upload.take_back()
        return code in BROKEN and self._repeatable

    def _go_elsewhere(self) -> bool:
        self._leave_member()
        if not self._take_member():
            return False
        # As a new Exchange has them.
        self._holds_stream = self._half_close = self._login = False
        self._fresh = None
        if self._upload is not None:
            self._upload = self._new_upload()
        return True

    def _final(self, failure: Exception) -> Exception:
        if (
            isinstance(failure, Silent)
            or isinstance(failure, AgentLost)
            and not super()._may_be_lost()
        ):
            return self._agent_gone()
        return failure

    def _may_be_lost(self) -> bool:
        return True

    def _new_upload(self) -> Upload:
        return KeptUpload(self._request, self._timeout)

    # Silent links

    def _ask(self) -> None:
        if not self._repeatable and self._has_choice() and not gives_sign(self._route.tunnel):
            self._pool.silent(self._tried[-1])
            raise Silent
        super()._ask()

    def _look(self) -> None:
        if not self._head_sent and self._silence.is_long():
            self._pool.silent(self._tried[-1])
            if self._repeatable and self._has_choice():
                raise Silent

    def _has_choice(self) -> bool:
        """Whether there is another member that can serve, as far as is known."""
        return any(member.is_ready and member not in self._tried for member in self._pool.members)

    # What the target and the visitor get

    def _head(self) -> list[tuple[str, str]]:
        fields = super()._head()
        return fields if self._token is None else without_token(fields)

    def _answer(self) -> None:
        self._pool.reached(self._tried[-1])
        super()._answer()

    def _fields(self, response: Response, keep_upgrade: bool = False) -> list[tuple[str, str]]:
        fields = super()._fields(response, keep_upgrade)
        if response.status < 200 and not keep_upgrade:  # an interim answer
            return fields
        if isinstance(self._upload, KeptUpload):
            self._upload.forget()
        if self._pool.sticky == COOKIE:
            token = self._tried[-1].token
            if token != self._token:
                fields.append(("Set-Cookie", COOKIE_FIELD.format(token)))
        return fields

    def _onward(self) -> Upgraded:
        return super()._onward()._replace(done=partial(self._pool.leave, self._tried[-1]))

    def _switch(self, response: Response) -> None:
        super()._switch(response)
        if response.status == 101:
            self._holds_member = False  # its relay leaves it


class KeptUpload(Upload):
    """An Upload that keeps the body's first RESEND bytes, to begin again with them."""

    def __init__(self, request: Request, timeout: float):
        super().__init__(request, timeout)
        self._kept: list[bytes] = []
        self._size = 0  # bytes that were read of the body
        self._keeps = True  # the final answer has not begun

    def at_hand(self) -> list[bytes]:
        return self._keep(super().at_hand())

    def _read(self) -> list[bytes]:
        return self._keep(super()._read())

    def _keep(self, pieces: list[bytes]) -> list[bytes]:
        self._size += sum(map(len, pieces))
        if self._size <= RESEND and self._keeps:
            self._kept += pieces
        else:
            self._kept.clear()
        return pieces

    def forget(self) -> None:
        """The final answer begins: nothing is sent again."""
        self._keeps = False
        self._kept.clear()

    def take_back(self) -> bool:
        """Stop, and give the body back for another Upload. False if that is no longer possible:
        then only end() may be called."""
        self._unwanted.set()
        self._over.set()
        if self._thread is not None:
            self._thread.join(WATCH + END_TIMEOUT)
            if self._thread.is_alive() or isinstance(self.problem, (Malformed, VisitorGone)):
                return False
        if self._size > RESEND or not self._keeps:
            return False
        self._request.unread_body(self._kept)
        return True


def token_of(fields: Fields) -> str | None:
    """The token in the gateway's own cookie; None if there is none."""
    for value in fields.all("cookie"):
        for pair in value.split(";"):
            name, _, token = pair.strip().partition("=")
            if name == NAME:
                return token[:MOST_TOKEN]
    return None


def without_token(fields: list[tuple[str, str]]) -> list[tuple[str, str]]:
    """The fields without the gateway's own cookie."""
    found = []
    for name, value in fields:
        if name.lower() == "cookie":
            pairs = value.split(";")
            left = [pair for pair in pairs if pair.strip().partition("=")[0] != NAME]
            if len(left) < len(pairs):
                value = ";".join(left).strip()
        if value or name.lower() != "cookie":
            found.append((name, value))
    return found
