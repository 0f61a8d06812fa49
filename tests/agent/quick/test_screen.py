"""The screen of the quick commands."""

import logging
import threading

from gotunnel_agent.follow import Follower, Seen
from gotunnel_agent.quick.screen import Screen


class FakeAgent:
    follower = None


def test_without_a_terminal_each_visit_is_a_line_of_the_log(caplog):
    caplog.set_level(logging.INFO)
    agent, stop = FakeAgent(), threading.Event()
    screen = Screen(agent, None)
    assert isinstance(agent.follower, Follower)
    agent.follower.tell(Seen("a.example", "GET", "/x\x1b[2J\xff", 200, 0.0, 0.0123, 0, 345))
    agent.follower.tell(Seen("b.example", "", "", 0, 0.0, 1.5, 3, 4, "", "tcp"))
    stop.set()
    screen.run(stop)
    assert caplog.messages == [
        r"a.example: GET /x\x1b[2Jÿ 200 12 ms 345 bytes",
        "b.example: tcp 1500 ms 4 bytes",
    ]
