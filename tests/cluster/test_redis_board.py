"""The board on Redis decides as leases.Table does: the same random calls to both, on a real Redis.

And what only a real one shows: a server that has lost its data, one that stands still, a replica.
"""

import json
import random
import threading

import pytest
from support import at_length, need_package, wait_until

from gotunnel_server.cluster.board import GRANTED, LATER, UNKNOWN, Ask, Away, Card, Renewal
from gotunnel_server.cluster.leases import TIMES, Table

need_package("redis", "redis")
from gotunnel_server.cluster.engine import Engine  # noqa: E402
from gotunnel_server.cluster.redis_board import RedisBoard  # noqa: E402
from gotunnel_server.cluster.settings import Settings, read_url  # noqa: E402

NAMES = [f"n{number}.example" for number in range(5)]
MEMBERS = ["aaaaaaaa", "bbbbbbbb", "cccccccc", "dddddddd"]
OWNERS = ["i:one", "i:two", "p:pool"]
STEPS = 60


@pytest.fixture
def board_at():
    """A function that makes a RedisBoard for a URL."""
    boards = []

    def make(url, times=TIMES):
        board = RedisBoard(Engine(Settings(read_url(url))), "test", times)
        boards.append(board)
        return board

    yield make
    for board in boards:
        board.stop()


class Both:
    """Calls the Table and the board on Redis, and compares what they answer."""

    def __init__(self, board, chance):
        self.table, self.board, self.chance = Table(), board, chance
        self.now, self.server = 1_000_000, "s0"
        self.contacts = {}
        self.numbers = {}
        self.story = []

    def call(self, kind, *arguments):
        self.board.now, self.board.server = self.now, self.server
        expected = getattr(self.table, kind)(self.now, *arguments, server=self.server)
        answer = getattr(self.board, kind)(*arguments)
        self.story.append(f"{self.now} {self.server} {kind} {arguments}: {expected}")
        assert answer == expected, "\n".join(self.story)
        return answer

    def step(self):
        chance = self.chance
        self.now += chance.choice((0, 1, 300, 300, 800, 1500, 5000, -2000))
        id = chance.choice(MEMBERS)
        contact = self.contacts.get(id, 0) if chance.random() < 0.9 else chance.randrange(9)
        kind = chance.random()
        if kind < 0.4:
            card = Card(id, peer=f"127.0.0.1:{chance.choice((1, 1, 1, 2))}", host='a "name" é')
            renewal = Renewal(card, contact, chance.randrange(6))
            self.contacts[id] = self.call("renew", id, renewal).contact
        elif kind < 0.8:
            asks = [self.draw_ask() for _ in range(chance.randrange(1, 4))]
            asks = list({ask.name: ask for ask in asks}.values())
            answers = self.call("claim", id, contact, asks, chance.random() < 0.5)
            for ask, answer in zip(asks, answers, strict=True):
                if answer.verdict == GRANTED:
                    self.numbers[ask.name] = answer.number
        elif kind < 0.88:
            self.call("release", id, contact, chance.sample(NAMES, 2))
        elif kind < 0.93:
            self.call("held", id)
        elif kind < 0.96:
            self.call("leave", id)
        elif kind < 0.98:
            self.server = f"s{chance.randrange(3)}"
        else:
            self.now += 61_000

    def draw_ask(self):
        name = self.chance.choice(NAMES)
        owner, was = self.chance.choice(OWNERS), self.chance.choice(["", "", *OWNERS])
        number = self.numbers.get(name, 0) if self.chance.random() < 0.3 else 0
        return Ask(name, owner, number, was)


@pytest.mark.parametrize("histories", [8, at_length(500)])
def test_redis_decides_as_the_table_does(redis_server, board_at, histories):
    board = board_at(redis_server.url)
    for seed in range(histories):
        redis_server.call("FLUSHALL")
        both = Both(board, random.Random(seed))
        for _ in range(STEPS):
            both.step()


def test_two_members_share_names_and_messages(redis_server, board_at):
    one, other = board_at(redis_server.url), board_at(redis_server.url)
    came = []
    there = threading.Event()
    other.on_message = lambda message: (came.append(message), there.set())
    other.start(MEMBERS[1])
    contact = one.renew(MEMBERS[0], Renewal(Card(MEMBERS[0]))).contact
    assert one.claim(MEMBERS[0], contact, [Ask("x", "i:a")], True)[0].verdict == LATER  # SETTLE

    def said():
        one.publish(MEMBERS[1], {"do": "x"})
        return there.wait(0.05)

    wait_until(said)
    one.publish("", {"do": "all"})
    wait_until(lambda: {"do": "all"} in came)
    assert {"do": "x"} in came


def test_a_server_that_has_lost_its_data_knows_no_contact(redis_server, board_at):
    board = board_at(redis_server.url)
    renewed = board.renew(MEMBERS[0], Renewal(Card(MEMBERS[0])))
    redis_server.restart(keep=False)
    answers = wait_until(lambda: answered(board, renewed.contact))
    assert answers[0].verdict == UNKNOWN
    assert board.renew(MEMBERS[0], Renewal(Card(MEMBERS[0]), renewed.contact)).anew


def test_a_server_that_has_kept_its_data_begins_contacts_anew(redis_server, board_at):
    board = board_at(redis_server.url)
    renewed = board.renew(MEMBERS[0], Renewal(Card(MEMBERS[0])))
    redis_server.restart(keep=True)
    assert wait_until(lambda: answered(board, renewed.contact))[0].verdict == UNKNOWN


def answered(board, contact):
    try:
        return board.claim(MEMBERS[0], contact, [Ask("x", "i:a")], True)
    except Away:  # connections of the server before
        return None


def test_a_call_to_a_server_that_stands_still_or_is_gone_ends(redis_server, board_at):
    board = board_at(redis_server.url)
    board.renew(MEMBERS[0], Renewal(Card(MEMBERS[0])))
    redis_server.pause()
    with pytest.raises(Away):
        board.renew(MEMBERS[0], Renewal(Card(MEMBERS[0])))
    redis_server.kill()
    with pytest.raises(Away):
        board.renew(MEMBERS[0], Renewal(Card(MEMBERS[0])))


class Liar:
    """An Engine whose scripts give what somebody else has written."""

    def __init__(self, answer):
        self._answer = answer

    def run(self, *arguments):
        return self._answer

    def close(self):
        """As Engine.close()."""


def told_of(**card):
    return [1, 1, 1, 1, [json.dumps({"id": "a", **card}).encode()], []]


@pytest.mark.parametrize(
    "answer",
    [None, 5, b"x", [], [1] * 5, [b"x", 1, 1, 0, [], []], [1, 1, [], 0, [], []],
     [1, 1, 1, 0, [], 7], [1, 1, 1, 1, 7, []], [1, 1, 1, 1, [b"{"], []], [1, 1, 1, 1, [5], []],
     told_of(id="a\nb"), told_of(id=""), told_of(host=5), told_of(since=-1),
     told_of(since=10**30), told_of(peer="x" * 301), [1, 1, 1, 1, [b'{"id":"a"}'] * 2001, []]],
    ids=range(18),
)  # fmt: skip
def test_a_renewal_that_no_script_of_ours_has_answered_is_away(answer):
    board = RedisBoard(Liar(answer), "test")
    with pytest.raises(Away, match="cannot be understood .*does another program write there"):
        board.renew("a", Renewal(Card("a")))


@pytest.mark.parametrize(
    "answer", [None, 5, [], [[]], [[b"granted"]], [[b"granted", b"x"]], [[5, 1]],
               [[b"granted", 1, 5]], [[b"granted", 1]] * 2, [[b"\xff", 1]]]
)  # fmt: skip
def test_neither_is_a_claim_answered(answer):
    board = RedisBoard(Liar(answer), "test")
    with pytest.raises(Away):
        board.claim("a", 1, [Ask("x", "i:a")], True)
    for call in (lambda: board.release("a", 1, ["x"]), lambda: board.held("a"),
                 lambda: board.leave("a")):  # fmt: skip
        with pytest.raises(Away):
            board._engine._answer = 5
            call()


def test_what_a_member_says_of_itself_has_one_line():
    board = RedisBoard(Liar(told_of(host="h\x1b[31m\nINFO x", version="1\r2")), "test")
    [card] = board.renew("a", Renewal(Card("a"))).members
    assert (card.host, card.version) == ("h [31m INFO x", "1 2")


@pytest.mark.slow
def test_a_replica_that_takes_over_goes_on_with_the_names(redis_sentinels, board_at):
    servers = redis_sentinels
    servers.wait_for_replicas()
    board = board_at(servers.url)
    card = Card(MEMBERS[0])
    renewed = board.renew(MEMBERS[0], Renewal(card))
    servers.wait_for_replicas()
    first = servers.master()
    first.kill()
    servers.wait_for_master_instead_of(first)

    def again():
        try:
            return board.renew(MEMBERS[0], Renewal(card, renewed.contact, renewed.version))
        except Away:
            return None

    again = wait_until(again)
    assert again.anew and again.members == (card,) and again.version == renewed.version
