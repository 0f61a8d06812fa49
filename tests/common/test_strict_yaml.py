"""YAML whose scalars stay as they were typed, and whose errors name the place."""

import pytest

from gotunnel_agent.common.strict_yaml import YamlError, compose, kind, load, unknown_key


@pytest.mark.parametrize("plain", [True, False])
def test_scalars_are_the_text_that_was_typed(plain):
    text = "a: 012\nb: 2026-01-01\nc: yes\nd: 1_000\ne: '~'\nf: ~\ng:\nh: [NULL, 'null']\n<<: 1\n"
    assert load(text, plain=plain) == {
        "a": "012", "b": "2026-01-01", "c": "yes", "d": "1_000", "e": "~", "f": None, "g": None,
        "h": [None, "null"], "<<": "1",
    }  # fmt: skip


@pytest.mark.parametrize("plain", [True, False])
@pytest.mark.parametrize("text", ["", "# nothing\n"])
def test_empty_document_is_none(text, plain):
    assert load(text, plain=plain) is None
    assert compose(text) is None


@pytest.mark.parametrize("plain", [True, False])
@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a: 1\na: 2\n", "line 2, column 1: key 'a' comes twice, expected once"),
        ("x: {a: 1, a: 2}\n", "line 1, column 11: key 'a' comes twice, expected once"),
        ("{a:secret: 1, a:secret: 2}", "line 1, column 15: key with other characters in it comes "),
        ("? [a]\n: b\n", "line 1, column 3: a list or mapping as a key, expected text"),
        ("a: b: c\n", "line 1, column 5: not YAML, mapping values are not allowed here"),
        ("a: 1\nb: \x07\n", "line 2, column 4: not YAML, an unprintable character"),
        ("\x07", "line 1, column 1: not YAML, an unprintable character"),
        ("--- a\n--- b\n", "line 2, column 1: not YAML, expected a single document in the stream"),
        ('"\\UFFFFFFFF"\n', "not YAML, an escape sequence that names no character"),
    ],
)
def test_error_says_where_and_shows_no_value(text, expected, plain):
    with pytest.raises(YamlError) as caught:
        load(text, plain=plain)
    assert str(caught.value).startswith(expected)
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize("typed", ["*secret", "!secret!x y", "'secret", '"secret', "|secret"])
@pytest.mark.parametrize("plain", [True, False])
def test_secret_that_is_no_yaml_is_not_shown(typed, plain):
    with pytest.raises(YamlError) as caught:
        load(f"a: {typed}\n", plain=plain)
    assert "secret" not in str(caught.value)


def test_plain_document_has_no_alias_and_no_tag():
    for text, expected in (
        ("a: &x 1\nb: *x\n", "line 2, column 4: an alias came"),
        ("a: !vault 1\n", "line 1, column 4: a tag came"),
        ("a: !!python/object:os.system {}\n", "line 1, column 4: a tag came"),
    ):
        for read in (lambda text: load(text, plain=True), compose):
            with pytest.raises(YamlError, match=expected):
                read(text)


def test_other_document_follows_aliases_and_passes_over_tags():
    text = "a: &x 1\nb: *x\nc: !!int 2\nd: !!python/name:os.system x\n"
    assert load(text, plain=False) == {"a": "1", "b": "1", "c": "2", "d": "x"}


@pytest.mark.parametrize("opening", ["[", "{a: ", "- "])
def test_deep_nesting_is_a_recursion_error(opening):
    with pytest.raises(RecursionError):
        load(opening * 20_000, plain=True)


def test_unknown_key_is_named_with_its_nearest_or_all_known_ones():
    known = ("secret", "hosts")
    assert unknown_key({"secret": "1", "hosts": "2"}, known) is None
    assert unknown_key({"host": ""}, known) == "unknown key 'host', did you mean 'hosts'?"
    assert unknown_key({"zzz": ""}, known) == "unknown key 'zzz', expected one of secret, hosts"
    assert unknown_key({"secret:S": ""}, known) == (
        "unknown key with other characters in it, did you mean 'secret'?"
    )


def test_kinds_of_value_in_the_readers_words():
    kinds = [kind(value) for value in (None, {}, [], "")]
    assert kinds == ["no value", "a mapping", "a list", "text"]
