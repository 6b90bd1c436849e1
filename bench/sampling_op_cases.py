"""The LM head that draws tokens, for `ops.py`: what noise costs beside `lm_head_confidence`, and filters.

Tokens alone are compared: where rounded logits draw another token, its probability is another, too.
"""

from __future__ import annotations

import torch
from op_cases import Case, Outputs, Version, backends

import blockbatch_kernels as bbk
from blockbatch.models.spec import ModelSpec

# Name, and what is asked for beside a temperature of 1.
MODES = {
    "temperature 1": {},
    "temperature 1, entropy": dict(confidence="entropy"),
    "temperature 1, 2 tokens changed": dict(changed=2),
    "temperature 1, top_p 0.9": dict(top_p=0.9),
}


def sample_case(
    spec: ModelSpec, predictions: int, mode: str, device: torch.device, dtype: torch.dtype
) -> Case:
    weight = torch.empty(spec.vocab_size, spec.hidden_size, dtype=dtype, device=device).normal_(std=0.02)
    hidden = [torch.randn(predictions, spec.hidden_size, device=device).to(dtype) for _ in range(2)]
    asked = dict(MODES[mode])
    changed = asked.pop("changed", 0)
    top_p = asked.pop("top_p", None)
    rules = bbk.SamplingRules(
        temperature=torch.ones(1, device=device),
        seed=torch.zeros(1, dtype=torch.int64, device=device),
        forward=torch.zeros(1, dtype=torch.int32, device=device),
        changed_token=torch.arange(changed, dtype=torch.int32, device=device),
        logit_bias=torch.ones(1, changed, device=device),
        banned_before=torch.zeros(1, changed, dtype=torch.int32, device=device),
        top_p=None if top_p is None else torch.full((1,), top_p, device=device),
    )
    request = torch.zeros(predictions, dtype=torch.int32, device=device)
    positions = torch.arange(predictions, dtype=torch.int32, device=device)
    where = (rules, request, positions)

    def ours(backend: str) -> Version:
        return lambda index: bbk.lm_head_sample(hidden[index], weight, *where, **asked, backend=backend)[:1]

    def truth() -> Outputs:
        wide = hidden[0].float(), weight.float()
        return bbk.lm_head_sample(*wide, *where, **asked, backend="reference")[:1]

    return Case(
        "lm_head_sample",
        f"{predictions} x {spec.hidden_size} x {spec.vocab_size}, {mode}",
        weight.nbytes + hidden[0].nbytes,
        2 * predictions * spec.hidden_size * spec.vocab_size,
        2,
        {**{name: ours(name) for name in backends("lm_head_sample", device)}, "torch": ours("reference")},
        truth,
    )
