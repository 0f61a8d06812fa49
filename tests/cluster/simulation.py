"""A cluster in simulated time: members, boards, and a network that does anything it likes.

A World draws one history from a seed. It has phases, each with a network of its own: which members
reach the board and each other. In all of them members renew, claim and release; calls and answers
arrive late, in another order or never; processes stand still, crash, leave and join; the Redis
server is stopped, restarted with its data or without, or replaced by a replica that lacks the last
writes and has another clock. No name may ever be served for two owners at one time.

What decides is the product's own: the board is leases.Table, a member serves as tenure.Tenure says.
Member makes the calls that members.py makes.

What is taken for granted, as nothing would hold without it: a server's clock jumps forward at most
once in JUMP_PAUSE, clocks run equally fast but for RATE, and only one server at a time takes
writes. A process that stands still serves nobody; when it goes on, it looks at its clock first.
One hole is known: see World.is_excused().
"""

import itertools
import pickle
import random
from typing import NamedTuple

from gotunnel_server.cluster.board import GRANTED, UNKNOWN, Ask, Card, Renewal
from gotunnel_server.cluster.leases import Table
from gotunnel_server.cluster.tenure import RENEW, Tenure

# Milliseconds
CALL_TIMEOUT = 1500
RATE = 0.002  # clocks differ by so much; those of real machines by a tenth of that
JUMP_PAUSE = 8000
MEMBERS, NAMES = 3, 2
PHASES, TICKS = 5, 24
PACES = ((50, 100, 300), (200, 400, 600), (400, 700, 1000))  # milliseconds between two ticks
# A bound for a name to become free, whatever has happened before: FORGET, and some round trips.
LIVENESS_BOUND = 80_000


class Broken(AssertionError):
    """A rule was broken. The text has the seed and the end of the history."""


class Server:
    """One life of a Redis server. ``offset`` is its clock's, against true time."""

    def __init__(self, name, table, offset):
        self.name, self.table, self.offset = name, table, offset
        self.stopped = False  # SIGSTOP: calls wait
        self.dead = False

    def clock(self, now):
        return int(now + self.offset)


class Call:
    """A member's call to a server, and then the answer to it. ``orphan``: nobody waits for it any
    more, but it may still be executed."""

    __slots__ = ("member", "kind", "arguments", "sent_at", "server", "done", "result", "orphan")

    def __init__(self, member, kind, arguments, sent_at, server):
        self.member, self.kind, self.arguments = member, kind, arguments
        self.sent_at, self.server = sent_at, server
        self.done = self.orphan = False
        self.result = None


class Message(NamedTuple):
    """Between members. ``kind``: "away?" or "away"; ``asked_at`` is the asking member's time."""

    kind: str
    sender: "Member"
    to: "Member"
    asked_at: float


class Held(NamedTuple):
    owner: str
    number: int  # the fencing number


class Member:
    """One gateway: the names that it holds, and its calls to the board."""

    def __init__(self, id, chance, tenure):
        self.id, self.card = id, Card(id)
        self.rate = 1 + chance.uniform(-RATE, RATE)
        self.offset = chance.uniform(0, 1e6)
        self.alive, self.stopped = True, False
        self.linked = True  # to the board
        self.reaches = {id}  # members
        self.call = None  # the one that is not answered yet
        self.tenure = tenure(id)
        self.held = {}
        self.to_renew = True  # before anything else
        self.to_ask_again = False  # contact has begun anew: for all names
        self.to_compare = False  # the board may have names of ours that we do not have
        self.to_release = set()
        self.contact_at = 0.0  # true time of the last answer to a renewal
        self.is_lost = False  # a server has lost what this member holds
        self.known_then = frozenset()  # the members that it knew before

    def clock(self, now):
        """Its monotonic clock, in seconds."""
        return now * self.rate / 1000 + self.offset

    def serves(self, clock) -> bool:
        """Whether it serves what it holds."""
        return self.tenure.holds(clock)

    def may_claim(self, clock) -> bool:
        anew = self.to_renew or self.to_ask_again or self.tenure.begins_anew
        return not anew and self.tenure.holds(clock)

    def next_call(self, clock):
        """What the member has to ask the board next: (kind, arguments)."""
        tenure = self.tenure
        self.to_release -= set(self.held)
        if self.to_renew:
            return self.renewal(clock)
        if self.to_ask_again and self.held:
            # A name that was given up is asked for as a new one: another may have had it meanwhile.
            is_held = tenure.holds(clock)
            asks = [
                Ask(name, each.owner, each.number if is_held else 0)
                for name, each in self.held.items()
            ]
            return "claim", (tenure.contact, tuple(asks), False)
        if self.to_ask_again:
            self.to_ask_again = False
            tenure.resume(clock)
        if self.to_compare:
            return "held", ()
        if self.to_release:
            return "release", (tenure.contact, tuple(self.to_release))
        return self.renewal(clock)

    def renewal(self, clock):
        contact, knows = self.tenure.sending(clock)
        return "renew", (Renewal(self.card, contact, knows),)

    def fail(self):
        """Its call has failed, or it cannot make one."""
        self.call = None
        self.to_renew = True
        self.tenure.failed()

    def take(self, call, clock):
        """The answer to ``call`` has come."""
        self.call = None
        getattr(self, f"_take_{call.kind}")(call, call.result, clock)

    def _take_renew(self, call, renewed, clock):
        self.to_renew = False
        if renewed.anew:
            self.to_ask_again = self.to_compare = True
        members = renewed.members
        self.tenure.renewed(
            clock, call.sent_at, renewed.contact, renewed.anew, renewed.version,
            None if members is None else [card.id for card in members],
        )  # fmt: skip

    def _take_claim(self, call, answers, clock):
        if any(answer.verdict == UNKNOWN for answer in answers):
            self.fail()
            return
        _, asks, together = call.arguments
        for ask, answer in zip(asks, answers, strict=True):
            held = self.held.get(ask.name)
            if answer.verdict == GRANTED and (together or held is not None):
                self.held[ask.name] = Held(ask.owner, answer.number)
            elif answer.verdict == GRANTED:  # its agent has left meanwhile
                self.to_release.add(ask.name)
            elif not together:
                self.held.pop(ask.name, None)
        if not together:
            self.to_ask_again = False
            self.tenure.resume(clock)

    def _take_held(self, call, names, clock):
        self.to_compare = False
        self.to_release |= set(names) - set(self.held)

    def _take_release(self, call, freed, clock):
        self.to_release -= set(call.arguments[1])


class World:
    """One history."""

    def __init__(self, seed, table=Table, tenure=Tenure, phases=PHASES):
        self.seed, self.make_table, self.make_tenure, self.phases = seed, table, tenure, phases
        self.chance = random.Random(seed)
        self.now = 0.0
        self.names = self.chance.randrange(1, NAMES + 1)
        self.count = 0  # of servers and members so far
        self.server = Server("s0", self.make_table(), 0.0)
        self.replica = pickle.dumps(vars(self.server.table))
        self.jumped_at = 0.0
        self.late = 0.0  # the share of calls that are not answered at once
        self.calls, self.messages = [], []
        every = [
            self.reset, self.lose, self.pass_long, self.stop_member, self.stop_member, self.crash,
            self.leave, self.arrive, self.end_session, self.replicate,
            self.restart_server, self.empty_server, self.fail_over, self.set_clock,
        ]  # fmt: skip
        self.faults = self.chance.sample(every, self.chance.randrange(2, 6))
        self.members = []
        self.story = []
        self.grants = 0
        for _ in range(MEMBERS - self.chance.randrange(2)):
            self.join()
        if self.chance.random() < 0.9:  # all begin well
            for _ in range(9):
                self.now += 1000 * RENEW
                for member in self.members:
                    self.settle(member)
            for member in self.members:
                self.claim(member)

    def tell(self, *words):
        self.story.append((self.now, words))

    def join(self):
        self.count += 1
        member = Member(f"m{self.count}", self.chance, self.make_tenure)
        self.members.append(member)
        self.tell(member.id, "joins")

    def run(self):
        """The history; raises Broken."""
        for _ in range(self.phases):
            self.begin_phase()
            for _ in range(self.chance.randrange(1, TICKS)):
                self.now += self.chance.choice(self.pace)
                for member in self.chance.sample(self.members, len(self.members)):
                    self.turn(member)
                self.carry()
                if self.chance.random() < 0.4:
                    self.deliver()
                if self.chance.random() < 0.1:
                    self.chance.choice(self.faults)()
                self.check()
        return self

    def begin_phase(self):
        """A phase has its own network: which members reach the board, and who reaches whom."""
        chance = self.chance
        self.pace = chance.choice(PACES)
        self.late = chance.choice((0, 0, 0.1, 0.5))
        cut = chance.choice((0, 0.5, 0.8, 1))
        if chance.random() < 0.3:
            self.arrive()
        for member in self.members:
            member.linked = chance.random() >= cut
            member.reaches = {
                each.id for each in self.members if chance.random() < 0.8
            }  # fmt: skip
        if self.server.stopped or chance.random() < 0.1:
            self.stop_server()
        if chance.random() < 0.5:
            chance.choice(self.faults)()

    def turn(self, member):
        """A member does what it would do at this time by itself."""
        if not member.alive or member.stopped:
            return
        clock = member.clock(self.now)
        member.serves(clock)
        if member.call is not None:
            if clock > member.call.sent_at + CALL_TIMEOUT / 1000:
                self.tell(member.id, "waits no longer")
                self.abandon(member)
        elif not member.linked:
            if not member.to_renew:
                self.tell(member.id, "finds the board gone")
            member.fail()
        elif self.server.stopped or self.chance.random() < self.late:
            self.send(member, clock, self.draw_call(member, clock))
        else:
            self.settle(member)
            self.claim(member)
        self.ask_others(member)

    def claim(self, member):
        clock = member.clock(self.now)
        if member.call is None and member.may_claim(clock) and (ask := self.wanted(member)):
            self.settle(member, ("claim", (member.tenure.contact, (ask,), True)))

    def draw_call(self, member, clock):
        if member.may_claim(clock) and self.chance.random() < 0.4 and (ask := self.wanted(member)):
            return "claim", (member.tenure.contact, (ask,), True)

    # Steps

    def pass_long(self):
        self.now += self.chance.choice((1500, 3000, 6000))

    def ready(self):
        return [each for each in self.members if each.alive and not each.stopped]

    def ask_others(self, member):
        """A member without the board asks others for a promise. Some answer at once."""
        clock = member.clock(self.now)
        for id in sorted(member.tenure.to_ask(clock)) if member.held else ():
            other = next((each for each in self.members if each.id == id), None)
            if other is None or id not in member.reaches or member.id not in other.reaches:
                continue
            message = Message("away?", member, other, clock)
            if other.stopped or self.chance.random() < 0.1:
                self.messages.append(message)
            elif other.tenure.promise(other.clock(self.now)):
                self.promise(other, member, clock)

    def send(self, member, clock, call=None):
        kind, arguments = call or member.next_call(clock)
        member.call = Call(member, kind, arguments, clock, self.server)
        self.calls.append(member.call)
        self.tell(member.id, "sends", kind, arguments)

    def wanted(self, member):
        """An Ask for a name that is not served here."""
        name = f"n{self.chance.randrange(self.names)}"
        if name in member.held:
            return None
        return Ask(name, "shared" if self.chance.random() < 0.2 else f"agent at {member.id}")

    def abandon(self, member):
        """Its connection is closed. What was sent on it may still arrive."""
        if member.call is not None:
            member.call.orphan = True
        member.fail()

    def carry(self):
        """One call reaches its server, or one answer its member."""
        if not self.calls:
            return
        call = self.chance.choice(self.calls)
        member, server = call.member, call.server
        if not call.done:
            # The system of a process that has ended goes on sending.
            if server.dead:
                self.drop(call)
            elif not server.stopped and member.linked:
                self.execute(call)
        elif call.orphan or not member.alive:
            self.calls.remove(call)
        elif member.linked and not member.stopped:
            self.calls.remove(call)
            clock = member.clock(self.now)
            if clock > call.sent_at + CALL_TIMEOUT / 1000:
                self.abandon(member)
                return
            self.tell(member.id, "gets", call.result)
            self.take(member, call, clock)

    def take(self, member, call, clock):
        member.take(call, clock)
        if call.kind == "renew" and not member.is_lost:
            member.contact_at, member.known_then = self.now, member.tenure.known
        if call.server is self.server and not member.to_renew and not member.to_ask_again:
            member.is_lost = False

    def execute(self, call):
        server = call.server
        method = getattr(server.table, call.kind)
        call.result = method(
            server.clock(self.now), call.member.id, *call.arguments, server=server.name
        )
        call.done = True
        if call.orphan or call.kind == "claim":
            self.tell(server.name, "does", call.kind, "of", call.member.id, ":", call.result)
        if call.kind == "claim":
            self.grants += any(answer.verdict == GRANTED for answer in call.result)

    def drop(self, call):
        """A connection ends; its member sees it."""
        self.calls.remove(call)
        member = call.member
        if not call.orphan and member.alive and member.call is call:
            if member.stopped:
                call.orphan = True
                self.calls.append(call)
                return
            member.fail()

    def reset(self):
        if self.calls:
            self.drop(self.chance.choice(self.calls))

    def deliver(self):
        """One message between members."""
        if not self.messages:
            return
        message = self.messages.pop(self.chance.randrange(len(self.messages)))
        sender, to = message.sender, message.to
        if not to.alive:
            return
        if to.stopped:
            self.messages.append(message)
            return
        if message.kind == "away":
            self.promise(sender, to, message.asked_at)
        elif to.tenure.promise(to.clock(self.now)):
            self.messages.append(Message("away", to, sender, message.asked_at))

    def promise(self, other, member, asked_at):
        """``member`` hears that ``other`` was without the board after it asked."""
        self.tell(other.id, "has promised", member.id)
        member.tenure.promised(member.clock(self.now), other.id, asked_at)

    def lose(self):
        if self.messages:
            self.messages.pop(self.chance.randrange(len(self.messages)))

    def stop_member(self):
        if living := [each for each in self.members if each.alive]:
            member = self.chance.choice(living)
            member.stopped = not member.stopped
            self.tell(member.id, "stopped:", member.stopped)

    def crash(self):
        if len(ready := self.ready()) > 1:
            member = self.chance.choice(ready)
            self.tell(member.id, "crashes")
            self.bury(member)

    def bury(self, member):
        member.alive, member.held = False, {}
        self.members.remove(member)
        for call in self.calls:
            call.orphan |= call.member is member

    def leave(self):
        """A member ends in good order: it serves nobody, and then tells the board."""
        if len(ready := self.ready()) > 1:
            member = self.chance.choice(ready)
            self.tell(member.id, "leaves")
            self.bury(member)
            for other in self.ready():
                if other.id in member.reaches and member.id in other.reaches:
                    other.tenure.departed(other.clock(self.now), member.id)
            self.calls.append(Call(member, "leave", (), 0.0, self.server))
            self.calls[-1].orphan = True

    def arrive(self):
        if len(self.members) < MEMBERS + 1:
            self.join()

    def end_session(self):
        """An agent leaves: its member serves its name no longer, and gives it back."""
        if holding := [each for each in self.ready() if each.held]:
            member = self.chance.choice(holding)
            name = self.chance.choice(sorted(member.held))
            held = member.held.pop(name)
            self.tell(member.id, "ends", held.owner, "on", name)
            member.to_release.add(name)

    def replicate(self):
        self.replica = pickle.dumps(vars(self.server.table))

    def copy_of(self, replica):
        table = self.make_table()
        vars(table).update(pickle.loads(replica))
        return table

    def stop_server(self):
        self.server.stopped = not self.server.stopped
        self.tell(self.server.name, "stopped:", self.server.stopped)

    def restart_server(self):
        self.replace_server(self.server.table, self.server.offset)

    def empty_server(self):
        self.replace_server(self.make_table(), self.server.offset)

    def fail_over(self):
        if self.may_jump():
            self.replace_server(self.copy_of(self.replica), self.chance.uniform(-1e5, 1e5))

    def replace_server(self, table, offset):
        self.count += 1
        self.server.dead = True
        self.server = Server(f"s{self.count}", table, offset)
        self.replica = pickle.dumps(vars(table))
        known = self.copy_of(self.replica)
        for member in self.members:
            held = known.held(0, member.id, server=self.server.name)
            if not member.is_lost and not set(member.held) <= set(held):
                member.is_lost, member.known_then = True, member.tenure.known
        self.tell(self.server.name, "serves")

    def set_clock(self):
        if self.may_jump():
            self.server.offset += self.chance.choice((-5000, 900, 100_000))
            self.tell("the server's clock is set")

    def may_jump(self):
        if self.now - self.jumped_at < JUMP_PAUSE:
            return False
        self.jumped_at = self.now
        return True

    # What must hold

    def check(self):
        serving = {}
        for member in self.members:
            if member.held and not member.stopped and member.serves(member.clock(self.now)):
                for name, held in member.held.items():
                    serving.setdefault(name, []).append((held.owner, member))
        for name, pairs in serving.items():
            if len({owner for owner, _ in pairs}) < 2:
                continue
            excused = {
                one.id for (owner, one), (other_owner, other) in itertools.permutations(pairs, 2)
                if owner != other_owner and self.is_excused(one, other)
            }  # fmt: skip
            owners = {owner: member.id for owner, member in pairs if member.id not in excused}
            if len(owners) > 1:
                self.fail(f"{name} is served for two owners, by {' and '.join(owners.values())}")

    def is_excused(self, cut_off, other):
        """The hole that is left, and documented: a member without the board cannot hear from one
        that it has never heard of. The board keeps that one from its names for FORGET, unless the
        server has lost what it knew."""
        if other.id in cut_off.known_then:
            return False
        is_long = self.now > cut_off.contact_at + self.make_table().times.forget
        return cut_off.is_lost or is_long

    def fail(self, text):
        story = "\n".join(f"{at:9.0f} {' '.join(map(str, words))}" for at, words in self.story)
        raise Broken(f"seed {self.seed!r}: at {self.now:.0f} ms {text}\n{story}")

    def heal(self):
        """All faults end. Then each name that nobody serves must be had by a new owner within
        LIVENESS_BOUND. Returns the milliseconds that the last one took."""
        self.server.stopped = False
        if not self.members:
            self.join()
        self.messages.clear()
        for member in self.members:
            member.linked, member.stopped = True, False
        began, wanted = self.now, {f"n{number}" for number in range(self.names)}
        while wanted:
            if self.now - began > LIVENESS_BOUND:
                self.fail(f"{sorted(wanted)} cannot be had after {LIVENESS_BOUND} ms")
            self.now += 1000 * RENEW / 4
            for member in self.members:
                self.settle(member)
                self.check()
            wanted -= {name for member in self.members for name in member.held}
            member = self.chance.choice(self.members)
            if wanted and member.may_claim(member.clock(self.now)):
                asks = (Ask(min(wanted), "new"),)
                self.settle(member, ("claim", (member.tenure.contact, asks, True)))
        return self.now - began

    def settle(self, member, call=None):
        """A member's next call, answered at once."""
        if member.call is not None:
            self.abandon(member)
        clock = member.clock(self.now)
        member.serves(clock)
        kind, arguments = call or member.next_call(clock)
        self.tell(member.id, "asks", kind, arguments)
        call = Call(member, kind, arguments, clock, self.server)
        self.execute(call)
        self.take(member, call, clock)
