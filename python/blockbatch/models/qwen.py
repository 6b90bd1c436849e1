"""What the families of Qwen's shape share: names of tensors, and settings of config.json read alike.

They are Dream, SDAR and Fast-dLLM v2.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from blockbatch.models.spec import CheckpointError, ModelSpec, read_float, read_int, require
from blockbatch.models.weights import Destination, layer_destinations, model_destinations

LAYER_NAMES = {
    "input_norm": "input_layernorm.weight",
    "q": "self_attn.q_proj.weight",
    "k": "self_attn.k_proj.weight",
    "v": "self_attn.v_proj.weight",
    "q_bias": "self_attn.q_proj.bias",
    "k_bias": "self_attn.k_proj.bias",
    "v_bias": "self_attn.v_proj.bias",
    "q_norm": "self_attn.q_norm.weight",
    "k_norm": "self_attn.k_norm.weight",
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


def tensor_map(spec: ModelSpec) -> dict[str, Destination]:
    """Every tensor that a checkpoint of `spec` holds, by its name there."""
    names = {MODEL_NAMES[role]: place for role, place in model_destinations(spec).items()}
    for layer in range(spec.num_layers):
        for role, place in layer_destinations(spec, layer).items():
            names[f"model.layers.{layer}.{LAYER_NAMES[role]}"] = place
    return names


def read_shape(config: Mapping[str, Any], *, own_head_dim: bool) -> dict[str, Any]:
    """The fields of `ModelSpec` that both block-causal families read alike.

    Args:
        own_head_dim: whether `head_dim` may be other than hidden_size / num_attention_heads.

    Raises:
        CheckpointError: a size is missing or a setting is not supported.
    """
    for key, allowed, default in SUPPORTED:
        require(config, key, allowed, default)
    require_full_attention(config)
    hidden_size, num_heads = read_int(config, "hidden_size"), read_int(config, "num_attention_heads")
    if num_heads < 1:
        raise CheckpointError(f"config.json: num_attention_heads must be at least 1, got {num_heads}")
    head_dim = read_int(config, "head_dim", hidden_size // num_heads)
    if not own_head_dim and head_dim * num_heads != hidden_size:
        raise CheckpointError(
            f"config.json: num_attention_heads must divide hidden_size = {hidden_size} into heads of "
            f"head_dim, got {num_heads} heads of {head_dim}"
        )
    vocab_size = read_int(config, "vocab_size")
    return dict(
        num_layers=read_int(config, "num_hidden_layers"),
        hidden_size=hidden_size,
        num_heads=num_heads,
        num_kv_heads=read_int(config, "num_key_value_heads", num_heads),
        head_dim=head_dim,
        intermediate_size=read_int(config, "intermediate_size"),
        vocab_size=vocab_size,
        embedding_size=vocab_size,
        rope_theta=rope_theta(config, 10000.0),
        rms_norm_eps=read_float(config, "rms_norm_eps", 1e-6),
        max_length=read_int(config, "max_position_embeddings", 32768),
    )


def require_full_attention(config: Mapping[str, Any]) -> None:
    """Refuses layers of sliding windows."""
    layer_types = config.get("layer_types")
    if layer_types is None:
        return
    if not isinstance(layer_types, list) or any(kind != "full_attention" for kind in layer_types):
        raise CheckpointError(
            "config.json: layer_types must all be 'full_attention' (nothing else is supported), "
            f"got {layer_types!r}"
        )


def rope_theta(config: Mapping[str, Any], default: float) -> float:
    """The base of plain RoPE; newer configurations keep it, with its scaling, in `rope_parameters`."""
    theta = read_float(config, "rope_theta", default)
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
