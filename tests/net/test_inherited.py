"""Listening sockets that were given: which port takes which, and what is said of those that do not
fit."""

import contextlib
import logging
import os
import socket

import pytest

from gotunnel_server.net import inherited
from gotunnel_server.net.inherited import Contradiction, Given, Inherited, of_systemd
from gotunnel_server.net.listener import PortError, bind

FIRST = 700  # in place of descriptor 3, which is in use here
SETTINGS = ("GATEWAY_PORT", "TUNNEL_PORT", "TCP_PORTS")
LOCAL = ("127.0.0.1",)


@pytest.fixture
def sockets():
    """Makes listening sockets."""
    with contextlib.ExitStack() as stack:
        yield lambda host="127.0.0.1", port=0: stack.enter_context(
            socket.create_server((host, port))
        )


def port_of(sock):
    return sock.getsockname()[1]


# Taken -------------------------------------------------------------------------------------------


def test_a_socket_of_systemd_serves_the_setting_that_it_is_named_after(sockets, caplog):
    given = sockets()
    left = Inherited([Given(given, "GATEWAY_PORT", True)])
    with contextlib.closing(bind("TUNNEL_PORT", LOCAL, 0, left)[0]) as other:
        assert other is not given
    assert bind("GATEWAY_PORT", LOCAL, 1, left) == [given]
    assert "systemd's unit decides" in caplog.text
    assert left.is_by_systemd(given)
    assert left.left() == []


def test_several_sockets_of_systemd_may_serve_one_setting(sockets):
    first = sockets()
    given = [first, sockets("127.0.0.2", port_of(first))]
    left = Inherited([Given(sock, "GATEWAY_PORT", True) for sock in given])
    assert bind("GATEWAY_PORT", LOCAL, 0, left) == given


def test_the_port_number_decides_for_a_socket_of_systemd_without_a_name_of_ours(sockets):
    given = sockets()
    left = Inherited([Given(given, "", True)])
    with contextlib.closing(bind("GATEWAY_PORT", LOCAL, 0, left)[0]) as other:
        assert other is not given
    assert bind("TUNNEL_PORT", LOCAL, port_of(given), left) == [given]


def test_an_agents_port_of_systemd_can_be_taken_again_and_again(sockets):
    given = sockets()
    left = Inherited([Given(given, "TCP_PORTS", True)])
    for _ in range(2):
        with contextlib.closing(bind("TCP_PORTS", LOCAL, port_of(given), left)[0]) as sock:
            assert sock.getsockname() == given.getsockname() and left.is_by_systemd(sock)


def test_a_predecessors_socket_serves_where_the_configuration_asks_for_its_address(sockets):
    given = sockets()
    left = Inherited([Given(given, "GATEWAY_PORT", False)])
    with contextlib.closing(bind("GATEWAY_PORT", ("127.0.0.2",), port_of(given), left)[0]) as sock:
        assert sock is not given
    assert bind("TUNNEL_PORT", LOCAL, port_of(given), left) == [given]  # the two were swapped


def test_a_port_that_may_be_any_gets_the_predecessors_of_the_same_setting(sockets):
    given = sockets()
    left = Inherited([Given(given, "GATEWAY_PORT", False)])
    with contextlib.closing(bind("TUNNEL_PORT", LOCAL, 0, left)[0]) as sock:
        assert sock is not given
    assert bind("GATEWAY_PORT", LOCAL, 0, left) == [given]


def test_a_predecessors_port_on_all_addresses_is_taken_for_all():
    first = bind("X_PORT", (), 0)[0]
    with contextlib.closing(first):
        left = Inherited([Given(first, "X_PORT", False)])
        assert bind("X_PORT", (), port_of(first), left) == [first]


@pytest.mark.parametrize("by_systemd", [True, False])
def test_what_fits_no_port_is_closed_and_named(sockets, by_systemd, caplog):
    caplog.set_level(logging.INFO)
    given, later = sockets(), sockets()
    left = Inherited([Given(given, "HTTP_PORT", by_systemd), Given(later, "TCP_PORTS", by_systemd)])
    left.close_unfit([range(port_of(later), port_of(later) + 1)])
    assert given.fileno() == -1 and later.fileno() != -1
    (line,) = caplog.messages
    said = "the gateway closes it" if by_systemd else "no longer wanted: closed"
    assert "HTTP_PORT" in line and said in line


def test_ports_of_agents_that_do_not_come_back_are_closed(sockets):
    ours, systemds = sockets(), sockets()
    left = Inherited([Given(ours, "TCP_PORTS", False), Given(systemds, "TCP_PORTS", True)])
    left.close_unclaimed_after(0)
    assert ours.fileno() == -1 and systemds.fileno() != -1
    left.close()
    assert systemds.fileno() == -1


# LISTEN_FDS --------------------------------------------------------------------------------------


@pytest.fixture
def listen(monkeypatch):
    """Reads LISTEN_FDS with these sockets or files as its descriptors."""
    monkeypatch.setattr(inherited, "FIRST", FIRST)
    used = []

    def read(*files, **changes):
        for number, file in enumerate(files, start=FIRST):
            os.dup2(file.fileno(), number)
            used.append(number)
        environment = {"LISTEN_FDS": str(len(files)), "LISTEN_PID": str(os.getpid()), **changes}
        return of_systemd(environment, SETTINGS)

    yield read
    for number in used:
        with contextlib.suppress(OSError):
            os.close(number)


def close_all(given):
    for entry in given:
        entry.sock.close()


def test_without_the_variables_nothing_is_given(caplog):
    assert of_systemd({}, SETTINGS) == [] and caplog.messages == []


@pytest.mark.parametrize(
    ("name", "setting"),
    [
        ("gateway_port", "GATEWAY_PORT"),
        ("GATEWAY_PORT", "GATEWAY_PORT"),
        ("tunnel-port", "TUNNEL_PORT"),
        ("tcp_ports", "TCP_PORTS"),
        ("gotunnel.socket", ""),
        ("unknown", ""),
        ("", ""),
    ],
)
def test_names_are_those_of_settings(listen, sockets, name, setting, caplog):
    sock = sockets()
    (given,) = found = listen(sock, LISTEN_FDNAMES=name)
    assert (given.name, given.port, given.by_systemd) == (setting, port_of(sock), True)
    assert not given.sock.get_inheritable()
    assert caplog.messages == []
    close_all(found)


@pytest.mark.parametrize(
    ("names", "own", "said"),
    [
        (
            "gateway_port:tunnel_port",
            "same",
            "descriptor 700 (gateway_port) and descriptor 701 (tunnel",
        ),
        ("gateway_port:gateway_port", "same", "are both at 127.0.0.1 port"),
        (":", "same", "descriptor 700 and descriptor 701 are both at"),
        (
            "gateway_port:gateway_port",
            "another",
            "GATEWAY_PORT has sockets of systemd at the ports",
        ),
        ("gateway_port:", "gateway_port", "GATEWAY_PORT has sockets of systemd at the ports"),
        (
            "tunnel_port",
            "gateway_port",
            "systemd's socket at this port is for TUNNEL_PORT, expected",
        ),
        (
            "port",
            "gateway_port",
            "systemd's socket at this port is for TCP_PORTS, expected one for",
        ),
    ],
)
def test_sockets_that_contradict_each_other_are_refused_in_one_line(
    listen, sockets, names, own, said
):
    """``own``: whose port the last socket has."""
    first = sockets()
    last = first if own == "same" or ":" not in names else sockets()
    files = [first, last] if ":" in names else [last]
    names = names.replace("port", str(port_of(last))) if names == "port" else names
    with contextlib.ExitStack() as stack:
        with pytest.raises((Contradiction, PortError)) as caught:
            found = listen(*files, LISTEN_FDNAMES=names)
            stack.callback(close_all, found)
            bind(
                "GATEWAY_PORT",
                LOCAL,
                port_of(last) if own == "gateway_port" else 0,
                Inherited(found),
            )
    assert said in str(caught.value) and "\n" not in str(caught.value)


def test_an_agents_port_is_named_by_its_number(listen, sockets, caplog):
    sock, other = sockets(), sockets()
    found = listen(sock, other, LISTEN_FDNAMES=f"{port_of(sock)}:{port_of(sock)}")
    assert [given.name for given in found] == ["TCP_PORTS", ""]
    (line,) = caplog.messages
    assert f"it is at port {port_of(other)}" in line
    close_all(found)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"LISTEN_FDS": "many"}, "LISTEN_FDS is 'many', expected a number"),
        ({"LISTEN_FDS": "-1"}, "LISTEN_FDS is '-1', expected a number"),
        ({"LISTEN_FDS": "99999"}, "LISTEN_FDS is '99999', expected a number"),
        ({"LISTEN_PID": "1"}, "LISTEN_PID is '1', and this is process"),
        ({"LISTEN_PID": ""}, "LISTEN_PID is '', and this is process"),
        ({"LISTEN_FDS": "a\nb" + "c" * 500}, r"LISTEN_FDS is 'a\nbccc"),
    ],
)
def test_variables_that_do_not_fit_are_one_line_and_give_nothing(
    listen, sockets, changes, said, caplog
):
    assert listen(sockets(), **changes) == []
    (line,) = caplog.messages
    assert said in line and "\n" not in line and len(line) < 400 and "opened anew" in line


def test_names_that_do_not_match_the_count_are_ignored(listen, sockets, caplog):
    found = listen(sockets(), LISTEN_FDNAMES="gateway_port:tunnel_port")
    assert [given.name for given in found] == [""]
    (line,) = caplog.messages
    assert "2 names" in line
    close_all(found)


def test_what_is_no_listening_tcp_socket_is_one_line_each_and_left_alone(listen, sockets, caplog):
    with contextlib.ExitStack() as stack:
        udp = stack.enter_context(socket.socket(type=socket.SOCK_DGRAM))
        unix = stack.enter_context(socket.socket(socket.AF_UNIX))
        tcp = stack.enter_context(socket.socket())
        file = stack.enter_context(open(os.devnull))
        good = sockets()
        found = listen(udp, unix, tcp, file, good, LISTEN_FDS="6")
        assert [given.port for given in found] == [port_of(good)]
        for line, flaw in zip(
            caplog.messages, ("UDP", "another kind", "a connection", "a file", "not open"),
            strict=True,
        ):  # fmt: skip
            assert flaw in line and "it is not used" in line
        close_all(found)
