"""Models for the benchmark of the server: the built-in one, or random weights that decode as trained ones do.

Random weights are sure of nothing: they would commit one token a forward. Here every forward computes all
that a trained model's would, and then its predictions are replaced by scripted ones, made from what the row
holds: about a tenth of the MASKs passes the threshold, and the text ends after three quarters of the canvas.
A row gives the same predictions in any batch, so that every decode can be checked token by token.
"""

from __future__ import annotations

from typing import Any

import tokenizers
import torch
from random_models import DTYPES, SHAPES, quantized, random_model, random_prompt
from torch import Tensor

import blockbatch
import blockbatch_kernels as bbk
from blockbatch import tiny
from blockbatch.models.tokenizer import Tokenizer

# Of the MASKs in a window, those that pass the threshold in one forward: about three tokens of 32.
PASSING = 0.1
_SURE, _UNSURE = 0.95, 0.5
_BITS = 0x7FFFFFFF


class ScriptedPredictions:
    """A model whose forwards compute everything and whose predictions are scripted.

    Args:
        model: of random weights; it gets a tokenizer of one word a token.
        prompt_length: of all requests, in tokens.
        answer_length: tokens before the end of every text.
    """

    def __init__(self, model: blockbatch.Model, prompt_length: int, answer_length: int) -> None:
        words = {f"t{token}": token for token in range(model.spec.vocab_size)}
        model.tokenizer = Tokenizer(
            tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="t0")),
            end_ids=model.spec.eos_token_ids,
        )
        self._model, self._end = model, prompt_length + answer_length

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    def predict(
        self,
        packed: bbk.PackedQueries,
        cache: Any,
        seqlens_k: Tensor,
        probe_tokens: Tensor | None = None,
        **options: Any,
    ) -> bbk.Predictions:
        """See `Model.predict`."""
        found = self._model.predict(packed, cache, seqlens_k, probe_tokens, **options)
        rows = packed.cu_seqlens_q.shape[0] - 1
        row = packed.row_index.long()
        held = torch.zeros(rows + 1, dtype=torch.int64, device=row.device)
        held.index_add_(0, torch.where(row < 0, rows, row), packed.input_ids.long())
        position = packed.positions[packed.predict_index].long()
        mixed = _mix(held[row[packed.predict_index]] * 40503 + position * 7919)
        share = (mixed & 0xFFFF).float() / 0x10000
        confidence = torch.where(share < PASSING, _SURE, _UNSURE * share)
        token = 5 + position * 31 % 1000
        token = torch.where(position >= self._end, self.spec.eos_token_ids[0], token).to(
            found.top_token.dtype
        )
        # Behind the end everything is sure, as it is with trained models.
        confidence = torch.where(position >= self._end, _SURE, confidence)
        probe = found.probe_probability
        if probe is not None:
            probe = torch.where(probe_tokens == token, confidence, 0.01)
        return bbk.Predictions(found.target, token, confidence, probe)


def _mix(value: Tensor) -> Tensor:
    """Integers whose bits say nothing of their likeness any more."""
    for shift, factor in ((15, 0x2C1B3C6D), (12, 0x297A2D39)):
        value = (((value & _BITS) ^ ((value & _BITS) >> shift)) * factor) & _BITS
    return value ^ (value >> 15)


def load(options: dict[str, Any]) -> tuple[Any, list[list[int]]]:
    """The model that `options` name and the prompts of its requests, as token ids."""
    device, count, length = torch.device(options["device"]), options["requests"], options["prompt_length"]
    if options["model"] == "tiny":
        model = blockbatch.load_model("tiny", device=device, dtype=DTYPES[options["dtype"]])
        each = -(-count // len(tiny.FAMILIES))
        problems = [tiny.generate_problems(family, "test", each, seed=1) for family in tiny.FAMILIES]
        turns = [problem.prompt for turn in zip(*problems) for problem in turn]
        return model, [model.tokenizer.encode(prompt) for prompt in turns[:count]]
    if options["model"] not in SHAPES:
        raise SystemExit(f"--model: expected tiny or one of {', '.join(SHAPES)}, got {options['model']!r}")
    inner = random_model(options["model"], device, DTYPES[options["dtype"]], backend=options["backend"])
    if options.get("quantization"):
        inner = quantized(inner, options["quantization"])
    prompts = [random_prompt(inner.spec, length, seed) for seed in range(count)]
    return ScriptedPredictions(inner, length, options["gen_length"] * 3 // 4), prompts
