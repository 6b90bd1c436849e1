"""The trainer's own forward of the block-causal model: SDAR's architecture, which is Qwen3's.

Unlike `train_model.TrainModel`, it has an RMSNorm over each query and key head before the rotation, fewer K/V
heads than query heads, and a head size that is not width / heads; positions and mask come with the tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from blockbatch.tiny.block_masking import AttentionPart, Slots, clean_parts, combined_parts
from blockbatch.tiny.train_model import after_attention, masked_cross_entropy, norm, rotate, top_token


@dataclass(frozen=True)
class BlockModelShape:
    """Sizes of the transformer; `n_heads` divides by `n_kv_heads`, the head size is even."""

    vocabulary: int
    d_model: int = 256
    n_layers: int = 8
    n_heads: int = 6
    n_kv_heads: int = 2
    head_dim: int = 64
    mlp_hidden: int = 640
    block_size: int = 32
    rope_theta: float = 10000.0


def _before_attention(
    x: Tensor,
    gain: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_gain: Tensor,
    k_gain: Tensor,
    cos: Tensor,
    sin: Tensor,
    head_dim: int,
) -> tuple[Tensor, Tensor, Tensor]:
    h = norm(x, gain)
    query, key, value = (F.linear(h, w.to(h.dtype)).unflatten(-1, (-1, head_dim)) for w in (q, k, v))
    return rotate(norm(query, q_gain), cos, sin), rotate(norm(key, k_gain), cos, sin), value


class BlockTrainModel(nn.Module):
    """The transformer with stacked weights: losses for training, `predict` for decoding.

    `compiled` compiles the pieces between the attention calls. Activations have `dtype`, parameters float32.
    """

    matrices = ("q_proj", "k_proj", "v_proj", "attn_out", "ff_proj", "up_proj", "ff_out")

    def __init__(
        self, shape: BlockModelShape, *, compiled: bool, dtype: torch.dtype, longest: int = 2048
    ) -> None:
        super().__init__()
        self.shape, self.dtype = shape, dtype
        layers, width, hidden = shape.n_layers, shape.d_model, shape.mlp_hidden
        self.embedding = nn.Parameter(torch.randn(shape.vocabulary, width) * 0.1)
        self.head = nn.Parameter(torch.randn(shape.vocabulary, width) * 0.02)
        self.final_norm = nn.Parameter(torch.ones(width))
        for name, size in (
            ("attn_norm", width),
            ("q_norm", shape.head_dim),
            ("k_norm", shape.head_dim),
            ("ff_norm", width),
        ):
            setattr(self, name, nn.Parameter(torch.ones(layers, size)))
        for name, rows in (
            ("q_proj", shape.n_heads * shape.head_dim),
            ("k_proj", shape.n_kv_heads * shape.head_dim),
            ("v_proj", shape.n_kv_heads * shape.head_dim),
            ("ff_proj", hidden),
            ("up_proj", hidden),
        ):
            setattr(self, name, nn.Parameter(torch.randn(layers, rows, width) * 0.5 * width**-0.5))
        # Layers start as the identity.
        self.attn_out = nn.Parameter(torch.zeros(layers, width, shape.n_heads * shape.head_dim))
        self.ff_out = nn.Parameter(torch.zeros(layers, width, hidden))
        half = shape.head_dim // 2
        frequencies = shape.rope_theta ** (-torch.arange(half, dtype=torch.float64) / half)
        angles = torch.outer(torch.arange(longest, dtype=torch.float64), frequencies)
        self.register_buffer("cos", angles.cos().float()[:, None], persistent=False)
        self.register_buffer("sin", angles.sin().float()[:, None], persistent=False)

        def build(function: Callable[..., Any]) -> Callable[..., Any]:
            return torch.compile(function, dynamic=False) if compiled else function

        self._before, self._after = build(_before_attention), build(after_attention)
        self._loss, self._predict = build(masked_cross_entropy), build(top_token)

    def hidden(self, tokens: Tensor, positions: Tensor, parts: list[AttentionPart] | None) -> Tensor:
        """tokens, positions [rows, length] -> residual stream after the last layer, [rows * length, d_model].

        parts: who sees whom, together all queries in order; None: each token sees those before it and itself.
        """
        rows, length = tokens.shape
        cos, sin = self.cos[positions.flatten()], self.sin[positions.flatten()]
        x = F.embedding(tokens.flatten(), self.embedding).to(self.dtype)
        biases = [_additive(part.mask, self.dtype) for part in parts or ()]
        names = ("attn_norm", "q_proj", "k_proj", "v_proj", "q_norm", "k_norm")
        names += ("attn_out", "ff_norm", "ff_proj", "up_proj", "ff_out")
        group = self.shape.n_heads // self.shape.n_kv_heads
        for layer in zip(*(getattr(self, name).unbind(0) for name in names)):
            qkv = self._before(x, *layer[:6], cos, sin, self.shape.head_dim)
            query, key, value = (t.unflatten(0, (rows, length)).transpose(1, 2) for t in qkv)
            key, value = (t.repeat_interleave(group, dim=1) for t in (key, value))
            if parts is None:
                attended = F.scaled_dot_product_attention(query, key, value, is_causal=True)
            else:
                attended = _attend_in_parts(query, key, value, parts, biases)
            x = self._after(x, attended.transpose(1, 2).reshape(rows * length, -1), *layer[6:])
        return x

    def next_token_loss(self, tokens: Tensor, weights: Tensor) -> Tensor:
        """Weighted mean loss of each token from those before it; weights [rows, length] of the predicting
        positions."""
        positions = torch.arange(tokens.shape[1], device=tokens.device).expand_as(tokens)
        x = self.hidden(tokens, positions, None)
        return self._loss(x, self.final_norm, self.head, tokens.roll(-1, dims=1).flatten(), weights.flatten())

    def loss(self, clean: Tensor, noisy: Tensor, slots: Slots, targets: Tensor, weights: Tensor) -> Tensor:
        """Weighted mean cross-entropy of the noisy positions.

        clean [rows, length]; noisy, targets, weights [rows, count * block_size]: the slots' tokens with MASK,
        without it, and what counts.
        """
        x = self._noisy_hidden(clean, noisy, slots)
        return self._loss(x, self.final_norm, self.head, targets.flatten(), weights.flatten())

    @torch.no_grad()
    def predict_noisy(self, clean: Tensor, noisy: Tensor, slots: Slots) -> tuple[Tensor, Tensor]:
        """Top token and its probability at the noisy positions, [rows, count * block_size]."""
        token, confidence = self._predict(self._noisy_hidden(clean, noisy, slots), self.final_norm, self.head)
        return token.view(noisy.shape), confidence.view(noisy.shape)

    @torch.no_grad()
    def predict(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Top token and its probability at every position of tokens [rows, length], block-causally."""
        rows, length = tokens.shape
        positions = torch.arange(length, device=tokens.device).expand(rows, -1)
        x = self.hidden(tokens, positions, clean_parts(length, self.shape.block_size, tokens.device))
        token, confidence = self._predict(x, self.final_norm, self.head)
        return token.view(tokens.shape), confidence.view(tokens.shape)

    def _noisy_hidden(self, clean: Tensor, noisy: Tensor, slots: Slots) -> Tensor:
        rows, length = clean.shape
        size = noisy.shape[1]
        plain = torch.arange(length, device=clean.device).expand(rows, -1)
        x = self.hidden(
            torch.cat((noisy, clean), dim=1),
            torch.cat((slots.positions, plain), dim=1),
            combined_parts(slots.blocks, length, self.shape.block_size),
        )
        return x.unflatten(0, (rows, -1))[:, :size].flatten(0, 1)


def _additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """The mask as what is added to the scores: 0 where seen, minus infinity elsewhere."""
    return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill_(~mask, float("-inf"))


def _attend_in_parts(
    query: Tensor, key: Tensor, value: Tensor, parts: list[AttentionPart], biases: list[Tensor]
) -> Tensor:
    """query, key, value [rows, heads, length, head_dim] -> the same shape."""
    rows, heads = query.shape[:2]
    attended = []
    # On a GPU the memory-efficient kernel, which stores no scores; the plain one where that refuses.
    kernels = [SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
    with sdpa_kernel(kernels) if query.is_cuda else nullcontext():
        for part, bias in zip(parts, biases):
            some = (torch.cat([t[:, :, keys] for keys in part.keys], dim=2) for t in (key, value))
            bias = bias.expand(rows, heads, -1, -1)
            attended.append(F.scaled_dot_product_attention(query[:, :, part.queries], *some, bias))
    return torch.cat(attended, dim=2)
