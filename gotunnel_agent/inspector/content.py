"""Says how a body is best shown: as text, JSON, form fields, parts, an image or hex.

A body comes from strangers. describe() decodes it for show only, with limits for what comes out (a
zip bomb), believes no type without a look at the bytes, and returns text, never markup. It raises
nothing.
"""

from __future__ import annotations

import codecs
import importlib
import io
import json
import re
import zlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple
from urllib.parse import unquote_plus, unquote_to_bytes

from .kept import Kept

EMPTY, TEXT, JSON, FORM, MULTIPART = "empty", "text", "json", "form", "multipart"
IMAGE, SSE, HEX = "image", "sse", "hex"

MOST_DECODED = 1024 * 1024  # bytes that a compressed body may give
MOST_CODINGS = 3  # applied on each other; no server applies more than one
MOST_HEX = 4096  # bytes shown in hex: more is for another tool, which gets the raw body
MOST_FIELDS = 1000  # of a form
MOST_PARTS = 100  # of a multipart body
MOST_PART_HEAD = 8192  # bytes of a part's head
# JSON that is laid out: deeper nesting would indent to no end.
MOST_DEPTH = 60
NOT_DECODED = "not decoded"  # how notes begin that say so
MOST_NAME = 200  # characters of a name that a note repeats

# Raster images that browsers draw without running anything: type, and a test of the first bytes.
# SVG is a document with scripts, so it is shown as the text that it is.
_IMAGES: tuple[tuple[str, Callable[[bytes], bool]], ...] = (
    ("image/png", lambda data: data.startswith(b"\x89PNG\r\n\x1a\n")),
    ("image/jpeg", lambda data: data.startswith(b"\xff\xd8\xff")),
    ("image/gif", lambda data: data.startswith((b"GIF87a", b"GIF89a"))),
    ("image/webp", lambda data: data.startswith(b"RIFF") and data[8:12] == b"WEBP"),
    ("image/avif", lambda data: data[4:12] in (b"ftypavif", b"ftypavis")),
    ("image/bmp", lambda data: data.startswith(b"BM") and data[6:10] == bytes(4)),
    ("image/x-icon", lambda data: data.startswith(b"\0\0\1\0") and data[5:6] == b"\0"),
)
# Types that say nothing: the bytes decide.
_ANY = ("", "application/octet-stream", "binary/octet-stream")
_JSON_TYPE = re.compile(r"(?:application|text)/(?:[^;+]*\+)?json(?:-seq)?")
_TEXT_TYPE = re.compile(
    r"text/.*|(?:application|image)/(?:.*\+)?(?:xml|json|javascript|ecmascript|yaml|x-yaml|graphql|"
    r"x-www-form-urlencoded|sql|toml|x-ndjson|x-sh)"
)
# Encodings of text that are taken at their word. Python has others, which are none (zlib, rot13) or
# slow on hostile input (idna, punycode).
_CHARSETS = re.compile(
    r"utf-?(?:8|16|32)(?:-?[lb]e)?|ascii|iso8859-\d+|cp125\d|cp(?:437|850|866|932|949|950)|"
    r"koi8-[ru]|shift_jis|euc_(?:jp|kr)|gb(?:2312|k|18030)|big5|mac-roman|tis-620"
)
# What a text has none of. ESC is shown: logs have it.
_BINARY = re.compile(r"[\x00-\x08\x0e-\x1a\x1c-\x1f\x7f]")
_PARAMETER = re.compile(r';\s*([\w!#$%&*+.^`|~-]+)\s*=\s*("(?:[^"\\]|\\.)*"|[^;\s]*)')
_TOKENS = re.compile(r'"(?:[^"\\]|\\.)*"|[\[\]{},:]|[^\s\[\]{},:"]+')


class Part(NamedTuple):
    """A field of a form, or a part of a multipart body.

    ``text`` is its content as it is to be shown. ``filename`` and ``type`` are a part's, as it says
    them; ``kind`` is how the content is shown; ``size`` is in bytes, as it passed.
    """

    name: str
    text: str
    filename: str = ""
    type: str = ""
    kind: str = TEXT
    size: int = 0
    note: str = ""


class Shown(NamedTuple):
    """How to show a body.

    ``kind`` is one of the words above. ``text`` is the body as text: JSON laid out, an image in a
    few words, else as it is. ``parts`` are those of a form or a multipart body. ``note`` says what
    is odd, or missing. ``type`` is an image's, by its bytes.
    """

    kind: str
    text: str
    parts: tuple[Part, ...] = ()
    note: str = ""
    type: str = ""


Fields = Sequence[tuple[str, str]]


def describe(
    fields: Fields, kept: Kept, hide: Callable[[bytes], bytes] = lambda data: data
) -> Shown:
    """How to show a body. ``fields`` are those of its head. ``hide`` masks the secrets in what is
    shown in hex: no text is left in it in which they could be found afterwards."""
    if not kept.size:
        return Shown(EMPTY, "")
    notes = []
    if not kept.whole:
        notes.append(f"the first {len(kept.data)} of {kept.size} bytes")
    if not kept.data:
        return Shown(HEX, "", note="nothing of it is kept")
    data, whole, note = decoded(fields, kept)
    if note:
        notes.append(note)
    # Of bytes that are still compressed, the type says nothing.
    kind = "" if note.startswith(NOT_DECODED) else field(fields, "content-type")
    shown = _describe(kind, data, whole, hide)
    return shown._replace(note="; ".join([*notes, *filter(None, [shown.note])]))


def field(fields: Fields, name: str) -> str:
    """The value of the first field of that name, in lower case; "" if there is none."""
    return next((value for each, value in fields if each.lower() == name), "")


def parameters(value: str) -> dict[str, str]:
    """The parameters behind a media type or a disposition, by name in lower case."""
    found: dict[str, str] = {}
    for name, text in _PARAMETER.findall(value[:MOST_PART_HEAD]):
        if text.startswith('"'):
            text = re.sub(r"\\(.)", r"\1", text[1:-1])
        found.setdefault(name.lower(), text)
    return found


def image_type(data: bytes) -> str:
    """The type of an image that is harmless to draw, by its first bytes; "" if it is none."""
    return next((name for name, fits in _IMAGES if fits(data)), "")


def _describe(
    kind: str, data: bytes, whole: bool, hide: Callable[[bytes], bytes], *, inner: bool = False
) -> Shown:
    """``data`` is not compressed; ``whole``: it is all of the body. ``inner``: it is a part."""
    media = kind.partition(";")[0].strip().lower()
    image = image_type(data)
    if image and (media.startswith("image/") or media in _ANY):
        note = f"it says {media[:MOST_NAME]}" if media not in (*_ANY, image) else ""
        return Shown(IMAGE, f"{image}, {len(data)} bytes", note=note, type=image)
    if media.startswith("multipart/") and not inner:
        if parts := _multipart(kind, data, whole, hide):
            return parts
    text, note = _text(parameters(kind).get("charset", ""), media, data, whole)
    if media.startswith("image/") and media != "image/svg+xml":
        note = "; ".join(
            filter(None, ["it says that it is an image, and is none that is shown", note])
        )
    if text is None:
        return Shown(HEX, hex_dump(hide(data)), note=note)
    if media == "application/x-www-form-urlencoded":
        return _form(text, note)
    if media == "text/event-stream":
        return Shown(SSE, text, note=note)
    if _JSON_TYPE.fullmatch(media) or (media in (*_ANY, "text/plain") and text[:1] in ("{", "[")):
        return _json(text, whole, note, sure=bool(_JSON_TYPE.fullmatch(media)))
    return Shown(TEXT, text, note=note)


# Compression --------------------------------------------------------------------------------------


def decoded(fields: Fields, kept: Kept) -> tuple[bytes, bool, str]:
    """The beginning of a body without its Content-Encoding, MOST_DECODED bytes at most; whether
    that is all of it; and a note, "" if all is well."""
    value = ",".join(value for name, value in fields if name.lower() == "content-encoding")
    codings = [coding for each in value.lower().split(",") if (coding := each.strip())]
    codings = [coding for coding in codings if coding != "identity"]
    data, whole = kept.data, kept.whole
    if len(codings) > MOST_CODINGS:
        return data, whole, f"{NOT_DECODED}: {len(codings)} codings are applied on each other"
    for coding in reversed(codings):
        decode = _DECODERS.get(coding)
        if decode is None:
            return data, whole, f"{NOT_DECODED}: coding {coding[:MOST_NAME]!r} is not known here"
        found = decode(data)
        if found is None:
            return data, whole, f"{NOT_DECODED}: this needs Python's package for {coding}"
        out, over, fault = found
        if not out and not whole:
            return data, whole, f"{NOT_DECODED}: this beginning of {coding} is too short"
        if fault and not out:
            return data, whole, f"{NOT_DECODED}: it is no {coding}"
        if fault and whole:
            return out, False, f"its {coding} is broken behind these {len(out)} bytes"
        if over:
            return out, False, f"decoded from {coding} up to {len(out)} bytes"
        data = out
    return data, whole, f"decoded from {', '.join(codings)}" if codings else ""


# A decoder returns what came out, whether there is more than MOST_DECODED, and whether the input is
# broken or ends too early; None if its package is not there.
Decoded = tuple[bytes, bool, bool]


def _gzip(data: bytes) -> Decoded:
    return _inflate(data, zlib.MAX_WBITS | 16)


def _deflate(data: bytes) -> Decoded:
    """With zlib's header, as RFC 9110 says, or without it, as some servers send it."""
    found = _inflate(data, zlib.MAX_WBITS)
    return found if found[0] or not found[2] else _inflate(data, -zlib.MAX_WBITS)


def _inflate(data: bytes, bits: int) -> Decoded:
    out = bytearray()
    while True:
        inflater = zlib.decompressobj(bits)
        room = MOST_DECODED - len(out)
        try:
            out += inflater.decompress(data, room + 1)
        except zlib.error:
            # What came before the fault is not returned by a call that fails: go there in steps.
            return _inflate_slowly(data, bits, out)
        if len(out) > MOST_DECODED:
            return bytes(out[:MOST_DECODED]), True, False
        if not inflater.eof:
            return bytes(out), False, True
        data = inflater.unused_data
        if bits < zlib.MAX_WBITS or not data.startswith(b"\x1f\x8b"):  # a further member of gzip
            return bytes(out), False, False


def _inflate_slowly(data: bytes, bits: int, out: bytearray) -> Decoded:
    inflater = zlib.decompressobj(bits)
    try:
        for at in range(0, len(data), 16):
            out += inflater.decompress(data[at : at + 16], max(1, MOST_DECODED - len(out)))
            if len(out) >= MOST_DECODED:
                break
    except zlib.error:
        pass
    return bytes(out[:MOST_DECODED]), False, True


def _brotli(data: bytes) -> Decoded | None:
    module = _package("brotli") or _package("brotlicffi")
    if module is None:
        return None
    out, decoder, at = bytearray(), module.Decompressor(), 0
    # Versions before 1.2 have no limit for what comes out of one call, so the steps are small.
    limited = hasattr(decoder, "can_accept_more_data")
    try:
        while len(out) <= MOST_DECODED and not decoder.is_finished():
            piece = data[at : at + 64] if not limited or decoder.can_accept_more_data() else b""
            at += len(piece)
            more = {"output_buffer_limit": 64 * 1024} if limited else {}
            came = decoder.process(piece, **more)
            out += came
            if not piece and not came:
                break
    except module.error:
        return bytes(out[:MOST_DECODED]), False, True
    over = len(out) > MOST_DECODED
    return bytes(out[:MOST_DECODED]), over, not over and not decoder.is_finished()


def _zstd(data: bytes) -> Decoded | None:
    module = _package("compression.zstd") or _package("backports.zstd")
    out = bytearray()
    if module is not None:
        decoder = module.ZstdDecompressor()
        try:
            out += decoder.decompress(data, MOST_DECODED + 1)
        except module.ZstdError:
            return b"", False, True
        over = len(out) > MOST_DECODED
        return bytes(out[:MOST_DECODED]), over, not over and not decoder.eof
    module = _package("zstandard")
    if module is None:
        return None
    # A window of 8 MiB is what RFC 9659 allows on the web.
    reader = module.ZstdDecompressor(max_window_size=8 * 1024 * 1024).stream_reader(
        io.BytesIO(data), read_across_frames=True
    )
    try:
        while len(out) <= MOST_DECODED and (piece := reader.read(64 * 1024)):
            out += piece
    except module.ZstdError:
        return bytes(out[:MOST_DECODED]), False, True
    return bytes(out[:MOST_DECODED]), len(out) > MOST_DECODED, False


_DECODERS: dict[str, Callable[[bytes], Decoded | None]] = {
    "gzip": _gzip,
    "x-gzip": _gzip,
    "deflate": _deflate,
    "br": _brotli,
    "zstd": _zstd,
}


def _package(name: str) -> Any:
    """A package that may be there, imported on first use; None if it is not."""
    try:
        return importlib.import_module(name)
    except ImportError:
        return None


# Text ---------------------------------------------------------------------------------------------


def _text(charset: str, media: str, data: bytes, whole: bool) -> tuple[str | None, str]:
    """The text that ``data`` is, None if it is none; and a note."""
    says_text = bool(_TEXT_TYPE.fullmatch(media))
    name = _encoding(charset)
    note = f"charset {charset[:MOST_NAME]!r} is not known here" if charset and not name else ""
    if not name and data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        name = "utf-16"
    text = _decode(name or "utf-8-sig", data, whole)
    if text is None:
        if not says_text:
            return None, note
        text = data.decode("utf-8-sig", "backslashreplace")
        note = note or f"not {name or 'UTF-8'}: other bytes are shown as \\xNN"
    if _BINARY.search(text) and ("\0" in text or not says_text):
        return None, "it says that it is text" if says_text else note
    return text, note


def _encoding(charset: str) -> str:
    """Python's name of an encoding of text; "" if it is not known, or not to be used."""
    try:
        name = codecs.lookup(charset[:40]).name if charset else ""
    except (LookupError, ValueError):
        return ""
    name = "utf-8-sig" if name == "utf-8" else name
    return name if name == "utf-8-sig" or _CHARSETS.fullmatch(name) else ""


def _decode(name: str, data: bytes, whole: bool) -> str | None:
    try:
        return codecs.getincrementaldecoder(name)().decode(data, whole)
    except UnicodeError:
        return None


def hex_dump(data: bytes) -> str:
    """The first MOST_HEX bytes, 16 in a line, with their offset and their ASCII."""
    lines = []
    for at in range(0, min(len(data), MOST_HEX), 16):
        row = data[at : min(at + 16, MOST_HEX)]
        left, right = row[:8].hex(" "), row[8:].hex(" ")
        ascii_text = "".join(chr(byte) if 32 <= byte < 127 else "." for byte in row)
        lines.append(f"{at:08x}  {left:<23}  {right:<23}  |{ascii_text}|")
    if len(data) > MOST_HEX:
        lines.append(f"... {len(data) - MOST_HEX} bytes more")
    return "\n".join(lines)


def _json(text: str, whole: bool, note: str, *, sure: bool) -> Shown:
    """``sure``: its type says so."""
    try:
        json.loads(text, parse_int=str, parse_float=str)  # no limit for digits
    except (ValueError, RecursionError) as error:
        if not sure:
            return Shown(TEXT, text, note=note)
        why = "too deeply nested to be laid out" if isinstance(error, RecursionError) else "no JSON"
        more = why if whole else ""  # of course not, if it is cut
        return Shown(TEXT, text, note="; ".join(filter(None, [note, more])))
    return Shown(JSON, laid_out(text), note=note)


def laid_out(text: str) -> str:
    """JSON, one value a line. Its tokens stay as they are: reading and writing it anew would change
    numbers, and drop a name that comes twice. As it is, if it is nested deeper than MOST_DEPTH."""
    out: list[str] = []
    depth, before = 0, ""
    for token in _TOKENS.findall(text):
        if token in "]}":
            depth -= 1
            if before not in ("[", "{"):
                out.append("\n" + "  " * depth)
        elif before in ("[", "{", ","):
            out.append("\n" + "  " * depth)
        out.append(": " if token == ":" else token)
        if token in "[{":
            depth += 1
            if depth > MOST_DEPTH:
                return text
        before = token
    return "".join(out)


# Forms --------------------------------------------------------------------------------------------


def _form(text: str, note: str) -> Shown:
    pairs = text.split("&", MOST_FIELDS)
    notes = [note] if note else []
    if len(pairs) > MOST_FIELDS:
        notes.append(f"the first {MOST_FIELDS} of {text.count('&') + 1} fields")
    parts = []
    for pair in pairs[:MOST_FIELDS]:
        if pair:
            name, _, value = pair.partition("=")
            parts.append(Part(_unquoted(name), _unquoted(value), size=len(value)))
    return Shown(FORM, text, tuple(parts), "; ".join(notes))


def _unquoted(text: str) -> str:
    return unquote_plus(text, errors="backslashreplace")


def _multipart(kind: str, data: bytes, whole: bool, hide: Callable[[bytes], bytes]) -> Shown | None:
    """The parts of a multipart body (RFC 2046 §5.1); None if it has none."""
    boundary = parameters(kind).get("boundary", "").encode("latin-1", "replace")
    if not 0 < len(boundary) <= 70:
        return None
    # The CRLF before a boundary belongs to it; some senders write LF alone.
    line = rb"(?:^|\r?\n)--" + re.escape(boundary) + rb"(?=--|[ \t]*\r?\n|$)"
    pieces = re.split(line, data, maxsplit=MOST_PARTS + 2)
    parts: list[Part] = []
    notes = []
    for number, piece in enumerate(pieces[1:]):
        if piece.startswith(b"--"):  # the last boundary
            break
        if len(parts) == MOST_PARTS:
            notes.append(f"the first {MOST_PARTS} parts")
            break
        is_last = number == len(pieces) - 2
        parts.append(_part(piece, not is_last, hide))
    else:
        if whole:
            notes.append("its last boundary is missing")
    if not parts:
        return None
    return Shown(MULTIPART, "", tuple(parts), "; ".join(notes))


def _part(piece: bytes, whole: bool, hide: Callable[[bytes], bytes]) -> Part:
    """``piece`` is what stands between two boundaries."""
    piece = re.sub(rb"\A[ \t]*\r?\n", b"", piece)
    if piece.startswith((b"\r\n", b"\n")):
        head, content = b"", piece.removeprefix(b"\r").removeprefix(b"\n")
    else:
        found = re.search(rb"\r?\n\r?\n", piece[: MOST_PART_HEAD + 4])
        head, content = (piece[: found.start()], piece[found.end() :]) if found else (piece, b"")
    lines = re.sub(r"\r?\n[ \t]+", " ", head[:MOST_PART_HEAD].decode("utf-8", "backslashreplace"))
    fields = []
    for line in lines.splitlines():
        name, colon, value = line.partition(":")
        if colon:
            fields.append((name.strip(), value.strip()))
    given = parameters(field(fields, "content-disposition"))
    filename = given.get("filename", "")
    if "filename*" in given:
        filename = _extended(given["filename*"])
    media = field(fields, "content-type")
    name = given.get("name", "") or _extended(given.get("name*", ""))
    if not content:
        return Part(name, "", filename, media, EMPTY)
    shown = _describe(media or "text/plain", content, whole, hide, inner=True)
    return Part(name, shown.text, filename, media, shown.kind, len(content), shown.note)


def _extended(value: str) -> str:
    """A name as UTF-8''na%C3%AFve.txt (RFC 8187)."""
    charset, _, rest = value.partition("'")
    return (
        _decode(_encoding(charset) or "utf-8", unquote_to_bytes(rest.partition("'")[2]), True)
        or value
    )
