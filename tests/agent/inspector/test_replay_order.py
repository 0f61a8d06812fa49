"""Orders of replays, and the requests that they send, by values."""

import base64
import gzip
import json

import pytest

from gotunnel_agent.common.http1 import parse_request
from gotunnel_agent.inspector import content
from gotunnel_agent.inspector.kept import Kept
from gotunnel_agent.inspector.mask import MASK
from gotunnel_agent.inspector.order import (
    MOST_BODY,
    CannotReplay,
    Edit,
    Until,
    read_order,
    rebuild,
    unmasked,
    unmasked_fields,
    with_secrets,
)

POST = (
    b"POST /hook?a=1 HTTP/1.1\r\nHost: app.example.com\r\nContent-Type: application/json\r\n"
    b"X-Hub-Signature-256: sha256=abc\r\nContent-Length: 2\r\n\r\n"
)
GET = b"GET /a HTTP/1.1\r\nHost: app.example.com\r\nAccept: */*\r\n\r\n"


def edited(document, head=POST, content=b"{}", size=None, **named):
    whole = Kept(content, len(content))
    edit = with_secrets(read_order(document).edit, head, whole)
    return rebuild(head, Kept(content, len(content) if size is None else size), edit, **named)


def kept(body):
    return Kept(body, len(body))


def fields_of(outgoing):
    return parse_request(outgoing.head).fields.items


# Orders ------------------------------------------------------------------------------------------


def test_an_empty_order_sends_it_once_as_it_was():
    order = read_order({})
    assert (order.times, order.concurrency, order.every, order.until) == (1, 1, None, None)
    assert order.edit == Edit()


def test_null_is_the_same_as_a_missing_key():
    assert read_order({"method": None, "until": None, "body": None, "every": None}) == read_order(
        {}
    )


@pytest.mark.parametrize(
    "value, passing, failing",
    [("2xx", (200, 299), (199, 300)), ("4XX", (404,), (500,)), (200, (200,), (201,)),
     ("503", (503,), (500,))],
)  # fmt: skip
def test_until_names_a_status_or_a_class_of_them(value, passing, failing):
    until = read_order({"until": value}).until
    assert all(map(until.passes, passing)) and not any(map(until.passes, failing))


def test_until_is_told_as_it_was_given():
    assert [str(Until(200, 299)), str(Until(204, 204))] == ["2xx", "204"]


def test_pauses_grow_until_an_answer_passes():
    order = read_order({"until": "2xx"})
    assert [order.pause(done) for done in (1, 2, 3, 7, 20)] == [1, 2, 4, 60, 60]
    assert order.times == 20


def test_pauses_stay_as_they_were_named():
    order = read_order({"until": "2xx", "every": 0.5, "times": 1000})
    assert [order.pause(done) for done in (1, 9)] == [0.5, 0.5]
    assert read_order({"times": 5}).pause(3) == 0


@pytest.mark.parametrize(
    "document, words",
    [
        ([], "a list came, expected a JSON object"),
        (None, "null came"),
        ({"tmies": 3}, "unknown key 'tmies', expected hostname, method"),
        ({"\x1b[31m": 3}, r"unknown key '\x1b[31m'"),
        ({"times": 0}, "times: 0 came, expected a whole number, 1 to 1000"),
        ({"times": 1001}, "times: 1001 came"),
        ({"times": True}, "times: True came"),
        ({"times": "3"}, "times: '3' came"),
        ({"times": 1e3}, "times: 1000.0 came"),
        ({"concurrency": 9}, "concurrency: 9 came, expected a whole number, 1 to 8"),
        ({"concurrency": 2, "until": "2xx"}, "concurrency 2 with until, expected 1"),
        ({"concurrency": 2, "every": 1}, "concurrency 2 with every, expected 1"),
        ({"every": -1}, "every: -1 came, expected seconds, 0 to 3600"),
        ({"every": float("nan")}, "every: nan came"),
        ({"every": float("inf")}, "every: inf came"),
        ({"timeout": 0}, "timeout: 0 came, expected seconds, more than 0, at most"),
        ({"timeout": 601}, "timeout: 601 came, expected seconds, more than 0, at most 600"),
        ({"until": "passes"}, "until: 'passes' came, expected a status such as 200"),
        ({"until": 42}, "until: 42 came"),
        ({"until": True}, "until: True came"),
        ({"until": "²00"}, "until:"),
        ({"method": 3}, "method: a number came, expected a text"),
        ({"body": {}}, "body: an object came, expected a text"),
        ({"body": "a", "body_base64": "YQ=="}, "body and body_base64 came"),
        ({"body_base64": "Y"}, "body_base64: expected Base64"),
        ({"body_base64": "é"}, "body_base64: expected Base64"),
        ({"body": "\ud800"}, "body has half of a surrogate pair"),
        ({"body": "x" * (MOST_BODY + 1)}, f"a body of {MOST_BODY + 1} bytes"),
        ({"fields": {"A": "b"}}, "fields: an object came, expected a list of [name, value]"),
        ({"fields": [["A", "b"], ["A"]]}, "fields: item 1 is no [name, value]"),
        ({"fields": [["A", 1]]}, "fields: item 0 is no [name, value]"),
        ({"fields": [["A", "b"]] * 201}, "201 fields, expected at most 200"),
    ],
)
def test_a_wrong_order_is_refused_in_one_line(document, words):
    with pytest.raises(CannotReplay) as caught:
        read_order(document)
    assert words in str(caught.value) and str(caught.value).isprintable()


# As it was ---------------------------------------------------------------------------------------


def test_an_unedited_request_is_sent_as_it_was():
    outgoing = rebuild(POST, kept(b"{}"))
    assert outgoing.head == POST and outgoing.data == b"{}" and outgoing.notes == ()
    assert rebuild(GET, Kept()).head == GET


def test_fields_stay_in_their_order():
    head = b"POST / HTTP/1.1\r\nA: 1\r\nContent-Length: 2\r\nHost: a\r\nContent-Type: x\r\n\r\n"
    assert rebuild(head, kept(b"{}")).head == head


def test_a_chunked_body_is_sent_chunked_again():
    head = b"POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n"
    outgoing = rebuild(head, kept(b"hello"))
    assert outgoing.data == b"5\r\nhello\r\n0\r\n\r\n"
    assert ("Transfer-Encoding", "chunked") in fields_of(outgoing)


def test_trailers_belong_to_the_recorded_body():
    head = b"POST / HTTP/1.1\r\nHost: a\r\nTrailer: X\r\nTransfer-Encoding: chunked\r\n\r\n"
    outgoing = rebuild(head, kept(b"hello"), trailers=[("X", "1")])
    assert outgoing.head == head and outgoing.data == b"5\r\nhello\r\n0\r\nX: 1\r\n\r\n"
    outgoing = rebuild(head, kept(b"hello"), Edit(body=b"new"), trailers=[("X", "1")])
    assert b"Trailer" not in outgoing.head and outgoing.data == b"3\r\nnew\r\n0\r\n\r\n"


def test_fields_of_one_connection_are_not_sent_again():
    head = (
        b"POST / HTTP/1.1\r\nHost: a\r\nConnection: close, X-Hop\r\nX-Hop: 1\r\nKeep-Alive: 5\r\n"
        b"TE: trailers\r\nTrailer: X\r\nExpect: 100-continue\r\nUpgrade: h2c\r\n"
        b"HTTP2-Settings: x\r\nContent-Length: 1\r\nX-Kept: 1\r\n\r\n"
    )
    outgoing = rebuild(head, kept(b"x"))
    assert fields_of(outgoing) == [("Host", "a"), ("Content-Length", "1"), ("X-Kept", "1")]
    assert outgoing.notes == ("Expect is left out: the body is sent at once",)


def test_a_target_gets_the_host_of_its_tunnel():
    assert fields_of(rebuild(GET, Kept(), host_header="localhost:3000"))[0] == (
        "Host", "localhost:3000",
    )  # fmt: skip


def test_bytes_of_other_encodings_stay_as_they_came():
    head = "GET /ü HTTP/1.1\r\nHost: a\r\nX: grüße\r\n\r\n".encode()
    assert rebuild(head, Kept()).head == head


@pytest.mark.parametrize(
    "head, content, size, switched, words, code",
    [
        (b"", b"", 0, False, "was not read", "no-request"),
        (b"GET\r\n\r\n", b"", 0, False, "its request cannot be sent", "no-request"),
        (b"CONNECT a:1 HTTP/1.1\r\nHost: a\r\n\r\n", b"", 0, False, "CONNECT", "no-request"),
        (POST, b"{", 70000, False, "only 1 of its body's 70000 bytes were kept", "incomplete-body"),
        (GET, b"", 0, True, "a WebSocket handshake", "websocket"),
        (
            b"GET / HTTP/1.1\r\nHost: a\r\nUpgrade: WebSocket\r\nConnection: Upgrade\r\n\r\n",
            b"", 0, False, "a WebSocket handshake", "websocket",
        ),
        (
            b"GET / HTTP/1.1\r\nHost: a\r\nSec-WebSocket-Key: x\r\n\r\n",
            b"", 0, False, "a WebSocket handshake", "websocket",
        ),
    ],
)  # fmt: skip
def test_what_cannot_be_sent_again_is_refused(head, content, size, switched, words, code):
    with pytest.raises(CannotReplay, match=words) as caught:
        rebuild(head, Kept(content, size), switched=switched)
    assert caught.value.code == code


def test_a_body_that_has_not_come_whole_is_not_sent_again():
    long = POST.replace(b"Length: 2", b"Length: 200")
    with pytest.raises(CannotReplay, match="only 2 of its body's 200 bytes have come"):
        rebuild(long, kept(b"{}"))
    chunked = POST.replace(b"Content-Length: 2", b"Transfer-Encoding: chunked")
    with pytest.raises(CannotReplay, match="its body may still be coming"):
        rebuild(chunked, kept(b"{}"), complete=False)
    assert rebuild(long, kept(b"{}"), Edit(body=b"{}"), complete=False).data == b"{}"
    assert rebuild(POST, kept(b"{}"), complete=False).data == b"{}"


def test_a_body_that_was_not_kept_whole_may_be_given():
    assert edited({"body": "all of it"}, content=b"{", size=70000).data == b"all of it"


# Edited ------------------------------------------------------------------------------------------


def test_an_edited_body_gets_its_own_length():
    outgoing = edited({"body": '{"ü": 1}'})
    assert outgoing.data == '{"ü": 1}'.encode()
    assert ("Content-Length", "9") in fields_of(outgoing)
    assert outgoing.notes == (
        "X-Hub-Signature-256: made for the recorded body, perhaps not for yours",
    )


def test_a_body_may_be_bytes():
    assert edited({"body_base64": base64.b64encode(b"\0\xff").decode()}).data == b"\0\xff"


def test_an_emptied_body_has_the_length_0():
    outgoing = edited({"body": ""})
    assert outgoing.data == b"" and ("Content-Length", "0") in fields_of(outgoing)


def test_a_typed_body_is_not_called_compressed():
    head = b"POST / HTTP/1.1\r\nHost: a\r\nContent-Encoding: gzip\r\nContent-Length: 1\r\n\r\n"
    typed = edited({"body": "text"}, head, b"x")
    assert "Content-Encoding" not in dict(fields_of(typed)) and typed.notes
    assert "Content-Encoding" in dict(fields_of(edited({"body_base64": "eA=="}, head, b"x")))
    assert "Content-Encoding" in dict(fields_of(edited({}, head, b"x")))


def test_a_get_without_a_body_has_no_length_and_a_post_has_one():
    assert "Content-Length" not in dict(fields_of(edited({}, GET, b"")))
    assert dict(fields_of(edited({"method": "POST"}, GET, b"")))["Content-Length"] == "0"
    assert "Content-Length" not in dict(fields_of(edited({"method": "GET", "body": ""})))


@pytest.mark.parametrize(
    "path, sent",
    [
        ("/b?x=1", "/b?x=1"),
        ("/käse brot", "/k%C3%A4se%20brot"),
        ("/\N{HAMBURGER}", "/%F0%9F%8D%94"),
        ("/%zz%0d%0a", "/%zz%0d%0a"),
        ("//other/x", "//other/x"),
        ("/\x85\xa0\u2028", "/%C2%85%C2%A0%E2%80%A8"),
        ("/hook?a=1", "/hook?a=1"),
    ],
)
def test_an_edited_path_is_encoded(path, sent):
    assert edited({"path": path}).target == sent


def test_a_path_that_is_not_edited_stays_as_it_came():
    head = "GET /ü HTTP/1.1\r\nHost: a\r\n\r\n".encode()
    for shown in ("/ü", "/ü".encode().decode("latin-1")):
        assert edited({"path": shown}, head, b"").head == head


def test_fields_are_replaced_as_a_whole():
    outgoing = edited({"fields": [["Host", "b"], ["A", " x "], ["A", "y\tz"]], "body": "abc"})
    assert fields_of(outgoing) == [
        ("Host", "b"), ("A", "x"), ("A", "y\tz"), ("Content-Length", "3"),
    ]  # fmt: skip


def test_a_host_that_is_left_out_is_the_recorded_one():
    assert fields_of(edited({"fields": []}))[0] == ("Host", "app.example.com")


def test_an_edited_host_goes_before_that_of_the_tunnel():
    named = {"host_header": "localhost"}
    assert fields_of(edited({"fields": [["host", "b"]]}, **named))[0] == ("host", "b")
    same = {"fields": [["Host", "app.example.com"]]}
    assert fields_of(edited(same, **named))[0] == ("Host", "localhost")


@pytest.mark.parametrize(
    "name",
    [
        "Content-Length",
        "content_length",
        "Content.Length",
        "Transfer-Encoding",
        "Transfer_Encoding",
    ],
)
def test_an_edited_length_is_computed_anew(name):
    outgoing = edited({"fields": [["Host", "a"], [name, "7"]]})
    assert fields_of(outgoing) == [("Host", "a"), ("Content-Length", "2")]
    assert outgoing.notes == ("the length of the body is always computed: yours is left out",)


def test_a_recorded_length_that_comes_back_is_no_news():
    fields = [list(item) for item in parse_request(POST).fields.items]
    assert edited({"fields": fields}).notes == ()


def test_a_value_beyond_latin_1_goes_out_in_utf_8():
    assert "X: 日本".encode() in edited({"fields": [["X", "日本"]]}).head


@pytest.mark.parametrize(
    "document, words",
    [
        ({"method": "GE T"}, "method 'GE T', expected a word"),
        ({"method": ""}, "method ''"),
        ({"method": "GET\r\nX: y"}, "method"),
        ({"method": "A" * 41}, "method"),
        ({"method": "connect"}, "method CONNECT"),
        ({"path": "/a\r\nX: y"}, "with a line break or control character, expected it encoded"),
        ({"path": "/a\nb"}, "with a line break"),
        ({"path": "/a\tb"}, "with a line break or control character"),
        ({"path": "/\x00"}, "with a line break or control character"),
        ({"path": "/ HTTP/1.1\r\n\r\nGET /b"}, "with a line break"),
        ({"path": "a"}, "path 'a', expected it to begin with /"),
        ({"path": ""}, "path '', expected it to begin with /"),
        ({"path": "*"}, "path '*', expected it to begin with /"),
        ({"path": "/a#b"}, "with a fragment"),
        ({"path": "https://elsewhere.example/a"}, "a URL came, expected the path alone"),
        ({"path": "/\ud800"}, "path has half of a surrogate pair"),
        ({"path": "/" + "ü" * 2000}, "path of 12001 bytes, expected at most 8192"),
        ({"fields": [["A B", "x"]]}, "field name 'A B', expected letters, digits and hyphens"),
        ({"fields": [["", "x"]]}, "field name ''"),
        ({"fields": [["A:", "x"]]}, "field name 'A:'"),
        ({"fields": [["\x85\n", MASK]]}, r"field \x85\n: nothing was recorded"),
        ({"fields": [["A\r\nB", "x"]]}, r"field name 'A\r\nB'"),
        ({"fields": [["Ä", "x"]]}, "field name"),
        ({"fields": [["A", "secret\r\nB: x"]]}, "the value of A has a line break"),
        ({"fields": [["A", "secret\nB: x"]]}, "the value of A has a line break"),
        ({"fields": [["A", "secret\0"]]}, "the value of A has a line break or control"),
        ({"fields": [["A", "\ud800secret"]]}, "the value of A has half of a surrogate pair"),
        ({"fields": [["Host", "a"], ["host", "b"]]}, "2 Host fields, expected one"),
        ({"fields": [["Host", "a b/secret"]]}, "host"),
        ({"fields": [["A", "x" * 70000]]}, "expected at most 65536"),
        ({"fields": [["Upgrade", "websocket"]]}, "a WebSocket handshake"),
    ],
)  # fmt: skip
def test_a_wrong_edit_is_refused_in_one_line(document, words):
    with pytest.raises(CannotReplay) as caught:
        edited(document)
    text = str(caught.value)
    assert words in text and text.isprintable() and len(text) < 300
    assert "secret" not in text or "Host" in str(document)


def test_a_websocket_handshake_whose_fields_are_removed_is_a_plain_request():
    head = b"GET /ws HTTP/1.1\r\nHost: a\r\nUpgrade: websocket\r\nConnection: upgrade\r\n\r\n"
    outgoing = edited({"fields": [["Accept", "text/html"]]}, head, b"", switched=True)
    assert fields_of(outgoing) == [("Host", "a"), ("Accept", "text/html")]


# Masked values -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "edited, plain, masked, result",
    [
        (MASK, "abc", MASK, "abc"),
        (f"Bearer {MASK}", "Bearer abc", f"Bearer {MASK}", "Bearer abc"),
        ("Bearer new", "Bearer abc", f"Bearer {MASK}", "Bearer new"),
        (f"/a?token={MASK}&b=2", "/a?token=T&b=1", f"/a?token={MASK}&b=1", "/a?token=T&b=2"),
        (f"b={MASK}; a={MASK}", "a=1; b=2", f"a={MASK}; b={MASK}", "b=2; a=1"),
        (f"b={MASK}", "a=1; b=2", f"a={MASK}; b={MASK}", "b=2"),
        (
            f'{{\n  "user": "eve",\n  "password": "{MASK}"\n}}',
            '{"user":"bob","password":"p"}',
            f'{{"user":"bob","password":"{MASK}"}}',
            '{\n  "user": "eve",\n  "password": "p"\n}',
        ),
        (f"t={MASK}&t={MASK}&x", "t=1&t=2", f"t={MASK}&t={MASK}", "t=1&t=2&x"),
        (f"as {MASK} it was", f"as {MASK} it was", f"as {MASK} it was", f"as {MASK} it was"),
    ],
)  # fmt: skip
def test_a_masked_value_stands_for_the_recorded_one(edited, plain, masked, result):
    assert unmasked(edited, plain, masked, "it") == result


@pytest.mark.parametrize("edited", [f"c={MASK}", f"a={MASK}; a={MASK}", MASK])
def test_a_mask_that_stands_for_nothing_is_not_sent(edited):
    with pytest.raises(CannotReplay, match="nothing was recorded for a masked value"):
        unmasked(edited, "a=1; b=2", f"a={MASK}; b={MASK}", "it")


def test_masked_fields_stand_for_the_recorded_ones_of_their_name():
    recorded = [("Cookie", "a=1"), ("Cookie", "b=2"), ("Accept", "x"), ("X-Api-Key", "k")]
    given = [("Accept", "y"), ("cookie", f"b={MASK}"), ("cookie", f"a={MASK}"), ("X-Api-Key", MASK)]
    assert unmasked_fields(given, recorded) == [
        ("Accept", "y"), ("cookie", "b=2"), ("cookie", "a=1"), ("X-Api-Key", "k"),
    ]  # fmt: skip


def test_a_masked_field_of_another_name_is_not_sent():
    with pytest.raises(CannotReplay, match="field X-Key: nothing was recorded"):
        unmasked_fields([("X-Key", MASK)], [("X-Api-Key", "k")])


def test_a_masked_field_may_be_edited_beside_its_secret():
    recorded = [("Cookie", "session=s3cret; theme=dark")]
    given = [("Cookie", f"session={MASK}; theme=light; new=1")]
    assert unmasked_fields(given, recorded) == [
        ("Cookie", "session=s3cret; theme=light; new=1")
    ]  # fmt: skip


def test_fields_that_were_not_edited_keep_their_bytes():
    recorded = [("A", "gr\xc3\xbc\xdfe"), ("B", "\xff"), ("C", "gr\xc3\xbc\xc3\x9fe")]
    shown = [(name, value.encode("latin-1").decode("utf-8", "backslashreplace"))
             for name, value in recorded]  # fmt: skip
    assert unmasked_fields(shown, recorded) == recorded


def restored(document, head=POST, body="{}"):
    return with_secrets(read_order(document).edit, head, kept(body.encode()))


def test_the_secrets_of_an_edit_are_the_recorded_ones():
    head = (
        b"POST /login?token=T&x=1 HTTP/1.1\r\nHost: a\r\nAuthorization: Bearer abc\r\n"
        b"Content-Length: 29\r\n\r\n"
    )
    edit = restored(
        {
            "path": f"/login?token={MASK}&x=2",
            "fields": [["Host", "a"], ["Authorization", f"Bearer {MASK}"]],
            "body": f'{{\n  "user": "eve",\n  "password": "{MASK}",\n  "pin": "{MASK}"\n}}',
        },
        head,
        '{"user":"bob","password":"p","pin":1234}',
    )
    assert edit.path == "/login?token=T&x=2"
    assert edit.fields == [("Host", "a"), ("Authorization", "Bearer abc")]
    assert edit.body == b'{\n  "user": "eve",\n  "password": "p",\n  "pin": 1234\n}'


@pytest.mark.parametrize("body", ['{"password": "p"}', f'{{"password": "{MASK}"}}'])
def test_a_body_that_was_not_changed_is_no_edit(body):
    """So it may stay compressed, and its signature fits."""
    assert restored({"body": body}, body='{"password": "p"}').body is None


def test_a_compressed_body_that_was_not_changed_stays_compressed():
    head = POST.replace(b"Content-Length: 2", b"Content-Encoding: gzip\r\nContent-Length: 40")
    packed = gzip.compress(b'{"password": "p", "a": 1}')
    (shown,) = [content.describe(parse_request(head).fields.items, kept(packed)).text]
    edits = {text: read_order({"body": text}).edit for text in (shown, shown.replace("1", "2"))}
    same, other = (with_secrets(edit, head, kept(packed)) for edit in edits.values())
    assert same.body is None and rebuild(head, kept(packed), same).data == packed
    assert json.loads(rebuild(head, kept(packed), other).data) == {"password": "p", "a": 2}


def test_a_typed_body_in_another_encoding_is_noted():
    head = b"POST / HTTP/1.1\r\nHost: a\r\nContent-Type: text/plain; charset=ISO-8859-1\r\n\r\n"
    assert edited({"body": "\xe9"}, head, b"").notes == (
        "the body is sent in UTF-8, and Content-Type says iso-8859-1",
    )
    assert edited({"body": "e"}, head, b"").notes == ()


def test_asterisks_and_dots_that_hide_nothing_are_sent():
    assert restored({"body": "*** … ..."}, body="plain").body == "*** … ...".encode()
