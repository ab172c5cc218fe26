"""What the local loop asks of a language model, whoever wrote it."""

from __future__ import annotations

from abc import ABC, abstractmethod

from torch import Tensor, nn


class LanguageModel(nn.Module, ABC):
    """A causal language model that computes its own loss, so that large vocabularies never cost all logits at once.

    `named_parameters()` (tied weights once) is the federation's state: those names travel on the wire.
    """

    vocab_size: int
    sequence_length: int

    @abstractmethod
    def loss(self, inputs: Tensor, targets: Tensor) -> Tensor:
        """Mean next-token cross-entropy in nats, scalar float32. `inputs`, `targets`: int64 [batch, sequence]."""

    @abstractmethod
    def logits(self, inputs: Tensor) -> Tensor:
        """Logits, float [batch, sequence, vocab], for `inputs` int64 [batch, sequence]."""

    @abstractmethod
    def flops_per_token(self, sequence_length: int) -> int:
        """Training FLOPs per token, forward and backward: 6 N_matmul + 12 L T d (attention counted full)."""
