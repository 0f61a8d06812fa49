"""What the gateway asks of a tunnel's visitors: addresses, rates, passwords, and their bounds."""

import base64
import ipaddress
import json
import random
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
from support import wait_until

from gotunnel_agent.common.addresses import MOST_NETWORKS
from gotunnel_agent.common.passwords import MOST_USERS, Hash
from gotunnel_agent.common.token_bucket import MOST_KEYS
from gotunnel_server.net.round_robin import Gate
from gotunnel_server.visitors import basic_auth
from gotunnel_server.visitors.policy import Defaults, Networks, PolicyError, read
from gotunnel_server.visitors.verdict import Allow, refusal

HOME, ABROAD = "192.0.2.1", "198.51.100.7"
PASSWORD = "correct horse: battery"  # with a colon, which a password may have


def cheap(password):
    """A hash as an agent may send it, of the least cost, so that tests do not wait."""
    blank = Hash(10, 8, 1, b"salt" * 4, bytes(32))
    return str(blank._replace(digest=blank.compute(password.encode())))


HASH = cheap(PASSWORD)
SECRETS = (PASSWORD, HASH, HASH.rpartition("$")[2])


def basic(user, password=PASSWORD):
    return "Basic " + base64.b64encode(f"{user}:{password}".encode()).decode()


class Clock:
    def __init__(self):
        self.now = 1000.0

    def __call__(self):
        return self.now


def outcome(verdict):
    """None for an Allow, status and code of the page for an Answer."""
    if isinstance(verdict, Allow):
        return None
    return verdict.page.status, dict(verdict.page.fields)["X-Gotunnel-Error"]


def comes_in(verdict):
    return outcome(verdict) is None


def passwords(judged):
    """The rule of a policy that asks for them."""
    return judged._for_requests[-1]


def fields(verdict):
    """Of the page of an Answer, but for its code."""
    return verdict.page.fields[1:]


NOT_ALLOWED = (403, "not-allowed")
ASKED = (401, "password-required")
TOO_MANY = (429, "too-many-requests")
BUSY = (503, "gateway-busy")


# --- The chain -----------------------------------------------------------------------------------


def test_first_answer_of_a_chain_counts_and_what_the_rules_allow_adds_up(monkeypatch):
    asked = []

    class Rule:
        def __init__(self, *verdict):
            self.verdict = Allow(*verdict)

        def judge(self, caller):
            asked.append(caller)
            return self.verdict

    judged = read({"allow": [HOME]}, "http")
    refused = refusal(403, "not-allowed", "Not today.")
    rules = [Rule((("A", "b"),), ("a",)), Rule(), Rule((), ("c",))]
    monkeypatch.setattr(judged, "_for_requests", rules)
    assert judged.judge_request(f"::ffff:{HOME}", "x") == ((("A", "b"),), ("a", "c"))
    address = ipaddress.ip_address(HOME)
    assert asked == [(f"::ffff:{HOME}", address, "x")] * 3
    rules[1].verdict = refused
    assert judged.judge_request(HOME, None) is refused
    assert len(asked) == 5


def test_password_is_stripped_from_what_the_target_gets_and_nothing_else_is():
    assert guarded().judge_request(HOME, basic("me")) == ((), ("authorization",))
    assert read({"allow": [HOME]}, "http").judge_request(HOME, basic("me")) == ((), ())


def test_place_then_rate_then_password(computed):
    wire = {
        "allow": [HOME], "rate_limit": {"per_address": 1, "burst": 1},
        "basic_auth": [f"me:{HASH}"],
    }  # fmt: skip
    judged = read(wire, "http", now=Clock())
    expected = [(ABROAD, NOT_ALLOWED), (HOME, ASKED), (HOME, TOO_MANY), (ABROAD, NOT_ALLOWED)]
    for address, verdict in expected:
        assert outcome(judged.judge_request(address, None)) == verdict
    assert outcome(judged.judge_connection(HOME)) == TOO_MANY
    assert computed == []


# --- What an agent may send ----------------------------------------------------------------------


@pytest.mark.parametrize("wire", [None, {}])
@pytest.mark.parametrize("mode", ["http", "tcp"])
def test_tunnel_without_a_policy_has_none(wire, mode):
    assert read(wire, mode) is None


MANY = [f"10.{n // 256}.{n % 256}.0/24" for n in range(MOST_NETWORKS + 1)]
MANY_USERS = [f"u{n}:{HASH}" for n in range(MOST_USERS + 1)]
SALT = "c2FsdHNhbHRzYWx0c2FsdA"
DIGEST = "A" * 43


@pytest.mark.parametrize(
    ("wire", "expected"),
    [
        ([], "a list came, expected an object"),
        ("x", "'x' came, expected an object"),
        (True, "a boolean came, expected an object"),
        (1, "1 came, expected an object"),
        ({"alow": []}, "unknown key 'alow', expected one of basic_auth, allow, deny, rate_limit"),
        ({"x" * 9999: 1}, "unknown key '" + "x" * 60 + "...'"),
        ({"a\nb\x1b": 1}, r"unknown key 'a\nb\x1b'"),
        ({"allow": []}, "allow: an empty list came, expected a list of addresses and networks"),
        ({"allow": "10.0.0.0/8"}, "allow: '10.0.0.0/8' came, expected a list"),
        ({"allow": None}, "allow: null came, expected a list"),
        ({"allow": {}}, "allow: an object came, expected a list"),
        ({"allow": [1]}, "allow: [0]: a number out of range came, expected a text"),
        ({"allow": MANY}, "allow: 1001 addresses and networks came, expected at most 1000"),
        ({"deny": ["10.0.0.1/8"]}, "deny: '10.0.0.1/8' has host bits, expected 10.0.0.0/8 for"),
        ({"deny": ["2001:db8::1/32"]}, "has host bits, expected 2001:db8::/32 for the network"),
        ({"deny": [""]}, "deny: '' came, expected an IP address or a network such as"),
        ({"deny": ["10.0.0.0/33"]}, "'10.0.0.0/33' came, expected an IP address or a network"),
        ({"deny": ["10.0.0.0/255.0.0.0"]}, "'10.0.0.0/255.0.0.0' came, expected an IP address"),
        ({"deny": ["10.0.0.0/-1"]}, "came, expected an IP address or a network"),
        ({"deny": ["010.0.0.0/8"]}, "came, expected an IP address or a network"),
        ({"deny": ["10.0.0"]}, "'10.0.0' came, expected an IP address or a network"),
        ({"deny": ["fe80::1%eth0"]}, "'fe80::1%eth0' came, expected an IP address or a network"),
        ({"deny": ["app.example.com"]}, "'app.example.com' came, expected an IP address"),
        ({"deny": ["\u0661\u0660.0.0.0"]}, "came, expected an IP address or a network"),
        ({"deny": ["1" * 70000]}, "came, expected an IP address or a network"),
        ({"rate_limit": 10}, "rate_limit: 10 came, expected an object"),
        ({"rate_limit": {}}, "rate_limit: an empty object came, expected per_address, total or"),
        ({"rate_limit": {"rate": 1}}, "rate_limit: unknown key 'rate', expected one of per_add"),
        ({"rate_limit": {"per_address": "10"}}, "per_address: '10' came, expected requests a sec"),
        ({"rate_limit": {"per_address": True}}, "per_address: a boolean came, expected requests"),
        ({"rate_limit": {"per_address": None}}, "per_address: null came, expected requests"),
        ({"rate_limit": {"per_address": 0}}, "per_address: 0 came, expected requests a second"),
        ({"rate_limit": {"per_address": -0.0}}, "per_address: -0.0 came, expected requests"),
        ({"rate_limit": {"per_address": -1}}, "per_address: -1 came, expected requests a second"),
        ({"rate_limit": {"per_address": 1e-4}}, "a number from 1/3600 to 1000000"),
        ({"rate_limit": {"per_address": 1_000_001}}, "per_address: 1000001 came"),
        ({"rate_limit": {"per_address": float("nan")}}, "per_address: a number out of range came"),
        ({"rate_limit": {"per_address": float("inf")}}, "per_address: a number out of range came"),
        ({"rate_limit": {"per_address": json.loads("1e309")}}, "a number out of range came"),
        ({"rate_limit": {"per_address": 10**5000}}, "per_address: a number out of range came"),
        ({"rate_limit": {"total": 0}}, "total: 0 came, expected requests a second"),
        ({"rate_limit": {"burst": 5}}, "burst came without per_address, expected both or neither"),
        ({"rate_limit": {"per_address": 1, "total_burst": 5}}, "total_burst came without total"),
        ({"rate_limit": {"per_address": 1, "burst": 0}}, "burst: 0 came, expected a whole number"),
        ({"rate_limit": {"per_address": 1, "burst": 1.5}}, "burst: 1.5 came, expected a whole"),
        ({"rate_limit": {"per_address": 1, "burst": True}}, "burst: a boolean came, expected a"),
        ({"rate_limit": {"per_address": 1, "burst": 1_000_001}}, "from 1 to 1000000"),
        ({"basic_auth": []}, "basic_auth: an empty list came, expected a list of entries USER:"),
        ({"basic_auth": f"me:{HASH}"}, "basic_auth: "),
        ({"basic_auth": [PASSWORD]}, "basic_auth: [0]: no hash of the form $scrypt$ln=14"),
        ({"basic_auth": [None]}, "basic_auth: [0]: null came, expected a text"),
        ({"basic_auth": ["nocolon"]}, "basic_auth: [0]: expected USER:HASH"),
        ({"basic_auth": [f":{HASH}"]}, "basic_auth: [0]: expected USER:HASH"),
        ({"basic_auth": [f"a\0b:{HASH}"]}, "basic_auth: [0]: expected USER:HASH"),
        ({"basic_auth": [f"\ud800:{HASH}"]}, "basic_auth: [0]: expected USER:HASH"),
        ({"basic_auth": [f"{'x' * 256}:{HASH}"]}, "a user name of 1 to 255 bytes"),
        ({"basic_auth": [f"a:{HASH}", f"a:{HASH}"]}, "[1]: this user came before, expected each"),
        ({"basic_auth": MANY_USERS}, "101 entries USER:HASH came, expected at most 100"),
        ({"basic_auth": [f"a:{PASSWORD}"]}, "[0]: no hash of the form $scrypt$"),
        ({"basic_auth": [f"a:{HASH}="]}, "[0]: no hash of the form $scrypt$"),
        ({"basic_auth": [f"a:{HASH}\n"]}, "[0]: no hash of the form $scrypt$"),
        ({"basic_auth": [f"a:$scrypt$ln=17,r=8,p=1${SALT}${DIGEST}"]}, "ln=17,r=8,p=1 came"),
        ({"basic_auth": [f"a:$scrypt$ln=99,r=9999,p=9999${SALT}${DIGEST}"]}, "at most 524288"),
        ({"basic_auth": [f"a:$scrypt$ln=9,r=16,p=1${SALT}${DIGEST}"]}, "expected ln from 10 to"),
        ({"basic_auth": [f"a:$scrypt$ln=16,r=1,p=1${SALT}${DIGEST}"]}, "to below 16*r"),
        ({"basic_auth": [f"a:$scrypt$ln=10,r=1,p=1${SALT}${DIGEST}"]}, "1 to 64 MiB of memory"),
        ({"basic_auth": [f"a:$scrypt$ln=14,r=0,p=1${SALT}${DIGEST}"]}, "ln=14,r=0,p=1 came"),
        ({"basic_auth": [f"a:$scrypt$ln=14,r=8,p=0${SALT}${DIGEST}"]}, "ln=14,r=8,p=0 came"),
        ({"basic_auth": [f"a:$scrypt$ln=14,r=8,p=5${SALT}${DIGEST}"]}, "2^ln*r*p of at most"),
        ({"basic_auth": [f"a:$scrypt$ln=14,r=8,p=1$c2FsdA${DIGEST}"]}, "no hash of the form"),
        ({"basic_auth": [f"a:$scrypt$ln=14,r=8,p=1${SALT}$c2hvcnQ"]}, "no hash of the form"),
        ({"basic_auth": [f"a:$scrypt$ln=14,r=8,p=1${SALT}${'A' * 41}"]}, "incomplete base64"),
    ],
)  # fmt: skip
def test_what_cannot_be_followed_is_refused_and_shows_no_secret(wire, expected):
    with pytest.raises(PolicyError) as caught:
        read(wire, "http")
    text = str(caught.value)
    assert expected in text
    assert text.isprintable() and len(text) < 300
    assert not any(secret in text for secret in SECRETS)


def test_password_in_tcp_mode_is_refused():
    with pytest.raises(PolicyError, match="basic_auth: the tunnel's mode is 'tcp', expected http"):
        read({"basic_auth": [f"me:{HASH}"]}, "tcp")


def test_nothing_that_holds_a_secret_shows_it():
    wire = {"basic_auth": [f"me:{HASH}"]}
    for shown in (read(wire, "http"), Defaults.read(wire), Hash.read(HASH)):
        assert not any(secret in repr(shown) for secret in SECRETS)


# --- Defaults ------------------------------------------------------------------------------------


def test_default_counts_for_tunnels_that_do_not_say_it_themselves():
    defaults = Defaults.read({"allow": [HOME], "rate_limit": {"per_address": 1, "burst": 1}})
    assert outcome(read(None, "http", defaults).judge_request(ABROAD, None)) == NOT_ALLOWED
    own = read({"allow": [ABROAD]}, "http", defaults)
    assert comes_in(own.judge_request(ABROAD, None))
    assert outcome(own.judge_request(ABROAD, None)) == TOO_MANY
    assert outcome(own.judge_request(HOME, None)) == NOT_ALLOWED


def test_default_password_counts_in_http_mode_only():
    defaults = Defaults.read({"basic_auth": [f"me:{HASH}"]})
    assert outcome(read({}, "http", defaults).judge_request(HOME, None)) == ASKED
    assert read(None, "tcp", defaults) is None


# --- Addresses -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("allow", "deny", "address", "allowed"),
    [
        (["192.0.2.0/24"], None, "192.0.2.255", True),
        (["192.0.2.0/24"], None, "192.0.3.0", False),
        (["192.0.2.0/24"], None, "2001:db8::1", False),
        (["192.0.2.0/24"], None, "::ffff:192.0.2.9", True),  # mapped is IPv4
        (["::ffff:192.0.2.0/120"], None, "192.0.2.9", True),  # also where it is written down
        (["::ffff:192.0.2.1"], None, "192.0.2.1", True),
        (["2001:db8::/32"], None, "2001:db8:ffff::1", True),
        (["2001:db8::/32"], None, "2001:db9::1", False),
        (["2001:DB8:0::1"], None, "2001:db8::1", True),
        (["fe80::/10"], None, "fe80::1%eth0", True),
        (["0.0.0.0/0"], None, "192.0.2.1", True),
        (["0.0.0.0/0"], None, "2001:db8::1", False),
        (["0.0.0.0/0", "::/0"], None, "2001:db8::1", True),
        (["::/0"], None, "192.0.2.1", False),
        (["192.0.2.1/32", "10.0.0.0/8"], None, "10.255.0.1", True),
        (None, ["192.0.2.1"], "192.0.2.1", False),
        (None, ["192.0.2.1"], "192.0.2.2", True),
        (None, ["192.0.2.1"], "2001:db8::1", True),
        (["10.0.0.0/8"], ["10.1.0.0/16"], "10.1.2.3", False),  # deny first
        (["10.0.0.0/8"], ["10.1.0.0/16"], "10.2.2.3", True),
        (["10.1.0.0/16"], ["10.0.0.0/8"], "10.1.2.3", False),
        (["10.0.0.0/8"], ["11.0.0.0/8"], "12.0.0.1", False),
        (["0.0.0.0/0", "::/0"], None, "unknown", False),  # no address is on no list
        (None, ["10.0.0.0/8"], "", False),
    ],
)
def test_address_is_in_or_out(allow, deny, address, allowed):
    wire = {key: value for key, value in (("allow", allow), ("deny", deny)) if value}
    judge = read(wire, "http")
    expected = None if allowed else NOT_ALLOWED
    assert outcome(judge.judge_request(address, None)) == expected
    assert outcome(judge.judge_connection(address)) == expected


def test_set_of_networks_agrees_with_the_standard_library():
    chance = random.Random(8)

    def one_network():
        version, bits = chance.choice([(ipaddress.IPv4Network, 32), (ipaddress.IPv6Network, 128)])
        return version((chance.getrandbits(3) << bits - 3, chance.randint(0, 6)), strict=False)

    for _ in range(200):
        networks = [one_network() for _ in range(chance.randint(1, 4))]
        ours = Networks(networks)
        for _ in range(20):
            address = chance.choice([
                ipaddress.IPv4Address(chance.getrandbits(32)),
                ipaddress.IPv6Address(chance.getrandbits(128)),
            ])  # fmt: skip
            assert (address in ours) == any(address in network for network in networks)


def test_denial_says_whom_it_turns_away_in_a_bounded_text():
    denied = read({"allow": [HOME]}, "http").judge_request("x" * 9999, None)
    assert len(denied.reason) < 200


# --- Rates ---------------------------------------------------------------------------------------


def judge(limit, **more):
    clock = Clock()
    return clock, read({"rate_limit": limit, **more}, "http", now=clock)


def test_visitor_learns_when_to_come_again():
    clock, judged = judge({"per_address": 0.25, "burst": 2})
    assert comes_in(judged.judge_request(HOME, None))
    assert comes_in(judged.judge_request(HOME, None))
    denial = judged.judge_request(HOME, None)
    assert outcome(denial) == TOO_MANY
    assert fields(denial) == (("Retry-After", "4"),)
    assert "Try again in 4 seconds." in denial.reason
    assert comes_in(judged.judge_request(ABROAD, None))
    clock.now += 4
    assert comes_in(judged.judge_request(HOME, None))
    clock.now += 3.7
    assert fields(judged.judge_request(HOME, None)) == (("Retry-After", "1"),)


def test_connections_count_like_requests():
    _, judged = judge({"per_address": 1, "burst": 1})
    assert comes_in(judged.judge_connection(HOME))
    assert outcome(judged.judge_connection(HOME)) == TOO_MANY


def test_what_is_denied_takes_no_token_of_either_bucket():
    clock, judged = judge({"per_address": 1, "burst": 1, "total": 1, "total_burst": 3})
    assert comes_in(judged.judge_request("192.0.2.1", None))
    for _ in range(100):
        assert "from your address" in judged.judge_request("192.0.2.1", None).reason
    assert comes_in(judged.judge_request("192.0.2.2", None))
    assert comes_in(judged.judge_request("192.0.2.3", None))
    assert "from all visitors together" in judged.judge_request("192.0.2.4", None).reason
    clock.now += 1
    assert comes_in(judged.judge_request("192.0.2.4", None))


def test_who_is_not_allowed_takes_no_token():
    _, judged = judge({"total": 1, "total_burst": 1}, deny=[ABROAD])
    assert outcome(judged.judge_request(ABROAD, None)) == NOT_ALLOWED
    assert comes_in(judged.judge_request(HOME, None))


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ("2001:db8::1", "2001:db8::ffff:1", True),  # one subscriber
        ("2001:db8::1", "2001:db8:0:1::1", False),
        ("192.0.2.1", "::ffff:192.0.2.1", True),
        ("192.0.2.1", "192.0.2.2", False),
        ("0.0.0.1", "::1", False),
    ],
)
def test_what_a_visitor_is_counted_by(one, other, same):
    _, judged = judge({"per_address": 1, "burst": 1})
    assert comes_in(judged.judge_request(one, None))
    assert comes_in(judged.judge_request(other, None)) != same


@pytest.mark.parametrize(("rate", "burst"), [(10, 100), (0.1, 1), (0.11, 2), (1 / 3600, 1)])
def test_burst_is_by_default_what_ten_seconds_give(rate, burst):
    _, judged = judge({"per_address": rate})
    outcomes = [outcome(judged.judge_request(HOME, None)) for _ in range(burst + 1)]
    assert outcomes == [None] * burst + [TOO_MANY]


def test_threads_share_a_bucket():
    _, judged = judge({"per_address": 0.001, "burst": 1000})

    def visit(_):
        return sum(comes_in(judged.judge_request(HOME, None)) for _ in range(500))

    with ThreadPoolExecutor(4) as pool:
        assert sum(pool.map(visit, range(4))) == 1000


# --- Passwords -----------------------------------------------------------------------------------


def test_hash_that_another_program_made_is_understood():
    # passlib.hash.scrypt.using(rounds=10, salt=b"saltsaltsaltsalt").hash("correct horse: battery")
    hashed = "$scrypt$ln=10,r=8,p=1$c2FsdHNhbHRzYWx0c2FsdA$" + HASH.rpartition("$")[2]
    assert hashed == HASH
    assert comes_in(read({"basic_auth": [f"me:{hashed}"]}, "http").judge_request(HOME, basic("me")))


@pytest.fixture
def computed(monkeypatch):
    """The passwords that scrypt was computed of."""
    passwords, compute = [], Hash.compute

    def counted(self, password):
        passwords.append(password)
        return compute(self, password)

    monkeypatch.setattr(Hash, "compute", counted)
    return passwords


def guarded(clock=None, users=("me",)):
    wire = {"basic_auth": [f"{user}:{HASH}" for user in users]}
    return read(wire, "http", now=clock or Clock())


def encoded(content):
    return "Basic " + base64.b64encode(content).decode()


@pytest.mark.parametrize(
    "authorization",
    [
        basic("me"),
        basic("me").replace("Basic", "bASIC"),
        basic("me").replace(" ", "   "),
        basic("me") + " ",
        basic("\u00e9\u4e16"),
    ],
)
def test_right_password(authorization):
    assert comes_in(guarded(users=("me", "\u00e9\u4e16")).judge_request(HOME, authorization))


@pytest.mark.parametrize(
    "authorization",
    [
        "",
        "Basic",
        "Basic ",
        "Basic =",
        "Basic !!!!",
        "Basic bWU",  # not padded
        "Basic bWU==",
        basic("me")[:-1],
        basic("me").replace("Basic ", "Basic\t"),
        basic("me").replace("Basic", "Bearer"),
        basic("me").removeprefix("Basic "),
        basic("me") + ", " + basic("me"),
        basic("me") + " x",
        basic("me") + "\n",
        "\u00e9" * 20,
        "Basic \u0660\u0661",
        "Basic " + "A" * 65536,
        "Basic " * 10000,
        "Digest username=me",
        encoded(b"me"),
        encoded(b""),
        encoded(f"me:{PASSWORD}\0".encode()),
        encoded(f"me\0:{PASSWORD}".encode()),
        encoded(b"m" * 256 + b":x"),
        encoded(b"m:" + b"x" * 1025),
    ],
)
def test_field_that_holds_no_password_is_refused_without_computing(authorization, computed):
    denial = guarded().judge_request(HOME, authorization)
    assert outcome(denial) == ASKED
    assert fields(denial) == (("WWW-Authenticate", 'Basic realm="gotunnel", charset="UTF-8"'),)
    assert computed == []


@pytest.mark.parametrize(
    "authorization",
    [
        basic("me", "wrong"),
        basic("me", ""),
        basic("", PASSWORD),
        basic("you"),
        basic("ME"),
        basic("me", PASSWORD + " "),
        encoded(b"\xff\xfe:\xff"),
        basic("me", HASH),  # the hash does not open
    ],
)
def test_wrong_password_and_unknown_user_cost_one_computation_and_read_the_same(
    authorization, computed
):
    denial = guarded().judge_request(HOME, authorization)
    assert denial == guarded().judge_request(HOME, basic("me", "also wrong"))
    assert outcome(denial) == ASKED
    assert len(computed) == 2


def test_first_visit_is_asked_for_a_password_and_counts_as_no_failure(computed):
    judged = guarded()
    for _ in range(1000):
        assert outcome(judged.judge_request(HOME, None)) == ASKED
    assert comes_in(judged.judge_request(HOME, basic("me")))


def test_page_with_a_hundred_files_costs_one_computation(computed):
    judged = guarded()
    for _ in range(100):
        assert comes_in(judged.judge_request(HOME, basic("me")))
    assert computed == [PASSWORD.encode()]
    assert outcome(judged.judge_request(HOME, basic("me", "wrong"))) == ASKED
    assert not any(secret in repr(vars(passwords(judged))) for secret in SECRETS)


def test_password_of_one_user_is_not_that_of_another(computed):
    wire = {"basic_auth": [f"a:{cheap('one')}", f"b:{cheap('two')}"]}
    judged = read(wire, "http")
    assert comes_in(judged.judge_request(HOME, basic("a", "one")))
    assert comes_in(judged.judge_request(HOME, basic("b", "two")))
    assert outcome(judged.judge_request(HOME, basic("b", "one"))) == ASKED
    assert outcome(judged.judge_request(HOME, basic("a", "two"))) == ASKED


def test_unknown_user_always_costs_the_same(monkeypatch):
    """Hashes may differ in cost, so for one unknown user always the same one is computed."""
    costs = []
    monkeypatch.setattr(Hash, "compute", lambda self, password: costs.append(self.r) or b"")
    hashes = [str(Hash(10, r, 1, b"x" * 16, bytes(32))) for r in (8, 9, 10, 11)]
    judged = read({"basic_auth": [f"u{n}:{text}" for n, text in enumerate(hashes)]}, "http")
    for stranger in range(20):
        costs.clear()
        for address in range(3):
            judged.judge_request(f"192.0.{stranger}.{address}", basic(f"stranger {stranger}", "x"))
        assert len(costs) == 3 and len(set(costs)) == 1


def test_failures_are_bounded_by_address_before_anything_is_computed(computed):
    clock = Clock()
    judged = guarded(clock)
    outcomes = [
        outcome(judged.judge_request(HOME, basic("me", f"guess {n}"))) for n in range(50)
    ]  # fmt: skip
    assert outcomes == [ASKED] * basic_auth.FAILURES + [TOO_MANY] * (50 - basic_auth.FAILURES)
    assert len(computed) == basic_auth.FAILURES
    denial = judged.judge_request(HOME, basic("me"))  # the right password is locked, too
    assert outcome(denial) == TOO_MANY
    assert fields(denial) == (("Retry-After", "10"),)
    assert comes_in(judged.judge_request(ABROAD, basic("me")))  # not from elsewhere
    assert outcome(judged.judge_request(HOME, basic("me"))) == TOO_MANY  # that unlocks nothing here
    clock.now += 10
    assert outcome(judged.judge_request(HOME, basic("me", "wrong"))) == ASKED
    assert outcome(judged.judge_request(HOME, basic("me", "wrong too"))) == TOO_MANY


def test_who_has_come_in_stays_in_though_others_of_that_address_guess(computed):
    """Up to GUESSES: a guess that hits the remembered password would be let in."""
    clock = Clock()
    judged = guarded(clock)
    assert comes_in(judged.judge_request(HOME, basic("me")))
    for n in range(basic_auth.FAILURES + basic_auth.GUESSES):
        assert comes_in(judged.judge_request(HOME, basic("me")))
        assert not comes_in(judged.judge_request(HOME, basic("me", f"guess {n}")))
    assert outcome(judged.judge_request(HOME, basic("me"))) == TOO_MANY
    assert len(computed) == 1 + basic_auth.FAILURES
    clock.now += 1 / basic_auth.GUESSES_A_SECOND
    assert comes_in(judged.judge_request(HOME, basic("me")))


def test_an_old_password_that_a_program_repeats_locks_nobody_out(computed):
    judged = guarded()
    for _ in range(100):
        assert outcome(judged.judge_request(HOME, basic("me", "the old one"))) == ASKED
    assert comes_in(judged.judge_request(HOME, basic("me")))
    assert len(computed) == 2


def test_what_is_remembered_is_bounded(monkeypatch):
    monkeypatch.setattr(basic_auth, "MOST_REMEMBERED", 5)
    monkeypatch.setattr(Hash, "compute", lambda self, password: self.digest * (password == b"yes"))
    judged = guarded()
    for n in range(20):
        judged.judge_request(f"192.0.2.{n}", basic("me", "no"))
        assert comes_in(judged.judge_request(f"192.0.2.{n}", basic("me", "yes")))
    assert len(passwords(judged)._right) == len(passwords(judged)._wrong) == 5


def test_a_tunnel_under_attack_leaves_the_others_their_part(monkeypatch):
    slow = Slow(monkeypatch)
    attacked, other = guarded(), guarded()
    count = basic_auth.COMPUTED_AT_ONCE + basic_auth.WAITING_TO_COMPUTE // 3
    with ThreadPoolExecutor(count + 1) as pool:
        guesses = [
            pool.submit(attacked.judge_request, f"198.51.100.{n}", basic("me", f"guess {n}"))
            for n in range(count)
        ]
        wait_until(lambda: waiting_to_compute() == basic_auth.WAITING_TO_COMPUTE // 3)
        assert outcome(attacked.judge_request(HOME, basic("me"))) == BUSY
        verdict = pool.submit(other.judge_request, HOME, basic("me"))
        wait_until(lambda: waiting_to_compute() > basic_auth.WAITING_TO_COMPUTE // 3)
        slow.may_end.set()
        assert comes_in(verdict.result())
        assert {outcome(guess.result()) for guess in guesses} == {ASKED}


def waiting_to_compute() -> int:
    return basic_auth.WAITING_TO_COMPUTE - basic_auth._gate._places


def test_a_login_waits_for_no_more_than_one_guess_of_each_other_tunnel(monkeypatch):
    """And for one guess of each other address at its own tunnel."""
    monkeypatch.setattr(basic_auth, "_gate", Gate(1, basic_auth.WAITING_TO_COMPUTE))
    computed, may_end, compute = [], threading.Semaphore(0), Hash.compute

    def slow(hashed, password):
        computed.append(password.decode())
        assert may_end.acquire(timeout=10)
        return compute(hashed, password)

    monkeypatch.setattr(Hash, "compute", slow)
    attacked, other = guarded(), guarded()
    coming = [
        (attacked, ABROAD, "guess 0"), (attacked, ABROAD, "guess 1"), (attacked, ABROAD, "guess 2"),
        (attacked, ABROAD, "guess 3"), (attacked, HOME, "at home"), (other, HOME, "elsewhere"),
    ]  # fmt: skip
    with ThreadPoolExecutor(len(coming)) as pool:
        for count, (judged, address, password) in enumerate(coming):
            pool.submit(judged.judge_request, address, basic("me", password))
            wait_until(lambda count=count: len(computed) == 1 and waiting_to_compute() == count)
        for _ in coming:
            may_end.release()
    assert computed == ["guess 0", "guess 1", "elsewhere", "at home", "guess 2", "guess 3"]


def test_address_that_failed_too_often_is_told_so_though_no_place_is_left(computed, monkeypatch):
    judged = guarded()
    for n in range(basic_auth.FAILURES):
        judged.judge_request(HOME, basic("me", f"guess {n}"))
    monkeypatch.setattr(basic_auth, "_gate", Gate(0, 0))
    assert outcome(judged.judge_request(HOME, basic("me"))) == TOO_MANY
    assert outcome(judged.judge_request(ABROAD, basic("me"))) == BUSY


def test_success_is_no_failure(computed):
    judged = guarded(users=[f"u{n}" for n in range(50)])
    for n in range(50):
        assert comes_in(judged.judge_request(HOME, basic(f"u{n}")))


def test_rate_comes_before_the_password(computed):
    wire = {"basic_auth": [f"me:{HASH}"], "rate_limit": {"per_address": 1, "burst": 1}}
    judged = read(wire, "http", now=Clock())
    assert outcome(judged.judge_request(HOME, None)) == ASKED
    assert outcome(judged.judge_request(HOME, basic("me"))) == TOO_MANY
    assert computed == []


class Slow:
    """Stands in for scrypt: counts computations, and lets them end when a test says so."""

    def __init__(self, monkeypatch):
        self.begun, self.may_end = threading.Semaphore(0), threading.Event()
        self.running = self.most = self.count = 0
        self.lock = threading.Lock()
        compute = Hash.compute

        def slow(hashed, password):
            with self.lock:
                self.running += 1
                self.count += 1
                self.most = max(self.most, self.running)
            self.begun.release()
            assert self.may_end.wait(30)
            with self.lock:
                self.running -= 1
            return compute(hashed, password)

        monkeypatch.setattr(Hash, "compute", slow)


def test_connections_of_one_browser_share_a_computation(monkeypatch):
    slow, judged = Slow(monkeypatch), guarded()
    with ThreadPoolExecutor(20) as pool:
        verdicts = [pool.submit(judged.judge_request, HOME, basic("me")) for _ in range(20)]
        assert slow.begun.acquire(timeout=10)
        slow.may_end.set()
        assert all(comes_in(verdict.result()) for verdict in verdicts)
    assert slow.count == 1
    assert passwords(judged)._running == {}


def test_guesses_of_one_address_all_at_once_are_bounded_as_well(monkeypatch):
    room = 2 * basic_auth.FAILURES
    slow, judged = Slow(monkeypatch), guarded()
    gate = Gate(basic_auth.COMPUTED_AT_ONCE, 20 * room)  # room enough for one address
    monkeypatch.setattr(basic_auth, "_gate", gate)
    with ThreadPoolExecutor(room) as pool:
        verdicts = [
            pool.submit(judged.judge_request, HOME, basic("me", f"guess {n}")) for n in range(room)
        ]
        wait_until(lambda: gate._places == 20 * room - (room - basic_auth.COMPUTED_AT_ONCE))
        slow.may_end.set()
        outcomes = [outcome(verdict.result()) for verdict in verdicts]
    assert set(outcomes) == {ASKED, TOO_MANY}
    assert basic_auth.FAILURES <= slow.count < basic_auth.FAILURES + basic_auth.COMPUTED_AT_ONCE


def test_few_are_computed_at_once_few_wait_and_the_rest_is_sent_away(monkeypatch):
    slow = Slow(monkeypatch)
    tunnels = [guarded(), guarded()]  # the limit is for the whole process
    count = 2 * basic_auth.WAITING_TO_COMPUTE
    with ThreadPoolExecutor(count) as pool:
        verdicts = [
            pool.submit(tunnels[n % 2].judge_request, f"198.51.100.{n}", basic("me", f"guess {n}"))
            for n in range(count)
        ]

        def inside():
            return slow.running + waiting_to_compute()

        wait_until(lambda: sum(verdict.done() for verdict in verdicts) + inside() == count)
        room = inside()
        sent_away = [verdict.result() for verdict in verdicts if verdict.done()]
        slow.may_end.set()
        outcomes = [outcome(verdict.result()) for verdict in verdicts]
    assert room <= basic_auth.COMPUTED_AT_ONCE + basic_auth.WAITING_TO_COMPUTE
    assert [fields(denial) for denial in sent_away] == [(("Retry-After", "1"),)] * (count - room)
    assert outcomes.count(BUSY) == count - room
    assert outcomes.count(ASKED) == room
    assert slow.most == basic_auth.COMPUTED_AT_ONCE
    assert comes_in(tunnels[0].judge_request(HOME, basic("me")))  # all places were given back


def test_defect_while_computing_leaves_nobody_waiting(monkeypatch):
    judged = guarded()
    with monkeypatch.context() as broken:
        broken.setattr(Hash, "compute", lambda self, password: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            judged.judge_request(HOME, basic("me"))
    assert passwords(judged)._running == {}
    assert comes_in(judged.judge_request(HOME, basic("me")))


def test_failure_table_is_bounded(monkeypatch):
    monkeypatch.setattr(Hash, "compute", lambda self, password: b"")
    judged = guarded()
    for n in range(10_000):
        address = str(ipaddress.IPv4Address(n))
        assert outcome(judged.judge_request(address, basic("me", "wrong"))) == ASKED
    assert len(passwords(judged)._failures._full_at) <= MOST_KEYS
