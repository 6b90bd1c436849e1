"""Dream (arXiv 2508.15487): meaning of its config.json and names of its tensors, which are those of Qwen2."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from blockbatch.models import qwen
from blockbatch.models.spec import (
    CheckpointError,
    ModelSpec,
    read_bool,
    read_float,
    read_int,
    read_token_ids,
    require,
)

tensor_map = qwen.tensor_map

# Key, accepted values, what an absent key means.
SUPPORTED = (("hidden_act", ("silu",), "silu"), ("use_sliding_window", (False,), False))


def read_spec(config: Mapping[str, Any]) -> ModelSpec:
    """Read a config.json with `model_type` "Dream".

    Raises:
        CheckpointError: a size is missing or a setting is not supported.
    """
    for key, allowed, default in SUPPORTED:
        require(config, key, allowed, default)
    qwen.require_full_attention(config)
    hidden_size, num_heads = read_int(config, "hidden_size"), read_int(config, "num_attention_heads")
    if num_heads < 1 or hidden_size % num_heads:
        raise CheckpointError(
            f"config.json: num_attention_heads must divide hidden_size = {hidden_size}, got {num_heads}"
        )
    head_dim = hidden_size // num_heads
    if read_int(config, "head_dim", head_dim) != head_dim:
        raise CheckpointError(
            f"config.json: head_dim must be hidden_size / num_attention_heads = {head_dim}, "
            f"got {config['head_dim']}"
        )
    vocab_size = read_int(config, "vocab_size")
    return ModelSpec(
        family="dream",
        num_layers=read_int(config, "num_hidden_layers"),
        hidden_size=hidden_size,
        num_heads=num_heads,
        num_kv_heads=read_int(config, "num_key_value_heads", num_heads),
        head_dim=head_dim,
        intermediate_size=read_int(config, "intermediate_size"),
        vocab_size=vocab_size,
        embedding_size=read_int(config, "embedding_size", vocab_size),
        rope_theta=qwen.rope_theta(config, 10000.0),
        rms_norm_eps=read_float(config, "rms_norm_eps", 1e-6),
        max_length=read_int(config, "max_position_embeddings", 32768),
        mask_token_id=read_int(config, "mask_token_id"),
        eos_token_ids=read_token_ids(config, "eos_token_id"),
        qkv_bias=read_bool(config, "attention_bias", True),
        tie_embeddings=read_bool(config, "tie_word_embeddings", False),
        prediction_offset=1,
        suppress_mask=True,
        leap_threshold=0.8,
    )
