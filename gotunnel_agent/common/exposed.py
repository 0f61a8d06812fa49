"""Files that hold secrets, and are open to others on this machine: which, and what to do.

Only modes count, as for the keys of SSH: a file that is closed by a folder above today is open
after a copy. A group may read a file, because that is how services are given one; everybody may
not. Where modes mean nothing (Windows), nothing is found.
"""

import os
import stat
from collections.abc import Iterable
from pathlib import Path

# Characters. A text of as many that was to be a path, and is none, may be a secret.
LONG = 16


def shown_path(path: str) -> str:
    """A path that was to lead to a secret, in quotes for a message; without what may be the secret
    itself, put where its file was to be named."""
    is_path = path.startswith(("./", "../")) or os.path.isabs(path)
    if is_path or len(path) < LONG or "\0" in path or os.path.lexists(path):
        return repr(path)
    return "(not shown: is this the secret itself?)"


def exposures(files: Iterable[str | os.PathLike]) -> list[str]:
    """A line for each file that everybody can read or write, and those of open_folders(). What is
    no regular file, or is gone, has none."""
    files = list(files)
    return [line for file in files if (line := _open_file(file))] + open_folders(files)


def open_folders(files: Iterable[str | os.PathLike]) -> list[str]:
    """A line for each folder in which everybody can put another file in the place of one of
    ``files``; a link is in two folders."""
    lines = {}  # by folder: one may hold several
    for file in map(Path, files):
        for place in (file, file.resolve()):
            mode = _mode(place.parent, stat.S_ISDIR)
            # In a sticky folder, such as /tmp, only the owner of a file can replace it.
            if mode & stat.S_IWOTH and not mode & stat.S_ISVTX:
                lines[place.parent] = (
                    f"{place.parent} has mode {mode:04o}: everybody on this machine may put "
                    f"another file in the place of {place.name}; chmod o-w {place.parent}"
                )
    return list(lines.values())


def _open_file(file):
    mode = _mode(file, stat.S_ISREG)
    rights = [right for bit, right in ((stat.S_IROTH, "read"), (stat.S_IWOTH, "change"))
              if mode & bit]  # fmt: skip
    if not rights:
        return None
    return (
        f"{file} has mode {mode:04o}: everybody on this machine may {' and '.join(rights)} the "
        f"secrets in it; chmod o-rwx {file}"
    )


def _mode(path, is_kind) -> int:
    """The mode of a file of a kind; 0, which is open to nobody, of any other, such as a pipe that
    a shell has made, and where modes mean nothing."""
    try:
        mode = os.stat(path).st_mode
    except OSError:  # the code that needs the file will say that it is gone
        return 0
    return stat.S_IMODE(mode) if os.name == "posix" and is_kind(mode) else 0
