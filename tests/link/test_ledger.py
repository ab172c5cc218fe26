"""The ledger adds up, whatever crossed in which order, and goes on where a run was resumed."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from photon.link.ledger import Ledger, Traffic

crossing = st.tuples(st.sampled_from(["ada", "bob", "cyd"]), st.booleans(), st.integers(0, 2**40))


@given(st.lists(st.lists(crossing, max_size=8), max_size=5), st.integers(0, 2**40), st.integers(0, 2**40))
def test_totals_are_sums_of_rounds_and_rounds_are_sums_of_nodes(
    rounds: list[list[tuple[str, bool, int]]], down: int, up: int
) -> None:
    ledger = Ledger(total=Traffic(down, up))
    for messages in rounds:
        ledger.begin_round()
        assert ledger.round == Traffic(0, 0)
        for node, is_down, message_bytes in messages:
            (ledger.down if is_down else ledger.up)(node, message_bytes)
        for node in ("ada", "bob", "cyd"):
            ours = [(is_down, size) for name, is_down, size in messages if name == node]
            expected = Traffic(sum(s for d, s in ours if d), sum(s for d, s in ours if not d))
            assert ledger.of(node) == expected
        down += ledger.round.bytes_down
        up += ledger.round.bytes_up
    assert ledger.total == Traffic(down, up)


def test_two_ledgers_share_nothing() -> None:
    first, second = Ledger(), Ledger()
    first.up("ada", 5)
    assert second.total == Traffic()
    assert second.nodes == {}
