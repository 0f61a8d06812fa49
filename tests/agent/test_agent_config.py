"""The agent's configuration: what each key means, and the error line for each bad value."""

import os
import re
from pathlib import Path

import pytest

from gotunnel import HOST_HEADER, HTTP2
from gotunnel_agent.config import (
    HEALTH_KEYS,
    INSPECT_BODY,
    INSPECT_KEYS,
    KEYS,
    LEAST_BODIES,
    TUNNEL_KEYS,
    Config,
    ConfigError,
    Inspect,
    Target,
    Tunnel,
    load,
    tunnel_of,
)
from gotunnel_server.visitors.policy import read

EXAMPLE = Path(__file__).parent.parent.parent / "conf" / "agent.yaml"

SECRET = "correct-horse-battery-staple"
ADDR = 'tunnel_addr: "tunnel.example.com:9443"\n'
CREDENTIAL = f'jwt_secret: "{SECRET}"\n'
TUNNELS = """\
tunnels:
  - hostname: "app.example.com"
    target: "127.0.0.1:8080"
"""
MINIMAL = ADDR + CREDENTIAL + TUNNELS


@pytest.fixture(autouse=True)
def working_folder(tmp_path, monkeypatch):
    """Relative paths, as in the messages, lead into a folder of this test."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def loaded(text):
    Path("agent.yaml").write_text(text, encoding="utf-8")
    return load("agent.yaml")


def refusal(content):
    """The one line that refuses a file with this text or these bytes, without the path."""
    Path("agent.yaml").write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ConfigError) as caught:
        load("agent.yaml")
    path, _, message = str(caught.value).partition(": ")
    assert path == "agent.yaml"
    assert "\n" not in message
    assert SECRET not in message
    return message


def tunnel(**keys):
    """A configuration whose one tunnel has these keys."""
    lines = "".join(f"    {key}: {text}\n" for key, text in keys.items())
    return f"{ADDR}{CREDENTIAL}tunnels:\n  -\n{lines}"


# --- What a file means --------------------------------------------------------------------------


def test_defaults():
    assert loaded(MINIMAL) == Config(
        tunnel_host="tunnel.example.com",
        tunnel_port=9443,
        skip_tls_verify=False,
        ca_file=None,
        jwt_secret=SECRET,
        token="",
        jwt_issuer="",
        jwt_expire_sec=3600,
        stall_timeout=300,
        drain_timeout=5,
        log_level="info",
        log_format="text",
        metrics_port=None,
        metrics_bind=("127.0.0.1",),
        status_socket="",
        tunnels=(Tunnel("app.example.com", Target("127.0.0.1", 8080), "http"),),
        secret_files=("agent.yaml",),
    )


def test_a_tunnel_of_a_program_has_the_keys_of_one_in_a_file():
    item = {"hostname": "app.example.com", "target": "127.0.0.1:8080", "mode": "tcp", "port": "22"}
    target = Target("127.0.0.1", 8080)
    assert tunnel_of(item) == Tunnel("app.example.com", target, "tcp", port="22")
    for faulty, text in (
        ({"port": "0"}, "^port: '0' came"),
        ({"prot": "1"}, "^unknown key 'prot'"),
    ):
        with pytest.raises(ConfigError, match=text):
            tunnel_of(item | faulty)


def test_every_key_that_stands_beside_the_others():
    Path("ca.pem").write_text("")
    assert loaded(
        """
        tunnel_addr: "[2001:db8::1]:443"
        ca_file: ca.pem
        token: a.b.c
        jwt_issuer: mytunnel
        jwt_expire_sec: 60
        stall_timeout: 3600
        drain_timeout: 0.5
        log_level: DEBUG
        log_format: json
        metrics_port: 9465
        metrics_bind: "127.0.0.1, ::1"
        status_socket: /run/office.sock
        tunnels:
          - {hostname: App.Example.com., target: web_1:80}
          - {hostname: ssh.example.com, target: "[::1]:22", mode: TCP}
        """
    ) == Config(
        tunnel_host="2001:db8::1",
        tunnel_port=443,
        skip_tls_verify=False,
        ca_file="ca.pem",
        jwt_secret="",
        token="a.b.c",
        jwt_issuer="mytunnel",
        jwt_expire_sec=60,
        stall_timeout=3600,
        drain_timeout=0.5,
        log_level="debug",
        log_format="json",
        metrics_port=9465,
        metrics_bind=("127.0.0.1", "::1"),
        status_socket="/run/office.sock",
        tunnels=(
            Tunnel("app.example.com", Target("web_1", 80), "http"),
            Tunnel("ssh.example.com", Target("::1", 22), "tcp"),
        ),
        secret_files=("agent.yaml",),
    )


def test_routes_and_modes_are_those_of_the_register_message():
    config = loaded(MINIMAL + "  - {hostname: SSH.example.com, target: '[::1]:22', mode: tcp}\n")
    assert config.routes() == {"app.example.com": "127.0.0.1:8080", "ssh.example.com": "[::1]:22"}
    assert config.modes() == {"app.example.com": "http", "ssh.example.com": "tcp"}


def test_config_is_frozen():
    with pytest.raises(AttributeError):
        loaded(MINIMAL).tunnel_port = 1


@pytest.mark.parametrize("key", ["jwt_secret", "token"])
def test_repr_holds_no_credential(key):
    assert SECRET not in repr(loaded(f"{ADDR}{key}: {SECRET}\n{TUNNELS}"))


@pytest.mark.parametrize("typed", ["012345678901234567", "2024-13-45", "1e5", "yes", "'null'"])
def test_secret_is_the_text_that_was_typed(typed):
    assert loaded(f"{ADDR}jwt_secret: {typed}\n{TUNNELS}").jwt_secret == typed.strip("'")


@pytest.mark.parametrize(
    ("typed", "value"),
    [("true", True), ("yes", True), ("On", True), ("False", False), ("no", False), ("off", False)],
)
def test_booleans_of_yaml(typed, value):
    assert loaded(f"{MINIMAL}skip_tls_verify: {typed}\n").skip_tls_verify is value


def test_ca_file_stands_beside_a_skip_tls_verify_that_is_false():
    Path("ca.pem").write_text("")
    assert loaded(f"{MINIMAL}skip_tls_verify: false\nca_file: ca.pem\n").ca_file == "ca.pem"


def test_byte_order_mark_and_anchors_are_taken():
    assert (
        loaded(
            "\ufeff"
            + ADDR
            + CREDENTIAL
            + TUNNELS.replace('"127', '&local "127')
            + ("  - {hostname: b.example.com, target: *local}\n")
        ).routes()["b.example.com"]
        == "127.0.0.1:8080"
    )


def test_tags_run_nothing():
    config = loaded(ADDR + "jwt_secret: !!python/object/apply:os.getcwd x\n" + TUNNELS)
    assert config.jwt_secret == "x"


# --- Credentials --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("key", "secret", "token"),
    [("jwt_secret_file", f" {SECRET} ", ""), ("token_file", "", f" {SECRET} ")],
)
@pytest.mark.parametrize("ending", ["", "\n", "\r\n"])
def test_credential_from_a_file_loses_only_its_line_ending(key, secret, token, ending):
    Path("credential").write_bytes(f" {SECRET} {ending}".encode())
    config = loaded(f"{ADDR}{key}: credential\n{TUNNELS}")
    assert (config.jwt_secret, config.token) == (secret, token)


@pytest.mark.parametrize("key", ["jwt_secret_file", "token_file", "basic_auth_file"])
def test_secret_where_its_file_was_to_be_named_is_not_shown(key):
    text = f"{ADDR}{key}: {SECRET}\n{TUNNELS}"
    if key == "basic_auth_file":
        text = with_policy(basic_auth_file=SECRET)
    message = refusal(text)  # refusal() checks that the message does not show SECRET
    assert f"{key}: (not shown: is this the secret itself?): cannot be read (No such" in message


@pytest.mark.parametrize("key", ["jwt_secret_file", "token_file"])
@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"", "{key}: no text came"),
        (b" \r\n", "{key}: no text came"),
        (b"\xff\xfet\0", "{key}: 'credential': byte 0 is not UTF-8, expected UTF-8 text"),
        (None, "{key}: 'credential': cannot be read (No such file or directory)"),
    ],
)
def test_bad_credential_file_is_refused(key, content, expected):
    if content is not None:
        Path("credential").write_bytes(content)
    message = refusal(f"{ADDR}{key}: credential\n{TUNNELS}")
    assert message.startswith(expected.format(key=key))


@pytest.mark.parametrize(
    ("lines", "expected"),
    [
        ("", "no credential came, expected exactly one of jwt_secret, jwt_secret_file, token"),
        (f"jwt_secret: {SECRET}\ntoken: {SECRET}\n", "jwt_secret and token came, expected exactly"),
        ("jwt_secret: x\njwt_secret_file: x\n", "jwt_secret and jwt_secret_file came, expected"),
        ('jwt_secret: ""\n', "jwt_secret: no text came, expected the gateway's JWT_SECRET"),
        ('token: "  "\n', "token: no text came, expected the gateway's JWT_SECRET or a token"),
        ("token:\n", "token: no value came, expected text"),
        ("jwt_secret: ~\n", "jwt_secret: no value came, expected text"),
        (f"jwt_secret: [{SECRET}]\n", "jwt_secret: a list came, expected text"),
        (f"jwt_secret: {{{SECRET}: 1}}\n", "jwt_secret: a mapping came, expected text"),
        (f'jwt_secret: "{SECRET}\\ud800"\n', "jwt_secret: no text came"),
    ],
)
def test_exactly_one_credential_is_expected(lines, expected):
    assert refusal(ADDR + lines + TUNNELS).startswith(expected)


# --- Keys and values ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (MINIMAL + "tunnel_adr: x\n", "unknown key 'tunnel_adr', did you mean 'tunnel_addr'?"),
        (MINIMAL + "zzz: x\n", f"unknown key 'zzz', expected one of {', '.join(KEYS)}"),
        (MINIMAL + "null: x\n", "unknown key 'null', expected one of"),
        (MINIMAL + "    mod: tcp\n", "tunnels[0]: unknown key 'mod', did you mean 'mode'?"),
        (MINIMAL + "    zzz: 1\n", "tunnels[0]: unknown key 'zzz', expected one of hostname, "),
    ],
)
def test_unknown_key_is_refused_with_the_nearest_known_one(text, expected):
    assert refusal(text).startswith(expected)


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("skip_tls_verify: maybe", "skip_tls_verify: 'maybe' came, expected true or false"),
        ("skip_tls_verify: 1", "skip_tls_verify: '1' came, expected true or false"),
        ("skip_tls_verify:", "skip_tls_verify: no value came, expected true or false"),
        (
            "ca_file: none.pem",
            "ca_file: 'none.pem' does not exist, expected a file that can be read; a",
        ),
        ("ca_file: .", "ca_file: '.' is a folder, expected a file that can be read"),
        ('ca_file: "a\\0b"', "ca_file: a line break or unprintable character came"),
        ("jwt_issuer: [a]", "jwt_issuer: a list came, expected text"),
        ("jwt_issuer: null", "jwt_issuer: no value came, expected text"),
        ("jwt_expire_sec: 59", "jwt_expire_sec: '59' came, expected seconds, a whole number from"),
        ("jwt_expire_sec: 31536001", "jwt_expire_sec: '31536001' came, expected seconds"),
        ("jwt_expire_sec: 3600.0", "jwt_expire_sec: '3600.0' came, expected seconds"),
        ("jwt_expire_sec: 1h", "jwt_expire_sec: '1h' came, expected seconds"),
        ("stall_timeout: 0", "stall_timeout: '0' came, expected seconds, a number from 1 to 8640"),
        ("stall_timeout: 0.9", "stall_timeout: '0.9' came, expected seconds, a number from 1 to"),
        ("stall_timeout: 86401", "stall_timeout: '86401' came, expected seconds, a number"),
        ("stall_timeout: 5m", "stall_timeout: '5m' came, expected seconds"),
        ("jwt_expire_sec: true", "jwt_expire_sec: 'true' came, expected seconds"),
        (f"jwt_expire_sec: {'9' * 5000}", "jwt_expire_sec: '999"),
        ("log_level: verbose", "log_level: 'verbose' came, expected one of debug, info, warning, "),
        ("metrics_port: 0", "metrics_port: '0' came, expected a port from 1 to 65535, or auto"),
        ("metrics_bind: here", "metrics_bind: 'here' came, expected IP addresses to listen on"),
        ("log_format: xml", "log_format: 'xml' came, expected one of text, json"),
        ("status_socket: []", "status_socket: a list came, expected the path of a unix socket, or"),
        (f"status_socket: {'x' * 108}", "status_socket: the path has 108 bytes, a unix socket's"),
        ("inspect: []", 'inspect: a list came, expected an address such as "127.0.0.1:4040", a '),
        ("inspect:", "inspect: no value came, expected an address"),
        (
            "inspect: 127.0.0.1",
            "inspect.listen: '127.0.0.1' has no port, expected \"ADDR",
        ),
        ("inspect: 0", "inspect.listen: '0' has no port from 1 to 65535, expected"),
        ("inspect: me.test:1", "inspect.listen: 'me.test:1' has a host that is no IP address, exp"),
        ("inspect: http://127.0.0.1:1", "inspect.listen: 'http://127.0.0.1:1' has a scheme or a"),
        (
            "inspect: 0.0.0.0:4040",
            "inspect.listen: '0.0.0.0' came, which other machines can reac",
        ),
        ("inspect: '[::]:4040'", "inspect.listen: '::' came, which other machines can reach, "),
        (
            "inspect: {listen: '10.0.0.1:1'}",
            "inspect.listen: '10.0.0.1' came, which other machines",
        ),
        ("inspect: {listen: 1, memry: 1}", "inspect: unknown key 'memry', did you mean 'memory'?"),
        ("inspect: {port: 1}", "inspect: unknown key 'port', expected one of listen, memory, body"),
        ("inspect: {memory: 1}", "inspect.memory: '1' came, expected bytes from 1048576 to"),
        ("inspect: {memory: much}", "inspect.memory: 'much' came, expected bytes from 1048576 to"),
        ("inspect: {body: 17MiB}", "inspect.body: '17MiB' came, expected bytes from 0 to 16777216"),
        ("inspect: {memory: 1MiB, body: 1MiB}", "inspect.body: 1048576 bytes came, expected at m"),
        ("inspect: {bodies: some}", "inspect.bodies: 'some' came, expected true or false"),
        ("inspect: {allow_remote: 1}", "inspect.allow_remote: '1' came, expected true or false"),
        ("log_level: {}", "log_level: a mapping came, expected one of debug, info, warning, error"),
    ],
)
def test_bad_value_of_an_optional_key(line, expected):
    assert refusal(f"{MINIMAL}{line}\n").startswith(expected)


@pytest.mark.parametrize(
    "text, expected",
    [
        ("off", None),
        ("on", Inspect()),
        ("4041", Inspect(port=4041)),
        ("127.0.0.2:4040", Inspect("127.0.0.2")),
        ("localhost:4040", Inspect("localhost")),
        ("'[::1]:4040'", Inspect("::1")),
        ("{}", Inspect()),
        ("{listen: 5000, memory: 1 GiB, body: 0}", Inspect(port=5000, memory=2**30, body=0)),
        ("{body: 1mb}", Inspect(body=2**20)),
        ("{memory: 100000000, bodies: false}", Inspect(memory=10**8, body=0)),
        ("{memory: 2MiB, body: 256KiB}", Inspect(memory=2**21, body=2**18)),
        (
            "{listen: '0.0.0.0:80', allow_remote: true}",
            Inspect("0.0.0.0", 80, allow_remote=True),
        ),
    ],
)
def test_the_inspector_has_an_address_or_a_mapping(text, expected):
    assert loaded(f"{MINIMAL}inspect: {text}\n").inspect == expected


def test_a_small_memory_of_the_inspector_makes_the_bodies_smaller():
    [least] = {loaded(f"{MINIMAL}inspect: {{memory: 1MiB}}\n").inspect.body}
    assert least == min(INSPECT_BODY, 2**20 // LEAST_BODIES)


def test_very_long_value_is_cut():
    assert len(refusal(f"{MINIMAL}log_level: {'x' * 100_000}\n")) < 400


def test_ca_file_together_with_skip_tls_verify_is_refused():
    Path("ca.pem").write_text("")
    assert refusal(f"{MINIMAL}skip_tls_verify: yes\nca_file: ca.pem\n") == (
        "ca_file and skip_tls_verify: true came, expected only one of them: remove "
        "skip_tls_verify to have the certificate checked"
    )


# Each is refused as a tunnel's target, and as tunnel_addr, with the same words.
BAD_ADDRESSES = [
    ("", "no value came"),
    ("[a, b]", "a list came"),
    ("localhost", "'localhost' has no port"),
    ("'localhost:'", "'localhost:' has no port"),
    ("'[::1]'", "'[::1]' has no port"),
    ("localhost:http", "'localhost:http' has no port from 1 to 65535"),
    ("localhost:0", "'localhost:0' has no port from 1 to 65535"),
    ("localhost:65536", "'localhost:65536' has no port from 1 to 65535"),
    ("localhost:-1", "'localhost:-1' has no port from 1 to 65535"),
    ("'::1:8080'", "'::1:8080' has an IPv6 address without brackets"),
    ("'[::g]:8080'", "'[::g]:8080' has no IPv6 address in its brackets"),
    ("'[localhost]:80'", "'[localhost]:80' has no IPv6 address in its brackets"),
    ("999.0.0.1:80", "'999.0.0.1:80' has a host that is neither a hostname nor an IP address"),
    ("'a b:80'", "'a b:80' has a host that is neither a hostname nor an IP address"),
    ("localhost:80/", "'localhost:80/' has a path"),
    ("/run/app.sock", "'/run/app.sock' has a path"),
]


@pytest.mark.parametrize(("address", "expected"), BAD_ADDRESSES)
def test_bad_target(address, expected):
    message = refusal(tunnel(hostname="app.example.com", target=address))
    assert message.startswith(f"tunnels[0].target: {expected}")
    assert ', expected "HOST:PORT", "https://HOST:PORT" or "unix:/PATH"' in message


@pytest.mark.parametrize(
    ("target", "expected"),
    [
        ("https://", "'https://' has no port"),
        ("https://localhost", "'https://localhost' has no port"),
        ("https://:443", "'https://:443' has no host"),
        ("https://localhost:443/app", "'https://localhost:443/app' has a path"),
        ("https://me@localhost:443", "'https://...@localhost:443' has a host that is neither"),
        ("https://https://a:1", "'https://https://a:1' has a scheme or a path"),
        ("ftp://localhost:21", "'ftp://localhost:21' has an unknown scheme"),
        ("://localhost:21", "'://localhost:21' has an unknown scheme"),
        ("'unix:'", "'unix:' has no absolute path"),
        ("unix:app.sock", "'unix:app.sock' has no absolute path"),
        (f"unix:/{'x' * 200}", f"'unix:/{'x' * 200}' has a path of more than 10"),
    ],
)
def test_bad_target_with_a_scheme(target, expected):
    message = refusal(tunnel(hostname="app.example.com", target=target))
    assert message.startswith(f"tunnels[0].target: {expected}")
    assert ', expected "HOST:PORT", "https://HOST:PORT" or "unix:/PATH"' in message


def test_unix_socket_is_refused_where_there_are_none(monkeypatch):
    monkeypatch.delattr("socket.AF_UNIX", raising=False)
    message = refusal(tunnel(hostname="app.example.com", target="unix:/run/app.sock"))
    assert message.startswith("tunnels[0].target: 'unix:/run/app.sock' is a unix socket, which ")


@pytest.mark.parametrize("mode", ["http", "tcp"])
@pytest.mark.parametrize(
    ("typed", "target", "text"),
    [
        ("http://localhost:80", Target("localhost", 80), "localhost:80"),
        ("HTTP://[::1]:80", Target("::1", 80), "[::1]:80"),
        ("https://web_1:443", Target("web_1", 443, tls=True), "https://web_1:443"),
        ("https://[::1]:443", Target("::1", 443, tls=True), "https://[::1]:443"),
        ("unix:/run/app.sock", Target(path="/run/app.sock"), "unix:/run/app.sock"),
        ("'unix:/run/my app'", Target(path="/run/my app"), "unix:/run/my app"),
    ],
)
def test_targets_of_all_kinds(mode, typed, target, text):
    config = loaded(tunnel(hostname="a.example", target=typed, mode=mode))
    assert config.tunnels[0].target == target
    assert config.routes() == {"a.example": text}


def test_trust_in_a_target_is_its_own():
    Path("ca.pem").write_text("")
    keys = {"hostname": "a.example", "target": "https://a:1"}
    (named,) = loaded(tunnel(**keys, target_ca_file="ca.pem")).tunnels
    assert named.target == Target("a", 1, tls=True, ca_file="ca.pem")
    config = loaded(tunnel(**keys, target_skip_tls_verify="yes"))
    assert config.tunnels[0].target == Target("a", 1, tls=True, skip_tls_verify=True)
    assert (config.ca_file, config.skip_tls_verify) == (None, False)


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        (
            {"target": "https://a:1", "target_ca_file": "none.pem"},
            "target_ca_file: 'none.pem' does not exist, expected a file that can be read",
        ),
        (
            {"target": "https://a:1", "target_skip_tls_verify": "maybe"},
            "target_skip_tls_verify: 'maybe' came, expected true or false",
        ),
        (
            {"target": "https://a:1", "target_ca_file": "x", "target_skip_tls_verify": "true"},
            "target_ca_file and target_skip_tls_verify: true came, expected only one of them",
        ),
        (
            {"target": "a:1", "target_ca_file": "x"},
            "target: 'a:1' has no TLS, but target_ca_file came",
        ),
        (
            {"target": "http://a:1", "target_skip_tls_verify": "false"},
            "target: 'http://a:1' has no TLS, but target_skip_tls_verify came",
        ),
        (
            {"target": "unix:/a", "target_ca_file": "x"},
            "target: 'unix:/a' has no TLS, but target_ca_file came",
        ),
        (
            {"target": "a:1", "host_header": "http://b"},
            "host_header: 'http://b' came, expected a hostname or an IP address, with or without a",
        ),
        ({"target": "a:1", "host_header": "b:0"}, "host_header: 'b:0' came, expected a hostname"),
        ({"target": "a:1", "host_header": ""}, "host_header: no value came, expected a hostname"),
        ({"target": "a:1", "host_header": "''"}, "host_header: '' came, expected a hostname"),
        (
            {"target": "a:1", "host_header": '"b\\r\\nX: y"'},
            "host_header: a line break or unprintable character came, expected a hostname",
        ),
        (
            {"target": "a:1", "host_header": "b", "mode": "tcp"},
            "host_header: the tunnel has mode tcp, expected mode http: change mode, or",
        ),
        (
            {"target": "a:1", "protocol": "h3"},
            "protocol: 'h3' came, expected one of http/1.1, h2c, h2",
        ),
        (
            {"target": "a:1", "protocol": "h2c", "mode": "tcp"},
            "protocol: the tunnel has mode tcp, expected mode http: change mode, or remove",
        ),
        (
            {"target": "a:1", "protocol": "h2"},
            "protocol: h2 came, which is with TLS, expected h2c for target a:1",
        ),
        (
            {"target": "https://a:1", "protocol": "H2C"},
            "protocol: h2c came, which is without TLS, expected h2 for target https://a:1",
        ),
    ],
)
def test_bad_keys_of_a_tunnel(keys, expected):
    message = refusal(tunnel(hostname="app.example.com", **keys))
    assert message.startswith(f"tunnels[0].{expected}")


def test_host_header_needs_a_gateway_that_knows_it():
    more = "  - {hostname: b.example.com, target: b:1, host_header: 'intranet:8080'}\n"
    config = loaded(MINIMAL + more)
    assert config.host_headers() == {"b.example.com": "intranet:8080"}
    assert [tunnel.needs for tunnel in config.tunnels] == [(), (HOST_HEADER,)]


def test_protocol_needs_a_gateway_that_knows_it_unless_it_is_the_usual_one():
    more = (
        "  - {hostname: b.example.com, target: 'https://b:1', protocol: H2}\n"
        "  - {hostname: c.example.com, target: 'unix:/c', protocol: h2c}\n"
        "  - {hostname: d.example.com, target: d:1, protocol: http/1.1}\n"
    )
    config = loaded(MINIMAL + more)
    assert config.protocols() == {"b.example.com": "h2", "c.example.com": "h2c"}
    assert [tunnel.needs for tunnel in config.tunnels] == [(), (HTTP2,), (HTTP2,), ()]


@pytest.mark.parametrize(
    ("address", "expected"),
    [
        *(bad for bad in BAD_ADDRESSES if not bad[0].startswith("[a")),  # here a list is no fault
        ("8080", "'8080' has no host"),
        ("':8080'", "':8080' has no host"),
    ],
)
def test_bad_tunnel_addr(address, expected):
    message = refusal(f"tunnel_addr: {address}\n{CREDENTIAL}{TUNNELS}")
    assert message.startswith(f"tunnel_addr: {expected}")
    assert ', expected "HOST:PORT" such as "tunnel.example.com:9443"' in message


def test_a_gateway_may_have_several_addresses():
    several = 'tunnel_addr: ["A.example.com:1", "[2001:db8::1]:443", c.example.com.:3]\n'
    config = loaded(several + CREDENTIAL + TUNNELS)
    assert (config.tunnel_host, config.tunnel_port) == ("a.example.com", 1)
    assert config.more_addrs == (("2001:db8::1", 443), ("c.example.com", 3))
    one = loaded("tunnel_addr: [tunnel.example.com:9443]\n" + CREDENTIAL + TUNNELS)
    assert one == loaded(MINIMAL)


@pytest.mark.parametrize(
    ("addresses", "expected"),
    [
        ("[]", 'tunnel_addr: an empty list came, expected "HOST:PORT", or a list of 1 to 16'),
        (str(["a:1"] * 17), 'tunnel_addr: a list of 17 came, expected "HOST:PORT", or a list'),
        ("[a.example:1, b]", "tunnel_addr[1]: 'b' has no port, expected \"HOST:PORT\" such as"),
        ("[a.example:1, [b]]", 'tunnel_addr[1]: a list came, expected "HOST:PORT" such as'),
        ("[a.example:1, {b: 1}]", "tunnel_addr[1]: a mapping came, expected"),
        ("[a.example:1, A.example.:1]", "tunnel_addr[1]: 'A.example.:1' comes twice"),
        ("{a: 1}", "tunnel_addr: a mapping came, expected"),
    ],
)
def test_a_bad_list_of_addresses(addresses, expected):
    assert expected in refusal(f"tunnel_addr: {addresses}\n{CREDENTIAL}{TUNNELS}")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (CREDENTIAL + TUNNELS, 'tunnel_addr: missing, expected "HOST:PORT"'),
        (ADDR + CREDENTIAL, "tunnels: no value came, expected a list with at least one tunnel"),
        (ADDR + CREDENTIAL + "tunnels:\n", "tunnels: no value came"),
        (ADDR + CREDENTIAL + "tunnels: []\n", "tunnels: an empty list came"),
        (ADDR + CREDENTIAL + "tunnels: {a: b}\n", "tunnels: a mapping came"),
        (MINIMAL + "  - app.example.com\n", "tunnels[1]: text came, expected a mapping with"),
        (MINIMAL + "  -\n", "tunnels[1]: no value came, expected a mapping with hostname and"),
        (tunnel(target="a:1"), "tunnels[0].hostname: missing, expected a hostname such as"),
        (tunnel(hostname="a.example"), 'tunnels[0].target: missing, expected "HOST:PORT"'),
        (
            MINIMAL + "  - {hostname: APP.example.com., target: b:1}\n",
            "tunnels[1].hostname: 'app.example.com' comes twice, expected each hostname once",
        ),
        (
            tunnel(hostname="a.example", target="b:1", mode="udp"),
            "tunnels[0].mode: 'udp' came, expected one of http, tcp",
        ),
    ],
)
def test_bad_tunnels(text, expected):
    assert refusal(text).startswith(expected)


@pytest.mark.parametrize(
    "hostname",
    [
        "https://app.example.com",
        "app.example.com:443",
        "'*.com'",
        "'*'",
        "'*.'",
        "'*.*.example.com'",
        "'a.*.example.com'",
        "'a*.example.com'",
        "'*.192.0.2.1'",
        "-app.example.com",
        "app..example.com",
        "app.example.com..",
        "192.0.2.1",
        "12345",
        "my_app.example.com",
        "straße.example",  # IDNA 2003 and IDNA 2008 differ
        "'*.straße.example.com'",
        "xn--.example",
        "bü cher.example",
        "''",
    ],
)
def test_bad_hostname(hostname):
    assert refusal(tunnel(hostname=hostname, target="a:1")).startswith(
        "tunnels[0].hostname: {!r} came".format(hostname.strip("'"))
    )


def test_hostname_in_another_script_and_wildcard_are_normalised():
    config = loaded(
        MINIMAL
        + "  - {hostname: BÜCHER.example., target: a:1}\n"
        + "  - {hostname: '*.Dev.example.com', target: a:1, mode: tcp}\n"
        + "  - {hostname: '*.bücher.example', target: a:1}\n"
        + "  - {hostname: 'Bücher.*', target: a:1}\n"
    )
    assert list(config.routes())[1:] == [
        "xn--bcher-kva.example", "*.dev.example.com", "*.xn--bcher-kva.example",
        "xn--bcher-kva.*",
    ]  # fmt: skip
    assert [tunnel.needs for tunnel in config.tunnels] == [
        (), (), ("wildcards",), ("wildcards",), ("names",),
    ]  # fmt: skip


def test_look_alikes_are_one_hostname():
    text = MINIMAL + "  - {hostname: ａｐｐ.example.com, target: a:1}\n"
    assert "tunnels[1].hostname: 'app.example.com' comes twice" in refusal(text)


# --- Access policies ----------------------------------------------------------------------------


def with_policy(**keys):
    return tunnel(hostname="a.example", target="b:1", **keys)


def test_tunnel_without_a_policy_sends_none():
    config = loaded(MINIMAL)
    assert config.policies() == {} and config.tunnels[0].needs == ()


def test_policy_as_the_register_message_names_it():
    config = loaded(
        with_policy(
            allow="[10.0.0.0/8, 2001:db8::/32]", deny="10.1.2.3",
            rate_limit="{per_address: 600/m, burst: 20}",
        )
        + "  - {hostname: b.example, target: b:1}\n"
        + "  - {hostname: c.example, target: b:1, mode: tcp, rate_limit: 5/s, deny: '::1'}\n"
    )  # fmt: skip
    assert config.policies() == {
        "a.example": {
            "allow": ["10.0.0.0/8", "2001:db8::/32"],
            "deny": ["10.1.2.3"],
            "rate_limit": {"per_address": 10.0, "burst": 20},
        },
        "c.example": {"deny": ["::1"], "rate_limit": {"per_address": 5.0}},
    }
    assert [tunnel.needs for tunnel in config.tunnels] == [("policies",), (), ("policies",)]


@pytest.mark.parametrize(
    ("typed", "users"),
    [
        (f"'me:{SECRET}'", ["me"]),
        (f"['me:{SECRET}', 'you:{SECRET}:x']", ["me", "you"]),
        (f"{{me: {SECRET}, you: 012}}", ["me", "you"]),
    ],
)
def test_password_leaves_the_configuration_as_a_hash_only(typed, users):
    config = loaded(with_policy(basic_auth=typed))
    entries = config.policies()["a.example"]["basic_auth"]
    assert [entry.partition(":")[0] for entry in entries] == users
    assert all(re.match(r"[a-z]+:\$scrypt\$ln=14,r=8,p=1\$", entry) for entry in entries)
    assert SECRET not in str(entries)
    assert SECRET not in repr(config) and "scrypt" not in repr(config)


def test_passwords_may_stand_in_a_file():
    Path("passwords").write_text(f"# ours\n\nme:{SECRET}\r\nyou: {SECRET}\n", encoding="utf-8-sig")
    config = loaded(with_policy(basic_auth_file="passwords"))
    entries = config.tunnels[0].policy.basic_auth
    assert [entry.partition(":")[0] for entry in entries] == ["me", "you"]


@pytest.mark.parametrize(
    ("credential", "keys", "files"),
    [
        (f"jwt_secret: {SECRET}", {}, ["agent.yaml"]),
        (f"token: {SECRET}", {}, ["agent.yaml"]),
        ("jwt_secret_file: secret", {}, ["secret"]),
        ("token_file: secret", {}, ["secret"]),
        ("token_file: secret", {"basic_auth": f"'me:{SECRET}'"}, ["agent.yaml", "secret"]),
        ("token_file: secret", {"basic_auth_file": "users"}, ["secret", "users"]),
    ],
)
def test_it_knows_the_files_that_it_read_secrets_from(credential, keys, files):
    Path("secret").write_text(SECRET)
    Path("users").write_text(f"me:{SECRET}")
    text = with_policy(**keys)
    assert CREDENTIAL in text
    config = loaded(text.replace(CREDENTIAL, f"{credential}\n"))
    assert list(config.secret_files) == files


@pytest.mark.parametrize("key", ["basic_auth", "basic_auth_file"])
def test_password_in_tcp_mode_is_refused(key):
    message = refusal(with_policy(mode="tcp", **{key: f"me:{SECRET}"}))
    assert message.startswith(
        f"tunnels[0].{key}: the tunnel has mode tcp, expected mode http: tcp "
    )
    assert "allow, deny or rate_limit" in message


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        ({"basic_auth": SECRET}, "basic_auth: [0]: a text without a colon came, expected USER:"),
        ({"basic_auth": ""}, "basic_auth: no value came, expected USER:PASSWORD"),
        ({"basic_auth": f"[{{me: {SECRET}}}]"}, "basic_auth: [0]: a mapping came, expected USER"),
        ({"basic_auth": "{me: }"}, "basic_auth: [0]: no value came, expected a password"),
        ({"basic_auth": "{}"}, "basic_auth: 0 users came, expected 1 to 100"),
        ({"basic_auth": f"me:{SECRET}", "basic_auth_file": "x"}, "basic_auth_file came, expected"),
        ({"basic_auth_file": "none"}, "basic_auth_file: 'none': cannot be read (No such file"),
        ({"basic_auth_file": "[x]"}, "basic_auth_file: a list came, expected the path of a file"),
        ({"basic_auth_file": "empty"}, "'empty': no user came, expected one USER:PASSWORD a line"),
        ({"basic_auth_file": "bad"}, "'bad': [1]: a text without a colon came, expected USER:"),
        ({"allow": "[]"}, "allow: an empty list came, expected an address or a network"),
        ({"allow": "10.0.0.1/8"}, "allow: '10.0.0.1/8' has host bits, expected 10.0.0.0/8"),
        ({"deny": "[10.0.0.0/8, localhost]"}, "deny: 'localhost' came, expected an IP address"),
        ({"rate_limit": "0"}, "rate_limit: per_address: '0' came, expected requests a second"),
        ({"rate_limit": "[1]"}, "rate_limit: a list came, expected requests a second"),
    ],
)
def test_bad_policy_is_refused(keys, expected):
    Path("empty").write_text("\n# nobody\n")
    Path("bad").write_text(f"me:{SECRET}\n{SECRET}\n")
    assert expected in refusal(with_policy(**keys))


def test_more_policy_than_fits_into_a_message_is_refused():
    networks = ", ".join(f"10.{n // 256}.{n % 256}.0/24" for n in range(1000))
    tunnels = "".join(
        f"  - {{hostname: {n}.example.com, target: a:1, allow: [{networks}]}}\n" for n in range(3)
    )
    message = refusal(f"{MINIMAL}{tunnels}")
    assert re.search(
        r"rate_limit: \d{5} bytes came in all tunnels together, expected at most", message
    )


# --- Files that are no configuration ------------------------------------------------------------


def test_missing_file_is_refused():
    with pytest.raises(ConfigError, match=r"^none\.yaml: cannot be read \(No such file or dir"):
        load("none.yaml")


def test_folder_is_refused(working_folder):
    with pytest.raises(ConfigError, match="this is a folder, expected a file$"):
        load(working_folder)


@pytest.mark.skipif(os.name == "nt" or os.geteuid() == 0, reason="this user may read everything")
def test_unreadable_file_is_refused():
    Path("agent.yaml").touch(mode=0)
    with pytest.raises(ConfigError, match="Permission denied"):
        load("agent.yaml")


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("", "the file is empty, expected tunnel_addr"),
        ("# only a comment\n", "the file is empty, expected tunnel_addr"),
        ("just text\n", "text came, expected a mapping of keys to values"),
        ("- a list\n", "a list came, expected a mapping of keys to values"),
        (b"jwt_secret: \xe4\n", "byte 12 is not UTF-8, expected UTF-8 text"),
        (b"#" * (1024 * 1024 + 1), "the file is too long, expected at most 1048576 bytes"),
        ("a: b: c\n", "line 1, column 5: not YAML, mapping values are not allowed here"),
        ("a: b\n\tc: d\n", "line 2, column 1: not YAML, while scanning for the next token, found "),
        ("a: 1\nb: \x07\n", "line 2, column 4: not YAML, an unprintable character"),
        ("--- a\n--- b\n", "line 2, column 1: not YAML, expected a single document in the stream"),
        ("jwt_issuer: a\njwt_issuer: a\n", "line 2, column 1: key 'jwt_issuer' comes twice"),
        ("tunnels:\n- mode: http\n  mode: tcp\n", "line 3, column 3: key 'mode' comes twice"),
        ("? [a]\n: b\n", "line 1, column 3: a list or mapping as a key, expected text"),
        ('a: "\\UFFFFFFFF"\n', "not YAML, an escape sequence that names no character"),
        ("&a [*a]\n", "line 1, column 1: not YAML, found unconstructable recursive node"),
    ],
)
def test_file_that_is_no_configuration(content, expected):
    assert refusal(content).startswith(expected)


@pytest.mark.parametrize("typed", ["*horse", "!horse!x y", "'horse", '"horse', "|horse", "%horse"])
def test_secret_that_is_no_yaml_is_not_shown(typed):
    message = refusal(f"{ADDR}jwt_secret: {typed}\n{TUNNELS}")
    assert message.startswith("line ") and "not YAML" in message and "horse" not in message


@pytest.mark.parametrize("opening", ["[", "{a: ", "- "])
def test_deep_nesting_is_refused(opening):
    assert refusal(opening * 20_000).startswith("lists or mappings nested too deeply, expected")


def test_nested_aliases_neither_hang_nor_fill_the_message():
    levels = "".join(f"l{n}: &l{n} [{', '.join([f'*l{n - 1}'] * 9)}]\n" for n in range(1, 30))
    assert refusal(f"l0: &l0 [x]\n{levels}").startswith("unknown key 'l0'")


# --- The example --------------------------------------------------------------------------------


def test_example_is_complete_and_shows_the_defaults_in_its_comments():
    """Uncommenting all defaults of conf/agent.yaml does not change the configuration."""
    ca_file = Path("cert-cache/local/ca.crt")  # which the gateway makes on its first start
    ca_file.parent.mkdir(parents=True)
    ca_file.touch()
    text = EXAMPLE.read_text(encoding="utf-8")
    config = loaded(text)
    assert config.modes() == {"app.localhost": "http", "ssh.localhost": "tcp"}
    shown = (
        "skip_tls_verify|jwt_issuer|jwt_expire_sec|stall_timeout|log_level|status_socket|log_format"
        "|inspect"
    )
    defaults = re.compile(rf"(?m)^#(?=({shown}): )")
    uncommented, count = defaults.subn("", text.replace("ca_file:", "#"))
    assert count == 8
    assert loaded(uncommented) == config._replace(ca_file=None, inspect=Inspect())


def test_example_shows_a_policy_that_can_be_followed():
    text = EXAMPLE.read_text(encoding="utf-8").replace("ca_file:", "#")
    text, count = re.subn(r"(?m)^( +)#(?=(basic_auth|allow|deny|rate_limit): )", r"\1", text)
    assert count == 4
    policy = read(loaded(text).policies()["app.localhost"], "http")
    assert policy.judge_request("10.1.0.1", None).page.status == 403
    assert policy.judge_request("192.0.2.1", None).page.status == 401


def test_example_explains_every_key():
    shown = set(re.findall(r"(?m)^[# -]*([a-z_]+):(?: |$)", EXAMPLE.read_text(encoding="utf-8")))
    assert shown >= {*KEYS, *TUNNEL_KEYS, *INSPECT_KEYS, *HEALTH_KEYS}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (
            MINIMAL + "    port: 22\n",
            "tunnels[0].port: the tunnel has mode http, expected mode tcp",
        ),
        (MINIMAL + "    mode: tcp\n    port: ssh\n", "tunnels[0].port: 'ssh' came, expected a"),
        (MINIMAL + "    mode: tcp\n    port: 0\n", "tunnels[0].port: '0' came, expected a port"),
        (MINIMAL + "    mode: tcp\n    port: 65536\n", "from 1 to 65535, or auto"),
        (MINIMAL + "    idle_timeout: 60\n", "tunnels[0].idle_timeout: the tunnel has mode http"),
        (MINIMAL + "    mode: tcp\n    idle_timeout: 0.5\n", "seconds, a number from 1 to 2678400"),
        (MINIMAL + "    mode: tcp\n    idle_timeout: 1h\n", "tunnels[0].idle_timeout: '1h' came"),
        (MINIMAL + "    proxy_protocol: v3\n", "'v3' came, expected one of v1, v2"),
    ],
)
def test_what_a_tunnel_cannot_say_is_refused(text, expected):
    assert expected in refusal(text)


def test_what_a_tunnel_in_tcp_mode_may_say_more():
    config = loaded(MINIMAL + "    mode: tcp\n    port: 022\n    idle_timeout: 90.5\n"
                                         "    proxy_protocol: V2\n")  # fmt: skip
    (tunnel,) = config.tunnels
    assert (tunnel.port, tunnel.idle_timeout, tunnel.proxy_protocol) == ("22", 90.5, "v2")
    assert tunnel.needs == ("ports", "visitor_address")
    assert config.ports() == {tunnel.hostname: "22"}
    assert config.addressed() == (tunnel.hostname,)


POOL = MINIMAL + "    pool: true\n"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (MINIMAL + "    pool: maybe\n", "tunnels[0].pool: 'maybe' came, expected true or false"),
        (MINIMAL + "    weight: 2\n", "tunnels[0].weight: came without pool: true, expected both"),
        (
            MINIMAL + "    pool: no\n    sticky: cookie\n",
            "tunnels[0].sticky: came without pool: true",
        ),
        (POOL + "    weight: 0\n", "weight: '0' came, expected a whole number from 1 to 100"),
        (POOL + "    weight: 101\n", "weight: '101' came, expected a whole number from 1 to 100"),
        (POOL + "    weight: 1.5\n", "weight: '1.5' came, expected a whole number from 1 to 100"),
        (POOL + "    sticky: ip\n", "sticky: 'ip' came, expected one of cookie, address"),
        (
            POOL + "    mode: tcp\n    sticky: cookie\n",
            "sticky: cookie came, and the tunnel has mode",
        ),
        (
            tunnel(hostname='"quick.*"', target="b:1", pool="true"),
            "tunnels[0].pool: the hostname 'quick.*' came, which the gateway completes",
        ),
        (MINIMAL + "    pools: true\n", "unknown key 'pools', did you mean 'pool'"),
    ],
)
def test_what_a_tunnel_cannot_say_of_a_pool_is_refused(text, expected):
    assert expected in refusal(text)


def test_a_pool_as_the_register_message_names_it():
    config = loaded(
        tunnel(hostname="a.example", target="b:1", pool="yes")
        + "  - {hostname: b.example, target: b:1, pool: true, weight: 3, sticky: Cookie}\n"
        + "  - {hostname: c.example, target: b:1, pool: false}\n"
    )
    assert config.pools() == {
        "a.example": {"weight": 1},
        "b.example": {"weight": 3, "sticky": "cookie"},
    }
    assert [each.needs for each in config.tunnels] == [("pools",), ("pools",), ()]
