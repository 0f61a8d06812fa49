"""Files with secrets that other users can read or replace."""

import os
import socket

import pytest

from gotunnel_agent.common import exposed
from gotunnel_agent.common.exposed import exposures, open_folders, shown_path


@pytest.fixture
def file(tmp_path):
    file = tmp_path / "token"
    file.write_text("a secret")
    file.chmod(0o600)
    return file


@pytest.mark.parametrize("mode", [0o600, 0o400, 0o640, 0o660, 0o711, 0o000])
def test_a_file_for_its_owner_and_a_group_is_fine(file, mode):
    file.chmod(mode)
    assert exposures([file, str(file)]) == []


@pytest.mark.parametrize(
    ("mode", "words"),
    [
        (0o644, "has mode 0644: everybody on this machine may read the secrets"),
        (0o604, "has mode 0604: everybody on this machine may read the secrets"),
        (0o602, "has mode 0602: everybody on this machine may change the secrets"),
        (0o4666, "has mode 4666: everybody on this machine may read and change the secrets"),
    ],
)
def test_an_open_file_is_one_line_with_its_mode_and_what_to_do(file, mode, words):
    file.chmod(mode)
    [line] = exposures([file])
    assert line.startswith(f"{file} {words}") and line.endswith(f"; chmod o-rwx {file}")
    assert "a secret" not in line
    file.chmod(mode & ~0o7)  # what the line says
    assert exposures([file]) == []


def test_a_folder_in_which_others_can_replace_it_is_told_once(file, tmp_path):
    other = tmp_path / "other"
    other.write_text("")
    other.chmod(0o600)
    tmp_path.chmod(0o777)
    [line] = exposures([file, other])
    assert line.startswith(f"{tmp_path} has mode 0777: everybody on this machine may put another")
    assert line.endswith(f"chmod o-w {tmp_path}")
    assert open_folders([file]) == exposures([file])
    for mode in (0o1777, 0o775, 0o755):  # as /tmp; a group's; the usual one
        tmp_path.chmod(mode)
        assert exposures([file, other]) == []


def test_of_a_link_its_own_folder_and_the_files_count(file, tmp_path):
    folder = tmp_path / "links"
    folder.mkdir()
    link = folder / "link"
    link.symlink_to(file)
    file.chmod(0o644)
    assert [line.split()[0] for line in exposures([link])] == [str(link)]
    file.chmod(0o600)
    folder.chmod(0o777)
    assert [line.split()[0] for line in exposures([link])] == [str(folder)]
    folder.chmod(0o700)
    tmp_path.chmod(0o777)
    assert [line.split()[0] for line in exposures([link])] == [str(tmp_path)]


def test_what_is_no_file_or_gone_has_no_line(tmp_path):
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    fifo.chmod(0o666)
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(tmp_path / "socket"))
        (tmp_path / "socket").chmod(0o666)
        names = [fifo, tmp_path / "socket", tmp_path / "none", os.devnull, tmp_path]
        assert exposures(names) == []


def test_modes_of_a_system_that_has_none_say_nothing(file, monkeypatch):
    file.chmod(0o666)
    monkeypatch.setattr(exposed.os, "name", "nt")
    assert exposed._open_file(file) is None
    monkeypatch.undo()
    assert exposed._open_file(file) is not None


@pytest.mark.parametrize(
    "text", ["none", "/run/secrets/of-the-gateway", "./secrets-of-the-gateway", "../a-file-of-us"]
)
def test_a_path_is_shown(text):
    assert shown_path(text) == repr(text)


@pytest.mark.parametrize(
    "text", ["0123456789abcdef" * 4, "eyJhbGciOi.eyJpc3MiOi.c2ln", "a/b+" * 11]
)
def test_what_may_be_the_secret_itself_is_not_shown_unless_there_is_such_a_file(
    text, tmp_path, monkeypatch
):
    assert text not in shown_path(text) and "is this the secret itself?" in shown_path(text)
    if "/" not in text:
        monkeypatch.chdir(tmp_path)
        (tmp_path / text).write_text("")
        assert shown_path(text) == repr(text)
