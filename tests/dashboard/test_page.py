"""The dashboard's page as HTML: what it shows without JavaScript, and that nothing foreign in it is
anything but text."""

import base64
import hashlib
import json
import re
from html.parser import HTMLParser

import pytest

from gotunnel_server.dashboard import page

HOSTILE = [
    "<script>alert(1)</script>",
    "</script><!--",
    "</noscript><img src=x onerror=alert(1)>",
    "'\"><svg onload=alert(1)>",
    "{{state}} {{csrf}} $host {0}",
    "a\u202egnp.exe",
    "zero\u200bwidth\ufeff\u00ad\u2800",
    "line\r\nline\x00\x1b[31m\t",
    "\ud800 alone",
    "tag\U000e0041\ufe0f",
    "Z" + "\u0301" * 200,
    "x" * 5000,
    "javascript:alert(1)",
]
VOID = {"meta", "link", "input", "img", "br"}


def a_hostname(hostname="app.test", **more):
    return {
        "hostname": hostname,
        "url": f"https://{hostname}/",
        "mode": "http",
        "protocol": None,
        "port": None,
        "target": "127.0.0.1:3000",
        "session": "1",
        "agent": "laptop",
        "since": 1_000_000,
        "visits": 0,
        "failed": 0,
        "received_bytes": 0,
        "sent_bytes": 0,
        "visits_per_second": 0,
        "spark": [0] * 60,
        "certificate": {"state": "ready", "days_left": 60},
        **more,
    }


def a_session(**more):
    return {"id": "1", "agent": "laptop", "address": "192.0.2.1", "connected_at": 1_000_000,
            "round_trip_ms": 12.5, "hostnames": 1, "streams": 0, "visits": 0, **more}  # fmt: skip


def a_visit(number=1, **more):
    return {"id": number, "at": 1_000_000.5, "hostname": "app.test", "method": "GET", "path": "/",
            "status": 200, "error": "", "duration_ms": 12.5, "received": 100, "sent": 1000,
            "visitor": "192.0.2.9", "agent": "laptop", "protocol": "HTTP/1.1", **more}  # fmt: skip


def a_document(*hostnames, **more):
    gateway = {"host": "gateway.test", "version": "1.2.3", "started_at": 900_000,
               "uptime_seconds": 100_000, "now": 1_000_300}  # fmt: skip
    return {"gateway": gateway, "hostnames": list(hostnames), "public": False, **more}


def html(*hostnames, csrf="", **more):
    return page.render(a_document(*hostnames, **more), csrf).body.decode()


class Reader(HTMLParser):
    """Collects the elements of a page, and the texts in it. Fails on elements that do not match."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.attributes, self.texts, self._open = [], [], [], []
        self.feed(text)
        self.close()
        assert not self._open

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag, attrs):
        pass

    def handle_endtag(self, tag):
        while self._open and self._open[-1] in ("th", "td", "tr", "li") and self._open[-1] != tag:
            self._open.pop()  # their ends may be left out
        assert self._open.pop() == tag

    def handle_data(self, data):
        if self._open and self._open[-1] not in ("script", "style"):
            self.texts.append(data)


def test_page_names_the_gateway_and_its_version():
    text = html()
    assert "<h1>gateway.test</h1>" in text and "gotunnel 1.2.3 · up 1 d 3 h" in text
    assert "No agent is connected" in text


def test_hostnames_are_in_natural_order():
    names = ["app10.test", "app2.test", "App1.test", "b.test"]
    found = re.findall(r"<a href=\"https://([^/]+)/\"", html(*map(a_hostname, names)))
    assert found == ["App1.test", "app2.test", "app10.test", "b.test"]


def test_without_javascript_the_page_reloads_itself_and_shows_all():
    text = html(
        a_hostname(visits=42, failed=17, sent_bytes=1_234_567, visits_per_second=2.5),
        a_hostname("ssh.test", mode="tcp", protocol="ssh", port=2222, url="tcp://ssh.test:2222"),
        sessions=[a_session()],
        visits=[a_visit(), a_visit(2, status=502, error="no-tunnel")],
        blocks=[{"address": "198.51.100.7", "until": 1_003_600, "reason": "guesses", "by": "me"}],
        certificates=[{"hostname": "gateway.test", "state": "ready", "days_left": 59}],
        totals={"visits": 1000, "failed": 5, "running": 3, "visits_per_second": 2.5},
    )
    assert '<noscript><meta http-equiv="refresh" content="10"></noscript>' in text
    body = text[text.index("<noscript>\n") : text.index('<div id="app"')]
    for shown in (
        "192.0.2.1", "12.5 ms", "5 min", ">42<", ">17<", "1.23 MB", "2.5/s", "127.0.0.1:3000",
        "tcp, ssh", "port 2222", "ready · 60 days", "192.0.2.9", "502", "no-tunnel",
        "198.51.100.7", "guesses", "1970-01-12 14:46:40 UTC", "1,000",
        'title="0.5 % of all">5<', "gateway.test", "ready · 59 days",
    ):  # fmt: skip
        assert shown in body, shown
    assert 'href="tcp' not in body  # a browser cannot open it
    assert body.index("no-tunnel") < body.index(">200<")  # the newest visit comes first


def test_target_that_is_not_well_and_session_that_waits():
    ill = a_hostname(health="failed", health_reason="503 for GET /<b>")
    waiting = a_session(id="w", hostnames=0, waits_for=["db.test", "<i>"])
    shown = html(ill, sessions=[waiting])
    assert "not well: 503 for GET /&lt;b&gt;" in shown
    assert "waits for db.test, &lt;i&gt;" in shown
    assert "not well: 503" not in html(a_hostname(health="ok", health_reason="503"))


def test_a_list_that_is_cut_short_says_so():
    text = html(a_hostname(), totals={"hostnames": 1500, "sessions": 0})
    assert "1 of 1,500 are listed" in text and "Hostnames <b>1,500</b>" in text
    assert "are listed; the totals" not in html(a_hostname()).partition("<script>")[0]


def test_page_for_everybody_shows_hostnames_and_modes_alone():
    entries = [{"hostname": name, "url": "", "mode": "http"} for name in ("b.test", "a.test")]
    document = {"gateway": {"host": "gateway.test"}, "hostnames": entries, "public": True}
    answer = page.render(document)
    text = answer.body.decode()
    body = text[text.index("<noscript>\n") : text.index('<div id="app"')]
    assert body.index("a.test") < body.index("b.test")
    for more in ("Agent", "Failed", "Certificate", "Target", "Since"):
        assert more not in body
    assert '<body class="public">' in text and 'action="logout"' not in text


def test_a_session_of_one_of_several_processes_names_it():
    sessions = [a_session(), a_session(id="2", process=2)]
    page = html(a_hostname(), sessions=sessions)
    assert page.count("192.0.2.1 (process 2)") == 1


def test_only_a_caller_with_a_session_gets_buttons():
    block = {"address": "2001:db8::/64", "until": 1_003_600, "reason": "", "by": "me"}
    documents = {"sessions": [a_session(id="a/b")], "visits": [a_visit()], "blocks": [block]}
    noscript = re.compile(r"<noscript>\n.*?</noscript>", re.DOTALL)
    reader = html(a_hostname(), **documents)
    assert "<form" not in noscript.search(reader)[0] and 'action="logout"' not in reader
    actor = html(a_hostname("ü.test"), csrf='tok"en', **documents)
    forms = noscript.search(actor)[0]
    assert 'action="api/v1/sessions/a%2Fb/end"' in forms
    assert 'action="api/v1/certificates/%C3%BC.test/renew"' in forms
    assert 'action="api/v1/blocks/2001%3Adb8%3A%3A%2F64/remove"' in forms
    assert 'action="api/v1/blocks"' in forms
    assert forms.count('name="csrf" value="tok&quot;en"') == 4
    assert 'action="logout"' in actor and '<meta name="csrf" content="tok&quot;en">' in actor


@pytest.mark.parametrize("text", HOSTILE, ids=ascii)
def test_foreign_text_stays_text(text):
    certificate = {"state": text, "days_left": 1, "error_summary": text, "error_text": text}
    hostname = a_hostname(text, url=text, mode=text, protocol=text, target=text, agent=text,
                          certificate=certificate)  # fmt: skip
    visit = a_visit(hostname=text, method=text, path=text, error=text, visitor=text, agent=text)
    more = {
        "sessions": [a_session(id=text, agent=text, address=text)],
        "visits": [visit],
        "blocks": [{"address": text, "until": None, "reason": text, "by": text}],
    }
    tame = Reader(html(a_hostname(), csrf="t", **{**more, "sessions": [a_session()], "visits": [],
                                                  "blocks": []}))  # fmt: skip
    wild = Reader(html(hostname, csrf="t", **more))
    assert set(wild.tags) <= {*tame.tags, "details", "summary", "p", "span", "td"}
    assert wild.tags.count("script") == tame.tags.count("script") == 2
    assert not [name for name, _ in wild.attributes if name.startswith("on") or name == "style"]
    assert not [value for name, value in wild.attributes if name == "href" and ":" in value[1:]
                and not value.startswith(("https://", "data:"))]  # fmt: skip
    shown = "".join(wild.texts) + "".join(value or "" for _, value in wild.attributes)
    assert not [c for c in shown if not c.isprintable() and c != "\n"]
    assert len(max(wild.texts, key=len)) <= page.MOST_ERROR


def test_the_script_gets_the_document_as_data():
    document = a_document(*map(a_hostname, HOSTILE))
    text = page.render(document).body.decode()
    data = re.search(r'<script type="application/json" id="state">(.*?)</script>', text)[1]
    assert json.loads(data) == document and data.isascii() and "<" not in data


def test_policy_names_the_style_and_the_script_by_hash():
    answer = page.render(a_document())
    policy = dict(answer.fields)["Content-Security-Policy"]
    assert "unsafe" not in policy and policy.startswith("default-src 'none'; ")
    for tag in ("script", "style"):
        (text,) = re.findall(rf"<{tag}>(.*?)</{tag}>", answer.body.decode(), re.DOTALL)
        digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        assert f"{tag}-src 'sha256-{digest}'" in policy


def test_nothing_in_the_page_needs_what_the_policy_forbids():
    source = page._SOURCE
    assert not re.search(r"\sstyle=|\son[a-z]+=|innerHTML|outerHTML|insertAdjacent|document\.write"
                         r"|\beval\b|new Function|@import|url\(", source)  # fmt: skip
    assert set(re.findall(r"\bhttps?://[^\s'\"<]+", source)) <= {"http://www.w3.org/2000/svg"}


@pytest.mark.parametrize("problem", ["", "Wrong <password>."])
def test_login_form(problem):
    answer = page.login("gateway.test", problem)
    text = answer.body.decode()
    Reader(text)
    assert '<form method="post" action="login">' in text and 'name="password"' in text
    assert ('role="alert">Wrong &lt;password&gt;.</p>' in text) == bool(problem)
    (style,) = re.findall(r"<style>(.*?)</style>", text, re.DOTALL)
    digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    policy = dict(answer.fields)["Content-Security-Policy"]
    assert f"style-src 'sha256-{digest}'" in policy and "script-src" not in policy


@pytest.mark.parametrize(
    ("function", "value", "words"),
    [
        (page.span, -5, "0 s"),
        (page.span, 59.9, "59 s"),
        (page.span, 60, "1 min"),
        (page.span, 61, "1 min 1 s"),
        (page.span, 3600 * 26, "1 d 2 h"),
        (page.span, 86400 * 12 + 3600, "12 d"),
        (page.size, None, "–"),
        (page.size, 0, "0 B"),
        (page.size, 999, "999 B"),
        (page.size, 1000, "1 kB"),
        (page.size, 1_234_567, "1.23 MB"),
        (page.size, 10**18, "1000 PB"),
        (page.lasting, None, "–"),
        (page.lasting, 0.8, "0.8 ms"),
        (page.lasting, 2340, "2.34 s"),
        (page.lasting, 75_000, "1 min 15 s"),
        (page.visible, "a\u202eb\nc", "a[U+202E]b[U+000A]c"),
        (page.visible, "e\u0301e", "e\u0301e"),
        (page.visible, None, ""),
    ],
)
def test_words_and_numbers(function, value, words):
    assert function(value) == words


def test_a_huge_number_in_a_name_is_sorted_too():
    names = ["a" + "9" * 5000, "a1", "a"]
    assert sorted(names, key=page.natural) == ["a", "a1", names[0]]


# Contrast (WCAG 2.2, 1.4.3 "AA": 4.5 for text; 1.4.11: 3 for what shows a control or its state)

TEXT_ON = {
    "text": ("back", "panel", "hover", "fill", "tint"),
    "quiet": ("back", "panel", "hover", "fill", "tint"),
    "link": ("back", "panel", "hover", "fill"),
    "ok": ("back", "panel", "hover", "fill"),
    "warn": ("back", "panel", "hover", "fill"),
    "bad": ("back", "panel", "hover", "fill", "tint"),
    "back": ("link", "bad"),  # the strong buttons
}


def colours():
    light, dark = re.findall(r":root \{(.*?)\}", page._SOURCE, re.DOTALL)
    found = [dict(re.findall(r"--([a-z]+): (#[0-9a-f]{6})", part)) for part in (light, dark)]
    assert set(found[0]) == set(found[1])
    return found


def contrast(one, other):
    def luminance(colour):
        parts = (int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5))
        red, green, blue = (
            p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts
        )
        return 0.2126 * red + 0.7152 * green + 0.0722 * blue

    light, dark = sorted((luminance(one), luminance(other)), reverse=True)
    return (light + 0.05) / (dark + 0.05)


@pytest.mark.parametrize("scheme", [0, 1], ids=["light", "dark"])
def test_text_has_enough_contrast(scheme):
    colour = colours()[scheme]
    for text, backs in TEXT_ON.items():
        for back in backs:
            assert contrast(colour[text], colour[back]) >= 4.5, (text, back)
    for back in ("back", "panel", "hover"):
        assert contrast(colour["edge"], colour[back]) >= 3, back
