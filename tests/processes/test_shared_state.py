"""What the supervisor keeps for its children: public ports of agents, and claims of hostnames."""

import json

import pytest

from gotunnel_server.cluster.board import FREE, GRANTED, TAKEN, Ask, Away, Card, Renewal
from gotunnel_server.net.listener import PortError
from gotunnel_server.processes.board import ChildBoard
from gotunnel_server.processes.channel import encoded
from gotunnel_server.processes.shared_ports import opener
from gotunnel_server.processes.shared_state import GIVE_PORT, TAKE_PORT, SharedState
from gotunnel_server.routes import Route

A, B = "a.test", "b.test"


class Clock:
    now = 1000.0

    def __call__(self):
        return self.now


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def shared(clock):
    return SharedState(clock)


def take(shared, id, port, hostname):
    return shared.call(id, TAKE_PORT, [port, hostname])["result"]


# Ports -------------------------------------------------------------------------------------------


def test_processes_open_a_port_for_one_hostname_and_a_hostname_has_one_port(shared):
    assert take(shared, 1, 2200, A) == ""
    assert take(shared, 2, 2200, A) == ""
    assert take(shared, 2, 2200, B) == "a.test has it at another process"
    assert take(shared, 2, 2201, A) == "a.test has port 2200 at another process"
    assert take(shared, 2, 2201, B) == ""


def test_a_port_is_free_when_all_processes_have_given_it_back(shared):
    take(shared, 1, 2200, A)
    take(shared, 2, 2200, A)
    shared.call(1, GIVE_PORT, [2200])
    assert take(shared, 1, 2200, B) != ""
    shared.gone(2)
    assert take(shared, 1, 2200, B) == ""


def test_an_agent_moves_to_another_port_when_the_others_have_given_the_first_one_back(shared):
    take(shared, 1, 2200, A)
    assert take(shared, 1, 2201, A) == ""  # its own process: Ports closes the old one
    shared.call(1, GIVE_PORT, [2200])
    assert take(shared, 2, 2200, A) != "" and take(shared, 2, 2201, A) == ""


@pytest.mark.parametrize(
    "call", [("nonsense", []), (TAKE_PORT, None), (TAKE_PORT, [1]), (TAKE_PORT, ["x"] * 9)]
)
def test_a_call_that_makes_no_sense_is_an_error_of_its_caller(shared, call):
    assert set(shared.call(1, *call)) == {"error"}


class OpenPort:
    def __init__(self, route):
        self.route, self.stopped = route, False

    def stop(self):
        self.stopped = True


class Caller:
    """A Child that calls a SharedState."""

    def __init__(self, shared, id):
        self.shared, self.id, self.away = shared, id, False

    def call(self, name, *arguments):
        if self.away:
            raise OSError("the supervisor has ended")
        return self.shared.call(self.id, name, list(arguments))["result"]


def test_a_shared_port_is_given_back_when_it_stops_or_cannot_be_opened(shared):
    one, two = Caller(shared, 1), Caller(shared, 2)
    opened = []

    def listen(number, route):
        opened.append(OpenPort(route))
        return opened[-1]

    def refuse(number, route):
        raise PortError("in use")

    first, second = Route(A, "tcp", None), Route(B, "tcp", None)
    port = opener(listen, one)(2200, first)
    port.route = second
    assert opened[0].route is second
    with pytest.raises(PortError, match="a.test has it at another process"):
        opener(listen, two)(2200, second)
    port.stop()
    assert opened[0].stopped
    with pytest.raises(PortError, match="in use"):
        opener(refuse, two)(2200, second)
    opener(listen, one)(2200, first)


def test_without_the_supervisor_no_port_is_opened(shared):
    caller = Caller(shared, 1)
    caller.away = True
    with pytest.raises(PortError, match="the supervisor has ended"):
        opener(lambda number, route: OpenPort(route), caller)(2200, Route(A, "tcp", None))


# Claims ------------------------------------------------------------------------------------------


class Line:
    """The channel between a board and a shared: all goes as JSON."""

    def __init__(self, shared, id):
        self.shared, self.id = shared, id
        self.heard = []

    def call(self, name, *arguments):
        sent = json.loads(encoded({"with": arguments}))["with"]
        reply = json.loads(encoded(self.shared.call(self.id, name, sent)))
        if "error" in reply:
            raise ValueError(reply["error"])
        return reply["result"]

    def on_board(self, hear):
        self.hear = hear


def joined(shared, id, member):
    board = ChildBoard(Line(shared, id))
    card = Card(member, "", "127.0.0.1:1", "host", "1", 1)
    renewed = board.renew(member, Renewal(card))
    return board, renewed.contact


def test_two_children_claim_by_the_table_of_the_supervisor(shared):
    one, contact = joined(shared, 1, "aa")
    two, other = joined(shared, 2, "bb")
    one.renew("aa", Renewal(Card("aa"), contact, 0))
    two.renew("bb", Renewal(Card("bb"), other, 0))
    (granted,) = one.claim("aa", contact, [Ask(A, "owner")], True)
    assert granted.verdict == GRANTED  # at once: there was no supervisor before
    assert two.claim("bb", other, [Ask(A, "thief"), Ask(B, "thief")], True)[0].verdict == TAKEN
    assert two.claim("bb", other, [Ask(A, "thief"), Ask(B, "thief")], True)[1].verdict == FREE
    (also,) = two.claim("bb", other, [Ask(A, "owner")], True)
    assert also.verdict == GRANTED and also.holders == ("aa",)
    assert one.held("aa") == (A,)
    assert one.release("aa", contact, [A]) == ()
    assert two.release("bb", other, [A]) == (A,)
    assert two.leave("bb").freed == ()


def test_the_names_of_a_child_that_has_ended_are_free_at_once(shared):
    one, contact = joined(shared, 1, "aa")
    two, other = joined(shared, 2, "bb")
    one.claim("aa", contact, [Ask(A, "owner")], True)
    shared.gone(1)
    assert two.claim("bb", other, [Ask(A, "another")], True)[0].verdict == GRANTED
    assert [card.id for card in two.renew("bb", Renewal(Card("bb"), other, 0)).members] == ["bb"]


def test_messages_go_to_one_member_or_to_all_others(shared):
    one, _ = joined(shared, 1, "aa")
    joined(shared, 2, "bb")
    joined(shared, 3, "cc")
    one.publish("cc", {"do": "x"})
    assert list(shared.messages()) == [(3, {"do": "x"})]
    one.publish("", {"do": "y"})
    assert list(shared.messages()) == [(2, {"do": "y"}), (3, {"do": "y"})]
    assert list(shared.messages()) == []


def test_a_supervisor_that_has_ended_is_a_board_that_is_away():
    class Ended:
        def call(self, name, *arguments):
            raise OSError("the supervisor has ended")

    with pytest.raises(Away, match="the supervisor has ended"):
        ChildBoard(Ended()).held("aa")
