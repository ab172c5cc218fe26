"""The ledger adds up, whatever crossed in which order, and goes on where a run was resumed."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from photon.link.ledger import Flow, Ledger, Traffic

NODES = ["ada", "bob", "cyd"]
size = st.integers(0, 2**40)
crossing = st.tuples(st.sampled_from(NODES), st.booleans(), size, size, size)


def flow(messages: list[tuple[int, int, int]]) -> Flow:
    encoded, body, raw = (sum(column) for column in zip(*messages, strict=True)) if messages else (0, 0, 0)
    return Flow(raw=raw, body=body, encoded=encoded, sent=encoded)


@given(st.lists(st.lists(crossing, max_size=8), max_size=5), size, size)
def test_totals_are_sums_of_rounds_and_rounds_are_sums_of_nodes(
    rounds: list[list[tuple[str, bool, int, int, int]]], down: int, up: int
) -> None:
    total = Traffic(down=Flow(encoded=down, sent=down), up=Flow(encoded=up, sent=up))
    ledger = Ledger(total=total)
    for messages in rounds:
        ledger.begin_round()
        assert ledger.round == Traffic()
        for node, is_down, encoded, body, raw in messages:
            if is_down:
                ledger.down(node, encoded, body, raw)
            else:
                ledger.up(node, encoded)
                ledger.add(node, Traffic(up=Flow(body=body, raw=raw)))
        for node in NODES:
            ours = {way: flow([tuple(s) for name, d, *s in messages if name == node and d == way]) for way in (0, 1)}  # type: ignore[misc]  # three sizes
            assert ledger.of(node) == Traffic(down=ours[1], up=ours[0])
        total += ledger.round
    assert ledger.total == total


@given(st.lists(st.tuples(st.sampled_from(NODES), size, size), max_size=10))
def test_what_the_network_counted_adds_up_whenever_it_is_read(steps: list[tuple[str, int, int]]) -> None:
    ledger, counters = Ledger(counts_sent=True), dict.fromkeys(NODES, (0, 0))
    for node, down, up in steps:
        counters[node] = (counters[node][0] + down, counters[node][1] + up)
        ledger.down(node, 5)
        ledger.sent(counters)
        ledger.sent(counters)  # read twice, counted once
    assert (ledger.total.down.sent, ledger.total.up.sent) == tuple(
        sum(counter[way] for counter in counters.values()) for way in (0, 1)
    )
    assert ledger.total.down.encoded == 5 * len(steps)


def test_counters_that_begin_anew_are_counted_from_zero() -> None:
    ledger = Ledger(counts_sent=True)
    ledger.sent({"ada": (100, 10)})
    ledger.sent({"ada": (30, 40)})
    assert (ledger.of("ada").down.sent, ledger.of("ada").up.sent) == (130, 40)


def test_stages_are_kept_by_name() -> None:
    ledger = Ledger()
    ledger.up("ada", 12)
    ledger.add("ada", Traffic(up=Flow(raw=400, body=10, stages={"topk": 20, "int4": 10})))
    ledger.add("bob", Traffic(up=Flow(stages={"topk": 1})))
    assert ledger.total.up == Flow(raw=400, body=10, encoded=12, sent=12, stages={"topk": 21, "int4": 10})
    assert ledger.of("ada").up.stages == {"topk": 20, "int4": 10}


def test_two_ledgers_share_nothing() -> None:
    first, second = Ledger(), Ledger()
    first.up("ada", 5)
    assert second.total == Traffic()
    assert second.nodes == {}
