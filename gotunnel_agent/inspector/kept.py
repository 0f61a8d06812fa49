"""What is kept of a body."""

from typing import NamedTuple


class Kept(NamedTuple):
    """The beginning of a body, and the size of the whole in bytes, as far as it has come."""

    data: bytes = b""
    size: int = 0

    @property
    def whole(self) -> bool:
        """Whether all that has come is kept."""
        return len(self.data) == self.size
