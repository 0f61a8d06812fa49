"""The state document, made of values."""

import json
from collections import Counter
from types import SimpleNamespace

import pytest

from gotunnel_server.agents.identity import Identity
from gotunnel_server.certs.state import FAILED, READY, WAITING, State
from gotunnel_server.dashboard import state
from gotunnel_server.dashboard.state import Facts, Rates, of_head, shown
from gotunnel_server.net.blocks import Block, read_network
from gotunnel_server.routes import H2C, Route
from gotunnel_server.visitors.counts import Count
from gotunnel_server.visitors.visit import MOST_HOSTNAMES

DAY = 86400
NOW = 100 * DAY
FACTS = Facts("gateway.test", 443, "1.2.3", "serving", NOW - 60.9, 60.9, NOW)


NOTHING_TOLD = {}


def tunnel(
    name="office", since=0.0, round_trip=None, id="aa", waits_for=(), told=NOTHING_TOLD, **routes
):
    return SimpleNamespace(
        id=id, since=since, round_trip=round_trip, failed=Counter({"tcp.test": 3}),
        agent=SimpleNamespace(host="192.0.2.1", identity=Identity(name)),
        routes={key.replace("_", "."): value for key, value in routes.items()},
        usage=lambda: SimpleNamespace(streams=5, visits=2), waits_for=waits_for,
        health=SimpleNamespace(told=told),
    )  # fmt: skip


def route(hostname, mode="http", **more):
    return Route(hostname, mode, None, **more)


def full(*tunnels, certificate=lambda name: State(READY), facts=FACTS, **more):
    document = state.full(facts, tunnels, ["gateway.test", "gateway.test"], certificate, **more)
    json.dumps(document)
    return document


def test_what_is_told_of_the_gateway_and_its_sessions():
    told = full(tunnel(since=5.5, round_trip=0.01234, app_test=route("app.test")))
    assert told["gateway"] == {
        "host": "gateway.test", "version": "1.2.3", "state": "serving",
        "started_at": int(NOW - 60.9), "uptime_seconds": 60, "now": NOW,
    }  # fmt: skip
    assert told["sessions"] == [{
        "id": "aa", "agent": "office", "address": "192.0.2.1", "connected_at": 5,
        "round_trip_ms": 12.3, "hostnames": 1, "streams": 5, "visits": 2,
        "waits_for": [],
    }]  # fmt: skip
    assert told["totals"]["running"] == 2 and told["totals"]["certificates"] == 2
    assert told["public"] is False


def test_session_that_waits_says_for_what():
    names = [f"{number}.test" for number in range(30)]
    (session,) = full(tunnel(waits_for=("a\x1b.test", *names)))["sessions"]
    assert session["hostnames"] == 0 and len(session["waits_for"]) == state.MOST_AWAITED
    assert session["waits_for"][:2] == ["a\\x1b.test", "0.test"]


@pytest.mark.parametrize(
    ("told", "health", "reason"),
    [
        ({}, "", ""),
        ({"A.test": ""}, "ok", ""),
        ({"A.test": "503\x1b"}, "failed", "503\\x1b"),
        ({"other.test": "503"}, "", ""),
    ],
)
def test_health_of_a_target_is_as_its_agent_told(told, health, reason):
    (row,) = full(tunnel(told=told, a_test=route("A.test")))["hostnames"]
    assert (row["health"], row["health_reason"]) == (health, reason)


@pytest.mark.parametrize(
    ("name", "given", "port", "url"),
    [
        ("app.test", {}, 443, "https://app.test/"),
        ("app.test", {}, 8443, "https://app.test:8443/"),
        ("*.app.test", {}, 443, ""),
        ("db.test", {"mode": "tcp"}, 443, "tls://db.test:443"),
        ("db.test", {"mode": "tcp", "port": 2222}, 443, "tcp://db.test:2222"),
    ],
)
def test_the_address_of_a_hostname(name, given, port, url):
    one = tunnel()
    one.routes = {name: route(name, **given)}
    (row,) = full(one, facts=FACTS._replace(port=port))["hostnames"]
    assert row["url"] == url and row["port"] == given.get("port")


def test_counts_are_those_of_the_hostname_as_the_agent_spells_it():
    count = Count()
    count.http[1], count.failed, count.received, count.sent = 7, 2, 10, 20
    spelt = tunnel(app_test=route("App.test:443"), b_test=route("b.test"))
    counts = {"App.test:443": count, "other": count}
    rates = Rates([0] * 50 + [3] * 10, {"App.test:443": [0] * 59 + [5]})
    told = full(spelt, counts=counts, rates=rates)
    first, second = told["hostnames"]
    assert (first["visits"], first["failed"], first["sent_bytes"]) == (7, 2, 20)
    assert (first["visits_per_second"], first["spark"][-1]) == (0.5, 5)
    assert (second["visits"], second["failed"], sum(second["spark"])) == (0, 0, 0)
    totals = told["totals"]
    assert (totals["visits"], totals["failed"], totals["received_bytes"]) == (14, 4, 20)
    assert totals["visits_per_second"] == 3.0 and len(totals["spark"]) == 60


def test_a_hostname_that_is_counted_among_others_has_no_figures():
    """Zeros would say that nobody visits it."""
    counts = {f"{number}.test": Count() for number in range(MOST_HOSTNAMES)} | {"other": Count()}
    (row,) = full(tunnel(app_test=route("app.test")), counts=counts)["hostnames"]
    assert [row[key] for key in state.FIGURES] == [None] * 4


def test_without_counts_the_failed_visits_in_tcp_mode_are_known():
    (row,) = full(tunnel(tcp_test=route("tcp.test", "tcp")))["hostnames"]
    assert (row["visits"], row["failed"]) == (None, 3)


@pytest.mark.parametrize(
    ("given", "told"),
    [
        (State(READY, ends_at=NOW + 3.5 * DAY), ("ready", 3, "", "")),
        (State(READY, ends_at=NOW - DAY), ("ready", -1, "", "")),
        (State(WAITING), ("waiting", None, "", "")),
        (State(FAILED, "https://ca/x: 400 dns: no\nrecord", NOW), (
            "failed", None, "the CA could not look the hostname up in DNS",
            "https://ca/x: 400 dns: no record")),
    ],
)  # fmt: skip
def test_how_a_certificate_stands(given, told):
    document = full(tunnel(a_test=route("a.test")), certificate=lambda name: given)
    (own,), (row,) = document["certificates"], document["hostnames"]
    assert own == {"hostname": "gateway.test", **row["certificate"]}
    keys = ("state", "days_left", "error_summary", "error_text")
    assert tuple(own[key] for key in keys) == told


def test_a_long_error_is_cut_and_its_link_stays_whole():
    link = "https://portal.example/" + "x" * 1500
    told = state.of_certificate(State(FAILED, "word " * 1000 + link), NOW)
    assert link in told["error_text"] and len(told["error_text"]) < 8000
    assert len(told["error_summary"]) <= 80


def test_lists_are_bounded_and_totals_count_all(monkeypatch):
    monkeypatch.setattr(state, "MOST_LISTED", 2)
    tunnels = [
        tunnel(id=str(n), **{f"a{n}_test": route(f"a{n}.test"), f"b{n}_test": route(f"b{n}.test")})
        for n in range(3)
    ]
    told = full(*tunnels)
    assert len(told["sessions"]) == len(told["hostnames"]) == 2
    assert (told["totals"]["sessions"], told["totals"]["hostnames"]) == (3, 6)
    assert told["totals"]["certificates"] == 7 and told["totals"]["running"] == 6


def test_the_public_form_says_nothing_else():
    one = tunnel("secret", since=5, b_test=route("b.test", protocol=H2C, target="10.0.0.1:1"))
    two = tunnel("secret", a_test=route("a.test", "tcp", port=5))
    assert state.public(FACTS, [one, two]) == {
        "gateway": {"host": "gateway.test"},
        "totals": {"hostnames": 2},
        "hostnames": [
            {"hostname": "a.test", "url": "tcp://a.test:5", "mode": "tcp", "protocol": ""},
            {"hostname": "b.test", "url": "https://b.test/", "mode": "http", "protocol": H2C},
        ],
        "public": True,
    }


def test_blocks_are_told():
    block = Block(read_network("192.0.2.7"), 5.5, "a\nb", "192.0.2.99")
    (told,) = full(blocks=[block])["blocks"]
    assert told == {"address": "192.0.2.7", "until": 5, "reason": "a\\nb", "by": "192.0.2.99"}


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("plain", "plain"), ("<b>", "<b>"), ("a\x1b[2J", "a\\x1b[2J"), ("\u202eabc", "\\u202eabc"),
        ("ж", "ж"), ("\ud800", "\\ud800"), ("x" * 20, "x" * 10),
    ],
)  # fmt: skip
def test_foreign_text_is_made_visible(text, told):
    assert shown(text, 10) == of_head(text, 10) == told[:10]


@pytest.mark.parametrize(
    ("text", "told"),
    [("\xc3\xa4", "ä"), ("\xff", "\\xff"), ("\xe2\x80\xae", "\\u202e")],
)
def test_bytes_of_a_head_are_read_as_utf_8(text, told):
    assert of_head(text, 10) == told


def test_texts_that_are_of_no_head_keep_their_letters():
    """These are read as UTF-8 already."""
    block = Block(read_network("192.0.2.7"), 5.5, "für heute", "")
    told = full(tunnel("Büro", app_test=route("app.test", target="é")), blocks=[block])
    assert told["blocks"][0]["reason"] == "für heute"
    assert told["sessions"][0]["agent"] == told["hostnames"][0]["agent"] == "Büro"
    assert told["hostnames"][0]["target"] == "é"


def test_agents_texts_are_bounded():
    one = tunnel("n" * 60_000 + "\x1b", a_test=route("a.test", target="\x1b[2J" + "t" * 60_000))
    told = full(one)
    assert len(json.dumps(told)) < 6000 and "\x1b" not in repr(told)
