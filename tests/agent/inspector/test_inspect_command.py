"""`gotunnel inspect` against an inspector of this machine: what it prints, and its exit status."""

import io
import json
import os
import sys
import threading

import pytest
from inspector_samples import a_record
from support import TIMEOUT, Origin, answer, reserved_port, wait_until

from gotunnel_agent import home
from gotunnel_agent.config import Target, Tunnel
from gotunnel_agent.inspector import place as place_module
from gotunnel_agent.inspector import terminal
from gotunnel_agent.inspector.access import Door
from gotunnel_agent.inspector.api import Api
from gotunnel_agent.inspector.ask import Inspector
from gotunnel_agent.inspector.place import Place, places
from gotunnel_agent.inspector.record import Ring
from gotunnel_agent.inspector.replay import Replayer
from gotunnel_agent.inspector.server import InspectorServer, listen
from gotunnel_agent.target import Route

TOKEN = "t" * 43


class Running:
    """An inspector that runs, with a few visits."""

    def __init__(self, folder, origin, port=0):
        self.ring = Ring(1 << 24)
        for record in (
            a_record(path="/page"),
            a_record("POST", "/hook", 500, asked=b'{"a": 1}',
                     fields=["Authorization: Bearer abc.def", "X-Try: 1", "X-Try: 2"]),
        ):  # fmt: skip
            self.ring.add(record)
        tunnel = Tunnel("app.example.com", Target("127.0.0.1", origin.port), "http")
        routes = {tunnel.hostname: Route(tunnel)}
        self.replayer = Replayer(self.ring, lambda: routes)
        told = [{"hostname": hostname} for hostname in routes]
        listening = listen("127.0.0.1", port)
        door = Door(TOKEN, "127.0.0.1", listening.getsockname()[1])
        api = Api(self.ring, door, lambda: {"tunnels": told}, replays=self.replayer)
        self.server = InspectorServer(listening, door, api)
        self.place = Place("127.0.0.1", door.port, TOKEN, os.getpid())
        place_module.write(folder, self.place)
        self.server.start()

    def close(self):
        self.replayer.close()
        self.server.close()


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv(home.STATE, str(tmp_path.parent))
    monkeypatch.setattr(home, "FOLDER", tmp_path.name)
    monkeypatch.setattr(home, "SERVICE_STATE", str(tmp_path / "service"))
    return tmp_path


@pytest.fixture
def running(folder, origin):
    running = Running(folder, origin)
    yield running
    running.close()


def inspect(capsys, *words):
    """The exit status of `gotunnel inspect`, and what it prints on its two outputs."""
    try:
        status = terminal.main(["inspect", *words])
    except SystemExit as end:
        status = end.code
    out, err = capsys.readouterr()
    return status, out, err


# What is shown -----------------------------------------------------------------------------------


@pytest.mark.parametrize("words", [[], ["list"]])
def test_the_latest_visits_are_listed(running, capsys, words):
    status, out, err = inspect(capsys, *words)
    lines = out.splitlines()
    assert status == 0 and len(lines) == 3 and err == ""
    assert lines[0].startswith("ID ") and lines[1].endswith("/page") and lines[2].endswith("/hook")


def test_a_query_chooses_visits(running, capsys):
    assert "/page" not in inspect(capsys, "list", "status:5xx")[1]
    assert inspect(capsys, "list", "status:404") == (0, "", "none of 2 visits fits 'status:404'\n")
    status, _, err = inspect(capsys, "list", "status:teapot")
    assert status == 2 and "status" in err


def test_a_list_says_that_there_are_more(running, capsys):
    assert inspect(capsys, "list", "--limit", "1")[2] == (
        "the latest 1 of 2; --limit shows more\n"
    )  # fmt: skip


@pytest.mark.parametrize("words", [["show", "2"], ["2"], ["2", "--json"], ["show", "2", "--json"]])
def test_a_visit_is_shown(running, capsys, words):
    status, out, _ = inspect(capsys, *words)
    assert status == 0 and "POST /hook" in out and "abc.def" not in out
    if "--json" in words:
        assert json.loads(out)["id"] == 2


def test_secrets_are_shown_when_asked_for(running, capsys):
    assert "Bearer abc.def" in inspect(capsys, "show", "2", "--unmask")[1]


@pytest.mark.parametrize("kind, words", [("curl", "curl "), ("python", "import ")])
def test_a_request_is_copied(running, capsys, kind, words):
    status, out, _ = inspect(capsys, kind, "2")
    assert status == 0 and words in out and "/hook" in out and "abc.def" not in out


def test_two_visits_are_compared(running, capsys):
    status, out, _ = inspect(capsys, "compare", "1", "2")
    assert status == 1 and "- HTTP/1.1 200 Some Reason" in out
    assert inspect(capsys, "compare", "1", "1")[0] == 0
    assert json.loads(inspect(capsys, "compare", "1", "2", "--json")[1])["same"] is False


def test_the_address_is_printed_with_its_token(running, capsys):
    assert inspect(capsys, "--url") == (0, running.place.url + "\n", "")


def test_the_page_is_opened(running, capsys, monkeypatch):
    opened = []
    monkeypatch.setattr(terminal.webbrowser, "open", lambda url: opened.append(url) or True)
    assert inspect(capsys, "open")[0] == 0 and opened == [running.place.url]


def test_visits_are_followed_also_after_a_restart(running, folder, origin, capsys, monkeypatch):
    """In another thread, as it only ends by Ctrl-C."""
    greeted, printed = threading.Semaphore(0), threading.Semaphore(0)
    lines = []
    events = Inspector.events

    def greeting(self, query):
        for event in events(self, query):
            if event.name == "hello":
                greeted.release()  # from now on, no visit is missed
            yield event

    def note(visit, page):
        lines.append(visit["path"])
        printed.release()
        return visit["path"]

    restarted = []

    def asleep(seconds):
        if restarted:
            raise KeyboardInterrupt
        restarted.append(Running(folder, origin, running.place.port))

    monkeypatch.setattr(terminal, "sleep", asleep)
    monkeypatch.setattr(terminal, "row", note)
    monkeypatch.setattr(Inspector, "events", greeting)
    ending = threading.Thread(target=inspect, args=(capsys, "follow", "path:/wanted"))
    ending.start()
    for current in (lambda: running, lambda: restarted[0]):
        assert greeted.acquire(timeout=TIMEOUT)
        for path in ("/other", "/wanted"):
            current().ring.add(a_record(path=path))
        assert printed.acquire(timeout=TIMEOUT)
        current().close()
    ending.join(TIMEOUT)
    assert not ending.is_alive() and lines == ["/wanted", "/wanted"]


def test_a_wrong_query_is_refused_before_visits_are_followed(running, capsys, monkeypatch):
    monkeypatch.setattr(Inspector, "events", lambda *_: pytest.fail("followed"))
    status, out, err = inspect(capsys, "follow", "statsu:500")
    assert (status, out) == (2, "") and "did you mean status:" in err


# Files -------------------------------------------------------------------------------------------


def test_visits_are_exported_and_imported(running, capsys, tmp_path):
    file = tmp_path / "all.har"
    status, out, err = inspect(capsys, "har", str(file))
    assert (status, out) == (0, "") and f"written to {file}" in err
    assert len(json.loads(file.read_bytes())["log"]["entries"]) == 2
    assert os.stat(file).st_mode & 0o077 == 0
    assert b"abc.def" not in file.read_bytes()
    assert inspect(capsys, "import", str(file))[:2] == (0, "2 visits imported\n")
    assert len(running.ring) == 4


@pytest.mark.parametrize("words", [["-", "status:500"], ["status:500"], ["status:500", "hook"]])
def test_a_har_file_is_written_to_standard_output(running, capsys, words):
    assert len(json.loads(inspect(capsys, "har", *words)[1])["log"]["entries"]) == 1


def test_the_bytes_of_a_body_are_saved(running, capsys, tmp_path):
    file = tmp_path / "body"
    assert inspect(capsys, "body", "2", "--request", "-o", str(file))[0] == 0
    assert file.read_bytes() == b'{"a": 1}'


@pytest.mark.parametrize("words", [["curl", "2"], ["python", "2"], ["har", "{}"]])
def test_what_is_copied_says_that_secrets_are_masked(running, capsys, tmp_path, words):
    words = [word.format(tmp_path / "copy") for word in words]
    assert "--unmask writes them" in inspect(capsys, *words)[2]
    assert "--unmask" not in inspect(capsys, *words, "--unmask")[2]


def test_all_visits_are_forgotten(running, capsys):
    assert inspect(capsys, "clear")[:2] == (0, "2 visits forgotten\n")
    assert inspect(capsys)[2] == "no visits yet\n"


@pytest.mark.parametrize(
    "words, problem",
    [
        (["import", "missing.har"], "FILE missing.har: cannot be read (No such file"),
        (["import", __file__], "HAR"),
        (["har", "/missing/x.har"], "/missing/x.har: cannot be written"),
        (["show", "9"], "there is no visit 9"),
        (["replay", "9"], "there is no visit 9"),
        (["replay", "2", "--path", "x\nsecret"], "with a line break"),
        (["replay", "2", "--until", "never"], "until: 'never' came"),
        (["replay", "2", "--times", "0"], "'0' is no number from 1 to 1000"),
        (["replay", "2", "-H", "no colon"], "is no field such as"),
        (["show", "-1"], "ID"),
        (["show", "x"], "is no number of a visit"),
        (["show", "0"], "is no number of a visit"),
        (["shwo", "2"], "invalid choice"),
        (["--at", "1", "list"], "--at: '1' came, expected the port of an inspector that runs here"),
        (["--at", "http://127.0.0.1:4040/"], "a URL without ?token= came"),
        (["--at", "http://127.0.0.1:999999/?token=x"], "a URL with a wrong port"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(running, capsys, words, problem):
    status, out, err = inspect(capsys, *words)
    last = err.splitlines()[-1]
    assert status == 2 and out == "" and problem in last
    assert last.startswith(("gotunnel", "pytest")) or "inspect" in last
    assert "Traceback" not in err


# Replays -----------------------------------------------------------------------------------------


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(terminal, "LOOK", 0.01)


def test_a_request_is_sent_again(running, capsys, origin, quick):
    got = []
    origin.serve(lambda wire: [got.append(wire.read_message()), wire.send(answer(b"thanks"))])
    status, out, err = inspect(capsys, "replay", "2")
    assert status == 0 and "replay 1 of visit 2: 200" in out and "thanks" in out
    assert "the answer differs from that of visit 2" in err and "inspect compare 2 3`" in err
    assert "the answer is equal to that of visit 3" in inspect(capsys, "replay", "3")[2]
    assert got[0][0] == running.ring.get(2).request_head


def test_a_request_is_edited(running, capsys, origin, quick):
    got = []
    origin.serve(lambda wire: [got.append(wire.read_message()), wire.send(answer())])
    edits = [
        "-X",
        "PUT",
        "--path",
        "/b",
        "-H",
        "x-try: 3",
        "-H",
        "New: 1",
        "--drop",
        "x-forwarded-for",
    ]
    assert inspect(capsys, "replay", "2", *edits, "--body", "text")[0] == 0
    assert got == [
        (
            b"PUT /b HTTP/1.1\r\nHost: app.example.com\r\nContent-Length: 4\r\n"
            b"Authorization: Bearer abc.def\r\nx-try: 3\r\nNew: 1\r\n\r\n",
            b"text",
        )
    ]


def test_a_body_comes_from_a_file(running, capsys, origin, quick, tmp_path):
    got = []
    origin.serve(lambda wire: [got.append(wire.read_message()), wire.send(answer())])
    (tmp_path / "body").write_bytes(b"\0\xff")
    assert inspect(capsys, "replay", "2", "--body-file", str(tmp_path / "body"))[0] == 0
    assert got[0][1] == b"\0\xff"


@pytest.mark.parametrize(
    "words, statuses, status",
    [
        ([], ["500 Oops"], 1),
        ([], ["404 Not Found"], 0),
        (["--until", "2xx", "--every", "0"], ["500 Oops", "200 OK"], 0),
        (["--until", "2xx", "--every", "0", "--times", "2"], ["500 Oops", "404 No"], 1),
        (["--times", "3", "--json"], ["200 OK", "200 OK", "503 Later"], 1),
    ],
)
def test_the_exit_status_says_how_the_target_has_answered(
    running, capsys, origin, quick, words, statuses, status
):
    left = iter(statuses)
    origin.serve(lambda wire: [wire.read_message(), wire.send(answer(status=next(left)))])
    assert inspect(capsys, "replay", "2", *words)[0] == status


def test_a_target_without_an_answer_has_failed(running, capsys, origin, quick):
    origin.serve(lambda wire: wire.read_message())
    status, out, _ = inspect(capsys, "replay", "2")
    assert status == 1 and "replay 1 of visit 2: no answer" in out


def test_ctrl_c_stops_the_replay(running, capsys, origin, monkeypatch):
    origin.serve(lambda wire: [wire.read_message(), wire.send(answer(status="500 Oops"))])

    def interrupted(seconds):
        raise KeyboardInterrupt

    monkeypatch.setattr(terminal, "sleep", interrupted)
    status, out, _ = inspect(capsys, "replay", "2", "--until", "2xx", "--every", "3600")
    assert status == 1 and "stopped" in out
    wait_until(lambda: running.replayer.all()[0].over.is_set())


def test_a_replay_may_go_on_alone(running, capsys, origin):
    origin.serve(lambda wire: [wire.read_message(), wire.send(answer())])
    status, out, _ = inspect(capsys, "replay", "2", "--detach", "--json")
    replay = running.replayer.get(json.loads(out)["id"])
    assert status == 0 and replay.over.wait(TIMEOUT)


# Which inspector ---------------------------------------------------------------------------------


def test_without_an_inspector_there_is_a_line(folder, capsys):
    status, out, err = inspect(capsys)
    assert (status, out) == (2, "") and "no inspector runs here: start one with" in err


def test_a_file_that_was_left_behind_counts_for_nothing(folder, capsys):
    with reserved_port() as port:
        place_module.write(folder, Place("127.0.0.1", port, TOKEN))
        assert "no inspector runs here" in inspect(capsys)[2]
        assert f"no inspector answers at 127.0.0.1:{port}" in inspect(capsys, "--at", str(port))[2]


def test_the_inspector_of_a_service_is_found(running, folder, capsys):
    service = folder / "service" / folder.name
    service.mkdir(parents=True)
    (file,) = folder.glob("inspector-*.json")
    file.rename(service / file.name)
    assert inspect(capsys)[0] == 0


def test_of_several_inspectors_one_must_be_named(running, folder, capsys):
    with Origin() as origin:
        other = Running(folder, origin)
        try:
            status, out, err = inspect(capsys)
            assert (status, out) == (2, "") and "2 inspectors run here, expected --at PORT" in err
            assert f"{other.place.port} (app.example.com)" in err
            for at in (str(other.place.port), other.place.address, other.place.url):
                assert inspect(capsys, "list", "--at", at)[0] == 0
                assert inspect(capsys, "--at", at, "--url")[1] == f"{other.place.url}\n"
            assert len(inspect(capsys, "--url")[1].split()) == 2
        finally:
            other.close()


def test_the_wrong_token_is_said_so(running, capsys):
    url = running.place._replace(token="x" * 43).url
    status, _, err = inspect(capsys, "--at", url)
    assert status == 2 and "the token is wrong" in err


@pytest.mark.parametrize(
    "script, words",
    [
        (lambda wire: wire.send(b"SSH-2.0\r\n\r\n"), "it does not speak HTTP"),
        (lambda wire: wire.send(answer(b"<html>")), "no JSON"),
        (lambda wire: wire.send(answer(b"x", status="404 Not Found")), "status 404 came"),
        (lambda wire: wire.send(answer(b"[]", status="404 Not Found")), "status 404 came"),
    ],
)
def test_another_program_at_the_port_is_said_so(folder, capsys, origin, script, words):
    origin.serve(lambda wire: [wire.read_head(), script(wire)])
    status, _, err = inspect(capsys, "--at", Place("127.0.0.1", origin.port, TOKEN).url)
    assert status == 2 and words in err


def test_a_proxy_of_the_environment_is_not_asked(running, capsys, monkeypatch):
    with reserved_port() as port:
        monkeypatch.setenv("http_proxy", f"http://127.0.0.1:{port}")
        assert inspect(capsys)[0] == 0


# Its file ----------------------------------------------------------------------------------------


def test_a_file_is_the_users_alone_and_goes_with_the_inspector(tmp_path):
    place = Place("::1", 4040, TOKEN, 7)
    place_module.write(tmp_path / "new", place)
    (file,) = (tmp_path / "new").iterdir()
    assert os.stat(file).st_mode & 0o077 == 0
    assert list(places(tmp_path / "new")) == [place]
    assert place.url == f"http://[::1]:4040/?token={TOKEN}"
    place_module.remove(tmp_path / "new", place._replace(token="of another one"))
    assert file.exists()
    place_module.remove(tmp_path / "new", place)
    assert not file.exists()


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"[]", b"{}", b'{"host": 1, "port": 2, "token": "x"}', b"\xff", b"[" * 5000,
     b'{"host": "a", "port": "1", "token": "x"}', b"x" * 100_000],
)  # fmt: skip
def test_a_broken_file_counts_for_nothing(tmp_path, content):
    (tmp_path / "inspector-4040.json").write_bytes(content)
    assert list(places(tmp_path)) == []


def test_a_folder_that_cannot_be_written_is_only_noted(tmp_path, caplog):
    (tmp_path / "file").touch()
    place_module.write(tmp_path / "file" / "folder", Place("127.0.0.1", 4040, TOKEN))
    assert "gotunnel inspect needs the address with --at" in caplog.text


def test_raw_bytes_are_not_written_to_a_terminal(running, capsys, monkeypatch):
    terminal_out = io.TextIOWrapper(io.BytesIO())
    monkeypatch.setattr(terminal_out, "isatty", lambda: True, raising=False)
    monkeypatch.setattr(sys, "stdout", terminal_out)
    status, _, err = inspect(capsys, "body", "2")
    assert status == 2 and "control sequences of your terminal" in err
