"""Three gateways on one Redis, or three processes, and a real CA (Pebble): a hostname is ordered
once, any gateway answers the CA, and all serve what one has ordered or renewed."""

import contextlib
import ssl

import pytest
from pebble import pebble
from support import (
    APP,
    GATEWAY_HOST,
    TUNNEL_HOST,
    agent_here,
    agent_process,
    ca_of,
    dial_tls,
    gateway_environment,
    gateway_here,
    gateway_process,
    reserved_port,
    wait_until,
)

from gotunnel_server import gateway as gateway_module
from gotunnel_server.admin.certificates import ask_renewal, find_rows
from gotunnel_server.certs import acme
from gotunnel_server.certs.local_ca import Authority
from gotunnel_server.cluster import local_copy
from gotunnel_server.cluster.sealed import new_key
from gotunnel_server.config import load

pytestmark = pytest.mark.slow
TICK = 0.1  # seconds between two looks


class Trio:
    """Gateways c, a and b. The CA validates at the ports of c, which never orders."""

    def __init__(self, orders, environment):
        self.gateways, self.orders, self.environment = [], orders, environment

    def serial_of_all(self):
        """The serial number of what all gateways serve; None while they differ."""
        found = {serial(gateway, APP) for gateway in self.gateways}
        return found.pop() if len(found) == 1 else None


def serial(gateway, hostname):
    try:
        with contextlib.closing(dial_tls(gateway.public_port, hostname, gateway.context)) as wire:
            return wire.sock.getpeercert()["serialNumber"]
    except (ssl.SSLError, ConnectionError):
        return None


def give(own, authority):
    """Make CERT_DIR for the gateways' own names, which no CA has to sign then."""
    own.mkdir(mode=0o700)
    for hostname in (GATEWAY_HOST, TUNNEL_HOST):
        for file in authority.issue(hostname):
            (own / file.name).write_bytes(file.read_bytes())
            (own / file.name).chmod(0o600)


def never_orders(ordered):
    """Have a gateway leave the orders, and the operator's requests for them, to the others."""
    ordered.issuer.stop()
    ordered._store.renewals = list


@contextlib.contextmanager
def trio(tmp_path, server, monkeypatch, *, http):
    orders = []
    real = acme.Ca._new_order

    def counted(self, ca, hostname, replaces):
        orders.append(hostname)
        return real(self, ca, hostname, replaces)

    monkeypatch.setattr(acme.Ca, "_new_order", counted)
    monkeypatch.setattr(gateway_module, "RELOAD", TICK)  # or each look would be awaited for seconds
    monkeypatch.setattr(local_copy, "LOOK", TICK)
    key = tmp_path / "key"
    key.write_text(new_key())
    key.chmod(0o600)
    own, authority = tmp_path / "own", Authority(tmp_path / "authority")
    give(own, authority)
    with contextlib.ExitStack() as stack:
        plain, public = (stack.enter_context(reserved_port()) for _ in range(2))
        ca = stack.enter_context(pebble(tmp_path / "pebble", plain, public))
        house = Trio(orders, {
            "ACME_ENV": "production", "ACME_DIRECTORY": ca.directory,
            "ACME_CA_FILE": str(ca.ca_file), "CERT_DIR": str(own), "CLUSTER": server.url,
            "CLUSTER_KEY_FILE": str(key), "HTTP_PORT": "0",
        })  # fmt: skip
        ports = {"HTTP_PORT": str(plain), "GATEWAY_PORT": str(public)}
        for name in "cab":
            cache = tmp_path / name
            (cache / "local").mkdir(parents=True)
            ca_of(cache).write_text(ca.root() + authority.ca_file.read_text())
            more = ports if name == "c" else {}
            if http:
                more = {"HTTP_PORT": "auto", **more}
            elif more:
                more = {**more, "HTTP_PORT": "0"}
            house.gateways.append(
                stack.enter_context(gateway_here(cache, **{**house.environment, **more}))
            )
            never_orders(house.gateways[0].inner.keeper._ordered)
        for gateway in house.gateways:
            wait_until(lambda gateway=gateway: len(gateway.inner.cluster.members()) == 3)
        yield house


@pytest.mark.parametrize(
    "http", [True, pytest.param(False, marks=pytest.mark.long)], ids=["http-01", "tls-alpn-01"]
)
def test_a_hostname_is_ordered_and_renewed_once_and_another_gateway_answers_the_ca(
    tmp_path, redis_server, monkeypatch, origin, http
):
    with trio(tmp_path, redis_server, monkeypatch, http=http) as house:
        with agent_here(house.gateways[1], tmp_path, {APP: origin.port}):
            first = wait_until(lambda: house.serial_of_all())
            assert house.orders == [APP]
            config = load(None, gateway_environment(tmp_path / "elsewhere", **house.environment))
            [row] = [row for row in find_rows(config) if row.name == APP]
            assert row.source == "ACME" and row.ends_at is not None and not row.error
            assert "one of the running gateways renews it" in ask_renewal(config, APP)
            wait_until(lambda: house.serial_of_all() not in (None, first))
        assert house.orders == [APP, APP]
        assert not (tmp_path / "elsewhere").exists()
        found = house.serial_of_all()
        redis_server.kill()
        with gateway_here(tmp_path / "b", **house.environment) as alone:
            assert serial(alone, APP) == found is not None


@pytest.mark.long
@pytest.mark.parametrize("http", [True, False], ids=["http-01", "tls-alpn-01"])
def test_processes_order_each_hostname_once_and_all_of_them_answer_the_ca(tmp_path, origin, http):
    """Without Redis: the CA reaches one of three processes by chance, and validates three times."""
    own, authority = tmp_path / "own", Authority(tmp_path / "authority")
    give(own, authority)
    names = [f"n{number}.localhost" for number in range(6)]
    with contextlib.ExitStack() as stack:
        plain, public = (stack.enter_context(reserved_port()) for _ in range(2))
        ca = stack.enter_context(pebble(tmp_path / "pebble", plain, public))
        cache = tmp_path / "cache"
        (cache / "local").mkdir(parents=True)
        ca_of(cache).write_text(ca.root() + authority.ca_file.read_text())
        gateway = stack.enter_context(gateway_process(
            cache, PROCESSES="3", ACME_ENV="production", ACME_DIRECTORY=ca.directory,
            ACME_CA_FILE=str(ca.ca_file), CERT_DIR=str(own), GATEWAY_PORT=str(public),
            HTTP_PORT=str(plain) if http else "0"))  # fmt: skip
        gateway.program.wait_for("all 3 processes are ready$")
        with agent_process(gateway, tmp_path, dict.fromkeys(names, origin.port), ready=False):
            for name in names:  # at whichever process the visitor comes
                wait_until(lambda name=name: all(serial(gateway, name) for _ in range(12)))
        ordered = [line for line in gateway.program.lines if "certificate until" in line]
        assert len(ordered) == len(names)
        assert not [line for line in gateway.program.lines if "no certificate" in line]
