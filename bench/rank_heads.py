"""The LM head of several ranks beside that of one process, for `tensor_parallel.py`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from timing import as_graph, event_ms
from verify import Wrong

from blockbatch import DecodeConfig
from blockbatch.decoding.sampling import BatchSampling, sampling_kind
from blockbatch.models import Model
from blockbatch.models.quantized_weights import head_operator
from blockbatch.parallel import digest


def heads(one: Model, ranks: Model, predictions: int) -> dict[str, float]:
    """Microseconds of the LM head, with everything up to tokens and confidences; also of drawn tokens."""
    device = one.device
    random = torch.Generator("cpu").manual_seed(predictions)
    hidden = torch.randn(predictions, one.spec.hidden_size, generator=random).to(device, one.dtype)
    kind = sampling_kind(DecodeConfig(temperature=1.0), one.spec.vocab_size, ())
    numbers = torch.arange(predictions, dtype=torch.int32, device=device)
    drawn = BatchSampling(1, kind, device).rules, torch.zeros_like(numbers), numbers
    drawn[0].temperature.fill_(1.0)
    found, tokens = {}, []
    for ending, name, about in (("", "lm_head_confidence", ()), ("_drawn", "lm_head_sample", drawn)):
        for whose, model in (("ranks", ranks), ("one", one)):
            operator, weight = head_operator(model.share.head, name, model.weights.lm_head)

            def run(operator: Callable = operator, weight: tuple = weight, about: tuple = about) -> Any:
                return operator(hidden, *weight, *about, backend=one.backend)

            tokens.append(run()[0].clone())
            replay = as_graph(run, device)
            found[whose + ending] = 1e3 * min(event_ms(replay, device, 15) for _ in range(2))
    for ours, theirs in (tokens[:2], tokens[2:]):
        ranks.share.group.agree("tokens of the LM head", digest.of_text(str(ours.tolist())))
        # Logits of near ties are rounded, and those in e4m3 have scales of their own.
        if (ours != theirs).float().mean() > 0.1:
            raise Wrong("LM head: expected the tokens of one process, got others in more than a tenth")
    return found
