"""Contexts that answer one protocol of a visitor's choice (ALPN, RFC 7301).

A context names the protocols that it takes when it is made, and there is none for each protocol
that a hostname in tcp mode might be asked for. So a copy is made when the first visitor asks, from
what the context was loaded from. That is kept in memory: a handshake reads no disk, and the files
may be others by now.
"""

from __future__ import annotations

import logging
import ssl
import threading
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path

from .pem_file import pem_file

log = logging.getLogger("gotunnel.choices")

# Copies that are kept, some 50 kB each: of each hostname in tcp mode a few. Visitors may offer any
# protocol, so the oldest goes.
MOST_CHOICES = 256


class Loaded(ssl.SSLContext):
    """A server's context that remembers what was loaded into it."""

    def __new__(cls) -> Loaded:
        self = super().__new__(cls, ssl.PROTOCOL_TLS_SERVER)
        self.pairs = []  # (certificates, key) in PEM
        return self

    def __init__(self) -> None:  # the protocol is given to __new__
        pass

    def load_cert_chain(self, certfile, keyfile=None, password=None):
        super().load_cert_chain(certfile, keyfile, password)
        self.pairs.append((Path(certfile).read_bytes(), Path(keyfile or certfile).read_bytes()))


class Choices:
    """Copies of contexts, by context and protocol. Any thread."""

    def __init__(self, new_context: Callable[[tuple[str, ...]], Loaded]) -> None:
        """`new_context(alpn)` makes an empty one."""
        self._new_context = new_context
        self._made: OrderedDict[tuple[Loaded, str], Loaded] = OrderedDict()
        self._lock = threading.Lock()  # guards _made

    def context(self, context: Loaded, protocol: str) -> Loaded:
        """`context`, but for the protocol that it takes; itself where no copy can be made."""
        key = context, protocol
        with self._lock:
            if key in self._made:
                self._made.move_to_end(key)
                return self._made[key]
        try:
            made = self._new_context((protocol,))
            for certificates, private_key in context.pairs:
                with pem_file(certificates) as first, pem_file(private_key) as second:
                    made.load_cert_chain(first, second)
        except OSError as error:  # no descriptor is left
            log.debug("no context for the protocol %r: %s", protocol, error)
            return context
        with self._lock:
            self._made[key] = made
            if len(self._made) > MOST_CHOICES:
                self._made.popitem(last=False)
        return made
