"""Finds files with secrets that other users of this machine can read or replace, and says what to
do.

Only the file's own mode counts, as for SSH keys: if only the folder's mode protects a file, a copy
elsewhere is readable. The file's group may read it, because service managers share secrets that
way; other users may not. Where modes mean nothing (Windows), nothing is found.
"""

import os
import stat
from collections.abc import Callable, Iterable

# Characters. A "path" of this length or more that does not exist may be the secret itself, written
# where the name of its file should be.
LONG = 16


def shown_path(path: str) -> str:
    """The path of a secret's file, quoted for a message; not shown if it may be the secret."""
    is_path = path.startswith(("./", "../")) or os.path.isabs(path)
    if is_path or len(path) < LONG or "\0" in path or os.path.lexists(path):
        return repr(path)
    return "(not shown: is this the secret itself?)"


def exposures(files: Iterable[str | os.PathLike[str]]) -> list[str]:
    """A line for each of ``files`` that everybody can read or write, and the lines of
    open_folders(). Files that are gone or not regular have none."""
    files = list(files)
    return [line for file in files if (line := _open_file(file))] + open_folders(files)


def open_folders(files: Iterable[str | os.PathLike[str]]) -> list[str]:
    """A line for each folder in which everybody can replace one of ``files``. For a symbolic link
    that is its own folder and its target's."""
    lines = {}  # by folder: one folder may hold several of the files
    for file in files:
        for place in (os.fspath(file), os.path.realpath(file)):
            folder, name = os.path.dirname(place) or os.curdir, os.path.basename(place)
            mode = _mode(folder, stat.S_ISDIR)
            # In a sticky folder, such as /tmp, only its owner can replace a file.
            if mode & stat.S_IWOTH and not mode & stat.S_ISVTX:
                lines[folder] = (
                    f"{folder} has mode {mode:04o}: everybody on this machine may put another file "
                    f"in the place of {name}; chmod o-w {folder}"
                )
    return list(lines.values())


def _open_file(file: str | os.PathLike[str]) -> str | None:
    mode = _mode(file, stat.S_ISREG)
    rights = [right for bit, right in ((stat.S_IROTH, "read"), (stat.S_IWOTH, "change"))
              if mode & bit]  # fmt: skip
    if not rights:
        return None
    return (
        f"{file} has mode {mode:04o}: everybody on this machine may {' and '.join(rights)} the "
        f"secrets in it; chmod o-rwx {file}"
    )


def _mode(path: str | os.PathLike[str], is_kind: Callable[[int], bool]) -> int:
    """The mode of a file of that kind; 0 (no rights) for any other, such as a shell's pipe, and
    where modes mean nothing."""
    try:
        mode = os.stat(path).st_mode
    except OSError:  # gone: the code that needs the file reports it
        return 0
    return stat.S_IMODE(mode) if os.name == "posix" and is_kind(mode) else 0
