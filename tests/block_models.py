"""Random checkpoints of block-causal families in HuggingFace's layout."""

import json

import torch
from safetensors.torch import save_file

VOCABULARY, MASK, STOP = 96, 94, 95


def write(folder, family, seed=0, block_size=16, **changes):
    """A model of two layers whose confidences lie on both sides of the usual thresholds.

    MASK, never predicted, is the second last of its ids, the end of a text the last.
    """
    vocabulary = changes.get("vocab_size", VOCABULARY)
    generator = torch.Generator().manual_seed(seed)
    sdar = family == "sdar"
    config = {
        "model_type": "sdar" if sdar else "Fast_dLLM_Qwen",
        "hidden_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": 2,
        "intermediate_size": 96, "vocab_size": vocabulary, "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-6, "rope_theta": 10000.0, "tie_word_embeddings": False,
        "mask_token_id": vocabulary - 2, "eos_token_id": vocabulary - 1, "hidden_act": "silu",
        **({"head_dim": 16, "block_size": block_size} if sdar else {"bd_size": block_size}),
        **changes,
    }  # fmt: skip
    hidden, inner = config["hidden_size"], config["intermediate_size"]
    head_dim = config.get("head_dim", hidden // config["num_attention_heads"])
    q, kv = (config[name] * head_dim for name in ("num_attention_heads", "num_key_value_heads"))

    def matrix(rows, columns, scale=1.0):
        return torch.randn(rows, columns, generator=generator) * scale * columns**-0.5

    def near_one(size):
        return 1 + 0.1 * torch.randn(size, generator=generator)

    tensors = {
        "model.embed_tokens.weight": torch.randn(vocabulary, hidden, generator=generator),
        "model.norm.weight": near_one(hidden),
    }
    if not config["tie_word_embeddings"]:
        tensors["lm_head.weight"] = matrix(vocabulary, hidden, 5.0)
    for layer in range(config["num_hidden_layers"]):
        name = f"model.layers.{layer}."
        sizes = {"q": (q, hidden), "k": (kv, hidden), "v": (kv, hidden), "o": (hidden, q)}
        tensors |= {f"{name}self_attn.{part}_proj.weight": matrix(*size) for part, size in sizes.items()}
        if sdar:
            tensors |= {f"{name}self_attn.{part}_norm.weight": near_one(head_dim) for part in "qk"}
        else:
            tensors |= {
                f"{name}self_attn.{part}_proj.bias": 0.1 * torch.randn(sizes[part][0], generator=generator)
                for part in "qkv"
            }
        tensors |= {f"{name}mlp.{part}_proj.weight": matrix(inner, hidden) for part in ("gate", "up")}
        tensors[f"{name}mlp.down_proj.weight"] = matrix(hidden, inner)
        for part in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"{name}{part}.weight"] = near_one(hidden)
    head = tensors.get("lm_head.weight", tensors["model.embed_tokens.weight"])
    head[vocabulary - 2] = 0.0
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    save_file(tensors, folder / "model.safetensors")
    return folder


def prompt(length, seed):
    generator = torch.Generator().manual_seed(1000 + seed)
    return torch.randint(0, MASK, (length,), generator=generator).tolist()
