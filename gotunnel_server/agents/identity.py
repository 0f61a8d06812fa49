"""The identity of an agent whose token is good, and what it may claim. Values in, values out."""

from __future__ import annotations

from dataclasses import dataclass, field

from gotunnel_agent.common.hostnames import WILDCARD
from gotunnel_agent.common.one_line import on_one_line

from . import scope
from .agents_file import Entry, Limits

MOST_SHOWN = 100  # characters of an issuer in a line


@dataclass(frozen=True)
class Identity:
    """The holder of a token, and what may be claimed with it."""

    issuer: str  # "" if the token names none
    hosts: tuple[str, ...] | None = None  # patterns, as in scope.py; None: any hostname
    ports: tuple[range, ...] | None = None  # None: any of TCP_PORTS
    entry: Entry | None = field(default=None, repr=False)  # in AGENTS_FILE; None: there is none
    ends: float | None = None  # wall-clock seconds; None: the agent signs its tokens itself
    # What signed the token: its credential may have two secrets for a while.
    secret: str = field(default="", repr=False, compare=False)

    @property
    def name(self) -> str:
        """The issuer, for the log."""
        return on_one_line(self.issuer, MOST_SHOWN)

    @property
    def credential(self) -> tuple[str, str]:
        """Equal for all tokens of one credential."""
        return ("shared" if self.entry is None else "agent", self.issuer)

    @property
    def limits(self) -> Limits:
        """What the agents of this credential may have at once, together."""
        return Limits() if self.entry is None else self.entry.limits

    @property
    def wildcard(self) -> str:
        """The wildcard that completes an open name (feature NAMES): the first one of the patterns;
        "" if there is none."""
        return next((host for host in self.hosts or () if host.startswith(WILDCARD)), "")

    @property
    def may_claim(self) -> str:
        """The patterns, for a message."""
        return "any hostname" if self.hosts is None else scope.shown(self.hosts)

    def why_not(self, hostname: str) -> str | None:
        """Why a hostname, as normal_hostname() gives it, may not be claimed; None if it may."""
        if self.hosts is None:
            if hostname.startswith(WILDCARD):
                return "a wildcard needs a credential that names the hostnames it is for"
            return None
        if scope.allows(self.hosts, hostname):
            return None
        return f"this credential may claim {self.may_claim}"

    def why_not_port(self, port: int) -> str | None:
        """Why the agent may not have a public port; None if it may."""
        if self.ports is None or any(port in ports for ports in self.ports):
            return None
        if not self.ports:
            return "this credential may have no public port"
        return f"this credential may have the ports {scope.shown(self.ports)}"
