"""Members that count together: rates, wrong passwords, bad tokens and blocked addresses."""

import base64
import json
import math
from types import SimpleNamespace

import pytest
from support import wait_until

from gotunnel_agent.common.passwords import hash_if_plain
from gotunnel_server.agents.attempts import FREE_FAILURES, MOST_FAILURES, Attempts
from gotunnel_server.cluster import counts as counts_module
from gotunnel_server.cluster.counts import SharedCounts
from gotunnel_server.net import blocks as blocks_module
from gotunnel_server.net.blocks import Act, Blocks, read_network
from gotunnel_server.visitors import basic_auth
from gotunnel_server.visitors.policy import read
from gotunnel_server.visitors.verdict import Answer

APP = "app.example.com"
VISITOR, NEIGHBOUR, OTHER = "2001:db8::1", "2001:db8::2", "192.0.2.7"


class Members:
    """Members with a clock of their own, whose messages arrive at once as JSON."""

    def __init__(self, count, rules=None):
        self.now, self.sent, self.deaf = 1000.0, [], set()
        self.parts = [Member(self, number, rules) for number in range(count)]

    def __iter__(self):
        return iter(self.parts)

    def deliver(self, sender, to, message):
        text = json.dumps({"from": sender, **message})
        self.sent.append(text)
        for member in self.parts:
            if member.id != sender and to in ("", member.id) and member.id not in self.deaf:
                member.counts.hear(json.loads(text))
                member.counts.take_heard()

    def second(self, seconds=1):
        """So much time passes, and each member tells what was spent."""
        self.now += seconds
        for member in self.parts:
            member.counts.tick()


class Member:
    def __init__(self, members, number, rules):
        self.id = f"m{number}"
        self._members = members
        self.attempts = Attempts(self._now)
        self.blocks = Blocks(None, self._now, lambda: 1_800_000_000 + self._now())
        self.policy = read(rules, "http", now=self._now) if rules else None
        self.routes = {APP: SimpleNamespace(policy=self.policy)}
        self.counts = SharedCounts(self, lambda: self.routes, self.attempts, self.blocks)
        self.counts._questions = 0
        self.counts.tick()  # from now on it counts

    def _now(self):
        return self._members.now

    def publish(self, to, message):
        if hasattr(self._members, "parts"):
            self._members.deliver(self.id, to, message)

    def visit(self, count, address=VISITOR, authorization=None):
        """How many of so many visits are let in."""
        verdicts = [self.policy.judge_request(address, authorization) for _ in range(count)]
        return sum(not isinstance(verdict, Answer) for verdict in verdicts)


def test_the_rate_of_a_visitor_is_that_of_all_members_together():
    members = Members(3, {"rate_limit": {"per_address": 2, "burst": 10}})
    assert [member.visit(50) for member in members] == [10, 10, 10]  # none knows of the others
    members.second()
    assert [member.visit(50) for member in members] == [0, 0, 0]
    assert [member.visit(1, OTHER) for member in members] == [1, 1, 1]
    members.second(9)  # 30 tokens were taken, of 10 and those of 10 seconds
    assert sum(member.visit(50, NEIGHBOUR) for member in members) == 0
    members.second(1)
    assert members.parts[0].visit(50) in (1, 2)


def test_in_the_long_run_as_many_are_let_in_as_by_one_gateway():
    members = Members(4, {"rate_limit": {"per_address": 2, "burst": 4}})
    let_in = 0
    for _ in range(60):
        for member in members:
            let_in += member.visit(3)
        members.second()
    assert 60 * 2 <= let_in <= 60 * 2 + 4 * 4 + 4 * 2  # each its burst once, and a second's share


def test_the_rate_of_all_visitors_counts_together_too():
    members = Members(2, {"rate_limit": {"total": 1, "total_burst": 5}})
    one, two = members
    assert [one.visit(1, f"192.0.2.{number}") for number in range(5)] == [1] * 5
    members.second()
    assert two.visit(9, OTHER) == 0
    members.now += 1
    assert two.visit(9, OTHER) == 1


def test_one_member_alone_does_as_without_a_cluster():
    members = Members(1, {"rate_limit": {"per_address": 1, "burst": 3}})
    [alone] = members
    assert alone.visit(9) == 3
    members.second()
    assert alone.visit(9) == 1


def test_a_long_debt_is_cut(monkeypatch):
    members = Members(2, {"rate_limit": {"per_address": 1, "burst": 3}})
    members.deliver(
        "m0",
        "m1",
        {
            "do": "spent",
            "attempts": [],
            "policies": [[APP, "each", [6, 0x20010DB800000000], 10**9]],
        },
    )
    members.now += 59
    assert members.parts[1].visit(1) == 0
    members.now += 5
    assert members.parts[1].visit(1) == 1


def test_wrong_passwords_are_counted_together(monkeypatch):
    monkeypatch.setattr(basic_auth, "FAILURES", 3)
    hashed = hash_if_plain("right")
    members = Members(2, {"basic_auth": [f"ada:{hashed}"]})
    one, two = members
    for number in range(3):
        one.visit(1, VISITOR, credentials(f"wrong{number}"))
    assert two.visit(1, VISITOR, credentials("right")) == 1
    members.second()
    assert status(two, VISITOR, credentials("another")) == 429
    assert two.visit(1, VISITOR, credentials("right")) == 1  # it was right from there before
    assert status(two, OTHER, credentials("another")) == 401


def credentials(password):
    return "Basic " + base64.b64encode(f"ada:{password}".encode()).decode()


def status(member, address, authorization):
    return member.policy.judge_request(address, authorization).page.status


def test_bad_tokens_slow_an_address_down_at_all_members():
    members = Members(3)
    for _ in range(FREE_FAILURES):
        for member in members:
            member.attempts.failed(VISITOR)
    assert [member.attempts.delay(VISITOR) for member in members] == [0, 0, 0]
    members.second()
    assert all(member.attempts.delay(NEIGHBOUR) == 5 for member in members)
    assert all(member.attempts.delay(OTHER) == 0 for member in members)
    for _ in range(MOST_FAILURES):
        members.parts[0].attempts.failed(VISITOR)
    members.second()
    assert all(member.attempts.closed(VISITOR) for member in members)
    members.second(60)
    assert not any(member.attempts.closed(VISITOR) for member in members)
    count = len(members.sent)
    members.second()
    assert len(members.sent) == count  # nothing is said where nothing happens


def test_what_was_heard_is_not_told_again():
    members = Members(3, {"rate_limit": {"per_address": 1, "burst": 5}})
    members.parts[0].visit(2)
    members.parts[0].attempts.failed(OTHER)
    members.second()
    members.second()
    assert len(members.sent) == 1


def test_a_message_is_bounded_and_the_rest_comes_later(monkeypatch):
    monkeypatch.setattr(counts_module, "MOST_ENTRIES", 3)
    monkeypatch.setattr(counts_module, "MOST_WAITING", 5)
    members = Members(2)
    one, two = members
    for number in range(9):
        for _ in range(number + 1):
            one.attempts.failed(f"192.0.2.{number}")
    told = []
    for _ in range(4):
        count = len(members.sent)
        members.second()
        told += [len(json.loads(text)["attempts"]) for text in members.sent[count:]]
    assert told == [3, 2]  # the largest five
    for _ in range(20):
        two.attempts.failed("192.0.2.8")
    assert two.attempts.delay("192.0.2.8") == (20 + 9 - FREE_FAILURES) * 0.25


def test_a_full_message_fits_into_a_board_s(monkeypatch):
    members = Members(1)
    [one] = members
    for number in range(2 * counts_module.MOST_ENTRIES):
        one.attempts.failed(f"2001:db8:0:{number:x}::1")
    one.routes = {"a" * 63 + f".{number}.example.com": SimpleNamespace(policy=Spender())
                  for number in range(300)}  # fmt: skip
    members.second()
    assert max(map(len, members.sent)) < 64 * 1024


class Spender:
    def spent(self):
        return {"each": {(6, 2**64 - 1): 10**6}}


@pytest.mark.parametrize(
    "message",
    [{}, {"attempts": [], "policies": None}, {"attempts": [[1]], "policies": []},
     {"attempts": [[[4, 5, 6], 1]], "policies": []}, {"attempts": [[{}, 1]], "policies": []},
     {"attempts": [[1, -1]], "policies": []}, {"attempts": [[1, True]], "policies": []},
     {"attempts": [[1, "x"]], "policies": []}, {"attempts": 7, "policies": 7},
     {"attempts": [], "policies": [[[], "each", None, 1]]},
     {"attempts": [], "policies": [[APP, [], None, 1]]},
     {"do": "blocks"}, {"do": "blocks", "acts": [[1]]},
     {"do": "blocks", "acts": [["x", 1, "", "", 1]]},
     {"do": "blocks", "acts": [[OTHER, "x", "", "", 1]]},
     {"do": "blocks", "acts": [["0.0.0.0/0", 60, "", "", 1]]},
     {"do": "blocks", "acts": [[OTHER, 10**400, "", "", 1]]},
     {"do": "blocks", "acts": [[OTHER, math.nan, "", "", 1]]},
     {"do": "blocks", "acts": [[OTHER, math.inf, "", "", 1]]},
     {"do": "blocks", "acts": [[OTHER, 60, "", "", math.nan]]},
     {"do": "blocks", "acts": [[OTHER, 60, "", "", 1e12]]},  # nobody could ever undo it
     {"attempts": [["x" * 101, 1]], "policies": []},
     {"attempts": [[2**128, 1]], "policies": []}, {"attempts": [[[6, -1], 1]], "policies": []}],
    ids=range(24),
)  # fmt: skip
def test_a_malformed_message_is_passed_over(message, caplog):
    [one] = Members(1, {"rate_limit": {"per_address": 1}})
    one.counts.hear({"from": "x", "do": "spent", **message})
    one.counts.take_heard()
    assert "malformed message" in caplog.text
    assert one.blocks.all() == [] and one.attempts.delay(OTHER) == 0


def test_malformed_messages_do_not_fill_the_log(caplog):
    [one] = Members(1)
    for _ in range(1000):
        one.counts.hear({"from": "x", "do": "spent"})
    assert caplog.text.count("malformed message") <= 2 * counts_module.NEWS


# Blocks


def block(member, address, seconds=600):
    return member.blocks.add(read_network(address), seconds, "scans", "198.51.100.1")


def test_an_address_that_is_blocked_at_one_member_is_blocked_at_all():
    members = Members(3)
    one, two, three = members
    heard = []
    three.blocks.on_heard = lambda: heard.append(OTHER in three.blocks)
    block(one, OTHER), block(two, VISITOR)
    assert all(OTHER in member.blocks and NEIGHBOUR in member.blocks for member in members)
    assert heard == [True, True]  # its visits are cut there, too
    [found, _] = three.blocks.all()
    assert (found.reason, found.by) == ("scans", "198.51.100.1")
    assert found.until == pytest.approx(1_800_000_000 + members.now + 600)
    three.blocks.remove(read_network(OTHER))
    assert not any(OTHER in member.blocks for member in members)
    members.now += 600
    assert not any(VISITOR in member.blocks for member in members)


def test_a_member_that_was_away_hears_what_it_missed_and_undoes_nothing():
    members = Members(2)
    one, two = members
    block(one, OTHER)
    members.now += 1
    members.deaf = {"m1"}
    one.blocks.remove(read_network(OTHER))
    block(one, VISITOR)
    members.deaf = set()
    assert OTHER in two.blocks and VISITOR not in two.blocks
    two.counts.joined("m0")  # in whichever order they hear of each other
    assert OTHER not in one.blocks
    one.counts.joined("m1")
    assert OTHER not in two.blocks and VISITOR in two.blocks


def test_a_member_that_starts_learns_what_is_blocked(monkeypatch):
    monkeypatch.setattr(counts_module, "MOST_ACTS", 2)
    members = Members(2)
    one, two = members
    members.deaf = {"m1"}
    for number in range(5):
        block(one, f"192.0.2.{number}")
    members.deaf = set()
    two.counts._questions = 1
    members.second()
    assert len(two.blocks.all()) == 5


def test_blocks_of_others_have_the_same_bounds(monkeypatch):
    monkeypatch.setattr(blocks_module, "MOST_BLOCKS", 2)
    blocks = Blocks()
    blocks.hear([Act(f"192.0.2.{number}", 10.0**12, "x" * 10_000, at=1.0) for number in range(9)])
    assert len(blocks.all()) == 2
    assert {len(each.reason) for each in blocks.all()} == {blocks_module.MOST_REASON}
    assert len(blocks._acted_at) <= 4


def test_a_thread_tells_each_second_until_stop(monkeypatch):
    monkeypatch.setattr(counts_module, "INTERVAL", 0.001)
    members = Members(2)
    one, two = members
    one.attempts.failed(OTHER)
    ticks = []
    one.counts._every_second = lambda: ticks.append(1)
    one.counts.start()
    wait_until(lambda: len(ticks) > 2 and two.attempts._counts)
    one.counts.stop()
