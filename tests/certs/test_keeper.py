"""Which certificates are wanted, their state, and which agents are told of it."""

import queue
import subprocess
import sys
import threading
import time

import pytest
from fake_ca import DAY, Proofs
from support import ROOT, TIMEOUT, wait_until
from test_issuer import ScriptedCa, refused

from gotunnel_server.agents.agents_file import Limits
from gotunnel_server.certs import keeper as keeper_module
from gotunnel_server.certs.contexts import Certificates
from gotunnel_server.certs.folder import open_store
from gotunnel_server.certs.keeper import Keeper
from gotunnel_server.certs.local_ca import Authority, CertificateError
from gotunnel_server.certs.ordering import Ordering
from gotunnel_server.certs.state import FAILED, WAITING, NotRenewed, State

APP, OWN, URL = "app.localhost", "gateway.localhost", "https://ca.example/dir"


class House:
    """A keeper that orders, with the objects that it works with."""

    def __init__(self, folder, served=(), cert_dir=None, **more):
        self.ca = ScriptedCa(time.time)
        self.store = open_store(folder / "cache", URL)
        self.certificates = Certificates(cert_dir, None)
        self.served, self.changed = set(served), queue.Queue()
        self.keeper = Keeper(
            self.certificates, own_names=[OWN], served=lambda: set(self.served),
            on_change=self.changed.put, ordering=Ordering(self.ca, self.store, Proofs()),
            **more,
        )  # fmt: skip

    def __enter__(self):
        self.keeper.start()
        return self

    def __exit__(self, *exc_info):
        self.keeper.stop()


def test_a_wanted_hostname_is_pending_until_it_is_served_and_that_is_told(tmp_path):
    may_order = threading.Event()
    with House(tmp_path) as house:
        house.ca.script = [lambda stop: may_order.wait(TIMEOUT)] * 2
        house.keeper.want([APP], "agent")
        assert house.keeper.pending(APP) and house.keeper.state(APP) == State(
            WAITING, "", house.keeper.state(APP).next_at, None
        )
        may_order.set()
        assert {house.changed.get(timeout=TIMEOUT) for _ in range(2)} == {APP, OWN}
        assert house.certificates.context(APP) is not None
        assert house.keeper.state(APP).is_ready and not house.keeper.pending(APP)


def test_an_order_that_failed_is_pending_no_more_and_has_its_reason(tmp_path):
    with House(tmp_path) as house:
        assert house.changed.get(timeout=TIMEOUT) == OWN
        house.ca.script = [refused()]
        house.keeper.want([APP])
        assert house.changed.get(timeout=TIMEOUT) == APP
        state = house.keeper.state(APP)
        assert state.name is FAILED and "the CA's words" in state.reason
        assert not house.keeper.pending(APP)


@pytest.mark.parametrize("hostname", [APP, "*.dev.localhost"])
def test_where_nothing_is_ordered_there_is_a_certificate_or_there_is_none(tmp_path, hostname):
    authority = Authority(tmp_path / "local")
    keeper = Keeper(Certificates(None, authority), own_names=[OWN], served=list, on_change=print)
    assert keeper.state(hostname).name is FAILED and keeper.state(hostname).next_at is None
    keeper.want([hostname])
    state = keeper.state(hostname)
    assert state.is_ready and state.ends_at > time.time()
    assert keeper.pending(hostname) is False


def test_a_hostname_for_which_our_own_ca_has_failed_is_tried_again_in_a_minute(
    tmp_path, monkeypatch, caplog
):
    now, told = [time.monotonic()], []
    monkeypatch.setattr(keeper_module, "monotonic", lambda: now[0])
    authority = Authority(tmp_path / "local")
    keeper = Keeper(
        Certificates(None, authority), own_names=[OWN], served=lambda: [APP], on_change=told.append
    )
    issue = authority.issue

    def fail(hostname):
        raise CertificateError("No space left on device")

    monkeypatch.setattr(authority, "issue", fail)
    keeper.want([APP, "gone.localhost"])
    for _ in range(3):
        now[0] += keeper_module.RETRY
        keeper.look()
    assert caplog.text.count(f"{APP}: No space left on device; next try in 60 s") == 1
    assert keeper.state(APP).name is FAILED and told == []
    monkeypatch.setattr(authority, "issue", issue)
    keeper.look()
    assert keeper.state(APP).name is FAILED  # RETRY is not over yet
    now[0] += keeper_module.RETRY
    keeper.look()
    assert keeper.state(APP).is_ready and told == [APP]
    assert keeper.state("gone.localhost").name is FAILED  # no agent serves it any more


def test_ever_new_hostnames_have_no_end_of_certificates_of_our_own_ca(tmp_path, monkeypatch):
    """Except those that are served, and the gateway's own."""
    monkeypatch.setattr(keeper_module, "MOST_ISSUED", 20)
    served, authority = {APP}, Authority(tmp_path)
    certificates = Certificates(None, authority)
    keeper = Keeper(
        certificates, own_names=[OWN], served=lambda: served, on_change=lambda hostname: None
    )
    keeper.want([APP])
    for number in range(50):
        served.add(newest := f"{number}.localhost")
        keeper.want([newest])
        assert certificates.context(newest)
        assert len(certificates.issued()) <= 20
        assert authority.hostnames() == sorted(certificates.issued())
        assert len(list(tmp_path.glob("*.key"))) == len(authority.hostnames()) + 1
        served.remove(newest)
    assert certificates.context(APP) and certificates.context(OWN)
    assert not certificates.context("0.localhost")
    keeper.want(["0.localhost"])  # its agent is back
    assert certificates.context("0.localhost")
    # A folder that has grown is cut at the next start.
    monkeypatch.setattr(keeper_module, "MOST_ISSUED", 5)
    certificates = Certificates(None, authority)
    Keeper(
        certificates, own_names=[OWN], served=lambda: (), on_change=lambda hostname: None,
        earlier=authority.hostnames(),
    )  # fmt: skip
    assert len(authority.hostnames()) <= 5 and certificates.context(OWN)


def test_a_hostname_whose_agent_comes_as_it_is_forgotten_keeps_a_certificate(tmp_path, monkeypatch):
    monkeypatch.setattr(keeper_module, "MOST_ISSUED", 2)
    served, certificates = set(), Certificates(None, Authority(tmp_path))
    keeper = Keeper(
        certificates, own_names=[OWN], served=lambda: served, on_change=lambda hostname: None
    )
    keeper.want([APP])
    forget = certificates.forget

    def forget_and_come(hostname):
        forget(hostname)
        served.add(hostname)

    monkeypatch.setattr(certificates, "forget", forget_and_come)
    keeper.want(["new.localhost"])
    assert APP in served and certificates.context(APP)


def test_own_names_without_a_certificate_are_an_error(tmp_path):
    (tmp_path / "own").mkdir()
    with pytest.raises(CertificateError, match=f"CERT_DIR .*own: no certificate for {OWN}"):
        Keeper(Certificates(tmp_path / "own", None), own_names=[OWN], served=list, on_change=print)


def test_what_was_ordered_earlier_is_served_before_anybody_wants_it(tmp_path):
    with House(tmp_path) as house:
        house.store.save(APP, *house.ca.mint.pair(APP, house.ca.clock()))
    again = House(tmp_path)
    assert again.certificates.context(APP) is not None
    assert again.keeper.state(APP).is_ready


def test_hostnames_that_fail_to_be_served_from_several_threads_are_all_tried_again(
    tmp_path, monkeypatch
):
    """look() iterates over them while orders end in other threads."""
    names = [f"h{number}.localhost" for number in range(40)]
    house = House(tmp_path, served=names)
    take, fails = house.certificates.take, threading.Event()

    def fail(hostname, file):
        if fails.is_set():
            raise CertificateError("no descriptor")
        take(hostname, file)

    monkeypatch.setattr(house.certificates, "take", fail)
    fails.set()
    with house:
        house.keeper.want(names)
        told = set()
        while not told.issuperset(names):
            house.keeper.look()
            while not house.changed.empty():
                told.add(house.changed.get_nowait())
    assert not any(map(house.certificates.context, names))
    fails.clear()
    house.keeper.look()
    assert all(map(house.certificates.context, names))


def test_a_renewal_that_is_asked_for_is_ordered_and_an_unknown_one_is_named(tmp_path, caplog):
    caplog.set_level("INFO")
    with House(tmp_path) as house:
        assert house.changed.get(timeout=TIMEOUT) == OWN
        for hostname in (OWN, "gone.localhost"):
            house.store.ask_renewal(hostname)
        house.keeper.look()
        assert house.changed.get(timeout=TIMEOUT) == OWN
        assert len(house.ca.ordered()) == 2
    assert "gone.localhost: a new certificate was asked for, but no agent serves it" in caplog.text


def test_a_hostname_whose_agent_is_away_at_two_reviews_is_not_wanted_any_more(
    tmp_path, monkeypatch
):
    monkeypatch.setattr(keeper_module, "KEEP", 0)
    with House(tmp_path, served=[APP]) as house:
        house.keeper.want([APP])
        house.keeper.look()
        house.served.clear()
        house.keeper.look()
        wait_until(lambda: house.certificates.context(APP))
        assert house.keeper.state(APP).next_at is not None  # of its renewal
        house.keeper.look()
        assert house.keeper.state(APP).is_ready  # it is served, and that is all


def test_a_certificate_that_another_process_has_renewed_is_served_too(tmp_path):
    with House(tmp_path) as house:
        assert house.changed.get(timeout=TIMEOUT) == OWN
        before = house.certificates.context(OWN)
        house.store.save(OWN, *house.ca.mint.pair(OWN, house.ca.clock(), 91 * DAY))
        house.keeper.want([OWN])
        assert house.certificates.context(OWN) is not before


def test_a_gateway_that_orders_nothing_does_not_load_what_ordering_takes():
    script = (
        "import sys; sys.path[:0] = sys.argv[1:]; import gotunnel_server.gateway; "
        "print(sorted({'acme', 'josepy', 'requests', 'gotunnel_server.certs.acme'} "
        "& set(sys.modules)))"
    )
    command = [sys.executable, "-c", script, str(ROOT)]
    assert subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT).stdout == "[]\n"


def test_what_is_ordered_at_a_review_counts_as_its_agents(tmp_path, monkeypatch):
    """Otherwise an agent whose hostnames wait would get them with the gateway's tokens."""
    limits = Limits(hostnames=1)
    names = [f"h{number}.localhost" for number in range(9)]
    with House(tmp_path, served=names, owner=lambda hostname: ("agent", limits)) as house:
        house.keeper.want(names[:1], "agent", limits)
        house.keeper._review_at = 0
        house.keeper.look()
        wait_until(lambda: all(house.keeper.state(name).name != WAITING for name in names))
        assert sum(house.keeper.state(name).is_ready for name in names) == 6
        assert house.keeper.state(OWN).is_ready


def why_not_renewed(keeper, hostname):
    with pytest.raises(NotRenewed) as refused:
        keeper.renew(hostname)
    assert refused.value.until is None
    return str(refused.value)


def test_a_button_orders_a_new_certificate(tmp_path):
    with House(tmp_path, [APP]) as house:
        house.keeper.want([APP])
        assert {house.changed.get(timeout=TIMEOUT) for _ in range(2)} == {APP, OWN}
        house.keeper.renew(APP)
        assert house.changed.get(timeout=TIMEOUT) == APP
        assert len(house.ca.ordered()) == 3
        assert "no certificate here" in why_not_renewed(house.keeper, "other.localhost")
        assert "no certificate here" in why_not_renewed(house.keeper, "*.dev.localhost")


def test_a_button_orders_while_the_ca_is_asked_when_to_renew(tmp_path):
    is_asked, may_answer = threading.Event(), threading.Event()
    with House(tmp_path) as house:
        house.ca.on_ask = lambda: is_asked.set() or may_answer.wait(TIMEOUT)
        assert house.changed.get(timeout=TIMEOUT) == OWN
        assert is_asked.wait(TIMEOUT)
        house.keeper.renew(OWN)
        may_answer.set()
        assert house.changed.get(timeout=TIMEOUT) == OWN
        assert len(house.ca.ordered()) == 2


def test_a_certificate_that_is_not_ordered_is_not_renewed_by_a_button(tmp_path):
    authority = Authority(tmp_path / "local")
    keeper = Keeper(Certificates(None, authority), own_names=[OWN], served=list, on_change=print)
    assert "our own CA, which renews it by itself" in why_not_renewed(keeper, OWN)
    assert "no certificate here" in why_not_renewed(keeper, APP)
