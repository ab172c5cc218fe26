"""What the paper's authors entered into their wall-time model for the billion-parameter runs.

"Photon: Federated LLM Pre-Training" (arXiv 2411.02908), from the notebook behind its tables. Rounds, tau and nodes are
in the presets. The models are MosaicML's MPT with learned positions and biases, so they have a few more parameters than
our presets; their numbers are in llm-foundry's scripts/train/benchmarking/README.md. Both kinds of training are
compared at the same perplexity, over a ring at 10 Gbit/s with 2 bytes per parameter and without overlap.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from photon.errors import InputError
from photon.options import hint

BANDWIDTH = "10Gbps"
BYTES_PER_PARAMETER = 2.0


@dataclass(frozen=True)
class PaperRow:
    """One row: steps per second of a node and of the central run, and how many steps the central run took."""

    parameters: int
    steps_per_s: float
    baseline_steps_per_s: float
    baseline_steps: int


ROWS: Mapping[str, PaperRow] = MappingProxyType(
    {
        "paper-1.3b": PaperRow(1_315_950_592, 0.147, 0.840, 19_759),
        "paper-3b": PaperRow(2_651_837_440, 0.144, 0.395, 22_900),
        "paper-7b": PaperRow(6_658_859_008, 0.032, 0.120, 21_908),
    }
)


def paper_row(recipe: str) -> PaperRow:
    """Raises InputError for a recipe that is not in the paper's table."""
    if recipe not in ROWS:
        raise InputError(f"--paper is for the presets of the paper's table; {hint(recipe, ROWS)}")
    return ROWS[recipe]
