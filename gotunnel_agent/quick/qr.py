"""Draws an address as a QR code (ISO/IEC 18004) of half blocks: two modules in a terminal's cell.

The package segno makes the code. It is the extra `qr`, and is loaded when a code is asked for: that
takes a tenth of a second.
"""

from collections.abc import Sequence
from importlib import import_module

MISSING = "no QR code: the package segno is missing (pip install segno)"
NO_BLOCKS = "no QR code: this terminal's encoding has no block characters"
# Light modules around the code. The standard asks for 4; cameras of phones manage with 2, and the
# code takes 4 columns less.
QUIET_ZONE = 2

# By (upper module is dark, lower module is dark).
DARK_INK = {(0, 0): " ", (0, 1): "▄", (1, 0): "▀", (1, 1): "█"}
LIGHT_INK = {(upper, lower): DARK_INK[1 - upper, 1 - lower] for upper, lower in DARK_INK}


class NoQr(Exception):
    """There is no QR code; the text says why."""


def qr_lines(text: str, *, dark_ink: bool) -> list[str]:
    """The code of a text. Raises NoQr.

    ``dark_ink``: to be painted black on white. Otherwise the light modules are drawn, which is
    right for light text on a dark background without colours.
    """
    try:
        segno = import_module("segno")
    except ImportError:
        raise NoQr(MISSING) from None
    try:
        code = segno.make_qr(text, error="l")
    except ValueError as error:  # DataOverflowError is one: some 3000 characters
        raise NoQr(f"no QR code: {error}") from None
    rows = [[int(bool(module)) for module in row] for row in code.matrix_iter(border=QUIET_ZONE)]
    return half_blocks(rows, DARK_INK if dark_ink else LIGHT_INK)


def half_blocks(rows: Sequence[Sequence[int]], ink: dict[tuple[int, int], str]) -> list[str]:
    """Rows of modules, 1 for a dark one, as lines of text of half as many rows."""
    if len(rows) % 2:
        rows = [*rows, [0] * len(rows[0])]
    return ["".join(map(ink.__getitem__, zip(*pair))) for pair in zip(rows[::2], rows[1::2])]
