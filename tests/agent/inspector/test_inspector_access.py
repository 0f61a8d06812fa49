"""Which requests the inspector answers: Host, Origin, Sec-Fetch-Site and the token."""

import pytest

from gotunnel_agent.common import http1
from gotunnel_agent.inspector.access import Door

TOKEN = "t" * 43
DOOR = Door(TOKEN, "127.0.0.1", 4040)
COOKIE = f"{DOOR.cookie_name}={DOOR.cookie_value}"
OURS = "http://127.0.0.1:4040"


def request(method="GET", path="/api/v1/visits", host="127.0.0.1:4040", **fields):
    lines = [f"{method} {path} HTTP/1.1", f"Host: {host}"]
    lines += [f"{name.replace('_', '-')}: {value}" for name, value in fields.items()]
    return http1.parse_request(("\r\n".join(lines) + "\r\n\r\n").encode("latin-1"))


@pytest.mark.parametrize(
    ("host", "listen", "status"),
    [
        ("127.0.0.1:4040", "127.0.0.1", None),
        ("localhost:4040", "127.0.0.1", None),
        ("LOCALHOST", "127.0.0.1", None),
        ("localhost.:9", "127.0.0.1", None),
        ("127.1.2.3:4040", "127.0.0.1", None),
        ("[::1]:4040", "127.0.0.1", None),
        ("[::ffff:127.0.0.1]:4040", "127.0.0.1", None),
        ("192.0.2.1:4040", "192.0.2.1", None),
        ("192.0.2.1:4040", "0.0.0.0", None),
        ("[2001:db8::1]", "::", None),
        ("192.0.2.1:4040", "127.0.0.1", 421),
        ("192.0.2.2:4040", "192.0.2.1", 421),
        ("evil.example:4040", "127.0.0.1", 421),
        ("evil.example:4040", "0.0.0.0", 421),
        ("localhost.evil.example", "127.0.0.1", 421),
        ("127.0.0.1.evil.example", "127.0.0.1", 421),
        ("app.localhost", "127.0.0.1", 421),
        ("2130706433", "127.0.0.1", 421),
        ("127.1", "127.0.0.1", 421),
        ("0x7f.0.0.1", "127.0.0.1", 421),
    ],
)
def test_a_page_that_rebinds_cannot_have_our_host(host, listen, status):
    refusal = Door(TOKEN, listen, 4040).refuse_place(request(host=host))
    assert (refusal and refusal.status) == status


@pytest.mark.parametrize(
    ("fields", "allowed"),
    [
        ({}, True),
        ({"Origin": OURS}, True),
        ({"Origin": OURS.upper()}, True),
        ({"Origin": "https://127.0.0.1:4040"}, True),  # behind a proxy with TLS
        ({"Origin": "http://localhost:4040"}, False),
        ({"Origin": "http://127.0.0.1:3000"}, False),
        ({"Origin": "http://127.0.0.1"}, False),
        ({"Origin": "null"}, False),
        ({"Origin": ""}, False),
        ({"Origin": "http://evil.example"}, False),
        ({"Sec-Fetch-Site": "same-origin", "Sec-Fetch-Mode": "cors"}, True),
        ({"Sec-Fetch-Site": "none", "Sec-Fetch-Mode": "navigate"}, True),
        ({"Sec-Fetch-Site": "same-site", "Sec-Fetch-Dest": "image"}, False),
        ({"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "no-cors"}, False),
        ({"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "navigate"}, False),
        ({"Sec-Fetch-Site": "new-word"}, False),
    ],
)
def test_a_page_from_elsewhere_is_refused(fields, allowed):
    assert (DOOR.refuse_place(request(**fields)) is None) == allowed
    assert (DOOR.refuse_place(request("POST", "/api/v1/clear", **fields)) is None) == allowed


@pytest.mark.parametrize(
    ("method", "path", "fields", "allowed"),
    [
        ("GET", "/?token=x", {"Mode": "navigate", "Dest": "document"}, True),
        ("GET", "/", {"Mode": "navigate", "Dest": "document"}, True),
        ("GET", "/", {"Mode": "navigate", "Dest": "iframe"}, False),
        ("GET", "/", {"Mode": "no-cors", "Dest": "image"}, False),
        ("POST", "/", {"Mode": "navigate", "Dest": "document"}, False),
        ("GET", "/api/v1/har", {"Mode": "navigate", "Dest": "document"}, False),
    ],
)
def test_a_link_from_elsewhere_opens_the_page_alone(method, path, fields, allowed):
    named = {f"Sec-Fetch-{name}": value for name, value in fields.items()}
    asked = request(method, path, **{"Sec-Fetch-Site": "cross-site"}, **named)
    assert (DOOR.refuse_place(asked) is None) == allowed


@pytest.mark.parametrize(
    ("method", "fields", "status"),
    [
        ("GET", {"Authorization": f"Bearer {TOKEN}"}, None),
        ("POST", {"Authorization": f"bearer  {TOKEN}"}, None),
        ("GET", {"Cookie": COOKIE}, None),
        ("GET", {"Cookie": f"a=b; {COOKIE}; c"}, None),
        ("POST", {"Cookie": COOKIE, "Origin": OURS}, None),
        ("POST", {"Cookie": COOKIE}, 403),
        ("GET", {}, 401),
        ("GET", {"Authorization": f"Bearer {TOKEN}x"}, 401),
        ("GET", {"Authorization": f"Basic {TOKEN}"}, 401),
        ("GET", {"Authorization": "Bearer \xff"}, 401),
        ("GET", {"Authorization": "Bearer x", "Cookie": COOKIE}, 401),
        ("GET", {"Cookie": f"{DOOR.cookie_name}={TOKEN}"}, 401),
        ("GET", {"Cookie": f"{DOOR.cookie_name}=\xff"}, 401),
        ("GET", {"Cookie": COOKIE.replace("4040", "4041")}, 401),
    ],
)
def test_each_request_needs_the_token(method, fields, status):
    refusal = DOOR.refuse_stranger(request(method, **fields))
    assert (refusal and refusal.status) == status


def test_the_cookie_of_another_port_is_another():
    """All ports of 127.0.0.1 share their cookies."""
    other = DOOR._replace(port=4041)
    assert other.cookie_name != DOOR.cookie_name
    assert other.cookie_value != DOOR.cookie_value
    assert TOKEN not in DOOR.cookie_value
