"""Claims of hostnames, for one of several gateways: the board grants a hostname first, and then
the registry of this gateway takes it.

The board knows *owners*, not sessions: an agent's process, or a pool. So an agent that has a
session with each gateway holds its hostnames at all of them, and an agent that comes back to
another gateway gets them at once. An agent without an instance (Go) is known by its session alone.

A claim never waits for the board. It is noted here, and raises Undecided; thread "cluster" asks the
board, and the next attempt finds the answer. A name that members hold for another owner has a
RemoteHolder, by which takeover.py asks the agent there for a sign of life.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from hashlib import sha256
from time import monotonic
from typing import Any, NamedTuple, Protocol

from gotunnel import MEMBERS

from ..routes import HostnameTaken, Registry, Route, Tunnel, Undecided
from .board import GRANTED, LATER, TAKEN, UNKNOWN, Answer, Ask, Board, Message
from .members import Stale

log = logging.getLogger("gotunnel.claims")

BATCH = 500  # names in one call
RE_ASK = 0.25  # seconds from an answer that is not final to the next question
ASK_AGAIN = 1.0  # seconds until a RemoteHolder that has not answered is asked again
MOST_ASKED = 10_000  # agents here that are asked for other gateways at a time
ANSWER_TIMEOUT = 5.0  # seconds for which their answers are awaited; heartbeat.py takes 3
PATIENCE = 5.0  # seconds without serving until agents are asked to dial again
MOST_NAMES = 5_000  # in one message
MOST_NAME = 255  # characters of one
# Members that are told to look after the earlier session of an agent that has come here: with
# more, it most likely has a session with each of them.
MOST_LOOKED_AFTER = 4

ASKING = "the other gateways are asked"
WAITS = "another gateway may still serve it"
AWAY = "this gateway cannot ask the other ones now"


class Member(Protocol):
    """What is needed of members.Member."""

    id: str

    def publish(self, to: str, message: Message) -> None: ...

    def wake(self) -> None: ...

    def keep(self) -> None: ...

    def is_away(self) -> bool: ...

    def serves(self) -> bool: ...


class Stranger(NamedTuple):
    """The agent of another gateway, as registration.Agent.is_same_process() sees it."""

    instance: str = ""


class RemoteHolder:
    """The agent of other gateways that has a hostname, as takeover.py sees a tunnel. Any thread."""

    agent = Stranger()  # same processes have the same owner, so the board grants them the name
    moving = False

    def __init__(self, claims: SharedClaims, names: Iterable[str], members: Iterable[str]):
        self.gone = threading.Event()  # never set: the board says when the name is free
        self.names = tuple(names)
        self.members = tuple(members)
        self._claims = claims
        self._asked_at = 0.0
        self._answered_at = 0.0  # monotonic

    def __str__(self) -> str:
        return f"an agent of gateway {', '.join(self.members)}"

    def ask(self) -> float:
        """Ask for a sign of life. Returns since when it is asked."""
        self._asked_at = monotonic()
        self._claims.ask(self)
        return self._asked_at

    def has_answered(self, since: float) -> bool:
        answered = self._answered_at > since
        if not answered and monotonic() - self._asked_at > ASK_AGAIN:
            self.ask()  # messages may get lost
        return answered

    def answered(self) -> None:
        self._answered_at = monotonic()

    def holds(self, hostname: str) -> bool:
        """As far as is known; the board will tell when it is free."""
        return True

    def watch(self, watched: bool) -> None:
        self._claims.watch(self, watched)

    def replace(self, reason: str) -> None:
        """Its own gateway ends it when it does not answer."""

    def step_aside(self, successor: object) -> None:
        """It has the same owner then, and goes on."""


class _Hold:
    """A name that this member holds. ``users``: the tunnels here that have it, or are about to;
    without one it is given back. ``sure``: the board has said so in this contact. ``was``: see
    Ask."""

    __slots__ = ("owner", "number", "users", "sure", "was")

    def __init__(self, owner: str, number: int, users: set[Tunnel]):
        self.owner = owner
        self.number = number
        self.users = users
        self.sure = True
        self.was = ""


class _Pending:
    """A claim that the board has not granted yet."""

    def __init__(self, owners: Mapping[str, str], modes: Mapping[str, str]):
        self.owners, self.modes = owners, modes  # by name
        self.to_send = True
        self.holders: dict[str, RemoteHolder] | None = None  # of TAKEN names; None: no answer yet
        self.sent_at = 0.0


class Figures(NamedTuple):
    held: int  # names now
    waiting: int  # claims that are not decided
    lost: int  # names that another owner got, since the start


class SharedClaims:
    """agents.claims.Claims for one of several gateways; and members.Claims. Any thread."""

    def __init__(self, member: Member, board: Board, registry: Registry):
        self.on_free: Callable[[Collection[str]], object] = lambda names: None
        # The names that agents here wait for.
        self.waited: Callable[[], Collection[str]] = tuple
        self._member = member
        self._board = board
        self._registry = registry
        self._lock = threading.Lock()  # guards all below
        self._holds: dict[str, _Hold] = {}
        self._used: dict[Tunnel, set[str]] = {}  # the names that a tunnel uses
        self._vacant: set[str] = set()  # holds without users
        self._pending: dict[Tunnel, _Pending] = {}
        self._remote: dict[tuple[str, ...], RemoteHolder] = {}
        # Tunnels here that were asked for others: since when, the name, by whom.
        self._asked: list[tuple[Any, float, str, str]] = []
        self._watched: dict[RemoteHolder, float] = {}  # and when it was asked last
        self._wanted: dict[str, float] = {}  # and when all gateways were asked last
        self._lost = 0
        self._stopped_at: float | None = None  # monotonic; None: this gateway serves

    # For takeover.py

    def claim(
        self,
        routes: Mapping[str, Route],
        permit: Callable[[Mapping[str, Route]], object] = lambda routes: None,
        instead_of: Collection[Tunnel] = (),
    ) -> None:
        """See agents.claims.Claims."""
        owners = {name: self.owner(route) for name, route in routes.items()}
        taken: dict[str, Any] = {}
        why: Mapping[str, str] = {}
        try:
            self._registry.check(routes, permit, instead_of)
        except HostnameTaken as error:
            if not error.tunnels:
                raise
            if self._are_others(error.holders, owners):
                self._ask_everywhere(error.holders)  # that agent may have sessions there as well
                raise
            # Earlier sessions of the same agent; or a pool that the agent does not fit into.
            taken, why = dict(error.holders), error.why
        tunnel = next(iter(routes.values())).tunnel
        modes = {name: route.mode for name, route in routes.items()}
        taken |= self._acquire(tunnel, owners, modes, instead_of)
        if taken:
            raise HostnameTaken(taken, why)
        self._registry.claim(routes, permit, instead_of)

    def owner(self, route: Route) -> str:
        """Of the name of a route, as the board has it."""
        if route.pool is not None:
            return f"p:{_digest(route.pool.owner)}"
        agent = route.tunnel.agent
        if agent.instance:
            return f"i:{_digest(repr((agent.identity.credential, agent.instance)))}"
        return f"s:{self._member.id}:{_session_of(route.tunnel)}"

    def _are_others(self, holders: Mapping[str, Any], owners: Mapping[str, str]) -> bool:
        """Whether tunnels here hold a name for another owner."""
        with self._lock:
            holds = [(self._holds.get(name), owners[name]) for name in holders]
        return any(hold is None or hold.owner != owner for hold, owner in holds)

    def _acquire(
        self, tunnel: Tunnel, owners: Mapping[str, str], modes: Mapping[str, str],
        instead_of: Collection[Tunnel],
    ) -> dict[str, Any]:  # fmt: skip
        """Have the board grant the names that this member does not hold. Returns the holders of
        those that others have; none: all are granted. Raises Undecided."""
        if not self._member.serves():
            raise Undecided(owners, AWAY)
        away = self._member.is_away()
        with self._lock:
            missing = {
                name: owner for name, owner in owners.items()
                if not self._use(tunnel, name, owner, instead_of, away)
            }  # fmt: skip
            if not missing:
                self._pending.pop(tunnel, None)
                return {}
            pending = self._pending.get(tunnel)
            if pending is None or pending.owners != missing:
                pending = self._pending[tunnel] = _Pending(missing, modes)
            elif pending.holders is not None and monotonic() - pending.sent_at > RE_ASK:
                pending.to_send = True
            holders = pending.holders
        self._member.wake()
        if away:
            raise Undecided(missing, AWAY)
        if not holders:
            raise Undecided(missing, ASKING if holders is None else WAITS)
        return dict(holders)

    def _use(
        self, tunnel: Tunnel, name: str, owner: str, instead_of: Collection[Tunnel], away: bool
    ) -> bool:
        """Note that a tunnel uses a name, if this member holds it for its owner. Caller holds the
        lock."""
        hold = self._holds.get(name)
        if hold is None or not hold.sure:
            return False
        if hold.owner != owner:
            # A name of a session without an instance is held nowhere else. So without the board,
            # too, it can be passed on.
            if not away or not hold.owner.startswith("s:") or hold.users - set(instead_of):
                return False
            hold.was, hold.owner = hold.was or hold.owner, owner
        hold.users.add(tunnel)
        self._used.setdefault(tunnel, set()).add(name)
        self._vacant.discard(name)
        return True

    def give_up(self, tunnel: Tunnel, hostnames: Collection[str]) -> None:
        """See agents.claims.Claims. A grant that is on its way is given back."""
        with self._lock:
            pending = self._pending.get(tunnel)
            if pending is not None and not pending.owners.keys().isdisjoint(hostnames):
                del self._pending[tunnel]

    def release(self, tunnel: Tunnel) -> None:
        """See agents.claims.Claims."""
        self._registry.release(tunnel)
        with self._lock:
            self._pending.pop(tunnel, None)
            names = self._used.pop(tunnel, ())
            for name in names:
                hold = self._holds.get(name)
                if hold is not None:
                    hold.users.discard(tunnel)
                    if not hold.users:
                        self._vacant.add(name)
            wakes = bool(self._vacant)
        if wakes:
            self._member.wake()

    def figures(self) -> Figures:
        with self._lock:
            return Figures(len(self._holds), len(self._pending), self._lost)

    # Thread "cluster": see members.Claims

    def work(self, contact: int, until: float) -> None:
        with self._lock:
            unsure = [name for name, hold in self._holds.items() if not hold.sure]
            pendings = [(tunnel, each) for tunnel, each in self._pending.items() if each.to_send]
        if unsure:
            self._ask_for(contact, unsure, may_serve=False)
        for tunnel, pending in pendings:
            self._give_back(contact)
            self._send(contact, tunnel, pending)
            if monotonic() > until:
                return self._member.wake()
        self._give_back(contact)

    def _send(self, contact: int, tunnel: Tunnel, pending: _Pending) -> None:
        asks = [Ask(name, owner) for name, owner in pending.owners.items()]
        pending.to_send, pending.sent_at = False, monotonic()
        answers = self._call(contact, asks, together=True)
        granted = all(answer.verdict == GRANTED for answer in answers)
        with self._lock:
            is_wanted = self._pending.get(tunnel) is pending
            if granted:
                for ask, answer in zip(asks, answers):
                    self._hold(ask, answer, {tunnel} if is_wanted else set())
                if is_wanted:
                    del self._pending[tunnel]
                    self._used.setdefault(tunnel, set()).update(pending.owners)
            else:
                pending.holders = self._remote_holders(asks, answers)
        if granted:
            self._look_after(asks, answers)
            if is_wanted:
                self._tell_come(pending.modes, asks, answers)

    def _hold(self, ask: Ask, answer: Answer, users: set[Tunnel]) -> None:
        """Caller holds the lock."""
        there = self._holds.get(ask.name)
        if there is not None and there.owner == ask.owner:
            users |= there.users
        self._holds[ask.name] = _Hold(ask.owner, answer.number, users)
        if users:
            self._vacant.discard(ask.name)
        else:
            self._vacant.add(ask.name)

    def _remote_holders(
        self, asks: Sequence[Ask], answers: Sequence[Answer]
    ) -> dict[str, RemoteHolder]:
        """Of the names that are taken elsewhere. One that this member itself holds is about to be
        given back, or to be taken by the registry. Caller holds the lock."""
        names: dict[tuple[str, ...], list[str]] = {}
        for ask, answer in zip(asks, answers):
            if answer.verdict == TAKEN and self._member.id not in answer.holders:
                names.setdefault(answer.holders, []).append(ask.name)
        found: dict[str, RemoteHolder] = {}
        for members, held in names.items():
            key = (*members, "", *held)
            holder = self._remote.get(key)
            if holder is None:
                holder = self._remote[key] = RemoteHolder(self, held, members)
                if len(self._remote) > MOST_ASKED:
                    del self._remote[next(iter(self._remote))]
            found |= dict.fromkeys(held, holder)
        return found

    def _tell_come(
        self, modes: Mapping[str, str], asks: Sequence[Ask], answers: Sequence[Answer]
    ) -> None:
        """Hostnames are served here alone, in a moment: the agent dials the other gateways, and a
        visit that one of them gets before should wait."""
        come = {a.name: modes[a.name] for a, answer in zip(asks, answers) if not answer.holders}
        if come:
            message = {"do": "come", "from": self._member.id, "names": list(come.items())}
            self._member.publish("", message)

    def _call(self, contact: int, asks: Sequence[Ask], together: bool) -> tuple[Answer, ...]:
        answers = self._board.claim(self._member.id, contact, asks, together)
        if any(answer.verdict == UNKNOWN for answer in answers):
            raise Stale
        return answers

    def _give_back(self, contact: int) -> None:
        """Release what no tunnel here uses."""
        while True:
            with self._lock:
                names = sorted(self._vacant)[:BATCH]
                if not names:
                    return
                for name in names:  # if the call fails, the next contact finds them
                    self._vacant.discard(name)
                    self._holds.pop(name, None)
            self._tell_free(self._board.release(self._member.id, contact, names))

    def _tell_free(self, names: Collection[str]) -> None:
        if names:
            self.on_free(names)
            message = {"do": "free", "from": self._member.id, "names": list(names)}
            self._member.publish("", message)

    def ask_again(self, contact: int, may_serve: bool) -> None:
        with self._lock:
            for name in self._vacant:
                self._holds.pop(name, None)
            self._vacant.clear()
            names = list(self._holds)
            for pending in self._pending.values():
                pending.to_send = True
        recorded = set(self._board.held(self._member.id))
        self._ask_for(contact, names, may_serve)
        with self._lock:
            extra = sorted(recorded - self._holds.keys())
        for at in range(0, len(extra), BATCH):
            names = extra[at : at + BATCH]
            self._tell_free(self._board.release(self._member.id, contact, names))

    def _ask_for(self, contact: int, names: Sequence[str], may_serve: bool) -> None:
        """Ask again for names that this member holds, or has held."""
        for at in range(0, len(names), BATCH):
            with self._lock:
                found = [(n, self._holds[n]) for n in names[at : at + BATCH] if n in self._holds]
                asks = [
                    Ask(name, hold.owner, hold.number if may_serve and hold.sure else 0, hold.was)
                    for name, hold in found
                ]
            self._member.keep()  # with very many names, all calls take longer than a lease
            if asks:
                self._take_answers(asks, self._call(contact, asks, together=False))
        self._withhold()

    def _take_answers(self, asks: Sequence[Ask], answers: Sequence[Answer]) -> None:
        ending: dict[Any, str] = {}
        with self._lock:
            for ask, answer in zip(asks, answers):
                hold = self._holds.get(ask.name)
                if hold is None or hold.owner != ask.owner:
                    continue
                if answer.verdict == GRANTED:
                    hold.sure, hold.number, hold.was = True, answer.number, ""
                elif answer.verdict == LATER:
                    hold.sure = False
                else:
                    del self._holds[ask.name]
                    self._vacant.discard(ask.name)
                    self._lost += 1
                    ending |= dict.fromkeys(hold.users, ask.name)
        for tunnel, name in ending.items():
            tunnel.replace(f"another agent has got {name} meanwhile, at another gateway")

    # What is served

    def stop_serving(self) -> None:
        self._stopped_at = monotonic()
        self._withhold()

    def serve_again(self) -> None:
        self._stopped_at = None
        self._withhold()

    def _send_away(self) -> None:
        """Ask agents that have no session with other gateways to dial again: they may reach one
        that serves."""
        with self._lock:
            tunnels: list[Any] = list(self._used)
        for tunnel in tunnels:
            if MEMBERS not in tunnel.features and not tunnel.moving:
                tunnel.move("this gateway has no contact with the other ones")

    def _withhold(self) -> None:
        """Have the registry serve what this member may serve, and no more."""
        serves = self._member.serves()
        with self._lock:
            names = [name for name, hold in self._holds.items() if not serves or not hold.sure]
        self._registry.withhold(names)

    def away(self) -> None:
        with self._lock:
            for pending in self._pending.values():
                pending.to_send, pending.holders = True, None

    # Signs of life, between gateways

    def ask(self, holder: RemoteHolder) -> None:
        for member in holder.members:
            message = {"do": "ask", "from": self._member.id, "names": list(holder.names)}
            self._member.publish(member, message)

    def _ask_everywhere(self, names: Collection[str]) -> None:
        """Have all gateways ask the agents that have these names for a sign of life, so that one
        that is silent is replaced at all of them at the same time."""
        now = monotonic()
        with self._lock:
            due = [name for name in names if now - self._wanted.get(name, 0.0) > ASK_AGAIN]
            self._wanted |= dict.fromkeys(due[:MOST_NAMES], now)
            while len(self._wanted) > MOST_ASKED:
                del self._wanted[next(iter(self._wanted))]
        if due:
            message = {"do": "ask", "from": self._member.id, "names": due[:MOST_NAMES]}
            self._member.publish("", message)

    def watch(self, holder: RemoteHolder, watched: bool) -> None:
        """Agents here wait for what this one has: ask it often."""
        with self._lock:
            if watched:
                self._watched[holder] = 0.0
            else:
                self._watched.pop(holder, None)

    def hear_ask(self, message: Message) -> None:
        """Another gateway asks for a sign of life of the agents that have these names here."""
        for name in _names(message):
            for tunnel in self._registry.holders(name):
                since = tunnel.ask()
                with self._lock:
                    if len(self._asked) < MOST_ASKED:
                        self._asked.append((tunnel, since, name, str(message.get("from"))))

    def hear_alive(self, message: Message) -> None:
        """Agents of another gateway live."""
        names = frozenset(_names(message))
        with self._lock:
            holders = [each for each in self._remote.values() if not names.isdisjoint(each.names)]
        for holder in holders:
            if message.get("from") in holder.members:
                holder.answered()

    def hear_free(self, message: Message) -> None:
        """Names are free that another gateway had."""
        self.on_free(_names(message))

    def hear_come(self, message: Message) -> None:
        """Another gateway is about to serve names: visits to them wait here until they are."""
        found = message.get("names")
        pairs = found[:MOST_NAMES] if isinstance(found, list) else []
        self._registry.expect({
            pair[0]: pair[1] for pair in pairs
            if isinstance(pair, (list, tuple)) and len(pair) == 2
            and all(isinstance(part, str) and len(part) <= MOST_NAME for part in pair)
        })  # fmt: skip

    def tick(self) -> None:
        """Thread "cluster tenure"."""
        now = monotonic()
        alive: dict[str, list[str]] = {}
        with self._lock:
            asked, self._asked = self._asked, []
            due = [each for each, at in self._watched.items() if now - at > ASK_AGAIN]
            self._watched |= dict.fromkeys(due, now)
            again = any(
                each.holders is not None and now - each.sent_at > RE_ASK
                for each in self._pending.values()
            )
        stopped_at = self._stopped_at
        if stopped_at is not None and now - stopped_at > PATIENCE:
            self._send_away()
        for tunnel, since, name, asker in asked:
            if tunnel.has_answered(since):
                alive.setdefault(asker, []).append(name)
            elif not tunnel.gone.is_set() and now - since < ANSWER_TIMEOUT:
                with self._lock:
                    self._asked.append((tunnel, since, name, asker))
        if waited := self.waited():
            self._ask_everywhere(waited)
        for asker, names in alive.items():
            self._member.publish(asker, {"do": "alive", "from": self._member.id, "names": names})
        for holder in due:
            self.ask(holder)
        if again:
            self._member.wake()

    def _look_after(self, asks: Sequence[Ask], answers: Sequence[Answer]) -> None:
        """An agent has come here, and other gateways have sessions with it, too: have them look
        whether those still live. It may have left them without a word."""
        names: dict[str, list[str]] = {}
        for ask, answer in zip(asks, answers):
            if ask.owner.startswith("i:") and len(answer.holders) <= MOST_LOOKED_AFTER:
                for member in answer.holders:
                    names.setdefault(member, []).append(ask.name)
        for member, held in names.items():
            message = {"do": "ask", "from": self._member.id, "names": held}
            self._member.publish(member, message)


def _session_of(tunnel: Any) -> str:
    """The id of a tunnel.Tunnel."""
    id: str = tunnel.id
    return id


def _digest(text: str) -> str:
    return sha256(text.encode()).hexdigest()[:32]


def _names(message: Message) -> list[str]:
    names = message.get("names")
    if not isinstance(names, list):
        return []
    return [name for name in names[:MOST_NAMES] if isinstance(name, str)]
