"""The certificate store: writes are atomic, and broken files are set aside."""

import contextlib
import errno
import json
import logging
import os
import shutil
import signal
import socket
import stat
import subprocess
import sys
import threading
import time

import pytest
from fake_ca import DAY, NOW, Mint
from support import ROOT, TIMEOUT

from gotunnel_server.certs.folder import open_store
from gotunnel_server.certs.store import StoreError, ca_id, check
from gotunnel_server.net import safe_read

HOST = "app.example.com"
URL = "https://ca.example/dir"
PRODUCTION = "https://acme-v02.api.letsencrypt.org/directory"
STAGING = "https://acme-staging-v02.api.letsencrypt.org/directory"


@pytest.fixture(scope="module")
def mint():
    return Mint()


@pytest.fixture
def store(tmp_path):
    return open_store(tmp_path / "cache", URL)


def certs(store_folder, url=URL):
    return store_folder / "cache" / ca_id(url) / "certs"


def pem_of(store_folder, hostname=HOST):
    """The file of a hostname's certificate."""
    return certs(store_folder) / f"{hostname}.pem"


def mode(path):
    return stat.S_IMODE(path.stat().st_mode)


def test_a_certificate_comes_back_as_it_was_kept(store, mint):
    kept = store.save(HOST, *mint.pair(HOST))
    found = store.certificate(HOST)
    assert found == kept
    assert found.begins_at == NOW and found.ends_at == NOW + 90 * DAY
    assert store.hostnames() == [HOST]


def test_folders_are_0700_and_files_0600(tmp_path, store, mint):
    previous = os.umask(0)
    try:
        store.save(HOST, *mint.pair(HOST))
        store.save_state(HOST, {"failures": 1})
        store.save_account({"url": "x"})
    finally:
        os.umask(previous)
    for path in (tmp_path / "cache").rglob("*"):
        assert mode(path) == (0o700 if path.is_dir() else 0o600), path


def test_a_folder_that_others_may_read_is_closed_to_them(tmp_path):
    folder = tmp_path / "cache" / ca_id(URL)
    folder.mkdir(parents=True)
    folder.chmod(0o755)
    open_store(tmp_path / "cache", URL)
    assert mode(folder) == 0o700


def test_a_certificate_of_another_host_or_key_is_not_kept(store, mint):
    good = store.save(HOST, *mint.pair(HOST))
    key, _ = mint.pair(HOST)
    for pair in (mint.pair("other.example.com"), (key, mint.pair(HOST)[1])):
        with pytest.raises(StoreError, match="^the CA's certificate is not kept: (a|the key)"):
            store.save(HOST, *pair)
        assert store.certificate(HOST) == good


BROKEN = {
    "garbage": lambda pem, _: b"garbage",
    "empty": lambda pem, _: b"",
    "cut in the chain": lambda pem, _: pem[:-100],
    "cut behind the leaf": lambda pem, _: pem[: pem.index(b"-----END CERTIFICATE-----") + 26],
    "cut in the leaf": lambda pem, _: pem[: pem.index(b"-----END CERTIFICATE-----") - 40],
    "key of another": lambda pem, other: (
        other[: other.index(b"-----BEGIN CERT")] + pem[pem.index(b"-----BEGIN CERT") :]
    ),
    "another host": lambda _, other: other,
    "too long": lambda pem, _: pem + b"\n" * 1_000_000,
}


@pytest.mark.parametrize("what", BROKEN)
def test_a_broken_file_is_set_aside_and_named_once(tmp_path, store, mint, what, caplog):
    store.save(HOST, *mint.pair(HOST))
    file = pem_of(tmp_path)
    other = b"".join(mint.pair("other.example.com"))
    file.write_bytes(BROKEN[what](file.read_bytes(), other))
    with caplog.at_level(logging.WARNING):
        assert store.certificate(HOST) is None
        assert store.certificate(HOST) is None
    assert len(caplog.records) == 1 and f"{HOST}.pem.bad" in caplog.text
    assert (certs(tmp_path) / f"{HOST}.pem.bad").exists() and not file.exists()


@pytest.mark.parametrize("begins_at", [NOW - 1000 * DAY, time.time() + 3600], ids=["ago", "ahead"])
def test_dates_do_not_break_a_file(store, mint, begins_at):
    store.save(HOST, *mint.pair(HOST, begins_at))
    assert store.certificate(HOST).begins_at == int(begins_at)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff", b"[" * 100_000])
def test_a_broken_state_or_account_counts_as_none(tmp_path, store, content):
    store.save_state(HOST, {"failures": 3})
    (certs(tmp_path) / f"{HOST}.json").write_bytes(content)
    (certs(tmp_path).parent / "account.json").write_bytes(content)
    assert store.state(HOST) == store.account() == {}
    assert (certs(tmp_path) / f"{HOST}.json.bad").read_bytes() == content
    store.save_state(HOST, {"failures": 4})
    assert store.state(HOST) == {"failures": 4}


def test_a_pause_is_kept_and_a_broken_one_counts_as_none(tmp_path, store):
    assert store.pause() == {}
    store.save_pause({"until": 7})
    assert open_store(tmp_path / "cache", URL).pause() == {"until": 7}
    (certs(tmp_path).parent / "pause.json").write_bytes(b"{")
    assert store.pause() == {}


def test_two_directories_share_nothing(tmp_path, store, mint):
    store.save(HOST, *mint.pair(HOST))
    store.save_account({"url": "x"})
    other = open_store(tmp_path / "cache", URL + "2")
    assert other.certificate(HOST) is None and other.account() == {}
    assert open_store(tmp_path / "cache", URL).certificate(HOST)


@pytest.mark.parametrize("name", [HOST, f"{HOST}+rsa"])
def test_what_the_go_program_left_is_a_certificate(tmp_path, store, mint, name):
    key, chain = mint.pair(HOST)
    file = tmp_path / "cache" / name
    file.write_bytes(key + chain)
    found = store.certificate(HOST)
    assert found.leaf == check(key + chain, HOST) and found.is_left_by_go
    assert store.pem(found) == key + chain
    own = store.save(HOST, *mint.pair(HOST))
    assert store.certificate(HOST) == own  # ours is newer


def test_a_broken_file_of_the_go_program_is_left_where_it_is(tmp_path, store, caplog):
    file = tmp_path / "cache" / HOST
    file.write_bytes(b"garbage")
    with caplog.at_level(logging.WARNING):
        assert store.certificate(HOST) is store.certificate(HOST) is None
    assert file.read_bytes() == b"garbage" and len(caplog.records) == 1


def test_a_staging_certificate_of_the_go_program_is_not_served_in_production(tmp_path):
    cache = tmp_path / "cache"
    cache.mkdir()
    staging = Mint("(STAGING) Pretend Pear X1")
    (cache / HOST).write_bytes(b"".join(staging.pair(HOST)))
    assert open_store(cache, PRODUCTION).certificate(HOST) is None
    assert open_store(cache, STAGING).certificate(HOST)


def test_only_old_temporary_files_are_swept(tmp_path, store):
    old, new = (certs(tmp_path) / f".{name}.tmp" for name in ("old", "new"))
    foreign = tmp_path / "cache" / ".somebody's.tmp"
    for path in (old, new, foreign):
        path.write_bytes(b"half")
    for path in (old, foreign):
        os.utime(path, (NOW - 10**9, NOW - 10**9))
    open_store(tmp_path / "cache", URL)
    assert not old.exists() and new.exists() and foreign.exists()


def test_a_socket_in_the_place_of_a_go_certificate_is_named_once(tmp_path, store, caplog):
    with socket.socket(socket.AF_UNIX) as other:
        other.bind(str(tmp_path / "cache" / HOST))
        assert store.certificate(HOST) is store.certificate(HOST) is None
    assert len(caplog.records) == 1


def test_a_folder_that_cannot_be_written_is_one_clear_line(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match="ACME_CACHE .*file.*expected a folder") as caught:
        open_store(tmp_path / "file" / "cache", URL)
    assert "\n" not in str(caught.value)


def test_a_write_that_fails_leaves_the_old_file(store, mint, monkeypatch, tmp_path):
    good = store.save(HOST, *mint.pair(HOST))

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(StoreError, match="No space left"):
        store.save(HOST, *mint.pair(HOST))
    monkeypatch.undo()
    assert store.certificate(HOST) == good
    assert [path.name for path in certs(tmp_path).iterdir()] == [f"{HOST}.pem"]


@pytest.mark.parametrize("hostname", ["../x", "a/b", ".x", "", "A.example", "a\0b"])
def test_no_hostname_leads_out_of_the_folder(store, hostname):
    with pytest.raises(ValueError, match="hostname"):
        store.certificate(hostname)


@pytest.mark.parametrize("name", ["app_old.test", "App.Test", "._app.test", "a b.c", "é.test"])
def test_other_peoples_files_are_no_hostnames(tmp_path, store, mint, name):
    store.save(HOST, *mint.pair(HOST))
    (certs(tmp_path) / f"{name}.pem").write_bytes(pem_of(tmp_path).read_bytes())
    assert store.hostnames() == [HOST]


def test_the_longest_hostname_has_files(store, mint):
    hostname = ".".join(["a" * 60] * 4)
    store.save_state(hostname, {"failures": 1})
    assert store.save(hostname, *mint.pair(hostname)) == store.certificate(hostname)


def test_a_file_with_a_name_of_its_own_is_not_taken_for_another_hostnames(tmp_path, store, mint):
    host = ".".join(["a" * 60] * 3 + ["b" * 50, "test"])
    store.save(host, *mint.pair(host))
    again = open_store(tmp_path / "cache", URL)
    assert again.hostnames() == []
    assert again.certificate(host) is not None


def test_what_cannot_be_read_just_now_is_not_broken(tmp_path, store, mint, monkeypatch):
    store.save(HOST, *mint.pair(HOST))
    store.save_account({"url": "x"})

    def fail(file):
        raise OSError(errno.EMFILE, "Too many open files")

    with monkeypatch.context() as patch:
        patch.setattr(safe_read, "read", fail)
        for read in (lambda: store.certificate(HOST), store.account):
            with pytest.raises(StoreError, match="Too many open files"):
                read()
    assert store.certificate(HOST) is not None
    assert store.account() == {"url": "x"}


FOREIGN = {
    "FIFO": os.mkfifo,
    "folder": os.mkdir,
    "device": lambda path: path.symlink_to("/dev/zero"),
}


@pytest.mark.parametrize("what", FOREIGN)
def test_what_is_no_file_is_set_aside_and_blocks_nobody(tmp_path, store, mint, what, caplog):
    folder = certs(tmp_path)
    files = [folder / f"{HOST}.pem", folder / f"{HOST}.json", folder.parent / "account.json"]
    for file in files:
        FOREIGN[what](file)
    assert store.certificate(HOST) is None
    assert store.state(HOST) == store.account() == {}
    kept = store.save(HOST, *mint.pair(HOST))
    assert store.certificate(HOST) == kept
    assert len(caplog.records) == 3
    assert all(file.with_name(file.name + ".bad").is_symlink()
               or file.with_name(file.name + ".bad").exists() for file in files)  # fmt: skip


def test_a_file_that_we_may_not_read_is_set_aside(tmp_path, store, mint, monkeypatch, caplog):
    store.save(HOST, *mint.pair(HOST))

    def forbid(path):
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    with monkeypatch.context() as patch:
        patch.setattr(safe_read, "read", forbid)
        assert store.certificate(HOST) is None
    assert f"{HOST}.pem is broken (Permission denied): renamed" in caplog.text


def test_where_nothing_can_be_set_aside_that_is_said(tmp_path, store):
    file = certs(tmp_path) / f"{HOST}.pem"
    os.mkdir(file)
    file.with_name(f"{HOST}.pem.bad").write_bytes(b"an earlier one")
    with pytest.raises(StoreError, match="Is a directory.*cannot be moved.*remove both"):
        store.certificate(HOST)


@pytest.mark.parametrize("name", [HOST, "local"])
def test_a_fifo_or_a_folder_beside_the_cas_blocks_nobody(tmp_path, store, name):
    path = tmp_path / "cache" / name
    (os.mkfifo if name == HOST else os.mkdir)(path)
    assert store.certificate(name) is None


def test_room_is_made_sure_of_and_nothing_is_left(tmp_path, store, monkeypatch):
    store.make_sure_of_room()
    assert list(certs(tmp_path).iterdir()) == []

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(StoreError, match="certs: No space left on device; make room"):
        store.make_sure_of_room()
    assert list(certs(tmp_path).iterdir()) == []


def test_a_request_that_cannot_be_read_is_for_its_files_name(store, monkeypatch):
    """The command may run as root, and the gateway as another user."""
    store.ask_renewal(HOST)

    def forbid(path):
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr(safe_read, "read", forbid)
    assert store.renewals() == [HOST]
    assert store.renewals() == []


def test_requests_in_a_folder_that_cannot_be_read_now_are_none(store, monkeypatch):
    store.ask_renewal(HOST)

    def fail(*_, **__):
        raise OSError(errno.EMFILE, "Too many open files")

    monkeypatch.setattr(os, "listdir", fail)
    assert store.renewals() == []


def test_a_cache_that_was_removed_is_made_again(tmp_path, store, mint):
    shutil.rmtree(tmp_path / "cache")
    store.make_sure_of_room()
    with store.lock(HOST):
        store.save(HOST, *mint.pair(HOST))
    assert store.certificate(HOST)
    assert mode(certs(tmp_path)) == 0o700


def test_no_hostname_has_the_lock_of_the_account(store):
    for hostname in ("account", "account.lock"):
        done = threading.Event()

        def sign_in(done=done):
            with store.account_lock():
                done.set()

        with store.lock(hostname) as ours:
            assert ours
            thread = threading.Thread(target=sign_in, daemon=True)
            thread.start()
            assert done.wait(TIMEOUT)
        thread.join()


def test_the_lock_is_for_one_at_a_time(tmp_path, store):
    other = open_store(tmp_path / "cache", URL)
    with store.lock(HOST) as ours, other.lock(HOST) as theirs, other.lock("b.example") as free:
        assert (ours, theirs, free) == (True, False, True)
    with other.lock(HOST) as theirs:
        assert theirs


KILLED = """
import os, signal, sys
sys.path[:0] = sys.argv[1:3]
from pathlib import Path
from fake_ca import Mint
from gotunnel_server.certs.folder import open_store
store = open_store(Path(sys.argv[3]), sys.argv[4])
pair = Mint().pair(sys.argv[5])
with store.lock(sys.argv[5]):
    os.replace = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
    store.save(sys.argv[5], *pair)
"""


def test_killed_before_the_move_the_old_pair_is_there_and_the_lock_is_free(tmp_path, store, mint):
    good = store.save(HOST, *mint.pair(HOST))
    command = [sys.executable, "-c", KILLED, ROOT, ROOT / "tests", tmp_path / "cache", URL, HOST]
    assert subprocess.run(command, timeout=50).returncode == -signal.SIGKILL
    (left,) = certs(tmp_path).glob(".*.tmp")
    os.utime(left, (0, 0))
    again = open_store(tmp_path / "cache", URL)
    assert not left.exists() and again.certificate(HOST) == good
    with again.lock(HOST) as ours:
        assert ours


@pytest.mark.slow
def test_killed_at_any_moment_the_cache_is_never_broken(tmp_path, mint):
    open_store(tmp_path / "cache", URL).save(HOST, *mint.pair(HOST))
    script = KILLED.replace("os.replace = lambda *_: os.kill(os.getpid(), signal.SIGKILL)", (
        "print(flush=True)")).replace("    store.save", "    while True: store.save")  # fmt: skip
    for delay in (0.002 * step for step in range(6)):
        command = [
            sys.executable, "-c", script, ROOT, ROOT / "tests", tmp_path / "cache", URL, HOST,
        ]  # fmt: skip
        with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
            process.stdout.readline()
            time.sleep(delay)  # the process is killed at different moments
            process.kill()
        assert open_store(tmp_path / "cache", URL).certificate(HOST)
    assert not list(certs(tmp_path).glob("*.bad"))


def test_state_is_plain_json(tmp_path, store):
    store.save_state(HOST, {"failures": 1})
    with contextlib.closing(open(certs(tmp_path) / f"{HOST}.json")) as file:
        assert json.load(file) == {"failures": 1}
