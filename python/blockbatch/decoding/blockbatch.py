"""BlockBatch (arXiv 2605.29233): several block sizes of one request as branches of one batched forward.

After every forward each branch commits what it is sure of; branches then merge tokens that a compatible
branch already holds and that they would have chosen themselves, and branches that trail take over the
leader's state. `ALGORITHM.md` beside this file is the exact rule, `DREAM.md` the one that the authors run on
Dream.
"""

from blockbatch.config import DecodeConfig
from blockbatch.decoding.method import Method
from blockbatch.models.spec import ModelSpec
from blockbatch_kernels import PolicyParams

# Larger than any canvas: no branch ever trails by so much.
_NEVER = 2**30


def method(config: DecodeConfig, spec: ModelSpec, eos_token_ids: tuple[int, ...]) -> Method:
    config = config.for_model(spec)
    leap_threshold = spec.leap_threshold if config.leap_threshold is None else config.leap_threshold
    params = PolicyParams(
        mask_token_id=spec.mask_token_id,
        eos_token_ids=eos_token_ids,
        threshold=config.threshold,
        tail_threshold=config.tail_threshold,
        leap_radius=config.leap_radius if config.commit == "local_leap" else 0,
        leap_threshold=leap_threshold,
        # A confidence never exceeds 1, so this threshold lets nothing pass.
        merge_threshold=1.0 if config.merge_threshold is None else config.merge_threshold,
        sync_threshold=_NEVER if config.sync_threshold is None else config.sync_threshold,
        refresh_interval=config.refresh_interval,
        eos_exit=config.eos_exit,
        query_span=config.query_span,
        refresh_scope=config.refresh_scope,
        prediction_offset=spec.prediction_offset,
        policy=config.policy,
    )
    return Method(config.block_sizes, params)
