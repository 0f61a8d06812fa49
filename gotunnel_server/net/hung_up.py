"""Whether a peer has ended its side of a connection, as the system knows it."""

import select

from gotunnel_agent.common.duplex import Duplex


def hung_up(connection: Duplex) -> bool:
    """Also if unread bytes lie before the end. False where the system cannot tell (only Linux
    can)."""
    if not hasattr(select, "POLLRDHUP"):
        return False
    look = select.poll()
    look.register(connection, select.POLLRDHUP)
    return bool(look.poll(0))
