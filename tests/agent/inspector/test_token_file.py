"""The files with the inspector's tokens."""

import os
import stat

import pytest

from gotunnel_agent.inspector.access import TOKEN
from gotunnel_agent.inspector.token_file import kept_token


def test_a_token_has_256_bits_and_stays_that_of_its_port(tmp_path):
    token = kept_token(tmp_path / "state", 4040)
    assert TOKEN.fullmatch(token)
    assert kept_token(tmp_path / "state", 4040) == token
    assert kept_token(tmp_path / "state", 4041) != token


def test_nothing_is_left_beside_the_file(tmp_path):
    kept_token(tmp_path, 4040)
    assert [each.name for each in tmp_path.iterdir()] == ["inspect-4040.token"]


@pytest.mark.skipif(os.name == "nt", reason="Windows has no modes")
def test_only_the_user_can_read_it(tmp_path):
    kept_token(tmp_path / "state", 4040)
    assert stat.S_IMODE((tmp_path / "state").stat().st_mode) == 0o700
    [file] = (tmp_path / "state").iterdir()
    assert stat.S_IMODE(file.stat().st_mode) == 0o600


@pytest.mark.skipif(os.name == "nt", reason="Windows has no modes")
@pytest.mark.parametrize("mode", [0o640, 0o604, 0o660])
def test_a_token_that_others_could_read_is_replaced(tmp_path, mode):
    token = kept_token(tmp_path, 4040)
    [file] = tmp_path.iterdir()
    file.chmod(mode)
    assert kept_token(tmp_path, 4040) != token
    assert stat.S_IMODE(file.stat().st_mode) == 0o600


@pytest.mark.skipif(os.name == "nt", reason="links need a right there")
def test_a_link_is_replaced_and_what_it_leads_to_stays(tmp_path):
    other = tmp_path / "other"
    other.write_text("t" * 43)
    os.symlink(other, tmp_path / "inspect-4040.token")
    assert kept_token(tmp_path, 4040) != "t" * 43
    assert other.read_text() == "t" * 43
    assert not (tmp_path / "inspect-4040.token").is_symlink()


@pytest.mark.parametrize(
    "content", [b"", b"short", b"t" * 42, b"t" * 44, b"t" * 42 + b"\xff", b"t" * 500, b"\0" * 43]
)
def test_a_file_that_is_none_of_ours_is_replaced(tmp_path, content):
    file = tmp_path / "inspect-4040.token"
    file.write_bytes(content)
    file.chmod(0o600)
    token = kept_token(tmp_path, 4040)
    assert TOKEN.fullmatch(token) and token.encode() != content
    assert kept_token(tmp_path, 4040) == token


def test_there_may_be_no_folder_to_write_to(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError):
        kept_token(tmp_path / "file" / "below", 4040)
