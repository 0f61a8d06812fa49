"""Logins that are a connection's: the stream that one was made on belongs to one visitor.

NTLM and Negotiate (RFC 4559) sign in a connection, and not a request: the target takes whatever
comes on the connection afterwards for the same user's. So a stream on which such a login is seen
serves one visitor's connection from then on, and ends with it.
"""

import re

from gotunnel_agent.common.http1 import Fields

# Kerberos and Nego2 are names by which Windows offers the same. A word of that name inside of a
# quoted text counts too: then a visitor has a stream of its own without need, and no more.
_SCHEMES = re.compile(r"(?:^|[,\s])(?:ntlm|negotiate|kerberos|nego2)(?:[,\s]|$)", re.IGNORECASE)


def concerns_connection(fields: Fields, name: str) -> bool:
    """Whether a message asks for such a login, or brings one. ``name``: "authorization" of a
    request, "www-authenticate" of an answer."""
    return name in fields and any(map(_SCHEMES.search, fields.all(name)))


class Owner:
    """A visitor's connection, which may own one stream. One thread at a time."""

    def __init__(self):
        self._tunnel = None  # of that stream, which the tunnel may have ended meanwhile

    def take(self, route):
        """The stream, if it leads where ``route`` does; else None. Raises AgentBusy."""
        if self._tunnel is None:
            return None
        if route.tunnel is not self._tunnel:  # the agent has come anew
            self.close()
            return None
        return self._tunnel.take_own(route, self)

    def keep(self, route, stream):
        """Keep a stream, whose last answer was complete, for the next request."""
        self.close()
        self._tunnel = route.tunnel
        self._tunnel.keep_own(route, self, stream)

    def close(self):
        """End the stream: the connection has ended."""
        tunnel, self._tunnel = self._tunnel, None
        if tunnel is not None:
            tunnel.drop_own(self)
