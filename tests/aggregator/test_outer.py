"""Outer optimizers equal torch.optim traces on the pseudo-gradient; the wrong ones of the paper's code do not."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from photon.aggregator.outer import OuterOptimizer
from photon.config import FederationConfig
from photon.errors import StateError

ROUNDS = 6


def federation(outer: str, **changes: object) -> FederationConfig:
    return FederationConfig.model_validate({"outer": outer, "outer_lr": 0.7, "outer_momentum": 0.9} | changes)


def pseudo_gradients() -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    return [
        {
            "w": torch.randn(3, 2, generator=generator, dtype=torch.float64) * 0.1,
            "b": torch.randn(4, generator=generator),
        }
        for _ in range(ROUNDS)
    ]


def start() -> dict[str, Tensor]:
    return {"w": torch.ones(3, 2, dtype=torch.float64), "b": torch.zeros(4)}


def trace(optimizer: OuterOptimizer) -> list[Tensor]:
    out = []
    for gradient in pseudo_gradients():
        optimizer.step(gradient.items())
        out.append(optimizer.weights()["w"].clone())
    return out


def torch_trace(build: Callable[[list[nn.Parameter]], torch.optim.Optimizer]) -> list[Tensor]:
    parameter = nn.Parameter(start()["w"])
    optimizer = build([parameter])
    out = []
    for gradient in pseudo_gradients():
        parameter.grad = gradient["w"]
        optimizer.step()
        out.append(parameter.detach().clone())
    return out


REFERENCES: dict[str, Callable[[list[nn.Parameter]], torch.optim.Optimizer]] = {
    "fedavg": lambda p: torch.optim.SGD(p, lr=0.7),
    "momentum": lambda p: torch.optim.SGD(p, lr=0.7, momentum=0.9),
    "nesterov": lambda p: torch.optim.SGD(p, lr=0.7, momentum=0.9, nesterov=True),
    "adam": lambda p: torch.optim.Adam(p, lr=0.7, betas=(0.9, 0.99), eps=1e-8),
}


@pytest.mark.parametrize("name", REFERENCES)
def test_equals_torch(name: str) -> None:
    ours = trace(OuterOptimizer(start().items(), federation(name)))
    assert all(torch.equal(a, b) for a, b in zip(ours, torch_trace(REFERENCES[name]), strict=True))


@pytest.mark.parametrize("name", REFERENCES)
def test_no_two_are_the_same_optimizer(name: str) -> None:
    """The mutants: heavy ball sold as Nesterov, momentum dropped, ..."""
    ours = trace(OuterOptimizer(start().items(), federation(name)))
    for other, build in REFERENCES.items():
        if other != name:
            assert not torch.allclose(ours[-1], torch_trace(build)[-1], atol=1e-3)


def test_nesterov_by_hand() -> None:
    """v <- mu v + delta; theta <- theta - lr (delta + mu v)."""
    theta, velocity = start()["w"], torch.zeros(3, 2, dtype=torch.float64)
    for gradient in pseudo_gradients():
        velocity = 0.9 * velocity + gradient["w"]
        theta = theta - 0.7 * (gradient["w"] + 0.9 * velocity)
    assert (trace(OuterOptimizer(start().items(), federation("nesterov")))[-1] - theta).abs().max() < 1e-14


def test_yogi_by_hand() -> None:
    theta, mean, square = 1.0, 0.0, 0.0
    start = {"w": torch.tensor([1.0], dtype=torch.float64)}
    optimizer = OuterOptimizer(start.items(), federation("yogi", outer_lr=0.1, outer_betas=(0.9, 0.99), outer_eps=1e-3))
    for step, gradient in enumerate([0.5, -0.25, 2.0, 0.1, 0.1], start=1):
        mean = 0.9 * mean + 0.1 * gradient
        square = square - 0.01 * ((square > gradient**2) - (square < gradient**2)) * gradient**2
        theta -= 0.1 * (mean / (1 - 0.9**step)) / ((square / (1 - 0.99**step)) ** 0.5 + 1e-3)
        optimizer.step({"w": torch.tensor([gradient], dtype=torch.float64)}.items())
        assert abs(optimizer.weights()["w"].item() - theta) < 1e-12


def large(seed: int) -> Tensor:
    """float32 of three pieces and a bit, of all sizes, both zeros among them."""
    values = torch.randn(3 * 2**16 + 17, generator=torch.Generator().manual_seed(seed))
    values *= 10.0 ** (torch.arange(values.numel()) % 7 - 4)
    values[::5], values[1::5] = 0.0, -0.0
    return values


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("name", REFERENCES)
def test_large_tensors_equal_torch_with_any_number_of_threads(name: str, threads: int) -> None:
    """A piece at a time, or cut up between threads: the same bits, and the same state under the same names."""
    parameter = nn.Parameter(large(0))
    reference = REFERENCES[name]([parameter])
    optimizer = OuterOptimizer({"w": large(0)}.items(), federation(name))
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        for seed in range(1, 4):
            parameter.grad = large(seed)
            reference.step()
            optimizer.step([("w", large(seed))])
    finally:
        torch.set_num_threads(before)
    assert torch.equal(bits(optimizer.weights()["w"]), bits(parameter.detach()))
    kept = {f"w/{kind}": value for kind, value in reference.state[parameter].items() if value is not None}
    exported = optimizer.export_state()
    assert exported.keys() == kept.keys()
    assert all(torch.equal(bits(exported[key]), bits(value)) for key, value in kept.items())


def bits(tensor: Tensor) -> Tensor:
    """So that 0.0 and -0.0 differ."""
    return tensor.view(torch.int32)


def test_norms_are_those_of_the_gradient_and_of_the_move() -> None:
    weights, gradient = {"w": large(0), "empty": torch.zeros(0)}, {"empty": torch.zeros(0), "w": large(1)}
    optimizer = OuterOptimizer(weights.items(), federation("nesterov"))
    stepped = optimizer.step(gradient.items())
    moved = (weights["w"] - optimizer.weights()["w"]).double().norm()
    assert stepped.gradient_norm == pytest.approx(float(large(1).double().norm()), rel=1e-12)
    assert stepped.moved_norm == pytest.approx(float(moved), rel=1e-12)
    assert stepped.moved_norm == pytest.approx(0.7 * 1.9 * stepped.gradient_norm, rel=1e-3)


@pytest.mark.parametrize("names", [[], ["w"], ["w", "w", "b"]])
def test_a_pseudo_gradient_without_every_tensor_once_is_refused(names: list[str]) -> None:
    gradient = pseudo_gradients()[0]
    with pytest.raises(ValueError, match="every tensor once"):
        OuterOptimizer(start().items(), federation("fedavg")).step([(name, gradient[name]) for name in names])


@pytest.mark.parametrize("name", ["momentum", "adam", "yogi"])
def test_scalars_and_empty_tensors_step_too(name: str) -> None:
    optimizer = OuterOptimizer({"scalar": torch.tensor(1.0), "empty": torch.zeros(0)}.items(), federation(name))
    for _ in range(2):
        optimizer.step({"scalar": torch.tensor(0.5), "empty": torch.zeros(0)}.items())
    assert optimizer.weights()["scalar"].shape == ()
    assert optimizer.weights()["scalar"].item() < 0.5
    copy = OuterOptimizer(optimizer.weights().items(), federation(name))
    copy.import_state(optimizer.export_state())
    assert copy.export_state().keys() == optimizer.export_state().keys()


@pytest.mark.parametrize("name", ["fedavg", "momentum", "nesterov", "adam", "yogi", "none"])
def test_every_optimizer_moves_towards_the_nodes(name: str) -> None:
    """delta = base - local: descending along it must bring the base nearer to the nodes. (The paper's code ascends.)"""
    local = torch.full((3,), 0.5)
    optimizer = OuterOptimizer({"w": torch.ones(3)}.items(), federation(name, outer_lr=0.1))
    optimizer.step({"w": torch.ones(3) - local}.items())
    moved = optimizer.weights()["w"]
    assert torch.all((moved - local).abs() < (torch.ones(3) - local).abs())


def test_first_momentum_step_does_not_blow_up_the_weights() -> None:
    """The paper's FedMom multiplies weights by 1 + momentum in round 1."""
    optimizer = OuterOptimizer({"w": torch.ones(2)}.items(), federation("momentum", outer_lr=1.0))
    optimizer.step({"w": torch.zeros(2)}.items())
    assert torch.equal(optimizer.weights()["w"], torch.ones(2))


@pytest.mark.parametrize("name", ["fedavg", "momentum", "nesterov", "adam", "yogi", "none"])
def test_zero_pseudo_gradient_leaves_the_first_round_bit_identical(name: str) -> None:
    optimizer = OuterOptimizer(start().items(), federation(name))
    optimizer.step({"w": torch.zeros(3, 2, dtype=torch.float64), "b": torch.zeros(4)}.items())
    assert all(torch.equal(optimizer.weights()[key], value) for key, value in start().items())


@pytest.mark.parametrize("name", ["fedavg", "momentum", "nesterov", "adam", "yogi"])
def test_state_committed_and_restored_continues_bit_for_bit(name: str) -> None:
    whole = trace(OuterOptimizer(start().items(), federation(name)))
    gradients = pseudo_gradients()
    first = OuterOptimizer(start().items(), federation(name))
    for gradient in gradients[:3]:
        first.step(gradient.items())
    second = OuterOptimizer(first.weights().items(), federation(name))
    second.import_state(first.export_state())
    forgetful = OuterOptimizer(first.weights().items(), federation(name))  # the mutant: state not restored
    for gradient in gradients[3:]:
        second.step(gradient.items())
        forgetful.step(gradient.items())
    assert torch.equal(second.weights()["w"], whole[-1])
    assert name == "fedavg" or not torch.equal(forgetful.weights()["w"], whole[-1])


@pytest.mark.parametrize("name", ["fedavg", "momentum", "nesterov"])
def test_what_is_held_back_is_stepped_along_with_the_step_after(name: str) -> None:
    """Also after a commit; the last step takes both. `w` is of more than one piece, the norm that of both steps."""
    gradients = [{"w": large(seed)} for seed in range(1, 5)]
    at_once, late = (OuterOptimizer({"w": large(0)}.items(), federation(name)) for _ in range(2))
    for index, gradient in enumerate(gradients):
        before = late.weights()["w"].clone()
        late.follow(federation(name), ["w"], holds_back=index < 3)
        stepped = late.step([("w", gradient["w"].clone())])
        assert stepped.gradient_norm == pytest.approx(float(gradient["w"].double().norm()))
        assert stepped.moved_norm == pytest.approx(float((before - late.weights()["w"]).double().norm()))
        if index:
            at_once.step(gradients[index - 1].items())
        if index < 3:
            assert torch.equal(bits(late.weights()["w"]), bits(at_once.weights()["w"]))
            restored = OuterOptimizer(late.weights().items(), federation(name))
            restored.import_state(late.export_state())
            late = restored
    assert not torch.equal(late.weights()["w"], at_once.weights()["w"])
    at_once.step(gradients[-1].items())
    assert torch.equal(bits(late.weights()["w"]), bits(at_once.weights()["w"]))
    assert "w/held" not in late.export_state()


def test_what_is_held_back_takes_one_copy_whatever_it_came_in() -> None:
    optimizer = OuterOptimizer({"w": large(0)}.items(), federation("nesterov"))
    optimizer.follow(federation("nesterov"), ["w"], holds_back=True)
    places = set()
    for seed in range(1, 4):
        sums = torch.empty(2 * large(seed).numel())  # as a merge makes it: in the place of sums of 64 bits
        optimizer.step([("w", sums[: large(seed).numel()].copy_(large(seed)))])
        held = optimizer.export_state()["w/held"]
        assert torch.equal(bits(held), bits(large(seed)))
        assert held.untyped_storage().nbytes() == 4 * held.numel()
        places.add(held.data_ptr())
    assert len(places) == 1


def test_what_is_held_back_is_applied_by_whatever_optimizer_comes_next() -> None:
    before = OuterOptimizer(start().items(), federation("nesterov"))
    before.follow(federation("nesterov"), start(), holds_back=True)
    first, second = pseudo_gradients()[:2]
    before.step(first.items())
    after = OuterOptimizer(before.weights().items(), federation("fedavg"))
    after.import_state(before.export_state())
    after.step(second.items())
    expected = start()["w"] - 0.7 * first["w"] - 0.7 * second["w"]
    assert (after.weights()["w"] - expected).abs().max() < 1e-15
    with pytest.raises(StateError, match="does not fit"):
        after.import_state({"w/held": torch.zeros(3)})


def test_fedavg_uses_the_configured_learning_rate() -> None:
    """The paper's code hard-codes 1.0."""
    optimizer = OuterOptimizer({"w": torch.ones(1)}.items(), federation("fedavg", outer_lr=0.25))
    optimizer.step({"w": torch.ones(1)}.items())
    assert optimizer.weights()["w"].item() == 0.75


def test_a_foreign_state_is_refused() -> None:
    with pytest.raises(StateError, match="does not fit"):
        OuterOptimizer(start().items(), federation("adam")).import_state({"other/exp_avg": torch.zeros(3)})
    with pytest.raises(StateError, match="does not fit"):
        OuterOptimizer(start().items(), federation("adam")).import_state({"w/exp_avg": torch.zeros(3)})
    with pytest.raises(StateError, match="lacks 'step'"):
        moments = {"w/exp_avg": start()["w"], "w/exp_avg_sq": start()["w"]}
        OuterOptimizer(start().items(), federation("adam")).import_state(moments)


def test_state_is_a_copy_once_it_is_imported() -> None:
    velocity = torch.zeros(4)
    optimizer = OuterOptimizer(start().items(), federation("momentum"))
    optimizer.import_state({"b/momentum_buffer": velocity})
    optimizer.step(pseudo_gradients()[0].items())
    assert torch.equal(velocity, torch.zeros(4))


def test_state_of_another_optimizer_is_left_out() -> None:
    """A recipe may be changed between two rounds; then the new optimizer begins as it would in a new run."""
    before = OuterOptimizer(start().items(), federation("nesterov"))
    before.step(pseudo_gradients()[0].items())
    after, fresh = (OuterOptimizer(before.weights().items(), federation("adam")) for _ in range(2))
    after.import_state(before.export_state())
    assert after.export_state() == {}
    assert all(torch.equal(a, b) for a, b in zip(trace(after), trace(fresh), strict=True))
