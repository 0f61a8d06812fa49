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


HOSTILE += [
    seed * (60000 // len(seed))
    for seed in (
        "a=?", "a=%25", "<a name=token ", "token: |\n x\n", 'a: "\\', 'token="x', "Basic aaaa ",
        '["token","', '\\"token\\":[', "<token><![CDATA[", "eyJaaaaaaaa ",
    )
]  # fmt: skip
HOSTILE.append("form-data " + "name=a " * 9000)


@pytest.mark.parametrize("text", HOSTILE, ids=lambda text: text[:12])
def test_the_time_grows_with_the_length_and_no_faster(text):
    """A pattern that backtracks over 60 kB would take minutes."""
    began = time.process_time()
    mask.body(text)
    mask.head(text)
    assert time.process_time() - began < 2


HIDDEN = [  # a type, and a body in which the secret stands where it is not seen at once
    ("application/json", '{"a": "{\\"password\\": \\"%s\\"}"}'),
    ("application/json", r'{"a": "{\"b\": \"{\\\"token\\\": \\\"%s\\\"}\"}"}'),
    ("application/json", '{"query": "mutation{login(password:\\"%s\\")}"}'),
    ("application/json", '{"password"\n  :  \n"%s"}'),
    ("application/json", '[{"name": "password", "value": "%s"}]'),
    ("application/json", '{"headers": [["Authorization", "%s"]]}'),
    ("application/json", '{"session": "%s", "user_session": "%s"}'),
    ("application/x-www-form-urlencoded", "payload=%%7B%%22password%%22%%3A%%22%s%%22%%7D"),
    ("application/x-www-form-urlencoded", "next=%%252Fcb%%253Ftoken%%253D%s"),
    ("application/x-www-form-urlencoded", "code=%s&state=1"),
    ("text/plain", "PASSWORD = '%s'\nTOKEN=\"%s\"\npass = %s\n"),
    ("text/plain", "{'password': '%s', token: `%s`}"),
    ("text/yaml", "password: |\n  %s\n  %s\nuser: me\n"),
    ("text/yaml", "\"password\": %s\n'token': %s\n"),
    ("text/html", '<input type=hidden name="csrf_token" value="%s">'),
    ("text/html", "<meta content='%s' name=csrf-token>"),
    ("application/xml", "<password><![CDATA[%s]]></password><a token='%s'/>"),
    ("application/xml", "<password>%s"),  # cut
    ("multipart/form-data; boundary=x",
     "--x\r\nContent-Disposition: form-data; name*=utf-8''password\r\n\r\n%s\r\n--x--"),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "text"), HIDDEN)
def test_a_secret_within_another_text(kind, text):
    text = text % ((SECRET,) * (text.replace("%%", "").count("%s")))
    assert SECRET in text
    shown = mask.body(text, kind)
    assert SECRET not in shown
    assert MASK in shown


@pytest.mark.parametrize(
    ("name", "value", "shown"),
    [
        ("X-Auth", SECRET, MASK),
        ("X-Session", SECRET, MASK),
        ("X-Client-Key", SECRET, MASK),
        ("dbPass", SECRET, MASK),
        ("Refresh", f"0; url=/x?token={SECRET}", f"0; url=/x?token={MASK}"),
        ("Location", f"/cb#a=1&access_token={SECRET}", f"/cb#a=1&access_token={MASK}"),
        ("Location", f"/in?next=%2Fcb%3Ftoken%3D{SECRET}", f"/in?next={MASK}"),
        ("X-Data", "eyJ0b2tlbiI6ICJzM2NyM3QifQ==", f"{MASK}=="),  # {"token": "s3cr3t"}
        ("X-Data", "eyJuYW1lIjogImJvYiJ9", "eyJuYW1lIjogImJvYiJ9"),  # {"name": "bob"}
        ("X-Was", "Basic dXNlcjpwYXNz", f"Basic {MASK}"),
        ("X-Was", "Basic information", "Basic information"),
    ],
)
def test_a_secret_within_a_field(name, value, shown):
    assert mask.field(name, value) == shown


@pytest.mark.parametrize(
    ("path", "shown"),
    [
        (f"/a;jsessionid={SECRET}?b=1", f"/a;jsessionid={MASK}?b=1"),
        (f"/a?b=1;token={SECRET}", f"/a?b=1;token={MASK}"),
        ("/services/T00000000/B00000000/abcdefghijklmnop", f"/services/{MASK}"),
        (f"/a?u=http%3A%2F%2Fu%3A{SECRET}%40h", f"/a?u={MASK}"),
        ("/a?code=404&page=1", "/a?code=404&page=1"),
        ("/a?q=50%25&AccountSid=AC1", "/a?q=50%25&AccountSid=AC1"),
    ],
)
def test_a_secret_within_a_path(path, shown):
    assert mask.target(path) == shown


@pytest.mark.parametrize(
    "text",
    [
        '{"password": null, "max_tokens": 5, "session_name": "x", "compass": "n"}',
        '{\n  "token": null,\n  "user": "me"\n}',
        "<p>Basic authentication needs a password</p>",
        '<input name="user" value="bob"><meta name="author" content="me">',
        '["password", "email", "name"]',
    ],
)
def test_what_is_no_secret_stays(text):
    assert mask.body(text) == text
