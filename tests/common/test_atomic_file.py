"""Files that are written whole or not at all."""

import os
import signal
import stat
import subprocess
import sys

import pytest
from support import ROOT

from gotunnel_agent.common import atomic_file


def test_new_file_takes_the_place_of_the_old_one(tmp_path):
    path, new = tmp_path / "file", tmp_path / ".new"
    path.write_bytes(b"old")
    path.chmod(0o644)
    new.write_bytes(b"left by a writer that was killed")
    atomic_file.write(path, b"content", new=new)
    assert path.read_bytes() == b"content"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert os.listdir(tmp_path) == ["file"]


def test_mode_is_that_of_the_new_file_from_its_first_byte(tmp_path):
    sizes = []

    def prepare(descriptor):
        sizes.append(os.fstat(descriptor).st_size)
        os.fchmod(descriptor, 0o640)

    atomic_file.write(tmp_path / "file", b"c", new=tmp_path / "new", mode=0o400, prepare=prepare)
    assert sizes == [0]
    assert stat.S_IMODE((tmp_path / "file").stat().st_mode) == 0o640


def test_both_the_file_and_its_folder_are_flushed_to_the_disk(tmp_path, monkeypatch):
    flushed = []

    def fsync(descriptor):
        inode = os.fstat(descriptor).st_ino
        flushed.append((inode, sorted(os.listdir(tmp_path))))

    monkeypatch.setattr(os, "fsync", fsync)
    atomic_file.write(tmp_path / "file", b"content", new=tmp_path / "new")
    file = (tmp_path / "file").stat().st_ino
    assert flushed == [(file, ["new"]), (tmp_path.stat().st_ino, ["file"])]


@pytest.mark.parametrize("failing", ["fsync", "replace"])
def test_failed_write_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch, failing):
    def fail(*arguments):
        raise OSError(28, "No space left on device")

    (tmp_path / "file").write_bytes(b"old")
    monkeypatch.setattr(os, failing, fail)
    with pytest.raises(OSError, match="No space left"):
        atomic_file.write(tmp_path / "file", b"content", new=tmp_path / "new")
    assert os.listdir(tmp_path) == ["file"]
    assert (tmp_path / "file").read_bytes() == b"old"


def test_link_at_the_place_of_the_new_file_is_not_followed(tmp_path):
    (tmp_path / "other").write_bytes(b"another's")
    (tmp_path / "new").symlink_to(tmp_path / "other")
    atomic_file.write(tmp_path / "file", b"content", new=tmp_path / "new")
    assert (tmp_path / "other").read_bytes() == b"another's"
    assert not (tmp_path / "file").is_symlink()


KILLED = """
import os, pathlib, signal, sys
from gotunnel_agent.common import atomic_file
os.replace = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
folder = pathlib.Path(sys.argv[1])
atomic_file.write(folder / "file", b"content", new=folder / "new")
"""


def test_killed_writer_leaves_the_old_file(tmp_path):
    (tmp_path / "file").write_bytes(b"old")
    killed = subprocess.run([sys.executable, "-c", KILLED, tmp_path], cwd=ROOT, timeout=30)
    assert killed.returncode == -signal.SIGKILL
    assert (tmp_path / "file").read_bytes() == b"old"
    atomic_file.write(tmp_path / "file", b"next", new=tmp_path / "new")
    assert os.listdir(tmp_path) == ["file"] and (tmp_path / "file").read_bytes() == b"next"
