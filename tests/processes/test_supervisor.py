"""The supervisor in this process, with scripts for children and a fake of its signals."""

import json
import os
import signal
import socket
import sys
import threading

import pytest
from support import TIMEOUT, gateway_environment, wait_until

from gotunnel_server import config as server_config
from gotunnel_server.net.inherited import Given, Inherited
from gotunnel_server.net.listener import PortError
from gotunnel_server.processes import roster as roster_module
from gotunnel_server.processes import supervisor as supervisor_module
from gotunnel_server.processes.sockets import Sockets
from gotunnel_server.processes.supervisor import Supervisor

# A child that does what FAULT says. It writes what it is ordered into the folder of the test.
CHILD = """
import json, os, signal, socket, sys, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
sock = socket.socket(fileno=int(os.environ["GOTUNNEL_PROCESS"]))
lines = sock.makefile("rw")
def say(**message):
    lines.write(json.dumps(message) + "\\n")
    lines.flush()
hello = json.loads(lines.readline())["hello"]
name = f"{hello['number']}.{time.monotonic_ns()}.{os.getpid()}"
out = open(f"{os.environ['FOLDER']}/{name}", "a", buffering=1)
print(json.dumps(hello), file=out)
fault = os.environ.get(f"FAULT{hello['number']}")
if fault:
    exec(fault)
say(said="ready")
for line in lines:
    print(line, end="", file=out)
    message = json.loads(line)
    order = message.get("order")
    if order == "go":
        say(said="serving")
    elif order == "estate":
        say(estate={"modes": {"a.test": "http"}})
    elif order == "drain":
        break
"""


class FakeSignals:
    """In place of process.Signals: a test sends the numbers."""

    made = None

    def __init__(self, hang_up=False, also=()):
        self._receive, self._send = socket.socketpair()
        FakeSignals.made = self

    def fileno(self):
        return self._receive.fileno()

    def wait(self):
        return self._receive.recv(1)[0]

    def after(self, function):
        function()
        self.send(0)

    def send(self, number):
        self._send.send(bytes([number]))

    def close(self):
        self._receive.close()
        self._send.close()


class Run:
    """A supervisor in a thread. ``status``: what it returned."""

    def __init__(self, cache, folder, faults, changes):
        environment = gateway_environment(
            cache, PROCESSES="2", ENV="1", STATUS_SOCKET=str(folder / "s"), **changes
        )
        self.folder = folder
        self.environment = {
            "PATH": os.environ["PATH"], "FOLDER": str(folder), "NOTIFY_SOCKET": "@nobody", **faults,
        }  # fmt: skip
        self.config = server_config.load(os.devnull, environment)
        self.supervisor = Supervisor(
            self.config, os.devnull, self.environment | environment,
            (sys.executable, "-I", "-S", "-c", CHILD),
        )  # fmt: skip
        self.signals = FakeSignals.made
        self.status = None
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self):
        self.status = self.supervisor.run()

    def told(self, number=None):
        """What the children were told: by process id, in the order of their start."""
        found = {}
        for path in sorted(self.folder.glob(f"{number or '*'}.*.*")):
            if path.name[0].isdigit():
                lines = [json.loads(line) for line in path.read_text().splitlines() if line]
                found[int(path.suffix[1:])] = lines
        return found

    def orders(self, number=None):
        return {
            pid: [line["order"] for line in lines if "order" in line]
            for pid, lines in self.told(number).items()
        }

    def serving(self):
        """Process ids of those that serve, by number."""
        return {each.number: self.supervisor._children[each.id].process.pid
                for each in self.supervisor._roster.serving()}  # fmt: skip

    def wait_until_ready(self):
        wait_until(lambda: len(self.serving()) == 2)
        return self.serving()

    def end(self):
        if self.status is None:
            self.signals.send(signal.SIGTERM)
        self._thread.join(TIMEOUT)
        self.signals.close()
        assert self.status is not None


@pytest.fixture
def run(cache, tmp_path, monkeypatch):
    monkeypatch.setattr(supervisor_module, "Signals", FakeSignals)
    monkeypatch.setattr(roster_module, "BEAT", 0.02)  # as no SIGCHLD wakes it here
    runs = []

    def start(changes=(), **faults):
        runs.append(Run(cache, tmp_path, faults, dict(changes)))
        return runs[-1]

    yield start
    for each in runs:
        each.end()


def lines_of(caplog, level):
    return [record.message for record in caplog.records if record.levelname == level]


def test_children_get_their_number_their_sockets_and_one_secret(run):
    started = run()
    started.wait_until_ready()
    wait_until(lambda: len(started.told()) == 2)
    one, two = (next(iter(started.told(number).values()))[0] for number in (1, 2))
    assert (one["number"], two["number"], one["count"]) == (1, 2, 2)
    assert one["secret"] == two["secret"] and len(one["secret"]) == 64
    assert one["supervisor"] == os.getpid()
    names = [name for _, name, _ in one["sockets"]]
    assert names == ["TUNNEL_PORT", "GATEWAY_PORT", "DASHBOARD_PORT"]
    own, others = (
        dict((n, fd) for fd, n, _ in one["sockets"]),
        dict((n, fd) for fd, n, _ in two["sockets"]),
    )
    assert own["GATEWAY_PORT"] != others["GATEWAY_PORT"]
    assert own["DASHBOARD_PORT"] == others["DASHBOARD_PORT"]
    assert [entry[1] for entry in one["others"]["2"]] == ["TUNNEL_PORT", "GATEWAY_PORT"]
    assert one["status"] is not None


def test_a_stop_drains_all_and_the_status_is_0(run, tmp_path):
    started = run()
    started.wait_until_ready()
    assert (tmp_path / "s").exists()
    started.signals.send(signal.SIGTERM)
    wait_until(lambda: started.status == 0)
    assert all(orders[-1] == "drain" for orders in started.orders().values())
    assert not (tmp_path / "s").exists()


def test_a_hang_up_is_for_all(run):
    started = run()
    started.wait_until_ready()
    started.signals.send(signal.SIGHUP)
    wait_until(lambda: [o.count("reload") for o in started.orders().values()] == [1, 1])


def test_a_child_that_is_killed_comes_back_with_the_same_sockets(run, caplog):
    started = run()
    before = started.wait_until_ready()
    os.kill(before[2], signal.SIGKILL)
    wait_until(lambda: started.serving().get(2, before[2]) != before[2])
    first, second = started.told(2).values()
    assert first[0]["sockets"] == second[0]["sockets"]
    wait_until(lambda: started.orders(1)[before[1]][-3:] == ["cover", "estate", "uncover"])
    (line,) = lines_of(caplog, "ERROR")
    assert "process 2 ended by signal 9 (SIGKILL)" in line


def test_a_renewal_passes_on_what_was_served(run):
    started = run()
    before = started.wait_until_ready()
    started.signals.send(signal.SIGUSR2)
    wait_until(lambda: not started.supervisor._roster.renewing
               and not set(before.values()) & set(started.serving().values()))  # fmt: skip
    for number in (1, 2):
        # The old one notes the last order when it has read it.
        wait_until(lambda number=number: "drain" in next(iter(started.orders(number).values())))
        old, new = started.told(number).values()
        orders = [line["order"] for line in old if "order" in line]
        assert (orders[0], *orders[-2:]) == ("go", "estate", "drain")
        (go,) = [line for line in new if line.get("order") == "go"]
        assert go["estate"] == {"modes": {"a.test": "http"}}


@pytest.mark.parametrize("fault", ["a setting", "a port"])
def test_a_renewal_with_a_bad_configuration_is_one_line_and_changes_nothing(run, caplog, fault):
    with socket.create_server(("127.0.0.1", 0)) as other:
        started = run()
        before = started.wait_until_ready()
        bad = {"WORKERS": "x"} if fault == "a setting" else {
            "METRICS_PORT": str(other.getsockname()[1])
        }  # fmt: skip
        started.supervisor._environment |= bad
        started.signals.send(signal.SIGUSR2)
        wait_until(lambda: lines_of(caplog, "ERROR"))
        (line,) = lines_of(caplog, "ERROR")
        assert line.startswith("SIGUSR2: ") and line.endswith("serve on as they are")
        assert next(iter(bad)) in line
        assert started.serving() == before


def test_a_renewal_of_which_the_predecessor_dies_goes_on(run):
    """It is killed when it is asked for its estate: the new one does not wait for it."""
    dies = """
asked, say_this = [], say
def say(**message):
    asked.extend(["estate"] * ("estate" in message))
    if len(asked) > 1:  # the first one was for process 2
        os._exit(3)
    say_this(**message)
"""
    started = run(FAULT1=dies)
    before = started.wait_until_ready()
    started.signals.send(signal.SIGUSR2)
    wait_until(lambda: not set(before.values()) & set(started.serving().values()))


@pytest.mark.parametrize(
    ("fault", "status", "line"),
    [
        ("sys.exit(2)", 2, None),
        ("os.kill(os.getpid(), 9)", 1, "process 1 ended by signal 9 (SIGKILL) before it served"),
        ("say(said='ready'); sys.exit(1)", 1, None),
        ("lines.write('nonsense' + chr(10)); lines.flush(); lines.readline()", 1,
         "process 1 cannot be talked to (a line that is no JSON came): it is killed"),
    ],
)  # fmt: skip
def test_a_first_child_that_fails_ends_all(run, caplog, fault, status, line):
    started = run(FAULT1=fault)
    wait_until(lambda: started.status == status)
    assert started.told(2) == {}
    assert line is None or line in "\n".join(lines_of(caplog, "ERROR"))


def test_a_child_that_hangs_is_killed_and_replaced(run, caplog, monkeypatch):
    monkeypatch.setattr(roster_module, "HANG", 0.3)
    beats = (
        "import threading; threading.Thread(daemon=True, target=lambda: [say(said='alive') "
        "for _ in iter(lambda: threading.Event().wait(0.02), 1)]).start()"
    )
    started = run(FAULT1=beats)
    before = started.wait_until_ready()  # 2 gives no sign of life
    wait_until(lambda: started.serving().get(2, before[2]) != before[2])
    assert "process 2 has given no sign of life for 0.3 s: it is killed" in caplog.text


def test_messages_of_children_reach_the_others(run):
    started = run(FAULT2="say(to=0, body={'text': 'x'}); say(call=1, name='take port', "
                  "**{'with': [2200, 'a.test']})")  # fmt: skip
    before = started.wait_until_ready()
    wait_until(lambda: {"from": 2, "body": {"text": "x"}} in started.told(1)[before[1]])
    wait_until(lambda: {"reply": 1, "result": ""} in started.told(2)[before[2]])


def test_all_know_the_processes(run):
    started = run()
    before = started.wait_until_ready()

    def last():
        return [
            [line for line in lines if "processes" in line][-1:]
            for lines in started.told().values()
        ]

    rows = [
        {"process": number, "pid": pid, "state": "serving", "restarts": 0}
        for number, pid in before.items()
    ]
    wait_until(lambda: last() == [[{"processes": rows, "ready": True}]] * 2)


# The sockets -------------------------------------------------------------------------------------


def load(cache, **changes):
    changes = {"PROCESSES": "2", "STATUS_SOCKET": "off", **changes}
    return server_config.load(os.devnull, gateway_environment(cache, **changes))


def test_each_child_has_sockets_of_its_own_at_the_same_port(cache):
    sockets = Sockets(load(cache, HTTP_PORT="auto", METRICS_PORT="auto"), 3, Inherited())
    of = {number: {each.name: each for each in sockets.of(number)} for number in (1, 2, 3)}
    for name in ("GATEWAY_PORT", "TUNNEL_PORT", "HTTP_PORT"):
        assert len({of[number][name].sock.fileno() for number in of}) == 3
        assert len({of[number][name].port for number in of}) == 1
    for name in ("DASHBOARD_PORT", "METRICS_PORT"):
        assert len({of[number][name].sock.fileno() for number in of}) == 1
    assert {each.name for each in sockets.own(1)} == {"GATEWAY_PORT", "TUNNEL_PORT", "HTTP_PORT"}
    sockets.close()


@pytest.mark.parametrize("reuse", [False, True])
@pytest.mark.parametrize("setting", ["GATEWAY_PORT", "TUNNEL_PORT", "DASHBOARD_PORT"])
def test_a_port_in_use_is_an_error_and_leaves_no_socket_open(cache, setting, reuse):
    with socket.create_server(("127.0.0.1", 0), reuse_port=reuse) as other:
        port = other.getsockname()[1]
        with pytest.raises(PortError, match=f"{setting} {port} on 127.0.0.1: in use"):
            Sockets(load(cache, **{setting: str(port)}), 2, Inherited())


def test_a_socket_of_systemd_is_shared_by_all(cache):
    given = Given(socket.create_server(("127.0.0.1", 0)), "GATEWAY_PORT", True)
    sockets = Sockets(load(cache, GATEWAY_PORT=str(given.port)), 2, Inherited([given]))
    found = [each for number in (1, 2) for each in sockets.of(number) if each.by_systemd]
    assert [each.sock for each in found] == [given.sock] * 2
    assert "GATEWAY_PORT" not in {each.name for each in sockets.own(1)}
    sockets.close()


def test_a_changed_configuration_opens_and_closes_ports_and_leaves_the_others(cache):
    sockets = Sockets(load(cache), 2, Inherited())
    before = {each.name: each.sock for each in sockets.of(1)}
    sockets.change(load(cache, DASHBOARD_PORT="0", METRICS_PORT="auto"))
    after = {each.name: each.sock for each in sockets.of(1)}
    assert after["GATEWAY_PORT"] is before["GATEWAY_PORT"]
    assert "DASHBOARD_PORT" not in after and before["DASHBOARD_PORT"].fileno() == -1
    assert "METRICS_PORT" in after
    with socket.create_server(("127.0.0.1", 0)) as other:
        taken = str(other.getsockname()[1])
        with pytest.raises(PortError):
            sockets.change(load(cache, METRICS_PORT=taken))
    assert {each.name: each.sock for each in sockets.of(1)} == after
    sockets.close()
