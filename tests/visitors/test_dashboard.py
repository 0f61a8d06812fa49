"""The dashboard: what it shows, and to whom."""

import collections
import http.client
from contextlib import closing
from types import SimpleNamespace

import pytest
from support import APP, GATEWAY_HOST, RAW, TIMEOUT, agent_here, gateway_here

from gotunnel_server.agents.credentials import Identity
from gotunnel_server.certs.state import FAILED, READY, WAITING, State
from gotunnel_server.routes import Route
from gotunnel_server.visitors import dashboard


def a_tunnel(issuer="", since=0.0, **modes):
    routes = {f"{name}.test": Route(f"{name}.test", mode, None) for name, mode in modes.items()}
    return SimpleNamespace(
        routes=routes, identity=Identity(issuer), since=since, failed=collections.Counter()
    )


def page(*tunnels, public_port=443, certificates=lambda hostname: State(READY)):
    return dashboard.render(tunnels, "gateway.test", public_port, "1.2.3", certificates)


def test_page_names_the_gateway_and_its_version():
    text = page()
    assert "gateway.test" in text and "1.2.3" in text and "No agent is connected" in text


def test_page_lists_hostnames_in_order_of_registration():
    text = page(a_tunnel(since=2, c="http"), a_tunnel(since=1, b="tcp", a="http"))
    assert "2 sessions, 3 hostnames" in text
    assert text.index("a.test") < text.index("b.test") < text.index("c.test")
    assert '<a href="https://a.test/">' in text
    assert '<a href="https://b.test' not in text  # tcp: a browser cannot open it


def test_page_shows_ports_and_visits_that_failed():
    tunnel = a_tunnel(a="tcp", b="tcp")
    tunnel.routes["a.test"] = tunnel.routes["a.test"]._replace(port=2222)
    tunnel.failed["b.test"] = 17
    text = page(tunnel)
    assert "port 2222" in text and "<td>17" in text


def test_page_shows_certificates_that_are_not_there():
    states = {"a.test": State(FAILED, "<no>"), "b.test": State(READY), "c.test": State(WAITING)}
    text = page(a_tunnel(a="http", b="http", c="tcp"), certificates=states.get)
    assert "certificate failed: &lt;no&gt;" in text
    assert 'class="waiting">certificate waiting' in text
    assert text.count('class="failed">certificate') == 1
    assert text.count("certificate ") == 2


def test_links_carry_a_port_that_is_not_the_usual_one():
    assert '<a href="https://a.test:8443/">' in page(a_tunnel(a="http"), public_port=8443)


def test_what_agents_say_of_themselves_is_escaped():
    assert "<script>" not in page(a_tunnel(issuer="<script>alert(1)</script>", a="http"))


@pytest.mark.parametrize(
    ("seconds", "words"),
    [
        (-5, "just now"),
        (0, "just now"),
        (4.9, "just now"),
        (5, "5 seconds ago"),
        (59.9, "59 seconds ago"),
        (60, "1 minute ago"),
        (7199, "1 hour ago"),
        (7200, "2 hours ago"),
        (86400 * 3, "3 days ago"),
    ],
)
def test_length_of_time_in_its_largest_unit(monkeypatch, seconds, words):
    monkeypatch.setattr(dashboard, "time", lambda: 1000.0)
    assert words in page(a_tunnel(since=1000.0 - seconds, a="http"))


@pytest.fixture
def get(cache, tmp_path, origin):
    """Ask the dashboard of a gateway whose agent serves APP and RAW."""
    with gateway_here(cache) as gateway:
        ports = {"http": {APP: origin.port}, "tcp": {RAW: origin.port}}
        with agent_here(gateway, tmp_path, jwt_issuer="my agent", **ports):

            def get(path="/", host=GATEWAY_HOST, method="GET"):
                connection = http.client.HTTPConnection(
                    "127.0.0.1", gateway.dashboard_port, timeout=TIMEOUT
                )
                with closing(connection):
                    connection.request(method, path, headers={"Host": host})
                    answer = connection.getresponse()
                    return answer, answer.read().decode()

            yield get


def test_live_page_shows_what_is_registered(get):
    answer, text = get()
    assert answer.status == 200 and answer.getheader("Content-Type").startswith("text/html")
    assert APP in text and RAW in text and "my agent" in text and "1 session, 2 hostnames" in text
    assert "127.0.0.1" not in text  # no addresses


def test_host_may_carry_a_port_and_any_case(get):
    assert get(host=f"{GATEWAY_HOST.upper()}:8080")[0].status == 200


@pytest.mark.parametrize("host", [APP, "127.0.0.1", "localhost", f"evil.{GATEWAY_HOST}"])
def test_other_names_get_nothing(get, host):
    answer, text = get(host=host)
    assert answer.status == 403 and answer.getheader("X-Gotunnel-Error") == "wrong-host"
    assert APP not in text.replace(host, "")


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [("HEAD", "/", 200), ("GET", "/?x=1", 200), ("GET", "/other", 404), ("POST", "/", 405)],
)
def test_only_reading_the_one_page_is_possible(get, method, path, status):
    answer, text = get(path, method=method)
    assert answer.status == status
    assert (method == "HEAD") == (text == "")
