"""Who may ask what of the dashboard: paths, methods, Host, Origin, logins, tokens, bodies."""

import base64
import json
import queue
from urllib.parse import urlencode

import fake_exchange
import pytest

from gotunnel_agent.common.addresses import network
from gotunnel_agent.common.http1 import Fields, Malformed
from gotunnel_agent.common.passwords import Hash
from gotunnel_server.dashboard import login
from gotunnel_server.dashboard import site as dashboard_site
from gotunnel_server.dashboard.calls import Call, May, Refused, Way, json_page
from gotunnel_server.dashboard.events import Events
from gotunnel_server.dashboard.login import Login
from gotunnel_server.dashboard.site import MOST_BODY, MOST_FIELDS, Dashboard, Views
from gotunnel_server.visitors.basic_auth import FAILURES
from gotunnel_server.visitors.forwarded import Proxies
from gotunnel_server.visitors.pages import Page

HOST = "gateway.test"
COOKIE = f"{login.COOKIE}{HOST}"
PASSWORD, TOKEN = "correct horse", "a-token-of-programs"
PROXY = "192.0.2.9"
FORM = "application/x-www-form-urlencoded"


def hash_of(secret):
    """A hash that takes a millisecond."""
    made = Hash(10, 8, 1, b"salt" * 4, bytes(32))
    return Hash(10, 8, 1, made.salt, made.compute(secret.encode()))


class Visitor(fake_exchange.Visitor):
    """One request, and the answer that it got."""

    sni = None

    def __init__(
        self, method, path, fields, body=b"", *, host=HOST, scheme="http", peer="192.0.2.1",
        incomplete=False,
    ):  # fmt: skip
        self.authority, self.scheme, self.peer = host, scheme, peer
        self.hostname = host.lower().partition(":")[0] if "[" not in host else "[::1]"
        super().__init__(method, path, *fields, body=len(body) + incomplete if body else None)
        self.body.put([body] if body else None)
        if not incomplete:
            self.body.put(None)

    @property
    def answer(self):
        """Status, fields, body."""
        _, status, fields, _ = next(event for event in self.events if event[0] == "head")
        _, *pieces = next(event for event in self.events if event[0] == "finish")
        return status, Fields(fields), b"".join(pieces)


class Board:
    """A dashboard whose API notes the calls."""

    def __init__(
        self, password=PASSWORD, token=TOKEN, proxies=Proxies([network(PROXY)]), host=HOST
    ):
        self.calls, self.now = [], 1000.0
        ways = [
            Way("GET", "api/v1/state", May.LOOK, self.note),
            Way("GET", "api/v1/visits", May.READ, self.note),
            Way("POST", "api/v1/sessions/{}/end", May.ACT, self.note),
            Way("DELETE", "api/v1/blocks/{}", May.ACT, self.note),
            Way("DELETE", "api/v1/blocks/{}/{}", May.ACT, self.note),
            Way("POST", "api/v1/blocks/{}/remove", May.ACT, self.note),
            Way("POST", "api/v1/blocks", May.ACT, self.refuse),
        ]
        views = Views(
            full=lambda csrf: Page(200, f"all {csrf}".encode()),
            public=lambda: Page(200, b"hostnames"),
            login=lambda problem: Page(200, f"form: {problem}".encode()),
        )
        self.login = Login(
            password and hash_of(password), token and hash_of(token), proxies, host,
            lambda: self.now,
        )  # fmt: skip
        self.events = Events(lambda may: None)
        self.dashboard = Dashboard(
            ways=ways, views=views, login=self.login, events=self.events,
            gateway_host=host, proxies=proxies,
        )  # fmt: skip

    def note(self, call: Call):
        self.calls.append(call)
        return json_page({"may": call.who.may.name})

    def refuse(self, call: Call):
        raise Refused(409, "own-address", "This is your own address.")

    def ask(self, path="/", method="GET", body=b"", *, own_name=False, **how):
        """Status, fields and body of the answer. Keywords in capitals are fields."""
        fields = [
            (name.replace("_", "-"), value) for name, value in how.items() if name[0].isupper()
        ]
        how = {name: value for name, value in how.items() if name[0].islower()}
        visitor = Visitor(method, path, fields, body, **how)
        decided = (self.dashboard.at_gateway if own_name else self.dashboard.at_port)(visitor)
        if isinstance(decided, Page):
            return decided.status, Fields(decided.fields), decided.body
        decided.serve(visitor)
        return visitor.answer

    def log_in(self, password=PASSWORD, path="/login", **how):
        """The session's id, or None."""
        body = urlencode({"password": password}).encode()
        status, fields, _ = self.ask(path, "POST", body, **{"Content_Type": FORM, **how})
        if status != 303:
            return None
        self.cookie = fields.get("set-cookie")
        return self.cookie.partition("=")[2].partition(";")[0]

    def csrf(self, name):
        _, _, page = self.ask(Cookie=f"{COOKIE}={name}")
        return page.decode().removeprefix("all ")


def basic(password=PASSWORD, user="any"):
    return f"Basic {base64.b64encode(f'{user}:{password}'.encode()).decode()}"


BEARER = f"Bearer {TOKEN}"
END = "/api/v1/sessions/7/end"


@pytest.fixture
def board():
    return Board()


# Without a login


def test_without_a_password_everybody_sees_hostnames_and_nothing_else():
    board = Board(password=None, token=None)
    assert board.ask()[0::2] == (200, b"hostnames")
    assert board.ask("/api/v1/state")[2] == b'{"may":"LOOK"}\n'
    assert board.ask("/api/v1/visits")[0] == board.ask(END, "POST")[0] == 401
    assert board.ask("/login")[1].get("location") == "./"
    assert board.ask(own_name=True, path="/dashboard/")[2].count(b"<h1>It works") == 1


def test_a_token_alone_opens_the_api_but_no_page_for_everybody_under_the_gateways_name():
    board = Board(password=None)
    assert board.ask()[2] == b"hostnames"
    assert board.ask("/dashboard/", own_name=True)[0] == 401
    assert board.ask("/dashboard/api/v1/state", own_name=True)[0] == 401
    status, _, body = board.ask("/dashboard/api/v1/state", own_name=True, Authorization=BEARER)
    assert (status, body) == (200, b'{"may":"ACT"}\n')


@pytest.mark.parametrize("path", ["/", "/api/v1/state", "/api/v1/visits", "/api/v1/events"])
def test_with_a_password_nothing_is_shown_without_it(board, path):
    status, fields, body = board.ask(path)
    assert status == 401 and b"all" not in body and not board.calls
    asks = fields.all("www-authenticate")
    assert [value.split()[0] for value in asks] == ["Basic", "Bearer"]


def test_a_browser_gets_the_form_and_no_window_of_its_own(board):
    status, fields, _ = board.ask(Accept="text/html,*/*;q=0.8", Sec_Fetch_Mode="navigate")
    assert (status, fields.get("location")) == (303, "login")
    status, fields, body = board.ask("/api/v1/state", Accept="*/*", Sec_Fetch_Mode="cors")
    assert status == 401 and fields.get("www-authenticate").startswith("Bearer ")
    assert json.loads(body)["error"] == "password-required"
    linked = board.ask(Accept="text/html", Sec_Fetch_Mode="navigate", Sec_Fetch_Site="cross-site")
    assert linked[0] == 200 and b'content="0; url=./"' in linked[2]  # then it sends its cookie
    foreign = {"Accept": "text/html", "Authorization": basic("for a proxy")}
    assert board.ask("/login", **foreign)[2] == b"form: "
    assert board.ask(**foreign)[1].get("location") == "login"


# Paths and methods


@pytest.mark.parametrize(
    ("method", "path", "status", "allow"),
    [
        ("HEAD", "/", 200, None),
        ("GET", "/?x=1", 200, None),
        ("POST", "/", 405, "GET, HEAD"),
        ("OPTIONS", "/", 405, "GET, HEAD"),
        ("PUT", "/login", 405, "GET, HEAD, POST"),
        ("GET", "/logout", 405, "POST"),
        ("HEAD", END, 405, "POST"),
        ("HEAD", "/api/v1/events", 200, None),
        ("GET", "/other", 404, None),
        ("GET", "/api/v1/", 404, None),
        ("GET", "/api/v1/state/", 404, None),
        ("GET", "//api/v1/state", 404, None),
        ("GET", "/./api/v1/state", 404, None),
        ("POST", "/api/v1/sessions//end", 404, None),
        ("GET", "*", 404, None),
        ("CONNECT", "", 404, None),
        ("GET", "/api/v1/" + "x" * 3000, 404, None),
    ],
)
def test_paths_and_methods(board, method, path, status, allow):
    came, fields, body = board.ask(path, method, Authorization=BEARER)
    assert (came, fields.get("allow")) == (status, allow)
    if method == "HEAD":
        assert body == b""


def test_parts_of_a_path_are_decoded_after_it_was_split(board):
    path = "/api/v1/blocks/2001%3adb8%3A%3a%2F64%00%ff"
    assert board.ask(path, "DELETE", Authorization=BEARER)[0] == 200
    assert board.calls[0].parts == ("2001:db8::/64\0\ufffd",)


def test_of_two_paths_that_fit_the_method_decides(board):
    path = "/api/v1/blocks/192.0.2.0/remove"
    assert board.ask(path, "POST", Authorization=BEARER)[0] == 200
    assert board.ask("/api/v1/blocks/192.0.2.0/24", "DELETE", Authorization=BEARER)[0] == 200
    assert [call.parts for call in board.calls] == [("192.0.2.0",), ("192.0.2.0", "24")]
    status, fields, _ = board.ask(path, Authorization=BEARER)
    assert (status, fields.get("allow")) == (405, "DELETE, POST")


def test_it_is_at_dashboard_under_the_gateways_name(board):
    status, fields, _ = board.ask("/dashboard?x", own_name=True)
    assert (status, fields.get("location")) == (301, "/dashboard/")
    assert board.ask("/dashboards", own_name=True)[2].count(b"<h1>It works") == 1
    name = board.log_in(path="/dashboard/login", own_name=True, scheme="https")
    assert "; Path=/dashboard/; " in board.cookie and board.cookie.endswith("; Secure")
    page = board.ask("/dashboard/", own_name=True, Cookie=f"{COOKIE}={name}")[2]
    assert page.startswith(b"all ")


def test_every_answer_has_the_fields_that_protect_it(board):
    for path in ("/", "/login", "/other", "/api/v1/state", "/api/v1/other"):
        fields = board.ask(path, Authorization=BEARER)[1]
        assert fields.get("cache-control") == "no-store"
        assert fields.get("x-content-type-options") == "nosniff"
        assert fields.get("x-frame-options") == "DENY"
        assert fields.get("referrer-policy") == "same-origin"
        assert "frame-ancestors 'none'" in fields.get("content-security-policy")
        assert fields.get("access-control-allow-origin") is None


def test_errors_of_the_api_are_json_whatever_the_caller_accepts(board):
    how = {"Authorization": BEARER, "Accept": "text/html"}
    status, fields, body = board.ask("/api/v1/blocks", "POST", **how)
    assert (status, fields.get("content-type")) == (409, "application/json")
    told = {"error": "own-address", "message": "This is your own address."}
    assert json.loads(body) == told and fields.get("x-gotunnel-error") == "own-address"
    assert board.ask("/other", **how)[1].get("content-type").startswith("text/html")


# Pages elsewhere


@pytest.mark.parametrize(
    ("host", "status"),
    [
        (HOST, 200),
        ("GATEWAY.test:8080", 200),
        ("localhost:9000", 200),
        ("127.0.0.1", 200),
        ("[::1]:8080", 200),
        ("", 403),
        ("evil.test", 403),
        (f"evil.{HOST}", 403),
        ("localhost.evil.test", 403),
        ("2130706433", 403),
    ],
)
def test_a_page_elsewhere_cannot_have_the_host(board, host, status):
    assert board.ask(host=host, Authorization=BEARER)[0] == status


@pytest.mark.parametrize(
    ("host", "scheme", "origin", "is_own"),
    [
        ("localhost:9000", "http", "http://localhost:9000", True),
        ("localhost:9000", "http", "http://localhost:3000", False),
        ("localhost:9000", "http", "http://localhost", False),
        ("gateway.test", "http", "http://gateway.test:80", True),
        ("gateway.test:443", "https", "https://gateway.test", True),
        ("gateway.test", "https", "https://GATEWAY.test", True),
        ("gateway.test", "https", "http://gateway.test", False),
        ("gateway.test", "https", "https://app.gateway.test", False),
        ("gateway.test", "https", "null", False),
        ("gateway.test", "https", "", False),
        ("gateway.test", "https", "https://", False),
        ("gateway.test", "https", "https://gateway.test.evil", False),
        ("gateway.test", "http", "https://gateway.test", True),  # a proxy that hides the scheme
        ("[::1]:8080", "http", "http://[::1]:8080", True),
    ],
)
def test_what_changes_something_must_come_from_the_page_itself(board, host, scheme, origin, is_own):
    for how in ({"Authorization": BEARER}, {}):
        path = END if how else "/login"
        status, _, body = board.ask(path, "POST", host=host, scheme=scheme, Origin=origin, **how)
        refused = status == 403 and b"another site" in body
        assert refused != is_own
    assert len(board.calls) == is_own


@pytest.mark.parametrize("site", ["cross-site", "same-site"])
def test_the_browsers_word_that_a_page_elsewhere_asks_is_enough(board, site):
    how = {"Authorization": BEARER, "Sec_Fetch_Site": site}
    for path, method in ((END, "POST"), ("/api/v1/state", "GET"), ("/api/v1/events", "GET")):
        assert board.ask(path, method, **how)[1].get("x-gotunnel-error") == "wrong-origin"
    assert board.ask(**how)[0] == 200  # a link to the page
    assert board.ask("/login", "POST", Sec_Fetch_Site=site)[0] == 403


def test_a_trusted_proxy_may_change_the_host(board):
    how = {"host": "127.0.0.1:8080", "Origin": "https://dash.test", "Authorization": BEARER}
    forwarded = {"X_Forwarded_Host": "dash.test", "X_Forwarded_Proto": "https"}
    assert board.ask(END, "POST", peer=PROXY, **forwarded, **how)[0] == 200
    assert board.ask(END, "POST", **forwarded, **how)[0] == 403


def test_a_websocket_gets_no_page_that_its_script_could_read(board):
    visitor = Visitor("GET", "/", [("Authorization", BEARER)])
    visitor.wants_upgrade = True
    board.dashboard.at_port(visitor).serve(visitor)
    assert visitor.status == 501 and visitor.code == "no-upgrade"


# Logins


def test_a_session_reads_and_acts_with_its_csrf_token(board):
    name = board.log_in()
    assert "; HttpOnly; SameSite=Strict" in board.cookie and "Secure" not in board.cookie
    assert "; Path=/; Max-Age=43200;" in board.cookie and "Domain" not in board.cookie
    how, csrf = {"Cookie": f"a=b; {COOKIE}={name}; c=d"}, board.csrf(name)
    assert board.ask("/api/v1/visits", **how)[0] == 200
    other = board.csrf(board.log_in())
    assert other != csrf
    for wrong in ({}, {"X_CSRF_Token": other}, {"X_CSRF_Token": ""}, {"X_CSRF_Token": "\xff"}):
        assert board.ask(END, "POST", **how, **wrong)[1].get("x-gotunnel-error") == "csrf"
    assert len(board.calls) == 1
    assert board.ask(END, "POST", **how, X_CSRF_Token=csrf)[0] == 200


def test_a_form_without_javascript_acts_and_gets_the_page_again(board):
    name = board.log_in()
    how = {"Cookie": f"{COOKIE}={name}", "Content_Type": FORM, "Accept": "text/html"}
    body = urlencode({"csrf": board.csrf(name), "reason": "ü"}).encode()
    status, fields, _ = board.ask(END, "POST", body, **how)
    assert (status, fields.get("location")) == (303, "../../../../")
    assert board.calls[0].content["reason"] == "ü" and board.calls[0].is_form
    status, fields, body = board.ask("/api/v1/blocks", "POST", body, **how)
    assert status == 409 and fields.get("content-type").startswith("text/html")
    how["Accept"] = "*/*"  # a script
    assert board.ask(END, "POST", urlencode({"csrf": board.csrf(name)}).encode(), **how)[0] == 200


def test_a_logout_ends_the_session_everywhere(board):
    name = board.log_in()
    how = {"Cookie": f"{COOKIE}={name}"}
    who = board.login.who(Visitor("GET", "/", [("Cookie", how["Cookie"])]), May.NOTHING)
    assert board.ask("/logout", "POST", **how)[0] == 403  # without its token
    assert who.is_valid()
    status, fields, _ = board.ask("/logout", "POST", X_CSRF_Token=board.csrf(name), **how)
    assert (status, fields.get("location")) == (303, "login")
    assert "Max-Age=0" in fields.get("set-cookie")
    assert not who.is_valid() and board.ask(**how)[0] == 401


def test_a_session_ends_after_its_time(board):
    how = {"Cookie": f"{COOKIE}={board.log_in()}"}
    board.now += 12 * 3600 - 1
    assert board.ask(**how)[0] == 200
    board.now += 1
    assert board.ask(**how)[0] == 401


def test_an_id_that_a_browser_brings_is_never_taken_over(board):
    planted = "A" * 43
    name = board.log_in(Cookie=f"{COOKIE}={planted}")
    assert name != planted and board.ask(Cookie=f"{COOKIE}={planted}")[0] == 401
    again = board.log_in(Cookie=f"{COOKIE}={name}")
    assert board.ask(Cookie=f"{COOKIE}={name}")[0] == 401  # the one before has ended
    # By a site under a name below the gateway's
    tossed = f"{COOKIE}={planted}; " * 180 + f"{COOKIE}={again}"
    assert board.ask(Cookie=tossed)[0] == 200


def test_a_browser_may_have_logins_of_two_gateways_at_one_name(board):
    """Such as localhost, by ssh -L: cookies do not know ports."""
    other = Board(host="other.test")
    board.log_in(host="localhost")
    other.log_in(host="localhost")
    kept = dict(each.cookie.partition(";")[0].split("=") for each in (board, other))
    how = {"host": "localhost", "Cookie": "; ".join("=".join(pair) for pair in kept.items())}
    assert board.ask(**how)[0] == other.ask(**how)[0] == 200


def test_a_password_may_be_typed_in_either_unicode_form():
    """It is hashed in NFC; a form sends what was typed or pasted."""
    board = Board("Gr\xfcn")
    assert board.log_in("Gru\u0308n") and board.log_in("Gr\xfcn")


@pytest.mark.parametrize(
    ("scheme", "began", "comes", "status"),
    [
        ("http", "192.0.2.1", "192.0.2.1", 200),
        ("http", "192.0.2.1", "192.0.2.2", 401),
        ("http", "2001:db8::1", "2001:db8::2", 200),
        ("http", "127.0.0.1", "::1", 200),
        ("https", "192.0.2.1", "192.0.2.2", 200),
    ],
)
def test_a_cookie_that_other_ports_get_too_counts_for_one_address(
    board, scheme, began, comes, status
):
    """A tunnel's site on a port of the same host reads what is not Secure."""
    name = board.log_in(peer=began, scheme=scheme)
    assert board.ask(peer=comes, scheme=scheme, Cookie=f"{COOKIE}={name}")[0] == status


def test_sessions_are_bounded(board):
    names = [board.log_in() for _ in range(300)]
    assert board.ask(Cookie=f"{COOKIE}={names[0]}")[0] == 401
    assert board.ask(Cookie=f"{COOKIE}={names[-1]}")[0] == 200


def test_the_password_by_basic_reads_and_does_not_act(board):
    assert board.ask(Authorization=basic())[2] == b"all "
    assert board.ask("/api/v1/visits", Authorization=basic(user=""))[0] == 200
    status, fields, _ = board.ask(END, "POST", Authorization=basic())
    assert (status, fields.get("x-gotunnel-error")) == (403, "read-only")
    status, fields, _ = board.ask("/api/v1/visits", Authorization=basic("wrong"))
    assert status == 401 and fields.get("www-authenticate").startswith("Basic ")


def test_the_token_reads_and_acts_without_a_csrf_token(board):
    assert board.ask("/api/v1/visits", Authorization=f"bearer  {TOKEN}")[0] == 200
    assert board.ask(END, "POST", Authorization=BEARER)[0] == 200
    for wrong in ("Bearer wrong", "Bearer", f"Bearer {TOKEN} x", f"{BEARER}, {BEARER}"):
        status, fields, body = board.ask(END, "POST", Authorization=wrong)
        assert status == 401 and TOKEN.encode() not in body
    assert len(board.calls) == 2
    assert Board(token=None).ask(END, "POST", Authorization=BEARER)[0] == 401


@pytest.mark.parametrize("wrong", ["Bearer", "Bearer caf\xe9", f"Bearer {TOKEN} x", "bearer \\"])
@pytest.mark.parametrize("password", [PASSWORD, None])
def test_what_can_be_no_token_is_called_a_wrong_token(password, wrong):
    """It is not the password that is wrong, nor does a program get the form for everybody."""
    status, fields, _ = Board(password).ask("/api/v1/state", Authorization=wrong)
    assert (status, fields.get("x-gotunnel-error")) == (401, "wrong-token")


@pytest.mark.parametrize("how", ["form", "basic", "bearer"])
def test_attempts_are_limited_by_address(board, how):
    def attempt(secret, peer="192.0.2.1"):
        if how == "form":
            body = urlencode({"password": secret}).encode()
            return board.ask("/login", "POST", body, peer=peer, Content_Type=FORM)[0]
        field = basic(secret) if how == "basic" else f"Bearer {secret}"
        return board.ask("/api/v1/visits", peer=peer, Authorization=field)[0]

    right = TOKEN if how == "bearer" else PASSWORD
    good = 303 if how == "form" else 200
    assert attempt(right, "192.0.2.7") == good
    tries = [attempt(f"guess-{number}", "192.0.2.7") for number in range(FAILURES + 2)]
    assert tries == [401] * FAILURES + [429] * 2
    assert attempt(right, "192.0.2.7") == good  # it was right from there before
    assert attempt(right, "192.0.2.8") == good
    for number in range(FAILURES):
        assert attempt(f"guess-{number}") == 401
    assert attempt(right) == 429


def test_the_page_says_what_is_wrong_with_a_login(board):
    body = urlencode({"password": "wrong"}).encode()
    status, fields, page = board.ask("/login", "POST", body, Content_Type=FORM)
    assert (status, page) == (401, b"form: The password is wrong. Try again.")
    assert fields.get("www-authenticate") is None  # the browser would show a window of its own
    for body in (b"", b"password=", b"other=1"):
        assert board.ask("/login", "POST", body, Content_Type=FORM)[0] == 400


def test_another_password_ends_all_sessions_and_another_token_its_users(board):
    how = {"Cookie": f"{COOKIE}={board.log_in()}"}
    seen = [
        board.login.who(Visitor("GET", "/", [field]), May.NOTHING)
        for field in (
            ("Cookie", how["Cookie"]), ("Authorization", basic()), ("Authorization", BEARER)
        )
    ]  # fmt: skip
    board.login.change_token(hash_of("another-token-of-programs"))
    assert [who.is_valid() for who in seen] == [True, True, False]
    board.login.change_password(hash_of("another"))
    assert [who.is_valid() for who in seen] == [False] * 3
    assert board.ask(**how)[0] == board.ask(Authorization=basic())[0] == 401
    assert board.log_in("another")


def test_a_proxy_names_the_caller_and_whether_it_has_tls(board):
    forwarded = {"X_Forwarded_For": "198.51.100.3", "X_Forwarded_Proto": "https"}
    assert board.log_in(peer=PROXY, **forwarded) and board.cookie.endswith("; Secure")
    assert board.log_in(**forwarded) and not board.cookie.endswith("; Secure")
    board.ask("/api/v1/state", peer=PROXY, Authorization=BEARER, **forwarded)
    assert board.calls[0].who.address == "198.51.100.3"


# Bodies


@pytest.mark.parametrize(
    ("body", "kind", "status", "code"),
    [
        (b'{"reason":"x"}', "application/json; charset=utf-8", 200, None),
        (b"reason=x", FORM, 200, None),
        (b"", "text/plain", 200, None),
        (b"{}", "", 415, "wrong-type"),
        (b"{}", "text/plain", 415, "wrong-type"),
        (b"{", "application/json", 400, "malformed-body"),
        (b"\xff", "application/json", 400, "malformed-body"),
        (b"[]", "application/json", 400, "malformed-body"),
        (b"[" * MOST_BODY, "application/json", 400, "malformed-body"),
        (b"1" * 5000, "application/json", 400, "malformed-body"),
        (b"a=b&" * (MOST_FIELDS + 1), FORM, 400, "malformed-request"),
        (b" " * (MOST_BODY + 1), "application/json", 413, "too-large"),
    ],
)
def test_bodies(board, body, kind, status, code):
    came = board.ask(END, "POST", body, Authorization=BEARER, Content_Type=kind)
    assert (came[0], came[1].get("x-gotunnel-error")) == (status, code)
    assert len(board.calls) == (code is None)


def asking_with(board, *pieces, length=...):
    visitor = Visitor("POST", END, [("Authorization", BEARER), ("Content-Type", FORM)])
    visitor.has_body, visitor.body_length, visitor.body = True, length, queue.Queue()
    for piece in pieces:
        visitor.body.put(piece)
    if length is ...:
        visitor.body_length = None
    board.dashboard.at_port(visitor).serve(visitor)
    return visitor


def test_a_body_of_unknown_length_is_bounded(board):
    visitor = asking_with(board, *[[b"x" * 1000, b"x" * 1000]] * 40)
    assert visitor.status == 413 and not board.calls
    assert asking_with(board, length=10**12).status == 413  # not a byte is read


def test_a_body_that_never_comes_or_is_broken_is_refused(board, monkeypatch):
    monkeypatch.setattr(dashboard_site, "HURRIED", 0.05)  # the room is crowded
    assert asking_with(board, [b"a=b"]).status == 408
    assert asking_with(board, Malformed(400, "a bad chunk")).status == 400
    assert not board.calls


def test_a_caller_that_waits_for_permission_to_send_its_body_gets_it(board):
    how = {"Authorization": BEARER, "Content_Type": FORM, "Expect": "100-continue"}
    visitor = Visitor("POST", END, [(n.replace("_", "-"), v) for n, v in how.items()], b"a=b")
    board.dashboard.at_port(visitor).serve(visitor)
    assert visitor.events[0] == ("interim", 100, []) and visitor.status == 200


def test_no_body_is_read_before_the_caller_is_known(board):
    visitor = Visitor("POST", END, [], b"x", incomplete=True)
    board.dashboard.at_port(visitor).serve(visitor)
    assert visitor.status == 401 and not visitor.body.empty()
