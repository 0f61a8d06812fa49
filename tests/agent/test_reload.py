"""An agent whose configuration changes while it runs, and one whose gateway is replaced."""

import contextlib
import json
import logging
import os
import signal
import threading
from time import monotonic

import pytest
from support import (
    APP,
    RAW,
    TIMEOUT,
    Origin,
    agent_here,
    agent_process,
    agent_yaml,
    answer,
    gateway_here,
    reserved_port,
    routes_of,
    wait_until,
)
from test_agent import HandMadeGateway

from gotunnel import MOVE, OVERLAP, Ack, End, encode_message
from gotunnel_agent import agent as agent_module
from gotunnel_agent import link as link_module
from gotunnel_agent.common import small_file
from gotunnel_agent.config import ConfigError, load, with_secrets
from gotunnel_agent.plan import changes, needs_session

OTHER = "other.localhost"


@pytest.fixture
def gateway(cache):
    with gateway_here(cache) as gateway:
        yield gateway


@pytest.fixture
def by_hand(cache):
    with HandMadeGateway(cache) as gateway:
        yield gateway


def config_of(gateway, folder, http={}, tcp={}, **keys):
    path = folder / "changed.yaml"
    path.write_text(agent_yaml(gateway, http, tcp, keys))
    return load(path)


def sessions_of(gateway):
    return [tunnel._session for tunnel in gateway.inner.tunnels._all()]


def site(text):
    origin = Origin()
    origin.serve(lambda target: (target.read_head(), target.send(answer(text))))
    return origin


# What differs ------------------------------------------------------------------------------------


def test_what_differs_is_told_by_hostnames_and_keys(gateway, tmp_path):
    old = config_of(gateway, tmp_path, {APP: 1, OTHER: 2})
    keys = {"jwt_secret": "s" * 40, "log_level": "debug"}
    new = config_of(gateway, tmp_path, {APP: 1, OTHER: 3}, {RAW: 4}, **keys)
    told = ["new raw.localhost", "changed other.localhost", "another jwt_secret",
            "another log_level"]  # fmt: skip
    assert changes(old, new) == told and needs_session(old, new)
    gone = ["changed other.localhost", "gone raw.localhost", "another jwt_secret",
            "another log_level"]  # fmt: skip
    assert changes(new, old) == gone
    assert changes(old, old) == [] and not needs_session(old, old)


def test_a_line_of_a_log_names_some_hostnames_and_counts_the_others(gateway, tmp_path, caplog):
    caplog.set_level(logging.INFO)
    many = {f"{number:02}.localhost": 1 for number in range(50)}
    told = changes(config_of(gateway, tmp_path, {APP: 1}), config_of(gateway, tmp_path, many))
    assert [words.rpartition(", ")[2] for words in told] == [
        "19.localhost and 30 more",
        f"gone {APP}",
    ]
    with agent_here(gateway, tmp_path, many):
        wait_until(lambda: ": serving " in caplog.text)
    wait_until(lambda: "; it served " in caplog.text)
    listing = [line for line in caplog.messages if "18.localhost" in line and "00.loc" in line]
    assert len(listing) == 3
    assert all(line.endswith("19.localhost and 30 more") for line in listing), listing


def test_what_concerns_the_process_alone_needs_no_session(gateway, tmp_path):
    old = config_of(gateway, tmp_path, {APP: 1})
    new = old._replace(drain_timeout=9, log_level="debug")
    assert changes(old, new) == ["another drain_timeout", "another log_level"]
    assert not needs_session(old, new)


def test_a_gateways_address_goes_by_its_key(gateway, tmp_path):
    old = config_of(gateway, tmp_path, {APP: 1})
    assert changes(old, old._replace(tunnel_host="a", tunnel_port=1)) == ["another tunnel_addr"]


def test_a_password_that_is_read_again_is_the_same(gateway, tmp_path):
    """Though its hash has a salt by chance."""
    tunnel = {"hostname": APP, "target": "127.0.0.1:1", "basic_auth": "alice:a long password"}
    old = config_of(gateway, tmp_path, tunnels=[tunnel])
    assert changes(old, config_of(gateway, tmp_path, tunnels=[tunnel])) == []
    tunnel["basic_auth"] = "alice:another password"
    assert changes(old, config_of(gateway, tmp_path, tunnels=[tunnel])) == [f"changed {APP}"]


# Another configuration ---------------------------------------------------------------------------


def test_tunnels_are_registered_anew_and_every_visit_goes_on(gateway, tmp_path, origin, quick):
    with site(b"new") as new, site(b"old") as old, Origin() as gone:
        ports = {"http": {APP: old.port}, "tcp": {RAW: gone.port}}
        with agent_here(gateway, tmp_path, **ports) as agent:
            (first,) = sessions_of(gateway)
            with gateway.dial(RAW) as visitor, gone.accept() as target:
                told = agent.change(
                    config_of(gateway, tmp_path, {APP: new.port, OTHER: old.port}, {})
                )
                assert told == [f"new {OTHER}", f"changed {APP}", f"gone {RAW}"]
                wait_until(lambda: routes_of(gateway.inner) == {APP, OTHER})
                assert gateway.get(APP) == (200, b"new")
                assert gateway.get(OTHER) == (200, b"old")
                visitor.send(b"question")
                assert target.read_exactly(8) == b"question"
                target.send(b"answer")
                assert visitor.read_exactly(6) == b"answer"
                assert not first.ended
            wait_until(lambda: first.ended)
            assert gateway.get(APP) == (200, b"new")


def test_no_visit_fails_while_the_file_changes_again_and_again(gateway, tmp_path, quick):
    with site(b"page") as page:
        ports = [{APP: page.port}, {APP: page.port, OTHER: page.port}]
        with agent_here(gateway, tmp_path, ports[0]) as agent:
            over, failed, served = threading.Event(), [], []

            def visit():
                while not over.is_set():
                    got = gateway.get(APP)
                    (served if got == (200, b"page") else failed).append(got)

            visitors = [threading.Thread(target=visit) for _ in range(4)]
            for visitor in visitors:
                visitor.start()
            for _ in range(5):
                agent.change(config_of(gateway, tmp_path, ports[1]))
                wait_until(lambda: routes_of(gateway.inner) == {APP, OTHER})
                agent.change(config_of(gateway, tmp_path, ports[0]))
                wait_until(lambda: routes_of(gateway.inner) == {APP})
            over.set()
            for visitor in visitors:
                visitor.join()
            assert not failed and served
        wait_until(lambda: not sessions_of(gateway))


def test_what_the_gateway_refuses_changes_nothing(gateway, tmp_path, quick, caplog):
    with site(b"page") as page, agent_here(gateway, tmp_path, {APP: page.port}) as agent:
        agent.change(config_of(gateway, tmp_path, {APP: 1, OTHER: 1}, jwt_secret="x" * 32))
        wait_until(lambda: "refused: auth failed" in caplog.text)
        assert gateway.get(APP) == (200, b"page")


def test_the_hostname_that_the_gateway_refuses_stays_as_it_is(gateway, tmp_path, quick, caplog):
    (tmp_path / "a").mkdir()
    with site(b"page") as page, site(b"new") as new, site(b"other") as other:
        with agent_here(gateway, tmp_path / "a", {OTHER: other.port}):
            with agent_here(gateway, tmp_path, {APP: page.port}) as agent:
                agent.change(config_of(gateway, tmp_path, {APP: new.port, OTHER: 1}))
                text = f"waits for {OTHER}, which another agent serves"
                wait_until(lambda: text in caplog.text)
                wait_until(lambda: gateway.get(APP) == (200, b"new"))
                assert gateway.get(OTHER) == (200, b"other")


def test_the_second_session_says_that_the_first_one_lives(by_hand, tmp_path, quick):
    with agent_here(by_hand.place, tmp_path, {APP: 1}) as agent:
        assert not by_hand.meet(Ack(True, features=(OVERLAP,))).overlap
        old = by_hand.session
        agent.change(config_of(by_hand.place, tmp_path, {OTHER: 1}))
        registered = by_hand.meet(Ack(True, features=(OVERLAP,)))
        assert registered.overlap and set(registered.routes) == {OTHER}
        wait_until(lambda: old._mux.peer_left)  # what is gone has to be told
        by_hand.hang_up()
        old.close()
        old.join()


def test_a_gateway_that_would_cut_visits_hears_first_that_the_old_session_leaves(
    by_hand, tmp_path, quick
):
    with agent_here(by_hand.place, tmp_path, {APP: 1}) as agent:
        by_hand.meet(Ack(True))
        old = by_hand.session
        agent.change(config_of(by_hand.place, tmp_path, {OTHER: 1}))
        assert set(by_hand.meet(Ack(False, "not yet")).routes) == {OTHER}
        wait_until(lambda: old._mux.peer_left)
        by_hand.hang_up()
        old.close()
        old.join()


def test_a_change_does_not_wait_for_the_next_try(cache, tmp_path, monkeypatch, origin):
    monkeypatch.setattr(link_module, "retry_delay", lambda *arguments: 10 * TIMEOUT)
    with reserved_port() as port, gateway_here(cache) as gateway:
        keys = {"tunnel_addr": f"localhost:{port}"}
        with agent_here(gateway, tmp_path, {APP: 1}, ready=False, **keys) as agent:
            agent.change(config_of(gateway, tmp_path, {APP: 1}))
            gateway.wait_for_routes(APP)


def test_sighup_reads_the_file_again_and_says_what_differs(gateway, tmp_path):
    with site(b"page") as page, agent_process(gateway, tmp_path, {APP: page.port}) as agent:
        path = tmp_path / "agent.yaml"
        text = path.read_text()
        path.write_text(agent_yaml(gateway, {APP: page.port, OTHER: page.port}, {}, {}))
        agent.signal(signal.SIGHUP)
        agent.wait_for(r"INFO +SIGHUP: .*agent\.yaml: new other\.localhost$")
        gateway.wait_for_routes(APP, OTHER)
        path.write_text(text + "\n- this is no mapping")
        agent.signal(signal.SIGHUP)
        agent.wait_for(r"ERROR +SIGHUP: .*agent\.yaml: .*; what was read before stays in use$")
        assert gateway.get(OTHER) == (200, b"page")
        path.write_text(json.dumps({**json.loads(text), "ca_file": str(path)}))
        agent.signal(signal.SIGHUP)
        agent.wait_for(r"ERROR +SIGHUP: ca_file .*; what was read before stays in use$")
        path.write_text(json.dumps({**json.loads(text), "log_level": "debug"}))
        agent.signal(signal.SIGHUP)
        agent.wait_for(r"INFO +SIGHUP: .*: gone other\.localhost; another log_level$")
        wait_until(lambda: routes_of(gateway.inner) == {APP})
        agent.signal(signal.SIGHUP)
        agent.wait_for(r"INFO +SIGHUP: .*: nothing has changed$")
        assert gateway.get(APP) == (200, b"page")


# Secrets in files --------------------------------------------------------------------------------


def test_a_token_is_read_whenever_the_agent_dials(by_hand, tmp_path, quick, caplog):
    path = tmp_path / "token"
    path.write_text("first")
    keys = {"token_file": str(path), "jwt_secret": None}
    with agent_here(by_hand.place, tmp_path, {APP: 1}, **keys):
        assert by_hand.meet().token == "first"
        path.unlink()
        by_hand.hang_up()
        wait_until(lambda: "token_file: " in caplog.text)
        assert "cannot be read (No such file or directory)" in caplog.text
        assert "next try in" in caplog.text
        path.write_text("second\n")
        assert by_hand.meet().token == "second"
        by_hand.hang_up()


def test_a_secret_and_passwords_are_read_again(gateway, tmp_path):
    secret, users = tmp_path / "secret", tmp_path / "users"
    secret.write_text("a secret of the first days")
    users.write_text("alice:a long password")
    tunnel = {"hostname": APP, "target": "127.0.0.1:1", "basic_auth_file": str(users)}
    keys = {"jwt_secret": None, "jwt_secret_file": str(secret), "tunnels": [tunnel]}
    config = config_of(gateway, tmp_path, **keys)
    assert with_secrets(config) == config
    secret.write_text("a secret of the later days")
    assert with_secrets(config).jwt_secret == "a secret of the later days"
    users.write_text("alice:another password\nbob:a third password")
    (only,) = with_secrets(config).tunnels
    assert [entry.partition(":")[0] for entry in only.policy.basic_auth] == ["alice", "bob"]


def test_a_secret_that_came_from_a_pipe_stays(gateway, tmp_path):
    """As from /dev/stdin, or a shell's <(...), which give it once."""
    read, write = os.pipe()
    with open(read, "rb"):
        with open(write, "wb") as pipe:
            pipe.write(b"a secret of a vault")
        keys = {"jwt_secret": None, "jwt_secret_file": f"/dev/fd/{read}"}
        config = config_of(gateway, tmp_path, {APP: 1}, **keys)
        assert config.jwt_secret == "a secret of a vault"
        assert with_secrets(config) == config


@pytest.mark.parametrize("writer", [False, True])
def test_a_pipe_that_nobody_writes_into_holds_up_nothing(gateway, tmp_path, monkeypatch, writer):
    monkeypatch.setattr(small_file, "PIPE_TIMEOUT", 0.1)
    path = tmp_path / "fifo"
    os.mkfifo(path)
    with contextlib.ExitStack() as stack:
        if writer:
            both = os.open(path, os.O_RDWR)
            stack.callback(os.close, both)
        with pytest.raises(ConfigError, match="its writer did not end within 0.1 s"):
            config_of(gateway, tmp_path, jwt_secret=None, jwt_secret_file=str(path))


# The end -----------------------------------------------------------------------------------------


def test_a_stream_that_crosses_the_agents_good_bye_is_served(by_hand, tmp_path, origin, caplog):
    with agent_here(by_hand.place, tmp_path, tcp={RAW: origin.port}) as agent:
        by_hand.meet(Ack(True, features=(OVERLAP,)))
        wait_until(lambda: f"serving {RAW}" in caplog.text)  # it has read the ack
        mux = by_hand.session._mux
        stopping = threading.Thread(target=agent.stop)
        stopping.start()
        wait_until(lambda: mux.peer_left)
        mux.peer_left = False  # as if the gateway had not read it yet
        stream = by_hand.open(RAW)
        with origin.accept() as target:
            target.send(b"served")
            assert stream.read_exactly(6, TIMEOUT) == b"served"
        stream.close()
        by_hand.hang_up()
        stopping.join(TIMEOUT)
        assert not stopping.is_alive()


def test_visits_have_the_drain_time_and_no_more(gateway, tmp_path, origin, caplog):
    with agent_here(gateway, tmp_path, tcp={RAW: origin.port}, drain_timeout=0.5) as agent:
        with gateway.dial(RAW) as visitor, origin.accept():
            began = monotonic()
            agent.stop()
            assert 0.5 <= monotonic() - began < TIMEOUT
            assert "1 visits did not end in 0.5 s and were cut" in caplog.text
            with pytest.raises(OSError):
                assert visitor.read() != b""


def test_the_gateway_ends_the_session_of_an_agent_that_has_left(gateway, tmp_path, monkeypatch):
    """So the agent knows that no visit is on its way, and need not wait."""
    monkeypatch.setattr(agent_module, "LEAVE_LOOK", 10 * TIMEOUT)
    with site(b"page") as page, agent_here(gateway, tmp_path, {APP: page.port}, drain_timeout=60):
        assert gateway.get(APP) == (200, b"page")


# A gateway that stops ----------------------------------------------------------------------------


def test_an_agent_that_is_asked_by_a_message_dials_at_once(by_hand, tmp_path, monkeypatch):
    monkeypatch.setattr(link_module, "GO_AWAY_LOOK", 10 * TIMEOUT)
    monkeypatch.setattr(link_module, "MOVED", 0)
    with agent_here(by_hand.place, tmp_path, {APP: 1}):
        by_hand.meet()
        old = by_hand.session
        by_hand.control.write(encode_message(End(MOVE, "for a test")))
        by_hand.meet()
        by_hand.hang_up()
        old.close()
        old.join()


def test_an_agent_that_was_asked_dials_at_once_though_its_session_has_ended(
    by_hand, tmp_path, monkeypatch
):
    """It had no visits, and so a gateway that stops has ended it right behind the message."""
    monkeypatch.setattr(link_module, "retry_delay", lambda *arguments: 10 * TIMEOUT)
    monkeypatch.setattr(link_module, "MOVED", 0)
    with agent_here(by_hand.place, tmp_path, {APP: 1}):
        for _ in range(3):
            by_hand.meet()
            by_hand.control.write(encode_message(End(MOVE, "for a test")))
            by_hand.hang_up()
        by_hand.meet()
        by_hand.hang_up()


def test_a_gateway_that_always_asks_is_not_dialled_without_a_pause(by_hand, tmp_path, monkeypatch):
    counts = []
    monkeypatch.setattr(
        link_module, "retry_delay", lambda failures, *rest: counts.append(failures) or 0.01
    )
    with agent_here(by_hand.place, tmp_path, {APP: 1}):
        sessions = []
        for _ in range(3):
            by_hand.meet()
            sessions.append(by_hand.session)
            by_hand.control.write(encode_message(End(MOVE, "for a test")))
        by_hand.meet()
        assert counts == [1, 2, 3]
        by_hand.hang_up()
        for session in sessions:
            session.close()
            session.join()


def test_an_agent_moves_to_the_successor_and_its_visits_end_at_the_old_gateway(
    cache, tmp_path, origin, caplog
):
    caplog.set_level(logging.INFO)
    with reserved_port() as port:
        changed = {"TUNNEL_PORT": str(port), "DRAIN_TIMEOUT": "20"}
        with site(b"page") as page, gateway_here(cache, **changed) as old:
            ports = {"http": {APP: page.port}, "tcp": {RAW: origin.port}}
            with agent_here(old, tmp_path, **ports), old.dial(RAW) as visitor:
                with origin.accept() as target:
                    stopping = threading.Thread(target=old.inner.stop)
                    stopping.start()
                    wait_until(lambda: all(t.moving for t in old.inner.tunnels.registered()))
                    with gateway_here(cache, TUNNEL_PORT=str(port)) as new:
                        new.wait_for_routes(APP, RAW)
                        assert new.get(APP) == (200, b"page")
                        visitor.send(b"question")
                        assert target.read_exactly(8) == b"question"
                        target.send(b"answer")
                        assert visitor.read_exactly(6) == b"answer"
                        visitor.close()
                        target.close()
                        stopping.join(TIMEOUT)
                        assert not stopping.is_alive()
                        assert new.get(APP) == (200, b"page")
