"""What an agent has told of its targets (feature HEALTH): which are well, and which are not. Visits
are held back from these.

Bounded: only hostnames that the session serves are remembered, and a reason has MOST_REASON
characters. An agent may send as many messages as it likes: heartbeat.LISTEN_COST slows their
reading down, and NEWS limits the log.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from time import monotonic

from gotunnel import Health
from gotunnel_agent.common.hostnames import normal_hostname
from gotunnel_agent.common.one_line import words_on_one_line
from gotunnel_agent.common.token_bucket import Buckets

from ..routes import Route

log = logging.getLogger("gotunnel.health")

MOST_REASON = 200  # characters of a reason that are kept
# Log lines of one session at once, and per second in the long run: each target that fails should
# have its line, and one that changes all the time must not fill the log.
NEWS, NEWS_RATE = 20, 0.1


class TargetHealth:
    """Of one tunnel. note() is for its demultiplexer, all else for any thread."""

    def __init__(self, agent: str):
        """``agent`` names the agent in the log."""
        # By Route.hostname: why the target is not well, "" if it is. Without those that the agent
        # has said nothing of. Replaced whole.
        self.told: Mapping[str, str] = {}
        self._agent = agent
        self._news = Buckets(NEWS_RATE, NEWS)

    def note(self, messages: Iterable[Health], routes: Mapping[str, Route]) -> None:
        """Take messages, in their order. ``routes`` are those that the tunnel serves."""
        news = {normal_hostname(message.hostname): message for message in messages}
        told = {**self.told}
        for hostname, message in news.items():
            route = routes.get(hostname)
            if route is None:
                continue
            problem = "" if message.ok else words_on_one_line(message.reason, MOST_REASON)
            problem = problem or ("" if message.ok else "no reason given")
            if bool(problem) != bool(told.get(route.hostname, "")):
                self._log(hostname, problem)
            told[route.hostname] = problem
        self.told = told

    def unwell(self) -> dict[str, str]:
        """Why targets are not well, by Route.hostname."""
        return {hostname: problem for hostname, problem in self.told.items() if problem}

    def _log(self, hostname: str, problem: str) -> None:
        now = monotonic()
        if self._news.wait("", now):
            return
        self._news.take("", now)
        if problem:
            log.warning("%s: %s: its target is not well: %s; its visits are held back",
                        self._agent, hostname, problem)  # fmt: skip
        else:
            log.info("%s: %s: its target is well again", self._agent, hostname)
