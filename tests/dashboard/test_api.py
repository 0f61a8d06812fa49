"""The dashboard's JSON API, asked of a running gateway."""

import http.client
import json
import re
import socket
import time
from contextlib import closing, contextmanager
from types import SimpleNamespace
from urllib.parse import quote

import pytest
from support import APP, CUT, RAW, ROOT, TIMEOUT, Wire, agent_here, answer, gateway_here

from gotunnel_server.agents.identity import Identity
from gotunnel_server.certs.state import NotRenewed
from gotunnel_server.dashboard import acts
from gotunnel_server.dashboard.calls import Call, May, Who

TOKEN = "correct-horse-battery-staple-of-32-characters"


class Api:
    def __init__(self, gateway):
        self.gateway = gateway

    def __call__(self, method, path, body=None, token=TOKEN, **fields):
        port = self.gateway.dashboard_port
        if token:
            fields["Authorization"] = f"Bearer {token}"
        if body is not None:
            fields["Content-Type"] = "application/json"
            body = json.dumps(body)
        with closing(http.client.HTTPConnection("127.0.0.1", port, timeout=TIMEOUT)) as connection:
            connection.request(method, f"/api/v1/{path}", body, fields)
            found = connection.getresponse()
            self.fields = found.headers
            return found.status, json.loads(found.read())

    def get(self, path, status=200):
        found, document = self("GET", path)
        assert found == status, document
        return document


@contextmanager
def serving(cache, tmp_path, origin, **changes):
    with gateway_here(cache, DASHBOARD_TOKEN=TOKEN, **changes) as gateway:
        with agent_here(gateway, tmp_path, {APP: origin.port}, {RAW: 9}, jwt_issuer="office"):
            yield Api(gateway)


@pytest.fixture
def api(cache, tmp_path, origin):
    with serving(cache, tmp_path, origin) as api:
        yield api


def visit(api, origin, path="/"):
    with api.gateway.dial(APP) as visitor:
        visitor.send(f"GET {path} HTTP/1.1\r\nHost: {APP}\r\n\r\n".encode())
        with origin.accept() as target:
            target.read_head()
            target.send(answer(b"hello"))
            visitor.read_message()


def test_the_state_has_sessions_hostnames_and_the_last_visits(api, origin):
    visit(api, origin, "/a?b=<script>")
    state = api.get("state")
    assert state["public"] is False and state["gateway"]["state"] == "serving"
    (session,) = state["sessions"]
    assert (session["agent"], session["address"], session["hostnames"]) == (
        "office",
        "127.0.0.1",
        2,
    )
    rows = {row["hostname"]: row for row in state["hostnames"]}
    assert (
        rows[APP]["target"] == f"127.0.0.1:{origin.port}" and rows[RAW]["target"] == "127.0.0.1:9"
    )
    assert rows[APP]["session"] == session["id"] and rows[APP]["visits"] == 1
    assert rows[APP]["certificate"]["state"] == "ready" and rows[APP]["certificate"]["days_left"]
    assert len(rows[APP]["spark"]) == 60 and rows[APP]["sent_bytes"] > 5
    assert state["totals"]["visits"] == 1 and state["totals"]["hostnames"] == 2
    (seen,) = state["visits"]
    assert (seen["path"], seen["status"], seen["agent"]) == ("/a?b=<script>", 200, "office")


def test_an_act_ends_a_session_and_tells_the_agent(api, caplog):
    (session,) = api.get("state")["sessions"]
    status, told = api("POST", f"sessions/{session['id']}/end", {"reason": "old\nversion"})
    assert (status, told["ended"], told["agent"]) == (200, session["id"], "office")
    # There is no credential of that name: the agent has the shared secret.
    assert "JWT_SECRET" in told["message"] and "agents remove" not in told["message"]
    assert api("POST", f"sessions/{session['id']}/end")[0] == 404
    assert (
        "127.0.0.1 (token) ended the session of agent office at 127.0.0.1: old version"
        in caplog.text
    )


def test_the_command_that_keeps_an_agent_out_can_be_pasted():
    """An operator may have named it so; a shell must not run a part of that."""
    identity = Identity("office; reboot", entry=object())
    session = SimpleNamespace(
        agent=SimpleNamespace(identity=identity, host="192.0.2.1"),
        end_by_operator=lambda reason: None,
    )
    hall = SimpleNamespace(session=lambda id: session)
    told = acts.end_session(hall, Call(Who(May.ACT, "192.0.2.9"), ("aa",)))
    assert told["message"].endswith("gotunnel-server agents remove 'office; reboot'.")


SENSELESS = [
    ("blocks", {"address": "127.0.0.1"}, 409, "own-address"),
    ("blocks", {"address": "127.0.0.0/8"}, 409, "own-address"),
    ("blocks", {"address": "::ffff:127.0.0.1"}, 409, "own-address"),
    ("blocks", {"address": "198.51.100.0/24"}, 409, "trusted-proxy"),
    ("blocks", {"address": "0.0.0.0/0"}, 400, "bad-address"),
    ("blocks", {"address": "::ffff:0:0/96"}, 400, "bad-address"),
    ("blocks", {"address": "\ud800\x1b[2J<script>"}, 400, "bad-address"),
    ("blocks", {"address": "1" * 5000}, 400, "bad-address"),
    ("blocks", {"address": ["192.0.2.1"]}, 400, "bad-address"),
    ("blocks", {}, 400, "bad-address"),
    ("blocks", {"address": "192.0.2.1", "seconds": 0}, 400, "bad-seconds"),
    ("blocks", {"address": "192.0.2.1", "seconds": -5}, 400, "bad-seconds"),
    ("blocks", {"address": "192.0.2.1", "seconds": 1e9}, 400, "bad-seconds"),
    ("blocks", {"address": "192.0.2.1", "seconds": 10**4000}, 400, "bad-seconds"),
    ("blocks", {"address": "192.0.2.1", "seconds": True}, 400, "bad-seconds"),
    ("blocks", {"address": "192.0.2.1", "seconds": "soon"}, 400, "bad-seconds"),
    ("blocks", {"address": "192.0.2.1", "reason": "x" * 201}, 400, "bad-reason"),
    ("blocks", {"address": "192.0.2.1", "reason": 5}, 400, "bad-reason"),
    ("sessions/no/end", {}, 404, "no-session"),
    ("sessions/%1b%5b2J%f0%9f/end", {}, 404, "no-session"),
    (f"certificates/{APP}/renew", {}, 409, "not-renewed"),
    ("certificates/%2a.example.com/renew", {}, 409, "not-renewed"),
    ("certificates/%00%ff%e2%80%ae<script>/renew", {}, 409, "not-renewed"),
    ("blocks/203.0.113.1/remove", {}, 404, "no-block"),
    ("blocks/nonsense/remove", {}, 400, "bad-address"),
]


@pytest.fixture
def trusting(cache):
    """The API of a gateway with a trusted proxy."""
    with gateway_here(cache, DASHBOARD_TOKEN=TOKEN, TRUSTED_PROXIES="198.51.100.7") as gateway:
        yield Api(gateway)


def test_acts_that_make_no_sense_are_refused_in_a_line(trusting):
    for path, body, status, error in SENSELESS:
        found, document = trusting("POST", path, body)
        assert (found, document["error"]) == (status, error), document
        message = document["message"]
        assert len(message) < 1100 and message.isprintable() and message.endswith("."), message
    assert trusting.get("blocks") == {"blocks": []}


@pytest.mark.parametrize(
    "address, said",
    [
        ("127.0.0.1", "127.0.0.1 is your own address: "),
        ("127.0.0.0/8", "127.0.0.0/8 holds your own address, 127.0.0.1: "),
    ],
)
def test_your_own_address_is_not_blocked(trusting, address, said):
    assert trusting("POST", "blocks", {"address": address})[1]["message"].startswith(said)


def test_a_choice_of_visits_that_makes_no_sense_is_refused(trusting):
    assert trusting.get("visits?limit=99999999999999999999") == {"visits": []}
    for query in ("limit=-1", "limit=\u0661", "limit=1e3", "failed=maybe"):
        status, document = trusting("GET", f"visits?{quote(query, safe='=')}")
        assert status == 400 and document["error"] in ("bad-limit", "bad-failed")


def test_a_network_is_unblocked_with_its_slash_or_without(trusting):
    for path in ("blocks/10.0.0.0/8", "blocks/10.0.0.0%2F8"):
        assert trusting("POST", "blocks", {"address": "10.0.0.0/8", "seconds": "60"})[0] == 201
        assert trusting("DELETE", path)[0] == 200
    assert trusting("DELETE", "blocks/10.0.0.0%2F8")[0] == 404


def test_a_limit_of_the_ca_says_when_to_ask_again(trusting, monkeypatch):
    def renew(hostname):
        raise NotRenewed("the CA takes\nno orders", time.time() + 99.5)

    monkeypatch.setattr(trusting.gateway.inner.keeper, "renew", renew)
    status, document = trusting("POST", f"certificates/{APP}/renew")
    assert status == 429 and document["error"] == "not-yet"
    assert document["message"].startswith("the CA takes no orders. Try again in ")
    assert 90 <= int(trusting.fields["Retry-After"]) <= 100


def test_blocks_outlive_the_gateway(cache):
    with gateway_here(cache, DASHBOARD_TOKEN=TOKEN) as gateway:
        assert Api(gateway)("POST", "blocks", {"address": "192.0.2.7"})[0] == 201
    with gateway_here(cache) as gateway:  # without a login nothing is blocked, or recorded
        assert gateway.inner._visitors.blocks is None and gateway.inner.recording.visits is None
    with gateway_here(cache, DASHBOARD_TOKEN=TOKEN) as gateway:
        assert [entry["address"] for entry in Api(gateway).get("blocks")["blocks"]] == ["192.0.2.7"]
        assert "192.0.2.7" in gateway.inner._visitors.blocks


def test_an_act_cuts_a_visitor_that_is_there(api, origin):
    """It comes from another address of this machine."""
    source = ("127.0.0.2", 0)
    port = api.gateway.public_port
    sock = socket.create_connection(("127.0.0.1", port), TIMEOUT, source_address=source)
    context = api.gateway.context
    with Wire(
        context.wrap_socket(sock, server_hostname=APP, suppress_ragged_eofs=False)
    ) as visitor:
        visitor.send(f"GET / HTTP/1.1\r\nHost: {APP}\r\n\r\n".encode())
        with origin.accept() as target:
            target.read_head()
            status, told = api("POST", "blocks", {"address": "127.0.0.2"})
            assert (status, told["cut"]) == (201, 1)
            with pytest.raises(CUT):
                visitor.read_to_end()


PAGE = (ROOT / "docs" / "dashboard.md").read_text("utf-8")
EXAMPLE = re.compile(
    r"<!-- example: ([A-Z]+) (\S+)(?: ({[^\n]*}))? ([0-9]{3}) -->\n```json\n(.+?)```", re.S
)


def shape(value):
    """Keys and types, in place of values; of a list only its first entry counts."""
    if isinstance(value, dict):
        return {key: shape(value) for key, value in value.items()}
    if isinstance(value, list):
        return [shape(value[0])] if value else []
    return "number" if isinstance(value, (int, float)) else type(value).__name__


def fits(real, shown):
    """Whether an answer has the keys of the example, and values of these types; in either, a value
    may be unknown (null), and a list empty."""
    if isinstance(real, dict) and isinstance(shown, dict):
        assert real.keys() == shown.keys()
        return all(fits(real[key], shown[key]) for key in real)
    if isinstance(real, list) and isinstance(shown, list):
        return not (real and shown) or fits(real[0], shown[0])
    return "NoneType" in (real, shown) or real == shown


def test_each_example_of_the_page_is_an_answer_of_the_api(api, origin, monkeypatch):
    monkeypatch.setattr(api.gateway.inner.keeper, "renew", lambda hostname: None)
    visit(api, origin, "/a?b=c")
    (session,) = api.get("state")["sessions"]
    examples = EXAMPLE.findall(PAGE)
    assert len(examples) == PAGE.count("<!-- example:") == 8
    for method, path, body, status, text in examples:
        path = path.removeprefix("api/v1/").replace("SESSION", session["id"])
        found, document = api(method, path, json.loads(body) if body else None)
        assert found == int(status), document
        shown = json.loads(text)
        assert fits(shape(document), shape(shown)), (path, document)
        if "message" in shown:
            pattern = re.escape(shown["message"]).replace(re.escape("203.0.113.9"), ".*")
            assert re.fullmatch(pattern, document["message"])


def test_the_page_has_each_path_and_each_error_of_the_api():
    source = "".join(
        (ROOT / "gotunnel_server" / "dashboard" / name).read_text("utf-8")
        for name in ("api.py", "acts.py", "site.py", "login.py", "events.py")
    )
    codes = set(re.findall(r'(?:Refused\(|_full\()\s*[0-9]{3}, "([a-z-]+)"', source))
    assert {"no-session", "own-address", "not-yet", "bad-limit"} <= codes
    told = re.findall(r"^\| [0-9, ]+ \| (.+?) \|", PAGE, re.M)
    listed = set(re.findall("`([a-z-]+)`", " ".join(told)))
    of_the_page = {"wrong-password", "no-upgrade"}
    assert codes - of_the_page <= listed
