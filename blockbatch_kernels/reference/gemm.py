"""Products with the weights, and what is computed with them in one."""

import torch.nn.functional as F
from torch import Tensor

from blockbatch_kernels.reference.attention import rope_kv_write
from blockbatch_kernels.reference.norm import swiglu


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, *, static_weight: bool = False) -> Tensor:
    return F.linear(x, weight, bias)


def linear_swiglu(x: Tensor, weight: Tensor, *, static_weight: bool = False) -> Tensor:
    return swiglu(F.linear(x, weight))


def linear_rope_kv_write(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    *where: Tensor,
    num_heads: int,
    static_weight: bool = False,
) -> Tensor:
    """`where`: what `rope_kv_write` takes behind q, k and v, the caches last."""
    q, k, v = split_heads(linear(x, weight, bias), num_heads, where[-1])
    rope_kv_write(q, k, v, *where)
    return q


def split_heads(qkv: Tensor, num_heads: int, cache: Tensor) -> tuple[Tensor, ...]:
    """q, k and v as views of their common product, each [tokens, heads, head_dim]; sizes are the cache's."""
    num_kv_heads, head_dim = cache.shape[2:]
    return qkv.unflatten(1, (-1, head_dim)).split((num_heads, num_kv_heads, num_kv_heads), dim=1)
