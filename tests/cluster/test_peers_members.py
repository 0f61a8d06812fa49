"""Members that come and go, and agents that move between them."""

import contextlib
from concurrent.futures import ThreadPoolExecutor

import pytest
from peers_here import join, member_here, peers_here
from support import APP, agent_here, answer, request, status_of, wait_until

from gotunnel_server.visitors.port import drain


def test_a_visit_is_never_passed_on_twice(cache, origin, tmp_path):
    """The one in the middle takes back what it does not have, and does not ask the third one."""
    with peers_here(cache, 3) as (first, second, third):
        with agent_here(third.gateway, tmp_path, {APP: origin.port}):
            first.sees(APP)
            second.sees(APP)
            tunnel = first.registry.lookup(APP).tunnel
            assert tunnel.via.id == third.card.id
            assert second.registry.lookup(APP).tunnel.via.id == third.card.id


@pytest.mark.parametrize("how", ["stopped", "no member"])
def test_the_hostnames_of_a_member_that_is_gone_are_gone(cache, origin, tmp_path, how):
    with peers_here(cache) as (here, there):
        with agent_here(there.gateway, tmp_path, {APP: origin.port}):
            here.sees(APP)
            with here.gateway.dial(APP) as visitor:
                visitor.send(request())
                target = origin.accept()
                target.read_head()
                if how == "stopped":
                    there.stop()
                    assert here.departed == [there.card.id]
                    assert status_of(visitor.read_head()) == 502
                else:  # it may be that it has lost only its board
                    here.peers.change({here.card.id: here.card})
                    here.sees_no(APP)
                    target.send(answer(b"whole"))
                    assert visitor.read_message()[1] == b"whole"
                    here.peers.change({card.id: card for card in (here.card, there.card)})
                    here.sees(APP)
                    here.peers.change({here.card.id: here.card})
            here.sees_no(APP)
            with here.gateway.dial(APP) as visitor:
                visitor.send(request())
                assert status_of(visitor.read_head()) == 502


@pytest.mark.parametrize("in_time", [True, False])
def test_a_member_that_drains_gets_no_new_visits_and_waits_for_those_it_has(
    cache, origin, tmp_path, in_time
):
    with peers_here(cache) as (here, there), ThreadPoolExecutor(1) as pool:
        with agent_here(there.gateway, tmp_path, {APP: origin.port}):
            here.sees(APP)
            with here.gateway.dial(APP) as idle, here.gateway.dial(APP) as visitor:
                idle.send(request())
                target = origin.accept()
                target.read_head()
                visitor.send(request())
                other = origin.accept()
                other.read_head()
                target.send(answer())
                idle.read_message()  # its stream is kept
                there.peers.drain()
                here.sees_no(APP)
                wait_until(lambda: there.peers.passages.running == 1)
                passages = [there.peers.passages]
                drained = pool.submit(drain, passages, 20 if in_time else 0, lambda: None)
                if in_time:
                    other.send(answer(b"whole"))
                    assert visitor.read_message()[1] == b"whole"
                else:
                    assert status_of(visitor.read_head()) == 502
                drained.result()


def test_an_agent_that_moves_to_a_third_member_is_found_there(cache, origin, tmp_path):
    origin.serve(lambda wire: (wire.read_head(), wire.send(answer(b"ok"))))
    with peers_here(cache, 3) as (here, one, other):
        for member in one, other, one:
            with agent_here(member.gateway, tmp_path, {APP: origin.port}):
                here.sees(APP)
                assert here.registry.lookup(APP).tunnel.via.id == member.card.id
                assert here.gateway.get(APP) == (200, b"ok")
            here.sees_no(APP)


def test_a_request_that_finds_its_agent_gone_there_waits_for_it(cache, origin, tmp_path):
    """The other gateway has not heard of it yet. Nothing of the request was passed on."""
    with contextlib.ExitStack() as stack:
        members = here, there = [
            stack.enter_context(member_here(cache, id, AGENT_TIMEOUT="20"))
            for id in ("00000000", "00000001")
        ]
        join(*members)
        with agent_here(there.gateway, tmp_path, {APP: origin.port}):
            here.sees(APP)
            routes = there.registry.held()
            there.registry._served = {}  # and nobody is told
            visitor = stack.enter_context(here.gateway.dial(APP))
            visitor.send(request("POST", body=b"a form"))
            wait_until(lambda: here.inner._waiting._guests)
            there.registry._served = routes
            there.peers._told = {}
            there.registry.on_change()
            target = origin.accept()
            assert target.read_message()[1] == b"a form"
            target.send(answer(b"after all"))
            assert visitor.read_message()[1] == b"after all"
