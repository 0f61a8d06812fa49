"""Contexts that accept one protocol which a visitor chose (ALPN, RFC 7301).

The protocols of a context are fixed when it is made, and visitors of a hostname in tcp mode may ask
for any protocol. So a copy is made when the first visitor asks, from the PEM that the context was
loaded from. The PEM is kept in memory: a handshake must not read the disk, and the files may have
changed.
"""

from __future__ import annotations

import logging
import math
import os
import ssl
import threading
from collections import OrderedDict
from collections.abc import Callable
from typing import TypeAlias

from .pem_file import pem_file

log = logging.getLogger("gotunnel.choices")

# Bound of the copies, some 50 kB each; each hostname in tcp mode has a few. Visitors may offer any
# protocol, so beyond the bound the oldest copy is dropped.
MOST_CHOICES = 256


# As the ssl module has them.
_File: TypeAlias = "str | bytes | os.PathLike[str] | os.PathLike[bytes]"
_Text: TypeAlias = "str | bytes | bytearray"


class Loaded(ssl.SSLContext):
    """A server's context that remembers the PEM that was loaded into it."""

    pairs: list[tuple[bytes, bytes]]  # certificates, key
    ends_at: float  # seconds since 1970: when the first of its certificates ends

    def __new__(cls) -> Loaded:
        self = super().__new__(cls, ssl.PROTOCOL_TLS_SERVER)
        self.pairs = []
        self.ends_at = math.inf
        return self

    def __init__(self) -> None:  # the protocol is given to __new__
        pass

    def load_cert_chain(
        self,
        certfile: _File,
        keyfile: _File | None = None,
        password: Callable[[], _Text] | _Text | None = None,
    ) -> None:
        super().load_cert_chain(certfile, keyfile, password)
        self.pairs.append((_content(certfile), _content(keyfile or certfile)))


class Choices:
    """Copies of contexts, by context and protocol. Any thread."""

    def __init__(self, new_context: Callable[[tuple[str, ...]], Loaded]) -> None:
        """`new_context(alpn)` makes an empty one."""
        self._new_context = new_context
        self._made: OrderedDict[tuple[Loaded, str], Loaded] = OrderedDict()
        self._lock = threading.Lock()  # guards _made

    def context(self, context: Loaded, protocol: str) -> Loaded:
        """A copy of `context` that accepts only `protocol`; `context` itself if no copy can be
        made."""
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


def _content(file: _File) -> bytes:
    with open(file, "rb") as opened:
        return opened.read()
