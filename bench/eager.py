"""The same models in plain torch, launched operator by operator: what one writes without own kernels.

Products by `F.linear`, norms by `F.rms_norm`, one call of `scaled_dot_product_attention` for each row on a
contiguous K/V cache, softmax over whole logits, and the policy in vectorised torch (the reference backend's).
The host waits three times a step: for the bounds of the packed rows, for whether a branch was synced (its
cache row is then copied), and for the next plan.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

import blockbatch_kernels as bbk
from blockbatch.models import Model, transformer


class RowCache:
    """K and V with one contiguous row for each branch: a page as long as the canvas.

    Attributes:
        kv: [layers, 2, rows, canvas, num_kv_heads, head_dim].
        page_table: [rows, 1] int32, the row's own number.
    """

    def __init__(self, model: EagerModel, num_rows: int, canvas_length: int) -> None:
        spec = model.spec
        self.page_size = canvas_length
        shape = (spec.num_layers, 2, num_rows, canvas_length, spec.num_kv_heads, spec.head_dim)
        self.kv = torch.zeros(shape, dtype=model.dtype, device=model.device)
        self._rows = torch.arange(num_rows, dtype=torch.int32, device=model.device)
        self.page_table = self._rows.unsqueeze(1).clone()

    def reset(self) -> None:
        """Nothing to do: what is read has been written before."""

    def make_private(self, write_start: Tensor, write_end: Tensor, write_positions=None) -> None:
        """Nothing to do: no row is shared."""

    def prepare(self, plan: bbk.StepPlan) -> None:
        """Nothing to do: no row is shared."""

    def share(self, source_row: Tensor) -> None:
        """Copies the K and V of other rows."""
        moved = (source_row >= 0) & (source_row != self._rows)
        for row in moved.nonzero().flatten().tolist():
            self.kv[:, :, row] = self.kv[:, :, int(source_row[row])]


class EagerModel:
    """The weights of a model, computed by plain torch; takes the place of a `Model` in a session."""

    def __init__(self, model: Model) -> None:
        self.spec, self.weights, self.name = model.spec, model.weights, model.name
        self.device, self.dtype, self.backend = model.device, model.dtype, "reference"
        self._rope = transformer.rope_table(model.spec, model.device)

    def new_cache(self, num_requests: int, num_branches: int, canvas_length: int) -> RowCache:
        return RowCache(self, num_requests * num_branches, canvas_length)

    def predict(
        self,
        packed: bbk.PackedQueries,
        cache: RowCache,
        seqlens_k: Tensor,
        probe_tokens: Tensor | None = None,
    ) -> bbk.Predictions:
        """Tokens of packed queries; see `blockbatch.models.Model.predict`."""
        hidden = self.forward(packed, cache)
        logits = F.linear(hidden[packed.predict_index], self.weights.lm_head)
        if self.spec.suppress_mask:
            logits[:, self.spec.mask_token_id] = float("-inf")
        confidence, top_token = logits.float().softmax(-1).max(-1)
        return bbk.Predictions(packed.predict_target, top_token.int(), confidence)

    def forward(self, packed: bbk.PackedQueries, cache: RowCache) -> Tensor:
        """[tokens, hidden_size] after the final norm."""
        spec, weights = self.spec, self.weights
        heads, kv_heads = spec.num_heads, spec.num_kv_heads
        bounds = packed.cu_seqlens_q.tolist()
        rows = [
            (row, first, last) for row, (first, last) in enumerate(zip(bounds, bounds[1:])) if last > first
        ]
        position = packed.positions.long()
        cos, sin = (table[position].unsqueeze(1) for table in self._rope)
        residual = F.embedding(packed.input_ids, weights.embedding)
        for index, layer in enumerate(weights.layers):
            keys, values = cache.kv[index]
            normed = F.rms_norm(residual, (spec.hidden_size,), layer.input_norm, spec.rms_norm_eps)
            qkv = F.linear(normed, layer.qkv_weight, layer.qkv_bias).unflatten(1, (-1, spec.head_dim))
            q, k, v = qkv.split((heads, kv_heads, kv_heads), dim=1)
            q, k = _rotate(q, cos, sin), _rotate(k, cos, sin)
            keys.flatten(0, 1)[packed.slot_mapping] = k
            values.flatten(0, 1)[packed.slot_mapping] = v
            attended = [
                F.scaled_dot_product_attention(
                    q[first:last].transpose(0, 1)[None],
                    keys[row].transpose(0, 1)[None],
                    values[row].transpose(0, 1)[None],
                    enable_gqa=heads != kv_heads,
                )[0].transpose(0, 1)
                for row, first, last in rows
            ]
            residual = residual + F.linear(torch.cat(attended).flatten(1), layer.out_weight)
            normed = F.rms_norm(residual, (spec.hidden_size,), layer.post_norm, spec.rms_norm_eps)
            gate, up = F.linear(normed, layer.gate_up_weight).chunk(2, dim=-1)
            residual = residual + F.linear(F.silu(gate) * up, layer.down_weight)
        return F.rms_norm(residual, (spec.hidden_size,), weights.final_norm, spec.rms_norm_eps)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.float().chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x.dtype)
