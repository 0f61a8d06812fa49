"""The gateway's own pages: which form a visitor gets, and that docs/visits.md lists every code."""

import ast
import json
import re
import signal
from pathlib import Path

import pytest
from support import (
    APP,
    GATEWAY_HOST,
    agent_here,
    agent_process,
    answer,
    gateway_here,
    request,
    status_of,
)

from gotunnel_server.visitors import pages

ROOT = Path(__file__).parent.parent.parent

# What programs say by themselves.
BROWSER = "text/html,application/xhtml+xml,application/xml;q=0.9,image/webp,*/*;q=0.8"
CURL = "*/*"
AXIOS = "application/json, text/plain, */*"


# The form ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("accept", "expected"),
    [
        (None, pages.HTML),
        ("", pages.HTML),
        (BROWSER, pages.HTML),
        (CURL, pages.HTML),
        ("text/plain", pages.HTML),  # neither: better than a 406
        ("application/json", pages.JSON),
        ("APPLICATION/JSON", pages.JSON),
        ("application/json; charset=utf-8", pages.JSON),
        ("application/*", pages.JSON),
        (AXIOS, pages.JSON),  # named, where HTML is only not excluded
        ("text/html, application/json", pages.HTML),  # equal: for people
        ("application/json, text/html", pages.HTML),
        ("text/html;q=0.5, application/json", pages.JSON),
        ("text/html, application/json;q=0.9", pages.HTML),
        ("text/html ; q=0.2 , application/json ; Q=0.3", pages.JSON),
        ("text/html;q=0, */*", pages.JSON),
        ("application/json;q=0", pages.HTML),
        ("application/json;q=0, */*;q=1", pages.HTML),
        ("application/json;q=0.001", pages.JSON),
        ("application/json;q=high", pages.HTML),
        ("application/json;q=2", pages.HTML),
        ("application/json;q=-1, text/html;q=0.1", pages.HTML),
        (",;,=;q=;application/json", pages.HTML),
    ],
)
def test_accept_decides_the_form_of_an_error(accept, expected):
    page = pages.suited(pages.error(502, "code", "Text."), [] if accept is None else [accept])
    assert page.content_type.partition(";")[0] == expected


def test_accept_may_come_in_several_lines():
    page = pages.error(502, "code", "Text.")
    assert pages.suited(page, ["text/html;q=0.1", "application/json"]).content_type == pages.JSON


def test_json_says_what_the_page_says():
    page = pages.suited(pages.error(504, "timed-out", 'It "hangs" <b>é'), ["application/json"])
    assert json.loads(page.body) == {
        "error": "timed-out", "message": 'It "hangs" <b>é', "status": 504,
    }  # fmt: skip
    assert page.fields == (("X-Gotunnel-Error", "timed-out"),)


def test_error_has_further_fields_in_either_form():
    page = pages.error(429, "too-many-requests", "Later.", (("Retry-After", "3"),))
    expected = (("X-Gotunnel-Error", "too-many-requests"), ("Retry-After", "3"))
    assert page.fields == expected
    assert pages.suited(page, ["application/json"]).fields == expected


def test_text_of_a_page_is_no_markup():
    page = pages.error(400, "code", "<script>alert('x')</script>")
    assert b"<script>" not in page.body and b"&lt;script&gt;" in page.body


def test_landing_page_has_no_other_form():
    page = pages.landing(GATEWAY_HOST)
    assert pages.suited(page, ["application/json"]) is page


# On the wire -------------------------------------------------------------------------------------


@pytest.fixture
def gateway(cache):
    """A gateway where no agent serves APP any more; it still has the certificate."""
    with gateway_here(cache) as gateway:
        gateway.inner.keeper.want([APP])
        yield gateway


def ask(gateway, sent, host=APP):
    """Send a request; the answer as (head, body)."""
    with gateway.dial(host) as visitor:
        visitor.send(sent)
        return visitor.read_message()


def said(head):
    fields = dict(line.split(": ", 1) for line in head.decode().split("\r\n")[1:-2])
    return status_of(head), fields["X-Gotunnel-Error"], fields["Content-Type"]


MALFORMED = "malformed-request"


@pytest.mark.parametrize(
    ("sent", "status", "code"),
    [
        (request(), 502, "no-tunnel"),
        (request(host="other.localhost"), 421, "misdirected"),
        (request("GET", "/", "Content-Length: 1, 1"), 400, MALFORMED),
        (request("GET", "/" + "x" * 8192), 414, MALFORMED),
        (request("GET", "/", *["A: b"] * 201), 431, MALFORMED),
        (request("CONNECT", f"{APP}:443"), 502, "no-tunnel"),
    ],
)
@pytest.mark.parametrize("form", [pages.HTML, pages.JSON])
def test_error_has_its_code_in_either_form(gateway, sent, status, code, form):
    sent = sent.replace(b"\r\nHost:", f"\r\nAccept: {form}\r\nHost:".encode())
    head, body = ask(gateway, sent)
    if status in (414, 431):  # the head was not read
        form = pages.HTML
    content_type = pages.JSON if form == pages.JSON else f"{pages.HTML}; charset=utf-8"
    assert said(head) == (status, code, content_type)
    if form == pages.JSON:
        told = json.loads(body)
        assert (told["status"], told["error"]) == (status, code)
    else:
        assert body.startswith(b"<!doctype html>") and code.encode() in body


@pytest.mark.parametrize("form", [pages.HTML, pages.JSON])
def test_head_gets_the_length_of_the_page_and_no_body(gateway, form):
    with gateway.dial(APP) as visitor:
        visitor.send(request("HEAD", "/", f"Accept: {form}", "Connection: close"))
        head = visitor.read_head()
        assert visitor.read_to_end() == b""
    got, body = ask(gateway, request("GET", "/", f"Accept: {form}", "Connection: close"))
    length = f"\r\nContent-Length: {len(body)}\r\n".encode()
    assert length in head and length in got


def test_malformed_request_behind_a_head_gets_its_page(gateway):
    """It is not answered as if it were the HEAD, with its Accept, before it."""
    with gateway.dial(APP) as visitor:
        visitor.send(request("HEAD", "/", "Accept: application/json"))
        visitor.read_head()
        visitor.send(b"GET  / HTTP/1.1\r\n\r\n")
        head, body = visitor.read_message()
        assert status_of(head) == 400 and body.startswith(b"<!doctype html>")


def test_gateway_that_is_busy_says_so_in_the_form_that_is_wanted(cache, tmp_path, origin):
    with gateway_here(cache, WORKERS="2") as gateway:
        with agent_here(gateway, tmp_path, http={APP: origin.port}), gateway.dial(APP) as first:
            first.send(request())
            target = origin.accept()
            target.read_head()  # one address gets one of the two places
            head, body = ask(gateway, request("GET", "/", "Accept: application/json"))
            assert said(head) == (503, "gateway-busy", pages.JSON)
            assert json.loads(body)["error"] == "gateway-busy"
            with gateway.dial(APP) as visitor:
                visitor.send(request("HEAD"))
                assert status_of(visitor.read_head()) == 503
                assert visitor.read_to_end() == b""
            target.send(answer())
            assert first.read_message()[1] == b"ok"


def test_visitor_who_waits_learns_that_the_agent_has_gone(cache, tmp_path, origin):
    with gateway_here(cache) as gateway:
        with agent_process(gateway, tmp_path, http={APP: origin.port}) as agent:
            with gateway.dial(APP) as visitor:
                visitor.send(request())
                origin.accept().read_head()
                agent.signal(signal.SIGKILL)  # one that stops in order resets its streams first
                head, _ = visitor.read_message()
                assert said(head)[:2] == (502, "agent-gone")


def test_target_that_breaks_off_is_told_from_one_that_says_nothing(cache, tmp_path, origin):
    with gateway_here(cache, RESPONSE_TIMEOUT="0.5") as gateway:
        with agent_here(gateway, tmp_path, http={APP: origin.port}):
            for end, expected in (
                (lambda target: target.finish(), (502, "no-answer")),
                (lambda target: target.reset(), (502, "cut-short")),
                (lambda target: None, (504, "timed-out")),
            ):
                with gateway.dial(APP) as visitor:
                    visitor.send(request())
                    target = origin.accept()
                    target.read_head()
                    end(target)
                    assert said(visitor.read_message()[0])[:2] == expected


# The table of codes ------------------------------------------------------------------------------

# How the source makes a page with a code: the names of the functions, by whose first two arguments.
MAKERS = {"error", "TargetFailed", "refusal"}
SAID_BY_THE_AGENT = re.compile(r"\btarget-[a-z]+(?:-[a-z]+)*\b")


def codes_of_the_source():
    """Pairs of status and code. Those of the agent, whose answers are all 502, too."""
    pairs = set()
    http1 = ROOT / "gotunnel_agent" / "common" / "http1.py"
    for path in (http1, *(ROOT / "gotunnel_server").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.Call):
                continue
            name = getattr(node.func, "attr", getattr(node.func, "id", None))
            if name in MAKERS and len(node.args) >= 3 and isinstance(node.args[1], ast.Constant):
                if isinstance(node.args[0], ast.Constant):
                    pairs.add((node.args[0].value, node.args[1].value))
            elif name == "Malformed":
                numbers = ast.walk(node.args[0])
                pairs.update((number.value, MALFORMED) for number in numbers
                             if type(getattr(number, "value", None)) is int)  # fmt: skip
    agent = (ROOT / "gotunnel_agent" / "common" / "refusals.py").read_text(encoding="utf-8")
    return pairs | {(502, code) for code in SAID_BY_THE_AGENT.findall(agent)}


def codes_of_the_docs():
    rows = re.findall(r"(?m)^\| ([0-9, ]+) \| (`[a-z`, -]+`) \|",
                      (ROOT / "docs" / "visits.md").read_text(encoding="utf-8"))  # fmt: skip
    return {
        (int(status), code)
        for statuses, codes in rows
        for status in statuses.split(", ")
        for code in re.findall(r"[a-z-]+", codes)
    }


def test_the_docs_list_every_code_and_no_other():
    assert (502, "no-tunnel") in codes_of_the_source()
    assert codes_of_the_docs() == codes_of_the_source()
