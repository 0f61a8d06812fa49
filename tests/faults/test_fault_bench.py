"""The fault bench: no visit gets a wrong answer, none hangs, whatever breaks. And it can fail."""

import io
import os
import random

import fault_bench
import pytest
from fault_bench import HAND_OVER, RELOAD_AGENT, Bench, Screen, command_of
from fault_ledger import FAILED, WHOLE
from fault_lines import KINDS
from support import at_length

# Python's wrap_socket() leaves its new socket open if a reset comes before the handshake.
pytestmark = pytest.mark.filterwarnings(
    "ignore:Exception ignored in. <ssl.SSLSocket:pytest.PytestUnraisableExceptionWarning"
)

SECONDS, LONG = 25, 60  # of faults; the beginning and the end take some ten more

# Sabotage, and the faults and visits that show it soonest.
QUIET = {"share": 0}
BROKEN = {
    "keeps": dict(visits=("leaver", "get", "kept")),
    "completes": dict(visits=("download", "slow"), kinds=("cut",), shares={"agent": QUIET}),
    "repeats": dict(visits=("post",), kinds=()),
    "mixes": dict(visits=("get", "kept"), kinds=()),
    "mangles": dict(visits=("download",), kinds=()),
}
# HEAD, as an answer's head must come within RESPONSE_TIMEOUT; its body may take its time.
WAITING = dict(
    visits=("head",), kinds=("swallow",), bound=6, settings={"RESPONSE_TIMEOUT": "2"},
    shares={"agent": QUIET, "visitor": QUIET, "target": {"share": 1, "most": 200}},
)  # fmt: skip


@pytest.fixture
def bench(tmp_path, cache):
    """A function that runs a bench and returns its report."""

    def run(seconds, seed=None, until_failure=False, **how):
        seed = random.SystemRandom().randrange(1 << 32) if seed is None else seed
        with Bench(tmp_path, cache, seed, **how) as bench:
            report = bench.run(seconds, until_failure=until_failure)
        print(report.text)  # pytest shows it if the test fails: the seed, and all figures
        return report

    return run


@pytest.mark.slow
@pytest.mark.parametrize("seconds", [SECONDS, at_length(LONG)])
def test_no_visit_gets_a_wrong_answer_and_none_hangs_whatever_breaks(bench, monkeypatch, seconds):
    """GOTUNNEL_FAULT_SEED repeats a run."""
    if seconds == SECONDS:  # as many troubles in less time
        monkeypatch.setattr(fault_bench, "BETWEEN_AGENTS", (1.5, 3.0))
        monkeypatch.setattr(fault_bench, "BETWEEN_GATEWAYS", (5.0, 9.0))
    report = bench(seconds, os.environ.get("GOTUNNEL_FAULT_SEED"))
    assert not report.failures
    # It was worth something: faults of all kinds, and visits of both ends.
    lines = [report.faults[name] for name in ("visitor", "agent", "target")]
    assert {kind for counts in lines for kind in counts} == set(KINDS)
    assert len(report.faults["processes"]) >= 3
    ends = [end for (_, end), count in report.visits.items() for _ in range(count)]
    assert ends.count(WHOLE) > 50 and ends.count(FAILED) > 10


@pytest.mark.slow
@pytest.mark.long
def test_no_visit_fails_while_gateways_hand_over_and_agents_read_their_files(bench, monkeypatch):
    monkeypatch.setattr(fault_bench, "BETWEEN_GATEWAYS", (1.0, 2.0))
    report = bench(15, kinds=(), troubles=(HAND_OVER, RELOAD_AGENT),
                   settings={"DRAIN_TIMEOUT": "15"})  # fmt: skip
    assert not report.failures
    assert report.faults["processes"][HAND_OVER] >= 3 and report.faults["processes"][RELOAD_AGENT]
    # A kept connection may be closed while the next request is on its way: the gateway waits a
    # second for that, which is little on a busy machine.
    assert set(report.visible) <= {"an end without an answer"}


@pytest.mark.slow
@pytest.mark.parametrize(
    "sabotage",
    [pytest.param(name, marks=[pytest.mark.long] * (name != "mixes")) for name in BROKEN],
)
def test_a_gateway_that_breaks_a_rule_is_found_out(bench, sabotage):
    report = bench(60, troubles=(), command=command_of(sabotage), until_failure=True,
                   **BROKEN[sabotage])  # fmt: skip
    assert "wrong answers" in report.failures


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.parametrize("sabotage", [None, "waits"])
def test_a_gateway_that_waits_without_end_is_found_out(bench, sabotage):
    report = bench(8 if sabotage is None else 60, troubles=(), command=command_of(sabotage),
                   until_failure=True, **WAITING)  # fmt: skip
    assert not report.wrongs
    assert bool(report.hangs) == (sabotage == "waits")


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_figures_are_one_line_written_again_on_a_terminal():
    out = Terminal()
    screen = Screen(out)
    for text in ("a long line", "short"):
        screen.show(text)
    screen.end()
    assert out.getvalue() == "\ra long line\rshort      \n"


def test_figures_are_lines_now_and_then_elsewhere(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(fault_bench, "monotonic", lambda: now[0])
    out = io.StringIO()
    screen = Screen(out)
    for text in ("one", "not shown", "two"):
        screen.show(text)
        now[0] += fault_bench.PRINTED_EVERY - 1
    screen.end()
    assert out.getvalue() == "one\ntwo\n"
