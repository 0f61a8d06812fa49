"""Storage and Locker: a folder, a read-only folder, and another place."""

import contextlib
import errno
import logging
import os

import pytest
from fake_ca import Mint

from gotunnel_server.certs.folder import FolderLocker, FolderStorage, open_store
from gotunnel_server.certs.storage import ReadOnly, Unreadable
from gotunnel_server.certs.store import CertStore, StoreError

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
        self.aside[key] = self.contents.pop(key), flaw

    def where(self, key):
        return f"memory:{key}"

    @contextlib.contextmanager
    def lock(self, name, *, wait):
        ours = name not in self.held
        self.held.add(name)
        yield ours
        if ours:
            self.held.remove(name)


@pytest.fixture
def memory():
    return Memory()


@pytest.fixture(params=["folder", "memory"])
def storage(request, tmp_path, memory):
    return memory if request.param == "memory" else FolderStorage(tmp_path / "cache")


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
