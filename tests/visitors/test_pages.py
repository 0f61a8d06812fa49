"""The gateway's own pages: which form a visitor gets, and that docs/visits.md lists every code."""

import ast
import json
import os
import re
import signal
from pathlib import Path
from time import monotonic

import pytest
from support import (
    APP,
    GATEWAY_HOST,
    TIMEOUT,
    agent_here,
    agent_process,
    answer,
    gateway_environment,
    gateway_here,
    request,
    reserved_port,
    status_of,
)

from gotunnel_agent import first_answer
from gotunnel_agent.common import refusals
from gotunnel_server.config import load
from gotunnel_server.reloading import Reloading
from gotunnel_server.variables import ConfigError
from gotunnel_server.visitors import own_pages, pages

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
    page = pages.suited(pages.error(400, "code", "<script>alert('x')</script>"), [])
    assert b"<script>" not in page.body and b"&lt;script&gt;" in page.body


def test_page_is_for_people_and_names_what_the_people_who_run_the_site_need():
    dress = pages.Dress({}, APP, "an-id")
    body = pages.suited(pages.no_tunnel(APP), [BROWSER], dress).body.decode()
    assert "<title>This site is offline</title>" in body and "<h1>This site is offline</h1>" in body
    assert f"<p>{APP} is not connected at the moment. Check the address, or try again" in body
    assert f"<span>502 no-tunnel</span>\n<span>{APP}</span>\n<span>an-id</span>" in body


JARGON = re.compile(
    r"agent|tunnel(?!\.)|target|upstream|service behind|stream|header", re.IGNORECASE
)


@pytest.mark.parametrize("text", [
    *pages.TITLES.values(), *(refusal.text for refusal in refusals.BY_CODE.values()),
    pages.no_tunnel("app.example.com").message, pages.BUSY,
])  # fmt: skip
def test_words_are_those_of_visitors(text):
    assert not JARGON.search(text)


@pytest.mark.parametrize(
    ("seconds", "words"),
    [
        (0, "1 second"), (0.2, "1 second"), (1, "1 second"), (1.2, "2 seconds"),
        (90, "90 seconds"), (90.5, "2 minutes"), (121, "3 minutes"), (3600, "60 minutes"),
        (5401, "2 hours"), (86_400, "24 hours"),
    ],
)  # fmt: skip
def test_times_are_in_words_and_long_ones_in_minutes(seconds, words):
    assert pages.in_words(seconds) == words


# Colours -----------------------------------------------------------------------------------------


def luminance(colour):
    """WCAG 2.2, "relative luminance"."""
    parts = [int(colour[place : place + 2], 16) / 255 for place in (1, 3, 5)]
    linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
    return sum(weight * part for weight, part in zip((0.2126, 0.7152, 0.0722), linear))


def contrast(one, other):
    lighter, darker = sorted((luminance(one), luminance(other)), reverse=True)
    return (lighter + 0.05) / (darker + 0.05)


def test_contrast_is_computed_as_wcag_does():
    assert round(contrast("#000000", "#ffffff"), 2) == 21
    assert round(contrast("#777777", "#ffffff"), 2) == 4.48


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_all_text_can_be_read_in_both_colour_schemes(scheme):
    page = pages.landing(GATEWAY_HOST).body.decode()
    style = page.partition("<style>")[2].partition("</style>")[0]
    sets = [dict(re.findall(r"--([a-z]+): (#[0-9a-f]{6})", part)) for part in style.split("@media")]
    assert "prefers-color-scheme: dark" in style and "color-scheme: light dark" in style
    colours = sets[0] if scheme == "light" else sets[1]
    assert set(colours) == {"back", "text", "quiet", "line", "link"}
    used = set(re.findall(r"[^-]color: var\(--([a-z]+)\)", style))
    assert used == {"text", "quiet", "link"}
    for name in used:
        assert contrast(colours[name], colours["back"]) >= 4.5, name
    # And no colour is written anywhere else.
    assert len(re.findall("#[0-9a-f]{3,6}", style)) == 10


# The operator's own ------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "pages"
    folder.mkdir()
    return folder


def test_placeholders_are_filled_in_as_text(folder):
    names = " ".join(f"{{{{{name}}}}}" for name in pages.PLACEHOLDERS)
    (folder / "error.html").write_text(f"<p>\xe9 {names} {{{{ code }}}} {{a}} }}}}", "utf-8")
    dress = pages.Dress(own_pages.read(str(folder)), "<h>", "id")
    page = pages.suited(pages.error(400, "malformed-request", "<b> & 'q'"), [], dress)
    assert page.body.decode() == (
        "<p>\xe9 Something is wrong with this request &lt;b&gt; &amp; &#x27;q&#x27; 400 "
        "Bad Request malformed-request &lt;h&gt; id 400 malformed-request \u00b7 &lt;h&gt; "
        "\u00b7 id malformed-request {a} }}"
    )
    assert page.content_type == "text/html; charset=utf-8"


def test_blanks_without_an_end_are_read_at_once():
    started = monotonic()
    for text in ("{{" + 60_000 * " ", 30_000 * "{{", 1000 * ("{{" + 58 * "\n")):
        assert pages.Template(text).fill({}).decode() == text
    assert monotonic() - started < TIMEOUT


def test_template_that_fits_best_is_taken_and_json_stays(folder):
    for name in ("no-tunnel", "502", "5xx", "421"):
        (folder / f"{name}.html").write_text(f"own {name}")
    (folder / "notes.txt").write_text("no page")
    (folder / ".hidden.html").write_text("no page")
    dress = pages.Dress(own_pages.read(str(folder)))

    def body(status, code, accept=BROWSER):
        return pages.suited(pages.error(status, code, "Text."), [accept], dress).body

    assert body(502, "no-tunnel") == b"own no-tunnel"
    assert body(502, "agent-gone") == b"own 502"
    assert body(503, "gateway-busy") == b"own 5xx"
    assert body(421, "misdirected") == b"own 421"
    assert b"<h1>No access from here</h1>" in body(403, "not-allowed")
    assert json.loads(body(502, "no-tunnel", "application/json"))["message"] == "Text."
    (folder / "error.html").write_text("own any")
    dress = pages.Dress(own_pages.read(str(folder)))
    assert body(403, "not-allowed") == b"own any"


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        (
            "no-tunel.html",
            b"x",
            "no-tunel.html is the page of no error, did you mean no-tunnel.htm",
        ),
        ("index.html", b"x", "index.html is the page of no error, expected a code such as no-tun"),
        ("200.html", b"x", "200.html is the page of no error"),
        ("502.html", b"{{host}}", "502.html: there is no placeholder {{host}}, did you mean {{ho"),
        (
            "502.html",
            b"{{ \xc3\xa9 }}",
            "502.html: there is no placeholder {{\\xe9}}, expected one",
        ),
        ("502.html", b"", "502.html: it is empty"),
        ("502.html", b"\xff", "502.html: it is not UTF-8"),
        ("502.html", b"x" * 65537, "502.html: it is too long, expected at most 65536 bytes"),
    ],
)
def test_template_that_cannot_be_used_is_one_clear_line(folder, name, content, expected):
    (folder / name).write_bytes(content)
    with pytest.raises(ConfigError) as caught:
        load(os.devnull, gateway_environment(folder, PAGES_DIR=str(folder)))
    line = str(caught.value)
    assert line.startswith(f"PAGES_DIR, {folder}: {expected}") and "\n" not in line
    assert caught.value.variables[0] == "PAGES_DIR"


def test_folder_of_pages_that_is_none_is_refused(folder):
    with pytest.raises(ConfigError, match="PAGES_DIR is '.*/none', expected a folder that exists"):
        load(os.devnull, gateway_environment(folder, PAGES_DIR=str(folder / "none")))
    os.mkdir(folder / "502.html")
    with pytest.raises(ConfigError, match="PAGES_DIR: cannot read .*/502.html .Is a directory"):
        load(os.devnull, gateway_environment(folder, PAGES_DIR=str(folder)))


def test_large_template_is_not_for_those_that_must_not_wait(folder):
    (folder / "503.html").write_text("x" * 16_385)
    (folder / "502.html").write_text("x" * 16_384)
    assert list(own_pages.small(own_pages.read(str(folder)))) == ["502"]


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


def test_target_that_breaks_off_is_told_from_one_that_says_nothing(
    cache, tmp_path, origin, monkeypatch
):
    monkeypatch.setattr(first_answer, "speaks_tls", lambda target: False)  # its dial is no visit
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


@pytest.mark.parametrize("form", [pages.HTML, pages.JSON])
@pytest.mark.parametrize("sent", [
    request(), request("POST", "/", body=b"abc" * 50_000),
    request("GET", "/", "Connection: upgrade", "Upgrade: websocket"),
], ids=["get", "post", "upgrade"])  # fmt: skip
def test_target_that_is_away_gets_the_gateways_page_in_the_form_that_is_wanted(
    cache, tmp_path, form, sent
):
    with gateway_here(cache) as gateway, reserved_port() as nobody:
        with agent_here(gateway, tmp_path, http={APP: nobody}):
            sent = sent.replace(b"\r\nHost:", f"\r\nAccept: {form}\r\nHost:".encode())
            head, body = ask(gateway, sent)
    assert said(head)[:2] == (502, "target-unreachable")
    if form == pages.JSON:
        assert json.loads(body)["error"] == "target-unreachable"
    else:
        assert b"<h1>This site is offline</h1>" in body and APP.encode() in body


def test_pages_of_the_operator_are_served_and_read_again(cache, folder):
    template = folder / "no-tunnel.html"
    template.write_text("{{hostname}}: closed <script>{{message}}</script>")
    environment = gateway_environment(cache, PAGES_DIR=str(folder))
    with gateway_here(cache, PAGES_DIR=str(folder)) as gateway:
        gateway.inner.keeper.want([APP])
        config = load(os.devnull, environment)
        reloading = Reloading(gateway.inner, config, os.devnull, environment)
        _, body = ask(gateway, request())
        assert body.startswith(f"{APP}: closed <script>{APP} is not connected".encode())
        template.write_text("{{oops}}")  # the old one stays
        reloading.run()
        assert ask(gateway, request())[1].startswith(f"{APP}: closed".encode())
        template.write_text("{{hostname}}: for ever")
        reloading.run()
        assert ask(gateway, request())[1] == f"{APP}: for ever".encode()
        head, body = ask(gateway, request("GET", "/" + "x" * 8192))
        assert said(head)[1] == MALFORMED and body.startswith(b"<!doctype html>")


def test_page_names_the_request_by_its_id(cache, tmp_path):
    with gateway_here(cache, ACCESS_LOG=str(tmp_path / "log")) as gateway:
        gateway.inner.keeper.want([APP])
        _, body = ask(gateway, request())
    assert re.search(rb"<span>app.localhost</span>\n<span>[0-9a-f]{32}</span>", body)


# The table of codes ------------------------------------------------------------------------------

# How the source makes a page with a code: the names of the functions, by whose first two arguments.
MAKERS = {"error", "TargetFailed", "refusal"}
OF_THE_DASHBOARD = {"Refused"}
SAID_BY_THE_AGENT = re.compile(r"\btarget-[a-z]+(?:-[a-z]+)*\b")


def codes_of_the_source(makers=MAKERS):
    """Pairs of status and code. Those of the agent, whose answers are all 502, too."""
    pairs = set()
    http1 = ROOT / "gotunnel_agent" / "common" / "http1.py"
    for path in (http1, *(ROOT / "gotunnel_server").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.Call):
                continue
            name = getattr(node.func, "attr", getattr(node.func, "id", None))
            if name in makers and len(node.args) >= 3 and isinstance(node.args[1], ast.Constant):
                if isinstance(node.args[0], ast.Constant):
                    pairs.add((node.args[0].value, node.args[1].value))
            elif name == "Malformed":
                numbers = ast.walk(node.args[0])
                pairs.update((number.value, MALFORMED) for number in numbers
                             if type(getattr(number, "value", None)) is int)  # fmt: skip
    agent = (ROOT / "gotunnel_agent" / "common" / "refusals.py").read_text(encoding="utf-8")
    return pairs | {(502, code) for code in SAID_BY_THE_AGENT.findall(agent)}


def codes_of_the_docs(page="visits.md"):
    rows = re.findall(r"(?m)^\| ([0-9, ]+) \| (`[a-z`, -]+`) \|",
                      (ROOT / "docs" / page).read_text(encoding="utf-8"))  # fmt: skip
    return {
        (int(status), code)
        for statuses, codes in rows
        for status in statuses.split(", ")
        for code in re.findall(r"[a-z-]+", codes)
    }


def test_every_code_has_a_heading():
    assert {code for _, code in codes_of_the_docs()} == set(pages.TITLES)


def test_the_docs_list_every_code_and_no_other():
    visitors, dashboard = codes_of_the_source(), codes_of_the_source(OF_THE_DASHBOARD)
    assert (502, "no-tunnel") in visitors and (403, "csrf") in dashboard
    assert visitors <= codes_of_the_docs() <= visitors | dashboard
    listed = codes_of_the_docs("dashboard.md")
    assert dashboard - codes_of_the_docs() - listed <= {(400, "wrong-password")}  # the form says it
    composed = {(400, "bad-address"), (400, "bad-reason")}  # of the name of what is wrong
    assert listed <= dashboard | visitors | composed
