"""What all processes show together: the dashboard, the metrics and `status` of any of them show
all, and what an operator does at one of them is done at all. (Blocked addresses are told by the
cluster that the processes are: cluster/counts.py.)

A process asks its siblings when it is asked itself; nothing is kept up to date meanwhile. A sibling
that does not answer in time is missing in the sums, and its row in "processes" has no figures.
"""

from __future__ import annotations

import logging
import os
import threading
from collections import OrderedDict, deque
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from time import monotonic
from typing import Any, NamedTuple, Protocol

from gotunnel_agent.common.exposition import Metric

from ..dashboard.live import MOST_KEPT, VISITS_EVERY, Live
from ..dashboard.state import Document, Seen
from . import merged

log = logging.getLogger("gotunnel.together")

# Topics of questions.
STATE, PUBLIC, STATUS, VISITS, METRICS, HEALTH = (
    "state", "public", "status", "visits", "metrics", "health"
)  # fmt: skip
FIND, END, RENEW, LOGIN, LOGOUT = "find session", "end session", "renew", "login", "logout"
MOST_UNKNOWN = 1000  # digests of cookies that are no login, which no sibling is asked for again


class Siblings(Protocol):
    """What is needed of a child.Child."""

    number: int
    supervisor: int
    began: float
    processes: list[Any]
    all_ready: bool

    def ask(self, topic: str, question: Any = None) -> dict[int, Any]: ...

    def answer(self, topic: str, function: Callable[[Any], Any]) -> None: ...


class Together:
    """The processes as one. Any thread."""

    def __init__(self, siblings: Siblings) -> None:
        self._siblings = siblings
        self.supervisor = siblings.supervisor  # process id

    # The document

    def share_document(self, own: Callable[[], Document]) -> None:
        """``own()``: this process's document, which siblings may ask for."""
        self._siblings.answer(STATE, lambda question: own())

    def share_public(self, own: Callable[[], Document]) -> None:
        self._siblings.answer(PUBLIC, lambda question: own())

    def document(self, own: Document) -> Document:
        """The document of all, made of this process's own."""
        found = self._siblings.ask(PUBLIC if own["public"] else STATE)
        return self._merged(found, own)

    def _merged(self, found: Mapping[int, Document], own: Document) -> Document:
        number = self._siblings.number
        return merged.documents(
            number, {**found, number: own}, self._siblings.processes, self.uptime()
        )

    def uptime(self) -> float:
        """The supervisor's, in seconds."""
        return monotonic() - self._siblings.began

    def share_status(self, own: Callable[[], Document]) -> None:
        """As share_document(), for `status`, which needs no dashboard."""
        self._siblings.answer(STATUS, lambda question: own())

    def status(self, own: Document) -> Document:
        found = self._siblings.ask(STATUS)
        return self._merged(found, own)

    # Metrics and health

    def share_metrics(
        self, own: Callable[[], Iterable[Metric]], unhealthy: Callable[[], str | None]
    ) -> None:
        self._siblings.answer(METRICS, lambda question: merged.as_values(own()))
        self._siblings.answer(HEALTH, lambda question: unhealthy())

    def metrics(self, own: Iterable[Metric]) -> list[Metric]:
        found = self._siblings.ask(METRICS)
        found[self._siblings.number] = merged.as_values(own)
        return [*merged.metrics(found), merged.restarts(self._siblings.processes)]

    def unhealthy(self, own: str | None) -> str | None:
        """What is wrong with the processes that serve; None if nothing is. ``own``: of this one."""
        found: dict[int, str | None] = {
            each["process"]: "does not answer"
            for each in self._siblings.processes if each["state"] == "serving"
        }  # fmt: skip
        found |= {**self._siblings.ask(HEALTH), self._siblings.number: own}
        problems = [f"process {number}: {text}" for number, text in sorted(found.items()) if text]
        return "; ".join(problems) or None

    def is_ready(self) -> bool:
        """Whether all processes have served, and the gateway does not stop."""
        return self._siblings.all_ready

    # Visits

    def live(self) -> Live:
        return LiveOfAll(self._siblings)

    # Acts

    def share_acts(
        self, session: Callable[[str], Any], renew: Callable[[str], object | None]
    ) -> None:
        """What siblings ask this process to do. ``session(id)``: a session of this process, or
        None. ``renew(hostname)``: None if the certificate is ordered."""
        siblings = self._siblings
        siblings.answer(FIND, lambda id: _described(session(id)))
        siblings.answer(RENEW, lambda hostname: renew(hostname) is None)

        def end(question: Sequence[str]) -> bool:
            id, reason = question
            found = session(id)
            if found is not None:
                found.end_by_operator(reason)
            return found is not None

        siblings.answer(END, end)

    def session(self, id: str) -> Any:
        """The session of a sibling, as dashboard.acts.Session; None if there is none."""
        for told in self._siblings.ask(FIND, id).values():
            if told is not None:
                host, name, entry = told
                return SessionElsewhere(self._siblings, id, AgentElsewhere(
                    host, IdentityElsewhere(name, entry)
                ))  # fmt: skip
        return None

    def renew(self, hostname: str) -> bool:
        """Whether a sibling orders the certificate."""
        return any(self._siblings.ask(RENEW, hostname).values())

    # Logins

    def share_logins(self, logins: Any) -> None:
        """Have a login at one process count at all. ``logins``: dashboard.sessions.Sessions."""
        asking = threading.Lock()  # held while siblings are asked: one login at a time
        unknown: OrderedDict[str, None] = OrderedDict()

        def elsewhere(digest: bytes, address: Hashable) -> tuple[str, float] | None:
            name = digest.hex()
            with asking:
                if name in unknown:
                    return None
                found = [told for told in self._siblings.ask(LOGIN, name).values() if told]
                if not found:  # a cookie of 256 random bits is nobody's later either
                    unknown[name] = None
                    if len(unknown) > MOST_UNKNOWN:
                        unknown.popitem(last=False)
                    return None
            csrf, left, only_from = found[0]
            return (csrf, left) if only_from in (None, repr(address)) else None

        def tell(name: str) -> list[Any] | None:
            told = logins.told(bytes.fromhex(name))
            return None if told is None else [*told[:2], told[2] and repr(told[2])]

        def end(names: Sequence[str]) -> None:
            logins.end_digests(map(bytes.fromhex, names))

        logins.elsewhere = elsewhere
        logins.ended = lambda digests: self._siblings.ask(LOGOUT, [each.hex() for each in digests])
        self._siblings.answer(LOGIN, tell)
        self._siblings.answer(LOGOUT, end)


class IdentityElsewhere(NamedTuple):
    name: str
    entry: object


class AgentElsewhere(NamedTuple):
    host: str
    identity: IdentityElsewhere


class SessionElsewhere:
    """A session that another process has."""

    def __init__(self, siblings: Siblings, id: str, agent: AgentElsewhere) -> None:
        self._siblings = siblings
        self.id, self.agent = id, agent

    def end_by_operator(self, reason: str) -> None:
        self._siblings.ask(END, [self.id, reason])


def _described(session: Any) -> list[Any] | None:
    if session is None:
        return None
    identity = session.agent.identity
    return [session.agent.host, identity.name, None if identity.entry is None else True]


class LiveOfAll(Live):
    """The visits of all processes. Counts its own, and asks the siblings for theirs when it is
    asked."""

    def __init__(self, siblings: Siblings, now: Callable[[], float] = monotonic) -> None:
        super().__init__(now)
        self._siblings = siblings
        self._known: Mapping[int, tuple[object, int]] = {}
        self._own = 0  # number of the last own visit that is among all
        self._all: deque[Seen] = deque(maxlen=MOST_KEPT)
        self._all_number = 0
        self._asked_at = 0.0  # monotonic
        self._gathering = threading.Lock()  # guards the five above; held while siblings are asked
        siblings.answer(VISITS, self._tell)

    def _tell(self, known: Mapping[str, Sequence[Any]]) -> list[Any]:
        """To a sibling: this process's life, the number of its last visit, and the visits since the
        one that the sibling knows."""
        life, number = known.get(str(self._siblings.number), (None, 0))
        return [os.getpid(), *super().since(number if life == os.getpid() else 0)]

    def since(self, number: int, most: int = MOST_KEPT) -> tuple[int, list[Seen]]:
        with self._gathering:
            if self._now() - self._asked_at >= VISITS_EVERY / 2:
                self._gather()
                self._asked_at = self._now()
            count = min(self._all_number - number, most, len(self._all))
            found = list(self._all)[len(self._all) - count :] if count > 0 else []
            return self._all_number, found

    def _gather(self) -> None:
        """Caller holds the lock."""
        known = {str(number): list(last) for number, last in self._known.items()}
        found = self._siblings.ask(VISITS, known)
        before = self._own
        self._own, own = super().since(before)
        self._known, came = merged.visits(self._known, found, Seen)
        came = sorted([*came, *own], key=lambda visit: visit.at)
        self._all += came
        self._all_number += len(came)
