"""What somebody else sends on the channels of a cluster: the gateway passes it over."""

from types import SimpleNamespace

import pytest

from gotunnel_server.cluster.cluster import Cluster
from gotunnel_server.routes import Registry

KINDS = ("ask", "alive", "free", "come", "leaving")
SENDERS = (None, [], {}, 5, "", "a\nb", "x" * 65, "{gotunnel}:all")


@pytest.fixture
def cluster(tmp_path):
    child = SimpleNamespace(number=1, secret=b"s" * 32, board=lambda: SimpleNamespace())
    config = SimpleNamespace(
        cluster=None, bind=("127.0.0.1",), stall_timeout=1, acme_cache=tmp_path
    )
    return Cluster(config, Registry(), child)


@pytest.mark.parametrize("kind", [*KINDS, "told"])
@pytest.mark.parametrize("sender", SENDERS, ids=range(len(SENDERS)))
def test_a_message_needs_a_sender_that_could_be_a_member(cluster, caplog, kind, sender):
    """It is kept, logged and used as a key."""
    told = []
    cluster.on("told", told.append)
    cluster._heard({"do": kind, "from": sender, "names": ["a.test"]})
    assert not told and "bug" not in caplog.text


@pytest.mark.parametrize(
    "names",
    [None, 5, {}, [[]], [{}, None, 5], ["a.test"], "a.test", [[5, "http"], ["a.test", []]]],
)
@pytest.mark.parametrize("kind", KINDS)
def test_a_message_of_somebody_unknown_does_no_harm(cluster, caplog, kind, names):
    cluster._heard({"do": kind, "from": "deadbeef", "names": names})
    assert "bug" not in caplog.text


@pytest.mark.parametrize("do", [None, [], {}, 5, "", "x" * 1000])
def test_a_message_of_an_unknown_kind_is_passed_over(cluster, caplog, do):
    cluster._heard({"do": do, "from": "deadbeef"})
    assert "bug" not in caplog.text
