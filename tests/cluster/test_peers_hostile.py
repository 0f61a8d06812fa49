"""Who is no peer, and what a peer must not do."""

import contextlib
import logging
import socket
import ssl
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
from hand_made import HandMade, registration
from peers_here import KEY, Card, join, member_here
from support import APP, GATEWAY_HOST, TIMEOUT, agent_here, answer, request, wait_until

from gotunnel import (
    MESSAGE_LIMIT,
    Ack,
    MessageReader,
    Ping,
    Pong,
    ProtocolError,
    Register,
    Session,
    SessionClosed,
    StreamReset,
    encode_message,
)
from gotunnel_agent.common.duplex import Duplex
from gotunnel_server.cluster import peer_session, peer_tunnel
from gotunnel_server.cluster.origin import Greeting, Origin
from gotunnel_server.cluster.secret import NAME, Secret

OTHER_KEY = b"another key, which is as long as it must be"
TOKEN = Origin("impostor", "192.0.2.9").encode()


@pytest.fixture
def member(cache):
    with member_here(cache, "00000001") as member:
        yield member


class Impostor:
    """A peer by hand: whoever has the key."""

    def __init__(self, member, keys=(KEY,), greeting=Greeting("0badc0de", "evil").message()):
        sock = socket.create_connection(("127.0.0.1", member.gateway.tunnel_port), TIMEOUT)
        self.duplex = Duplex(sock)
        self.duplex.start_tls(Secret(keys).for_dialling(), server_side=False, server_hostname=NAME)
        self.duplex.handshake_within(TIMEOUT)
        self.session = Session(self.duplex, client=True, name="impostor")
        self.session.start()
        self.control = self.session.open(b"" if greeting is None else encode_message(greeting))
        self._reader, self._messages = MessageReader(), []

    def __enter__(self):
        return self

    def __exit__(self, *exc_info):
        self.session.close("the test ends it")
        self.session.join(TIMEOUT)

    def send(self, *messages):
        self.control.write(b"".join(map(encode_message, messages)))

    def read(self):
        while not self._messages:
            data = self.control.read(timeout=TIMEOUT)
            assert data, "the control stream has ended"
            self._messages += self._reader.feed(data)
        return self._messages.pop(0)

    def is_hung_up_on(self):
        with contextlib.suppress(StreamReset, SessionClosed):
            while self.control.read(timeout=TIMEOUT):
                pass
        wait_until(lambda: self.session.ended)
        return True


def names(*hostnames, mode="http", instance="1.0", token=TOKEN, **more):
    routes = {name: "127.0.0.1:1" for name in hostnames}
    return Register(token, routes, dict.fromkeys(hostnames, mode), ("partial",), instance=instance,
                    **more)  # fmt: skip


# Strangers


def test_a_gateway_with_another_key_is_refused_counted_and_logged(member, cache, caplog):
    with member_here(cache, "00000002", keys=(OTHER_KEY,)) as other:
        other.peers.change({"00000001": member.card})
        attempts = member.inner._newcomers.attempts
        wait_until(lambda: attempts._failures("127.0.0.1"))
        wait_until(lambda: "does not prove that it has the cluster's key" in caplog.text)
        other.peers.change({})
    assert not member.peers.figures().accepted
    assert KEY.decode() not in caplog.text and OTHER_KEY.decode() not in caplog.text


def test_whoever_answers_without_the_key_gets_nothing(member, cache, caplog):
    """A man in the middle, or another program: it is sent no greeting, no hostname."""
    authority = Secret([OTHER_KEY]).for_accepting()
    with socket.create_server(("127.0.0.1", 0)) as listening:
        card = Card("00000009", f"127.0.0.1:{listening.getsockname()[1]}")
        member.peers.change({card.id: card})
        sock, _ = listening.accept()
        with contextlib.closing(sock):
            sock.settimeout(TIMEOUT)
            with pytest.raises(ssl.SSLError):
                with authority.wrap_socket(sock, server_side=True) as tls:
                    assert not tls.recv(1)
        member.peers.change({})
    wait_until(lambda: "it does not prove that it has the cluster's key" in caplog.text)


def test_an_agent_with_a_good_token_is_no_peer(member):
    """Not by its SNI either: it has no certificate."""
    agent = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    agent.check_hostname, agent.verify_mode = False, ssl.CERT_NONE
    with socket.create_connection(("127.0.0.1", member.gateway.tunnel_port), TIMEOUT) as sock:
        with pytest.raises((ssl.SSLError, ConnectionError)):
            with agent.wrap_socket(sock, server_hostname=NAME) as tls:
                tls.sendall(b"x")
                assert tls.recv(1)
                raise AssertionError("it was let in")
    assert not member.peers.figures().accepted


def test_what_a_peer_has_sent_before_proves_nothing_to_another_connection(member):
    """A recording of a whole connection, replayed byte for byte."""
    sent = []

    class Recorded(Duplex):
        def _push(self):
            sent.append(bytes(self._unsent))
            return super()._push()

    context = Secret([KEY]).for_dialling()
    for attempt in "recorded", "replayed":
        sock = socket.create_connection(("127.0.0.1", member.gateway.tunnel_port), TIMEOUT)
        if attempt == "recorded":
            duplex = Recorded(sock)
            duplex.start_tls(context, server_side=False, server_hostname=NAME)
            duplex.handshake_within(TIMEOUT)
            duplex.write(b"\0" * 24)
            wait_until(lambda: sum(map(len, sent)) > 1000)
            duplex.close()
        else:
            with contextlib.closing(sock), contextlib.suppress(ConnectionError):
                sock.settimeout(TIMEOUT)
                sock.sendall(b"".join(sent))
                while sock.recv(4096):
                    pass
    assert not member.peers.figures().accepted


def test_an_agent_gets_nothing_at_a_port_for_peers_alone(member, cache):
    newcomers = member.inner._newcomers.beside()
    port = member.inner.listeners.add(
        "PEER_PORT", 0, newcomers, member.inner._newcomers.listener.places, 10
    )
    newcomers.listener.start()
    with member_here(cache, "00000002") as other:
        other.peers.change({"00000001": Card("00000001", f"127.0.0.1:{port}")})
        wait_until(lambda: other.peers.figures().connected == 1)
    with socket.create_connection(("127.0.0.1", port), TIMEOUT) as sock:
        with pytest.raises((ssl.SSLError, ConnectionError)):
            member.gateway.context.wrap_socket(sock, server_hostname=GATEWAY_HOST)


# Peers that break the rules: who has the key may pass on any hostname, and no more than that


def test_a_peer_gets_no_reserved_name_and_none_that_an_agent_here_has(
    member, origin, tmp_path, caplog
):
    with agent_here(member.gateway, tmp_path, {APP: origin.port}), Impostor(member) as impostor:
        assert impostor.read() == Ack(True, member="00000001")
        own = member.registry.lookup(APP)
        impostor.send(names(GATEWAY_HOST, APP, "bad_name", "other.localhost"))
        member.sees("other.localhost")
        assert member.registry.lookup(GATEWAY_HOST) is None
        assert member.registry.lookup(APP) is own
    assert "invalid hostname: bad_name" in caplog.text
    member.sees_no("other.localhost")


@pytest.mark.parametrize(
    "message",
    [
        names(APP, token="not an origin"),
        names(APP, token="[1,2]"),
        names(APP, instance="x" * 65),
        Ack(True),
        Pong(1),
    ],
)
def test_a_peer_that_breaks_the_protocol_is_hung_up_on(member, message):
    with Impostor(member) as impostor:
        impostor.read()
        impostor.send(message)
        assert impostor.is_hung_up_on()
    assert member.registry.lookup(APP) is None


@pytest.mark.parametrize(
    "greeting",
    [
        Register("", {}, {}),
        names(APP),
        Register("", {}, {}, instance="x" * 65),
        Ping(1),
    ],
)
def test_a_peer_that_does_not_greet_is_hung_up_on(member, greeting):
    with Impostor(member, greeting=greeting) as impostor:
        assert impostor.is_hung_up_on()


def test_a_peer_that_says_nothing_is_hung_up_on(member, monkeypatch):
    monkeypatch.setattr(peer_tunnel, "GREETING_TIMEOUT", 0.05)
    with Impostor(member, greeting=None) as impostor:
        assert impostor.is_hung_up_on()


def test_a_member_that_dials_itself_hears_so(member, caplog, monkeypatch):
    monkeypatch.setattr(peer_session, "GRACE", 0)
    member.peers.change({"00000009": member.card._replace(id="00000009")})
    wait_until(lambda: "its address leads to this gateway itself; give each" in caplog.text)
    member.peers.change({})


@pytest.mark.parametrize(
    "address",
    [f"127.0.0.1:{10**30}", "127.0.0.1:-1", "127.0.0.1:x", ":", "a\0b:1", f"{'a' * 70}:1"],
)
def test_an_address_that_is_none_is_one_line_in_the_log(member, caplog, monkeypatch, address):
    monkeypatch.setattr(peer_session, "GRACE", 0)
    member.peers.change({"00000009": Card("00000009", address)})
    wait_until(lambda: "no connection: " in caplog.text)
    member.peers.change({})
    assert "bug" not in caplog.text


def test_an_address_that_leads_to_another_member_is_not_used(member, cache, caplog, monkeypatch):
    monkeypatch.setattr(peer_session, "GRACE", 0)
    with member_here(cache, "00000002") as other:
        other.peers.change({"00000009": member.card._replace(id="00000009")})
        wait_until(lambda: "its address leads to the member 00000001" in caplog.text)
        assert other.peers.figures().connected == 0
        other.peers.change({})


def test_a_stream_that_is_kept_ends_when_its_hostname_is_taken_back(member):
    with Impostor(member) as impostor:
        impostor.read()
        impostor.send(names(APP))
        member.sees(APP)
        with member.gateway.dial(APP) as visitor:
            visitor.send(request())
            stream = impostor.session.accept(TIMEOUT)
            assert b"GET / " in stream.read(timeout=TIMEOUT)
            stream.write(answer(b"ok"))
            assert visitor.read_message()[1] == b"ok"
            impostor.send(Register("", {}, {}, instance="1.0"))
            assert stream.read(timeout=TIMEOUT) == b""


def test_a_peer_tells_of_so_many_hostnames_and_no_more(member, monkeypatch):
    monkeypatch.setattr(peer_tunnel, "MOST_HOSTNAMES", 3)
    with Impostor(member) as impostor:
        impostor.read()
        impostor.send(names("a.localhost", "b.localhost"))
        impostor.send(names("c.localhost", "d.localhost"))  # in place of them
        member.sees("c.localhost")
        member.sees_no("a.localhost")
        impostor.send(names("e.localhost", "f.localhost", instance="2.0"))
        assert impostor.is_hung_up_on()
    member.sees_no("c.localhost")


def test_a_peer_that_asks_without_reading_stops_itself(member):
    """It can make no more of its answers wait here than a message is long, and some."""
    with Impostor(member) as impostor:
        question = encode_message(Ping(1)) * 1000
        with contextlib.suppress(TimeoutError, StreamReset, SessionClosed):
            for _ in range(400):  # 11 MB
                impostor.control.write(question, timeout=0.2)
        connection = next(iter(member.peers._accepted))
        assert len(connection._unsent) < 2 * MESSAGE_LIMIT + 64 * 1024


def test_a_reader_that_opens_streams_to_us_is_reset(member):
    """A peer that has dialled opens its control stream, and no other."""
    with Impostor(member) as impostor:
        impostor.read()
        stream = impostor.session.open(b"\x01\x00\x01a")
        with pytest.raises((StreamReset, SessionClosed, ProtocolError)):
            stream.read(timeout=TIMEOUT)


def test_a_member_that_dials_again_replaces_its_connection(member):
    with Impostor(member) as first:
        first.read()
        first.send(names("a.localhost"))
        member.sees("a.localhost")
        with Impostor(member) as second:
            second.read()
            assert first.is_hung_up_on()
            second.send(names("b.localhost"))
            member.sees("b.localhost")
            member.sees_no("a.localhost")


def test_hostnames_change_without_a_new_connection(member, caplog):
    caplog.set_level(logging.DEBUG)
    with Impostor(member) as impostor:
        impostor.read()
        for number in range(20):
            impostor.send(names(f"{number}.localhost", "*.wild.localhost"))
        member.sees("19.localhost", "any.wild.localhost")
        member.sees_no("0.localhost", "18.localhost")
        impostor.send(Register("", {}, {}, instance="1.0"))
        member.sees_no("19.localhost", "any.wild.localhost")


def test_no_visit_comes_between_an_agents_old_session_and_its_new_one(member, monkeypatch):
    """It is told of the new one first, and only then the old one is taken back."""
    published, put = [], member.registry.put_elsewhere
    with Impostor(member) as impostor:
        impostor.read()
        impostor.send(names(APP))
        member.sees(APP)
        monkeypatch.setattr(member.registry, "put_elsewhere", lambda routes: (
            published.append(APP in routes), put(routes)
        ))  # fmt: skip
        for number in range(1, 6):
            impostor.send(
                names(APP, instance=f"{number + 1}.0"),
                Register("", {}, {}, instance=f"{number}.0"),
            )
        impostor.send(names("last.localhost", instance="x"))
        member.sees("last.localhost")
        assert published and all(published)
        monkeypatch.undo()


def test_changes_that_wait_for_the_disk_do_not_pile_up(member, monkeypatch):
    monkeypatch.setattr(peer_tunnel, "MOST_CHANGES", 5)
    may_go_on = threading.Event()
    monkeypatch.setattr(member.inner.tunnels, "ensure_certificates", lambda *_: may_go_on.wait())
    padding = "x" * 60 + "."

    def send(impostor):
        for number in range(100):
            hostnames = [f"{padding * 3}{number}-{n}.localhost" for n in range(20)]
            impostor.send(names(*hostnames, instance=f"{number}.0"))
        impostor.send(names("last.localhost", instance="last"))

    with Impostor(member) as impostor, ThreadPoolExecutor(1) as pool:
        impostor.read()
        sent = pool.submit(send, impostor)
        connection = next(iter(member.peers._accepted))
        wait_until(lambda: len(connection._changes) >= 5)
        assert len(connection.tunnels) < 50
        may_go_on.set()
        sent.result()
        member.sees("last.localhost")


# The question that the safety rule needs


def test_members_tell_each_other_whether_they_are_without_the_board(member, cache):
    with member_here(cache, "00000002") as other:
        join(member, other)
        ids = frozenset({"00000002", "0000dead"})
        member.peers.ask(ids)
        other.without = True
        wait_until(lambda: member.peers.ask(ids) or member.promises)
        id, asked_at = member.promises[-1]
        assert id == "00000002" and not other.promises
        other.stop()
        assert member.departed == ["00000002"]


def test_an_agent_registers_as_before(member):
    with HandMade(member.gateway, registration(APP)) as agent:
        member.sees(APP)
        assert agent
