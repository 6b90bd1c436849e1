"""Random and strided inputs on the GPU."""

import math

import torch


def draw(*shape, dtype=torch.float32, scale=1.0, seed=0):
    generator = torch.Generator("cuda").manual_seed(seed)
    return (torch.randn(*shape, generator=generator, device="cuda") * scale).to(dtype)


def strided(values, padding, offset):
    """`values` as a view of a larger storage of NaN, and the mask of what lies beside it there."""
    rows, columns = values.shape
    storage = torch.full(
        (offset + rows * (columns + padding),),
        math.nan,
        dtype=values.dtype,
        device="cuda",
    )
    view = storage[offset:].view(rows, columns + padding)[:, :columns]
    view.copy_(values)
    beside = torch.ones_like(storage, dtype=torch.bool)
    beside[offset:].view(rows, columns + padding)[:, :columns] = False
    return view, storage, beside
