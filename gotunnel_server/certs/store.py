"""What ACME_CACHE holds: accounts, certificates, the state of orders; all survives a crash.

    CA/account.json         the account's key and URL; CA is made from the directory's URL, so that
                            staging and production never mix
    CA/account.lock         held while a process reads the account, or makes it
    CA/pause.json           until when the CA takes no orders, and why
    CA/turns.lock           held while a process reads and writes turns.json
    CA/turns.json           the token buckets of all, of credentials and of domains
                            (rate_limits.py), and which challenge type works (proof_memory.py)
    CA/certs/HOST.pem       private key, certificate and chain in one, so that no writer can leave a
                            key with another key's certificate
    CA/certs/HOST.json      the state of HOST's orders: failures, next attempt, challenge, ...
    CA/certs/HOST.renew     the operator's request to renew HOST now; holds its name
    CA/locks/HOST           held while a process orders for HOST; never removed
    HOST, HOST+rsa          left by the Go program: key, then chain; read, never written

These are keys of a Storage and names of a Locker (storage.py); for ACME_CACHE they are files in a
folder (folder.py). A file that is broken, or can never be read, is set aside, named in the log, and
counts as missing.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import logging
import os
import re
import ssl
import threading
import urllib.parse
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import serialization

from gotunnel_agent.common.hostnames import valid_hostname
from gotunnel_agent.common.one_line import some

from ..net.certificate import are_equal, begins, check_issued_by, ends, load_certificates
from ..net.safe_read import MALFORMED
from .cert_dir import names_of
from .pem_file import pem_file
from .storage import Locker, OutOfReach, Storage, Unreadable

log = logging.getLogger("gotunnel.store")

LONGEST_NAME = 255  # bytes of a file's name, in most file systems
LONGEST_STEM = 200  # bytes of a file's name without suffixes such as ".pem" and ".bad"
# A key's stem. Wider than the grammar of hostnames, to match what the Go program and older gateways
# have written; but it must not lead out of the folder.
HOSTNAME = re.compile(r"[a-z0-9*-][a-z0-9.*-]*")
HASHED = re.compile(r".{100}-[0-9a-f]{32}")  # the stem of a hostname longer than LONGEST_STEM
PROBE_BYTES = 16 * 1024  # as many as a certificate and what is written beside it
# In the issuer's name of Let's Encrypt's staging CA; the Go program kept staging and production
# certificates in one place.
STAGING = "(STAGING)"


class StoreError(Exception):
    """ACME_CACHE cannot be used, or a certificate is not fit for it; the text is one line."""


class StoreAway(StoreError):
    """The store is on a server that cannot be reached now. The storage has logged that, once."""


class Flaw(StoreError):
    """A certificate is broken; the text does not say where it lies."""


class Stored(NamedTuple):
    """A certificate in the store that passed check(); CertStore.pem() gives it with its key."""

    key: str  # in the Storage
    leaf: x509.Certificate

    @property
    def begins_at(self) -> float:
        return begins(self.leaf).timestamp()

    @property
    def ends_at(self) -> float:
        return ends(self.leaf).timestamp()

    @property
    def is_left_by_go(self) -> bool:
        return "/" not in self.key


class CertStore:
    """The certificates of one CA. Any thread; several processes may share it, see lock()."""

    def __init__(
        self,
        storage: Storage,
        locker: Locker,
        directory_url: str,
        changes: Callable[[], Iterable[str] | None] | None = None,
    ) -> None:
        """Reads and writes nothing yet; folder.open_store() also checks that it can be written.

        ``changes()`` gives the keys of certificates and requests that any process has written since
        its last call, None if that may be all; it may raise OSError. With it, the certificates of
        other processes are served at once, and requests are found without a list of all keys.
        """
        self._storage = storage
        self._locker = locker
        self._changes = changes
        self._requests: list[str] | None = None  # what changed() has found; None: all are listed
        self._staging = "staging" in directory_url
        self._ca = ca_id(directory_url)
        self._certs = f"{self._ca}/certs"
        self._named: set[str] = set()  # the Go program's broken keys, to log each only once
        # What certificate() has read last, for pem(): at a start, each read may go to a server.
        self._just_read: tuple[Stored | None, bytes] = (None, b"")
        self._lock = threading.Lock()  # guards _named

    # Certificates

    def certificate(self, hostname: str) -> Stored | None:
        """The certificate of a hostname, ours or one that the Go program left; None if none.

        Its dates are not checked: it may have expired, or be valid later. Raises StoreError if it
        cannot be read now, or is broken and cannot be set aside.
        """
        key = self.key(hostname, ".pem")
        try:
            pem = self._storage.read(key)
            if pem is not None:
                stored = Stored(key, check(pem, hostname))
                self._just_read = stored, pem
                return stored
        except Unreadable as error:
            self._set_aside(key, error.strerror)
        except Flaw as flaw:
            self._set_aside(key, str(flaw))
        except OSError as error:  # such as no descriptor: the certificate may be good
            raise self._error(key, error) from error
        return self._left_by_go(hostname)

    def pem(self, stored: Stored) -> bytes:
        """Key, certificate and chain under the key of ``stored``, perhaps already renewed by
        another process. Raises StoreError if they are gone, or cannot be read."""
        (latest, content), self._just_read = self._just_read, (None, b"")
        if latest is stored:
            return content
        try:
            pem = self._storage.read(stored.key)
        except OSError as error:
            raise self._error(stored.key, error) from error
        if pem is None:
            raise StoreError(f"{self._storage.where(stored.key)}: {os.strerror(errno.ENOENT)}")
        return pem

    def make_sure_of_room(self) -> None:
        """Raises StoreError if no certificate could be written now."""
        try:
            self.probe(os.urandom(PROBE_BYTES))  # random bytes, which cannot be compressed
        except OutOfReach as error:
            raise StoreAway(f"{error.strerror}; nothing is ordered until it is back") from error
        except OSError as error:
            raise StoreError(
                f"{self._storage.where(self._certs)}: {error.strerror}; make room, and check that "
                "the gateway can write there: nothing is ordered until then"
            ) from error

    def probe(self, content: bytes) -> None:
        """Write ``content`` where certificates lie, and remove it. Raises OSError."""
        self._storage.write(f"{self._certs}/writable", content)
        self._storage.delete(f"{self._certs}/writable")

    def save(self, hostname: str, key_pem: bytes, chain_pem: bytes) -> Stored:
        """Keep a new certificate. Raises StoreError if it does not fit ``hostname`` or the key, or
        cannot be written; then the old one stays."""
        key, pem = self.key(hostname, ".pem"), key_pem.rstrip() + b"\n" + chain_pem
        try:
            stored = Stored(key, check(pem, hostname))
            self._storage.write(key, pem)
            return stored
        except Flaw as flaw:
            raise StoreError(f"the CA's certificate is not kept: {flaw}") from flaw
        except OSError as error:
            raise self._error(key, error) from error

    def hostnames(self) -> list[str]:
        """The hostnames that have, or had, a certificate of this CA here, except long ones, whose
        keys are hashed. Other files are ignored. Raises StoreError."""
        return [
            stem
            for stem in self._stems(".pem")
            if "." in stem and HOSTNAME.fullmatch(stem) and not HASHED.fullmatch(stem)
        ]

    def changed(self) -> list[str]:
        """The hostnames whose certificates were perhaps written since the last call. Raises
        StoreError."""
        if self._changes is None:
            return []
        try:
            keys = self._changes()
        except OSError as error:
            raise self._error(self._certs, error) from error
        begin = f"{self._certs}/"
        if keys is None:
            keys = self._keys(begin)
        keys = list(keys)
        if self._requests is not None:
            self._requests += [key[len(begin) : -6] for key in keys if key.endswith(".renew")]
        stems = [key[len(begin) : -4] for key in keys
                 if key.startswith(begin) and key.endswith(".pem")]  # fmt: skip
        names = (self._spelled_out(stem) if HASHED.fullmatch(stem) else stem for stem in stems)
        return [name for name in names if name is not None and HOSTNAME.fullmatch(name)]

    def known(self) -> list[str]:
        """All hostnames in the store: those with a certificate, also one of the Go program, and
        those that wait for one; except long ones that wait, whose keys are hashed. Reads files
        where the key does not suffice. Raises StoreError."""
        own = {*self._stems(".pem"), *self._stems(".json")}
        hashed = set(filter(HASHED.fullmatch, own))
        left = {
            name
            for key in self._keys("")
            if "." in key and valid_hostname(name := key.removesuffix("+rsa"))
            and name == name.lower() and self._left_by_go(name)
        }  # fmt: skip
        return sorted((own - hashed).union(left, filter(None, map(self._spelled_out, hashed))))

    def _spelled_out(self, stem: str) -> str | None:
        """The long hostname of a hashed ``stem``, as its certificate says."""
        try:
            pem = self._storage.read(f"{self._certs}/{stem}.pem")
            leaf = load_certificates(pem or b"")[0]
        except (OSError, *MALFORMED):
            return None
        return next((name for name in names_of(leaf) if len(name) > LONGEST_STEM), None)

    def _left_by_go(self, hostname: str) -> Stored | None:
        for key in (hostname, f"{hostname}+rsa"):
            if len(key) > LONGEST_NAME:  # the Go program could not write it either
                continue
            try:
                pem = self._storage.read(key)
                if pem is None:
                    continue
                stored = Stored(key, check(pem, hostname))
            except (StoreError, OSError) as error:
                flaw = error.strerror if isinstance(error, OSError) else error
                if getattr(error, "errno", None) != errno.EISDIR:  # a CA's folder is no mistake
                    self._complain(key, flaw)
                continue
            if (STAGING in stored.leaf.issuer.rfc4514_string()) == self._staging:
                return stored
        return None

    def _complain(self, key: str, flaw: object) -> None:
        with self._lock:
            known = key in self._named
            self._named.add(key)
        if not known:
            log.warning("ACME_CACHE: not used: %s: %s", self._storage.where(key), flaw)

    # What else is known

    def account(self) -> dict[str, Any]:
        """What save_account() kept; {} if nothing. Raises StoreError if it cannot be read now."""
        return self._read_json(f"{self._ca}/account.json")

    def save_account(self, account: dict[str, Any]) -> None:
        """Raises StoreError if it cannot be written."""
        self._write_json(f"{self._ca}/account.json", account)

    def where_account(self) -> str:
        """Where the operator finds the account."""
        return self._storage.where(f"{self._ca}/account.json")

    def drop_account(self, why: str) -> None:
        """Set aside what save_account() kept. Raises StoreError if it cannot be moved."""
        self._set_aside(f"{self._ca}/account.json", why)

    def pause(self) -> dict[str, Any]:
        """What save_pause() kept; {} if nothing. Raises StoreError if it cannot be read now."""
        return self._read_json(f"{self._ca}/pause.json")

    def save_pause(self, pause: dict[str, Any]) -> None:
        """Raises StoreError if it cannot be written."""
        self._write_json(f"{self._ca}/pause.json", pause)

    def turns(self) -> dict[str, Any]:
        """What save_turns() kept; {} if nothing. Raises StoreError if it cannot be read now."""
        return self._read_json(f"{self._ca}/turns.json")

    def save_turns(self, turns: dict[str, Any]) -> None:
        """Raises StoreError if it cannot be written."""
        self._write_json(f"{self._ca}/turns.json", turns)

    def forget_state(self, hostname: str) -> None:
        """Remove what save_state() kept. Raises StoreError if it cannot be removed."""
        key = self.key(hostname, ".json")
        try:
            self._storage.delete(key)
        except OSError as error:
            raise self._error(key, error) from error

    def state(self, hostname: str) -> dict[str, Any]:
        """What save_state() kept; {} if nothing. Raises StoreError if it cannot be read now."""
        return self._read_json(self.key(hostname, ".json"))

    def save_state(self, hostname: str, state: dict[str, Any]) -> None:
        """Raises StoreError if it cannot be written."""
        self._write_json(self.key(hostname, ".json"), state)

    # What the operator asks for

    def ask_renewal(self, hostname: str) -> None:
        """Leave a request for the gateway that runs. Raises StoreError if it cannot be written."""
        self._write(self.key(hostname, ".renew"), hostname.encode())  # a long one's key is hashed

    def renewals(self) -> list[str]:
        """The hostnames of ask_renewal() since the last call. Their requests are removed. If the
        store tells changes, call changed() before."""
        try:
            stems = self._stems(".renew") if self._requests is None else self._requests
            self._requests = None if self._changes is None else []
        except StoreError:  # such as no descriptor; the keeper calls again in seconds
            return []
        return [hostname for stem in stems if (hostname := self._take_request(stem))]

    def _take_request(self, stem: str) -> str | None:
        """The hostname of a request; None if another process has taken it, or it cannot be
        removed."""
        key = f"{self._certs}/{stem}.renew"
        try:
            hostname = (self._storage.read(key) or b"").decode(errors="replace").strip()
        except OSError:  # it may belong to root; the stem is the hostname, unless it is hashed
            hostname = ""
        try:
            if not self._storage.delete(key):
                return None
        except OSError:
            return None
        try:
            return hostname if self.key(hostname, ".renew") == key else stem
        except ValueError:
            return stem

    # One process at a time

    @contextlib.contextmanager
    def lock(self, hostname: str) -> Iterator[bool]:
        """Whether we are the only process that orders for ``hostname``; does not wait.

        A caller that gets the lock must read the store again: another process may have ordered.
        Raises StoreError if locking fails.
        """
        with self._locked(f"{self._ca}/locks/{_stem(hostname)}", wait=False) as ours:
            yield ours

    @contextlib.contextmanager
    def account_lock(self) -> Iterator[None]:
        """Waits until no other process or thread holds the account. Raises StoreError if locking
        fails."""
        # Not in locks/, where a hostname could have the same name.
        with self._locked(f"{self._ca}/account.lock", wait=True):
            yield

    @contextlib.contextmanager
    def turns_lock(self) -> Iterator[None]:
        """Waits until no other process or thread reads and writes the turns. Raises StoreError if
        locking fails."""
        with self._locked(f"{self._ca}/turns.lock", wait=True):
            yield

    @contextlib.contextmanager
    def _locked(self, name: str, *, wait: bool) -> Iterator[bool]:
        with contextlib.ExitStack() as held:
            try:
                ours = held.enter_context(self._locker.lock(name, wait=wait))
            except OSError as error:
                raise self._error(name, error) from error
            yield ours

    # Keys

    def key(self, hostname: str, suffix: str) -> str:
        """The Storage's key of a hostname. No two hostnames share one, and none leads out of our
        keys. Raises ValueError for an invalid hostname."""
        return f"{self._certs}/{_stem(hostname)}{suffix}"

    def _stems(self, suffix: str) -> list[str]:
        start = len(self._certs) + 1
        return [
            key[start : -len(suffix)]
            for key in self._keys(f"{self._certs}/")
            if key.endswith(suffix)
        ]

    def _keys(self, prefix: str) -> list[str]:
        try:
            return self._storage.keys(prefix)
        except OSError as error:
            raise self._error(prefix.removesuffix("/"), error) from error

    def _read_json(self, key: str) -> dict[str, Any]:
        try:
            content = self._storage.read(key)
            value = {} if content is None else json.loads(content)
            if not isinstance(value, dict):
                raise ValueError("not an object")
            return value
        except Unreadable as error:
            self._set_aside(key, error.strerror)
        except OSError as error:
            raise self._error(key, error) from error
        except (ValueError, RecursionError) as error:
            self._set_aside(key, str(error))
        return {}

    def _write_json(self, key: str, value: dict[str, Any]) -> None:
        self._write(key, json.dumps(value, indent=1).encode() + b"\n")

    def _write(self, key: str, content: bytes) -> None:
        try:
            self._storage.write(key, content)
        except OSError as error:
            raise self._error(key, error) from error

    def _set_aside(self, key: str, flaw: str | None) -> None:
        try:
            self._storage.set_aside(key, flaw or "cannot be read")
        except OSError as error:
            raise StoreError(
                f"{self._storage.where(key)} is broken ({flaw}) and {error.strerror}"
            ) from error

    def _error(self, key: str, error: OSError) -> StoreError:
        if isinstance(error, OutOfReach):
            return StoreAway(error.strerror)
        return StoreError(f"{self._storage.where(key)}: {error.strerror}")


def ca_id(directory_url: str) -> str:
    """The first part of a CA's keys: its host, for the reader, and a hash, to be unique."""
    host = urllib.parse.urlsplit(directory_url).hostname or "ca"
    digest = hashlib.sha256(directory_url.encode()).hexdigest()
    return f"{re.sub('[^a-z0-9.-]', '-', host)[:100]}-{digest[:8]}"


def _stem(hostname: str) -> str:
    """The part of a hostname's keys that names it: hashed, if the hostname is long."""
    if not HOSTNAME.fullmatch(hostname):
        raise ValueError(f"hostname {hostname!r}: expected lower case, no port, no slash")
    if len(hostname) <= LONGEST_STEM:
        return hostname
    return f"{hostname[:100]}-{hashlib.sha256(hostname.encode()).hexdigest()[:32]}"


def check(pem: bytes, hostname: str) -> x509.Certificate:
    """The certificate in ``pem``, after checking that ``pem`` is a key, its certificate and chain
    with which ``hostname`` can be served. Dates are not checked.

    Raises Flaw if it is not; OSError if there can be no file for OpenSSL to read.
    """
    try:
        key = serialization.load_pem_private_key(pem, password=None)
        leaf, *chain = load_certificates(pem)
        own = are_equal(key.public_key(), leaf.public_key())
        names = leaf.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        served = {name.lower() for name in names.get_values_for_type(x509.DNSName)}
        leaf.issuer.rfc4514_string()  # raises now if the name is malformed, not in a later reader
    except MALFORMED as error:
        raise Flaw("expected a private key and its certificate as PEM") from error
    if not own:
        raise Flaw("the key is not that of the certificate")
    if not served & {hostname, "*." + hostname.partition(".")[2]}:
        raise Flaw(f"a certificate of {some(sorted(served))}, not {hostname}")
    if not chain:
        raise Flaw("the chain is missing, expected the issuer's certificate")
    try:
        check_issued_by(leaf, chain[0])
        # Only OpenSSL notices a chain that is cut within its last certificate.
        with pem_file(pem) as file:
            ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(file)
    except (InvalidSignature, *MALFORMED) as error:
        raise Flaw("the first certificate of the chain has not signed the leaf") from error
    except ssl.SSLError as error:
        raise Flaw(f"OpenSSL refuses it: {error}") from error
    return leaf
