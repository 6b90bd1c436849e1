"""Fast-dLLM v2 (arXiv 2509.26328): Qwen2.5's shape with a mask that is causal across blocks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from blockbatch.models import qwen
from blockbatch.models.spec import ModelSpec, read_bool, read_int, read_token_ids, require

tensor_map = qwen.tensor_map

MASK_TOKEN = "|<MASK>|"


def read_spec(config: Mapping[str, Any]) -> ModelSpec:
    """Read a config.json with `model_type` "Fast_dLLM_Qwen".

    It does not name MASK, as a rule: see `special_ids.complete`. Query, key and value products have a
    bias, which no key says.

    Raises:
        CheckpointError: a size is missing or a setting is not supported.
    """
    require(config, "attention_bias", (True,), True)
    mask_token_ids = read_token_ids(config, "mask_token_id")
    return ModelSpec(
        family="fast_dllm_v2",
        **qwen.read_shape(config, own_head_dim=False),
        mask_token_id=mask_token_ids[0] if mask_token_ids else None,
        eos_token_ids=read_token_ids(config, "eos_token_id"),
        qkv_bias=True,
        tie_embeddings=read_bool(config, "tie_word_embeddings", False),
        prediction_offset=1,
        suppress_mask=False,
        leap_threshold=0.8,
        block_size=read_int(config, "bd_size", 32),
    )
