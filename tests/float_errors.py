"""How results of the float operators are judged: by their error beside that of plain torch."""

import torch

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def assert_no_worse_than_torch(got, in_dtype, truth):
    """Against an fp64 truth: at most twice the error of plain torch in that dtype, and what chance may hide.

    On few elements torch can be exact by luck. Ours then still rounds once to its dtype, and about four times
    in fp32 on the way: SwiGLU is an exponential, a sum, a quotient and a product. Hence one unit in the last
    place of the dtype, and two of fp32. A result that is NaN, one that nothing wrote, fails.
    """
    assert got.dtype == in_dtype.dtype and got.shape == in_dtype.shape
    error = (got.double() - truth).abs().max().item()
    torch_error = (in_dtype.double() - truth).abs().max().item()
    rounding = (torch.finfo(got.dtype).eps + 2 * torch.finfo(torch.float32).eps) * truth.abs().max().item()
    assert error <= 2 * torch_error + rounding, f"{error=} {torch_error=} {rounding=}"
