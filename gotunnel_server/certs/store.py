"""What is kept of certificates in ACME_CACHE, and how it survives whatever happens to the machine.

    CA/account.json         the account's key and URL; CA is made from the directory's URL, so that
                            staging and production never mix
    CA/account.lock         held while a process looks for the account, or makes it
    CA/pause.json           until when the CA wants to hear nothing, and why
    CA/certs/HOST.pem       private key, certificate, chain, in one file: a pair cannot be torn
    CA/certs/HOST.json      what is known of HOST's orders: failures, next attempt, challenge, ...
    CA/certs/HOST.renew     somebody asks to have HOST renewed now; holds its name
    CA/locks/HOST           held while a process orders for HOST; never removed
    HOST, HOST+rsa          left by the Go program: key, then chain; read, never written
    .proof-*.tmp            a proof for the CA, there for a moment (challenges.py)

Folders have mode 0700, files 0600. A file is written beside its place, flushed to the disk, and
moved there in one step: a reader sees the old one or the new one. A file that does not make sense,
or that we may not read, is moved to FILE.bad, named in the log, and taken as missing.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import logging
import os
import re
import secrets
import ssl
import time
import urllib.parse
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import serialization

from ..net import safe_read
from ..net.safe_read import MALFORMED, Unfit
from .challenges import PROOFS

log = logging.getLogger("gotunnel.cert_store")

LONGEST_STEM = 200  # of the 255 bytes that a file's name has; endings, and ".bad", are added
HOSTNAME = re.compile(r"[a-z0-9*-][a-z0-9.*-]*")  # what leads nobody out of the folder
HASHED = re.compile(r".{100}-[0-9a-f]{32}")  # ... of a longer hostname
# Seconds. No write takes so long: an older temporary file is that of a process that was killed.
STALE = 60.0
PROBE_BYTES = 16 * 1024  # what a certificate takes, and what is written beside it
# What Let's Encrypt's staging CA calls itself; the Go program kept both kinds in one place.
STAGING = "(STAGING)"


class StoreError(Exception):
    """The cache cannot be used, or what should go into it; the text is one line."""


class _Flaw(StoreError):
    """``flaw`` is what is wrong with a certificate's file, whatever the file is called."""

    def __init__(self, file, flaw):
        super().__init__(f"{file}: {flaw}")
        self.flaw = flaw


class Stored(NamedTuple):
    """A certificate on disk that was checked; ``file`` is for SSLContext.load_cert_chain()."""

    file: Path
    leaf: x509.Certificate

    @property
    def begins_at(self) -> float:
        return self.leaf.not_valid_before_utc.timestamp()

    @property
    def ends_at(self) -> float:
        return self.leaf.not_valid_after_utc.timestamp()


class CertStore:
    """The cache of one CA. Any thread; several processes may share it, see lock()."""

    def __init__(self, folder: Path, directory_url: str):
        """Make the folders and sweep up. Raises StoreError if they cannot be written."""
        self._folder = folder
        self._staging = "staging" in directory_url
        self._ca = folder / ca_id(directory_url)
        self._certs = self._ca / "certs"
        self._locks = self._ca / "locks"
        self._named: set[str] = set()  # the Go files complained of: each once
        try:
            self._make_folders()
            for path in (self._ca, self._certs, self._locks):
                path.chmod(0o700)
            self._sweep(folder, PROOFS)
            self._sweep(self._ca)
            self._sweep(self._certs)
            self._write(self._ca / "writable", b"")
            (self._ca / "writable").unlink(missing_ok=True)  # another process may be quicker
        except OSError as error:
            raise StoreError(
                f"ACME_CACHE {folder}: {error.strerror} ({error.filename}), expected a folder "
                "that the gateway can write: change its owner, or name another"
            ) from error

    # Certificates

    def certificate(self, hostname) -> Stored | None:
        """The certificate of a hostname, ours or one that the Go program left; None if none.

        It may have run out, or begin later: only its dates are not judged here. Raises StoreError
        if it cannot be read just now, or is broken and cannot be set aside.
        """
        file = self._file(hostname, ".pem")
        try:
            return check(file, hostname)
        except FileNotFoundError:
            pass
        except OSError as error:  # such as no descriptor: the file need not be broken
            raise StoreError(f"{file}: {error.strerror}") from error
        except StoreError as error:
            self._set_aside(file, error)
        return self._left_by_go(hostname)

    def make_sure_of_room(self):
        """Raises StoreError if no certificate could be kept now."""
        probe = self._certs / "writable"
        try:
            self._make_folders()  # somebody may have removed them since
            self._write(probe, os.urandom(PROBE_BYTES))  # which no file system makes smaller
            probe.unlink(missing_ok=True)  # another order may be quicker
        except OSError as error:
            raise StoreError(
                f"{self._certs}: {error.strerror}; make room, and see that the gateway can write "
                "there: nothing is ordered before"
            ) from error

    def save(self, hostname, key_pem: bytes, chain_pem: bytes) -> Stored:
        """Keep a new certificate. Raises StoreError if it is not one of ``hostname`` with that key,
        or cannot be written; then the old one is as it was."""
        file = self._file(hostname, ".pem")
        try:
            self._write(file, key_pem.rstrip() + b"\n" + chain_pem, hostname)
            return check(file, hostname)
        except _Flaw as error:
            raise StoreError(f"the CA's certificate is not kept: {error.flaw}") from error
        except OSError as error:
            raise StoreError(f"{file}: {error.strerror}") from error

    def hostnames(self) -> list[str]:
        """What has a certificate of this CA here, or had one; but for names so long that their
        files have others. Other people's files are passed over."""
        stems = (path.stem for path in self._certs.glob("*.pem"))
        return sorted(
            stem
            for stem in stems
            if "." in stem and HOSTNAME.fullmatch(stem) and not HASHED.fullmatch(stem)
        )

    def _left_by_go(self, hostname) -> Stored | None:
        for file in (self._folder / hostname, self._folder / f"{hostname}+rsa"):
            if file.is_dir():  # such as that of a CA
                continue
            try:
                stored = check(file, hostname)
            except FileNotFoundError:
                continue
            except (StoreError, OSError) as error:
                if file.name not in self._named:
                    self._named.add(file.name)
                    log.warning("ACME_CACHE: not used: %s", error)
                continue
            if (STAGING in stored.leaf.issuer.rfc4514_string()) == self._staging:
                return stored
        return None

    # What else is known

    def account(self) -> dict:
        """What save_account() kept; {} if nothing. Raises StoreError if it cannot be read now."""
        return self._read_json(self._ca / "account.json")

    def save_account(self, account: dict):
        """Raises StoreError if it cannot be written."""
        self._write_json(self._ca / "account.json", account)

    def drop_account(self, why):
        """Set aside what save_account() kept. Raises StoreError if it cannot be moved."""
        self._set_aside(self._ca / "account.json", why)

    def pause(self) -> dict:
        """What save_pause() kept; {} if nothing. Raises StoreError if it cannot be read now."""
        return self._read_json(self._ca / "pause.json")

    def save_pause(self, pause: dict):
        """Raises StoreError if it cannot be written."""
        self._write_json(self._ca / "pause.json", pause)

    def state(self, hostname) -> dict:
        """What save_state() kept; {} if nothing. Raises StoreError if it cannot be read now."""
        return self._read_json(self._file(hostname, ".json"))

    def save_state(self, hostname, state: dict):
        """Raises StoreError if it cannot be written."""
        self._write_json(self._file(hostname, ".json"), state)

    # What the operator asks for

    def ask_renewal(self, hostname):
        """Leave a request for the gateway that runs. Raises StoreError if it cannot be written."""
        file = self._file(hostname, ".renew")
        try:
            self._write(file, hostname.encode())  # a long one's file has another name
        except OSError as error:
            raise StoreError(f"{file}: {error.strerror}") from error

    def renewals(self) -> list[str]:
        """The hostnames that were asked for since the last time. Their requests are removed."""
        hostnames = []
        try:
            files = sorted(self._certs.glob("*.renew"))
        except OSError:  # such as no descriptor; they are asked for again in seconds
            return []
        for file in files:
            try:
                hostname = _read(file).decode(errors="replace").strip()
            except FileNotFoundError:  # another process has taken it
                continue
            except (OSError, StoreError):  # it may be root's, who asked; its name says enough
                hostname = ""
            try:
                file.unlink()
            except OSError:  # taken, or it cannot be
                continue
            try:
                is_its_own = self._file(hostname, ".renew") == file
            except ValueError:
                is_its_own = False
            hostnames.append(hostname if is_its_own else file.stem)
        return hostnames

    # One process at a time

    @contextlib.contextmanager
    def lock(self, hostname) -> Iterator[bool]:
        """Whether we are the only process that orders for ``hostname``; does not wait.

        Who gets it reads the store again: another process may have ordered meanwhile.
        """
        with self._locked(self._locks / self._stem(hostname), fcntl.LOCK_NB) as ours:
            yield ours

    @contextlib.contextmanager
    def account_lock(self) -> Iterator[None]:
        """Waits until no other process (or thread) is at the account."""
        with self._locked(self._ca / "account.lock", 0):  # in locks/ it might be a hostname's
            yield

    @contextlib.contextmanager
    def _locked(self, path, flag) -> Iterator[bool]:
        try:
            lock = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
        except OSError as error:
            raise StoreError(f"{path}: {error.strerror}") from error
        try:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | flag)
                ours = True
            except BlockingIOError:
                ours = False
            yield ours
        finally:
            os.close(lock)  # which also unlocks, as the end of the process does

    # Files

    def _make_folders(self):
        for path in (self._folder, self._ca, self._certs, self._locks):
            path.mkdir(mode=0o700, parents=True, exist_ok=True)

    def _stem(self, hostname) -> str:
        """A name for the files of ``hostname``, which nobody can lead out of the folder."""
        if not HOSTNAME.fullmatch(hostname):
            raise ValueError(f"hostname {hostname!r}: expected lower case, no port, no slash")
        if len(hostname) <= LONGEST_STEM:
            return hostname
        return f"{hostname[:100]}-{hashlib.sha256(hostname.encode()).hexdigest()[:32]}"

    def _file(self, hostname, suffix) -> Path:
        return self._certs / (self._stem(hostname) + suffix)

    def _read_json(self, file) -> dict:
        try:
            value = json.loads(_read(file))
            if not isinstance(value, dict):
                raise ValueError("not an object")
            return value
        except FileNotFoundError:
            return {}
        except OSError as error:
            raise StoreError(f"{file}: {error.strerror}") from error
        except (ValueError, RecursionError, StoreError) as error:
            self._set_aside(file, error)
            return {}

    def _write_json(self, file, value):
        try:
            self._write(file, json.dumps(value, indent=1).encode() + b"\n")
        except OSError as error:
            raise StoreError(f"{file}: {error.strerror}") from error

    def _write(self, file, content, hostname=None):
        """Put ``content`` at ``file`` whole or not at all; a certificate is checked before."""
        new = file.with_name(f".{file.name}.{secrets.token_hex(4)}.tmp")
        try:
            with open(os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as out:
                out.write(content)
                out.flush()
                os.fsync(out.fileno())
            if hostname is not None:
                check(new, hostname)
            os.replace(new, file)
        except BaseException:
            new.unlink(missing_ok=True)
            raise
        folder = os.open(file.parent, os.O_RDONLY)
        try:
            os.fsync(folder)  # or a power cut could undo the move
        finally:
            os.close(folder)

    def _set_aside(self, file, error):
        flaw = error.flaw if isinstance(error, _Flaw) else error
        bad = file.with_name(file.name + ".bad")
        try:
            os.replace(file, bad)
        except FileNotFoundError:  # another process was quicker, and has said so
            return
        except OSError as obstacle:  # such as a folder of that name: nothing could be kept here
            raise StoreError(
                f"{file} is broken ({flaw}) and cannot be moved to {bad.name} "
                f"({obstacle.strerror}): remove both"
            ) from obstacle
        log.warning("%s is broken (%s): renamed to %s, and made anew", file, flaw, bad.name)

    def _sweep(self, folder, names=".*.tmp"):
        for path in folder.glob(names):
            with contextlib.suppress(FileNotFoundError):  # another process was quicker
                if path.stat().st_mtime < time.time() - STALE:
                    path.unlink()


def ca_id(directory_url: str) -> str:
    """The name of a CA's folder: its host for people, a hash so that no two share one."""
    host = urllib.parse.urlsplit(directory_url).hostname or "ca"
    digest = hashlib.sha256(directory_url.encode()).hexdigest()
    return f"{re.sub('[^a-z0-9.-]', '-', host)[:100]}-{digest[:8]}"


def check(file: Path, hostname) -> Stored:
    """A file with key, certificate and chain as a certificate of ``hostname``.

    Raises StoreError if it is not one that a visitor could be served with, dates apart; OSError if
    it cannot be read.
    """
    content = _read(file)
    try:
        key = serialization.load_pem_private_key(content, password=None)
        leaf, *chain = x509.load_pem_x509_certificates(content)
        own = key.public_key() == leaf.public_key()
        names = leaf.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        served = {name.lower() for name in names.get_values_for_type(x509.DNSName)}
        leaf.issuer.rfc4514_string()  # others will ask for it
    except MALFORMED as error:
        raise _Flaw(file, "expected a private key and its certificate as PEM") from error
    if not own:
        raise _Flaw(file, "the key is not that of the certificate")
    if not served & {hostname, "*." + hostname.partition(".")[2]}:
        raise _Flaw(file, f"a certificate of {', '.join(sorted(served))}, not {hostname}")
    try:
        if not chain:
            raise _Flaw(file, "the chain is missing, expected the issuer's certificate")
        leaf.verify_directly_issued_by(chain[0])
        # A chain that is cut within its last certificate is seen by nobody but OpenSSL.
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(file)
    except (InvalidSignature, *MALFORMED) as error:
        raise _Flaw(file, "the chain does not lead on from the certificate") from error
    except ssl.SSLError as error:
        raise _Flaw(file, f"OpenSSL refuses it: {error}") from error
    return Stored(file, leaf)


def _read(file) -> bytes:
    try:
        return safe_read.read(file)
    except (Unfit, IsADirectoryError, PermissionError) as error:  # that will be so later, too
        raise _Flaw(file, error.strerror) from error
