"""Visits that come to one gateway, and whose agent is at another one."""

import pytest
from peers_here import peers_here
from support import APP, RAW, agent_here, answer, request, status_of


@pytest.fixture
def two(cache):
    with peers_here(cache) as members:
        yield members


def test_a_visit_is_passed_on(two, origin, tmp_path):
    here, there = two
    with agent_here(there.gateway, tmp_path, {APP: origin.port}):
        here.sees(APP)
        with here.gateway.dial(APP) as visitor:
            visitor.send(request())
            target = origin.accept()
            head = target.read_head()
            assert b"\r\nX-Forwarded-For: 127.0.0.1\r\n" in head
            target.send(answer(b"from elsewhere"))
            assert visitor.read_message()[1] == b"from elsewhere"
    here.sees_no(APP)
    with here.gateway.dial(APP) as visitor:
        visitor.send(request())
        assert status_of(visitor.read_head()) == 502


def test_a_visit_in_tcp_mode_is_passed_on(two, origin, tmp_path):
    here, there = two
    with agent_here(there.gateway, tmp_path, tcp={RAW: origin.port}):
        here.sees(RAW)
        with here.gateway.dial(RAW) as visitor:
            visitor.send(b"question")
            target = origin.accept()
            assert target.read_exactly(8) == b"question"
            visitor.finish()
            assert target.read() == b""
            target.send(b"answer")
            target.finish()
            assert visitor.read_to_end() == b"answer"
