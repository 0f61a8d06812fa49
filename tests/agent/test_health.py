"""Looks at targets: what the configuration says of them, how looks become a verdict, what a look
takes for well, and who hears of it."""

import pytest
from test_agent_config import MINIMAL, loaded, refusal

from gotunnel_agent.config import Health
from gotunnel_agent.health import Judge

HTTP2 = MINIMAL + "    protocol: h2c\n"
TCP = MINIMAL + "    mode: tcp\n"


def of(text, start=MINIMAL):
    """What a tunnel's ``health`` stands for."""
    return loaded(f"{start}    health: {text}\n").tunnels[0].health


# The configuration -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("/healthz", Health("/healthz")),
        ("tcp", Health()),
        ("on", Health()),
        ("{}", Health()),
        ("off", None),
        ('{path: "/up?full=1"}', Health("/up?full=1")),
        ("{every: 10s, fails: 2, passes: 4}", Health(every=10, fails=2, passes=4)),
        ("{every: 1, timeout: 500ms}", Health(every=1, timeout=0.5)),
        ("{every: 1m, timeout: 0.25 s}", Health(every=60, timeout=0.25)),
        ("{every: 1s}", Health(every=1, timeout=1)),  # never longer than the interval
        ("{path: /, statuses: 200}", Health("/", statuses=((200, 200),))),
        ('{path: /, statuses: "200, 204-299"}', Health("/", statuses=((200, 200), (204, 299)))),
        ("{path: /, statuses: [200, 301 - 302]}", Health("/", statuses=((200, 200), (301, 302)))),
    ],
)
def test_health_of_a_tunnel(text, expected):
    assert of(text) == expected


def test_connection_is_enough_without_a_path():
    assert of("{every: 2s}", TCP) == of("{every: 2s}") == of("{every: 2s}", HTTP2)
    assert loaded(MINIMAL).tunnels[0].health is None


@pytest.mark.parametrize(
    ("start", "text", "expected"),
    [
        (MINIMAL, "healthz", "health.path: 'healthz' came, expected a path such as /healthz"),
        (MINIMAL, '"/a b"', "health.path: '/a b' came"),
        (MINIMAL, "/a#b", "health.path: '/a#b' came"),
        (MINIMAL, "[/a]", "health: a list came, expected a path such as /healthz, a mapping, tcp"),
        (MINIMAL, "{pth: /a}", "health: unknown key 'pth', did you mean 'path'?"),
        (MINIMAL, "{every: 0.5s}", "health.every: '0.5s' came, expected a time from 1 s to 3600 s"),
        (MINIMAL, "{every: soon}", "health.every: 'soon' came"),
        (MINIMAL, "{timeout: 10s}", "health.timeout: 10 s came, expected at most every"),
        (MINIMAL, "{fails: 0}", "health.fails: '0' came, expected a number of looks in a row"),
        (MINIMAL, "{passes: 1.5}", "health.passes: '1.5' came"),
        (MINIMAL, "{statuses: 200}", "health.statuses came without a path"),
        (MINIMAL, "{path: /, statuses: 100}", "health.statuses: '100' came, expected statuses"),
        (MINIMAL, "{path: /, statuses: 299-200}", "health.statuses: '299-200' came"),
        (MINIMAL, "{path: /, statuses: []}", "health.statuses: a list came"),
        (TCP, "/healthz", "health.path: the tunnel has mode tcp, expected mode http"),
        (HTTP2, "/healthz", "health.path: the tunnel has protocol h2c, expected no path"),
    ],
)
def test_health_that_cannot_be(start, text, expected):
    assert f"tunnels[0].{expected}" in refusal(f"{start}    health: {text}\n")


# The verdict -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("looks", "verdicts"),
    [
        ("+", "+"),  # the first look decides alone
        ("-", "-"),
        ("+--", "+++"),
        ("+---", "+++-"),
        ("+--+--", "++++++"),  # in a row
        ("+---+", "+++--"),
        ("+---++", "+++--+"),
        ("-+-++", "----+"),
    ],
)
def test_verdict_needs_some_looks_in_a_row(looks, verdicts):
    judge = Judge(Health(fails=3, passes=2))
    found, before = "", None
    for look in looks:
        changed = judge.note("" if look == "+" else "refused")
        verdict = "-" if judge.problem else "+"
        assert changed is (verdict != before)
        found, before = found + verdict, verdict
    assert found == verdicts


def test_target_that_is_not_well_is_looked_at_twice_as_often():
    judge = Judge(Health(every=6))
    assert judge.interval == 6
    judge.note("refused")
    assert judge.interval == 3
