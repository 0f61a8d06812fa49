"""QR codes of half blocks."""

import sys

import pytest

from gotunnel_agent.quick import qr as qr_module
from gotunnel_agent.quick.qr import (
    DARK_INK,
    LIGHT_INK,
    MISSING,
    QUIET_ZONE,
    NoQr,
    half_blocks,
    qr_lines,
)

URL = "https://quick-otter.dev.example.com"


def test_two_rows_of_modules_are_a_line():
    rows = [[0, 1, 0, 1], [0, 0, 1, 1], [1, 1, 1, 1]]
    assert half_blocks(rows, DARK_INK) == [" ▀▄█", "▀▀▀▀"]
    assert half_blocks(rows, LIGHT_INK) == ["█▄▀ ", "▄▄▄▄"]


def test_without_the_package_a_line_says_how_to_get_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "segno", None)
    with pytest.raises(NoQr, match="pip install segno"):
        qr_lines(URL, dark_ink=True)
    assert "\n" not in MISSING


def test_the_modules_are_those_of_the_package():
    segno = pytest.importorskip("segno", reason="the extra qr is not installed")
    lines = qr_lines(URL, dark_ink=True)
    upper = {" ": 0, "▄": 0, "▀": 1, "█": 1}
    lower = {" ": 0, "▄": 1, "▀": 0, "█": 1}
    drawn = [[half[module] for module in line] for line in lines for half in (upper, lower)]
    code = segno.make_qr(URL, error="l")
    expected = [list(map(int, row)) for row in code.matrix_iter(border=QUIET_ZONE)]
    assert drawn[: len(expected)] == expected
    assert len(lines) == (len(expected) + 1) // 2
    assert len(set(map(len, lines))) == 1


def test_a_text_that_is_too_long_is_refused():
    pytest.importorskip("segno", reason="the extra qr is not installed")
    with pytest.raises(NoQr, match="no QR code"):
        qr_lines("x" * 10_000, dark_ink=True)


def test_the_package_is_loaded_when_it_is_needed():
    assert not hasattr(qr_module, "segno")
