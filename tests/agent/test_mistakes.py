"""Common mistakes in an agent's configuration: the file, its keys, its values. Each row is a
mistake that was made by hand first, and the words that help."""

import os
from pathlib import Path

import pytest

from gotunnel_agent import cli, forward, mistakes, service
from gotunnel_agent.config import KEYS, TUNNEL_KEYS, ConfigError, load

SECRET = "correct-horse-battery-staple"
ADDR = 'tunnel_addr: "tunnel.example.com:9443"\n'
CREDENTIAL = f'jwt_secret: "{SECRET}"\n'
TUNNELS = 'tunnels:\n  - hostname: "app.example.com"\n    target: "127.0.0.1:8080"\n'
WHOLE = ADDR + CREDENTIAL + TUNNELS
TOKEN = "eyJhbGciOiJIUzI1NiJ9.eyJpc3MiOiJvZmZpY2UifQ.correct-horse-battery-staple"
PEM = "-----BEGIN CERTIFICATE-----\nMIIB\n-----END CERTIFICATE-----\n"


@pytest.fixture(autouse=True)
def working_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def loaded(text):
    Path("agent.yaml").write_text(text, encoding="utf-8", newline="")
    return load("agent.yaml")


def refusal(content):
    """The one line that refuses a file with this text or these bytes, without the path."""
    Path("agent.yaml").write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ConfigError) as caught:
        load("agent.yaml")
    path, _, message = str(caught.value).partition(": ")
    assert path == "agent.yaml" and "\n" not in message and SECRET not in message
    return message


def tunnel(**keys):
    """A configuration whose one tunnel has these keys."""
    keys = {"hostname": "a.example", "target": "a:1"} | keys
    lines = "".join(f"    {key}: {text}\n" for key, text in keys.items())
    return f"{ADDR}{CREDENTIAL}tunnels:\n  -\n{lines}"


# The file ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (f"{TOKEN}\n", "text came, expected a mapping of keys to values; this is a token: name"),
        (
            f"gotunnel://office:{SECRET}@t.example:9443\n",
            "; this is a join string: give it to gotu",
        ),
        (PEM, "; this is a certificate or a key (PEM): ca_file"),
        ("<!doctype html><title>x</title>\n", "; this is a web page"),
        (
            f"TUNNEL_HOST=t.example\nJWT_SECRET={SECRET}\n",
            "; this is a file of settings (NAME=VALU",
        ),
        (f"export JWT_SECRET='{SECRET}'\n", "; this is a file of settings (NAME=VALUE), such as"),
        (
            'server_addr = "t.example"\n',
            "; this has lines with =, expected YAML with lines such as",
        ),
        (
            "- hostname: a.example\n  target: a:1\n",
            "a list came, expected a mapping of keys to val",
        ),
        ("- hostname: a.example\n  target: a:1\n", "; put the list under tunnels:, beside tunnel_"),
        (
            f"office:\n  secret: {SECRET}\n  hosts: [a.example]\n",
            "; this is a gateway's AGENTS_FIL",
        ),
        (
            (WHOLE).encode("utf-16"),
            "byte 0 is not UTF-8, expected UTF-8 text: line 1; this looks l",
        ),
        (
            (WHOLE).encode("utf-16-le"),
            "; this looks like UTF-16 (Unicode, as Windows has it): save",
        ),
        (
            (WHOLE).encode("utf-16-be"),
            "; this looks like UTF-16 (Unicode, as Windows has it): save",
        ),
        ((ADDR + "# caf\xe9\n").encode("latin-1"), "UTF-8 text: line 2; save the file as UTF-8"),
    ],
)
def test_file_of_another_kind_is_named(content, said):
    assert said in refusal(content)


@pytest.mark.parametrize("text", ["just text\n", "42\n", "a b c\n"])
def test_file_of_no_known_kind_gets_no_guess(text):
    assert refusal(text) == "text came, expected a mapping of keys to values"


@pytest.mark.parametrize(
    "text",
    [
        "\ufeff" + WHOLE,
        WHOLE.replace("\n", "\r\n"),
        '{"tunnel_addr": "tunnel.example.com:9443", "jwt_secret": "' + SECRET + '",'
        ' "tunnels": [{"hostname": "app.example.com", "target": "127.0.0.1:8080"}]}',
    ],
)
def test_byte_order_mark_windows_line_ends_and_json_are_fine(text):
    config = loaded(text)
    assert (config.jwt_secret, config.tunnel_host) == (SECRET, "tunnel.example.com")
    assert config.routes() == {"app.example.com": "127.0.0.1:8080"}


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (f'{ADDR}ca_file: "C:\\Users\\me\\ca.crt"\n', "line 2, column 15: not YAML"),
        (
            f'{ADDR}ca_file: "C:\\Users\\me\\ca.crt"\n',
            r"in double quotes a \ begins an escape: use",
        ),
        (f'{ADDR}ca_file: "C:\\my\\ca.crt"\n', "use single quotes for a Windows path"),
        (f"{ADDR}tunnels:\n\t- hostname: a.example\n", "; indent with blanks, as YAML accepts no "),
        (f"{ADDR}tunnels:\n- hostname: *.dev.example.com\n", "; put a value that begins with * in"),
        (f"{ADDR}tunnels:\n- hostname: *dev\n", "; put a value that begins with * in quotes"),
        (f"{ADDR}jwt_secret: @{SECRET}\n", "; put a value that begins with such a character in qu"),
        (f'{ADDR}jwt_secret: "{SECRET}\n', "; a closing quotation mark is missing"),
        ('tunnel_addr:"t.example:1"\njwt_issuer: x\n', "; a blank is missing behind a colon, here"),
        ("tunnel_addr = t.example\njwt_issuer: x\n", "; YAML has a colon and a blank where a line"),
        ("tunnel_addr: t.example: 9443\n", "; put a value with a colon and a blank in quotes"),
        ("tunnels:\n- hostname: a\n    target: a:1\n", "; indent the keys of one tunnel alike"),
        (
            "tunnels:\n  -hostname: a\n   target: a:1\n",
            "; a blank is missing behind a hyphen, here",
        ),
        (
            f'jwt_secret: "{SECRET}\n{ADDR}',
            "; a quotation mark is missing or too many, here or in a",
        ),
        (
            f"A=b\nX=https://a: b\nJWT_SECRET={SECRET}\n",
            "; this is a file of settings (NAME=VALUE)",
        ),
    ],
)
def test_text_that_is_no_yaml_gets_advice(text, said):
    assert said in refusal(text)


@pytest.mark.parametrize("text", ["--- a\n--- b\n", "a: 1\nb: \x07\n", "jwt_issuer: a\n" * 2])
def test_other_faults_of_yaml_get_no_guess(text):
    assert "; " not in refusal(text)


@pytest.mark.timeout(5)
@pytest.mark.parametrize("line", ["-" * 500_000, "A" * 500_000, "a" * 500_000 + ": b: c"])
def test_very_long_line_takes_no_time(line):
    assert len(refusal(f"x: [{line}\n{line}: y: z\n")) < 1000


# Keys --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("line", "said"),
    [
        (
            f"auth_token: {SECRET}",
            "unknown key 'auth_token'; here it is token for a token, and jwt_",
        ),
        (
            "client_id: office",
            "unknown key 'client_id'; here the agent's name is jwt_issuer, beside",
        ),
        ("client_name: office", "unknown key 'client_name'; here the agent's name is jwt_issuer"),
        (
            "server_addr: t.example:1",
            "unknown key 'server_addr'; the gateway's address is one key ",
        ),
        ("tunnel_id: 7", "unknown key 'tunnel_id'; a tunnel has no id here"),
        ("tunnel_hostnames: [a]", "; here each hostname is an item of tunnels: - hostname:"),
        (
            "hostname: a.example",
            "unknown key 'hostname'; it belongs into an item of tunnels, not be",
        ),
        ("insecure: true", "unknown key 'insecure'; here it is skip_tls_verify"),
        ("Tunnel-Addr: t.example:1", "unknown key 'Tunnel-Addr', did you mean 'tunnel_addr'?"),
    ],
)
def test_key_of_another_program_gets_the_word_that_is_meant_here(line, said):
    assert said in refusal(f"{line}\n{WHOLE}")


@pytest.mark.parametrize(
    ("key", "said"),
    [
        ("host", "tunnels[0]: unknown key 'host'; here it is hostname"),
        ("addr", "tunnels[0]: unknown key 'addr'; here it is target"),
        ("proto", "tunnels[0]: unknown key 'proto'; here it is mode: http or tcp"),
        ("remote_port", "tunnels[0]: unknown key 'remote_port'; here it is port, in mode tcp"),
        ("ca_file", "tunnels[0]: unknown key 'ca_file'; for the target's CA it is target_ca_file"),
    ],
)
def test_key_of_another_programs_tunnel_gets_the_word_that_is_meant_here(key, said):
    assert refusal(tunnel(**{key: "x"})).startswith(said)


def test_no_key_of_ours_is_taken_for_another_programs():
    assert not set(KEYS) & set(mistakes.OTHER_KEYS)
    assert not set(TUNNEL_KEYS) & set(mistakes.OTHER_TUNNEL_KEYS)


def test_tunnels_as_a_mapping_get_advice():
    message = refusal(f"{ADDR}{CREDENTIAL}tunnels:\n  web: {{hostname: a.example}}\n")
    assert message == (
        "tunnels: a mapping came, expected a list with at least one tunnel; begin each tunnel with "
        '- hostname: "HOST"'
    )


def test_file_without_tunnels_is_told_of_the_quick_commands():
    said = "; or share a port without one in the file: gotunnel http 8080"
    assert refusal(ADDR + CREDENTIAL).endswith(said)
    assert not refusal(f"{ADDR}{CREDENTIAL}tunnels: []\n").endswith(said)


# The command line --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("argument", "said"),
    [
        ("--port", "'--port'; the gateway's port is a part of tunnel_addr, and a tunnel's own is"),
        (f"--token={SECRET}", "'--token'; write token: VALUE into the configuration"),
        ("--tunnel-addr", "'--tunnel-addr'; write tunnel_addr: VALUE into the configuration"),
        ("--hostname=a", "'--hostname'; write hostname: VALUE into a tunnel of the configuration"),
        (
            f"--authtoken={SECRET}",
            "'--authtoken'; here it is token for a token, and jwt_secret for",
        ),
        ("--host", "'--host'; gotunnel http PORT --host NAME serves a hostname"),
        ("-v", "'-v'; log_level: debug in the configuration does that"),
        ("--nonsense", "'--nonsense'; -c FILE names the configuration"),
        ("agent.yaml", "'agent.yaml'; -c FILE names the configuration"),
        (f"gotunnel://office:{SECRET}@a.example:1", "'gotunnel:...'; this is a join string: give"),
        (TOKEN, "'eyJhbGciO...'; this is a token: the key token of a configuration takes it"),
    ],
)
def test_argument_that_there_is_not_is_told_where_it_belongs(argument, said, capsys):
    with pytest.raises(SystemExit) as caught:
        cli.parse([argument])
    line = capsys.readouterr().err.splitlines()[-1]
    assert caught.value.code == 2 and SECRET not in line
    assert line.startswith(f"gotunnel-agent: error: unknown argument {said}")


def test_two_files_are_refused(capsys):
    with pytest.raises(SystemExit):
        cli.parse(["-c", "a.yaml", "--config", "b.yaml"])
    assert ": error: --config came twice, expected one file; " in capsys.readouterr().err
    assert cli.parse(["-c", "a.yaml"]).config == "a.yaml"


@pytest.mark.parametrize(
    ("main", "arguments", "said"),
    [
        (cli.main, ["status", f"gotunnel://office:{SECRET}@a.example:1"], "gotunnel://..."),
        (cli.main, ["status", f"--token={SECRET}"], "unrecognized arguments: --token=..."),
        (cli.main, ["status", TOKEN], "unrecognized arguments: eyJhbGciOiJIUzI1NiJ9...."),
        (service.main, [f"gotunnel://office:{SECRET}@a.example:1"], "'gotunnel://...' (choose fr"),
        (forward.main, [f"gotunnel://office:{SECRET}@a.example:1"], "'gotunnel://...@a.example:"),
    ],
)
def test_secret_as_an_argument_is_not_shown(main, arguments, said, capsys):
    with pytest.raises(SystemExit):
        main(arguments)
    error = capsys.readouterr().err.splitlines()[-1]
    assert SECRET not in error and said in error


def test_password_as_an_argument_is_not_shown(capsys):
    with pytest.raises(SystemExit):
        cli.print_hash([SECRET])
    said = capsys.readouterr().err
    assert SECRET not in said and "expected the password on the terminal or standard input" in said


# Values ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("typed", "said"),
    [
        (
            "https://t.example:9443",
            'has a scheme or a path, expected "HOST:PORT" such as "tunnel.e',
        ),
        ("https://t.example:9443", '"; write "t.example:9443"'),
        ("https://t.example", '"; write "t.example:9443"; the port is the gateway\'s TUNNEL_PORT'),
        (
            "t.example:443/",
            'has a path, expected "HOST:PORT" such as "tunnel.example.com:9443"; wri',
        ),
        ("t.example:443/", '; write "t.example:443"'),
        ("t.example", "has no port, expected"),
        (
            "192.0.2.1",
            '; write "192.0.2.1:9443"; the port is the gateway\'s TUNNEL_PORT, 9443 unle',
        ),
        ("'t.example: 9443'", "; leave out the blank"),
        ("<TUNNEL_HOST>:9443", "; write the gateway's hostname in the place of that"),
        ("'${TUNNEL_HOST}:9443'", "; write the gateway's hostname in the place of that"),
        ("a.example:9443,b.example:9443", '; several addresses are a list: ["A:9443", "B:9443"]'),
        ("“t.example:9443”", "; its quotation marks are typographic, use \" or '"),
        (f"gotunnel://office:{SECRET}@t.example:1", "'gotunnel://...@t.example:1' has a scheme"),
        (
            f"gotunnel://office:{SECRET}@t.example:1",
            "; this is a join string: give it to gotunnel ",
        ),
    ],
)
def test_tunnel_addr_is_told_as_it_should_be(typed, said):
    assert said in refusal(f"tunnel_addr: {typed}\n{CREDENTIAL}{TUNNELS}")


@pytest.mark.parametrize(
    ("typed", "said"),
    [
        ("localhost", '; write "localhost:80"'),
        ("'localhost:80 '", "; leave out the blank"),
        ("http://localhost", '; write "localhost:80"'),
        ("https://localhost", '; write "https://localhost:443"'),
        ("localhost:8080/path", "'localhost:8080/path' has a path, expected"),
        (
            "localhost:8080/path",
            '; write "localhost:8080": a target has no path, the target gets t',
        ),
        ("http://localhost:8080/", '; write "localhost:8080"'),
        ("wss://localhost:8443/ws", '; write "https://localhost:8443": a target has no path'),
        (
            "ssh://localhost:22",
            'has an unknown scheme, expected "HOST:PORT", "https://HOST:PORT" or',
        ),
        ("ssh://localhost:22", '; write "localhost:22" and mode: tcp'),
        ("tcp://localhost", '; write "localhost:PORT" and mode: tcp'),
        ("/run/app.sock", '; a unix socket is "unix:/run/app.sock"'),
        ("./public", "; a folder is served by: gotunnel files FOLDER"),
        ("“localhost:80”", "; its quotation marks are typographic, use \" or '"),
        (f"http://me:{SECRET}@localhost:80", "'http://...@localhost:80' has a host that is neith"),
    ],
)
def test_target_is_told_as_it_should_be(typed, said):
    assert said in refusal(tunnel(target=typed))


@pytest.mark.parametrize(
    ("typed", "said"),
    [
        ("my_app.example.com", "; no hostname has an underscore (_); a hyphen can take its place"),
        ("'*.com'", "; behind *. two labels are needed, or it would be other people's hostnames"),
        ("'*'", "; a * is for wildcards such as *.dev.example.com, and stands in front"),
        ("https://app.example.com", "; leave out the scheme, which is what stands before ://"),
        ("app.example.com:443", "; leave out the port, which is what stands behind the colon"),
        ("app.example.com/api", "; leave out the path, which begins with /"),
        ("192.0.2.1", "; it is an IP address"),
        ("straße.example", "; write it in its xn-- form"),
        (f"https://me:{SECRET}@app.example.com", "'https://...@app.example.com' came, expected"),
    ],
)
def test_hostname_is_told_what_is_wrong_with_it(typed, said):
    message = refusal(tunnel(hostname=typed))
    assert message.startswith("tunnels[0].hostname: ") and said in message


@pytest.mark.parametrize("typed", ["8080", "':8080'", "http://localhost:8080", "localhost:8080"])
def test_port_alone_is_a_target_on_this_machine(typed):
    assert loaded(tunnel(target=typed)).routes() == {"a.example": "localhost:8080"}


@pytest.mark.parametrize(
    ("mode", "said"),
    [
        (
            "https",
            "'https' came, expected one of http, tcp; http is for web sites, WebSockets and ",
        ),
        ("ssh", "'ssh' came, expected one of http, tcp; tcp is for everything but web sites"),
        ("udp", "'udp' came, expected one of http, tcp; udp is not tunnelled"),
    ],
)
def test_other_modes_are_told_which_of_ours_is_meant(mode, said):
    assert refusal(tunnel(mode=mode)).startswith(f"tunnels[0].mode: {said}")


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ('ca_file: "C:\\temp\\new.crt"', "ca_file: a line break or unprintable character came"),
        (
            'ca_file: "C:\\temp\\new.crt"',
            r"; in double quotes \t and \n are escapes: use single qu",
        ),
        (
            "ca_file: ~/ca.crt",
            "'~/ca.crt' does not exist, expected a file that can be read; write ",
        ),
        ("ca_file: .", "ca_file: '.' is a folder, expected a file that can be read"),
        ("ca_file: pipe", "ca_file: 'pipe' cannot be read, as it is no regular file, expected"),
        ("ca_file: file/ca.crt", "ca_file: 'file/ca.crt' does not exist, expected a file that can"),
        ("ca_file: none.crt", "; a relative path begins in {folder}"),
        (
            "    basic_auth_file: none",
            "expected a readable file; a relative path begins in {folder}",
        ),
    ],
)
def test_file_that_is_none_is_told_why(line, said):
    Path("file").touch()
    if hasattr(os, "mkfifo"):
        os.mkfifo("pipe")
    assert said.format(folder=os.getcwd()) in refusal(f"{WHOLE}{line}\n")


def test_absolute_path_needs_no_word_of_the_folder(tmp_path):
    assert "relative" not in refusal(f"{WHOLE}ca_file: {tmp_path / 'none'}\n")


@pytest.mark.parametrize(
    ("name", "answer", "said"),
    [
        (
            "access",
            False,
            "'ca.crt' cannot be read (this user has no right to), expected a file th",
        ),
        ("stat", PermissionError(13, "Permission denied"), "cannot be read (Permission denied)"),
    ],
)
def test_ca_file_without_rights_is_told_so(monkeypatch, name, answer, said):
    """As for a user that is not root."""
    Path("ca.crt").touch()
    real = getattr(os, name)

    def ask(path, *arguments, **named):
        if path != "ca.crt":
            return real(path, *arguments, **named)
        if isinstance(answer, Exception):
            raise answer
        return answer

    monkeypatch.setattr(os, name, ask)
    assert said in refusal(f"{WHOLE}ca_file: ca.crt\n")


@pytest.mark.parametrize(
    "typed", [f'"{SECRET}\\n"', f"|\n  {SECRET}", f"|+\n  {SECRET}\n\n", f'"{SECRET}\\r\\n"']
)
@pytest.mark.parametrize("key", ["jwt_secret", "token"])
def test_line_ends_behind_a_credential_do_not_count(key, typed):
    config = loaded(f"{ADDR}{key}: {typed}\n{TUNNELS}")
    assert SECRET in (config.jwt_secret, config.token)
