"""What the inspector hides: names and forms of secrets, in heads, paths and bodies."""

import time

import pytest

from gotunnel_agent.inspector import mask
from gotunnel_agent.inspector.mask import MASK

SECRET = "hunter2-is-a-secret"


@pytest.mark.parametrize(
    "name",
    [
        "password", "Password", "user[password]", "new_password_confirmation", "passwd", "pwd",
        "client_secret", "X-Api-Key", "apikey", "access_token", "csrfmiddlewaretoken",
        "X-CSRF-Token",
        "X-Amz-Security-Token", "sessionid", "PHPSESSID", "Authorization", "Cookie", "key", "pin",
        "private_key", "Ocp-Apim-Subscription-Key", "sig", "otp", "X-Vault-Token", "jwt",
    ],
)  # fmt: skip
def test_a_name_of_a_secret(name):
    assert mask.is_secret(name)


@pytest.mark.parametrize(
    "name",
    [
        "user", "monkey", "keyboard", "token_type", "tokenEndpoint", "author", "passenger",
        "spinner",
        "Sec-WebSocket-Key", "Idempotency-Key", "Content-Type", "expires_in",
        "secret_name_required",
        "Access-Control-Allow-Credentials", "design", "", "-",
    ],
)  # fmt: skip
def test_a_name_of_no_secret(name):
    assert not mask.is_secret(name)


@pytest.mark.parametrize(
    ("name", "value", "shown"),
    [
        ("Authorization", f"Bearer {SECRET}", f"Bearer {MASK}"),
        ("authorization", f"Basic {SECRET}=", f"Basic {MASK}"),
        ("Proxy-Authorization", SECRET, MASK),
        ("Cookie", f"a={SECRET}; theme={SECRET}", f"a={MASK}; theme={MASK}"),
        ("Cookie", SECRET, MASK),
        ("Set-Cookie", f"a={SECRET}; Path=/; HttpOnly", f"a={MASK}; Path=/; HttpOnly"),
        ("X-Api-Key", SECRET, MASK),
        ("X-Api-Key", "", ""),
        ("Referer", f"https://a/?token={SECRET}&b=1", f"https://a/?token={MASK}&b=1"),
        ("Location", f"https://u:{SECRET}@a/", f"https://u:{MASK}@a/"),
        ("X-Trace", "eyJhbGciOi.eyJzdWIiOiJ.c2ln", MASK),
        ("Accept", "text/html;q=0.9,*/*", "text/html;q=0.9,*/*"),
        ("Content-Type", "multipart/form-data; boundary=x", "multipart/form-data; boundary=x"),
    ],
)
def test_a_field(name, value, shown):
    assert mask.field(name, value) == shown


@pytest.mark.parametrize(
    ("target", "shown"),
    [
        (f"/a?token={SECRET}&b=1", f"/a?token={MASK}&b=1"),
        (f"/a?b=1&pass%77ord={SECRET}", f"/a?b=1&pass%77ord={MASK}"),
        (f"/a?user%5Bpassword%5D={SECRET};x", f"/a?user%5Bpassword%5D={MASK}"),
        ("/a?token=&b", "/a?token=&b"),
        ("/token=x/password", "/token=x/password"),
        ("/eyJhbGciOi.eyJzdWIiOiJ.c2ln/x", f"/{MASK}/x"),
        ("*", "*"),
        ("", ""),
    ],
)
def test_a_target(target, shown):
    assert mask.target(target) == shown


def test_a_head_that_breaks_rules_is_masked_as_well():
    head = (
        f"GET /?token={SECRET} HTTP/1.1\nHost: a\r\nX-API-KEY :{SECRET}\r\n"
        f"authorization: Bearer\r\n\t{SECRET}\r\nno colon password={SECRET}\r\n"
        f"Cookie:a={SECRET}\r\n\r\n"
    )
    shown = mask.head(head)
    assert SECRET not in shown
    assert shown.count("\n") == head.count("\n")
    assert "Host: a\r\n" in shown


@pytest.mark.parametrize(
    ("text", "content_type", "shown"),
    [
        ('{"password": "x\\"y", "b": 1}', "application/json", f'{{"password": "{MASK}", "b": 1}}'),
        ('{"a": {"token": "x"}}', "", f'{{"a": {{"token": "{MASK}"}}}}'),
        ('{"secret": {"a": "}", "b": [1]}, "c": 2}', "", f'{{"secret": "{MASK}", "c": 2}}'),
        ('{"pin": 1234}', "", f'{{"pin": "{MASK}"}}'),
        ('{"max_tokens": 12, "token": null, "key": ""}', "", None),
        ('{"pass\\u0077ord": "x"}', "", f'{{"pass\\u0077ord": "{MASK}"}}'),
        ('{"password": "cut', "", f'{{"password": "{MASK}"'),
        (f"a=1&password={SECRET};x&b=2", mask.FORM + "; charset=utf-8", f"a=1&password={MASK}&b=2"),
        (f"log: password={SECRET} ok", "text/plain", f"log: password={MASK} ok"),
        (f"Authorization: Basic {SECRET}\nb: c", "", f"Authorization: Basic {MASK}\nb: c"),
        (f"<Password>{SECRET}</Password><b>1</b>", "", f"<Password>{MASK}</Password><b>1</b>"),
        ("sk_live_0123456789abcdef", "", MASK),
        ("-----BEGIN RSA PRIVATE KEY-----\nabc", "", MASK),
        ("nothing of this kind", "", None),
        ("", "", None),
    ],
)  # fmt: skip
def test_a_body(text, content_type, shown):
    assert mask.body(text, content_type) == (text if shown is None else shown)


def test_a_part_of_a_form_is_masked_by_its_name():
    def form(value):
        part = '--B\r\nContent-Disposition: form-data; name="{}"\r\n\r\n{}\r\n'
        return part.format("password", value) + part.format("title", "A title") + "--B--\r\n"

    assert mask.body(form(f"{SECRET}\r\nmore")) == form(MASK)


def test_bytes_that_are_no_secret_stay_as_they_are():
    data = bytes(range(256)) * 4
    assert mask.body_bytes(data) == data
    assert mask.body_bytes(b"\xff password=" + SECRET.encode()) == b"\xff password=" + MASK.encode()


HOSTILE = [
    '"' * 60000, '"a' * 30000, '"token":' * 8000, '"token":[' * 7000, '"token":{"' * 6000,
    'name="a"\r\n' * 6000 + "form-data", "name=\n\n" * 9000 + "form-data", "<a>" * 20000 + "</",
    "<a " * 20000 + "</", "a=" * 30000, "eyJ" * 20000, "eyJaaaaaaaa." * 5000, "://" * 20000,
    "-----BEGIN PRIVATE KEY-----" * 2400, "Bearer " * 9000, "x:" * 30000, "\n \n" * 20000 + ":",
    " " * 60000 + ":", '"\\' * 30000 + '":', "://a:" * 12000, "password" * 8000,
]  # fmt: skip


@pytest.mark.parametrize("text", HOSTILE, ids=lambda text: text[:12])
def test_the_time_grows_with_the_length_and_no_faster(text):
    """A pattern that backtracks over 60 kB would take minutes."""
    began = time.process_time()
    mask.body(text)
    mask.head(text)
    assert time.process_time() - began < 2
