"""SDAR and TraDo (arXiv 2510.06303): Qwen3's shape with a mask that is causal across blocks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from blockbatch.models import qwen
from blockbatch.models.spec import ModelSpec, read_bool, read_int, read_token_ids, require

tensor_map = qwen.tensor_map

MASK_TOKEN = "<|MASK|>"
# Of the checkpoints whose config.json and name do not say another.
BLOCK_SIZE = 4


def read_spec(config: Mapping[str, Any]) -> ModelSpec:
    """Read a config.json with `model_type` "sdar".

    Some checkpoints say neither `block_size` nor `mask_token_id`: see `special_ids.complete`.

    Raises:
        CheckpointError: a size is missing or a setting is not supported.
    """
    require(config, "attention_bias", (False,), False)
    mask_token_ids = read_token_ids(config, "mask_token_id")
    return ModelSpec(
        family="sdar",
        **qwen.read_shape(config, own_head_dim=True),
        mask_token_id=mask_token_ids[0] if mask_token_ids else None,
        eos_token_ids=read_token_ids(config, "eos_token_id"),
        qkv_bias=False,
        tie_embeddings=read_bool(config, "tie_word_embeddings", False),
        prediction_offset=0,
        suppress_mask=False,
        leap_threshold=0.75,
        qk_norm=True,
        block_size=read_int(config, "block_size", BLOCK_SIZE),
    )
