"""LLaDA (arXiv 2502.09992): meaning of its config.json and names of its tensors.

Absent settings stand for the defaults of the published configuration, which are those of a GPT-2-like OLMo
model and not those of LLaDA-8B. So a config.json that leaves out, say, `rope` describes a model that this
package does not run.
"""

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
    "input_norm": "attn_norm.weight",
    "q": "q_proj.weight",
    "k": "k_proj.weight",
    "v": "v_proj.weight",
    "q_bias": "q_proj.bias",
    "k_bias": "k_proj.bias",
    "v_bias": "v_proj.bias",
    "out": "attn_out.weight",
    "post_norm": "ff_norm.weight",
    "gate": "ff_proj.weight",
    "up": "up_proj.weight",
    "down": "ff_out.weight",
}
MODEL_NAMES = {"embedding": "wte.weight", "final_norm": "ln_f.weight", "lm_head": "ff_out.weight"}

# Key, accepted values, what an absent key means. "llama" is the block with separate q, k, v and gated MLP
# products; in it the published code computes silu(gate) * up for "silu" and has no working "swiglu".
SUPPORTED = (
    ("block_type", ("llama",), "sequential"),
    ("block_group_size", (1,), 1),
    ("layer_norm_type", ("rms",), "default"),
    ("layer_norm_with_affine", (True,), True),
    ("activation_type", ("silu",), "swiglu"),
    ("rope", (True,), False),
    ("rope_full_precision", (True,), True),
    ("alibi", (False,), False),
    ("include_bias", (False,), False),
    ("bias_for_layer_norm", (False, None), None),
    ("attention_layer_norm", (False,), False),
    ("input_emb_norm", (False,), False),
    ("scale_logits", (False,), False),
    ("clip_qkv", (None,), None),
)


def read_spec(config: Mapping[str, Any]) -> ModelSpec:
    """Read a config.json with `model_type` "llada".

    Raises:
        CheckpointError: a size is missing or a setting is not supported.
    """
    for key, allowed, default in SUPPORTED:
        require(config, key, allowed, default)
    hidden_size, num_heads = read_int(config, "d_model"), read_int(config, "n_heads")
    if num_heads < 1 or hidden_size % num_heads:
        raise CheckpointError(f"config.json: n_heads must divide d_model = {hidden_size}, got {num_heads}")
    vocab_size = read_int(config, "vocab_size")
    return ModelSpec(
        family="llada",
        num_layers=read_int(config, "n_layers"),
        hidden_size=hidden_size,
        num_heads=num_heads,
        num_kv_heads=_num_kv_heads(config, num_heads),
        head_dim=hidden_size // num_heads,
        intermediate_size=read_int(config, "mlp_hidden_size", read_int(config, "mlp_ratio", 4) * hidden_size),
        vocab_size=vocab_size,
        embedding_size=read_int(config, "embedding_size", vocab_size),
        rope_theta=read_float(config, "rope_theta", 10000.0),
        rms_norm_eps=read_float(config, "rms_norm_eps", 1e-5),
        max_length=read_int(config, "max_sequence_length", 1024),
        mask_token_id=read_int(config, "mask_token_id"),
        eos_token_ids=read_token_ids(config, "eos_token_id"),
        qkv_bias=read_bool(config, "include_qkv_bias", False),
        tie_embeddings=read_bool(config, "weight_tying", True),
        prediction_offset=0,
        suppress_mask=False,
        leap_threshold=0.75,
    )


def tensor_map(spec: ModelSpec) -> dict[str, Destination]:
    """Every tensor that a checkpoint of `spec` holds, by its name there."""
    prefix = "model.transformer."
    names = {prefix + MODEL_NAMES[role]: place for role, place in model_destinations(spec).items()}
    for layer in range(spec.num_layers):
        for role, place in layer_destinations(spec, layer).items():
            names[f"{prefix}blocks.{layer}.{LAYER_NAMES[role]}"] = place
    return names


def _num_kv_heads(config: Mapping[str, Any], num_heads: int) -> int:
    multi_query = config.get("multi_query_attention")
    if multi_query is None:
        return read_int(config, "n_kv_heads", num_heads)
    expected = 1 if read_bool(config, "multi_query_attention", False) else num_heads
    num_kv_heads = read_int(config, "n_kv_heads", expected)
    if num_kv_heads != expected:
        raise CheckpointError(
            f"config.json: n_kv_heads must be {expected} because multi_query_attention is {multi_query!r}, "
            f"got {num_kv_heads}"
        )
    return num_kv_heads
