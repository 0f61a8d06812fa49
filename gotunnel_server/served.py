"""Tells a gateway which hostnames its predecessor served, by a small file in ACME_CACHE.

A gateway that has just started knows no agent, though the agents are about to dial. Visits of the
hostnames in the file wait for them (visitors/waiting.py). The stored certificates could not tell
which hostnames those are: some are of hostnames that were last served months ago, and a wildcard
certificate does not say which of its hostnames were.
"""

import json
import logging
import os
import threading
from pathlib import Path

from gotunnel_agent.common import atomic_file, small_file

from .routes import MOST_LEFT, Registry

log = logging.getLogger("gotunnel.served")

FILE = "served.json"  # hostname to mode
MAX_FILE = 2 * 1024 * 1024  # bytes: MOST_LEFT hostnames of 253 characters take half of it


class ServedFile:
    """The file in ACME_CACHE. Any thread."""

    def __init__(self, folder: Path, registry: Registry):
        """Have the ``registry`` expect what the predecessor served, if that can be read."""
        self._path = folder / FILE
        self._registry = registry
        self._written: dict[str, str] | None = None
        self._lock = threading.Lock()  # held to write: threads of a process share the file's name
        self._read()

    def _read(self) -> None:
        try:
            found = json.loads(small_file.read(self._path, MAX_FILE))
            modes = {name: mode for name, mode in found.items() if isinstance(name, str)}
        except FileNotFoundError:
            return
        except (OSError, ValueError, AttributeError, RecursionError) as error:
            log.warning("%s cannot be read (%s): visits do not wait for agents that were connected "
                        "before this start", self._path, error)  # fmt: skip
            return
        self._registry.expect(modes)

    def write(self) -> None:
        """Write what is served, or awaited, if it has changed. May wait for the disk."""
        served = dict(sorted(self._registry.modes().items())[:MOST_LEFT])
        with self._lock:
            self._write(served)

    def _write(self, served: dict[str, str]) -> None:
        if served == self._written:
            return
        try:
            self._path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            # By process: several may share the folder (PROCESSES).
            new = self._path.with_name(f".{FILE}.{os.getpid()}.new")
            atomic_file.write(self._path, json.dumps(served).encode(), new=new)
        except OSError as error:
            log.debug("%s cannot be written: %s", self._path, error)
            return
        self._written = served
