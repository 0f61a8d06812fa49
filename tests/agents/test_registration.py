"""What a register message asks for, by values: the protocols of targets, open names, and what one
bad hostname does to the others. The rest is tested where agents register (test_tunnel.py,
test_scopes.py, test_partial.py)."""

import pytest

from gotunnel import HOST_HEADER, HTTP2, NAMES, PARTIAL, VISITOR_ADDRESS, Register
from gotunnel_agent.common.hostnames import MAX_LABEL
from gotunnel_server.agents.identity import Identity
from gotunnel_server.agents.registration import (
    MOST_REASONS,
    MOST_TARGET,
    NotGranted,
    Terms,
    read_routes,
)
from gotunnel_server.routes import H2, H2C

APP, OTHER = "app.example.com", "other.example.com"


class Anybody:
    """An Identity that may claim everything."""

    def why_not(self, hostname):
        return ""


def protocol_of(asked=None, *, hostname=APP, mode="http", features=(HTTP2,), **terms):
    message = Register(
        "t", {hostname: "127.0.0.1:1"}, {hostname: mode}, features,
        protocols={} if asked is None else {hostname: asked},
    )  # fmt: skip
    terms = Terms(1, lambda policy, mode: None, **{"speaks_http2": True} | terms)
    (wanted,) = read_routes(message, Anybody(), terms).routes.values()
    assert wanted.route(None).protocol == wanted.protocol
    return wanted.protocol


@pytest.mark.parametrize("asked", [H2C, H2])
def test_agent_says_what_its_target_speaks(asked):
    assert protocol_of(asked) == asked
    assert protocol_of() == ""
    assert protocol_of(asked, features=()) == ""  # it would not know that it is granted


@pytest.mark.parametrize("pattern", [APP, "*.example.com"])
def test_gateway_says_it_for_agents_that_cannot(pattern):
    hosts = {"h2c_hosts": ("x.example.org", pattern)}
    assert protocol_of(features=(), **hosts) == protocol_of(hostname="APP.example.com:1", **hosts)
    assert protocol_of(features=(), **hosts) == H2C
    assert protocol_of(H2, **hosts) == H2
    assert protocol_of(mode="tcp", **hosts) == ""
    assert protocol_of(hostname="example.com", **hosts) == ""


@pytest.mark.parametrize(
    ("how", "reason"),
    [
        ({"asked": "h3\n"}, f"unknown protocol of {APP}: h3\\n"),
        ({"asked": H2C, "mode": "tcp"}, f"a protocol of {APP}, which has mode tcp"),
        (
            {"asked": H2C, "speaks_http2": False},
            f"{APP} has protocol h2c, and this gateway lacks the Python package h2: its operator "
            "can install it (pip install h2)",
        ),
    ],
)
def test_registration_that_cannot_be_served_is_refused(how, reason):
    with pytest.raises(NotGranted) as refused:
        protocol_of(**how)
    assert str(refused.value) == reason


DEV = "*.dev.example.com"
HOLDER = Identity("office", (APP, DEV, "*.qa.example.com"))
NO_WILDCARD = "the credential has no wildcard"
LONGEST = "a" * MAX_LABEL
FAR = "*." + ".".join([LONGEST] * 3) + ".com"


def asked(*names, identity=HOLDER, features=(NAMES, PARTIAL), most=64, modes=None, **more):
    def read_policy(policy, mode):
        if policy == "bad":
            raise ValueError("bad came")
        return policy

    message = Register("t", dict.fromkeys(names, "127.0.0.1:1"), modes or {}, features, **more)
    return read_routes(message, identity, Terms(most, read_policy))


def hostnames(*names, **how):
    """The hostname that each name gets, or the reason for none."""
    found = asked(*names, **how)
    return found.denied | {wanted.name: wanted.hostname for wanted in found.routes.values()}


def test_an_open_name_is_completed_by_the_first_wildcard():
    found = asked("quick-otter.*", "Other.*", APP)
    assert list(found.routes) == [APP, "other.dev.example.com", "quick-otter.dev.example.com"]
    assert hostnames("Other.*") == {"Other.*": "other.dev.example.com"}
    assert found.denied == {}


@pytest.mark.parametrize(
    ("hosts", "may"), [(None, "any hostname"), ((), "none"), ((APP,), APP)]
)  # fmt: skip
def test_an_open_name_needs_a_wildcard(hosts, may):
    words = rf"^not allowed: a\.\*: {NO_WILDCARD}.* may claim {may}; .* agents add NAME"
    with pytest.raises(NotGranted, match=words):
        asked("a.*", identity=Identity("office", hosts), features=(NAMES,))


@pytest.mark.parametrize(
    "name",
    [
        "a.b.*", ".*", "*.*", "*", "-a.*", "a_b.*", "a\x1b[31m.*", "a\n.*", f"{LONGEST}a.*", "a.*.",
        "a.*:80", "xn--a-ecp.*", "a.*.b",
    ],
)  # fmt: skip
def test_no_other_star_is_completed(name):
    with pytest.raises(NotGranted, match="^invalid hostname: ") as refused:
        asked(name)
    assert str(refused.value).isprintable()


def test_a_hostname_that_gets_too_long_is_invalid():
    with pytest.raises(NotGranted, match="^invalid hostname: "):
        asked(f"{LONGEST}.*", identity=Identity("office", (FAR,)))
    assert len(hostnames("a.*", identity=Identity("office", (FAR,)))["a.*"]) < 253


def test_an_agent_that_does_not_know_open_names_has_none():
    with pytest.raises(NotGranted, match=r"^invalid hostname: a\.\*"):
        asked("a.*", features=())


def test_what_is_said_of_an_open_name_holds_for_its_hostname():
    found = asked(
        "a.*", APP, features=(NAMES, HOST_HEADER, VISITOR_ADDRESS), modes={"a.*": "tcp"},
        host_headers={"a.*": "intranet"}, addressed=("a.*",), policies={"a.*": "good"},
    )  # fmt: skip
    wanted = found.routes["a.dev.example.com"]
    assert wanted[:5] == ("a.*", "a.dev.example.com", "tcp", "intranet", True)
    assert wanted.policy == "good"
    assert found.routes[APP].policy is None


@pytest.mark.parametrize(
    ("names", "denied"),
    [
        (("a.*", "a.dev.example.com"), "a.*"),
        (("a.*", "A.*"), "A.*"),
        (("very-long-label-of-a-name.*", "very-long-label-of-a-name.dev.example.com:1"),
         "very-long-label-of-a-name.*"),
    ],
)  # fmt: skip
def test_two_names_for_one_hostname_are_one_too_many(names, denied):
    found = asked(*names)
    assert list(found.denied) == [denied] and len(found.routes) == 1
    assert found.denied[denied].startswith("host already registered: ")


@pytest.mark.parametrize(
    ("name", "how", "reason"),
    [
        ("bad_name.example.com", {}, "invalid hostname: bad_name.example.com"),
        ("bad_name.example.com", {"policies": {"bad_name.example.com": "x"}}, "invalid hostname: "),
        (OTHER, {}, f"not allowed: {OTHER}: this credential may claim {APP}, {DEV}"),
        ("b.dev.example.com", {"modes": {"b.dev.example.com": "udp"}}, "unknown mode of b."),
        ("b.dev.example.com", {"policies": {"b.dev.example.com": "bad"}}, "invalid policy of b."),
        ("b.*", {"policies": {"b.*": "bad"}}, r"invalid policy of b.*: bad came"),
        (
            "b.dev.example.com",
            {"host_headers": {"b.dev.example.com": "a b"}},
            "invalid host_header",
        ),
        ("b.dev.example.com", {"protocols": {"b.dev.example.com": "h9"}}, "unknown protocol of b."),
        ("a.b.*", {"policies": {"a.b.*": "x"}}, "invalid hostname: a.b.*"),
    ],
)
def test_one_bad_hostname_is_refused_alone(name, how, reason):
    features = (NAMES, HOST_HEADER, HTTP2)
    found = asked(APP, name, features=(*features, PARTIAL), **how)
    assert list(found.routes) == [APP] and list(found.denied) == [name]
    assert found.denied[name].startswith(reason)
    with pytest.raises(NotGranted) as refused:
        asked(APP, name, features=features, **how)
    assert str(refused.value).startswith(reason) and not refused.value.denied


def test_no_other_spelling_is_served_without_the_policy():
    bad = {"policies": {"b.dev.example.com": "bad"}}
    found = asked(APP, "b.dev.example.com", "B.dev.example.com:1", **bad)
    assert list(found.routes) == [APP] and len(found.denied) == 2
    found = asked(
        "b.dev.example.com", "B.dev.example.com:1",
        modes={"b.dev.example.com": "udp"}, policies={"b.dev.example.com": "good"},
    )  # fmt: skip
    assert found.routes["b.dev.example.com"].policy == "good"


def test_what_is_wrong_with_the_message_refuses_it_whole():
    for how in (
        {"policies": {OTHER: "x"}}, {"policies": {APP: None}}, {"instance": "x" * 65}, {"most": 1},
    ):  # fmt: skip
        with pytest.raises(NotGranted) as refused:
            asked(APP, "b.dev.example.com", **how)
        assert not refused.value.denied


def test_a_registration_without_any_good_hostname_says_why_for_each():
    names = [f"bad_{number}.example.com" for number in range(64)]
    with pytest.raises(NotGranted) as refused:
        asked(*names)
    assert list(refused.value.denied) == sorted(names, key=len)
    assert str(refused.value).count("invalid hostname: ") == MOST_REASONS
    assert str(refused.value).endswith(f"; and {64 - MOST_REASONS} more")


def test_the_target_is_what_the_agent_says_and_not_longer_than_it_needs():
    message = Register("t", {APP: "127.0.0.1:1", OTHER: "\x1b[2J" + 999 * "x"}, {})
    routes = read_routes(message, Anybody(), Terms(2, lambda policy, mode: None)).routes
    assert routes[APP].route(None).target == "127.0.0.1:1"
    assert routes[OTHER].route(None).target == "\x1b[2J" + (MOST_TARGET - 4) * "x"
