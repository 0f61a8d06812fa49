"""The command `certificates`: prints a table with a Row for each certificate that exists, or that
is wanted and missing.

It changes nothing, and may run beside a gateway: ACME_CACHE is only read. Only
`certificates --renew` writes something: a request, which a running gateway takes up.
"""

from __future__ import annotations

import base64
import contextlib
import os
import re
import time
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import NamedTuple, TextIO

from cryptography import x509

from gotunnel_agent.common.hostnames import normal_hostname
from gotunnel_agent.common.one_line import words_and_link

from ..certs.cert_dir import CertDir, names_of
from ..certs.choices import Loaded
from ..certs.folder import FolderLocker, FolderStorage, open_store
from ..certs.local_ca import FOLDER as LOCAL_FOLDER
from ..certs.local_ca import HASHED_STEM, RENEW_BEFORE, CertificateError
from ..certs.order_queue import WAITS, OrderQueue
from ..certs.schedule import DAY
from ..certs.storage import Locker, ReadOnly, Storage
from ..certs.store import CertStore, StoreError, ca_id
from ..config import Config
from ..net import safe_read
from ..net.certificate import ends, load_certificates
from ..net.safe_read import MALFORMED

# Where a certificate comes from, as the table shows it. GO: it was ordered by the earlier gateway,
# a program in Go, which left it in the folder that both use.
OWN, ORDERED, GO, LOCAL = "CERT_DIR", "ACME", "ACME (left by the Go program)", "local CA"
HEADINGS = ("NAME", "FROM", "ISSUER", "DAYS LEFT", "NEXT RENEWAL (UTC)")


class Row(NamedTuple):
    """A certificate, or a missing one. Instants are seconds since 1970, None for unknown."""

    name: str
    source: str
    issuer: str = ""
    ends_at: float | None = None
    renew_at: float | None = None
    error: str = ""


def run_certificates(config: Config, out: TextIO) -> int:
    """Print the table; return the exit status. Raises CertificateError, as find_rows() does."""
    try:
        with opened(config) as place:
            return _print(config, place, out)
    except StoreError as error:
        raise CertificateError(str(error)) from error


def _print(config: Config, place: Place, out: TextIO) -> int:
    rows = _rows(config, place)
    if place.remark:
        print(place.remark, file=out)
    if rows:
        print(table(rows, time.time()), file=out)
    else:
        folder = config.cert_dir or config.acme_cache
        print(f"There is no certificate yet in {folder}; a gateway gets its own when it starts.",
              file=out)  # fmt: skip
    if config.acme is not None:
        for line in pauses(place, config.acme.directory):
            print(line, file=out)
    return 0


class Place(NamedTuple):
    """Where certificates lie that were ordered. ``remark``: what the reader has to know of it."""

    storage: Storage
    locker: Locker
    remark: str = ""


@contextlib.contextmanager
def opened(config: Config) -> Iterator[Place]:
    """ACME_CACHE; with CLUSTER, what the gateways share on Redis, or their copy of it here. Closes
    the connection at the end. Raises StoreError if the key of the cluster is another one."""
    folder = Place(FolderStorage(config.acme_cache), FolderLocker(config.acme_cache))
    if config.cluster is None or config.acme is None:
        yield folder
        return
    # Loaded here: it needs the package redis.
    engine = import_module("gotunnel_server.cluster.engine").Engine(config.cluster)
    certificates = import_module("gotunnel_server.cluster.certificates")
    keys = [base64.urlsafe_b64decode(key) for key in config.cluster.keys]
    try:
        storage, locker = certificates.open_redis(engine.call, config.cluster.name, keys)
        place = Place(storage, locker)
        try:
            storage.check_key()
        except certificates.WrongKey as error:
            raise StoreError(str(error.strerror)) from None
        except OSError as error:
            place = folder._replace(remark=f"{error.strerror}: this is the copy in ACME_CACHE")
        yield place
    finally:
        engine.close()


def find_rows(config: Config) -> list[Row]:
    """All rows, sorted by name. Raises CertificateError if a folder cannot be read."""
    try:
        with opened(config) as place:
            return _rows(config, place)
    except StoreError as error:
        raise CertificateError(str(error)) from error


def _rows(config: Config, place: Place) -> list[Row]:
    rows = []
    if config.cert_dir is not None:
        rows += own_rows(config.cert_dir)
    try:
        if config.local_ca:
            rows += local_rows(config.acme_cache / LOCAL_FOLDER)
        if config.acme is not None:
            rows += ordered_rows(place, config.acme.directory)
    except PermissionError as error:
        raise CertificateError(
            f"{error.filename}: {error.strerror}, run this as the gateway's user"
        ) from error
    except StoreError as error:
        advice = ", run this as the gateway's user" if config.cluster is None else ""
        raise CertificateError(f"{error}{advice}") from error
    return sorted(rows, key=lambda row: (row.name, row.source))


def read_pairs(folder: Path) -> CertDir:
    """CERT_DIR, read once. Raises CertificateError if it cannot be read."""
    return CertDir(folder, Loaded)


def own_rows(folder: Path) -> list[Row]:
    """The certificates in CERT_DIR. Raises CertificateError if it cannot be read."""
    report = read_pairs(folder).report
    rows = [Row("-", OWN, error=remark) for remark in report.broken]
    for pair in report.pairs:
        leaf = _leaf(pair.certificate_file)
        issuer = issuer_of(leaf) if leaf else ""
        rows += [Row(name, OWN, issuer, pair.ends.timestamp()) for name in pair.names]
    return rows


def local_rows(folder: Path) -> list[Row]:
    """The certificates of our own CA. Raises PermissionError."""
    rows = []
    with contextlib.suppress(FileNotFoundError):
        os.listdir(folder)  # raises PermissionError, which glob() may hide
    for file in folder.glob("*.crt"):
        if file.name == "ca.crt":
            continue
        leaf = _leaf(file)
        if leaf is None:
            rows.append(Row(file.stem, LOCAL, error=f"{file}: cannot be read as PEM; the gateway "
                            "makes a new one when it needs it"))  # fmt: skip
            continue
        ends_at = ends(leaf).timestamp()
        renew_at = ends_at - RENEW_BEFORE.total_seconds()
        name = file.stem
        if HASHED_STEM.fullmatch(name):  # of a longer hostname, which only the certificate has
            name = next(iter(names_of(leaf)), name)
        rows.append(Row(name, LOCAL, issuer_of(leaf), ends_at, renew_at))
    return rows


def _leaf(file: Path) -> x509.Certificate | None:
    """The first certificate in a file, None if it cannot be read."""
    try:
        leaf = load_certificates(safe_read.read(file))[0]
        issuer_of(leaf)  # raises now if the name is malformed, not in a later reader
        return leaf
    except (OSError, *MALFORMED):
        return None


def pauses(place: Place, directory_url: str) -> list[str]:
    """A line for each refusal of that CA that delays more than one hostname."""
    return [
        f"{f'New hostnames of {domain}' if domain else 'All orders'} wait until {utc(until)}: "
        f"{one_line(why)}"
        for domain, until, why in _reader(place, directory_url)[2].waits()
    ]


def utc(instant: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(instant))


def _reader(place: Place, directory_url: str) -> tuple[ReadOnly, CertStore, OrderQueue]:
    """What is kept of one CA, read-only. The queue computes the same states as that of a
    gateway."""
    storage = ReadOnly(place.storage)
    store = CertStore(storage, storage, directory_url)
    queue = OrderQueue(store)
    queue.restore()
    return storage, store, queue


def ordered_rows(place: Place, directory_url: str) -> list[Row]:
    """The certificates from the CA with that directory. Raises StoreError if they cannot be
    listed."""
    rows: list[Row] = []
    storage, store, queue = _reader(place, directory_url)
    for name in store.known():
        try:
            state = queue.want(name)
        except ValueError as error:
            rows.append(Row(name, ORDERED, error=str(error)))
            continue
        stored, key = queue.certificate(name), store.key(name, ".pem")
        flaw = f"{storage.where(key)}: {storage.broken[key]}" if key in storage.broken else ""
        rows.append(Row(
            name, GO if stored and stored.is_left_by_go else ORDERED,
            issuer_of(stored.leaf) if stored else "", state.ends_at, state.next_at,
            flaw or state.reason))  # fmt: skip
    return rows


def issuer_of(leaf: x509.Certificate) -> str:
    """The issuer of a certificate: its common name, else its whole name."""
    names = leaf.issuer.get_attributes_for_oid(x509.NameOID.COMMON_NAME)
    return one_line(names[0].value if names else leaf.issuer.rfc4514_string())


def table(rows: list[Row], now: float) -> str:
    """The rows under headings; below a row, indented, its last error or the reason why it waits."""
    cells = [HEADINGS, *(_cells(row, now) for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells)]
    lines = ["  ".join(map(str.ljust, line, widths)).rstrip() for line in cells]
    errors = ["", *(row.error and f"\n    {_what(row)}{one_line(row.error)}" for row in rows)]
    return "\n".join(map(str.__add__, lines, errors))


def _what(row: Row) -> str:
    return "" if row.error.startswith(WAITS) else "last error: "


def _cells(row: Row, now: float) -> tuple[str, ...]:
    left = renewal = "-"
    if row.ends_at is not None:
        left = str(int((row.ends_at - now) // DAY)) if row.ends_at > now else "expired"
    if row.renew_at is not None:
        renewal = time.strftime("%Y-%m-%d %H:%M", time.gmtime(row.renew_at))
        renewal = "due" if row.renew_at <= now else renewal
    return row.name, row.source, row.issuer or "-", left, renewal


def ask_renewal(config: Config, name: str) -> str:
    """Leave a request for the gateway that runs; return a sentence that says so.

    Raises StoreError if the name has no certificate that was ordered.
    """
    name = normal_hostname(name)
    with opened(config) as place:
        return _ask(config, place, name)


def _ask(config: Config, place: Place, name: str) -> str:
    rows = _rows(config, place)
    known = {row.name for row in rows if row.source in (ORDERED, GO)}
    if config.acme is None or name not in known:
        why = next((f"its certificate is from {row.source}" for row in rows if row.name == name),
                   "there is no certificate of that name")  # fmt: skip
        raise StoreError(
            f"{name!r}: {why}, expected one that was ordered: see gotunnel-server certificates"
        )
    if place.remark:
        raise StoreError(f"{place.remark}, and nothing can be asked for until Redis is back")
    if config.cluster is not None:
        CertStore(place.storage, place.locker, config.acme.directory).ask_renewal(name)
        return f"{name}: one of the running gateways renews it within seconds, and logs the result"
    certs = config.acme_cache / ca_id(config.acme.directory) / "certs"
    if not certs.is_dir():  # we must not make it: the gateway may run as another user
        raise StoreError(f"{certs} does not exist: start the gateway once, which makes it")
    open_store(config.acme_cache, config.acme.directory).ask_renewal(name)
    return f"{name}: the running gateway renews it within seconds, and logs the result"


def one_line(words: object) -> str:
    """A text as one line of printable ASCII, for any terminal."""
    return words_and_link(re.sub(r"[^\x20-\x7e]", " ", str(words)))
