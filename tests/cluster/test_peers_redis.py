"""Two gateways that are one by CLUSTER: a visit to an agent that knows only the other one."""

import base64
import contextlib
import http.client
import json

import pytest
from hand_made import answering, registered
from support import APP, GATEWAY_HOST, RAW, answer, gateway_here, request, routes_of, wait_until

from gotunnel import read_data_header
from gotunnel_server.status import document_of

pytest.importorskip("redis", reason="the Python package redis is missing")


@pytest.fixture
def two(redis_server, tmp_path_factory):
    folder = tmp_path_factory.mktemp("cluster")
    key = folder / "key"
    key.write_bytes(base64.urlsafe_b64encode(bytes(range(32))))
    key.chmod(0o600)
    settings = {
        "CLUSTER": redis_server.url, "CLUSTER_KEY_FILE": str(key), "METRICS_PORT": "auto",
    }  # fmt: skip
    with contextlib.ExitStack() as stack:
        gateways = [
            stack.enter_context(gateway_here(folder / name, **settings)) for name in ("a", "b")
        ]
        peers = [gateway.inner.cluster.peers for gateway in gateways]
        wait_until(lambda: all(each.figures()[:3] == (1, 1, 1) for each in peers))
        yield gateways


def fetch(port, path):
    connection = http.client.HTTPConnection("127.0.0.1", port)
    with contextlib.closing(connection):
        connection.request("GET", path)
        return connection.getresponse().read().decode()


@pytest.mark.slow  # a new cluster grants its first hostname after some seconds
def test_a_visit_is_passed_on_and_shown_everywhere(two):
    here, there = two
    with registered(there, APP, RAW, modes={RAW: "tcp"}) as agent, answering(agent):
        inner = here.inner
        wait_until(lambda: {APP, RAW} <= set(inner.cluster.elsewhere()))
        assert not routes_of(inner)
        wait_until(lambda: inner.keeper.state(APP).name.value == "ready")
        with here.dial(APP) as visitor:
            visitor.send(request())
            stream = agent.session.accept(20)
            assert read_data_header(lambda count: stream.read_exactly(count, 20))[0] == APP
            stream.write(answer(b"from the other one"))
            assert visitor.read_message()[1] == b"from the other one"
        document = document_of(
            inner.tunnels.shown(), inner.own_names, inner.keeper.state,
            cluster=inner.cluster.describe(), elsewhere=inner.cluster.elsewhere(),
        )  # fmt: skip
        rows = {row["hostname"]: row for row in document["hostnames"]}
        host = there.inner.cluster.members()[there.inner.cluster.id].host
        assert rows[APP]["agent"] == f"test via {host}" and rows[RAW]["mode"] == "tcp"
        assert document["sessions"] == []
        json.dumps(document)
        public = fetch(here.dashboard_port, "/")
        assert APP in public and "via" not in public
        figures = fetch(inner.metrics_port, "/metrics")
        assert "gotunnel_cluster_hostnames_elsewhere 2\n" in figures
        assert 'gotunnel_cluster_passed_on_total{direction="out"} 1\n' in figures
        assert 'gotunnel_cluster_peers{direction="in"} 1\n' in figures
        figures = fetch(there.inner.metrics_port, "/metrics")
        assert 'gotunnel_cluster_passed_on_total{direction="in"} 1\n' in figures
        assert GATEWAY_HOST not in rows
    wait_until(lambda: not inner.cluster.elsewhere())
