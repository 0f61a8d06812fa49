"""The operator's own certificates: the folder CERT_DIR, read at start and when its files change.

A pair is a certificate (PEM, leaf first, then its chain) and its key (PEM, without password). It
lies in CERT_DIR or one folder deeper, under one of the names that common tools use:

    NAME.crt        NAME.key                    also a Kubernetes secret's tls.crt, tls.key
    NAME.pem        NAME-key.pem or NAME.key    mkcert
    fullchain.pem   privkey.pem                 certbot's live/HOSTNAME/, or live/ as CERT_DIR

Other files are ignored, and so are folders whose names begin with a dot. Symbolic links are
followed: if certbot points a link at another file, that counts as a changed file.

Which pair serves a name:

    of those valid now      the one that ends last; one for each kind of key (RSA, EC), together in
                            a context, from which OpenSSL takes what the client can use
    of the others           the one that ends last, if there is no valid one, not even from a CA:
                            a visitor learns more from an expired certificate than from none

Another program may be writing while we read. If a changed pair cannot be used, the one read before
is still served, and the files are tried again when they change. A pair whose certificate file was
removed is no longer served. But if no usable pair is left at all, those read before stay: a folder
that is being replaced, or is not mounted, should not take every hostname down.

The log names each fault once, and again if it comes back after it was mended.
"""

from __future__ import annotations

import logging
import os
import ssl
import stat
import threading
from collections.abc import Callable, Iterable, Mapping
from datetime import datetime, timezone
from pathlib import Path
from typing import NamedTuple

from cryptography import x509

from gotunnel_agent.common.exposed import open_folders
from gotunnel_agent.common.hostnames import normal_hostname
from gotunnel_agent.common.one_line import some

from ..net import safe_read
from ..net.certificate import begins, ends, load_certificates
from ..net.safe_read import MALFORMED
from .choices import Loaded
from .local_ca import CertificateError

__all__ = ["CertDir", "Pair", "Report", "Served", "load_pair", "names_of"]

log = logging.getLogger("gotunnel.cert_dir")

_NEVER = datetime.max.replace(tzinfo=timezone.utc)
_PEM_BEGIN = b"-----BEGIN CERTIFICATE-----"
# OpenSSL's reasons if key and certificate do not match, in their value or already in their kind.
_MISMATCHES = {"KEY_VALUES_MISMATCH", "KEY_TYPE_MISMATCH", "NO_CERTIFICATE_ASSIGNED"}


class Pair(NamedTuple):
    """A certificate that was loaded with its key."""

    certificate_file: Path
    key_file: Path
    names: frozenset[str]  # that it serves, maybe none
    kind: type  # of its key; a context takes one certificate of each kind
    begins: datetime  # aware, as all here
    ends: datetime
    missing_issuer: str  # the issuer's name, if the issuer's certificate is not in the file
    context: Loaded


class Served(NamedTuple):
    """The contexts by name; wildcards as the certificate has them. Immutable."""

    valid: Mapping[str, Loaded]
    outdated: Mapping[str, Loaded]  # of pairs that have expired, or are not valid yet


class Report(NamedTuple):
    """The result of the latest look, for callers that do not read the log."""

    pairs: tuple[Pair, ...]  # the usable ones, also expired ones
    broken: tuple[str, ...]  # a remark on each pair that is not usable
    remarks: tuple[str, ...]  # all other remarks, except those on dates


class _Stamp(NamedTuple):
    """Differs if a file has changed; the change time (ctime) also shows a chmod."""

    modified: int
    changed: int
    size: int
    inode: int
    mode: int


class _Watch(NamedTuple):
    """Two files that should be a pair; the stamp of a missing file is None."""

    key_file: str
    certificate: _Stamp | None
    key: _Stamp | None


class _Entry(NamedTuple):
    """The result of reading a pair."""

    watch: _Watch
    pair: Pair | None
    remarks: tuple[str, ...]  # for the operator


class CertDir:
    """The pairs in `folder`. `new_context` makes a context without certificate.

    `served` and `report` are replaced whole by reload(), so that readers need no lock. Raises
    CertificateError if the folder cannot be read.
    """

    def __init__(self, folder: Path, new_context: Callable[[], Loaded]) -> None:
        self.served = Served({}, {})
        self.report = Report((), (), ())
        self._folder = str(folder)
        self._new_context = new_context
        self._entries: dict[str, _Entry] = {}  # by certificate file
        self._pairs: list[Pair] = []  # all usable pairs, from which _choose() takes
        self._joined: dict[tuple[Pair, ...], Loaded] = {}
        self._seen: object = None  # the result of the last look
        self._said: set[str] = set()  # logged remarks that still hold
        self._chosen_at = self._choose_again_at = _NEVER
        # Held to read: a slow thread must not put older files over newer ones.
        self._reading = threading.Lock()
        self._reload()

    def reload(self) -> None:
        """Take up what changed in the folder since the last look; if nothing did, it costs one stat
        a file.

        Any thread; it blocks on the disk, and on another thread that reads. It raises nothing:
        errors are logged, and the pairs stay as they were.
        """
        with self._reading:
            try:
                self._reload()
            except CertificateError as error:
                self._seen = None  # so that the next look that succeeds forgets the remark
                self._say({str(error)} | self._said)

    def _reload(self) -> None:
        watches, unreadable = self._look()
        now = _now()
        if (watches, unreadable) == self._seen and self._chosen_at <= now < self._choose_again_at:
            return
        entries = {
            file: entry
            for file, entry in self._entries.items()
            if os.path.dirname(file) in unreadable
        }
        for file, watch in watches.items():
            entry = self._entries.get(file)
            if entry is None or entry.watch != watch:
                entry = self._read(file, watch, entry)
            entries[file] = entry
        for file in self._entries.keys() - entries.keys():
            log.info("CERT_DIR: %s is gone", self._short(file))
        self._entries, self._seen = entries, (watches, unreadable)

        remarks = set(unreadable.values())
        remarks.update(
            remark for entry in entries.values() if entry.pair for remark in entry.remarks
        )
        broken = {
            remark for entry in entries.values() if not entry.pair for remark in entry.remarks
        }
        pairs = [entry.pair for entry in entries.values() if entry.pair]
        if pairs:
            self._pairs = pairs
        elif self._pairs:
            remarks.add(
                "no pair is left: the gateway serves those read before, until there is a pair again"
                " or it is restarted"
            )
        else:
            remarks.add(
                f"no pair in {self._folder}, expected NAME.crt with NAME.key, or folders"
                " with fullchain.pem and privkey.pem"
            )
        self.served = self._choose(now)
        self.report = Report(tuple(pairs), tuple(sorted(broken)), tuple(sorted(remarks)))
        self._say(broken.union(remarks, *(self._dates(pair, now) for pair in self._pairs)))

    def _say(self, remarks: set[str]) -> None:
        for remark in sorted(remarks - self._said):
            log.warning("CERT_DIR: %s", remark)
        self._said = remarks

    # Looking

    def _look(self) -> tuple[dict[str, _Watch], dict[str, str]]:
        """Possible pairs, by certificate file; and a remark for each inner folder that we cannot
        read."""
        try:
            names, folders = _scan(self._folder)
        except OSError as error:
            raise CertificateError(
                f"{self._folder}: {error.strerror}, expected CERT_DIR to be a folder that the"
                " gateway's user can read"
            ) from error
        watches = dict(self._watches(self._folder, names))
        unreadable = {}
        for folder in folders:
            try:
                watches.update(self._watches(folder, _scan(folder)[0]))
            except FileNotFoundError:
                pass  # removed since the look before
            except OSError as error:
                unreadable[folder] = (
                    f"{self._short(folder)}: {error.strerror}, expected a folder that the gateway's"
                    " user can read; the pairs read there before stay in use"
                )
        return watches, unreadable

    def _watches(self, folder: str, names: set[str]) -> Iterable[tuple[str, _Watch]]:
        for name in names:
            file = f"{folder}/{name}"
            if key := _key_name(name, names):
                key_file = f"{folder}/{key}"
            elif entry := self._entries.get(file):  # it was a pair, but its key is gone
                key_file = entry.watch.key_file
            else:
                continue
            yield file, _Watch(key_file, _stamp(file), _stamp(key_file))

    # Reading

    def _read(self, file: str, watch: _Watch, before: _Entry | None) -> _Entry:
        """Read a pair; if it is unusable, keep the one read before, with a remark that says why."""
        try:
            pair = load_pair(Path(file), Path(watch.key_file), self._new_context())
            if not pair.names:
                raise CertificateError(
                    f"{file}: names no host, expected a certificate with subjectAltName"
                )
        except CertificateError as error:
            if watch.key is None and _is_of_a_ca(file):  # a chain without key, as lego writes one
                return _Entry(watch, None, ())
            kept = None if before is None else before.pair
            stays = ", the one read before stays in use" if kept else ""
            remark = (
                f"{self._short(file)} not used{stays}: {error}; correct it, and the gateway reads"
                " it again"
            )
            return _Entry(watch, kept, (remark,))
        log.info(
            "CERT_DIR: %s read, good until %s: %s",
            self._short(file),
            _day(pair.ends),
            some(sorted(pair.names)),
        )
        remarks = []
        if watch.key and watch.key.mode & stat.S_IROTH:
            remarks.append(
                f"{self._short(watch.key_file)}: every user of this machine can read"
                f" it, expected a key for the gateway alone; chmod o-r"
                f" {watch.key_file}"
            )
        remarks += open_folders([watch.key_file])
        if pair.missing_issuer:
            remarks.append(
                f"{self._short(file)}: the certificate of its issuer"
                f" ({pair.missing_issuer}) is not in it; append it, or only visitors"
                " that have it already trust this one"
            )
        return _Entry(watch, pair, tuple(remarks))

    def _short(self, file: str) -> str:
        return os.path.relpath(file, self._folder)

    # Choosing

    def _choose(self, now: datetime) -> Served:
        """Which pair serves which name at the time `now`. Also notes until when that holds."""
        valid: dict[str, dict[type, Pair]] = {}
        outdated: dict[str, Loaded] = {}
        for pair in sorted(self._pairs, key=lambda pair: pair.ends):  # the last one stays
            for name in pair.names:
                if pair.begins <= now < pair.ends:
                    valid.setdefault(name, {})[pair.kind] = pair
                else:
                    outdated[name] = pair.context
        wanted = {
            name: tuple(sorted(best.values(), key=lambda pair: pair.ends))
            for name, best in valid.items()
        }
        self._joined = {
            pairs: self._joined.get(pairs) or self._join(pairs) for pairs in set(wanted.values())
        }
        dates = [date for pair in self._pairs for date in (pair.begins, pair.ends)]
        self._chosen_at = now
        self._choose_again_at = min((date for date in dates if date > now), default=_NEVER)
        return Served({name: self._joined[pairs] for name, pairs in wanted.items()}, outdated)

    def _join(self, pairs: tuple[Pair, ...]) -> Loaded:
        """One context with all of `pairs`, which have different kinds of keys; in order of their
        ends."""
        if len(pairs) == 1:
            return pairs[0].context
        context = self._new_context()
        try:
            for pair in pairs:
                _load(context, pair.certificate_file, pair.key_file)
        except CertificateError:  # being written: that was logged, or the next look reads it again
            return pairs[-1].context
        context.ends_at = pairs[0].ends.timestamp()
        return context

    def _dates(self, pair: Pair, now: datetime) -> set[str]:
        """A remark if `pair` is not valid at the time `now`."""
        file = self._short(str(pair.certificate_file))
        if pair.ends <= now:
            return {
                f"{file} expired on {_day(pair.ends)}, and is served only to names without another"
                " certificate; put a renewed one in its place"
            }
        if now < pair.begins:
            return {
                f"{file} is valid from {_day(pair.begins)} on, and until then served only to names"
                " without another certificate; if that date has passed, set this machine's clock"
            }
        return set()


def load_pair(certificate_file: Path, key_file: Path, context: Loaded) -> Pair:
    """Load a certificate and its key into `context`, a new one.

    Only OpenSSL checks the key: cryptography would test the primes of an RSA key at each load,
    which takes a tenth of a second, or minutes for a thousand pairs. Raises CertificateError,
    naming the file.
    """
    try:
        pem = safe_read.read(certificate_file)
        leaf, *chain = load_certificates(pem)
        signers = {certificate.subject for certificate in chain} | {leaf.subject}
        pair = Pair(
            certificate_file,
            key_file,
            names_of(leaf),
            type(leaf.public_key()),
            begins(leaf),
            ends(leaf),
            "" if leaf.issuer in signers else leaf.issuer.rfc4514_string(),
            context,
        )
    except OSError as error:
        raise CertificateError(f"{certificate_file}: {error.strerror}") from error
    except MALFORMED as error:
        raise CertificateError(f"{certificate_file}: not a certificate, expected PEM") from error
    if pem.count(_PEM_BEGIN) > 1 + len(chain):  # cryptography ignores a truncated certificate
        raise CertificateError(
            f"{certificate_file}: cut short in its certificate {len(chain) + 2}, expected whole"
            " ones"
        )
    _load(context, certificate_file, key_file)
    context.ends_at = pair.ends.timestamp()
    return pair


def _load(context: Loaded, certificate_file: Path, key_file: Path) -> None:
    def no_password() -> str:  # without this, OpenSSL would ask for one on the terminal, and wait
        raise CertificateError(
            f"{key_file}: encrypted, expected a key without password, as openssl pkey -in"
            f" {key_file.name} makes it"
        )

    try:
        for file in (certificate_file, key_file):  # OpenSSL would wait for a FIFO
            safe_read.read(file)
        context.load_cert_chain(certificate_file, key_file, no_password)
    except ssl.SSLError as error:
        if error.reason in _MISMATCHES:
            raise CertificateError(
                f"{key_file}: not the key of {certificate_file.name}, expected the two halves of"
                " one pair, the leaf before its chain"
            ) from error
        if error.reason is None:  # the certificate was read above, so it is the key
            raise CertificateError(f"{key_file}: not a private key, expected PEM") from error
        raise CertificateError(f"{certificate_file}: OpenSSL refuses it: {error.reason}") from error
    except OSError as error:  # OpenSSL does not name the file; the certificate could be read
        raise CertificateError(f"{error.filename or key_file}: {error.strerror}") from error


def names_of(certificate: x509.Certificate) -> frozenset[str]:
    """The DNS names and IP addresses in subjectAltName; the subject is ignored (RFC 9525 §2)."""
    try:
        names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except MALFORMED:
        return frozenset()
    return frozenset(map(normal_hostname, names.get_values_for_type(x509.DNSName))) | frozenset(
        map(str, names.get_values_for_type(x509.IPAddress))
    )


def _is_of_a_ca(file: str) -> bool:
    try:
        leaf = load_certificates(safe_read.read(file))[0]
        return leaf.extensions.get_extension_for_class(x509.BasicConstraints).value.ca
    except (OSError, *MALFORMED):
        return False


def _scan(folder: str) -> tuple[set[str], list[str]]:
    """The names in `folder` that could belong to a pair, and the folders in it."""
    names: set[str] = set()
    folders: list[str] = []
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.name.endswith((".crt", ".key", ".pem")):
                names.add(entry.name)
            elif not entry.name.startswith(".") and _is_folder(entry):
                folders.append(entry.path)
    return names, folders


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a circular link, or one to a folder without access
        return False


def _stamp(file: str) -> _Stamp | None:
    try:
        found = os.stat(file)
    except OSError:  # missing, a dangling link, or one to a folder without access
        return None
    return _Stamp(found.st_mtime_ns, found.st_ctime_ns, found.st_size, found.st_ino, found.st_mode)


def _key_name(name: str, names: set[str]) -> str | None:
    """The key's file of the certificate file `name`; None if `name` is not half of a pair.

    `names` are those in its folder. A .crt always needs a key, and a missing one is reported; a
    .pem may be anything.
    """
    stem, _, suffix = name.rpartition(".")
    if name == "fullchain.pem":
        return "privkey.pem"
    if suffix == "crt":
        return f"{stem}.key"
    if suffix == "pem":
        return next((key for key in (f"{stem}-key.pem", f"{stem}.key") if key in names), None)
    return None


def _day(date: datetime) -> str:
    return f"{date:%Y-%m-%d}"


def _now() -> datetime:
    return datetime.now(timezone.utc)
