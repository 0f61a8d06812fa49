"""Redis in this process, as the cluster's storage and locks use it: FakeRedis.

Scripts are not run but known, each as a method; tests that must pass on a real Redis, too, show
that both do the same. ``away`` has each command fail as if Redis could not be reached.
"""

import errno
import threading
import time

from support import need_package

from gotunnel_server.cluster import locker, storage

AWAY = OSError(errno.ECONNREFUSED, "Redis at fake: Connection refused")


class FakeRedis:
    """A Call (storage.py). Any thread."""

    def __init__(self, clock=time.monotonic):
        self.away = False
        self.calls = []  # all commands so far; of scripts, their names
        self.on_call = lambda name: None  # called before each
        self._clock = clock
        self._lock = threading.RLock()
        self.flush()

    def flush(self):
        """Lose all data."""
        self.hashes, self.sets, self.scores, self.texts, self.ends = {}, {}, {}, {}, {}

    def __call__(self, *command):
        name, *words = command
        if name == "EVAL":
            name = SCRIPTS[words[0]]
            count = words[1]
            words = [words[2 : 2 + count], [_bytes(word) for word in words[2 + count :]]]
        else:
            words = [words[0], *map(_bytes, words[1:])]
        self.on_call(name)
        if self.away:
            raise AWAY
        with self._lock:
            self.calls.append(name)
            return getattr(self, f"_{name.lower()}")(*words)

    # Commands

    def _hdel(self, key, field):
        return int(self.hashes.get(key, {}).pop(field, None) is not None)

    def _hget(self, key, field):
        return self.hashes.get(key, {}).get(field)

    def _hset(self, key, field, value):
        self.hashes.setdefault(key, {})[field] = value

    def _hkeys(self, key):
        return list(self.hashes.get(key, {}))

    def _smembers(self, key):
        return set(self.sets.get(key, ()))

    def _set(self, key, value, *how):
        if self._get(key) is not None:
            return None
        self.texts[key], self.ends[key] = value, self._clock() + int(how[-1]) / 1000
        return True

    def _get(self, key):
        if self.ends.get(key, 0) <= self._clock():
            self.texts.pop(key, None)
        return self.texts.get(key)

    # Scripts

    def _write(self, keys, words):
        files, folders, store, news, *locks = keys
        folder, file, content, ids, name, most, epoch, how, *tokens = words
        if any(self._get(lock) != token for lock, token in zip(locks, tokens, strict=True)):
            return b"lost"
        state = self.hashes.setdefault(store, {})
        if ids:
            if state.get(b"key", ids[:16]) not in ids:
                return b"key"
            state[b"key"] = ids[:16]
        if how == b"new" and file in self.hashes.get(files, {}):
            return b"there"
        self.hashes.setdefault(files, {})[file] = content
        self.sets.setdefault(folders, set()).add(folder)
        if name:
            state.setdefault(b"epoch", epoch)
            state[b"serial"] = state.get(b"serial", 0) + 1
            scores = self.scores.setdefault(news, {})
            scores[name] = state[b"serial"]
            while len(scores) > int(most):
                oldest = min(scores, key=scores.get)
                state[b"trimmed"] = scores.pop(oldest)
        return b"written"

    def _read(self, keys, words):
        content = self.hashes.get(keys[0], {}).get(words[0])
        return len(content) if content is not None and len(content) > int(words[1]) else content

    def _move(self, keys, words):
        files = self.hashes.get(keys[0], {})
        if words[0] not in files:
            return 0
        files[words[1]] = files.pop(words[0])
        return 1

    def _reseal(self, keys, words):
        files = self.hashes.get(keys[0], {})
        if files.get(words[0]) != words[1]:
            return 0
        files[words[0]] = words[2]
        self.hashes.setdefault(keys[1], {})[b"key"] = words[3]
        return 1

    def _news(self, keys, words):
        state, since = self.hashes.get(keys[0], {}), int(words[1])
        epoch, serial = state.get(b"epoch", b""), state.get(b"serial", 0)
        if epoch != words[0] or state.get(b"trimmed", 0) > since or serial < since:
            return [epoch, serial, 0, []]
        scores = sorted((at, name) for name, at in self.scores.get(keys[1], {}).items())
        return [epoch, serial, 1, [name for at, name in scores if at > since]]

    def _keep(self, keys, words):
        holder = self._get(keys[0])
        if holder != words[0] and (holder is not None or words[2] != b"again"):
            return 0
        self.texts[keys[0]] = words[0]
        self.ends[keys[0]] = self._clock() + int(words[1]) / 1000
        return 1

    def _release(self, keys, words):
        if self._get(keys[0]) != words[0]:
            return 0
        del self.texts[keys[0]]
        return 1


SCRIPTS = {
    storage.WRITE: "WRITE", storage.READ: "READ", storage.MOVE: "MOVE",
    storage.RESEAL: "RESEAL", storage.NEWS: "NEWS",
    locker.KEEP: "KEEP", locker.RELEASE: "RELEASE",
}  # fmt: skip


def _bytes(word):
    return word if isinstance(word, bytes) else str(word).encode()


def connection_to(server):
    """A Call to a RedisServer, and a function that closes it."""
    redis = need_package("redis", "redis")
    client = redis.Redis(unix_socket_path=server.unix_path)

    def call(*command):
        try:
            return client.execute_command(*command)
        except redis.RedisError as error:
            raise OSError(errno.EIO, str(error)) from error

    return call, client.close
