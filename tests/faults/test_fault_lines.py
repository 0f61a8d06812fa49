"""The proxy of the fault bench does what its scripts say."""

import socket
import time

import pytest
from fault_lines import (
    ALTERING,
    BACK,
    CORRUPT,
    CUT,
    DELAY,
    END,
    HALVE,
    KINDS,
    LONGEST_DELAY,
    OUT,
    SPLIT,
    SWALLOW,
    Deck,
    Line,
    Script,
)
from support import Origin, Wire, wait_until


class Fixed:
    """A deck that has one script for all connections."""

    def __init__(self, script):
        self._script = script

    def draw(self):
        return self._script


@pytest.fixture
def through():
    """A function that makes a connection through a line with a script: both ends, and the line."""
    opened = []

    def connect(script):
        line = Line("tested", Fixed(script))
        opened.append(line.__enter__())
        origin = Origin()
        opened.append(origin)
        line.upstream, line.active = origin.port, True
        near = Wire(socket.create_connection(("127.0.0.1", line.port)))
        opened.append(near)
        return near, origin.accept(), line

    yield connect
    for each in reversed(opened):
        each.__exit__(None, None, None)


def test_without_a_fault_bytes_and_half_closes_pass(through):
    near, far, line = through(Script())
    data = bytes(range(256)) * 4000
    near.send(data)
    near.finish()
    assert far.read_to_end() == data
    far.send(data)
    far.close()
    assert near.read_to_end() == data
    assert not line.count_faults()


def test_a_reset_passes(through):
    near, far, line = through(Script())
    near.send(b"x")
    far.read_exactly(1)
    near.reset()
    with pytest.raises(ConnectionResetError):
        far.read()


@pytest.mark.parametrize("way", [OUT, BACK])
def test_cut_resets_both_sides_after_so_many_bytes(through, way):
    near, far, line = through(Script(CUT, way, 5))
    source = near if way == OUT else far
    source.send(b"123456789")
    for end in (near, far):
        with pytest.raises(ConnectionResetError):
            while end.read():
                pass
    assert line.count_faults() == {CUT: 1}


def test_end_lets_both_sides_see_an_orderly_end(through):
    near, far, line = through(Script(END, OUT, 5))
    near.send(b"123456789")
    assert far.read_to_end() == b"12345"
    assert near.read_to_end() == b""
    near.send(b"nobody reads this")  # and nobody resets it


def test_delay_holds_bytes_for_a_while(through):
    near, far, line = through(Script(DELAY, OUT, 1, 0.1))
    began = time.monotonic()
    near.send(b"123456789")
    assert far.read_exactly(9) == b"123456789"
    assert time.monotonic() - began >= 0.1 * LONGEST_DELAY


def test_split_passes_all_in_small_pieces(through):
    near, far, line = through(Script(SPLIT, OUT, 1))
    data = bytes(range(256)) * 20
    near.send(data)
    assert far.read_exactly(len(data)) == data
    assert line.count_faults() == {SPLIT: 1}


def test_halve_loses_half_of_what_came_and_goes_on(through):
    near, far, line = through(Script(HALVE, OUT, 0))
    near.send(b"12345678")
    assert far.read_exactly(4) == b"1234"
    near.send(b"abc")
    assert far.read_exactly(3) == b"abc"


def test_corrupt_flips_one_bit_of_the_byte_that_is_due(through):
    near, far, line = through(Script(CORRUPT, OUT, 2, 0.3))
    near.send(b"000000")
    assert far.read_exactly(6) == b"00" + bytes([ord("0") ^ 1 << 2]) + b"000"


def test_swallow_drops_what_comes_but_not_the_end(through):
    near, far, line = through(Script(SWALLOW, OUT, 3))
    near.send(b"123456789")
    assert far.read_exactly(3) == b"123"
    far.send(b"the way back works")
    assert near.read_exactly(18) == b"the way back works"
    near.send(b"more")
    near.finish()
    assert far.read_to_end() == b""


def test_a_connection_is_known_by_its_ports_and_knows_its_fault(through):
    near, far, line = through(Script(CORRUPT, BACK, 0))
    since = time.monotonic()
    from_near = line.connection_from(near.sock.getsockname()[1])
    assert from_near is line.connection_to(far.sock.getpeername()[1])
    assert not from_near.altered and not line.altered_since(since)
    far.send(b"x")
    near.read_exactly(1)
    assert from_near.altered and from_near.shortened and line.altered_since(since)


def test_no_fault_begins_while_the_line_is_not_active(through):
    near, far, line = through(Script(CUT, OUT, 3))
    line.active = False
    near.send(b"123456789")
    assert far.read_exactly(9) == b"123456789"


def test_a_line_without_an_upstream_resets():
    with Line("tested", Fixed(Script())) as line:
        with socket.create_connection(("127.0.0.1", line.port)) as near:
            with pytest.raises(ConnectionResetError):
                near.recv(1)


def test_a_closed_connection_is_forgotten_by_its_line(through):
    near, far, line = through(Script())
    near.close()
    assert far.read_to_end() == b""
    far.close()
    wait_until(lambda: not line._connections)


def test_the_same_seed_draws_the_same_scripts():
    drawn = [
        [deck.draw() for _ in range(100)]
        for deck in (Deck(seed, "line", share=0.5, most=1000) for seed in (1, 1, 2))
    ]
    assert drawn[0] == drawn[1] != drawn[2]


def test_each_kind_of_fault_comes_as_often_in_both_directions():
    deck = Deck(1, "line", share=1, most=1000)
    drawn = [deck.draw() for _ in range(10 * 2 * len(KINDS))]
    counts = {(each.kind, each.way) for each in drawn}
    assert counts == {(kind, way) for kind in KINDS for way in (OUT, BACK)}
    assert sum(each.kind in ALTERING for each in drawn) == 10 * 2 * len(ALTERING)
    assert {len(str(each.after)) for each in drawn} >= {2, 3}
