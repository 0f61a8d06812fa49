"""Several gateways that order from one CA, on one store: a folder that they share, or Redis. Each
hostname is ordered once, and refusals, pauses and rate limits hold for all together."""

import contextlib
import threading

import pytest
from fake_ca import NOW, Clock, FakeCa, Proofs
from fake_redis import FakeRedis
from issuer_house import APP, OTHER, URL, House, refused
from support import TIMEOUT

from gotunnel_server.certs.acme import Ca
from gotunnel_server.certs.acme_errors import ACCOUNT, LIMITED, CaError
from gotunnel_server.certs.cancel import Stop
from gotunnel_server.certs.folder import open_store
from gotunnel_server.certs.rate_limits import Bounds, Quota
from gotunnel_server.certs.schedule import DAY, HOUR, MINUTE
from gotunnel_server.certs.state import FAILED, READY
from gotunnel_server.certs.store import CertStore, StoreError
from gotunnel_server.cluster.locker import RedisLocker
from gotunnel_server.cluster.sealed import Sealer
from gotunnel_server.cluster.storage import RedisStorage


@pytest.fixture(params=["folder", "redis"])
def open_shared(request, tmp_path):
    """Opens the store for one more gateway."""
    redis = FakeRedis()

    def on_redis():
        locker = RedisLocker(redis, "gotunnel")
        storage = RedisStorage(redis, "gotunnel", Sealer([b"k" * 32]), locker)
        return CertStore(storage, locker, URL)

    def on_folder():
        return open_store(tmp_path / "cache", URL)

    return on_redis if request.param == "redis" else on_folder


@contextlib.contextmanager
def two(open_shared, folder, **bounds):
    """Two gateways with one clock and one CA."""
    more = {"open_store": open_shared, "bounds": Bounds(**bounds)}
    with House(folder, **more) as first:
        with House(folder, clock=first.clock, ca=first.ca, **more) as second:
            yield first, second


@pytest.fixture
def houses(open_shared, tmp_path):
    with two(open_shared, tmp_path) as houses:
        yield houses


def want(houses, *hostnames, agent=None):
    for house in houses:
        for hostname in hostnames:
            house.issuer.queue.want(hostname, agent)


def at(houses, seconds):
    """All orders at NOW + ``seconds``, of one gateway after the other."""
    return [order[0] for house in houses for order in house.at(seconds)]


def test_a_certificate_is_ordered_by_one_and_adopted_by_the_other(houses):
    want(houses, APP)
    assert at(houses, 0) == [APP]
    assert [house.state().name for house in houses] == [READY, READY]
    first, second = (house.issuer.queue.certificate(APP) for house in houses)
    assert first == second
    assert at(houses, 61 * DAY) == [APP]  # renewed once, too


def test_while_one_orders_the_other_waits(houses):
    want(houses, APP)
    first, second = houses
    with first.store.lock(APP) as ours:
        assert ours and second.look() == []
        assert second.store.state(APP) == {}  # it knows nothing, and keeps nothing
    assert at(houses, 0) == [APP]
    assert second.at(6) == [] and second.state().name == READY


def test_an_attempt_that_failed_counts_for_both(houses):
    want(houses, APP)
    houses[0].ca.script = [refused(), refused()]
    assert at(houses, 0) == [APP]
    assert [house.state().name for house in houses] == [FAILED, FAILED]
    for house in houses:
        assert house.state().next_at == pytest.approx(NOW + MINUTE, abs=7)
    # The other one goes on where the first one stopped: the other challenge, the next delay.
    assert [order[:2] for order in houses[1].at(2 * MINUTE)] == [(APP, "tls-alpn-01")]
    assert houses[0].look() == []
    assert houses[0].state().next_at == pytest.approx(NOW + 12 * MINUTE, abs=70)
    assert at(houses, 14 * MINUTE) == [APP]
    assert [house.state().name for house in houses] == [READY, READY]


def test_the_operator_may_ask_either_of_them_whatever_failed_before(houses):
    want(houses, APP)
    houses[0].ca.script = [refused()]
    assert at(houses, 0) == [APP]
    assert houses[1].issuer.queue.retry_now(APP)
    assert at(houses, 1) == [APP]
    assert at(houses, 2 * MINUTE) == [] and houses[0].state().name == READY


def test_a_pause_that_the_ca_asks_for_holds_for_both(houses):
    want(houses, APP, OTHER)
    houses[0].ca.script = [
        CaError(ACCOUNT, "https://ca.example/x", "too many", status=429, retry_after=HOUR,
                account_wide=True)] * 2  # fmt: skip
    first = houses[0].look()
    assert 1 <= len(first) <= 2  # both may have begun at once
    houses[0].ca.script.clear()
    assert houses[1].look() == []
    assert "too many" in houses[1].state(APP).reason
    assert at(houses, HOUR - 10) == []
    assert sorted(set(at(houses, HOUR + 10))) == [APP, OTHER]


def test_a_domain_that_the_ca_holds_back_is_held_for_both(houses):
    want(houses, "a.held.example", "b.held.example")
    error = CaError(LIMITED, "https://ca.example/x", "too many for held.example", status=429,
                    retry_after=HOUR, domain="held.example")  # fmt: skip
    houses[0].ca.script = [error] * 2
    assert houses[0].look()
    houses[0].ca.script.clear()
    assert houses[1].look() == []
    assert at(houses, HOUR - 10) == []
    assert sorted(set(at(houses, HOUR + 10))) == ["a.held.example", "b.held.example"]


def test_what_the_ca_gives_to_all_is_given_once(open_shared, tmp_path):
    names = [f"{letter}.example{letter}.com" for letter in "abcdefgh"]
    with two(open_shared, tmp_path, all=Quota(3, HOUR)) as houses:
        want(houses, *names)
        assert len(at(houses, 0)) == 3  # the second believed that nothing was taken yet
        assert at(houses, 1) == []
        assert {house.state(names[-1]).name for house in houses} == {FAILED}
        assert len(at(houses, 20 * MINUTE + 1)) == 1


def test_a_credential_has_one_share_however_many_gateways_it_uses(open_shared, tmp_path):
    names = [f"{letter}.example{letter}.com" for letter in "abcdef"]
    with two(open_shared, tmp_path, hour=Quota(2, HOUR)) as houses:
        want(houses, *names, agent="ci")
        assert len(at(houses, 0)) == 2
        assert at(houses, 1) == []
        assert len(at(houses, 31 * MINUTE)) == 1


def test_one_that_only_waits_does_not_forget_what_the_other_knows(houses):
    first, second = houses
    want(houses, APP)
    first.ca.script = [refused()]
    assert len(first.look()) == 1
    host = second.issuer.queue._hosts[APP]
    host.turn_at, host.turn_why = NOW + HOUR, "it waits"
    second.issuer.queue.keep_part(host, "turn_at", "turn_why")
    assert first.store.state(APP)["failures"] == 1
    assert second.store.state(APP)["turn_why"] == "it waits"
    second.issuer.queue.drop(APP)
    assert first.store.state(APP)["failures"] == 1


def test_a_window_that_is_kept_does_not_undo_an_attempt_of_the_other(houses):
    first, second = houses
    want(houses, APP)
    assert at(houses, 0) == [APP]
    first.ca.script = [refused()]
    assert at([first], 61 * DAY) == [APP]
    assert first.store.state(APP)["failures"] == 1
    second.issuer.queue.keep_part(second.issuer.queue._hosts[APP], "window", "window_of", "ask_at")
    assert first.store.state(APP)["failures"] == 1
    assert at([second], 61 * DAY) == []
    assert first.state().name == READY


def test_what_could_not_be_kept_is_not_taken_for_news_of_another(houses, monkeypatch):
    [house, _] = houses
    house.issuer.queue.want(APP)
    house.ca.script = [refused(), refused()]

    def full(*_):
        raise StoreError("full")

    with monkeypatch.context() as patch:
        patch.setattr(house.store, "save_state", full)
        assert len(house.look()) == 1
    assert len(house.at(2 * MINUTE)) == 1
    assert house.state().next_at == pytest.approx(NOW + 12 * MINUTE, abs=70)


def test_all_gateways_have_one_account(open_shared):
    with FakeCa(Clock()) as fake:
        threads = [
            threading.Thread(target=Ca(fake.directory, open_shared(), clock=fake.clock).order,
                             args=(hostname, "http-01", Proofs(), Stop()))
            for hostname in (APP, OTHER, "third.example.com")
        ]  # fmt: skip
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(TIMEOUT)
        assert len(fake.accounts) == 1
