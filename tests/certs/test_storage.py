"""Storage and Locker: what every place does (a folder, memory, Redis), a read-only folder, and
a store on another place."""

import contextlib
import errno
import logging
import os
import threading

import pytest
from fake_ca import Mint
from fake_redis import FakeRedis, connection_to
from support import TIMEOUT

from gotunnel_server.certs.folder import FolderLocker, FolderStorage, open_store
from gotunnel_server.certs.storage import ReadOnly, Unreadable
from gotunnel_server.certs.store import CertStore, StoreError
from gotunnel_server.cluster.locker import RedisLocker
from gotunnel_server.cluster.sealed import Sealer
from gotunnel_server.cluster.storage import RedisStorage
from gotunnel_server.net.safe_read import MOST_BYTES

HOST, URL = "app.example.com", "https://ca.example/dir"
FULL = OSError(errno.ENOSPC, "No space left on device")


@pytest.fixture(scope="module")
def mint():
    return Mint()


class Memory:
    """A Storage and a Locker without files."""

    def __init__(self):
        self.contents, self.aside, self.held, self.full = {}, {}, set(), False

    def read(self, key):
        return self.contents.get(key)

    def write(self, key, content):
        if self.full:
            raise FULL
        self.contents[key] = content

    def delete(self, key):
        return self.contents.pop(key, None) is not None

    def keys(self, prefix):
        return sorted(key for key in self.contents
                      if key.startswith(prefix) and "/" not in key[len(prefix):])  # fmt: skip

    def set_aside(self, key, flaw):
        if key in self.contents:
            self.aside[key] = self.contents.pop(key), flaw

    def where(self, key):
        return f"memory:{key}"

    @contextlib.contextmanager
    def lock(self, name, *, wait):
        ours = name not in self.held
        self.held.add(name)
        try:
            yield ours
        finally:
            if ours:
                self.held.remove(name)


@pytest.fixture
def memory():
    return Memory()


@pytest.fixture
def redis(request):
    """A RedisStorage and its RedisLocker, on a Redis of the test's own."""
    call, close = connection_to(request.getfixturevalue("redis_server"))
    yield on_redis(call)
    close()


def on_redis(call):
    locker = RedisLocker(call, "gotunnel")
    return RedisStorage(call, "gotunnel", Sealer([b"k" * 32]), locker), locker


PLACES = ["folder", "memory", "redis", "fake redis"]


@pytest.fixture(params=PLACES)
def place(request, tmp_path, memory):
    """A Storage and a Locker."""
    if request.param == "redis":
        return request.getfixturevalue("redis")
    return {
        "folder": lambda: (FolderStorage(tmp_path / "cache"), FolderLocker(tmp_path / "cache")),
        "memory": lambda: (memory, memory),
        "fake redis": lambda: on_redis(FakeRedis()),
    }[request.param]()


@pytest.fixture
def storage(place):
    return place[0]


# Each place


def test_what_was_written_is_read_until_it_is_deleted(storage):
    assert storage.read("ca/x") is None and storage.delete("ca/x") is False
    for content in (b"one", b"two"):
        storage.write("ca/x", content)
        assert storage.read("ca/x") == content
    assert storage.delete("ca/x") is True
    assert storage.read("ca/x") is None


def test_keys_are_those_of_one_level(storage):
    for key in ("a", "ab", "ca/a", "ca/b", "cb/certs/a"):
        storage.write(key, b"")
    assert storage.keys("ca/") == ["ca/a", "ca/b"]
    assert storage.keys("ca/b") == ["ca/b"]
    assert storage.keys("nothing/") == []
    assert {"a", "ab"} <= set(storage.keys("")) and "ca/a" not in storage.keys("")


def test_what_is_set_aside_is_gone_and_may_be_written_anew(storage):
    storage.write("ca/x", b"broken")
    storage.set_aside("ca/x", "a flaw")
    assert storage.read("ca/x") is None
    storage.write("ca/x", b"good")
    assert storage.read("ca/x") == b"good"


def test_content_may_be_any_bytes_and_as_long_as_a_file(storage):
    for content in (b"", bytes(range(256)), os.urandom(MOST_BYTES)):
        storage.write("ca/certs/x.pem", content)
        storage.write("ca/certs/x.json", content)
        assert storage.read("ca/certs/x.pem") == storage.read("ca/certs/x.json") == content


def test_what_is_gone_when_it_is_set_aside_is_no_error(storage, caplog):
    storage.set_aside("ca/x", "a flaw")
    assert storage.keys("ca/") == [] and not caplog.records


def test_a_lock_has_one_holder_until_the_end_of_its_block(place):
    locker = place[1]
    with locker.lock("ca/locks/x", wait=False) as ours, locker.lock("ca/locks/y", wait=False):
        with locker.lock("ca/locks/x", wait=False) as theirs:
            assert (ours, theirs) == (True, False)
    with pytest.raises(ZeroDivisionError), locker.lock("ca/locks/x", wait=False):
        raise ZeroDivisionError
    with locker.lock("ca/locks/x", wait=False) as again:
        assert again is True


@pytest.mark.parametrize("place", [each for each in PLACES if each != "memory"], indirect=True)
def test_those_who_wait_for_a_lock_change_things_one_after_the_other(place):
    storage, locker = place
    storage.write("ca/turns.json", b"0")

    def count():
        for _ in range(5):
            with locker.lock("ca/turns.lock", wait=True):
                number = int(storage.read("ca/turns.json"))
                storage.write("ca/turns.json", b"%d" % (number + 1))

    threads = [threading.Thread(target=count) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(TIMEOUT)
    assert storage.read("ca/turns.json") == b"15"


# Another place than a folder


def test_a_store_may_be_kept_in_another_place_than_a_folder(memory, mint, caplog):
    store = CertStore(memory, memory, URL)
    key, chain = mint.pair(HOST)
    stored = store.save(HOST, key, chain)
    store.save_state(HOST, {"failures": 1})
    assert store.certificate(HOST) == stored and store.hostnames() == store.known() == [HOST]
    assert store.pem(stored) == key.rstrip() + b"\n" + chain
    assert store.state(HOST) == {"failures": 1}
    store.ask_renewal(HOST)
    assert store.renewals() == [HOST] and store.renewals() == []
    with store.lock(HOST) as ours, store.lock(HOST) as theirs:
        assert (ours, theirs) == (True, False)
    memory.contents[stored.key] = b"garbage"
    assert store.certificate(HOST) is None and stored.key in memory.aside
    with pytest.raises(StoreError, match="memory:.*: No such file"):
        store.pem(stored)
    memory.full = True
    with pytest.raises(StoreError, match="memory:.*/certs: No space left on device; make room"):
        store.make_sure_of_room()
    assert caplog.records == []


# A folder


def test_a_folder_where_content_should_be_can_never_be_read(tmp_path):
    (tmp_path / "x").mkdir()
    with pytest.raises(Unreadable, match="Is a directory"):
        FolderStorage(tmp_path).read("x")


def test_another_process_that_was_quicker_is_no_error(tmp_path):
    FolderStorage(tmp_path).set_aside("x", "a flaw")
    assert list(tmp_path.iterdir()) == []


def test_a_lock_that_cannot_be_had_is_the_stores_error(tmp_path):
    store = CertStore(FolderStorage(tmp_path), FolderLocker(tmp_path / "file"), URL)
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match="File exists|Not a directory"):
        with store.lock(HOST):
            pass


def test_a_store_that_cannot_be_listed_says_so(tmp_path, monkeypatch):
    store = open_store(tmp_path, URL)

    def forbid(path):
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr(os, "listdir", forbid)
    with pytest.raises(StoreError, match="certs: Permission denied"):
        store.hostnames()


# Read only


def test_a_read_only_place_is_left_as_it_is(tmp_path, mint, caplog):
    caplog.set_level(logging.INFO)
    stored = open_store(tmp_path, URL).save(HOST, *mint.pair(HOST))
    (tmp_path / stored.key).write_bytes(b"garbage")
    place = ReadOnly(FolderStorage(tmp_path))
    store = CertStore(place, place, URL)
    assert store.certificate(HOST) is None
    assert place.broken == {stored.key: "expected a private key and its certificate as PEM"}
    assert (tmp_path / stored.key).read_bytes() == b"garbage"
    for change in (
        lambda: store.save_state(HOST, {}),
        lambda: store.lock(HOST).__enter__(),
        lambda: store.make_sure_of_room(),
    ):
        with pytest.raises(StoreError, match="Read-only file system"):
            change()
    with pytest.raises(OSError, match="Read-only"):
        place.delete(stored.key)
    assert [file for file in tmp_path.rglob("*") if file.is_file()] == [tmp_path / stored.key]
    assert caplog.records == []
