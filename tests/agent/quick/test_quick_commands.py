"""`gotunnel http`, `tcp` and `files`: their arguments, and as programs with a gateway here."""

import base64
import io
import json
import os
import re
import signal
import sys

import pytest
from support import RAW, ROOT, SECRET, TUNNEL_HOST, answer, gateway_here, reserved_port, running

from gotunnel_agent import called, cli
from gotunnel_agent.config import H2, H2C, Inspect, Target, Tunnel
from gotunnel_agent.quick import commands
from gotunnel_agent.quick.commands import make_parser, make_tunnel, policy_of, what_to_share
from gotunnel_agent.quick.folder import Root
from gotunnel_agent.quick.serving import how_to_connect
from gotunnel_agent.quick.targets import BadTarget

PROGRAM = [sys.executable, str(ROOT / "gotunnel_agent")]
DEV = "dev.localhost"
APP = f"app.{DEV}"
PASSWORD = "correct-horse-battery"


def account_text(tunnel_port=9443, **keys):
    """The file that `join` writes."""
    return json.dumps({
        "tunnel_addr": f"{TUNNEL_HOST}:{tunnel_port}",
        "jwt_issuer": "laptop",
        "jwt_secret": SECRET,
        **keys,
    })  # fmt: skip


@pytest.fixture(autouse=True)
def place(tmp_path, monkeypatch):
    """A user's home, with an account, and a working folder."""
    path = tmp_path / "account.yaml"
    path.write_text(account_text())
    path.chmod(0o600)
    monkeypatch.setenv("GOTUNNEL_CONFIG", str(path))
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    monkeypatch.chdir(tmp_path)
    return path


# Arguments ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "target", "inspect"),
    [
        ("http 8080", "8080", None),
        ("http 8080 --inspect", "8080", Inspect()),
        ("http --inspect 8080", "8080", Inspect()),
        ("http --inspect 4041 8080", "8080", Inspect(port=4041)),
        ("http 8080 --inspect=127.0.0.1:5000", "8080", Inspect(port=5000)),
        ("http 8080 --inspect [::1]:5000", "8080", Inspect("::1", 5000)),
        ("files --inspect", ".", Inspect()),
        ("files --inspect photos", "photos", Inspect()),
        ("files --inspect 4041", ".", Inspect(port=4041)),
        ("files photos --inspect localhost:4041", "photos", Inspect("localhost", 4041)),
    ],
)
def test_inspect_names_an_address_and_not_the_target(words, target, inspect):
    command, *rest = words.split()
    options = commands.parse(make_parser(command), rest)
    assert (options.target, commands.inspect_settings(options)) == (target, inspect)


@pytest.mark.parametrize(
    ("address", "words"),
    [
        ("0.0.0.0:4040", "which other machines can reach, expected one of this machine alone"),
        ("example.com:4040", "has a host that is no IP address"),
        ("127.0.0.1:99999", "99999"),
    ],
)
def test_a_wrong_address_of_inspect_is_refused(address, words):
    options = commands.parse(make_parser("http"), ["8080", "--inspect", address])
    with pytest.raises(commands.BadOption, match=words) as caught:
        commands.inspect_settings(options)
    assert str(caught.value).startswith("--inspect: ") and "allow_remote" not in str(caught.value)


def test_nothing_is_inspected_in_tcp_mode(capsys):
    with pytest.raises(SystemExit):
        commands.parse(make_parser("tcp"), ["22", "--inspect"])
    assert "--inspect: the bytes of a tunnel in tcp mode are not read" in capsys.readouterr().err


def tunnel_of(*words, hostname=APP):
    """The tunnel that a command line stands for."""
    options = make_parser(words[0]).parse_args(words[1:])
    target, server = what_to_share(words[0], options)
    try:
        return make_tunnel(words[0], options, options.host or hostname, target, server)
    finally:
        if server is not None:
            server.close()


@pytest.mark.parametrize(
    ("words", "tunnel"),
    [
        ("http 8080", Tunnel(APP, Target("localhost", 8080), "http")),
        ("http 80 --host App.Example.com.",
         Tunnel("app.example.com", Target("localhost", 80), "http")),
        ("http 80 --host shop", Tunnel("shop.*", Target("localhost", 80), "http")),
        ("http 80 --host *.example.com", Tunnel("*.example.com", Target("localhost", 80), "http")),
        ("http 80 --host-header localhost:5173",
         Tunnel(APP, Target("localhost", 80), "http", host_header="localhost:5173")),
        ("http 80 --protocol h2c", Tunnel(APP, Target("localhost", 80), "http", protocol=H2C)),
        ("http https://x --protocol h2 --target-skip-tls-verify",
         Tunnel(APP, Target("x", 443, tls=True, skip_tls_verify=True), "http", protocol=H2)),
        ("tcp 22", Tunnel(APP, Target("localhost", 22), "tcp")),
        ("tcp tcp://db:5432 --port auto", Tunnel(APP, Target("db", 5432), "tcp", port="auto")),
        ("tcp unix:/run/db --port 007", Tunnel(APP, Target(path="/run/db"), "tcp", port="7")),
    ],
)  # fmt: skip
def test_command_line_is_a_tunnel(words, tunnel):
    assert tunnel_of(*words.split()) == tunnel


def test_folder_is_a_tunnel_to_a_server_that_knows_its_visits(tmp_path):
    tunnel = tunnel_of("files", str(tmp_path))
    assert tunnel.target.host == "127.0.0.1" and tunnel.target.port
    assert re.fullmatch(r"[0-9a-f]{32}\.invalid", tunnel.host_header)


def test_user_is_warned_of_what_is_shared_by_mistake(tmp_path, monkeypatch):
    def warned(*words):
        options = make_parser(words[0]).parse_args(words[1:])
        server = what_to_share(words[0], options)[1]
        if server is not None:
            server.close()
        return list(commands.warnings(commands.home.account(), options, server))

    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "sub").mkdir()
    assert warned("files", "sub") == warned("http", "80") == []
    assert warned("files", ".") == [f"the whole of {tmp_path} is shared, but for hidden files"]
    assert warned("files", "/", "--all") == ["the whole of / is shared"]
    file = tmp_path / "users"
    file.write_text(f"ann:{PASSWORD}")
    file.chmod(0o644)
    [line] = warned("http", "80", "--basic-auth-file", str(file))
    assert str(file) in line and PASSWORD not in line


def test_policies_are_those_of_a_configuration(tmp_path, monkeypatch):
    def policy(*words):
        return policy_of(make_parser("http").parse_args(["80", *words]))

    found = policy("--allow", "10.0.0.0/8, 192.0.2.7", "--allow", "2001:db8::/32")
    assert found.allow == ("10.0.0.0/8", "192.0.2.7", "2001:db8::/32") and not found.basic_auth
    file = tmp_path / "users"
    file.write_text(f"# two\nann:{PASSWORD}\nbob:{PASSWORD}\n")
    stdin = io.TextIOWrapper(io.BytesIO(f"{PASSWORD}\r\n{PASSWORD}".encode()))
    monkeypatch.setattr(sys, "stdin", stdin)
    for words in (
        ["--basic-auth", f"ann:{PASSWORD}", "--basic-auth", f"bob:{PASSWORD}"],
        ["--basic-auth-file", str(file)],
        ["--basic-auth", "ann", "--basic-auth", "bob"],
    ):
        entries = policy(*words).basic_auth
        assert [entry.partition(":")[0] for entry in entries] == ["ann", "bob"]
        assert all(re.match(r"\w+:\$scrypt\$", entry) for entry in entries)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("http 80800", "TARGET: '80800' has no port from 1 to 65535"),
        ("http web", "TARGET: 'web' has no port"),
        ("http .", "is a folder; `gotunnel files .` shares a folder"),
        ("http", "TARGET is missing, expected one such as in `gotunnel-agent http 8080`"),
        ("http 80 --protocol h2", "expected h2c or an https:// TARGET"),
        ("http https://x --protocol h2c", "which is without TLS, expected h2"),
        ("http 80 --protocol spdy", "invalid choice"),
        ("http 80 --target-skip-tls-verify", "expected an https:// TARGET"),
        ("http 80 --host a_b", "'a_b' is no hostname such as app.example.com, and no name such"),
        ("http 80 --host a_b", "; an underscore is not valid in a hostname: write a hyphen"),
        ("http 80 --host https://x.y", "and no name such as app; write x.y"),
        ("http 80 --host x --new", "not allowed with argument --host"),
        ("http 80 --host-header a/b", "is no hostname or IP address"),
        ("http 80 --port 22", "--port is an option of `gotunnel-agent tcp`, not of `gotunnel-"),
        (
            "tcp 80 --all",
            "--all is an option of `gotunnel-agent files`, not of `gotunnel-agent tcp`",
        ),
        ("tcp", "TARGET is missing, expected one such as in `gotunnel-agent tcp 22`"),
        ("http 80 --subdomain=shop", "unknown option '--subdomain'; --host NAME chooses it"),
        ("http 80 -p 81", "unknown option '-p'; the port stands alone, as in gotunnel http 8080"),
        ("tcp 80 --frobnicate=1", "unknown option '--frobnicate'; --help shows all"),
        ("http 80 81", "2 targets came, expected one"),
        ("http 80 --allow 10.0.0.0/99", "--allow: "),
        ("http 80 --allow ,", "--allow: an empty list came"),
        ("http 80 --basic-auth a: ", "--basic-auth: [0]: expected a password of 1 to"),
        ("http 80 --basic-auth a:$2y$05$abc", "a hash of another kind came"),
        ("http 80 --basic-auth a", "--basic-auth a: no password came, expected one line on stand"),
        ("http 80 --basic-auth-file no-such", "--basic-auth-file no-such: cannot be read (No such"),
        ("http 80 --basic-auth-file .", "--basic-auth-file .: cannot be read (Is a directory)"),
        ("http 80 --basic-auth-file x --basic-auth a:b", "expected only one of them"),
        ("tcp ssh", "'ssh' has no port, expected 22, 127.0.0.1:22 or unix:/PATH"),
        ("tcp http://x:80", "begins with http://, expected tcp:// or none"),
        ("tcp 22 --port 0", "'0' is no port from 1 to 65535, or auto"),
        (f"tcp 22 --basic-auth a:{PASSWORD}", "cannot ask for passwords; use --allow"),
        (f"http 80 --basic-auht=a:{PASSWORD}", "'--basic-auht'; did you mean --basic-auth?"),
        (f"http 80 --basic-auth a {PASSWORD}", "2 targets came, expected one"),
        ("files no-such", "FOLDER: 'no-such' does not exist"),
        ("files account.yaml", "FOLDER: 'account.yaml' is a file, expected a folder"),
        ("http 80 -c no-such", "no-such"),
        (f"http gotunnel://a:{PASSWORD}@h:1", "'gotunnel://...' begins with gotunnel://, exp"),
        (f"http 80 -c gotunnel://a:{PASSWORD}@h:1", "gotunnel:/...: cannot be read"),
        (f"http 80 --host gotunnel://a:{PASSWORD}@h:1", "'gotunnel://...' is no hostname"),
        (f"http 80 --allow gotunnel://a:{PASSWORD}@h:1", "'gotunnel://...' came"),
        (f"files gotunnel://a:{PASSWORD}@h:1", "'gotunnel://...' does not exist"),
    ],
)
def test_wrong_arguments_are_one_clear_line(capsys, monkeypatch, words, said):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"")))
    try:
        status = commands.main(words.split())
    except SystemExit as ended:
        status = ended.code
    out, err = capsys.readouterr()
    assert (status, out) == (2, "") and PASSWORD not in err
    assert said in err.splitlines()[-1]
    assert err.splitlines()[-1].startswith(f"gotunnel-agent {words.split()[0]}: ")


def test_without_an_account_the_way_to_one_is_named(capsys, place):
    place.unlink()
    assert commands.main(["http", "80"]) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert " join " in line


def test_names_belong_to_gateway_kind_target_and_folder(tmp_path, monkeypatch):
    (tmp_path / "sub").mkdir()

    def key(*words, gateway="a", folder="."):
        monkeypatch.chdir(tmp_path / folder)
        options = make_parser(words[0]).parse_args(words[1:])
        target, server = what_to_share(words[0], options)
        if server is not None:
            server.close()
        account = commands.home.account()
        account = account._replace(tunnel_host=gateway)
        return commands.labels_of(account, words[0], target, options)._key

    keys = [
        key("http", "80"), key("tcp", "80"), key("http", "81"), key("http", "80", gateway="b"),
        key("http", "80", folder="sub"), key("files", "."), key("files", "sub"),
    ]  # fmt: skip
    assert len(set(keys)) == len(keys)
    assert key("http", "localhost:80") == keys[0]
    assert key("files", ".", folder="sub") == key("files", str(tmp_path / "sub")) == keys[-1]


def test_a_working_folder_that_was_removed_is_no_part_of_a_name(tmp_path, monkeypatch):
    folder = tmp_path / "gone"
    folder.mkdir()
    monkeypatch.chdir(folder)
    folder.rmdir()
    options = make_parser("http").parse_args(["80"])
    target, _ = what_to_share("http", options)
    labels = commands.labels_of(commands.home.account(), "http", target, options)
    assert labels.another()


def test_a_folder_that_may_not_be_read_is_named(tmp_path, monkeypatch):
    def refuse(*_):
        raise PermissionError

    monkeypatch.setattr(Root, "_open", refuse)
    options = make_parser("files").parse_args([str(tmp_path)])
    with pytest.raises(BadTarget, match=r"cannot be served \(Permission denied\)"):
        what_to_share("files", options)


def test_documentation_has_each_option():
    """docs/agent.md, in its own table, with the commands that have the option."""
    page = (ROOT / "docs" / "agent.md").read_text(encoding="utf-8")
    rows = page.partition("<!-- options: the quick commands -->")[2].partition("\n\n")[0]
    documented = {}
    for options, commands_of_it in re.findall(r"^\| (`-.+?`) \| (.+?) \|", rows, re.MULTILINE):
        those = commands.COMMANDS if commands_of_it == "all" else commands_of_it.split(", ")
        for option in re.findall(r"--[a-z-]+", options):
            documented[option] = set(those)
    known = {}
    for command in commands.COMMANDS:
        for action in make_parser(command)._actions:
            for option in action.option_strings:
                if option.startswith("--") and option != "--help":
                    known.setdefault(option, set()).add(command)
    assert documented == known


# How visitors come -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("url", "port", "said"),
    [
        ("https://a.b", 80, []),
        ("tcp://a.b:2200", 22, ["visitors connect to it without TLS: ssh -p 2200 USER@a.b"]),
        ("tcp://a.b:2200", 5432, ["visitors connect to it without TLS: a.b port 2200"]),
        ("tls://a.b:443", 22, ["visitors connect by: ssh -o ProxyCommand='gotunnel-agent forward "
                               "%h' USER@a.b"]),
        ("tls://a.b:8443", 22, ["visitors connect by: ssh -o ProxyCommand='gotunnel-agent forward "
                                "%h:8443' USER@a.b"]),
        ("tls://a.b:443", 5432, ["visitors run: gotunnel-agent forward a.b 15432, and connect to "
                                 "port 15432 of their own machine"]),
        ("tls://a.b:8443", 65000, ["visitors run: gotunnel-agent forward a.b:8443 15000, and "
                                   "connect to port 15000 of their own machine"]),
    ],
)  # fmt: skip
def test_visitors_of_a_tcp_tunnel_are_told_their_command(url, port, said):
    assert how_to_connect(url, Tunnel("a.b", Target("localhost", port), "tcp"), None) == said


# The name of the program -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("/usr/bin/gotunnel", "gotunnel"),
        ("gotunnel", "gotunnel"),
        ("C:\\Scripts\\gotunnel.exe", "gotunnel"),
        ("C:\\Scripts\\gotunnel-script.py", "gotunnel"),
        ("/x/gotunnel.pyz", "gotunnel"),
        ("/usr/bin/gotunnel-agent", "gotunnel-agent"),
        ("/src/gotunnel_agent", "gotunnel-agent"),
        ("/src/gotunnel_agent/__main__.py", "gotunnel-agent"),
        ("", "gotunnel-agent"),
    ],
)
def test_program_has_the_name_that_was_called(path, name):
    assert called.name_of(path) == name


def test_short_name_without_a_command_says_what_it_can_do(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["/usr/bin/gotunnel"])
    assert cli.main([]) == 2
    out, err = capsys.readouterr()
    assert out == "" and "gotunnel http 8080" in err and len(err.splitlines()) < 15
    with pytest.raises(SystemExit):
        cli.main(["--help"])
    assert "\n  gotunnel http 8080 " in capsys.readouterr().out
    with pytest.raises(SystemExit):
        make_parser("http").parse_args(["--help"])
    assert "    gotunnel http 3000 --host shop" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("word", "said"),
    [
        ("htpp", "unknown command 'htpp'; did you mean http?"),
        ("file", "unknown command 'file'; did you mean files?"),
        ("stauts", "unknown command 'stauts'; did you mean status?"),
        ("frob", "unknown command 'frob', expected one of http, tcp, "),
        ("8080", "unknown argument '8080'; did you mean gotunnel http 8080?"),
        ("localhost:3000", "did you mean gotunnel http localhost:3000?"),
        (".", "did you mean gotunnel files .?"),
        ("start", "unknown command 'start'; gotunnel -c FILE serves all tunnels"),
        ("https", "'https'; gotunnel http https://HOST:PORT shares a web server that"),
        ("authtoken", "'authtoken'; gotunnel join STRING stores a credential"),
        ("init", "'init'; gotunnel-server on the gateway's machine has such"),
        ("agent.yaml", "unknown argument 'agent.yaml'; -c FILE names the configuration"),
    ],
)
def test_unknown_command_is_answered_with_the_one_that_was_meant(capsys, word, said):
    with pytest.raises(SystemExit) as ended:
        cli.main([word])
    assert ended.value.code == 2 and said in capsys.readouterr().err.splitlines()[-1]


# As programs -------------------------------------------------------------------------------------


@pytest.fixture
def gateway(cache, tmp_path, place):
    """A gateway that gives the account a wildcard, one hostname, and ports."""
    path = tmp_path / "agents.yaml"
    path.write_text(
        f'laptop:\n  secret: "{SECRET}"\n  hosts: ["*.{DEV}", "{RAW}"]\n  ports: "1024-65535"\n'
    )
    path.chmod(0o600)
    with gateway_here(cache, AGENTS_FILE=str(path), TCP_PORTS="1024-65535") as gateway:
        place.write_text(account_text(gateway.tunnel_port, ca_file=str(gateway.ca_file)))
        yield gateway


def quick(*words):
    variables = ("GOTUNNEL_CONFIG", "XDG_STATE_HOME")
    environment = {name: os.environ[name] for name in variables}
    return running(*PROGRAM, *words, cwd=os.getcwd(), **environment)


def test_port_is_public_under_a_random_name_by_one_command(gateway, origin):
    origin.serve(lambda wire: wire.read_head() and wire.send(answer(b"from the port")))
    with quick("http", str(origin.port)) as program:
        url = rf"^https://([a-z]+-[a-z]+-[0-9]+\.{DEV}):{gateway.public_port}$"
        host = program.wait_for(url)[1]
        assert gateway.get(host) == (200, b"from the port")
        program.signal(signal.SIGTERM)
        assert program.wait() == 0
        assert sum(line.startswith("https://") for line in program.lines) == 1


@pytest.mark.slow
def test_what_passes_is_inspected_and_sent_again_by_two_commands(gateway, origin):
    left = iter(["500 Oops", "503 Later", "200 OK"])
    origin.serve(lambda wire: wire.read_message() and wire.send(answer(status=next(left))))
    with reserved_port() as port:
        pass
    words = ["http", str(origin.port), "--host", APP, "--inspect", str(port)]
    with quick(*words) as program:
        url = program.wait_for(rf"inspector: (http://127.0.0.1:{port}/\?token=\S+)")[1]
        program.wait_for(rf"^https://{APP}")
        assert gateway.get(APP, "/hook")[0] == 500
        program.wait_for("GET /hook 500 ")
        with quick("inspect", "--url") as asked:
            assert asked.wait_for("^http")[0] and asked.wait() == 0 and url in asked.lines
        with quick("inspect", "replay", "1", "--until", "2xx", "--every", "0") as asked:
            asked.wait_for("replay 1 of visit 1: passed at try 2: 1 x 200, 1 x 503")
            assert asked.wait() == 0
        program.signal(signal.SIGTERM)
        assert program.wait() == 0
    with quick("inspect") as asked:
        asked.wait_for("no inspector runs here")
        assert asked.wait() == 2


def test_folder_is_public_by_one_command_behind_a_password(gateway, tmp_path):
    (tmp_path / "page.html").write_bytes(b"<p>page")
    login = "Basic " + base64.b64encode(f"guest:{PASSWORD}".encode()).decode()
    with quick("files", ".", "--host", APP, "--basic-auth", f"guest:{PASSWORD}") as program:
        program.wait_for(rf"^https://{APP}:{gateway.public_port}$")
        assert gateway.get(APP, "/page.html")[0] == 401
        with gateway.visitor(APP) as visitor:
            visitor.request(
                "GET", "/page.html", headers={"Authorization": login, "Range": "bytes=3-"}
            )
            found = visitor.getresponse()
            assert (found.status, found.read()) == (206, b"page")
        program.signal(signal.SIGINT)
        assert program.wait() == 0


def test_what_the_gateway_refuses_ends_the_command_with_its_words(gateway):
    with quick("http", "80", "--host", "app.example.com") as program:
        program.wait_for(r"^gotunnel-agent http: the gateway refused: .*app\.example\.com")
        assert program.wait() == 1
        assert not any("next try" in line for line in program.lines)


def test_target_that_does_not_answer_yet_is_named(gateway):
    with reserved_port() as port, quick("http", str(port), "--host", APP) as program:
        program.wait_for(
            rf"nothing answers at localhost:{port} yet .*; until then visitors get an error page"
        )
        program.wait_for(rf"^https://{APP}")
        program.signal(signal.SIGHUP)
        assert program.wait() == 0


@pytest.mark.slow
@pytest.mark.parametrize("system", ["windows", "macos"])
def test_folder_is_public_from_other_systems(gateway, tmp_path, system):
    (tmp_path / "page.html").write_bytes(b"<p>page")
    words = (str(ROOT / "tests" / "other_systems.py"), system, "gotunnel_agent", "files")
    variables = ("GOTUNNEL_CONFIG", "XDG_STATE_HOME")
    environment = {name: os.environ[name] for name in variables}
    with running(sys.executable, *words, cwd=tmp_path, **environment) as program:
        host = program.wait_for(r"^https://(.+?):[0-9]+$")[1]
        assert gateway.get(host, "/page.html") == (200, b"<p>page")
        assert b"page.html" in gateway.get(host)[1]
