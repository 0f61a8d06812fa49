"""One port: accept, park, hand over, close. What is parked here is made up."""

import contextlib
import errno
import re
import socket
import threading
import time

import pytest
from support import TIMEOUT, reserved_port, wait_until

from gotunnel_agent.common.addresses import counted_by
from gotunnel_agent.common.duplex import (
    KEEPALIVE,
    MOST_UNSENT,
    NOTSENT_LOWAT,
    OPTIONS_ARE_INHERITED,
    Duplex,
)
from gotunnel_agent.common.process import Stopped
from gotunnel_server.net import listener
from gotunnel_server.net.inherited import Inherited
from gotunnel_server.net.listener import Listener, PortError, bind
from gotunnel_server.net.shares import Places

LOCAL = ("127.0.0.1",)


class Workers:
    """Calls at once what is submitted, until it is shut down."""

    def __init__(self):
        self.called = []
        self.over = False

    crowded = False

    def submit(self, function, key=None):
        if self.over:
            raise Stopped("the pool of threads has been shut down")
        self.called.append(function)
        function()


class Parked:
    """A connection that notes what is done to it."""

    def __init__(self, sock, address):
        self.duplex = Duplex(sock)
        self.address = address
        self.was_ready = threading.Event()
        self.has_expired = threading.Event()
        self.was_closed = threading.Event()
        self.silent = True
        self.brief = False

    def ready(self):
        self.was_ready.set()

    def expired(self):
        self.has_expired.set()

    def close(self):
        self.duplex.close()
        self.was_closed.set()


class Port:
    """A listener, the connections that it has welcomed, and visitors for it."""

    def __init__(self, *, limit=100, first_timeout=60, exempt=LOCAL):
        self.welcomed = []
        self.seats = []
        self.places = Places(limit, exempt)
        self._visitors = contextlib.ExitStack()
        # Its own thread does what a pool's would: nothing here takes time.
        self.listener = Listener(
            "test", bind("TEST_PORT", LOCAL, 0), self._welcome, Workers(),
            self.places, first_timeout,
        )  # fmt: skip

    def __enter__(self):
        self.listener.start()
        return self

    def __exit__(self, *exc_info):
        self.listener.stop()
        for connection in self.welcomed:
            connection.close()
        self._visitors.close()

    def _welcome(self, sock, address, seat):
        connection = Parked(sock, address)
        self.seats.append(seat)
        self.welcomed.append(connection)
        return connection

    def visit(self):
        """A visitor's socket; it may not have been accepted yet."""
        sock = socket.create_connection(("127.0.0.1", self.listener.port), TIMEOUT)
        return self._visitors.enter_context(sock)

    def meet(self):
        """A visitor's socket and the connection that was made of it."""
        count = len(self.welcomed)
        visitor = self.visit()
        wait_until(lambda: len(self.welcomed) > count)
        return visitor, self.welcomed[-1]


@pytest.fixture(autouse=True)
def quick_sweeps(monkeypatch):
    monkeypatch.setattr(listener, "SWEEP", 0.02)


@pytest.fixture
def port():
    with Port() as port:
        yield port


# Binding -----------------------------------------------------------------------------------------


def test_bind_takes_any_free_port_for_0():
    with contextlib.closing(bind("X_PORT", LOCAL, 0)[0]) as sock:
        assert sock.getsockname()[0] == "127.0.0.1" and sock.getsockname()[1] > 0


def test_bind_takes_the_same_port_on_each_address():
    sockets = bind("X_PORT", ("127.0.0.1", "127.0.0.2"), 0)
    names = [sock.getsockname() for sock in sockets]
    for sock in sockets:
        sock.close()
    assert [name[0] for name in names] == ["127.0.0.1", "127.0.0.2"]
    assert names[0][1] == names[1][1]


def test_bind_without_addresses_takes_all_of_them():
    with contextlib.closing(bind("X_PORT", (), 0)[0]) as sock:
        assert sock.getsockname()[0] in ("::", "0.0.0.0")
        socket.create_connection(("127.0.0.1", sock.getsockname()[1]), TIMEOUT).close()


@pytest.mark.parametrize(
    ("address", "sentence"),
    [
        ("127.0.0.1", "in use, another program listens there; stop it or choose another port"),
        ("192.0.2.1", "not an address of this machine; correct BIND"),
    ],
)
def test_bind_says_in_one_line_what_is_wrong(address, sentence):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        number = taken.getsockname()[1]
        with pytest.raises(PortError) as caught:
            bind("X_PORT", (address,), number)
        assert str(caught.value) == f"X_PORT {number} on {address}: {sentence}"


def test_bind_that_fails_leaves_nothing_open():
    with reserved_port() as number:
        with pytest.raises(PortError):
            bind("X_PORT", ("127.0.0.1", "192.0.2.1"), number)
        bind("X_PORT", LOCAL, number)[0].close()


def test_processes_that_share_ports_listen_side_by_side():
    shared = Inherited(shares_ports=True)
    one = bind("X_PORT", LOCAL, 0, shared)[0]
    with one:
        number = one.getsockname()[1]
        bind("X_PORT", LOCAL, number, shared)[0].close()
        with pytest.raises(PortError, match="in use"):
            bind("X_PORT", LOCAL, number)


# Parking -----------------------------------------------------------------------------------------


def test_connection_is_handed_over_when_its_peer_speaks(port):
    visitor, connection = port.meet()
    assert not connection.was_ready.is_set()
    visitor.send(b"x")
    assert connection.was_ready.wait(TIMEOUT)
    assert connection.duplex.receive() == b"x"
    assert connection.address == visitor.getsockname()


@pytest.mark.skipif(not OPTIONS_ARE_INHERITED, reason="sockets inherit no options here")
def test_what_is_accepted_needs_no_tuning(port):
    asked = [
        (socket.IPPROTO_TCP, socket.TCP_NODELAY, 1),
        (socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1),
    ]
    asked += [(socket.SOL_SOCKET, socket.SO_OOBINLINE, 1)]
    asked += [(socket.IPPROTO_TCP, option, value) for option, value in KEEPALIVE]
    asked += [(socket.IPPROTO_TCP, NOTSENT_LOWAT, MOST_UNSENT)]
    found = []

    def welcome(sock, address, seat):
        found.extend((level, option, sock.getsockopt(level, option)) for level, option, _ in asked)

    port.listener._welcome = welcome
    port.visit().recv(1)
    assert found == asked


def test_connection_is_handed_over_when_its_peer_leaves(port):
    visitor, connection = port.meet()
    visitor.close()
    assert connection.was_ready.wait(TIMEOUT)
    assert connection.duplex.receive() == b""


def test_connection_that_was_handed_over_is_not_watched_any_more(port):
    visitor, connection = port.meet()
    visitor.send(b"x")
    assert connection.was_ready.wait(TIMEOUT)
    connection.was_ready.clear()
    visitor.send(b"y")
    other_visitor, other = port.meet()  # the listener has looked at its sockets again
    assert not connection.was_ready.is_set() and not connection.has_expired.is_set()


def test_parked_again_it_is_handed_over_again(port):
    visitor, connection = port.meet()
    for _ in range(3):
        visitor.send(b"x")
        assert connection.was_ready.wait(TIMEOUT)
        assert connection.duplex.receive() == b"x"
        connection.was_ready.clear()
        port.listener.park(connection, TIMEOUT)
    assert not connection.has_expired.is_set()


def test_a_brief_step_needs_no_worker(port):
    visitor, connection = port.meet()
    connection.brief = True
    port.listener._workers.submit = None
    visitor.send(b"x")
    assert connection.was_ready.wait(TIMEOUT)


def test_what_was_read_from_the_socket_but_not_used_counts_as_come(port):
    """TLS may hold bytes that no selector sees."""
    visitor, connection = port.meet()
    visitor.send(b"x")
    assert connection.was_ready.wait(TIMEOUT)
    connection.was_ready.clear()
    connection.duplex.unread(connection.duplex.receive())
    port.listener.park(connection, TIMEOUT)
    assert connection.was_ready.is_set()


def test_silence_expires():
    with Port(first_timeout=0.1) as port:
        _, connection = port.meet()
        assert connection.has_expired.wait(TIMEOUT)
        assert not connection.was_ready.is_set()


def test_parked_for_a_time_it_expires_then(port):
    visitor, connection = port.meet()
    visitor.send(b"x")
    assert connection.was_ready.wait(TIMEOUT)
    connection.duplex.receive()
    port.listener.park(connection, 0.1)
    assert connection.has_expired.wait(TIMEOUT)


def test_who_is_late_expires_although_a_byte_has_just_come(port):
    visitor, connection = port.meet()
    visitor.send(b"x")
    assert connection.was_ready.wait(TIMEOUT)
    connection.was_ready.clear()
    port.listener.park(connection, 0)
    assert connection.has_expired.wait(TIMEOUT) and not connection.was_ready.is_set()


def test_one_that_broke_while_it_was_out_is_handed_over(port):
    visitor, connection = port.meet()
    visitor.send(b"x")
    assert connection.was_ready.wait(TIMEOUT)
    connection.was_ready.clear()
    connection.duplex.receive()
    connection.duplex.stop()
    port.listener.park(connection, TIMEOUT)
    assert connection.was_ready.wait(TIMEOUT)


# Limits and the end ------------------------------------------------------------------------------


def test_one_too_many_is_closed_until_another_leaves():
    with Port(limit=2) as port:
        port.meet()
        port.meet()
        surplus = port.visit()
        assert surplus.recv(1) == b""
        port.seats[0].leave()
        port.meet()
        assert len(port.welcomed) == 3


def test_those_turned_away_are_counted_and_logged_now_and_then(caplog):
    with Port(limit=1) as port:
        port.meet()
        for _ in range(5):
            assert port.visit().recv(1) == b""
        assert lines_about_refusals(caplog) == [(1, 1)]  # at once, so that the operator sees it
        port.listener._said_at -= listener.REFUSALS_SILENCE
        wait_until(lambda: len(lines_about_refusals(caplog)) == 2)  # also when nobody comes
        assert lines_about_refusals(caplog)[1] == (4, 5)
        assert port.listener.refused == 5


def test_one_address_does_not_fill_a_port_and_the_log_names_it(caplog):
    with Port(limit=16, exempt=()) as port:
        for _ in range(2):
            port.meet()
        assert port.visit().recv(1) == b""
        other = socket.create_connection(
            ("127.0.0.1", port.listener.port), TIMEOUT, ("127.0.0.2", 0)
        )
        with other:
            wait_until(lambda: len(port.welcomed) == 3)
        port.seats[0].settle()
        port.meet()
    assert "1 more connections were closed at once, the last from 127.0.0.1 (1 since" in caplog.text


def lines_about_refusals(caplog):
    """What each said: how many since the line before, how many since the start."""
    found = (re.search(r": (\d+) more .* \((\d+) since", line) for line in caplog.messages)
    return [(int(match[1]), int(match[2])) for match in found if match]


def test_many_that_come_at_once_are_all_welcomed():
    count = 3 * listener.ACCEPTS_A_TURN
    with Port(limit=count) as port:
        for _ in range(count):
            port.visit()
        wait_until(lambda: len(port.welcomed) == count)


def test_stop_closes_what_is_parked_and_the_port(port):
    visitor, connection = port.meet()
    port.listener.stop()
    assert connection.was_closed.is_set()
    assert visitor.recv(1) == b""
    with pytest.raises(ConnectionRefusedError):
        port.visit()


def test_stop_accepting_closes_the_port_and_watches_on_what_is_parked(port):
    visitor, connection = port.meet()
    port.listener.stop_accepting()
    with pytest.raises(ConnectionRefusedError):
        port.visit()
    visitor.send(b"x")
    assert connection.was_ready.wait(TIMEOUT)
    assert not connection.was_closed.is_set()


def test_stop_accepting_leaves_the_backlog_to_those_that_share_the_socket(port):
    other = port.listener.sockets[0].dup()
    with other:
        port.listener.stop_accepting()
        with socket.create_connection(("127.0.0.1", port.listener.port)):
            other.setblocking(True)
            other.accept()[0].close()
    assert port.welcomed == []


def test_a_port_accepts_what_waits_at_another_process_socket_until_it_leaves_it_out(port):
    with socket.create_server(("127.0.0.1", 0)) as other:
        address = other.getsockname()
        with socket.create_connection(address), other.dup() as covered:
            assert port.welcomed == []
            port.listener.accept_also([covered])
            wait_until(lambda: len(port.welcomed) == 1)
            port.meet()
            port.listener.leave_out([covered])
            port.listener.leave_out([covered])  # a second time changes nothing
            with socket.create_connection(address):
                port.meet()  # a turn of the thread
                assert len(port.welcomed) == 3
                other.setblocking(True)
                other.accept()[0].close()


def test_a_port_that_pauses_accepts_from_a_covered_socket_when_it_goes_on(port, monkeypatch):
    monkeypatch.setattr(listener, "PAUSE", 0.05)
    with socket.create_server(("127.0.0.1", 0)) as other, other.dup() as covered:
        port.listener._pause()
        port.listener.accept_also([covered])
        with socket.create_connection(other.getsockname()):
            wait_until(lambda: len(port.welcomed) == 1)
        port.meet()
        port.listener._pause()
        port.listener.leave_out([covered])
        port.meet()


def test_a_port_that_accepts_no_more_covers_nothing(port):
    with socket.create_server(("127.0.0.1", 0)) as other, other.dup() as covered:
        port.listener.stop_accepting()
        port.listener.accept_also([covered])
        assert covered not in port.listener.sockets
        port.listener.leave_out([covered])


def test_a_silent_connection_lingers_when_the_listener_accepts_no_more(port, monkeypatch):
    monkeypatch.setattr(listener, "LINGER", 0.05)
    _, silent = port.meet()
    _, begun = port.meet()
    begun.silent = False
    port.listener.stop_accepting()
    assert silent.has_expired.wait(TIMEOUT)
    port.listener.park(silent, TIMEOUT)
    silent.has_expired.clear()
    assert silent.has_expired.wait(TIMEOUT)
    assert not begun.has_expired.is_set()


def test_moves_says_whether_the_thread_takes_turns(port):
    go_on = threading.Event()
    assert port.listener.moves(TIMEOUT)
    port.listener._welcome = lambda sock, address, seat: go_on.wait(TIMEOUT) and None
    port.visit()
    wait_until(lambda: not port.listener.moves(0.05))
    go_on.set()
    assert port.listener.moves(TIMEOUT)


def test_a_stopped_listener_is_not_stuck(port):
    port.listener.stop()
    began = time.monotonic()
    assert port.listener.moves(TIMEOUT)
    assert time.monotonic() - began < TIMEOUT / 2  # a health check does not wait for it


def test_who_is_parked_after_the_end_is_closed(port):
    visitor, connection = port.meet()
    visitor.send(b"x")
    assert connection.was_ready.wait(TIMEOUT)
    connection.duplex.receive()
    port.listener.stop()
    assert not connection.was_closed.is_set()
    port.listener.park(connection, TIMEOUT)
    assert connection.was_closed.is_set()


@pytest.mark.parametrize("what", ["_later", "_parked"])
def test_nothing_is_lost_that_comes_while_the_listener_stops(port, what):
    tested = port.listener
    stopping = threading.Thread(target=tested.stop)

    def stop():
        """The listener found itself running, and is stopped before the entry is there."""
        stopping.start()
        stopping.join(0.2)  # it ends, or waits for us

    class SlowList(list):
        def append(self, entry):
            stop()
            super().append(entry)

    class SlowDict(dict):
        def __setitem__(self, connection, deadline):
            stop()
            super().__setitem__(connection, deadline)

    _, connection = port.meet()
    called = threading.Event()
    if what == "_later":
        tested._later = SlowList()
        tested.call_later(connection, called.set, TIMEOUT)
        assert called.wait(TIMEOUT)
    else:
        tested._parked = SlowDict(tested._parked)
        silent, parked = socket.socketpair()
        with silent:
            other = Parked(parked, ("127.0.0.1", 1))
            tested.park(other, TIMEOUT)
            assert other.was_closed.wait(TIMEOUT)
    stopping.join(TIMEOUT)
    assert not stopping.is_alive()


def test_what_is_called_later_takes_the_turn_of_its_address(port):
    """Else slow senders of one address stand before other addresses' claims."""
    keys, tested = [], port.listener
    tested._workers.submit = lambda function, key=None: (keys.append(key), function())
    called = [threading.Event() for _ in range(3)]
    connections = [Parked(socket.socket(), (f"192.0.2.{n}", 1)) for n in range(3)]
    for n in range(2):
        tested.call_later(connections[n], called[n].set, 0)
        assert called[n].wait(TIMEOUT)
    tested.stop()
    tested.call_later(connections[2], called[2].set, TIMEOUT)
    assert called[2].is_set()
    assert keys == [counted_by(connection.address[0]) for connection in connections]
    for connection in connections:
        connection.close()


def test_one_that_the_workers_no_longer_take_is_closed():
    workers = Workers()
    tested = Listener("test", bind("X_PORT", LOCAL, 0), None, workers, Places(1), 1)
    workers.over = True
    for timeout in (0, -1):
        connection = Parked(socket.socket(), ("127.0.0.1", 1))
        tested.park(connection, timeout)
        assert connection.was_closed.is_set() and not connection.has_expired.is_set()
    tested.stop()
    with pytest.raises(Stopped):  # for the caller, which has the connection
        tested.call_later(connection, connection.ready, 1)


@pytest.mark.parametrize(
    ("number", "advice"),
    [
        (errno.EMFILE, "; raise the limit (ulimit -n)"),
        (errno.ENFILE, "; raise the limit (sysctl fs.file-max)"),
        (errno.ENOBUFS, ""),
    ],
)
def test_a_port_that_cannot_accept_says_for_how_long_and_what_helps(caplog, number, advice):
    class Listening:
        def accept(self):
            raise OSError(number, "no more")

    tested = Listener("test", bind("X_PORT", LOCAL, 0), None, Workers(), Places(1), 1)
    tested._pause = lambda: None
    for _ in range(3):
        tested._accept(Listening())
    tested.stop()
    assert tested.starved == 3
    (record,) = caplog.records  # said once
    assert record.getMessage() == (
        f"port test: cannot accept: no more; connections wait, next tries every 0.2 s{advice}"
    )


def test_a_port_goes_on_after_a_bug_and_says_so(monkeypatch, caplog):
    monkeypatch.setattr(listener, "PAUSE", 0.01)
    with Port() as port:
        welcome = port.listener._welcome

        def fail(sock, address, seat):
            port.listener._welcome = welcome
            raise RuntimeError("a bug in the welcome")

        port.listener._welcome = fail
        assert port.visit().recv(1) == b""  # and the socket is not left open
        port.meet()
        assert port.places.taken == 1
    assert "port test: an unexpected error" in caplog.text
    assert "a bug in the welcome" in caplog.text and "Traceback" in caplog.text


def test_one_that_never_started_can_be_stopped():
    sockets = bind("X_PORT", LOCAL, 0)
    Listener("test", sockets, None, None, Places(1), 1).stop()
    assert sockets[0].fileno() == -1


def test_process_may_have_as_many_descriptors_as_the_system_says():
    assert listener.descriptor_limit() > 2
