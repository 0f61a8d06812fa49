"""tools/flood.py: its verdict by values, and one flood, as short as can be."""

import json
import re
import sys

import bootstrap
import flood
import pytest

pytestmark = pytest.mark.usefixtures("temporary_folder")

LINES = ["new 1.0 0.020000 ok", "kept 1.0 0.005000 ok", "new 1.1 0.040000 ok"]


def figures(threads=10, memory=50_000_000):
    some = {"threads": threads, "memory": memory, "descriptors": 20, "cpu": 1.0}
    return {"gateway": some, "agent": dict(some)}


def row(**changes):
    visits = flood.visits(LINES)
    return {
        "kind": "silent", "from": "1 address", "load": {"connections": 3000}, "before": figures(),
        "most": figures(200), "after": figures(), "back": 61.0, "counted": {"refused": 3000.0},
        "visits": {"before": visits, "during": visits, "after": visits}, **changes,
    }  # fmt: skip


def test_latencies_are_of_each_way_and_failures_are_kept():
    found = flood.visits([*LINES, "kept 2.0 10.000000 TimeoutError('timed out')"])
    assert found["new"] == {"requests": 2, "p50": 0.02, "p99": 0.04, "worst": 0.04}
    assert found["kept"]["worst"] == 10.0
    assert found["failed"] == ["kept: TimeoutError('timed out')"]


@pytest.mark.parametrize(
    "changes, fault",
    [
        ({}, None),
        ({"back": None, "after": figures(14)}, None),
        ({"back": None, "after": figures(15)}, "gateway: threads 15, before 10"),
        ({"back": None, "after": figures(10, 61_000_000)}, "gateway: memory 61 MB, before 50 MB"),
        ({"visits": {"during": flood.visits(["new 1.0 1.000000 ok"])}},
         "during: an honest request (new) took 1.00 s"),
        ({"visits": {"before": flood.visits(["new 1.0 1.500000 ok"])}}, None),
        ({"visits": {"after": flood.visits(["new 1.0 0.1 ConnectionResetError()"])}},
         "after: 1 honest requests failed: new: ConnectionResetError()"),
        ({"counted": {"refused": 2000.0, "dropped": 999.0}},
         "3000 connections came, and 2999 are counted"),
    ],
)  # fmt: skip
def test_what_is_wrong_with_a_flood(changes, fault):
    assert list(flood.faults(row(**changes)))[:1] == ([] if fault is None else [fault])


def test_the_largest_figures_are_those_of_a_flood():
    assert flood.larger(figures(3, 9), figures(5, 7))["agent"]["threads"] == 5
    assert flood.larger(figures(3, 9), figures(5, 7))["agent"]["memory"] == 9


def test_a_row_becomes_a_line_of_the_table():
    line = flood.markdown([row(wrong=[]), row(wrong=[], back=None)], ["a note"]).splitlines()
    assert line[2] == (
        "| silent | 1 address | 3000 | 20 / 40 / 40 | 5 / 5 / 5 | 0 "
        "| 10 + 10, 200 + 200, 10 + 10 | 50 + 50, 50 + 50, 50 + 50 | 61 s |"
    )
    assert line[3].endswith("| not |") and line[-1] == "- a note"


def test_sources_of_a_flood(monkeypatch):
    monkeypatch.setattr(flood, "has_ipv6", lambda: True)
    one, several = flood.sources("silent", "both")
    assert one == ("127.0.0.1",) and len(several) == 6 and "::1" in several
    assert flood.HONEST not in several
    assert flood.sources("agents", "both") == [one]


@pytest.mark.slow
@pytest.mark.timeout(120)
@pytest.mark.parametrize("kind", ["handshake", pytest.param("agents", marks=pytest.mark.long)])
def test_a_short_flood(kind, monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(bootstrap, "prepare", lambda need: sys.executable)
    monkeypatch.setattr(flood, "BEFORE", 0.5)
    monkeypatch.setattr(flood, "WORST", 60)  # this machine may be busy
    page, kept = tmp_path / "page.md", tmp_path / "kept.json"
    page.write_text(f"{flood.BEGIN}\n{flood.END}\n")
    status = flood.main([
        "--kind", kind, "--from", "several", "--seconds", "1", "--scale", "0.02",
        "--markdown", str(page), "--json", str(kept), "--patience", "90",
    ])  # fmt: skip
    said = capsys.readouterr().out
    assert (status, said.splitlines()[-1]) == (0, "verdict: passed (1 floods)"), said
    assert re.search(rf"^\| {kind} \|", page.read_text(), re.M)
    (found,) = json.loads(kept.read_text())
    assert found["load"]["connections"] > 0 and found["wrong"] == []
    assert found["visits"]["during"]["kept"]["requests"] > 0
