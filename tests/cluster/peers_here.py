"""Gateways of this process that are peers, without a board: the test says who the members are."""

import contextlib
from typing import NamedTuple

from support import gateway_here, wait_until

from gotunnel_server.cluster.peers import Peers
from gotunnel_server.cluster.secret import Secret

KEY = b"a key of the cluster, of 32 bytes and more"


class Card(NamedTuple):
    id: str
    peer: str
    host: str = ""


class Member:
    """A gateway and its Peers. ``gateway`` is a support.Gateway."""

    def __init__(self, gateway, id, keys):
        self.gateway = gateway
        self.inner = gateway.inner
        self.without = False  # what it tells members that ask
        self.promises, self.departed = [], []  # what it has heard
        newcomers = self.inner._newcomers
        self.peers = Peers(
            id, secret=Secret(keys), registry=self.registry, tunnels=self.inner.tunnels,
            terms=lambda: newcomers.terms, promise=lambda: self.without, host=f"host-{id}",
            promised=lambda *heard: self.promises.append(heard), departed=self.departed.append,
        )  # fmt: skip
        newcomers.peers = self.peers
        self.card = Card(id, f"127.0.0.1:{gateway.tunnel_port}", f"host-{id}")
        self.stopped = False

    @property
    def registry(self):
        return self.inner._registry

    def sees(self, *hostnames):
        """Wait until these hostnames have a route here, to whichever gateway."""
        wait_until(lambda: all(map(self.registry.lookup, hostnames)))

    def sees_no(self, *hostnames):
        wait_until(lambda: not any(map(self.registry.lookup, hostnames)))

    def stop(self):
        if not self.stopped:
            self.stopped = True
            self.peers.stop()


@contextlib.contextmanager
def member_here(cache, id, keys=(KEY,), **changes):
    """A gateway that knows no other one yet."""
    with gateway_here(cache, **changes) as gateway:
        member = Member(gateway, id, keys)
        member.peers.start()
        try:
            yield member
        finally:
            member.stop()


def join(*members):
    """Have them know each other, and wait until they are connected."""
    cards = {member.card.id: member.card for member in members}
    for member in members:
        member.peers.change(cards)
    others = [len(members) - 1] * 3
    wait_until(lambda: all([*member.peers.figures()[:3]] == others for member in members))


@contextlib.contextmanager
def peers_here(cache, count=2, **changes):
    """So many gateways that are peers."""
    with contextlib.ExitStack() as stack:
        members = [
            stack.enter_context(member_here(cache, f"{number:08x}", **changes))
            for number in range(count)
        ]
        join(*members)
        yield members
