"""What somebody may have meant who has typed something else."""

from collections.abc import Iterable
from importlib import import_module


def nearest(word: str, known: Iterable[str], alike: float = 0.6) -> str | None:
    """The one of ``known`` that is most like ``word``; None if none is ``alike`` enough (difflib's
    ratio, 0 to 1). The time is quadratic in the length of ``word``."""
    # Loaded here, as most processes never read a word that they do not know.
    near: list[str] = import_module("difflib").get_close_matches(word, known, n=1, cutoff=alike)
    return near[0] if near else None
