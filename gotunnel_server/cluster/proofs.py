"""Has every member answer a CA's validations, whichever member orders: SharedProofs.

A CA asks the address of a hostname, which leads to any member. So the member that orders sends its
proof to all members, waits until each has said that it has it, and only then is the CA told. At the
end of the order it has them removed. A member that joins meanwhile is sent what is published.

    message      from, to               says
    proof        orderer, all members   number; sealed: hostname, challenge token ("" for
                                        TLS-ALPN-01), content as Challenges.published() gives it
    proof-here   member, orderer        number: the CA may ask here
    proof-gone   orderer, all members   number
    proof-wanted new member, all        send me what is published

A proof lets its sender get certificates for our hostnames, so it is sealed with the cluster's key:
a forged message on Redis is no proof.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import logging
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack
from time import monotonic
from typing import Any, NamedTuple, Protocol

from ..certs.acme_errors import CaError
from ..certs.challenges import Challenges
from .sealed import Broken, Sealer, WrongKey

log = logging.getLogger("gotunnel.proofs")

ALL = ""  # as ``to`` of Mail.publish()
KINDS = ("proof", "proof-here", "proof-gone", "proof-wanted")

# Seconds to wait for all members. A message takes some milliseconds, and a certificate one more; a
# member that does not answer by then is probably gone, and the CA asks more than once.
WAIT = 3.0
# Seconds after which a proof of another member is dropped that was not removed: its orderer has
# died. A CA has validated or refused long before (acme.PROOF_PATIENCE).
LIFE = 300.0
# Bounds of what others have published here, some 20 KiB each for TLS-ALPN-01. A member has
# issuer.JOBS + 1 orders at a time.
MOST_OF_ONE, MOST_OF_ALL = 16, 1024
MOST_BYTES = 2048  # of a sealed proof: a hostname, a token, a key authorization


class Mail(Protocol):
    """Messages between members; cluster.Cluster has them."""

    def publish(self, to: str, message: Mapping[str, Any]) -> None:
        """Send a message to one member, or to ALL others. Its "do" is the kind. It may get lost."""


class _Proof(NamedTuple):
    hostname: str
    token: str  # "": a certificate (TLS-ALPN-01)
    content: str


class _Shown(NamedTuple):
    """A proof of another member."""

    shown: ExitStack  # close() removes it
    drop_at: float  # monotonic


class SharedProofs:
    """The Publisher of a member. Any thread.

    ``challenges`` are this member's own; they answer for the others, too.
    """

    def __init__(
        self,
        challenges: Challenges,
        mail: Mail,
        sealer: Sealer,
        others: Callable[[], Iterable[str]],
        wait: float = WAIT,
    ) -> None:
        """``others()`` are the ids of the other members now."""
        self.types = challenges.types
        self._challenges = challenges
        self._mail = mail
        self._sealer = sealer
        self._others = others
        self._wait = wait
        self._numbers = itertools.count(1)
        # All guarded by it; notified when a member has a proof.
        self._changed = threading.Condition()
        self._ours: dict[int, _Proof] = {}
        self._missing: dict[int, set[str]] = {}  # by number: members that have not answered
        self._theirs: dict[tuple[str, int], _Shown] = {}  # by member and its number; oldest first

    # Of our orders

    @contextlib.contextmanager
    def http(self, hostname: str, token: str, body: bytes) -> Iterator[None]:
        """As Publisher.http()."""
        with self._challenges.http(hostname, token, body):
            with self._everywhere(_Proof(hostname, token, body.decode())):
                yield

    @contextlib.contextmanager
    def alpn(self, hostname: str, digest: bytes) -> Iterator[None]:
        """As Publisher.alpn()."""
        with self._challenges.alpn(hostname, digest):
            with self._everywhere(_Proof(hostname, "", digest.hex())):
                yield

    @contextlib.contextmanager
    def _everywhere(self, proof: _Proof) -> Iterator[None]:
        number = next(self._numbers)
        with self._changed:
            self._ours[number] = proof
            self._missing[number] = set(self._others())
        try:
            self._send(ALL, number, proof)
            self._wait_for(number, proof)
            yield
        finally:
            with self._changed:
                del self._ours[number], self._missing[number]
            self._mail.publish(ALL, {"do": "proof-gone", "number": number})

    def _wait_for(self, number: int, proof: _Proof) -> None:
        def missing() -> set[str]:
            return self._missing[number].intersection(self._others())

        with self._changed:
            self._changed.wait_for(lambda: not missing(), self._wait)
            left = sorted(missing())
        if left:
            log.warning("%s: the proof for the CA has not reached %d other gateways (%s) in %g s; "
                        "if the CA asks one of them, the order fails and is repeated",
                        proof.hostname, len(left), ", ".join(left[:8]), self._wait)  # fmt: skip

    def _send(self, to: str, number: int, proof: _Proof) -> None:
        sealed = self._sealer.seal("proof", json.dumps(proof).encode()).decode()
        self._mail.publish(to, {"do": "proof", "number": number, "sealed": sealed})

    # Of members

    def ask(self) -> None:
        """This member is new: have the others send what they have published."""
        self._mail.publish(ALL, {"do": "proof-wanted"})

    def changed(self, new: Iterable[str]) -> None:
        """The members have changed; these are ``new``. What one that left has not got is no longer
        waited for."""
        with self._changed:
            self._changed.notify_all()
        for member in new:
            self.joined(member)

    def joined(self, member: str) -> None:
        """Another member is new: send it what we have published."""
        with self._changed:
            ours = list(self._ours.items())
        for number, proof in ours:
            self._send(member, number, proof)

    def hear(self, message: Mapping[str, Any]) -> None:
        """A message of another member came, of one of the KINDS."""
        kind, number, sender = message.get("do"), message.get("number"), message["from"]
        if kind == "proof-wanted":
            self.joined(sender)
        elif not isinstance(number, int):
            return
        elif kind == "proof-gone":
            self._remove(sender, number)
        elif kind == "proof-here":
            with self._changed:
                if number in self._missing:
                    self._missing[number].discard(sender)
                    self._changed.notify_all()
        elif kind == "proof":
            self._show(sender, number, message.get("sealed"))

    def _show(self, sender: str, number: int, sealed: object) -> None:
        proof = self._open(sender, sealed)
        if proof is None:
            return
        with self._changed:
            known = (sender, number) in self._theirs
        if not known:
            shown = ExitStack()
            try:
                shown.enter_context(self._showing(proof))
            except (CaError, ValueError) as error:
                log.warning("%s: a proof of gateway %s cannot be shown: %s",
                            proof.hostname, sender, error)  # fmt: skip
                return
            self._keep(sender, number, shown)
        self._mail.publish(sender, {"do": "proof-here", "number": number})

    def _open(self, sender: str, sealed: object) -> _Proof | None:
        try:
            if not isinstance(sealed, str) or len(sealed) > MOST_BYTES:
                raise ValueError("no proof, or too long")
            proof = _Proof(*json.loads(self._sealer.open("proof", sealed.encode()).content))
            if not all(isinstance(part, str) for part in proof):
                raise ValueError("no texts")
            return proof
        except WrongKey as error:
            log.warning("a proof of gateway %s cannot be read: %s", sender, error.strerror)
        except (Broken, ValueError, TypeError, RecursionError) as error:
            log.warning("gateway %s sent a malformed proof: %s; it is ignored", sender, error)
        return None

    def _showing(self, proof: _Proof) -> AbstractContextManager[None]:
        if proof.token:
            return self._challenges.http(proof.hostname, proof.token, proof.content.encode())
        return self._challenges.alpn(proof.hostname, bytes.fromhex(proof.content))

    def _keep(self, sender: str, number: int, shown: ExitStack) -> None:
        with self._changed:
            self._theirs[sender, number] = _Shown(shown, monotonic() + LIFE)
            of_sender = [key for key in self._theirs if key[0] == sender]
            surplus = [*of_sender[:-MOST_OF_ONE], *list(self._theirs)[:-MOST_OF_ALL]]
        for key in surplus:
            self._remove(*key)

    def _remove(self, sender: str, number: int) -> None:
        with self._changed:
            known = self._theirs.pop((sender, number), None)
        if known is not None:
            known.shown.close()

    def sweep(self) -> None:
        """Drop what was never removed. Call it every few seconds."""
        now = monotonic()
        with self._changed:
            ended = [key for key, shown in self._theirs.items() if shown.drop_at <= now]
        for key in ended:
            self._remove(*key)
