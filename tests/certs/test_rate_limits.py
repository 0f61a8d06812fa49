"""Our rate limits of orders, by credential, by domain and in all: no agent uses up what a CA gives
to all. With a fake clock and a fake CA."""

from types import SimpleNamespace

import pytest
from fake_ca import DAY, NOW, Proofs
from test_issuer import House, finish_jobs, refused

from gotunnel import NoThread
from gotunnel_server.certs import issuer as issuer_module
from gotunnel_server.certs.acme_errors import CONFIG, HOST, LATER, LIMITED, TRANSPORT, CaError
from gotunnel_server.certs.order_queue import MOST_WAITING, WAITS
from gotunnel_server.certs.proof_memory import BELIEVED, ProofMemory
from gotunnel_server.certs.rate_limits import MOST_BUCKETS, WEEK, Bounds, Quota, RateLimits
from gotunnel_server.certs.registered_domain import registered_domain
from gotunnel_server.certs.schedule import HOUR, MINUTE
from gotunnel_server.certs.state import FAILED, READY, NotRenewed

APP = "app.example.com"


def limits(hostnames=None, orders_per_hour=None, orders_per_week=None):
    return SimpleNamespace(
        hostnames=hostnames, orders_per_hour=orders_per_hour, orders_per_week=orders_per_week
    )


@pytest.fixture
def house(tmp_path):
    with House(tmp_path) as house:
        yield house


def want(house, names, agent="agent", **more):
    names = list(names)
    for name in names:
        house.issuer.queue.want(name, agent, limits(**more))
    return names


def of(domain, count, start=0):
    return [f"h{number}.{domain}" for number in range(start, start + count)]


def restart(house):
    house.restart()
    house.issuer.queue.restore()


# Which domain


@pytest.mark.parametrize("hostname, domain", [
    ("app.example.com", "example.com"), ("a.b.c.example.com", "example.com"),
    ("example.com", "example.com"), ("a.example.co.uk", "example.co.uk"),
    ("a.b.example.com.br", "example.com.br"), ("co.uk", "co.uk"), ("a.co.com", "co.com"),
    ("app.localhost", "app.localhost"), ("localhost", "localhost")])  # fmt: skip
def test_a_registered_domain_is_the_last_labels(hostname, domain):
    assert registered_domain(hostname) == domain


# Credentials


def test_a_credential_of_one_hostname_gets_few_certificates(house):
    """An agent that registers one name after the other, below its wildcard."""
    for name in of("dev.example.com", 50):
        want(house, [name], hostnames=1)
        house.issuer.look()
        finish_jobs()
    assert len(house.look()) == 6
    state = house.state("h49.dev.example.com")
    assert state.name == FAILED and "certificates for in an hour (6)" in state.reason
    ordered = 6 + sum(len(house.at(step * WEEK / 50)) for step in range(1, 51))
    assert ordered <= 2 * 13  # the week's tokens, and those that were refilled in it
    assert want(house, [APP], "another") and len(house.look()) == 1


def test_limits_say_how_many_orders_there_may_be(house):
    want(house, of("example.com", 20), hostnames=1, orders_per_hour=9, orders_per_week=12)
    assert len(house.look()) == 9
    assert len(house.at(HOUR)) == 3  # its week's
    assert "a week (12)" in house.state("h19.example.com").reason


def test_one_credential_leaves_others_some_of_a_domain(house):
    want(house, of("a.example.com", 60))
    assert len(house.look()) == 40
    want(house, of("b.example.com", 60), "another")
    assert len(house.look()) == 5
    want(house, of("example.org", 2))
    assert len(house.look()) == 2  # another domain
    # Then as fast as the bucket refills, for all of the domain; a CA's limit works so, too.
    assert len(house.at(WEEK / 45 + 1)) == 1
    for step in range(1, 51):
        house.at(step * WEEK / 50)
    ready = sum(house.state(name).name == READY for name in of("a.example.com", 60)
                + of("b.example.com", 60))  # fmt: skip
    assert 85 <= ready <= 90


def test_one_credential_leaves_others_some_of_all(house):
    for number in range(300):
        house.issuer.queue.want(f"www.domain{number}.com", "greedy", limits(orders_per_hour=1000))
    assert len(house.look()) == 180
    want(house, [f"www.other{number}.com" for number in range(50)], "modest")
    assert len(house.look()) == 50


def test_a_first_start_with_many_hostnames_waits_for_nothing(house):
    """As fast as Let's Encrypt takes orders: 300 in three hours, at once if one likes."""
    for agent in range(3):
        want(house, [f"www.site{agent}-{number}.com" for number in range(50)], "shared")
    assert len(house.look()) == 150


def test_who_waits_is_told_about_when_its_turn_comes(house):
    names = want(house, of("example.com", 50))
    house.look()
    waiting = [house.state(name) for name in names if house.state(name).name == FAILED]
    times = [state.next_at for state in waiting]
    assert len(times) == 10 and times == sorted(times)
    assert times[0] == pytest.approx(NOW + WEEK / 40, abs=HOUR)
    assert times[-1] == pytest.approx(NOW + 10 * WEEK / 40, rel=1e-4)
    assert str(waiting[-1]).startswith(f"failed: {WAITS}more new hostnames of example.com than ")
    assert "(next attempt 2027-01-17" in str(waiting[-1])
    for name, at in zip(names[40:], times):
        assert house.at(at - NOW - HOUR) == []
        assert [ordered for ordered, _, _ in house.at(at - NOW + 60)] == [name]


def test_the_setting_bounds_a_domain(tmp_path):
    with House(tmp_path, bounds=Bounds.with_domain(1000)) as house:
        want(house, of("example.com", 100))
        assert len(house.look()) == 100


def test_renewals_wait_for_no_turn_and_leave_the_others_less(house):
    for name in of("example.com", 50):
        house.store.save(name, *house.ca.mint.pair(name, NOW - 80 * DAY))
    want(house, of("example.com", 50))
    assert len(house.look()) == 50
    for number in range(230):
        house.issuer.queue.want(f"www.domain{number}.com", f"agent {number}", limits())
    assert len(house.look()) == 220


def test_renewals_that_come_all_at_once_leave_no_debt(house):
    """After a long outage, or with lifetimes of days."""
    limits = RateLimits()
    for _ in range(5000):
        for token in limits.of_renewal():
            limits.take(token, NOW)
    (token,) = limits.of_renewal()
    assert 0 < limits.wait(token, NOW) <= 41  # seconds: 270 in three hours


def test_what_the_operator_asks_for_waits_for_no_turn(house):
    want(house, of("example.com", 41))
    house.look()
    house.issuer.queue.retry_now("h40.example.com")
    assert [name for name, _, _ in house.look()] == ["h40.example.com"]


# What was not used


@pytest.mark.parametrize("kind", [LATER, LIMITED, TRANSPORT])
def test_what_the_ca_did_not_take_costs_no_turn(house, kind):
    house.ca.script = [refused(kind, retry_after=60)] * 60
    want(house, of("example.com", 6), hostnames=1)
    for minute in range(1, 50):
        house.at(minute * 10 * MINUTE)
    house.ca.script.clear()
    house.at(10 * HOUR)
    assert [house.state(name).name for name in of("example.com", 6)] == [READY] * 6


def test_an_order_that_could_not_begin_is_tried_again_soon(house, monkeypatch, caplog):
    def refuse(*_):
        raise NoThread("no more threads")

    want(house, of("example.com", 3))
    monkeypatch.setattr(issuer_module, "spawn", refuse)
    with house.issuer._lock:
        assert house.issuer._look() == issuer_module.AFTER_NO_THREAD < issuer_module.LOOK_AGAIN
    (line,) = [text for record in caplog.records if "threads" in (text := record.getMessage())]
    assert line.endswith(": no more threads; next try in 30 s")


def test_an_order_that_could_not_begin_costs_no_turn(house, monkeypatch):
    def refuse(*_):
        raise NoThread("no more threads")

    want(house, [APP], hostnames=1)
    with monkeypatch.context() as patch:
        patch.setattr(issuer_module, "spawn", refuse)
        for _ in range(20):
            assert house.look() == []
    assert len(house.look()) == 1


@pytest.mark.parametrize("kind", [HOST, CONFIG])
def test_what_fails_by_the_hostnames_fault_is_its_agents_and_takes_none_of_the_domain(house, kind):
    house.ca.script = [refused(kind)] * 50
    want(house, of("example.com", 50), orders_per_hour=50)
    assert len(house.look()) == 50  # not 40, as no certificate came
    house.ca.script.clear()
    want(house, of("example.com", 45, 100), "another")
    assert len(house.look()) == 40


def test_names_that_do_not_resolve_cost_others_nothing(tmp_path):
    def look_up(hostname):
        if hostname.startswith("h"):
            raise CaError(HOST, "DNS", "does not resolve")

    with House(tmp_path, look_up=look_up) as house:
        for agent in range(2):
            want(house, of(f"d{agent}.example.com", 150), agent)
        assert house.look() == []
        assert "does not resolve" in house.state("h149.d1.example.com").reason
        want(house, of("d2.example.com", 1), 0)
        assert house.look() == [] and WAITS in house.state("h0.d2.example.com").reason
        for number in range(200):
            house.issuer.queue.want(f"www.domain{number}.com", f"agent {number}", limits())
        assert len(house.look()) == 200


def test_a_hostname_that_changes_hands_waits_for_its_new_agents_turn(house):
    want(house, of("example.com", 7), hostnames=1)
    house.look()
    assert WAITS in house.state("h6.example.com").reason
    want(house, ["h6.example.com"], "another")
    assert [name for name, _, _ in house.look()] == ["h6.example.com"]


def test_a_hostname_that_the_gateway_looks_after_stays_its_agents(house):
    """As at the hourly review, which does not know the agent."""
    want(house, of("example.com", 7), hostnames=1)
    house.look()
    house.issuer.queue.want("h6.example.com")
    assert house.look() == []


def test_a_certificate_is_ordered_few_times_for_one_name(house):
    """Whatever happens to the certificates; Let's Encrypt issues five in a week."""
    for _ in range(8):
        want(house, [APP])
        house.look()
        house.file().unlink(missing_ok=True)
        house.file().with_suffix(".json").unlink(missing_ok=True)
        restart(house)
    want(house, [APP])
    assert house.look() == [] and "4 certificates in a week" in house.state().reason


def test_names_that_wait_are_few_and_leave_no_files(house):
    files = house.file().parent
    want(house, of("example.com", MOST_WAITING + 200), hostnames=1)
    assert len(house.issuer.queue.hostnames()) == MOST_WAITING
    house.look()
    house.issuer._turn()  # what waits is kept
    kept = len(list(files.glob("*.json")))
    assert kept == MOST_WAITING
    want(house, of("example.org", 300), hostnames=1)
    assert len(house.issuer.queue.hostnames()) == MOST_WAITING + 6
    house.issuer._turn()
    assert len(list(files.glob("*.json"))) <= MOST_WAITING + 6
    assert house.state("h0.example.com") is None or house.state("h0.example.com").name == READY


# Restarts, and clocks


def test_a_restart_gives_nobody_a_new_turn(house):
    want(house, of("example.com", 50))
    assert len(house.look()) == 40
    restart(house)
    names = want(house, of("example.com", 50))
    assert house.look() == []
    assert house.state(names[-1]).next_at == pytest.approx(NOW + 10 * WEEK / 40, rel=1e-4)


def test_a_gateway_that_is_killed_during_an_order_has_taken_its_turn(house):
    taken = []
    house.ca.script = [lambda stop: taken.append(house.store.turns()["full_at"])]
    want(house, [APP])
    house.look()
    assert any(bucket.startswith("domain example.com") for bucket in taken[0])


def test_two_gateways_with_one_folder_count_each_others_orders(house):
    with House(house.folder, clock=house.clock) as other:
        want(house, of("example.com", 30))
        want(other, of("example.com", 30, start=100), agent="another")
        # The second one reads of the first one's when it writes its own.
        assert 45 <= len(house.look()) + len(other.look()) < 50
        full_at = house.store.turns()["full_at"]
        assert full_at["domain example.com"] >= NOW + WEEK
        assert sum(bucket.startswith("hour ") for bucket in full_at) == 2
        house.at(1)
        want(house, of("example.org", 1))
        assert [order[0] for order in house.look()] == ["h0.example.org"]
        want(house, of("example.com", 1, start=200), agent="a third")
        assert house.look() == []


def test_a_domain_that_another_gateway_holds_is_held_and_one_that_is_released_is_not(tmp_path):
    ours, theirs = RateLimits(), RateLimits()
    theirs.hold("example.com", NOW + HOUR, "paused")
    kept = theirs.as_dict(NOW)
    ours.join(kept, NOW)
    assert ours.held(APP, NOW)[1] == "paused"
    ours.note_kept(kept)
    ours.release(APP)
    theirs.take(theirs.of_certificate("b.test"), NOW)
    ours.join(theirs.as_dict(NOW), NOW)
    assert ours.held(APP, NOW) == (0.0, "")


def test_a_token_that_is_given_back_is_there_again_beside_another_gateway():
    ours, theirs = RateLimits(), RateLimits()
    token = ours.of_certificate(APP)
    for limits_ in (ours, theirs):
        assert limits_.take(token, NOW)
    kept = ours.as_dict(NOW)
    ours.note_kept(kept)
    theirs.join(kept, NOW)
    assert theirs.as_dict(NOW)["full_at"] == {token.bucket: NOW + 2 * token.quota.interval}
    ours.give_back(token)
    ours.join(theirs.as_dict(NOW), NOW)
    assert ours.as_dict(NOW)["full_at"] == {token.bucket: NOW + token.quota.interval}


@pytest.mark.parametrize("step", [-30 * DAY, -HOUR, -MINUTE])
@pytest.mark.parametrize("restarted", [False, True])
def test_a_clock_that_is_set_back_neither_gives_turns_nor_takes_any(house, step, restarted):
    want(house, of("example.com", 41))
    assert len(house.look()) == 40
    if restarted:
        restart(house)
        house.clock.now = NOW + step
        restart(house)
        want(house, of("example.com", 41))
    assert house.at(step) == []
    assert house.at(step + WEEK / 45 - 1) == []
    assert len(house.at(step + WEEK / 40 + MINUTE)) == 1


def test_turns_that_were_taken_by_a_clock_far_ahead_come_back_within_their_time(house):
    house.clock.now = NOW + 1000 * DAY
    want(house, of("example.com", 41))
    house.look()
    kept = house.store.turns()
    house.store.save_turns({**kept, "at": NOW})  # the issuer cannot know that it was set
    house.clock.now = NOW
    restart(house)
    want(house, of("example.com", 42))
    house.at(WEEK)
    assert house.state("h40.example.com").name == READY


@pytest.mark.parametrize(
    "kept",
    [
        {"full_at": [], "held": 5, "proofs": [], "at": "x"},
        {"full_at": {"all": "x", "b": -1, "c": float("nan"), "d": True}, "proofs": {"http-01": 5}},
        {"held": {"example.com": 5, "a.b": [1], "c.d": ["x", "y"], "e.f": [1e300, 7]}},
        {"held": {"example.com": [1e10, "why"]}, "proofs": {"http-01": [True, "x"]}},
    ],
)
def test_kept_turns_that_make_no_sense_hold_up_nobody_for_long(house, kept):
    house.store.save_turns(kept)
    restart(house)
    want(house, [APP])
    house.look()
    house.at(1.1 * DAY)
    assert house.state().name == READY


def test_buckets_are_bounded():
    limits = RateLimits()
    token = limits.of_certificate("first.example.com")
    for _ in range(4):
        limits.take(token, NOW)
    for number in range(2 * MOST_BUCKETS):
        limits.take(limits.of_certificate(f"h{number}.example.com"), NOW)
    assert len(limits.as_dict(NOW)["full_at"]) <= MOST_BUCKETS
    assert limits.wait(token, NOW) > 0  # the emptiest are kept
    assert limits.as_dict(NOW + 2 * WEEK)["full_at"] == {}


def test_a_token_that_is_given_back_is_there_again():
    limits, token = RateLimits(), RateLimits(Bounds(all=Quota(1, HOUR))).of_renewal()[0]
    assert limits.wait(token, NOW) == 0
    limits.take(token, NOW)
    assert limits.wait(token, NOW) == pytest.approx(HOUR, rel=1e-2)
    limits.give_back(token)
    assert limits.wait(token, NOW) == 0


# What the CA says of a domain


def domain_limit():
    return refused(LIMITED, retry_after=3600, domain="example.com", status=429)


def test_a_limit_of_a_domain_holds_up_its_new_hostnames_alone(house):
    for name in ("old.example.com",):
        house.store.save(name, *house.ca.mint.pair(name, NOW - 80 * DAY))
    house.ca.script = [domain_limit()]
    want(house, [APP])
    house.look()
    want(house, ["new.example.com", "a.dev.example.com", "other.example.org", "old.example.com",
                 "anexample.com"])  # fmt: skip
    assert {name for name, _, _ in house.look()} == {
        "other.example.org",
        "old.example.com",
        "anexample.com",
    }
    state = house.state("new.example.com")
    assert (state.name, state.next_at) == (FAILED, NOW + 3600) and "CA's words" in state.reason
    restart(house)
    want(house, [APP, "new.example.com"])
    assert house.at(3599) == []
    assert "CA's words" in house.state("new.example.com").reason
    assert {name for name, _, _ in house.at(3601)} == {APP, "new.example.com"}


def test_all_of_a_domain_are_told_that_it_is_held_up(house):
    house.ca.script = [domain_limit()]
    want(house, [APP])
    house.issuer.look()
    want(house, ["new.example.com"])
    finish_jobs()
    told = {house.changed.get(timeout=5) for _ in range(house.changed.qsize())}
    assert APP in told and house.state("new.example.com").name in (FAILED, READY)


def test_a_limit_of_one_hostname_is_no_failure_of_it_and_holds_up_no_other(house):
    house.ca.script = [refused(LIMITED, retry_after=3600, status=429)]
    want(house, [APP])
    house.look()
    assert house.store.state(APP)["failures"] == 0
    want(house, ["new.example.com"])
    assert len(house.look()) == 1
    assert house.at(3599) == [] and house.at(3601) == [(APP, "http-01", None)]


def test_the_operator_may_ask_for_one_while_its_domain_is_held_up(house):
    house.ca.script = [domain_limit()]
    want(house, [APP])
    house.look()
    house.issuer.queue.retry_now(APP)
    assert len(house.look()) == 1 and house.state().name == READY


def test_a_link_is_whole_after_a_restart(house):
    link = f"https://portal.letsencrypt.org/sfe/v1/unpause?jwt={'x' * 900}"
    house.ca.script = [CaError(LIMITED, "https://ca.example/x", f"visit {link}", status=429)]
    want(house, [APP])
    house.look()
    restart(house)
    want(house, [APP])
    assert link in str(house.state())


# Which proof comes first


def not_seen(code):
    return CaError(HOST, "https://ca.example/authz", "no", code=code, challenge="http-01")


def test_the_next_hostname_begins_with_what_worked(house):
    house.ca.script = [not_seen("connection")]
    want(house, [APP])
    assert [kind for _, kind, _ in house.look()] == ["http-01"]
    assert [kind for _, kind, _ in house.at(70)] == ["tls-alpn-01"]
    want(house, ["second.example.com"])
    assert [kind for _, kind, _ in house.look()] == ["tls-alpn-01"]
    restart(house)
    want(house, ["third.example.com"])
    assert [kind for _, kind, _ in house.look()] == ["tls-alpn-01"]
    want(house, ["fourth.example.com"])
    assert [kind for _, kind, _ in house.at(70 + BELIEVED)][-1:] == ["http-01"]


def test_what_failed_for_one_hostname_comes_last_until_it_works(house):
    house.ca.script = [not_seen("unauthorized")]
    want(house, [APP])
    house.look()
    want(house, ["second.example.com"])
    assert [kind for _, kind, _ in house.look()] == ["tls-alpn-01"]


@pytest.mark.parametrize("code", ["dns", "caa", "rejectedIdentifier", ""])
def test_a_failure_that_is_not_of_the_way_to_us_changes_no_other(house, code):
    house.ca.script = [not_seen(code)]
    want(house, [APP])
    house.look()
    want(house, ["second.example.com"])
    assert [kind for _, kind, _ in house.look()] == ["http-01"]


def test_what_has_worked_is_not_given_up_for_one_hostname_that_fails(house):
    want(house, [APP])
    house.look()
    house.ca.script = [not_seen("connection")]
    want(house, ["second.example.com"])
    house.look()
    want(house, ["third.example.com"])
    assert [kind for _, kind, _ in house.look()] == ["http-01"]


def test_types_are_remembered_only_if_they_can_be_published(tmp_path):
    with House(tmp_path, Proofs("http-01")) as house:
        house.ca.script = [not_seen("connection")] * 2
        want(house, [APP])
        assert [kind for _, kind, _ in [*house.look(), *house.at(70)]] == ["http-01"] * 2


def test_a_memory_by_a_clock_far_ahead_counts_for_nothing():
    memory = ProofMemory()
    memory.worked("tls-alpn-01", NOW + DAY)
    assert memory.ranked(["http-01", "tls-alpn-01"], NOW) == ["http-01", "tls-alpn-01"]
    memory.shift(-DAY)
    assert memory.ranked(["http-01", "tls-alpn-01"], NOW) == ["tls-alpn-01", "http-01"]


# A new certificate, asked for on the dashboard


def renew(house, name=APP):
    house.issuer.queue.renew(name)
    house.issuer.look()
    finish_jobs()


def why_not(house, name=APP):
    with pytest.raises(NotRenewed) as refused:
        house.issuer.queue.renew(name)
    return refused.value


def test_a_button_orders_within_the_hours_limit(house):
    want(house, [APP])
    assert len(house.look()) == 1
    for _ in range(Bounds().asked.most):
        renew(house)
    assert len(house.ca.ordered()) == Bounds().asked.most
    refused = why_not(house)
    assert "asked for 2 times in an hour" in str(refused)
    assert 0 < refused.until - house.clock() <= HOUR / 2
    house.clock.now = refused.until
    renew(house)
    assert len(house.ca.ordered()) == 1


def test_all_buttons_together_have_a_limit(tmp_path):
    with House(tmp_path, bounds=Bounds(all_asked=Quota(3, HOUR))) as house:
        names = want(house, of("example.com", 4))
        house.look()
        for name in names[:3]:
            renew(house, name)
        assert "more certificates were asked for in an hour than 3" in str(why_not(house, names[3]))


def test_a_button_waits_for_what_the_ca_has_asked_for(house):
    """Not so `certificates --renew`: that operator has read the CA's words."""
    want(house, [APP])
    house.look()
    house.ca.script = [refused(TRANSPORT, retry_after=500.0)]
    house.issuer.queue.retry_now(APP)
    house.look()
    found = why_not(house)
    assert "the CA takes no orders" in str(found) and 0 < found.until - house.clock() <= 500
    assert house.look() == []


def test_a_button_uses_up_no_more_than_the_agents_hour(house):
    name, other = want(house, ["a.example.com", "b.example.com"], orders_per_hour=3)
    house.look()  # two orders
    renew(house, name)
    assert "certificates for in an hour (3)" in str(why_not(house, other))


def test_a_button_orders_nothing_for_a_hostname_without_an_agent(house):
    refused = why_not(house)
    assert "has no agent" in str(refused) and refused.until is None


def test_a_button_that_is_pressed_twice_orders_once(house):
    want(house, [APP])
    house.look()
    house.issuer.queue.renew(APP)
    assert "under way" in str(why_not(house))
