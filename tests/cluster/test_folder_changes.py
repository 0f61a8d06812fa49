"""Several processes with one ACME_CACHE: each learns which certificates were written."""

import os

import pytest
from fake_ca import NOW, Mint

from gotunnel_server.certs.folder import open_store
from gotunnel_server.certs.store import ca_id
from gotunnel_server.cluster.folder_changes import TICK, FolderChanges

URL, CA = "https://ca.example/dir", ca_id("https://ca.example/dir")
APP, OTHER = "app.example.com", "other.example.com"


@pytest.fixture
def store(tmp_path):
    return open_store(tmp_path, URL)


def key(hostname):
    return f"{CA}/certs/{hostname}.pem"


def test_each_certificate_that_was_written_is_told_once(store, tmp_path):
    mint = Mint()
    store.save(OTHER, *mint.pair(OTHER))
    changes = FolderChanges(tmp_path, CA)
    assert changes() == []
    store.save_state(APP, {"failures": 1})
    assert changes() == []
    store.save(APP, *mint.pair(APP))
    assert changes() == [key(APP)] and changes() == []
    store.save(OTHER, *mint.pair(OTHER, NOW + 1))
    store.save(APP, *mint.pair(APP, NOW + 1))
    assert sorted(changes()) == [key(APP), key(OTHER)] and changes() == []


def test_a_folder_that_has_not_changed_is_not_read(store, tmp_path, monkeypatch):
    changes = FolderChanges(tmp_path, CA, clock=lambda: os.stat(tmp_path / CA).st_mtime + 2 * TICK)
    reads = []
    real = os.scandir
    monkeypatch.setattr(os, "scandir", lambda path: reads.append(path) or real(path))
    for _ in range(3):
        assert changes() == []
    assert len(reads) == 1


def test_a_change_within_a_tick_of_the_file_system_is_found(store, tmp_path):
    """Two writes may leave the same time of change at the folder."""
    certs = tmp_path / CA / "certs"
    changes = FolderChanges(tmp_path, CA)
    changes()
    before = os.stat(certs)
    store.save(APP, *Mint().pair(APP))
    os.utime(certs, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert changes() == [key(APP)]


def test_a_folder_that_is_not_there_yet_has_no_changes(tmp_path):
    assert FolderChanges(tmp_path, CA)() == []
