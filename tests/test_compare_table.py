"""A comparison as rows of words."""

from __future__ import annotations

from rich.console import Console
from tests.made_up_comparison import DILOCO, FAILED, FEDAVG, comparison, made_up, row

from photon.compare_report import compare_page
from photon.compare_table import result_columns, tables, target_columns


def test_a_target_that_one_seed_missed_is_not_averaged_over_the_other() -> None:
    missed = row("fedavg", made_up(7, 8.0, 6.0, 4.0), made_up(8, 8.0, 6.0, 5.5))
    assert missed.to_target is None
    assert missed.runs_that_reached == 1
    assert target_columns(comparison(missed)).rows[0][1] == "not reached by 1 of 2"


def test_what_failed_is_told() -> None:
    half = row("fedavg", made_up(7, 8.0, 4.0), FAILED)
    assert "(1 failed)" in result_columns(comparison(half)).rows[0][1]
    none = row("fedavg", FAILED)
    found = comparison(none, DILOCO)
    assert result_columns(found).rows[0][1] == "failed"
    assert found.methods[1].difference_percent is None
    assert "out of memory" in compare_page(found)


def test_the_terminal_tables_fit_into_80_columns() -> None:
    console = Console(width=80, record=True)
    for table in tables(comparison(FEDAVG, DILOCO)):
        assert console.measure(table).minimum <= 80
