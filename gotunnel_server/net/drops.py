"""Counts connections that end before their peer has asked for anything: no visit of theirs is
recorded, and no registration refused. So the metrics account for each connection of a flood.
"""

import threading
from collections import Counter

SILENT = "silent"
SLOW = "slow"
LEFT = "left"
STOPPED = "gateway-stopped"
NOT_TLS = "not-tls"
TLS_FAILED = "tls-failed"
PROXY_HEADER = "proxy-header"
ADDRESS_FULL = "address-full"
NO_TCP_HOSTNAME = "no-tcp-hostname"
NO_PROOF = "no-proof"
BAD_TOKENS = "bad-tokens"
BLOCKED = "blocked"
PROTOCOL = "protocol"
NO_THREAD = "no-thread"
BUG = "bug"

# Word: what has happened. docs/operations.md has the same list.
REASONS = {
    SILENT: "the peer sent nothing in time",
    SLOW: "the peer began, and did not get as far as a request or a registration in time",
    LEFT: "the peer closed or reset its connection",
    STOPPED: "the gateway stopped",
    NOT_TLS: "its first bytes are of no protocol that is served on that port",
    TLS_FAILED: "the TLS handshake failed: no certificate for the hostname, or the peer refused it",
    PROXY_HEADER: "a broken PROXY header of a trusted proxy, or any of another peer",
    ADDRESS_FULL: "the address that a trusted proxy named has its share of connections",
    NO_TCP_HOSTNAME: "a protocol other than TLS or HTTP, and no tcp hostname that it is for",
    NO_PROOF: "a CA asked for a proof (TLS-ALPN-01) that is not published",
    BAD_TOKENS: "too many bad tokens came from the agent's address",
    BLOCKED: "the operator has blocked its address",
    PROTOCOL: "an agent, or a visitor by HTTP/2, broke the protocol, or sent too much",
    NO_THREAD: "the system gave no thread",
    BUG: "a bug of the gateway; the log has the traceback",
}


class Dropped(ConnectionAbortedError):
    """The gateway drops a connection; ``reason`` is a word of REASONS."""

    def __init__(self, reason: str, text: str):
        super().__init__(text)
        self.reason = reason


class Drops:
    """The count of one port. Any thread."""

    def __init__(self) -> None:
        self._counts: Counter[str] = Counter()  # by word
        self._lock = threading.Lock()  # guards it

    def add(self, reason: str) -> None:
        with self._lock:
            self._counts[reason] += 1

    def counts(self) -> Counter[str]:
        """By word of REASONS."""
        with self._lock:
            return Counter(self._counts)
