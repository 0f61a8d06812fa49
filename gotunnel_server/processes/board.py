"""The board of gateways on one machine: a child's calls, answered by a leases.Table in the
supervisor.

The supervisor sees at once when a child has ended, and gives its names back. It has no earlier
life whose claims might be lost: children never outlive it, so names are granted from the start
(``settle`` is 0).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

from ..cluster.board import Answer, Ask, Away, Card, Left, Message, Renewal, Renewed
from ..cluster.leases import TIMES, Table

SUPERVISED = TIMES._replace(settle=0)
# What a child may call. Values come and go as JSON, so that NamedTuples arrive as lists.
RENEW, CLAIM, RELEASE, HELD, LEAVE, PUBLISH = (
    "renew", "claim", "release", "held", "leave", "publish"
)  # fmt: skip


class TableOfChildren:
    """The supervisor's side. One thread."""

    def __init__(self, now: Callable[[], float]) -> None:
        """``now()``: monotonic seconds."""
        self._now = now
        self._table = Table(SUPERVISED)
        self._members: dict[str, int] = {}  # id of a member: of its process, as the roster has it
        self.messages: list[tuple[int, Message]] = []  # to be sent: id of a process, message
        self.calls: dict[str, Callable[..., Any]] = {
            RENEW: self._renew, CLAIM: self._claim, RELEASE: self._release, HELD: self._held,
            LEAVE: self._leave, PUBLISH: self._publish,
        }  # fmt: skip

    def gone(self, process: int) -> None:
        """A child's process has ended: its names are free."""
        for member in [id for id, at in self._members.items() if at == process]:
            del self._members[member]
            while self._table.leave(self._time(), member).more:
                pass

    def _time(self) -> int:
        return int(self._now() * 1000)

    def _renew(self, process: int, id: str, renewal: Sequence[Any]) -> Renewed:
        self._members[id] = process
        card, contact, knows = renewal
        return self._table.renew(self._time(), id, Renewal(Card(*card), contact, knows))

    def _claim(
        self, process: int, id: str, contact: int, asks: Sequence[Sequence[Any]], together: bool
    ) -> tuple[Answer, ...]:
        found = tuple(Ask(*ask) for ask in asks)
        return self._table.claim(self._time(), id, contact, found, together)

    def _release(self, process: int, id: str, contact: int, names: Sequence[str]) -> Sequence[str]:
        return self._table.release(self._time(), id, contact, names)

    def _held(self, process: int, id: str) -> Sequence[str]:
        return self._table.held(self._time(), id)

    def _leave(self, process: int, id: str) -> Left:
        self._members.pop(id, None)
        return self._table.leave(self._time(), id)

    def _publish(self, process: int, to: str, message: Message) -> None:
        for member, at in self._members.items():
            if member == to or to == "" and at != process:
                self.messages.append((at, message))


class Caller(Protocol):
    """What a board needs of a child.Child."""

    def call(self, name: str, *arguments: Any) -> Any: ...

    def on_board(self, hear: Callable[[Message], object]) -> None: ...


class ChildBoard:
    """A cluster.board.Board, in a child."""

    def __init__(self, child: Caller) -> None:
        self._child = child
        self.on_message: Callable[[Message], object] = lambda message: None

    def start(self, id: str) -> None:
        self._child.on_board(lambda message: self.on_message(message))

    def stop(self) -> None:
        """The channel is the child's."""

    def _call(self, name: str, *arguments: Any) -> Any:
        try:
            return self._child.call(name, *arguments)
        except OSError as error:
            raise Away(str(error)) from None
        except ValueError as error:
            raise Away(f"the supervisor refuses {name}: {error}") from None

    def renew(self, id: str, renewal: Renewal) -> Renewed:
        contact, anew, version, members, gone = self._call(RENEW, id, renewal)
        cards = None if members is None else tuple(Card(*card) for card in members)
        return Renewed(contact, anew, version, cards, tuple(gone))

    def claim(
        self, id: str, contact: int, asks: Sequence[Ask], together: bool
    ) -> tuple[Answer, ...]:
        found = self._call(CLAIM, id, contact, list(asks), together)
        return tuple(Answer(verdict, number, tuple(held)) for verdict, number, held in found)

    def release(self, id: str, contact: int, names: Sequence[str]) -> tuple[str, ...]:
        return tuple(self._call(RELEASE, id, contact, list(names)))

    def held(self, id: str) -> tuple[str, ...]:
        return tuple(self._call(HELD, id))

    def leave(self, id: str) -> Left:
        freed, more = self._call(LEAVE, id)
        return Left(tuple(freed), more)

    def publish(self, to: str, message: Message) -> None:
        self._call(PUBLISH, to, message)
