"""How bodies are shown, by bytes. Nothing that a stranger sends may raise or take
long, fill the memory, or run."""

import gzip
import importlib
import json
import random
import sys
import time
import tracemalloc
import zlib

import pytest
from support import need_package

from gotunnel_agent.inspector.content import (
    EMPTY,
    FORM,
    HEX,
    IMAGE,
    JSON,
    MOST_DECODED,
    MOST_DEPTH,
    MOST_FIELDS,
    MOST_HEX,
    MOST_PARTS,
    MULTIPART,
    SSE,
    TEXT,
    Part,
    Shown,
    describe,
    hex_dump,
    laid_out,
)
from gotunnel_agent.inspector.record import Kept

PNG = b"\x89PNG\r\n\x1a\n" + bytes(20)
IMAGES = {
    "image/png": PNG,
    "image/jpeg": b"\xff\xd8\xff\xe0" + bytes(9),
    "image/gif": b"GIF89a" + bytes(9),
    "image/webp": b"RIFF\x24\0\0\0WEBPVP8 ",
    "image/avif": b"\0\0\0\x20ftypavif" + bytes(9),
    "image/bmp": b"BM\x46\0\0\0\0\0\0\0\x36",
    "image/x-icon": b"\0\0\1\0\1\0\x10\x10",
}


def shown(data, kind=None, coding=None, size=None):
    fields = [("Content-Type", kind)] if kind is not None else []
    fields += [("content-encoding", coding)] if coding is not None else []
    return describe(fields, Kept(data, len(data) if size is None else size))


@pytest.mark.parametrize(
    "data, kind, expected",
    [
        (b"", "text/plain", Shown(EMPTY, "")),
        (b"hello", "text/plain", Shown(TEXT, "hello")),
        (b"hello", None, Shown(TEXT, "hello")),
        (b"<script>alert(1)</script>", "text/html; charset=utf-8",
         Shown(TEXT, "<script>alert(1)</script>")),
        ("grün".encode("latin-1"), "text/plain; charset=ISO-8859-1", Shown(TEXT, "grün")),
        ("grün".encode("utf-16"), "text/plain", Shown(TEXT, "grün")),
        ("\ufeffgrün".encode(), "text/plain", Shown(TEXT, "grün")),
        ("日本".encode("shift_jis"), 'text/html; charset="Shift_JIS"', Shown(TEXT, "日本")),
        (b"a\x1b[31m\tb\r\n", "text/plain", Shown(TEXT, "a\x1b[31m\tb\r\n")),
        (b"gr\xfcn", "text/plain",
         Shown(TEXT, "gr\\xfcn", note="not UTF-8: other bytes are shown as \\xNN")),
        (b"x", "text/plain; charset=zlib",
         Shown(TEXT, "x", note="charset 'zlib' is not known here")),
        (b"x", "text/plain; charset=idna",
         Shown(TEXT, "x", note="charset 'idna' is not known here")),
        (b"a\0b", "text/plain", Shown(HEX, hex_dump(b"a\0b"), note="it says that it is text")),
        (b"\xff\xfe\0\1\2", "application/pdf", Shown(HEX, hex_dump(b"\xff\xfe\0\1\2"))),
        (b"\x01\x02", None, Shown(HEX, hex_dump(b"\x01\x02"))),
        (b"<svg onload='x'/>", "image/svg+xml", Shown(TEXT, "<svg onload='x'/>")),
        (b"<p>", "image/png",
         Shown(TEXT, "<p>", note="it says that it is an image, and is none that is shown")),
        (b"data: 1\n\n", "text/event-stream", Shown(SSE, "data: 1\n\n")),
        (b'{"a":[1,{}]}', "application/json",
         Shown(JSON, '{\n  "a": [\n    1,\n    {}\n  ]\n}')),
        (b'{"a":1}', "application/problem+json; charset=utf-8", Shown(JSON, '{\n  "a": 1\n}')),
        (b'[1]', "text/plain", Shown(JSON, "[\n  1\n]")),
        (b"[x]", "text/plain", Shown(TEXT, "[x]")),
        (b"{", "application/json", Shown(TEXT, "{", note="no JSON")),
        (b"a=1&b=x+y%20z&c&=d&&e=%ff", "application/x-www-form-urlencoded",
         Shown(FORM, "a=1&b=x+y%20z&c&=d&&e=%ff",
               (Part("a", "1", size=1), Part("b", "x y z", size=7), Part("c", ""),
                Part("", "d", size=1), Part("e", "\\xff", size=3)))),
    ],
)  # fmt: skip
def test_a_body_is_shown_as_what_it_is(data, kind, expected):
    assert shown(data, kind) == expected


@pytest.mark.parametrize("kind", IMAGES)
def test_harmless_images_are_known_by_their_bytes(kind):
    data = IMAGES[kind]
    for said in (kind, None, "application/octet-stream"):
        found = shown(data, said)
        assert (found.kind, found.type, found.note) == (IMAGE, kind, "")
    assert "it says image/tiff" in shown(data, "image/tiff").note
    assert shown(data, "text/html").kind != IMAGE
    assert shown(data[1:], kind).kind != IMAGE


def test_of_a_body_that_is_not_whole_the_note_says_how_much_there_is():
    assert shown(b"hello", "text/plain", size=900).note == "the first 5 of 900 bytes"
    assert shown("grün".encode()[:3], "text/plain", size=5).text == "gr"
    assert shown(b'{"a":', "application/json", size=99)[:2] == (TEXT, '{"a":')
    assert (
        describe([], Kept(b"", 900)) == Shown(HEX, "", note="the first 0 of 900 bytes")
        or describe([], Kept(b"", 900)).note == "nothing of it is kept"
    )


# Compression --------------------------------------------------------------------------------------


def raw_deflate(data):
    packer = zlib.compressobj(wbits=-15)
    return packer.compress(data) + packer.flush()


def brotli_of(data):
    return need_package("brotli", "inspect").compress(data, quality=1)


def zstd_of(data):
    if sys.version_info >= (3, 14):
        return importlib.import_module("compression.zstd").compress(data)
    return need_package("zstandard", "inspect").ZstdCompressor().compress(data)


PACKERS = [
    ("gzip", gzip.compress), ("x-gzip", gzip.compress), ("deflate", zlib.compress),
    ("deflate", raw_deflate), ("br", brotli_of), ("zstd", zstd_of),
]  # fmt: skip


@pytest.mark.parametrize("coding, pack", PACKERS)
def test_compressed_bodies_are_decoded_for_show(coding, pack):
    text = json.dumps({"numbers": list(range(3000))}).encode()
    packed = pack(text)
    found = shown(packed, "application/json", coding.upper())
    assert (found.kind, found.note) == (JSON, f"decoded from {coding}")
    assert json.loads(found.text) == json.loads(text)
    # Cut short: what there is.
    found = shown(packed[: len(packed) // 2], "application/json", coding, size=len(packed))
    if coding == "zstd":  # its blocks are large
        assert found.note.endswith("not decoded: this beginning of zstd is too short")
    else:
        assert found.kind == TEXT and found.text and text.startswith(found.text.encode())
    # A bomb.
    found = shown(pack(bytes(2 * MOST_DECODED)), "text/plain", coding)
    assert f"decoded from {coding} up to {MOST_DECODED} bytes" in found.note
    # Broken, and something else.
    broken = bytearray(pack(random.Random(1).randbytes(3000)))
    broken[1500:1510] = b"\xff" * 10
    assert shown(bytes(broken), "text/plain", coding).note
    assert "not decoded: it is no" in shown(b"hello", "text/plain", coding).note


def test_a_bomb_takes_no_memory():
    bombs = [
        (coding, pack(bytes(20 * MOST_DECODED))) for coding, pack in PACKERS if coding != "x-gzip"
    ]
    tracemalloc.start()
    try:
        for coding, bomb in bombs:
            tracemalloc.reset_peak()
            shown(bomb, "text/plain", coding)
            assert tracemalloc.get_traced_memory()[1] < 12 * MOST_DECODED, coding
    finally:
        tracemalloc.stop()


def test_several_codings_are_undone_in_turn():
    packed = zlib.compress(gzip.compress(b"hello"))
    assert shown(packed, "text/plain", "gzip, deflate").text == "hello"
    assert "4 codings" in shown(packed, "text/plain", "gzip,gzip,gzip,gzip").note
    two = gzip.compress(b"hello ") + gzip.compress(b"you")
    assert shown(two, "text/plain", "gzip").text == "hello you"
    assert shown(b"hello", "text/plain", "identity") == Shown(TEXT, "hello")


def test_a_coding_that_is_not_there_is_named(monkeypatch):
    assert shown(b"x", "text/plain", "lzma").note == (
        "not decoded: coding 'lzma' is not known here"
    )
    for name in ("brotli", "brotlicffi", "zstandard", "compression.zstd", "backports.zstd"):
        monkeypatch.setitem(sys.modules, name, None)
    for coding in ("br", "zstd"):
        assert shown(b"x", "text/plain", coding).note == (
            f"not decoded: this needs Python's package for {coding}"
        )


# JSON ---------------------------------------------------------------------------------------------


def test_json_keeps_its_numbers_and_names():
    text = '{"a":1.10,"a":10000000000000000000000.5e-3,"b":"x\\u0041\\"{[,","c":[],"d":{"e":null}}'
    assert "".join(laid_out(text).split()) == text
    assert '"a": 1.10,\n  "a": 10000000000000000000000.5e-3,' in laid_out(text)
    assert shown(b"9" * 5000, "application/json").kind == JSON


def test_deep_json_is_not_indented_to_no_end():
    deep = b"[" * (MOST_DEPTH + 5) + b"]" * (MOST_DEPTH + 5)
    assert shown(deep, "application/json").text == deep.decode()
    found = shown(b"[" * 60_000, "application/json")
    assert found.kind == TEXT and found.note in ("no JSON", "too deeply nested to be laid out")


# Forms and parts ----------------------------------------------------------------------------------

KIND = 'multipart/form-data; boundary="a b"'


def form_data(*parts, end=b"\r\n--a b--\r\n", newline=b"\r\n"):
    body = b"preamble"
    for part in parts:
        body += b"\r\n--a b\r\n" + part
    return (body + end).replace(b"\r\n", newline)


@pytest.mark.parametrize("newline", [b"\r\n", b"\n"])
def test_the_parts_of_a_form_are_shown_each_as_what_it_is(newline):
    body = form_data(
        b'Content-Disposition: form-data; name="user"\r\n\r\nme',
        b'Content-Disposition: form-data; name="f"; filename="a\\"b.json"\r\n'
        b'Content-Type: application/json\r\n\r\n{"a":1}',
        b"content-disposition: form-data; name=p; filename*=UTF-8''na%C3%AFve.png\r\n"
        b"Content-Type: image/png\r\n\r\n" + PNG[:4] + b"?" + PNG[8:],
        b'Content-Disposition: form-data;\r\n name="folded"\r\n\r\n',
        b"\r\nno head",
        newline=newline,
    )
    found = shown(body, KIND)
    assert (found.kind, found.note) == (MULTIPART, "")
    user, file, picture, folded, bare = found.parts
    assert user == Part("user", "me", size=2)
    assert file == Part("f", '{\n  "a": 1\n}', 'a"b.json', "application/json", JSON, 7)
    assert (picture.name, picture.filename, picture.kind) == ("p", "naïve.png", HEX)
    assert "is none" in picture.note
    assert (folded.name, folded.kind) == ("folded", EMPTY)
    assert bare == Part("", "no head", size=7)


def test_a_form_that_is_cut_or_odd_is_shown_as_far_as_it_goes():
    part = b'Content-Disposition: form-data; name="x"\r\n\r\nvalue'
    assert shown(form_data(part, end=b""), KIND).note == "its last boundary is missing"
    cut = shown(form_data(part, end=b""), KIND, size=10**6)
    assert cut.parts[0].text == "value" and cut.note.startswith("the first ")
    assert shown(b"hello", KIND) == Shown(TEXT, "hello")
    assert shown(b"hello", "multipart/form-data") == Shown(TEXT, "hello")
    many = form_data(*[part] * (MOST_PARTS + 50))
    found = shown(many, KIND)
    assert len(found.parts) == MOST_PARTS and found.note == f"the first {MOST_PARTS} parts"
    inner = b'Content-Type: multipart/mixed; boundary="a b"\r\n\r\n--x\r\n\r\n1\r\n--x--'
    assert shown(form_data(inner), KIND).parts[0].kind == TEXT
    lines = form_data(part.replace(b"value", b"--a bc\r\n--a b c"))
    assert shown(lines, KIND).parts[0].text == "--a bc\r\n--a b c"


def test_of_a_form_with_thousands_of_fields_the_first_are_shown():
    body = b"&".join(b"field%d=%d" % (number, number) for number in range(10_000))
    found = shown(body, "application/x-www-form-urlencoded")
    assert len(found.parts) == MOST_FIELDS
    assert found.note == f"the first {MOST_FIELDS} of 10000 fields"


def test_hex_has_offsets_and_ascii_and_a_limit():
    assert hex_dump(b"GET /\x00\xff\n0123456789") == (
        "00000000  47 45 54 20 2f 00 ff 0a  30 31 32 33 34 35 36 37  |GET /...01234567|\n"
        "00000010  38 39                                             |89|"
    )
    long = hex_dump(bytes(MOST_HEX + 5))
    assert long.endswith("\n... 5 bytes more") and len(long.splitlines()) == MOST_HEX / 16 + 1


# Hostile ------------------------------------------------------------------------------------------

TYPES = [
    "", "text/plain", "text/html; charset=x", "application/json", "image/png", "image/svg+xml",
    KIND, "multipart/mixed; boundary=", "application/x-www-form-urlencoded", "text/event-stream",
    ";;;=",
    "text/plain; charset=utf-16", "text/plain; charset=utf-7", "text/x; charset=unicode_escape",
    "text/plain; charset=\0", "text/plain; charset=" + "x" * 5000, "multipart/x; boundary=--",
]  # fmt: skip
SEEDS = [
    b"", b"hello", *IMAGES.values(), b'{"a": [1, 2, "\\ud800"]}', b"a=1&b=%zz",
    gzip.compress(b"a" * 99), form_data(b'Content-Disposition: form-data; name="x"\r\n\r\ny'),
    b"\xff\xfe\xd8", b"\xed\xa0\x80",
    zlib.compress(b"b" * 99), "grün".encode("utf-16"), b"data: x\n\n", bytes(range(256)),
]  # fmt: skip


def test_whatever_comes_nothing_is_raised():
    dice = random.Random(11)
    codings = ["", "gzip", "deflate", "br", "zstd", "gzip, br", ",,", "x" * 999, "\xff"]
    for _ in range(3000):
        data = bytearray(dice.choice(SEEDS) + dice.choice(SEEDS))
        for _ in range(dice.randrange(4)):
            if data:
                data[dice.randrange(len(data))] = dice.randrange(256)
        size = len(data) + dice.choice([0, 0, 1, 10**12])
        found = shown(bytes(data), dice.choice(TYPES), dice.choice(codings), size)
        json.dumps(found)
        assert found.kind in (EMPTY, TEXT, JSON, FORM, MULTIPART, IMAGE, SSE, HEX)
        assert (found.kind == IMAGE) == bool(found.type)


@pytest.mark.parametrize(
    "data, kind",
    [
        (b"&" * 60_000, "application/x-www-form-urlencoded"),
        (b"%" * 60_000, "application/x-www-form-urlencoded"),
        (b"[" * 30_000 + b"]" * 30_000, "application/json"),
        (b'"' + b"\\" * 60_000, "application/json"),
        (b"[" + b" " * 60_000, "application/json"),
        (b"\r\n--a b" * 8_000, KIND),
        (b"\r\n--a b\r\n" + b"\r" * 60_000, KIND),
        (b"\r\n--a b\r\n" + b"x:" * 30_000, KIND),
        (b"\r\n--a b\r\n" + b"\n\t" * 30_000 + b"\r\n\r\n", KIND),
        (b"hello", "text/plain;" + " ;" * 30_000),
        (b"hello", 'text/plain; a="' + "\\" * 60_000),
        (b"\x1b" * 60_000, "text/plain"),
    ],
)
def test_no_body_takes_long(data, kind):
    begun = time.process_time()
    shown(data, kind)
    assert time.process_time() - begun < 0.5
