"""Top-k against a sorted reference, exactly: ties, zeros and all."""

import tracemalloc
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from photon.errors import WireError
from photon.link.codec.base import Context
from photon.link.codec.topk import TopK

CONTEXT = Context(seed=0)
Sparsify = Callable[[Tensor, int], Tensor]


def kept_places(values: list[float], count: int) -> list[int]:
    """The definition: the largest magnitudes first, then the lower index; listed in ascending order."""
    return sorted(sorted(range(len(values)), key=lambda i: (-abs(values[i]), i))[:count])


def share(density: float, length: int) -> int:
    return max(1, round(density * length)) if length else 0


def chunk_places(values: list[float], density: float, chunk: int) -> list[int]:
    out = []
    for start in range(0, len(values), chunk):
        part = values[start : start + chunk]
        out += [start + place for place in kept_places(part, share(density, len(part)))]
    return out


def with_only(tensor: Tensor, places: list[int]) -> Tensor:
    flat = torch.zeros(tensor.numel())
    flat[places] = tensor.reshape(-1)[places]
    return flat.view(tensor.shape)


def bits(tensor: Tensor) -> list[int]:
    return tensor.contiguous().view(-1).view(torch.int32).tolist()


def through(stage: TopK, tensor: Tensor, context: Context = CONTEXT) -> Tensor:
    before = bits(tensor)
    reduced = stage.encode(tensor, context)
    assert bits(tensor) == before
    assert reduced.values.dtype == torch.float32
    assert reduced.side.dtype == torch.uint8
    assert reduced.values.is_contiguous() and reduced.side.is_contiguous()
    size = stage.size(tuple(tensor.shape))
    if size.is_exact:
        assert (reduced.values.numel(), reduced.side.numel()) == (size.values, size.side_bytes)
    assert reduced.values.numel() <= size.values
    assert reduced.side.numel() <= size.side_bytes
    assert stage.value_count(reduced.side, tuple(tensor.shape)) == reduced.values.numel()
    out = stage.decode(reduced.values, reduced.side, tuple(tensor.shape))
    assert out.dtype == torch.float32 and out.shape == tensor.shape
    kept = out.reshape(-1)[out.reshape(-1) != 0]
    assert bits(kept) == bits(reduced.values[reduced.values != 0])  # in ascending order of their places
    return out


ADVERSARIAL = {
    "empty": torch.zeros(0),
    "empty matrix": torch.zeros(3, 0, 2),
    "0-d": torch.tensor(-3.0),
    "0-d zero": torch.tensor(0.0),
    "one": torch.tensor([2.0]),
    "zeros": torch.zeros(100),
    "negative zeros": -torch.zeros(100),
    "one spike": torch.zeros(777).index_fill(0, torch.tensor([776]), -1e30),
    "equal": torch.full((513,), -0.5),
    "signs": torch.randn(300, generator=torch.Generator().manual_seed(1)).sign(),
    "denormals": torch.arange(-200, 200).float() * 1e-44,
    "huge": torch.linspace(-3.4e38, 3.4e38, 301, dtype=torch.float64).float(),
    "all magnitudes": torch.logspace(-44, 38, 999, dtype=torch.float64).float(),
    "strided": torch.randn(40, 60, generator=torch.Generator().manual_seed(2)).t()[::2, 1:],
    "few": torch.cat([torch.zeros(50), -torch.zeros(14), torch.tensor([1e-45, 1.0, -1.0]), torch.zeros(61)]),
}
STAGES = [(0.02, 64), (0.1, 64), (0.3, 48), (0.9, 31), (1.0, 16), (1e-6, 4096), (0.06, 256), (0.5, 1)]


@pytest.mark.parametrize("name", ADVERSARIAL)
@pytest.mark.parametrize(("density", "chunk"), STAGES)
def test_adversarial_tensors_equal_the_sorted_reference(name: str, density: float, chunk: int) -> None:
    tensor = ADVERSARIAL[name]
    values = tensor.reshape(-1).tolist()
    by_chunk = through(TopK(density, "chunk", chunk), tensor)
    assert bits(by_chunk) == bits(with_only(tensor, chunk_places(values, density, chunk)))
    whole = through(TopK(density, "tensor"), tensor)
    nonzero = [place for place in kept_places(values, share(density, len(values))) if values[place] != 0]
    assert bits(whole) == bits(with_only(tensor, nonzero))
    stage = TopK(density, "global")
    together = through(stage, tensor, Context(seed=0, survey=stage.survey([tensor])))
    assert (together != 0).any() == (tensor != 0).any()


@given(
    st.lists(
        st.one_of(st.floats(width=32, allow_nan=False, allow_infinity=False), st.sampled_from([0.0, -0.0, 1, -1]))
    ),
    st.floats(0.001, 1),
    st.integers(1, 70),
)
@settings(deadline=None)
def test_any_values_equal_the_sorted_reference(values: list[float], density: float, chunk: int) -> None:
    tensor = torch.tensor(values, dtype=torch.float32)
    by_chunk = through(TopK(density, "chunk", chunk), tensor)
    assert bits(by_chunk) == bits(with_only(tensor, chunk_places(values, density, chunk)))
    whole = through(TopK(density, "tensor"), tensor)
    nonzero = [place for place in kept_places(values, share(density, len(values))) if values[place] != 0]
    assert bits(whole) == bits(with_only(tensor, nonzero))


@pytest.mark.parametrize("levels", [0, 1, 5, 300])
def test_blocks_join_without_a_seam(levels: int) -> None:
    """More values than a block, 70% of them zero, the rest normal or of a few magnitudes, so that many are equal."""
    generator = torch.Generator().manual_seed(levels)
    tensor = torch.randn(2**18 + 4096 * 3 + 77, generator=generator)
    tensor = (tensor * levels / 3).round() if levels else tensor
    tensor[torch.rand(tensor.shape, generator=generator) < 0.7] = 0
    tensor[5000:50_000] = 0
    values = tensor.tolist()
    for density, chunk in ((0.02, 4096), (0.2, 1000), (0.01, 2**18 + 4096)):
        expected = with_only(tensor, chunk_places(values, density, chunk))
        assert torch.equal(through(TopK(density, "chunk", chunk), tensor), expected)
    expected = with_only(tensor, kept_places(values, share(0.02, len(values))))
    assert torch.equal(through(TopK(0.02, "tensor"), tensor), expected)


def test_sizes() -> None:
    assert TopK().size((4096, 10)) == TopK().size((40_960,))
    assert TopK().size((40_960,)).values == 82 * 10
    assert TopK().size((40_960,)).side_bytes == 82 * 10 * 12 / 8
    assert TopK().size((100,)).side_bytes == 2  # two of 7 bits
    assert TopK(0.5).size((40_960,)).side_bytes == 40_960 / 8
    assert TopK(scope="tensor").size((1000, 1000)).values == 20_000
    assert TopK(scope="tensor").size((1000, 1000)).side_bytes == 1 + 4 + 20_000 * 20 / 8
    assert TopK(scope="global").size((1000, 1000)).values == 1_000_000
    assert TopK(scope="global").size((1000, 1000)).side_bytes == 1 + 1_000_000 / 8


def test_no_other_choice_of_as_many_keeps_more_energy() -> None:
    tensor = torch.randn(50, 64, generator=torch.Generator().manual_seed(0)).double().float()
    kept = through(TopK(0.1, "chunk", 64), tensor).double().square().sum(dim=1)
    most = tensor.double().square().sort(dim=1, descending=True).values[:, : share(0.1, 64)].sum(dim=1)
    assert torch.allclose(kept, most, rtol=1e-12)
    whole = through(TopK(0.1, "tensor"), tensor).double().square().sum()
    assert torch.allclose(whole, tensor.double().square().view(-1).topk(320).values.sum(), rtol=1e-12)


def surveyed(stage: TopK, tensors: list[Tensor]) -> tuple[float, int]:
    """(threshold, values kept of all), after a look at what each keeps."""
    threshold = stage.survey(iter(tensors))
    assert threshold is not None and threshold > 0
    kept = 0
    for tensor in tensors:
        out = through(stage, tensor, Context(seed=0, survey=threshold))
        assert torch.equal(out, torch.where(tensor.abs() >= threshold, tensor, 0.0))
        kept += int(torch.count_nonzero(out))
    return threshold, kept


def test_the_survey_keeps_the_density_of_all_tensors_together() -> None:
    generator = torch.Generator().manual_seed(0)
    tensors = [torch.randn(60_000, generator=generator) * scale for scale in (1.0, 1e-3, 3.0, 0.0)]
    for density in (0.001, 0.02, 0.3):
        _, kept = surveyed(TopK(density, "global"), tensors)
        assert 0.96 * density * 240_000 <= kept <= density * 240_000
    assert torch.count_nonzero(through(TopK(scope="global"), tensors[1], Context(seed=0, survey=1.0))) == 0


def test_the_survey_of_odd_tensors() -> None:
    stage = TopK(0.02, "global")
    assert surveyed(stage, [torch.zeros(10), torch.zeros(0)])[1] == 0
    assert surveyed(stage, [])[1] == 0
    assert surveyed(stage, [torch.full((500,), -0.25), torch.zeros(500)]) == (0.25, 500)  # or nothing ever were kept
    assert surveyed(stage, [torch.tensor([1e-45, 0.0])])[1] == 1
    assert surveyed(stage, [torch.tensor(7.0), torch.full((49,), 1.0)])[1] == 1
    assert surveyed(TopK(1.0, "global"), [torch.randn(999)])[1] == 999
    assert TopK().survey([torch.ones(3)]) is None and TopK(scope="tensor").survey([torch.ones(3)]) is None
    with pytest.raises(ValueError, match="survey"):
        stage.encode(torch.ones(3), CONTEXT)


@pytest.mark.parametrize("scope", ["chunk", "tensor", "global"])
def test_damaged_side_information(scope: str) -> None:
    stage = TopK(0.05, scope, 64)  # type: ignore[arg-type]  # one of the three literals
    tensor = torch.randn(13, 25, generator=torch.Generator().manual_seed(0))
    shape = tuple(tensor.shape)
    reduced = stage.encode(tensor, Context(seed=0, survey=2.0))
    for cut in range(reduced.side.numel()):
        with pytest.raises(WireError):
            stage.decode(reduced.values, reduced.side[:cut], shape)
    for values in (reduced.values[1:], torch.cat([reduced.values, torch.ones(1)])):
        with pytest.raises(WireError, match="values came"):
            stage.decode(values, reduced.side, shape)
    generator = torch.Generator().manual_seed(1)
    for _ in range(1000):
        side = reduced.side.clone()
        side[torch.randint(side.numel(), (1,), generator=generator)] ^= 1 << int(
            torch.randint(8, (), generator=generator)
        )
        try:
            count = stage.value_count(side, shape)
            out = stage.decode(torch.ones(count), side, shape)
        except WireError:
            continue
        assert out.shape == shape and out.sum() == count <= stage.size(shape).values


@given(st.binary(max_size=90), st.sampled_from(["chunk", "tensor", "global"]), st.integers(0, 300), st.integers(0, 40))
@settings(deadline=None)
def test_any_bytes_are_refused_or_decode_to_the_shape(data: bytes, scope: str, length: int, count: int) -> None:
    stage = TopK(0.1, scope, 32)  # type: ignore[arg-type]  # one of the three literals
    side = torch.tensor(list(data), dtype=torch.uint8)
    try:
        out = stage.decode(torch.ones(count), side, (length,))
    except WireError:
        return
    assert out.shape == (length,) and int(out.sum()) == count


def test_more_values_than_the_density_allows_are_refused() -> None:
    tensor = torch.ones(1000)
    generous = TopK(0.1, "tensor").encode(tensor, CONTEXT)
    with pytest.raises(WireError, match="20 at most"):
        TopK(0.02, "tensor").decode(generous.values, generous.side, (1000,))


def test_decoding_takes_little_more_memory_than_its_result() -> None:
    tensor = torch.randn(2**20, generator=torch.Generator().manual_seed(0))
    for stage in (TopK(), TopK(1.0), TopK(scope="tensor"), TopK(1.0, "tensor")):
        reduced = stage.encode(tensor, CONTEXT)
        tracemalloc.start()
        stage.decode(reduced.values, reduced.side, (2**20,))
        assert tracemalloc.get_traced_memory()[1] < 5 * 2**22
        tracemalloc.stop()


def test_parameters_out_of_range_are_refused() -> None:
    for density in (0.0, -0.1, 1.1, float("nan")):
        with pytest.raises(ValueError, match="density"):
            TopK(density)
    for chunk in (0, 2**24 + 1):
        with pytest.raises(ValueError, match="chunk"):
            TopK(chunk=chunk)
    with pytest.raises(ValueError, match="scope"):
        TopK(scope="row")  # type: ignore[arg-type]  # what the test is about


def assert_is_top_k_by_chunk(sparsify: Sparsify) -> None:
    generator = torch.Generator().manual_seed(5)
    for tensor in (torch.randn(256, generator=generator), torch.randint(-3, 4, (256,), generator=generator).float()):
        expected = with_only(tensor, chunk_places(tensor.tolist(), 0.125, 64))
        assert torch.equal(sparsify(tensor, 64), expected)


def signed(tensor: Tensor, chunk: int) -> Tensor:
    rows = tensor.view(-1, chunk)
    return torch.zeros_like(rows).scatter(1, *_picked(rows, rows.argsort(dim=1, descending=True, stable=True))).view(-1)


def per_tensor(tensor: Tensor, chunk: int) -> Tensor:
    return through(TopK(0.125, "tensor", chunk), tensor)


def higher_index_first(tensor: Tensor, chunk: int) -> Tensor:
    return through(TopK(0.125, "chunk", chunk), tensor.flip(0)).flip(0)


def _picked(rows: Tensor, order: Tensor) -> tuple[Tensor, Tensor]:
    places = order[:, : share(0.125, rows.shape[1])]
    return places, rows.gather(1, places)


def test_wrong_choices_are_noticed() -> None:
    assert_is_top_k_by_chunk(lambda tensor, chunk: through(TopK(0.125, "chunk", chunk), tensor))
    for mutant in (signed, per_tensor, higher_index_first):
        with pytest.raises(AssertionError):
            assert_is_top_k_by_chunk(mutant)


def test_ties_alone_expose_the_higher_index() -> None:
    tensor = torch.ones(64)
    assert through(TopK(0.125, "chunk", 64), tensor).nonzero().view(-1).tolist() == list(range(8))
    assert higher_index_first(tensor, 64).nonzero().view(-1).tolist() == list(range(56, 64))
