"""Keys of config.json that could change the forward pass or the decoding, and what happens to each.

A key that the reader of its family reads is the reader's. A key of the tables here passes with a value that
changes nothing and is refused with any other. A second name of a key that is read must agree with it. Any
other key passes, unless a word of its name belongs to a forward pass (`WORDS`), no word says that it is about
training, loading or speed (`HARMLESS_WORDS`), and its value is not off: null, false, 0 or empty. So a new
kind of model is refused by the name of its key and not run as something else, while notes and training
settings do no harm.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from blockbatch.models import stored_fp8
from blockbatch.models.rope_keys import fold_rope
from blockbatch.models.spec import CheckpointError
from blockbatch.models.token_keys import check_token_keys

_OFF = (None, False)
_ONE = (None, 1)

# Keys, values that change nothing, and what the forward pass does; 1 stands for 1.0 too.
_TABLE: tuple[tuple[str, tuple[Any, ...], str], ...] = (
    (
        "partial_rotary_factor rotary_pct rotary_percent rotary_percentage rotary_fraction rope_pct "
        "rope_percentage rope_scaling_factor rope_scale rope_scale_factor rope_factor ntk_factor ntk_alpha",
        _ONE,
        "whole heads are rotated, without scaling",
    ),
    (
        "use_mrope rope_interleaved rope_interleave rotary_interleaved use_dynamic_ntk use_ntk use_yarn "
        "alibi use_alibi use_rope_scaling",
        _OFF,
        "positions enter by plain rotary embeddings",
    ),
    ("rope use_rope use_rotary use_rotary_emb rope_full_precision", (None, True), "positions are rotated"),
    ("layer_norm_with_affine", (None, True), "each block has two plain RMSNorms"),
    (
        "mrope_section rope_local_base_freq rope_local_theta no_rope_layers",
        (None, []),
        "all layers rotate alike",
    ),
    ("no_rope_layer_interval", (None, 0), "all layers rotate alike"),
    ("rope_type", (None, "default"), "positions enter by plain rotary embeddings"),
    ("position_embedding_type", (None, "rope", "rotary"), "positions enter by plain rotary embeddings"),
    (
        "is_causal causal use_causal causal_attention causal_mask use_causal_mask use_causal_attention "
        "is_decoder is_encoder_decoder add_cross_attention block_causal use_block_causal_mask prefix_lm",
        _OFF,
        "attention is bidirectional",
    ),
    (
        "bidirectional is_bidirectional use_bidirectional_attention bidirectional_attention",
        (None, True),
        "attention is bidirectional",
    ),
    ("attention_type attn_type", (None, "full", "full_attention", "bidirectional"), "attention is full"),
    (
        "use_sliding_window attention_sink attention_sinks use_attention_sinks attn_output_gate "
        "gated_attention multi_query_attention",
        _OFF,
        "attention is full, with a softmax over the keys alone",
    ),
    ("attention_chunk_size sliding_window sliding_window_pattern", (None,), "attention is full"),
    (
        "block_size bd_size block_length block_len diffusion_block_size block_diffusion canvas_length "
        "sub_block_size small_block_size",
        (None, False, 0),
        "attention is over the whole canvas, not over blocks",
    ),
    (
        "attn_logit_softcapping final_logit_softcapping attention_multiplier attention_scale softmax_scale "
        "clip_qkv qk_clip",
        (None,),
        "scores are q k / sqrt(head_dim)",
    ),
    (
        "logit_scale logits_scaling logits_scale residual_multiplier residual_scale embedding_multiplier "
        "embedding_scale lm_head_multiplier scale_emb",
        _ONE,
        "nothing is scaled",
    ),
    ("scale_logits scale_embedding input_emb_norm dim_model_base scale_depth", _OFF, "nothing is scaled"),
    (
        "qk_norm use_qk_norm qk_layernorm use_qk_layernorm attention_layer_norm use_qkv_norm sandwich_norm "
        "apply_layernorm_1p rms_norm_unit_offset layernorm_zero_centered_gamma norm_bias bias_for_layer_norm",
        _OFF,
        "each block has two plain RMSNorms",
    ),
    (
        "norm_type normalization_type layer_norm_type",
        (None, "rms", "rmsnorm", "rms_norm", "RMSNorm"),
        "each block has two plain RMSNorms",
    ),
    (
        "mlp_bias use_bias attention_bias attention_out_bias attention_output_bias o_proj_bias "
        "add_bias_linear lm_head_bias include_bias include_qkv_bias",
        _OFF,
        "these products have no bias",
    ),
    (
        "hidden_act hidden_activation activation_function act_fn mlp_hidden_act activation_type "
        "mlp_activation",
        (None, "silu", "swish"),
        "the MLP is silu(gate) * up",
    ),
    (
        "parallel_attn parallel_attention use_parallel_residual new_decoder_architecture",
        _OFF,
        "attention and MLP follow one another",
    ),
    (
        "num_loops loop_count num_recurrences num_recurrent_steps block_group_size",
        _ONE,
        "each layer runs once",
    ),
    ("pruned_heads", (None, {}, []), "no head is left out"),
    (
        "quantization_config quantization quant_config compression_config",
        (None, {}, False),
        "weights are F32, F16 or BF16: load the checkpoint that it was made from",
    ),
    (
        "load_in_4bit load_in_8bit _load_in_4bit _load_in_8bit",
        _OFF,
        "weights are F32, F16 or BF16: load the checkpoint that it was made from",
    ),
    (
        "text_config llm_config language_config vision_config audio_config backbone_config sub_configs",
        (None, {}),
        "the model reads text alone",
    ),
)
_NEUTRAL = {key: (values, what) for keys, values, what in _TABLE for key in keys.split()}

# Words of a forward pass, with what a message says of them.
_PLAIN = "its name says that it changes the forward pass, and it is not known"
_EXPERTS = "a mixture of experts is not supported"
_IMAGES = "the model reads text alone"
WORDS: dict[str, str] = {
    **dict.fromkeys(("expert", "experts", "moe", "router", "routed"), _EXPERTS),
    **dict.fromkeys(
        "vision visual image images video audio speech multimodal mm codebook vq vae pixel".split(), _IMAGES
    ),
    **dict.fromkeys(
        "rope rotary mrope ntk yarn alibi position positions positional attn attention causal "
        "bidirectional window sliding chunk softcap softcapping sink sinks norm layernorm rmsnorm qk qkv "
        "bias act activation gate gated mlp ffn scale scaling scaled multiplier scalar block blocks canvas "
        "residual embedding embeddings head heads kv mtp nextn conv ssm mamba recurrent loop loops looped "
        "shift shifted logit logits conditioning timestep lora adapter adapters quant quantization "
        "quantize quantized awq gptq bits clip altup laurel tied tying share shared".split(),
        _PLAIN,
    ),
}
HARMLESS_WORDS = frozenset(
    "dropout init initializer initialization loss coef coefficient train training trainer lr optimizer "
    "gradient checkpointing dtype device cache implementation flash sdpa eager kernel kernels fuse fused "
    "parallelism tp pp ep output version".split()
)
# Known keys that hold such a word and change nothing in the families here.
_HARMLESS = frozenset(
    "rope_theta max_position_embeddings max_window_layers alibi_bias_max "
    "attention_layer_norm_with_affine original_max_position_embeddings tie_word_embeddings "
    "tie_encoder_decoder position_biased_input base_model_tp_plan num_attention_heads num_key_value_heads "
    "rms_norm_eps embedding_size output_attentions".split()
)
# Keys whose only value without effect is the size of a head.
_HEAD_SIZES = ("head_dim", "rotary_dim", "rotary_ndims", "query_pre_attn_scalar", "kv_channels", "head_size")


@dataclass(frozen=True)
class _Family:
    """A row for each model_type: keys that its reader reads, other names of them, whether logits shift."""

    reads: frozenset[str]
    same: dict[str, str] = field(default_factory=dict)
    heads: tuple[str, str] = ("hidden_size", "num_attention_heads")
    shifted: bool = False


_QWEN = frozenset("hidden_act use_sliding_window sliding_window head_dim attention_bias layer_types".split())
_QWEN_SAME = {
    **dict.fromkeys(("rotary_base", "rotary_emb_base", "rope_base", "rope_freq_base"), "rope_theta"),
    **dict.fromkeys(("layer_norm_eps", "layer_norm_epsilon", "norm_eps", "norm_epsilon"), "rms_norm_eps"),
    **dict.fromkeys(("llm_vocab_size", "new_vocab_size"), "vocab_size"),
}
_LLADA_SAME = {
    **_QWEN_SAME,
    "hidden_size": "d_model",
    "num_attention_heads": "n_heads",
    "num_hidden_layers": "n_layers",
    "num_key_value_heads": "n_kv_heads",
    "intermediate_size": "mlp_hidden_size",
}
_FAMILIES = {
    "llada": _Family(
        frozenset(
            "block_type block_group_size layer_norm_type layer_norm_with_affine activation_type rope alibi "
            "rope_full_precision include_bias include_qkv_bias bias_for_layer_norm attention_layer_norm "
            "input_emb_norm scale_logits clip_qkv multi_query_attention n_heads n_kv_heads weight_tying "
            "mlp_ratio mlp_hidden_size".split()
        ),
        _LLADA_SAME,
        ("d_model", "n_heads"),
    ),
    "Dream": _Family(_QWEN, {**_QWEN_SAME, "weight_tying": "tie_word_embeddings"}, shifted=True),
    "sdar": _Family(_QWEN | {"block_size"}, _QWEN_SAME),
    "Fast_dLLM_Qwen": _Family(_QWEN | {"bd_size"}, _QWEN_SAME, shifted=True),
}
_REQUIRED = ("d_model", "n_heads", "n_layers", "vocab_size")
_SHIFTS = ("shift_logits", "right_shift_logits", "logits_shift")


def checked(config: Mapping[str, Any], model_type: str) -> dict[str, Any]:
    """`config` with its rotary settings folded into `rope_theta`, once every key of it is known to be fine.

    Args:
        config: the content of a config.json.
        model_type: of a supported family.

    Raises:
        CheckpointError: a key asks for something that the forward pass does not do, or two keys contradict
            each other.
    """
    family = _FAMILIES.get(model_type, _Family(frozenset()))
    folded = fold_rope(config)
    check_token_keys(config, "config.json")
    for key, value in folded.items():
        if key in family.reads:
            continue
        if key in _SHIFTS:
            _refuse_unless(key, value, (None, family.shifted), "how logits and positions belong together")
        elif key in _HEAD_SIZES:
            head_dim = _head_dim(folded, family)
            _refuse_unless(key, value, (None, head_dim), "the size of a head")
        elif key in family.same:
            own = _own(folded, family.same[key])
            missing = own is None and family.same[key] in _REQUIRED  # the reader says so
            if value is not None and not missing and not _equal(value, own):
                raise CheckpointError(
                    f"config.json: {key} must be null or that of {family.same[key]} = {own!r}, got {value!r}"
                )
        elif key == "layer_types":
            _check_layer_types(value)
        elif key.startswith("quantization") and _switched_off(value):
            continue
        elif key in stored_fp8.CONFIG_KEYS and isinstance(value, dict) and value:
            stored_fp8.check_config(key, value)
        elif key in _NEUTRAL:
            if key == "sliding_window" and folded.get("use_sliding_window") is False:
                continue
            _refuse_unless(key, value, *_NEUTRAL[key])
        else:
            _check_unknown(key, value)
    return folded


def _refuse_unless(key: str, value: Any, neutral: tuple[Any, ...], what: str) -> None:
    if not any(_equal(value, good) for good in neutral):
        expected = " or ".join("null" if good is None else repr(good) for good in neutral)
        raise CheckpointError(
            f"config.json: {key} must be {expected} ({what}; nothing else is supported), got {value!r:.200}"
        )


def _check_unknown(key: str, value: Any) -> None:
    words = re.findall(r"[a-z]+|\d+", re.sub(r"(?<=[a-z])(?=[A-Z])", "_", key).lower())
    off = value is None or value is False or value in ("", 0) or value == [] or value == {}
    if off or key in _HARMLESS or not HARMLESS_WORDS.isdisjoint(words):
        return
    for word in words:
        if word in WORDS:
            raise CheckpointError(
                f"config.json: {key} must be null, false or 0 ({WORDS[word]}), got {value!r:.200}; remove "
                "the key if it changes nothing"
            )


def _check_layer_types(value: Any) -> None:
    full = isinstance(value, list) and all(kind == "full_attention" for kind in value)
    if value is not None and not full:
        raise CheckpointError(
            "config.json: layer_types must all be 'full_attention' (nothing else is supported), "
            f"got {value!r:.200}"
        )


def _own(config: Mapping[str, Any], key: str) -> Any:
    """The value of a key that a family reads; LLaDA derives two of them from others."""
    value = config.get(key)
    if value is None and key == "n_kv_heads":
        return config.get("n_heads")
    if value is None and key == "mlp_hidden_size" and isinstance(config.get("d_model"), int):
        ratio = config.get("mlp_ratio", 4)
        return ratio * config["d_model"] if isinstance(ratio, int) else None
    return value


def _head_dim(config: Mapping[str, Any], family: _Family) -> int | None:
    hidden_size, num_heads = (config.get(key) for key in family.heads)
    if isinstance(config.get("head_dim"), int) and "head_dim" in family.reads:
        return config["head_dim"]
    if isinstance(hidden_size, int) and isinstance(num_heads, int) and num_heads > 0:
        return hidden_size // num_heads
    return None


def _switched_off(value: Any) -> bool:
    """bitsandbytes writes its settings even where it quantised nothing."""
    return (
        isinstance(value, dict)
        and value.get("quant_method") == "bitsandbytes"
        and not any(
            value.get(prefix + key) for prefix in ("", "_") for key in ("load_in_4bit", "load_in_8bit")
        )
    )


def _equal(value: Any, good: Any) -> bool:
    # 0 == False in Python, and 1.0 is 1 in JSON.
    if isinstance(value, bool) or isinstance(good, bool):
        return value is good
    return value == good
