"""What `gotunnel inspect` writes, from documents of the API."""

import pytest
from inspector_samples import a_record

from gotunnel_agent.common.cells import width
from gotunnel_agent.inspector.api import detail, summary
from gotunnel_agent.inspector.compare import compare
from gotunnel_agent.inspector.lines import (
    Paper,
    clock,
    comparison_lines,
    replay_lines,
    row,
    table,
    visit_lines,
)
from gotunnel_agent.inspector.record import OPEN, Kept, Message

# What a stranger may send: control sequences, a mark that turns the direction of writing, a name
# that is wide, marks on top of each other, half a pair.
HOSTILE = "\x1b]0;owned\x07\x9b31m\u202egpj.exe\r\n日本語" + "e" + "\u0301" * 50 + "\ud800"
REPLAY = {
    "id": 3, "record": 12, "state": "ended", "text": "ended, 3 of 3 tries: 2 x 200, 1 x 500",
    "done": 3, "notes": ["Expect is left out"], "groups": [
        {"record": 13, "count": 2, "status": 200, "problem": "", "size": 17, "mixed": False,
         "least_ms": 1.2, "most_ms": 2500.0},
        {"record": 15, "count": 1, "status": 0, "problem": "no answer", "size": 0, "mixed": False,
         "least_ms": 0.5, "most_ms": 0.5},
    ],
}  # fmt: skip


def a_visit(**named):
    return summary(a_record(**named))


def test_a_table_has_a_line_for_each_visit():
    visits = [a_visit(), a_visit(method="POST", path="/hook", status=500), a_visit(status=0)]
    lines = list(table(visits, Paper()))
    assert [line.split() for line in lines] == [
        ["ID", "TIME", "METHOD", "STATUS", "TOOK", "SIZE", "HOST", "AND", "PATH"],
        ["0", clock(1_700_000_000), "GET", "200", "12", "ms", "2", "B", "app.example.com/"],
        ["0", clock(1_700_000_000), "POST", "500", "12", "ms", "2", "B", "app.example.com/hook"],
        ["0", clock(1_700_000_000), "GET", "-", "12", "ms", "0", "B", "app.example.com/"],
    ]
    assert list(table([], Paper())) == []


def test_columns_stand_below_each_other():
    lines = list(table([a_visit(), a_visit(method="PROPPATCH", id=12345)], Paper()))
    assert (
        len({line.rindex("app.ex") if "app" in line else line.index("HOST") for line in lines}) == 1
    )


def test_an_open_visit_a_replay_and_a_problem_are_said_so():
    assert " open " in row(a_visit(state=OPEN, duration=None), Paper())
    line = row(a_visit(replay_of=7, imported=True, problem="cut short"), Paper())
    assert line.endswith("(replay of 7; imported; cut short)")


@pytest.mark.parametrize("columns", [1, 40, 41, 60, 80, 200])
def test_a_line_is_no_wider_than_the_terminal(columns):
    wide = a_visit(problem="it was cut short " * 20, method="PROPPATCH")
    wide["path"] = "/日本" * 200
    for line in [*table([wide, a_visit()], Paper(columns)), row(wide, Paper(columns))]:
        assert width(line) <= max(columns, 40)
    assert "(it was" in row(wide, Paper(80)) and "app" in row(wide, Paper(40))


def test_nothing_is_cut_for_a_pipe():
    assert row(a_visit(path="/" + "x" * 5000), Paper()).endswith("x" * 2000)


def hostile_visit():
    record = a_record(
        "POST", asked=HOSTILE.encode("utf-8", "surrogatepass"), problem=HOSTILE,
        hostname=HOSTILE, target=HOSTILE, visitor=HOSTILE, request_trailers=((HOSTILE, "é\x1b"),),
    )  # fmt: skip
    record.path = HOSTILE.encode("utf-8", "surrogatepass").decode("latin-1")
    record.request_head = b"POST /\x1b[2J HTTP/1.1\r\nX\x1b: \x9b\xff\x00\r\n folded\r\n\r\n"
    record.response_head = b"HTTP/1.1 200 \x1b[31m\nno colon \x07\n\n"
    record.add_message(Message(1e300, True, HOSTILE, b"\x1b[2J\xe2\x80\xae", 7, HOSTILE), 1 << 20)
    record.add_message(Message(0, False, "binary", b"\xff\xfe", 2), 1 << 20)
    return record


@pytest.mark.parametrize("unmask", [False, True])
def test_no_text_of_a_stranger_acts_on_the_terminal(unmask):
    record, other = hostile_visit(), a_record()
    document = detail(record, unmask)
    replay = REPLAY | {"text": HOSTILE, "notes": [HOSTILE], "id": HOSTILE}
    replay["groups"][1]["problem"] = HOSTILE
    for lines in (
        table([summary(record)], Paper(80)),
        visit_lines(document, Paper()),
        visit_lines(document, Paper(60)),
        comparison_lines(compare(record, other, unmask), Paper(80)),
        comparison_lines(compare(other, record, unmask), Paper()),
        replay_lines(replay, Paper()),
    ):
        for line in lines:
            assert all(character.isprintable() or character in "\u0301" for character in line)


def test_a_visit_is_shown_with_heads_bodies_and_messages():
    record = a_record(
        "POST", "/hook", asked=b'{"b":[1]}', fields=["Content-Type: application/json"]
    )
    record.add_message(Message(1_700_000_000, True, "text", b"hello", 5), 1 << 20)
    record.add_message(Message(1_700_000_000, False, "binary", b"\xff", 1, "cut"), 1 << 20)
    lines = list(visit_lines(detail(record), Paper()))
    text = "\n".join(lines)
    assert "POST /hook HTTP/1.1" in lines and "Content-Type: application/json" in lines
    assert '{\n  "b": [\n    1\n  ]\n}' in text
    assert "HTTP/1.1 200 Some Reason" in lines and "ok" in lines
    assert "> text    hello" in text and "< binary  1 bytes  (cut)" in text
    assert "secrets are masked" not in text
    record = a_record(fields=["Cookie: session=s3cret"])
    assert "secrets are masked" in "".join(visit_lines(detail(record), Paper()))
    assert "secrets are masked" not in "".join(visit_lines(detail(record, True), Paper()))


def test_a_body_that_was_not_kept_whole_is_said_so():
    record = a_record(answered=Kept(b"abc", 900))
    assert any("the first 3 of 900 bytes" in line for line in visit_lines(detail(record), Paper()))


def test_a_visit_without_an_answer_is_shown():
    lines = list(visit_lines(detail(a_record(status=0, problem="no answer")), Paper()))
    assert "no answer" in lines and "response: none" in lines


def test_the_answers_of_a_replay_stand_side_by_side():
    lines = list(replay_lines(REPLAY, Paper()))
    assert lines[0] == "note: Expect is left out"
    assert lines[1] == "replay 3 of visit 12: ended, 3 of 3 tries: 2 x 200, 1 x 500"
    assert lines[3].split() == ["2", "200", "17", "B", "1", "ms", "-", "2.5", "s", "13"]


def test_a_comparison_shows_what_differs():
    left = a_record("POST", status=500, asked=b"a\nb", answered=b'{"a": 1}', answer_fields=["X: 1"])
    right = a_record(
        "POST", status=200, asked=b"a\nc", answered=b'{"a": 2}', answer_fields=["X: 2"]
    )
    lines = list(comparison_lines(compare(left, right), Paper()))
    assert lines[0] == "visit 0 and visit 0: the answers differ"
    for line in ("- HTTP/1.1 500 Some Reason", "+ HTTP/1.1 200 Some Reason", "- X: 1", "+ X: 2",
                 "  $.a", "  - 1", "  + 2", "  - b", "  + c"):  # fmt: skip
        assert line in lines
    assert list(comparison_lines(compare(left, left), Paper())) == [
        "visit 0 and visit 0: the answers are equal"
    ]


def test_colours_are_written_around_safe_texts():
    assert "\x1b[1;31m" in row(a_visit(status=500, problem="x"), Paper(80, colours=True))
    assert "\x1b" not in row(a_visit(status=500), Paper(80))


@pytest.mark.parametrize("at", [1e300, float("nan"), float("inf"), -1e20, None, "x"])
def test_a_time_that_is_none_is_shown_as_such(at):
    assert clock(at) == "--:--:--"
