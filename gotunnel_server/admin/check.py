"""What an operator asks before the gateway runs, or while it does: `check` and `certificates`.

    check           a Finding for each thing that a gateway needs: ok, warn or fail
    certificates    a Row for each certificate that there is, or should be

Both look and change nothing: no order, no account, no folder; `check` writes a probe into each
folder that has to be writable, and removes it. What a running gateway keeps in ACME_CACHE is read
as it stands, so these may run beside it. Only `certificates --renew` leaves something: a request,
which a running gateway takes up.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import re
import resource
import socket
import ssl
import stat
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterable
from datetime import datetime, timezone
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import NamedTuple

from cryptography import x509

from gotunnel import ACK, MAX_UINT32, PING, SYN, Header
from gotunnel_agent.common.hostnames import valid_hostname

from ..agents import agents_file
from ..certs.cert_dir import CertDir
from ..certs.folder import FolderStorage, open_store
from ..certs.issuer import Issuer
from ..certs.local_ca import FOLDER as LOCAL_FOLDER
from ..certs.local_ca import RENEW_BEFORE, CertificateError, read_pair
from ..certs.schedule import CLOCK_OFF, CLOCK_WRONG, DAY
from ..certs.storage import ReadOnly
from ..certs.store import PROBE_BYTES, CertStore, StoreError, ca_id
from ..gateway import VISITORS_SHARE
from ..net import safe_read
from ..net.dns import is_always_here, is_own, own_addresses, resolve
from ..net.listener import PortError, bind
from ..net.safe_read import MALFORMED

OK, WARN, FAIL = "ok", "warn", "fail"
COLOURS = {OK: "32", WARN: "33", FAIL: "31"}  # green, yellow, red, as terminals number them

# Seconds for each silence, and for the whole answer. A person waits for us; a CA answers in one.
NETWORK_TIMEOUT, PATIENCE = 10.0, 15.0
MOST_BYTES = 64 * 1024  # of an answer; a CA's directory has about one KiB, a gateway's ping less
# Seconds for a gateway on this machine to show that it is one.
PROBE_TIMEOUT = 2.0
# What a CA's directory must name for an order (RFC 8555 §7.1.1).
RESOURCES = ("newNonce", "newAccount", "newOrder")
# Nobody's name (RFC 6761 §6.4), so a gateway answers with an error of its own.
NOBODY = "check.invalid"

OWN, ORDERED, GO, LOCAL = "CERT_DIR", "ACME", "ACME (left by the Go program)", "local CA"


class Finding(NamedTuple):
    """What came of a check. ``text`` says what was seen, and unless ``level`` is OK what to do."""

    level: str
    subject: str
    text: str


class Row(NamedTuple):
    """A certificate, or the lack of one. Instants are seconds since 1970, None for unknown."""

    name: str
    source: str
    issuer: str = ""
    ends_at: float | None = None
    renew_at: float | None = None
    error: str = ""


# check -------------------------------------------------------------------------------------------


def run_check(config, out) -> int:
    """Print what is found, as it is found; the exit status: 1 if anything failed."""
    failed = 0
    for finding in examine(config):
        failed += finding.level == FAIL
        print(finding_line(finding, colour=out.isatty()), file=out, flush=True)
    return 1 if failed else 0


def finding_line(finding, *, colour) -> str:
    level = f"{finding.level:4}"
    if colour:
        level = f"\x1b[{COLOURS[finding.level]}m{level}\x1b[0m"
    return f"{level}  {finding.subject}: {finding.text}"


def examine(config) -> Iterable[Finding]:
    """All checks, for the Config of config.load()."""
    yield Finding(OK, "configuration", "read and understood")
    if config.agents_file is not None:
        yield from look_at_agents(config.agents_file)
    for warning in config.warnings:
        yield Finding(WARN, "configuration", warning)
    yield look_at_descriptors(config.max_connections)
    for setting, port, tls_name in (
        ("GATEWAY_PORT", config.gateway_port, config.gateway_host),
        ("TUNNEL_PORT", config.tunnel_port, config.tunnel_host),
        ("DASHBOARD_PORT", config.dashboard_port, None),
        ("HTTP_PORT", config.http_port, None),
    ):
        yield look_at_port(setting, config.bind, port, tls_name)
    yield look_at_name("GATEWAY_HOST", config.gateway_host)
    if config.tunnel_host != config.gateway_host:
        yield look_at_name("TUNNEL_HOST", config.tunnel_host)
    yield from look_at_cache(config)
    yield from look_at_pairs(config.cert_dir)
    yield from look_at_own_names(config)
    if config.acme is None:
        yield Finding(OK, "directory", "not used, nothing is ordered")
    else:
        yield from look_at_directory(config.acme.directory, config.acme.ca_file)


def look_at_agents(path) -> Iterable[Finding]:
    try:
        agents = agents_file.read(path)
    except agents_file.AgentsFileError as error:
        yield Finding(FAIL, "AGENTS_FILE", str(error).removeprefix("AGENTS_FILE "))
        return
    yield Finding(OK, "AGENTS_FILE", f"{path}, agents in it: {len(agents.entries)}")
    for warning in agents.warnings:
        yield Finding(WARN, "AGENTS_FILE", warning.removeprefix("AGENTS_FILE").lstrip(": "))


def look_at_descriptors(max_connections) -> Finding:
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)  # the gateway raises its own to this
    most = MAX_UINT32 if most == resource.RLIM_INFINITY else most
    visitors = int(most * VISITORS_SHARE)
    if visitors >= max_connections:
        return Finding(OK, "MAX_CONNECTIONS", f"{max_connections}, descriptors suffice")
    return Finding(
        WARN, "MAX_CONNECTIONS",
        f"{max_connections}, but of {most} descriptors only {visitors} are for visitors: raise "
        "the limit (ulimit -n)")  # fmt: skip


# Ports


def look_at_port(setting, addresses, port, tls_name) -> Finding:
    """Whether a port (0: any, None: off) can be listened on; a gateway that has it is a warning.

    ``tls_name`` is the name that it answers to by TLS, None on a port without.
    """
    if port is None:
        return Finding(OK, setting, "off")
    if port == 0:
        return Finding(OK, setting, "any free port")
    try:
        for sock in bind(setting, addresses, port):
            sock.close()
    except PortError as error:
        address = addresses[0] if addresses else "127.0.0.1"
        tunnel = setting == "TUNNEL_PORT"
        if is_own(address) and _is_gotunnel(address, port, tls_name, tunnel=tunnel):
            return Finding(
                WARN, setting,
                f"{port} is in use, by a gotunnel gateway that runs: stop that one before you "
                "start another")  # fmt: skip
        return Finding(FAIL, setting, str(error).removeprefix(f"{setting} "))
    return Finding(OK, setting, f"{port} is free")


def _is_gotunnel(address, port, tls_name, *, tunnel) -> bool:
    """Whether what listens there answers as a gateway: to a ping of the multiplexer, or to a
    request by a name that it does not know."""
    question, expected = (
        (Header(PING, SYN, 0, 1).encode(), Header(PING, ACK, 0, 1).encode())
        if tunnel else
        (f"GET / HTTP/1.1\r\nHost: {NOBODY}\r\nConnection: close\r\n\r\n".encode(),
         b"\r\nx-gotunnel-error:")
    )  # fmt: skip
    answer, deadline = b"", time.monotonic() + PROBE_TIMEOUT
    try:
        with contextlib.ExitStack() as open_ones:
            sock = socket.create_connection((address, port), PROBE_TIMEOUT)
            open_ones.callback(sock.close)
            if tls_name is not None:
                sni = tls_name if valid_hostname(tls_name) else None
                sock = _trusting_anybody().wrap_socket(sock, server_hostname=sni)
                open_ones.callback(sock.close)
            sock.sendall(question)
            while len(answer) < MOST_BYTES and time.monotonic() < deadline:
                data = sock.recv(4096)
                answer += data.lower()
                if expected in answer:
                    return True
                if not data:
                    break
    except ssl.SSLError as error:  # a gateway without a certificate for the name, most likely
        return error.reason == "TLSV1_UNRECOGNIZED_NAME"
    except OSError:  # it speaks something else, or nothing
        pass
    return False


def _trusting_anybody() -> ssl.SSLContext:
    """We say nothing that is secret, and only ask who is there."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    return context


# Names


def look_at_name(setting, name) -> Finding:
    """Whether a hostname, or an IP address, leads to this machine."""
    if is_always_here(name):
        return Finding(OK, setting, f"{name} is always this machine (RFC 6761)")
    try:
        addresses = resolve(name)
    except OSError as error:
        return Finding(
            FAIL, setting,
            f"{name} does not resolve ({error}): point its A or AAAA record at this machine",
        )
    return judge_addresses(
        setting, name, addresses, [a for a in addresses if is_own(a)], own_addresses()
    )


def judge_addresses(setting, name, addresses, ours, machine) -> Finding:
    """``addresses`` are the name's, ``ours`` those of them that this machine has, ``machine`` what
    else to call it by."""
    if ours == addresses:
        return Finding(OK, setting, f"{name} is this machine ({', '.join(addresses)})")
    seen = "" if addresses == [name] else f"{name} is {', '.join(addresses)}; "
    others = ", ".join(address for address in addresses if address not in ours)
    return Finding(
        WARN, setting,
        f"{seen}{others} is no address of this machine, which has "
        f"{', '.join(machine) or 'none'}: right if a router or provider passes that address on to "
        "it (NAT), else correct the DNS record")  # fmt: skip


# The cache


def look_at_cache(config) -> Iterable[Finding]:
    if config.acme is None and not config.local_ca:
        yield Finding(OK, "ACME_CACHE", "not used, CERT_DIR holds all certificates")
        return
    inner = config.acme_cache / (ca_id(config.acme.directory) if config.acme else LOCAL_FOLDER)
    folders = [config.acme_cache, inner, inner / "certs", inner / "locks"]
    try:
        there = [folder for folder in folders if folder.exists()]
    except PermissionError as error:
        yield Finding(FAIL, "ACME_CACHE", f"{error.filename}: {error.strerror}, run this as the "
                      "gateway's user")  # fmt: skip
        return
    if not there:
        parent = next(path for path in config.acme_cache.absolute().parents if path.exists())
        if os.access(parent, os.W_OK | os.X_OK):
            yield Finding(OK, "ACME_CACHE", f"{config.acme_cache} is not there, it will be made")
        else:
            yield Finding(FAIL, "ACME_CACHE", f"{config.acme_cache} is not there and cannot be "
                          f"made in {parent}: make it, owned by the gateway's user")  # fmt: skip
        return
    findings = [finding for folder in there for finding in look_at_folder("ACME_CACHE", folder)]
    ca = [inner / "ca.crt", inner / "ca.key"]
    if config.local_ca and any(file.exists() for file in ca):
        try:
            read_pair(*ca)
        except CertificateError as error:
            findings.append(Finding(FAIL, "ACME_CACHE", f"{error}; restore ca.crt and ca.key from "
                                    "a copy, or remove both to get a new CA"))  # fmt: skip
    yield from findings or [Finding(OK, "ACME_CACHE", f"{config.acme_cache} can be written")]


def look_at_folder(setting, folder: Path) -> Iterable[Finding]:
    """What is wrong with a folder that we have to write; nothing if it is fit."""
    try:
        with tempfile.NamedTemporaryFile(dir=folder, prefix=".check-", suffix=".tmp") as probe:
            probe.write(os.urandom(PROBE_BYTES))
            probe.flush()
        found = folder.stat()
    except OSError as error:
        yield Finding(FAIL, setting, f"{folder}: {error.strerror}, expected a folder that the "
                      "gateway can write: change its owner, make room, or name "
                      "another")  # fmt: skip
        return
    if found.st_uid != os.geteuid():
        yield Finding(WARN, setting, f"{folder} belongs to user {found.st_uid}, and this check "
                      f"runs as {os.geteuid()}: run it, and the gateway, as the owner")  # fmt: skip
    if found.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        yield Finding(WARN, setting, f"{folder} has mode {stat.S_IMODE(found.st_mode):04o}: others "
                      f"can put keys of theirs there; chmod go-w {folder}")  # fmt: skip


# CERT_DIR


def _read_pairs(folder: Path) -> CertDir:
    """CERT_DIR, read once. Raises CertificateError if it cannot be read."""
    return CertDir(folder, lambda: ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER))


def look_at_pairs(folder: Path | None) -> Iterable[Finding]:
    """Each pair in CERT_DIR: one that is no use fails, unless another serves its names."""
    if folder is None:
        yield Finding(OK, "CERT_DIR", "not used")
        return
    try:
        cert_dir = _read_pairs(folder)
    except CertificateError as error:
        yield Finding(FAIL, "CERT_DIR", str(error))
        return
    now = datetime.now(timezone.utc)
    for pair in sorted(cert_dir.report.pairs):
        file = os.path.relpath(pair.certificate_file, folder)
        names = ", ".join(sorted(pair.names))
        if pair.begins <= now < pair.ends:
            days = (pair.ends - now).days
            yield Finding(OK, "CERT_DIR", f"{file}: {names}, {days} days left")
            continue
        dates = (f"ran out on {pair.ends:%Y-%m-%d}: put a renewed one in its place"
                 if pair.ends <= now else
                 f"is valid from {pair.begins:%Y-%m-%d} on: if that has passed, set this machine's"
                 " clock")  # fmt: skip
        others = all(covers(cert_dir.served.valid, name) for name in pair.names)
        yield Finding(WARN if others else FAIL, "CERT_DIR", f"{file}: {names} {dates}"
                      + "; another pair serves these names now" * others)  # fmt: skip
    yield from (Finding(FAIL, "CERT_DIR", remark) for remark in cert_dir.report.broken)
    yield from (Finding(WARN, "CERT_DIR", remark) for remark in cert_dir.report.remarks)


def covers(names, hostname) -> bool:
    """Whether a hostname is among names, or falls under a wildcard there (RFC 9525 §6.3)."""
    return hostname in names or "*." + hostname.partition(".")[2] in names


def look_at_own_names(config) -> Iterable[Finding]:
    """Whether the gateway's own names have a certificate, or can get one."""
    given = {}
    if config.cert_dir is not None:
        with contextlib.suppress(CertificateError):  # that was said before
            given = _read_pairs(config.cert_dir).served.valid
    failed = {}
    if config.acme is not None:
        with contextlib.suppress(StoreError):  # that was said before, too
            failed = {row.name: row.error
                      for row in ordered_rows(config.acme_cache, config.acme.directory)
                      if row.ends_at is None and row.error}  # fmt: skip
    for name in dict.fromkeys((config.gateway_host, config.tunnel_host)):
        if covers(given, name):
            yield Finding(OK, "certificates", f"{name}: in CERT_DIR")
        elif config.local_ca:
            yield Finding(OK, "certificates", f"{name}: by a local CA, for trials")
        elif name in failed:
            yield Finding(WARN, "certificates", f"{name}: no certificate yet: {failed[name]}")
        elif config.acme and valid_hostname(name):
            yield Finding(OK, "certificates", f"{name}: ordered from {config.acme.directory}")
        elif config.acme:
            yield Finding(FAIL, "certificates", f"{name}: no CA certifies an IP address here: set "
                          "a hostname, or put its certificate into CERT_DIR")  # fmt: skip
        else:
            yield Finding(FAIL, "certificates", f"{name}: CERT_DIR holds no valid one: add it, or "
                          "set ACME_ENV=production to order one")  # fmt: skip


# The CA


def look_at_directory(url, ca_file, clock=time.time) -> Iterable[Finding]:
    """Whether a CA answers and speaks ACME, and whether our clock agrees with its."""
    try:
        status, date, body = _get(url, ca_file)
    except (OSError, http.client.HTTPException, ValueError) as error:
        reason = getattr(error, "reason", None) or error
        hint = (
            "is its root in ACME_CA_FILE?" if isinstance(reason, ssl.SSLCertVerificationError)
            else "check ACME_DIRECTORY, and this machine's way out (DNS, firewall)"
        )  # fmt: skip
        words = _one_line(getattr(reason, "strerror", None) or reason)
        yield Finding(FAIL, "directory", f"{url}: {words}; {hint}")
        return
    if status == 200 and _is_directory(body):
        yield Finding(OK, "directory", f"{url} speaks ACME")
    else:
        words = _one_line(body[:80].decode("latin-1")) or "nothing"
        yield Finding(FAIL, "directory", f"{url}: status {status} and {words!r}, expected 200 and "
                      "an ACME directory: correct ACME_DIRECTORY, or wait if the CA is "
                      "down")  # fmt: skip
    yield judge_clock(date, clock())


def _get(url, ca_file) -> tuple[int, str | None, bytes]:
    """Status, Date and the beginning of the body."""
    context = ssl.create_default_context(cafile=ca_file)
    deadline = time.monotonic() + PATIENCE
    request = urllib.request.Request(url, headers={"User-Agent": "gotunnel"})
    try:
        answer = urllib.request.urlopen(request, timeout=NETWORK_TIMEOUT, context=context)
    except urllib.error.HTTPError as refusal:
        answer = refusal
    with answer:
        body = b""
        while len(body) < MOST_BYTES and (data := answer.read1(MOST_BYTES)):
            body += data
            if time.monotonic() > deadline:
                raise TimeoutError(f"no whole answer within {PATIENCE:.0f} s")
        return answer.status, answer.headers["Date"], body


def _is_directory(body) -> bool:
    try:
        directory = json.loads(body)
    except (ValueError, RecursionError):
        return False
    return isinstance(directory, dict) and all(
        isinstance(directory.get(name), str) for name in RESOURCES
    )


def judge_clock(date: str | None, now) -> Finding:
    """Our clock beside the Date of an answer that has just come."""
    try:
        off = now - parsedate_to_datetime(date).timestamp()
    except (ValueError, TypeError, AttributeError, OverflowError):
        return Finding(OK, "clock", "not known, the CA does not say what time it is")
    if abs(off) <= CLOCK_OFF:
        return Finding(OK, "clock", "agrees with the CA's")
    side = "ahead of" if off > 0 else "behind"
    level, so = (FAIL, ", nothing is ordered before") if abs(off) > CLOCK_WRONG else (WARN, "")
    return Finding(
        level, "clock", f"{abs(off):.0f} s {side} the CA's: set this machine's clock{so}"
    )


def _one_line(words) -> str:
    return " ".join(re.sub(r"[^\x20-\x7e]", " ", str(words)).split())


# certificates ------------------------------------------------------------------------------------

HEADINGS = ("NAME", "FROM", "ISSUER", "DAYS LEFT", "NEXT RENEWAL (UTC)")


def run_certificates(config, out) -> int:
    """Print the table; the exit status. Raises CertificateError if CERT_DIR cannot be read."""
    print(table(find_rows(config), time.time()), file=out)
    return 0


def find_rows(config) -> list[Row]:
    """What there is, sorted by name. Raises CertificateError if a folder cannot be read."""
    rows = []
    if config.cert_dir is not None:
        rows += own_rows(config.cert_dir)
    try:
        if config.local_ca:
            rows += local_rows(config.acme_cache / LOCAL_FOLDER)
        if config.acme is not None:
            rows += ordered_rows(config.acme_cache, config.acme.directory)
    except PermissionError as error:
        raise CertificateError(
            f"{error.filename}: {error.strerror}, run this as the gateway's user") from error
    except StoreError as error:
        raise CertificateError(f"{error}, run this as the gateway's user") from error
    return sorted(rows, key=lambda row: (row.name, row.source))


def own_rows(folder: Path) -> list[Row]:
    report = _read_pairs(folder).report
    rows = [Row("-", OWN, error=remark) for remark in report.broken]
    for pair in report.pairs:
        leaf = _leaf(pair.certificate_file)
        issuer = issuer_of(leaf) if leaf else ""
        rows += [Row(name, OWN, issuer, pair.ends.timestamp()) for name in pair.names]
    return rows


def local_rows(folder: Path) -> list[Row]:
    rows = []
    with contextlib.suppress(FileNotFoundError):
        os.listdir(folder)  # glob() may keep to itself that it must not
    for file in folder.glob("*.crt"):
        if file.name == "ca.crt":
            continue
        leaf = _leaf(file)
        if leaf is None:
            rows.append(Row(file.stem, LOCAL, error=f"{file}: cannot be read as PEM; made anew "
                            "when the gateway needs it"))  # fmt: skip
            continue
        ends_at = leaf.not_valid_after_utc.timestamp()
        renew_at = ends_at - RENEW_BEFORE.total_seconds()
        rows.append(Row(file.stem, LOCAL, issuer_of(leaf), ends_at, renew_at))
    return rows


def _leaf(file: Path) -> x509.Certificate | None:
    """The first certificate in a file, None if it cannot be read."""
    try:
        leaf = x509.load_pem_x509_certificates(safe_read.read(file))[0]
        issuer_of(leaf)  # a name that makes no sense shows only now
        return leaf
    except (OSError, *MALFORMED):
        return None


def ordered_rows(folder: Path, directory_url) -> list[Row]:
    """Of the CA with that directory, as ACME_CACHE has them. Raises StoreError if it cannot be
    listed."""
    storage, rows = ReadOnly(FolderStorage(folder)), []
    store = CertStore(storage, storage, directory_url)
    # One that is not started judges as the gateway's would, and orders nothing.
    issuer = Issuer(ca=None, store=store, challenges=None, on_change=None)
    for name in store.known():
        try:
            state = issuer.want(name)
        except ValueError as error:
            rows.append(Row(name, ORDERED, error=str(error)))
            continue
        stored, key = issuer.certificate(name), store.key(name, ".pem")
        flaw = f"{storage.where(key)}: {storage.broken[key]}" if key in storage.broken else ""
        rows.append(Row(
            name, GO if stored and stored.is_left_by_go else ORDERED,
            issuer_of(stored.leaf) if stored else "", state.ends_at, state.next_at,
            flaw or state.reason))  # fmt: skip
    return rows


def issuer_of(leaf: x509.Certificate) -> str:
    """Who signed a certificate, in few words: common name, else all of the name."""
    names = leaf.issuer.get_attributes_for_oid(x509.NameOID.COMMON_NAME)
    return _one_line(names[0].value if names else leaf.issuer.rfc4514_string())


def table(rows: list[Row], now) -> str:
    """The rows under headings; below a row, indented, the last error if there is one."""
    if not rows:
        return "There is no certificate yet; a gateway gets its own when it starts."
    cells = [HEADINGS, *(_cells(row, now) for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells)]
    lines = ["  ".join(map(str.ljust, line, widths)).rstrip() for line in cells]
    errors = ["", *(row.error and f"\n    last error: {_one_line(row.error)}" for row in rows)]
    return "\n".join(map(str.__add__, lines, errors))


def _cells(row, now) -> tuple[str, ...]:
    left = renewal = "-"
    if row.ends_at is not None:
        left = str(int((row.ends_at - now) // DAY)) if row.ends_at > now else "ran out"
    if row.renew_at is not None:
        renewal = time.strftime("%Y-%m-%d %H:%M", time.gmtime(row.renew_at))
        renewal = "due" if row.renew_at <= now else renewal
    return row.name, row.source, row.issuer or "-", left, renewal


def ask_renewal(config, name) -> str:
    """Leave a request for a gateway that runs; a sentence that says so.

    Raises StoreError if the name has nothing that could be renewed so.
    """
    name = name.lower().removesuffix(".")
    rows = find_rows(config)
    known = {row.name for row in rows if row.source in (ORDERED, GO)}
    if name not in known:
        why = next((f"its certificate is from {row.source}" for row in rows if row.name == name),
                   "there is no certificate of that name")  # fmt: skip
        raise StoreError(
            f"{name!r}: {why}, expected one that was ordered: see gotunnel-server certificates"
        )
    certs = config.acme_cache / ca_id(config.acme.directory) / "certs"
    if not certs.is_dir():  # made by us, it would be ours, and the gateway may be another user
        raise StoreError(f"{certs} is not there yet, expected a gateway that has run: start it")
    open_store(config.acme_cache, config.acme.directory).ask_renewal(name)
    return f"{name}: a gateway that runs here renews it within seconds, and says so in its log"
