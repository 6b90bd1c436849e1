"""How likely a masked diffusion model finds a given answer: a Monte Carlo bound.

Such a model has no probability of a text token by token. What it was trained with is a bound: mask l' of the
answer's l tokens at random, predict each of them from the rest, and weigh the sum of their log-probabilities
with l / l'. The mean over l' and over places is a lower bound of the answer's log-probability; LLaDA's
evaluation (arXiv 2502.09992) estimates it so, with l' spread evenly over 1 .. l among the samples of a batch.
Here it is spread over all samples, which only lowers the variance.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from blockbatch import devices
from blockbatch.models.head import head_logits
from blockbatch.parallel import share_of

# Predictions whose logits exist at the same time.
_HEAD_ROWS = 512


class LogLikelihood(NamedTuple):
    """
    Attributes:
        value: natural logarithm, at most 0.
        standard_error: of `value`, as if the samples were independent; 0 for one sample.
        samples: maskings that were computed.
    """

    value: float
    standard_error: float
    samples: int


def log_likelihood(
    model,
    prompt: str | Sequence[int],
    answer: str | Sequence[int],
    *,
    samples: int = 128,
    seed: int = 0,
    rows: int = 32,
) -> LogLikelihood:
    """See `Model.log_likelihood`."""
    for name, value, least in (("samples", samples, 1), ("rows", rows, 1), ("seed", seed, 0)):
        if isinstance(value, bool) or not isinstance(value, int):
            raise TypeError(f"{name}: expected an integer, got {value!r}")
        if value < least:
            raise ValueError(f"{name}: expected at least {least}, got {value}")
    spec = model.spec
    if spec.block_size is not None:
        raise ValueError(
            f"model: expected one of full attention, whose training gives this bound, got {spec.family}"
        )
    before, tokens = encode_pair(model, prompt, answer)
    if not tokens:
        raise ValueError("answer: expected at least one token, got none")
    if spec.prediction_offset and not before:
        raise ValueError(
            f"prompt: expected at least one token, since {spec.family} predicts a position from the one "
            "before it, got none"
        )
    if len(before) + len(tokens) > spec.max_length:
        raise ValueError(
            f"prompt, answer: expected at most {spec.max_length} positions, got {len(before)} and "
            f"{len(tokens)}"
        )
    around = share_of(model).forward("a likelihood")
    with torch.inference_mode(), devices.turn(model.device), around:
        values = _estimates(model, before, tokens, maskings(len(tokens), samples, seed), rows)
    error = float(values.std()) / math.sqrt(samples) if samples > 1 else 0.0
    return LogLikelihood(float(values.mean()), error, samples)


def encode_pair(
    model, prompt: str | Sequence[int], answer: str | Sequence[int]
) -> tuple[list[int], list[int]]:
    """Token ids of both. Texts are cut into tokens together, the blanks at the prompt's end with the answer.

    Raises:
        TypeError, ValueError: neither two texts nor two lists of ids of the vocabulary.
    """
    if isinstance(prompt, str) != isinstance(answer, str):
        raise TypeError(
            f"answer: expected {'a text' if isinstance(prompt, str) else 'token ids'} as the prompt is, got "
            f"{type(answer).__name__}"
        )
    if isinstance(prompt, str):
        if model.tokenizer is None:
            raise ValueError("prompt: expected token ids, since the model has no tokenizer, got a text")
        stem = prompt.rstrip()
        whole, before = model.tokenizer.encode(prompt + answer), model.tokenizer.encode(stem)
        return whole[: len(before)], whole[len(before) :]
    found = []
    for name, given in (("prompt", prompt), ("answer", answer)):
        ids = [int(token) for token in given]
        if any(not 0 <= token < model.spec.vocab_size for token in ids):
            raise ValueError(f"{name}: expected ids from 0 to {model.spec.vocab_size - 1}, got others")
        found.append(ids)
    return found[0], found[1]


def maskings(length: int, samples: int, seed: int) -> Tensor:
    """Which tokens of an answer each sample masks.

    Returns:
        [samples, length] bool on the CPU. The numbers of masked tokens, 1 to `length`, are spread as evenly
        as can be among the samples, from a random one on; the places are random.
    """
    random = torch.Generator("cpu").manual_seed(seed)
    first = int(torch.randint(length, (), generator=random, device="cpu"))
    counts = (first + torch.arange(samples, device="cpu") * length // samples) % length + 1
    order = (
        torch.rand(samples, length, generator=random, dtype=torch.float64, device="cpu")
        .argsort(dim=1)
        .argsort(dim=1)
    )
    return order < counts.unsqueeze(1)


def _estimates(model, before: list[int], tokens: list[int], masked: Tensor, rows: int) -> Tensor:
    """[samples] float64: what each masking says of the answer's log-probability."""
    spec, device = model.spec, model.device
    truth = torch.tensor(tokens, device=device)
    canvas = torch.tensor(before + tokens, device=device)
    found = []
    for part in masked.to(device).split(rows):
        ids = canvas.repeat(len(part), 1)
        ids[:, len(before) :][part] = spec.mask_token_id
        row, place = part.nonzero(as_tuple=True)
        wanted = row * ids.shape[1] + len(before) + place - spec.prediction_offset
        hidden = model.hidden_states(ids, wanted)
        logs = torch.zeros(len(part), dtype=torch.float64, device=device)
        logs.index_add_(0, row, _log_probabilities(model, hidden, truth[place]))
        found.append(logs * len(tokens) / part.sum(1))
    return torch.cat(found).cpu()


def _log_probabilities(model, hidden: Tensor, tokens: Tensor) -> Tensor:
    """[n] float64: of each token by the whole vocabulary, softmax in fp32."""
    parts = []
    for states, chosen in zip(hidden.split(_HEAD_ROWS), tokens.split(_HEAD_ROWS), strict=True):
        part = head_logits(model.weights.lm_head, model.backend, states)
        logs = share_of(model).whole_logits(part).float().log_softmax(-1)
        parts.append(logs.gather(1, chosen.unsqueeze(1)).squeeze(1).double())
    return torch.cat(parts)
