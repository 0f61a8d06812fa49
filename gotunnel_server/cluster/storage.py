"""A certificate store's Storage on Redis, for all members of a cluster.

With `NAME` from CLUSTER_NAME, these are the keys. `{NAME}` is a hash tag: in a Redis Cluster all of
them lie on one node, as the scripts below need it.

    {NAME}:files:FOLDER    hash: file to content, for the Storage's key FOLDER/file. A folder is
                           listed by its hash, so no key of Redis is ever searched for
    {NAME}:folders         set: the FOLDERs
    {NAME}:store           hash: epoch, serial, trimmed: see below; key: which key of
                           CLUSTER_KEY_FILE seals (its id)
    {NAME}:news            sorted set: certificates, and requests to renew one, by the serial number
                           of their latest write
    {NAME}:lock:LOCK       a lock (locker.py)

Content that may hold private keys is sealed (sealed.py); the rest is kept as it is. A gateway whose
keys do not include the cluster's never writes sealed content, as the others could not read it.

*News.* Each write of a certificate takes the next serial number, so a member learns with one
request which certificates have changed since it last asked. `news` has MOST_NEWS of them; `trimmed`
is the highest serial that was dropped. `epoch` is random, and another one after Redis lost its
data. If the epoch is another one, or what was dropped is newer than the last request, a member has
to look at all of them.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import secrets
from collections.abc import Iterable
from typing import Any, NamedTuple, Protocol

from ..certs.storage import Unreadable
from ..net.safe_read import MOST_BYTES
from .sealed import Broken, Sealer, WrongKey

log = logging.getLogger("gotunnel.storage")

# Bytes that are read of a value: as many as of a file, and what sealing adds.
MOST_VALUE = MOST_BYTES * 4 // 3 + 1024
MOST_NEWS = 1000  # certificates that `news` remembers, some 100 bytes each

# What never holds a private key. Everything else is sealed: what is forgotten here costs a little
# time, not a secret.
PUBLIC = (".json", ".renew", ".crt", "/writable")
ACCOUNT = "/account.json"  # the exception: it has the account's private key
CERTIFICATE, REQUEST = ".pem", ".renew"  # their writes are news

# KEYS: files, folders, store, news, then the locks that the caller has to hold still.
# ARGV: folder, file, content, the ids of our keys ("" if the content is not sealed), the name for
# the news ("" for none), MOST_NEWS, a random epoch, "new" to write only if nothing is there; then
# the tokens of the locks.
WRITE = """
for i = 5, #KEYS do
  if redis.call('GET', KEYS[i]) ~= ARGV[4 + i] then return 'lost' end
end
if ARGV[4] ~= '' then
  local known = redis.call('HGET', KEYS[3], 'key')
  if known and not string.find(ARGV[4], known, 1, true) then return 'key' end
  redis.call('HSET', KEYS[3], 'key', string.match(ARGV[4], '^%x+'))
end
if ARGV[8] == 'new' and redis.call('HEXISTS', KEYS[1], ARGV[2]) == 1 then return 'there' end
redis.call('HSET', KEYS[1], ARGV[2], ARGV[3])
redis.call('SADD', KEYS[2], ARGV[1])
if ARGV[5] ~= '' then
  redis.call('HSETNX', KEYS[3], 'epoch', ARGV[7])
  redis.call('ZADD', KEYS[4], redis.call('HINCRBY', KEYS[3], 'serial', 1), ARGV[5])
  local over = redis.call('ZCARD', KEYS[4]) - tonumber(ARGV[6])
  if over > 0 then
    local gone = redis.call('ZPOPMIN', KEYS[4], over)
    redis.call('HSET', KEYS[3], 'trimmed', gone[#gone])
  end
end
return 'written'
"""
# KEYS: files. ARGV: file, most bytes. The content; its length if that is more; nil if none.
READ = """
local length = redis.call('HSTRLEN', KEYS[1], ARGV[1])
if length > tonumber(ARGV[2]) then return length end
return redis.call('HGET', KEYS[1], ARGV[1])
"""
# KEYS: files. ARGV: file, the name that it gets, and the content that it has ("" for any).
MOVE = """
local content = redis.call('HGET', KEYS[1], ARGV[1])
if not content then return 0 end
redis.call('HSET', KEYS[1], ARGV[2], content)
return redis.call('HDEL', KEYS[1], ARGV[1])
"""
# KEYS: files, store. ARGV: file, old content, new content, the id of the key that sealed it.
RESEAL = """
if redis.call('HGET', KEYS[1], ARGV[1]) ~= ARGV[2] then return 0 end
redis.call('HSET', KEYS[1], ARGV[1], ARGV[3])
redis.call('HSET', KEYS[2], 'key', ARGV[4])
return 1
"""
# KEYS: store, news. ARGV: epoch and serial of the last request.
NEWS = """
local found = redis.call('HMGET', KEYS[1], 'epoch', 'serial', 'trimmed')
local epoch, serial, trimmed = found[1] or '', tonumber(found[2] or 0), tonumber(found[3] or 0)
local since = tonumber(ARGV[2])
if epoch ~= ARGV[1] or trimmed > since or serial < since then return {epoch, serial, 0, {}} end
return {epoch, serial, 1, redis.call('ZRANGEBYSCORE', KEYS[2], '(' .. since, '+inf')}
"""


class Refused(OSError):
    """Redis could be reached, and the content was not written; ``strerror`` says why."""


class Call(Protocol):
    """Sends one command to Redis and returns its result, texts as bytes. Any thread.

    Raises OSError if Redis cannot be reached, or refuses; ``strerror`` says why.
    """

    def __call__(self, *command: str | bytes | int) -> Any: ...


class Fences(Protocol):
    """The locks that the calling thread holds to change something: a write without them is refused.
    RedisLocker has them."""

    def fences(self) -> list[tuple[str, str]]:
        """The key and the token of each, in Redis."""


class Serial(NamedTuple):
    """How far a member knows the news."""

    epoch: str = ""
    number: int = 0


class News(NamedTuple):
    """``keys`` are the certificates and requests that changed; None: perhaps all."""

    keys: list[str] | None
    serial: Serial


class RedisStorage:
    """A Storage on Redis. Any thread."""

    def __init__(self, call: Call, name: str, sealer: Sealer, fences: Fences) -> None:
        """``name`` is CLUSTER_NAME."""
        self._call = call
        self._prefix = f"{{{name}}}"
        self._sealer = sealer
        self._fences = fences
        self._is_sealed_anew = False

    def read(self, key: str) -> bytes | None:
        """As Storage.read(). Content that was sealed with the old key is sealed with the new one.
        Raises WrongKey, an OSError, if we have neither."""
        folder, file = _parts(key)
        found = self._call("EVAL", READ, 1, self._files(folder), file, MOST_VALUE)
        if isinstance(found, int):
            raise Unreadable(errno.EFBIG, f"longer than {MOST_VALUE} bytes", self.where(key))
        if found is None:
            return None
        if not isinstance(found, bytes):
            raise Unreadable(errno.EINVAL, "no text", self.where(key))
        if not is_sealed(key):
            return found
        try:
            opened = self._sealer.open(key, found)
        except WrongKey:
            raise WrongKey(self.where(key)) from None
        except Broken as broken:
            raise Unreadable(errno.EINVAL, str(broken), self.where(key)) from None
        if opened.is_old:
            self._reseal(key, found, opened.content)
        return opened.content

    def _reseal(self, key: str, found: bytes, content: bytes) -> None:
        """Unless another member was quicker. If it fails, the next reader does it."""
        folder, file = _parts(key)
        sealed = self._sealer.seal(key, content)
        try:
            self._call("EVAL", RESEAL, 2, self._files(folder), f"{self._prefix}:store",
                       file, found, sealed, self._sealer.ids[0])  # fmt: skip
        except OSError as error:
            log.debug("%s is not encrypted anew yet: %s", self.where(key), error.strerror)

    def seal_anew(self) -> None:
        """While keys are changed: seal everything with the new key. Raises OSError."""
        if len(self._sealer.ids) < 2 or self._is_sealed_anew:
            return
        for folder in self.folders():
            for key in self.keys(f"{folder}/" if folder else ""):
                if is_sealed(key) and not key.endswith(".bad"):
                    with contextlib.suppress(Unreadable, WrongKey):  # its reader will say so
                        self.read(key)
        self._is_sealed_anew = True
        log.info(
            "all private keys on Redis are encrypted with the first key of CLUSTER_KEY_FILE; if "
            "that is the new one, and the first one of every gateway, the old one can be removed"
        )

    def write(self, key: str, content: bytes) -> None:
        """As Storage.write(). Raises OSError also if a lock that the thread holds is lost, and
        WrongKey."""
        self._write(key, content, only_new=False)

    def write_new(self, key: str, content: bytes) -> bool:
        """Write it if there is nothing under the key; False if there is."""
        return self._write(key, content, only_new=True)

    def _write(self, key: str, content: bytes, *, only_new: bool) -> bool:
        if len(content) > MOST_BYTES:  # nobody could read it
            raise Refused(errno.EFBIG, f"longer than {MOST_BYTES} bytes", self.where(key))
        folder, file = _parts(key)
        sealing, fences = is_sealed(key), self._fences.fences()
        keys = (
            self._files(folder), f"{self._prefix}:folders", f"{self._prefix}:store",
            f"{self._prefix}:news", *(lock for lock, _ in fences),
        )  # fmt: skip
        result = self._call(
            "EVAL", WRITE, len(keys), *keys,
            folder, file, self._sealer.seal(key, content) if sealing else content,
            " ".join(self._sealer.ids) if sealing else "",
            key if key.endswith((CERTIFICATE, REQUEST)) else "",
            MOST_NEWS, secrets.token_hex(8), "new" if only_new else "any",
            *(token for _, token in fences),
        )  # fmt: skip
        if result == b"lost":
            raise Refused(errno.ENOLCK, "not written: the lock for it was lost", self.where(key))
        if result == b"key":
            raise WrongKey(f"what the cluster keeps in {self._files(folder)}")
        return bool(result == b"written")

    def check_key(self) -> None:
        """Raises WrongKey if the cluster seals with a key that we do not have; OSError if Redis
        cannot be reached."""
        known = self._call("HGET", f"{self._prefix}:store", "key")
        if known is not None and _texts([known]) not in [[id] for id in self._sealer.ids]:
            raise WrongKey("what the cluster keeps on Redis")

    def delete(self, key: str) -> bool:
        folder, file = _parts(key)
        return bool(self._call("HDEL", self._files(folder), file))

    def keys(self, prefix: str) -> list[str]:
        folder, slash, start = prefix.rpartition("/")
        names = _texts(self._call("HKEYS", self._files(folder)))
        return sorted(
            folder + slash + name for name in names if name.startswith(start) and "/" not in name
        )

    def folders(self) -> list[str]:
        """All folders that were ever written to; sorted."""
        return sorted(_texts(self._call("SMEMBERS", f"{self._prefix}:folders")))

    def set_aside(self, key: str, flaw: str) -> None:
        folder, file = _parts(key)
        if self._call("EVAL", MOVE, 1, self._files(folder), file, file + ".bad"):
            log.warning("%s is broken (%s): renamed to %s.bad; a new one is made",
                        self.where(key), flaw, file)  # fmt: skip

    def where(self, key: str) -> str:
        folder, file = _parts(key)
        return f"{file} in {self._files(folder)} of Redis"

    def news(self, since: Serial) -> News:
        """What was written after ``since``. Raises OSError."""
        answer = self._call(
            "EVAL", NEWS, 2, f"{self._prefix}:store", f"{self._prefix}:news",
            since.epoch, since.number,
        )  # fmt: skip
        if not isinstance(answer, list) or len(answer) != 4 or not isinstance(answer[1], int):
            raise _not_understood()
        epoch, number, is_complete, found = answer
        keys = _texts(found)
        return News(keys if is_complete else None, Serial("".join(_texts([epoch])), number))

    def _files(self, folder: str) -> str:
        return f"{self._prefix}:files:{folder}"


def is_sealed(key: str) -> bool:
    """Whether what lies under a key may hold a private key."""
    return key.endswith(ACCOUNT) or not key.endswith(PUBLIC)


def _texts(found: Iterable[bytes]) -> list[str]:
    """Keys, or names of files and folders. Members have the same as paths in ACME_CACHE, so one
    that leads out of it is none of ours: left out. Raises Refused."""
    if not isinstance(found, (list, set)) or not all(isinstance(each, bytes) for each in found):
        raise _not_understood()
    texts = [each.decode("utf-8", "replace") for each in found]
    return [
        text for text in texts
        if text.isprintable() and (not text or _LEADS_OUT.isdisjoint(text.split("/")))
    ]  # fmt: skip


_LEADS_OUT = {"", ".", ".."}


def _not_understood() -> Refused:
    return Refused(errno.EPROTO, "what Redis has cannot be understood; does another program write "
                   "there? CLUSTER_NAME must differ then")  # fmt: skip


def _parts(key: str) -> tuple[str, str]:
    folder, _, file = key.rpartition("/")
    return folder, file
