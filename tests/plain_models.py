"""LLaDA and Dream as a dense forward in plain torch, and writers of tiny random checkpoints.

Independent of the package under test: nothing here imports it. One row at a time, one layer after the
other, no paging, no packing, no fused op; correctness by being short. Formulas: pre-norm Llama blocks
(RMSNorm, SwiGLU), rotary embedding that rotates the first half of a head with the second, non-causal
attention with grouped K/V heads.
"""

import json
import math
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file


def read_weights(folder):
    """All tensors of a checkpoint folder, from `model.safetensors` or the shards of its index."""
    folder = Path(folder)
    index = folder / "model.safetensors.index.json"
    if not index.exists():
        return load_file(folder / "model.safetensors")
    names = set(json.loads(index.read_text())["weight_map"].values())
    weights = {}
    for name in sorted(names):
        weights.update(load_file(folder / name))
    return weights


def rms_norm(x, weight, eps):
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps) * weight


def rotate(x, positions, theta):
    """Rotary embedding of x [n, heads, head_dim] at the absolute `positions` [n]."""
    half = x.shape[-1] // 2
    frequencies = 1.0 / theta ** (torch.arange(half, dtype=x.dtype) * 2 / x.shape[-1])
    angles = torch.tensor(positions, dtype=x.dtype)[:, None] * frequencies  # [n, half]
    cos, sin = angles.cos()[:, None], angles.sin()[:, None]
    first, second = x[..., :half], x[..., half:]
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


class PlainModel:
    """Dense forward of a LLaDA or Dream folder (`config.json` + safetensors) on the CPU.

    dtype: torch.float32 or torch.float64, for every weight, activation, rotation and softmax.

    `prediction_offset` is o where logits at position i predict position i + o (LLaDA 0, Dream 1);
    `suppress_mask` says that the MASK logit counts as minus infinity in decoding (`logits` and `forward`
    return it as the model gives it).
    Logits have one entry per row of the LM head, which is `embedding_size` for LLaDA, not `vocab_size`.
    """

    def __init__(self, folder, dtype=torch.float32):
        self.config = config = json.loads((Path(folder) / "config.json").read_text())
        self.weights = {name: tensor.to(dtype) for name, tensor in read_weights(folder).items()}
        self.dtype = dtype
        if config["model_type"] == "llada":
            self._read_llada(config)
        elif config["model_type"] == "Dream":
            self._read_dream(config)
        else:
            raise ValueError(f"model_type: expected 'llada' or 'Dream', got {config['model_type']!r}")
        eos = config["eos_token_id"]
        self.eos_token_ids = frozenset(eos if isinstance(eos, list) else [eos])
        self.mask_token_id = config["mask_token_id"]

    def _read_llada(self, config):
        self.prediction_offset, self.suppress_mask = 0, False
        self.layers, self.heads = config["n_layers"], config["n_heads"]
        self.kv_heads = config.get("n_kv_heads") or self.heads
        self.head_dim = config["d_model"] // self.heads
        self.theta, self.eps = config["rope_theta"], config["rms_norm_eps"]
        self.embedding = self.weights["model.transformer.wte.weight"]
        self.final_norm = self.weights["model.transformer.ln_f.weight"]
        tied = config.get("weight_tying", False)
        self.head = self.embedding if tied else self.weights["model.transformer.ff_out.weight"]
        self.layer_prefix = "model.transformer.blocks.{}."
        self.names = dict(
            attention_norm="attn_norm", q="q_proj", k="k_proj", v="v_proj", o="attn_out",
            mlp_norm="ff_norm", gate="ff_proj", up="up_proj", down="ff_out",
        )  # fmt: skip

    def _read_dream(self, config):
        self.prediction_offset, self.suppress_mask = 1, True
        self.layers, self.heads = config["num_hidden_layers"], config["num_attention_heads"]
        self.kv_heads = config.get("num_key_value_heads") or self.heads
        self.head_dim = config["hidden_size"] // self.heads
        self.theta, self.eps = config["rope_theta"], config["rms_norm_eps"]
        self.embedding = self.weights["model.embed_tokens.weight"]
        self.final_norm = self.weights["model.norm.weight"]
        tied = config.get("tie_word_embeddings", False)
        self.head = self.embedding if tied else self.weights["lm_head.weight"]
        self.layer_prefix = "model.layers.{}."
        self.names = dict(
            attention_norm="input_layernorm", q="self_attn.q_proj", k="self_attn.k_proj",
            v="self_attn.v_proj", o="self_attn.o_proj", mlp_norm="post_attention_layernorm",
            gate="mlp.gate_proj", up="mlp.up_proj", down="mlp.down_proj",
        )  # fmt: skip

    def _linear(self, x, layer, part):
        name = self.layer_prefix.format(layer) + self.names[part]
        y = x @ self.weights[name + ".weight"].T
        bias = self.weights.get(name + ".bias")
        return y if bias is None else y + bias

    def _norm(self, x, layer, part):
        return rms_norm(
            x, self.weights[self.layer_prefix.format(layer) + self.names[part] + ".weight"], self.eps
        )

    def new_row(self, length):
        """An empty K/V row over `length` positions. NaN, so that reading a position never computed shows."""
        shape = (length, self.kv_heads, self.head_dim)
        return [(torch.full(shape, math.nan, dtype=self.dtype), torch.full(shape, math.nan, dtype=self.dtype))
                for _ in range(self.layers)]  # fmt: skip

    def copy_row(self, row):
        return [(keys.clone(), values.clone()) for keys, values in row]

    @torch.no_grad()
    def forward(self, token_ids, positions, row):
        """Logits [n, vocabulary] of `token_ids` (n ints) at `positions` (n ints).

        K (after rotation) and V of these positions are *written* to `row` in every layer; attention goes
        over the whole row, to positions before and behind alike.
        """
        x = self.embedding[torch.tensor(token_ids)]  # [n, hidden]
        n, group = len(positions), self.heads // self.kv_heads
        for layer, (keys, values) in enumerate(row):
            h = self._norm(x, layer, "attention_norm")
            q = rotate(self._linear(h, layer, "q").view(n, self.heads, self.head_dim), positions, self.theta)
            k = rotate(
                self._linear(h, layer, "k").view(n, self.kv_heads, self.head_dim), positions, self.theta
            )
            keys[positions] = k
            values[positions] = self._linear(h, layer, "v").view(n, self.kv_heads, self.head_dim)
            all_keys, all_values = (
                t.repeat_interleave(group, dim=1) for t in (keys, values)
            )  # [L, heads, d]
            scores = torch.einsum("nhd,lhd->hnl", q, all_keys) / math.sqrt(self.head_dim)
            mixed = torch.einsum("hnl,lhd->nhd", scores.softmax(-1), all_values)
            x = x + self._linear(mixed.reshape(n, -1), layer, "o")
            h = self._norm(x, layer, "mlp_norm")
            h = torch.nn.functional.silu(self._linear(h, layer, "gate")) * self._linear(h, layer, "up")
            x = x + self._linear(h, layer, "down")
        return rms_norm(x, self.final_norm, self.eps) @ self.head.T

    def logits(self, rows):
        """A full forward of each token row: a list of [length, vocabulary], without Dream's shift."""
        return [self.forward(row, list(range(len(row))), self.new_row(len(row))) for row in rows]


def write_llada(
    folder, *, seed=0, d_model=32, n_heads=4, n_kv_heads=4, n_layers=2, mlp_hidden_size=48, vocab_size=40,
    embedding_size=None, weight_tying=False, eos_token_id=None, max_sequence_length=256, rope_theta=500000.0,
    sharpness=1.0, dtype=torch.float32, shards=1, drop=(),
):  # fmt: skip
    """Write a random LLaDA checkpoint in the HuggingFace layout to `folder` and return its config (a dict).

    n_kv_heads: an int, None (written as null, meaning n_heads) or "missing" (left out, meaning the same).
    embedding_size: rows of the embedding and the LM head, at least vocab_size (the default).
    The MASK id is vocab_size - 1; EOS defaults to vocab_size - 2. sharpness scales the logits, so that
    confidences spread. dtype: of the file's tensors. shards: above 1, files with an index.
    drop: names of config entries to leave out.
    """
    kv = n_kv_heads if isinstance(n_kv_heads, int) else n_heads
    head_dim, rows = d_model // n_heads, embedding_size or vocab_size
    config = {
        "architectures": ["LLaDAModelLM"], "model_type": "llada", "block_type": "llama",
        "d_model": d_model, "n_heads": n_heads, "n_layers": n_layers, "mlp_hidden_size": mlp_hidden_size,
        "vocab_size": vocab_size, "embedding_size": rows, "max_sequence_length": max_sequence_length,
        "rope": True, "rope_theta": rope_theta, "alibi": False, "activation_type": "silu",
        "layer_norm_type": "rms", "rms_norm_eps": 1e-5, "bias_for_layer_norm": False, "include_bias": False,
        "include_qkv_bias": False, "attention_layer_norm": False, "multi_query_attention": None,
        "weight_tying": weight_tying, "input_emb_norm": False, "scale_logits": False,
        "mask_token_id": vocab_size - 1, "pad_token_id": vocab_size - 2,
        "eos_token_id": vocab_size - 2 if eos_token_id is None else eos_token_id,
    }  # fmt: skip
    if n_kv_heads != "missing":
        config["n_kv_heads"] = n_kv_heads
    random = _Random(seed)
    weights = {"model.transformer.wte.weight": random.matrix(rows, d_model, scale=math.sqrt(d_model))}
    for i in range(n_layers):
        prefix = f"model.transformer.blocks.{i}."
        weights[prefix + "attn_norm.weight"] = random.gain(d_model)
        weights[prefix + "q_proj.weight"] = random.matrix(n_heads * head_dim, d_model)
        weights[prefix + "k_proj.weight"] = random.matrix(kv * head_dim, d_model)
        weights[prefix + "v_proj.weight"] = random.matrix(kv * head_dim, d_model)
        weights[prefix + "attn_out.weight"] = random.matrix(d_model, n_heads * head_dim)
        weights[prefix + "ff_norm.weight"] = random.gain(d_model)
        weights[prefix + "ff_proj.weight"] = random.matrix(mlp_hidden_size, d_model)
        weights[prefix + "up_proj.weight"] = random.matrix(mlp_hidden_size, d_model)
        weights[prefix + "ff_out.weight"] = random.matrix(d_model, mlp_hidden_size)
    weights["model.transformer.ln_f.weight"] = random.gain(d_model) * sharpness
    if not weight_tying:
        weights["model.transformer.ff_out.weight"] = random.matrix(rows, d_model)
    return _write(folder, config, weights, dtype, shards, drop)


def write_dream(
    folder, *, seed=0, hidden_size=32, num_attention_heads=4, num_key_value_heads=2, num_hidden_layers=2,
    intermediate_size=48, vocab_size=40, tie_word_embeddings=False, eos_token_id=None,
    max_position_embeddings=256, rope_theta=1000000.0, sharpness=1.0, dtype=torch.float32, shards=1, drop=(),
):  # fmt: skip
    """Write a random Dream (Qwen2 names, QKV bias) checkpoint to `folder` and return its config (a dict).

    num_key_value_heads: an int, None (null) or "missing". The other options are those of `write_llada`.
    """
    kv = num_key_value_heads if isinstance(num_key_value_heads, int) else num_attention_heads
    head_dim = hidden_size // num_attention_heads
    eos = vocab_size - 2 if eos_token_id is None else eos_token_id
    config = {
        "architectures": ["DreamModel"], "model_type": "Dream", "hidden_size": hidden_size,
        "num_attention_heads": num_attention_heads, "num_hidden_layers": num_hidden_layers,
        "intermediate_size": intermediate_size, "vocab_size": vocab_size, "hidden_act": "silu",
        "max_position_embeddings": max_position_embeddings, "rope_theta": rope_theta, "rope_scaling": None,
        "rms_norm_eps": 1e-6, "tie_word_embeddings": tie_word_embeddings, "use_sliding_window": False,
        "attention_dropout": 0.0, "mask_token_id": vocab_size - 1, "eos_token_id": eos,
        "pad_token_id": eos if isinstance(eos, int) else eos[0],
    }  # fmt: skip
    if num_key_value_heads != "missing":
        config["num_key_value_heads"] = num_key_value_heads
    random = _Random(seed)
    weights = {
        "model.embed_tokens.weight": random.matrix(vocab_size, hidden_size, scale=math.sqrt(hidden_size))
    }
    for i in range(num_hidden_layers):
        prefix = f"model.layers.{i}."
        weights[prefix + "input_layernorm.weight"] = random.gain(hidden_size)
        for name, out in (("q", num_attention_heads), ("k", kv), ("v", kv)):
            weights[prefix + f"self_attn.{name}_proj.weight"] = random.matrix(out * head_dim, hidden_size)
            weights[prefix + f"self_attn.{name}_proj.bias"] = random.vector(out * head_dim)
        weights[prefix + "self_attn.o_proj.weight"] = random.matrix(
            hidden_size, num_attention_heads * head_dim
        )
        weights[prefix + "post_attention_layernorm.weight"] = random.gain(hidden_size)
        weights[prefix + "mlp.gate_proj.weight"] = random.matrix(intermediate_size, hidden_size)
        weights[prefix + "mlp.up_proj.weight"] = random.matrix(intermediate_size, hidden_size)
        weights[prefix + "mlp.down_proj.weight"] = random.matrix(hidden_size, intermediate_size)
    weights["model.norm.weight"] = random.gain(hidden_size) * sharpness
    if not tie_word_embeddings:
        weights["lm_head.weight"] = random.matrix(vocab_size, hidden_size)
    return _write(folder, config, weights, dtype, shards, drop)


class _Random:
    """Seeded weights of a scale that keeps activations near one."""

    def __init__(self, seed):
        self.generator = torch.Generator().manual_seed(seed)

    def matrix(self, rows, columns, scale=1.0):
        return torch.randn(rows, columns, generator=self.generator) * (scale / math.sqrt(columns))

    def vector(self, size):
        return torch.randn(size, generator=self.generator) * 0.5

    def gain(self, size):
        return 1 + 0.1 * torch.randn(size, generator=self.generator)


def _write(folder, config, weights, dtype, shards, drop):
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    config["torch_dtype"] = str(dtype).removeprefix("torch.")
    for name in drop:
        del config[name]
    (folder / "config.json").write_text(json.dumps(config, indent=1))
    weights = {name: tensor.to(dtype).contiguous() for name, tensor in weights.items()}
    if shards == 1:
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
        return config
    weight_map = {}
    for shard in range(shards):
        # Round robin: a layer's tensors end up in different files, as a reader must be able to bear.
        part = {name: weights[name] for name in sorted(weights)[shard::shards]}
        file_name = f"model-{shard + 1:05d}-of-{shards:05d}.safetensors"
        save_file(part, folder / file_name, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(part, file_name))
    total = sum(tensor.numel() * tensor.element_size() for tensor in weights.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=1))
    return config
