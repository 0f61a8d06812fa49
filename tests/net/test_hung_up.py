"""Whether a peer has hung up, over every transport."""

import select

import pytest
from raw_peer import PATIENCE, duplexes, leaves_nothing  # noqa: F401 (fixtures)

from gotunnel_server.net.hung_up import hung_up


@pytest.mark.skipif(not hasattr(select, "POLLRDHUP"), reason="this system cannot tell")
def test_hung_up_is_seen_behind_bytes_that_nobody_reads(duplexes):
    left, right = duplexes
    right.write(b"unread")
    assert not hung_up(left)
    right.stop()
    assert hung_up(left)
    assert left.read(timeout=PATIENCE) == b"unread"
