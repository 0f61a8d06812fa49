"""Keeps the inspector's token: a file for each port in the agent's state folder, which only the
user can read.

The token of a port stays the same from one start of an agent to the next. So a page that is open in
a browser goes on when the agent comes back. To have a new token, remove the file and start the
agent.
"""

from __future__ import annotations

import os
import secrets
import stat
from pathlib import Path

from ..common import atomic_file, small_file
from .access import TOKEN, TOKEN_BYTES

FILE = "inspect-{}.token"  # with the port
MOST_FILE = 100  # bytes; ours have 44


def new_token() -> str:
    return secrets.token_urlsafe(TOKEN_BYTES)


def kept_token(folder: Path, port: int) -> str:
    """The token that the port had before; else a new one, which is written down. Raises OSError if
    it cannot be; then new_token() is as good, but for the next start."""
    file = folder / FILE.format(port)
    known = _read(file)
    if known:
        return known
    token = new_token()
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    new = file.with_name(f"{file.name}.{os.getpid()}.new")
    atomic_file.write(file, f"{token}\n".encode(), new=new)
    return token


def _read(file: Path) -> str:
    """What a file says; "" if there is none, or another user may have written or read it."""
    try:
        status = file.lstat()
        if not stat.S_ISREG(status.st_mode):
            return ""
        if os.name != "nt" and (status.st_uid != os.geteuid() or status.st_mode & 0o077):
            return ""
        token = small_file.read_whole(file, MOST_FILE).decode().strip()
    except (OSError, UnicodeDecodeError):
        return ""
    return token if TOKEN.fullmatch(token) else ""
