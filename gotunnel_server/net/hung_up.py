"""Asks the kernel whether a peer has ended its side of a connection (POLLRDHUP)."""

import select

from gotunnel_agent.common.duplex import Duplex


def hung_up(connection: Duplex) -> bool:
    """Whether the peer has closed its side, even if bytes before the end are still unread. Always
    False on systems other than Linux, which cannot tell."""
    if not hasattr(select, "POLLRDHUP"):
        return False
    look = select.poll()
    look.register(connection, select.POLLRDHUP)
    return bool(look.poll(0))
