"""The parser of both programs' command lines."""

import pytest

from gotunnel_agent.common.arguments import OneLineParser


def error_of(parser, capsys, *words):
    with pytest.raises(SystemExit) as caught:
        parser.parse_args(words)
    assert caught.value.code == 2
    return capsys.readouterr().err


def test_an_error_is_one_line_that_names_the_help(capsys):
    parser = OneLineParser("tool")
    parser.add_subparsers(dest="command").add_parser("run").add_argument("FILE")
    assert error_of(parser, capsys, "run") == (
        "tool run: error: the following arguments are required: FILE; "
        "`tool run --help` explains the arguments\n"
    )


@pytest.mark.parametrize("message", ["no FILE; name one", "no FILE, --help shows how"])
def test_an_error_that_has_advice_gets_no_more(message, capsys):
    with pytest.raises(SystemExit):
        OneLineParser("tool").error(message)
    assert capsys.readouterr().err == f"tool: error: {message}\n"
