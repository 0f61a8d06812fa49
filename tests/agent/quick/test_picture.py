"""The picture of the status screen: states, and the lines that are drawn."""

import random
import re
import time

import pytest

from gotunnel_agent.common.cells import width
from gotunnel_agent.common.quantities import duration, size
from gotunnel_agent.follow import Seen, Totals
from gotunnel_agent.quick.picture import (
    CONNECTING,
    ONLINE,
    STOPPED,
    STOPPING,
    WAITING,
    Look,
    Said,
    Shown,
    View,
    draw,
)

PLAIN, ASCII, COLOURED = Look(colour=False), Look(colour=False, unicode=False), Look()
OTTER = Shown("https://quick-otter.dev.example.com", "http://127.0.0.1:8080")
SSH = Shown("tls://ssh.dev.example.com", "127.0.0.1:22")
GATEWAY = "tunnel.example.com:9443"
REFUSED = "connection refused: no program listens there"


def clock(text):
    """The time of day, in the local time zone, on some day in summer."""
    return time.mktime(time.strptime(f"2026-07-01 {text}", "%Y-%m-%d %H:%M:%S"))


def visit(method, path, status, at="14:02:11", seconds=0.012, out=3400, problem="", **more):
    return Seen(
        "app.example.com", method, path, status, clock(at), seconds, 0, out, problem, **more
    )


VISITS = [
    visit("GET", "/", 200),
    visit("POST", "/api/orders?id=7", 500, "14:02:12", 1.84, 120),
    visit("GET", "/big.iso", 200, "14:02:15", 200, 1_234_567_890, "cut short"),
]
BUSY = View(
    ONLINE, "1.2.3", GATEWAY, clock("14:02:03"), tunnels=[OTTER], visits=VISITS,
    totals=Totals(42, 2, 0, 1_234_567), running=[visit("GET", "/events", 200, "14:02:04", 9, 1200)],
    messages=[Said(clock("14:02:16"), "target 127.0.0.1:8080: Connection refused; does a program "
                   "listen there?", 3)],
)  # fmt: skip

PICTURES = {
    "connecting": (
        View(CONNECTING, "1.2.3", GATEWAY, tunnels=[Shown("app.example.com", "http://x:80")]),
        """
gotunnel 1.2.3  ● connecting to tunnel.example.com:9443

  app.example.com → http://x:80

  no visits yet

  Ctrl-C stops
""",
    ),
    "reconnecting": (
        View(WAITING, "1.2.3", GATEWAY, retry_in=12, problem=REFUSED, tunnels=[OTTER]),
        """
gotunnel 1.2.3  ● reconnecting in 12 s
  tunnel.example.com:9443: connection refused: no program listens there

  https://quick-otter.dev.example.com → http://127.0.0.1:8080

  no visits yet

  Ctrl-C stops
""",
    ),
    "reconnecting now": (
        View(CONNECTING, "1.2.3", GATEWAY, problem=REFUSED, tunnels=[OTTER]),
        """
gotunnel 1.2.3  ● reconnecting
  tunnel.example.com:9443: connection refused: no program listens there

  https://quick-otter.dev.example.com → http://127.0.0.1:8080

  no visits yet

  Ctrl-C stops
""",
    ),
    "busy": (
        BUSY,
        """
gotunnel 1.2.3  ● online since 14:02:03

  https://quick-otter.dev.example.com → http://127.0.0.1:8080

  42 visits · 1 open · 2 failed · 1.2 MB sent

  14:02:04  GET   200    open   1.2 kB  /events
  14:02:11  GET   200   12 ms   3.4 kB  /
  14:02:12  POST  500   1.8 s    120 B  /api/orders?id=7
  14:02:15  GET   200   3 min   1.2 GB  /big.iso (cut short)

  14:02:16 target 127.0.0.1:8080: Connection refused; does a program listen
  there? (3 times)

  Ctrl-C stops
""",
    ),
    "several tunnels": (
        BUSY._replace(
            running=[],
            messages=[],
            notes=["visitors connect by: ssh app"],
            visits=[
                visit("GET", "/", 404),
                visit("", "", 0, seconds=4000, problem="", mode="tcp"),
                visit("GET", "/slow", 0, problem="no answer", out=0),
            ],
            tunnels=[
                OTTER,
                SSH,
                Shown("https://new.example.com", "https://x:1", "", "certificate: being ordered"),
                Shown("https://no.example.com", "unix:/x", "host already registered: no"),
            ],
        ),
        """
gotunnel 1.2.3  ● online since 14:02:03

  https://quick-otter.dev.example.com → http://127.0.0.1:8080
  tls://ssh.dev.example.com           → 127.0.0.1:22
  https://new.example.com             → https://x:1
    certificate: being ordered
  https://no.example.com              → unix:/x
    not served: host already registered: no
  visitors connect by: ssh app

  42 visits · 2 failed · 1.2 MB sent

  14:02:11  GET   404   12 ms   3.4 kB  app.example.com/
  14:02:11  tcp     -   1.1 h   3.4 kB  app.example.com
  14:02:11  GET     -   12 ms      0 B  app.example.com/slow (no answer)

  Ctrl-C stops
""",
    ),
    "stopping": (
        View(STOPPING, "1.2.3", tunnels=[OTTER], totals=Totals(1, 0, 5, 0)),
        """
gotunnel 1.2.3  ● stopping

  https://quick-otter.dev.example.com → http://127.0.0.1:8080

  1 visit · 0 B sent · 5 B received

  Ctrl-C again stops at once
""",
    ),
    "stopped": (
        View(STOPPED, "1.2.3", since=clock("15:00:00"), tunnels=[OTTER]),
        """
gotunnel 1.2.3  ● stopped at 15:00:00

  https://quick-otter.dev.example.com → http://127.0.0.1:8080

  no visits yet
""",
    ),
}


@pytest.mark.parametrize("name", PICTURES)
def test_picture(name):
    view, expected = PICTURES[name]
    assert draw(view, 80, 30, PLAIN) == expected.strip("\n").split("\n")


def test_narrow_picture():
    assert draw(BUSY._replace(messages=[]), 40, 30, PLAIN) == [
        "gotunnel 1.2.3  ● online since 14:02:03",
        "",
        "  https://quick-otter.dev.example.com",
        "    → http://127.0.0.1:8080",
        "",
        "  42 visits · 1 open · 2 failed",
        "",
        "  GET   200    open  /events",
        "  GET   200   12 ms  /",
        "  POST  500   1.8 s  /api/orders?id=7",
        "  GET   200   3 min  /big.iso (cut sho…",
        "",
        "  Ctrl-C stops",
    ]


def test_in_ascii():
    lines = draw(BUSY, 80, 30, ASCII)
    assert "\n".join(lines).isascii()
    assert lines[0].startswith("gotunnel 1.2.3  * online")
    assert lines[2] == "  https://quick-otter.dev.example.com -> http://127.0.0.1:8080"
    assert lines[4] == "  42 visits, 1 open, 2 failed, 1.2 MB sent"


def test_colours_change_nothing_but_colours():
    for view, _ in PICTURES.values():
        coloured = draw(view, 80, 30, COLOURED)
        bare = [re.sub(r"\x1b\[[0-9;]*m", "", line) for line in coloured]
        assert [line.rstrip() for line in bare] == draw(view, 80, 30, PLAIN)
        assert coloured != bare


def test_each_coloured_line_ends_without_colour():
    for view, _ in PICTURES.values():
        for line in draw(view, 80, 30, COLOURED):
            assert line.count("\x1b[0m") == line.count("\x1b[") / 2


HOSTILE = [
    "/\x1b[2J\x1b]0;title\x07",
    "/" + "\xe6\x97\xa5" * 200,  # UTF-8, as it comes: latin-1
    "/\xff\xfe\x80",
    "/" + "e\xcc\x81\xcc\x81\xcc\x81\xcc\x81" * 99,
    "/\xe2\x80\xaegpj",
    "/\r\n\x00\x7f\x9b31m",
    "/" + "x" * 8000,
]


@pytest.mark.parametrize("columns", [1, 20, 40, 80, 300])
def test_a_picture_has_fewer_cells_than_its_terminal(columns):
    view = BUSY._replace(
        visits=[visit("GET", path, 200, problem=path) for path in HOSTILE],
        tunnels=[Shown(path, path, path, path) for path in HOSTILE],
        messages=[Said(0, path) for path in HOSTILE],
        notes=HOSTILE,
        gateway=HOSTILE[1],
        problem=HOSTILE[0],
    )
    for state in (ONLINE, WAITING):
        for rows in (1, 5, 24):
            lines = draw(view._replace(state=state, retry_in=3), columns, rows, PLAIN)
            assert len(lines) <= max(1, rows - 1)
            for line in lines:
                assert width(line) < max(columns, 20) and "\x1b" not in line
                assert all(c.isprintable() for c in line)


def test_what_there_is_no_room_for_gives_way_in_order():
    view = BUSY._replace(qr=["█" * 20] * 10, visits=VISITS * 9)
    heights = {rows: "\n".join(draw(view, 80, rows, PLAIN)) for rows in range(2, 50)}
    for rows, text in heights.items():
        assert text.count("\n") < rows - 1
        if "POST" in text:
            assert "listen there" in text.replace("\n  ", " ")
        if "█" in text:
            assert text.count("█" * 20) == 10 and "POST" in text
    assert "█" in heights[40] and "█" not in heights[24] and "larger window" in heights[24]


def test_more_tunnels_than_there_is_room_for():
    view = BUSY._replace(tunnels=[OTTER] * 50)
    assert "  and 42 more" in draw(view, 80, 40, PLAIN)


def test_random_views_fit():
    dice = random.Random(5)
    for _ in range(100):
        view = BUSY._replace(
            visits=VISITS * dice.randrange(9),
            running=VISITS * dice.randrange(3),
            tunnels=[OTTER, SSH] * dice.randrange(6),
            messages=[Said(0, "word " * dice.randrange(99))] * dice.randrange(5),
            qr=["▀" * 30] * dice.choice([0, 17]),
        )
        columns, rows = dice.randrange(20, 200), dice.randrange(2, 60)
        lines = draw(view, columns, rows, PLAIN)
        assert len(lines) < rows and max(map(width, lines)) < columns


@pytest.mark.parametrize(
    "seconds, text",
    [(-1, "0 ms"), (0, "0 ms"), (0.0123, "12 ms"), (0.9994, "999 ms"), (0.9999, "1.0 s"),
     (59.94, "59.9 s"), (59.96, "1 min"), (3500, "58 min"), (3599, "1.0 h"), (360_000, "100.0 h")],
)  # fmt: skip
def test_durations(seconds, text):
    assert duration(seconds) == text and len(text) <= 7


@pytest.mark.parametrize(
    "count, text",
    [(0, "0 B"), (999, "999 B"), (1000, "1.0 kB"), (99_940, "99.9 kB"), (99_960, "100 kB"),
     (999_400, "999 kB"), (999_600, "1.0 MB"), (10**9, "1.0 GB"), (10**13, "10.0 TB")],
)  # fmt: skip
def test_sizes(count, text):
    assert size(count) == text and len(text) <= 7
