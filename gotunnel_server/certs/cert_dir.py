"""The operator's own certificates: the folder CERT_DIR, read at start and when its files change.

A pair is a certificate (PEM, leaf first, then its chain) and its key (PEM, without password). It
lies in CERT_DIR or one folder deeper, under any of the names that tools give it:

    NAME.crt        NAME.key                    also a Kubernetes secret's tls.crt, tls.key
    NAME.pem        NAME-key.pem or NAME.key    mkcert
    fullchain.pem   privkey.pem                 certbot's live/HOSTNAME/, or live/ as CERT_DIR

Other files are nobody's business here, nor are folders whose names begin with a dot. Links are
followed, and what is watched is the file that they lead to, so that certbot's turning of a link is
seen like a file written anew.

Which pair serves a name:

    of those valid now      the one that ends last; of each kind of key (RSA, EC) one, in a
                            context together, and OpenSSL takes what the client can use
    of the others           the one that ends last, where nobody has a valid one: who sees an
                            expired certificate knows what is wrong, who sees none does not

Another program may be writing while we read. A pair that cannot be used is served as it was read
before, and tried again when a file of it changes. A pair whose certificate file is gone is served
no more, because that is what removing it says. But if no usable pair is left at all, those read
before stay: a folder that is being replaced, or was not mounted, should not take every hostname
down.

The log says each thing once, and again after it was mended and came back.
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

from ..net import safe_read
from ..net.safe_read import MALFORMED
from .local_ca import CertificateError

__all__ = ["CertDir", "Pair", "Report", "Served", "load_pair", "names_of"]

log = logging.getLogger("gotunnel.cert_dir")

_NEVER = datetime.max.replace(tzinfo=timezone.utc)
_NAMES_SHOWN = 5  # in a line of the log: a certificate may have a hundred
_PEM_BEGIN = b"-----BEGIN CERTIFICATE-----"
# How OpenSSL says that key and certificate differ: in their value, or already in their kind.
_MISMATCHES = {"KEY_VALUES_MISMATCH", "KEY_TYPE_MISMATCH", "NO_CERTIFICATE_ASSIGNED"}


class Pair(NamedTuple):
    """A certificate that was loaded with its key."""

    certificate_file: Path
    key_file: Path
    names: frozenset[str]  # those that it serves, maybe none
    kind: type  # of its key; a context takes one certificate of each kind
    begins: datetime  # aware, as all here
    ends: datetime
    missing_issuer: str  # who signed it, if that one's certificate is not in the file
    context: ssl.SSLContext


class Served(NamedTuple):
    """The contexts by name; wildcards too, as they stand in the certificate. Never changed."""

    valid: Mapping[str, ssl.SSLContext]
    outdated: Mapping[str, ssl.SSLContext]  # by pairs that ran out, or are not valid yet


class Report(NamedTuple):
    """What the latest look has found, for callers that do not read the log."""

    pairs: tuple[Pair, ...]  # those that can be used, dates apart
    broken: tuple[str, ...]  # a remark on each that cannot
    remarks: tuple[str, ...]  # what else there is to say, but for dates, which `pairs` tell


class _Stamp(NamedTuple):
    """What tells a file from what it was; the change time also tells a chmod."""

    modified: int
    changed: int
    size: int
    inode: int
    mode: int


class _Watch(NamedTuple):
    """Two files that should be a pair; the stamp of one that is not there is None."""

    key_file: str
    certificate: _Stamp | None
    key: _Stamp | None


class _Entry(NamedTuple):
    """What came of reading a pair."""

    watch: _Watch
    pair: Pair | None
    remarks: tuple[str, ...]  # for the operator


class CertDir:
    """The pairs in `folder`. `new_context` makes a context without certificate.

    `served` and `report` are replaced whole by reload(), so that readers need no lock. Raises
    CertificateError if the folder cannot be read.
    """

    def __init__(self, folder: Path, new_context: Callable[[], ssl.SSLContext]) -> None:
        self.served = Served({}, {})
        self.report = Report((), (), ())
        self._folder = str(folder)
        self._new_context = new_context
        self._entries: dict[str, _Entry] = {}  # by certificate file
        self._pairs: list[Pair] = []  # that are served, where they are the best
        self._joined: dict[tuple[Pair, ...], ssl.SSLContext] = {}
        self._seen: object = None  # by the last look
        self._said: set[str] = set()  # remarks that are still true
        self._chosen_at = self._choose_again_at = _NEVER
        # Held to read: a slow thread must not put older files over newer ones.
        self._reading = threading.Lock()
        self._reload()

    def reload(self) -> None:
        """Take up what changed in the folder since the last look; one look if nothing did.

        Any thread; it blocks on the disk, and on another that reads just now. It raises nothing:
        what goes wrong is said in the log, and everything stays as it was.
        """
        with self._reading:
            try:
                self._reload()
            except CertificateError as error:
                self._seen = None  # so that the next look that succeeds takes the remark back
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
            changed = entry is None or entry.watch != watch
            entries[file] = self._read(file, watch, entry) if changed else entry
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
                "no pair is left: those read before are served until there is one again or"
                " the gateway is started anew"
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
        """What could be pairs, by certificate file, and the folders in it that nobody can read."""
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
                    " user can read; what was read there before stays"
                )
        return watches, unreadable

    def _watches(self, folder: str, names: set[str]) -> Iterable[tuple[str, _Watch]]:
        for name in names:
            file = f"{folder}/{name}"
            if key := _key_name(name, names):
                key_file = f"{folder}/{key}"
            elif entry := self._entries.get(file):  # its key is gone, it is half a pair now
                key_file = entry.watch.key_file
            else:
                continue
            yield file, _Watch(key_file, _stamp(file), _stamp(key_file))

    # Reading

    def _read(self, file: str, watch: _Watch, before: _Entry | None) -> _Entry:
        """One pair; if it cannot be used, what it was before with a remark that says why."""
        try:
            pair = load_pair(Path(file), Path(watch.key_file), self._new_context())
            if not pair.names:
                raise CertificateError(
                    f"{file}: names no host, expected a certificate with subjectAltName"
                )
        except CertificateError as error:
            if watch.key is None and _is_of_a_ca(file):  # a chain beside its leaf, as lego's
                return _Entry(watch, None, ())
            pair = before and before.pair
            stays = ", the one read before stays" if pair else ""
            remark = (
                f"{self._short(file)} not used{stays}: {error}; mend it, it is read again when its"
                " files change"
            )
            return _Entry(watch, pair, (remark,))
        log.info(
            "CERT_DIR: %s read, good until %s: %s",
            self._short(file),
            _day(pair.ends),
            ", ".join(
                sorted(pair.names)[:_NAMES_SHOWN] + ["..."] * (len(pair.names) > _NAMES_SHOWN)
            ),
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
                " who have it already trust this one"
            )
        return _Entry(watch, pair, tuple(remarks))

    def _short(self, file: str) -> str:
        return os.path.relpath(file, self._folder)

    # Choosing

    def _choose(self, now: datetime) -> Served:
        """Who serves which name at the time `now`, and until when that holds."""
        valid: dict[str, dict[type, Pair]] = {}
        outdated: dict[str, ssl.SSLContext] = {}
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

    def _join(self, pairs: tuple[Pair, ...]) -> ssl.SSLContext:
        """One context with all of `pairs`, which are of different kinds, the last ending last."""
        if len(pairs) == 1:
            return pairs[0].context
        context = self._new_context()
        try:
            for pair in pairs:
                _load(context, pair.certificate_file, pair.key_file)
        except CertificateError:  # being written; that was said, or the next look reads it again
            return pairs[-1].context
        return context

    def _dates(self, pair: Pair, now: datetime) -> set[str]:
        """A remark if `pair` is not valid at the time `now`."""
        file = self._short(str(pair.certificate_file))
        if pair.ends <= now:
            return {
                f"{file} ran out on {_day(pair.ends)}, served only where there is no other; put"
                " a renewed one in its place"
            }
        if now < pair.begins:
            return {
                f"{file} is valid from {_day(pair.begins)} on, served only where there is no"
                " other until then; if that has passed, set this machine's clock"
            }
        return set()


def load_pair(certificate_file: Path, key_file: Path, context: ssl.SSLContext) -> Pair:
    """Load a certificate and its key into `context`, a new one.

    OpenSSL alone judges the key. (cryptography proves the primes of an RSA key at each load, which
    takes a tenth of a second; with a thousand pairs that would be minutes.) Raises
    CertificateError, naming the file.
    """
    try:
        pem = safe_read.read(certificate_file)
        leaf, *chain = x509.load_pem_x509_certificates(pem)
        signers = {certificate.subject for certificate in chain} | {leaf.subject}
        pair = Pair(
            certificate_file,
            key_file,
            names_of(leaf),
            type(leaf.public_key()),
            leaf.not_valid_before_utc,
            leaf.not_valid_after_utc,
            "" if leaf.issuer in signers else leaf.issuer.rfc4514_string(),
            context,
        )
    except OSError as error:
        raise CertificateError(f"{certificate_file}: {error.strerror}") from error
    except MALFORMED as error:
        raise CertificateError(f"{certificate_file}: not a certificate, expected PEM") from error
    if pem.count(_PEM_BEGIN) > 1 + len(chain):  # cryptography passes over half a certificate
        raise CertificateError(
            f"{certificate_file}: cut short in its certificate {len(chain) + 2}, expected whole"
            " ones"
        )
    _load(context, certificate_file, key_file)
    return pair


def _load(context: ssl.SSLContext, certificate_file: Path, key_file: Path) -> None:
    def no_password():  # without this, OpenSSL would ask for one on the terminal, and wait
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
        if error.reason is None:  # the certificate was read before, so it is the key
            raise CertificateError(f"{key_file}: not a private key, expected PEM") from error
        raise CertificateError(f"{certificate_file}: OpenSSL refuses it: {error.reason}") from error
    except OSError as error:  # OpenSSL does not say of which; the other could be read
        raise CertificateError(f"{error.filename or key_file}: {error.strerror}") from error


def names_of(certificate: x509.Certificate) -> frozenset[str]:
    """The DNS names and IP addresses in subjectAltName, which alone counts (RFC 9525 §2)."""
    try:
        names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except MALFORMED:
        return frozenset()
    return frozenset(map(normal_hostname, names.get_values_for_type(x509.DNSName))) | frozenset(
        map(str, names.get_values_for_type(x509.IPAddress))
    )


def _is_of_a_ca(file: str) -> bool:
    try:
        leaf = x509.load_pem_x509_certificates(safe_read.read(file))[0]
        return leaf.extensions.get_extension_for_class(x509.BasicConstraints).value.ca
    except (OSError, *MALFORMED):
        return False


def _scan(folder: str) -> tuple[set[str], list[str]]:
    """The names in `folder` that could belong to a pair, and the folders in it."""
    names, folders = set(), []
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.name.endswith((".crt", ".key", ".pem")):
                names.add(entry.name)
            elif not entry.name.startswith(".") and _is_folder(entry):
                folders.append(entry.path)
    return names, folders


def _is_folder(entry: os.DirEntry) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link in a circle, or to where we may not look
        return False


def _stamp(file: str) -> _Stamp | None:
    try:
        found = os.stat(file)
    except OSError:  # it is not there, or a link to nothing, or to where we may not look
        return None
    return _Stamp(found.st_mtime_ns, found.st_ctime_ns, found.st_size, found.st_ino, found.st_mode)


def _key_name(name: str, names: set[str]) -> str | None:
    """The file with the key of the certificate file `name`; None if that has none of its own.

    `names` are those in its folder. A .crt without key is one that somebody forgot; a .pem may be
    anything.
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
