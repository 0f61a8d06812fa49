"""A file of lines that costs no thread time: rotation, a full disk, a pipe that nobody reads."""

import os
import shutil
import subprocess
import sys
import threading
import time

import pytest
from support import GATEWAY_HOST, gateway_here, need, wait_until

from gotunnel_server.visitors import log_file as log_file_module
from gotunnel_server.visitors.log_file import LogFile, LogFileError

AT_ONCE = 5  # seconds, on a busy machine; to wait for the file would take for ever
LINE = "x" * 999


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(log_file_module, "GATHER", 0.01)


@pytest.fixture
def opened():
    """Makes LogFiles, and stops them at the end."""
    files = []

    def open_(path):
        files.append(LogFile("ACCESS_LOG", str(path)))
        files[-1].start()
        return files[-1]

    yield open_
    for file in files:
        file.stop(AT_ONCE)


def fill(file, lines=2 * log_file_module.MOST_WAITING // 1000):
    """Write more than the queue holds, and see that it takes no time."""
    began = time.monotonic()
    for _ in range(lines):
        file.write(LINE)
    assert time.monotonic() - began < 5 * AT_ONCE
    return lines


def test_lines_arrive_in_order_and_the_last_ones_at_the_end(tmp_path, opened):
    path = tmp_path / "a.log"
    file = opened(path)
    for number in range(1000):
        file.write(str(number))
    file.stop(AT_ONCE)
    assert path.read_text() == "".join(f"{number}\n" for number in range(1000))
    assert (file.dropped, file.waiting) == (0, 0)
    assert path.stat().st_mode & 0o007 == 0  # not for everybody


def test_what_is_there_is_kept(tmp_path, opened):
    path = tmp_path / "a.log"
    path.write_text("old\n")
    opened(path).write("new")
    wait_until(lambda: path.read_text() == "old\nnew\n")


@pytest.mark.parametrize("how", ["renamed", "removed", "renamed, and made anew"])
def test_a_file_that_was_moved_away_is_opened_anew(tmp_path, opened, how):
    path, old = tmp_path / "a.log", tmp_path / "a.log.1"
    file = opened(path)
    file.write("1")
    wait_until(lambda: path.read_text() == "1\n")
    path.unlink() if how == "removed" else path.rename(old)
    if "anew" in how:
        path.write_text("")
    file.write("2")
    wait_until(lambda: path.exists() and path.read_text() == "2\n")


def test_a_truncated_file_has_no_hole(tmp_path, opened):
    """As logrotate's copytruncate does it."""
    path = tmp_path / "a.log"
    file = opened(path)
    file.write("a long line")
    wait_until(path.read_text)
    os.truncate(path, 0)
    file.write("2")
    wait_until(lambda: path.read_text() == "2\n")


def test_logrotate_with_its_signal_loses_no_line(tmp_path, opened):
    path, state = tmp_path / "a.log", tmp_path / "state"
    conf = tmp_path / "conf"
    conf.write_text(f'"{path}" {{\n rotate 9\n size 1\n nocompress\n create\n su root root\n}}\n')
    conf.chmod(0o600)
    file = opened(path)
    for number in range(30):
        file.write(f"{number}")
        if number % 10 == 9:
            wait_until(lambda: file.waiting == 0)
            subprocess.run([need("logrotate"), "-f", "-s", str(state), str(conf)], check=True)
            file.reopen()
    file.stop(AT_ONCE)
    found = "".join(part.read_text() for part in tmp_path.glob("a.log*"))
    assert sorted(map(int, found.split())) == list(range(30))


def test_a_folder_that_goes_and_comes_back_costs_lines_that_are_said(tmp_path, opened, caplog):
    folder = tmp_path / "logs"
    folder.mkdir()
    file = opened(folder / "a.log")
    shutil.rmtree(folder)
    file.write("lost")
    wait_until(lambda: file.dropped == 1)
    wait_until(lambda: "ACCESS_LOG: 1 lines were dropped: No such file or directory" in caplog.text)
    folder.mkdir()
    file.write("kept")
    wait_until(lambda: (folder / "a.log").exists() and (folder / "a.log").read_text() == "kept\n")


def test_a_full_disk_costs_lines_that_are_counted(opened, caplog):
    file = opened("/dev/full")
    file.write("1")
    file.write("2")
    wait_until(lambda: file.dropped == 2)
    wait_until(lambda: "No space left on device" in caplog.text)


def test_a_part_of_a_line_is_ended_before_the_next_one(tmp_path, opened, monkeypatch):
    path = tmp_path / "a.log"
    file = opened(path)
    write, left = os.write, [5]

    def write_little(number, data):
        if not left[0]:
            raise OSError(28, "No space left on device")
        count = write(number, data[: left[0]])
        left[0] -= count
        return count

    monkeypatch.setattr(log_file_module.os, "write", write_little)
    file.write("0123456789")
    wait_until(lambda: file.dropped == 1)
    left[0] = 1000
    file.write("next")
    wait_until(lambda: path.read_text() == "01234\nnext\n")


@pytest.mark.parametrize("reader", [True, False])
def test_a_pipe_that_nobody_reads_costs_lines_and_no_time(tmp_path, opened, caplog, reader):
    path = tmp_path / "pipe"
    os.mkfifo(path)
    read = os.open(path, os.O_RDONLY | os.O_NONBLOCK) if reader else None
    file = opened(path)
    fill(file)
    assert file.dropped > 0 and file.waiting <= log_file_module.MOST_WAITING
    assert "its file cannot be written at the moment" in caplog.text
    stopped = time.monotonic()
    file.stop(0.1)
    assert time.monotonic() - stopped < AT_ONCE and "its last lines are lost" in caplog.text
    if read is None:
        read = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    os.set_blocking(read, True)
    with open(read, encoding="ascii") as pipe:  # let its thread end
        assert set(pipe.read().split("\n")) == {LINE, ""}


def test_a_pipe_whose_reader_comes_back_gets_lines_again(tmp_path, opened):
    path = tmp_path / "pipe"
    os.mkfifo(path)
    read = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    file = opened(path)
    os.close(read)
    file.write("lost")
    wait_until(lambda: file.dropped == 1)
    read = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    file.write("kept")
    wait_until(lambda: _came(read) == b"kept\n")
    os.close(read)


def _came(read):
    try:
        return os.read(read, 100)
    except BlockingIOError:
        return b""


@pytest.mark.parametrize("path", ["/nowhere/a.log", "/dev/null/a.log"])
def test_a_path_that_cannot_be_opened_is_said_in_one_line(path):
    with pytest.raises(
        LogFileError, match=r"^ACCESS_LOG /.*: cannot be opened \(.*\); name a file in"
    ):
        LogFile("ACCESS_LOG", path)


def test_without_a_standard_output_no_other_descriptor_is_written_to(monkeypatch):
    monkeypatch.setattr(sys, "stdout", None)  # as Python does it after >&-
    with pytest.raises(LogFileError, match="^ACCESS_LOG -: there is no standard output; "):
        LogFile("ACCESS_LOG", "-")


def test_visits_go_on_beside_a_pipe_that_nobody_reads(cache, tmp_path, origin, monkeypatch):
    monkeypatch.setattr(log_file_module, "MOST_WAITING", 2000)
    path = tmp_path / "pipe"
    os.mkfifo(path)
    with gateway_here(cache, ACCESS_LOG=str(path)) as gateway:
        for _ in range(50):
            began = time.monotonic()
            assert gateway.get(GATEWAY_HOST)[0] == 200
            assert time.monotonic() - began < AT_ONCE
        gateway.inner.recording.settle()
        assert gateway.inner.recording.log_file.dropped > 30
        with open(path, encoding="ascii") as pipe:
            threading.Timer(0.2, gateway.inner.stop).start()
            assert pipe.read().count("\n") >= 5


def test_of_a_batch_that_does_not_fit_the_lines_that_do_are_written(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(log_file_module, "MOST_WAITING", 10)
    path = tmp_path / "a.log"
    file = LogFile("ACCESS_LOG", str(path))  # its thread does not run yet
    file.write_all(["12", "34567890", "34", "5"])
    assert (file.dropped, file.waiting) == (1, 8)
    assert "1 lines were dropped" in caplog.text
    file.write_all([])
    file.write("6")
    file.write("7")
    assert file.dropped == 2
    file.start()
    file.stop(AT_ONCE)
    assert path.read_text() == "12\n34\n5\n6\n"
