"""Header lists in HPACK (RFC 7541): those of requests are read, those of answers are written.

Text is latin-1, as in http1.py: each byte is one character.

**Reading.** `Decoder` keeps the dynamic table of one connection. It is our own, since the library
hpack takes four times as long; of that library are the static table and the Huffman code. The
promise: whatever bytes come, decode() returns a header list or raises one of BROKEN or TooLarge.

**Writing** is HPACK in its simplest form. Only the static table is used, and no string is
compressed (Huffman). A dynamic table would save some hundred bytes an answer, and cost a visit more
than all else of HTTP/2 here: a fifth of its CPU time. It would also remember one answer's values
while others are compressed, so that a visitor could guess them by the size (RFC 7541 §7.1).
"""

from collections.abc import Iterable

from hpack.exceptions import HPACKError
from hpack.huffman_table import decode_huffman
from hpack.table import HeaderTable

Field = tuple[str, str]

ENTRY = 32  # what a field counts beside the bytes of its name and value (§4.1)
TABLE_SIZE = 4096  # of the dynamic table, counted likewise: SETTINGS_HEADER_TABLE_SIZE's default
# First bits of a field's representation (§6). The bits behind them are the index.
_INDEXED, _WITH_INDEXING, _SIZE_UPDATE, _NEVER_INDEXED = 0x80, 0x40, 0x20, 0x10
_WITHOUT_INDEXING = 0x00
_HUFFMAN = 0x80  # first bit of a string (§5.2)
# Bits of an integer in its further bytes, at most: more than any index or length can have.
_MOST_SHIFT = 28

# The static table by index. There is no index 0.
_STATIC: list[Field] = [("", "")]
_STATIC += [(name.decode(), value.decode()) for name, value in HeaderTable.STATIC_TABLE]
_FIRST_DYNAMIC = len(_STATIC)


class TooLarge(Exception):
    """A header list is larger than the limit. The decoder cannot be used any more."""


# What decode() raises for a block that breaks the rules.
BROKEN = HPACKError, IndexError, ValueError


class Decoder:
    """Reads the header blocks of one connection, which must come in order. After an exception it
    cannot be used any more."""

    def __init__(self, limit: int):
        """``limit``: bytes of a header list, as its size counts them."""
        self._limit = limit
        # Both tables by index (§2.3.3): the static one, and the dynamic one, whose latest entry
        # comes first.
        self._table = _STATIC.copy()
        self._size = 0  # of the dynamic table
        self._most = TABLE_SIZE  # it may have, as the visitor wishes

    def decode(self, data: bytes) -> tuple[list[Field], int]:
        """The header list of a block, and its size (RFC 9113 §10.5.1)."""
        fields: list[Field] = []
        table, end = self._table, len(data)
        at = size = 0
        while at < end:
            first = data[at]
            at += 1
            if first >= _INDEXED:
                index = first & 0x7F
                if index == 0x7F:
                    index, at = _rest(index, data, at)
                if not index:
                    raise ValueError("index 0")
                name, value = field = table[index]
            elif first & 0xE0 == _SIZE_UPDATE:
                most = first & 0x1F
                if most == 0x1F:
                    most, at = _rest(most, data, at)
                if fields or most > TABLE_SIZE:
                    raise ValueError("a table size that is too large, or behind a field")
                self._most = most
                self._shrink()
                continue
            else:
                mask = 0x3F if first >= _WITH_INDEXING else 0x0F
                index = first & mask
                if index == mask:
                    index, at = _rest(index, data, at)
                if index:
                    name = table[index][0]
                else:
                    name, at = _string(data, at)
                value, at = _string(data, at)
                field = name, value
                if first >= _WITH_INDEXING:
                    self._add(field)
            fields.append(field)
            size += len(name) + len(value) + ENTRY
            if size > self._limit:
                raise TooLarge
        return fields, size

    def _add(self, field: Field) -> None:
        """A field that is larger than the whole table empties it (§4.4)."""
        self._table.insert(_FIRST_DYNAMIC, field)
        self._size += len(field[0]) + len(field[1]) + ENTRY
        self._shrink()

    def _shrink(self) -> None:
        while self._size > self._most:
            name, value = self._table.pop()
            self._size -= len(name) + len(value) + ENTRY


def _rest(value: int, data: bytes, at: int) -> tuple[int, int]:
    """The rest of an integer whose first byte is full (§5.1), and the offset behind it."""
    shift = 0
    while True:
        byte = data[at]
        at += 1
        value += (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
        shift += 7
        if shift > _MOST_SHIFT:
            raise ValueError("an integer of too many bytes")


def _string(data: bytes, at: int) -> tuple[str, int]:
    """A string (§5.2), and the offset behind it."""
    first = data[at]
    at += 1
    size = first & 0x7F
    if size == 0x7F:
        size, at = _rest(size, data, at)
    behind = at + size
    if behind > len(data):
        raise ValueError("a string that is longer than its block")
    value = data[at:behind]
    if first & _HUFFMAN:
        value = decode_huffman(value)
    return value.decode("latin-1"), behind


# Writing

# The first block begins with the size of our dynamic table, 0 (§6.3). So the visitor may choose any
# limit for it later.
NO_TABLE = b"\x20"


def _integer(value: int, prefix: int, first: int) -> str:
    """An integer whose first byte has ``prefix`` bits for it, behind those of ``first`` (§5.1)."""
    most = (1 << prefix) - 1
    if value < most:
        return chr(first | value)
    text = chr(first | most)
    value -= most
    while value >= 128:
        text += chr(value & 127 | 128)
        value >>= 7
    return text + chr(value)


def _string_of(value: str) -> str:
    return _integer(len(value), 7, 0) + value


_LENGTHS = [_integer(size, 7, 0) for size in range(256)]  # what a string begins with
_WHOLE: dict[Field, str] = {}  # a field that is in the static table
_NAMED: dict[str, str] = {}  # the beginning of a field whose name is in it
for _index, (_name, _value) in enumerate(_STATIC[1:], start=1):
    _WHOLE[_name, _value] = _integer(_index, 7, _INDEXED)
    _NAMED.setdefault(_name, _integer(_index, 4, _WITHOUT_INDEXING))
# Secrets: proxies on the way must not put them into a table either.
_NAMED["set-cookie"] = _integer(_STATIC.index(("set-cookie", "")), 4, _NEVER_INDEXED)


def encode(block: Iterable[Field]) -> bytes:
    """The block's bytes. Names are in lower case."""
    text = ""
    for field in block:
        whole = _WHOLE.get(field)
        if whole is not None:
            text += whole
            continue
        name, value = field
        text += _NAMED.get(name) or _integer(0, 4, _WITHOUT_INDEXING) + _string_of(name)
        size = len(value)
        text += _LENGTHS[size] + value if size < len(_LENGTHS) else _string_of(value)
    return text.encode("latin-1")
