"""Where heads are rotated to and stored, for tests of products that do it themselves."""

import math

import torch

E4M3 = torch.float8_e4m3fn
PAGE_SIZE = 16


def places(num_tokens, kv_heads, head_dim, dtype, device="cuda", in_e4m3=False, seed=0):
    """positions, slot_mapping, cos, sin, caches [2, ...] of NaN and their scales; some tokens are not stored,
    some stand at positions without an angle."""
    generator = torch.Generator().manual_seed(seed + num_tokens)
    pages = -(-num_tokens // PAGE_SIZE) + 3
    angle = 6.3 * torch.rand(300, head_dim // 2, generator=generator)
    positions = torch.randint(300, (num_tokens,), generator=generator, dtype=torch.int32)
    if device != "cpu":  # which looks at them
        positions[3::11] = 300
    slots = torch.randperm(pages * PAGE_SIZE, generator=generator)[:num_tokens]
    slots[1::5] = -1
    caches = torch.full((2, pages, PAGE_SIZE, kv_heads, head_dim), math.nan).to(E4M3 if in_e4m3 else dtype)
    # No powers of two, so that divisions round; some numbers are beyond what e4m3 holds.
    scales = [0.3 * torch.rand(kv_heads, generator=generator) + 1e-3 for _ in range(2)] if in_e4m3 else []
    tensors = (positions, slots, angle.cos(), angle.sin(), caches)
    return *(tensor.to(device) for tensor in tensors), tuple(scale.to(device) for scale in scales)


def fill_with_nan(cache):
    if cache.dtype == E4M3:
        cache.view(torch.uint8).fill_(0x7F)
    else:
        cache.fill_(math.nan)


def nan_like(cache):
    empty = torch.empty_like(cache)
    fill_with_nan(empty)
    return empty


def same_bytes(one, other):
    """Which NaN it is does not matter."""
    return torch.equal(one.float().nan_to_num(nan=1e30), other.float().nan_to_num(nan=1e30))
