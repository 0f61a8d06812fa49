"""Writes a file whole or not at all, even if the process is killed or the power fails."""

import os
from collections.abc import Callable
from pathlib import Path


def write(
    path: Path, content: bytes, *, new: Path, mode: int = 0o600,
    prepare: Callable[[int], None] = lambda descriptor: None,
) -> None:  # fmt: skip
    """Put ``content`` at ``path`` in one step: a reader sees the old file or the new one.

    The content is written to ``new``, in the same folder, and then moved. A file that is at ``new``
    already was left by a writer that was killed, and is removed; so concurrent writers must use
    different names. ``prepare(descriptor)`` may set the new file's owner while it is still empty.
    Raises OSError; then the old file is unchanged, and nothing is left at ``new``.
    """
    new.unlink(missing_ok=True)
    try:
        with open(os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode), "wb") as file:
            prepare(file.fileno())
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(new, path)
    except BaseException:
        new.unlink(missing_ok=True)
        raise
    if os.name == "nt":  # a folder cannot be opened there
        return
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)  # else a power cut could undo the move
    finally:
        os.close(folder)
