"""Random and strided inputs on the GPU, and how results of the compiled float operators are judged."""

import math

import torch

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


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


def assert_no_worse_than_torch(got, torchs, truth):
    error = (got.double() - truth).abs().max().item()  # NaN, and so a failure, where an element was left out
    torch_error = (torchs.double() - truth).abs().max().item()
    rounding = torch.finfo(torchs.dtype).eps * truth.abs().max().item()  # torch may be exact on few elements
    assert error <= 2 * torch_error + rounding
