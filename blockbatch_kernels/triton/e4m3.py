"""Numbers to e4m3 and back, in the interpreter too, which turns some of them wrongly."""

import triton
import triton.language as tl

from blockbatch_kernels.shapes import E4M3_MAX
from blockbatch_kernels.triton import interpreted
from blockbatch_kernels.triton.quantized import _to_e4m3

_MAX = tl.constexpr(E4M3_MAX)
_BY_BITS = tl.constexpr(interpreted())


@triton.jit
def stored_in_e4m3(value, scale, element_type: tl.constexpr):
    """`value / scale` in fp32, limited to what e4m3 holds; infinity becomes NaN."""
    exact = tl.div_rn(value.to(tl.float32), scale + tl.zeros_like(value).to(tl.float32))
    limited = tl.where(exact > _MAX, _MAX, tl.where(exact < -_MAX, -_MAX, exact))
    limited = tl.where(tl.abs(exact) == float("inf"), float("nan"), limited)
    return _to_e4m3(limited, element_type)


@triton.jit
def from_e4m3(value, dtype: tl.constexpr):
    """The same number in `dtype`."""
    if _BY_BITS:
        bits = value.to(tl.uint8, bitcast=True).to(tl.int32)
        exponent, mantissa = (bits >> 3) & 15, bits & 7
        normal = (((exponent + 120) << 23) | (mantissa << 20)).to(tl.float32, bitcast=True)
        exact = tl.where(exponent == 0, mantissa.to(tl.float32) * 0.001953125, normal)
        exact = tl.where((bits & 0x7F) == 0x7F, float("nan"), exact)
        return tl.where(bits > 0x7F, -exact, exact).to(dtype)
    else:
        return value.to(dtype)
