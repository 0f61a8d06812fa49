"""Where a running inspector listens, and its token: a file in its user's folder for states.

So `gotunnel inspect` finds it. The file is the user's alone (0600), like the agent's other secrets,
and goes when the agent ends. An agent that was killed leaves it behind: what does not answer counts
as not running.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
from pathlib import Path
from typing import NamedTuple

from ..common import atomic_file, small_file

log = logging.getLogger("gotunnel.place")

FILES = "inspector-{}.json"  # with the port
MOST_BYTES = 4096  # of a file


class Place(NamedTuple):
    """A running inspector. ``host`` is an IP address that it can be reached by from here."""

    host: str
    port: int
    token: str
    pid: int = 0

    @property
    def address(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{host}:{self.port}"

    @property
    def url(self) -> str:
        """The address for a browser, with the token."""
        return f"http://{self.address}/?token={self.token}"


def write(folder: Path, place: Place) -> None:
    """Tell other programs of the user where the inspector is. Without it, it works all the same."""
    path = folder / FILES.format(place.port)
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        new = path.with_name(f"{path.name}.{os.getpid()}.new")
        atomic_file.write(path, json.dumps(place._asdict()).encode(), new=new)
    except OSError as error:
        log.warning("%s cannot be written (%s); gotunnel inspect needs the address with --at",
                    path, error.strerror or error)  # fmt: skip


def remove(folder: Path, place: Place) -> None:
    """The inspector ends. Another one may listen there already: its file stays."""
    path = folder / FILES.format(place.port)
    found = _read(path)
    if found is not None and found.token == place.token:
        with contextlib.suppress(OSError):
            path.unlink()


def places(*folders: Path) -> list[Place]:
    """All that a file tells of, by port. They need not run."""
    found: list[Place] = []
    for folder in folders:
        with contextlib.suppress(OSError):  # another user's
            found += filter(None, map(_read, folder.glob(FILES.format("*"))))
    return sorted(found, key=lambda place: place.port)


def _read(path: Path) -> Place | None:
    """None for a file that is gone or broken."""
    try:
        document = json.loads(small_file.read_whole(path, MOST_BYTES))
        host, port, token = document["host"], document["port"], document["token"]
        if not (isinstance(host, str) and isinstance(token, str) and isinstance(port, int)):
            return None
        return Place(host, port, token, int(document.get("pid", 0)))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None
