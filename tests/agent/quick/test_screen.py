"""The status screen: an agent that is shown, on a pseudo-terminal and without one."""

import contextlib
import fcntl
import logging
import os
import signal
import struct
import subprocess
import sys
import termios
import threading
from pathlib import Path
from time import monotonic, time

import pytest
from emulator import Emulator
from on_terminal import TUNNEL, FakeAgent, seen
from support import APP, ROOT, TIMEOUT, agent_yaml, answer, gateway_here, wait_until

from gotunnel_agent import link as link_module
from gotunnel_agent.config import Target
from gotunnel_agent.follow import Follower, Seen
from gotunnel_agent.quick import screen as screen_module
from gotunnel_agent.quick.qr import MISSING, NoQr
from gotunnel_agent.quick.screen import STATES, Screen, shorter, target_of
from gotunnel_agent.target import Route

PROGRAM = Path(__file__).with_name("on_terminal.py")


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(screen_module, "TICK", 0.01)
    monkeypatch.setattr(signal, "signal", lambda number, handler: None)


class PseudoTerminal:
    """A terminal that a thread reads into an Emulator."""

    def __init__(self, columns=80, rows=24):
        self.ours, self.theirs = os.openpty()
        self.name = os.ttyname(self.theirs)
        self.emulator = Emulator(columns, rows)
        self.problem = None
        self.resize(columns, rows)
        self._reader = threading.Thread(target=self._read, daemon=True)

    def __enter__(self):
        self._reader.start()
        return self

    def __exit__(self, *exc_info):
        os.close(self.theirs)
        self._reader.join(TIMEOUT)
        os.close(self.ours)

    def resize(self, columns, rows):
        fcntl.ioctl(self.theirs, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))
        self.emulator.columns, self.emulator.rows = columns, rows

    def _read(self):
        with contextlib.suppress(OSError):  # closed by all
            while data := os.read(self.ours, 4096):
                try:
                    self.emulator.feed(data)
                except Exception as error:
                    self.problem = error
                    return

    def shows(self, text):
        if self.problem:
            raise self.problem
        return text in "\n".join(list(self.emulator.lines))


@pytest.fixture
def pseudo(monkeypatch):
    with PseudoTerminal() as pseudo:
        yield pseudo


@contextlib.contextmanager
def shown(agent, pseudo, monkeypatch, **options):
    """A Screen of an agent, and its stop event."""
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(screen_module.Terminal, "in_foreground", lambda self: True)
    monkeypatch.setattr(screen_module.Terminal, "read_typed", lambda self: None)
    with open(pseudo.name, "w", encoding="utf-8") as out:
        monkeypatch.setattr(sys, "stdin", out)
        screen, stop = Screen(agent, out, **options), threading.Event()
        assert screen.draws
        thread = threading.Thread(target=screen.run, args=(stop,))
        thread.start()
        try:
            yield screen
        finally:
            stop.set()
            thread.join(TIMEOUT)


def test_without_a_terminal_each_visit_is_a_line_of_the_log(caplog):
    caplog.set_level(logging.INFO)
    agent, stop = FakeAgent(), threading.Event()
    screen = Screen(agent, None, qr=True)
    assert isinstance(agent.follower, Follower) and not screen.draws
    agent.follower.tell(Seen("a.example", "GET", "/x\x1b[2J\xff", 200, 0.0, 0.0123, 0, 345))
    agent.follower.tell(Seen("b.example", "", "", 0, 0.0, 1.5, 3, 4, "", "tcp"))
    stop.set()
    screen.run(stop)
    assert caplog.messages == [
        "no QR code: standard output is no terminal",
        r"a.example: GET /x\x1b[2Jÿ 200 12 ms 345 bytes",
        "b.example: tcp 1500 ms 4 bytes",
    ]


def test_the_agent_is_shown_as_it_changes(pseudo, monkeypatch):
    agent = FakeAgent()
    with shown(agent, pseudo, monkeypatch) as screen:
        wait_until(lambda: pseudo.shows("connecting to tunnel.example.com:9443"))
        agent.shown = agent.shown._replace(problem="no route", retry_at=monotonic() + 99)
        wait_until(lambda: pseudo.shows("reconnecting in 99 s"))
        agent.shown = agent.shown._replace(problem="", retry_at=None, since=monotonic())
        wait_until(lambda: pseudo.shows("online since"))
        agent.follower.tell(seen("/hello"))
        wait_until(lambda: pseudo.shows("/hello"))
        screen.notes = ["visitors connect by ssh"]
        wait_until(lambda: pseudo.shows("by ssh"))
        agent.shown = agent.shown._replace(stopping=True)
        wait_until(lambda: pseudo.shows("stopping"))
    wait_until(lambda: pseudo.shows("stopped at"))
    assert pseudo.emulator.lines[0].startswith("gotunnel ")  # one picture, in one place


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"certificates": {"app.example.com": "waiting"}}, "certificate: being ordered"),
        ({"certificates": {"app.example.com": "failed: no such name"}}, "no certificate: no such"),
        ({"refused": {"app.example.com": "host already registered"}}, "not served: host already"),
        ({"routes": {"x": Route(TUNNEL, problem="it needs ports")}}, "not served: it needs ports"),
    ],
)
def test_what_is_wrong_with_a_tunnel_is_shown(pseudo, monkeypatch, changes, words):
    with shown(FakeAgent(since=monotonic(), **changes), pseudo, monkeypatch):
        wait_until(lambda: pseudo.shows(words))


def test_why_there_is_no_certificate_is_shown_without_long_addresses():
    proof = "192.0.2.1: Fetching http://a.example.com/.well-known/acme-challenge/"
    reason = f"https://ca.example/acme/authz/1/2: connection: http-01: {proof}r4nd0m-_: refused"
    assert shorter(reason) == f"connection: http-01: {proof}...: refused"
    assert shorter("waits for https://a.example: a") == "waits for https://a.example: a"


def test_a_visit_that_goes_on_is_shown_after_a_while(pseudo, monkeypatch):
    monkeypatch.setattr(screen_module, "OPEN_AFTER", 0.05)
    agent = FakeAgent(since=monotonic())
    with shown(agent, pseudo, monkeypatch):
        monkeypatch.setattr(
            agent.follower, "running", lambda: [seen("/old")._replace(duration=9), seen("/new")]
        )
        wait_until(lambda: pseudo.shows("/old"))
        assert not pseudo.shows("/new")


def test_warnings_are_in_the_picture_and_nowhere_else(pseudo, monkeypatch, caplog):
    """As they would be written across it, if standard error is the same terminal."""
    written = []

    class Error:
        def write(self, text):
            written.append(text)

        def isatty(self):
            return True

    monkeypatch.setattr(sys, "stderr", Error())
    handler = logging.StreamHandler()
    root = logging.getLogger()
    root.addHandler(handler)
    try:
        with shown(FakeAgent(since=monotonic()), pseudo, monkeypatch):
            wait_until(lambda: pseudo.shows("online"))
            agent_log = logging.getLogger("gotunnel.link")
            agent_log.warning("tunnel.example.com: no route; next try in 3.0 s")
            for _ in range(3):
                logging.getLogger("gotunnel.target").warning("target %s: refused\x1b[2J", "x")
            wait_until(lambda: pseudo.shows("target x: refused [2J (3 times)"))
            try:
                raise ZeroDivisionError("told later")
            except ZeroDivisionError:
                agent_log.exception("a bug, traceback follows")
            wait_until(lambda: pseudo.shows("a bug, traceback follows"))
            assert not pseudo.shows("next try") and not written
        assert handler in root.handlers
        agent_log.warning("after")
        assert "after\n" in written
        assert "ZeroDivisionError: told later" in "".join(written)
    finally:
        root.removeHandler(handler)


def test_the_log_lines_that_a_picture_shows_as_a_state_are_there():
    source = Path(link_module.__file__).read_text(encoding="utf-8")
    for words in STATES:
        assert f"{words} %" in source


def test_old_messages_go(monkeypatch):
    messages = screen_module.Messages()
    messages.add("one")
    assert [said.text for said in messages.latest()] == ["one"]
    monkeypatch.setattr(screen_module, "time", lambda: time() + screen_module.MESSAGE_STAYS)
    assert messages.latest() == []


def test_a_terminal_that_takes_nothing_stops_no_other_thread(pseudo, monkeypatch):
    """Ctrl-S. The log and the visits go on, and the picture is right again after Ctrl-Q."""
    agent = FakeAgent(since=monotonic())
    with shown(agent, pseudo, monkeypatch):
        wait_until(lambda: pseudo.shows("online"))
        termios.tcflow(pseudo.theirs, termios.TCOOFF)
        for number in range(200):
            agent.follower.tell(seen(f"/{number}"))
            logging.getLogger("gotunnel.target").warning("warning %d", number)
        threading.Event().wait(0.1)
        assert not pseudo.shows("/199")
        termios.tcflow(pseudo.theirs, termios.TCOON)
        wait_until(lambda: pseudo.shows("/199"))


def test_a_terminal_that_is_gone_ends_the_screen(pseudo, monkeypatch):
    def broken(*_):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(screen_module.Terminal, "draw", broken)
    with shown(FakeAgent(), pseudo, monkeypatch):
        pass


def test_in_the_background_nothing_is_drawn(pseudo, monkeypatch):
    agent = FakeAgent(since=monotonic())
    with shown(agent, pseudo, monkeypatch):
        wait_until(lambda: pseudo.shows("online"))
        monkeypatch.setattr(screen_module.Terminal, "in_foreground", lambda self: False)
        threading.Event().wait(0.05)
        agent.follower.tell(seen("/hidden"))
        threading.Event().wait(0.05)
        assert not pseudo.shows("/hidden")
        monkeypatch.setattr(screen_module.Terminal, "in_foreground", lambda self: True)
        wait_until(lambda: pseudo.shows("/hidden"))


@pytest.mark.parametrize("answer, words", [(["▀▄█ "] * 5, "▀▄█"), (NoQr(MISSING), "no QR code")])
def test_the_address_as_a_qr_code(pseudo, monkeypatch, answer, words):
    asked = []

    def qr_lines(text, dark_ink):
        asked.append((text, dark_ink))
        if isinstance(answer, NoQr):
            raise answer
        return answer

    monkeypatch.setattr(screen_module, "qr_lines", qr_lines)
    monkeypatch.delenv("NO_COLOR", raising=False)
    with shown(FakeAgent(since=monotonic()), pseudo, monkeypatch, qr=True):
        wait_until(lambda: pseudo.shows(words))
    assert asked == [("https://app.example.com", True)]


def test_an_address_stays_when_the_gateway_is_gone(pseudo, monkeypatch):
    asked = {"app.*": Route(TUNNEL._replace(hostname="app.*"))}
    agent = FakeAgent(routes=asked)
    with shown(agent, pseudo, monkeypatch):
        wait_until(lambda: pseudo.shows("  app → "))
        agent.shown = FakeAgent(since=monotonic()).shown
        wait_until(lambda: pseudo.shows("  https://app.example.com → "))
        agent.shown = agent.shown._replace(routes=asked, since=None, problem="no route")
        wait_until(lambda: pseudo.shows("reconnecting"))
        assert pseudo.shows("  https://app.example.com → ")


@pytest.mark.parametrize(
    "hostname, since, mode, words",
    [
        ("quick-otter.*", None, "http", "  quick-otter → http"),
        ("a.example.com", None, "http", "  a.example.com → http"),
        ("a.example.com", 1.0, "http", "  https://a.example.com → http"),
        ("a.example.com", 1.0, "tcp", "  tls://a.example.com:443 → 127"),
    ],
)
def test_an_address_that_no_gateway_has_told(pseudo, monkeypatch, hostname, since, mode, words):
    routes = {hostname: Route(TUNNEL._replace(hostname=hostname, mode=mode))}
    with shown(FakeAgent(routes=routes, since=since), pseudo, monkeypatch):
        wait_until(lambda: pseudo.shows(words))


@pytest.mark.parametrize(
    "target, mode, words",
    [
        (Target("127.0.0.1", 80), "http", "http://127.0.0.1:80"),
        (Target("x", 443, tls=True), "http", "https://x:443"),
        (Target(path="/run/x"), "http", "unix:/run/x"),
        (Target("::1", 22), "tcp", "[::1]:22"),
    ],
)
def test_targets_in_words(target, mode, words):
    assert target_of(TUNNEL._replace(target=target, mode=mode)) == words


@pytest.mark.slow
def test_a_quick_command_on_a_terminal(pseudo, cache, tmp_path, origin, monkeypatch):
    origin.serve(lambda wire: [wire.read_head(), wire.send(answer())])
    starter = tmp_path / "starter.py"  # as a shell starts a program: on a terminal of its own
    starter.write_text(
        "import os, sys\n"
        "terminal = os.open(sys.argv[1], os.O_RDWR)\n"
        "for number in range(3):\n"
        "    os.dup2(terminal, number)\n"
        "os.execv(sys.executable, [sys.executable, *sys.argv[2:]])\n"
    )
    pseudo.resize(120, 40)
    with gateway_here(cache) as gateway:
        account = tmp_path / "account.yaml"
        account.write_text(agent_yaml(gateway, {APP: origin.port}, {}, {}))
        account.chmod(0o600)
        words = ["http", str(origin.port), "--host", APP, "-c", str(account)]
        program = subprocess.Popen(
            [sys.executable, starter, pseudo.name, str(ROOT / "gotunnel_agent"), *words],
            start_new_session=True,
            env={"TERM": "xterm", "PATH": os.environ["PATH"], "HOME": str(tmp_path)},
        )
        try:
            wait_until(lambda: pseudo.shows(f"  https://{APP}"))
            assert gateway.get(APP, "/hello") == (200, b"ok")
            wait_until(lambda: pseudo.shows("/hello"))
            os.write(pseudo.ours, b"\x03")
            assert program.wait(TIMEOUT) == 0
        finally:
            program.kill()
            program.wait()
    wait_until(lambda: pseudo.shows("stopped at"))
    pictures = [line for line in pseudo.emulator.lines if line.startswith("gotunnel ")]
    assert len(pictures) == 1 and "INFO" not in "\n".join(pseudo.emulator.lines)


@pytest.mark.slow
def test_a_program_on_a_terminal(pseudo):
    """Typed lines, another size, Ctrl-Z and fg, Ctrl-C: the terminal is afterwards as it was."""
    settings = termios.tcgetattr(pseudo.theirs)
    environment = {"TERM": "xterm", "PATH": os.environ["PATH"]}
    program = subprocess.Popen(
        [sys.executable, PROGRAM, pseudo.name], start_new_session=True, env=environment
    )
    emulator = pseudo.emulator
    try:
        wait_until(lambda: pseudo.shows("/1\n"))
        os.write(pseudo.ours, b"typed\n\n")
        wait_until(lambda: not pseudo.shows("typed") and pseudo.shows("Ctrl-C stops"))
        assert sum("online since" in line for line in emulator.lines) == 1
        pseudo.resize(50, 20)
        wait_until(lambda: pseudo.shows("GET   200   12 ms    345 B  /"))
        assert emulator.shown()[0].startswith("gotunnel ")
        os.kill(program.pid, signal.SIGSTOP)
        os.waitpid(program.pid, os.WUNTRACED)
        os.write(pseudo.theirs, b"text of a shell\n")
        wait_until(lambda: pseudo.shows("text of a shell"))
        os.kill(program.pid, signal.SIGCONT)

        def is_drawn_below():
            lines = list(emulator.lines)
            below = lines[lines.index("text of a shell") :]
            return below[-2:-1] == ["  Ctrl-C stops"] and any("gotunnel " in line for line in below)

        wait_until(is_drawn_below)
        os.write(pseudo.ours, b"\x03")
        assert program.wait(TIMEOUT) == 0
    finally:
        program.kill()
        program.wait()
    wait_until(lambda: pseudo.shows("stopped at"))
    assert "Ctrl-C" not in emulator.shown()[-1]
    assert emulator.column == 0 and emulator.row == len(emulator.lines) - 1
    assert termios.tcgetattr(pseudo.theirs) == settings
