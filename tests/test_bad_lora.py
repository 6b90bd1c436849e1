"""Adapters that do not fit, or ask for more than a plain LoRA: one clear error before any work."""

import math

import pytest
import torch
from safetensors.torch import save_file

import blockbatch
import plain_models
from blockbatch.models.checkpoint import CheckpointError
from lora_files import edit, write_adapter, write_model

BAD_SETTINGS = [
    ({"peft_type": "LOHA"}, "peft_type: expected 'LORA', got 'LOHA'"),
    ({"peft_type": None}, "peft_type: expected 'LORA', got None"),
    ({"use_dora": True}, "use_dora: expected it to be off, got True"),
    ({"bias": "lora_only"}, "bias: expected it to be off, got 'lora_only'"),
    ({"lora_bias": True}, "lora_bias: expected it to be off, got True"),
    ({"modules_to_save": ["lm_head"]}, "modules_to_save: expected it to be off"),
    ({"fan_in_fan_out": True}, "fan_in_fan_out: expected it to be off"),
    ({"layers_to_transform": [0]}, "layers_to_transform: expected it to be off"),
    ({"layers_to_transform": 0}, "layers_to_transform: expected it to be off, got 0"),
    ({"trainable_token_indices": [1]}, "trainable_token_indices: expected it to be off"),
    ({"layer_replication": [[0, 2]]}, "layer_replication: expected it to be off"),
    ({"target_parameters": ["x"]}, "target_parameters: expected it to be off"),
    ({"alora_invocation_tokens": [5]}, "alora_invocation_tokens: expected it to be off"),
    ({"something_new": 1}, "something_new: expected it to be off, got 1"),
    ({"init_lora_weights": "pissa"}, "init_lora_weights: expected true, .* got 'pissa'"),
    ({"init_lora_weights": "olora"}, "init_lora_weights: expected true, .* got 'olora'"),
    ({"init_lora_weights": 1}, "init_lora_weights: expected true, .* got 1"),
    ({"r": 0}, "r: expected an integer of at least 1, got 0"),
    ({"r": True}, "r: expected an integer of at least 1, got True"),
    ({"r": None}, "r: expected an integer of at least 1, got None"),
    ({"lora_alpha": "8"}, "lora_alpha: expected a number, got '8'"),
    ({"use_rslora": 1}, "use_rslora: expected true or false, got 1"),
    ({"rank_pattern": [4]}, r"rank_pattern: expected an object, got \[4\]"),
    ({"rank_pattern": {"q_proj": 0}}, r"rank_pattern\['q_proj'\]: expected an integer of at least 1"),
    ({"alpha_pattern": {"(": 1}}, r"alpha_pattern: expected a regular expression, got '\('"),
    ({"target_modules": None}, "target_modules: expected names of modules or a regular expression, got None"),
    ({"target_modules": "("}, "target_modules: expected a regular expression"),
    ({"rank_pattern": {"q_proj": 3}}, r"q_proj.*expected shape \[3, \d+\], got \[4, \d+\].*'owner/base'"),
    ({"target_modules": ["q_proj", "v_proj"]}, "every module .* got none of .*v_proj and 1 more"),
    ({"target_modules": ["v_proj"]}, "target_modules names, got some of .*q_proj"),
]  # fmt: skip


@pytest.mark.parametrize("changes, message", BAD_SETTINGS, ids=[str(changes) for changes, _ in BAD_SETTINGS])
def test_settings_that_are_refused(tmp_path, monkeypatch, changes, message):
    base = write_model(tmp_path / "base", "dream")
    write_adapter(tmp_path / "adapter", base, ("q_proj",))
    edit(tmp_path / "adapter", **changes)
    check_refused(monkeypatch, base, tmp_path / "adapter", message)


def check_refused(monkeypatch, base, adapter, message):
    """Before memory is taken for weights."""
    monkeypatch.setattr(
        "blockbatch.models.checkpoint.allocate", lambda *_: pytest.fail("weights were allocated")
    )
    with pytest.raises(CheckpointError, match=message):
        blockbatch.load_model(base, device="cpu", adapter=adapter)


A = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
BAD_TENSORS = [
    ({A.replace("lora_A", "lora_magnitude_vector"): (4,)}, "expected tensors of weights .*magnitude"),
    ({A.replace("layers.0", "layers.9"): (4, 4)}, "got '.*layers.9.*owner/base"),
    ({"base_model.model.transformer.h.0.c_attn.lora_A.weight": (4, 4)}, "got '.*c_attn.*owner/base"),
    ({"base_model.model.lm_head.weight": (4, 4)}, "expected tensors of weights .* got '.*lm_head.weight'"),
    ({"base_model.model.model.embed_tokens.lora_A.weight": (4, 4)}, "tensors of weights .*embed_tokens"),
    ({A.replace(".lora_A.weight", ".lora_embedding_A"): (4, 4)}, "of weights .*lora_embedding_A"),
    ({A: (4, 3)}, r"lora_A.weight': expected shape \[4, \d+\], got \[4, 3\] \(made for 'owner/base'\)"),
    ({A.replace("lora_A", "lora_B"): (3, 4)}, r"lora_B.weight': expected shape \[\d+, 4\], got \[3, 4\]"),
    ({A: None}, "expected lora_A and lora_B of model.layers.0.self_attn.q_proj, got '.*lora_B.weight' alone"),
]  # fmt: skip


@pytest.mark.parametrize("changes, message", BAD_TENSORS, ids=[str(changes) for changes, _ in BAD_TENSORS])
def test_tensors_that_are_refused(tmp_path, monkeypatch, changes, message):
    base = write_model(tmp_path / "base", "dream")
    tensors = write_adapter(tmp_path / "adapter", base, ("q_proj",))
    for name, shape in changes.items():
        tensors[name] = None if shape is None else torch.zeros(shape)
    kept = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    save_file(kept, tmp_path / "adapter" / "adapter_model.safetensors")
    check_refused(monkeypatch, base, tmp_path / "adapter", message)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_values_that_are_not_finite(tmp_path, monkeypatch, value):
    base = write_model(tmp_path / "base", "dream")
    tensors = write_adapter(tmp_path / "adapter", base, ("q_proj",))
    tensors[A][1, 2] = value
    save_file(tensors, tmp_path / "adapter" / "adapter_model.safetensors")
    check_refused(
        monkeypatch, base, tmp_path / "adapter", "lora_A.weight' .*expected finite values in float32"
    )


def test_integers_are_no_factors(tmp_path, monkeypatch):
    base = write_model(tmp_path / "base", "dream")
    tensors = write_adapter(tmp_path / "adapter", base, ("q_proj",))
    tensors[A] = tensors[A].to(torch.int8)
    save_file(tensors, tmp_path / "adapter" / "adapter_model.safetensors")
    check_refused(
        monkeypatch, base, tmp_path / "adapter", "lora_A.weight': expected dtype F32, F16, BF16, got I8"
    )


def test_a_sum_beyond_float16(tmp_path):
    base = write_model(tmp_path / "base", "dream")
    write_adapter(tmp_path / "adapter", base, ("q_proj",), lora_alpha=1e8)
    blockbatch.load_model(base, device="cpu", adapter=tmp_path / "adapter")
    with pytest.raises(CheckpointError, match="q_proj.weight' in float16 with the adapter added"):
        blockbatch.load_model(base, device="cpu", dtype="float16", adapter=tmp_path / "adapter")


def test_an_adapter_of_another_family(tmp_path, monkeypatch):
    base, other = write_model(tmp_path / "base", "dream"), write_model(tmp_path / "other", "llada")
    write_adapter(tmp_path / "adapter", other, ("q_proj",), base_model_name_or_path="GSAI-ML/LLaDA-8B-Base")
    message = r"transformer.blocks.0.q_proj.lora_A.weight' \(made for 'GSAI-ML/LLaDA-8B-Base'\)"
    check_refused(monkeypatch, base, tmp_path / "adapter", message)


def test_a_tied_head(tmp_path, monkeypatch):
    base = tmp_path / "base"
    plain_models.write_dream(base, tie_word_embeddings=True)
    write_adapter(tmp_path / "adapter", base, ())
    table = plain_models.read_weights(base)["model.embed_tokens.weight"]
    name = "base_model.model.model.embed_tokens.lora_embedding_"
    tensors = {f"{name}A": torch.ones(4, len(table)), f"{name}B": torch.ones(table.shape[1], 4)}
    save_file(tensors, tmp_path / "adapter" / "adapter_model.safetensors")
    edit(tmp_path / "adapter", target_modules=["embed_tokens"])
    check_refused(
        monkeypatch, base, tmp_path / "adapter", "no change of an embedding that is the LM head, too"
    )


def test_folders_that_are_refused(tmp_path):
    base = write_model(tmp_path / "base", "dream")
    with pytest.raises(FileNotFoundError, match="adapter: expected a folder with adapter_config.json, got"):
        blockbatch.load_model(base, device="cpu", adapter=tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match="expected an adapter's adapter_config.json, there is none"):
        blockbatch.load_model(base, device="cpu", adapter=base)
    with pytest.raises(TypeError, match="adapter: expected a folder, got 5"):
        blockbatch.load_model(base, device="cpu", adapter=5)
    write_adapter(tmp_path / "adapter", base, ("q_proj",))
    (tmp_path / "adapter" / "adapter_model.safetensors").rename(tmp_path / "adapter" / "adapter_model.bin")
    with pytest.raises(
        CheckpointError, match=r"as adapter_model.safetensors, got adapter_model.bin \(pickled"
    ):
        blockbatch.load_model(base, device="cpu", adapter=tmp_path / "adapter")
