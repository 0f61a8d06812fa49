"""Options that the gateway does not have: the setting that was meant is named."""

import pytest

from gotunnel_server import cli
from gotunnel_server.config import NAMES
from gotunnel_server.no_option import MEANT, NO_EXAMPLE

SECRET = "correct-horse-battery-staple"


def refusal(capsys, *arguments):
    with pytest.raises(SystemExit) as ended:
        cli.parse(arguments)
    assert ended.value.code == 2
    return capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ("--port 443", "there is no option --port: .* Set GATEWAY_PORT=443 there"),
        ("--port=443", "Set GATEWAY_PORT=443 there"),
        ("--GATEWAY_PORT 443", "Set GATEWAY_PORT=443 there"),
        ("check --port 443", "Set GATEWAY_PORT=443 there"),
        ("--tunnel-port 9443", "Set TUNNEL_PORT=9443 there"),
        ("--domain gw.example.com", "Set GATEWAY_HOST=gw.example.com there"),
        ("--bind 127.0.0.1", "Set BIND=127.0.0.1 there"),
        ("--email me@example.com", "Set ACME_EMAIL=me@example.com there"),
        ("--log-levl debug", "Set LOG_LEVEL there"),
        ("--staging", "Set ACME_ENV there"),
        (f"--secret {SECRET}", "Set JWT_SECRET there"),
        (f"--dashboard-password={SECRET}", "Set DASHBOARD_PASSWORD there"),
        ("token --hosts a.b --ttl 1h --email x@y.z", "Set ACME_EMAIL=x@y.z there"),
    ],
)
def test_option_that_is_a_setting_is_answered_with_it(capsys, arguments, said):
    line = refusal(capsys, *arguments.split())
    before, _, after = said.partition(" .* ")
    assert before in line and after in line and SECRET not in line
    assert "settings are environment variables, or lines of the file .env" in line
    assert "gotunnel-server --print-example" in line


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ("--frobnicate", "unrecognized arguments: --frobnicate"),
        ("chekc", "there is no command 'chekc', did you mean check?"),
        ("add desk", "there is no command add: did you mean agents add?"),
        ("join x", "there is no command join: that is one of gotunnel, on the agent's machine"),
        ("agents help", "there is no command help: --help shows all"),
        ("agents ad x", "there is no command 'ad', did you mean add?"),
        ("start", "there is no command start: gotunnel-server alone, without a command, runs the"),
        ("--host a.b init", "--host is an option of init: write it behind that"),
        ("init --hostname a.b", "there is no option --hostname, did you mean --host?"),
        (f"init --secret {SECRET}", "no option --secret, did you mean --set JWT_SECRET=VALUE?"),
        ("frobnicate", "invalid choice: 'frobnicate'"),
        (f"gotunnel://a:{SECRET}@h:1", "invalid choice: 'gotunnel://...'"),
        (f"agents add gotunnel://a:{SECRET}@h:1 --hosts a.b", "NAME: 'gotunnel://...' came"),
        ("agents add x --port 1", "the following arguments are required: --hosts"),
    ],
)
def test_other_mistakes_are_answered_with_what_was_meant_or_as_ever(capsys, arguments, said):
    line = refusal(capsys, *arguments.split())
    assert said in line and SECRET not in line


def test_all_that_is_meant_is_a_setting():
    assert {*MEANT.values()} | NO_EXAMPLE <= NAMES
