"""The LM head with a weight in e4m3: logits by `linear_fp8`, all else as with a weight in 16 bits."""

from blockbatch_kernels.scaled_head import scaled_head
from blockbatch_kernels.triton.likely import lm_head_likely
from blockbatch_kernels.triton.lm_head import lm_head_confidence
from blockbatch_kernels.triton.sampling import lm_head_sample

lm_head_confidence_fp8, lm_head_likely_fp8, lm_head_sample_fp8 = scaled_head(
    lm_head_confidence, lm_head_likely, lm_head_sample
)
