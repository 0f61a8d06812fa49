"""Random names for tunnels, such as quick-otter-42, and the memory of those that were served.

A tunnel of the same kind, target, working folder and gateway asks for the name that it had before:
links, webhooks and certificates stay valid. The names lie in one small file. To lose it costs a
name and nothing else, so a broken file, or a folder that cannot be written, never stops a command.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import re
import secrets
from collections.abc import Iterator
from pathlib import Path
from time import monotonic, sleep
from typing import IO

from ..common import atomic_file, small_file

try:
    import fcntl
except ImportError:  # not a Unix
    fcntl = None  # type: ignore[assignment]  # mypy knows no module that may be missing

log = logging.getLogger("gotunnel.names")

# Short words that are easy to say and to spell, and that offend in no combination. With the numbers
# there are more than a million names. They are no secret: whoever knows the gateway can try them.
ADJECTIVES = """
    able agile alert amber ample azure basic bold brave breezy brief bright brisk calm candid
    cheery chief civil clean clear clever coral cosy crisp curious dapper daring deft eager early
    easy epic even exact fair fancy fast fine firm fleet fluent fond frank fresh frosty full gentle
    giant glad golden good grand great happy hardy honest humble ideal indigo jolly jovial keen
    kind large lilac lively local loyal lucid lucky lunar magic major mellow merry mighty mild
    misty modest neat nimble noble novel olive open patient pearl plain plucky polite prime proud
    quick quiet rapid ready royal ruby rustic sage serene sharp silent silver simple sleek smart
    smooth snowy solar solid sonic spry stable steady stellar sturdy sunny super swift teal tidy
    topaz true trusty upbeat valid velvet vivid warm wise witty zesty
""".split()
NOUNS = """
    acorn alder alpaca aspen aster badger bay beacon birch bison breeze brook canyon cedar cheetah
    clover cloud comet condor crane creek cricket curlew daisy delta dolphin dove dune eagle egret
    elk ember falcon fern ferret finch fjord forest fox gazelle gecko glade grove gull hare hawk
    hazel heron hill ibex ibis iris island jay kestrel kiwi koala lagoon lake larch lark lemur lily
    linnet lion llama lotus lynx magpie maple marmot marten meadow merlin moose moth newt oak ocean
    ocelot opal orca orchid osprey otter owl panda pebble pelican petrel pine plover pond poppy
    puffin puma quail rabbit raven reef ridge river robin rowan salmon seal shore sparrow spruce
    squirrel starling stork summit swallow swan tapir tern thrush tiger toucan trout tulip turtle
    valley violet walrus whale willow wombat wren yak zebra
""".split()
NUMBERS = range(10, 100)  # two digits: short, and each is said in one way

LABEL = re.compile(r"[a-z]{2,10}-[a-z]{2,10}-[0-9]{2}")  # what random_label() makes
FILE = "names.json"
MOST_TUNNELS = 200  # in the file; of more, those that were not served for the longest are forgotten
MOST_LABELS = 4  # of a tunnel: as many commands of one kind and target may run at once
MOST_BYTES = 64 * 1024  # of the file: twice what fits into it
KEY_LENGTH = 32  # characters of a SHA-256: what it was made of is nobody's business
# Seconds that a command waits for another one that is writing the file, which takes milliseconds.
LOCK_TIMEOUT = 2
LOCK_LOOK = 0.02  # seconds between two attempts
MOST_TRIES = 8  # labels that a command asks for, if other agents have the first ones


def random_label() -> str:
    """A label that is easy to say, such as quick-otter-42."""
    return f"{secrets.choice(ADJECTIVES)}-{secrets.choice(NOUNS)}-{secrets.choice(NUMBERS)}"


def key_of(*parts: str) -> str:
    """The key of a tunnel in the file: gateway, kind, target and folder, hashed."""
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:KEY_LENGTH]


class Labels:
    """The labels that one command asks for: those that its tunnel had, then random ones."""

    def __init__(self, memory: Memory, key: str, *, anew: bool = False):
        """``anew``: forget those that the tunnel had."""
        self._memory, self._key, self._anew = memory, key, anew
        self._left = [] if anew else memory.recall(key)
        self._tries = 0

    def another(self) -> str | None:
        """The next one to ask for; None after MOST_TRIES."""
        self._tries += 1
        if self._tries > MOST_TRIES:
            return None
        return self._left.pop(0) if self._left else random_label()

    def granted(self, label: str) -> None:
        """The gateway serves it: remember it."""
        self._memory.note(self._key, label, instead=self._anew)


class Memory:
    """The labels of tunnels, in a file of the user's. Several processes may use it at once."""

    def __init__(self, folder: Path):
        """``folder`` need not exist."""
        self._folder = folder
        self._path = folder / FILE

    def recall(self, key: str) -> list[str]:
        """The labels of a tunnel, in the order in which it got them; empty if there are none."""
        return self._read().get(key, [])

    def note(self, key: str, label: str, *, instead: bool = False) -> None:
        """A tunnel is served by this label. ``instead``: and not by its earlier ones."""
        try:
            self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            with _locked(self._folder / f"{FILE}.lock"):
                found = self._read()
                labels = found.pop(key, [])
                if instead:
                    labels = []
                if label not in labels:
                    labels = [*labels, label][-MOST_LABELS:]
                found[key] = labels  # as the last one, since it is the latest
                kept = dict(list(found.items())[-MOST_TUNNELS:])
                content = json.dumps({"names": kept}, indent=1).encode()
                atomic_file.write(self._path, content, new=self._folder / f"{FILE}.new")
        except OSError as error:
            log.warning("%s: the name %s cannot be remembered (%s); the next start gets another",
                        self._path, label, error.strerror or error)  # fmt: skip

    def _read(self) -> dict[str, list[str]]:
        """All that is remembered, the latest last. A broken file counts as an empty one."""
        try:
            content = small_file.read(self._path, MOST_BYTES)
        except FileNotFoundError:
            return {}
        except OSError as error:
            log.warning("%s cannot be read (%s); names start anew", self._path, error.strerror)
            return {}
        try:
            names = json.loads(content)["names"]
            if not all(map(_is_entry, names.items())):
                raise ValueError("an entry is wrong")
            return dict(names)
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
            log.warning("%s is broken; names start anew", self._path)
            return {}


def _is_entry(item: tuple[object, object]) -> bool:
    key, labels = item
    return (
        isinstance(key, str)
        and len(key) == KEY_LENGTH
        and isinstance(labels, list)
        and 1 <= len(labels) <= MOST_LABELS
        and all(isinstance(label, str) and LABEL.fullmatch(label) for label in labels)
    )


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold a file's lock during a ``with`` block. The system releases it if the process is killed.
    Raises OSError if another process has it for longer than LOCK_TIMEOUT."""
    deadline = monotonic() + LOCK_TIMEOUT
    with open(os.open(path, os.O_RDWR | os.O_CREAT, 0o600), "rb") as file:
        while not _lock(file):
            if monotonic() > deadline:
                raise TimeoutError(f"another process holds {path.name}")
            sleep(LOCK_LOOK)
        yield  # closing the file releases the lock


def _lock(file: IO[bytes]) -> bool:
    """Take the lock of an open file if it is free. Without locks (Windows, some network drives) it
    counts as free: then two commands that start in the same moment may forget a name."""
    try:
        if fcntl is not None:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        pass  # a file system without locks
    return True
