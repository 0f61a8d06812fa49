"""Reads YAML that people write as configuration: every scalar is the text that was typed, and a key
that comes twice is an error.

``secret: 012`` is those three characters, and no hostname turns into a number or a date. A missing
value is None. The caller decides for each key whether its text is a number or a boolean.

No YamlError shows a value, since it may be a secret.
"""

import re
from collections.abc import Callable, Hashable, Iterable, Mapping
from typing import Protocol, TypeVar

import yaml

from .nearest import nearest

T = TypeVar("T")

# As in YAML 1.1; any case.
BOOLEANS = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}
NULLS = ("", "~", "null", "Null", "NULL")  # unquoted, these mean "no value"
_MOST_COMPARED = 100  # characters of a key compared with known ones: the time for it is quadratic
_KINDS: dict[type, str] = {dict: "a mapping", list: "a list", str: "text", type(None): "no value"}


class YamlError(Exception):
    """A text breaks these rules; one line that says where, what came and what was expected.
    ``line`` counts from 0; None if it is not known."""

    def __init__(self, text: str, line: int | None = None):
        super().__init__(text)
        self.line = line


def load(text: str, *, plain: bool = True) -> object:
    """The document in ``text``: mappings, lists, text and None.

    ``plain``: aliases are refused, since a few lines of them can stand for gigabytes ("billion
    laughs"), and so are tags. Else aliases are followed, and tags such as ``!!python/object`` are
    ignored. Raises YamlError; RecursionError if lists or mappings are nested too deeply.
    """
    return _read(yaml.load, text, _PlainLoader if plain else _Loader)


def compose(text: str) -> yaml.Node | None:
    """The root node of the plain document in ``text``; nodes know their lines. None for an empty
    document. Raises as load() does."""
    return _read(yaml.compose, text, _PlainLoader)


def unknown_key(mapping: Mapping[str, object], known: Iterable[str]) -> str | None:
    """An error text about the first key that is not among ``known``; None if all are."""
    for key in mapping:
        if key not in known:
            near = nearest(key[:_MOST_COMPARED], known)
            hint = f"did you mean {near!r}?" if near else f"expected one of {', '.join(known)}"
            return f"unknown key{_shown_key(key)}, {hint}"
    return None


def kind(value: object) -> str:
    """What a value of load() is, in words for an error text."""
    return _KINDS[type(value)]


class _Mark(Protocol):
    """A place in the text, counted from 0. PyYAML has two such classes, its own and libyaml's."""

    line: int
    column: int


class _Loader(yaml.BaseLoader):
    # The stubs ask for a str, PyYAML does not: its other loaders return numbers here.
    def construct_scalar(self, node: yaml.ScalarNode) -> str | None:  # type: ignore[override]
        if node.style is None and node.value in NULLS:  # style None: without quotes
            return None
        return super().construct_scalar(node)

    def construct_mapping(
        self, node: yaml.MappingNode, deep: bool = False
    ) -> dict[Hashable, object]:
        mapping: dict[Hashable, object] = {}
        for key_node, value_node in node.value:
            key = key_node.value
            if not isinstance(key, str):
                raise _at(key_node.start_mark, "a list or mapping as a key, expected text")
            if key in mapping:
                raise _at(key_node.start_mark, f"key{_shown_key(key)} comes twice, expected once")
            mapping[key] = self.construct_object(value_node, deep)
        return mapping


class _PlainLoader(_Loader):
    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        event = self.peek_event()  # type: ignore[no-untyped-call]  # the stubs leave it untyped
        if isinstance(event, yaml.AliasEvent):
            raise _at(event.start_mark, "an alias came (*), expected the value itself")
        if event.tag not in (None, "!"):
            raise _at(event.start_mark, "a tag came (!), expected the value without it")
        return super().compose_node(parent, index)


def _read(function: Callable[..., T], text: str, loader: type[_Loader]) -> T:
    try:
        return function(text, Loader=loader)
    except yaml.MarkedYAMLError as error:
        problem = ", ".join(filter(None, (error.context, error.problem)))
        # PyYAML quotes names from the file, and an unquoted secret that begins with * or ! would be
        # one: they are removed. Its own words, such as '<token>' and '\t', stay.
        problem = re.sub(r" '[^'<\\]{2,}'", "", problem)
        raise _at(error.problem_mark or error.context_mark, f"not YAML, {problem}") from None
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        column = error.position - text.rfind("\n", 0, error.position)
        raise YamlError(
            f"line {line}, column {column}: not YAML, an unprintable character", line - 1
        ) from None
    except (ValueError, OverflowError):  # from PyYAML's chr() of a \U escape
        raise YamlError("not YAML, an escape sequence that names no character") from None


def _at(mark: _Mark | None, message: str) -> YamlError:
    where = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
    return YamlError(where + message, mark.line if mark else None)


def _shown_key(key: str) -> str:
    """A key for a message, unless it may hold a value: ``{key:value}``, without a blank after the
    colon, is one key, and the value in it may be a secret."""
    return f" {key!a}" if re.fullmatch(r"[\w.-]{1,24}", key) else " with other characters in it"
