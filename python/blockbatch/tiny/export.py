"""Write the trained weights as a HuggingFace LLaDA folder: config, bf16 safetensors shards, tokenizer."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer
from torch import Tensor

from blockbatch.tiny.tokenizer import EOS, MASK, TOKENIZER_FILE, tokenizer_config
from blockbatch.tiny.train_model import ModelShape, TrainModel

_SHARD_BYTES = 14 << 20


def model_config(shape: ModelShape, tokenizer: Tokenizer) -> dict[str, Any]:
    """config.json of a LLaDA model of this shape."""
    eos = tokenizer.token_to_id(EOS)
    return {
        "architectures": ["LLaDAModelLM"],
        "model_type": "llada",
        "d_model": shape.d_model,
        "n_heads": shape.n_heads,
        "n_kv_heads": shape.n_heads,
        "n_layers": shape.n_layers,
        "mlp_hidden_size": shape.mlp_hidden,
        "vocab_size": shape.vocabulary,
        "embedding_size": shape.vocabulary,
        "max_sequence_length": shape.max_length,
        "rope": True,
        "rope_theta": shape.rope_theta,
        "block_type": "llama",
        "activation_type": "silu",
        "layer_norm_type": "rms",
        "rms_norm_eps": 1e-05,
        "include_bias": False,
        "include_qkv_bias": False,
        "bias_for_layer_norm": False,
        "weight_tying": False,
        "flash_attention": False,
        "alibi": False,
        "mask_token_id": tokenizer.token_to_id(MASK),
        "eos_token_id": eos,
        "pad_token_id": eos,
        "attention_dropout": 0.0,
        "residual_dropout": 0.0,
        "embedding_dropout": 0.0,
        "input_emb_norm": False,
        "scale_logits": False,
        "attention_layer_norm": False,
        "init_device": "cpu",
        "rope_full_precision": True,
        "multi_query_attention": None,
        "torch_dtype": "bfloat16",
    }


def named_weights(model: TrainModel) -> dict[str, Tensor]:
    """LLaDA's tensor names -> bf16 tensors on the CPU."""
    weights = {"model.transformer.wte.weight": model.embedding}
    for layer in range(model.shape.n_layers):
        for name in ("attn_norm", "ff_norm", *model.matrices):
            weights[f"model.transformer.blocks.{layer}.{name}.weight"] = getattr(model, name)[layer]
    weights["model.transformer.ln_f.weight"] = model.final_norm
    weights["model.transformer.ff_out.weight"] = model.head
    return {name: tensor.detach().to("cpu", torch.bfloat16).contiguous() for name, tensor in weights.items()}


def _shards(weights: dict[str, Tensor]) -> list[dict[str, Tensor]]:
    shards: list[dict[str, Tensor]] = [{}]
    filled = 0
    for name, tensor in weights.items():
        if filled and filled + tensor.nbytes > _SHARD_BYTES:
            shards.append({})
            filled = 0
        shards[-1][name] = tensor
        filled += tensor.nbytes
    return shards


def export(model: TrainModel, tokenizer: Tokenizer, folder: Path, record: dict[str, Any]) -> None:
    """Write the checkpoint and `record` (training.json) into `folder`, replacing files of the same names."""
    configs = {
        "config.json": model_config(model.shape, tokenizer),
        "tokenizer_config.json": tokenizer_config(),
        "training.json": record,
    }
    write_folder(folder, named_weights(model), configs)


def write_folder(folder: Path, weights: dict[str, Tensor], configs: dict[str, dict[str, Any]]) -> None:
    """Write tensors as safetensors, an index where they fill several files, the configs and the tokenizer."""
    folder.mkdir(parents=True, exist_ok=True)
    shards = _shards(weights)
    places = {}
    for number, shard in enumerate(shards, start=1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        file = file if len(shards) > 1 else "model.safetensors"
        save_file(shard, folder / file, metadata={"format": "pt"})
        places.update(dict.fromkeys(shard, file))
    size = sum(tensor.nbytes for tensor in weights.values())
    if len(shards) > 1:
        _write(
            folder / "model.safetensors.index.json", {"metadata": {"total_size": size}, "weight_map": places}
        )
    for name, config in configs.items():
        _write(folder / name, config)
    if TOKENIZER_FILE.resolve() != (folder / "tokenizer.json").resolve():
        shutil.copyfile(TOKENIZER_FILE, folder / "tokenizer.json")


def _write(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=1) + "\n")
