"""Who serves which hostname: the one place that knows."""

import threading
from typing import NamedTuple

from gotunnel import normal_hostname


class HostnameTaken(Exception):
    """Another tunnel serves the hostname; ``hostname`` is which."""

    def __init__(self, hostname):
        super().__init__(f"host already registered: {hostname}")
        self.hostname = hostname


class Route(NamedTuple):
    """What a hostname leads to.

    ``hostname`` is spelled as the agent registered it: Go agents look it up as it stands.
    ``mode`` is "http" or "tcp". ``tunnel`` is whatever the claimer gave. ``host_header`` is the
    Host that the target gets, None for the visitor's. ``addressed``: the agent wants to hear the
    visitor's address. ``target_port`` is the target's, ``port`` the public one that was opened for
    it; None if there is none.
    """

    hostname: str
    mode: str
    tunnel: object
    host_header: str | None = None
    addressed: bool = False
    target_port: int | None = None
    port: int | None = None


class Registry:
    """Hostnames to routes. Any thread; no I/O."""

    def __init__(self, reserved=()):
        """``reserved`` hostnames are the gateway's own: no tunnel can have them."""
        self._reserved = frozenset(map(normal_hostname, reserved))
        self._lock = threading.Lock()  # held to change _routes; reading one entry needs none
        self._routes = {}

    def claim(self, routes):
        """Take every hostname of ``routes`` (hostname to Route), or none of them.

        Raises HostnameTaken, naming the first that is served or reserved.
        """
        with self._lock:
            for hostname in routes:
                if hostname in self._routes or hostname in self._reserved:
                    raise HostnameTaken(hostname)
            self._routes.update(routes)

    def update(self, routes):
        """Put ``routes``, claimed before and still held, in the place of what they were."""
        with self._lock:
            for hostname, route in routes.items():
                if hostname in self._routes and self._routes[hostname].tunnel is route.tunnel:
                    self._routes[hostname] = route

    def release(self, tunnel):
        """Give back whatever ``tunnel`` has claimed."""
        with self._lock:
            self._routes = {
                hostname: route
                for hostname, route in self._routes.items()
                if route.tunnel is not tunnel
            }

    def only_tcp(self):
        """The one Route in tcp mode; None if there is none, or more than one."""
        routes = [route for route in self.routes().values() if route.mode == "tcp"]
        return routes[0] if len(routes) == 1 else None

    def lookup(self, hostname):
        """The Route of a hostname (lower case, no port, no trailing dot), or None."""
        return self._routes.get(hostname)

    def routes(self) -> dict:
        """All there are, hostname to Route, as they are now."""
        with self._lock:
            return dict(self._routes)
