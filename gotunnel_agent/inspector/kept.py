"""What is kept of a body."""

from typing import NamedTuple

# Messages are read by the threads of a visit, in a step for each frame, event, and so many bytes
# that are inflated. A step takes some microseconds, and a frame may have two bytes: so the steps of
# a visit are limited, or it would crawl, and all others with it (the GIL).
INFLATED_A_STEP = 16 * 1024
NO_LIMIT = 1 << 60
TOO_MANY = "messages came faster than they could be read"


class Kept(NamedTuple):
    """The beginning of a body, and the size of the whole in bytes, as far as it has come."""

    data: bytes = b""
    size: int = 0

    @property
    def whole(self) -> bool:
        """Whether all that has come is kept."""
        return len(self.data) == self.size
