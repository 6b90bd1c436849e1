"""What a transformer layer computes beside its attention, and the LM head."""

from __future__ import annotations

import torch
from torch import Tensor

from blockbatch_kernels.checks import checker
from blockbatch_kernels.ops import dispatch, values
from blockbatch_kernels.shapes import E4M3

_check_rms_norm = checker("rms_norm")
_check_swiglu = checker("swiglu")
_check_linear = checker("linear")
_check_linear_swiglu = checker("linear_swiglu")
_check_rope_kv_write = checker("rope_kv_write")
_check_linear_rope_kv_write = checker("linear_rope_kv_write")
_check_lm_head_confidence = checker("lm_head_confidence")
_check_lm_head_likely = checker("lm_head_likely")


def rms_norm(
    x: Tensor, weight: Tensor, *, eps: float, residual: Tensor | None = None, backend: str | None = None
) -> Tensor:
    """Root mean square norm over the last dimension, with the residual add in front of it fused.

    Equivalent to `residual += x; x = residual` (if given), then `weight * (x / rms(x)).to(x.dtype)`, in fp32
    up to the rounding before the weight.

    Args:
        x: [tokens, dim], fp32, bf16 or fp16.
        weight: [dim], same dtype.
        eps: added to the mean square.
        residual: [tokens, dim], same dtype; *written*: the sum, which the next layer adds to.

    Returns:
        [tokens, dim], same dtype.
    """
    _check_rms_norm(x, weight, eps, residual)
    return dispatch.module_for(backend, "rms_norm", x).rms_norm(x, weight, eps=eps, residual=residual)


def swiglu(gate_up: Tensor, *, backend: str | None = None) -> Tensor:
    """`silu(gate) * up` in fp32, rounded once.

    Args:
        gate_up: [tokens, 2 * intermediate], gate first; fp32, bf16 or fp16.

    Returns:
        [tokens, intermediate], same dtype.
    """
    _check_swiglu(gate_up)
    if gate_up.shape[1] % 2:
        raise ValueError(f"gate_up: expected an even last dimension (gate and up), got {gate_up.shape[1]}")
    return dispatch.module_for(backend, "swiglu", gate_up).swiglu(gate_up)


def linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    static_weight: bool = False,
    backend: str | None = None,
) -> Tensor:
    """`x @ weight.T + bias` with sums in fp32, rounded once: torch's product, but for packs of few tokens.

    On compute capability 9.0 up to 256 tokens in bf16 or fp16 run on a kernel of our own where it is faster
    (`tuning.linear_parts` says for which sizes; rows of the weight must be aligned to 16 bytes); all else
    goes to torch. Which of the two computes depends on sizes and alignment alone.

    Args:
        x: [tokens, in], fp32, bf16 or fp16.
        weight: [out, in], same dtype.
        bias: [out], same dtype.
        static_weight: a promise that no work which may still be running writes `weight`: it is then read
            ahead of the end of the kernels in front.

    Returns:
        [tokens, out], same dtype.
    """
    _check_linear(x, weight, bias, static_weight)
    module = dispatch.module_for(backend, "linear", x)
    return module.linear(x, weight, bias, static_weight=static_weight)


def linear_swiglu(
    x: Tensor, weight: Tensor, *, static_weight: bool = False, backend: str | None = None
) -> Tensor:
    """`silu(x @ gate.T) * (x @ up.T)`: the product and `swiglu` in one where that is faster.

    Where the kernel of our own serves the sizes (see `linear`; up to 192 tokens and more), the product is not
    rounded before the activation; elsewhere it is, as by `swiglu(linear(x, weight))`.

    Args:
        x: [tokens, in], fp32, bf16 or fp16.
        weight: [2 * intermediate, in], gate rows first, same dtype.
        static_weight: see `linear`.

    Returns:
        [tokens, intermediate], same dtype.
    """
    _check_linear_swiglu(x, weight, static_weight)
    if weight.shape[0] % 2:
        raise ValueError(f"weight: expected an even number of rows (gate and up), got {weight.shape[0]}")
    module = dispatch.module_for(backend, "linear_swiglu", x)
    return module.linear_swiglu(x, weight, static_weight=static_weight)


def rope_kv_write(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    positions: Tensor,
    slot_mapping: Tensor,
    cos: Tensor,
    sin: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    *,
    q_norm: Tensor | None = None,
    k_norm: Tensor | None = None,
    norm_eps: float = 1e-6,
    backend: str | None = None,
) -> None:
    """Rotates q and k at their positions (halves, in fp32) and stores k and v in their cache slots.

    With `q_norm` and `k_norm` each head of q and k goes through an RMSNorm first (`rms_norm`, over head_dim),
    as in Qwen3 and SDAR.

    Args:
        q: [tokens, num_heads, head_dim]; *written*: rotated.
        k, v: [tokens, num_kv_heads, head_dim].
        positions: [tokens] int32.
        slot_mapping: [tokens] int64, page * page_size + offset; -1: not stored.
        cos, sin: [max positions, head_dim / 2] fp32.
        k_cache, v_cache: [pages, page_size, num_kv_heads, head_dim]; *written* at the slots, k after
            rotation.
        q_norm, k_norm: [head_dim], same dtype as q: weights of the norms, both or neither.
        norm_eps: added to the mean square.
    """
    where = (positions, slot_mapping, cos, sin, k_cache, v_cache)
    _check_rope_kv_write(q, k, v, *where, q_norm, k_norm, norm_eps)
    check_norms(q_norm, k_norm)
    if values.ENABLED:
        values.check_rope(positions, slot_mapping, cos, k_cache)
    module = dispatch.module_for(backend, "rope_kv_write", q)
    module.rope_kv_write(q, k, v, *where, q_norm=q_norm, k_norm=k_norm, norm_eps=norm_eps)


def check_norms(q_norm: Tensor | None, k_norm: Tensor | None) -> None:
    if (q_norm is None) != (k_norm is None):
        given, absent = ("q_norm", "k_norm") if k_norm is None else ("k_norm", "q_norm")
        raise ValueError(f"{absent}: expected a tensor beside {given}, got None")


def linear_rope_kv_write(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    positions: Tensor,
    slot_mapping: Tensor,
    cos: Tensor,
    sin: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
    *,
    num_heads: int,
    static_weight: bool = False,
    backend: str | None = None,
) -> Tensor:
    """The heads of q, k and v from one product, then `rope_kv_write` on them; returns q.

    With `k_scale` and `v_scale` it is `rope_kv_write_fp8`, into caches in e4m3. The results are those of the
    two operators bit for bit: the product is rounded before the rotation. Where the kernel of our own serves
    the sizes (see `linear`; heads of 64 or 128 elements), all happens in one launch; elsewhere it is the two
    operators.

    Args:
        x: [tokens, in], fp32, bf16 or fp16.
        weight: [(num_heads + 2 * num_kv_heads) * head_dim, in], the rows of q first, then of k, then of v;
            same dtype.
        bias: [(num_heads + 2 * num_kv_heads) * head_dim], same dtype; None: none.
        positions: [tokens] int32.
        slot_mapping: [tokens] int64, page * page_size + offset; -1: not stored.
        cos, sin: [max positions, head_dim / 2] fp32.
        k_cache, v_cache: [pages, page_size, num_kv_heads, head_dim], same dtype as x, with scales
            float8_e4m3fn; *written* at the slots, k after rotation.
        k_scale, v_scale: [num_kv_heads] fp32, above 0, or both None.
        num_heads: of q.
        static_weight: see `linear`.

    Returns:
        [tokens, num_heads, head_dim], q after rotation, same dtype; may be a view of the whole product.
    """
    where = (positions, slot_mapping, cos, sin, k_cache, v_cache, k_scale, v_scale)
    _check_linear_rope_kv_write(x, weight, bias, *where, num_heads, static_weight)
    check_heads(weight, num_heads, k_cache)
    check_cache_dtype(x.dtype, k_cache, k_scale, v_scale)
    if values.ENABLED:
        values.check_rope(positions, slot_mapping, cos, k_cache)
    module_for = dispatch.module_for if k_scale is None else dispatch.module_for_e4m3
    return module_for(backend, "linear_rope_kv_write", x).linear_rope_kv_write(
        x, weight, bias, *where, num_heads=num_heads, static_weight=static_weight
    )


def check_heads(weight: Tensor, num_heads: int, k_cache: Tensor) -> None:
    """A row of the weight of q, k and v for each element of their heads."""
    num_kv_heads, head_dim = k_cache.shape[2:]
    rows = (num_heads + 2 * num_kv_heads) * head_dim
    if weight.shape[0] != rows:
        raise ValueError(
            f"weight: expected {rows} rows ({num_heads} heads of q and {num_kv_heads} each of k and v, of "
            f"{head_dim}), got {weight.shape[0]}"
        )


def check_cache_dtype(
    dtype: torch.dtype, k_cache: Tensor, k_scale: Tensor | None, v_scale: Tensor | None
) -> None:
    """Caches in the `dtype` of q, with scales in e4m3. That of V has the dtype of K's."""
    if (k_scale is None) != (v_scale is None):
        given, absent = ("k_scale", "v_scale") if v_scale is None else ("v_scale", "k_scale")
        raise ValueError(f"{absent}: expected a tensor beside {given}, got None")
    expected, why = (dtype, "without scales") if k_scale is None else (E4M3, "beside scales")
    if k_cache.dtype != expected:
        raise TypeError(f"k_cache: expected {expected} {why}, got {k_cache.dtype}")


def lm_head_confidence(
    hidden: Tensor,
    weight: Tensor,
    *,
    probe_tokens: Tensor | None = None,
    suppress_token: int | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Top token of each hidden state and its softmax probability over the whole vocabulary.

    Equivalent to `softmax((hidden @ weight.T).float(), -1).max(-1)`, with the lowest id on a tie.

    Logits are to be below infinity, and one of each row above minus infinity. A row with a NaN, with plus
    infinity, or with minus infinity alone has no softmax: its confidence and its probe's probability are NaN,
    and its top token says nothing. Single logits of minus infinity are tokens of probability 0. So whether a
    model's numbers can be trusted is seen by the confidences; `decode_policy` counts those that are not
    finite.

    Args:
        hidden: [predictions, dim], fp32, bf16 or fp16.
        weight: [vocabulary, dim], same dtype.
        probe_tokens: [predictions] int32, a token of each row whose probability is wanted as well.
        suppress_token: its logit counts as minus infinity, whatever it is.

    Returns:
        top_token [predictions] int32, confidence [predictions] fp32, probe_probability [predictions] fp32 or
        None.
    """
    _check_lm_head_confidence(hidden, weight, probe_tokens, suppress_token)
    _check_suppressed(suppress_token, weight)
    if values.ENABLED and probe_tokens is not None:
        values.check_tokens("probe_tokens", probe_tokens, weight.shape[0])
    return dispatch.module_for(backend, "lm_head_confidence", hidden).lm_head_confidence(
        hidden, weight, probe_tokens=probe_tokens, suppress_token=suppress_token
    )


def lm_head_likely(
    hidden: Tensor, weight: Tensor, *, suppress_token: int | None = None, backend: str | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What `lm_head_confidence` says, and every token whose probability is above 0.2, `LEAST_LIKELY`.

    For them no token is suppressed: with MASK as the suppressed token, its probability is missing from
    theirs. Four places are enough, since probabilities add up to 1.

    Args:
        hidden: [predictions, dim], fp32, bf16 or fp16.
        weight: [vocabulary, dim], same dtype.
        suppress_token: its logit counts as minus infinity for top token and confidence alone.

    Returns:
        top_token [predictions] int32, confidence [predictions] fp32, likely_token [predictions, 4] int32 and
        likely_probability [predictions, 4] fp32, the most probable first, the lowest id first on a tie; -1
        and 0 where there are fewer.
    """
    _check_lm_head_likely(hidden, weight, suppress_token)
    _check_suppressed(suppress_token, weight)
    return dispatch.module_for(backend, "lm_head_likely", hidden).lm_head_likely(
        hidden, weight, suppress_token=suppress_token
    )


def _check_suppressed(suppress_token: int | None, weight: Tensor) -> None:
    if suppress_token is not None and not 0 <= suppress_token < weight.shape[0]:
        raise ValueError(f"suppress_token: expected an id below {weight.shape[0]}, got {suppress_token}")
