"""Which agent gets a hostname that another one holds.

A hostname belongs to one session at a time, and is free as soon as that session ends. Often that
is too late: the agent's link was cut, and to the gateway the old session is only silent. So a claim
to the hostname makes the gateway find out:

    same credential, same instance    the agent itself has come back: the old session ends at once;
                                      if the gateway has asked for it, its visits go on
    any other agent                   the old session's agent is asked, and has ANSWER_TIMEOUT to
                                      show that it lives: then it keeps the hostname, else it is
                                      replaced

So two agents with one configuration do not take hostnames from each other for ever: the first one
keeps them while it lives. The other one is told which hostnames are taken, and comes back later.
"""

from time import monotonic

from ..routes import HostnameTaken

LOOK = 0.1  # seconds between looks whether a session has ended, or its agent has answered
# Seconds that a session may take to end: its demultiplexer is busy, and the machine too.
ENDING_TIMEOUT = 10
MOMENT = 0.05  # seconds that a worker waits for that itself: mostly it takes a few milliseconds


class Claim:
    """One agent's claim to hostnames. One thread at a time."""

    def __init__(self, registry, agent, routes, permit):
        """``agent``, a registration.Agent, wants ``routes`` (hostname to Route), if the registry's
        ``permit`` raises nothing."""
        self._registry = registry
        self._agent = agent
        self._routes = routes
        self._permit = permit
        self._asked = {}  # tunnel that holds one: monotonic time since when it is asked
        self._deadline = monotonic() + ENDING_TIMEOUT
        self._replaced = set()  # tunnels that were told to go

    def attempt(self) -> bool:
        """Take the hostnames, if that is decided: True if they are ours, False if it will be
        known later, in some LOOK seconds. Raises HostnameTaken, and what ``permit`` does."""
        try:
            self._registry.claim(self._routes, self._permit)
            return True
        except HostnameTaken as taken:
            if not taken.tunnels or monotonic() > self._deadline:
                raise
            others = [holder for holder in taken.tunnels if not self._agent.is_again(holder.agent)]
            for holder in others:
                if holder not in self._asked:
                    self._asked[holder] = holder.ask()
                elif holder.has_answered(self._asked[holder]):
                    raise
            if not others and all(holder.moving for holder in taken.tunnels):
                self._registry.claim(self._routes, self._permit, instead_of=taken.tunnels)
                successor = next(iter(self._routes.values())).tunnel
                for holder in taken.tunnels:
                    holder.step_aside(successor)
                return True
            if not others:  # all or none: where others stay, we need not end what may still serve
                replaced = taken.tunnels - self._replaced
                self._replaced |= replaced
                for holder in replaced:
                    holder.replace(f"its agent has come back, from {self._agent.host}")
                if replaced and all(holder.gone.wait(MOMENT) for holder in taken.tunnels):
                    return self.attempt()
            return False
