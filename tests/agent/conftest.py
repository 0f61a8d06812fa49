"""What tests of the agent share."""

import pytest

from gotunnel_agent import link as link_module


@pytest.fixture
def quick(monkeypatch):
    """Retries come at once, and old sessions end soon."""
    monkeypatch.setattr(link_module, "retry_delay", lambda *arguments: 0.05)
    monkeypatch.setattr(link_module, "OLD_LOOK", 0.1)
    monkeypatch.setattr(link_module, "OLD_QUIET", 0.3)
