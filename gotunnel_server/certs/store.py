"""What is kept of certificates in ACME_CACHE, and how it survives whatever happens to the machine.

    CA/account.json         the account's key and URL; CA is made from the directory's URL, so that
                            staging and production never mix
    CA/account.lock         held while a process looks for the account, or makes it
    CA/pause.json           until when the CA wants to hear nothing, and why
    CA/turns.json           what was ordered lately, by all, by credential and by domain (turns.py),
                            and which kind of proof works (proof_memory.py)
    CA/certs/HOST.pem       private key, certificate, chain, under one key: a pair cannot be torn
    CA/certs/HOST.json      what is known of HOST's orders: failures, next attempt, challenge, ...
    CA/certs/HOST.renew     a request of the operator's to renew HOST now; holds its name
    CA/locks/HOST           held while a process orders for HOST; never removed
    HOST, HOST+rsa          left by the Go program: key, then chain; read, never written

Where these keys lie is the Storage's and the Locker's business (storage.py): for ACME_CACHE, files
in a folder (folder.py). A file that makes no sense, or can never be read, is set aside, named in
the log, and taken as missing.
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
from collections.abc import Iterator
from typing import NamedTuple

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import serialization

from gotunnel_agent.common.hostnames import valid_hostname

from ..net.safe_read import MALFORMED
from .cert_dir import names_of
from .pem_file import pem_file
from .storage import Locker, Storage, Unreadable

log = logging.getLogger("gotunnel.store")

LONGEST_NAME = 255  # bytes of a file's name; some file systems have less
LONGEST_STEM = 200  # of the 255 bytes that a file's name has; endings, and ".bad", are added
# A key's stem. Not the grammar of hostnames: it has to lead nobody out of the folder, and to take
# what the Go program and older gateways have written.
HOSTNAME = re.compile(r"[a-z0-9*-][a-z0-9.*-]*")
HASHED = re.compile(r".{100}-[0-9a-f]{32}")  # ... of a longer hostname
PROBE_BYTES = 16 * 1024  # what a certificate takes, and what is written beside it
# What Let's Encrypt's staging CA calls itself; the Go program kept both kinds in one place.
STAGING = "(STAGING)"


class StoreError(Exception):
    """The cache cannot be used, or what should go into it; the text is one line."""


class Flaw(StoreError):
    """What is wrong with a certificate, wherever it lies."""


class Stored(NamedTuple):
    """A certificate in the store that was checked; CertStore.pem() gives it with its key."""

    key: str  # of the Storage
    leaf: x509.Certificate

    @property
    def begins_at(self) -> float:
        return self.leaf.not_valid_before_utc.timestamp()

    @property
    def ends_at(self) -> float:
        return self.leaf.not_valid_after_utc.timestamp()

    @property
    def is_left_by_go(self) -> bool:
        return "/" not in self.key


class CertStore:
    """The certificates of one CA. Any thread; several processes may share its place, see lock()."""

    def __init__(self, storage: Storage, locker: Locker, directory_url: str):
        """Nothing is read or written yet. folder.open_store() makes one that can be written."""
        self._storage = storage
        self._locker = locker
        self._staging = "staging" in directory_url
        self._ca = ca_id(directory_url)
        self._certs = f"{self._ca}/certs"
        self._named: set[str] = set()  # the Go program's keys that were complained of: each once
        self._lock = threading.Lock()  # guards _named

    # Certificates

    def certificate(self, hostname) -> Stored | None:
        """The certificate of a hostname, ours or one that the Go program left; None if none.

        It may have run out, or begin later: only its dates are not judged here. Raises StoreError
        if it cannot be read just now, or is broken and cannot be set aside.
        """
        key = self.key(hostname, ".pem")
        try:
            pem = self._storage.read(key)
            if pem is not None:
                return Stored(key, check(pem, hostname))
        except Unreadable as error:
            self._set_aside(key, error.strerror)
        except Flaw as flaw:
            self._set_aside(key, str(flaw))
        except OSError as error:  # such as no descriptor: it need not be broken
            raise self._error(key, error) from error
        return self._left_by_go(hostname)

    def pem(self, stored: Stored) -> bytes:
        """Key, certificate and chain of ``stored`` as they are kept now: another process may have
        renewed it. Raises StoreError if it is gone, or cannot be read."""
        try:
            pem = self._storage.read(stored.key)
        except OSError as error:
            raise self._error(stored.key, error) from error
        if pem is None:
            raise StoreError(f"{self._storage.where(stored.key)}: {os.strerror(errno.ENOENT)}")
        return pem

    def make_sure_of_room(self):
        """Raises StoreError if no certificate could be kept now."""
        try:
            self.probe(os.urandom(PROBE_BYTES))  # which no file system makes smaller
        except OSError as error:
            raise StoreError(
                f"{self._storage.where(self._certs)}: {error.strerror}; make room, and see that "
                "the gateway can write there: nothing is ordered before"
            ) from error

    def probe(self, content: bytes):
        """Write something where certificates lie, and remove it. Raises OSError."""
        self._storage.write(f"{self._certs}/writable", content)
        self._storage.delete(f"{self._certs}/writable")

    def save(self, hostname, key_pem: bytes, chain_pem: bytes) -> Stored:
        """Keep a new certificate. Raises StoreError if it is not one of ``hostname`` with that key,
        or cannot be written; then the old one is as it was."""
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
        """What has a certificate of this CA here, or had one; but for names so long that their
        keys have others. Other people's files are passed over. Raises StoreError."""
        return [
            stem
            for stem in self._stems(".pem")
            if "." in stem and HOSTNAME.fullmatch(stem) and not HASHED.fullmatch(stem)
        ]

    def known(self) -> list[str]:
        """All hostnames that the store has something of: with a certificate, also one of
        the Go program, or waiting for one; but for those that wait and are so long that their keys
        do not tell them. Reads what is needed to know. Raises StoreError."""
        own = {*self._stems(".pem"), *self._stems(".json")}
        hashed = set(filter(HASHED.fullmatch, own))
        left = {
            name
            for key in self._keys("")
            if "." in key and valid_hostname(name := key.removesuffix("+rsa"))
            and name == name.lower() and self._left_by_go(name)
        }  # fmt: skip
        return sorted((own - hashed).union(left, filter(None, map(self._spelled_out, hashed))))

    def _spelled_out(self, stem) -> str | None:
        """The long hostname whose keys begin with ``stem``, as its certificate says."""
        try:
            pem = self._storage.read(f"{self._certs}/{stem}.pem")
            leaf = x509.load_pem_x509_certificates(pem or b"")[0]
        except (OSError, *MALFORMED):
            return None
        return next((name for name in names_of(leaf) if len(name) > LONGEST_STEM), None)

    def _left_by_go(self, hostname) -> Stored | None:
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
                if getattr(error, "errno", None) != errno.EISDIR:  # such as that of a CA
                    self._complain(key, flaw)
                continue
            if (STAGING in stored.leaf.issuer.rfc4514_string()) == self._staging:
                return stored
        return None

    def _complain(self, key, flaw):
        with self._lock:
            known = key in self._named
            self._named.add(key)
        if not known:
            log.warning("ACME_CACHE: not used: %s: %s", self._storage.where(key), flaw)

    # What else is known

    def account(self) -> dict:
        """What save_account() kept; {} if nothing. Raises StoreError if it cannot be read now."""
        return self._read_json(f"{self._ca}/account.json")

    def save_account(self, account: dict):
        """Raises StoreError if it cannot be written."""
        self._write_json(f"{self._ca}/account.json", account)

    def where_account(self) -> str:
        """How a person finds it."""
        return self._storage.where(f"{self._ca}/account.json")

    def drop_account(self, why):
        """Set aside what save_account() kept. Raises StoreError if it cannot be moved."""
        self._set_aside(f"{self._ca}/account.json", why)

    def pause(self) -> dict:
        """What save_pause() kept; {} if nothing. Raises StoreError if it cannot be read now."""
        return self._read_json(f"{self._ca}/pause.json")

    def save_pause(self, pause: dict):
        """Raises StoreError if it cannot be written."""
        self._write_json(f"{self._ca}/pause.json", pause)

    def turns(self) -> dict:
        """What save_turns() kept; {} if nothing. Raises StoreError if it cannot be read now."""
        return self._read_json(f"{self._ca}/turns.json")

    def save_turns(self, turns: dict):
        """Raises StoreError if it cannot be written."""
        self._write_json(f"{self._ca}/turns.json", turns)

    def forget_state(self, hostname):
        """Remove what save_state() kept. Raises StoreError if it cannot be removed."""
        key = self.key(hostname, ".json")
        try:
            self._storage.delete(key)
        except OSError as error:
            raise self._error(key, error) from error

    def state(self, hostname) -> dict:
        """What save_state() kept; {} if nothing. Raises StoreError if it cannot be read now."""
        return self._read_json(self.key(hostname, ".json"))

    def save_state(self, hostname, state: dict):
        """Raises StoreError if it cannot be written."""
        self._write_json(self.key(hostname, ".json"), state)

    # What the operator asks for

    def ask_renewal(self, hostname):
        """Leave a request for the gateway that runs. Raises StoreError if it cannot be written."""
        self._write(self.key(hostname, ".renew"), hostname.encode())  # a long one's key has another

    def renewals(self) -> list[str]:
        """The hostnames that were asked for since the last time. Their requests are removed."""
        try:
            stems = self._stems(".renew")
        except StoreError:  # such as no descriptor; they are asked for again in seconds
            return []
        return [hostname for stem in stems if (hostname := self._take_request(stem))]

    def _take_request(self, stem) -> str | None:
        """The hostname of a request; None if another process has taken it, or it cannot be
        removed."""
        key = f"{self._certs}/{stem}.renew"
        try:
            hostname = (self._storage.read(key) or b"").decode(errors="replace").strip()
        except OSError:  # root may have asked, and own it; its name says enough
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
    def lock(self, hostname) -> Iterator[bool]:
        """Whether we are the only process that orders for ``hostname``; does not wait.

        A caller that gets it reads the store again: another process may have ordered meanwhile.
        Raises StoreError if locking fails.
        """
        with self._locked(f"{self._ca}/locks/{_stem(hostname)}", wait=False) as ours:
            yield ours

    @contextlib.contextmanager
    def account_lock(self) -> Iterator[None]:
        """Waits until no other process (or thread) is at the account. Raises StoreError if locking
        fails."""
        with self._locked(f"{self._ca}/account.lock", wait=True):  # in locks/: maybe a hostname's
            yield

    @contextlib.contextmanager
    def _locked(self, name, *, wait) -> Iterator[bool]:
        with contextlib.ExitStack() as held:
            try:
                ours = held.enter_context(self._locker.lock(name, wait=wait))
            except OSError as error:
                raise self._error(name, error) from error
            yield ours

    # Keys

    def key(self, hostname, suffix) -> str:
        """The Storage's key for what is kept of ``hostname``: no hostname leads to others' keys.
        Raises ValueError for what is no hostname."""
        return f"{self._certs}/{_stem(hostname)}{suffix}"

    def _stems(self, suffix) -> list[str]:
        start = len(self._certs) + 1
        return [
            key[start : -len(suffix)]
            for key in self._keys(f"{self._certs}/")
            if key.endswith(suffix)
        ]

    def _keys(self, prefix) -> list[str]:
        try:
            return self._storage.keys(prefix)
        except OSError as error:
            raise self._error(prefix.removesuffix("/"), error) from error

    def _read_json(self, key) -> dict:
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

    def _write_json(self, key, value):
        self._write(key, json.dumps(value, indent=1).encode() + b"\n")

    def _write(self, key, content):
        try:
            self._storage.write(key, content)
        except OSError as error:
            raise self._error(key, error) from error

    def _set_aside(self, key, flaw):
        try:
            self._storage.set_aside(key, flaw)
        except OSError as error:
            raise StoreError(
                f"{self._storage.where(key)} is broken ({flaw}) and {error.strerror}"
            ) from error

    def _error(self, key, error: OSError) -> StoreError:
        return StoreError(f"{self._storage.where(key)}: {error.strerror}")


def ca_id(directory_url: str) -> str:
    """The first part of a CA's keys: its host for people, a hash so that no two share one."""
    host = urllib.parse.urlsplit(directory_url).hostname or "ca"
    digest = hashlib.sha256(directory_url.encode()).hexdigest()
    return f"{re.sub('[^a-z0-9.-]', '-', host)[:100]}-{digest[:8]}"


def _stem(hostname) -> str:
    """The name in the keys of ``hostname``."""
    if not HOSTNAME.fullmatch(hostname):
        raise ValueError(f"hostname {hostname!r}: expected lower case, no port, no slash")
    if len(hostname) <= LONGEST_STEM:
        return hostname
    return f"{hostname[:100]}-{hashlib.sha256(hostname.encode()).hexdigest()[:32]}"


def check(pem: bytes, hostname) -> x509.Certificate:
    """The certificate in a key, certificate and chain that visitors of ``hostname`` could be served
    with, dates apart.

    Raises Flaw if they are not that; OSError if OpenSSL cannot be asked.
    """
    try:
        key = serialization.load_pem_private_key(pem, password=None)
        leaf, *chain = x509.load_pem_x509_certificates(pem)
        own = key.public_key() == leaf.public_key()
        names = leaf.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        served = {name.lower() for name in names.get_values_for_type(x509.DNSName)}
        leaf.issuer.rfc4514_string()  # others will ask for it
    except MALFORMED as error:
        raise Flaw("expected a private key and its certificate as PEM") from error
    if not own:
        raise Flaw("the key is not that of the certificate")
    if not served & {hostname, "*." + hostname.partition(".")[2]}:
        raise Flaw(f"a certificate of {', '.join(sorted(served))}, not {hostname}")
    if not chain:
        raise Flaw("the chain is missing, expected the issuer's certificate")
    try:
        leaf.verify_directly_issued_by(chain[0])
        # A chain that is cut within its last certificate is seen by nobody but OpenSSL.
        with pem_file(pem) as file:
            ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(file)
    except (InvalidSignature, *MALFORMED) as error:
        raise Flaw("the chain does not lead on from the certificate") from error
    except ssl.SSLError as error:
        raise Flaw(f"OpenSSL refuses it: {error}") from error
    return leaf
