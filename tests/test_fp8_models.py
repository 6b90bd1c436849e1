"""Models whose weights are in e4m3: quantised while they are loaded, or stored so."""

import json
import math

import pytest
import torch
from safetensors.torch import save_file

import blockbatch
import plain_models
from block_models import write as write_block
from blockbatch import memory
from blockbatch.decoding import METHOD_BUILDERS, Session
from blockbatch.methods import BLOCK_METHODS
from blockbatch.models import checkpoint, weights
from blockbatch.models.products import products_of
from blockbatch.models.quantized_weights import QuantizedWeight
from blockbatch.models.spec import CheckpointError
from blockbatch.tracing import trace_header
from blockbatch_kernels import library
from live_memory import LiveMemory

E4M3 = torch.float8_e4m3fn
FIELDS = ("qkv_weight", "out_weight", "gate_up_weight", "down_weight")
WRITERS = {
    "llada": lambda folder: plain_models.write_llada(folder, d_model=64, mlp_hidden_size=96, n_kv_heads=2),
    "dream": lambda folder: plain_models.write_dream(folder, hidden_size=64, intermediate_size=96),
    "sdar": lambda folder: write_block(folder, "sdar"),
    "fast_dllm_v2": lambda folder: write_block(folder, "fast_dllm_v2"),
}
PROMPT = [1, 5, 3, 2, 7]


@pytest.fixture(params=WRITERS)
def folder(request, tmp_path):
    WRITERS[request.param](tmp_path)
    return tmp_path


def load(folder, **options):
    return blockbatch.load_model(folder, device="cpu", **options)


def by_row(weight):
    """A second witness of the quantisation: values as fp32, and scales."""
    scale = weight.abs().amax(-1) / 448
    return (weight / scale[:, None]).to(E4M3).float(), scale


class QuantizedPlain(plain_models.PlainModel):
    """The dense forward, with rows of weights and of activations rounded to e4m3 in front of each product."""

    def _linear(self, x, layer, part):
        name = self.layer_prefix.format(layer) + self.names[part]
        (values, scale), (w_values, w_scale) = by_row(x), by_row(self.weights[name + ".weight"])
        y = (values @ w_values.T) * scale[:, None] * w_scale
        bias = self.weights.get(name + ".bias")
        return y if bias is None else y + bias


def test_weights_are_quantised_by_row(folder):
    plain, model = load(folder), load(folder, quantization="fp8")
    assert plain.quantization is None and model.quantization == "fp8"
    assert plain.numbers == "float32" and model.numbers == "float32, layers in fp8"
    for ours, exact in zip(model.weights.layers, plain.weights.layers):
        for field in FIELDS:
            weight = getattr(ours, field)
            assert isinstance(weight, QuantizedWeight)
            values, scale = by_row(getattr(exact, field))
            torch.testing.assert_close(weight.scale, scale)
            assert (weight.values.float() == values).float().mean() > 0.99  # ties, by one rounding more
            torch.testing.assert_close(weight.values.float(), values, rtol=2**-3, atol=2**-9)
        assert torch.equal(ours.input_norm, exact.input_norm)
    assert torch.equal(model.weights.lm_head, plain.weights.lm_head)
    assert torch.equal(model.weights.embedding, plain.weights.embedding)


@pytest.mark.parametrize("family", ["llada", "dream"])
def test_the_forward_is_that_of_a_second_witness(family, tmp_path):
    WRITERS[family](tmp_path)
    rows = [[(3 * i + row) % 38 for i in range(40)] for row in range(3)]
    exact, quantised = (kind(tmp_path) for kind in (plain_models.PlainModel, QuantizedPlain))
    want = torch.stack(quantised.logits(rows))
    got = load(tmp_path, quantization="fp8").logits(rows)[..., : want.shape[-1]]
    want = want[..., : got.shape[-1]]
    effect = (want - torch.stack(exact.logits(rows))[..., : got.shape[-1]]).abs().mean()
    assert 0 < (got - want).abs().mean() < 0.25 * effect


def test_a_decode_by_each_family(folder):
    model = load(folder, quantization="fp8", dtype="bfloat16")
    method = BLOCK_METHODS[0] if model.spec.block_size is not None else "blockbatch"
    result = blockbatch.generate(model, PROMPT, blockbatch.DecodeConfig(method, gen_length=16))
    assert result.nfe.total > 0 and model.spec.mask_token_id not in result.canvas


def test_the_whole_model_is_never_there_in_16_bits(tmp_path):
    plain_models.write_llada(tmp_path, d_model=128, mlp_hidden_size=384, n_layers=12, dtype=torch.bfloat16)
    with LiveMemory() as live:
        model = load(tmp_path, quantization="fp8", dtype="bfloat16")
    quantised = weights.weight_bytes(model.spec, torch.bfloat16, quantization="fp8")
    whole = weights.weight_bytes(model.spec, torch.bfloat16)
    # A weight as it is stored, what quantising makes of it in fp32, and the buffer that files are read into.
    assert live.peak <= quantised + 24 * 384 * 128
    assert live.peak < 0.9 * whole


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_weights_are_counted(folder, dtype):
    model = load(folder, quantization="fp8", dtype=dtype)
    allocated = {}
    for owner in (model.weights, *model.weights.layers):
        for value in vars(owner).values():
            for tensor in vars(value).values() if isinstance(value, QuantizedWeight) else (value,):
                if isinstance(tensor, torch.Tensor):
                    allocated[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
    assert weights.weight_bytes(model.spec, model.dtype, quantization="fp8") == sum(allocated.values())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_what_a_forward_takes_is_bounded(tmp_path, dtype, monkeypatch):
    monkeypatch.setitem(blockbatch.decoding.session.ROW_TOKENS, "cpu", 64)
    monkeypatch.setattr(library, "is_in_torch_dispatch_mode", lambda: False)
    plain_models.write_llada(tmp_path, d_model=64, mlp_hidden_size=256)
    model = load(tmp_path, quantization="fp8", dtype=dtype)
    config = blockbatch.DecodeConfig(gen_length=16)
    prompts = [[1 + number % 5] * 40 for number in range(30)]
    built = METHOD_BUILDERS["blockbatch"](config, model.spec, model.eos_token_ids)
    needed = memory.needs(model, config, len(prompts), 40)
    with LiveMemory() as live:
        session = Session(model, prompts, built, config.gen_length)
        for _ in range(3):
            session.step()
    assert needed.cache < live.peak <= sum(needed)


def test_the_trace_says_it(tmp_path):
    plain_models.write_llada(tmp_path)
    config = blockbatch.DecodeConfig(gen_length=16, trace=True)
    for options, expected in (({}, None), (dict(quantization="fp8"), "fp8")):
        model = load(tmp_path, **options)
        result = blockbatch.generate(model, PROMPT, config)
        assert trace_header(model, PROMPT, config, result).get("quantization") == expected


@pytest.mark.parametrize("wrong", ["int8", "FP8", 8, ""])
def test_another_quantisation_is_refused(tmp_path, wrong):
    plain_models.write_llada(tmp_path)
    with pytest.raises(ValueError, match="quantization: expected None or one of 'fp8', 'fp8-all', got"):
        load(tmp_path, quantization=wrong)


# Stored in e4m3.


def compressed(strategy, **changes):
    weights = dict(num_bits=8, type="float", strategy=strategy, symmetric=True, dynamic=False)
    weights |= dict(block_structure=[16, 32]) if strategy == "block" else {}
    group = dict(weights=weights | changes, targets=["Linear"], input_activations=None)
    return dict(
        quant_method="compressed-tensors",
        format="float-quantized",
        config_groups=dict(group_0=group),
        ignore=["lm_head"],
        kv_cache_scheme=None,
    )


FP8 = dict(quant_method="fp8", activation_scheme="dynamic")
FORMATS = {
    "channel": (compressed("channel"), "weight_scale"),
    "tensor": (compressed("tensor"), "weight_scale"),
    "block": (compressed("block"), "weight_scale"),
    "inverse blocks": (dict(FP8, weight_block_size=[16, 32], fmt="e4m3"), "weight_scale_inv"),
    "whole": (dict(FP8, activation_scheme="static"), "weight_scale"),
}


def is_product(name):
    return name.endswith("weight") and any(
        part in name for part in ("_proj.", "attn_out.", "blocks.0.ff_out", "blocks.1.ff_out")
    )


def quantise(weight, kind):
    """Values in e4m3, their scales as they are stored, and what they stand for."""
    rows, columns = weight.shape
    if kind == "channel":
        scale = weight.abs().amax(-1, keepdim=True) / 448
        spread = scale
    elif kind in ("tensor", "whole"):
        scale = spread = weight.abs().amax() / 448
        scale = scale.reshape(1) if kind == "tensor" else scale
    else:
        grid = (math.ceil(rows / 16), math.ceil(columns / 32))
        padded = torch.zeros(grid[0] * 16, grid[1] * 32)
        padded[:rows, :columns] = weight
        scale = padded.view(grid[0], 16, grid[1], 32).abs().amax((1, 3)) / 448
        spread = scale.repeat_interleave(16, 0).repeat_interleave(32, 1)[:rows, :columns]
    values = (weight / spread).to(E4M3)
    return values, scale.clone(), values.float() * spread


def write_stored(folder, kind, skip=(), change=None):
    """Rewrites a folder's weights of products in e4m3; returns what they stand for, by name."""
    settings, scale_name = FORMATS[kind]
    tensors, exact = plain_models.read_weights(folder), {}
    for name in list(tensors):
        if is_product(name) and name not in skip:
            values, scale, exact[name] = quantise(tensors[name].float(), kind)
            tensors[name], tensors[name.removesuffix("weight") + scale_name] = values, scale
            if kind == "whole":
                tensors[name.removesuffix("weight") + "input_scale"] = torch.tensor(0.5)
    if change is not None:
        change(tensors)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": settings}))
    return exact


@pytest.mark.parametrize("kind", FORMATS)
def test_stored_weights(folder, kind):
    plain = load(folder)
    exact = write_stored(folder, kind)
    model = load(folder)
    assert model.quantization == "fp8"
    places = checkpoint.TENSOR_MAPS[model.spec.family](model.spec)
    assert len(exact) == 7 * model.spec.num_layers
    for name, value in exact.items():
        rows = places[name].rows(model.weights)
        if "block" in kind:  # quantised again, by row
            want, scale = by_row(value)
            torch.testing.assert_close(rows.scale, scale)
            torch.testing.assert_close(rows.values.float(), want, rtol=2**-3, atol=2**-9)
            assert (rows.values.float() == want).float().mean() > 0.98
        else:
            assert torch.equal(rows.float(), value)
    assert torch.equal(model.weights.lm_head, plain.weights.lm_head)
    ids = [PROMPT * 4]
    assert (model.logits(ids) - plain.logits(ids)).abs().mean() < 0.2 * plain.logits(ids).abs().mean()


def test_a_weight_that_was_left_in_16_bits(tmp_path):
    plain_models.write_llada(tmp_path)
    name = "model.transformer.blocks.1.ff_out.weight"
    exact = plain_models.read_weights(tmp_path)[name]
    write_stored(tmp_path, "channel", skip=(name,))
    torch.testing.assert_close(load(tmp_path).weights.layers[1].down_weight.scale, by_row(exact)[1])


UP = "model.transformer.blocks.1.up_proj."


@pytest.mark.parametrize(
    "kind, change, message",
    [
        ("channel", lambda t: t.pop(UP + "weight_scale"), "up_proj.weight_scale or .*got neither"),
        (
            "channel",
            lambda t: t.update({UP + "weight_scale_inv": t[UP + "weight_scale"].clone()}),
            "expected .*, got both",
        ),
        (
            "channel",
            lambda t: t.update({UP + "weight_scale": torch.ones(3, 2)}),
            r"weight_scale': expected shape \[\], \[1\], \[48\] or \[48, 1\], got \[3, 2\]",
        ),
        (
            "block",
            lambda t: t.update({UP + "weight_scale": torch.ones(3, 2)}),
            r"or \[3, 1\] of blocks, got \[3, 2\]",
        ),
        (
            "channel",
            lambda t: t.update({UP + "weight_scale": torch.ones(48, dtype=torch.int32)}),
            "weight_scale': expected dtype F32, F16, BF16, got I32",
        ),
        (
            "channel",
            lambda t: t.update({UP + "weight_scale": torch.full((48, 1), math.nan)}),
            "expected finite values",
        ),
        (
            "tensor",
            lambda t: t[UP + "weight"].view(torch.uint8).fill_(0x7F),
            "up_proj.weight.*F8_E4M3.*expected finite values, got NaN",
        ),
        (
            "channel",
            lambda t: t.update({UP + "weight": torch.ones(48, 32)}),
            "expected .*up_proj.weight' in F8_E4M3 .*, got F32",
        ),
        (
            "channel",
            lambda t: t.update({"model.transformer.ff_out.weight": torch.ones(40, 32).to(E4M3)}),
            "ff_out.weight.*F8_E4M3",
        ),
        ("channel", lambda t: t.update({UP + "k_scale": torch.ones(1)}), "superfluous tensors .*k_scale"),
    ],
)
def test_stored_weights_that_are_wrong(tmp_path, kind, change, message):
    plain_models.write_llada(tmp_path)
    write_stored(tmp_path, kind, change=change)
    with pytest.raises(CheckpointError, match=message):
        load(tmp_path)


@pytest.mark.parametrize(
    "settings, named",
    [
        (dict(quant_method="awq", bits=4), "quant_method 'awq'"),
        (dict(quant_method="gptq"), "quant_method 'gptq'"),
        (dict(quant_method="fbgemm_fp8"), "quant_method 'fbgemm_fp8'"),
        (dict(bits=8), "quant_method None"),
        (dict(FP8, fmt="e5m2"), "fmt 'e5m2'"),
        (dict(FP8, weight_block_size=128), "weight_block_size 128"),
        (compressed("group", num_bits=4, type="int"), "format 'float-quantized' with weights .*4.*'int'"),
        (compressed("channel", type="int"), "with weights .*'int'"),
        (compressed("channel", symmetric=False), "with weights"),
        (dict(compressed("channel"), kv_cache_scheme=dict(num_bits=8)), "with kv_cache_scheme"),
        (dict(compressed("channel"), transform_config=dict(h=1)), "with transform_config"),
        (dict(compressed("channel"), sparsity_config=dict(format="sparse-24-bitmask")), "sparsity_config"),
        (dict(compressed("channel"), config_groups={}), "config_groups"),
    ],
)
def test_other_schemes_are_refused_by_name(tmp_path, settings, named):
    config = plain_models.write_llada(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({**config, "quantization_config": settings}))
    with pytest.raises(CheckpointError, match=f"quantization_config must be .* got .*{named}"):
        load(tmp_path)


def test_products_in_pieces_are_those_of_the_pieces(tmp_path):
    """With `fixed_tokens` a token's products do not depend on how many tokens there are."""
    plain_models.write_llada(tmp_path)
    model = load(tmp_path, quantization="fp8", dtype="bfloat16")
    layer, generator = model.weights.layers[0], torch.Generator().manual_seed(0)
    x = torch.randn(12, 32, generator=generator).bfloat16()
    whole, pieces = (products_of(model.spec, model.weights, None, size) for size in (None, 4))
    got = pieces.linear(pieces.rows(x), layer.gate_up_weight)
    for first in range(0, 12, 4):
        part = whole.linear(whole.rows(x[first : first + 4]), layer.gate_up_weight)
        assert torch.equal(got[first : first + 4], part)
    assert pieces.linear(pieces.rows(x[:0]), layer.gate_up_weight).shape == (0, 96)
