"""An agent with several gateways that are one: real ones in this process, whose list of members is
the test's, and gateways that the test plays by hand."""

import contextlib
import logging
import threading
from unittest import mock

import pytest
from support import (
    APP,
    TIMEOUT,
    Origin,
    agent_here,
    agent_yaml,
    answer,
    gateway_here,
    routes_of,
    wait_until,
)
from test_agent import HandMadeGateway

from gotunnel import (
    ALREADY,
    MEMBERS,
    MOVE,
    OVERLAP,
    PARTIAL,
    PORTS,
    REPLACED,
    WAITS,
    Ack,
    End,
    Free,
    Members,
    Ping,
    Pong,
    encode_message,
)
from gotunnel_agent import link as link_module
from gotunnel_agent import roster
from gotunnel_agent.config import load
from gotunnel_agent.status import describe
from gotunnel_server.agents import members as members_module
from gotunnel_server.agents.members import Membership
from gotunnel_server.agents.tunnel import Tunnels

OTHER = "other.localhost"
FEATURES = (MEMBERS, OVERLAP, PARTIAL)
A, B, C = "aaaa0000", "bbbb0000", "cccc0000"


@pytest.fixture
def site():
    with Origin() as origin:
        origin.serve(lambda target: (target.read_head(), target.send(answer(b"page"))))
        yield origin


def changed(agent, gateway, folder, http, **keys):
    path = folder / "changed.yaml"
    path.write_text(agent_yaml(gateway, http, {}, keys))
    agent.change(load(path))


def links_of(agent):
    """The ids of the members with which the agent has sessions."""
    with agent.lock:
        return sorted(view.member for view in agent.views() if view.serves)


# Real gateways -----------------------------------------------------------------------------------


class Cluster:
    """Gateways in this process. ``told`` is the list of members that all of them tell."""

    def __init__(self, cache, stack):
        self.told, self.gateways = {}, {}
        self._cache, self._stack = cache, stack

    def start(self, id, **changes):
        """Start a gateway, and tell its agents of all members."""
        make = Tunnels.__init__

        def make_member(tunnels, **parts):
            make(tunnels, **parts)
            tunnels.membership = Membership(id, lambda: dict(self.told))

        life = contextlib.ExitStack()
        with mock.patch.object(Tunnels, "__init__", make_member):
            gateway = life.enter_context(gateway_here(self._cache, **changes))
        self._stack.push(life)
        gateway.stop = life.close
        self.gateways[id] = gateway
        self.told[id] = f"localhost:{gateway.tunnel_port}"
        self.tell()
        return gateway

    def tell(self):
        for gateway in self.gateways.values():
            gateway.inner.tunnels.members_changed()

    def leave(self, id):
        """A member is gone: the others tell so."""
        del self.told[id]
        gateway = self.gateways.pop(id)
        self.tell()
        return gateway

    def serve(self, *ids, hostname=APP):
        return all(hostname in routes_of(self.gateways[id].inner) for id in ids)


@pytest.fixture
def cluster(cache, monkeypatch, quick):
    monkeypatch.setattr(members_module, "DEBOUNCE", 0.01)
    with contextlib.ExitStack() as stack:
        yield Cluster(cache, stack)


def test_an_agent_has_a_session_with_each_member_and_says_so_once(cluster, tmp_path, site, caplog):
    caplog.set_level(logging.INFO)
    first = cluster.start(A)
    cluster.start(B)
    cluster.start(C)
    with agent_here(first, tmp_path, {APP: site.port}) as agent:
        wait_until(lambda: links_of(agent) == [A, B, C])
        for gateway in cluster.gateways.values():
            assert gateway.get(APP) == (200, b"page")
        wait_until(lambda: f"serving {APP} at 3 gateways" in caplog.text)
        said = [text for text in caplog.messages if "serving" in text and "agent" not in text]
        assert said == [f"localhost:{first.tunnel_port}: serving {APP}",
                        f"serving {APP} at 3 gateways"]  # fmt: skip
        assert sum("->" in text for text in caplog.messages) == 1
        told = agent.snapshot()
        assert {each.member for each in told.gateways} == {A, B, C} and told.old_sessions == 0
        rows = describe(told, "agent.yaml")["gateways"]
        assert [row["state"] for row in rows] == ["serving"] * 3
        assert rows[0]["gateway"] == f"localhost:{first.tunnel_port}"
    assert not any(threads_of_links())


def threads_of_links():
    return [each.name for each in threading.enumerate() if each.name.startswith("link ")]


def test_a_gateway_alone_has_one_link(cluster, tmp_path, site):
    first = cluster.start(A)
    with agent_here(first, tmp_path, {APP: site.port}) as agent:
        wait_until(lambda: links_of(agent) == [A])
        assert len(agent.links) == 1 and not threads_of_links()


def test_a_member_that_comes_later_gets_a_session(cluster, tmp_path, site):
    first = cluster.start(A)
    with agent_here(first, tmp_path, {APP: site.port}) as agent:
        wait_until(lambda: links_of(agent) == [A])
        cluster.start(B)
        wait_until(lambda: cluster.serve(B))
        assert cluster.gateways[B].get(APP) == (200, b"page")


def test_the_others_serve_on_when_the_first_gateway_dies_and_their_list_counts(
    cluster, tmp_path, site, caplog
):
    caplog.set_level(logging.INFO)
    first = cluster.start(A)
    cluster.start(B)
    with agent_here(first, tmp_path, {APP: site.port}) as agent:
        wait_until(lambda: links_of(agent) == [A, B])
        (kept,) = cluster.gateways[B].inner.tunnels.registered()
        cluster.leave(A).stop()
        wait_until(lambda: links_of(agent) == [B])
        assert agent.snapshot().since is not None and agent.snapshot().problem == ""
        assert cluster.gateways[B].get(APP) == (200, b"page")
        cluster.start(C)
        wait_until(lambda: links_of(agent) == [B, C])
        assert cluster.gateways[C].get(APP) == (200, b"page")
        assert cluster.gateways[B].inner.tunnels.registered() == [kept]


def test_a_member_that_comes_back_at_its_address_is_reached(cluster, tmp_path, site):
    first = cluster.start(A)
    port = str(cluster.start(B).tunnel_port)
    with agent_here(first, tmp_path, {APP: site.port}) as agent:
        wait_until(lambda: links_of(agent) == [A, B])
        cluster.leave(B).stop()
        wait_until(lambda: links_of(agent) == [A])
        cluster.start(C, TUNNEL_PORT=port)
        wait_until(lambda: links_of(agent) == [A, C])
        wait_until(lambda: len(agent.links) == 2)


def test_the_first_gateway_that_comes_back_at_its_address_is_reached(cluster, tmp_path, site):
    first = cluster.start(A)
    port = str(first.tunnel_port)
    cluster.start(B)
    with agent_here(first, tmp_path, {APP: site.port}) as agent:
        wait_until(lambda: links_of(agent) == [A, B])
        cluster.leave(A).stop()
        wait_until(lambda: links_of(agent) == [B])
        cluster.start(C, TUNNEL_PORT=port)
        wait_until(lambda: links_of(agent) == [B, C])


def test_when_all_are_gone_the_agent_waits_for_its_own_gateway(cluster, tmp_path, site):
    first = cluster.start(A)
    port = str(first.tunnel_port)
    cluster.start(B)
    with agent_here(first, tmp_path, {APP: site.port}) as agent:
        wait_until(lambda: links_of(agent) == [A, B])
        gone = [cluster.leave(A), cluster.leave(B)]
        for gateway in gone:
            gateway.stop()
        wait_until(lambda: agent.snapshot().since is None and agent.snapshot().problem)
        cluster.start(C, TUNNEL_PORT=port)
        wait_until(lambda: links_of(agent) == [C])
        assert cluster.gateways[C].get(APP) == (200, b"page")


def test_a_change_acts_on_all_links_and_visits_go_on(cluster, tmp_path, site):
    first = cluster.start(A)
    cluster.start(B)
    over, failed, served = threading.Event(), [], []

    def visit(gateway):
        while not over.is_set():
            got = gateway.get(APP)
            (served if got == (200, b"page") else failed).append(got)

    with agent_here(first, tmp_path, {APP: site.port}) as agent:
        wait_until(lambda: links_of(agent) == [A, B])
        visitors = [
            threading.Thread(target=visit, args=(gateway,)) for gateway in cluster.gateways.values()
        ]
        for visitor in visitors:
            visitor.start()
        try:
            for _ in range(3):
                changed(agent, first, tmp_path, {APP: site.port, OTHER: site.port})
                wait_until(lambda: cluster.serve(A, B, hostname=OTHER))
                changed(agent, first, tmp_path, {APP: site.port})
                wait_until(lambda: not cluster.serve(A, hostname=OTHER))
                wait_until(lambda: not cluster.serve(B, hostname=OTHER))
        finally:
            over.set()
            for visitor in visitors:
                visitor.join()
        assert served and failed == []
        wait_until(lambda: links_of(agent) == [A, B])
        wait_until(lambda: not any(link.old for link in agent.links))


def test_another_gateway_in_the_configuration_ends_all_sessions_with_the_members(
    cluster, cache, tmp_path, site
):
    first = cluster.start(A)
    cluster.start(B)
    with gateway_here(cache) as elsewhere:
        with agent_here(first, tmp_path, {APP: site.port}) as agent:
            wait_until(lambda: links_of(agent) == [A, B])
            changed(agent, elsewhere, tmp_path, {APP: site.port})
            elsewhere.wait_for_routes(APP)
            wait_until(lambda: not cluster.serve(A) and not cluster.serve(B))
            wait_until(lambda: len(agent.links) == 1)


def test_a_member_that_does_not_answer_disturbs_no_other(cluster, tmp_path, site, caplog):
    first = cluster.start(A)
    cluster.start(B)
    cluster.told[C] = "localhost:9"
    with agent_here(first, tmp_path, {APP: site.port}) as agent:
        wait_until(lambda: links_of(agent) == [A, B])
        wait_until(lambda: agent.totals().failures > 3)
        said = [
            record.getMessage()
            for record in caplog.records
            if record.levelno >= logging.WARNING and record.name == "gotunnel.link"
        ]
        assert len(said) == 1 and said[0].startswith("localhost:9: connection refused"), said
        assert said[0].endswith("other gateways serve") or said[0].endswith("gateway serves")
        problems = {each.gateway: each.problem for each in agent.snapshot().gateways}
        assert problems["localhost:9"] == "connection refused: no program listens there"
        assert agent.snapshot().problem == ""
        del cluster.told[C]
        cluster.tell()
        wait_until(lambda: len(agent.links) == 2)


def test_members_behind_several_addresses_of_one_name_are_reached(
    cluster, tmp_path, site, monkeypatch
):
    """Of which a resolver may give the same one first, always."""
    gateways = [cluster.start(id) for id in (A, B, C)]
    cluster.told = dict.fromkeys(cluster.told, "")
    resolve = link_module.addresses_of

    def addresses(host, port):
        return [each for gateway in gateways for each in resolve("127.0.0.1", gateway.tunnel_port)]

    monkeypatch.setattr(link_module, "addresses_of", addresses)
    with agent_here(gateways[0], tmp_path, {APP: site.port}) as agent:
        wait_until(lambda: links_of(agent) == [A, B, C])
        assert [gateway.get(APP)[0] for gateway in gateways] == [200] * 3


def test_a_gateway_of_another_ca_among_the_members_gets_no_token(
    cluster, tmp_path_factory, tmp_path, site, caplog
):
    first = cluster.start(A)
    with gateway_here(tmp_path_factory.mktemp("other CA")) as stranger:
        cluster.told[B] = f"localhost:{stranger.tunnel_port}"
        with agent_here(first, tmp_path, {APP: site.port}) as agent:
            wait_until(lambda: "its certificate is not to be trusted" in caplog.text)
            assert not routes_of(stranger.inner) and links_of(agent) == [A]


# Several addresses in the configuration ----------------------------------------------------------


def test_the_next_address_is_dialled_at_once_when_one_fails(
    cache, tmp_path, site, caplog, monkeypatch
):
    monkeypatch.setattr(link_module, "retry_delay", lambda *arguments: 10 * TIMEOUT)
    caplog.set_level(logging.INFO)
    with gateway_here(cache) as gateway:
        address = f"localhost:{gateway.tunnel_port}"
        keys = {"tunnel_addr": ["localhost:9", "127.0.0.1:9", address]}
        with agent_here(gateway, tmp_path, {APP: site.port}, **keys) as agent:
            assert gateway.get(APP) == (200, b"page")
            assert agent.snapshot().gateway == address
            said = [text for text in caplog.messages if "trying the next address" in text]
            assert [text.partition(": ")[0] for text in said] == ["localhost:9", "127.0.0.1:9"]


def test_each_address_is_verified_by_its_own_name(cache, tmp_path, site, caplog, quick):
    with gateway_here(cache) as gateway:
        port = gateway.tunnel_port  # its certificate is for localhost
        keys = {"tunnel_addr": [f"127.0.0.1:{port}", f"localhost:{port}"]}
        with agent_here(gateway, tmp_path, {APP: site.port}, **keys):
            wait_until(lambda: f"127.0.0.1:{port}: its certificate is not to be" in caplog.text)


def test_when_all_addresses_have_failed_the_agent_waits(tmp_path, many, monkeypatch, caplog):
    waits = []
    monkeypatch.setattr(link_module, "retry_delay", lambda failures, *_: waits.append(1) or 0.05)
    keys = {"tunnel_addr": ["localhost:9", f"localhost:{many.place.tunnel_port}"]}
    with agent_here(many.place, tmp_path, {APP: 1}, **keys) as agent:
        many.meet(Ack(False, "not today"))
        many.hang_up()
        wait_until(lambda: "next try in" in caplog.text)
        many.meet()
        wait_until(lambda: agent.snapshot().since is not None)
        caplog.clear()
        many.hang_up()
        many.meet()  # the address that has answered is the first one now
        assert "localhost:9: " not in caplog.text
        many.hang_up()


# Gateways made by hand, all at one address -------------------------------------------------------


class Many(HandMadeGateway):
    """Members that share an address; the test plays each."""

    def be(self, id, *members):
        """Accept an agent as member ``id``, and tell it all members."""
        registered = self.meet(Ack(True, features=FEATURES, member=id))
        self.say(Members(dict.fromkeys(members, "")))
        return registered, self.session, self.control

    def say(self, message):
        self.control.write(encode_message(message))

    def refuse(self):
        registered = self.meet(Ack(False, ALREADY))
        self.hang_up()
        return registered


@pytest.fixture
def many(cache, monkeypatch):
    monkeypatch.setattr(roster, "SEEK_DELAY", 0.001)
    with Many(cache) as gateway:
        yield gateway


def over(*sessions):
    for session in sessions:
        session.close()
        session.join()


def test_members_are_looked_for_at_the_address_that_has_accepted(many, tmp_path, quick, caplog):
    keys = {"tunnel_addr": ["localhost:9", f"localhost:{many.place.tunnel_port}"]}
    with agent_here(many.place, tmp_path, {APP: 1}, **keys) as agent:
        _, *first = many.be(A, A, B)
        _, *second = many.be(B, A, B)
        wait_until(lambda: links_of(agent) == [A, B])
        assert caplog.text.count("localhost:9: ") == 1
        over(first[0], second[0])


def test_members_without_an_address_are_looked_for_one_after_the_other(
    many, tmp_path, quick, caplog
):
    with agent_here(many.place, tmp_path, {APP: 1}) as agent:
        registered, *first = many.be(A, A, B, C)
        assert MEMBERS in registered.features and registered.besides == ()
        for _ in range(3):
            assert many.refuse().besides == (A,)
        registered, *second = many.be(C, A, B, C)
        assert registered.besides == (A,)
        assert many.refuse().besides == (A, C)
        registered, *third = many.be(B, A, B, C)
        assert registered.besides == (A, C)
        wait_until(lambda: links_of(agent) == [A, B, C])
        assert len({each.session.name for each in agent.links[0].services()}) == 1
        assert not [record for record in caplog.records if record.levelno >= logging.WARNING]
        assert agent.totals().failures == 0

        # one of them dies, and another one takes its place
        over(second[0])
        assert many.refuse().besides == (A, B)
        registered, *fourth = many.be("new", A, B, "new")
        assert registered.besides == (A, B)
        wait_until(lambda: links_of(agent) == [A, B, "new"])
        over(first[0], third[0], fourth[0])


def test_a_member_that_asks_for_another_session_gets_it(many, tmp_path, quick, monkeypatch):
    monkeypatch.setattr(link_module, "MOVED", 0)
    with agent_here(many.place, tmp_path, {APP: 1}) as agent:
        _, first, control = many.be(A, A, B)
        _, second, _ = many.be(B, A, B)
        wait_until(lambda: links_of(agent) == [A, B])
        control.write(encode_message(End(MOVE, "a restart")))
        assert many.refuse().besides == (B,)
        registered, third, _ = many.be(A, A, B)
        assert registered.overlap and registered.besides == (B,)
        wait_until(lambda: first.ended)
        over(second, third)


def test_a_change_reaches_each_member_at_the_address_of_all(many, tmp_path, quick):
    with agent_here(many.place, tmp_path, {APP: 1}) as agent:
        _, first, _ = many.be(A, A, B)
        _, second, _ = many.be(B, A, B)
        wait_until(lambda: links_of(agent) == [A, B])
        changed(agent, many.place, tmp_path, {OTHER: 1})
        registered, third, _ = many.be(B, A, B)  # the link that had A
        assert registered.besides == () and registered.overlap and set(registered.routes) == {OTHER}
        wait_until(lambda: second.ended)
        assert not first.ended
        registered, fourth, _ = many.be(A, A, B)
        assert registered.besides == (B,) and set(registered.routes) == {OTHER}
        wait_until(lambda: first.ended)
        wait_until(lambda: links_of(agent) == [A, B])
        over(third, fourth)


def test_two_links_that_reach_a_member_at_the_same_time_replace_no_instance(many, tmp_path, quick):
    with agent_here(many.place, tmp_path, {APP: 1}) as agent:
        registered, first, control = many.be(A, A, B)
        _, second, _ = many.be(A, A, B)  # as if it had not read besides
        control.write(encode_message(End(REPLACED, "another session takes over")))
        over(first)
        again, third, _ = many.be(B, A, B)
        assert again.instance == registered.instance
        wait_until(lambda: links_of(agent) == [A, B])
        over(second, third)


def test_another_process_with_the_same_id_makes_all_sessions_take_another(
    many, tmp_path, monkeypatch
):
    monkeypatch.setattr(link_module, "REFUSED_DELAY", 0.01)
    with agent_here(many.place, tmp_path, {APP: 1}) as agent:
        registered, first, control = many.be(A, A, B)
        _, second, _ = many.be(B, A, B)
        wait_until(lambda: links_of(agent) == [A, B])
        control.write(encode_message(End(REPLACED, "another agent takes over")))
        wait_until(lambda: first.ended and second.ended)
        again, third, _ = many.be(A, A)
        assert again.instance != registered.instance
        over(third)


def test_already_without_another_session_is_a_refusal(many, tmp_path, quick, caplog):
    with agent_here(many.place, tmp_path, {APP: 1}):
        many.refuse()
        wait_until(lambda: f"the gateway refused: {ALREADY}; next try in" in caplog.text)
        many.refuse()


@pytest.mark.parametrize(
    "told",
    [
        {B: "no address"},
        {B: "localhost:0"},
        {"\x1b[31m": ""},
        {"x" * 65: ""},
        {B: "a" * 300 + ":1"},
        {},
    ],
)
def test_members_that_make_no_sense_are_passed_over(many, tmp_path, told):
    with agent_here(many.place, tmp_path, {APP: 1}) as agent:
        many.meet(Ack(True, features=FEATURES, member=A))
        many.say(Members({A: "", **told}))
        many.say(Ping(1))
        assert isinstance(many.hear(), Pong)
        assert len(agent.links) == 1 and list(agent.members) == [A]
        many.hang_up()


def test_members_of_a_gateway_that_did_not_say_that_it_is_one_are_passed_over(many, tmp_path):
    for reply in (Ack(True, features=FEATURES), Ack(True, member=A), Ack(True, (), member="a b")):
        with agent_here(many.place, tmp_path, {APP: 1}) as agent:
            many.meet(reply)
            many.say(Members({A: "", B: "localhost:9"}))
            many.say(Ping(1))
            assert isinstance(many.hear(), Pong)
            assert len(agent.links) == 1 and not agent.members
            many.hang_up()


def test_a_gateway_that_tells_ever_other_members_keeps_no_army_of_links_busy(
    many, tmp_path, monkeypatch
):
    """Their names take long to resolve."""
    may_end = threading.Event()
    resolve = link_module.addresses_of

    def slow(host, port):
        if host.endswith(".slow"):
            may_end.wait(TIMEOUT)
        return resolve("localhost", port)

    monkeypatch.setattr(link_module, "addresses_of", slow)
    monkeypatch.setattr("gotunnel_agent.agent.MOST_LINKS", 5)
    with agent_here(many.place, tmp_path, {APP: 1}) as agent:
        many.meet(Ack(True, features=FEATURES, member=A))
        for number in range(10):
            told = {f"{number}-{each}": f"{number}-{each}.slow:9" for each in range(3)}
            many.say(Members({A: "", **told}))
        many.say(Ping(1))
        assert isinstance(many.hear(), Pong)
        assert len(agent.links) <= 5
        many.say(Members({A: ""}))
        may_end.set()
        wait_until(lambda: len(agent.links) == 1)
        many.hang_up()


def test_stop_ends_the_sessions_with_all_members(many, tmp_path, quick):
    with agent_here(many.place, tmp_path, {APP: 1}) as agent:
        _, first, _ = many.be(A, A, B)
        _, second, _ = many.be(B, A, B)
        wait_until(lambda: links_of(agent) == [A, B])
        stopping = threading.Thread(target=agent.stop)
        stopping.start()
        wait_until(lambda: first._mux.peer_left and second._mux.peer_left)
        over(first, second)
        stopping.join(TIMEOUT)
        assert not stopping.is_alive()


def test_stop_ends_a_dial_of_each_link(cache, many, tmp_path, quick):
    with agent_here(many.place, tmp_path, {APP: 1}) as agent:
        _, first, _ = many.be(A, A, B)
        sock, _ = many._listening.accept()  # and says nothing
        wait_until(lambda: len(agent.links) == 2 and agent.links[1].unaccepted is not None)
        over(first)
    assert not threads_of_links()
    sock.close()


@pytest.fixture
def patient(monkeypatch, quick):
    """What is refused is asked for again only if the gateway says that it is free, but then soon.
    The rest is as with ``quick``."""
    monkeypatch.setattr(link_module, "FREE_PAUSE", 0)
    monkeypatch.setattr(
        link_module, "retry_delay",
        lambda tries, least=0, *_: 10 * TIMEOUT if least >= link_module.REFUSED_DELAY else 0.05,
    )  # fmt: skip


def test_hostnames_that_are_free_are_asked_for_at_the_member_that_says_so(many, tmp_path, patient):
    """At an address that leads to any of them."""
    features = (*FEATURES, WAITS)
    taken = f"host already registered: {OTHER}"
    some = Ack(True, features=features, member=A, denied={OTHER: taken})
    with agent_here(many.place, tmp_path, {APP: 1, OTHER: 2}) as agent:
        many.meet(some)
        many.say(Members({A: "", B: ""}))
        first, control = many.session, many.control
        many.meet(some._replace(member=B))
        many.say(Members({A: "", B: ""}))
        second = many.session
        wait_until(lambda: links_of(agent) == [A, B])
        control.write(encode_message(Free((OTHER,))))
        for _ in range(3):
            asked = many.refuse()
            assert set(asked.routes) == {OTHER} and asked.besides == (B,)
        many.meet(Ack(True, features=features, member=A))  # one hostname is granted
        probe = many.session
        while True:  # the session for all of them; the other member is asked, too
            registered = many.meet(Ack(True, features=features, member=A))
            if set(registered.routes) == {APP, OTHER} and registered.besides == (B,):
                break
            many.hang_up()
        wait_until(lambda: first.ended and probe.ended)
        over(many.session, second)


def test_a_session_that_waits_is_replaced_though_dials_lead_to_other_members(
    many, tmp_path, patient
):
    features = (*FEATURES, WAITS)
    none = Ack(True, features=features, denied={APP: f"host already registered: {APP}"})
    with agent_here(many.place, tmp_path, {APP: 1}) as agent:
        many.meet(none._replace(member=A))
        many.say(Members({A: "", B: ""}))
        first, control = many.session, many.control
        many.meet(none._replace(member=B))
        many.say(Members({A: "", B: ""}))
        second = many.session
        wait_until(lambda: links_of(agent) == [A, B])
        control.write(encode_message(Free((APP,))))
        for _ in range(3):
            assert many.refuse().besides == (B,)
        registered, third, _ = many.be(A, A, B)
        assert registered.besides == (B,) and registered.overlap
        wait_until(lambda: first.ended)
        over(second, third)


def test_each_member_is_asked_for_the_port_that_the_first_has_opened(many, tmp_path, quick):
    tunnels = [
        {"hostname": APP, "target": "127.0.0.1:22", "mode": "tcp", "port": "auto"},
        {"hostname": OTHER, "target": "127.0.0.1:22", "mode": "tcp", "port": "2222"},
    ]
    features = (*FEATURES, PORTS)
    with agent_here(many.place, tmp_path, ready=False, tunnels=tunnels) as agent:
        opened = {APP: "20001", OTHER: "2222"}
        reply = Ack(True, features=features, member=A, ports=opened)
        assert many.meet(reply).ports == {APP: "auto", OTHER: "2222"}
        many.say(Members({A: "", B: ""}))
        first = many.session
        assert many.meet(reply._replace(member=B)).ports == opened
        wait_until(lambda: links_of(agent) == [A, B])
        over(first, many.session)


def test_members_that_change_all_the_time_are_dialled_no_more_than_so_often(
    many, tmp_path, monkeypatch
):
    monkeypatch.setattr("gotunnel_agent.agent.MOST_OPENED", 3)
    with agent_here(many.place, tmp_path, {APP: 1}) as agent:
        many.meet(Ack(True, features=FEATURES, member=A))
        for number in range(10):
            many.say(Members({A: "", f"{number}": f"localhost:{number + 1}"}))
            many.say(Members({A: ""}))
        many.say(Ping(1))
        assert isinstance(many.hear(), Pong)
        wait_until(lambda: len(agent.links) == 1)
        assert len(agent._opened) == 3
        many.hang_up()


def test_the_member_that_a_restarted_gateway_was_before_is_not_dialled_again_and_again(
    cluster, tmp_path, site, caplog, monkeypatch
):
    """It stays in the list for a while, with the same address."""
    delays = []
    seek_delay = link_module.seek_delay
    monkeypatch.setattr(
        link_module, "seek_delay", lambda *given: delays.append(seek_delay(*given)) or delays[-1]
    )
    first = cluster.start(A)
    second = cluster.start(B)
    port = str(second.tunnel_port)
    with agent_here(first, tmp_path, {APP: site.port}) as agent:
        wait_until(lambda: links_of(agent) == [A, B])
        cluster.gateways.pop(B).stop()
        cluster.start(C, TUNNEL_PORT=port)
        wait_until(lambda: links_of(agent) == [A, C])
        wait_until(lambda: delays)
        assert delays[0] >= roster.OWN_SEEK_DELAY
        del cluster.told[B]
        cluster.tell()
        wait_until(lambda: len(agent.links) == 2)
