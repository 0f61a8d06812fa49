"""Two gateways on one Redis: what they share is joined to the members' messages, both ways."""

import contextlib

import pytest
from support import dial_tls, gateway_here, wait_until

from gotunnel_server.agents.attempts import FREE_FAILURES
from gotunnel_server.cluster import counts
from gotunnel_server.cluster.sealed import new_key
from gotunnel_server.net.blocks import read_network

pytestmark = pytest.mark.slow
ADDRESS = "192.0.2.7"


@pytest.fixture
def two(tmp_path, redis_server, monkeypatch):
    monkeypatch.setattr(counts, "INTERVAL", 0.02)
    key = tmp_path / "key"
    key.write_text(new_key())
    key.chmod(0o600)
    settings = {
        "CLUSTER": redis_server.url, "CLUSTER_KEY_FILE": str(key),
        "DASHBOARD_PASSWORD": "correct horse battery staple",
    }  # fmt: skip
    with contextlib.ExitStack() as stack:
        found = [stack.enter_context(gateway_here(tmp_path / name, **settings)) for name in "ab"]
        for gateway in found:
            wait_until(lambda gateway=gateway: len(gateway.inner.cluster.members()) == 2)
        yield found


def test_two_gateways_count_block_and_sign_together(two):
    for one, other in (two, two[::-1]):
        for _ in range(FREE_FAILURES + 1):
            one.inner._newcomers.attempts.failed(one.ca_file.parent.parent.name)
        wait_until(lambda other=other, name=one.ca_file.parent.parent.name:
                   other.inner._newcomers.attempts.delay(name))  # fmt: skip
        mine, theirs = one.inner._showing.blocks, other.inner._showing.blocks
        mine.add(read_network(ADDRESS), 600, "scans", "")
        wait_until(lambda theirs=theirs: ADDRESS in theirs)
        theirs.remove(read_network(ADDRESS))
        wait_until(lambda mine=mine: ADDRESS not in mine)
        dial_tls(other.public_port, "gateway.localhost", one.context).close()  # one CA is trusted
