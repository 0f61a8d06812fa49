"""What the tests of the wire share. See raw_peer.py."""

import pytest
from raw_peer import SOON

import gotunnel


@pytest.fixture(autouse=True)
def flushing_takes_longer_than_soon(request, monkeypatch):
    """What comes SOON came without a session's giving up, whose limit is shorter elsewhere. The
    page of the protocol is compared with the limit as it is."""
    if request.module.__name__ == "test_protocol_examples":
        return
    monkeypatch.setattr(gotunnel, "FLUSH_TIMEOUT", 2 * SOON)
