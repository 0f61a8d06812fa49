"""A child: its end of the channel, what it asks its siblings, and its part in what all show."""

import json
import logging
import queue
import socket
import threading

import pytest
from support import TIMEOUT, wait_until

from gotunnel_agent.common.exposition import Sample, gauge
from gotunnel_agent.common.json_lines import JsonLines
from gotunnel_agent.common.process import FORMATTER
from gotunnel_server.dashboard.sessions import Sessions
from gotunnel_server.handover import Failed
from gotunnel_server.processes import child as child_module
from gotunnel_server.processes.channel import PROTOCOL, SupervisorEnd, encoded
from gotunnel_server.processes.child import Child, Gone, Numbered, choose_cpu, connect
from gotunnel_server.processes.shared_state import SharedState


class Supervisor:
    """Passes messages on among children in this process, as the real one does."""

    def __init__(self, count):
        self.shared = SharedState(lambda: 0.0)
        self.ends, self.children, self.orders = {}, {}, {}
        self._over = False
        self._told = queue.SimpleQueue()  # for the thread, which alone uses the ends
        self.deaf = set()  # numbers of those whose messages are not read
        pairs = {number: socket.socketpair() for number in range(1, count + 1)}
        for number, (ours, theirs) in pairs.items():
            self.ends[number] = SupervisorEnd(ours)
            self.ends[number].send({"hello": {
                "protocol": PROTOCOL,
                "number": number, "count": count, "supervisor": 1, "tells_facts": True,
                "began": 0.0,
                "secret": "00" * 32, "sockets": [], "others": {}, "status": None,
            }})  # fmt: skip
            self.children[number] = Child(theirs.detach())
            self.orders[number] = queue.SimpleQueue()
            self.children[number].start(self.orders[number].put)
        self._thread = threading.Thread(target=self._run)
        self._thread.start()
        self.tell({"processes": [
            {"process": number, "pid": number, "state": "serving", "restarts": 0}
            for number in pairs
        ], "ready": True})  # fmt: skip
        for child in self.children.values():
            wait_until(lambda child=child: child.all_ready)

    def tell(self, message):
        self._told.put(message)

    def _run(self):
        while not self._over:
            for message in [self._told.get() for _ in range(self._told.qsize())]:
                for end in self.ends.values():
                    end.send(message)
            for number, end in list(self.ends.items()):
                for message in [] if number in self.deaf else end.receive() or []:
                    self._on_message(number, message)
            threading.Event().wait(0.001)

    def _on_message(self, number, message):
        if "to" in message:
            for to, end in self.ends.items():
                if to == message["to"] or message["to"] == 0 and to != number:
                    end.send({"from": number, "body": message["body"]})
        elif "call" in message:
            reply = self.shared.call(number, message["name"], message["with"])
            self.ends[number].send({"reply": message["call"], **reply})

    def end(self):
        self._over = True
        self._thread.join(TIMEOUT)
        for end in self.ends.values():
            end.close()
        for child in self.children.values():
            child.stop()


@pytest.fixture
def supervisor(monkeypatch):
    monkeypatch.setattr(child_module, "ASK_TIMEOUT", 60)  # nothing here is late by itself
    monkeypatch.setattr(child_module, "CALL_TIMEOUT", 60)
    supervisor = Supervisor(3)
    yield supervisor
    supervisor.end()


@pytest.fixture
def children(supervisor):
    return supervisor.children


def test_a_question_is_answered_by_all_siblings(children):
    for number, child in children.items():
        child.answer("double", lambda question, number=number: [number, 2 * question])
    assert children[2].ask("double", 21) == {1: [1, 42], 3: [3, 42]}


def test_a_sibling_that_cannot_answer_is_missing(children, caplog):
    def fail(question):
        raise ZeroDivisionError

    children[1].answer("topic", fail)
    children[3].answer("topic", lambda question: "here")
    assert children[2].ask("topic") == {3: "here"}  # at once, not after ASK_TIMEOUT
    assert children[1].ask("nonsense") == {}
    assert "ZeroDivisionError" in caplog.text


def test_a_sibling_that_is_silent_is_waited_for_and_missing(supervisor, children, monkeypatch):
    class Passes:
        """A Deadline that is over when one answer has come."""

        def __init__(self, timeout):
            self._left = iter([timeout, 0])

        def left(self):
            return next(self._left)

    monkeypatch.setattr(child_module, "Deadline", Passes)
    children[3].answer("topic", lambda question: "here")
    supervisor.deaf.add(1)
    assert children[2].ask("topic") == {3: "here"}


def test_calls_are_answered_and_refused(children):
    assert children[1].call("take port", 2200, "a.test") == ""
    assert children[2].call("take port", 2200, "b.test") == "a.test has it at another process"
    with pytest.raises(ValueError, match="there is no 'nonsense' here"):
        children[1].call("nonsense")


def test_the_end_of_the_supervisor_ends_calls_and_is_an_order(supervisor, children, monkeypatch):
    supervisor.deaf.add(1)
    failed = []

    def call():
        try:
            children[1].call("take port", 1, "a.test")
        except Gone as error:
            failed.append(str(error))

    caller = threading.Thread(target=call)
    caller.start()
    wait_until(lambda: children[1]._waiting)
    supervisor.ends[1].close()
    caller.join(TIMEOUT)
    assert failed == ["the supervisor has ended"]
    assert supervisor.orders[1].get(timeout=TIMEOUT) == {"order": "orphaned"}
    with pytest.raises(Gone):
        children[1].call("take port", 1, "a.test")
    assert children[1].ask("topic") == {}


def test_what_is_said_to_a_supervisor_that_has_ended_raises_nothing(supervisor, children):
    supervisor.ends[1].close()
    assert supervisor.orders[1].get(timeout=TIMEOUT) == {"order": "orphaned"}
    children[1].say(said="serving")
    with pytest.raises(OSError, match="."):
        children[1].tell(said="serving")


@pytest.mark.parametrize("value", ["x", "99999", "2"])
def test_a_variable_without_a_supervisor_is_ignored(value, caplog):
    assert connect(value) is None
    assert "no channel to a supervisor: it is ignored" in caplog.text


def test_a_supervisor_of_another_version_is_one_line():
    ours, theirs = socket.socketpair()
    with ours:
        ours.sendall(encoded({"hello": {"protocol": PROTOCOL + 1, "number": 1}}))
        with pytest.raises(Failed, match="speaks version 2 of its messages, and this process 1"):
            connect(str(theirs.detach()))


# The log -----------------------------------------------------------------------------------------


def test_lines_of_the_log_carry_the_number():
    record = logging.LogRecord("x", logging.INFO, __file__, 1, "port %d: %s", (443, "50 %"), None)
    assert Numbered(FORMATTER, 2).format(record).endswith("INFO    [2] port 443: 50 %")
    entry = json.loads(Numbered(JsonLines(), 2).format(record))
    assert entry["process"] == 2 and entry["message"] == "port 443: 50 %"


def test_children_take_the_cpus_in_turn():
    assert [choose_cpu(number)({7, 3}) for number in (1, 2, 3)] == [3, 7, 3]


# Together ----------------------------------------------------------------------------------------


def test_metrics_are_those_of_all_and_health_is_that_of_all(supervisor, children):
    problems = {1: None, 2: None, 3: None}
    for number, child in children.items():
        child.together.share_metrics(
            lambda number=number: [gauge("number", "N.", Sample(number))],
            lambda number=number: problems[number],
        )
    metric, restarts = children[1].together.metrics([gauge("number", "N.", Sample(1))])
    assert [sample.value for sample in metric.samples] == [1, 2, 3]
    assert [sample.labels for sample in restarts.samples] == [
        (("process", str(number)),) for number in (1, 2, 3)
    ]
    assert children[1].together.unhealthy(None) is None
    problems[3] = "the listener of port 443 is stuck"
    assert children[1].together.unhealthy(None) == f"process 3: {problems[3]}"
    supervisor.tell({"processes": [], "ready": False})
    wait_until(lambda: not children[1].together.is_ready())


def test_a_sibling_that_does_not_answer_is_unhealthy(children):
    """It has no answer yet, and says so; one that hangs is missing in the same way."""
    assert children[1].together.unhealthy(None) == (
        "process 2: does not answer; process 3: does not answer"
    )


def test_a_login_at_one_process_counts_at_all_and_so_does_a_logout(children):
    found = {number: Sessions(lambda: 1000.0) for number in children}
    for number, child in children.items():
        child.together.share_logins(found[number])
    name, session = found[1].begin()
    there = found[2].find([name], "192.0.2.1")
    assert there is not None and there.csrf == session.csrf and there.until == session.until
    assert found[3].find(["bogus"], "192.0.2.1") is None
    found[3].end([name])
    wait_until(lambda: there.has_ended and session.has_ended)
    assert [each.find([name], "192.0.2.1") for each in found.values()] == [None] * 3


def test_a_login_that_is_bound_to_an_address_is_so_at_all(children):
    found = {number: Sessions(lambda: 1000.0) for number in children}
    for number, child in children.items():
        child.together.share_logins(found[number])
    name, _ = found[1].begin(only_from=b"address")
    assert found[2].find([name], b"another") is None
    assert found[2].find([name], b"address") is not None


def test_cookies_that_are_no_login_are_asked_for_once(children):
    asked = []
    found = Sessions(lambda: 1000.0)
    children[1].together.share_logins(found)
    for number in (2, 3):
        children[number].answer("login", lambda question: asked.append(question))
    assert [found.find(["bogus"], "192.0.2.1") for _ in range(3)] == [None] * 3
    assert len(asked) == 2 and len(set(asked)) == 1


class Tunnel:
    def __init__(self, name):
        self.agent = type("Agent", (), {"host": "192.0.2.7", "identity": type(
            "Identity", (), {"name": name, "entry": None})})  # fmt: skip
        self.ended = []

    def end_by_operator(self, reason):
        self.ended.append(reason)


def test_an_act_at_one_process_reaches_the_session_and_the_certificate_of_another(children):
    tunnel = Tunnel("office")
    for number, child in children.items():
        child.together.share_acts(
            lambda id, number=number: tunnel if (id, number) == ("s3", 3) else None,
            lambda hostname, number=number: None if number == 2 else "no agent here",
        )
    assert children[1].together.session("s9") is None
    there = children[1].together.session("s3")
    assert (there.agent.host, there.agent.identity.name) == ("192.0.2.7", "office")
    assert there.agent.identity.entry is None
    there.end_by_operator("updates")
    assert tunnel.ended == ["updates"]
    assert children[1].together.renew("a.test")


class Visit:
    is_local = False
    route = None
    hostname, method, status, error = "a.test", "GET", 200, ""
    duration = received = sent = 0
    visitor, agent, protocol, request_id = "192.0.2.1", "", "http", ""

    def __init__(self, at, path):
        self.at, self.path = at, path


def test_the_visits_of_all_are_shown_once_each_in_their_order(children):
    lives = {number: child.together.live() for number, child in children.items()}
    for live in lives.values():
        live._now = lambda: next(clock)
    clock = iter(range(10, 10_000))
    lives[1]([Visit(2.0, "/b")])
    lives[2]([Visit(1.0, "/a"), Visit(3.0, "/c")])
    number, found = lives[1].since(0)
    assert number == 3 and [visit.path for visit in found] == ["/a", "/b", "/c"]
    lives[3]([Visit(4.0, "/d")])
    assert [visit.path for visit in lives[1].since(number)[1]] == ["/d"]
    assert lives[1].since(4) == (4, [])
    assert [visit["path"] for visit in lives[2].last(2)] == ["/c", "/d"]
