"""The inspector's page and JSON API, over HTTP."""

import base64
import contextlib
import gzip
import http.client
import json
import re
import time

import pytest
from support import ROOT, TIMEOUT

from gotunnel_agent.inspector import api as api_module
from gotunnel_agent.inspector.access import Door
from gotunnel_agent.inspector.api import Api
from gotunnel_agent.inspector.kept import Kept
from gotunnel_agent.inspector.mask import MASK
from gotunnel_agent.inspector.order import CannotReplay, read_order
from gotunnel_agent.inspector.page import policy
from gotunnel_agent.inspector.record import ENDED, OPEN, Message, Record, Ring
from gotunnel_agent.inspector.server import InspectorServer, listen

TOKEN = "T" * 43
SECRET = "hunter2-is-secret"
HOSTILE = "<script>alert(1)</script>\x1b[31m\u202e"
PNG = b"\x89PNG\r\n\x1a\n" + bytes(50)


def record(**values):
    usual = dict(
        hostname="app.example.com", target="localhost:3000", visitor="192.0.2.7", method="POST",
        path=f"/a?token={SECRET}", status=200, began=time.time(), duration=0.25, first_byte=0.1,
        request_head=f"POST /a?token={SECRET} HTTP/1.1\r\nHost: app.example.com\r\n"
        f"Authorization: Bearer {SECRET}\r\nCookie: a={SECRET}\r\n\r\n".encode(),
        response_head="HTTP/1.1 200 OK\r\nContent-Type: text/html\r\n"
        f"Set-Cookie: a={SECRET}\r\n\r\n".encode(),
        request_body=Kept(f'{{"password": "{SECRET}"}}'.encode(), 40),
        response_body=Kept(HOSTILE.encode(), len(HOSTILE.encode())), state=ENDED,
    )  # fmt: skip
    return Record(**{**usual, **values})


@pytest.fixture
def ring():
    return Ring(1024 * 1024)


class Inspector:
    def __init__(self, port, api):
        self.port, self.api = port, api

    def ask(self, path, method="GET", body=None, fields=None, token=True):
        """Status, fields and body of an answer."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=TIMEOUT)
        given = {"Authorization": f"Bearer {TOKEN}"} if token else {}
        with contextlib.closing(connection):
            connection.request(method, path, body, {**given, **(fields or {})})
            answer = connection.getresponse()
            return answer.status, answer.headers, answer.read()

    def get(self, path):
        status, fields, body = self.ask(f"/api/v1/{path}")
        assert status == 200, body
        assert fields["Content-Type"] == "application/json"
        assert body.isascii()
        return json.loads(body)

    def events(self):
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=TIMEOUT)
        connection.request("GET", "/api/v1/events", headers={"Authorization": f"Bearer {TOKEN}"})
        answer = connection.getresponse()
        assert answer.status == 200
        return contextlib.closing(answer), told(answer)


def told(answer):
    """The events of a stream: name and value."""
    name = ""
    while line := answer.readline().decode().rstrip("\n"):
        pass
    while True:
        line = answer.readline().decode().rstrip("\n")
        if line.startswith("event: "):
            name = line.removeprefix("event: ")
        elif line.startswith("data: "):
            yield name, json.loads(line.removeprefix("data: "))


@pytest.fixture
def inspector(ring, monkeypatch):
    monkeypatch.setattr(api_module, "PAUSE", 0)
    listening = listen("127.0.0.1", 0)
    port = listening.getsockname()[1]
    door = Door(TOKEN, "127.0.0.1", port)
    api = Api(ring, door, lambda: {"tunnels": []})
    server = InspectorServer(listening, door, api)
    server.start()
    yield Inspector(port, api)
    server.close()


# The page and the token


def test_the_token_in_the_address_becomes_a_cookie(inspector):
    status, fields, body = inspector.ask(f"/?token={TOKEN}", token=False)
    assert (status, fields["Location"], body) == (303, "./", b"")
    cookie = fields["Set-Cookie"]
    assert TOKEN not in cookie
    assert cookie.split("; ")[1:] == ["HttpOnly", "SameSite=Strict", "Path=/"]
    status, fields, body = inspector.ask("/", token=False, fields={"Cookie": cookie.split(";")[0]})
    assert status == 200
    assert fields["Content-Type"] == "text/html; charset=utf-8"
    assert "script-src 'sha256-" in fields["Content-Security-Policy"]
    assert "unsafe" not in fields["Content-Security-Policy"]
    assert TOKEN.encode() not in body


def test_a_link_from_another_site_is_led_on_by_a_page(inspector):
    """On a redirect a browser would not send the cookie."""
    fields = {"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "navigate",
              "Sec-Fetch-Dest": "document"}  # fmt: skip
    status, found, body = inspector.ask(f"/?token={TOKEN}", token=False, fields=fields)
    assert status == 200 and found["Set-Cookie"]
    assert b'http-equiv="refresh" content="0;url=./"' in body
    assert "sandbox" not in found["Content-Security-Policy"]
    assert TOKEN.encode() not in body


@pytest.mark.parametrize("path", ["/", "/?token=", "/?token=x", "/?token=%ff", f"/?Token={TOKEN}"])
def test_without_the_token_the_page_says_how_to_get_it(inspector, path):
    status, fields, body = inspector.ask(path, token=False)
    assert status == 401
    assert b"gotunnel inspect --url" in body
    assert "Set-Cookie" not in fields
    assert fields["Content-Security-Policy"] == policy(body)  # its style is permitted


def test_the_token_in_other_addresses_does_not_count(inspector):
    assert inspector.ask(f"/api/v1/info?token={TOKEN}", token=False)[0] == 401


# Visits


def test_a_list_has_the_latest_first_and_can_be_paged(inspector, ring):
    for number in range(5):
        ring.add(record(path=f"/{number}", method="GET" if number % 2 else "POST"))
    found = inspector.get("visits?limit=2")
    assert [visit["id"] for visit in found["visits"]] == [5, 4]
    assert (found["matched"], found["total"], found["oldest"]) == (5, 5, 1)
    assert [visit["id"] for visit in inspector.get("visits?limit=2&before=4")["visits"]] == [3, 2]
    assert [visit["id"] for visit in inspector.get("visits?after=3")["visits"]] == [5, 4]
    assert [visit["id"] for visit in inspector.get("visits?method=GET")["visits"]] == [4, 2]
    assert [visit["id"] for visit in inspector.get("visits?q=path:/3&status=2xx")["visits"]] == [4]
    assert [visit["id"] for visit in inspector.get("visits?ids=2,9")["visits"]] == [2]
    assert inspector.get("visits?limit=0")["visits"] == []
    assert inspector.get("visits?q=status:5xx")["visits"] == []


def test_what_a_list_shows_is_bounded(inspector, ring):
    long = "x" * 60_000
    ring.add(record(path="/" + long, hostname=long, method=long, problem=long, visitor=long))
    [visit] = inspector.get("visits")["visits"]
    assert len(json.dumps(visit)) < 6000
    assert len(inspector.get("visits/1")["path"]) > 60_000


def test_a_visit_is_masked_until_it_is_asked_for(inspector, ring):
    which = ring.add(record())
    which.add_message(Message(0, True, "text", f'{{"token": "{SECRET}"}}'.encode(), 9), 9999)
    for path in ("visits", "visits/1", "har"):
        assert SECRET not in json.dumps(inspector.get(path)), path
        assert SECRET in json.dumps(inspector.get(f"{path}?unmask=1")), path
    for path in ("curl", "python", "request-body"):
        assert SECRET.encode() not in inspector.ask(f"/api/v1/visits/1/{path}")[2], path
        assert SECRET.encode() in inspector.ask(f"/api/v1/visits/1/{path}?unmask=1")[2], path
    assert inspector.get("visits/1")["masked"] is True
    assert inspector.get("visits/1?unmask=1")["masked"] is False


def test_a_secret_in_a_compressed_body_is_masked(inspector, ring):
    data = gzip.compress(f"password={SECRET}".encode())
    head = b"HTTP/1.1 200 OK\r\nContent-Encoding: gzip\r\n\r\n"
    ring.add(record(response_head=head, response_body=Kept(data, len(data))))
    path = "/api/v1/visits/1/response-body"
    assert inspector.ask(path)[2] == b"password=" + MASK.encode()
    assert inspector.ask(f"{path}?unmask=1")[2] == data
    assert inspector.ask(f"{path}?unmask=1&decoded=1")[2] == f"password={SECRET}".encode()


BINARY = f'\x01{{"password": "{SECRET}"}}\xff'.encode("latin-1")


@pytest.mark.parametrize(
    ("coding", "body"),
    [("", BINARY), ("gzip", gzip.compress(BINARY)),
     ("gzip", gzip.compress(f"password={SECRET}".encode()))],
    ids=["bytes", "bytes in gzip", "text in gzip"],
)  # fmt: skip
def test_no_secret_leaves_in_hex_or_base64(inspector, ring, coding, body):
    """Nor in a compressed body, whose bytes a copy or an archive would repeat."""
    coded = f"Content-Encoding: {coding}\r\n" if coding else ""
    head = f"POST / HTTP/1.1\r\nHost: a\r\n{coded}\r\n".encode()
    kept = Kept(body, len(body))
    each = record(
        request_head=head, request_body=kept,
        response_head=head.replace(b"POST / HTTP/1.1", b"HTTP/1.1 200 OK"), response_body=kept,
    )  # fmt: skip
    each.add_message(Message(1.0, True, "binary", BINARY, len(BINARY)), 10_000)
    ring.add(each)
    texts = []
    for path in ("visits/1", "har", "visits/1/curl", "visits/1/python"):
        text = inspector.ask(f"/api/v1/{path}")[2].decode()
        assert len(text) > 50
        # The ASCII at the right of hex is in pieces of 16.
        texts.append(re.sub(r"\|(\\n|$)[0-9a-f]{8}[0-9a-f ]{52}\|", "", text))
    for found in re.findall(r"[A-Za-z0-9+/]{20,}={0,2}", "".join(texts)):
        with contextlib.suppress(ValueError):
            plain = base64.b64decode(found)
            with contextlib.suppress(OSError, EOFError):
                plain += gzip.decompress(plain)
            texts.append(plain.decode("latin-1"))
    assert SECRET not in "".join(texts)


def test_an_image_is_not_masked(inspector, ring):
    data = PNG + b"&key=pixels;token=pixels"
    ring.add(record(response_body=Kept(data, len(data))))
    assert inspector.ask("/api/v1/visits/1/response-body")[2] == data


def test_parts_of_forms_are_masked_by_their_names(inspector, ring):
    head = b"POST / HTTP/1.1\r\nHost: a\r\nContent-Type: application/x-www-form-urlencoded\r\n\r\n"
    form = f"user=ann&password={SECRET}".encode()
    ring.add(record(request_head=head, request_body=Kept(form, len(form))))
    parts = inspector.get("visits/1")["request"]["body"]["parts"]
    assert [(part["name"], part["text"]) for part in parts] == [("user", "ann"), ("password", MASK)]


@pytest.mark.parametrize("kind", ["text/html", "image/svg+xml", "image/png", "text/javascript"])
def test_a_body_is_a_file_to_be_saved_whatever_it_says(inspector, ring, kind):
    head = f"HTTP/1.1 200 OK\r\nContent-Type: {kind}\r\n\r\n".encode()
    ring.add(record(response_head=head, response_body=Kept(PNG, len(PNG))))
    status, fields, body = inspector.ask("/api/v1/visits/1/response-body?unmask=1")
    assert (status, body) == (200, PNG)
    assert fields["Content-Type"] == "application/octet-stream"
    assert fields["Content-Disposition"] == 'attachment; filename="1-response.bin"'
    assert fields["X-Content-Type-Options"] == "nosniff"
    assert "sandbox" in fields["Content-Security-Policy"]


def test_hostile_text_is_text(inspector, ring):
    """JSON in ASCII: a terminal or a page that shows it as it is takes no harm."""
    odd = record(
        path="/" + HOSTILE, hostname=HOSTILE, visitor=HOSTILE, problem=HOSTILE, target=HOSTILE,
        method=HOSTILE, request_head=b"\xff\x00 <b>\r\nA\x1b: \x80\r\nno colon\r\n folded\r\n\r\n",
        response_head=b"", response_body=Kept(b"\xff\x00" + HOSTILE.encode(), 99), status=0,
    )  # fmt: skip
    odd.add_message(Message(0, True, "text", HOSTILE.encode() + b"\xff", 9), 9999)
    ring.add(odd)
    found = inspector.get("visits/1")
    assert found["request"]["line"] == "\\xff\x00 <b>"
    assert found["request"]["fields"] == [["A\x1b", "\\x80"], ["no colon", "folded"]]
    assert found["messages"][0]["base64"]
    assert inspector.get("visits?q=body:script")["matched"] == 1
    inspector.get("har")
    assert inspector.ask("/api/v1/visits/1/curl")[0] == 409


def test_ten_thousand_fields_are_shown(inspector, ring):
    head = b"GET / HTTP/1.1\r\n" + b"a: b\r\n" * 10_000 + b"\r\n"
    ring.add(record(request_head=head))
    assert len(inspector.get("visits/1")["request"]["fields"]) == 10_000


def test_many_messages_are_cut_to_the_latest(inspector, ring):
    which = ring.add(record(status=101))
    for number in range(300):
        which.add_message(Message(number, True, "text", b"x" * 10_000, 10_000), 1 << 30)
    found = inspector.get("visits/1")
    assert found["messages"][-1]["at"] == 299
    assert len(found["messages"]) + found["messages_dropped"] == 300
    assert found["messages_dropped"] > 50


ID = "1"
WRONG = [
    ("GET", "nothing", 404, "not-found"),
    ("GET", "../../etc/passwd", 404, "not-found"),
    ("GET", "visits/99", 404, "not-found"),
    ("GET", "visits/0", 404, "not-found"),
    ("GET", "visits/-1", 404, "not-found"),
    ("GET", "visits/99999999999999999999", 404, "not-found"),
    ("GET", "visits/1/", 404, "not-found"),
    ("GET", "visits/1x", 404, "not-found"),
    ("POST", "visits", 405, "method"),
    ("GET", "clear", 405, "method"),
    ("GET", "visits/1/replay", 405, "method"),
    ("GET", "visits?limit=x", 400, "query"),
    ("GET", "visits?limit=-1", 400, "query"),
    ("GET", "visits?after=%D9%A1", 400, "query"),
    ("GET", "visits?before=9999999999999999999999", 400, "query"),
    ("GET", "visits?ids=1,x", 400, "query"),
    ("GET", "visits?unmask=maybe", 400, "query"),
    ("GET", "visits?q=statsu:5", 400, "query"),
    ("GET", "visits?q=%22", 400, "query"),
    ("GET", "visits?status=abc", 400, "query"),
    ("GET", "visits?method=%22", 400, "query"),
    ("GET", "compare", 400, "query"),
    ("GET", "compare?left=1&right=x", 400, "query"),
    ("GET", "compare?left=1&right=99", 404, "not-found"),
    ("POST", "har", 400, "har"),
    ("POST", "visits/1/replay", 501, "replay"),
    ("GET", "replays/1", 501, "replay"),
]


@pytest.mark.parametrize(("method", "path", "status", "code"), WRONG)
def test_what_is_refused(inspector, ring, method, path, status, code):
    ring.add(record())
    found, fields, body = inspector.ask(f"/api/v1/{path}", method)
    document = json.loads(body)
    assert (found, document["error"]) == (status, code)
    assert document["message"] and document["message"].isprintable()
    assert fields["Content-Type"] == "application/json"
    assert (status == 405) == ("Allow" in fields)


class Replays:
    """What an order comes to, of which nothing is sent."""

    def start(self, number, document):
        raise CannotReplay(f"visit {number}: {document}", "busy")


@pytest.mark.parametrize(
    ("body", "status", "words"),
    [
        (b"", 503, "visit 1: {}"),
        (b' {"times": 2} ', 503, "visit 1: {'times': 2}"),
        (b"{", 400, "the body is no JSON in UTF-8"),
        (b'"\xff"', 400, "the body is no JSON in UTF-8"),
        (b"9" * 5000, 400, "the body is no JSON in UTF-8"),
        (b"[" + b"[]," * 10_000 + b"[]]", 400, "JSON of over 10000 values came"),
    ],
    ids=lambda value: repr(value)[:20],
)
def test_an_order_is_read(inspector, ring, body, status, words):
    ring.add(record())
    inspector.api._replays = Replays()
    found, _, answer = inspector.ask("/api/v1/visits/1/replay", "POST", body)
    assert found == status
    assert words in json.loads(answer)["message"]


def test_the_examples_of_the_documentation_have_all_keys(inspector, ring):
    which = ring.add(record())
    which.add_message(Message(0, True, "text", b"x", 1), 9999)
    text = (ROOT / "docs/inspector.md").read_text(encoding="utf-8").partition("### Info")[2]
    examples = [json.loads(each) for each in re.findall(r"```json\n(.+?)```", text, re.DOTALL)]
    info, visits, visit, message = examples[:4]
    assert info.keys() == inspector.get("info").keys()
    found = inspector.get("visits")
    assert visits.keys() == found.keys()
    assert visits["visits"][0].keys() == found["visits"][0].keys()
    detail = inspector.get("visits/1")
    assert detail.keys() == visits["visits"][0].keys() | visit.keys()
    assert detail["request"].keys() == visit["request"].keys()
    assert detail["request"]["body"].keys() == visit["request"]["body"].keys()
    assert detail["messages"][0].keys() == message.keys()


@pytest.mark.parametrize("deep", [b"[" * 9000 + b"]" * 9000, b'{"a":' * 4000 + b"1" + b"}" * 4000])
def test_an_order_of_many_levels_is_refused(inspector, ring, monkeypatch, deep):
    """By the reader of JSON up to Python 3.11; a later one reads so many levels."""
    replays = Replays()
    monkeypatch.setattr(replays, "start", lambda number, document: read_order(document))
    inspector.api._replays = replays
    ring.add(record())
    for body in (deep, b'{"times": %s}' % deep, b'{"fields": [["a", %s]]}' % deep):
        status, _, answer = inspector.ask("/api/v1/visits/1/replay", "POST", body)
        assert (status, len(answer) < 2000) == (400, True), answer


# HAR


def test_an_archive_goes_out_and_comes_in(inspector, ring):
    ring.add(record())
    ring.add(record(path="/two", status=404))
    status, fields, body = inspector.ask("/api/v1/har?unmask=1&q=status:404")
    assert fields["Content-Disposition"] == 'attachment; filename="gotunnel.har"'
    assert len(json.loads(body)["log"]["entries"]) == 1
    status, _, body = inspector.ask("/api/v1/har", "POST", body)
    assert (status, json.loads(body)) == (
        200, {"imported": 1, "skipped": 0, "ids": [3], "notes": []},
    )  # fmt: skip
    found = inspector.get("visits/3")
    assert (found["path"], found["imported"]) == ("/two", True)


def test_an_import_stays_within_the_budget(inspector, ring):
    for _ in range(15):
        ring.add(record(response_body=Kept(b"\xff" * 50_000, 50_000)))
    archive = inspector.ask("/api/v1/har")[2]
    for _ in range(3):
        document = json.loads(inspector.ask("/api/v1/har", "POST", archive)[2])
    assert document["imported"] <= 15
    assert ring.used <= ring.budget


def test_clear_forgets_all(inspector, ring):
    ring.add(record())
    assert json.loads(inspector.ask("/api/v1/clear", "POST")[2]) == {"cleared": 1}
    assert inspector.get("visits")["total"] == 0
    assert inspector.get("info")["oldest"] is None


# Events


def test_events_tell_what_comes_changes_and_goes(inspector, ring):
    ring.add(record())
    closing, events = inspector.events()
    with closing:
        assert next(events)[0] == "hello"
        which = ring.add(record(state=OPEN, status=0))
        name, value = next(events)
        assert name == "visit"
        assert [(visit["id"], visit["state"]) for visit in value["visits"]] == [(2, OPEN)]
        assert SECRET not in json.dumps(value)
        which.status, which.state = 200, ENDED
        ring.update(which)
        name, value = next(events)
        assert [(visit["id"], visit["state"]) for visit in value["visits"]] == [(2, ENDED)]
        ring.tell("replay", {"id": 1})
        assert next(events) == ("replay", {"id": 1})
        ring.clear()
        assert next(events) == ("gone", {"oldest": 3})


def test_two_readers_hear_the_same(inspector, ring):
    one, first = inspector.events()
    other, second = inspector.events()
    with one, other:
        assert next(first)[0] == next(second)[0] == "hello"
        ring.add(record())
        assert [next(events)[1]["visits"][0]["id"] for events in (first, second)] == [1, 1]


def test_a_flood_is_told_in_batches_and_what_is_lost_is_counted(inspector, ring):
    closing, events = inspector.events()
    with closing:
        next(events)
        for _ in range(5000):
            ring.add(record(request_head=b"", response_head=b""))
        heard = lost = 0
        last = 0
        while last < 5000:
            name, value = next(events)
            if name == "visit":
                heard += len(value["visits"])
                lost += value["missed"]
                last = max(visit["id"] for visit in value["visits"])
        assert heard + lost <= 5000
        assert heard < 5000 or lost == 0
