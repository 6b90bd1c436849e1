"""Reading model folders: what config.json means and what the weights become."""

import os
from pathlib import Path

import pytest
import torch

import plain_models
from blockbatch.models import dream, llada
from blockbatch.models.checkpoint import CheckpointError, read_config, read_spec
from blockbatch.models.weights import allocate
from checkpoint_files import edit_config, edit_tensors, load, run_python

CONFORMANCE = Path(__file__).parent / "data" / "conformance"
LLADA_NAMES = {
    "q": "q_proj", "k": "k_proj", "v": "v_proj", "out": "attn_out", "gate": "ff_proj", "up": "up_proj",
    "down": "ff_out", "input_norm": "attn_norm", "post_norm": "ff_norm",
}  # fmt: skip
DREAM_NAMES = {
    "q": "self_attn.q_proj", "k": "self_attn.k_proj", "v": "self_attn.v_proj", "out": "self_attn.o_proj",
    "gate": "mlp.gate_proj", "up": "mlp.up_proj", "down": "mlp.down_proj", "input_norm": "input_layernorm",
    "post_norm": "post_attention_layernorm",
}  # fmt: skip


def check_weights(folder, dtype=torch.float32):
    """Compares every fused parameter with the plain tensors of the folder."""
    spec, weights = load(folder, dtype)
    plain = {name: tensor.to(dtype) for name, tensor in plain_models.read_weights(folder).items()}
    is_llada = spec.family == "llada"
    outer = ("model.transformer.wte", "model.transformer.ln_f", "model.transformer.ff_out")
    if not is_llada:
        outer = ("model.embed_tokens", "model.norm", "lm_head")
    embedding, final_norm = plain[outer[0] + ".weight"], plain[outer[1] + ".weight"]
    head = embedding if spec.tie_embeddings else plain[outer[2] + ".weight"]
    assert torch.equal(weights.embedding, embedding)
    assert torch.equal(weights.final_norm, final_norm)
    assert torch.equal(weights.lm_head, head[: spec.vocab_size])
    assert weights.lm_head.dtype == weights.embedding.dtype == dtype
    names = LLADA_NAMES if is_llada else DREAM_NAMES
    for index, layer in enumerate(weights.layers):
        prefix = f"model.transformer.blocks.{index}." if is_llada else f"model.layers.{index}."
        part = {role: plain[f"{prefix}{name}.weight"] for role, name in names.items()}
        assert torch.equal(layer.qkv_weight, torch.cat([part["q"], part["k"], part["v"]]))
        assert torch.equal(layer.gate_up_weight, torch.cat([part["gate"], part["up"]]))
        assert torch.equal(layer.out_weight, part["out"])
        assert torch.equal(layer.down_weight, part["down"])
        assert torch.equal(layer.input_norm, part["input_norm"])
        assert torch.equal(layer.post_norm, part["post_norm"])
        if spec.qkv_bias:
            biases = [plain[f"{prefix}{names[role]}.bias"] for role in "qkv"]
            assert torch.equal(layer.qkv_bias, torch.cat(biases))
        else:
            assert layer.qkv_bias is None
    return spec, weights


@pytest.fixture
def folder(tmp_path):
    plain_models.write_llada(tmp_path / "model")
    return tmp_path / "model"


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("write", [plain_models.write_llada, plain_models.write_dream])
def test_weights_of_every_dtype_and_sharding(tmp_path, write, stored, shards):
    write(tmp_path, dtype=stored, shards=shards)
    check_weights(tmp_path)
    check_weights(tmp_path, torch.bfloat16)


@pytest.mark.parametrize("n_kv_heads, expected", [(2, 2), (1, 1), (None, 4), ("missing", 4)])
def test_llada_kv_heads(tmp_path, n_kv_heads, expected):
    plain_models.write_llada(tmp_path, n_kv_heads=n_kv_heads)
    assert check_weights(tmp_path)[0].num_kv_heads == expected


@pytest.mark.parametrize("num_key_value_heads, expected", [(2, 2), (None, 4), ("missing", 4)])
def test_dream_kv_heads(tmp_path, num_key_value_heads, expected):
    plain_models.write_dream(tmp_path, num_key_value_heads=num_key_value_heads)
    assert check_weights(tmp_path)[0].num_kv_heads == expected


def test_multi_query_attention_stands_for_the_number_of_kv_heads(tmp_path):
    plain_models.write_llada(tmp_path, n_kv_heads=1)
    edit_config(tmp_path, n_kv_heads=None, multi_query_attention=True)
    assert check_weights(tmp_path)[0].num_kv_heads == 1
    edit_config(tmp_path, n_kv_heads=2)
    with pytest.raises(CheckpointError, match="n_kv_heads must be 1 .* got 2"):
        load(tmp_path)


@pytest.mark.parametrize("tied", [False, True])
def test_rows_beyond_the_vocabulary_are_no_part_of_the_head(tmp_path, tied):
    plain_models.write_llada(tmp_path, vocab_size=40, embedding_size=64, weight_tying=tied)
    spec, weights = check_weights(tmp_path)
    assert (spec.vocab_size, spec.embedding_size) == (40, 64)
    assert weights.embedding.shape == (64, 32) and weights.lm_head.shape == (40, 32)


@pytest.mark.parametrize("size", [None, ...])
def test_embedding_size_defaults_to_the_vocabulary(tmp_path, size):
    plain_models.write_llada(tmp_path)
    edit_config(tmp_path, embedding_size=size)
    assert check_weights(tmp_path)[0].embedding_size == 40


@pytest.mark.parametrize(
    "write, option",
    [(plain_models.write_llada, "weight_tying"), (plain_models.write_dream, "tie_word_embeddings")],
)
def test_tied_head_is_a_view_of_the_embedding(tmp_path, write, option):
    write(tmp_path, **{option: True})
    spec, weights = check_weights(tmp_path)
    assert spec.tie_embeddings
    assert weights.lm_head.data_ptr() == weights.embedding.data_ptr()


def test_llada_with_qkv_bias(folder):
    biases = {
        f"model__transformer__blocks__{layer}__{name}_proj__bias": torch.randn(32)
        for layer in range(2)
        for name in "qkv"
    }
    edit_tensors(folder, **biases)
    with pytest.raises(CheckpointError, match="superfluous.*q_proj.bias"):
        load(folder)
    edit_config(folder, include_qkv_bias=True)
    assert check_weights(folder)[0].qkv_bias


def test_mlp_size_defaults_to_the_ratio(tmp_path):
    plain_models.write_llada(tmp_path, d_model=32, mlp_hidden_size=96)
    edit_config(tmp_path, mlp_hidden_size=None, mlp_ratio=3)
    assert check_weights(tmp_path)[0].intermediate_size == 96


@pytest.mark.parametrize("eos, expected", [(7, (7,)), ([7, 9, 7], (7, 9)), (None, ()), (..., ())])
def test_eos_is_a_set_of_ids(folder, eos, expected):
    edit_config(folder, eos_token_id=eos)
    assert read_spec(read_config(folder)).eos_token_ids == expected


def test_published_configurations():
    """LLaDA-8B and Dream-7B as their config.json files have it."""
    spec = read_spec(
        {
            "model_type": "llada",
            "activation_type": "silu",
            "alibi": False,
            "attention_layer_norm": False,
            "bias_for_layer_norm": False,
            "block_group_size": 1,
            "block_type": "llama",
            "d_model": 4096,
            "embedding_size": 126464,
            "eos_token_id": 126081,
            "include_bias": False,
            "include_qkv_bias": False,
            "input_emb_norm": False,
            "layer_norm_type": "rms",
            "layer_norm_with_affine": True,
            "mask_token_id": 126336,
            "max_sequence_length": 4096,
            "mlp_hidden_size": 12288,
            "mlp_ratio": 4,
            "multi_query_attention": None,
            "n_heads": 32,
            "n_kv_heads": 32,
            "n_layers": 32,
            "rms_norm_eps": 1e-05,
            "rope": True,
            "rope_full_precision": True,
            "rope_theta": 500000.0,
            "scale_logits": False,
            "vocab_size": 126464,
            "weight_tying": False,
        }  # fmt: skip
    )
    assert (spec.family, spec.num_layers, spec.head_dim, spec.max_length) == ("llada", 32, 128, 4096)
    assert (spec.prediction_offset, spec.suppress_mask, spec.leap_threshold) == (0, False, 0.75)
    assert (spec.mask_token_id, spec.eos_token_ids, spec.rope_theta) == (126336, (126081,), 5e5)
    assert not spec.qkv_bias and not spec.tie_embeddings
    assert len(llada.tensor_map(spec)) == 32 * 9 + 3
    spec = read_spec(
        {
            "model_type": "Dream",
            "hidden_act": "silu",
            "hidden_size": 3584,
            "intermediate_size": 18944,
            "mask_token_id": 151666,
            "eos_token_id": 151643,
            "max_position_embeddings": 131072,
            "num_attention_heads": 28,
            "num_hidden_layers": 28,
            "num_key_value_heads": 4,
            "rms_norm_eps": 1e-06,
            "rope_scaling": None,
            "rope_theta": 1000000.0,
            "sliding_window": None,
            "tie_word_embeddings": False,
            "use_sliding_window": False,
            "vocab_size": 152064,
        }  # fmt: skip
    )
    assert (spec.family, spec.num_layers, spec.head_dim, spec.num_kv_heads) == ("dream", 28, 128, 4)
    assert (spec.prediction_offset, spec.suppress_mask, spec.leap_threshold) == (1, True, 0.8)
    assert spec.qkv_bias and spec.rope_theta == 1e6 and spec.rms_norm_eps == 1e-6
    assert len(dream.tensor_map(spec)) == 28 * 12 + 3


@pytest.mark.parametrize(
    "write, family", [(plain_models.write_llada, llada), (plain_models.write_dream, dream)]
)
def test_every_weight_is_written_once(tmp_path, write, family):
    write(tmp_path)
    spec = read_spec(read_config(tmp_path))
    weights = allocate(spec, "cpu", torch.float32)
    parameters = [weights.embedding, weights.final_norm, weights.lm_head]
    for layer in weights.layers:
        parameters += [tensor for tensor in vars(layer).values() if tensor is not None]
    for parameter in parameters:
        parameter.zero_()
    for place in family.tensor_map(spec).values():
        place.rows(weights).add_(1)
    assert all((parameter == 1).all() for parameter in parameters)


def test_conformance_folder():
    spec, _ = check_weights(CONFORMANCE)
    assert (spec.mask_token_id, spec.eos_token_ids, spec.max_length) == (159, (158,), 512)


def test_large_tensors_are_read_in_pieces(tmp_path, monkeypatch):
    monkeypatch.setattr("blockbatch.models.checkpoint.STAGING_BYTES", 100)
    plain_models.write_dream(tmp_path, dtype=torch.bfloat16)
    check_weights(tmp_path)


def test_known_buffers_are_ignored(folder):
    edit_tensors(folder, model__transformer__blocks__0__rotary_emb__inv_freq=torch.ones(4))
    check_weights(folder)


def test_a_single_file_of_any_name(folder):
    (folder / "model.safetensors").rename(folder / "weights.safetensors")
    load(folder)


MEASURE = """
import re, sys, torch
from blockbatch.models.checkpoint import load_weights, read_config, read_spec

def memory(field):
    return int(re.search(field + r":\\s+(\\d+) kB", open("/proc/self/status").read())[1]) * 1024

folder, warm_up = sys.argv[1:]
for path in (warm_up, folder):  # the first one pays for what torch allocates once
    spec = read_spec(read_config(path))
    open("/proc/self/clear_refs", "w").write("5")  # the peak starts again from here
    before = memory("VmRSS")
    weights = load_weights(path, spec, "cpu", torch.float32)
print(memory("VmHWM") - before)
"""


@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="needs Linux's /proc")
def test_peak_memory_is_the_weights_and_a_fraction_of_a_shard(tmp_path):
    plain_models.write_llada(tmp_path / "small")
    plain_models.write_llada(
        tmp_path / "large", d_model=512, n_heads=8, n_kv_heads=8, n_layers=8, mlp_hidden_size=1024,
        vocab_size=4096, dtype=torch.bfloat16, shards=4,
    )  # fmt: skip
    shards = [path.stat().st_size for path in (tmp_path / "large").glob("*.safetensors")]
    weights = 2 * sum(shards)  # bf16 in the files, float32 in memory
    extra = int(run_python(MEASURE, str(tmp_path / "large"), str(tmp_path / "small"))) - weights
    # A whole file or state dict in memory beside the weights would take sum(shards), four times the largest.
    assert extra < 1.3 * max(shards)
