"""Numbers as an operator writes them."""

import pytest

from gotunnel_agent.common.quantities import bytes_of, rate, whole_number


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("0", 0),
        ("007", 7),
        ("123456789", 123_456_789),
        ("1234567890", None),
        ("", None),
        ("-1", None),
        (" 7", None),
        ("1_000", None),
        ("\u0667", None),  # a digit of another script
        ("7\n", None),
    ],
)
def test_whole_number_is_made_of_ascii_digits_alone(text, number):
    assert whole_number(text) == number


@pytest.mark.parametrize(
    ("text", "a_second"),
    [
        ("10", 10),
        ("10/s", 10),
        ("600/m", 10),
        ("1/h", 1 / 3600),
        ("0.5", 0.5),
        ("0", 0),
        ("10/d", None),
        (".5", None),
        ("1e3", None),
        ("-1", None),
        ("nan", None),
        ("", None),
        ("10/", None),
    ],
)
def test_rate_is_a_number_and_perhaps_a_period(text, a_second):
    assert rate(text) == a_second


@pytest.mark.parametrize(
    "text, size",
    [
        ("0", 0), ("65536", 65536), ("64KiB", 65536), ("64 kb", 65536), ("2MiB", 2**21),
        ("1GIB", 2**30), ("7b", 7), ("", None), ("KiB", None), ("1.5MiB", None), ("-1", None),
        ("64K", 65536), ("64i", None), ("1TiB", None), ("1  MiB", None), ("1_0", None),
        ("9999999999", None),
    ],
)  # fmt: skip
def test_bytes_have_a_unit_or_none(text, size):
    assert bytes_of(text) == size
