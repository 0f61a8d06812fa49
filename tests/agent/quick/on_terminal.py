"""A program with a status screen on the terminal that its argument names: `on_terminal.py TTY`.
Visits pass until SIGINT or SIGTERM comes."""

import os
import sys
import threading
from pathlib import Path
from time import monotonic, time

sys.path.insert(0, str(Path(__file__).parents[3]))

from gotunnel_agent.agent import Snapshot  # noqa: E402  # the path was set first
from gotunnel_agent.common.process import Signals  # noqa: E402
from gotunnel_agent.config import Target, Tunnel  # noqa: E402
from gotunnel_agent.follow import Seen  # noqa: E402
from gotunnel_agent.quick.screen import Screen  # noqa: E402
from gotunnel_agent.target import Route  # noqa: E402

TUNNEL = Tunnel("app.example.com", Target("127.0.0.1", 8080), "http")
SNAPSHOT = Snapshot(
    gateway="tunnel.example.com:9443", since=None, problem="", old_sessions=0, visits=0,
    routes={TUNNEL.hostname: Route(TUNNEL, url="https://app.example.com")}, certificates={},
    stopping=False, retry_at=None, refused={},
)  # fmt: skip


class FakeAgent:
    """Shows what it is told to."""

    def __init__(self, **changes):
        self.follower = None
        self.shown = SNAPSHOT._replace(**changes)

    def snapshot(self):
        return self.shown


def seen(path="/", status=200, **more):
    return Seen("app.example.com", "GET", path, status, time(), 0.012, 0, 345, **more)


def main():
    descriptor = os.open(sys.argv[1], os.O_RDWR)  # of the leader of a session: to control it
    for number in range(3):
        os.dup2(descriptor, number)
    agent = FakeAgent(since=monotonic())
    screen, signals, stop = Screen(agent, sys.stdout), Signals(), threading.Event()
    thread = threading.Thread(target=screen.run, args=(stop,), daemon=True)
    thread.start()

    def visit():
        for number in range(1000):
            if stop.wait(0.1):
                return
            agent.follower.tell(seen(f"/{number}"))

    threading.Thread(target=visit, daemon=True).start()
    signals.wait()
    stop.set()
    thread.join(5)


if __name__ == "__main__":
    main()
