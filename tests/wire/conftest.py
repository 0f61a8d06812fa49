"""What the tests of the wire share. See raw_peer.py."""

import pytest
from raw_peer import SOON

import gotunnel


@pytest.fixture(autouse=True)
def flushing_takes_longer_than_soon(monkeypatch):
    """What comes SOON came without a session's giving up, whose limit is shorter elsewhere."""
    monkeypatch.setattr(gotunnel, "FLUSH_TIMEOUT", 2 * SOON)
