"""Models of random weights in published shapes: what a step costs does not depend on the weights."""

from __future__ import annotations

from dataclasses import replace

import torch

import blockbatch_kernels as bbk
from blockbatch.models import Model
from blockbatch.models.kv_scales import calibrate
from blockbatch.models.quantized_weights import QuantizedWeight
from blockbatch.models.spec import ModelSpec
from blockbatch.models.weights import TransformerWeights, allocate

_LLADA = ModelSpec(
    family="llada",
    num_layers=32,
    hidden_size=4096,
    num_heads=32,
    num_kv_heads=32,
    head_dim=128,
    intermediate_size=12288,
    vocab_size=126464,
    embedding_size=126464,
    rope_theta=5e5,
    rms_norm_eps=1e-5,
    max_length=8192,
    mask_token_id=126336,
    eos_token_ids=(126081,),
    qkv_bias=False,
    tie_embeddings=False,
    prediction_offset=0,
    suppress_mask=False,
    leap_threshold=0.75,
)
_DREAM = ModelSpec(
    family="dream",
    num_layers=28,
    hidden_size=3584,
    num_heads=28,
    num_kv_heads=4,
    head_dim=128,
    intermediate_size=18944,
    vocab_size=152064,
    embedding_size=152064,
    rope_theta=1e6,
    rms_norm_eps=1e-6,
    max_length=8192,
    mask_token_id=151666,
    eos_token_ids=(151643,),
    qkv_bias=True,
    tie_embeddings=False,
    prediction_offset=1,
    suppress_mask=True,
    leap_threshold=0.8,
)
# Of block-causal models: SDAR-8B with blocks of 32, Fast-dLLM v2 7B.
_SDAR = ModelSpec(
    family="sdar",
    num_layers=36,
    hidden_size=4096,
    num_heads=32,
    num_kv_heads=8,
    head_dim=128,
    intermediate_size=12288,
    vocab_size=151936,
    embedding_size=151936,
    rope_theta=1e6,
    rms_norm_eps=1e-6,
    max_length=32768,
    mask_token_id=151669,
    eos_token_ids=(151643, 151645),
    qkv_bias=False,
    tie_embeddings=False,
    prediction_offset=0,
    suppress_mask=False,
    leap_threshold=0.75,
    qk_norm=True,
    block_size=32,
)
_FAST_DLLM_V2 = replace(
    _DREAM,
    family="fast_dllm_v2",
    max_length=32768,
    mask_token_id=151665,
    eos_token_ids=(151645,),
    suppress_mask=False,
    block_size=32,
)
_SMALL = {
    "num_layers": 2,
    "hidden_size": 128,
    "num_heads": 2,
    "head_dim": 64,
    "intermediate_size": 256,
    "vocab_size": 2048,
    "embedding_size": 2048,
    "mask_token_id": 2000,
    "eos_token_ids": (2001,),
}
# The small ones have the same conventions and serve to try a benchmark out.
SHAPES = {
    "llada-8b": _LLADA,
    "dream-7b": _DREAM,
    # What one of two GPUs computes of the first: for products by gemm.py.
    "llada-8b-half": replace(
        _LLADA,
        num_heads=16,
        num_kv_heads=16,
        intermediate_size=6144,
        vocab_size=63232,
        embedding_size=63232,
        mask_token_id=63104,
        eos_token_ids=(63080,),
    ),
    "small-llada": replace(_LLADA, **_SMALL, num_kv_heads=2),
    "small-dream": replace(_DREAM, **_SMALL, num_kv_heads=1),
}
BLOCK_SHAPES = {
    "sdar-8b": _SDAR,
    "fast-dllm-v2-7b": _FAST_DLLM_V2,
    "small-sdar": replace(_SDAR, **_SMALL, num_kv_heads=1),
    "small-fast-dllm-v2": replace(_FAST_DLLM_V2, **_SMALL, num_kv_heads=1),
}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def random_model(
    name: str,
    device: torch.device,
    dtype: torch.dtype,
    *,
    backend: str | None = None,
    seed: int = 0,
) -> Model:
    """A model of the shape `name`, without a tokenizer.

    Weights are normal with a deviation of 0.02 and norms are 1, which keeps activations finite, and leaves
    every confidence far below any threshold: a branch commits one token a step. The LM head's rows of MASK
    and EOS are zero, so that neither is ever predicted.
    """
    spec = {**SHAPES, **BLOCK_SHAPES}[name]
    weights = allocate(spec, device, dtype)
    generator = torch.Generator(device).manual_seed(seed)
    for layer in weights.layers:
        for tensor in (layer.qkv_weight, layer.out_weight, layer.gate_up_weight, layer.down_weight):
            tensor.normal_(std=0.02, generator=generator)
        if layer.qkv_bias is not None:
            layer.qkv_bias.normal_(std=0.02, generator=generator)
        for norm in (layer.q_norm, layer.k_norm):
            if norm is not None:
                norm.fill_(1.0)
        layer.input_norm.fill_(1.0)
        layer.post_norm.fill_(1.0)
    weights.final_norm.fill_(1.0)
    weights.embedding.normal_(generator=generator)
    weights.lm_head.normal_(std=0.02, generator=generator)
    weights.lm_head[[spec.mask_token_id, *spec.eos_token_ids]] = 0.0
    return Model(spec, weights, None, backend=backend, name=name)


def quantized(model: Model, quantization: str = "fp8") -> Model:
    """The same model with the weights of its layers in e4m3, by "fp8-all" its LM head too."""

    def in_e4m3(weight: torch.Tensor | QuantizedWeight) -> QuantizedWeight:
        if isinstance(weight, QuantizedWeight):
            return weight
        return QuantizedWeight(*bbk.quantize_rows(weight, backend="reference"))

    names = ("qkv_weight", "out_weight", "gate_up_weight", "down_weight")
    layers = [
        replace(layer, **{name: in_e4m3(getattr(layer, name)) for name in names})
        for layer in model.weights.layers
    ]
    lm_head = model.weights.lm_head
    weights = replace(
        model.weights, layers=layers, lm_head=in_e4m3(lm_head) if quantization == "fp8-all" else lm_head
    )
    return Model(model.spec, weights, None, backend=model.backend, name=model.name)


def with_kv_in_e4m3(model: Model) -> Model:
    """The same weights, with a K/V cache in e4m3, by scales as they are found when a model is loaded."""
    options = dict(backend=model.backend, name=model.name, kv_scales=calibrate(model))
    return Model(model.spec, model.weights, None, **options)


def with_backend(model: Model, backend: str | None) -> Model:
    """The same weights and scales of the cache, computed by another backend."""
    options = dict(backend=backend, name=model.name, kv_scales=model.kv_scales)
    return Model(model.spec, model.weights, None, **options)


def random_prompt(spec: ModelSpec, length: int, seed: int = 0) -> list[int]:
    """Token ids below every special token."""
    generator = torch.Generator().manual_seed(seed)
    limit = min(spec.mask_token_id, *spec.eos_token_ids)
    return torch.randint(limit, (length,), generator=generator).tolist()


def product_bytes(weights: TransformerWeights) -> int:
    """Bytes of the weights that a forward reads whole: all layers' matrices and the LM head."""
    layers = sum(
        tensor.nbytes
        for layer in weights.layers
        for tensor in (layer.qkv_weight, layer.out_weight, layer.gate_up_weight, layer.down_weight)
    )
    return layers + weights.lm_head.nbytes


def step_flops(spec: ModelSpec, tokens: int, predictions: int, canvas_length: int) -> int:
    """Multiplications and additions of a forward of packed tokens that attend to whole canvases."""
    query, kv = spec.num_heads * spec.head_dim, spec.num_kv_heads * spec.head_dim
    layer = spec.hidden_size * (2 * query + 2 * kv + 3 * spec.intermediate_size)
    attention = 2 * canvas_length * query
    return 2 * (
        tokens * spec.num_layers * (layer + attention) + predictions * spec.hidden_size * spec.vocab_size
    )
