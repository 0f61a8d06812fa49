"""YAML for configurations that people write: every scalar is the text that was typed, and no key
comes twice.

``secret: 012`` is those three characters, and no hostname turns into a number or a date. A value
that is left out is None. What a number or a boolean is, the reader decides key by key.

No text of a YamlError shows a value: it may be a secret.
"""

import difflib
import re
from collections.abc import Iterable, Mapping

import yaml

# As in YAML 1.1; any case.
BOOLEANS = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}
NULLS = ("", "~", "null", "Null", "NULL")  # YAML's ways to write no value, unless quoted
_MOST_COMPARED = 100  # characters of a key that known ones are compared with: it takes their square


class YamlError(Exception):
    """A text that is not such YAML; one line that says where, what came and what was expected."""


def load(text: str, *, plain: bool = True) -> object:
    """The document in ``text``: mappings, lists, text and None.

    ``plain``: without aliases, of which some lines can stand for gigabytes, and without tags. Else
    aliases are followed, and tags such as ``!!python/object`` mean nothing.
    Raises YamlError; RecursionError if lists or mappings lie too deep in each other.
    """
    return _read(yaml.load, text, _PlainLoader if plain else _Loader)


def compose(text: str) -> yaml.Node | None:
    """The root of the plain document in ``text``, with the lines that each node takes; None if it
    is empty. Raises as load() does."""
    return _read(yaml.compose, text, _PlainLoader)


def unknown_key(mapping: Mapping[str, object], known: Iterable[str]) -> str | None:
    """A text about the first key that is not among ``known``, None if all are."""
    for key in mapping:
        if key not in known:
            near = difflib.get_close_matches(key[:_MOST_COMPARED], known, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"expected one of {', '.join(known)}"
            return f"unknown key{_shown_key(key)}, {hint}"
    return None


def kind(value: object) -> str:
    """What a value is, in the reader's words."""
    if value is None:
        return "no value"
    return {dict: "a mapping", list: "a list", str: "text"}[type(value)]


class _Loader(yaml.BaseLoader):
    def construct_scalar(self, node):
        if node.style is None and node.value in NULLS:  # style None: without quotes
            return None
        return super().construct_scalar(node)

    def construct_mapping(self, node, deep=False):
        mapping = {}
        for key_node, value_node in node.value:
            key = key_node.value
            if not isinstance(key, str):
                raise _at(key_node.start_mark, "a list or mapping as a key, expected text")
            if key in mapping:
                raise _at(key_node.start_mark, f"key{_shown_key(key)} came before, expected once")
            mapping[key] = self.construct_object(value_node, deep)
        return mapping


class _PlainLoader(_Loader):
    def compose_node(self, parent, index):
        event = self.peek_event()
        if isinstance(event, yaml.AliasEvent):
            raise _at(event.start_mark, "an alias came (*), expected the value itself")
        if event.tag not in (None, "!"):
            raise _at(event.start_mark, "a tag came (!), expected the value alone")
        return super().compose_node(parent, index)


def _read(function, text, loader):
    try:
        return function(text, Loader=loader)
    except yaml.MarkedYAMLError as error:
        problem = ", ".join(filter(None, (error.context, error.problem)))
        # Names out of the file are left out, '<token>' and '\t' stay: an unquoted secret that
        # begins with * or ! would show.
        problem = re.sub(r" '[^'<\\]{2,}'", "", problem)
        raise _at(error.problem_mark or error.context_mark, f"not YAML, {problem}") from None
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        column = error.position - text.rfind("\n", 0, error.position)
        raise YamlError(
            f"line {line}, column {column}: not YAML, an unprintable character"
        ) from None
    except (ValueError, OverflowError):  # PyYAML's chr() of a \U escape
        raise YamlError("not YAML, an escape sequence of no character") from None


def _at(mark, message):
    return YamlError(f"line {mark.line + 1}, column {mark.column + 1}: {message}")


def _shown_key(key):
    """A key for a message, unless it may hold a value: in {key:value} the blank is missing that
    would make two of it, and the value may be a secret."""
    return f" {key!a}" if re.fullmatch(r"[\w.-]{1,24}", key) else " with other characters in it"
