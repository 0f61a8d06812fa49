"""Small files: whole, bounded, and never waited for."""

import contextlib
import os

import pytest

from gotunnel_agent.common import small_file

MOST = 100


@pytest.mark.parametrize("size", [0, 1, MOST, MOST + 1, 10 * MOST])
@pytest.mark.parametrize("piped", [False, True])
def test_the_content_and_a_byte_more_if_it_is_too_long(tmp_path, size, piped):
    with contextlib.ExitStack() as stack:
        path = tmp_path / "file"
        if piped:
            read, write = os.pipe()
            stack.enter_context(open(read, "rb"))
            path = f"/dev/fd/{read}"
        with open(write if piped else path, "wb") as file:
            file.write(b"x" * size)
        assert small_file.is_pipe(path) == piped
        assert small_file.read(path, MOST) == b"x" * min(size, MOST + 1)


@pytest.mark.parametrize("device, content", [("/dev/null", b""), ("/dev/zero", bytes(MOST + 1))])
def test_a_device_is_read_as_a_file(device, content):
    assert small_file.read(device, MOST) == content


@pytest.mark.parametrize("writer", [False, True])
def test_a_fifo_whose_writer_does_not_come_or_not_end_is_not_waited_for(
    tmp_path, monkeypatch, writer
):
    monkeypatch.setattr(small_file, "PIPE_TIMEOUT", 0.05)
    path = tmp_path / "fifo"
    os.mkfifo(path)
    with contextlib.ExitStack() as stack:
        if writer:
            both = os.open(path, os.O_RDWR)
            stack.callback(os.close, both)
            os.write(both, b"a part")
        with pytest.raises(OSError, match="its writer did not end within 0.05 s"):
            small_file.read(path, MOST)


@pytest.mark.parametrize("there, expected", [(True, IsADirectoryError), (False, FileNotFoundError)])
def test_a_folder_and_nothing_are_errors_that_say_so(tmp_path, there, expected):
    path = tmp_path if there else tmp_path / "none"
    with pytest.raises(expected) as caught:
        small_file.read(path, MOST)
    assert caught.value.strerror
    assert not small_file.is_pipe(path)
