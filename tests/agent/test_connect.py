"""Which address of a host wins (RFC 8305, "Happy Eyeballs")."""

import contextlib
import socket
import threading
import time

import pytest
from support import APP, RAW, TIMEOUT, agent_here, answer, deaf_port, gateway_here

from gotunnel import Deadline, Waker
from gotunnel_agent import connect as connect_module
from gotunnel_agent import forward
from gotunnel_agent.connect import MOST_ADDRESSES, NEXT_ADDRESS, GivenUp, addresses_of, connect

AT_ONCE = 4  # seconds, on a busy machine; before "Happy Eyeballs" these took 5 to 10


def tcp(port, family=socket.AF_INET):
    """An address of this machine as getaddrinfo() gives it."""
    host = "127.0.0.1" if family == socket.AF_INET else "::1"
    rest = () if family == socket.AF_INET else (0, 0)
    return (family, socket.SOCK_STREAM, socket.IPPROTO_TCP, "", (host, port, *rest))


@pytest.fixture
def deaf():
    with deaf_port() as port:
        yield port


@pytest.fixture
def refusing():
    """A port at which no program listens."""
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        yield bound.getsockname()[1]


@pytest.fixture
def resolve(monkeypatch):
    """A function that gives the name two.example addresses."""

    def set_addresses(*addresses):
        real = socket.getaddrinfo
        monkeypatch.setattr(socket, "getaddrinfo", lambda host, *rest, **kinds: (
            list(addresses) if host == b"two.example" else real(host, *rest, **kinds)))  # fmt: skip

    return set_addresses


def port_of(addresses, timeout=TIMEOUT, stop=None):
    with connect(addresses, Deadline(timeout), stop) as sock:
        return sock.getpeername()[1]


def test_address_that_swallows_syns_costs_a_moment(origin, deaf):
    began = time.monotonic()
    assert port_of([tcp(deaf), tcp(origin.port)]) == origin.port
    assert NEXT_ADDRESS <= time.monotonic() - began < AT_ONCE


def test_ipv6_address_that_swallows_syns_costs_a_moment(origin):
    with deaf_port(socket.AF_INET6) as deaf:
        assert port_of([tcp(deaf, socket.AF_INET6), tcp(origin.port)], AT_ONCE) == origin.port


def test_address_that_refuses_costs_nothing(origin, refusing, monkeypatch):
    monkeypatch.setattr(connect_module, "NEXT_ADDRESS", 10 * TIMEOUT)
    assert port_of([tcp(refusing), tcp(origin.port)]) == origin.port


def test_address_that_refuses_behind_one_that_swallows_costs_nothing_more(
    origin, deaf, refusing, monkeypatch
):
    moments = iter([NEXT_ADDRESS, 10 * TIMEOUT])  # of the first address, and of the second
    monkeypatch.setattr(
        connect_module, "Deadline", lambda seconds: Deadline(seconds and next(moments))
    )
    assert port_of([tcp(deaf), tcp(refusing), tcp(origin.port)]) == origin.port


def test_earlier_address_that_answers_late_still_wins(monkeypatch):
    with socket.socket() as listening, socket.socket() as first, deaf_port() as deaf:
        listening.bind(("127.0.0.1", 0))
        listening.listen(0)
        late = listening.getsockname()
        first.connect(late)
        room = threading.Timer(2 * NEXT_ADDRESS, lambda: listening.accept()[0].close())
        room.start()
        assert port_of([tcp(late[1]), tcp(deaf)]) == late[1]  # when the kernel repeats its SYN
        room.join()


def test_hosts_whose_addresses_all_fail(deaf, refusing):
    with pytest.raises(ConnectionRefusedError, match="Connection refused"):
        port_of([tcp(refusing), tcp(refusing)])
    with pytest.raises(TimeoutError):
        port_of([tcp(refusing), tcp(deaf)], 0.5)
    no_such_family = (12345, socket.SOCK_STREAM, 0, "", ("127.0.0.1", 1))
    with pytest.raises(ConnectionRefusedError):
        port_of([tcp(refusing), no_such_family])
    with pytest.raises(OSError, match="not supported"):
        port_of([no_such_family])


def test_no_socket_is_left_of_the_addresses_that_lost(origin, deaf, refusing, monkeypatch):
    made = []
    kind = socket.socket
    monkeypatch.setattr(socket, "socket", lambda *args: made.append(kind(*args)) or made[-1])
    with connect([tcp(deaf), tcp(refusing), tcp(origin.port)], Deadline(TIMEOUT)) as won:
        assert len(made) == 3
        assert [sock for sock in made if sock.fileno() != -1] == [won]


def test_dial_is_given_up_when_nobody_wants_it_any_more(deaf):
    waker = Waker()
    with contextlib.closing(waker):
        threading.Timer(0.1, waker.wake).start()
        with pytest.raises(GivenUp):
            port_of([tcp(deaf)], stop=waker)


def test_families_take_turns_and_their_number_is_bounded(resolve):
    six = [tcp(port, socket.AF_INET6) for port in range(100)]
    four = [tcp(port) for port in range(3)]
    resolve(*six, *four)
    found = addresses_of("two.example", 1)
    assert found[:6] == [six[0], four[0], six[1], four[1], six[2], four[2]]
    assert len(found) == MOST_ADDRESSES


@pytest.mark.parametrize("name", ["app.localhost", "localhost", "a.b.LocalHost."])
def test_names_under_localhost_are_this_machine_though_the_resolver_knows_none(
    monkeypatch, origin, name
):
    resolver_without_names(monkeypatch)
    found = addresses_of(name, origin.port)
    assert {address[0] for _, _, _, _, address in found} <= {"127.0.0.1", "::1"}
    assert port_of(found) == origin.port


@pytest.mark.parametrize("name", ["app.example", "localhost.example", "notlocalhost"])
def test_other_names_that_the_resolver_does_not_know_are_an_error(monkeypatch, name):
    resolver_without_names(monkeypatch)
    with pytest.raises(socket.gaierror):
        addresses_of(name, 443)


def test_what_the_resolver_says_of_a_name_under_localhost_counts(monkeypatch):
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: [tcp(7)])  # a container's alias
    assert addresses_of("app.localhost", 80) == [tcp(7)]


def resolver_without_names(monkeypatch):
    real = socket.getaddrinfo

    def getaddrinfo(host, *rest, **kinds):
        if host is not None:
            raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")
        return real(host, *rest, **kinds)

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)


# The callers of connect() -----------------------------------------------------------------------


def test_agent_target_and_helper_find_the_address_that_answers(
    cache, tmp_path, origin, deaf, resolve
):
    origin.serve(lambda wire: wire.send(wire.read_exactly(4) and answer()))
    with gateway_here(cache) as gateway:
        resolve(tcp(deaf), tcp(origin.port))
        tunnels = [
            {"hostname": name, "target": "two.example:80", "mode": mode}
            for name, mode in ((APP, "http"), (RAW, "tcp"))
        ]
        with agent_here(gateway, tmp_path, {}, {}, tunnels=tunnels):
            gateway.wait_for_routes(APP, RAW)
            began = time.monotonic()
            assert gateway.get(APP) == (200, b"ok")
            assert time.monotonic() - began < AT_ONCE

            resolve(tcp(deaf), tcp(gateway.public_port))
            context = forward.client_context(gateway.ca_file)
            began = time.monotonic()
            with contextlib.closing(forward.Destination(RAW, "two.example", 1, context).dial()):
                assert time.monotonic() - began < AT_ONCE


def test_agent_finds_its_gateway_behind_an_address_that_swallows_syns(
    cache, tmp_path, origin, deaf, resolve
):
    origin.serve(lambda wire: wire.read_head() and wire.send(answer()))
    with gateway_here(cache, TUNNEL_HOST="two.example") as gateway:
        resolve(tcp(deaf), tcp(gateway.tunnel_port))
        began = time.monotonic()
        with agent_here(gateway, tmp_path, {APP: origin.port}, tunnel_addr="two.example:9443"):
            assert time.monotonic() - began < AT_ONCE
            assert gateway.get(APP) == (200, b"ok")
