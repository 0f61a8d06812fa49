"""Proofs of one member's orders, answered by all: sent, waited for, removed, bounded."""

import contextlib
import hashlib
import json
import threading

import pytest
from support import TIMEOUT, wait_until

from gotunnel_server.certs.challenges import PATH, Challenges
from gotunnel_server.cluster import proofs as proofs_module
from gotunnel_server.cluster.proofs import ALL, KINDS, SharedProofs
from gotunnel_server.cluster.sealed import Sealer

HOST, OTHER, TOKEN = "app.example.com", "other.example.com", "t" * 43
DIGEST = hashlib.sha256(b"key authorization").digest()
KEY = b"k" * 32


class Members:
    """Members of a cluster, whose messages arrive at once; those of ``deaf`` members never do."""

    def __init__(self):
        self.parts, self.challenges, self.deaf, self.sent = {}, {}, set(), []
        self.away = False

    def join(self, name, key=KEY, wait=TIMEOUT):
        members = self

        class Mail:
            def publish(self, to, message):
                if not members.away:
                    members.deliver(to, {"from": name, **json.loads(json.dumps(message))})

        self.challenges[name] = Challenges(("http-01", "tls-alpn-01"))
        self.parts[name] = SharedProofs(
            self.challenges[name], Mail(), Sealer([key]),
            lambda: [other for other in self.parts if other != name], wait)  # fmt: skip
        return self.parts[name]

    def deliver(self, to, message):
        self.sent.append(message)
        assert message["do"] in KINDS
        for name, part in list(self.parts.items()):
            if name != message["from"] and to in (ALL, name) and name not in self.deaf:
                part.hear(message)

    def showing(self, hostname):
        """The members that would answer a CA."""
        return [
            name for name, challenges in self.challenges.items()
            if challenges.body(hostname, PATH + TOKEN) or challenges.context(hostname)
        ]  # fmt: skip


@pytest.fixture
def members():
    return Members()


def http(part, hostname=HOST):
    return part.http(hostname, TOKEN, b"proof")


def alpn(part, hostname=HOST):
    return part.alpn(hostname, DIGEST)


@pytest.mark.parametrize("publish", [http, alpn])
def test_every_member_answers_as_long_as_the_order_runs(members, publish):
    one, _, _ = (members.join(name) for name in "abc")
    assert one.types == ("http-01", "tls-alpn-01")
    with publish(one):
        assert members.showing(HOST) == ["a", "b", "c"]
        assert members.showing(OTHER) == []
    assert members.showing(HOST) == []


def test_orders_of_several_members_do_not_disturb_each_other(members):
    one, two = members.join("a"), members.join("b")
    with alpn(one), http(two, OTHER):
        with alpn(two, OTHER):
            assert members.showing(HOST) == members.showing(OTHER) == ["a", "b"]
        assert members.showing(OTHER) == ["a", "b"]  # its file is still there
    assert members.showing(HOST) == members.showing(OTHER) == []


def test_the_ca_is_told_only_when_each_member_has_the_proof(members):
    one, two = members.join("a"), members.join("b")
    told, over = threading.Event(), threading.Event()
    members.deaf.add("b")

    def order():
        with http(one):
            told.set()
            over.wait(TIMEOUT)

    thread = threading.Thread(target=order)
    thread.start()
    sent = wait_until(lambda: members.sent)
    assert not told.is_set()
    members.deaf.clear()
    two.hear(sent[0])
    assert told.wait(TIMEOUT)
    over.set()
    thread.join(TIMEOUT)


def test_a_member_that_does_not_answer_delays_an_order_only_so_long(members, caplog):
    one = members.join("a", wait=0.0)
    members.join("b"), members.join("c")
    members.deaf.add("c")
    with http(one):
        assert members.showing(HOST) == ["a", "b"]
    assert "has not reached 1 other gateways (c) in 0 s" in caplog.text


def test_a_member_that_leaves_meanwhile_is_not_waited_for(members, caplog):
    one = members.join("a")
    members.join("b")
    members.deaf.add("b")

    def leave():
        wait_until(lambda: members.sent)
        del members.parts["b"]
        one.changed([])

    thread = threading.Thread(target=leave)
    thread.start()
    with http(one):
        thread.join(TIMEOUT)
    assert not caplog.records


def test_a_member_that_joins_meanwhile_answers_too(members):
    one = members.join("a")
    with http(one), alpn(one, OTHER):
        one.joined("b")  # nobody listens yet
        members.join("b").ask()
        assert members.showing(HOST) == members.showing(OTHER) == ["a", "b"]
        members.join("c")
        one.joined("c")
        assert members.showing(HOST) == ["a", "b", "c"]
    assert members.showing(HOST) == members.showing(OTHER) == []


def test_without_the_board_the_member_itself_still_answers(members):
    one = members.join("a", wait=0.0)
    members.away = True
    with http(one):
        assert members.showing(HOST) == ["a"]
    assert members.showing(HOST) == []


def test_a_proof_that_is_not_sealed_with_the_clusters_key_is_none(members, caplog):
    one = members.join("a")
    stranger = SharedProofs(Challenges(()), None, Sealer([b"x" * 32]), list)
    sealed = stranger._sealer.seal("proof", json.dumps([HOST, TOKEN, "proof"]).encode())
    for content in (sealed.decode(), json.dumps([HOST, TOKEN, "proof"]), None, 7, "x" * 10_000):
        one.hear({"from": "b", "do": "proof", "number": 1, "sealed": content})
    assert members.showing(HOST) == [] and members.sent == []
    assert len(caplog.records) == 5


@pytest.mark.parametrize(
    "content", [[HOST, TOKEN], [HOST, TOKEN, 7], [HOST, "", "no digits"], {}, None, [[]] * 3]
)
def test_a_malformed_proof_is_passed_over(members, content):
    one = members.join("a")
    sealed = one._sealer.seal("proof", json.dumps(content).encode()).decode()
    one.hear({"from": "b", "do": "proof", "number": 1, "sealed": sealed})
    for message in ({"do": "proof"}, {"do": "proof-gone", "number": []}, {"do": ""}):
        one.hear({"from": "b", **message})
    assert members.showing(HOST) == [] and members.sent == []


def test_others_proofs_have_bounds_and_the_oldest_goes_first(members, monkeypatch):
    monkeypatch.setattr(proofs_module, "MOST_OF_ONE", 2)
    monkeypatch.setattr(proofs_module, "MOST_OF_ALL", 3)
    one, two, three = (members.join(name) for name in "abc")
    names = [f"{number}.example.com" for number in range(5)]
    with contextlib.ExitStack() as orders:
        for name in names[:3]:
            orders.enter_context(http(two, name))
        for name in names[3:]:
            orders.enter_context(http(three, name))
        shown = [name for name in names if "a" in members.showing(name)]
    assert shown == names[2:]
    assert not any(map(members.showing, names))


def test_the_proof_of_an_orderer_that_died_is_dropped_after_a_while(members, monkeypatch):
    one, two = members.join("a"), members.join("b")
    with http(two):
        one.sweep()
        assert members.showing(HOST) == ["a", "b"]
        members.deaf.add("a")  # it does not hear that the proof is to be removed
    assert members.showing(HOST) == ["a"]
    monkeypatch.setattr(proofs_module, "monotonic", lambda: float("inf"))
    one.sweep()
    assert members.showing(HOST) == []
