"""Reading what other programs, and people, have put there: certificates, keys, notes of ours.

A FIFO would make us wait for a program that writes into it, a device such as /dev/zero has no end,
and a certificate may be wrong in more ways than its bytes show at first. So read() takes regular
files of bounded size only, and waits for nothing but the disk; MALFORMED are the errors of
looking into a certificate.
"""

import errno
import os
import stat
import warnings
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm

MOST_BYTES = 256 * 1024  # of a file; a key and a long chain are some 10 KiB

# What cryptography raises over certificates and keys that make no sense; some only when a field
# of one that was loaded is asked for.
MALFORMED = (
    ValueError, TypeError, UnsupportedAlgorithm, x509.DuplicateExtension, x509.ExtensionNotFound,
    x509.InvalidVersion, x509.UnsupportedGeneralNameType,
)  # fmt: skip

# A common name may be longer than X.509 has it, as some companies' are; nobody reads it here.
warnings.filterwarnings("ignore", "Attribute's length must be", UserWarning)


class Unfit(OSError):
    """This is no file for us, and will be none later: `strerror` says why."""


def read(path: str | Path) -> bytes:
    """All of a regular file. Raises Unfit for what is none, or is too long; else OSError."""
    with open(path, "rb", opener=_open_at_once) as file:  # refuses a folder
        if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            raise Unfit(errno.EINVAL, "not a regular file", str(path))
        content = file.read(MOST_BYTES + 1)
    if len(content) > MOST_BYTES:
        raise Unfit(errno.EFBIG, f"longer than {MOST_BYTES} bytes", str(path))
    return content


def _open_at_once(path, flags):
    return os.open(path, flags | os.O_NONBLOCK)  # which only a FIFO and a device ever notice
