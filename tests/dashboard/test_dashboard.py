"""The dashboard: what it shows with a password and without, and to which requests it answers."""

import base64
import http.client
import re
import socket
from contextlib import closing, contextmanager

import pytest
from support import (
    APP,
    GATEWAY_HOST,
    RAW,
    TIMEOUT,
    agent_here,
    gateway_here,
    reserved_port,
    wait_until,
)

from gotunnel_server.net.listener import PortError
from gotunnel_server.visitors.basic_auth import FAILURES

PASSWORD = "correct horse"


def shown(html):
    """What a page shows of the state: its tables, and the data for its script."""
    return "".join(
        re.findall(r"<noscript>\n.*?</noscript>|id=\"state\">.*?</script>", html, re.DOTALL)
    )


@contextmanager
def asking(cache, tmp_path, origin, **changes):
    """Ask the dashboard of a gateway whose agent serves APP and RAW."""
    with gateway_here(cache, **changes) as gateway:
        ports = {"http": {APP: origin.port}, "tcp": {RAW: origin.port}}
        with agent_here(gateway, tmp_path, jwt_issuer="my agent", **ports):

            def get(path="/", host=GATEWAY_HOST, method="GET", password=None, user="", **fields):
                connection = http.client.HTTPConnection(
                    "127.0.0.1", gateway.dashboard_port, timeout=TIMEOUT
                )
                if password is not None:
                    code = base64.b64encode(f"{user}:{password}".encode()).decode()
                    fields["Authorization"] = f"Basic {code}"
                with closing(connection):
                    connection.request(method, path, headers={"Host": host, **fields})
                    answer = connection.getresponse()
                    return answer, answer.read().decode()

            yield get


@pytest.fixture
def get(cache, tmp_path, origin):
    with asking(cache, tmp_path, origin) as get:
        yield get


@pytest.fixture
def get_with_password(cache, tmp_path, origin):
    changes = {"DASHBOARD_PASSWORD": PASSWORD, "TRUSTED_PROXIES": "127.0.0.1"}
    with asking(cache, tmp_path, origin, **changes) as get:
        yield get


def test_live_page_without_a_password_shows_hostnames_and_modes(get):
    answer, text = get()
    assert answer.status == 200 and answer.getheader("Content-Type").startswith("text/html")
    text = shown(text)
    assert APP in text and RAW in text and ">tcp" in text and "Hostnames <b>2</b>" in text
    assert "my agent" not in text and "session" not in text and "Since" not in text
    assert "127.0.0.1" not in text  # no addresses
    assert answer.getheader("Cache-Control") == "no-store"


@pytest.mark.parametrize("user", ["", "admin", "müller"])
def test_live_page_with_the_password_shows_all_to_any_user(get_with_password, user):
    answer, text = get_with_password(password=PASSWORD, user=user)
    assert answer.status == 200
    assert PASSWORD not in text and "scrypt" not in text
    text = shown(text)
    assert APP in text and RAW in text and "my agent" in text and "Hostnames <b>2</b>" in text


@pytest.mark.parametrize("given", [{}, {"password": "wrong"}, {"password": PASSWORD[:-1]}])
def test_without_the_password_that_is_set_nothing_is_shown(get_with_password, given):
    answer, text = get_with_password(**given)
    assert answer.status == 401 and answer.getheader("WWW-Authenticate").startswith("Basic ")
    assert APP not in text and RAW not in text


def test_guesses_are_bounded_by_address(get_with_password):
    def guess(number, address):
        fields = {"X-Forwarded-For": address}
        return get_with_password(password=f"guess {number}", **fields)[0].status

    assert [guess(number, "192.0.2.1") for number in range(FAILURES + 2)] == (
        [401] * FAILURES + [429] * 2
    )
    right = {"password": PASSWORD, "X-Forwarded-For": "192.0.2.1"}
    assert get_with_password(**right)[0].status == 429  # the address is locked
    assert guess(0, "192.0.2.2") == 401
    right["X-Forwarded-For"] = "192.0.2.2"
    assert get_with_password(**right)[0].status == 200


def test_a_wrong_name_is_told_so_before_a_password_is_asked_for(get_with_password):
    answer, _ = get_with_password(host=f"evil.{GATEWAY_HOST}")
    assert answer.status == 403 and answer.getheader("WWW-Authenticate") is None


def test_http_visits_that_fail_are_counted(cache, tmp_path):
    with reserved_port() as port, gateway_here(cache, DASHBOARD_PASSWORD=PASSWORD) as gateway:
        with agent_here(gateway, tmp_path, http={APP: port}):
            assert [gateway.get(APP)[0] for _ in range(2)] == [502, 502]
            count = gateway.inner.recording.count
            wait_until(lambda: count(APP).visits == count(APP).failed == 2)
            assert (
                count(APP).sent > 1000 and "127.0.0.1" not in gateway.inner.recording.counts.all()
            )


def test_it_listens_where_dashboard_bind_says(cache):
    with gateway_here(cache, DASHBOARD_BIND="127.0.0.2") as gateway:
        port = gateway.dashboard_port
        with socket.create_connection(("127.0.0.2", port), TIMEOUT):
            pass
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(("127.0.0.1", port), TIMEOUT)
        assert f"dashboard: http://127.0.0.2:{port}/" in gateway.inner._facts


@pytest.mark.parametrize(
    ("settings", "urls"),
    [
        ({"DASHBOARD_BIND": "127.0.0.2,127.0.0.3"}, ["127.0.0.2", "127.0.0.3"]),
        ({"DASHBOARD_BIND": "127.0.0.1"}, [GATEWAY_HOST]),
        ({"DASHBOARD_BIND": "127.0.0.1", "GATEWAY_HOST": "www.example.com"},
         ["www.example.com", "127.0.0.1"]),
        ({"DASHBOARD_BIND": "0.0.0.0"}, [GATEWAY_HOST]),
    ],
)  # fmt: skip
def test_the_log_says_where_the_dashboard_can_be_opened(cache, settings, urls):
    with gateway_here(cache, **settings) as gateway:
        urls = " ".join(f"http://{host}:{gateway.dashboard_port}/" for host in urls)
        assert f"dashboard: {urls}" in gateway.inner._facts


def test_an_address_of_another_machine_is_blamed_on_dashboard_bind(cache):
    with pytest.raises(PortError, match="DASHBOARD_PORT .*; correct DASHBOARD_BIND"):
        with gateway_here(cache, DASHBOARD_BIND="203.0.113.1"):
            pass


def test_host_may_carry_a_port_and_any_case(get):
    assert get(host=f"{GATEWAY_HOST.upper()}:8080")[0].status == 200


@pytest.mark.parametrize(
    "host", ["localhost", "LOCALHOST.:8080", "127.0.0.1:8080", "[::1]:8080", "192.0.2.7"]
)
def test_names_that_no_page_elsewhere_can_have_are_good_too(get, host):
    answer, text = get(host=host)
    assert answer.status == 200 and APP in text


@pytest.mark.parametrize(
    "host",
    [APP, f"evil.{GATEWAY_HOST}", "localhost.evil.test", "127.0.0.1.evil.test", "2130706433"],
)
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
