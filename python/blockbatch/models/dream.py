"""Dream (arXiv 2508.15487): meaning of its config.json and names of its tensors, which are those of Qwen2."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from blockbatch.models.spec import (
    CheckpointError,
    ModelSpec,
    read_bool,
    read_float,
    read_int,
    read_token_ids,
    require,
)
from blockbatch.models.weights import Destination, layer_destinations, model_destinations

LAYER_NAMES = {
    "input_norm": "input_layernorm.weight",
    "q": "self_attn.q_proj.weight",
    "k": "self_attn.k_proj.weight",
    "v": "self_attn.v_proj.weight",
    "q_bias": "self_attn.q_proj.bias",
    "k_bias": "self_attn.k_proj.bias",
    "v_bias": "self_attn.v_proj.bias",
    "out": "self_attn.o_proj.weight",
    "post_norm": "post_attention_layernorm.weight",
    "gate": "mlp.gate_proj.weight",
    "up": "mlp.up_proj.weight",
    "down": "mlp.down_proj.weight",
}
MODEL_NAMES = {
    "embedding": "model.embed_tokens.weight",
    "final_norm": "model.norm.weight",
    "lm_head": "lm_head.weight",
}

# Key, accepted values, what an absent key means.
SUPPORTED = (("hidden_act", ("silu",), "silu"), ("use_sliding_window", (False,), False))


def read_spec(config: Mapping[str, Any]) -> ModelSpec:
    """Read a config.json with `model_type` "Dream".

    Raises:
        CheckpointError: a size is missing or a setting is not supported.
    """
    for key, allowed, default in SUPPORTED:
        require(config, key, allowed, default)
    _require_full_attention(config)
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
        rope_theta=_rope_theta(config),
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


def tensor_map(spec: ModelSpec) -> dict[str, Destination]:
    """Every tensor that a checkpoint of `spec` holds, by its name there."""
    names = {MODEL_NAMES[role]: place for role, place in model_destinations(spec).items()}
    for layer in range(spec.num_layers):
        for role, place in layer_destinations(spec, layer).items():
            names[f"model.layers.{layer}.{LAYER_NAMES[role]}"] = place
    return names


def _require_full_attention(config: Mapping[str, Any]) -> None:
    layer_types = config.get("layer_types")
    if layer_types is None:
        return
    if not isinstance(layer_types, list) or any(kind != "full_attention" for kind in layer_types):
        raise CheckpointError(
            "config.json: layer_types must all be 'full_attention' (nothing else is supported), "
            f"got {layer_types!r}"
        )


def _rope_theta(config: Mapping[str, Any]) -> float:
    """The base of plain RoPE; newer configurations keep it, with its scaling, in `rope_parameters`."""
    theta = read_float(config, "rope_theta", 10000.0)
    for key in ("rope_scaling", "rope_parameters"):
        rope = config.get(key)
        if rope is None:
            continue
        kind = rope.get("rope_type", rope.get("type")) if isinstance(rope, dict) else rope
        if kind != "default":
            raise CheckpointError(
                f"config.json: {key} must be null or of type 'default' (no scaling), got {rope!r}"
            )
        theta = read_float(rope, "rope_theta", theta)
    return theta
