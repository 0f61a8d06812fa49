"""What a register message asks for, by values: the protocols of targets. The rest is tested where
agents register (test_tunnel.py, test_scopes.py)."""

import pytest

from gotunnel import HTTP2, Register
from gotunnel_server.agents.registration import NotGranted, Terms, read_routes
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
    (wanted,) = read_routes(message, Anybody(), terms).values()
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
