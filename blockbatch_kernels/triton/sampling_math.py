"""What the kernels of `lm_head_sample` share: the noise, and logits as a request's rules change them.

The noise is bit for bit that of `reference/sampling.py` up to its two logarithms.
"""

import triton
import triton.language as tl

from blockbatch_kernels.shapes import KEY_STARTS, KEY_STEP

FIRST_START, SECOND_START = tl.constexpr(KEY_STARTS[0]), tl.constexpr(KEY_STARTS[1])
STEP = tl.constexpr(KEY_STEP)


@triton.jit
def mixed(x):
    """A permutation of uint32 in which every bit of `x` reaches every bit."""
    x = x ^ (x >> 16)
    x = x * tl.full([], 0x7FEB352D, tl.uint32)
    x = x ^ (x >> 15)
    x = x * tl.full([], 0x846CA68B, tl.uint32)
    return x ^ (x >> 16)


@triton.jit
def _absorbed(key, word):
    return mixed((key ^ word) + tl.full([], STEP, tl.uint32))


@triton.jit
def _half_of_key(start: tl.constexpr, low, high, position, forward):
    key = tl.full([], start, tl.uint32)
    key = _absorbed(_absorbed(key, low), high)
    return _absorbed(_absorbed(key, position), forward)


@triton.jit
def noise_key(seed, position, forward):
    """The two halves of a row's key; `seed` int64, the others int32."""
    low, high = (seed & 0xFFFFFFFF).to(tl.uint32), ((seed >> 32) & 0xFFFFFFFF).to(tl.uint32)
    position, forward = position.to(tl.uint32, bitcast=True), forward.to(tl.uint32, bitcast=True)
    first = _half_of_key(FIRST_START, low, high, position, forward)
    return first, _half_of_key(SECOND_START, low, high, position, forward)


@triton.jit
def gumbel(first, second, token):
    """Gumbel noise of tokens, fp32; see the reference for the steps."""
    bits = mixed(mixed(token.to(tl.uint32) + first) ^ second)
    v = (bits.to(tl.float32) + 0.5) * 2.3283064365386963e-10  # 2^-32
    v = tl.minimum(v, 0.999999940395355224609375)  # 1 - 2^-24
    small = v * (1.0 + v * (0.5 + v * (0.3333333432674408 + v * 0.25)))
    return -tl.log(tl.where(v < 0.015625, small, -tl.log(1.0 - v)))


@triton.jit
def changed_logits(
    pointer,  # of the logits of a row's tokens
    token,
    inside,
    first,  # the first of the tokens; they end before `last`
    last,
    suppress_token,
    request,
    position,
    changed_token,  # [changed]
    logit_bias,  # [requests, changed]
    banned_before,  # [requests, changed]
    num_changed,
):
    """fp32, as the rules change them; minus infinity outside."""
    logit = tl.load(pointer, mask=inside, other=float("-inf")).to(tl.float32)
    logit = tl.where(token == suppress_token, float("-inf"), logit)
    for index in range(num_changed):
        changed = tl.load(changed_token + index)
        if (changed >= first) & (changed < last):
            at = request.to(tl.int64) * num_changed + index
            bias = tl.load(logit_bias + at)
            is_banned = (bias == float("-inf")) | (position < tl.load(banned_before + at))
            is_it = token == changed
            logit = tl.where(is_it, tl.where(is_banned, float("-inf"), logit + bias), logit)
    return logit
