"""Write the block-causal model as a HuggingFace SDAR folder: configs, bf16 safetensors, tokenizer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from torch import Tensor

from blockbatch.tiny.block_model import BlockModelShape, BlockTrainModel
from blockbatch.tiny.export import write_folder
from blockbatch.tiny.tokenizer import EOS, MASK, tokenizer_config

# By the trainer's names; those of Qwen3.
_LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "q_proj": "self_attn.q_proj",
    "k_proj": "self_attn.k_proj",
    "v_proj": "self_attn.v_proj",
    "q_norm": "self_attn.q_norm",
    "k_norm": "self_attn.k_norm",
    "attn_out": "self_attn.o_proj",
    "ff_norm": "post_attention_layernorm",
    "ff_proj": "mlp.gate_proj",
    "up_proj": "mlp.up_proj",
    "ff_out": "mlp.down_proj",
}
# RoPE goes on behind it, but nothing longer than `block_corpus.LONGEST` was trained.
_MAX_POSITIONS = 32768


def block_model_config(shape: BlockModelShape, tokenizer: Tokenizer) -> dict[str, Any]:
    """config.json of an SDAR model of this shape."""
    eos = tokenizer.token_to_id(EOS)
    return {
        "architectures": ["SDARForCausalLM"],
        "model_type": "sdar",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "block_size": shape.block_size,
        "bos_token_id": eos,
        "eos_token_id": eos,
        "pad_token_id": eos,
        "mask_token_id": tokenizer.token_to_id(MASK),
        "head_dim": shape.head_dim,
        "hidden_act": "silu",
        "hidden_size": shape.d_model,
        "initializer_range": 0.02,
        "intermediate_size": shape.mlp_hidden,
        "max_position_embeddings": _MAX_POSITIONS,
        "max_window_layers": shape.n_layers,
        "num_attention_heads": shape.n_heads,
        "num_hidden_layers": shape.n_layers,
        "num_key_value_heads": shape.n_kv_heads,
        "rms_norm_eps": 1e-05,
        "rope_scaling": None,
        "rope_theta": shape.rope_theta,
        "sliding_window": None,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "use_cache": True,
        "use_sliding_window": False,
        "vocab_size": shape.vocabulary,
    }


def named_block_weights(model: BlockTrainModel) -> dict[str, Tensor]:
    """SDAR's tensor names -> bf16 tensors on the CPU."""
    weights = {"model.embed_tokens.weight": model.embedding}
    for layer in range(model.shape.n_layers):
        for name, stored in _LAYER_NAMES.items():
            weights[f"model.layers.{layer}.{stored}.weight"] = getattr(model, name)[layer]
    weights["model.norm.weight"] = model.final_norm
    weights["lm_head.weight"] = model.head
    return {name: tensor.detach().to("cpu", torch.bfloat16).contiguous() for name, tensor in weights.items()}


def export_block(model: BlockTrainModel, tokenizer: Tokenizer, folder: Path, record: dict[str, Any]) -> None:
    """Write the checkpoint and `record` (training.json) into `folder`, replacing files of the same names."""
    eos = tokenizer.token_to_id(EOS)
    configs = {
        "config.json": block_model_config(model.shape, tokenizer),
        "generation_config.json": {"eos_token_id": [eos], "pad_token_id": eos},
        "tokenizer_config.json": {**tokenizer_config(), "model_max_length": _MAX_POSITIONS},
        "training.json": record,
    }
    write_folder(folder, named_block_weights(model), configs)
