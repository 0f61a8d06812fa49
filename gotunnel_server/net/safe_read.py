"""Reads files that people and other programs have written, such as certificates, without getting
stuck.

Opening a FIFO would wait for a writer, and a device such as /dev/zero has no end. So read() takes
regular files of bounded size only, and waits for nothing but the disk. MALFORMED lists the
exceptions that a broken certificate causes, some only when one of its fields is read.
"""

import errno
import os
import stat
import warnings
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm

MOST_BYTES = 256 * 1024  # of a file; a key and a long chain have some 10 KiB

# What cryptography raises for broken certificates and keys, some of it only when a field of a
# loaded certificate is read.
MALFORMED = (
    ValueError, TypeError, UnsupportedAlgorithm, x509.DuplicateExtension, x509.ExtensionNotFound,
    x509.InvalidVersion, x509.UnsupportedGeneralNameType,
)  # fmt: skip

# Some companies' common names are longer than X.509 allows. The gateway does not use common names.
warnings.filterwarnings("ignore", "Attribute's length must be", UserWarning)


class Unfit(OSError):
    """Not a regular file, or too long: reading it again will not help. `strerror` says why."""


def read(path: str | Path) -> bytes:
    """The content of a regular file. Raises Unfit if it is none or is too long; else OSError."""
    with open(path, "rb", opener=_open_at_once) as file:  # refuses a folder
        if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            raise Unfit(errno.EINVAL, "not a regular file", str(path))
        content = file.read(MOST_BYTES + 1)
    if len(content) > MOST_BYTES:
        raise Unfit(errno.EFBIG, f"longer than {MOST_BYTES} bytes", str(path))
    return content


def _open_at_once(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NONBLOCK)  # no effect on regular files
