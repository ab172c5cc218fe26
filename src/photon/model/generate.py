"""Text samples: next tokens drawn from a model, without a cache, for a look at what it has learned.

For serving, export the model: transformers and inference servers generate with a cache.
"""

from __future__ import annotations

import torch
from torch import Tensor

from photon.errors import InputError
from photon.model.base import LanguageModel


@torch.no_grad()
def generate(
    model: LanguageModel, prompt: list[int], tokens: int, temperature: float, top_k: int, seed: int, stop: int | None
) -> list[int]:
    """Up to `tokens` token ids that continue `prompt`; ends before `stop` if it is drawn.

    `temperature` 0 takes the likeliest token; `top_k` 0 draws from the whole vocabulary. The model sees at most its
    last `sequence_length` tokens. Draws come from an own generator of `seed`, on the CPU, so they do not depend on
    the device's generator nor disturb the global one. Raises InputError for an empty prompt, a token id that the
    model does not have, or a temperature below 0.
    """
    if not prompt or not all(0 <= token < model.vocab_size for token in prompt):
        raise InputError(
            f"a prompt needs at least one token, each below the model's vocabulary of {model.vocab_size}"
            f"{f': got {max(prompt)}' if prompt else ''}; is it the tokenizer the model was trained with?"
        )
    if not temperature >= 0:  # also what is no number
        raise InputError(f"a temperature of {temperature}: it is a number from 0, always the likeliest token, upwards")
    generator = torch.Generator().manual_seed(seed)
    device = next(model.parameters()).device
    was_training = model.training
    model.eval()
    sequence = list(prompt)
    try:
        for _ in range(tokens):
            window = torch.tensor([sequence[-model.sequence_length :]], device=device)
            scores = model.logits(window)[0, -1].float().cpu()  # [V]
            token = _draw(scores, temperature, top_k, generator)
            if token == stop:
                break
            sequence.append(token)
    finally:
        model.train(was_training)
    return sequence[len(prompt) :]


def _draw(scores: Tensor, temperature: float, top_k: int, generator: torch.Generator) -> int:
    likeliest = int(scores.argmax())
    if temperature == 0:
        return likeliest
    scores = scores / temperature
    if 0 < top_k < len(scores):
        scores = scores.masked_fill(scores < scores.topk(top_k).values[-1], float("-inf"))
    odds = scores.softmax(0)
    if odds.isnan().any():  # so near to 0 that the scores have left float32
        return likeliest
    return int(torch.multinomial(odds, 1, generator=generator))
