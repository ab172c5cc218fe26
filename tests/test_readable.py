from __future__ import annotations

import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from photon.readable import byte_size, count, duration, one_line, printable, significant


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0"), (112, "112"), (999, "999"), (999.6, "1.00k"), (8400, "8.40k"), (1_034_000, "1.03M"), (999_999, "1.00M")],
)
def test_count(value: float, text: str) -> None:
    assert count(value) == text


@pytest.mark.parametrize(("size", "text"), [(0, "0 B"), (512, "512 B"), (42_100_000, "42.1 MB"), (10**12, "1.00 TB")])
def test_byte_size(size: int, text: str) -> None:
    assert byte_size(size) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.4, "0:00"), (65, "1:05"), (59.9, "1:00"), (7384, "2:03:04"), (3 * 86400 + 3600, "3 d 01:00:00"), (-3, "0:00")],
)
def test_duration(seconds: float, text: str) -> None:
    assert duration(seconds) == text


@given(st.floats(min_value=1e-6, max_value=9e5))
def test_significant_keeps_three_digits(value: float) -> None:
    assert float(significant(value)) == pytest.approx(value, rel=5.1e-3)
    assert "e" not in significant(value)


@given(st.floats(min_value=0, max_value=9.99e14))
def test_count_never_shows_a_thousand_of_a_smaller_unit(value: float) -> None:
    number = count(value).rstrip("kMBT")
    assert float(number) < 1000


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_is_named(value: float) -> None:
    assert {significant(value), count(value), duration(value)} == {f"{value:g}"}


@given(st.text(st.characters(codec=None, exclude_categories=()), max_size=60))
def test_printable_text_steers_nothing_and_encodes(text: str) -> None:
    shown = printable(text)
    shown.encode()
    assert len(shown) == len(text)
    assert not any(unicodedata.category(c) == "Cc" and c not in "\n\t" for c in shown)
    assert "\u202e" not in shown
    assert "\n" not in one_line(text)


def test_an_escape_sequence_is_disarmed_and_plain_text_is_kept() -> None:
    assert printable("a\x1b[31mb\u202ec\ud800") == "a\ufffd[31mb\ufffdc\ufffd"
    assert printable("Grüße, 世界 👋\n\tend") == "Grüße, 世界 👋\n\tend"


def test_one_line_keeps_to_its_width() -> None:
    assert one_line("a\n  b\tc") == "a b c"
    assert one_line("x" * 200, 20) == "x" * 17 + "..."
