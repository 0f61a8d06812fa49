"""One document, and one set of metrics, of several processes."""

import pytest

from gotunnel_agent.common.exposition import (
    HISTOGRAM,
    Metric,
    Sample,
    counter,
    gauge,
    histogram,
    text,
)
from gotunnel_server.dashboard.state import Seen
from gotunnel_server.processes import merged

SPARK = [0] * 50 + [1] * 10


def row(hostname, visits, agent="office", **more):
    return {
        "hostname": hostname, "agent": agent, "target": "127.0.0.1:80", "visits": visits,
        "failed": 0, "received_bytes": 1, "sent_bytes": 2, "visits_per_second": 1.0,
        "spark": SPARK, "certificate": {"state": "ready"}, **more,
    }  # fmt: skip


def document(sessions=(), hostnames=(), visits=0, totals={}):
    return {
        "gateway": {"host": "gw.test", "state": "serving", "now": 1000, "started_at": 990,
                    "uptime_seconds": 10},
        "totals": {
            "sessions": len(sessions), "hostnames": len(hostnames),
            "certificates": 2 + len(hostnames), "visits": visits, "failed": 1,
            "received_bytes": 10, "sent_bytes": 20, "running": 3, "visits_per_second": 1.0,
            "spark": SPARK, **totals,
        },
        "sessions": list(sessions), "hostnames": list(hostnames),
        "certificates": [{"hostname": "gw.test"}, {"hostname": "tunnel.test"}],
        "blocks": [], "public": False,
    }  # fmt: skip


def process(number, state="serving"):
    return {"process": number, "pid": 100 + number, "state": state, "restarts": 0}


def session(id, at):
    return {"id": id, "connected_at": at}


def test_sums_are_of_all_and_hostnames_are_counted_once():
    found = merged.documents(2, {
        2: document([session("b", 20)], [row("a.test", 5), row("z.test", 1)], 6),
        1: document([session("a", 10)], [row("a.test", 7), row("c.test", 2)], 9),
    }, [process(1), process(2)], 600.0)  # fmt: skip
    totals = found["totals"]
    assert (totals["sessions"], totals["hostnames"], totals["certificates"]) == (2, 3, 5)
    assert (totals["visits"], totals["failed"], totals["running"]) == (15, 2, 6)
    assert totals["visits_per_second"] == 2.0 and totals["spark"][-1] == 2
    assert [(each["id"], each["process"]) for each in found["sessions"]] == [("a", 1), ("b", 2)]
    assert [(each["hostname"], each["visits"]) for each in found["hostnames"]] == [
        ("a.test", 12), ("c.test", 2), ("z.test", 1),
    ]  # fmt: skip
    assert found["hostnames"][0]["visits_per_second"] == 2.0
    assert found["hostnames"][0]["received_bytes"] == 2
    gateway = found["gateway"]
    assert gateway["started_at"] == 400 and gateway["uptime_seconds"] == 600
    assert [(each["process"], each["visits"]) for each in gateway["processes"]] == [(1, 9), (2, 6)]


def test_what_one_does_not_know_is_not_known_of_all():
    """A gateway whose visits nothing counts, or too many hostnames to count each."""
    found = merged.documents(
        1, {1: document([], [row("a.test", None)], None), 2: document([], [row("a.test", 1)], 1)},
        [process(1), process(2)], 0,
    )  # fmt: skip
    assert found["totals"]["visits"] is None and found["hostnames"][0]["visits"] is None


def test_a_process_that_does_not_answer_or_does_not_serve_has_no_figures():
    found = merged.documents(
        1, {1: document(visits=4)}, [process(1), process(2), process(2, "draining")], 0
    )
    rows = [(each["state"], each["visits"]) for each in found["gateway"]["processes"]]
    assert rows == [("serving", 4), ("serving", None), ("draining", None)]


def test_agents_of_a_pool_have_a_row_each():
    pool = [
        row("a.test", 1, target="x"),
        row("a.test", 2, target="x"),
        row("a.test", 4, target="y"),
    ]
    found = merged.documents(
        1, {1: document([], pool), 2: document([], pool)}, [process(1), process(2)], 0
    )
    assert [each["visits"] for each in found["hostnames"]] == [2, 4, 8]


def test_lists_are_bounded_and_totals_count_all():
    many = [row(f"{number:04}.test", 0) for number in range(merged.MOST_LISTED)]
    one = document([], many, totals={"hostnames": 5000})
    found = merged.documents(1, {1: one, 2: one}, [process(1), process(2)], 0)
    assert len(found["hostnames"]) == merged.MOST_LISTED
    assert found["totals"]["hostnames"] == 5000


def test_the_public_document_has_the_hostnames_of_all_and_no_more():
    def public(*names):
        return {
            "gateway": {"host": "gw.test"}, "totals": {"hostnames": len(names)},
            "hostnames": [{"hostname": name, "mode": "http"} for name in names], "public": True,
        }  # fmt: skip

    found = merged.documents(
        1, {1: public("b.test"), 2: public("a.test", "b.test")}, [process(1), process(2)], 0
    )
    assert found == public("a.test", "b.test")


def test_samples_get_the_process_as_a_label_and_stay_one_metric():
    def figures(count):
        yield gauge("up", "Up.", Sample(1))
        yield counter("visits_total", "Visits.", Sample(count, (("mode", "http"),)))
        yield Metric("took", HISTOGRAM, "Took.", tuple(histogram((1.0,), (count, 0), 0.5)))

    joined = merged.metrics({2: merged.as_values(figures(5)), 1: merged.as_values(figures(3))})
    lines = text(joined).splitlines()
    assert lines.count("# TYPE visits_total counter") == 1
    assert 'visits_total{mode="http",process="1"} 3' in lines
    assert 'visits_total{mode="http",process="2"} 5' in lines
    assert 'took_bucket{le="1",process="2"} 5' in lines
    assert 'up{process="1"} 1' in lines


def seen(at, path):
    return Seen(at, "a.test", "GET", path, 200, "", 0.1, 1, 2, "192.0.2.1", "office", "http", "")


def test_visits_of_others_come_in_the_order_of_their_times():
    known, came = merged.visits(
        {1: (7, 3)}, {1: [7, 4, [seen(3.0, "/c")]], 2: [8, 2, [seen(1.0, "/a"), seen(2.0, "/b")]]},
        Seen,
    )  # fmt: skip
    assert known == {1: (7, 4), 2: (8, 2)}
    assert [visit.path for visit in came] == ["/a", "/b", "/c"]


@pytest.mark.parametrize("found", [{}, {1: [7, 0, []]}])
def test_no_visits_are_none(found):
    assert merged.visits({}, found, Seen)[1] == []
