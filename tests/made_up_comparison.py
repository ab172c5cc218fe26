"""Made-up runs and comparisons, for the tests of what is told of them."""

from __future__ import annotations

from photon.compare_content import (
    Comparison,
    MethodResult,
    headline,
    method_result,
    setting_of,
    with_differences,
)
from photon.compare_curve import Moment, RunResult
from photon.method import load_method
from photon.recipe import load_recipe


def made_up(seed: int, *losses: float) -> RunResult:
    """Evaluations 1000 tokens, 16 steps, a megabyte up and two down apart."""
    curve = [
        Moment(tokens=1000 * i, sequential_steps=16 * i, bytes_up=1e6 * i, bytes_down=2e6 * i, loss=loss)
        for i, loss in enumerate(losses)
    ]
    last = len(losses) - 1
    return RunResult(
        seed=seed, folder=f"runs/x-s{seed}", loss=losses[-1], tokens=1000 * last, sequential_steps=16 * last,
        bytes_up=10**6 * last, bytes_down=2 * 10**6 * last, seconds=3.0, model_sha256="ab", curve=curve,
    )  # fmt: skip


FAILED = RunResult(seed=8, folder="runs/x-s8", failure="out of memory")


def row(name: str, *runs: RunResult, target: float | None = 5.0, recipe: str = "name = 'demo'\n") -> MethodResult:
    return method_result(load_method(name), recipe, runs, target, computed=False)


def comparison(*methods: MethodResult, **changes: object) -> Comparison:
    setting = setting_of(load_recipe("demo"), {}, 2000, [7, 8])
    whole = Comparison(
        recipe="demo", about="A.", photon="1", command="photon compare demo", setting=setting, points_per_method=1,
        target_loss=5.0, target_was_given=True, headline=headline(methods, setting), notes=["a note"],
        hours_rest_on="", methods=with_differences(methods),
    )  # fmt: skip
    return whole.model_copy(update=changes)


FEDAVG = row("fedavg", made_up(7, 8.0, 6.0, 4.0), made_up(8, 8.0, 6.0, 4.5))
DILOCO = row("diloco", made_up(7, 8.0, 5.0, 3.0), made_up(8, 8.0, 5.5, 3.4))
