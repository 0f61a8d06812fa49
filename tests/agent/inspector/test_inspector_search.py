"""The inspector's query language."""

import gzip
import time

import pytest
from support import ROOT

from gotunnel_agent.inspector.kept import Kept
from gotunnel_agent.inspector.record import ENDED, OPEN, Message, Record
from gotunnel_agent.inspector.search import FILTERS, QueryError, parse

NOW = 1_000_000.0


def record(**values):
    usual = dict(
        id=7,
        hostname="app.example.com",
        target="localhost:3000",
        visitor="192.0.2.7",
        method="POST",
        path="/api/users?x=1",
        status=500,
        began=NOW - 60,
        duration=0.25,
        request_head=b"POST /api/users?x=1 HTTP/1.1\r\nHost: app.example.com\r\nX-One: Uno\r\n\r\n",
        response_head=b"HTTP/1.1 500 Oops\r\nContent-Type: application/json; charset=utf-8\r\n\r\n",
        request_body=Kept(b'{"name": "J\xc3\xbcrgen, the first"}', 30),
        response_body=Kept(b"Traceback (most recent)", 20_000),
        state=ENDED,
    )
    return Record(**{**usual, **values})


POST = record()
WEBSOCKET = record(status=101, method="GET", path="/socket", state=OPEN, duration=None)
WEBSOCKET.add_message(Message(NOW, True, "text", b"Needle in it", 12), 1000)
GONE = record(status=0, problem="no answer", response_head=b"", response_body=Kept())
UNREAD = record(
    method="",
    path="",
    status=0,
    problem="not followed: HTTP/2",
    request_head=b"",
    response_head=b"",
    request_body=Kept(),
    response_body=Kept(),
)
ZIPPED = record(
    response_head=b"HTTP/1.1 200 OK\r\ncontent-encoding: gzip\r\n\r\n",
    status=200,
    response_body=Kept(gzip.compress(b"inner Text"), 30),
)
ODD = record(
    path="/\xff\xfe",
    request_head=b"GET /\xff\xfe HTTP/1.1\r\nHost: \xff\r\n\r\n",
    request_body=Kept(b"\xff\x00\xfe", 3),
    hostname="a\u202e",
    problem="\udcff",
)


@pytest.mark.parametrize(
    ("query", "fits"),
    [
        ("", True),
        ("   ", True),
        ("TRACEBACK", True),
        ("trace forth", False),
        ('"most recent"', True),
        ('"most  recent"', False),
        ("users recent", True),
        ("users -recent", False),
        ("-nothing", True),
        ("x-one", True),
        ("app.example", True),
        ("500", True),
        ("jürgen", True),
        ("status:500", True),
        ("status:5xx", True),
        ("STATUS:5XX", True),
        ("status:4xx", False),
        ("status:4xx,500", True),
        ("status:>=400", True),
        ("status:<400", False),
        ("status:500-599", True),
        ("status:none", False),
        ("-status:5xx", False),
        ("method:post", True),
        ("method:GET,PUT", False),
        ("method:PO", False),
        ("path:/api", True),
        ("path:/API?x", False),
        ('path:"users?x=1"', True),
        ("host:example", True),
        ("hostname:other", False),
        ("visitor:192.0.2.", True),
        ("target:3000", True),
        ("type:json", True),
        ("type:html", False),
        ("head:uno", True),
        ("head:traceback", False),
        ("body:traceback", True),
        ("body:uno", False),
        ('body:"jürgen, the"', True),
        ("request:uno", True),
        ("request:traceback", False),
        ("response:traceback", True),
        ("time:>200ms", True),
        ("time:250ms", True),
        ("time:>0.3s", False),
        ("time:<1m", True),
        ("size:>10k", True),
        ("size:>1m", False),
        ("size:<=20000", True),
        ("age:<5m", True),
        ("age:5m", True),
        ("age:>1h", False),
        ("id:7", True),
        ("id:6-8", True),
        ("id:8-9", False),
        ("is:failed", True),
        ("is:open", False),
        ("is:followed", True),
        ("is:cut", True),
        ("is:replay,imported", False),
        ("localhost:3000", False),
        ("http://x", False),
        ('"status:500"', False),
        ('-"status:500"', True),
        ("-", False),
        ('"a\\"b"', False),
        ("status:5xx method:POST path:/api traceback -health", True),
    ],
)
def test_a_query(query, fits):
    assert parse(query, now=NOW)(POST) == fits


@pytest.mark.parametrize(
    ("which", "query", "fits"),
    [
        (WEBSOCKET, "needle", True),
        (WEBSOCKET, "body:needle", True),
        (WEBSOCKET, "is:websocket", True),
        (WEBSOCKET, "is:open", True),
        (WEBSOCKET, "time:>0", False),
        (GONE, "status:none", True),
        (GONE, "status:<400", False),
        (GONE, "is:failed", True),
        (GONE, 'problem:"no answer"', True),
        (GONE, "type:x", False),
        (UNREAD, "is:failed", False),
        (UNREAD, "-is:followed", True),
        (UNREAD, "HTTP/2", True),
        (ZIPPED, "inner", True),
        (ZIPPED, "response:text", True),
        (ZIPPED, "outer", False),
        (ODD, "anything", False),
        (ODD, "path:\xff", True),
        (record(replay_of=3), "is:replay", True),
        (record(imported=True), "is:imported", True),
        (record(began=NOW + 9999), "age:<5m", True),  # a clock that was set back
    ],
)
def test_odd_visits(which, query, fits):
    assert parse(query, now=NOW)(which) == fits


@pytest.mark.parametrize(
    ("query", "words"),
    [
        ("statsu:500", "unknown filter statsu:, did you mean status:?"),
        ("methd:GET", "did you mean method:?"),
        ("methd:\udcff\x1b", 'quotes: "methd:\\udcff\\x1b"'),
        ("status:abc", "status abc, expected one such as 404"),
        ("status:99999", "status 99999, expected"),
        ("status:", "nothing came behind status:"),
        ("status: 500", "nothing came behind status:"),
        ('"no end', "has no end"),
        ('path:"no end', "has no end"),
        ("time:fast", "time fast, expected a time such as >500ms"),
        ("time:1y", "time 1y, expected"),
        ("size:big", "size big, expected one such as >10k"),
        ("age:x", "age x, expected one such as <5m"),
        ("id:x", "id x, expected one such as 12"),
        ("id:\u0661", "expected one such as 12"),
        ("id:" + "9" * 50, "expected one such as 12"),
        ("is:good", "is:good, expected one of failed"),
        ("x" * 1001, "a query of 1001 characters, expected at most 1000"),
        ("x " * 31, "a query of over 30 terms"),
        ("status:\x1b[31m", "status \\x1b[31m, expected"),
    ],
)
def test_a_query_that_is_none(query, words):
    with pytest.raises(QueryError) as raised:
        parse(query, now=NOW)
    assert words in str(raised.value)
    assert str(raised.value).isprintable()


def test_each_filter_is_described():
    text = (ROOT / "docs/inspector.md").read_text(encoding="utf-8")
    section = text.partition("## Search")[2].partition("\n## ")[0]
    assert [name for name in FILTERS if f"`{name}:" not in section] == ["hostname"]


@pytest.mark.parametrize(
    "query", ['"' + "\\" * 990, "-" * 1000, ":" * 1000, "a:" * 500, '"a"' * 300]
)
def test_a_hostile_query_takes_no_time(query):
    began = time.process_time()
    try:
        parse(query, now=NOW)(POST)
    except QueryError:
        pass
    assert time.process_time() - began < 1
