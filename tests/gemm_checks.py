"""Arguments of the products on a GPU and how their results are judged."""

import torch
import torch.nn.functional as F

from blockbatch_kernels import reference, tuning
from blockbatch_kernels.cuda import gemm

DTYPES = [torch.bfloat16, torch.float16]


def name_of(value):
    if isinstance(value, tuning.LinearTile):
        return f"tokens{value.tokens}rows{value.rows}split_k{value.split_k}multicast{value.multicast}"
    return str(value)


def poison_new_tensors(monkeypatch):
    """Outputs start as NaN, so that an element that nobody writes is seen."""
    empty = torch.Tensor.new_empty

    def new_empty(tensor, *size, **options):
        return empty(tensor, *size, **options).fill_(float("nan"))

    monkeypatch.setattr(torch.Tensor, "new_empty", new_empty)


def random_arguments(num_tokens, out_features, in_features, dtype, *, bias=False, seed=0):
    generator = torch.Generator("cuda").manual_seed(seed + 1000 * num_tokens + out_features + in_features)

    def randn(*size):
        return torch.randn(*size, device="cuda", generator=generator)

    x = randn(num_tokens, in_features).to(dtype)
    weight = (randn(out_features, in_features) * in_features**-0.5).to(dtype)
    return x, weight, randn(out_features).to(dtype) if bias else None


def with_tile(x, weight, bias, tile, **options):
    """The product in one launch of this tile."""
    features = weight.shape[0] // (2 if options["gated"] else 1)
    return gemm._gemm(x, weight, bias, (tuning.LinearPart(features, tile),), **options)


def compare(x, weight, bias, gated, result):
    """Ours errs at most twice as much as torch in the same dtype, plus a rounding, against fp64."""
    truth = x.double() @ weight.double().T
    if gated:
        gate, up = truth.chunk(2, dim=-1)
        truth = F.silu(gate) * up
        by_torch = reference.linear_swiglu(x, weight)
    else:
        truth = truth if bias is None else truth + bias.double()
        by_torch = F.linear(x, weight, bias)
    rounding = torch.finfo(x.dtype).eps * truth.abs().max()
    assert result.dtype == x.dtype and result.shape == by_torch.shape
    error = (result.double() - truth).abs().max()  # NaN, and so a failure, where an element was left out
    assert error <= 2 * (by_torch.double() - truth).abs().max() + rounding
