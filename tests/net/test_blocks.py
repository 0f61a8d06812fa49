"""Which addresses are blocked, until when, and what a restart keeps. The clocks are the test's."""

import json
import threading

import pytest

from gotunnel_server.net import blocks as blocks_module
from gotunnel_server.net.blocks import (
    FILE,
    MOST,
    Blocks,
    Refused,
    network_of,
    overlaps,
    read_network,
)


class Time:
    def __init__(self):
        self.now, self.clock = 1000.0, 5e9

    def pass_(self, seconds):
        self.now += seconds
        self.clock += seconds


@pytest.fixture
def time():
    return Time()


def made(time, folder=None):
    return Blocks(folder, lambda: time.now, lambda: time.clock)


def block(blocks, text, seconds=60):
    return blocks.add(read_network(text), seconds, "why", "192.0.2.99")


@pytest.mark.parametrize(
    ("text", "shown", "blocked", "free"),
    [
        ("192.0.2.7", "192.0.2.7", ["192.0.2.7", "::ffff:192.0.2.7"], ["192.0.2.8", "::192.0.2.7"]),
        ("::ffff:192.0.2.7", "192.0.2.7", ["192.0.2.7"], ["192.0.2.6"]),
        ("10.1.0.0/16", "10.1.0.0/16", ["10.1.255.255"], ["10.2.0.0", "9.255.0.1"]),
        ("2001:db8::7", "2001:db8::/64", ["2001:db8::", "2001:db8::ffff:1"], ["2001:db8:0:1::"]),
        ("2001:db8::/32", "2001:db8::/32", ["2001:db8:1:2::3"], ["2001:db9::", "32.1.13.184"]),
        (" 192.0.2.0/30 ", "192.0.2.0/30", ["192.0.2.3"], ["192.0.2.4", "", "nonsense", "a.b"]),
    ],
)
def test_what_a_block_covers(time, text, shown, blocked, free):
    blocks = made(time)
    assert block(blocks, text).address == shown
    assert all(host in blocks for host in blocked)
    assert not any(host in blocks for host in free)
    assert blocks.remove(read_network(text)).address == shown
    assert not any(host in blocks for host in blocked) and not blocks.table


@pytest.mark.parametrize(
    "text", ["", "x", "0.0.0.0/0", "10.0.0.0/7", "::/0", "2001::/18", "192.0.2.1/24", "1.2.3.4/33",
             "fe80::1%eth0", "192.0.2.1\n8.8.8.8", "9" * 5000, "127.1", "0x7f.0.0.1"],
)  # fmt: skip
def test_what_cannot_be_blocked_is_refused_in_a_line(text):
    with pytest.raises(Refused) as refused:
        read_network(text)
    assert "expected" in str(refused.value)
    assert len(str(refused.value)) < 200 and "\n" not in str(refused.value)


def test_a_block_ends_by_itself_and_then_costs_nothing(time):
    blocks = made(time)
    block(blocks, "192.0.2.7", 60)
    block(blocks, "192.0.2.8", 90)
    time.pass_(59)
    assert "192.0.2.7" in blocks
    time.pass_(1)
    assert "192.0.2.7" not in blocks and [each.address for each in blocks.all()] == ["192.0.2.8"]
    time.pass_(30)
    assert "192.0.2.8" not in blocks and blocks.table == {}


def test_a_clock_that_jumps_changes_no_block(time):
    blocks = made(time)
    block(blocks, "192.0.2.7", 60)
    time.clock -= 1e6
    time.now += 59
    assert "192.0.2.7" in blocks
    time.clock += 1e9
    assert "192.0.2.7" in blocks


def test_a_block_is_told_and_kept_by_the_clock_as_it_was_set(time, tmp_path):
    """As at the start of a machine that asks for the time by network."""
    blocks = made(time, tmp_path)
    time.clock = 60.0
    block(blocks, "192.0.2.7", 600)
    time.pass_(10)
    time.clock = 5e9
    assert [each.until for each in blocks.all()] == [5e9 + 590]
    block(blocks, "192.0.2.8", 600)
    assert len(made(time, tmp_path).all()) == 2


def test_a_block_that_is_set_again_has_the_new_end(time):
    blocks = made(time)
    block(blocks, "192.0.2.7", 60)
    block(blocks, "192.0.2.7", 3600)
    time.pass_(100)
    assert "192.0.2.7" in blocks and len(blocks.all()) == 1


def test_blocks_are_bounded(time, monkeypatch):
    monkeypatch.setattr(blocks_module, "MOST_BLOCKS", 2)
    blocks = made(time)
    for host in ("192.0.2.1", "192.0.2.2", "192.0.2.1"):
        block(blocks, host)
    with pytest.raises(Refused, match="2 addresses are blocked already"):
        block(blocks, "192.0.2.3")
    time.pass_(60)
    block(blocks, "192.0.2.3")
    assert [each.address for each in blocks.all()] == ["192.0.2.3"]


def test_a_restart_keeps_blocks_for_the_rest_of_their_time(time, tmp_path):
    blocks = made(time, tmp_path / "cache")
    for host, seconds in (("192.0.2.1", 60), ("2001:db8::1", 3600), ("10.0.0.0/8", 600)):
        block(blocks, host, seconds)
    blocks.remove(read_network("10.0.0.0/8"))
    assert (tmp_path / "cache" / FILE).stat().st_mode & 0o777 == 0o600
    time.clock += 100
    time.now = 5.0  # another boot
    again = made(time, tmp_path / "cache")
    (kept,) = again.all()
    assert (kept.address, kept.reason, kept.by) == ("2001:db8::/64", "why", "192.0.2.99")
    time.pass_(3499)
    assert "2001:db8::2" in again
    time.pass_(1)
    assert "2001:db8::2" not in again


@pytest.mark.parametrize(
    "text",
    ["", "{}", "[]", "null", '{"blocks": 5}', '{"blocks": [5]}', '{"blocks": [{"network": "x"}]}',
     '{"blocks": [{"network": "1.2.3.4", "until": true, "reason": "", "by": ""}]}', "[" * 10000],
)  # fmt: skip
def test_a_file_that_makes_no_sense_is_left_alone(time, tmp_path, caplog, text):
    (tmp_path / FILE).write_text(text)
    assert made(time, tmp_path).all() == []
    assert "cannot be read" in caplog.text


def test_a_block_from_another_clock_does_not_last_for_ever(time, tmp_path):
    entry = {"network": "1.2.3.4", "until": 1e300, "reason": "", "by": ""}
    (tmp_path / FILE).write_text(json.dumps({"blocks": [entry]}))
    blocks = made(time, tmp_path)
    assert "1.2.3.4" in blocks
    time.pass_(MOST)
    assert "1.2.3.4" not in blocks


def test_a_folder_that_cannot_be_written_costs_only_the_memory_of_it(time, tmp_path, caplog):
    (tmp_path / "file").write_text("")
    blocks = made(time, tmp_path / "file")
    block(blocks, "192.0.2.7")
    assert "192.0.2.7" in blocks and "a restart forgets what is blocked" in caplog.text


def test_networks_overlap_within_one_family():
    ours = [read_network("10.0.0.0/8"), read_network("2001:db8::/32")]
    assert overlaps(read_network("10.2.3.4"), ours)
    assert overlaps(read_network("2001:db8::1"), ours)
    assert not overlaps(read_network("11.2.3.4"), ours)
    assert not overlaps(read_network("10.2.3.4"), [])
    assert network_of("fe80::1%eth0") == read_network("fe80::1") and network_of("") is None


def test_threads_that_block_at_once_leave_all_blocks(time, tmp_path):
    """The file is that of the last one."""
    blocks = made(time, tmp_path)
    threads = [
        threading.Thread(target=block, args=(blocks, f"192.0.2.{number}")) for number in range(20)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(blocks.all()) == len(made(time, tmp_path).all()) == 20
