"""Comparisons of two records, by values. Hostile bodies cost little time."""

import json
import random
from time import process_time

import pytest
from inspector_samples import a_record

from gotunnel_agent.inspector import compare as compare_module
from gotunnel_agent.inspector.compare import (
    compare,
    first_difference,
    json_diff,
    key_of,
    text_diff,
)
from gotunnel_agent.inspector.record import Kept

JSON = ["Content-Type: application/json"]


def answers(left, right, *, unmask=False, **named):
    return compare(a_record(answered=left, **named), a_record(answered=right, **named), unmask)


# Records -----------------------------------------------------------------------------------------


def test_equal_records_are_the_same():
    document = compare(a_record(), a_record())
    assert document["same"] and document["request"]["same"] and document["response"]["same"]
    assert document["response"]["fields"] == [] and document["response"]["body"]["same"]


def test_another_status_is_told():
    document = compare(a_record(status=500), a_record(status=200))
    assert document["response"]["status"] == {"same": False, "left": 500, "right": 200}
    assert not document["same"] and document["request"]["same"]


def test_fields_are_added_removed_and_changed():
    left = a_record(answer_fields=["A: 1", "B: 1", "C: 1", "C: 2", "D: same"])
    right = a_record(answer_fields=["b: 2", "C: 1", "C: 3", "D: same", "E: 1"])
    assert compare(left, right)["response"]["fields"] == [
        {"name": "A", "change": "removed", "left": ["1"], "right": [], "usual": False},
        {"name": "B", "change": "changed", "left": ["1"], "right": ["2"], "usual": False},
        {"name": "C", "change": "changed", "left": ["1", "2"], "right": ["1", "3"], "usual": False},
        {"name": "E", "change": "added", "left": [], "right": ["1"], "usual": False},
    ]


def test_a_date_makes_no_two_answers_unequal():
    left, right = (a_record(answer_fields=[f"Date: {day}"]) for day in ("Monday", "Tuesday"))
    document = compare(left, right)
    assert document["same"] and document["response"]["fields"][0]["usual"]
    assert key_of(left) == key_of(right)


@pytest.mark.parametrize(
    "other",
    [
        a_record(status=201), a_record(answered=b"no"), a_record(problem="cut short"),
        a_record(answer_fields=["X: 1"]), a_record(answered=Kept(b"ok", 9)),
    ],
)  # fmt: skip
def test_unequal_answers_have_unequal_keys(other):
    assert key_of(a_record()) != key_of(other)


def test_an_edited_request_is_compared_as_well():
    left = a_record("POST", "/a", asked=b"1\n2\n", fields=["X: 1"])
    right = a_record("PUT", "/b", asked=b"1\n3\n", fields=["X: 2"])
    request = compare(left, right)["request"]
    assert request["line"] == {
        "same": False, "left": "POST /a HTTP/1.1", "right": "PUT /b HTTP/1.1",
    }  # fmt: skip
    assert [field["name"] for field in request["fields"]] == ["X"]
    assert request["body"]["lines"] == [[" ", "1"], ["-", "2"], ["+", "3"]]


def test_heads_that_break_rules_are_compared_as_far_as_they_go():
    left, right = a_record(), a_record()
    left.response_head = b"\xff\x00\nno colon\n: \nA:\t1\r\r\n\n"
    right.response_head = b""
    names = [field["name"] for field in compare(left, right)["response"]["fields"]]
    assert "A" in names


# Secrets -----------------------------------------------------------------------------------------


def test_masked_values_differ_without_being_shown():
    left = a_record(fields=["Authorization: Bearer aaaaaaaa"], path="/?token=one")
    right = a_record(fields=["Authorization: Bearer bbbbbbbb"], path="/?token=two")
    text = json.dumps(compare(left, right))
    assert '"Authorization"' in text and "aaaa" not in text and "one" not in text
    assert not compare(left, right)["request"]["line"]["same"]
    assert "aaaa" in json.dumps(compare(left, right, True))


def test_bodies_that_differ_in_masked_values_say_so():
    bodies = [json.dumps({"password": secret}).encode() for secret in ("one", "two")]
    body = answers(*bodies, answer_fields=JSON)["response"]["body"]
    assert not body["same"] and body["note"] == "they differ in masked values only"
    shown = answers(*bodies, answer_fields=JSON, unmask=True)["response"]["body"]
    assert shown["changes"] == [
        {"path": "$.password", "change": "changed", "left": '"one"', "right": '"two"'}
    ]


# Bodies ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "left, right, changes",
    [
        ({"a": 1, "b": 2}, {"a": 1, "c": 3}, ["removed $.b", "added $.c"]),
        ({"a": {"b": [1, 2]}}, {"a": {"b": [1, 3]}}, ["changed $.a.b[1]"]),
        ([1, 2, 3], [0, 1, 2, 3], ["added $[0]"]),
        ([1, 2, 3], [1, 3], ["removed $[1]"]),
        ([{"id": 1, "x": 1}, 2], [9, {"id": 1, "x": 1}, 2], ["added $[0]"]),
        ([1], [True], ["changed $[0]"]),
        ([1], [1.0], ["changed $[0]"]),
        ([None], [False], ["changed $[0]"]),
        ({"a b": 1}, {"a b": 2}, ['changed $["a b"]']),
        ([[]], [{}], ["changed $[0]"]),
    ],
)
def test_json_is_compared_by_its_structure(left, right, changes):
    found = json_diff(json.dumps(left), json.dumps(right))["changes"]
    assert [f"{change['change']} {change['path']}" for change in found] == changes


def test_values_are_shown_as_json():
    (change,) = json_diff('{"a": "ü\\u001b"}', '{"a": ["x"]}')["changes"]
    assert (change["left"], change["right"]) == ('"ü\\u001b"', '["x"]')


def test_json_in_another_order_is_not_changed():
    document = answers(b'{"a": 1, "b": [NaN]}', b'{ "b":[NaN],\n"a":1}', answer_fields=JSON)
    body = document["response"]["body"]
    assert not body["same"] and body["kind"] == "text"  # it differs in white space only
    assert json_diff('{"a": [NaN]}', '{"a":[NaN]}') is None


def test_half_a_json_document_is_compared_as_text():
    body = answers(b'{"a": 1', b'{"a": 2', answer_fields=JSON)["response"]["body"]
    assert body["lines"] == [["-", '{"a": 1'], ["+", '{"a": 2']]


def test_equal_lines_far_from_a_change_are_left_out():
    lines = [str(number) for number in range(20)]
    changed = [*lines[:10], "new", *lines[11:]]
    assert text_diff("\n".join(lines), "\n".join(changed))["lines"] == [
        ["@", "7 equal lines"], [" ", "7"], [" ", "8"], [" ", "9"], ["-", "10"], ["+", "new"],
        [" ", "11"], [" ", "12"], [" ", "13"], ["@", "6 equal lines"],
    ]  # fmt: skip


def test_two_changes_have_the_lines_between_them():
    left, right = (["a", *"123456789", "z"] for _ in range(2))
    right[0], right[-1] = "b", "y"
    lines = text_diff("\n".join(left), "\n".join(right))["lines"]
    assert [sign for sign, _ in lines] == ["-", "+", " ", " ", " ", "@", " ", " ", " ", "-", "+"]


def test_of_a_long_line_the_changed_part_is_shown():
    left, right = "x" * 5000 + "left" + "y" * 5000, "x" * 5000 + "right" + "y" * 5000
    lines = text_diff(left, right)["lines"]
    assert all(len(text) < 400 for _, text in lines)
    assert "left" in lines[0][1] and "right" in lines[1][1]


def test_line_breaks_alone_are_told():
    assert text_diff("a\nb", "a\r\nb\n")["note"] == "they differ in line breaks only"


def test_binary_bodies_have_hashes_and_the_first_difference():
    body = answers(b"\xff\x00\x01", b"\xff\x00\x02\x03")["response"]["body"]
    assert (body["kind"], body["first_difference"]) == ("binary", 2)
    assert (body["left"], body["right"]) == (3, 4)
    assert body["sha256"]["left"] != body["sha256"]["right"]


def test_a_body_that_was_not_kept_whole_is_said_so():
    body = answers(Kept(b"abc", 9), Kept(b"abc", 10))["response"]["body"]
    assert not body["same"]
    assert body["note"] == (
        "only the beginning of the left and right body was kept; what was kept is equal, the sizes "
        "are not"
    )


def test_an_empty_body_is_compared_with_text():
    assert answers(b"", b"a")["response"]["body"]["lines"] == [["+", "a"]]


@pytest.mark.parametrize(
    "left, right, at",
    [(b"", b"", 0), (b"a", b"a", 1), (b"a", b"b", 0), (b"ab", b"abc", 2), (b"abx", b"aby", 2)],
)
def test_the_first_difference(left, right, at):
    assert first_difference(left, right) == at


# Hostile -----------------------------------------------------------------------------------------


def noise(seed, alphabet, count, between):
    return between.join(random.Random(seed).choices(alphabet, k=count))


HOSTILE = {
    "lines alike": ("a\n" * 30_000, "a\nb\n" * 15_000),
    "few kinds of lines": (noise(1, "abc", 30_000, "\n"), noise(2, "abc", 30_000, "\n")),
    "many kinds of lines": (
        noise(1, [*map(str, range(90))], 20_000, "\n"),
        noise(2, [*map(str, range(90))], 20_000, "\n"),
    ),
    "empty lines": ("\n" * 60_000, "\n" * 59_000 + "x"),
    "one line": ("x" * 500_000, "x" * 499_999 + "y"),
    "deep": ("[" * 30_000 + "]" * 30_000, "[" * 30_000 + "1" + "]" * 30_000),
    "rather deep": ("[" * 900 + "]" * 900, "[" * 900 + "1" + "]" * 900),
    "long lists": (json.dumps([1] * 20_000), json.dumps([2] * 20_001)),
    "lists alike": (json.dumps([[1, 2]] * 299), json.dumps([[1, 2], [1]] * 149)),
    "lists in lists": (json.dumps([[[1] * 20] * 20] * 20), json.dumps([[[2] * 21] * 21] * 21)),
    "long number": ("[" + "1" * 60_000 + "]", "[" + "2" * 60_000 + "]"),
    "surrogates": ('["\\ud800"]', '["\\ud801"]'),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_body_costs_little(name):
    left, right = HOSTILE[name]
    began = process_time()
    body = answers(left.encode(), right.encode())["response"]["body"]
    assert process_time() - began < 3, "of the processor; it takes a tenth"
    assert not body["same"]
    assert len(body.get("lines", [])) <= compare_module.MOST_SHOWN
    assert len(body.get("changes", [])) <= compare_module.MOST_CHANGES
    assert len(json.dumps(body)) < 500_000
