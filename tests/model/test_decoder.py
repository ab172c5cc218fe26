"""The decoder beyond equality with transformers (test_hf_families.py): causality, lengths, start, cost, precision."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import create_block_mask, flex_attention
from torch.utils.flop_counter import FlopCounterMode

import photon.model.decoder as decoder_module
from photon.config import ModelConfig
from photon.errors import ConfigError
from photon.model.decoder import Decoder, Norm, Positions, alibi_bias, alibi_slopes, attend, mlp_width

VOCAB, LENGTH = 53, 16
SHAPES = {
    "alibi": {"positions": "alibi"},
    "learned": {"positions": "learned", "tied": False},
    "gpt": {"qk_norm": True},
    "llama": {"norm": "rmsnorm", "activation": "swiglu", "kv_heads": 2, "tied": False},
}


def decoder(length: int = LENGTH, **options: object) -> Decoder:
    torch.manual_seed(0)
    config = ModelConfig.model_validate({"layers": 2, "width": 32, "heads": 4, **options})
    return Decoder(config, VOCAB, length)


def tokens(length: int = LENGTH, batch: int = 2) -> Tensor:
    return torch.randint(0, VOCAB, (batch, length), generator=torch.Generator().manual_seed(1))


def looks_ahead(model: Decoder) -> bool:
    """Whether any logits change when a later token does; compared bit by bit."""
    base = tokens()
    before = model.logits(base)
    for place in (1, LENGTH // 2, LENGTH - 1):
        changed = base.clone()
        changed[:, place] = (changed[:, place] + 1) % VOCAB
        after = model.logits(changed)
        assert not torch.equal(after[:, place:], before[:, place:]), "the changed token must matter at all"
        if not torch.equal(after[:, :place], before[:, :place]):
            return True
    return False


@pytest.mark.parametrize("name", SHAPES)
@torch.no_grad()
def test_no_token_sees_a_later_one(name: str) -> None:
    assert not looks_ahead(decoder(**SHAPES[name]))


@torch.no_grad()
def test_the_causality_check_rejects_attention_without_a_mask(monkeypatch: pytest.MonkeyPatch) -> None:
    def everywhere(q: Tensor, k: Tensor, v: Tensor, positions: Positions) -> Tensor:
        return functional.scaled_dot_product_attention(q, k, v)

    monkeypatch.setattr(decoder_module, "attend", everywhere)
    assert looks_ahead(decoder())


@pytest.mark.parametrize("name", SHAPES)
@torch.no_grad()
def test_a_shorter_input_gives_the_first_logits(name: str) -> None:
    model = decoder(**SHAPES[name])
    torch.testing.assert_close(model.logits(tokens()[:, :5]), model.logits(tokens())[:, :5], atol=1e-6, rtol=0)


@torch.no_grad()
def test_only_alibi_reads_beyond_its_length() -> None:
    short, long = decoder(positions="alibi"), decoder(2 * LENGTH, positions="alibi")
    torch.testing.assert_close(short.logits(tokens(2 * LENGTH)), long.logits(tokens(2 * LENGTH)))
    for positions in ("rope", "learned"):
        with pytest.raises(ConfigError, match=rf"{LENGTH + 1} tokens.*{positions} positions end.*{LENGTH}"):
            decoder(positions=positions).logits(tokens(LENGTH + 1))


@torch.no_grad()
def test_fresh_weights() -> None:
    model = decoder(width=128, layers=8, init_std=0.05, norm="rmsnorm", activation="swiglu", qk_norm=True, tied=False)
    for name, weight in model.named_parameters():
        if weight.dim() == 1:
            assert torch.equal(weight, torch.ones_like(weight)), name
            continue
        expected = 0.05 / 4 if name.endswith(("o_proj.weight", "down_proj.weight")) else 0.05
        spread = expected / math.sqrt(2 * weight.numel())  # standard error of a sample's std
        assert abs(float(weight.std()) - expected) < 5 * spread, name
        assert abs(float(weight.mean())) < 5 * expected / math.sqrt(weight.numel()), name
    assert abs(float(model.loss(tokens(), tokens())) - math.log(VOCAB)) < 0.3, "starts near the uniform distribution"


def test_mlp_width_of_swiglu_spends_what_gelu_would() -> None:
    for width in (128, 768, 4096):
        gelu = 2 * width * mlp_width(ModelConfig(width=width))
        swiglu = 3 * width * mlp_width(ModelConfig(width=width, activation="swiglu"))
        assert mlp_width(ModelConfig(width=width, activation="swiglu")) % 64 == 0
        assert gelu <= swiglu < gelu + 3 * width * 64


def counted_flops(model: Decoder, batch: Tensor) -> int:
    """FLOPs that torch counts in one training step, attention as the two plain matrix products that it is."""
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        logits = model.logits(batch)
        functional.cross_entropy(logits.flatten(0, 1), batch.flatten()).backward()
    return counter.get_total_flops()


@pytest.mark.parametrize("name", SHAPES)
def test_flops_are_those_that_torch_counts(name: str) -> None:
    model, batch = decoder(**SHAPES[name]), tokens()
    counted = counted_flops(model, batch)
    assert model.flops_per_token(LENGTH) * batch.numel() == counted
    parameters = sum(p.numel() for p in model.parameters())
    wrong = (6 * parameters, 6 * parameters + 12 * 2 * LENGTH * 32, 2 * model.flops_per_token(LENGTH) // 6)
    assert all(per_token * batch.numel() != counted for per_token in wrong)


def test_alibi_slopes_are_the_published_ones() -> None:
    assert alibi_slopes(8).tolist() == [2.0**-i for i in range(1, 9)]
    assert alibi_slopes(1).tolist() == [2.0**-8]
    of_16 = [2.0 ** (-i / 2) for i in range(1, 17)]
    assert alibi_slopes(12).tolist() == pytest.approx([*of_16[1::2], *of_16[:8:2]], rel=1e-6)


def eager_flex() -> Callable[..., Tensor]:
    return flex_attention


@torch.no_grad()
@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("kv_heads", [6, 2])
def test_both_ways_of_alibi_agree(kv_heads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """flex_attention, the CUDA path, against SDPA with a bias; on the CPU it can at least run forward, uncompiled."""
    monkeypatch.setattr(decoder_module, "_compiled_flex_attention", eager_flex)
    q = torch.randn(2, 6, 9, 16)
    k, v = torch.randn(2, 2, kv_heads, 9, 16).unbind(0)
    slopes = alibi_slopes(6)
    blocks = create_block_mask(lambda b, h, i, j: i >= j, None, None, 9, 9, device="cpu")
    flex = attend(q, k, v, Positions(slopes=slopes, blocks=blocks))
    sdpa = attend(q, k, v, Positions(bias=alibi_bias(slopes, 9)))
    torch.testing.assert_close(flex, sdpa)
    compiled = torch.compile(attend, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(q, k, v, Positions(slopes=slopes, blocks=blocks)), sdpa)
    reversed_ = attend(q, k, v, Positions(slopes=slopes.flip(0), blocks=blocks))
    assert (reversed_ - sdpa).abs().max() > 1e-3


def attention_calls(model: nn.Module, batch: Tensor) -> list[dict[str, Any]]:
    """Mask and causal flag of every SDPA call in the graph that torch.compile captures of one loss."""
    calls: list[dict[str, Any]] = []

    def capture(graph: torch.fx.GraphModule, _inputs: list[Tensor]) -> Callable[..., Any]:
        calls.extend(n.kwargs for n in graph.graph.nodes if n.target is functional.scaled_dot_product_attention)
        return graph.forward

    torch._dynamo.reset()
    torch.compile(model.loss, backend=capture, dynamic=False)(batch, batch)
    return calls


def test_compiled_attention_is_causal_without_a_mask() -> None:
    model = decoder()
    calls = attention_calls(model, tokens())
    assert len(calls) == 2
    assert all(call["attn_mask"] is None and call["is_causal"] is True for call in calls)
    assert all(call["attn_mask"] is not None for call in attention_calls(decoder(positions="alibi"), tokens()))


@pytest.mark.parametrize("name", SHAPES)
def test_autocast_keeps_norms_and_loss_in_float32(name: str) -> None:
    model, batch = decoder(**SHAPES[name]), tokens()
    exact = model.loss(batch, batch)
    norms: list[torch.dtype] = []
    for module in model.modules():
        if isinstance(module, Norm):
            module.register_forward_hook(lambda _m, _i, out: norms.append(out.dtype))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = model.loss(batch, batch)
    loss.backward()
    assert loss.dtype == torch.float32
    assert set(norms) == {torch.float32}
    assert float((loss - exact).detach().abs()) < 0.02
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in model.parameters())


@pytest.mark.parametrize("name", SHAPES)
def test_float64_all_the_way(name: str) -> None:
    """Exact equalities of methods are tested in double precision; nothing on the way may round to single."""
    model, batch = decoder(**SHAPES[name]), tokens()
    single = model.loss(batch, batch)
    double = model.double().loss(batch, batch)
    assert double.dtype == torch.float64
    assert 0 < float((double - single).detach().abs()) < 1e-5


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("name", SHAPES)
def test_cuda_gives_the_cpu_s_loss_and_gradients(name: str) -> None:
    model = decoder(128, **{"width": 64, **SHAPES[name]})
    batch = tokens(128)
    model.loss(batch, batch).backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    loss = float(model.loss(batch, batch))
    model.zero_grad()
    model.cuda()
    on_device = model.loss(batch.cuda(), batch.cuda())
    on_device.backward()
    assert float(on_device) == pytest.approx(loss, abs=1e-3)
    for name_, p in model.named_parameters():
        assert p.grad is not None
        torch.testing.assert_close(p.grad.cpu(), expected[name_], atol=1e-3, rtol=1e-2)
