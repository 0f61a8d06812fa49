"""HTTP Archives: what is written has all that HAR 1.2 asks for, and what is read is checked."""

import base64
import copy
import gzip
import json
import math
import re
import time

import pytest

from gotunnel_agent.inspector import har
from gotunnel_agent.inspector.har import NotHar, export, read
from gotunnel_agent.inspector.kept import Kept
from gotunnel_agent.inspector.mask import MASK
from gotunnel_agent.inspector.record import ENDED, OPEN, Message, Record

LIMIT = 64 * 1024


def record(**values):
    usual = dict(
        id=1,
        hostname="app.example.com",
        target="localhost:3000",
        visitor="192.0.2.7",
        method="POST",
        path="/a?b=1&b=2&c",
        status=201,
        began=1_700_000_000.123,
        duration=0.25,
        first_byte=0.2,
        request_head=b"POST /a?b=1&b=2&c HTTP/1.1\r\nHost: app.example.com\r\n"
        b"X-One: 1\r\nX-One: 2\r\n"
        b"Content-Type: application/json\r\nCookie: a=1; b=2\r\nX-Forwarded-Proto: https\r\n\r\n",
        response_head=b"HTTP/1.1 201 Very Good\r\nContent-Type: text/plain; charset=utf-8\r\n"
        b"Set-Cookie: s=1; Path=/\r\nLocation: /b\r\n\r\n",
        request_body=Kept(b'{"n": 1}', 8),
        response_body=Kept("Grüße\n".encode(), 8),
        state=ENDED,
    )
    return Record(**{**usual, **values})


def exported(*records, unmask=True):
    text = b"".join(export(records, unmask=unmask))
    return json.loads(text)


SOCKET = record(status=101, method="GET", path="/ws", request_body=Kept(), response_body=Kept())
for message in (
    Message(1_700_000_001.5, True, "text", "hé".encode(), 3),
    Message(1_700_000_002.5, False, "binary", b"\x00\xff", 2),
    Message(1_700_000_003.5, False, "ping", b"", 0),
    Message(1_700_000_004.5, True, "close", b"\x03\xe8bye", 5),
):
    SOCKET.add_message(message, 10_000)

ODD = {
    "usual": record(),
    "no answer": record(status=0, response_head=b"", response_body=Kept(), problem="no answer"),
    "open": record(state=OPEN, duration=None, first_byte=None, status=0, response_head=b""),
    "not followed": record(
        method="",
        path="",
        status=0,
        request_head=b"",
        response_head=b"",
        problem="not followed: HTTP/2",
    ),
    "websocket": SOCKET,
    "binary": record(request_body=Kept(b"\xff\x00", 2), response_body=Kept(bytes(range(256)), 256)),
    "cut": record(response_body=Kept(b"begin", 1 << 30), request_body=Kept(b"be", 3)),
    "not kept": record(response_body=Kept(b"", 500), request_body=Kept(b"", 500)),
    "invalid bytes": record(
        path="/\xff", request_head=b"GET /\xff HTTP/1.1\r\nHost: a\r\nX: \xff\r\n\r\n"
    ),
    "breaks rules": record(response_head=b"HTTP/1.1 200\nno colon\n folded\nA:b\n\n"),
    "clock far off": record(began=1e300),
    "clock before 1970": record(began=-1e6),
    "clock that jumped": record(duration=-5.0, first_byte=7.0),
    "html": record(path="/<script>", response_body=Kept(b"</script><script>alert(1)</script>", 34)),
    "a URL as target": record(path="http://app.example.com/x", request_head=b""),
    "odd target": record(path="*", method="OPTIONS"),
}

# The fields that HAR 1.2 asks for, with their types
# (http://www.softwareishard.com/blog/har-12-spec).
REQUEST = {
    "method": str,
    "url": str,
    "httpVersion": str,
    "cookies": list,
    "headers": list,
    "queryString": list,
    "headersSize": int,
    "bodySize": int,
}
RESPONSE = {
    "status": int,
    "statusText": str,
    "httpVersion": str,
    "cookies": list,
    "headers": list,
    "content": dict,
    "redirectURL": str,
    "headersSize": int,
    "bodySize": int,
}
ENTRY = {
    "startedDateTime": str,
    "time": float,
    "request": dict,
    "response": dict,
    "cache": dict,
    "timings": dict,
}
PAIR = {"name": str, "value": str}


def check(found, expected, known=()):
    for name, kind in expected.items():
        accepted = (int, float) if kind is float else kind
        assert isinstance(found[name], accepted), (name, found[name])
        assert not isinstance(found[name], bool)
    assert all(name.startswith("_") or name in known or name in expected for name in found), found


@pytest.mark.parametrize("which", ODD.values(), ids=list(ODD))
@pytest.mark.parametrize("unmask", [True, False])
def test_an_export_has_what_the_format_asks_for(which, unmask):
    log = exported(which, unmask=unmask)["log"]
    assert log["version"] == "1.2"
    check(log["creator"], {"name": str, "version": str})
    [entry] = log["entries"]
    check(entry, ENTRY, ("comment",))
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", entry["startedDateTime"])
    check(entry["timings"], {"send": float, "wait": float, "receive": float})
    assert all(value >= 0 for value in entry["timings"].values())
    assert math.isclose(entry["time"], sum(entry["timings"].values()), abs_tol=1e-6)
    request, response = entry["request"], entry["response"]
    check(request, REQUEST, ("postData",))
    check(response, RESPONSE)
    check(
        response["content"],
        {"size": int, "mimeType": str},
        ("text", "encoding", "compression", "comment"),
    )
    if "postData" in request:
        check(request["postData"], {"mimeType": str, "params": list, "text": str}, ("comment",))
    for each in [
        *request["headers"],
        *request["queryString"],
        *response["headers"],
        *request["cookies"],
        *response["cookies"],
    ]:
        check(each, PAIR)
    for each in entry.get("_webSocketMessages", []):
        check(each, {"type": str, "time": float, "opcode": int, "data": str})


def test_an_entry_in_full():
    entry = exported(record())["log"]["entries"][0]
    request, response = entry["request"], entry["response"]
    assert entry["startedDateTime"] == "2023-11-14T22:13:20.123Z"
    assert (entry["time"], entry["timings"]) == (250, {"send": 0, "wait": 200, "receive": 50})
    assert request["url"] == "https://app.example.com/a?b=1&b=2&c"
    assert [(pair["name"], pair["value"]) for pair in request["queryString"]] == [
        ("b", "1"),
        ("b", "2"),
        ("c", ""),
    ]
    assert request["postData"] == {"mimeType": "application/json", "params": [], "text": '{"n": 1}'}
    assert request["cookies"] == [{"name": "a", "value": "1"}, {"name": "b", "value": "2"}]
    assert response["cookies"] == [{"name": "s", "value": "1"}]
    assert (response["status"], response["statusText"]) == (201, "Very Good")
    assert response["redirectURL"] == "/b"
    assert response["content"]["text"] == "Grüße\n"


def test_messages_of_a_websocket_are_as_chrome_writes_them():
    entry = exported(SOCKET)["log"]["entries"][0]
    assert entry["_resourceType"] == "websocket"
    assert entry["_webSocketMessages"] == [
        {"type": "send", "time": 1_700_000_001.5, "opcode": 1, "data": "hé"},
        {"type": "receive", "time": 1_700_000_002.5, "opcode": 2, "data": "AP8="},
        {"type": "receive", "time": 1_700_000_003.5, "opcode": 9, "data": ""},
        {"type": "send", "time": 1_700_000_004.5, "opcode": 8, "data": "A+hieWU="},
    ]


def test_a_compressed_answer_is_decoded_as_har_has_it():
    text = b"x" * 1000
    head = b"HTTP/1.1 200 OK\r\nContent-Type: text/plain\r\nContent-Encoding: gzip\r\n\r\n"
    data = gzip.compress(text)
    archive = exported(record(response_head=head, response_body=Kept(data, len(data))))
    content = archive["log"]["entries"][0]["response"]["content"]
    assert content["text"] == text.decode()
    assert (content["size"], content["compression"]) == (1000, 1000 - len(data))
    [found] = read(json.dumps(archive).encode(), body=LIMIT).records
    assert found.response_body.data == text
    assert b"Content-Encoding" not in found.response_head


def test_secrets_are_masked_everywhere():
    secret = "hunter2-is-secret"
    which = record(
        path=f"/a?token={secret}",
        request_body=Kept(b'{"password": "%s"}' % secret.encode(), 40),
        request_head=f"POST /a?token={secret} HTTP/1.1\r\nHost: a\r\n"
        f"Authorization: Bearer {secret}\r\n"
        f"Cookie: a={secret}\r\nReferer: https://a/?key={secret}\r\n\r\n".encode(),
        response_head=f"HTTP/1.1 200 OK\r\nSet-Cookie: a={secret}\r\nX-Api-Key: {secret}\r\n"
        f"Location: /?token={secret}\r\n\r\n".encode(),
        response_body=Kept(f"password={secret}".encode(), 30),
    )
    which.add_message(Message(0, True, "text", f'{{"token": "{secret}"}}'.encode(), 9), 10_000)
    text = json.dumps(exported(which, unmask=False))
    assert secret not in text
    assert text.count(json.dumps(MASK)[1:-1]) >= 9
    assert json.dumps(exported(which)).count(secret) >= 9


@pytest.mark.parametrize(
    "name",
    [
        name
        for name in ODD
        if name
        not in (
            "not followed",
            "invalid bytes",
            "breaks rules",
            "odd target",
            "a URL as target",
            "clock far off",
            "clock that jumped",
            "open",
        )
    ],
)
def test_what_was_exported_can_be_imported(name):
    before = ODD[name]
    [after] = read(b"".join(export([before], unmask=True)), body=LIMIT).records
    for field in (
        "hostname",
        "target",
        "visitor",
        "method",
        "path",
        "status",
        "problem",
        "request_body",
        "response_body",
        "messages",
    ):
        assert getattr(after, field) == getattr(before, field), field
    assert after.began == pytest.approx(before.began, abs=0.001)
    assert after.duration == pytest.approx(before.duration)
    assert after.imported and after.state == ENDED
    assert b"X-One: 1\r\nX-One: 2\r\n" in after.request_head
    assert after.request_head.startswith(f"{before.method} {before.path} HTTP/1.1\r\n".encode())


@pytest.mark.parametrize("which", ODD.values(), ids=list(ODD))
def test_whatever_was_exported_is_read_without_an_error(which):
    read(b"".join(export([which])), body=LIMIT)


# Other people's files ----------------------------------------------------------------------------

CHROME = {
    "log": {
        "version": "1.2",
        "creator": {"name": "WebInspector", "version": "537.36"},
        "pages": [],
        "entries": [
            {
                "_initiator": {"type": "other"},
                "startedDateTime": "2026-01-31T13:00:00.123456+01:00",
                "time": 12.5,
                "request": {
                    "method": "GET",
                    "url": "https://user:pass@example.com:8443/ü?q=a b#frag",
                    "httpVersion": "http/2.0",
                    "headers": [
                        {"name": ":authority", "value": "example.com"},
                        {"name": "accept", "value": "*/*"},
                    ],
                    "queryString": [],
                    "cookies": [],
                    "headersSize": -1,
                    "bodySize": 0,
                },
                "response": {
                    "status": 200,
                    "statusText": "",
                    "httpVersion": "http/2.0",
                    "headers": [
                        {"name": "content-encoding", "value": "br"},
                        {"name": "set-cookie", "value": "a=1\nb=2"},
                        {"name": "content-type", "value": "image/png"},
                    ],
                    "cookies": [],
                    "content": {
                        "size": 3,
                        "mimeType": "image/png",
                        "text": "AP8A",
                        "encoding": "base64",
                    },
                    "redirectURL": "",
                    "headersSize": -1,
                    "bodySize": -1,
                    "_transferSize": 300,
                },
                "cache": {},
                "timings": {
                    "blocked": 1,
                    "dns": -1,
                    "ssl": -1,
                    "connect": -1,
                    "send": 0.5,
                    "wait": 10,
                    "receive": 1,
                    "_blocked_queueing": 0.3,
                },
                "serverIPAddress": "192.0.2.1",
                "connection": "1",
            },
        ],
    }
}


def changed(*path, to):
    """CHROME's archive with something else at a place in its entry; None: without it."""
    document = copy.deepcopy(CHROME)
    at = document["log"]["entries"][0]
    for key in path[:-1]:
        at = at[key]
    if to is None:
        del at[path[-1]]
    else:
        at[path[-1]] = to
    return json.dumps(document).encode()


def test_an_archive_of_chrome():
    [found] = read(json.dumps(CHROME).encode(), body=LIMIT).records
    assert found.began == 1769860800.123456
    assert (found.duration, found.first_byte) == (0.0125, 0.0115)
    assert found.hostname == "example.com"
    assert found.path == "/%C3%BC?q=a%20b"
    assert found.request_head == (
        b"GET /%C3%BC?q=a%20b HTTP/1.1\r\nHost: example.com:8443\r\naccept: */*\r\n"
        b"X-Forwarded-Proto: https\r\n\r\n"
    )
    assert found.response_head == (
        b"HTTP/1.1 200 \r\nset-cookie: a=1\r\nset-cookie: b=2\r\ncontent-type: image/png\r\n\r\n"
    )
    assert found.response_body == Kept(b"\0\xff\0", 3)
    assert found.imported


def test_what_has_no_http_url_is_left_out():
    data = changed("request", "url", to="data:text/plain,x")
    assert read(data, body=LIMIT) == ([], 1, ("1 entries without an http URL were left out",))


def test_bodies_are_cut_at_the_limit():
    text = base64.b64encode(b"a" * 1000).decode()
    [found] = read(changed("response", "content", "text", to=text), body=10).records
    assert found.response_body == Kept(b"a" * 10, 1000)


E = "entries[0]"
WRONG = {
    "nothing": (b"", "line 1, column 1"),
    "no JSON": (b"<html>", "line 1, column 1"),
    "cut": (b'{"log": {"entries": [', "expected a HAR file"),
    "no UTF-8": (b'{"log": "\xff"}', "byte 9 is not UTF-8"),
    "UTF-16": ('{"log": {}}'.encode("utf-16"), "byte 0 is not UTF-8"),
    "a list": (b"[]", "the file: a list came, expected an object"),
    "no log": (b"{}", "the file has no log"),
    "log is a text": (b'{"log": "x"}', "the file.log: a text came, expected an object"),
    "no entries": (b'{"log": {}}', "log has no entries"),
    "entries is null": (b'{"log": {"entries": null}}', "log.entries: null came, expected a list"),
    "version 2": (b'{"log": {"version": "2.0", "entries": []}}', "log.version: '2.0' came"),
    "an entry that is none": (
        b'{"log": {"entries": [7]}}',
        f"{E}: a number came, expected an object",
    ),
    "NaN": (b'{"log": NaN}', "NaN came, which is no JSON"),
    "deep": (b'{"log": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", "nests too deeply"),
    "a long number": (b'{"log": ' + b"9" * 5000 + b"}", "a number of thousands of digits"),
    "no request": (changed("request", to=None), f"{E} has no request"),
    "no url": (changed("request", "url", to=None), f"{E}.request has no url"),
    "url is a number": (changed("request", "url", to=7), f"{E}.request.url: a number came"),
    "no host": (changed("request", "url", to="http:///x"), f"{E}.request.url: "),
    "a bad host": (changed("request", "url", to="http://a b/"), f"{E}.request.url: "),
    "a bad IPv6": (changed("request", "url", to="http://[::/"), f"{E}.request.url: "),
    "line breaks in the url": (
        changed("request", "url", to="http://a/\r\nX: y"),
        None,
    ),  # urlsplit takes them out
    "a long url": (changed("request", "url", to="http://a/" + "x" * 9000), "target of 9001 bytes"),
    "a bad method": (changed("request", "method", to="GE T"), f"{E}.request.method: 'GE T' came"),
    "a line in the method": (changed("request", "method", to="GET\r\nX:"), f"{E}.request.method: "),
    "headers is an object": (
        changed("request", "headers", to={}),
        f"{E}.request.headers: an object",
    ),
    "a header that is none": (changed("request", "headers", to=[1]), f"{E}.request.headers[0]: "),
    "a bad name": (
        changed("request", "headers", to=[{"name": "a b", "value": ""}]),
        "'a b' came, expected the",
    ),
    "a line in a name": (
        changed("request", "headers", to=[{"name": "a\r\nb", "value": ""}]),
        "expected the name of",
    ),
    "a control in a value": (
        changed("request", "headers", to=[{"name": "a", "value": "b\rX: y"}]),
        "control character",
    ),
    "a value that is none": (
        changed("request", "headers", to=[{"name": "a", "value": None}]),
        "headers[0].value: null",
    ),
    "a huge head": (
        changed("request", "headers", to=[{"name": "a", "value": "b" * 70_000}]),
        "a head of 70",
    ),
    "a bad status": (changed("response", "status", to=99), f"{E}.response.status: 99 came"),
    "a status that is text": (changed("response", "status", to="200"), f"{E}.response.status: "),
    "a status that is true": (changed("response", "status", to=True), f"{E}.response.status: "),
    "no base64": (
        changed("response", "content", "text", to="%%%"),
        f"{E}.response.content.text is no base64",
    ),
    "text is a list": (
        changed("response", "content", "text", to=[]),
        f"{E}.response.content.text: ",
    ),
    "a bad size": (changed("response", "content", "_size", to=1), f"{E}.response.content._size: 1"),
    "no date": (changed("startedDateTime", to="yesterday"), f"{E}.startedDateTime: 'yesterday'"),
    "month 13": (changed("startedDateTime", to="2026-13-01T00:00:00Z"), "startedDateTime"),
    "year 0": (changed("startedDateTime", to="0000-01-01T00:00:00Z"), "startedDateTime"),
    "a time that is text": (changed("time", to="1"), f"{E}.time: '1' came, expected milliseconds"),
    "a huge time": (changed("time", to=1e300), f"{E}.time: 1e+300 came"),
    "an infinite time": (changed("time", to=7).replace(b": 7", b": 1e999"), f"{E}.time: inf came"),
    "a bad timing": (changed("timings", "wait", to="x"), f"{E}.timings.wait: 'x' came"),
    "messages is an object": (
        changed("_webSocketMessages", to={}),
        "_webSocketMessages: an object",
    ),
    "a bad opcode": (
        changed("_webSocketMessages", to=[{"data": "", "opcode": 3}]),
        "opcode: 3 came",
    ),
    "an opcode that is a list": (
        changed("_webSocketMessages", to=[{"data": "", "opcode": [1]}]),
        "opcode: [1] came",
    ),
    "a bad message": (
        changed("_webSocketMessages", to=[{"data": "%", "opcode": 2}]),
        "is no base64",
    ),
    "a message's time": (
        changed("_webSocketMessages", to=[{"data": "", "opcode": 1, "time": "x"}]),
        "time: 'x' came",
    ),
}


@pytest.mark.parametrize(("data", "words"), WRONG.values(), ids=list(WRONG))
def test_an_archive_that_is_none(data, words):
    began = time.process_time()
    if words is None:
        for found in read(data, body=LIMIT).records:
            assert found.request_head.count(b"\r\n") == 5 - (b"accept" not in found.request_head)
        return
    with pytest.raises(NotHar) as raised:
        read(data, body=LIMIT)
    assert words in str(raised.value)
    assert str(raised.value).isprintable() and len(str(raised.value)) < 300
    assert time.process_time() - began < 5


def test_files_values_and_entries_are_bounded(monkeypatch):
    monkeypatch.setattr(har, "MOST_FILE", 10)
    with pytest.raises(NotHar, match="a file of 11 bytes, expected at most 10"):
        read(b" " * 11, body=LIMIT)
    monkeypatch.undo()
    monkeypatch.setattr(har, "MOST_VALUES", 1000)
    with pytest.raises(NotHar, match="a file of over 1000 values, expected fewer"):
        read(b'{"log": [' + b"[]," * 1000 + b"[]]}", body=LIMIT)
    read(b'{"log": {"entries": [], "comment": "%s"}}' % (b"[]," * 1000), body=LIMIT)
    monkeypatch.setattr(har, "MOST_ENTRIES", 1)
    entries = CHROME["log"]["entries"] * 2
    with pytest.raises(NotHar, match="log.entries: 2 came, expected at most 1"):
        read(json.dumps({"log": {"entries": entries}}).encode(), body=LIMIT)


def test_half_a_surrogate_pair_does_not_break_it():
    data = changed("request", "headers", to=[{"name": "a", "value": "X"}]).replace(
        b'"X"', b'"\\ud800"'
    )
    [found] = read(data, body=LIMIT).records
    assert b"a: ?\r\n" in found.request_head


def test_an_export_comes_in_pieces():
    pieces = list(export([record(response_body=Kept(b"x" * 50_000, 50_000))] * 20))
    assert len(pieces) > 5
    assert max(map(len, pieces)) < 4 * har.PIECE
    assert json.loads(b"".join(pieces))


def test_a_host_that_is_none_gives_way_to_that_of_the_url():
    """Else what is exported again could not be imported."""
    document = exported(record())
    headers = document["log"]["entries"][0]["request"]["headers"]
    headers[0]["value"] = "a b"
    [found] = read(json.dumps(document).encode(), body=LIMIT).records
    assert b"Host: app.example.com\r\n" in found.request_head
    assert read(json.dumps(exported(found)).encode(), body=LIMIT).records
