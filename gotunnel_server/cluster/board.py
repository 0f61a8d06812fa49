"""The board: the one place that all members of a cluster read and write. There are two:

    redis_board.RedisBoard        scripts on a Redis server, for several machines (CLUSTER)
    processes.board.ChildBoard    a leases.Table in the supervisor, for one machine (PROCESSES)

Both follow the rules of leases.py. A board decides; it never calls a member back, except with the
messages of other members. What a member does with the answers is in members.py and claims.py.

All values are NamedTuples of tuples, texts, whole numbers and booleans, so that they can be sent as
JSON: ``Renewed(*values)`` makes one again, with ``Card(*values)`` for each of its cards.
"""

from __future__ import annotations

import errno
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

# Verdicts of a claim, in an Answer.
GRANTED = "granted"  # the member holds the name now, for the owner that it named
TAKEN = "taken"  # members in contact hold it for another owner
LATER = "later"  # it may be served by a member that is out of contact: ask again in a while
FREE = "free"  # it would be granted, but another name of the same call is not
LOST = "lost"  # asked again, and another owner has it by now
UNKNOWN = "unknown"  # the board does not know this contact of the member: renew first


class Away(OSError):
    """The board cannot be reached, or cannot answer; the text says why, without a password."""

    def __init__(self, text: str):
        super().__init__(errno.ENOTCONN, text)

    def __str__(self) -> str:
        return str(self.strerror)


class Card(NamedTuple):
    """What the members know of each other. The ``id`` is random, 8 hex digits, one for the life of
    a process. ``agents`` and ``peer`` are HOST:PORT for agents and for other members; ``agents`` is
    "" if agents reach this member by the common address only. ``host`` is the machine's name,
    ``since`` the wall-clock second in which the process started. ``leaving``: it ends soon, and
    takes no new agents."""

    id: str
    agents: str = ""
    peer: str = ""
    host: str = ""
    version: str = ""
    since: int = 0
    leaving: bool = False


class Renewal(NamedTuple):
    """A member's sign of life. ``contact`` is the number of its contact with the board, as the last
    Renewed said; 0 if it begins anew: at the start, after a call that has failed, and when the
    member may have told another one that it is without the board. ``knows`` is the version of
    the list of members that it has."""

    card: Card
    contact: int = 0
    knows: int = 0


class Renewed(NamedTuple):
    """``contact``: see Renewal. ``anew``: this contact has just begun, and the member now has to
    ask again for all names that it holds. ``members`` are the cards of all members in contact, this
    one included; None if the Renewal already knew this ``version`` of the list. ``gone``: members
    that have been out of contact for so long that the board has forgotten them; the caller calls
    leave() for each of them, for their names."""

    contact: int
    anew: bool
    version: int
    members: tuple[Card, ...] | None = None
    gone: tuple[str, ...] = ()


class Ask(NamedTuple):
    """Claims ``name`` for ``owner``. ``number`` is 0 for a new claim. For a name that the member
    may serve at this moment, it is the fencing number that it was granted with. ``was``: the owner
    that the member held it for before, if it alone held it and has passed it on meanwhile."""

    name: str
    owner: str
    number: int = 0
    was: str = ""


class Answer(NamedTuple):
    """``number``: the fencing number of a GRANTED name. It grows each time that the name gets
    another owner, and stays for further members of the same owner. ``holders``: with GRANTED the
    other members that hold the name for the same owner, with TAKEN those that hold it."""

    verdict: str
    number: int = 0
    holders: tuple[str, ...] = ()


class Left(NamedTuple):
    """``freed``: names that no member in contact holds any more. ``more``: call leave() again."""

    freed: tuple[str, ...]
    more: bool


Message = Mapping[str, Any]  # between members: texts, numbers, lists; JSON


class Board(Protocol):
    """Calls block until the board has answered, for a second or two at most, and raise Away. Calls
    of one member come from one thread at a time, publish() from any thread."""

    # Called with each message that came, in a thread of the board's; set before start().
    on_message: Callable[[Message], object]

    def start(self, id: str) -> None:
        """Begin to hear the messages for the member ``id``. Does not wait for the board."""

    def stop(self) -> None:
        """Close the connections. Any thread."""

    def renew(self, id: str, renewal: Renewal) -> Renewed:
        """Extend the lease of all names that a member holds."""

    def claim(
        self, id: str, contact: int, asks: Sequence[Ask], together: bool
    ) -> tuple[Answer, ...]:
        """One answer for each of ``asks``. ``together``: all are granted, or none."""

    def release(self, id: str, contact: int, names: Sequence[str]) -> tuple[str, ...]:
        """Give names back. Returns those that no member in contact holds any more. Does nothing if
        the contact is another one by now: a call that was given up may still arrive."""

    def held(self, id: str) -> tuple[str, ...]:
        """The names that a member holds, as the board has it."""

    def leave(self, id: str) -> Left:
        """The member ends: forget it, and give back its names, some hundred a call."""

    def publish(self, to: str, message: Message) -> None:
        """Send a message to a member, or to all others with ``to`` "". It may get lost."""
