"""Products that rotate and store q, k and v in e4m3: errors of the extension, a model's in pieces."""

import pytest
import torch

import blockbatch
import plain_models
from blockbatch.models.products import products_of
from blockbatch.models.quantized_weights import QuantizedWeight
from blockbatch_kernels import tuning
from described_tensors import Described, change
from rotated_places import E4M3, nan_like, places, same_bytes

# Errors of the extension, before any launch.


@pytest.fixture
def arguments():
    half, byte = torch.bfloat16, torch.uint8
    return dict(
        x=Described((16, 64), byte),
        x_scale=Described((16,)),
        weight=Described((192, 64), byte),
        weight_scale=Described((192,)),
        bias=None,
        q=Described((16, 1, 64), half),
        k_cache=Described((1, 1, 1, 64), byte),
        v_cache=Described((1, 1, 1, 64), byte),
        k_scale=Described((1,), address=16),
        v_scale=Described((1,), address=16),
        positions=Described((16,), torch.int32),
        slot_mapping=Described((16,), torch.int64),
        cos=Described((8, 32)),
        sin=Described((8, 32)),
        tile=tuning.Fp8Tile(16, 64),
        static_weight=False,
        programmatic=False,
        stream=0,
    )


UNALIGNED = "q, k_cache, v_cache, cos, sin: expected addresses and strides of"


@pytest.mark.parametrize(
    ("name", "fields", "message"),
    [
        ("q", dict(shape=(15, 1, 64)), "rope: expected the tokens and dtype of the product"),
        ("x", dict(shape=(17, 64)), "num_tokens: expected at most the tile's 16, got 17"),
        ("x", dict(shape=(16, 56)), "in_features: expected a multiple of 16, got 56"),
        ("q", dict(shape=(16, 1, 96)), "head_dim: expected a multiple of 64, got 96"),
        ("x", dict(address=8), "x: expected rows aligned to 16 bytes, got .* 8 bytes past"),
        ("x", dict(strides=(72, 1)), "x and weight: expected row strides of a multiple of 16, got 72 and 64"),
        ("cos", dict(address=8), UNALIGNED),
        ("k_cache", dict(address=4), UNALIGNED),
        ("k_cache", dict(dtype=torch.bfloat16), "k_cache: expected uint8 beside scales, got bfloat16"),
        ("q", dict(dtype=torch.float32), "dtype: expected code 1 or 2, got 0"),
    ],
)
def test_wrong_arguments_raise(arguments, name, fields, message):
    extension = pytest.importorskip("blockbatch_kernels._C", reason="the extension is not built here")
    with pytest.raises(ValueError, match=f"linear_rope_kv_write_fp8: {message}"):
        extension.linear_rope_kv_write_fp8(**change(arguments, name, **fields))


@pytest.mark.parametrize(
    ("tile", "got"),
    [
        (tuning.Fp8Tile(16, 192), "tokens 16, rows 192, split_k 1, multicast 1, x_multicast 1, rotated"),
        (tuning.Fp8Tile(16, 64, waves=True), "tokens 16, rows 64, .*, waves, rotated"),
    ],
)
def test_a_tile_that_is_not_compiled(arguments, tile, got):
    extension = pytest.importorskip("blockbatch_kernels._C", reason="the extension is not built here")
    with pytest.raises((ValueError, RuntimeError)) as caught:  # without a GPU it is that which is missing
        extension.linear_rope_kv_write_fp8(**dict(arguments, tile=tile))
    if torch.cuda.is_available():
        assert caught.match(f"linear_rope_kv_write_fp8: tile: expected a compiled one, got {got}")


@pytest.mark.parametrize("operator", ["linear_rope_kv_write", "linear_rope_kv_write_fp8"])
def test_one_scale_alone(arguments, operator):
    extension = pytest.importorskip("blockbatch_kernels._C", reason="the extension is not built here")
    arguments["v_scale"] = None
    if operator == "linear_rope_kv_write":
        del arguments["x_scale"], arguments["weight_scale"]
        arguments |= {name: Described(arguments[name].shape, torch.bfloat16) for name in ("x", "weight")}
        arguments["tile"] = tuning.LinearTile(16, 64)
    with pytest.raises(ValueError, match=f"{operator}: k_scale and v_scale: expected both or none, got one"):
        getattr(extension, operator)(**arguments)


# The model's products.


@pytest.mark.parametrize("cache", [torch.bfloat16, E4M3], ids=str)
@pytest.mark.parametrize("family", ["llada", "dream"])
@pytest.mark.parametrize("quantization", [None, "fp8"])
def test_pieces_write_what_the_pieces_alone_write(tmp_path, quantization, family, cache):
    """With `fixed_tokens` what is stored of a token does not depend on how many tokens there are."""
    getattr(plain_models, f"write_{family}")(tmp_path)
    model = blockbatch.load_model(tmp_path, device="cpu", quantization=quantization, dtype="bfloat16")
    spec, layer = model.spec, model.weights.layers[0]
    assert isinstance(layer.qkv_weight, QuantizedWeight) == (quantization == "fp8")
    torch.manual_seed(0)
    x = torch.randn(12, spec.hidden_size).bfloat16()
    *where, caches, scales = places(
        12, spec.num_kv_heads, spec.head_dim, torch.bfloat16, "cpu", cache == E4M3
    )
    alone = nan_like(caches)
    whole, pieces = (products_of(spec, model.weights, None, size) for size in (None, 4))
    q = pieces.rotated(pieces.rows(x), layer, (*where, *caches), scales)
    for first in range(0, 12, 4):
        part = slice(first, first + 4)
        own = (where[0][part], where[1][part], *where[2:], *alone)
        got = whole.rotated(whole.rows(x[part]), layer, own, scales)
        assert torch.equal(q[part], got)
    assert same_bytes(caches, alone) and q.isfinite().any()
    none = pieces.rotated(
        pieces.rows(x[:0]), layer, (where[0][:0], where[1][:0], *where[2:], *caches), scales
    )
    assert none.shape == (0, spec.num_heads, spec.head_dim)
