"""The plain models themselves, which decode with the oracle."""

import math

import pytest
import torch

from plain_models import PlainModel, rotate, write_dream, write_llada

WRITERS = [
    (write_llada, {}),
    (write_llada, {"n_kv_heads": 2, "embedding_size": 48}),
    (write_llada, {"weight_tying": True, "shards": 3}),
    (write_dream, {}),
    (write_dream, {"num_key_value_heads": "missing", "tie_word_embeddings": True, "shards": 2}),
]


@pytest.mark.parametrize("write, options", WRITERS)
def test_cached_forward_after_full_forward_agrees(tmp_path, write, options):
    write(tmp_path, **options)
    model = PlainModel(tmp_path, dtype=torch.float64)
    tokens = [3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5]
    (full,) = model.logits([tokens])
    assert full.shape == (11, options.get("embedding_size", 40)) and full.isfinite().all()
    row = model.new_row(11)
    model.forward(tokens, list(range(11)), row)
    torch.testing.assert_close(model.forward(tokens[4:7], [4, 5, 6], row), full[4:7])
    changed = tokens[:4] + [7, 7, 7] + tokens[7:]
    stale = model.forward(changed[4:7], [4, 5, 6], row)
    (fresh,) = model.logits([changed])
    assert (stale - fresh[4:7]).abs().max() > 1e-3, "the cache must keep what the other positions saw"


def test_rotation_is_a_complex_product_of_the_halves():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(3, 2, 8, dtype=torch.float64, generator=generator)
    positions = [0, 7, 250]
    rotated = rotate(x, positions, 10000.0)
    pairs = torch.complex(x[..., :4], x[..., 4:])
    for n, position in enumerate(positions):
        for i, frequency in enumerate((1.0, 0.1, 0.01, 0.001)):
            turn = complex(math.cos(position * frequency), math.sin(position * frequency))
            expected = pairs[n, :, i] * turn
            torch.testing.assert_close(torch.complex(rotated[n, :, i], rotated[n, :, i + 4]), expected)


def test_forward_of_a_layer_by_hand(tmp_path):
    """One Dream layer, grouped heads and QKV bias, against torch's own attention."""
    write_dream(tmp_path, num_hidden_layers=1)
    model = PlainModel(tmp_path, dtype=torch.float64)
    tokens, places = [3, 1, 4, 1, 5], list(range(5))
    w = {name.removeprefix("model.layers.0."): tensor for name, tensor in model.weights.items()}
    functional = torch.nn.functional
    x = w["model.embed_tokens.weight"][tokens]
    h = functional.rms_norm(x, (32,), w["input_layernorm.weight"], 1e-6)
    q, k, v = (
        functional.linear(h, w[f"self_attn.{c}_proj.weight"], w[f"self_attn.{c}_proj.bias"]).view(5, -1, 8)
        for c in "qkv"
    )
    q, k = rotate(q, places, 1e6), rotate(k, places, 1e6)
    q, k, v = (t.transpose(0, 1) for t in (q, k.repeat_interleave(2, 1), v.repeat_interleave(2, 1)))
    mixed = functional.scaled_dot_product_attention(q, k, v).transpose(0, 1).reshape(5, 32)
    x = x + mixed @ w["self_attn.o_proj.weight"].T
    h = functional.rms_norm(x, (32,), w["post_attention_layernorm.weight"], 1e-6)
    gate = functional.silu(h @ w["mlp.gate_proj.weight"].T) * (h @ w["mlp.up_proj.weight"].T)
    x = x + gate @ w["mlp.down_proj.weight"].T
    expected = functional.rms_norm(x, (32,), w["model.norm.weight"], 1e-6) @ w["lm_head.weight"].T
    torch.testing.assert_close(model.logits([tokens])[0], expected)


def test_checkpoint_layouts_hold_the_same_model(tmp_path):
    tokens = [5, 2, 8, 1]
    write_llada(tmp_path / "one", n_kv_heads=None)
    write_llada(tmp_path / "sharded", n_kv_heads="missing", shards=4)
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) == 4
    one, sharded = (PlainModel(tmp_path / name).logits([tokens])[0] for name in ("one", "sharded"))
    assert torch.equal(one, sharded)
    write_llada(tmp_path / "half", n_kv_heads=None, dtype=torch.bfloat16)
    half = PlainModel(tmp_path / "half").logits([tokens])[0]
    assert 0 < (half - one).abs().max() < 0.2
