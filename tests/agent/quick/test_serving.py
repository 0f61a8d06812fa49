"""A quick tunnel and its agent, in this process: its name, its address, and refusals."""

import contextlib
import json
import logging
import threading
from unittest import mock

import pytest
from support import (
    RAW,
    SECRET,
    TICK,
    TIMEOUT,
    TUNNEL_HOST,
    answer,
    gateway_here,
    reserved_port,
    wait_until,
)

from gotunnel import HOST_HEADER
from gotunnel_agent import config as agent_config
from gotunnel_agent import link as link_module
from gotunnel_agent.common.refusals import TIMED_OUT, UNREACHABLE, UNTRUSTED
from gotunnel_agent.config import Target, Tunnel
from gotunnel_agent.quick import names, serving
from gotunnel_agent.quick.commands import quick_config
from gotunnel_agent.quick.names import Labels, Memory, key_of
from gotunnel_agent.quick.serving import Serving
from gotunnel_agent.registering import NO_NAMES, _unknown
from gotunnel_agent.target import Route, Unserved
from gotunnel_server.agents import tunnel as tunnel_module

DEV = "dev.localhost"
APP = f"app.{DEV}"
KEY = key_of("some tunnel")


@pytest.fixture
def gateway(cache, tmp_path):
    """A gateway that gives the account a wildcard, one hostname, and ports."""
    path = tmp_path / "agents.yaml"
    path.write_text(
        f'laptop:\n  secret: "{SECRET}"\n  hosts: ["*.{DEV}", "{RAW}"]\n  ports: "1024-65535"\n'
    )
    path.chmod(0o600)
    with gateway_here(cache, AGENTS_FILE=str(path), TCP_PORTS="1024-65535") as gateway:
        yield gateway


@pytest.fixture
def memory(tmp_path):
    return Memory(tmp_path / "state")


class Here:
    """A quick tunnel in this process. ``told`` are the addresses that its user was told."""

    def __init__(self, gateway, folder, tunnel, labels):
        path = folder / "account.yaml"
        path.write_text(json.dumps({
            "tunnel_addr": f"{TUNNEL_HOST}:{gateway.tunnel_port}",
            "ca_file": str(gateway.ca_file),
            "jwt_issuer": "laptop",
            "jwt_secret": SECRET,
        }))  # fmt: skip
        account = agent_config.load(path, needs_tunnels=False)
        self.told = []
        config = quick_config(account, tunnel, verbose=False)
        self.serving = Serving(config, labels, self.told.append)
        functions = (self.serving.run_agent, self.serving.run)
        self._threads = [threading.Thread(target=function) for function in functions]
        for thread in self._threads:
            thread.start()

    def address(self):
        return wait_until(lambda: self.told or self.serving.failure and [""])[0]

    def failure(self):
        return wait_until(lambda: self.serving.failure)

    def end(self):
        self.serving.stop()
        with mock.patch.object(tunnel_module, "LEFT_LOOK", TICK):
            self.serving.agent.stop()
            for thread in self._threads:
                thread.join(TIMEOUT)


@pytest.fixture
def start(gateway, tmp_path):
    """Starts quick tunnels: by a hostname, or by labels."""
    with contextlib.ExitStack() as stack:

        def start(name, target=1, mode="http", **more):
            labels = None if isinstance(name, str) else name
            hostname = name if labels is None else f"{labels.another()}.*"
            tunnel = Tunnel(hostname, Target("localhost", target), mode, **more)
            here = Here(gateway, tmp_path, tunnel, labels)
            stack.callback(here.end)
            return here

        yield start


def test_hostname_is_served_and_its_address_told_once(gateway, start, origin):
    origin.serve(lambda wire: wire.read_head() and wire.send(answer(b"from the port")))
    here = start(APP, origin.port)
    assert here.address() == f"https://{APP}:{gateway.public_port}"
    assert gateway.get(APP) == (200, b"from the port")
    assert gateway.get(APP) == (200, b"from the port")
    assert len(here.told) == 1


def test_name_without_a_dot_lies_below_the_wildcard(gateway, start, caplog):
    assert start("shop.*").address() == f"https://shop.{DEV}:{gateway.public_port}"
    assert gateway.get(f"shop.{DEV}")[0] == 502
    assert f"shop.{DEV}: target localhost:1: " in caplog.text


def test_random_name_is_that_of_the_last_time(gateway, start, memory):
    first = start(Labels(memory, KEY)).address()
    [label] = memory.recall(KEY)
    assert first == f"https://{label}.{DEV}:{gateway.public_port}"


def test_random_name_stays_when_the_agent_dials_again(gateway, start, memory, monkeypatch, caplog):
    monkeypatch.setattr(link_module, "retry_delay", lambda *arguments: 0.05)
    here = start(Labels(memory, KEY))
    hostname = here.address().removeprefix("https://").rpartition(":")[0]
    agent = here.serving.agent
    before = agent.snapshot().since
    agent.link.service.session.close("the line is cut")
    wait_until(lambda: agent.snapshot().since not in (None, before))
    assert list(agent.snapshot().routes) == [hostname] and len(here.told) == 1


def test_name_that_another_agent_has_is_left_to_it(gateway, start, memory, caplog):
    memory.note(KEY, "quick-otter-10")
    caplog.set_level(logging.INFO, "gotunnel")
    assert "quick-otter-10." in start(Labels(memory, KEY)).address()
    second = start(Labels(memory, KEY)).address()
    mine, other = wait_until(lambda: len(memory.recall(KEY)) == 2 and memory.recall(KEY))
    assert mine == "quick-otter-10" and f"//{other}." in second
    assert f"another agent has {mine}; asking for {other}" in caplog.messages
    assert not any("keeps trying" in line for line in caplog.messages)


def test_command_gives_up_after_some_names(start, memory, monkeypatch):
    monkeypatch.setattr(names, "random_label", lambda: "quick-otter-10")
    monkeypatch.setattr(names, "MOST_TRIES", 3)
    monkeypatch.setattr(serving, "MOST_TRIES", 3)
    start(Labels(memory, KEY)).address()
    failure = start(Labels(memory, KEY, anew=True)).failure()
    assert failure == "other agents have all of 3 names; --host chooses one"


def test_hostname_of_another_agent_is_waited_for(start, caplog):
    start(APP).address()
    second = start(APP)
    wait_until(
        lambda: "another agent serves the hostname, and this one keeps trying" in caplog.text
    )
    assert not second.serving.failure


def test_what_the_gateway_refuses_is_told_in_its_words(start, caplog):
    failure = start("app.example.com").failure()
    assert failure.startswith("the gateway refused: not allowed: app.example.com")
    assert f"*.{DEV}, {RAW}" in failure
    assert "next try" not in caplog.text


def test_port_that_the_gateway_refuses_is_told_in_its_words(start):
    assert "port 99" in start(RAW, mode="tcp", port="99").failure()


def test_refusals_are_told_in_words_for_a_command():
    """By an older gateway, or a Go one, too."""
    config = mock.Mock(tunnels=[Tunnel("quick-otter-10.*", Target("localhost", 1), "http")])
    with mock.patch.object(serving, "Agent"):
        new = Serving(config, mock.Mock(), print)
        for words in ("invalid hostname: quick-otter-10.*; expected letters", NO_NAMES):
            assert new._in_words(words).endswith("update it, or name a hostname with --host")
        assert new._in_words("not allowed: quick-otter-10.*: no wildcard") == (
            "not allowed: quick-otter-10.*: no wildcard; --host NAME asks for a certain one"
        )
        given = Serving(config, None, print)
        assert given._in_words("invalid hostname: x") == "invalid hostname: x"
        assert given._in_words(_unknown([HOST_HEADER])) == (
            f"this gateway does not know {HOST_HEADER}; update the gateway"
        )
        assert given._in_words("auth failed") == (
            "auth failed; `gotunnel-agent join` stores another credential"
        )


def test_tcp_tunnel_tells_how_visitors_come(gateway, start):
    here = start(RAW, 22, "tcp")
    assert here.address() == f"tls://{RAW}:{gateway.public_port}"
    [note] = wait_until(lambda: here.serving.notes)
    assert f"forward --ca-file CA_FILE %h:{gateway.public_port}' USER@{RAW}" in note


def test_public_port_is_the_address(start):
    with reserved_port() as port:
        pass
    here = start(RAW, mode="tcp", port=str(port))
    assert here.address() == f"tcp://{RAW}:{port}"


@pytest.mark.parametrize(
    ("mode", "refusal", "said"),
    [
        ("http", UNREACHABLE, "nothing answers at localhost:1 yet (why); until then visitors get "
         "an error page"),
        ("tcp", TIMED_OUT, "nothing answers at localhost:1 yet (why); until then visitors cannot "
         "connect"),
        ("http", UNTRUSTED, "the certificate of localhost:1 is not to be trusted, and visitors get "
         "an error page; --target-skip-tls-verify accepts any"),
    ],
)  # fmt: skip
def test_target_that_does_not_answer_is_told_with_what_helps(
    monkeypatch, caplog, mode, refusal, said
):
    def dial(*arguments):
        raise Unserved(refusal, "why")

    monkeypatch.setattr(serving, "dial", dial)
    serving.look_at_target(Route(Tunnel(APP, Target("localhost", 1), mode)))
    assert caplog.messages == [said]
