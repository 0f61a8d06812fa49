"""Reserves a stream for one visitor if a login on it is valid for the whole connection.

NTLM and Negotiate (RFC 4559) authenticate a connection, not a request: the target takes all later
requests on that connection for the same user's. On a stream shared between visitors, one visitor
would act as another. So a stream that has carried such a login serves only one visitor's connection
from then on, and ends with it.
"""

import re

from gotunnel import Stream
from gotunnel_agent.common.http1 import Fields

from ..routes import Route, Tunnel

# Windows offers the same as Kerberos and Nego2, too. A match inside a quoted string does no harm:
# the visitor gets a stream of its own that it does not need.
_SCHEMES = re.compile(r"(?:^|[,\s])(?:ntlm|negotiate|kerberos|nego2)(?:[,\s]|$)", re.IGNORECASE)


def concerns_connection(fields: Fields, name: str) -> bool:
    """Whether a message carries such a login or asks for one. ``name`` is the field to look at:
    "authorization" in a request, "www-authenticate" in an answer."""
    values = fields.named.get(name)
    return values is not None and any(map(_SCHEMES.search, values))


class Owner:
    """A visitor's connection as the owner of at most one stream. One thread at a time."""

    def __init__(self) -> None:
        # The tunnel that keeps the stream, and may have ended it meanwhile.
        self._tunnel: Tunnel | None = None

    @property
    def tunnel(self) -> Tunnel | None:
        """The tunnel that keeps the stream; None if there is none."""
        return self._tunnel

    def take(self, route: Route) -> Stream | None:
        """The stream, if it belongs to ``route``; else None. Raises AgentBusy."""
        if self._tunnel is None:
            return None
        if route.tunnel is not self._tunnel:  # the agent has registered again
            self.close()
            return None
        return self._tunnel.take_own(route, self)

    def keep(self, route: Route, stream: Stream) -> None:
        """Keep ``stream``, whose last answer was complete, for the next request."""
        self.close()
        self._tunnel = route.tunnel
        self._tunnel.keep_own(route, self, stream)

    def close(self) -> None:
        """End the stream: the connection has ended."""
        tunnel, self._tunnel = self._tunnel, None
        if tunnel is not None:
            tunnel.drop_own(self)
