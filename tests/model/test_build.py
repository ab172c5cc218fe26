"""Building by seed, counting on the meta device, and moving weights by name."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from photon.config import ModelConfig
from photon.errors import ConfigError, StateError
from photon.model.build import ParameterCount, build_model, count_parameters, load_weights, named_weights

CONFIG = ModelConfig(layers=2, width=32, heads=4)


def test_the_seed_decides_the_weights_and_nothing_else() -> None:
    torch.manual_seed(1)
    before = torch.random.get_rng_state()
    first = named_weights(build_model(CONFIG, 40, 8, seed=7))
    assert torch.equal(torch.random.get_rng_state(), before)
    torch.manual_seed(2)
    again = named_weights(build_model(CONFIG, 40, 8, seed=7))
    other = named_weights(build_model(CONFIG, 40, 8, seed=8))
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not any(torch.equal(first[name], other[name]) for name in first if first[name].dim() == 2)


def test_nothing_is_trained_that_cannot_leave() -> None:
    with pytest.raises(ConfigError, match="no Hugging Face architecture"):
        build_model(ModelConfig(positions="alibi", norm="rmsnorm"), 40, 8, seed=0)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("positions", ["rope", "learned"])
def test_the_count_is_that_of_the_built_model(tied: bool, positions: str) -> None:
    config = CONFIG.model_copy(update={"tied": tied, "positions": positions})
    weights = named_weights(build_model(config, 40, 8, seed=0))
    outer = 40 * 32 * (1 if tied else 2) + (8 * 32 if positions == "learned" else 0)
    total = sum(weight.numel() for weight in weights.values())
    assert count_parameters(config, 40, 8) == ParameterCount(total, total - outer)
    assert ("lm_head.weight" in weights) is not tied


@pytest.mark.parametrize(
    ("layers", "width", "heads", "billions"),
    [(12, 768, 12, 0.124), (24, 2048, 16, 1.31), (32, 2560, 20, 2.65), (32, 4096, 32, 6.65)],
)
def test_the_paper_s_sizes(layers: int, width: int, heads: int, billions: float) -> None:
    config = ModelConfig(layers=layers, width=width, heads=heads, positions="alibi")
    body = layers * (12 * width**2 + 2 * width) + width
    count = count_parameters(config, 50368, 2048)
    assert count == ParameterCount(body + 50368 * width, body)
    assert count.total / 1e9 == pytest.approx(billions, rel=0.005)


def test_counting_waits_for_no_compiler() -> None:
    """`photon presets` counts every model: with torch's compiler that was seven seconds."""
    code = (
        "import sys; from photon.results import presets_table; presets_table(); "
        "sys.exit(any(m in sys.modules for m in ('torch._dynamo', 'sympy')))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False, timeout=60).returncode == 0


def test_weights_move_by_name_into_the_same_memory() -> None:
    source, target = build_model(CONFIG, 40, 8, seed=1), build_model(CONFIG, 40, 8, seed=2)
    places = {name: weight.data_ptr() for name, weight in named_weights(target).items()}
    load_weights(target, {name: weight.double() for name, weight in named_weights(source).items()})
    for name, weight in named_weights(target).items():
        assert torch.equal(weight, named_weights(source)[name])
        assert weight.data_ptr() == places[name]
        assert not weight.requires_grad
    assert all(parameter.requires_grad for parameter in target.parameters())


def test_foreign_weights_are_refused_before_anything_changes() -> None:
    model = build_model(CONFIG, 40, 8, seed=1)
    before = {name: weight.clone() for name, weight in named_weights(model).items()}
    zeros = {name: torch.zeros_like(weight) for name, weight in before.items()}
    last = list(zeros)[-1]
    for wrong, message in (
        ({k: v for k, v in zeros.items() if k != last}, f"missing {last}, unknown none"),
        (zeros | {f"x{i}": torch.zeros(1) for i in range(5)}, "missing none, unknown x0, x1, x2 and 2 more"),
        (zeros | {last: torch.zeros(33)}, rf"{last} has shape \[33\] where the model has \[32\]"),
    ):
        with pytest.raises(StateError, match=message):
            load_weights(model, wrong)
        assert all(torch.equal(weight, before[name]) for name, weight in named_weights(model).items())


def test_transformers_is_not_imported_before_it_is_needed() -> None:
    code = "import sys, photon.model.build; sys.exit('transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
