"""Groups against hand-written updates; state in and out, with two virtual nodes on one optimizer object."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Literal

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from photon.config import NodeConfig
from photon.errors import StateError
from photon.node.optimizers import build_optimizer, export_state, hidden_matrices, import_state, set_learning_rate

CPU = torch.device("cpu")
Kind = Literal["adamw", "muon", "sgd"]
KINDS: list[Kind] = ["adamw", "muon", "sgd"]
Importer = Callable[[torch.optim.Optimizer, nn.Module, Mapping[str, Tensor]], None]


class Tiny(nn.Module):
    """Embedding, one hidden matrix with a bias, a norm, and an output head, tied or not."""

    def __init__(self, tied: bool = True) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(11, 6)
        self.hidden = nn.Linear(6, 6)
        self.norm = nn.LayerNorm(6)
        self.lm_head = nn.Linear(6, 11, bias=False)
        if tied:
            self.lm_head.weight = self.embed.weight

    def forward(self, tokens: Tensor) -> Tensor:
        logits: Tensor = self.lm_head(self.norm(torch.tanh(self.hidden(self.embed(tokens)))))
        return logits


def recipe(kind: Kind) -> NodeConfig:
    return NodeConfig(optimizer=kind, lr=0.02, muon_lr=0.05, momentum=0.9, weight_decay=0.1)


def train(model: nn.Module, optimizer: torch.optim.Optimizer, seed: int, steps: int) -> None:
    """`steps` steps on the text of the node `seed`."""
    for step in range(steps):
        tokens = torch.randint(0, 11, (4, 5), generator=torch.Generator().manual_seed(100 * seed + step))
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())
        loss.backward()
        optimizer.step()


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def load(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(tensors[name])


@pytest.mark.parametrize("tied", [True, False])
def test_embeddings_heads_norms_and_biases_are_no_hidden_matrices(tied: bool) -> None:
    assert hidden_matrices(Tiny(tied)) == {"hidden.weight"}
    frozen = Tiny(tied)
    frozen.hidden.weight.requires_grad_(False)
    assert hidden_matrices(frozen) == set()


def test_hidden_matrices_of_hugging_face_models() -> None:
    transformers = pytest.importorskip("transformers")
    llama = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=16,
            hidden_size=8,
            intermediate_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            tie_word_embeddings=False,
        )
    )
    names = hidden_matrices(nn.ModuleDict({"wrapped": llama}))
    assert {n.split(".")[-2] for n in names} == {
        "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"
    }  # fmt: skip
    neox = transformers.GPTNeoXForCausalLM(
        transformers.GPTNeoXConfig(
            vocab_size=16, hidden_size=8, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2
        )
    )
    assert {n.split(".")[-2] for n in hidden_matrices(neox)} == {
        "query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"
    }  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_every_trainable_parameter_is_in_exactly_one_group_with_its_peak_rate(kind: Kind) -> None:
    model = Tiny(tied=False)
    model.norm.bias.requires_grad_(False)
    optimizer = build_optimizer(model, recipe(kind), CPU)
    matrices, others = optimizer.param_groups
    assert matrices["params"] == [model.hidden.weight]
    assert {id(p) for p in others["params"]} == {
        id(p) for p in model.parameters() if p.requires_grad and p is not model.hidden.weight
    }
    assert (matrices["weight_decay"], others["weight_decay"]) == (0.1, 0.0)
    set_learning_rate(optimizer, 0.5)
    assert (matrices["lr"], others["lr"]) == ((0.025 if kind == "muon" else 0.01), 0.01)
    assert (matrices["initial_lr"], others["initial_lr"]) == ((0.05 if kind == "muon" else 0.02), 0.02)


def adamw_by_hand(decay_everything: bool = False) -> dict[str, Tensor]:
    """Five AdamW steps in plain float64 arithmetic (Loshchilov & Hutter 2019, algorithm 2)."""
    model = Tiny().double()
    first = {n: torch.zeros_like(p) for n, p in model.named_parameters()}
    second = {n: torch.zeros_like(p) for n, p in model.named_parameters()}
    for step in range(5):
        train(model, torch.optim.SGD(model.parameters(), lr=0.0), seed=step, steps=1)
        with torch.no_grad():
            for name, p in model.named_parameters():
                assert p.grad is not None
                first[name] = 0.9 * first[name] + 0.1 * p.grad
                second[name] = 0.95 * second[name] + 0.05 * p.grad**2
                unbiased = first[name] / (1 - 0.9 ** (step + 1))
                deviation = (second[name] / (1 - 0.95 ** (step + 1))).sqrt()
                decay = 0.1 if decay_everything or name == "hidden.weight" else 0.0
                p.copy_(p - 0.02 * decay * p - 0.02 * unbiased / (deviation + 1e-8))
    return weights(model)


def test_adamw_equals_the_algorithm_by_hand() -> None:
    model = Tiny().double()
    optimizer = build_optimizer(model, recipe("adamw"), CPU)
    for step in range(5):
        train(model, optimizer, seed=step, steps=1)
    torch.testing.assert_close(weights(model), adamw_by_hand(), atol=1e-10, rtol=0)
    with pytest.raises(AssertionError):  # the mutant that decays embeddings, norms and biases too
        torch.testing.assert_close(weights(model), adamw_by_hand(decay_everything=True), atol=1e-10, rtol=0)


def test_sgd_without_momentum_is_gradient_descent_and_has_no_state() -> None:
    model, reference = Tiny().double(), Tiny().double()
    optimizer = build_optimizer(model, NodeConfig(optimizer="sgd", lr=0.1, weight_decay=0.0), CPU)
    train(model, optimizer, seed=1, steps=1)
    train(reference, torch.optim.SGD(reference.parameters(), lr=0.0), seed=1, steps=1)
    for p, r in zip(model.parameters(), reference.parameters(), strict=True):
        assert r.grad is not None
        torch.testing.assert_close(p.detach(), r.detach() - 0.1 * r.grad, atol=1e-14, rtol=0)
    assert export_state(optimizer, model) == {}
    import_state(optimizer, model, {})


@pytest.mark.parametrize("kind", KINDS)
def test_a_rate_of_zero_leaves_weights_bit_identical(kind: Kind) -> None:
    model = Tiny()
    before = weights(model)
    optimizer = build_optimizer(model, recipe(kind), CPU)
    set_learning_rate(optimizer, 0.0)
    train(model, optimizer, seed=1, steps=3)
    assert all(torch.equal(before[n], w) for n, w in weights(model).items())


@pytest.mark.parametrize("kind", KINDS)
def test_exported_state_is_independent_contiguous_and_survives_safetensors(kind: Kind, tmp_path: Path) -> None:
    model = Tiny()
    optimizer = build_optimizer(model, recipe(kind), CPU)
    assert export_state(optimizer, model) == {}
    train(model, optimizer, seed=1, steps=2)
    state = export_state(optimizer, model)
    names = {name for name, _ in model.named_parameters()}
    of_matrix = {"muon": {"momentum_buffer"}, "sgd": {"momentum_buffer"}, "adamw": {"step", "exp_avg", "exp_avg_sq"}}
    assert {k.rpartition("/")[0] for k in state} == names
    assert {k.rpartition("/")[2] for k in state if k.startswith("hidden.weight/")} == of_matrix[kind]
    if kind != "sgd":
        assert state["norm.weight/step"].shape == ()
        assert state["norm.weight/step"].item() == 2
    kept = {k: v.clone() for k, v in state.items()}
    save_file(state, tmp_path / "state.safetensors")
    train(model, optimizer, seed=2, steps=1)
    restored = load_file(tmp_path / "state.safetensors")
    assert state.keys() == restored.keys()
    for key, value in state.items():
        assert value.is_contiguous()
        assert torch.equal(value, kept[key])
        assert torch.equal(value, restored[key])
        assert value.shape == restored[key].shape


def separately(kind: Kind) -> list[dict[str, Tensor]]:
    """Two nodes, each with its own model and optimizer; then a third that comes in fresh."""
    results = []
    for seed, steps in ((1, 6), (2, 4), (3, 2)):
        model = Tiny()
        train_in_turns(model, build_optimizer(model, recipe(kind), CPU), seed, steps)
        results.append(weights(model))
    return results


def train_in_turns(model: nn.Module, optimizer: torch.optim.Optimizer, seed: int, steps: int) -> None:
    for turn in range(steps // 2):
        train(model, optimizer, seed=10 * seed + turn, steps=2)


def interleaved(kind: Kind, importer: Importer) -> list[dict[str, Tensor]]:
    """The same three nodes in turns of two steps on one model and one optimizer."""
    model = Tiny()
    optimizer = build_optimizer(model, recipe(kind), CPU)
    initial = weights(model)
    nodes = {seed: (dict(initial), dict[str, Tensor]()) for seed in (1, 2, 3)}
    for seed, turn in ((1, 0), (2, 0), (1, 1), (2, 1), (1, 2), (3, 0)):
        node_weights, node_state = nodes[seed]
        load(model, node_weights)
        importer(optimizer, model, node_state)
        train(model, optimizer, seed=10 * seed + turn, steps=2)
        nodes[seed] = weights(model), export_state(optimizer, model)
    return [node_weights for node_weights, _ in nodes.values()]


def same(a: list[dict[str, Tensor]], b: list[dict[str, Tensor]]) -> bool:
    return all(torch.equal(x[n], y[n]) for x, y in zip(a, b, strict=True) for n in x)


def forgets_step(optimizer: torch.optim.Optimizer, model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    import_state(optimizer, model, {k: torch.zeros_like(v) if k.endswith("/step") else v for k, v in tensors.items()})


def leaks_into_fresh_nodes(optimizer: torch.optim.Optimizer, model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    if tensors:
        import_state(optimizer, model, tensors)


def never_swaps(optimizer: torch.optim.Optimizer, model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """The defect of keeping one optimizer for all virtual nodes."""


@pytest.mark.parametrize("kind", KINDS)
def test_nodes_taking_turns_on_one_optimizer_train_as_if_alone(kind: Kind) -> None:
    alone = separately(kind)
    assert same(interleaved(kind, import_state), alone)
    assert not same(interleaved(kind, leaks_into_fresh_nodes), alone)
    assert not same(interleaved(kind, never_swaps), alone)
    if kind != "sgd":
        assert not same(interleaved(kind, forgets_step), alone)


@pytest.mark.parametrize("kind", KINDS)
def test_import_reuses_buffers_and_an_empty_one_is_as_newly_built(kind: Kind) -> None:
    model = Tiny()
    optimizer = build_optimizer(model, recipe(kind), CPU)
    train(model, optimizer, seed=1, steps=2)
    state = export_state(optimizer, model)
    buffer = optimizer.state[model.hidden.weight]
    addresses = {k: v.data_ptr() for k, v in buffer.items()}
    train(model, optimizer, seed=2, steps=2)
    import_state(optimizer, model, state)
    assert {k: v.data_ptr() for k, v in optimizer.state[model.hidden.weight].items()} == addresses
    assert all(torch.equal(v, state[k]) for k, v in export_state(optimizer, model).items())
    import_state(optimizer, model, {})
    assert len(optimizer.state) == 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"nobody.weight/exp_avg": torch.zeros(6, 6)}, "nobody.weight"),
        ({"no_slash": torch.zeros(6, 6)}, "does not train"),
        ({"hidden.weight/exp_avg": torch.zeros(6, 5)}, r"\(6, 5\)"),
        ({"hidden.weight/exp_avg": torch.zeros(6, 6, dtype=torch.float64)}, "float64"),
        ({"hidden.weight/step": torch.zeros(1)}, r"\(1,\)"),
        ({"hidden.weight/momentum_buffer": torch.zeros(6, 6)}, "momentum_buffer"),
        ({"hidden.weight/step": None}, "hidden.weight"),
    ],
)
def test_a_foreign_state_is_refused_before_anything_changes(change: dict[str, Tensor | None], message: str) -> None:
    model = Tiny()
    optimizer = build_optimizer(model, recipe("adamw"), CPU)
    train(model, optimizer, seed=1, steps=1)
    state = export_state(optimizer, model)
    train(model, optimizer, seed=2, steps=1)
    before = export_state(optimizer, model)
    foreign = {k: v for k, v in (state | change).items() if v is not None}
    with pytest.raises(StateError, match=message):
        import_state(optimizer, model, foreign)
    assert all(torch.equal(v, before[k]) for k, v in export_state(optimizer, model).items())


def test_state_of_another_optimizer_is_refused() -> None:
    model = Tiny()
    muon, adamw = (build_optimizer(model, recipe(kind), CPU) for kind in ("muon", "adamw"))
    train(model, muon, seed=1, steps=1)
    with pytest.raises(StateError, match="momentum_buffer"):
        import_state(adamw, model, export_state(muon, model))


def test_a_parameter_that_never_had_a_gradient_keeps_no_state() -> None:
    model = Tiny()
    model.register_parameter("unused", nn.Parameter(torch.ones(2, 2)))
    optimizer = build_optimizer(model, recipe("adamw"), CPU)
    train(model, optimizer, seed=1, steps=1)
    state = export_state(optimizer, model)
    assert not any(k.startswith("unused") for k in state)
    import_state(optimizer, model, state)
    assert export_state(optimizer, model).keys() == state.keys()
