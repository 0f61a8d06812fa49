"""Reads, checks and changes AGENTS_FILE: agents with credentials of their own.

The file is a YAML mapping of names to entries. A name is the issuer (``iss``) in the agent's
tokens, an entry is a mapping with the keys in ``KEYS``; ``conf/agents.yaml`` explains them to the
operator. Every value is taken as the text that was typed.

People and ``gotunnel-server agents`` write the file while a gateway may read it. So that command
leaves all other lines as they are, checks its change by reading the result, holds a lock on the
folder, and replaces the file in one step (rename). An empty file is refused: most likely another
program has just begun to write it.

Every problem is an ``AgentsFileError``, one line that never shows a secret: the file, the place in
it, what came and what was expected.
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import json
import os
import re
import stat
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import yaml

from gotunnel_agent.common import atomic_file, strict_yaml
from gotunnel_agent.common.exposed import exposures, shown_path
from gotunnel_agent.common.strict_yaml import BOOLEANS, YamlError, kind

from . import scope
from .secret import secret_weakness

UNTIL = "old_secret_until"
KEYS = ("secret", "secret_file", UNTIL, "hosts", "ports", "limits", "expires", "disabled")
MOST_SECRETS = 2  # of an entry: the one that signs, and the one before
LIMIT_KEYS = ("hostnames", "streams", "visits", "orders_per_hour", "orders_per_week")

# A gateway reads the whole file whenever it changes; a small machine reads some 200 kB a second.
MAX_FILE = 512 * 1024  # bytes
MOST_AGENTS = 1000
MAX_SECRET_FILE = 64 * 1024  # bytes
MAX_NAME = 253  # characters of an issuer, which may be a hostname
MAX_LIMIT = 1_000_000  # more is a typing error
MAX_SHOWN = 100  # characters of a bad value in a message
# Some file systems store times in steps of two seconds. So a file that changed less than FRESH
# seconds ago may change again and keep its time.
FRESH = 2.0

DATE = re.compile(
    r"\d{4}-\d\d-\d\d(?P<time>[T ]\d\d:\d\d(:\d\d)?(Z|[+-]\d\d:\d\d)?)?", re.IGNORECASE | re.ASCII
)
DATE_EXPECTED = "a date such as 2030-12-31 or a time such as 2030-12-31T18:00:00Z"


Keys = Mapping[str, Any]  # an entry as it was read, or its limits
Scope = TypeVar("Scope")


class AgentsFileError(Exception):
    """AGENTS_FILE cannot be used, or not be changed like this; the text is one line."""


class Limits(NamedTuple):
    """How much an agent may have at once; None: no limit of its own. Orders are of certificates for
    hostnames that have none."""

    hostnames: int | None = None
    streams: int | None = None
    visits: int | None = None
    orders_per_hour: int | None = None
    orders_per_week: int | None = None


@dataclass(frozen=True)
class Entry:
    """One agent's credential, checked and complete. ``secret`` signs tokens; ``old_secret`` is
    accepted as well until ``old_until`` (wall-clock seconds; None: until it is removed), "" for
    none."""

    secret: str = field(repr=False)
    hosts: tuple[str, ...]  # patterns, as in scope.py
    ports: tuple[range, ...] = ()
    limits: Limits = Limits()
    expires: float | None = None  # wall-clock seconds since 1970; None: never
    disabled: bool = False
    old_secret: str = field(default="", repr=False)
    old_until: float | None = None

    def accepted(self, now: float) -> tuple[str, ...]:
        """The secrets that a token may be signed with at ``now`` (wall-clock seconds)."""
        over = self.old_until is not None and self.old_until <= now
        return (self.secret,) if over or not self.old_secret else (self.secret, self.old_secret)


class Stamp(NamedTuple):
    """Differs when a file has changed; all zeros if there is no file."""

    changed: int  # ctime in nanoseconds; unlike mtime it shows a chmod, or a file that was moved in
    size: int
    inode: int


Stamps = tuple[Stamp, ...]


class Agents(NamedTuple):
    """The content of the file."""

    entries: Mapping[str, Entry]  # by name
    files: tuple[Path, ...]  # the files that were read: this one, and those with secrets
    warnings: tuple[str, ...]  # lines for the log


def read(path: Path) -> Agents:
    """Read and check the file. Raises AgentsFileError at the first problem."""
    with _named(path):
        try:
            os.lstat(path)
        except FileNotFoundError:
            raise AgentsFileError(
                "there is no such file, expected one with agents: make it with: gotunnel-server "
                "agents add NAME --hosts app.example.com"
            ) from None
        except OSError:
            pass  # as of a folder that may not be searched: _text() says why
        return _agents(_text(path, MAX_FILE), path)


def stamps(files: tuple[Path, ...]) -> Stamps:
    """The stamps of files. They are not read for it."""
    return tuple(map(_stamp, files))


def are_settled(stamps: Stamps, now: float) -> bool:
    """Whether any later change gives files with these stamps other stamps: they did not change in
    the last FRESH seconds before ``now`` (wall clock)."""
    return all(stamp.changed < (now - FRESH) * 1e9 for stamp in stamps)


def add(path: Path, name: str, block: str) -> bool:
    """Append an entry to the file; False if the name is there already. The file need not exist.
    ``block`` is the entry's text with its name. Raises AgentsFileError."""
    with _changing(path) as (text, entries):
        if name in entries:
            return False
        before = text if entries else _without_lines(text, _root_lines(text))  # a {}, if any
        new = f"{before.rstrip()}\n\n{block}" if before.strip() else block
        _replace(path, new, lambda found: name in found and _without(found, name) == entries)
    return True


def remove(path: Path, name: str) -> bool:
    """Cut an entry out of the file; False if it is not there. Raises AgentsFileError."""
    with _changing(path) as (text, entries):
        if name not in entries:
            return False
        new = _without_lines(text, _entry_lines(text, name))
        if len(entries) == 1:
            # {} is no agent at all; an empty file would be taken for one that is being written.
            new = f"{new.rstrip()}\n\n{{}}\n".lstrip()
        _replace(path, new, lambda found: found == _without(entries, name))
    return True


def rotate(path: Path, name: str, secret: str, until: str | None) -> bool:
    """Put a new secret before the one that an entry has, which stays, ``until`` a date or time if
    there is one. False if the entry is not there. Raises AgentsFileError."""

    def change(text: str, entry: Entry) -> str:
        if entry.old_secret:
            raise AgentsFileError(
                f"{name} has two secrets already: end that with: agents rotate --finish {name}"
            )
        end = f'"{until}"' if until else None
        return _with_secrets(text, name, [secret, entry.secret], end)

    return _change_secrets(path, name, change, secret=secret, until=until)


def finish_rotation(path: Path, name: str) -> bool:
    """Remove the older one of an entry's two secrets. False if the entry is not there. Raises
    AgentsFileError."""

    def change(text: str, entry: Entry) -> str:
        if not entry.old_secret:
            raise AgentsFileError(f"{name} has one secret, expected two: see agents rotate {name}")
        return _with_secrets(text, name, [entry.secret], None)

    return _change_secrets(path, name, change)


def _change_secrets(
    path: Path,
    name: str,
    change: Callable[[str, Entry], str],
    secret: str | None = None,
    until: str | None = None,
) -> bool:
    """Rewrite an entry's secrets. Its new ones are ``secret`` and the one that it had, or without
    ``secret`` the first of its two."""
    with _changing(path) as (text, entries):
        if name not in entries:
            return False
        was = entries[name]
        meant = replace(was, old_secret="", old_until=None)
        if secret is not None:
            end = None if until is None else read_expires(until)
            meant = replace(was, secret=secret, old_secret=was.secret, old_until=end)
        _replace(path, change(text, was), lambda found: found == {**entries, name: meant})
    return True


# --- Files ---------------------------------------------------------------------------------------


@contextlib.contextmanager
def _named(path: Path) -> Iterator[None]:
    """Add to errors which file they are about."""
    try:
        yield
    except AgentsFileError as error:
        raise AgentsFileError(f"AGENTS_FILE {path}: {error}") from None


def _open(path: str, flags: int) -> int:
    # Without O_NONBLOCK, opening a FIFO would wait for its writer.
    return os.open(path, flags | os.O_NONBLOCK)


def _text(path: Path, limit: int) -> str:
    """The text of a small file, without the byte order mark that some editors put first."""
    try:
        with open(path, "rb", opener=_open) as file:
            content = file.read(limit + 1) or b""
    except OSError as error:
        raise AgentsFileError(
            f"cannot be read ({error.strerror}), expected a file that the gateway can read"
        ) from None
    if len(content) > limit:
        raise AgentsFileError(f"is too long, expected at most {limit} bytes")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise AgentsFileError(f"byte {error.start} is not UTF-8, expected UTF-8 text") from None


def _stamp(path: Path) -> Stamp:
    try:
        found = os.stat(path)
    except OSError:
        return Stamp(0, 0, 0)
    return Stamp(found.st_ctime_ns, found.st_size, found.st_ino)


@contextlib.contextmanager
def _changing(path: Path) -> Iterator[tuple[str, Mapping[str, Entry]]]:
    """The file's text and entries, both empty if there is no file. No other process that uses
    this can change the file meanwhile."""
    with _named(path):
        try:
            folder = os.open(Path(os.path.realpath(path)).parent, os.O_RDONLY)
        except OSError as error:
            raise AgentsFileError(
                f"its folder cannot be opened ({error.strerror}), expected one that exists"
            ) from None
        try:
            try:
                fcntl.flock(folder, fcntl.LOCK_EX)
            except OSError as error:  # some network drives have no locks
                raise AgentsFileError(
                    f"its folder cannot be locked ({error.strerror}), so another command could "
                    "change it meanwhile: put it on another file system, or edit it by hand"
                ) from None
            if os.path.lexists(path):
                text = _text(path, MAX_FILE)
                yield text, ({} if _parse(text) is None else _agents(text, path).entries)
            else:
                yield "", {}
        finally:
            os.close(folder)  # unlocks as well, as does the end of the process


def _without(entries: Mapping[str, Entry], name: str) -> dict[str, Entry]:
    return {other: entry for other, entry in entries.items() if other != name}


def _replace(path: Path, text: str, is_right: Callable[[Mapping[str, Entry]], bool]) -> None:
    """Replace the file's text, all of it or nothing. ``is_right(entries)`` checks the entries of
    the new text: nothing else must have changed.

    The caller holds the lock, so the new file can always have the same name. If the process is
    killed here, the next change overwrites what it left.
    """
    if len(text.encode()) > MAX_FILE:
        raise AgentsFileError(f"would be too long, expected at most {MAX_FILE} bytes")
    try:
        fits = is_right(_agents(text, path).entries)
    except AgentsFileError:
        fits = False
    if not fits:
        raise AgentsFileError(
            "this program can only change a file whose entries begin in the first column, each on "
            "lines of its own: change it by hand"
        )
    path = Path(os.path.realpath(path))  # replace a symbolic link's target, not the link
    new = path.with_name(f".{path.name}.new")
    keep_owner = functools.partial(_keep_owner, path)
    try:
        atomic_file.write(path, text.encode(), new=new, prepare=keep_owner)
    except OSError as error:
        raise AgentsFileError(
            f"cannot be written ({error.strerror}), expected a file and a folder that you may write"
        ) from None


def _keep_owner(path: Path, descriptor: int) -> None:
    """Give a new file the owner and mode of the old one, so that a gateway of another user can read
    it. A mode that is open to all users is not kept, as the file holds secrets."""
    if not path.exists():
        return
    old, new = path.stat(), os.fstat(descriptor)
    if (old.st_uid, old.st_gid) != (new.st_uid, new.st_gid):
        os.fchown(descriptor, old.st_uid, old.st_gid)
    if not old.st_mode & stat.S_IRWXO:
        os.fchmod(descriptor, stat.S_IMODE(old.st_mode) & 0o640)


# --- YAML ----------------------------------------------------------------------------------------


def _parse(text: str, read: Callable[[str], Any] = strict_yaml.load) -> Any:
    """The document in ``text``: mappings, lists, text and None; with strict_yaml.compose its
    nodes."""
    try:
        return read(text)
    except YamlError as error:
        raise AgentsFileError(str(error)) from None
    except RecursionError:
        raise AgentsFileError("is nested too deeply, expected a mapping of names") from None


def _root_lines(text: str) -> tuple[int, int]:
    """The lines of the whole document: the first one, and the one behind the last, from 0."""
    root = _parse(text, strict_yaml.compose)
    if root is None:
        return 0, 0
    return root.start_mark.line, _last_line(root) + 1


def _entry_lines(text: str, name: str) -> tuple[int, int]:
    """The lines of an entry with the blank ones behind it, but without comments around it."""
    nodes = _parse(text, strict_yaml.compose).value
    key, value = next((key, value) for key, value in nodes if key.value == name)
    lines = text.splitlines()
    stop = _last_line(value) + 1
    while stop < len(lines) and not lines[stop].strip():
        stop += 1
    return key.start_mark.line, stop


def _with_secrets(text: str, name: str, secrets: list[str], until: str | None) -> str:
    """The text in which an entry has these secrets, and UNTIL if it is given."""
    nodes = _parse(text, strict_yaml.compose).value
    entry = next(value for key, value in nodes if key.value == name)
    pairs = {key.value: (key, value) for key, value in entry.value}
    if "secret" not in pairs:
        raise AgentsFileError(
            f"{name} has secret_file: make it a list of two files, the one with the new secret "
            "first, by hand"
        )
    new = json.dumps(secrets[0] if len(secrets) == 1 else secrets)
    key, value = pairs["secret"]
    if until is not None:
        indent = ", " if entry.flow_style else "\n" + " " * key.start_mark.column
        new += f"{indent}{UNTIL}: {until}"
    spans = [(value.start_mark.index, value.end_mark.index, new)]
    if UNTIL in pairs:  # with what parts it from the key before
        names = list(pairs)
        before = names[max(0, names.index(UNTIL) - 1)]
        spans.append((pairs[before][1].end_mark.index, pairs[UNTIL][1].end_mark.index, ""))
    for start, stop, piece in sorted(spans, reverse=True):
        text = text[:start] + piece + text[stop:]
    return text


def _last_line(node: yaml.Node) -> int:
    """The last line of a node. PyYAML has a block end where the next thing begins, behind comments
    and blank lines, so the last line of its last part is taken."""
    while isinstance(node, yaml.CollectionNode) and not node.flow_style and node.value:
        last = node.value[-1]
        node = last[1] if isinstance(last, tuple) else last
    mark = node.end_mark
    return mark.line if mark.column or mark.line == node.start_mark.line else mark.line - 1


def _without_lines(text: str, span: tuple[int, int]) -> str:
    lines = text.splitlines(keepends=True)
    del lines[slice(*span)]
    return "".join(lines)


# --- Entries -------------------------------------------------------------------------------------


def _agents(text: str, path: Path) -> Agents:
    document = _parse(text)
    if document is None:
        raise AgentsFileError("is empty, expected names with an entry each, or {} for no agents")
    if not isinstance(document, dict):
        raise AgentsFileError(f"{kind(document)} came, expected names with an entry each")
    if len(document) > MOST_AGENTS:
        raise AgentsFileError(f"{len(document)} entries came, expected at most {MOST_AGENTS}")
    entries: dict[str, Entry] = {}
    files = [path]
    warnings: list[str] = []
    for name, keys in document.items():
        if not name or len(name) > MAX_NAME or not name.isprintable():
            raise AgentsFileError(
                f"name {_shown(name)} came, expected 1 to {MAX_NAME} printable characters"
            )
        entries[name] = _entry(name, keys, path.parent, files)
        weaknesses = map(secret_weakness, filter(None, _secrets_of(entries[name])))
        weakness = next(filter(None, weaknesses), None)
        if weakness and not entries[name].disabled:
            warnings.append(
                f"AGENTS_FILE {path}: the secret of {name} {weakness}: an attacker who guesses it "
                "can take over its hostnames; use the output of: openssl rand -hex 32"
            )
    warnings += [f"AGENTS_FILE: {line}" for line in exposures(files)]
    return Agents(entries, tuple(files), tuple(warnings))


def _entry(name: str, keys: object, folder: Path, files: list[Path]) -> Entry:
    if not isinstance(keys, dict):
        raise AgentsFileError(f"{name}: {kind(keys)} came, expected a mapping with secret, hosts")
    _refuse_unknown_keys(keys, KEYS, name)
    if "hosts" not in keys:
        raise AgentsFileError(f"{name}.hosts: missing, expected {scope.HOSTS_EXPECTED}")
    secret, old_secret = _secrets(name, keys, folder, files)
    if UNTIL in keys and not old_secret:
        raise AgentsFileError(f"{name}: {UNTIL} came, expected two secrets with it")
    return Entry(
        secret=secret,
        old_secret=old_secret,
        old_until=_time(name, keys, UNTIL),
        hosts=_scope(name, keys, "hosts", scope.read_hosts),
        ports=_scope(name, keys, "ports", scope.read_ports) if "ports" in keys else (),
        limits=_limits(name, keys),
        expires=_time(name, keys, "expires"),
        disabled=_boolean(name, keys, "disabled"),
    )


def _refuse_unknown_keys(mapping: Keys, known: tuple[str, ...], where: str) -> None:
    if problem := strict_yaml.unknown_key(mapping, known):
        raise AgentsFileError(f"{where}: {problem}")


def _secrets_of(entry: Entry) -> tuple[str, str]:
    return entry.secret, entry.old_secret


def _secrets(name: str, keys: Keys, folder: Path, files: list[Path]) -> tuple[str, str]:
    """The secret that signs and the old one, "" for none; or the contents of their files, which are
    appended to ``files``."""
    given = [key for key in ("secret", "secret_file") if key in keys]
    if len(given) != 1:
        came = "both came" if given else "neither came"
        raise AgentsFileError(f"{name}: {came}, expected exactly one of secret and secret_file")
    (key,) = given
    values = keys[key]
    if not isinstance(values, list):
        return _secret(name, key, values, folder, files), ""
    if len(values) != MOST_SECRETS:
        raise AgentsFileError(
            f"{name}.{key}: a list came of {len(values)}, expected text, or a list of "
            f"{MOST_SECRETS}: the new one and the old one"
        )
    new, old = (_secret(name, key, value, folder, files) for value in values)
    if new == old:
        raise AgentsFileError(f"{name}.{key}: both are the same, expected a new one and an old one")
    return new, old


def _secret(name: str, key: str, value: object, folder: Path, files: list[Path]) -> str:
    if not isinstance(value, str):
        raise AgentsFileError(f"{name}.{key}: {kind(value)} came, expected text")
    if key == "secret_file":
        path = value
        if not value.isprintable():
            raise AgentsFileError(f"{name}.{key}: {_shown(value)} came, expected a file's path")
        files.append(folder / value)
        try:
            value = _text(files[-1], MAX_SECRET_FILE)
        except AgentsFileError as error:
            raise AgentsFileError(f"{name}.{key}: {shown_path(path)} {error}") from None
    value = value.rstrip("\r\n")  # a secret in an agent's configuration ends without them
    # A lone surrogate, which YAML's "\ud800" makes, cannot be encoded to sign with.
    if not value.strip() or re.search("[\ud800-\udfff]", value):
        raise AgentsFileError(
            f"{name}.{key}: no text came, expected a secret: the output of: openssl rand -hex 32"
        )
    return value


def _scope(name: str, keys: Keys, key: str, reader: Callable[[object], Scope]) -> Scope:
    try:
        return reader(keys[key])
    except scope.ScopeError as error:
        raise AgentsFileError(f"{name}.{key}: {error}") from None


def _limits(name: str, keys: Keys) -> Limits:
    limits = keys.get("limits", {})
    if not isinstance(limits, dict):
        raise AgentsFileError(
            f"{name}.limits: {kind(limits)} came, expected a mapping with {', '.join(LIMIT_KEYS)}"
        )
    _refuse_unknown_keys(limits, LIMIT_KEYS, f"{name}.limits")
    for key, text in limits.items():
        if not isinstance(text, str) or not re.fullmatch(r"[0-9]{1,7}", text):
            text = None
        if text is None or not 1 <= int(text) <= MAX_LIMIT:
            raise AgentsFileError(
                f"{name}.limits.{key}: {_shown(limits[key])} came, expected a whole number from 1 "
                f"to {MAX_LIMIT}"
            )
    return Limits(**{key: int(text) for key, text in limits.items()})


def _time(name: str, keys: Keys, key: str) -> float | None:
    if key not in keys:
        return None
    try:
        return read_expires(keys[key])
    except ValueError as error:
        raise AgentsFileError(f"{name}.{key}: {error}") from None


def read_expires(text: object) -> float:
    """Wall-clock seconds of the end of a date, or of a date and time (ISO 8601; UTC if there is no
    zone). Raises ValueError, whose text says what came and what was expected."""
    match = DATE.fullmatch(text) if isinstance(text, str) else None
    try:
        if match is None:
            raise ValueError
        # Python 3.10 does not know the Z.
        moment = datetime.fromisoformat(re.sub("[zZ]$", "+00:00", match[0]).upper())
        if moment.tzinfo is None:
            moment = moment.replace(tzinfo=timezone.utc)
        return (moment if match["time"] else moment + timedelta(days=1)).timestamp()
    except (ValueError, OverflowError):
        raise ValueError(f"{_shown(text)} came, expected {DATE_EXPECTED}") from None


def _boolean(name: str, keys: Keys, key: str) -> bool:
    text = keys.get(key, "false")
    if not isinstance(text, str) or text.lower() not in BOOLEANS:
        raise AgentsFileError(f"{name}.{key}: {_shown(text)} came, expected true or false")
    return BOOLEANS[text.lower()]


def _shown(value: object) -> str:
    """A text in quotes, in ASCII and on one line, cut if it is very long; for others their kind."""
    if not isinstance(value, str):
        return kind(value)
    return ascii(value if len(value) <= MAX_SHOWN else f"{value[:MAX_SHOWN]}...")
