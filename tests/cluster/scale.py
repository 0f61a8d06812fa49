"""What a cluster costs Redis, measured; and what one of any size would need, simulated. The program
of tools/simulate.py.

*Measured*: a redis-server of its own, and the calls that gateways make (redis_board.py): CPU, bytes
and memory of each, with few and with many members.

*Simulated*: gateways of any number, with leases.Table as their board. Each call takes Redis its
measured time, one after the other. A call that is not answered in time fails, as in engine.py, and
its member begins anew. One row of the table stands for many hostnames that the same agents have.
Meanwhile gateways die, Redis loses its data, and gateways are restarted one after the other.
"""

import argparse
import heapq
import itertools
import random
import sys
from statistics import median
from time import perf_counter
from typing import NamedTuple

from redis_server import redis_process

from gotunnel_server.cluster.board import GRANTED, UNKNOWN, Ask, Card, Renewal
from gotunnel_server.cluster.claims import BATCH, RE_ASK
from gotunnel_server.cluster.engine import ANSWER_TIMEOUT, Engine
from gotunnel_server.cluster.leases import Table
from gotunnel_server.cluster.members import RETRY
from gotunnel_server.cluster.redis_board import RedisBoard
from gotunnel_server.cluster.settings import Settings, read_url
from gotunnel_server.cluster.tenure import LEASE, MARGIN, RENEW

SIZES = (3, 10, 100, 1000)  # members
NAMES = 20_000  # for a measurement
TURNS = 40  # calls of one kind


class Costs(NamedTuple):
    """Microseconds of Redis's CPU, and bytes. Measured by ``--measure`` on the machine of
    docs/scaling.md; what matters is how they grow."""

    renew: float = 40.0
    listed: float = 4.0  # ... for each member, if its answer has the list of members
    claim: float = 46.0
    name: float = 6.0  # ... for each name
    release: float = 46.0
    given_back: float = 4.3  # ... for each name
    renew_bytes: float = 530.0  # both ways
    listed_bytes: float = 172.0
    name_bytes: float = 114.0
    memory: float = 257.0  # of a name
    more_memory: float = 100.0  # ... for each further member that has it


# Measurement -------------------------------------------------------------------------------------


class Meter:
    """What Redis says of itself before and after something."""

    def __init__(self, server):
        self._server = server

    def of(self, act, turns):
        """Microseconds of CPU and bytes (both ways) of one ``act()``, of ``turns``."""
        self._server.reset_counts()
        before = self._read("stats", "total_net_input_bytes", "total_net_output_bytes")
        for _ in range(turns):
            act()
        after = self._read("stats", "total_net_input_bytes", "total_net_output_bytes")
        stats = self._server.call("INFO", "commandstats")
        used = 0
        for line in stats.splitlines():
            # What a script calls is in the script's own time as well.
            if line.startswith(("cmdstat_eval:", "cmdstat_evalsha:")):
                used += int(line.split("usec=")[1].partition(",")[0])
        return used / turns, (sum(after) - sum(before)) / turns

    def memory(self):
        return self._read("memory", "used_memory")[0]

    def _read(self, section, *names):
        text = self._server.call("INFO", section)
        pairs = dict(line.split(":", 1) for line in text.splitlines() if ":" in line)
        return [int(pairs[name]) for name in names]


class Fleet:
    """Members on one board, without gateways."""

    def __init__(self, server):
        self.board = RedisBoard(Engine(Settings(read_url(server.url))), "scale")
        self.now = self.board.now = 1_000_000
        self.board.server = "one"
        self.contacts, self.version = {}, 0

    def card(self, id):
        return Card(id, f"gateway-{id}.example.com:9443", f"10.1.2.3:{9443}", f"gateway-{id}",
                    "1.0.0", 1_790_000_000)  # fmt: skip

    def renew(self, id, knows=None):
        renewal = Renewal(self.card(id), self.contacts.get(id, 0), knows or self.version)
        renewed = self.board.renew(id, renewal)
        self.contacts[id], self.version = renewed.contact, renewed.version
        return renewed

    def grow(self, count):
        for number in range(len(self.contacts), count):
            self.renew(f"{number:08x}")

    def settle(self):
        for _ in range(8):
            self.now += 1000
            self.board.now = self.now
            for id in self.contacts:
                self.renew(id)


def measure(say):
    """Prints the table of costs; returns Costs."""
    with redis_process() as server:
        fleet, meter, first = Fleet(server), Meter(server), "00000000"
        names = itertools.count()
        rows = []
        for size in SIZES:
            fleet.grow(size)
            fleet.settle()
            plain = meter.of(lambda: fleet.renew(first), TURNS)
            listed = meter.of(lambda: fleet.renew(first, knows=-1), TURNS)

            def claim(count):
                asks = [Ask(f"host{next(names)}.tunnel.example.com", f"i:{'0' * 32}")
                        for _ in range(count)]  # fmt: skip
                answers = fleet.board.claim(first, fleet.contacts[first], asks, True)
                assert {answer.verdict for answer in answers} == {GRANTED}, answers[0]

            one = meter.of(lambda: claim(1), TURNS)
            rows.append((size, plain, listed, one))
            say(f"{size:6} members: a renewal {plain[0]:6.0f} µs, {plain[1]:6.0f} bytes; with the "
                f"list {listed[0]:7.0f} µs, {listed[1]:8.0f} bytes; a claim of one name "
                f"{one[0]:6.0f} µs")  # fmt: skip
        before = meter.memory()
        start = next(names)
        turns = NAMES // BATCH
        many = meter.of(lambda: claim(BATCH), turns)
        memory = (meter.memory() - before) / NAMES
        taken = itertools.count(start + 1, BATCH)

        def share():
            at = next(taken)
            asks = [Ask(f"host{number}.tunnel.example.com", f"i:{'0' * 32}")
                    for number in range(at, at + BATCH)]  # fmt: skip
            fleet.board.claim("00000001", fleet.contacts["00000001"], asks, True)

        before = meter.memory()
        second = meter.of(share, turns)
        more = (meter.memory() - before) / NAMES
        taken = itertools.count(start + 1, BATCH)

        def give_back():
            at = next(taken)
            hosts = [f"host{number}.tunnel.example.com" for number in range(at, at + BATCH)]
            fleet.board.release("00000001", fleet.contacts["00000001"], hosts)

        back = meter.of(give_back, turns)
        fleet.board.stop()
    few, most = rows[0], rows[-1]
    costs = Costs(
        renew=median(row[1][0] for row in rows),
        listed=(most[2][0] - most[1][0]) / most[0],
        claim=few[3][0], name=many[0] / BATCH,
        release=few[3][0], given_back=back[0] / BATCH,
        renew_bytes=few[1][1], listed_bytes=(most[2][1] - most[1][1]) / most[0],
        name_bytes=many[1] / BATCH, memory=memory, more_memory=more,
    )  # fmt: skip
    say(f"a claim of {BATCH} names: {costs.name:.1f} µs and {costs.name_bytes:.0f} bytes a name; "
        f"by a second member {second[0] / BATCH:.1f} µs; giving back {costs.given_back:.1f} µs\n"
        f"memory: {memory:.0f} bytes a name, {more:.0f} more for each further member")  # fmt: skip
    return costs


# Simulation --------------------------------------------------------------------------------------


class Shape(NamedTuple):
    """``sessions``: gateways that each agent has a session with. ``shards``: Redis servers, among
    which hostnames are divided. ``told``: the most cards of members that the answer to a renewal
    has; 0: all, as it is today. ``start``: seconds in which all gateways start."""

    gateways: int = 1000
    names: int = 1_000_000
    sessions: int = 2
    shards: int = 1
    told: int = 0
    start: float = RENEW
    rows: int = 10_000  # of the table; each stands for names / rows hostnames


class Gateway:
    def __init__(self, number):
        self.id = f"{number:08x}"
        self.card = Card(self.id)
        self.contact = self.knows = 0
        self.rows = {}  # name: fencing number
        self.to_ask = []  # lists of names: after a contact has begun, before the next renewal
        self.to_claim = []  # ... and when there is time
        self.due = 0.0
        self.alive = True
        self.away_since = None
        self.served_until = 0.0  # end of its own lease


class Simulation:
    """One board; with shards, one of several that are alike."""

    def __init__(self, shape, costs, seed=1):
        self.shape, self.costs = shape, costs
        self.chance = random.Random(seed)
        self.table = Table()
        self.server = "one"
        self.now = 0.0
        self.free_at = 0.0  # when Redis has done all that it was asked
        self.busy, self.bytes, self.calls, self.failed = {}, {}, {}, {}  # by second
        self._events, self._order = [], itertools.count()
        self.weight = shape.names / shape.shards / shape.rows
        self.gateways = [Gateway(number) for number in range(shape.gateways)]
        self.agents = {}  # row: gateways that it has sessions with
        for row in range(shape.rows):
            chosen = self.chance.sample(self.gateways, min(shape.sessions, shape.gateways))
            name = f"row{row}"
            self.agents[name] = chosen
            for gateway in chosen:
                gateway.rows[name] = 0
        for gateway in self.gateways:
            self.at(self.chance.random() * shape.start, self.renew, gateway)
        self.longest = 0.0

    def at(self, delay, act, *arguments):
        heapq.heappush(self._events, (self.now + delay, next(self._order), act, arguments))

    def run(self, until):
        while self._events and self._events[0][0] <= until:
            self.now, _, act, arguments = heapq.heappop(self._events)
            act(*arguments)
        self.now = until

    # Redis

    def ask(self, gateway, kind, cost, size, call, then):
        """A call of a gateway: Redis does it when all before are done."""
        second = int(self.now)
        self.calls[second] = self.calls.get(second, 0) + 1
        self.bytes[second] = self.bytes.get(second, 0) + size
        sent_at = self.now
        self.free_at = max(self.free_at, self.now) + cost / 1e6
        waited = self.free_at - sent_at
        self.longest = max(self.longest, waited)
        spent = int(self.free_at)
        self.busy[spent] = self.busy.get(spent, 0) + cost / 1e6
        # It is done in any case. The answer is of use only if it comes in time.
        result = call(int(1000 * self.free_at))
        if waited > ANSWER_TIMEOUT:
            self.at(ANSWER_TIMEOUT, self.fail, gateway, second)
        else:
            self.at(waited, then, gateway, result, sent_at)

    def fail(self, gateway, second):
        if gateway.alive:
            self.failed[second] = self.failed.get(second, 0) + 1
            gateway.contact, gateway.to_ask, gateway.due = 0, [], 0.0
            gateway.away_since = gateway.away_since or self.now
            self.at(RETRY, self.renew, gateway)

    # A gateway

    def renew(self, gateway):
        if not gateway.alive:
            return
        costs = self.costs
        renewal = Renewal(gateway.card, gateway.contact, gateway.knows)
        listed = 0
        if gateway.contact == 0 or gateway.knows != self.table._version:
            listed = min(self.shape.told or len(self.gateways), len(self.gateways))
        self.ask(
            gateway, "renew", costs.renew + listed * costs.listed,
            costs.renew_bytes + listed * costs.listed_bytes,
            lambda now: self.table.renew(now, gateway.id, renewal, self.server), self.renewed,
        )  # fmt: skip

    def renewed(self, gateway, renewed, sent_at):
        if not gateway.alive:
            return
        gateway.contact, gateway.knows, gateway.due = renewed.contact, renewed.version, 0.0
        if renewed.anew:
            names = sorted(gateway.rows)
            size = max(1, int(BATCH / self.weight))
            gateway.to_ask = [names[at : at + size] for at in range(0, len(names), size)]
        self.go_on(gateway, sent_at)

    def go_on(self, gateway, sent_at):
        """The next call of a gateway, as in members.py: names that it held, renewals, new names."""
        if gateway.to_ask and self.now > sent_at + RENEW:
            return self.renew(gateway)
        if gateway.to_ask:
            return self.claim(gateway, gateway.to_ask.pop(0), sent_at)
        gateway.away_since = None
        gateway.served_until = sent_at + LEASE - MARGIN
        gateway.due = sent_at + RENEW
        self.work(gateway, sent_at)

    def work(self, gateway, sent_at):
        if gateway.to_claim and self.now < gateway.due:
            return self.claim(gateway, gateway.to_claim.pop(0), sent_at)
        self.at(max(0.0, gateway.due - self.now), self.renew, gateway)

    def claim(self, gateway, names, sent_at):
        costs = self.costs
        asks = [Ask(name, f"agent of {name}", gateway.rows[name]) for name in names]
        count = len(names) * self.weight
        self.ask(
            gateway, "claim", costs.claim + count * costs.name, count * costs.name_bytes,
            lambda now: self.table.claim(
                now, gateway.id, gateway.contact, asks, False, self.server
            ),
            lambda gateway, answers, _: self.claimed(gateway, names, answers, sent_at),
        )  # fmt: skip

    def claimed(self, gateway, names, answers, sent_at):
        if not gateway.alive:
            return
        if answers and answers[0].verdict == UNKNOWN:
            gateway.contact, gateway.due = 0, 0.0
            self.at(0.0, self.renew, gateway)
            return
        later = [n for n, answer in zip(names, answers, strict=True) if answer.verdict != GRANTED]
        for name, answer in zip(names, answers, strict=True):
            if answer.verdict == GRANTED:
                gateway.rows[name] = answer.number
        if later:
            self.at(RE_ASK, gateway.to_claim.append, later)
        if self.now < gateway.due and not gateway.to_ask:
            self.work(gateway, sent_at)
        else:
            self.go_on(gateway, sent_at)

    # What happens

    def kill(self, count):
        """Gateways die. Their agents go on with their other sessions, and dial another gateway."""
        living = [each for each in self.gateways if each.alive]
        for gateway in self.chance.sample(living, min(count, len(living) - 1)):
            gateway.alive = False
            left = [each for each in living if each.alive]
            for name in gateway.rows:
                agents = self.agents[name]
                agents.remove(gateway)
                if fresh := [each for each in self.chance.sample(left, min(3, len(left)))
                             if each not in agents]:  # fmt: skip
                    agents.append(fresh[0])
                    self.at(self.chance.uniform(0.1, 2.0), self.take, fresh[0], name)

    def take(self, gateway, name):
        """An agent has opened a session with this gateway."""
        gateway.rows.setdefault(name, 0)
        gateway.to_claim.append([name])

    def start(self, count=1):
        for _ in range(count):
            gateway = Gateway(len(self.gateways))
            self.gateways.append(gateway)
            self.at(0.0, self.renew, gateway)

    def lose_data(self):
        self.table = Table()
        self.server = f"server at {self.now}"

    # What is seen

    def well(self):
        """The share of hostnames that some gateway may serve now."""
        served = sum(
            any(each.alive and each.rows.get(name) and each.served_until > self.now
                for each in holders)
            for name, holders in self.agents.items()
        )  # fmt: skip
        return served / len(self.agents)

    def watch(self, title, seconds, say, shape_bytes=True):
        """Run for so long and print what it was like."""
        began, self.longest = int(self.now), 0.0
        worst, well_at = 1.0, None
        for tick in range(int(seconds * 4)):
            self.run(began + (tick + 1) / 4)
            share = self.well()
            worst = min(worst, share)
            well_at = (well_at or self.now) if share > 0.9999 else None
        span = range(began, int(self.now))
        busy = [self.busy.get(second, 0) for second in span]
        calls = [self.calls.get(second, 0) for second in span]
        size = [self.bytes.get(second, 0) for second in span]
        failed = sum(self.failed.get(second, 0) for second in span)
        recovery = "never" if well_at is None else f"{max(0.0, well_at - began - 0.25):.1f}"
        say(f"{title:36}{sum(calls) / len(calls):9.0f}{max(calls):9}{100 * max(busy):8.0f}"
            f"{max(size) / 1e6:9.1f}{self.longest:9.2f}{failed:8}{100 * worst:9.1f}"
            f"{recovery:>9}")  # fmt: skip
        return worst, well_at


HEAD = (
    f"{'':36}{'calls/s':>9}{'most':>9}{'CPU, %':>8}{'most':>9}{'longest':>9}{'calls':>8}"
    f"{'least':>9}{'all well':>9}\n{'':36}{'':9}{'calls/s':>9}{'at most':>8}{'MB/s':>9}"
    f"{'wait, s':>9}{'failed':>8}{'served,%':>9}{'after, s':>9}"
)


def simulate(shape, costs, say):
    say(f"{shape.gateways} gateways, {shape.names} hostnames, {shape.sessions} sessions an agent, "
        f"{shape.shards} Redis, "
        f"at most {shape.told or 'all'} members told at a time")  # fmt: skip
    say(HEAD)
    began = perf_counter()
    world = Simulation(shape, costs)
    world.watch(f"all start within {shape.start:g} s", 25 + shape.start, say)
    world.watch("nothing happens", 10, say)
    world.kill(1)
    world.watch("a gateway dies", 10, say)
    world.kill(max(1, shape.gateways // 100))
    world.watch("one of a hundred dies", 10, say)
    replaced = max(1, min(10, shape.gateways // 3))
    for number in range(replaced):
        world.at(number, world.start)
        world.at(number + 0.3, world.kill, 1)
    world.watch(f"{replaced} replaced, one a second", 14, say)
    world.lose_data()
    world.watch("Redis loses its data", 25, say)
    of_name = costs.memory + (min(shape.sessions, shape.gateways) - 1) * costs.more_memory
    steady = shape.names * of_name / shape.shards / 1e6
    say(
        f"memory in each Redis: about {steady:.0f} MB; simulated in "
        f"{perf_counter() - began:.0f} s\n"
    )
    return world


def main(arguments):
    parser = argparse.ArgumentParser(prog="tools/simulate.py", description="Scale of a cluster.")
    parser.add_argument("--measure", action="store_true", help="measure a redis-server here first")
    parser.add_argument("--gateways", type=int, action="append", help="(repeatable)")
    parser.add_argument("--names", type=int, default=1_000_000)
    parser.add_argument("--sessions", type=int, default=2)
    parser.add_argument("--shards", type=int, default=1)
    parser.add_argument("--told", type=int, default=0,
                        help="most members in the answer to a renewal (default: all)")  # fmt: skip
    parser.add_argument("--start", type=float, default=RENEW,
                        help="seconds in which all start (default: %(default)g)")  # fmt: skip
    given = parser.parse_args(arguments)

    def say(text):
        print(text, flush=True)

    costs = measure(say) if given.measure else Costs()
    say(f"\n{costs}\n")
    for gateways in given.gateways or (3, 30, 1000):
        names = given.names if gateways >= 1000 else min(given.names, 1000 * gateways)
        shape = Shape(gateways, names, given.sessions, given.shards, given.told, given.start,
                      rows=min(names, 10_000))  # fmt: skip
        simulate(shape, costs, say)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
