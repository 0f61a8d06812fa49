"""Header lists of answers in HPACK (RFC 7541), in its simplest form.

Only the static table is used, and no string is compressed (Huffman). A dynamic table would save
some hundred bytes an answer, and cost a visit more than all else of HTTP/2 here: a fifth of its CPU
time. It would also remember one answer's values while others are compressed, so that a visitor
could guess them by the size (RFC 7541 §7.1). What visitors send is read by the library hpack.
"""

from collections.abc import Iterable

from hpack.table import HeaderTable

_WITHOUT_INDEXING, _NEVER_INDEXED, _INDEXED = 0x00, 0x10, 0x80  # first bits of a field (§6)
# The first block begins with the size of our dynamic table, 0 (§6.3). So the visitor may choose any
# limit for it later.
NO_TABLE = b"\x20"


def _integer(value: int, prefix: int, first: int) -> bytes:
    """An integer whose first byte has ``prefix`` bits for it, behind those of ``first`` (§5.1)."""
    most = (1 << prefix) - 1
    if value < most:
        return bytes((first | value,))
    data = bytearray((first | most,))
    value -= most
    while value >= 128:
        data.append(value & 127 | 128)
        value >>= 7
    data.append(value)
    return bytes(data)


def _string(value: bytes) -> bytes:
    size = len(value)
    return _LENGTHS[size] + value if size < 127 else _integer(size, 7, 0) + value


_LENGTHS = [bytes((size,)) for size in range(127)]
_WHOLE: dict[tuple[bytes, bytes], bytes] = {}  # a field that is in the static table
_NAMED: dict[bytes, bytes] = {}  # the beginning of a field whose name is in it
_NAMES: dict[bytes, int] = {}
for _number, (_name, _value) in enumerate(HeaderTable.STATIC_TABLE, start=1):
    _WHOLE[_name, _value] = _integer(_number, 7, _INDEXED)
    if _name not in _NAMES:
        _NAMES[_name] = _number
        _NAMED[_name] = _integer(_number, 4, _WITHOUT_INDEXING)
# Secrets: proxies on the way must not put them into a table either.
_NAMED[b"set-cookie"] = _integer(_NAMES[b"set-cookie"], 4, _NEVER_INDEXED)


def encode(block: Iterable[tuple[bytes, bytes]]) -> bytes:
    """The block's bytes. Names are in lower case."""
    parts = []
    for item in block:
        whole = _WHOLE.get(item)
        if whole is not None:
            parts.append(whole)
            continue
        name, value = item
        begin = _NAMED.get(name)
        parts.append(b"\x00" + _string(name) if begin is None else begin)
        parts.append(_string(value))
    return b"".join(parts)
