"""The matrix products of a forward alone: what cuBLAS, through torch, needs with nothing around them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from timing import as_graph

from blockbatch.models import Model


def products(model: Model, tokens: int, predictions: int, head_rows: int = 4096) -> Callable[[], Any]:
    """All products of a forward on the model's own weights and random activations, as one CUDA graph.

    Args:
        tokens: rows of the layers' products.
        predictions: rows of the LM head's; computed `head_rows` at a time, which bounds the logits.
    """
    spec, weights = model.spec, model.weights

    def activations(rows: int, columns: int) -> torch.Tensor:
        return torch.randn(rows, columns, dtype=model.dtype, device=model.device)

    hidden = activations(tokens, spec.hidden_size)
    attended = activations(tokens, spec.num_heads * spec.head_dim)
    activated = activations(tokens, spec.intermediate_size)
    predicting = activations(predictions, spec.hidden_size)

    def run() -> None:
        for layer in weights.layers:
            F.linear(hidden, layer.qkv_weight, layer.qkv_bias)
            F.linear(attended, layer.out_weight)
            F.linear(hidden, layer.gate_up_weight)
            F.linear(activated, layer.down_weight)
        for rows in predicting.split(head_rows):
            F.linear(rows, weights.lm_head)

    # The outputs are let go at once, so that they take turns on the same memory.
    return as_graph(run, model.device)
