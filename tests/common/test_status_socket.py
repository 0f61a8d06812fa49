"""The status socket: who is answered and how, whose file it is, what the asker says otherwise."""

import contextlib
import json
import logging
import os
import socket
import stat
import threading
import time
from pathlib import Path

import pytest
from support import TIMEOUT, wait_until

from gotunnel import __version__
from gotunnel_agent.common import show_status, status_page, status_socket
from gotunnel_agent.common.status_socket import ASK, MAX_PATH, NoAnswer, StatusSocket, ask

PROGRAM = "gotunnel-test"


@pytest.fixture
def path(tmp_path):
    """A place for a socket, with a path that is short enough."""
    os.chdir(tmp_path)
    return "status.sock"


@pytest.fixture(autouse=True)
def back():
    before = os.getcwd()
    yield
    os.chdir(before)


@pytest.fixture
def started():
    """A function that starts a StatusSocket and waits until it answers; all end with the test."""
    sockets = []

    def start(path, tell=lambda: {"state": "serving"}, ready=True):
        before = set(threading.enumerate())
        sockets.append(StatusSocket(path, PROGRAM, tell, "STATUS_SOCKET"))
        sockets[-1].start()
        threads.update(set(threading.enumerate()) - before)
        if ready:
            wait_until(lambda: os.path.exists(path))
        return sockets[-1]

    threads = set()
    yield start
    for each in sockets:
        each.close()
    for thread in threads:
        thread.join(TIMEOUT)
        assert not thread.is_alive()


def refusal(*places):
    with pytest.raises(NoAnswer) as caught:
        ask(places, PROGRAM)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_an_asker_gets_the_programs_answer(path, started):
    started(path, lambda: {"state": "draining", "visits": {"running": 3}})
    answer = ask([path], PROGRAM)
    assert (answer["state"], answer["visits"]) == ("draining", {"running": 3})
    assert (answer["program"], answer["version"], answer["pid"]) == (
        PROGRAM, __version__, os.getpid()
    )  # fmt: skip
    assert 0 <= answer["uptime_seconds"] < TIMEOUT


def test_the_sockets_file_is_for_its_user_alone(path, started):
    started(path)
    assert stat.S_IMODE(os.lstat(path).st_mode) == 0o600
    assert os.listdir() == [path]


def test_the_file_goes_when_the_program_stops(path, started):
    started(path).close()
    assert not os.path.exists(path)
    assert f"there is no socket {path}" in refusal(path)


def test_a_socket_that_a_dead_process_left_is_replaced(path, started):
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(path)
    assert "was left by a process that has ended" in refusal(path)
    started(path, ready=False)
    wait_until(lambda: answers(path))


def answers(path):
    try:
        return ask([path], PROGRAM)
    except NoAnswer:
        return None


def test_a_living_processs_socket_is_left_alone_and_taken_over_after_its_end(
    path, started, caplog, monkeypatch
):
    monkeypatch.setattr(status_socket, "RETRY", 0.05)
    first = started(path, lambda: {"state": "first"})
    started(path, lambda: {"state": "second"}, ready=False)
    wait_until(lambda: "another process answers there" in caplog.text)
    assert ask([path], PROGRAM)["state"] == "first"
    first.close()
    wait_until(lambda: (answers(path) or {}).get("state") == "second")
    assert caplog.text.count("another process answers there") == 1


def test_a_stopped_process_removes_only_its_own_file(path, started):
    first = started(path)
    os.unlink(path)
    started(path)
    first.close()
    assert os.path.exists(path)


def test_a_file_that_is_no_socket_is_left_alone(path, started, caplog):
    Path(path).write_text("precious")
    started(path, ready=False)
    wait_until(lambda: f"STATUS_SOCKET {path}: a file that is no socket" in caplog.text)
    assert "or STATUS_SOCKET names another path" in caplog.text
    assert Path(path).read_text() == "precious"


def test_too_long_a_path_is_taken_from_the_working_folder_where_that_is_short(
    tmp_path, monkeypatch
):
    folder = tmp_path / ("d" * MAX_PATH)
    folder.mkdir()
    monkeypatch.chdir(folder)
    path = str(folder / "status.sock")
    status_socket.listen(status_socket.address(path)).close()
    assert status_socket.address(path) == "status.sock" and os.path.exists(path)
    assert status_socket.why_not(path) is None


def test_too_long_a_path_is_one_clear_line(tmp_path, started, caplog):
    long = str(tmp_path / ("x" * MAX_PATH))
    started(long, ready=False)
    (record,) = caplog.records
    assert f"a unix socket's may have {MAX_PATH}" in record.getMessage()
    assert f"a unix socket's may have {MAX_PATH}" in refusal(long)


def test_a_folder_that_is_not_there_is_one_clear_line(tmp_path, started, caplog):
    started(str(tmp_path / "no" / "s"), ready=False)
    wait_until(lambda: "No such file or directory" in caplog.text)


@pytest.mark.parametrize("said", [b"", b"GET / HTTP/1.1\r\n\r\n", b"x" * 100_000])
def test_rubbish_gets_no_answer_and_stops_nothing(path, started, said):
    started(path)
    with socket.socket(socket.AF_UNIX) as peer:
        peer.connect(path)
        peer.settimeout(TIMEOUT)
        try:
            peer.sendall(said)
            peer.shutdown(socket.SHUT_WR)
            assert peer.recv(10) == b""
        except OSError:
            pass  # closed in the middle of the rubbish
    assert ask([path], PROGRAM)["state"] == "serving"


@pytest.mark.parametrize("said", [b"", ASK[:3]], ids=["nothing", "half a line"])
def test_an_asker_that_says_nothing_holds_the_thread_for_a_while_only(
    path, started, said, monkeypatch
):
    monkeypatch.setattr(status_socket, "PEER_TIMEOUT", 0.1)
    started(path)
    with socket.socket(socket.AF_UNIX) as peer:
        peer.connect(path)
        peer.sendall(said)
        assert ask([path], PROGRAM)["state"] == "serving"


def test_an_asker_that_does_not_read_holds_the_thread_for_a_while_only(path, started, monkeypatch):
    monkeypatch.setattr(status_socket, "PEER_TIMEOUT", 0.1)
    started(path, lambda: {"state": "serving", "much": "x" * 2_000_000})
    with socket.socket(socket.AF_UNIX) as peer:
        peer.connect(path)
        peer.sendall(ASK)
        assert len(ask([path], PROGRAM)["much"]) == 2_000_000


def test_a_bug_in_the_answer_is_logged_and_the_next_asker_is_answered(path, started, caplog):
    told = [{"state": "serving"}, {}]
    started(path, lambda: {"state": told.pop()["state"]})
    assert "the answer is no status" in refusal(path)
    assert ask([path], PROGRAM)["state"] == "serving"
    assert "bug, traceback follows" in caplog.text


def fake(path, *said, close=True):
    """A process that answers something else, once."""
    listening = socket.socket(socket.AF_UNIX)
    listening.bind(path)
    listening.listen()

    def serve():
        with listening, listening.accept()[0] as peer:
            peer.recv(100)
            for part in said:
                peer.sendall(part)
            if not close:
                release.wait(TIMEOUT)

    release = threading.Event()
    thread = threading.Thread(target=serve)
    thread.start()

    def end():
        release.set()
        thread.join(TIMEOUT)

    return end


@pytest.mark.parametrize(
    "said, expected",
    [
        (b"", "the answer is no status"),
        (b"220 smtp ready\r\n", "the answer is no status"),
        (b"[" * 100_000, "the answer is no status"),
        (b'{"status": 1}', "the answer is no status"),
        (b'{"format": 2, "program": "gotunnel-test", "version": "9.0"}', "has version 9.0"),
        (b'{"format": 1, "program": "gotunnel-agent"}', "gotunnel-agent answers there"),
        (b'{"format": 1, "program": "a\\nb"}', "a\\\\nb answers there"),
    ],
)
def test_another_answer_is_one_clear_line(path, said, expected):
    end = fake(path, said)
    assert expected.replace("\\\\", "\\") in refusal(path)
    end()


def test_a_process_that_does_not_answer_is_one_clear_line(path, monkeypatch):
    monkeypatch.setattr(status_socket, "ASK_TIMEOUT", 0.1)
    end = fake(path, b"{", close=False)
    began = time.monotonic()
    assert "no answer in 0.1 s" in refusal(path)
    assert time.monotonic() - began < TIMEOUT
    end()


def test_an_endless_answer_is_cut(path, monkeypatch):
    monkeypatch.setattr(status_socket, "MOST_ANSWER", 1000)
    end = fake(path, b'{"format": 1, "x": "' + b"x" * 2000)
    assert "the answer is no status" in refusal(path)
    end()


@pytest.fixture
def full(path):
    """A socket whose queue is full: its program accepts nobody."""
    with socket.socket(socket.AF_UNIX) as listening, contextlib.ExitStack() as stack:
        listening.bind(path)
        listening.listen(0)
        while True:
            waits = stack.enter_context(socket.socket(socket.AF_UNIX))
            waits.setblocking(False)
            try:
                waits.connect(path)
            except BlockingIOError:
                yield listening
                break


def test_a_queue_that_is_full_is_waited_for_and_then_one_clear_line(path, full, monkeypatch):
    monkeypatch.setattr(status_socket, "ASK_TIMEOUT", 0.1)
    said = refusal(path)
    assert (
        said == f"{path}: others wait for answers, too, and in 0.1 s no place was free; ask again"
    )
    monkeypatch.setattr(status_socket, "ASK_TIMEOUT", TIMEOUT)
    monkeypatch.setattr(status_socket, "_read", lambda data, *rest: data)
    full.setblocking(False)
    over = threading.Event()

    def serve():
        while not over.wait(0.05):
            with contextlib.suppress(BlockingIOError):
                full.accept()[0].close()

    thread = threading.Thread(target=serve)
    thread.start()
    assert ask([path], PROGRAM) == b""
    over.set()
    thread.join(TIMEOUT)


def test_a_queue_that_is_full_is_a_living_processs(path, full):
    with pytest.raises(status_socket.PlaceTaken, match="another process answers there"):
        status_socket.listen(path)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user here")
def test_an_asker_without_rights_is_told_so(path, started, tmp_path):
    started(path)
    for folder in (tmp_path, *tmp_path.parents[:-2]):
        os.chmod(folder, os.stat(folder).st_mode | 0o011)
    child = os.fork()
    if child == 0:
        try:
            os.setuid(65534)
            try:
                ask([path], PROGRAM)
            except NoAnswer as error:
                os._exit(0 if "permission denied; ask as the user" in str(error) else 2)
        finally:
            os._exit(3)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_the_first_place_with_a_living_process_answers(path, started):
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind("dead.sock")
    started(path)
    assert ask(["missing.sock", "dead.sock", path], PROGRAM)["state"] == "serving"


def test_a_place_that_cannot_be_asked_does_not_hide_the_next(path, started):
    end = fake("strange.sock", b"220 smtp ready\r\n")
    started(path)
    assert ask(["strange.sock", path], PROGRAM)["state"] == "serving"
    end()


def test_exit_status_says_whether_it_serves(path, started, capsys):
    state = ["serving"]
    started(path, lambda: {"state": state[0], "sessions": [{"agent": "office"}]})
    assert show_status.show_status([path], PROGRAM, as_json=True) == 0
    assert json.loads(capsys.readouterr().out)["sessions"] == [{"agent": "office"}]
    state[0] = "draining"
    assert show_status.show_status([path], PROGRAM, as_json=False) == 1
    assert "draining" in capsys.readouterr().out
    assert show_status.show_status(["none.sock"], PROGRAM, as_json=False) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith(f"{PROGRAM}: not running here")


def test_a_place_whose_folder_cannot_be_had_is_passed_over(tmp_path):
    first, second = f"{tmp_path}/no/p/s", f"{tmp_path}/p/s"
    assert status_socket.usable([first, second]) == second
    assert stat.S_IMODE(os.stat(tmp_path / "p").st_mode) == 0o700


def test_the_page_is_a_table_for_people():
    page = status_page.render(
        {
            "format": 1,
            "version": "0.1",
            "uptime_seconds": 93_784,
            "started_at": 0,
            "visits": {"running": 2},
            "sessions": [
                {"agent": "office\x1b[2J", "connected_seconds": 59, "up": True, "reason": ""},
                {"agent": "", "connected_seconds": None, "up": False, "reason": "a\nb"},
            ],
            "hostnames": [],
        },
        "0.2",
    )
    assert page.splitlines() == [
        "version               0.1",
        "uptime                1 d 2 h",
        "started               1970-01-01 00:00 UTC",
        "visits running        2",
        "(this command has version 0.2)",
        "",
        "sessions:",
        "  AGENT          CONNECTED  UP",
        "  office\\x1b[2J  59 s       yes",
        "  -              -          no",
        "    a b",
        "",
        "hostnames:",
        "  none",
    ]


logging.getLogger("gotunnel.status_socket").setLevel(logging.DEBUG)
