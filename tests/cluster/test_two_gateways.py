"""Two gateways in this process that are one on a real Redis, and agents that register with them."""

import contextlib
import logging
from dataclasses import replace
from time import monotonic
from urllib.request import urlopen

import pytest
from support import APP, agent_here, answer, gateway_here, request, wait_until

from gotunnel_server import status
from gotunnel_server.cluster import redis_board
from gotunnel_server.cluster.board import Card
from gotunnel_server.cluster.engine import Engine
from gotunnel_server.cluster.leases import TIMES
from gotunnel_server.cluster.members import Member
from gotunnel_server.cluster.sealed import new_key
from gotunnel_server.cluster.settings import read_url
from gotunnel_server.cluster.tenure import LEASE
from gotunnel_server.dashboard import page

KEY = new_key()


@pytest.fixture
def two(redis_server, proxy_to, cache, monkeypatch):
    """Two gateways, each with a line of its own to Redis: ``lines``. An emptied server is no reason
    to wait here, so that tests are quick."""
    monkeypatch.setattr(redis_board, "TIMES", TIMES._replace(settle=0))
    lines = [proxy_to(redis_server.port) for _ in range(2)]
    with contextlib.ExitStack() as stack:
        gateways = [
            stack.enter_context(gateway_here(cache, CLUSTER=line.url, CLUSTER_KEY=KEY,
                                             METRICS_PORT="auto"))
            for line in lines
        ]  # fmt: skip
        wait_until(lambda: all(len(each.inner.cluster.members()) == 2 for each in gateways))
        for gateway, line in zip(gateways, lines, strict=True):
            gateway.line = line
        yield gateways


@pytest.fixture
def folders(tmp_path):
    """Of agents."""
    made = [tmp_path / name for name in ("one", "two")]
    for folder in made:
        folder.mkdir()
    return made


def visit(gateway, origin):
    with gateway.dial(APP) as visitor:
        visitor.send(request())
        with origin.accept() as target:
            target.read_head()
            target.send(answer(b"hello"))
            assert visitor.read_message()[1] == b"hello"


def board_of(gateway):
    return gateway.inner.cluster.figures().member


def test_a_visit_is_served_by_any_gateway(two, folders, origin):
    with agent_here(two[0], folders[0], {APP: origin.port}):
        for gateway in two:
            wait_until(lambda each=gateway: each.inner._registry.lookup(APP))
            visit(gateway, origin)
    for gateway in two:
        wait_until(lambda each=gateway: each.inner._registry.lookup(APP) is None)


def test_a_gateway_beside_its_redis_says_that_others_do_not_reach_it(two, caplog):
    cluster = two[0].inner.cluster
    for cluster._bind, *told in (
        ((), "", "127.0.0.1:9443"),
        (("0.0.0.0",), "", "127.0.0.1:9443"),
        (("127.0.0.2",), "127.0.0.2:9443", "127.0.0.2:9443"),
        (("2001:db8::1", "127.0.0.1"), "[2001:db8::1]:9443", "[2001:db8::1]:9443"),
    ):
        caplog.clear()
        card = cluster._own_card(9443, None, None)
        assert [card.agents, card.peer] == told
        assert ("set CLUSTER_ADDRESS" in caplog.text) == (not card.agents)


def test_a_gateway_with_a_unix_socket_to_redis_is_reached_on_its_machine(two):
    cluster = two[0].inner.cluster
    address = read_url("unix:///run/redis/redis.sock")
    cluster.settings = replace(cluster.settings, redis=address)
    cluster.engine = Engine(cluster.settings)
    assert cluster._own_card(9443, None, None).peer == "127.0.0.1:9443"


@pytest.mark.parametrize("has_redis", [True, False])
def test_members_are_logged_by_gateways_and_not_by_processes(has_redis, caplog):
    caplog.set_level(logging.INFO)
    member = Member("00000001", None, "the board")
    member.former = object() if has_redis else None
    for listed in ({"00000002": Card("00000002", host="vm/2")}, {}):
        member._listed = listed
        member._learn(0.0, anew=False)
    said = [text.split("; ")[0].split(" (")[0].split(",")[0] for text in caplog.messages]
    there = ["gateway 00000002 at vm/2 has joined", "gateway 00000002 at vm/2 is gone"]
    assert said == (there if has_redis else [])


def test_operators_see_the_members(two):
    one, other = two
    with urlopen(f"http://127.0.0.1:{one.inner.metrics_port}/metrics") as answered:
        text = answered.read().decode()
    for line in ("gotunnel_cluster_members 2", "gotunnel_cluster_board_reachable 1",
                 "gotunnel_cluster_serving 1", "gotunnel_cluster_lost_total 0"):  # fmt: skip
        assert f"\n{line}\n" in text
    with urlopen(f"http://127.0.0.1:{one.inner.metrics_port}/readyz") as answered:
        assert answered.status == 200
    described = one.inner.cluster.describe()
    ids = {each.inner.cluster.id for each in two}
    assert {member["id"] for member in described["members"]} == ids
    told = status.of_document({"cluster": described})
    assert told["cluster"]["member"] == one.inner.cluster.id and told["cluster"]["reachable"]
    assert [row["leaving"] for row in told["members"]] == [False, False]
    shown = page.render({"gateway": {}, "cluster": described}).body.decode()
    assert all(f">{id}" in shown for id in ids) and "Gateways" in shown
    other.inner.cluster.drain()
    wait_until(lambda: [m["leaving"] for m in one.inner.cluster.describe()["members"]].count(True))


def test_a_second_agent_waits_and_serves_when_the_first_one_leaves(two, folders, origin):
    one, other = two
    with contextlib.ExitStack() as first:
        first.enter_context(agent_here(other, folders[0], {APP: origin.port}))
        with agent_here(one, folders[1], {APP: origin.port}, ready=False):
            for gateway in two:
                wait_until(lambda each=gateway: APP in each.inner.tunnels.standby.waited())
            first.close()
            for gateway in two:
                gateway.wait_for_routes(APP)
                visit(gateway, origin)


@pytest.mark.long
def test_all_goes_on_without_redis_and_as_before_with_it(two, folders, origin, redis_server):
    one = two[0]
    with agent_here(one, folders[0], {APP: origin.port}):
        for gateway in two:
            wait_until(lambda each=gateway: each.inner._registry.lookup(APP))
        redis_server.kill()
        wait_until(lambda: not any(board_of(each).reachable for each in two))
        gone_at = monotonic()
        while monotonic() - gone_at < LEASE + 0.5:
            for gateway in two:
                visit(gateway, origin)
        redis_server.start()
        wait_until(lambda: all(board_of(each).reachable for each in two))
        for gateway in two:
            visit(gateway, origin)
        assert [(board_of(each).outages, board_of(each).stops) for each in two] == [(1, 0)] * 2


@pytest.mark.slow
def test_a_gateway_that_is_cut_off_from_redis_withholds_its_hostnames(two, folders, origin):
    one, other = two
    with agent_here(one, folders[0], {APP: origin.port}):
        wait_until(lambda: one.inner._registry.lookup(APP))
        one.line.refuse()
        wait_until(lambda: not board_of(one).serving)
        assert APP not in one.inner._registry.held()
        assert one.inner.cluster.unready() == "no contact with the other gateways"
        one.line.admit()
        wait_until(lambda: APP in one.inner._registry.held())
        assert one.inner.cluster.unready() is None
        visit(one, origin)
