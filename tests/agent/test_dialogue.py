"""The follower of http visits, by bytes: each story is also told one byte at a time, and cut at
random places. The story is a list of turns: what the visitor asks, what the target answers."""

import random

import pytest

from gotunnel_agent.common.http1 import (
    HEAD_LIMIT,
    Malformed,
    parse_request,
    parse_response,
    request_body,
    response_body,
)
from gotunnel_agent.dialogue import (
    CUT_SHORT,
    MOST_INTERIM,
    MOST_WAITING,
    NO_ANSWER,
    Counted,
    Dialogue,
    Exchange,
    read_answer,
    read_request,
)

ASK, ANSWER, END = "ask", "answer", "end of the target's side"
GET = b"GET /a?b=1 HTTP/1.1\r\nHost: x\r\n\r\n"
HEAD = b"HEAD /h HTTP/1.1\r\nHost: x\r\n\r\n"
POST = b"POST /p HTTP/1.1\r\nHost: x\r\nContent-Length: 5\r\n\r\nhello"
CHUNKED_POST = (
    b"PUT /c HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n"
    b"3\r\nabc\r\n2;x=y\r\nde\r\n0\r\nTrailer: t\r\n\r\n"
)
UPGRADE = b"GET /ws HTTP/1.1\r\nHost: x\r\nConnection: upgrade\r\nUpgrade: websocket\r\n\r\n"
CONNECT = b"CONNECT x:22 HTTP/1.1\r\nHost: x\r\n\r\n"
OK = b"HTTP/1.1 200 OK\r\nContent-Length: 3\r\n\r\nyes"
CHUNKED = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n4\r\nfour\r\n1\r\n!\r\n0\r\n\r\n"
NO_CONTENT = b"HTTP/1.1 204 No Content\r\n\r\n"
NOT_MODIFIED = b"HTTP/1.1 304 Not Modified\r\nContent-Length: 99\r\n\r\n"
LONG_HEAD = b"HTTP/1.1 200 OK\r\nContent-Length: 99\r\n\r\n"
TO_THE_END = b"HTTP/1.1 200 OK\r\n\r\n"
CONTINUE = b"HTTP/1.1 100 Continue\r\n\r\n"
HINTS = b"HTTP/1.1 103 Early Hints\r\nLink: </a>\r\n\r\n"
SWITCH = b"HTTP/1.1 101 Switching Protocols\r\nConnection: upgrade\r\nUpgrade: websocket\r\n\r\n"
TOO_LARGE = b"HTTP/1.1 413 Content Too Large\r\nContent-Length: 0\r\n\r\n"
LF_ONLY = b"HTTP/1.0 200 OK\nContent-Length: 3\n\nyes"

# Turns, and the exchanges that come of them: method, target, status, bytes in and out, problem.
STORIES = {
    "a request": (
        [(ASK, GET), (ANSWER, OK)],
        [("GET", "/a?b=1", 200, 0, 3, "")],
    ),
    "several after each other": (
        [(ASK, GET), (ANSWER, OK), (ASK, POST), (ANSWER, CHUNKED), (ASK, GET), (ANSWER, OK)],
        [
            ("GET", "/a?b=1", 200, 0, 3, ""),
            ("POST", "/p", 200, 5, 5, ""),
            ("GET", "/a?b=1", 200, 0, 3, ""),
        ],
    ),
    "pipelined": (
        [(ASK, GET + POST + HEAD), (ANSWER, OK + CHUNKED + LONG_HEAD), (ASK, GET), (ANSWER, OK)],
        [
            ("GET", "/a?b=1", 200, 0, 3, ""),
            ("POST", "/p", 200, 5, 5, ""),
            ("HEAD", "/h", 200, 0, 0, ""),
            ("GET", "/a?b=1", 200, 0, 3, ""),
        ],
    ),
    "answers without a body": (
        [(ASK, HEAD), (ANSWER, LONG_HEAD), (ASK, GET), (ANSWER, NO_CONTENT), (ASK, GET),
         (ANSWER, NOT_MODIFIED)],
        [
            ("HEAD", "/h", 200, 0, 0, ""),
            ("GET", "/a?b=1", 204, 0, 0, ""),
            ("GET", "/a?b=1", 304, 0, 0, ""),
        ],
    ),
    "chunks both ways": (
        [(ASK, CHUNKED_POST), (ANSWER, CHUNKED)],
        [("PUT", "/c", 200, 5, 5, "")],
    ),
    "until the target closes": (
        [(ASK, GET), (ANSWER, TO_THE_END + b"all of it"), (END, b"")],
        [("GET", "/a?b=1", 200, 0, 9, "")],
    ),
    "the visitor leaves such an answer": (
        [(ASK, GET), (ANSWER, TO_THE_END + b"all of it")],
        [("GET", "/a?b=1", 200, 0, 9, CUT_SHORT)],
    ),
    "interim answers": (
        [(ASK, POST), (ANSWER, CONTINUE + HINTS), (ANSWER, OK)],
        [("POST", "/p", 200, 5, 3, "")],
    ),
    "an early answer": (
        [(ASK, POST[:-3]), (ANSWER, TOO_LARGE), (ASK, POST[-3:] + GET), (ANSWER, OK)],
        [("POST", "/p", 413, 5, 0, ""), ("GET", "/a?b=1", 200, 0, 3, "")],
    ),
    "an early answer, and the request is given up": (
        [(ASK, POST[:-3]), (ANSWER, TOO_LARGE), (END, b"")],
        [("POST", "/p", 413, 2, 0, "")],
    ),
    "an answer that goes on beside the request": (
        [(ASK, CHUNKED_POST[:-30]), (ANSWER, CHUNKED[:-12]), (ASK, CHUNKED_POST[-30:-5]),
         (ANSWER, CHUNKED[-12:]), (ASK, CHUNKED_POST[-5:] + GET), (ANSWER, OK)],
        [("PUT", "/c", 200, 5, 5, ""), ("GET", "/a?b=1", 200, 0, 3, "")],
    ),
    "a WebSocket": (
        [(ASK, UPGRADE), (ANSWER, SWITCH + b"\x81\x02hi"), (ASK, b"\x88\x80mask"),
         (ANSWER, b"GET / HTTP/1.1\r\n\r\n")],
        [("GET", "/ws", 101, 6, 22, "")],
    ),
    "a WebSocket that begins early": (
        [(ASK, UPGRADE + b"\x81\x80mask"), (ANSWER, SWITCH)],
        [("GET", "/ws", 101, 6, 0, "")],
    ),
    "an upgrade that is refused": (
        [(ASK, UPGRADE + GET), (ANSWER, OK), (ANSWER, OK)],
        [("GET", "/ws", 200, 0, 3, ""), ("GET", "/a?b=1", 200, 0, 3, "")],
    ),
    "CONNECT": (
        [(ASK, CONNECT), (ANSWER, TO_THE_END + b"SSH-2.0"), (ASK, b"SSH-2.0-x")],
        [("CONNECT", "x:22", 200, 9, 7, "")],
    ),
    "CONNECT refused": (
        [(ASK, CONNECT), (ANSWER, b"HTTP/1.1 405 No\r\nContent-Length: 0\r\n\r\n"), (ASK, GET),
         (ANSWER, OK)],
        [("CONNECT", "x:22", 405, 0, 0, ""), ("GET", "/a?b=1", 200, 0, 3, "")],
    ),
    "a careless target": (
        [(ASK, GET), (ANSWER, LF_ONLY)],
        [("GET", "/a?b=1", 200, 0, 3, "")],
    ),
    "no answer": ([(ASK, GET), (END, b"")], [("GET", "/a?b=1", 0, 0, 0, NO_ANSWER)]),
    "half an answer": (
        [(ASK, GET), (ANSWER, LONG_HEAD + b"four"), (END, b"")],
        [("GET", "/a?b=1", 200, 0, 4, CUT_SHORT)],
    ),
    "chunks cut short": (
        [(ASK, GET), (ANSWER, CHUNKED[:-5]), (END, b"")],
        [("GET", "/a?b=1", 200, 0, 5, CUT_SHORT)],
    ),
    "a stream that was never used": ([(END, b"")], []),
    "half a request": ([(ASK, GET[:9])], []),
}  # fmt: skip

# Turns that cannot be followed to their end: what is still told, and a word of the problem.
DOUBTS = {
    "HTTP/2": ([(ASK, b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n")], [("", "", 0)], "version"),
    "no HTTP": ([(ASK, b"SSH-2.0-OpenSSH_9.2\r\n\r\n")], [("", "", 0)], "request line"),
    "TLS": ([(ASK, b"\x16\x03\x01\x00\x05hello\r\n\r\n")], [("", "", 0)], "request: byte 0x16"),
    "two lengths": (
        [(ASK, b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\nab")],
        [("", "", 0)],
        "Content-Length",
    ),
    "no HTTP in the answer": ([(ASK, GET), (ANSWER, b"\x00" * 9 + b"\n\n")], [("GET", "/a?b=1", 0)],
                              "answer: byte 0x00"),
    "bytes after an answer": ([(ASK, HEAD), (ANSWER, LONG_HEAD + b"body")], [("HEAD", "/h", 200),
                              ("", "", 0)], "without a request"),
    "an answer without a request": ([(ANSWER, OK)], [("", "", 0)], "without a request"),
    "101 that was not asked for": ([(ASK, GET), (ANSWER, SWITCH)], [("GET", "/a?b=1", 101)], "101"),
    "a bad chunk": (
        [(ASK, GET), (ANSWER, b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nxyz\r\n")],
        [("GET", "/a?b=1", 200)],
        "chunk line",
    ),
    "a head without end": ([(ASK, b"GET / HTTP/1.1\r\n" + b"x" * HEAD_LIMIT)], [("", "", 0)],
                           "no blank line"),
    "an answer's head without end": ([(ASK, GET), (ANSWER, OK[:17] + b"x" * HEAD_LIMIT)],
                                     [("GET", "/a?b=1", 0)], "no blank line"),
    "impatience": ([(ASK, UPGRADE), (ASK, b"x" * HEAD_LIMIT), (ASK, b"x")], [("GET", "/ws", 0)],
                   "goes on"),
}  # fmt: skip


def whole(turns, dice):
    return turns


def byte_by_byte(turns, dice):
    return [
        (who, data[at : at + 1] or data) for who, data in turns for at in range(max(1, len(data)))
    ]


def cut_at_random(turns, dice):
    cut = []
    for who, data in turns:
        places = sorted(dice.sample(range(1, len(data)), min(3, len(data) - 1))) if data else []
        ends = [*places, len(data)]
        cut += [(who, data[start:end]) for start, end in zip([0, *places], ends)]
    return cut


def told(turns, **parts):
    """The exchanges of a story, in the order in which they end."""
    found = []
    dialogue = Dialogue(found.append, **parts)
    now = 0
    for who, data in turns:
        now += 1
        (dialogue.asked if who is ASK else dialogue.answered)(data, now)
    dialogue.ended(now + 1)
    return found


def row(exchange):
    return (
        exchange.method,
        exchange.target,
        exchange.status,
        exchange.bytes_in,
        exchange.bytes_out,
        exchange.problem,
    )


@pytest.mark.parametrize("story", STORIES)
def test_follows_a_story(story):
    turns, expected = STORIES[story]
    for seed, cut in enumerate([whole, byte_by_byte, *[cut_at_random] * 9]):
        found = told(cut(turns, random.Random(seed)))
        assert [row(each) for each in found] == expected, (cut, seed)


@pytest.mark.parametrize("story", DOUBTS)
def test_gives_up_on_doubt_and_goes_on_counting(story):
    turns, expected, why = DOUBTS[story]
    for seed, cut in enumerate([whole, *[cut_at_random] * 9]):
        cut_up = cut(turns, random.Random(seed))
        found = told([*cut_up, (ASK, b"1" * 1000), (ANSWER, b"2" * 2000)])
        assert [row(each)[:3] for each in found] == expected, seed
        last = found[-1]
        assert "not followed" in last.problem and why in last.problem
        assert last.bytes_in >= 1000 and last.bytes_out >= 2000


def test_whatever_bytes_come_nothing_is_raised():
    dice = random.Random(7)
    stories = [turns for turns, _ in STORIES.values()]
    for _ in range(400):
        turns = []
        for who, data in dice.choice(stories):
            data = bytearray(data)
            for _ in range(dice.randrange(4)):
                if data:
                    data[dice.randrange(len(data))] = dice.randrange(256)
            turns.append((who, bytes(data)))
        dice.shuffle(turns)
        told(cut_at_random(turns, dice))


FRAMING = [
    "Content-Length: 5", "content-length:5", "Content-Length: 5 ", "CONTENT-LENGTH:\t05",
    "Content-Length: 5\r\n ", "Content-Length: 5, 5", "Content-Length: 6", "Content-Length: +5",
    "Content-Length: 0", "X-Content-Length: 5", "Content-Length-X: 5", "Content-Length : 5",
    "Transfer-Encoding: chunked", "transfer-encoding:chunked", "Transfer-Encoding: gzip, chunked",
    "Transfer-Encoding: chunked ", "Transfer-Encoding: Chunked", "Upgrade: websocket",
    "Upgrade-Insecure-Requests: 1", "Connection: close", "X: a\r\n Content-Length: 5",
]  # fmt: skip
FIRST_LINES = [
    "GET /a?b=%20 HTTP/1.1", "HEAD / HTTP/1.0", "POST * HTTP/1.1", "CONNECT a:1 HTTP/1.1",
    "GET  / HTTP/1.1", "GET / HTTP/2.0", "G\xe4T / HTTP/1.1", "M-SEARCH / HTTP/1.1", "",
    "GET http://x/ HTTP/1.1", "get / HTTP/1.1",
]  # fmt: skip
STATUS_LINES = [
    "HTTP/1.1 200 OK", "HTTP/1.1 200", "HTTP/1.0 200 OK", "HTTP/1.1 204 No", "HTTP/1.1 304 No",
    "HTTP/1.1 999 X", "HTTP/1.1 2000 X", "HTTP/1.1 2xx", "http/1.1 200 OK", "HTTP/1.1  200",
    "HTTP/1.1 199 X", "HTTP/1.1 101 X", "HTTP/2 200",
]  # fmt: skip


def heads(first_lines):
    """Heads with no, one and two of the fields."""
    for line in first_lines:
        for first in ["Host: x", *FRAMING]:
            for second in ["Accept: x", *FRAMING]:
                yield f"{line}\r\n{first}\r\n{second}\r\n\r\n".encode("latin-1")


def kind(body):
    """A body, so that two can be compared."""
    if body is None or body == 0:
        return None
    if isinstance(body, int):
        return ("SizedBody", body)
    return None if body.complete else (type(body).__name__, body.length)


def test_a_plain_request_is_read_as_the_parser_reads_it():
    """A short way for usual heads. Of others, the parser decides."""
    for head in heads(FIRST_LINES):
        exchange = Exchange(0)
        exchange.request_head = head
        try:
            request = parse_request(head)
            expected = (request.method, request.target, kind(request_body(request)))
        except Malformed:
            continue  # a gateway sends no such head; the short way may not see it
        assert (kind(read_request(exchange)), head) == (expected[2], head)
        assert (exchange.method, exchange.target) == expected[:2]
        assert exchange.may_switch == (
            request.method == "CONNECT" or "upgrade" in request.fields
        ), head
        assert exchange.request.fields.items == request.fields.items


@pytest.mark.parametrize("method", ["GET", "HEAD", "CONNECT"])
def test_a_plain_answer_is_read_as_the_parser_reads_it(method):
    for head in heads(STATUS_LINES):
        exchange = Exchange(0)
        exchange.method, exchange.response_head = method, head
        try:
            response = parse_response(head)
            expected = (response.status, kind(response_body(response, method)))
        except Malformed:
            with pytest.raises(Malformed):
                read_answer(exchange)
            continue
        assert (kind(read_answer(exchange)), head) == (expected[1], head)
        assert exchange.status == expected[0]


def test_times_are_those_of_the_first_byte_and_the_last():
    found = []
    dialogue = Dialogue(found.append)
    dialogue.asked(GET[:5], 10)
    dialogue.asked(GET[5:], 11)
    dialogue.answered(OK[:-3], 12)
    dialogue.answered(OK[-3:], 13)
    [exchange] = found
    assert (exchange.began, exchange.answer_began, exchange.over) == (10, 12, 13)


def test_too_many_requests_without_an_answer_are_not_followed():
    found = told([(ASK, GET * (MOST_WAITING + 1))])
    assert len(found) == MOST_WAITING and "wait for their answers" in found[0].problem


def test_unfinished_heads_are_held_within_a_budget_and_given_back():
    held, most = 0, 0

    def hold(count):
        nonlocal held, most
        held += count
        most = max(most, held)
        return True

    for turns, _ in STORIES.values():
        told(byte_by_byte(turns, None), hold=hold)
        assert held == 0
    assert 0 < most <= 200
    [exchange] = told([(ASK, GET[:9]), (ASK, GET[9:])], hold=lambda count: count <= 0)
    assert "no memory" in exchange.problem


def test_a_listener_hears_the_bodies():
    heard = []

    def listen(exchange):
        if exchange.method == "HEAD":
            return None
        return lambda answer, piece, now: heard.append((exchange.target, answer, piece, now))

    told([(ASK, CHUNKED_POST + HEAD), (ANSWER, CHUNKED + LONG_HEAD)], listen=listen)
    assert heard == [
        ("/c", False, b"abc", 1), ("/c", False, b"de", 1), ("/c", True, b"four", 2),
        ("/c", True, b"!", 2),
    ]  # fmt: skip


@pytest.mark.parametrize("story", STORIES)
def test_a_listener_hears_as_much_as_is_counted_and_changes_nothing(story):
    turns, expected = STORIES[story]
    for seed, cut in enumerate([whole, byte_by_byte, *[cut_at_random] * 9]):
        heard = {}

        def listen(exchange, heard=heard):
            heard[exchange] = [0, 0]

            def hear(answer, piece, now):
                assert piece and type(piece) is bytes
                heard[exchange][answer] += len(piece)

            return hear

        found = told(cut(turns, random.Random(seed)), listen=listen)
        assert [row(each) for each in found] == expected
        for each in found:
            assert heard[each] == [each.bytes_in, each.bytes_out]


def test_a_listener_hears_both_directions_after_a_change_of_protocol():
    heard = []
    turns, _ = STORIES["a WebSocket"]
    told(turns, listen=lambda exchange: lambda *what: heard.append(what))
    assert heard == [
        (True, b"\x81\x02hi", 2), (False, b"\x88\x80mask", 3), (True, b"GET / HTTP/1.1\r\n\r\n", 4),
    ]  # fmt: skip


def test_a_listener_hears_nothing_of_a_stream_that_is_not_followed_any_more():
    heard = []
    turns, _, _ = DOUBTS["a bad chunk"]
    told([*turns, (ANSWER, b"x" * 99)], listen=lambda exchange: lambda *what: heard.append(what))
    assert heard == []


def test_trailers_and_interim_answers_are_kept():
    answer = CHUNKED[:-2] + b"Etag: x\r\nGrpc-Status: 0\r\n\r\n"
    asked = CHUNKED_POST.replace(b"Trailer: t", b"Digest: t")
    for cut in (whole, byte_by_byte):
        turns = [(ASK, asked), (ANSWER, CONTINUE + HINTS * 20), (ANSWER, answer)]
        [exchange] = told(cut(turns, None))
        assert exchange.request_trailers == [("Digest", "t")]
        assert exchange.response_trailers == [("Etag", "x"), ("Grpc-Status", "0")]
        assert exchange.interim == (CONTINUE, *[HINTS] * (MOST_INTERIM - 1))


def test_an_exchange_with_an_early_answer_is_over_when_the_request_is():
    found = []
    dialogue = Dialogue(found.append)
    dialogue.asked(POST[:-3], 1)
    dialogue.answered(OK, 2)
    assert not found and dialogue.current().answered
    dialogue.asked(POST[-3:], 3)
    assert [(each.answer_began, each.over) for each in found] == [(2, 3)]


def test_a_stream_that_is_not_read_is_counted():
    found = []
    counted = Counted(found.append, 5, "not followed: HTTP/2")
    counted.asked(b"123", 6)
    counted.answered(b"12", 7)
    counted.ended(8)
    [exchange] = found
    assert row(exchange) == ("", "", 0, 3, 2, "not followed: HTTP/2")
    assert (exchange.began, exchange.over) == (5, 8)
