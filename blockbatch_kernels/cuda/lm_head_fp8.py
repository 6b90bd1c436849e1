"""The LM head with a weight in e4m3: logits by `linear_fp8`, all else as with a weight in 16 bits."""

from blockbatch_kernels.cuda.lm_head import lm_head_confidence, lm_head_likely
from blockbatch_kernels.cuda.sampling import lm_head_sample
from blockbatch_kernels.scaled_head import scaled_head

lm_head_confidence_fp8, lm_head_likely_fp8, lm_head_sample_fp8 = scaled_head(
    lm_head_confidence, lm_head_likely, lm_head_sample
)
