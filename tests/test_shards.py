"""Which part of a checkpoint a rank reads: every element by one rank, or by all of them."""

import random
from dataclasses import replace

import pytest
import torch
from safetensors.torch import save_file

import block_models
from blockbatch.models.checkpoint import read_config, read_spec
from blockbatch.models.safetensors_file import read_header, read_tensor
from blockbatch.models.weights import allocate, layer_destinations, model_destinations
from blockbatch.parallel import Shard
from plain_models import write_llada


@pytest.fixture(scope="module", params=["llada", "sdar", "fast_dllm_v2"])
def spec(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    if request.param == "llada":
        write_llada(folder, n_heads=8, n_kv_heads=4, d_model=32, mlp_hidden_size=48, embedding_size=43)
    else:  # with norms of heads, or biases
        sizes = dict(num_attention_heads=8, num_key_value_heads=4, hidden_size=64, vocab_size=43)
        block_models.write(folder, request.param, **sizes)
    return read_spec(read_config(folder))


@pytest.mark.parametrize("size", [2, 4, 8])
@pytest.mark.parametrize("tied", [False, True])
def test_parts_make_up_the_whole(spec, size, tied):
    spec = replace(spec, tie_embeddings=tied)
    places = model_destinations(spec) | layer_destinations(spec, 1)
    shards = [Shard(spec, rank, size) for rank in range(size)]
    for role, place in places.items():
        read = torch.zeros(place.shape, dtype=torch.int32)
        for shard in shards:
            weights = allocate(shard.local_spec, "meta", torch.float32, vocabulary=shard.vocabulary)
            part = shard.cut(place)
            shape = part.rows(weights).shape
            assert part.shape == place.shape
            rows = read[part.first_row :][: shape[0]]
            rows = rows[:, part.first_column :][:, : shape[1]] if len(shape) > 1 else rows
            assert rows.shape == shape
            rows += 1
        times = size if "norm" in role or role == "embedding" else 1
        if role in ("k", "v", "k_bias", "v_bias"):
            times = max(1, size // spec.num_kv_heads)
        whole = read[: place.stop - place.start]
        assert (whole == times).all() and not read[place.stop - place.start :].any(), role


def test_heads_stand_by_the_keys_that_they_attend_to(spec):
    group = spec.num_heads // spec.num_kv_heads
    places = layer_destinations(spec, 0)
    for size in (2, 4, 8):
        for rank in range(size):
            shard = Shard(spec, rank, size)
            q, k = (shard.cut(places[role]) for role in ("q", "k"))
            first, count = q.first_row // spec.head_dim, shard.local_spec.num_heads
            keys = range(
                k.first_row // spec.head_dim, k.first_row // spec.head_dim + shard.local_spec.num_kv_heads
            )
            assert [head // group for head in range(first, first + count)] == [
                keys[index // (count // len(keys))] for index in range(count)
            ]


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16])
def test_parts_are_read(tmp_path, stored):
    rng = random.Random(0)
    for number in range(40):
        rows, columns = rng.randint(1, 12), rng.randint(1, 12)
        whole = torch.randn(rows, columns, generator=torch.Generator().manual_seed(number)).to(stored)
        path = tmp_path / f"{number}.safetensors"
        save_file({"before": torch.ones(3), "w": whole, "behind": torch.ones(5)}, path)
        entry = read_header(path)["w"]
        first_row, first_column = rng.randrange(rows), rng.randrange(columns)
        part = whole[
            first_row : rng.randint(first_row + 1, rows),
            first_column : rng.randint(first_column + 1, columns),
        ]
        written = torch.full(part.shape, float("nan"))
        staging = torch.empty(4 * part.shape[1] * rng.randint(1, 5) + rng.randrange(4), dtype=torch.uint8)
        read_tensor(entry, written, staging, first_row, first_column)
        assert torch.equal(written, part.float())


@pytest.mark.parametrize(
    "change, size, message",
    [
        ({}, 3, "num_heads = 8, got 3"),
        ({"intermediate_size": 50}, 4, "intermediate_size = 50, got 4"),
        ({"num_heads": 6, "num_kv_heads": 3}, 2, "num_kv_heads = 3 or is a multiple of it, got 2"),
    ],
)
def test_what_cannot_be_dealt_out(spec, change, size, message):
    with pytest.raises(ValueError, match=f"^tensor_parallel: expected a number that divides {message}$"):
        Shard(replace(spec, **change), 0, size)
