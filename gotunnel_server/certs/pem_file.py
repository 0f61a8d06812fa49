"""A file of PEM for OpenSSL, which reads certificates and keys from files only."""

import contextlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

# Linux: a file in memory (memfd_create) has a path in this folder. So no second copy of a private
# key is written to disk.
OUR_FILES = "/proc/self/fd"


@contextlib.contextmanager
def pem_file(pem: bytes) -> Iterator[Path]:
    """A file with that content, for the length of a block. Raises OSError, such as if no descriptor
    is left."""
    if hasattr(os, "memfd_create") and os.path.isdir(OUR_FILES):
        with open(os.memfd_create("pem"), "wb") as file:
            file.write(pem)
            file.flush()
            yield Path(OUR_FILES, str(file.fileno()))
    else:
        with tempfile.NamedTemporaryFile(prefix="gotunnel-", suffix=".pem") as file:  # mode 0600
            file.write(pem)
            file.flush()
            yield Path(file.name)
