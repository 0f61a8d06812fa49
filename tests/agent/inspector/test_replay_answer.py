"""Answers to replayed requests, by bytes: whole, a byte at a time, and what breaks the rules."""

import pytest

from gotunnel_agent.common.http1 import Malformed
from gotunnel_agent.inspector.answer import MOST_INTERIM, Answer

OK = b"HTTP/1.1 200 OK\r\n"


def read(data, method="GET", *, limit=100, step=None, ends=False):
    answer = Answer(method, limit)
    step = step or len(data) or 1
    for at in range(0, len(data), step):
        answer.feed(data[at : at + step])
    if ends:
        answer.eof()
    return answer


@pytest.mark.parametrize("step", [None, 1, 3])
@pytest.mark.parametrize(
    "data, method, ends, status, kept",
    [
        (OK + b"Content-Length: 2\r\n\r\nok", "GET", False, 200, b"ok"),
        (OK + b"Content-Length: 0\r\n\r\n", "GET", False, 200, b""),
        (OK + b"Content-Length: 2\r\n\r\nok and more", "GET", False, 200, b"ok"),
        (OK + b"Transfer-Encoding: chunked\r\n\r\n2\r\nok\r\n0\r\n\r\n", "GET", False, 200, b"ok"),
        (OK + b"Transfer-Encoding: chunked\r\n\r\n2\nok\n0\n\n", "GET", False, 200, b"ok"),
        (OK + b"\r\nuntil the end", "GET", True, 200, b"until the end"),
        (b"HTTP/1.0 404\n\nlf only", "GET", True, 404, b"lf only"),
        (OK + b"Content-Length: 5\r\n\r\n", "HEAD", False, 200, b""),
        (b"HTTP/1.1 204 No Content\r\n\r\n", "GET", False, 204, b""),
        (b"HTTP/1.1 304 Not Modified\r\nContent-Length: 9\r\n\r\n", "GET", False, 304, b""),
        (b"HTTP/1.1 100 Continue\r\n\r\n" + OK + b"Content-Length: 1\r\n\r\nx", "POST", False,
         200, b"x"),
        (b"HTTP/1.1 103 Early Hints\r\nLink: </a>\r\n\r\n" * 3 + OK + b"Content-Length: 0\r\n\r\n",
         "GET", False, 200, b""),
    ],
)  # fmt: skip
def test_an_answer_is_read_to_its_end(data, method, ends, status, kept, step):
    answer = read(data, method, step=step, ends=ends)
    assert (answer.status, answer.kept, answer.size, answer.over) == (status, kept, len(kept), True)


def test_only_the_beginning_of_a_body_is_kept():
    answer = read(OK + b"Content-Length: 1000\r\n\r\n" + b"x" * 1000, limit=10, step=7)
    assert (answer.kept, answer.size) == (b"x" * 10, 1000)


def test_the_head_is_kept_as_it_came():
    head = b"HTTP/1.1 200 OK\nServer:  old\n\n"
    assert read(b"HTTP/1.1 100 \r\n\r\n" + head).head == head


def test_interim_heads_and_trailers_are_kept():
    early = b"HTTP/1.1 103 Early Hints\r\nLink: </a>\r\n\r\n"
    chunked = OK + b"Transfer-Encoding: chunked\r\n\r\n1\r\nx\r\n0\r\nX-Sum: 1\r\n\r\n"
    answer = read(early * 20 + chunked, step=5)
    assert answer.interim == (early,) * 10
    assert answer.trailers == (("X-Sum", "1"),)


@pytest.mark.parametrize(
    "data, words",
    [
        (b"SSH-2.0-OpenSSH_9\r\n\r\n", "status line"),
        (b"HTTP/1.1 101 Switching Protocols\r\n\r\n", "status 101"),
        (b"HTTP/1.1 102 \r\n\r\n" * (MOST_INTERIM + 1), "interim answers"),
        (OK + b"X: " + b"x" * 70000, "no blank line in 65536 bytes"),
        (b"x" * 70000, "first line of over 65536 bytes"),
        (OK + b"Content-Length: 1\r\nContent-Length: 2\r\n\r\n", "Content-Length"),
        (OK + b"Transfer-Encoding: chunked\r\n\r\nzz\r\n", "chunk line"),
        (OK + b"A\0: b\r\n\r\n", "byte 0x00"),
    ],
)
def test_an_answer_that_cannot_be_read_is_malformed(data, words):
    with pytest.raises(Malformed, match=words):
        read(data)


@pytest.mark.parametrize(
    "data",
    [b"", b"HTTP/1.1 200", OK + b"Content-Length: 9\r\n\r\nx",
     OK + b"Transfer-Encoding: chunked\r\n\r\n2\r\nok\r\n"],
)  # fmt: skip
def test_an_answer_that_is_cut_is_malformed(data):
    with pytest.raises(Malformed):
        read(data, ends=True)
