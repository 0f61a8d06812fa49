"""What an agent's links know of each other: the state that they share, and that of each session.

A Link (link.py) imports this module, and Agent (agent.py) is a Shared. So a link sees the agent and
the other links only as far as it needs them.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from typing import TYPE_CHECKING, Protocol

from gotunnel import MAX_STREAMS, OVERLAP, WAITS, Session, Stream, Waker, call_logged

from .common.duplex import Duplex, Observer
from .common.process import Workers
from .config import Config
from .follow import Follower
from .plan import Plan
from .registering import FOR_NOW, TAKEN, new_instance
from .roster import Place, View
from .target import Targets

if TYPE_CHECKING:
    from .health import Health


class Service:
    """One session and its state. The agent's lock guards ``routes``, ``refused``, ``outcome``,
    ``asked``, ``at_once``, ``freed``, ``member``, ``members`` and ``ports``."""

    def __init__(self, session: Session, plan: Plan, place: Place):
        self.session = session
        self.plan = plan
        self.place = place  # the gateway's
        # Hostname to Route. The dict is replaced and never changed, as workers read it unlocked.
        self.routes = plan.routes
        # Hostname of the configuration to the gateway's reason; replaced whole, as well.
        self.refused: Mapping[str, str] = {}
        self.freed: frozenset[str] = frozenset()  # refused hostnames that are free now
        self.features: tuple[str, ...] = ()  # those that the gateway acknowledged
        self.control: Stream | None = None  # its control stream, once it is open
        self.ports: Mapping[str, str] = {}  # its public ports, by hostname; replaced whole, too
        self.member = ""  # the gateway's id, if it is one of several
        # Their ids and addresses as this one tells them. None: not told yet, or it is alone.
        self.members: Mapping[str, str] | None = None
        self.asked = False  # the gateway asks for a new session
        self.at_once = False  # "asked" is certain: MOVE came, and not only GO_AWAY
        self.outcome: BaseException | None = None  # why the session is over; None while it is not
        self.since = math.inf  # monotonic time of its ack
        self.ends_at = math.inf  # monotonic deadline, once a new session has replaced it
        self.busy_at = 0.0  # monotonic: when it was last seen with a visit, from then on

    def serves(self) -> bool:
        return self.outcome is None and self.since < math.inf

    def stays(self, plan: Plan) -> bool:
        """Whether it serves, and no other session is to take its place."""
        return self.serves() and not self.asked and self.plan is plan

    def refused_for_now(self) -> frozenset[str]:
        """The refused hostnames that the gateway may grant later."""
        if OVERLAP not in self.features:  # a second session would end this one
            return frozenset()
        return frozenset(
            name for name, reason in self.refused.items() if reason.startswith(FOR_NOW)
        )

    def waited_for(self) -> frozenset[str]:
        """The refused hostnames that another agent serves. The gateway tells when one is free."""
        if WAITS not in self.features:
            return frozenset()
        return frozenset(name for name, reason in self.refused.items() if reason.startswith(TAKEN))

    def has_visits(self) -> bool:
        return any(stream is not self.control for stream in self.session.streams_in_use())


class OtherLink(Protocol):
    """A link, as the other ones see it. The agent's lock guards it."""

    unaccepted: Duplex | None  # see Link

    def view(self) -> View: ...

    def current(self) -> Service | None: ...

    def services(self) -> list[Service]: ...


class Shared:
    """What an agent's links share. An Agent is one."""

    def __init__(self, config: Config):
        """Raises CannotTrust."""
        self.config, self.plan = config, Plan(config)  # guarded by lock
        self.stopping = threading.Event()
        self.waker = Waker()  # woken once, by stop(), to end a dial
        self.instance = new_instance()  # replaced whole
        self.workers = Workers(MAX_STREAMS, "stream")
        self.targets = Targets()
        # Checks targets; made with the first session that has a tunnel with ``health``.
        self.health: Health | None = None
        # Whether the agent waits for hostnames that another agent serves. False: a gateway refuses
        # it if there are no others, and on_refusal hears of it. To be set before run().
        self.waits = True
        self.guard = threading.Lock()  # guards all below, and what the links say of theirs
        self.lock = threading.Condition(self.guard)  # notified when any of it changes but streams
        # Notified when a stream or a session has ended. It is one of its own, or each visit would
        # wake the threads of all links.
        self.ended = threading.Condition(self.guard)
        # The first one is there as long as the agent: it dials tunnel_addr.
        self.links: Sequence[OtherLink] = ()
        # The gateways that are one, by id, as their sessions tell them: the address, and the name
        # for TLS. Empty: the gateway is alone.
        self.members: dict[str, tuple[str, str]] = {}
        self.running = 0  # data streams that have a worker
        self.sessions = self.failures = self.streams = 0  # see Totals
        # What the log has told last: address and target, or reason of the refusal, by hostname.
        self.logged: dict[str, tuple[str, ...]] = {}
        self.news: dict[str, str] = {}  # the last other line about each hostname
        self.certificates: dict[str, str] = {}  # the latest session's, as the gateway told them
        self.observer: Observer | None = None  # of each session; tools set it before run()
        # Of each visit. If it is set while the agent runs, it follows those on new streams.
        self.follower: Follower | None = None
        # Called by any thread after each change of what snapshot() shows; to be set before run().
        # It must not block.
        self.on_change: Callable[[], object] = lambda: None
        # Called by run() with the gateway's words when it has refused a registration; to be set
        # before. It may return another configuration, which is registered at once, or raise: then
        # run() ends with that exception.
        self.on_refusal: Callable[[str], Config | None] = lambda text: None

    def tell(self) -> None:
        """What snapshot() shows has changed. Not with the lock."""
        call_logged(self.on_change)

    def watch_targets(self, service: Service, control: Stream) -> None:
        """Have the gateway of a new session know which targets are well, if any want it."""
        if any(route.tunnel.health for route in service.routes.values()):
            with self.lock:
                if self.health is None:  # loaded here, so that other agents do without it
                    self.health = import_module(f"{__package__}.health").Health(self.tell)
        if self.health is not None:
            address = str(service.place)
            self.health.attend(service, service.features, service.routes, control, address)

    def change(self, config: Config, plan: Plan | None = None) -> list[str]:
        """See Agent."""
        raise NotImplementedError

    def note_members(self) -> None:
        """The sessions or what they tell have changed: keep the right links. Any thread."""
        raise NotImplementedError

    def forget(self, link: OtherLink) -> None:
        """``link`` is over. Caller holds the lock."""
        raise NotImplementedError

    def retire_old(self, link: OtherLink | None) -> None:
        """``link`` has a new session, or one has no use for its own any more: have the old sessions
        end that others have replaced. Any thread."""
        raise NotImplementedError

    def views(self) -> list[View]:
        """The links, for roster.py. Caller holds the lock."""
        return [link.view() for link in self.links]

    def addresses(self) -> dict[str, str]:
        """The members' addresses, by id. Caller holds the lock."""
        return {id: address for id, (address, _) in self.members.items()}

    def served(self) -> int:
        """How many gateways serve the agent now. Caller holds the lock."""
        return sum(any(service.serves() for service in link.services()) for link in self.links)
