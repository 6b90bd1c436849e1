"""The trainer's own forward and backward of a LLaDA-architecture transformer, and its Muon optimizer.

Pre-norm RMSNorm, rotary positions (halves rotated), bidirectional attention, SwiGLU, no biases, untied head.
The weights of all layers are stacked, one tensor per role, so that Muon orthogonalises all layers in one
batched call. All rows of a batch have one length; the batch is kept flat ([rows * length, d_model]) outside
attention, so that the compiled pieces see one shape whatever the length is.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_EPS = 1e-5


@dataclass(frozen=True)
class ModelShape:
    """Sizes of the transformer; `d_model` divides by `n_heads`, the head size is even."""

    vocabulary: int
    d_model: int = 384
    n_layers: int = 8
    n_heads: int = 6
    mlp_hidden: int = 1024
    max_length: int = 1024
    rope_theta: float = 10000.0


def norm(x: Tensor, gain: Tensor) -> Tensor:
    x32 = x.float()
    return (x32 * torch.rsqrt(x32.square().mean(-1, keepdim=True) + _EPS) * gain).to(x.dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x: [tokens, heads, head_dim]; cos, sin: [tokens, 1, head_dim / 2]."""
    first, second = x.float().chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x.dtype)


def _before_attention(
    x: Tensor, gain: Tensor, q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor, heads: int
) -> tuple[Tensor, Tensor, Tensor]:
    h = norm(x, gain)
    query, key, value = (F.linear(h, w.to(h.dtype)).unflatten(-1, (heads, -1)) for w in (q, k, v))
    return rotate(query, cos, sin), rotate(key, cos, sin), value


def after_attention(
    x: Tensor, attended: Tensor, out: Tensor, gain: Tensor, gate: Tensor, up: Tensor, down: Tensor
) -> Tensor:
    x = x + F.linear(attended, out.to(x.dtype))
    h = norm(x, gain)
    return x + F.linear(F.silu(F.linear(h, gate.to(h.dtype))) * F.linear(h, up.to(h.dtype)), down.to(h.dtype))


def _head(x: Tensor, gain: Tensor, weight: Tensor) -> Tensor:
    return F.linear(norm(x, gain), weight.to(x.dtype)).float()


def masked_cross_entropy(x: Tensor, gain: Tensor, weight: Tensor, targets: Tensor, weights: Tensor) -> Tensor:
    losses = F.cross_entropy(_head(x, gain, weight), targets, reduction="none")
    return (losses * weights).sum() / weights.sum()


def top_token(x: Tensor, gain: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    logits = _head(x, gain, weight)
    top, token = logits.max(dim=-1)
    return token, torch.exp(top - torch.logsumexp(logits, dim=-1))


class TrainModel(nn.Module):
    """The transformer with stacked weights: `loss` for training, `predict` for decoding.

    `compiled` compiles the pieces between the attention calls. Activations have `dtype`, parameters float32.
    """

    matrices = ("q_proj", "k_proj", "v_proj", "attn_out", "ff_proj", "up_proj", "ff_out")

    def __init__(self, shape: ModelShape, *, compiled: bool, dtype: torch.dtype) -> None:
        super().__init__()
        self.shape, self.dtype = shape, dtype
        layers, width, hidden = shape.n_layers, shape.d_model, shape.mlp_hidden
        cpu = torch.device("cpu")
        self.embedding = nn.Parameter(torch.randn(shape.vocabulary, width, device=cpu) * 0.1)
        self.head = nn.Parameter(torch.randn(shape.vocabulary, width, device=cpu) * 0.02)
        self.final_norm = nn.Parameter(torch.ones(width, device=cpu))
        self.attn_norm = nn.Parameter(torch.ones(layers, width, device=cpu))
        self.ff_norm = nn.Parameter(torch.ones(layers, width, device=cpu))
        for name in ("q_proj", "k_proj", "v_proj"):
            setattr(
                self, name, nn.Parameter(torch.randn(layers, width, width, device=cpu) * 0.5 * width**-0.5)
            )
        for name in ("ff_proj", "up_proj"):
            setattr(
                self, name, nn.Parameter(torch.randn(layers, hidden, width, device=cpu) * 0.5 * width**-0.5)
            )
        # Layers start as the identity.
        self.attn_out = nn.Parameter(torch.zeros(layers, width, width, device=cpu))
        self.ff_out = nn.Parameter(torch.zeros(layers, width, hidden, device=cpu))
        half = width // shape.n_heads // 2
        frequencies = shape.rope_theta ** (-torch.arange(half, dtype=torch.float64, device=cpu) / half)
        angles = torch.outer(torch.arange(shape.max_length, dtype=torch.float64, device=cpu), frequencies)
        self.register_buffer("cos", angles.cos().float()[:, None], persistent=False)
        self.register_buffer("sin", angles.sin().float()[:, None], persistent=False)

        def build(function: Callable[..., Any]) -> Callable[..., Any]:
            return torch.compile(function, dynamic=False) if compiled else function

        self._before, self._after = build(_before_attention), build(after_attention)
        self._loss, self._predict = build(masked_cross_entropy), build(top_token)

    def hidden(self, tokens: Tensor, *, causal: bool = False) -> Tensor:
        """tokens [rows, length] -> residual stream after the last layer, [rows * length, d_model]."""
        rows, length = tokens.shape
        cos, sin = (table[:length].repeat(rows, 1, 1) for table in (self.cos, self.sin))
        x = F.embedding(tokens.flatten(), self.embedding).to(self.dtype)
        stacks = zip(
            *(
                getattr(self, name).unbind(0)
                for name in (
                    "attn_norm",
                    "q_proj",
                    "k_proj",
                    "v_proj",
                    "attn_out",
                    "ff_norm",
                    "ff_proj",
                    "up_proj",
                    "ff_out",
                )
            )
        )
        for attn_norm, q, k, v, out, ff_norm, gate, up, down in stacks:
            qkv = self._before(x, attn_norm, q, k, v, cos, sin, self.shape.n_heads)
            query, key, value = (t.unflatten(0, (rows, length)).transpose(1, 2) for t in qkv)
            attended = F.scaled_dot_product_attention(query, key, value, is_causal=causal)
            x = self._after(
                x, attended.transpose(1, 2).reshape(rows * length, -1), out, ff_norm, gate, up, down
            )
        return x

    def loss(self, tokens: Tensor, targets: Tensor, weights: Tensor, *, causal: bool = False) -> Tensor:
        """Weighted mean cross-entropy of `targets` [rows, length]; a weight of 0 leaves a position out."""
        x = self.hidden(tokens, causal=causal)
        return self._loss(x, self.final_norm, self.head, targets.flatten(), weights.flatten())

    @torch.no_grad()
    def predict(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Top token and its probability at every position of tokens [rows, length]."""
        token, confidence = self._predict(self.hidden(tokens), self.final_norm, self.head)
        return token.view(tokens.shape), confidence.view(tokens.shape)


def _orthogonalise(matrices: Tensor, steps: int = 5) -> Tensor:
    """The nearest (semi-)orthogonal matrices, roughly: a quintic Newton-Schulz iteration in bfloat16.

    matrices: [count, rows, columns]. The coefficients trade exactness for speed; singular values end near 1.
    """
    x = matrices.bfloat16()
    wide = x.shape[-2] <= x.shape[-1]
    x = x if wide else x.mT
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        x = 3.4445 * x + (2.0315 * gram @ gram - 4.7750 * gram) @ x
    return (x if wide else x.mT).to(matrices.dtype)


class Muon:
    """Momentum with an orthogonalised update (Jordan et al., 2024), for stacks [layers, rows, columns]."""

    def __init__(
        self, stacks: list[nn.Parameter], *, momentum: float = 0.95, weight_decay: float = 0.2
    ) -> None:
        self.momentum, self.weight_decay = momentum, weight_decay
        # Stacks of one shape share a Newton-Schulz call.
        self.groups = [[p for p in stacks if p.shape == shape] for shape in sorted({p.shape for p in stacks})]
        self.averages = [
            torch.zeros((len(group), *group[0].shape), device=group[0].device) for group in self.groups
        ]

    @torch.no_grad()
    def step(self, learning_rate: float) -> None:
        """Apply one update from the parameters' gradients."""
        for group, average in zip(self.groups, self.averages):
            gradients = torch.stack([p.grad for p in group])
            average.lerp_(gradients, 1 - self.momentum)
            nesterov = gradients.lerp(average, self.momentum)
            updates = _orthogonalise(nesterov.flatten(0, 1)).view_as(nesterov)
            scale = max(1.0, group[0].shape[-2] / group[0].shape[-1]) ** 0.5
            # Without decay the query and key matrices grow until the attention overflows.
            torch._foreach_mul_(list(group), 1 - learning_rate * self.weight_decay)
            torch._foreach_add_(list(group), list(updates.unbind(0)), alpha=-learning_rate * scale)
