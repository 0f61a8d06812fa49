"""`gotunnel-server status` and `gotunnel-agent status`, asked of programs that run."""

import json
import os
import signal
import subprocess
import sys
import tempfile
import types
from pathlib import Path

import pytest
from support import (
    APP,
    GATEWAY_HOST,
    RAW,
    ROOT,
    SECRET,
    TIMEOUT,
    Origin,
    agent_here,
    agent_process,
    answer,
    gateway_here,
    gateway_process,
    request,
    reserved_port,
    running,
    wait_until,
)

from gotunnel import __version__
from gotunnel_agent.agent import Snapshot
from gotunnel_agent.common.status_socket import NoAnswer, ask
from gotunnel_agent.status import agent_of, first_of, status_places, status_socket_of
from gotunnel_agent.status import describe as describe_agent
from gotunnel_server import status
from gotunnel_server.certs.state import FAILED, State


@pytest.fixture
def short():
    """A folder with a short name: a socket's path may be no longer than 107 bytes."""
    with tempfile.TemporaryDirectory(prefix="gotunnel-") as folder:
        yield Path(folder)


def run(program, *arguments, cwd, **environment):
    return subprocess.run(
        [sys.executable, str(ROOT / program), *arguments],
        cwd=cwd, env=environment, capture_output=True, text=True, timeout=TIMEOUT,
    )  # fmt: skip


def test_a_running_gateway_and_its_agent_say_how_they_do(short):
    (short / "cache").mkdir()
    with Origin() as app, gateway_process(short / "cache") as gateway:
        keys = {"status_socket": str(short / "agent.sock")}
        with agent_process(gateway, short, {APP: app.port}, {RAW: 9}, **keys) as agent:
            with gateway.dial(APP) as visitor:
                visitor.send(request())
                with app.accept() as target:
                    target.read_head()
                    here = run("gotunnel_server", "status", "--json", cwd=short, ACME_CACHE="cache")
                    mine = run("gotunnel_agent", "status", "-c", "agent.yaml", "--json", cwd=short)
                    target.send(answer())
                    visitor.read_head()
            page = run("gotunnel_server", "status", cwd=short, ACME_CACHE="cache")
            agents_page = run("gotunnel_agent", "status", "-c", "agent.yaml", cwd=short)
            gateway.program.signal(signal.SIGTERM)
            agent.wait_for("next try in")
            alone = run("gotunnel_agent", "status", "-c", "agent.yaml", cwd=short)
        stopped = run("gotunnel_agent", "status", "-c", "agent.yaml", cwd=short)

    assert (here.returncode, here.stderr) == (0, "")
    told = json.loads(here.stdout)
    assert (told["state"], told["version"], told["visits"]) == (
        "serving", __version__, {"running": 1}
    )  # fmt: skip
    (session,) = told["sessions"]
    assert (session["address"], session["hostnames"], session["visits"]) == ("127.0.0.1", 2, 1)
    assert [(row["hostname"], row["mode"]) for row in told["hostnames"]] == [
        (APP, "http"), (RAW, "tcp")
    ]  # fmt: skip
    states = {row["hostname"]: row["state"] for row in told["certificates"]}
    assert states == dict.fromkeys((GATEWAY_HOST, "localhost", APP, RAW), "ready")

    told = json.loads(mine.stdout)
    assert mine.returncode == 0 and told["state"] == "serving" and told["visits"]["running"] == 1
    assert [(row["hostname"], row["served"]) for row in told["tunnels"]] == [
        (APP, True), (RAW, True)
    ]  # fmt: skip
    for done, words in ((page, "sessions:"), (agents_page, "tunnels:")):
        assert done.returncode == 0 and words in done.stdout and APP in done.stdout

    assert alone.returncode == 1 and "no session" in alone.stdout
    assert stopped.returncode == 2 and stopped.stdout == ""
    assert stopped.stderr.startswith(
        "gotunnel-agent: not running here, or its status socket is elsewhere: there is no socket "
    )


def test_an_agent_whose_working_folder_was_removed_still_answers(short):
    (short / "gone").mkdir()
    sock, file = short / "agent.sock", short / "gone" / "agent.yaml"
    with reserved_port() as closed:
        file.write_text(
            f'tunnel_addr: "localhost:{closed}"\njwt_secret: "{SECRET}"\n'
            f'status_socket: "{sock}"\ntunnels: [{{hostname: "{APP}", target: 9}}]\n'
        )
        command = (sys.executable, str(ROOT / "gotunnel_agent"), "-c", "agent.yaml")
        with running(*command, cwd=short / "gone") as agent:
            agent.wait_for("next try in")
            wait_until(sock.exists)
            file.rename(short / "agent.yaml")
            (short / "gone").rmdir()
            told = ask([str(sock)], "gotunnel-agent")
    assert told["configuration"] == str(file)


def test_a_gateway_that_stops_says_that_it_drains(short):
    (short / "cache").mkdir()
    with Origin() as app, gateway_process(short / "cache") as gateway:
        with agent_here(gateway, short, {APP: app.port}), gateway.dial(APP) as visitor:
            visitor.send(request())
            with app.accept() as target:
                target.read_head()
                gateway.program.signal(signal.SIGTERM)
                gateway.program.wait_for("stopping")
                done = run("gotunnel_server", "status", cwd=short, ACME_CACHE="cache")
                target.send(answer())
                visitor.read_head()
        assert gateway.program.wait() == 0
    assert done.returncode == 1 and "draining" in done.stdout
    assert not (short / "cache" / "status.sock").exists()


def test_a_gateway_with_its_status_off_cannot_be_asked(short):
    done = run("gotunnel_server", "status", cwd=short, STATUS_SOCKET="off")
    assert done.returncode == 2
    assert done.stderr.startswith("gotunnel-server: STATUS_SOCKET is off, expected a path")


def test_a_long_list_is_cut_and_counted(cache, tmp_path, monkeypatch):
    monkeypatch.setattr(status, "MOST_LISTED", 1)
    with gateway_here(cache) as gateway:
        tunnels = [{"hostname": f"a{n}.localhost", "target": "127.0.0.1:9"} for n in range(3)]
        with agent_here(gateway, tmp_path, tunnels=tunnels, ready=False):
            gateway.wait_for_routes("a0.localhost", "a1.localhost", "a2.localhost")
            inner = gateway.inner
            told = status.describe(inner.tunnels.registered(), inner.own_names, inner.keeper.state)
    assert (told["hostnames_total"], told["certificates_total"]) == (3, 5)
    assert len(told["hostnames"]) == len(told["certificates"]) == 1


def test_visits_are_counted_where_something_counts_them(cache, tmp_path):
    with Origin() as app, gateway_here(cache, METRICS_PORT="auto") as gateway:
        with agent_here(gateway, tmp_path, {APP: app.port}), gateway.dial(APP) as visitor:
            visitor.send(request())
            with app.accept() as target:
                target.read_head()
                target.send(answer(b"hello"))
                visitor.read_until(b"hello")
            inner = gateway.inner

            def told():
                return status.describe(
                    inner.tunnels.registered(), inner.own_names, inner.keeper.state,
                    inner.recording.counts,
                )  # fmt: skip

            wait_until(lambda: told()["visits"]["ended"] == 1)
            visits, (row,) = told()["visits"], told()["hostnames"]
    assert visits["failed"] == 0 and visits["sent_bytes"] > 5 and visits["received_bytes"] > 5
    assert (row["visits"], row["failed_visits"]) == (1, 0)


def test_a_hostname_that_two_sessions_have_for_a_moment_is_listed_twice(cache, tmp_path):
    with gateway_here(cache) as gateway, agent_here(gateway, tmp_path, {APP: 9}):
        inner = gateway.inner
        tunnels = inner.tunnels.registered() * 2
        told = status.describe(tunnels, inner.own_names, inner.keeper.state)
    assert [row["hostname"] for row in told["hostnames"]] == [APP, APP]


def test_a_failed_certificate_is_told_with_its_reason_on_one_line():
    state = State(FAILED, "no\nDNS" + "x" * 10_000, next_at=100.5, ends_at=86400 * 3)
    told = status.describe([], ["gateway.test"], lambda hostname: state, now=lambda: 86400.0)
    (row,) = told["certificates"]
    assert (row["state"], row["days_left"], row["next_order_at"]) == ("failed", 2, 100)
    assert row["reason"].startswith("no DNS") and len(row["reason"]) < 1000


def test_an_agent_finds_the_place_of_its_socket(tmp_path, monkeypatch):
    def of(path):
        config = types.SimpleNamespace(status_socket=path)
        made = status_socket_of(config, dict)
        return made and made.path

    monkeypatch.setattr("gotunnel_agent.status.runtime_places", lambda program: [f"{tmp_path}/p/s"])
    assert of("off") is None
    assert of("mine.sock") == "mine.sock"
    assert of("") == f"{tmp_path}/p/s"
    assert status_places(None) == ([f"{tmp_path}/p/s"], False)


@pytest.mark.parametrize(
    "told, chosen, answered, said",
    [
        (["a.yaml"], None, "a.yaml", ""),
        (["a.yaml", "b.yaml"], None, "a.yaml",
         "gotunnel-agent: this is the agent of a.yaml; that of b.yaml answers, too: choose by "
         "-c FILE\n"),
        (["a.yaml", "b.yaml"], "b.yaml", "b.yaml", ""),
        (["a.yaml"], "b.yaml", None, "the agent of a.yaml answers, not that of b.yaml: give each a "
         "status_socket of its own"),
        (["/run/credentials/x/a.yaml"], "b.yaml", "/run/credentials/x/a.yaml", ""),
    ],
)  # fmt: skip
def test_of_two_agents_the_one_that_is_asked_for_answers(told, chosen, answered, said, capsys):
    answers = iter([{"configuration": path} for path in told])
    try:
        found = first_of(answers) if chosen is None else agent_of(chosen, answers)
        assert found["configuration"] == answered and capsys.readouterr().err == said
    except NoAnswer as error:
        assert answered is None and str(error) == said


def test_an_agent_without_a_session_says_why():
    snapshot = Snapshot(
        gateway="gateway:9443", since=None, problem="connection\nrefused", old_sessions=0, visits=0,
        routes={}, certificates={}, stopping=False, retry_at=None, refused={}, configured={},
    )  # fmt: skip
    told = describe_agent(snapshot, "agent.yaml")
    assert told["configuration"] == os.path.abspath("agent.yaml")
    assert (told["state"], told["problem"]) == ("no session", "connection\\nrefused")
