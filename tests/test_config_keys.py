"""Keys of config.json and generation_config.json that change a decode: read, or refused by name."""

import json

import pytest
import torch

import blockbatch
import plain_models
from blockbatch.models import config_keys
from blockbatch.models.checkpoint import CheckpointError, read_config, read_spec
from checkpoint_files import edit_config

LLADA_8B = {
    "activation_type": "silu", "alibi": False, "alibi_bias_max": 8.0, "architectures": ["LLaDAModelLM"],
    "attention_dropout": 0.0, "attention_layer_norm": False, "attention_layer_norm_with_affine": True,
    "auto_map": {"AutoConfig": "configuration_llada.LLaDAConfig", "AutoModel": "modeling_llada.LLaDAModelLM"},
    "bias_for_layer_norm": False, "block_group_size": 1, "block_type": "llama", "d_model": 4096,
    "embedding_dropout": 0.0, "embedding_size": 126464, "eos_token_id": 126081, "flash_attention": False,
    "include_bias": False, "include_qkv_bias": False, "init_cutoff_factor": None, "init_device": "meta",
    "init_fn": "mitchell", "init_std": 0.02, "input_emb_norm": False, "layer_norm_type": "rms",
    "layer_norm_with_affine": True, "mask_token_id": 126336, "max_sequence_length": 4096,
    "mlp_hidden_size": 12288, "mlp_ratio": 4, "model_type": "llada", "multi_query_attention": None,
    "n_heads": 32, "n_kv_heads": 32, "n_layers": 32, "pad_token_id": 126081, "precision": "amp_bf16",
    "residual_dropout": 0.0, "rms_norm_eps": 1e-05, "rope": True, "rope_full_precision": True,
    "rope_theta": 500000.0, "scale_logits": False, "transformers_version": "4.46.3", "use_cache": False,
    "vocab_size": 126464, "weight_tying": False,
}  # fmt: skip
DREAM_7B = {
    "architectures": ["DreamModel"], "attention_dropout": 0.0, "bos_token_id": 151643, "eos_token_id": 151643,
    "auto_map": {"AutoConfig": "configuration_dream.DreamConfig", "AutoModel": "modeling_dream.DreamModel"},
    "hidden_act": "silu", "hidden_size": 3584, "initializer_range": 0.02, "intermediate_size": 18944,
    "mask_token_id": 151666, "max_position_embeddings": 131072, "max_window_layers": 28,
    "model_type": "Dream", "num_attention_heads": 28, "num_hidden_layers": 28, "num_key_value_heads": 4,
    "pad_token_id": 151643, "rms_norm_eps": 1e-06, "rope_scaling": None, "rope_theta": 1000000.0,
    "sliding_window": 131072, "tie_word_embeddings": False, "torch_dtype": "bfloat16",
    "transformers_version": "4.46.2", "use_cache": True, "use_mrope": False, "use_sliding_window": False,
    "vocab_size": 152064,
}  # fmt: skip
BASES = {"llada": LLADA_8B, "dream": DREAM_7B}


def spec_of(family, **changes):
    """The spec of a published configuration with changed keys; the value `...` removes one."""
    config = {**BASES[family], **changes}
    return read_spec({key: value for key, value in config.items() if value is not ...})


def refused(family, message, **changes):
    with pytest.raises(CheckpointError, match=message):
        spec_of(family, **changes)


@pytest.mark.parametrize("family", BASES)
def test_published_configurations_pass(family):
    spec = spec_of(family)
    assert spec.head_dim == 128 and spec.rope_theta == BASES[family]["rope_theta"]


# Rotary embeddings


@pytest.mark.parametrize("family", BASES)
@pytest.mark.parametrize("key", ["rope_scaling", "rope_parameters"])
@pytest.mark.parametrize(
    "rope",
    [
        {"rope_theta": 250000.0},
        {"rope_type": "default", "rope_theta": 250000},
        {"type": "default", "rope_theta": 250000, "factor": 1.0},
        {"rope_type": "linear", "factor": 1.0, "rope_theta": 250000},
        {"rope_type": "default", "rope_theta": 250000, "partial_rotary_factor": 1.0},
        {"full_attention": {"rope_type": "default", "rope_theta": 250000}},
    ],
)
def test_the_base_may_stand_with_its_scaling(family, key, rope):
    assert spec_of(family, **{"rope_theta": ..., key: rope}).rope_theta == 250000.0
    assert spec_of(family, **{"rope_theta": None, key: rope}).rope_theta == 250000.0
    refused(
        family,
        f"{key} must have the rope_theta of the other keys = 5.0, got",
        **{"rope_theta": 5.0, key: rope},
    )


@pytest.mark.parametrize("family", BASES)
@pytest.mark.parametrize("key", ["rope_scaling", "rope_parameters"])
@pytest.mark.parametrize("rope", [None, {}, {"rope_type": "default"}, {"type": "linear", "factor": 1}])
def test_settings_that_scale_nothing(family, key, rope):
    assert spec_of(family, **{key: rope}).rope_theta == BASES[family]["rope_theta"]


@pytest.mark.parametrize("family", BASES)
@pytest.mark.parametrize("key", ["rope_scaling", "rope_parameters"])
@pytest.mark.parametrize(
    "rope",
    [
        {"type": "linear", "factor": 4.0},
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 4096},
        {"rope_type": "dynamic", "factor": 2.0},
        {"rope_type": "llama3", "factor": 8.0},
        {"rope_type": "longrope", "long_factor": [1.0]},
        {"rope_type": "default", "type": "yarn"},
        {"type": "mrope", "mrope_section": [16, 24, 24]},
        {"rope_type": "default", "mrope_section": [16, 24, 24]},
        {"rope_type": "default", "partial_rotary_factor": 0.5},
        {"rope_type": "default", "factor": 2.0},
        {"factor": 2.0},
        {"rope_type": None, "factor": 2.0},
        {"rope_type": "default", "something": 1},
        {"full_attention": {"rope_type": "yarn", "factor": 2.0}},
        {"full_attention": {"rope_type": "default"}, "sliding_attention": {"rope_type": "default"}},
        "linear",
        2.0,
        True,
        [1],
    ],
)
def test_scaled_positions_are_refused(family, key, rope):
    refused(family, f"config.json: {key} must be null or of type 'default'", **{key: rope})


def test_the_base_changes_the_logits(tmp_path):
    """A LLaDA folder whose base stands in rope_parameters decodes like one with rope_theta."""
    plain_models.write_llada(tmp_path, rope_theta=500000.0)
    ids = torch.arange(20)
    expected = blockbatch.load_model(tmp_path, device="cpu").logits(ids)
    edit_config(tmp_path, rope_theta=..., rope_parameters={"rope_theta": 500000.0})
    assert torch.equal(blockbatch.load_model(tmp_path, device="cpu").logits(ids), expected)
    edit_config(tmp_path, rope_parameters={"rope_theta": 10000.0})
    assert not torch.equal(blockbatch.load_model(tmp_path, device="cpu").logits(ids), expected)


# Other keys


@pytest.mark.parametrize("family", BASES)
@pytest.mark.parametrize(
    "key, value",
    [
        ("partial_rotary_factor", 0.5), ("rotary_pct", 0.25), ("rotary_dim", 64), ("use_mrope", True),
        ("rope_interleaved", True), ("rope_scaling_factor", 2.0), ("no_rope_layers", [0, 1]),
        ("rope_type", "yarn"),
        ("position_embedding_type", "learned"), ("rotary_base", 5.0), ("is_causal", True),
        ("is_causal", "yes"),
        ("is_causal", 1), ("causal", True), ("is_decoder", True), ("use_bidirectional_attention", False),
        ("attention_chunk_size", 128), ("use_sliding_window", True), ("layer_types", ["sliding_attention"]),
        ("layer_types", "full_attention"), ("block_size", 32), ("bd_size", 32), ("block_length", 4),
        ("canvas_length", 256), ("attn_logit_softcapping", 50.0), ("final_logit_softcapping", 30.0),
        ("query_pre_attn_scalar", 256), ("attention_multiplier", 1.0), ("logit_scale", 0.5),
        ("residual_multiplier", 0.2), ("embedding_multiplier", 12.0), ("use_qk_norm", True),
        ("qk_layernorm", True), ("norm_type", "layernorm"), ("norm_eps", 1e-3), ("mlp_bias", True),
        ("use_bias", True), ("hidden_activation", "gelu"), ("num_experts", 64), ("n_routed_experts", 8),
        ("moe_intermediate_size", 1024), ("num_nextn_predict_layers", 1), ("num_loops", 2),
        ("quantization_config", {"quant_method": "awq"}), ("quantization", {"bits": 4, "group_size": 64}),
        ("quantization_config", {"quant_method": "bitsandbytes", "load_in_4bit": True}),
        ("load_in_8bit", True), ("vision_config", {"hidden_size": 64}), ("mm_vision_tower", "siglip"),
        ("image_token_id", 7), ("codebook_size", 8192), ("new_vocab_size", 134656),
        ("pruned_heads", {"0": [1]}),
        ("expand_token_id", 151667), ("suppress_tokens", [5]), ("time_conditioning", True),
        ("a_new_attention_kind", "sparse"), ("useScaledNorm", True), ("head_dim", 96),
    ],
)  # fmt: skip
def test_what_the_forward_pass_does_not_do_is_refused_by_name(family, key, value):
    refused(family, f"config.json: {key} must ", **{key: value})


@pytest.mark.parametrize("family", BASES)
@pytest.mark.parametrize(
    "key, value",
    [
        ("partial_rotary_factor", 1.0), ("partial_rotary_factor", 1), ("rotary_dim", 128),
        ("use_mrope", False),
        ("is_causal", False), ("is_causal", None), ("use_bidirectional_attention", True),
        ("block_size", None),
        ("bd_size", 0), ("layer_types", ["full_attention"] * 4), ("query_pre_attn_scalar", 128),
        ("quantization_config", None), ("quantization_config", {}),
        ("quantization_config", {"quant_method": "bitsandbytes", "_load_in_4bit": False}),
        ("use_qk_norm", False), ("num_experts", 0), ("num_experts", None), ("norm_type", "rmsnorm"),
        ("mlp_bias", False), ("head_dim", 128), ("head_dim", None), ("architectures", None),
        ("expand_token_id", None), ("suppress_tokens", []), ("logit_scale", 1.0), ("pruned_heads", {}),
        ("dtype", "bfloat16"), ("_attn_implementation", "sdpa"), ("hidden_dropout", 0.1),
        ("temperature", 0.2),
        ("initializer_factor", 2.0), ("router_aux_loss_coef", 0.001), ("unsloth_version", "2025.1"),
        ("id2label", {"0": "x"}), ("_name_or_path", "a/b"), ("notes", "trained on attention heads"),
        ("gradient_checkpointing", True), ("attention_dropout", 0.1), ("tie_encoder_decoder", True),
    ],
)  # fmt: skip
def test_values_that_change_nothing_pass(family, key, value):
    assert spec_of(family, **{key: value}) == spec_of(family)


@pytest.mark.parametrize(
    "key, value",
    [
        ("hidden_size", 4096), ("num_attention_heads", 32), ("num_hidden_layers", 32),
        ("num_key_value_heads", 32),
        ("intermediate_size", 12288), ("rotary_base", 500000.0), ("layer_norm_eps", 1e-5),
        ("hidden_act", "silu"), ("attention_bias", False), ("use_sliding_window", False),
        ("shift_logits", False), ("max_position_embeddings", 16384), ("tie_word_embeddings", True),
    ],
)  # fmt: skip
def test_second_names_of_llada_s_keys(key, value):
    """`tie_word_embeddings` is not one of them: the published code follows `weight_tying` alone."""
    assert spec_of("llada", **{key: value}) == spec_of("llada")
    if key in config_keys._LLADA_SAME:
        refused(
            "llada", f"{key} must be null or that of {config_keys._LLADA_SAME[key]} = ", **{key: value / 2}
        )


def test_sizes_under_other_names_are_missing():
    refused("llada", "config.json: d_model is missing", d_model=..., hidden_size=4096)
    refused(
        "llada",
        "layer_norm_eps must be null or that of rms_norm_eps = None",
        rms_norm_eps=...,
        layer_norm_eps=1,
    )


def test_llada_s_sizes_that_follow_from_others():
    assert spec_of("llada", n_kv_heads=None, num_key_value_heads=32).num_kv_heads == 32
    assert (
        spec_of("llada", mlp_hidden_size=None, mlp_ratio=3, intermediate_size=12288).intermediate_size
        == 12288
    )
    refused("llada", "num_key_value_heads must be null or that of n_kv_heads = 32, got 8", n_kv_heads=None,
            num_key_value_heads=8)  # fmt: skip


@pytest.mark.parametrize(
    "family, changes, message",
    [
        ("llada", dict(hidden_act="gelu"), "hidden_act must be null or 'silu'"),
        ("llada", dict(attention_bias=True), "attention_bias must be null or False"),
        ("llada", dict(sliding_window=4096), "sliding_window must be null"),
        ("llada", dict(shift_logits=True), "shift_logits must be null or False"),
        ("dream", dict(right_shift_logits=False), "right_shift_logits must be null or True"),
        ("dream", dict(alibi=True), "alibi must be null or False"),
        ("dream", dict(clip_qkv=8.0), "clip_qkv must be null"),
        ("dream", dict(scale_logits=True), "scale_logits must be null or False"),
        (
            "dream",
            dict(weight_tying=True),
            "weight_tying must be null or that of tie_word_embeddings = False",
        ),
        ("dream", dict(block_type="parallel"), "block_type must be null, false or 0"),
    ],
)
def test_keys_of_one_family(family, changes, message):
    refused(family, message, **changes)


@pytest.mark.parametrize("value", [float("inf"), float("nan"), -1.0])
@pytest.mark.parametrize("key", ["rope_theta", "rms_norm_eps"])
def test_numbers_out_of_range(key, value):
    refused("llada", f"{key} must be above 0", **{key: value})


def test_no_key_stands_in_the_table_twice():
    keys = [key for names, _, _ in config_keys._TABLE for key in names.split()]
    assert len(keys) == len(set(keys))


@pytest.mark.parametrize(
    "model_type, key, size", [("sdar", "block_size", 4), ("Fast_dLLM_Qwen", "bd_size", 32)]
)
def test_families_that_decode_in_blocks_have_a_block_size(model_type, key, size):
    config = {"hidden_size": 64, "num_attention_heads": 4, "hidden_act": "silu", "rope_theta": 1e6, key: size}
    assert config_keys.checked(config, model_type) == config
    for other in ("llada", "Dream"):
        with pytest.raises(CheckpointError, match=f"{key} must be null or False or 0"):
            config_keys.checked(config, other)
    with pytest.raises(CheckpointError, match="quantization_config must be"):
        config_keys.checked({**config, "quantization_config": {"quant_method": "awq"}}, model_type)


# generation_config.json


@pytest.mark.parametrize(
    "key, value, message",
    [
        ("expand_token_id", 37, "expand_token_id must be null or absent .DreamOn's canvas grows"),
        ("expand_token_id", 0, "expand_token_id must be null or absent"),
        ("delete_token_id", 5, "delete_token_id must be null or absent"),
        ("pad_delete_to_right", True, "pad_delete_to_right must be null or absent"),
        ("suppress_tokens", [1], "suppress_tokens must be null or absent .a decode here bans"),
        ("bad_words_ids", [[1]], "bad_words_ids must be null or absent"),
        ("forced_eos_token_id", 3, "forced_eos_token_id must be null or absent"),
        ("stop_strings", ["END"], "stop_strings must be null or absent .*`stop`"),
        ("image_token_id", 3, "image_token_id must be null or absent"),
        ("mask_token_id", 5, "mask_token_id must be that of config.json = 39, got 5"),
    ],
)
@pytest.mark.parametrize("write", [plain_models.write_llada, plain_models.write_dream])
def test_unsupported_generation_settings(tmp_path, write, key, value, message):
    write(tmp_path)
    (tmp_path / "generation_config.json").write_text(json.dumps({key: value}))
    with pytest.raises(CheckpointError, match=f"generation_config.json: {message}"):
        read_config(tmp_path)
    with pytest.raises(CheckpointError, match=f"generation_config.json: {message}"):
        blockbatch.load_model(tmp_path, device="cpu")


def test_settings_of_sampling_are_the_caller_s(tmp_path):
    plain_models.write_dream(tmp_path)
    settings = {
        "alg": "entropy", "alg_temp": 0.1, "bos_token_id": 1, "eos_token_id": [2, 3], "pad_token_id": 2,
        "mask_token_id": 39, "temperature": 0.2, "top_p": 0.95, "repetition_penalty": 1.05, "steps": 512,
        "do_sample": True, "max_length": 20, "suppress_tokens": None, "bad_words_ids": [],
        "expand_token_id": None,
        "transformers_version": "4.46.2", "_from_model_config": True,
    }  # fmt: skip
    (tmp_path / "generation_config.json").write_text(json.dumps(settings))
    assert read_spec(read_config(tmp_path)).family == "dream"


@pytest.mark.parametrize("content", ["{", "[1]"])
def test_broken_generation_config(tmp_path, content):
    plain_models.write_llada(tmp_path)
    (tmp_path / "generation_config.json").write_text(content)
    with pytest.raises(CheckpointError, match="generation_config.json: expected"):
        read_config(tmp_path)
